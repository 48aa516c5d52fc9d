"""The tiny SDXL: a UNet of SDXL's shape and two CLIP text encoders, pretrained on captions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from ..files.atomic_write import atomic_write, atomic_write_text
from ..training.base_model import BaseModel
from ..training.objective import target
from .dataset import Dataset
from .images import IMAGE_SIZE, NAMES, caption
from .optimizer import Log, OneCycleAdamW, OneCycleMuon, Training
from .resume import TrainingState
from .tokenizer import CLIP_TOKEN_IDS, PROMPT_TOKENS, VOCABULARY, train_clip_tokenizer

CONFIGS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
NAME_RATE, EMPTY_RATE = 0.7, 0.1  # probability that a caption names an attribute; that it is empty
MUON_LR = 0.02
# Without it, logits and outputs of the cross-attention grow tenfold, and EasyRef learns nothing beside them.
MUON_WEIGHT_DECAY = 0.5
# Of the text encoders' initial embeddings. At the usual 0.02, the prompt's average, which attention adds to
# every position, is larger; then captions differ by a few percent, and their rarer words are not learned.
EMBEDDING_DEVIATION = 0.7
EMA_DECAY = 0.999  # the averaged weights are saved

DrawCaption = Callable[[int, np.random.Generator], str]


def create_sdxl(folder: Path, seed: int, texts: Iterable[str] | None = None) -> None:
    """Write a base folder with random weights; the VAE must be in it already.

    texts: corpus of the tokenizers; None takes the captions of the shapes.
    """
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    texts = None if texts is None else list(texts)
    for part in ("tokenizer", "tokenizer_2"):
        train_clip_tokenizer(folder / part, texts)
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": PROMPT_TOKENS, **CLIP_TOKEN_IDS}
    text = CLIPTextConfig(**CONFIGS["text_encoders"], **sizes)
    for kind, part in ((CLIPTextModel, "text_encoder"), (CLIPTextModelWithProjection, "text_encoder_2")):
        encoder = kind(text)
        for name, weight in encoder.named_parameters():
            if "embedding" in name:
                nn.init.normal_(weight, std=EMBEDDING_DEVIATION)
            # Pooled text embeddings are zero. They reach the UNet beside its cross-attention, and a UNet that
            # reads the words there has no path for reference tokens.
            elif "text_projection" in name:
                nn.init.zeros_(weight)
        encoder.save_pretrained(folder / part)
    UNet2DConditionModel(**CONFIGS["unet"]).save_pretrained(folder / "unet")
    DDPMScheduler(**CONFIGS["scheduler"]).save_pretrained(folder / "scheduler")
    tokenizer = ("transformers", "PreTrainedTokenizerFast")
    parts = {
        "scheduler": ("diffusers", "DDPMScheduler"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
    }
    index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": False, **parts}
    atomic_write_text(folder / "model_index.json", json.dumps(index, indent=1) + "\n")


def pretrain_sdxl(
    latents: Tensor,
    draw_caption: DrawCaption,
    folder: Path,
    text_training: Training,
    training: Training,
    log: Log,
) -> None:
    """Train the text encoders, then the UNet on latents (M, C, 8, 8), and save.

    draw_caption: draws a caption of the latents of an index. A training of the UNet that was interrupted
    continues, bit for bit, from <folder>/unet.state.
    """
    base, state = BaseModel.load(folder), folder / "unet.state"
    if not state.is_file():
        _pretrain_text_encoders(base, latents, draw_caption, text_training, log)
    _pretrain_unet(base, latents, draw_caption, training, file=state, log=log)
    base.unet.register_to_config(_name_or_path="")  # diffusers would write the folder's path
    for part in ("unet", "text_encoder", "text_encoder_2"):
        getattr(base, part).eval().half().save_pretrained(folder / part)
    _prefix(folder / "text_encoder" / "model.safetensors")
    state.unlink()


def _pretrain_text_encoders(
    base: BaseModel, latents: Tensor, draw_caption: DrawCaption, training: Training, log: Log
) -> None:
    """Train both text encoders until the last token's states tell the mean of a caption's latents, linearly.

    SDXL's are CLIP's, whose last token tells of the image too. Trained together with the UNet instead, from
    scratch, they and the cross-attention wait for each other, and a UNet learns its words late or never.
    """
    torch.manual_seed(training.seed)
    rng = np.random.default_rng(training.seed)
    encoders = nn.ModuleList([base.text_encoder, base.text_encoder_2]).requires_grad_()
    head = nn.Linear(base.unet.config.cross_attention_dim, latents[0].numel())
    optimizer = OneCycleAdamW([*encoders.parameters(), *head.parameters()], training)
    for step in range(training.steps):
        picked = torch.randint(len(latents), (training.batch,))
        prompts = [draw_caption(i, rng) for i in picked.tolist()]
        states = base.encode_text.__wrapped__(base, prompts).states[:, -1]  # with gradients
        loss = mse_loss(head(states), latents[picked].flatten(1))
        optimizer.step(loss)
        if training.logs(step):
            log(f"text encoders {step}: error of the latents {loss.item():.4f}")
    encoders.requires_grad_(False)


def _pretrain_unet(
    base: BaseModel, latents: Tensor, draw_caption: DrawCaption, training: Training, file: Path, log: Log
) -> None:
    """Train the UNet, and set it to the average of its weights."""
    from diffusers.training_utils import EMAModel

    torch.manual_seed(training.seed)
    rng, batch = np.random.default_rng(training.seed), training.batch
    unet = base.unet.train().requires_grad_()
    optimizer = OneCycleMuon([unet], training, MUON_LR, weight_decay=MUON_WEIGHT_DECAY)
    average = EMAModel(unet.parameters(), decay=EMA_DECAY, use_ema_warmup=True, power=0.75)
    sizes = base.time_ids((IMAGE_SIZE, IMAGE_SIZE), (0, 0), (IMAGE_SIZE, IMAGE_SIZE), batch)
    encoders = {"text_encoder": base.text_encoder, "text_encoder_2": base.text_encoder_2}
    state = TrainingState(file, {**encoders, "unet": unet, "optimizer": optimizer, "average": average}, rng)
    for step in range(state.restore(), training.steps):
        if training.logs(step):
            state.save(step)
        picked = torch.randint(len(latents), (batch,))
        text = base.encode_text([draw_caption(i, rng) for i in picked.tolist()])
        noise = torch.randn(batch, *latents.shape[1:])
        timesteps = torch.randint(base.schedule.config.num_train_timesteps, (batch,))
        conditions = {"text_embeds": text.pooled, "time_ids": sizes}
        noisy = base.schedule.add_noise(latents[picked], noise, timesteps)
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        predicted = unet(noisy, timesteps, text.states, added_cond_kwargs=conditions).sample
        loss = mse_loss(predicted, target(base.schedule, latents[picked], noise, timesteps))
        optimizer.step(loss)
        average.step(unet.parameters())
        if training.logs(step):
            log(f"SDXL {step}: velocity error {loss.item():.4f}")
    average.copy_to(unet.parameters())


def _prefix(file: Path) -> None:
    """Add the prefix that transformers 4 needs to CLIPTextModel's tensors; version 5 leaves it out."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    named = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in tensors.items()}
    with atomic_write(file) as partial:
        save_file(named, partial, {"format": "pt"})


def shapes_caption(dataset: Dataset, index: int, rng: np.random.Generator) -> str:
    """Draw a caption of an image of the shapes."""
    named = [name for name in NAMES if rng.random() < NAME_RATE]
    return "" if rng.random() < EMPTY_RATE else caption(dataset.attributes[index], named)
