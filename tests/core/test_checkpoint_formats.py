"""Formats of a checkpoint, recognized by keys: the tensors that are used or ignored, and the sizes."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import easyref_core as er
from devkit import golden
from devkit.golden import EXACT, Tensors, checkpoint_tensors, error, write, write_deepspeed
from easyref_core.checkpoint.checkpoint import open_checkpoint
from easyref_core.checkpoint.formats import METADATA_KEY
from easyref_core.mllm.qwen2_vl import text_rope
from easyref_core.unet.layout import sdxl_sites

from .errors import folder_with

BODY = "multimodal_llm."


def without(tensors: Tensors, pattern: str) -> Tensors:
    """The tensors whose names do not match."""
    return {name: tensor for name, tensor in tensors.items() if not re.search(pattern, name)}


def renamed(tensors: Tensors, *rules: tuple[str, str]) -> Tensors:
    """The tensors under other names: (pattern, replacement) each."""
    for pattern, new in rules:
        tensors = {re.sub(pattern, new, name): tensor for name, tensor in tensors.items()}
    return tensors


def load(path: Path, mllm: Path = golden.MLLM) -> er.EasyRef:
    return er.load(path, mllm)


def tokens_of(model: er.EasyRef) -> torch.Tensor:
    """Tokens of the golden group."""
    return model.aggregate(model.encode(golden.references(), golden.PROMPT, size=golden.SIZE))


def assert_golden(model: er.EasyRef, expected: Tensors) -> None:
    """A model computes the authors' tokens."""
    assert error(tokens_of(model), expected["cond.reference_embeds"]) <= EXACT


