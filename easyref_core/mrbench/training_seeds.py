"""Training seeds: a method trained several times is one config entry and one line of the report.

    easyref:
      kind: easyref
      checkpoint: runs/seed_{seed}/easyref.safetensors
      training_seeds: [0, 1, 2]

expands into the entries `easyref@0`, `easyref@1` and `easyref@2`, with image folders of those names. The
summary and the report pool them into `easyref`. `seed: "{seed}"`, as of LoRA, becomes the number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

KEY, PLACEHOLDER = "training_seeds", "{seed}"
NUMBER = "seed"  # the setting that is a number and not a path
SEED = re.compile(r"@\d+")


def expand(name: str, entry: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{<name>@<seed>: entry} for each of the entry's training seeds; {name: entry} if it has none.

    Raises ValueError unless training seeds and the placeholder "{seed}" in a setting come together.
    """
    settings = {key: value for key, value in entry.items() if key != KEY}
    has_placeholder = any(PLACEHOLDER in value for value in settings.values() if isinstance(value, str))
    if KEY not in entry:
        if has_placeholder:
            raise ValueError(
                f"Method {name} has {PLACEHOLDER} in a setting; wanted also {KEY}, such as [0, 1, 2]."
            )
        return {name: settings}
    seeds = entry[KEY]
    if not (isinstance(seeds, list) and seeds and all(type(seed) is int and seed >= 0 for seed in seeds)):
        raise ValueError(
            f"Method {name}: {KEY} is {seeds!r}; wanted a list of whole numbers, such as [0, 1, 2]."
        )
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"Method {name}: {KEY} is {seeds!r}; wanted each seed once.")
    if not has_placeholder:
        raise ValueError(
            f"Method {name} has {KEY} but {PLACEHOLDER} in none of its settings, so all seeds would be one "
            f"model. Put {PLACEHOLDER} into the path of its checkpoint or weights."
        )

    def fill(setting: str, value: Any, seed: int) -> Any:
        if setting == NUMBER and value == PLACEHOLDER:
            return seed
        return value.replace(PLACEHOLDER, str(seed)) if isinstance(value, str) else value

    return {
        f"{name}@{seed}": {key: fill(key, value, seed) for key, value in settings.items()} for seed in seeds
    }


def pooled_name(entry: str) -> str:
    """The method of an entry or image folder: easyref@1-2-references -> easyref-2-references."""
    return SEED.sub("", entry, count=1)


def select(names: Iterable[str], entries: Iterable[str]) -> list[str]:
    """Entries that are named, themselves or by their method, in the order of `names`; all if none is named.

    Raises ValueError for a name that no entry has.
    """
    names, entries = list(names), list(entries)
    selected = {name: [e for e in entries if name in (e, pooled_name(e))] for name in names}
    if unknown := sorted(name for name, found in selected.items() if not found):
        raise ValueError(f"No method {unknown[0]!r} in the config; it has {', '.join(entries)}.")
    return list(dict.fromkeys(entry for found in selected.values() for entry in found)) or entries
