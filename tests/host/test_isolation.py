"""Values between nodes in a process of their own: each can be pickled there and back, or says why not."""

from __future__ import annotations

import pickle
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from comfy_api.latest import io
from torch import Tensor

from devkit.host import golden
from devkit.hosts import ROOT

from .conftest import HOST

# Receives context states and tokens, loads the model itself, and sends the tokens of the context back.
OTHER_PROCESS = f"""
import pickle, sys
from pathlib import Path
sys.path.append({str(ROOT)!r})
from devkit.cpu_torch import complete_cpu_torch
from devkit.host import golden
from devkit.host.in_process import enter_host, load_pack
complete_cpu_torch()
enter_host(Path({str(HOST)!r}))
pack = load_pack()
context, tokens = pickle.load(sys.stdin.buffer)
assert tokens.easyref is None
aggregated = golden.execute(pack, "EasyRefAggregate", context, easyref=golden.load(pack)).result[0]
sys.stdout.buffer.write(pickle.dumps(aggregated))
"""


@pytest.fixture(scope="module")
def context(easy) -> Any:
    return golden.encode(easy.pack, easy.easyref)


@pytest.fixture
def group(pack: ModuleType) -> Any:
    masks = torch.rand(3, 8, 8), None, torch.rand(2, 8, 8)[1]
    images = golden.part(pack, "nodes.host.images")
    return images.ReferenceGroup(images.split(torch.rand(3, 64, 64, 3)), (masks[0][2], *masks[1:]))


def copied(value: Any) -> Any:
    """The value after a journey to another process."""
    return pickle.loads(pickle.dumps(value))


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return type(first) is type(second) and torch.equal(Tensor(first), Tensor(second))
    return first == second


def test_each_type_of_value_is_tested_here(pack: ModuleType) -> None:
    sockets = vars(golden.part(pack, "nodes.host.socket_types")).values()
    types = {each.io_type for each in sockets if isinstance(each, type) and issubclass(each, io.ComfyTypeIO)}
    assert types == {f"EASYREF_{name}" for name in ("MODEL", "GROUP", "CONTEXT", "TOKENS", "RECORD")}


def test_group_keeps_its_masks_and_takes_no_more_than_its_values(group) -> None:
    received = copied(group)
    assert type(received) is type(group)
    assert all(map(equal, received, group))
    assert all(map(equal, received.masks, group.masks))
    values = sum(tensor.nbytes for tensor in (*group, *group.masks) if tensor is not None)
    assert len(pickle.dumps(group)) < 1.1 * values + 10_000  # not the batches that they are parts of


def test_context_arrives_without_its_model(easy, context) -> None:
    weighed = context.weighed([1, 0.5, 1]).masked([torch.rand(4, 4), None, None])
    received = copied(weighed)
    assert (received.easyref, received.patcher, received.get_models()) == (None, None, [])
    for name in ("states", "provenance", "grid", "spans", "weights"):
        assert equal(getattr(received, name), getattr(weighed, name))
    assert all(map(equal, received.masks, weighed.masks))
    assert weighed.easyref is easy.easyref


def test_tokens_arrive_without_their_model(easy) -> None:
    received = copied(easy.tokens)
    for side in ("conditional", "unconditional"):
        assert equal(getattr(received, side), getattr(easy.tokens, side))
        assert getattr(received, side).provenance == getattr(easy.tokens, side).provenance
    assert received.easyref is None
    assert easy.tokens.easyref is easy.easyref


def test_values_without_their_model_ask_for_it(context, easy, model, execute) -> None:
    inputs = {"EasyRefAggregate": [copied(context)], "EasyRefApply": [model, copied(easy.tokens), 1, 0, 1, 1]}
    for name, values in inputs.items():
        with pytest.raises(ValueError, match=r"^easyref is not connected.* another process .* Load EasyRef"):
            execute(name, *values)


def test_record_arrives_with_its_shares(easy, model, execute) -> None:
    from devkit.host.sampling import predict

    recorded, record = execute("EasyRefRecord", easy.apply(model)).result
    predict(recorded)
    shares = [recorder.shares() for recorder in record.recorders]
    received = [recorder.shares() for recorder in copied(record).recorders]
    assert shares[0]
    assert [each.keys() for each in received] == [each.keys() for each in shares]
    for sent, arrived in zip(shares, received, strict=True):
        assert all(equal(arrived[key].grid, share.grid) for key, share in sent.items())


def test_model_says_why_not(easy) -> None:
    with pytest.raises(TypeError, match=r"An EasyRef model cannot be pickled, because .* Run Load EasyRef"):
        pickle.dumps(easy.easyref)


def test_patches_of_a_model_say_why_not(pack: ModuleType, easy, model) -> None:
    """The host's own part of a MODEL cannot be pickled either."""
    key = golden.part(pack, "nodes.unet_patch.step_wrapper").KEY
    attachment = easy.apply(model).get_attachment(key)
    with pytest.raises(TypeError, match=r"A MODEL with Apply EasyRef cannot .* Run Apply EasyRef in the"):
        pickle.dumps(attachment)


@pytest.mark.one_host
def test_another_process_aggregates_a_context(easy, context) -> None:
    sent = pickle.dumps((context, easy.tokens))
    run = subprocess.run([sys.executable, "-c", OTHER_PROCESS], input=sent, capture_output=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr.decode(errors="replace")[-2000:]
    received = pickle.loads(run.stdout)
    for branch in ("conditional", "unconditional"):
        # another number of threads may round otherwise
        here, there = (Tensor(getattr(tokens, branch)) for tokens in (easy.tokens, received))
        torch.testing.assert_close(there, here, atol=1e-5, rtol=1e-5)
