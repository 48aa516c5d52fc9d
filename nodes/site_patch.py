"""The attn2 replacement at one cross-attention: what was there before, plus one injection's reference term."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from comfy.ldm.modules.attention import optimized_attention

from ..easyref_core.attention import reference_attention
from ..easyref_core.in_place import plus
from ..easyref_core.unet_layout import Site
from .injection import IDLE, STEP, Acting, Step

if TYPE_CHECKING:
    from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class SitePatch:
    """attn2 replacement at one site: what was there before, plus one injection's reference term."""

    injection: int  # Injection.id
    position: int  # of the site, in processor order
    site: Site
    previous: Callable[..., Tensor] | None
    added: list[tuple[Callable[..., Tensor], dict[str, Any]]] = dataclasses.field(default_factory=list)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        step: Step = extra_options.get(STEP, IDLE)
        previous = self.previous or text_attention
        if not isinstance(previous, SitePatch):
            # Set before this patch or after it: the host looks for a site's own patch first and would not come to it.
            previous = step.whole_blocks.get(extra_options.get("block"), previous)
        out = previous(q, k, v, extra_options)
        if self.injection in step.acting:
            out = plus(out, self._term(q, out, step, extra_options))
        for callback, options in self.added:
            if options.get("sigma_end", 0.0) <= step.sigma <= options.get("sigma_start", math.inf):
                out = out + callback(out, q, k, v, extra_options, **options)
        return out.to(q.dtype)

    def _term(self, q: Tensor, out: Tensor, step: Step, extra_options: dict[str, Any]) -> Tensor:
        """The weighted, masked reference term, (rows, tokens, inner) as q, its own. out: what it will be added to."""
        acting: Acting = step.acting[self.injection]
        key_value = tuple(t.to(q.dtype) for t in acting.key_values[self.position])
        term = reference_attention(q, key_value, extra_options["n_heads"])
        if acting.mask is not None:
            term = term * acting.mask(_grid(extra_options, q), q)
        if acting.recorder is not None:
            grid = _grid(extra_options, q)
            acting.recorder.record(step.sigma, self.site, step.unconditional, term, out, grid)
        return term

    def add(self, callback: Callable[..., Tensor], **options: Any) -> None:
        """What IPAdapter_plus and InstantID call on the patch they find: their term, within their own window.

        They call it on a clone they made; `_own_additions` has given that clone lists of its own.
        """
        self.added.append((callback, options))

    # What the host calls on every patch it finds, with devices and dtypes, before loading and after sampling: nothing
    # here has weights, but what was there before may have.

    def to(self, *place: Any) -> SitePatch:
        previous = self.previous.to(*place) if hasattr(self.previous, "to") else self.previous
        return self if previous is self.previous else dataclasses.replace(self, previous=previous)

    def models(self) -> list[Any]:
        return self.previous.models() if hasattr(self.previous, "models") else []

    def cleanup(self) -> None:
        if hasattr(self.previous, "cleanup"):
            self.previous.cleanup()

    def __deepcopy__(self, memo: dict) -> SitePatch:
        return dataclasses.replace(self, added=list(self.added))


def text_attention(q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
    """The host's own cross-attention, as it runs where nothing is patched."""
    return optimized_attention(
        q,
        k,
        v,
        extra_options["n_heads"],
        attn_precision=extra_options.get("attn_precision"),
        transformer_options=extra_options,
    )


def _grid(extra_options: dict[str, Any], q: Tensor) -> tuple[int, int]:
    """Rows and columns of the query tokens, as the host's spatial transformer says; one row where nobody does."""
    shape = extra_options.get("activations_shape") or (1, q.shape[1])
    return tuple(shape[-2:])
