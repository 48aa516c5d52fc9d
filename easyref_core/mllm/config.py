"""Sizes of an EasyRef model, from the checkpoint's tensors, its MLLM's config.json and its metadata."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..utils.errors import shorten

Section = Mapping[str, Any]  # of a config.json, or the metadata
Shapes = Mapping[str, tuple[int, ...]]  # tensor name in this package's own module names -> shape

# Head dimensions of Qwen/Qwen2-VL-2B-Instruct, for a checkpoint without an MLLM folder.
QWEN2_VL_HEAD_DIM, QWEN2_VL_VISION_HEAD_DIM = 128, 80
# Names by a config.json's model_type, and of its sizes by hidden_size.
MLLMS: dict[str, tuple[str, dict[int, str]]] = {
    "qwen2_vl": ("Qwen2-VL", {1536: "2B", 3584: "7B", 8192: "72B"}),
    "qwen2_5_vl": ("Qwen2.5-VL", {2048: "3B", 3584: "7B", 5120: "32B", 8192: "72B"}),
    "qwen3_vl": ("Qwen3-VL", {}),
    "qwen2_5_omni": ("Qwen2.5-Omni", {}),
    "qwen2": ("Qwen2, which takes only text", {}),
    "qwen3": ("Qwen3, which takes only text", {}),
}
CHOOSE_FOLDER = "Choose the MLLM folder (config.json, tokenizer) that the checkpoint was trained with."
DAMAGED = "The MLLM's config.json or the checkpoint's metadata is damaged; download or export it again."


@dataclasses.dataclass(frozen=True)
class EasyRefConfig:
    """Sizes and switches of one EasyRef model. Widths are in channels, counts in modules or tokens."""

    # MLLM body and final layer (Qwen2 decoder)
    vocab_size: int
    hidden_size: int  # D, 1536 in the released model
    intermediate_size: int
    body_layers: int  # 27: all decoder layers of the MLLM but the last
    final_layers: int  # 1: the decoder layers that process the reference tokens
    heads: int
    kv_heads: int
    rms_norm_eps: float
    rope_theta: float
    max_positions: int  # longest context of the MLLM, reference tokens included
    # vision tower (Qwen2-VL)
    vision_depth: int
    vision_width: int
    vision_mlp_width: int
    vision_heads: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    # aggregation
    num_tokens: int  # T, 64
    projector_width: int
    token_width: int  # C, 2048: the width of SDXL's text conditioning
    lora_rank: int  # 0: the checkpoint has no LoRA
    causal: bool = True  # the final layer's attention; the released model was trained causal (test_quirks.py)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads

    @property
    def patch_values(self) -> int:
        """Values of one flattened patch: 3 channels x 2 frames x 14 x 14 = 1176."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    @property
    def pixels_per_token(self) -> int:
        """Side in pixels of the square that one image token represents: 28."""
        return self.patch_size * self.merge_size

    @classmethod
    def from_checkpoint(
        cls, shapes: Shapes, mllm: Section | None = None, metadata: Section | None = None
    ) -> EasyRefConfig:
        """Sizes of the model whose tensors have these shapes.

        mllm: the parsed config.json of the MLLM folder, if there is one. It overrides `metadata`, the sizes
        in an EasyRef file that this package saved. Raises ValueError if the folder and the tensors disagree.
        """
        text, vision = _mllm_sections(mllm)
        metadata = metadata or {}
        sizes = _sizes_from_shapes(shapes)
        # before the heads, because another model's folder would give a wrong number of heads for this width
        widths = {
            "hidden_size": (text.get("hidden_size"), sizes["hidden_size"]),
            "vision embed_dim": (vision.get("embed_dim"), sizes["vision_width"]),
        }
        _require_same(widths, mllm)
        settings = _settings(sizes, text, vision, metadata)
        k_width = shapes["aggregator.layers.0.self_attn.k_proj.weight"][0]
        kv_heads = k_width // (sizes["hidden_size"] // settings["heads"])
        config = cls(**sizes, **settings, kv_heads=kv_heads, causal=metadata.get("causal", True))
        config._require_consistent(shapes["encoder.visual.patch_embed.weight"][1])
        _require_same(_folder_sizes(config, text, vision), mllm)
        return config

    def _require_consistent(self, patch_values: int) -> None:
        """Raise ValueError for inconsistent sizes. patch_values: input width of the vision tower."""
        if patch_values != self.patch_values:
            raise ValueError(
                f"The MLLM's config.json describes patches of {self.patch_values} values, but the "
                f"checkpoint's vision tower takes {patch_values}. {CHOOSE_FOLDER}"
            )
        if self.heads % max(self.kv_heads, 1) or self.max_positions <= self.num_tokens:
            raise ValueError(
                f"Inconsistent sizes: num_attention_heads ({self.heads}) is not a multiple of "
                f"num_key_value_heads ({self.kv_heads}), or the context ({self.max_positions}) is not "
                f"longer than the {self.num_tokens} reference tokens. {CHOOSE_FOLDER}"
            )


