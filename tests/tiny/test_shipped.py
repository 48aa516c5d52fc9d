"""The shipped model: its files, the examples it was trained on, and its accuracy."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from devkit.hosts import ROOT
from easyref_core.mllm.preprocess import preprocess
from easyref_core.tiny.classifier import load_classifier
from easyref_core.tiny.creatures import evaluate as creatures
from easyref_core.tiny.creatures.identities import draw_identities
from easyref_core.tiny.creatures.judge import load_judge
from easyref_core.tiny.creatures.vision_pretraining import part_errors
from easyref_core.tiny.evaluate import (
    chance,
    classify_images,
    generate_images,
    render_groups,
    summary,
    tiny_methods,
)
from easyref_core.tiny.examples import ProceduralSettings, ShapeExamples, open_procedural
from easyref_core.tiny.groups import evaluation_groups
from easyref_core.tiny.images import ATTRIBUTES, NAMES, all_combinations, held_out, render
from easyref_core.tiny.qwen2_vl import IMAGE_TOKENS, body_config
from easyref_core.tiny.worlds import CREATURES, SHAPES
from easyref_core.training.config import load

WEIGHTS = SHAPES.weights
SMOKE = ROOT / "easyref_core" / "training" / "configs" / "smoke.yaml"


class MeanColours:
    """Replaces the base model, whose VAE takes most of a minute for the dataset."""

    vae = torch.nn.Identity()

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(pixels, 8)[:, [0, 1, 2, 0]]


@pytest.fixture(scope="module")
def examples() -> ShapeExamples:
    settings = ProceduralSettings(groups=True, copies=1, drop_image=0.3)
    return ShapeExamples(MeanColours(), WEIGHTS / "tiny-qwen2-vl", settings, seed=0)


def test_the_weights_are_small() -> None:
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()) <= 12_000_000


def test_a_batch_depends_on_its_positions_only(examples: ShapeExamples) -> None:
    first, again, other = examples.batch([3, 4]), examples.batch([3, 4]), examples.batch([5, 6])
    assert first.prompts == again.prompts
    assert torch.equal(first.patches, again.patches)
    assert torch.equal(first.seeds, again.seeds)
    assert not torch.equal(first.seeds, other.seeds)


def test_a_position_gives_the_same_sample_in_any_batch(examples: ShapeExamples) -> None:
    alone, batch = examples.batch([9]), examples.batch([8, 9])
    assert batch.prompts[1] == alone.prompts[0]
    assert torch.equal(batch.input_ids[1][batch.padding_mask[1]], alone.input_ids[0])
    assert torch.equal(batch.latents[1], alone.latents[0])


def test_data_loading_processes_receive_latents_and_no_vae() -> None:
    batches = []
    for workers in (0, 2):
        [settings] = load(SMOKE, [f"workers={workers}"])
        examples = open_procedural(settings)(MeanColours(), body_config())
        assert isinstance(examples.latents, torch.Tensor) == bool(workers)
        batches.append(examples.batch([0, 1]))
    assert torch.equal(batches[0].latents, batches[1].latents)
    assert pickle.loads(pickle.dumps(examples)).batch([0, 1]).prompts == batches[0].prompts


def test_patches_are_those_of_the_core(examples: ShapeExamples) -> None:
    image = Image.fromarray(examples.dataset.images[7])
    expected, expected_grid = preprocess([image], examples.config, SHAPES.size)
    patches, grid = examples.patchify([[7]])
    assert torch.equal(patches, expected)
    assert torch.equal(grid, expected_grid)
    assert int(grid.prod()) // 4 == IMAGE_TOKENS


def test_a_dropped_group_is_one_black_image(examples: ShapeExamples) -> None:
    batch = examples.batch(range(40))
    dropped = [i for i, count in enumerate(batch.references) if count == 1]
    image_tokens = (batch.input_ids == examples.tokenizer.token_to_id("<|image_pad|>")).sum(dim=1)
    assert dropped
    assert all(image_tokens[i] == IMAGE_TOKENS for i in dropped)


def test_the_classifier_is_right_about_new_images() -> None:
    rng = np.random.default_rng(99)
    combinations = all_combinations()
    attributes = combinations[rng.integers(len(combinations), size=500)]
    predicted = load_classifier()([Image.fromarray(image) for image in render(attributes, rng)])
    for name, column in zip(NAMES, attributes.T, strict=True):
        assert np.mean(np.array(ATTRIBUTES[name])[column] == predicted[name]) >= 0.97, name


def test_images_of_held_out_groups_show_the_references() -> None:
    groups = render_groups(list(evaluation_groups(77, 25)), 77)
    assert all(held_out(group.plan.target) for group in groups)
    classify = load_classifier()
    without, with_references = (
        summary(classify_images(generate_images(method, [group.task for group in groups]), groups, classify))
        for method in tiny_methods(WEIGHTS).values()
    )
    assert without["shared"].mean < chance(groups) + 0.15
    assert with_references["shared"].mean >= 0.85
    assert with_references["named"].mean >= 0.85


# The creatures


def test_the_judge_measures_new_creatures() -> None:
    groups = creatures.render_groups(draw_identities(np.random.default_rng(99), 200), 99)
    judge, targets = load_judge(), [group.target for group in groups]
    measured = torch.from_numpy(judge.images(targets))
    errors = part_errors(measured, torch.from_numpy(np.stack([group.identity for group in groups])))
    assert max(errors["outline"], errors["colours"]) < 0.1, errors
    assert errors["pattern"] < 0.4, errors
    named = judge(targets)
    for name in ("ground", "place"):
        assert np.mean([group.named[name] for group in groups] == np.array(named[name])) >= 0.97, name


def test_images_of_new_creatures_show_what_the_references_share() -> None:
    groups = creatures.render_groups(draw_identities(np.random.default_rng(77), 24), 77)
    without, with_references = (
        creatures.summary(method, groups, load_judge())
        for method in creatures.creature_methods(CREATURES.weights).values()
    )
    assert abs(without["similarity"].mean) < 0.2
    assert with_references["similarity"].mean >= 0.4
    assert with_references["named"].mean >= 0.85
