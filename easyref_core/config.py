"""Every size of an EasyRef model, once: read from the checkpoint's tensors, its MLLM's config.json and its metadata."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

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

        def setting(field: str, *keys: str, of: Mapping[str, Any] = text, default: Any) -> Any:
            found = [of[key] for key in keys if key in of]
            return found[0] if found else known.get(field, default)

        hidden = shapes["encoder.embed_tokens.weight"][1]
        heads = setting("heads", "num_attention_heads", default=hidden // QWEN2_VL_HEAD_DIM)
        vision_width, patch_values = shapes["encoder.visual.patch_embed.weight"]
        vision_heads = setting(
            "vision_heads", "num_heads", of=vision, default=vision_width // QWEN2_VL_VISION_HEAD_DIM
        )
        if not heads or not vision_heads:
            raise ValueError(
                f"The checkpoint's MLLM is {hidden} wide (vision tower {vision_width}), too narrow for a Qwen2-VL-2B "
                "(1536 and 1280), and its tensors do not tell how many attention heads it has. "
                "Choose the MLLM folder (config.json, tokenizer) it was trained with."
            )
        head_dim = hidden // heads
        temporal = setting("temporal_patch_size", "temporal_patch_size", of=vision, default=2)
        patch = setting("patch_size", "spatial_patch_size", "patch_size", of=vision, default=14)
        config = cls(
            vocab_size=shapes["encoder.embed_tokens.weight"][0],
            hidden_size=hidden,
            intermediate_size=shapes["aggregator.layers.0.mlp.gate_proj.weight"][0],
            body_layers=_count(shapes, r"encoder\.layers\.(\d+)\."),
            final_layers=_count(shapes, r"aggregator\.layers\.(\d+)\."),
            heads=heads,
            kv_heads=shapes["aggregator.layers.0.self_attn.k_proj.weight"][0] // head_dim,
            rms_norm_eps=setting("rms_norm_eps", "rms_norm_eps", default=QWEN2_VL_DEFAULTS["rms_norm_eps"]),
            rope_theta=_rope_theta(text, known),
            max_positions=setting(
                "max_positions",
                "max_position_embeddings",
                default=QWEN2_VL_DEFAULTS["max_position_embeddings"],
            ),
            vision_depth=_count(shapes, r"encoder\.visual\.blocks\.(\d+)\."),
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
        _check_folder(config, text, vision)
        return config


def _mllm_sections(mllm: Mapping[str, Any] | None) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Text and vision part of a config.json; newer transformers nest the text part under "text_config"."""
    if mllm is None:
        return {}, {}
    return {**mllm, **(mllm.get("text_config") or {})}, mllm.get("vision_config") or {}


def _rope_theta(text: Mapping[str, Any], known: Mapping[str, Any]) -> float:
    """Newer transformers keep rope_theta inside "rope_parameters" (5.x) or "rope_scaling"."""
    for section in (text, text.get("rope_parameters") or {}, text.get("rope_scaling") or {}, known):
        if "rope_theta" in section:
            return section["rope_theta"]
    return QWEN2_VL_DEFAULTS["rope_theta"]


def _count(shapes: Shapes, pattern: str) -> int:
    """How many layers a numbered list of modules has: the highest index + 1."""
    return 1 + max((int(m[1]) for key in shapes if (m := re.match(pattern, key))), default=-1)


def _check_folder(config: EasyRefConfig, text: Mapping[str, Any], vision: Mapping[str, Any]) -> None:
    """The MLLM folder must describe the MLLM in the checkpoint: a 7B's folder beside a 2B's weights is an error."""
    total_layers = config.body_layers + config.final_layers
    pairs = {
        "hidden_size": (text.get("hidden_size"), config.hidden_size),
        "intermediate_size": (text.get("intermediate_size"), config.intermediate_size),
        "num_hidden_layers": (text.get("num_hidden_layers"), total_layers),
        "vocab_size": (text.get("vocab_size"), config.vocab_size),
        "num_key_value_heads": (text.get("num_key_value_heads"), config.kv_heads),
        "vision depth": (vision.get("depth"), config.vision_depth),
        "vision embed_dim": (vision.get("embed_dim"), config.vision_width),
    }
    wrong = [
        f"{name}: folder {folder}, checkpoint {checkpoint}"
        for name, (folder, checkpoint) in pairs.items()
        if folder is not None and folder != checkpoint
    ]
    if wrong:
        raise ValueError(
            f"The MLLM folder does not belong to this checkpoint ({'; '.join(wrong)}). "
            "Choose the folder of the MLLM it was trained with; the released EasyRef uses Qwen2-VL-2B-Instruct."
        )