def mllm_name(mllm: Section) -> str:
    """Name of the model that a config.json describes, such as Qwen2-VL-7B."""
    kind, (text, _) = mllm.get("model_type"), _mllm_sections(mllm)
    hidden = text.get("hidden_size")
    if not isinstance(kind, str) or kind not in MLLMS:
        return "another model"
    name, sizes = MLLMS[kind]
    size = sizes.get(hidden) if isinstance(hidden, int) else None
    return f"{name}-{size}" if size else name


def _mllm_sections(mllm: Section | None) -> tuple[Section, Section]:
    """Text and vision sections of a config.json; newer transformers nest the former under "text_config"."""
    if mllm is None:
        return {}, {}
    return {**mllm, **_section(mllm, "text_config")}, _section(mllm, "vision_config")


def _section(config: Section, name: str) -> Section:
    """A section of a config.json, or {}."""
    section = config.get(name) or {}
    if not isinstance(section, Mapping):
        raise ValueError(f"{name} is {shorten(repr(section))}; wanted a JSON object. {DAMAGED}")
    return section


def _sizes_from_shapes(shapes: Shapes) -> dict[str, int]:
    """The fields of EasyRefConfig that tensor shapes determine."""
    vocab_size, hidden_size = shapes["encoder.embed_tokens.weight"]
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": shapes["aggregator.layers.0.mlp.gate_proj.weight"][0],
        "body_layers": _count(shapes, r"encoder\.layers\.(\d{1,3})\."),
        "final_layers": _count(shapes, r"aggregator\.layers\.(\d{1,3})\."),
        "vision_depth": _count(shapes, r"encoder\.visual\.blocks\.(\d{1,3})\."),
        "vision_width": shapes["encoder.visual.patch_embed.weight"][0],
        "vision_mlp_width": shapes["encoder.visual.blocks.0.mlp.fc1.weight"][0],
        "num_tokens": shapes["aggregator.reference_tokens.weight"][0],
        "projector_width": shapes["aggregator.projector.0.weight"][0],
        "token_width": shapes["aggregator.projector.2.weight"][0],
        "lora_rank": next((s[0] for k, s in shapes.items() if k.endswith("_lora.down.weight")), 0),
    }


