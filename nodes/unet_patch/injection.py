"""One Apply EasyRef node's contribution, with values cached between UNet calls."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from ...easyref_core.unet.layer_weights import BranchTokens
from ...easyref_core.unet.reference_attention import V_ONLY, KeyValue, apply_weight
from ...easyref_core.unet.weight_schedule import Point, Schedule
from ...easyref_core.utils.lru_cache import ByteLRUCache
from ..host.attach import CopyByReference
from .batch_layout import UNKNOWN, BatchLayout
from .row_selection import RowBlock, RowIndex, runs_of, select_rows
from .step import ActiveInjection, MaskTable, StepMasks, UNetCall

if TYPE_CHECKING:
    from torch import Tensor

    from ...easyref_core.inspect.reference_share import Recorder
    from ..host.key_values import KeyValueRows

ATTENTION_LEVELS = (1, 2)  # of SDXL's UNet: its cross-attentions run on the latent halved once and twice

MASK_CACHE_BYTES = 2**28

Slot = TypeVar("Slot")
Key = TypeVar("Key")
Value = TypeVar("Value")
BatchSlot = tuple[torch.device, torch.dtype, tuple[bool, ...]]  # the sides of the batch's runs
Frames = tuple[int, ...]  # of the batch's runs


@dataclasses.dataclass(frozen=True)
class Strength:
    """Weight of one injection: weight times the factor of the layer times the schedule's factor."""

    weight: float
    window: tuple[float, float]  # (start, end) as fractions of the sampling
    factors: tuple[float, ...]  # per site
    points: tuple[Point, ...] = ()  # of the weight schedule
    scaling: str = V_ONLY


class WeightCurve:
    """Weight at each sigma. The model that samples converts the fractions of a Strength to sigmas."""

    def __init__(self, strength: Strength, model_sampling: Any) -> None:
        to_sigma = model_sampling.percent_to_sigma
        start, end = strength.window
        self._weight = strength.weight
        self._first, self._last = float(to_sigma(start)) if start > 0 else math.inf, float(to_sigma(end))
        self._schedule = Schedule(strength.points, to_sigma) if strength.points else None

    def __call__(self, sigma: float) -> float:
        """The weight of a step; 0 outside the window."""
        if not self._last <= sigma <= self._first:
            return 0.0
        return self._weight * self._schedule(sigma) if self._schedule else self._weight


class LatestCache(Generic[Slot, Key, Value]):
    """Cache of one entry per slot: the latest value and the key that it was computed for."""

    def __init__(self) -> None:
        self._entries: dict[Slot, tuple[Key, Value]] = {}

    def get(self, slot: Slot, key: Key, compute: Callable[[], Value]) -> Value:
        """The value of a slot, computed again where its key differs."""
        entry = self._entries.get(slot)
        if entry is None or entry[0] != key:
            self._entries.pop(slot, None)  # before the next is computed: the device need not hold both
            entry = self._entries[slot] = key, compute()
        return entry[1]

    def clear(self) -> None:
        self._entries.clear()


class StepCache:
    """Values that consecutive UNet calls of a sampling share."""

    def __init__(self) -> None:
        self.curves: LatestCache[Any, None, WeightCurve] = LatestCache()  # by model_sampling
        self.rows: LatestCache[BatchSlot, Frames, list[KeyValue]] = LatestCache()
        self.weighted: LatestCache[BatchSlot, Frames, list[KeyValue]] = LatestCache()  # at one weight
        self.masks: ByteLRUCache[Tensor] = ByteLRUCache(MASK_CACHE_BYTES)
        self._weight = 0.0

    def keep_weight(self, weight: float) -> None:
        """Drop K and V of another weight, in every slot: the device need not hold those of earlier steps."""
        if weight != self._weight:
            self.weighted.clear()
        self._weight = weight

    def clear(self) -> None:
        for cache in (self.curves, self.rows, self.weighted, self.masks):
            cache.clear()


