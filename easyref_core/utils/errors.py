"""shorten() for values in error messages, and the bound of every factor."""

from __future__ import annotations

MAX_SHORTENED = 200  # characters
# Of layer and schedule factors: a weight of 3 with both, 30,000, is below float16's maximum, 65,504.
MAX_FACTOR = 100


def shorten(value: object) -> str:
    """Text of a value found in a file or an input, cut to MAX_SHORTENED characters, encodable in UTF-8."""
    text = str(value).encode(errors="backslashreplace").decode()
    return text if len(text) <= MAX_SHORTENED else f"{text[:MAX_SHORTENED]}..."
