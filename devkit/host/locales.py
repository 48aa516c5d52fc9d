"""The texts of the nodes in the frontend's form: from the nodes themselves, and from the pack's locales folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from devkit.hosts import ROOT

LOCALES = ROOT / "locales"
PACK = "custom_nodes.ComfyUI-EasyRef"


def english(object_info: Mapping[str, Any]) -> dict[str, Any]:
    """What locales/en/nodeDefs.json has to hold: every text that the nodes show."""
    return {name: _node(info) for name, info in sorted(object_info.items()) if info["python_module"] == PACK}


def read(language: str) -> dict[str, Any]:
    """nodeDefs.json of a language."""
    return json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))


def texts(definitions: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """{"EasyRefApply.inputs.weight.tooltip": text}, of all texts."""
    found: dict[str, str] = {}
    for key, value in definitions.items():
        place = f"{before}{key}"
        found |= texts(value, f"{place}.") if isinstance(value, Mapping) else {place: value}
    return found


def _node(info: Mapping[str, Any]) -> dict[str, Any]:
    sections = [info["input"].get(section, {}) for section in ("required", "optional")]
    inputs = {
        name: {"name": name} | _tooltip(options[1] if len(options) > 1 else {})
        for section in sections
        for name, options in section.items()
    }
    tips = info.get("output_tooltips") or []
    outputs = {
        str(i): {"name": name} | ({"tooltip": tips[i]} if i < len(tips) and tips[i] else {})
        for i, name in enumerate(info["output_name"])
    }
    texts = {"display_name": info["display_name"], "description": info["description"]}
    return texts | ({"inputs": inputs} if inputs else {}) | ({"outputs": outputs} if outputs else {})


def _tooltip(options: Mapping[str, Any]) -> dict[str, str]:
    return {"tooltip": options["tooltip"]} if options.get("tooltip") else {}
