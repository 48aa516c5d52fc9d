"""Files of named tensors: safetensors, PyTorch .pt / .bin, folders of them.

Names and shapes are read when a file is opened. Values are memory-mapped when they are read.
"""

from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open

from ..utils.errors import shorten

SAFETENSORS_SUFFIXES = (".safetensors", ".sft")
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
ZIP_MAGIC, GGUF_MAGIC = b"PK\x03\x04", b"GGUF"
MAPPED_BYTES = 64 * 2**20  # of one mapping; more for files above 2 GB
MAX_MAPPINGS = 32  # of one file in a pass


class TensorFile(Protocol):
    """A file (or folder of files) of named tensors."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The named tensors, memory-mapped where the format allows it."""
        ...

    def require_not_cut(self) -> None:
        """Raises ValueError if the file was made shorter since it was opened.

        Reading the missing part of its mapping would end the process (SIGBUS). A file that was replaced or
        deleted stays mapped, complete.
        """
        ...


class Source(NamedTuple):
    """The source of one tensor of the model: a file and the tensor's name in it."""

    file: TensorFile
    name: str


def open_tensors(path: Path) -> TensorFile:
    """Open a checkpoint file or a transformers model folder. The content decides the format, not the name.

    Raises FileNotFoundError, or ValueError for a damaged file and for a pickle that holds more than tensors.
    """
    if path.is_dir():
        return FolderOfTensors(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. Give the path of a checkpoint file or of a model's folder."
        )
    if _starts_with(path, GGUF_MAGIC):
        raise ValueError(
            f"{path} is a GGUF file, whatever its name; wanted safetensors or a PyTorch file, not quantized. "
            "Download the .safetensors file."
        )
    return PickledTensors(path) if _is_pickle(path) else SafetensorsFile(path)


def read_sources(sources: Mapping[str, Source]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in the model, tensor) for each source, file by file."""
    files: dict[Path, tuple[TensorFile, dict[str, list[str]]]] = {}
    for name, (file, stored) in sources.items():
        files.setdefault(file.path, (file, {}))[1].setdefault(stored, []).append(name)
    for file, names in files.values():
        for stored, tensor in file.read(names):
            for name in names[stored]:
                yield name, tensor


class _MappedFile:
    """A file that is mapped again for each pass over its tensors."""

    metadata: Mapping[str, str] = {}

    def __init__(self, path: Path) -> None:
        self.path, self._version, self._inode = path, _version(path), _inode(path.stat())

    def _map(self) -> Callable[[str], torch.Tensor]:
        """Map the file: name -> tensor."""
        raise NotImplementedError

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The named tensors. Each new mapping releases the pages of the tensors that are already cast."""
        names, size = list(names), max(MAPPED_BYTES, self.path.stat().st_size // MAX_MAPPINGS)
        while names:
            get, mapped = self._map(), 0
            while names and mapped < size:
                tensor = get(names[0])
                mapped += tensor.nbytes
                yield names.pop(0), tensor

    def require_not_cut(self) -> None:
        try:
            now = self.path.stat()
        except FileNotFoundError:
            return
        opened = self._version[0]
        if _inode(now) == self._inode and now.st_size < opened:
            raise ValueError(
                f"{self.path} was made shorter while it was in use ({opened:,} bytes when it was opened, "
                f"{now.st_size:,} now). Download or copy it again under another name, rename it, and load it "
                "again."
            )

    def _require_unchanged(self) -> None:
        """Raises ValueError if the file was replaced: a model must not hold tensors of two files."""
        if _version(self.path) != self._version:
            raise ValueError(
                f"{self.path} was replaced or written to after it was opened ({self._version[0]:,} bytes "
                f"then, {self.path.stat().st_size:,} now). Load it again."
            )


class SafetensorsFile(_MappedFile):
    """One safetensors file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            with safe_open(path, framework="pt") as file:
                self.metadata = file.metadata() or {}
                self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(
                f"{path} is not a complete safetensors file: {shorten(error)} ({path.stat().st_size:,} bytes "
                "on disk). It was cut short or is of another format; download it again."
            ) from error

    def _map(self) -> Callable[[str], torch.Tensor]:
        try:
            file = safe_open(self.path, framework="pt")
        finally:  # a file that was replaced may not open either
            self._require_unchanged()

        def get(name: str) -> torch.Tensor:
            try:
                return file.get_tensor(name)
            except (SafetensorError, AttributeError) as error:  # a dtype that this torch does not have
                raise ValueError(
                    f"{self.path}: {name} cannot be read ({shorten(error)}). Save the file in float32, "
                    "float16 or bfloat16."
                ) from error

        return get


class PickledTensors(_MappedFile):
    """A PyTorch file, loaded with weights_only: only tensors and plain containers are unpickled.

    DeepSpeed's mp_rank_00_model_states.pt keeps the model under "module", beside the trainer's state.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        tensors = _load_weights_only(path)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        # only a zip archive can be mapped
        self._in_memory = None if _starts_with(path, ZIP_MAGIC) else tensors

    def _map(self) -> Callable[[str], torch.Tensor]:
        if self._in_memory:
            return self._in_memory.__getitem__
        tensors = _load_weights_only(self.path)
        self._require_unchanged()
        return tensors.__getitem__


class FolderOfTensors:
    """A transformers model folder: one weights file, or several that an index file lists."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: Mapping[str, str] = {}
        self._files = {name: file for file in map(open_tensors, _weight_files(path)) for name in file.shapes}
        self.shapes = {name: file.shapes[name] for name, file in self._files.items()}

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        return read_sources({name: Source(self._files[name], name) for name in names})

    def require_not_cut(self) -> None:
        for file in {file.path: file for file in self._files.values()}.values():
            file.require_not_cut()


def copy_to_pages(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy in memory pages of its own.

    They return to the system when the copy is freed; heap memory would mostly stay.
    """
    pages = mmap.mmap(-1, tensor.numel() * dtype.itemsize)
    return torch.frombuffer(pages, dtype=dtype).view(tensor.shape).copy_(tensor)


def _version(path: Path) -> tuple[int, int]:
    """Size in bytes and modification time, which distinguish a replaced file from the opened one."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _inode(stat: os.stat_result) -> tuple[int, int]:
    """Device and number of a file, which a file that replaces it does not share."""
    return stat.st_dev, stat.st_ino


def _is_pickle(path: Path) -> bool:
    """Return True if the content is a zip archive (PyTorch since 1.6) or a bare pickle."""
    with path.open("rb") as file:
        start = file.read(9)
    # a safetensors file starts with the length of its header, which may be any 8 bytes, and then the header
    return start.startswith(ZIP_MAGIC) or (start.startswith(b"\x80") and start[8:] != b"{")


def _starts_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _load_weights_only(path: Path) -> dict[str, torch.Tensor]:
    """The named tensors of a PyTorch file; the model's tensors of a DeepSpeed file."""
    # torch 2.13 takes the format from a safetensors suffix. A file object has no name, but cannot be mapped.
    mapped = _starts_with(path, ZIP_MAGIC) and path.suffix.lower() not in SAFETENSORS_SUFFIXES
    try:
        with path.open("rb") as file:
            content = torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # damaged pickles and archives raise errors of every kind
        raise ValueError(
            f"{path} is damaged or holds Python objects other than tensors, which could run code when "
            f"loaded, so it was not opened ({_reason(error)}). Use the .safetensors file, or save plain "
            "tensors."
        ) from error
    if isinstance(content, dict) and isinstance(content.get("module"), dict):
        content = content["module"]
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; wanted a dictionary of named tensors.")
    # An IP-Adapter's .bin is nested once. Its names let the error say what the file is.
    return _only_tensors(content) or {
        f"{group}.{name}": tensor
        for group, inner in content.items()
        if isinstance(inner, dict)
        for name, tensor in _only_tensors(inner).items()
    }


def _only_tensors(content: dict[object, object]) -> dict[str, torch.Tensor]:
    """The named tensors with plain values: not sparse, quantized or on the meta device."""
    return {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, torch.Tensor) and _is_plain(value)
    }


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized


