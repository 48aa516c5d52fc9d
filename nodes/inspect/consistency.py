"""Reference Consistency."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import io, ui

from ...easyref_core.inspect.influence import cosine_matrix
from ...easyref_core.inspect.reports import consistency_report
from ..host.hosted_model import counted
from ..host.images import image_of, pictures_of, references_of, split
from ..host.inputs import group_input

if TYPE_CHECKING:
    from torch import Tensor

CROPS = ("center", "none")


class EasyRefConsistency(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefConsistency",
            display_name="Reference Consistency",
            category="EasyRef/look",
            description="How close pictures are to the references: cosines of the host's CLIP vision. To choose among "
            "seeds, weights and settings by a number.",
            search_aliases=["clip score", "image similarity", "best seed", "ip adapter", "reference"],
            is_output_node=True,
            inputs=[
                io.ClipVision.Input("clip_vision", tooltip="From Load CLIP Vision."),
                io.Image.Input("images", tooltip="The pictures to measure, a batch."),
                group_input("The references: a group or an image batch."),
                io.Combo.Input(
                    "crop",
                    options=list(CROPS),
                    default=CROPS[0],
                    advanced=True,
                    tooltip="CLIP sees a square. center: of pictures that are not square it sees the middle, undistorted; "
                    "the report says what is cut off. none: it sees all, squeezed into the square.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="chart", tooltip="A bar for each picture."),
                io.Image.Output(
                    display_name="best", tooltip="The picture that is closest to the references."
                ),
                io.Float.Output(
                    display_name="mean", tooltip="Mean cosine over all pictures and references, -1 to 1."
                ),
                io.Int.Output(
                    display_name="best_index", tooltip="The number of the best picture in the batch, from 0."
                ),
                io.String.Output(display_name="report", tooltip="Every cosine in words."),
            ],
        )

    @classmethod
    def execute(
        cls,
        clip_vision: Any,
        images: Tensor,
        group: Tensor | tuple[Tensor, ...],
        crop: str = CROPS[0],
    ) -> io.NodeOutput:
        batch, references = split(images), references_of(group)
        if not batch or not references:
            raise ValueError(
                f"There are {len(batch)} pictures and {len(references)} references. Connect at least one of each."
            )
        embeddings = embed(clip_vision, [*batch, *references], crop)
        cosines = cosine_matrix(embeddings[: len(batch)], embeddings[len(batch) :])
        sizes = [tuple(image.shape[1:3]) for image in references]
        report = consistency_report(pictures_of(batch), cosines, sizes, crop == CROPS[0])
        chart, means = image_of(report.image), cosines.mean(dim=1)
        best = int(means.argmax())
        values = chart, batch[best], float(means.mean()), best, report.text
        return io.NodeOutput(*values, ui=ui.PreviewImage(chart, cls=cls))


def embed(clip_vision: Any, images: list[Tensor], crop: str) -> Tensor:
    """Return the embeddings (N, D) of images, each (1, height, width, C); can be cancelled between images."""
    progress, rows = counted(len(images)), []
    for i, image in enumerate(images):
        rows.append(clip_vision.encode_image(image[..., :3], crop=crop == CROPS[0])["image_embeds"].flatten())
        progress((i + 1) / len(images))
    return torch.stack(rows).float().cpu()
