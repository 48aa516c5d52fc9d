"""Rows of a batch that attend to the conditional reference tokens, and to the unconditional ones.

By content: a probe at the UNet records, for each run of rows, its prompt and its K and V. Pinned for the
host's guiders and nodes, for every way in which the host orders, drops, splits, repeats or copies
conditionings, and, for CFG, in numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import comfy.sample
import comfy.samplers
import node_helpers
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_extras import nodes_custom_sampler, nodes_pag, nodes_perpneg, nodes_sag
from torch import Tensor

from devkit.host import golden
from devkit.host.sampling import Easy, cfg_guider, fixed_noise, in_windows, sample, watch_attention
from devkit.host.tiny_nodes.tiny_sdxl import load_tiny_sdxl, random_conditioning

CONDITIONAL, UNCONDITIONAL = "conditional", "unconditional"
NAMES = ("positive", "negative", "middle", "empty", "second")
POSITIVE, NEGATIVE = ("positive", CONDITIONAL), ("negative", UNCONDITIONAL)
MIDDLE, EMPTY, SECOND = ("middle", CONDITIONAL), ("empty", UNCONDITIONAL), ("second", CONDITIONAL)
LEFT_HALF = {"area": (16, 8, 0, 0), "strength": 1.0, "set_area_to_bounds": False}
HEAD = 16  # tokens that identify a prompt


@pytest.fixture
def model(easy) -> ModelPatcher:
    return easy.apply(load_tiny_sdxl())


@pytest.fixture
def probe(easy, model) -> Probe:
    return Probe(easy, model)


def text(name: str, tokens: int = 77, **values: Any) -> list:
    """A CONDITIONING that the probe recognises."""
    return node_helpers.conditioning_set_values(random_conditioning(NAMES.index(name), tokens), values)


class Probe:
    """Record of each UNet call: per run of rows, (name of the prompt, side of the reference tokens)."""

    def __init__(self, easy: Easy, model: ModelPatcher) -> None:
        self.easy, self.model = easy, model
        self.calls: list[list[tuple[str, str]]] = []
        self.heads = {name: text(name)[0][0][0, :HEAD] for name in NAMES}
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "probe", self.unet)

    @property
    def runs(self) -> set[tuple[str, str]]:
        return {run for call in self.calls for run in call}

    def unet(self, executor: Any, x: Tensor, t: Any, context: Tensor, *args: Any, **kwargs: Any) -> Any:
        transformer_options = args[2]  # y, control, transformer_options
        with watch_attention(self.easy.pack, self.model) as attended:
            out = executor(x, t, context, *args, **kwargs)
        keys, *others = [attention.key_value[0] for attention in attended]
        assert all(len(other) == len(keys) for other in others)
        of_rows = keys.repeat_interleave(len(x) // len(keys), dim=0)
        runs = len(transformer_options["cond_or_uncond"])
        prompts, tokens = (rows.unflatten(0, (runs, -1)) for rows in (context, of_rows))
        assert all(torch.equal(rows, rows[:1].expand_as(rows)) for rows in tokens)
        sides = map(self.side_of, tokens[:, 0])
        self.calls.append(list(zip(map(self.name_of, prompts), sides, strict=True)))
        return out

    def name_of(self, rows: Tensor) -> str:
        (name,) = [n for n, head in self.heads.items() if (rows[:, :HEAD] == head).all()]
        return name

    def side_of(self, key: Tensor) -> str:
        unconditional, conditional = self.easy.key_values[0][0]
        assert torch.equal(key, conditional) != torch.equal(key, unconditional)
        return CONDITIONAL if torch.equal(key, conditional) else UNCONDITIONAL


# The host's guiders


def guider_of(kind: type, *names: str) -> Callable[..., Any]:
    """A function that makes a guider of a model, with these prompts and the settings of its set_cfg."""

    def make(model: ModelPatcher, *settings: Any) -> Any:
        guider = kind(model)
        guider.set_conds(*map(text, names))
        if settings:
            guider.set_cfg(*settings)
        return guider

    return make


class ThreeSided(comfy.samplers.CFGGuider):
    """A guider as another pack might write it, with its own names in its own order."""

    def set_conds(self, subject: list, style: list, uncond: list) -> None:
        self.inner_set_conds({"style": style, "uncond": uncond, "subject": subject})

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        conds = [self.conds[name] for name in ("uncond", "style", "subject")]
        out = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options)
        return sum(out) / 3


basic = guider_of(nodes_custom_sampler.Guider_Basic, "positive")
cfg = guider_of(comfy.samplers.CFGGuider, "positive", "negative")
dual_cfg = guider_of(nodes_custom_sampler.Guider_DualCFG, "positive", "middle", "negative")
perp_neg = guider_of(nodes_perpneg.Guider_PerpNeg, "positive", "negative", "empty")
three_sided = guider_of(ThreeSided, "positive", "middle", "negative")

GUIDERS = {  # name: (guider, its settings, the runs that it evaluates)
    "CFG": (cfg, (5.0,), {POSITIVE, NEGATIVE}),
    "CFG 1": (cfg, (1.0,), {POSITIVE}),
    "basic": (basic, (), {POSITIVE}),
    "dual CFG": (dual_cfg, (3.0, 2.0, False), {POSITIVE, MIDDLE, NEGATIVE}),
    "dual CFG without negative": (dual_cfg, (3.0, 1.0, False), {POSITIVE, MIDDLE}),
    "dual CFG without middle": (dual_cfg, (1.0, 1.0, False), {POSITIVE}),
    "dual CFG nested": (dual_cfg, (3.0, 2.0, True), {POSITIVE, MIDDLE, NEGATIVE}),
    "PerpNeg": (perp_neg, (5.0, 1.0), {POSITIVE, NEGATIVE, EMPTY}),
    "PerpNeg without negative": (perp_neg, (5.0, 0.0), {POSITIVE, EMPTY}),
    "PerpNeg CFG 1": (perp_neg, (1.0, 1.0), {POSITIVE, NEGATIVE, EMPTY}),
    "PerpNeg CFG 1 without negative": (perp_neg, (1.0, 0.0), {POSITIVE}),
    "custom names": (three_sided, (), {POSITIVE, MIDDLE, NEGATIVE}),
}


@pytest.mark.parametrize("case", GUIDERS)
def test_guider_gives_each_side_its_tokens(case: str, model, probe) -> None:
    make, settings, runs = GUIDERS[case]
    sample(make(model, *settings))
    assert probe.runs == runs


@pytest.mark.parametrize(
    ("names", "unconditional"),
    [
        ("positive middle cond subject style prompt_2", False),
        ("negative empty_negative_prompt uncond neg Negative null empty", True),
    ],
)
def test_side_follows_from_the_name_of_the_conditioning(pack, names: str, unconditional: bool) -> None:
    is_unconditional = golden.part(pack, "nodes.unet_patch.cond_roles").is_unconditional
    assert {name: is_unconditional(name) for name in names.split()} == dict.fromkeys(
        names.split(), unconditional
    )


@pytest.mark.skipif(not hasattr(nodes_custom_sampler, "Guider_DualModel"), reason="not in this host")
@pytest.mark.parametrize("scale", [4.0, 1.0])
def test_dual_model_guider_gives_each_side_its_tokens(easy, model, probe, scale: float) -> None:
    guider = nodes_custom_sampler.Guider_DualModel(model, easy.apply(load_tiny_sdxl()))
    guider.set_conds(text("positive"), text("negative"))
    guider.set_cfg(scale)
    sample(guider)
    assert probe.runs == ({POSITIVE, NEGATIVE} if scale != 1 else {POSITIVE})
    assert all(len(call) == 1 for call in probe.calls)


def test_ksampler(model, probe) -> None:
    noise, conds = fixed_noise(), (text("positive"), text("negative"))
    settings = (2, 5.0, "dpmpp_2m", "karras", *conds, torch.zeros_like(noise))
    with torch.inference_mode():
        comfy.sample.sample(model, noise, *settings, disable_pbar=True, seed=0)
    assert probe.runs == {POSITIVE, NEGATIVE}


def test_roles_are_recorded_only_while_the_guider_predicts(pack) -> None:
    roles = golden.part(pack, "nodes.unet_patch.cond_roles")
    conds = {"negative": [{"uuid": 1}], "positive": [{"uuid": 2}]}

    class Executor:
        class_obj = SimpleNamespace(original_conds=conds)

        def __call__(self) -> tuple:
            return roles.recorded_roles([*conds.values(), None])

    assert roles.record_cond_roles(Executor()) == (True, False, None)
    assert roles.recorded_roles(conds.values()) == (None, None)


# How the host makes batches


def test_batch_split_to_save_memory(model, probe, monkeypatch) -> None:
    monkeypatch.setattr(model, "get_free_memory", lambda device: 0)
    sample(perp_neg(model, 5.0, 1.0))
    assert all(len(call) == 1 for call in probe.calls)
    assert probe.runs == {POSITIVE, NEGATIVE, EMPTY}


def test_split_batch_predicts_the_same_as_the_whole_batch(model, monkeypatch) -> None:
    whole = sample(cfg(model, 5.0))
    monkeypatch.setattr(model, "get_free_memory", lambda device: 0)
    assert golden.error(sample(cfg(model, 5.0)), whole) <= 1e-5


@pytest.mark.parametrize(
    ("positive", "negative", "batch"), [(77, 77, 3), (154, 77, 1), (77, 231, 1), (154, 231, 1)]
)
def test_both_sides_in_one_call(model, probe, positive: int, negative: int, batch: int) -> None:
    """Of several latents, and of prompts of unequal length."""
    sample(cfg_guider(model, text("positive", positive), text("negative", negative)), batch=batch)
    assert [sorted(call) for call in probe.calls] == [sorted([POSITIVE, NEGATIVE])] * 2


def test_combined_prompts_are_of_one_side(model, probe) -> None:
    sample(cfg_guider(model, text("positive") + text("second"), text("negative") + text("empty")))
    assert probe.runs == {POSITIVE, NEGATIVE, SECOND, EMPTY}


@pytest.mark.parametrize(("side", "order"), [(0, 1), (0, -1), (1, 1)])
def test_area_on_one_side(model, probe, side: int, order: int) -> None:
    """The host then evaluates the other side's prompt in that area too, under the same uuid."""
    conds = [text("positive"), text("negative")]
    conds[side] = [*conds[side], *text(("second", "empty")[side], **LEFT_HALF)][::order]
    sample(cfg_guider(model, *conds))
    assert probe.runs == {POSITIVE, NEGATIVE, (SECOND, EMPTY)[side]}
    assert sum(run == (NEGATIVE, POSITIVE)[side] for call in probe.calls for run in call) == 2 * 2


