"""The tiny stand-in for CLIP: pictures and captions that belong together, drawn near each other.

It is the image encoder of the tiny IP-Adapter, and what CLIP-I and CLIP-T are measured with on the tiny benchmark.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import cross_entropy, log_softmax, normalize

from ..files.atomic_write import atomic_write_text
from ..mrbench.methods.clip_pixels import clip_pixels_of
from .classifier import to_tensor
from .images import COUNTS, NAMES, PICTURE, caption, every_picture, held_out, render
from .tokenizer import PROMPT_TOKENS, VOCABULARY, train_clip_tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from .dataset import Pool

WIDTH, PROJECTION = 96, 64
PATCH = 16  # pixels
TOWER = {
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "projection_dim": PROJECTION,
}
VISION = TOWER | {"image_size": PICTURE, "patch_size": PATCH}
TEXT = TOWER | {
    "num_hidden_layers": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": PROMPT_TOKENS,
    "bos_token_id": 0,  # these three: words.py's tokenizer
    "eos_token_id": 1,
    "pad_token_id": 1,
}
NAMING = (0.4, 1.0)  # how often a caption names an attribute: least and most
ALIKE = (
    0.3  # how often all pictures of a batch agree in some attributes, so that the others have to be looked at
)
MOST_ALIKE = 3
PLACES = 0.5  # deviation of new position embeddings

# Captions that name one attribute: every value of the first, of the second, ...
SINGLE = [
    caption([value if n == name else 0 for n in NAMES], [name])
    for name, count in zip(NAMES, COUNTS, strict=True)
    for value in range(count)
]


def pretrain_image_encoder(
    pool: Pool, folder: Path, steps: int, batch: int, lr: float, seed: int, log: Callable[[str], None]
) -> dict[str, float]:
    """Train a CLIPModel on the pool and its captions and save it with tokenizer and image processor.

    -> its zero-shot accuracy for each attribute, on pictures it has not seen, held-out combinations among them.
    """
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    train_clip_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=PROJECTION)).train()
    initialise(model.vision_model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        attributes = draw_alike(rng, batch)
        picked = pool.find(attributes, rng)
        named = rng.random((batch, len(NAMES))) < rng.uniform(*NAMING, (batch, 1))
        captions = [
            caption(row, np.array(NAMES)[names]) for row, names in zip(attributes, named, strict=True)
        ]
        scores = similarity(model, tokenizer, to_tensor(pool.pictures[picked]), captions + SINGLE)
        fits = torch.from_numpy(true_of(attributes, attributes, named))
        wanted = torch.from_numpy(attributes)
        single = scores[:, batch:].split(COUNTS, dim=1)
        scores = scores[:, :batch]
        loss = contrastive_loss(scores, fits)
        loss = loss + sum(cross_entropy(part, wanted[:, i]) for i, part in enumerate(single))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=np.log(100))  # CLIP's own bound
        if step % 100 == 0 or step == steps - 1:
            right = fits[torch.arange(batch), scores.argmax(dim=1)].float().mean().item()
            log(f"clip {step}: loss {loss.item():.4f}, nearest caption true {right:.3f}")
    model.eval().save_pretrained(folder)
    save_processor(folder)
    return zero_shot(model, tokenizer, rng)


def initialise(tower: torch.nn.Module) -> None:
    """Weights for a small vision tower: with transformers' own, positions are lost beside the patches for long."""
    for module in tower.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
    torch.nn.init.normal_(tower.embeddings.position_embedding.weight, std=PLACES)
    torch.nn.init.normal_(tower.embeddings.patch_embedding.weight, std=(3 * PATCH**2) ** -0.5)


@torch.no_grad()
def zero_shot(
    model: torch.nn.Module, tokenizer: object, rng: np.random.Generator, count: int = 1024
) -> dict[str, float]:
    """How often, of the captions that name one value of an attribute, the true one is nearest to a new picture."""
    every = every_picture()
    attributes = every[rng.integers(len(every), size=count)]
    pictures = to_tensor(render(attributes, rng))
    scores = torch.cat([similarity(model, tokenizer, part, SINGLE) for part in pictures.split(256)])
    nearest = torch.stack([part.argmax(dim=1) for part in scores.split(COUNTS, dim=1)], dim=1)
    right = (nearest.numpy() == attributes).mean(axis=0)
    return dict(zip(NAMES, right.tolist(), strict=True))


def draw_alike(rng: np.random.Generator, batch: int) -> NDArray[np.integer]:
    """Attributes (batch, 5) that training may see, at times some of them the same in all rows."""
    fixed = rng.permutation(len(NAMES))[: rng.integers(1, MOST_ALIKE + 1)] if rng.random() < ALIKE else []
    while True:
        drawn = rng.integers(COUNTS, size=(4 * batch, len(COUNTS)))
        drawn[:, fixed] = drawn[0, fixed]
        allowed = drawn[~held_out(drawn)]
        if len(allowed) >= batch:
            return allowed[:batch]


def similarity(model: torch.nn.Module, tokenizer: object, pictures: Tensor, captions: list[str]) -> Tensor:
    """Scaled cosines of pictures (N, 3, 64, 64) in -1..1 and M captions, (N, M)."""
    tokens = tokenizer(
        captions, padding="max_length", max_length=PROMPT_TOKENS, truncation=True, return_tensors="pt"
    )
    text = model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
    image = model.vision_model(pixel_values=clip_pixels_of(pictures, PICTURE)).pooler_output
    image, text = (
        normalize(model.visual_projection(image), dim=-1),
        normalize(model.text_projection(text), dim=-1),
    )
    return model.logit_scale.exp() * image @ text.T


def true_of(
    pictures: NDArray[np.integer], captioned: NDArray[np.integer], named: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Which captions are true of which pictures (N, M): what they name (M, 5) agrees. Attributes (N, 5) and (M, 5)."""
    return ((pictures[:, None] == captioned[None]) | ~named[None]).all(axis=-1)


def contrastive_loss(scores: Tensor, fits: Tensor) -> Tensor:
    """CLIP's loss, both ways; where several captions are true of a picture they share its target. (N, N), (N, N)."""

    def one_way(scores: Tensor, fits: Tensor) -> Tensor:
        wanted = fits.float() / fits.sum(dim=1, keepdim=True)
        return -(wanted * log_softmax(scores, dim=1)).sum(dim=1).mean()

    return (one_way(scores, fits) + one_way(scores.T, fits.T)) / 2


def save_processor(folder: Path) -> None:
    """preprocessor_config.json: CLIP's own steps, at the tiny size."""
    import json

    from ..mllm.preprocess import CLIP_MEAN, CLIP_STD

    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": PICTURE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": PICTURE, "width": PICTURE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [round(float(value), 8) for value in CLIP_MEAN],
        "image_std": [round(float(value), 8) for value in CLIP_STD],
    }
    atomic_write_text(folder / "preprocessor_config.json", json.dumps(settings, indent=1) + "\n")
