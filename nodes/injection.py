"""What one Apply node adds, and what of it acts in one UNet call."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..easyref_core.attention import SCALINGS, KeyValue, scaled
from ..easyref_core.layer_weights import Sides
from ..easyref_core.masks import Crop, token_mask
from .guidance import FIRST_SIGMA

if TYPE_CHECKING:
    from torch import Tensor

    from ..easyref_core.term_share import Recorder

STEP = "easyref_step"  # in transformer_options: the Step of this UNet call

_ids = itertools.count()


class View(NamedTuple):
    """What the rows of one UNet call's batch are: runs of equal length, all runs of the same latents."""

    unconditional: tuple[bool, ...]  # of each run
    frames: tuple[int, ...]  # of each latent of a run: its number in the whole batch or animation
    crops: tuple[Crop, ...]  # of each run: the part of the latent it is


class Rows(NamedTuple):
    """Rows of K and V to take, brought to their device once for all sites."""

    numbers: Tensor
    nothing: tuple[int, ...]  # places of those that attend to nothing

    @classmethod
    def of(cls, numbers: Sequence[int | None], device: torch.device) -> Rows:
        """numbers: None where a row attends to nothing."""
        nothing = tuple(place for place, number in enumerate(numbers) if number is None)
        return cls(torch.tensor([number or 0 for number in numbers], device=device), nothing)


class Acting(NamedTuple):
    """One injection in one UNet call."""

    key_values: Sequence[
        KeyValue
    ]  # per site, one row for each run (or each row) of the batch, the weight in them
    mask: Callable[..., Tensor] | None = None  # (grid, q), see Injection.mask_at
    recorder: Recorder | None = None


@dataclasses.dataclass(frozen=True)
class Step:
    """What the sites are told in one UNet call; made once, so that no site reads sigma back from the device."""

    sigma: float
    acting: dict[int, Acting]  # by Injection.id
    whole_blocks: dict[
        tuple, Callable[..., Tensor]
    ]  # foreign replacements for all sites of a (block, number)
    unconditional: tuple[bool, ...] = (False,)  # of each run of the batch


IDLE = Step(FIRST_SIGMA, {}, {})  # where a pack calls the UNet without the patcher's wrappers: the text alone


@dataclasses.dataclass(frozen=True)
class Strength:
    """How strongly one injection acts: weight times the factor of the layer times the schedule's factor."""

    weight: float
    window: tuple[float, float]  # (first sigma, last sigma)
    factors: tuple[float, ...]  # per site
    schedule: Callable[[float], float] | None = None  # sigma -> factor
    scaling: str = SCALINGS[0]

    def at(self, sigma: float) -> float:
        """The weight of a step; 0 outside the window."""
        first, last = self.window
        if not last <= sigma <= first:
            return 0.0
        return self.weight * self.schedule(sigma) if self.schedule else self.weight


