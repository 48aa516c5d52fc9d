"""Words for identities, in captions of the base: "a wide flat red creature with fine rising teal stripes".

A base without words for what references share has no path to it from its cross-attention. EasyRef's K and V
start as copies of the text's and do not learn such a path. SDXL has words for colours, forms and patterns;
details remain beyond them. No prompt of EasyRef's training or of a benchmark has these words.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np

from .identities import Floats, split

# The nearest of these names a colour: red, green and blue, each in -STEP..STEP of an identity's -1..1.
STEP = 0.55  # so that one colour in eleven is grey
COLOURS = {
    "black": (-1, -1, -1),
    "red": (1, -1, -1),
    "green": (-1, 1, -1),
    "blue": (-1, -1, 1),
    "yellow": (1, 1, -1),
    "purple": (1, -1, 1),
    "teal": (-1, 1, 1),
    "white": (1, 1, 1),
    "grey": (0, 0, 0),
}
# Each number of an outline outside the middle third of its range has a word; without any, a form is round.
FORMS = (("tall", "wide"), ("tilted", "leaning"), ("flat", "pointed"), ("curved", "bent"))
ROUND = "round"
# Words for the thirds of the ranges of the pattern's numbers: frequency, angle, and the body's share.
STRIPES = {
    "width": ("broad", "even", "fine"),
    "angle": ("falling", "upright", "rising"),
    "share": ("bold", "equal", "faint"),
}
PARTS = ("form", "body", *STRIPES, "stripes")


def describe(identity: Floats) -> dict[str, str]:
    """The words of each of PARTS for an identity (13,)."""
    parts = split(identity)
    thirds = [_third(value) for value in parts["outline"]]
    form = " ".join(words[third // 2] for words, third in zip(FORMS, thirds, strict=True) if third != 1)
    body, stripes = map(_colour, np.split(parts["colours"], 2))
    grades = zip(STRIPES.items(), parts["pattern"], strict=True)
    pattern = {name: words[_third(value)] for (name, words), value in grades}
    return {"form": form or ROUND, "body": body, **pattern, "stripes": stripes}


def described(words: dict[str, str]) -> str:
    """The beginning of a caption from some of the words of `describe`."""
    front = " ".join(["a", *(words[part] for part in ("form", "body") if part in words), "creature"])
    back = [words[part] for part in (*STRIPES, "stripes") if part in words]
    return " ".join([front, "with", *back, "stripes"]) if back else front


def all_descriptions() -> Iterator[str]:
    """Descriptions in which every word occurs."""
    forms = [ROUND, *(word for pair in FORMS for word in pair)]
    for form, body in product(forms, COLOURS):
        yield described({"form": form, "body": body})
    for (name, words), stripes in product(STRIPES.items(), COLOURS):
        yield from (described({name: word, "stripes": stripes}) for word in words)


def _third(value: float) -> int:
    """Which third of -1..1 a value is in: 0, 1 or 2."""
    return min(int((value + 1) * 3 / 2), 2)


def _colour(rgb: Floats) -> str:
    away = np.linalg.norm(STEP * np.array(list(COLOURS.values())) - rgb, axis=1)
    return list(COLOURS)[int(away.argmin())]
