"""Files of a base model: a diffusers folder, also of a variant such as fp16, or a single-file checkpoint."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..files.tensor_files import open_tensors

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

log = logging.getLogger(__name__)

MODELS = ("unet", "vae", "text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")

# Tensors without values that mark a single file's objective, and what they stand for in a diffusers schedule.
MARKS: dict[str, dict[str, Any]] = {
    "v_pred": {"prediction_type": "v_prediction"},
    "ztsnr": {"rescale_betas_zero_snr": True},
}
UNKNOWN_MARKS = ("edm_mean", "edm_vpred.sigma_max")

# Tensors of a single file begin with these: UNet, VAE and both text encoders.
TENSOR_PREFIXES = (
    "model.diffusion_model.",
    "first_stage_model.",
    "conditioner.embedders.0.transformer.",
    "conditioner.embedders.1.model.",
)

CONFIG_REMEDY = (
    "Set it to a diffusers folder of SDXL; its configurations and tokenizers, 4 MB, are enough: hf download "
    "stabilityai/stable-diffusion-xl-base-1.0 --include '*.json' '*.txt' --local-dir sdxl-config"
)


def load_parts(base: Path, config: Path | None, dtype: torch.dtype) -> dict[str, Any]:
    """The MODELS, TOKENIZERS and "schedule" of a base, on the CPU; the VAE in float32, the others in `dtype`.

    config: diffusers folder with the configurations and tokenizers of a base that is a single file.
    Raises FileNotFoundError or ValueError for files that are not an SDXL model.
    """
    if not base.exists():
        raise FileNotFoundError(f"base is {base}, which does not exist. Set base to an SDXL model.")
    if base.is_dir():
        _require_diffusers(base, "base", "Set base to one, such as stabilityai/stable-diffusion-xl-base-1.0.")
        parts = {name: _from_folder(base, name, dtype) for name in MODELS}
        config, marks = base, {}
    else:
        if config is None:
            raise ValueError(f"base is the single file {base}, but base_config is not set. {CONFIG_REMEDY}")
        _require_diffusers(config, "base_config", CONFIG_REMEDY)
        marks = check_single_file(base)
        parts = _from_single_file(base, config, dtype)
    tokenizers = {name: _local(_tokenizer_class(), config, name) for name in TOKENIZERS}
    return {**parts, **tokenizers, "schedule": load_schedule(config, marks)}


def _require_diffusers(folder: Path, setting: str, remedy: str) -> None:
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{setting} is {folder}, which has no model_index.json, so it is not a diffusers SDXL folder. "
            f"Expected one with unet/, vae/, {', '.join(f'{name}/' for name in (*MODELS[2:], *TOKENIZERS))} "
            f"and scheduler/. {remedy}"
        )


def load_schedule(config: Path, marks: dict[str, Any]) -> DDPMScheduler:
    """The noise schedule of a folder's scheduler/, changed by the marks of a single file."""
    from diffusers import DDPMScheduler

    schedule = _local(DDPMScheduler, config, "scheduler")
    return DDPMScheduler.from_config(schedule.config, **marks) if marks else schedule


def check_single_file(file: Path) -> dict[str, Any]:
    """Options of the noise schedule by the marks in a single file, such as NoobAI's v-prediction models have.

    Raises ValueError for a file that is not a whole SDXL model, or has the marks of another objective.
    """
    names = open_tensors(file).shapes.keys()
    if missing := [
        prefix for prefix in TENSOR_PREFIXES if not any(name.startswith(prefix) for name in names)
    ]:
        raise ValueError(
            f"{file} has no tensors {', '.join(f'{prefix}*' for prefix in missing)}, so it is not a whole "
            "SDXL model, expected UNet, VAE and both text encoders in the original names. Set base to one."
        )
    if unknown := [name for name in UNKNOWN_MARKS if name in names]:
        raise ValueError(
            f"{file} has {unknown[0]}, so it is trained with EDM's objective, expected epsilon or "
            "v-prediction. Set base to another model."
        )
    marks = {key: value for mark, options in MARKS.items() if mark in names for key, value in options.items()}
    if marks:
        log.info("%s is marked %s.", file, ", ".join(f"{key} {value}" for key, value in marks.items()))
    return marks


def variant_of(folder: Path) -> str | None:
    """Variant of a folder's weights, such as "fp16"; None if some have none, or without weights."""
    weights = (path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    pattern = r"[^.]+?(?:-\d+-of-\d+)?(?:\.(\w+?))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
    variants = {match[1] for name in weights if (match := re.fullmatch(pattern, name))}
    return None if None in variants else min(variants, default=None)


def _from_folder(folder: Path, name: str, dtype: torch.dtype) -> torch.nn.Module:
    options = {"torch_dtype": torch.float32 if name == "vae" else dtype}
    if variant := variant_of(folder / name):
        options["variant"] = variant
    return _local(_model_classes()[name], folder, name, **options)


def _from_single_file(file: Path, config: Path, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline

    # local_files_only, because diffusers would look for the configurations on the hub
    options = {"config": str(config), "local_files_only": True}
    vae = AutoencoderKL.from_single_file(str(file), subfolder="vae", torch_dtype=torch.float32, **options)
    pipeline = StableDiffusionXLPipeline.from_single_file(
        str(file),
        vae=vae,
        torch_dtype=dtype,
        scheduler=load_schedule(config, {}),
        **{name: _local(_tokenizer_class(), config, name) for name in TOKENIZERS},
        **options,
    )
    return {name: getattr(pipeline, name) for name in MODELS}


def _local(kind: type, folder: Path, name: str, **options: Any) -> Any:
    return kind.from_pretrained(str(folder), subfolder=name, local_files_only=True, **options)


def _model_classes() -> dict[str, type]:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    classes = (UNet2DConditionModel, AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection)
    return dict(zip(MODELS, classes, strict=True))


def _tokenizer_class() -> type:
    """The class that finds the tokenizer's own in its configuration.

    CLIPTokenizer would split the tiny model's words into bytes and unknowns.
    """
    from transformers import AutoTokenizer

    return AutoTokenizer
