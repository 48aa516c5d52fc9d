"""The cache: keys follow content, files appear whole, and what is read equals what was computed."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

import easyref_core as er
from easyref_core.training.base_model import BaseModel
from easyref_core.training.batches import collate
from easyref_core.training.cache import Cache, contexts, key_of, moments

from . import tiny


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_key_follows_tag_type_shape_and_values() -> None:
    base = torch.arange(6.0)
    keys = {
        key_of("a", base),
        key_of("b", base),
        key_of("a", base.double()),
        key_of("a", base.view(2, 3)),
        key_of("a", base + 1),
        key_of("a", base[:3], base[3:]),
        key_of("a"),
    }
    assert len(keys) == 7
    assert key_of("a", base) == key_of("a", base.clone())
    assert key_of("a", base.view(2, 3).T) == key_of("a", base.view(2, 3).T.contiguous())
    assert key_of("a", base.bfloat16()) != key_of("a", base.half())


def test_what_is_put_is_got(tmp_path: Path) -> None:
    cache, key = Cache(tmp_path), key_of("a")
    assert cache.get(key) is None
    tensors = {"x": torch.randn(2, 3).T, "y": torch.ones(4, dtype=torch.bfloat16)}
    cache.put(key, tensors)
    found = Cache(tmp_path).get(key)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_hits_misses_and_bytes_are_counted(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.get(key_of("a"))
    cache.put(key_of("a"), {"x": torch.zeros(100)})
    cache.get(key_of("a"))
    cache.get(key_of("a"))
    size = sum(path.stat().st_size for path in files(tmp_path))
    assert vars(cache.counts) == {"hits": 2, "misses": 1, "bytes_read": 2 * size, "bytes_written": size}
    assert size > 400


def test_a_put_that_dies_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, key = Cache(tmp_path), key_of("a")

    def die(*_: object) -> None:
        assert files(tmp_path), "written, not yet renamed"
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        cache.put(key, {"x": torch.zeros(3)})
    assert not files(tmp_path)
    assert cache.get(key) is None


def test_a_damaged_file_is_a_miss(tmp_path: Path) -> None:
    cache, key = Cache(tmp_path), key_of("a")
    cache.put(key, {"x": torch.zeros(3)})
    [path] = files(tmp_path)
    path.write_bytes(path.read_bytes()[:-4])
    assert cache.get(key) is None
    cache.put(key, {"x": torch.zeros(3)})
    assert cache.get(key) is not None


def test_writers_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    key, wrong = key_of("a"), []

    def work(number: int) -> None:
        cache = Cache(tmp_path)
        for _ in range(20):
            cache.put(key, {"x": torch.full((1000,), float(number))})
            found = cache.get(key)
            if found is None or found["x"].unique().numel() != 1:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(files(tmp_path)) == 1


def test_only_what_is_missing_is_computed(tmp_path: Path) -> None:
    cache, asked = Cache(tmp_path), []

    def compute(missing: list[int]) -> list[dict[str, torch.Tensor]]:
        asked.append(missing)
        return [{"x": torch.tensor(i)} for i in missing]

    keys = [key_of(str(i)) for i in range(4)]
    cache.put(keys[1], {"x": torch.tensor(1)})
    for _ in range(2):
        assert [int(t["x"]) for t in cache.through(keys, compute)] == [0, 1, 2, 3]
    assert asked == [[0, 2, 3]]


def test_moments_are_the_vaes(tmp_path: Path, base: BaseModel) -> None:
    cache, pixels = Cache(tmp_path), torch.rand(3, 3, 64, 64) * 2 - 1
    wanted = base.latent_moments(pixels)
    calls = []

    def encode(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(len(pixels))
        return base.latent_moments(pixels)

    moments(cache, "vae", pixels[:1], encode)
    for _ in range(2):
        found = moments(cache, "vae", pixels, encode)
        torch.testing.assert_close(found, wanted)
    assert calls == [1, 2]


@torch.no_grad()
def test_context_states_are_the_bodys_whatever_the_padding(tmp_path: Path) -> None:
    model = er.load(tiny.GOLDEN / "easyref.safetensors", tiny.MLLM)
    examples, cache, calls = tiny.TinyExamples(model.config), Cache(tmp_path), []

    def encode(
        patches: torch.Tensor, grid: torch.Tensor, ids: torch.Tensor, real: torch.Tensor
    ) -> torch.Tensor:
        calls.append(len(grid))
        return model.mllm.encoder(patches, grid, ids, model.image_token, torch.float32, padding_mask=real)

    batch = collate([examples.sample(row) for row in (0, 2, 1)], [0, 0, 0])
    wanted = encode(batch.patches, batch.grid, batch.input_ids, batch.real)
    contexts(cache, "body", collate([examples.sample(2)], [0]), encode)  # unpadded, and another batch
    for _ in range(2):
        found = contexts(cache, "body", batch, encode)
        torch.testing.assert_close(found[batch.real], wanted[batch.real], rtol=1e-5, atol=1e-5)
        assert not found[~batch.real].any()
    assert calls == [6, 3, 1, 2]  # references: all at once, row 2 alone, then rows 0 and 1
