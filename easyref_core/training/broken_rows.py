"""Broken rows met while training: skipped, logged once, and counted over all processes up to a limit."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from .rows import MAX_LISTED

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)


class BrokenRows:
    """The rows that the processes skipped since the run started, each counted once.

    Args:
        accelerator: of the run.
        limit: maximum number of rows.
    """

    def __init__(self, accelerator: Accelerator, limit: int) -> None:
        self.accelerator, self.limit = accelerator, limit
        self.local: set[str] = set()  # of this process, since the last synchronization
        self.reasons: set[str] = set()  # of all processes

    def add(self, reasons: Iterable[str]) -> None:
        """Add the reasons of one batch, each with the line of its row."""
        self.local.update(set(reasons) - self.reasons)

    def synchronize(self) -> None:
        """Exchange the new rows, and log them. Every process must call it at the same update.

        Raises ValueError in all processes together if the rows are more than the limit.
        """
        from accelerate.utils import gather_object

        accelerator = self.accelerator
        count = torch.tensor(float(len(self.local)), device=accelerator.device)
        if not accelerator.reduce(count).item():
            return
        new = sorted(set(gather_object(sorted(self.local))) - self.reasons)
        self.reasons.update(new)
        self.local.clear()
        if accelerator.is_main_process:
            for reason in new:
                log.warning("Skipped a row: %s", reason)
        if len(self.reasons) > self.limit:
            raise ValueError(self._summary())

    def _summary(self) -> str:
        listed = sorted(self.reasons)[:MAX_LISTED]
        lines = [f"{len(self.reasons)} rows could not be used; data.max_broken allows {self.limit}:"]
        lines += [f"  {reason}" for reason in listed]
        if len(self.reasons) > len(listed):
            lines.append(f"  and {len(self.reasons) - len(listed)} more.")
        lines.append(
            "Repair the images or raise data.max_broken, then start again to continue from the newest saved "
            "state. data.thorough finds such images before a run."
        )
        return "\n".join(lines)
