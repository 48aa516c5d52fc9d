"""The second host: the same attention on a diffusers SDXL UNet, attached and removed bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch.nn.functional import linear, scaled_dot_product_attention

from ..tokens.reference_tokens import ReferenceTokens
from ..utils.in_place import add_in_place
from .layout import Site, in_processor_order, parse_diffusers, require_fit
from .reference_attention import KeyValue, apply_weight, reference_attention

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention
    from torch import Tensor, nn

    from ..model import EasyRef

# What a layer's low-rank update adds to its output, from its input.
Update = Callable[["Tensor"], "Tensor"]


class ReferenceProcessor:
    """Attention processor of one cross-attention: text attention plus the weighted reference term."""

    key_value: KeyValue | None = None  # set by Attachment.condition, the weight in it; None: no term
    real: Tensor | None = None  # (rows, T), False at tokens that only fill up a shorter row

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
        if self.key_value:
            out = self.with_references(out, q, attn.heads)
        for layer in attn.to_out:
            out = layer(out)
        return out

    def with_references(self, text: Tensor, q: Tensor, heads: int) -> Tensor:
        """What the text's attention gave (batch, tokens, inner), and the reference term of the same queries."""
        return add_in_place(text, reference_attention(q, self.key_value, heads, self.real))


class Attachment:
    """What `attach` and `apply` return: remove() gives the UNet back as it was."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        processors: Sequence[ReferenceProcessor],
        weight: float,
        undo: list[Callable[[], None]],
    ) -> None:
        self._unet, self._processors, self._weight, self._undo = unet, processors, weight, undo

    def condition(self, key_values: Sequence[KeyValue], real: Tensor | None = None) -> None:
        """Attend to these from now on: K and V (rows, T, inner) of every site, in processor order.

        A batch is as many equal runs of images as there are rows. real: (rows, T), False at tokens that only fill up a
        shorter row.
        """
        if not self._weight:
            return
        # diffusers' own .device and .dtype walk the whole UNet each time
        place = next(self._unet.parameters())
        for processor, (k, v) in zip(self._processors, key_values, strict=True):
            placed = k.to(place.device, place.dtype), v.to(place.device, place.dtype)
            processor.key_value = apply_weight(placed, self._weight)
            processor.real = real

    def remove(self) -> None:
        while self._undo:
            self._undo.pop()()


def cross_attention_widths(unet: UNet2DConditionModel) -> dict[Site, int]:
    """Width of the attention at each cross-attention site of a diffusers UNet, in processor order."""
    found = {
        parse_diffusers(name): module.to_k.out_features
        for name, module in unet.named_modules()
        if name.endswith("attn2")
    }
    return {site: found[site] for site in in_processor_order(found)}


def apply(
    unet: UNet2DConditionModel,
    model: EasyRef,
    tokens: Tensor,
    uncond: Tensor | None,
    weight: float = 1.0,
    lora_strength: float = 1.0,
) -> Attachment:
    """Condition `unet` on reference tokens (n, T, C) until the returned attachment is removed; meanwhile it stays on
    its device and in its dtype.

    The first half of every batch is unconditional, as diffusers' pipelines order it; with uncond (n or 1, T, C) None
    all rows are conditional. Either half is n equal runs of images, one for each group of references. weight: strength
    of the reference term; lora_strength: of the checkpoint's attention LoRA, which both halves carry whatever the
    weight. Raises ValueError for a UNet whose cross-attentions are not the checkpoint's, and for tokens of another
    checkpoint.
    """
    given = [tokens] if uncond is None else [_as_many(uncond, tokens), tokens]
    for side in (tokens, uncond):
        if isinstance(side, ReferenceTokens):
            model.require_same_checkpoint(side, "set of reference tokens")
    require_fit("The UNet", cross_attention_widths(unet), model.checkpoint.widths)
    rows = torch.cat(given)  # a copy: what inference mode made could not be used where gradients are recorded
    lora = {}
    if lora_strength:
        lora = low_rank_updates(
            {name: t.to(unet.device, unet.dtype) for name, t in model.checkpoint.lora().items()}
        )
    key_values = model.key_values(rows)
    attachment = attach(unet, lora, weight, lora_strength)
    try:
        attachment.condition(key_values)
    except BaseException:  # out of memory, Ctrl-C: nobody else could take it off again
        attachment.remove()
        raise
    return attachment


def attach(
    unet: UNet2DConditionModel,
    lora: Mapping[str, Update] | None = None,
    weight: float = 1.0,
    lora_strength: float = 1.0,
) -> Attachment:
    """Put a reference term into every cross-attention and low-rank updates beside the layers they are for.

    The UNet's own weights are never touched. lora: by path of the layer, <...>.attn1.to_q or to_k, to_v, to_out.
    Call condition() on what comes back before the UNet runs. Raises ValueError for a UNet conditioned already.
    """
    attentions = {name: module for name, module in unet.named_modules() if name.endswith(("attn1", "attn2"))}
    if any(isinstance(attention.processor, ReferenceProcessor) for attention in attentions.values()):
        raise ValueError(
            "The UNet is conditioned on references already. Call remove() on that attachment first."
        )
    processors, undo = [], []
    for site in cross_attention_widths(unet):
        attn2 = attentions[f"{site.diffusers}.attn2"]
        undo.append(partial(setattr, attn2, "processor", attn2.processor))
        attn2.processor = ReferenceProcessor()
        processors.append(attn2.processor)
    for path, update in (lora or {}).items():
        attention, _, part = path.rpartition(".")
        layer = getattr(attentions[attention], part)
        layer = layer[0] if part == "to_out" else layer
        undo.append(layer.register_forward_hook(_adding(update, lora_strength)).remove)
    return Attachment(unet, processors, weight, undo)


def low_rank_updates(lora: Mapping[str, Tensor]) -> dict[str, Update]:
    """Tensors by diffusers path (<path>.processor.to_q_lora.down.weight and .up.weight) -> {<path>.to_q: update}."""

    def update(down: Tensor, up: Tensor) -> Update:
        return lambda x: linear(linear(x, down), up)

    names = [name.removesuffix(".down.weight") for name in lora if name.endswith(".down.weight")]
    return {
        name.removesuffix("_lora").replace(".processor.", "."): update(
            lora[f"{name}.down.weight"], lora[f"{name}.up.weight"]
        )
        for name in names
    }


def _adding(update: Update, strength: float) -> Callable[..., Tensor]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + strength * update(inputs[0])

    return hook


def _as_many(uncond: Tensor, tokens: Tensor) -> Tensor:
    """The unconditional rows, one for each row of tokens."""
    if uncond.shape[1:] != tokens.shape[1:]:
        raise ValueError(
            f"The tokens are {tuple(tokens.shape)}, the unconditional ones {tuple(uncond.shape)}; wanted as many of one "
            "width in each row. Combine the unconditional side in the same way."
        )
    if len(uncond) not in (1, len(tokens)):
        raise ValueError(
            f"There are {len(uncond)} rows of unconditional tokens for {len(tokens)} groups; wanted 1, or one a group."
        )
    return uncond.expand(len(tokens), -1, -1)
