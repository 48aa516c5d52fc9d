"""The MLLM as the installed transformers (4.50 or newer) computes it, on the same sizes and weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, Qwen2VLConfig

    from easyref_core.mllm.config import EasyRefConfig
    from easyref_core.mllm.group_encoder import GroupEncoder


def transformers_config(config: EasyRefConfig) -> Qwen2VLConfig:
    """The same sizes, the decoder without its last layer."""
    from transformers import Qwen2VLConfig

    half = config.head_dim // 2
    sections = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]  # 16, 24, 24 of 64, as released
    return Qwen2VLConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.body_layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_theta,
        rope_scaling={"type": "default", "rope_type": "default", "mrope_section": sections},
        max_position_embeddings=config.max_positions,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        vision_config={
            "depth": config.vision_depth,
            "embed_dim": config.vision_width,
            "hidden_size": config.hidden_size,
            "num_heads": config.vision_heads,
            "mlp_ratio": config.vision_mlp_width // config.vision_width,
            "patch_size": config.patch_size,
        },
    )


def vision_tower(config: EasyRefConfig) -> PreTrainedModel:
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel as Tower

    sizes = transformers_config(config).vision_config
    return Tower._from_config(sizes, attn_implementation="sdpa").eval()


def text_model(config: EasyRefConfig) -> PreTrainedModel:
    from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2_vl

    kind = getattr(qwen2_vl, "Qwen2VLTextModel", None) or qwen2_vl.Qwen2VLModel  # the latter before 4.52
    sizes = transformers_config(config).get_text_config()
    return kind._from_config(sizes, attn_implementation="sdpa").eval()


class TransformersBody:
    """transformers' vision tower and decoder: patches, grid, ids -> states (1, S, D)."""

    def __init__(self, tower: PreTrainedModel, text: PreTrainedModel, image_token: int) -> None:
        self.tower, self.text, self.image_token = tower, text, image_token

    def __call__(self, patches: Tensor, grid: Tensor, ids: Tensor) -> Tensor:
        seen: Any = self.tower(patches, grid_thw=grid.to(ids.device))
        seen = getattr(seen, "pooler_output", seen)  # from 5.0 on
        x = self.text.get_input_embeddings()(ids)
        x = x.masked_scatter((ids == self.image_token)[..., None], seen.to(x.dtype))
        # as the authors' code: plain positions, also over images
        places = torch.arange(ids.shape[1], device=ids.device)[None, None].expand(3, 1, -1)
        return self.text(inputs_embeds=x, position_ids=places, use_cache=False).last_hidden_state


def body_of(encoder: GroupEncoder, image_token: int, device: torch.device) -> TransformersBody | None:
    """The same MLLM body, sharing the encoder's weights; None where transformers is not installed."""
    try:
        with torch.device("meta"):
            tower, text = vision_tower(encoder.config), text_model(encoder.config)
    except ImportError:
        return None
    _share(tower, encoder.visual.state_dict(), device)
    _share(text, {k: v for k, v in encoder.state_dict().items() if not k.startswith("visual.")}, device)
    return TransformersBody(tower, text, image_token)


def _share(theirs: nn.Module, ours: dict[str, Tensor], device: torch.device) -> None:
    """Give a module of transformers our weights, not copies of them, and its buffers their values."""
    wanted = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    named = {name.replace("patch_embed.weight", "patch_embed.proj.weight"): t for name, t in ours.items()}
    theirs.load_state_dict({name: named[name].view(shape) for name, shape in wanted.items()}, assign=True)
    for module in list(theirs.modules()):  # rotary frequencies, which are computed and not stored
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                setattr(module, name, _frequencies(module, buffer).to(device))


def _frequencies(module: nn.Module, buffer: Tensor) -> Tensor:
    dim = 2 * len(buffer)
    theta = getattr(module, "theta", 10_000.0)
    if hasattr(module, "config"):
        text = module.config
        theta = getattr(text, "rope_theta", None) or text.rope_parameters["rope_theta"]
    return theta ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
