"""Plain text of prompts in the syntax of SDXL's text encoders."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from devkit.golden import SETTINGS
from easyref_core.utils.prompt_syntax import plain_text

# prompts that stay, prompts and what remains of them, prompts and the choice that is refused
CASES = json.loads(Path(__file__).with_name("prompt_syntax.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("prompt", [*CASES["unchanged"], SETTINGS["prompt"]])
def test_a_prompt_without_syntax_is_unchanged(prompt: str) -> None:
    assert plain_text(prompt) == prompt


@pytest.mark.parametrize(("prompt", "text"), CASES["removed"].items())
def test_syntax_is_removed(prompt: str, text: str) -> None:
    assert plain_text(prompt) == text


@pytest.mark.parametrize(("prompt", "choice"), CASES["choices"].items())
def test_a_choice_is_refused(prompt: str, choice: str) -> None:
    with pytest.raises(ValueError, match="different prompts") as error:
        plain_text(prompt)
    assert str(error.value).startswith(f"prompt has an unresolved choice: '{choice}'.")


@pytest.mark.parametrize(
    "unit",
    [*r"( ) () \( { } /* // <lora: <lora:x> embedding: : ,".split(), "/* ", "BREAK ", "embedding:x, ", " "],
)
def test_long_prompts_take_no_time(unit: str) -> None:
    start = time.monotonic()
    plain_text(unit * (100_000 // len(unit)))
    plain_text(f"{'(' * 2000}x{')' * 2000}")
    assert time.monotonic() - start < 5
