"""The MLLM folder: config.json, tokenizer files, and the index of its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random

import easyref_core as er
from devkit import golden

from .cases import Case
from .checkpoint import used
from .mutations import ODD, broken_json
from .safetensors_files import broken_file

INDEX = "model.safetensors.index.json"
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "added_tokens.json",
    "special_tokens_map.json",
)
OUTSIDE = "outside.safetensors"  # beside the folder: no index may lead to it


class Cases:
    """The golden MLLM folder with one file broken; for its weights, a checkpoint that holds none itself."""

    readable = None
    writable = ()

    def __init__(self, folder: Path) -> None:
        tensors = golden.checkpoint_tensors()
        bare = {name: t for name, t in tensors.items() if not name.startswith("multimodal_llm.")}
        self.bare = golden.write(folder / "bare.safetensors", bare)
        self.weights = (golden.MLLM / "model.safetensors").read_bytes()
        self.names = list(er.load(self.bare, golden.MLLM).checkpoint.sources)

    def good(self) -> object:
        return used(self.bare, golden.MLLM)

    def make(self, random: Random, folder: Path) -> Case:
        mllm = folder / "mllm"
        weighty = random.random() < 0.4
        ignored = shutil.ignore_patterns("*.safetensors") if not weighty else None
        shutil.copytree(golden.MLLM, mllm, ignore=ignored)
        checkpoint = self.bare if weighty else golden.CHECKPOINT
        if weighty:
            how = self._break_weights(mllm, random)
        elif random.random() < 0.5:
            how = _break_json(mllm / "config.json", random)
        else:
            how = _break_tokenizer(mllm, random)
        return Case(how, lambda: used(checkpoint, mllm))

    def _break_weights(self, mllm: Path, random: Random) -> str:
        if random.random() < 0.3:
            how, broken = broken_file(self.weights, random)
            (mllm / "model.safetensors").write_bytes(broken)
            return f"model.safetensors: {how}"
        shutil.copy(golden.MLLM / "model.safetensors", mllm.parent / OUTSIDE)
        part = "model-00001-of-00001.safetensors"
        (mllm / "model.safetensors").rename(mllm / part)
        names = self.names[:5]
        if random.random() < 0.5:
            led = random.choice(
                [
                    f"../{OUTSIDE}",
                    str(mllm.parent / OUTSIDE),
                    f"./../mllm/../{OUTSIDE}",
                    "..",
                    ".",
                    "",
                    "/etc/passwd",
                    "gone.safetensors",
                    "x\x00y",
                    "x" * 5000,
                    "\ud800",
                    f"C:\\{OUTSIDE}",
                    "\\\\host\\share\\x.safetensors",
                    "config.json",
                    *ODD,
                ]
            )
            (mllm / INDEX).write_text(
                json.dumps({"weight_map": {names[0]: led, names[1]: part}}), encoding="utf-8"
            )
            return f"index names {str(led)[:60]!r}"
        how, text = broken_json(
            {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, part)}, random
        )
        (mllm / INDEX).write_bytes(text)
        return f"index: {how}"


def _add_code(mllm: Path, random: Random) -> str:
    """A tokenizer and a model of their own, as transformers runs them where it is told to trust a folder."""
    (mllm / "own.py").write_text(
        "import os\nos.mkdir(os.path.dirname(__file__) + '/../ran')\nclass Own: pass\n", encoding="utf-8"
    )
    changed = random.sample(["tokenizer_config.json", "config.json"], random.choice([1, 2]))
    for name in changed:
        config = json.loads((mllm / name).read_text(encoding="utf-8"))
        config["auto_map"] = {"AutoTokenizer": ["own.Own", "own.Own"], "AutoConfig": "own.Own"}
        config |= {"tokenizer_class": random.choice(["Own", "OwnFast", None])} if "tokenizer" in name else {}
        (mllm / name).write_text(json.dumps(config), encoding="utf-8")
    return f"code for {changed}"


def _break_json(file: Path, random: Random) -> str:
    how, text = broken_json(json.loads(file.read_text(encoding="utf-8")), random)
    file.write_bytes(text)
    return f"{file.name}: {how}"


def _break_tokenizer(mllm: Path, random: Random) -> str:
    what = random.choice(["json", "json", "json", "missing", "merges", "code"])
    if what == "code":
        return _add_code(mllm, random)
    if what == "json":
        return _break_json(mllm / random.choice(TOKENIZER), random)
    if what == "missing":
        gone = random.sample(TOKENIZER, random.choice([1, 2, 5]))
        for name in gone:
            (mllm / name).unlink()
        return f"without {gone}"
    (mllm / "tokenizer.json").unlink()
    (mllm / "merges.txt").write_bytes(random.choice([b"", b"a", b"\xff\xfe", b"a b c d\n" * 50, b"#\n\n\n"]))
    return "merges.txt"
