"""A running server after things went wrong: cancelled at any stage, out of memory, files replaced, two clients at once."""

from __future__ import annotations

import os
import shutil

import pytest

from . import golden, graphs
from .conftest import HOST
from .faults import (
    AGGREGATION,
    DECODER,
    KEY_VALUES,
    LOADING,
    MEMORY,
    PREPROCESSING,
    SAMPLING,
    VISION,
    Stage,
    emptied,
    failed,
    interrupted_then_whole,
)
from .graphs import node
from .server import PromptFailed


@pytest.fixture(scope="module", autouse=True)
def _golden(server) -> None:
    graphs.install_golden(server)


@pytest.fixture(scope="module")
def undisturbed(server) -> bytes:
    """What the whole path makes on a server that nothing has happened to."""
    return graphs.picture_uncached(server, graphs.easyref())


@pytest.mark.parametrize(
    ("stage", "call"),
    [(PREPROCESSING, 1), (VISION, 1), (DECODER, 2), (AGGREGATION, 1), (KEY_VALUES, 1), (SAMPLING, 1)],
)
def test_interrupted_and_nothing_left(server, undisturbed, stage: Stage, call: int) -> None:
    assert interrupted_then_whole(server, graphs.easyref(), undisturbed, stage, call)


@pytest.mark.parametrize("stage", [LOADING, AGGREGATION, KEY_VALUES, SAMPLING])
def test_out_of_memory_is_one_error_and_nothing_left(server, undisturbed, stage: Stage) -> None:
    emptied(server)
    error = failed(server, graphs.easyref(), stage, 1, MEMORY)
    assert error.kind == "execution_error"
    assert error.details["node_id"] == stage.node
    assert error.details["exception_type"].endswith("OutOfMemoryError")
    assert "tried to allocate 20.00 GiB" in error.details["exception_message"]
    assert graphs.picture(server, graphs.easyref()) == undisturbed
