"""The nodes for reference tokens, in the host: files, combinations, batches, and the negative of the aggregation."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from safetensors.torch import save_file

from devkit.host import golden
from devkit.host.sampling import Easy, predict
from devkit.host.tiny_nodes.tiny_sdxl import load_tiny_sdxl

PROMPT = golden.SETTINGS["prompt"]


@pytest.fixture
def files(pack, tmp_path, monkeypatch) -> Any:
    """nodes.host.folders in a host whose output, input and temp folders are new."""
    for name in ("output", "input", "temp"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {})
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    files = golden.part(pack, "nodes.host.folders")
    files.register_folders()
    return files


@pytest.fixture
def output(files, tmp_path) -> Path:
    return tmp_path / "output" / "easyref"


def run(easy: Easy, name: str, **inputs: Any) -> Any:
    """What a node gives, run as the host runs it."""
    with torch.inference_mode():
        return golden.node(easy.pack, name).execute(**inputs)


def save(easy: Easy, prefix: str = "tokens", **inputs: Any) -> str:
    """Save the golden tokens; the name by which the loader knows them."""
    made = run(easy, "EasyRefSaveTokens", **{"tokens": easy.tokens, "filename_prefix": prefix, **inputs})
    (saved,) = made.ui["easyref_tokens"]
    return str(Path(saved["subfolder"], saved["filename"]).relative_to("easyref"))


def load(easy: Easy, file: str) -> Any:
    return run(easy, "EasyRefLoadTokens", file=file).result[0]


def equal(found: Any, wanted: Any) -> bool:
    return torch.equal(found.conditional, wanted.conditional) and torch.equal(
        found.unconditional, wanted.unconditional
    )


# Files


def test_saved_tokens_make_the_same_prediction_bit_for_bit(easy, output) -> None:
    loaded = load(easy, save(easy))
    assert equal(loaded, easy.tokens)
    assert loaded.conditional.provenance == easy.tokens.conditional.provenance
    wanted = predict(easy.apply(load_tiny_sdxl()))
    assert torch.equal(predict(easy.apply(load_tiny_sdxl(), tokens=loaded)), wanted)


@pytest.mark.parametrize(
    "prefix",
    [
        "link/new",
        "a\x00b",
        "x:y",
        "CON",
        "faces/aux.txt",
        "tokens.",
        "tokens ",
        "x" * 300,
        "C:\\a",
        "..\\..\\a",
        "a//b",
        "\u202ea",
    ],
)
def test_a_prefix_that_is_no_name_everywhere(easy, files, output, tmp_path, prefix: str) -> None:
    (tmp_path / "outside").mkdir()
    output.mkdir(exist_ok=True)
    (output / "link").symlink_to(tmp_path / "outside")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="filename_prefix is .*; wanted the start of a file's name"):
        save(easy, prefix)
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_is_overwritten(easy, files, output) -> None:
    names = [save(easy), save(easy), save(easy, "faces/anna"), save(easy, "猫")]
    assert names[:2] == ["tokens_00001_.safetensors", "tokens_00002_.safetensors"]
    assert sorted(files.token_files()) == sorted(names)
    assert all(equal(load(easy, name), easy.tokens) for name in names)


@pytest.mark.parametrize("prefix", ["../tokens", "a/../../tokens", "/tmp/tokens", "", "  ", "."])
def test_a_prefix_that_leads_out_of_the_folder_is_refused(easy, output, prefix: str) -> None:
    with pytest.raises(ValueError, match="filename_prefix is .*wanted the start of a file's name in"):
        save(easy, prefix)


def test_the_prompt_comes_back(easy, output) -> None:
    assert run(easy, "EasyRefLoadTokens", file=save(easy)).result[1] == PROMPT


@pytest.mark.parametrize("as_batch", [True, False])
def test_thumbnails_are_shown_when_saved_and_when_loaded(easy, output, as_batch: bool) -> None:
    group = golden.references()
    references = torch.zeros(3, 64, 96, 3) if as_batch else group
    made = run(easy, "EasyRefSaveTokens", tokens=easy.tokens, filename_prefix="a", references=references)
    shown = run(
        easy, "EasyRefLoadTokens", file=Path(made.ui["easyref_tokens"][0]["filename"]).name
    ).ui.as_dict()
    assert len(made.ui["images"]) == len(shown["images"]) == 3


def test_without_references_nothing_is_shown(easy, output) -> None:
    assert run(easy, "EasyRefLoadTokens", file=save(easy)).ui is None


def test_a_file_in_the_input_folder_is_found(easy, files, output, tmp_path) -> None:
    (tmp_path / "input" / "easyref").mkdir()
    (output / save(easy)).rename(tmp_path / "input" / "easyref" / "theirs.safetensors")
    assert files.token_files() == ["theirs.safetensors"]
    assert equal(load(easy, "theirs.safetensors"), easy.tokens)


def test_an_empty_folder_says_so(files, output) -> None:
    assert files.token_files() == [files.NO_TOKENS]
    with pytest.raises(
        FileNotFoundError, match=r"no \.safetensors files\. Save tokens with Save Reference Tokens"
    ):
        files.find_tokens(files.NO_TOKENS)


def test_no_path_leads_out_of_the_folders(easy, files, output, tmp_path) -> None:
    name = save(easy)
    secret = tmp_path / "secret.safetensors"
    (output / name).rename(secret)
    (output / "link.safetensors").symlink_to(secret)
    (output / "folder").symlink_to(tmp_path, target_is_directory=True)
    asked = ["../../secret.safetensors", str(secret), "link.safetensors", "folder/secret.safetensors"]
    for path in [*asked, "a/../../../secret.safetensors", "a\0b"]:
        with pytest.raises(FileNotFoundError, match="was not found"):
            files.find_tokens(path)
        assert "was not found" in golden.node(easy.pack, "EasyRefLoadTokens").validate_inputs(path)
    assert files.token_files() == [files.NO_TOKENS]


def test_a_file_of_something_else_is_refused(easy, output) -> None:
    output.mkdir()
    save_file({"lora_up": torch.zeros(1)}, output / "lora.safetensors")
    with pytest.raises(
        ValueError, match=r"is not a file of reference tokens: it holds 1 tensors such as lora_up"
    ):
        load(easy, "lora.safetensors")


def test_a_file_replaced_under_its_name_is_read_again(easy, output) -> None:
    node = golden.node(easy.pack, "EasyRefLoadTokens")
    name = save(easy)
    before = node.fingerprint_inputs(name)
    assert node.fingerprint_inputs(name) == before
    os.utime(output / name, ns=(1, 1))
    assert node.fingerprint_inputs(name) != before


# Combinations


def combined(easy: Easy, *pairs: Any, method: str = "concat", factor: float = 0.5, weights: str = "") -> Any:
    tokens = {f"tokens{i}": pair for i, pair in enumerate(pairs)}
    made = run(easy, "EasyRefCombineTokens", tokens=tokens, method=method, factor=factor, weights=weights)
    return made.result[0]


def methods(pack: Any) -> list[str]:
    return list(golden.part(pack, "easyref_core.tokens.combine").METHODS)


def test_one_set_passes_through(easy) -> None:
    for method in methods(easy.pack):
        assert combined(easy, easy.tokens, method=method) is easy.tokens
        assert combined(easy, easy.tokens, None, method=method) is easy.tokens


def test_interpolate_at_its_ends_passes_through(easy) -> None:
    other = easy.other_tokens()
    assert combined(easy, easy.tokens, other, method="interpolate", factor=0.0) is easy.tokens
    assert combined(easy, easy.tokens, other, method="interpolate", factor=1.0) is other


def test_every_method_runs_and_both_sides_are_combined(easy) -> None:
    other, wanted = easy.other_tokens(), predict(easy.apply(load_tiny_sdxl()))
    for method in methods(easy.pack):
        made = combined(easy, easy.tokens, other, method=method)
        assert made.conditional.shape == made.unconditional.shape
        assert not torch.equal(predict(easy.apply(load_tiny_sdxl(), tokens=made)), wanted)


def test_a_group_joined_with_itself_is_that_group(easy) -> None:
    twice = combined(easy, easy.tokens, easy.tokens)
    found, wanted = (predict(easy.apply(load_tiny_sdxl(), tokens=t)) for t in (twice, easy.tokens))
    assert golden.error(found, wanted) <= 1e-5


def test_joined_tokens_are_saved_and_loaded(easy, output) -> None:
    joined = combined(easy, easy.tokens, easy.other_tokens())
    assert equal(load(easy, save(easy, tokens=joined)), joined)


def test_sockets_are_read_by_their_numbers(easy) -> None:
    pairs = [easy.other_tokens(seed) for seed in range(11)]
    tokens = {f"tokens{i}": pairs[i] for i in (10, *range(10))}
    made = run(easy, "EasyRefBatchTokens", tokens=tokens).result[0]
    assert torch.equal(made.conditional, torch.cat([pair.conditional for pair in pairs]))


def test_weights_as_text(easy) -> None:
    parse = golden.part(easy.pack, "nodes.tokens.combine").parse_weights
    assert parse("", 2) == [1, 1]
    assert parse(" 0.5 ", 2) == [0.5, 1]
    assert parse("1,0.5 2", 3) == [1, 0.5, 2]
    assert parse("1; 2", 2) == [1, 2]
    with pytest.raises(ValueError, match=r"weights has '0,5', where a comma may be a decimal comma"):
        parse("0,5", 2)
    with pytest.raises(ValueError, match=r"weights has 'x' where a number is wanted.* as in \"1, 0.5\""):
        parse("1, x", 2)
    with pytest.raises(ValueError, match=r"3 weights \(1, 2, 3\) for 2 sets"):
        parse("1, 2, 3", 2)


# Batches


def same_negative(easy: Easy, seed: int) -> Any:
    """Other tokens with the golden unconditional side, as other groups have it."""
    return type(easy.tokens)(easy.other_tokens(seed).conditional, easy.tokens.unconditional)


def test_a_batch_has_a_row_for_each_group_and_one_for_the_black_image(easy) -> None:
    pairs = [easy.tokens, same_negative(easy, 1), same_negative(easy, 2)]
    made = run(
        easy, "EasyRefBatchTokens", tokens={f"tokens{i}": pair for i, pair in enumerate(pairs)}
    ).result[0]
    assert torch.equal(made.conditional, torch.cat([pair.conditional for pair in pairs]))
    assert torch.equal(made.unconditional, easy.tokens.unconditional)


def test_rows_of_both_sides_belong_together_in_a_batch_of_batches(easy) -> None:
    first = run(
        easy, "EasyRefBatchTokens", tokens={"tokens0": easy.tokens, "tokens1": same_negative(easy, 1)}
    ).result[0]
    other = easy.other_tokens(2)
    made = run(easy, "EasyRefBatchTokens", tokens={"tokens0": first, "tokens1": other}).result[0]
    assert len(made.conditional) == len(made.unconditional) == 3
    assert torch.equal(made.unconditional[1:2], easy.tokens.unconditional)
    assert torch.equal(made.unconditional[2:], other.unconditional)


def test_frames_fade_from_one_group_to_the_next(easy) -> None:
    other = same_negative(easy, 1)
    tokens = {"tokens0": easy.tokens, "tokens1": other}
    made = run(easy, "EasyRefTokensOverFrames", tokens=tokens, frames=5, easing="linear").result[0]
    assert torch.equal(made.conditional[:1], easy.tokens.conditional)
    assert torch.equal(made.conditional[4:], other.conditional)
    half = (easy.tokens.conditional + other.conditional) / 2
    assert torch.allclose(torch.Tensor(made.conditional[2:3]), half, atol=1e-6)
    assert torch.equal(made.unconditional, easy.tokens.unconditional)


# The negative


@pytest.fixture(scope="module")
def contexts(easy) -> list[Any]:
    """The golden group's context, and that of its first reference alone."""
    images, text = [image[0] for image in golden.references()], golden.instruction(easy.pack)
    with torch.inference_mode():
        return [
            easy.easyref.encode(images[:count], prompt, text, golden.SIZE)
            for count, prompt in ((len(images), PROMPT), (1, "blurred"))
        ]


