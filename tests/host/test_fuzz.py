"""Drawn bad numbers, choices, texts and paths for the nodes; tools/fuzz.py runs the same on more cases."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from PIL import Image

from devkit.bad_input.campaign import Campaign
from devkit.bad_input.strategies import Case, Draw, number_lists, odd_numbers, odd_texts, odd_values, pick
from devkit.host import golden, sampling

pytestmark = pytest.mark.one_host

INFO = json.loads((Path(__file__).parent / "object_info.json").read_text(encoding="utf-8"))
WIDGETS = ("INT", "FLOAT", "BOOLEAN", "STRING", "COMBO")
FILES = {"checkpoint", "mllm", "file", "folder", "filename_prefix"}  # names of files: see test_paths


@pytest.fixture(autouse=True)
def _models(folders: ModuleType, base: Path) -> None:
    for name in ("easyref", "LLM", "text_encoders"):
        (base / "models" / name).mkdir(parents=True)
    folders.register_folders()


# Numbers, choices and texts


@st.composite
def odd_inputs(draw: Draw, entry: dict[str, Any]) -> Any:
    """A value for an input as the host describes it: at its bounds, beyond them, of another type."""
    if entry["type"] == "STRING":
        return draw(number_lists | number_lists | odd_texts | odd_values | st.just(b"a"))
    if entry["type"] in ("COMBO", "BOOLEAN"):
        return draw(st.sampled_from([*entry.get("options", []), True, False]) | odd_values)
    low, high = entry.get("min", 0), entry.get("max", 1)
    bounds = [low, high, low - 1, high + 1, low + 1, (low + high) / 2, low - 0.001, high + 0.001, float(low)]
    others = ["", "1", "nan", "abc", None, [], [1.0], 1 + 2j, torch.tensor(1.0)]
    return draw(st.sampled_from([*bounds, *bounds, *bounds, *others]) | odd_numbers)


@st.composite
def odd_executions(draw: Draw, nodes: list[str]) -> Case:
    """A node, and one or two of its inputs."""
    choices = [
        (node, entry)
        for node in nodes
        for entry in INFO[node]["inputs"]
        if entry["type"] in WIDGETS and entry["name"] not in FILES
    ]
    node, entry = pick(draw, choices)
    entries = [entry, *[other for name, other in choices if name == node][: pick(draw, [0, 0, 1])]]
    odd = {entry["name"]: draw(odd_inputs(entry)) for entry in entries}
    if INFO[node]["takes lists"]:
        odd = {name: pick(draw, [[value], [value, value], []]) for name, value in odd.items()}
    shown = [f"{name} = {str(value)[:60]!r} ({type(value).__name__})" for name, value in odd.items()]
    return Case(f"{node}: {', '.join(shown)}", (node, odd))


def fitting_inputs(easy: sampling.Easy, model: Any, context: Any) -> dict[str, dict[str, Any]]:
    """{node: inputs that fit} of the nodes that take numbers, choices or texts."""
    group, batch = golden.references(), torch.cat([golden.references()[0]] * 2)
    easyref = {"easyref": easy.easyref}
    encode = easyref | {"group": group, "prompt": "a cat", "instruction": "look:\n", "size": 84}
    three = {"tokens0": easy.tokens, "tokens1": easy.other_tokens(1), "tokens2": easy.other_tokens(2)}
    weights = {"weight": 1.0, "start_percent": 0.0, "end_percent": 1.0, "lora_strength": 1.0}
    language = next(e for e in INFO["EasyRefInstruction"]["inputs"] if e["name"] == "language")["default"]
    demo = {"example": 1, "references": 3, "with_outsider": False}
    crop = {"crop": ["square around the mask"], "mask": [torch.ones(1, 8, 8)], "padding": [1.5]}
    return {
        "EasyRefApply": {"model": model, "tokens": easy.tokens, **easyref, **weights},
        "EasyRefEncodeGroup": {**encode, "when_too_large": "error"},
        "EasyRefAggregate": {"context": context, **easyref},
        "EasyRefDemo": {"prompt": "", "negative_prompt": "", **demo},
        "EasyRefCombineTokens": {"tokens": three, "method": "add", "factor": 0.5, "weights": ""},
        "EasyRefTokensOverFrames": {"tokens": three, "frames": 8, "easing": "linear"},
        "EasyRefCropReference": {"images": [batch], **crop},
        "EasyRefSelectReferences": {"group": group, "references": "1, 2"},
        "EasyRefInstruction": {"preset": "general", "language": language, "text": ""},
        "EasyRefGroupBudget": encode,
        "EasyRefWeighReferences": {"context": context, "weights": "1, 0.5, 1"},
        "EasyRefReferenceAttention": {"context": context, "group": group, "token": -1, **easyref},
        "EasyRefReferenceInfluence": encode,
        "EasyRefWeightSheet": {"weights": "0.4, 1.0", "end_percents": "1.0"},
        "EasyRefSheet": {"images": [batch], "weight": [1.0], "end_percent": [1.0], "cell": [256]},
    }


def test_numerics(pack: ModuleType, base: Path, easy: sampling.Easy, model: Any) -> None:
    with torch.inference_mode():
        images = [image[0] for image in golden.references()]
        context = easy.easyref.encode(images, "a cat", "look:\n", 84)
    fitting = fitting_inputs(easy, model, context)

    def result_of(value: Any) -> object:
        """The numbers of a node's output; of a patched MODEL its prediction."""
        if hasattr(value, "model_options"):
            return sampling.predict(value) if value.model is model.model else "MODEL"
        if hasattr(value, "conditional"):
            return [value.conditional, value.unconditional]
        if hasattr(value, "spans"):
            return [value.states, value.weights or (), value.provenance.prompt]
        return [result_of(item) for item in value] if isinstance(value, (list, tuple)) else value

    def run(node: str, odd: dict[str, Any]) -> object:
        return result_of(golden.execute(pack, node, **fitting[node] | odd).result)

    good = [f"EasyRef{name}" for name in "Apply EncodeGroup Aggregate TokensOverFrames WeightSheet".split()]
    campaign = Campaign(base, writable=(base / "temp", base / "output" / "easyref"))
    campaign.run(
        odd_executions(sorted(fitting)),
        lambda case, _: functools.partial(run, *case.content),
        lambda: [run(node, {}) for node in good],
        60,
    )


