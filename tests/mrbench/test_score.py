"""Scoring end to end with tiny random models: numbers, exclusions, reuse of rows, several processes."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from devkit.hosts import ROOT
from easyref_core.mrbench import metrics, score
from easyref_core.mrbench.__main__ import main
from easyref_core.mrbench.group_scores import Extractors, fraction_right
from easyref_core.mrbench.latency import Latency, Timing, append_timings, read_latencies
from easyref_core.mrbench.processes import Process
from easyref_core.mrbench.report import write_report
from easyref_core.mrbench.rows import Row, read_rows
from easyref_core.mrbench.summary import summarise

from .benchmarks import benchmark, error_of, generated, group, image, save

ATTRIBUTES = {"shared": {"tone": "dark", "hue": "red"}, "named": {"tone": "light"}}
GROUPS = [group(0, 2, "held-in"), group(1, 3, attributes=ATTRIBUTES), group(2, 2, prompt="")]
IDS = [one["id"] for one in GROUPS]
METHODS = ("easyref", "plain")
KEYS = {(method, name, seed) for method in METHODS for name in IDS for seed in (0, 1)}


class Classifier:
    """Predicts the same for every image; it has no identity."""

    def __call__(self, images: Sequence[Image.Image]) -> dict[str, list[str]]:
        return {"tone": ["dark"] * len(images), "hue": ["green"] * len(images)}


@pytest.fixture(scope="module")
def all_extractors(extractors: Extractors) -> Extractors:
    return replace(extractors, attributes=Classifier(), attributes_name="tests:Classifier")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results"


@pytest.fixture
def run(tmp_path: Path, results: Path, all_extractors: Extractors) -> Callable[..., score.Outcome]:
    """Scores a benchmark of three groups, two methods and two seeds."""
    manifest = benchmark(tmp_path, GROUPS)
    out = generated(tmp_path / "out", METHODS, IDS)
    return lambda extractors=all_extractors, **options: score.score(
        manifest, out, results, extractors, **options
    )


def row_of(rows: Sequence[Row], method: str, name: str, seed: int) -> Row:
    return next(row for row in rows if row.key == (method, name, seed))


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as content:
        return list(csv.DictReader(content))


def test_every_image_has_a_row(run, results: Path) -> None:
    outcome = run()
    assert {row.key for row in outcome.rows} == KEYS
    assert (outcome.scored, outcome.exclusions) == (12, [])
    assert {row.key for row in read_rows(results)} == KEYS


def test_the_numbers_of_a_row_are_the_metrics_of_its_images(
    run, tmp_path: Path, extractors: Extractors
) -> None:
    row = row_of(run(batch=3).rows, "plain", "g1", 1)
    files = ["out/plain/g1/1.png", "g1/target.png", *(f"g1/{i}.png" for i in range(3))]
    images = [Image.open(tmp_path / file) for file in files]
    text = extractors.clip.texts(["a thing number 1"])[0]
    for kind, features in (
        ("clip_i", extractors.clip.images(images)),
        ("dino_i", extractors.dino.images(images)),
    ):
        cosines = metrics.cosine(features[:1], features[1:])[0]
        assert getattr(row, f"{kind}_target") == pytest.approx(cosines[0], abs=1e-5)
        assert getattr(row, f"{kind}_references") == pytest.approx(cosines[1:].mean(), abs=1e-5)
    cosine = metrics.cosine(extractors.clip.images(images[:1]), text[None]).item()
    assert row.clip_t_cosine == pytest.approx(cosine, abs=1e-5)
    assert row.clip_score == pytest.approx(2.5 * max(row.clip_t_cosine, 0), abs=1e-5)
    assert (row.split, row.category, row.references) == ("held-out", "subject", 3)


def test_attributes_are_scored_if_the_manifest_has_them(run) -> None:
    rows = run().rows
    assert row_of(rows, "plain", "g1", 0).shared_right == 0.5
    assert row_of(rows, "plain", "g1", 0).named_right == 0
    assert math.isnan(row_of(rows, "plain", "g0", 0).shared_right)


def test_fraction_of_attributes_by_hand() -> None:
    predicted = {"tone": ["dark", "light"], "hue": ["red", "red"]}
    np.testing.assert_allclose(fraction_right(predicted, {"tone": "dark", "hue": "red"}, 2), [1.0, 0.5])
    assert np.isnan(fraction_right(predicted, {}, 2)).all()


def test_classifier_of_other_attributes_is_refused() -> None:
    """As that of the shapes is for the creatures."""
    with pytest.raises(ValueError, match=r"attributes ground, which .*; it predicts hue, tone"):
        fraction_right({"hue": ["red"], "tone": ["dark"]}, {"ground": "sand", "tone": "dark"}, 1)


def test_without_a_prompt_clip_t_is_not_measured(run) -> None:
    row = row_of(run().rows, "plain", "g2", 0)
    assert math.isnan(row.clip_t_cosine)
    assert math.isnan(row.clip_score)
    assert not math.isnan(row.clip_i_target)


def test_a_copy_of_the_target_has_similarity_1(run, tmp_path: Path) -> None:
    save(Image.open(tmp_path / "g0/target.png"), tmp_path / "out/easyref/g0/0.png")
    row = row_of(run().rows, "easyref", "g0", 0)
    assert (row.clip_i_target, row.dino_i_target) == pytest.approx((1, 1), abs=1e-5)


def test_method_json_limits_the_number_of_references(run, tmp_path: Path) -> None:
    """Also in rows that are reused."""
    assert row_of(run().rows, "easyref", "g1", 0).references == 3
    (tmp_path / "out/easyref/method.json").write_text('{"references": 2}')
    again = run()
    assert (again.scored, row_of(again.rows, "easyref", "g1", 0).references) == (0, 2)
    assert row_of(again.rows, "plain", "g1", 0).references == 3


def test_the_exact_models_are_recorded(run, results: Path, extractors: Extractors) -> None:
    run()
    facts = json.loads((results / "results.json").read_text())
    names = facts["extractors"]
    assert (names["clip"], names["dino"]) == (extractors.clip.identity, extractors.dino.identity)
    assert names["attributes"].startswith("tests:Classifier ")
    assert (facts["pictures"], facts["excluded"], facts["benchmark"]) == (12, 0, "small")


def test_the_metrics_of_a_missing_extractor_are_empty(run, extractors: Extractors) -> None:
    rows = run(Extractors(dino=extractors.dino)).rows
    assert all(math.isnan(row.clip_i_target) and not math.isnan(row.dino_i_target) for row in rows)
    assert {line.metric for line in summarise(rows)} == {"dino_i_target", "dino_i_references"}


def test_topics_are_in_the_rows_and_may_be_corrected(run, tmp_path: Path) -> None:
    assert {row.topic for row in run().rows} == {"g0", "g1", "g2"}
    file = tmp_path / "manifest.json"
    data = json.loads(file.read_text())
    data["groups"][1]["topic"] = data["groups"][2]["topic"] = "things"
    file.write_text(json.dumps(data))
    again = run()
    assert (again.scored, {row.topic for row in again.rows}) == (0, {"g0", "things"})
    line = next(line for line in summarise(again.rows) if (line.split, line.category) == ("held-out", "all"))
    assert (line.groups, line.topics, line.training_seeds) == (2, 1, 1)


# Exclusions


def test_a_broken_image_is_excluded(run, tmp_path: Path, results: Path) -> None:
    file = tmp_path / "out/plain/g0/1.png"
    file.write_bytes(file.read_bytes()[:60])
    outcome = run()
    (line,) = read_csv(results / "excluded.csv")
    assert (line["what"], line["name"]) == ("picture", str(file))
    assert line["reason"].startswith("it cannot be decoded as an image (")
    assert len(outcome.rows) == 11
    assert json.loads((results / "results.json").read_text())["excluded"] == 1
    assert len(run().exclusions) == 1  # listed again, but once


def test_a_group_without_a_target_is_excluded(run, tmp_path: Path, results: Path) -> None:
    (tmp_path / "g1/target.png").unlink()
    assert [row for row in run().rows if row.group == "g1"] == []
    assert [tuple(line.values()) for line in read_csv(results / "excluded.csv")] == [
        ("target", f"{tmp_path / 'g1/target.png'} of group g1", "there is no such file"),
        ("group", "g1", "its target is missing or broken"),
    ]


def test_a_group_without_images_is_excluded(run, tmp_path: Path) -> None:
    for seed in (0, 1):
        (tmp_path / f"out/plain/g2/{seed}.png").unlink()
    assert [str(e) for e in run().exclusions] == ["group plain/g2: this method has no image of it"]


def test_a_group_that_the_manifest_lacks_is_excluded(run, tmp_path: Path) -> None:
    generated(tmp_path / "out", ["plain"], ["g9"])
    assert [str(e) for e in run().exclusions] == ["group plain/g9: the manifest has no such group"]


def test_latency_is_collected(run, tmp_path: Path, results: Path) -> None:
    timing = Timing(2, 1.0, 0.5, "a CPU", is_first=True)
    for seed, seconds in (0, 2.0), (1, 4.0):
        (tmp_path / "out" / f"easyref@{seed}").mkdir()
        timings = [timing, replace(timing, prepare=seconds, is_first=False)]
        append_timings(tmp_path / "out" / f"easyref@{seed}", 0, timings)
    append_timings(tmp_path / "out" / "plain", 0, [timing])  # only a first batch
    run()
    assert read_latencies(results) == [
        Latency("easyref", "a CPU", 2, 2, 3.0, 0.5),
        Latency("plain", "a CPU", 2, 1, 1.0, 0.5),
    ]
    report = write_report(results).read_text()
    assert (
        "| method | device | 2 references |\n| --- | --- | --- |\n| easyref | a CPU | 3.000 + 0.500 |"
        in report
    )


def test_a_missing_folder_of_images_is_named(tmp_path: Path, extractors: Extractors) -> None:
    manifest, out = benchmark(tmp_path, GROUPS), tmp_path / "none"
    text = error_of(lambda: score.score(manifest, out, tmp_path, extractors), FileNotFoundError)
    assert f"There is no folder of images at {out}" in text


# Reuse of rows


def test_a_second_run_scores_nothing(run, results: Path) -> None:
    first = run()
    before = (results / "pictures.csv").read_bytes()
    again = run()
    assert (again.scored, len(again.rows)) == (0, len(first.rows))
    assert (results / "pictures.csv").read_bytes() == before


@pytest.mark.parametrize(("changed", "scored"), [("out/plain/g0/0.png", 1), ("g1/0.png", 4)])
def test_changed_images_and_groups_with_changed_references_are_scored_again(
    changed: str, scored: int, run, tmp_path: Path
) -> None:
    run()
    save(image(5000), tmp_path / changed)
    assert run().scored == scored


def test_with_other_models_all_are_scored_again(run, extractors: Extractors) -> None:
    run()
    assert run(extractors).scored == 12


def test_a_removed_image_leaves_the_results(run, tmp_path: Path) -> None:
    run()
    (tmp_path / "out/plain/g0/0.png").unlink()
    assert len(run().rows) == 11


def test_a_killed_run_continues(run, results: Path, monkeypatch) -> None:
    score_bundle, calls = score.score_bundle, []

    def kill_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score_bundle(*arguments)

    with monkeypatch.context() as broken:
        broken.setattr(score, "score_bundle", kill_second)
        with pytest.raises(KeyboardInterrupt):
            run(batch=1)
    with (results / "parts/0.jsonl").open("a") as part:
        part.write('{"Row": {"method": "pl')  # an incomplete line
    outcome = run(batch=1)
    assert (outcome.scored, len(outcome.rows)) == (8, 12)
    assert not (results / "parts").exists()


# Several processes


def test_shares_are_disjoint_and_complete() -> None:
    shares = [Process(rank, 3).share(range(10)) for rank in range(3)]
    assert sorted(i for share in shares for i in share) == list(range(10))


LAUNCHED = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from devkit.cpu_torch import complete_cpu_torch
complete_cpu_torch()
from {{module}} import main
sys.exit({{call}})
"""


