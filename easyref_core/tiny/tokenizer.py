"""The tiny models' tokenizers: every word of the captions and of the chat template is one token, anything else is bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..files.atomic_write import atomic_write_text
from ..mllm.instructions import INSTRUCTION
from .images import NAMES, caption, every_picture

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Qwen2-VL's special tokens, in its order.
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
)
SPECIAL += (
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
)
SPECIAL += ("<|image_pad|>", "<|video_pad|>")
TEMPLATE = ("system\nYou are a helpful assistant.", "user\n", "assistant\n", "\n", INSTRUCTION)
DESCRIBE, COMPARE = "Describe each picture.", "What do the pictures have in common?"  # asked in pretraining
VOCABULARY = 512  # of the MLLM, special tokens included
PROMPT_TOKENS = 16  # the text encoders' length


def corpus() -> Iterable[str]:
    """Texts in which every word occurs often enough to become a token."""
    rng = np.random.default_rng(0)
    for attributes in rng.permutation(every_picture()):
        yield caption(attributes)
        yield caption(attributes, rng.permutation(NAMES)[: rng.integers(1, 4)]) + ". "
    yield from [*TEMPLATE, DESCRIBE, COMPARE] * 200


def train_mllm_tokenizer(folder: Path) -> None:
    """A byte-level BPE with Qwen2-VL's special tokens, as files that AutoTokenizer reads."""
    from tokenizers import AddedToken

    tokenizer = _byte_bpe(VOCABULARY - len(SPECIAL), [])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    atomic_write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=1) + "\n")


def train_clip_tokenizer(folder: Path) -> None:
    """A tokenizer for CLIP text encoders: start and end tokens around lower-case words, PROMPT_TOKENS long."""
    from tokenizers.processors import TemplateProcessing

    start, end = "<|startoftext|>", "<|endoftext|>"
    tokenizer = _byte_bpe(VOCABULARY, [start, end])
    places = [(token, tokenizer.token_to_id(token)) for token in (start, end)]
    tokenizer.post_processor = TemplateProcessing(single=f"{start} $A {end}", special_tokens=places)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": start,
        "eos_token": end,
        "pad_token": end,
        "unk_token": end,
        "model_max_length": PROMPT_TOKENS,
    }
    atomic_write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=1) + "\n")


def _byte_bpe(size: int, special: list[str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer
