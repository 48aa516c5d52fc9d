"""Evaluation on groups of new creatures: is the generated creature the one that the references share?"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ...mrbench.group_scores import fraction_right
from ...mrbench.methods.easyref import EasyRefMethod
from ...mrbench.methods.method import Method, Plain
from ...mrbench.metrics import Interval, bootstrap
from ...mrbench.report import table
from ...training.base_model import BaseModel
from ..evaluate import SAMPLING as SHAPES_SAMPLING
from ..evaluate import generate_images
from ..worlds import BASE, CREATURES
from .groups import Group, render_groups
from .identities import PARTS, VARIANCE, Floats, draw_identities, split
from .judge import CreatureJudge, load_judge

SAMPLING = dataclasses.replace(SHAPES_SAMPLING, guidance=3.0)
CANDIDATES = 100  # identities among which the nearest to an image is looked for, its own with them


def creature_methods(folder: Path) -> dict[str, Method]:
    """The creatures' SDXL without and with EasyRef, from a folder with the files of weights/."""
    base = BaseModel.load(folder / BASE)
    checkpoint, mllm = str(folder / CREATURES.easyref), str(folder / CREATURES.mllm)
    easyref = EasyRefMethod(base, checkpoint, mllm, size=CREATURES.size)
    return {"without": Plain(base), "with EasyRef": easyref}


def evaluate(folder: Path, count: int, seed: int) -> str:
    """The `identity_table` of `count` new creatures, from a folder with the files of weights/."""
    groups = render_groups(draw_identities(np.random.default_rng(seed), count), seed)
    return identity_table(creature_methods(folder), groups, load_judge(folder / CREATURES.judge))


def identity_table(
    methods: Mapping[str, Method], groups: Sequence[Group], judge: CreatureJudge, seed: int = 0
) -> str:
    """The `summary` of each method's images, as a Markdown table with an explanation."""
    columns = [summary(method, groups, judge, seed) for method in methods.values()]
    rows = [[name, *(_cell(column[name]) for column in columns)] for name in columns[0]]
    return (
        f"{table(['measure', *methods], rows)}\n\n{len(groups)} groups of creatures that no training has "
        "seen, one image each; mean (95 % interval over groups). Similarity: cosine of the identities that "
        "the judge measures in the generated image and in the target. Found: the measured identity is nearer "
        f"to the shared one than to {CANDIDATES - 1} others. Errors: of the measured identity, as a fraction "
        "of its variance. Named: ground and place of the prompt."
    )


def summary(
    method: Method, groups: Sequence[Group], judge: CreatureJudge, seed: int = 0
) -> dict[str, Interval]:
    """Measures of one image of each group, with 95 % intervals over groups."""
    tasks = [group.task for group in groups]
    images = generate_images(method, tasks, seed, SAMPLING)
    measured, wanted = judge.images(images), np.stack([group.identity for group in groups])
    similar = similarities(measured, judge.images([group.target for group in groups]))
    names = judge(images)
    named = [
        fraction_right({k: [v[i]] for k, v in names.items()}, group.named, 1)[0]
        for i, group in enumerate(groups)
    ]
    sizes = np.array([len(group.references) for group in groups])
    values = {
        "similarity": similar,
        f"found among {CANDIDATES}": found(measured, wanted, seed),
        "named": named,
    }
    values |= {f"similarity, {size} references": similar[sizes == size] for size in np.unique(sizes)}
    errors = split((measured - wanted) ** 2 / VARIANCE)
    values |= {f"error, {part}": errors[part].mean(axis=1) for part in PARTS}
    return {name: bootstrap(np.asarray(each, dtype=float)) for name, each in values.items()}


def similarities(a: Floats, b: Floats) -> Floats:
    """Cosine of each row of a (N, 13) and the same row of b -> (N,)."""
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def found(measured: Floats, wanted: Floats, seed: int) -> Floats:
    """1 where a measured identity (N, 13) is nearer to the wanted one than to all others, else 0: (N,)."""
    # another stream than that of groups drawn with this seed, whose identities would be among the others
    others = draw_identities(np.random.default_rng([CANDIDATES, seed]), CANDIDATES - 1)
    away = np.linalg.norm(measured[:, None] - others[None], axis=-1).min(axis=1)
    return (np.linalg.norm(measured - wanted, axis=1) < away).astype(float)


def _cell(value: Interval) -> str:
    return f"{value.mean:.3f} ({value.low:.3f} to {value.high:.3f})"
