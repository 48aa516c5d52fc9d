"""The tiny Qwen2-VL: a tower that has learnt to see, then all of it: to describe pictures and say what they share."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ..files.atomic_write import atomic_write, atomic_write_text
from ..mllm.config import EasyRefConfig
from ..mllm.group_encoder import GroupEncoder
from ..mllm.instructions import image_token_id, load_tokenizer, tokenize
from ..mllm.preprocess import patchify, resize
from .dataset import Pool
from .groups import plan_group
from .images import caption
from .tokenizer import COMPARE, DESCRIBE, VOCABULARY
from .vision_pretraining import pretrain_sight

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Tokenizer
    from torch import Tensor

SIZE = 84  # pixels, preprocess's `size`: a picture of 64 pixels stays as it is, four image tokens
IMAGE_TOKENS = 4  # the black picture's too
IMAGE_GRID = torch.tensor([(1, 4, 4)])  # of such a picture: frames, rows, columns in patches
LARGEST_GROUP = 6

# Sizes of the MLLM's config.json. `layers` there are all decoder layers; EasyRef takes the last one as its own.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
}
VISION = {
    "depth": 2,
    "embed_dim": 64,
    "mlp_ratio": 2,
    "num_heads": 4,
    "patch_size": 16,  # four by four patches of a picture: with smaller ones a shape is learnt more slowly
    "spatial_merge_size": 2,
}


def config_json() -> dict:
    """config.json of the MLLM folder."""
    quarter = SIZES["hidden_size"] // SIZES["num_attention_heads"] // 8
    rope = {"type": "mrope", "mrope_section": [2 * quarter, quarter, quarter]}
    vision = VISION | {"hidden_size": SIZES["hidden_size"], "in_chans": 3, "model_type": "qwen2_vl"}
    vision |= {"temporal_patch_size": 2, "spatial_patch_size": VISION["patch_size"]}
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "tie_word_embeddings": True,
        "bos_token_id": None,  # transformers' defaults are the large vocabulary's
        "eos_token_id": None,
        "hidden_act": "silu",
        "rope_scaling": rope,
        **SIZES,
        "vision_config": vision,
    }


def body_config() -> EasyRefConfig:
    """All layers of the MLLM as one GroupEncoder; what EasyRef adds has no size yet."""
    return EasyRefConfig(
        vocab_size=SIZES["vocab_size"],
        hidden_size=SIZES["hidden_size"],
        intermediate_size=SIZES["intermediate_size"],
        body_layers=SIZES["num_hidden_layers"],
        final_layers=0,
        heads=SIZES["num_attention_heads"],
        kv_heads=SIZES["num_key_value_heads"],
        rms_norm_eps=SIZES["rms_norm_eps"],
        rope_theta=SIZES["rope_theta"],
        max_positions=SIZES["max_position_embeddings"],
        vision_depth=VISION["depth"],
        vision_width=VISION["embed_dim"],
        vision_mlp_width=VISION["embed_dim"] * VISION["mlp_ratio"],
        vision_heads=VISION["num_heads"],
        patch_size=VISION["patch_size"],
        temporal_patch_size=2,
        merge_size=VISION["spatial_merge_size"],
        num_tokens=0,
        projector_width=0,
        token_width=0,
        lora_rank=0,
    )


def prepared(pictures: NDArray[np.uint8], config: EasyRefConfig) -> NDArray[np.uint8]:
    """Pictures (M, 64, 64, 3) as the MLLM sees them, in bytes: preprocess.resize, done once."""
    from PIL import Image

    return np.stack([np.asarray(resize(Image.fromarray(picture), config, SIZE)) for picture in pictures])


def pretrain_reader(
    pool: Pool,
    folder: Path,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    sight: Mapping[str, Any],
    log: Callable[[str], None],
) -> None:
    """Train on answers about groups of the pool, next token by next token, and save; the tokenizer must be there.

    sight: what pretrain_sight is called with, before.
    """
    config, tokenizer = body_config(), load_tokenizer(folder)
    rng = np.random.default_rng(seed)
    seen = prepared(pool.pictures, config)
    tower = pretrain_sight(pool, seen, config, log=log, **sight)
    torch.manual_seed(seed)
    model = _initialised(config)
    model.visual = tower
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    image_token = image_token_id(tokenizer)
    for step in range(steps):
        count = int(rng.integers(1, LARGEST_GROUP + 1))
        picked, ids, real, answers = _questions(pool, tokenizer, rng, batch, count)
        patches = patchify(seen[picked.reshape(-1)], config)
        grid = IMAGE_GRID.expand(picked.size, -1)
        states = model(patches, grid, ids, image_token, torch.float32, padding_mask=real)
        logits = states[:, :-1][answers[:, 1:]] @ model.embed_tokens.weight.T
        wanted = ids[:, 1:][answers[:, 1:]]
        loss = cross_entropy(logits, wanted)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            right = (logits.argmax(-1) == wanted).float().mean().item()
            log(f"reader {step}: loss {loss.item():.4f}, tokens right {right:.4f} ({count} pictures)")
    save_mllm(folder, model)


def save_mllm(folder: Path, model: GroupEncoder) -> None:
    """Write config.json and weights under transformers' names."""
    from safetensors.torch import save_file

    patch, tensors = model.config.patch_size, {}
    for name, tensor in model.state_dict().items():
        if name == "visual.patch_embed.weight":
            name, tensor = "visual.patch_embed.proj.weight", tensor.unflatten(1, (3, 2, patch, patch))
        tensors[name if name.startswith("visual.") else f"model.{name}"] = tensor.half().contiguous()
    atomic_write_text(folder / "config.json", json.dumps(config_json(), indent=1) + "\n")
    with atomic_write(
        folder / "model.safetensors"
    ) as partial:  # last: by it the folder is known to be complete
        save_file(tensors, partial, {"format": "pt"})


def _initialised(config: EasyRefConfig) -> GroupEncoder:
    model = GroupEncoder(config)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.04)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
    return model


def _questions(
    pool: Pool, tokenizer: Tokenizer, rng: np.random.Generator, batch: int, count: int
) -> tuple[NDArray[np.integer], Tensor, Tensor, Tensor]:
    """Pictures (B, K) of the pool, ids (B, S) padded on the right, which are real, and which are the answer."""
    picked, questions, lengths = [], [], []
    for _ in range(batch):
        plan = plan_group(rng, count)
        picked.append(pool.find(plan.references, rng))
        if count > 1 and rng.random() < 0.5:
            question, answer = COMPARE, caption(plan.target, plan.shared)
        else:
            question, answer = DESCRIBE, ". ".join(caption(picture) for picture in plan.references)
        asked = tokenize(tokenizer, question, [IMAGE_TOKENS] * count)[0]
        told = tokenizer.encode(answer, add_special_tokens=False).ids + [tokenizer.token_to_id("<|im_end|>")]
        questions.append(torch.cat([asked, torch.tensor(told)]))
        lengths.append((len(asked), len(questions[-1])))
    ids = nn.utils.rnn.pad_sequence(questions, batch_first=True)
    place = torch.arange(ids.shape[1])
    start, end = torch.tensor(lengths).T[..., None]
    return np.stack(picked), ids, place < end, (place >= start) & (place < end)
