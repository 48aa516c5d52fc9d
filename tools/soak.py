"""Soak test: hundreds of random workflows of several clients on one real ComfyUI, disturbed at random.

    python tools/soak.py [--prompts 300] [--seed 0]

Starts a ComfyUI with this pack and the tiny models of the tests, on the CPU, and queues workflows drawn from
the seed (tools/soak_prompts.py), with checkpoints of two sizes, in bursts, from three clients. Some are
interrupted while they run, some deleted from the queue; /free is requested in both its forms while they run;
and in some bursts the host sees so little memory that it evicts its models. Every 20 prompts the server is
emptied and measured (devkit/host/watch_nodes); memory and handles must not grow. Prints tables and one line
for each failure; the exit code is 1 if there was one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from devkit.host import golden, graphs
from devkit.host.server import LAST_EVENTS, PACKS, ComfyServer, pixels
from devkit.hosts import ROOT, find_hosts, host_version
from tools.growth import growth
from tools.soak_prompts import SECOND, Drawn, Saved, draw, probes, shorter

WATCH = ROOT / "devkit" / "host" / "watch_nodes"
# Idle threads must not spin, and freed memory must not be held back for the thread that had it.
SETTINGS = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
MEASURE_EVERY = 20  # prompts; the first measurement, after as many, is the start
MB = 2**20
# Most growth from the first measurement to the last, by either estimate of tools/growth.py. For unexplained
# memory 22 KB a prompt, because runs of a pack without a known leak gave 3 to 5 MB, most of it early.
LIMITS = {
    "unexplained": 6 * MB,
    "mapped": 4 * MB,
    "tensor_bytes": MB / 4,
    "tensors": 4,
    "threads": 1,
    "files": 1,
}
# Bytes that the libraries leak, measured in workflows that repeat one thing (docs/reliability.md): the host
# for each prompt; for each model loaded safetensors 0.8, which loses 64 bytes with every tensor it reads.
LIBRARY_LEAKS = {"prompts": 7 * 1024, "TinySDXL": 33 * 1024, "EasyRefLoader": 65 * 1024}
CLIENTS = 3  # each with a websocket of its own
LITTLE_MEMORY = 16 * MB  # available, as the host sees it
LARGER_LAYERS, LARGER_WIDTH = 6, 256  # of the MLLM body of the larger checkpoint
MAX_WARM_LEVELS = 1  # of 255: difference of an image that was made from cached work
CANCELLED_AT = ("load", "group", "encode", "aggregate", "apply", "sample", "decode", "save")


class Soak:
    """One run: the server, its clients, the queued prompts, and their results."""

    def __init__(self, server: ComfyServer, random: Random) -> None:
        self.server, self.random = server, random
        self.clients = [server, *(server.another_client() for _ in range(CLIENTS - 1))]
        self.saved: list[Saved] = []
        self.disturbed: set[str] = set()  # prompts that were interrupted or deleted
        self.counts: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.interrupted_at: Counter[str] = Counter()
        self.measurements: list[tuple[int, dict[str, float]]] = []
        self.failures: list[str] = []

    def run(self, prompts: int) -> None:
        """Queue this number of prompts, in bursts; measure after every MEASURE_EVERY."""
        done = 0
        while done < prompts:
            size = min(self.random.randint(1, 4), prompts - done, MEASURE_EVERY - done % MEASURE_EVERY)
            self._burst(size)
            done += size
            if done % MEASURE_EVERY == 0:
                watch, self.counts["prompts"] = self.measure(), done
                leaks = sum(self.counts[name] * size for name, size in LIBRARY_LEAKS.items())
                self.measurements.append((done, {**watch, "unexplained": watch["own"] - leaks}))

    def cold(self, probe: Drawn) -> np.ndarray:
        """The probe's image from a server with empty caches."""
        return np.frombuffer(graphs.uncached_image(self.server, probe.graph), np.uint8)

    def warm(self, probe: Drawn) -> np.ndarray:
        """The probe's image right after that of a shorter group, whose prefix the server may have cached."""
        graphs.image(self.server, shorter(probe))
        return np.frombuffer(graphs.image(self.server, probe.graph), np.uint8)

    def measure(self) -> dict[str, float]:
        """Memory and handles of the server after /free. Its list of finished prompts is cleared."""
        self.server.post("/history", {"clear": True})
        watch: dict[str, float] = {}
        for _ in range(10):  # the host overlooks a request that comes as a run ends
            self.server.free()
            time.sleep(0.2)
            before, watch = watch, json.loads(self.server.get("/watch"))
            if before and before["tensors"] == watch["tensors"]:
                break
        return watch

    def _burst(self, size: int) -> None:
        burst = [draw(self.random, self.saved) for _ in range(size)]
        if little := self.random.random() < 0.2:
            self._set_available(LITTLE_MEMORY)
            self.counts["bursts with little memory"] += 1
        queued: dict[str, tuple[ComfyServer, Drawn]] = {}
        for drawn in burst:
            client = self.random.choice(self.clients)
            queued[client.queue(drawn.graph)] = client, drawn
        self.kinds.update(kind for drawn in burst for kind in drawn.kinds)
        self._disturb({prompt_id: client for prompt_id, (client, _) in queued.items()})
        for prompt_id, (client, drawn) in queued.items():
            self._finish(client, prompt_id, drawn)
        if little:
            self._set_available(None)
        if self.random.random() < 0.1:
            self._free()

    def _set_available(self, memory: int | None) -> None:
        self.server.post("/memory", {"available": memory})

    def _disturb(self, queued: dict[str, ComfyServer]) -> None:
        """Interrupt one of these, delete one, or request /free, while they run. queued: with clients."""
        chance, victim = self.random.random(), self.random.choice(list(queued))
        if chance < 0.15 and len(queued) > 1:
            victim = self.random.choice(list(queued)[1:])
            self.disturbed.add(victim)
            self.server.delete(victim)
        elif chance < 0.55:
            self.disturbed.add(victim)
            self._wait_for_moment(queued[victim], victim)
            # without an id the running prompt is interrupted, which must then be this one
            self.server.interrupt(None if len(queued) == 1 and self.random.random() < 0.5 else victim)
        elif chance < 0.75:
            self._wait_for_moment(queued[victim], victim)
            self._free()

    def _wait_for_moment(self, client: ComfyServer, prompt_id: str) -> None:
        """Wait until the prompt reaches a drawn node or ends without it, and then a moment more."""
        node, moment = self.random.choice(CANCELLED_AT), self.random.choice((0, 0.01, 0.05, 0.2))
        client.wait_event(
            lambda event: (
                event.data.get("prompt_id") == prompt_id
                and (event.type in LAST_EVENTS or event.data.get("node") == node)
            )
        )
        time.sleep(moment * self.random.random())

    def _free(self) -> None:
        cache = self.random.random() < 0.5
        self.server.free(cache)
        self.counts["freed, cache too" if cache else "freed, models"] += 1

    def _finish(self, client: ComfyServer, prompt_id: str, drawn: Drawn) -> None:
        """Wait for the end of a client's prompt, and check that it ended as it should."""
        while not (events := [e for e in client.events_of(prompt_id) if e.type in LAST_EVENTS]):
            started = any(event.type == "execution_start" for event in client.events_of(prompt_id))
            if prompt_id in self.disturbed and not started and not self._is_queued(prompt_id):
                self.counts["deleted from the queue"] += 1
                return
            time.sleep(0.02)
        last, executed = events[-1], client.executed(prompt_id)
        self.counts.update(drawn.graph[node]["class_type"] for node in executed if node in ("tiny", "load"))
        if last.type == "execution_error":
            self.fail(f"{drawn.kinds}: node {last.data['node_id']}: {last.data['exception_message']}")
        elif last.type == "execution_interrupted":
            self.counts["interrupted"] += 1
            self.interrupted_at[last.data["node_type"]] += 1
            if prompt_id not in self.disturbed:
                self.fail(f"{drawn.kinds} was interrupted without a request")
        else:
            self.counts["finished"] += 1
            self._check_output(client, prompt_id, drawn)

    def _is_queued(self, prompt_id: str) -> bool:
        queue = json.loads(self.server.get("/queue"))
        return any(entry[1] == prompt_id for part in queue.values() for entry in part)

    def _check_output(self, client: ComfyServer, prompt_id: str, drawn: Drawn) -> None:
        outputs = client.wait(prompt_id)["outputs"]
        images = self.server.images({"outputs": {"save": outputs.get("save", {})}})
        if len(images) != drawn.images:
            self.fail(f"{drawn.kinds} gave {len(images)} images; wanted {drawn.images}")
        for image in map(pixels, images):
            if image.shape != (128, 128, 3) or image.std() == 0:
                self.fail(f"{drawn.kinds} gave an image of {image.shape}, deviation {image.std()}")
        for file in outputs.get("keep", {}).get("easyref_tokens", []):
            self.saved.append(Saved(f"soak/{file['filename']}", drawn.checkpoint))

    def fail(self, message: str) -> None:
        self.failures.append(message)

    # Checks at the end

    def check_probes(self, cold: dict[str, np.ndarray], warm: dict[str, np.ndarray]) -> None:
        """Repeat the probes: cold as at the start, byte for byte; from cached work almost so."""
        rows = []
        for name, probe in probes().items():
            same = np.array_equal(self.cold(probe), cold[name])
            images = {"at the start": warm[name], "at the end": self.warm(probe)}
            levels = {
                when: int(np.abs(image.astype(int) - cold[name]).max()) for when, image in images.items()
            }
            rows.append([name, "identical" if same else "DIFFERENT", *levels.values()])
            if not same:
                self.fail(f"probe {name}: the image at the end is not the one at the start")
            for when, off in levels.items():
                if off > MAX_WARM_LEVELS:
                    self.fail(f"probe {name}: warm {when}, off by {off} of 255; allowed {MAX_WARM_LEVELS}")
        print_table(
            ["probe", "cold, start and end", "warm at the start, levels off", "warm at the end"], rows
        )

    def check_growth(self) -> None:
        """Print all measurements and compare their growth with LIMITS."""
        rows = []
        for done, watch in self.measurements:
            sizes = [f"{watch[name] / MB:.2f}" for name in ("own", "unexplained", "mapped")]
            tensors = [watch["tensors"], f"{watch['tensor_bytes'] / MB:.3f}"]
            rows.append([done, *sizes, *tensors, watch["objects"], watch["threads"], watch["files"]])
        head = "prompts, own MB, of it unexplained, mapped MB, tensors, tensors MB, objects, threads, files"
        print_table(head.split(", "), rows)
        rows = []
        for name, limit in LIMITS.items():
            grew = growth([watch[name] for _, watch in self.measurements])
            unit, digits = (MB, 2) if limit > 1000 else (1, 1)
            cells = [f"{value / unit:.{digits}f}" for value in (grew.trend, grew.quarters, limit)]
            rows.append([name, *cells])
            if grew.worst > limit:
                self.fail(f"{name} grew by {cells[0]} (trend), {cells[1]} (quarters); allowed {cells[2]}")
        print_table(["what", "trend", "last quarter - first", "limit"], rows)

    def check_log(self) -> None:
        """No traceback, nothing logged as an error, no warning of this pack."""
        if traceback := self.server.log.partition("Traceback")[2]:
            self.fail(f"the server's log holds a traceback:\n{traceback[:3000]}")
        others: Counter[str] = Counter()
        for level, logger, file, text in self.measurements[-1][1]["logged"]:
            if level in ("ERROR", "CRITICAL") or "EasyRef" in f"{logger} {file} {text}":
                self.fail(f"logged: {level} {logger}: {text}")
            else:
                others[text.strip().splitlines()[0][:150]] += 1
        print("\nwarnings of the host's own:", dict(others) or "none")

    def check_leftovers(self) -> None:
        """No half-written file in the output folder."""
        left = [str(path) for path in (self.server.base / "output").rglob("*") if "partial" in path.name]
        if left:
            self.fail(f"left behind: {', '.join(left)}")


