"""Weights of the reference term by layer, for SDXL's 11 spatial transformers: IPAdapter_plus' weight types.

    index   0   1   2   3         4        5   6     7   8   9   10
    where   4   5   7   8         0        0   1     2   3   4   5
            input blocks          middle   output blocks
                    composition                style

A spatial transformer holds 1 to 10 cross-attentions (2 2 10 10 · 10 · 10 10 10 2 2 2 in SDXL), which share
its factor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ..utils.errors import MAX_FACTOR, shorten
from ..utils.number_lists import parse_number, split_entries
from .layout import Site

LAYERS = 11
COMPOSITION, MIDDLE, STYLE = 3, 4, 6
WEAK = 0.2
_INDEX = re.compile(r"[+-]?\d{1,9}", re.ASCII)
LINEAR = "linear"


class BranchTokens(NamedTuple):
    """Tokens that each guidance branch attends to: unconditional (True), conditional (False), none (None)."""

    unconditional: bool | None = True
    conditional: bool | None = False


DEFAULT_BRANCHES = BranchTokens()
SWAPPED_BRANCHES = BranchTokens(unconditional=False, conditional=True)
# Only the negative branch attends to the references.
NEGATIVE_ONLY = BranchTokens(unconditional=False, conditional=None)


class WeightType(NamedTuple):
    """A factor of the weight, and the tokens of each branch, by layer."""

    factors: tuple[float, ...]
    branch_tokens: tuple[BranchTokens, ...] = (DEFAULT_BRANCHES,) * LAYERS


def _ramp(height: list[float]) -> WeightType:
    """A weight type of factors from 0.05 to 1, by the height of each layer, 0 to 1."""
    return WeightType(tuple(0.05 + 0.95 * h for h in height))


def _only(factors: Mapping[int, float], default: float = 0.0) -> WeightType:
    return WeightType(tuple(factors.get(layer, default) for layer in range(LAYERS)))


_INPUT, _OUTPUT = range(MIDDLE), range(MIDDLE + 1, LAYERS)
_fall = [1 - layer / LAYERS for layer in range(LAYERS)]
_rise = [layer / LAYERS for layer in range(LAYERS)]
_valley = [abs(layer / LAYERS - 0.5) * 2 for layer in range(LAYERS)]

WEIGHT_TYPES: dict[str, WeightType] = {
    LINEAR: _only({}, default=1.0),
    "ease in": _ramp(_fall),
    "ease out": _ramp(_rise),
    "ease in-out": _ramp([1 - height for height in _valley]),
    "reverse in-out": _ramp(_valley),
    "weak input": _only(dict.fromkeys(_INPUT, WEAK), default=1.0),
    "weak output": _only(dict.fromkeys(_OUTPUT, WEAK), default=1.0),
    "weak middle": _only({MIDDLE: WEAK}, default=1.0),
    "strong middle": _only({MIDDLE: 1.0}, default=WEAK),
    "style transfer": _only({STYLE: 1.0}),
    "composition": _only({COMPOSITION: 1.0}),
    "strong style transfer": _only({COMPOSITION: 0.0}, default=1.0),
    # One group serves as both style and composition reference. For two groups use two Apply nodes.
    "style and composition": _only({COMPOSITION: 1.0, STYLE: 1.0}),
    "strong style and composition": _only({}, default=1.0),
    "style transfer precise": _only({COMPOSITION: 1.0, STYLE: 1.0})._replace(
        branch_tokens=tuple(
            NEGATIVE_ONLY if layer == COMPOSITION else DEFAULT_BRANCHES for layer in range(LAYERS)
        )
    ),
    "composition precise": _only({COMPOSITION: 1.0, STYLE: 1.0}, default=0.1)._replace(
        branch_tokens=tuple(
            DEFAULT_BRANCHES if layer == COMPOSITION else SWAPPED_BRANCHES for layer in range(LAYERS)
        )
    ),
}


def resolve_weight_type(weight_type: str, layer_weights: str = "") -> WeightType:
    """The weight type of this name; layer_weights, if any, replace its factors.

    Raises ValueError for an unknown name and for layer weights that cannot be read.
    """
    if weight_type not in WEIGHT_TYPES:
        raise ValueError(f"weight_type is {weight_type!r}; wanted one of: {', '.join(WEIGHT_TYPES)}.")
    named = WEIGHT_TYPES[weight_type]
    if not split_entries(layer_weights, "layer_weights"):
        return named
    return named._replace(factors=parse_layer_weights(layer_weights))


def parse_layer_weights(text: str) -> tuple[float, ...]:
    """ "index:weight, ..." -> 11 factors, 0 where an index is not named; number_lists.py parses it."""
    factors: dict[int, float] = {}
    for entry in split_entries(text, "layer_weights"):
        index, colon, weight = entry.partition(":")
        if not colon or not _INDEX.fullmatch(index):
            raise ValueError(
                f"layer_weights has {shorten(repr(entry))}, which is not index:weight. Write for example "
                '"3:1, 6:0.5"; layers that are not named get 0.'
            )
        layer = int(index)
        if not 0 <= layer < LAYERS:
            raise ValueError(
                f"layer_weights names layer {shorten(layer)}; wanted SDXL's layers 0 to {LAYERS - 1} (0-3 "
                "input, 4 middle, 5-10 output)."
            )
        if layer in factors:
            raise ValueError(f"layer_weights names layer {layer} twice. Name each layer once.")
        name = f"layer_weights for layer {layer}"
        example = 'index:weight pairs, as in "3:1, 6:0.5"'
        factors[layer] = parse_number(weight, name, -MAX_FACTOR, MAX_FACTOR, example=example)
    return _only(factors).factors


def layers_of(sites: Iterable[Site]) -> dict[Site, int]:
    """Index of each site's spatial transformer, in the order in which the UNet runs them.

    Raises ValueError for a UNet that does not have SDXL's 11.
    """
    sites = list(sites)
    order = ("input", "middle", "output").index
    modules = sorted({(order(site.block), site.number) for site in sites})
    if len(modules) != LAYERS:
        raise ValueError(
            f"The UNet has {len(modules)} spatial transformers, and the weight types are made for SDXL's "
            f"{LAYERS}. "
            'Use weight_type "linear" and no layer_weights.'
        )
    return {site: modules.index((order(site.block), site.number)) for site in sites}
