"""Batched reference tokens and a latent batch: each picture is the one that its own row makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from devkit.host import golden
from devkit.host.sampling import Easy, cfg_guider, sample
from devkit.host.tiny_nodes.tiny_sdxl import load_tiny_sdxl, random_conditioning

pytestmark = pytest.mark.one_host

JOIN = {"method": "concat", "factor": 0.5, "weights": ""}


def made_by(easy: Easy, node: str, *pairs: Any, **inputs: Any) -> Any:
    """What a node of tokens makes of several sets."""
    tokens = {f"tokens{i}": pair for i, pair in enumerate(pairs)}
    with torch.inference_mode():
        return golden.node(easy.pack, node).execute(tokens=tokens, **inputs).result[0]


def row(pair: Any, i: int) -> Any:
    """The tokens of one picture; where there are fewer rows, the last."""
    sides = (pair.conditional, pair.unconditional)
    return type(pair)(
        *(
            type(side).of(torch.Tensor(side)[min(i, len(side) - 1)][None].clone(), side.provenance)
            for side in sides
        )
    )


@pytest.mark.parametrize("negatives", ["the same", "their own"])
@pytest.mark.parametrize("kind", ["batch", "frames", "joined batch"])
def test_each_picture_has_its_own_tokens(easy, kind: str, negatives: str) -> None:
    other = easy.other_tokens()
    if negatives == "the same":
        other = type(other)(other.conditional, easy.tokens.unconditional)
    if kind == "frames":
        node = "EasyRefTokensOverFrames"
        pair = made_by(easy, node, easy.tokens, other, frames=3, easing="ease in")
    else:
        pair = made_by(easy, "EasyRefBatchTokens", easy.tokens, other)
    if kind == "joined batch":
        pair = made_by(easy, "EasyRefCombineTokens", pair, easy.tokens, **JOIN)
    texts, pictures = (random_conditioning(0, 77), random_conditioning(1, 77)), len(pair.conditional)

    def sampled(tokens: Any) -> torch.Tensor:
        return sample(cfg_guider(easy.apply(load_tiny_sdxl(), tokens=tokens), *texts), batch=pictures)

    together, alone = sampled(pair), [sampled(row(pair, i)) for i in range(pictures)]
    for i in range(pictures):
        assert golden.error(together[i], alone[i][i]) <= 1e-5
    assert golden.error(together[-1], alone[0][-1]) > 0.1
