"""The judge of bad input: accepts a right result or one clear error of this pack, refuses anything else."""

from __future__ import annotations

import hashlib
import linecache
import math
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from devkit.hosts import ROOT

PACK = tuple(str(ROOT / room) for room in ("easyref_core", "nodes"))
CLEAR = (ValueError, FileNotFoundError, TypeError)  # exactly these, not subclasses
REMEDY = re.compile(
    r"\b(wanted|Wanted|use|Use|Choose|Give|Write|Connect|Download|download|Put|Save|save|Remove|remove|"
    r"Update|Crop|Check|Load|Pass|Encode|Make|Set|Shorten|Paint|Name|Combine|Link|Install|needs|Divide)\b"
)
MIN_CHARACTERS, MAX_CHARACTERS = 20, 2000
SURROGATE = re.compile("[\ud800-\udfff]")


def judge(call: Callable[[], object]) -> str:
    """Text of the clear error that a call raises, "" for a right result; else raises AssertionError."""
    try:
        result = call()
    except Exception as error:
        if fault := error_fault(error):
            raise AssertionError(fault) from error
        return str(error)
    if fault := result_fault(result):
        raise AssertionError(fault)
    return ""


def error_fault(error: Exception) -> str:
    """The reason why an error is not a clear one of this pack; "" if it is."""
    text, frames = str(error), traceback.extract_tb(error.__traceback__)
    places = " > ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-4:])
    shown = f"{type(error).__name__}: {text[:300]!r} at {places}"
    if type(error) not in CLEAR:
        return f"not an error of this pack: {shown}"
    line = linecache.getline(frames[-1].filename, frames[-1].lineno or 0)
    if not (frames[-1].filename.startswith(PACK) and line.strip().startswith("raise ")):
        return f"an error from below: {shown}"
    if not MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS:
        return f"an error of {len(text)} characters: {shown}"
    if not REMEDY.search(text):
        return f"an error without a remedy: {shown}"
    if SURROGATE.search(text):
        return f"an error that cannot be written as UTF-8: {shown}"
    return ""


def result_fault(result: object) -> str:
    """The reason why a result is not right; "" if its numbers are finite and its texts can be sent."""
    for value in leaves(result):
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
            return f"a result {tuple(value.shape)} holds NaN or infinite values"
        if isinstance(value, float) and not math.isfinite(value):
            return f"a result is {value}"
        if isinstance(value, str) and SURROGATE.search(value):
            return f"a text of the result cannot be written as UTF-8: {value[:80]!r}"
    return ""


def leaves(result: object) -> Iterator[Any]:
    """Every tensor, number, text and so on of a nested result."""
    if isinstance(result, Mapping):
        result = tuple(result.values())
    if isinstance(result, (list, tuple)):
        for item in result:
            yield from leaves(item)
    else:
        yield result


def digest(result: object) -> str:
    """Hash of a result, over every byte of its tensors."""
    state = hashlib.sha256()
    for value in leaves(result):
        if isinstance(value, torch.Tensor):
            value = np.asarray(value.detach().cpu().contiguous().as_subclass(torch.Tensor)).tobytes()
        state.update(value if isinstance(value, bytes) else repr(value).encode())
    return state.hexdigest()


def message_key(text: str) -> str:
    """The first eight words of an error without its names and numbers, to count distinct errors."""
    text = re.sub(r"/\S+", "PATH", text)
    text = re.sub(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", "TEXT", text)
    return " ".join(re.sub(r"[\d.,]*\d", "N", text).split()[:8])
