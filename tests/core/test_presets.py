"""Instruction presets."""

from __future__ import annotations

import pytest

from easyref_core.instructions import INSTRUCTION
from easyref_core.presets import INSTRUCTIONS, LANGUAGES, instruction


def test_general_is_the_authors():
    assert instruction("general") == INSTRUCTION


@pytest.mark.parametrize("preset", INSTRUCTIONS)
def test_each_has_both_languages_and_ends_where_the_prompt_follows(preset):
    texts = [instruction(preset, language) for language in LANGUAGES]
    assert len(set(texts)) == 2
    assert all(text.endswith(":\n") or text.endswith("：\n") for text in texts)


def test_a_text_takes_the_place_of_the_preset():
    assert instruction("style", "en", "Look at the hats.") == "Look at the hats.\n"
    assert instruction("custom", "en", "Hats:\n") == "Hats:\n"
    assert instruction("style", "en", " \n ") == INSTRUCTIONS["style"]["en"]


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="custom, but its text is empty"):
        instruction("custom")
    with pytest.raises(ValueError, match="no instruction 'hats'; there are general"):
        instruction("hats")
    with pytest.raises(ValueError, match="in 'fr'; there are some in en, zh"):
        instruction("style", "fr")
