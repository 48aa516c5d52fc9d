"""One stage in training: models, optimizer, LR schedule, data set lookup, noise, loss, sample sheets."""

from __future__ import annotations

import logging
import math
import pkgutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint.checkpoint import fingerprint, save
from ..inspect.drawing import contact_sheet
from ..mllm.instructions import INSTRUCTION, image_token_id, tokenize
from ..mllm.preprocess import preprocess
from ..mllm.tokenizer import load_tokenizer
from ..utils.finite import require_finite
from ..utils.images import black_image
from .base_model import BaseModel, Text
from .batches import Batch, Examples, LoadExamples
from .broken_rows import BrokenRows
from .cache import TensorCache, cached_contexts, cached_moments
from .ema import EMA
from .initial import MLLM_LORA_PREFIX, Weights, fresh_mllm_lora, from_base, from_checkpoint, merge_mllm_lora
from .memory import require_memory
from .objective import denoising_loss
from .optimizers import make_optimizer
from .precomputed import PARTS, provenance, read_manifest, require_provenance
from .sampling import generate_images, to_images, unpatchify
from .sharding import callable_submodules, disable_zero3_init, local_part, sharding_of, whole_tensor
from .trainable import TrainableEasyRef, tensor_name

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL import Image
    from torch import Tensor

    from .config import Settings

log = logging.getLogger(__name__)

NOT_FINITE_REMEDY = (
    "The last good saved state remains and nothing was exported. Lower learning_rate, set clip to 1.0, or "
    "train with mixed precision bf16 instead of fp16, then start again."
)
EXPORT_REMEDY = "Set save_dtype to bfloat16 or float32, then start again; the saved state remains."

MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}

# Functions (settings) -> LoadExamples, by the key that is set under `data`. They are named and not imported,
# because the tiny model's data set is built on this package.
DATASETS = {
    "rows": "easyref_core.training.examples:open_rows",
    "stream": "easyref_core.training.stream:open_stream",
    "procedural": "easyref_core.tiny.examples:open_procedural",
}


