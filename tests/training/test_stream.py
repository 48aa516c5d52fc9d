"""Shards and their stream: the samples of the rows, each given once, resumed, in buckets, over HTTP."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from easyref_core.mllm.tokenizer import load_tokenizer
from easyref_core.training import parquet_shards
from easyref_core.training.__main__ import main
from easyref_core.training.batches import Batch, MicroBatches, Sample, loader
from easyref_core.training.config import Data, Stream
from easyref_core.training.examples import Augmentation, RowExamples
from easyref_core.training.loop import train
from easyref_core.training.parquet_shards import MANIFEST, ParquetShards, open_shards, write_shards
from easyref_core.training.resume import require_same_run, saved_states
from easyref_core.training.rows import InvalidRow, read_rows
from easyref_core.training.run_log import read_metrics
from easyref_core.training.stream import StreamExamples
from easyref_core.training.stream_order import StreamOrder

from . import tiny
from .test_distributed import TWO, WORKER, run_worker
from .test_resume import same_weights

pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install -e '.[train-stream]'")

ROWS = 20
PLAIN = Augmentation(resolution=64, size=84, drop_image=0.0, drop_text=0.0, drop_both=0.0, max_length=None)
NATIVE = dataclasses.replace(PLAIN, native=True, truncation=0.4)
ASPECTS = ((120, 90), (90, 120), (64, 64))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in three aspects, one of them turned by EXIF, and rows.json of every form; texts number them."""
    folder = tmp_path_factory.mktemp("images")
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(ROWS):
        tiny.random_image(i).resize(ASPECTS[i % 3]).save(folder / f"{i}.jpg", exif=exif if i == 4 else b"")
    rows: list[dict[str, Any]] = []
    for i in range(ROWS):
        names = [f"{(i + offset) % ROWS}.jpg" for offset in range(4)]
        kinds = [
            {"target": names[0], "image_file": names[0]},
            {"target": names[0], "image_file": names[1:]},
            {"images": names},
            {"target": names[0], "face": [[10, 10, 50, 60, 0.9]]},
        ]
        rows.append(kinds[i % 4] | {"text": [f"row {i}"]})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def shards(root: Path, tmp_path_factory: pytest.TempPathFactory) -> ParquetShards:
    """Shards of 6, 6, 6 and 2 rows in row groups of 3."""
    folder = tmp_path_factory.mktemp("shards")
    rows = read_rows(root / "rows.json", root)
    return write_shards(rows, root, folder, shard_rows=6, row_group_size=3)


def examples(*sources: ParquetShards, rules: Augmentation = PLAIN, **changes: Any) -> StreamExamples:
    options = {"partitions": 1, "buffer": 8, "batch_size": 2, "seed": 0} | changes
    order = StreamOrder([source.row_group_sizes for source in sources], **options)
    return StreamExamples(sources, order, tiny.config(), load_tokenizer(tiny.MLLM), rules)


def texts(batches: list[Batch]) -> list[str]:
    return [prompt for batch in batches for prompt in batch.prompts]


def same(a: Batch, b: Batch) -> bool:
    names = ("pixels", "patches", "input_ids", "seeds", "time_ids")
    return a.prompts == b.prompts and all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