def aggregated(easy: Easy, context: Any, **inputs: Any) -> Any:
    return run(easy, "EasyRefAggregate", easyref=easy.easyref, context=context, **inputs).result[0]


def test_the_default_is_the_black_image(easy, contexts) -> None:
    """Which test_golden_parity.py compares with the authors' numbers."""
    model = easy.easyref.model
    for settings in ({}, {"negative": "black image"}, {"negative": "black image", "noise_seed": 7}):
        made = aggregated(easy, contexts[0], **settings)
        assert torch.equal(made.conditional, model.aggregate(contexts[0]))
        assert torch.equal(
            made.unconditional, model.unconditional(golden.instruction(easy.pack), golden.SIZE)
        )


def test_noise_of_strength_0_is_the_black_image(easy, contexts) -> None:
    made = aggregated(easy, contexts[0], negative="noise", noise_seed=7, noise_strength=0.0)
    assert equal(made, aggregated(easy, contexts[0]))


def test_noise_changes_the_unconditional_side_alone(easy, contexts) -> None:
    black = aggregated(easy, contexts[0])
    first, again, other = (
        aggregated(easy, contexts[0], negative="noise", noise_seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first.conditional, black.conditional)
    assert torch.equal(first.unconditional, again.unconditional)
    assert not torch.equal(first.unconditional, black.unconditional)
    assert not torch.equal(first.unconditional, other.unconditional)


@pytest.mark.parametrize("chosen", [{}, {"negative": "black image"}, {"negative": "group"}])
def test_a_connected_group_is_the_negative(easy, contexts, chosen: dict[str, str]) -> None:
    made = aggregated(easy, contexts[0], negative_context=contexts[1], **chosen)
    assert torch.equal(made.conditional, aggregated(easy, contexts[0]).conditional)
    assert torch.equal(made.unconditional, aggregated(easy, contexts[1]).conditional)
    assert made.unconditional.provenance.prompt == "blurred"


def test_a_group_beside_noise_is_refused(easy, contexts) -> None:
    with pytest.raises(
        ValueError, match=r"connected, but negative is 'noise'.* Set negative to 'group', or disc"
    ):
        aggregated(easy, contexts[0], negative="noise", negative_context=contexts[1])


def test_a_group_that_is_not_there_is_refused(easy, contexts) -> None:
    with pytest.raises(ValueError, match="negative is 'group', but negative_context is not connected"):
        aggregated(easy, contexts[0], negative="group")
