"""The benchmark's parts at small shapes: rows that keep their contract, right counts, interleaved pairs."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

from easyref_core.training.full_size import EASYREF, released_shapes
from tools.bench import encoding, loading, stages, streaming, unet, unet_counts
from tools.bench.report import Limit, Options, Row, markdown, write_json
from tools.bench.timing import Pairs, PeakMemory, interleaved

QUICK = Options(quick=True, pairs=1, pixels=(64,))


def check(rows: list[Row]) -> None:
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        assert isinstance(row, Row)
        assert math.isfinite(row.value)
        assert row.unit
        assert row.ratio is None or math.isfinite(row.ratio)
        assert row.spread is None or row.spread[0] <= row.ratio <= row.spread[1]


@pytest.fixture(scope="module")
def unet_rows() -> list[Row]:
    with torch.no_grad():
        return unet.measure(QUICK, lambda _: None)


def test_rows_of_the_unet(unet_rows) -> None:
    check(unet_rows)
    wanted = [row for row in unet_rows if row.wanted]
    assert [(row.ratio, row.met) for row in wanted] == [(pytest.approx(0.0039, abs=1e-4), True)]


def test_other_ways_add_more(unet_rows) -> None:
    ours, authors, plus = (
        next(row.ratio for row in unet_rows if row.name.startswith(start))
        for start in ("references add", "they would the authors'", "they would IPAdapter_plus'")
    )
    assert ours < plus / 10
    assert plus < authors


def test_count_is_that_by_hand(unet_rows) -> None:
    (counted,) = [row.value * 1e9 for row in unet_rows if row.name.startswith("references add")]
    assert round(counted) == unet_counts.term_by_hand(256)


def test_lora_by_hand() -> None:
    """At 64 pixels (8 x 8 latents): 16 queries at the 10 sites 640 wide, 4 at the 60 sites 1280 wide."""
    operations = 0
    for number, width, tokens in ((10, 640, 16), (60, 1280, 4)):
        # a product to the rank and one from it, for each row of the batch
        own = 2 * 128 * (width + width) * tokens
        text = 2 * 128 * (2048 + width) * 77
        operations += 2 * number * ((4 + 2) * own + 2 * text)
    assert unet_counts.lora_by_hand(64) == operations


def test_rows_of_encoding() -> None:
    """The same computation is timed warm and cold, ours and transformers'."""
    with torch.inference_mode():
        rows = encoding.measure(dataclasses.replace(QUICK, references=(2, 17)), lambda _: None)
    check(rows)
    distances = [row for row in rows if "distance" in row.name]
    assert len(distances) == 6 + 2
    assert all(row.met for row in distances)


def test_rows_of_stages() -> None:
    """The authors' preprocessing gives the same patches; another prompt prefills its tokens alone."""
    with torch.inference_mode():
        rows = stages.measure(QUICK, lambda _: None)
    check(rows)
    (difference,) = [row for row in rows if "difference" in row.name]
    assert difference.met
    (edit,) = [row for row in rows if "to the roofline" in row.name]
    assert f"{encoding.PROMPT + encoding.AFTER} of " in edit.name
    for stage in (stages.VISION, stages.DECODER):
        assert len([row for row in rows if row.name.endswith(f": {stage}")]) == 2


def test_rows_of_loading() -> None:
    rows = loading.measure(QUICK, lambda _: None)
    check(rows)
    assert len([row for row in rows if "plain read" in row.name]) == len(loading.PRECISIONS)


def test_released_shapes_are_counted() -> None:
    assert {name: tuple(shape) for name, shape in loading.shapes(EASYREF).items()} == released_shapes()


def test_order_of_a_pair_is_swapped_every_other_time() -> None:
    order: list[str] = []
    interleaved(lambda: order.append("A"), lambda: order.append("B"), 3)
    assert "".join(order) == "AB" + "AB" + "BA" + "AB"


def test_ratio_is_of_each_pair() -> None:
    pairs, limit = Pairs((1.0, 10.0, 2.0), (2.0, 10.0, 3.0)), Limit("<=", 1.03)
    assert pairs.medians == (2.0, 3.0)
    assert pairs.row("a", limit) == Row("a", 3.0, "s", 1.5, (1.25, 1.75), limit)
    assert Pairs((2.0,), (3.0,)).row("a") == Row("a", 3.0, "s", 1.5)


def test_limit_is_of_the_ratio_where_there_is_one() -> None:
    assert Row("a", 9.0, "s", 1.0, wanted=Limit("<=", 1.03)).met
    assert not Row("a", 9.0, "s", wanted=Limit("<=", 1.03)).met
    assert Row("a", 9.0, "s", wanted=Limit(">=", 9.0)).met
    assert Row("a", 9.0, "s").met is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports anonymous memory")
def test_peak_memory() -> None:
    with PeakMemory() as peak:
        block = torch.ones(2**26, dtype=torch.uint8)  # alive until the last sample
    assert block.nbytes <= peak.added + 2**22 <= peak.anonymous
    assert peak.mapped > 0


def test_report(tmp_path) -> None:
    rows = [Row("a", 2.0, "s", 1.5, (1.4, 1.6), Limit("<=", 1.03))]
    assert markdown({"CPU": "x"}, rows).endswith("| a | 2 s | 1.5 | 1.4 to 1.6 | <= 1.03 | **no** |")
    write_json(tmp_path / "rows.json", {"CPU": "x"}, rows)
    row = {"name": "a", "value": 2.0, "unit": "s", "ratio": 1.5, "spread": [1.4, 1.6]}
    row |= {"wanted": "<= 1.03", "met": False}
    assert json.loads((tmp_path / "rows.json").read_text()) == {"machine": {"CPU": "x"}, "rows": [row]}


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_is_measured_beside_a_plain_loop(tmp_path: Path, workers: int) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install -e '.[train-stream]'")
    rows, plain, stream, *memory = streaming.measure(200, 160, workers, tmp_path)
    assert rows.startswith("200 rows, ")
    rates = r"[1-9][\d,]* samples per second, [1-9][\d,]* per processor second"
    assert re.fullmatch(f"plain loop: {rates}", plain)
    assert re.fullmatch(f"stream: {rates}", stream)
    assert len(memory) == 1 + workers
    for line in memory:
        assert len(re.findall(r"\b[1-9]\d*\b", line.partition("stream: ")[2])) == streaming.POINTS
    assert (tmp_path / "shards.json").is_file()
