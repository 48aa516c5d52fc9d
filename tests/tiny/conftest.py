"""A dataset with one image of every combination."""

from __future__ import annotations

import pytest

from easyref_core.tiny.dataset import Dataset, draw_dataset


@pytest.fixture(scope="session")
def dataset() -> Dataset:
    return draw_dataset(3, copies=1)
