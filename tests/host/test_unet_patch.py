"""Effect of Apply EasyRef on a MODEL, and everything that it leaves unchanged.

Pinned: the input model is not modified; neutral settings are the identity; re-runs and clones accumulate
nothing and copy nothing; the term itself, against attention written out by hand; chains of Apply nodes; other
packs' patches at the same site, before and after; the window; K and V computed once, moved once, released;
all 70 sites.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import comfy.samplers
import comfy.utils
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from devkit.host import golden
from devkit.host.sampling import (
    SITES,
    Attended,
    Easy,
    easy_of_sites,
    golden_easy,
    in_float64,
    predict,
    sample_cfg,
    sampling_options,
    sigma_at,
    state,
    watch_attention,
)
from devkit.host.tiny_nodes.tiny_sdxl import load_tiny_sdxl, random_sdxl

from .by_hand import by_hand, text_attention
from .other_packs import Adapter, with_lora, with_term

NARROWER = 10  # the UNet with SDXL's depths is this many times narrower than SDXL


def halved_query(q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
    """Another pack's replacement: its output depends on nothing of EasyRef's."""
    return q / 2


def replace_everywhere(model: ModelPatcher, easy: Easy, patch: Any, with_index: bool = True) -> ModelPatcher:
    clone = model.clone()
    for block, number, index in easy.easyref.model.checkpoint.sites:
        clone.set_model_attn2_replace(patch, block, number, index if with_index else None)
    return clone


def assert_equal_predictions(*models: ModelPatcher) -> None:
    first, *others = [predict(model) for model in models]
    assert all(torch.equal(first, other) for other in others)


# The input model


@pytest.mark.parametrize("already_patched", [False, True])
def test_input_model_is_unchanged_and_re_runs_do_not_accumulate(easy, model, already_patched: bool) -> None:
    upstream = easy.apply(model, weight=0.5) if already_patched else model
    before, prediction = state(upstream), predict(upstream)
    assert_equal_predictions(*(easy.apply(upstream, weight=0.7) for _ in range(3)))
    assert state(upstream) == before
    assert torch.equal(predict(upstream), prediction)


def test_neutral_settings_are_the_identity(easy, model) -> None:
    patched = easy.apply(model, weight=0.0, lora=0.0)
    assert_equal_predictions(patched, model)
    assert state(patched) == state(model)


def test_weight_0_keeps_the_lora(easy, model) -> None:
    assert not torch.equal(predict(easy.apply(model, weight=0.0)), predict(model))


def test_two_branches_from_one_model_are_independent(easy, model) -> None:
    one = easy.apply(model, weight=1.0)
    alone = predict(one)
    assert_equal_predictions(*(easy.apply(each, -0.5, lora=0.3) for each in (model, load_tiny_sdxl())))
    assert torch.equal(predict(one), alone)


# Clones


def reachable_tensors(*roots: Any) -> dict[int, Tensor]:
    """By id, all tensors that are reachable from objects through containers, attributes and closures."""
    found, visited, left = {}, set(), list(roots)
    while left:
        thing = left.pop()
        if id(thing) in visited or isinstance(thing, (type, ModuleType, torch.nn.Module, ModelPatcher)):
            continue
        visited.add(id(thing))
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
    patched = easy.apply(easy.apply(model))
    assert len(patched.model_options["transformer_options"]["patches_replace"]["attn2"]) == SITES
    assert reachable_tensors(patched.attachments), "the search does not even find K and V where they are"
    assert not reachable_tensors(patched.model_options)


def test_clones_share_the_injection_and_predict_the_same(easy, model) -> None:
    patched = easy.apply(model)
    clone = patched.clone()
    injections = [each.get_attachment("easyref").injections[0] for each in (patched, clone)]
    assert injections[0] is injections[1]
    assert_equal_predictions(clone, patched)


def test_deep_copies_of_the_options_share_every_tensor(easy, model) -> None:
    options = sampling_options(easy.apply(model))
    assert reachable_tensors(copy.deepcopy(options)).keys() == reachable_tensors(options).keys() != set()


# The term


@in_float64
@pytest.mark.parametrize("weight", [-1.0, 0.5, 1.0, 3.0])
def test_term_is_attention_to_the_reference_tokens(easy, model, weight: float) -> None:
    expected = predict(by_hand(easy, model, weight))
    assert golden.error(predict(easy.apply(model, weight)), expected) <= 1e-6


@in_float64
def test_rows_follow_cond_or_uncond(easy, model) -> None:
    expected = predict(by_hand(easy, model, runs=(1, 0)))
    assert golden.error(predict(easy.apply(model), cond_or_uncond=[0, 1]), expected) <= 1e-6


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
    """As where another pack's patch casts the inputs of the attention."""
    module = golden.part(easy.pack, "nodes.unet_patch.step")
    patched = easy.apply(model)
    site = patched.model_options["transformer_options"]["patches_replace"]["attn2"]["input", 4, 0]
    active = {site.slot: module.ActiveInjection(easy.key_values)}
    step = module.Step(1.0, active, easy.two_sided_layout())
    q, k, v = (torch.randn(2, tokens, 32).to(dtype) for tokens in (5, 7, 7))
    out = site(q, k, v, {module.STEP: step, "n_heads": 2})
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
    another = object.__new__(type(easy.easyref))  # copy.copy would pickle it
    vars(another).update(vars(easy.easyref), model=copy.copy(easy.easyref.model))
    another.model.fingerprint = "another"
    another.require_same_checkpoint = lambda tokens: None
    both = dataclasses.replace(easy, easyref=another).apply(easy.apply(model, lora=0.5))
    assert lora_strengths(both) == {1.5}


