"""The Qwen2-VL of the creatures, pretrained to tell which creature all images of a group show."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from ...mllm.group_encoder import GroupEncoder
from ...mllm.instructions import image_token_id, load_tokenizer, tokenize
from ...mllm.preprocess import patchify
from ..optimizer import Log, OneCycleAdamW, Training
from ..qwen2_vl import body_config, initialize, save_mllm
from ..tokenizer import COMPARE
from .dataset import Dataset
from .identities import NUMBERS, VARIANCE
from .images import IMAGE_SIZE
from .vision_pretraining import part_errors, pretrain_vision

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONFIG = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
BODY = body_config(CONFIG)
SIZE = 64  # pixels, `size` of preprocess: an image of 64 pixels is not resized
SIDE = IMAGE_SIZE // BODY.patch_size  # patches
IMAGE_GRID = torch.tensor([(1, SIDE, SIDE)])
IMAGE_TOKENS = (SIDE // BODY.merge_size) ** 2  # of an image, and of the black image
MAX_REFERENCES = 4  # of a group in training


def pretrain_qwen2_vl(dataset: Dataset, folder: Path, training: Training, vision: Training, log: Log) -> None:
    """Pretrain the vision tower, then all of the model on groups, and save. The tokenizer must be there.

    The model sees one target, or a group of views, and answers in numbers: a linear map of the last token's
    state gives the identity that all images have in common.
    """
    tokenizer = load_tokenizer(folder)
    rng = np.random.default_rng(training.seed)
    tower = pretrain_vision(dataset, BODY, vision, log)
    torch.manual_seed(training.seed)
    model = initialize(GroupEncoder(BODY))
    model.visual = tower
    head = nn.Linear(BODY.hidden_size, NUMBERS)
    optimizer = OneCycleAdamW([*model.parameters(), *head.parameters()], training)
    questions = {count: question(tokenizer, count) for count in range(1, MAX_REFERENCES + 1)}
    for step in range(training.steps):
        count = int(rng.integers(1, MAX_REFERENCES + 1))
        picked = rng.integers(len(dataset), size=training.batch)
        if count == 1:
            images = dataset.targets[picked]
        else:
            chosen = rng.permuted(np.tile(np.arange(dataset.views.shape[1]), (len(picked), 1)), axis=1)
            images = dataset.views[picked[:, None], chosen[:, :count]].reshape(-1, *dataset.targets.shape[1:])
        states = read_groups(
            model, images, questions[count].expand(len(picked), -1), image_token_id(tokenizer)
        )
        wanted = torch.from_numpy(dataset.identities[picked])
        predicted = head(states[:, -1])
        optimizer.step((predicted - wanted).square().mean() / VARIANCE)
        if training.logs(step):
            errors = ", ".join(
                f"{name} {error:.3f}" for name, error in part_errors(predicted, wanted).items()
            )
            log(f"Qwen2-VL {step}, {count} images: identity errors: {errors}")
    save_mllm(folder, model, CONFIG)


def question(tokenizer: Tokenizer, count: int) -> Tensor:
    """Token ids (1, S) of the question about `count` images."""
    return tokenize(tokenizer, COMPARE, [IMAGE_TOKENS] * count)


def read_groups(model: GroupEncoder, images: np.ndarray, ids: Tensor, image_token: int) -> Tensor:
    """Final states (B, S, D) of groups: images (B K, 64, 64, 3), ids (B, S)."""
    return model(patchify(images, BODY), IMAGE_GRID.expand(len(images), -1), ids, image_token, torch.float32)
