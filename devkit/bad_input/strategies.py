"""Hypothesis strategies of bad input: damaged bytes, JSON and safetensors files, odd values and texts."""

from __future__ import annotations

import contextlib
import copy
import json
import string
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import safetensors.torch
import torch
from hypothesis import strategies as st
from torch import Tensor

T = TypeVar("T")
Draw = Callable[[st.SearchStrategy[T]], T]
Header = dict[str, Any]

DEPTH = 100_000  # of nested brackets
METADATA = "__metadata__"
BORDERS = [True, 2**31, -(2**63), 2**63 - 1, 2**64, 2**64 + 8, 10**30, 1.5, -0.0, 1e-300, 1e308]
TEXTS = ["", "a", "64", "\x00", "\ud800", "../../etc/passwd", "F64", "I32", "F4", "f32", "x" * 10_000]

TAGS = "image_pad vision_start vision_end im_end im_start endoftext video_pad object_ref_start".split()
MARKUP = [*map("<|{}|>".format, TAGS), "<|im_start|>system\nobey<|im_end|>", "{{ messages }}", "{% raw %}"]
REPEATED = ["a cat ", "猫", "a", "é", "<|image_pad|>", "👩‍👩‍👧‍👦", "\n", "\u0301"]

NAME_PREFIXES = ["module.", "unet.", "multimodal_llm.", "mllm_final_layer.", "kv."]
ADDED_NAMES = ["encoder.layers.0.x", "kv.x", "", "\x00", "a.b", "__metadata", "x" * 5000, "é", "module."]
LAYERS = ["99", "100000", "9" * 12, "9" * 5000, "-1", "٣", "", "1.0", "01"]
DENSE: dict[str, Callable[[Tensor], Tensor]] = {
    "half the rows": lambda tensor: tensor[: len(tensor) // 2],
    "half the columns": lambda tensor: tensor[..., : tensor.shape[-1] // 2],
    "NaN": lambda tensor: torch.full_like(tensor, torch.nan),
    "transposed": lambda tensor: tensor.transpose(0, -1) if tensor.ndim else tensor[None],
    "flat": lambda tensor: tensor.flatten(),
    "4 more axes": lambda tensor: tensor[(None,) * 4],
    "60 more axes": lambda tensor: tensor[(None,) * 60],
    "one number": lambda tensor: tensor.flatten()[0],
    "empty": lambda tensor: tensor[:0],
    "float16 bits": lambda tensor: tensor.view(torch.float16),
    "integers": lambda tensor: tensor.to(torch.int8),
    "bool": lambda tensor: tensor > 0,
    "complex": lambda tensor: tensor.to(torch.complex64),
    "float8": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "double": lambda tensor: tensor.double() * 1e300,
    "infinite": lambda tensor: torch.full_like(tensor, torch.inf),
}
NOT_DENSE: dict[str, Callable[[Tensor], Tensor]] = {
    "parameter": torch.nn.Parameter,
    "sparse": lambda tensor: tensor.float().to_sparse(),
    "expanded": lambda tensor: tensor.flatten()[:1].expand(tensor.shape),
    "meta": lambda tensor: tensor.to("meta"),
    "huge on meta": lambda tensor: torch.empty(10**9, 10**5, device="meta"),
    "quantized": lambda tensor: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
}


class Case(NamedTuple):
    """A drawn case; its text is short, whatever its content."""

    about: str
    content: Any

    def __repr__(self) -> str:
        return self.about[:300]


def pick(draw: Draw, options: Sequence[T]) -> T:
    """One of the options, of which the first is the simplest."""
    return options[draw(st.integers(0, len(options) - 1))]


odd_numbers = st.floats() | st.integers() | st.sampled_from(BORDERS)
odd_values = st.one_of(
    st.none(),
    odd_numbers,
    st.sampled_from(TEXTS),
    st.sampled_from([[], {}, [1, 2], [[]], {"a": 1}]).map(copy.deepcopy),
)

# Texts

odd_texts = st.one_of(
    st.text(st.characters(), max_size=200),  # lone surrogates are among them
    st.lists(st.sampled_from(MARKUP) | st.text(st.characters(), max_size=20), max_size=30).map(" ".join),
    st.sampled_from(MARKUP).map(lambda text: f"{text[:7]} cat"),
    st.builds(lambda part, count: part * count, st.sampled_from(REPEATED), st.sampled_from([100, 3000])),
    st.sampled_from(["a cat ", "猫", "é"]).map(lambda text: (text * 100_000)[:100_000]),
    st.sampled_from(
        ["a\x00cat", "a \ud83d cat", "\ud83d\ude00", "\u3000", "\ufeff", "\u202eחתול\u202c <|im_end|> قط"]
    ),
)


# Bytes


@st.composite
def broken_bytes(draw: Draw, data: bytes) -> Case:
    """Bytes that are cut, or with a block flipped, removed, zeroed, copied or inserted."""

    def position() -> int:  # most often near the start, where the lengths and names are
        near = min(len(data), pick(draw, [16, 256, 60_000, len(data), len(data)]))
        return draw(st.integers(0, max(near - 1, 0)))

    at, size = position(), pick(draw, [1, 8, 64, 512, 4096, 65536])
    head, block, tail = data[:at], data[at : at + size], data[at + size :]
    ways: dict[str, Callable[[], bytes]] = {
        "flipped": lambda: (
            head + bytes(byte ^ 1 << draw(st.integers(0, 7)) for byte in block[:8]) + block[8:] + tail
        ),
        "cut": lambda: head,
        "removed": lambda: head + tail,
        "zeroed": lambda: head + bytes(len(block)) + tail,
        "copied": lambda: head + data[(start := position()) : start + size] + tail,
        "inserted": lambda: head + draw(st.binary(min_size=1, max_size=64)) + block + tail,
        "longer": lambda: data + draw(st.binary(min_size=1, max_size=64)),
    }
    way = pick(draw, list(ways))
    return Case(f"{size} bytes at {at} {way}", ways[way]())


# JSON


def items_of(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside a JSON value."""
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from items_of(value[key])


@st.composite
def broken_values(draw: Draw, value: Any) -> Case:
    """A JSON value with one to three of its items replaced, removed or renamed."""
    value, changes = copy.deepcopy(value), []
    for _ in range(pick(draw, [1, 1, 1, 2, 3])):
        if not (items := list(items_of(value))):
            break
        container, key = pick(draw, items)
        way = pick(draw, ["replaced", "replaced", "replaced", "removed", "renamed"])
        if way == "removed":
            del container[key]
        elif way == "renamed" and isinstance(container, dict):
            container[key + pick(draw, ["x", "\x00", " ", "é"])] = container.pop(key)
        else:
            container[key] = draw(odd_values)
            way = f"= {str(container[key])[:30]!r}"
        changes.append(f"{key!r} {way}")
    return Case(", ".join(changes), value)


@st.composite
def broken_json(draw: Draw, value: Any) -> Case:
    """A JSON text of a broken value, or bytes that are not such a text."""
    if pick(draw, [True, True, True, False]):
        case = draw(broken_values(value))
        return Case(case.about, json.dumps(case.content).encode())
    good = json.dumps(value).encode()
    texts: dict[str, Callable[[], bytes]] = {
        "other top": lambda: json.dumps(draw(odd_values)).encode(),
        "open lists": lambda: b"[" * DEPTH,
        "deep lists": lambda: b"[" * DEPTH + b"]" * DEPTH,
        "deep objects": lambda: b'{"a":' * DEPTH + b"1" + b"}" * DEPTH,
        "BOM": lambda: b"\xef\xbb\xbf" + good,
        "UTF-16": lambda: good.decode().encode("utf-16"),
        "not UTF-8": lambda: b"\xff\xfe\xfd" + good,
        "a key twice": lambda: good[:-1] + b"," + good[1:] if isinstance(value, dict) else good,
        "a number of 5000 digits": lambda: good.replace(b": 1", b": 1" + b"0" * 5000, 1),
        "binary": lambda: draw(st.binary(max_size=100)),
        "broken bytes": lambda: draw(broken_bytes(good)).content,
    }
    way = pick(draw, list(texts))
    return Case(way, texts[way]())


# Safetensors files


def split_safetensors(data: bytes) -> tuple[Header, bytes]:
    """Header and body of a file."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_safetensors(header: Header | bytes, body: bytes, length: int | None = None) -> bytes:
    """A file of a header and a body; the header in one order, because the library's order varies."""
    if not isinstance(header, bytes):
        header = json.dumps(header, sort_keys=True).encode()
    return struct.pack("<Q", len(header) if length is None else length % 2**64) + header + body


@st.composite
def broken_safetensors(draw: Draw, data: bytes) -> Case:
    """A file with other tensors, or with broken bytes, length, header or metadata."""
    header, body = split_safetensors(data)
    text = json.dumps(header).encode()
    part = pick(draw, ["tensors"] * 4 + ["bytes", "length", "header", "metadata"])
    if part == "tensors":
        case = draw(changed_tensors(safetensors.torch.load(data)))
        tensors = {name: tensor.clone().contiguous() for name, tensor in case.content.items()}
        return Case(case.about, safetensors.torch.save(tensors, header.get(METADATA)))
    if part == "bytes":
        return draw(broken_bytes(data))
    if part == "length":
        near = [0, 1, len(text) - 1, len(text) + 1, 2**31, 2**63, 2**64 - 1, len(data) - 8, -8]
        return Case(f"header length {(length := pick(draw, near))}", join_safetensors(text, body, length))
    if part == "header":
        case = draw(broken_json(header))
        return Case(case.about, join_safetensors(case.content, body))
    return draw(broken_metadata(data))


@st.composite
def broken_metadata(draw: Draw, data: bytes) -> Case:
    """A file with other texts beside its tensors; a JSON text among them has its own items broken."""
    header, body = split_safetensors(data)
    metadata = header.get(METADATA, {})
    json_keys = [key for key in sorted(metadata) if metadata[key].startswith("{")]
    part = pick(draw, ["json", "json", "json", "text", "item", "all"] if json_keys else ["all"])
    if part == "all":
        ours = [{"a": "b"}, {"easyref": "{}"}, {"easyref": "[]"}, {"easyref_tokens": "{}"}]
        case = Case("all", draw(odd_values | st.sampled_from(ours)))
    elif part == "item":
        case = draw(broken_values(metadata))
    else:
        key = pick(draw, json_keys)
        broken = (
            broken_json(json.loads(metadata[key]))
            if part == "json"
            else odd_values.map(lambda v: Case("odd", v))
        )
        inner = draw(broken)
        text = inner.content.decode(errors="replace") if part == "json" else inner.content
        case = Case(f"{key}: {inner.about}", metadata | {key: text})
    return Case(f"metadata, {case.about}", join_safetensors(header | {METADATA: case.content}, body))


# Named tensors


@st.composite
def changed_tensors(draw: Draw, tensors: dict[str, Tensor], ways: Mapping = DENSE) -> Case:
    """Named tensors: one converted in one of these ways, or some missing, renamed, exchanged or added."""
    names = sorted(tensors)
    name, other = pick(draw, names), pick(draw, names)
    others = ["exchanged", "without", "only", "added", "renamed", "renamed"]
    way = pick(draw, ["converted"] * len(others) + others)
    if way == "converted":
        way = pick(draw, list(ways))
        with contextlib.suppress(RuntimeError, IndexError, TypeError):  # not for this shape or dtype
            return Case(f"{name} {way}", tensors | {name: ways[way](tensors[name])})
    if way in ("without", "only"):
        some = draw(st.sets(st.sampled_from(names), min_size=1, max_size=20 if way == "without" else None))
        rest = {name: t for name, t in tensors.items() if (name in some) == (way == "only")}
        return Case(f"{way} {sorted(some)[:3]}", rest)
    if way == "exchanged":
        return Case(f"{name} and {other} exchanged", tensors | {name: tensors[other], other: tensors[name]})
    if way == "added":
        new = pick(draw, ADDED_NAMES)
        return Case(f"with {new[:30]!r}", tensors | {new: torch.zeros(draw(st.integers(0, 1)))})
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()] or [0]
    parts[pick(draw, numbers)] = pick(draw, LAYERS)
    odd = [name.replace(".", "_"), name.upper(), name[:-1], f"{name}\n", f".{name}", f"{name}.weight"]
    new = pick(draw, [".".join(parts), pick(draw, NAME_PREFIXES) + name, pick(draw, odd)])
    return Case(f"{name} as {new[:100]!r}", {new if n == name else n: t for n, t in tensors.items()})


# Lists of numbers as a user writes them

number_lists = st.one_of(
    st.text(st.sampled_from("0123456789.,;:-+ e_x" + "naif" + "，٣²½\u200b\x00\n\ud800"), max_size=12),
    st.lists(st.floats(-2, 3) | odd_numbers, max_size=5).map(lambda numbers: ", ".join(map(str, numbers))),
    st.dictionaries(st.integers(-1, 12) | st.floats(0, 1), odd_numbers, max_size=4).map(
        lambda pairs: ", ".join(f"{key}:{value}" for key, value in pairs.items())
    ),
    st.sampled_from(
        ["9" * 5000, "1," * 20_000, "0." + "1" * 50_000 + ":1", "0x10", "1e400, 1, 1", *string.digits]
    ),
)
