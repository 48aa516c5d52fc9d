"""Qwen2-VL's vision tower and decoder layer, RoPE, KV cache and masks, on an `operations` namespace.

`operations` is torch.nn by default; a host passes its own Linear, LayerNorm, RMSNorm and Embedding, so that
it can stream, cast and evict the weights. Padding masks are (B, S), True at tokens and False at padding,
which is on the left. Qwen2-VL: arXiv 2409.12191; reference: transformers 4.45.2 modeling_qwen2_vl.py.
"""

from __future__ import annotations

import math
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import nn
from torch.nn.functional import gelu, pad, scaled_dot_product_attention, silu

from ..utils.in_place import add_in_place, mul_in_place

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from .config import EasyRefConfig

Rope = tuple["Tensor", "Tensor"]  # cosines and sines, each (tokens, head_dim), float32
LayerKV = tuple["Tensor", "Tensor"]  # keys and values of one decoder layer, see LayerKVCache

VISION_LAYER_NORM_EPS = 1e-6
VISION_ROPE_THETA = 10_000.0


class SkipInit:
    """torch.nn without the random initialisation of Embedding, for modules whose weights come from a file.

    On the meta device that initialisation would import torch._dynamo, which takes a second and 80 MB.
    """

    Linear, LayerNorm, RMSNorm = nn.Linear, nn.LayerNorm, nn.RMSNorm

    class Embedding(nn.Embedding):
        def reset_parameters(self) -> None: ...


