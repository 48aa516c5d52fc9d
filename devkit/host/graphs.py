"""Workflows in API form for the server tests (tiny SDXL, golden EasyRef), and their results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from devkit.host import golden
from devkit.host.server import PromptFailed, pixels

if TYPE_CHECKING:
    from devkit.host.server import ComfyServer

Graph = dict[str, dict[str, Any]]
AFTER_GENERATE = ("fixed", "increment", "decrement", "randomize")  # control values that follow a seed


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def install_golden(server: ComfyServer) -> None:
    """Install the golden checkpoint, its MLLM folder and the references in the server's folders."""
    folder = server.base / "models" / "easyref"
    folder.mkdir(exist_ok=True)
    shutil.copy(golden.CHECKPOINT, folder / "easyref.safetensors")
    shutil.copytree(golden.MLLM, folder / "golden-qwen2-vl", dirs_exist_ok=True)
    shutil.copytree(golden.GOLDEN / "references", server.base / "input", dirs_exist_ok=True)


def sampled(model: list, **inputs: Any) -> Graph:
    """The graph after a MODEL output: two steps on a 16x16 latent, decoded and saved. It needs "tiny"."""
    euler = {"sampler_name": "euler", "scheduler": "normal"}
    sampler = {"seed": 7, "steps": 2, "cfg": 5.0, "denoise": 1.0, **euler}
    links = {"positive": ["tiny", 1], "negative": ["tiny", 2], "latent_image": ["latent", 0]}
    return {
        "latent": node("EmptyLatentImage", width=128, height=128, batch_size=1),
        "sample": node("KSampler", **{"model": model, **links, **sampler, **inputs}),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["tiny", 3]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="easyref"),
    }


def plain(**inputs: Any) -> Graph:
    """The unpatched model."""
    return {"tiny": node("TinySDXL", seed=0, prompt_tokens=77), **sampled(["tiny", 0], **inputs)}


def easyref(
    apply: dict[str, Any] | None = None,
    encode: dict[str, Any] | None = None,
    load: dict[str, Any] | None = None,
    **inputs: Any,
) -> Graph:
    """The whole path: three images, group, encode, aggregate, apply, sample."""
    file = {"checkpoint": "easyref.safetensors", "mllm": "easyref/golden-qwen2-vl"}
    choices = {"precision": "auto", "last_layer_attention": "from the checkpoint"}
    weights = {"weight": 1.0, "start_percent": 0.0, "end_percent": 1.0, "lora_strength": 1.0}
    text = {name: golden.SETTINGS[name] for name in ("prompt", "instruction")} | {"size": golden.SIZE}
    group_and_model = {"easyref": ["load", 0], "group": ["group", 0]}
    images = range(golden.SETTINGS["images"])
    linked = {"model": ["tiny", 0], "easyref": ["load", 0], "tokens": ["aggregate", 0]}
    return {
        "tiny": node("TinySDXL", seed=0, prompt_tokens=77),
        "load": node("EasyRefLoader", **{**file, **choices, **(load or {})}),
        **{f"image{i}": node("LoadImage", image=f"{i}.png") for i in images},
        "group": group(*([f"image{i}", 0] for i in images)),
        "encode": node("EasyRefEncodeGroup", **{**group_and_model, **text, **(encode or {})}),
        "aggregate": node("EasyRefAggregate", easyref=["load", 0], context=["encode", 0]),
        "apply": node("EasyRefApply", **{**linked, **weights, **(apply or {})}),
        **sampled(["apply", 0], **inputs),
    }


def tokens() -> Graph:
    """The path to the reference tokens, without SDXL."""
    without = ("tiny", "apply", "latent", "sample", "decode", "save")
    return {name: entry for name, entry in easyref().items() if name not in without}


def from_file(workflow: Path) -> Graph:
    """A saved workflow (UI format 0.4) as the frontend queues it, by the nodes' numbers.

    The nodes of a subgraph have the numbers "<its node>:<number>".
    """
    saved = json.loads(workflow.read_text(encoding="utf-8"))
    subgraphs = {one["id"]: one for one in saved.get("definitions", {}).get("subgraphs", [])}
    links = {link[0]: [str(link[1]), link[2]] for link in saved["links"]}
    graph, results = {}, {}
    for entry in saved["nodes"]:
        if entry["type"] == "MarkdownNote":
            continue
        number, inputs = str(entry["id"]), _inputs(entry, links)
        if entry["type"] in subgraphs:
            inner, outputs = _subgraph(number, subgraphs[entry["type"]], inputs)
            graph |= inner
            results |= {(number, i): output for i, output in enumerate(outputs)}
        else:
            graph[number] = node(entry["type"], **inputs) | {"_meta": {"title": entry.get("title")}}
    for entry in graph.values():
        for name, value in entry["inputs"].items():
            if isinstance(value, list):
                entry["inputs"][name] = results.get(tuple(value), value)
    return graph


def _inputs(entry: dict[str, Any], links: dict[int, list]) -> dict[str, Any]:
    """Values and links of a saved node. links: [node, output] by the link's number."""
    values = [value for value in entry.get("widgets_values", []) if value not in AFTER_GENERATE]
    widgets = [socket["name"] for socket in entry["inputs"] if "widget" in socket]
    linked = {socket["name"]: links[socket["link"]] for socket in entry["inputs"] if socket["link"]}
    return dict(zip(widgets, values, strict=True)) | linked


def _subgraph(number: str, subgraph: dict[str, Any], given: dict[str, Any]) -> tuple[Graph, list[list]]:
    """The nodes of a subgraph, and the [node, output] of each of its outputs. given: inputs of its node."""
    inside = {link["id"]: link for link in subgraph["links"]}
    names = [slot["name"] for slot in subgraph["inputs"]]

    def source(link: dict[str, Any]) -> Any:
        if link["origin_id"] == subgraph["inputNode"]["id"]:
            return given.get(names[link["origin_slot"]])
        return [f"{number}:{link['origin_id']}", link["origin_slot"]]

    links = {link_id: source(link) for link_id, link in inside.items()}
    nodes = {
        f"{number}:{entry['id']}": node(entry["type"], **_inputs(entry, links))
        | {"_meta": {"title": entry.get("title")}}
        for entry in subgraph["nodes"]
    }
    return nodes, [links[slot["linkIds"][0]] for slot in subgraph["outputs"]]


def group(*images: list, **inputs: Any) -> dict[str, Any]:
    """A group node with these links at its sockets image0, image1, ..."""
    return node("EasyRefGroup", **{f"images.image{i}": link for i, link in enumerate(images)}, **inputs)


def tiny_images(shapes: str, seed: int = 0, fill: str = "noise") -> dict[str, Any]:
    """A node of random images: see tiny_nodes.tiny_images.noise."""
    return node("TinyImages", shapes=shapes, seed=seed, fill=fill)


def of_images(link: list, nodes: Graph, **changes: Any) -> Graph:
    """The whole path with other nodes in place of the three images and their group; `link`: of the group."""
    graph = easyref(**changes)
    for i in range(golden.SETTINGS["images"]):
        del graph[f"image{i}"]
    del graph["group"]
    graph["encode"]["inputs"]["group"] = link
    return {**graph, **nodes}


def run(server: ComfyServer, graph: Graph) -> tuple[set[str], dict[str, Any]]:
    """Run a graph; -> the nodes that were executed, and the previews of all nodes."""
    prompt_id = server.queue(graph)
    history = server.wait(prompt_id)
    return set(server.executed(prompt_id)), history["outputs"]


def image(server: ComfyServer, graph: Graph) -> bytes:
    """Pixels of a workflow's one output image; the bytes of its PNG file would include the workflow."""
    return image_of(server, server.queue(graph))


def image_of(server: ComfyServer, prompt_id: str) -> bytes:
    """The same for a queued workflow, after it has ended."""
    (png,) = server.images(server.wait(prompt_id), "output")
    return pixels(png).tobytes()


def uncached_image(server: ComfyServer, graph: Graph) -> bytes:
    """The same from a run in which every node is executed, after the host has cleared its cache."""
    for _ in range(5):  # the host may take the first prompt before it empties the cache
        server.free()
        prompt_id = server.queue(graph)
        output = image_of(server, prompt_id)
        if not server.cached(prompt_id):
            return output
    raise AssertionError("the host went on using its cache after /free")


def failure(server: ComfyServer, graph: Graph) -> str:
    """The server's error message for a workflow that it refuses (HTTP 400) or that fails."""
    try:
        server.run(graph)
    except PromptFailed as failed:
        if failed.kind != "invalid":
            return failed.details["exception_message"]
        errors = [error for node in failed.details["node_errors"].values() for error in node["errors"]]
        return "\n".join(error["details"] for error in errors)
    raise AssertionError("the workflow ran; it should have failed")
