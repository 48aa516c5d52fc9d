"""Scoring end to end with tiny random models: numbers, what is left out, what is not done twice, several processes."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from easyref_core.mrbench import metrics, score
from easyref_core.mrbench.__main__ import main
from easyref_core.mrbench.extractors import Clip, Dino
from easyref_core.mrbench.group_scores import Extractors, right
from easyref_core.mrbench.processes import Process
from easyref_core.mrbench.rows import Row, read_rows
from easyref_core.mrbench.summary import summarise

from .benchmarks import benchmark, error_of, generated, group, picture, save, write_clip, write_dino

ROOT = Path(__file__).resolve().parents[2]
ATTRIBUTES = {"shared": {"tone": "dark", "hue": "red"}, "named": {"tone": "light"}}
GROUPS = [group(0, 2, "held-in"), group(1, 3, attributes=ATTRIBUTES), group(2, 2, prompt="")]
IDS = [one["id"] for one in GROUPS]
METHODS = ("easyref", "plain")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_clip(folder / "clip")
    write_dino(folder / "dino")
    return folder


class Reader:
    """Says the same of every picture."""

    def __call__(self, pictures: Sequence[Image.Image]) -> dict[str, list[str]]:
        return {"tone": ["dark"] * len(pictures), "hue": ["green"] * len(pictures)}


@pytest.fixture(scope="module")
def extractors(models: Path) -> Extractors:
    return Extractors(Clip(str(models / "clip")), Dino(str(models / "dino")), Reader(), "tests:Reader")


@pytest.fixture
def run(tmp_path: Path, extractors: Extractors) -> Callable[..., score.Outcome]:
    """A benchmark of three groups, two methods and two seeds, and how to score it."""
    manifest = benchmark(tmp_path, GROUPS)
    out = generated(tmp_path / "out", METHODS, IDS)
    return lambda **options: score.score(manifest, out, tmp_path / "results", extractors, **options)


def row_of(rows: Sequence[Row], method: str, name: str, seed: int) -> Row:
    return next(row for row in rows if row.place == (method, name, seed))


def test_every_picture_has_a_row(run, tmp_path: Path) -> None:
    outcome = run()
    places = {(method, name, seed) for method in METHODS for name in IDS for seed in (0, 1)}
    assert {row.place for row in outcome.rows} == places
    assert (outcome.scored, outcome.exclusions) == (12, [])
    assert {row.place for row in read_rows(tmp_path / "results")} == places


def test_a_rows_numbers_are_the_metrics_of_its_pictures(run, tmp_path: Path, extractors: Extractors) -> None:
    row = row_of(run(batch=3).rows, "plain", "g1", 1)
    images = [Image.open(tmp_path / "out/plain/g1/1.png"), Image.open(tmp_path / "g1/target.png")]
    images += [Image.open(tmp_path / f"g1/{i}.png") for i in range(3)]
    clip, dino = extractors.clip.images(images), extractors.dino.images(images)
    text = extractors.clip.texts(["a thing number 1"])[0]
    assert row.clip_i_target == pytest.approx(metrics.cosine(clip[:1], clip[1:2]).item(), abs=1e-5)
    assert row.clip_i_references == pytest.approx(metrics.cosine(clip[:1], clip[2:]).mean(), abs=1e-5)
    assert row.dino_i_target == pytest.approx(metrics.cosine(dino[:1], dino[1:2]).item(), abs=1e-5)
    assert row.dino_i_references == pytest.approx(metrics.cosine(dino[:1], dino[2:]).mean(), abs=1e-5)
    assert row.clip_t_cosine == pytest.approx(metrics.cosine(clip[:1], text[None]).item(), abs=1e-5)
    assert row.clip_score == pytest.approx(2.5 * max(row.clip_t_cosine, 0), abs=1e-5)
    assert (row.split, row.category, row.references) == ("held-out", "subject", 3)


def test_attributes_are_scored_where_the_manifest_has_them(run) -> None:
    rows = run().rows
    assert row_of(rows, "plain", "g1", 0).shared_right == 0.5
    assert row_of(rows, "plain", "g1", 0).named_right == 0
    assert math.isnan(row_of(rows, "plain", "g0", 0).shared_right)


def test_attributes_right_by_hand() -> None:
    read = {"tone": ["dark", "light"], "hue": ["red", "red"]}
    np.testing.assert_allclose(right(read, {"tone": "dark", "hue": "red"}, 2), [1.0, 0.5])
    assert np.isnan(right(read, {}, 2)).all()


def test_no_prompt_no_clip_t(run) -> None:
    row = row_of(run().rows, "plain", "g2", 0)
    assert math.isnan(row.clip_t_cosine)
    assert math.isnan(row.clip_score)
    assert not math.isnan(row.clip_i_target)


def test_a_copy_of_the_target_is_as_similar_as_can_be(run, tmp_path: Path) -> None:
    save(Image.open(tmp_path / "g0/target.png"), tmp_path / "out/easyref/g0/0.png")
    row = row_of(run().rows, "easyref", "g0", 0)
    assert (row.clip_i_target, row.dino_i_target) == pytest.approx((1, 1), abs=1e-5)


def test_a_limited_number_of_references_is_told_by_method_json(run, tmp_path: Path) -> None:
    (tmp_path / "out/easyref/method.json").write_text('{"references": 2}')
    rows = run().rows
    assert row_of(rows, "easyref", "g1", 0).references == 2
    assert row_of(rows, "plain", "g1", 0).references == 3


def test_the_number_is_set_right_in_rows_that_are_kept(run, tmp_path: Path) -> None:
    assert row_of(run().rows, "easyref", "g1", 0).references == 3
    (tmp_path / "out/easyref/method.json").write_text('{"references": 2}')
    again = run()
    assert (again.scored, row_of(again.rows, "easyref", "g1", 0).references) == (0, 2)


def test_the_exact_models_are_recorded(run, tmp_path: Path, extractors: Extractors) -> None:
    run()
    facts = json.loads((tmp_path / "results/results.json").read_text())
    names = facts["extractors"]
    assert (names["clip"], names["dino"]) == (extractors.clip.identity, extractors.dino.identity)
    assert names["attributes"].startswith("tests:Reader ")  # which one it is, it does not say
    assert (facts["pictures"], facts["excluded"], facts["benchmark"]) == (12, 0, "small")


def test_a_left_out_extractor_leaves_its_metrics_empty(tmp_path: Path, extractors: Extractors) -> None:
    manifest = benchmark(tmp_path, GROUPS)
    only = Extractors(dino=extractors.dino)
    rows = score.score(manifest, generated(tmp_path / "out", ["plain"], IDS), tmp_path / "results", only).rows
    assert all(math.isnan(row.clip_i_target) and not math.isnan(row.dino_i_target) for row in rows)
    assert {line.metric for line in summarise(rows)} == {"dino_i_target", "dino_i_references"}


# What is left out


def excluded(folder: Path) -> list[tuple[str, ...]]:
    with (folder / "excluded.csv").open(newline="") as content:
        return [tuple(line.values()) for line in csv.DictReader(content)]


def test_a_broken_picture_is_named_and_counted(run, tmp_path: Path) -> None:
    file = tmp_path / "out/plain/g0/1.png"
    file.write_bytes(file.read_bytes()[:60])
    outcome = run()
    ((what, name, reason),) = excluded(tmp_path / "results")
    assert (what, name) == ("picture", str(file))
    assert reason.startswith("it cannot be read as a picture (")
    assert len(outcome.rows) == 11
    assert json.loads((tmp_path / "results/results.json").read_text())["excluded"] == 1
    assert len(run().exclusions) == 1  # and again, not added to


def test_a_missing_target_is_named_and_counted(run, tmp_path: Path) -> None:
    (tmp_path / "g1/target.png").unlink()
    assert [row for row in run().rows if row.group == "g1"] == []
    assert excluded(tmp_path / "results") == [
        ("target", f"{tmp_path / 'g1/target.png'} of group g1", "there is no such file"),
        ("group", "g1", "its target is missing or broken"),
    ]


def test_a_group_without_pictures_is_named(run, tmp_path: Path) -> None:
    for seed in (0, 1):
        (tmp_path / f"out/plain/g2/{seed}.png").unlink()
    assert [str(e) for e in run().exclusions] == ["group plain/g2: this method has no picture of it"]


def test_a_group_that_the_manifest_lacks_is_named(run, tmp_path: Path) -> None:
    generated(tmp_path / "out", ["plain"], ["g9"])
    assert [str(e) for e in run().exclusions] == ["group plain/g9: the manifest has no such group"]


def test_no_folder_of_pictures(run, tmp_path: Path, extractors: Extractors) -> None:
    text = error_of(
        lambda: score.score(tmp_path / "manifest.json", tmp_path / "none", tmp_path, extractors),
        FileNotFoundError,
    )
    assert f"There is no folder of pictures at {tmp_path / 'none'}" in text


# What is not done twice


def test_what_is_scored_is_skipped(run, tmp_path: Path) -> None:
    first = run()
    before = (tmp_path / "results/pictures.csv").read_bytes()
    again = run()
    assert (again.scored, len(again.rows)) == (0, len(first.rows))
    assert (tmp_path / "results/pictures.csv").read_bytes() == before


def test_a_changed_picture_is_scored_again(run, tmp_path: Path) -> None:
    run()
    save(picture(5000), tmp_path / "out/plain/g0/0.png")
    assert run().scored == 1


def test_a_changed_reference_scores_its_group_again(run, tmp_path: Path) -> None:
    run()
    save(picture(5001), tmp_path / "g1/0.png")
    assert run().scored == 4


def test_other_models_score_all_again(run, tmp_path: Path, extractors: Extractors) -> None:
    run()
    other = extractors._replace(attributes=None)
    manifest, out = tmp_path / "manifest.json", tmp_path / "out"
    assert score.score(manifest, out, tmp_path / "results", other).scored == 12


def test_a_removed_picture_leaves_the_results(run, tmp_path: Path) -> None:
    run()
    (tmp_path / "out/plain/g0/0.png").unlink()
    assert len(run().rows) == 11


def test_a_killed_run_goes_on_where_it_was(run, tmp_path: Path, monkeypatch) -> None:
    whole = score.score_bundle
    bundles = []

    def killed_at_the_second(*arguments):
        bundles.append(arguments)
        if len(bundles) == 2:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(score, "score_bundle", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(batch=1)
    with (tmp_path / "results/parts/0.jsonl").open("a") as part:
        part.write('{"Row": {"method": "pl')  # the line it was writing
    monkeypatch.setattr(score, "score_bundle", whole)
    outcome = run(batch=1)
    assert (outcome.scored, len(outcome.rows)) == (8, 12)
    assert not (tmp_path / "results/parts").exists()


# Several processes


def test_shares_are_all_and_each_once() -> None:
    shares = [Process(rank, 3).share(range(10)) for rank in range(3)]
    assert sorted(i for share in shares for i in share) == list(range(10))


LAUNCHED = """
import sys
sys.path.insert(0, {root!r})
from devkit.cpu_torch import complete_cpu_torch
complete_cpu_torch()
from easyref_core.mrbench.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_two_processes_share_the_work(run, tmp_path: Path, models: Path) -> None:
    """As `accelerate launch` starts them; the script stands for `-m easyref_core.mrbench` beside a CPU-only torch."""
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED.format(root=str(ROOT)))
    launch = [
        sys.executable,
        "-c",
        LAUNCHED.replace("easyref_core.mrbench.__main__", "accelerate.commands.launch"),
    ]
    launch[2] = launch[2].format(root=str(ROOT)).replace("sys.exit(main(sys.argv[1:]))", "main()")
    command = [*launch, "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--main_process_port", "0", str(script), "score"]
    command += [str(tmp_path / name) for name in ("manifest.json", "out", "results")]
    command += [
        "--clip",
        str(models / "clip"),
        "--dino",
        str(models / "dino"),
        "--classifier",
        "none",
        "--offline",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("12 pictures scored, 0 were scored before") == 1
    rows = {row.place: row for row in read_rows(tmp_path / "results")}
    (tmp_path / "results/pictures.csv").unlink()
    for row in run().rows:
        assert rows[row.place].clip_i_target == pytest.approx(row.clip_i_target, abs=1e-5)


# From pictures to methods


def test_means_are_taken_over_seeds_then_groups() -> None:
    def row(name: str, seed: int, value: float) -> Row:
        return Row("m", name, "c", "held-in", seed, 2, "", "", clip_i_target=value)

    rows = [row("a", 0, 0.0), row("a", 1, 0.2), row("a", 2, 0.4), row("b", 0, 1.0)]
    line = next(line for line in summarise(rows) if line.split == "held-in" and line.category == "all")
    assert line.mean == pytest.approx((0.2 + 1.0) / 2)  # not the 0.4 of all four pictures
    assert (line.groups, line.pictures, line.metric) == (2, 4, "clip_i_target")


def test_splits_are_kept_apart(run, tmp_path: Path) -> None:
    run()
    with (tmp_path / "results/summary.csv").open(newline="") as content:
        lines = [line for line in csv.DictReader(content) if line["metric"] == "clip_i_target"]
    groups = {
        line["split"]: line["groups"]
        for line in lines
        if (line["method"], line["category"]) == ("plain", "all")
    }
    assert groups == {"held-in": "1", "held-out": "2", "all": "3"}


def test_the_command_names_a_missing_model(run, tmp_path: Path, capsys) -> None:
    places = [str(tmp_path / name) for name in ("manifest.json", "out", "results")]
    assert (
        main(["score", *places, "--clip", str(tmp_path / "no-model"), "--classifier", "none", "--offline"])
        == 1
    )
    assert "no-model" in capsys.readouterr().err
