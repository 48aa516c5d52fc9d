"""Parquet shards of rows with the bytes of their image files: writer, manifest, and reader of row groups.

Columns: images (path and bytes of each file, as Hugging Face datasets stores them), target (an index into
images; null: one of the references is held out), references (indices; empty: the target's face), texts, face
(x1, y1, x2, y2 or null) and line (of the row in its JSON file). A row group of a few rows is read alone, so
rows can be shuffled without reading whole shards. The manifest has the number of rows of each shard, so a run
starts without looking into any. A folder of shards is local, or a URL that fsspec opens: s3://, https:// and
others.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files.atomic_write import atomic_write, atomic_write_text
from .rows import InvalidRow, Row

if TYPE_CHECKING:
    import pyarrow

MANIFEST = "shards.json"
SHARD_ROWS, ROW_GROUP_SIZE = 1024, 64
MAX_TRIES = 3  # of reading a row group from a URL
RETRY_SECONDS = 1.0  # before the second try; doubled before each later one


@dataclass(frozen=True)
class StoredImage:
    """An image file in a shard."""

    name: str
    content: bytes

    def buffer(self) -> BytesIO:
        return BytesIO(self.content)


@dataclass(frozen=True, slots=True)
class StoredRow(Row):
    """A row whose files are StoredImages. shard: its shard and row number, for errors."""

    shard: str = ""

    @property
    def where(self) -> str:
        return f"{self.shard} (line {self.line} of its rows)"


@dataclass(frozen=True)
class ParquetShards:
    """The shards of a folder or URL, by their manifest."""

    url: str
    names: tuple[str, ...]
    rows: tuple[int, ...]  # of each shard
    row_group_size: int  # rows of a row group; the last one of a shard may have fewer
    max_references: int
    digest: str  # of the manifest

    @cached_property
    def first_row_groups(self) -> np.ndarray:
        """Number of each shard's first row group, and that of all row groups at the end."""
        return np.concatenate([[0], np.cumsum(-(-np.array(self.rows) // self.row_group_size))])

    @cached_property
    def row_group_sizes(self) -> np.ndarray:
        """Number of rows of each row group, shard after shard."""
        counts = np.full(self.first_row_groups[-1], self.row_group_size)
        last = self.first_row_groups[1:] - 1
        counts[last] -= np.diff(self.first_row_groups) * self.row_group_size - np.array(self.rows)
        return counts

    def locate(self, group: int) -> tuple[str, int]:
        """Name of a row group's shard, and its number there."""
        shard = int(np.searchsorted(self.first_row_groups, group, side="right")) - 1
        return self.names[shard], group - int(self.first_row_groups[shard])

    def read_row_group(self, group: int) -> pyarrow.Table:
        """Read a row group. Raises InvalidRow if it cannot be read; from a URL after MAX_TRIES tries."""
        import fsspec
        from fsspec.implementations.local import LocalFileSystem
        from pyarrow.parquet import ParquetFile

        name, number = self.locate(group)
        files, path = fsspec.url_to_fs(f"{self.url}/{name}")
        tries = 0
        while True:
            tries += 1
            try:
                # pyarrow reads whole column chunks itself, so read-ahead would fetch bytes twice
                with files.open(path, mode="rb", cache_type="none") as file:
                    parquet = ParquetFile(file, page_checksum_verification=True, pre_buffer=True)
                    table = parquet.read_row_group(number, use_threads=False)
                return _require_rows(table, int(self.row_group_sizes[group]))
            except Exception as error:  # of fsspec's file systems, aiohttp, botocore and Arrow
                if tries == MAX_TRIES or isinstance(files, LocalFileSystem):
                    reason = f"row group {number} of {self.url}/{name} cannot be read"
                    raise InvalidRow(f"{reason} ({type(error).__name__}: {error})") from error
                time.sleep(RETRY_SECONDS * 2 ** (tries - 1))

    def row(self, table: pyarrow.Table, group: int, index: int) -> StoredRow:
        """A row of a table that `read_row_group` returned."""
        name, number = self.locate(group)
        [fields] = table.slice(index, 1).to_pylist()
        images = [StoredImage(image["path"], image["bytes"]) for image in fields["images"]]
        return StoredRow(
            fields["line"],
            None if fields["target"] is None else images[fields["target"]],
            tuple(images[i] for i in fields["references"]),
            tuple(fields["texts"]),
            face=fields["face"] and tuple(fields["face"]),
            shard=f"{self.url}/{name}, row {number * self.row_group_size + index}",
        )


def open_shards(url: str) -> ParquetShards:
    """Read the manifest of a folder or URL. Raises FileNotFoundError or ValueError if it has none."""
    _require_pyarrow()
    import fsspec

    url = url.rstrip("/")
    try:
        with fsspec.open(f"{url}/{MANIFEST}", mode="rb") as file:
            content = file.read()
    except ImportError as error:
        raise ValueError(
            f"{url} cannot be opened: {error}. Install the package that it names (s3fs for s3://)."
        ) from error
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{url} has no {MANIFEST}, the last file that the command shards writes. Set data.stream.sources "
            "to folders or URLs of shards, or let the command finish."
        ) from error
    try:
        manifest = json.loads(content)
        shards = manifest["shards"]
        names, rows = (tuple(shard[key] for shard in shards) for key in ("name", "rows"))
        counts = manifest["row_group_size"], manifest["max_references"]
        if not rows or min(*rows, *counts) < 1:
            raise ValueError("a number of rows is below 1")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{url}/{MANIFEST} is not a manifest of shards ({type(error).__name__}: {error}). Write the "
            "shards again by the command shards."
        ) from error
    return ParquetShards(url, names, rows, *counts, hashlib.sha256(content).hexdigest())


def write_shards(
    rows: Iterable[Row],
    root: Path,
    folder: Path,
    shard_rows: int = SHARD_ROWS,
    row_group_size: int = ROW_GROUP_SIZE,
) -> ParquetShards:
    """Write rows and their image files to shards in a folder, and their manifest last.

    shard_rows is rounded up to whole row groups. Memory is that of one row group. Raises ValueError for a
    folder that has shards.
    """
    _require_pyarrow()
    for name, value in (("shard-rows", shard_rows), ("row-group-size", row_group_size)):
        if value < 1:
            raise ValueError(f"--{name} is {value}, expected 1 or more.")
    if (folder / MANIFEST).exists():
        raise ValueError(f"{folder} has shards already. Delete them, or choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    rows, shards, max_references = iter(rows), [], 1
    while group := list(islice(rows, row_group_size)):
        name, count = f"{len(shards):05}.parquet", 0
        with atomic_write(folder / name) as partial, _writer(partial) as writer:
            while group:
                max_references = max(max_references, *map(_references, group))
                writer.write_table(_table(group, root))
                count += len(group)
                group = list(islice(rows, row_group_size)) if count < shard_rows else []
        shards.append({"name": name, "rows": count})
    manifest = {"row_group_size": row_group_size, "max_references": max_references, "shards": shards}
    atomic_write_text(folder / MANIFEST, json.dumps(manifest, indent=1))
    return open_shards(str(folder))


def _references(row: Row) -> int:
    """References of a row's samples; of a group without a target, one image is held out."""
    return len(row.references) - (row.target is None)


def _writer(path: Path) -> Any:
    from pyarrow.parquet import ParquetWriter

    # image files are compressed already
    return ParquetWriter(path, _schema(), compression="none", use_dictionary=False, write_page_checksum=True)


def _table(rows: Iterable[Row], root: Path) -> pyarrow.Table:
    import pyarrow

    return pyarrow.Table.from_pylist([_fields(row, root) for row in rows], _schema())


def _schema() -> pyarrow.Schema:
    import pyarrow as pa

    image = pa.struct({"path": pa.string(), "bytes": pa.large_binary()})
    return pa.schema(
        {
            "images": pa.list_(image),
            "target": pa.int32(),
            "references": pa.list_(pa.int32()),
            "texts": pa.list_(pa.string()),
            "face": pa.list_(pa.float64()),
            "line": pa.int64(),
        }
    )


def _fields(row: Row, root: Path) -> Mapping[str, Any]:
    """Columns of a row; a file that is target and reference is stored once."""
    files = dict.fromkeys((*([row.target] if row.target else []), *row.references))
    index = {file: i for i, file in enumerate(files)}
    return {
        "images": [{"path": file, "bytes": (root / file).read_bytes()} for file in files],
        "target": index.get(row.target),
        "references": [index[file] for file in row.references],
        "texts": list(row.texts),
        "face": row.face,
        "line": row.line,
    }


def _require_rows(table: pyarrow.Table, expected: int) -> pyarrow.Table:
    if len(table) != expected:
        raise ValueError(f"it has {len(table)} rows, but the manifest has {expected}")
    return table


def _require_pyarrow() -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "Streaming needs pyarrow, which is not installed. Run pip install -e '.[train,train-stream]', or "
            "set data.rows in place of data.stream."
        ) from error
