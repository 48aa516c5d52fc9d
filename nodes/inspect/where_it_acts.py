"""Nodes Record Where It Acts and Where It Acts: size of the reference term by layer, step and position."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui

from ...easyref_core.inspect.drawing import vstack
from ...easyref_core.inspect.reference_share import share_by_block_and_step, share_masks
from ...easyref_core.inspect.reports import where_it_acts_report
from ..host.images import to_tensor
from ..host.socket_types import EasyRefRecordSocket
from ..host.validation import validates_inputs
from ..unet_patch.recording import with_record

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from torch import Tensor

    from ..unet_patch.recording import Record

SIDES = ("prompt", "negative")


@validates_inputs
class EasyRefRecord(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefRecord",
            display_name="Record Where It Acts",
            category="EasyRef/look",
            description="Records how strongly the references act during sampling. Goes between Apply "
            "EasyRef and a sampler; the image stays the same.",
            search_aliases=["record attention", "debug"],
            inputs=[
                io.Model.Input("model", tooltip="From Apply EasyRef. Later references are not recorded.")
            ],
            outputs=[
                io.Model.Output(tooltip="For one sampler: the record holds its last sampling."),
                EasyRefRecordSocket.Output(display_name="record", tooltip="The record, for Where It Acts."),
            ],
        )

    @classmethod
    def execute(cls, model: ModelPatcher) -> io.NodeOutput:
        return io.NodeOutput(*with_record(model))


@validates_inputs
class EasyRefWhereItActs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefWhereItActs",
            display_name="Where It Acts",
            category="EasyRef/look",
            description="Shows how strong the reference term was relative to the text's attention: in each "
            "block of the UNet and each step, and at each position of the image.",
            search_aliases=["attention map", "debug", "layer weights"],
            is_output_node=True,
            inputs=[
                EasyRefRecordSocket.Input("record", tooltip="The record, from Record Where It Acts."),
                io.MultiType.Input(
                    "sampled",
                    [io.Image, io.Latent],
                    tooltip="The result of sampling with that model; this node waits for it. An image is "
                    "shown under the map.",
                ),
                io.Combo.Input(
                    "side",
                    options=list(SIDES),
                    default=SIDES[0],
                    advanced=True,
                    tooltip="Branch of the guidance to show: the prompt or the negative prompt.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="chart", tooltip="Shares by block and step, and over the image."
                ),
                io.Mask.Output(
                    display_name="places",
                    tooltip="Share over the image: one mask for each Apply node, 1 at its largest.",
                ),
                io.Float.Output(display_name="mean", tooltip="Mean share over blocks and steps."),
                io.String.Output(display_name="report", tooltip="The shares of the blocks as text."),
            ],
        )

    @classmethod
    def execute(cls, record: Record, sampled: Tensor | dict[str, Any], side: str = SIDES[0]) -> io.NodeOutput:
        is_unconditional = side == SIDES[1]
        branches = [
            {
                key: share
                for key, share in recorder.shares().items()
                if key.is_unconditional == is_unconditional
            }
            for recorder in record.recorders
        ]
        if not any(branches):
            raise ValueError(
                f"Nothing was recorded on the side of the {side}. The sampler must use the MODEL of Record "
                "Where It Acts and run after it (change its seed if its result came from the cache); "
                "without guidance (cfg 1) the negative side does not exist."
            )
        images = () if isinstance(sampled, dict) else sampled
        names = [f" of Apply EasyRef {i + 1}" if len(branches) > 1 else "" for i in range(len(branches))]
        recorded = [(shares, name) for shares, name in zip(branches, names, strict=True) if shares]
        reports = [where_it_acts_report(shares, images, name) for shares, name in recorded]
        means = [float(share_by_block_and_step(shares)[2].nanmean()) for shares, _ in recorded]
        chart = to_tensor(vstack([report.image for report in reports]))
        masks = share_masks([shares for shares, _ in recorded])
        text = "\n".join(report.text for report in reports)
        return io.NodeOutput(chart, masks, sum(means) / len(means), text, ui=ui.PreviewImage(chart, cls=cls))