def print_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a Markdown table."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    print("\n" + "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=int, default=300, help=f"how many; {4 * MEASURE_EVERY} or more")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    host, start = find_hosts()[0], time.monotonic()
    with ComfyServer(host, env=SETTINGS, packs={**PACKS, "watch_nodes": WATCH}) as server:
        graphs.install_golden(server)
        folder = server.base / "models" / "easyref"
        golden.write_other_tokens(folder / SECOND)
        golden.write_random(folder, LARGER_LAYERS, LARGER_WIDTH)
        soak = Soak(server, Random(options.seed))
        cold = {name: soak.cold(probe) for name, probe in probes().items()}
        warm = {name: soak.warm(probe) for name, probe in probes().items()}
        soak.run(options.prompts)
        print(f"ComfyUI {host_version(host)}, {options.prompts} prompts, seed {options.seed}")
        soak.check_probes(cold, warm)
        soak.check_growth()
        soak.check_log()
        soak.check_leftovers()
    titles = {"results": soak.counts, "interrupted in": soak.interrupted_at, "kinds": soak.kinds}
    for title, counts in titles.items():
        print(f"{title}: " + ", ".join(f"{name} {count}" for name, count in counts.most_common()))
    print(f"{time.monotonic() - start:.0f} s;", "FAILED:" if soak.failures else "no failure")
    print("\n".join(soak.failures))
    return bool(soak.failures)


if __name__ == "__main__":
    sys.exit(main())
