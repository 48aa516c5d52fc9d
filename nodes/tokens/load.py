"""Load Reference Tokens."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ...easyref_core.tokens.files import SavedTokens, load_tokens
from ..host import folders
from ..host.file_changes import FileChanges
from ..host.socket_types import EasyRefTokens, TokenPair
from ..host.validation import validates_inputs

FILES = FileChanges(lambda file: folders.state_of([folders.find_tokens(file)]))


@validates_inputs
class EasyRefLoadTokens(io.ComfyNode):
    FILE_INPUTS = ("file",)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefLoadTokens",
            display_name="Load Reference Tokens",
            category="EasyRef/tokens",
            description="Reference tokens that Save Reference Tokens kept. They are for the EasyRef checkpoint that made "
            "them; Apply EasyRef refuses those of another.",
            search_aliases=["ip adapter load embeds", "load embeds", "import"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "file",
                    options=folders.token_files(),
                    tooltip="A file in output/easyref or input/easyref. What is in it counts, not its name.",
                )
            ],
            outputs=[
                EasyRefTokens.Output(display_name="tokens", tooltip="For Apply EasyRef."),
                io.String.Output(
                    display_name="prompt",
                    tooltip="The prompt that was read with the references: SDXL should read the same.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None) -> bool | str:
        """In place of the host's own check; None: not known yet, as it comes through a link."""
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
        return io.NodeOutput(pair, saved.conditional.provenance.prompt, ui=preview(saved, cls))


def preview(saved: SavedTokens, node: type[io.ComfyNode]) -> ui.PreviewImage | None:
    """The thumbnails, to be shown on the node; None where the file has none."""
    return ui.PreviewImage(saved.thumbnails.float() / 255, cls=node) if len(saved.thumbnails) else None
