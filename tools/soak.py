"""Hundreds of different workflows on one real ComfyUI, cancelled and freed at random; what must not grow does not.

    python tools/soak.py [--prompts 300] [--seed 0]

Starts a ComfyUI with this pack and the tiny models of the tests, on the CPU, and queues workflows drawn from the seed
(tools/soak_prompts.py), in bursts. Some are interrupted while they run, some deleted from the queue, and /free is asked
for in both its forms. Every so many prompts the server is emptied and measured (devkit/host/watch_nodes). Prints tables;
the exit code is 1 if anything failed, each failure on a line of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from devkit.host import golden, graphs
from devkit.host.server import LAST_EVENTS, PACKS, ComfyServer, pixels
from devkit.hosts import ROOT, find_hosts, host_version
from tools.growth import growth
from tools.soak_prompts import CHECKPOINTS, Drawn, Saved, draw, probes, shorter

WATCH = ROOT / "devkit" / "host" / "watch_nodes"
# Idle threads must not spin, and memory that was freed shall not be held back for the thread that once had it.
SETTINGS = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
EVERY = 20  # prompts between two measurements; the first measurement, after as many, is the start
MB = 2**20
# What may grow at most between the first measurement and the last, by either way of telling (tools/growth.py).
LIMITS = {
    "unexplained": 6
    * MB,  # 22 KB a prompt; runs of a pack that leaks nothing known gave 3 to 5, most of it early
    "mapped": 4 * MB,
    "tensor_bytes": MB / 4,
    "tensors": 4,
    "threads": 1,
    "files": 1,
}
# Bytes that the libraries lose, measured in workflows that only repeat the one thing (docs/reliability.md): by the host for
# each prompt, and for each model loaded by safetensors 0.8, which loses 64 bytes with every tensor it reads.
LOST = {"prompts": 7 * 1024, "TinySDXL": 33 * 1024, "EasyRefLoader": 65 * 1024}
NEARLY = 1  # of 255: how far a picture may be off that was made on top of kept work
CANCELLED_AT = ("load", "group", "encode", "aggregate", "apply", "sample", "decode", "save")


class Soak:
    """One run: the server, what was queued, and what came of it."""

    def __init__(self, server: ComfyServer, random: Random) -> None:
        self.server, self.random = server, random
        self.saved: list[Saved] = []
        self.asked: set[str] = set()  # prompts of which an interruption or a deletion was asked
        self.counts: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.interrupted_at: Counter[str] = Counter()
        self.measured: list[tuple[int, dict[str, float]]] = []
        self.failures: list[str] = []

    def run(self, prompts: int) -> None:
        """Queue so many prompts, in bursts, and measure now and then."""
        done = 0
        while done < prompts:
            size = min(self.random.randint(1, 4), prompts - done, EVERY - done % EVERY)
            self._burst(size)
            done += size
            if done % EVERY == 0:
                found, self.counts["prompts"] = self.measure(), done
                lost = sum(self.counts[name] * size for name, size in LOST.items())
                self.measured.append((done, {**found, "unexplained": found["own"] - lost}))

    def cold(self, probe: Drawn) -> np.ndarray:
        """The probe's picture by a server that has let go of everything."""
        return np.frombuffer(graphs.picture_uncached(self.server, probe.graph), np.uint8)

    def warm(self, probe: Drawn) -> np.ndarray:
        """The probe's picture right after that of a shorter group, of which the server may have kept something."""
        graphs.picture(self.server, shorter(probe))
        return np.frombuffer(graphs.picture(self.server, probe.graph), np.uint8)

    def measure(self) -> dict[str, float]:
        """What the server holds after it was asked to let go of everything. Its list of finished prompts is cleared."""
        self.server.post("/history", {"clear": True})
        found: dict[str, float] = {}
        for _ in range(10):  # the host overlooks a request that comes as a run ends
            self.server.free()
            time.sleep(0.2)
            before, found = found, json.loads(self.server.get("/watch"))
            if before and before["tensors"] == found["tensors"]:
                break
        return found

    def _burst(self, size: int) -> None:
        drawn = [draw(self.random, self.saved) for _ in range(size)]
        queued = {self.server.queue(one.graph): one for one in drawn}
        for one in drawn:
            self.kinds.update(one.kinds)
        self._disturb(list(queued))
        for prompt_id, one in queued.items():
            self._finish(prompt_id, one)
        if self.random.random() < 0.1:
            self._free()

    def _disturb(self, queued: list[str]) -> None:
        """Interrupt one of these, delete one, or ask for /free, while they run."""
        chance = self.random.random()
        if chance < 0.15 and len(queued) > 1:
            victim = self.random.choice(queued[1:])
            self.asked.add(victim)
            self.server.delete(victim)
        elif chance < 0.6:
            victim = self.random.choice(queued)
            self.asked.add(victim)
            self._wait_for_moment(victim)
            # without a prompt's id it is whichever runs, which must then be this one
            self.server.interrupt(None if len(queued) == 1 and self.random.random() < 0.5 else victim)
        elif chance < 0.7:
            self._free()

    def _wait_for_moment(self, prompt_id: str) -> None:
        """Until the prompt comes to some node, or ends without it, and then a moment more."""
        node, moment = self.random.choice(CANCELLED_AT), self.random.choice((0, 0.01, 0.05, 0.2))
        self.server.wait_event(
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

    def _finish(self, prompt_id: str, drawn: Drawn) -> None:
        """Wait for the end of a prompt, and check that it is the one that was asked for."""
        while not (events := [e for e in self.server.events_of(prompt_id) if e.type in LAST_EVENTS]):
            started = any(event.type == "execution_start" for event in self.server.events_of(prompt_id))
            if prompt_id in self.asked and not started and not self._is_queued(prompt_id):
                self.counts["deleted from the queue"] += 1
                return
            time.sleep(0.02)
        last, executed = events[-1], self.server.executed(prompt_id)
        self.counts.update(drawn.graph[node]["class_type"] for node in executed if node in ("tiny", "load"))
        if last.type == "execution_error":
            self.fail(f"{drawn.kinds}: node {last.data['node_id']}: {last.data['exception_message']}")
        elif last.type == "execution_interrupted":
            self.counts["interrupted"] += 1
            self.interrupted_at[last.data["node_type"]] += 1
            if prompt_id not in self.asked:
                self.fail(f"{drawn.kinds} was interrupted; nobody had asked for it")
        else:
            self.counts["finished"] += 1
            self._check_output(prompt_id, drawn)

    def _is_queued(self, prompt_id: str) -> bool:
        queue = json.loads(self.server.get("/queue"))
        return any(entry[1] == prompt_id for part in queue.values() for entry in part)

    def _check_output(self, prompt_id: str, drawn: Drawn) -> None:
        outputs = self.server.wait(prompt_id)["outputs"]
        pictures = self.server.images({"outputs": {"save": outputs.get("save", {})}})
        if len(pictures) != drawn.pictures:
            self.fail(f"{drawn.kinds} gave {len(pictures)} pictures; wanted {drawn.pictures}")
        for picture in map(pixels, pictures):
            if picture.shape != (128, 128, 3) or picture.std() == 0:
                self.fail(f"{drawn.kinds} gave a picture of {picture.shape}, deviation {picture.std()}")
        for file in outputs.get("keep", {}).get("easyref_tokens", []):
            self.saved.append(Saved(f"soak/{file['filename']}", drawn.checkpoint))

    def fail(self, what: str) -> None:
        self.failures.append(what)

    # What is said at the end

    def check_probes(self, start: dict[str, np.ndarray], warm: dict[str, np.ndarray]) -> None:
        """The probes once more: cold as at the start, byte for byte; and on top of kept work nearly so."""
        for name, probe in probes().items():
            cold, again = self.cold(probe), self.warm(probe)
            off = {"at the start": warm[name], "at the end": again}
            off = {when: int(np.abs(found.astype(int) - start[name]).max()) for when, found in off.items()}
            same = np.array_equal(cold, start[name])
            print(
                f"| {name} | {'identical' if same else 'DIFFERENT'} | {' | '.join(map(str, off.values()))} |"
            )
            if not same:
                self.fail(f"probe {name}: the picture at the end is not the one at the start")
            for when, levels in off.items():
                if levels > NEARLY:
                    self.fail(f"probe {name}: warm {when}, it is off by {levels} of 255; allowed {NEARLY}")

    def check_growth(self) -> None:
        """Print all measurements and hold them to LIMITS."""
        print(
            "\n| prompts | own MB | of it unexplained | mapped MB | tensors | tensors MB | objects | threads | files |"
        )
        print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        for done, found in self.measured:
            cells = [f"{found[name] / MB:.2f}" for name in ("own", "unexplained", "mapped")]
            cells += [f"{found['tensors']}", f"{found['tensor_bytes'] / MB:.3f}", f"{found['objects']}"]
            print(f"| {done} | {' | '.join(cells)} | {found['threads']} | {found['files']} |")
        print("\n| what | trend | last quarter - first | limit |\n| --- | ---: | ---: | ---: |")
        for name, limit in LIMITS.items():
            grew = growth([found[name] for _, found in self.measured])
            unit, digits = (MB, 2) if limit > 1000 else (1, 1)
            cells = [f"{value / unit:.{digits}f}" for value in (grew.trend, grew.quarters, limit)]
            print(f"| {name} | {' | '.join(cells)} |")
            if grew.worst > limit:
                self.fail(f"{name} grew by {cells[0]} (trend), {cells[1]} (quarters); allowed {cells[2]}")

    def check_log(self) -> None:
        """No traceback, nothing logged as an error, no warning of this pack."""
        if "Traceback" in self.server.log:
            self.fail(
                "the server's log holds a traceback:\n" + self.server.log.partition("Traceback")[2][:3000]
            )
        others: Counter[str] = Counter()
        for level, logger, file, text in self.measured[-1][1]["logged"]:
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=int, default=300, help=f"how many; {4 * EVERY} or more")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    host, began = find_hosts()[0], time.monotonic()
    with ComfyServer(host, env=SETTINGS, packs={**PACKS, "watch_nodes": WATCH}) as server:
        graphs.install_golden(server)
        golden.write_changed(server.base / "models" / "easyref" / CHECKPOINTS[1], lambda t: _changed(t))
        soak = Soak(server, Random(options.seed))
        start = {name: soak.cold(probe) for name, probe in probes().items()}
        warm = {name: soak.warm(probe) for name, probe in probes().items()}
        soak.run(options.prompts)
        print(f"ComfyUI {host_version(host)}, {options.prompts} prompts, seed {options.seed}\n")
        print("| probe | cold, start and end | warm at the start, levels off | warm at the end |")
        print("| --- | --- | ---: | ---: |")
        soak.check_probes(start, warm)
        soak.check_growth()
        soak.check_log()
        soak.check_leftovers()
    for title, counts in (
        ("what came of them", soak.counts),
        ("interrupted in", soak.interrupted_at),
        ("what they were made of", soak.kinds),
    ):
        print(f"{title}: " + ", ".join(f"{name} {count}" for name, count in counts.most_common()))
    print(f"{time.monotonic() - began:.0f} s;", "FAILED:" if soak.failures else "all as it should be")
    print("\n".join(soak.failures))
    return bool(soak.failures)


def _changed(tensors: dict) -> None:
    """Another checkpoint: other learned tokens, other keys."""
    tensors["mllm_final_layer.reference_tokens"].mul_(2)


if __name__ == "__main__":
    sys.exit(main())