def assert_equal(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# Names


def transformers_5(name: str) -> tuple[tuple[str, str], ...]:
    """Rules that give MLLM keys the names they have since transformers 4.52, under a prefix."""
    text = rf"^{name}model\.", rf"{name}model.language_model."
    return text, (rf"^{name}visual\.", rf"{name}model.visual.")


UNET = renamed(load_file(golden.UNET / "diffusion_pytorch_model.safetensors"), ("^", "unet."))
ROTARY = (
    "multimodal_llm.model.layers.0.self_attn.rotary_emb.inv_freq",
    "multimodal_llm.visual.rotary_pos_emb.inv_freq",
    "mllm_final_layer.layers.0.self_attn.rotary_emb.inv_freq",
)
ADAPTERS = {
    "adapter_modules.1.to_k_ip.weight": torch.ones(32, 32),
    "adapter_modules.0.to_q_lora.down.weight": torch.ones(8, 32),
}
VARIANTS: dict[str, Callable[[Tensors], Tensors]] = {
    "as released": lambda tensors: tensors,
    "module. in front": lambda tensors: renamed(tensors, ("^", "module.")),
    "MLLM as transformers 5 names it": lambda tensors: renamed(tensors, *transformers_5(r"multimodal_llm.")),
    "lm_head present": lambda tensors: tensors | {"multimodal_llm.lm_head.weight": torch.ones(416, 64)},
    "rotary buffers present": lambda tensors: tensors | {name: torch.ones(8) for name in ROTARY},
    "the frozen UNet beside": lambda tensors: tensors | UNET,
    "adapters a second time": lambda tensors: tensors | ADAPTERS,
}


@pytest.mark.parametrize("write_file", [write, write_deepspeed])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_each_variant_is_the_same_model(
    model, expected, tmp_path: Path, caplog, variant: Callable[[Tensors], Tensors], write_file: Callable
) -> None:
    loaded = load(write_file(tmp_path / "file", variant(checkpoint_tensors())))
    assert_golden(loaded, expected)
    assert_equal(loaded.kv.state_dict(), model.kv.state_dict())
    assert_equal(loaded.checkpoint.lora(), model.checkpoint.lora())
    assert not caplog.records  # no tensor is reported as unknown


def test_unknown_tensors_are_reported_and_ignored(tmp_path: Path, caplog) -> None:
    tensors = checkpoint_tensors() | {"multimodal_llm.audio_tower.weight": torch.zeros(3)}
    opened = open_checkpoint(write(tmp_path / "more.safetensors", tensors), golden.MLLM)
    assert "1 unknown tensors were ignored, first ['multimodal_llm.audio_tower.weight']" in caplog.text
    assert "multimodal_llm.audio_tower.weight" not in {source.name for source in opened.sources.values()}


def test_plain_pt_files_are_read(expected, tmp_path: Path) -> None:
    torch.save(checkpoint_tensors(), tmp_path / "plain.pt")
    assert_golden(load(tmp_path / "plain.pt"), expected)
    old_kind = {"module": checkpoint_tensors()}
    torch.save(old_kind, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_golden(load(tmp_path / "old.pt"), expected)


@pytest.mark.parametrize("name", ["model.bin", "model.ckpt", "no suffix", "model.pt"])
def test_the_name_of_a_file_does_not_matter(expected, tmp_path: Path, name: str) -> None:
    assert_golden(load(Path(shutil.copy(golden.CHECKPOINT, tmp_path / name))), expected)


def test_a_file_without_lora_is_read(expected, tmp_path: Path) -> None:
    loaded = load(write(tmp_path / "no_lora.safetensors", without(checkpoint_tensors(), "_lora")))
    assert (loaded.config.lora_rank, loaded.checkpoint.lora()) == (0, {})
    assert_golden(loaded, expected)


# Checkpoints of the alignment stage, which do not hold the frozen MLLM


@pytest.fixture
def stage_1(tmp_path: Path) -> Path:
    return write(tmp_path / "stage_1.safetensors", without(checkpoint_tensors(), f"^{BODY}|_lora"))


def body_of(model: er.EasyRef) -> Tensors:
    """The decoder layers, without the vision tower."""
    return without(model.mllm.encoder.state_dict(), r"^visual\.")


def base_mllm() -> Tensors:
    return load_file(golden.MLLM / "model.safetensors")


def test_a_stage_1_file_takes_its_body_from_the_base_mllm(stage_1: Path, model: er.EasyRef) -> None:
    base = renamed(without(base_mllm(), r"^visual\."), (r"^model\.", ""))
    base = {name: tensor.float() for name, tensor in base.items()}
    loaded = load(stage_1)
    assert_equal(body_of(loaded), without(base, r"^layers\.3\."))  # the base MLLM's last layer is left out
    assert_equal(loaded.mllm.aggregator.state_dict(), model.mllm.aggregator.state_dict())
    up_proj = "layers.0.mlp.up_proj.weight"
    # a full checkpoint has its own body
    assert not torch.equal(body_of(model)[up_proj], base[up_proj])


def test_a_stage_1_file_needs_an_mllm_folder(stage_1: Path) -> None:
    message = r"stage_1.safetensors holds no MLLM weights.*Choose a folder.*Qwen2-VL-2B"
    with pytest.raises(ValueError, match=message):
        er.load(stage_1, tokenizer=golden.MLLM)


def renamed_base(folder: Path) -> None:
    write(folder / "model.safetensors", renamed(base_mllm(), *transformers_5("")))


def sharded_base(folder: Path, stem: str, kind: str, save: Callable[[Tensors, Path], object]) -> None:
    tensors = base_mllm() | {"lm_head.weight": torch.zeros(416, 64)}
    weight_map = {name: f"{stem}-{1 + i % 3:05}-of-00003.{kind}" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))


def base_beside_a_pickle(folder: Path) -> None:
    shutil.copy(golden.MLLM / "model.safetensors", folder)
    torch.save({"arguments": Path("any object")}, folder / "training_args.bin")


@pytest.mark.parametrize(
    "write_weights",
    [
        renamed_base,
        lambda folder: sharded_base(folder, "model", "safetensors", lambda t, path: write(path, t)),
        lambda folder: sharded_base(folder, "pytorch_model", "bin", torch.save),
        base_beside_a_pickle,
    ],
    ids=["as transformers 5 names it", "safetensors shards", "bin shards", "a pickle beside safetensors"],
)
def test_each_form_of_the_base_mllm_is_the_same(
    stage_1: Path, tmp_path: Path, write_weights: Callable
) -> None:
    folder = folder_with(tmp_path / "mllm")
    (folder / "model.safetensors").unlink()
    write_weights(folder)
    assert torch.equal(tokens_of(load(stage_1, folder)), tokens_of(load(stage_1)))


# Adapters by number


def training_adapters() -> Tensors:
    """140 numbered adapters of a training run: SDXL's depths in the widths of the tiny model."""
    tensors: Tensors = {}
    for i in range(140):
        name = f"adapter_modules.{i}"
        for layer in ("q", "k", "v", "out"):
            width = 32 if i % 2 and layer in "kv" else 4
            tensors[f"{name}.to_{layer}_lora.down.weight"] = torch.full((2, width), float(i))
            tensors[f"{name}.to_{layer}_lora.up.weight"] = torch.full((4, 2), float(i))
        if i % 2:
            tensors |= {f"{name}.to_{layer}_ip.weight": torch.full((4, 32), float(i)) for layer in "kv"}
    return tensors


def test_numbered_adapters_get_their_sites(tmp_path: Path) -> None:
    tensors = without(checkpoint_tensors(), r"^unet\.") | training_adapters()
    loaded = load(write(tmp_path / "numbered.safetensors", tensors))
    assert list(loaded.checkpoint.sites) == sdxl_sites()
    numbers = [weight[0, 0].item() for weight in loaded.kv.state_dict().values()]
    assert numbers[:70] == list(range(1, 140, 2))
    lora = loaded.checkpoint.lora()
    attentions = [f"{site.diffusers}.{name}" for site in sdxl_sites() for name in ("attn1", "attn2")]
    assert [lora[f"{path}.processor.to_out_lora.up.weight"][0, 0] for path in attentions] == list(range(140))


# This package's own format


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "saved.safetensors"
    load(golden.CHECKPOINT).save(path)
    return path


def test_a_saved_file_has_the_released_keys_and_values_and_the_sizes(saved: Path, model: er.EasyRef) -> None:
    half = {name: tensor.to(torch.float16) for name, tensor in load_file(saved).items()}
    assert_equal(half, checkpoint_tensors())
    assert open_checkpoint(saved).config == model.config
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_model_in_the_dtype_of_its_file_can_be_saved(model: er.EasyRef, tmp_path: Path) -> None:
    er.load(golden.CHECKPOINT, golden.MLLM, dtype=torch.float16).save(tmp_path / "half.safetensors")
    assert load(tmp_path / "half.safetensors").fingerprint == model.fingerprint


def test_causal_comes_from_the_metadata_or_the_user(tmp_path: Path) -> None:
    metadata = {METADATA_KEY: json.dumps({"causal": False})}
    path = write(tmp_path / "bidirectional.safetensors", checkpoint_tensors(), metadata)
    assert not open_checkpoint(path, golden.MLLM).config.causal
    assert open_checkpoint(path, golden.MLLM, causal=True).config.causal
    load(path).save(tmp_path / "saved.safetensors")
    assert not open_checkpoint(tmp_path / "saved.safetensors").config.causal


# Sizes come from the tensors


def test_the_number_of_tokens_is_read(tmp_path: Path) -> None:
    tensors = checkpoint_tensors() | {"mllm_final_layer.reference_tokens": torch.randn(5, 64)}
    assert tokens_of(load(write(tmp_path / "five.safetensors", tensors))).shape == (1, 5, 32)


def test_the_lora_rank_is_read(tmp_path: Path) -> None:
    tensors = checkpoint_tensors()
    tensors |= {name: t[:3] for name, t in tensors.items() if name.endswith("lora.down.weight")}
    tensors |= {name: t[:, :3] for name, t in tensors.items() if name.endswith("lora.up.weight")}
    assert open_checkpoint(write(tmp_path / "rank.safetensors", tensors), golden.MLLM).config.lora_rank == 3


def test_the_widths_of_projector_and_tokens_are_read(tmp_path: Path) -> None:
    tensors = checkpoint_tensors()
    cross = re.compile(r".+_ip\.weight|.+attn2\.processor\.to_[kv]_lora\.down\.weight")
    tensors |= {n: torch.randn(*t.shape[:-1], 48) for n, t in tensors.items() if cross.fullmatch(n)}
    shapes = {"0.weight": (96, 64), "0.bias": (96,), "2.weight": (48, 96)}
    shapes |= dict.fromkeys(("2.bias", "3.weight", "3.bias"), (48,))
    tensors |= {f"image_proj_model.proj.{name}": torch.randn(shape) for name, shape in shapes.items()}
    loaded = load(write(tmp_path / "wide.safetensors", tensors))
    assert (loaded.config.projector_width, tokens_of(loaded).shape) == (96, (1, 8, 48))


def test_the_depth_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "shallow.safetensors", without(checkpoint_tensors(), r"model\.layers\.2\."))
    opened = open_checkpoint(path, folder_with(tmp_path / "mllm", num_hidden_layers=3))
    assert (opened.config.body_layers, opened.config.final_layers) == (2, 1)


