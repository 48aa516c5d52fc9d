"""Feature extractors of images and prompts, each identified exactly.

A model is a name on huggingface.co or a local folder. Its identity, written beside every result, is the name
and the loaded commit, or a hash of the folder's weights.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Floats = NDArray[np.float32]

CLIP = "openai/clip-vit-large-patch14"
DINO = "facebook/dino-vits16"
NONE = "none"  # in place of a model's name: leaves it out
TINY_CLASSIFIER = "easyref_core.tiny.classifier:load_classifier"
CREATURE_JUDGE = "easyref_core.tiny.creatures.judge:load_judge"
REACHABLE_SECONDS = 5
WEIGHTS = ("*.safetensors", "*.bin")


class AttributeClassifier(Protocol):
    """Predicts the attributes of images: {attribute: one value per image}."""

    def __call__(self, images: Sequence[Image.Image]) -> Mapping[str, Sequence[str]]: ...


class SubjectModel(Protocol):
    """Features (N, D) of the subjects of images, such as faces; `identity` names the weights."""

    identity: str

    def images(self, images: Sequence[Image.Image]) -> Floats: ...


class Extractor:
    """A transformers model with its own image processor.

    Raises FileNotFoundError if the model cannot be loaded, and ValueError if it is of another kind.
    """

    kind: ClassVar[str]
    default: ClassVar[str]

    def __init__(
        self,
        name: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        device: str = "cpu",
    ) -> None:
        import transformers

        self.name = name or self.default
        # Without a network huggingface_hub retries every file for minutes; a cached model loads without one.
        self.is_offline = local_files_only or not (Path(self.name).is_dir() or hub_is_reachable())
        self.switched_off = local_files_only
        self.options = {"revision": revision, "local_files_only": self.is_offline}
        config = self.load(transformers.AutoConfig)
        self.identity = _identity(self.name, config)
        self.device = torch.device(device)
        self.model = self.load_model(config).eval().float().to(self.device)
        # PIL and numpy: no torchvision, and the same pixels on every device
        version = int(transformers.__version__.partition(".")[0])
        backend = {"backend": "pil"} if version >= 5 else {"use_fast": False}
        self.processor = self.load(transformers.AutoImageProcessor, **backend)

    def load(self, cls: Any, **options: Any) -> Any:
        """Call cls.from_pretrained; the error for a missing model says where to get it."""
        try:
            return cls.from_pretrained(self.name, **self.options, **options)
        # transformers and huggingface_hub raise subclasses of OSError for missing files, models and networks
        except OSError as error:
            offline = " Downloads are switched off (--offline)." if self.switched_off else ""
            if self.is_offline and not self.switched_off:
                offline = " It is not in the local cache, and huggingface.co cannot be reached."
            option = f"--{self.kind.lower()}"
            raise FileNotFoundError(
                f"The {self.kind} model {self.name!r} could not be loaded.{offline} Get it with `hf download "
                f"{self.name}` (https://huggingface.co/{self.name}), or name a local folder with {option}, "
                f"or leave its metrics out with {option} none. The loader says: {str(error).splitlines()[0]}"
            ) from error

    def load_model(self, config: Any) -> torch.nn.Module:
        raise NotImplementedError

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Resize, crop and normalise: -> (N, 3, H, W)."""
        return self.processor(images=list(images), return_tensors="pt")["pixel_values"].to(self.device)


class Clip(Extractor):
    """Image and text features of a CLIP model."""

    kind, default = "CLIP", CLIP

    def load_model(self, config: Any) -> torch.nn.Module:
        import transformers

        if config.model_type != "clip":
            raise ValueError(f"{self.name} is a {config.model_type!r} model; wanted a CLIP, such as {CLIP}.")
        self.tokenizer = self.load(transformers.AutoTokenizer)
        return self.load(transformers.CLIPModel)

    @torch.inference_mode()
    def images(self, images: Sequence[Image.Image]) -> Floats:
        """Projected image features (N, D)."""
        pooled = self.model.vision_model(pixel_values=self.pixels(images)).pooler_output
        return self.model.visual_projection(pooled).float().cpu().numpy()

    @torch.inference_mode()
    def texts(self, prompts: Sequence[str]) -> Floats:
        """Projected text features (N, D); a prompt is truncated to the model's maximum length, 77 tokens."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(self.device)
        text = self.model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return self.model.text_projection(text.pooler_output).float().cpu().numpy()


class Dino(Extractor):
    """Normalised CLS tokens of the last hidden state of a DINO, or of any ViT that transformers loads."""

    kind, default = "DINO", DINO

    def load_model(self, config: Any) -> torch.nn.Module:
        import transformers

        if config.model_type == "vit":  # without the pooler, which DINO does not train
            return self.load(transformers.ViTModel, add_pooling_layer=False)
        return self.load(transformers.AutoModel)

    @torch.inference_mode()
    def images(self, images: Sequence[Image.Image]) -> Floats:
        """CLS tokens (N, D)."""
        states = self.model(pixel_values=self.pixels(images)).last_hidden_state
        return states[:, 0].float().cpu().numpy()


@functools.cache
def hub_is_reachable() -> bool:
    """True if the Hugging Face Hub, or the mirror in HF_ENDPOINT, answers within REACHABLE_SECONDS."""
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=REACHABLE_SECONDS)
    # requests or httpx, by huggingface_hub's version, with different exceptions
    except Exception:
        return False
    return True


def load_attribute_classifier(name: str = TINY_CLASSIFIER) -> AttributeClassifier:
    """Call the function "module:function" and return its result."""
    return _call(name, "attribute classifier", TINY_CLASSIFIER)


def load_subject_model(name: str) -> SubjectModel:
    """Call the function "module:function" and return its result."""
    return _call(name, "subject model", CREATURE_JUDGE)


def _call(name: str, kind: str, example: str) -> Any:
    module, _, function = name.partition(":")
    try:
        load: Callable[[], Any] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"There is no {kind} {name!r} ({error}); wanted module:function, such as {example}."
        ) from error
    return load()


def _identity(name: str, config: Any) -> str:
    """name@commit of a model on the hub, folder@sha256 of a local one's weights and config."""
    folder = Path(name)
    if not folder.is_dir():
        return f"{name}@{getattr(config, '_commit_hash', None) or 'unknown'}"
    digest = sha256()
    weights = [file for pattern in WEIGHTS for file in folder.glob(pattern)]
    for file in sorted([*weights, folder / "config.json"]):
        with file.open("rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    return f"{folder.name}@sha256:{digest.hexdigest()[:16]}"
