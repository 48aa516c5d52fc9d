"""Which rows of a batch attend to the conditional reference tokens and which to the unconditional ones.

Told by content: a probe at the UNet notes, for each run of rows, whose prompt it carries and whose K and V it gets.
Pinned for the host's guiders and nodes, for every way in which the host orders, drops, splits, repeats or copies
conditionings, and, for CFG, in numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.context_windows
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
from devkit.host.sampling import Easy, cfg_guider, predict, sample, start_of, watch_attention
from devkit.host.tiny_nodes.tiny_sdxl import load_tiny_sdxl, random_conditioning

CONDITIONAL, UNCONDITIONAL = "conditional", "unconditional"
NAMES = ("positive", "negative", "middle", "empty", "second")
POSITIVE, NEGATIVE = ("positive", CONDITIONAL), ("negative", UNCONDITIONAL)
MIDDLE, EMPTY = ("middle", CONDITIONAL), ("empty", UNCONDITIONAL)
LEFT_HALF = {"area": (16, 8, 0, 0), "strength": 1.0, "set_area_to_bounds": False}
HEAD = 16  # so many tokens tell one prompt from another


@pytest.fixture
def model(easy) -> ModelPatcher:
    return easy.apply(load_tiny_sdxl())


@pytest.fixture
def probe(easy, model) -> Probe:
    return Probe(easy, model)


def text(name: str, tokens: int = 77, **values: Any) -> list:
    """A CONDITIONING that the probe will recognise."""
    return node_helpers.conditioning_set_values(random_conditioning(NAMES.index(name), tokens), values)


class Probe:
    """Notes what each UNet call was made of: per run of rows, (whose prompt, whose reference tokens)."""

    def __init__(self, easy: Easy, model: ModelPatcher) -> None:
        self.easy, self.model = easy, model
        self.calls: list[list[tuple[str, str]]] = []
        self.heads = {name: text(name)[0][0][0, :HEAD] for name in NAMES}
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "probe", self.unet)

    @property
    def seen(self) -> set[tuple[str, str]]:
        return {run for call in self.calls for run in call}

    def unet(
        self,
        executor: Any,
        x: Tensor,
        timesteps: Any,
        context: Tensor,
        y: Any,
        control: Any,
        transformer_options: dict,
        **kwargs: Any,
    ) -> Any:
        with watch_attention(self.easy.pack, self.model) as attended:
            out = executor(x, timesteps, context, y, control, transformer_options, **kwargs)
        keys, *others = [attention.key_value[0] for attention in attended]
        assert all(len(other) == len(keys) for other in others)
        of_rows = keys.repeat_interleave(len(x) // len(keys), dim=0)
        runs = len(transformer_options["cond_or_uncond"])
        prompts, tokens = (rows.unflatten(0, (runs, -1)) for rows in (context, of_rows))
        assert all(torch.equal(rows, rows[:1].expand_as(rows)) for rows in tokens)
        whose = map(self.whose_tokens, tokens[:, 0])
        self.calls.append(list(zip(map(self.whose_prompt, prompts), whose, strict=True)))
        return out

    def whose_prompt(self, rows: Tensor) -> str:
        (name,) = [n for n, head in self.heads.items() if (rows[:, :HEAD] == head).all()]
        return name

    def whose_tokens(self, key: Tensor) -> str:
        unconditional, conditional = self.easy.key_values[0][0]
        assert torch.equal(key, conditional) != torch.equal(key, unconditional)
        return CONDITIONAL if torch.equal(key, conditional) else UNCONDITIONAL


# The host's guiders


def cfg(model: ModelPatcher, scale: float = 5.0) -> Any:
    return cfg_guider(model, text("positive"), text("negative"), scale)


def basic(model: ModelPatcher) -> Any:
    guider = nodes_custom_sampler.Guider_Basic(model)
    guider.set_conds(text("positive"))
    return guider


def dual_cfg(model: ModelPatcher, cfg_1: float, cfg_2: float, nested: bool) -> Any:
    guider = nodes_custom_sampler.Guider_DualCFG(model)
    guider.set_conds(text("positive"), text("middle"), text("negative"))
    guider.set_cfg(cfg_1, cfg_2, nested)
    return guider


def perp_neg(model: ModelPatcher, scale: float, neg_scale: float) -> Any:
    guider = nodes_perpneg.Guider_PerpNeg(model)
    guider.set_conds(text("positive"), text("negative"), text("empty"))
    guider.set_cfg(scale, neg_scale)
    return guider


class ThreeSided(comfy.samplers.CFGGuider):
    """A guider as another pack might write it: names of its own, in an order of its own."""

    def set_conds(self, subject: list, style: list, uncond: list) -> None:
        self.inner_set_conds({"style": style, "uncond": uncond, "subject": subject})

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        conds = [self.conds[name] for name in ("uncond", "style", "subject")]
        out = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options)
        return sum(out) / 3


def three_sided(model: ModelPatcher) -> ThreeSided:
    guider = ThreeSided(model)
    guider.set_conds(text("positive"), text("middle"), text("negative"))
    return guider


GUIDERS = {
    "CFG": (cfg, {POSITIVE, NEGATIVE}),
    "CFG 1": (lambda model: cfg(model, 1.0), {POSITIVE}),
    "basic": (basic, {POSITIVE}),
    "dual CFG": (lambda model: dual_cfg(model, 3.0, 2.0, nested=False), {POSITIVE, MIDDLE, NEGATIVE}),
    "dual CFG without negative": (lambda model: dual_cfg(model, 3.0, 1.0, nested=False), {POSITIVE, MIDDLE}),
    "dual CFG without middle": (lambda model: dual_cfg(model, 1.0, 1.0, nested=False), {POSITIVE}),
    "dual CFG nested": (lambda model: dual_cfg(model, 3.0, 2.0, nested=True), {POSITIVE, MIDDLE, NEGATIVE}),
    "PerpNeg": (lambda model: perp_neg(model, 5.0, 1.0), {POSITIVE, NEGATIVE, EMPTY}),
    "PerpNeg without negative": (lambda model: perp_neg(model, 5.0, 0.0), {POSITIVE, EMPTY}),
    "PerpNeg CFG 1": (lambda model: perp_neg(model, 1.0, 1.0), {POSITIVE, NEGATIVE, EMPTY}),
    "PerpNeg CFG 1 without negative": (lambda model: perp_neg(model, 1.0, 0.0), {POSITIVE}),
    "names of its own": (three_sided, {POSITIVE, MIDDLE, NEGATIVE}),
}


@pytest.mark.parametrize("case", GUIDERS)
def test_guider_gives_each_side_its_tokens(case: str, model, probe) -> None:
    make, wanted = GUIDERS[case]
    sample(make(model))
    assert probe.seen == wanted


@pytest.mark.parametrize(
    ("name", "unconditional"),
    [
        *((name, False) for name in ("positive", "middle", "cond", "subject", "style", "prompt_2")),
        *(
            (name, True)
            for name in ("negative", "empty_negative_prompt", "uncond", "neg", "Negative", "null", "empty")
        ),
    ],
)
def test_side_is_told_by_the_name_of_the_conditioning(pack, name: str, unconditional: bool) -> None:
    assert golden.part(pack, "nodes.unet_patch.cond_roles").is_unconditional(name) == unconditional


@pytest.mark.skipif(
    not hasattr(nodes_custom_sampler, "Guider_DualModel"), reason="this host has no such guider"
)
@pytest.mark.parametrize("scale", [4.0, 1.0])
def test_dual_model_guider_gives_each_side_its_tokens(easy, model, probe, scale: float) -> None:
    guider = nodes_custom_sampler.Guider_DualModel(model, easy.apply(load_tiny_sdxl()))
    guider.set_conds(text("positive"), text("negative"))
    guider.set_cfg(scale)
    sample(guider)
    assert probe.seen == ({POSITIVE, NEGATIVE} if scale != 1 else {POSITIVE})
    assert all(len(call) == 1 for call in probe.calls)


def test_ksampler(model, probe) -> None:
    latent = torch.zeros_like(start_of())
    with torch.inference_mode():
        # fmt: skip
        comfy.sample.sample(
            model,
            start_of(),
            2,
            5.0,
            "dpmpp_2m",
            "karras",
            text("positive"),
            text("negative"),
            latent,
            disable_pbar=True,
            seed=0,
        )
    assert probe.seen == {POSITIVE, NEGATIVE}


def test_nothing_of_a_guider_is_remembered_after_it(pack, model) -> None:
    sample(cfg(model))
    assert golden.part(pack, "nodes.unet_patch.cond_roles")._predicting.get() is None


# How the host makes batches


def test_batch_of_three_latents(model, probe) -> None:
    sample(cfg(model), batch=3)
    assert [sorted(call) for call in probe.calls] == [sorted([POSITIVE, NEGATIVE])] * 2


def test_batch_split_for_want_of_memory(model, probe, monkeypatch) -> None:
    monkeypatch.setattr(model, "get_free_memory", lambda device: 0)
    sample(perp_neg(model, 5.0, 1.0))
    assert all(len(call) == 1 for call in probe.calls)
    assert probe.seen == {POSITIVE, NEGATIVE, EMPTY}


def test_split_batch_predicts_what_the_whole_batch_does(model, monkeypatch) -> None:
    whole = sample(cfg(model))
    monkeypatch.setattr(model, "get_free_memory", lambda device: 0)
    assert golden.error(sample(cfg(model)), whole) <= 1e-5


@pytest.mark.parametrize(("positive", "negative"), [(154, 77), (77, 231), (154, 231)])
def test_prompts_of_unequal_length(model, probe, positive: int, negative: int) -> None:
    sample(cfg_guider(model, text("positive", positive), text("negative", negative)))
    assert [sorted(call) for call in probe.calls] == [sorted([POSITIVE, NEGATIVE])] * 2


def test_combined_prompts_are_of_one_side(model, probe) -> None:
    sample(cfg_guider(model, text("positive") + text("second"), text("negative") + text("empty")))
    assert probe.seen == {POSITIVE, NEGATIVE, ("second", CONDITIONAL), EMPTY}


@pytest.mark.parametrize("order", [1, -1])
def test_area_on_the_positive_side(model, probe, order: int) -> None:
    """The host then evaluates the negative prompt in that area too, under the uuid of the positive one."""
    positive = [*text("positive"), *text("second", **LEFT_HALF)][::order]
    sample(cfg_guider(model, positive, text("negative")))
    assert probe.seen == {POSITIVE, ("second", CONDITIONAL), NEGATIVE}
    assert sum(run == NEGATIVE for call in probe.calls for run in call) == 2 * 2


def test_area_on_the_negative_side(model, probe) -> None:
    sample(cfg_guider(model, text("positive"), [*text("negative"), *text("empty", **LEFT_HALF)]))
    assert probe.seen == {POSITIVE, NEGATIVE, EMPTY}
    assert sum(run == POSITIVE for call in probe.calls for run in call) == 2 * 2


def test_areas_with_a_guider_of_three(model, probe) -> None:
    guider = nodes_perpneg.Guider_PerpNeg(model)
    guider.set_conds([*text("positive"), *text("second", **LEFT_HALF)], text("negative"), text("empty"))
    guider.set_cfg(5.0, 1.0)
    sample(guider)
    assert probe.seen == {POSITIVE, ("second", CONDITIONAL), NEGATIVE, EMPTY}


def test_prompt_that_ends_early(model, probe) -> None:
    """Afterwards that side is empty and the other is alone in the batch."""
    sample(cfg_guider(model, text("positive"), text("negative", start_percent=0.0, end_percent=0.2)), steps=3)
    assert probe.seen == {POSITIVE, NEGATIVE}
    assert {len(call) for call in probe.calls} == {1, 2}


# Nodes that evaluate one side once more


def test_perturbed_attention_guidance(model, probe) -> None:
    sample(cfg(nodes_pag.PerturbedAttentionGuidance.execute(model, 3.0).result[0]))
    assert probe.seen == {POSITIVE, NEGATIVE}
    assert probe.calls.count([POSITIVE]) == 2


def test_self_attention_guidance(model, probe) -> None:
    sample(cfg(nodes_sag.SelfAttentionGuidance.execute(model, 0.5, 2.0).result[0]))
    assert probe.seen == {POSITIVE, NEGATIVE}
    assert probe.calls.count([NEGATIVE]) == 2


@pytest.mark.parametrize(
    ("kept", "index", "wanted"),
    [
        ("cond", 0, POSITIVE),
        ("cond", 1, ("second", CONDITIONAL)),
        ("uncond", 0, NEGATIVE),
        ("uncond", 1, EMPTY),
    ],
)
def test_single_prompt_evaluated_again_from_a_copy(
    model, probe, kept: str, index: int, wanted: tuple
) -> None:
    """As context windows do that give each window its own prompt."""

    def once_more(args: dict[str, Any]) -> Tensor:
        copied = [dict(args[kept][index])]
        options = args["model_options"]
        comfy.samplers.calc_cond_batch(args["model"], [copied], args["input"], args["sigma"], options)
        return args["denoised"]

    model.set_model_sampler_post_cfg_function(once_more)
    sample(cfg_guider(model, text("positive") + text("second"), text("negative") + text("empty")))
    assert probe.seen == {POSITIVE, NEGATIVE, ("second", CONDITIONAL), EMPTY}
    assert probe.calls.count([wanted]) == 2


def in_windows(model: ModelPatcher) -> None:
    """Sample a batch as a video, two frames at a time."""
    windows = comfy.context_windows
    model.model_options["context_handler"] = windows.IndexListContextHandler(
        windows.get_matching_context_schedule(windows.ContextSchedules.STATIC_STANDARD),
        windows.get_matching_fuse_method(windows.ContextFuseMethods.FLAT),
        context_length=2,
        context_overlap=0,
    )


@pytest.mark.parametrize("make", [cfg, lambda model: dual_cfg(model, 3.0, 2.0, nested=False)])
def test_context_windows(model, probe, make: Callable) -> None:
    """The host evaluates each window from copies of the conditionings."""
    in_windows(model)
    sample(make(model), batch=4)
    assert len(probe.calls) == 2 * 2
    assert probe.seen == ({POSITIVE, NEGATIVE} if make is cfg else {POSITIVE, MIDDLE, NEGATIVE})


# Without a guider


@pytest.mark.parametrize("order", [[0, 1], [1, 0], [0], [1], [2, 0, 1], [0, 0, 1]])
def test_convention_where_no_guider_says_otherwise(pack, order: list[int]) -> None:
    runs = golden.part(pack, "nodes.unet_patch.cond_roles").unconditional_runs
    assert runs({"cond_or_uncond": order}) == tuple(index != 0 for index in order)


def test_one_run_where_nothing_is_said(pack) -> None:
    assert golden.part(pack, "nodes.unet_patch.cond_roles").unconditional_runs({}) == (False,)


def test_index_that_no_guider_announced(pack) -> None:
    """Packs that rewrite cond_or_uncond may number runs the guider never listed."""
    guidance = golden.part(pack, "nodes.unet_patch.cond_roles")
    runs = guidance.unconditional_runs({"cond_or_uncond": [0, 1, 2], guidance.ROLES: (True, None)})
    assert runs == (True, True, True)


@pytest.mark.parametrize("order", [(1, 0), (0, 1)])
def test_model_called_directly(easy, model, order: tuple[int, int]) -> None:
    with watch_attention(easy.pack, model) as attended:
        predict(model, cond_or_uncond=order)
    rows = easy.key_values[0][0][[1 - index for index in order]]
    assert torch.equal(attended[0].key_value[0], rows)


# In numbers


def test_cfg_is_combined_from_sides_evaluated_apart(easy) -> None:
    """Euler by hand, from a model that has only the one side's tokens and is asked for only the one side's prompt."""
    tokens = easy.tokens
    swapped = type(tokens)(conditional=tokens.unconditional, unconditional=tokens.conditional)
    sides = {}
    for name, pair in (("positive", tokens), ("negative", swapped)):
        guider = nodes_custom_sampler.Guider_Basic(easy.apply(load_tiny_sdxl(), tokens=pair))
        guider.set_conds(text(name))
        sides[name] = guider

    model, scale = easy.apply(load_tiny_sdxl()), 5.0
    sampling = model.get_model_object("model_sampling")
    schedule = comfy.samplers.calculate_sigmas(sampling, "normal", 3)
    latent = torch.zeros_like(start_of())
    x = sampling.noise_scaling(schedule[0], start_of(), latent, True)
    for sigma, following in zip(schedule, schedule[1:], strict=False):
        positive, negative = (denoised(sides[name], x, sigma) for name in ("positive", "negative"))
        guided = negative + scale * (positive - negative)
        x = x + (x - guided) / sigma * (following - sigma)
    wanted = model.model.process_latent_out(x)

    assert golden.error(sample(cfg(model, scale), steps=3), wanted) <= 1e-5


def denoised(guider: Any, x: Tensor, sigma: Tensor) -> Tensor:
    """The guider's prediction at one step, out of a sampling that is nothing but this step."""
    kept = []

    def sampler(
        model: Any, noise: Tensor, sigmas: Tensor, extra_args: dict | None = None, **_: Any
    ) -> Tensor:
        kept.append(model(x, sigma.expand(len(x)), **extra_args))
        return noise

    with torch.inference_mode():
        guider.sample(
            torch.zeros_like(x),
            torch.zeros_like(x),
            comfy.samplers.KSAMPLER(sampler),
            torch.stack([sigma, torch.zeros(())]),
            disable_pbar=True,
            seed=0,
        )
    return kept[0]
