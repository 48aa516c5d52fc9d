"""Every stage of the core gives what the authors' code gave, from every format a checkpoint comes in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import easyref_core as er
from devkit import golden
from devkit.golden import CASES, EXACT, Tensors, error
from easyref_core.mllm.instructions import tokenize
from easyref_core.mllm.preprocess import preprocess


@pytest.fixture(scope="module", params=["safetensors", "deepspeed", "saved"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> er.EasyRef:
    """The golden model from the released format, from DeepSpeed's and from our own."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    if request.param == "deepspeed":
        path = golden.write_deepspeed(folder / "mp_rank_00_model_states.pt", golden.checkpoint_tensors())
        return er.load(path, golden.MLLM)
    if request.param == "saved":
        path = folder / "saved.safetensors"
        er.load(golden.CHECKPOINT, golden.MLLM).save(path)
        return er.load(path, tokenizer=golden.MLLM)  # no config.json: the sizes come from the file's metadata
    return er.load(golden.CHECKPOINT, golden.MLLM)


def preprocessed(model: er.EasyRef, case: str) -> tuple[torch.Tensor, torch.Tensor]:
    return preprocess(CASES[case]()[0], model.config, golden.SIZE)


def encoded(model: er.EasyRef, case: str) -> er.ContextStates:
    images, prompt = CASES[case]()
    return model.encode(images, prompt, size=golden.SIZE)


@pytest.mark.parametrize("case", CASES)
def test_pixel_values(loaded: er.EasyRef, expected: Tensors, case: str) -> None:
    patches, _ = preprocessed(loaded, case)
    assert error(patches, expected[f"{case}.pixel_values"]) <= EXACT


@pytest.mark.parametrize("case", CASES)
def test_grid_is_equal(loaded: er.EasyRef, expected: Tensors, case: str) -> None:
    _, grid = preprocessed(loaded, case)
    assert torch.equal(grid, expected[f"{case}.image_grid_thw"])


@pytest.mark.parametrize("case", CASES)
def test_input_ids_are_equal(loaded: er.EasyRef, expected: Tensors, case: str) -> None:
    counts = expected[f"{case}.image_grid_thw"].prod(dim=1) // loaded.config.merge_size**2
    ids = tokenize(loaded.tokenizer, er.INSTRUCTION + CASES[case]()[1], counts.tolist())
    assert torch.equal(ids, expected[f"{case}.input_ids"])


@torch.inference_mode()
@pytest.mark.parametrize("case", CASES)
def test_vision_features(loaded: er.EasyRef, expected: Tensors, case: str) -> None:
    features = loaded.mllm.encoder.visual(
        expected[f"{case}.pixel_values"], expected[f"{case}.image_grid_thw"]
    )
    assert error(features, expected[f"{case}.vision_features"]) <= EXACT


@pytest.mark.parametrize("case", CASES)
def test_group_hidden_states(loaded: er.EasyRef, expected: Tensors, case: str) -> None:
    assert error(encoded(loaded, case).states, expected[f"{case}.group_hidden_states"]) <= EXACT


@torch.inference_mode()
@pytest.mark.parametrize("case", CASES)
def test_reference_hidden_states(loaded: er.EasyRef, expected: Tensors, case: str) -> None:
    hidden = loaded.mllm.aggregator.gather(encoded(loaded, case).states)
    assert error(hidden, expected[f"{case}.reference_hidden_states"]) <= EXACT


@pytest.mark.parametrize("case", CASES)
def test_reference_embeds(loaded: er.EasyRef, expected: Tensors, case: str) -> None:
    tokens = loaded.aggregate(encoded(loaded, case))
    assert error(tokens, expected[f"{case}.reference_embeds"]) <= EXACT


@pytest.mark.parametrize("case", CASES)
def test_tensors_and_pil_images_give_the_same_patches(model: er.EasyRef, case: str) -> None:
    images, _ = CASES[case]()
    from_tensors, _ = preprocess([golden.as_tensor(image) for image in images], model.config, golden.SIZE)
    assert torch.equal(from_tensors, preprocessed(model, case)[0])


def test_keys_and_values_need_no_inference_mode(model: er.EasyRef, tokens: er.ReferenceTokens) -> None:
    assert tokens.is_inference()
    assert len(model.key_values(tokens)) == len(model.checkpoint.sites)