def damaged(shards: ParquetShards, folder: Path, name: str) -> ParquetShards:
    """A copy of the shards in which the pages of one shard are overwritten."""
    for file in Path(shards.url).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    content = bytearray((folder / name).read_bytes())
    content[100 : len(content) // 2] = bytes(len(content) // 2 - 100)
    (folder / name).write_bytes(content)
    return open_shards(str(folder))


@pytest.mark.parametrize("rules", [PLAIN, NATIVE])
def test_rows_in_shards_give_the_samples_of_their_files(
    root: Path, shards: ParquetShards, rules: Augmentation
) -> None:
    rows = read_rows(root / "rows.json", root)
    files = RowExamples(rows, root, tiny.config(), load_tokenizer(tiny.MLLM), rules)
    stream, number = examples(shards, rules=rules), 0
    for group, size in enumerate(shards.row_group_sizes):
        table = shards.read_row_group(group)
        for index in range(size):
            row = shards.row(table, group, index)
            expected, actual = (
                data.sample(row, np.random.default_rng(7))
                for data, row in ((files, rows[number]), (stream, row))
            )
            for field in dataclasses.fields(Sample):
                a, b = getattr(expected, field.name), getattr(actual, field.name)
                assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name
            number += 1
    assert number == ROWS == len(stream)
    assert stream.max_references == files.max_references == 3


@pytest.mark.parametrize(("workers", "world"), [(0, 1), (2, 1), (0, 2), (2, 2)])
def test_workers_and_ranks_give_each_row_once_an_epoch(
    shards: ParquetShards, workers: int, world: int
) -> None:
    """The samples are those of one process, whatever reads them."""
    data = examples(shards, partitions=4, buffer=4)
    steps = range(32 // world)
    ranks = [list(loader(MicroBatches(data, 2, rank, world), steps, workers)) for rank in range(world)]
    batches = [batch for step in zip(*ranks, strict=True) for batch in step]
    one = list(loader(MicroBatches(data, 2), range(32)))
    assert all(same(a, b) for a, b in zip(batches, one, strict=True))
    counts = Counter(texts(batches))  # 64 samples: three epochs, and some of the partitions' fourth
    assert counts.keys() == {f"row {i}" for i in range(ROWS)}
    assert set(counts.values()) <= {2, 3, 4}
    first = examples(shards, partitions=1, buffer=ROWS)
    assert sorted(texts([first.batch(range(ROWS))])) == sorted(f"row {i}" for i in range(ROWS))


def test_stream_resumes_at_any_step(shards: ParquetShards) -> None:
    complete = list(loader(MicroBatches(examples(shards, partitions=2), 2), range(20)))
    for start in (1, 13):
        rest = list(loader(MicroBatches(examples(shards, partitions=2), 2), range(start, 20)))
        assert all(same(a, b) for a, b in zip(complete[start:], rest, strict=True))


def test_epochs_draw_other_samples_of_a_row(shards: ParquetShards) -> None:
    batches = [examples(shards, batch_size=1).batch([position]) for position in range(2 * ROWS)]
    assert len({int(batch.seeds) for batch in batches}) == 2 * ROWS


def test_batches_in_native_aspect_have_one_size_and_every_row(shards: ParquetShards) -> None:
    data = examples(shards, rules=NATIVE, buffer=ROWS, batch_size=4)
    batches = [data.batch(range(start, start + 4)) for start in range(0, ROWS, 4)]
    assert sorted(texts(batches)) == sorted(f"row {i}" for i in range(ROWS))
    uncropped = [batch for batch in batches if not batch.time_ids[:, 2:4].any()]
    assert len(uncropped) >= 2
    assert len({batch.pixels.shape[-2:] for batch in batches}) == 3
    for batch in batches:
        assert (batch.time_ids[:, 4:] == torch.tensor(batch.pixels.shape[-2:])).all()


def test_sources_are_mixed_by_weight(root: Path, shards: ParquetShards, tmp_path: Path) -> None:
    rows = [dataclasses.replace(row, texts=("other",)) for row in read_rows(root / "rows.json", root)]
    other = write_shards(rows, root, tmp_path / "other")
    data = examples(shards, other, weights=[3, 1])
    counts = Counter(text == "other" for text in texts([data.batch(range(40))]))
    assert counts == {False: 30, True: 10}


def test_damaged_shard_is_skipped_and_counted(shards: ParquetShards, tmp_path: Path) -> None:
    data = examples(damaged(shards, tmp_path, "00001.parquet"), buffer=ROWS)
    batches = list(loader(MicroBatches(data, 2), range(10), workers=2))
    assert len(texts(batches)) == ROWS
    assert not set(texts(batches)) & {f"row {i}" for i in range(6, 12)}
    reasons = {reason for batch in batches for reason in batch.broken}
    assert {reason.split(" cannot")[0] for reason in reasons} <= {
        f"row group {i} of {tmp_path}/00001.parquet" for i in (0, 1)
    }
    assert reasons
    (tmp_path / "00000.parquet").unlink()
    assert examples(open_shards(str(tmp_path)), buffer=ROWS).batch(range(ROWS)).broken


def test_damaged_image_is_replaced_in_a_batch_of_its_size(
    root: Path, tmp_path: Path, shards: ParquetShards
) -> None:
    rows = read_rows(root / "rows.json", root)
    broken = tmp_path / "images"
    broken.mkdir()
    for file in root.glob("*.jpg"):
        content = file.read_bytes()
        (broken / file.name).write_bytes(content[:200] if file.name == "4.jpg" else content)
    stored = write_shards(rows, broken, tmp_path / "shards", row_group_size=5)
    data = examples(stored, rules=NATIVE, buffer=ROWS, batch_size=4)
    batches = [data.batch(range(start, start + 4)) for start in range(0, ROWS, 4)]
    reasons = {reason for batch in batches for reason in batch.broken}
    assert any(
        re.match(rf"{stored.url}/00000.parquet, row 4 \(line \d+ of its rows\): 4.jpg cannot", reason)
        for reason in reasons
    )
    assert len(texts(batches)) == ROWS
    assert "row 4" not in texts(batches)


def test_stream_without_usable_rows_stops(shards: ParquetShards, tmp_path: Path) -> None:
    lost = examples(dataclasses.replace(shards, url=str(tmp_path)))
    with pytest.raises(ValueError, match="^8 rows after another cannot be used, first row group . of"):
        lost.batch([0])


class Server(ThreadingHTTPServer):
    """Serves a folder with ranges; every shard request of the first `failures` is refused."""

    failures = 0


class Handler(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path.endswith(".parquet") and self.server.failures:
            self.server.failures -= 1
            self.send_error(503)
            return
        content = Path(self.translate_path(self.path)).read_bytes()
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = (int(match[1]), int(match[2]) + 1) if match else (0, len(content))
        self.send_response(206 if match else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content[start:stop])))
        self.end_headers()
        self.wfile.write(content[start:stop])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(shards: ParquetShards) -> Iterator[Server]:
    pytest.importorskip("aiohttp")
    server = Server(("127.0.0.1", 0), partial(Handler, directory=shards.url))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_read_over_http(shards: ParquetShards, server: Server, workers: int) -> None:
    remote = open_shards(f"http://127.0.0.1:{server.server_port}/")
    batches, local = (
        list(loader(MicroBatches(examples(source), 2), range(10), count))
        for source, count in ((remote, workers), (shards, 0))
    )
    assert all(same(a, b) for a, b in zip(batches, local, strict=True))


def test_reading_from_a_url_is_tried_again(
    shards: ParquetShards, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_shards, "RETRY_SECONDS", 0.0)
    remote = open_shards(f"http://127.0.0.1:{server.server_port}")
    server.failures = 2
    assert remote.read_row_group(0).equals(shards.read_row_group(0))
    server.failures = 100
    with pytest.raises(InvalidRow, match=r"row group 0 of http://.*/00000.parquet cannot be read \("):
        remote.read_row_group(0)


def test_manifest_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} has no shards.json, .*data.stream.sources"):
        open_shards(str(tmp_path))
    (tmp_path / MANIFEST).write_text('{"shards": []}')
    with pytest.raises(ValueError, match=r"shards.json is not a manifest of shards .*Write the shards again"):
        open_shards(str(tmp_path))


