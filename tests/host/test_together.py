"""Apply EasyRef together with the host's own patches, and with imitations of other packs.

With weight 0 and LoRA strength 0 each sample is bit-identical to the one without EasyRef. With weight 1, with
a mask and without, it is finite and shows the references, in either order of the nodes.
"""

from __future__ import annotations

from collections.abc import Callable

import comfy.hooks
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras import (
    nodes_freelunch,
    nodes_hypertile,
    nodes_model_advanced,
    nodes_pag,
    nodes_sag,
    nodes_tomesd,
)
from comfy_extras.nodes_model_downscale import PatchModelAddDownscale
from torch import Tensor

from devkit.host import golden
from devkit.host.sampling import LEFT, PROMPTS, Easy, in_float64, predict, sample_cfg, sampling_options
from devkit.host.tiny_nodes.tiny_sdxl import load_tiny_sdxl, random_conditioning, random_sdxl

from .other_packs import Adapter, with_lora, with_term

Patch = Callable[[ModelPatcher], ModelPatcher]


def output(result: object) -> ModelPatcher:
    """The MODEL that a node returns, in either of the host's ways."""
    return getattr(result, "result", result)[0]


def fewer_queries(model: ModelPatcher) -> ModelPatcher:
    """As token merging of the cross-attention would do it: every second token is a query, for both."""
    clone = model.clone()
    clone.set_model_attn2_patch(lambda n, context, value, options: (n[:, ::2], context, value))
    clone.set_model_attn2_output_patch(lambda n, options: n.repeat_interleave(2, dim=1))
    return clone


def tiled_queries(model: ModelPatcher) -> ModelPatcher:
    """As tiling of the cross-attention would do it: each latent as four rows of a quarter of its tokens."""

    def cut(n: Tensor, context: Tensor, value: Tensor, options: dict) -> tuple:
        repeated = (t.repeat_interleave(4, dim=0) for t in (context, value))
        return n.unflatten(1, (4, -1)).flatten(0, 1), *repeated

    clone = model.clone()
    clone.set_model_attn2_patch(cut)
    clone.set_model_attn2_output_patch(lambda n, options: n.unflatten(0, (-1, 4)).flatten(1, 2))
    return clone


def ip_adapter(model: ModelPatcher) -> ModelPatcher:
    """IPAdapter_plus and InstantID before Apply EasyRef: a callable object at each site."""
    clone = model.clone()
    for block, number, depth in (("input", 4, 1), ("middle", 0, 2), ("output", 5, 1)):
        for index in range(depth):
            clone.set_model_attn2_replace(Adapter(), block, number, index)
    return clone


BESIDE: dict[str, Patch] = {
    "FreeU": lambda model: output(nodes_freelunch.FreeU.execute(model, 1.1, 1.2, 0.9, 0.2)),
    "FreeU V2": lambda model: output(nodes_freelunch.FreeU_V2.execute(model, 1.3, 1.4, 0.9, 0.2)),
    "PAG": lambda model: output(nodes_pag.PerturbedAttentionGuidance.execute(model, 3.0)),
    "SAG": lambda model: output(nodes_sag.SelfAttentionGuidance.execute(model, 0.5, 2.0)),
    "HyperTile": lambda model: output(nodes_hypertile.HyperTile.execute(model, 32, 2, 2, False)),
    "ToMe": lambda model: output(nodes_tomesd.TomePatchModel.execute(model, 0.5)),
    "Deep Shrink": lambda model: output(
        PatchModelAddDownscale.execute(model, 3, 1.7, 0.0, 1.0, True, "bicubic", "bicubic")
    ),
    "LCM": lambda model: output(nodes_model_advanced.ModelSamplingDiscrete().patch(model, "lcm", False)),
    "LoRA": with_lora,
    "fewer queries": fewer_queries,
    "tiled queries": tiled_queries,
    "IPAdapter": ip_adapter,
}


def sampled(model: ModelPatcher, **options: object) -> Tensor:
    torch.manual_seed(0)  # some of these nodes draw tiles or tokens from the global generator
    return sample_cfg(model, **options)


def is_neutral(easy: Easy, model: ModelPatcher, **options: object) -> bool:
    """True if neutral settings leave the model's samples bit-identical."""
    neutral = easy.apply(model, weight=0.0, lora=0.0)
    return torch.equal(sampled(neutral, **options), sampled(model, **options))


def assert_references_show(found: Tensor, without: Tensor) -> None:
    assert torch.isfinite(found).all()
    assert golden.error(found, without) > 1e-4


@pytest.mark.parametrize("name", BESIDE)
def test_neutral_settings_leave_it_alone(easy, model, name: str) -> None:
    patch = BESIDE[name]
    alone = sampled(patch(model))
    for patched in (
        patch(easy.apply(model, weight=0.0, lora=0.0)),
        easy.apply(patch(model), weight=0.0, lora=0.0, mask=LEFT),
        easy.apply(patch(model), lora=0.0, mask=torch.zeros(1, 3, 3)),
    ):
        assert torch.equal(sampled(patched), alone)


