"""Wrappers around one step of a sampling, which select the injections of a UNet call and their rows.

CALC_COND_BATCH (`publish_step`) numbers the rows of the conditionings and reads the sigma once. APPLY_MODEL
(`StepWrapper`) computes, outside of anything that is compiled, what each attention adds, and passes it on in
transformer_options. DIFFUSION_MODEL does the same where a pack calls the UNet without the others.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from comfy.patcher_extension import WrappersMP

from ..host.attach import CopyByReference
from ..host.log import warn_once
from .batch_layout import ROW_NUMBERS, BatchLayout, RowNumbers, crop_to_tiles, layout_of
from .compiled import SIGNATURE, Signature, guard_signature, is_compiled, run_compiled
from .cond_roles import ROLES, recorded_roles, unconditional_runs
from .injection import Injection
from .site_patch import is_foreign
from .step import SIGMA, STEP, Step, UNetCall, read_sigma
from .sub_batch import frames_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...easyref_core.unet.layout import Site

KEY = "easyref"  # of the attachment, the wrappers and the callbacks of a conditioned MODEL
ROWWISE_UNET = "ReUNetModel"  # class of RES4LYF's UNet, which runs its attentions on one row after the other
STEP_ROWS = "easyref_step_rows"  # in transformer_options: the RowNumbers of this step


def publish_step(
    executor: Any, model: Any, conds: list, x_in: Tensor, timestep: Tensor, model_options: dict[str, Any]
) -> Any:
    """CALC_COND_BATCH wrapper: publish the step's sigma and roles, and number the conditionings' rows."""
    options = dict(model_options.get("transformer_options", {}))
    options |= {SIGMA: read_sigma(timestep), ROLES: recorded_roles(conds)}
    sides = unconditional_runs({**options, "cond_or_uncond": list(range(len(conds)))})
    row_numbers = RowNumbers(x_in, frames_of(options, len(x_in)))
    conds = [
        side and [row_numbers.add(cond, unconditional) for cond in side]
        for side, unconditional in zip(conds, sides, strict=True)
    ]
    options[STEP_ROWS] = row_numbers
    options["wrappers"] = _with_ours_innermost(options.get("wrappers", {}))
    return executor(model, conds, x_in, timestep, {**model_options, "transformer_options": options})


def _with_ours_innermost(wrappers: dict[str, dict]) -> dict[str, dict]:
    """The wrappers with StepWrapper last of APPLY_MODEL, where the batch and the modules are final."""
    around = dict(wrappers.get(WrappersMP.APPLY_MODEL, {}))
    if KEY in around:
        around[KEY] = around.pop(KEY)
    return {**wrappers, WrappersMP.APPLY_MODEL: around}


@dataclasses.dataclass(frozen=True, eq=False)
class StepWrapper(CopyByReference):
    """APPLY_MODEL and DIFFUSION_MODEL wrappers of a model with injections.

    model_sampling: of the model at Apply EasyRef, for UNet calls that come without a model. sites: Apply node
    and site of every SitePatch of the model.
    """

    injections: tuple[Injection, ...]
    model_sampling: nn.Module
    sites: frozenset[tuple[int, Site]] = frozenset()

    def apply_model(
        self,
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **conds: Any,
    ) -> Tensor:
        """Pass the step's injections to the attentions; removes the row numbers from the conditionings."""
        numbers = conds.pop(ROW_NUMBERS, None)
        options = dict(transformer_options or {})
        row_numbers = options.pop(STEP_ROWS, None)
        layout = layout_of(x, options, row_numbers, numbers)
        if row_numbers is not None and any(injection.mask is not None for injection in self.injections):
            layout = crop_to_tiles(layout, x, row_numbers.latents)
        model = executor.class_obj
        unet, compiled = model.diffusion_model, is_compiled(model, options)
        call = UNetCall(model.model_sampling, x.device, model.get_dtype_inference())
        step = options[STEP] = self._step(options, layout, call, unet)
        if compiled:
            step = options[STEP] = self._for_compile(step, call, tuple(x.shape[-2:]))
        inputs = (x, t, c_concat, c_crossattn, control)  # by position, as the host passes them to wrappers
        run = functools.partial(executor, *inputs, options, **conds)
        if compiled:
            return run_compiled(unet, run, self._signature(step, options), self._obstacle(step, options))
        out = run()
        self._warn_of_lost_sites(step, options)
        return out

    def diffusion_model(
        self,
        executor: Any,
        x: Tensor,
        timesteps: Tensor | None = None,
        context: Tensor | None = None,
        y: Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **conds: Any,
    ) -> Tensor:
        """Pass the injections to the attentions where no APPLY_MODEL wrapper ran."""
        options = dict(transformer_options or {})
        guard_signature(conds.pop(SIGNATURE, None))
        if STEP not in options:
            call = UNetCall(self.model_sampling, x.device, x.dtype)
            options[STEP] = self._step(options, layout_of(x, options, None, None), call, executor.class_obj)
        inputs = (x, timesteps, context, y, control)
        return executor(*inputs, options, **conds)

    def _step(self, options: dict[str, Any], layout: BatchLayout, call: UNetCall, unet: nn.Module) -> Step:
        sigma = options[SIGMA] if SIGMA in options else read_sigma(options.get("sigmas"))
        active = {slot: each.active_at(sigma, layout, call) for slot, each in enumerate(self.injections)}
        replaced = options.get("patches_replace", {}).get("attn2", {})
        return Step(
            sigma,
            {slot: injection for slot, injection in active.items() if injection},
            layout,
            unet,
            rowwise=type(unet).__name__ == ROWWISE_UNET,
            block_patches={address: patch for address, patch in replaced.items() if len(address) == 2},
        )

    def _for_compile(self, step: Step, call: UNetCall, size: tuple[int, int]) -> Step:
        """The step with every injection active and all masks computed."""
        active = {
            slot: injection.for_compile(step.active.get(slot), step.layout, call, size)
            for slot, injection in enumerate(self.injections)
        }
        return dataclasses.replace(step, active=active)

    def _signature(self, step: Step, options: dict[str, Any]) -> Signature:
        sites = [[bool(factor) for factor in injection.strength.factors] for injection in self.injections]
        shapes = [
            (tuple(active.key_values[0][0].shape), active.mask and active.mask.shapes)
            for active in step.active.values()
        ]
        wrappers = sorted(map(str, options.get("wrappers", {}).get(WrappersMP.DIFFUSION_MODEL, {})))
        return Signature(repr((sites, shapes, len(step.layout))), repr(wrappers))

    def _obstacle(self, step: Step, options: dict[str, Any]) -> str | None:
        """The reason why the attentions cannot be compiled in this step; None if they can."""
        if any(active.recorder for active in step.active.values()):
            return "Record Where It Acts reads every attention"
        patches = options.get("patches_replace", {}).get("attn2", {}).values()
        if step.rowwise:
            return "RES4LYF runs its rows one after the other"
        foreign = step.block_patches or any(is_foreign(patch) for patch in patches)
        if foreign or options.get("patches", {}).get("attn2_patch"):
            return "another pack patches the cross-attentions too"
        return None

    def _warn_of_lost_sites(self, step: Step, options: dict[str, Any]) -> None:
        """Warn where another pack has replaced a SitePatch by a patch that did not call it."""
        missing = self.sites - step.reached
        if not step.active or not missing:
            return
        replaced = options.get("patches_replace", {}).get("attn2", {})
        lost = {site for _, site in missing if is_foreign(replaced.get(tuple(site)))}
        if lost:
            kind = type(replaced[tuple(next(iter(lost)))])
            warn_once(
                f"References have no effect in {len(lost)} of {len({site for _, site in self.sites})} "
                "cross-attentions: another pack replaced them after Apply EasyRef "
                f"({kind.__module__}.{kind.__qualname__}). Put that pack's node before Apply EasyRef."
            )
