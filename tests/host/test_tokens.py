"""The nodes for reference tokens: files, combinations, batches, and the negative of the aggregation."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from devkit.host import golden
from devkit.host.sampling import predict

PROMPT = golden.SETTINGS["prompt"]


@pytest.fixture
def output(folders, tmp_path) -> Path:
    folders.register_folders()
    return tmp_path / "output" / "easyref"


@pytest.fixture(scope="module")
def save(easy, execute) -> Callable[..., str]:
    """Save tokens, by default the golden ones -> the name under which the loader lists them."""

    def save_as(prefix: str = "tokens", **inputs: Any) -> str:
        saved = execute("EasyRefSaveTokens", **{"tokens": easy.tokens, "filename_prefix": prefix, **inputs})
        (file,) = saved.ui["easyref_tokens"]
        return str(Path(file["subfolder"], file["filename"]).relative_to("easyref"))

    return save_as


@pytest.fixture(scope="module")
def load(execute) -> Callable[[str], Any]:
    return lambda file: execute("EasyRefLoadTokens", file=file).result[0]


def equal(first: Any, second: Any) -> bool:
    pairs = (first.conditional, second.conditional), (first.unconditional, second.unconditional)
    return all(torch.equal(a, b) for a, b in pairs)


# Files


def test_saved_tokens_give_the_same_prediction_bit_for_bit(easy, model, output, save, load, execute) -> None:
    name = save()
    loaded = load(name)
    assert equal(loaded, easy.tokens)
    assert loaded.conditional.provenance == easy.tokens.conditional.provenance
    assert torch.equal(predict(easy.apply(model, tokens=loaded)), predict(easy.apply(model)))
    shown = execute("EasyRefLoadTokens", file=name)
    assert shown.result[1] == PROMPT
    assert shown.ui is None  # the file has no thumbnails


@pytest.mark.parametrize(
    "prefix",
    [
        *("../tokens", "a/../../tokens", "/tmp/tokens", "link/new", "C:\\a", "..\\..\\a", "a//b"),
        *("", "  ", ".", "a\x00b", "x:y", "CON", "faces/aux.txt", "tokens.", "tokens ", "x" * 300, "\u202ea"),
    ],
)
def test_prefix_that_is_not_a_portable_name_in_the_folder_is_refused(save, output, tmp_path, prefix) -> None:
    (tmp_path / "outside").mkdir()
    output.mkdir(exist_ok=True)
    (output / "link").symlink_to(tmp_path / "outside")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="filename_prefix is .*; wanted the start of a file's name in"):
        save(prefix)
    assert sorted(tmp_path.rglob("*")) == before


def test_files_are_never_overwritten(easy, folders, output, save, load) -> None:
    names = [save(), save(), save("faces/anna"), save("猫")]
    assert names[:2] == ["tokens_00001_.safetensors", "tokens_00002_.safetensors"]
    assert sorted(folders.token_files()) == sorted(names)
    assert all(equal(load(name), easy.tokens) for name in names)


@pytest.mark.parametrize("references", [torch.zeros(3, 64, 96, 3), golden.references()])
def test_thumbnails_are_shown_when_saved_and_when_loaded(easy, execute, output, references) -> None:
    saved = execute("EasyRefSaveTokens", tokens=easy.tokens, filename_prefix="a", references=references)
    loaded = execute("EasyRefLoadTokens", file=saved.ui["easyref_tokens"][0]["filename"])
    assert len(saved.ui["images"]) == len(loaded.ui.as_dict()["images"]) == 3


def test_file_in_the_input_folder_is_found(easy, folders, output, tmp_path, save, load) -> None:
    (tmp_path / "input" / "easyref").mkdir()
    (output / save()).rename(tmp_path / "input" / "easyref" / "theirs.safetensors")
    assert folders.token_files() == ["theirs.safetensors"]
    assert equal(load("theirs.safetensors"), easy.tokens)


def test_no_path_leads_out_of_the_folders(pack, folders, output, tmp_path, save) -> None:
    name, secret = save(), tmp_path / "secret.safetensors"
    (output / name).rename(secret)
    (output / "link.safetensors").symlink_to(secret)
    (output / "folder").symlink_to(tmp_path, target_is_directory=True)
    paths = ["../../secret.safetensors", str(secret), "link.safetensors", "folder/secret.safetensors"]
    for path in [*paths, "a/../../../secret.safetensors", "a\0b"]:
        with pytest.raises(FileNotFoundError, match="was not found"):
            folders.find_tokens(path)
        assert "was not found" in golden.node(pack, "EasyRefLoadTokens").validate_inputs(path)
    assert folders.token_files() == [folders.NO_TOKENS]
    message = r"no \.safetensors files\. Save tokens with Save Reference Tokens"
    with pytest.raises(FileNotFoundError, match=message):
        folders.find_tokens(folders.NO_TOKENS)


def test_file_of_something_else_is_refused(output, load) -> None:
    output.mkdir()
    save_file({"lora_up": torch.zeros(1)}, output / "lora.safetensors")
    message = "is not a file of reference tokens: it holds 1 tensors such as lora_up"
    with pytest.raises(ValueError, match=message):
        load("lora.safetensors")


def test_file_replaced_under_its_name_is_loaded_again(pack, output, save) -> None:
    node, name = golden.node(pack, "EasyRefLoadTokens"), save()
    before = node.fingerprint_inputs(name)
    assert node.fingerprint_inputs(name) == before
    os.utime(output / name, ns=(1, 1))
    assert node.fingerprint_inputs(name) != before


# Combinations


def sockets(*pairs: Any) -> dict[str, Any]:
    return {f"tokens{i}": pair for i, pair in enumerate(pairs)}


@pytest.fixture(scope="module")
def combine(execute) -> Callable[..., Any]:
    def combined(*pairs: Any, method: str = "concat", factor: float = 0.5, weights: str = "") -> Any:
        inputs = {"method": method, "factor": factor, "weights": weights}
        return execute("EasyRefCombineTokens", tokens=sockets(*pairs), **inputs).result[0]

    return combined


METHODS = ["concat", "average", "norm average", "add", "subtract", "interpolate"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_combines_both_branches(pack, easy, model, combine, method: str) -> None:
    assert list(golden.part(pack, "easyref_core.tokens.combine").METHODS) == METHODS
    assert combine(easy.tokens, method=method) is easy.tokens
    assert combine(easy.tokens, None, method=method) is easy.tokens
    both = combine(easy.tokens, easy.other_tokens(), method=method)
    assert both.conditional.shape == both.unconditional.shape
    assert not torch.equal(predict(easy.apply(model, tokens=both)), predict(easy.apply(model)))


def test_interpolate_returns_its_ends(easy, combine) -> None:
    other = easy.other_tokens()
    assert combine(easy.tokens, other, method="interpolate", factor=0.0) is easy.tokens
    assert combine(easy.tokens, other, method="interpolate", factor=1.0) is other


def test_group_joined_with_itself_is_that_group(easy, model, combine) -> None:
    twice = combine(easy.tokens, easy.tokens)
    assert golden.error(predict(easy.apply(model, tokens=twice)), predict(easy.apply(model))) <= 1e-5


def test_joined_tokens_are_saved_and_loaded(easy, output, combine, save, load) -> None:
    joined = combine(easy.tokens, easy.other_tokens())
    assert equal(load(save(tokens=joined)), joined)


def test_weights_as_text(pack) -> None:
    parse = golden.part(pack, "nodes.tokens.combine").parse_weights
    for text, count, weights in [("", 2, [1, 1]), (" 0.5 ", 2, [0.5, 1]), ("1,0.5 2", 3, [1, 0.5, 2])]:
        assert parse(text, count) == weights
    for text, message in [
        ("0,5", r"weights has '0,5', where a comma may be a decimal comma"),
        ("1, x", r"weights has 'x' where a number is wanted.* as in \"1, 0.5\""),
        ("1, 2, 3", r"3 weights \(1, 2, 3\) for 2 sets"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse(text, 2)


# Batches


@pytest.fixture
def batch(execute) -> Callable[..., Any]:
    return lambda *pairs: execute("EasyRefBatchTokens", tokens=sockets(*pairs)).result[0]


@pytest.fixture
def others(easy) -> list[Any]:
    """Other tokens with the golden unconditional branch, as tokens of other groups have it."""
    unconditional = easy.tokens.unconditional
    return [easy.pair(easy.other_tokens(seed).conditional, unconditional) for seed in (1, 2)]


def test_sockets_are_read_by_their_numbers(easy, execute) -> None:
    pairs = [easy.other_tokens(seed) for seed in range(11)]
    tokens = {f"tokens{i}": pairs[i] for i in (10, *range(10))}
    rows = execute("EasyRefBatchTokens", tokens=tokens).result[0]
    assert torch.equal(rows.conditional, torch.cat([pair.conditional for pair in pairs]))


def test_batch_has_a_row_for_each_group_and_one_for_the_black_image(easy, batch, others) -> None:
    rows = batch(easy.tokens, *others)
    expected = torch.cat([pair.conditional for pair in (easy.tokens, *others)])
    assert torch.equal(rows.conditional, expected)
    assert torch.equal(rows.unconditional, easy.tokens.unconditional)


def test_rows_of_both_branches_belong_together_in_a_batch_of_batches(easy, batch, others) -> None:
    other = easy.other_tokens(2)
    rows = batch(batch(easy.tokens, others[0]), other)
    assert len(rows.conditional) == len(rows.unconditional) == 3
    assert torch.equal(rows.unconditional[1:2], easy.tokens.unconditional)
    assert torch.equal(rows.unconditional[2:], other.unconditional)


def test_frames_fade_from_one_group_to_the_next(easy, execute, others) -> None:
    tokens = sockets(easy.tokens, others[0])
    rows = execute("EasyRefTokensOverFrames", tokens=tokens, frames=5, easing="linear").result[0]
    assert torch.equal(rows.conditional[:1], easy.tokens.conditional)
    assert torch.equal(rows.conditional[4:], others[0].conditional)
    half = (easy.tokens.conditional + others[0].conditional) / 2
    assert torch.allclose(torch.Tensor(rows.conditional[2:3]), half, atol=1e-6)
    assert torch.equal(rows.unconditional, easy.tokens.unconditional)


# The negative


@pytest.fixture(scope="module")
def contexts(easy) -> list[Any]:
    """Context states of the golden group, and of its first reference alone."""
    groups = (PROMPT, None), ("blurred", golden.references()[:1])
    return [golden.encode(easy.pack, easy.easyref, prompt, group) for prompt, group in groups]


@pytest.fixture(scope="module")
def aggregate(easy, execute) -> Callable[..., Any]:
    node = functools.partial(execute, "EasyRefAggregate")
    return lambda context, **inputs: node(context, **inputs).result[0]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"negative": "black image"},
        {"negative": "black image", "noise_seed": 7},
        {"negative": "noise", "noise_seed": 7, "noise_strength": 0.0},
    ],
)
def test_default_is_the_black_image(easy, contexts, aggregate, settings: dict[str, Any]) -> None:
    """test_golden_parity.py compares its tokens with the authors' numbers."""
    model, tokens = easy.easyref.model, aggregate(contexts[0], **settings)
    black = model.unconditional(golden.instruction(easy.pack), golden.SIZE)
    assert torch.equal(tokens.conditional, model.aggregate(contexts[0]))
    assert torch.equal(tokens.unconditional, black)


