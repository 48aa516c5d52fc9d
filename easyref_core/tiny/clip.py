"""The tiny CLIP: a contrastive model of the procedural images and their captions.

It is the image encoder of the tiny IP-Adapter, and the model of CLIP-I and CLIP-T in the tiny benchmark.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, normalize

from ..files.atomic_write import atomic_write_text
from ..mrbench.methods.clip_pixels import clip_pixels_of
from .classifier import to_tensor
from .dataset import Dataset
from .images import COUNTS, IMAGE_SIZE, NAMES, all_combinations, caption, held_out, render
from .optimizer import Log, OneCycleAdamW, Training
from .tokenizer import CLIP_TOKEN_IDS, PROMPT_TOKENS, VOCABULARY, train_clip_tokenizer

CONFIGS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
VISION, PROJECTION = CONFIGS["vision"], CONFIGS["vision"]["projection_dim"]
TEXT = CONFIGS["text"] | CLIP_TOKEN_IDS
TEXT |= {"vocab_size": VOCABULARY, "max_position_embeddings": PROMPT_TOKENS}
NAME_RATE = (0.4, 1.0)  # minimum and maximum probability that a caption names an attribute
# Probability that all images of a batch share some attributes, so that the captions differ in the others
# only.
SHARED_RATE = 0.3
MAX_SHARED = 3
POSITION_STD = 0.5  # of new position embeddings

# Captions that name one attribute: every value of the first, of the second, ...
SINGLE = [
    caption([value if n == name else 0 for n in NAMES], [name])
    for name, count in zip(NAMES, COUNTS, strict=True)
    for value in range(count)
]


def pretrain_clip(dataset: Dataset, folder: Path, training: Training, log: Log) -> dict[str, float]:
    """Train a CLIPModel on the dataset and its captions, and save it with tokenizer and image processor.

    Returns the zero-shot accuracy of each attribute on new images, with held-out combinations among them.
    """
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    torch.manual_seed(training.seed)
    rng, batch = np.random.default_rng(training.seed), training.batch
    train_clip_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=PROJECTION)).train()
    initialize(model.vision_model)
    optimizer = OneCycleAdamW(model.parameters(), training)
    for step in range(training.steps):
        attributes = draw_attributes(rng, batch)
        images = to_tensor(dataset.images[dataset.sample(attributes, rng)])
        named = rng.random((batch, len(NAMES))) < rng.uniform(*NAME_RATE, (batch, 1))
        captions = [caption(row, np.array(NAMES)[n]) for row, n in zip(attributes, named, strict=True)]
        logits = similarity(model, tokenizer, images, captions + SINGLE)
        matches = torch.from_numpy(match_captions(attributes, attributes, named))
        labels = torch.from_numpy(attributes)
        loss = contrastive_loss(logits[:, :batch], matches)
        single = logits[:, batch:].split(COUNTS, dim=1)
        loss = loss + sum(cross_entropy(part, labels[:, i]) for i, part in enumerate(single))
        optimizer.step(loss)
        with torch.no_grad():
            model.logit_scale.clamp_(max=np.log(100))  # CLIP's bound
        if training.logs(step):
            nearest = logits[:, :batch].argmax(dim=1)
            accuracy = matches[torch.arange(batch), nearest].float().mean().item()
            log(f"CLIP {step}: loss {loss.item():.4f}, accuracy {accuracy:.3f}")
    model.eval().save_pretrained(folder)
    atomic_write_text(folder / "preprocessor_config.json", json.dumps(CONFIGS["processor"], indent=1) + "\n")
    return zero_shot(model, tokenizer, rng)


def initialize(tower: torch.nn.Module, patch: int = VISION["patch_size"]) -> None:
    """Initialise a small vision tower; with transformers' weights, positions stay weak beside the patches."""
    for module in tower.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
    torch.nn.init.normal_(tower.embeddings.position_embedding.weight, std=POSITION_STD)
    torch.nn.init.normal_(tower.embeddings.patch_embedding.weight, std=(3 * patch**2) ** -0.5)


@torch.no_grad()
def zero_shot(
    model: torch.nn.Module, tokenizer: object, rng: np.random.Generator, count: int = 1024
) -> dict[str, float]:
    """Accuracy of each attribute: the nearest of the captions that name one value, for `count` new images."""
    combinations = all_combinations()
    attributes = combinations[rng.integers(len(combinations), size=count)]
    images = to_tensor(render(attributes, rng))
    logits = torch.cat([similarity(model, tokenizer, part, SINGLE) for part in images.split(256)])
    nearest = torch.stack([part.argmax(dim=1) for part in logits.split(COUNTS, dim=1)], dim=1)
    accuracy = (nearest.numpy() == attributes).mean(axis=0)
    return dict(zip(NAMES, accuracy.tolist(), strict=True))


def draw_attributes(rng: np.random.Generator, batch: int) -> NDArray[np.integer]:
    """Draw attributes (batch, 5) that are not held out; at SHARED_RATE some are the same in all rows."""
    fixed = (
        rng.permutation(len(NAMES))[: rng.integers(1, MAX_SHARED + 1)] if rng.random() < SHARED_RATE else []
    )
    while True:
        drawn = rng.integers(COUNTS, size=(4 * batch, len(COUNTS)))
        drawn[:, fixed] = drawn[0, fixed]
        allowed = drawn[~held_out(drawn)]
        if len(allowed) >= batch:
            return allowed[:batch]


def similarity(model: torch.nn.Module, tokenizer: object, images: Tensor, captions: list[str]) -> Tensor:
    """Scaled cosines of images (N, 3, 64, 64) in -1..1 and M captions, (N, M)."""
    tokens = tokenizer(
        captions, padding="max_length", max_length=PROMPT_TOKENS, truncation=True, return_tensors="pt"
    )
    text = model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
    image = model.vision_model(pixel_values=clip_pixels_of(images, IMAGE_SIZE)).pooler_output
    image = normalize(model.visual_projection(image), dim=-1)
    text = normalize(model.text_projection(text), dim=-1)
    return model.logit_scale.exp() * image @ text.T


def match_captions(
    images: NDArray[np.integer], captions: NDArray[np.integer], named: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """True where a caption is true of an image, (N, M).

    images: attributes (N, 5). captions: attributes (M, 5), of which a caption names those in `named` (M, 5).
    """
    return ((images[:, None] == captions[None]) | ~named[None]).all(axis=-1)


def contrastive_loss(logits: Tensor, matches: Tensor) -> Tensor:
    """CLIP's symmetric loss, (N, N), (N, N); several captions that are true of an image share its target."""

    def one_way(logits: Tensor, matches: Tensor) -> Tensor:
        target = matches.float() / matches.sum(dim=1, keepdim=True)
        return -(target * log_softmax(logits, dim=1)).sum(dim=1).mean()

    return (one_way(logits, matches) + one_way(logits.T, matches.T)) / 2
