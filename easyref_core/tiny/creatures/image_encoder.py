"""The image encoder of the creatures' IP-Adapter, whose embedding tells which creature is where in an image.

A CLIP learns from captions, and no caption of the creatures names an identity; so this encoder is trained on
the identities themselves, as the vision tower of the MLLM is.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import yaml
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from ...mrbench.methods.clip_pixels import clip_pixels_of
from ..classifier import to_tensor
from ..clip import initialize
from ..optimizer import Log, OneCycleMuon, Training
from .dataset import Dataset
from .identities import NUMBERS, VARIANCE
from .images import IMAGE_SIZE
from .vision_pretraining import MUON_LR, label_tokens, part_errors

CONFIG = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))["vision"]
SIDE = 4  # cells along a side of an image; the embedding tells the creature of each


def pretrain_image_encoder(dataset: Dataset, folder: Path, training: Training, log: Log) -> None:
    """Train the encoder on targets and views, and save it for CLIPVisionModelWithProjection."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(training.seed)
    rng = np.random.default_rng(training.seed)
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**CONFIG)).train()
    initialize(model.vision_model, CONFIG["patch_size"])
    head = nn.ModuleDict({"head": nn.Linear(CONFIG["projection_dim"], SIDE**2 * (1 + NUMBERS))})
    optimizer = OneCycleMuon([model, head], training, MUON_LR)
    kinds = [
        (images, *map(torch.from_numpy, label_tokens(scenes, SIDE)))
        for images, scenes in (
            (dataset.targets, dataset.target_scenes),
            (dataset.views.reshape(-1, *dataset.views.shape[2:]), dataset.view_scenes),
        )
    ]
    for step in range(training.steps):
        images, on, identities = kinds[step % 2]
        picked = rng.integers(len(images), size=training.batch)
        embeds = model(clip_pixels_of(to_tensor(images[picked]), IMAGE_SIZE)).image_embeds
        outputs = head["head"](embeds).unflatten(1, (SIDE**2, -1))
        covered = on[picked]
        predicted, wanted = outputs[..., 1:][covered], identities[picked][covered]
        presence = binary_cross_entropy_with_logits(outputs[..., 0], covered.float())
        optimizer.step(presence + (predicted - wanted).square().mean() / VARIANCE)
        if training.logs(step, every=201):
            errors = part_errors(predicted, wanted)
            told = ", ".join(f"{name} {error:.3f}" for name, error in errors.items())
            log(f"image encoder {step}, {('targets', 'views')[step % 2]}: identity errors: {told}")
    model.eval().save_pretrained(folder)
