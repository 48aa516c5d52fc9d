"""Evaluation on held-out groups: the accuracy of shared and named attributes by the classifier."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..mrbench.generate import batches
from ..mrbench.methods.easyref import EasyRefMethod
from ..mrbench.methods.method import Method, Plain, Sampling, Task
from ..mrbench.metrics import Interval, bootstrap
from ..mrbench.report import table
from ..training.base_model import BaseModel
from .classifier import load_classifier
from .groups import Plan, evaluation_groups
from .images import ATTRIBUTES, IMAGE_SIZE, render
from .worlds import BASE, SHAPES

SAMPLING = Sampling(size=IMAGE_SIZE, steps=20, guidance=4.0, negative="")
BATCH = 50  # groups generated together
Classify = Callable[[Sequence[Image.Image]], Mapping[str, Sequence[str]]]


@dataclasses.dataclass(frozen=True)
class Group:
    """A plan with its images, 64 pixels wide."""

    id: str
    plan: Plan
    references: tuple[Image.Image, ...]
    target: Image.Image

    @property
    def task(self) -> Task:
        return Task(self.id, self.prompt, self.references)

    @property
    def prompt(self) -> str:
        return self.plan.prompt

    @property
    def shared(self) -> dict[str, str]:
        """{attribute: value} common to the references."""
        return self.plan.values(self.plan.shared)

    @property
    def named(self) -> dict[str, str]:
        """{attribute: value} named by the prompt."""
        return self.plan.values(self.plan.named)


class Result(NamedTuple):
    """The attributes of one generated image: True for those that the classifier predicts as expected."""

    group: Group
    shared: Mapping[str, bool]
    named: Mapping[str, bool]


def render_groups(plans: Sequence[Plan], seed: int) -> list[Group]:
    """Render the images of the plans."""
    rng = np.random.default_rng(seed)
    groups = []
    for number, plan in enumerate(plans):
        *references, target = map(Image.fromarray, render(np.vstack([plan.references, plan.target]), rng))
        groups.append(Group(f"group-{number:04}", plan, tuple(references), target))
    return groups


def generate_images(
    method: Method, tasks: Sequence[Task], seed: int = 0, sampling: Sampling = SAMPLING
) -> list[Image.Image]:
    """Generate one image of each task, in batches of tasks that the method can generate together."""
    images: dict[str, Image.Image] = {}
    for part, seeds in batches([(task, (seed,)) for task in tasks], method, BATCH):
        conditions = [method.prepare(task, Path()) for task in part]
        rows = method.generate(part, conditions, seeds, sampling)
        images |= {task.id: image for task, (image,) in zip(part, rows, strict=True)}
    return [images[task.id] for task in tasks]


def classify_images(
    images: Sequence[Image.Image], groups: Sequence[Group], classify: Classify
) -> list[Result]:
    """Compare the classifier's predictions with the attributes of each group."""
    predicted = classify(images)

    def correct(number: int, expected: Mapping[str, str]) -> dict[str, bool]:
        return {name: predicted[name][number] == value for name, value in expected.items()}

    return [
        Result(group, correct(i, group.shared), correct(i, group.named)) for i, group in enumerate(groups)
    ]


def tiny_methods(folder: Path) -> dict[str, Method]:
    """The tiny SDXL without and with EasyRef, from a folder with the files of weights/."""
    base = BaseModel.load(folder / BASE)
    checkpoint, mllm = str(folder / SHAPES.easyref), str(folder / SHAPES.mllm)
    return {"without": Plain(base), "with EasyRef": EasyRefMethod(base, checkpoint, mllm, size=SHAPES.size)}


def evaluate(folder: Path, count: int, seed: int) -> str:
    """The `accuracy_table` of `count` held-out groups, from a folder with the files of weights/."""
    groups = render_groups(list(evaluation_groups(seed, count)), seed)
    return accuracy_table(tiny_methods(folder), groups, load_classifier(folder / SHAPES.judge))


def accuracy_table(
    methods: Mapping[str, Method], groups: Sequence[Group], classify: Classify, seed: int = 0
) -> str:
    """The `summary` of each method's images, as a Markdown table with an explanation."""
    tasks = [group.task for group in groups]
    columns = [
        summary(classify_images(generate_images(method, tasks, seed), groups, classify))
        for method in methods.values()
    ]
    lines = table(
        ["attributes that are right", *methods],
        [[name, *(_cell(column[name]) for column in columns)] for name in columns[0]],
    )
    return (
        f"{lines}\n\n{len(groups)} groups whose targets are held out from training, one image each; mean (95 "
        "% interval over groups). Shared: attributes common to the references. Named: attributes that the "
        f"prompt names. Chance is {chance(groups):.3f} for shared attributes."
    )


def chance(groups: Sequence[Group]) -> float:
    """Accuracy of shared attributes by uniform guessing."""
    return float(np.mean([np.mean([1 / len(ATTRIBUTES[n]) for n in g.plan.shared]) for g in groups]))


def summary(results: Sequence[Result]) -> dict[str, Interval]:
    """Accuracy with 95 % intervals over groups: overall, by attribute, by references, with an outsider."""
    values = {
        "shared": [_fraction(r.shared) for r in results],
        "named": [_fraction(r.named) for r in results if r.named],
    }
    for name in ATTRIBUTES:
        values[f"shared, {name}"] = [r.shared[name] for r in results if name in r.shared]
    for count in sorted({len(r.group.references) for r in results}):
        sized = [r for r in results if len(r.group.references) == count]
        values[f"shared, {count} references"] = [_fraction(r.shared) for r in sized]
    outsiders = [r for r in results if r.group.plan.outsider is not None]
    values["shared, one does not belong"] = [_fraction(r.shared) for r in outsiders]
    return {name: bootstrap(np.array(accuracies, dtype=float)) for name, accuracies in values.items()}


def _cell(value: Interval) -> str:
    return f"{value.mean:.3f} ({value.low:.3f} to {value.high:.3f})"


def _fraction(correct: Mapping[str, bool]) -> float:
    return float(np.mean(list(correct.values())))
