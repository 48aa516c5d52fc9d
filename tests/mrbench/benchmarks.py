"""Small benchmarks for the tests: images, manifests, and tiny random feature extractors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ..training.tiny import write_clip_tokenizer

LAYERS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = LAYERS | {"image_size": 32, "patch_size": 8}


def image(seed: int, side: int = 32) -> Image.Image:
    """A unique image of random colour blocks, which survive resizing."""
    blocks = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((side, side), Image.Resampling.BICUBIC)


def save(image: Image.Image, file: Path) -> Path:
    """Write the image, and the folders above it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)
    return file


def group(number: int, references: int = 2, split: str = "held-out", **changes: Any) -> dict[str, Any]:
    """A group as in the manifest's JSON."""
    return {
        "id": f"g{number}",
        "references": [f"g{number}/{i}.png" for i in range(references)],
        "target": f"g{number}/target.png",
        "prompt": f"a thing number {number}",
        "category": "subject",
        "split": split,
    } | changes


def write(folder: Path, groups: Sequence[Mapping[str, Any]], /, **changes: Any) -> Path:
    """Write a manifest of these groups, without their images."""
    file = folder / "manifest.json"
    file.write_text(json.dumps({"name": "small", "seed": 7, "groups": groups} | changes))
    return file


def benchmark(folder: Path, groups: Sequence[Mapping[str, Any]]) -> Path:
    """Write a manifest and its images, all different."""
    files = [file for one in groups for file in (*one["references"], one["target"])]
    for seed, file in enumerate(files):
        save(image(seed), folder / file)
    return write(folder, groups)


def generated(
    out: Path, methods: Sequence[str], groups: Sequence[str], seeds: Sequence[int] = (0, 1)
) -> Path:
    """Write images of some methods, all different."""
    files = [f"{method}/{name}/{seed}.png" for method in methods for name in groups for seed in seeds]
    for number, file in enumerate(files):
        save(image(1000 + number), out / file)
    return out


def error_of(call: Callable[[], object], kind: type[Exception] = ValueError) -> str:
    """The text of the error that a call raises."""
    with pytest.raises(kind) as raised:
        call()
    return str(raised.value)


def write_clip(folder: Path) -> Path:
    """A CLIP of two small layers with random weights, its tokenizer and its image processor's settings."""
    from transformers import CLIPConfig, CLIPModel

    text = LAYERS | {
        "vocab_size": 190,
        "max_position_embeddings": 77,
        "bos_token_id": 188,
        "eos_token_id": 189,
    }
    vision = VISION | {"projection_dim": 12}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    write_clip_tokenizer(folder, "".join(map(chr, range(33, 127))))
    settings = {"crop_size": 32, "size": 32, "resample": 3, "do_center_crop": True, "do_resize": True}
    write_processor(folder, "CLIPFeatureExtractor", settings)
    return folder


def write_dino(folder: Path) -> Path:
    """A ViT of two small layers with random weights, and its image processor's settings."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(1)
    ViTModel(ViTConfig(**VISION), add_pooling_layer=False).save_pretrained(folder)
    write_processor(folder, "ViTFeatureExtractor", {"size": 32, "resample": 2, "do_resize": True})
    return folder


def write_processor(folder: Path, kind: str, settings: Mapping[str, Any]) -> None:
    """preprocessor_config.json in the old format of the published models."""
    statistics = {"do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3]}
    data = {"feature_extractor_type": kind, **settings, **statistics}
    (folder / "preprocessor_config.json").write_text(json.dumps(data))
