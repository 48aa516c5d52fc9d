"""Checkpoints: open one (recognized by formats.py, shapes checked against the model's) and save one."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..files.atomic_write import atomic_write
from ..files.tensor_files import (
    Source,
    TensorFile,
    copy_to_pages,
    has_weights,
    open_tensors,
    read_json,
    read_sources,
)
from ..mllm.config import EasyRefConfig, Shapes, mllm_name
from ..mllm.qwen2_vl import SkipInit
from ..unet.layout import Site
from ..utils.errors import shorten
from .formats import (
    BASE_MLLM,
    EASYREF_NAMES,
    METADATA_KEY,
    MLLM_NAMES,
    RELEASE,
    SAVE_MEMORY,
    by_processor_path,
    number_sites,
    quantized,
    require_easyref,
    stored_name,
    translate,
)
from .modules import CheckpointModules

FINGERPRINT_VALUES = 32  # at either end of a tensor
LORA_PREFIX = "unet."  # of the names of the attention LoRA, which belongs to no module of the model
PATCH_EMBED = "encoder.visual.patch_embed.weight"  # stored as a Conv3d whose stride is its kernel
# The sizes of a model are read from these tensors.
SIZE_TENSORS = [
    "encoder.embed_tokens.weight",
    PATCH_EMBED,
    "encoder.visual.blocks.0.mlp.fc1.weight",
    "aggregator.reference_tokens.weight",
    "aggregator.layers.0.mlp.gate_proj.weight",
    "aggregator.layers.0.self_attn.k_proj.weight",
    "aggregator.projector.0.weight",
    "aggregator.projector.2.weight",
]

# (name in the model, tensor as stored) -> tensor as it stays loaded
Cast = Callable[[str, torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: sizes, UNet sites, and the source of each tensor. No weight is loaded."""

    path: Path
    config: EasyRefConfig
    widths: Mapping[Site, int]  # of the UNet's cross-attentions, in processor order
    sources: Mapping[str, Source]  # by name in the model: encoder.*, aggregator.*, kv.*, unet.*_lora.*
    mapped: bool = True  # tensors that `cast` leaves alone stay the file's mapping; else they are copied
    _mapped_files: dict[Path, TensorFile] = dataclasses.field(default_factory=dict, init=False)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The cross-attention sites of the UNet, in processor order."""
        return tuple(self.widths)

    def state(self, cast: Cast) -> dict[str, torch.Tensor]:
        """State dict of CheckpointModules. Each tensor is read from its mapping and cast once."""
        return self._read([name for name in self.sources if not name.startswith(LORA_PREFIX)], cast)

    def lora(self) -> dict[str, torch.Tensor]:
        """The attention LoRA as stored, by diffusers path: <path>.processor.to_q_lora.down.weight."""
        self.require_not_cut()
        return dict(self._lora)

    @functools.cached_property
    def _lora(self) -> dict[str, torch.Tensor]:
        # cached because safetensors 0.8 leaks 64 bytes with each tensor, and each Apply node reads all of
        # these
        names = [name for name in self.sources if name.startswith(LORA_PREFIX)]
        tensors = self._read(names, lambda _, tensor: tensor)
        return {name.removeprefix(LORA_PREFIX): tensor for name, tensor in tensors.items()}

    def _read(self, names: Iterable[str], cast: Cast) -> dict[str, torch.Tensor]:
        state = {}
        for name, tensor in read_sources({name: self.sources[name] for name in names}):
            if not tensor.is_floating_point():
                raise ValueError(
                    f"{self.path}: {stored_name(name, self.sites)} holds {tensor.dtype} values; wanted "
                    "floating-point numbers. Quantized files are not read; use the release, or save it in "
                    "float16 or bfloat16."
                )
            stored = tensor.flatten(1) if name == PATCH_EMBED else tensor
            state[name] = cast(name, stored)
            if state[name] is stored:
                if self.mapped:
                    file = self.sources[name].file
                    self._mapped_files[file.path] = file
                else:
                    state[name] = copy_to_pages(stored, stored.dtype)
        return state

    def require_not_cut(self) -> None:
        """Raises ValueError if a file whose mapping is in use was made shorter, see TensorFile."""
        for file in self._mapped_files.values():
            file.require_not_cut()

    def fingerprint(self) -> str:
        """Hash of the first and last values of each tensor, the same for each file format of one dtype.

        Training changes all values of a tensor, so these distinguish two checkpoints, in less than a second.
        """
        return fingerprint(read_sources(self.sources))


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Hash of the first and last values of named tensors, in any order."""
    ends = {name: end_values(tensor) for name, tensor in tensors}
    digest = hashlib.sha256()
    for name in sorted(ends):
        digest.update(name.encode() + ends[name])
    return digest.hexdigest()[:16]


