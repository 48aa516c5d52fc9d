"""Settings: every YAML under configs/ is sound, overrides reach where they say, mistakes are named with a remedy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import easyref_core.training
from easyref_core.training import config
from easyref_core.training.__main__ import only
from easyref_core.training.stages import STAGES

CONFIGS = Path(easyref_core.training.__file__).parent / "configs"
FULL_SIZE = {
    "1_alignment": "alignment",
    "2_single_reference": "single_reference",
    "3_multi_reference": "multi_reference",
}


def write(folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(text)
    return file


GOOD = """
stage: alignment
base: base
mllm: mllm
output: out
data: {rows: rows.json, root: pictures}
updates: 10
learning_rate: 1e-4
batch_size: 2
"""


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda file: file.name)
class TestEveryYaml:
    def test_it_parses(self, file: Path) -> None:
        assert config.load(file)

    def test_it_opens_with_the_command_that_runs_it(self, file: Path) -> None:
        opening = file.read_text().partition("\n\n")[0]
        assert all(line.startswith("#") for line in opening.splitlines())
        assert "-m easyref_core.training" in opening
        assert f"easyref_core/training/configs/{file.name}" in opening


class TestThePublishedValues:
    @pytest.mark.parametrize(("name", "stage"), FULL_SIZE.items())
    def test_each_is_one_stage(self, name: str, stage: str) -> None:
        assert [settings.stage for settings in config.load(CONFIGS / f"{name}.yaml")] == [stage]

    @pytest.mark.parametrize(
        ("name", "rate", "batch", "accumulation", "updates"),
        [
            ("1_alignment", 1e-4, 8, 1, 300_000),
            ("2_single_reference", 4e-5, 4, 2, 125_000),
            ("3_multi_reference", 2e-5, 1, 4, 50_000),
        ],
    )
    def test_optimisation(self, name: str, rate: float, batch: int, accumulation: int, updates: int) -> None:
        [settings] = config.load(CONFIGS / f"{name}.yaml")
        found = (settings.learning_rate, settings.batch_size, settings.accumulation, settings.updates)
        assert found == (rate, batch, accumulation, updates)
        assert (settings.weight_decay, settings.warmup, settings.schedule, settings.clip) == (
            0.0,
            0,
            "constant",
            None,
        )
        assert (settings.num_tokens, settings.final_layers, settings.lora_rank) == (64, 1, 128)

    @pytest.mark.parametrize("name", FULL_SIZE)
    def test_data(self, name: str) -> None:
        [settings] = config.load(CONFIGS / f"{name}.yaml")
        rules, multi = settings.data.augmentation, settings.stage == "multi_reference"
        assert (rules.resolution, rules.size, rules.max_references) == (1024, 336, 28)
        assert (rules.drop_image, rules.drop_text, rules.drop_both) == (0.05, 0.05, 0.05)
        assert (rules.native, rules.truncation, rules.max_length) == (
            (True, 0.4, None) if multi else (False, 0.0, 256)
        )

    def test_each_starts_from_the_one_before(self) -> None:
        runs = [config.load(CONFIGS / f"{name}.yaml")[0] for name in FULL_SIZE]
        assert [run.start for run in runs] == [None, runs[0].result, runs[1].result]


class TestStagesInOneFile:
    def test_the_tiny_run_has_all_three_in_order(self) -> None:
        runs = config.load(CONFIGS / "tiny.yaml")
        assert [run.stage for run in runs] == list(STAGES)
        assert [run.start for run in runs] == [None, runs[0].result, runs[1].result]
        assert len({run.output for run in runs}) == 3

    def test_a_stage_s_section_is_laid_on_what_they_share(self, tmp_path: Path) -> None:
        file = write(
            tmp_path,
            GOOD
            + "stages:\n- {stage: alignment, data: {skip_rows: 3}}\n- {stage: single_reference, updates: 5}",
        )
        first, second = config.load(file)
        assert (first.updates, second.updates) == (10, 5)
        assert (first.data.skip_rows, second.data.skip_rows) == (3, 0)
        assert first.data.rows == second.data.rows == Path("rows.json")
        assert (first.output, second.output) == (Path("out/1_alignment"), Path("out/2_single_reference"))

    def test_overrides(self, tmp_path: Path) -> None:
        file = write(
            tmp_path,
            GOOD + "stages:\n- {stage: alignment, updates: 3}\n- {stage: single_reference, updates: 5}",
        )
        first, second = config.load(
            file,
            ["updates=7", "stages.single_reference.updates=8", "data.augmentation.size=84", "output=new"],
        )
        assert (first.updates, second.updates) == (7, 8)
        assert first.data.augmentation.size == second.data.augmentation.size == 84
        assert second.start == Path("new/1_alignment/easyref.safetensors")


def test_a_rate_may_be_written_1e_4(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-4, without a point, as text."""
    assert config.load(write(tmp_path, GOOD))[0].learning_rate == 1e-4
    assert config.load(write(tmp_path, GOOD), ["learning_rate=3e-5"])[0].learning_rate == 3e-5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learing_rate=1", r"run.yaml: learing_rate is no setting; did you mean learning_rate\?"),
        (
            "data.augmentation.sise=1",
            r"data.augmentation.sise is no setting; did you mean data.augmentation.size",
        ),
        ("samples.xyz=1", r"samples.xyz is no setting; there are every, count, steps, guidance, negative"),
        ("updates=many", r"updates is 'many', a text; wanted a whole number"),
        ("updates=1.5", r"updates is 1.5, a number; wanted a whole number"),
        ("batch_size=true", r"batch_size is True, true or false; wanted a whole number"),
        ("learning_rate=fast", r"learning_rate is 'fast', a text; wanted a number"),
        ("gradient_checkpointing=1", r"gradient_checkpointing is 1, a whole number; wanted true or false"),
        ("base=3", r"base is 3, a whole number; wanted a path"),
        ("samples=3", r"samples is 3, a whole number; wanted a section of keys"),
        ("updates=null", r"updates is None, nothing; wanted a whole number"),
        ("updates=0", r"updates is 0; wanted 1 or more"),
        ("learning_rate=-1", r"learning_rate is -1.* wanted a positive number"),
        ("clip=0", r"clip is 0.* wanted a positive number"),
        ("warmup=-5", r"warmup is -5; wanted 0 or more"),
        ("seed=-1", r"seed is -1; wanted 0 or more"),
        ("data.augmentation.drop_image=3", r"drop_image is 3.* wanted a chance, 0 to 1"),
        ("data.augmentation.truncation=-0.1", r"truncation is -0.1; wanted a chance, 0 to 1"),
        ("data.augmentation.drop_text=0.95", r"drop_text and drop_both add up to 1.05; wanted at most 1"),
        ("data.augmentation.resolution=0", r"resolution is 0; wanted 1 or more"),
        ("schedule=exponential", r"schedule is 'exponential'; wanted one of constant, linear, cosine"),
        ("stage=4", r"stage is 4; wanted one of alignment, single_reference, multi_reference"),
        (
            "stage=multi_reference",
            r"starts from stage 'single_reference', and start is not set. Set start to",
        ),
        ("data.root=null", r"data.rows is set without data.root; set data.root"),
        ("data.procedural={}", r"data holds both of rows and procedural; wanted one"),
        ("data.rows=null", r"data holds neither of rows and procedural; wanted one: set data.rows"),
        ("learning_rate", r"'learning_rate' is no override; wanted key=value"),
        ("stages.later.updates=1", r"stages.later.updates reaches no stage; wanted stages.<alignment>"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.load(write(tmp_path, GOOD), [override])


def test_a_setting_that_is_absent_is_named(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD.replace("batch_size: 2", ""))
    with pytest.raises(
        ValueError, match=r"batch_size is not set. Set it in the YAML, or as batch_size=VALUE"
    ):
        config.load(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "run.yaml is no YAML"),
        ("- a", "run.yaml holds a list; wanted keys and values"),
        (GOOD + "stages: []", r"stages is \[\]; wanted a list of sections"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.load(write(tmp_path, text))


def test_a_missing_input_is_named(tmp_path: Path) -> None:
    [settings] = config.load(write(tmp_path, GOOD), [f"base={tmp_path}"])
    with pytest.raises(FileNotFoundError, match=r"mllm is mllm, which does not exist.*put mllm=PATH behind"):
        settings.require_files()


def test_the_command_says_what_is_wrong_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "easyref_core.training", write(tmp_path, GOOD), "updats=1"]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=CONFIGS.parents[2], timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.strip() == f"{tmp_path}/run.yaml: updats is no setting; did you mean updates?"


def test_settings_may_stand_on_both_sides_of_only() -> None:
    options = ["seed=1", "--only", "multi_reference", "updats=1"]
    command = [sys.executable, "-m", "easyref_core.training", CONFIGS / "tiny.yaml", *options]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=CONFIGS.parents[2], timeout=120
    )
    assert "updats is no setting" in done.stderr


def test_one_stage_of_a_yaml_can_run_alone():
    stages = config.load(CONFIGS / "tiny.yaml")
    assert [settings.stage for settings in only(stages, "multi_reference")] == ["multi_reference"]
    assert only(stages, None) == stages
    with pytest.raises(
        ValueError, match="no stage 'stage3'; its stages are alignment, single_reference, multi"
    ):
        only(stages, "stage3")
