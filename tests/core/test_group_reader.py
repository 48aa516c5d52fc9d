"""Reading on: nothing is read twice, nothing kept is stale, and the tokens are those of a cold run."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import easyref_core as er
from devkit import golden
from devkit.golden import EXACT, error
from easyref_core.mllm import chunks, prefix_cache, preprocess
from easyref_core.mllm.chunks import is_out_of_memory, run_in_chunks
from easyref_core.mllm.qwen2_vl import LayerKVCache
from easyref_core.utils.lru_cache import ByteLRUCache

from .errors import assert_says, error_of

SIZE = 84  # pixels: 9 image tokens a reference
COLOURS = ("red", "green", "blue", "white", "orange", "purple", "gray", "pink", "brown")
A, B, C, D, *MORE = (Image.new("RGB", (90 + 7 * i, 100), colour) for i, colour in enumerate(COLOURS))


@pytest.fixture
def own() -> er.EasyRef:
    """A model of the test's own, that has read nothing."""
    return er.load(golden.CHECKPOINT, golden.MLLM)


class Ran:
    """What ran: images through the vision tower, tokens through the decoder."""

    def __init__(self) -> None:
        self.images = self.tokens = 0


@contextmanager
def hooked(*hooks: tuple[torch.nn.Module, Callable]) -> Iterator[None]:
    """Pairs of a module and what is called before each of its calls, while the block runs."""
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watched(model: er.EasyRef) -> Iterator[Ran]:
    ran, encoder = Ran(), model.mllm.encoder

    def saw(_: object, inputs: tuple) -> None:
        ran.images += len(inputs[1])

    def read(_: object, inputs: tuple) -> None:
        ran.tokens += inputs[0].shape[1]

    with hooked((encoder.visual, saw), (encoder.layers[0], read)):
        yield ran


def tokens(model: er.EasyRef, *images: Image.Image, prompt: str = "a cat", **how: object) -> torch.Tensor:
    return model.aggregate(model.encode(images, prompt, **{"size": SIZE, **how}))


def cold(model: er.EasyRef, *images: Image.Image, **how: object) -> torch.Tensor:
    """The same tokens from a model that remembers nothing."""
    model.forget()
    return tokens(model, *images, **how)


