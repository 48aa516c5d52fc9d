"""Node Reference Consistency: similarity of generated images to each reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import io, ui

from ...easyref_core.inspect.influence import cosine_matrix
from ...easyref_core.inspect.reports import consistency_report
from ..host.hosted_model import progress_callback
from ..host.images import split, split_group, to_tensor
from ..host.inputs import group_input
from ..host.validation import validates_inputs

if TYPE_CHECKING:
    from torch import Tensor

CROPS = ("center", "none")


@validates_inputs
class EasyRefConsistency(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefConsistency",
            display_name="Reference Consistency",
            category="EasyRef/look",
            description="Measures how close images are to the references, by the cosine similarity of their "
            "CLIP vision embeddings. Use it to choose among seeds, weights and settings.",
            search_aliases=["clip score", "image similarity", "best seed"],
            is_output_node=True,
            inputs=[
                io.ClipVision.Input("clip_vision", tooltip="The CLIP vision model, from Load CLIP Vision."),
                io.Image.Input("images", tooltip="The images to measure, as a batch."),
                group_input("The references: a group or an image batch."),
                io.Combo.Input(
                    "crop",
                    options=list(CROPS),
                    default=CROPS[0],
                    advanced=True,
                    tooltip="How an image becomes CLIP's square. center: its middle, undistorted; the "
                    "report says what is cut off. none: all of it, squeezed into the square.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="chart", tooltip="A bar for each image."),
                io.Image.Output(display_name="best", tooltip="The image that is closest to the references."),
                io.Float.Output(
                    display_name="mean", tooltip="Mean cosine over all images and references, -1 to 1."
                ),
                io.Int.Output(
                    display_name="best_index", tooltip="Index of the best image in the batch, counted from 0."
                ),
                io.String.Output(display_name="report", tooltip="Every cosine as text."),
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
        batch, references = split(images), split_group(group)
        if not batch or not references:
            raise ValueError(
                f"There are {len(batch)} pictures and {len(references)} references. Connect at least one of "
                "each."
            )
        embeddings = embed(clip_vision, [*batch, *references], crop)
        cosines = cosine_matrix(embeddings[: len(batch)], embeddings[len(batch) :])
        sizes = [tuple(image.shape[1:3]) for image in references]
        report = consistency_report(images, cosines, sizes, crop == CROPS[0])
        chart, means = to_tensor(report.image), cosines.mean(dim=1)
        best = int(means.argmax())
        values = chart, batch[best], float(means.mean()), best, report.text
        return io.NodeOutput(*values, ui=ui.PreviewImage(chart, cls=cls))


def embed(clip_vision: Any, images: list[Tensor], crop: str) -> Tensor:
    """Return the embeddings (N, D) of images, each (1, height, width, C); can be cancelled between images."""
    progress, rows = progress_callback(len(images)), []
    for i, image in enumerate(images):
        rows.append(clip_vision.encode_image(image[..., :3], crop=crop == CROPS[0])["image_embeds"].flatten())
        progress((i + 1) / len(images))
    return torch.stack(rows).float().cpu()
