"""The shipped workflows that follow one pattern, as data: nodes, their values and their links.

tools/workflows.py builds the JSON files from them; workflow_notes/ holds the Markdown notes. easyref_basic
and try_it_now were laid out by hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

NEGATIVE = "A collage of images, monochrome, lowres, bad anatomy, worst quality, low quality"
SDXL = (
    "sd_xl_base_1.0.safetensors",
    "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_base_1.0.safetensors",
    "checkpoints",
)
EASYREF = (
    "easyref.safetensors",
    "https://huggingface.co/zongzhuofan/EasyRef/resolve/main/model.safetensors",
    "easyref",
)
EXAMPLE = "example.png"  # in the host's input folder
NOTES = Path(__file__).with_name("workflow_notes")


class Link(NamedTuple):
    """The output of another node, by its index."""

    node: str
    output: int = 0


@dataclasses.dataclass(frozen=True)
class Node:
    """One node. inputs: {name: a value, or a Link}; nodes of one column are laid out below each other."""

    type: str
    column: int
    inputs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    title: str | None = None
    height: int = 0  # pixels; 0: the node's default
    model: tuple[str, str, str] | None = None  # file, URL, folder of models/


class Plan(NamedTuple):
    """One workflow: its note in Markdown, and its nodes by name."""

    note: str
    nodes: Mapping[str, Node]


def references(count: int = 3, name: str = "reference", group: str = "group") -> dict[str, Node]:
    """`count` Load Image nodes and the group that they form."""
    images = {
        f"{name}{i}": Node("LoadImage", 0, {"image": EXAMPLE}, f"{name.capitalize()} {i + 1}", height=310)
        for i in range(count)
    }
    return images | {
        group: Node(
            "EasyRefGroup",
            1,
            {f"images.image{i}": Link(f"{name}{i}") for i in range(count)},
            group.replace("_", " ").capitalize(),
        )
    }


def basis(prompt: str) -> dict[str, Node]:
    """All nodes of easyref_basic except the references: three columns, then the sampler and the image."""
    return {
        "checkpoint": Node("CheckpointLoaderSimple", 1, {"ckpt_name": SDXL[0]}, model=SDXL),
        "easyref": Node("EasyRefLoader", 1, {"checkpoint": EASYREF[0]}, model=EASYREF),
        "prompt": Node("PrimitiveStringMultiline", 1, {"value": prompt}, "Prompt", height=150),
        "positive": Node(
            "CLIPTextEncode",
            2,
            {"clip": Link("checkpoint", 1), "text": Link("prompt")},
            "Prompt for SDXL",
            height=90,
        ),
        "negative": Node(
            "CLIPTextEncode",
            2,
            {"clip": Link("checkpoint", 1), "text": NEGATIVE},
            "Negative prompt",
            height=130,
        ),
        "encode": Node(
            "EasyRefEncodeGroup",
            2,
            {"easyref": Link("easyref"), "group": Link("group"), "prompt": Link("prompt")},
            height=230,
        ),
        "aggregate": Node("EasyRefAggregate", 3, {"easyref": Link("easyref"), "context": Link("encode")}),
        "apply": Node(
            "EasyRefApply",
            3,
            {"model": Link("checkpoint"), "easyref": Link("easyref"), "tokens": Link("aggregate")},
        ),
        "latent": Node("EmptyLatentImage", 3, {"width": 1024, "height": 1024}),
        "sample": Node(
            "KSampler",
            4,
            {
                "model": Link("apply"),
                "positive": Link("positive"),
                "negative": Link("negative"),
                "latent_image": Link("latent"),
                "seed": 42,
                "steps": 30,
                "cfg": 5.0,
                "scheduler": "normal",
            },
        ),
        "decode": Node("VAEDecode", 4, {"samples": Link("sample"), "vae": Link("checkpoint", 2)}),
        "save": Node("SaveImage", 5, {"images": Link("decode"), "filename_prefix": "EasyRef"}, height=480),
    }


def changed(nodes: Mapping[str, Node], name: str, **inputs: Any) -> dict[str, Node]:
    """The nodes, with some inputs of one of them changed."""
    node = nodes[name]
    return {**nodes, name: dataclasses.replace(node, inputs={**node.inputs, **inputs})}


def _controlnet() -> dict[str, Node]:
    nodes = references() | basis("A castle on a hill, best quality, high quality")
    nodes |= {
        "shape": Node("LoadImage", 4, {"image": EXAMPLE}, "Picture to trace", height=310),
        "edges": Node("Canny", 4, {"image": Link("shape"), "low_threshold": 0.2, "high_threshold": 0.5}),
        "controlnet": Node("ControlNetLoader", 4, {"control_net_name": "controlnet.safetensors"}),
        "control": Node(
            "ControlNetApplyAdvanced",
            4,
            {
                "positive": Link("positive"),
                "negative": Link("negative"),
                "control_net": Link("controlnet"),
                "image": Link("edges"),
                "vae": Link("checkpoint", 2),
                "strength": 0.6,
            },
        ),
    }
    nodes = changed(nodes, "sample", positive=Link("control"), negative=Link("control", 1))
    return _sampler_later(nodes)


def _lora() -> dict[str, Node]:
    nodes = references() | basis("A cat in a garden, best quality, high quality")
    nodes["lora"] = Node(
        "LoraLoader",
        2,
        {
            "model": Link("checkpoint"),
            "clip": Link("checkpoint", 1),
            "lora_name": "lora.safetensors",
            "strength_model": 0.8,
        },
        "Your LoRA",
    )
    nodes = changed(nodes, "apply", model=Link("lora"))
    for text in ("positive", "negative"):
        nodes = changed(nodes, text, clip=Link("lora", 1))
    return nodes


def _inpainting() -> dict[str, Node]:
    nodes = references() | basis("A dog on a sofa, best quality, high quality")
    del nodes["latent"]
    nodes |= {
        "original": Node("LoadImage", 3, {"image": EXAMPLE}, "Picture with a mask", height=310),
        "pixels": Node("VAEEncode", 3, {"pixels": Link("original"), "vae": Link("checkpoint", 2)}),
        "masked": Node("SetLatentNoiseMask", 3, {"samples": Link("pixels"), "mask": Link("original", 1)}),
    }
    nodes = changed(nodes, "sample", latent_image=Link("masked"), denoise=0.85)
    return changed(nodes, "apply", mask=Link("original", 1))


def _two_regions() -> dict[str, Node]:
    """Two groups, each in one half of the image."""
    left, right = references(2, "left"), references(2, "right", "group_right")
    nodes = {**left, **right} | basis("Two people at a table in a cafe, best quality, high quality")
    nodes |= {
        "encode_right": dataclasses.replace(
            nodes["encode"], inputs={**nodes["encode"].inputs, "group": Link("group_right")}
        ),
        "aggregate_right": Node(
            "EasyRefAggregate", 3, {"easyref": Link("easyref"), "context": Link("encode_right")}
        ),
        "all": Node("SolidMask", 3, {"value": 0.0, "width": 1024, "height": 1024}, "Nothing"),
        "half": Node("SolidMask", 3, {"value": 1.0, "width": 512, "height": 1024}, "Half a picture"),
        "left_half": Node(
            "MaskComposite",
            4,
            {"destination": Link("all"), "source": Link("half"), "x": 0, "y": 0, "operation": "add"},
            "Left half",
        ),
        "right_half": Node("InvertMask", 4, {"mask": Link("left_half")}, "Right half"),
    }
    nodes["apply"] = dataclasses.replace(
        nodes["apply"], column=4, title="Left", inputs={**nodes["apply"].inputs, "mask": Link("left_half")}
    )
    nodes["apply_right"] = Node(
        "EasyRefApply",
        4,
        {
            "model": Link("apply"),
            "easyref": Link("easyref"),
            "tokens": Link("aggregate_right"),
            "mask": Link("right_half"),
        },
        "Right",
    )
    nodes = changed(nodes, "sample", model=Link("apply_right"))
    return _sampler_later(nodes)


def _frames() -> dict[str, Node]:
    """A cross-fade between two groups over a batch of frames."""
    frames = 8
    nodes = {**references(2, "first"), **references(2, "last", "group_last")}
    nodes |= basis("A lake between mountains, best quality, high quality")
    nodes |= {
        "encode_last": dataclasses.replace(
            nodes["encode"], inputs={**nodes["encode"].inputs, "group": Link("group_last")}
        ),
        "aggregate_last": Node(
            "EasyRefAggregate", 3, {"easyref": Link("easyref"), "context": Link("encode_last")}
        ),
        "frames": Node(
            "EasyRefTokensOverFrames",
            3,
            {"tokens.tokens0": Link("aggregate"), "tokens.tokens1": Link("aggregate_last"), "frames": frames},
        ),
    }
    nodes = changed(nodes, "latent", batch_size=frames)
    nodes["apply"] = dataclasses.replace(
        nodes["apply"], column=4, inputs={**nodes["apply"].inputs, "tokens": Link("frames")}
    )
    return _sampler_later(nodes)


def _weights() -> dict[str, Node]:
    """One image for each weight and end percent, on one sheet."""
    nodes = references() | basis("A cat in a garden, best quality, high quality")
    nodes["pairs"] = Node("EasyRefWeightSheet", 3, {"weights": "0, 0.5, 0.75, 1", "end_percents": "0.5, 1"})
    nodes = changed(nodes, "apply", weight=Link("pairs"), end_percent=Link("pairs", 1))
    del nodes["save"]
    nodes["sheet"] = Node(
        "EasyRefSheet",
        5,
        {"images": Link("decode"), "weight": Link("pairs"), "end_percent": Link("pairs", 1)},
        height=480,
    )
    return nodes


def _inspecting() -> dict[str, Node]:
    """All nodes that inspect a group: attention, influence, and where the references act."""
    nodes = references(4) | basis("A cat in a garden, best quality, high quality")
    nodes |= {
        "attention": Node(
            "EasyRefReferenceAttention",
            4,
            {"easyref": Link("easyref"), "context": Link("encode"), "group": Link("group")},
            height=380,
        ),
        "influence": Node(
            "EasyRefReferenceInfluence",
            2,
            {"easyref": Link("easyref"), "group": Link("group"), "prompt": Link("prompt")},
            height=480,
        ),
        "record": Node("EasyRefRecord", 4, {"model": Link("apply")}),
        "where": Node(
            "EasyRefWhereItActs", 5, {"record": Link("record", 1), "sampled": Link("decode")}, height=420
        ),
    }
    nodes = changed(nodes, "sample", model=Link("record"))
    return nodes


def _instructed(prompt: str, preset: str) -> dict[str, Node]:
    """A workflow of four references with an instruction preset for the MLLM."""
    nodes = references(4) | basis(f"{prompt}, best quality, high quality")
    nodes["instruction"] = Node("EasyRefInstruction", 1, {"preset": preset}, height=160)
    return changed(nodes, "encode", instruction=Link("instruction"))


def _sampler_later(nodes: Mapping[str, Node]) -> dict[str, Node]:
    """The nodes, with the sampler and what follows it one column further right."""
    last = {
        name: dataclasses.replace(nodes[name], column=nodes[name].column + 1)
        for name in ("sample", "decode", "save")
    }
    return {**nodes, **last}


def note(name: str) -> str:
    """The Markdown note of a workflow, with the shared paragraphs in place of {new_image} and {files}."""
    shared = {part: _read(f"shared_{part}") for part in ("new_image", "files")}
    return _read(name).format(**shared) + "\n"


def _read(name: str) -> str:
    return (NOTES / f"{name}.md").read_text(encoding="utf-8").strip()


_NODES = {
    "style_from_a_group": _instructed("A lighthouse on a cliff at dawn", "style"),
    "identity_portrait": _instructed("Photo of a person in a red coat, snow", "identity"),
    "two_regions": _two_regions(),
    "animation_frames": _frames(),
    "choosing_a_weight": _weights(),
    "inspecting_a_group": _inspecting(),
    "with_controlnet": _controlnet(),
    "with_a_lora": _lora(),
    "inpainting": _inpainting(),
}
PLANS = {name: Plan(note(name), nodes) for name, nodes in _NODES.items()}
