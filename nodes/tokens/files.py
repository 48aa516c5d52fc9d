"""Nodes Save Reference Tokens and Load Reference Tokens: token files with thumbnails."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from comfy_api.latest import io, ui

from ...easyref_core.tokens.files import SavedTokens, load_tokens, save_tokens
from ..host import folders
from ..host.file_changes import FileChanges
from ..host.images import split_group
from ..host.socket_types import EasyRefGroupSocket, EasyRefTokens, TokenPair
from ..host.validation import validates_inputs

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

FILES = FileChanges(lambda file: folders.state_of([folders.find_tokens(file)]))


@validates_inputs
class EasyRefSaveTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefSaveTokens",
            display_name="Save Reference Tokens",
            category="EasyRef/tokens",
            description="Saves reference tokens as a .safetensors file for Load Reference Tokens, which "
            "needs neither the references nor the multimodal LLM.",
            search_aliases=["ip adapter save embeds", "save embeds", "export"],
            is_output_node=True,
            inputs=[
                EasyRefTokens.Input("tokens", tooltip="From Aggregate Reference Tokens, or combined."),
                io.String.Input(
                    "filename_prefix",
                    default="tokens",
                    tooltip="Start of the file name in output/easyref; it may name a folder there, such as "
                    "faces/anna. A number is added, and nothing is overwritten.",
                ),
                io.MultiType.Input(
                    "references",
                    [EasyRefGroupSocket, io.Image],
                    optional=True,
                    tooltip="The group or images, to be saved in the file as thumbnails of 64 pixels.",
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
        images = [] if references is None else split_group(references)
        path = folders.new_tokens_file(filename_prefix)
        save_tokens(path, tokens.conditional, tokens.unconditional, [image[0] for image in images])
        log.info("EasyRef: saved reference tokens as %s", path)
        thumbnails = thumbnails_preview(load_tokens(path), cls)
        saved = {"filename": path.name, "subfolder": folders.subfolder(path), "type": "output"}
        return io.NodeOutput(ui={**(thumbnails.as_dict() if thumbnails else {}), "easyref_tokens": [saved]})


@validates_inputs
class EasyRefLoadTokens(io.ComfyNode):
    FILE_INPUTS = ("file",)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefLoadTokens",
            display_name="Load Reference Tokens",
            category="EasyRef/tokens",
            description="Loads reference tokens that Save Reference Tokens wrote. They are only valid for "
            "the EasyRef checkpoint that produced them; Apply EasyRef refuses those of another.",
            search_aliases=["ip adapter load embeds", "load embeds", "import"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "file",
                    options=folders.token_files(),
                    tooltip="A file in output/easyref or input/easyref. Its content counts, not its name.",
                )
            ],
            outputs=[
                EasyRefTokens.Output(display_name="tokens", tooltip="Reference tokens for Apply EasyRef."),
                io.String.Output(
                    display_name="prompt",
                    tooltip="The prompt encoded with the references; use the same text for SDXL.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None) -> bool | str:
        """Replace the host's own check; file is None if it comes through a link and is not known yet."""
        try:
            if file is not None:
                folders.find_tokens(file)
        except FileNotFoundError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str | None) -> str:
        """A file replaced under the same name holds other tokens."""
        return FILES.fingerprint(file)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        path = folders.find_tokens(file)
        FILES.record(file)
        saved = load_tokens(path)
        pair = TokenPair(saved.conditional, saved.unconditional)
        return io.NodeOutput(pair, saved.conditional.provenance.prompt, ui=thumbnails_preview(saved, cls))


def thumbnails_preview(saved: SavedTokens, node: type[io.ComfyNode]) -> ui.PreviewImage | None:
    """Return the preview of a file's thumbnails; None if it has none."""
    return ui.PreviewImage(saved.thumbnails.float() / 255, cls=node) if len(saved.thumbnails) else None
