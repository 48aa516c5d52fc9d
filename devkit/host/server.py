"""A real ComfyUI server in a process of its own, with EasyRef and the tiny test nodes installed."""

from __future__ import annotations

import asyncio
import copy
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import numpy as np
import psutil
from PIL import Image

from devkit.hosts import ROOT, find_hosts, overlay

HERE = Path(__file__).resolve().parent
PACKS = {"ComfyUI-EasyRef": ROOT, **{name: HERE / name for name in ("tiny_nodes", "fault_nodes")}}
LAUNCH = HERE / "launch.py"
LAST_EVENTS = ("execution_success", "execution_error", "execution_interrupted")


class Event(NamedTuple):
    """One message of the server's websocket, such as ("executing", {"node": "3", …})."""

    type: str
    data: dict[str, Any]


class PromptFailed(RuntimeError):
    """A prompt that was refused, failed, or was interrupted.

    kind: "invalid", "execution_error" or "execution_interrupted". details: the server's message.
    """

    def __init__(self, kind: str, details: dict[str, Any]) -> None:
        super().__init__(f"{kind}: {json.dumps(details, indent=1, default=str)}")
        self.kind = kind
        self.details = details


class ComfyServer:
    """Context manager of a ComfyUI server on a free port, with a temporary base folder.

    base: the folder with models/, input/, output/ and custom_nodes/, removed at the end. prepare: called with
    it before the server starts.
    """

    def __init__(
        self,
        host: Path | None = None,
        *,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        packs: Mapping[str, Path] = PACKS,
        prepare: Callable[[Path], object] = lambda base: None,
        start_timeout: float = 180,
        cpu: bool = True,
    ) -> None:
        self.host = host or find_hosts()[0]
        self.args = args
        self.env = env or {}
        self.packs = packs
        self.prepare = prepare
        self.start_timeout = start_timeout
        self.cpu = cpu
        self.client_id = ""
        self.events: list[Event] = []
        # A proxy set in the environment is not for this machine's own ports.
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    # Start and stop

    def __enter__(self) -> ComfyServer:
        self._folder = tempfile.TemporaryDirectory(prefix="comfy-", ignore_cleanup_errors=True)
        self.base = Path(self._folder.name)
        for name in ("models", "input", "output", "custom_nodes"):
            (self.base / name).mkdir()
        for name, folder in self.packs.items():
            (self.base / "custom_nodes" / name).symlink_to(folder, target_is_directory=True)
        self.prepare(self.base)
        self._start()
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        flags = ["--cpu"] if self.cpu else []
        flags += ["--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(self.base)]
        flags += ["--disable-all-custom-nodes", "--whitelist-custom-nodes", *self.packs]
        flags += ["--disable-api-nodes", "--database-url", "sqlite:///:memory:"]
        if frontend := os.environ.get("COMFYUI_FRONTEND"):  # another version than the host's
            flags += ["--front-end-root", frontend]
        path = os.pathsep.join(filter(None, [str(overlay(self.host)), os.environ.get("PYTHONPATH")]))
        # PASSIVE, because threads that spin while they wait slow a busy machine tenfold.
        settings = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        with (self.base / "server.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(LAUNCH), str(self.host), *flags, *self.args],
                cwd=self.host,
                env={**os.environ, **settings, **self.env},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _wait_until_ready(self) -> None:
        """Wait for the first answer and the websocket. Raises RuntimeError if a pack cannot be imported."""
        deadline = time.monotonic() + self.start_timeout
        while not self._answers():
            self._check_alive()
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{self.host} did not answer within {self.start_timeout} s; {self._log_tail()}"
                )
            time.sleep(0.1)
        if "(IMPORT FAILED)" in self.log:
            raise RuntimeError(f"{self.host} could not import a node pack; {self._log_tail()}")
        self._connect()

    def _answers(self) -> bool:
        try:
            self.system_stats()
        except (urllib.error.URLError, ConnectionError):
            return False
        return True

    def _check_alive(self) -> None:
        if (code := self._process.poll()) is not None:
            raise RuntimeError(f"{self.host} ended with exit code {code}; {self._log_tail()}")

    # Events

    def another_client(self) -> ComfyServer:
        """Return a second client of this server, with its own websocket and events, until the server ends."""
        client = copy.copy(self)
        client._connect()
        return client

    def _connect(self) -> None:
        self.client_id, self.events, self._news = str(uuid.uuid4()), [], threading.Condition()
        threading.Thread(target=lambda: asyncio.run(self._listen()), daemon=True).start()
        self.wait_event(lambda event: event.type == "status", timeout=30)

    async def _listen(self) -> None:
        """Collect the server's text messages until it ends; binary ones are preview images."""
        url = f"{self.url}/ws?clientId={self.client_id}"
        async with aiohttp.ClientSession() as session, session.ws_connect(url, max_msg_size=0) as messages:
            async for message in messages:
                if message.type == aiohttp.WSMsgType.TEXT:
                    event = json.loads(message.data)
                    with self._news:
                        self.events.append(Event(event["type"], event["data"]))
                        self._news.notify_all()
                elif message.type == aiohttp.WSMsgType.BINARY:
                    with self._news:
                        self.events.append(Event("binary", {"bytes": message.data}))

    def wait_event(self, condition: Callable[[Event], bool], timeout: float = 120) -> Event:
        """Return the first past or future event that fulfils the condition."""
        deadline = time.monotonic() + timeout
        checked = 0
        with self._news:
            while True:
                for event in self.events[checked:]:
                    if condition(event):
                        return event
                checked = len(self.events)
                self._check_alive()
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no such event within {timeout} s; {self._log_tail()}")
                self._news.wait(timeout=0.5)

    def wait_executing(self, prompt_id: str, node: str, timeout: float = 120) -> Event:
        """Wait until this node of the prompt is being executed."""
        data = {"prompt_id": prompt_id, "node": node}
        return self.wait_event(lambda e: e.type == "executing" and data.items() <= e.data.items(), timeout)

    def events_of(self, prompt_id: str) -> list[Event]:
        """Return the events of one prompt, in order."""
        return [event for event in self.events if event.data.get("prompt_id") == prompt_id]

    def executed(self, prompt_id: str) -> list[str]:
        """Return the executed nodes, in order, without cached ones."""
        return [e.data["node"] for e in self.events_of(prompt_id) if e.type == "executing" and e.data["node"]]

    def cached(self, prompt_id: str) -> set[str]:
        """Return the nodes whose outputs came from the cache."""
        events = [event for event in self.events_of(prompt_id) if event.type == "execution_cached"]
        return {node for event in events for node in event.data["nodes"]}

    # Prompts

    def queue(self, prompt: Mapping[str, Any]) -> str:
        """Queue a workflow in API form, {node id: {class_type, inputs}}, and return its prompt id.

        Raises PromptFailed if one of its output nodes is refused, even if the host runs the others.
        """
        try:
            answer = self.post("/prompt", {"prompt": prompt, "client_id": self.client_id})
        except urllib.error.HTTPError as error:
            raise PromptFailed("invalid", json.loads(error.read())) from error
        queued = json.loads(answer)
        if queued["node_errors"]:
            raise PromptFailed("invalid", queued)
        return queued["prompt_id"]

    def wait(self, prompt_id: str, timeout: float = 120) -> dict[str, Any]:
        """Wait for a prompt to end, and return its history entry. Raises PromptFailed unless it succeeded."""
        last = self.wait_event(
            lambda event: event.type in LAST_EVENTS and event.data["prompt_id"] == prompt_id, timeout
        )
        if last.type != "execution_success":
            raise PromptFailed(last.type, last.data)
        # the host writes the history after it has sent the event
        while not (history := json.loads(self.get(f"/history/{prompt_id}"))):
            self._check_alive()
            time.sleep(0.02)
        return history[prompt_id]

    def run(self, prompt: Mapping[str, Any], timeout: float = 120) -> dict[str, Any]:
        """Queue a workflow, and return its history entry."""
        return self.wait(self.queue(prompt), timeout)

    def images(self, history: Mapping[str, Any], kind: str | None = None) -> list[bytes]:
        """Return the PNG files that a prompt's nodes showed or saved, in order of node id.

        kind: "temp" or "output" to return only those.
        """
        outputs = sorted(history["outputs"].items())
        files = [file for _, output in outputs for file in output.get("images", [])]
        chosen = [file for file in files if kind in (None, file["type"])]
        return [self.get(f"/view?{urllib.parse.urlencode(file)}") for file in chosen]

    # The rest of the server

    def object_info(self) -> dict[str, Any]:
        """Return the schemas of all nodes."""
        return json.loads(self.get("/object_info"))

    def system_stats(self) -> dict[str, Any]:
        """Return versions, memory and devices."""
        return json.loads(self.get("/system_stats"))

    def interrupt(self, prompt_id: str | None = None) -> None:
        """Interrupt this prompt if it is running, or by default any prompt."""
        self.post("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})

    def delete(self, prompt_id: str) -> None:
        """Remove a waiting prompt from the queue."""
        self.post("/queue", {"delete": [prompt_id]})

    def free(self, cache: bool = True) -> None:
        """Request that the host unloads all models and drops its cache; it does so when it is next idle."""
        self.post("/free", {"unload_models": True, **({"free_memory": True} if cache else {})})

    def get(self, path: str) -> bytes:
        """Return the body of a GET request."""
        with self._open(self.url + path, timeout=60) as answer:
            return answer.read()

    def post(self, path: str, body: Mapping[str, Any]) -> bytes:
        """Return the answer to a JSON body."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with self._open(request, timeout=60) as answer:
            return answer.read()

    @property
    def resident_bytes(self) -> int:
        """Resident memory of the server's process, in bytes."""
        return psutil.Process(self._process.pid).memory_info().rss

    @property
    def log(self) -> str:
        """The server's output so far."""
        return (self.base / "server.log").read_text(errors="replace")

    def _log_tail(self) -> str:
        return "the end of its log:\n" + "\n".join(self.log.splitlines()[-60:])


def pixels(png: bytes) -> np.ndarray:
    """Return the RGB pixels of a PNG file, (height, width, 3) in 0..255."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
