"""Memory: one copy of the weights, kept as asked, streamed where it must be, given back on /free."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from devkit.host import golden, graphs
from devkit.host.tiny_nodes.tiny_sdxl import load_tiny_sdxl

MAPS = Path("/proc/self/maps")


def weights(easyref) -> dict[str, torch.Tensor]:
    """Every weight that stays loaded, by name."""
    return dict([*easyref.model.mllm.named_parameters(), *easyref.model.kv.named_parameters()])


def tensors_in(root: object) -> list[torch.Tensor]:
    """Every tensor that can be reached from an object through containers, attributes and closures."""
    found, seen, waiting = [], set(), [root]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, type | ModuleType):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            found.append(thing)
        elif isinstance(thing, Mapping):
            waiting += [*thing.keys(), *thing.values()]
        elif isinstance(thing, list | tuple | set | frozenset):
            waiting += thing
        else:
            waiting += getattr(thing, "__dict__", {}).values()
            waiting += [cell.cell_contents for cell in getattr(thing, "__closure__", None) or ()]
            waiting.append(getattr(thing, "__self__", None))
    return found


def live_tensors() -> list[torch.Tensor]:
    """All but the fake ones of other tests (fake_device.py), which have no memory."""
    gc.collect()
    tensors = (thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
    return [tensor for tensor in tensors if not isinstance(tensor, FakeTensor)]


def storages(tensors: list[torch.Tensor]) -> dict[int, int]:
    """{address: bytes} of the memory that tensors lie in, shared memory once."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


# How the weights are kept


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
def test_weights_are_kept_in_the_precision_asked_for(pack, precision: str, dtype: torch.dtype):
    assert {weight.dtype for weight in weights(golden.load(pack, precision)).values()} == {dtype}


@pytest.mark.parametrize("lookup", [True, False])
def test_fp8_is_for_the_matrices_on_which_the_tokens_depend_less(pack, monkeypatch, lookup: bool):
    hosted = golden.part(pack, "nodes.host.hosted_model")
    assert hosted.looks_up_fp8(torch.device("cpu"))
    monkeypatch.setattr(hosted, "looks_up_fp8", lambda _: lookup)
    easyref = golden.load(pack, "fp8_e4m3fn")
    fp8 = {name for name, weight in weights(easyref).items() if weight.dtype == torch.float8_e4m3fn}
    matrices = {
        name
        for name, weight in weights(easyref).items()
        if weight.ndim == 2 and (not name.startswith("aggregator.") or "mlp" in name)
    }
    assert fp8 == (matrices if lookup else matrices - {"encoder.embed_tokens.weight"})


def test_fp8_takes_half_of_bf16_at_full_size(pack, monkeypatch):
    """Counted over every tensor of the released layout, without their memory."""
    hosted = golden.part(pack, "nodes.host.hosted_model")
    monkeypatch.setattr(hosted, "_converted", lambda tensor, dtype: tensor.to(dtype))
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
    """Tensors without memory of the released model: those that stay loaded, by name."""
    layout = json.loads((golden.GOLDEN / "released_layout.json").read_text())["keys"]
    formats = golden.part(pack, "easyref_core.checkpoint.formats")
    named = formats.translate(layout, formats.EASYREF_NAMES)
    tensors = (
        (new, torch.empty(layout[name], dtype=torch.bfloat16, device="meta")) for name, new in named.items()
    )
    return [
        (name, t.flatten(1) if "patch_embed" in name else t)
        for name, t in tensors
        if not name.startswith("unet.")
    ]


@pytest.mark.parametrize("has_bf16", [False, True])
@pytest.mark.parametrize("precision", ["auto", "bf16", "fp32", "fp8_e4m3fn"])
def test_nothing_is_computed_in_fp16(pack, monkeypatch, precision: str, has_bf16: bool):
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "should_use_bf16", lambda *_: has_bf16)
    hosted = golden.part(pack, "nodes.host.hosted_model")
    wanted = torch.bfloat16 if has_bf16 and precision != "fp32" else torch.float32
    assert hosted.compute_dtype(torch.device("cpu"), precision) == wanted


@pytest.mark.parametrize(("precision", "least"), [("bf16", 0.9999), ("fp8_e4m3fn", 0.995)])
def test_tokens_of_lower_precision_are_close(pack, precision: str, least: float):
    with torch.inference_mode():
        tokens = golden.tokens(pack, golden.load(pack, precision)).conditional
    wanted = golden.expected()["cond.reference_embeds"]
    assert torch.cosine_similarity(torch.Tensor(tokens).flatten(), wanted.flatten(), dim=0) >= least


def test_patched_model_options_hold_no_tensor(pack):
    easyref = golden.load(pack)
    with torch.inference_mode():
        node = golden.node(pack, "EasyRefApply")
        tokens = golden.tokens(pack, easyref)
        (patched,) = node.execute(load_tiny_sdxl(), easyref, tokens, 1.0, 0.0, 1.0, 1.0).result
    assert tensors_in(patched.attachments), "the search does not even find K and V where they are"
    assert tensors_in(patched.model_options) == []


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
    import comfy.model_management

    easyref = golden.load(pack)
    budget = easyref.patcher.model_size() // 10
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda *_, **__: None)  # it would load all
    easyref.patcher.patch_model(easyref.patcher.load_device, lowvram_model_memory=budget)
    assert easyref.patcher.model.model_lowvram
    assert easyref.patcher.loaded_size() <= budget
    with torch.inference_mode():
        tokens = golden.tokens(pack, easyref)
    assert golden.error(tokens.conditional, golden.expected()["cond.reference_embeds"]) <= 1e-5


# A running server


@pytest.fixture(scope="module")
def size(pack, server) -> int:
    """Installs a checkpoint large enough to be seen in the process's memory; its bytes in float32."""
    graphs.install_golden(server)
    # what the first run of all imports and allocates is not the model's
    graphs.picture(server, graphs.easyref())
    return golden.write_random(pack, server.base / "models" / "easyref", layers=32, width=512)


def large(loader: str = "load", prompt: str = "") -> graphs.Graph:
    """The whole path with the large checkpoint, whose weights are copies here: fp32, and fp16 in the file."""
    file = {"checkpoint": "random.safetensors", "mllm": "easyref/random-qwen2-vl", "precision": "fp32"}
    graph = graphs.easyref(load=file, encode={"prompt": prompt})
    graph[loader] = graph.pop("load")
    for name in ("encode", "aggregate", "apply"):
        graph[name]["inputs"]["easyref"] = [loader, 0]
    return graph


def emptied(server) -> int:
    """The server's memory after /free. The host overlooks a request that comes as a run ends, so there are several."""
    for _ in range(5):
        server.free()
        time.sleep(0.1)
    return server.resident_bytes


def test_free_gives_the_memory_back(server, size):
    before = emptied(server)
    server.run(large())
    loaded = server.resident_bytes
    assert loaded - before >= 0.9 * size, "the model is not seen in the process's memory"
    assert loaded - emptied(server) >= 0.8 * size


def test_two_workflows_share_one_copy(server, size):
    before = emptied(server)
    server.run(large())
    server.run(large(loader="another", prompt="another prompt"))
    assert server.resident_bytes - before <= 1.3 * size


def test_loading_again_after_free_takes_no_more(server, size):
    before = emptied(server)
    server.run(large())
    emptied(server)
    server.run(large())
    assert server.resident_bytes - before <= 1.3 * size
