"""A loaded EasyRef model: a group of references and a prompt in, reference tokens out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .checkpoint.checkpoint import LORA_PREFIX, Cast, Checkpoint, open_checkpoint, save
from .checkpoint.modules import CheckpointModules
from .mllm.budget import Budget, MemoryOptions, budget, largest_size
from .mllm.context import ContextStates, Provenance
from .mllm.instructions import (
    INSTRUCTION,
    image_spans,
    image_token_id,
    require_text,
    tokenize,
)
from .mllm.prefill import CachedGroupEncoder
from .mllm.prefix_cache import EncodePlan, PreparedGroup
from .mllm.preprocess import SIZE, check_group, grid_of, resized_sides
from .mllm.qwen2_vl import SkipInit
from .mllm.tokenizer import load_tokenizer
from .tokens.aggregator import weight_bias
from .tokens.reference_tokens import ReferenceTokens
from .unet.reference_attention import KeyValue, require_finite
from .utils.images import check_sides, noise_image
from .utils.lru_cache import ByteLRUCache

if TYPE_CHECKING:
    from PIL import Image
    from tokenizers import Tokenizer
    from torch import Tensor


class EasyRefModules(nn.Module):
    """The modules that make reference tokens. A host places them on a device together."""

    def __init__(self, modules: CheckpointModules) -> None:
        super().__init__()
        self.encoder, self.aggregator = modules.encoder, modules.aggregator


class EasyRef:
    """A loaded checkpoint. It holds one copy of its weights; its results carry the checkpoint's fingerprint.

    A host may own the modules' placement: inputs are moved to `device` and computed in `dtype`, whatever the
    weights are stored in.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        modules: CheckpointModules,
        tokenizer: Tokenizer,
        device: torch.device | str,
        dtype: torch.dtype,
        memory: MemoryOptions | None = None,
    ) -> None:
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self.fingerprint = checkpoint.fingerprint()
        self.modules, self.tokenizer = modules, tokenizer
        self.mllm, self.kv = EasyRefModules(modules), modules.kv
        self.device, self.dtype = torch.device(device), dtype
        self.image_token = image_token_id(tokenizer)
        memory = memory or MemoryOptions()
        encoder, token = modules.encoder, self.image_token
        self.group_encoder = CachedGroupEncoder(encoder, token, self.device, dtype, memory=memory)
        self._unconditional: ByteLRUCache[ReferenceTokens] = ByteLRUCache(memory.unconditional_cache_bytes)
        if self.image_token >= self.config.vocab_size:
            raise ValueError(
                f"The tokenizer does not belong to the MLLM: its <|image_pad|> is token {self.image_token}, "
                f"the MLLM has {self.config.vocab_size} tokens. Choose the MLLM folder of the checkpoint."
            )

    def encode(
        self,
        images: Sequence[Image.Image | Tensor],
        prompt: str = "",
        instruction: str = INSTRUCTION,
        size: int = SIZE,
        progress: Callable[[float], None] = lambda done: None,
    ) -> ContextStates:
        """Encode all references and the text of a group together: context states (1, S, D).

        Work that the group shares with an earlier one is cached (mllm/prefix_cache.py).

        images: PIL images or (H, W, C) float tensors in 0..1, of any sizes, in order. size: in pixels.
        progress: called with the completed fraction after each block of the MLLM body; may raise to stop.
        Raises ValueError for anything that is not an image and for a group longer than the MLLM's context.
        """
        return self.encode_plan(self.plan(self.prepare(images, prompt, instruction, size)), progress)

    def prepare(
        self, images: Sequence[Image.Image | Tensor], prompt: str, instruction: str, size: int
    ) -> PreparedGroup:
        """Check and preprocess a group on the CPU, before any weight is needed.

        The length is checked first: a thousand references are refused before one of them is resized.
        """
        image_sizes = check_group(images, self.config, size)
        sides = [resized_sides(height, width, self.config, size)[-1] for width, height in image_sizes]
        grid = grid_of(sides, self.config)
        counts = (grid.prod(dim=1) // self.config.merge_size**2).tolist()
        input_ids = tokenize(self.tokenizer, _user_text(instruction, prompt), counts)
        self._check_length(input_ids.shape[1], counts)
        prepared = self.group_encoder.caches.prepare(images, self.config, size)
        provenance = Provenance(self.fingerprint, instruction, prompt, references=len(counts), size=size)
        spans = image_spans(input_ids, self.image_token, counts)
        return PreparedGroup(prepared, grid, input_ids, provenance, spans)

    def plan(self, group: PreparedGroup, use_prefix: bool = True) -> EncodePlan:
        """Plan the encoding of a prepared group, or without `use_prefix` that of all its vision features."""
        return self.group_encoder.caches.plan(group, use_prefix)

    @torch.inference_mode()
    def encode_plan(
        self, plan: EncodePlan, progress: Callable[[float], None] = lambda done: None
    ) -> ContextStates:
        """Context states (1, S, D) of a planned group; see encode."""
        self.checkpoint.require_not_cut()
        group = plan.group
        return ContextStates(
            self.group_encoder.run(plan, progress), group.provenance, group.grid, group.spans
        )

    def budget(
        self,
        image_sizes: Sequence[tuple[int, int]],
        prompt: str = "",
        instruction: str = INSTRUCTION,
        size: int = SIZE,
    ) -> Budget:
        """Estimate the encoding of a group. image_sizes: width and height of each reference.

        Raises ValueError for sides that encode would refuse.
        """
        text_tokens = self._text_tokens(image_sizes, prompt, instruction)
        return budget(self.config, image_sizes, text_tokens, size, self.dtype.itemsize)

    def largest_size(
        self,
        image_sizes: Sequence[tuple[int, int]],
        prompt: str = "",
        instruction: str = INSTRUCTION,
        size: int = SIZE,
        memory: int | None = None,
    ) -> int | None:
        """The largest size, at most `size`, at which the group fits the context and `memory` bytes.

        None if it fits at no size. The other arguments and errors are budget's.
        """
        text_tokens = self._text_tokens(image_sizes, prompt, instruction)
        itemsize = self.dtype.itemsize
        return largest_size(self.config, image_sizes, text_tokens, size, itemsize, memory=memory)

    @torch.inference_mode()
    def aggregate(self, context: ContextStates) -> ReferenceTokens:
        """Reference tokens (1, T, C) of a group, float32, with its weights and masks (see ContextStates).

        Raises ValueError for a context of another checkpoint, and if the arithmetic overflowed.
        """
        states, bias = self.aggregator_inputs(context)
        tokens = self.mllm.aggregator(states, attn_bias=bias).float()
        if not torch.isfinite(tokens).all():
            raise ValueError(
                f"The reference tokens are not finite (computed in {self.dtype}). Load EasyRef with "
                "precision fp32; if it is, the checkpoint is damaged: download it again."
            )
        return ReferenceTokens.of(tokens, context.provenance)

    def aggregator_inputs(self, context: ContextStates) -> tuple[Tensor, Tensor | None]:
        """States (1, S, D) and attention bias (T, S + T) of a context, on the model's device, in its dtype.

        Raises ValueError for a context of another checkpoint.
        """
        self.require_same_checkpoint(context, "context")
        self.checkpoint.require_not_cut()
        bias = weight_bias(context, self.config.num_tokens)
        states = context.states.to(self.device, self.dtype)
        return states, None if bias is None else bias.to(self.device, self.dtype)

    def unconditional(
        self,
        instruction: str = INSTRUCTION,
        size: int = SIZE,
        noise_seed: int = 0,
        noise_strength: float = 0.0,
    ) -> ReferenceTokens:
        """Tokens (1, T, C) of the unconditional side, cached: one black image and the bare instruction.

        noise_strength: above 0, a noise image takes the place of the black one, see noise_image.
        """
        noise_seed = noise_seed if noise_strength else 0
        key = instruction, size, noise_seed, noise_strength
        if key in self._unconditional:
            return self._unconditional.get(key)
        tokens = self.aggregate(self.encode([noise_image(noise_seed, noise_strength)], "", instruction, size))
        how = f"noise, seed {noise_seed}, strength {noise_strength:g}" if noise_strength else "black image"
        tokens.provenance = dataclasses.replace(tokens.provenance, how=how)
        self._unconditional.put(key, tokens, tokens.nbytes)
        return tokens

    def key_values(
        self, tokens: Tensor, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> list[KeyValue]:
        """K and V (rows, T, inner) of tokens (rows, T, C) at every cross-attention site, in processor order.

        dtype: of the computation, the model's by default. device: of the result, the model's by default.
        Raises ValueError for values that are not finite.
        """
        self.checkpoint.require_not_cut()
        dtype, device = dtype or self.dtype, device or self.device
        # autograd cannot save tensors that `aggregate` computed in inference mode
        with torch.set_grad_enabled(torch.is_grad_enabled() and not tokens.is_inference()):
            projected = self.kv(tokens.to(self.device, dtype))
        key_values = [(k.to(device), v.to(device)) for k, v in projected]
        require_finite(key_values, dtype)
        return key_values

    def clear_cache(self) -> None:
        """Free everything that is cached of earlier groups, and the unconditional tokens."""
        self.group_encoder.caches.clear()
        self._unconditional.clear()

    def require_same_checkpoint(self, value: ContextStates | ReferenceTokens, name: str) -> None:
        """Raise ValueError for a result of another checkpoint, which would be meaningless for this one."""
        if value.provenance.checkpoint != self.fingerprint:
            raise ValueError(
                f"This {name} was made by another EasyRef checkpoint ({value.provenance.checkpoint}; this "
                f"one is {self.fingerprint}, {self.checkpoint.path.name}). Encode the group with this "
                "checkpoint."
            )

    def save(self, path: Path | str) -> None:
        """Write this model as one safetensors file that `load` and the nodes read."""
        lora = {LORA_PREFIX + name: tensor for name, tensor in self.checkpoint.lora().items()}
        save(Path(path), self.config, self.checkpoint.sites, self.modules.state_dict() | lora)

    def _text_tokens(self, image_sizes: Sequence[tuple[int, int]], prompt: str, instruction: str) -> int:
        for i, (width, height) in enumerate(image_sizes):
            check_sides(width, height, f"reference {i + 1}")
        text = _user_text(instruction, prompt)
        return tokenize(self.tokenizer, text, [0] * len(image_sizes)).shape[1]

    def _check_length(self, length: int, image_tokens: list[int]) -> None:
        limit = self.config.max_positions - self.config.num_tokens
        if length <= limit:
            return
        room = limit - (length - sum(image_tokens) - 2 * len(image_tokens))  # 2: the marks around each image
        used = accumulate(count + 2 for count in image_tokens)
        fit = sum(tokens <= room for tokens in used)
        remedy = (
            f"The first {fit} references fit; remove the others or encode at a smaller size."
            if fit
            else "Shorten the prompt."
        )
        raise ValueError(
            f"The group is too long for the MLLM: {len(image_tokens)} references and the text make "
            f"{length:,} tokens, {limit:,} fit beside the reference tokens. {remedy}"
        )


def load(
    checkpoint: Path | str,
    mllm: Path | str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    tokenizer: Path | str | None = None,
    causal: bool | None = None,
    memory: MemoryOptions | None = None,
) -> EasyRef:
    """Load an EasyRef checkpoint.

    checkpoint: .safetensors, or DeepSpeed's .pt. mllm: folder with config.json and tokenizer, and with the
    base weights if the checkpoint has none. tokenizer: its folder; by default mllm, else the shipped one.
    causal: the final layer's attention; None follows the checkpoint's metadata, causal by default.
    memory: sizes of caches and chunks. Raises FileNotFoundError and ValueError, see open_checkpoint.
    """
    opened = open_checkpoint(Path(checkpoint), Path(mllm) if mllm else None, causal)
    device, folder = torch.device(device), tokenizer or mllm
    folder = Path(folder) if folder else None
    return build(opened, folder, device, dtype, cast=lambda _, t: t.to(device, dtype), memory=memory)


def build(
    checkpoint: Checkpoint,
    tokenizer: Path | None,
    device: torch.device | str,
    dtype: torch.dtype,
    cast: Cast,
    operations: Any = SkipInit,
    memory: MemoryOptions | None = None,
) -> EasyRef:
    """Build the model of a checkpoint from modules of `operations`; each weight passes through `cast`.

    The modules are created on the meta device and the tensors assigned to them, so a weight that `cast`
    leaves alone stays the file's mapping. tokenizer: its folder; None: the shipped one.
    """
    modules = CheckpointModules(checkpoint.config, checkpoint.widths, operations, device="meta").eval()
    modules.load_state_dict(checkpoint.state(cast), assign=True)
    return EasyRef(checkpoint, modules, load_tokenizer(tokenizer), device, dtype=dtype, memory=memory)


def _user_text(instruction: str, prompt: str) -> str:
    require_text(instruction, "instruction")
    require_text(prompt, "prompt")
    return instruction + prompt
