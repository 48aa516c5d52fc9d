"""The parts of the report on a GPU that need a ComfyUI, at small sizes on a CPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from devkit.hosts import find_hosts
from tools.bench.gpu_parts import host_compiled, host_modes, host_step
from tools.bench.gpu_parts.modes import MODES
from tools.bench.gpu_parts.options import GpuOptions
from tools.bench.report import Row

pytestmark = pytest.mark.one_host


def silent(_: str) -> None:
    pass


@pytest.fixture
def options(tmp_path: Path) -> GpuOptions:
    return GpuOptions(quick=True, pairs=1, folder=tmp_path, comfyui=find_hosts()[0])


@pytest.fixture
def entered(pack, monkeypatch) -> None:
    """The parts run in the ComfyUI of the tests, which is entered already."""
    for part in (host_step, host_compiled):
        monkeypatch.setattr(part, "enter", lambda _: pack)


@torch.inference_mode()
def test_step_adds_no_synchronization(options: GpuOptions, entered) -> None:
    rows = list(host_step.measure(options, silent))
    (row,) = [row for row in rows if "that references add" in row.name]
    assert row.met


@pytest.mark.thorough
@torch.inference_mode()
def test_compiled_step_is_the_eager_one(options: GpuOptions, entered, torch_attention) -> None:
    """With the attention that the host selects for a GPU."""
    rows = list(host_compiled.measure(options, silent))
    (row,) = [row for row in rows if "distance from the eager" in row.name]
    assert row.value <= 1e-5


@pytest.mark.thorough
def test_modes_give_the_same_latents(options: GpuOptions) -> None:
    first, second = (list(host_modes.measure(name, options, silent)) for name in list(MODES)[:2])
    assert [row.unit for row in first] == ["s", "GiB", "s"]
    (latents,) = [row for row in second if row.unit == "cosine"]
    assert isinstance(latents, Row)
    assert latents.value > 0.9


def test_limit_holds_for_estimates_and_for_torch(monkeypatch) -> None:
    device = dataclasses.make_dataclass("Device", ["total_memory"])(24 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    flags, environment = host_modes.server_settings(MODES["limit of 8 GiB"])
    assert flags == ("--disable-dynamic-vram", "--reserve-vram", "16.0")
    assert environment == {"BENCH_DEVICE_GIB": "8"}
