"""Imitations of other packs' changes to a UNet batch and its attentions, each contract in a few lines.

docs/compared.md lists the packs that were run with their own code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, NamedTuple

import torch
from comfy.ldm.modules.attention import CrossAttention, optimized_attention
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

ANYWHERE = {"sigma_start": 1e9, "sigma_end": 0.0}  # a window above and below every schedule


def foreign_term(out: Tensor, q: Tensor, k: Tensor, v: Tensor, extra_options: dict, **_: Any) -> Tensor:
    """Another pack's term: it depends on nothing of EasyRef's and differs at each site."""
    return q * (0.1 + 0.05 * extra_options["block"][1])


class Adapter:
    """A replacement of IPAdapter_plus or InstantID: the text attention and its term."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        out = optimized_attention(q, k, v, extra_options["n_heads"])
        return out + foreign_term(out, q, k, v, extra_options)


def with_lora(model: ModelPatcher) -> ModelPatcher:
    clone = model.clone()
    name = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_q.weight"
    assert clone.add_patches({name: ("diff", (torch.full((32, 32), 0.05),))})
    return clone


def with_term(
    model: ModelPatcher, callback: Callable[..., Tensor] = foreign_term, **options: Any
) -> ModelPatcher:
    """IPAdapter_plus and InstantID: on a clone, call .add on the patches in copied dicts.

    The copies are dropped, so that only what .add changes in place remains.
    """
    clone = model.clone()
    for patch in dict(clone.model_options["transformer_options"]["patches_replace"]["attn2"]).values():
        patch.add(callback, **(options or ANYWHERE))
    return clone


class Tile(NamedTuple):
    """A tile of a latent, in latent pixels."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, latent: Tensor) -> Tensor:
        return latent[..., self.top : self.top + self.height, self.left : self.left + self.width]


def repeated(rows: Tensor, count: int) -> Tensor:
    """A per-row tensor for `count` rows, repeated as a whole."""
    return rows.repeat(-(-count // len(rows)), *[1] * (rows.ndim - 1))[:count]


def tiled(
    model: ModelPatcher,
    tiles: Sequence[Tile],
    batch: int,
    shift: int = 0,
    change: Callable[[Tensor], Tensor] = lambda tile: tile,
    keep: Callable[[str], bool] = lambda name: True,
) -> ModelPatcher:
    """Tiled Diffusion: a UNet call is of `batch` tiles, each with all rows of the latent.

    shift: columns by which the latent is rolled before it is cut, as SpotDiffusion does. change: applied to
    each tile of the UNet's input and output. keep: predicate of the conditionings that are passed on.
    """

    def function(apply_model: Callable, args: dict[str, Any]) -> Tensor:
        x = args["input"].roll(shift, dims=-1)
        out, weight = torch.zeros_like(x), torch.zeros_like(x)
        for first in range(0, len(tiles), batch):
            some = tiles[first : first + batch]
            cut = torch.cat([change(tile.cut(x)) for tile in some])
            conds = {
                name: repeated(value, len(cut)) if isinstance(value, Tensor) else value
                for name, value in args["c"].items()
                if keep(name)
            }
            found = apply_model(cut, repeated(args["timestep"], len(cut)), **conds)
            for tile, part in zip(some, found.chunk(len(some)), strict=True):
                tile.cut(out).add_(change(part))
                tile.cut(weight).add_(1)
        return (out / weight).roll(-shift, dims=-1)

    clone = model.clone()
    clone.set_model_unet_function_wrapper(function)
    return clone


def coupled(model: ModelPatcher, contexts: Sequence[Tensor], masks: Tensor, key: str | None) -> ModelPatcher:
    """Attention couple: every conditional run is repeated for each further region, and masks combine them.

    contexts: of the further regions, (1, tokens, width). masks: (regions, height, width), which sum to 1.
    key: of the roles of the longer batch in extra_options; None: they are not published.
    """
    regions = 1 + len(contexts)

    def spread(n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> tuple:
        roles, runs = options["cond_or_uncond"], len(options["cond_or_uncond"])
        queries, texts, all_roles = [], [], []
        for role, q, text in zip(roles, n.chunk(runs), context.chunk(runs), strict=True):
            repeats = 1 if role == 1 else regions
            queries.append(q.repeat(repeats, 1, 1))
            texts += [text, *(c.to(text).expand(len(text), -1, -1) for c in contexts[: repeats - 1])]
            all_roles += [role] * repeats
        if key:
            options[key] = all_roles
        return torch.cat(queries), torch.cat(texts), torch.cat(texts)

    def gather(n: Tensor, options: dict[str, Any]) -> Tensor:
        roles = options["cond_or_uncond"]
        length = len(n) // sum(1 if role == 1 else regions for role in roles)
        grid = tuple(options["activations_shape"][-2:])
        weights = torch.nn.functional.interpolate(masks[:, None].to(n), grid, mode="nearest").flatten(2)
        out, first = [], 0
        for role in roles:
            count = 1 if role == 1 else regions
            part = n[first : first + count * length].unflatten(0, (count, length))
            out.append(part[0] if role == 1 else (part * weights[:, :, :, None]).sum(dim=0))
            first += count * length
        return torch.cat(out)

    clone = model.clone()
    clone.set_model_attn2_patch(spread)
    clone.set_model_attn2_output_patch(gather)
    return clone


class ReUNetModel(UNetModel):
    """RES4LYF's UNet runs once for each row of its batch, with all of them in cond_or_uncond."""

    style_rows = 0  # rows that a style guide adds to each

    def _forward(self, *args: Any, **more: Any) -> Tensor:
        *per_row, control, options = args  # x, timesteps, context, y
        out = []
        for i in range(len(options["cond_or_uncond"])):
            rows = torch.tensor([i] * (1 + self.style_rows))
            out.append(super()._forward(*(part[rows] for part in per_row), control, options, **more)[:1])
        return torch.cat(out)


