"""Logged values of a run, read back from W&B (offline) and MLflow (SQLite).

TensorBoard's curves are read in test_loop.py.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from easyref_core.training.config import Samples
from easyref_core.training.run_log import PROJECT, read_metrics

from .tiny import Train

BLOCK = 32768  # bytes of a block of W&B's file, which is a LevelDB log after its own header
HEADER = struct.Struct("<IHB")  # of a fragment: checksum, bytes, kind
LAST = (1, 4)  # kinds of a fragment that ends a record


def train_two_updates(train_tiny: Train, tracker: str, **options: Any) -> None:
    train_tiny(updates=2, samples=Samples(every=2, count=1, steps=1), trackers={tracker: options})


def fragments(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Kind and bytes of each fragment of a W&B file."""
    start = 7  # ":W&B", a magic number and a version
    while start + HEADER.size < len(content):
        if BLOCK - start % BLOCK < HEADER.size:
            start += BLOCK - start % BLOCK
            continue
        _, size, kind = HEADER.unpack_from(content, start)
        start += HEADER.size
        yield kind, content[start : start + size]
        start += size


def wandb_records(file: Path) -> Iterator[Any]:
    """Records of a W&B run that was logged offline."""
    from wandb.proto.wandb_internal_pb2 import Record

    record = b""
    for kind, content in fragments(file.read_bytes()):
        record += content
        if kind in LAST:
            yield Record.FromString(record)
            record = b""


def test_wandb_offline_has_curves_settings_and_the_sheet(
    train_tiny: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train_two_updates(train_tiny, "wandb", dir=str(tmp_path), name="first")
    [file] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    steps: dict[int, dict[str, Any]] = {}
    config: dict[str, Any] = {}
    for record in wandb_records(file):
        config |= {item.key: json.loads(item.value_json) for item in record.config.update}
        items = {".".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
        if items:
            steps.setdefault(json.loads(items["_step"]), {}).update(items)
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["update"] for row in rows] == [1, 2]
    for row in rows:
        assert json.loads(steps[row["update"]]["loss"]) == pytest.approx(row["loss"], rel=1e-6)
    assert config["learning_rate"] == 1e-3
    assert list((tmp_path / "wandb").rglob("media/images/samples_2_*.png"))


def test_mlflow_has_curves_and_settings(
    train_tiny: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: pip install mlflow")
    database = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    train_two_updates(train_tiny, "mlflow", run_name="first", logging_dir=str(tmp_path / "artifacts"))
    client = mlflow.MlflowClient(database)
    experiment = client.get_experiment_by_name(PROJECT)
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "first"
    assert run.info.status == "FINISHED"
    assert run.data.params["learning_rate"] == "0.001"
    curve = client.get_metric_history(run.info.run_id, "loss")
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [point.step for point in curve] == [1, 2]
    assert [point.value for point in curve] == pytest.approx([row["loss"] for row in rows], rel=1e-6)
