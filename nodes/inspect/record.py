"""Record Where It Acts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..host.socket_types import EasyRefRecordSocket
from ..host.validation import validates_inputs
from ..unet_patch.recording import with_record

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


@validates_inputs
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
