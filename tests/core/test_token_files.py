"""Files of reference tokens: the round trip, and one clear error for each file that is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import easyref_core as er
from devkit import golden
from devkit.project import pyproject
from easyref_core.mllm.context import Provenance
from easyref_core.tokens import files
from easyref_core.tokens.files import METADATA_KEY, thumbnail_tensor

from .errors import assert_says, error_of

CAT = Provenance("checkpoint", "look", "eine Katze, 猫", 3, 336)
BLACK = dataclasses.replace(CAT, prompt="", references=1, how="black image")
CAT_FIELDS = dataclasses.asdict(CAT)


def tokens(seed: int, provenance: Provenance = CAT, rows: int = 1) -> er.ReferenceTokens:
    values = torch.randn(rows, 4, 8, generator=torch.Generator().manual_seed(seed))
    return er.ReferenceTokens.of(values, provenance)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.safetensors"
    er.save_tokens(path, tokens(0), tokens(1, BLACK), golden.references())
    return path


def saved_and_loaded(folder: Path, *pair: er.ReferenceTokens) -> files.SavedTokens:
    er.save_tokens(folder / "a.safetensors", *pair)
    return er.load_tokens(folder / "a.safetensors")


def changed(
    saved: Path, about: object = None, metadata: dict | None = None, **tensors: torch.Tensor | None
) -> Path:
    """The file written again with some of its tensors, or all or parts of its metadata, changed."""
    with safe_open(saved, framework="pt") as file:
        stored = file.metadata()
        content = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    if isinstance(about, dict):
        stored[METADATA_KEY] = json.dumps(json.loads(stored[METADATA_KEY]) | about)
    elif about is not None:
        stored[METADATA_KEY] = str(about)
    content = {name: tensor for name, tensor in (content | tensors).items() if tensor is not None}
    save_file(content, saved, stored if metadata is None else metadata)
    return saved


def load_error(path: Path) -> str:
    return error_of(lambda: er.load_tokens(path))


# The round trip


@pytest.mark.parametrize("name", ["tokens.safetensors", "猫 und Hund.safetensors", "no suffix", "tokens.png"])
def test_both_sets_are_loaded_bit_for_bit(tmp_path: Path, name: str) -> None:
    er.save_tokens(tmp_path / name, tokens(0), tokens(1, BLACK))
    loaded = er.load_tokens(tmp_path / name)
    assert torch.equal(loaded.conditional, tokens(0))
    assert torch.equal(loaded.unconditional, tokens(1))
    assert (loaded.conditional.provenance, loaded.unconditional.provenance) == (CAT, BLACK)


def test_metadata_is_json(saved: Path) -> None:
    with safe_open(saved, framework="pt") as file:
        about = json.loads(file.metadata()[METADATA_KEY])
    assert (about["version"], about["pack"]) == (1, files.VERSION)
    assert about["conditional"] == {**CAT_FIELDS, "parts": []}
    assert about["unconditional"]["how"] == "black image"


def test_version_is_the_pack_s() -> None:
    assert files.VERSION == pyproject()["project"]["version"]


def test_provenance_of_a_combination_is_loaded(tmp_path: Path) -> None:
    both = [er.combine([tokens(i, CAT), tokens(i + 1, BLACK)], "average", [1, 0.5]) for i in (0, 2)]
    assert saved_and_loaded(tmp_path, *both).conditional.provenance == both[0].provenance
    assert both[0].provenance.parts == (CAT, BLACK)


def test_a_batch_is_loaded(tmp_path: Path) -> None:
    loaded = saved_and_loaded(tmp_path, tokens(0, rows=3), tokens(1, BLACK))
    assert (len(loaded.conditional), len(loaded.unconditional)) == (3, 1)


def test_one_object_can_be_saved_as_both(tmp_path: Path) -> None:
    row = er.ReferenceTokens.of(torch.Tensor(tokens(0)).expand(2, -1, -1), CAT)
    assert torch.equal(saved_and_loaded(tmp_path, row, row).unconditional, row)


def test_thumbnails(saved: Path, tmp_path: Path) -> None:
    thumbnails = er.load_tokens(saved).thumbnails
    assert (thumbnails.shape, thumbnails.dtype) == ((3, 64, 64, 3), torch.uint8)
    assert torch.equal(thumbnails[1], thumbnail_tensor(golden.references()[1]))
    assert torch.equal(thumbnail_tensor(golden.as_tensor(golden.references()[1])), thumbnails[1])
    wide = thumbnail_tensor(Image.new("RGB", (200, 100), "white"))
    assert (wide.amax(dim=(1, 2)) > 0).sum() == 32
    assert len(saved_and_loaded(tmp_path, tokens(0), tokens(1, BLACK)).thumbnails) == 0


def test_fields_of_a_later_version_are_ignored(saved: Path) -> None:
    more = {**CAT_FIELDS, "mood": "cheerful"}
    assert er.load_tokens(changed(saved, {"conditional": more})).conditional.provenance == CAT


def test_a_loaded_file_can_be_replaced_and_removed(saved: Path) -> None:
    loaded = er.load_tokens(saved)
    er.save_tokens(saved, tokens(2), tokens(3, BLACK))
    saved.unlink()
    assert torch.equal(loaded.conditional, tokens(0))


# Files that are refused


def test_a_missing_file(tmp_path: Path) -> None:
    assert_says(error_of(lambda: er.load_tokens(tmp_path / "gone"), FileNotFoundError), "gone does not exist")


@pytest.mark.parametrize("end", [0, 5, 300, -10])
def test_a_truncated_file(saved: Path, end: int) -> None:
    saved.write_bytes(saved.read_bytes()[:end])
    assert_says(load_error(saved), str(saved), "not a complete", "save the tokens again")


def test_an_image_and_a_pickle(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    torch.save({"conditional": torch.zeros(1, 4, 8)}, tmp_path / "a.pt")
    for name in ("a.png", "a.pt"):
        assert_says(load_error(tmp_path / name), name, "of another format")


def test_another_safetensors_file() -> None:
    assert_says(load_error(golden.CHECKPOINT), "is not a file of reference tokens", "tensors such as")


def nested(times: int) -> dict:
    """Provenance of a combination of combinations."""
    about = CAT_FIELDS
    for _ in range(times):
        about = {**CAT_FIELDS, "parts": [about]}
    return about


@pytest.mark.parametrize(
    ("provenance", "fault"),
    [
        *((p, f"the provenance of the conditional tokens is {p}") for p in (None, "x", [], {})),
        ({"checkpoint": "x"}, "the provenance of the conditional tokens is {"),
        ({"parts": 1}, "the provenance of the conditional tokens is {"),
        (CAT_FIELDS | {"references": "3"}, "references of the conditional tokens is '3'"),
        (CAT_FIELDS | {"prompt": "\ud800"}, "prompt of the conditional tokens"),
        (CAT_FIELDS | {"references": -1}, "references of the conditional tokens is -1"),
        (CAT_FIELDS | {"size": "x" * 9000}, "size of the conditional tokens is 'xxx"),
        (nested(150), "were combined more than 100 times"),
    ],
)
def test_damaged_provenance(saved: Path, provenance: object, fault: str) -> None:
    text = load_error(changed(saved, {"conditional": provenance}))
    assert_says(text, "damaged file of reference tokens", fault, "Save the tokens again")
    assert len(text) < 1000


def test_a_hundred_combinations_are_loaded(saved: Path) -> None:
    loaded = er.load_tokens(changed(saved, {"conditional": nested(100)}))
    assert loaded.conditional.provenance.prompt == CAT.prompt


FEWER = "is not a file … 2 tensors such as conditional, thumbnails … conditional and unconditional"
CHANGED: list[tuple[dict[str, object], str]] = [
    *(({"about": about}, f"damaged … {about}") for about in ("not JSON", "[]", "{}", "1")),
    ({"about": {"version": 2, "pack": "9.0.0"}}, "of format 2 … '9.0.0' … reads format 1 … Update"),
    ({"metadata": {}}, "is not a file of reference tokens"),
    ({"unconditional": None}, FEWER),
    ({"unconditional": torch.zeros(4, 8)}, "(4, 8)"),
    ({"unconditional": torch.zeros(0, 4, 8)}, "(0, 4, 8)"),
    ({"unconditional": torch.zeros(1, 4, 8, dtype=torch.int64)}, "int64"),
    ({"unconditional": torch.full((1, 4, 8), torch.nan)}, "NaN"),
    (
        {"unconditional": torch.full((1, 4, 8), 1e300, dtype=torch.float64)},
        "hold values that are NaN or infinite",
    ),
    ({"unconditional": torch.zeros(1, 5, 8)}, "(1, 5, 8)"),
    ({"unconditional": torch.zeros(1, 4, 9)}, "(1, 4, 9)"),
    ({"thumbnails": torch.zeros(3, 64, 64)}, "the thumbnails are (3, 64, 64)"),
]


@pytest.mark.parametrize(("changes", "text"), CHANGED)
def test_changed_file(saved: Path, changes: dict[str, object], text: str) -> None:
    assert_says(load_error(changed(saved, **changes)), str(saved), text)


def test_tokens_that_do_not_belong_together_are_not_saved(tmp_path: Path) -> None:
    def save_error(unconditional: object, conditional: object = tokens(0), kind: type = ValueError) -> str:
        return error_of(lambda: er.save_tokens(tmp_path / "a.safetensors", conditional, unconditional), kind)

    foreign = tokens(1, dataclasses.replace(BLACK, checkpoint="another"))
    joined = er.combine([tokens(0), tokens(2)])
    assert_says(save_error(foreign), "checkpoint and another")
    assert_says(save_error(tokens(1), joined), "(1, 8, 8)", "(1, 4, 8)")
    assert_says(save_error(torch.zeros(1, 4, 8), kind=TypeError), "unconditional")
    assert list(tmp_path.iterdir()) == []


def test_tokens_of_another_checkpoint_are_refused_where_they_are_used(saved: Path, model, unet) -> None:
    loaded = er.load_tokens(saved)
    text = error_of(lambda: er.diffusers_unet.apply(unet, model, loaded.conditional, loaded.unconditional))
    assert_says(text, "another EasyRef checkpoint (checkpoint;", model.fingerprint)
