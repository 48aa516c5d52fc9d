"""Whether what came of a bad input is right, a clear error, or a failure."""

from __future__ import annotations

import hashlib
import linecache
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
OURS = tuple(str(ROOT / part) for part in ("easyref_core", "nodes"))  # where a clear error is raised
CLEAR = (ValueError, FileNotFoundError, TypeError)  # these themselves, not what is derived from them
REMEDY = re.compile(
    r"\b(wanted|Wanted|use|Use|Choose|Give|Write|Connect|Download|download|Put|Save|save|Remove|remove|Update|Crop|Check|"
    r"Load|Pass|Encode|Make|Set|Shorten|Paint|Name|Combine|Link|Install|needs|Divide)\b"
)
SHORTEST, LONGEST = 20, 2000  # characters of an error that somebody reads

RIGHT, ERROR, FAILURE = "right", "error", "failure"


class Outcome(NamedTuple):
    """How a case ended: RIGHT, ERROR (a clear one, its text) or FAILURE (why it is one)."""

    how: str
    text: str = ""


def judged(call: Callable[[], object]) -> Outcome:
    """Run a case and judge what comes of it."""
    try:
        result = call()
    except Exception as error:
        wrong = unclear(error)
        return Outcome(FAILURE, wrong) if wrong else Outcome(ERROR, str(error))
    wrong = unfit(result)
    return Outcome(FAILURE, wrong) if wrong else Outcome(RIGHT)


def unclear(error: Exception) -> str:
    """Why an error is not a clear one of our own; "" where it is."""
    text = str(error)
    shown = f"{type(error).__name__}: {text[:300]!r}{_place(error.__traceback__)}"
    if type(error) not in CLEAR:
        return f"not an error of our own: {shown}"
    if not _raised_by_us(error.__traceback__):
        return f"an error from below: {shown}"
    if not SHORTEST <= len(text) <= LONGEST:
        return f"an error of {len(text)} characters: {shown}"
    if not REMEDY.search(text):
        return f"an error without a remedy: {shown}"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return f"an error that cannot be written as UTF-8: {shown}"
    return ""


def unfit(result: object) -> str:
    """Why a result is not right; "" where it is: numbers are finite, texts can be sent."""
    for value in values(result):
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
            return f"a result {tuple(value.shape)} holds NaN or infinite values"
        if isinstance(value, float) and not math.isfinite(value):
            return f"a result is {value}"
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            return f"a text of the result cannot be written as UTF-8: {value[:80]!r}"
    return ""


def values(result: object) -> Iterator[Any]:
    """Every tensor, number, text and so on of a result, however it is nested."""
    if isinstance(result, Mapping):
        result = tuple(result.values())
    if isinstance(result, (list, tuple)):
        for part in result:
            yield from values(part)
    else:
        yield result


def digest(result: object) -> str:
    """Hash of a result, of every byte of its tensors."""
    state = hashlib.sha256()
    for value in values(result):
        array = value.detach().cpu().contiguous() if isinstance(value, torch.Tensor) else value
        state.update(
            np.asarray(array.as_subclass(torch.Tensor)).tobytes()
            if isinstance(array, torch.Tensor)
            else repr(array).encode()
        )
    return state.hexdigest()[:16]


def same_message(text: str) -> str:
    """An error's text without what differs from case to case, to count how many different ones there are."""
    text = re.sub(r"/\S+", "PATH", text)
    text = re.sub(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", "TEXT", text)
    return " ".join(re.sub(r"[\d.,]*\d", "N", text).split()[:8])


def _raised_by_us(traceback: TracebackType | None) -> bool:
    """The error comes from a raise statement of ours, not from what one of our lines called or computed."""
    *_, last = _frames(traceback)
    file, line = last.tb_frame.f_code.co_filename, last.tb_lineno
    return file.startswith(OURS) and linecache.getline(file, line).strip().startswith("raise ")


def _place(traceback: TracebackType | None) -> str:
    places = [f"{Path(t.tb_frame.f_code.co_filename).name}:{t.tb_lineno}" for t in _frames(traceback)]
    return f" at {' > '.join(places[-4:])}" if places else ""


def _frames(traceback: TracebackType | None) -> Iterable[TracebackType]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next
