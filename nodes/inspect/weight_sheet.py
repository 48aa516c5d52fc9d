"""Weight Sheet, which lists settings to compare, and Assemble Sheet, which draws the results as one image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io, ui

from ...easyref_core.inspect.reports import weight_sheet
from ...easyref_core.utils.number_lists import parse_numbers
from ..host import preview
from ..host.images import to_tensor
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
            description="Lists every pair of a weight and an end percent. With both lists linked to Apply "
            "EasyRef, the nodes after it run once for each pair; Assemble Sheet puts the images together.",
            search_aliases=["xy plot", "x/y sheet", "grid", "compare weights"],
            is_output_node=True,
            inputs=[
                io.String.Input(
                    "weights",
                    default="0.4, 0.7, 1.0",
                    tooltip="Weights (-1 to 3) separated by commas: the columns. Write decimals with a "
                    "point.",
                ),
                io.String.Input(
                    "end_percents",
                    default="1.0",
                    tooltip="End percents (0 to 1) separated by commas: the rows. At 1.0 the references act "
                    "until the last step. Write decimals with a point.",
                ),
            ],
            outputs=[
                io.Float.Output(
                    display_name="weight",
                    is_output_list=True,
                    tooltip="The weights, for Apply EasyRef and Assemble Sheet.",
                ),
                io.Float.Output(
                    display_name="end_percent",
                    is_output_list=True,
                    tooltip="The end percents, for Apply EasyRef and Assemble Sheet.",
                ),
            ],
        )

    @classmethod
    def execute(cls, weights: str, end_percents: str) -> io.NodeOutput:
        columns = unique_numbers(weights, "weights", -1.0, 3.0)
        rows = unique_numbers(end_percents, "end_percents", 0.0, 1.0)
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
            description="Assembles the images of Weight Sheet's pairs into one labelled contact sheet.",
            search_aliases=["xy plot", "contact sheet", "grid", "compare weights"],
            is_output_node=True,
            is_input_list=True,
            inputs=[
                io.Image.Input(
                    "images", tooltip="The images, one batch for each pair; a batch is shown in one cell."
                ),
                io.Float.Input("weight", force_input=True, tooltip="Weights, from Weight Sheet."),
                io.Float.Input("end_percent", force_input=True, tooltip="End percents, from Weight Sheet."),
                io.Int.Input(
                    "cell",
                    default=256,
                    min=64,
                    max=1024,
                    step=16,
                    advanced=True,
                    tooltip="Side of a cell in pixels.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="sheet", tooltip="Columns are weights, rows are end percents.")
            ],
        )

    @classmethod
    def execute(
        cls, images: list[Tensor], weight: list[float], end_percent: list[float], cell: list[int] = (256,)
    ) -> io.NodeOutput:
        sheet = to_tensor(weight_sheet([list(batch) for batch in images], weight, end_percent, cell[0]))
        return io.NodeOutput(sheet, ui=ui.PreviewImage(sheet, cls=cls))


def unique_numbers(text: str, name: str, low: float, high: float) -> list[float]:
    """Return the distinct numbers of a list, in order. Raises ValueError for an invalid or empty list."""
    numbers = parse_numbers(text, name, low, high, example="0.4, 0.7, 1.0")
    if not numbers:
        raise ValueError(f'{name} is empty. Write at least one number, such as "1.0".')
    return list(dict.fromkeys(numbers))
