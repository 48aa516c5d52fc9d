"""One row of scores a picture, on disk: pictures.csv when a run is done, parts/<process>.jsonl while it goes on."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TextIO

from ..files.atomic_write import atomic_write
from .images import Exclusion

PICTURES, EXCLUDED, PARTS = "pictures.csv", "excluded.csv", "parts"


@dataclass(frozen=True)
class Row:
    """The scores of one picture. NaN: not measured, by want of an extractor, a prompt or attributes."""

    method: str
    group: str
    category: str
    split: str
    seed: int
    references: int  # how many the method saw
    picture: str  # hash of the picture's file
    scorer: str  # hash of the extractors' identities and of what the picture is compared with
    clip_i_target: float = math.nan
    clip_i_references: float = math.nan
    clip_t_cosine: float = math.nan
    clip_score: float = math.nan
    dino_i_target: float = math.nan
    dino_i_references: float = math.nan
    shared_right: float = math.nan  # part of the references' shared attributes seen in the picture
    named_right: float = math.nan  # part of the prompt's attributes seen in the picture

    @property
    def place(self) -> tuple[str, str, int]:
        """Which picture it is."""
        return self.method, self.group, self.seed


COLUMNS = tuple(field.name for field in fields(Row))
METRICS = COLUMNS[COLUMNS.index("scorer") + 1 :]
NUMBERS = {"seed": int, "references": int, **dict.fromkeys(METRICS, float)}


def read_rows(folder: Path) -> list[Row]:
    """The rows of a results folder; none where it has no pictures.csv."""
    file = folder / PICTURES
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as content:
        reader = csv.DictReader(content)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(
                f"{file} has the columns {reader.fieldnames}; wanted {', '.join(COLUMNS)}. Remove it."
            )
        return [_row(line) for line in reader]


def write_csv(file: Path, columns: Sequence[str], lines: Iterable[dict[str, Any]]) -> None:
    """Write the file whole or not at all; what is NaN becomes an empty field."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as partial, partial.open("w", newline="", encoding="utf-8") as content:
        writer = csv.DictWriter(content, columns, lineterminator="\n")
        writer.writeheader()
        for line in lines:
            writer.writerow({key: _text(value) for key, value in line.items()})


def write_rows(folder: Path, rows: Iterable[Row]) -> None:
    """pictures.csv, in the order of methods, groups and seeds."""
    write_csv(folder / PICTURES, COLUMNS, map(asdict, sorted(rows, key=lambda row: row.place)))


class Part:
    """What one process found, written line by line, so that a killed run loses no more than one line."""

    def __init__(self, folder: Path, rank: int) -> None:
        path = folder / PARTS / f"{rank}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = path.open("w", encoding="utf-8")

    def write(self, *found: Row | Exclusion) -> None:
        for item in found:
            self._file.write(json.dumps({type(item).__name__: asdict(item)}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def take_parts(folder: Path) -> tuple[list[Row], list[Exclusion]]:
    """What the processes found: of a run that just ended, or of one that was killed. The files stay."""
    rows, exclusions = [], []
    for line in _lines(folder):
        if "Row" in line:
            rows.append(Row(**line["Row"]))
        else:
            exclusions.append(Exclusion(**line["Exclusion"]))
    return rows, exclusions


def remove_parts(folder: Path) -> None:
    """Once their rows are in pictures.csv."""
    for file in (folder / PARTS).glob("*.jsonl"):
        file.unlink()
    if (folder / PARTS).is_dir():
        (folder / PARTS).rmdir()


def _lines(folder: Path) -> Iterator[dict[str, Any]]:
    for file in sorted((folder / PARTS).glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except ValueError:  # the last line of a process that was killed
                continue


def _row(line: dict[str, str]) -> Row:
    return Row(
        **{
            key: NUMBERS.get(key, str)(value or "nan") if key in NUMBERS else value
            for key, value in line.items()
        }
    )


def _text(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.6f}"
