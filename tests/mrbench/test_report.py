"""The report has every method and metric, the paper's numbers, the exclusions, and plots."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from PIL import Image

from easyref_core.mrbench.__main__ import main
from easyref_core.mrbench.images import Exclusion
from easyref_core.mrbench.metrics import Interval
from easyref_core.mrbench.paper_numbers import ROWS
from easyref_core.mrbench.plots import style
from easyref_core.mrbench.report import cell, write_report
from easyref_core.mrbench.rows import EXCLUDED, METRICS, Row, write_csv, write_rows
from easyref_core.mrbench.summary import LABELS, compare, few_topics, group_means, pool, topics_of

from .benchmarks import error_of

METHODS = ("easyref", "easyref-2-references", "ip_adapter_average", "plain")
MODELS = {"clip": "tiny-clip@sha256:0", "dino": None, "attributes": None}
FACTS = {"benchmark": "small", "seed": 7, "extractors": MODELS, "groups": 8, "pictures": 64, "excluded": 1}


def rows(methods: Sequence[str] = METHODS) -> list[Row]:
    """Scores of eight groups; an earlier method scores higher."""
    return [
        Row(
            method=method,
            group=f"g{i}",
            topic=f"g{i}",
            category="style" if i < 4 else "identity",
            split="held-in" if i % 2 else "held-out",
            seed=seed,
            references=2 if "references" in method else 2 + i % 3,
            picture="",
            scorer="",
            **{name: 0.5 - 0.1 * rank + 0.01 * i + 0.001 * seed for name in METRICS},
        )
        for rank, method in enumerate(methods)
        for i in range(8)
        for seed in (0, 1)
    ]


def write_results(folder: Path, scores: Sequence[Row]) -> Path:
    """Write a results folder as `score` does."""
    write_rows(folder, scores)
    missing = Exclusion("target", "g9/target.png of group g9", "there is no such file")
    write_csv(folder / EXCLUDED, ("what", "name", "reason"), [asdict(missing)])
    (folder / "results.json").write_text(json.dumps(FACTS))
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results and report of a benchmark. Shared: a test that writes makes its own."""
    folder = write_results(tmp_path_factory.mktemp("results"), rows())
    write_report(folder)
    return folder


@pytest.fixture
def text(results: Path) -> str:
    return (results / "report.md").read_text(encoding="utf-8")


def table_lines(text: str, title: str) -> list[list[str]]:
    """Cells of the first table under a heading."""
    section = re.split(r"^#+ ", text.split(title, 1)[1], maxsplit=1, flags=re.M)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("split", ["held-in", "held-out"])
def test_every_method_and_metric_is_in_the_table(text: str, split: str) -> None:
    head, _, *body = table_lines(text, f"## {split}\n")
    assert head[1:3] == ["groups", "topics"]
    assert head[3:] == [LABELS[name] for name in METRICS]
    assert tuple(line[0] for line in body) == METHODS
    assert all(line[1:3] == ["4", "4"] for line in body)
    values = [value for line in body for value in line[3:]]
    assert all(re.fullmatch(r"0\.\d{3} \[0\.\d{3}, 0\.\d{3}\]", value) for value in values)


def test_the_papers_numbers_are_in_tables_of_their_own(text: str) -> None:
    ours, paper = text.split("## The paper's numbers")
    assert "0.833" not in ours
    assert "| held-out | EasyRef | 0.833 | 0.709 | 0.614 |  |" in paper
    assert "| COCO val | EasyRef | 0.876 | 0.621 | 0.873 |  |" in paper


def test_a_split_of_few_topics_has_a_warning(text: str, results: Path, capsys) -> None:
    warning = "held-in has 4 topics; with fewer than 20 its intervals are too narrow."
    assert f"## held-in\n\n**{warning}**" in text
    assert main(["report", str(results)]) == 0
    assert f"mrbench: {warning}" in capsys.readouterr().err
    many = [replace(row, topic=f"t{i}", split="held-out") for row in rows() for i in range(20)]
    assert few_topics(many) == {}


@pytest.mark.parametrize(
    "part",
    [
        "### held-in, identity",
        "### held-out, style",
        "## The paper's numbers (arXiv 2412.09618 v1)\n\nNot comparable with the numbers above:",
        "| held-out | LoRA | - | - | - | failed: not trained on these groups |",
        "## Excluded: 1\n\n- target g9/target.png of group g9: there is no such file",
        "- clip: tiny-clip@sha256:0\n- dino: none",
        *dict.fromkeys(row.method for row in ROWS),
    ],
)
def test_parts_of_the_report(part: str, text: str) -> None:
    assert part in text


def test_the_papers_numbers_are_complete() -> None:
    assert [sum(row.table == table for row in ROWS) for table in (2, 3, 4, 5)] == [11, 6, 5, 3]
    same = [row for row in ROWS if row.scores == (0.833, 0.709, 0.614)]
    assert [row.table for row in same] == [3, 4, 5]  # EasyRef with 64 tokens at the last layer, three times


