"""Features come from the named models as transformers computes them, and a model that is not there is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from easyref_core.mrbench.extractors import Clip, Dino, load_attribute_reader

from .benchmarks import error_of, picture, write_clip, write_dino

PICTURES = [picture(0, 40), picture(1, 64).resize((64, 48)), picture(2, 32).resize((20, 50))]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("models") / "tiny-clip")


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dino(tmp_path_factory.mktemp("models") / "tiny-dino")


@pytest.fixture(scope="module")
def clip(clip_folder: Path) -> Clip:
    return Clip(str(clip_folder), local_files_only=True)


@pytest.fixture(scope="module")
def dino(dino_folder: Path) -> Dino:
    return Dino(str(dino_folder), local_files_only=True)


def normalised(image: Image.Image) -> torch.Tensor:
    """(1, 3, H, W) with the statistics that the tiny models' processors name."""
    pixels = np.asarray(image, dtype=np.float64) / 255
    pixels = (pixels - [0.5, 0.4, 0.3]) / [0.2, 0.25, 0.3]
    return torch.from_numpy(pixels).float().movedim(-1, 0)[None]


def test_clip_reads_the_middle_of_the_picture(clip: Clip, clip_folder: Path) -> None:
    """The short side to 32 pixels, bicubic, then the middle square: as CLIP's own preprocessing does."""
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(clip_folder).eval()
    wide = PICTURES[1].resize((42, 32), Image.Resampling.BICUBIC).crop((5, 0, 37, 32))
    with torch.inference_mode():
        expected = model(
            pixel_values=normalised(wide), input_ids=torch.tensor([[188, 0, 189]])
        ).image_embeds  # normalised
    features = clip.images([PICTURES[1]])
    np.testing.assert_allclose(features / np.linalg.norm(features), expected.numpy(), atol=1e-5)


def test_clip_text_features(clip: Clip, clip_folder: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    model, tokenizer = (
        CLIPModel.from_pretrained(clip_folder).eval(),
        CLIPTokenizer.from_pretrained(clip_folder),
    )
    tokens = tokenizer(["a cat"], return_tensors="pt")
    assert tokens.input_ids[0, 0] == 188
    assert tokens.input_ids[0, -1] == 189
    with torch.inference_mode():
        expected = model(pixel_values=normalised(picture(0)), input_ids=tokens.input_ids).text_embeds
    features = clip.texts(["a cat"])
    np.testing.assert_allclose(features / np.linalg.norm(features), expected.numpy(), atol=1e-5)


def test_a_long_prompt_is_cut(clip: Clip) -> None:
    assert clip.texts(["word " * 200]).shape == (1, 12)


def test_dino_gives_the_cls_token(dino: Dino, dino_folder: Path) -> None:
    """The whole picture squeezed to 32x32 pixels, bilinear; the first token of the last hidden state."""
    from transformers import ViTModel

    model = ViTModel.from_pretrained(dino_folder, add_pooling_layer=False).eval()
    pixels = normalised(PICTURES[2].resize((32, 32), Image.Resampling.BILINEAR))
    with torch.inference_mode():
        expected = model(pixel_values=pixels).last_hidden_state[:, 0]
    np.testing.assert_allclose(dino.images([PICTURES[2]]), expected.numpy(), atol=1e-4)


def test_a_batch_gives_what_each_gives(clip: Clip, dino: Dino) -> None:
    for extractor in (clip, dino):
        each = np.concatenate([extractor.images([one]) for one in PICTURES])
        np.testing.assert_allclose(extractor.images(PICTURES), each, atol=1e-5)
    texts = ["a cat", "a much longer sentence"]
    each = np.concatenate([clip.texts([text]) for text in texts])
    np.testing.assert_allclose(clip.texts(texts), each, atol=1e-5)


def test_a_folders_identity_is_its_content(clip: Clip, clip_folder: Path, tmp_path: Path) -> None:
    name, _, digest = clip.identity.partition("@")
    assert name == "tiny-clip"
    assert digest.startswith("sha256:")
    assert Clip(str(clip_folder)).identity == clip.identity
    other = write_clip(tmp_path / "tiny-clip")
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace('"projection_dim": 12', '"projection_dim":  12'))
    assert Clip(str(other)).identity != clip.identity


@pytest.mark.parametrize(("kind", "option"), [(Clip, "--clip"), (Dino, "--dino")])
def test_a_model_that_is_not_there_is_named(kind, option: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = error_of(lambda: kind("somebody/no-such-model", local_files_only=True), FileNotFoundError)
    assert (
        "model 'somebody/no-such-model' could not be loaded. Downloads are switched off (--offline)." in text
    )
    assert "hf download somebody/no-such-model" in text
    assert f"{option} none" in text


def test_another_kind_of_model_is_refused(dino_folder: Path) -> None:
    assert "is a 'vit' model; wanted a CLIP" in error_of(lambda: Clip(str(dino_folder)))


def test_an_attribute_reader_by_name() -> None:
    assert load_attribute_reader("builtins:dict") == {}


@pytest.mark.parametrize("name", ["nowhere_at_all:load", "json:no_such_function", "json"])
def test_an_attribute_reader_that_is_not_there_is_named(name: str) -> None:
    text = error_of(lambda: load_attribute_reader(name))
    assert f"The attribute classifier {name!r} is not there" in text
    assert "wanted module:function" in text
