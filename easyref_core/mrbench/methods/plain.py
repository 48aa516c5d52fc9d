"""The base model alone: it reads the prompt and sees no reference."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from .method import Method


class Plain(Method):
    """Text only: what every other method must beat on the references, and hold its own against on the prompt."""

    @property
    def settings(self) -> dict[str, Any]:
        return {"kind": "plain"}

    def attach(self, conditions: Sequence[Any], seeds: int) -> AbstractContextManager[None]:
        return nullcontext()
