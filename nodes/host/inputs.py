"""Inputs that several nodes share: one definition of their types and bounds."""

from __future__ import annotations

from comfy_api.latest import io

from ...easyref_core import INSTRUCTION, SIZE
from .socket_types import EasyRefGroupSocket


def group_input(tooltip: str) -> io.MultiType.Input:
    """A reference group or an image batch; images.references_of splits either."""
    return io.MultiType.Input("group", [EasyRefGroupSocket, io.Image], tooltip=tooltip)


def instruction_input(tooltip: str) -> io.String.Input:
    """The instruction of the MLLM, before the prompt."""
    return io.String.Input("instruction", default=INSTRUCTION, multiline=True, advanced=True, tooltip=tooltip)


def prompt_input(tooltip: str) -> io.String.Input:
    """The prompt of the MLLM.

    Without dynamic prompts: the frontend would draw from {a|b} here and again in CLIP Text Encode's text box.
    """
    return io.String.Input("prompt", multiline=True, tooltip=tooltip)


def size_input(tooltip: str, advanced: bool | None = True) -> io.Int.Input:
    """Size in pixels that references are resized to, in steps of an image token."""
    return io.Int.Input("size", default=SIZE, min=84, max=1008, step=28, advanced=advanced, tooltip=tooltip)
