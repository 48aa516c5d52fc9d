"""Settings of Apply EasyRef: weight types, schedules, scaling, masks, batched tokens, recorder.

Pinned: every setting's neutral value is bit-identical to its absence, a mask of zeros to weight 0; layers,
sides and steps get the weights of the tables; masks act at their position, at any size, in crops and for each
latent.
"""

from __future__ import annotations

import itertools
import math
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from devkit.host import golden
from devkit.host.sampling import (
    LEFT,
    PROMPTS,
    SITES,
    Attended,
    Easy,
    in_float64,
    predict,
    sample_cfg,
    sigma_at,
    state,
    watch_attention,
)

from .by_hand import by_hand

pytestmark = pytest.mark.one_host

STRONG = {"weight_type": "strong style and composition"}
EVERY_LAYER = ", ".join(f"{layer}:1" for layer in range(11))


def watched(easy: Easy, model: ModelPatcher, sigma: float = 1.0) -> list:
    with watch_attention(easy.pack, model) as calls:
        predict(model, sigma)
    return calls


def weight_of(easy: Easy, call: Attended) -> float:
    """The weight in V of a term. Each row is found among the tokens' own by its K, which has no weight."""
    keys, values = dict(zip(layer_of(easy), easy.key_values, strict=True))[call.site]
    weights = []
    for key, value in zip(*call.key_value, strict=True):
        for unweighted in (values[i] for i in range(len(keys)) if torch.equal(keys[i], key)):
            weights.append((value * unweighted).sum().item() / unweighted.square().sum().item())
            assert golden.error(value, weights[-1] * unweighted) <= 1e-6
    assert max(weights) - min(weights) <= 1e-6
    return weights[0]


def weights_at(easy: Easy, model: ModelPatcher, percent: float) -> list[float]:
    return [weight_of(easy, call) for call in watched(easy, model, sigma_at(model, percent))]


def layer_of(easy: Easy) -> dict[str, int]:
    """The layer of each attention, by its path in the host's UNet."""
    layers_of = golden.part(easy.pack, "easyref_core.unet.layer_weights").layers_of
    layers = layers_of(easy.easyref.model.checkpoint.sites)
    return {f"{site.comfy}.attn2": layer for site, layer in layers.items()}


# Neutral values


@pytest.mark.parametrize(
    ("weight", "settings"),
    [
        *((1.0, {"mask": torch.ones(size)}) for size in ((1, 7, 9), (5, 64, 64), (33, 21))),
        (1.0, {"weight_type": "linear"}),
        (1.0, {"layer_weights": EVERY_LAYER}),
        *((1.0, {"weight_schedule": points}) for points in ("1", "0:1, 1:1")),
        (1.0, {"embeds_scaling": "V only"}),
        (1.0, {**STRONG, "mask": torch.ones(1, 1, 1), "weight_schedule": "1, 1, 1"}),
        *((0.0, {"mask": torch.zeros(size)}) for size in ((1, 7, 9), (3, 16, 16))),
        (0.0, {"layer_weights": "3:0"}),
        *((0.0, {"weight_schedule": points}) for points in ("0", "0:0, 1:0")),
    ],
)
def test_settings_that_equal_a_weight(easy, model, weight: float, settings: dict) -> None:
    """Neutral values leave weight 1 bit for bit; values that remove every term equal weight 0."""
    assert torch.equal(predict(easy.apply(model, **settings)), predict(easy.apply(model, weight)))


def test_zero_mask_without_lora_is_the_untouched_model(easy, model) -> None:
    assert state(easy.apply(model, lora=0.0, mask=torch.zeros(1, 8, 8))) == state(model)


@in_float64
@pytest.mark.parametrize("scaling", ["K+V", "K+mean(V) w/ C penalty"])
def test_scaling_at_weight_1_of_equally_wide_layers_is_v_only(easy, model, scaling: str) -> None:
    """All attentions of the tiny UNet are 32 wide, so that no layer is penalised."""
    found = predict(easy.apply(model, embeds_scaling=scaling))
    assert golden.error(found, predict(easy.apply(model))) <= 1e-6


# Layers


