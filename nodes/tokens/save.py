"""Save Reference Tokens."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from comfy_api.latest import io

from ...easyref_core.tokens.files import load_tokens, save_tokens
from ..host import folders
from ..host.images import references_of
from ..host.socket_types import EasyRefGroupSocket, EasyRefTokens, TokenPair
from ..host.validation import validates_inputs
from .load import preview

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


@validates_inputs
class EasyRefSaveTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefSaveTokens",
            display_name="Save Reference Tokens",
            category="EasyRef/tokens",
            description="Keeps reference tokens as a .safetensors file that Load Reference Tokens finds: then neither "
            "the references nor the multimodal LLM are needed again.",
            search_aliases=["ip adapter save embeds", "save embeds", "export"],
            is_output_node=True,
            inputs=[
                EasyRefTokens.Input("tokens", tooltip="From Aggregate Reference Tokens, or combined."),
                io.String.Input(
                    "filename_prefix",
                    default="tokens",
                    tooltip="Start of the file's name in output/easyref; may name a folder there, such as faces/anna. "
                    "A number is added, and nothing is overwritten.",
                ),
                io.MultiType.Input(
                    "references",
                    [EasyRefGroupSocket, io.Image],
                    optional=True,
                    tooltip="The group or images, to be kept in the file as thumbnails of 64 pixels.",
                ),
            ],
            outputs=[],
        )

    @classmethod
    def execute(
        cls,
        tokens: TokenPair,
        filename_prefix: str,
        references: Tensor | tuple[Tensor, ...] | None = None,
    ) -> io.NodeOutput:
        images = [] if references is None else references_of(references)
        path = folders.new_tokens_file(filename_prefix)
        save_tokens(path, tokens.conditional, tokens.unconditional, [image[0] for image in images])
        log.info("EasyRef: saved reference tokens as %s", path)
        shown = preview(load_tokens(path), cls)
        saved = {"filename": path.name, "subfolder": folders.subfolder(path), "type": "output"}
        return io.NodeOutput(ui={**(shown.as_dict() if shown else {}), "easyref_tokens": [saved]})
