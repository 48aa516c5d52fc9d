"""What Apply EasyRef does to a MODEL, and what it leaves alone.

Pinned: the model that comes in stays as it is; neutral settings are the identity; re-runs and clones accumulate
nothing and copy nothing; the term itself, against attention written out by hand; chains of Apply nodes; other packs'
patches at the same place, before and after; the window; K and V made once, placed once, released; all 70 sites.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import weakref
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import comfy.samplers
import comfy.utils
import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP, copy_nested_dicts
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from devkit.host import golden
from devkit.host.sampling import (
    Easy,
    cfg_guider,
    golden_easy,
    in_float64,
    predict,
    sample,
    sampling_options,
    watch_attention,
)
from devkit.host.tiny_nodes.tiny_sdxl import load_tiny_sdxl, random_conditioning, random_sdxl

HUGE = 1e9  # a sigma above every schedule
NARROWER = 10  # so much narrower than SDXL is the UNet with its depths
SITES = 17  # cross-attentions of the tiny UNet
ANYWHERE = {"sigma_start": HUGE, "sigma_end": 0.0}


def sigma_at(model: ModelPatcher, percent: float) -> float:
    return model.get_model_object("model_sampling").percent_to_sigma(percent)


def by_hand(
    easy: Easy, weight: float, foreign: Callable[..., Tensor] | None = None, runs: tuple[int, ...] = (0, 1)
) -> Callable[[ModelPatcher], ModelPatcher]:
    """Patches a model with the attention written out: text (or `foreign`), plus weight * softmax(Q K^T / sqrt(d)) V.

    runs: which row of K and V each half of the batch attends to; 0 is the unconditional one.
    """

    def at_site(key: Tensor, value: Tensor) -> Callable[..., Tensor]:
        def attention(q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
            heads = extra_options["n_heads"]
            text = (foreign or text_attention)(q, k, v, extra_options)
            parts = []
            for row, queries in zip(runs, q.chunk(len(runs)), strict=True):
                qkv = (queries, key[row].to(q), value[row].to(q))
                split = [t.unflatten(-1, (heads, -1)).movedim(-2, -3) for t in qkv]
                scores = split[0] @ split[1].mT / split[0].shape[-1] ** 0.5
                parts.append((scores.softmax(-1) @ split[2]).movedim(-3, -2).flatten(-2))
            return text + weight * torch.cat(parts)

        return attention

    def patch(model: ModelPatcher) -> ModelPatcher:
        clone = model.clone()
        for site, (key, value) in zip(easy.easyref.model.checkpoint.sites, easy.key_values, strict=True):
            clone.set_model_attn2_replace(at_site(key, value), *site)
        return clone

    return patch


def text_attention(q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
    return optimized_attention(q, k, v, extra_options["n_heads"])


def halved_query(q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
    """A replacement as another pack would set it: its output depends on nothing of ours."""
    return q / 2


def replace_everywhere(model: ModelPatcher, easy: Easy, patch: Any, with_index: bool = True) -> ModelPatcher:
    clone = model.clone()
    for block, number, index in easy.easyref.model.checkpoint.sites:
        clone.set_model_attn2_replace(patch, block, number, index if with_index else None)
    return clone


def add_as_other_packs_do(model: ModelPatcher, callback: Callable, **options: Any) -> ModelPatcher:
    """The contract of IPAdapter_plus and InstantID: on a clone, call .add on what sits at the key in copied dicts.

    The copies are dropped, so that only what .add changes in place is left.
    """
    clone = model.clone()
    replaced = dict(clone.model_options["transformer_options"]["patches_replace"]["attn2"])
    for patch in replaced.values():
        patch.add(callback, **options)
    return clone


def rows_of_two_sides(pack: Any) -> tuple:
    """The layout of a batch of [unconditional, conditional], of one 16 x 16 latent."""
    row, whole = (
        golden.part(pack, "nodes.unet_patch.batch_layout").Row,
        golden.part(pack, "easyref_core.unet.masks").full_crop,
    )
    return tuple(row(side, 0, 0, whole(16, 16)) for side in (True, False))


def state(model: ModelPatcher) -> dict[str, Any]:
    """All that a patch could change of a patcher, copied as far as it is dicts and lists."""
    kept = {
        name: copy_nested_dicts(getattr(model, name))
        for name in (
            "model_options",
            "patches",
            "attachments",
            "wrappers",
            "callbacks",
            "object_patches",
            "injections",
        )
    }
    replaced = model.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
    added = {site: list(patch.added) for site, patch in replaced.items() if hasattr(patch, "added")}
    return {**kept, "patches_uuid": model.patches_uuid, "added": added}


# The model that comes in


@pytest.mark.parametrize("already_patched", [False, True])
def test_model_that_comes_in_is_unchanged(easy, model, already_patched: bool) -> None:
    upstream = easy.apply(model, weight=0.5, lora=0.5) if already_patched else model
    before, prediction = state(upstream), predict(upstream)
    predict(easy.apply(upstream))
    assert state(upstream) == before
    assert torch.equal(predict(upstream), prediction)


def test_neutral_settings_are_the_identity(easy, model) -> None:
    plain = predict(model)
    patched = easy.apply(model, weight=0.0, lora=0.0)
    assert torch.equal(predict(patched), plain)
    assert state(patched) == state(model)


def test_weight_0_keeps_the_lora(easy, model) -> None:
    plain = predict(model)
    assert not torch.equal(predict(easy.apply(model, weight=0.0)), plain)


def test_two_branches_from_one_model_are_independent(easy, model) -> None:
    one = easy.apply(model, weight=1.0)
    alone = predict(one)
    other = easy.apply(model, weight=-0.5, lora=0.3)
    assert torch.equal(predict(other), predict(easy.apply(load_tiny_sdxl(), weight=-0.5, lora=0.3)))
    assert torch.equal(predict(one), alone)


@pytest.mark.parametrize("already_patched", [False, True])
def test_re_runs_on_one_upstream_model_do_not_accumulate(easy, model, already_patched: bool) -> None:
    upstream = easy.apply(model, weight=0.5) if already_patched else model
    first, second, third = (predict(easy.apply(upstream, weight=0.7)) for _ in range(3))
    assert torch.equal(first, second)
    assert torch.equal(first, third)


# Clones


def reachable_tensors(*roots: Any) -> dict[int, Tensor]:
    """By id, all tensors that a copy of these objects could copy: through containers, attributes and closures."""
    found, seen, left = {}, set(), list(roots)
    while left:
        thing = left.pop()
        if id(thing) in seen or isinstance(thing, (type, ModuleType, torch.nn.Module, ModelPatcher)):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            found[id(thing)] = thing
        elif isinstance(thing, FunctionType):
            left += [cell.cell_contents for cell in thing.__closure__ or ()]
        elif isinstance(thing, dict):
            left += thing.values()
        elif isinstance(thing, (list, tuple, set)):
            left += thing
        else:
            left += getattr(thing, "__dict__", {}).values()
    return found


def test_model_options_hold_no_tensor(easy, model) -> None:
    options = easy.apply(easy.apply(model)).model_options
    assert len(options["transformer_options"]["patches_replace"]["attn2"]) == SITES
    assert not reachable_tensors(options)


def test_clones_share_the_injection(easy, model) -> None:
    patched = easy.apply(model)
    assert (
        patched.clone().get_attachment("easyref").injections[0]
        is patched.get_attachment("easyref").injections[0]
    )


def test_deep_copies_of_the_options_share_every_tensor(easy, model) -> None:
    options = sampling_options(easy.apply(model))
    assert reachable_tensors(copy.deepcopy(options)).keys() == reachable_tensors(options).keys() != set()


def test_clone_predicts_the_same(easy, model) -> None:
    patched = easy.apply(model)
    assert torch.equal(predict(patched.clone()), predict(patched))


# The term


@in_float64
@pytest.mark.parametrize("weight", [-1.0, 0.5, 1.0, 3.0])
def test_term_is_attention_to_the_reference_tokens(easy, model, weight: float) -> None:
    with_lora = easy.apply(model, weight=0.0)
    wanted = predict(by_hand(easy, weight)(with_lora))
    assert golden.error(predict(easy.apply(model, weight)), wanted) <= 1e-6


@in_float64
def test_rows_follow_cond_or_uncond(easy, model) -> None:
    with_lora = easy.apply(model, weight=0.0)
    wanted = predict(by_hand(easy, 1.0, runs=(1, 0))(with_lora))
    assert golden.error(predict(easy.apply(model), cond_or_uncond=[0, 1]), wanted) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_unet_of_half_precision(easy, dtype: torch.dtype) -> None:
    full = predict(easy.apply(load_tiny_sdxl()))
    model = easy.apply(load_tiny_sdxl(dtype))
    half = predict(model)
    assert half.dtype == dtype
    assert golden.error(half, full) < golden.error(predict(easy.apply(model, weight=-1.0)), full) / 5
    assert golden.error(half, full) < 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_site_takes_queries_of_another_dtype_than_its_key_values(easy, model, dtype: torch.dtype) -> None:
    """Where the UNet's input and its arithmetic differ, as another pack's patch of the inputs can bring about."""
    injection = golden.part(easy.pack, "nodes.unet_patch.injection")
    patched = easy.apply(model)
    site = patched.model_options["transformer_options"]["patches_replace"]["attn2"]["input", 4, 0]
    step = injection.Step(
        1.0, {site.slot: injection.ActiveInjection(easy.key_values)}, rows_of_two_sides(easy.pack)
    )
    q, k, v = (torch.randn(2, tokens, 32).to(dtype) for tokens in (5, 7, 7))
    out = site(q, k, v, {injection.STEP: step, "n_heads": 2})
    assert out.dtype == dtype
    assert torch.isfinite(out).all()


# Several Apply nodes


def lora_strengths(model: ModelPatcher) -> set[float]:
    return {round(sum(patch[0] for patch in patches), 6) for patches in model.patches.values()}


@in_float64
def test_chained_terms_add_up_and_the_lora_counts_once(easy, model) -> None:
    whole = easy.apply(model, weight=0.8)
    halves = easy.apply(easy.apply(model, weight=0.3), weight=0.5)
    assert halves.patches.keys() == whole.patches.keys()
    assert lora_strengths(halves) == lora_strengths(whole) == {1.0}
    assert golden.error(predict(halves), predict(whole)) <= 1e-6


@in_float64
def test_chain_of_two_groups_does_not_depend_on_the_order(easy, model) -> None:
    other = easy.other_tokens()
    this_first = predict(easy.apply(easy.apply(model, 0.7), 0.4, tokens=other))
    other_first = predict(easy.apply(easy.apply(model, 0.4, tokens=other), 0.7))
    assert golden.error(this_first, other_first) <= 1e-6
    assert golden.error(this_first, predict(easy.apply(model, 0.7))) > 1e-3
    assert golden.error(this_first, predict(easy.apply(model, 0.4, tokens=other))) > 1e-3


@in_float64
@pytest.mark.parametrize("strengths", [(0.25, 1.0), (1.0, 0.25), (1.0, 0.0), (0.25, 0.5, 1.0)])
def test_strongest_lora_of_a_chain_counts(easy, model, strengths: tuple[float, ...]) -> None:
    chained = model
    for lora in strengths:
        chained = easy.apply(chained, weight=0.0, lora=lora)
    assert lora_strengths(chained) == {1.0}
    assert golden.error(predict(chained), predict(easy.apply(model, weight=0.0))) <= 1e-6


def test_two_checkpoints_each_add_their_lora(easy, model) -> None:
    another = copy.copy(easy.easyref)
    another.model = copy.copy(another.model)
    another.model.fingerprint = "another"
    another.require_same_checkpoint = lambda tokens: None
    both = dataclasses.replace(easy, easyref=another).apply(easy.apply(model, lora=0.5))
    assert lora_strengths(both) == {1.5}


def test_lora_of_every_attention_is_there(easy, model) -> None:
    attentions = {name for name, _ in model.model.named_modules() if name.endswith((".attn1", ".attn2"))}
    wanted = {f"{name}.{part}.weight" for name in attentions for part in ("to_q", "to_k", "to_v", "to_out.0")}
    assert easy.apply(model).patches.keys() == wanted


# Other packs' patches


@in_float64
@pytest.mark.parametrize("with_index", [True, False])
def test_replacement_set_before_ours_still_acts(easy, model, with_index: bool) -> None:
    foreign = replace_everywhere(model, easy, halved_query, with_index)
    wanted = predict(by_hand(easy, 1.0, foreign=halved_query)(easy.apply(model, weight=0.0)))
    assert golden.error(predict(easy.apply(foreign)), wanted) <= 1e-6


@in_float64
def test_replacement_of_a_whole_block_set_after_ours_acts_too(easy, model) -> None:
    wanted = predict(by_hand(easy, 1.0, foreign=halved_query)(easy.apply(model, weight=0.0)))
    after = replace_everywhere(easy.apply(model), easy, halved_query, with_index=False)
    assert golden.error(predict(after), wanted) <= 1e-6


def test_replacement_of_our_sites_set_after_ours_is_what_the_host_calls(easy, model) -> None:
    """The last replacement of a site wins: a pack that does not keep what it finds is not to be outwitted."""
    without = predict(replace_everywhere(easy.apply(model, weight=0.0), easy, halved_query))
    assert torch.equal(predict(replace_everywhere(easy.apply(model), easy, halved_query)), without)


@in_float64
def test_replacement_before_a_chain_acts_once(easy, model) -> None:
    foreign = replace_everywhere(model, easy, halved_query)
    wanted = predict(by_hand(easy, 1.0, foreign=halved_query)(easy.apply(model, weight=0.0)))
    assert golden.error(predict(easy.apply(easy.apply(foreign, 0.4), 0.6)), wanted) <= 1e-6


def test_lora_is_not_merged_again_when_only_the_weight_changes(easy, model) -> None:
    """The host merges anew when this name changes."""
    assert easy.apply(model, weight=0.3).patches_uuid == easy.apply(model, weight=0.9).patches_uuid


def test_lora_is_merged_again_when_its_strength_or_what_is_below_changes(easy, model) -> None:
    below = model.clone()
    below.add_patches({"diffusion_model.out.2.bias": ("diff", (torch.ones(4),))})
    patched = [easy.apply(model), easy.apply(model, lora=0.5), easy.apply(below), model]
    assert len({patcher.patches_uuid for patcher in patched}) == len(patched)


def test_predictions_follow_each_other_without_merging_again(easy, model) -> None:
    alone = predict(easy.apply(model, weight=0.9))
    predict(easy.apply(model, weight=0.3))
    assert torch.equal(predict(easy.apply(model, weight=0.9)), alone)


@in_float64
def test_another_lora_adds_to_ours_in_either_order(easy, model) -> None:
    def with_another(model: ModelPatcher) -> ModelPatcher:
        clone = model.clone()
        to_q = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_q.weight"
        assert clone.add_patches({to_q: ("diff", (torch.full((32, 32), 0.05),))})
        return clone

    before, after = predict(easy.apply(with_another(model))), predict(with_another(easy.apply(model)))
    assert golden.error(before, after) <= 1e-6
    assert golden.error(before, predict(easy.apply(model))) > 1e-4


def test_what_a_controlnet_adds_reaches_the_unet(easy, model) -> None:
    """A ControlNet hands the UNet residuals beside the call; what it adds to an unpatched UNet it adds to ours."""

    def control() -> dict[str, list]:
        return {"middle": [torch.full((2, 32, 4, 4), 0.5)], "input": [], "output": []}

    patched = easy.apply(model)
    assert golden.error(predict(patched, control=control()), predict(patched)) > 1e-4
    zero = {"middle": [torch.zeros(2, 32, 4, 4)], "input": [], "output": []}
    assert torch.equal(predict(patched, control=zero), predict(patched))


class MovingPatch:
    """A replacement with weights of its own, which the host moves, loads and cleans up through the patch."""

    def __init__(self) -> None:
        self.moved, self.cleaned = [], 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        return q

    def to(self, place: torch.device | torch.dtype) -> MovingPatch:
        self.moved.append(place)
        return self

    def models(self) -> list[str]:
        return ["its model"]

    def cleanup(self) -> None:
        self.cleaned += 1


@pytest.fixture
def moving(easy, model) -> tuple[MovingPatch, ModelPatcher]:
    patch = MovingPatch()
    model.set_model_attn2_replace(patch, *easy.easyref.model.checkpoint.sites[0])
    return patch, easy.apply(easy.apply(model))


def test_host_still_moves_what_we_replace(moving) -> None:
    patch, patched = moving
    patched.model_patches_to(torch.float16)
    assert patch.moved == [torch.float16]


class CopiedWhenMoved:
    """A replacement that acts only where the host has moved it, and is another object then."""

    def __init__(self, moved: bool = False) -> None:
        self.moved = moved

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        return q / 2 if self.moved else q

    def to(self, place: torch.device | torch.dtype) -> CopiedWhenMoved:
        return CopiedWhenMoved(moved=True)


def test_patch_that_is_copied_when_moved_acts(easy, model) -> None:
    halved = predict(easy.apply(replace_everywhere(model, easy, halved_query)))
    assert torch.equal(predict(easy.apply(replace_everywhere(model, easy, CopiedWhenMoved()))), halved)


def test_term_added_after_ours_survives_the_move_of_what_we_replace(easy, model) -> None:
    halved = add_as_other_packs_do(
        easy.apply(replace_everywhere(model, easy, halved_query)), foreign_term, **ANYWHERE
    )
    copied = add_as_other_packs_do(
        easy.apply(replace_everywhere(model, easy, CopiedWhenMoved())), foreign_term, **ANYWHERE
    )
    assert torch.equal(predict(copied), predict(halved))


def test_host_still_loads_the_models_of_what_we_replace(moving) -> None:
    assert moving[1].model_patches_models() == ["its model"]


def test_host_still_cleans_up_what_we_replace(moving) -> None:
    patch, patched = moving
    patched.cleanup()
    assert patch.cleaned == 1


def foreign_term(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any], **_: Any
) -> Tensor:
    """What another pack adds: nothing of ours, and different at each site."""
    return q * (0.1 + 0.05 * extra_options["block"][1])


def text_and_foreign_term(q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
    out = text_attention(q, k, v, extra_options)
    return out + foreign_term(out, q, k, v, extra_options)


@in_float64
def test_term_added_after_ours_acts(easy, model) -> None:
    wanted = predict(by_hand(easy, 1.0, foreign=text_and_foreign_term)(easy.apply(model, weight=0.0)))
    both = add_as_other_packs_do(easy.apply(model), foreign_term, **ANYWHERE)
    assert golden.error(predict(both), wanted) <= 1e-6


def test_term_added_after_ours_is_given_what_the_other_pack_asked_for(easy, model) -> None:
    given = []

    def callback(out, q, k, v, extra_options, **options):
        given.append((out.shape == q.shape, extra_options["block"][0], options))
        return torch.zeros_like(out)

    options = {**ANYWHERE, "module_key": "3", "weight": 0.5}
    predict(add_as_other_packs_do(easy.apply(model), callback, **options))
    assert [block for _, block, _ in given] == ["input"] * 6 + ["middle"] * 2 + ["output"] * 9
    assert all(same_shape and asked == options for same_shape, _, asked in given)


@in_float64
def test_term_added_to_a_chain_acts_once(easy, model) -> None:
    wanted = predict(add_as_other_packs_do(easy.apply(model, 0.8), foreign_term, **ANYWHERE))
    chain = easy.apply(easy.apply(model, 0.3), 0.5)
    assert golden.error(predict(add_as_other_packs_do(chain, foreign_term, **ANYWHERE)), wanted) <= 1e-6


@in_float64
def test_term_added_between_two_of_ours_acts_once(easy, model) -> None:
    wanted = predict(add_as_other_packs_do(easy.apply(model, 0.8), foreign_term, **ANYWHERE))
    between = easy.apply(add_as_other_packs_do(easy.apply(model, 0.3), foreign_term, **ANYWHERE), 0.5)
    assert golden.error(predict(between), wanted) <= 1e-6


@pytest.mark.parametrize(
    ("sigma", "acts"), [(3.0, False), (2.0, True), (1.5, True), (1.0, True), (0.5, False)]
)
def test_term_added_after_ours_keeps_its_window(easy, model, sigma: float, acts: bool) -> None:
    ours = easy.apply(model)
    both = add_as_other_packs_do(ours, foreign_term, sigma_start=2.0, sigma_end=1.0)
    assert torch.equal(predict(both, sigma), predict(ours, sigma)) != acts


def test_term_added_to_a_clone_leaves_upstream_alone(easy, model) -> None:
    upstream = easy.apply(model)
    before, prediction = state(upstream), predict(upstream)
    first, second, third = (
        predict(add_as_other_packs_do(upstream, foreign_term, **ANYWHERE)) for _ in range(3)
    )
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    assert state(upstream) == before
    assert torch.equal(predict(upstream), prediction)


def test_term_added_to_a_clone_stays_in_its_clones(easy, model) -> None:
    both = add_as_other_packs_do(easy.apply(model), foreign_term, **ANYWHERE)
    assert torch.equal(predict(both.clone()), predict(both))


def scale_text(
    n: Tensor, context: Tensor, value: Tensor, extra_options: dict[str, Any]
) -> tuple[Tensor, ...]:
    return n, context * 0.5, value * 0.5


@in_float64
@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_patch_of_the_attention_inputs_acts(easy, model, first: str) -> None:
    def halved_text(q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        return text_attention(q, k / 2, v / 2, extra_options)

    wanted = predict(by_hand(easy, 1.0, foreign=halved_text)(easy.apply(model, weight=0.0)))
    patched = model.clone() if first == "theirs" else easy.apply(model)
    patched.set_model_attn2_patch(scale_text)
    patched = easy.apply(patched) if first == "theirs" else patched
    assert golden.error(predict(patched), wanted) <= 1e-6


@in_float64
def test_patch_of_the_attention_output_acts(easy, model) -> None:
    def doubled(n: Tensor, extra_options: dict[str, Any]) -> Tensor:
        return n * 2

    wanted = by_hand(easy, 1.0)(easy.apply(model, weight=0.0))
    patched = easy.apply(model)
    for each in (wanted, patched):
        each.set_model_attn2_output_patch(doubled)
    assert golden.error(predict(patched), predict(wanted)) <= 1e-6
    assert golden.error(predict(patched), predict(easy.apply(model))) > 1e-3


def test_two_of_our_models_with_different_lora_are_both_right_in_turn(easy, model) -> None:
    """The clones share one UNet, whose weights the host patches anew for each."""
    weak, strong = easy.apply(model, lora=0.2), easy.apply(model, lora=1.0)
    first = predict(weak), predict(strong)
    assert torch.equal(predict(weak), first[0])
    assert torch.equal(predict(strong), first[1])


# The window


@pytest.fixture
def windowed(easy, model) -> tuple[ModelPatcher, ModelPatcher, ModelPatcher]:
    """A model in which the references act from 30 % to 70 %, one in which they always act, and one with LoRA only."""
    return easy.apply(model, start=0.3, end=0.7), easy.apply(model), easy.apply(model, weight=0.0)


@pytest.mark.parametrize("percent", [0.3, 0.5, 0.7])
def test_inside_the_window_references_act(windowed, percent: float) -> None:
    some, always, _ = windowed
    sigma = sigma_at(some, percent)
    assert torch.equal(predict(some, sigma), predict(always, sigma))


@pytest.mark.parametrize("percent", [0.0, 0.29, 0.71, 1.0])
def test_outside_the_window_only_the_lora_is_left(windowed, percent: float) -> None:
    some, always, lora_only = windowed
    sigma = sigma_at(some, percent)
    assert torch.equal(predict(some, sigma), predict(lora_only, sigma))
    assert not torch.equal(predict(some, sigma), predict(always, sigma))


def test_window_from_0_acts_at_the_first_step_of_any_schedule(easy, model) -> None:
    some, always = easy.apply(model, end=0.5), easy.apply(model)
    assert torch.equal(predict(some, HUGE * 10), predict(always, HUGE * 10))


def test_window_to_1_acts_at_the_last_step_of_any_schedule(easy, model) -> None:
    some, always = easy.apply(model, start=0.5), easy.apply(model)
    assert torch.equal(predict(some, 0.0), predict(always, 0.0))


def test_empty_window_is_weight_0(easy, model) -> None:
    assert torch.equal(predict(easy.apply(model, start=0.6, end=0.4)), predict(easy.apply(model, weight=0.0)))


@in_float64
def test_each_node_of_a_chain_has_its_window(easy, model) -> None:
    early = easy.apply(model, 0.4, end=0.5)
    chain = easy.apply(early, 0.7, start=0.5, tokens=easy.other_tokens())
    late = easy.apply(model, 0.7, tokens=easy.other_tokens())
    assert torch.equal(predict(chain, sigma_at(model, 0.2)), predict(early, sigma_at(model, 0.2)))
    assert golden.error(predict(chain, sigma_at(model, 0.8)), predict(late, sigma_at(model, 0.8))) <= 1e-6


# Work and memory


def watched_sampling(easy: Easy, model: ModelPatcher, steps: int = 3) -> list:
    """A sampling with CFG, and the reference terms it computed."""
    guider = cfg_guider(model, random_conditioning(1, 77), random_conditioning(2, 77))
    with watch_attention(easy.pack, model) as calls:
        sample(guider, steps)
    return calls


def places(calls: list) -> Iterator[tuple[str, Tensor]]:
    return ((call.site, tensor) for call in calls for tensor in call.key_value)


def test_key_values_are_computed_once_for_all_nodes_and_samplings(pack, model) -> None:
    easy = golden_easy(pack)
    computed = []
    easy.easyref.model.kv.register_forward_hook(lambda *_: computed.append(1))
    for _ in range(2):
        sample(
            cfg_guider(
                easy.apply(easy.apply(model, 0.5)), random_conditioning(1, 77), random_conditioning(2, 77)
            )
        )
    assert computed == [1, 1]  # a row of each side


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_key_values_are_placed_once_a_sampling(easy, dtype: torch.dtype) -> None:
    calls = watched_sampling(easy, easy.apply(load_tiny_sdxl(dtype)))
    assert len(calls) == 3 * SITES
    assert len({id(tensor) for _, tensor in places(calls)}) == 2 * SITES


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_key_values_are_placed_in_the_arithmetic_of_the_unet(easy, dtype: torch.dtype) -> None:
    calls = watched_sampling(easy, easy.apply(load_tiny_sdxl(dtype)), steps=1)
    assert {tensor.dtype for _, tensor in places(calls)} == {dtype}


def test_sampling_ends_with_placed_key_values_released(easy) -> None:
    patched = easy.apply(load_tiny_sdxl(torch.bfloat16))  # of float32 the held tensors themselves are used
    placed = [weakref.ref(tensor) for _, tensor in places(watched_sampling(easy, patched))]
    gc.collect()
    assert {reference() for reference in placed} == {None}


def test_sampling_that_fails_releases_placed_key_values(easy) -> None:
    placed = []

    def broken(out, q, k, v, extra_options, **_):
        placed.extend(
            weakref.ref(tensor)
            for active in extra_options["easyref_step"].active.values()
            for tensor in active.key_values[0]
        )
        raise RuntimeError("stopped")

    patched = add_as_other_packs_do(easy.apply(load_tiny_sdxl(torch.bfloat16)), broken, **ANYWHERE)
    with pytest.raises(RuntimeError, match="stopped"):
        watched_sampling(easy, patched)
    gc.collect()
    assert placed
    assert {reference() for reference in placed} == {None}


def test_sampling_again_after_release_is_the_same(easy, model) -> None:
    guider = cfg_guider(easy.apply(model), random_conditioning(1, 77), random_conditioning(2, 77))
    assert torch.equal(sample(guider), sample(guider))


class CountReads(TorchDispatchMode):
    """Counts how often a number is read back from a tensor: on a GPU each such read waits for all work before it."""

    READS = {getattr(torch.ops.aten, name).default for name in ("item", "is_nonzero", "_local_scalar_dense")}

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in self.READS
        return function(*args, **(kwargs or {}))


def test_one_number_a_step_is_read_from_the_device(easy, model) -> None:
    predictions = [model, easy.apply(easy.apply(model, 0.5, start=0.1, end=0.9), 0.5)]
    counts = []
    for each in predictions:
        predict(each)
        with CountReads() as reads:
            predict(each)
        counts.append(reads.count)
    assert counts[1] - counts[0] == 1


# All 70


@pytest.fixture(scope="module")
def full_depth(pack, easy, tmp_path_factory) -> tuple[Easy, dict[str, Tensor]]:
    """An EasyRef for SDXL's depths (narrow), saved and loaded, and its projections by the names in its file."""
    released = json.loads((golden.GOLDEN / "released_layout.json").read_text())["keys"]
    model, random = easy.easyref.model, torch.Generator().manual_seed(0)
    sites = golden.part(pack, "easyref_core.unet.layout").sdxl_sites()
    stored = {}
    for i, site in enumerate(sites):
        width = released[f"unet.{site.diffusers}.attn2.processor.to_k_ip.weight"][0] // NARROWER
        for kind in ("to_k_ip", "to_v_ip"):
            weight = torch.randn(width, model.config.token_width, generator=random)
            stored[f"kv.{kind}.{i}.weight"] = weight
    path = tmp_path_factory.mktemp("full_depth") / "seventy.safetensors"
    save = golden.part(pack, "easyref_core.checkpoint.checkpoint").save
    save(path, model.config, sites, model.mllm.state_dict() | stored)
    hosted = golden.part(pack, "nodes.host.hosted_model").load_hosted(
        path, golden.MLLM, golden.MLLM, "auto", None
    )
    with torch.inference_mode():
        loaded = Easy(pack, hosted, golden.tokens(pack, hosted))
    return loaded, comfy.utils.load_torch_file(str(path))


