"""The attn2 replacement at one cross-attention: the attention that was there before, plus one injection's
reference term.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from comfy.ldm.modules.attention import optimized_attention

from ...easyref_core.unet.layout import Site
from ...easyref_core.unet.reference_attention import reference_attention
from ...easyref_core.utils.in_place import add_in_place
from ..host.log import warn_once
from .batch_layout import Queries, rows_of_queries
from .cond_roles import FIRST_SIGMA
from .injection import STEP, ActiveInjection, Step, equal_runs
from .replaced_forward import run_replaced_forward

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from torch import Tensor

    from ...easyref_core.unet.reference_attention import KeyValue


@dataclasses.dataclass(frozen=True, eq=False)
class SitePatch:
    """attn2 replacement at one site: what was there before, plus one injection's reference term."""

    slot: int  # number of the Apply EasyRef node in its chain
    position: int  # of the site, in processor order
    site: Site
    previous: Callable[..., Tensor] | None
    added: list[tuple[Callable[..., Tensor], dict[str, Any]]] = dataclasses.field(default_factory=list)
    model: ModelPatcher | None = None  # to be loaded with the UNet

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        step: Step = extra_options.get(STEP) or _no_step()
        if not torch.compiler.is_compiling():
            step.reached.add((self.slot, self.site))
        out = self._before(step, extra_options)(q, k, v, extra_options)
        if self.slot in step.active:
            out = add_in_place(out, self._term(q, out, step, extra_options))
        for callback, options in self.added:
            if options.get("sigma_end", 0.0) <= step.sigma <= options.get("sigma_start", math.inf):
                out = out + callback(out, q, k, v, extra_options, **options)
        return out.to(q.dtype)

    def _before(self, step: Step, extra_options: dict[str, Any]) -> Callable[..., Tensor]:
        if isinstance(self.previous, SitePatch):
            return self.previous
        # Set before this patch or after it: the host looks for a site's own patch first and would not come to
        # it.
        return step.whole_blocks.get(extra_options.get("block"), self.previous or text_attention)

    def _term(self, q: Tensor, out: Tensor, step: Step, extra_options: dict[str, Any]) -> Tensor:
        """The weighted, masked reference term, (rows, tokens, inner) as q, its own. out: what it will be
        added to.
        """
        active = step.active[self.slot]
        grid = _grid(extra_options, q)
        rows = self._rows(q, grid, step, extra_options)
        key_value = tuple(t.to(q.dtype) for t in active.key_values[self.position])
        if rows is not None:
            key_value = _of_rows(key_value, rows, len(step.layout))
        term = reference_attention(q, key_value, extra_options["n_heads"])
        if active.mask is not None:
            term = term * _mask(active, step, rows, grid, q)
        if active.recorder is not None:
            chosen = step.layout if rows is None else [step.layout[row] for row in rows]
            sides = [row.unconditional for row in chosen]
            active.recorder.record(step.sigma, self.site, sides, term, out, grid)
        return term

    def _rows(
        self, q: Tensor, grid: tuple[int, int], step: Step, extra_options: dict[str, Any]
    ) -> tuple[int, ...] | None:
        """See rows_of_queries. Counts the calls of this attention where it runs on one row after the
        other.
        """
        calls = 0
        if step.one_by_one:
            calls = step.calls[self.slot, self.site]
            step.calls[self.slot, self.site] += 1
        queries = Queries(*q.shape[:2], grid, calls, step.one_by_one)
        return rows_of_queries(queries, step.layout, extra_options)

    def add(self, callback: Callable[..., Tensor], **options: Any) -> None:
        """What IPAdapter_plus and InstantID call on the patch they find: their term, within their own window.

        They call it on a clone they made; `_own_additions` has given that clone lists of its own.
        """
        self.added.append((callback, options))

    # What the host calls on every patch it finds, with devices and dtypes, before loading and after sampling:
    # nothing here has weights, but what was there before may have.

    def to(self, *place: Any) -> SitePatch:
        previous = self.previous.to(*place) if hasattr(self.previous, "to") else self.previous
        return self if previous is self.previous else dataclasses.replace(self, previous=previous)

    def models(self) -> list[Any]:
        previous = self.previous.models() if hasattr(self.previous, "models") else []
        return previous if self.model is None else [self.model, *previous]

    def cleanup(self) -> None:
        if hasattr(self.previous, "cleanup"):
            self.previous.cleanup()

    def __deepcopy__(self, memo: dict) -> SitePatch:
        return dataclasses.replace(self, added=list(self.added))


def is_foreign(patch: Any) -> bool:
    """Whether an attn2 replacement is, or contains, another pack's; no replacement is not."""
    if patch is None:
        return False
    return not isinstance(patch, SitePatch) or bool(patch.added) or is_foreign(patch.previous)


def text_attention(q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
    """The host's own cross-attention, as it runs where nothing is patched."""
    if len(k) != len(q):
        return run_replaced_forward(q, k, v, extra_options)
    return optimized_attention(
        q,
        k,
        v,
        extra_options["n_heads"],
        attn_precision=extra_options.get("attn_precision"),
        transformer_options=extra_options,
    )


def _no_step() -> Step:
    """Step of a UNet call that came without the patcher's wrappers: the text alone."""
    warn_once(
        "A pack called the UNet without the model's wrappers, so the references have no effect in that "
        "call. Remove that pack's node, or Apply EasyRef."
    )
    return Step(FIRST_SIGMA, {})


def _of_rows(key_value: KeyValue, rows: tuple[int, ...], count: int) -> KeyValue:
    """K and V (runs, T, inner) for rows of queries. rows: of the UNet call, whose `count` rows are as many
    equal runs.
    """
    length = count // len(key_value[0])
    runs = equal_runs(tuple(row // length for row in rows))
    return tuple(_select(tensor, runs) for tensor in key_value)


def _select(tensor: Tensor, rows: tuple[int, ...]) -> Tensor:
    """These rows of a tensor. By slices: an index would have to be brought to the device at every
    attention.
    """
    return torch.cat([tensor[row : row + 1] for row in rows])


def _mask(
    active: ActiveInjection, step: Step, rows: tuple[int, ...] | None, grid: tuple[int, int], q: Tensor
) -> Tensor:
    """The mask for the queries, (1 or rows of q, tokens or 1, 1)."""
    mask = active.mask(grid, q.shape[1]).to(q.dtype)
    return mask if rows is None or len(mask) == 1 else _select(mask, rows)


def _grid(extra_options: dict[str, Any], q: Tensor) -> tuple[int, int]:
    """Rows and columns of the query tokens, as the host's spatial transformer says; one row where nobody
    does.
    """
    shape = extra_options.get("activations_shape") or (1, q.shape[1])
    return tuple(shape[-2:])
