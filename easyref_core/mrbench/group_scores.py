"""Scores of the images of several groups, with one batched pass of each feature extractor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

from . import metrics
from .images import BrokenImage, Exclusion, load_image
from .manifest import Attributes, Group, Manifest
from .rows import Row

if TYPE_CHECKING:
    from PIL import Image

    from .extractors import AttributeClassifier, Clip, Dino, SubjectModel
    from .metrics import Floats

RUN_ID = uuid4().hex  # differs in every run


@dataclass(frozen=True)
class Extractors:
    """Models that compute features and attributes; the metrics of one that is None are not measured."""

    clip: Clip | None = None
    dino: Dino | None = None
    subject: SubjectModel | None = None
    attributes: AttributeClassifier | None = None
    attributes_name: str | None = None

    @property
    def identities(self) -> dict[str, str | None]:
        """The exact models."""
        # A classifier without an identity may change between runs, so its scores must not be reused.
        identity = getattr(self.attributes, "identity", f"{self.attributes_name} {RUN_ID}")
        return {
            "clip": self.clip and self.clip.identity,
            "dino": self.dino and self.dino.identity,
            "subject": self.subject and self.subject.identity,
            "attributes": identity if self.attributes else None,
        }


def load_extractors(
    manifest: Manifest,
    device: str,
    *,
    clip: str,
    dino: str,
    classifier: str | None = None,
    subject: str | None = None,
    offline: bool = False,
) -> Extractors:
    """Load the models of these names; extractors.NONE leaves one out.

    clip, dino: name, name@revision or folder. classifier, subject: module:function; the default classifier is
    loaded only if a group of the manifest has attributes. offline: download nothing.
    """
    from . import extractors

    none = extractors.NONE

    def model(kind: type[Clip | Dino], name: str) -> Clip | Dino | None:
        if name == none:
            return None
        name, _, revision = (name, "", "") if Path(name).exists() else name.partition("@")
        return kind(name, revision or None, offline, device)

    has_attributes = any(group.attributes for group in manifest.groups)
    name = classifier or (extractors.TINY_CLASSIFIER if has_attributes else none)
    return Extractors(
        clip=model(extractors.Clip, clip),
        dino=model(extractors.Dino, dino),
        subject=None if subject in (None, none) else extractors.load_subject_model(subject),
        attributes=None if name == none else extractors.load_attribute_classifier(name),
        attributes_name=name,
    )


@dataclass(frozen=True)
class GroupJob:
    """Images of one group that need scores: the file of each, and its row without scores."""

    group: Group
    images: Mapping[Path, Row]

    @property
    def total(self) -> int:
        """Number of images to load: generated, references and target."""
        return len(self.images) + len(self.group.references) + 1


def bundles(jobs: Sequence[GroupJob], batch: int) -> Iterator[list[GroupJob]]:
    """Collect jobs until their images fill a batch."""
    bundle: list[GroupJob] = []
    for job in jobs:
        bundle.append(job)
        if sum(one.total for one in bundle) >= batch:
            yield bundle
            bundle = []
    if bundle:
        yield bundle


def score_bundle(bundle: Sequence[GroupJob], extractors: Extractors, batch: int) -> Iterator[Row | Exclusion]:
    """Rows of the images of some groups, and exclusions of those that cannot be loaded."""
    jobs: list[GroupJob] = []
    generated: list[list[Image.Image]] = []
    for job in bundle:
        loaded: dict[Path, Image.Image] = {}
        for file in job.images:
            try:
                loaded[file] = load_image(file)
            except BrokenImage as error:
                yield Exclusion("picture", str(file), str(error))
        if loaded:
            jobs.append(GroupJob(job.group, {file: job.images[file] for file in loaded}))
            generated.append(list(loaded.values()))
    # In this order: a group's target, its references, its generated images.
    flat = [
        image
        for job, images in zip(jobs, generated, strict=True)
        for image in (*map(load_image, (job.group.target, *job.group.references)), *images)
    ]
    ends = np.cumsum([job.total for job in jobs])[:-1]

    def features(model: Clip | Dino | SubjectModel | None) -> list[Floats | None]:
        computed = _in_batches(model and model.images, flat, batch)
        return [None] * len(jobs) if computed is None else np.split(computed, ends)

    models = {"clip_i": extractors.clip, "dino_i": extractors.dino, "subject": extractors.subject}
    computed = {metric: features(model) for metric, model in models.items()}
    texts = _in_batches(extractors.clip and extractors.clip.texts, [job.group.prompt for job in jobs], batch)
    for i, job in enumerate(jobs):
        count = len(job.images)
        scores: dict[str, Floats] = {}
        for metric, values in computed.items():
            scores |= _image_scores(metric, values[i], count)
        if texts is not None and job.group.prompt:
            generated_features = computed["clip_i"][i][-count:]
            scores["clip_t_cosine"] = metrics.clip_t_cosine(generated_features, texts[i])
            scores["clip_score"] = metrics.clip_score(generated_features, texts[i])
        scores |= _attribute_scores(extractors.attributes, generated[i], job.group.attributes)
        for n, row in enumerate(job.images.values()):
            yield replace(row, **{name: float(score[n]) for name, score in scores.items()})


def fraction_right(
    predicted: Mapping[str, Sequence[str]], expected: Mapping[str, str], images: int
) -> Floats:
    """Fraction of the expected attributes that were predicted for each image (N,); NaN if there are none.

    Raises ValueError for an attribute that is not among the predicted ones.
    """
    if not expected:
        return np.full(images, math.nan)
    if unknown := expected.keys() - predicted.keys():
        raise ValueError(
            f"The manifest has the attributes {', '.join(sorted(unknown))}, which the classifier does not "
            f"predict; it predicts {', '.join(predicted)}. Choose a classifier of the "
            "manifest's attributes (--classifier of score), or none."
        )
    return np.mean(
        [[value == wanted for value in predicted[name]] for name, wanted in expected.items()], axis=0
    )


def _in_batches(features: Callable[..., Floats] | None, items: Sequence[Any], batch: int) -> Floats | None:
    if not features or not items:
        return None
    return np.concatenate([features(items[i : i + batch]) for i in range(0, len(items), batch)])


def _image_scores(metric: str, features: Floats | None, count: int) -> dict[str, Floats]:
    """Features of the target, the references and the `count` generated images -> (count,) scores."""
    if features is None:
        return {}
    generated, target, references = features[-count:], features[:1], features[1:-count]
    return {
        f"{metric}_target": metrics.to_target(metrics.cosine(generated, target)),
        f"{metric}_references": metrics.to_references(metrics.cosine(generated, references)),
    }


def _attribute_scores(
    classifier: AttributeClassifier | None, images: Sequence[Image.Image], expected: Attributes | None
) -> dict[str, Floats]:
    if classifier is None or expected is None:
        return {}
    predicted = classifier(images)
    return {
        "shared_right": fraction_right(predicted, expected.shared, len(images)),
        "named_right": fraction_right(predicted, expected.named, len(images)),
    }