def test_areas_with_a_guider_of_three(model, probe) -> None:
    guider = nodes_perpneg.Guider_PerpNeg(model)
    guider.set_conds([*text("positive"), *text("second", **LEFT_HALF)], text("negative"), text("empty"))
    guider.set_cfg(5.0, 1.0)
    sample(guider)
    assert probe.runs == {POSITIVE, SECOND, NEGATIVE, EMPTY}


def test_prompt_that_ends_early(model, probe) -> None:
    """Afterwards that side is empty and the other is alone in the batch."""
    sample(cfg_guider(model, text("positive"), text("negative", start_percent=0.0, end_percent=0.2)), steps=3)
    assert probe.runs == {POSITIVE, NEGATIVE}
    assert {len(call) for call in probe.calls} == {1, 2}


# Nodes that evaluate one side once more


@pytest.mark.parametrize(
    ("patch", "again"),
    [
        (lambda model: nodes_pag.PerturbedAttentionGuidance.execute(model, 3.0), POSITIVE),
        (lambda model: nodes_sag.SelfAttentionGuidance.execute(model, 0.5, 2.0), NEGATIVE),
    ],
    ids=["PAG", "SAG"],
)
def test_node_that_evaluates_one_side_again(model, probe, patch: Callable, again: tuple) -> None:
    sample(cfg(patch(model).result[0], 5.0))
    assert probe.runs == {POSITIVE, NEGATIVE}
    assert probe.calls.count([again]) == 2


