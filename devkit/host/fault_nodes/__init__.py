"""A test-only pack without nodes that makes a call of a function of this pack fail or be interrupted.

POST /fault {"where": "nodes.unet_patch.site_patch:reference_attention", "call": 1, "what": "interrupt" or
"memory"} arms one fault and disarms an earlier one; {} only disarms. interrupt: the call sets the flag that
POST /interrupt sets. memory: the call raises torch.OutOfMemoryError. GET /fault -> {"happened": bool,
"calls": int}.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import comfy.model_management
import torch
from aiohttp import web
from server import PromptServer

NODE_CLASS_MAPPINGS: dict[str, type] = {}


class Fault:
    """One armed fault; `undo` restores the function."""

    def __init__(self, where: str, call: int, what: str) -> None:
        module, _, path = where.partition(":")
        *owners, self.name = path.split(".")
        self.owner = functools.reduce(getattr, owners, _module(module))
        self.original: Callable[..., Any] = getattr(self.owner, self.name)
        self.call, self.what = call, what
        self.calls, self.happened = 0, False

        @functools.wraps(self.original)
        def failing(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self.call:
                self._happen()
            return self.original(*args, **kwargs)

        setattr(self.owner, self.name, failing)

    def _happen(self) -> None:
        self.happened = True
        if self.what == "memory":
            raise torch.OutOfMemoryError("Allocation on device: tried to allocate 20.00 GiB")
        comfy.model_management.interrupt_current_processing()

    def undo(self) -> None:
        setattr(self.owner, self.name, self.original)


armed: list[Fault] = []


@PromptServer.instance.routes.post("/fault")
async def arm(request: web.Request) -> web.Response:
    while armed:
        armed.pop().undo()
    if fault := await request.json():
        armed.append(Fault(**fault))
    return web.json_response({})


@PromptServer.instance.routes.get("/fault")
async def look(_: web.Request) -> web.Response:
    return web.json_response({"happened": armed[0].happened, "calls": armed[0].calls})


def _module(name: str) -> ModuleType:
    """Return a module of the pack under test, as the host has loaded it."""
    (module,) = [
        m for full, m in sys.modules.items() if full.endswith(f"EasyRef.{name}") and isinstance(m, ModuleType)
    ]
    return module
