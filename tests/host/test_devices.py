"""CUDA, MPS and DirectML: the host's answers for each device are used, and nothing mixes devices or waits for
one.

The host's answers are simulated, and the devices are those of tests/fake_device.py: this shows the device and
dtype of each tensor, the operations, and the synchronizations. It shows no numbers and no speed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import comfy.model_management as mm
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from devkit.host import golden, sampling
from devkit.host.tiny_nodes.tiny_sdxl import load_tiny_sdxl

from ..fake_device import FakeDevice, Operation

CUDA = "cuda:1"  # an index that a forgotten one would lose


class Kind(NamedTuple):
    """A device as the host describes it."""

    device: str
    bf16: bool  # should_use_bf16
    directml: bool = False


KINDS = {
    "CPU": Kind("cpu", False),
    "CUDA": Kind(CUDA, True),
    "CUDA before Ampere": Kind(CUDA, False),
    "MPS": Kind("mps:0", True),
    "MPS before macOS 14": Kind("mps:0", False),
    "DirectML": Kind("privateuseone:0", False, directml=True),
}

# float64: MPS has none (pytorch/pytorch#122602).
# Arithmetic on int64: cumsum, sort and reductions failed on MPS for years (pytorch/pytorch#96610,
# kulinseth/pytorch#354); ids and indices are only looked up, compared and converted here.
INT64_ALLOWED = set("arange to to_copy eq embedding index_select unsqueeze detach getitem".split())
# eye is empty on DirectML (microsoft/DirectML#431), multinomial runs on the CPU (#372), upsample_nearest1d
# too (#718); the others wait for the device, because their results' sizes are numbers on it.
WAITING = "nonzero masked_select unique unique2 cumsum sort".split()
UNSUPPORTED = {"eye", "multinomial", "upsample_nearest1d", *WAITING}


@pytest.fixture
def simulate(monkeypatch) -> Callable[[str], torch.device]:
    """Makes the host answer as on a kind of device; gives the device."""

    def answered(name: str) -> torch.device:
        kind = KINDS[name]
        device = torch.device(kind.device)
        monkeypatch.setattr(mm, "get_torch_device", lambda: device)
        monkeypatch.setattr(mm, "should_use_bf16", lambda *_, **__: kind.bf16)
        monkeypatch.setattr(mm, "directml_enabled", kind.directml)
        monkeypatch.setattr(mm, "load_models_gpu", lambda *_, **__: None)  # FakeDevice.adopt does it
        return device

    return answered


def require_portable(operations: list[Operation]) -> None:
    """Require operations that MPS and DirectML are not known to lack."""

    def names(*dtypes: torch.dtype) -> set[str]:
        chosen = [each for each in operations if not dtypes or each.dtypes & set(dtypes)]
        return {each.name.removeprefix("aten.").strip("_") for each in chosen}

    assert operations, "nothing ran on the device"
    assert not names() & UNSUPPORTED
    assert not names(torch.float64)
    assert names(torch.int64) <= INT64_ALLOWED


# Compute dtype, and storage of the weights

PRECISIONS = ("auto", "bf16", "fp32", "fp8_e4m3fn")


def build_arguments(pack: Any, monkeypatch, precision: str) -> tuple[torch.device, torch.dtype, Callable]:
    """Device, dtype and cast with which the loader builds the model."""
    hosted, calls = golden.part(pack, "nodes.host.hosted_model"), []

    def build(_: Any, __: Any, device: Any, dtype: Any, cast: Any, **___: Any) -> None:
        calls.append((device, dtype, cast))

    monkeypatch.setattr(hosted, "build", build)
    monkeypatch.setattr(hosted, "HostedEasyRef", lambda _: None)
    monkeypatch.setattr(hosted, "looks_up_fp8", lambda _: True)  # runs on the device, which is not there
    golden.load(pack, precision)
    return calls[0]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", KINDS)
def test_arithmetic_is_bf16_where_the_host_says_so(pack, monkeypatch, simulate, name, precision) -> None:
    simulated = simulate(name)
    device, dtype, _ = build_arguments(pack, monkeypatch, precision)
    assert device == simulated  # with its index
    assert dtype == (torch.bfloat16 if KINDS[name].bf16 and precision != "fp32" else torch.float32)


def test_weights_are_stored_in_dtypes_that_the_device_can_cast(pack, monkeypatch, simulate) -> None:
    """Otherwise they can be loaded to no MPS (fp8, Comfy-Org/ComfyUI#9263) and no DirectML (bf16, fp8)."""
    wrong = []
    for name in KINDS:
        device = simulate(name)
        for precision in PRECISIONS:
            _, _, cast = build_arguments(pack, monkeypatch, precision)
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                stored = cast("encoder.layers.0.mlp.up_proj.weight", torch.zeros(2, 2, dtype=dtype)).dtype
                if not mm.supports_cast(device, stored):
                    wrong.append((name, precision, dtype, stored))
    assert not wrong


# Devices of the tensors


@pytest.fixture
def loaded(pack, simulate) -> Callable[[str], tuple[Any, FakeDevice]]:
    """Loads the golden model on a kind of device."""

    def load(name: str) -> tuple[Any, FakeDevice]:
        fake = FakeDevice(str(simulate(name)))
        easyref = golden.load(pack, "auto")
        fake.adopt(easyref.model.mllm, easyref.model.kv)
        return easyref, fake

    return load


@pytest.mark.parametrize("name", ["CUDA", "DirectML"])
def test_a_group_is_encoded_on_the_device_and_cached_where_the_host_says(pack, loaded, name: str) -> None:
    easyref, fake = loaded(name)
    with torch.inference_mode(), fake:
        context = golden.encode(pack, easyref)
        assert len(fake.brought) == 3  # patches, ids, and the patches' positions: nothing in a block or layer
        # for the caches, after all is computed: features, the states, keys and values of each layer
        assert len(fake.read_back) == 2 + 2 * easyref.model.config.body_layers
        assert context.states.device == mm.intermediate_device()
        assert context.states.dtype == easyref.model.dtype
        weight_bias = golden.part(pack, "easyref_core.tokens.aggregator").weight_bias
        weighed = weight_bias(context.weighed([1, 2, 0]), easyref.model.config.num_tokens)
        for bias in (None, fake.like(weighed.to(easyref.model.dtype))):
            states = fake.like(context.states)
            fake.read_back.clear()
            tokens = easyref.model.mllm.aggregator(states, attn_bias=bias)
            assert tokens.device == fake.device
            assert fake.read_back == []
    require_portable(fake.operations)


@pytest.mark.parametrize("name", ["CUDA", "MPS", "DirectML"])
def test_keys_and_values_are_stored_where_the_host_says(pack, monkeypatch, loaded, easy, name: str) -> None:
    easyref, fake = loaded(name)
    # reads the numbers, which do not exist here
    monkeypatch.setattr(golden.part(pack, "easyref_core.model"), "require_finite", lambda *_: None)
    with torch.inference_mode(), fake:
        key_values = easyref.key_values(easy.tokens)
    assert {tensor.device for pair in key_values for tensor in pair} == {mm.intermediate_device()}
    assert {tensor.dtype for pair in key_values for tensor in pair} == {torch.float32}
    assert len(fake.brought) == 2  # the tokens of each side
    require_portable(fake.operations)


# Sampling


def test_a_step_waits_for_the_device_at_no_layer(torch_attention, easy, pack) -> None:
    """A patched UNet call copies K and V to the device; the next one copies nothing in either direction."""
    model, sites = easy.apply(load_tiny_sdxl()), len(easy.key_values)
    unet, expected = model.model.diffusion_model, golden.expected()
    fake = FakeDevice(CUDA)
    fake.adopt(unet)
    options = sampling.sampling_options(model)
    options |= {"cond_or_uncond": [1, 0], golden.part(pack, "nodes.unet_patch.step").SIGMA: 1.0}
    names = "sample", "timestep", "encoder_hidden_states"
    x, time, text = (fake.like(expected[f"unet.{name}"]) for name in names)
    y = fake.like(torch.zeros(2, unet.label_emb[0][0].in_features))
    for brought in (2 * sites, 0):
        with torch.inference_mode(), fake:
            fake.forget()
            predicted = unet(x, time, context=text, y=y, control=None, transformer_options={**options})
        assert predicted.device == fake.device
        assert (len(fake.brought), fake.read_back) == (brought, [])
        require_portable(fake.operations)


SETTINGS = {
    "mask": {"mask": torch.linspace(0, 1, 40 * 30).reshape(1, 40, 30)},
    "K+mean(V) w/ C penalty": {"embeds_scaling": "K+mean(V) w/ C penalty"},
    "weight type of one side": {"weight_type": "style transfer"},
    "schedule": {"weight_schedule": "0: 0.5, 1: 1"},
}


class NoUNet:
    """Executor of UNet calls that returns the transformer_options."""

    class_obj = None

    def __call__(self, *args: Any) -> dict[str, Any]:
        return args[5]


def steps(pack: Any, model: Any, fake: FakeDevice, sigmas: list, recorder: Any = None) -> Iterator[None]:
    """Compute two sites in each step of a batch of two runs of two latents; yields after each step."""
    (injection,) = model.get_attachment("easyref").injections
    if recorder is not None:
        injection = dataclasses.replace(injection, recorder=recorder)
    module = golden.part(pack, "nodes.unet_patch.step")
    wrapper_of = golden.part(pack, "nodes.unet_patch.step_wrapper").StepWrapper
    wrapper = wrapper_of((injection,), model.get_model_object("model_sampling"))
    patches = list(model.model_options["transformer_options"]["patches_replace"]["attn2"].items())
    x = fake.like(torch.zeros(4, 4, 16, 16))
    for sigma in sigmas:
        fake.forget()
        options = {"cond_or_uncond": [1, 0], module.SIGMA: sigma}
        passed = wrapper.diffusion_model(NoUNet(), x, transformer_options=options)
        for _, patch in (patches[0], patches[-1]):
            width = passed[module.STEP].active[0].key_values[patch.position][0].shape[-1]
            q = fake.like(torch.zeros(4, 64, width))
            extra_options = {**passed, "n_heads": 2, "activations_shape": (4, width, 8, 8)}
            assert patch(q, q, q, extra_options).device == fake.device
        require_portable(fake.operations)
        yield


@pytest.mark.parametrize("setting", SETTINGS)
def test_no_setting_waits_for_the_device(torch_attention, pack, easy, setting: str) -> None:
    fake = FakeDevice(KINDS["MPS"].device)
    model = easy.apply(load_tiny_sdxl(), **SETTINGS[setting])
    recorder = golden.part(pack, "easyref_core.inspect.reference_share").Recorder()
    with torch.inference_mode(), fake:
        runs = steps(pack, model, fake, [1.0, 1.0, 0.7], recorder)
        next(runs)
        assert fake.brought, "K and V were there before"
        for _ in runs:
            assert (fake.brought, fake.read_back) == ([], [])


def test_batched_tokens_are_copied_once(torch_attention, pack, easy) -> None:
    """The rows of the sampled frames, and where one row is for several, their indices."""
    fake, other = FakeDevice(CUDA), easy.other_tokens()
    shared = easy.pair(other.conditional, easy.tokens.unconditional)
    for second, numbers in ((other, 0), (shared, 1)):
        pairs = {"tokens0": easy.tokens, "tokens1": second}
        pair = golden.execute(pack, "EasyRefBatchTokens", tokens=pairs).result[0]
        model = easy.apply(load_tiny_sdxl(), tokens=pair)
        with torch.inference_mode(), fake:
            runs = steps(pack, model, fake, [1.0, 1.0])
            next(runs)
            assert len(fake.brought) == 2 * len(easy.key_values) + numbers
            next(runs)
            assert (fake.brought, fake.read_back) == ([], [])


def test_the_fake_device_detects_synchronization() -> None:
    fake = FakeDevice(CUDA)
    there = fake.like(torch.zeros(3))
    with torch.inference_mode(), fake:
        with pytest.raises(RuntimeError, match="device"):
            there + torch.zeros(3)
        for read in (lambda: there.sum().item(), lambda: bool((there > 0).all()), lambda: there[there > 0]):
            with pytest.raises((RuntimeError, DataDependentOutputException)):
                read()
        assert there.cpu().device.type == "cpu"
        assert fake.read_back
        _ = there[[0, 2]]
        assert fake.brought == ["getitem"]
