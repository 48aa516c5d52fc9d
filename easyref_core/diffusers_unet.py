"""The second host: the same attention on a diffusers SDXL UNet, attached and removed bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch.nn.functional import linear, scaled_dot_product_attention

from .attention import KeyValue, reference_attention
from .reference_tokens import ReferenceTokens
from .unet_layout import parse_diffusers, require_fit

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention
    from torch import Tensor, nn

    from .model import EasyRef


class ReferenceProcessor:
    """Attention processor of one cross-attention: text attention plus the weighted reference term."""

    def __init__(self, key_value: KeyValue, weight: float) -> None:
        self.key_value, self.weight = key_value, weight

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        **_: object,
    ) -> Tensor:
        q, k, v = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        heads = [rearrange(t, "b n (h d) -> b h n d", h=attn.heads) for t in (q, k, v)]
        if attention_mask is not None:
            mask = attn.prepare_attention_mask(attention_mask, k.shape[1], q.shape[0])
            attention_mask = rearrange(mask, "(b h) m n -> b h m n", h=attn.heads)
        text = scaled_dot_product_attention(*heads, attn_mask=attention_mask)
        out = rearrange(text, "b h n d -> b n (h d)")
        if self.weight:
            out = out + reference_attention(q, self.key_value, attn.heads, self.weight)
        for layer in attn.to_out:
            out = layer(out)
        return out


class Attachment:
    """What `apply` returns: remove() gives the UNet back as it was."""

    def __init__(self, undo: list[Callable[[], None]]) -> None:
        self._undo = undo

    def remove(self) -> None:
        while self._undo:
            self._undo.pop()()


def apply(
    unet: UNet2DConditionModel,
    model: EasyRef,
    tokens: Tensor,
    uncond: Tensor | None,
    weight: float = 1.0,
    lora_strength: float = 1.0,
) -> Attachment:
    """Condition `unet` on reference tokens (1, T, C) until the returned attachment is removed; meanwhile it stays on
    its device and in its dtype.

    The first half of every batch is unconditional, as diffusers' pipelines order it; with uncond None all rows are
    conditional. weight: strength of the reference term; lora_strength: of the checkpoint's attention LoRA, which both
    halves carry whatever the weight. Raises ValueError for a UNet whose cross-attentions are not the checkpoint's, and
    for tokens of another checkpoint.
    """
    attentions = {name: module for name, module in unet.named_modules() if name.endswith(("attn1", "attn2"))}
    found = {parse_diffusers(n): m.to_k.out_features for n, m in attentions.items() if n.endswith("attn2")}
    require_fit("The UNet", found, model.checkpoint.widths)
    if any(isinstance(attention.processor, ReferenceProcessor) for attention in attentions.values()):
        raise ValueError(
            "The UNet is conditioned on references already. Call remove() on that attachment first."
        )
    given = [tokens] if uncond is None else [uncond, tokens]
    for side in given:
        if isinstance(side, ReferenceTokens):
            model.require_own(side, "set of reference tokens")
    rows = torch.cat(given)  # a copy: what inference mode made could not be used where gradients are recorded
    undo: list[Callable[[], None]] = []
    for site, key_value in zip(model.checkpoint.sites, model.key_values(rows), strict=True):
        attn2 = attentions[f"{site.diffusers}.attn2"]
        key_value = tuple(t.to(unet.device, unet.dtype) for t in key_value)
        undo.append(lambda attn=attn2, before=attn2.processor: setattr(attn, "processor", before))
        attn2.processor = ReferenceProcessor(key_value, weight)
    if lora_strength:
        lora = {name: t.to(unet.device, unet.dtype) for name, t in model.checkpoint.lora().items()}
        undo += _add_lora(attentions, lora, lora_strength)
    return Attachment(undo)


def _add_lora(
    attentions: dict[str, nn.Module], lora: dict[str, Tensor], strength: float
) -> list[Callable[[], None]]:
    """Low-rank updates of q, k, v and out as hooks, so that the UNet's own weights are never touched."""

    def hook(down: Tensor, up: Tensor) -> Callable[..., Tensor]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = inputs[0]
            return output + strength * linear(linear(x, down), up)

        return add

    undo = []
    for path, attn in attentions.items():
        for part, layer in (("q", attn.to_q), ("k", attn.to_k), ("v", attn.to_v), ("out", attn.to_out[0])):
            name = f"{path}.processor.to_{part}_lora"
            if f"{name}.down.weight" in lora:
                handle = layer.register_forward_hook(
                    hook(lora[f"{name}.down.weight"], lora[f"{name}.up.weight"])
                )
                undo.append(handle.remove)
    return undo
