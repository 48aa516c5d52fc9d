"""The tiny Qwen2-VL: its sizes, and its pretraining to describe and compare images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..files.atomic_write import atomic_write, atomic_write_text
from ..mllm.config import EasyRefConfig
from ..mllm.group_encoder import GroupEncoder
from ..mllm.instructions import image_token_id, tokenize
from ..mllm.preprocess import patchify, resize
from ..mllm.tokenizer import load_tokenizer
from .dataset import Dataset
from .groups import plan_group
from .images import caption
from .optimizer import Log, OneCycleAdamW, Training
from .tokenizer import COMPARE, DESCRIBE
from .vision_pretraining import pretrain_vision
from .worlds import SHAPES

if TYPE_CHECKING:
    from tokenizers import Tokenizer

IMAGE_TOKENS = 4  # of such an image, and of the black image
IMAGE_GRID = torch.tensor([(1, 4, 4)])  # frames, rows and columns of its patches
MAX_REFERENCES = 6

CONFIG = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
VISION = CONFIG["vision_config"]


def body_config(mllm: Mapping[str, Any] = CONFIG) -> EasyRefConfig:
    """Sizes of an MLLM with all its layers in the GroupEncoder; the sizes of EasyRef's own parts are 0.

    mllm: content of its config.json.
    """
    vision = mllm["vision_config"]
    return EasyRefConfig(
        vocab_size=mllm["vocab_size"],
        hidden_size=mllm["hidden_size"],
        intermediate_size=mllm["intermediate_size"],
        body_layers=mllm["num_hidden_layers"],
        final_layers=0,
        heads=mllm["num_attention_heads"],
        kv_heads=mllm["num_key_value_heads"],
        rms_norm_eps=mllm["rms_norm_eps"],
        rope_theta=mllm["rope_theta"],
        max_positions=mllm["max_position_embeddings"],
        vision_depth=vision["depth"],
        vision_width=vision["embed_dim"],
        vision_mlp_width=vision["embed_dim"] * vision["mlp_ratio"],
        vision_heads=vision["num_heads"],
        patch_size=vision["patch_size"],
        temporal_patch_size=vision["temporal_patch_size"],
        merge_size=vision["spatial_merge_size"],
        num_tokens=0,
        projector_width=0,
        token_width=0,
        lora_rank=0,
    )


def resize_all(images: NDArray[np.uint8], config: EasyRefConfig) -> NDArray[np.uint8]:
    """Resize images (M, 64, 64, 3) for the MLLM, once for the training."""
    return np.stack([np.asarray(resize(Image.fromarray(image), config, SHAPES.size)) for image in images])


def pretrain_qwen2_vl(dataset: Dataset, folder: Path, training: Training, vision: Training, log: Log) -> None:
    """Pretrain the vision tower, then train on answers about groups of the dataset, and save.

    The loss is that of next-token prediction. The tokenizer must be in the folder.
    """
    config, tokenizer = body_config(), load_tokenizer(folder)
    rng = np.random.default_rng(training.seed)
    images = resize_all(dataset.images, config)
    tower = pretrain_vision(dataset, images, config, vision, log)
    torch.manual_seed(training.seed)
    model = initialize(GroupEncoder(config))
    model.visual = tower
    optimizer = OneCycleAdamW(model.parameters(), training)
    image_token = image_token_id(tokenizer)
    for step in range(training.steps):
        count = int(rng.integers(1, MAX_REFERENCES + 1))
        picked, ids, padding_mask, answers = _questions(dataset, tokenizer, rng, training.batch, count)
        patches = patchify(images[picked.reshape(-1)], config)
        grid = IMAGE_GRID.expand(picked.size, -1)
        states = model(patches, grid, ids, image_token, torch.float32, padding_mask=padding_mask)
        logits = states[:, :-1][answers[:, 1:]] @ model.embed_tokens.weight.T
        labels = ids[:, 1:][answers[:, 1:]]
        loss = cross_entropy(logits, labels)
        optimizer.step(loss)
        if training.logs(step):
            accuracy = (logits.argmax(-1) == labels).float().mean().item()
            log(f"Qwen2-VL {step}: loss {loss.item():.4f}, accuracy {accuracy:.4f} ({count} images)")
    save_mllm(folder, model)


def save_mllm(folder: Path, model: GroupEncoder, config: Mapping[str, Any] = CONFIG) -> None:
    """Write config.json with this content, and the weights under transformers' names."""
    from safetensors.torch import save_file

    patch, tensors = model.config.patch_size, {}
    for name, tensor in model.state_dict().items():
        if name == "visual.patch_embed.weight":
            name, tensor = "visual.patch_embed.proj.weight", tensor.unflatten(1, (3, 2, patch, patch))
        tensors[name if name.startswith("visual.") else f"model.{name}"] = tensor.half().contiguous()
    atomic_write_text(folder / "config.json", json.dumps(config, indent=1) + "\n")
    # Written last: the folder is complete if it has this file.
    with atomic_write(folder / "model.safetensors") as partial:
        save_file(tensors, partial, {"format": "pt"})


def initialize(model: GroupEncoder) -> GroupEncoder:
    """Draw small initial weights."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.04)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
    return model


class Questions(NamedTuple):
    """A batch of questions about groups of K images, with their answers."""

    images: NDArray[np.integer]  # (B, K), indices in the dataset
    ids: Tensor  # (B, S), padded on the right
    padding_mask: Tensor  # (B, S), False for padding
    answers: Tensor  # (B, S), True for the tokens of the answer


def _questions(
    dataset: Dataset, tokenizer: Tokenizer, rng: np.random.Generator, batch: int, count: int
) -> Questions:
    images, texts, ends = [], [], []
    for _ in range(batch):
        plan = plan_group(rng, count)
        images.append(dataset.sample(plan.references, rng))
        if count > 1 and rng.random() < 0.5:
            question, answer = COMPARE, caption(plan.target, plan.shared)
        else:
            question, answer = DESCRIBE, ". ".join(caption(image) for image in plan.references)
        question_ids = tokenize(tokenizer, question, [IMAGE_TOKENS] * count)[0]
        answer_ids = tokenizer.encode(answer, add_special_tokens=False).ids
        answer_ids.append(tokenizer.token_to_id("<|im_end|>"))
        texts.append(torch.cat([question_ids, torch.tensor(answer_ids)]))
        ends.append((len(question_ids), len(texts[-1])))
    ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)
    position = torch.arange(ids.shape[1])
    start, end = torch.tensor(ends).T[..., None]
    return Questions(np.stack(images), ids, position < end, (position >= start) & (position < end))
