"""What the MLLM is asked: the instruction, Qwen2-VL's chat template, and the token ids they become."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..utils.errors import shorten

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

# The instruction the released model was trained with (the authors' finetune_sdxl.py); the prompt follows it directly.
INSTRUCTION = (
    "Visualize a scene that closely resembles the provided images, "
    "capturing the essence and details described in this prompt:\n"
)
IMAGE_TOKEN = "<|image_pad|>"


def chat(text: str, image_tokens: Sequence[int]) -> list[tuple[str, bool]]:
    """Qwen2-VL's chat template as pieces (text, is it a special token?): all images first, in order, then the text.

    Only pieces marked special become special tokens, so `<|image_pad|>` typed into a prompt stays text.
    image_tokens: how many image tokens each reference has.
    """
    start, end, newline = ("<|im_start|>", True), ("<|im_end|>", True), ("\n", False)
    before, after = ("<|vision_start|>", True), ("<|vision_end|>", True)
    images = [piece for count in image_tokens for piece in (before, *[(IMAGE_TOKEN, True)] * count, after)]
    system = [start, ("system\nYou are a helpful assistant.", False), end, newline]
    user = [start, ("user\n", False), *images, (text, False), end, newline]
    return [*system, *user, start, ("assistant\n", False)]


def tokenize(tokenizer: Tokenizer, text: str, image_tokens: Sequence[int]) -> Tensor:
    """input_ids (1, S) of `text` asked about references of so many image tokens each."""
    require_text(text, "instruction and prompt")
    ids: list[int] = []
    for piece, special in chat(text, image_tokens):
        if special:
            ids.append(_special_id(tokenizer, piece))
        else:
            ids += tokenizer.encode(piece, add_special_tokens=False).ids
    return torch.tensor([ids])


def require_text(text: str, name: str) -> None:
    """Raises TypeError for what is no text, ValueError for half a character: a lone surrogate, which no file and no
    connection can hold either."""
    if not isinstance(text, str):
        raise TypeError(f"The {name} is a {type(text).__name__}; wanted a text. Pass a str.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}: character {error.start + 1}, {text[error.start]!r}, is half of one. "
            "Remove it; it was cut in two where the text was copied."
        ) from error


def image_token_id(tokenizer: Tokenizer) -> int:
    """Id of the placeholder that image features replace."""
    return _special_id(tokenizer, IMAGE_TOKEN)


def image_spans(
    input_ids: Tensor, image_token: int, image_tokens: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Where each reference's image tokens are in input_ids (1, S): first place, and the one after the last."""
    places = (input_ids[0] == image_token).nonzero().flatten().split(list(image_tokens))
    return tuple((int(part[0]), int(part[-1]) + 1) for part in places)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The Qwen2-VL tokenizer in `folder` (any layout transformers reads: tokenizer.json, or vocab.json + merges.txt)."""
    from transformers import AutoTokenizer  # here, because importing transformers takes seconds

    wanted = "The folder needs tokenizer.json, or vocab.json and merges.txt, beside tokenizer_config.json."
    try:
        # trust_remote_code False: left out, transformers may ask on the console whether to run a folder's code
        found = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        tokenizer = found.backend_tokenizer
    except Exception as error:  # tokenizers raises bare Exceptions for files it cannot read
        raise ValueError(
            f"No Qwen2-VL tokenizer could be read from {folder} ({shorten(error)}). {wanted}"
        ) from error
    # Where files are missing, transformers 5 makes an empty one.
    if tokenizer.token_to_id(IMAGE_TOKEN) is None:
        raise ValueError(f"The tokenizer in {folder} has no {IMAGE_TOKEN}: it is not Qwen2-VL's. {wanted}")
    tokenizer.encode_special_tokens = True  # special tokens inside ordinary text are text
    return tokenizer


def _special_id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(
            f"The tokenizer has no token {token!r}: it is not Qwen2-VL's. Choose a Qwen2-VL folder."
        )
    return found
