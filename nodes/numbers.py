"""Lists of numbers as people type them."""

from __future__ import annotations

import re

from ..easyref_core.tensor_files import brief


def numbers(text: str, what: str) -> list[float]:
    """The numbers of a text, between commas, semicolons, spaces or line breaks. Raises ValueError for anything else.

    what: names the list in the error.
    """
    found = []
    for part in re.split(r"[\s,;，；、]+", text.strip()):
        if part:
            try:
                found.append(float(part))
            except ValueError as error:
                raise ValueError(
                    f"{brief(repr(part))} in the {what} is no number. Write numbers with commas between them, as in 1, 0.5, 1."
                ) from error
    return found