def _settings(sizes: Mapping[str, int], text: Section, vision: Section, metadata: Section) -> dict[str, Any]:
    """The other fields, from the MLLM's config.json, else from the metadata, else Qwen2-VL's values."""
    hidden, vision_width = sizes["hidden_size"], sizes["vision_width"]
    sources = {
        "heads": (text, ("num_attention_heads",), hidden // QWEN2_VL_HEAD_DIM),
        "vision_heads": (vision, ("num_heads",), vision_width // QWEN2_VL_VISION_HEAD_DIM),
        "temporal_patch_size": (vision, ("temporal_patch_size",), 2),
        "patch_size": (vision, ("spatial_patch_size", "patch_size"), 14),
        "max_positions": (text, ("max_position_embeddings",), 32768),
        "merge_size": (vision, ("spatial_merge_size",), 2),
    }
    try:
        settings = {field: _setting(field, *source, metadata) for field, source in sources.items()}
    except ValueError as error:
        if text or metadata:
            raise
        raise ValueError(
            f"The checkpoint's MLLM is {hidden} wide (vision tower {vision_width}), too narrow for a "
            "Qwen2-VL-2B (1536 and 1280), and its tensors do not tell how many attention heads it has. "
            f"{CHOOSE_FOLDER}"
        ) from error
    # RoPE needs even head dimensions, and in two dimensions multiples of 4
    _require_divisible("The MLLM", hidden, settings["heads"], 2)
    _require_divisible("The vision tower", vision_width, settings["vision_heads"], 4)
    eps, theta = _number("rms_norm_eps", 1e-6, text, metadata), _rope_theta(text, metadata)
    return settings | {"rms_norm_eps": eps, "rope_theta": theta}


def _setting(field: str, section: Section, keys: Sequence[str], default: int, metadata: Section) -> int:
    """A count or width from the first of `keys` in a section of config.json, else from the metadata.

    Raises ValueError for a value that is not a positive integer.
    """
    value = next((section[key] for key in keys if key in section), metadata.get(field, default))
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31:
        return value
    raise ValueError(f"{field} is {shorten(repr(value))}; wanted a whole number from 1. {DAMAGED}")


def _number(name: str, default: float, *sections: Section) -> float:
    """A positive number from the first section that has it."""
    value = next((section[name] for section in sections if name in section), default)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and 0 < value < 1e30:  # False for NaN too
        return float(value)
    raise ValueError(f"{name} is {shorten(repr(value))}; wanted a positive number. {DAMAGED}")


def _require_divisible(name: str, width: int, heads: int, multiple: int) -> None:
    """Raise ValueError unless all heads have the same dimension, a multiple of `multiple`."""
    if width % heads or width // heads % multiple:
        raise ValueError(
            f"{name} is {width} wide, which {heads} attention heads do not divide into whole multiples of "
            f"{multiple}. {CHOOSE_FOLDER}"
        )


def _rope_theta(text: Section, metadata: Section) -> float:
    """rope_theta, which newer transformers nest in "rope_parameters" (5.x) or "rope_scaling"."""
    nested = (_section(text, name) for name in ("rope_parameters", "rope_scaling"))
    return _number("rope_theta", 1e6, text, *nested, metadata)


def _count(shapes: Shapes, pattern: str) -> int:
    """Length of a numbered list of modules: the highest index + 1."""
    return 1 + max((int(m[1]) for key in shapes if (m := re.match(pattern, key))), default=-1)


def _folder_sizes(config: EasyRefConfig, text: Section, vision: Section) -> dict[str, tuple[Any, int]]:
    """{name: (size in the MLLM folder's config.json or None, size in the checkpoint)}."""
    total_layers = config.body_layers + config.final_layers
    return {
        "intermediate_size": (text.get("intermediate_size"), config.intermediate_size),
        "num_hidden_layers": (text.get("num_hidden_layers"), total_layers),
        "vocab_size": (text.get("vocab_size"), config.vocab_size),
        "num_key_value_heads": (text.get("num_key_value_heads"), config.kv_heads),
        "vision depth": (vision.get("depth"), config.vision_depth),
    }


def _require_same(pairs: Mapping[str, tuple[Any, int]], mllm: Section | None) -> None:
    """Raise ValueError unless the MLLM folder describes the MLLM in the checkpoint."""
    wrong = [
        f"{name}: folder {shorten(folder)}, checkpoint {checkpoint}"
        for name, (folder, checkpoint) in pairs.items()
        if folder is not None and folder != checkpoint
    ]
    if wrong:
        raise ValueError(
            f"The MLLM folder does not belong to this checkpoint ({'; '.join(wrong)}). It holds "
            f"{mllm_name(mllm or {})}. Choose the folder of the MLLM it was trained with; the released "
            "EasyRef uses Qwen2-VL-2B-Instruct."
        )