def test_weight_type_weighs_each_layer(easy, model) -> None:
    layers = layer_of(easy)
    for name, kind in golden.part(easy.pack, "easyref_core.unet.layer_weights").WEIGHT_TYPES.items():
        found = {
            call.site: weight_of(easy, call)
            for call in watched(easy, easy.apply(model, weight=0.5, weight_type=name))
        }
        wanted = {site: 0.5 * kind.factors[layer] for site, layer in layers.items() if kind.factors[layer]}
        assert found == pytest.approx(wanted), name


def test_layer_weights_reach_the_middle_block(easy, model) -> None:
    calls = watched(easy, easy.apply(model, layer_weights="4:0.25"))
    assert {call.site.split(".")[0] for call in calls} == {"middle_block"}
    assert [weight_of(easy, call) for call in calls] == pytest.approx([0.25] * len(calls))


@in_float64
def test_style_and_composition_are_two_nodes_of_one_kind_each(easy, model) -> None:
    both = predict(easy.apply(model, weight_type="style and composition"))
    style = easy.apply(model, weight_type="style transfer")
    assert golden.error(predict(easy.apply(style, weight_type="composition")), both) <= 1e-6


@pytest.mark.parametrize("name", ["style transfer precise", "composition precise"])
def test_precise_types_cross_the_sides(easy, model, name: str) -> None:
    layers = layer_of(easy)
    rows = dict(zip(layers, easy.key_values, strict=True))
    for call in watched(easy, easy.apply(model, weight_type=name)):
        unconditional, conditional = rows[call.site][1]
        found = call.key_value[1] / weight_of(easy, call)
        if name == "style transfer precise" and layers[call.site] == 3:
            wanted = conditional, torch.zeros_like(conditional)
        elif name == "composition precise" and layers[call.site] != 3:
            wanted = conditional, unconditional
        else:
            wanted = unconditional, conditional
        assert golden.error(found, torch.stack(wanted)) <= 1e-6, call.site


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_weights": "11:1"}, "names layer 11"),
        ({"layer_weights": "style"}, "not index:weight"),
        ({"weight_schedule": "1, fast"}, "'fast' where a number is wanted"),
        ({"weight_type": "bold"}, "weight_type is 'bold'; wanted one of: linear"),
        ({"embeds_scaling": "Q"}, "embeds_scaling is 'Q'; wanted one of: V only"),
    ],
)
def test_settings_that_cannot_be_read(easy, model, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        easy.apply(model, weight=0.0, **settings)


# Steps


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [("1, 0", {0.25: 0.75, 0.5: 0.5}), ("0.2:1, 0.6:0.5", {0.1: 1.0, 0.4: 0.75, 0.9: 0.5})],
)
def test_schedule(easy, model, schedule: str, factors: dict[float, float]) -> None:
    patched = easy.apply(model, weight=2.0, weight_schedule=schedule)
    for percent, factor in factors.items():
        assert weights_at(easy, patched, percent) == pytest.approx([2 * factor] * SITES, abs=1e-4), percent


def test_schedule_is_spread_over_the_window(easy, model) -> None:
    patched = easy.apply(model, start=0.2, end=0.6, weight_schedule="1, 0")
    assert weights_at(easy, patched, 0.3) == pytest.approx([0.75] * SITES, abs=1e-4)
    assert watched(easy, patched, sigma_at(model, 0.7)) == []


@pytest.mark.parametrize("scaling", ["K+V", "K+V w/ C penalty", "K+mean(V) w/ C penalty"])
def test_scaled_keys_follow_the_schedule(easy, model, scaling: str) -> None:
    scheduled = easy.apply(model, weight=2.0, embeds_scaling=scaling, weight_schedule="1, 0")
    for percent, weight in ((0.25, 1.5), (0.75, 0.5), (0.25, 1.5)):
        sigma = sigma_at(model, percent)
        constant = easy.apply(model, weight=weight, embeds_scaling=scaling)
        assert golden.error(predict(scheduled, sigma), predict(constant, sigma)) <= 1e-5