# Paths

SECRET = "a prompt outside the host's folders"
PARTS = """
tokens a faces/anna good_00001_.safetensors good easyref.safetensors pictures 0.png outside link easyref 猫
.. . ... .... .. . ~ $HOME %APPDATA% %year% %width% -rf * ? < > | " ' tokens. ..\\.. a\\b
a\u2044b a\u2215b \u202eb \uff0e\uff0e
CON NUL COM1 COM¹ aux.txt LPT9.safetensors prn CLOCK$ con.x.y x:y x:$DATA
""".split()
PARTS += ["", "a\x00b", "a\nb", "a\tb", "a b", "tokens ", " a", "\ud800", "\u2028", "x" * 300, "é" * 200]
PATH_PREFIXES = "/ // \\ \\\\host\\share\\ \\\\?\\C:\\ C:\\ C: c:/ file:/// http://h/ ~/ ./".split()
PATHS = """
../outside/secret.safetensors ../../outside/secret.safetensors ../secret.safetensors
{base}/outside/secret.safetensors link link.safetensors link/secret.safetensors link/new
linked linked/link.png ../outside/new {base}/outside ../input
faces/../../../outside/new ../../models/easyref/new
pictures/../../outside ../../../../../../../../etc/passwd
""".split()
PATHS += ["x" * 100_000, "a/" * 3000]


@st.composite
def odd_paths(draw: Draw) -> Case:
    """An operation and a path for it, in which {base} is the folder of the test."""
    names = st.sampled_from(PARTS) | st.text(st.characters(), max_size=5)
    joined = pick(draw, ["/", "/", "\\", "//"]).join(draw(st.lists(names, min_size=1, max_size=4)))
    path = pick(draw, [joined, joined, pick(draw, PATH_PREFIXES) + joined, pick(draw, PATHS)])
    path += pick(draw, ["", "", "", ".safetensors", " ", ".", "/", "\x00"])
    operation = pick(draw, ["load tokens", "save tokens", "folder", "checkpoint", "mllm"])
    return Case(f"{operation}: {path[:150]!r}", (operation, path))