def end_values(tensor: torch.Tensor) -> bytes:
    """The first and last FINGERPRINT_VALUES values of a tensor, as the bytes of float32 numbers."""
    values = tensor.detach().flatten()
    ends = torch.cat([values[:FINGERPRINT_VALUES], values[-FINGERPRINT_VALUES:]])
    return ends.float().cpu().numpy().tobytes()


def open_checkpoint(
    path: Path, mllm: Path | None = None, causal: bool | None = None, mapped: bool = True
) -> Checkpoint:
    """Recognize, translate and check a checkpoint.

    mllm: folder of the base MLLM: its config.json, and its weights where the checkpoint has none.
    causal: overrides the checkpoint's setting of the final layer's attention. mapped: see Checkpoint.
    Raises FileNotFoundError, and ValueError for a file that is not a complete EasyRef checkpoint.
    """
    file = open_tensors(path)
    names = {name.removeprefix("module."): name for name in file.shapes}
    require_easyref(path, names)
    sources = {new: Source(file, names[name]) for name, new in translate(names, EASYREF_NAMES).items()}
    if not any(name.startswith("kv.") for name in sources):
        paths = by_processor_path(names)
        new = translate(paths.values(), EASYREF_NAMES)
        sources |= {new[path]: Source(file, names[name]) for name, path in paths.items() if path in new}
    settings = read_config(mllm) if mllm else None
    if not any(name.startswith("encoder.") for name in sources):
        sources |= _base_mllm(path, mllm, final_layers=_count_layers(sources, "aggregator") or 1)
    sites, sources = number_sites(sources)
    shapes = {name: _shape(name, source) for name, source in sources.items()}
    _require_sizes(path, shapes, sites)
    config = EasyRefConfig.from_checkpoint(shapes, settings, _stored_settings(path, file.metadata))
    if causal is not None:
        config = dataclasses.replace(config, causal=causal)
    widths = {site: shapes.get(f"kv.to_k_ip.{i}.weight", (0,))[0] for i, site in enumerate(sites)}
    checkpoint = Checkpoint(path, config, widths, sources, mapped)
    _require_shapes(checkpoint, shapes)
    return checkpoint