class Injection:
    """One Apply node's contribution. Never changed after it is made, and shared by every clone of the model."""

    def __init__(
        self,
        key_values: list[KeyValue],
        unconditional_rows: int,
        strength: Strength,
        sides: Sequence[Sides],
        mask: Tensor | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """key_values: per site K and V, the unconditional rows and then the conditional ones; of either side one row,
        or one for each latent of the batch, the last of which goes on where there are fewer. sides: per site. mask:
        (frames, height, width) on the CPU.
        """
        self.id = next(_ids)
        self.strength, self.sides, self.mask, self.recorder = strength, tuple(sides), mask, recorder
        self._key_values = key_values
        self._counts = unconditional_rows, len(key_values[0][0]) - unconditional_rows
        self._widest = max(k.shape[-1] for k, _ in key_values)
        self._kept: dict[str, tuple[Any, dict[tuple, Any]]] = {}

    def at(self, sigma: float, device: torch.device, dtype: torch.dtype, view: View) -> Acting | None:
        """What acts at this step; made once and kept while sampling, as far as it is the same at the next."""
        weight = self.strength.at(sigma)
        if not weight:
            return None
        era, place = (weight, self._numbered(view)), (device, dtype, view.unconditional)
        key_values = self._once(
            "scaled", era, place, lambda: self._scaled(self._rows(device, dtype, view), weight)
        )
        mask = None if self.mask is None else partial(self.mask_at, view)
        return Acting(key_values, mask, self.recorder)

    def mask_at(self, view: View, grid: tuple[int, int], q: Tensor) -> Tensor:
        """The mask for the queries q (batch, tokens, inner) of a site, (1 or batch, tokens, 1), as q in device and dtype.

        grid: (rows, columns) of the site's tokens. Where another pack has changed their number, their places are not
        known: all get the mask's mean, (..., 1, 1).
        """
        batch, tokens, _ = q.shape
        place = view, grid, batch, tokens, q.device, q.dtype
        # narrowed before it moves: it is computed in float64, which not every device has
        return self._once(
            "mask", None, place, lambda: self._masked(view, grid, batch, tokens).to(q.dtype).to(q.device)
        )

    def release(self) -> None:
        self._kept.clear()

    def _once(self, what: str, era: Any, place: tuple, make: Callable[[], Any]) -> Any:
        """What `make` gives, kept for this place while sampling, or until another era (a step's weight, a window of
        frames) begins: the device holds one era at a time."""
        if what not in self._kept or self._kept[what][0] != era:
            self._kept[what] = era, {}
        kept = self._kept[what][1]
        if place not in kept:
            kept[place] = make()
        return kept[place]

    def _numbered(self, view: View) -> tuple[int, ...]:
        """The frames that get a row of K and V each; one for all where the tokens are not batched."""
        return (0,) if self._counts == (1, 1) else view.frames

    def _rows(self, device: torch.device, dtype: torch.dtype, view: View) -> list[KeyValue]:
        """K and V per site, a row for each run of the batch, or, where the tokens are batched, for each of its rows."""
        frames, runs, place = self._numbered(view), view.unconditional, (device, dtype)

        def placed(key_values: list[KeyValue]) -> list[KeyValue]:
            return [(k.to(device, dtype), v.to(device, dtype)) for k, v in key_values]

        def chosen() -> list[KeyValue]:
            if self._counts == (1, 1):
                return placed(self._gathered(self._key_values, frames, runs))
            # all frames are brought to the device once, and each window is chosen from them there
            everything = self._once("all", None, place, lambda: placed(self._key_values))
            return self._gathered(everything, frames, runs)

        return self._once("rows", frames, (*place, runs), chosen)

    def _masked(self, view: View, grid: tuple[int, int], batch: int, tokens: int) -> Tensor:
        runs = [token_mask(self.mask, crop, grid)[..., None] for crop in view.crops]
        if grid[0] * grid[1] != tokens:
            runs = [run.mean(dim=1, keepdim=True) for run in runs]
        if len(self.mask) == 1 and len(set(view.crops)) == 1:
            return runs[0]
        last = len(self.mask) - 1
        masks = torch.cat([run[[min(frame, last) for frame in view.frames]] for run in runs])
        return masks.repeat_interleave(batch // len(masks), dim=0)  # a pack may cut each latent into tiles

    def _gathered(
        self, source: list[KeyValue], frames: tuple[int, ...], runs: tuple[bool, ...]
    ) -> list[KeyValue]:
        device = source[0][0].device
        rows = {sides: Rows.of(self._row_numbers(sides, frames, runs), device) for sides in set(self.sides)}
        return [
            tuple(_take(tensor, rows[sides]) for tensor in key_value)
            for key_value, sides in zip(source, self.sides, strict=True)
        ]

    def _row_numbers(self, sides: Sides, frames: tuple[int, ...], runs: tuple[bool, ...]) -> list[int | None]:
        """Whose row each run and frame takes; None where it attends to nothing."""
        unconditional, conditional = self._counts
        numbers: list[int | None] = []
        for run_is_unconditional in runs:
            taken = sides.unconditional if run_is_unconditional else sides.conditional
            for frame in frames:
                if taken is None:
                    numbers.append(None)
                elif taken:
                    numbers.append(min(frame, unconditional - 1))
                else:
                    numbers.append(unconditional + min(frame, conditional - 1))
        return numbers

    def _scaled(self, key_values: list[KeyValue], weight: float) -> list[KeyValue]:
        scaling, widest = self.strength.scaling, self._widest
        pairs = zip(key_values, self.strength.factors, strict=True)
        return [scaled(pair, weight * factor, scaling, widest) for pair, factor in pairs]

    def __deepcopy__(self, memo: dict) -> Injection:
        return self


def _take(tensor: Tensor, rows: Rows) -> Tensor:
    """These rows of a tensor, a copy; what attends to nothing has zeros, whose reference term is 0."""
    taken = tensor.index_select(0, rows.numbers)
    for place in rows.nothing:
        taken[place] = 0
    return taken