@pytest.mark.parametrize(
    ("side", "index", "run"),
    [("cond", 0, POSITIVE), ("cond", 1, SECOND), ("uncond", 0, NEGATIVE), ("uncond", 1, EMPTY)],
)
def test_single_prompt_evaluated_again_from_a_copy(model, probe, side: str, index: int, run: tuple) -> None:
    """As context windows with a prompt for each window do it."""

    def once_more(args: dict[str, Any]) -> Tensor:
        copied = [dict(args[side][index])]
        options = args["model_options"]
        comfy.samplers.calc_cond_batch(args["model"], [copied], args["input"], args["sigma"], options)
        return args["denoised"]

    model.set_model_sampler_post_cfg_function(once_more)
    sample(cfg_guider(model, text("positive") + text("second"), text("negative") + text("empty")))
    assert probe.runs == {POSITIVE, NEGATIVE, SECOND, EMPTY}
    assert probe.calls.count([run]) == 2


@pytest.mark.parametrize("case", ["CFG", "dual CFG"])
def test_context_windows(model, probe, case: str) -> None:
    """The host evaluates each window from copies of the conditionings."""
    make, settings, runs = GUIDERS[case]
    sample(make(in_windows(model), *settings), batch=4)
    assert len(probe.calls) == 2 * 2
    assert probe.runs == runs


