"""The layout of the released checkpoint at full size, without memory for its values."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from devkit import golden
from easyref_core.checkpoint import checkpoint as checkpoints
from easyref_core.checkpoint.checkpoint import Checkpoint, expected_shapes, open_checkpoint
from easyref_core.checkpoint.formats import EASYREF_NAMES, by_processor_path, stored_name, translate
from easyref_core.checkpoint.modules import CheckpointModules
from easyref_core.mllm.instructions import INSTRUCTION
from easyref_core.model import build
from easyref_core.unet.layout import parse_diffusers, sdxl_sites

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

LAYOUT: dict[str, Any] = json.loads(golden.LAYOUT.read_text())
KEYS: dict[str, list[int]] = LAYOUT["keys"]
LM_HEAD = "multimodal_llm.lm_head.weight"  # tied to embed_tokens; the one key that is not used


class ShapesOnly:
    """A file of tensors (tensor_files.TensorFile) that holds no values."""

    path = Path("easyref.safetensors")
    metadata: dict[str, str] = {}

    def __init__(self, shapes: dict[str, list[int]]) -> None:
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, torch.empty(self.shapes[name], device="meta")) for name in names)

    def require_not_cut(self) -> None: ...


def opened(shapes: dict[str, list[int]]) -> Checkpoint:
    """A checkpoint of tensors with these names and shapes, with no MLLM folder beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "open_tensors", lambda _: ShapesOnly(shapes))
        return open_checkpoint(ShapesOnly.path)


def shapes_of(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Shapes that a model of the checkpoint's sizes has."""
    return expected_shapes(checkpoint.config, checkpoint.widths)


@pytest.fixture(scope="module")
def released() -> Checkpoint:
    return opened(KEYS)


@pytest.fixture(scope="module")
def sdxl() -> UNet2DConditionModel:
    """SDXL base's UNet at full size, on the meta device."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**LAYOUT["sdxl_unet_config"])


def test_each_key_is_used_once(released: Checkpoint, caplog) -> None:
    names = translate(KEYS, EASYREF_NAMES)
    assert not caplog.records  # no key is unknown
    assert len(KEYS) == 1998
    assert len(set(names.values())) == len(names) == 1997
    assert KEYS.keys() - {source.name for source in released.sources.values()} == {LM_HEAD}


def test_each_shape_is_the_model_s(released: Checkpoint) -> None:
    expected = shapes_of(released)
    shapes = {name: tuple(KEYS[source.name]) for name, source in released.sources.items()}
    convolution = "encoder.visual.patch_embed.weight"  # stored as a Conv3d
    assert shapes.pop(convolution) == (1280, 3, 2, 14, 14)
    assert expected.pop(convolution) == (1280, 3 * 2 * 14 * 14)
    assert shapes == expected


def test_the_modules_load_their_tensors(released: Checkpoint) -> None:
    modules = CheckpointModules(released.config, released.widths, device="meta")
    modules.load_state_dict(released.state(lambda _, tensor: tensor), assign=True)


def test_stored_names_are_the_released_keys(released: Checkpoint) -> None:
    assert {stored_name(name, released.sites) for name in released.sources} == KEYS.keys() - {LM_HEAD}


def test_sizes_are_read(released: Checkpoint) -> None:
    expected = {
        "body_layers": 27,
        "final_layers": 1,
        "num_tokens": 64,
        "lora_rank": 128,
        "token_width": 2048,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "heads": 12,
        "kv_heads": 2,
        "vocab_size": 151936,
        "max_positions": 32768,
        "vision_depth": 32,
        "vision_width": 1280,
        "vision_heads": 16,
        "causal": True,
    }
    assert {name: getattr(released.config, name) for name in expected} == expected


@pytest.mark.parametrize("prefix", LAYOUT["parameters"])
def test_parameters_are_as_many_as_the_authors_count(released: Checkpoint, prefix: str) -> None:
    shapes = {stored_name(name, released.sites): shape for name, shape in shapes_of(released).items()}
    count = sum(torch.Size(shape).numel() for name, shape in shapes.items() if name.startswith(prefix))
    assert count == LAYOUT["parameters"][prefix]


def test_560_lora_pairs_fit_the_layers_of_sdxl(released: Checkpoint, sdxl: UNet2DConditionModel) -> None:
    lora, different = released.lora(), []
    assert len(lora) == 2 * 560
    for name in sdxl.attn_processors:
        attention = sdxl.get_submodule(name.removesuffix(".processor"))
        layers = {"q": attention.to_q, "k": attention.to_k, "v": attention.to_v, "out": attention.to_out[0]}
        for key, layer in layers.items():
            up, down = (lora.pop(f"{name}.to_{key}_lora.{way}.weight") for way in ("up", "down"))
            if (up @ down).shape != layer.weight.shape:
                different.append(f"{name}.{key}")
    assert (different, lora) == ([], {})


def test_keys_and_values_are_as_wide_as_the_attentions_of_sdxl(
    released: Checkpoint, sdxl: UNet2DConditionModel
) -> None:
    cross = [name.removesuffix(".processor") for name in sdxl.attn_processors if ".attn2." in name]
    assert released.widths == {
        parse_diffusers(name): sdxl.get_submodule(name).to_k.out_features for name in cross
    }


def test_sites_are_in_the_order_of_the_processors(released: Checkpoint) -> None:
    order = [parse_diffusers(path) for path in LAYOUT["attn_processor_order"] if ".attn2." in path]
    assert order == list(released.sites) == sdxl_sites()


def test_adapter_modules_are_numbered_in_the_order_of_the_processors() -> None:
    names = [f"adapter_modules.{i}.to_q_lora.up.weight" for i in range(140)]
    paths = [f"unet.{path}.to_q_lora.up.weight" for path in LAYOUT["attn_processor_order"]]
    assert by_processor_path(names) == dict(zip(names, paths, strict=True))


def test_a_training_checkpoint_opens_from_its_adapter_modules_alone(released: Checkpoint) -> None:
    number = {path: i for i, path in enumerate(LAYOUT["attn_processor_order"])}

    def renamed(key: str) -> str:
        path, _, rest = key.removeprefix("unet.").partition(".processor.")
        return f"adapter_modules.{number[f'{path}.processor']}.{rest}" if rest else key

    training = opened({renamed(key): shape for key, shape in KEYS.items()})
    assert shapes_of(training) == shapes_of(released)


def test_it_needs_neither_transformers_nor_a_tokenizer_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(self: ShapesOnly, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, torch.zeros(()).expand(self.shapes[name])) for name in names)  # one value, no memory

    monkeypatch.setitem(sys.modules, "transformers", None)  # its import raises ImportError
    monkeypatch.setattr(ShapesOnly, "read", zeros)
    model = build(opened(KEYS), None, "cpu", torch.bfloat16, cast=lambda _, tensor: tensor)
    group = model.prepare([torch.zeros(64, 64, 3)], "an oil painting", INSTRUCTION, size=336)
    (start, end), ids = group.spans[0], group.input_ids[0]
    assert ids[:3].tolist() == [151644, 8948, 198]  # <|im_start|>, "system", line break
    assert (ids[start:end] == 151655).all()  # <|image_pad|>
    assert int(ids.max()) < model.config.vocab_size
