"""A workflow with 8 references through the nodes, in a ComfyUI server with each kind of memory management.

Each mode runs the workflow twice, the second time with another prompt. Its memory is that of the whole
device, as the server reports it meanwhile; its latents are compared with those of the first mode that ran.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Event, Thread

import torch
from safetensors.torch import load_file, save_file

from devkit.host import graphs
from devkit.host.graphs import Graph, node
from devkit.host.server import HERE, PACKS, ComfyServer
from devkit.hosts import host_version
from easyref_core import SIZE
from tools.bench.gpu_parts.golden import MIN_COSINE, cosine
from tools.bench.gpu_parts.host_weights import FILE
from tools.bench.gpu_parts.modes import MODES, Mode
from tools.bench.gpu_parts.options import GpuOptions
from tools.bench.report import GIB, Row
from tools.bench.timing import Say

REFERENCES, SIDE, STEPS = 8, 1024, 4
LATENTS = "latents.safetensors"  # of the first mode, in GpuOptions.folder
SAMPLE_SECONDS = 0.05  # between two looks at the memory
SECOND_PROMPT = "another prompt"
SIDES = ("positive", "negative")


def measure(name: str, options: GpuOptions, say: Say) -> Iterator[Row]:
    """Rows of one mode. On a CPU the flags are left out, because ComfyUI's --cpu excludes them."""
    mode, on_cpu = MODES[name], options.device == "cpu"
    flags, env = ((), {}) if on_cpu else server_settings(mode)
    packs = {**PACKS, "bench_nodes": HERE / "bench_nodes"}
    server = ComfyServer(
        options.comfyui,
        args=flags,
        env=env,
        packs=packs,
        prepare=lambda base: link(base, options),
        cpu=on_cpu,
    )
    say(f"  starting ComfyUI: {name}")
    with server:
        if options.quick:
            graphs.install_golden(server)
        enabled = "DynamicVRAM support detected and enabled" in server.log
        label = f"ComfyUI {host_version(options.comfyui)}, {name} (dynamic VRAM {'on' if enabled else 'off'})"
        graph = workflow(mode, options)
        with DeviceMemory(server) as memory:
            yield Row(f"{label}: first prompt", timed_run(server, graph), "s")
        yield Row(f"{label}: most memory in use on the device", memory.used / GIB, "GiB")
        yield from latent_rows(label, mode, server.base / "output", options.folder / LATENTS)
        graph["encode"]["inputs"]["prompt"] = SECOND_PROMPT
        yield Row(f"{label}: another prompt", timed_run(server, graph), "s")


def server_settings(mode: Mode) -> tuple[tuple[str, ...], Mapping[str, str]]:
    """Flags and environment of a server on a GPU. A limit holds for the host's estimates and for torch."""
    if mode.limit is None:
        return mode.flags, {}
    reserved = torch.cuda.get_device_properties(0).total_memory / GIB - mode.limit
    flags = (*mode.flags, "--reserve-vram", f"{max(0.0, reserved):.1f}")
    return flags, {"BENCH_DEVICE_GIB": str(mode.limit)}


def link(base: Path, options: GpuOptions) -> None:
    """Link the full-size files into a server's folders."""
    if options.quick:
        return
    for kind, file in (("easyref", options.checkpoint), ("diffusion_models", options.folder / FILE)):
        folder = base / "models" / kind
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file.name).symlink_to(file)


def workflow(mode: Mode, options: GpuOptions) -> Graph:
    """Group, tokens, apply, and sampling to a latent file."""
    if options.quick:
        graph = graphs.easyref(load={"precision": mode.precision})
    else:
        files = {"checkpoint": options.checkpoint.name, "mllm": "from the checkpoint"}
        images = {
            "images": graphs.tiny_images(f"{REFERENCES}x{SIDE}x{SIDE}x3"),
            "group": node("EasyRefGroup", **{"images.image0": ["images", 0]}),
        }
        load = files | {"precision": mode.precision}
        size = {"size": SIZE}
        graph = graphs.of_images(["group", 0], images, load=load, encode=size, steps=STEPS)
        graph |= {side: node("RandomConditioning", seed=seed) for seed, side in enumerate(SIDES)}
        graph["tiny"] = node("UNETLoader", unet_name=FILE, weight_dtype="default")
        graph["sample"]["inputs"] |= {side: [side, 0] for side in SIDES}
        graph["latent"]["inputs"] |= {"width": SIDE, "height": SIDE}
    del graph["decode"]
    graph["save"] = node("SaveLatent", samples=["sample", 0], filename_prefix="latents")
    return graph


def timed_run(server: ComfyServer, graph: Graph) -> float:
    start = time.monotonic()
    server.run(graph)
    return time.monotonic() - start


def latent_rows(label: str, mode: Mode, output: Path, stored: Path) -> Iterator[Row]:
    """Compare the prompt's latents with those of the first exact mode, or store them as these."""
    (file,) = output.glob("*.latent")
    latents = load_file(file)["latent_tensor"]
    if not stored.exists():
        if mode.exact:
            save_file({"latents": latents}, stored)
        return
    found = cosine(latents, load_file(stored)["latents"])
    yield Row(
        f"{label}: latents to those of the first mode",
        found,
        "cosine",
        wanted=MIN_COSINE if mode.exact else None,
    )


class DeviceMemory:
    """Context manager that records the most memory in use on a server's device, in bytes."""

    def __init__(self, server: ComfyServer) -> None:
        self.server, self.used = server, 0
        self._done, self._watcher = Event(), Thread(target=self._watch, daemon=True)

    def __enter__(self) -> DeviceMemory:
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            (device, *_) = self.server.system_stats()["devices"]
            self.used = max(self.used, device["vram_total"] - device["vram_free"])
