"""Setup before any test is imported: paths, and torchvision on a CPU-only torch."""

import gc
import logging
import sys
from importlib.util import find_spec

import pytest

from devkit.cpu_torch import complete_cpu_torch
from devkit.hosts import ROOT

sys.path.append(str(ROOT))  # last: this pack's `nodes` must not hide ComfyUI's nodes.py

# transformers imports it when it is there
if find_spec("torchvision"):
    complete_cpu_torch()

# torch's trace of a compilation is slow to format, and pytest's handler requests it
logging.getLogger("torch.__trace").disabled = True

# The longest files, started first, so that the workers of pytest-xdist end together.
LONGEST = (
    "test_browser test_compiled test_workflows test_smoke test_blueprint test_distributed test_batch_layout "
    "test_faults test_server_easyref test_loop test_together test_stream test_methods test_shipped"
).split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="module", autouse=True)
def _frozen_heap() -> None:
    """Exclude modules and collected tests from garbage collections, which take up to a second else."""
    gc.collect()
    gc.freeze()