def test_noise_changes_only_the_unconditional_branch(contexts, aggregate) -> None:
    black = aggregate(contexts[0])
    first, again, other = (aggregate(contexts[0], negative="noise", noise_seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.conditional, black.conditional)
    assert torch.equal(first.unconditional, again.unconditional)
    assert not torch.equal(first.unconditional, black.unconditional)
    assert not torch.equal(first.unconditional, other.unconditional)


@pytest.mark.parametrize("settings", [{}, {"negative": "black image"}, {"negative": "group"}])
def test_connected_group_is_the_negative(contexts, aggregate, settings: dict[str, str]) -> None:
    tokens = aggregate(contexts[0], negative_context=contexts[1], **settings)
    assert torch.equal(tokens.conditional, aggregate(contexts[0]).conditional)
    assert torch.equal(tokens.unconditional, aggregate(contexts[1]).conditional)
    assert tokens.unconditional.provenance.prompt == "blurred"


def test_group_and_negative_that_contradict_are_refused(contexts, aggregate) -> None:
    message = r"connected, but negative is 'noise'.* Set negative to 'group', or disc"
    with pytest.raises(ValueError, match=message):
        aggregate(contexts[0], negative="noise", negative_context=contexts[1])
    with pytest.raises(ValueError, match="negative is 'group', but negative_context is not connected"):
        aggregate(contexts[0], negative="group")
