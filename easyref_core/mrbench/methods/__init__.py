"""Methods of the benchmark, each a way to condition the same base model; a config entry names its kind."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .easyref import EasyRefMethod
from .ip_adapter import IPAdapter
from .lora import LoRAMethod
from .method import Method, Sampling, Task
from .plain import Plain

if TYPE_CHECKING:
    from easyref_core.training.base_model import BaseModel

KINDS: dict[str, type[Method]] = {
    "plain": Plain,
    "easyref": EasyRefMethod,
    "ip_adapter": IPAdapter,
    "lora": LoRAMethod,
}

__all__ = ["KINDS", "Method", "Sampling", "Task", "build", "check"]


def check(name: str, entry: Mapping[str, Any]) -> None:
    """Raise ValueError for a config entry that no method can be built from; opens no file."""
    if not isinstance(entry, Mapping) or entry.get("kind") not in KINDS:
        found = entry.get("kind") if isinstance(entry, Mapping) else entry
        raise ValueError(f"Method {name}: kind is {found!r}; wanted one of {', '.join(KINDS)}.")
    known = dict(inspect.signature(KINDS[entry["kind"]]).parameters)
    known.pop("base")
    if unknown := sorted(entry.keys() - known.keys() - {"kind"}):
        wanted = ", ".join(known) or "no settings"
        raise ValueError(f"Method {name}: unknown {', '.join(unknown)}. {entry['kind']} knows {wanted}.")
    required = {key for key, value in known.items() if value.default is inspect.Parameter.empty}
    if missing := sorted(required - entry.keys()):
        raise ValueError(f"Method {name}: {', '.join(missing)} missing from its entry.")


def build(name: str, entry: Mapping[str, Any], base: BaseModel) -> Method:
    """The method of a config entry, {"kind": ..., settings of that kind}."""
    check(name, entry)
    settings = {key: value for key, value in entry.items() if key != "kind"}
    return KINDS[entry["kind"]](base, **settings)
