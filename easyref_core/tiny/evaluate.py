"""Does it work? Held-out groups painted by a method, and how often the judge finds what was shared and what was named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..mrbench.methods.easyref import EasyRefMethod
from ..mrbench.methods.method import Method, Sampling, Task
from ..mrbench.methods.plain import Plain
from ..mrbench.metrics import Interval, bootstrap
from ..training.base_model import BaseModel
from .groups import Plan
from .images import ATTRIBUTES, PICTURE, render
from .qwen2_vl import SIZE
from .recipe import BASE, EASYREF, MLLM

if TYPE_CHECKING:
    from PIL import Image

SAMPLING = Sampling(size=PICTURE, steps=20, guidance=4.0, negative="")
BATCH = 50  # groups painted at once
Judge = Callable[[Sequence["Image.Image"]], dict[str, list[str]]]


@dataclasses.dataclass(frozen=True)
class Group:
    """A plan, drawn: the references and the target, 64 pixels wide."""

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
        """What the references have in common, in words."""
        return in_words(self.plan.values(self.plan.shared))

    @property
    def named(self) -> dict[str, str]:
        """What the prompt names."""
        return in_words(self.plan.values(self.plan.named))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the judge found in one picture: which of the shared and of the named attributes are right."""

    shared: Mapping[str, bool]
    named: Mapping[str, bool]
    references: int
    outsider: bool


def draw(plans: Sequence[Plan], seed: int) -> list[Group]:
    """The plans as pictures."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    groups = []
    for number, plan in enumerate(plans):
        pictures = [Image.fromarray(p) for p in render(np.vstack([plan.references, plan.target]), rng)]
        groups.append(Group(f"group-{number:04}", plan, tuple(pictures[:-1]), pictures[-1]))
    return groups


def paint_groups(
    method: Method, groups: Sequence[Group], seed: int = 0, sampling: Sampling = SAMPLING
) -> list[Image.Image]:
    """One picture of each group. Groups that a method must not mix in a batch are painted one after the other."""
    pictures: dict[str, Image.Image] = {}
    kinds = {method.batch_key(group.task) for group in groups}
    for kind in kinds:
        alike = [group.task for group in groups if method.batch_key(group.task) == kind]
        for start in range(0, len(alike), BATCH):
            tasks = alike[start : start + BATCH]
            conditions = [method.prepare(task, Path()) for task in tasks]
            painted = method.generate(tasks, conditions, [seed], sampling)
            pictures |= {task.id: one for task, (one,) in zip(tasks, painted, strict=True)}
    return [pictures[group.id] for group in groups]


def judge_pictures(pictures: Sequence[Image.Image], groups: Sequence[Group], judge: Judge) -> list[Verdict]:
    """A verdict for each picture."""
    seen = judge(pictures)

    def right(number: int, wanted: Mapping[str, str]) -> dict[str, bool]:
        return {name: seen[name][number] == value for name, value in wanted.items()}

    return [
        Verdict(
            right(number, group.shared),
            right(number, group.named),
            len(group.references),
            group.plan.outsider is not None,
        )
        for number, group in enumerate(groups)
    ]


def tiny_methods(folder: Path) -> dict[str, Method]:
    """The tiny SDXL of a folder laid out as weights/ is, without and with EasyRef."""
    base = BaseModel.load(folder / BASE)
    checkpoint, mllm = str(folder / EASYREF), str(folder / MLLM)
    return {"without": Plain(base), "with EasyRef": EasyRefMethod(base, checkpoint, mllm, size=SIZE)}


def accuracy_table(
    methods: Mapping[str, Method], groups: Sequence[Group], judge: Judge, seed: int = 0
) -> str:
    """What `summary` finds of each method's pictures of held-out groups, in Markdown."""
    columns = {
        name: summary(judge_pictures(paint_groups(method, groups, seed), groups, judge))
        for name, method in methods.items()
    }
    rows = [
        f"| {part} | " + " | ".join(_cell(column[part]) for column in columns.values()) + " |"
        for part in next(iter(columns.values()))
    ]
    return "\n".join(
        [
            f"| attributes that are right | {' | '.join(columns)} |",
            "| --- |" + " --- |" * len(columns),
            *rows,
            "",
            f"{len(groups)} groups whose target no training has seen, one picture each; mean (95 % interval over groups). "
            "Shared: what the references have in common. Named: what the prompt asks for. By guessing, "
            f"{chance(groups):.3f} of the shared ones are right.",
        ]
    )


def _cell(value: Interval) -> str:
    return f"{value.mean:.3f} ({value.low:.3f} to {value.high:.3f})"


def in_words(values: Mapping[str, int]) -> dict[str, str]:
    """{attribute: index} -> {attribute: value}."""
    return {name: ATTRIBUTES[name][index] for name, index in values.items()}


def chance(groups: Sequence[Group]) -> float:
    """How often shared attributes are right by guessing evenly."""
    return float(np.mean([np.mean([1 / len(ATTRIBUTES[n]) for n in g.plan.shared]) for g in groups]))


def summary(verdicts: Sequence[Verdict]) -> dict[str, Interval]:
    """Accuracy with 95 % intervals over groups: in all, by attribute, by number of references, with an outsider."""
    values = {
        "shared": [_part(v.shared) for v in verdicts],
        "named": [_part(v.named) for v in verdicts if v.named],
    }
    for name in ATTRIBUTES:
        values[f"shared, {name}"] = [v.shared[name] for v in verdicts if name in v.shared]
    for count in sorted({v.references for v in verdicts}):
        values[f"shared, {count} references"] = [_part(v.shared) for v in verdicts if v.references == count]
    values["shared, one does not belong"] = [_part(v.shared) for v in verdicts if v.outsider]
    return {name: bootstrap(np.array(found, dtype=float)) for name, found in values.items()}


def _part(right: Mapping[str, bool]) -> float:
    """The part of a picture's attributes that is right, 0..1."""
    return float(np.mean(list(right.values())))
