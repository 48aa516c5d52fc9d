"""Pretraining of the tiny Qwen2-VL: the vision tower learns, and the result is a Qwen2-VL folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from easyref_core.tiny.dataset import Dataset
from easyref_core.tiny.images import COUNTS
from easyref_core.tiny.optimizer import Training
from easyref_core.tiny.qwen2_vl import CONFIG, VISION, body_config, pretrain_qwen2_vl, resize_all
from easyref_core.tiny.tokenizer import train_mllm_tokenizer
from easyref_core.tiny.vision_pretraining import VisionClassifier, pretrain_vision


def test_images_are_not_resized(dataset: Dataset) -> None:
    assert np.array_equal(resize_all(dataset.images[:3], body_config()), dataset.images[:3])


def test_the_logits_of_an_image_do_not_depend_on_the_batch(dataset: Dataset) -> None:
    torch.manual_seed(0)
    model = VisionClassifier(body_config())
    together = torch.cat(model(dataset.images[:3]), dim=1)
    alone = torch.cat(model(dataset.images[2:3]), dim=1)
    assert together.shape == (3, sum(COUNTS))
    assert torch.allclose(together[2:], alone, atol=1e-5)


def test_the_vision_tower_learns_colours_in_a_few_steps(dataset: Dataset) -> None:
    lines: list[str] = []
    training = Training(steps=120, batch=32, lr=3e-3, seed=0)
    tower = pretrain_vision(dataset, dataset.images, body_config(), training, lines.append)
    first, last = (float(line.split("loss ")[1].split(",")[0]) for line in (lines[0], lines[-1]))
    assert last < first - 1.5
    assert tower.patch_embed.weight.shape == (VISION["embed_dim"], body_config().patch_values)


def test_the_result_is_a_qwen2_vl_folder(dataset: Dataset, tmp_path: Path) -> None:
    train_mllm_tokenizer(tmp_path)
    training = Training(steps=1, batch=2, lr=1e-3, seed=0)
    pretrain_qwen2_vl(dataset, tmp_path, training, vision=training, log=lambda line: None)
    tensors = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())["vision_config"]
    side = config["patch_size"]
    assert tensors["visual.patch_embed.proj.weight"].shape == (config["embed_dim"], 3, 2, side, side)
    assert tensors["model.embed_tokens.weight"].shape == (CONFIG["vocab_size"], CONFIG["hidden_size"])
