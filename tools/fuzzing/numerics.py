"""Every number, choice and text that a node takes, at its bounds and beyond them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

from . import host
from .cases import Case
from .text import odd_text

INFO = Path(__file__).resolve().parents[2] / "tests" / "host" / "object_info.json"
WIDGETS = ("INT", "FLOAT", "BOOLEAN", "STRING", "COMBO")
FILES = {"checkpoint", "mllm", "file", "folder", "filename_prefix"}  # names of files: see paths.py
NUMBERS: list[Any] = [
    float("nan"),
    float("inf"),
    float("-inf"),
    0,
    -1,
    0.5,
    1e-300,
    1e30,
    1e308,
    2**31,
    2**63,
    2**64,
    10**30,
    True,
    False,
    "",
    "1",
    "nan",
    "abc",
    None,
    [],
    [1.0],
    1 + 2j,
    torch.tensor(1.0),
]
PARSED = [
    "",
    "1",
    "1, 0.5, 1",
    "1, 0.5",
    "nan, 1, 1",
    "inf, 1, 1",
    "-1, 1, 1",
    "1e400, 1, 1",
    "0, 0, 0",
    "3, 1, 2",
    "1.5",
    "99",
    "0",
    "-0",
    "1;2;3",
    "1，2，3",
    "٣, 1, 2",
    "1_000",
    "0x10",
    "1 2 3",
    "a",
    ",",
    ":",
    "::",
    "3:1, 6:0.5",
    "3:1, 3:1",
    "-1:1",
    "11:1",
    "3:nan",
    "3:",
    ":1",
    "1e3:1",
    "3:1e308",
    "0.2:1, 0.8:0",
    "0.2:1, 0.2:0",
    "0:1e308, 1:-1e308",
    "0.5:inf",
    "1, 0.2:1",
    "9" * 5000,
    "1," * 20_000,
    "0." + "1" * 50_000 + ":1",
    "\x00",
    "\ud800",
    "1\n0.5\n1",
    "²",
    "½",
    "1" + "\u200b" + "2",
]


class Cases:
    """One node at a time, run with inputs that fit but for one or two."""

    readable = None

    def __init__(self, folder: Path) -> None:
        host.use_folders(folder)
        self.writable = (folder / "temp", folder / "output" / "easyref")
        from devkit.host import golden, sampling
        from devkit.host.tiny_nodes.tiny_sdxl import load_tiny_sdxl

        self.easy, self.predict = sampling.golden_easy(host.pack()), sampling.predict
        self.nodes, self.load_unet = host.nodes(), load_tiny_sdxl
        self.info = json.loads(INFO.read_text(encoding="utf-8"))
        self.group = golden.references()
        self.batch = torch.cat([self.group[0]] * 2)
        with torch.inference_mode():
            self.context = self.easy.easyref.encode(
                [image[0] for image in self.group], "a cat", "look:\n", 84
            )
        self.unet = load_tiny_sdxl()
        self.fitting = self._fitting()
        self.chosen = sorted(
            (node, entry["name"], entry)
            for node in self.fitting
            for entry in self.info[node]["inputs"]
            if entry["type"] in WIDGETS and entry["name"] not in FILES
        )

    def good(self) -> object:
        names = (
            "EasyRefApply",
            "EasyRefEncodeGroup",
            "EasyRefAggregate",
            "EasyRefTokensOverFrames",
            "EasyRefWeightSheet",
        )
        return [self._run(node, self.fitting[node]()) for node in names]

    def make(self, random: Random, folder: Path) -> Case:
        node, name, entry = random.choice(self.chosen)
        value = odd_value(entry, random)
        odd = {name: value}
        others = [(n, e) for other, n, e in self.chosen if other == node and n != name]
        if others and random.random() < 0.3:
            second, described = random.choice(others)
            odd[second] = odd_value(described, random)
        if self.info[node]["takes lists"]:
            odd = {key: random.choice([[value], [value, value], []]) for key, value in odd.items()}
        shown = ", ".join(
            f"{key} = {str(value)[:60]!r} ({type(value).__name__})" for key, value in odd.items()
        )
        return Case(f"{node}: {shown}", lambda: self._run(node, self.fitting[node]() | odd))

    @torch.inference_mode()
    def _run(self, node: str, inputs: dict[str, Any]) -> object:
        """What a node gives; of a MODEL what it predicts, of a context and tokens their numbers."""
        return [self._seen(value) for value in host.given(self.nodes[node].execute(**inputs))]

    def _seen(self, value: Any) -> object:
        if hasattr(value, "model_options"):
            return self.predict(value) if value.model is self.unet.model else "MODEL"
        if hasattr(value, "conditional"):
            return [value.conditional, value.unconditional]
        if hasattr(value, "spans"):
            return [value.states, value.weights or (), value.provenance.prompt]
        return [self._seen(part) for part in value] if isinstance(value, (list, tuple)) else value

    def _fitting(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """{node: the inputs that fit}, of the nodes that take numbers, choices or texts."""
        easyref, tokens, context, group = self.easy.easyref, self.easy.tokens, self.context, self.group
        text = {"prompt": "a cat", "instruction": "look:\n", "size": 84}
        reads = {"easyref": easyref, "group": group, **text}
        three = {
            "tokens0": tokens,
            "tokens1": self.easy.other_tokens(1),
            "tokens2": self.easy.other_tokens(2),
        }
        weights = {"weight": 1.0, "start_percent": 0.0, "end_percent": 1.0, "lora_strength": 1.0}
        demo = {"prompt": "", "negative_prompt": "", "example": 1, "references": 3, "with_outsider": False}
        fitting = {
            "EasyRefApply": {"model": self.unet, "easyref": easyref, "tokens": tokens, **weights},
            "EasyRefEncodeGroup": {**reads, "when_too_large": "error"},
            "EasyRefAggregate": {"easyref": easyref, "context": context},
            "EasyRefDemo": demo,
            "EasyRefCombineTokens": {"tokens": three, "method": "add", "factor": 0.5, "weights": ""},
            "EasyRefTokensOverFrames": {"tokens": three, "frames": 8, "easing": "linear"},
            "EasyRefCropReference": {
                "images": [self.batch],
                "crop": ["square around the mask"],
                "mask": [torch.ones(1, 8, 8)],
                "padding": [1.5],
            },
            "EasyRefSelectReferences": {"group": group, "references": "1, 2"},
            "EasyRefInstruction": {"preset": "general", "language": "English", "text": ""},
            "EasyRefGroupBudget": reads,
            "EasyRefWeighReferences": {"context": context, "weights": "1, 0.5, 1"},
            "EasyRefReferenceAttention": {
                "easyref": easyref,
                "context": context,
                "group": group,
                "token": -1,
            },
            "EasyRefReferenceInfluence": reads,
            "EasyRefWeightSheet": {"weights": "0.4, 1.0", "end_percents": "1.0"},
            "EasyRefSheet": {"images": [self.batch], "weight": [1.0], "end_percent": [1.0], "cell": [256]},
        }
        languages = next(e for e in self.info["EasyRefInstruction"]["inputs"] if e["name"] == "language")
        fitting["EasyRefInstruction"]["language"] = languages["default"]
        return {node: (lambda inputs=inputs: dict(inputs)) for node, inputs in fitting.items()}


def odd_value(entry: dict[str, Any], random: Random) -> Any:
    """A value for an input as the host describes it: at its bounds, beyond them, of another type."""
    if entry["type"] == "STRING":
        if random.random() < 0.1:
            return random.choice([None, 1, 0.5, True, [], b"a", {}])
        return odd_text(random) if random.random() < 0.3 else random.choice(PARSED)
    if entry["type"] in ("COMBO", "BOOLEAN"):
        return random.choice(
            [*entry.get("options", []), "", "xyz", "\x00", None, 0, 1, True, -1, 0.5, [], {}]
        )
    low, high = entry.get("min", 0), entry.get("max", 1)
    bounds = [
        low,
        high,
        low - 1,
        high + 1,
        low + 1,
        (low + high) / 2,
        low - 0.001,
        high + 0.001,
        float(low),
        int(low),
    ]
    return random.choice([*bounds, *bounds, *NUMBERS])
