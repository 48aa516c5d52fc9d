"""Settings of a run: parses YAML and `key=value` overrides into frozen dataclasses and validates them."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from .examples import Augmentation
from .stages import STAGES, Stage

MAX_SEED = 2**63 - 1
MAX_TIMESTEP = 999  # of SDXL's noise schedule
OUTPUT_NAME = "easyref.safetensors"  # checkpoint in the output folder of a stage


@dataclasses.dataclass(frozen=True)
class Stream:
    """Parquet shards that are read while training, see stream.py."""

    sources: tuple[str, ...]  # folders or URLs that the command shards wrote
    weights: tuple[float, ...] | None = None  # of the sources; None: their numbers of rows
    partitions: int = 1  # a multiple of all processes' workers, so that none reads the row groups of another
    buffer: int = 512  # rows of a partition that are shuffled and put into buckets together

    def __post_init__(self) -> None:
        require_at_least(self, {"partitions": 1, "buffer": 1}, "data.stream.")
        weights = self.weights or (1.0,) * len(self.sources)
        if not self.sources or len(weights) != len(self.sources):
            raise ValueError(
                f"data.stream has {len(self.sources)} sources and {len(weights)} weights, expected at least "
                "one source and a weight for each."
            )
        if not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"data.stream.weights is {list(weights)}, expected positive numbers.")


@dataclasses.dataclass(frozen=True)
class Data:
    """Source of the examples: JSON rows and image files, shards, or procedural images of the tiny model."""

    rows: Path | None = None  # JSON file in the authors' format, see rows.py
    root: Path | None = None  # folder that the file's names are relative to
    skip_rows: int = 0  # maximum number of broken rows to skip
    max_broken: int = 100  # maximum number of rows that training skips because it cannot use them
    thorough: bool = False  # load every image before the run, and refuse those that training cannot use
    apply_exif: bool = True  # turn images upright, as the nodes do; false: the authors' code
    augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)
    stream: Stream | None = None
    procedural: Mapping[str, Any] | None = None  # see ProceduralSettings of easyref_core.tiny.examples

    def __post_init__(self) -> None:
        require_at_least(self, {"skip_rows": 0, "max_broken": 0}, "data.")
        if self.stream and self.thorough:
            raise ValueError(
                "data.thorough is true beside data.stream, which is not read before a run. Set it to false; "
                "the command shards with data.thorough=true checks the images that it stores."
            )


@dataclasses.dataclass(frozen=True)
class Samples:
    """Sample images generated during the run from the first examples of the stream."""

    every: int = 0  # updates; 0: none
    count: int = 4
    steps: int = 30
    guidance: float = 5.0
    negative: str = ""

    def __post_init__(self) -> None:
        require_at_least(self, {"every": 0, "count": 1, "steps": 1, "guidance": 0}, "samples.")


@dataclasses.dataclass(frozen=True)
class Validation:
    """Loss at fixed timesteps on rows that are not trained on; see validation.py."""

    every: int = 0  # updates; 0: none
    rows: Path | None = None  # JSON file in the format of data.rows; procedural data need none
    count: int = 64  # rows of the file, from a fixed shuffle
    timesteps: tuple[int, ...] = (100, 300, 500, 700, 900)

    def __post_init__(self) -> None:
        require_at_least(self, {"every": 0, "count": 1}, "validation.")
        steps = self.timesteps
        valid = all(type(step) is int and 0 <= step <= MAX_TIMESTEP for step in steps)
        if not steps or not valid or len(set(steps)) < len(steps):
            raise ValueError(
                f"validation.timesteps is {list(steps)}, expected different whole numbers from 0 to "
                f"{MAX_TIMESTEP}, such as [100, 500, 900]."
            )


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """MRBench on the weights in training; see easyref_core.mrbench.live."""

    every: int = 0  # updates; 0: none
    manifest: Path | None = None
    groups: int | None = 8  # of each split; null: all
    seeds: tuple[int, ...] = (0,)
    size: int = 1024  # pixels of a side
    steps: int = 30
    guidance: float = 5.0
    negative: str = "monochrome, lowres, bad anatomy, worst quality, low quality"
    clip: str = "openai/clip-vit-large-patch14"  # name, name@revision, folder, or none
    dino: str = "facebook/dino-vits16"
    offline: bool = False  # download neither

    def __post_init__(self) -> None:
        require_at_least(self, {"every": 0, "size": 8, "steps": 1, "guidance": 0}, "benchmark.")
        if self.every and self.manifest is None:
            raise ValueError(
                "benchmark.every is set without benchmark.manifest. Set it to a manifest of MRBench, or set "
                "benchmark.every to 0."
            )


@dataclasses.dataclass(frozen=True)
class Settings:
    """One stage of one run."""

    stage: Literal["alignment", "single_reference", "multi_reference"]
    base: Path  # diffusers SDXL folder, or a single-file checkpoint
    mllm: Path  # transformers Qwen2-VL folder
    output: Path
    data: Data
    updates: int  # optimizer updates; the authors count micro-batches
    learning_rate: float
    batch_size: int  # per process
    base_config: Path | None = None  # diffusers folder with the configurations of a single-file base
    accumulation: int = 1  # micro-batches per update
    start: Path | None = None  # checkpoint of an earlier stage; None: base MLLM and UNet
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # after the warmup, down to 0 at the end
    warmup: int = 0  # updates
    optimizer: Literal["adamw", "adamw_8bit", "adafactor"] = "adamw"
    weight_decay: float = 0.0
    clip: float | None = None  # maximum norm of the gradients
    ema: float | None = None  # decay of a moving average of the trained weights, which is what is exported
    seed: int = 0
    num_tokens: int = 64
    final_layers: int = 1  # layers with reference tokens; 2, 3: the paper's insertion layer -2, -3
    lora_rank: int = 128  # of the stages that train a LoRA
    mllm_lora_rank: int = 0  # train a LoRA of the MLLM's body in place of its weights, merged on save
    weight_dtype: Literal["float32", "bfloat16"] = "float32"  # of the trained weights
    causal: bool = True
    aggregation: Literal["easyref", "average", "concatenation"] = "easyref"
    gradient_checkpointing: bool = False
    memory_check: bool = True  # refuse a run whose counted memory exceeds the device's; false: only warn
    workers: int = 0  # data loading processes
    cache: Path | None = None  # folder of cached latents and, in stage 1, context states
    precomputed: Path | None = None  # folder of the command precompute, used in place of the frozen models
    save_every: int = 1000  # updates between saved states
    keep: int = 2  # newest saved states that are retained
    keep_every: int = 0  # states of updates that it divides are retained for ever; 0: none
    export_every: int = 0  # updates between checkpoints easyref-<update>.safetensors; 0: only the last
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    log_every: int = 10
    profile_updates: int = 0  # updates that torch.profiler traces, after the first two; 0: none
    trackers: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"tensorboard": {}})
    samples: Samples = dataclasses.field(default_factory=Samples)
    validation: Validation = dataclasses.field(default_factory=Validation)
    benchmark: Benchmark = dataclasses.field(default_factory=Benchmark)

    @property
    def stage_spec(self) -> Stage:
        """The stage as data."""
        return STAGES[self.stage]

    @property
    def result(self) -> Path:
        """Path of the checkpoint that the run writes."""
        return self.output / OUTPUT_NAME

    def checkpoint_of(self, update: int) -> Path:
        """Path of the checkpoint that is exported after an update."""
        return self.output / f"easyref-{update}.safetensors"

    def __post_init__(self) -> None:
        positive = ("updates", "batch_size", "accumulation", "num_tokens", "final_layers", "lora_rank")
        require_at_least(self, dict.fromkeys((*positive, "save_every", "keep", "log_every"), 1))
        numbers = (
            "warmup",
            "seed",
            "workers",
            "weight_decay",
            "mllm_lora_rank",
            "keep_every",
            "export_every",
            "profile_updates",
        )
        require_at_least(self, dict.fromkeys(numbers, 0))
        if self.seed > MAX_SEED:
            raise ValueError(f"seed is {self.seed}, expected at most {MAX_SEED}.")
        for name in ("learning_rate", "clip"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}, expected a positive number (clip: or null for none).")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema is {self.ema}, expected a decay between 0 and 1, such as 0.999, or null.")
        self._require_consistent_data()
        if self.mllm_lora_rank and self.stage_spec.body_frozen:
            raise ValueError(
                f"mllm_lora_rank is {self.mllm_lora_rank}, but stage {self.stage!r} freezes the MLLM's body. "
                "Set it to 0, or train stage 'multi_reference'."
            )
        if self.stage_spec.starts_from and self.start is None:
            raise ValueError(
                f"Stage {self.stage!r} starts from stage {self.stage_spec.starts_from!r}, but start is not "
                f"set. Set start to that stage's {OUTPUT_NAME} (or to the released checkpoint)."
            )

    def _require_consistent_data(self) -> None:
        kinds = [kind for kind in ("rows", "stream", "procedural") if getattr(self.data, kind) is not None]
        if len(kinds) != 1:
            raise ValueError(
                f"data has {' and '.join(kinds) or 'no source'}, expected one of rows, stream and "
                "procedural. Set data.rows and data.root, and the others to null."
            )
        if self.precomputed and (self.data.rows is None or self.cache):
            other = "cache" if self.cache else f"data.{kinds[0]}"
            raise ValueError(f"precomputed is set beside {other}, expected one of them. Set one to null.")
        if self.data.rows and self.data.root is None:
            raise ValueError("data.rows is set without data.root. Set data.root to the folder of the images.")
        if self.validation.every and self.data.rows and self.validation.rows in (None, self.data.rows):
            raise ValueError(
                f"validation.rows is {self.validation.rows}, expected a file of rows that are not trained "
                "on. Set it, or set validation.every to 0."
            )

    def require_files(self, outputs: Sequence[Path] = ()) -> None:
        """Raise FileNotFoundError for the first missing input; `outputs` of earlier stages may be missing."""
        inputs = {"base": self.base, "mllm": self.mllm, "start": self.start}
        inputs |= {"data.rows": self.data.rows, "data.root": self.data.root}
        inputs |= {"validation.rows": self.validation.rows, "base_config": self.base_config}
        inputs |= {"benchmark.manifest": self.benchmark.manifest}
        for key, path in inputs.items():
            if path is not None and path not in outputs and not path.exists():
                raise FileNotFoundError(
                    f"{key} is {path}, which does not exist (relative to {Path.cwd()}). "
                    f"Set it in the YAML, or put {key}=PATH after the YAML's name on the command line."
                )


def require_at_least(owner: Any, minimum: Mapping[str, int], where: str = "") -> None:
    """Raise ValueError for a setting of `owner` that is below its minimum, infinite or NaN."""
    for name, low in minimum.items():
        if not low <= (value := getattr(owner, name)) < math.inf:
            raise ValueError(f"{where}{name} is {value}, expected {low} or more.")


def load(file: Path | str, overrides: Sequence[str] = ()) -> list[Settings]:
    """Load the settings of a YAML's stages, in order.

    In a YAML with a list `stages:`, the other keys apply to every stage. Each stage then writes to
    <output>/<number>_<stage> and starts from the previous one, unless it sets output or start itself.
    overrides: key=value for every stage, or stages.<name>.key=value for one; dots address sections.
    Raises FileNotFoundError or ValueError, naming the file, the key and the remedy.
    """
    shared, sections = parse_yaml(Path(file))
    pairs = [_parse_override(text) for text in overrides]
    names = [section.get("stage", shared.get("stage")) for section in sections]
    for keys, _ in pairs:
        if keys[0] == "stages" and (len(keys) < 3 or keys[1] not in names):
            known = "|".join(map(str, names))
            raise ValueError(f"{'.'.join(keys)} matches no stage, expected stages.<{known}>.<key>=<value>.")
    loaded: list[Settings] = []
    for number, (name, section) in enumerate(zip(names, sections, strict=True), start=1):
        merged = _override(merge(shared, section), [(k, v) for k, v in pairs if k[0] != "stages"])
        if len(sections) > 1 and "output" not in section and "output" in merged:
            merged["output"] = str(Path(str(merged["output"])) / f"{number}_{name}")
        if loaded:
            merged = {"start": str(loaded[-1].result)} | merged
        merged = _override(merged, [(k[2:], v) for k, v in pairs if k[:2] == ["stages", name]])
        try:
            loaded.append(build(Settings, merged))
        except ValueError as error:
            raise ValueError(f"{file}{f', stage {name!r}' if len(sections) > 1 else ''}: {error}") from error
    return loaded


def parse_yaml(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Parse a YAML into the shared keys and one section per stage; without `stages:`, one empty section."""
    import yaml

    if not file.is_file():
        raise FileNotFoundError(f"The configuration {file} does not exist (relative to {Path.cwd()}).")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid YAML in UTF-8: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} contains {_kind(content)}, expected keys and values.")
    sections = content.pop("stages", [{}])
    if not isinstance(sections, list) or not sections or not all(isinstance(s, dict) for s in sections):
        raise ValueError(f"{file}: stages is {sections!r}, expected a list of sections, each with its stage.")
    return content, sections


def merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `override` into a copy of `base`, section by section."""
    merged = dict(base)
    for key, value in override.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def build(kind: type, content: Mapping[str, Any], where: str = "") -> Any:
    """Build the dataclass `kind` from a section. Raises ValueError for unknown, missing and mistyped keys."""
    hints, fields = typing.get_type_hints(kind), {field.name: field for field in dataclasses.fields(kind)}
    for key in content:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {where}{near[0]}?" if near else f"the settings are {', '.join(fields)}."
            raise ValueError(f"{where}{key} is not a setting; {hint}")
    absent = (dataclasses.MISSING, dataclasses.MISSING)
    for name, field in fields.items():
        if name not in content and (field.default, field.default_factory) == absent:
            raise ValueError(f"{where}{name} is not set. Set it in the YAML, or as {where}{name}=VALUE.")
    return kind(**{key: _value(hints[key], value, where + key) for key, value in content.items()})


def _value(annotation: Any, value: Any, name: str) -> Any:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):  # X | None
        return None if value is None else _value(inner[0], value, name)
    if dataclasses.is_dataclass(annotation) and isinstance(value, Mapping):
        return build(annotation, value, f"{name}.")
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_value(inner[0], item, f"{name}[{number}]") for number, item in enumerate(items))
    if origin is Literal:
        if value in inner:
            return value
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(str, inner))}.")
    if annotation is float and isinstance(value, str):  # YAML parses 1e-4 as text, 1.0e-4 as a number
        try:
            return float(value)
        except ValueError:
            pass
    kinds = {int: int, float: int | float, str: str, bool: bool, Path: str}.get(annotation, Mapping)
    if isinstance(value, kinds) and (annotation is bool or not isinstance(value, bool)):
        if annotation is Path:
            return Path(value).expanduser()
        return float(value) if annotation is float else value
    expected = NAMES.get(origin or annotation, "a section of keys")
    raise ValueError(f"{name} is {value!r} ({_kind(value)}), expected {expected}.")


NAMES = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    Path: "a path",
    Sequence: "a list",
}


def _kind(value: Any) -> str:
    names = {dict: "a section", list: "a list", type(None): "nothing", **NAMES}
    return names.get(type(value), type(value).__name__)


def _parse_override(text: str) -> tuple[list[str], Any]:
    import yaml

    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ValueError(f"{text!r} is not an override, expected key=value, for example learning_rate=1e-4.")
    try:
        return key.split("."), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"{key} is {value!r}, expected a value in YAML: {error}") from error


def _override(content: Mapping[str, Any], pairs: Sequence[tuple[list[str], Any]]) -> dict[str, Any]:
    for keys, value in pairs:
        for key in reversed(keys):
            value = {key: value}
        content = merge(content, value)
    return dict(content)
