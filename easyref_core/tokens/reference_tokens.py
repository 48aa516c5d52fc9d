"""Reference tokens with their provenance."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from ..mllm.context import Provenance


class ReferenceTokens(torch.Tensor):
    """Reference tokens (B, T, C) with their provenance; operations on them return plain tensors.

    B is 1 for one group; a batch has one row for each image or frame, see frames.py.
    """

    provenance: Provenance
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def of(cls, values: Tensor, provenance: Provenance) -> ReferenceTokens:
        """Reference tokens that share memory with `values`."""
        tokens = values.as_subclass(cls)
        tokens.provenance = provenance
        return tokens

    def __deepcopy__(self, memo: dict) -> ReferenceTokens:
        # torch's own raises RuntimeError, because new_empty() of this class returns a plain tensor
        return self.of(self.detach().clone(), self.provenance)
