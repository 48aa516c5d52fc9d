"""A checkpoint, opened: recognised and translated by formats.py, every tensor compared with the model's own shapes."""

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
from ..files.tensor_files import Source, TensorFile, has_weights, open_tensors, read_json, read_sources
from ..mllm.config import EasyRefConfig, Shapes, mllm_name
from ..mllm.group_encoder import GroupEncoder
from ..mllm.qwen2_vl import SkipInit
from ..tokens.reference_tokens import ReferenceAggregator
from ..unet.layout import Site
from ..unet.reference_attention import KVProjections
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

FINGERPRINT_VALUES = 32  # at either end of a tensor

# (name in the model, tensor as stored) -> tensor as it stays loaded
Cast = Callable[[str, torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: what it holds and where, nothing loaded yet."""

    path: Path
    config: EasyRefConfig
    sites: tuple[Site, ...]  # the UNet's cross-attention sites, in processor order
    inner: tuple[int, ...]  # width of each site's attention
    sources: Mapping[str, Source]  # by name in the model: encoder.*, aggregator.*, kv.*, unet.*_lora.*

    @property
    def widths(self) -> dict[Site, int]:
        """The UNet this checkpoint was made for: width of the attention at each cross-attention site."""
        return dict(zip(self.sites, self.inner, strict=True))

    def state(self, prefix: str, cast: Cast) -> dict[str, torch.Tensor]:
        """State dict of the module whose tensors start with `prefix`, each read from its mapping and cast once."""
        wanted = {name: source for name, source in self.sources.items() if name.startswith(prefix)}
        state = {}
        for name, tensor in read_sources(wanted):
            if not tensor.is_floating_point():
                raise ValueError(
                    f"{self.path}: {stored_name(name, self.sites)} holds {tensor.dtype} values; wanted floating-point "
                    "numbers. Quantized files are not read; use the release, or save it in float16 or bfloat16."
                )
            if name == "encoder.visual.patch_embed.weight":
                tensor = tensor.flatten(1)  # stored as a Conv3d of stride = kernel
            state[name.removeprefix(prefix)] = cast(name, tensor)
        return state

    def lora(self) -> dict[str, torch.Tensor]:
        """The attention LoRA, mapped, by diffusers path: <path>.processor.to_q_lora.down.weight."""
        return dict(self._lora)

    @functools.cached_property
    def _lora(self) -> dict[str, torch.Tensor]:
        # mapped once: safetensors 0.8 loses 64 bytes with every tensor it reads, and each Apply node asks for all of these
        return self.state("unet.", lambda _, tensor: tensor) if self.config.lora_rank else {}

    def fingerprint(self) -> str:
        """Hash of the first and last values of every tensor, the same from any file format of the same dtype.

        Training moves every value of what it trains, so two checkpoints differ there too; and it takes no second.
        """
        return fingerprint(read_sources(self.sources))


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Hash of the first and last values of named tensors, whatever their order."""
    ends = {}
    for name, tensor in tensors:
        values = tensor.flatten()
        ends[name] = torch.cat([values[:FINGERPRINT_VALUES], values[-FINGERPRINT_VALUES:]]).float()
    digest = hashlib.sha256()
    for name in sorted(ends):
        digest.update(name.encode() + ends[name].cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def open_checkpoint(path: Path, mllm: Path | None = None, causal: bool | None = None) -> Checkpoint:
    """Recognise, translate and check a checkpoint.

    mllm: folder of the base MLLM: its config.json, and its weights where the checkpoint has none.
    causal: overrides the checkpoint's own word on the final layer's attention.
    Raises FileNotFoundError, or ValueError naming what was found, what was wanted and what to do.
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
        sources |= _base_mllm(path, mllm, final_layers=1 + _last_layer(sources))
    sites, sources = number_sites(sources)
    shapes = {name: _shape(name, source) for name, source in sources.items()}
    _require_layers(path, shapes, sites)
    config = EasyRefConfig.from_checkpoint(shapes, settings, _own_settings(path, file.metadata))
    if causal is not None:
        config = dataclasses.replace(config, causal=causal)
    inner = tuple(shapes.get(f"kv.to_k_ip.{i}.weight", (0,))[0] for i in range(len(sites)))
    checkpoint = Checkpoint(path, config, tuple(sites), inner, sources)
    _compare(checkpoint, shapes)
    return checkpoint


def _own_settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The sizes and switches that a file of our own carries; none in other files."""
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
    """config.json of an MLLM folder; raises where it is missing or describes another kind of model."""
    file = mllm / "config.json"
    if not file.is_file():
        _refuse_gguf(mllm, "an MLLM")
        raise FileNotFoundError(
            f"{mllm} has no config.json: it is not an MLLM folder. Put all files of Qwen2-VL there."
        )
    config = read_json(file)
    if config.get("model_type") != "qwen2_vl":
        raise ValueError(
            f"{file} describes {mllm_name(config)}, model type {shorten(repr(config.get('model_type')))}; EasyRef needs "
            f"'qwen2_vl', another architecture. Download Qwen/Qwen2-VL-2B-Instruct ({BASE_MLLM}) and choose its folder."
        )
    return config


def open_mllm(folder: Path) -> TensorFile:
    """The weights of an MLLM folder, by their stored names.

    Raises ValueError for a quantized MLLM, FileNotFoundError for a folder without weights.
    """
    settings = read_config(folder)
    name, nested = mllm_name(settings), settings.get("text_config")
    for key in ("quantization_config", "compression_config"):
        if found := settings.get(key) or (nested or {}).get(key):
            raise _quantized_mllm(folder, name, f"{key} in config.json: {_quantizer(found)}")
    if not has_weights(folder):
        _refuse_gguf(folder, name)
    file = open_tensors(folder)
    if tensors := quantized(file.shapes):
        raise _quantized_mllm(folder, name, f"{len(tensors)} tensors such as {shorten(tensors[0])}")
    return file


def _quantizer(settings: object) -> str:
    """The method that a quantization_config names; bitsandbytes did not always write one."""
    if not isinstance(settings, Mapping):
        return shorten(repr(settings))
    loads = [key for key in ("load_in_4bit", "load_in_8bit") if settings.get(key)]
    method = settings.get("quant_method") or ("bitsandbytes" if loads else "unknown method")
    return ", ".join([shorten(method), *loads])


def _refuse_gguf(folder: Path, name: str) -> None:
    """Raises ValueError for a folder of GGUF files, which are not read."""
    if found := sorted(file.name for file in folder.glob("*.gguf")):
        raise _quantized_mllm(folder, name, f"a GGUF file, {shorten(found[0])}")


def _quantized_mllm(folder: Path, name: str, found: str) -> ValueError:
    return ValueError(
        f"{folder} holds {name} quantized ({found}); wanted weights that are not quantized. Download "
        f"Qwen/Qwen2-VL-2B-Instruct ({BASE_MLLM}) and choose its folder. {SAVE_MEMORY}"
    )


def expected_shapes(checkpoint: Checkpoint) -> Shapes:
    """Shapes of every tensor that a model of these sizes has."""
    config = checkpoint.config
    with torch.device("meta"):
        modules = {
            "encoder.": GroupEncoder(config, SkipInit),
            "aggregator.": ReferenceAggregator(config, SkipInit),
            "kv.": KVProjections(checkpoint.inner, config.token_width),
        }
    shapes = {
        prefix + name: tuple(tensor.shape)
        for prefix, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
    return shapes | lora_shapes(config, checkpoint.sites, checkpoint.inner)


def lora_shapes(
    config: EasyRefConfig, sites: Sequence[Site], inner: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """Shapes of the attention LoRA: q, k, v and out of the self- and the cross-attention at every site."""
    shapes: dict[str, tuple[int, ...]] = {}
    if config.lora_rank:
        for site, width in zip(sites, inner, strict=True):
            for attention, context in (("attn1", width), ("attn2", config.token_width)):
                for part in ("q", "k", "v", "out"):
                    name = f"unet.{site.diffusers}.{attention}.processor.to_{part}_lora"
                    shapes[f"{name}.down.weight"] = (config.lora_rank, context if part in "kv" else width)
                    shapes[f"{name}.up.weight"] = (width, config.lora_rank)
    return shapes


def save(
    path: Path, config: EasyRefConfig, sites: Sequence[Site], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write a model (tensors under the names of its modules) as safetensors: released keys, sizes as metadata.

    The file appears whole or not at all.
    """
    from safetensors.torch import save_file

    stored = {
        stored_name(name, sites): _stored_tensor(name, tensor, config) for name, tensor in tensors.items()
    }
    metadata = {METADATA_KEY: json.dumps(dataclasses.asdict(config)), "format": "pt"}
    with atomic_write(path) as partial:
        save_file(stored, partial, metadata)


def may_be_fp8(name: str, tensor: torch.Tensor, embeddings: bool = True) -> bool:
    """Whether fp8 is enough for a weight: for the matrices of the MLLM body, of the last layer's MLP and of K and V.

    That is 99.5 % of the model. Not for the last layer's attention, the reference tokens and the projector, on which the
    tokens depend most. Norms and biases are no matrices.
    name: in the model. embeddings: whether the device finds rows of an fp8 table.
    """
    if "embed_tokens" in name:
        return embeddings
    return tensor.ndim == 2 and (name.startswith(("encoder.", "kv.")) or ".mlp." in name)


def _base_mllm(path: Path, mllm: Path | None, final_layers: int) -> dict[str, Source]:
    """Body of the base MLLM, for checkpoints of the alignment stage, which froze and did not save it."""
    if mllm is None:
        raise ValueError(
            f"{path} holds no MLLM weights (a checkpoint of the alignment stage, in which the MLLM is frozen). "
            "Choose a folder with the base MLLM, Qwen/Qwen2-VL-2B-Instruct: its config.json, its tokenizer and its "
            "weights, not quantized."
        )
    file = open_mllm(mllm)
    sources = {new: Source(file, name) for name, new in translate(file.shapes, MLLM_NAMES).items()}
    layer = re.compile(r"encoder\.layers\.(\d{1,3})\.")
    numbers = {name: int(match[1]) for name in sources if (match := layer.match(name))}
    body = max(numbers.values(), default=-1) + 1 - final_layers
    return {name: source for name, source in sources.items() if numbers.get(name, -1) < body}


def _last_layer(names: Iterable[str]) -> int:
    return max(
        (int(m[1]) for name in names if (m := re.match(r"aggregator\.layers\.(\d{1,3})\.", name))), default=0
    )


def _shape(name: str, source: Source) -> tuple[int, ...]:
    shape = source.file.shapes[source.name]
    if name == "encoder.visual.patch_embed.weight" and shape:
        return shape[0], int(torch.Size(shape[1:]).numel())
    return shape


def _stored_tensor(name: str, tensor: torch.Tensor, config: EasyRefConfig) -> torch.Tensor:
    if name == "encoder.visual.patch_embed.weight":
        tensor = tensor.unflatten(1, (3, config.temporal_patch_size, config.patch_size, config.patch_size))
    return tensor.detach().cpu().contiguous()


def _require_layers(path: Path, shapes: Shapes, sites: Sequence[Site]) -> None:
    """The tensors from which the sizes are read; without them there is nothing to compare the others with."""
    wanted = [
        "encoder.embed_tokens.weight",
        "encoder.visual.patch_embed.weight",
        "encoder.visual.blocks.0.mlp.fc1.weight",
        "aggregator.reference_tokens.weight",
        "aggregator.layers.0.mlp.gate_proj.weight",
        "aggregator.layers.0.self_attn.k_proj.weight",
        "aggregator.projector.0.weight",
        "aggregator.projector.2.weight",
    ]
    _raise_missing(path, [name for name in wanted if name not in shapes])
    flat = [name for name, shape in shapes.items() if 0 in shape or len(shape) < (2 if name in wanted else 1)]
    if flat:
        raise ValueError(
            f"{path}: {len(flat)} tensors hold no weights of a model, first {stored_name(flat[0], sites)} of shape "
            f"{shorten(shapes[flat[0]])}. The file is damaged; download or export it again ({RELEASE})."
        )


def _compare(checkpoint: Checkpoint, found: Shapes) -> None:
    path, sites, wanted = checkpoint.path, checkpoint.sites, expected_shapes(checkpoint)
    _raise_missing(path, sorted(wanted.keys() - found.keys()), sites)
    wrong = [
        f"{stored_name(name, sites)}: found {shorten(tuple(found[name]))}, wanted {tuple(shape)}"
        for name, shape in wanted.items()
        if tuple(found[name]) != tuple(shape)
    ]
    if wrong:
        raise ValueError(
            f"{path}: {len(wrong)} tensors do not have the size the others ask for, first {'; '.join(wrong[:10])}. "
            "The checkpoint and the MLLM folder do not belong together, or the file is damaged."
        )
    unknown = sorted(stored_name(name, sites) for name in found.keys() - wanted.keys())
    if unknown:
        raise ValueError(
            f"{path} holds {len(unknown)} tensors in places where an EasyRef model on Qwen2-VL has none, first "
            f"{', '.join(map(shorten, unknown[:5]))}. It is of another architecture, or damaged; use the release ({RELEASE})."
        )


def _raise_missing(path: Path, missing: list[str], sites: Sequence[Site] = ()) -> None:
    if missing:
        missing = [stored_name(name, sites) for name in missing]
        raise ValueError(
            f"{path} lacks {len(missing)} tensors of an EasyRef model, first {', '.join(missing[:10])}. "
            f"The file is incomplete; download or export it again ({RELEASE})."
        )
