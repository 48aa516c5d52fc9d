"""Log of a run: progress bar, metrics.csv, TensorBoard, and sheets of sample images.

TensorBoard is written directly, because the API of accelerate's trackers differs between its versions and
they write neither a CSV nor atomically.
"""

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


class RunLog:
    """Log in the run's output folder, resumed after update `start`. Only the main process writes."""

    def __init__(self, output: Path, start: int, updates: int, main: bool) -> None:
        from tqdm import tqdm

        self.folder, self.metrics, self.board = output, output / "metrics.csv", None
        self.bar = tqdm(total=updates, initial=start, disable=not main, desc=output.name, dynamic_ncols=True)
        if not main:
            return
        from torch.utils.tensorboard import SummaryWriter

        # entries of a killed run after its last saved state are purged, because those updates run again
        self.board = SummaryWriter(str(output / "tensorboard"), purge_step=start + 1)
        retained = [row for row in read_metrics(self.metrics) if row["update"] <= start]
        with atomic_write(self.metrics) as partial, partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(retained)

    def advance(self) -> None:
        """Advance the progress bar by one update."""
        self.bar.update()

    def log(self, update: int, values: Mapping[str, float]) -> None:
        """Append a line to metrics.csv and a point to every TensorBoard curve."""
        if not self.board:
            return
        self.bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
        with self.metrics.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow({"update": update, **values})
        for name, value in values.items():
            self.board.add_scalar(name, value, update)

    def log_samples(self, update: int, sheet: Image.Image) -> None:
        """Write a sheet to samples/ and to TensorBoard."""
        (self.folder / "samples").mkdir(exist_ok=True)
        with atomic_write(self.folder / "samples" / f"{update:07}.png") as partial:
            sheet.save(partial, format="PNG")
        self.board.add_image("samples", np.asarray(sheet), update, dataformats="HWC")

    def close(self) -> None:
        self.bar.close()
        if self.board:
            self.board.close()


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.csv as numbers; empty if the file does not exist."""
    if not file.is_file():
        return []
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    return [
        {name: int(value) if name == "update" else float(value) for name, value in row.items()}
        for row in rows
    ]