def _reason(error: Exception) -> str:
    """The cause in torch.load's error, without its advice to load the file unsafely."""
    text = str(error) or type(error).__name__
    cause = re.search(r"unsupported .+", text, re.IGNORECASE)
    return shorten((cause[0] if cause else text.splitlines()[0]).partition(". ")[0].removesuffix("."))


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError naming the file if it holds anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({shorten(error)}). Download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}; wanted a JSON object. Download it again.")
    return content


def has_weights(folder: Path) -> bool:
    """Return True if a model's folder holds weights in a readable format, or an index of such files."""
    return bool(_indices(folder) or _unlisted_files(folder))


def _weight_files(folder: Path) -> list[Path]:
    if indices := _indices(folder):
        return _listed_files(indices[0])
    if files := _unlisted_files(folder):
        return files
    raise FileNotFoundError(
        f"{folder} holds no weights (no *.safetensors, no *.bin). Put the MLLM's weight files there."
    )


def _indices(folder: Path) -> list[Path]:
    names = "model.safetensors.index.json", "pytorch_model.bin.index.json"
    return [folder / name for name in names if (folder / name).is_file()]


def _unlisted_files(folder: Path) -> list[Path]:
    # a .bin beside safetensors is not a weights file
    for suffixes in (SAFETENSORS_SUFFIXES, PICKLE_SUFFIXES):
        if files := sorted(file for suffix in suffixes for file in folder.glob(f"*{suffix}")):
            return files
    return []


def _listed_files(index: Path) -> list[Path]:
    """The weight files that an index names, which are in its folder."""
    weight_map = read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    paths = [name for name in names if not _is_file_name(name)]
    if not names or paths:
        fault = f"names {shorten(repr(paths[0]))} as a file of weights" if paths else "names no weight files"
        raise ValueError(
            f"{index} {fault}; wanted the names of files beside it. Download the whole folder again."
        )
    files = [index.parent / name for name in sorted(set(names))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index.parent} lacks {shorten(', '.join(missing))}, which {index.name} names. Download the "
            "whole folder again."
        )
    return files


def _is_file_name(name: object) -> bool:
    """Return True for a file name without a path: an index must not point outside its folder."""
    return (
        isinstance(name, str)
        and re.fullmatch(r"[\w. +=@-]{1,200}", name) is not None
        and name.strip(". ") != ""
    )
