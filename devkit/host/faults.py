"""Faults at chosen moments of a running server (see fault_nodes), and checks of the server afterwards."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, NamedTuple

from devkit.host import graphs
from devkit.host.graphs import Graph
from devkit.host.server import PromptFailed

if TYPE_CHECKING:
    from devkit.host.server import ComfyServer

INTERRUPT, MEMORY = "interrupt", "memory"


class Stage(NamedTuple):
    """A function of the pack that runs at one stage of a workflow, and the node that calls it."""

    where: str
    node: str


PREPROCESSING = Stage("easyref_core.mllm.prefix_cache:pixels_of", "encode")
VISION = Stage("easyref_core.mllm.qwen2_vl:VisionBlock.forward", "encode")
DECODER = Stage("easyref_core.mllm.qwen2_vl:DecoderLayer.forward", "encode")
AGGREGATION = Stage("easyref_core.tokens.aggregator:ReferenceAggregator.forward", "aggregate")
KEY_VALUES = Stage("easyref_core.unet.reference_attention:KVProjections.forward", "apply")
SAMPLING = Stage("nodes.unet_patch.site_patch:reference_attention", "sample")
LOADING = Stage("nodes.host.hosted_model:build", "load")
STAGES = (PREPROCESSING, VISION, DECODER, AGGREGATION, KEY_VALUES, SAMPLING)


def empty_caches(server: ComfyServer) -> None:
    """Request twice that the server drops its models and results, as it may ignore the first request."""
    for _ in range(2):
        server.free()
        time.sleep(0.08)


def arm(server: ComfyServer, stage: Stage, call: int, what: str) -> None:
    """Arm a fault at the given call (1 is the first) of the stage's function."""
    server.post("/fault", {"where": stage.where, "call": call, "what": what})


def run_with_fault(
    server: ComfyServer, graph: Graph, stage: Stage, call: int, what: str
) -> PromptFailed | None:
    """Run a workflow with a fault, and return its error; None if the function was called less often."""
    arm(server, stage, call, what)
    try:
        server.run(graph)
    except PromptFailed as error:
        return error
    finally:
        happened = json.loads(server.get("/fault"))["happened"]
        server.post("/fault", {})
    if happened:
        raise AssertionError(f"{what} at call {call} of {stage.where} did not end the run")
    return None


def check_interruption(server: ComfyServer, graph: Graph, expected: bytes, stage: Stage, call: int) -> bool:
    """Check that a run interrupted at this call is reported as such, and that the next run gives `expected`.

    Starts with empty caches. Return False if the function was called less often; raise AssertionError
    otherwise.
    """
    empty_caches(server)
    error = run_with_fault(server, graph, stage, call, INTERRUPT)
    if error is None:
        return False
    # an operation that cannot be interrupted, such as a matrix product, ends at the next check of the host
    if error.kind != "execution_interrupted":
        raise AssertionError(f"interrupted at call {call} of {stage.where}, the run ended with {error}")
    if graphs.image(server, graph) != expected:
        raise AssertionError(f"after an interruption at call {call} of {stage.where} the image differs")
    return True
