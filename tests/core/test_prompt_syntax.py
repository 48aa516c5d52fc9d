"""Plain text of prompts in the syntax of SDXL's text encoders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from devkit.golden import SETTINGS
from devkit.hosts import ROOT
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


LONG_PROMPTS = r"""
from easyref_core.utils.prompt_syntax import plain_text

units = r"( ) () \( { } /* // <lora: <lora:x> embedding: : ,".split()
for unit in [*units, "/* ", "BREAK ", "embedding:x, ", " "]:
    plain_text(unit * (1_000_000 // len(unit)))
plain_text(f"{'(' * 100_000}x{')' * 100_000}")
"""


@pytest.mark.thorough
def test_long_prompts_do_not_hang() -> None:
    """Time that grows with the square of the length would take many minutes."""
    subprocess.run([sys.executable, "-c", LONG_PROMPTS], cwd=ROOT, check=True, timeout=240)
