"""The shipped workflows that follow one pattern, as data: which nodes, what they hold, how they are joined.

tools/workflows.py makes the JSON files of them. easyref_basic and try_it_now were laid out by hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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
EXAMPLE = "example.png"  # what the host ships with


class Link(NamedTuple):
    """The output of another node, by its place."""

    node: str
    output: int = 0


@dataclasses.dataclass(frozen=True)
class Node:
    """One node. inputs: {name: a value, or a Link}; column: nodes of one column stand below each other."""

    type: str
    column: int
    inputs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    title: str | None = None
    height: int = 0  # pixels; 0: the node's own
    model: tuple[str, str, str] | None = None  # file, where it is downloaded from, folder of models/


@dataclasses.dataclass(frozen=True)
class Plan:
    """One workflow: its notes in Markdown, and its nodes by name."""

    note: str
    nodes: Mapping[str, Node]


def references(count: int = 3, name: str = "reference", group: str = "group") -> dict[str, Node]:
    """So many Load Image nodes and the group they make."""
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
    """Everything of easyref_basic but the references: three columns of nodes, then sampler and picture."""
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


ANOTHER_PICTURE = """
The seed is fixed, so that **Run** executes only what you changed. For a new picture with every Run, set **control after generate** of *KSampler* to *randomize*: only the sampler and the nodes after it run.
"""
FILES = """
## Files

