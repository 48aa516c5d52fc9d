"""Checkpoint files: safetensors, and PyTorch's with and without a zip archive around them."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

import easyref_core as er
from devkit import golden

from .cases import Case
from .mutations import ODD, broken_bytes
from .safetensors_files import broken_file, steady

TINY = golden.ROOT / "easyref_core" / "tiny" / "weights"


@torch.inference_mode()
def used(path: Path, mllm: Path, size: int = 56) -> object:
    """Everything that a checkpoint is for: loaded, a group encoded and aggregated, keys and values made."""
    model = er.load(path, mllm)
    context = model.encode(golden.references()[:1], "a cat", size=size)
    tokens = model.aggregate(context)
    keys = model.key_values(tokens)
    return [context.states, tokens, keys[0]]


class Cases:
    """Files of the golden checkpoint, of our own format and of the shipped tiny model, broken."""

    readable = None
    writable = ()

    def __init__(self, folder: Path) -> None:
        own = folder / "own.safetensors"
        er.load(golden.CHECKPOINT, golden.MLLM).save(own)
        self.files = {
            "released": (golden.CHECKPOINT.read_bytes(), golden.MLLM, 56),
            "own": (steady(own.read_bytes()), golden.MLLM, 56),
            "tiny": ((TINY / "tiny_easyref.safetensors").read_bytes(), TINY / "tiny-qwen2-vl", 64),
        }
        tensors = golden.checkpoint_tensors()
        golden.write_deepspeed(folder / "zip.pt", tensors)
        torch.save({"module": tensors}, folder / "old.pt", _use_new_zipfile_serialization=False)
        self.pickles = {name: (folder / f"{name}.pt").read_bytes() for name in ("zip", "old")}
        self.tensors = tensors

    def good(self) -> object:
        return used(golden.CHECKPOINT, golden.MLLM)

    def make(self, random: Random, folder: Path) -> Case:
        if random.random() < 0.7:
            name = random.choice(["released", "own", "own", "tiny"])
            data, mllm, size = self.files[name]
            how, broken = broken_file(data, random)
            path = folder / random.choice(["c.safetensors", "c.sft", "c.pt"])
            path.write_bytes(broken)
            return Case(f"{name} checkpoint, {how}", lambda: used(path, mllm, size))
        path = folder / random.choice(["c.pt", "c.bin", "c.safetensors"])
        how = self._write_pickle(path, random)
        marker = folder.parent / "ran"

        def call() -> object:
            result = used(path, golden.MLLM)
            if marker.exists():
                raise AssertionError("code in the pickle ran")
            return result

        return Case(f"PyTorch file, {how}", call)

    def _write_pickle(self, path: Path, random: Random) -> str:
        kind = random.choice(["bytes", "bytes", "records", "content", "content", "code"])
        if kind == "bytes":
            name = random.choice(list(self.pickles))
            how, broken = broken_bytes(self.pickles[name], random)
            path.write_bytes(broken)
            return f"{name}, {how}"
        if kind == "records":
            return _broken_records(self.pickles["zip"], path, random)
        if kind == "content":
            how, content = broken_content(self.tensors, random)
        else:
            how, content = "code", {"module": self.tensors, "x": code(path.parent.parent / "ran", random)}
        protocol = random.choice([2, 2, 3, 4])
        torch.save(
            content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=random.random() < 0.5
        )
        return f"{how}, protocol {protocol}"


class Payload:
    """An object that calls something when it is unpickled."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple:
        return self.reduced


def code(marker: Path, random: Random) -> Payload:
    return random.choice(
        [
            Payload(os.mkdir, str(marker)),
            Payload(os.system, f"touch {marker}"),
            Payload(eval, f"open({str(marker)!r}, 'w')"),
            Payload(exec, f"open({str(marker)!r}, 'w')"),
            Payload(getattr, "a", "upper"),
            Payload(torch.load, str(marker)),
            Payload(torch.hub.load, "a/b", "c"),
            Payload(Path, "a"),
            Payload(pickle.loads, b"cos\nmkdir\n."),
        ]
    )


def broken_content(tensors: golden.Tensors, random: Random) -> tuple[str, object]:
    """What a PyTorch file may hold in place of named tensors."""
    name = random.choice(list(tensors))
    tensor = tensors[name]
    others: dict[str, Callable[[], object]] = {
        "tensor": lambda: tensor,
        "list": lambda: list(tensors.values())[:3],
        "numbered": lambda: dict(enumerate(tensors.values())),
        "odd keys": lambda: {None: tensor, (1, 2): tensor, 1.5: tensor, **tensors},
        "odd keys inside": lambda: {"module": {3: tensor, None: tensor, **tensors}},
        "ordered": lambda: OrderedDict(tensors),
        "module of a module": lambda: {"module": {"module": tensors}},
        "module that is none": lambda: {"module": random.choice(ODD), **tensors},
        "odd value": lambda: tensors | {name: random.choice(ODD)},
        "parameter": lambda: tensors | {name: torch.nn.Parameter(tensor)},
        "sparse": lambda: tensors | {name: tensor.float().to_sparse()},
        "complex": lambda: tensors | {name: tensor.to(torch.complex64)},
        "integers": lambda: tensors | {name: tensor.to(torch.int8)},
        "bool": lambda: tensors | {name: tensor > 0},
        "float8": lambda: tensors | {name: tensor.to(torch.float8_e4m3fn)},
        "double": lambda: tensors | {name: tensor.double() * 1e300},
        "NaN": lambda: tensors | {name: torch.full_like(tensor, torch.nan)},
        "inf": lambda: tensors | {name: torch.full_like(tensor, torch.inf)},
        "empty tensor": lambda: tensors | {name: tensor[:0]},
        "number": lambda: tensors | {name: tensor.flatten()[0]},
        "strided": lambda: tensors | {name: tensor.flatten()[:1].expand(tensor.shape)},
        "meta": lambda: tensors | {name: tensor.to("meta")},
        "huge on meta": lambda: tensors | {name: torch.empty(10**9, 10**5, device="meta")},
        "quantized": lambda: tensors | {name: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)},
        "names with module.": lambda: {f"module.{n}": t for n, t in tensors.items()},
        "half the tensors": lambda: dict(random.sample(sorted(tensors.items()), len(tensors) // 2)),
        "nothing": lambda: {},
    }
    how = random.choice(list(others))
    return f"{how} ({name})", others[how]()


def _broken_records(data: bytes, path: Path, random: Random) -> str:
    """A zip archive whose records are missing, cut, compressed, doubled or named otherwise."""
    source = zipfile.ZipFile(io.BytesIO(data))
    names = source.namelist()
    chosen = random.choice(names if random.random() < 0.5 else [n for n in names if "/data/" not in n])
    what = random.choice(["missing", "cut", "empty", "compressed", "twice", "renamed", "broken", "none"])
    with zipfile.ZipFile(
        path, "w", zipfile.ZIP_DEFLATED if what == "compressed" else zipfile.ZIP_STORED
    ) as made:
        for name in names if what != "none" else []:
            content, written = source.read(name), name
            if name == chosen:
                if what == "missing":
                    continue
                content = {"cut": content[:-1], "empty": b"", "broken": broken_bytes(content, random)[1]}.get(
                    what, content
                )
                written = random.choice(["../x", "/x", "x", f"{name}x"]) if what == "renamed" else name
            made.writestr(written, content)
            if name == chosen and what == "twice":
                made.writestr(written, content)
    return f"record {chosen} {what}"
