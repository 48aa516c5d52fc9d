"""A shipped workflow with tiny models in the place of the large ones: nothing else in it is changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from devkit.host import golden
from devkit.host.graphs import Graph, node

if TYPE_CHECKING:
    from devkit.host.server import ComfyServer

SMALL = 128  # pixels, side of an image
TEXT = "CLIPTextEncode"
OUTPUTS = {"CheckpointLoaderSimple": {0: 0, 2: 3}}  # output of TinySDXL for each of the loader's
SIZED = ("EmptyLatentImage", "SolidMask")
CHANGES = {
    "EasyRefLoader": {"mllm": "easyref/golden-qwen2-vl"},
    "EasyRefEncodeGroup": {"size": golden.SIZE},
    "KSampler": {"steps": 2},
}


def install(server: ComfyServer) -> None:
    """The host's example image, and a LoRA for one matrix of the tiny UNet."""
    (server.base / "input" / "example.png").write_bytes((server.host / "input" / "example.png").read_bytes())
    name = "diffusion_model.middle_block.1.proj_in"
    lora = {f"{name}.lora_up.weight": torch.ones(32, 1), f"{name}.lora_down.weight": torch.ones(1, 32)}
    (server.base / "models" / "loras").mkdir(exist_ok=True)
    save_file(lora, server.base / "models" / "loras" / "lora.safetensors")


def is_tiny(graph: Graph) -> bool:
    """True if a workflow is on the tiny demo model already."""
    return any(entry["class_type"] == "EasyRefDemo" for entry in graph.values())


def tiny(graph: Graph) -> Graph:
    """A workflow as it is queued, with TinySDXL for the checkpoint and its texts, and small images."""
    kept = {name: entry for name, entry in graph.items() if entry["class_type"] not in (*OUTPUTS, TEXT)}
    made = {name: _small(entry) for name, entry in kept.items()}
    for entry in made.values():
        entry["inputs"] = {name: _link(value, graph) for name, value in entry["inputs"].items()}
    return {"tiny": node("TinySDXL", seed=0, prompt_tokens=77), **made}


def _small(entry: dict[str, Any]) -> dict[str, Any]:
    """A node of the workflow, with a tiny model for a large one."""
    kind, inputs = entry["class_type"], dict(entry["inputs"])
    if kind == "LoraLoader":
        return node("LoraLoaderModelOnly", **{k: v for k, v in inputs.items() if "clip" not in k})
    if kind == "ControlNetLoader":
        return node("TinyControlNet")
    changes = CHANGES.get(kind, {})
    if kind in SIZED:
        changes = {side: inputs[side] * SMALL // 1024 for side in ("width", "height")}
    return node(kind, **inputs | {k: v for k, v in changes.items() if not isinstance(inputs[k], list)})


def _link(value: Any, graph: Graph) -> Any:
    """An input, joined to TinySDXL where it was joined to what that stands for."""
    if not (isinstance(value, list) and len(value) == 2 and value[0] in graph):
        return value
    name, output = value
    kind, title = graph[name]["class_type"], graph[name]["_meta"]["title"]
    if kind == TEXT:
        return ["tiny", 2 if title.startswith("Negative") else 1]
    return ["tiny", OUTPUTS[kind][output]] if kind in OUTPUTS else value