def rope_angles(positions: Tensor, dim: int, theta: float) -> Tensor:
    """Angles (tokens, dim / 2) of rotary position embedding, float32."""
    frequencies = theta ** -(torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    return positions.float()[:, None] * frequencies


def text_rope(length: int, config: EasyRefConfig, device: torch.device, start: int = 0) -> Rope:
    """Plain RoPE for positions start .. start + length - 1.

    The authors never pass position_ids, so image tokens too have the positions 0, 1, 2, ... on all three axes
    of M-RoPE, which is then plain RoPE. Qwen2-VL's 2-D image positions differ by 11 % (test_quirks).
    """
    angles = rope_angles(
        torch.arange(start, start + length, device=device), config.head_dim, config.rope_theta
    )
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def image_rope(grid: Tensor, config: EasyRefConfig, device: torch.device) -> Rope:
    """2-D RoPE of the vision tower: half of each head encodes the patch's row, half its column.

    grid: (K, 3) frames, rows, columns in patches, patches in the order of preprocess.patchify.
    """
    m = config.merge_size
    sizes = [(rows, columns) for _, rows, columns in grid.tolist()]
    positions = {
        (rows, columns): rearrange(
            torch.cartesian_prod(torch.arange(rows), torch.arange(columns)),
            "(h mh w mw) yx -> (h w mh mw) yx",
            mh=m,
            mw=m,
            h=rows // m,
        )
        for rows, columns in set(sizes)
    }
    position = torch.cat([positions[size] for size in sizes]).to(device)
    dim = config.vision_width // config.vision_heads // 2
    angles = torch.cat([rope_angles(position[:, axis], dim, VISION_ROPE_THETA) for axis in (0, 1)], dim=-1)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Apply rotary position embedding to x (..., tokens, heads, head_dim), in float32."""
    cos, sin = (t[:, None, : x.shape[-1] // 2] for t in rope)  # both halves are equal
    first, second = x.float().chunk(2, dim=-1)
    halves = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    return torch.cat(halves, dim=-1).to(x.dtype)


class VisionAttention(nn.Module):
    """Self-attention of the vision tower: every patch attends to the patches of its own image."""

    def __init__(self, config: EasyRefConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.heads = config.vision_heads
        self.qkv = operations.Linear(config.vision_width, 3 * config.vision_width, **factory)
        self.proj = operations.Linear(config.vision_width, config.vision_width, **factory)

    def forward(self, x: Tensor, rope: Rope, lengths: list[int]) -> Tensor:
        """x: (patches of the whole group, width); lengths: patches of each image."""
        # The head axis stays behind the patches, because moving it would copy q, k and v.
        q, k, v = rearrange(self.qkv(x), "n (qkv h d) -> qkv n h d", qkv=3, h=self.heads)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        # Consecutive images of equal length form one batch.
        runs = [(length, len(list(run))) for length, run in groupby(lengths)]
        parts = zip(*(t.split([math.prod(run) for run in runs]) for t in (q, k, v)), strict=True)
        out = []
        for (length, _), part in zip(runs, parts, strict=True):
            images = (rearrange(t, "(k n) h d -> k h n d", n=length) for t in part)
            out.append(rearrange(scaled_dot_product_attention(*images), "k h n d -> (k n) (h d)"))
        return self.proj(torch.cat(out) if len(out) > 1 else out[0])


class VisionMLP(nn.Module):
    def __init__(self, config: EasyRefConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.fc1 = operations.Linear(config.vision_width, config.vision_mlp_width, **factory)
        self.fc2 = operations.Linear(config.vision_mlp_width, config.vision_width, **factory)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(mul_in_place(x, (1.702 * x).sigmoid_()))  # QuickGELU


class VisionBlock(nn.Module):
    def __init__(self, config: EasyRefConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.norm1 = operations.LayerNorm(config.vision_width, eps=VISION_LAYER_NORM_EPS, **factory)
        self.attn = VisionAttention(config, operations, **factory)
        self.norm2 = operations.LayerNorm(config.vision_width, eps=VISION_LAYER_NORM_EPS, **factory)
        self.mlp = VisionMLP(config, operations, **factory)

    def forward(self, x: Tensor, rope: Rope, lengths: list[int]) -> Tensor:
        x = add_in_place(x, self.attn(self.norm1(x), rope, lengths))
        return add_in_place(x, self.mlp(self.norm2(x)))


class PatchMerger(nn.Module):
    """Four neighbouring patches -> one image token in the MLLM's width."""

    def __init__(self, config: EasyRefConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        merged = config.vision_width * config.merge_size**2
        self.ln_q = operations.LayerNorm(config.vision_width, eps=VISION_LAYER_NORM_EPS, **factory)
        first = operations.Linear(merged, merged, **factory)
        second = operations.Linear(merged, config.hidden_size, **factory)
        self.mlp = nn.ModuleList([first, nn.Identity(), second])
        self.patches_per_token = config.merge_size**2

    def forward(self, x: Tensor) -> Tensor:
        x = rearrange(self.ln_q(x), "(n m) d -> n (m d)", m=self.patches_per_token)
        return self.mlp[2](gelu(self.mlp[0](x)))


class VisionTower(nn.Module):
    """Patches of a whole group -> image tokens, in one pass with no attention between images."""

    def __init__(self, config: EasyRefConfig, operations: Any = nn, **factory: Any) -> None:
        super().__init__()
        self.config = config
        # Qwen2-VL's Conv3d has stride = kernel: on flattened patches it is a matrix product.
        self.patch_embed = operations.Linear(config.patch_values, config.vision_width, bias=False, **factory)
        self.blocks = nn.ModuleList(
            VisionBlock(config, operations, **factory) for _ in range(config.vision_depth)
        )
        self.merger = PatchMerger(config, operations, **factory)

    def forward(
        self, patches: Tensor, grid: Tensor, after_block: Callable[[], None] = lambda: None
    ) -> Tensor:
        """patches (sum of patches, 1176), grid (K, 3) -> image tokens (sum of patches / 4, D)."""
        x = self.patch_embed(patches)
        rope = image_rope(grid, self.config, x.device)
        lengths = grid.prod(dim=1).tolist()
        for block in self.blocks:
            x = block(x, rope, lengths)
            after_block()
        return self.merger(x)


def attention_mask(
    num_queries: int,
    length: int,
    causal: bool,
    padding_mask: Tensor | None,
    device: torch.device,
    attn_bias: Tensor | None = None,
) -> Tensor | None:
    """Mask of the last `num_queries` of `length` positions: True where a query attends to a key.

    attn_bias: (rows, length), added to the logits of the last `rows` positions; the mask is then additive, in
    its dtype. Returns None where is_causal alone is enough.
    """
    if padding_mask is None and attn_bias is None and (num_queries == length or not causal):
        return None
    # is_causal aligns queries with the first keys, but these queries are the last positions.
    mask = torch.ones(num_queries, length, dtype=torch.bool, device=device)
    mask = mask.tril(length - num_queries) if causal else mask
    if padding_mask is not None:
        # Let padding attend to itself: a fully masked row would softmax to NaN. Its output is never used.
        diagonal = torch.eye(length, dtype=torch.bool, device=device)[-num_queries:]
        mask = (mask & padding_mask[:, None] | diagonal)[:, None]  # -> (B, 1, num_queries, length)
    if attn_bias is None:
        return mask
    attn_bias = pad(attn_bias, (0, 0, num_queries - len(attn_bias), 0))  # -> (num_queries, length)
    return attn_bias.expand(mask.shape).masked_fill(~mask, -torch.inf)


class LayerKVCache:
    """KV cache of one decoder layer: keys after RoPE and values, (B, kv_heads, length, head_dim) each."""

    def __init__(self, key_value: LayerKV | None = None) -> None:
        self.key_value = key_value

    @property
    def length(self) -> int:
        return self.key_value[0].shape[2] if self.key_value else 0

    def append(self, k: Tensor, v: Tensor) -> LayerKV:
        """Append keys and values and return all of them."""
        if self.key_value:
            k, v = (torch.cat([old.to(t), t], dim=2) for old, t in zip(self.key_value, (k, v), strict=True))
        self.key_value = k, v
        return k, v

    def truncate(self, length: int) -> None:
        """Drop everything after the first `length` positions and free its memory."""
        if self.length > length:
            k, v = self.key_value
            self.key_value = (k[:, :, :length].clone(), v[:, :, :length].clone()) if length else None


class SelfAttention(nn.Module):
    """Grouped-query attention of the Qwen2 decoder: biases on q, k, v only."""

    def __init__(self, config: EasyRefConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.q_proj = operations.Linear(config.hidden_size, self.heads * self.head_dim, **factory)
        self.k_proj = operations.Linear(config.hidden_size, self.kv_heads * self.head_dim, **factory)
        self.v_proj = operations.Linear(config.hidden_size, self.kv_heads * self.head_dim, **factory)
        self.o_proj = operations.Linear(self.heads * self.head_dim, config.hidden_size, bias=False, **factory)

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        causal: bool = True,
        num_queries: int | None = None,
        padding_mask: Tensor | None = None,
        attn_bias: Tensor | None = None,
        cache: LayerKVCache | None = None,
    ) -> Tensor:
        """x (B, S, D) -> attention output (B, num_queries, D) of the last positions (None: of all).

        rope: of x's positions. padding_mask: (B, S). attn_bias: (rows, S), see attention_mask.
        cache: keys and values of the positions before x; those of x are appended to it.
        """
        num_queries = num_queries or x.shape[1]
        cos, sin = rope
        q = rearrange(self.q_proj(x[:, -num_queries:]), "b n (h d) -> b n h d", h=self.heads)
        k = rearrange(self.k_proj(x), "b n (h d) -> b n h d", h=self.kv_heads)
        q, k = apply_rope(q, (cos[-num_queries:], sin[-num_queries:])), apply_rope(k, rope)
        k = rearrange(k, "b n h d -> b h n d")
        v = rearrange(self.v_proj(x), "b n (h d) -> b h n d", h=self.kv_heads)
        if cache is not None:
            k, v = cache.append(k, v)
        mask = attention_mask(num_queries, k.shape[2], causal, padding_mask, x.device, attn_bias=attn_bias)
        if padding_mask is not None:
            mask = mask.repeat_interleave(self.kv_heads, dim=0)
        # Each KV head with its query heads is one row of a batch, so that keys and values are not repeated.
        q = rearrange(q, "b n (h g) d -> (b h) g n d", h=self.kv_heads)
        k, v = (t.flatten(0, 1)[:, None].expand(-1, q.shape[1], -1, -1) for t in (k, v))
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None)
        return self.o_proj(rearrange(out, "(b h) g n d -> b n (h g d)", h=self.kv_heads))


class GatedMLP(nn.Module):
    def __init__(self, config: EasyRefConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        hidden, intermediate = config.hidden_size, config.intermediate_size
        self.gate_proj = operations.Linear(hidden, intermediate, bias=False, **factory)
        self.up_proj = operations.Linear(hidden, intermediate, bias=False, **factory)
        self.down_proj = operations.Linear(intermediate, hidden, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        gate = silu(gate, inplace=not gate.requires_grad)
        return self.down_proj(mul_in_place(self.up_proj(x), gate))


class DecoderLayer(nn.Module):
    """One layer of the Qwen2 decoder."""

    def __init__(self, config: EasyRefConfig, operations: Any = nn, **factory: Any) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = operations.RMSNorm(width, eps=eps, **factory)
        self.self_attn = SelfAttention(config, operations, **factory)
        self.post_attention_layernorm = operations.RMSNorm(width, eps=eps, **factory)
        self.mlp = GatedMLP(config, operations, **factory)

    def forward(self, x: Tensor, rope: Rope, **options: Any) -> Tensor:
        """x (B, S, D) -> output (B, num_queries, D) at the last positions; options as for SelfAttention."""
        attended = self.self_attn(self.input_layernorm(x), rope, **options)
        x = add_in_place(x[:, -attended.shape[1] :], attended)
        return add_in_place(x, self.mlp(self.post_attention_layernorm(x)))
