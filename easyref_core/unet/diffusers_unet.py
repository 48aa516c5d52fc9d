"""Reference attention and LoRA (by hooks) on a diffusers SDXL UNet, also in training; fully removable."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

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

# Input of a layer -> the low-rank update of its output.
Update = Callable[["Tensor"], "Tensor"]


class UNetWeights(Protocol):
    """The parts of a checkpoint that `apply` uses, see checkpoint.Checkpoint."""

    @property
    def widths(self) -> Mapping[Site, int]: ...
    def lora(self) -> Mapping[str, Tensor]: ...


class ReferenceModel(Protocol):
    """The parts of a loaded model that `apply` uses, see model.EasyRef."""

    checkpoint: UNetWeights

    def require_same_checkpoint(self, tokens: ReferenceTokens, name: str, /) -> None: ...
    def key_values(self, tokens: Tensor, /) -> Sequence[KeyValue]: ...


class ReferenceProcessor:
    """Attention processor of one cross-attention: text attention plus the weighted reference term."""

    def __init__(self) -> None:
        self._references: tuple[KeyValue, Tensor | None] | None = None

    def attend_to(self, key_value: KeyValue, padding_mask: Tensor | None = None) -> None:
        """Add the term of K and V (rows, T, inner), times the weight. padding_mask: see Attachment."""
        self._references = key_value, padding_mask

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
        if self._references:
            out = self.add_term(out, q, attn.heads)
        for layer in attn.to_out:
            out = layer(out)
        return out

    def add_term(self, text: Tensor, q: Tensor, heads: int) -> Tensor:
        """Output of the text attention (batch, tokens, inner) plus the reference term of the same queries."""
        key_value, padding_mask = self._references
        return add_in_place(text, reference_attention(q, key_value, heads, padding_mask))


@dataclasses.dataclass(frozen=True, eq=False)
class Attachment:
    """Reference terms and LoRA on a UNet, as `attach` and `apply` return them."""

    unet: UNet2DConditionModel
    processors: Sequence[ReferenceProcessor]
    weight: float
    undo: list[Callable[[], None]]  # together they restore the UNet

    def condition(self, key_values: Sequence[KeyValue], padding_mask: Tensor | None = None) -> None:
        """Attend to K and V (rows, T, inner) of each site, in processor order, from now on.

        A batch is as many equal runs of images as there are rows. padding_mask: (rows, T), False at padding.
        """
        if not self.weight:
            return
        # diffusers' own .device and .dtype walk the whole UNet each time
        parameter = next(self.unet.parameters())
        for processor, (k, v) in zip(self.processors, key_values, strict=True):
            pair = k.to(parameter.device, parameter.dtype), v.to(parameter.device, parameter.dtype)
            processor.attend_to(apply_weight(pair, self.weight), padding_mask)

    def remove(self) -> None:
        """Restore the UNet. A second call does nothing."""
        while self.undo:
            self.undo.pop()()


def cross_attention_widths(unet: UNet2DConditionModel) -> dict[Site, int]:
    """Width of the attention at each cross-attention site of a diffusers UNet, in processor order."""
    widths = {
        parse_diffusers(name): module.to_k.out_features
        for name, module in unet.named_modules()
        if name.endswith("attn2")
    }
    return {site: widths[site] for site in in_processor_order(widths)}


def apply(
    unet: UNet2DConditionModel,
    model: ReferenceModel,
    tokens: Tensor,
    uncond: Tensor | None,
    weight: float = 1.0,
    lora_strength: float = 1.0,
) -> Attachment:
    """Condition `unet` on reference tokens (n, T, C) until remove() of the returned attachment.

    The UNet must stay on its device and in its dtype meanwhile. The first half of each batch is
    unconditional, as diffusers' pipelines order it; with uncond (n or 1, T, C) None all rows are conditional.
    Either half is n equal runs of images, one for each group of references. model: an EasyRef. weight:
    strength of the reference term.
    lora_strength: strength of the checkpoint's attention LoRA, which acts on both halves at any weight.
    Raises ValueError for a UNet whose cross-attentions are not the checkpoint's, and for tokens of another
    checkpoint.
    """
    branches = [tokens] if uncond is None else [_expand_rows(uncond, tokens), tokens]
    for branch in (tokens, uncond):
        if isinstance(branch, ReferenceTokens):
            model.require_same_checkpoint(branch, "set of reference tokens")
    require_fit("The UNet", cross_attention_widths(unet), model.checkpoint.widths)
    rows = torch.cat(branches)  # a copy: an inference tensor could not be used where gradients are recorded
    lora = {}
    if lora_strength:
        place = unet.device, unet.dtype  # diffusers searches all modules for each of them
        lora = low_rank_updates({name: t.to(*place) for name, t in model.checkpoint.lora().items()})
    key_values = model.key_values(rows)
    attachment = attach(unet, lora, weight, lora_strength)
    try:
        attachment.condition(key_values)
    except BaseException:  # out of memory, Ctrl-C: the caller has no attachment to remove
        attachment.remove()
        raise
    return attachment


def attach(
    unet: UNet2DConditionModel,
    lora: Mapping[str, Update] | None = None,
    weight: float = 1.0,
    lora_strength: float = 1.0,
) -> Attachment:
    """Add a reference term to each cross-attention, and low-rank updates to the layers that they are for.

    The UNet's own weights are not changed. lora: by path of the layer, <...>.attn1.to_q or to_k, to_v,
    to_out. Call condition() of the returned attachment before the UNet runs.
    Raises ValueError for a UNet that is conditioned already.
    """
    attentions = {name: module for name, module in unet.named_modules() if name.endswith(("attn1", "attn2"))}
    if any(isinstance(attention.processor, ReferenceProcessor) for attention in attentions.values()):
        raise ValueError(
            "The UNet is conditioned on references already. Call remove() on that attachment first."
        )
    processors, undo = [], []
    for site in cross_attention_widths(unet):
        attn2 = attentions[f"{site.diffusers}.attn2"]
        undo.append(partial(attn2.set_processor, attn2.processor))
        processors.append(ReferenceProcessor())
        attn2.set_processor(processors[-1])
    for path, update in (lora or {}).items():
        attention, _, name = path.rpartition(".")
        layer = getattr(attentions[attention], name)
        layer = layer[0] if name == "to_out" else layer
        undo.append(layer.register_forward_hook(partial(add_update, update, lora_strength)).remove)
    return Attachment(unet, processors, weight, undo)


def low_rank_updates(lora: Mapping[str, Tensor]) -> dict[str, Update]:
    """Low-rank updates by layer, {<path>.to_q: update}, from <path>.processor.to_q_lora.{down,up}.weight."""

    def update(down: Tensor, up: Tensor) -> Update:
        return lambda x: linear(linear(x, down), up)

    names = [name.removesuffix(".down.weight") for name in lora if name.endswith(".down.weight")]
    return {
        name.removesuffix("_lora").replace(".processor.", "."): update(
            lora[f"{name}.down.weight"], lora[f"{name}.up.weight"]
        )
        for name in names
    }


def add_update(
    update: Update, strength: float, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    """Forward hook that adds an update to a layer's output."""
    return output + strength * update(inputs[0])


def _expand_rows(uncond: Tensor, tokens: Tensor) -> Tensor:
    """The unconditional tokens with a row for each row of `tokens`."""
    if uncond.shape[1:] != tokens.shape[1:]:
        raise ValueError(
            f"The tokens are {tuple(tokens.shape)}, the unconditional ones {tuple(uncond.shape)}; wanted as "
            "many of one width in each row. Combine the unconditional tokens in the same way."
        )
    if len(uncond) not in (1, len(tokens)):
        raise ValueError(
            f"There are {len(uncond)} rows of unconditional tokens for {len(tokens)} groups; wanted 1, or "
            "one per group."
        )
    return uncond.expand(len(tokens), -1, -1)
