"""Faults at chosen moments of a running server (fault_nodes), and what must then be so: one error, and nothing left."""

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
    """A function of the pack that runs at one stage of the work, and the node that it runs in."""

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


def emptied(server: ComfyServer) -> None:
    """Let the server drop all models and results. It overlooks a request that comes as a run ends, so there are two."""
    for _ in range(2):
        server.free()
        time.sleep(0.08)


def arm(server: ComfyServer, stage: Stage, call: int, what: str) -> None:
    """Let this happen at the given call (1 is the first) of the stage's function."""
    server.post("/fault", {"where": stage.where, "call": call, "what": what})


def failed(server: ComfyServer, graph: Graph, stage: Stage, call: int, what: str) -> PromptFailed | None:
    """How a run with this fault ended; None where the stage's function was not called so often, and the run was whole."""
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


def interrupted_then_whole(
    server: ComfyServer, graph: Graph, expected: bytes, stage: Stage, call: int
) -> bool:
    """A run interrupted at this call is reported as that, and the next one makes the picture of an undisturbed one.

    False where there is no such call. Starts from a server that has let go of everything.
    """
    emptied(server)
    error = failed(server, graph, stage, call, INTERRUPT)
    if error is None:
        return False
    # what runs to its end all the same, such as a single matrix product, is followed by the next check of the host's
    if error.kind != "execution_interrupted":
        raise AssertionError(f"interrupted at call {call} of {stage.where}, the run ended with {error}")
    if graphs.picture(server, graph) != expected:
        raise AssertionError(f"after an interruption at call {call} of {stage.where} the picture is another")
    return True
