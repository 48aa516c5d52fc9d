"""CUDA, MPS and DirectML: the host is asked for every device and type, and nothing meets across devices or waits for one.

The host's answers are simulated, and the devices are those of tests/fake_device.py: this shows where each tensor would be,
of what type, which operations would run and when a device would be waited for. It shows no numbers and no speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import comfy.ldm.modules.attention
import comfy.model_management as mm
import pytest
import torch

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
# Arithmetic on int64: cumsum, sort and reductions failed on MPS for years (pytorch/pytorch#96610, kulinseth/pytorch#354);
# ids and places are only looked up, compared and converted here.
WITH_INT64 = {"arange", "to", "_to_copy", "eq", "embedding", "index_select", "unsqueeze", "detach", "getitem"}
# eye is empty on DirectML (microsoft/DirectML#431), multinomial runs on the CPU (#372), upsample_nearest1d too (#718);
# the others wait for the device, as their results' sizes are numbers on it.
GAPS = {
    "eye",
    "multinomial",
    "upsample_nearest1d",
    "nonzero",
    "masked_select",
    "unique",
    "_unique2",
    "cumsum",
    "sort",
}


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
    """Nothing among these that MPS or DirectML is known not to do."""
    names = {operation.name.removeprefix("aten.").strip("_") for operation in operations}
    assert operations, "nothing ran on the device"
    assert not names & {name.strip("_") for name in GAPS}
    assert not [operation for operation in operations if torch.float64 in operation.dtypes]
    counted = {o.name.removeprefix("aten.").strip("_") for o in operations if torch.int64 in o.dtypes}
    assert counted <= {name.strip("_") for name in WITH_INT64}


# What is computed in which type, and how weights are kept


def asked_for(pack: Any, monkeypatch, precision: str) -> tuple[torch.device, torch.dtype, Callable]:
    """Device, arithmetic and cast that the loader gives to the model it builds."""
    hosted, asked = golden.part(pack, "nodes.host.hosted_model"), []
    monkeypatch.setattr(
        hosted, "build", lambda _, __, device, dtype, cast, **others: asked.append((device, dtype, cast))
    )
    monkeypatch.setattr(hosted, "HostedEasyRef", lambda _: None)
    monkeypatch.setattr(hosted, "looks_up_fp8", lambda _: True)  # asks the device itself, which is not there
    golden.load(pack, precision)
    return asked[0]


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp32", "fp8_e4m3fn"])
@pytest.mark.parametrize("name", KINDS)
def test_arithmetic_is_bf16_where_the_host_says_so_and_else_fp32(
    pack, monkeypatch, simulate, name: str, precision: str
) -> None:
    wanted = simulate(name)
    device, dtype, _ = asked_for(pack, monkeypatch, precision)
    assert device == wanted  # with its index
    assert dtype == (torch.bfloat16 if KINDS[name].bf16 and precision != "fp32" else torch.float32)


def test_weights_are_kept_in_types_that_the_device_can_cast(pack, monkeypatch, simulate) -> None:
    """Otherwise they can be loaded to no MPS (fp8, Comfy-Org/ComfyUI#9263) and no DirectML (bf16, fp8)."""
    wrong = []
    for name in KINDS:
        device = simulate(name)
        for precision in ("auto", "bf16", "fp32", "fp8_e4m3fn"):
            _, _, cast = asked_for(pack, monkeypatch, precision)
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                kept = cast("encoder.layers.0.mlp.up_proj.weight", torch.zeros(2, 2, dtype=dtype)).dtype
                if not mm.supports_cast(device, kept):
                    wrong.append((name, precision, dtype, kept))
    assert not wrong


# Where everything is


@pytest.fixture
def loaded(pack, simulate) -> Callable[[str], tuple[Any, FakeDevice]]:
    """Loads the golden model on a kind of device."""

    def load(name: str) -> tuple[Any, FakeDevice]:
        fake = FakeDevice(str(simulate(name)))
        easyref = golden.load(pack, "auto")
        fake.adopt(easyref.model.mllm, easyref.model.kv)
        return easyref, fake

    return load


def read(pack: Any, easyref: Any) -> Any:
    images = [image[0] for image in golden.references()]
    return easyref.encode(images, golden.SETTINGS["prompt"], golden.instruction(pack), golden.SIZE)


@pytest.mark.parametrize("name", ["CUDA", "DirectML"])
def test_a_group_is_read_on_the_device_and_kept_where_the_host_says(pack, loaded, name: str) -> None:
    easyref, fake = loaded(name)
    with torch.inference_mode(), fake:
        context = read(pack, easyref)
        assert len(fake.brought) == 3  # patches, ids, and the patches' places: nothing in a block or layer
        # what is kept, when all is computed: features, the states, keys and values of each layer
        assert len(fake.read_back) == 2 + 2 * easyref.model.config.body_layers
        assert context.states.device == mm.intermediate_device()
        assert context.states.dtype == easyref.model.dtype
        weighed = golden.part(pack, "easyref_core.tokens.aggregator").weight_bias(
            context.weighed([1, 2, 0]), easyref.model.config.num_tokens
        )
        for bias in (None, fake.like(weighed.to(easyref.model.dtype))):
            states = fake.like(context.states)
            fake.read_back.clear()
            tokens = easyref.model.mllm.aggregator(states, attn_bias=bias)
            assert tokens.device == fake.device
            assert fake.read_back == []
    require_portable(fake.operations)


@pytest.mark.parametrize("name", ["CUDA", "MPS", "DirectML"])
def test_keys_and_values_are_kept_where_the_host_says(pack, monkeypatch, loaded, easy, name: str) -> None:
    easyref, fake = loaded(name)
    # looks at the numbers, where they are kept; there are none here
    monkeypatch.setattr(golden.part(pack, "easyref_core.model"), "require_finite", lambda *_: None)
    with torch.inference_mode(), fake:
        key_values = easyref.key_values(easy.tokens)
    assert {tensor.device for pair in key_values for tensor in pair} == {mm.intermediate_device()}
    assert {tensor.dtype for pair in key_values for tensor in pair} == {torch.float32}
    assert len(fake.brought) == 2  # the tokens of each side
    require_portable(fake.operations)


# Sampling


@pytest.fixture
def attention(pack, monkeypatch) -> None:
    """The host's attention of torch alone, in place of the one it chooses for a CPU by free memory."""
    plain = comfy.ldm.modules.attention.attention_pytorch
    for module in (comfy.ldm.modules.attention, golden.part(pack, "nodes.unet_patch.site_patch")):
        monkeypatch.setattr(module, "optimized_attention", plain)


def test_a_step_waits_for_the_device_at_no_layer(attention, easy, pack) -> None:
    """A whole patched UNet call: K and V come to the device once; the next call brings and reads back nothing."""
    model, sites = easy.apply(load_tiny_sdxl()), len(easy.key_values)
    unet, given = model.model.diffusion_model, golden.expected()
    fake = FakeDevice(CUDA)
    fake.adopt(unet)
    options = sampling.sampling_options(model)
    options |= {"cond_or_uncond": [1, 0], golden.part(pack, "nodes.unet_patch.cond_roles").SIGMA: 1.0}
    x, time, text = (
        fake.like(given[f"unet.{name}"]) for name in ("sample", "timestep", "encoder_hidden_states")
    )
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
    "a type of one side": {"weight_type": "style transfer"},
    "schedule": {"weight_schedule": "0: 0.5, 1: 1"},
}


