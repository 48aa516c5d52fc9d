"""Precomputed parts: the same samples and losses as without them, and refused where they would differ."""

from __future__ import annotations

import dataclasses
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from easyref_core.mllm.group_encoder import GroupEncoder
from easyref_core.training import __main__ as command
from easyref_core.training.base_model import BaseModel
from easyref_core.training.config import Data, Samples, Settings
from easyref_core.training.examples import Augmentation, open_rows
from easyref_core.training.loop import make_accelerator, train
from easyref_core.training.precompute import precompute
from easyref_core.training.run import Run
from easyref_core.training.run_log import read_metrics
from easyref_core.training.shards import Shards, ShardWriter

from . import tiny
from .tiny import MakeSettings

RULES = Augmentation(resolution=64, size=84, drop_image=0.2, drop_text=0.2, drop_both=0.2, max_length=None)
SINGLES = [
    {"target": "0.png", "image_file": "0.png", "text": ["abc", "de"]},
    {"target": "1.png", "image_file": "2.png", "text": "f"},
    {"target": "2.png", "image_file": "2.png", "text": ""},
]
GROUPS = [
    {"target": "0.png", "image_file": ["1.png", "2.png", "3.png"], "text": "abc"},
    {"images": ["0.png", "1.png", "2.png"], "text": ["abc", "de"]},
    {"target": "3.png", "face": [[10, 10, 60, 60]], "text": "f"},
]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        tiny.random_image(number, side=80 + 16 * number).resize((120, 90)).save(folder / f"{number}.png")
    return folder


def make(settings: MakeSettings, images: Path, rows: list[dict], **changes: Any) -> Settings:
    """Settings of a run on rows."""
    file = images.parent / "rows.json"
    file.write_text(json.dumps(rows))
    data = Data(rows=file, root=images, augmentation=RULES)
    defaults = {"data": data, "batch_size": 1, "updates": 12, "learning_rate": 1e-2}
    return settings(**defaults | changes)


def stored(run: Settings, *parts: str) -> Settings:
    """The same settings with precomputed parts, which are computed."""
    folder = run.output / "precomputed"
    run = dataclasses.replace(run, precomputed=folder, output=run.output / "stored")
    precompute(run, make_accelerator(1), parts or None)
    return run


def losses(run: Settings) -> list[float]:
    train(run)
    return [row["loss"] for row in read_metrics(run.output / "metrics.csv")]


