"""Kinds of ComfyUI's memory management that host_modes.py measures, as data."""

from __future__ import annotations

import dataclasses

LIMIT_GIB = 8  # of the artificial limit


@dataclasses.dataclass(frozen=True)
class Mode:
    """A server's memory management. limit: of the device's memory, in GiB."""

    flags: tuple[str, ...] = ()
    precision: str = "auto"
    limit: int | None = None
    exact: bool = True  # the latents must be those of the first mode


MODES = {
    "dynamic VRAM": Mode(),
    "fp8 storage": Mode(precision="fp8_e4m3fn", exact=False),
    # ComfyUI ignores it while dynamic VRAM is on
    "--lowvram": Mode(("--disable-dynamic-vram", "--lowvram")),
    "--novram": Mode(("--novram",)),
    f"limit of {LIMIT_GIB} GiB": Mode(("--disable-dynamic-vram",), limit=LIMIT_GIB),
}