def row_after_row(model: ModelPatcher, style_rows: int = 0) -> ModelPatcher:
    """RES4LYF's ReSDPatcher."""
    clone = model.clone()
    unet = type("ReUNetModel", (ReUNetModel,), {"style_rows": style_rows})
    clone.add_object_patch("diffusion_model.__class__", unet)
    return clone


def nag(model: ModelPatcher, negative: Tensor, scale: float) -> ModelPatcher:
    """NAG: rows of a negative prompt are appended to the context, and every attn2's forward is replaced.

    negative: (1, tokens, width).
    """

    def guided(self: CrossAttention, x: Tensor, context: Tensor, value: Any = None, **_: Any) -> Tensor:
        negatives = len(context) - len(x)
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context if value is None else value)
        out = optimized_attention(q, k[:-negatives], v[:-negatives], self.heads)
        against = optimized_attention(q[-negatives:], k[-negatives:], v[-negatives:], self.heads)
        out[-negatives:] = scale * out[-negatives:] - (scale - 1) * against
        return self.to_out(out)

    def with_negative(
        executor: Any, x: Tensor, t: Tensor, context: Tensor, *args: Any, **more: Any
    ) -> Tensor:
        roles = args[2]["cond_or_uncond"]  # y, control, transformer_options
        if 0 not in roles:
            return executor(x, t, context, *args, **more)
        named = (each for name, each in executor.class_obj.named_modules() if name.endswith("attn2"))
        attentions = [module for module in named if isinstance(module, CrossAttention)]
        for attention in attentions:
            attention.forward = MethodType(guided, attention)
        try:
            negatives = negative.to(context).expand(len(x) // len(roles), -1, -1)
            return executor(x, t, torch.cat([context, negatives]), *args, **more)
        finally:
            for attention in attentions:
                del attention.forward

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "nag", with_negative)
    return clone