class Run:
    """One stage in training.

    Args:
        settings: the stage.
        accelerator: places the models; its mixed precision is the dtype of all frozen weights.
        examples: the data set, or a function that loads it; None opens the one of settings.data.
    """

    def __init__(
        self, settings: Settings, accelerator: Accelerator, examples: Examples | LoadExamples | None = None
    ) -> None:
        self.settings, self.accelerator = settings, accelerator
        examples = open_dataset(settings) if examples is None else examples
        dtype = frozen_dtype(accelerator)
        stored = read_manifest(settings.precomputed)["parts"] if settings.precomputed else {}
        parked = [model for part in stored for model in PARTS[part]]
        options = {"config": settings.base_config}
        disable_zero3_init(accelerator)
        self.base = BaseModel.load(settings.base, accelerator.device, dtype, parked, **options)
        self.weights = load_weights(settings, self.base)
        if settings.precomputed:
            require_provenance(settings.precomputed, provenance(settings, self.base, self.weights, dtype))
        self.examples = examples(self.base, self.weights.config) if callable(examples) else examples
        _require_memory(settings, accelerator, self.base, self.weights, self.examples)
        self.broken_rows = BrokenRows(accelerator, settings.data.max_broken)
        self.tokenizer = load_tokenizer(settings.mllm)
        self.model = TrainableEasyRef(
            self.base.unet,
            self.weights,
            settings.stage_spec,
            image_token_id(self.tokenizer),
            aggregation=settings.aggregation,
            gradient_checkpointing=settings.gradient_checkpointing,
            frozen_dtype=dtype,
            body_device="cpu" if "contexts" in stored else None,
        )
        self.latent_moments, self.contexts = self.base.latent_moments, None
        if settings.cache:
            cache = TensorCache(settings.cache)
            tag = f"vae {fingerprint(self.base.vae.state_dict().items())}"
            self.latent_moments = partial(cached_moments, cache, tag, self.base.latent_moments)
            if settings.stage_spec.body_frozen and settings.aggregation == "easyref":
                encoder = self.model.encoder
                tag = f"context {encoder.norm.weight.dtype} {fingerprint(encoder.state_dict().items())}"
                self.contexts = partial(cached_contexts, cache, tag, self.model.context)
        _cast_trained(self.model, settings.weight_dtype, accelerator.mixed_precision)
        trained = (parameter for parameter in self.model.parameters() if parameter.requires_grad)
        optimizer = make_optimizer(settings, trained)
        configure_deepspeed(accelerator, settings)
        self.prepared, self.optimizer = accelerator.prepare(self.model, optimizer)
        self.ema = None
        if settings.ema:
            _require_ema(accelerator)
            parameters = self.prepared.parameters()
            self.ema = EMA(parameters, settings.ema, main=accelerator.is_main_process)
            accelerator.register_for_checkpointing(self.ema)

    def loss(self, batch: Batch, timesteps: Tensor | None = None) -> Tensor:
        """The base's denoising loss over one micro-batch. timesteps: (B,), None draws them."""
        batch = batch.to(self.accelerator.device)
        drawn, noise, vae_noise = randomness(batch, self.base)
        timesteps = drawn if timesteps is None else timesteps
        latents = self.latents(batch, vae_noise)
        text, context = self.text(batch), self.context(batch)

        def predict(noisy: Tensor) -> Tensor:
            return self.prepared(noisy, timesteps, text, batch, context)

        return denoising_loss(self.base.schedule, latents, noise, timesteps, predict)

    def latents(self, batch: Batch, vae_noise: Tensor) -> Tensor:
        """The targets' latents (B, 4, h, w): precomputed, or drawn from the VAE's distribution.

        vae_noise: standard normal, (B, 4, h, w).
        """
        if batch.latents is not None:
            return batch.latents
        if batch.moments is not None:
            mean, deviation = batch.moments
        else:
            mean, deviation = self.latent_moments(batch.pixels)
        return mean.to(vae_noise.device) + deviation.to(vae_noise.device) * vae_noise

    def text(self, batch: Batch) -> Text:
        """Text conditioning of the prompts: precomputed, or of the text encoders."""
        if batch.text_states is not None:
            return Text(batch.text_states, batch.text_pooled)
        return self.base.encode_text(batch.prompts)

    def context(self, batch: Batch) -> Tensor | None:
        """Context states (B, S, D): precomputed, or from the cache; None if the run has neither."""
        if batch.context is not None or self.contexts is None:
            return batch.context
        with self.accelerator.autocast():  # as in the model's own forward pass
            return self.contexts(batch)

    def update(self, batches: Iterator[Batch], number: int, measure: bool) -> tuple[Tensor, float]:
        """Run one optimizer update over settings.accumulation micro-batches.

        number: of the update, from 0. measure: compute the gradients' norm even if they are not clipped.
        Returns the mean loss and the norm (NaN if not computed).
        """
        settings, accelerator = self.settings, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(settings, number)
        total, norm = torch.zeros((), device=accelerator.device), math.nan
        for _ in range(settings.accumulation):
            with accelerator.accumulate(self.prepared):
                batch = next(batches)
                self.broken_rows.add(batch.broken)
                loss = self.loss(batch)
                accelerator.backward(loss)
                if accelerator.sync_gradients and (settings.clip or measure):
                    norm = accelerator.clip_grad_norm_(self.prepared.parameters(), settings.clip or math.inf)
                    norm = math.nan if norm is None else whole_tensor(norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
                total += loss.detach() / settings.accumulation
        if self.ema:
            self.ema.update()
        return total, norm

    def require_finite(self, what: str, values: Any, where: str, remedy: str = NOT_FINITE_REMEDY) -> None:
        """Raise NotFiniteError in all processes if a value of any process is NaN or infinite."""

        def total(count: int) -> int:
            return int(self.accelerator.reduce(torch.tensor(float(count), device=self.accelerator.device)))

        require_finite(what, values, where, remedy, total)

    def require_finite_weights(self, done: int) -> None:
        """Raise NotFiniteError if a trained weight is NaN or infinite after `done` updates."""
        trained = [local_part(p).detach() for p in self.prepared.parameters() if p.requires_grad]
        self.require_finite("a trained weight", trained, f"{self.settings.stage}, after {done} updates")

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Context of forward passes without training, with the weights and models that they need."""
        with self.averaged(), callable_submodules(self.accelerator, self.prepared), self.resident():
            yield

    def averaged(self) -> AbstractContextManager[None]:
        """Context in which the trained weights are their moving average, if the run has one."""
        return self.ema.applied() if self.ema else nullcontext()

    def save(self, path: Path, raw: bool = False) -> None:
        """Write the model as a checkpoint for the nodes and easyref_core.load.

        raw: the trained weights in place of their moving average.
        Raises NotFiniteError, and writes nothing, if a value is not finite in settings.save_dtype.
        """
        with nullcontext() if raw else self.averaged():
            self._save(path)

    def _save(self, path: Path) -> None:
        state = self.accelerator.get_state_dict(self.prepared)
        tensors = {}
        if self.accelerator.is_main_process:
            tensors = {tensor_name(name): tensor for name, tensor in state.items()}
            lora = {name: tensors.pop(name) for name in list(tensors) if name.startswith(MLLM_LORA_PREFIX)}
            if lora:
                tensors |= merge_mllm_lora(self.weights.tensors, lora)
            elif self.settings.stage_spec.body_frozen and not self.weights.body_is_base:
                encoder = self.model.encoder.state_dict()
                tensors |= {f"encoder.{name}": tensor for name, tensor in encoder.items()}
            dtype = getattr(torch, self.settings.save_dtype)
            tensors = {name: tensor.detach().to("cpu", dtype) for name, tensor in tensors.items()}
        where = f"{self.settings.stage}, checkpoint in {self.settings.save_dtype}"
        self.require_finite("a weight", tensors, where, EXPORT_REMEDY)
        if self.accelerator.is_main_process:
            save(path, self.weights.config, self.weights.sites, tensors)
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Restore the base's UNet and free the accelerator's memory."""
        self.model.attachment.remove()
        self.accelerator.free_memory()

    @torch.no_grad()
    def sample_sheet(self) -> Image.Image:
        """Sheet of the first examples: references at the MLLM's size, target, generated image.

        With sharded weights every process must call it.
        """
        model, samples = self.model, self.settings.samples
        options = {name: getattr(samples, name) for name in ("negative", "guidance", "steps")}
        rows = {}
        with self.accelerator.autocast(), self.evaluating():
            empty = self.unconditional_tokens()
            for number in range(samples.count):
                batch = self.examples.batch(range(number, number + 1)).to(self.accelerator.device)
                tokens = model.tokens(batch, self.context(batch))
                self.condition(tokens, empty)
                _, noise, vae_noise = randomness(batch, self.base)
                target = self.base.decode(self.latents(batch, vae_noise))
                images = generate_images(self.base, noise, batch.prompts, **options)
                # with precomputed context states the references are not read
                grid = batch.grid if batch.context is None else batch.grid[:0]
                references = unpatchify(batch.patches, grid, model.config)
                label = f"{number + 1}: {len(references)} references, target, generated: {batch.prompts[0]}"
                rows[label[:100]] = [*references, *to_images(target), *images]
        return contact_sheet(rows, cell=128)

    @contextmanager
    def resident(self) -> Iterator[None]:
        """Put the models that the precomputed parts replace on the device, and back at the end."""
        encoder, device = self.model.encoder, self.accelerator.device
        home = encoder.norm.weight.device
        parked = [encoder] if home.type != device.type else []
        with self.base.resident(*self.base.parked):
            try:
                for model in parked:
                    model.to(device)
                yield
            finally:
                for model in parked:
                    model.to(home)

    def unconditional_tokens(self) -> Tensor:
        """Reference tokens (1, T, C) of the black image and the instruction without a prompt."""
        return self.reference_tokens([black_image()], "")

    def reference_tokens(self, references: Sequence[Image.Image], prompt: str) -> Tensor:
        """Reference tokens (1, T, C) of a group and a prompt, (1, K T, C) with aggregation concatenation."""
        config = self.weights.config
        patches, grid = preprocess(references, config, self.settings.data.augmentation.size)
        counts = (grid.prod(dim=1) // config.merge_size**2).tolist()
        ids = tokenize(self.tokenizer, INSTRUCTION + prompt, counts)
        batch = Batch(
            prompts=(prompt,),
            time_ids=torch.zeros(1, 6),
            patches=patches,
            grid=grid,
            references=(len(references),),
            input_ids=ids,
            padding_mask=torch.ones_like(ids, dtype=torch.bool),
            seeds=torch.zeros(1, dtype=torch.int64),
        )
        return self.model.tokens(batch.to(self.accelerator.device))

    def condition(self, tokens: Tensor, empty: Tensor) -> None:
        """Condition the UNet for guidance: `empty` (1, T, C) on the unconditional rows, then `tokens`.

        tokens: (rows, k T, C). Attention to k copies of the empty tokens is attention to one copy.
        """
        copies = tokens.shape[1] // empty.shape[1]
        self.model.condition(torch.cat([empty.repeat(len(tokens), copies, 1), tokens]))


def frozen_dtype(accelerator: Accelerator) -> torch.dtype:
    """The dtype of all frozen weights but the VAE's."""
    return MIXED.get(accelerator.mixed_precision, torch.float32)


def _require_memory(
    settings: Settings, accelerator: Accelerator, base: BaseModel, weights: Weights, examples: Any
) -> None:
    """Compare the run's memory with the device's; sharded weights are not counted."""
    from accelerate.utils import DistributedType

    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        log.warning("Memory is not checked, because %s shards weights.", accelerator.distributed_type.value)
    elif examples:
        require_memory(settings, base, weights, getattr(examples, "max_references", None))


def _require_ema(accelerator: Accelerator) -> None:
    """Raise ValueError for sharded weights that a moving average cannot follow."""
    if (sharding := sharding_of(accelerator)) in ("fsdp1", "zero3"):
        raise ValueError(
            f"ema is set, but {sharding} hides the trained weights from it. Use FSDP2 or ZeRO-2, or set ema "
            "to null."
        )


def _cast_trained(model: TrainableEasyRef, dtype: str, mixed_precision: str) -> None:
    """Cast the trained weights. Raises ValueError for bfloat16 where the computation is in another dtype."""
    if dtype == "float32":
        return
    if mixed_precision != "bf16":
        raise ValueError(
            f"weight_dtype is bfloat16 with mixed precision {mixed_precision!r}, expected 'bf16'. Start with "
            "accelerate launch --mixed_precision bf16, or set weight_dtype to float32."
        )
    log.warning(
        "weight_dtype bfloat16: an update of less than about 1/256 of a weight is lost to rounding. Prefer "
        "float32 with optimizer adamw_8bit or adafactor where it fits."
    )
    model.to(torch.bfloat16)


def open_dataset(settings: Settings) -> LoadExamples:
    """Check the data set of settings.data, before a model is loaded, and return the function that loads it.

    Raises FileNotFoundError or ValueError for data that cannot be trained on.
    """
    kind = next(key for key in DATASETS if getattr(settings.data, key) is not None)
    return pkgutil.resolve_name(DATASETS[kind])(settings)


def learning_rate(settings: Settings, update: int) -> float:
    """Learning rate of an update, counted from 0: linear warmup, then constant or decaying to 0."""
    if update < settings.warmup:
        return settings.learning_rate * (update + 1) / settings.warmup
    left = 1 - (update - settings.warmup) / max(1, settings.updates - settings.warmup)
    factor = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}
    return settings.learning_rate * factor[settings.schedule]


def randomness(batch: Batch, base: BaseModel) -> tuple[Tensor, Tensor, Tensor]:
    """Timesteps (B,), noise and the VAE's noise (B, 4, h, w), each sample's from its seed alone."""
    if batch.latents is not None:
        shape = batch.latents.shape[1:]
    elif batch.moments is not None:
        shape = batch.moments.shape[2:]
    else:
        sides = (side // base.vae_scale_factor for side in batch.pixels.shape[-2:])
        shape = (base.vae.config.latent_channels, *sides)
    steps, rows = base.schedule.config.num_train_timesteps, []
    for seed in batch.seeds.tolist():
        # on the CPU, where a seed gives the same numbers on every machine
        generator = torch.Generator().manual_seed(seed)
        timestep = torch.randint(steps, (), generator=generator)
        rows.append((timestep, *torch.randn(2, *shape, generator=generator)))
    timesteps, noise, vae_noise = (torch.stack(column).to(base.device) for column in zip(*rows, strict=True))
    return timesteps, noise, vae_noise


def load_weights(settings: Settings, base: BaseModel) -> Weights:
    """Load the initial weights, with a LoRA if the stage trains one."""
    rank = settings.lora_rank if "lora" in settings.stage_spec.trains else 0
    sizes = {name: getattr(settings, name) for name in ("num_tokens", "final_layers", "causal")}
    if settings.start is None:
        return from_base(settings.mllm, base.unet, lora_rank=rank, seed=settings.seed, **sizes)
    weights = from_checkpoint(settings.start, settings.mllm, base.unet, lora_rank=rank, seed=settings.seed)
    if settings.mllm_lora_rank:
        weights.tensors.update(fresh_mllm_lora(weights.tensors, settings.mllm_lora_rank, settings.seed))
    for name, expected in sizes.items():
        if (actual := getattr(weights.config, name)) != expected:
            raise ValueError(
                f"{settings.start} has {name} {actual}, but the settings have {expected}. "
                f"Set {name}: {str(actual).lower()}, or start from a checkpoint with {name} {expected}."
            )
    return weights


def configure_deepspeed(accelerator: Accelerator, settings: Settings) -> None:
    """Set the batch size, which is otherwise inferred from a prepared dataloader, and the settings' clipping.

    accelerate would set a clipping of 1.0 where none is configured.
    """
    if plugin := accelerator.state.deepspeed_plugin:
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = settings.batch_size
        plugin.deepspeed_config["gradient_accumulation_steps"] = settings.accumulation
        plugin.deepspeed_config["gradient_clipping"] = settings.clip or 0.0
