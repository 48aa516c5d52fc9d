"""Coarse words for identities, in captions of the base: "a tall red creature with fine teal stripes".

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
# The largest of an outline's four numbers and its sign name a form; below ROUND, it is "round".
FORMS = (("wide", "tall"), ("leaning", "tilted"), ("pointed", "flat"), ("bent", "curved"))
ROUND = 0.35
WIDTHS = ("broad", "even", "fine")  # of stripes, by thirds of their frequency
PARTS = ("form", "body", "width", "stripes")


def describe(identity: Floats) -> dict[str, str]:
    """The word of each of PARTS for an identity (13,)."""
    parts = split(identity)
    number = int(np.abs(parts["outline"]).argmax())
    value = parts["outline"][number]
    form = "round" if abs(value) < ROUND else FORMS[number][int(value < 0)]
    body, stripes = map(_colour, np.split(parts["colours"], 2))
    width = WIDTHS[min(int((parts["pattern"][0] + 1) * len(WIDTHS) / 2), len(WIDTHS) - 1)]
    return {"form": form, "body": body, "width": width, "stripes": stripes}


def described(words: dict[str, str]) -> str:
    """The beginning of a caption from some of the words of `describe`."""
    front = " ".join(["a", *(words[part] for part in ("form", "body") if part in words), "creature"])
    back = [words[part] for part in ("width", "stripes") if part in words]
    return " ".join([front, "with", *back, "stripes"]) if back else front


def all_descriptions() -> Iterator[str]:
    """Descriptions in which every word occurs."""
    forms = ["round", *(word for pair in FORMS for word in pair)]
    for form, body in product(forms, COLOURS):
        yield described({"form": form, "body": body})
    for width, stripes in product(WIDTHS, COLOURS):
        yield described({"width": width, "stripes": stripes})


def _colour(rgb: Floats) -> str:
    away = np.linalg.norm(STEP * np.array(list(COLOURS.values())) - rgb, axis=1)
    return list(COLOURS)[int(away.argmin())]
