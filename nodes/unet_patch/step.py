"""State of one UNet call, in transformer_options for the attentions, and computation of its masks."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from ...easyref_core.unet.masks import token_mask
from ...easyref_core.utils.lru_cache import ByteLRUCache
from .batch_layout import BatchLayout

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...easyref_core.inspect.reference_share import Recorder
    from ...easyref_core.unet.layout import Site
    from ...easyref_core.unet.reference_attention import KeyValue

# Keys in transformer_options.
STEP = "easyref_step"  # the Step of this UNet call
SIGMA = "easyref_sigma"  # the sigma, read back from the device once a step, outside the UNet

FIRST_SIGMA = 999999999.9  # the host's percent_to_sigma(0)


def read_sigma(sigmas: Tensor | None) -> float:
    """The sigma of a step, which is the same for all rows of a batch; FIRST_SIGMA if it is unknown."""
    return FIRST_SIGMA if sigmas is None else float(sigmas.max())


class UNetCall(NamedTuple):
    """Model and device of a UNet call."""

    model_sampling: nn.Module
    device: torch.device
    dtype: torch.dtype  # that the UNet computes in


class StepMasks:
    """Masks of one UNet call, computed when an attention first needs them."""

    def __init__(
        self, mask: Tensor, layout: BatchLayout, call: UNetCall, cache: ByteLRUCache[Tensor]
    ) -> None:
        """mask: (frames, height, width) on the CPU; the last frame repeats."""
        crops = tuple((min(max(row.frame, 0), len(mask) - 1), row.crop) for row in layout)
        self._mask, self._call, self._cache = mask, call, cache
        self._crops = crops[:1] if len(set(crops)) == 1 else crops

    def __call__(self, grid: tuple[int, int], tokens: int) -> Tensor:
        """The mask for an attention's tokens, (1 or rows of the layout, tokens, 1).

        grid: (rows, columns) of the tokens. Where another pack has changed their number, their positions are
        unknown, and all get the mask's mean, (..., 1, 1).
        """
        is_grid = grid[0] * grid[1] == tokens
        key = self._crops, self._call.device, self._call.dtype, grid, is_grid
        if key in self._cache:
            return self._cache.get(key)
        # converted before it moves: it is computed in float64, which not every device has
        mask = self._compute(grid, is_grid).to(self._call.dtype).to(self._call.device)
        self._cache.put(key, mask, mask.nbytes)
        return mask

    def _compute(self, grid: tuple[int, int], is_grid: bool) -> Tensor:
        different = tuple(dict.fromkeys(self._crops))  # both sides of the guidance have the same crops
        masks = [token_mask(self._mask[frame : frame + 1], crop, grid) for frame, crop in different]
        mask = torch.cat(masks)[[different.index(crop) for crop in self._crops], :, None]
        return mask if is_grid else mask.mean(dim=1, keepdim=True)


class MaskTable:
    """Masks by grid, computed before the UNet runs, so that torch.compile traces a lookup only."""

    def __init__(self, masks: dict[tuple[int, int], Tensor]) -> None:
        self._masks = masks

    def __call__(self, grid: tuple[int, int], tokens: int) -> Tensor:
        """The mask (1 or rows, tokens, 1) of a grid.

        Raises RuntimeError where another pack has changed grid or tokens.
        """
        if grid not in self._masks or grid[0] * grid[1] != tokens:
            raise RuntimeError(
                f"Apply EasyRef has masks for the grids {list(self._masks)} of query tokens, but an "
                f"attention has {tokens} tokens on a grid of {grid}. Remove the pack that resizes the "
                "activations, or torch.compile."
            )
        return self._masks[grid]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [tuple(mask.shape) for mask in self._masks.values()]


class ActiveInjection(NamedTuple):
    """One injection in one UNet call."""

    # per site (runs, T, inner), with the weight applied; the batch consists of as many equal runs
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
    rowwise: bool = False  # True if the UNet runs its attentions on one row after the other
    # attn2 replacements of whole blocks, by (block, number)
    block_patches: dict[tuple, Callable[..., Tensor]] = dataclasses.field(default_factory=dict)
    # Apply nodes and sites whose patch ran; not recorded where compiled
    reached: set[tuple[int, Site]] = dataclasses.field(default_factory=set)
    # per Apply node and site: calls so far, where the UNet runs one row after the other
    calls: Counter = dataclasses.field(default_factory=Counter)
