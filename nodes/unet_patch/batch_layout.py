"""Layout of a UNet batch: for each row, its side of the guidance, its latent and its crop of the latent.

ComfyUI stacks the conditionings of a step in equal runs and lists them in `cond_or_uncond`. Other packs tile,
repeat, split or drop rows between the sampler and an attention, so a row is identified in two places:

- at the UNet call, by a number that is passed along with it. `RowNumbers` adds the numbers to the
  conditionings of a step, where packs cut and repeat them like every other per-row tensor, and looks them up
  in the batch that arrives (`layout_of`).
- at an attention, by how its queries relate to the rows of the UNet call (`rows_of_queries`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from comfy.conds import CONDRegular

from ...easyref_core.unet.masks import Crop, full_crop
from ..host.log import warn_once
from .cond_roles import unconditional_runs
from .sub_batch import frames_of

if TYPE_CHECKING:
    from torch import Tensor

ROW_NUMBERS = "easyref_row_numbers"  # key of the numbers among the conditionings of a UNet call
UNCOND = 1  # in cond_or_uncond; attention couples repeat the rows of every other index
MAX_CORNERS = 16  # pixels of a latent with the values of a tile's corner
# in extra_options, of ComfyUI-ppm and comfyui-prompt-control
COUPLE_KEYS = ("cond_or_uncond_couple", "cond_or_uncond_hook_couple")


class Row(NamedTuple):
    """One row of a UNet batch."""

    unconditional: bool
    latent: int  # index in the sampler's batch, or UNKNOWN
    # index of that latent in the whole batch or animation, which selects its tokens and its mask; or UNKNOWN
    frame: int
    crop: Crop  # of the latent


BatchLayout = tuple[Row, ...]
UNKNOWN = -1


class RowNumbersCond(CONDRegular):
    """Row numbers (latents, 1) as a conditioning of ComfyUI."""

    def process_cond(self, batch_size: int, **_: Any) -> RowNumbersCond:
        """The numbers of a batch; where a pack has cut only the latents, the first number, marked by its
        sign.

        The host would repeat or cut the numbers to the batch size, as if the latents were the first ones.
        """
        if len(self.cond) == batch_size:
            return self
        return self._copy_with(-1 - self.cond[:1].expand(batch_size, 1))


class RowNumbers:
    """Numbers of the rows of all conditionings of one step.

    latents: the sampler's batch, (B, C, height, width). frames: of each latent, see sub_batch.py.
    """

    def __init__(self, latents: Tensor, frames: Sequence[int]) -> None:
        self.latents, self.frames = latents, tuple(frames)
        self._rows: list[Row] = []

    def add(self, cond: Mapping[str, Any], unconditional: bool) -> dict[str, Any]:
        """A copy of a conditioning with the numbers of its rows added."""
        crop = area_crop(cond.get("area"), tuple(self.latents.shape[-2:]))
        first = len(self._rows)
        self._rows += [Row(unconditional, latent, frame, crop) for latent, frame in enumerate(self.frames)]
        # on the CPU: read without waiting for the device
        numbers = torch.arange(first, len(self._rows))[:, None]
        return {**cond, "model_conds": {**cond["model_conds"], ROW_NUMBERS: RowNumbersCond(numbers)}}

    @property
    def has_areas(self) -> bool:
        """True if a conditioning is of a part of the latent."""
        return any(row.crop != full_crop(*self.latents.shape[-2:]) for row in self._rows)

    def layout(self, numbers: Tensor) -> BatchLayout:
        """Rows with these numbers (rows, 1); a marked number identifies only the side and the crop."""
        return tuple(
            self._rows[number]
            if number >= 0
            else self._rows[-1 - number]._replace(latent=UNKNOWN, frame=UNKNOWN)
            for number in numbers[:, 0].tolist()
        )


def area_crop(area: Sequence[int] | None, latent: tuple[int, int]) -> Crop:
    """The crop of ComfyUI's area (height, width, top, left), in latent pixels, cut off at the latent's edge
    as ComfyUI does.
    """
    if area is None:
        return full_crop(*latent)
    dimensions = len(area) // 2  # more than two for video: height and width are the last
    (height, width), (top, left) = area[dimensions - 2 : dimensions], area[-2:]
    return Crop(latent, top, left, min(latent[0] - top, height), min(latent[1] - left, width))


def layout_of(
    x: Tensor, options: Mapping[str, Any], row_numbers: RowNumbers | None, numbers: Tensor | None
) -> BatchLayout:
    """Layout of the batch x (rows, C, height, width) of a UNet call.

    row_numbers: of the step. numbers: the row numbers that arrived with x. Without them the rows are the
    equal runs of `cond_or_uncond`. Raises ValueError where the rows of x are neither.
    """
    if row_numbers is not None and numbers is not None and len(numbers) == len(x):
        return row_numbers.layout(numbers)
    sides = unconditional_runs(options)
    latents, rest = divmod(len(x), len(sides))
    # a pack that cuts one side out of the batch may drop the numbers, which is harmless where rows are whole
    # latents
    if rest or (row_numbers is not None and (latents != len(row_numbers.latents) or row_numbers.has_areas)):
        sampled = f" of {len(row_numbers.latents)} latents" if row_numbers is not None else ""
        raise ValueError(
            f"The UNet was given {len(x)} rows for {len(sides)} conditionings{sampled}, without the row "
            "numbers that Apply EasyRef adds to them, or with others. A pack that changes the batch "
            "between the sampler and the UNet (as Tiled Diffusion does) must repeat or cut every per-row "
            "tensor in the same way, unknown ones included. Remove that pack's node, or Apply EasyRef."
        )
    frames = row_numbers.frames if row_numbers is not None else frames_of(options, latents)
    crop = full_crop(*x.shape[-2:])
    return tuple(Row(side, latent, frame, crop) for side in sides for latent, frame in enumerate(frames))


def crop_to_tiles(layout: BatchLayout, x: Tensor, latents: Tensor) -> BatchLayout:
    """The layout with the crop of every row that is a tile of its latent.

    x: (rows, C, height, width). latents: (B, C, height, width), before tiling. A tile is located by its
    values, because not all packs cut other per-row tensors at the same position (SpotDiffusion shifts them
    further than the latent). A tile that is not found, for example a resized one, keeps its crop, and a
    warning is logged once.
    """
    size, latent_size = tuple(x.shape[-2:]), tuple(latents.shape[-2:])
    if all(size == (row.crop.height, row.crop.width) for row in layout):
        return layout
    tiles, latents = x.cpu(), latents.cpu()
    rows = []
    for row, tile in zip(layout, tiles, strict=True):
        if size != (row.crop.height, row.crop.width):
            corner = None if row.latent == UNKNOWN else find_tile(tile, latents[row.latent])
            if corner is None:
                _warn_of_lost_tile(size, latent_size)
            else:
                row = row._replace(crop=Crop(latent_size, *corner, *size))
        rows.append(row)
    return tuple(rows)


def find_tile(tile: Tensor, latent: Tensor) -> tuple[int, int] | None:
    """Top and left of a tile (C, h, w) in the latent (C, height, width) that it was cut from.

    A tile may wrap around the bottom or the right edge. None if it is not found, or found more than once, as
    in a latent without noise.
    """
    height, width = latent.shape[-2:]
    corners = (latent == tile[:, :1, :1]).all(dim=0).nonzero().tolist()
    matches = []
    for top, left in corners if len(corners) <= MAX_CORNERS else ():
        rows = (torch.arange(tile.shape[-2]) + top) % height
        columns = (torch.arange(tile.shape[-1]) + left) % width
        if torch.equal(latent[:, rows][..., columns], tile):
            matches.append((top, left))
    return matches[0] if len(matches) == 1 else None


def _warn_of_lost_tile(tile: tuple[int, int], latent: tuple[int, int]) -> None:
    warn_once(
        f"The UNet was given tiles of {tile[0]} x {tile[1]} that are not parts of the unchanged {latent[0]} "
        f"x {latent[1]} latent, so the mask of Apply EasyRef is stretched over each tile. Remove the mask, "
        "or the pack that resizes or changes the tiles."
    )


class Queries(NamedTuple):
    """Shape of an attention's queries, and the position of the call in the UNet call."""

    rows: int
    tokens: int
    grid: tuple[int, int]  # rows and columns of the tokens of an untiled row
    earlier_calls: int = 0  # of this attention in this UNet call, where the UNet runs one row at a time
    rowwise: bool = False  # True if the UNet runs its attentions on one row after the other (RES4LYF)


