"""Weight types as a table, layer weights as text, and the layer of each of SDXL's 70 sites."""

from __future__ import annotations

from collections import Counter

import pytest

from easyref_core.unet.layer_weights import (
    DEFAULT_BRANCHES,
    NEGATIVE_ONLY,
    SWAPPED_BRANCHES,
    WEIGHT_TYPES,
    layers_of,
    parse_layer_weights,
    resolve_weight_type,
)
from easyref_core.unet.layout import Site, sdxl_sites

# Computed apart from the code, from what IPAdapter_plus does at layer t of 11.
EXPECTED = {
    "linear": [1] * 11,
    "ease in": [0.05 + 0.95 * (1 - t / 11) for t in range(11)],
    "ease out": [0.05 + 0.95 * t / 11 for t in range(11)],
    "ease in-out": [0.05 + 0.95 * (1 - abs(t - 5.5) / 5.5) for t in range(11)],
    "reverse in-out": [0.05 + 0.95 * abs(t - 5.5) / 5.5 for t in range(11)],
    "weak input": [0.2] * 4 + [1] * 7,
    "weak output": [1] * 5 + [0.2] * 6,
    "weak middle": [1] * 4 + [0.2] + [1] * 6,
    "strong middle": [0.2] * 4 + [1] + [0.2] * 6,
    "style transfer": [0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0],
    "composition": [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
    "strong style transfer": [1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1],
    "style and composition": [0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0],
    "strong style and composition": [1] * 11,
    "style transfer precise": [0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0],
    "composition precise": [0.1, 0.1, 0.1, 1, 0.1, 0.1, 1, 0.1, 0.1, 0.1, 0.1],
}


def test_factors() -> None:
    assert {name: kind.factors for name, kind in WEIGHT_TYPES.items()} == {
        name: pytest.approx(factors) for name, factors in EXPECTED.items()
    }


def test_only_precise_types_change_the_branches() -> None:
    style, composition = WEIGHT_TYPES["style transfer precise"], WEIGHT_TYPES["composition precise"]
    assert style.branch_tokens == tuple(
        NEGATIVE_ONLY if layer == 3 else DEFAULT_BRANCHES for layer in range(11)
    )
    assert composition.branch_tokens == tuple(
        DEFAULT_BRANCHES if layer == 3 else SWAPPED_BRANCHES for layer in range(11)
    )
    others = {kind.branch_tokens for name, kind in WEIGHT_TYPES.items() if "precise" not in name}
    assert others == {(DEFAULT_BRANCHES,) * 11}


def test_layers_are_numbered_as_the_unet_runs() -> None:
    layers = layers_of(sdxl_sites())
    assert [Counter(layers.values())[layer] for layer in range(11)] == [2, 2, 10, 10, 10, 10, 10, 10, 2, 2, 2]
    assert layers[Site("input", 8, 9)] == 3
    assert layers[Site("middle", 0, 0)] == 4
    assert layers[Site("output", 1, 0)] == 6


def test_unet_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="has 10 spatial transformers"):
        layers_of(site for site in sdxl_sites() if site.block != "middle")


def test_layer_weights_replace_the_factors_only() -> None:
    assert parse_layer_weights(" 3 : 1, 6:0.5,\n10:-2 ") == (0, 0, 0, 1, 0, 0, 0.5, 0, 0, 0, -2)
    precise = resolve_weight_type("style transfer precise", "4:1")
    assert precise.factors == (0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0)
    assert precise.branch_tokens == WEIGHT_TYPES["style transfer precise"].branch_tokens
    for empty in ("", " ", ",\n"):
        assert resolve_weight_type("ease in", empty) == WEIGHT_TYPES["ease in"]


def test_unknown_type_is_refused() -> None:
    with pytest.raises(ValueError, match="weight_type is 'bold'; wanted one of: linear, "):
        resolve_weight_type("bold")
