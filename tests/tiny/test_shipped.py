"""The model that ships with the pack: its files, the examples it was trained on, and what it shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import easyref_core as er
from easyref_core.mllm.preprocess import preprocess
from easyref_core.tiny.classifier import load_classifier
from easyref_core.tiny.evaluate import chance, draw, judge_pictures, paint_groups, summary, tiny_methods
from easyref_core.tiny.examples import ProceduralExamples, ProceduralSettings
from easyref_core.tiny.groups import groups_to_judge
from easyref_core.tiny.images import ATTRIBUTES, NAMES, every_picture, held_out, render
from easyref_core.tiny.qwen2_vl import IMAGE_TOKENS, SIZE

WEIGHTS = Path(er.__file__).parent / "tiny" / "weights"
MLLM = WEIGHTS / "tiny-qwen2-vl"


class MeanColours:
    """In place of the base model, whose VAE takes most of a minute for the pool."""

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(pixels, 8)[:, [0, 1, 2, 0]]


@pytest.fixture(scope="module")
def examples() -> ProceduralExamples:
    settings = ProceduralSettings(groups=True, copies=1, drop_image=0.3)
    return ProceduralExamples(MeanColours(), MLLM, settings, seed=0)


def test_everything_together_is_small():
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()) <= 12_000_000


def test_batch_is_decided_by_its_positions(examples):
    first, again, other = examples.batch([3, 4]), examples.batch([3, 4]), examples.batch([5, 6])
    assert first.prompts == again.prompts
    assert torch.equal(first.patches, again.patches)
    assert torch.equal(first.seeds, again.seeds)
    assert not torch.equal(first.seeds, other.seeds)


def test_position_gives_the_same_sample_in_any_batch(examples):
    alone, among = examples.batch([9]), examples.batch([8, 9])
    assert among.prompts[1] == alone.prompts[0]
    assert torch.equal(among.input_ids[1][among.padding_mask[1]], alone.input_ids[0])
    assert torch.equal(among.latents[1], alone.latents[0])


def test_patches_and_ids_are_what_the_core_makes_of_the_pictures(examples):
    picture = Image.fromarray(examples.pool.pictures[7])
    patches, grid = preprocess([picture], examples.config, SIZE)
    found, found_grid = examples.read([[7]])
    assert torch.equal(found, patches)
    assert torch.equal(found_grid, grid)
    assert int(grid.prod()) // 4 == IMAGE_TOKENS


def test_dropped_group_is_the_authors_black_picture(examples):
    batch = examples.batch(range(40))
    dropped = [i for i, count in enumerate(batch.references) if count == 1]
    image_token = (batch.input_ids == examples.tokenizer.token_to_id("<|image_pad|>")).sum(dim=1)
    assert dropped
    assert all(image_token[i] == IMAGE_TOKENS for i in dropped)


def test_judge_reads_pictures_it_has_not_seen():
    rng = np.random.default_rng(99)
    every = every_picture()
    attributes = every[rng.integers(len(every), size=500)]
    pictures = [Image.fromarray(p) for p in render(attributes, rng)]
    seen = load_classifier(WEIGHTS / "classifier.safetensors")(pictures)
    for column, name in enumerate(NAMES):
        right = np.mean(
            [ATTRIBUTES[name][i] == s for i, s in zip(attributes[:, column], seen[name], strict=True)]
        )
        assert right >= 0.97, name


def test_references_show_in_pictures_of_held_out_groups():
    groups = draw(list(groups_to_judge(77, 50)), 77)
    assert all(held_out(group.plan.target) for group in groups)
    judge = load_classifier(WEIGHTS / "classifier.safetensors")
    without, with_references = (
        summary(judge_pictures(paint_groups(painter, groups), groups, judge))
        for painter in tiny_methods(WEIGHTS).values()
    )
    assert without["shared"].mean < chance(groups) + 0.15
    assert with_references["shared"].mean >= 0.85
    assert with_references["named"].mean >= 0.85
