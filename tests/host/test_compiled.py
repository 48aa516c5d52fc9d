"""torch.compile around a conditioned UNet: the image of the eager UNet, from prompt to prompt in one
process.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import comfy.ldm.modules.attention
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.torch_helpers import set_torch_compile_wrapper
from torch._dynamo.utils import counters

from devkit.host import golden
from devkit.host.sampling import cfg_guider, sample
from devkit.host.tiny_nodes.tiny_sdxl import random_conditioning

from .test_apply_settings import batched_tokens
from .test_unet_patch import ANYWHERE, add_as_other_packs_do

WHOLE = ("diffusion_model",)
BLOCKS = tuple(  # modules of ComfyUI's UNet that it can run compiled one by one
    f"diffusion_model.{block}.1.transformer_blocks.0"
    for block in ("input_blocks.4", "output_blocks.3", "output_blocks.4")
)
LEFT = torch.cat([torch.ones(1, 8, 4), torch.zeros(1, 8, 4)], dim=2)


def without_transformer_options(guards: Sequence[Any]) -> list[bool]:
    """The guards that ComfyUI's compile node keeps (comfy_extras/nodes_torch_compile.py)."""
    return ["transformer_options" not in guard.name for guard in guards]


def compiled(model: ModelPatcher, backend: str = "eager", keys: Sequence[str] = WHOLE) -> ModelPatcher:
    """As ComfyUI's TorchCompileModel makes it; keys: the modules to compile."""
    clone = model.clone()
    options = {"guard_filter_fn": without_transformer_options}
    set_torch_compile_wrapper(model=clone, backend=backend, options=options, keys=list(keys))
    return clone


@pytest.fixture(autouse=True)
def attention(pack, monkeypatch) -> Iterator[None]:
    """The attention of torch alone: what the host chooses for a CPU reads the free memory and breaks the
    graph.
    """
    plain = comfy.ldm.modules.attention.attention_pytorch
    for module in (comfy.ldm.modules.attention, golden.part(pack, "nodes.unet_patch.site_patch")):
        monkeypatch.setattr(module, "optimized_attention", plain)
    # what torch would write into a trace of its own is slow to make, and the log of the tests asks for it
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def sampled(model: ModelPatcher, **how: Any) -> torch.Tensor:
    guider = cfg_guider(model, random_conditioning(1, 77), random_conditioning(2, 77))
    return sample(guider, steps=how.pop("steps", 2), **how)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def require_equal(models: Sequence[ModelPatcher], backend: str = "eager", **how: Any) -> list[int]:
    """Each model compiled samples what it samples eagerly, in this order in one process; -> graphs compiled
    for each.
    """
    made = []
    for model in models:
        before, wanted = graphs(), sampled(model, **how)
        assert golden.error(sampled(compiled(model, backend), **how), wanted) <= 1e-5
        made.append(graphs() - before)
    return made


def test_values_change_from_prompt_to_prompt_in_one_graph(easy, model) -> None:
    """Weight, window, schedule, scaling, factors of layers, tokens: fifteen prompts, and no recompile
    limit.
    """
    settings: list[dict[str, Any]] = [
        *({"weight": weight} for weight in (1.0, 0.3, -0.5)),
        *({"start": 0.4}, {"end": 0.4}, {"start": 0.3, "end": 0.6}),
        *({"weight_schedule": points} for points in ("1, 0.5, 0", "0.2:0, 0.8:1")),
        *({"weight": 0.5, "embeds_scaling": scaling} for scaling in ("K+V", "K+mean(V) w/ C penalty")),
        *({"weight_type": kind} for kind in ("ease in", "weak middle", "linear")),
        *({"tokens": easy.other_tokens(seed)} for seed in (1, 2)),
    ]
    made = require_equal([easy.apply(model, **setting) for setting in settings])
    assert made == [1] + [0] * (len(settings) - 1)


