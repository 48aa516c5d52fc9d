"""Features equal those of transformers' own models, and errors name a missing model."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from easyref_core.mrbench import extractors as extractors_module
from easyref_core.mrbench.extractors import Clip, Dino, load_attribute_classifier
from easyref_core.mrbench.group_scores import Extractors

from .benchmarks import error_of, image, write_clip

IMAGES = [image(0, 40), image(1, 64).resize((64, 48)), image(2, 32).resize((20, 50))]


def normalize(image: Image.Image) -> torch.Tensor:
    """(1, 3, H, W) with the statistics of the tiny models' processors."""
    pixels = (np.asarray(image, dtype=np.float64) / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.25, 0.3]
    return torch.from_numpy(pixels).float().movedim(-1, 0)[None]


def assert_same_direction(features: np.ndarray, expected: torch.Tensor) -> None:
    np.testing.assert_allclose(features / np.linalg.norm(features), expected.numpy(), atol=1e-5)


def test_clip_image_features_are_of_the_centre(extractors: Extractors, clip_folder: Path) -> None:
    """The short side to 32 pixels, bicubic, then the centre square, as in CLIP's preprocessing."""
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(clip_folder).eval()
    centre = IMAGES[1].resize((42, 32), Image.Resampling.BICUBIC).crop((5, 0, 37, 32))
    ids = torch.tensor([[188, 0, 189]])
    with torch.inference_mode():
        expected = model(pixel_values=normalize(centre), input_ids=ids).image_embeds  # normalised
    assert_same_direction(extractors.clip.images([IMAGES[1]]), expected)


def test_clip_text_features(extractors: Extractors, clip_folder: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(clip_folder).eval()
    ids = CLIPTokenizer.from_pretrained(clip_folder)(["a cat"], return_tensors="pt").input_ids
    assert (ids[0, 0], ids[0, -1]) == (188, 189)
    with torch.inference_mode():
        expected = model(pixel_values=normalize(image(0)), input_ids=ids).text_embeds
    assert_same_direction(extractors.clip.texts(["a cat"]), expected)


def test_a_long_prompt_is_truncated(extractors: Extractors) -> None:
    assert extractors.clip.texts(["word " * 200]).shape == (1, 12)


def test_dino_gives_the_cls_token(extractors: Extractors, dino_folder: Path) -> None:
    """The whole image resized to 32x32 pixels, bilinear; the first token of the last hidden state."""
    from transformers import ViTModel

    model = ViTModel.from_pretrained(dino_folder, add_pooling_layer=False).eval()
    pixels = normalize(IMAGES[2].resize((32, 32), Image.Resampling.BILINEAR))
    with torch.inference_mode():
        expected = model(pixel_values=pixels).last_hidden_state[:, 0]
    np.testing.assert_allclose(extractors.dino.images([IMAGES[2]]), expected.numpy(), atol=1e-4)


def test_features_do_not_depend_on_the_batch(extractors: Extractors) -> None:
    inputs = [(extractors.clip.images, IMAGES), (extractors.dino.images, IMAGES)]
    for features, items in (*inputs, (extractors.clip.texts, ["a cat", "a much longer sentence"])):
        each = np.concatenate([features([item]) for item in items])
        np.testing.assert_allclose(features(items), each, atol=1e-5)


def test_the_identity_of_a_folder_is_its_content(clip_folder: Path, tmp_path: Path) -> None:
    identity = Clip(str(clip_folder)).identity
    assert identity.startswith("tiny-clip@sha256:")
    assert Clip(str(clip_folder)).identity == identity
    other = write_clip(tmp_path / "tiny-clip")
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace('"projection_dim": 12', '"projection_dim":  12'))
    assert Clip(str(other)).identity != identity


@pytest.mark.parametrize(("kind", "option"), [(Clip, "--clip"), (Dino, "--dino")])
def test_the_error_for_a_missing_model_says_where_to_get_it(kind, option: str, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = error_of(lambda: kind("somebody/no-such-model", local_files_only=True), FileNotFoundError)
    model = "model 'somebody/no-such-model' could not be loaded. Downloads are switched off (--offline)."
    for part in (model, "hf download somebody/no-such-model", f"{option} none"):
        assert part in text


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The socket of a hub that never answers; connections wait in its backlog."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(extractors_module, "REACHABLE_SECONDS", 0.3)
        extractors_module.hub_is_reachable.cache_clear()
        yield server
    extractors_module.hub_is_reachable.cache_clear()


def test_without_a_network_a_missing_model_is_named_after_one_request(silent_hub: socket.socket) -> None:
    text = error_of(lambda: Clip("somebody/no-such-model"), FileNotFoundError)
    assert "It is not in the local cache, and huggingface.co cannot be reached. Get it with `hf" in text
    silent_hub.settimeout(5)
    silent_hub.accept()
    silent_hub.settimeout(0)
    with pytest.raises(BlockingIOError):
        silent_hub.accept()


@pytest.mark.usefixtures("silent_hub")
def test_without_a_network_a_local_model_loads(clip_folder: Path) -> None:
    assert not extractors_module.hub_is_reachable()
    assert Clip(str(clip_folder)).identity.startswith("tiny-clip@")


def test_another_kind_of_model_is_refused(dino_folder: Path) -> None:
    assert "is a 'vit' model; wanted a CLIP" in error_of(lambda: Clip(str(dino_folder)))


def test_an_attribute_classifier_by_name() -> None:
    assert load_attribute_classifier("builtins:dict") == {}


@pytest.mark.parametrize("name", ["nowhere_at_all:load", "json:no_such_function", "json"])
def test_the_error_for_a_missing_classifier_names_it(name: str) -> None:
    text = error_of(lambda: load_attribute_classifier(name))
    assert f"There is no attribute classifier {name!r} (" in text
    assert "wanted module:function" in text
