"""Costs of loading and importing: peak memory, time, output, and modules of the host."""

from __future__ import annotations

import ast
import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from devkit import golden
from easyref_core.checkpoint.checkpoint import expected_shapes, open_checkpoint, save
from easyref_core.unet.layout import sdxl_sites

from .errors import folder_with

CORE = golden.ROOT / "easyref_core"
HOST_MODULES = set("comfy comfy_api comfy_execution comfy_extras execution folder_paths nodes server".split())


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that can import the core."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=golden.ROOT, capture_output=True, text=True, check=True)


# Memory

MEASURE = """
import json, sys
from pathlib import Path

import torch
import easyref_core as er
from easyref_core.mllm.tokenizer import load_tokenizer

def memory(*names):
    lines = Path("/proc/self/status").read_text().splitlines()
    values = {line.partition(":")[0]: line.partition(":")[2] for line in lines}
    return sum(int(values[name].split()[0]) * 1024 for name in names)

checkpoint, mllm, dtype = sys.argv[1:]
load_tokenizer(Path(mllm))  # its memory is not that of the weights
before = {"all": memory("VmRSS"), "own": memory("RssAnon")}
model = er.load(checkpoint, mllm, dtype=getattr(torch, dtype))
peak = memory("VmHWM") - before["all"]  # the highest ever
weights = [*model.mllm.parameters(), *model.kv.parameters()]

def mapped(tensor):
    maps = (line.split() for line in Path("/proc/self/maps").read_text().splitlines())
    spans = [[int(end, 16) for end in line[0].split("-")] for line in maps if line[-1] == checkpoint]
    return any(start <= tensor.data_ptr() < end for start, end in spans)

print(json.dumps({
    "loaded": sum(weight.nbytes for weight in weights),
    "peak": peak,
    "own": memory("RssAnon") - before["own"],
    "mapped": sum(map(mapped, weights)),
    "weights": len(weights),
}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """mid.safetensors, mid.pt and the MLLM folder of a model of about 300 MB in float16."""
    folder = tmp_path_factory.mktemp("loading")
    opened = open_checkpoint(golden.CHECKPOINT, golden.MLLM)
    sizes = dataclasses.replace(
        opened.config,
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=2816,
        body_layers=7,  # most of the weights, as in the released model
        heads=16,
        kv_heads=4,
        vision_depth=6,
        vision_width=512,
        vision_mlp_width=2048,
        vision_heads=8,
        lora_rank=0,
    )
    sites = tuple(sdxl_sites(((0, 1, 1), 1, (1, 1, 0))))
    shapes = expected_shapes(sizes, dict.fromkeys(sites, 640))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(-99, 99, shape, generator=generator, dtype=torch.int8).to(torch.float16)
        for name, shape in shapes.items()
    }
    save(folder / "mid.safetensors", sizes, sites, tensors)
    golden.write_deepspeed(folder / "mid.pt", load_file(folder / "mid.safetensors"))
    vision = {"depth": sizes.vision_depth, "embed_dim": sizes.vision_width, "num_heads": sizes.vision_heads}
    folder_with(  # the .pt file carries no sizes
        folder / "mllm",
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.body_layers + sizes.final_layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        vision_config=vision,
    )
    yield folder
    shutil.rmtree(folder)


Measured = Callable[[str, str], dict[str, int]]


@pytest.fixture(scope="module")
def measured(folder: Path) -> Measured:
    """Memory of a fresh process that loads a file as a dtype: bytes, and numbers of weights."""
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is measured on Linux")
    return lambda file, dtype: json.loads(python(MEASURE, folder / file, folder / "mllm", dtype).stdout)


@pytest.mark.parametrize("file", ["mid.safetensors", "mid.pt"])
def test_a_cast_load_peaks_near_the_loaded_size_and_keeps_no_mapping(measured: Measured, file: str) -> None:
    memory = measured(file, "bfloat16")
    assert 250e6 < memory["loaded"]  # large enough to measure
    assert memory["peak"] <= 1.3 * memory["loaded"]
    assert memory["mapped"] == 0


@pytest.mark.parametrize("file", ["mid.safetensors", "mid.pt"])
def test_weights_in_the_dtype_of_the_file_stay_its_mapping(measured: Measured, file: str) -> None:
    memory = measured(file, "float16")
    assert memory["mapped"] == memory["weights"]
    assert memory["own"] <= 0.1 * memory["loaded"]


# Importing

IMPORT = """
import json, sys
import torch
before = set(sys.modules)
import easyref_core
print(json.dumps(sorted(set(sys.modules) - before)))
"""


@pytest.fixture(scope="module")
def imported() -> subprocess.CompletedProcess[str]:
    """A fresh process that imported the core after torch."""
    return python(IMPORT)


def test_importing_prints_nothing(imported: subprocess.CompletedProcess[str]) -> None:
    assert (imported.stdout.count("\n"), imported.stderr) == (1, "")


def test_importing_does_not_import_heavy_packages(imported: subprocess.CompletedProcess[str]) -> None:
    heavy = {"transformers", "tokenizers", "diffusers", "comfy", "huggingface_hub"}
    assert not heavy & set(json.loads(imported.stdout))


def imports(file: Path) -> Iterator[str]:
    """Top-level packages that a file imports anywhere, and ".." for imports from outside the core."""
    depth = len(file.relative_to(CORE).parts)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level > depth:
                yield ".."
            elif not node.level:
                yield node.module.partition(".")[0]


def test_no_file_of_the_core_imports_the_host() -> None:
    assert [file for file in CORE.rglob("*.py") if set(imports(file)) & (HOST_MODULES | {".."})] == []
