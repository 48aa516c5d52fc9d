"""Levers of memory: optimizers with small states, a LoRA of the MLLM, trained weights in bfloat16."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import easyref_core as er
from easyref_core.training.export import export
from easyref_core.training.loop import make_accelerator, train
from easyref_core.training.run import Run
from easyref_core.training.run_log import read_metrics

from . import tiny
from .tiny import MakeSettings, TinyExamples, Train

LORA = {**tiny.GOLDEN_START, "mllm_lora_rank": 3}


def require(optimizer: str) -> None:
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize(("optimizer", "rate"), [("adamw_8bit", 1e-2), ("adafactor", 5e-2)])
def test_optimizer_lowers_the_loss_and_resumes_bit_for_bit(
    settings: MakeSettings, examples: TinyExamples, tmp_path: Path, optimizer: str, rate: float
) -> None:
    require(optimizer)
    changes = {**tiny.GOLDEN_START, "optimizer": optimizer, "learning_rate": rate, "batch_size": 4}
    run, batch = Run(settings(**changes), make_accelerator(1), examples), examples.batch(range(4))
    losses = [run.update(iter([batch]), number, measure=False)[0].item() for number in range(20)]
    run.close()
    assert losses[-1] < 0.9 * losses[0]
    for name, updates in (("once", 4), ("twice", 2), ("twice", 4)):
        train(settings(**changes, output=tmp_path / name, updates=updates), examples)
    once, twice = (
        [row["loss"] for row in read_metrics(tmp_path / name / "metrics.csv")] for name in ("once", "twice")
    )
    assert once == twice


def test_adafactor_stores_no_first_moment(settings: MakeSettings, examples: TinyExamples) -> None:
    run = Run(settings(optimizer="adafactor"), make_accelerator(1), examples)
    run.update(iter([examples.batch(range(2))]), 0, measure=False)
    for parameter, state in run.optimizer.state.items():
        values = sum(t.numel() for t in state.values() if isinstance(t, torch.Tensor) and t.numel() > 1)
        assert values <= (sum(parameter.shape) if parameter.ndim == 2 else parameter.numel())
    run.close()


def test_8_bit_optimizer_without_its_package_is_named(
    settings: MakeSettings, examples: TinyExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    message = r"needs bitsandbytes, .*pip install -e '.\[train,train-8bit\]', or set optimizer to adafactor"
    with pytest.raises(ValueError, match=message):
        Run(settings(optimizer="adamw_8bit"), make_accelerator(1), examples)


def test_mllm_lora_begins_without_effect_and_freezes_the_body(
    settings: MakeSettings, examples: TinyExamples
) -> None:
    batch, losses = examples.batch(range(2)), []
    for changes in (tiny.GOLDEN_START, LORA):
        run = Run(settings(**changes), make_accelerator(1), examples)
        losses.append(run.loss(batch).item())
        run.accelerator.backward(run.loss(batch))
        run.close()
    assert losses[0] == losses[1]
    names = {name.partition(".")[0] for name, _ in run.model.named_parameters()}
    assert names == {"aggregator", "kv", "lora", "mllm_lora"}
    linear = {
        name
        for name, module in run.model.encoder.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(("layers.", "visual.blocks."))
    }
    assert {key.replace("/", ".") for key in run.model.mllm_lora} == linear
    assert not any(p.requires_grad or p.grad is not None for p in run.model.encoder.parameters())
    assert all(layer.up.weight.grad.any() for layer in run.model.mllm_lora.values())


def test_merged_checkpoint_gives_the_tokens_of_the_trained_model(
    settings: MakeSettings, examples: TinyExamples, tmp_path: Path
) -> None:
    run = Run(settings(**LORA, learning_rate=1e-2), make_accelerator(1), examples)
    batch = examples.batch(range(1))
    for number in range(3):
        run.update(iter([batch]), number, measure=False)
    run.save(tmp_path / "easyref.safetensors")
    start, merged = load_file(LORA["start"]), load_file(tmp_path / "easyref.safetensors")
    assert merged.keys() == start.keys()
    [(references, prompt)] = examples.images(range(1))
    loaded = er.load(tmp_path / "easyref.safetensors", tiny.MLLM)
    tokens = loaded.aggregate(loaded.encode(references, prompt, size=tiny.REFERENCE))
    with torch.no_grad():
        expected = run.model.tokens(batch)
        run.model.mllm_lora.requires_grad_(False)
        for layer in run.model.mllm_lora.values():
            layer.up.weight.zero_()
        without = run.model.tokens(batch)
    run.close()
    assert (tokens - expected).norm() <= 1e-5 * expected.norm()
    assert (without - expected).norm() > 1e-3 * expected.norm()


def test_states_of_a_mllm_lora_hold_no_body_and_are_exported(
    settings: MakeSettings, train_tiny: Train, examples: TinyExamples, tmp_path: Path
) -> None:
    options = {**LORA, "updates": 2, "save_every": 1, "gradient_checkpointing": True}
    result = train_tiny(**options)
    state = load_file(tmp_path / "state-1" / "model.safetensors")
    assert not any(name.startswith("encoder.") for name in state)
    run = settings(**options)
    first, second = load_file(export(run, 1)), load_file(export(run, 2))
    final = load_file(result)
    assert all(torch.equal(second[name], final[name]) for name in final)
    assert not all(torch.equal(first[name], final[name]) for name in final)


def test_mllm_lora_of_a_frozen_body_is_refused(settings: MakeSettings) -> None:
    with pytest.raises(ValueError, match="mllm_lora_rank is 3, but stage 'alignment' freezes the MLLM's"):
        settings(mllm_lora_rank=3)


def test_bfloat16_weights_need_mixed_precision(settings: MakeSettings, examples: TinyExamples) -> None:
    with pytest.raises(ValueError, match="weight_dtype is bfloat16 with mixed precision 'no', expected 'bf"):
        Run(settings(weight_dtype="bfloat16"), make_accelerator(1), examples)


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "adafactor"])
def test_bfloat16_weights_train_and_are_saved(
    train_tiny: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture, optimizer: str
) -> None:
    require(optimizer)
    train_tiny(**LORA, weight_dtype="bfloat16", optimizer=optimizer, updates=2, gradient_checkpointing=True)
    state = load_file(tmp_path / "state-2" / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert all(math.isfinite(row["loss"]) for row in read_metrics(tmp_path / "metrics.csv"))
    assert "an update of less than about 1/256 of a weight is lost to rounding" in caplog.text