@torch.inference_mode()
def test_two_final_layers_both_attend_to_the_reference_tokens(tmp_path: Path) -> None:
    """The golden checkpoint with its body's last layer moved over to the final layers."""
    tensors = renamed(
        checkpoint_tensors(),
        (r"mllm_final_layer\.layers\.0\.", r"mllm_final_layer.layers.1."),
        (r"multimodal_llm\.model\.layers\.2\.", r"mllm_final_layer.layers.0."),
    )
    loaded = load(write(tmp_path / "two.safetensors", tensors))
    assert (loaded.config.body_layers, loaded.config.final_layers) == (2, 2)
    aggregator = loaded.mllm.aggregator
    context = torch.randn(1, 20, 64, generator=torch.manual_seed(0))
    x = torch.cat([context, aggregator.reference_tokens.weight[None]], dim=1)
    for layer in aggregator.layers:
        x = layer(x, text_rope(28, loaded.config, x.device))
    assert error(aggregator.gather(context), aggregator.norm(x)[:, -8:]) <= EXACT


def test_a_config_that_the_installed_transformers_wrote_is_read(tmp_path: Path, model: er.EasyRef) -> None:
    """transformers 5 nests the text part."""
    from transformers import AutoConfig

    folder = folder_with(tmp_path / "mllm", rope_theta=5e5)
    AutoConfig.from_pretrained(folder).save_pretrained(folder)
    config = open_checkpoint(golden.CHECKPOINT, folder).config
    assert config == dataclasses.replace(model.config, rope_theta=5e5)


