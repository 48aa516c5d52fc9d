"""Contribution of one Apply EasyRef node, and the part of it that acts in one UNet call."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import torch

from ...easyref_core.unet.layer_weights import BranchTokens
from ...easyref_core.unet.masks import Crop, token_mask
from ...easyref_core.unet.reference_attention import V_ONLY, KeyValue, apply_weight
from ...easyref_core.unet.weight_schedule import Point, Schedule
from ...easyref_core.utils.lru_cache import ByteLRUCache
from .batch_layout import UNKNOWN, BatchLayout

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...easyref_core.inspect.reference_share import Recorder
    from ...easyref_core.unet.layout import Site
    from ..host.key_values import KeyValueRows

STEP = "easyref_step"  # in transformer_options: the Step of this UNet call

ATTENTION_LEVELS = (1, 2)  # of SDXL's UNet: its cross-attentions run on the latent halved once and twice

MASK_CACHE_BYTES = 2**28

Value = TypeVar("Value")
# Of a row of a batch: the frame that chooses its mask, and its part of the latent; its side, and the frame that
# chooses its tokens
MaskPart = tuple[int, Crop]
RowKey = tuple[bool, int]


class Place(NamedTuple):
    """Model and device of a UNet call."""

    model_sampling: nn.Module
    device: torch.device
    dtype: torch.dtype  # that the UNet computes in


class MaskTable:
    """Masks of every grid that an attention of SDXL has, made before the UNet runs."""

    def __init__(self, masks: dict[tuple[int, int], Tensor]) -> None:
        self._masks = masks

    def __call__(self, grid: tuple[int, int], tokens: int) -> Tensor:
        """The mask (1 or rows, tokens, 1) of a grid.

        Raises RuntimeError where another pack has changed grid or tokens.
        """
        if grid not in self._masks or grid[0] * grid[1] != tokens:
            raise RuntimeError("The mask of Apply EasyRef was not made for this size of the activations.")
        return self._masks[grid]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [tuple(mask.shape) for mask in self._masks.values()]


class StepMasks:
    """Masks of one UNet call, made when an attention asks for them."""

    def __init__(self, injection: Injection, layout: BatchLayout, place: Place) -> None:
        self._injection, self._place = injection, place
        parts = tuple((injection.mask_frame(row.frame), row.crop) for row in layout)
        self._parts = parts[:1] if len(set(parts)) == 1 else parts
        self._masks: dict[tuple[tuple[int, int], int], Tensor] = {}

    def __call__(self, grid: tuple[int, int], tokens: int) -> Tensor:
        """The mask for an attention's tokens, (1 or rows of the layout, tokens, 1).

        grid: (rows, columns) of the tokens. Where another pack has changed their number, their places are
        unknown: all get the mask's mean, (..., 1, 1).
        """
        if (grid, tokens) not in self._masks:
            self._masks[grid, tokens] = self._injection.mask_at(self._parts, self._place, grid, tokens)
        return self._masks[grid, tokens]


class ActiveInjection(NamedTuple):
    """One injection in one UNet call."""

    # per site (runs, T, inner), the weight in them; the batch is as many equal runs
    key_values: Sequence[KeyValue]
    mask: StepMasks | MaskTable | None = None
    recorder: Recorder | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """State of one UNet call, shared by all attentions, so that none reads sigma back from the device."""

    sigma: float
    active: dict[int, ActiveInjection]  # by the number of the Apply node in its chain
    layout: BatchLayout = ()
    unet: nn.Module | None = None
    one_by_one: bool = False  # whether the UNet runs its attentions on one row after the other
    whole_blocks: dict[tuple, Callable[..., Tensor]] = dataclasses.field(default_factory=dict)
    # Apply nodes and sites whose patch ran, where not compiled
    reached: set[tuple[int, Site]] = dataclasses.field(default_factory=set)
    # per patch: how often it ran on one of the rows
    calls: Counter = dataclasses.field(default_factory=Counter)


@dataclasses.dataclass(frozen=True)
class Strength:
    """Weight of one injection: weight times the factor of the layer times the schedule's factor."""

    weight: float
    window: tuple[float, float]  # (start, end) as fractions of the sampling
    factors: tuple[float, ...]  # per site
    points: tuple[Point, ...] = ()  # of the weight schedule
    scaling: str = V_ONLY


class Curve:
    """Weight of a strength at each sigma of the model that samples, which turns fractions into sigmas."""

    def __init__(self, strength: Strength, model_sampling: Any) -> None:
        to_sigma = model_sampling.percent_to_sigma
        start, end = strength.window
        self._weight = strength.weight
        self._first, self._last = float(to_sigma(start)) if start > 0 else math.inf, float(to_sigma(end))
        self._schedule = Schedule(strength.points, to_sigma) if strength.points else None

    def at(self, sigma: float) -> float:
        """The weight of a step; 0 outside the window."""
        if not self._last <= sigma <= self._first:
            return 0.0
        return self._weight * self._schedule(sigma) if self._schedule else self._weight