class NoUNet:
    """An executor of UNet calls that gives back the transformer_options."""

    class_obj = None

    def __call__(self, *given: Any) -> dict[str, Any]:
        return given[5]


def steps(
    pack: Any, model: Any, fake: FakeDevice, sigmas: list[float], recorder: Any = None
) -> Iterator[None]:
    """What two sites compute in each step of a batch of two runs of two latents; yields after each."""
    (injection,) = model.get_attachment("easyref").injections
    if recorder is not None:
        injection = injection.recorded_by(recorder)
    step_wrapper = golden.part(pack, "nodes.unet_patch.step_wrapper")
    wrapper = step_wrapper.StepWrapper((injection,), model.get_model_object("model_sampling"))
    patches = list(model.model_options["transformer_options"]["patches_replace"]["attn2"].items())
    x = fake.like(torch.zeros(4, 4, 16, 16))
    for sigma in sigmas:
        fake.forget()
        options = {"cond_or_uncond": [1, 0], golden.part(pack, "nodes.unet_patch.cond_roles").SIGMA: sigma}
        handed = wrapper.diffusion_model(NoUNet(), x, transformer_options=options)
        for _, patch in (patches[0], patches[-1]):
            width = handed[step_wrapper.STEP].active[0].key_values[patch.position][0].shape[-1]
            q = fake.like(torch.zeros(4, 64, width))
            told = {**handed, "n_heads": 2, "activations_shape": (4, width, 8, 8)}
            assert patch(q, q, q, told).device == fake.device
        require_portable(fake.operations)
        yield


@pytest.mark.parametrize("setting", SETTINGS)
def test_no_setting_waits_for_the_device(attention, pack, easy, setting: str) -> None:
    fake = FakeDevice(KINDS["MPS"].device)
    model = easy.apply(load_tiny_sdxl(), **SETTINGS[setting])
    recorder = golden.part(pack, "easyref_core.inspect.reference_share").Recorder()
    with torch.inference_mode(), fake:
        taken = steps(pack, model, fake, [1.0, 1.0, 0.7], recorder)
        next(taken)
        assert fake.brought, "K and V were there before"
        for _ in taken:
            assert (fake.brought, fake.read_back) == ([], [])


def test_batched_tokens_are_brought_once(attention, pack, easy) -> None:
    """The rows of the frames that are sampled, and where one stands for several, their numbers."""
    fake, other = FakeDevice(CUDA), easy.other_tokens()
    tokens = golden.node(pack, "EasyRefBatchTokens").execute
    with torch.inference_mode():
        shared = type(other)(other.conditional, easy.tokens.unconditional)
        for second, numbers in ((other, 0), (shared, 1)):
            pair = tokens(tokens={"tokens0": easy.tokens, "tokens1": second}).result[0]
            model = easy.apply(load_tiny_sdxl(), tokens=pair)
            with fake:
                taken = steps(pack, model, fake, [1.0, 1.0])
                next(taken)
                assert len(fake.brought) == 2 * len(easy.key_values) + numbers
                next(taken)
                assert (fake.brought, fake.read_back) == ([], [])


def test_the_fake_device_notices_what_it_is_for() -> None:
    fake = FakeDevice(CUDA)
    there = fake.like(torch.zeros(3))
    with torch.inference_mode(), fake:
        with pytest.raises(RuntimeError, match="device"):
            there + torch.zeros(3)
        for asks in (lambda: there.sum().item(), lambda: bool((there > 0).all()), lambda: there[there > 0]):
            with pytest.raises((RuntimeError, torch._subclasses.fake_tensor.DataDependentOutputException)):
                asks()
        assert there.cpu().device.type == "cpu"
        assert fake.read_back
        _ = there[[0, 2]]
        assert fake.brought == ["getitem"]
