"""Commands of the documents run, in their order, at tiny scale: each is read from its document.

test_smoke.py runs those of the smoke run, test_launch.py that of torchrun.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from devkit.documents import opening_commands, readme_commands
from devkit.hosts import ROOT
from devkit.project import pyproject
from easyref_core.training.__main__ import COMMANDS, main

from . import tiny

README = ROOT / "easyref_core" / "training" / "README.md"
FINETUNE = "easyref_core/training/configs/finetune_small.yaml"
PROGRAM = "easyref_core.training"

RunCommand = Callable[..., str]  # type of the fixture `run`

# The files that commands name, made by the fixture `folder`.
CONFIG = """
stage: alignment
base: {base}
mllm: {mllm}
output: run
data: {{rows: rows.json, root: pictures, augmentation: {{resolution: 64, size: 84, max_length: null}}}}
updates: 2
learning_rate: 1.0e-3
batch_size: 1
num_tokens: 6
save_every: 1
precomputed: stored
"""

# Settings that make a run of a YAML that is shipped tiny.
SHORT = ["updates=1", "save_every=1", "log_every=1", "samples.every=0"]
TINY = ["data.augmentation.resolution=64", "data.augmentation.size=84", "num_tokens=8", "workers=0"]


@pytest.fixture(scope="module")
def folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the code, and with the files that the commands name."""
    folder = tmp_path_factory.mktemp("documented")
    (folder / "easyref_core").symlink_to(ROOT / "easyref_core", target_is_directory=True)
    (folder / "CONFIG.yaml").write_text(CONFIG.format(base=base_folder, mllm=tiny.MLLM))
    (folder / "pictures").mkdir()
    rows = []
    for number in range(4):
        tiny.random_image(number, side=96).save(folder / "pictures" / f"{number}.png")
        rows.append({"image_file": f"{number}.png", "target": f"{number}.png", "text": "abc"})
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    names = [f"{number}.png" for number in range(3)]
    (folder / "groups.json").write_text(json.dumps([{"images": names, "text": "abc"}]))
    return folder


@pytest.fixture
def run(
    folder: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> RunCommand:
    """Function (words of a command, further settings) -> its log. The launcher is left out."""
    monkeypatch.chdir(folder)
    models = [f"base={base_folder}", f"mllm={tiny.MLLM}"]

    def run_command(words: list[str], *settings: str) -> str:
        arguments = words[words.index(PROGRAM) + 1 :]
        changes = [*models, *settings] if "CONFIG.yaml" not in arguments else list(settings)
        monkeypatch.setattr(sys, "argv", ["training", *arguments, *changes])
        caplog.clear()
        with caplog.at_level("INFO", "easyref_core"):
            main()
        return caplog.text

    return run_command


def find(commands: list[list[str]], *words: str) -> list[str]:
    """The one command that has all of the words, and no subcommand that is not among them."""
    others = COMMANDS.keys() - set(words)
    [found] = [c for c in commands if PROGRAM in c and set(words) <= set(c) and not others & set(c)]
    return found


def test_check_train_export_and_precompute(run: RunCommand, folder: Path) -> None:
    commands = readme_commands(README)
    [check, _] = [words for words in commands if "check" in words]
    assert "4 rows of rows.json can be used" in run(check)
    assert "-> stored" in run(find(commands, "precompute", "CONFIG.yaml"))
    run(find(commands, "--config_file", "easyref_core/training/launch/eight_gpus.yaml"))
    assert (folder / "run" / "easyref.safetensors").is_file()
    export = find(commands, "export", "CONFIG.yaml")
    run([word.replace("2000", "1") for word in export])
    assert (folder / "run" / "easyref-1.safetensors").is_file()


def test_shards_are_written_and_streamed(run: RunCommand, folder: Path) -> None:
    commands = readme_commands(README)
    plain = ["precomputed=null"]
    [_, check] = [words for words in commands if "check" in words]
    assert "4 rows of rows.jsonl can be used" in run(check, *plain)
    assert "4 rows in 1 shards -> shards/groups" in run(find(commands, "shards"), *plain)
    stream = find(commands, "data.stream.sources=shards/groups")
    run(stream, *plain, "output=streamed")
    assert (folder / "streamed" / "easyref.safetensors").is_file()


def test_first_stage_starts_with_rows(run: RunCommand, folder: Path) -> None:
    command = find(readme_commands(README), "easyref_core/training/configs/1_alignment.yaml")
    run(command, *SHORT, *TINY, "batch_size=1", "output=first")
    assert (folder / "first" / "easyref.safetensors").is_file()


def test_finetuning_checks_precomputes_and_trains(run: RunCommand, folder: Path) -> None:
    commands = opening_commands(ROOT / FINETUNE)
    settings = [*SHORT, *TINY, "accumulation=1", "lora_rank=8", "mllm_lora_rank=4", "optimizer=adamw"]
    settings += [f"start={tiny.GOLDEN_START['start']}", "output=finetuned", "precomputed=finetuned/stored"]
    check = find(commands, "check", FINETUNE)
    # the second and third command have those of the first, as the file says
    settings += check[check.index(FINETUNE) + 1 :]
    assert "1 rows of groups.json can be used" in run(check, *settings)
    run(without_dots(find(commands, "precompute", FINETUNE)), *settings)
    assert (folder / "finetuned" / "stored").is_dir()
    run(without_dots(find(commands, FINETUNE)), *settings)
    assert (folder / "finetuned" / "easyref.safetensors").is_file()


def without_dots(words: list[str]) -> list[str]:
    """A command without the dots that stand for the options and settings of another."""
    return [word for word in words if word != "..."]


def documents() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", README, *(ROOT / "docs").glob("*.md")]


def test_extras_that_documents_install_exist() -> None:
    texts = [file.read_text(encoding="utf-8") for file in documents()]
    sources = [*(ROOT / "easyref_core").rglob("*.py"), *(ROOT / "easyref_core").rglob("*.yaml")]
    texts += [file.read_text(encoding="utf-8") for file in sources]
    extras = {
        name
        for text in texts
        for names in re.findall(r"'\.\[([\w,-]+)\]'", text)
        for name in names.split(",")
    }
    assert {"train", "train-deepspeed"} <= extras <= pyproject()["project"]["optional-dependencies"].keys()
