"""Reference Consistency."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import comfy.model_management as mm
import comfy.utils
import torch
from comfy_api.latest import io, ui

from ...easyref_core.inspect.charts import GREEN, Bar, bar_chart
from ...easyref_core.inspect.consistency import cropped_share, similarity
from ..host.images import image_of, pictures_of, references_of, split
from ..host.inputs import group_input
from ..host.validation import validates_inputs

if TYPE_CHECKING:
    from PIL import Image
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
        pictures, references = split(images), references_of(group)
        if not pictures or not references:
            raise ValueError(
                f"There are {len(pictures)} pictures and {len(references)} references; at least one of each is needed."
            )
        embeddings = embed(clip_vision, [*pictures, *references], crop)
        cosines = similarity(embeddings[: len(pictures)], embeddings[len(pictures) :])
        means = cosines.mean(dim=1)
        best = int(means.argmax())
        chart = image_of(draw(pictures_of(pictures), means.tolist(), best))
        report = describe(cosines, best, [tuple(image.shape[1:3]) for image in references], crop)
        return io.NodeOutput(
            chart, pictures[best], float(means.mean()), best, report, ui=ui.PreviewImage(chart, cls=cls)
        )


def embed(clip_vision: Any, images: list[Tensor], crop: str) -> Tensor:
    """The embedding of each image (1, height, width, channels), one after the other: (images, D)."""
    bar = comfy.utils.ProgressBar(len(images))
    rows = []
    for image in images:
        mm.throw_exception_if_processing_interrupted()
        rows.append(clip_vision.encode_image(image[..., :3], crop=crop == CROPS[0])["image_embeds"].flatten())
        bar.update(1)
    return torch.stack(rows).float().cpu()


def draw(pictures: list[Image.Image], means: list[float], best: int) -> Image.Image:
    """A bar for each picture, from 0 to 1; the best says so."""
    bars = [
        Bar(f"{i + 1} best" if i == best else str(i + 1), mean, f"{mean:.3f}", i == best, picture)
        for i, (mean, picture) in enumerate(zip(means, pictures, strict=True))
    ]
    return bar_chart("Mean cosine to the references", bars, high=1.0, mark=GREEN)


def describe(cosines: Tensor, best: int, sizes: list[tuple[int, int]], crop: str) -> str:
    """The report: a line for each picture, the best, and what CLIP does not see of the references."""
    lines = []
    for i, row in enumerate(cosines.tolist()):
        each = ", ".join(f"{cosine:.3f}" for cosine in row)
        lines.append(f"picture {i + 1}: {sum(row) / len(row):.3f} (to the references in order: {each})")
    lines.append(f"Picture {best + 1} is closest. Mean of all: {float(cosines.mean()):.3f}.")
    for i, (height, width) in enumerate(sizes):
        if height == width:
            continue
        if crop == CROPS[0]:
            lost = f"{100 * cropped_share(height, width):.0f} % of it, outside its middle square, is not seen"
        else:
            lost = "it is squeezed into a square"
        lines.append(f"Reference {i + 1} is {width}x{height}: {lost}.")
    return "\n".join(lines)
