"""Every stage of the core matches the authors' code, for every format of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
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


def input_ids(model: er.EasyRef, case: str) -> torch.Tensor:
    counts = preprocessed(model, case)[1].prod(dim=1) // model.config.merge_size**2
    return tokenize(model.tokenizer, er.INSTRUCTION + CASES[case]()[1], counts.tolist())


def encoded(model: er.EasyRef, case: str) -> er.ContextStates:
    images, prompt = CASES[case]()
    return model.encode(images, prompt, size=golden.SIZE)


STAGES: dict[str, Callable[[er.EasyRef, str], torch.Tensor]] = {
    "pixel_values": lambda model, case: preprocessed(model, case)[0],
    "image_grid_thw": lambda model, case: preprocessed(model, case)[1],
    "input_ids": input_ids,
    "vision_features": lambda model, case: model.mllm.encoder.visual(*preprocessed(model, case)),
    "group_hidden_states": lambda model, case: encoded(model, case).states,
    "reference_hidden_states": lambda model, case: model.mllm.aggregator.gather(encoded(model, case).states),
    "reference_embeds": lambda model, case: model.aggregate(encoded(model, case)),
}


@torch.inference_mode()
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stage", STAGES)
def test_stage(loaded: er.EasyRef, expected: Tensors, stage: str, case: str) -> None:
    found, wanted = STAGES[stage](loaded, case), expected[f"{case}.{stage}"]
    assert error(found, wanted) <= EXACT if wanted.is_floating_point() else torch.equal(found, wanted)


@pytest.mark.parametrize("case", CASES)
def test_tensors_and_pil_images_give_the_same_patches(model: er.EasyRef, case: str) -> None:
    images, _ = CASES[case]()
    from_tensors, _ = preprocess([golden.as_tensor(image) for image in images], model.config, golden.SIZE)
    assert torch.equal(from_tensors, preprocessed(model, case)[0])


def test_key_values_do_not_need_inference_mode(model: er.EasyRef, tokens: er.ReferenceTokens) -> None:
    assert tokens.is_inference()
    assert len(model.key_values(tokens)) == len(model.checkpoint.sites)
