"""Validation loss: fixed rows, noise and timesteps, and a training that it does not touch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from easyref_core.training.config import Data, Validation
from easyref_core.training.examples import Augmentation
from easyref_core.training.loop import make_accelerator, train
from easyref_core.training.objective import denoising_loss
from easyref_core.training.run import Run, randomness
from easyref_core.training.run_log import read_metrics
from easyref_core.training.validation import validate, validation_settings

from . import tiny
from .tiny import MakeSettings, TinyExamples

TIMESTEPS = (10, 900)


def test_loss_is_the_mean_over_rows_at_each_timestep(settings: MakeSettings, examples: TinyExamples) -> None:
    run = Run(settings(validation=Validation(count=3, timesteps=TIMESTEPS)), make_accelerator(1), examples)
    values = validate(run, examples)
    for timestep in TIMESTEPS:
        losses = []
        for position in range(3):
            batch = examples.batch([position])
            _, noise, draw = randomness(batch, run.base)
            mean, deviation = run.base.latent_moments(batch.pixels)
            steps, text = torch.tensor([timestep]), run.base.encode_text(batch.prompts)
            with torch.no_grad():
                loss = denoising_loss(
                    run.base.schedule,
                    mean + deviation * draw,
                    noise,
                    steps,
                    lambda noisy, batch=batch, steps=steps, text=text: run.model(noisy, steps, text, batch),
                )
            losses.append(loss.item())
        assert values[f"validation_loss_{timestep}"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    each = [values[f"validation_loss_{timestep}"] for timestep in TIMESTEPS]
    assert values["validation_loss"] == pytest.approx(sum(each) / 2)
    assert validate(run, examples) == values


def test_rows_are_the_held_out_ones_without_drops(settings: MakeSettings, tmp_path: Path) -> None:
    rates = {"truncation": 0.4, "drop_image": 0.2}
    data = Data(rows=tmp_path / "a", root=tmp_path, augmentation=Augmentation(resolution=64, **rates))
    validation = Validation(every=1, rows=tmp_path / "b")
    actual = validation_settings(settings(data=data, validation=validation, seed=5)).data
    undropped = {"truncation": 0, "drop_image": 0, "drop_text": 0, "drop_both": 0}
    assert actual == Data(
        rows=tmp_path / "b", root=tmp_path, augmentation=Augmentation(resolution=64, **undropped)
    )
    data = Data(procedural={"groups": True, "truncation": 0.4})
    actual = validation_settings(settings(data=data, validation=validation, seed=5))
    assert actual.data.procedural == {"groups": True} | undropped
    assert actual.seed == validation_settings(settings(validation=validation, seed=6)).seed not in (5, 6)


def test_training_logs_it_and_ends_in_the_same_weights(settings: MakeSettings, tmp_path: Path) -> None:
    for name, numbers in (("rows", range(3)), ("held_out", range(3, 5))):
        lines = []
        for number in numbers:
            tiny.random_image(number).save(tmp_path / f"{number}.png")
            lines.append(f'{{"target": "{number}.png", "image_file": "{number}.png", "text": "a"}}\n')
        (tmp_path / f"{name}.json").write_text("".join(lines))
    augmentation = Augmentation(resolution=64, size=tiny.REFERENCE)
    data = Data(rows=tmp_path / "rows.json", root=tmp_path, augmentation=augmentation)
    validation = Validation(every=2, rows=tmp_path / "held_out.json", timesteps=TIMESTEPS)
    plain, validated = (
        settings(output=tmp_path / name, data=data, updates=3, learning_rate=1e-2, **changes)
        for name, changes in (("plain", {}), ("validated", {"validation": validation, "log_every": 3}))
    )
    one, other = load_file(train(plain)), load_file(train(validated))
    assert all(torch.equal(one[name], other[name]) for name in one)
    rows = read_metrics(validated.output / "metrics.csv")
    names = {"validation_loss", "validation_loss_10", "validation_loss_900"}
    assert [(row["update"], names <= row.keys(), "loss" in row) for row in rows] == [
        (2, True, False),
        (3, True, True),
    ]
    assert rows[0]["validation_loss"] != rows[1]["validation_loss"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timesteps": (5, 5)}, r"timesteps is \[5, 5\], expected different whole numbers from 0 to 999"),
        ({"timesteps": (1000,)}, r"timesteps is \[1000\]"),
        ({"count": 0}, "validation.count is 0, expected 1 or more"),
    ],
)
def test_settings_that_cannot_be_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Validation(**changes)


def test_rows_that_are_trained_on_are_refused(settings: MakeSettings, tmp_path: Path) -> None:
    data = Data(rows=tmp_path / "a", root=tmp_path)
    for rows in (None, tmp_path / "a"):
        with pytest.raises(ValueError, match="validation.rows is .* expected a file of rows that are not"):
            settings(data=data, validation=Validation(every=1, rows=rows))
