"""Checkpoint formats as data: recognition of EasyRef files, and the mapping from stored to module names.

Understood: the released safetensors; DeepSpeed's mp_rank_00_model_states.pt; stage-1 files without the MLLM
or without LoRA; adapters saved once more as adapter_modules.<i>; a frozen UNet beside them; MLLM keys
as transformers before and after 4.52 name them; this package's own files (the released keys, plus metadata).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from ..unet.layout import Site, in_processor_order, parse_diffusers, sdxl_sites
from ..utils.errors import shorten

log = logging.getLogger(__name__)
Value = TypeVar("Value")

RELEASE = "https://huggingface.co/zongzhuofan/EasyRef"
BASE_MLLM = "https://huggingface.co/Qwen/Qwen2-VL-2B-Instruct"
METADATA_KEY = "easyref"  # in files that `save` writes: JSON of EasyRefConfig

# Stored name -> name in this package's modules. None: known and not needed. The first match decides.
LANGUAGE = r"(?:model\.)?(?:language_model\.)?(?:model\.)?"
MLLM_NAMES = [
    (r"(?:.+\.)?lm_head\.weight", None),  # tied to embed_tokens; the logits are never computed here
    (r".*rotary_(?:pos_)?emb\.inv_freq", None),  # computed, not learned
    (r"(?:model\.)?visual\.patch_embed\.proj\.weight", "encoder.visual.patch_embed.weight"),
    (r"(?:model\.)?visual\.(.+)", r"encoder.visual.\1"),
    (rf"{LANGUAGE}(embed_tokens|layers|norm)\.(.+)", r"encoder.\1.\2"),
]
EASYREF_NAMES = [
    (r"mllm_final_layer\..*rotary_emb\.inv_freq", None),
    *((rf"multimodal_llm\.{stored}", name) for stored, name in MLLM_NAMES),
    (r"mllm_final_layer\.reference_tokens", "aggregator.reference_tokens.weight"),
    (r"mllm_final_layer\.(layers|norm)\.(.+)", r"aggregator.\1.\2"),
    (r"mllm_final_layer\..+", None),
    (r"image_proj_model\.proj\.(.+)", r"aggregator.projector.\1"),
    (r"unet\.(.+\.attn2)\.processor\.(to_[kv]_ip)\.weight", r"kv.\1.\2"),
    (r"(unet\..+\.processor\.to_(?:q|k|v|out)_lora\.(?:down|up)\.weight)", r"\1"),
    (r"unet\..+", None),  # training files also hold the frozen UNet
    (r"adapter_modules\..+", None),  # the adapters a second time; see by_processor_path
]

# Patterns that must all occur in an EasyRef file, and the kinds of other files, each with such patterns.
SIGNATURE = [
    r"mllm_final_layer\.reference_tokens",
    r"image_proj_model\.proj\.0\.weight",
    r".*\.to_k_ip\.weight",
]
OTHER_FILES = [
    ("an incomplete one", [r"mllm_final_layer\..+"]),
    ("an IP-Adapter", [r"ip_adapter\..+", r"image_proj\..+"]),
    ("a LoRA", [r".*(?:lora_unet_|lora_te|\.lora_A\.|\.lora_B\.|\.lora_down\.|_lora\.down\.).*"]),
    (
        "a Qwen2-VL model without EasyRef's own layers",
        [r"(?:model\.)?visual\.patch_embed.+", rf"{LANGUAGE}layers\..+"],
    ),
    ("an SDXL checkpoint", [r"model\.diffusion_model\..+", r"conditioner\.embedders\.1\..+"]),
    (
        "a Stable Diffusion 1.x/2.x checkpoint",
        [r"model\.diffusion_model\.input_blocks.+", r"cond_stage_model\..+"],
    ),
    ("a Flux model", [r"(?:model\.diffusion_model\.)?double_blocks\..+"]),
    ("a UNet", [r"(?:model\.diffusion_model\.)?(?:input_blocks|down_blocks)\..+"]),
]

# Tensors that quantizers write beside or in place of a weight: GPTQ and AWQ, bitsandbytes, fp8 with scales,
# compressed-tensors, quanto, HQQ. A model that is not quantized has none of these names.
QUANTIZED = re.compile(
    r".+\.(?:qweight|qzeros|scales|g_idx|SCB|weight_format|W_q|comfy_quant|scale_(?:weight|input)"
    r"|(?:weight|input|output)_scale(?:_inv)?|weight_(?:packed|shape|zero_point|g_idx)"
    r"|weight\.(?:(?:nested_)?(?:absmax|quant_map)|quant_state\..+|_data|_scale))"
)
# Names of EasyRef's modules. A training file may also hold a frozen UNet, which is not read.
EASYREF_MODULES = re.compile(
    r"(?:multimodal_llm|mllm_final_layer|image_proj_model|adapter_modules)\..+|unet\..+\.processor\..+"
)
SAVE_MEMORY = "To save memory, load EasyRef with precision fp8_e4m3fn."


def quantized(names: Iterable[str]) -> list[str]:
    """Names of tensors that only a quantized model has."""
    return [name for name in names if QUANTIZED.fullmatch(name)]


def require_easyref(path: Path, names: Iterable[str]) -> None:
    """Raises ValueError for a file that is not an EasyRef checkpoint, or a quantized one."""
    names = list(names)
    is_easyref = any(name.startswith("mllm_final_layer.") for name in names)
    if is_easyref and (tensors := quantized(filter(EASYREF_MODULES.fullmatch, names))):
        raise ValueError(
            f"{path} is a quantized EasyRef checkpoint ({len(tensors)} tensors such as {shorten(tensors[0])}"
            f"); wanted weights that are not quantized. Download the release, {RELEASE}. {SAVE_MEMORY}"
        )
    if all(_occurs(pattern, names) for pattern in SIGNATURE):
        return
    kind = next(
        (kind for kind, patterns in OTHER_FILES if all(_occurs(p, names) for p in patterns)),
        f"a file of {len(names)} tensors"
        + (f" such as {shorten(', '.join(sorted(names)[:3]))}" if names else ""),
    )
    raise ValueError(
        f"{path} is not an EasyRef checkpoint but {kind}. Wanted: a file with the keys mllm_final_layer.*, "
        f"image_proj_model.* and *.to_k_ip.weight, as released at {RELEASE}."
    )


def translate(names: Iterable[str], table: list[tuple[str, str | None]]) -> dict[str, str]:
    """{stored name: name in the model}; unknown names are logged, names that are not needed are dropped."""
    rules = [(re.compile(pattern), new) for pattern, new in table]
    translated, unknown = {}, []
    for name in names:
        match, new = next(((m, new) for rule, new in rules if (m := rule.fullmatch(name))), (None, None))
        if match is None:
            unknown.append(name)
        elif new is not None:
            translated[name] = match.expand(new)
    if unknown:
        log.warning("EasyRef: %d unknown tensors were ignored, first %s", len(unknown), unknown[:10])
    return translated


def by_processor_path(names: Iterable[str]) -> dict[str, str]:
    """{adapter_modules.<i>.<rest>: unet.<path>.processor.<rest>}.

    i counts self- and cross-attentions alternately, in the order of diffusers' attn_processors.
    """
    paths = [f"{site.diffusers}.{attention}" for site in sdxl_sites() for attention in ("attn1", "attn2")]
    matches = {name: re.fullmatch(r"adapter_modules\.(\d{1,3})\.(.+)", name) for name in names}
    return {
        name: f"unet.{paths[int(match[1])]}.processor.{match[2]}"
        for name, match in matches.items()
        if match and int(match[1]) < len(paths)
    }


def number_sites(tensors: Mapping[str, Value]) -> tuple[list[Site], dict[str, Value]]:
    """kv.<path>.to_k_ip -> kv.to_k_ip.<i>, i counting the sites in processor order."""
    site_of = {name: parse_diffusers(name.split(".", 1)[1]) for name in tensors if name.startswith("kv.")}
    sites = in_processor_order({site for site in site_of.values() if site})
    rename = {
        name: f"kv.{name.rsplit('.', 1)[1]}.{sites.index(site)}.weight"
        for name, site in site_of.items()
        if site
    }
    return sites, {rename.get(name, name): tensor for name, tensor in tensors.items()}


def stored_name(name: str, sites: Sequence[Site]) -> str:
    """Name of a tensor of the model in the released files; an unknown name stays as it is."""
    if match := re.fullmatch(r"kv\.(to_[kv]_ip)\.(\d+)\.weight", name):
        return f"unet.{sites[int(match[2])].diffusers}.attn2.processor.{match[1]}.weight"
    table = [
        ("encoder.visual.patch_embed.weight", "multimodal_llm.visual.patch_embed.proj.weight"),
        ("encoder.visual.", "multimodal_llm.visual."),
        ("encoder.", "multimodal_llm.model."),
        ("aggregator.reference_tokens.weight", "mllm_final_layer.reference_tokens"),
        ("aggregator.projector.", "image_proj_model.proj."),
        ("aggregator.", "mllm_final_layer."),
    ]
    return next((stored + name.removeprefix(new) for new, stored in table if name.startswith(new)), name)


def _occurs(pattern: str, names: Iterable[str]) -> bool:
    rule = re.compile(pattern)
    return any(rule.fullmatch(name) for name in names)
