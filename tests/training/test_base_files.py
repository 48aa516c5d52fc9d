"""Bases as people have them: single files, with the marks of v-prediction, and folders of fp16 weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from easyref_core.training.base_files import check_single_file, variant_of
from easyref_core.training.base_model import BaseModel
from easyref_core.training.sampling import generate_images

from . import tiny
from .single_file import write_single_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose text encoders have different widths, by which diffusers tells them apart."""
    return tiny.make_base(tmp_path_factory.mktemp("base") / "base", widths=(8, 24))


@pytest.fixture(scope="module")
def config(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configurations and tokenizers of the base, without weights."""
    target = tmp_path_factory.mktemp("config") / "config"
    return Path(shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors")))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def weights(base: BaseModel) -> dict[str, torch.Tensor]:
    models = {name: getattr(base, name).state_dict() for name in BaseModel.MODELS}
    return {f"{name}.{key}": tensor for name, state in models.items() for key, tensor in state.items()}


def test_single_file_is_the_folder(folder: Path, config: Path, tmp_path: Path) -> None:
    file = write_single_file(folder, tmp_path / "base.safetensors")
    expected, actual = BaseModel.load(folder), BaseModel.load(file, config=config)
    one, other = weights(expected), weights(actual)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert actual.schedule.config == expected.schedule.config
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = [generate_images(base, noise, ["abc"], steps=2)[0].tobytes() for base in (expected, actual)]
    assert images[0] == images[1]
    assert not any(parameter.requires_grad for parameter in actual.unet.parameters())


def test_single_file_in_bfloat16_has_a_float32_vae(folder: Path, config: Path, tmp_path: Path) -> None:
    file = write_single_file(folder, tmp_path / "base.safetensors")
    base = BaseModel.load(file, dtype=torch.bfloat16, config=config)
    dtypes = {name: {p.dtype for p in getattr(base, name).parameters()} for name in BaseModel.MODELS}
    assert dtypes == {
        "unet": {torch.bfloat16},
        "vae": {torch.float32},
        "text_encoder": {torch.bfloat16},
        "text_encoder_2": {torch.bfloat16},
    }


@pytest.mark.parametrize(
    ("marks", "kind", "zero_snr"),
    [
        ((), "epsilon", False),
        (("v_pred",), "v_prediction", False),
        (("v_pred", "ztsnr"), "v_prediction", True),
    ],
)
def test_marks_decide_the_objective(
    folder: Path, config: Path, tmp_path: Path, marks: tuple[str, ...], kind: str, zero_snr: bool
) -> None:
    """As in NoobAI's files, whose tensors v_pred and ztsnr are empty."""
    file = write_single_file(folder, tmp_path / "base.safetensors", marks)
    schedule = BaseModel.load(file, config=config).schedule
    assert schedule.config.prediction_type == kind
    assert bool(schedule.config.rescale_betas_zero_snr) == zero_snr
    assert (schedule.alphas_cumprod[-1].item() < 1e-6) == zero_snr


def test_edm_is_refused(folder: Path, tmp_path: Path) -> None:
    file = write_single_file(folder, tmp_path / "base.safetensors", ("edm_mean",))
    with pytest.raises(ValueError, match="has edm_mean, so it is trained with EDM's objective, expected"):
        check_single_file(file)


def test_file_without_a_vae_is_refused(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(write_single_file(folder, tmp_path / "base.safetensors"))
    file = tmp_path / "part.safetensors"
    save_file({name: t for name, t in tensors.items() if not name.startswith("first_stage_model.")}, file)
    with pytest.raises(
        ValueError, match=r"has no tensors first_stage_model.\*, so it is not a whole SDXL model"
    ):
        check_single_file(file)


def test_single_file_needs_its_configurations(folder: Path, tmp_path: Path) -> None:
    file = write_single_file(folder, tmp_path / "base.safetensors")
    with pytest.raises(ValueError, match="single file .* but base_config is not set. Set it to a diffusers"):
        BaseModel.load(file)
    with pytest.raises(FileNotFoundError, match=r"base_config is .* which has no model_index.json"):
        BaseModel.load(file, config=tmp_path)
    with pytest.raises(FileNotFoundError, match="base is .*none, which does not exist"):
        BaseModel.load(tmp_path / "none")


def test_folder_of_a_variant_is_loaded(folder: Path, tmp_path: Path) -> None:
    half = Path(shutil.copytree(folder, tmp_path / "half"))
    for name in BaseModel.MODELS:
        [file] = (half / name).glob("*.safetensors")
        file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))
    one, other = weights(BaseModel.load(folder)), weights(BaseModel.load(half))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["model.safetensors"], None),
        (["model.fp16.safetensors"], "fp16"),
        (["model.fp16.safetensors", "model.safetensors"], None),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], None),
        (["diffusion_pytorch_model.fp16-00001-of-00002.safetensors"], "fp16"),
        (["diffusion_pytorch_model-00001-of-00002.fp16.safetensors"], "fp16"),
        (["config.json"], None),
    ],
)
def test_variant_of_weight_files(tmp_path: Path, files: list[str], expected: str | None) -> None:
    for name in files:
        (tmp_path / name).touch()
    assert variant_of(tmp_path) == expected
