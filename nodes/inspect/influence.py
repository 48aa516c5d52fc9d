"""Node Reference Influence: change of the tokens when each reference is left out, and outliers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from comfy_api.latest import io, ui

from ...easyref_core import INSTRUCTION, SIZE
from ...easyref_core.inspect.influence import leave_one_out
from ...easyref_core.inspect.reports import influence_report
from ..host.hosted_model import progress_callback
from ..host.images import split_group, to_tensor
from ..host.inputs import group_input, instruction_input, prompt_input, size_input
from ..host.notes import read_prompt
from ..host.socket_types import EasyRefGroupSocket, EasyRefModel
from ..host.validation import validates_inputs

if TYPE_CHECKING:
    from torch import Tensor

    from ...easyref_core.inspect.influence import Progress
    from ..host.hosted_model import HostedEasyRef


@validates_inputs
class EasyRefReferenceInfluence(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefReferenceInfluence",
            display_name="Reference Influence",
            category="EasyRef/look",
            description="Measures what each reference contributes: how much the reference tokens change "
            "without it, how similar the references look to the MLLM, and which one does not belong. The "
            "group is encoded again without each reference; the vision tower encodes each image only once.",
            search_aliases=["outlier", "leave one out", "reference similarity"],
            is_output_node=True,
            inputs=[
                EasyRefModel.Input("easyref", tooltip="The EasyRef model, from Load EasyRef."),
                group_input("A reference group or an image batch, of 2 or more references."),
                prompt_input("The prompt of Encode Reference Group. Link one text node to both."),
                instruction_input("The instruction, as in Encode Reference Group."),
                size_input("Resolution in pixels, as in Encode Reference Group."),
            ],
            outputs=[
                io.Image.Output(display_name="chart", tooltip="Influence and similarity of the references."),
                io.String.Output(display_name="report", tooltip="The same as text."),
                io.Int.Output(
                    display_name="odd_one",
                    tooltip="Index of the outlier reference, counted from 0; -1 if none stands out.",
                ),
                EasyRefGroupSocket.Output(
                    display_name="without_it",
                    tooltip="The group without that reference; the whole group if none stands out.",
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
        references, (text, notes) = split_group(group), read_prompt(prompt)
        images = [image[0] for image in references]

        def tokens(indexes: Sequence[int], progress: Progress) -> Tensor:
            context = easyref.encode([images[i] for i in indexes], text, instruction, size, progress)
            return easyref.aggregate(context.masked(references.selected(indexes).masks)).conditional

        influence = leave_one_out(
            range(len(images)),
            lambda _, progress: easyref.vision_features(images, size, progress),
            tokens,
            progress_callback(len(references) + 2),
        )
        report = influence_report(images, influence)
        chart, text = to_tensor(report.image), "\n".join([report.text, *notes])
        others = references.selected(i for i in range(len(references)) if i != influence.outlier)
        return io.NodeOutput(chart, text, influence.outlier, others, ui=ui.PreviewImage(chart, cls=cls))
