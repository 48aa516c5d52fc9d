"""One row of scores per image: pictures.csv after a run, parts/<process>.jsonl during it."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..files.atomic_write import atomic_write
from .images import Exclusion

IMAGES, EXCLUDED, PARTS = "pictures.csv", "excluded.csv", "parts"

Key = tuple[str, str, int]  # method, group, seed


@dataclass(frozen=True)
class Row:
    """Scores of one image; the fields are the columns of pictures.csv. NaN: not measured."""

    method: str
    group: str
    topic: str
    category: str
    split: str
    seed: int
    references: int  # number of references that the method used
    picture: str  # hash of the image file
    scorer: str  # hash of the extractors' identities and of everything that the image is compared with
    clip_i_target: float = math.nan
    clip_i_references: float = math.nan
    clip_t_cosine: float = math.nan
    clip_score: float = math.nan
    dino_i_target: float = math.nan
    dino_i_references: float = math.nan
    subject_target: float = math.nan
    subject_references: float = math.nan
    shared_right: float = math.nan  # fraction of the references' shared attributes that the image shows
    named_right: float = math.nan  # fraction of the prompt's attributes that the image shows

    @property
    def key(self) -> Key:
        return self.method, self.group, self.seed

    @property
    def version(self) -> tuple[str, str]:
        """Changes when the image or its scorer changes."""
        return self.picture, self.scorer


COLUMNS = tuple(field.name for field in fields(Row))
METRICS = COLUMNS[COLUMNS.index("scorer") + 1 :]


def read_rows(folder: Path) -> list[Row]:
    """Load pictures.csv of a results folder; [] if there is none."""
    file = folder / IMAGES
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as content:
        reader = csv.DictReader(content)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(
                f"{file} has the columns {reader.fieldnames}; wanted {', '.join(COLUMNS)}. Remove it and "
                "score again."
            )
        return [_parse_row(line) for line in reader]


def write_csv(file: Path, columns: Sequence[str], lines: Iterable[dict[str, Any]]) -> None:
    """Write a CSV file atomically; NaN becomes an empty field."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as partial, partial.open("w", newline="", encoding="utf-8") as content:
        writer = csv.DictWriter(content, columns, lineterminator="\n")
        writer.writeheader()
        for line in lines:
            writer.writerow({key: _format(value) for key, value in line.items()})


def write_rows(folder: Path, rows: Iterable[Row]) -> None:
    """Write pictures.csv, sorted by method, group and seed."""
    write_csv(folder / IMAGES, COLUMNS, map(asdict, sorted(rows, key=lambda row: row.key)))


def write_part(folder: Path, rank: int, items: Iterable[Row | Exclusion]) -> None:
    """Write the results of one process line by line, so that a killed run loses at most one line."""
    path = folder / PARTS / f"{rank}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", buffering=1) as part:
        for item in items:
            part.write(json.dumps({type(item).__name__: asdict(item)}) + "\n")


def read_parts(folder: Path) -> tuple[list[Row], list[Exclusion]]:
    """Load the results of all processes, of a run that has just ended or was killed."""
    rows, exclusions = [], []
    for file in sorted((folder / PARTS).glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                item = json.loads(line)
            except ValueError:  # the last line of a killed process
                continue
            if "Row" in item:
                rows.append(Row(**item["Row"]))
            else:
                exclusions.append(Exclusion(**item["Exclusion"]))
    return rows, exclusions


def remove_parts(folder: Path) -> None:
    """Remove the files of all processes; call it when their rows are in pictures.csv."""
    shutil.rmtree(folder / PARTS, ignore_errors=True)


def _parse_row(line: dict[str, str]) -> Row:
    numbers = {"seed": int, "references": int, **dict.fromkeys(METRICS, float)}
    return Row(
        **{key: numbers[key](value or "nan") if key in numbers else value for key, value in line.items()}
    )


def _format(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.6f}"
