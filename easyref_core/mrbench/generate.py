"""Paints the benchmark's pictures for one method: <out>/<method>/<group>/<seed>.png, and method.json that says how.

What is there already is left alone, so an interrupted run continues where it stopped, and more groups or seeds can be
added later. Under `accelerate launch` every process paints its share of the groups.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files.atomic_write import atomic_write
from .images import Exclusion, open_picture
from .manifest import Group, Manifest, read_manifest, usable
from .methods import Method, Sampling, Task, build, check
from .processes import this_process
from .record import base_fingerprint, group_digest, merge, read_record, write_record

if TYPE_CHECKING:
    from PIL import Image


PATHS = ("checkpoint", "mllm", "weights", "image_encoder")  # settings of a method that name a file or folder
DTYPES = ("float32", "float16", "bfloat16")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # a method's name is a folder


@dataclasses.dataclass(frozen=True)
class Config:
    """A run as a YAML file says it. Paths in the file are relative to the file."""

    base: Path
    manifest: Path
    out: Path
    sampling: Sampling
    seeds: tuple[int, ...]
    methods: Mapping[str, Mapping[str, Any]]
    batch: int = 4  # pictures painted at once
    dtype: str = "float32"  # of the base model


@dataclasses.dataclass(frozen=True)
class Painted:
    """What a run did."""

    painted: int  # pictures that are new
    kept: int  # pictures that were there
    exclusions: tuple[Exclusion, ...]  # what could not be read


def read_config(path: Path | str) -> Config:
    """The run described by a YAML file. Raises ValueError for anything in it that is not as documented."""
    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no config at {path}.")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    fields = {field.name: field for field in dataclasses.fields(Config)}
    _check_keys(path, data, fields)
    for name in ("base", "manifest", "out"):
        data[name] = path.parent / data[name]
    _check_keys(f"{path}: sampling", data["sampling"], {f.name: f for f in dataclasses.fields(Sampling)})
    size = data["sampling"]["size"]
    data["sampling"] = Sampling(
        **{**data["sampling"], "size": tuple(size) if isinstance(size, list) else size}
    )
    if not (isinstance(data["seeds"], list) and all(type(seed) is int for seed in data["seeds"])):
        raise ValueError(
            f"{path}: seeds is {data['seeds']!r}; wanted a list of whole numbers, such as [0, 1]."
        )
    if not isinstance(data["methods"], dict):
        raise ValueError(
            f"{path}: methods is {data['methods']!r}; wanted names with their settings below them."
        )
    if data.get("dtype", DTYPES[0]) not in DTYPES:
        raise ValueError(f"{path}: dtype is {data['dtype']!r}; wanted one of {', '.join(DTYPES)}.")
    data["seeds"] = tuple(data["seeds"])
    methods = {}
    for name, entry in data["methods"].items():
        if not NAME.fullmatch(name):
            raise ValueError(
                f"{path}: a method is called {name!r}; wanted letters, digits, '.', '_' and '-'."
            )
        check(name, entry)
        methods[name] = {
            key: str(path.parent / value) if key in PATHS and value else value for key, value in entry.items()
        }
    return Config(**{**data, "methods": methods})


def run(config: Config, names: Sequence[str] = (), references: int | None = None) -> dict[str, Painted]:
    """Paint the methods of a config, all of them unless `names` says which.

    references: how many of each group's references a method sees, the first ones; such pictures go into a folder of
    their own, <method>-<n>-references.
    """
    import torch

    from easyref_core.training.base_model import BaseModel

    if unknown := sorted(set(names) - config.methods.keys()):
        raise ValueError(f"No method {unknown[0]!r} in the config; it has {', '.join(config.methods)}.")
    manifest = read_manifest(config.manifest)
    base = BaseModel.load(config.base, this_process().device, getattr(torch, config.dtype))
    done = {}
    for name in names or config.methods:
        method = build(name, config.methods[name], base)
        folder = name if references is None else f"{name}-{references}-references"
        done[folder] = generate(
            manifest, method, folder, config.out, config.sampling, config.seeds, references, config.batch
        )
    return done


def generate(
    manifest: Manifest,
    method: Method,
    name: str,
    out: Path | str,
    sampling: Sampling,
    seeds: Sequence[int],
    references: int | None = None,
    batch: int = 4,
) -> Painted:
    """Paint every group with every seed that is not there yet.

    batch: pictures painted at once. Raises ValueError where the folder holds pictures made with other settings.
    """
    from tqdm import tqdm

    process = this_process()
    folder = Path(out) / name
    manifest, exclusions = usable(manifest)
    groups = [limited(group, references) for group in manifest.groups]
    wanted = {
        "method": name,
        "settings": method.settings,
        "base": base_fingerprint(method.base),
        "sampling": dataclasses.asdict(sampling),
        "references": references,
        "groups": {group.id: group_digest(group) for group in groups},
        "seeds": sorted(seeds),
    }
    record = merge(folder, read_record(folder), wanted)
    missing = [(group, todo) for group in groups if (todo := absent(folder / group.id, seeds))]
    process.wait()  # all have seen the same folder before anyone adds to it
    if process.is_main:
        write_record(folder, record)
    count = sum(len(todo) for _, todo in missing)
    mine = process.share(missing)
    with tqdm(total=sum(len(todo) for _, todo in mine), desc=name, disable=not process.is_main) as bar:
        for tasks, todo in jobs(mine, method, batch):
            conditions = [method.prepare(task, folder / task.id) for task in tasks]
            for part in chunks(todo, batch):
                for task, pictures in zip(
                    tasks, method.paint(tasks, conditions, part, sampling), strict=True
                ):
                    for seed, picture in zip(part, pictures, strict=True):
                        save_picture(picture, folder / task.id / f"{seed}.png")
                bar.update(len(tasks) * len(part))
    process.wait()
    return Painted(count, len(groups) * len(set(seeds)) - count, exclusions)


def limited(group: Group, references: int | None) -> Group:
    """The group with its first so many references."""
    if references is not None and references < 1:
        raise ValueError(
            f"references is {references}; wanted 1 or more, or none at all to use every reference."
        )
    return dataclasses.replace(
        group, references=group.references[:references], captions=group.captions[:references]
    )


def absent(folder: Path, seeds: Iterable[int]) -> tuple[int, ...]:
    """Seeds whose picture is not in the folder. A file there is whole: pictures are moved into place when written."""
    return tuple(seed for seed in dict.fromkeys(seeds) if not (folder / f"{seed}.png").is_file())


def jobs(
    missing: Iterable[tuple[Group, tuple[int, ...]]], method: Method, batch: int
) -> Iterator[tuple[list[Task], tuple[int, ...]]]:
    """Groups with the seeds they lack, in batches of what may be painted together."""
    waiting: dict[Hashable, list[Task]] = {}
    for group, todo in missing:
        task = open_task(group)
        key = method.together(task), todo
        waiting.setdefault(key, []).append(task)
        if (len(waiting[key]) + 1) * len(todo) > batch:
            yield waiting.pop(key), todo
    yield from ((tasks, todo) for (_, todo), tasks in waiting.items())


def open_task(group: Group) -> Task:
    """The group's pictures, opened; the target stays closed."""
    return Task(
        group.id, group.prompt, tuple(open_picture(path) for path in group.references), group.captions
    )


def chunks(seeds: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Seeds in runs of at most `size`."""
    for i in range(0, len(seeds), max(1, size)):
        yield seeds[i : i + max(1, size)]


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write it whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        picture.save(partial, format="PNG")


def _check_keys(where: object, data: Any, fields: Mapping[str, dataclasses.Field]) -> None:
    if not isinstance(data, dict):
        raise ValueError(f"{where} is {data!r}; wanted {', '.join(fields)}.")
    if unknown := sorted(data.keys() - fields.keys()):
        raise ValueError(f"{where} has unknown keys: {', '.join(unknown)}. Known are {', '.join(fields)}.")
    required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
    if missing := sorted(required - data.keys()):
        raise ValueError(f"{where} lacks {', '.join(missing)}.")
