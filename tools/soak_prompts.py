"""The workflows of tools/soak.py: drawn from a seed, and fixed probes for the start and the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

from devkit.host import golden, graphs
from devkit.host.graphs import Graph, node
from easyref_core.mllm.instructions import PRESETS
from easyref_core.tokens.combine import METHODS
from easyref_core.unet.layer_weights import WEIGHT_TYPES
from easyref_core.unet.reference_attention import SCALINGS

GOLDEN, SECOND, LARGER = "easyref.safetensors", "second.safetensors", "random.safetensors"
MLLM = "easyref/golden-qwen2-vl"
CHECKPOINTS = {GOLDEN: MLLM, SECOND: MLLM, LARGER: "easyref/random-qwen2-vl"}  # with their MLLM folders
FILES = [f"{i}.png" for i in range(golden.SETTINGS["images"])]
SHAPES = {"1x64x64x3": 1, "1x96x64x3": 1, "2x56x84x3": 2, "1x128x72x3": 1}  # images of each
PROMPTS = [
    "a cat on a sofa",
    "an oil painting of a harbour",
    "a dog in the snow, 35mm",
    "猫",
    "a portrait, " * 8,
]
SCHEDULES = ("1, 0.5, 0", "0, 1", "0.2:1, 0.8:0", "0.1:0.3, 0.5:1.5, 0.9:0.2")
LARGE = 10  # images of 336 x 336, which take long enough to be cancelled while they are encoded
ALWAYS = {"weight": 1.0, "start_percent": 0.0, "end_percent": 1.0, "lora_strength": 1.0}
TOKEN_KINDS = ("plain", "plain", "combine", "batch", "save", "load")


class Saved(NamedTuple):
    """A file of tokens that an earlier workflow saved."""

    file: str
    checkpoint: str


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A workflow, its kinds (for the table), and the number of images it must give."""

    graph: Graph
    kinds: tuple[str, ...]
    checkpoint: str
    images: int


def draw(random: Random, saved: Sequence[Saved]) -> Drawn:
    """A workflow of random references, texts, settings and token nodes; it may load the `saved` tokens."""
    checkpoint = random.choice(list(CHECKPOINTS))
    files = [file.file for file in saved if file.checkpoint == checkpoint]
    kind = random.choice(TOKEN_KINDS)
    kind = "plain" if kind == "load" and not files else kind
    kinds = [kind]
    precision = random.choice(("auto", "auto", "auto", "fp32", "bf16"))
    graph = graphs.easyref(
        load={"checkpoint": checkpoint, "mllm": CHECKPOINTS[checkpoint], "precision": precision},
        seed=random.randrange(1000),
    )
    for i in range(len(FILES)):
        del graph[f"image{i}"]
    graph["tiny"] = node("TinySDXL", seed=random.randrange(3), prompt_tokens=random.choice((77, 154)))
    graph["sample"]["inputs"] |= {"steps": random.choice((2, 3)), "cfg": random.choice((1.0, 5.0))}
    large = random.random() < 0.1
    references = _group(random, graph, "group", large)
    _context(random, graph, "", large)
    kinds += ["large"] * large
    if random.random() < 0.25:
        weights = ", ".join(str(random.choice((0.5, 1, 2))) for _ in range(references))
        graph["weigh"] = node("EasyRefWeighReferences", context=["encode", 0], weights=weights)
        graph["aggregate"]["inputs"]["context"] = ["weigh", 0]
        kinds.append("weigh")
    images = TOKENS[kind](random, graph, files)
    _negative(random, graph, kinds)
    _settings(random, graph, kinds)
    _inspect(random, graph, kinds)
    return Drawn(graph, tuple(kinds), checkpoint, images)


def probes() -> dict[str, Drawn]:
    """Workflows that must give the same images at the start and at the end."""
    first = graphs.easyref()
    settings = {"weight_schedule": "1, 0.5, 0", "weight_type": "style transfer", "lora_strength": 0.5}
    load = {"checkpoint": SECOND, "precision": "fp32"}
    second = graphs.easyref({"weight": 0.8, **settings}, load=load, seed=3)
    masked = graphs.easyref(
        {"mask": ["mask", 0], "embeds_scaling": list(SCALINGS)[1]}, {"prompt": PROMPTS[1]}
    )
    masked["mask"] = node("SolidMask", value=0.7, width=64, height=32)
    combined = graphs.easyref({"tokens": ["tokens", 0]})
    _second_group(combined, [["image0", 0], ["image2", 0]], PROMPTS[2])
    combined["tokens"] = _joined("EasyRefCombineTokens", method="concat", factor=0.5, weights="")
    larger = graphs.easyref(load={"checkpoint": LARGER, "mllm": CHECKPOINTS[LARGER]})
    workflows = {"plain": first, "second checkpoint": second, "larger checkpoint": larger}
    workflows |= {"masked": masked, "combined": combined}
    return {name: Drawn(graph, (name,), GOLDEN, 1) for name, graph in workflows.items()}


def shorter(probe: Drawn) -> Graph:
    """The probe without the last reference of its group, which leaves a prefix of the probe cached."""
    graph = {name: {**entry, "inputs": dict(entry["inputs"])} for name, entry in probe.graph.items()}
    sockets = [name for name in graph["group"]["inputs"] if name.startswith("images.")]
    del graph["group"]["inputs"][sockets[-1]]
    return graph


