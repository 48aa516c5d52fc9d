"""CachedGroupEncoder: vision tower and decoder prefill, with caches and retries after out of memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from .budget import MemoryOptions
from .prefix_cache import EncodeCaches, EncodePlan
from .preprocess import grid_of, patches_of
from .qwen2_vl import LayerKVCache

if TYPE_CHECKING:
    from torch import Tensor

    from .group_encoder import GroupEncoder

# Messages of a CPU, cuBLAS and cuDNN, Apple's GPU and DirectML, in a plain RuntimeError.
OUT_OF_MEMORY_MESSAGES = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "status_alloc_failed",
    "could not allocate",
)
MAX_QUOTED = 200  # characters of the allocator's message
HINT = (
    "Out of memory while the MLLM encodes the group, even in the smallest chunks. "
    "Encode at a smaller size, load EasyRef with precision fp8_e4m3fn, or free memory."
)


class CachedGroupEncoder:
    """The MLLM body with prefix caching. Context states are returned on the caches' device."""

    def __init__(
        self,
        encoder: GroupEncoder,
        image_token: int,
        device: torch.device,
        dtype: torch.dtype,
        memory: MemoryOptions | None = None,
    ) -> None:
        self.encoder, self.image_token, self.device, self.dtype = encoder, image_token, device, dtype
        self.memory = memory or MemoryOptions()
        self.caches = EncodeCaches(self.memory, device)

    def run(self, plan: EncodePlan, progress: Callable[[float], None] = lambda done: None) -> Tensor:
        """Return the context states (1, S, D) of a plan's group.

        progress: called with the completed fraction after each block of the vision tower and of the decoder;
        may raise to stop. Raises torch.OutOfMemoryError if not even the smallest chunks fit.
        """
        vision_blocks = len(self.encoder.visual.blocks) * bool(plan.unencoded_images)
        steps = Progress(progress, vision_blocks + len(self.encoder.layers))
        features = self._encode_images(plan, steps)
        embeddings = self.encoder.embed(
            plan.group.input_ids[:, plan.cached_tokens :].to(self.device),
            self.image_token,
            torch.cat(features) if features else torch.empty(0, device=self.device),
            self.dtype,
        )
        prefill = Prefill(self.encoder, plan, embeddings, self.caches.device, steps)
        run_in_chunks(
            plan.new_tokens,
            partial(self._chunk_tokens, plan),
            self.memory.min_chunk_tokens,
            prefill.step,
            on_oom=partial(self._free_memory, prefill.rollback),
            hint=HINT,
        )
        states = prefill.states()
        try:
            self.caches.put_prefix(plan, prefill.layer_caches, states)
        except Exception as error:
            if not is_out_of_memory(error):  # the states are complete; only the next group has to start over
                raise
        return states

    def features(
        self, plan: EncodePlan, progress: Callable[[float], None] = lambda done: None
    ) -> list[Tensor]:
        """Return the vision features (image tokens, D) of each reference of a plan made without a prefix."""
        return self._encode_images(plan, Progress(progress, len(self.encoder.visual.blocks)))

    def _encode_images(self, plan: EncodePlan, steps: Progress) -> list[Tensor]:
        """Return the features of each uncached reference, on the model's device."""
        features = {digest: cached.to(self.device) for digest, cached in plan.features.items()}
        encoded: dict[bytes, Tensor] = {}  # cached after the last chunk: a retry evicts what is in the cache
        largest = max(plan.patches, default=1)
        run_in_chunks(
            len(plan.unencoded_images),
            lambda _: self.memory.vision_chunk_patches // largest,
            min_chunk=1,
            step=partial(self._encode_chunk, plan, (features, encoded), steps),
            on_oom=partial(self._free_memory, steps.rollback),
            hint=HINT,
        )
        for digest, part in encoded.items():
            self.caches.features.put(digest, part, part.nbytes)
        return [features[plan.group.images[index].digest] for index in plan.uncached_references]

    def _encode_chunk(
        self,
        plan: EncodePlan,
        outputs: tuple[dict[bytes, Tensor], ...],
        steps: Progress,
        start: int,
        end: int,
    ) -> None:
        """Encode unencoded images start .. end. outputs: features on the model's, on the caches' device."""
        features, encoded = outputs
        config = self.encoder.config
        images = [plan.group.images[index] for index in plan.unencoded_images[start:end]]
        pixels = [image.pixels for image in images]
        patches = patches_of(pixels, config).to(self.device, self.dtype)
        grid = grid_of([image.shape[:2] for image in pixels], config)
        fraction = len(images) / len(plan.unencoded_images)
        tokens = self.encoder.visual(patches, grid, steps.chunk(fraction))
        counts = (grid.prod(dim=1) // config.merge_size**2).tolist()
        moved = tokens.to(self.caches.device)  # in one transfer
        parts = zip(images, tokens.split(counts), moved.split(counts), strict=True)
        for image, part, cached in parts:
            features[image.digest] = part
            # a copy, because a view would keep the features of all images alive
            encoded[image.digest] = cached.clone()

    def _chunk_tokens(self, plan: EncodePlan, start: int) -> int:
        # Only the first chunk is plain causal; later ones attend to the cache and need an explicit mask.
        length = plan.group.input_ids.shape[1]
        return self.memory.max_mask_entries // length if plan.cached_tokens + start else plan.new_tokens

    def _free_memory(self, rollback: Callable[[], None]) -> None:
        rollback()
        if self.caches.device == self.device:
            self.caches.clear_device()
        self.memory.on_out_of_memory()


class Prefill:
    """Decoder prefill of a plan's new tokens, chunk by chunk. embeddings: (1, new tokens, D)."""

    def __init__(
        self,
        encoder: GroupEncoder,
        plan: EncodePlan,
        embeddings: Tensor,
        states_device: torch.device,
        progress: Progress,
    ) -> None:
        self.encoder, self.embeddings, self.states_device = encoder, embeddings, states_device
        self.progress, self.chunks = progress, []
        self.layer_caches = [LayerKVCache() for _ in encoder.layers]
        if plan.prefix:
            length = plan.cached_tokens
            self.chunks = [plan.prefix.states[:, :length]]
            self.layer_caches = [
                LayerKVCache((k[:, :, :length], v[:, :, :length])) for k, v in plan.prefix.layers
            ]

    def step(self, start: int, end: int) -> None:
        fraction = (end - start) / self.embeddings.shape[1]
        after_block = self.progress.chunk(fraction)
        states = self.encoder.prefill(self.embeddings[:, start:end], self.layer_caches, after_block)
        self.chunks.append(states.to(self.states_device))

    def rollback(self) -> None:
        """Undo a step that failed: some layers have its keys and values, others do not."""
        self.progress.rollback()
        length = sum(chunk.shape[1] for chunk in self.chunks)
        for cache in self.layer_caches:
            cache.truncate(length)

    def states(self) -> Tensor:
        """Context states (1, S, D) of the prefix and all chunks."""
        return torch.cat(self.chunks, dim=1) if len(self.chunks) > 1 else self.chunks[0]


class Progress:
    """Reports the completed fraction of a run, up to 1, after each block of its chunks."""

    def __init__(self, report: Callable[[float], None], blocks: int) -> None:
        self.report, self.blocks = report, blocks
        self.done = self.chunk_start = 0.0

    def chunk(self, fraction: float) -> Callable[[], None]:
        """Return the callback for each block of the next chunk, which is this fraction of the run."""
        self.chunk_start = self.done
        return partial(self._advance, fraction / self.blocks)

    def rollback(self) -> None:
        """Subtract the blocks of the last chunk, which has failed."""
        self.done = self.chunk_start

    def _advance(self, step: float) -> None:
        self.done = min(self.done + step, 1.0)
        self.report(self.done)


def run_in_chunks(
    total: int,
    chunk_size: Callable[[int], int],
    min_chunk: int,
    step: Callable[[int, int], None],
    on_oom: Callable[[], None],
    hint: str,
) -> None:
    """Call step(start, end) for consecutive chunks of 0 .. total, and halve the chunks on out-of-memory.

    chunk_size: maximum size of the chunk that begins at an index. on_oom: called before a retry, to undo the
    failed step and free memory. Raises torch.OutOfMemoryError with the hint if `min_chunk` does not fit.
    """
    start, limit = 0, total
    while start < total:
        end = min(start + max(min_chunk, min(limit, chunk_size(start))), total)
        try:
            step(start, end)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if end - start <= min_chunk:
                message = (str(error) or type(error).__name__).splitlines()[0][:MAX_QUOTED]
                raise torch.OutOfMemoryError(f"{hint} ({message})") from error
        else:
            start = end
            continue
        # outside the except clause, because the error holds the tensors of its frames
        limit = (end - start) // 2
        on_oom()


def is_out_of_memory(error: Exception) -> bool:
    """True if this is some device's out-of-memory error."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        message in str(error).lower() for message in OUT_OF_MEMORY_MESSAGES
    )
