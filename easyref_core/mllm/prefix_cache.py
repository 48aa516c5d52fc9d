"""The MLLM body, reading group after group: nothing twice, and in smaller pieces where memory is short.

The body is causal and the images come before the text, so the keys and values of a group's images do not depend on
what follows them. They are kept, with the states there, and a group that begins with the same images, in the same
order and at the same size, is read on from where it differs. What the vision tower saw in an image is kept as well,
whatever else is in its group, and so are the pixels of an image as they are read, which are quicker found by its
values than made of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..utils.lru_cache import ByteLRUCache
from .chunks import is_out_of_memory, run_in_chunks
from .preprocess import grid_of, patches_of, pixels_of
from .qwen2_vl import LayerKVCache

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ..tokens.reference_tokens import Provenance
    from ..unet.reference_attention import KeyValue
    from .group_encoder import GroupEncoder

# Bytes that are kept. At 336 pixels an image takes 0.3 MB of pixels and, in float32, 0.9 MB of features, a group 8.5 MB
# of prefix for each reference: the longest context of the released model fits in bfloat16, 120 references in float32.
PIXEL_CACHE_BYTES, FEATURE_CACHE_BYTES, PREFIX_CACHE_BYTES = 64 * 2**20, 256 * 2**20, 1024 * 2**20
# The vision tower sees no more patches at once (about 14 images at 336 pixels): more are no faster, and take memory.
VISION_CHUNK_PATCHES = 8192
# entries of the attention mask where a group is read on: tokens read at once times tokens before them
MAX_MASK_ENTRIES = 2**24
MIN_CHUNK_TOKENS = 64  # tokens read at once where memory is short

REMEDY = (
    "Out of memory while the MLLM reads the group, although it was read in the smallest pieces. "
    "Encode at a smaller size, load EasyRef with precision fp8_e4m3fn, or free memory."
)


@dataclasses.dataclass(frozen=True)
class PreparedGroup:
    """A group as the MLLM body reads it."""

    pixels: tuple[np.ndarray, ...]  # of each reference, bytes (H, W, 3)
    grid: Tensor  # (K, 3): frames, rows, columns of each reference in patches
    input_ids: Tensor  # (1, S)
    provenance: Provenance  # what made it
    spans: tuple[tuple[int, int], ...]  # see ContextStates
    digests: tuple[bytes, ...]  # of each reference's pixels

    @property
    def patches(self) -> list[int]:
        """How many patches each reference has."""
        return self.grid.prod(dim=1).tolist()

    @property
    def reads(self) -> tuple[int | bytes, ...]:
        """What is at each of the S places: a token's id, or of an image token the digest of its image."""
        reads: list[int | bytes] = self.input_ids[0].tolist()
        for (start, end), digest in zip(self.spans, self.digests, strict=True):
            reads[start:end] = [digest] * (end - start)
        return tuple(reads)


@dataclasses.dataclass(frozen=True)
class Prefix:
    """A group read up to the end of its last image."""

    reads: tuple[int | bytes, ...]  # see PreparedGroup
    key_values: tuple[KeyValue, ...]  # of each layer, (1, kv_heads, length, head_dim), keys rotated
    states: Tensor  # (1, length, D)

    @property
    def nbytes(self) -> int:
        return self.states.nbytes + sum(k.nbytes + v.nbytes for k, v in self.key_values)


@dataclasses.dataclass(frozen=True)
class Work:
    """What of a group is still to be read."""

    unread: tuple[int, ...]  # numbers of the references that the decoder reads
    unseen: tuple[int, ...]  # those of them for the vision tower, equal ones once
    patches: tuple[int, ...]  # of each of these
    prefix: Prefix | None  # what was read before
    start: int  # how much of the context that is
    tokens: int  # the rest of it


