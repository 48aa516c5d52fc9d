"""What a run writes down for people: a progress bar, metrics.csv, TensorBoard, and sheets of sample pictures."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files.atomic_write import atomic_write

if TYPE_CHECKING:
    from PIL import Image

COLUMNS = ("update", "loss", "learning_rate", "gradient_norm", "samples_per_second")


class Records:
    """The main process's records in the run's folder, continued at update `start`; the other processes' are empty."""

    def __init__(self, output: Path, start: int, updates: int, main: bool) -> None:
        from tqdm import tqdm

        self.main, self.folder, self.board = main, output, None
        self.bar = tqdm(total=updates, initial=start, disable=not main, desc=output.name, dynamic_ncols=True)
        if not main:
            return
        from torch.utils.tensorboard import SummaryWriter

        # what a killed run recorded beyond its last saved state is recorded again
        self.board = SummaryWriter(str(output / "tensorboard"), purge_step=start + 1)
        self.metrics = output / "metrics.csv"
        kept = [row for row in read_metrics(self.metrics) if row["update"] <= start]
        with atomic_write(self.metrics) as partial, partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(kept)

    def advance(self) -> None:
        self.bar.update()

    def add(self, update: int, values: Mapping[str, float]) -> None:
        """One line of metrics.csv, one point of every TensorBoard curve."""
        if not self.main:
            return
        self.bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
        with self.metrics.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow({"update": update, **values})
        for name, value in values.items():
            self.board.add_scalar(name, value, update)

    def add_sheet(self, update: int, sheet: Image.Image) -> None:
        """A picture under samples/ and in TensorBoard."""
        (self.folder / "samples").mkdir(exist_ok=True)
        with atomic_write(self.folder / "samples" / f"{update:07}.png") as partial:
            sheet.save(partial, format="PNG")
        self.board.add_image("samples", np.asarray(sheet), update, dataformats="HWC")

    def close(self) -> None:
        self.bar.close()
        if self.board:
            self.board.close()


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.csv as numbers; none where there is no file."""
    if not file.is_file():
        return []
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    return [
        {name: int(value) if name == "update" else float(value) for name, value in row.items()}
        for row in rows
    ]
