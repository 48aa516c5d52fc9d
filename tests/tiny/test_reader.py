"""The tiny Qwen2-VL's pretraining: the tower learns to see, and what is saved is a Qwen2-VL folder."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from easyref_core.tiny.dataset import Pool, draw_pool
from easyref_core.tiny.images import COUNTS
from easyref_core.tiny.qwen2_vl import SIZES, VISION, body_config, prepared, pretrain_reader
from easyref_core.tiny.tokenizer import train_mllm_tokenizer
from easyref_core.tiny.vision_pretraining import Sight, pretrain_sight


@pytest.fixture(scope="module")
def pool() -> Pool:
    return draw_pool(3, 1)


def test_pictures_stay_as_they_are(pool):
    assert np.array_equal(prepared(pool.pictures[:3], body_config()), pool.pictures[:3])


def test_sight_reads_each_picture_by_itself(pool):
    torch.manual_seed(0)
    sight = Sight(body_config())
    together = torch.cat(sight(pool.pictures[:3]), dim=1)
    alone = torch.cat(sight(pool.pictures[2:3]), dim=1)
    assert together.shape == (3, sum(COUNTS))
    assert torch.allclose(together[2:], alone, atol=1e-5)


def test_sight_learns_colours_in_a_few_steps(pool):
    said = []
    tower = pretrain_sight(pool, pool.pictures, body_config(), 120, 32, 3e-3, 0, said.append)
    first, last = (float(line.split("loss ")[1].split(",")[0]) for line in (said[0], said[-1]))
    assert last < first - 1.5
    assert tower.patch_embed.weight.shape == (VISION["embed_dim"], body_config().patch_values)


def test_what_is_saved_is_a_qwen2_vl_folder(pool, tmp_path):
    train_mllm_tokenizer(tmp_path)
    sight = {"steps": 1, "batch": 2, "lr": 1e-3, "seed": 0}
    pretrain_reader(pool, tmp_path, 1, 2, 1e-3, 0, sight, lambda line: None)
    tensors = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    side = config["vision_config"]["patch_size"]
    patches = tensors["visual.patch_embed.proj.weight"]
    assert patches.shape == (config["vision_config"]["embed_dim"], 3, 2, side, side)
    assert tensors["model.embed_tokens.weight"].shape == (SIZES["vocab_size"], SIZES["hidden_size"])
