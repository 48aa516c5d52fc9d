"""Every input that becomes a path. Nothing outside the host's folders may be read or written."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image

from devkit import golden

from . import host
from .cases import Case

SECRET = "what nobody may read"
NAMES = [
    "tokens",
    "a",
    "faces/anna",
    "good_00001_.safetensors",
    "good",
    "easyref.safetensors",
    "pictures",
    "0.png",
    "",
]
STEPS = [
    "..",
    ".",
    "...",
    "....",
    "~",
    "$HOME",
    "%APPDATA%",
    "%year%",
    "%width%",
    "outside",
    "link",
    "easyref",
    "a b",
]
DEVICES = ["CON", "NUL", "COM1", "aux.txt", "LPT9.safetensors", "prn", "CLOCK$", "con.x.y", "COM¹"]
ODD = [
    "x:y",
    "x:$DATA",
    "a\x00b",
    "a\nb",
    "a\tb",
    "x" * 300,
    "é" * 200,
    "a\u2044b",
    "a\u2215b",
    "\u202eb",
    "\uff0e\uff0e",
]
ODD += [
    "tokens.",
    "tokens ",
    " tokens",
    "-rf",
    "*",
    "?",
    "a|b",
    "<a>",
    '"',
    "'",
    "\ud800",
    "\u2028",
    "猫",
    "a\\b",
    "..\\..",
]
PREFIXES = [
    "/",
    "//",
    "\\\\host\\share\\",
    "\\\\?\\C:\\",
    "C:\\",
    "C:",
    "c:/",
    "file:///",
    "http://h/",
    "~/",
    "./",
    "\\",
]


class Cases:
    """Loader, saved tokens, and the folder of pictures, beside a folder that nobody may enter."""

    def __init__(self, folder: Path) -> None:
        self.base = folder
        host.use_folders(folder)
        from devkit.host import sampling

        self.tokens = sampling.golden_easy(host.pack()).tokens
        self.nodes = host.nodes()
        self._fill(folder)
        self.writable = (folder / "temp", folder / "output" / "easyref")
        self.readable = tuple(folder / name for name in ("input", "output", "temp", "models"))
        files = host.part("nodes.host.folders")
        self.shipped = str(files.SHIPPED)

    def _fill(self, base: Path) -> None:
        """A good file of each kind where it belongs, one that is not to be read outside, and links to it."""
        save = host.part("easyref_core.tokens.files").save_tokens
        outside, saved = base / "outside", base / "output" / "easyref"
        for made in (
            outside / "deep",
            saved / "faces",
            base / "input" / "easyref",
            base / "input" / "pictures",
            base / "input" / "linked",
        ):
            made.mkdir(parents=True)
        both = self.tokens.conditional, self.tokens.unconditional
        save(saved / "good_00001_.safetensors", *both)
        secret = host.part("easyref_core.tokens.reference_tokens").ReferenceTokens
        made = dataclasses.replace(both[0].provenance, prompt=SECRET)
        save(outside / "secret.safetensors", secret.of(both[0].clone(), made), both[1])
        shutil.copy(outside / "secret.safetensors", base / "secret.safetensors")
        Image.new("RGB", (30, 30), "red").save(outside / "secret.png")
        shutil.copy(golden.GOLDEN / "references" / "0.png", base / "input" / "pictures" / "0.png")
        shutil.copy(golden.CHECKPOINT, base / "models" / "easyref" / "easyref.safetensors")
        shutil.copy(golden.CHECKPOINT, outside / "checkpoint.safetensors")
        shutil.copytree(
            golden.MLLM, base / "models" / "LLM" / "golden", ignore=shutil.ignore_patterns("*.safetensors")
        )
        for place in (saved, base / "input" / "easyref", base / "input"):
            os.symlink(outside, place / "link")
            os.symlink(outside / "secret.safetensors", place / "link.safetensors")
        os.symlink(outside / "secret.png", base / "input" / "linked" / "link.png")

    def good(self) -> object:
        return [
            self._load_tokens("good_00001_.safetensors"),
            self._folder("pictures", 4, 0),
            self._find("easyref.safetensors", "LLM/golden"),
        ]

    def make(self, random: Random, folder: Path) -> Case:
        path = self._odd_path(random)
        calls = {
            "load tokens": lambda: self._load_tokens(path),
            "save tokens": lambda: self._save_tokens(path),
            "folder": lambda: self._folder(path, random.choice([1, 16]), random.choice([0, 1, 10**6])),
            "checkpoint": lambda: self._find(path, "from the checkpoint"),
            "mllm": lambda: self._find("easyref.safetensors", path),
        }
        what = random.choice(list(calls))
        return Case(f"{what}: {path[:150]!r}", calls[what])

    def _odd_path(self, random: Random) -> str:
        parts = random.choices([*NAMES, *STEPS, *STEPS, *DEVICES, *ODD], k=random.choice([1, 1, 2, 3, 4]))
        path = random.choice(["/", "/", "/", "\\", "//"]).join(parts)
        whole = [
            str(self.base / "outside" / "secret.safetensors"),
            str(self.base / "outside"),
            "../outside/secret.safetensors",
            "../../outside/secret.safetensors",
            "../secret.safetensors",
            "link/secret.safetensors",
            "link.safetensors",
            "link",
            "../../../../../../../../etc/passwd",
            "../outside/new",
            "link/new",
            "faces/../../../outside/new",
            "../../models/easyref/new",
            "../input",
            "pictures/../../outside",
            "linked",
            "linked/link.png",
            "x" * 100_000,
            "a/" * 3000,
        ]
        chosen = random.choice([path, path, path, random.choice(PREFIXES) + path, random.choice(whole)])
        return chosen + random.choice(["", "", "", ".safetensors", " ", ".", "/", "\x00"])

    @torch.inference_mode()
    def _load_tokens(self, file: str) -> object:
        node = self.nodes["EasyRefLoadTokens"]
        said = node.validate_inputs(file)
        if said is not True:
            return self._same_error(said, lambda: node.execute(file))
        print_ = node.fingerprint_inputs(file)
        pair, prompt = host.given(node.execute(file))
        if prompt == SECRET:
            raise AssertionError("the tokens outside were read")
        return [pair.conditional, prompt, print_.split()[0]]

    @torch.inference_mode()
    def _save_tokens(self, prefix: str) -> object:
        made = self.nodes["EasyRefSaveTokens"].execute(self.tokens, prefix)
        (saved,) = made.ui["easyref_tokens"]
        path = self.base / "output" / saved["subfolder"] / saved["filename"]
        if not path.is_file() or not path.resolve().is_relative_to(self.base / "output" / "easyref"):
            raise AssertionError(f"saved as {path}")
        return str(saved["filename"])

    @torch.inference_mode()
    def _folder(self, folder: str, limit: int, start: int) -> object:
        node = self.nodes["EasyRefGroupFromFolder"]
        node.fingerprint_inputs(folder, limit, start)
        group, names = host.given(node.execute(folder, limit, start))
        if any(torch.equal(image[0, 0, 0], torch.tensor([1.0, 0, 0])) for image in group):
            raise AssertionError("the picture outside was read")
        return [group, names]

    def _find(self, checkpoint: str, mllm: str) -> object:
        """What the loader would load; loading is checkpoint.py's."""
        node, files = self.nodes["EasyRefLoader"], host.part("nodes.host.folders")
        said = node.validate_inputs(checkpoint)
        if said is not True:
            return self._same_error(said, lambda: files.find_checkpoint(checkpoint))
        node.fingerprint_inputs(checkpoint, mllm)
        found: list[Any] = [files.find_checkpoint(checkpoint), files.find_mllm(mllm)]
        for path in filter(None, found):
            if not str(path).startswith((str(self.base / "models"), self.shipped)) or ".." in path.parts:
                raise AssertionError(f"{path} was found")
        return [str(path) for path in found]

    def _same_error(self, said: object, call: Any) -> object:
        """What was refused before the run is refused in it too, in the same words."""
        try:
            call()
        except FileNotFoundError as error:
            if str(error) == said:
                raise
            raise AssertionError(f"refused with {said!r}, then with {error!r}") from error
        raise AssertionError(f"refused with {said!r}, then run")
