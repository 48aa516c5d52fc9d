"""Beside what the host itself patches, and beside packs imitated by their contract.

With weight 0 and LoRA strength 0 each is, bit for bit, what it is without us; with weight 1, with a mask and without,
it runs, is finite and shows the references; in either order of the nodes.
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
    nodes_model_downscale,
    nodes_pag,
    nodes_sag,
    nodes_tomesd,
)
from torch import Tensor

from devkit.host import golden
from devkit.host.sampling import cfg_guider, in_float64, predict, sample, sampling_options
from devkit.host.tiny_nodes.tiny_sdxl import load_tiny_sdxl, random_conditioning, random_sdxl

from .test_unet_patch import ANYWHERE, add_as_other_packs_do, foreign_term

Patch = Callable[[ModelPatcher], ModelPatcher]
HALF = torch.zeros(1, 5, 6)
HALF[..., :3] = 1


def output(result: object) -> ModelPatcher:
    """The MODEL that a node returns, in either of the host's ways."""
    return getattr(result, "result", result)[0]


def lora(model: ModelPatcher) -> ModelPatcher:
    clone = model.clone()
    to_v = "diffusion_model.output_blocks.1.1.transformer_blocks.0.attn2.to_v.weight"
    assert clone.add_patches({to_v: ("diff", (torch.full((32, 32), 0.05),))}, 0.8)
    return clone


def fewer_queries(model: ModelPatcher) -> ModelPatcher:
    """As token merging of the cross-attention would: every second token asks, for both."""
    clone = model.clone()
    clone.set_model_attn2_patch(lambda n, context, value, options: (n[:, ::2], context, value))
    clone.set_model_attn2_output_patch(lambda n, options: n.repeat_interleave(2, dim=1))
    return clone


def tiled_queries(model: ModelPatcher) -> ModelPatcher:
    """As tiling of the cross-attention would: each latent asks as four, of a quarter of its tokens."""

    def cut(n: Tensor, context: Tensor, value: Tensor, options: dict) -> tuple:
        repeated = (t.repeat_interleave(4, dim=0) for t in (context, value))
        return n.unflatten(1, (4, -1)).flatten(0, 1), *repeated

    clone = model.clone()
    clone.set_model_attn2_patch(cut)
    clone.set_model_attn2_output_patch(lambda n, options: n.unflatten(0, (-1, 4)).flatten(1, 2))
    return clone


def ip_adapter(model: ModelPatcher) -> ModelPatcher:
    """IPAdapter_plus and InstantID, before us: an object at each site that can be added to and that we wrap."""
    clone = model.clone()
    for block, number, depth in (("input", 4, 1), ("middle", 0, 2), ("output", 5, 1)):
        for index in range(depth):
            clone.set_model_attn2_replace(Adapter(), block, number, index)
    return clone


class Adapter:
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict) -> Tensor:
        out = comfy.ldm.modules.attention.optimized_attention(q, k, v, extra_options["n_heads"])
        return out + foreign_term(out, q, k, v, extra_options)


BESIDE: dict[str, Patch] = {
    "FreeU": lambda model: output(nodes_freelunch.FreeU.execute(model, 1.1, 1.2, 0.9, 0.2)),
    "FreeU V2": lambda model: output(nodes_freelunch.FreeU_V2.execute(model, 1.3, 1.4, 0.9, 0.2)),
    "PAG": lambda model: output(nodes_pag.PerturbedAttentionGuidance.execute(model, 3.0)),
    "SAG": lambda model: output(nodes_sag.SelfAttentionGuidance.execute(model, 0.5, 2.0)),
    "HyperTile": lambda model: output(nodes_hypertile.HyperTile.execute(model, 32, 2, 2, False)),
    "ToMe": lambda model: output(nodes_tomesd.TomePatchModel.execute(model, 0.5)),
    "Deep Shrink": lambda model: output(
        nodes_model_downscale.PatchModelAddDownscale.execute(
            model, 3, 1.7, 0.0, 1.0, True, "bicubic", "bicubic"
        )
    ),
    "LCM": lambda model: output(nodes_model_advanced.ModelSamplingDiscrete().patch(model, "lcm", False)),
    "LoRA": lora,
    "fewer queries": fewer_queries,
    "tiled queries": tiled_queries,
    "IPAdapter": ip_adapter,
}


