"""Crop References."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from comfy_api.latest import io

from ...easyref_core.utils.crop import Box, middle_square, square_around
from ..host import preview
from ..host.images import references_of
from ..host.socket_types import EasyRefGroupSocket
from ..host.validation import validates_inputs

if TYPE_CHECKING:
    from torch import Tensor

NONE, MIDDLE, MASK = "none", "square in the middle", "square around the mask"


@validates_inputs
class EasyRefCropReference(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefCropReference",
            display_name="Crop References",
            category="EasyRef",
            description="Crops references to squares, and shows what is left of them. The authors advise square crops of "
            "the face for identity; for anything else, leave pictures whole.",
            search_aliases=["face crop", "prep image", "square crop", "crop to mask"],
            is_output_node=True,
            is_input_list=True,  # lists of different sizes, and one mask for each
            inputs=[
                io.MultiType.Input(
                    "images",
                    [io.Image, EasyRefGroupSocket],
                    tooltip="An image, a batch, a list of images of any sizes, or a group.",
                ),
                io.Combo.Input(
                    "crop",
                    options=[NONE, MIDDLE, MASK],
                    default=NONE,
                    tooltip="none leaves the references as they are.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="For the square around it: one mask for all references, or one for each, in their order.",
                ),
                io.Float.Input(
                    "padding",
                    default=1.5,
                    min=1.0,
                    max=5.0,
                    step=0.05,
                    advanced=True,
                    tooltip="Side of the square around the mask, in lengths of the masked part's longer side.",
                ),
            ],
            outputs=[
                EasyRefGroupSocket.Output(display_name="group", tooltip="The crops as a group, in order."),
                io.Image.Output(
                    display_name="images", is_output_list=True, tooltip="The crops as a list of images."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        images: list[Tensor | tuple[Tensor, ...]],
        crop: list[str],
        mask: list[Tensor] | None = None,
        padding: Sequence[float] = (1.5,),
    ) -> io.NodeOutput:
        references = [reference for part in images for reference in references_of(part)]
        if not references:
            raise ValueError("There is no image to crop. Connect at least one.")
        boxes = boxes_of(references, crop[0], mask, padding[0])
        crops = tuple(
            reference[:, top:bottom, left:right]
            for reference, (left, top, right, bottom) in zip(references, boxes, strict=True)
        )
        lines = [
            f"reference {i + 1}: {old.shape[2]}x{old.shape[1]} -> {new.shape[2]}x{new.shape[1]} at ({box[0]}, {box[1]})"
            for i, (old, new, box) in enumerate(zip(references, crops, boxes, strict=True))
            if old.shape != new.shape
        ]
        show = {**preview.pictures(crops), **preview.text("\n".join(lines) or "Nothing is cropped.")}
        return io.NodeOutput(crops, list(crops), ui=show)


def boxes_of(references: list[Tensor], crop: str, mask: list[Tensor] | None, padding: float) -> list[Box]:
    """What to keep of each reference (1, height, width, C)."""
    sides = [(reference.shape[1], reference.shape[2]) for reference in references]
    if crop == NONE:
        return [(0, 0, width, height) for height, width in sides]
    if crop == MIDDLE:
        return [middle_square(height, width) for height, width in sides]
    masks = [one for part in mask or [] for one in part.reshape(-1, *part.shape[-2:])]
    if len(masks) == 1:
        masks *= len(references)
    if len(masks) != len(references):
        raise ValueError(
            f"{len(masks)} masks for {len(references)} references. Connect one mask for all, or one for each."
        )
    boxes = []
    for i, ((height, width), one) in enumerate(zip(sides, masks, strict=True)):
        try:
            boxes.append(square_around(one, height, width, padding))
        except ValueError as error:
            raise ValueError(f"The mask of reference {i + 1} {error}") from error
    return boxes
