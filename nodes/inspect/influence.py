"""Reference Influence."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import comfy.model_management as mm
import comfy.utils
from comfy_api.latest import io, ui

from ...easyref_core import INSTRUCTION, SIZE
from ...easyref_core.inspect.charts import Bar, bar_chart, matrix_chart
from ...easyref_core.inspect.drawing import vstack
from ...easyref_core.inspect.influence import (
    MIN_REFERENCES,
    OUTLIER_Z,
    change,
    find_outlier,
    likeness,
    mean_to_others,
)
from ..host.images import image_of, pictures_of, references_of
from ..host.inputs import group_input, instruction_input, prompt_input, size_input
from ..host.notes import read_prompt
from ..host.socket_types import EasyRefGroupSocket, EasyRefModel
from ..host.validation import validates_inputs

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL import Image
    from torch import Tensor

    from ..host.hosted_model import HostedEasyRef


@validates_inputs
class EasyRefReferenceInfluence(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefReferenceInfluence",
            display_name="Reference Influence",
            category="EasyRef/look",
            description="What each reference does: how much the reference tokens change without it, how alike the "
            "references look to the MLLM, and which one does not belong. The group is read again without each one; no picture is looked at twice.",
            search_aliases=["outlier", "leave one out", "reference similarity", "ip adapter", "reference"],
            is_output_node=True,
            inputs=[
                EasyRefModel.Input("easyref", tooltip="From Load EasyRef."),
                group_input("A reference group or an image batch, of 2 or more."),
                prompt_input("The prompt that Encode Reference Group reads. Link one text node to both."),
                instruction_input("As in Encode Reference Group."),
                size_input("Pixels, as in Encode Reference Group."),
            ],
            outputs=[
                io.Image.Output(display_name="chart", tooltip="Influence and likeness of the references."),
                io.String.Output(display_name="report", tooltip="The same in words."),
                io.Int.Output(
                    display_name="odd_one",
                    tooltip="The reference that does not belong, counted from 0 as in a batch; -1: none stands out.",
                ),
                EasyRefGroupSocket.Output(
                    display_name="without_it",
                    tooltip="The group without that reference; all, if none stands out.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        easyref: HostedEasyRef,
        group: Tensor | tuple[Tensor, ...],
        prompt: str,
        instruction: str = INSTRUCTION,
        size: int = SIZE,
    ) -> io.NodeOutput:
        references = references_of(group)
        if len(references) < 2:
            raise ValueError(
                f"The group holds {len(references)} reference; its influence shows only beside others. Give it 2 or more."
            )
        images, (text, notes) = [image[0] for image in references], read_prompt(prompt)
        changes, similarity = measure(easyref, images, text, instruction, size)
        odd, score = find_outlier(similarity)
        chart = image_of(draw(pictures_of(references), changes, similarity, odd))
        kept = tuple(image for i, image in enumerate(references) if i != odd)
        report = "\n".join([describe(changes, similarity, odd, score), *notes])
        return io.NodeOutput(chart, report, odd, kept, ui=ui.PreviewImage(chart, cls=cls))


def measure(
    easyref: HostedEasyRef, images: list[Tensor], prompt: str, instruction: str, size: int
) -> tuple[list[float], Tensor]:
    """How the tokens change without each image, and how alike the images are (K, K)."""
    count = len(images)
    bar = comfy.utils.ProgressBar(count + 2)
    finished = itertools.count()

    def progress() -> Callable[[float], None]:
        """Of the next of the count + 2 parts: the vision tower, all images, and all but one each."""
        before = next(finished)

        def tell(done: float) -> None:
            mm.throw_exception_if_processing_interrupted()
            bar.update_absolute(before + done, count + 2)

        return tell

    def tokens(of: list[Tensor]) -> Tensor:
        context = easyref.encode(of, prompt, instruction, size, progress())
        return easyref.aggregate(context).conditional

    similarity = likeness(easyref.vision_features(images, size, progress()))
    everything = tokens(images)
    return [change(everything, tokens(images[:i] + images[i + 1 :])) for i in range(count)], similarity


def draw(pictures: list[Image.Image], changes: list[float], similarity: Tensor, odd: int) -> Image.Image:
    """A bar for each reference, and the matrix of how alike they are; the odd one in red."""
    names = [f"reference {i + 1}" for i in range(len(changes))]
    bars = [
        Bar(name, value, f"{value:.4f}", i == odd, picture)
        for i, (name, value, picture) in enumerate(zip(names, changes, pictures, strict=True))
    ]
    apart = similarity.clone().fill_diagonal_(float("nan"))
    others = apart[~apart.isnan()]
    note = "cosine of what the vision tower sees; the one that does not belong in red" if odd >= 0 else ""
    matrix = matrix_chart(
        "How alike the references are",
        apart.numpy(),
        names,
        [str(i + 1) for i in range(len(names))],
        float(others.min()),
        float(others.max()),
        note or "cosine of what the vision tower sees",
        pictures,
        odd,
    )
    return vstack([bar_chart("Change of the reference tokens without it", bars), matrix])


def describe(changes: list[float], similarity: Tensor, odd: int, score: float) -> str:
    """The report: a line for each reference, and the verdict with its criterion."""
    lines = [
        f"reference {i + 1}: the tokens change by {value:.4f} without it (1 - cosine); mean likeness to the others {alike:.3f}"
        for i, (value, alike) in enumerate(zip(changes, mean_to_others(similarity).tolist(), strict=True))
    ]
    criterion = f"its mean likeness lies {score:.2f} robust standard deviations below the median; {OUTLIER_Z:g} are asked for"
    if odd >= 0:
        lines.append(f"Reference {odd + 1} does not belong: {criterion}.")
    elif len(changes) < MIN_REFERENCES:
        lines.append(
            f"None is named: of fewer than {MIN_REFERENCES} references it cannot be said who does not belong."
        )
    else:
        lines.append(f"None stands out. Of the least alike, {criterion}.")
    return "\n".join(lines)
