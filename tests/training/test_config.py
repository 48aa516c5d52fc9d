"""Settings: every YAML under configs/ is valid, overrides apply, mistakes are named with a remedy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import easyref_core.training
from easyref_core.training import config
from easyref_core.training.__main__ import expected_message, main, select
from easyref_core.training.batches import MicroBatches, loader
from easyref_core.training.examples import RowExamples
from easyref_core.training.rows import Row
from easyref_core.training.stages import STAGES

CONFIGS = Path(easyref_core.training.__file__).parent / "configs"
FULL_SIZE = ("1_alignment", "2_single_reference", "3_multi_reference")

VALID = """
stage: alignment
base: base
mllm: mllm
output: out
data: {rows: rows.json, root: images}
updates: 10
learning_rate: 1e-4
batch_size: 2
"""


def write(folder: Path, text: str = VALID) -> Path:
    file = folder / "run.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda file: file.name)
def test_every_yaml_parses_and_opens_with_its_command(file: Path) -> None:
    assert config.load(file)
    opening = file.read_text().partition("\n\n")[0]
    assert all(line.startswith("#") for line in opening.splitlines())
    assert "-m easyref_core.training" in opening
    assert f"easyref_core/training/configs/{file.name}" in opening


@pytest.mark.parametrize(
    ("name", "rate", "batch", "accumulation", "updates"),
    [
        ("1_alignment", 1e-4, 8, 1, 300_000),
        ("2_single_reference", 4e-5, 4, 2, 125_000),
        ("3_multi_reference", 2e-5, 1, 4, 50_000),
    ],
)
def test_published_values(name: str, rate: float, batch: int, accumulation: int, updates: int) -> None:
    [settings] = config.load(CONFIGS / f"{name}.yaml")
    assert settings.stage == name[2:]
    actual = (settings.learning_rate, settings.batch_size, settings.accumulation, settings.updates)
    assert actual == (rate, batch, accumulation, updates)
    optimizer = (settings.weight_decay, settings.warmup, settings.schedule, settings.clip)
    assert optimizer == (0.0, 0, "constant", None if settings.stage == "alignment" else 1.0)
    assert (settings.num_tokens, settings.final_layers, settings.lora_rank) == (64, 1, 128)
    rules, multi = settings.data.augmentation, settings.stage == "multi_reference"
    assert (rules.resolution, rules.size, rules.max_references) == (1024, 336, 28)
    assert (rules.drop_image, rules.drop_text, rules.drop_both) == (0.05, 0.05, 0.05)
    native = (rules.native, rules.truncation, rules.max_length)
    assert native == ((True, 0.4, None) if multi else (False, 0.0, 256))


def test_each_stage_starts_from_the_previous_one() -> None:
    separate = [config.load(CONFIGS / f"{name}.yaml")[0] for name in FULL_SIZE]
    together = config.load(CONFIGS / "tiny.yaml")
    for runs in (separate, together):
        assert [run.stage for run in runs] == list(STAGES)
        assert [run.start for run in runs] == [None, runs[0].result, runs[1].result]
        assert len({run.output for run in runs}) == 3


def test_section_of_a_stage_overrides_the_shared_keys(tmp_path: Path) -> None:
    stages = "- {stage: alignment, data: {skip_rows: 3}}\n- {stage: single_reference, updates: 5}"
    first, second = config.load(write(tmp_path, f"{VALID}stages:\n{stages}"))
    assert (first.updates, second.updates) == (10, 5)
    assert (first.data.skip_rows, second.data.skip_rows) == (3, 0)
    assert first.data.rows == second.data.rows == Path("rows.json")
    assert (first.output, second.output) == (Path("out/1_alignment"), Path("out/2_single_reference"))


def test_overrides(tmp_path: Path) -> None:
    stages = "- {stage: alignment, updates: 3}\n- {stage: single_reference, updates: 5}"
    overrides = ["updates=7", "stages.single_reference.updates=8", "data.augmentation.size=84", "output=new"]
    first, second = config.load(write(tmp_path, f"{VALID}stages:\n{stages}"), overrides)
    assert (first.updates, second.updates) == (7, 8)
    assert first.data.augmentation.size == second.data.augmentation.size == 84
    assert second.start == Path("new/1_alignment/easyref.safetensors")


def test_learning_rate_in_scientific_notation(tmp_path: Path) -> None:
    """YAML 1.1 parses 1e-4, without a point, as text."""
    assert config.load(write(tmp_path))[0].learning_rate == 1e-4
    assert config.load(write(tmp_path), ["learning_rate=3e-5"])[0].learning_rate == 3e-5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learing_rate=1", r"run.yaml: learing_rate is not a setting; did you mean learning_rate\?"),
        ("data.augmentation.sise=1", r"\.sise is not a setting; did you mean data.augmentation.size"),
        ("samples.xyz=1", r"xyz is not a setting; the settings are every, count, steps, guidance, negative"),
        ("updates=many", r"updates is 'many' \(a text\), expected a whole number"),
        ("updates=1.5", r"updates is 1.5 \(a number\), expected a whole number"),
        ("batch_size=true", r"batch_size is True \(true or false\), expected a whole number"),
        ("learning_rate=fast", r"learning_rate is 'fast' \(a text\), expected a number"),
        ("gradient_checkpointing=1", r"_checkpointing is 1 \(a whole number\), expected true or false"),
        ("base=3", r"base is 3 \(a whole number\), expected a path"),
        ("samples=3", r"samples is 3 \(a whole number\), expected a section of keys"),
        ("updates=null", r"updates is None \(nothing\), expected a whole number"),
        ("updates=0", r"updates is 0, expected 1 or more"),
        ("learning_rate=-1", r"learning_rate is -1.* expected a positive number"),
        ("clip=0", r"clip is 0.* expected a positive number"),
        ("warmup=-5", r"warmup is -5, expected 0 or more"),
        ("seed=-1", r"seed is -1, expected 0 or more"),
        ("seed=9223372036854775808", r"seed is 9223372036854775808, expected at most 9223372036854775807"),
        ("workers=-1", r"workers is -1, expected 0 or more"),
        ("weight_decay=-0.1", r"weight_decay is -0.1, expected 0 or more"),
        ("weight_decay=.nan", r"weight_decay is nan, expected 0 or more"),
        ("learning_rate=.inf", r"learning_rate is inf.* expected a positive number"),
        ("learning_rate=.nan", r"learning_rate is nan.* expected a positive number"),
        ("accumulation=0", r"accumulation is 0, expected 1 or more"),
        ("samples.every=-1", r"samples.every is -1, expected 0 or more"),
        ("samples.count=0", r"samples.count is 0, expected 1 or more"),
        ("samples.steps=0", r"samples.steps is 0, expected 1 or more"),
        ("samples.guidance=-2", r"samples.guidance is -2.0, expected 0 or more"),
        ("data.skip_rows=-1", r"data.skip_rows is -1, expected 0 or more"),
        ("data.max_broken=-1", r"data.max_broken is -1, expected 0 or more"),
        ("data.augmentation.max_length=0", r"max_length is 0, expected 1 or more"),
        ("data.augmentation.resolution=100", r"resolution is 100, expected a multiple of 8"),
        ("data.augmentation.drop_image=3", r"drop_image is 3.* expected a probability, 0 to 1"),
        ("data.augmentation.truncation=-0.1", r"truncation is -0.1, expected a probability, 0 to 1"),
        ("data.augmentation.drop_text=0.95", r"drop_text and drop_both add up to 1.05, expected at most 1"),
        ("data.augmentation.resolution=0", r"resolution is 0, expected 1 or more"),
        ("schedule=exponential", r"schedule is 'exponential', expected one of constant, linear, cosine"),
        ("stage=4", r"stage is 4, expected one of alignment, single_reference, multi_reference"),
        (
            "stage=multi_reference",
            r"starts from stage 'single_reference', but start is not set. Set start to",
        ),
        ("data.root=null", r"data.rows is set without data.root. Set data.root"),
        ("data.procedural={}", r"data has rows and procedural, expected one of rows, stream and procedural"),
        ("data.stream.sources=[]", r"data.stream has 0 sources and 0 weights, expected at least one source"),
        ("data.stream={sources: a, weights: [1, 2]}", r"data.stream has 1 sources and 2 weights"),
        ("data.stream={sources: a, weights: 0}", r"data.stream.weights is \[0.0\], expected positive"),
        ("data.stream={sources: a, partitions: 0}", r"data.stream.partitions is 0, expected 1 or more"),
        (
            "data={stream: {sources: a}, thorough: true}",
            r"data.thorough is true beside data.stream, .*shards",
        ),
        ("data.rows=null", r"data has no source, expected one of rows, stream and procedural. Set data.rows"),
        ("learning_rate", r"'learning_rate' is not an override, expected key=value"),
        ("stages.later.updates=1", r"stages.later.updates matches no stage, expected stages.<alignment>"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.load(write(tmp_path), [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "run.yaml is not valid YAML"),
        ("- a", "run.yaml contains a list, expected keys and values"),
        (VALID + "stages: []", r"stages is \[\], expected a list of sections"),
        (
            VALID.replace("batch_size: 2", ""),
            "batch_size is not set. Set it in the YAML, or as batch_size=VALUE",
        ),
    ],
)
def test_invalid_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.load(write(tmp_path, text))


def test_missing_input_is_named(tmp_path: Path) -> None:
    [settings] = config.load(write(tmp_path), [f"base={tmp_path}"])
    with pytest.raises(FileNotFoundError, match=r"mllm is mllm, which does not exist.*put mllm=PATH after"):
        settings.require_files()


@pytest.mark.parametrize("options", [["updats=1"], ["seed=1", "--only", "alignment", "updats=1"]])
def test_command_reports_mistakes_without_a_traceback(tmp_path: Path, options: list[str]) -> None:
    """Settings may be on both sides of --only."""
    command = [sys.executable, "-m", "easyref_core.training", str(write(tmp_path)), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CONFIGS.parents[2], timeout=120)
    assert done.returncode == 1
    assert done.stderr.strip() == f"{tmp_path}/run.yaml: updats is not a setting; did you mean updates?"


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """The message that the command exits with."""
    monkeypatch.setattr(sys, "argv", ["training", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return str(end.value.code)


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A YAML whose base and MLLM folders hold no model, with one valid row of data."""
    for name in ("base", "mllm", "images"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (100, 80)).save(tmp_path / "images" / "a.png")
    (tmp_path / "rows.json").write_text('[{"target": "a.png", "image_file": "a.png", "text": ""}]')
    text = VALID.replace(
        "rows: rows.json, root: images", f"rows: {tmp_path}/rows.json, root: {tmp_path}/images"
    )
    for name in ("base", "mllm"):
        text = text.replace(f"{name}: {name}", f"{name}: {tmp_path / name}")
    return write(tmp_path, text.replace("output: out", f"output: {tmp_path}/out"))


