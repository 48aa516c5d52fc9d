"""Record Where It Acts and Where It Acts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui

from ...easyref_core.inspect.drawing import vstack
from ...easyref_core.inspect.reference_share import share_by_block_and_step, share_masks
from ...easyref_core.inspect.reports import where_it_acts_report
from ..host.images import image_of, pictures_of
from ..host.socket_types import EasyRefRecordSocket
from ..unet_patch.recording import with_record

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from torch import Tensor

    from ..unet_patch.recording import Record

SIDES = ("prompt", "negative")


class EasyRefRecord(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefRecord",
            display_name="Record Where It Acts",
            category="EasyRef/look",
            description="Between Apply EasyRef and a sampler: remembers how strongly the references act while it samples. "
            "The picture stays the same.",
            search_aliases=["record attention", "debug", "ip adapter", "reference"],
            inputs=[
                io.Model.Input("model", tooltip="From Apply EasyRef. What is applied after is not recorded.")
            ],
            outputs=[
                io.Model.Output(tooltip="To one sampler: the record is of the last sampling with it."),
                EasyRefRecordSocket.Output(display_name="record", tooltip="To Where It Acts."),
            ],
        )

    @classmethod
    def execute(cls, model: ModelPatcher) -> io.NodeOutput:
        return io.NodeOutput(*with_record(model))


class EasyRefWhereItActs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefWhereItActs",
            display_name="Where It Acts",
            category="EasyRef/look",
            description="How strong the reference term was beside the text's attention: in each block of the UNet and "
            "each step, and at each place of the picture.",
            search_aliases=["attention map", "debug", "layer weights", "ip adapter", "reference"],
            is_output_node=True,
            inputs=[
                EasyRefRecordSocket.Input("record", tooltip="From Record Where It Acts."),
                io.MultiType.Input(
                    "sampled",
                    [io.Image, io.Latent],
                    tooltip="What was sampled with that model, so that this waits for it. An image is shown under the map.",
                ),
                io.Combo.Input(
                    "side",
                    options=list(SIDES),
                    default=SIDES[0],
                    advanced=True,
                    tooltip="Which side of the guidance: where the prompt is read, or the negative prompt.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="chart", tooltip="Blocks and steps, and the places of the picture."
                ),
                io.Mask.Output(
                    display_name="places",
                    tooltip="Where it acts most: one mask for each Apply node, 1 at its largest share.",
                ),
                io.Float.Output(display_name="mean", tooltip="Mean share over blocks and steps."),
                io.String.Output(display_name="report", tooltip="The shares of the blocks in words."),
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
        images = [] if isinstance(sampled, dict) else pictures_of(sampled)
        names = [f" of Apply EasyRef {i + 1}" if len(branches) > 1 else "" for i in range(len(branches))]
        recorded = [(shares, name) for shares, name in zip(branches, names, strict=True) if shares]
        reports = [where_it_acts_report(shares, images, name) for shares, name in recorded]
        means = [float(share_by_block_and_step(shares)[2].nanmean()) for shares, _ in recorded]
        chart = image_of(vstack([report.image for report in reports]))
        masks = share_masks([shares for shares, _ in recorded])
        text = "\n".join(report.text for report in reports)
        return io.NodeOutput(chart, masks, sum(means) / len(means), text, ui=ui.PreviewImage(chart, cls=cls))