@pytest.mark.thorough
def test_two_processes_share_the_work(
    run, tmp_path: Path, results: Path, clip_folder: Path, dino_folder: Path
) -> None:
    """Launched by accelerate; the script replaces `-m easyref_core.mrbench` beside a CPU-only torch."""
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED.format(module="easyref_core.mrbench.__main__", call="main(sys.argv[1:])"))
    launcher = LAUNCHED.format(module="accelerate.commands.launch", call="main()")
    options = "--cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no".split()
    options += ["--main_process_port", "0"]
    command = [sys.executable, "-c", launcher, *options, str(script), "score"]
    command += [str(tmp_path / name) for name in ("manifest.json", "out", "results")]
    command += ["--clip", str(clip_folder), "--dino", str(dino_folder), "--classifier", "none", "--offline"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("12 images scored, 0 were scored before") == 1
    rows = {row.key: row for row in read_rows(results)}
    (results / "pictures.csv").unlink()
    for row in run().rows:
        assert rows[row.key].clip_i_target == pytest.approx(row.clip_i_target, abs=1e-5)


# From images to methods


def test_means_are_over_seeds_then_groups() -> None:
    def row(name: str, seed: int, value: float) -> Row:
        return Row("m", name, name, "c", "held-in", seed, 2, "", "", clip_i_target=value)

    rows = [row("a", 0, 0.0), row("a", 1, 0.2), row("a", 2, 0.4), row("b", 0, 1.0)]
    line = next(line for line in summarise(rows) if (line.split, line.category) == ("held-in", "all"))
    assert line.mean == pytest.approx((0.2 + 1.0) / 2)  # not 0.4, the mean of all four images
    assert (line.groups, line.pictures, line.metric) == (2, 4, "clip_i_target")


def test_splits_are_summarised_separately(run, results: Path) -> None:
    run()
    groups = {
        line["split"]: line["groups"]
        for line in read_csv(results / "summary.csv")
        if (line["metric"], line["method"], line["category"]) == ("clip_i_target", "plain", "all")
    }
    assert groups == {"held-in": "1", "held-out": "2", "all": "3"}


def test_the_command_names_a_missing_model(run, tmp_path: Path, capsys) -> None:
    files = [str(tmp_path / name) for name in ("manifest.json", "out", "results")]
    options = ["--clip", str(tmp_path / "no-model"), "--classifier", "none", "--offline"]
    assert main(["score", *files, *options]) == 1
    assert "no-model" in capsys.readouterr().err
