"""Node Crop References: images -> group of square crops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from comfy_api.latest import io

from ...easyref_core.utils.images import Box, middle_square, square_around
from ..host import preview
from ..host.images import ReferenceGroup, cropped, split_group, split_masks
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
            description="Crops references to squares and shows the crops. The authors advise square crops "
            "of the face for identity; for anything else, keep the whole images.",
            search_aliases=["crop face", "prep image", "square crop", "crop to mask"],
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
                    tooltip="How to crop the references; 'none' leaves them unchanged.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Mask for 'square around the mask': one for all references, or one for each, in "
                    "order.",
                ),
                io.Float.Input(
                    "padding",
                    default=1.5,
                    min=1.0,
                    max=5.0,
                    step=0.05,
                    advanced=True,
                    tooltip="Side of the square around the mask, relative to the masked part's longer side.",
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
        references = ReferenceGroup.joined(map(split_group, images))
        if not references:
            raise ValueError("Nothing to crop. Connect at least one image.")
        boxes = crop_boxes(references, crop[0], mask, padding[0])
        crops = ReferenceGroup(*zip(*map(cropped, references, references.masks, boxes), strict=True))
        lines = [
            f"reference {i + 1}: {old.shape[2]}x{old.shape[1]} -> {new.shape[2]}x{new.shape[1]} at "
            f"({box[0]}, {box[1]})"
            for i, (old, new, box) in enumerate(zip(references, crops, boxes, strict=True))
            if old.shape != new.shape
        ]
        ui = {**preview.images(crops, crops.masks), **preview.text("\n".join(lines) or "Nothing is cropped.")}
        return io.NodeOutput(crops, list(crops), ui=ui)


def crop_boxes(
    references: Sequence[Tensor], crop: str, mask: list[Tensor] | None, padding: float
) -> list[Box]:
    """Return the box to crop from each reference (1, height, width, C)."""
    sizes = [(reference.shape[1], reference.shape[2]) for reference in references]
    if crop == NONE:
        return [(0, 0, width, height) for height, width in sizes]
    if crop == MIDDLE:
        return [middle_square(height, width) for height, width in sizes]
    masks = split_masks(mask or [])
    if len(masks) == 1:
        masks *= len(references)
    if len(masks) != len(references):
        raise ValueError(
            f"{len(masks)} masks for {len(references)} references. Connect one mask for all, or one for each."
        )
    return [
        square_around(mask, height, width, padding, f"The mask of reference {i + 1}")
        for i, ((height, width), mask) in enumerate(zip(sizes, masks, strict=True))
    ]
