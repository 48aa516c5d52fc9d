"""Groups of images with one creature in common, and a target that shows it alone where the prompt says."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ...mrbench.methods.method import Task
from .captions import GROUND_NAMES, PLACE_NAMES, caption
from .identities import Floats
from .images import alone, among_others, render

SIZES = (2, 3, 4, 6)  # references of the groups of an evaluation; training has 2 to 4


@dataclasses.dataclass(frozen=True)
class Group:
    """A group; the prompt names ground and place of its target."""

    id: str
    identity: Floats  # (13,)
    prompt: str
    named: dict[str, str]  # {"ground": ..., "place": ...} of the target
    references: tuple[Image.Image, ...]
    captions: tuple[str, ...]  # of the references
    target: Image.Image
    shared: dict[str, str] = dataclasses.field(default_factory=dict)  # empty: what is shared has no name

    @property
    def task(self) -> Task:
        return Task(self.id, self.prompt, self.references)


def render_groups(identities: Floats, seed: int, sizes: Sequence[int] = SIZES) -> list[Group]:
    """Render one group of each identity (N, 13); the numbers of references alternate."""
    groups = []
    for number, identity in enumerate(identities):
        rng = np.random.default_rng([seed, number])
        count = sizes[number % len(sizes)]
        scenes = among_others(np.repeat(identity[None], count, axis=0), rng)
        counts = np.count_nonzero(scenes.radii, axis=1)
        references = render(scenes, rng)
        ground, place = rng.integers(len(GROUND_NAMES), size=1), rng.integers(len(PLACE_NAMES), size=1)
        (target,) = render(alone(identity[None], ground, place), rng)
        groups.append(
            Group(
                id=f"group-{number:04}",
                identity=identity,
                prompt=caption(1, int(ground[0]), int(place[0])),
                named={"ground": GROUND_NAMES[ground[0]], "place": PLACE_NAMES[place[0]]},
                references=tuple(map(Image.fromarray, references)),
                captions=tuple(map(caption, counts, scenes.grounds)),
                target=Image.fromarray(target),
            )
        )
    return groups
