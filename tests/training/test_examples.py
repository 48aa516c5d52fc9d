"""Rows become samples: random choices, their rates, and determinism by position."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from easyref_core.mllm.instructions import INSTRUCTION, tokenize
from easyref_core.mllm.preprocess import preprocess
from easyref_core.mllm.tokenizer import load_tokenizer
from easyref_core.training.batches import Batch, Sample, generator, row_at
from easyref_core.training.crops import center_crop, native_resize
from easyref_core.training.examples import Augmentation, RowExamples, choose, drops, held_out, to_tensor
from easyref_core.training.rows import Row
from easyref_core.utils.images import black_image

from . import tiny

NAMES = [f"{i}.png" for i in range(6)]
STAGE_1 = Augmentation(resolution=64, size=84, drop_image=0.0, drop_text=0.0, drop_both=0.0)
STAGE_3 = dataclasses.replace(STAGE_1, native=True, truncation=0.4, max_length=None)


def row(**changes: Any) -> Row:
    return dataclasses.replace(Row(1, "0.png", ("0.png",), ("abc",)), **changes)


def group(*names: str, **changes: Any) -> Row:
    return row(references=names, **changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of 120 x 90 pixels in different colours, and a tall one."""
    folder = tmp_path_factory.mktemp("images")
    for i, name in enumerate(NAMES):
        tiny.random_image(i).resize((120, 90)).save(folder / name)
    tiny.random_image(6).resize((60, 150)).save(folder / "tall.png")
    return folder


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def examples(root: Path, rules: Augmentation, *rows: Row, seed: int = 0) -> RowExamples:
    return RowExamples(rows, root, tiny.config(), load_tokenizer(tiny.MLLM), rules, seed)


def draw(root: Path, rules: Augmentation, row: Row, seed: int = 0, **changes: Any) -> Sample:
    return examples(root, dataclasses.replace(rules, **changes)).sample(row, rng(seed))


def image(root: Path, name: str) -> Image.Image:
    return Image.open(root / name).convert("RGB")


