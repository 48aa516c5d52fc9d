"""Tokenizers of the tiny models: a token for each word of captions and chat template, bytes for the rest."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files.atomic_write import atomic_write_text
from ..mllm.instructions import INSTRUCTION
from .images import NAMES, all_combinations, caption

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Qwen2-VL's special tokens, in its order.
_SPECIAL_NAMES = (
    "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end "
    "vision_start vision_end vision_pad image_pad video_pad"
)
SPECIAL = tuple(f"<|{name}|>" for name in _SPECIAL_NAMES.split())
TEMPLATE = ("system\nYou are a helpful assistant.", "user\n", "assistant\n", "\n", INSTRUCTION)
# Questions of the pretraining; their words are part of the shipped vocabulary.
DESCRIBE, COMPARE = "Describe each picture.", "What do the pictures have in common?"
VOCABULARY = 512  # of the MLLM, special tokens included
PROMPT_TOKENS = 24  # length of the text encoders' input
CLIP_TOKEN_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # of train_clip_tokenizer


def corpus() -> Iterable[str]:
    """Texts in which every word occurs often enough to become a token."""
    rng = np.random.default_rng(0)
    for attributes in rng.permutation(all_combinations()):
        yield caption(attributes)
        yield caption(attributes, rng.permutation(NAMES)[: rng.integers(1, 4)]) + ". "
    yield from [*TEMPLATE, DESCRIBE, COMPARE] * 200


def train_mllm_tokenizer(folder: Path, texts: Iterable[str] | None = None) -> None:
    """Train a byte-level BPE with Qwen2-VL's special tokens and save it for AutoTokenizer."""
    from tokenizers import AddedToken

    tokenizer = _train_bpe(texts, VOCABULARY - len(SPECIAL), [])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    _save(tokenizer, folder, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def train_clip_tokenizer(folder: Path, texts: Iterable[str] | None = None) -> None:
    """Train a tokenizer for CLIP text encoders, with start and end tokens, PROMPT_TOKENS long."""
    from tokenizers.processors import TemplateProcessing

    start, end = "<|startoftext|>", "<|endoftext|>"
    tokenizer = _train_bpe(texts, VOCABULARY, [start, end])
    special = [(token, tokenizer.token_to_id(token)) for token in (start, end)]
    tokenizer.post_processor = TemplateProcessing(single=f"{start} $A {end}", special_tokens=special)
    tokens = {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": end}
    _save(tokenizer, folder, **tokens, model_max_length=PROMPT_TOKENS)


def _train_bpe(texts: Iterable[str] | None, size: int, special: list[str]) -> Tokenizer:
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
    tokenizer.train_from_iterator(corpus() if texts is None else texts, trainer)
    return tokenizer


def _save(tokenizer: Tokenizer, folder: Path, **settings: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    atomic_write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=1) + "\n")
