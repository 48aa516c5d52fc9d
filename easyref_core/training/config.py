"""A run's settings: YAML and `key=value` overrides -> frozen dataclasses, every mistake named with its remedy."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from .examples import Augmentation
from .stages import STAGES, Stage

OUTPUT_NAME = "easyref.safetensors"  # what a stage leaves in its output folder


@dataclasses.dataclass(frozen=True)
class Data:
    """Where examples come from: JSON rows and their pictures, or the tiny model's procedural pictures."""

    rows: Path | None = None  # the authors' JSON file, see rows.py
    root: Path | None = None  # folder that the file's names are relative to
    skip_rows: int = 0  # how many broken rows a run may leave out
    thorough: bool = False  # decode every picture before the run
    augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)
    procedural: Mapping[str, Any] | None = None  # ProceduralSettings of easyref_core.tiny.examples


@dataclasses.dataclass(frozen=True)
class Samples:
    """Pictures painted during the run, from the first examples of the stream."""

    every: int = 0  # updates; 0: none
    count: int = 4
    steps: int = 30
    guidance: float = 5.0
    negative: str = ""


@dataclasses.dataclass(frozen=True)
class Settings:
    """One stage of one run."""

    stage: Literal["alignment", "single_reference", "multi_reference"]
    base: Path  # diffusers SDXL folder
    mllm: Path  # transformers Qwen2-VL folder
    output: Path
    data: Data
    updates: int  # optimizer updates; the authors count micro-batches
    learning_rate: float
    batch_size: int  # of each process
    accumulation: int = 1  # micro-batches an update
    start: Path | None = None  # checkpoint of an earlier stage; None: the base MLLM and the UNet
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # after the warmup, down to 0 at the end
    warmup: int = 0  # updates
    weight_decay: float = 0.0
    clip: float | None = None  # largest norm of the gradients
    seed: int = 0
    num_tokens: int = 64
    final_layers: int = 1  # layers that see the reference tokens; 2, 3: the paper's insertion layer -2, -3
    lora_rank: int = 128  # of the stages that train a LoRA
    causal: bool = True
    aggregation: Literal["easyref", "average", "concatenation"] = "easyref"
    gradient_checkpointing: bool = False
    workers: int = 0  # processes that make examples
    cache: Path | None = None  # folder that keeps latents and, in stage 1, context states
    save_every: int = 1000  # updates between saved states
    keep: int = 2  # saved states that stay
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    log_every: int = 10
    samples: Samples = dataclasses.field(default_factory=Samples)

    @property
    def what(self) -> Stage:
        """The stage as data."""
        return STAGES[self.stage]

    @property
    def result(self) -> Path:
        """The checkpoint this run leaves."""
        return self.output / OUTPUT_NAME

    def __post_init__(self) -> None:
        positive = ("updates", "batch_size", "accumulation", "num_tokens", "final_layers", "lora_rank")
        least = dict.fromkeys((*positive, "save_every", "keep", "log_every"), 1) | {"warmup": 0, "seed": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}; wanted {low} or more.")
        for name in ("learning_rate", "clip"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} is {value}; wanted a positive number (clip: or null for none).")
        if (self.data.rows is None) == (self.data.procedural is None):
            found = "both" if self.data.rows else "neither"
            raise ValueError(
                f"data holds {found} of rows and procedural; wanted one: set data.rows and data.root."
            )
        if self.data.rows and self.data.root is None:
            raise ValueError(
                "data.rows is set without data.root; set data.root to the folder of the pictures."
            )
        if self.what.starts_from and self.start is None:
            raise ValueError(
                f"Stage {self.stage!r} starts from stage {self.what.starts_from!r}, and start is not set. "
                f"Set start to that stage's {OUTPUT_NAME} (or to the released checkpoint)."
            )

    def require_files(self, made: Sequence[Path] = ()) -> None:
        """Raise FileNotFoundError for the first of the run's inputs that is not there.

        made: files that the stages before will have made.
        """
        inputs = {"base": self.base, "mllm": self.mllm, "start": self.start}
        inputs |= {"data.rows": self.data.rows, "data.root": self.data.root}
        for key, path in inputs.items():
            if path is not None and path not in made and not path.exists():
                raise FileNotFoundError(
                    f"{key} is {path}, which does not exist (seen from {Path.cwd()}). "
                    f"Set it in the YAML, or put {key}=PATH behind the YAML's name on the command line."
                )


