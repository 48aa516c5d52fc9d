"""The cost table: counts equal known numbers, and the document contains them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from easyref_core.training import cost, full_size
from easyref_core.training.config import load
from easyref_core.training.counting import count
from easyref_core.training.stages import STAGES

from . import tiny

CONFIGS = Path(cost.__file__).parent / "configs"
LAYOUT = json.loads((tiny.GOLDEN / "released_layout.json").read_text())
DOCUMENT = (tiny.GOLDEN.parents[1] / "docs" / "training_cost.md").read_text()


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta")


@pytest.mark.parametrize(
    ("groups", "number"),
    [
        (["vision tower"], LAYOUT["parameters"]["multimodal_llm.visual"]),
        (["body"], LAYOUT["parameters"]["multimodal_llm.model"]),
        (["last_layer", "reference_tokens"], LAYOUT["parameters"]["mllm_final_layer"]),
        (["projector"], LAYOUT["parameters"]["image_proj_model"]),
        (["kv", "lora"], LAYOUT["parameters"]["unet."]),
        (["unet"], 2_567_463_684),
        (["vae"], 83_653_863),
        (["text encoders"], 817_720_320),
    ],
)
def test_parameters_are_those_of_the_released_layout_and_of_sdxl(groups: list[str], number: int) -> None:
    parameters = full_size.parameters()
    assert sum(parameters[group] for group in groups) == number


def test_sizes_and_tensors_are_those_of_the_layout() -> None:
    known = {key: list(v) if isinstance(v, tuple) else v for key, v in full_size.FULL_SIZE.unet.items()}
    assert known.items() <= LAYOUT["sdxl_unet_config"].items()
    lm_head = 1  # tied, and never used
    assert len(full_size.released_shapes()) == len(LAYOUT["keys"]) - lm_head


def test_global_batches_are_the_authors() -> None:
    assert [plan.global_batch for plan in cost.PLANS] == [256, 256, 128, 128]


def test_matrix_product_is_counted_forward_and_backward() -> None:
    x, weight = meta(10, 20), meta(20, 30).requires_grad_()
    forward = 2 * 10 * 20 * 30
    assert count(lambda: x @ weight).flops == forward
    assert count(lambda: (x @ weight).sum().backward()).flops == 2 * forward
    # a frozen weight has no gradient
    x, weight = meta(10, 20).requires_grad_(), meta(20, 30)
    assert count(lambda: (x @ weight).sum().backward()).flops == 2 * forward


def test_attention_stores_no_matrix() -> None:
    q = meta(1, 2, 1000, 8)
    actual = count(lambda: scaled_dot_product_attention(q, q, q))
    assert actual.flops == 2 * 2 * 2 * 1000 * 1000 * 8
    assert actual.peak_bytes < 1000 * 1000


def test_counting_restores_attention() -> None:
    q = torch.randn(1, 2, 5, 8)
    before = scaled_dot_product_attention(q, q, q)
    count(lambda: scaled_dot_product_attention(meta(1, 2, 5, 8), meta(1, 2, 5, 8), meta(1, 2, 5, 8)))
    assert torch.equal(scaled_dot_product_attention(q, q, q), before)
    assert scaled_dot_product_attention(q.to("meta"), q.to("meta"), q.to("meta")).shape == q.shape


def chain(x: torch.Tensor, weight: torch.Tensor, checkpointing: bool = False) -> torch.Tensor:
    """Ten layers of attention and a matrix product."""

    def layer(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(scaled_dot_product_attention(x, x, x) @ weight)

    for _ in range(10):
        x = checkpoint(layer, x, use_reentrant=False) if checkpointing else layer(x)
    return x


def test_peak_is_the_memory_alive_at_one_time() -> None:
    x, weight = meta(1, 1, 100, 50), meta(50, 50)
    size = 100 * 50 * 2
    with torch.no_grad():
        peak = count(lambda: chain(x, weight)).peak_bytes
    assert 2 * size <= peak < 4 * size


def test_checkpointing_costs_one_more_forward_and_less_memory() -> None:
    x, weight = meta(1, 1, 100, 50).requires_grad_(), meta(50, 50)
    forward = count(lambda: chain(x, weight)).flops
    plain = count(lambda: chain(x, weight).sum().backward())
    recomputing = count(lambda: chain(x, weight, checkpointing=True).sum().backward())
    assert recomputing.flops == plain.flops + forward
    assert recomputing.peak_bytes < 0.6 * plain.peak_bytes


def test_checkpointed_layers_keep_only_their_inputs() -> None:
    """Recomputed tensors in reference cycles, which only a dispatch mode makes, are not counted."""
    x, weight = meta(1000, 64).requires_grad_(), meta(64, 256)

    def layer(x: torch.Tensor) -> torch.Tensor:
        hidden = x @ weight
        return x + (hidden * (1.702 * hidden).sigmoid_()) @ weight.T

    def peak(layers: int) -> int:
        def run() -> None:
            y = x
            for _ in range(layers):
                y = checkpoint(layer, y, use_reentrant=False)
            y.sum().backward()

        return count(run).peak_bytes

    assert peak(12) - peak(4) <= 1.1 * 8 * x.nbytes


@pytest.fixture(scope="module")
def alignment() -> full_size.MicroBatchCost:
    """One example of stage 1."""
    workload = full_size.Workload(stage=STAGES["alignment"], batch=1, references=1, checkpointing=False)
    return full_size.micro_batch_cost(workload)


@pytest.mark.thorough
def test_document_has_the_counts(alignment: full_size.MicroBatchCost) -> None:
    assert cost.parameter_table() in DOCUMENT
    costs = (alignment.step, alignment.body, alignment.vae, alignment.text)
    step, body, vae, text = (f"{c.flops / 1e12:.2f}" for c in costs)
    [line] = [
        line for line in DOCUMENT.splitlines() if line.startswith("| 1 alignment") and "| 0.11 |" in line
    ]
    assert line.split("|")[2].strip() == step
    assert line.endswith(f"| {body} | {vae} | {text} |")


@pytest.mark.thorough
def test_body_takes_two_flops_per_parameter_and_token(alignment: full_size.MicroBatchCost) -> None:
    embedding = full_size.EASYREF.vocab_size * full_size.EASYREF.hidden_size
    layers = full_size.parameters()["body"] - embedding
    vision = full_size.parameters()["vision tower"]
    products = 2 * (layers * full_size.context_length(1) + vision * 4 * full_size.IMAGE_TOKENS)
    # plus attention, minus the merger, a small part of the tower that runs on a quarter of the patches
    assert alignment.body.flops == pytest.approx(products, rel=0.08)


@pytest.mark.thorough
def test_memory_is_the_sum_of_its_parts(alignment: full_size.MicroBatchCost) -> None:
    plan = cost.Plan(STAGES["alignment"], 1, 256, updates=1, references=1, zero2=True)
    one, many = (cost.Estimate(plan, gpus, checkpointing=False) for gpus in (1, 32))
    trained = 46_799_360 + 98_304 + 5_512_704 + 340_787_200
    assert one.num_trained == trained
    assert one.trained_bytes == 18 * trained
    assert many.trained_bytes == 2.5 * trained
    frozen = 2_567_463_684 + 817_720_320 + 1_496_916_480 + 665_271_296
    assert one.frozen_bytes == 2 * frozen + 4 * 83_653_863
    assert one.total_bytes - many.total_bytes == 15.5 * trained
    assert one.activation_bytes == max(alignment.step.peak_bytes, alignment.vae.peak_bytes)
    assert (one.accumulation, many.accumulation) == (256, 8)
    assert one.seconds == pytest.approx(32 * many.seconds)


PLAIN = cost.Levers()


def estimate(machine: cost.Machine = cost.A100, **levers: object) -> cost.Estimate:
    plan = cost.Plan(STAGES["multi_reference"], 1, 16, updates=1, references=8, zero2=False)
    return cost.Estimate(plan, 1, True, machine, dataclasses.replace(PLAIN, **levers))


def test_each_lever_changes_its_part() -> None:
    plain, numbers = estimate(), full_size.parameters()
    body = numbers["body"] + numbers["vision tower"]
    assert plain.trained_bytes == 18 * plain.num_trained
    assert estimate(optimizer="adamw_8bit").trained_bytes == (12 + 1 / 32) * plain.num_trained
    assert estimate(optimizer="adafactor").trained_bytes == pytest.approx(10 * plain.num_trained, rel=2e-3)
    assert estimate(weight_dtype="bfloat16").trained_bytes == 8 * plain.num_trained
    both = estimate(weight_dtype="bfloat16", optimizer="adamw_8bit")
    assert both.trained_bytes == (6 + 1 / 32) * plain.num_trained
    lora = estimate(mllm_lora_rank=64)
    assert lora.frozen_bytes == plain.frozen_bytes + 2 * body
    # q, k, v and o, and three matrices of the MLP, in 27 layers; qkv, proj and two of the MLP in 32
    decoder = 27 * (2 * (1536 + 1536) + 2 * (1536 + 256) + 3 * (1536 + 8960))
    vision = 32 * ((1280 + 3 * 1280) + 2 * 1280 + 2 * (1280 + 5120))
    assert lora.num_trained == plain.num_trained - body + 64 * (decoder + vision)
    stored = estimate(precomputed=frozenset({"latents", "texts"}))
    assert stored.frozen_bytes == 2 * numbers["unet"]


def test_levers_of_the_document_name_every_machine_and_lever() -> None:
    section = DOCUMENT.partition("## Levers on one GPU")[2].partition("\n## ")[0]
    assert all(machine.name in section for machine in cost.MACHINES)
    rows = [line.split("|")[1].strip() for line in section.splitlines() if line.startswith("| ")]
    assert rows[2:] == [name for name, *_ in cost.LEVERS]
    levers = [levers for *_, levers in cost.LEVERS]
    assert {row.optimizer for row in levers} == {"adamw", "adamw_8bit", "adafactor"}
    assert {row.weight_dtype for row in levers} == {"float32", "bfloat16"}
    assert {checkpointing for _, _, checkpointing, _ in cost.LEVERS} == {True, False}


def test_small_configuration_is_a_row_that_fits_24_gb() -> None:
    [settings] = load(CONFIGS / "finetune_small.yaml")
    levers = cost.Levers(
        settings.optimizer, settings.weight_dtype, settings.mllm_lora_rank, frozenset({"latents", "texts"})
    )
    [name] = [
        name
        for name, plan, checkpointing, row in cost.LEVERS
        if (plan, checkpointing, row) == (cost.GROUPS, settings.gradient_checkpointing, levers)
    ]
    assert settings.data.augmentation.max_references == cost.GROUPS.references
    section = DOCUMENT.partition("| stage 3 with a LoRA of the MLLM")[2]
    [row] = [line.split("|") for line in section.splitlines() if line.startswith(f"| {name} |")][:1]
    assert float(row[6]) < 24
    assert row[7].strip().endswith(" s")
