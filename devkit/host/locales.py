"""The nodes' texts in the frontend's nodeDefs.json format: from the nodes, and from the locales folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from devkit.hosts import ROOT

LOCALES = ROOT / "locales"
PACK = "custom_nodes.ComfyUI-EasyRef"


def english(object_info: Mapping[str, Any]) -> dict[str, Any]:
    """Content of locales/en/nodeDefs.json: every text that the nodes show."""
    return {name: _node(info) for name, info in sorted(object_info.items()) if info["python_module"] == PACK}


def load(language: str) -> dict[str, Any]:
    """nodeDefs.json of a language."""
    return json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))


def texts(definitions: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """All texts by their dotted key, such as {"EasyRefApply.inputs.weight.tooltip": text}."""
    flat: dict[str, str] = {}
    for name, value in definitions.items():
        key = f"{prefix}{name}"
        flat |= texts(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return flat


def _node(info: Mapping[str, Any]) -> dict[str, Any]:
    inputs = {
        name: {"name": name} | _tooltip((options or [{}])[0].get("tooltip"))
        for section in ("required", "optional")
        for name, (_, *options) in info["input"].get(section, {}).items()
    }
    tooltips = info.get("output_tooltips") or [None] * len(info["output_name"])
    outputs = {
        str(i): {"name": name} | _tooltip(tooltip)
        for i, (name, tooltip) in enumerate(zip(info["output_name"], tooltips, strict=True))
    }
    node = {"display_name": info["display_name"], "description": info["description"]}
    return node | ({"inputs": inputs} if inputs else {}) | ({"outputs": outputs} if outputs else {})


def _tooltip(text: str | None) -> dict[str, str]:
    return {"tooltip": text} if text else {}
