"""IP-Adapter (arXiv 2308.06721) as diffusers runs it: CLIP's image embeddings beside the text, averaged or concatenated."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .clip_pixels import clip_pixels
from .method import Method, Task

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from torch import Tensor, nn

    from easyref_core.training.base_model import BaseModel

EMBEDDINGS = ("average", "concatenation")

# The file format of IP-Adapter: {"image_proj": {...}, "ip_adapter": {"1.to_k_ip.weight": ...}}.
AdapterState = Mapping[str, Mapping[str, "Tensor"]]


class Adapter(NamedTuple):
    """What an IP-Adapter puts into a UNet."""

    processors: Mapping[str, Any]  # of every attention, by name
    projection: nn.Module | None  # image embeddings -> image tokens
    kind: str | None  # the UNet's encoder_hid_dim_type


class IPAdapter(Method):
    """Every reference through the image encoder alone.

    weights: an IP-Adapter for SDXL (.safetensors or .bin), the plain or the "plus" kind. image_encoder: folder of its
    CLIPVisionModelWithProjection.
    embeddings: "average" takes the mean of the references' embeddings before the projection; "concatenation" projects
    each and lays all tokens side by side, as diffusers does with several images.
    """

    def __init__(
        self,
        base: BaseModel,
        weights: str,
        image_encoder: str,
        embeddings: str = "average",
        weight: float = 1.0,
    ) -> None:
        super().__init__(base)
        if embeddings not in EMBEDDINGS:
            raise ValueError(f"The embeddings are {embeddings!r}; wanted one of {', '.join(EMBEDDINGS)}.")
        self.embeddings, self.weight = embeddings, weight
        state = read_adapter(Path(weights))
        self.adapter = load_adapter(base.unet, state)
        for _, processor in image_processors(self.adapter):
            processor.scale = [weight]
        self.encoder = load_image_encoder(image_encoder).to(base.device)
        self.plus = "latents" in state["image_proj"]
        self._fingerprint = _digest(state, self.encoder.state_dict())

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "kind": "ip_adapter",
            "weights": self._fingerprint,
            "embeddings": self.embeddings,
            "weight": self.weight,
        }

    def together(self, task: Task) -> Hashable:
        return len(task.references) if self.embeddings == "concatenation" else None

    @torch.inference_mode()
    def prepare(self, task: Task, folder: Path) -> tuple[Tensor, Tensor]:
        """Unconditional and conditional embeddings, each (1, N, D), or (1, N, S, D) of the "plus" kind."""
        pixels = clip_pixels(task.references, self.encoder.config.image_size).to(self.base.device)
        cond = self._embed(pixels)
        # diffusers' pipeline: zero embeddings, or the hidden states of a picture of zeros
        uncond = self._embed(torch.zeros_like(pixels)) if self.plus else torch.zeros_like(cond)
        if self.embeddings == "average":
            uncond, cond = (side.mean(dim=0, keepdim=True) for side in (uncond, cond))
        return uncond[None], cond[None]

    @contextmanager
    def attach(self, conditions: Sequence[tuple[Tensor, Tensor]], seeds: int) -> Iterator[None]:
        sides = (torch.cat(side) for side in zip(*conditions, strict=True))
        embeds = torch.cat([side.repeat_interleave(seeds, dim=0) for side in sides])  # -> (2 G seeds, N, D)
        embeds = embeds.to(self.base.unet.dtype)
        with attached(self.base.unet, self.adapter), embedding(self.base.unet, embeds):
            yield

    def _embed(self, pixels: Tensor) -> Tensor:
        if self.plus:
            return self.encoder(pixels, output_hidden_states=True).hidden_states[-2]
        return self.encoder(pixels).image_embeds


def load_image_encoder(folder: str | Path) -> nn.Module:
    """A frozen CLIPVisionModelWithProjection, from its own folder or a whole CLIP model's."""
    from transformers import CLIPVisionModelWithProjection

    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json: it is not a transformers CLIP folder. Name the IP-Adapter's image encoder."
        )
    encoder = CLIPVisionModelWithProjection.from_pretrained(folder)  # in the dtype it was saved in
    return encoder.float().eval().requires_grad_(False)


def read_adapter(path: Path) -> AdapterState:
    """An IP-Adapter file. Raises FileNotFoundError, or ValueError for a file that is none."""
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
            f"{path} holds {', '.join(sorted(state)) or 'nothing'}; wanted image_proj and ip_adapter. It is no IP-Adapter."
        )
    return state


def image_processors(adapter: Adapter) -> list[tuple[int, nn.Module]]:
    """The adapter's processor of every cross-attention, with the number its weights have in the file: 1, 3, 5, ..."""
    found = [p for name, p in adapter.processors.items() if name.endswith("attn2.processor")]
    return [(2 * i + 1, processor) for i, processor in enumerate(found)]


def load_adapter(unet: UNet2DConditionModel, state: AdapterState) -> Adapter:
    """The adapter's modules, made by diffusers' own loader for this UNet, which is left as it was."""
    with attached(unet, bare(unet)), torch.inference_mode(False):
        unet._load_ip_adapter_weights([state], low_cpu_mem_usage=False)
        return bare(unet)


def bare(unet: UNet2DConditionModel) -> Adapter:
    """What the UNet carries now."""
    # the projection of the "plus" kind has attentions of its own, which the UNet would count among its own
    own = {name: p for name, p in unet.attn_processors.items() if not name.startswith("encoder_hid_proj.")}
    return Adapter(own, unet.encoder_hid_proj, unet.config.encoder_hid_dim_type)


@contextmanager
def attached(unet: UNet2DConditionModel, adapter: Adapter) -> Iterator[None]:
    """The adapter in `unet` until the context closes."""
    before = bare(unet)
    _put(unet, adapter)
    try:
        yield
    finally:
        _put(unet, before)


def _put(unet: UNet2DConditionModel, adapter: Adapter) -> None:
    unet.encoder_hid_proj = None
    unet.set_attn_processor(dict(adapter.processors))  # diffusers empties the dictionary it is given
    unet.encoder_hid_proj = adapter.projection
    unet.config.encoder_hid_dim_type = adapter.kind  # as diffusers' loader and unloader set it


@contextmanager
def embedding(unet: UNet2DConditionModel, embeds: Tensor) -> Iterator[None]:
    """Image embeddings for every call of `unet`, as a pipeline passes them: whoever paints need not know of them."""

    def add(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        given = kwargs.get("added_cond_kwargs") or {}
        return args, {**kwargs, "added_cond_kwargs": {**given, "image_embeds": [embeds]}}

    handle = unet.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _digest(state: AdapterState, encoder: Mapping[str, Tensor]) -> str:
    from ..record import fingerprint

    flat = {f"{part}.{name}": tensor for part, tensors in state.items() for name, tensor in tensors.items()}
    digest = hashlib.sha256((fingerprint(flat) + fingerprint(encoder)).encode())
    return digest.hexdigest()[:16]