def fill(pack: ModuleType, base: Path, tokens: Any) -> None:
    """A good file of each kind, one outside the host's folders that must not be read, and links to it."""
    save = golden.part(pack, "easyref_core.tokens.files").save_tokens
    outside, saved, inputs = base / "outside", base / "output" / "easyref", base / "input"
    in_input = (inputs / name for name in ("easyref", "pictures", "linked"))
    for folder in (outside / "deep", saved / "faces", *in_input):
        folder.mkdir(parents=True)
    both = tokens.conditional, tokens.unconditional
    save(saved / "good_00001_.safetensors", *both)
    provenance = dataclasses.replace(both[0].provenance, prompt=SECRET)
    save(outside / "secret.safetensors", type(both[0]).of(both[0].clone(), provenance), both[1])
    shutil.copy(outside / "secret.safetensors", base / "secret.safetensors")
    Image.new("RGB", (30, 30), "red").save(outside / "secret.png")
    shutil.copy(golden.GOLDEN / "references" / "0.png", inputs / "pictures" / "0.png")
    shutil.copy(golden.CHECKPOINT, base / "models" / "easyref" / "easyref.safetensors")
    shutil.copy(golden.CHECKPOINT, outside / "checkpoint.safetensors")
    without_weights = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(golden.MLLM, base / "models" / "LLM" / "golden", ignore=without_weights)
    for folder in (saved, inputs / "easyref", inputs):
        (folder / "link").symlink_to(outside)
        (folder / "link.safetensors").symlink_to(outside / "secret.safetensors")
    (inputs / "linked" / "link.png").symlink_to(outside / "secret.png")


def raise_same(refusal: object, call: Callable[[], object]) -> None:
    """Make a call that the validation refused; raises the same error, or AssertionError."""
    with pytest.raises(FileNotFoundError) as raised:
        call()
    assert str(raised.value) == refusal
    raise raised.value


def load_tokens(pack: ModuleType, base: Path, file: str) -> object:
    node = golden.node(pack, "EasyRefLoadTokens")
    if (refusal := node.validate_inputs(file)) is not True:
        raise_same(refusal, lambda: node.execute(file))
    fingerprint = node.fingerprint_inputs(file)
    pair, prompt = golden.execute(pack, "EasyRefLoadTokens", file).result
    assert prompt != SECRET, "the tokens outside were read"
    return [pair.conditional, prompt, fingerprint.split()[0]]


def save_tokens(pack: ModuleType, base: Path, tokens: Any, prefix: str) -> str:
    (saved,) = golden.execute(pack, "EasyRefSaveTokens", tokens, prefix).ui["easyref_tokens"]
    path = base / "output" / saved["subfolder"] / saved["filename"]
    assert path.is_file(), f"saved as {path}"
    assert path.resolve().is_relative_to(base / "output" / "easyref"), f"saved as {path}"
    return str(saved["filename"])


def load_folder(pack: ModuleType, folder: str) -> object:
    golden.node(pack, "EasyRefGroupFromFolder").fingerprint_inputs(folder, 4, 0)
    group, names = golden.execute(pack, "EasyRefGroupFromFolder", folder, 4, 0).result
    red = torch.tensor([1.0, 0, 0])
    assert not any(torch.equal(image[0, 0, 0], red) for image in group), "the image outside was read"
    return [group, names]


def find_models(pack: ModuleType, base: Path, checkpoint: str, mllm: str) -> list[str]:
    """The files that the loader would load."""
    node, folders = golden.node(pack, "EasyRefLoader"), golden.part(pack, "nodes.host.folders")
    if (refusal := node.validate_inputs(checkpoint)) is not True:
        raise_same(refusal, lambda: folders.find_checkpoint(checkpoint))
    node.fingerprint_inputs(checkpoint, mllm)
    paths = [folders.find_checkpoint(checkpoint), folders.find_mllm(mllm)]
    allowed = base / "models", *folders.SHIPPED.values()
    for path in filter(None, paths):
        assert str(path).startswith(tuple(map(str, allowed))), f"{path} was found"
        assert ".." not in path.parts, f"{path} was found"
    return list(map(str, paths))


def test_paths(pack: ModuleType, base: Path, easy: sampling.Easy) -> None:
    fill(pack, base, easy.tokens)
    operations: dict[str, Callable[[str], object]] = {
        "load tokens": lambda path: load_tokens(pack, base, path),
        "save tokens": lambda path: save_tokens(pack, base, easy.tokens, path),
        "folder": lambda path: load_folder(pack, path),
        "checkpoint": lambda path: find_models(pack, base, path, "from the checkpoint"),
        "mllm": lambda path: find_models(pack, base, "easyref.safetensors", path),
    }

    def prepare(case: Case, _: Path) -> Callable[[], object]:
        operation, path = case.content
        return lambda: operations[operation](path.replace("{base}", str(base)))

    good = {"load tokens": "good_00001_.safetensors", "folder": "pictures", "mllm": "LLM/golden"}
    campaign = Campaign(
        base,
        readable=[base / name for name in ("input", "output", "temp", "models")],
        writable=[base / "temp", base / "output" / "easyref"],
    )
    campaign.run(odd_paths(), prepare, lambda: [operations[name](path) for name, path in good.items()], 150)