@pytest.fixture(scope="module")
def deep_sdxl() -> ModelPatcher:
    """SDXL's depths and proportions, so much narrower."""
    return random_sdxl(
        seed=0,
        channel_mult=[1, 2, 4],
        transformer_depth=[0, 0, 2, 2, 10, 10],
        transformer_depth_middle=10,
        transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10],
    )


def test_all_70_sites_fire_once_a_call(full_depth, deep_sdxl) -> None:
    easy, _ = full_depth
    patched = easy.apply(deep_sdxl, lora=0.0)
    with watch_attention(easy.pack, patched) as calls:
        predict(patched)
    attentions = [
        name for name, _ in deep_sdxl.model.diffusion_model.named_modules() if name.endswith(".attn2")
    ]
    assert len(attentions) == 70
    assert sorted(call.site for call in calls) == sorted(attentions)


def test_each_of_70_sites_gets_the_projections_stored_under_its_name(full_depth, deep_sdxl) -> None:
    easy, file = full_depth
    in_diffusers = {
        host: diffusers
        for diffusers, host in comfy.utils.unet_to_diffusers(deep_sdxl.model.model_config.unet_config).items()
    }
    rows = torch.cat([easy.tokens.unconditional, easy.tokens.conditional])
    patched = easy.apply(deep_sdxl, lora=0.0)
    with watch_attention(easy.pack, patched) as calls:
        predict(patched)
    for call in calls:
        path = in_diffusers[f"{call.site}.to_q.weight"].removesuffix(".to_q.weight")
        for kind, found in zip(("to_k_ip", "to_v_ip"), call.key_value, strict=True):
            wanted = rows @ file[f"unet.{path}.processor.{kind}.weight"].mT
            torch.testing.assert_close(found, wanted, msg=lambda m, at=f"{path} {kind}": f"{at}: {m}")