@pytest.mark.parametrize("name", [name for name in BESIDE if name != "IPAdapter"])
def test_references_act_in_either_order(easy, model, name: str) -> None:
    patch = BESIDE[name]
    alone = sampled(patch(easy.apply(model, weight=0.0)), batch=2)
    for mask in (None, LEFT, torch.stack([LEFT[0], 1 - LEFT[0]])):
        before, after = (
            sampled(patched, batch=2)
            for patched in (easy.apply(patch(model), mask=mask), patch(easy.apply(model, mask=mask)))
        )
        assert_references_show(before, alone)
        assert golden.error(after, before) <= 1e-5


def test_adapter_before_ours(easy, model) -> None:
    found = sampled(easy.apply(ip_adapter(model)))
    assert_references_show(found, sampled(easy.apply(ip_adapter(model), weight=0.0)))
    assert golden.error(found, sampled(easy.apply(model))) > 1e-4


@pytest.mark.parametrize(
    "settings", [{"mask": LEFT}, {"weight_type": "style transfer", "weight_schedule": "1, 0.2"}]
)
def test_adapter_after_ours(easy, model, settings: dict) -> None:
    ours = easy.apply(model, **settings)
    both = sampled(with_term(ours))
    assert_references_show(both, sampled(ours))


@in_float64
def test_mean_of_the_mask_where_token_positions_are_unknown(easy, model) -> None:
    """Half a mask is half the weight, for queries without a known position."""
    found = predict(fewer_queries(easy.apply(model, mask=LEFT)))
    assert golden.error(found, predict(fewer_queries(easy.apply(model, weight=0.5)))) <= 1e-6


def test_guidance_of_1(easy, model) -> None:
    found = sampled(easy.apply(model), cfg=1.0)
    assert golden.error(found, sampled(easy.apply(model, weight=0.0), cfg=1.0)) > 1e-4
    assert is_neutral(easy, model, cfg=1.0)


def test_area_conditioning(easy, model) -> None:
    import nodes as host_nodes  # late: on 0.20 it hides the modules other tests import from the host

    area = host_nodes.ConditioningSetAreaPercentage()
    second = area.append(random_conditioning(3, 77), 0.5, 1.0, 0.5, 0.0, 1.0)[0]
    conds = PROMPTS[0] + second, PROMPTS[1]
    assert is_neutral(easy, model, conds=conds)
    masked = sampled(easy.apply(model, mask=LEFT), conds=conds)
    assert_references_show(masked, sampled(easy.apply(model), conds=conds))


def test_conditioning_with_hooks(easy, model) -> None:
    """A hook of one prompt makes the host evaluate the two prompts apart."""
    hooks = comfy.hooks.HookGroup()
    hooks.add(comfy.hooks.TransformerOptionsHook({"wrappers": {}}))
    hooked = comfy.hooks.set_hooks_for_conditioning(PROMPTS[0], hooks)
    conds = hooked, PROMPTS[1]
    assert is_neutral(easy, model, conds=conds)
    assert golden.error(sampled(easy.apply(model), conds=conds), sampled(easy.apply(model))) <= 1e-5


# Other UNets


def test_inpainting_unet(easy) -> None:
    """Nine channels: latent, mask and masked latent."""
    model = random_sdxl(seed=0, in_channels=9)
    plain, patched = (nine_channels(m) for m in (model, easy.apply(model, lora=0.0, mask=LEFT)))
    assert_references_show(patched, plain)
    assert torch.equal(nine_channels(easy.apply(model, weight=0.0, lora=0.0)), plain)


def nine_channels(model: ModelPatcher) -> Tensor:
    comfy.model_management.load_models_gpu([model])
    random = torch.Generator().manual_seed(0)
    x, context, y = (torch.randn(2, *shape, generator=random) for shape in ((9, 16, 16), (77, 32), (80,)))
    options = sampling_options(model) | {"cond_or_uncond": [1, 0], "sigmas": torch.ones(2)}
    with torch.inference_mode():
        unet = model.model.diffusion_model
        return unet(x, torch.ones(2), context=context, y=y, transformer_options=options)


def test_unet_stored_in_fp8(easy) -> None:
    """Weights in fp8, arithmetic as before: as the host's manual cast and GGUF's layers do it."""
    model = load_tiny_sdxl()
    for module in model.model.diffusion_model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = module.weight.data.to(torch.float8_e4m3fn)
            module.comfy_cast_weights = True
    assert is_neutral(easy, model)
    found = sampled(easy.apply(model, lora=0.0, mask=LEFT))
    assert_references_show(found, sampled(model))


def test_patch_that_drops_the_references_is_warned_of(easy, model, log) -> None:
    """It replaces ours and does not call it."""
    applied = easy.apply(model)
    ours = applied.model_options["transformer_options"]["patches_replace"]["attn2"]["input", 4, 0]
    calling, dropping = applied.clone(), applied.clone()
    calling.set_model_attn2_replace(lambda *args: ours(*args) * 1.0, "input", 4, 0)
    assert torch.equal(sampled(calling), sampled(applied))
    assert not log.text
    dropping.set_model_attn2_replace(Adapter(), "input", 4, 0)
    sampled(dropping)
    assert log.text.count("no effect in 1 of 17 cross-attentions") == 1
    assert "Adapter" in log.text


def test_first_of_two_references_that_another_pack_drops_is_warned_of(easy, model, log) -> None:
    between = easy.apply(model)
    between.set_model_attn2_replace(Adapter(), "input", 4, 0)
    sampled(easy.apply(between, tokens=easy.other_tokens()))
    assert "no effect in 1 of 17 cross-attentions" in log.text
