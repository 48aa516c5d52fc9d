"""Interrupt a real ComfyUI at every call of every stage, and generate the image again each time.

    python tools/faults.py [--largest 1000]

The stages are those of devkit/host/faults.py: preprocessing, each block of the vision tower and of the
decoder, the aggregation, the keys and values, and each cross-attention of each step; both sides of the
guidance. Prints how many calls each has; the first that leaves anything behind ends it with an error.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from devkit.host import graphs
from devkit.host.faults import STAGES, check_interruption
from devkit.host.server import ComfyServer
from devkit.hosts import find_hosts, host_version


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--largest", type=int, default=1000, help="calls of one stage to interrupt at most")
    largest, began = parser.parse_args().largest, time.monotonic()
    host = find_hosts()[0]
    with ComfyServer(host, env={"OMP_NUM_THREADS": "1"}) as server:
        graphs.install_golden(server)
        graph = graphs.easyref()
        expected = graphs.uncached_image(server, graph)
        print(
            f"ComfyUI {host_version(host)}\n\n| function | node | calls interrupted |\n| --- | --- | ---: |"
        )
        for stage in STAGES:
            call = 1
            while call <= largest and check_interruption(server, graph, expected, stage, call):
                call += 1
            print(f"| {stage.where} | {stage.node} | {call - 1} |", flush=True)
    print(f"\n{time.monotonic() - began:.0f} s; after each, the same bytes as undisturbed")


if __name__ == "__main__":
    main()
