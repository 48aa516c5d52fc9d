"""Rows become samples: what is drawn, at which rates, and that a position decides all of it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from easyref_core.mllm.instructions import INSTRUCTION, load_tokenizer, tokenize
from easyref_core.mllm.preprocess import preprocess
from easyref_core.training.batches import Batch, generator
from easyref_core.training.crops import crop_frame, native_frame
from easyref_core.training.examples import Augmentation, RowExamples, choose, drops, held_out, to_tensor
from easyref_core.training.rows import Row
from easyref_core.utils.images import black_image

from . import tiny

NAMES = [f"{i}.png" for i in range(6)]
NO_DROPS = {"drop_image": 0.0, "drop_text": 0.0, "drop_both": 0.0}
STAGE_1 = Augmentation(resolution=64, size=84, **NO_DROPS)
STAGE_3 = dataclasses.replace(STAGE_1, native=True, truncation=0.4, max_length=None)


def row(**changes: Any) -> Row:
    return dataclasses.replace(Row(1, "0.png", ("0.png",), ("abc",)), **changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures of 120 x 90 pixels, each of its own colours."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, name in enumerate(NAMES):
        tiny.picture(i).resize((120, 90)).save(folder / name)
    return folder


def examples(root: Path, rules: Augmentation, *rows: Row, seed: int = 0) -> RowExamples:
    return RowExamples(rows, root, tiny.config(), load_tokenizer(tiny.MLLM), rules, seed)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def opened(root: Path, name: str) -> Image.Image:
    return Image.open(root / name).convert("RGB")


def reads(references: list[Image.Image], text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches and ids of a group, made by the core alone."""
    patches, grid = preprocess(references, tiny.config(), 84)
    counts = (grid.prod(dim=1) // 4).tolist()
    return patches, tokenize(load_tokenizer(tiny.MLLM), INSTRUCTION + text, counts)[0]


def assert_reads(sample: Any, references: list[Image.Image], text: str) -> None:
    patches, ids = reads(references, text)
    assert torch.equal(sample.patches, patches)
    assert torch.equal(sample.input_ids, ids)


def test_a_single_reference_is_cropped_like_its_target(root: Path) -> None:
    sample = examples(root, STAGE_1).sample(row(), rng())
    framed = crop_frame(opened(root, "0.png"), 64)
    assert torch.equal(sample.target, to_tensor(framed.image))
    assert_reads(sample, [framed.image], "abc")
    assert (sample.prompt, sample.original_size, sample.crop, sample.target_size) == (
        "abc",
        (90, 120),
        (0, 10),
        (64, 64),
    )


def test_in_native_aspect_nothing_is_cropped(root: Path) -> None:
    sample = examples(root, STAGE_3).sample(row(references=("1.png",)), rng())
    framed = native_frame(opened(root, "0.png"), 64)
    assert torch.equal(sample.target, to_tensor(framed.image))
    assert_reads(sample, [opened(root, "1.png")], "abc")
    # the size after the resize, as the authors'
    assert (sample.original_size, sample.crop) == (
        (64, 128),
        (0, 0),
    )


def test_the_references_of_a_group_are_not_cropped(root: Path) -> None:
    rules = dataclasses.replace(STAGE_1, max_length=None)
    sample = examples(root, rules).sample(row(references=("1.png", "2.png")), rng())
    found = [[opened(root, n) for n in order] for order in (("1.png", "2.png"), ("2.png", "1.png"))]
    assert any(torch.equal(sample.patches, reads(group, "abc")[0]) for group in found)


def test_a_face_is_the_one_reference(root: Path) -> None:
    sample = examples(root, STAGE_1).sample(row(references=(), face=(30, 20, 69, 59)), rng())
    assert len(sample.grid) == 1
    assert sample.target.shape == (3, 64, 64)
    whole = examples(root, STAGE_1).sample(row(), rng())
    assert not torch.equal(sample.patches, whole.patches)


def test_targets_are_in_minus_1_to_1() -> None:
    image = Image.new("RGB", (2, 1), (0, 255, 51))
    assert to_tensor(image)[:, 0, 0].tolist() == pytest.approx([-1, 1, -0.6])


def test_of_several_texts_one_is_drawn(root: Path) -> None:
    many = examples(root, STAGE_1)
    found = Counter(many.sample(row(texts=("a", "b")), rng(seed)).prompt for seed in range(60))
    assert found.keys() == {"a", "b"}
    assert 15 < found["a"] < 45


def test_dropped_references_are_one_black_image(root: Path) -> None:
    rules = dataclasses.replace(STAGE_3, drop_image=1.0)
    sample = examples(root, rules).sample(row(references=("1.png", "2.png")), rng())
    assert_reads(sample, [black_image()], "abc")
    assert sample.prompt == "abc"


def test_a_dropped_text_is_empty_for_both_readers(root: Path) -> None:
    sample = examples(root, dataclasses.replace(STAGE_1, drop_text=1.0)).sample(row(), rng())
    assert sample.prompt == ""
    assert_reads(sample, [crop_frame(opened(root, "0.png"), 64).image], "")


def test_both_can_be_dropped(root: Path) -> None:
    sample = examples(root, dataclasses.replace(STAGE_1, drop_both=1.0)).sample(row(), rng())
    assert sample.prompt == ""
    assert_reads(sample, [black_image()], "")


def test_drops_exclude_each_other_and_have_their_rates() -> None:
    generator, rules = rng(), Augmentation()
    found = Counter(drops(rules, generator) for _ in range(40000))
    for case in ((True, False), (False, True), (True, True)):
        assert found[case] / 40000 == pytest.approx(0.05, abs=0.005)
    assert found[False, False] / 40000 == pytest.approx(0.85, abs=0.01)


@pytest.mark.parametrize(
    ("draw", "case"),
    [
        (0.0, (True, False)),
        (0.124, (True, False)),
        (0.125, (False, True)),
        (0.374, (False, True)),
        (0.375, (True, True)),
        (0.624, (True, True)),
        (0.625, (False, False)),
    ],
)
def test_one_draw_decides_the_drops(draw: float, case: tuple[bool, bool]) -> None:
    class Fixed:
        def random(self) -> float:
            return draw

    assert drops(Augmentation(drop_image=0.125, drop_text=0.25, drop_both=0.25), Fixed()) == case


def test_references_are_shuffled() -> None:
    generator = rng()
    orders = Counter(tuple(choose("abc", 28, 0.0, generator)) for _ in range(6000))
    assert len(orders) == 6
    assert all(count == pytest.approx(1000, abs=150) for count in orders.values())


def test_there_are_at_most_max_references() -> None:
    generator = rng()
    kept = [choose(range(40), 28, 0.0, generator) for _ in range(200)]
    assert {len(set(group)) for group in kept} == {28}
    assert set().union(*kept) == set(range(40))  # which ones is random


def test_truncation_keeps_2_to_n_minus_1() -> None:
    generator = rng()
    counts = Counter(len(choose(range(6), 28, 0.4, generator)) for _ in range(20000))
    assert counts.keys() == {2, 3, 4, 5, 6}
    assert counts[6] / 20000 == pytest.approx(0.6, abs=0.015)
    for kept in (2, 3, 4, 5):
        assert counts[kept] / 20000 == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize(("references", "kept"), [(1, {1}), (2, {2}), (3, {2}), (4, {2, 3})])
def test_two_references_are_never_truncated(references: int, kept: set[int]) -> None:
    generator = rng()
    assert {len(choose(range(references), 28, 1.0, generator)) for _ in range(100)} == kept


def test_truncation_counts_what_max_references_left() -> None:
    generator = rng()
    assert {len(choose(range(40), 4, 1.0, generator)) for _ in range(100)} == {2, 3}


def test_of_a_group_each_picture_is_held_out_alike() -> None:
    group, generator = row(target=None, references=tuple(NAMES)), rng()
    drawn = [held_out(group, generator) for _ in range(6000)]
    assert all(set(references) == set(NAMES) - {target} for target, references in drawn)
    counts = Counter(target for target, _ in drawn)
    assert all(counts[name] == pytest.approx(1000, abs=150) for name in NAMES)


def test_a_row_with_a_target_holds_that_out() -> None:
    assert held_out(row(references=("1.png", "2.png")), rng()) == ("0.png", ["1.png", "2.png"])


def test_a_position_decides_all(root: Path) -> None:
    rows = [row(target=None, references=tuple(NAMES[i:])) for i in range(4)]
    rules = dataclasses.replace(STAGE_3, drop_text=0.3)
    once, again = (examples(root, rules, *rows, seed=5) for _ in range(2))
    for position in (0, 3, 11):
        batch = again.batch([position])
        assert_same(once.batch([position]), batch)
        assert_same(once.batch([position, 1]), once.batch([position, 1]))
    other = examples(root, rules, *rows, seed=6)
    assert once.batch([0]).seeds != other.batch([0]).seeds


def assert_same(one: Batch, other: Batch) -> None:
    for name, value in vars(one).items():
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
        assert same(value, getattr(other, name)), name


def test_a_sample_is_the_same_alone_and_in_a_batch(root: Path) -> None:
    rows = [row(target=name, references=(name,)) for name in NAMES]
    made = examples(root, STAGE_1, *rows)
    batch = made.batch([4, 9])
    assert torch.equal(batch.pixels[1], made.batch([9]).pixels[0])
    assert batch.seeds[1] == made.batch([9]).seeds[0]
    assert made.sample(rows[0], generator(3, 0)).prompt == "abc"


def test_an_epoch_is_every_row_once(root: Path) -> None:
    rows = [row(target=name, references=(name,), texts=(name,)) for name in NAMES]
    made = examples(root, STAGE_1, *rows)
    assert sorted(made.batch(range(6)).prompts) == NAMES
    assert len(made) == 6


def test_a_long_text_is_cut_on_the_right(root: Path) -> None:
    _, ids = reads([crop_frame(opened(root, "0.png"), 64).image], "abc" * 100)
    limit = len(ids) - 10
    rules = dataclasses.replace(STAGE_1, max_length=limit)
    sample = examples(root, rules).sample(row(texts=("abc" * 100,)), rng())
    assert torch.equal(sample.input_ids, ids[:limit])
    assert sample.prompt == "abc" * 100  # SDXL's text encoders cut it themselves


def test_a_group_too_long_for_stages_1_and_2_is_refused(root: Path) -> None:
    rules = dataclasses.replace(STAGE_1, max_length=40)
    with pytest.raises(ValueError, match="The row on line 7 has 6 references of") as error:
        examples(root, rules).sample(row(line=7, references=tuple(NAMES)), rng())
    assert "max_length 40 would cut them off. Groups are trained on in stage 3" in str(error.value)


def test_a_group_longer_than_the_mllm_is_refused(root: Path) -> None:
    short = dataclasses.replace(tiny.config(), max_positions=50)
    made = RowExamples([], root, short, load_tokenizer(tiny.MLLM), STAGE_3)
    with pytest.raises(ValueError, match=r"tokens long \([2-6] references\); the MLLM reads 42"):
        made.sample(row(references=tuple(NAMES)), rng())


def test_a_picture_that_broke_since_is_named(root: Path, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes((root / "0.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"0.png \(row on line 1\) cannot be trained on"):
        examples(tmp_path, STAGE_1).sample(row(), rng())


def test_a_reference_too_small_for_the_mllm_is_named(root: Path, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes((root / "0.png").read_bytes())
    Image.new("RGB", (5, 5)).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match="1.png is 5x5 pixels"):
        examples(tmp_path, STAGE_3).sample(row(references=("1.png",)), rng())
