"""Memory of the weights: one copy, in the chosen precision, streamed if necessary, released on /free."""

from __future__ import annotations

import gc
import json
import time
from pathlib import Path

import comfy.memory_management
import comfy.model_management
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from devkit.host import golden, graphs

MAPS = Path("/proc/self/maps")


def weights(easyref) -> dict[str, torch.Tensor]:
    """Every weight that stays loaded, by name."""
    return dict([*easyref.model.mllm.named_parameters(), *easyref.model.kv.named_parameters()])


def live_tensors() -> list[torch.Tensor]:
    """All strided ones but the fake ones of other tests (fake_device.py), which have no memory."""
    gc.collect()
    tensors = (thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
    return [t for t in tensors if not isinstance(t, FakeTensor) and t.layout is torch.strided]


def storages(tensors: list[torch.Tensor]) -> dict[int, int]:
    """{address: bytes} of the tensors' storages, shared ones once."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


# Storage of the weights


def test_loading_leaves_one_copy_of_the_weights(pack):
    before = live_tensors()  # held, so that no address of theirs is used again
    easyref = golden.load(pack, "fp32")
    new = storages(live_tensors()).items() - storages(before).items()
    assert sum(size for _, size in new) == sum(4 * weight.numel() for weight in weights(easyref).values())


def test_host_counts_every_weight(pack):
    easyref = golden.load(pack)
    counted = sum(patcher.model_size() for patcher in easyref.get_models())
    assert counted == sum(weight.nbytes for weight in weights(easyref).values())


@pytest.mark.skipif(not MAPS.exists(), reason="no /proc to see mappings in")
def test_auto_keeps_the_files_own_bytes_mapped(pack):
    easyref = golden.load(pack, "auto")
    lines = [line.split() for line in MAPS.read_text().splitlines() if line.endswith(str(golden.CHECKPOINT))]
    mapped = [[int(address, 16) for address in line[0].split("-")] for line in lines]
    for name, weight in weights(easyref).items():
        assert any(start <= weight.data_ptr() < end for start, end in mapped), name


@pytest.mark.parametrize(
    ("precision", "dtype"), [("auto", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_weights_are_stored_in_the_chosen_precision(pack, precision: str, dtype: torch.dtype):
    assert {weight.dtype for weight in weights(golden.load(pack, precision)).values()} == {dtype}


@pytest.mark.parametrize("lookup", [True, False])
def test_fp8_is_for_the_matrices_on_which_the_tokens_depend_less(pack, monkeypatch, lookup: bool):
    hosted = golden.part(pack, "nodes.host.hosted_model")
    assert hosted.looks_up_fp8(torch.device("cpu"))
    monkeypatch.setattr(hosted, "looks_up_fp8", lambda _: lookup)
    easyref = golden.load(pack, "fp8_e4m3fn")
    fp8 = {name for name, weight in weights(easyref).items() if weight.dtype == torch.float8_e4m3fn}
    in_matrices = {name for name, weight in weights(easyref).items() if weight.ndim == 2}
    matrices = {name for name in in_matrices if not name.startswith("aggregator.") or "mlp" in name}
    assert fp8 == (matrices if lookup else matrices - {"encoder.embed_tokens.weight"})


def test_fp8_takes_half_of_bf16_at_full_size(pack, monkeypatch):
    """Counted over every tensor of the released layout, without their memory."""
    hosted = golden.part(pack, "nodes.host.hosted_model")
    monkeypatch.setattr(hosted, "copy_to_pages", lambda tensor, dtype: tensor.to(dtype))
    size = {
        precision: sum(
            hosted.storage(precision, torch.bfloat16, torch.device("cpu"))(name, tensor).nbytes
            for name, tensor in released(pack)
        )
        for precision in ("bf16", "fp8_e4m3fn")
    }
    assert size["bf16"] == pytest.approx(5.1e9, rel=0.01)
    assert size["fp8_e4m3fn"] / size["bf16"] == pytest.approx(0.5023, abs=0.0002)


def released(pack) -> list[tuple[str, torch.Tensor]]:
    """The weights of the released model that stay loaded, by name, as tensors without memory."""
    layout = json.loads((golden.GOLDEN / "released_layout.json").read_text())["keys"]
    formats = golden.part(pack, "easyref_core.checkpoint.formats")
    named = formats.translate(layout, formats.EASYREF_NAMES)
    shapes = {new: layout[name] for name, new in named.items() if not new.startswith("unet.")}
    with torch.device("meta"):
        tensors = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    return [(name, t.flatten(1) if "patch_embed" in name else t) for name, t in tensors.items()]


@pytest.mark.parametrize(("precision", "least"), [("bf16", 0.9999), ("fp8_e4m3fn", 0.995)])
def test_tokens_of_lower_precision_are_close(pack, precision: str, least: float):
    with torch.inference_mode():
        tokens = golden.tokens(pack, golden.load(pack, precision)).conditional
    wanted = golden.expected()["cond.reference_embeds"]
    assert torch.cosine_similarity(torch.Tensor(tokens).flatten(), wanted.flatten(), dim=0) >= least


# Streaming


def test_every_weight_can_be_streamed(pack):
    """The host streams only its own operations, which must then hold all weights, and moves no buffer."""
    easyref = golden.load(pack)
    for root in (easyref.model.mllm, easyref.model.kv):
        for name, module in root.named_modules():
            assert not list(module.buffers(recurse=False)), name
            if list(module.parameters(recurse=False)):
                assert hasattr(module, "comfy_cast_weights"), name
                assert not list(module.children()), name


def test_tokens_are_the_same_with_nearly_all_weights_offloaded(pack, monkeypatch):
    easyref = golden.load(pack)
    budget = easyref.patcher.model_size() // 10
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda *_, **__: None)  # it would load all
    easyref.patcher.patch_model(easyref.patcher.load_device, lowvram_model_memory=budget)
    assert easyref.patcher.model.model_lowvram
    assert easyref.patcher.loaded_size() <= budget
    assert_tokens_are_the_authors(pack, easyref)


def assert_tokens_are_the_authors(pack, easyref) -> None:
    with torch.inference_mode():
        tokens = golden.tokens(pack, easyref)
    assert golden.error(tokens.conditional, golden.expected()["cond.reference_embeds"]) <= 1e-5


def test_dynamic_vram(pack, monkeypatch):
    """The host's layers have no weights until they are loaded (its switch is simulated)."""
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    easyref = golden.load(pack)
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", False)  # no GPU to page to
    modules = [*easyref.model.mllm.modules(), *easyref.model.kv.modules()]
    assert all(module.weight is not None for module in modules if hasattr(module, "comfy_cast_weights"))
    assert_tokens_are_the_authors(pack, easyref)


# A running server


@pytest.fixture(scope="module")
def size(server) -> int:
    """Installs a checkpoint large enough to show in the process's memory; -> its bytes in float32."""
    # a first run, whose imports and allocations do not belong to the model
    graphs.image(server, graphs.easyref())
    return golden.write_random(server.base / "models" / "easyref", layers=32, width=512)


def large(loader: str = "load", prompt: str = "") -> graphs.Graph:
    """The whole path with the large checkpoint, whose weights are copies: fp32, and fp16 in the file."""
    file = {"checkpoint": "random.safetensors", "mllm": "easyref/random-qwen2-vl", "precision": "fp32"}
    graph = graphs.easyref(load=file, encode={"prompt": prompt})
    graph[loader] = graph.pop("load")
    for name in ("encode", "aggregate", "apply"):
        graph[name]["inputs"]["easyref"] = [loader, 0]
    return graph


def emptied(server) -> int:
    """The server's memory after repeated /free, because the host ignores one at the end of a run."""
    sizes = [server.resident_bytes]
    while len(sizes) < 6 or sizes[-1] < sizes[-4] - 2**20:
        server.free()
        time.sleep(0.2)
        sizes.append(server.resident_bytes)
    return sizes[-1]


def test_free_gives_the_memory_back(server, size):
    before = emptied(server)
    server.run(large())
    loaded = server.resident_bytes
    assert loaded - before >= 0.9 * size, "the model is not seen in the process's memory"
    assert loaded - emptied(server) >= 0.8 * size


@pytest.mark.parametrize("second", ["another workflow", "after /free"])
def test_loading_again_takes_no_more_memory(server, size, second: str):
    before = emptied(server)
    server.run(large())
    if second == "after /free":
        emptied(server)
        server.run(large())
    else:
        server.run(large(loader="another", prompt="another prompt"))
    assert server.resident_bytes - before <= 1.3 * size
