"""Workflows in API form for the server tests: tiny SDXL, golden EasyRef."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from . import golden

if TYPE_CHECKING:
    from .server import ComfyServer

Graph = dict[str, dict[str, Any]]


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def install_golden(server: ComfyServer) -> None:
    """Put the golden checkpoint, its MLLM folder and the references where a user would put them."""
    folder = server.base / "models" / "easyref"
    folder.mkdir(exist_ok=True)
    shutil.copy(golden.CHECKPOINT, folder / "easyref.safetensors")
    shutil.copytree(golden.MLLM, folder / "tiny-qwen2-vl", dirs_exist_ok=True)
    for picture in (golden.GOLDEN / "references").glob("*.png"):
        shutil.copy(picture, server.base / "input" / picture.name)


def sampled(model: list, **inputs: Any) -> Graph:
    """The graph after a MODEL output: two steps on a 16x16 latent, decoded and saved. Node "tiny" must be there."""
    sampler = {
        "seed": 7,
        "steps": 2,
        "cfg": 5.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "denoise": 1.0,
        "positive": ["tiny", 1],
        "negative": ["tiny", 2],
        "latent_image": ["latent", 0],
    }
    return {
        "latent": node("EmptyLatentImage", width=128, height=128, batch_size=1),
        "sample": node("KSampler", **{**sampler, "model": model, **inputs}),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["tiny", 3]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="easyref"),
    }


def plain(**inputs: Any) -> Graph:
    """The unpatched model."""
    return {"tiny": node("TinySDXL", seed=0, prompt_tokens=77), **sampled(["tiny", 0], **inputs)}


def easyref(
    apply: dict[str, Any] | None = None, encode: dict[str, Any] | None = None, **inputs: Any
) -> Graph:
    """The whole path: three images, group, encode, aggregate, apply, sample."""
    weights = {"weight": 1.0, "start_percent": 0.0, "end_percent": 1.0, "lora_strength": 1.0}
    text = {
        "prompt": golden.SETTINGS["prompt"],
        "instruction": golden.SETTINGS["instruction"],
        "size": golden.SIZE,
    }
    images = range(golden.SETTINGS["images"])
    return {
        "tiny": node("TinySDXL", seed=0, prompt_tokens=77),
        "load": node(
            "EasyRefLoader",
            checkpoint="easyref.safetensors",
            mllm="easyref/tiny-qwen2-vl",
            precision="auto",
            last_layer_attention="from the checkpoint",
        ),
        **{f"image{i}": node("LoadImage", image=f"{i}.png") for i in images},
        "group": node("EasyRefGroup", **{f"images.image{i}": [f"image{i}", 0] for i in images}),
        "encode": node(
            "EasyRefEncodeGroup", **{"easyref": ["load", 0], "group": ["group", 0], **text, **(encode or {})}
        ),
        "aggregate": node("EasyRefAggregate", easyref=["load", 0], context=["encode", 0]),
        "apply": node(
            "EasyRefApply",
            **{
                "model": ["tiny", 0],
                "easyref": ["load", 0],
                "tokens": ["aggregate", 0],
                **weights,
                **(apply or {}),
            },
        ),
        **sampled(["apply", 0], **inputs),
    }