def mllm_inputs(references: list[Image.Image], text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches and ids of a group from the core alone."""
    patches, grid = preprocess(references, tiny.config(), 84)
    counts = (grid.prod(dim=1) // 4).tolist()
    return patches, tokenize(load_tokenizer(tiny.MLLM), INSTRUCTION + text, counts)[0]


def assert_mllm_inputs(sample: Sample, references: list[Image.Image], text: str) -> None:
    patches, ids = mllm_inputs(references, text)
    assert torch.equal(sample.patches, patches)
    assert torch.equal(sample.input_ids, ids)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("apply_exif", [True, False])
def test_images_are_upright_unless_exif_is_ignored(
    root: Path, tmp_path: Path, apply_exif: bool, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image(root, "1.png").save(tmp_path / "0.png", exif=exif)
    turned = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}
    expected = image(root, "1.png")
    if apply_exif and orientation != 1:
        expected = expected.transpose(turned[orientation])
    options = {"augmentation": STAGE_1, "apply_exif": apply_exif}
    data = RowExamples([row()], tmp_path, tiny.config(), load_tokenizer(tiny.MLLM), **options)
    actual = data.load("0.png")
    assert (actual.size, actual.tobytes()) == (expected.size, expected.tobytes())
    assert torch.equal(data.sample(row(), rng()).target, to_tensor(center_crop(expected, 64).image))


@pytest.mark.parametrize("reference", ["0.png", "tall.png"])
def test_target_and_single_reference_are_center_cropped(root: Path, reference: str) -> None:
    """Cropping at the target's corner, as the authors do, would add black bars for another aspect."""
    sample = draw(root, STAGE_1, group(reference))
    assert torch.equal(sample.target, to_tensor(center_crop(image(root, "0.png"), 64).image))
    assert_mllm_inputs(sample, [center_crop(image(root, reference), 64).image], "abc")
    assert sample.prompt == "abc"
    assert (sample.original_size, sample.crop, sample.target_size) == ((90, 120), (0, 10), (64, 64))


def test_native_aspect_crops_nothing(root: Path) -> None:
    sample = draw(root, STAGE_3, group("1.png"))
    assert torch.equal(sample.target, to_tensor(native_resize(image(root, "0.png"), 64).image))
    assert_mllm_inputs(sample, [image(root, "1.png")], "abc")
    # the size after the resize, as in the authors' code
    assert (sample.original_size, sample.crop) == ((64, 128), (0, 0))


def test_references_of_a_group_are_not_cropped(root: Path) -> None:
    sample = draw(root, STAGE_1, group("1.png", "2.png"), max_length=None)
    orders = [[image(root, n) for n in order] for order in (("1.png", "2.png"), ("2.png", "1.png"))]
    assert any(torch.equal(sample.patches, mllm_inputs(order, "abc")[0]) for order in orders)


def test_face_is_the_only_reference(root: Path) -> None:
    sample = draw(root, STAGE_1, row(references=(), face=(30, 20, 69, 59)))
    assert len(sample.grid) == 1
    assert sample.target.shape == (3, 64, 64)
    assert not torch.equal(sample.patches, draw(root, STAGE_1, row()).patches)


def test_targets_are_in_minus_1_to_1() -> None:
    image = Image.new("RGB", (2, 1), (0, 255, 51))
    assert to_tensor(image)[:, 0, 0].tolist() == pytest.approx([-1, 1, -0.6])


def test_one_of_several_texts_is_drawn(root: Path) -> None:
    actual = Counter(draw(root, STAGE_1, row(texts=("a", "b")), seed).prompt for seed in range(60))
    assert actual.keys() == {"a", "b"}
    assert 15 < actual["a"] < 45


@pytest.mark.parametrize("case", ["image", "text", "both"])
def test_drops_replace_references_by_a_black_image_and_texts_by_an_empty_one(root: Path, case: str) -> None:
    sample = draw(root, STAGE_1, row(), **{f"drop_{case}": 1.0})
    prompt = "abc" if case == "image" else ""
    reference = center_crop(image(root, "0.png"), 64).image if case == "text" else black_image()
    assert sample.prompt == prompt
    assert_mllm_inputs(sample, [reference], prompt)


def test_dropped_group_is_one_black_image(root: Path) -> None:
    sample = draw(root, STAGE_3, group("1.png", "2.png"), drop_image=1.0)
    assert_mllm_inputs(sample, [black_image()], "abc")


def test_drops_exclude_each_other_and_have_their_rates() -> None:
    generator, rules = rng(), Augmentation()
    actual = Counter(drops(rules, generator) for _ in range(40000))
    for case in ((True, False), (False, True), (True, True)):
        assert actual[case] / 40000 == pytest.approx(0.05, abs=0.005)
    assert actual[False, False] / 40000 == pytest.approx(0.85, abs=0.01)


@pytest.mark.parametrize(
    ("interval", "case"),
    [
        ((0.0, 0.124), (True, False)),
        ((0.125, 0.374), (False, True)),
        ((0.375, 0.624), (True, True)),
        ((0.625, 0.999), (False, False)),
    ],
)
def test_one_draw_decides_the_drops(interval: tuple[float, float], case: tuple[bool, bool]) -> None:
    rules = Augmentation(drop_image=0.125, drop_text=0.25, drop_both=0.25)
    draws = iter(interval)
    rng = SimpleNamespace(random=lambda: next(draws))
    assert {drops(rules, rng) for _ in interval} == {case}


def test_references_are_shuffled() -> None:
    generator = rng()
    orders = Counter(tuple(choose("abc", 28, 0.0, generator)) for _ in range(6000))
    assert len(orders) == 6
    assert all(count == pytest.approx(1000, abs=150) for count in orders.values())


def test_max_references_limits_a_random_choice() -> None:
    generator = rng()
    groups = [choose(range(40), 28, 0.0, generator) for _ in range(200)]
    assert {len(set(group)) for group in groups} == {28}
    assert set().union(*groups) == set(range(40))


def test_truncation_leaves_2_to_n_minus_1() -> None:
    generator = rng()
    counts = Counter(len(choose(range(6), 28, 0.4, generator)) for _ in range(20000))
    assert counts.keys() == {2, 3, 4, 5, 6}
    assert counts[6] / 20000 == pytest.approx(0.6, abs=0.015)
    for length in (2, 3, 4, 5):
        assert counts[length] / 20000 == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize(
    ("references", "most", "lengths"),
    [(1, 28, {1}), (2, 28, {2}), (3, 28, {2}), (4, 28, {2, 3}), (40, 4, {2, 3})],
)
def test_truncation_applies_after_max_references_and_never_to_two(
    references: int, most: int, lengths: set[int]
) -> None:
    generator = rng()
    assert {len(choose(range(references), most, 1.0, generator)) for _ in range(100)} == lengths


def test_images_of_a_group_are_held_out_uniformly() -> None:
    images, generator = group(*NAMES, target=None), rng()
    drawn = [held_out(images, generator) for _ in range(6000)]
    assert all(set(references) == set(NAMES) - {target} for target, references in drawn)
    counts = Counter(target for target, _ in drawn)
    assert all(counts[name] == pytest.approx(1000, abs=150) for name in NAMES)
    assert held_out(group("1.png", "2.png"), rng()) == ("0.png", ["1.png", "2.png"])


def test_position_decides_the_sample(root: Path) -> None:
    rows = [group(*NAMES[i:], target=None) for i in range(4)]
    rules = dataclasses.replace(STAGE_3, drop_text=0.3)
    first, second, other = (examples(root, rules, *rows, seed=seed) for seed in (5, 5, 6))
    for position in (0, 3, 11):
        assert_same(first.batch([position]), second.batch([position]))
        assert_same(first.batch([position, 1]), first.batch([position, 1]))
    assert first.batch([0]).seeds != other.batch([0]).seeds


def assert_same(one: Batch, other: Batch) -> None:
    for name, value in vars(one).items():
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
        assert same(value, getattr(other, name)), name


def test_epoch_has_every_row_once_and_samples_do_not_depend_on_their_batch(root: Path) -> None:
    rows = [group(name, target=name, texts=(name,)) for name in NAMES]
    data = examples(root, STAGE_1, *rows)
    batch = data.batch(range(6))
    assert len(data) == 6
    assert sorted(batch.prompts) == NAMES
    assert torch.equal(batch.pixels[4], data.batch([4]).pixels[0])
    assert batch.seeds[4] == data.batch([4]).seeds[0]
    assert data.sample(rows[0], generator(3, 0)).prompt == NAMES[0]


def test_long_text_is_truncated_on_the_right(root: Path) -> None:
    text = "abc" * 100
    _, ids = mllm_inputs([center_crop(image(root, "0.png"), 64).image], text)
    sample = draw(root, STAGE_1, row(texts=(text,)), max_length=len(ids) - 10)
    assert torch.equal(sample.input_ids, ids[:-10])
    assert sample.prompt == text  # SDXL's text encoders truncate it themselves


def test_group_too_long_for_stages_1_and_2_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="line 7: 6 references have") as error:
        draw(root, STAGE_1, group(*NAMES, line=7), max_length=40)
    assert "max_length 40 would truncate them. Train on groups in stage 3" in str(error.value)


