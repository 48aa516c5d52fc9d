"""Methods of the benchmark, by kind; each conditions the same base model in its own way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...training.base_model import BaseModel
from ..checks import check_dataclass
from .easyref import EasyRefMethod
from .finite import NotFiniteError
from .ip_adapter import IPAdapter
from .lora import LoRAMethod
from .method import Method, Plain, Sampling, Task

KINDS: dict[str, type[Method]] = {cls.kind: cls for cls in (Plain, EasyRefMethod, IPAdapter, LoRAMethod)}

__all__ = ["KINDS", "Method", "NotFiniteError", "Sampling", "Task", "build", "check"]


def check(name: str, entry: Mapping[str, Any]) -> None:
    """Raise ValueError for a config entry that no method can be built from; no file is opened."""
    kind = entry.get("kind") if isinstance(entry, Mapping) else entry
    if not isinstance(entry, Mapping) or kind not in KINDS:
        raise ValueError(f"Method {name}: kind is {kind!r}; wanted one of {', '.join(KINDS)}.")
    settings = {key: value for key, value in entry.items() if key != "kind"}
    check_dataclass(f"Method {name} of kind {kind}", settings, KINDS[kind], omit=["base"])


def build(name: str, entry: Mapping[str, Any], base: BaseModel) -> Method:
    """Build the method of a config entry, {"kind": ..., settings of that kind}."""
    check(name, entry)
    return KINDS[entry["kind"]](base, **{key: value for key, value in entry.items() if key != "kind"})
