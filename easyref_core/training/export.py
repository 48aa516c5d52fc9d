"""Export of a saved state: the checkpoint that the run would have written after that update."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .loop import make_accelerator
from .resume import load_state, require_same_model, saved_states
from .run import Run

if TYPE_CHECKING:
    from .config import Settings


def export(
    settings: Settings, update: int | None = None, file: Path | None = None, raw: bool = False
) -> Path:
    """Write the checkpoint of a saved state, and return its path. The run may go on meanwhile.

    update: of the state; None takes the newest. file: None writes easyref-<update>.safetensors to the output.
    raw: the trained weights in place of their moving average.
    Raises ValueError for a state that is missing, damaged or of another model than the settings'.
    """
    states = saved_states(settings.output)
    if not states:
        raise ValueError(f"{settings.output} has no saved state. Set output to the folder of a run.")
    update = max(states) if update is None else update
    if update not in states:
        known = ", ".join(map(str, states))
        raise ValueError(f"{settings.output} has no state of update {update}, expected one of {known}.")
    require_same_model(settings)
    file = file or settings.checkpoint_of(update)
    accelerator = make_accelerator(settings.accumulation)
    run = Run(settings, accelerator, examples=())  # no update runs, so none are needed
    try:
        if reason := load_state(accelerator, states[update]):
            raise ValueError(f"{states[update]} cannot be read ({reason}). Export another state.")
        run.save(file, raw)
    finally:
        run.close()
    return file
