"""Features of pictures and prompts, by models named exactly; what is made of them is metrics.py's matter.

A model is a name on huggingface.co or a local folder. Its identity, written beside every result, is the name with the
commit that was loaded, or with a hash of the folder's weights.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image
    from torch import Tensor

    Floats = NDArray[np.float32]

CLIP = "openai/clip-vit-large-patch14"
DINO = "facebook/dino-vits16"
TINY_CLASSIFIER = "easyref_core.tiny.classifier:load_classifier"
WEIGHTS = ("*.safetensors", "*.bin")


class AttributeReader(Protocol):
    """Reads the attributes off pictures: {attribute: one value a picture}."""

    def __call__(self, pictures: Sequence[Image.Image]) -> Mapping[str, Sequence[str]]: ...


class Clip:
    """Image and text features of one CLIP model."""

    def __init__(
        self,
        name: str = CLIP,
        revision: str | None = None,
        local_files_only: bool = False,
        device: str = "cpu",
    ) -> None:
        import transformers

        where = {"revision": revision, "local_files_only": local_files_only}
        config = _load("CLIP", name, transformers.AutoConfig.from_pretrained, where)
        if config.model_type != "clip":
            raise ValueError(f"{name} is a {config.model_type!r} model; wanted a CLIP, such as {CLIP}.")
        self.identity = _identity(name, config)
        self.device = torch.device(device)
        self._model = (
            _load("CLIP", name, transformers.CLIPModel.from_pretrained, where).eval().float().to(self.device)
        )
        self._tokenizer = _load("CLIP", name, transformers.AutoTokenizer.from_pretrained, where)
        self._processor = _image_processor("CLIP", name, where)

    @torch.inference_mode()
    def images(self, pictures: Sequence[Image.Image]) -> Floats:
        """Projected image features (N, D)."""
        pixels = _pixels(self._processor, pictures).to(self.device)
        pooled = self._model.vision_model(pixel_values=pixels).pooler_output
        return self._model.visual_projection(pooled).float().cpu().numpy()

    @torch.inference_mode()
    def texts(self, prompts: Sequence[str]) -> Floats:
        """Projected text features (N, D); a prompt is cut after the model's own limit of tokens, 77."""
        limit = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=limit, return_tensors="pt"
        ).to(self.device)
        text = self._model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return self._model.text_projection(text.pooler_output).float().cpu().numpy()


class Dino:
    """CLS tokens of the last hidden state, after its norm, of one DINO (any ViT that transformers loads)."""

    def __init__(
        self,
        name: str = DINO,
        revision: str | None = None,
        local_files_only: bool = False,
        device: str = "cpu",
    ) -> None:
        import transformers

        where = {"revision": revision, "local_files_only": local_files_only}
        config = _load("DINO", name, transformers.AutoConfig.from_pretrained, where)
        self.identity = _identity(name, config)
        self.device = torch.device(device)
        if config.model_type == "vit":  # without its pooler, which DINO never trained
            model = _load(
                "DINO", name, transformers.ViTModel.from_pretrained, {**where, "add_pooling_layer": False}
            )
        else:
            model = _load("DINO", name, transformers.AutoModel.from_pretrained, where)
        self._model = model.eval().float().to(self.device)
        self._processor = _image_processor("DINO", name, where)

    @torch.inference_mode()
    def images(self, pictures: Sequence[Image.Image]) -> Floats:
        """CLS tokens (N, D)."""
        states = self._model(
            pixel_values=_pixels(self._processor, pictures).to(self.device)
        ).last_hidden_state
        return states[:, 0].float().cpu().numpy()


def load_attribute_reader(name: str = TINY_CLASSIFIER) -> AttributeReader:
    """What "module:function" returns when called: a reader of attributes."""
    module, _, function = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"The attribute classifier {name!r} is not there ({error}); wanted module:function, such as {TINY_CLASSIFIER}."
        ) from error
    return make()


def _load(kind: str, name: str, load: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    """load(name, **options); a model that is not there becomes an error that says where to get it."""
    try:
        return load(name, **options)
    except (
        OSError
    ) as error:  # transformers' and huggingface_hub's errors for missing files, models and networks
        offline = " Downloads are switched off (--offline)." if options["local_files_only"] else ""
        raise FileNotFoundError(
            f"The {kind} model {name!r} could not be loaded.{offline} Get it with `hf download {name}` "
            f"(https://huggingface.co/{name}), or name a local folder with --{kind.lower()}, or leave its metrics out "
            f"with --{kind.lower()} none. The loader says: {str(error).splitlines()[0]}"
        ) from error


def _identity(name: str, config: Any) -> str:
    """name@commit of a model on the hub, folder@sha256 of a local one's weights and config."""
    folder = Path(name)
    if not folder.is_dir():
        return f"{name}@{getattr(config, '_commit_hash', None) or 'unknown'}"
    digest = sha256()
    for file in sorted(
        [*(file for pattern in WEIGHTS for file in folder.glob(pattern)), folder / "config.json"]
    ):
        with file.open("rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    return f"{folder.name}@sha256:{digest.hexdigest()[:16]}"


def _image_processor(kind: str, name: str, where: Mapping[str, Any]) -> Any:
    """The model's own resize, crop and normalisation, done by PIL and numpy: no torchvision, the same on every device."""
    import transformers

    major = int(transformers.__version__.partition(".")[0])
    plain = {"backend": "pil"} if major >= 5 else {"use_fast": False}
    return _load(kind, name, transformers.AutoImageProcessor.from_pretrained, {**where, **plain})


def _pixels(processor: Any, pictures: Sequence[Image.Image]) -> Tensor:
    return processor(images=list(pictures), return_tensors="pt")["pixel_values"]  # -> (N, 3, H, W)
