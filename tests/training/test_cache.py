"""The cache: keys follow content, writes are atomic, cached values equal computed ones."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

import easyref_core as er
from easyref_core.training.base_model import BaseModel
from easyref_core.training.batches import collate
from easyref_core.training.cache import TensorCache, cached_contexts, cached_moments, content_key

from . import tiny

KEY = content_key("a")


@pytest.fixture
def cache(tmp_path: Path) -> TensorCache:
    return TensorCache(tmp_path)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_key_follows_tag_type_shape_and_values() -> None:
    base = torch.arange(6.0)
    keys = {
        content_key("a", base),
        content_key("b", base),
        content_key("a", base.double()),
        content_key("a", base.view(2, 3)),
        content_key("a", base + 1),
        content_key("a", base[:3], base[3:]),
        content_key("a"),
    }
    assert len(keys) == 7
    assert content_key("a", base) == content_key("a", base.clone())
    assert content_key("a", base.view(2, 3).T) == content_key("a", base.view(2, 3).T.contiguous())
    assert content_key("a", base.bfloat16()) != content_key("a", base.half())


def test_put_and_get(cache: TensorCache) -> None:
    assert cache.get(KEY) is None
    tensors = {"x": torch.randn(2, 3).T, "y": torch.ones(4, dtype=torch.bfloat16)}
    cache.put(KEY, tensors)
    actual = TensorCache(cache.folder).get(KEY)
    assert actual.keys() == tensors.keys()
    assert all(torch.equal(actual[name], tensors[name]) for name in tensors)


def test_interrupted_put_leaves_no_file(cache: TensorCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        assert files(cache.folder), "written, not yet renamed"
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        cache.put(KEY, {"x": torch.zeros(3)})
    assert not files(cache.folder)
    assert cache.get(KEY) is None


def test_damaged_file_is_a_miss(cache: TensorCache) -> None:
    cache.put(KEY, {"x": torch.zeros(3)})
    [path] = files(cache.folder)
    path.write_bytes(path.read_bytes()[:-4])
    assert cache.get(KEY) is None
    cache.put(KEY, {"x": torch.zeros(3)})
    assert cache.get(KEY) is not None


def test_concurrent_writers_leave_one_valid_file(tmp_path: Path) -> None:
    wrong = []

    def work(number: int) -> None:
        cache = TensorCache(tmp_path)
        for _ in range(20):
            cache.put(KEY, {"x": torch.full((1000,), float(number))})
            actual = cache.get(KEY)
            if actual is None or actual["x"].unique().numel() != 1:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(files(tmp_path)) == 1


def test_only_misses_are_computed(cache: TensorCache) -> None:
    calls = []

    def compute(missing: list[int]) -> list[dict[str, torch.Tensor]]:
        calls.append(missing)
        return [{"x": torch.tensor(i)} for i in missing]

    keys = [content_key(str(i)) for i in range(4)]
    cache.put(keys[1], {"x": torch.tensor(1)})
    for _ in range(2):
        assert [int(t["x"]) for t in cache.get_or_compute(keys, compute)] == [0, 1, 2, 3]
    assert calls == [[0, 2, 3]]


def test_cached_moments_are_the_vaes(cache: TensorCache, base: BaseModel) -> None:
    pixels, calls = torch.rand(3, 3, 64, 64) * 2 - 1, []
    expected = base.latent_moments(pixels)

    def encode(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(len(pixels))
        return base.latent_moments(pixels)

    cached_moments(cache, "vae", encode, pixels[:1])
    for _ in range(2):
        torch.testing.assert_close(cached_moments(cache, "vae", encode, pixels), expected)
    assert calls == [1, 2]


@torch.no_grad()
def test_cached_contexts_are_the_bodys_for_any_padding(
    cache: TensorCache, examples: tiny.TinyExamples
) -> None:
    model, calls = er.load(tiny.GOLDEN / "easyref.safetensors", tiny.MLLM), []

    def encode(
        patches: torch.Tensor, grid: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        calls.append(len(grid))
        return model.mllm.encoder(patches, grid, ids, model.image_token, torch.float32, padding_mask=mask)

    batch = collate([examples.sample(row) for row in (0, 2, 1)], [0, 0, 0])
    mask = batch.padding_mask
    expected = encode(batch.patches, batch.grid, batch.input_ids, mask)
    unpadded = collate([examples.sample(2)], [0])
    cached_contexts(cache, "body", encode, unpadded)
    for _ in range(2):
        actual = cached_contexts(cache, "body", encode, batch)
        torch.testing.assert_close(actual[mask], expected[mask], rtol=1e-5, atol=1e-5)
        assert not actual[~mask].any()
    assert calls == [6, 3, 1, 2]  # references: all together, row 2 alone, then rows 0 and 1
