"""A stage being trained: its models, optimizer and examples, one update, and what it leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import mse_loss

from ..checkpoint.checkpoint import fingerprint, save
from ..inspect.drawing import contact_sheet
from ..mllm.instructions import INSTRUCTION, image_token_id, load_tokenizer, tokenize
from ..mllm.preprocess import preprocess
from ..utils.images import black_image
from .base_model import BaseModel
from .batches import Batch, Examples
from .cache import Cache, contexts, moments
from .config import build
from .examples import RowExamples
from .initial import Weights, from_base, from_checkpoint
from .rows import read_rows
from .sampling import generate_images, references_of, to_images
from .trainable import TrainableEasyRef, tensor_name

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL import Image
    from torch import Tensor

    from ..mllm.config import EasyRefConfig
    from .config import Settings

MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Run:
    """A stage being trained: the models, the optimizer, and the examples."""

    def __init__(
        self, settings: Settings, accelerator: Accelerator, examples: Examples | None = None
    ) -> None:
        """examples: those of settings.data, if None."""
        self.settings, self.accelerator = settings, accelerator
        dtype = MIXED.get(accelerator.mixed_precision, torch.float32)
        self.base = BaseModel.load(settings.base, accelerator.device, dtype)
        self.weights = load_weights(settings, self.base)
        self.examples = examples or load_examples(settings, self.base, self.weights.config)
        self.tokenizer = load_tokenizer(settings.mllm)
        self.model = TrainableEasyRef(
            self.base.unet,
            self.weights,
            settings.what,
            image_token_id(self.tokenizer),
            aggregation=settings.aggregation,
            gradient_checkpointing=settings.gradient_checkpointing,
            frozen_dtype=dtype,
        )
        self.cache = Cache(settings.cache) if settings.cache else None
        if self.cache:
            self.vae_tag = f"vae {fingerprint(self.base.vae.state_dict().items())}"
            if settings.what.body_frozen:
                self.model.store = _context_store(self.cache, self.model)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        _tell_deepspeed(accelerator, settings)
        self.prepared, self.optimizer = accelerator.prepare(self.model, optimizer)

    def loss(self, batch: Batch) -> Tensor:
        """Mean squared error of the predicted noise over one micro-batch."""
        batch = batch.to(self.accelerator.device)
        timesteps, noise, draw = randomness(batch, self.base)
        latents = self.latents(batch, draw)
        noisy = self.base.schedule.add_noise(latents, noise, timesteps)
        predicted = self.prepared(noisy, timesteps, self.base.encode_text(batch.prompts), batch)
        return mse_loss(predicted.float(), noise)

    def latents(self, batch: Batch, draw: Tensor) -> Tensor:
        """The targets' latents (B, 4, h, w): precomputed, or drawn from the VAE's distribution by `draw`."""
        if batch.latents is not None:
            return batch.latents
        if self.cache is None:
            return self.base.encode_pictures(batch.pixels, draw)
        mean, deviation = moments(self.cache, self.vae_tag, batch.pixels, self.base.latent_moments)
        return mean.to(draw.device) + deviation.to(draw.device) * draw

    def update(self, batches: Iterator[Batch], number: int, measure: bool) -> tuple[Tensor, float]:
        """Update number `number` from as many batches as settings.accumulation: mean loss, and the gradients' norm.

        measure: whether to compute the norm where nothing is clipped.
        """
        settings, accelerator = self.settings, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(settings, number)
        total, norm = torch.zeros((), device=accelerator.device), math.nan
        for _ in range(settings.accumulation):
            with accelerator.accumulate(self.prepared):
                loss = self.loss(next(batches))
                accelerator.backward(loss)
                if accelerator.sync_gradients and (settings.clip or measure):
                    found = accelerator.clip_grad_norm_(self.prepared.parameters(), settings.clip or math.inf)
                    norm = math.nan if found is None else found
                self.optimizer.step()
                self.optimizer.zero_grad()
                total += loss.detach() / settings.accumulation
        return total, norm

    def save(self, path: Path) -> None:
        """Write the model as a checkpoint that the nodes and easyref_core.load read."""
        state = self.accelerator.get_state_dict(self.prepared)
        if self.accelerator.is_main_process:
            tensors = {tensor_name(name): tensor for name, tensor in state.items()}
            if self.settings.what.body_frozen and not self.weights.body_is_base:
                encoder = self.model.encoder.state_dict()
                tensors |= {f"encoder.{name}": tensor for name, tensor in encoder.items()}
            dtype = getattr(torch, self.settings.save_dtype)
            stored = {name: tensor.detach().to("cpu", dtype) for name, tensor in tensors.items()}
            save(path, self.weights.config, self.weights.sites, stored)
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def sheet(self) -> Image.Image:
        """Sample pictures: for each of the first examples, what the MLLM sees, the target, and what is painted."""
        model, samples = self.model, self.settings.samples
        rows = {}
        with self.accelerator.autocast():
            empty = model.tokens(self.unconditional().to(self.accelerator.device))
            for number in range(samples.count):
                batch = self.examples.batch(range(number, number + 1)).to(self.accelerator.device)
                tokens, _ = model.padded_tokens(batch)
                # concatenated tokens: attention to one set, said again
                times = tokens.shape[1] // empty.shape[1]
                model.condition(torch.cat([empty.repeat(1, times, 1), tokens]))
                _, noise, draw = randomness(batch, self.base)
                target = self.base.decode(self.latents(batch, draw))
                painted = generate_images(
                    self.base, noise, batch.prompts, samples.negative, samples.guidance, samples.steps
                )
                references = references_of(batch.patches, batch.grid, model.config)
                label = f"{number + 1}: {len(references)} references, target, painted: {batch.prompts[0]}"
                rows[label[:100]] = [*references, *to_images(target), *painted]
        return contact_sheet(rows, cell=128)

    def unconditional(self) -> Batch:
        """The batch of one black reference and the bare instruction."""
        config = self.weights.config
        patches, grid = preprocess([black_image()], config, self.settings.data.augmentation.size)
        ids = tokenize(self.tokenizer, INSTRUCTION, [int(grid.prod()) // config.merge_size**2])
        real = torch.ones_like(ids, dtype=torch.bool)
        none = torch.zeros(1, 6)
        return Batch(
            None, None, ("",), none, patches, grid, (1,), ids, real, torch.zeros(1, dtype=torch.int64)
        )


def learning_rate(settings: Settings, update: int) -> float:
    """The rate of update number `update`, from 0: linear warmup, then constant or down to 0."""
    if update < settings.warmup:
        return settings.learning_rate * (update + 1) / settings.warmup
    left = 1 - (update - settings.warmup) / max(1, settings.updates - settings.warmup)
    factor = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}
    return settings.learning_rate * factor[settings.schedule]


def randomness(batch: Batch, base: BaseModel) -> tuple[Tensor, Tensor, Tensor]:
    """Timesteps (B,), noise and the VAE's draw (B, 4, h, w), each sample's from its seed alone."""
    if batch.latents is not None:
        shape = batch.latents.shape[1:]
    else:
        height, width = batch.pixels.shape[-2:]
        shape = (base.vae.config.latent_channels, height // base.factor, width // base.factor)
    steps, drawn = base.schedule.config.num_train_timesteps, []
    for seed in batch.seeds.tolist():
        # on the CPU, where the same seed gives the same numbers on every machine
        generator = torch.Generator().manual_seed(seed)
        timestep = torch.randint(steps, (), generator=generator)
        drawn.append((timestep, *torch.randn(2, *shape, generator=generator)))
    timesteps, noise, draw = (torch.stack(part).to(base.device) for part in zip(*drawn, strict=True))
    return timesteps, noise, draw


def load_weights(settings: Settings, base: BaseModel) -> Weights:
    """What a run starts from, with a LoRA if its stage trains one."""
    rank = settings.lora_rank if "lora" in settings.what.trains else 0
    sizes = {
        "num_tokens": settings.num_tokens,
        "final_layers": settings.final_layers,
        "causal": settings.causal,
    }
    if settings.start is None:
        return from_base(settings.mllm, base.unet, lora_rank=rank, seed=settings.seed, **sizes)
    weights = from_checkpoint(settings.start, settings.mllm, base.unet, lora_rank=rank, seed=settings.seed)
    for name, wanted in sizes.items():
        if (found := getattr(weights.config, name)) != wanted:
            raise ValueError(
                f"{settings.start} has {name} {found}, the run asks for {wanted}. Set {name}: {str(found).lower()}, "
                "or start from a checkpoint made with the same."
            )
    return weights


def load_examples(settings: Settings, base: BaseModel, config: EasyRefConfig) -> Examples:
    """The examples that settings.data names."""
    data = settings.data
    if data.procedural is not None:
        from ..tiny.examples import ProceduralExamples, ProceduralSettings

        procedural = build(ProceduralSettings, data.procedural, "data.procedural.")
        return ProceduralExamples(base, settings.mllm, procedural, settings.seed)
    rows = read_rows(data.rows, data.root, data.skip_rows, data.thorough)
    return RowExamples(
        rows, data.root, config, load_tokenizer(settings.mllm), data.augmentation, settings.seed
    )


def _context_store(cache: Cache, model: TrainableEasyRef) -> Callable[[Batch], Tensor]:
    """Context states of a batch, kept by content; for a body that is frozen."""
    encoder = model.encoder
    tag = f"context {encoder.norm.weight.dtype} {fingerprint(encoder.state_dict().items())}"
    return lambda batch: contexts(cache, tag, batch, model.context)


def _tell_deepspeed(accelerator: Accelerator, settings: Settings) -> None:
    """DeepSpeed reads the batch size off a dataloader that is prepared with the model; ours is not."""
    if plugin := accelerator.state.deepspeed_plugin:
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = settings.batch_size
        plugin.deepspeed_config["gradient_accumulation_steps"] = settings.accumulation
        plugin.deepspeed_config["gradient_clipping"] = settings.clip or 0.0  # left to itself it clips at 1
