"""A few hundred cases of tools/fuzz.py in this process, and proof that the fuzzer finds what is broken."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from easyref_core.tokens import files
from tools.fuzzing import pool
from tools.fuzzing import token_files as token_cases
from tools.fuzzing.cases import open_kind, seeded
from tools.fuzzing.judge import ERROR, FAILURE, RIGHT, digest, judged
from tools.fuzzing.watch import files_of, left_behind


@pytest.mark.filterwarnings("ignore")  # torch and PIL warn of some files that are broken
@pytest.mark.parametrize(
    ("kind", "count"),
    [("checkpoint", 40), ("mllm_folder", 40), ("token_files", 150), ("images", 40), ("text", 25)],
)
def test_bad_input_gives_a_right_result_or_one_clear_error(tmp_path: Path, kind: str, count: int) -> None:
    cases = open_kind(kind, tmp_path)
    good, outcomes = digest(cases.good()), []
    for number in range(count):
        folder = tmp_path / f"case{number}"
        folder.mkdir()
        case = cases.make(seeded(kind, 1, number), folder)
        before = files_of(tmp_path)
        outcomes.append((judged(case.call), case.about))
        assert not left_behind(before, files_of(tmp_path), cases.writable), case.about
    assert [(why, about) for (how, why), about in outcomes if how == FAILURE] == []
    assert {how for (how, _), _ in outcomes} == {RIGHT, ERROR}
    assert digest(cases.good()) == good


# The fuzzer can fail


def first_failure(tmp_path: Path) -> str:
    """Why the first failing one of 60 broken files of tokens fails; "" where none does."""
    cases = token_cases.Cases(tmp_path)
    for number in range(60):
        (folder := tmp_path / str(number)).mkdir()
        outcome = judged(cases.make(seeded("token_files", 2, number), folder).call)
        if outcome.how == FAILURE:
            return outcome.text
    return ""


def test_no_failure_without_a_broken_reader(tmp_path: Path) -> None:
    assert first_failure(tmp_path) == ""


def test_a_reader_without_checks_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_read_about", lambda _, metadata, __: json.loads(metadata["easyref_tokens"]))
    assert "not an error of our own" in first_failure(tmp_path)


def test_a_result_that_is_not_a_number_is_caught() -> None:
    assert judged(lambda: [torch.tensor([torch.nan])]).how == FAILURE


def test_an_error_from_below_is_caught() -> None:
    assert "from below" in judged(lambda: int("a sentence of enough length, wanted")).text


def test_an_error_without_a_remedy_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_damaged", lambda path, what: ValueError(f"{path} is damaged: {what}"))
    assert "without a remedy" in first_failure(tmp_path)


@pytest.mark.parametrize("left", ["new", "changed", "gone"])
def test_what_is_left_behind_is_seen(tmp_path: Path, left: str) -> None:
    kept = tmp_path / "kept"
    kept.write_text("a")
    before = files_of(tmp_path)
    if left == "new":
        (tmp_path / "new").touch()
    elif left == "changed":
        kept.write_text("changed")
    else:
        kept.unlink()
    assert left_behind(before, files_of(tmp_path), ()) == [
        str(tmp_path / ("new" if left == "new" else "kept"))
    ]


WORKER = """
import json, os, time
for number in range({first}, 3):
    print(json.dumps({{"start": number}}), flush=True)
    if number == 1:
        {does}
    print(json.dumps({{"case": number, "how": "right", "text": "", "about": ""}}), flush=True)
"""


@pytest.mark.parametrize(
    ("does", "why"), [("os.abort()", "the process ended with code"), ("time.sleep(60)", "no answer within")]
)
def test_a_case_that_kills_or_hangs_is_a_failure_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, does: str, why: str
) -> None:
    start = pool.subprocess.Popen

    def worker(command: list[str], **options: object) -> object:
        return start([command[0], "-c", WORKER.format(first=command[5], does=does)], **options)

    monkeypatch.setattr(pool.subprocess, "Popen", worker)
    monkeypatch.setattr(pool, "CASE_LIMIT", 1)
    begin = time.monotonic()
    tally = pool.run_kind("any", 0, 0, 3)
    assert tally.cases == 3
    assert [failed.number for failed in tally.failures] == [1]
    assert why in tally.failures[0].why
    assert time.monotonic() - begin < 20
