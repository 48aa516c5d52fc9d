"""The Qwen2-VL of the creatures, pretrained to describe an image, and to tell what a group has in common."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from ...mllm.group_encoder import GroupEncoder
from ...mllm.instructions import image_token_id, tokenize
from ...mllm.preprocess import patchify
from ...mllm.tokenizer import load_tokenizer
from ..optimizer import Log, OneCycleMuon, Training
from ..qwen2_vl import body_config, initialize, save_mllm
from ..tokenizer import COMPARE, DESCRIBE
from .dataset import Dataset
from .identities import NUMBERS, VARIANCE
from .images import IMAGE_SIZE
from .vision_pretraining import MUON_LR, label_tokens, part_errors, pretrain_vision

CONFIG = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
BODY = body_config(CONFIG)
SIDE = IMAGE_SIZE // BODY.patch_size  # patches
IMAGE_GRID = torch.tensor([(1, SIDE, SIDE)])
IMAGE_TOKENS = (SIDE // BODY.merge_size) ** 2  # of an image, and of the black image
QUARTERS = 2  # of an image, along a side
MAX_REFERENCES = 4  # of a group in training


def pretrain_qwen2_vl(dataset: Dataset, folder: Path, training: Training, vision: Training, log: Log) -> None:
    """Pretrain the vision tower, then all of the model on questions, and save. The tokenizer must be there.

    The model answers in numbers, by a linear map of the last token's state: which identity is in each quarter
    of one view, or which one all images of a group have in common. A group is one target or several views.
    """
    tokenizer = load_tokenizer(folder)
    image_token, rng = image_token_id(tokenizer), np.random.default_rng(training.seed)
    tower = pretrain_vision(dataset, BODY, vision, log)
    torch.manual_seed(training.seed)
    model = initialize(GroupEncoder(BODY))
    model.visual = tower
    heads = nn.ModuleDict({"head": Answers()})
    optimizer = OneCycleMuon([model, heads], training, MUON_LR)
    describe = tokenize(tokenizer, DESCRIBE, [IMAGE_TOKENS])
    questions = {n: tokenize(tokenizer, COMPARE, [IMAGE_TOKENS] * n) for n in range(1, MAX_REFERENCES + 1)}
    for step in range(training.steps):
        count = int(rng.integers(MAX_REFERENCES + 1))  # 0: describe one view
        question = questions[count] if count else describe
        draw = partial(draw_groups, count=count) if count else draw_views
        images, *wanted = draw(dataset, rng, training.batch)
        ids = question.expand(training.batch, -1)
        grid = IMAGE_GRID.expand(len(images), -1)
        states = model(patchify(images, BODY), grid, ids, image_token, torch.float32)[:, -1]
        answer = heads["head"].shared if count else heads["head"].quarters
        loss, predicted, expected = answer(states, *wanted)
        optimizer.step(loss)
        if training.logs(step):
            kind = f"what {count} images share" if count else "each quarter"
            told = ", ".join(
                f"{name} {error:.3f}" for name, error in part_errors(predicted, expected).items()
            )
            log(f"Qwen2-VL {step}: identity errors, {kind}: {told}")
    save_mllm(folder, model, CONFIG)


class Answers(nn.Module):
    """Answers in numbers from the last token's state (B, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.common = nn.Linear(BODY.hidden_size, NUMBERS)
        self.each = nn.Linear(BODY.hidden_size, QUARTERS**2 * (1 + NUMBERS))

    def shared(self, states: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, and predicted and wanted identities (B, 13)."""
        predicted = self.common(states)
        return (predicted - wanted).square().mean() / VARIANCE, predicted, wanted

    def quarters(self, states: Tensor, on: Tensor, identities: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, and predicted and wanted identities (n, 13) of the quarters with a creature.

        on: (B, 4). identities: (B, 4, 13).
        """
        outputs = self.each(states).unflatten(1, (QUARTERS**2, -1))
        presence = binary_cross_entropy_with_logits(outputs[..., 0], on.float())
        predicted, wanted = outputs[..., 1:][on], identities[on]
        return presence + (predicted - wanted).square().mean() / VARIANCE, predicted, wanted


def draw_groups(
    dataset: Dataset, rng: np.random.Generator, batch: int, count: int
) -> tuple[NDArray[np.uint8], Tensor]:
    """Images (B * count, 64, 64, 3) of groups, a target each if count is 1, and identities (B, 13)."""
    picked = rng.integers(len(dataset), size=batch)
    identities = torch.from_numpy(dataset.identities[picked])
    if count == 1:
        return dataset.targets[picked], identities
    views = rng.permuted(np.tile(np.arange(dataset.views.shape[1]), (batch, 1)), axis=1)[:, :count]
    return dataset.views[picked[:, None], views].reshape(-1, *dataset.targets.shape[1:]), identities


def draw_views(
    dataset: Dataset, rng: np.random.Generator, batch: int
) -> tuple[NDArray[np.uint8], Tensor, Tensor]:
    """Views (B, 64, 64, 3), whether each quarter has a creature (B, 4), and its identity (B, 4, 13)."""
    picked = rng.integers(len(dataset.view_scenes), size=batch)
    on, identities = label_tokens(dataset.view_scenes[picked], QUARTERS)
    images = dataset.views.reshape(-1, *dataset.targets.shape[1:])[picked]
    return images, torch.from_numpy(on), torch.from_numpy(identities)
