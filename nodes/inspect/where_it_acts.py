"""Where It Acts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image

from ...easyref_core.inspect.charts import matrix_chart
from ...easyref_core.inspect.drawing import caption_grid, fit_square, heat_colours, overlay_heatmap, vstack
from ...easyref_core.inspect.where_it_acts import by_block_and_step, by_place, short_name
from ..host.images import image_of, pictures_of
from ..host.socket_types import EasyRefRecordSocket
from ..host.validation import validates_inputs

if TYPE_CHECKING:
    from torch import Tensor

    from ...easyref_core.inspect.reference_share import Share, ShareKey
    from ..unet_patch.recording import Record

SIDES = ("prompt", "negative")
CELL = 320  # pixels, a picture


@validates_inputs
class EasyRefWhereItActs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefWhereItActs",
            display_name="Where It Acts",
            category="EasyRef/look",
            description="How strong the reference term was beside the text's attention: in each block of the UNet and "
            "each step, and at each place of the picture.",
            search_aliases=["attention map", "debug", "layer weights", "ip adapter", "reference"],
            is_output_node=True,
            inputs=[
                EasyRefRecordSocket.Input("record", tooltip="From Record Where It Acts."),
                io.MultiType.Input(
                    "sampled",
                    [io.Image, io.Latent],
                    tooltip="What was sampled with that model, so that this waits for it. An image is shown under the map.",
                ),
                io.Combo.Input(
                    "side",
                    options=list(SIDES),
                    default=SIDES[0],
                    advanced=True,
                    tooltip="Which side of the guidance: where the prompt is read, or the negative prompt.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="chart", tooltip="Blocks and steps, and the places of the picture."
                ),
                io.Mask.Output(
                    display_name="places",
                    tooltip="Where it acts most: one mask for each Apply node, 1 at its largest share.",
                ),
                io.Float.Output(display_name="mean", tooltip="Mean share over blocks and steps."),
                io.String.Output(display_name="report", tooltip="The shares of the blocks in words."),
            ],
        )

    @classmethod
    def execute(cls, record: Record, sampled: Tensor | dict[str, Any], side: str = SIDES[0]) -> io.NodeOutput:
        chosen = [of_side(recorder.shares(), side) for recorder in record.recorders]
        found = {i: shares for i, shares in enumerate(chosen) if shares}
        if not found:
            raise ValueError(
                f"Nothing was recorded on the side of the {side}. The sampler must use the MODEL of Record Where It Acts and "
                "run after it (change its seed if its result came from the cache); at guidance 1 there is no negative side."
            )
        pictures = [] if isinstance(sampled, dict) else pictures_of(sampled)
        charts, reports, means = [], [], []
        for number, shares in found.items():
            name = f" of Apply EasyRef {number + 1}" if len(chosen) > 1 else ""
            charts.append(draw(shares, pictures, name))
            reports.append(describe(shares, name))
            means.append(float(by_block_and_step(shares)[2].nanmean()))
        chart = image_of(vstack(charts))
        places = _one_size([by_place(shares) for shares in found.values()])
        mean = sum(means) / len(means)
        return io.NodeOutput(chart, places, mean, "\n".join(reports), ui=ui.PreviewImage(chart, cls=cls))


def of_side(shares: dict[ShareKey, Share], side: str) -> dict[ShareKey, Share]:
    """What was recorded on one side of the guidance."""
    return {m: share for m, share in shares.items() if m.is_unconditional == (side == SIDES[1])}


def draw(shares: dict[ShareKey, Share], pictures: list[Image.Image], name: str) -> Image.Image:
    """Blocks and steps above, the picture below under the map of places, or the map alone."""
    blocks, sigmas, values = by_block_and_step(shares)
    steps = [str(i + 1) for i in range(len(sigmas))]
    rows = [short_name(block) for block in blocks]
    note = "size of the reference term / size of the text's attention"
    high = float(values[~values.isnan()].max())
    matrix = matrix_chart(f"Blocks and steps{name}", values.numpy(), rows, steps, 0.0, high, note)
    places = by_place(shares).numpy()
    low, high = float(places.min()), float(places.max())
    heat = (places - low) / (high - low or 1.0)
    if pictures:
        shown = [overlay_heatmap(fit_square(picture, CELL), heat) for picture in pictures]
    else:
        shown = [fit_square(Image.fromarray(heat_colours(heat)), CELL)]
    captions = [f"dark {low:.2f}, bright {high:.2f}"] * len(shown)
    return vstack([matrix, caption_grid(shown, captions, CELL, columns=2)])


def describe(shares: dict[ShareKey, Share], name: str) -> str:
    """The report: the mean share of each block, and of the first and the last step."""
    blocks, sigmas, values = by_block_and_step(shares)
    lines = [f"Size of the reference term{name} beside the text's attention, {len(sigmas)} steps"]
    for block, row in zip(blocks, values, strict=True):
        lines.append(f"{short_name(block)}: {float(row.nanmean()):.3f}")
    lines.append(
        f"first step: {float(values[:, 0].nanmean()):.3f}, last: {float(values[:, -1].nanmean()):.3f}"
    )
    return "\n".join(lines)


def _one_size(maps: list[Tensor]) -> Tensor:
    """Maps as MASK (maps, rows, columns), each 1 at its largest."""
    shape = max((tuple(part.shape) for part in maps), key=np.prod)
    grown = [torch.nn.functional.interpolate(part[None, None], shape)[0, 0] for part in maps]
    return torch.stack([part / part.max().clamp_min(1e-12) for part in grown])
