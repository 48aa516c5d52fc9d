"""The plain text of a prompt for the MLLM, and the notes of Encode Reference Group on its inputs."""

from __future__ import annotations

import random
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from devkit.host import golden
from devkit.host.sampling import Easy

PROMPT = golden.SETTINGS["prompt"]
SIZE = 84


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Four references that differ, as a batch."""
    return torch.rand(4, 96, 96, 3, generator=torch.Generator().manual_seed(0))


def execute(easy: Easy, node: str, *inputs: Any) -> Any:
    return golden.execute(easy.pack, node, easy.easyref, *inputs)


def encode(easy: Easy, group: Any, prompt: str = PROMPT) -> tuple[Any, str]:
    """The context, and the text that the node shows."""
    output = execute(easy, "EasyRefEncodeGroup", group, prompt, "Look:\n", SIZE)
    return output.result[0], output.ui["text"][0]


# The prompt


def test_weights_are_parsed_as_the_host_parses_them() -> None:
    """Against ComfyUI's own parser, on random texts of its syntax."""
    from comfy.sd1_clip import escape_important, token_weights, unescape_important

    from easyref_core.utils.prompt_syntax import plain_text

    parts = ["(", ")", "\\(", "\\)", "a", " ", ":", "1.2", ":1.3", "\\", ","]
    choose = random.Random(0)
    for _ in range(20_000):
        text = "".join(choose.choices(parts, k=choose.randint(0, 14)))
        segments = token_weights(escape_important(text), 1.0)
        assert plain_text(text) == "".join(unescape_important(segment) for segment, _ in segments), text


def test_plain_text_is_encoded(easy, images) -> None:
    plain, shown = encode(easy, images, "a smiling cat, on grass")
    assert "The MLLM reads" not in shown
    weighted, shown = encode(easy, images, "a (smiling:1.3) cat, embedding:fur, on ((grass)) <lora:x:1>")
    assert "text encoders: a smiling cat, on grass\n" in shown
    torch.testing.assert_close(weighted.states, plain.states, atol=1e-5, rtol=1e-5)
    assert weighted.provenance.prompt == "a smiling cat, on grass"


def test_an_unresolved_choice_is_refused(easy, images) -> None:
    with pytest.raises(ValueError, match=r"'\{red\|blue\}'.*in one text node that is linked to both"):
        encode(easy, images, "a {red|blue} cat")


def test_budget_counts_the_tokens_of_the_encoding(easy, images) -> None:
    prompt = "a (smiling:1.3) cat, embedding:fur, <lora:x:1>"
    context, _ = encode(easy, images, prompt)
    output = execute(easy, "EasyRefGroupBudget", images, prompt, "Look:\n", SIZE)
    assert f"{context.states.shape[1]:,} of " in output.result[2]
    assert "text encoders: a smiling cat" in output.result[2]


def test_influence_encodes_the_plain_text(easy, images) -> None:
    plain, weighted = (
        execute(easy, "EasyRefReferenceInfluence", images, prompt, "Look:\n", SIZE).result[1]
        for prompt in ("a cat", "a (cat:1.3)")
    )
    assert weighted == f"{plain}\n{weighted.splitlines()[-1]}"
    assert weighted.endswith("text encoders: a cat")


# Notes


@pytest.mark.parametrize("prompt", ["", " \n", "(embedding:x:1.2)"])
def test_empty_prompt(easy, images, prompt: str) -> None:
    assert "Warning: the prompt is empty." in encode(easy, images, prompt)[1]


def test_a_good_group_has_no_warning(easy, images) -> None:
    assert "Warning" not in encode(easy, images)[1]


def test_duplicates_and_black_images(easy, images) -> None:
    brighter = (images[1:2] + 0.01).clamp(max=1)
    black = torch.zeros(1, 96, 96, 3)
    batch = torch.cat([images, images[:1], brighter, black])
    wanted = [
        "Warning: reference 7 is black, as the unconditional side's image is. Remove it from the group.",
        "Warning: reference 5 is the same picture as reference 1.",
        "Warning: reference 6 looks nearly like reference 2.",
    ]
    for group in (batch, tuple(batch.split(1))):
        assert encode(easy, group)[1].splitlines()[-3:] == wanted


def test_images_are_not_fingerprinted_twice(easy, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = golden.part(easy.pack, "nodes.host.notes")
    fingerprint = Mock(wraps=notes.fingerprint)
    monkeypatch.setattr(notes, "fingerprint", fingerprint)
    images = [image[0] for image in torch.rand(8, 128, 128, 3).split(1)]
    for prompt in (PROMPT, "another prompt"):
        assert notes.image_notes(easy.easyref.model.prepare(images, prompt, "Look:\n", 336)) == []
    assert fingerprint.call_count == len(images)


def test_window(pack) -> None:
    note = golden.part(pack, "nodes.host.notes").window_note
    assert note(0.2, 0.8) is None
    for start, end in ((0.8, 0.2), (0.5, 0.5)):
        assert f"start_percent is {start:g} and end_percent is {end:g}" in note(start, end)


def test_a_window_that_never_opens_is_shown_on_apply(easy, model) -> None:
    def shown(weight: float, start: float, end: float) -> object:
        inputs = model, easy.tokens, weight, start, end, 1.0
        return golden.execute(easy.pack, "EasyRefApply", *inputs).ui

    assert "start_percent is 0.6 and end_percent is 0.4" in str(shown(1.0, 0.6, 0.4))
    assert shown(1.0, 0.4, 0.6) is None
    assert shown(0.0, 0.6, 0.4) is None
