"""Influence of each reference on the reference tokens (leave one out), similarity, and outlier detection."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cosine_similarity, normalize

from ..mllm.instructions import INSTRUCTION
from ..mllm.preprocess import SIZE

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ..mllm.prefix_cache import EncodePlan
    from ..model import EasyRef

Progress = Callable[[float], None]  # called with the finished fraction, up to 1; may raise to stop

MIN_REFERENCES = 4  # an outlier is reported only in groups of at least this size
# Measured on procedural groups with the shipped model, half of them with an outlier (4 and 6 references, 96
# groups): pooled vision features found 23 of 48 outliers at 5 and flagged 2 references of the 48 groups
# without one; at 3.5, 27 and 5. The tokens of each reference alone found 13 and flagged 4. The leave-one-out
# change does not help, because the model is trained to ignore outliers.
OUTLIER_Z = 5.0


@dataclasses.dataclass(frozen=True)
class Influence:
    """Influence of the K references of a group.

    changes: change of the tokens without each reference, see `change`. similarity: (K, K), cosines of the
    vision features. outlier: index of the reference that does not belong, or -1. score: robust z-score of the
    reference that is least similar to the others.
    """

    changes: list[float]
    similarity: Tensor
    outlier: int
    score: float


def reference_influence(
    model: EasyRef,
    images: Sequence[Image.Image | Tensor],
    prompt: str = "",
    instruction: str = INSTRUCTION,
    size: int = SIZE,
    progress: Progress = lambda done: None,
) -> Influence:
    """Return the influence of each image of a group; arguments as for EasyRef.encode.

    Raises ValueError for fewer than 2 images.
    """

    def features(group: Sequence[Any], progress: Progress) -> Tensor:
        plan = model.plan(model.prepare(group, "", "", size), use_prefix=False)
        return pooled_features(model, plan, progress)

    def tokens(group: Sequence[Any], progress: Progress) -> Tensor:
        return model.aggregate(model.encode(group, prompt, instruction, size, progress))

    return leave_one_out(images, features, tokens, progress)


def leave_one_out(
    images: Sequence[Any],
    features: Callable[[Sequence[Any], Progress], Tensor],
    tokens: Callable[[Sequence[Any], Progress], Tensor],
    progress: Progress = lambda done: None,
) -> Influence:
    """Return the influence of each image, given functions that compute features (K, D) and tokens (1, T, C).

    Raises ValueError for fewer than 2 images.
    """
    count = len(images)
    if count < 2:
        raise ValueError(
            f"The group holds {count} reference; its influence shows only beside others. Give it 2 or more."
        )

    def step(number: int) -> Progress:
        """Progress of one of count + 2 steps: features, tokens of all images, tokens without each image."""
        return lambda done: progress((number + done) / (count + 2))

    similarity = cosine_matrix(features(images, step(0)))
    full = tokens(images, step(1))
    changes = [change(full, tokens([*images[:i], *images[i + 1 :]], step(i + 2))) for i in range(count)]
    return Influence(changes, similarity, *find_outlier(similarity))


def change(tokens: Tensor, without: Tensor) -> float:
    """Return 1 - cosine of two sets of tokens (1, T, C), averaged over tokens: 0 (no change) to 2."""
    return 1 - float(cosine_similarity(tokens.float(), without.float(), dim=-1).mean())


@torch.inference_mode()
def pooled_features(model: EasyRef, plan: EncodePlan, progress: Progress = lambda done: None) -> Tensor:
    """Return each reference's vision features, averaged over image tokens: (K, D), float32 on the CPU.

    They depend neither on the text nor on the other references. plan: made without a prefix (EasyRef.plan).
    """
    features = model.group_encoder.features(plan, progress)
    return torch.stack([tokens.float().mean(dim=0) for tokens in features]).cpu()


def cosine_matrix(features: Tensor, others: Tensor | None = None) -> Tensor:
    """Return the cosines (N, K), float32, of features (N, D) with others (K, D), by default themselves."""
    unit = normalize(features.float(), dim=-1)
    return unit @ (unit if others is None else normalize(others.float(), dim=-1)).T


def mean_to_others(similarity: Tensor) -> Tensor:
    """Return each reference's mean similarity to the others (K,), given similarity (K, K)."""
    return (similarity.sum(dim=1) - similarity.diagonal()) / (len(similarity) - 1)


def robust_z(values: Sequence[float]) -> list[float]:
    """Return how far each value is below the median, in robust standard deviations.

    One robust standard deviation is the median absolute deviation / 0.6745 (Iglewicz and Hoaglin, How to
    Detect and Handle Outliers, 1993).
    """
    spread = torch.as_tensor(values, dtype=torch.float64)
    below = spread.quantile(0.5) - spread
    deviation = below.abs().quantile(0.5)
    return (0.6745 * below / deviation.clamp_min(1e-6)).tolist()


def find_outlier(similarity: Tensor) -> tuple[int, float]:
    """Return the index of the reference least similar to the others, and its robust z-score.

    The index is -1 if the score is below OUTLIER_Z or there are fewer than MIN_REFERENCES references.
    """
    scores = robust_z(mean_to_others(similarity).tolist())
    least = max(range(len(scores)), key=scores.__getitem__)
    is_outlier = len(scores) >= MIN_REFERENCES and scores[least] >= OUTLIER_Z
    return least if is_outlier else -1, scores[least]


def center_crop_loss(height: int, width: int) -> float:
    """Return the fraction of an image's longer side that its centred square leaves out."""
    return 1 - min(height, width) / max(height, width)
