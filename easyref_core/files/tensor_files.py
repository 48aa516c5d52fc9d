"""Where tensors come from: safetensors, PyTorch .pt / .bin, folders of them. Shapes first, values memory-mapped."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open

from ..utils.errors import shorten

SAFETENSORS_SUFFIXES = (".safetensors", ".sft")
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
ZIP, GGUF = b"PK\x03\x04", b"GGUF"
MAPPED_AT_ONCE = 64 * 2**20  # bytes; more of files above 2 GB, so that none is mapped more than 32 times


class TensorFile(Protocol):
    """A file (or folder of files) of named tensors."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The named tensors, memory-mapped where the file allows it."""
        ...


class Source(NamedTuple):
    """Where one tensor of the model lies: a file and the tensor's name in it."""

    file: TensorFile
    name: str


def open_tensors(path: Path) -> TensorFile:
    """Open a checkpoint file, or a folder of a transformers model, by what is in it.

    Raises FileNotFoundError, or ValueError for a damaged file and for a pickle that holds more than tensors.
    """
    if path.is_dir():
        return FolderOfTensors(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. Give the path of a checkpoint file or of a model's folder."
        )
    if _starts_with(path, GGUF):
        raise ValueError(
            f"{path} is a GGUF file, whatever its name; wanted safetensors or a PyTorch file, not quantized. "
            "Download the .safetensors file."
        )
    return PickledTensors(path) if _is_pickle(path) else SafetensorsFile(path)


def read_sources(sources: Mapping[str, Source]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in the model, tensor) for every source, file by file."""
    by_file: dict[Path, dict[str, list[str]]] = {}
    files = {}
    for name, source in sources.items():
        files[source.file.path] = source.file
        by_file.setdefault(source.file.path, {}).setdefault(source.name, []).append(name)
    for path, wanted in by_file.items():
        for stored, tensor in files[path].read(wanted):
            for name in wanted[stored]:
                yield name, tensor


class SafetensorsFile:
    """One safetensors file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state = _state(path)
        try:
            with safe_open(path, framework="pt") as file:
                self.metadata: Mapping[str, str] = file.metadata() or {}
                self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"{path} is not a complete safetensors file: {shorten(error)} ({path.stat().st_size:,} bytes "
                "on disk). It was cut short or is of another format; download it again."
            ) from error

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        return _read_in_parts(self.path, names, self._map)

    def _map(self) -> Callable[[str], torch.Tensor]:
        try:
            file = safe_open(self.path, framework="pt")
        except SafetensorError:
            _require_unchanged(self.path, self._state)
            raise
        _require_unchanged(self.path, self._state)

        def get(name: str) -> torch.Tensor:
            try:
                return file.get_tensor(name)
            except (SafetensorError, AttributeError) as error:  # a type that this torch has not
                raise ValueError(
                    f"{self.path}: {name} cannot be read ({shorten(error)}). Save the file in float32, "
                    "float16 or bfloat16."
                ) from error

        return get


class PickledTensors:
    """A PyTorch file, loaded with weights_only: nothing but tensors and plain containers is ever unpickled.

    DeepSpeed's mp_rank_00_model_states.pt keeps the model under "module", beside the trainer's own state.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: Mapping[str, str] = {}
        self._state = _state(path)
        tensors = _load_weights_only(path)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self._kept = None if _is_zip(path) else tensors  # what is no zip archive cannot be mapped

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        return _read_in_parts(self.path, names, self._map)

    def _map(self) -> Callable[[str], torch.Tensor]:
        if self._kept:
            return self._kept.__getitem__
        tensors = _load_weights_only(self.path)
        _require_unchanged(self.path, self._state)
        return tensors.__getitem__


class FolderOfTensors:
    """A transformers model folder: one weights file, or several that an index file lists."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: Mapping[str, str] = {}
        self._where = {name: part for part in map(open_tensors, _weight_files(path)) for name in part.shapes}
        self.shapes = {name: part.shapes[name] for name, part in self._where.items()}

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        return read_sources({name: Source(self._where[name], name) for name in names})


