"""The cost table: counts equal what is known, and the document is the one these counts make."""

from __future__ import annotations

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

LAYOUT = json.loads((tiny.GOLDEN / "released_layout.json").read_text())
DOCUMENT = (tiny.GOLDEN.parents[1] / "docs" / "training_cost.md").read_text()
CONFIGS = Path(cost.__file__).parent / "configs"


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta")


@pytest.fixture(scope="module")
def parameters() -> dict[str, int]:
    return full_size.parameters()


@pytest.mark.parametrize(
    ("prefix", "parts"),
    [
        ("multimodal_llm.visual", ["vision tower"]),
        ("multimodal_llm.model", ["body"]),
        ("mllm_final_layer", ["last_layer", "reference_tokens"]),
        ("image_proj_model", ["projector"]),
        ("unet.", ["kv", "lora"]),
    ],
)
def test_parameters_are_those_of_the_released_layout(
    parameters: dict[str, int], prefix: str, parts: list[str]
) -> None:
    assert sum(parameters[part] for part in parts) == LAYOUT["parameters"][prefix]


@pytest.mark.parametrize(
    ("part", "count"), [("unet", 2_567_463_684), ("vae", 83_653_863), ("text encoders", 817_720_320)]
)
def test_frozen_parameters_are_sdxls(parameters: dict[str, int], part: str, count: int) -> None:
    assert parameters[part] == count


def test_the_unets_sizes_are_those_of_the_layout() -> None:
    known = {key: list(v) if isinstance(v, tuple) else v for key, v in full_size.UNET.items()}
    assert known.items() <= LAYOUT["sdxl_unet_config"].items()


def test_every_tensor_of_the_layout_is_counted() -> None:
    lm_head = 1  # tied, and never used
    assert len(full_size.released_shapes()) == len(LAYOUT["keys"]) - lm_head


@pytest.mark.parametrize(
    ("file", "plan"),
    [
        ("1_alignment.yaml", cost.PLANS[0]),
        ("2_single_reference.yaml", cost.PLANS[1]),
        ("3_multi_reference.yaml", cost.PLANS[2]),
    ],
)
def test_plans_are_the_configs(file: str, plan: cost.Plan) -> None:
    [settings] = load(CONFIGS / file)
    assert settings.what == plan.stage
    assert (settings.batch_size, settings.updates) == (plan.batch, plan.updates)
    assert settings.batch_size * settings.accumulation * 32 == plan.global_batch


def test_a_matrix_product_is_counted_forward_and_backward() -> None:
    x, weight = meta(10, 20), meta(20, 30).requires_grad_()
    assert count(lambda: x @ weight).operations == 2 * 10 * 20 * 30
    assert count(lambda: (x @ weight).sum().backward()).operations == 2 * 2 * 10 * 20 * 30


def test_a_frozen_weight_costs_no_gradient_of_its_own() -> None:
    x, weight = meta(10, 20).requires_grad_(), meta(20, 30)
    assert count(lambda: (x @ weight).sum().backward()).operations == 2 * 2 * 10 * 20 * 30


def test_attention_keeps_no_matrix() -> None:
    q = meta(1, 2, 1000, 8)
    found = count(lambda: scaled_dot_product_attention(q, q, q))
    assert found.operations == 2 * 2 * 2 * 1000 * 1000 * 8
    assert found.peak < 1000 * 1000


def test_attention_is_as_it_was_after_counting() -> None:
    q = torch.randn(1, 2, 5, 8)
    before = scaled_dot_product_attention(q, q, q)
    count(lambda: scaled_dot_product_attention(meta(1, 2, 5, 8), meta(1, 2, 5, 8), meta(1, 2, 5, 8)))
    assert torch.equal(scaled_dot_product_attention(q, q, q), before)
    assert scaled_dot_product_attention(q.to("meta"), q.to("meta"), q.to("meta")).shape == q.shape


def chain(x: torch.Tensor, weight: torch.Tensor, steps: int, again: bool) -> torch.Tensor:
    def step(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(scaled_dot_product_attention(x, x, x) @ weight)

    for _ in range(steps):
        x = checkpoint(step, x, use_reentrant=False) if again else step(x)
    return x


def test_the_peak_is_what_lives_at_one_time() -> None:
    x, weight = meta(1, 1, 100, 50), meta(50, 50)
    size = 100 * 50 * 2
    with torch.no_grad():
        peak = count(lambda: chain(x, weight, 10, again=False)).peak
    assert 2 * size <= peak < 4 * size


def test_checkpointing_costs_one_more_forward_and_less_memory() -> None:
    x, weight = meta(1, 1, 100, 50).requires_grad_(), meta(50, 50)
    forward = count(lambda: chain(x, weight, 10, again=False)).operations
    plain = count(lambda: chain(x, weight, 10, again=False).sum().backward())
    again = count(lambda: chain(x, weight, 10, again=True).sum().backward())
    assert again.operations == plain.operations + forward
    assert again.peak < 0.6 * plain.peak


@pytest.fixture(scope="module")
def alignment() -> full_size.Counts:
    """One example of stage 1."""
    return full_size.counts(STAGES["alignment"], 1, 1, False)


def test_an_example_of_stage_1_takes_what_the_document_says(alignment: full_size.Counts) -> None:
    cells = (alignment.step, alignment.body, alignment.vae, alignment.text)
    step, body, vae, text = (f"{c.operations / 1e12:.2f}" for c in cells)
    [line] = [
        line for line in DOCUMENT.splitlines() if line.startswith("| 1 alignment") and "| 0.11 |" in line
    ]
    assert [cell.strip() for cell in line.split("|")[2:]][:1] == [step]
    assert line.endswith(f"| {body} | {vae} | {text} |")


def test_the_body_takes_two_operations_a_parameter_and_token(alignment: full_size.Counts) -> None:
    embedding = full_size.EASYREF.vocab_size * full_size.EASYREF.hidden_size
    layers = full_size.parameters()["body"] - embedding
    vision = full_size.parameters()["vision tower"]
    products = 2 * (layers * full_size.context_length(1) + vision * 4 * full_size.IMAGE_TOKENS)
    # attention beside; the merger, a small part of the tower, runs on a quarter of the patches
    assert alignment.body.operations == pytest.approx(products, rel=0.08)


def test_memory_is_the_sum_of_its_parts(alignment: full_size.Counts) -> None:
    plan = cost.Plan(STAGES["alignment"], 1, 256, 1, 1, zero2=True)
    one, many = (cost.Estimate(plan, gpus, checkpointing=False) for gpus in (1, 32))
    trained = 46_799_360 + 98_304 + 5_512_704 + 340_787_200
    assert one.trained == trained
    assert one.trained_bytes == 18 * trained
    assert many.trained_bytes == 2.5 * trained
    assert (
        one.frozen_bytes == 2 * (2_567_463_684 + 817_720_320 + 1_496_916_480 + 665_271_296) + 4 * 83_653_863
    )
    assert one.memory - many.memory == 15.5 * trained
    assert one.activation_bytes == max(alignment.step.peak, alignment.vae.peak)
    assert (one.accumulation, many.accumulation) == (256, 8)
    assert one.seconds == pytest.approx(32 * many.seconds)


def test_the_document_has_the_counted_parameters() -> None:
    assert cost.parameter_table() in DOCUMENT
