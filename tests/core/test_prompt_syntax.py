"""Plain text of prompts in the syntax of SDXL's text encoders."""

from __future__ import annotations

import time

import pytest

from devkit.golden import SETTINGS
from easyref_core.utils.prompt_syntax import plain_text

PLAIN = [
    *("", " ", "a cat, on grass \n", "a [blue] cat", "text:1.3", "a } b", "a | b", "a\\b", "a) b", "a (b"),
    "ratio 3:4, 50% <b>, a<b, 猫：黑",
    "no embedding, preembedding:x, BREAKFAST, TIE-BREAK, break",
    SETTINGS["prompt"],
]


@pytest.mark.parametrize("prompt", PLAIN)
def test_a_prompt_without_syntax_is_unchanged(prompt: str) -> None:
    assert plain_text(prompt) == prompt


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("(smile:1.3)", "smile"),
        ("a (big) cat", "a big cat"),
        ("((x)), (((y)))", "x, y"),
        ("(a (b:1.2) c:0.8) d", "a b c d"),
        ("(a:b)", "a:b"),
        ("(a:1.2:0.5)", "a:1.2"),
        ("(:1.2)", ":1.2"),
        ("( x : 1.3 )", " x "),
        ("()", ""),
        ("((a)", "(a"),
        ("(a))", "a)"),
        ("a) (b) c", "a) (b) c"),
        ("[x] [x:y:0.5]", "[x] [x:y:0.5]"),
        ("text:1.3, (x:1.3)", "text:1.3, x"),
        (r"a \(b\) c", "a (b) c"),
        (r"(a \(b\):1.2)", "a (b)"),
        (r"\(x:1.3\)", "(x:1.3)"),
        ("embedding:EasyNegative", ""),
        ("a cat, embedding:my_style, on grass", "a cat, on grass"),
        ("a cat embedding:my_style on grass", "a cat on grass"),
        ("(embedding:my_style:1.2), a cat", "a cat"),
        ("a cat, embedding:one, embedding:two", "a cat"),
        ("embedding:one\na cat", "a cat"),
        ("a cat <lora:name:0.8>", "a cat"),
        ("<lora:a(v2):0.8>, a cat, <lyco:x>, on grass", "a cat, on grass"),
        ("a cat <LoRA:name:1>, on grass", "a cat, on grass"),
        ("a cat BREAK a dog", "a cat a dog"),
        ("a cat\nBREAK\na dog", "a cat\na dog"),
        ("a cat, BREAK, (a dog BREAK:1.2)", "a cat, a dog"),
        ("a cat /* a note */, on grass // and another\nby day", "a cat , on grass \nby day"),
        ("a /* b", "a /* b"),
        ("a /* b // c", "a /* b "),
        ("{a} cat", "a cat"),
        ("{a {b}} }c", "a b }c"),
        ("a {b", "a b"),
        (r"\{a\|b\}", "{a|b}"),
        (r"\{a\} {b}", "{a} b"),
    ],
)
def test_syntax_is_removed(prompt: str, text: str) -> None:
    assert plain_text(prompt) == text


@pytest.mark.parametrize(
    ("prompt", "choice"),
    [
        ("a {red|blue} cat", "{red|blue}"),
        ("{a|b}", "{a|b}"),
        ("{|b}", "{|b}"),
        ("{a {b|c}}", "{a {b|c}"),
        ("({a|b}:1.3)", "{a|b}"),
        ("a {b|c", "{b|c"),
        (r"{a\}|b}", r"{a\\}"),
    ],
)
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
