"""EasyRef, loaded: a group of references and a prompt in, reference tokens out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .checkpoint.checkpoint import LORA_PREFIX, Cast, Checkpoint, open_checkpoint, save
from .checkpoint.modules import CheckpointModules
from .mllm.budget import Budget, budget, largest_size
from .mllm.instructions import (
    INSTRUCTION,
    image_spans,
    image_token_id,
    load_tokenizer,
    require_text,
    tokenize,
)
from .mllm.prefix_cache import CachedGroupEncoder, PreparedGroup, digest
from .mllm.preprocess import SIZE, check_group, check_sides, grid_of, resized_sides
from .mllm.qwen2_vl import SkipInit
from .tokens.aggregator import weight_bias
from .tokens.reference_tokens import ContextStates, Provenance, ReferenceTokens
from .unet.reference_attention import KeyValue, require_finite
from .utils.negative import noise_image

if TYPE_CHECKING:
    from PIL import Image
    from tokenizers import Tokenizer
    from torch import Tensor


KEPT = 16  # unconditional tokens, one set for each instruction, size and noise


class EasyRefModules(nn.Module):
    """The modules that make reference tokens. A host places them on a device together."""

    def __init__(self, modules: CheckpointModules) -> None:
        super().__init__()
        self.encoder, self.aggregator = modules.encoder, modules.aggregator


class EasyRef:
    """A loaded checkpoint. It holds one copy of its weights; what it computes carries the checkpoint's fingerprint.

    A host may own the modules' placement: `device` is where inputs go, `dtype` what they are computed in, whatever
    the weights are stored in.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        modules: CheckpointModules,
        tokenizer: Tokenizer,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self.fingerprint = checkpoint.fingerprint()
        self.modules, self.tokenizer = modules, tokenizer
        self.mllm, self.kv = EasyRefModules(modules), modules.kv
        self.device, self.dtype = torch.device(device), dtype
        self.image_token = image_token_id(tokenizer)
        self.reader = CachedGroupEncoder(modules.encoder, self.image_token, self.device, dtype)
        self._unconditional: dict[tuple[str, int, int, float], ReferenceTokens] = {}
        if self.image_token >= self.config.vocab_size:
            raise ValueError(
                f"The tokenizer does not belong to the MLLM: its <|image_pad|> is token {self.image_token}, the MLLM "
                f"knows {self.config.vocab_size}. Choose the MLLM folder the checkpoint was trained with."
            )

    def encode(
        self,
        images: Sequence[Image.Image | Tensor],
        prompt: str = "",
        instruction: str = INSTRUCTION,
        size: int = SIZE,
        progress: Callable[[float], None] = lambda done: None,
    ) -> ContextStates:
        """Context states (1, S, D) of a group: all references and the text read together by the MLLM body.

        What a group has in common with one read before is not read again (group_reader.py).

        images: PIL images or (H, W, C) float tensors in 0..1, of any sizes, in order. size: pixels, see preprocess.
        progress: told the part that is done, up to 1, after each block of the MLLM body; may raise to stop at once.
        Raises ValueError for images that hold no picture and for a group longer than the MLLM's context.
        """
        return self.encode_prepared(self.prepare(images, prompt, instruction, size), progress)

    def prepare(
        self, images: Sequence[Image.Image | Tensor], prompt: str, instruction: str, size: int
    ) -> PreparedGroup:
        """Everything the MLLM body reads, made and checked on the CPU before any weight is needed.

        The length is checked first: a thousand references are refused before one of them is resized.
        """
        pictures = check_group(images, self.config, size)
        sides = [resized_sides(height, width, self.config, size)[-1] for width, height in pictures]
        grid = grid_of(sides, self.config)
        counts = (grid.prod(dim=1) // self.config.merge_size**2).tolist()
        input_ids = tokenize(self.tokenizer, _asked(instruction, prompt), counts)
        self._check_length(input_ids.shape[1], counts)
        pixels = self.reader.pixels(images, size)
        made = Provenance(self.fingerprint, instruction, prompt, len(counts), size)
        spans = image_spans(input_ids, self.image_token, counts)
        return PreparedGroup(tuple(pixels), grid, input_ids, made, spans, tuple(map(digest, pixels)))

    def budget(
        self,
        pictures: Sequence[tuple[int, int]],
        prompt: str = "",
        instruction: str = INSTRUCTION,
        size: int = SIZE,
    ) -> Budget:
        """What encoding a group will take, before anything is encoded. pictures: width, height of each reference.

        Raises ValueError for pictures that encode would refuse for their sides.
        """
        return budget(
            self.config, pictures, self._text_tokens(pictures, prompt, instruction), size, self.dtype.itemsize
        )

    def largest_size(
        self,
        pictures: Sequence[tuple[int, int]],
        prompt: str = "",
        instruction: str = INSTRUCTION,
        size: int = SIZE,
        memory: int | None = None,
    ) -> int | None:
        """The largest size, at most `size`, at which a group fits the MLLM's context, and its activations `memory` bytes.

        None where no size does. The rest as for budget.
        """
        text_tokens = self._text_tokens(pictures, prompt, instruction)
        return largest_size(self.config, pictures, text_tokens, size, self.dtype.itemsize, memory)

    @torch.inference_mode()
    def encode_prepared(
        self, group: PreparedGroup, progress: Callable[[float], None] = lambda done: None
    ) -> ContextStates:
        """Context states (1, S, D) of a prepared group; see encode."""
        return ContextStates(self.reader.read(group, progress), group.provenance, group.grid, group.spans)

    @torch.inference_mode()
    def aggregate(self, context: ContextStates) -> ReferenceTokens:
        """Reference tokens (1, T, C) of a group, float32. Each reference counts as context.weighed says, if it does.

        Raises ValueError for a context of another checkpoint and where the arithmetic overflowed.
        """
        self.require_same_checkpoint(context, "context")
        bias = weight_bias(context, self.config.num_tokens)
        bias = None if bias is None else bias.to(self.device, self.dtype)
        tokens = self.mllm.aggregator(context.states.to(self.device, self.dtype), attn_bias=bias).float()
        if not torch.isfinite(tokens).all():
            raise ValueError(
                f"The reference tokens are not finite (computed in {self.dtype}). Load EasyRef with precision fp32; "
                "if it is, the checkpoint is damaged: download it again."
            )
        return ReferenceTokens.of(tokens, context.provenance)

    def unconditional(
        self,
        instruction: str = INSTRUCTION,
        size: int = SIZE,
        noise_seed: int = 0,
        noise_strength: float = 0.0,
    ) -> ReferenceTokens:
        """Tokens (1, T, C) of the unconditional side: one black image and the bare instruction. The latest are kept.

        noise_strength: above 0, a picture of noise in place of the black one, see noise_image.
        """
        noise_seed = noise_seed if noise_strength else 0
        key = instruction, size, noise_seed, noise_strength
        if key not in self._unconditional:
            image = noise_image(noise_seed, noise_strength)
            tokens = self.aggregate(self.encode([image], "", instruction, size))
            how = (
                f"noise, seed {noise_seed}, strength {noise_strength:g}" if noise_strength else "black image"
            )
            tokens.provenance = dataclasses.replace(tokens.provenance, how=how)
            while len(self._unconditional) >= KEPT:
                self._unconditional.pop(next(iter(self._unconditional)))
            self._unconditional[key] = tokens
        return self._unconditional[key]

    def key_values(
        self, tokens: Tensor, dtype: torch.dtype | None = None, kept_on: torch.device | None = None
    ) -> list[KeyValue]:
        """K and V (rows, T, inner) of reference tokens (rows, T, C) at every cross-attention site, in processor order.

        dtype: what to compute in, the model's own by default. kept_on: where they are wanted, the model's device by default.
        Raises ValueError where one of them is not finite.
        """
        dtype, kept_on = dtype or self.dtype, kept_on or self.device
        # `aggregate` makes tokens in inference mode, of which nothing can be kept for a gradient
        with torch.set_grad_enabled(torch.is_grad_enabled() and not tokens.is_inference()):
            projected = self.kv(tokens.to(self.device, dtype))
        key_values = [(k.to(kept_on), v.to(kept_on)) for k, v in projected]
        require_finite(key_values, dtype)
        return key_values

    def forget(self) -> None:
        """Give back what is kept of groups read before, and of the unconditional side."""
        self.reader.forget()
        self._unconditional.clear()

    def require_same_checkpoint(self, made: ContextStates | ReferenceTokens, what: str) -> None:
        """Refuse what another checkpoint made: its numbers mean nothing to this one."""
        if made.provenance.checkpoint != self.fingerprint:
            raise ValueError(
                f"This {what} was made by another EasyRef checkpoint ({made.provenance.checkpoint}; this one is "
                f"{self.fingerprint}, {self.checkpoint.path.name}). Encode the group with this checkpoint."
            )

    def save(self, path: Path | str) -> None:
        """Write this model as one safetensors file that `load` and the nodes read."""
        lora = {LORA_PREFIX + name: tensor for name, tensor in self.checkpoint.lora().items()}
        save(Path(path), self.config, self.checkpoint.sites, self.modules.state_dict() | lora)

    def _text_tokens(self, pictures: Sequence[tuple[int, int]], prompt: str, instruction: str) -> int:
        for i, (width, height) in enumerate(pictures):
            check_sides(width, height, f"reference {i + 1}")
        return tokenize(self.tokenizer, _asked(instruction, prompt), [0] * len(pictures)).shape[1]

    def _check_length(self, length: int, image_tokens: list[int]) -> None:
        limit = self.config.max_positions - self.config.num_tokens
        if length <= limit:
            return
        room = limit - (length - sum(image_tokens) - 2 * len(image_tokens))  # 2: the marks around each image
        fit, used = 0, 0
        for count in image_tokens:
            used += count + 2
            fit += used <= room
        raise ValueError(
            f"The group is too long for the MLLM: {len(image_tokens)} references and the text make {length:,} tokens, "
            f"{limit:,} fit beside the reference tokens. "
            + (
                f"The first {fit} references fit; remove the others or encode at a smaller size."
                if fit
                else "Shorten the prompt."
            )
        )


def load(
    checkpoint: Path | str,
    mllm: Path | str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    tokenizer: Path | str | None = None,
    causal: bool | None = None,
) -> EasyRef:
    """Load an EasyRef checkpoint.

    checkpoint: .safetensors, or DeepSpeed's .pt. mllm: folder with config.json and tokenizer, and with the base weights
    where the checkpoint has none. tokenizer: folder of the tokenizer, if there is no mllm folder.
    causal: the final layer's attention; None takes the checkpoint's own word, causal if it has none.
    Raises FileNotFoundError and ValueError, see open_checkpoint.
    """
    opened = open_checkpoint(Path(checkpoint), Path(mllm) if mllm else None, causal)
    device = torch.device(device)
    return build(
        opened, _tokenizer_folder(mllm, tokenizer), device, dtype, lambda _, tensor: tensor.to(device, dtype)
    )


def build(
    checkpoint: Checkpoint,
    tokenizer: Path,
    device: torch.device | str,
    dtype: torch.dtype,
    cast: Cast,
    operations: Any = SkipInit,
) -> EasyRef:
    """The model of an opened checkpoint: modules of `operations`, every weight passed through `cast` once.

    Modules are made without memory and take the tensors themselves, so a weight that `cast` leaves alone stays the
    file's mapping.
    """
    modules = CheckpointModules(checkpoint.config, checkpoint.widths, operations, device="meta").eval()
    modules.load_state_dict(checkpoint.state(cast), assign=True)
    return EasyRef(checkpoint, modules, load_tokenizer(tokenizer), device, dtype)


def _asked(instruction: str, prompt: str) -> str:
    require_text(instruction, "instruction")
    require_text(prompt, "prompt")
    return instruction + prompt


def _tokenizer_folder(mllm: Path | str | None, tokenizer: Path | str | None) -> Path:
    folder = tokenizer or mllm
    if folder is None:
        raise ValueError(
            "A tokenizer is needed. Pass mllm, the folder of Qwen2-VL-2B-Instruct, or tokenizer."
        )
    return Path(folder)
