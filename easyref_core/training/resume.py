"""Saved states of a run: written whole or not at all, the newest few kept, continued only under the same settings."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.checkpoint import open_checkpoint
from ..files.atomic_write import atomic_write_text

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .config import Settings

# Settings that decide nothing about the weights: a run may continue with others.
FREE = frozenset(
    {"output", "workers", "cache", "save_every", "keep", "save_dtype", "log_every", "samples", "thorough"}
)


def saved_states(output: Path) -> dict[int, Path]:
    """{update: folder} of the complete states of a run, oldest first."""
    folders = {
        int(match[1]): path
        for path in output.glob("state-*")
        if (match := re.fullmatch(r"state-(\d+)", path.name))
    }
    return dict(sorted(folders.items()))


def save_state(accelerator: Accelerator, output: Path, update: int, keep: int) -> None:
    """Save everything that is needed to continue after `update`, and remove all but the newest `keep` states."""
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
    """Load the newest state into what the accelerator prepared; the number of updates done comes back, 0 at first."""
    states = saved_states(output)
    if not states:
        return 0
    update = max(states)
    accelerator.load_state(str(states[update]))
    return update


def require_same_run(settings: Settings, processes: int) -> None:
    """Write down what this run is; raise ValueError where the output folder holds another one."""
    file = settings.output / "settings.json"
    mine = {**as_plain(settings), "processes": processes, **contents(settings)}
    if file.is_file() and saved_states(settings.output):
        found = json.loads(file.read_text(encoding="utf-8"))
        ignored = FREE | ({"updates"} if settings.schedule == "constant" else set())
        differ = [
            f"{name} was {found.get(name)!r} and is {mine.get(name)!r}"
            for name in sorted(found.keys() | mine.keys())
            if name.rpartition(".")[2] not in ignored
            and name.partition(".")[0] not in ignored
            and found.get(name) != mine.get(name)
        ]
        if differ:
            raise ValueError(
                f"{settings.output} holds a run with other settings ({'; '.join(differ)}). "
                "Set them back to continue it, or set another output."
            )
    atomic_write_text(file, json.dumps(mine, indent=1))


def contents(settings: Settings) -> dict[str, str]:
    """What is in the files a run starts from: under the same names there may be others by now."""
    found = {}
    if settings.start is not None:
        found["contents of start"] = open_checkpoint(settings.start, settings.mllm).fingerprint()
    rows = settings.data.rows
    if rows is not None and rows.is_file():  # a run that is handed its examples reads no rows
        found["contents of rows"] = hashlib.sha256(rows.read_bytes()).hexdigest()
    return found


def as_plain(settings: Settings) -> dict[str, Any]:
    """Settings as JSON holds them, sections flattened to dotted names."""

    def flat(value: Any, name: str) -> dict[str, Any]:
        if isinstance(value, dict):
            return {
                key: v for part, inner in value.items() for key, v in flat(inner, f"{name}{part}.").items()
            }
        return {name[:-1]: value if isinstance(value, int | float | str | list | None) else str(value)}

    return flat(dataclasses.asdict(settings), "")
