"""Reference tokens as files: what comes back, and what is refused with one clear error."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import easyref_core as er
from devkit import golden
from devkit.project import pyproject
from easyref_core.mllm.context import Provenance
from easyref_core.tokens import files
from easyref_core.tokens.files import METADATA_KEY, thumbnail

from .errors import assert_says, error_of

MADE = Provenance("checkpoint", "look", "eine Katze, 猫", 3, 336)
BLACK = dataclasses.replace(MADE, prompt="", references=1, how="black image")


def tokens(seed: int, made: Provenance = MADE, rows: int = 1) -> er.ReferenceTokens:
    return er.ReferenceTokens.of(torch.randn(rows, 4, 8, generator=torch.Generator().manual_seed(seed)), made)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.safetensors"
    er.save_tokens(path, tokens(0), tokens(1, BLACK), golden.references())
    return path


def changed(
    saved: Path, about: object = None, metadata: dict | None = None, **tensors: torch.Tensor | None
) -> Path:
    """The file written again with some of its tensors, or all or parts of its metadata, changed."""
    with safe_open(saved, framework="pt") as file:
        kept, found = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    if isinstance(about, dict):
        kept[METADATA_KEY] = json.dumps(json.loads(kept[METADATA_KEY]) | about)
    elif about is not None:
        kept[METADATA_KEY] = str(about)
    found = {name: tensor for name, tensor in (found | tensors).items() if tensor is not None}
    save_file(found, saved, kept if metadata is None else metadata)
    return saved


# What comes back


def test_both_sides_come_back_bit_for_bit(saved: Path) -> None:
    found = er.load_tokens(saved)
    assert torch.equal(found.conditional, tokens(0))
    assert torch.equal(found.unconditional, tokens(1))
    assert (found.conditional.provenance, found.unconditional.provenance) == (MADE, BLACK)


def test_metadata_is_readable_by_others(saved: Path) -> None:
    with safe_open(saved, framework="pt") as file:
        about = json.loads(file.metadata()[METADATA_KEY])
    assert (about["version"], about["pack"]) == (1, files.VERSION)
    assert about["conditional"] == {**dataclasses.asdict(MADE), "parts": []}
    assert about["unconditional"]["how"] == "black image"


def test_version_is_the_pack_s() -> None:
    project = pyproject()["project"]
    assert files.VERSION == project["version"]


def test_what_was_combined_comes_back(tmp_path: Path) -> None:
    both = [er.combine([tokens(i, MADE), tokens(i + 1, BLACK)], "average", [1, 0.5]) for i in (0, 2)]
    er.save_tokens(tmp_path / "a.safetensors", *both)
    assert er.load_tokens(tmp_path / "a.safetensors").conditional.provenance == both[0].provenance
    assert both[0].provenance.parts == (MADE, BLACK)


def test_a_batch_comes_back(tmp_path: Path) -> None:
    er.save_tokens(tmp_path / "a.safetensors", tokens(0, rows=3), tokens(1, BLACK))
    found = er.load_tokens(tmp_path / "a.safetensors")
    assert (len(found.conditional), len(found.unconditional)) == (3, 1)


def test_one_object_on_both_sides_can_be_saved(tmp_path: Path) -> None:
    row = er.ReferenceTokens.of(torch.Tensor(tokens(0)).expand(2, -1, -1), MADE)
    er.save_tokens(tmp_path / "a.safetensors", row, row)
    assert torch.equal(er.load_tokens(tmp_path / "a.safetensors").unconditional, row)


def test_thumbnails(saved: Path) -> None:
    found = er.load_tokens(saved).thumbnails
    assert (found.shape, found.dtype) == ((3, 64, 64, 3), torch.uint8)
    assert torch.equal(found[1], thumbnail(golden.references()[1]))
    assert torch.equal(thumbnail(golden.as_tensor(golden.references()[1])), found[1])


def test_a_thumbnail_keeps_the_aspect() -> None:
    wide = thumbnail(Image.new("RGB", (200, 100), "white"))
    assert (wide.amax(dim=(1, 2)) > 0).sum() == 32


def test_without_references_there_are_no_thumbnails(tmp_path: Path) -> None:
    er.save_tokens(tmp_path / "a.safetensors", tokens(0), tokens(1, BLACK))
    assert len(er.load_tokens(tmp_path / "a.safetensors").thumbnails) == 0


@pytest.mark.parametrize("name", ["猫 und Hund.safetensors", "no suffix", "tokens.png"])
def test_the_name_does_not_matter(saved: Path, name: str) -> None:
    other = saved.with_name(name)
    er.save_tokens(other, tokens(0), tokens(1, BLACK))
    assert torch.equal(er.load_tokens(other).conditional, tokens(0))


def test_a_later_version_s_additions_are_left_out(saved: Path) -> None:
    more = {**dataclasses.asdict(MADE), "mood": "cheerful"}
    assert er.load_tokens(changed(saved, {"conditional": more})).conditional.provenance == MADE


# Whole or not at all


def test_a_failed_save_leaves_the_old_file_and_nothing_else(saved: Path, monkeypatch) -> None:
    before = saved.read_bytes()

    def fail(tensors: dict, path: Path, metadata: dict) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="No space"):
        er.save_tokens(saved, tokens(2), tokens(3, BLACK))
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_a_loaded_file_can_be_replaced_and_removed(saved: Path) -> None:
    found = er.load_tokens(saved)
    er.save_tokens(saved, tokens(2), tokens(3, BLACK))
    saved.unlink()
    assert torch.equal(found.conditional, tokens(0))


# What is refused


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert_says(error_of(lambda: er.load_tokens(tmp_path / "gone"), FileNotFoundError), "gone does not exist")


@pytest.mark.parametrize("kept", [0, 5, 300, -10])
def test_a_file_cut_short(saved: Path, kept: int) -> None:
    saved.write_bytes(saved.read_bytes()[:kept])
    assert_says(
        error_of(lambda: er.load_tokens(saved)), str(saved), "not a complete", "save the tokens again"
    )


def test_a_picture_and_a_pickle(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    torch.save({"conditional": torch.zeros(1, 4, 8)}, tmp_path / "a.pt")
    for name in ("a.png", "a.pt"):
        assert_says(error_of(lambda name=name: er.load_tokens(tmp_path / name)), name, "of another format")


def test_other_safetensors_files(saved: Path) -> None:
    assert_says(
        error_of(lambda: er.load_tokens(golden.CHECKPOINT)),
        "is not a file of reference tokens",
        "tensors such as",
    )
    assert_says(
        error_of(lambda: er.load_tokens(changed(saved, metadata={}))), "is not a file of reference tokens"
    )


def test_a_side_that_is_missing(saved: Path) -> None:
    error = error_of(lambda: er.load_tokens(changed(saved, unconditional=None)))
    assert_says(error, "2 tensors such as conditional, thumbnails", "conditional and unconditional")


@pytest.mark.parametrize("about", ["not JSON", "[]", "{}", "1"])
def test_damaged_metadata(saved: Path, about: str) -> None:
    assert_says(error_of(lambda: er.load_tokens(changed(saved, about))), "damaged", about)


def test_a_newer_format(saved: Path) -> None:
    error = error_of(lambda: er.load_tokens(changed(saved, {"version": 2, "pack": "9.0.0"})))
    assert_says(error, "of format 2", "'9.0.0'", "reads format 1", "Update")


@pytest.mark.parametrize(
    "made",
    [None, "x", [], {}, {"checkpoint": "x"}, {**dataclasses.asdict(MADE), "references": "3"}, {"parts": 1}],
)
def test_damaged_provenance(saved: Path, made: object) -> None:
    assert_says(
        error_of(lambda: er.load_tokens(changed(saved, {"unconditional": made}))), "damaged", "unconditional"
    )


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (torch.zeros(4, 8), "(4, 8)"),
        (torch.zeros(0, 4, 8), "(0, 4, 8)"),
        (torch.zeros(1, 4, 8, dtype=torch.int64), "int64"),
        (torch.full((1, 4, 8), float("nan")), "NaN"),
        (torch.zeros(1, 5, 8), "(1, 5, 8)"),
        (torch.zeros(1, 4, 9), "(1, 4, 9)"),
    ],
)
def test_tensors_that_are_no_tokens(saved: Path, values: torch.Tensor, found: str) -> None:
    assert_says(error_of(lambda: er.load_tokens(changed(saved, unconditional=values))), str(saved), found)


def test_thumbnails_that_are_none(saved: Path) -> None:
    error = error_of(lambda: er.load_tokens(changed(saved, thumbnails=torch.zeros(3, 64, 64))))
    assert_says(error, "the thumbnails are (3, 64, 64)")


def test_sides_that_do_not_belong_together_are_not_saved(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    foreign = tokens(1, dataclasses.replace(BLACK, checkpoint="another"))
    joined = er.combine([tokens(0), tokens(2)])
    assert_says(error_of(lambda: er.save_tokens(path, tokens(0), foreign)), "checkpoint and another")
    assert_says(error_of(lambda: er.save_tokens(path, joined, tokens(1))), "(1, 8, 8)", "(1, 4, 8)")
    assert_says(
        error_of(lambda: er.save_tokens(path, tokens(0), torch.zeros(1, 4, 8)), TypeError), "unconditional"
    )
    assert not path.exists()


def test_tokens_of_another_checkpoint_are_refused_where_they_are_used(saved: Path, model, unet) -> None:
    found = er.load_tokens(saved)
    error = error_of(lambda: er.diffusers_unet.apply(unet, model, found.conditional, found.unconditional))
    assert_says(error, "another EasyRef checkpoint (checkpoint;", model.fingerprint)


# What only somebody who breaks files on purpose writes


def deep(times: int) -> dict:
    about = dataclasses.asdict(MADE)
    for _ in range(times):
        about = {**dataclasses.asdict(MADE), "parts": [about]}
    return about


@pytest.mark.parametrize(
    ("about", "found"),
    [
        (
            {"conditional": dataclasses.asdict(MADE) | {"prompt": "\ud800"}},
            "prompt of the conditional tokens",
        ),
        (
            {"conditional": dataclasses.asdict(MADE) | {"references": -1}},
            "references of the conditional tokens is -1",
        ),
        (
            {"conditional": dataclasses.asdict(MADE) | {"size": "x" * 9000}},
            "size of the conditional tokens is 'xxx",
        ),
        ({"conditional": deep(150)}, "was combined more than 100 times"),
    ],
)
def test_metadata_that_no_node_wrote(saved: Path, about: dict, found: str) -> None:
    text = error_of(lambda: er.load_tokens(changed(saved, about)))
    assert_says(text, "damaged file of reference tokens", found, "Save the tokens again")
    assert len(text) < 1000


def test_values_that_only_float64_holds(saved: Path) -> None:
    path = changed(saved, conditional=torch.full((1, 4, 8), 1e300, dtype=torch.float64))
    assert_says(
        error_of(lambda: er.load_tokens(path)), "the conditional tokens hold values that are NaN or infinite"
    )


def test_a_hundred_combinations_are_read(saved: Path) -> None:
    assert (
        er.load_tokens(changed(saved, {"conditional": deep(100)})).conditional.provenance.prompt
        == MADE.prompt
    )