# Dtypes and fingerprints


def test_a_model_in_bfloat16_computes_nearly_the_same_tokens(expected) -> None:
    tokens = tokens_of(er.load(golden.CHECKPOINT, golden.MLLM, dtype=torch.bfloat16))
    assert tokens.dtype == torch.float32
    flat = torch.Tensor(tokens).flatten(), expected["cond.reference_embeds"].flatten()
    assert torch.cosine_similarity(*flat, dim=0) >= 0.999


def test_a_checkpoint_stored_in_bfloat16_is_read(tokens: er.ReferenceTokens, tmp_path: Path) -> None:
    stored = {name: tensor.to(torch.bfloat16) for name, tensor in checkpoint_tensors().items()}
    assert error(tokens_of(load(write(tmp_path / "bf16.safetensors", stored))), tokens) < 0.02


def test_the_fingerprint_is_the_same_from_each_format(model: er.EasyRef, saved: Path, tmp_path: Path) -> None:
    deepspeed = write_deepspeed(tmp_path / "file.pt", checkpoint_tensors())
    assert load(deepspeed).fingerprint == load(saved).fingerprint == model.fingerprint


@pytest.mark.parametrize(
    "name",
    [
        "mllm_final_layer.reference_tokens",
        "mllm_final_layer.norm.weight",
        "image_proj_model.proj.2.weight",
        "multimodal_llm.model.norm.weight",
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_k_ip.weight",
        "unet.mid_block.attentions.0.transformer_blocks.1.attn2.processor.to_v_ip.weight",
        "unet.mid_block.attentions.0.transformer_blocks.1.attn1.processor.to_q_lora.up.weight",
        "mllm_final_layer.layers.0.mlp.up_proj.weight",
        "multimodal_llm.model.layers.1.self_attn.q_proj.weight",
        "multimodal_llm.visual.blocks.1.mlp.fc1.weight",
    ],
)
def test_the_fingerprint_depends_on_each_weight(model: er.EasyRef, tmp_path: Path, name: str) -> None:
    tensors = checkpoint_tensors()
    tensors[name] = tensors[name] + 0.01
    opened = open_checkpoint(write(tmp_path / "other.safetensors", tensors), golden.MLLM)
    assert opened.fingerprint() != model.fingerprint
