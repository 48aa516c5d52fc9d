"""Warnings in the log of the host."""

from __future__ import annotations

import functools
import logging


@functools.cache
def warn_once(text: str) -> None:
    """Log a warning, once in the life of the process. `warn_once.cache_clear()` forgets which were logged."""
    logging.warning("[EasyRef] %s", text)
