"""A test-only pack without nodes: makes a function of this pack fail, or be interrupted in, at one of its calls.

POST /fault {"where": "nodes.unet_patch.site_patch:reference_attention", "call": 1, "what": "interrupt" or "memory"} arms one fault, in
place of one that was armed and did not happen; {} arms none. interrupt: the flag that POST /interrupt sets is set as that
call begins. memory: the call raises torch.OutOfMemoryError. GET /fault -> {"happened": bool, "calls": how many there were}.
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
    """One armed fault; `undo` puts the function back."""

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
    if wanted := await request.json():
        armed.append(Fault(**wanted))
    return web.json_response({})


@PromptServer.instance.routes.get("/fault")
async def look(_: web.Request) -> web.Response:
    return web.json_response({"happened": armed[0].happened, "calls": armed[0].calls})


def _module(name: str) -> ModuleType:
    """A module of the pack under test, as the host has loaded it."""
    (found,) = [
        m for full, m in sys.modules.items() if full.endswith(f"EasyRef.{name}") and isinstance(m, ModuleType)
    ]
    return found
