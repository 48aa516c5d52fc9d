"""Tokenizer of Qwen2-VL, on the library `tokenizers`: the shipped one, or that of an MLLM folder.

The shipped one is that of Qwen2-VL-2B-Instruct, so a checkpoint with its own MLLM, such as the released one,
needs neither an MLLM folder nor files of the host. transformers is not imported.

qwen2_merges.txt is the merges.txt of Qwen2-VL (Alibaba Cloud, Apache-2.0). The vocabulary follows from it:
the 256 bytes in the order of their characters, then the result of each merge, then the special tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.errors import shorten

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

MERGES = Path(__file__).with_name("qwen2_merges.txt")
IMAGE_TOKEN = "<|image_pad|>"
FIRST_SPECIAL_ID = 151643
SPECIAL_TOKENS = (  # of Qwen2-VL, in the order of their ids
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    IMAGE_TOKEN,
    "<|video_pad|>",
)
# Qwen2's pre-tokenizer: contractions, words, single digits, punctuation, line breaks, spaces
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
REMEDY = "The folder needs tokenizer.json, or vocab.json and merges.txt, beside tokenizer_config.json."


def load_tokenizer(folder: Path | None = None) -> Tokenizer:
    """Load the tokenizer of an MLLM folder; None: the shipped one.

    folder: with tokenizer.json, or with vocab.json, merges.txt and tokenizer_config.json.
    Raises ValueError for a folder without one, or with that of another model.
    """
    try:
        tokenizer = _shipped() if folder is None else _read(folder)
    except ImportError as error:
        raise ImportError(
            f"The package tokenizers, which encodes the prompt, cannot be imported ({shorten(error)}). "
            "Install it into the Python that runs this: pip install tokenizers"
        ) from error
    except Exception as error:  # tokenizers raises bare Exceptions for files it cannot read
        remedy = REMEDY if folder else "Install the complete pack again."
        raise ValueError(
            f"No Qwen2-VL tokenizer could be read from {folder or MERGES} ({shorten(error)}). {remedy}"
        ) from error
    if tokenizer.token_to_id(IMAGE_TOKEN) is None:
        raise ValueError(f"The tokenizer in {folder} has no {IMAGE_TOKEN}: it is not Qwen2-VL's. {REMEDY}")
    tokenizer.encode_special_tokens = True  # special tokens inside ordinary text are text
    return tokenizer


def _shipped() -> Tokenizer:
    """The tokenizer of Qwen2-VL-2B-Instruct."""
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    lines = MERGES.read_text(encoding="utf-8").split("\n")[1:-1]  # the first line is the version
    merges = [tuple(line.split(" ")) for line in lines]
    tokens = [*sorted(ByteLevel.alphabet()), *map("".join, merges)]
    return _qwen2(BPE({token: i for i, token in enumerate(tokens)}, merges), special_tokens())


def special_tokens() -> dict[int, dict[str, Any]]:
    """Special tokens of the shipped tokenizer by id, as tokenizer_config.json lists them."""
    options = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {
        FIRST_SPECIAL_ID + i: {"content": token, "special": True} | options
        for i, token in enumerate(SPECIAL_TOKENS)
    }


def _read(folder: Path) -> Tokenizer:
    """The tokenizer of a folder."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    if (file := folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_truncation()  # a setting of the program that saved the file, as is padding
        tokenizer.no_padding()
        return tokenizer
    bpe = BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    return _qwen2(bpe, {int(number): token for number, token in config["added_tokens_decoder"].items()})


def _qwen2(bpe: BPE, added: Mapping[int, Mapping[str, Any]]) -> Tokenizer:
    """A byte-level BPE with Qwen2's pre-tokenizer and added tokens by id."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers

    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(WORDS), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(**added[number]) for number in sorted(added)])
    for number, token in added.items():
        text = token["content"]
        if (by_order := tokenizer.token_to_id(text)) != number:
            raise ValueError(
                f"{text} is token {number} in tokenizer_config.json, and {by_order} after the tokens of "
                "vocab.json: the two files belong to different tokenizers"
            )
    return tokenizer
