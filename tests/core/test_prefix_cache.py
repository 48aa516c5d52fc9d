"""Prefix caching: nothing is computed twice, no cache is stale, and tokens match those of an uncached run."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import count

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import easyref_core as er
from devkit import golden
from devkit.golden import EXACT, error
from easyref_core.mllm import preprocess
from easyref_core.mllm.budget import MemoryOptions, flops
from easyref_core.mllm.prefill import is_out_of_memory, run_in_chunks
from easyref_core.mllm.prefix_cache import EncodeCaches, EncodePlan
from easyref_core.mllm.qwen2_vl import LayerKVCache
from easyref_core.utils.lru_cache import ByteLRUCache

from .errors import assert_says, error_of

SIZE = 84  # pixels: 9 image tokens per reference
COLOURS = ("red", "green", "blue", "white", "orange", "purple", "gray", "pink", "brown")
# Groups are strings of these letters.
IMAGES = {
    letter: Image.new("RGB", (90 + 7 * i, 100), colour)
    for i, (letter, colour) in enumerate(zip("ABCDEFGHI", COLOURS, strict=True))
}


def load(**memory: object) -> er.EasyRef:
    return er.load(golden.CHECKPOINT, golden.MLLM, memory=MemoryOptions(**memory))


@pytest.fixture
def fresh() -> er.EasyRef:
    """A model with empty caches."""
    return load()


def caches(model: er.EasyRef) -> EncodeCaches:
    return model.group_encoder.caches


def plan_of(model: er.EasyRef, group: str, use_prefix: bool = True, **options: object) -> EncodePlan:
    images = [IMAGES[letter] for letter in group]
    texts = {"prompt": "a cat", "instruction": er.INSTRUCTION, "size": SIZE, **options}
    return model.plan(model.prepare(images, **texts), use_prefix)


def encode(model: er.EasyRef, group: str, prompt: str = "a cat", **options: object) -> er.ContextStates:
    return model.encode([IMAGES[letter] for letter in group], prompt, **{"size": SIZE, **options})


def tokens(model: er.EasyRef, group: str, **options: object) -> er.ReferenceTokens:
    return model.aggregate(encode(model, group, **options))


@cache
def uncached(group: str, **options: object) -> er.ReferenceTokens:
    return tokens(load(), group, **options)


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
def counting(model: er.EasyRef) -> Iterator[Counter[str]]:
    """Numbers of images that the vision tower encodes and of tokens that the decoder prefills."""
    counts: Counter[str] = Counter(images=0, tokens=0)
    visual, layer = model.mllm.encoder.visual, model.mllm.encoder.layers[0]
    with hooked(
        (visual, lambda _, inputs: counts.update(images=len(inputs[1]))),
        (layer, lambda _, inputs: counts.update(tokens=inputs[0].shape[1])),
    ):
        yield counts


CHANGES: dict[str, tuple[str, dict, int, int]] = {
    # second encoding after ABC: group, settings, images that are encoded, references whose prefix is reused
    "prompt": ("ABC", {"prompt": "a dog in the snow"}, 0, 3),
    "instruction": ("ABC", {"instruction": "Draw this: "}, 0, 3),
    "longer prompt": ("ABC", {"prompt": "a cat " * 50}, 0, 3),
    "nothing": ("ABC", {}, 0, 3),
    "one added at the end": ("ABCD", {}, 1, 3),
    "one added in the middle": ("ADBC", {}, 1, 1),
    "one added at the start": ("DABC", {}, 1, 0),
    "the last removed": ("AB", {}, 0, 2),
    "the second removed": ("AC", {}, 0, 1),
    "the first removed": ("BC", {}, 0, 0),
    "another order": ("ACB", {}, 0, 1),
    "backwards": ("CBA", {}, 0, 0),
    "one replaced": ("ADC", {}, 1, 1),
    "one twice": ("ABCB", {}, 0, 3),
    "another size": ("ABC", {"size": 112}, 3, 0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_only_changes_are_encoded(fresh: er.EasyRef, name: str) -> None:
    group, options, encoded, reused = CHANGES[name]
    tokens(fresh, "ABC")
    before = plan_of(fresh, "ABC").group.prefix_key
    with counting(fresh) as counts:
        context = encode(fresh, group, **options)
    assert counts["images"] == encoded
    key = plan_of(fresh, group, **options).group.prefix_key
    common = next((i for i, (a, b) in enumerate(zip(before, key, strict=False)) if a != b), len(key))
    assert common >= context.spans[reused - 1][1] + 1 if reused else common < context.spans[0][1]
    assert counts["tokens"] == len(key) - (min(common, len(key) - 1) if reused else 0)
    assert error(fresh.aggregate(context), uncached(group, **options)) <= EXACT


def test_another_prompt_continues_after_the_instruction(fresh: er.EasyRef) -> None:
    tokens(fresh, "AB", prompt="a cat")
    plan = plan_of(fresh, "AB", prompt="dogs in the snow")
    instruction = plan_of(fresh, "AB", prompt="").group.input_ids.shape[1]
    assert plan.cached_tokens > plan.group.images_end
    assert plan.new_tokens <= plan.group.input_ids.shape[1] - instruction + 8  # the template's end


def test_long_history_does_not_change_tokens(fresh: er.EasyRef) -> None:
    for i, group in enumerate(2 * ["A", "AB", "ABC", "AB", "ABCD", "BA", "ABCDEFGHI", "ABD", "BAC"]):
        prompt = f"scene {i}"
        assert error(tokens(fresh, group, prompt=prompt), uncached(group, prompt=prompt)) <= EXACT


def test_equal_images_are_encoded_once(fresh: er.EasyRef) -> None:
    with counting(fresh) as counts:
        found = tokens(fresh, "AABA")
    assert counts["images"] == 2
    assert found.shape == (1, fresh.config.num_tokens, fresh.config.token_width)
    features = fresh.group_encoder.features(plan_of(fresh, "AAB", use_prefix=False))
    assert torch.equal(features[0], features[1])
    assert not torch.equal(features[0], features[2])


def test_image_changed_in_place_is_another_image(fresh: er.EasyRef) -> None:
    image = torch.full((100, 90, 3), 0.9)
    before = fresh.encode([image], size=SIZE)
    image.fill_(0.1)
    with counting(fresh) as counts:
        after = fresh.encode([image], size=SIZE)
    assert counts["images"] == 1
    assert error(after.states, before.states) > 100 * EXACT
    assert error(after.states, load().encode([image], size=SIZE).states) <= EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_image_is_resized_once(
    fresh: er.EasyRef, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    resized, resize = [], preprocess.resize
    monkeypatch.setattr(preprocess, "resize", lambda *args: resized.append(1) or resize(*args))

    def prepare(*images: torch.Tensor, size: int = SIZE) -> list:
        return list(caches(fresh).prepare(images, fresh.config, size))

    images = [golden.as_tensor(image).to(dtype) for image in (IMAGES["A"], IMAGES["B"])]
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


def test_pil_image_is_resized_once(fresh: er.EasyRef, monkeypatch: pytest.MonkeyPatch) -> None:
    resized, resize = [], preprocess.resize
    monkeypatch.setattr(preprocess, "resize", lambda *args: resized.append(1) or resize(*args))
    image, other = IMAGES["A"], IMAGES["B"]
    first, second, again = caches(fresh).prepare([image, other, image], fresh.config, SIZE)
    assert first is again
    assert len(resized) == 2
    copies = [image.copy(), other.convert("RGBA"), image.copy()]
    assert caches(fresh).prepare(copies, fresh.config, SIZE) == (first, second, first)
    assert len(resized) == 2
    copies[0].putpixel((3, 4), (1, 2, 3))
    changed, *_ = caches(fresh).prepare(copies, fresh.config, SIZE)
    assert changed.digest != first.digest
    assert len(resized) == 3


def test_first_bad_reference_is_named(fresh: er.EasyRef) -> None:
    group = [torch.rand(90, 90, 3), *(torch.full((90, 90, 3), torch.nan) for _ in range(3))]
    with pytest.raises(ValueError, match="reference 2 holds 24300 values"):
        caches(fresh).prepare(group, fresh.config, SIZE)
    assert caches(fresh).nbytes == 0


def test_cached_image_is_used_before_new_ones_evict_it() -> None:
    model = load(pixel_cache_bytes=30_000)  # one image at this size takes 21,168 bytes
    (first,) = caches(model).prepare([IMAGES["A"]], model.config, SIZE)
    group = [IMAGES["B"], IMAGES["A"]]
    assert caches(model).prepare(group, model.config, SIZE)[1] is first


def test_reference_weights_are_not_cached(fresh: er.EasyRef) -> None:
    weighed = fresh.aggregate(encode(fresh, "AB").weighed([2, 0]))
    assert torch.equal(tokens(fresh, "AB"), tokens(fresh, "AB"))
    assert error(tokens(fresh, "AB"), uncached("AB")) <= EXACT < error(weighed, uncached("AB"))


@torch.inference_mode()
def test_returned_states_are_copies(fresh: er.EasyRef) -> None:
    encode(fresh, "AB").states.zero_()
    assert error(tokens(fresh, "AB", prompt="a dog"), uncached("AB", prompt="a dog")) <= EXACT
    assert error(tokens(fresh, "AB"), uncached("AB")) <= EXACT


@pytest.mark.parametrize("before", ["", "ABC"])
def test_flops_are_counted_as_torch_counts_them(fresh: er.EasyRef, before: str) -> None:
    """SDPBackend.MATH computes attention as matrix products, which torch counts."""
    if before:
        tokens(fresh, before)
    plan = plan_of(fresh, "ABCD")
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        fresh.encode_plan(plan)
    wanted = pytest.approx(counted.get_total_flops(), rel=0.01)
    assert flops(fresh.config, plan.patches, plan.new_tokens, plan.cached_tokens) == wanted
    budget = fresh.budget([IMAGES[letter].size for letter in "ABCD"], "a cat", size=SIZE)
    assert before or budget.flops == wanted


@torch.inference_mode()
def test_plan_does_not_depend_on_later_cache_changes(fresh: er.EasyRef) -> None:
    tokens(fresh, "AB")
    plan = plan_of(fresh, "ABC")
    fresh.clear_cache()
    with counting(fresh) as counts:
        found = fresh.aggregate(fresh.encode_plan(plan))
    assert (counts["images"], counts["tokens"]) == (1, plan.new_tokens)
    assert error(found, uncached("ABC")) <= EXACT


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


def test_prefix_is_cached_once(fresh: er.EasyRef) -> None:
    tokens(fresh, "ABC")
    size = caches(fresh).nbytes
    for prompt in ("one", "another", "a third, which is longer"):
        tokens(fresh, "ABC", prompt=prompt)
        tokens(fresh, "AB", prompt=prompt)
    assert caches(fresh).nbytes == size
    tokens(fresh, "ABCD")
    longer = caches(fresh).nbytes
    assert longer < 1.5 * size  # it replaces the shorter prefix
    fresh.clear_cache()
    tokens(fresh, "ABCD")
    assert longer == caches(fresh).nbytes


def test_nbytes_are_the_bytes_allocated(fresh: er.EasyRef) -> None:
    tokens(fresh, "ABC")
    tensors = caches(fresh).features.values()
    for prefix in caches(fresh).prefixes.values():
        tensors += [prefix.states, *(t for layer in prefix.layers for t in layer)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert sum(storages.values()) == caches(fresh).device_nbytes


def test_larger_than_the_caches_is_computed_again() -> None:
    model = load(pixel_cache_bytes=10, prefix_cache_bytes=10, feature_cache_bytes=10)
    for _ in range(2):
        with counting(model) as counts:
            assert torch.equal(tokens(model, "AB"), uncached("AB"))
        assert counts["images"] == 2
    assert caches(model).nbytes == 0


def test_caches_are_freed_with_the_model() -> None:
    model = load()
    tokens(model, "AB")
    model.unconditional(size=SIZE)
    alive = weakref.ref(caches(model).prefixes.values()[0].states)
    del model
    gc.collect()
    assert alive() is None


def test_clear_cache(fresh: er.EasyRef) -> None:
    tokens(fresh, "AB")
    first = fresh.unconditional(size=SIZE)
    assert caches(fresh).nbytes > 0
    fresh.clear_cache()
    assert caches(fresh).nbytes == 0
    assert fresh.unconditional(size=SIZE) is not first


def test_models_do_not_share_caches(fresh: er.EasyRef) -> None:
    tokens(load(), "AB")
    with counting(fresh) as counts:
        tokens(fresh, "AB")
    assert counts["images"] == 2


# Stopping, and out of memory


class Stop(Exception):
    pass


def stop(at: float, fraction: float) -> None:
    if fraction >= at:
        raise Stop


@pytest.mark.parametrize("before", ["", "A", "ABC"])
def test_stopping_leaves_only_whole_features(fresh: er.EasyRef, before: str) -> None:
    fractions: list[float] = []
    if before:
        tokens(fresh, before)
    encode(fresh, "ABCD", progress=fractions.append)
    assert fractions == sorted(fractions)
    assert fractions[-1] == pytest.approx(1)
    for at in fractions:
        fresh.clear_cache()
        if before:
            tokens(fresh, before)
        size = caches(fresh).device_nbytes
        with pytest.raises(Stop):
            encode(fresh, "ABCD", progress=partial(stop, at))
        assert caches(fresh).device_nbytes - size <= caches(fresh).features.nbytes
        assert error(tokens(fresh, "ABCD"), uncached("ABCD")) <= EXACT


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


def test_encoding_continues_in_smaller_chunks_after_any_failure() -> None:
    freed: list[int] = []
    model = load(min_chunk_tokens=8, on_out_of_memory=lambda: freed.append(1))
    for number, module in enumerate(linear_layers(model)):
        for times in (1, 2):
            model.clear_cache()
            freed.clear()
            with hooked((module, failing(1, times))):
                assert error(tokens(model, "ABCD"), uncached("ABCD")) <= EXACT
            assert len(freed) == times, number
            dog = tokens(model, "ABCD", prompt="a dog")
            assert error(dog, uncached("ABCD", prompt="a dog")) <= EXACT


@pytest.mark.parametrize("before", ["", "A"])
def test_failed_chunk_is_rolled_back(before: str) -> None:
    model = load(min_chunk_tokens=8)
    lengths: list[set[int]] = []
    layer_caches: dict[int, LayerKVCache] = {}

    def record(layer: torch.nn.Module, _: tuple, options: dict) -> None:
        """Record the lengths of all layers' caches before each chunk."""
        layer_caches[id(layer)] = options["cache"]
        if layer is layers[0]:
            lengths.append({cache.length for cache in layer_caches.values()})
            for tensor in (t for cache in layer_caches.values() for t in cache.key_value or ()):
                assert before or tensor.nbytes == tensor.untyped_storage().nbytes()

    if before:
        tokens(model, before)
    start = plan_of(model, "ABCD").cached_tokens
    layers = model.mllm.encoder.layers
    for layer in layers:
        layer.register_forward_pre_hook(record, with_kwargs=True)
    # the first chunk, of all tokens, fails; of the two halves that follow the second one
    down_proj = layers[-1].mlp.down_proj
    with hooked((down_proj, failing(1)), (down_proj, failing(2))):
        encode(model, "ABCD")
    first, half, second_half, retry, *_ = lengths
    assert first == half == {start}
    assert len(second_half) == 1
    assert retry == second_half != {start}


