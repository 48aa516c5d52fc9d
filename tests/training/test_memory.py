"""Memory of a run: counted from its models, and refused before the first update where it cannot fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from easyref_core.training import memory
from easyref_core.training.base_model import BaseModel
from easyref_core.training.config import Settings
from easyref_core.training.counting import Cost
from easyref_core.training.initial import Weights
from easyref_core.training.run import load_weights

from . import tiny
from .tiny import MakeSettings


def count(settings: Settings, references: int = 3, **changes: Any) -> memory.MemoryCount:
    settings = dataclasses.replace(settings, **changes)
    base, weights = models(settings)
    return memory.count_memory(settings, base, weights, references)


def models(settings: Settings, parked: tuple[str, ...] = ()) -> tuple[BaseModel, Weights]:
    base = BaseModel.load(settings.base, parked=parked)
    return base, load_weights(settings, base)


@pytest.fixture
def known_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations of 1000 bytes in bfloat16, whose count takes seconds."""
    monkeypatch.setattr(memory, "step_cost", lambda *_: Cost(0, 1000))


@pytest.fixture
def groups(settings: MakeSettings) -> Settings:
    return settings(**tiny.GOLDEN_START, batch_size=1)


@pytest.mark.usefixtures("known_activations")
def test_weights_are_counted_exactly(groups: Settings) -> None:
    base, weights = models(groups)
    actual = memory.count_memory(groups, base, weights, 1)
    frozen = (base.unet, base.vae, base.text_encoder, base.text_encoder_2)
    assert actual.frozen == sum(p.nbytes for part in frozen for p in part.parameters())
    trained = sum(tensor.numel() for tensor in weights.tensors.values())
    assert actual.trained == 16 * trained  # float32 has no copy
    assert actual.total == actual.frozen + actual.trained + actual.activations + memory.RESERVE_BYTES


@pytest.mark.usefixtures("known_activations")
def test_each_lever_lowers_its_part(groups: Settings) -> None:
    plain = count(groups)
    body = sum(t.numel() for name, t in models(groups)[1].tensors.items() if name.startswith("encoder."))
    lora = count(groups, mllm_lora_rank=2)
    assert lora.frozen == plain.frozen + 4 * body
    assert plain.trained - 16 * body < lora.trained < plain.trained - 10 * body
    assert count(groups, optimizer="adamw_8bit").trained == pytest.approx(
        plain.trained * 10.03 / 16, rel=1e-3
    )
    assert count(groups, optimizer="adafactor").trained == pytest.approx(plain.trained / 2, rel=1e-2)
    assert count(groups, weight_dtype="bfloat16").trained == plain.trained / 2
    assert count(groups, ema=0.9).trained == plain.trained * 20 / 16
    base, weights = models(groups, parked=("vae", "text_encoder", "text_encoder_2"))
    stored = memory.count_memory(groups, base, weights, 3)
    assert stored.frozen == sum(p.nbytes for p in base.unet.parameters())
    assert stored.activations == 2 * 1000 < plain.activations  # float32, and no VAE


@pytest.mark.thorough
def test_activations_follow_from_batch_and_checkpointing(groups: Settings) -> None:
    base, weights = models(groups, parked=("vae",))

    def activations(**changes: Any) -> int:
        return memory.count_memory(dataclasses.replace(groups, **changes), base, weights, 1).activations

    plain = activations()
    assert activations(gradient_checkpointing=True) < plain < activations(batch_size=2) / 1.5


@pytest.fixture
def on_a_card(monkeypatch: pytest.MonkeyPatch, groups: Settings, known_activations: None) -> Any:
    """Check the run as if its base were on a device with this many bytes."""
    base, weights = models(groups)
    base = dataclasses.replace(base, device=torch.device("cuda", 0))

    def check(size: int | None, references: int | None = 3, **changes: Any) -> None:
        monkeypatch.setattr(memory, "device_bytes", lambda _: size)
        memory.require_memory(dataclasses.replace(groups, **changes), base, weights, references)

    return check


def test_run_that_cannot_fit_is_refused_with_the_levers(on_a_card: Any) -> None:
    message = (
        r"^The run takes about 1.. GB \(frozen weights 0.0, .*reserve 1.0\), but cuda:0 has 0.5 GB. Set "
        r"gradient_checkpointing to true; mllm_lora_rank to 64; optimizer to adamw_8bit or adafactor; "
        r"max_references or resolution lower. Set memory_check to false to try it nevertheless.$"
    )
    with pytest.raises(ValueError, match=message):
        on_a_card(500_000_000)
    with pytest.raises(ValueError, match="0.5 GB. Set mllm_lora_rank to 64; max_references or resolution lo"):
        on_a_card(500_000_000, gradient_checkpointing=True, optimizer="adafactor")


def test_run_that_fits_or_is_unknown_is_logged(on_a_card: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    on_a_card(24_000_000_000)
    assert "The run takes about 1." in caplog.text
    assert "of 24.0 GB" in caplog.text
    on_a_card(500_000_000, memory_check=False)
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO", "WARNING"]
    caplog.clear()
    on_a_card(None, references=None)
    assert "The number of references is unknown; activations are counted for groups of one" in caplog.text
    assert "The memory of cuda:0 is unknown, so it is not checked. The run takes about 1." in caplog.text


def test_cpu_is_not_checked(groups: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "count_memory", None)
    base, weights = models(groups)
    memory.require_memory(groups, base, weights, 3)


def test_every_run_is_checked_before_it_starts(
    settings: MakeSettings, examples: tiny.TinyExamples, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from easyref_core.training.loop import train

    def refuse(*_: Any) -> None:
        raise ValueError("too large")

    monkeypatch.setattr("easyref_core.training.run.require_memory", refuse)
    with pytest.raises(ValueError, match="too large"):
        train(settings(), examples)
    assert not (tmp_path / "metrics.csv").exists()
