"""Node Load EasyRef: checkpoint and MLLM files -> EASYREF_MODEL."""

from __future__ import annotations

from comfy_api.latest import io

from .host import folders
from .host.file_changes import FileChanges
from .host.hosted_model import PRECISIONS, load_hosted
from .host.socket_types import EasyRefModel
from .host.validation import validates_inputs


def state_of(checkpoint: str, mllm: str) -> str:
    """State of the checkpoint and of the MLLM folder's files; FileNotFoundError if one is missing."""
    folder = folders.find_mllm(mllm)
    # links may be broken
    mllm_files = sorted(file for file in folder.iterdir() if file.exists()) if folder else []
    return folders.state_of([folders.find_checkpoint(checkpoint), *mllm_files])


FILES = FileChanges(state_of)
ATTENTION = {folders.FROM_CHECKPOINT: None, "causal": True, "bidirectional": False}


@validates_inputs
class EasyRefLoader(io.ComfyNode):
    FILE_INPUTS = ("checkpoint", "mllm")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefLoader",
            display_name="Load EasyRef",
            category="EasyRef",
            description="Loads an EasyRef checkpoint: the multimodal LLM that encodes a group of "
            "references, and the layers through which SDXL attends to the result.",
            search_aliases=["ip adapter loader", "reference", "multimodal llm", "load qwen2-vl"],
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=folders.checkpoints(),
                    tooltip="EasyRef checkpoint in models/easyref (.safetensors, or DeepSpeed's .pt). "
                    "The file name does not matter; the tensors in it do.",
                ),
                io.Combo.Input(
                    "mllm",
                    options=[folders.FROM_CHECKPOINT, *folders.mllm_folders()],
                    default=folders.FROM_CHECKPOINT,
                    tooltip="The released checkpoint contains its fine-tuned Qwen2-VL-2B: leave this at "
                    "'from the checkpoint'. A checkpoint without one needs a Qwen2-VL-2B-Instruct folder in "
                    "models/easyref, models/text_encoders or models/LLM.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="auto",
                    tooltip="How the weights are stored. auto: as in the file, computed in bfloat16 where "
                    "the device supports it, else float32. fp8_e4m3fn: about half the memory of bf16, "
                    "slightly different tokens.",
                ),
                io.Combo.Input(
                    "last_layer_attention",
                    options=list(ATTENTION),
                    default=folders.FROM_CHECKPOINT,
                    advanced=True,
                    tooltip="Attention of the MLLM's last layer, which gathers the reference tokens. The "
                    "released model is causal. Change it only for a checkpoint trained otherwise that does "
                    "not say so.",
                ),
            ],
            outputs=[EasyRefModel.Output(display_name="easyref", tooltip="The loaded EasyRef model.")],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str | None) -> bool | str:
        """Check in place of the host's, whose 'value not in list' does not name the file's folder.

        Only of the checkpoint, because the host repeats the result for every input in the signature; the host
        itself compares the MLLM with the list. None: unknown, because it comes through a link.
        """
        try:
            if checkpoint is not None:
                folders.find_checkpoint(checkpoint)
        except FileNotFoundError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str | None, mllm: str | None, **_: str) -> str:
        """Fingerprint of the files, so that the checkpoint is loaded again when they are replaced."""
        return FILES.fingerprint(checkpoint, mllm)

    @classmethod
    def execute(cls, checkpoint: str, mllm: str, precision: str, last_layer_attention: str) -> io.NodeOutput:
        file, folder = folders.find_checkpoint(checkpoint), folders.find_mllm(mllm)
        FILES.record(checkpoint, mllm)
        return io.NodeOutput(load_hosted(file, folder, precision, ATTENTION[last_layer_attention]))
