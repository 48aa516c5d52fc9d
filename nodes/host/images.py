"""Conversions between the host's IMAGE tensors, single references and PIL images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...easyref_core.utils.area_mean import grid_means

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ...easyref_core.utils.images import Box


class ReferenceGroup(tuple):
    """References in order, each (1, height, width, C), with a mask for each.

    masks: (height, width) of any size, stretched over its reference; None: all of it.
    """

    masks: tuple[Tensor | None, ...]

    def __new__(
        cls, references: Iterable[Tensor], masks: Iterable[Tensor | None] | None = None
    ) -> ReferenceGroup:
        group = super().__new__(cls, references)
        group.masks = (None,) * len(group) if masks is None else tuple(masks)
        return group

    def __reduce__(self) -> tuple[type, tuple]:
        """References of one batch share its memory; pickled, each would contain the whole batch."""
        return type(self), tuple([_compact(each) for each in part] for part in (self, self.masks))

    @classmethod
    def joined(cls, groups: Iterable[ReferenceGroup]) -> ReferenceGroup:
        """All references of several groups, in order."""
        groups = list(groups)
        return cls(
            (one for group in groups for one in group), (one for group in groups for one in group.masks)
        )

    def selected(self, indexes: Iterable[int]) -> ReferenceGroup:
        """The references with these indexes, in their order."""
        pairs = [(self[i], self.masks[i]) for i in indexes]
        return ReferenceGroup(*zip(*pairs, strict=True)) if pairs else ReferenceGroup(())


def _compact(tensor: Tensor | None) -> Tensor | None:
    """The tensor, or a copy if it is a part of a larger one."""
    return tensor if tensor is None or tensor.nbytes == tensor.untyped_storage().nbytes() else tensor.clone()


def split(batch: Tensor) -> list[Tensor]:
    """(batch, height, width, channels) -> single images, each (1, height, width, channels)."""
    return [batch[i : i + 1] for i in range(len(batch))]


def split_group(group: Tensor | tuple[Tensor, ...]) -> ReferenceGroup:
    """The references of an EASYREF_GROUP or an IMAGE batch; those of a batch have no masks."""
    if isinstance(group, ReferenceGroup):
        return group
    return ReferenceGroup(group if isinstance(group, tuple) else split(group))


def split_masks(batches: Iterable[Tensor]) -> list[Tensor]:
    """Masks, each (height, width) or (N, height, width) -> single masks (height, width)."""
    return [mask for batch in batches for mask in batch.reshape(-1, *batch.shape[-2:])]


def cropped(reference: Tensor, mask: Tensor | None, box: Box) -> tuple[Tensor, Tensor | None]:
    """A box of a reference (1, height, width, C) and of its mask, which may have another size."""
    left, top, right, bottom = box
    if mask is not None:
        mask = stretched(mask, reference)[top:bottom, left:right]
    return reference[:, top:bottom, left:right], mask


def stretched(mask: Tensor, reference: Tensor) -> Tensor:
    """A mask at the size of its reference (1, height, width, C); the same object if it has that size."""
    size = reference.shape[1:3]
    return mask if mask.shape == size else grid_means(mask[None], tuple(size))[0].float()


def to_tensor(image: Image.Image) -> Tensor:
    """A PIL image -> IMAGE (1, height, width, 3) in 0..1."""
    return torch.from_numpy(np.asarray(image.convert("RGB")).astype(np.float32) / 255)[None]