def test_key_values_of_earlier_weights_are_released(easy, model) -> None:
    """Also if the batch has other branches than in the step before, as where CFG ends early."""
    (injection,) = easy.apply(model, weight=2.0, weight_schedule="1, 0").get_attachment("easyref").injections
    call = golden.part(easy.pack, "nodes.unet_patch.step").UNetCall(
        model.get_model_object("model_sampling"), torch.device("cpu"), torch.float32
    )
    layout = easy.two_sided_layout()
    first = injection.active_at(sigma_at(model, 0.25), layout, call)
    values = [weakref.ref(v) for _, v in first.key_values]
    del first
    injection.active_at(sigma_at(model, 0.5), layout[1:], call)
    assert [value() for value in values] == [None] * SITES


def test_scaled_keys_are_made_once_while_the_weight_stays(easy, model) -> None:
    with watch_attention(easy.pack, model) as calls:
        sample_cfg(easy.apply(model, 0.5, embeds_scaling="K+V"), steps=3)
    assert len({id(tensor) for call in calls for tensor in call.key_value}) == 2 * SITES


# Masks


def left_half(q: Tensor) -> Tensor:
    """1 at the queries (rows, tokens, inner) of the left half of a square grid, else 0."""
    columns = math.isqrt(q.shape[1])
    return (torch.arange(q.shape[1]) % columns < columns // 2).to(q.dtype)[None, :, None]


@in_float64
@pytest.mark.parametrize("size", [(16, 16), (128, 64), (2, 2), (1, 2)])
def test_mask_of_any_size(easy, model, size: tuple) -> None:
    mask = torch.zeros(1, *size)
    mask[..., : size[1] // 2] = 1
    expected = predict(by_hand(easy, model, weight=left_half))
    assert golden.error(predict(easy.apply(model, mask=mask)), expected) <= 1e-6


@in_float64
def test_regions_of_a_chain_add_up(easy, model) -> None:
    chain = easy.apply(easy.apply(model, mask=LEFT), mask=1 - LEFT)
    assert golden.error(predict(chain), predict(easy.apply(model))) <= 1e-6


def test_region_has_its_own_tokens_only(easy, model) -> None:
    """Only the first attention, because the queries of later ones depend on the whole image."""
    left = easy.apply(model, mask=LEFT)
    outputs = [
        first_attention(easy.apply(left, 0.5, tokens=tokens, mask=1 - LEFT))
        for tokens in (easy.tokens, easy.other_tokens(), easy.other_tokens(1))
    ]
    half = outputs[0].shape[-1] // 2
    assert torch.equal(outputs[0][..., :half], outputs[1][..., :half])
    assert not torch.equal(outputs[1][..., half:], outputs[2][..., half:])
    plain = first_attention(easy.apply(model, weight=0.0))
    only_left = first_attention(left)
    assert torch.equal(only_left[..., half:], plain[..., half:])
    assert not torch.equal(only_left[..., :half], plain[..., :half])


def first_attention(model: ModelPatcher) -> Tensor:
    """Output of the first cross-attention, (2, channels, rows, columns)."""
    outputs = []
    attention = model.model.diffusion_model.input_blocks[4][1].transformer_blocks[0].attn2
    hook = attention.to_out.register_forward_pre_hook(lambda _, inputs: outputs.append(inputs[0].clone()))
    try:
        predict(model)
    finally:
        hook.remove()
    return outputs[0].mT.unflatten(-1, (8, 8))


@pytest.mark.parametrize("size", [(13, 17), (9, 30), (25, 11)])
def test_odd_latents(easy, model, size: tuple) -> None:
    full = sample_cfg(easy.apply(model), size=size)
    assert torch.equal(sample_cfg(easy.apply(model, mask=torch.ones(1, 100, 100)), size=size), full)
    some = sample_cfg(easy.apply(model, mask=torch.rand(1, 50, 40)), size=size)
    assert torch.isfinite(some).all()
    assert golden.error(some, full) > 1e-4


def test_mask_for_each_latent_of_a_batch(easy, model) -> None:
    masks = torch.stack([torch.zeros(8, 8), torch.ones(8, 8)])
    settings = {"mask": masks}, {"weight": 0.0}, {}
    found, without, everywhere = (sample_cfg(easy.apply(model, **each), batch=3) for each in settings)
    assert torch.equal(found[0], without[0])
    assert torch.equal(found[1:], everywhere[1:])


def test_area_uses_its_own_part_of_the_mask(easy, model) -> None:
    """Prompts for the right half of the latent, as ConditioningSetAreaPercentage makes them."""
    import nodes as host_nodes  # late: on 0.20 it hides the modules other tests import from the host

    area = host_nodes.ConditioningSetAreaPercentage()
    conds = tuple(area.append(prompt, 0.5, 1.0, 0.5, 0.0, 1.0)[0] for prompt in PROMPTS)
    applied = (
        easy.apply(model, **each) for each in ({"weight": 0.0}, {}, {"mask": LEFT}, {"mask": 1 - LEFT})
    )
    without, everywhere, left, right = (sample_cfg(each, conds=conds) for each in applied)
    assert torch.equal(left, without)
    assert torch.equal(right, everywhere)
    assert not torch.equal(without, everywhere)


def test_area_is_cut_off_as_the_host_does(pack) -> None:
    masks = golden.part(pack, "easyref_core.unet.masks")
    area_crop = golden.part(pack, "nodes.unet_patch.batch_layout").area_crop
    assert area_crop((8, 12, 4, 10), (16, 16)) == masks.Crop((16, 16), 4, 10, 8, 6)
    assert area_crop(None, (16, 8)) == masks.full_crop(16, 8)


SAMPLINGS: dict[str, tuple] = {  # name of the node's class, and its inputs after the model
    "v-prediction zsnr": ("ModelSamplingDiscrete", "v_prediction", True),
    "EDM": ("ModelSamplingContinuousEDM", "edm_playground_v2.5", 120.0, 0.002),
    "continuous V": ("ModelSamplingContinuousV", "v_prediction", 500.0, 0.03),
    "SD3 shift": ("ModelSamplingSD3", 3.0),
}


def with_sampling(model: ModelPatcher, name: str) -> ModelPatcher:
    # late: on 0.20 it imports nodes.py, which hides modules that other tests import from the host
    from comfy_extras import nodes_model_advanced

    node, *inputs = SAMPLINGS[name]
    return getattr(nodes_model_advanced, node)().patch(model, *inputs)[0]


@pytest.mark.parametrize("name", SAMPLINGS)
def test_model_sampling_may_come_before_or_after(easy, model, name: str) -> None:
    settings: dict[str, Any] = {"start": 0.2, "end": 0.6, "weight_schedule": "0.2:0.2, 0.6:1"}
    models = (
        easy.apply(with_sampling(model, name), **settings),
        with_sampling(easy.apply(model, **settings), name),
        easy.apply(with_sampling(model, name)),
    )
    before, after, always = (sample_cfg(each, steps=6) for each in models)
    assert torch.equal(before, after)
    assert golden.error(before, always) > 1e-4


def test_two_models_that_share_an_injection_have_their_own_sigmas(easy, model) -> None:
    """One after the other, as the same Apply node feeds two samplers."""
    applied = easy.apply(model, end=0.4)
    plain = sample_cfg(applied, steps=4)
    sample_cfg(with_sampling(applied, "SD3 shift"), steps=4)
    assert torch.equal(sample_cfg(applied, steps=4), plain)


@pytest.mark.parametrize(
    "settings",
    [{}, {"weight": 0.7, "embeds_scaling": "K+V"}, {"weight": 0.7, "weight_type": "style transfer precise"}],
)
def test_row_of_tokens_for_each_latent(easy, model, settings: dict) -> None:
    batch, singles = easy.batched_tokens(2)

    def sampled(tokens: Any = None) -> Tensor:
        return sample_cfg(easy.apply(model, tokens=tokens, **settings), batch=3)

    found = sampled(batch)
    for latent, tokens in enumerate([*singles, singles[-1]]):
        assert golden.error(found[latent], sampled(tokens)[latent]) <= 1e-5
    assert golden.error(found[0], sampled()[0]) > 1e-4


@pytest.mark.parametrize(
    ("options", "frames"),
    [
        ({}, (0, 1)),
        ({"ad_params": {"sub_idxs": [5, 9]}}, (5, 9)),
        ({"ad_params": {"sub_idxs": None}}, (0, 1)),
        ({"context_window": SimpleNamespace(index_list=[2, 3])}, (2, 3)),
        ({"context_window": SimpleNamespace(index_list=[2, 3, 4])}, (0, 1)),
        ({"context_window": SimpleNamespace(index_list=[4], causal_anchor_index=3)}, (3, 4)),
        ({"context_window": SimpleNamespace(index_list=[0, 1], causal_anchor_index=-1)}, (0, 1)),
    ],
)
def test_frames_that_are_sampled(pack, options: dict, frames: tuple) -> None:
    assert golden.part(pack, "nodes.unet_patch.sub_batch").frames_of(options, 2) == frames


def recorded(easy: Easy, model: ModelPatcher, **settings) -> tuple:
    with_record = golden.part(easy.pack, "nodes.unet_patch.recording").with_record
    patched, record = with_record(easy.apply(model, **settings))
    return predict(patched), record.recorders[0].shares()


def test_recorder_changes_nothing(easy, model) -> None:
    assert torch.equal(recorded(easy, model)[0], predict(easy.apply(model)))


def test_recorder_records_every_site_and_side(easy, model) -> None:
    _, shares = recorded(easy, model)
    assert {key.sigma for key in shares} == {1.0}
    sides = itertools.product(easy.easyref.model.checkpoint.sites, (True, False))
    assert {(key.site, key.is_unconditional) for key in shares} == set(sides)
    assert {tuple(share.grid.shape) for share in shares.values()} == {(8, 8), (4, 4)}
    assert all(math.isfinite(share.share) and share.share > 0 for share in shares.values())


def test_share_grows_with_the_weight_and_is_0_outside_the_mask(easy, model) -> None:
    key = golden.part(easy.pack, "easyref_core.inspect.reference_share").ShareKey
    first = key(1.0, easy.easyref.model.checkpoint.sites[0], False)
    settings = {}, {"weight": 2.0}, {"mask": LEFT}
    once, twice, masked = (recorded(easy, model, **each)[1][first] for each in settings)
    assert twice.share == pytest.approx(2 * once.share, rel=1e-5)
    assert (masked.grid[:, 4:] == 0).all()
    torch.testing.assert_close(masked.grid[:, :4], once.grid[:, :4])


# Linked values, which the host does not compare with the schema


@pytest.mark.parametrize(
    ("setting", "value", "wanted"),
    [
        ("weight", float("nan"), "a number from -1.0 to 3.0"),
        ("weight", 10**30, "a number from -1.0 to 3.0"),
        ("weight", "0.5", "a number from -1.0 to 3.0"),
        ("weight", True, "a number from -1.0 to 3.0"),
        ("end_percent", 1.1, "a number from 0.0 to 1.0"),
        ("lora_strength", None, "a number from 0.0 to 2.0"),
        ("weight_type", ["linear"], "one of: linear"),
        ("layer_weights", 3, "a text"),
    ],
)
def test_a_value_that_the_schema_does_not_allow(easy, model, setting: str, value, wanted: str) -> None:
    inputs = {"weight": 1.0, "start_percent": 0.0, "end_percent": 1.0, "lora_strength": 1.0, setting: value}
    node = golden.node(easy.pack, "EasyRefApply")
    with pytest.raises((ValueError, TypeError), match=f"^{setting} is .*; wanted {wanted}"):
        node.execute(model, easy.tokens, **inputs)


@pytest.mark.parametrize("settings", [{"layer_weights": "3:1e308"}, {"weight_schedule": "1, 1e308"}])
def test_a_factor_that_no_image_survives(easy, model, settings: dict) -> None:
    with pytest.raises(ValueError, match="100"):
        easy.apply(model, **settings)


def test_every_node_validates_its_inputs(easy) -> None:
    nodes = golden.part(easy.pack, "nodes").NODES
    assert len(nodes) == 24
    assert all(hasattr(node.execute.__func__, "__wrapped__") for node in nodes)