class LatestCache(Generic[Value]):
    """For each place, the latest value and the key it was made for."""

    def __init__(self) -> None:
        self._entries: dict[Hashable, tuple[Hashable, Value]] = {}

    def get(self, place: Hashable, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value at a place, made again where its key is another."""
        entry = self._entries.get(place)
        if entry is None or entry[0] != key:
            self._entries.pop(place, None)  # before the next is made: the device need not hold both
            entry = self._entries[place] = key, make()
        return entry[1]

    def clear(self) -> None:
        self._entries.clear()


class Injection:
    """One Apply node's contribution. Never changed after it is made, and shared by every clone of the model.

    Caches what is the same in the next UNet call of a sampling; `release` clears that.
    """

    def __init__(
        self,
        key_values: KeyValueRows,
        strength: Strength,
        sides: Sequence[BranchTokens],
        mask: Tensor | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """sides: per site. mask: (frames, height, width) on the CPU."""
        self.key_values, self.strength, self.sides = key_values, strength, tuple(sides)
        self.mask, self.recorder = mask, recorder
        self._curves: LatestCache[Curve] = LatestCache()
        self._rows: LatestCache[list[KeyValue]] = LatestCache()
        self._scaled: LatestCache[list[KeyValue]] = LatestCache()
        self._masks: ByteLRUCache[Tensor] = ByteLRUCache(MASK_CACHE_BYTES)
        self._weight = 0.0  # of what is in _scaled

    def recorded_by(self, recorder: Recorder) -> Injection:
        """The same contribution, whose terms the recorder is given."""
        return Injection(self.key_values, self.strength, self.sides, self.mask, recorder)

    @property
    def rows(self) -> int:
        """Rows of tokens, or masks, of which each latent takes its own; 1 where all latents share one."""
        masks = 1 if self.mask is None else len(self.mask)
        return max(*self.key_values.counts, masks)

    def nbytes(self, latents: int, itemsize: int) -> int:
        """Bytes of K and V on the device in a UNet call of both sides of so many latents."""
        each = latents if max(self.key_values.counts) > 1 else 1
        rows = 2 * each + self.key_values.resident_rows
        return rows * self.key_values.row_numel * itemsize

    def at(self, sigma: float, layout: BatchLayout, place: Place) -> ActiveInjection | None:
        """What acts in a UNet call; None outside the window.

        Raises ValueError where latents have tokens or masks of their own and it is unknown which latents
        these are.
        """
        curve = self._curves.get(
            place.model_sampling, None, lambda: Curve(self.strength, place.model_sampling)
        )
        weight = curve.at(sigma)
        if not weight:
            return None
        if self.rows > 1 and any(row.frame == UNKNOWN for row in layout):
            raise ValueError(
                "Another pack samples a part of the latents without its conditionings, so that it is "
                f"unknown which of the {self.rows} rows of reference tokens or masks belong to it. Use "
                "tokens and a mask of one row, or remove that pack's node."
            )
        key_values = self._key_values_at(layout, place, weight)
        mask = None if self.mask is None else StepMasks(self, layout, place)
        return ActiveInjection(key_values, mask, self.recorder)

    def fixed(
        self, active: ActiveInjection | None, layout: BatchLayout, place: Place, size: tuple[int, int]
    ) -> ActiveInjection:
        """The same at every step, for torch.compile: V = 0 outside the window, and the masks of all grids.

        size: (height, width) of the latent that the UNet is given.
        """
        if active is None:
            key_values = [(k, torch.zeros_like(v)) for k, v in self._key_values_at(layout, place, 1.0)]
        else:
            key_values = active.key_values
        if self.mask is None:
            return ActiveInjection(key_values, None, self.recorder)
        grids = [tuple(-(-length // 2**level) for length in size) for level in ATTENTION_LEVELS]
        masks = StepMasks(self, layout, place)
        return ActiveInjection(
            key_values, MaskTable({grid: masks(grid, grid[0] * grid[1]) for grid in grids}), self.recorder
        )

    def mask_at(
        self, parts: tuple[MaskPart, ...], place: Place, grid: tuple[int, int], tokens: int
    ) -> Tensor:
        """The mask of these parts, (parts, tokens, 1), or their means, (parts, 1, 1); see StepMasks."""
        key = parts, place.device, place.dtype, grid, grid[0] * grid[1] == tokens
        if key not in self._masks:
            # narrowed before it moves: it is computed in float64, which not every device has
            mask = self._mask_of(parts, grid, key[-1]).to(place.dtype).to(place.device)
            self._masks.put(key, mask, mask.nbytes)
            return mask
        return self._masks.get(key)

    def release(self) -> None:
        """Give back the device's copies."""
        for cache in (self._curves, self._rows, self._scaled, self._masks):
            cache.clear()
        self.key_values.release()

    def _key_values_at(self, layout: BatchLayout, place: Place, weight: float) -> list[KeyValue]:
        """K and V per site with this weight in them, a row for each of the equal runs of the layout."""
        where = place.device, place.dtype
        runs = equal_runs(tuple((row.unconditional, self._frame(row.frame)) for row in layout))
        sides, frames = tuple(side for side, _ in runs), tuple(frame for _, frame in runs)
        unscaled = self._rows.get((where, sides), frames, lambda: self._select(runs, *where))
        if weight != self._weight:  # what was scaled for another step is of no use
            self._scaled.clear()
            self._weight = weight
        return self._scaled.get((where, sides), (frames, weight), lambda: self._scale(unscaled, weight))

    def _frame(self, frame: int) -> int:
        """The frame that chooses a row of tokens; 0 where all frames share one."""
        return min(max(frame, 0), max(self.key_values.counts) - 1)

    def mask_frame(self, frame: int) -> int:
        """The mask of a frame; the last repeats."""
        return min(max(frame, 0), len(self.mask) - 1)

    def _mask_of(self, parts: tuple[MaskPart, ...], grid: tuple[int, int], by_token: bool) -> Tensor:
        different = tuple(dict.fromkeys(parts))  # both sides of the guidance have the same parts
        masks = torch.cat([token_mask(self.mask[frame : frame + 1], crop, grid) for frame, crop in different])
        masks = masks[[different.index(part) for part in parts], :, None]
        return masks if by_token else masks.mean(dim=1, keepdim=True)

    def _select(self, runs: Sequence[RowKey], device: torch.device, dtype: torch.dtype) -> list[KeyValue]:
        """K and V per site for these runs, (runs, T, inner)."""
        numbers = {sides: tuple(self._number(sides, *run) for run in runs) for sides in set(self.sides)}
        taken = list(dict.fromkeys(n for chosen in numbers.values() for n in chosen if n is not None)) or [0]
        rows = self.key_values.take(taken, device, dtype)
        index = {sides: _RowIndex.of(chosen, taken, device) for sides, chosen in numbers.items()}
        for place, sides in enumerate(self.sides):  # in place: the device need not hold all of both
            rows[place] = tuple(index[sides].select(tensor) for tensor in rows[place])
        return rows

    def _number(self, sides: BranchTokens, unconditional: bool, frame: int) -> int | None:
        """Row of `key_values` that a row of a batch attends to; None where it attends to none."""
        taken = sides.unconditional if unconditional else sides.conditional
        unconditional_rows, conditional_rows = self.key_values.counts
        if taken is None:
            return None
        if taken:
            return min(frame, unconditional_rows - 1)
        return unconditional_rows + min(frame, conditional_rows - 1)

    def _scale(self, key_values: list[KeyValue], weight: float) -> list[KeyValue]:
        widest = max(k.shape[-1] for k, _ in key_values)
        pairs = zip(key_values, self.strength.factors, strict=True)
        return [apply_weight(pair, weight * factor, self.strength.scaling, widest) for pair, factor in pairs]

    def __deepcopy__(self, memo: dict) -> Injection:
        return self


@functools.lru_cache(maxsize=256)
def equal_runs(rows: tuple[Hashable, ...]) -> tuple[Hashable, ...]:
    """One entry for each run of equal entries; all runs have one length, the longest that is possible.

    (u, u, c, c) -> (u, c); (u, c, u, c) -> (u, c, u, c); (c, c, c) -> (c,).
    """
    for length in range(len(rows), 0, -1):
        if len(rows) % length:
            continue
        runs = [rows[first : first + length] for first in range(0, len(rows), length)]
        if all(len(set(run)) == 1 for run in runs):
            return tuple(run[0] for run in runs)
    return rows


class _RowIndex(NamedTuple):
    """Rows to select from a tensor."""

    places: Tensor | None  # on the tensor's device; None: all rows as they are
    empty: tuple[int, ...]  # rows that attend to nothing: zeros, whose reference term is 0

    @classmethod
    def of(cls, numbers: Sequence[int | None], taken: Sequence[int], device: torch.device) -> _RowIndex:
        """numbers: of the rows to select; None where a row attends to nothing. taken: numbers of the tensor's
        rows.
        """
        if list(numbers) == list(taken):
            return cls(None, ())
        places = [0 if number is None else taken.index(number) for number in numbers]
        empty = tuple(place for place, number in enumerate(numbers) if number is None)
        return cls(torch.tensor(places, device=device), empty)

    def select(self, tensor: Tensor) -> Tensor:
        if self.places is None:
            return tensor
        selected = tensor.index_select(0, self.places)
        for place in self.empty:
            selected[place] = 0
        return selected
