"""Scores of some groups' pictures, every model run once over all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

import numpy as np

from . import metrics
from .images import BrokenPicture, Exclusion, open_picture
from .manifest import Attributes, Group
from .rows import Row

if TYPE_CHECKING:
    from PIL import Image

    from .extractors import AttributeReader, Clip, Dino
    from .metrics import Floats


UNNAMED = uuid4().hex  # another one in every run


class Extractors(NamedTuple):
    """What pictures are read with; the metrics of one that is left out are not measured."""

    clip: Clip | None = None
    dino: Dino | None = None
    attributes: AttributeReader | None = None
    attributes_name: str | None = None

    @property
    def identities(self) -> dict[str, str | None]:
        """The exact models."""
        # a reader that does not say which it is may be another one each time: nothing it read is used again
        own = getattr(self.attributes, "identity", f"{self.attributes_name} {UNNAMED}")
        return {
            "clip": self.clip and self.clip.identity,
            "dino": self.dino and self.dino.identity,
            "attributes": own if self.attributes else None,
        }


@dataclass(frozen=True)
class Picture:
    """A generated picture's file."""

    method: str
    seed: int
    file: Path
    content: str  # hash of the file
    references: int  # how many the method saw


class Work(NamedTuple):
    """What is to do for one group."""

    group: Group
    scorer: str
    pictures: tuple[Picture, ...]


def bundles(works: Sequence[Work], batch: int) -> Iterator[list[Work]]:
    """Groups taken together until they fill a batch."""
    bundle, size = [], 0
    for work in works:
        bundle.append(work)
        size += len(work.pictures) + len(work.group.references) + 1
        if size >= batch:
            yield bundle
            bundle, size = [], 0
    if bundle:
        yield bundle


def score_bundle(bundle: Sequence[Work], extractors: Extractors, batch: int) -> list[Row | Exclusion]:
    """Rows of some groups' pictures, every model run once over all pictures of the bundle."""
    opened, found = [], []
    for work in bundle:
        good, images = [], []
        for picture in work.pictures:
            try:
                images.append(open_picture(picture.file))
                good.append(picture)
            except BrokenPicture as error:
                found.append(Exclusion("picture", str(picture.file), str(error)))
        opened.append((work._replace(pictures=tuple(good)), images))
    opened = [(work, images) for work, images in opened if images]
    # In this order: a group's target, its references, its pictures.
    images = [image for work, own in opened for image in (*_given(work.group), *own)]
    clip = _in_batches(extractors.clip and extractors.clip.images, images, batch)
    texts = _in_batches(
        extractors.clip and extractors.clip.texts, [work.group.prompt for work, _ in opened], batch
    )
    dino = _in_batches(extractors.dino and extractors.dino.images, images, batch)
    start = 0
    for i, (work, own) in enumerate(opened):
        stop = start + 1 + len(work.group.references) + len(own)
        text = texts[i] if texts is not None and work.group.prompt else None  # no prompt, no CLIP-T
        scores = {
            **_clip_scores(clip, slice(start, stop), len(own), text),
            **_dino_scores(dino, slice(start, stop), len(own)),
            **_attribute_scores(extractors.attributes, own, work.group.attributes),
        }
        found += _rows(work, scores)
        start = stop
    return found


def right(read: Mapping[str, Sequence[str]], expected: Mapping[str, str], pictures: int) -> Floats:
    """Part of the expected attributes that were read off each picture (N,); NaN where none is expected."""
    if not expected:
        return np.full(pictures, math.nan)
    return np.mean([[value == wanted for value in read[name]] for name, wanted in expected.items()], axis=0)


def _given(group: Group) -> list[Image.Image]:
    return [open_picture(file) for file in (group.target, *group.references)]


def _in_batches(features: Any, items: Sequence[Any], batch: int) -> Floats | None:
    if not features or not items:
        return None
    return np.concatenate([features(items[i : i + batch]) for i in range(0, len(items), batch)])


def _parts(features: Floats, where: slice, pictures: int) -> tuple[Floats, Floats, Floats]:
    """Features of the pictures, of the target and of the references: (N, D), (1, D), (K, D)."""
    own = features[where]
    return own[-pictures:], own[:1], own[1:-pictures]


def _clip_scores(
    features: Floats | None, where: slice, pictures: int, text: Floats | None
) -> dict[str, Floats]:
    if features is None:
        return {}
    own, target, references = _parts(features, where, pictures)
    scores = {
        "clip_i_target": metrics.to_target(metrics.clip_i(own, target)),
        "clip_i_references": metrics.to_references(metrics.clip_i(own, references)),
    }
    if text is not None:
        scores["clip_t_cosine"] = metrics.clip_t_cosine(own, text)
        scores["clip_score"] = metrics.clip_score(own, text)
    return scores


def _dino_scores(features: Floats | None, where: slice, pictures: int) -> dict[str, Floats]:
    if features is None:
        return {}
    own, target, references = _parts(features, where, pictures)
    return {
        "dino_i_target": metrics.to_target(metrics.dino_i(own, target)),
        "dino_i_references": metrics.to_references(metrics.dino_i(own, references)),
    }


def _attribute_scores(
    reader: AttributeReader | None, images: Sequence[Image.Image], expected: Attributes | None
) -> dict[str, Floats]:
    if reader is None or expected is None:
        return {}
    read = reader(images)
    return {
        "shared_right": right(read, expected.shared, len(images)),
        "named_right": right(read, expected.named, len(images)),
    }


def _rows(work: Work, scores: Mapping[str, Floats]) -> list[Row]:
    group = work.group
    return [
        Row(
            picture.method,
            group.id,
            group.category,
            group.split,
            picture.seed,
            picture.references,
            picture.content,
            work.scorer,
            **{name: float(values[i]) for name, values in scores.items()},
        )
        for i, picture in enumerate(work.pictures)
    ]
