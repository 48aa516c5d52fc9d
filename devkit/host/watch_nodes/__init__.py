"""A test-only pack without nodes that reports the memory of the server's process and its logged warnings.

GET /watch -> {"own": bytes of anonymous memory, "mapped": bytes of mapped files, "tensors": number of live
torch tensors, "tensor_bytes": their memory, "objects": number of objects of the garbage collector, "threads",
"files": open files and sockets, "logged": [[level, logger, file, text]]}. It is measured after a garbage
collection, and after the C library has returned its free pages.

POST /memory {"available": bytes} -> the host sees this much available memory, and so evicts models; null: the
real amount.
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


class Collector(logging.Handler):
    """Collects log records from WARNING on, including Python's own warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        logged.append([record.levelname, record.name, record.pathname, record.getMessage()])


logging.getLogger().addHandler(Collector(logging.WARNING))
logging.captureWarnings(True)


available: int | None = None  # bytes that the host is told, if not the real ones
virtual_memory = psutil.virtual_memory


def reported_memory() -> tuple:
    memory = virtual_memory()
    return memory if available is None else memory._replace(available=available)


psutil.virtual_memory = reported_memory


@PromptServer.instance.routes.post("/memory")
async def set_available(request: web.Request) -> web.Response:
    global available
    available = (await request.json())["available"]
    return web.Response()


def trim() -> None:
    """Return free heap pages to the system, if the C library can."""
    if malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        malloc_trim(0)


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