def test_win_rates_and_differences(text: str) -> None:
    win_rate, difference = "1.000 [1.000, 1.000]", "0.100 [0.100, 0.100]"
    for split in ("held-in", "held-out"):
        head, _, *body = table_lines(text, f"### {split}, easyref against the others\n")
        assert head[2:] == ["common groups", "win rate", "mean difference", "identity", "style"]
        assert body[0][:5] == ["CLIP-I, target", "easyref-2-references", "4", win_rate, difference]
        assert len(body) == len(METRICS) * (len(METHODS) - 1)


def test_differences_of_a_category_are_over_its_groups(tmp_path: Path) -> None:
    lower = [
        replace(row, clip_score=0.0) if (row.method, row.category) == ("plain", "style") else row
        for row in rows()
    ]
    report = write_report(write_results(tmp_path, lower)).read_text(encoding="utf-8")
    head, _, *body = table_lines(report, "### held-out, easyref against the others\n")
    (line,) = (line for line in body if line[:2] == ["CLIP-T, CLIPScore", "plain"])
    assert [float(text.split()[0]) for text in line[4:]] == [0.405, 0.300, 0.510]  # all, identity, style
    assert [head[2], line[2]] == ["common groups", "4"]


def test_comparison_is_over_common_groups() -> None:
    some = [row for row in rows() if (row.method, row.group) != ("plain", "g0")]
    result = compare(pool(group_means(some, "clip_score")), "easyref", "plain", topics_of(some))
    assert (result.groups, result.win_rate.mean) == (7, 1.0)
    assert result.difference.mean == pytest.approx(0.3)


def test_without_common_groups_there_is_no_number() -> None:
    result = compare(pool(group_means(rows(["easyref"]), "clip_score")), "easyref", "plain", {})
    assert result.groups == 0
    assert math.isnan(result.win_rate.mean)


@pytest.mark.parametrize("plot", ["score_by_references.png", "win_rates.png"])
def test_plots_are_images(text: str, results: Path, plot: str) -> None:
    assert f"({plot})" in text
    with Image.open(results / plot) as image:
        assert min(image.size) > 300


def test_training_seeds_are_pooled_into_one_line(tmp_path: Path) -> None:
    entries = ("easyref@0", "easyref@1", "easyref@0-2-references", "plain")
    report = write_report(write_results(tmp_path, rows(entries))).read_text(encoding="utf-8")
    head, _, *body = table_lines(report, "## held-out\n")
    assert head[1:4] == ["groups", "topics", "training seeds"]
    seeds = {line[0]: line[3] for line in body}
    assert seeds == {"easyref": "2", "easyref-2-references": "1", "plain": "1"}
    lines = {line[0]: line for line in body}
    assert lines["easyref"][4].startswith("0.480 [0.4")  # of 0.53 and 0.43, with both inside the interval
    assert "## Win rates of easyref\n" in report
    assert (tmp_path / "pictures.csv").read_text().count("easyref@1,") == 16


def test_twenty_methods_look_different() -> None:
    styles = [style(i) for i in range(20)]
    assert len({one["color"] for one in styles}) == 20
    assert len({(one["marker"], one["linestyle"]) for one in styles}) == 20
    colours = [tuple(bytes.fromhex(one["color"][1:])) for one in styles]
    distances = [math.dist(a, b) for i, a in enumerate(colours) for b in colours[:i]]
    assert min(distances) > 30  # of 441


def test_one_method_with_one_metric_is_enough(tmp_path: Path) -> None:
    one = [row for row in rows(["plain"]) if row.group == "g0"]
    one = [replace(row, **dict.fromkeys(METRICS[1:], math.nan)) for row in one]
    report = write_report(write_results(tmp_path, one)).read_text(encoding="utf-8")
    assert "| plain | 1 | 1 | 0.500 |" in report
    assert "Win rates" not in report


def test_methods_can_be_chosen_and_ordered(tmp_path: Path) -> None:
    write_results(tmp_path, [row for row in rows() if row.group in ("g0", "g1")])
    report = write_report(tmp_path, "plain", ["plain", "easyref"]).read_text(encoding="utf-8")
    assert [line[0] for line in table_lines(report, "## held-in\n")[2:]] == ["plain", "easyref"]
    assert "## Win rates of plain" in report


def test_a_method_without_scores_is_named(results: Path) -> None:
    text = error_of(lambda: write_report(results, methods=["lora"]))
    assert text == "No scores of lora; there are easyref, easyref-2-references, ip_adapter_average, plain."
    assert "No scores of lora" in error_of(lambda: write_report(results, "lora"))


def test_the_error_for_missing_scores_names_the_command(tmp_path: Path, capsys) -> None:
    assert main(["report", str(tmp_path)]) == 1
    expected = "has no scored image. Run `python -m easyref_core.mrbench score` first."
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        (Interval(0.5, 0.25, 0.75), "0.500 [0.250, 0.750]"),
        (Interval(0.5, math.nan, math.nan), "0.500"),
        (Interval(math.nan, math.nan, math.nan), "-"),
    ],
)
def test_cells(interval: Interval, expected: str) -> None:
    assert cell(interval) == expected
