"""Prefix caching: nothing is computed twice, no cache is stale, and tokens match those of an uncached run."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import easyref_core as er
from devkit import golden
from devkit.golden import EXACT, error
from easyref_core.mllm import preprocess
from easyref_core.mllm.budget import MemoryOptions
from easyref_core.mllm.prefill import is_out_of_memory, run_in_chunks
from easyref_core.mllm.prefix_cache import EncodeCaches, PreparedGroup
from easyref_core.utils.lru_cache import ByteLRUCache

from .errors import assert_says, error_of

SIZE = 84  # pixels: 9 image tokens per reference
COLOURS = ("red", "green", "blue", "white", "orange", "purple", "gray", "pink", "brown")
A, B, C, D, *MORE = (Image.new("RGB", (90 + 7 * i, 100), colour) for i, colour in enumerate(COLOURS))


def load(**memory: object) -> er.EasyRef:
    return er.load(golden.CHECKPOINT, golden.MLLM, memory=MemoryOptions(**memory))


@pytest.fixture
def own() -> er.EasyRef:
    """A model with empty caches."""
    return load()


def caches(model: er.EasyRef) -> EncodeCaches:
    return model.group_encoder.caches


def tokens(model: er.EasyRef, *images: Image.Image, prompt: str = "a cat", **how: object) -> torch.Tensor:
    return model.aggregate(model.encode(images, prompt, **{"size": SIZE, **how}))


def cold(model: er.EasyRef, *images: Image.Image, **how: object) -> torch.Tensor:
    """The same tokens, computed without caches."""
    model.clear_cache()
    return tokens(model, *images, **how)


def group_of(
    model: er.EasyRef, *images: Image.Image, prompt: str = "a cat", instruction: str = er.INSTRUCTION
) -> PreparedGroup:
    return model.prepare(images, prompt, instruction, SIZE)


class Counts:
    """Images that the vision tower encodes and tokens that the decoder prefills."""

    def __init__(self) -> None:
        self.images = self.tokens = 0

    def count_images(self, _: object, inputs: tuple) -> None:
        self.images += len(inputs[1])

    def count_tokens(self, _: object, inputs: tuple) -> None:
        self.tokens += inputs[0].shape[1]


@contextmanager
def hooked(*hooks: tuple[torch.nn.Module, Callable]) -> Iterator[None]:
    """Forward pre-hooks on modules for the duration of a block."""
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def counting(model: er.EasyRef) -> Iterator[Counts]:
    counts, encoder = Counts(), model.mllm.encoder
    with hooked((encoder.visual, counts.count_images), (encoder.layers[0], counts.count_tokens)):
        yield counts


CHANGES: dict[str, tuple[list, dict, int, int]] = {
    # second encoding after [A, B, C]: images, settings, images that are encoded, references whose prefix is reused
    "prompt": ([A, B, C], {"prompt": "a dog in the snow"}, 0, 3),
    "instruction": ([A, B, C], {"instruction": "Draw this: "}, 0, 3),
    "longer prompt": ([A, B, C], {"prompt": "a cat " * 50}, 0, 3),
    "nothing": ([A, B, C], {}, 0, 3),
    "one added at the end": ([A, B, C, D], {}, 1, 3),
    "one added in the middle": ([A, D, B, C], {}, 1, 1),
    "one added at the start": ([D, A, B, C], {}, 1, 0),
    "the last removed": ([A, B], {}, 0, 2),
    "the second removed": ([A, C], {}, 0, 1),
    "the first removed": ([B, C], {}, 0, 0),
    "another order": ([A, C, B], {}, 0, 1),
    "backwards": ([C, B, A], {}, 0, 0),
    "one replaced": ([A, D, C], {}, 1, 1),
    "one twice": ([A, B, C, B], {}, 0, 3),
    "another size": ([A, B, C], {"size": 112}, 3, 0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_only_changes_are_encoded(own: er.EasyRef, name: str) -> None:
    images, how, encoded, reused = CHANGES[name]
    tokens(own, A, B, C)
    with counting(own) as counts:
        found = tokens(own, *images, **how)
    assert counts.images == encoded
    if "size" not in how:
        group = group_of(own, *images, **how)
        cached = group.spans[reused - 1][1] + 1 if reused else 0
        # the mark before the first image that differs may be cached too
        assert group.input_ids.shape[1] - counts.tokens - cached in ((0, 1) if reused else (0,))
    assert error(found, cold(own, *images, **how)) <= EXACT


def test_long_history_does_not_change_tokens(own: er.EasyRef) -> None:
    groups = [[A], [A, B], [A, B, C], [A, B], [A, B, C, D], [B, A], [A, B, C, D, *MORE], [A, B, D], [B, A, C]]
    found = [tokens(own, *group, prompt=f"picture {i}") for i, group in enumerate(groups * 2)]
    for i, group in enumerate(groups * 2):
        assert error(found[i], cold(own, *group, prompt=f"picture {i}")) <= EXACT


def test_equal_images_are_encoded_once(own: er.EasyRef) -> None:
    with counting(own) as counts:
        found = tokens(own, A, A, B, A)
    assert counts.images == 2
    assert found.shape == (1, own.config.num_tokens, own.config.token_width)
    features = own.group_encoder.features(own.plan(group_of(own, A, A, B), use_prefix=False))
    assert torch.equal(features[0], features[1])
    assert not torch.equal(features[0], features[2])


def test_image_changed_in_place_is_another_image(own: er.EasyRef) -> None:
    image = golden.as_tensor(A).clone()
    before = tokens(own, image, B)
    image.fill_(0.1)
    with counting(own) as counts:
        after = tokens(own, image, B)
    assert counts.images == 1
    assert error(after, before) > 100 * EXACT
    assert error(after, cold(own, image, B)) <= EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_image_is_resized_once(own: er.EasyRef, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    resized, resize = [], preprocess.resize
    monkeypatch.setattr(preprocess, "resize", lambda *args: resized.append(1) or resize(*args))

    def prepare(*images: torch.Tensor, size: int = SIZE) -> list:
        return list(caches(own).prepare(images, own.config, size))

    images = [golden.as_tensor(image).to(dtype) for image in (A, B)]
    first = prepare(*images)
    copies = [image.clone() for image in reversed(images)]
    assert all(found is wanted for found, wanted in zip(prepare(*copies), reversed(first), strict=True))
    assert len(resized) == 2
    prepare(*images, size=112)
    assert len(resized) == 4
    (transposed,) = prepare(images[0].transpose(0, 1))
    assert transposed.pixels.shape[:2] == first[0].pixels.shape[1::-1]
    assert len(resized) == 5
    with pytest.raises(ValueError, match="read-only"):
        transposed.pixels[0] = 0


def test_reference_weights_are_not_cached(own: er.EasyRef) -> None:
    context = own.encode([A, B], "a cat", size=SIZE)
    weighed = own.aggregate(context.weighed([2, 0]))
    assert torch.equal(tokens(own, A, B), own.aggregate(own.encode([A, B], "a cat", size=SIZE)))
    assert error(own.aggregate(context), weighed) > EXACT


@torch.inference_mode()
def test_returned_states_are_copies(own: er.EasyRef) -> None:
    context = own.encode([A, B], "a cat", size=SIZE)
    wanted = own.aggregate(context)
    context.states.zero_()
    after_change = tokens(own, A, B, prompt="a dog")
    cold(own, A, B)
    assert torch.equal(after_change, tokens(own, A, B, prompt="a dog"))
    assert error(tokens(own, A, B), wanted) <= EXACT


def test_flops_of_a_cached_run_are_counted(own: er.EasyRef) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from easyref_core.mllm.budget import flops

    tokens(own, A, B, C)
    plan = own.plan(group_of(own, A, B, C, D))
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        own.encode_plan(plan)
    found = flops(own.config, plan.patches, plan.new_tokens, plan.cached_tokens)
    assert found == pytest.approx(counted.get_total_flops(), rel=0.01)


@torch.inference_mode()
def test_plan_does_not_depend_on_later_cache_changes(own: er.EasyRef) -> None:
    tokens(own, A, B)
    plan = own.plan(group_of(own, A, B, C))
    own.clear_cache()
    with counting(own) as counts:
        found = own.aggregate(own.encode_plan(plan))
    assert (counts.images, counts.tokens) == (1, plan.new_tokens)
    assert error(found, cold(own, A, B, C)) <= EXACT


# Bounds and ownership


def test_lru_cache_evicts_the_least_recently_used() -> None:
    cache: ByteLRUCache[str] = ByteLRUCache(10)
    for key in "abc":
        cache.put(key, key.upper(), 3)
    assert cache.get("a") == "A"
    cache.put("d", "D", 3)
    assert list(cache) == ["c", "a", "d"]
    cache.put("e", "E", 11)  # larger than the cache: nothing else is evicted for it
    assert list(cache) == ["c", "a", "d"]
    assert cache.values() == ["C", "A", "D"]
    assert cache.nbytes == 9
    cache.put("a", "again", 10)
    assert list(cache) == ["a"]
    assert cache.get("a") == "again"


def test_prefix_is_cached_once(own: er.EasyRef) -> None:
    tokens(own, A, B, C)
    size = caches(own).nbytes
    for prompt in ("one", "another", "a third, which is longer"):
        tokens(own, A, B, C, prompt=prompt)
        tokens(own, A, B, prompt=prompt)
    assert caches(own).nbytes == size
    tokens(own, A, B, C, D)
    longer = caches(own).nbytes
    assert longer < 1.5 * size  # it replaces the shorter prefix
    cold(own, A, B, C, D)
    assert longer == caches(own).nbytes


def test_nbytes_are_the_bytes_allocated(own: er.EasyRef) -> None:
    tokens(own, A, B, C)
    tensors = caches(own).features.values()
    for prefix in caches(own).prefixes.values():
        tensors += [prefix.states, *(t for layer in prefix.layers for t in layer)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert sum(storages.values()) == caches(own).device_nbytes


def test_larger_than_the_caches_is_computed_again() -> None:
    model = load(prefix_cache_bytes=10, feature_cache_bytes=10)
    found = []
    for _ in range(2):
        with counting(model) as counts:
            found.append(tokens(model, A, B))
        assert counts.images == 2
    assert torch.equal(*found)
    assert caches(model).nbytes == 0


def test_caches_are_freed_with_the_model() -> None:
    model = load()
    tokens(model, A, B)
    model.unconditional(size=SIZE)
    alive = weakref.ref(caches(model).prefixes.values()[0].states)
    del model
    gc.collect()
    assert alive() is None


def test_clear_cache(own: er.EasyRef) -> None:
    tokens(own, A, B)
    first = own.unconditional(size=SIZE)
    assert caches(own).nbytes > 0
    own.clear_cache()
    assert caches(own).nbytes == 0
    assert own.unconditional(size=SIZE) is not first


def test_models_do_not_share_caches(own: er.EasyRef) -> None:
    other = er.load(golden.CHECKPOINT, golden.MLLM, causal=False)
    tokens(own, A, B)
    with counting(other) as counts:
        tokens(other, A, B)
    assert counts.images == 2


# Stopping, and out of memory


class Stop(Exception):
    pass


@pytest.mark.parametrize("before", [[], [A], [A, B, C]])
def test_stopping_leaves_only_whole_features(own: er.EasyRef, before: list[Image.Image]) -> None:
    fractions: list[float] = []
    if before:
        tokens(own, *before)
    own.encode([A, B, C, D], "a cat", size=SIZE, progress=fractions.append)
    assert fractions == sorted(fractions)
    assert fractions[-1] == pytest.approx(1)
    wanted = cold(own, A, B, C, D)

    def stop(at: float, done: float) -> None:
        if done >= at:
            raise Stop

    for at in fractions:
        own.clear_cache()
        if before:
            tokens(own, *before)
        size = caches(own).nbytes
        with pytest.raises(Stop):
            own.encode([A, B, C, D], "a cat", size=SIZE, progress=partial(stop, at))
        assert caches(own).nbytes - size <= caches(own).features.nbytes
        assert error(tokens(own, A, B, C, D), wanted) <= EXACT


def failing(at: int, times: int = 1, error: type[Exception] = torch.OutOfMemoryError) -> Callable:
    """A hook that raises at calls `at` .. `at` + `times` - 1."""
    calls = count(1)

    def hook(*_: object) -> None:
        if at <= next(calls) < at + times:
            raise error("CUDA out of memory. Tried to allocate 2.00 GiB.")

    return hook


def linear_layers(model: er.EasyRef) -> list[torch.nn.Module]:
    """Modules that allocate: every matrix product of the MLLM body."""
    return [module for module in model.mllm.encoder.modules() if isinstance(module, torch.nn.Linear)]


PARTS = pytest.mark.parametrize("part", ["vision tower", "decoder"])


def module_of(model: er.EasyRef, part: str) -> torch.nn.Module:
    encoder = model.mllm.encoder
    return encoder.visual.blocks[-1] if part == "vision tower" else encoder.layers[-1]


def test_encoding_continues_in_smaller_chunks_after_any_failure() -> None:
    freed: list[int] = []
    model = load(min_chunk_tokens=8, on_out_of_memory=lambda: freed.append(1))
    wanted = cold(model, A, B, C, D)
    other = cold(model, A, B, C, D, prompt="a dog")
    for number, module in enumerate(linear_layers(model)):
        for times in (1, 2):
            model.clear_cache()
            with hooked((module, failing(1, times))):
                found = tokens(model, A, B, C, D)
            assert len(freed) == times, number
            freed.clear()
            assert error(found, wanted) <= EXACT
            assert error(tokens(model, A, B, C, D, prompt="a dog"), other) <= EXACT


@pytest.mark.parametrize("before", [[], [A]])
def test_failed_chunk_is_rolled_back(before: list[Image.Image]) -> None:
    model = load(min_chunk_tokens=8)
    lengths: list[set[int]] = []

    def record(_: object, inputs: tuple, options: dict) -> None:
        """Cache lengths of all layers before each decoder layer runs."""
        seen[id(options["cache"])] = options["cache"]
        if options["cache"] is next(iter(seen.values())):
            lengths.append({cache.length for cache in seen.values()})
            for tensor in (t for cache in seen.values() for t in cache.key_value or ()):
                assert before or tensor.nbytes == tensor.untyped_storage().nbytes()

    if before:
        tokens(model, *before)
    seen: dict = {}
    start = model.plan(group_of(model, A, B, C, D)).cached_tokens
    layers = model.mllm.encoder.layers
    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    # the first chunk, of all tokens, fails; of the two halves that follow the second one
    with hooked((layers[-1].mlp.down_proj, failing(1)), (layers[-1].mlp.down_proj, failing(2))):
        model.encode([A, B, C, D], "a cat", size=SIZE)
    for handle in handles:
        handle.remove()
    first, half, second_half, retry, *_ = lengths
    assert first == half == {start}
    assert len(second_half) == 1
    assert retry == second_half != {start}


@PARTS
def test_other_groups_are_evicted_on_out_of_memory(part: str) -> None:
    nbytes: list[int] = []
    model = load(min_chunk_tokens=8, on_out_of_memory=lambda: nbytes.append(caches(model).device_nbytes))
    wanted = cold(model, A, B, C)
    cold(model, A, D)
    encoder = model.mllm.encoder
    module = encoder.visual.blocks[0] if part == "vision tower" else encoder.layers[-1]
    with hooked((module, failing(1))):
        found = tokens(model, A, B, C)
    assert nbytes == [0]
    assert error(found, wanted) <= EXACT


def test_chunks_after_a_failure_fit_the_mask(own: er.EasyRef) -> None:
    length = group_of(own, A, B, C, D).input_ids.shape[1]
    model = load(min_chunk_tokens=2, max_mask_entries=5 * length)
    chunks: list[int] = []
    layer = model.mllm.encoder.layers[0]
    with hooked((layer, lambda _, inputs: chunks.append(inputs[0].shape[1])), (layer, failing(1))):
        model.encode([A, B, C, D], "a cat", size=SIZE)
    assert chunks[:2] == [length, length // 2]
    assert set(chunks[2:-1]) == {5}
    assert sum(chunks[1:]) == length


@PARTS
def test_progress_counts_failed_blocks_once(own: er.EasyRef, part: str) -> None:
    fractions: list[float] = []
    with hooked((module_of(own, part), failing(1))):
        own.encode([A, B, C, D], "a cat", size=SIZE, progress=fractions.append)
    assert fractions[-1] == pytest.approx(1)
    assert max(fractions[:-1]) < 0.99


@PARTS
def test_error_if_nothing_fits(own: er.EasyRef, part: str) -> None:
    wanted = cold(own, A, B)
    own.clear_cache()
    encoder = own.mllm.encoder
    module = encoder.visual.merger.mlp[0] if part == "vision tower" else encoder.layers[-1].mlp.up_proj
    with hooked((module, failing(1, 10**9))):
        text = error_of(lambda: tokens(own, A, B), torch.OutOfMemoryError)
    assert_says(text, "Out of memory", "smallest chunks", "smaller size", "fp8", "CUDA out of memory")
    assert torch.equal(tokens(own, A, B), wanted) or part == "decoder"
    assert error(tokens(own, A, B), wanted) <= EXACT


def test_states_are_returned_if_caching_fails(own: er.EasyRef, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    wanted = cold(own, A, B)
    own.clear_cache()
    monkeypatch.setattr(caches(own).prefixes, "put", fail)
    assert torch.equal(tokens(own, A, B), wanted)
    assert not list(caches(own).prefixes)


def test_oversized_prefix_evicts_nothing(own: er.EasyRef) -> None:
    tokens(own, A, B)
    model = load(prefix_cache_bytes=caches(own).prefixes.nbytes)
    tokens(model, A, B)
    tokens(model, A, B, C)
    with counting(model) as counts:
        tokens(model, A, B, prompt="a dog")
    assert counts.tokens < 40


def test_other_errors_are_not_retried(own: er.EasyRef) -> None:
    with hooked((linear_layers(own)[3], failing(1, 1, KeyError))), pytest.raises(KeyError):
        tokens(own, A, B)


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("Could not allocate tensor with 9 bytes. There is not enough GPU video memory"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_errors_of_devices(error: Exception, short: bool) -> None:
    assert is_out_of_memory(error) is short


def test_chunks_cover_everything_once() -> None:
    done: list[int] = []

    def step(start: int, end: int) -> None:
        if end - start > 3:
            raise MemoryError
        done.extend(range(start, end))

    for total, size in ((0, 5), (1, 1), (17, 17), (17, 4), (5, 0)):
        done.clear()
        run_in_chunks(total, lambda _, size=size: size, 1, step, on_oom=lambda: None, hint="")
        assert done == list(range(total))
    with pytest.raises(torch.OutOfMemoryError):
        run_in_chunks(17, lambda _: 17, 4, step, on_oom=lambda: None, hint="")


def test_error_quotes_the_allocator() -> None:
    message = "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory: 9 bytes."

    def step(*_: int) -> None:
        raise RuntimeError(f"{message}\nException raised from alloc_cpu")

    with pytest.raises(torch.OutOfMemoryError) as caught:
        run_in_chunks(1, lambda _: 1, 1, step, on_oom=lambda: None, hint="Free memory.")
    assert str(caught.value) == f"Free memory. ({message})"


@pytest.mark.parametrize("limit", [{"vision_chunk_patches": 40}, {"max_mask_entries": 300}])
def test_large_groups_are_encoded_in_chunks(own: er.EasyRef, limit: dict[str, int]) -> None:
    model = load(**limit)
    tokens(model, A)
    assert error(tokens(model, A, B, C, D), cold(own, A, B, C, D)) <= EXACT


def test_failed_attempt_is_freed_before_the_retry() -> None:
    """The error must be gone by then, because its frames hold the tensors of the failed attempt."""
    alive: list[weakref.ref] = []

    def step(start: int, end: int) -> None:
        big = torch.empty(10)
        assert not any(ref() is not None for ref in alive)
        if end - start > 2:
            alive.append(weakref.ref(big))
            raise MemoryError

    run_in_chunks(8, lambda _: 8, 1, step, on_oom=gc.collect, hint="")
    assert len(alive) == 2
