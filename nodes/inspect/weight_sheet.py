"""Weight Sheet, which lists settings to compare, and Assemble Sheet, which shows what came of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io, ui
from PIL import Image

from ...easyref_core.inspect.drawing import contact_sheet, fit_square
from ...easyref_core.utils.number_lists import parse_numbers
from ..host import preview
from ..host.images import image_of, pictures_of
from ..host.validation import validates_inputs

if TYPE_CHECKING:
    from torch import Tensor


@validates_inputs
class EasyRefWeightSheet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefWeightSheet",
            display_name="Weight Sheet",
            category="EasyRef/look",
            description="Every weight with every end, as lists: linked to Apply EasyRef, the nodes after it run once for "
            "each pair. Assemble Sheet puts the pictures together.",
            search_aliases=["xy plot", "x/y sheet", "grid", "compare weights", "ip adapter weight"],
            is_output_node=True,
            inputs=[
                io.String.Input(
                    "weights",
                    default="0.4, 0.7, 1.0",
                    tooltip="Weights, -1 to 3, separated by commas: the columns. Write decimals with a point.",
                ),
                io.String.Input(
                    "end_percents",
                    default="1.0",
                    tooltip="Ends, 0 to 1, separated by commas: the rows. 1.0: the references act to the last step. "
                    "Write decimals with a point.",
                ),
            ],
            outputs=[
                io.Float.Output(
                    display_name="weight",
                    is_output_list=True,
                    tooltip="To Apply EasyRef and to Assemble Sheet.",
                ),
                io.Float.Output(
                    display_name="end_percent",
                    is_output_list=True,
                    tooltip="To Apply EasyRef and to Assemble Sheet.",
                ),
            ],
        )

    @classmethod
    def execute(cls, weights: str, end_percents: str) -> io.NodeOutput:
        columns = read_numbers(weights, "weights", -1.0, 3.0)
        rows = read_numbers(end_percents, "end_percents", 0.0, 1.0)
        pairs = [(column, row) for row in rows for column in columns]
        lines = [f"weight {column:g}, end_percent {row:g}" for column, row in pairs]
        report = "\n".join([f"{len(pairs)} pairs. The nodes after Apply EasyRef run once for each.", *lines])
        return io.NodeOutput(*map(list, zip(*pairs, strict=True)), ui=preview.text(report))


@validates_inputs
class EasyRefSheet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefSheet",
            display_name="Assemble Sheet",
            category="EasyRef/look",
            description="One labelled contact sheet of the pictures that were made with the pairs of Weight Sheet.",
            search_aliases=["xy plot", "contact sheet", "grid", "compare weights"],
            is_output_node=True,
            is_input_list=True,
            inputs=[
                io.Image.Input(
                    "images", tooltip="The pictures, one batch for each pair: a batch is shown in one cell."
                ),
                io.Float.Input("weight", force_input=True, tooltip="From Weight Sheet."),
                io.Float.Input("end_percent", force_input=True, tooltip="From Weight Sheet."),
                io.Int.Input(
                    "cell",
                    default=256,
                    min=64,
                    max=1024,
                    step=16,
                    advanced=True,
                    tooltip="Pixels of a cell's side.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="sheet", tooltip="Weights from left to right, ends downwards.")
            ],
        )

    @classmethod
    def execute(
        cls, images: list[Tensor], weight: list[float], end_percent: list[float], cell: list[int] = (256,)
    ) -> io.NodeOutput:
        if not len(images) == len(weight) == len(end_percent):
            raise ValueError(
                f"The sheet was given {len(images)} pictures, {len(weight)} weights and {len(end_percent)} ends; wanted as "
                "many of each. Link weight and end_percent of one Weight Sheet to Apply EasyRef and here, and decode every "
                "result."
            )
        columns, rows = list(dict.fromkeys(weight)), list(dict.fromkeys(end_percent))
        cells: dict[str, list[Image.Image | None]] = {f"until {row:g}": [None] * len(columns) for row in rows}
        for batch, column, row in zip(images, weight, end_percent, strict=True):
            cells[f"until {row:g}"][columns.index(column)] = side_by_side(pictures_of(batch), cell[0])
        headings = {i: f"weight {column:g}" for i, column in enumerate(columns)}
        sheet = image_of(contact_sheet(cells, cell[0], headings))
        return io.NodeOutput(sheet, ui=ui.PreviewImage(sheet, cls=cls))


def read_numbers(text: str, name: str, low: float, high: float) -> list[float]:
    """Numbers of a list, each once, in order. Raises ValueError for anything else, and for an empty list."""
    numbers = parse_numbers(text, name, low, high, example="0.4, 0.7, 1.0")
    if not numbers:
        raise ValueError(f'{name} is empty. Write at least one number, such as "1.0".')
    return list(dict.fromkeys(numbers))


def side_by_side(pictures: list[Image.Image], cell: int) -> Image.Image:
    """The pictures of a batch, in as many columns as rows, fitted into one cell."""
    columns = next(n for n in range(1, len(pictures) + 1) if n * n >= len(pictures))
    part = cell // columns
    shown = [fit_square(picture, part) for picture in pictures]
    width, height = (max(sides) for sides in zip(*(picture.size for picture in shown), strict=True))
    rows = -(-len(shown) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for place, picture in enumerate(shown):
        sheet.paste(picture, (place % columns * width, place // columns * height))
    return sheet
