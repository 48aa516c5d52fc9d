"""Launch files: accelerate reads the YAMLs, and the scripts start what they say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

import easyref_core.training
from devkit.documents import readme_commands
from devkit.hosts import ROOT

from . import tiny

LAUNCH = Path(easyref_core.training.__file__).parent / "launch"
YAMLS = sorted(LAUNCH.glob("*.yaml"))
SCRIPTS = sorted(LAUNCH.glob("*.sh"))

needs_bash = pytest.mark.skipif(sys.platform == "win32", reason="the scripts are for bash")


def environment_of(name: str) -> dict[str, str]:
    """The variables that accelerate launch sets for a YAML."""
    arguments = ["--config_file", str(LAUNCH / f"{name}.yaml"), "-m", "easyref_core.training", "x.yaml"]
    options, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    if options.use_deepspeed:
        options.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        return prepare_deepspeed_cmd_env(options)[1]
    return prepare_multi_gpu_env(options)


@pytest.mark.parametrize("file", [*YAMLS, *SCRIPTS], ids=lambda file: file.name)
def test_launch_file_opens_with_its_command(file: Path) -> None:
    opening = file.read_text().partition("\n\n")[0]
    assert f"easyref_core/training/launch/{file.name}" in opening


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("eight_gpus", {"ACCELERATE_MIXED_PRECISION": "bf16"}),
        ("zero2", {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "ACCELERATE_MIXED_PRECISION": "bf16"}),
        (
            "zero3",
            {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true"},
        ),
        ("fsdp2", {"FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}),
    ],
)
def test_accelerate_reads_the_file(name: str, expected: dict[str, str]) -> None:
    environment = environment_of(name)
    assert {key: environment[key] for key in expected} == expected
    assert ("ACCELERATE_USE_DEEPSPEED" in environment) == name.startswith("zero")
    assert ("ACCELERATE_USE_FSDP" in environment) == name.startswith("fsdp")


@needs_bash
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_script_is_valid(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


@needs_bash
def test_torchrun_script_trains(base_folder: Path, tmp_path: Path) -> None:
    """The command of the README, with one update, on two images because encoding its own takes long."""
    [documented] = [words for words in readme_commands(LAUNCH.parent / "README.md") if "bash" in words]
    start = documented.index("bash")
    rows = tmp_path / "rows.json"
    images = [f"{number}.png" for number in range(2)]
    for number, name in enumerate(images):
        tiny.random_image(number).save(tmp_path / name)
    lines = [f'{{"target": "{name}", "image_file": "{name}", "text": "a"}}\n' for name in images]
    rows.write_text("".join(lines), encoding="utf-8")
    settings = ["updates=1", "samples.every=0", "batch_size=1", "data.augmentation.resolution=64"]
    settings += [
        "data.procedural=null",
        f"data.rows={rows}",
        f"data.root={tmp_path}",
        f"output={tmp_path}/run",
    ]
    command = [*documented[start:], *settings]
    variables = dict(word.split("=", 1) for word in documented[:start])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables |= {"PORT": "29411", "PATH": path, "OMP_NUM_THREADS": "1"}
    # Python imports it when it starts
    (tmp_path / "sitecustomize.py").write_text(
        "from devkit.cpu_torch import complete_cpu_torch\n\ncomplete_cpu_torch()\n", encoding="utf-8"
    )
    variables["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{ROOT}"
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "easyref.safetensors").is_file()


@needs_bash
def test_slurm_script_starts_accelerate_on_every_node(tmp_path: Path) -> None:
    """With stand-ins for SLURM's commands and for accelerate, which print their arguments."""
    for name, text in {
        "scontrol": "echo node7; seq 100000",  # more than a pipe holds
        "srun": 'for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
        "accelerate": 'echo "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[7-8]"}
    variables |= {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    command = ["bash", str(LAUNCH / "slurm.sh"), "zero2.yaml", "run.yaml", "data.root=a b"]
    done = subprocess.run(
        command, env={**os.environ, **variables}, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        f"launch --config_file zero2.yaml --num_machines 2 --num_processes 8 --machine_rank {rank} "
        "--main_process_ip node7 --main_process_port 29500 -m easyref_core.training run.yaml data.root=a b"
        for rank in (0, 1)
    ]
