"""torch.compile around a conditioned UNet: the samples of the eager UNet, over several prompts of one
process.

The time to trace a UNet grows with its modules, so most tests use one with as few as show each behaviour.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import comfy.ldm.modules.attention
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.torch_helpers import set_torch_compile_wrapper
from torch._dynamo import graph_break
from torch._dynamo.utils import counters

from devkit.host import golden
from devkit.host.sampling import LEFT, Easy, easy_of_sites, golden_easy, sample_cfg
from devkit.host.tiny_nodes.tiny_sdxl import random_sdxl

from .other_packs import with_term

WHOLE = ("diffusion_model",)
BLOCKS = tuple(  # modules of ComfyUI's UNet that it can run compiled one by one
    f"diffusion_model.{block}.1.transformer_blocks.0"
    for block in ("input_blocks.5", "output_blocks.0", "output_blocks.1")
)
SMALL = {  # of two resolutions, with four cross-attentions
    "channel_mult": [1, 1],
    "num_res_blocks": [2, 2],
    "transformer_depth": [0, 0, 0, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [0, 0, 0, 0, 1, 1],
}
SHALLOW = {  # SDXL's 11 spatial transformers, of one block each
    "transformer_depth": [0, 0, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1],
}


def without_transformer_options(guards: Sequence[Any]) -> list[bool]:
    """The guards that ComfyUI's compile node keeps (comfy_extras/nodes_torch_compile.py)."""
    return ["transformer_options" not in guard.name for guard in guards]


def compiled(model: ModelPatcher, backend: str = "eager", keys: Sequence[str] = WHOLE) -> ModelPatcher:
    """As ComfyUI's TorchCompileModel makes it; keys: the modules to compile."""
    clone = model.clone()
    options = {"guard_filter_fn": without_transformer_options}
    set_torch_compile_wrapper(model=clone, backend=backend, options=options, keys=list(keys))
    return clone