SDXL in `models/checkpoints`, the [EasyRef checkpoint](https://huggingface.co/zongzhuofan/EasyRef) (any name) in `models/easyref`. Replace every *example.png* by a picture of your own.
"""


def _style() -> Plan:
    prompt = "A lighthouse on a cliff at dawn, best quality, high quality"
    nodes = references(4) | basis(prompt)
    return Plan(
        """# A style from a group

1. **References**: four or more pictures in one style, with different things in them. What they all show is what is taken over: if all show a house, houses come too.
2. **Instruction** tells the MLLM to look for the style. Its text can be edited.
3. **Prompt**: what to paint. Leave style words out; the references say them.
4. Too much of their content? Lower **weight** to 0.7, or choose *style transfer* as **weight_type** of Apply EasyRef.
"""
        + ANOTHER_PICTURE
        + FILES,
        _instructed(nodes, "style"),
    )


def _portrait() -> Plan:
    nodes = references(4) | basis("Photo of a person in a red coat, snow, best quality, high quality")
    return Plan(
        """# A portrait: one identity

1. **References**: four or more pictures of one person, cropped to squares around the face, in different light and from different sides. *Crop References* does the cropping.
2. **Prompt**: who and where, as in training: "Photo of a woman ...".
3. Weight 1 is the trained strength. For a likeness, look at several seeds before turning knobs.
"""
        + ANOTHER_PICTURE
        + FILES,
        _instructed(nodes, "identity"),
    )


def _controlnet() -> Plan:
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
    return Plan(
        """# With a ControlNet

The ControlNet says where things are, the references what they are like. EasyRef does not reach into the ControlNet: both act side by side.

1. **References** as always.
2. **Picture to trace** is turned into edges; put any SDXL ControlNet in `models/controlnet` and choose it.
3. **strength** of the ControlNet 0.5 to 0.7 leaves the references room. **end_percent** 0.6 lets them finish alone.
"""
        + ANOTHER_PICTURE
        + FILES,
        _later(nodes, ("sample", "decode", "save")),
    )


def _lora() -> Plan:
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
    return Plan(
        """# With a LoRA

1. **Your LoRA**: any SDXL LoRA, before or after Apply EasyRef; the result is the same.
2. **lora_strength** of Apply EasyRef is another one: the LoRA that the EasyRef checkpoint was trained with. Leave it at 1.
3. A LoRA of a style and references of a character go together well; two that want the same thing add up: lower one of them.
"""
        + ANOTHER_PICTURE
        + FILES,
        nodes,
    )


def _inpainting() -> Plan:
    nodes = references() | basis("A dog on a sofa, best quality, high quality")
    del nodes["latent"]
    nodes |= {
        "picture": Node("LoadImage", 3, {"image": EXAMPLE}, "Picture with a mask", height=310),
        "pixels": Node("VAEEncode", 3, {"pixels": Link("picture"), "vae": Link("checkpoint", 2)}),
        "masked": Node("SetLatentNoiseMask", 3, {"samples": Link("pixels"), "mask": Link("picture", 1)}),
    }
    nodes = changed(nodes, "sample", latent_image=Link("masked"), denoise=0.85)
    nodes = changed(nodes, "apply", mask=Link("picture", 1))
    return Plan(
        """# Inpainting with references

1. **Picture with a mask**: right-click, *Open in MaskEditor*, paint over what shall be new.
2. **References**: what shall come there.
3. The same mask goes to Apply EasyRef, so that the references act there alone, and to the latent, so that nothing else is repainted.
4. **denoise** 0.85: lower keeps more of what was there. Inpainting checkpoints work too.
"""
        + ANOTHER_PICTURE
        + FILES,
        nodes,
    )


def _two_regions() -> Plan:
    """Two groups, each with a half of the picture."""
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
    return Plan(
        """# Two groups in two regions

Each group has an *Apply EasyRef* of its own with a **mask**, one after the other. White is where it acts; masks of any size are scaled to the picture, soft edges blend.

1. **Left** and **Right** references: two or more each.
2. Masks here are the halves; paint your own with *Load Image (as Mask)* or the mask editor.
3. The prompt names both: the references say what they look like, the words put them into one scene.
4. The checkpoint's LoRA is merged once for both, wherever the masks are.
"""
        + ANOTHER_PICTURE
        + FILES,
        _later(nodes, ("sample", "decode", "save")),
    )


def _frames() -> Plan:
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
    return Plan(
        """# Animation frames

*Reference Tokens over Frames* fades from one group to another: each picture of the batch has tokens of its own.

1. **First** and **Last** references: two groups. More groups: more sockets appear.
2. **frames** and the **batch_size** of the latent are the same number.
3. For motion put AnimateDiff between checkpoint and *Apply EasyRef*; its context windows take the rows of their own frames.
"""
        + ANOTHER_PICTURE
        + FILES,
        _later(nodes, ("sample", "decode", "save")),
    )


def _weights() -> Plan:
    """One picture for each weight and end, on one sheet."""
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
    return Plan(
        """# Choosing a weight

*Weight Sheet* lists every pair of a weight and an end percent; everything after *Apply EasyRef* runs once for each, with the same noise. *Assemble Sheet* puts the pictures together.

1. **References** and **Prompt** as always.
2. The seed is fixed, so that all sheets compare. **control after generate** of *KSampler* set to *randomize* gives every sheet another one.
3. Read the sheet: the column from which the references show is your weight; an end of 0.5 keeps their composition and leaves details to the prompt.
"""
        + FILES,
        nodes,
    )


def _inspecting() -> Plan:
    """What the MLLM reads of a group, what each reference does, and where it acts."""
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
    return Plan(
        """# Inspecting a group

1. **Reference Attention**: where in each reference the tokens look, and how much of the attention each reference gets.
2. **Reference Influence**: how much the tokens change without each reference, how alike they are, and which one does not belong. Take it out, or weigh it down with *Weigh References*.
3. **Record** and **Where It Acts**: in which blocks, at which steps and at which places of the picture the references act.

None of them changes the picture.
"""
        + ANOTHER_PICTURE
        + FILES,
        nodes,
    )


def _instructed(nodes: Mapping[str, Node], preset: str) -> dict[str, Node]:
    """The nodes with an instruction preset for the MLLM."""
    instruction = Node("EasyRefInstruction", 1, {"preset": preset}, height=160)
    return changed({**nodes, "instruction": instruction}, "encode", instruction=Link("instruction"))


def _later(nodes: Mapping[str, Node], names: tuple[str, ...]) -> dict[str, Node]:
    """The nodes, some of them one column further right."""
    return {
        name: dataclasses.replace(node, column=node.column + 1) if name in names else node
        for name, node in nodes.items()
    }


PLANS: dict[str, Plan] = {
    "style_from_a_group": _style(),
    "identity_portrait": _portrait(),
    "two_regions": _two_regions(),
    "animation_frames": _frames(),
    "choosing_a_weight": _weights(),
    "inspecting_a_group": _inspecting(),
    "with_controlnet": _controlnet(),
    "with_a_lora": _lora(),
    "inpainting": _inpainting(),
}
