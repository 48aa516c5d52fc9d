"""Saved states of a run: atomic, the newest few retained, resumed only under the same settings.

accelerate's own rotation (ProjectConfiguration.total_limit) is not used: it deletes the oldest state before
it writes the new one, writes in place, and would resume from a state that a killed run left incomplete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.checkpoint import open_checkpoint
from ..files.atomic_write import atomic_write_text

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .config import Settings

# Settings that do not affect the weights, so a resumed run may change them.
FREE = frozenset(
    "output workers cache save_every keep save_dtype log_every samples thorough max_broken".split()
)

# Settings that older runs did not have, and what these runs did.
ABSENT = {"data.apply_exif": False}


def saved_states(output: Path) -> dict[int, Path]:
    """Return {update: folder} of the complete states of a run, oldest first."""
    numbers = {path.name.removeprefix("state-"): path for path in output.glob("state-*")}
    return dict(sorted((int(number), path) for number, path in numbers.items() if number.isdecimal()))


def save_state(accelerator: Accelerator, output: Path, update: int, keep: int) -> None:
    """Save weights, optimizer and random states of `update`, then delete all but the newest `keep` states."""
    partial, folder = output / "state.partial", output / f"state-{update}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        for old in list(saved_states(output).values())[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def resume(accelerator: Accelerator, output: Path) -> int:
    """Load the newest state into the prepared objects and return its update, 0 without a state."""
    update, folder = max(saved_states(output).items(), default=(0, None))
    if folder:
        accelerator.load_state(str(folder))
    return update


def require_same_run(settings: Settings, processes: int) -> None:
    """Write settings.json. ValueError if the output folder has states of a run with different settings."""
    file = settings.output / "settings.json"
    current = {**flatten(settings), "processes": processes, **input_hashes(settings)}
    if file.is_file() and saved_states(settings.output):
        previous = json.loads(file.read_text(encoding="utf-8"))
        previous = ABSENT | previous
        ignored = FREE | ({"updates"} if settings.schedule == "constant" else set())
        ignored |= set() if settings.data.rows else {"apply_exif"}  # procedural images have none
        differences = [
            f"{name} was {previous.get(name)!r} and is {current.get(name)!r}"
            for name in sorted(previous.keys() | current.keys())
            if name.rpartition(".")[2] not in ignored
            and name.partition(".")[0] not in ignored
            and previous.get(name) != current.get(name)
        ]
        if differences:
            raise ValueError(
                f"{settings.output} contains a run with other settings ({'; '.join(differences)}). "
                "Set them back to continue it, or set another output."
            )
    atomic_write_text(file, json.dumps(current, indent=1))


def input_hashes(settings: Settings) -> dict[str, str]:
    """Hashes of the input files, because a file may have been replaced under the same name."""
    hashes = {}
    if settings.start is not None:
        hashes["contents of start"] = open_checkpoint(settings.start, settings.mllm).fingerprint()
    rows = settings.data.rows
    if rows is not None and rows.is_file():  # a run with examples passed in needs no rows
        hashes["contents of rows"] = hashlib.sha256(rows.read_bytes()).hexdigest()
    return hashes


def flatten(settings: Settings) -> dict[str, Any]:
    """Settings as a flat dict of JSON values, with dotted names for sections."""

    def flat(value: Any, name: str) -> dict[str, Any]:
        if isinstance(value, dict):
            return {key: v for k, inner in value.items() for key, v in flat(inner, f"{name}{k}.").items()}
        return {name[:-1]: value if isinstance(value, int | float | str | list | None) else str(value)}

    return flat(dataclasses.asdict(settings), "")
