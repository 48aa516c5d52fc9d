"""Procedural prompts in 20 scripts, for comparisons of tokenizers."""

from __future__ import annotations

import random
import unicodedata

SCRIPTS = {  # {name: blocks of code points}
    "Latin": ((0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F)),
    "Greek": ((0x370, 0x3FF),),
    "Cyrillic": ((0x400, 0x4FF),),
    "Armenian": ((0x531, 0x58F),),
    "Hebrew": ((0x591, 0x5F4),),
    "Arabic": ((0x620, 0x6FF),),
    "Devanagari": ((0x900, 0x97F),),
    "Bengali": ((0x980, 0x9FF),),
    "Gujarati": ((0xA80, 0xAFF),),
    "Tamil": ((0xB80, 0xBFF),),
    "Telugu": ((0xC00, 0xC7F),),
    "Thai": ((0xE00, 0xE7F),),
    "Tibetan": ((0xF40, 0xFBC),),
    "Myanmar": ((0x1000, 0x109F),),
    "Georgian": ((0x10A0, 0x10FF),),
    "Ethiopic": ((0x1200, 0x137F),),
    "Khmer": ((0x1780, 0x17FF),),
    "Kana": ((0x3041, 0x30FF),),
    "Hangul": ((0xAC00, 0xD7A3),),
    "Han": ((0x4E00, 0x9FFF), (0x20000, 0x2A6DF)),
}
ENGLISH = (
    "a portrait of an old woman in the rain, oil painting, she's wearing John's coat and WE'LL see THEY'RE "
    "watercolour 35mm f/1.8 golden hour detailed face cat_girl x2 (masterpiece:1.2) [blurry] {red|blue} don't"
).split()
BETWEEN = (" ",) * 12 + (
    "  ",
    ", ",
    ". ",
    "\n",
    "\r\n\n",
    " \n ",
    "\t",
    "\u00a0",
    "\u3000",
    "-",
    "",
    ": ",
    " | ",
)
OTHERS = (
    *(
        "7",
        "2026",
        "1.5",
        "٣٤",
        "½",
        "Ⅷ",
        "!!",
        "?!…",
        "。",
        "，",
        "'s",
        "'LL",
        "’s",
        "#",
        "@user",
        "\u200d",
        "\ufeff",
    ),
    *(
        "😀",
        "👩\u200d🚀",
        "🇯🇵",
        "👍🏽",
        "❤\ufe0f",
        "e\u0301",
        "A\u030a",
        "\u1100\u1161\u11a8",
        "Å",
        "ﬁ",
        "\ud7b0",
    ),
    *(
        "<|im_start|>",
        "<|image_pad|>",
        "<|endoftext|>",
        "<tool_call>",
        "</think>",
        "<b>",
        "a_b.c()",
        "\x00",
        "\x7f",
    ),
)


def prompts(count: int, seed: int = 0) -> list[str]:
    """`count` prompts, the scripts in turn: words of random letters and marks, English, signs, spaces."""
    rng = random.Random(seed)
    letters = [_letters(blocks) for blocks in SCRIPTS.values()]
    return [_prompt(rng, letters[i % len(letters)]) for i in range(count)]


def _letters(blocks: tuple[tuple[int, int], ...]) -> list[str]:
    """Letters, combining marks and digits of a script."""
    characters = [chr(code) for first, last in blocks for code in range(first, last + 1)]
    return [character for character in characters if unicodedata.category(character)[0] in "LMN"]


def _prompt(rng: random.Random, letters: list[str]) -> str:
    parts = []
    for _ in range(rng.randint(1, 16)):
        kind = rng.random()
        if kind < 0.6:
            parts.append("".join(rng.choices(letters, k=rng.randint(1, 8))))
        else:
            parts.append(rng.choice(ENGLISH if kind < 0.8 else OTHERS))
        parts.append(rng.choice(BETWEEN))
    text = "".join(parts)
    return unicodedata.normalize("NFD", text) if rng.random() < 0.2 else text