class CachedGroupEncoder:
    """Owns what is kept; it goes with the loaded model, or at forget().

    kept_on: where it is kept, and where the states are returned. free: gives memory back when it was short.
    """

    def __init__(
        self, encoder: GroupEncoder, image_token: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.encoder, self.image_token, self.device, self.dtype = encoder, image_token, device, dtype
        self.kept_on = device
        self.free: Callable[[], None] = lambda: None
        self._pixels: ByteLRUCache[np.ndarray] = ByteLRUCache(
            PIXEL_CACHE_BYTES
        )  # by the digest of the image's values, and the size
        self._features: ByteLRUCache[Tensor] = ByteLRUCache(
            FEATURE_CACHE_BYTES
        )  # by digest, (image tokens, D)
        self._prefixes: ByteLRUCache[Prefix] = ByteLRUCache(PREFIX_CACHE_BYTES)  # by what they read

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return self._pixels.nbytes + self._features.nbytes + self._prefixes.nbytes

    def forget(self) -> None:
        self._pixels.clear()
        self._features.clear()
        self._prefixes.clear()

    def pixels(self, images: Sequence[Image.Image | Tensor], size: int) -> list[np.ndarray]:
        """Each reference as the MLLM reads it, of a group that check_group let pass; values are preprocess.read_pixels'."""
        return [self._pixels_of(image, f"reference {i + 1}", size) for i, image in enumerate(images)]

    def work(self, group: PreparedGroup) -> Work:
        """What is left to do for a group, before it is done."""
        prefix, start = self._known(group)
        unread = tuple(number for number, (first, _) in enumerate(group.spans) if first >= start)
        unseen = self._unseen(group, unread)
        patches = tuple(group.patches[number] for number in unseen)
        return Work(unread, unseen, patches, prefix, start, group.input_ids.shape[1] - start)

    def read(self, group: PreparedGroup, progress: Callable[[float], None] = lambda done: None) -> Tensor:
        """Context states (1, S, D) of a group.

        progress: told the part that is done, up to 1, after each block of the vision tower and of the decoder; may
        raise to stop. Raises torch.OutOfMemoryError where not even the smallest pieces fit.
        """
        work, layers = self.work(group), len(self.encoder.layers)
        steps = _Steps(progress, len(self.encoder.visual.blocks) * bool(work.unseen) + layers)
        seen = self._see(group, work.unread, work.unseen, steps)
        features = [seen[group.digests[number]] for number in work.unread]
        x = self.encoder.embed(
            group.input_ids[:, work.start :].to(self.device),
            self.image_token,
            torch.cat(features) if features else torch.empty(0, device=self.device),
            self.dtype,
        )
        before = work.prefix.key_values if work.prefix else [None] * layers
        past = [
            LayerKVCache(key_value and tuple(t[:, :, : work.start] for t in key_value))
            for key_value in before
        ]
        states = [work.prefix.states[:, : work.start]] if work.prefix else []

        def at_once(start: int) -> int:
            # what is read on from something needs a mask; the first piece of a group does not
            return MAX_MASK_ENTRIES // group.input_ids.shape[1] if work.start + start else work.tokens

        def put_back() -> None:
            self._give_back(steps)
            read = sum(part.shape[1] for part in states)
            for layer in past:
                layer.cut(read)

        def read_piece(start: int, end: int) -> None:
            piece = x[:, start:end]
            part = self.encoder.read(piece, past, steps.counting((end - start) / work.tokens))
            states.append(part.to(self.kept_on))

        run_in_chunks(work.tokens, at_once, MIN_CHUNK_TOKENS, read_piece, put_back, REMEDY)
        read = torch.cat(states, dim=1) if len(states) > 1 else states[0]
        self._keep(group, work, past, read)
        return read

    def features(
        self, group: PreparedGroup, progress: Callable[[float], None] = lambda done: None
    ) -> list[Tensor]:
        """What the vision tower sees in each reference, (image tokens, D); progress as for read."""
        numbers = range(len(group.digests))
        steps = _Steps(progress, len(self.encoder.visual.blocks))
        seen = self._see(group, numbers, self._unseen(group, numbers), steps)
        return [seen[digest] for digest in group.digests]

    def unseen_patches(self, group: PreparedGroup) -> list[int]:
        """Of each reference that the vision tower has yet to see for features()."""
        return [group.patches[number] for number in self._unseen(group, range(len(group.digests)))]

    def _pixels_of(self, image: Image.Image | Tensor, name: str, size: int) -> np.ndarray:
        values = values_digest(image)
        if values is None:
            return pixels_of(image, name, self.encoder.config, size)
        if (values, size) not in self._pixels:
            made = pixels_of(image, name, self.encoder.config, size)
            self._pixels.put((values, size), made, made.nbytes)
            return made
        return self._pixels.get((values, size))

    def _unseen(self, group: PreparedGroup, numbers: Sequence[int]) -> tuple[int, ...]:
        """Those of the references whose features are not kept, equal ones once."""
        first_of = {group.digests[number]: number for number in reversed(numbers)}
        return tuple(sorted(n for digest, n in first_of.items() if digest not in self._features))

    def _see(
        self, group: PreparedGroup, numbers: Sequence[int], unseen: Sequence[int], steps: _Steps
    ) -> dict[bytes, Tensor]:
        """What is seen in these references, by digest, on the device; the vision tower runs for the unseen ones alone."""
        config = self.encoder.config
        seen = {
            digest: self._features.get(digest).to(self.device)
            for digest in dict.fromkeys(group.digests[number] for number in numbers)
            if digest in self._features
        }
        kept: dict[bytes, Tensor] = {}

        def see_piece(start: int, end: int) -> None:
            piece = unseen[start:end]
            pixels = [group.pixels[number] for number in piece]
            patches = patches_of(pixels, config).to(self.device, self.dtype)
            grid = grid_of([image.shape[:2] for image in pixels], config)
            tokens = self.encoder.visual(patches, grid, steps.counting(len(piece) / len(unseen)))
            counts = (grid.prod(dim=1) // config.merge_size**2).tolist()
            digests = [group.digests[number] for number in piece]
            # brought over at once; a part would hold all of them, a copy of it does not
            parts = [part.clone() for part in tokens.to(self.kept_on).split(counts)]
            seen.update(zip(digests, tokens.split(counts), strict=True))
            kept.update(zip(digests, parts, strict=True))

        at_once = VISION_CHUNK_PATCHES // max((group.patches[number] for number in unseen), default=1)
        run_in_chunks(len(unseen), lambda _: at_once, 1, see_piece, partial(self._give_back, steps), REMEDY)
        for digest, part in kept.items():
            self._features.put(digest, part, part.nbytes)
        return seen

    def _give_back(self, steps: _Steps) -> None:
        """Memory was short: the piece is still to be done, and what is kept of other groups on the device makes room."""
        steps.again()
        if self.kept_on == self.device:
            self._features.clear()
            self._prefixes.clear()
        self.free()

    def _known(self, group: PreparedGroup) -> tuple[Prefix | None, int]:
        """The prefix that has most of a group in common with it, and how many tokens that are; at least one image."""
        reads, ends = group.reads, [end for _, end in group.spans]
        common = {key: _in_common(key, reads) for key in self._prefixes}
        best = max(common, key=common.__getitem__, default=None)
        if best is None or common[best] < ends[0]:
            return None, 0
        # a last token is read in any case, so that there is a next one to read on from
        return self._prefixes.get(best), min(common[best], len(reads) - 1)

    def _keep(self, group: PreparedGroup, work: Work, past: Sequence[LayerKVCache], states: Tensor) -> None:
        """Keep a group up to the end of its last image, in place of what it begins with; nothing that is kept already."""
        end = group.spans[-1][1] + 1  # the mark after the image
        if work.start >= end:
            return
        size = states[:, :end].nbytes + sum(t[:, :, :end].nbytes for p in past for t in p.key_value)
        if size > self._prefixes.limit:
            return
        reads, key_values = group.reads[:end], []
        try:
            for layer in past:  # one after the other, so that no more than one is there twice
                key_values.append(tuple(t[:, :, :end].to(self.kept_on, copy=True) for t in layer.key_value))
                layer.key_value = None
            prefix = Prefix(reads, tuple(key_values), states[:, :end].clone())
        except Exception as error:
            if is_out_of_memory(error):
                return  # the group was read all the same; the next one is read anew
            raise
        if work.prefix and work.prefix.reads == reads[: len(work.prefix.reads)]:
            self._prefixes.drop(work.prefix.reads)
        self._prefixes.put(reads, prefix, prefix.nbytes)


def digest(pixels: np.ndarray) -> bytes:
    """Of an image's bytes (H, W, 3), its sides included."""
    return hashlib.sha256(str(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).digest()


def values_digest(image: Image.Image | Tensor) -> bytes | None:
    """Of every value of an image tensor (H, W, C), its shape and dtype included; None for anything else."""
    if not isinstance(image, torch.Tensor) or image.ndim != 3 or not image.is_floating_point():
        return None
    if image.is_meta or image.layout is not torch.strided or not image.numel():
        return None  # the error is to_rgb's
    values = image.detach().cpu().contiguous()
    found = hashlib.sha256(f"{tuple(values.shape)} {values.dtype}".encode())
    found.update(values.view(torch.uint8).numpy())
    return found.digest()


def _in_common(first: Sequence[int | bytes], second: Sequence[int | bytes]) -> int:
    """With how many equal entries two sequences begin."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


class _Steps:
    """Counts blocks, of which a piece of the work is only a part, and tells how much is done."""

    def __init__(self, progress: Callable[[float], None], blocks: int) -> None:
        self.progress, self.blocks, self.done, self.before = progress, blocks, 0.0, 0.0

    def counting(self, part: float) -> Callable[[], None]:
        """To be called after each block of a piece that is this part of the work."""
        self.before = self.done

        def step() -> None:
            self.done = min(self.done + part / self.blocks, 1.0)
            self.progress(self.done)

        return step

    def again(self) -> None:
        """The piece last begun has failed: what it had done is not done."""
        self.done = self.before
