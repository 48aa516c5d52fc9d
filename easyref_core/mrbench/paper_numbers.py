"""Numbers of the paper's tables (paper_numbers.yaml), which are not comparable with those measured here."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import yaml


class PaperRow(NamedTuple):
    """One row of a table; None if the paper has no number."""

    table: int
    split: str
    method: str
    clip_i: float | None
    clip_t: float | None
    dino_i: float | None
    note: str

    @property
    def scores(self) -> tuple[float | None, ...]:
        return self.clip_i, self.clip_t, self.dino_i


PAPER = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
SOURCE, CAVEATS = PAPER["source"], PAPER["caveats"]
ROWS = tuple(PaperRow(*row) for row in PAPER["rows"])