def test_missing_pyarrow_is_named(shards: ParquetShards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"needs pyarrow, .*pip install -e '.\[train,train-stream\]'"):
        open_shards(shards.url)


def test_command_writes_and_checks_shards(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "easyref_core")
    file, to = tmp_path / "run.yaml", tmp_path / "shards"
    file.write_text(
        f"stage: alignment\nbase: x\nmllm: x\noutput: x\nupdates: 1\nlearning_rate: 1\nbatch_size: 1\n"
        f"data: {{rows: {root}/rows.json, root: {root}}}\n"
    )
    command = ["training", "shards", str(file), "--to", str(to), "--shard-rows", "8", "--row-group-size", "4"]
    monkeypatch.setattr("sys.argv", command)
    main()
    assert f"20 rows in 3 shards -> {to}" in caplog.text
    with pytest.raises(SystemExit, match="has shards already. Delete them, or choose another folder"):
        main()
    stream = ["data.rows=null", "data.root=null", f"data.stream.sources={to}"]
    monkeypatch.setattr("sys.argv", ["training", "check", str(file), *stream])
    main()
    assert f"alignment: 20 rows in 3 shards of {to}, groups of at most 3 references" in caplog.text


def stream_data(shards: ParquetShards, **changes: Any) -> Data:
    stream = Stream(sources=(shards.url,), **{"partitions": 2, "buffer": 4} | changes)
    return Data(stream=stream, augmentation=PLAIN)