def test_group_too_long_for_the_mllm_is_refused(root: Path) -> None:
    short = dataclasses.replace(tiny.config(), max_positions=50)
    data = RowExamples([], root, short, load_tokenizer(tiny.MLLM), STAGE_3)
    with pytest.raises(
        ValueError, match=r"tokens long \([2-6] references\), but the MLLM accepts at most 42"
    ):
        data.sample(group(*NAMES), rng())


@pytest.fixture
def broken_root(root: Path, tmp_path: Path) -> Path:
    """The images, of which 2.png cannot be decoded and 3.png is missing."""
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    (tmp_path / "2.png").write_bytes(b"broken")
    (tmp_path / "3.png").unlink()
    return tmp_path


def test_broken_rows_are_replaced_by_the_next_usable_one(root: Path, broken_root: Path) -> None:
    rows = [group(name, target=name, texts=(name,), line=i) for i, name in enumerate(NAMES)]
    rules = dataclasses.replace(STAGE_1, drop_text=0.0)
    whole, data = examples(root, rules, *rows), examples(broken_root, rules, *rows)
    order = [row_at(position, len(rows), 0) for position in range(12)]
    for position, index in enumerate(order[:6]):
        actual = data.batch([position])
        used = next(i for i in order[position:] if i not in (2, 3))
        assert actual.prompts == (NAMES[used],)
        skipped = [i for i in order[position : order.index(used, position)]]
        assert [reason.split(":")[0] for reason in actual.broken] == [f"line {i}" for i in skipped]
        if index == used:
            assert_same(actual, whole.batch([position]))
        # the sample depends on the position alone, not on the batch that it is in
        together = data.batch([position, 7])
        assert torch.equal(together.pixels[0], actual.pixels[0])
        assert together.seeds[0] == actual.seeds[0]


def test_data_that_cannot_be_read_at_all_stop_the_run(tmp_path: Path) -> None:
    message = "^2 rows after another cannot be used, first line 1: 0.png cannot be read .*Check that the"
    with pytest.raises(ValueError, match=message):
        examples(tmp_path, STAGE_1, row(), row()).batch([0])


def test_unusable_images_are_named(root: Path, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes((root / "0.png").read_bytes())
    (tmp_path / "cut.png").write_bytes((root / "0.png").read_bytes()[:60])
    Image.new("RGB", (5, 5)).save(tmp_path / "small.png")
    with pytest.raises(ValueError, match="line 1: cut.png cannot be read as an image"):
        draw(tmp_path, STAGE_1, row(target="cut.png"))
    with pytest.raises(ValueError, match="small.png is 5x5 pixels"):
        draw(tmp_path, STAGE_3, group("small.png"))
