"""The commands check and export: rows are read without a model, and any saved state becomes a checkpoint."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import easyref_core as er
from easyref_core.training import __main__ as command
from easyref_core.training.base_model import BaseModel
from easyref_core.training.config import Data, Samples
from easyref_core.training.export import export
from easyref_core.training.loop import train
from easyref_core.training.rows import count_rows

from . import tiny
from .tiny import TinyExamples

SETTINGS = {"save_every": 1, "keep": 3, "learning_rate": 1e-2, "samples": Samples()}


@pytest.fixture(scope="module")
def run(base_folder: Path, tmp_path_factory: pytest.TempPathFactory, examples: TinyExamples) -> Path:
    """Output folder of a run of three updates, with a state of each."""
    output = tmp_path_factory.mktemp("run")
    train(tiny.settings(base_folder, output=output, updates=3, **SETTINGS), examples)
    return output


def same(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_state_becomes_the_checkpoint_of_a_run_that_ends_there(
    base_folder: Path, run: Path, tmp_path: Path, examples: TinyExamples
) -> None:
    shorter = train(tiny.settings(base_folder, output=tmp_path, updates=2, **SETTINGS), examples)
    before = sorted(path.name for path in run.iterdir())
    settings = tiny.settings(base_folder, output=run, updates=3, **SETTINGS)
    result = export(settings, 2)
    assert result == run / "easyref-2.safetensors"
    assert same(result, shorter)
    assert not same(result, run / "easyref.safetensors")
    er.load(result, tiny.MLLM)
    result.unlink()
    assert sorted(path.name for path in run.iterdir()) == before


def test_the_newest_state_is_the_default(base_folder: Path, run: Path, tmp_path: Path) -> None:
    settings = tiny.settings(base_folder, output=run, updates=3, **SETTINGS)
    assert same(export(settings, file=tmp_path / "a.safetensors"), run / "easyref.safetensors")


def test_states_that_cannot_be_exported_are_named(base_folder: Path, run: Path, tmp_path: Path) -> None:
    settings = tiny.settings(base_folder, output=run, **SETTINGS)
    with pytest.raises(ValueError, match="has no state of update 7, expected one of 1, 2, 3"):
        export(settings, 7)
    with pytest.raises(ValueError, match="has no saved state. Set output to the folder of a run"):
        export(tiny.settings(base_folder, output=tmp_path / "none"))
    with pytest.raises(ValueError, match=r"num_tokens was 6 and is 4\). Set them back to export its states"):
        export(tiny.settings(base_folder, output=run, num_tokens=4))
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "state-2" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"state-2 cannot be read \(\w+: .*\). Export another state"):
        export(tiny.settings(base_folder, output=copy), 2)


@pytest.fixture
def rows(tmp_path: Path) -> Data:
    """A face, a single reference and a group of three."""
    for number in range(3):
        tiny.random_image(number).save(tmp_path / f"{number}.png")
    lines = (
        '{"target": "0.png", "face": [[5, 5, 40, 40]], "text": "a"}',
        '{"target": "0.png", "image_file": "0.png", "text": "a"}',
        '{"images": ["0.png", "1.png", "2.png"], "text": "a"}',
    )
    (tmp_path / "rows.json").write_text("\n".join(lines))
    return Data(rows=tmp_path / "rows.json", root=tmp_path)


def test_rows_are_counted_by_kind(rows: Data) -> None:
    expected = "can be used: 1 groups (at most 3 images), 1 faces, 1 single references"
    assert count_rows(rows) == f"3 rows of {rows.rows} {expected}"
    assert count_rows(Data(procedural={})).startswith("the images are procedural")


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["training", *map(str, arguments)])
    command.main()


@pytest.fixture
def config(tmp_path: Path, rows: Data) -> Path:
    """A YAML whose base and MLLM do not exist."""
    file = tmp_path / "run.yaml"
    file.write_text(
        f"stage: alignment\nbase: nowhere\nmllm: nowhere\noutput: {tmp_path}/out\nupdates: 1\n"
        f"learning_rate: 1.0\nbatch_size: 1\ndata: {{rows: {rows.rows}, root: {rows.root}}}\n"
    )
    return file


def test_check_reads_only_the_rows(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, config: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(BaseModel, "load", None)
    run_command(monkeypatch, "check", config)
    assert "alignment: 3 rows of" in caplog.text
    assert not (tmp_path / "out").exists()
    (tmp_path / "2.png").unlink()
    with pytest.raises(SystemExit, match=r"1 of 3 rows .* cannot be used(.|\n)*2.png does not exist"):
        run_command(monkeypatch, "check", config)


def test_export_of_several_stages_is_refused(monkeypatch: pytest.MonkeyPatch, config: Path) -> None:
    config.write_text(f"{config.read_text()}stages: [{{stage: alignment}}, {{stage: multi_reference}}]\n")
    with pytest.raises(SystemExit, match="several stages .*Choose one with --only STAGE"):
        run_command(monkeypatch, "export", config)


def test_export_command_passes_its_options(
    monkeypatch: pytest.MonkeyPatch, config: Path, tmp_path: Path
) -> None:
    calls = []
    monkeypatch.setattr("easyref_core.training.export.export", lambda *arguments: calls.append(arguments[1:]))
    folders = [f"base={tmp_path}", f"mllm={tmp_path}"]
    run_command(monkeypatch, "export", config, *folders, "--state", 20, "--to", "a.safetensors")
    run_command(monkeypatch, "export", config, *folders)
    assert calls == [(20, Path("a.safetensors"), False), (None, None, False)]