def test_run_resumes_bit_for_bit(
    settings: tiny.MakeSettings, shards: ParquetShards, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = partial(settings, data=stream_data(shards), save_every=1, workers=2)
    weights = []
    for name, lengths in (("complete", [3]), ("resumed", [1, 3])):
        for updates in lengths:
            result = train(run(output=tmp_path / name, updates=updates))
        weights.append(load_file(result))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert "not a multiple" not in caplog.text
    other = run(output=tmp_path / "resumed", data=stream_data(shards, partitions=4))
    with pytest.raises(ValueError, match=r"data.stream.partitions was 2 and is 4"):
        require_same_run(other, 1)


@pytest.fixture
def s3(shards: ParquetShards, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of the shards in a bucket of a local server, which the environment names as s3fs reads it."""
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install s3fs 'moto[server]'")
    moto = pytest.importorskip("moto.server", reason="moto is not installed: pip install s3fs 'moto[server]'")
    server = moto.ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    variables = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**variables, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
        monkeypatch.setenv(name, value)
    import s3fs

    files = s3fs.S3FileSystem(skip_instance_cache=True)
    files.mkdir("bucket")
    files.put(shards.url, "bucket/groups", recursive=True)
    yield "s3://bucket/groups"
    server.stop()


@pytest.fixture(params=["http", "s3"])
def remote(request: pytest.FixtureRequest) -> str:
    """URL of the shards on an object store."""
    if request.param == "s3":
        return request.getfixturevalue("s3")
    return f"http://127.0.0.1:{request.getfixturevalue('server').server_port}"


def test_run_on_an_object_store_resumes_as_on_a_folder(
    settings: tiny.MakeSettings, shards: ParquetShards, remote: str, tmp_path: Path
) -> None:
    run = partial(settings, save_every=1, workers=1)
    weights = []
    for name, url, lengths in (("folder", shards.url, [3]), ("store", remote, [2, 3])):
        data = stream_data(dataclasses.replace(shards, url=url))
        for updates in lengths:
            result = train(run(data=data, output=tmp_path / name, updates=updates))
        weights.append(load_file(result))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_killed_run_resumes_bit_for_bit(base_folder: Path, shards: ParquetShards, tmp_path: Path) -> None:
    """Killed between two micro-batches, in the middle of a block of each partition."""
    complete, resumed = tmp_path / "complete", tmp_path / "resumed"
    train(tiny.resumable_stream(base_folder, complete, shards.url))
    command = [sys.executable, WORKER, base_folder, "die_in_stream", resumed, shards.url]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert list(saved_states(resumed)) == [2, 4]
    train(tiny.resumable_stream(base_folder, resumed, shards.url))
    assert same_weights(complete, resumed)
    losses = [[row["loss"] for row in read_metrics(run / "metrics.csv")] for run in (complete, resumed)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6


def test_shared_partitions_are_a_warning(
    settings: tiny.MakeSettings, shards: ParquetShards, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(settings(data=stream_data(shards, partitions=3), workers=2, output=tmp_path))
    assert "data.stream.partitions is 3, not a multiple of the 2 data loading processes" in caplog.text
    assert "Set it to 4" in caplog.text


@pytest.mark.thorough
def test_two_processes_take_the_samples_of_one(
    base_folder: Path, shards: ParquetShards, tmp_path: Path
) -> None:
    for launcher in (TWO, []):
        run_worker(launcher, base_folder, "stream", tmp_path, shards.url)
    ranks = [(tmp_path / f"{rank}-of-2.txt").read_text().splitlines() for rank in (0, 1)]
    together = [line for step in zip(*ranks, strict=True) for line in step]
    assert together == (tmp_path / "0-of-1.txt").read_text().splitlines()
    assert len(set(together)) == 4
