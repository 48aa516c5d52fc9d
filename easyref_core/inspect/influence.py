"""What each reference does to a group: how the tokens change without it, and whether it belongs to the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cosine_similarity, normalize

if TYPE_CHECKING:
    from torch import Tensor

    from ..mllm.prefix_cache import EncodePlan
    from ..model import EasyRef

MIN_REFERENCES = 4  # references from which on one can be said not to belong
# Of groups made by code and read by the model that ships, half with an outsider (4 and 6 references, 96 groups), pooled
# vision features found 23 of 48 outsiders at 5 and named 2 references of 48 groups that have none; at 3.5, 27 and 5.
# The tokens of each reference alone found 13 and named 4; leaving one out tells nothing, as the model was trained
# to leave outsiders out itself.
OUTLIER_Z = 5.0


def change(tokens: Tensor, without: Tensor) -> float:
    """1 - cosine of two sets of tokens (1, T, C), the mean over tokens: 0 where nothing changed."""
    return 1 - float(cosine_similarity(tokens.float(), without.float(), dim=-1).mean())


@torch.inference_mode()
def pooled_features(
    model: EasyRef, plan: EncodePlan, progress: Callable[[float], None] = lambda done: None
) -> Tensor:
    """What the vision tower sees in each reference, the mean of its image tokens: (K, D), float32 on the CPU.

    Neither the text nor the other references are in it. plan: made without a prefix (EasyRef.plan).
    progress: called with the completed fraction; may raise to stop.
    """
    features = model.group_encoder.features(plan, progress)
    return torch.stack([part.float().mean(dim=0) for part in features]).cpu()


def likeness(features: Tensor) -> Tensor:
    """Features (K, D) -> their cosines (K, K)."""
    unit = normalize(features.float(), dim=-1)
    return unit @ unit.T


def mean_to_others(similarity: Tensor) -> Tensor:
    """Similarity (K, K) -> each one's mean similarity to the others (K,)."""
    count = len(similarity)
    return (similarity.sum(dim=1) - similarity.diagonal()) / (count - 1)


def robust_z(values: Sequence[float]) -> list[float]:
    """How far each value lies below the median, in robust standard deviations (median absolute deviation / 0.6745).

    Iglewicz and Hoaglin, How to Detect and Handle Outliers (1993).
    """
    spread = torch.as_tensor(values, dtype=torch.float64)
    below = spread.quantile(0.5) - spread
    deviation = below.abs().quantile(0.5)
    return (0.6745 * below / deviation.clamp_min(1e-6)).tolist()


def find_outlier(similarity: Tensor) -> tuple[int, float]:
    """The reference that is least like the others and its robust z-score; -1 where it is below OUTLIER_Z.

    Of fewer than 4 references none is named: the score is that of the least alike all the same.
    """
    scores = robust_z(mean_to_others(similarity).tolist())
    least = max(range(len(scores)), key=scores.__getitem__)
    named = len(scores) >= MIN_REFERENCES and scores[least] >= OUTLIER_Z
    return least if named else -1, scores[least]
