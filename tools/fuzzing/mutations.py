"""Bytes and JSON values, broken in the ways that disks, downloads, editors and attackers break them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

DEEP = 100_000  # brackets in brackets
ODD: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    7,
    1.5,
    -0.0,
    2**31,
    -(2**63),
    2**64,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "a",
    "64",
    "\x00",
    "\ud800",
    "../../etc/passwd",
    "x" * 10_000,
    [],
    {},
    [1, 2],
    [[]],
    {"a": 1},
]


def flipped(data: bytes, random: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice([1, 1, 2, 8, 64])):
        changed[_somewhere(data, random)] ^= 1 << random.randrange(8)
    return bytes(changed)


def cut_short(data: bytes, random: Random) -> bytes:
    return data[: _somewhere(data, random)]


def with_insertion(data: bytes, random: Random) -> bytes:
    at = _somewhere(data, random)
    return data[:at] + random.randbytes(random.choice([1, 2, 8, 500])) + data[at:]


def spliced(data: bytes, random: Random) -> bytes:
    """A block copied over another place."""
    start, at, length = _somewhere(data, random), _somewhere(data, random), random.choice([4, 64, 4096])
    return data[:at] + data[start : start + length] + data[at + length :]


def zeroed(data: bytes, random: Random) -> bytes:
    at, length = _somewhere(data, random), random.choice([1, 8, 512, 65536])
    return data[:at] + bytes(min(length, len(data) - at)) + data[at + length :]


def without_a_block(data: bytes, random: Random) -> bytes:
    at, length = _somewhere(data, random), random.choice([1, 8, 512])
    return data[:at] + data[at + length :]


def longer(data: bytes, random: Random) -> bytes:
    return data + random.randbytes(random.choice([1, 8, 4096]))


BYTES: list[Callable[[bytes, Random], bytes]] = [
    flipped,
    cut_short,
    with_insertion,
    spliced,
    zeroed,
    without_a_block,
    longer,
]


def broken_bytes(data: bytes, random: Random) -> tuple[str, bytes]:
    """What was done, and the bytes."""
    how = random.choice(BYTES)
    return how.__name__.replace("_", " "), how(data, random)


def broken_value(value: Any, random: Random) -> tuple[str, Any]:
    """A JSON value with one to three of its parts replaced, removed or renamed."""
    value, done = copy.deepcopy(value), []
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        places = list(_places(value))
        if not places:
            break
        holder, key = random.choice(places)
        what = random.choice(["replace", "replace", "replace", "remove", "rename"])
        if what == "remove":
            del holder[key]
        elif what == "rename" and isinstance(holder, dict):
            holder[key + random.choice(["x", "\x00", " ", "é"])] = holder.pop(key)
        else:
            holder[key] = random.choice(ODD)
            what = f"{str(holder[key])[:30]!r} for"
        done.append(f"{what} {key!r}")
    return ", ".join(done), value


def broken_json(value: Any, random: Random) -> tuple[str, bytes]:
    """A JSON text: of a broken value, or itself no JSON, or not what its reader expects at the top."""
    whole = json.dumps(value).encode()
    texts: dict[str, Callable[[], bytes]] = {
        "other top": lambda: json.dumps(random.choice(ODD)).encode(),
        "deep lists": lambda: b"[" * DEEP + b"]" * random.choice([0, DEEP]),
        "deep objects": lambda: b'{"a":' * DEEP + b"1" + b"}" * DEEP,
        "with BOM": lambda: b"\xef\xbb\xbf" + whole,
        "UTF-16": lambda: whole.decode().encode("utf-16"),
        "not UTF-8": lambda: b"\xff\xfe\xfd" + whole,
        "a key twice": lambda: whole[:-1] + b"," + whole[1:] if isinstance(value, dict) else whole,
        "a number of 5000 digits": lambda: whole.replace(b": 1", b": 1" + b"0" * 5000, 1),
        "empty": lambda: b"",
        "binary": lambda: random.randbytes(100),
        "broken bytes": lambda: broken_bytes(whole, random)[1],
    }
    if random.random() < 0.75:
        how, changed = broken_value(value, random)
        return how, json.dumps(changed).encode()
    how = random.choice(list(texts))
    return how, texts[how]()


def _somewhere(data: bytes, random: Random) -> int:
    """A place in the data, most often near its start, where the lengths and names are."""
    most = max(len(data), 1)
    return random.randrange(min(most, random.choice([16, 256, 60_000, most, most])))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(holder, key) of everything inside a JSON value."""
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])
