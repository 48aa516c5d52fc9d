"""Layout of a UNet batch: for each row, its side of the guidance, its latent and its part of the picture.

ComfyUI stacks the conditionings of a step in equal runs and lists them in `cond_or_uncond`. Other packs tile,
repeat, split or drop rows between the sampler and an attention, so a row is identified in two places:

- at the UNet call, by a number that travels with it. `RowNumbers` adds the numbers to the conditionings of a
  step, where packs move them as they move every other per-row tensor, and looks them up again in the batch
  that arrives (`layout_of`).
- at an attention, by how its queries relate to the rows of the UNet call (`rows_of_queries`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from comfy.conds import CONDRegular

from ...easyref_core.unet.masks import Crop, full_crop
from ..host.log import warn_once
from .cond_roles import frames_of, unconditional_runs

if TYPE_CHECKING:
    from torch import Tensor

ROW_NUMBERS = "easyref_row_numbers"  # key of the numbers among the conditionings of a UNet call
UNCOND = 1  # in cond_or_uncond; attention couples repeat the rows of every other index
MAX_CORNERS = 16  # places of a latent with the values of a tile's corner
COUPLED = ("cond_or_uncond_couple", "cond_or_uncond_hook_couple")  # of ComfyUI-ppm and comfyui-prompt-control


class Row(NamedTuple):
    """One row of a UNet batch."""

    unconditional: bool
    latent: int  # index in the batch that the sampler holds
    # number of that latent in the whole batch or animation; chooses its tokens and its mask; or UNKNOWN
    frame: int
    crop: Crop  # part of the latent


BatchLayout = tuple[Row, ...]
UNKNOWN = -1


class RowNumbersCond(CONDRegular):
    """Row numbers (latents, 1) as a conditioning of ComfyUI."""

    def process_cond(self, batch_size: int, **_: Any) -> RowNumbersCond:
        """The numbers of a batch; where a pack has cut the latents alone, the first one, marked by its sign.

        The host would repeat or cut them to the batch, as if its latents were the first ones.
        """
        if len(self.cond) == batch_size:
            return self
        return self._copy_with(-1 - self.cond[:1].expand(batch_size, 1))


class RowNumbers:
    """Numbers the rows of all conditionings of one step.

    latents: what the sampler holds, (B, C, height, width). frames: number of each in the whole batch or
    animation.
    """

    def __init__(self, latents: Tensor, frames: Sequence[int]) -> None:
        self.latents, self.frames = latents, tuple(frames)
        self._rows: list[Row] = []

    def add(self, cond: Mapping[str, Any], unconditional: bool) -> dict[str, Any]:
        """A copy of a conditioning whose rows carry their numbers."""
        crop = area_crop(cond.get("area"), tuple(self.latents.shape[-2:]))
        first = len(self._rows)
        self._rows += [Row(unconditional, latent, frame, crop) for latent, frame in enumerate(self.frames)]
        # on the CPU: read without waiting for the device
        numbers = torch.arange(first, len(self._rows))[:, None]
        return {**cond, "model_conds": {**cond["model_conds"], ROW_NUMBERS: RowNumbersCond(numbers)}}

    @property
    def has_areas(self) -> bool:
        """Whether a conditioning is of a part of the latent."""
        return any(row.crop != full_crop(*self.latents.shape[-2:]) for row in self._rows)

    def layout(self, numbers: Tensor) -> BatchLayout:
        """Rows with these numbers (rows, 1); of a number with a mark only the side and the crop are known."""
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
    x: Tensor, options: Mapping[str, Any], numbered: RowNumbers | None, numbers: Tensor | None
) -> BatchLayout:
    """Layout of the batch x (rows, C, height, width) of a UNet call.

    numbers: the row numbers that arrived with x. Without them the rows are the equal runs of
    `cond_or_uncond`. Raises ValueError where the rows of x are neither.
    """
    if numbered is not None and numbers is not None and len(numbers) == len(x):
        return numbered.layout(numbers)
    sides = unconditional_runs(options)
    latents, rest = divmod(len(x), len(sides))
    # a pack that cuts one side out of the batch may cut what it knows alone, which is well where rows are
    # whole latents
    if rest or (numbered is not None and (latents != len(numbered.latents) or numbered.has_areas)):
        sampled = f" of {len(numbered.latents)} latents" if numbered is not None else ""
        raise ValueError(
            f"The UNet was given {len(x)} rows for {len(sides)} conditionings{sampled}, without the row "
            "numbers that Apply EasyRef adds to them, or with others. A pack that changes the batch "
            "between the sampler and the UNet (as Tiled Diffusion does) must repeat or cut every per-row "
            "tensor alike, also those it does not know. Remove that pack's node, or Apply EasyRef."
        )
    frames = numbered.frames if numbered is not None else frames_of(options, latents)
    crop = full_crop(*x.shape[-2:])
    return tuple(Row(side, latent, frame, crop) for side in sides for latent, frame in enumerate(frames))


def place_tiles(layout: BatchLayout, x: Tensor, latents: Tensor) -> BatchLayout:
    """The layout with the crop of every row that is a tile of its latent.

    x: (rows, C, height, width); latents: (B, C, height, width), what the tiles were cut from. A tile is found
    by its values, as not all packs cut other per-row tensors at the same place (SpotDiffusion shifts them
    further than the latent). A tile that is not found, as one that was resized, keeps its crop; a warning
    says so once.
    """
    size = tuple(x.shape[-2:])
    if all(size == (row.crop.height, row.crop.width) for row in layout):
        return layout
    tiles, latents = x.cpu(), latents.cpu()
    return tuple(_placed(row, tile, latents) for row, tile in zip(layout, tiles, strict=True))


def _placed(row: Row, tile: Tensor, latents: Tensor) -> Row:
    size, whole_size = tuple(tile.shape[-2:]), tuple(latents.shape[-2:])
    if size == (row.crop.height, row.crop.width):
        return row
    place = None if row.latent == UNKNOWN else find_tile(tile, latents[row.latent])
    if place is None:
        _warn_of_lost_tile(size, whole_size)
        return row
    return row._replace(crop=Crop(whole_size, *place, *size))


def find_tile(tile: Tensor, latent: Tensor) -> tuple[int, int] | None:
    """Top and left of a tile (C, h, w) in the latent (C, height, width) it was cut from.

    A tile may reach over the bottom or the right edge and go on at the opposite one. None where it is
    nowhere, or at several places, as in a latent without noise.
    """
    height, width = latent.shape[-2:]
    corners = (latent == tile[:, :1, :1]).all(dim=0).nonzero().tolist()
    places = []
    for top, left in corners if len(corners) <= MAX_CORNERS else ():
        rows = (torch.arange(tile.shape[-2]) + top) % height
        columns = (torch.arange(tile.shape[-1]) + left) % width
        if torch.equal(latent[:, rows][..., columns], tile):
            places.append((top, left))
    return places[0] if len(places) == 1 else None


def _warn_of_lost_tile(tile: tuple[int, int], latent: tuple[int, int]) -> None:
    warn_once(
        f"The UNet was given tiles of {tile[0]} x {tile[1]} that are not parts of the {latent[0]} x "
        f"{latent[1]} latent as it is, so the mask of Apply EasyRef is stretched over each tile. Remove the "
        "mask, or the pack that resizes or changes the tiles."
    )


class Queries(NamedTuple):
    """Shape of an attention's queries and where they are asked."""

    rows: int
    tokens: int
    grid: tuple[int, int]  # rows and columns of the tokens of a whole row
    earlier_calls: int = 0  # of this attention in this UNet call, where the UNet runs one row at a time
    one_by_one: bool = False  # the UNet runs its attentions on one row after the other (RES4LYF)


