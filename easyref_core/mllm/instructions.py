"""The text part of the MLLM's input: instructions, Qwen2-VL's chat template and tokenization."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .tokenizer import IMAGE_TOKEN

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

# Instructions by name and language. Only `general` in English is the text that the released model was trained
# with (the authors' finetune_sdxl.py). The other presets ask for one aspect only; the released model may
# follow them less well. The prompt follows an instruction directly, so each ends in a line break.
PRESETS: dict[str, dict[str, str]] = json.loads(
    Path(__file__).with_name("presets.json").read_text(encoding="utf-8")
)
LANGUAGES = tuple(PRESETS["general"])
INSTRUCTION = PRESETS["general"]["English"]


def chat(text: str, image_tokens: Sequence[int]) -> list[tuple[str, bool]]:
    """Return Qwen2-VL's chat as pieces (text, is_special): all images first, in order, then the text.

    Only pieces marked special become special tokens, so `<|image_pad|>` typed into a prompt stays text.
    image_tokens: number of image tokens of each reference.
    """
    start, end, newline = ("<|im_start|>", True), ("<|im_end|>", True), ("\n", False)
    before, after = ("<|vision_start|>", True), ("<|vision_end|>", True)
    images = [piece for count in image_tokens for piece in (before, *[(IMAGE_TOKEN, True)] * count, after)]
    system = [start, ("system\nYou are a helpful assistant.", False), end, newline]
    user = [start, ("user\n", False), *images, (text, False), end, newline]
    return [*system, *user, start, ("assistant\n", False)]


def tokenize(tokenizer: Tokenizer, text: str, image_tokens: Sequence[int]) -> Tensor:
    """Return input_ids (1, S) of a chat with `text` and references of `image_tokens` tokens each."""
    require_text(text, "instruction and prompt")
    ids: list[int] = []
    special_id = cache(partial(_special_id, tokenizer))  # there is a piece for each image token
    for piece, special in chat(text, image_tokens):
        if special:
            ids.append(special_id(piece))
        else:
            ids += tokenizer.encode(piece, add_special_tokens=False).ids
    return torch.tensor([ids])


def require_text(text: str, name: str) -> None:
    """Raise TypeError unless `text` is a str, ValueError if it contains an unpaired surrogate."""
    if not isinstance(text, str):
        raise TypeError(f"The {name} is a {type(text).__name__}; wanted a text. Pass a str.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} contains an unpaired surrogate ({text[error.start]!r}) at position {error.start + 1}, "
            "probably from a bad copy and paste. Remove it."
        ) from error


def image_token_id(tokenizer: Tokenizer) -> int:
    """Return the id of the placeholder that image features replace."""
    return _special_id(tokenizer, IMAGE_TOKEN)


def image_spans(
    input_ids: Tensor, image_token: int, image_tokens: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Return start and end (exclusive) of each reference's image tokens in input_ids (1, S)."""
    positions = (input_ids[0] == image_token).nonzero().flatten().split(list(image_tokens))
    return tuple((int(run[0]), int(run[-1]) + 1) for run in positions)


def _special_id(tokenizer: Tokenizer, token: str) -> int:
    number = tokenizer.token_to_id(token)
    if number is None:
        raise ValueError(
            f"The tokenizer has no token {token!r}: it is not Qwen2-VL's. Choose a Qwen2-VL folder."
        )
    return number
