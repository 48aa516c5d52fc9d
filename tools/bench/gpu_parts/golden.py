"""The golden data, results of the authors' code, computed on the device in float32 and in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import torch
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity

import easyref_core as er
from devkit import golden
from tools.bench.gpu_parts.options import GpuOptions
from tools.bench.report import Limit, Row
from tools.bench.timing import Say

MIN_COSINE = Limit(">=", 0.999)
DTYPES = (torch.float32, torch.bfloat16)
WEIGHT = 1.0  # of the references in the UNet's prediction


def measure(options: GpuOptions, say: Say) -> Iterator[Row]:
    """Cosines of the reference tokens of each case, and of the UNet's predictions."""
    expected = load_file(golden.GOLDEN / "expected.safetensors")
    for dtype in DTYPES:
        say(f"  golden data in {dtype}")
        model = er.load(golden.CHECKPOINT, golden.MLLM, options.device, dtype)
        tokens = {}
        for case, make in golden.CASES.items():
            images, prompt = make()
            tokens[case] = model.aggregate(model.encode(images, prompt, size=golden.SIZE))
            name = f"golden data, reference tokens of {case!r}, {dtype}; cosine to the authors'"
            yield cosine_row(name, tokens[case], expected[f"{case}.reference_embeds"])
        if find_spec("diffusers") is None:
            say("  diffusers is not installed: the UNet's prediction is left out")
            continue
        name = f"golden data, prediction of the UNet, {dtype}; cosine to the authors'"
        found = prediction(model, tokens, expected, dtype)
        yield cosine_row(name, found, expected[f"unet.noise_pred.scale_{WEIGHT}"])


def prediction(
    model: er.EasyRef, tokens: dict[str, er.ReferenceTokens], expected: golden.Tensors, dtype: torch.dtype
) -> torch.Tensor:
    """The golden UNet's prediction on the model's device, with the golden group as references."""
    unet = golden.load_unet()
    torch.nn.Module.to(unet, model.device, dtype)  # diffusers' own `to` warns of float32 layers
    er.diffusers_unet.apply(unet, model, tokens["cond"], tokens["uncond"], weight=WEIGHT)
    on_device = {
        name: tensor.to(model.device, None if name == "unet.timestep" else dtype)
        for name, tensor in expected.items()
        if name.startswith("unet.")
    }
    return golden.predict(unet, on_device)


def cosine_row(name: str, found: torch.Tensor, wanted: torch.Tensor) -> Row:
    return Row(name, cosine(found, wanted), "cosine", wanted=MIN_COSINE)


def cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    """Cosine of two tensors as vectors, in float64."""
    vectors = (torch.Tensor(tensor.detach().cpu()).double().flatten() for tensor in (first, second))
    return float(cosine_similarity(*vectors, dim=0))
