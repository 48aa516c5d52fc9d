"""Saved states of a run: atomic, the newest few retained, resumed only under the same settings; its lock.

accelerate's own rotation (ProjectConfiguration.total_limit) is not used: it deletes the oldest state before
it writes the new one, writes in place, and would resume from a state that a killed run left incomplete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint.checkpoint import open_checkpoint
from ..files.atomic_write import atomic_write_text
from .stream import open_sources

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .config import Settings

log = logging.getLogger(__name__)

# Data loading processes of a killed run hold its lock until they find that it has died, within 5 seconds.
LOCK_SECONDS = 15.0
SETTINGS_FILE = "settings.json"  # of a run, in its output folder
PROGRESS_FILE = "progress.json"  # of a state

# Settings that do not affect the weights, so a resumed run may change them, and those of LAYOUT.
FREE = frozenset(
    "output workers cache precomputed save_every keep keep_every export_every save_dtype log_every trackers "
    "samples validation benchmark profile_updates thorough max_broken memory_check".split()
)

# A resumed run may change these too. The rows go on where they were, but an update then has other samples, or
# the same ones in another order of summation, so losses are not those of an unchanged run to the bit.
LAYOUT = frozenset("processes accumulation batch_size gradient_checkpointing".split())

# Settings that decide the model which a state is of.
MODEL = frozenset(
    "stage base mllm start num_tokens final_layers lora_rank mllm_lora_rank causal aggregation ema".split()
) | {"contents of start"}

# Settings that older runs did not have, and what these runs did.
ABSENT = {
    "data.apply_exif": False,
    "optimizer": "adamw",
    "mllm_lora_rank": 0,
    "weight_dtype": "float32",
    "ema": None,
    "base_config": None,
    "sharding": "none",
}


@contextmanager
def run_lock(output: Path, seconds: float | None = None) -> Iterator[None]:
    """Lock of a run's output folder; the system releases it when the process ends or dies.

    seconds: wait for it, LOCK_SECONDS by default. Raises ValueError if another run holds it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(output / ".lock", timeout=LOCK_SECONDS if seconds is None else seconds)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"{output} is in use by another run, which holds {lock.lock_file}. Wait until it has ended, or "
            "set another output."
        ) from error
    except NotImplementedError:
        log.warning("The file system of %s has no locks, so a second run in it is not refused.", output)
    try:
        yield
    finally:
        lock.release()


def saved_states(output: Path) -> dict[int, Path]:
    """Return {update: folder} of the complete states of a run, oldest first."""
    numbers = {path.name.removeprefix("state-"): path for path in output.glob("state-*")}
    return dict(sorted((int(number), path) for number, path in numbers.items() if number.isdecimal()))


def save_state(accelerator: Accelerator, settings: Settings, update: int, samples: int) -> None:
    """Save weights, optimizer and random states of `update`, then delete old states.

    samples: number of samples of all updates so far. The newest settings.keep states are retained, and those
    of updates that settings.keep_every divides.
    """
    output = settings.output
    partial, folder = output / "state.partial", output / f"state-{update}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / PROGRESS_FILE).write_text(json.dumps({"samples": samples}), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        for number, old in list(saved_states(output).items())[: -settings.keep]:
            if not settings.keep_every or number % settings.keep_every:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def samples_before(settings: Settings, update: int, processes: int) -> int:
    """Number of samples of a state's updates; states of older versions were of one layout throughout."""
    file = settings.output / f"state-{update}" / PROGRESS_FILE
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))["samples"]
    return update * settings.accumulation * settings.batch_size * processes


def resume(accelerator: Accelerator, output: Path) -> int:
    """Load the newest state that can be read and return its update, 0 without a state.

    Damaged states after it are renamed. Raises ValueError in all processes if every state is damaged.
    """
    damaged: dict[Path, str] = {}
    for update, folder in reversed(saved_states(output).items()):
        reason = load_state(accelerator, folder)
        if reason is None:
            if accelerator.is_main_process:
                _set_aside(damaged, folder)
            return update
        damaged[folder] = reason
    if damaged:
        listed = "; ".join(f"{folder.name}: {reason}" for folder, reason in damaged.items())
        raise ValueError(
            f"No saved state in {output} can be read ({listed}). Restore one, or delete the state folders to "
            "start from the beginning."
        )
    return 0


