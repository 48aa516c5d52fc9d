"""Crop Reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..easyref_core.crop import fitted, mask_square, middle_square
from .references import split

if TYPE_CHECKING:
    from torch import Tensor

NONE, MIDDLE, MASK = CROPS = ("none", "square around the middle", "square around the mask")


class EasyRefCropReference(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefCropReference",
            display_name="Crop Reference",
            category="EasyRef",
            description="Crops references to squares, each at its own resolution. Nothing else in this pack crops; the "
            "authors advise square crops of faces for identity.",
            search_aliases=["crop", "face crop", "prep image", "reference"],
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="References: one, a batch, or a list of any sizes."),
                io.Combo.Input(
                    "crop",
                    options=list(CROPS),
                    default=NONE,
                    tooltip="none: the images as they are. square around the mask needs a mask.",
                ),
                io.Float.Input(
                    "padding",
                    default=0.25,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Room around the mask, as a part of its longer side.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="What to crop to: one mask for all references, or one for each.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images",
                    is_output_list=True,
                    tooltip="A list of images, one for each reference, to Reference Group.",
                )
            ],
        )

    @classmethod
    def execute(
        cls, images: list[Tensor], crop: list[str], padding: list[float], mask: list[Tensor] | None = None
    ) -> io.NodeOutput:
        references = [reference for batch in images for reference in split(batch)]
        masks = [one for batch in mask or [] for one in batch.reshape(-1, *batch.shape[-2:])]
        if crop[0] == NONE:
            return io.NodeOutput(references)
        if crop[0] == MIDDLE:
            return io.NodeOutput([middle_square(*r.shape[1:3]).of(r) for r in references])
        if len(masks) not in (1, len(references)):
            raise ValueError(
                f"There are {len(masks)} masks for {len(references)} references; wanted one for all or one for each. "
                "Connect a mask, or crop around the middle."
            )
        masks = masks * len(references) if len(masks) == 1 else masks
        pairs = zip(references, masks, strict=True)
        return io.NodeOutput([mask_square(fitted(m, *r.shape[1:3]), padding[0]).of(r) for r, m in pairs])
