"""What a kind of bad input is."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from random import Random
from typing import NamedTuple, Protocol

# modules of this package
KINDS = (
    "checkpoint",
    "mllm_folder",
    "token_files",
    "images",
    "text",
    "numerics",
    "paths",
)


class Case(NamedTuple):
    """One bad input: what it is, and the call that meets it. The call's result is judged, see judge.py."""

    about: str
    call: Callable[[], object]


class Kind(Protocol):
    """Cases of one kind. It is made with an empty folder of its own, and raises Skipped where it cannot run here."""

    readable: tuple[Path, ...] | None  # folders that a case may open files in; None: not watched
    writable: tuple[Path, ...]  # folders that a case may leave new files in

    def make(self, random: Random, folder: Path) -> Case:
        """A case; files of its own go into `folder`, which is empty."""
        ...

    def good(self) -> object:
        """What a good input gives; the same bytes after every bad one."""
        ...


class Skipped(Exception):
    """This kind cannot run here; the text says why."""


def open_kind(name: str, folder: Path) -> Kind:
    """The kind of this name; raises Skipped."""
    return import_module(f"{__package__}.{name}").Cases(folder)


def seeded(kind: str, seed: int, number: int) -> Random:
    """What a case is made from: the same on every machine, whatever ran before."""
    return Random(f"{kind} {seed} {number}")