def test_convention_without_roles_of_a_guider(pack) -> None:
    """Also for a run that the guider did not list, as packs that rewrite cond_or_uncond may number them."""
    roles = golden.part(pack, "nodes.unet_patch.cond_roles")
    runs = roles.unconditional_runs
    for order in ([0, 1], [1, 0], [0], [1], [2, 0, 1], [0, 0, 1]):
        assert runs({"cond_or_uncond": order}) == tuple(index != 0 for index in order), order
    assert runs({}) == (False,)
    assert runs({"cond_or_uncond": [0, 1, 2], roles.ROLES: (True, None)}) == (True, True, True)


def test_cfg_is_combined_from_separately_evaluated_sides(easy) -> None:
    """Euler by hand, from a model of each side, with that side's tokens and prompt only."""
    tokens = easy.tokens
    swapped = type(tokens)(conditional=tokens.unconditional, unconditional=tokens.conditional)
    sides = {
        name: guider_of(nodes_custom_sampler.Guider_Basic, name)(easy.apply(load_tiny_sdxl(), tokens=pair))
        for name, pair in (("positive", tokens), ("negative", swapped))
    }

    model, scale = easy.apply(load_tiny_sdxl()), 5.0
    sampling = model.get_model_object("model_sampling")
    schedule = comfy.samplers.calculate_sigmas(sampling, "normal", 3)
    latent = torch.zeros_like(fixed_noise())
    x = sampling.noise_scaling(schedule[0], fixed_noise(), latent, True)
    for sigma, following in zip(schedule, schedule[1:], strict=False):
        positive, negative = (denoised(sides[name], x, sigma) for name in ("positive", "negative"))
        guided = negative + scale * (positive - negative)
        x = x + (x - guided) / sigma * (following - sigma)
    wanted = model.model.process_latent_out(x)

    assert golden.error(sample(cfg(model, scale), steps=3), wanted) <= 1e-5


def denoised(guider: Any, x: Tensor, sigma: Tensor) -> Tensor:
    """The guider's prediction at one step, from a sampling of this step only."""
    predictions, zeros = [], torch.zeros_like(x)

    def sampler(model: Any, noise: Tensor, sigmas: Tensor, *, extra_args: dict, **_: Any) -> Tensor:
        predictions.append(model(x, sigma.expand(len(x)), **extra_args))
        return noise

    one_step = comfy.samplers.KSAMPLER(sampler), torch.stack([sigma, torch.zeros(())])
    with torch.inference_mode():
        guider.sample(zeros, zeros, *one_step, disable_pbar=True, seed=0)
    return predictions[0]
