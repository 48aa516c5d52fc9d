"""The state of a pretraining on disk, from which an interrupted one continues bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..files.atomic_write import atomic_write


class Stateful(Protocol):
    """A model, an optimizer, or an average of weights."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


@dataclass
class TrainingState:
    """Everything that an update changes: parts with a state, the generator of the data, and torch's own."""

    file: Path
    parts: Mapping[str, Stateful]
    generator: np.random.Generator

    def save(self, step: int) -> None:
        """Write the state before a step."""
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        generators = {"numpy": self.generator.bit_generator.state, "torch": torch.get_rng_state()}
        with atomic_write(self.file) as partial:
            torch.save({"step": step, "parts": parts, **generators}, partial)

    def restore(self) -> int:
        """Read the state and return the next step; 0 where none was saved."""
        if not self.file.is_file():
            return 0
        saved = torch.load(self.file, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(saved["parts"][name])
        self.generator.bit_generator.state = saved["numpy"]
        torch.set_rng_state(saved["torch"])
        return saved["step"]
