"""IP-Adapter (arXiv 2308.06721) as in diffusers, with averaged or concatenated CLIP image embeddings."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..record import fingerprint
from .clip_pixels import clip_pixels
from .method import Method, Task

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

EMBEDDINGS = ("average", "concatenation")

# The file format of IP-Adapter: {"image_proj": {...}, "ip_adapter": {"1.to_k_ip.weight": ...}}.
AdapterState = Mapping[str, Mapping[str, "Tensor"]]


class Adapter(NamedTuple):
    """Modules that an IP-Adapter puts into a UNet."""

    processors: Mapping[str, Any]  # of every attention, by name
    projection: nn.Module | None  # image embeddings -> image tokens
    kind: str | None  # the UNet's encoder_hid_dim_type


@dataclasses.dataclass(eq=False)
class IPAdapter(Method):
    """IP-Adapter; the image encoder encodes each reference alone.

    weights: an IP-Adapter for SDXL (.safetensors or .bin), plain or "plus". image_encoder: folder of its
    CLIPVisionModelWithProjection.
    embeddings: "average" projects the mean of the references' embeddings; "concatenation" projects each and
    concatenates the tokens, as diffusers does for several images.
    """

    kind = "ip_adapter"
    condition_remedy = "Check the files of the weights and of the image encoder."

    weights: str
    image_encoder: str
    embeddings: str = "average"
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.embeddings not in EMBEDDINGS:
            raise ValueError(
                f"The embeddings are {self.embeddings!r}; wanted one of {', '.join(EMBEDDINGS)}."
            )
        state = load_state(Path(self.weights))
        self.adapter = load_adapter(self.base.unet, state)
        for _, processor in image_processors(self.adapter):
            processor.scale = [self.weight]
        self.encoder = load_image_encoder(self.image_encoder).to(self.base.device)
        self.plus = "latents" in state["image_proj"]
        flat = fingerprint(flatten(state)) + fingerprint(self.encoder.state_dict())
        self.fingerprint = hashlib.sha256(flat.encode()).hexdigest()[:16]

    @property
    def settings(self) -> dict[str, Any]:
        settings = super().settings | {"weights": self.fingerprint}
        del settings["image_encoder"]  # part of the fingerprint
        return settings

    def batch_key(self, task: Task) -> Hashable:
        return len(task.references) if self.embeddings == "concatenation" else None

    @torch.inference_mode()
    def prepare(self, task: Task, folder: Path) -> tuple[Tensor, Tensor]:
        """Unconditional and conditional embeddings, each (1, N, D), or (1, N, S, D) for "plus" weights."""
        pixels = clip_pixels(task.references, self.encoder.config.image_size).to(self.base.device)
        cond = self.embed(pixels)
        # as diffusers' pipeline: zero embeddings, or the hidden states of a zero image
        uncond = self.embed(torch.zeros_like(pixels)) if self.plus else torch.zeros_like(cond)
        if self.embeddings == "average":
            uncond, cond = uncond.mean(dim=0, keepdim=True), cond.mean(dim=0, keepdim=True)
        return uncond[None], cond[None]

    @contextmanager
    def attach(self, conditions: Sequence[tuple[Tensor, Tensor]], seeds: int) -> Iterator[None]:
        halves = [torch.cat(half) for half in zip(*conditions, strict=True)]  # unconditional, conditional
        embeds = torch.cat([half.repeat_interleave(seeds, dim=0) for half in halves])  # -> (2 G seeds, N, D)
        embeds = embeds.to(self.base.unet.dtype)
        with attached(self.base.unet, self.adapter), embedding(self.base.unet, embeds):
            yield

    def embed(self, pixels: Tensor) -> Tensor:
        """Image embeddings (N, D), or hidden states (N, S, D) for "plus" weights."""
        if self.plus:
            return self.encoder(pixels, output_hidden_states=True).hidden_states[-2]
        return self.encoder(pixels).image_embeds


def load_image_encoder(folder: str | Path) -> nn.Module:
    """Load a frozen CLIPVisionModelWithProjection from its folder or from that of a CLIP model."""
    from transformers import CLIPVisionModelWithProjection

    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json: it is not a transformers CLIP folder. Name the IP-Adapter's image "
            "encoder."
        )
    encoder = CLIPVisionModelWithProjection.from_pretrained(folder)  # in the dtype of the file
    return encoder.float().eval().requires_grad_(False)


def load_state(path: Path) -> AdapterState:
    """Load an IP-Adapter file. Raises FileNotFoundError, or ValueError if it is not an IP-Adapter."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no IP-Adapter at {path}. Train one with ip_adapter_training.")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
        for name, tensor in load_file(path).items():
            part, _, rest = name.partition(".")
            state.setdefault(part, {})[rest] = tensor
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not (state.get("image_proj") and state.get("ip_adapter")):
        raise ValueError(
            f"{path} is not an IP-Adapter: it has {', '.join(sorted(state)) or 'nothing'}; wanted image_proj "
            "and ip_adapter."
        )
    return state


def flatten(state: AdapterState) -> dict[str, Tensor]:
    """{part: {name: tensor}} -> {part.name: tensor}, the names in a .safetensors file."""
    return {f"{part}.{name}": tensor for part, tensors in state.items() for name, tensor in tensors.items()}


def image_processors(adapter: Adapter) -> list[tuple[int, nn.Module]]:
    """The processors of the cross-attentions with the numbers of their weights in the file: 1, 3, 5, ..."""
    processors = [p for name, p in adapter.processors.items() if name.endswith("attn2.processor")]
    return [(2 * i + 1, processor) for i, processor in enumerate(processors)]


def load_adapter(unet: UNet2DConditionModel, state: AdapterState) -> Adapter:
    """Create the adapter's modules for this UNet with diffusers' loader; the UNet is left unchanged."""
    with attached(unet, current_adapter(unet)), torch.inference_mode(False):
        unet._load_ip_adapter_weights([state], low_cpu_mem_usage=False)
        return current_adapter(unet)


def current_adapter(unet: UNet2DConditionModel) -> Adapter:
    """The adapter that is in the UNet now, or its own attention processors."""
    # The projection of "plus" weights has attentions too, which the UNet would count among its own.
    processors = {k: p for k, p in unet.attn_processors.items() if not k.startswith("encoder_hid_proj.")}
    return Adapter(processors, unet.encoder_hid_proj, unet.config.encoder_hid_dim_type)


@contextmanager
def attached(unet: UNet2DConditionModel, adapter: Adapter) -> Iterator[None]:
    """Put the adapter into `unet` while the context is open, then restore what was there."""
    before = current_adapter(unet)
    _put(unet, adapter)
    try:
        yield
    finally:
        _put(unet, before)


def _put(unet: UNet2DConditionModel, adapter: Adapter) -> None:
    unet.encoder_hid_proj = None
    unet.set_attn_processor(dict(adapter.processors))  # diffusers empties the dictionary
    unet.encoder_hid_proj = adapter.projection
    unet.config.encoder_hid_dim_type = adapter.kind  # as diffusers' loader and unloader set it


@contextmanager
def embedding(unet: UNet2DConditionModel, embeds: Tensor) -> Iterator[None]:
    """Pass image embeddings to every call of `unet`, as a pipeline does, so that the sampler need not."""

    def add(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        known = kwargs.get("added_cond_kwargs") or {}
        return args, {**kwargs, "added_cond_kwargs": {**known, "image_embeds": [embeds]}}

    handle = unet.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