def load(file: Path | str, overrides: Sequence[str] = ()) -> list[Settings]:
    """The stages that a YAML asks for, in order.

    A YAML with `stages:`, a list, holds what they share beside it. Each then writes to <output>/<number>_<stage> and
    starts from the one before, unless it says otherwise. overrides: key=value, for every stage, or
    stages.<name>.key=value for one; dots reach into sections.
    """
    shared, parts = read(Path(file))
    pairs = [_override(text) for text in overrides]
    names = [part.get("stage", shared.get("stage")) for part in parts]
    for keys, _ in pairs:
        if keys[0] == "stages" and (len(keys) < 3 or keys[1] not in names):
            raise ValueError(
                f"{'.'.join(keys)} reaches no stage; wanted stages.<{'|'.join(map(str, names))}>.<key>=<value>."
            )
    loaded: list[Settings] = []
    for number, (name, part) in enumerate(zip(names, parts, strict=True), start=1):
        merged = _overridden(merge(shared, part), [(k, v) for k, v in pairs if k[0] != "stages"])
        if len(parts) > 1 and "output" not in part and "output" in merged:
            merged["output"] = str(Path(str(merged["output"])) / f"{number}_{name}")
        if loaded:
            merged = {"start": str(loaded[-1].result)} | merged
        merged = _overridden(merged, [(k[2:], v) for k, v in pairs if k[:2] == ["stages", name]])
        try:
            loaded.append(build(Settings, merged))
        except ValueError as error:
            raise ValueError(f"{file}{f', stage {name!r}' if len(parts) > 1 else ''}: {error}") from error
    return loaded


def read(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a YAML's stages share, and what each has of its own; without `stages:` it is one, and all is shared."""
    import yaml

    if not file.is_file():
        raise FileNotFoundError(f"The configuration {file} does not exist (seen from {Path.cwd()}).")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {_kind(content)}; wanted keys and values.")
    parts = content.pop("stages", [{}])
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"{file}: stages is {parts!r}; wanted a list of sections, each with its stage.")
    return content, parts


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `under`, section by section."""
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def build(kind: type, content: Mapping[str, Any], where: str = "") -> Any:
    """The dataclass `kind` of a section; raises ValueError for a key it does not have, lacks, or of a wrong type."""
    hints, fields = typing.get_type_hints(kind), {field.name: field for field in dataclasses.fields(kind)}
    for key in content:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {where}{near[0]}?" if near else f"there are {', '.join(fields)}."
            raise ValueError(f"{where}{key} is no setting; {hint}")
    absent = (dataclasses.MISSING, dataclasses.MISSING)
    for name, field in fields.items():
        if name not in content and (field.default, field.default_factory) == absent:
            raise ValueError(f"{where}{name} is not set. Set it in the YAML, or as {where}{name}=VALUE.")
    return kind(**{key: _value(hints[key], value, where + key) for key, value in content.items()})


def _value(wanted: Any, value: Any, name: str) -> Any:
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (types.UnionType, typing.Union):  # X | None
        return None if value is None else _value(inner[0], value, name)
    if dataclasses.is_dataclass(wanted) and isinstance(value, Mapping):
        return build(wanted, value, f"{name}.")
    if origin is Literal:
        if value in inner:
            return value
        raise ValueError(f"{name} is {value!r}; wanted one of {', '.join(map(str, inner))}.")
    if wanted is float and isinstance(value, str):  # YAML reads 1e-4 as text, 1.0e-4 as a number
        try:
            return float(value)
        except ValueError:
            pass
    kinds = {int: int, float: int | float, str: str, bool: bool, Path: str}.get(wanted, Mapping)
    if isinstance(value, kinds) and (wanted is bool or not isinstance(value, bool)):
        return Path(value).expanduser() if wanted is Path else float(value) if wanted is float else value
    raise ValueError(f"{name} is {value!r}, {_kind(value)}; wanted {NAMES.get(wanted, 'a section of keys')}.")


NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", Path: "a path"}


def _kind(value: Any) -> str:
    names = {dict: "a section", list: "a list", type(None): "nothing", **NAMES}
    return names.get(type(value), type(value).__name__)


def _override(text: str) -> tuple[list[str], Any]:
    import yaml

    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ValueError(f"{text!r} is no override; wanted key=value, for example learning_rate=1e-4.")
    return key.split("."), yaml.safe_load(value)


def _overridden(content: Mapping[str, Any], pairs: Sequence[tuple[list[str], Any]]) -> dict[str, Any]:
    for keys, value in pairs:
        for key in reversed(keys):
            value = {key: value}
        content = merge(content, value)
    return dict(content)
