"""Weight Sheet and Labelled Sheet: one picture for each weight and end, and all of them on one sheet."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image

from ..easyref_core.preprocess import to_rgb
from ..easyref_core.visualize import labelled_grid
from .numbers import numbers
from .references import split

if TYPE_CHECKING:
    from torch import Tensor

MOST = 64  # pictures of one sheet


class EasyRefWeightSheet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefWeightSheet",
            display_name="Weight Sheet",
            category="EasyRef/inspect",
            description="Every pair of a weight and an end, as lists: connect them to Apply EasyRef, and everything after it "
            "runs once for each. Labelled Sheet puts the pictures together.",
            search_aliases=["xy plot", "grid", "choose weight", "compare"],
            inputs=[
                io.String.Input(
                    "weights", default="0, 0.5, 0.75, 1", tooltip="Weights, with commas between: the columns."
                ),
                io.String.Input(
                    "end_percents", default="0.5, 1", tooltip="Ends, 0 to 1, with commas between: the rows."
                ),
            ],
            outputs=[
                io.Float.Output(
                    display_name="weight", is_output_list=True, tooltip="To the weight of Apply EasyRef."
                ),
                io.Float.Output(
                    display_name="end_percent",
                    is_output_list=True,
                    tooltip="To the end_percent of Apply EasyRef.",
                ),
                io.String.Output(display_name="columns", tooltip="Labels of the columns, to Labelled Sheet."),
                io.String.Output(display_name="rows", tooltip="Labels of the rows, to Labelled Sheet."),
            ],
        )

    @classmethod
    def execute(cls, weights: str, end_percents: str) -> io.NodeOutput:
        columns, rows = (
            numbers(text, name) for text, name in ((weights, "weights"), (end_percents, "end_percents"))
        )
        if len(columns) * len(rows) > MOST:
            raise ValueError(
                f"{len(columns)} weights and {len(rows)} ends are {len(columns) * len(rows)} pictures; at most {MOST} are "
                "painted for one sheet. Take fewer."
            )
        pairs = [(weight, end) for end, weight in product(rows, columns)]
        labels = [
            ", ".join(f"{name} {value:g}" for value in values)
            for name, values in (("weight", columns), ("end", rows))
        ]
        return io.NodeOutput([w for w, _ in pairs], [e for _, e in pairs], *labels)


class EasyRefSheet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefSheet",
            display_name="Labelled Sheet",
            category="EasyRef/inspect",
            description="Pictures in rows and columns with labels, such as those of Weight Sheet.",
            search_aliases=["xy plot", "contact sheet", "grid"],
            is_output_node=True,
            is_input_list=True,
            inputs=[
                io.Image.Input(
                    "images", tooltip="A list of pictures, row by row. Of a batch the first is shown."
                ),
                io.String.Input("columns", tooltip="Labels of the columns, with commas between."),
                io.String.Input("rows", tooltip="Labels of the rows, with commas between."),
            ],
            outputs=[io.Image.Output(display_name="sheet", tooltip="All pictures as one.")],
        )

    @classmethod
    def execute(cls, images: list[Tensor], columns: list[str], rows: list[str]) -> io.NodeOutput:
        labels = [[part.strip() for part in text[0].split(",")] for text in (rows, columns)]
        wanted = len(labels[0]) * len(labels[1])
        if len(images) != wanted:
            raise ValueError(
                f"There are {len(images)} pictures for {len(labels[0])} rows and {len(labels[1])} columns, which are "
                f"{wanted}. Connect the list of pictures as it comes from the sampler."
            )
        pictures = [_fitted(to_rgb(split(batch)[0][0])) for batch in images]
        sheet = np.asarray(labelled_grid(pictures, *labels)) / np.float32(255)
        sheet = torch.from_numpy(sheet)[None]
        return io.NodeOutput(sheet, ui=ui.PreviewImage(sheet))


def _fitted(picture: Image.Image, longest: int = 384) -> Image.Image:
    """At most so many pixels on a side."""
    picture.thumbnail((longest, longest))
    return picture
