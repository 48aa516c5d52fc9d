"""Generates the benchmark's images: <out>/<method>/<group>/<seed>.png, and method.json with their provenance.

Images that exist already are skipped. An interrupted run therefore continues, and groups or seeds can be
added later. Under `accelerate launch` every process generates a share of the groups.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .checks import check_dataclass
from .images import Exclusion, load_image, save_image
from .latency import Timing, append_timings, clock, device_name
from .manifest import SPLITS, Group, Manifest, read_manifest, usable
from .methods import Method, NotFiniteError, Sampling, Task, build, check
from .processes import this_process
from .record import base_fingerprint, group_digest, merge, read_record, write_record
from .training_seeds import expand, select

PATHS = ("checkpoint", "mllm", "weights", "image_encoder")  # settings of a method that are files or folders
DTYPES = ("float32", "float16", "bfloat16")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # a method's name is a folder name

TaskSeeds = tuple[Task, tuple[int, ...]]  # a task and its seeds without an image


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Settings that are the same for every method of a run."""

    out: Path
    sampling: Sampling
    seeds: Sequence[int]
    batch: int = 4  # images generated together
    # Painted for every group instead of its own, with which CLIP-T is scored all the same.
    prompt: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunSettings):
    """A run as described by a YAML file. Paths in the file are relative to the file."""

    base: Path
    manifest: Path
    methods: Mapping[str, Mapping[str, Any]]
    base_config: Path | None = None  # of a single-file base, see training/base_files.py
    dtype: str = DTYPES[0]  # of the base model


@dataclasses.dataclass(frozen=True)
class Generated:
    """Counts and exclusions of a run."""

    new: int  # images
    existing: int  # images
    exclusions: tuple[Exclusion, ...]


def read_config(path: Path | str) -> Config:
    """Load a run from a YAML file. Raises ValueError for anything that is not as documented."""
    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no config at {path}.")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    check_dataclass(str(path), data, Config)
    check_dataclass(f"{path}: sampling", data["sampling"], Sampling)
    if not isinstance(data["methods"], dict):
        raise ValueError(
            f"{path}: methods is {data['methods']!r}; wanted method names with their settings below them."
        )
    if not (isinstance(data["seeds"], list) and all(type(seed) is int for seed in data["seeds"])):
        raise ValueError(
            f"{path}: seeds is {data['seeds']!r}; wanted a list of whole numbers, such as [0, 1]."
        )
    if not isinstance(data.get("prompt", ""), str):
        raise ValueError(f"{path}: prompt is {data['prompt']!r}; wanted a string, such as an empty one.")
    if data.get("dtype", DTYPES[0]) not in DTYPES:
        raise ValueError(f"{path}: dtype is {data['dtype']!r}; wanted one of {', '.join(DTYPES)}.")
    size = data["sampling"]["size"]
    size = tuple(size) if isinstance(size, list) else size
    data |= {name: path.parent / data[name] for name in ("base", "manifest", "out")}
    if data.get("base_config"):
        data["base_config"] = path.parent / data["base_config"]
    data |= {"sampling": Sampling(**{**data["sampling"], "size": size}), "seeds": tuple(data["seeds"])}
    methods = {}
    for name, entry in data["methods"].items():
        methods |= _read_method(path, name, entry)
    return Config(**{**data, "methods": methods})


def run(
    config: Config,
    names: Sequence[str] = (),
    references: int | None = None,
    groups: int | None = None,
    split: str | None = None,
) -> dict[str, Generated]:
    """Generate the images of the methods in `names`, or of all methods of the config.

    A name selects the entries of all its training seeds, <name>@<seed> a single one.

    references: number of each group's references to use, from the first; those images are written to
    <method>-<n>-references.
    groups: number of groups of each split to use, from the first; None uses all. More can be added later.
    split: the split of the groups; None uses both.
    """
    import torch

    from ..training.base_model import BaseModel

    names = select(names, config.methods)
    manifest = limit_groups(read_manifest(config.manifest), groups, split)
    options = {"device": this_process().device, "dtype": getattr(torch, config.dtype)}
    base = BaseModel.load(config.base, **options, config=config.base_config)
    results = {}
    for name in names:
        method = build(name, config.methods[name], base)
        folder = name if references is None else f"{name}-{references}-references"
        results[folder] = generate(manifest, method, folder, config, references)
    return results