@pytest.mark.one_host
def test_what_is_there_changes_from_prompt_to_prompt(easy, model) -> None:
    """References, a mask, layers, a second node: a graph for each, which is used for that alone."""
    applied = easy.apply(model, lora=0.0)
    models = [
        model,
        applied,
        easy.apply(model, 0.5, end=0.5, mask=LEFT),
        easy.apply(model, weight_type="style transfer precise"),
        easy.apply(applied, 0.5, start=0.5, tokens=easy.other_tokens()),
    ]
    assert require_equal(models) == [1] * len(models)
    again = [
        applied,
        model,
        easy.apply(model, 0.0, lora=0.0),
        easy.apply(model, mask=1 - LEFT),
        easy.apply(easy.apply(model, 0.2, start=0.6), tokens=easy.other_tokens(1)),
    ]
    assert require_equal(again) == [0] * len(again)


@pytest.mark.one_host
def test_values_under_aot_autograd(easy, model) -> None:
    models = [easy.apply(model, 0.7, start=0.3, mask=LEFT), easy.apply(model, 0.2, end=0.5, mask=1 - LEFT)]
    assert require_equal(models, "aot_eager") == [1, 0]


@pytest.mark.one_host
def test_rows_of_tokens_in_separate_calls_of_the_sides(easy, model, monkeypatch) -> None:
    batch, _ = batched_tokens(easy, 2)
    monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda *_: 0)
    made = require_equal([easy.apply(model, tokens=batch), easy.apply(model, 0.5, tokens=batch)], batch=2)
    assert made[1] == 0


@pytest.mark.one_host
def test_compile_before_apply(easy, model) -> None:
    before, wanted = graphs(), sampled(easy.apply(model, 0.5, end=0.5))
    found = sampled(easy.apply(compiled(model), 0.5, end=0.5))
    assert golden.error(found, wanted) <= 1e-5
    assert graphs() > before


# What is run without torch.compile


def unlike_compiled(model: ModelPatcher, caplog, **how: Any) -> str:
    """What the log says of a model that samples the eager image although it is compiled."""
    wanted = sampled(model)
    assert golden.error(sampled(compiled(model, **how)), wanted) <= 1e-5
    return caplog.text


@pytest.fixture
def caplog(caplog, pack, monkeypatch):
    monkeypatch.setattr(golden.part(pack, "nodes.host.log"), "_given", set())
    return caplog


def test_blocks_compiled_one_by_one(easy, model, caplog) -> None:
    """Without guards on transformer_options, blocks of one shape share a graph, with the address of the
    first.
    """
    assert "blocks are compiled one by one" in unlike_compiled(easy.apply(model), caplog, keys=BLOCKS)
    sampled(compiled(model, keys=BLOCKS))
    assert (
        golden.error(sampled(compiled(easy.apply(model, 0.5), keys=BLOCKS)), sampled(easy.apply(model, 0.5)))
        <= 1e-5
    )


@pytest.mark.one_host
def test_unet_of_several_graphs(easy, model, caplog, pack, monkeypatch) -> None:
    """As with the attention that the host chooses for a CPU, which reads the free memory."""
    plain_attention = comfy.ldm.modules.attention.attention_pytorch

    def breaking(*args: Any, **kwargs: Any) -> torch.Tensor:
        torch._dynamo.graph_break()
        return plain_attention(*args, **kwargs)

    for module in (comfy.ldm.modules.attention, golden.part(pack, "nodes.unet_patch.site_patch")):
        monkeypatch.setattr(module, "optimized_attention", breaking)
    assert "several graphs" in unlike_compiled(easy.apply(model, end=0.5, lora=0.0), caplog)
    before, other = graphs(), easy.apply(model, 0.5, mask=LEFT, lora=0.0)
    assert golden.error(sampled(compiled(other)), sampled(other)) <= 1e-5
    assert graphs() == before, "it is remembered without a new trace"
    # meets nothing that was compiled with references
    assert golden.error(sampled(compiled(model)), sampled(model)) <= 1e-5


def test_patches_of_another_pack(easy, model, caplog) -> None:
    both = add_as_other_packs_do(easy.apply(model), lambda out, *_, **__: 0.1 * out, **ANYWHERE)
    assert "another pack" in unlike_compiled(both, caplog)


def test_recorded_model(easy, model, caplog) -> None:
    with_record = golden.part(easy.pack, "nodes.unet_patch.recording").with_record
    recorded, record = with_record(easy.apply(model))
    assert "Record Where It Acts" in unlike_compiled(recorded, caplog)
    assert record.recorders[0].shares()
