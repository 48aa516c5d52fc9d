"""The base model alone, conditioned on the prompt and no reference."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from .method import Method


class Plain(Method):
    """Text only: the lower bound for similarity to the references, and the upper bound for the prompt."""

    kind = "plain"

    def attach(self, conditions: Sequence[Any], seeds: int) -> AbstractContextManager[None]:
        return nullcontext()
