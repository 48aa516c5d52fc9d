"""Warnings in the log of the host."""

from __future__ import annotations

import logging

_given: set[str] = set()


def warn_once(text: str) -> None:
    """Log a warning, once in the life of the process."""
    if text not in _given:
        _given.add(text)
        logging.warning("[EasyRef] %s", text)