def generate(
    manifest: Manifest, method: Method, name: str, settings: RunSettings, references: int | None = None
) -> Generated:
    """Generate the image of every group and seed that does not exist yet under <out>/<name>.

    references: number of each group's references to use, from the first; None uses all. Raises ValueError if
    the folder holds images made with other settings.
    """
    from tqdm import tqdm

    process = this_process()
    folder = Path(settings.out) / name
    manifest, exclusions = usable(manifest)
    groups = [limit_references(group, references) for group in manifest.groups]
    record = {
        "method": name,
        "settings": method.settings,
        "base": base_fingerprint(method.base),
        "sampling": dataclasses.asdict(settings.sampling),
        "references": references,
        "prompt": settings.prompt,
        "groups": {group.id: group_digest(group) for group in groups},
        "seeds": sorted(settings.seeds),
    }
    record = merge(folder, read_record(folder), record)
    missing = [(group, seeds) for group in groups if (seeds := absent(folder / group.id, settings.seeds))]
    process.wait()  # every process lists the folder before any of them writes to it
    if process.is_main:
        write_record(folder, record)
    new = sum(len(seeds) for _, seeds in missing)
    share = process.share(missing)
    total = sum(len(seeds) for _, seeds in share)
    with tqdm(total=total, desc=name, disable=not process.is_main) as bar:
        loaded = ((load_task(group, settings.prompt), seeds) for group, seeds in share)
        for number, (tasks, todo) in enumerate(batches(loaded, method, settings.batch)):
            try:
                timings = list(_generate_batch(method, tasks, todo, folder, settings))
            except NotFiniteError as error:
                raise NotFiniteError(f"Method {name} stops. {error}") from error
            append_timings(folder, process.rank, (replace(one, is_first=number == 0) for one in timings))
            bar.update(len(tasks) * len(todo))
    process.wait()
    return Generated(new, len(groups) * len(set(settings.seeds)) - new, exclusions)


def _generate_batch(
    method: Method, tasks: Sequence[Task], todo: Sequence[int], folder: Path, settings: RunSettings
) -> Iterator[Timing]:
    """Generate and save the images of some tasks and seeds; yields the seconds of each task."""
    device = method.base.device
    conditions, prepared = [], []
    for task in tasks:
        start = clock(device)
        conditions.append(method.prepare(task, folder / task.id))
        prepared.append(clock(device) - start)
    painted = 0.0
    for first in range(0, len(todo), settings.batch):
        seeds = todo[first : first + settings.batch]
        start = clock(device)
        images = method.generate(tasks, conditions, seeds, settings.sampling)
        painted += clock(device) - start
        for task, row in zip(tasks, images, strict=True):
            for seed, image in zip(seeds, row, strict=True):
                save_image(image, folder / task.id / f"{seed}.png")
    each, name = painted / (len(tasks) * len(todo)), device_name(device)
    for task, seconds in zip(tasks, prepared, strict=True):
        yield Timing(len(task.references), seconds, each, name, is_first=False)


def limit_groups(manifest: Manifest, count: int | None, split: str | None = None) -> Manifest:
    """Return the manifest with the first `count` groups (None: all) of one split (None: of each)."""
    if split not in (None, *SPLITS):
        raise ValueError(f"split is {split!r}; wanted {' or '.join(map(repr, SPLITS))}.")
    if count is not None and count < 1:
        raise ValueError(f"groups is {count}; wanted 1 or more, or none at all to use every group.")
    seen: Counter[str] = Counter()
    kept = []
    for group in manifest.groups:
        seen[group.split] += 1
        if split in (None, group.split) and (count is None or seen[group.split] <= count):
            kept.append(group)
    return replace(manifest, groups=tuple(kept))


def limit_references(group: Group, count: int | None) -> Group:
    """Return the group with its first `count` references."""
    if count is not None and count < 1:
        raise ValueError(f"references is {count}; wanted 1 or more, or none at all to use every reference.")
    return replace(group, references=group.references[:count], captions=group.captions[:count])


def absent(folder: Path, seeds: Iterable[int]) -> tuple[int, ...]:
    """Seeds without an image in the folder; files are complete because they are written atomically."""
    return tuple(seed for seed in dict.fromkeys(seeds) if not (folder / f"{seed}.png").is_file())


def load_task(group: Group, prompt: str | None = None) -> Task:
    """Load the group's references; a task has no target. prompt: instead of the group's."""
    references = tuple(load_image(path) for path in group.references)
    return Task(group.id, group.prompt if prompt is None else prompt, references, group.captions)


def batches(
    tasks: Iterable[TaskSeeds], method: Method, batch: int
) -> Iterator[tuple[list[Task], tuple[int, ...]]]:
    """Collect tasks with the same seeds into batches that the method can generate together."""
    waiting: dict[Hashable, list[Task]] = {}
    for task, seeds in tasks:
        key = method.batch_key(task), seeds
        waiting.setdefault(key, []).append(task)
        if (len(waiting[key]) + 1) * len(seeds) > batch:
            yield waiting.pop(key), seeds
    yield from ((tasks, seeds) for (_, seeds), tasks in waiting.items())


def _read_method(path: Path, name: str, entry: Any) -> dict[str, dict[str, Any]]:
    """The method's entries, one for each training seed, with paths relative to the working folder."""
    if not NAME.fullmatch(name):
        raise ValueError(f"{path}: a method is called {name!r}; wanted letters, digits, '.', '_' and '-'.")
    entries = expand(name, entry) if isinstance(entry, Mapping) else {name: entry}
    for expanded, settings in entries.items():
        check(expanded, settings)
    return {
        expanded: {
            key: str(path.parent / value) if key in PATHS and value else value
            for key, value in settings.items()
        }
        for expanded, settings in entries.items()
    }