@dataclasses.dataclass(frozen=True, eq=False)
class Injection(CopyByReference):
    """Contribution of one Apply node, shared by every clone of the model.

    branch_tokens: per site. mask: (frames, height, width) on the CPU. A copy by `dataclasses.replace` has a
    cache of its own.
    """

    key_values: KeyValueRows
    strength: Strength
    branch_tokens: tuple[BranchTokens, ...]
    mask: Tensor | None = None
    recorder: Recorder | None = None
    cache: StepCache = dataclasses.field(default_factory=StepCache, init=False)

    def __reduce__(self) -> str:
        raise TypeError(
            "A MODEL with Apply EasyRef cannot be pickled, because its patches belong to the UNet in this "
            "process. Run Apply EasyRef in the process that samples; the reference tokens can be pickled."
        )

    @property
    def rows(self) -> int:
        """Number of per-latent rows of tokens or masks; 1 if shared by all latents."""
        masks = 1 if self.mask is None else len(self.mask)
        return max(*self.key_values.counts, masks)

    def nbytes(self, latents: int, itemsize: int) -> int:
        """Bytes of K and V on the device in a UNet call of both sides of `latents` latents."""
        each = latents if max(self.key_values.counts) > 1 else 1
        rows = 2 * each + self.key_values.resident_rows
        return rows * self.key_values.row_numel * itemsize

    def active_at(self, sigma: float, layout: BatchLayout, call: UNetCall) -> ActiveInjection | None:
        """The injection in a UNet call; None outside the window.

        Raises ValueError where latents have tokens or masks of their own and the frames of the batch are
        unknown.
        """
        sampling = call.model_sampling
        weight = self.cache.curves.get(sampling, None, lambda: WeightCurve(self.strength, sampling))(sigma)
        if not weight:
            return None
        if self.rows > 1 and any(row.frame == UNKNOWN for row in layout):
            raise ValueError(
                "Another pack samples a part of the latents without its conditionings, so it is unknown "
                f"which of the {self.rows} rows of reference tokens or masks belong to it. Use tokens and a "
                "mask of one row, or remove that pack's node."
            )
        mask = None if self.mask is None else StepMasks(self.mask, layout, call, self.cache.masks)
        return ActiveInjection(self._weighted_rows(layout, call, weight), mask, self.recorder)

    def for_compile(
        self, active: ActiveInjection | None, layout: BatchLayout, call: UNetCall, size: tuple[int, int]
    ) -> ActiveInjection:
        """The injection in a form that is the same at every step: V = 0 outside the window, all masks.

        active: the result of `active_at`. size: (height, width) of the latent that the UNet is given.
        """
        if active is None:
            key_values = [(k, torch.zeros_like(v)) for k, v in self._weighted_rows(layout, call, 1.0)]
        else:
            key_values = active.key_values
        if self.mask is None:
            return ActiveInjection(key_values, None, self.recorder)
        grids = [tuple(-(-length // 2**level) for length in size) for level in ATTENTION_LEVELS]
        masks = StepMasks(self.mask, layout, call, self.cache.masks)
        table = MaskTable({grid: masks(grid, grid[0] * grid[1]) for grid in grids})
        return ActiveInjection(key_values, table, self.recorder)

    def release(self) -> None:
        """Release the copies on devices."""
        self.cache.clear()
        self.key_values.release()

    def _weighted_rows(self, layout: BatchLayout, call: UNetCall, weight: float) -> list[KeyValue]:
        """K and V per site with this weight applied, a row for each equal run of the layout."""
        runs = runs_of(layout, max(self.key_values.counts))
        slot = call.device, call.dtype, tuple(run.unconditional for run in runs)
        frames = tuple(run.frame for run in runs)
        rows = self.cache.rows.get(slot, frames, lambda: self._select(runs, call))
        self.cache.keep_weight(weight)
        return self.cache.weighted.get(slot, frames, lambda: self._apply_weight(rows, weight))

    def _select(self, runs: tuple[RowBlock, ...], call: UNetCall) -> list[KeyValue]:
        """K and V per site for these runs, (runs, T, inner)."""
        selection = select_rows(runs, self.key_values.counts, self.branch_tokens)
        key_values = self.key_values.select(selection.rows, call.device, call.dtype)
        index = {
            branch: RowIndex.of(positions, len(selection.rows), call.device)
            for branch, positions in selection.positions.items()
        }
        for i, branch in enumerate(self.branch_tokens):  # in place: the device need not hold all of both
            key_values[i] = tuple(map(index[branch].gather, key_values[i]))
        return key_values

    def _apply_weight(self, key_values: list[KeyValue], weight: float) -> list[KeyValue]:
        widest = max(k.shape[-1] for k, _ in key_values)
        pairs = zip(key_values, self.strength.factors, strict=True)
        return [apply_weight(pair, weight * factor, self.strength.scaling, widest) for pair, factor in pairs]
