"""attn2 replacement at one cross-attention: the attention that it replaces, plus one injection's term."""

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
from .replaced_forward import run_replaced_forward
from .row_selection import equal_runs
from .step import FIRST_SIGMA, STEP, ActiveInjection, Step

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from torch import Tensor

    from ...easyref_core.unet.reference_attention import KeyValue


@dataclasses.dataclass(frozen=True, eq=False)
class SitePatch:
    """attn2 replacement at one site."""

    slot: int  # number of the Apply EasyRef node in its chain
    position: int  # of the site, in processor order
    site: Site
    previous: Callable[..., Tensor] | None  # replacement that this patch calls; None: the text's attention
    # of other packs, with their options; added to the output within their window of sigmas
    callbacks: list[tuple[Callable[..., Tensor], dict[str, Any]]] = dataclasses.field(default_factory=list)
    model: ModelPatcher | None = None  # to be loaded with the UNet

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        step: Step = extra_options.get(STEP) or _text_only_step()
        if not torch.compiler.is_compiling():
            step.reached.add((self.slot, self.site))
        out = self._attention(step, extra_options)(q, k, v, extra_options)
        if self.slot in step.active:
            out = add_in_place(out, self._term(q, out, step, extra_options))
        for callback, options in self.callbacks:
            if options.get("sigma_end", 0.0) <= step.sigma <= options.get("sigma_start", math.inf):
                out = out + callback(out, q, k, v, extra_options, **options)
        return out.to(q.dtype)

    def _attention(self, step: Step, extra_options: dict[str, Any]) -> Callable[..., Tensor]:
        if isinstance(self.previous, SitePatch):
            return self.previous
        # Patches of whole blocks, set before this patch or after it: the host looks for a site's own patch
        # first and then does not call them.
        return step.block_patches.get(extra_options.get("block"), self.previous or text_attention)

    def _term(self, q: Tensor, out: Tensor, step: Step, extra_options: dict[str, Any]) -> Tensor:
        """The weighted, masked reference term, (rows, tokens, inner) as q, in memory of its own.

        out: the attention that it will be added to.
        """
        active = step.active[self.slot]
        grid = _grid(extra_options, q)
        rows = self._rows(q, grid, step, extra_options)
        key_value = tuple(t.to(q.dtype) for t in active.key_values[self.position])
        if rows is not None:
            key_value = _gather_runs(key_value, rows, len(step.layout))
        term = reference_attention(q, key_value, extra_options["n_heads"])
        if active.mask is not None:
            term = term * _mask(active, rows, grid, q)
        if active.recorder is not None:
            layout = step.layout if rows is None else [step.layout[row] for row in rows]
            sides = [row.unconditional for row in layout]
            active.recorder.record(step.sigma, self.site, sides, term, out, grid=grid)
        return term

    def _rows(
        self, q: Tensor, grid: tuple[int, int], step: Step, extra_options: dict[str, Any]
    ) -> tuple[int, ...] | None:
        """See rows_of_queries. Counts this attention's calls where it runs on one row after the other."""
        calls = 0
        if step.rowwise:
            calls = step.calls[self.slot, self.site]
            step.calls[self.slot, self.site] += 1
        queries = Queries(*q.shape[:2], grid, calls, step.rowwise)
        return rows_of_queries(queries, step.layout, extra_options)

    def add(self, callback: Callable[..., Tensor], **options: Any) -> None:
        """Add another pack's term, within its own window: IPAdapter_plus and InstantID call this on patches.

        They call it on a model that they cloned; its ON_CLONE callback has copied the patches.
        """
        self.callbacks.append((callback, options))

    def copy(self) -> SitePatch:
        return dataclasses.replace(self, callbacks=list(self.callbacks))

    # The host calls these on every patch, with devices and dtypes, before loading and after sampling. This
    # patch has no weights, but the one that it replaces may have some.

    def to(self, *target: Any) -> SitePatch:
        previous = self.previous.to(*target) if hasattr(self.previous, "to") else self.previous
        return self if previous is self.previous else dataclasses.replace(self, previous=previous)

    def models(self) -> list[Any]:
        previous = self.previous.models() if hasattr(self.previous, "models") else []
        return previous if self.model is None else [self.model, *previous]

    def cleanup(self) -> None:
        if hasattr(self.previous, "cleanup"):
            self.previous.cleanup()

    def __deepcopy__(self, memo: dict) -> SitePatch:
        return self.copy()


def is_foreign(patch: Any) -> bool:
    """True if an attn2 replacement is, or contains, another pack's; False for None."""
    if patch is None:
        return False
    return not isinstance(patch, SitePatch) or bool(patch.callbacks) or is_foreign(patch.previous)


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


def _text_only_step() -> Step:
    """Step of a UNet call without the patcher's wrappers: no injection is active."""
    warn_once(
        "A pack called the UNet without the model's wrappers, so the references have no effect in that call. "
        "Remove that pack's node, or Apply EasyRef."
    )
    return Step(FIRST_SIGMA, {})


def _gather_runs(key_value: KeyValue, rows: tuple[int, ...], count: int) -> KeyValue:
    """K and V (runs, T, inner) for rows of queries.

    rows: of the UNet call, whose `count` rows consist of as many equal runs as K and V have rows.
    """
    length = count // len(key_value[0])
    runs = equal_runs(tuple(row // length for row in rows))
    return tuple(_gather(tensor, runs) for tensor in key_value)


def _gather(tensor: Tensor, rows: tuple[int, ...]) -> Tensor:
    """Rows of a tensor, by slices, because an index would be copied to the device at every attention."""
    return torch.cat([tensor[row : row + 1] for row in rows])


def _mask(active: ActiveInjection, rows: tuple[int, ...] | None, grid: tuple[int, int], q: Tensor) -> Tensor:
    """The mask for the queries, (1 or rows of q, tokens or 1, 1)."""
    mask = active.mask(grid, q.shape[1]).to(q.dtype)
    return mask if rows is None or len(mask) == 1 else _gather(mask, rows)


def _grid(extra_options: dict[str, Any], q: Tensor) -> tuple[int, int]:
    """Rows and columns of the query tokens, from the host's spatial transformer; one row where unknown."""
    shape = extra_options.get("activations_shape") or (1, q.shape[1])
    return tuple(shape[-2:])
