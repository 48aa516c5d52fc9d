"""Node Reference Attention: attention maps of the reference tokens over each reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io, ui
from torch.nn.functional import interpolate

from ...easyref_core.inspect.attention_maps import require_same_group
from ...easyref_core.inspect.reports import attention_report, heat_maps
from ..host.images import split_group, to_tensor
from ..host.inputs import group_input, model_input
from ..host.socket_types import EasyRefContext
from ..host.validation import validates_inputs

if TYPE_CHECKING:
    from torch import Tensor

    from ..host.hosted_model import HostedEasyRef
    from ..host.socket_types import HostedContext


@validates_inputs
class EasyRefReferenceAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefReferenceAttention",
            display_name="Reference Attention",
            category="EasyRef/look",
            description="Shows what the reference tokens attend to: heat maps of the last layer's attention "
            "over each reference, and its shares for each reference, the text and the tokens themselves.",
            search_aliases=["attention map", "heat map", "explain"],
            is_output_node=True,
            inputs=[
                EasyRefContext.Input("context", tooltip="The encoded group, from Encode Reference Group."),
                group_input("The group that was encoded; the heat maps are drawn over its images."),
                io.Int.Input(
                    "token",
                    default=-1,
                    min=-1,
                    max=1023,
                    advanced=True,
                    tooltip="One reference token, counted from 0 (the released model has 64). -1: the mean.",
                ),
                model_input("The context carries the model that encoded it"),
            ],
            outputs=[
                io.Image.Output(display_name="sheet", tooltip="The heat maps over the references."),
                io.Mask.Output(
                    display_name="maps",
                    is_output_list=True,
                    tooltip="Each reference's heat map at its own size, all on one scale.",
                ),
                io.String.Output(display_name="report", tooltip="The shares as text."),
            ],
        )

    @classmethod
    def execute(
        cls,
        context: HostedContext,
        group: Tensor | tuple[Tensor, ...],
        token: int = -1,
        easyref: HostedEasyRef | None = None,
    ) -> io.NodeOutput:
        images = [image[0] for image in split_group(group)]
        model = context.model_or(easyref)
        shares = model.attention(context, token)
        require_same_group(images, context, model.model.config)
        report = attention_report(images, shares, token)
        sheet = to_tensor(report.image)
        masks = [
            interpolate(heat[None, None], tuple(image.shape[:2]), mode="bilinear")[0]
            for heat, image in zip(heat_maps(shares), images, strict=True)
        ]
        return io.NodeOutput(sheet, masks, report.text, ui=ui.PreviewImage(sheet, cls=cls))