def test_lora_of_every_attention_is_there(easy, model) -> None:
    attentions = {name for name, _ in model.model.named_modules() if name.endswith((".attn1", ".attn2"))}
    wanted = {f"{name}.{part}.weight" for name in attentions for part in ("to_q", "to_k", "to_v", "to_out.0")}
    assert easy.apply(model).patches.keys() == wanted


# Other packs' patches


def halved_text(q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
    return text_attention(q, k / 2, v / 2, extra_options)


def with_halved_inputs(model: ModelPatcher) -> ModelPatcher:
    clone = model.clone()
    clone.set_model_attn2_patch(lambda n, context, value, extra_options: (n, context * 0.5, value * 0.5))
    return clone


# {name: (the patched model, the attention that the term is added to)}
PATCHES: dict[str, tuple[Callable[[Easy, ModelPatcher], ModelPatcher], Callable[..., Tensor]]] = {
    "replacement before": (lambda e, m: e.apply(replace_everywhere(m, e, halved_query)), halved_query),
    "whole block before": (lambda e, m: e.apply(replace_everywhere(m, e, halved_query, False)), halved_query),
    "whole block after": (lambda e, m: replace_everywhere(e.apply(m), e, halved_query, False), halved_query),
    "replacement before a chain": (
        lambda e, m: e.apply(e.apply(replace_everywhere(m, e, halved_query), 0.4), 0.6),
        halved_query,
    ),
    "term after": (lambda e, m: with_term(e.apply(m)), Adapter()),
    "term after a chain": (lambda e, m: with_term(e.apply(e.apply(m, 0.4), 0.6)), Adapter()),
    "term within a chain": (lambda e, m: e.apply(with_term(e.apply(m, 0.4)), 0.6), Adapter()),
    "inputs before": (lambda e, m: e.apply(with_halved_inputs(m)), halved_text),
    "inputs after": (lambda e, m: with_halved_inputs(e.apply(m)), halved_text),
}


@in_float64
@pytest.mark.parametrize("name", PATCHES)
def test_patch_of_another_pack_and_the_term_act_once_each(easy, model, name: str) -> None:
    patch, attention = PATCHES[name]
    expected = predict(by_hand(easy, model, foreign=attention))
    assert golden.error(predict(patch(easy, model)), expected) <= 1e-6


def test_replacement_set_after_ours_is_the_one_that_the_host_calls(easy, model) -> None:
    """The last replacement of a site wins, also over patches that it does not call."""
    applied = (easy.apply(model, weight) for weight in (0.0, 1.0))
    assert_equal_predictions(*(replace_everywhere(each, easy, halved_query) for each in applied))


def test_lora_is_not_merged_again_when_only_the_weight_changes(easy, model) -> None:
    """The host merges again when this name changes."""
    assert easy.apply(model, weight=0.3).patches_uuid == easy.apply(model, weight=0.9).patches_uuid


def test_lora_is_merged_again_when_its_strength_or_the_patches_below_change(easy, model) -> None:
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
    before, after = predict(easy.apply(with_lora(model))), predict(with_lora(easy.apply(model)))
    assert golden.error(before, after) <= 1e-6
    assert golden.error(before, predict(easy.apply(model))) > 1e-4


def test_controlnet_reaches_the_unet(easy, model) -> None:
    """A ControlNet passes residuals to the UNet beside the inputs."""
    patched = easy.apply(model)

    def controlled(value: float) -> Tensor:
        residuals = {"middle": [torch.full((2, 32, 4, 4), value)], "input": [], "output": []}
        return predict(patched, control=residuals)

    assert golden.error(controlled(0.5), predict(patched)) > 1e-4
    assert torch.equal(controlled(0.0), predict(patched))


class MovingPatch:
    """A replacement that acts only after the host has moved it, which returns another object."""

    def __init__(self, *models: str, moved: bool = False) -> None:
        self.loaded, self.moved, self.cleanups = list(models), moved, 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        return q / 2 if self.moved else q

    def to(self, target: torch.device | torch.dtype) -> MovingPatch:
        return MovingPatch(*self.loaded, moved=True)

    def models(self) -> list[str]:
        return self.loaded

    def cleanup(self) -> None:
        self.cleanups += 1


@pytest.mark.parametrize("added", [lambda model: model, with_term], ids=["alone", "with a term after"])
def test_host_moves_the_patch_that_ours_calls(easy, model, added: Callable) -> None:
    replaced = (replace_everywhere(model, easy, patch) for patch in (halved_query, MovingPatch()))
    assert_equal_predictions(*(added(easy.apply(each)) for each in replaced))


def test_host_loads_and_cleans_up_the_patch_that_ours_calls(easy, model) -> None:
    patch = MovingPatch("its model")
    model.set_model_attn2_replace(patch, *easy.easyref.model.checkpoint.sites[0])
    patched = easy.apply(easy.apply(model))
    assert patched.model_patches_models() == ["its model"]
    patched.cleanup()
    assert patch.cleanups == 1


def test_added_term_receives_the_options_of_its_pack(easy, model) -> None:
    calls = []

    def callback(out, q, k, v, extra_options, **options):
        calls.append((out.shape == q.shape, extra_options["block"][0], options))
        return torch.zeros_like(out)

    added = {"sigma_start": 1e9, "sigma_end": 0.0, "module_key": "3", "weight": 0.5}
    predict(with_term(easy.apply(model), callback, **added))
    assert [block for _, block, _ in calls] == ["input"] * 6 + ["middle"] * 2 + ["output"] * 9
    assert all(same_shape and options == added for same_shape, _, options in calls)


@pytest.mark.parametrize("sigma", [3.0, 2.0, 1.5, 1.0, 0.5])
def test_added_term_keeps_its_window(easy, model, sigma: float) -> None:
    ours = easy.apply(model)
    both = with_term(ours, sigma_start=2.0, sigma_end=1.0)
    assert torch.equal(predict(both, sigma), predict(ours, sigma)) == (not 1.0 <= sigma <= 2.0)


def test_term_added_to_a_clone_stays_in_its_clones(easy, model) -> None:
    upstream = easy.apply(model)
    before, prediction = state(upstream), predict(upstream)
    added = [with_term(upstream) for _ in range(3)]
    assert_equal_predictions(*added, added[0].clone())
    assert state(upstream) == before
    assert torch.equal(predict(upstream), prediction)


@in_float64
def test_patch_of_the_attention_output_acts(easy, model) -> None:
    expected, patched = by_hand(easy, model), easy.apply(model)
    for each in (expected, patched):
        each.set_model_attn2_output_patch(lambda n, extra_options: n * 2)
    assert golden.error(predict(patched), predict(expected)) <= 1e-6
    assert golden.error(predict(patched), predict(easy.apply(model))) > 1e-3


def test_two_of_our_models_with_different_lora_are_both_right_in_turn(easy, model) -> None:
    """The clones share one UNet, whose weights the host patches for each in turn."""
    weak, strong = easy.apply(model, lora=0.2), easy.apply(model, lora=1.0)
    first = predict(weak), predict(strong)
    assert torch.equal(predict(weak), first[0])
    assert torch.equal(predict(strong), first[1])


# The window


@pytest.mark.parametrize("percent", [0.0, 0.29, 0.3, 0.5, 0.7, 0.71, 1.0])
def test_references_act_inside_the_window_only(easy, model, percent: float) -> None:
    acts, sigma = 0.3 <= percent <= 0.7, sigma_at(model, percent)
    found = predict(easy.apply(model, start=0.3, end=0.7), sigma)
    assert torch.equal(found, predict(easy.apply(model), sigma)) == acts
    assert torch.equal(found, predict(easy.apply(model, weight=0.0), sigma)) != acts


@pytest.mark.parametrize(("window", "sigma"), [({"end": 0.5}, 1e10), ({"start": 0.5}, 0.0)])
def test_window_from_0_or_to_1_reaches_the_end_of_any_schedule(easy, model, window, sigma) -> None:
    assert torch.equal(predict(easy.apply(model, **window), sigma), predict(easy.apply(model), sigma))


def test_empty_window_is_weight_0(easy, model) -> None:
    assert_equal_predictions(easy.apply(model, start=0.6, end=0.4), easy.apply(model, weight=0.0))


@in_float64
def test_each_node_of_a_chain_has_its_window(easy, model) -> None:
    early = easy.apply(model, 0.4, end=0.5)
    chain = easy.apply(early, 0.7, start=0.5, tokens=easy.other_tokens())
    late = easy.apply(model, 0.7, tokens=easy.other_tokens())
    assert torch.equal(predict(chain, sigma_at(model, 0.2)), predict(early, sigma_at(model, 0.2)))
    assert golden.error(predict(chain, sigma_at(model, 0.8)), predict(late, sigma_at(model, 0.8))) <= 1e-6


# Work and memory


def attended(easy: Easy, model: ModelPatcher, steps: int = 3) -> list[Attended]:
    """The reference terms of a sampling with CFG."""
    with watch_attention(easy.pack, model) as calls:
        sample_cfg(model, steps=steps)
    return calls


def tensors_of(calls: list[Attended]) -> Iterator[Tensor]:
    return (tensor for call in calls for tensor in call.key_value)


def test_key_values_are_computed_once_for_all_nodes_and_samplings(pack, model) -> None:
    easy = golden_easy(pack)
    computed = []
    easy.easyref.model.kv.register_forward_hook(lambda *_: computed.append(1))
    for _ in range(2):
        sample_cfg(easy.apply(easy.apply(model, 0.5)))
    assert computed == [1, 1]  # a row of each side


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_key_values_are_moved_once_a_sampling_in_the_dtype_of_the_unet(easy, dtype: torch.dtype) -> None:
    calls = attended(easy, easy.apply(load_tiny_sdxl(dtype)))
    assert len(calls) == 3 * SITES
    assert len({id(tensor) for tensor in tensors_of(calls)}) == 2 * SITES
    assert {tensor.dtype for tensor in tensors_of(calls)} == {dtype}


def test_sampling_ends_with_moved_key_values_released(easy) -> None:
    patched = easy.apply(load_tiny_sdxl(torch.bfloat16))  # in float32 the table itself is used
    moved = [weakref.ref(tensor) for tensor in tensors_of(attended(easy, patched))]
    gc.collect()
    assert {reference() for reference in moved} == {None}


def test_sampling_that_fails_releases_moved_key_values(easy) -> None:
    moved = []

    def broken(out, q, k, v, extra_options, **_):
        for active in extra_options["easyref_step"].active.values():
            moved.extend(map(weakref.ref, active.key_values[0]))
        raise RuntimeError("stopped")

    patched = with_term(easy.apply(load_tiny_sdxl(torch.bfloat16)), broken)
    with pytest.raises(RuntimeError, match="stopped"):
        attended(easy, patched)
    gc.collect()
    assert moved
    assert {reference() for reference in moved} == {None}


class CountOperations(TorchDispatchMode):
    """Counts of the operations that run within."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function] += 1
        return function(*args, **(kwargs or {}))


def operations(model: ModelPatcher) -> Counter[Any]:
    """Counts of the operations of a UNet call, after the first one, which merges the LoRA."""
    predict(model)
    with CountOperations() as counted:
        predict(model)
    return counted.counts


def test_one_number_a_step_is_read_from_the_device(easy, model) -> None:
    """On a GPU each such read waits for all work before it."""
    reads = [getattr(torch.ops.aten, name).default for name in ("item", "is_nonzero", "_local_scalar_dense")]
    models = model, easy.apply(easy.apply(model, 0.5, start=0.1, end=0.9), 0.5)
    counts = [sum(operations(each)[read] for read in reads) for each in models]
    assert counts[1] - counts[0] == 1


def test_nothing_of_the_lora_runs_while_sampling(easy, model) -> None:
    """It is merged into the weights."""
    assert operations(easy.apply(model, weight=0.0)) == operations(model)


# All 70


@pytest.fixture(scope="module")
def full_depth(pack, easy, tmp_path_factory) -> tuple[Easy, dict[str, Tensor]]:
    """An EasyRef for SDXL's depths (narrow), saved and loaded, and its file's projections by name."""
    released = json.loads((golden.GOLDEN / "released_layout.json").read_text())["keys"]
    widths = {
        site: released[f"unet.{site.diffusers}.attn2.processor.to_k_ip.weight"][0] // NARROWER
        for site in golden.part(pack, "easyref_core.unet.layout").sdxl_sites()
    }
    path = tmp_path_factory.mktemp("full_depth") / "seventy.safetensors"
    return easy_of_sites(easy, widths, path), comfy.utils.load_torch_file(str(path))


@pytest.fixture(scope="module")
def deep_sdxl() -> ModelPatcher:
    """SDXL's depths and proportions, NARROWER times narrower."""
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
    modules = dict(deep_sdxl.model.diffusion_model.named_modules())
    attentions = [name for name in modules if name.endswith(".attn2")]
    assert len(attentions) == 70
    assert sorted(call.site for call in calls) == sorted(attentions)


def test_each_of_70_sites_gets_the_projections_stored_under_its_name(full_depth, deep_sdxl) -> None:
    easy, file = full_depth
    names = comfy.utils.unet_to_diffusers(deep_sdxl.model.model_config.unet_config)
    in_diffusers = {host: diffusers for diffusers, host in names.items()}
    rows = torch.cat([easy.tokens.unconditional, easy.tokens.conditional])
    patched = easy.apply(deep_sdxl, lora=0.0)
    with watch_attention(easy.pack, patched) as calls:
        predict(patched)
    for call in calls:
        path = in_diffusers[f"{call.site}.to_q.weight"].removesuffix(".to_q.weight")
        for kind, found in zip(("to_k_ip", "to_v_ip"), call.key_value, strict=True):
            wanted = rows @ file[f"unet.{path}.processor.{kind}.weight"].mT
            torch.testing.assert_close(found, wanted, msg=lambda m, at=f"{path} {kind}": f"{at}: {m}")


@pytest.mark.parametrize("target", [torch.float16, torch.device("cpu")])
def test_moving_a_patch_returns_it(easy, model, target: torch.dtype | torch.device) -> None:
    patched = easy.apply(model)
    before = dict(patched.model_options["transformer_options"]["patches_replace"]["attn2"])
    patched.model_patches_to(target)
    assert patched.model_options["transformer_options"]["patches_replace"]["attn2"] == before


def test_compiled_unet_is_recognised(easy, model) -> None:
    """torch.compile, as nodes apply it, wraps the UNet in a module with other names."""
    model.add_object_patch("diffusion_model", torch.compile(model.model.diffusion_model))
    assert easy.apply(model).get_attachment("easyref").injections


def test_wrappers_and_callbacks_are_there_once_in_a_chain(easy, model) -> None:
    chained = easy.apply(easy.apply(model))
    for kind in (WrappersMP.PREDICT_NOISE, WrappersMP.CALC_COND_BATCH, WrappersMP.DIFFUSION_MODEL):
        assert len(chained.get_wrappers(kind, "easyref")) == 1, kind
    assert len(chained.get_callbacks(CallbacksMP.ON_CLEANUP, "easyref")) == 1