def picture(model: ModelPatcher, cfg: float = 5.0, conds: tuple | None = None, batch: int = 1) -> Tensor:
    torch.manual_seed(0)  # some of these nodes draw tiles or tokens from the global generator
    conds = conds or (random_conditioning(1, 77), random_conditioning(2, 77))
    return sample(cfg_guider(model, *conds, cfg), batch=batch)


@pytest.mark.parametrize("name", BESIDE)
def test_neutral_settings_leave_it_alone(easy, model, name: str) -> None:
    patch = BESIDE[name]
    alone = picture(patch(model))
    for patched in (
        patch(easy.apply(model, weight=0.0, lora=0.0)),
        easy.apply(patch(model), weight=0.0, lora=0.0, mask=HALF),
        easy.apply(patch(model), lora=0.0, mask=torch.zeros(1, 3, 3)),
    ):
        assert torch.equal(picture(patched), alone)


@pytest.mark.parametrize("name", [name for name in BESIDE if name != "IPAdapter"])
def test_references_act_in_either_order(easy, model, name: str) -> None:
    patch = BESIDE[name]
    alone = picture(patch(easy.apply(model, weight=0.0)), batch=2)
    for mask in (None, HALF, torch.stack([HALF[0], 1 - HALF[0]])):
        before, after = (
            picture(patched, batch=2)
            for patched in (easy.apply(patch(model), mask=mask), patch(easy.apply(model, mask=mask)))
        )
        assert torch.isfinite(before).all()
        assert golden.error(before, alone) > 1e-4
        assert golden.error(after, before) <= 1e-5


def test_adapter_before_ours(easy, model) -> None:
    found = picture(easy.apply(ip_adapter(model)))
    assert torch.isfinite(found).all()
    assert golden.error(found, picture(easy.apply(ip_adapter(model), weight=0.0))) > 1e-4
    assert golden.error(found, picture(easy.apply(model))) > 1e-4


@pytest.mark.parametrize(
    "settings", [{"mask": HALF}, {"weight_type": "style transfer", "weight_schedule": "1, 0.2"}]
)
def test_adapter_after_ours(easy, model, settings: dict) -> None:
    ours = easy.apply(model, **settings)
    both = picture(add_as_other_packs_do(ours, foreign_term, **ANYWHERE))
    assert torch.isfinite(both).all()
    assert golden.error(both, picture(ours)) > 1e-4


@in_float64
def test_mean_of_the_mask_where_tokens_have_no_place(easy, model) -> None:
    """Half a picture is half the weight, for queries of which nobody knows where they lie."""
    found = predict(fewer_queries(easy.apply(model, mask=HALF)))
    assert golden.error(found, predict(fewer_queries(easy.apply(model, weight=0.5)))) <= 1e-6


def test_guidance_of_1(easy, model) -> None:
    found = picture(easy.apply(model), cfg=1.0)
    assert golden.error(found, picture(easy.apply(model, weight=0.0), cfg=1.0)) > 1e-4
    assert torch.equal(picture(easy.apply(model, weight=0.0, lora=0.0), cfg=1.0), picture(model, cfg=1.0))


def test_area_conditioning(easy, model) -> None:
    import nodes as host_nodes  # late: on 0.20 it hides the modules other tests import from the host

    area = host_nodes.ConditioningSetAreaPercentage()
    second = area.append(random_conditioning(3, 77), 0.5, 1.0, 0.5, 0.0, 1.0)[0]
    conds = random_conditioning(1, 77) + second, random_conditioning(2, 77)
    assert torch.equal(
        picture(easy.apply(model, weight=0.0, lora=0.0), conds=conds), picture(model, conds=conds)
    )
    masked = picture(easy.apply(model, mask=HALF), conds=conds)
    assert torch.isfinite(masked).all()
    assert golden.error(masked, picture(easy.apply(model), conds=conds)) > 1e-4