def load_state(accelerator: Accelerator, folder: Path) -> str | None:
    """Load a state; None, or the reason in all processes if it is damaged for one of them."""
    reason = None
    try:
        accelerator.load_state(str(folder))
        # counted in micro-batches, of which an update may have another number now
        accelerator.step = 0
    except Exception as error:  # of pickle, zipfile, safetensors and torch, by the place of the damage
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    failed = accelerator.reduce(torch.tensor(float(reason is not None), device=accelerator.device))
    return (reason or "damaged for another process") if failed.item() else None


def _set_aside(damaged: dict[Path, str], used: Path) -> None:
    """Rename damaged states, so that they are not counted among those retained."""
    for folder, reason in damaged.items():
        aside = folder.with_name(f"damaged-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        log.warning("%s is damaged (%s) and now %s; the run continues from %s.", folder, reason, aside, used)


def require_same_run(settings: Settings, processes: int, sharding: str = "none") -> None:
    """Write settings.json. ValueError if the output folder has states of a run with different settings.

    sharding: see sharding.sharding_of. DeepSpeed's states are of a number of processes.
    """
    file = settings.output / SETTINGS_FILE
    layout = {"processes": processes, "sharding": sharding}
    current = {**flatten(settings), **layout, **input_hashes(settings)}
    if file.is_file() and saved_states(settings.output):
        ignored = FREE | LAYOUT | ({"updates"} if settings.schedule == "constant" else set())
        ignored |= {"apply_exif"} if settings.data.procedural is not None else set()  # these have none
        ignored -= {"processes"} if sharding.startswith("zero") else set()
        _refuse_differences(
            settings.output,
            current,
            lambda name: name.rpartition(".")[2] in ignored or name.partition(".")[0] in ignored,
            "Set them back to continue it, or set another output.",
        )
        if changed := _differences(settings.output, current, lambda name: name not in LAYOUT):
            log.warning("The run continues in another layout: %s.", "; ".join(changed))
    atomic_write_text(file, json.dumps(current, indent=1))


def require_same_model(settings: Settings) -> None:
    """Raise ValueError if the states of the output folder are of another model than the settings'."""
    if (settings.output / SETTINGS_FILE).is_file():
        current = {**flatten(settings), **input_hashes(settings)}
        remedy = "Set them back to export its states."
        _refuse_differences(settings.output, current, lambda name: name not in MODEL, remedy)


def _refuse_differences(
    output: Path, current: dict[str, Any], ignore: Callable[[str], bool], remedy: str
) -> None:
    """Raise ValueError for settings that differ from those in the output's settings.json."""
    if differences := _differences(output, current, ignore):
        raise ValueError(f"{output} contains a run with other settings ({'; '.join(differences)}). {remedy}")


def _differences(output: Path, current: dict[str, Any], ignore: Callable[[str], bool]) -> list[str]:
    """Settings that differ from those in the output's settings.json, each with both values."""
    previous = ABSENT | json.loads((output / SETTINGS_FILE).read_text(encoding="utf-8"))
    return [
        f"{name} was {previous.get(name)!r} and is {current.get(name)!r}"
        for name in sorted(previous.keys() | current.keys())
        if not ignore(name) and previous.get(name) != current.get(name)
    ]


def input_hashes(settings: Settings) -> dict[str, str]:
    """Hashes of the input files, because a file may have been replaced under the same name."""
    hashes = {}
    if settings.start is not None:
        hashes["contents of start"] = open_checkpoint(settings.start, settings.mllm).fingerprint()
    rows = settings.data.rows
    if rows is not None and rows.is_file():  # a run with examples passed in needs no rows
        hashes["contents of rows"] = hashlib.sha256(rows.read_bytes()).hexdigest()
    if settings.data.stream:
        shards = [source.digest for source in open_sources(settings.data.stream)]
        hashes["contents of data.stream"] = hashlib.sha256("".join(shards).encode()).hexdigest()
    return hashes


def flatten(settings: Settings) -> dict[str, Any]:
    """Settings as a flat dict of JSON values, with dotted names for sections."""

    def flat(value: Any, name: str) -> dict[str, Any]:
        if isinstance(value, dict):
            return {key: v for k, inner in value.items() for key, v in flat(inner, f"{name}{k}.").items()}
        if isinstance(value, list | tuple):
            return {name[:-1]: list(value)}
        return {name[:-1]: value if isinstance(value, int | float | str | None) else str(value)}

    return flat(dataclasses.asdict(settings), "")
