"""Record Where It Acts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..host.socket_types import EasyRefRecordSocket
from ..unet_patch.recording import with_record

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


class EasyRefRecord(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefRecord",
            display_name="Record Where It Acts",
            category="EasyRef/look",
            description="Records how strongly the references act during sampling. Goes between Apply "
            "EasyRef and a sampler; the image stays the same.",
            search_aliases=["record attention", "debug", "ip adapter", "reference"],
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
