"""MRBench numbers of arXiv 2412.09618 v1, Tables 3 to 5. The tables of the ICML version were not read.

The numbers are not comparable with those measured by this code, for the reasons in CAVEATS.
"""

from __future__ import annotations

from typing import NamedTuple

SOURCE = "arXiv 2412.09618 v1"
CAVEATS = (
    "The authors' benchmark data are not released: groups, prompts and targets differ from those used here.",
    "The paper names neither the CLIP nor the DINO model, seeds, steps or guidance. Its CLIP-T is read as "
    "CLIPScore (2.5 x cosine), because a cosine of 0.7 between text and image does not occur; DINO-I's model "
    "cannot be inferred.",
    "The paper does not say whether Table 3 compares with the target or with the references; its text "
    "elsewhere suggests the target.",
    "Tables 4 and 5 do not name their split; it is held-out, because their 64-token row repeats Table 3's.",
    "The paper does not say whether IP-Adapter-SDXL averages or concatenates in Table 3, nor LoRA's rank and "
    "steps.",
)


class PaperRow(NamedTuple):
    """One row of a table; None if the paper has no number."""

    table: int
    split: str
    method: str
    clip_i: float | None
    clip_t: float | None
    dino_i: float | None
    note: str = ""
    names: tuple[
        str, ...
    ] = ()  # corresponding methods here; the tiny model's 8 tokens correspond to the paper's 64

    @property
    def scores(self) -> tuple[float | None, ...]:
        return self.clip_i, self.clip_t, self.dino_i


IP_ADAPTER = ("ip_adapter_average", "ip_adapter_concatenation")
CONCATENATION = "Concatenation, 354 tokens on average"
_ROWS = (
    (3, "held-in", "LoRA", 0.831, 0.715, 0.654, "", ("lora",)),
    (3, "held-in", "IP-Adapter-SDXL", 0.768, 0.632, 0.527, "", IP_ADAPTER),
    (3, "held-in", "EasyRef", 0.843, 0.726, 0.672, "", ("easyref",)),
    (3, "held-out", "LoRA", None, None, None, "failed: not trained on these groups", ("lora",)),
    (3, "held-out", "IP-Adapter-SDXL", 0.795, 0.645, 0.579, "", IP_ADAPTER),
    (3, "held-out", "EasyRef", 0.833, 0.709, 0.614, "", ("easyref",)),
    (4, "held-out", "32 tokens, last layer", 0.813, 0.693, 0.591, "", ("easyref_4_tokens",)),
    (4, "held-out", "128 tokens, last layer", 0.827, 0.705, 0.611, "", ("easyref_16_tokens",)),
    (4, "held-out", "64 tokens, last layer but one", 0.831, 0.704, 0.616, "", ("easyref_layer_2",)),
    (4, "held-out", "64 tokens, last layer but two", 0.828, 0.702, 0.617, "", ("easyref_layer_3",)),
    (4, "held-out", "64 tokens, last layer", 0.833, 0.709, 0.614),
    (5, "held-out", "Average, 64 tokens", 0.818, 0.688, 0.584, "", ("easyref_average",)),
    (5, "held-out", CONCATENATION, 0.821, 0.692, 0.579, "", ("easyref_concatenation",)),
    (5, "held-out", "EasyRef, 64 tokens", 0.833, 0.709, 0.614),
)
ROWS = tuple(PaperRow(*row) for row in _ROWS)


def row_of(method: str, split: str) -> PaperRow | None:
    """Return the paper's row for a method by its name; None if it has none."""
    name = method.lower().replace("-", "_")
    return next((row for row in ROWS if name in row.names and row.split == split), None)
