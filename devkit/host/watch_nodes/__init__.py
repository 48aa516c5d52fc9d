"""A test-only pack without nodes: says what the server's process holds, and what it logged as a warning or worse.

GET /watch -> {"own": bytes of memory that are no file's, "mapped": bytes of files' pages, "tensors": live torch tensors,
"tensor_bytes": their memory, "objects": what the garbage collector tracks, "threads", "files": open files and sockets,
"logged": [[level, logger, file, text]]}, all measured after a garbage collection and after the C library gave its free pages
back.
"""

from __future__ import annotations

import ctypes
import gc
import logging

import psutil
import torch
from aiohttp import web
from server import PromptServer

NODE_CLASS_MAPPINGS: dict[str, type] = {}

logged: list[list[str]] = []


class Keeper(logging.Handler):
    """Keeps what is logged from WARNING on, Python's own warnings included."""

    def emit(self, record: logging.LogRecord) -> None:
        logged.append([record.levelname, record.name, record.pathname, record.getMessage()])


logging.getLogger().addHandler(Keeper(logging.WARNING))
logging.captureWarnings(True)


def trim() -> None:
    """Give free heap pages back to the system, where the C library can."""
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if give_back:
        give_back(0)


@PromptServer.instance.routes.get("/watch")
async def watch(_: web.Request) -> web.Response:
    gc.collect()
    trim()
    process = psutil.Process()
    memory = process.memory_info()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return web.json_response(
        {
            "own": memory.rss - memory.shared,
            "mapped": memory.shared,
            "tensors": len(tensors),
            "tensor_bytes": sum(storages.values()),
            "objects": len(gc.get_objects()),
            "threads": process.num_threads(),
            "files": process.num_fds(),
            "logged": logged,
        }
    )
