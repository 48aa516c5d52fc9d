"""At every UNet call: which injections act, and on what."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .guidance import SIGMA, crops_of_runs, frames_of, read_sigma, unconditional_runs
from .injection import STEP, Injection, Step, View

if TYPE_CHECKING:
    from torch import Tensor


class Handout:
    """Wrapper of the UNet call: gives the sites the injections that act at this sigma, one row per run of the batch."""

    def __init__(self, injections: tuple[Injection, ...]) -> None:
        self.injections = injections

    def __call__(
        self,
        executor: Callable[..., Tensor],
        x: Tensor,
        timesteps: Tensor | None = None,
        context: Tensor | None = None,
        y: Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        options = dict(transformer_options or {})
        view = view_of(options, x)
        sigma = options[SIGMA] if SIGMA in options else read_sigma(options.get("sigmas"))
        acting = {injection.id: injection.at(sigma, x.device, x.dtype, view) for injection in self.injections}
        replaced = options.get("patches_replace", {}).get("attn2", {})
        whole_blocks = {address: patch for address, patch in replaced.items() if len(address) == 2}
        acting = {id_: acts for id_, acts in acting.items() if acts}
        options[STEP] = Step(sigma, acting, whole_blocks, view.unconditional)
        return executor(x, timesteps, context, y, control, options, **kwargs)


def view_of(options: dict[str, Any], x: Tensor) -> View:
    unconditional = unconditional_runs(options)
    runs = len(unconditional)
    return View(
        unconditional, frames_of(options, len(x) // runs), crops_of_runs(options, *x.shape[-2:], runs)
    )
