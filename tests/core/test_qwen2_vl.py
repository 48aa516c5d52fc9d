"""Vision tower and decoder layers match the installed transformers' Qwen2-VL, on random weights.

Runs with transformers from 4.50 on: the text model moved and the vision tower's result changed form since.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest
import torch

from devkit import golden
from devkit.golden import EXACT, Tensors, error
from easyref_core.checkpoint.checkpoint import open_checkpoint
from easyref_core.checkpoint.formats import MLLM_NAMES, translate
from easyref_core.mllm.group_encoder import GroupEncoder
from easyref_core.mllm.qwen2_vl import DecoderLayer, VisionTower, text_rope
from tools.bench.transformers_mllm import text_model, vision_tower

if TYPE_CHECKING:
    from torch import nn

# rms_norm_eps and rope_theta are not the defaults, so that a test fails if either is not passed on
CONFIG = dataclasses.replace(
    open_checkpoint(golden.CHECKPOINT, golden.MLLM).config,
    hidden_size=96,
    heads=6,
    kv_heads=2,
    rms_norm_eps=1e-5,
    rope_theta=5e4,
)
GROUPS = {
    "one image": [(1, 6, 6)],
    "smallest image": [(1, 2, 2)],
    "several sizes": [(1, 4, 6), (1, 10, 4), (1, 2, 2), (1, 6, 8)],
    "equal sizes": [(1, 4, 4), (1, 4, 4)],
}
LENGTH = 37


def randomize(module: nn.Module) -> None:
    """Weights under which every parameter counts, biases and norms included."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(module.named_parameters()):
        offset = 1.0 if "norm" in name and name.endswith("weight") or "ln_q.weight" in name else 0.0
        torch.nn.init.normal_(parameter, offset, 0.1, generator=generator)


def small(*shape: int) -> torch.Tensor:
    """Random inputs so small that the epsilon of each norm shows."""
    return 0.01 * torch.randn(shape, generator=torch.Generator().manual_seed(1))


def translated(theirs: nn.Module, prefix: str) -> Tensors:
    """Their weights under the names of a GroupEncoder."""
    stored = {prefix + name: tensor for name, tensor in theirs.state_dict().items()}
    return {
        new.removeprefix("encoder."): stored[name].flatten(1) if "patch_embed" in name else stored[name]
        for name, new in translate(stored, MLLM_NAMES).items()
    }


@torch.inference_mode()
@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_vision_tower(group: list[tuple[int, int, int]]) -> None:
    theirs, ours = vision_tower(CONFIG), VisionTower(CONFIG)
    randomize(theirs)
    ours.load_state_dict({k.removeprefix("visual."): v for k, v in translated(theirs, "visual.").items()})
    grid = torch.tensor(group)
    patches = small(int(grid.prod(dim=1).sum()), CONFIG.patch_values)
    wanted = theirs(patches, grid)
    wanted = wanted if isinstance(wanted, torch.Tensor) else wanted.pooler_output  # the latter from 5.0 on
    assert error(ours(patches, grid), wanted) <= EXACT


@torch.inference_mode()
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("kv_heads", [6, 2, 1])
def test_decoder_layers(kv_heads: int, causal: bool) -> None:
    config = dataclasses.replace(CONFIG, kv_heads=kv_heads)
    theirs, ours = text_model(config), GroupEncoder(config)
    randomize(theirs)
    ours.load_state_dict(translated(theirs, "model."), strict=False)  # all but the vision tower
    x = small(1, LENGTH, config.hidden_size)

    wanted = theirs(
        inputs_embeds=x,
        attention_mask=None if causal else torch.zeros(1, 1, LENGTH, LENGTH),
        position_ids=torch.arange(LENGTH).expand(3, 1, LENGTH),
        use_cache=False,
    ).last_hidden_state
    rope = text_rope(LENGTH, config, x.device)
    for layer in ours.layers:
        x = layer(x, rope, causal=causal)
    assert error(ours.norm(x), wanted) <= EXACT


@torch.inference_mode()
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_last_positions_of_a_layer(causal: bool) -> None:
    layer = DecoderLayer(CONFIG)
    randomize(layer)
    x = small(1, LENGTH, CONFIG.hidden_size)
    rope = text_rope(LENGTH, CONFIG, x.device)
    assert error(layer(x, rope, causal=causal, num_queries=8), layer(x, rope, causal=causal)[:, -8:]) <= EXACT
