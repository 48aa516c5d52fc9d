"""Inputs that several nodes have: one definition of what they take and of their bounds."""

from __future__ import annotations

from comfy_api.latest import io

from ...easyref_core import INSTRUCTION, SIZE
from .socket_types import EasyRefGroupSocket


def group_input(tooltip: str) -> io.MultiType.Input:
    """A reference group; an image batch is one too. pictures.references_of takes either apart."""
    return io.MultiType.Input("group", [EasyRefGroupSocket, io.Image], tooltip=tooltip)


def instruction_input(tooltip: str) -> io.String.Input:
    """What the MLLM is told to look for."""
    return io.String.Input("instruction", default=INSTRUCTION, multiline=True, advanced=True, tooltip=tooltip)


def prompt_input(tooltip: str) -> io.String.Input:
    """The prompt that the MLLM reads.

    Without dynamic prompts: the frontend would draw from {a|b} here and once more in the text box of CLIP Text Encode.
    """
    return io.String.Input("prompt", multiline=True, tooltip=tooltip)


def size_input(tooltip: str, advanced: bool | None = True) -> io.Int.Input:
    """Pixels that a reference is read at, in steps of an image token."""
    return io.Int.Input("size", default=SIZE, min=84, max=1008, step=28, advanced=advanced, tooltip=tooltip)