def test_conditioning_with_hooks(easy, model) -> None:
    """A hook of one prompt makes the host evaluate the two prompts apart."""
    hooks = comfy.hooks.HookGroup()
    hooks.add(comfy.hooks.TransformerOptionsHook({"wrappers": {}}))
    hooked = comfy.hooks.set_hooks_for_conditioning(random_conditioning(1, 77), hooks)
    conds = hooked, random_conditioning(2, 77)
    alone = picture(model, conds=conds)
    assert torch.equal(picture(easy.apply(model, weight=0.0, lora=0.0), conds=conds), alone)
    assert golden.error(picture(easy.apply(model), conds=conds), picture(easy.apply(model))) <= 1e-5


# Other UNets


def test_inpainting_unet(easy) -> None:
    """Nine channels: latent, mask and masked latent."""
    model = random_sdxl(seed=0, in_channels=9)
    plain, patched = (nine_channels(m) for m in (model, easy.apply(model, lora=0.0, mask=HALF)))
    assert torch.isfinite(patched).all()
    assert golden.error(patched, plain) > 1e-4
    assert torch.equal(nine_channels(easy.apply(model, weight=0.0, lora=0.0)), plain)


def nine_channels(model: ModelPatcher) -> Tensor:
    comfy.model_management.load_models_gpu([model])
    random = torch.Generator().manual_seed(0)
    x, context, y = (torch.randn(2, *shape, generator=random) for shape in ((9, 16, 16), (77, 32), (80,)))
    options = sampling_options(model) | {"cond_or_uncond": [1, 0], "sigmas": torch.ones(2)}
    with torch.inference_mode():
        return model.model.diffusion_model(
            x, torch.ones(2), context=context, y=y, transformer_options=options
        )


def test_unet_stored_in_fp8(easy) -> None:
    """Weights in fp8, arithmetic as before: as the host's manual cast and GGUF's layers do it."""
    model = load_tiny_sdxl()
    for module in model.model.diffusion_model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = module.weight.data.to(torch.float8_e4m3fn)
            module.comfy_cast_weights = True
    plain = picture(model)
    assert torch.equal(picture(easy.apply(model, weight=0.0, lora=0.0)), plain)
    found = picture(easy.apply(model, lora=0.0, mask=HALF))
    assert torch.isfinite(found).all()
    assert golden.error(found, plain) > 1e-4


def test_patch_that_drops_the_references_is_told(easy, model, pack, monkeypatch, caplog) -> None:
    """It replaces ours and does not call it; one that does is not told of."""
    monkeypatch.setattr(golden.part(pack, "nodes.host.log"), "_given", set())
    applied = easy.apply(model)
    ours = applied.model_options["transformer_options"]["patches_replace"]["attn2"]["input", 4, 0]
    kept, dropped = applied.clone(), applied.clone()
    kept.set_model_attn2_replace(lambda *given: ours(*given) * 1.0, "input", 4, 0)
    assert torch.equal(picture(kept), picture(applied))
    assert not caplog.text
    dropped.set_model_attn2_replace(Adapter(), "input", 4, 0)
    picture(dropped)
    assert caplog.text.count("no effect in 1 of 17 cross-attentions") == 1
    assert "Adapter" in caplog.text


def test_first_of_two_references_that_another_pack_drops_is_told(
    easy, model, pack, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(golden.part(pack, "nodes.host.log"), "_given", set())
    between = easy.apply(model)
    between.set_model_attn2_replace(Adapter(), "input", 4, 0)
    picture(easy.apply(between, tokens=easy.other_tokens()))
    assert "no effect in 1 of 17 cross-attentions" in caplog.text
