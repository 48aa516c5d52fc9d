"""Drawn bad files, images and texts, and proof that the campaign notices every kind of failure.

`tools/fuzz.py` runs the same properties on more cases; those of the nodes are in tests/host/test_fuzz.py.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

import easyref_core as er
from devkit import golden
from devkit.bad_input import strategies
from devkit.bad_input.campaign import Campaign
from devkit.bad_input.judge import error_fault
from devkit.bad_input.strategies import Case, Draw, broken_bytes, odd_values, pick
from easyref_core.mllm.instructions import INSTRUCTION
from tools import fuzz

TINY = golden.ROOT / "easyref_core" / "tiny" / "weights"


@torch.inference_mode()
def use_checkpoint(path: Path, mllm: Path, size: int = 56) -> object:
    """Load a checkpoint, encode and aggregate a group, project keys and values."""
    model = er.load(path, mllm)
    context = model.encode(golden.references()[:1], "a cat", size=size)
    tokens = model.aggregate(context)
    return [context.states, tokens, model.key_values(tokens)[0]]


# Checkpoints


class CheckpointFile(NamedTuple):
    """Good bytes, and the MLLM folder and image size they are used with."""

    data: bytes
    mllm: Path = golden.MLLM
    size: int = 56


def in_one_order(path: Path) -> bytes:
    return strategies.join_safetensors(*strategies.split_safetensors(path.read_bytes()))


@functools.cache
def checkpoint_files() -> dict[str, CheckpointFile]:
    """The golden checkpoint in every format that can be read, and the shipped tiny model."""
    tensors = golden.checkpoint_tensors()
    old = io.BytesIO()
    torch.save({"module": tensors}, old, _use_new_zipfile_serialization=False)
    with tempfile.TemporaryDirectory() as folder:
        er.load(golden.CHECKPOINT, golden.MLLM).save(Path(folder) / "own.safetensors")
        own = in_one_order(Path(folder) / "own.safetensors")
        zipped = golden.write_deepspeed(Path(folder) / "zip.pt", tensors).read_bytes()
    tiny = (TINY / "tiny_easyref.safetensors").read_bytes()
    return {
        "released": CheckpointFile(golden.CHECKPOINT.read_bytes()),
        "own": CheckpointFile(own),
        "tiny": CheckpointFile(tiny, TINY / "tiny-qwen2-vl", 64),
        "zip": CheckpointFile(zipped),
        "old": CheckpointFile(old.getvalue()),
    }


@st.composite
def pickled_contents(draw: Draw) -> Case:
    """A PyTorch file with changed tensors, or with something other than tensors among them."""
    tensors = golden.checkpoint_tensors()
    ways: dict[str, Callable[[], object]] = {
        "changed tensors": lambda: (
            draw(strategies.changed_tensors(tensors, strategies.DENSE | strategies.NOT_DENSE)).content
        ),
        "an odd module": lambda: {"module": draw(odd_values), **tensors},
        "an odd value": lambda: tensors | {"mllm_final_layer.norm.weight": draw(odd_values)},
    }
    way = pick(draw, ["changed tensors"] * 4 + ["an odd module", "an odd value"])
    protocol, zipped, data = pick(draw, [2, 3, 4]), draw(st.booleans()), io.BytesIO()
    torch.save(ways[way](), data, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    return Case(f"{way}, protocol {protocol}, zipped {zipped}", data.getvalue())


@st.composite
def broken_archives(draw: Draw, data: bytes) -> Case:
    """A zip archive with a record that is missing, cut, compressed, doubled or renamed."""
    source, broken = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    names = source.namelist()
    chosen = pick(draw, pick(draw, [names, [name for name in names if "/data/" not in name]]))
    way = pick(draw, ["missing", "cut", "empty", "compressed", "twice", "renamed", "broken", "no records"])
    packing = zipfile.ZIP_DEFLATED if way == "compressed" else zipfile.ZIP_STORED
    with zipfile.ZipFile(broken, "w", packing) as archive:
        for name in names if way != "no records" else []:
            content, ways = source.read(name), way if name == chosen else ""
            if ways == "broken":
                content = draw(broken_bytes(content)).content
            content = {"cut": content[:-1], "empty": b""}.get(ways, content)
            written = pick(draw, ["../x", "/x", "x", f"{name}x"]) if ways == "renamed" else name
            for _ in range({"missing": 0, "twice": 2}.get(ways, 1)):
                archive.writestr(written, content)
    return Case(f"record {chosen} {way}", broken.getvalue())


@st.composite
def broken_checkpoints(draw: Draw) -> Case:
    """A checkpoint file: name, bytes, and the MLLM folder and image size to use it with."""
    name = pick(draw, ["released", "own", "own", "tiny", "zip", "old", "pickle", "archive"])
    file = checkpoint_files().get(name, checkpoint_files()["zip"])
    by_name = {"zip": broken_bytes, "old": broken_bytes, "archive": broken_archives}
    strategy = (
        pickled_contents()
        if name == "pickle"
        else by_name.get(name, strategies.broken_safetensors)(file.data)
    )
    case, suffix = draw(strategy), pick(draw, ["safetensors", "sft", "pt", "bin"])
    return Case(f"{name}.{suffix}, {case.about}", (f"c.{suffix}", file._replace(data=case.content)))


def prepare_checkpoint(case: Case, folder: Path) -> Callable[[], object]:
    name, file = case.content
    (folder / name).write_bytes(file.data)
    return lambda: use_checkpoint(folder / name, file.mllm, file.size)


@pytest.mark.filterwarnings("ignore")  # torch warns about some contents when they are made
def test_checkpoint(tmp_path: Path) -> None:
    good = functools.partial(use_checkpoint, golden.CHECKPOINT, golden.MLLM)
    Campaign(tmp_path).run(broken_checkpoints(), prepare_checkpoint, good, 80)


# MLLM folders

INDEX, SHARD, WEIGHTS = "model.safetensors.index.json", "model-1.safetensors", "model.safetensors"
TOKENIZER = [
    f"{name}.json" for name in "tokenizer tokenizer_config vocab added_tokens special_tokens_map".split()
]


def golden_json(name: str) -> Any:
    return json.loads((golden.MLLM / name).read_text(encoding="utf-8"))


@st.composite
def broken_weights(draw: Draw) -> Case:
    """{name: bytes} of weights or an index of weights."""
    weights = (golden.MLLM / WEIGHTS).read_bytes()
    if draw(st.booleans()):
        case = draw(strategies.broken_safetensors(weights))
        return Case(f"{WEIGHTS}: {case.about}", {WEIGHTS: case.content})
    index = {
        "metadata": {"total_size": 1},
        "weight_map": dict.fromkeys(list(load_file(golden.MLLM / WEIGHTS))[:5], SHARD),
    }
    case = draw(strategies.broken_json(index))
    return Case(f"{INDEX}: {case.about}", {WEIGHTS: None, SHARD: weights, INDEX: case.content})


@st.composite
def broken_settings(draw: Draw) -> Case:
    """{name: bytes, or None for a file that is missing} of config.json and the tokenizer."""
    way = pick(draw, ["config", "config", "config", "tokenizer", "tokenizer", "missing", "merges"])
    if way in ("config", "tokenizer"):
        name = "config.json" if way == "config" else pick(draw, TOKENIZER)
        case = draw(strategies.broken_json(golden_json(name)))
        return Case(f"{name}: {case.about}", {name: case.content})
    if way == "missing":
        names = draw(st.sets(st.sampled_from(TOKENIZER), min_size=1))
        return Case(f"without {names}", dict.fromkeys(names))
    merges = pick(draw, [b"", b"a", b"\xff\xfe", b"a b c d\n" * 50, b"#\n\n\n"])
    return Case("merges.txt", {"tokenizer.json": None, "merges.txt": merges})


def test_mllm_folder(tmp_path: Path) -> None:
    tensors = golden.checkpoint_tensors()
    stage_1 = {name: t for name, t in tensors.items() if not name.startswith("multimodal_llm.")}
    without_mllm = golden.write(tmp_path / "stage_1.safetensors", stage_1)

    def prepare(case: Case, folder: Path) -> Callable[[], object]:
        mllm = folder / "mllm"
        with_weights = any("safetensors" in name for name in case.content)
        ignored = None if with_weights else shutil.ignore_patterns("*.safetensors")
        shutil.copytree(golden.MLLM, mllm, ignore=ignored)
        for name, data in case.content.items():
            if data is None:
                (mllm / name).unlink()
            else:
                (mllm / name).write_bytes(data)
        return lambda: use_checkpoint(without_mllm if with_weights else golden.CHECKPOINT, mllm)

    good = functools.partial(use_checkpoint, without_mllm, golden.MLLM)
    Campaign(tmp_path).run(broken_weights() | broken_settings(), prepare, good, 40)


# Files of reference tokens


@functools.cache
def token_files() -> list[bytes]:
    """Saved tokens of one group, of a combination and of a batch."""
    model = er.load(golden.CHECKPOINT, golden.MLLM)
    tokens = model.aggregate(model.encode(golden.references(), golden.PROMPT, size=56))
    combined = er.combine([tokens, er.combine([tokens, tokens], "add")], "average")
    uncond, data = model.unconditional(size=56), []
    with tempfile.TemporaryDirectory() as folder:
        pairs = (tokens, golden.references()), (combined, ()), (er.batch([tokens, tokens]), ())
        for conditional, images in pairs:
            er.save_tokens(path := Path(folder) / "tokens.safetensors", conditional, uncond, images)
            data.append(in_one_order(path))
    return data


@st.composite
def broken_token_files(draw: Draw) -> Case:
    data = pick(draw, token_files())
    return draw(
        strategies.broken_safetensors(data)
        | strategies.broken_safetensors(data)
        | strategies.broken_metadata(data)
    )


def use_tokens(path: Path) -> object:
    """Load both sets with their provenance, combine them, save them and load them again."""
    loaded = er.load_tokens(path)
    both = [loaded.conditional, loaded.unconditional]
    er.combine(both, "concat")
    provenance = [dataclasses.astuple(tokens.provenance) for tokens in both]
    copy = path.with_name("copy.safetensors")
    try:
        er.save_tokens(copy, *both)
        return [*both, loaded.thumbnails, provenance, er.load_tokens(copy).conditional]
    finally:
        copy.unlink(missing_ok=True)


def test_token_files(tmp_path: Path) -> None:
    def prepare(case: Case, folder: Path) -> Callable[[], object]:
        (path := folder / "tokens.safetensors").write_bytes(case.content)
        return lambda: use_tokens(path)

    (good := tmp_path / "good.safetensors").write_bytes(token_files()[0])
    Campaign(tmp_path).run(broken_token_files(), prepare, lambda: use_tokens(good), 200)


# Images

MODES = "RGB RGBA L LA La P PA 1 RGBa RGBX CMYK YCbCr LAB HSV I F I;16 I;16B I;16L".split()
SIDES = [28, 64, 100, 0, 1, 2, 13, 14, 15, 27, 199, 333, 1000, 2801, 4000]
VALUES = [0.0, 0.5, 1.0, -1.0, 2.0, 255.0, 1e-30, 1e30, -1e30, 3e38, torch.nan, torch.inf, -torch.inf]
DTYPES = "float32 float32 float64 float16 bfloat16 float8_e4m3fn uint8 int32 bool complex64".split()


def image_sides(draw: Draw) -> tuple[int, int]:
    sides = pick(draw, SIDES), pick(draw, SIDES)
    return sides if sides[0] * sides[1] <= 4_000_000 else (sides[0], 28)


@st.composite
def odd_pil_images(draw: Draw) -> Case:
    mode, sides, color = pick(draw, MODES), image_sides(draw), tuple(draw(st.binary(min_size=3, max_size=3)))
    try:
        image = Image.new("RGB", sides, color).convert(mode)
    except ValueError:  # PIL does not convert to every mode
        image = Image.new(mode, sides)
    return Case(f"PIL {mode} {sides}", image)


@st.composite
def odd_tensors(draw: Draw) -> Case:
    """Tensors of all shapes, dtypes, layouts and values."""
    (height, width), channels = image_sides(draw), pick(draw, [3, 3, 3, 1, 4, 0, 2, 5])
    shapes = [(height, width), (1, height, width, channels), (channels, height, width), (), (3,)]
    shape = pick(draw, [*[(height, width, channels)] * 6, *shapes])
    tensor = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    value = pick(draw, [None, None, None, *VALUES])
    if value is not None and tensor.numel():
        tensor.view(-1)[slice(None) if draw(st.booleans()) else draw(st.integers(0, tensor.numel() - 1))] = (
            value
        )
    tensor = tensor.to(getattr(torch, pick(draw, DTYPES)))
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "dense": lambda: tensor,
        "transposed": lambda: tensor.transpose(0, 1),
        "every second": lambda: tensor[::2, ::2],
        "expanded": lambda: torch.rand(1, 1, 3).expand(200, 300, 3),
        "with gradient": lambda: tensor.clone().requires_grad_(),
        "subclass": lambda: torch.nn.Parameter(tensor, requires_grad=False),
    }
    way = pick(draw, ["dense", "dense", *ways])
    try:
        tensor = ways[way]()
    except (RuntimeError, IndexError):  # not for this shape or dtype
        way = "dense"
    return Case(f"tensor {tuple(tensor.shape)} {tensor.dtype} {way} with {value}", tensor)


@st.composite
def damaged_image_files(draw: Draw) -> Case:
    """An image whose file is damaged, opened and not read yet."""
    kind, data = pick(draw, ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]), io.BytesIO()
    golden.references()[0].convert("RGB").save(data, kind)
    case = draw(broken_bytes(data.getvalue()))
    try:
        return Case(f"{kind} file, {case.about}", Image.open(io.BytesIO(case.content)))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return Case("PIL RGB 20x20", Image.new("RGB", (20, 20)))


@st.composite
def odd_groups(draw: Draw) -> Case:
    """A group, and the size to encode it at."""
    usual = golden.references()
    things = odd_values | st.sampled_from([b"bytes", Path("a.png"), object()])
    things = things.map(lambda thing: Case(f"a {type(thing).__name__}", thing))
    if pick(draw, [False] * 5 + [True]):
        group = draw(odd_values)
        return Case(f"not a group but {str(group)[:60]!r}", (group, pick(draw, [64, 96, 128])))
    case = draw(odd_pil_images() | odd_tensors() | odd_tensors() | damaged_image_files() | things)
    group = pick(draw, [[case.content], [*usual, case.content], [case.content, usual[0]]])
    return Case(f"{len(group)}, {case.about}", (group, pick(draw, [96, 64, 128, 336])))


def test_images(tmp_path: Path) -> None:
    model = er.load(TINY / "tiny_easyref.safetensors", TINY / "tiny-qwen2-vl")

    def use(group: Any, size: int) -> object:
        model.clear_cache()  # what is cached decides about the last bits
        context = model.encode(group, "a thing", size=size)
        return [context.states, model.aggregate(context)]

    prepare = lambda case, _: functools.partial(use, *case.content)  # noqa: E731
    Campaign(tmp_path).run(odd_groups(), prepare, lambda: use(golden.references(), 96), 40)


# Texts


def test_text(tmp_path: Path, model: er.EasyRef) -> None:
    references = golden.references()[:1]

    def use(prompt: str, instruction: str) -> object:
        model.clear_cache()  # what is cached decides about the last bits
        context = model.encode(references, prompt, instruction, size=56)
        assert model.budget([(64, 64)], prompt, instruction, size=56).total == context.states.shape[1]
        uncond = model.unconditional(instruction, size=56)
        return [model.aggregate(context), uncond, context.provenance.prompt]

    texts = st.tuples(strategies.odd_texts, st.just(INSTRUCTION) | strategies.odd_texts)
    cases = texts.map(lambda pair: Case(" and ".join(f"{t[:60]!r} ({len(t)})" for t in pair), pair))
    prepare = lambda case, _: functools.partial(use, *case.content)  # noqa: E731
    Campaign(tmp_path).run(cases, prepare, lambda: use(golden.PROMPT, INSTRUCTION), 25)


# The campaign notices every kind of failure


def run_case(folder: Path, call: Callable[[Path], object], **options: Any) -> Campaign:
    """A campaign that has checked one case, which makes this call with its own folder."""
    campaign = Campaign(folder, **options)
    campaign.check(None, lambda _, own: functools.partial(call, own))
    return campaign


def test_a_right_result_and_a_clear_error_pass(tmp_path: Path) -> None:
    assert run_case(tmp_path, lambda own: [torch.zeros(1), 1.0, "text"]).errors == []
    assert len(run_case(tmp_path, lambda own: er.load_tokens(own / "absent")).errors) == 1


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        (lambda own: {"a": [torch.tensor([torch.nan])]}, "holds NaN or infinite values"),
        (lambda own: float("inf"), "a result is inf"),
        (lambda own: "\ud800", "a text of the result cannot be written"),
        (lambda own: 1 / 0, "not an error of this pack: ZeroDivisionError"),
        (lambda own: int("a sentence of enough length, wanted"), "an error from below"),
        (lambda own: time.sleep(60), "no answer within 0.5 seconds"),
        (lambda own: (own.parent / "new").touch(), "files were left behind or changed"),
        (lambda own: (own.parent / "good").write_text("changed"), "files were left behind or changed"),
        (lambda own: (own.parent / "good").unlink(), "files were left behind or changed"),
        (
            lambda own: (own.parent.parent / "secret").read_text() and None,
            "files outside the folders were opened",
        ),
        (lambda own: subprocess.run([sys.executable, "-V"]).returncode, "never does this: subprocess.Popen"),
        (lambda own: len(socket.getaddrinfo("127.0.0.1", 1)), "never does this: socket.getaddrinfo"),
        pytest.param(
            lambda own: bytes(4 * 2**30),
            "MemoryError",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux alone"),
        ),
    ],
)
def test_a_failure_is_noticed(tmp_path: Path, call: Callable[[Path], object], fault: str) -> None:
    (folder := tmp_path / "folder").mkdir()
    (folder / "good").touch()
    (tmp_path / "secret").write_text("a")
    with pytest.raises(AssertionError, match=fault):
        run_case(folder, call, readable=(), max_seconds=0.5)


def test_new_files_may_be_left_in_writable_folders(tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    run_case(tmp_path, lambda own: (own.parent / "output" / "new").touch(), writable=[tmp_path / "output"])
    assert list(tmp_path.rglob("*")) == [tmp_path / "output"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("Use another.", "an error of 12 characters"),
        ("Use another. " * 200, "an error of 2600 characters"),
        ("This is a sentence that says nothing of what to do.", "an error without a remedy"),
        ("Use another name than \ud800 for it.", "an error that cannot be written as UTF-8"),
    ],
)
def test_an_error_that_is_not_clear_is_noticed(tmp_path: Path, text: str, fault: str) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        er.load_tokens(tmp_path / "absent")
    raised.value.args = (text,)
    assert error_fault(raised.value).startswith(fault)


def test_a_reader_without_checks_fails(tmp_path: Path) -> None:
    def prepare(case: Case, folder: Path) -> Callable[[], object]:
        (path := folder / "tokens.safetensors").write_bytes(case.content)
        return lambda: load_file(path)["conditional"]

    with pytest.raises(AssertionError, match="not an error of this pack|holds NaN"):
        Campaign(tmp_path).run(broken_token_files(), prepare, lambda: 1, 60)


def test_a_good_input_that_gives_something_else_is_noticed(tmp_path: Path) -> None:
    results = iter(range(9))
    with pytest.raises(AssertionError, match="a good input gives something else"):
        Campaign(tmp_path).run(st.just(None), lambda *_: lambda: 1, lambda: next(results), 1)


def test_the_command_reports_the_case_that_crashed(tmp_path: Path) -> None:
    test = """
import os
from hypothesis import strategies as st
from devkit.bad_input import strategies
from devkit.bad_input.campaign import Campaign

def test_crash(tmp_path):
    Campaign(tmp_path).run(st.just("the case"), lambda *_: os.abort, lambda: 1, 1)
"""
    (tmp_path / "test_crash.py").write_text(test, encoding="utf-8")
    ended = fuzz.run_kind(f"{tmp_path / 'test_crash.py'}::test_crash", cases=1, seed=0)
    assert ended == ("crashed", {"case": "'the case'"})
