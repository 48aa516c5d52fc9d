"""Log of a run: progress bar, metrics.csv, accelerate's trackers, and sheets of sample images."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files.atomic_write import atomic_write
from .resume import flatten

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL import Image

    from .config import Settings

PROJECT = "easyref"  # of the runs in a tracker
TENSORBOARD = "tensorboard"


def require_trackers(names: Iterable[str]) -> None:
    """Raise ValueError for a tracker that accelerate does not have, or whose package is not installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known, installed = sorted(map(str, LOGGER_TYPE_TO_CLASS)), list(map(str, get_available_trackers()))
    for name in names:
        if name not in known:
            raise ValueError(f"trackers has {name!r}, expected one of {', '.join(known)}.")
        if name not in installed:
            raise ValueError(
                f"trackers has {name!r}, whose package is not installed. Run pip install {name}, or remove "
                "it from trackers."
            )


class RunLog:
    """Log in the run's output folder, resumed after update `start`. Only the main process writes."""

    def __init__(self, settings: Settings, accelerator: Accelerator, start: int) -> None:
        from tqdm import tqdm

        self.folder, self.accelerator = settings.output, accelerator
        self.metrics, self.columns = settings.output / "metrics.csv", ["update"]
        main = accelerator.is_main_process
        self.bar = tqdm(
            total=settings.updates,
            initial=start,
            disable=not main,
            desc=settings.output.name,
            dynamic_ncols=True,
        )
        # entries of a killed run after its last saved state are purged, because those updates run again
        if main:
            self._rewrite([row for row in read_metrics(self.metrics) if row["update"] <= start])
        options = {name: dict(value or {}) for name, value in settings.trackers.items()}
        if TENSORBOARD in options:
            options[TENSORBOARD].setdefault("purge_step", start + 1)
        accelerator.init_trackers(PROJECT, init_kwargs=options)
        for tracker in accelerator.trackers:
            # TensorBoard's would add a run for each start
            if tracker.name != TENSORBOARD:
                tracker.store_init_configuration(flatten(settings))

    def advance(self) -> None:
        """Advance the progress bar by one update."""
        self.bar.update()

    def log(self, update: int, values: Mapping[str, float]) -> None:
        """Append a line to metrics.csv and a point to the curves of every tracker."""
        if self.accelerator.is_main_process:
            if "loss" in values:
                self.bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
            if not values.keys() <= set(self.columns):
                self._rewrite(read_metrics(self.metrics), values)
            with self.metrics.open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self.columns).writerow({"update": update, **values})
        self.accelerator.log(dict(values), step=update)

    def log_samples(self, update: int, sheet: Image.Image) -> None:
        """Write a sheet to samples/ and to the trackers that take images."""
        (self.folder / "samples").mkdir(exist_ok=True)
        with atomic_write(self.folder / "samples" / f"{update:07}.png") as partial:
            sheet.save(partial, format="PNG")
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                options = {"dataformats": "NHWC"} if tracker.name == TENSORBOARD else {}
                tracker.log_images({"samples": np.asarray(sheet)[None]}, step=update, **options)

    def close(self) -> None:
        self.bar.close()
        # Accelerator.end_training would also end the processes' group, which the next stage needs
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def _rewrite(self, rows: list[dict[str, Any]], new: Iterable[str] = ()) -> None:
        """Write metrics.csv with the columns of the rows and the `new` ones."""
        self.columns = list(dict.fromkeys([*self.columns, *(name for row in rows for name in row), *new]))
        with atomic_write(self.metrics) as partial, partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.csv as numbers, without empty cells; empty if the file does not exist."""
    if not file.is_file():
        return []
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    return [
        {name: int(value) if name == "update" else float(value) for name, value in row.items() if value}
        for row in rows
    ]
