"""Numbered example groups of the creatures."""

from __future__ import annotations

import numpy as np

from ..demo_group import MAX_REFERENCES, DemoGroup, outsider_note
from .captions import GROUND_NAMES, PLACE_NAMES, all_captions, caption
from .descriptions import all_descriptions
from .identities import draw_identities
from .images import among_others, render

SEED = 7000  # of the examples; no training uses it
WORDS = frozenset(" ".join([*all_captions(), *all_descriptions()]).split())  # of the base's captions


def demo_group(number: int, references: int, outsider: bool) -> DemoGroup:
    """The example of a number: `references` images that belong, then the outsider if `outsider`.

    More references extend the same group.
    """
    rng = np.random.default_rng([SEED, number])
    identity, other = draw_identities(rng, 2)
    identities = np.stack([*[identity] * MAX_REFERENCES, other])
    images = render(among_others(identities, rng), rng)
    picked = [*range(references), *[MAX_REFERENCES] * outsider]
    shared = "one creature; every reference also shows others"
    if outsider:
        shared = f"{shared} {outsider_note(references)}"
    ground, place = int(rng.integers(len(GROUND_NAMES))), int(rng.integers(len(PLACE_NAMES)))
    return DemoGroup(images[picked], caption(1, ground, place), shared)