def _group(random: Random, graph: Graph, name: str, large: bool = False) -> int:
    """A group of the images of 1 to 5 nodes, from files and noise, in any order; returns their number."""
    links, references = [], 0
    for i in range(random.randint(1, 5)):
        shape = random.choice(list(SHAPES))
        from_file = random.random() < 0.5
        noise = graphs.tiny_images(shape, seed=random.randrange(4))
        graph[f"{name} {i}"] = node("LoadImage", image=random.choice(FILES)) if from_file else noise
        links.append([f"{name} {i}", 0])
        references += 1 if from_file else SHAPES[shape]
    if large:
        graph[f"{name} large"] = graphs.tiny_images(f"{LARGE}x336x336x3", seed=random.randrange(2))
        links.append([f"{name} large", 0])
        references += LARGE
    graph[name] = graphs.group(*links)
    return references


def _context(random: Random, graph: Graph, prefix: str, large: bool = False) -> None:
    texts = {
        "prompt": random.choice(PROMPTS),
        "instruction": random.choice([text for preset in PRESETS.values() for text in preset.values()]),
        "size": 336 if large else random.choice((golden.SIZE, 112)),
    }
    graph[f"{prefix}encode"]["inputs"] |= texts


def _second_group(graph: Graph, images: list[list], prompt: str) -> None:
    inputs = {**graph["encode"]["inputs"], "group": ["other group", 0], "prompt": prompt}
    graph["other group"] = graphs.group(*images)
    graph["other encode"] = node("EasyRefEncodeGroup", **inputs)
    graph["other tokens"] = node("EasyRefAggregate", easyref=["load", 0], context=["other encode", 0])


def _other(random: Random, graph: Graph) -> None:
    """Add a second group with an encoder and tokens of its own."""
    _second_group(graph, [], "")
    _group(random, graph, "other group")
    _context(random, graph, "other ")


def _joined(kind: str, **settings: object) -> dict:
    links = {"tokens.tokens0": ["aggregate", 0], "tokens.tokens1": ["other tokens", 0]}
    return node(kind, **links, **settings)


def _plain(random: Random, graph: Graph, files: Sequence[str]) -> int:
    return 1


def _combine(random: Random, graph: Graph, files: Sequence[str]) -> int:
    _other(random, graph)
    settings = {"method": random.choice(list(METHODS)), "factor": random.random()}
    graph["tokens"] = _joined("EasyRefCombineTokens", weights=random.choice(("", "1, 0.5")), **settings)
    graph["apply"]["inputs"]["tokens"] = ["tokens", 0]
    return 1


def _batch(random: Random, graph: Graph, files: Sequence[str]) -> int:
    _other(random, graph)
    graph["tokens"] = _joined("EasyRefBatchTokens")
    graph["apply"]["inputs"]["tokens"] = ["tokens", 0]
    graph["latent"]["inputs"]["batch_size"] = 2
    return 2


def _save(random: Random, graph: Graph, files: Sequence[str]) -> int:
    graph["keep"] = node("EasyRefSaveTokens", tokens=["aggregate", 0], filename_prefix="soak/tokens")
    if random.random() < 0.5:
        graph["keep"]["inputs"]["references"] = ["group", 0]
    return 1


def _load(random: Random, graph: Graph, files: Sequence[str]) -> int:
    graph["tokens"] = node("EasyRefLoadTokens", file=random.choice(files))
    graph["apply"]["inputs"]["tokens"] = ["tokens", 0]
    return 1


TOKENS: dict[str, Callable[[Random, Graph, Sequence[str]], int]] = {
    "plain": _plain,
    "combine": _combine,
    "batch": _batch,
    "save": _save,
    "load": _load,
}


def _negative(random: Random, graph: Graph, kinds: list[str]) -> None:
    if random.random() < 0.15:
        noise = {"negative": "noise", "noise_seed": random.randrange(30), "noise_strength": 0.5}
        graph["aggregate"]["inputs"] |= noise
        kinds.append("noise")


def _settings(random: Random, graph: Graph, kinds: list[str]) -> None:
    """Draw weight, window, mask, layers, schedule, scaling and LoRA of the Apply node."""
    start = random.choice((0.0, 0.0, 0.2, 0.5))
    settings = {
        "weight": random.choice((0.0, 0.4, 1.0, 1.5)),
        "start_percent": start,
        "end_percent": random.choice((start, 0.6, 1.0, 1.0)),
        "lora_strength": random.choice((0.0, 0.5, 1.0)),
    }
    if random.random() < 0.3:
        size = {"width": random.choice((16, 64, 200)), "height": random.choice((16, 48))}
        graph["mask"] = node("SolidMask", value=random.choice((0.0, 0.5, 1.0)), **size)
        settings["mask"] = ["mask", 0]
        kinds.append("mask")
    if random.random() < 0.3:
        settings["weight_schedule"] = random.choice(SCHEDULES)
        kinds.append("schedule")
    if random.random() < 0.3:
        settings["weight_type"] = random.choice(list(WEIGHT_TYPES))
        settings["embeds_scaling"] = random.choice(list(SCALINGS))
        kinds.append("layers")
    graph["apply"]["inputs"] |= settings


def _inspect(random: Random, graph: Graph, kinds: list[str]) -> None:
    """Now and then add a node of the inspect room, which hooks into the model while it runs."""
    if random.random() < 0.1:
        linked = {"easyref": ["load", 0], "context": ["encode", 0], "group": ["group", 0]}
        graph["attention"] = node("EasyRefReferenceAttention", token=-1, **linked)
        kinds.append("attention")
    if random.random() < 0.1:
        graph["record"] = node("EasyRefRecord", model=["apply", 0])
        graph["where"] = node(
            "EasyRefWhereItActs", record=["record", 1], sampled=["decode", 0], side="prompt"
        )
        graph["sample"]["inputs"]["model"] = ["record", 0]
        apply = graph["apply"]["inputs"]  # there must be something to record
        graph["apply"]["inputs"] = {name: apply[name] for name in ("model", "easyref", "tokens")} | ALWAYS
        kinds.append("record")