@pytest.fixture(scope="module")
def unet_with_easy(pack: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Function (config) -> such a tiny SDXL with random weights, and an EasyRef for it."""
    condition, layout = (
        golden.part(pack, name) for name in ("nodes.unet_patch.condition", "easyref_core.unet.layout")
    )
    whole = golden_easy(pack)

    def make(config: Mapping[str, Any]) -> tuple[ModelPatcher, Easy]:
        unet = random_sdxl(seed=0, **config)
        found = condition.cross_attention_widths(unet)
        widths = {site: found[site] for site in layout.in_processor_order(found)}
        file = tmp_path_factory.mktemp("compiled") / "easyref.safetensors"
        return unet, easy_of_sites(whole, widths, file)

    return make


@pytest.fixture(scope="module")
def small(unet_with_easy: Callable[..., Any]) -> tuple[ModelPatcher, Easy]:
    return unet_with_easy(SMALL)


@pytest.fixture
def model(small: tuple[ModelPatcher, Easy]) -> ModelPatcher:
    return small[0].clone()


@pytest.fixture
def easy(small: tuple[ModelPatcher, Easy]) -> Easy:
    return small[1]


@pytest.fixture(autouse=True)
def fresh_compiler(torch_attention) -> Iterator[None]:
    """No graph of another test; and the attention of torch alone, because the host's breaks the graph."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def require_equal(models: Sequence[ModelPatcher], backend: str = "eager", **options: Any) -> list[int]:
    """Compare each model's compiled and eager samples, in this order in one process.

    -> number of graphs compiled for each.
    """
    counts = []
    for model in models:
        before, expected = graphs(), sample_cfg(model, **options)
        assert golden.error(sample_cfg(compiled(model, backend), **options), expected) <= 1e-5
        counts.append(graphs() - before)
    return counts


def test_values_change_from_prompt_to_prompt_in_one_graph(easy, model) -> None:
    """Weight, window, schedule, scaling, tokens, in twelve prompts."""
    settings: list[dict[str, Any]] = [
        *({"weight": weight} for weight in (1.0, 0.3, -0.5)),
        *({"start": 0.4}, {"end": 0.4}, {"start": 0.3, "end": 0.6}),
        *({"weight_schedule": points} for points in ("1, 0.5, 0", "0.2:0, 0.8:1")),
        *({"weight": 0.5, "embeds_scaling": scaling} for scaling in ("K+V", "K+mean(V) w/ C penalty")),
        *({"tokens": easy.other_tokens(seed)} for seed in (1, 2)),
    ]
    made = require_equal([easy.apply(model, **setting) for setting in settings])
    assert made == [1] + [0] * (len(settings) - 1)


@pytest.mark.thorough
@pytest.mark.one_host
def test_weight_types_share_a_graph_where_all_branches_have_their_tokens(unet_with_easy) -> None:
    model, easy = unet_with_easy(SHALLOW)
    kinds = "ease in", "weak middle", "linear", "style transfer precise"
    assert require_equal([easy.apply(model, weight_type=kind) for kind in kinds]) == [1, 0, 0, 1]


@pytest.mark.one_host
def test_structure_changes_from_prompt_to_prompt(easy, model) -> None:
    """References, a mask, a second node: each has its own graph."""
    applied = easy.apply(model, lora=0.0)
    models = [
        model,
        applied,
        easy.apply(model, 0.5, end=0.5, mask=LEFT),
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
    batch, _ = easy.batched_tokens(2)
    monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda *_: 0)
    made = require_equal([easy.apply(model, tokens=batch), easy.apply(model, 0.5, tokens=batch)], batch=2)
    assert made[1] == 0


@pytest.mark.one_host
def test_compile_before_apply(easy, model) -> None:
    before, wanted = graphs(), sample_cfg(easy.apply(model, 0.5, end=0.5))
    found = sample_cfg(easy.apply(compiled(model), 0.5, end=0.5))
    assert golden.error(found, wanted) <= 1e-5
    assert graphs() > before


# Models that run without torch.compile


def assert_runs_eagerly(model: ModelPatcher, **how: Any) -> None:
    expected = sample_cfg(model)
    assert golden.error(sample_cfg(compiled(model, **how)), expected) <= 1e-5


def test_blocks_compiled_one_by_one(easy, model, log) -> None:
    """Without guards on transformer_options, blocks of one shape would share a graph."""
    assert_runs_eagerly(easy.apply(model), keys=BLOCKS)
    assert "blocks are compiled one by one" in log.text
    sample_cfg(compiled(model, keys=BLOCKS))
    assert_runs_eagerly(easy.apply(model, 0.5), keys=BLOCKS)


@pytest.mark.thorough
@pytest.mark.one_host
def test_unet_of_several_graphs(easy, model, log, torch_attention: Callable) -> None:
    """As with the attention that the host selects for a CPU, which reads the free memory."""
    plain_attention = comfy.ldm.modules.attention.attention_pytorch

    def breaking(*args: Any, **kwargs: Any) -> torch.Tensor:
        graph_break()
        return plain_attention(*args, **kwargs)

    torch_attention(breaking)
    assert_runs_eagerly(easy.apply(model, end=0.5, lora=0.0))
    assert "several graphs" in log.text
    before = graphs()
    assert_runs_eagerly(easy.apply(model, 0.5, mask=LEFT, lora=0.0))
    assert graphs() == before, "the decision is cached, so nothing is traced again"
    # shares nothing with the graphs that were compiled with references
    assert_runs_eagerly(model)


def test_patches_of_another_pack(easy, model, log) -> None:
    assert_runs_eagerly(with_term(easy.apply(model), lambda out, *_, **__: 0.1 * out))
    assert "another pack" in log.text


def test_recorded_model(easy, model, log) -> None:
    recorded, record = golden.part(easy.pack, "nodes.unet_patch.recording").with_record(easy.apply(model))
    assert_runs_eagerly(recorded)
    assert "Record Where It Acts" in log.text
    assert record.recorders[0].shares()