def test_losses_and_weights_are_the_same_bit_for_bit(
    settings: MakeSettings, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At batch size 1, because the frozen models run on one sample at a time; no frozen model runs."""
    plain = make(settings, images, SINGLES)
    precomputed = stored(plain)
    assert set(path.name.split("-")[0] for path in precomputed.precomputed.glob("*.safetensors")) == {
        "latents",
        "texts",
        "contexts",
    }
    expected = losses(plain)
    for owner, name in ((BaseModel, "encode_text"), (BaseModel, "latent_moments"), (GroupEncoder, "forward")):
        monkeypatch.setattr(owner, name, None)
    for file in images.iterdir():  # nor is an image read
        file.write_bytes(b"\0" * file.stat().st_size)
    actual = losses(precomputed)
    assert actual == expected
    assert len(set(actual)) == 12
    first, second = load_file(plain.result), load_file(precomputed.result)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_padded_batches_have_nearly_the_same_losses(settings: MakeSettings, images: Path) -> None:
    plain = make(settings, images, SINGLES, batch_size=3, updates=3, learning_rate=1e-4)
    assert losses(stored(plain)) == pytest.approx(losses(plain), rel=1e-5)


def test_groups_and_faces_use_latents_and_texts_bit_for_bit(settings: MakeSettings, images: Path) -> None:
    rules = dataclasses.replace(RULES, truncation=0.4)
    data = Data(rows=images.parent / "rows.json", root=images, augmentation=rules)
    plain = make(settings, images, GROUPS, **tiny.GOLDEN_START, data=data, learning_rate=1e-4)
    precomputed = stored(plain)
    assert not list(precomputed.precomputed.glob("contexts-*"))
    assert losses(precomputed) == losses(plain)


def test_replaced_models_leave_the_device(settings: MakeSettings, images: Path) -> None:
    """The meta device stands in for the card: a model there could not have computed its part."""
    run = stored(make(settings, images, SINGLES))
    base = BaseModel.load(run.base, "meta", parked=("vae", "text_encoder"))
    places = {name: next(getattr(base, name).parameters()).device.type for name in BaseModel.MODELS}
    assert places == {"unet": "meta", "vae": "cpu", "text_encoder": "cpu", "text_encoder_2": "meta"}
    actual = Run(run, make_accelerator(1))
    assert actual.base.parked == ("vae", "text_encoder", "text_encoder_2")
    actual.close()


def test_sample_sheets_are_generated(settings: MakeSettings, images: Path) -> None:
    samples = Samples(every=1, count=1, steps=1)
    run = stored(make(settings, images, SINGLES, updates=1, samples=samples))
    train(run)
    assert (run.output / "samples" / "0000001.png").is_file()


def test_rows_that_cannot_be_used_are_skipped_as_without(settings: MakeSettings, images: Path) -> None:
    (images / "3.png").write_bytes(b"no image")
    broken = {"target": "3.png", "image_file": "3.png", "text": "a"}
    plain = make(settings, images, [*SINGLES, broken])
    assert losses(stored(plain)) == losses(plain)


def test_interrupted_run_continues(
    settings: MakeSettings, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(settings, images, SINGLES)
    encode, calls = BaseModel.encode_text, []

    def dies(base: BaseModel, prompts: list[str]) -> Any:
        calls.append(prompts)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(base, prompts)

    monkeypatch.setattr(BaseModel, "encode_text", dies)
    with pytest.raises(KeyboardInterrupt):
        stored(run)
    monkeypatch.setattr(BaseModel, "latent_moments", None)  # the latents are stored already
    folder = stored(run).precomputed
    assert len(Shards(folder, "texts")) == 4
    assert json.loads((folder / "precomputed.json").read_text())["parts"].keys() == {
        "latents",
        "texts",
        "contexts",
    }


def test_new_rows_are_named_and_added(settings: MakeSettings, images: Path) -> None:
    stored(make(settings, images, SINGLES))
    new = {"target": "3.png", "image_file": "3.png", "text": "ghi"}
    run = make(settings, images, [*SINGLES, new], precomputed=images.parent / "precomputed")
    with pytest.raises(ValueError, match=r"lacks \d \w+ of the rows.*Run precompute again with this YAML"):
        open_rows(run)
    precompute(run, make_accelerator(1))
    open_rows(run)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([GROUPS[0]], "line 1: its references are shuffled at random"),
        ([GROUPS[1]], "line 1: its references are shuffled at random"),
        ([SINGLES[0], GROUPS[2]], "line 1: its face is cropped at random"),
    ],
)
def test_contexts_that_change_in_each_epoch_are_refused(
    settings: MakeSettings, images: Path, rows: list[dict], reason: str
) -> None:
    run = make(settings, images, rows)
    with pytest.raises(ValueError, match=f"{reason} in each epoch.* --parts latents,texts"):
        stored(run)
    with pytest.raises(ValueError, match="Stage 'multi_reference' .*expected a stage that freezes"):
        stored(make(settings, images, SINGLES, **tiny.GOLDEN_START), "contexts")
    with pytest.raises(ValueError, match="'vae' cannot be precomputed, expected some of latents, texts"):
        stored(run, "vae")


def test_other_models_and_settings_are_refused(
    settings: MakeSettings, images: Path, base_folder: Path
) -> None:
    run = stored(make(settings, images, SINGLES))
    rules = dataclasses.replace(RULES, resolution=72)
    other = dataclasses.replace(run, data=dataclasses.replace(run.data, augmentation=rules))
    with pytest.raises(ValueError, match=r"latents in .* something else \(resolution was 64 and is 72\)"):
        Run(other, make_accelerator(1))
    with pytest.raises(FileNotFoundError, match=r"has no precomputed.json. Run python -m .* precompute"):
        open_rows(dataclasses.replace(run, precomputed=images))
    with pytest.raises(ValueError, match="precomputed is set beside cache, expected one of them"):
        dataclasses.replace(run, cache=images)
    with pytest.raises(ValueError, match="precomputed is set beside data.procedural"):
        settings(precomputed=images)
    (run.precomputed / "precomputed.json").unlink()
    with pytest.raises(ValueError, match="has shards without a precomputed.json. Choose an empty folder"):
        precompute(run, make_accelerator(1))


def test_command(settings: MakeSettings, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(settings, images, SINGLES)
    file = images.parent / "run.yaml"
    file.write_text(
        f"stage: alignment\nbase: {run.base}\nmllm: {run.mllm}\noutput: {run.output}\nupdates: 1\n"
        f"num_tokens: {tiny.TOKENS}\nprecomputed: {images.parent}/stored\nlearning_rate: 1.0\n"
        f"batch_size: 1\ndata: {{rows: {run.data.rows}, root: {images}, augmentation: {{resolution: 64}}}}\n"
    )
    monkeypatch.setattr(sys, "argv", ["training", "precompute", str(file), "--parts", "texts"])
    command.main()
    assert [path.name for path in (images.parent / "stored").glob("*.safetensors")] == [
        "texts-00000.safetensors"
    ]
    monkeypatch.setattr(sys, "argv", ["training", "precompute", str(file), "precomputed=null"])
    with pytest.raises(SystemExit, match="precomputed is not set. Set it to the folder to write to"):
        command.main()


def test_shards_are_split_by_size_and_survive_pickling(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "latents", max_bytes=100)
    for number in range(5):
        writer.add(f"k{number}", {"a": torch.full((15,), float(number)), "b": torch.tensor([number])})
    writer.flush()
    assert len(list(tmp_path.iterdir())) == 3
    shards = pickle.loads(pickle.dumps(Shards(tmp_path, "latents")))
    assert len(shards) == 5
    assert "k5" not in shards
    assert all(shards[f"k{n}"]["a"].eq(n).all() and shards[f"k{n}"]["b"].item() == n for n in range(5))
