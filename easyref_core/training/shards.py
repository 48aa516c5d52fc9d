"""Entries of named tensors by key, stored in safetensors shards that are written atomically."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import save_file

from ..files.atomic_write import atomic_write

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 512 * 2**20


class Shards:
    """The shards <part>-<number>.safetensors of a folder, memory-mapped. A tensor's name is <key>.<name>."""

    def __init__(self, folder: Path, part: str) -> None:
        self._files: dict[Path, Any] = {}
        self._names: dict[str, list[str]] = {}
        self._paths: dict[str, Path] = {}
        for path in sorted(folder.glob(f"{part}-*.safetensors")):
            for stored in self._open(path).keys():
                key, _, name = stored.partition(".")
                self._names.setdefault(key, []).append(name)
                self._paths[key] = path

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, key: str) -> bool:
        return key in self._names

    def __getitem__(self, key: str) -> dict[str, Tensor]:
        file = self._open(self._paths[key])
        return {name: file.get_tensor(f"{key}.{name}") for name in self._names[key]}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}  # a data loading process opens its own

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            self._files[path] = safe_open(path, framework="pt")
        return self._files[path]


class ShardWriter:
    """Collects entries, and writes a shard whenever they exceed `max_bytes`; after the existing shards."""

    def __init__(self, folder: Path, part: str, max_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.part, self.max_bytes = folder, part, max_bytes
        self.tensors: dict[str, Tensor] = {}
        self.size = 0

    def add(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.tensors[f"{key}.{name}"] = tensor.detach().cpu().contiguous()
            self.size += tensor.nbytes
        if self.size > self.max_bytes:
            self.flush()

    def flush(self) -> None:
        """Write the collected entries."""
        if self.tensors:
            number = len(list(self.folder.glob(f"{self.part}-*.safetensors")))
            with atomic_write(self.folder / f"{self.part}-{number:05}.safetensors") as partial:
                save_file(self.tensors, partial)
        self.tensors, self.size = {}, 0