def test_adapters_are_numbered_down_up_middle(full_depth) -> None:
    """The order of diffusers' attn_processors, by which training files number them."""
    easy, _ = full_depth
    blocks = [site.block for site in easy.easyref.model.checkpoint.sites]
    assert blocks == ["input"] * 24 + ["output"] * 36 + ["middle"] * 10


# The host's own hands


@pytest.mark.parametrize("place", [torch.float16, torch.device("cpu")])
def test_moving_a_patch_returns_it(easy, model, place: torch.dtype | torch.device) -> None:
    patched = easy.apply(model)
    before = dict(patched.model_options["transformer_options"]["patches_replace"]["attn2"])
    patched.model_patches_to(place)
    assert patched.model_options["transformer_options"]["patches_replace"]["attn2"] == before


def test_compiled_unet_is_recognised(easy, model) -> None:
    """torch.compile, as nodes apply it, puts a module around the UNet under whose name all others then are."""
    compiled = torch.nn.Module()
    compiled._orig_mod = model.model.diffusion_model
    model.add_object_patch("diffusion_model", compiled)
    assert easy.apply(model).get_attachment("easyref").injections


def test_wrappers_and_callbacks_are_there_once_in_a_chain(easy, model) -> None:
    chained = easy.apply(easy.apply(model))
    counted = {
        kind: len(chained.get_wrappers(kind, "easyref"))
        for kind in (WrappersMP.PREDICT_NOISE, WrappersMP.CALC_COND_BATCH, WrappersMP.DIFFUSION_MODEL)
    }
    assert set(counted.values()) == {1}
    assert len(chained.get_callbacks(CallbacksMP.ON_CLEANUP, "easyref")) == 1