CHANGES: dict[str, tuple[list, dict, int, int]] = {
    # second encoding after [A, B, C]: images, settings, images seen anew, the first reference that is read anew
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
def test_only_what_changed_is_read_again(own: er.EasyRef, name: str) -> None:
    images, how, seen, kept = CHANGES[name]
    tokens(own, A, B, C)
    with watched(own) as ran:
        found = tokens(own, *images, **how)
    group = own.prepare(images, how.get("prompt", "a cat"), how.get("instruction", er.INSTRUCTION), SIZE)
    before = group.spans[kept - 1][1] + 1 if kept else 0
    assert ran.images == seen
    if "size" not in how:
        # where the next image differs, the mark before it was the same
        assert group.input_ids.shape[1] - ran.tokens - before in ((0, 1) if kept else (0,))
    assert error(found, cold(own, *images, **how)) <= EXACT


def test_a_long_history_is_as_good_as_none(own: er.EasyRef) -> None:
    """Readings on readings on readings."""
    groups = [[A], [A, B], [A, B, C], [A, B], [A, B, C, D], [B, A], [A, B, C, D, *MORE], [A, B, D], [B, A, C]]
    found = [tokens(own, *group, prompt=f"picture {i}") for i, group in enumerate(groups * 2)]
    for i, group in enumerate(groups * 2):
        assert error(found[i], cold(own, *group, prompt=f"picture {i}")) <= EXACT


def test_equal_images_are_seen_once(own: er.EasyRef) -> None:
    with watched(own) as ran:
        found = tokens(own, A, A, B, A)
    assert ran.images == 2
    features = own.reader.features(own.prepare([A, A, B], "", "", SIZE))
    assert torch.equal(features[0], features[1])
    assert not torch.equal(features[0], features[2])
    assert found.shape == (1, own.config.num_tokens, own.config.token_width)


def test_an_image_that_is_changed_in_place_is_another(own: er.EasyRef) -> None:
    picture = golden.as_tensor(A).clone()
    before = tokens(own, picture, B)
    picture.fill_(0.1)
    with watched(own) as ran:
        after = tokens(own, picture, B)
    assert ran.images == 1
    assert error(after, before) > 100 * EXACT
    assert error(after, cold(own, picture, B)) <= EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_an_image_is_resized_once(
    own: er.EasyRef, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    resized = []
    resize = preprocess.resize
    monkeypatch.setattr(preprocess, "resize", lambda *args: resized.append(1) or resize(*args))
    images = [golden.as_tensor(image).to(dtype) for image in (A, B)]
    wanted = [pixels.tobytes() for pixels in own.reader.pixels(images, SIZE)]
    copies = [image.clone() for image in reversed(images)]
    assert [pixels.tobytes() for pixels in own.reader.pixels(copies, SIZE)] == wanted[::-1]
    assert len(resized) == 2
    own.reader.pixels(images, 112)  # another size is another picture
    assert len(resized) == 4
    transposed = images[0].transpose(0, 1)
    assert (
        own.reader.pixels([transposed], SIZE)[0].shape[:2]
        == own.reader.pixels([images[0]], SIZE)[0].shape[1::-1]
    )
    assert len(resized) == 5


def test_what_is_kept_of_pixels_cannot_be_changed(own: er.EasyRef) -> None:
    (pixels,) = own.reader.pixels([golden.as_tensor(A)], SIZE)
    with pytest.raises(ValueError, match="read-only"):
        pixels[0] = 0


def test_weights_of_references_are_not_kept(own: er.EasyRef) -> None:
    """They enter in the aggregation alone."""
    context = own.encode([A, B], "a cat", size=SIZE)
    weighed = own.aggregate(context.weighed([2, 0]))
    assert torch.equal(tokens(own, A, B), own.aggregate(own.encode([A, B], "a cat", size=SIZE)))
    assert error(own.aggregate(context), weighed) > EXACT


def test_what_is_returned_is_not_what_is_kept(own: er.EasyRef) -> None:
    with torch.inference_mode():
        context = own.encode([A, B], "a cat", size=SIZE)
        wanted = own.aggregate(context)
        context.states.zero_()
        assert torch.equal(tokens(own, A, B, prompt="a dog"), cold_after(own, "a dog"))
        assert error(tokens(own, A, B), wanted) <= EXACT


def cold_after(model: er.EasyRef, prompt: str) -> torch.Tensor:
    """What a model that has read [A, B] once makes of another prompt."""
    model.forget()
    tokens(model, A, B)
    return tokens(model, A, B, prompt=prompt)


def test_the_operations_of_reading_on_are_counted(own: er.EasyRef) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from easyref_core.mllm.budget import flops

    tokens(own, A, B, C)
    work = own.reader.work(group := own.prepare([A, B, C, D], "a cat", er.INSTRUCTION, SIZE))
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        own.encode_prepared(group)
    found = flops(own.config, work.patches, work.tokens, work.start)
    assert found == pytest.approx(counted.get_total_flops(), rel=0.01)


# Bounds and ownership


def test_kept_values_are_bounded_and_the_least_used_goes_first() -> None:
    kept: ByteLRUCache[str] = ByteLRUCache(10)
    for key in "abc":
        kept.put(key, key.upper(), 3)
    assert kept.get("a") == "A"
    kept.put("d", "D", 3)
    assert list(kept) == ["c", "a", "d"]
    kept.put("e", "E", 11)  # larger than all of it: nothing else is given up for it
    assert list(kept) == ["c", "a", "d"]
    assert kept.nbytes == 9
    kept.put("a", "again", 10)
    assert list(kept) == ["a"]
    assert kept.get("a") == "again"


def test_nothing_is_kept_twice(own: er.EasyRef) -> None:
    tokens(own, A, B, C)
    size = own.reader.nbytes
    for prompt in ("one", "another", "a third, which is longer"):
        tokens(own, A, B, C, prompt=prompt)
        tokens(own, A, B, prompt=prompt)
    assert own.reader.nbytes == size
    tokens(own, A, B, C, D)
    longer = own.reader.nbytes
    assert longer < 1.5 * size  # in its place, not beside it
    assert longer == reached(own, A, B, C, D)


def reached(model: er.EasyRef, *images: Image.Image) -> int:
    """Bytes kept after reading one group."""
    model.forget()
    tokens(model, *images)
    return model.reader.nbytes


def test_the_bytes_kept_are_the_bytes_alive(own: er.EasyRef) -> None:
    tokens(own, A, B, C)
    reader = own.reader
    tensors = [feature for feature, _ in reader._features._values.values()]
    for prefix, _ in reader._prefixes._values.values():
        tensors += [prefix.states, *(t for key_value in prefix.key_values for t in key_value)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert sum(storages.values()) + reader._pixels.nbytes == reader.nbytes


def test_what_does_not_fit_is_read_again(own: er.EasyRef) -> None:
    wanted = tokens(own, A, B)
    own.forget()
    own.reader._prefixes.limit = own.reader._features.limit = 10
    for _ in range(2):
        with watched(own) as ran:
            assert torch.equal(tokens(own, A, B), wanted)
        assert ran.images == 2
    assert own.reader.nbytes == 0


def test_kept_memory_goes_with_the_model() -> None:
    model = er.load(golden.CHECKPOINT, golden.MLLM)
    tokens(model, A, B)
    model.unconditional(size=SIZE)
    key = next(iter(model.reader._prefixes))
    alive = weakref.ref(model.reader._prefixes.get(key).states)
    del model
    gc.collect()
    assert alive() is None


def test_forget_forgets(own: er.EasyRef) -> None:
    tokens(own, A, B)
    first = own.unconditional(size=SIZE)
    assert own.reader.nbytes > 0
    own.forget()
    assert own.reader.nbytes == 0
    assert own.unconditional(size=SIZE) is not first


def test_models_do_not_share() -> None:
    one, other = (er.load(golden.CHECKPOINT, golden.MLLM, causal=causal) for causal in (True, False))
    tokens(one, A, B)
    with watched(other) as ran:
        tokens(other, A, B)
    assert ran.images == 2


# Stopping, and too little memory


class Stop(Exception):
    pass


@pytest.mark.parametrize("before", [[], [A], [A, B, C]])
def test_stopping_anywhere_leaves_nothing(own: er.EasyRef, before: list[Image.Image]) -> None:
    parts: list[float] = []
    if before:
        tokens(own, *before)
    own.encode([A, B, C, D], "a cat", size=SIZE, progress=parts.append)
    assert parts == sorted(parts)
    assert parts[-1] == pytest.approx(1)
    own.forget()
    wanted = cold(own, A, B, C, D)
    for at in range(len(parts)):
        own.forget()
        if before:
            tokens(own, *before)
        size = own.reader.nbytes

        def stop(done: float, at: float = parts[at]) -> None:
            if done >= at:
                raise Stop

        with pytest.raises(Stop):
            own.encode([A, B, C, D], "a cat", size=SIZE, progress=stop)
        features = sum(size for _, size in own.reader._features._values.values())
        assert own.reader.nbytes - size <= features  # of what was begun only whole images' features may stay
        assert error(tokens(own, A, B, C, D), wanted) <= EXACT


def failing(at: int, times: int = 1, error: type[Exception] = torch.OutOfMemoryError) -> Callable:
    """A hook that raises at the `at`-th call, and at those after it, `times` in all."""
    calls = 0

    def hook(*_: object) -> None:
        nonlocal calls
        calls += 1
        if at <= calls < at + times:
            raise error("CUDA out of memory. Tried to allocate 2.00 GiB.")

    return hook


def heavy(model: er.EasyRef) -> list[torch.nn.Module]:
    """Where memory is needed: every matrix product of the MLLM body."""
    return [module for module in model.mllm.encoder.modules() if isinstance(module, torch.nn.Linear)]


def test_encoding_goes_on_in_smaller_pieces_wherever_memory_runs_out(
    own: er.EasyRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_cache, "MIN_CHUNK_TOKENS", 8)
    wanted, freed = cold(own, A, B, C, D), []
    own.reader.free = lambda: freed.append(1)
    for number, module in enumerate(heavy(own)):
        for times in (1, 2):
            own.forget()
            with hooked((module, failing(1, times))):
                found = tokens(own, A, B, C, D)
            assert len(freed) == times, number
            freed.clear()
            assert error(found, wanted) <= EXACT
            assert (
                error(tokens(own, A, B, C, D, prompt="a dog"), cold(own, A, B, C, D, prompt="a dog")) <= EXACT
            )


@pytest.mark.parametrize("before", [[], [A]])
def test_what_a_failed_attempt_has_read_is_gone_before_the_next(
    own: er.EasyRef, monkeypatch: pytest.MonkeyPatch, before: list[Image.Image]
) -> None:
    layers: list[LayerKVCache] = []

    class Watched(LayerKVCache):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            layers.append(self)

    lengths: list[set[int]] = []

    def attempt(*_: object) -> None:
        lengths.append({layer.length for layer in layers})
        for tensor in (t for layer in layers for t in layer.key_value or ()):
            assert before or tensor.nbytes == tensor.untyped_storage().nbytes()

    if before:
        tokens(own, *before)
    monkeypatch.setattr(prefix_cache, "MIN_CHUNK_TOKENS", 8)
    monkeypatch.setattr(prefix_cache, "LayerKVCache", Watched)
    start = own.reader.work(own.prepare([A, B, C, D], "a cat", er.INSTRUCTION, SIZE)).start
    last = own.mllm.encoder.layers[-1].mlp.down_proj
    # the first piece of all tokens fails, of the two halves that follow the second one
    with hooked((last, failing(1)), (last, failing(2)), (own.mllm.encoder.layers[0], attempt)):
        own.encode([A, B, C, D], "a cat", size=SIZE)
    whole, half, other, again, *_ = lengths
    assert whole == half == {start}
    assert len(other) == 1
    assert again == other != {start}


@pytest.mark.parametrize("part", ["vision tower", "decoder"])
def test_what_is_kept_of_other_groups_makes_room(
    own: er.EasyRef, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.setattr(prefix_cache, "MIN_CHUNK_TOKENS", 8)
    wanted = cold(own, A, B, C)
    own.forget()
    tokens(own, A, D)
    encoder, kept = own.mllm.encoder, []
    own.reader.free = lambda: kept.append(own.reader._features.nbytes + own.reader._prefixes.nbytes)
    module = encoder.visual.blocks[0] if part == "vision tower" else encoder.layers[-1]
    with hooked((module, failing(1))):
        found = tokens(own, A, B, C)
    assert kept == [0]
    assert error(found, wanted) <= EXACT


def test_after_a_failure_a_group_is_read_on_in_pieces_that_the_mask_allows(
    own: er.EasyRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = own.prepare([A, B, C, D], "a cat", er.INSTRUCTION, SIZE).input_ids.shape[1]
    monkeypatch.setattr(prefix_cache, "MIN_CHUNK_TOKENS", 2)
    monkeypatch.setattr(prefix_cache, "MAX_MASK_ENTRIES", 5 * length)
    read: list[int] = []
    layer = own.mllm.encoder.layers[0]
    with hooked((layer, lambda _, inputs: read.append(inputs[0].shape[1])), (layer, failing(1))):
        own.encode([A, B, C, D], "a cat", size=SIZE)
    assert read[:2] == [length, length // 2]
    assert set(read[2:-1]) == {5}
    assert sum(read[1:]) == length


@pytest.mark.parametrize("part", ["vision tower", "decoder"])
def test_progress_counts_what_failed_once(own: er.EasyRef, part: str) -> None:
    encoder, told = own.mllm.encoder, []
    module = encoder.visual.blocks[-1] if part == "vision tower" else encoder.layers[-1]
    with hooked((module, failing(1))):
        own.encode([A, B, C, D], "a cat", size=SIZE, progress=told.append)
    assert told[-1] == pytest.approx(1)
    assert max(told[:-1]) < 0.99


@pytest.mark.parametrize("part", ["vision tower", "decoder"])
def test_where_nothing_fits_one_error_says_what_to_do(own: er.EasyRef, part: str) -> None:
    wanted = cold(own, A, B)
    own.forget()
    encoder = own.mllm.encoder
    module = encoder.visual.merger.mlp[0] if part == "vision tower" else encoder.layers[-1].mlp.up_proj
    with hooked((module, failing(1, 10**9))):
        text = error_of(lambda: tokens(own, A, B), torch.OutOfMemoryError)
    assert_says(text, "Out of memory", "smallest pieces", "smaller size", "fp8", "CUDA out of memory")
    assert torch.equal(tokens(own, A, B), wanted) or part == "decoder"
    assert error(tokens(own, A, B), wanted) <= EXACT


def test_what_cannot_be_kept_is_read_all_the_same(own: er.EasyRef, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    wanted = cold(own, A, B)
    own.forget()
    monkeypatch.setattr(prefix_cache, "Prefix", full)
    assert torch.equal(tokens(own, A, B), wanted)
    assert not list(own.reader._prefixes)


def test_a_group_too_large_to_be_kept_takes_nothing_from_a_smaller_one(own: er.EasyRef) -> None:
    tokens(own, A, B)
    own.reader._prefixes.limit = own.reader._prefixes.nbytes
    tokens(own, A, B, C)
    with watched(own) as ran:
        tokens(own, A, B, prompt="a dog")
    assert ran.tokens < 40


def test_other_errors_are_not_tried_again(own: er.EasyRef) -> None:
    with hooked((heavy(own)[3], failing(1, 1, KeyError))), pytest.raises(KeyError):
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
def test_how_devices_say_that_memory_is_short(error: Exception, short: bool) -> None:
    assert is_out_of_memory(error) is short


def test_pieces_cover_everything_once() -> None:
    done: list[int] = []

    def run(start: int, end: int) -> None:
        if end - start > 3:
            raise MemoryError
        done.extend(range(start, end))

    for count, at_once in ((0, 5), (1, 1), (17, 17), (17, 4), (5, 0)):
        done.clear()
        run_in_chunks(count, lambda _, at_once=at_once: at_once, 1, run, lambda: None, "")
        assert done == list(range(count))
    with pytest.raises(torch.OutOfMemoryError):
        run_in_chunks(17, lambda _: 17, 4, run, lambda: None, "")


def test_the_error_repeats_what_the_allocator_says() -> None:
    said = "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory: 9 bytes."

    def run(*_: int) -> None:
        raise RuntimeError(f"{said}\nException raised from alloc_cpu")

    with pytest.raises(torch.OutOfMemoryError) as caught:
        run_in_chunks(1, lambda _: 1, 1, run, lambda: None, "Free memory.")
    assert str(caught.value) == f"Free memory. ({said})"


@pytest.mark.parametrize(("name", "value"), [("VISION_CHUNK_PATCHES", 40), ("MAX_MASK_ENTRIES", 300)])
def test_large_groups_are_read_in_pieces(
    own: er.EasyRef, monkeypatch: pytest.MonkeyPatch, name: str, value: int
) -> None:
    wanted = cold(own, A, B, C, D)
    monkeypatch.setattr(prefix_cache, name, value)
    own.forget()
    tokens(own, A)
    assert error(tokens(own, A, B, C, D), wanted) <= EXACT


def test_no_error_holds_on_to_memory_while_it_is_tried_again() -> None:
    """The frames an error came through hold the tensors of the attempt that failed."""
    alive: list[weakref.ref] = []

    def run(start: int, end: int) -> None:
        big = torch.empty(10)
        assert not any(ref() is not None for ref in alive)
        if end - start > 2:
            alive.append(weakref.ref(big))
            raise MemoryError

    run_in_chunks(8, lambda _: 8, 1, run, gc.collect, "")
    assert len(alive) == 2
    assert chunks.is_out_of_memory(MemoryError())
