"""MRBench on the weights in training: the same images as of the exported checkpoint, scored by update."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from easyref_core.mrbench import live
from easyref_core.mrbench.generate import RunSettings, generate
from easyref_core.mrbench.group_scores import Extractors
from easyref_core.mrbench.manifest import read_manifest
from easyref_core.mrbench.methods import Sampling, build
from easyref_core.mrbench.rows import Row, read_rows
from easyref_core.training.base_model import BaseModel
from easyref_core.training.config import Benchmark
from easyref_core.training.loop import train
from easyref_core.training.run_log import read_metrics

from ..training import tiny
from .benchmarks import benchmark, group

GROUPS = [group(0, 2, "held-in", prompt="abc"), group(1, 3, prompt="de"), group(2, 1, prompt="f")]


@pytest.mark.parametrize("ema", [None, 0.5])
def test_images_are_those_of_the_exported_checkpoint(
    tmp_path: Path, extractors: Extractors, monkeypatch: pytest.MonkeyPatch, ema: float | None
) -> None:
    monkeypatch.setattr(live, "load_extractors", lambda *_, **options: extractors)
    manifest = benchmark(tmp_path, GROUPS)
    base = tiny.make_base(tmp_path / "base")
    options = {"size": 64, "steps": 2, "guidance": 3.0, "negative": "x"}
    settings = tiny.settings(
        base,
        output=tmp_path / "run",
        updates=2,
        learning_rate=1e-2,
        export_every=1,
        ema=ema,
        benchmark=Benchmark(every=1, manifest=manifest, groups=1, **options),
        **tiny.GOLDEN_START,
    )
    train(settings, tiny.TinyExamples(tiny.config()))
    images = settings.output / "mrbench" / "images"
    files = {file.relative_to(images).as_posix() for file in images.rglob("*.png")}
    # one group of each split
    assert files == {f"{update:07}/g{name}/0.png" for update in (1, 2) for name in (0, 1)}

    entry = {"kind": "easyref", "checkpoint": str(settings.checkpoint_of(1)), "mllm": str(tiny.MLLM)}
    method = build("easyref", entry | {"size": tiny.REFERENCE}, BaseModel.load(base))
    run = RunSettings(out=tmp_path / "out", sampling=Sampling(**options), seeds=(0,))
    generate(read_manifest(manifest), method, "easyref", run)
    for name in ("g0", "g1"):
        one, other = (
            Image.open(folder / name / "0.png") for folder in (images / "0000001", tmp_path / "out/easyref")
        )
        differences = [abs(a - b) for a, b in zip(one.tobytes(), other.tobytes(), strict=True)]
        assert max(differences) <= 1

    scores = read_rows(settings.output / "mrbench" / "scores")
    assert {(row.method, row.group) for row in scores} == {
        (f"{update:07}", name) for update in (1, 2) for name in ("g0", "g1")
    }
    logged = read_metrics(settings.output / "metrics.csv")
    for row in logged:
        of_update = [score.dino_i_target for score in scores if score.method == f"{row['update']:07}"]
        assert row["mrbench_dino_i_target"] == pytest.approx(sum(of_update) / 2)
    assert "mrbench_shared_right" not in logged[0]  # no group has attributes


def test_means_leave_out_what_was_not_measured() -> None:
    rows = [Row("m", "g", "t", "c", "s", 0, 1, "", "", clip_score=value) for value in (1.0, float("nan"))]
    assert live.means(rows) == {"mrbench_clip_score": 1.0}


def test_benchmark_needs_a_manifest() -> None:
    with pytest.raises(ValueError, match="benchmark.every is set without benchmark.manifest. Set it"):
        Benchmark(every=1)
