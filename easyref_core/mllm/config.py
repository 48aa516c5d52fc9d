"""Every size of an EasyRef model, once: read from the checkpoint's tensors, its MLLM's config.json and its metadata."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from ..utils.errors import shorten

Shapes = Mapping[str, tuple[int, ...]]  # tensor name in this package's own module names -> shape

# What no tensor shape tells. These are Qwen2-VL-2B's values (Qwen/Qwen2-VL-2B-Instruct config.json), used where the
# checkpoint comes without an MLLM folder; a folder's config.json overrides them.
QWEN2_VL_HEAD_DIM = 128
QWEN2_VL_VISION_HEAD_DIM = 80
QWEN2_VL_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
}
# What a config.json's model_type is called, and its sizes by hidden_size.
MLLM_TYPES = {
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "qwen2_5_omni": "Qwen2.5-Omni",
    "qwen2": "Qwen2, which reads text alone",
    "qwen3": "Qwen3, which reads text alone",
}
MLLM_SIZES = {
    ("qwen2_vl", 1536): "2B",
    ("qwen2_vl", 3584): "7B",
    ("qwen2_vl", 8192): "72B",
    ("qwen2_5_vl", 2048): "3B",
    ("qwen2_5_vl", 3584): "7B",
    ("qwen2_5_vl", 5120): "32B",
    ("qwen2_5_vl", 8192): "72B",
}
DAMAGED = "The MLLM's config.json or the checkpoint's metadata is damaged; download or export it again."


@dataclasses.dataclass(frozen=True)
class EasyRefConfig:
    """Sizes and switches of one EasyRef model. Widths are in channels, counts in modules or tokens."""

    # MLLM body and final layer (Qwen2 decoder)
    vocab_size: int
    hidden_size: int  # D, 1536 in the released model
    intermediate_size: int
    body_layers: int  # 27: all decoder layers of the MLLM but the last
    final_layers: int  # 1: the layer(s) that see the reference tokens
    heads: int
    kv_heads: int
    rms_norm_eps: float
    rope_theta: float
    max_positions: int  # longest context the MLLM was made for, reference tokens included
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
    causal: bool = True  # the final layer's attention; the released model runs, and was trained, causal (see parity notes)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads

    @property
    def patch_values(self) -> int:
        """Values of one flattened patch: 3 channels x 2 frames x 14 x 14 = 1176."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    @property
    def pixels_per_token(self) -> int:
        """Side in pixels of the square one image token stands for: 28."""
        return self.patch_size * self.merge_size

    @classmethod
    def read(
        cls, shapes: Shapes, mllm: Mapping[str, Any] | None = None, metadata: Mapping[str, Any] | None = None
    ) -> EasyRefConfig:
        """Sizes of the model whose tensors have these shapes.

        mllm: the parsed config.json of the MLLM folder, if there is one; it wins over `metadata`, the sizes an EasyRef
        file of our own carries. Raises ValueError where the folder and the tensors disagree.
        """
        text, vision = _mllm_sections(mllm)
        known = dict(metadata or {})

        def setting(field: str, *keys: str, of: Mapping[str, Any] = text, default: int) -> int:
            found = [of[key] for key in keys if key in of]
            return _size(field, found[0] if found else known.get(field, default))

        hidden = shapes["encoder.embed_tokens.weight"][1]
        vision_width, patch_values = shapes["encoder.visual.patch_embed.weight"]
        # before the heads, which another model's folder would give for this checkpoint's width
        widths = {
            "hidden_size": (text.get("hidden_size"), hidden),
            "vision embed_dim": (vision.get("embed_dim"), vision_width),
        }
        _require_same(widths, mllm)
        try:
            heads = setting("heads", "num_attention_heads", default=hidden // QWEN2_VL_HEAD_DIM)
            vision_heads = setting(
                "vision_heads", "num_heads", of=vision, default=vision_width // QWEN2_VL_VISION_HEAD_DIM
            )
        except ValueError as error:
            if mllm or known:
                raise
            raise ValueError(
                f"The checkpoint's MLLM is {hidden} wide (vision tower {vision_width}), too narrow for a Qwen2-VL-2B "
                "(1536 and 1280), and its tensors do not tell how many attention heads it has. "
                "Choose the MLLM folder (config.json, tokenizer) it was trained with."
            ) from error
        _require_whole_heads("The MLLM", hidden, heads, 2)
        _require_whole_heads("The vision tower", vision_width, vision_heads, 4)
        head_dim = hidden // heads
        temporal = setting("temporal_patch_size", "temporal_patch_size", of=vision, default=2)
        patch = setting("patch_size", "spatial_patch_size", "patch_size", of=vision, default=14)
        config = cls(
            vocab_size=shapes["encoder.embed_tokens.weight"][0],
            hidden_size=hidden,
            intermediate_size=shapes["aggregator.layers.0.mlp.gate_proj.weight"][0],
            body_layers=_count(shapes, r"encoder\.layers\.(\d{1,3})\."),
            final_layers=_count(shapes, r"aggregator\.layers\.(\d{1,3})\."),
            heads=heads,
            kv_heads=shapes["aggregator.layers.0.self_attn.k_proj.weight"][0] // head_dim,
            rms_norm_eps=_number("rms_norm_eps", text, known),
            rope_theta=_rope_theta(text, known),
            max_positions=setting(
                "max_positions",
                "max_position_embeddings",
                default=QWEN2_VL_DEFAULTS["max_position_embeddings"],
            ),
            vision_depth=_count(shapes, r"encoder\.visual\.blocks\.(\d{1,3})\."),
            vision_width=vision_width,
            vision_mlp_width=shapes["encoder.visual.blocks.0.mlp.fc1.weight"][0],
            vision_heads=vision_heads,
            patch_size=patch,
            temporal_patch_size=temporal,
            merge_size=setting("merge_size", "spatial_merge_size", of=vision, default=2),
            num_tokens=shapes["aggregator.reference_tokens.weight"][0],
            projector_width=shapes["aggregator.projector.0.weight"][0],
            token_width=shapes["aggregator.projector.2.weight"][0],
            lora_rank=next((s[0] for k, s in shapes.items() if k.endswith("_lora.down.weight")), 0),
            causal=known.get("causal", True),
        )
        if patch_values != config.patch_values:
            raise ValueError(
                f"The MLLM's config.json describes patches of {config.patch_values} values, "
                f"the checkpoint's vision tower reads {patch_values}. Choose the MLLM folder it was trained with."
            )
        _require_same(_folder_sizes(config, text, vision), mllm)
        if config.heads % max(config.kv_heads, 1) or config.max_positions <= config.num_tokens:
            raise ValueError(
                f"A model of {config.heads} attention heads, {config.kv_heads} of keys and values, and a context of "
                f"{config.max_positions} tokens for {config.num_tokens} reference tokens cannot be. "
                "Choose the MLLM folder (config.json, tokenizer) the checkpoint was trained with."
            )
        return config


def mllm_name(mllm: Mapping[str, Any]) -> str:
    """The name of the model that a config.json describes, such as Qwen2-VL-7B."""
    kind, (text, _) = mllm.get("model_type"), _mllm_sections(mllm)
    hidden = text.get("hidden_size")
    known = isinstance(kind, str) and isinstance(hidden, int)
    size = MLLM_SIZES.get((kind, hidden)) if known else None
    name = MLLM_TYPES.get(kind, "another model") if isinstance(kind, str) else "another model"
    return f"{name}-{size}" if size else name


def _mllm_sections(mllm: Mapping[str, Any] | None) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Text and vision part of a config.json; newer transformers nest the text part under "text_config"."""
    if mllm is None:
        return {}, {}
    return {**mllm, **_section(mllm, "text_config")}, _section(mllm, "vision_config")


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A part of a config.json, {} where it has none."""
    section = config.get(name) or {}
    if not isinstance(section, Mapping):
        raise ValueError(f"{name} is {shorten(repr(section))}; wanted a JSON object. {DAMAGED}")
    return section


def _size(name: str, value: Any) -> int:
    """A count or width as a file gives it. Raises ValueError for what is none."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31:
        return value
    raise ValueError(f"{name} is {shorten(repr(value))}; wanted a whole number from 1. {DAMAGED}")


def _number(name: str, *sections: Mapping[str, Any]) -> float:
    """A positive number from the first section that has it, or Qwen2-VL's own."""
    value = next((section[name] for section in sections if name in section), QWEN2_VL_DEFAULTS[name])
    if (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and 0 < value < 1e30
        and math.isfinite(value)
    ):
        return float(value)
    raise ValueError(f"{name} is {shorten(repr(value))}; wanted a positive number. {DAMAGED}")


def _require_whole_heads(what: str, width: int, heads: int, multiple: int) -> None:
    """Every head is as wide as the others, and as its rotary embedding asks: a multiple of 2, of 4 in two dimensions."""
    if width % heads or width // heads % multiple:
        raise ValueError(
            f"{what} is {width} wide, which {heads} attention heads do not divide into whole multiples of {multiple}. "
            "Choose the MLLM folder (config.json, tokenizer) the checkpoint was trained with."
        )


def _rope_theta(text: Mapping[str, Any], known: Mapping[str, Any]) -> float:
    """Newer transformers keep rope_theta inside "rope_parameters" (5.x) or "rope_scaling"."""
    nested = (_section(text, name) for name in ("rope_parameters", "rope_scaling"))
    return _number("rope_theta", text, *nested, known)


def _count(shapes: Shapes, pattern: str) -> int:
    """How many layers a numbered list of modules has: the highest index + 1."""
    return 1 + max((int(m[1]) for key in shapes if (m := re.match(pattern, key))), default=-1)


def _folder_sizes(
    config: EasyRefConfig, text: Mapping[str, Any], vision: Mapping[str, Any]
) -> dict[str, tuple[Any, int]]:
    """{name: (size in the MLLM folder's config.json, size in the checkpoint)}; None where config.json has none."""
    total_layers = config.body_layers + config.final_layers
    return {
        "intermediate_size": (text.get("intermediate_size"), config.intermediate_size),
        "num_hidden_layers": (text.get("num_hidden_layers"), total_layers),
        "vocab_size": (text.get("vocab_size"), config.vocab_size),
        "num_key_value_heads": (text.get("num_key_value_heads"), config.kv_heads),
        "vision depth": (vision.get("depth"), config.vision_depth),
    }


def _require_same(pairs: Mapping[str, tuple[Any, int]], mllm: Mapping[str, Any] | None) -> None:
    """The MLLM folder must describe the MLLM in the checkpoint: a 7B's folder beside a 2B's weights is an error."""
    wrong = [
        f"{name}: folder {shorten(folder)}, checkpoint {checkpoint}"
        for name, (folder, checkpoint) in pairs.items()
        if folder is not None and folder != checkpoint
    ]
    if wrong:
        raise ValueError(
            f"The MLLM folder does not belong to this checkpoint ({'; '.join(wrong)}). It holds {mllm_name(mllm or {})}. "
            "Choose the folder of the MLLM it was trained with; the released EasyRef uses Qwen2-VL-2B-Instruct."
        )