def test_rows_of_every_stage_are_checked_before_a_model_is_loaded(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("easyref_core.training.examples.load_tokenizer", lambda _: None)
    (tmp_path / "broken.json").write_text('[{"target": "x.png", "image_file": "a.png", "text": ""}]')
    later = f"{{stage: single_reference, data: {{rows: {tmp_path}/broken.json}}}}"
    inputs.write_text(f"{inputs.read_text()}\nstages: [{{stage: alignment}}, {later}]")
    message = run_main(monkeypatch, inputs)
    assert message.startswith(f"1 of 1 rows of {tmp_path}/broken.json cannot be used")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=[", "seed is '[', expected a value in YAML: "),
        ("mllm=nowhere", "mllm is nowhere, which does not exist"),
        ("data.root=nowhere", "data.root is nowhere, which does not exist"),
        (
            "data.procedural={worlds: 1}",
            "data has rows and procedural, expected one of rows, stream and procedural.",
        ),
        ("output=rows.json", "[Errno 17] File exists: 'rows.json'"),
        ("seed=1", "has no model_index.json, so it is not a diffusers SDXL folder."),
    ],
)
def test_expected_errors_are_messages(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, message: str
) -> None:
    monkeypatch.setattr("easyref_core.training.examples.load_tokenizer", lambda _: None)
    monkeypatch.chdir(tmp_path)
    assert message in run_main(monkeypatch, inputs, override)


def test_error_of_a_data_loading_process_is_its_message() -> None:
    class Broken:
        def batch(self, _: range) -> None:
            RowExamples([Row(7, "x.png", ("x.png",), ("",))], "nowhere", None, None).batch([0])

    with pytest.raises(ValueError, match="Original Traceback") as error:
        list(loader(MicroBatches(Broken(), 1), range(1), workers=1))
    message = expected_message(error.value)
    assert message.startswith("1 rows after another cannot be used, first line 7: x.png cannot be read")
    assert message.endswith("to list those that cannot.")


def test_traceback_of_a_bug_is_shown() -> None:
    with pytest.raises(ValueError, match="could not convert") as error:
        float("a")
    assert expected_message(error.value) is None


def test_select_one_stage() -> None:
    stages = config.load(CONFIGS / "tiny.yaml")
    assert [settings.stage for settings in select(stages, "multi_reference")] == ["multi_reference"]
    assert select(stages, None) == stages
    known = "no stage 'stage3'; its stages are alignment, single_reference, multi"
    with pytest.raises(ValueError, match=known):
        select(stages, "stage3")