def _stored_settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The EasyRefConfig fields in the metadata of a file that `save` wrote; empty for other files."""
    try:
        settings = json.loads(metadata.get(METADATA_KEY, "{}"))
        if isinstance(settings, dict) and isinstance(settings.get("causal", True), bool):
            return settings
    except (ValueError, RecursionError):
        pass
    raise ValueError(
        f"{path}: the metadata {METADATA_KEY!r} is {metadata[METADATA_KEY][:80]!r}; wanted a JSON object of "
        "EasyRefConfig's fields, causal true or false. Save the checkpoint again."
    )


def read_config(mllm: Path) -> dict[str, Any]:
    """config.json of an MLLM folder. Raises an error if it is missing or describes another kind of model."""
    file = mllm / "config.json"
    if not file.is_file():
        _require_no_gguf(mllm, "an MLLM")
        raise FileNotFoundError(
            f"{mllm} has no config.json: it is not an MLLM folder. Put all files of Qwen2-VL there."
        )
    config = read_json(file)
    if config.get("model_type") != "qwen2_vl":
        raise ValueError(
            f"{file} describes {mllm_name(config)}, model type {shorten(repr(config.get('model_type')))}; "
            "EasyRef needs 'qwen2_vl', another architecture. Download Qwen/Qwen2-VL-2B-Instruct "
            f"({BASE_MLLM}) and choose its folder."
        )
    return config


def mllm_sources(folder: Path) -> dict[str, Source]:
    """The weights of an MLLM folder, by name in the model: all its decoder layers are encoder.layers.*.

    Raises ValueError for a quantized MLLM, FileNotFoundError for a folder without weights.
    """
    settings = read_config(folder)
    name, nested = mllm_name(settings), settings.get("text_config")
    for key in ("quantization_config", "compression_config"):
        if quantization := settings.get(key) or (nested or {}).get(key):
            raise _quantized_error(folder, name, f"{key} in config.json: {_describe_quantizer(quantization)}")
    if not has_weights(folder):
        _require_no_gguf(folder, name)
    file = open_tensors(folder)
    if tensors := quantized(file.shapes):
        raise _quantized_error(folder, name, f"{len(tensors)} tensors such as {shorten(tensors[0])}")
    return {new: Source(file, name) for name, new in translate(file.shapes, MLLM_NAMES).items()}


def _describe_quantizer(settings: object) -> str:
    """The method that a quantization_config names; bitsandbytes did not always write one."""
    if not isinstance(settings, Mapping):
        return shorten(repr(settings))
    loads = [key for key in ("load_in_4bit", "load_in_8bit") if settings.get(key)]
    method = settings.get("quant_method") or ("bitsandbytes" if loads else "unknown method")
    return ", ".join([shorten(method), *loads])


def _require_no_gguf(folder: Path, name: str) -> None:
    """Raises ValueError for a folder of GGUF files, which are not read."""
    if files := sorted(file.name for file in folder.glob("*.gguf")):
        raise _quantized_error(folder, name, f"a GGUF file, {shorten(files[0])}")


def _quantized_error(folder: Path, name: str, evidence: str) -> ValueError:
    return ValueError(
        f"{folder} holds {name} quantized ({evidence}); wanted weights that are not quantized. Download "
        f"Qwen/Qwen2-VL-2B-Instruct ({BASE_MLLM}) and choose its folder. {SAVE_MEMORY}"
    )


def expected_shapes(config: EasyRefConfig, widths: Mapping[Site, int]) -> Shapes:
    """Shapes of all tensors of a model, by name in the model. widths: as in Checkpoint.

    Computed with torch.nn, because a host's operations may create a parameter only when it is loaded.
    """
    modules = CheckpointModules(config, widths, SkipInit, device="meta")
    shapes = {name: tuple(tensor.shape) for name, tensor in modules.state_dict().items()}
    return shapes | lora_shapes(config, widths)


def lora_shapes(config: EasyRefConfig, widths: Mapping[Site, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of the attention LoRA: q, k, v and out of the self- and the cross-attention at each site."""
    shapes: dict[str, tuple[int, ...]] = {}
    if config.lora_rank:
        for site, width in widths.items():
            for attention, context in (("attn1", width), ("attn2", config.token_width)):
                for layer in ("q", "k", "v", "out"):
                    name = f"{LORA_PREFIX}{site.diffusers}.{attention}.processor.to_{layer}_lora"
                    shapes[f"{name}.down.weight"] = (config.lora_rank, context if layer in "kv" else width)
                    shapes[f"{name}.up.weight"] = (width, config.lora_rank)
    return shapes


