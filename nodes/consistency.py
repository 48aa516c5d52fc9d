"""Reference Consistency."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..easyref_core.consistency import bars, cosines
from .references import split
from .sockets import EasyRefGroupSocket

if TYPE_CHECKING:
    from comfy.clip_vision import ClipVisionModel
    from torch import Tensor


class EasyRefConsistency(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefConsistency",
            display_name="Reference Consistency",
            category="EasyRef/inspect",
            description="How near generated pictures are to the references, by the features of a CLIP vision model: to choose "
            "seeds and weights by.",
            search_aliases=["similarity", "clip score", "compare", "choose seed", "reference"],
            is_output_node=True,
            inputs=[
                io.ClipVision.Input(
                    "clip_vision", tooltip="From Load CLIP Vision; any model the host reads."
                ),
                io.Image.Input("images", tooltip="The pictures to compare, as a batch."),
                io.MultiType.Input(
                    "group", [EasyRefGroupSocket, io.Image], tooltip="The references, or an image batch."
                ),
            ],
            outputs=[
                io.Float.Output(
                    display_name="similarity", tooltip="Mean cosine of all pictures to all references."
                ),
                io.Int.Output(
                    display_name="best", tooltip="Which picture of the batch is nearest, counted from 0."
                ),
                io.Image.Output(display_name="plot", tooltip="A bar for each picture."),
                io.String.Output(
                    display_name="report", tooltip="Each picture's mean, and its cosine to each reference."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, clip_vision: ClipVisionModel, images: Tensor, group: Tensor | tuple[Tensor, ...]
    ) -> io.NodeOutput:
        references = group if isinstance(group, tuple) else split(group)
        if not len(images) or not references:
            raise ValueError(
                f"There are {len(images)} pictures and {len(references)} references; wanted at least one of each."
            )
        found = cosines(
            features(clip_vision, split(images)), features(clip_vision, references)
        )  # -> (pictures, references)
        means = found.mean(dim=1).tolist()
        labels = [f"picture {i + 1}" for i in range(len(means))]
        plot = bars(means, labels, f"Mean cosine to {len(references)} references")
        sheet = torch.from_numpy(np.asarray(plot) / np.float32(255))[None]
        lines = [
            f"{label}: {mean:.3f} ({', '.join(f'{one:.3f}' for one in row)})"
            for label, mean, row in zip(labels, means, found.tolist(), strict=True)
        ]
        best = max(range(len(means)), key=means.__getitem__)
        shown = ui.PreviewImage(sheet).as_dict() | ui.PreviewText("\n".join(lines)).as_dict()
        return io.NodeOutput(sum(means) / len(means), best, sheet, "\n".join(lines), ui=shown)


def features(clip_vision: ClipVisionModel, images: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """Image features (N, F) of single images (1, height, width, C) of any sizes, scaled whole, not cropped."""
    return torch.cat(
        [clip_vision.encode_image(one[..., :3], crop=False)["image_embeds"].cpu() for one in images]
    )
