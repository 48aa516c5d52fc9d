"""Inputs shared by several nodes, each with its default and bounds, and their search words."""

from __future__ import annotations

from comfy_api.latest import io

from ...easyref_core import INSTRUCTION, SIZE
from .socket_types import EasyRefGroupSocket, EasyRefModel

# Search words of Apply and Encode, which should come before the other nodes of the pack. Among nodes that are
# found by an alias alone, the frontend prefers short names and a word that is a whole alias or begins one.
IMAGE_PROMPT_ALIASES = (
    "image prompt",
    "ip adapter",
    "ipadapter",
    "face",
    "character",
    "style",
    "style transfer",
    "qwen",
)


def group_input(tooltip: str) -> io.MultiType.Input:
    """A reference group or an image batch. images.split_group splits either into references."""
    return io.MultiType.Input("group", [EasyRefGroupSocket, io.Image], tooltip=tooltip)


def instruction_input(tooltip: str) -> io.String.Input:
    """The instruction to the MLLM on what to look for."""
    return io.String.Input("instruction", default=INSTRUCTION, multiline=True, advanced=True, tooltip=tooltip)


def model_input(reason: str) -> EasyRefModel.Input:
    """The EasyRef model of nodes whose other input carries one. reason: why it may be left open."""
    return EasyRefModel.Input(
        "easyref",
        optional=True,
        tooltip=f"{reason}. A connected model takes precedence; it must have the same checkpoint.",
    )


def prompt_input(tooltip: str) -> io.String.Input:
    """The prompt for the MLLM.

    Without dynamic prompts, because the frontend would draw from {a|b} here and again in CLIP Text Encode.
    """
    return io.String.Input("prompt", multiline=True, tooltip=tooltip)


def size_input(tooltip: str, advanced: bool | None = True) -> io.Int.Input:
    """The resolution of a reference in pixels.

    The step divides the image tokens of Qwen2-VL (28 pixels) and of the creatures' MLLM (16), because the
    frontend rounds values to it.
    """
    return io.Int.Input("size", default=SIZE, min=56, max=1008, step=4, advanced=advanced, tooltip=tooltip)