def save(
    path: Path, config: EasyRefConfig, sites: Sequence[Site], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write tensors, by name in the model, as safetensors with the released keys and `config` as metadata."""
    from safetensors.torch import save_file

    stored = {
        stored_name(name, sites): _stored_tensor(name, tensor, config) for name, tensor in tensors.items()
    }
    metadata = {METADATA_KEY: json.dumps(dataclasses.asdict(config)), "format": "pt"}
    with atomic_write(path) as partial:
        save_file(stored, partial, metadata)


def may_be_fp8(name: str, tensor: torch.Tensor, embeddings: bool = True) -> bool:
    """Return True for the matrices of the MLLM body, of the last layer's MLP, and of K and V.

    For these, 99.5 % of the model, fp8 is enough. The last layer's attention, the reference tokens and the
    projector are not among them, because the tokens depend on them most. Norms and biases are not matrices.
    name: in the model. embeddings: True if the device supports embedding lookup in fp8.
    """
    if "embed_tokens" in name:
        return embeddings
    return tensor.ndim == 2 and (name.startswith(("encoder.", "kv.")) or ".mlp." in name)


def _base_mllm(path: Path, mllm: Path | None, final_layers: int) -> dict[str, Source]:
    """Body of the base MLLM, for checkpoints of the alignment stage, which do not hold the frozen MLLM."""
    if mllm is None:
        raise ValueError(
            f"{path} holds no MLLM weights (a checkpoint of the alignment stage, in which the MLLM is "
            "frozen). Choose a folder with the base MLLM, Qwen/Qwen2-VL-2B-Instruct: its config.json, its "
            "tokenizer and its weights, not quantized."
        )
    sources = mllm_sources(mllm)
    body = _count_layers(sources, "encoder") - final_layers
    return {name: source for name, source in sources.items() if _layer_number(name, "encoder") < body}


def _count_layers(names: Iterable[str], module: str) -> int:
    return 1 + max((_layer_number(name, module) for name in names), default=-1)


def _layer_number(name: str, module: str) -> int:
    """Number of the decoder layer of a tensor; -1 for other tensors."""
    match = re.match(rf"{module}\.layers\.(\d{{1,3}})\.", name)
    return int(match[1]) if match else -1


def _shape(name: str, source: Source) -> tuple[int, ...]:
    shape = source.file.shapes[source.name]
    return (shape[0], int(torch.Size(shape[1:]).numel())) if name == PATCH_EMBED and shape else shape


def _stored_tensor(name: str, tensor: torch.Tensor, config: EasyRefConfig) -> torch.Tensor:
    if name == PATCH_EMBED:
        tensor = tensor.unflatten(1, (3, config.temporal_patch_size, config.patch_size, config.patch_size))
    return tensor.detach().cpu().contiguous()


def _require_sizes(path: Path, shapes: Shapes, sites: Sequence[Site]) -> None:
    """Raises ValueError where a tensor of SIZE_TENSORS is missing, or any tensor has too few dimensions."""
    _require_complete(path, [name for name in SIZE_TENSORS if name not in shapes])
    flat = [
        name
        for name, shape in shapes.items()
        if 0 in shape or len(shape) < (2 if name in SIZE_TENSORS else 1)
    ]
    if flat:
        raise ValueError(
            f"{path}: {len(flat)} tensors hold no weights of a model, first {stored_name(flat[0], sites)} of "
            f"shape {shorten(shapes[flat[0]])}. The file is damaged; download or export it again ({RELEASE})."
        )


def _require_shapes(checkpoint: Checkpoint, shapes: Shapes) -> None:
    """Raises ValueError where names or shapes are not those of a model of the checkpoint's sizes."""
    path, sites = checkpoint.path, checkpoint.sites
    expected = expected_shapes(checkpoint.config, checkpoint.widths)
    _require_complete(path, sorted(expected.keys() - shapes.keys()), sites)
    different = [
        f"{stored_name(name, sites)}: found {shorten(tuple(shapes[name]))}, wanted {tuple(shape)}"
        for name, shape in expected.items()
        if tuple(shapes[name]) != tuple(shape)
    ]
    if different:
        raise ValueError(
            f"{path}: {len(different)} tensors do not have the size that the others imply, first "
            f"{'; '.join(different[:10])}. The checkpoint and the MLLM folder do not belong together, or the "
            "file is damaged."
        )
    unknown = sorted(stored_name(name, sites) for name in shapes.keys() - expected.keys())
    if unknown:
        raise ValueError(
            f"{path} holds {len(unknown)} tensors in places where an EasyRef model on Qwen2-VL has none, "
            f"first {', '.join(map(shorten, unknown[:5]))}. It is of another architecture, or damaged; use "
            f"the release ({RELEASE})."
        )


def _require_complete(path: Path, missing: list[str], sites: Sequence[Site] = ()) -> None:
    if missing:
        names = ", ".join(stored_name(name, sites) for name in missing[:10])
        raise ValueError(
            f"{path} lacks {len(missing)} tensors of an EasyRef model, first {names}. The file is "
            f"incomplete; download or export it again ({RELEASE})."
        )