def _read_in_parts(
    path: Path, names: Iterable[str], map_file: Callable[[], Callable[[str], torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The named tensors. The file is mapped afresh now and then, which lets go of the pages that were already cast."""
    names, part = list(names), max(MAPPED_AT_ONCE, path.stat().st_size // 32)
    while names:
        get, mapped = map_file(), 0
        while names and mapped < part:
            tensor = get(names[0])
            mapped += tensor.nbytes
            yield names.pop(0), tensor


def _state(path: Path) -> tuple[int, int]:
    """By which another file under the same name is known: bytes, and when they were last written."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _require_unchanged(path: Path, opened: tuple[int, int]) -> None:
    """Tensors of two files must not become one model: a checkpoint is read in several passes, its LoRA when first asked for."""
    if _state(path) != opened:
        raise ValueError(
            f"{path} was replaced or written to after it was opened ({opened[0]:,} bytes then, "
            f"{path.stat().st_size:,} now). Load it again."
        )


def _is_pickle(path: Path) -> bool:
    """By content: a zip archive (PyTorch since 1.6) or a bare pickle. The name is not asked."""
    with path.open("rb") as file:
        start = file.read(9)
    # a safetensors file starts with the length of its header, which may be anything, and then the header
    return start.startswith(ZIP) or (start.startswith(b"\x80") and start[8:] != b"{")


def _is_zip(path: Path) -> bool:
    return _starts_with(path, ZIP)


def _starts_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _load_weights_only(path: Path) -> dict[str, torch.Tensor]:
    """The named tensors of a PyTorch file, of a DeepSpeed file those of the model."""
    # Of a name that ends so, torch 2.13 does not ask what the file is; a file object has no name.
    mapped = _is_zip(path) and path.suffix.lower() not in SAFETENSORS_SUFFIXES
    try:
        with path.open("rb") as file:
            content = torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # damaged pickles and archives end in errors of every kind
        raise ValueError(
            f"{path} is damaged or holds Python objects other than tensors, which could run code when "
            f"loaded, so it was not opened ({_reason(error)}). Use the .safetensors file, or save plain "
            "tensors."
        ) from error
    if isinstance(content, dict) and isinstance(content.get("module"), dict):
        content = content["module"]
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; wanted a dictionary of named tensors.")
    return _only_tensors(
        content
    ) or {  # nested once, as an IP-Adapter's .bin is: not ours, but it can then be named
        f"{part}.{name}": tensor
        for part, inner in content.items()
        if isinstance(inner, dict)
        for name, tensor in _only_tensors(inner).items()
    }


def _only_tensors(content: dict[object, object]) -> dict[str, torch.Tensor]:
    """What has a name and values of its own, one after the other; not what is sparse, quantized or only a shape."""
    return {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, torch.Tensor) and _is_plain(value)
    }


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized


def _reason(error: Exception) -> str:
    """The telling sentence of torch.load's error, without its advice on how to load the file all the same."""
    text = str(error) or type(error).__name__
    found = re.search(r"unsupported .+", text, re.IGNORECASE)
    return shorten((found[0] if found else text.splitlines()[0]).partition(". ")[0].removesuffix("."))


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError naming the file where there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({shorten(error)}). Download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}; wanted a JSON object. Download it again.")
    return content


def _listed_files(index: Path) -> list[Path]:
    """The weight files that an index names, which lie beside it."""
    where = read_json(index).get("weight_map")
    names = list(where.values()) if isinstance(where, dict) else []
    wrong = [name for name in names if not _is_file_name(name)]
    if not names or wrong:
        found = (
            "names no weight files" if not names else f"names {shorten(repr(wrong[0]))} as a file of weights"
        )
        raise ValueError(
            f"{index} {found}; wanted the names of files beside it. Download the whole folder again."
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
    """A name and no path, on any system; an index that somebody else wrote leads nowhere else."""
    return (
        isinstance(name, str)
        and re.fullmatch(r"[\w. +=@-]{1,200}", name) is not None
        and name.strip(". ") != ""
    )


def has_weights(folder: Path) -> bool:
    """Whether a model's folder holds weights in a format that is read here, or an index of such files."""
    return any(index.is_file() for index in _indices(folder)) or bool(_unlisted_files(folder))


def _indices(folder: Path) -> list[Path]:
    return [folder / "model.safetensors.index.json", folder / "pytorch_model.bin.index.json"]


def _unlisted_files(folder: Path) -> list[Path]:
    for suffixes in (SAFETENSORS_SUFFIXES, PICKLE_SUFFIXES):  # beside safetensors, a .bin is no weights file
        if found := sorted(file for suffix in suffixes for file in folder.glob(f"*{suffix}")):
            return found
    return []


def _weight_files(folder: Path) -> list[Path]:
    for index in _indices(folder):
        if index.is_file():
            return _listed_files(index)
    if found := _unlisted_files(folder):
        return found
    raise FileNotFoundError(
        f"{folder} holds no weights (no *.safetensors, no *.bin). Put the MLLM's weight files there."
    )