def rows_of_queries(
    queries: Queries, layout: BatchLayout, options: Mapping[str, Any]
) -> tuple[int, ...] | None:
    """The row of the UNet call that each row of an attention's queries stands for; None where they are the
    same rows.

    layout: of the UNet call. options: the attention's extra_options.

    - one row at a time (RES4LYF's UNet): the rows in their order;
    - fewer rows: those of the sides that `cond_or_uncond` names, as a wrapper of the UNet may evaluate some
      alone;
    - more rows of fewer tokens: each row is cut into tiles;
    - more rows: the conditional runs are repeated for each region of an attention couple.

    Raises ValueError for anything else.
    """
    count, rows = queries.rows, len(layout)
    chosen: tuple[int, ...] | None = None
    if queries.one_by_one:
        if count == 1 and queries.earlier_calls < rows:
            chosen = (queries.earlier_calls,)
    elif count == rows:
        return None
    elif count < rows:
        chosen = _rows_of_sides(count, layout, options)
    elif count % rows == 0 and queries.tokens * (count // rows) == queries.grid[0] * queries.grid[1]:
        chosen = tuple(row for row in range(rows) for _ in range(count // rows))
    else:
        chosen = _rows_of_couple(count, rows, options)
    if chosen is None:
        raise ValueError(
            f"An attention was given {count} rows of {queries.tokens} queries where the UNet was given "
            f"{rows} rows (cond_or_uncond {options.get('cond_or_uncond')}). Packs that change them in a way "
            "that is known: attention couples (ComfyUI-ppm, comfyui-prompt-control, cgem156-ComfyUI), "
            "RES4LYF without style guides. Remove the pack that patches the attention, or Apply EasyRef."
        )
    return chosen


def _rows_of_sides(count: int, layout: BatchLayout, options: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Rows of the sides in `cond_or_uncond`, where each side has one row for every latent in the layout."""
    sides = unconditional_runs(options)
    latents = len({row.latent for row in layout})
    if count != len(sides) * latents:
        return None
    rows: dict[tuple[bool, int], int] = {}
    for number, row in enumerate(layout):
        first = layout[rows.setdefault((row.unconditional, row.latent), number)]
        if first != row:  # tiles or areas: which of them these are is unknown
            return None
    chosen = [rows.get((side, latent)) for side in sides for latent in range(latents)]
    return None if None in chosen else tuple(chosen)


def _rows_of_couple(count: int, rows: int, options: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Rows behind `count` rows of queries in which every conditional run is repeated for each region; None
    where that does not fit.
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
    for key in COUPLED:
        if key in options and len(options[key]) not in (len(indices), sum(repeats)):
            return None
    return tuple(
        run * length + row
        for run, repeated in enumerate(repeats)
        for _ in range(repeated)
        for row in range(length)
    )
