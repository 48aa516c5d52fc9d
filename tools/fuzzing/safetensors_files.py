"""Safetensors files with a broken header, or with tensors that do not belong."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

from .mutations import ODD, broken_bytes, broken_json, broken_value

DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F4",
    "F6_E2M3",
    "C64",
    "I64",
    "I32",
    "I16",
]
DTYPES += ["I8", "U8", "U16", "U64", "BOOL", "f32", "", "F128"]
NUMBERS = [0, 1, -1, 7, 2**31, 2**32 + 1, 2**63 - 1, 2**63, 2**64, 2**64 + 8, 10**30, 0.5, "3", None, True]
METADATA = "__metadata__"

Header = dict[str, Any]


def taken_apart(data: bytes) -> tuple[Header, bytes]:
    """Header and body of a good file."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def steady(data: bytes) -> bytes:
    """A good file with its header in one order: the library writes metadata in another each time."""
    header, body = taken_apart(data)
    return put_together(json.dumps(header, sort_keys=True).encode(), body)


def put_together(header: bytes, body: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length % 2**64) + header + body


def broken_file(data: bytes, random: Random) -> tuple[str, bytes]:
    """A safetensors file that is broken: its bytes, its header's length, its header."""
    header, body = taken_apart(data)
    text = json.dumps(header).encode()
    what = random.choice(["bytes", "bytes", "length", "json", "entry", "entry", "names", "names", "metadata"])
    if what == "bytes":
        return broken_bytes(data, random)
    if what == "length":
        length = random.choice(
            [0, 1, len(text) - 1, len(text) + 1, 2**31, 2**63, 2**64 - 1, len(data) - 8, -8]
        )
        return f"header length {length}", put_together(text, body, length)
    if what == "json":
        how, text = broken_json(header, random)
        return how, put_together(text, body)
    how, header, body = {"entry": broken_entry, "names": broken_names, "metadata": broken_metadata}[what](
        header, body, random
    )
    return how, put_together(json.dumps(header).encode(), body)


def broken_entry(header: Header, body: bytes, random: Random) -> tuple[str, Header, bytes]:
    """One tensor's dtype, shape or place."""
    name = random.choice([name for name in header if name != METADATA])
    entry = dict(header[name])
    start, end = entry["data_offsets"]
    shape = list(entry["shape"])
    at = random.randrange(len(shape)) if shape else 0
    ways: dict[str, Callable[[], Header]] = {
        "dtype": lambda: {"dtype": random.choice(DTYPES)},
        "a dtype of as many bytes": lambda: {"dtype": "I32" if end - start == 4 * _count(shape) else "I16"},
        "twice as many of half": lambda: {"dtype": "F16", "shape": [*shape[:-1], shape[-1] * 2]},
        "a side": lambda: {"shape": [*shape[:at], random.choice(NUMBERS), *shape[at + 1 :]]},
        "flat": lambda: {"shape": [_count(shape)]},
        "transposed": lambda: {"shape": shape[::-1]},
        "more sides": lambda: {"shape": [1] * random.choice([1, 4, 70, 3000]) + shape},
        "no sides": lambda: {"shape": []},
        "start": lambda: {"data_offsets": [random.choice(NUMBERS), end]},
        "end": lambda: {"data_offsets": [start, random.choice(NUMBERS)]},
        "overlap": lambda: {"data_offsets": [max(start - 8, 0), max(end - 8, 0)]},
        "backwards": lambda: {"data_offsets": [end, start]},
        "odd": lambda: {random.choice(["dtype", "shape", "data_offsets"]): random.choice(ODD)},
    }
    how = random.choice(list(ways))
    try:
        entry |= ways[how]()
    except IndexError:  # a tensor without sides
        entry["shape"] = [1]
    return f"{how} of {name}: {str(entry)[:120]}", header | {name: entry}, body


def broken_names(header: Header, body: bytes, random: Random) -> tuple[str, Header, bytes]:
    """Tensors missing, renamed, exchanged, added."""
    names = [name for name in header if name != METADATA]
    what = random.choice(["remove", "rename", "number", "exchange", "add", "only some", "prefix"])
    changed = dict(header)
    if what == "remove":
        gone = random.sample(names, random.choice([1, 1, 2, 20]) % len(names) or 1)
        body, changed = repacked({n: e for n, e in header.items() if n not in gone}, body)
        return f"without {gone[:3]}", changed, body
    if what == "only some":
        kept = random.sample(names, random.randrange(len(names)))
        body, changed = repacked({n: e for n, e in header.items() if n in kept or n == METADATA}, body)
        return f"only {len(kept)} tensors", changed, body
    if what == "exchange":
        one, other = random.sample(names, 2)
        changed[one], changed[other] = header[other], header[one]
        return f"{one} and {other} exchanged", changed, body
    if what == "add":
        name = random.choice(
            ["encoder.layers.0.x", "kv.x", "", "\x00", "a.b", "__metadata", "x" * 5000, "é", "module."]
        )
        size = random.choice([0, 4])
        changed[name] = {"dtype": "F32", "shape": [size // 4], "data_offsets": [len(body), len(body) + size]}
        return f"with {name[:30]!r}", changed, body + bytes(size)
    name = random.choice(names)
    if what == "number":
        numbered = [n for n in names if any(part.isdecimal() for part in n.split("."))] or names
        name = random.choice(numbered)
        parts = name.split(".")
        at = [i for i, part in enumerate(parts) if part.isdecimal()] or [0]
        parts[random.choice(at)] = random.choice(
            ["99", "100000", "9" * 12, "9" * 5000, "-1", "٣", "", "1.0", "01"]
        )
        new = ".".join(parts)
    elif what == "prefix":
        new = random.choice(["module.", "unet.", "multimodal_llm.", "mllm_final_layer.", "kv."]) + name
    else:
        new = random.choice(
            [name + ".weight", name.replace(".", "_"), name.upper(), name[:-1], "." + name, name + "\n"]
        )
    changed = {new if n == name else n: entry for n, entry in header.items()}
    return f"{name} as {new[:100]!r}", changed, body


def broken_metadata(header: Header, body: bytes, random: Random) -> tuple[str, Header, bytes]:
    """The texts beside the tensors; a JSON text among them has its own parts broken."""
    metadata = header.get(METADATA)
    if not isinstance(metadata, dict) or random.random() < 0.1:
        odd = random.choice(
            [*ODD, {"a": "b"}, {"easyref": "{}"}, {"easyref": "[]"}, {"easyref_tokens": "{}"}]
        )
        return f"metadata {str(odd)[:60]}", header | {METADATA: odd}, body
    texts = [key for key, text in metadata.items() if text.startswith("{")]
    if texts and random.random() < 0.8:
        key = random.choice(texts)
        if random.random() < 0.8:
            how, text = broken_json(json.loads(metadata[key]), random)
            changed = text.decode(errors="replace")
        else:
            how, changed = "odd", random.choice(ODD)
        return f"{how} in the metadata {key}", header | {METADATA: metadata | {key: changed}}, body
    how, changed = broken_value(metadata, random)
    return f"{how} in the metadata", header | {METADATA: changed}, body


def repacked(header: Header, body: bytes) -> tuple[bytes, Header]:
    """Body and header of some of the tensors, without holes."""
    packed, changed = b"", {}
    for name, entry in header.items():
        if name != METADATA:
            start, end = entry["data_offsets"]
            entry = entry | {"data_offsets": [len(packed), len(packed) + end - start]}
            packed += body[start:end]
        changed[name] = entry
    return packed, changed


def _count(shape: list[int]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count