def test_chunks_after_a_failure_fit_the_mask(fresh: er.EasyRef) -> None:
    length = plan_of(fresh, "ABCD").new_tokens
    model = load(min_chunk_tokens=2, max_mask_entries=5 * length)
    chunks: list[int] = []
    layer = model.mllm.encoder.layers[0]
    with hooked((layer, lambda _, inputs: chunks.append(inputs[0].shape[1])), (layer, failing(1))):
        encode(model, "ABCD")
    assert chunks[:2] == [length, length // 2]
    assert set(chunks[2:-1]) == {5}
    assert sum(chunks[1:]) == length


PARTS = pytest.mark.parametrize("part", ["vision tower", "decoder"])


def last_block(model: er.EasyRef, part: str) -> torch.nn.Module:
    encoder = model.mllm.encoder
    return encoder.visual.blocks[-1] if part == "vision tower" else encoder.layers[-1]


@PARTS
def test_out_of_memory_evicts_other_groups_and_progress_counts_once(part: str) -> None:
    nbytes: list[int] = []
    fractions: list[float] = []
    model = load(min_chunk_tokens=8, on_out_of_memory=lambda: nbytes.append(caches(model).device_nbytes))
    tokens(model, "AD")
    with hooked((last_block(model, part), failing(1))):
        found = tokens(model, "ABC", progress=fractions.append)
    assert nbytes == [0]
    assert fractions[-1] == pytest.approx(1)
    assert max(fractions[:-1]) < 0.999
    assert error(found, uncached("ABC")) <= EXACT


def test_features_before_a_failure_are_cached_by_the_retry() -> None:
    patches = max(plan_of(load(), "ABCD").patches)
    model = load(vision_chunk_patches=2 * patches)
    with hooked((last_block(model, "vision tower"), failing(2))):
        encode(model, "ABCD")
    assert not plan_of(model, "DCBA", use_prefix=False).unencoded_images


@PARTS
def test_error_if_nothing_fits(fresh: er.EasyRef, part: str) -> None:
    with hooked((last_block(fresh, part), failing(1, 10**9))):
        text = error_of(lambda: tokens(fresh, "AB"), torch.OutOfMemoryError)
    assert_says(text, "Out of memory", "smallest chunks", "smaller size", "fp8", "CUDA out of memory")
    assert torch.equal(tokens(fresh, "AB"), uncached("AB")) or part == "decoder"
    assert error(tokens(fresh, "AB"), uncached("AB")) <= EXACT


def test_states_are_returned_if_caching_fails(fresh: er.EasyRef, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(caches(fresh).prefixes, "put", fail)
    assert torch.equal(tokens(fresh, "AB"), uncached("AB"))
    assert not list(caches(fresh).prefixes)


def test_oversized_prefix_evicts_nothing(fresh: er.EasyRef) -> None:
    tokens(fresh, "AB")
    model = load(prefix_cache_bytes=caches(fresh).prefixes.nbytes)
    tokens(model, "AB")
    tokens(model, "ABC")
    with counting(model) as counts:
        tokens(model, "AB", prompt="a dog")
    assert counts["tokens"] < 40


def test_other_errors_are_not_retried(fresh: er.EasyRef) -> None:
    with hooked((linear_layers(fresh)[3], failing(1, 1, KeyError))), pytest.raises(KeyError):
        tokens(fresh, "AB")


OUT_OF_MEMORY = [
    "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory",
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
    "MPS backend out of memory (MPS allocated: 9.00 GB)",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "Could not allocate tensor with 9 bytes. There is not enough GPU video memory",
]


@pytest.mark.parametrize("message", OUT_OF_MEMORY)
def test_out_of_memory_errors_of_devices(message: str) -> None:
    assert is_out_of_memory(RuntimeError(message))


def test_out_of_memory_is_known_by_type_or_message() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


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
def test_large_groups_are_encoded_in_chunks(limit: dict[str, int]) -> None:
    model = load(**limit)
    tokens(model, "A")
    assert error(tokens(model, "ABCD"), uncached("ABCD")) <= EXACT


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
