"""The creatures: their images, groups, training examples, and what is pretrained on them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from easyref_core.mllm.tokenizer import load_tokenizer
from easyref_core.mrbench.methods.ip_adapter import load_image_encoder
from easyref_core.tiny.clip_text import token_ids
from easyref_core.tiny.creatures import recipe
from easyref_core.tiny.creatures.captions import all_captions, caption
from easyref_core.tiny.creatures.dataset import Dataset, draw_dataset
from easyref_core.tiny.creatures.descriptions import describe, described
from easyref_core.tiny.creatures.evaluate import found
from easyref_core.tiny.creatures.examples import CreatureExamples, SingleCreatures
from easyref_core.tiny.creatures.groups import SIZES, render_groups
from easyref_core.tiny.creatures.identities import NUMBERS, PARTS, VARIANCE, draw_identities, split
from easyref_core.tiny.creatures.image_encoder import CONFIG, pretrain_image_encoder
from easyref_core.tiny.creatures.images import (
    GROUNDS,
    IMAGE_SIZE,
    PLACES,
    SMALL_RADIUS,
    Scenes,
    alone,
    among_others,
    render,
)
from easyref_core.tiny.creatures.judge import CreatureJudge, train_judge
from easyref_core.tiny.creatures.qwen2_vl import BODY, IMAGE_TOKENS, pretrain_qwen2_vl
from easyref_core.tiny.creatures.vision_pretraining import REACH, label_tokens, part_errors
from easyref_core.tiny.examples import ProceduralSettings
from easyref_core.tiny.optimizer import Training
from easyref_core.tiny.tokenizer import CLIP_TOKEN_IDS, train_clip_tokenizer, train_mllm_tokenizer

VIEWS = 4


@pytest.fixture(scope="module")
def creatures() -> Dataset:
    return draw_dataset(7, 24, VIEWS)


def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def one(identity: np.ndarray, place: int = 0, ground: int = 0) -> np.ndarray:
    """One rendered creature with fixed random changes."""
    scenes = alone(identity[None], np.array([ground]), np.array([place]))
    return render(scenes, generator())[0].astype(int)


# Captions of the base


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ({0: 0.9, 10: 0.9}, "a wide grey creature with fine upright equal grey stripes"),
        (
            {0: -0.9, 3: 0.4, 4: 0.8, 5: -0.8, 6: -0.8, 10: -0.9},
            "a tall bent red creature with broad upright equal grey stripes",
        ),
        (
            {3: -0.5, 7: 0.6, 8: 0.6, 9: 0.6, 11: 0.5, 12: 0.5},
            "a curved grey creature with even rising faint white stripes",
        ),
        ({2: 0.3, 11: -1, 12: -1}, "a round grey creature with even falling bold grey stripes"),
    ],
)
def test_descriptions_name_form_colours_and_stripes(numbers: dict[int, float], expected: str) -> None:
    identity = np.zeros(NUMBERS)
    identity[list(numbers)] = list(numbers.values())
    assert described(describe(identity)) == expected


def test_captions_of_the_base_fit_its_tokenizer(creatures: Dataset, tmp_path: Path) -> None:
    """A token for each word, so that none is cut off."""
    train_clip_tokenizer(tmp_path, recipe.clip_corpus())
    rng = generator()
    captions = [recipe.draw_caption(creatures, i % len(creatures), rng) for i in range(300)]
    ends = (token_ids(tmp_path, captions) == CLIP_TOKEN_IDS["eos_token_id"]).int().argmax(dim=1)
    assert ends.tolist() == [len(text.split()) + 1 for text in captions]
    for part in ("a creature", " with ", " stripes", " on ", " at the "):
        assert {part in text for text in captions} == {True, False}


# Images


def test_each_number_of_an_identity_changes_the_image() -> None:
    for number in range(NUMBERS):
        low, high = np.zeros((2, NUMBERS), np.float32)
        low[number], high[number] = -1, 1
        low[list(range(7, 10))] = high[list(range(7, 10))] = 0.9  # two colours, so that stripes are visible
        low[number], high[number] = -1, 1
        assert np.abs(one(low) - one(high)).mean() > 0.5, number


def test_the_parts_of_an_identity_are_all_of_it() -> None:
    identities = draw_identities(generator(), 5)
    parts = split(identities)
    assert {name: part.shape[-1] for name, part in parts.items()} == PARTS
    assert np.array_equal(np.concatenate(list(parts.values()), axis=-1), identities)
    assert abs(draw_identities(generator(), 10_000).var() - VARIANCE) < 0.01


def test_a_creature_is_at_its_place_and_inside_the_image() -> None:
    identity = np.zeros(NUMBERS, np.float32)
    identity[4:] = 1  # bright
    for place, (x, y) in enumerate(PLACES.values()):
        image = one(identity, place, list(GROUNDS).index("coal"))
        rows, columns = np.nonzero(image.max(axis=-1) > 100)
        centre = np.array([columns.mean(), rows.mean()]) + 0.5 - IMAGE_SIZE / 2
        assert np.abs(centre - 11 * np.array([x, y])).max() < 4, place
        assert rows.min() > 0
        assert rows.max() < IMAGE_SIZE - 1


def test_a_creature_among_others_is_the_first_and_touches_none() -> None:
    identities = draw_identities(generator(), 200)
    scenes = among_others(identities, generator())
    assert np.array_equal(scenes.identities[:, 0], identities)
    assert set(np.count_nonzero(scenes.radii, axis=1)) == {2, 3}
    gaps = np.linalg.norm(scenes.centres[:, 0] - scenes.centres[:, 1], axis=-1)
    assert gaps.min() > 2 * SMALL_RADIUS[1]


def test_an_absent_creature_is_not_painted() -> None:
    scenes = among_others(draw_identities(generator(), 3), generator())
    nobody = dataclasses.replace(scenes, radii=np.zeros_like(scenes.radii))
    assert render(nobody, generator()).std(axis=2).max() == 0  # along a row, a ground is even


def test_images_do_not_depend_on_the_number_painted_together() -> None:
    scenes = among_others(draw_identities(generator(), 40), generator())
    both = [render(part, Middle()).astype(int) for part in (scenes, scenes[30:31])]
    assert np.abs(both[0][30] - both[1][0]).max() <= 1


class Middle:
    """A generator that draws the middle of every range."""

    def uniform(self, low: float, high: float, shape: tuple[int, ...]) -> np.ndarray:
        return np.full(shape, (low + high) / 2)


# Words and groups


def test_captions_name_ground_and_place_only() -> None:
    assert caption(1, 1, 1) == "a creature on grass at the left"
    assert caption(3, 0) == "three creatures on sand"
    assert caption(1, None, 0) == "a creature at the centre"
    assert len(set(all_captions())) == 3 * 7 * 6


def test_every_caption_fits_into_the_text_encoders(tmp_path: Path) -> None:
    from easyref_core.tiny.clip_text import token_ids
    from easyref_core.tiny.tokenizer import PROMPT_TOKENS, train_clip_tokenizer

    train_clip_tokenizer(tmp_path, recipe.corpus())
    ids = token_ids(tmp_path, list(all_captions()))
    assert ids.shape[1] == PROMPT_TOKENS
    assert (ids[:, -1] == 1).all()  # padding or the end: nothing was truncated
    assert len(ids.unique(dim=0)) == len(ids)


def test_groups_are_reproducible_and_have_all_sizes() -> None:
    identities = draw_identities(generator(), 8)
    groups = render_groups(identities, seed=1)
    assert [len(group.references) for group in groups] == [*SIZES, *SIZES]
    again = render_groups(identities[:3], seed=1)
    assert all(np.array_equal(a.target, b.target) for a, b in zip(again, groups, strict=False))
    ground, place = groups[0].named["ground"], groups[0].named["place"]
    assert groups[0].prompt == f"a creature on {ground} at the {place}"


@pytest.mark.parametrize("seed", [0, 7])
def test_an_identity_is_found_if_none_of_others_is_nearer(seed: int) -> None:
    """Also if it was drawn with the same seed as the others."""
    wanted = draw_identities(np.random.default_rng(seed), 8)
    assert found(wanted, wanted, seed).tolist() == [1] * 8
    assert found(np.roll(wanted, 1, axis=0), wanted, seed).sum() < 2


# Training examples


class MeanColours:
    """Replaces the base model, whose VAE is slow."""

    vae = torch.nn.Identity()

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(pixels, 8)


@pytest.fixture(scope="module")
def examples(creatures: Dataset, tmp_path_factory: pytest.TempPathFactory) -> CreatureExamples:
    folder = tmp_path_factory.mktemp("mllm")
    train_mllm_tokenizer(folder, recipe.corpus())
    settings = ProceduralSettings(groups=True, world="creatures", drop_image=0.2)
    return CreatureExamples(creatures, MeanColours(), folder, settings, seed=0)


def test_a_group_shows_its_target_among_others(creatures: Dataset, examples: CreatureExamples) -> None:
    sizes = set()
    for seed in range(50):
        target, references, prompt = examples.draw_group(np.random.default_rng(seed))
        views = np.array(references) - len(creatures)
        assert (views // VIEWS == target).all()
        assert len(set(references)) == len(references)
        assert np.array_equal(examples.images[references[0]], creatures.views[target, views[0] % VIEWS])
        assert prompt.startswith("a creature")
        sizes.add(len(references))
    assert sizes == {2, 3, 4}


def test_a_batch_is_one_of_the_core(examples: CreatureExamples) -> None:
    batch = examples.batch([3, 4, 5, 6])
    assert torch.equal(batch.patches, examples.batch([3, 4, 5, 6]).patches)
    assert batch.grid.prod(dim=1).sum() == len(batch.patches)
    assert len(batch.grid) == sum(batch.references)
    assert batch.patches.shape[1] == BODY.patch_values


def test_a_single_image_is_its_own_reference(creatures: Dataset, examples: CreatureExamples) -> None:
    target, references, _ = examples.draw_single(generator())
    assert references == [target]
    assert np.array_equal(examples.images[target], creatures.targets[target])


def test_an_unknown_world_is_refused() -> None:
    with pytest.raises(ValueError, match="world is 'dogs'; wanted one of shapes, creatures"):
        ProceduralSettings(groups=True, world="dogs")


def test_the_ip_adapter_gets_images_with_their_captions(creatures: Dataset) -> None:
    batch = SingleCreatures(MeanColours(), creatures, seed=0).batch([0, 1])
    assert batch.pixels.shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert all(prompt.startswith("a creature") for prompt in batch.prompts)


# Pretraining


def test_tokens_are_labelled_with_the_creature_they_are_on() -> None:
    identities = draw_identities(generator(), 1, 2)
    scenes = Scenes(
        identities=identities,
        centres=np.array([[[24.0, 24.0], [40.0, 24.0]]]),
        radii=np.array([[10.0, 0.0]]),
        turns=np.zeros((1, 2)),
        grounds=np.array([0]),
    )
    on, labels = label_tokens(scenes, 4)
    assert np.flatnonzero(on[0]).tolist() == [5]  # row 1, column 1: its centre is the creature's
    assert np.array_equal(labels[0, 5], identities[0, 0])
    assert 0 < REACH < 1


def test_an_error_of_one_knows_nothing() -> None:
    identities = torch.from_numpy(draw_identities(generator(), 20_000))
    assert all(abs(e - 1) < 0.05 for e in part_errors(torch.zeros_like(identities), identities).values())
    assert set(part_errors(identities, identities).values()) == {0.0}


@pytest.mark.thorough
def test_the_mllm_learns_and_is_a_qwen2_vl_folder(creatures: Dataset, tmp_path: Path) -> None:
    train_mllm_tokenizer(tmp_path, recipe.corpus())
    lines: list[str] = []
    training = Training(steps=2, batch=2, lr=1e-3, seed=0)
    vision = Training(steps=60, batch=32, lr=3e-3, seed=0)
    pretrain_qwen2_vl(creatures, tmp_path, training, vision, lines.append)
    first, *_, last = (float(line.split("colours ")[1].split(",")[0]) for line in lines if "tower" in line)
    assert last < first
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].shape == (BODY.vocab_size, BODY.hidden_size)
    assert load_tokenizer(tmp_path).token_to_id("<|image_pad|>") is not None
    assert IMAGE_TOKENS == 16


def test_the_image_encoder_loads_as_one_of_an_ip_adapter(creatures: Dataset, tmp_path: Path) -> None:
    training = Training(steps=2, batch=4, lr=1e-3, seed=0)
    pretrain_image_encoder(creatures, tmp_path, training, lambda line: None)
    assert load_image_encoder(tmp_path).config.projection_dim == CONFIG["projection_dim"]


@pytest.mark.thorough
def test_the_judge_learns_and_names_ground_and_place(tmp_path: Path) -> None:
    file = tmp_path / "judge.safetensors"
    training = Training(steps=40, batch=32, lr=3e-3, seed=0)
    errors = train_judge(file, training, lambda images: images, lambda line: None)
    assert errors["ground"] > 0.5  # chance is 1 in 6; identities take longer
    assert set(errors) == {"outline", "colours", "pattern", "ground", "place"}
    judge = CreatureJudge(file)
    images = [Image.fromarray(one(draw_identities(generator(), 1)[0]).astype(np.uint8))] * 2
    assert judge.images(images).shape == (2, NUMBERS)
    assert set(judge(images)) == {"ground", "place"}