def rows_of_queries(
    queries: Queries, layout: BatchLayout, options: Mapping[str, Any]
) -> tuple[int, ...] | None:
    """The row of the UNet call that each row of an attention's queries belongs to; None if they are the same.

    layout: of the UNet call. options: the attention's extra_options.

    - one row at a time (RES4LYF's UNet): the rows in their order;
    - fewer rows: those of the sides that `cond_or_uncond` names, because a wrapper of the UNet may evaluate
      some sides alone;
    - more rows of fewer tokens: each row is cut into tiles;
    - more rows: the conditional runs are repeated for each region of an attention couple.

    Raises ValueError for anything else.
    """
    count, rows = queries.rows, len(layout)
    selected: tuple[int, ...] | None = None
    if queries.rowwise:
        if count == 1 and queries.earlier_calls < rows:
            selected = (queries.earlier_calls,)
    elif count == rows:
        return None
    elif count < rows:
        selected = _rows_of_sides(count, layout, options)
    elif count % rows == 0 and queries.tokens * (count // rows) == queries.grid[0] * queries.grid[1]:
        selected = tuple(row for row in range(rows) for _ in range(count // rows))
    else:
        selected = _rows_of_couple(count, rows, options)
    if selected is None:
        raise ValueError(
            f"An attention was given {count} rows of {queries.tokens} queries where the UNet was given "
            f"{rows} rows (cond_or_uncond {options.get('cond_or_uncond')}). Packs that change them and are "
            "supported: attention couples (ComfyUI-ppm, comfyui-prompt-control, cgem156-ComfyUI), "
            "RES4LYF without style guides. Remove the pack that patches the attention, or Apply EasyRef."
        )
    return selected


def _rows_of_sides(count: int, layout: BatchLayout, options: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Rows of the sides in `cond_or_uncond`, where each side has one row for every latent in the layout."""
    sides = unconditional_runs(options)
    latents = len({row.latent for row in layout})
    if count != len(sides) * latents:
        return None
    rows: dict[tuple[bool, int], int] = {}
    for number, row in enumerate(layout):
        first = layout[rows.setdefault((row.unconditional, row.latent), number)]
        if first != row:  # ambiguous: the queries do not identify the tile
            return None
    selected = [rows.get((side, latent)) for side in sides for latent in range(latents)]
    return None if None in selected else tuple(selected)


def _rows_of_couple(count: int, rows: int, options: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Rows of `count` rows of queries in which every conditional run is repeated for each region; None if
    that does not fit.
    """
    indices = options.get("cond_or_uncond") or [0]
    conditional = sum(index != UNCOND for index in indices)
    length, rest = divmod(rows, len(indices))
    if rest or not conditional:
        return None
    regions, rest = divmod(count // length - (len(indices) - conditional), conditional)
    if rest or regions < 1 or count % length:
        return None
    repeats = [1 if index == UNCOND else regions for index in indices]
    for key in COUPLE_KEYS:
        if key in options and len(options[key]) not in (len(indices), sum(repeats)):
            return None
    return tuple(
        run * length + row
        for run, repeated in enumerate(repeats)
        for _ in range(repeated)
        for row in range(length)
    )
