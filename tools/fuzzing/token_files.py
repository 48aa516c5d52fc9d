"""Files of reference tokens, broken."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from random import Random

import easyref_core as er
from devkit import golden

from .cases import Case
from .safetensors_files import broken_file, broken_metadata, put_together, steady, taken_apart


def used(path: Path) -> object:
    """Both sides, what made them, and what can be done with them: combined, and saved again."""
    found = er.load_tokens(path)
    both = [found.conditional, found.unconditional]
    er.combine(both, "concat")
    made = [dataclasses.astuple(tokens.provenance) for tokens in both]
    again = path.with_name("again.safetensors")
    try:
        er.save_tokens(again, *both)
        second = er.load_tokens(again)
    finally:
        again.unlink(missing_ok=True)
    return [*both, found.thumbnails, made, second.conditional]


class Cases:
    """Saved tokens of one group, of a combination and of a batch."""

    readable = None
    writable = ()

    def __init__(self, folder: Path) -> None:
        model = er.load(golden.CHECKPOINT, golden.MLLM)
        tokens = model.aggregate(model.encode(golden.references(), golden.PROMPT, size=56))
        uncond = model.unconditional(size=56)
        both = er.combine([tokens, er.combine([tokens, tokens], "add")], "average")
        rows = er.batch([tokens, tokens])
        self.saved = folder / "good.safetensors"
        er.save_tokens(self.saved, tokens, uncond, golden.references())
        er.save_tokens(folder / "combined.safetensors", both, uncond)
        er.save_tokens(folder / "batch.safetensors", rows, uncond)
        self.files = [
            steady((folder / f"{name}.safetensors").read_bytes()) for name in ("good", "combined", "batch")
        ]

    def good(self) -> object:
        return used(self.saved)

    def make(self, random: Random, folder: Path) -> Case:
        data = random.choice(self.files)
        if random.random() < 0.5:
            how, broken = broken_file(data, random)
        else:
            how, header, body = broken_metadata(*taken_apart(data), random)
            broken = put_together(json.dumps(header).encode(), body)
        path = folder / "tokens.safetensors"
        path.write_bytes(broken)
        return Case(how, lambda: used(path))
