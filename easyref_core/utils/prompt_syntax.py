"""Plain text of a prompt written in the syntax of SDXL's text encoders in ComfyUI.

    (smile:1.3)  (x)  ((x))       weights: the text inside, as ComfyUI parses it
    \\(  \\)                        literal brackets
    embedding:name                dropped
    <lora:name:0.8>  BREAK        dropped; syntax of other interfaces, not of ComfyUI's encoders
    /* comment */  // comment     dropped, as in the frontend's text box of CLIP Text Encode
    {x}  \\{  \\}  \\|              x and literal characters, as in that text box
    {a|b}                         an error: the frontend chooses a or b for each text box separately

[x], and x:1.3 outside brackets, have no meaning in ComfyUI and stay. A prompt without syntax is unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise

from .errors import shorten

MAX_NESTING = 100  # brackets inside brackets; deeper ones stay, because each level scans the text again

# Kinds of tokens: text, a bracket of a weight, or dropped syntax.
TEXT, OPEN, CLOSE, DROPPED = "text", "(", ")", "dropped"
Token = tuple[str, str]  # kind and text

_LINE_COMMENT = re.compile(r"//[^\n\r\u2028\u2029]*")
_COMMENT = re.compile(rf"/\*|{_LINE_COMMENT.pattern}")
_BRACE = re.compile(r"\\.|[{}|]", re.DOTALL)
_SPECIAL = re.compile(r"\\[()]|[()]|<(?i:lora|lyco|hypernet):[^<>\n]*>|(?<![^\s,(])BREAK(?![^\s,):])")
_EMBEDDING = re.compile(r"(?<!\S)embedding:\s*([^\s<\[]*)")


def plain_text(prompt: str) -> str:
    """Remove weights, embeddings, LoRAs, comments and escapes from a prompt.

    Raises ValueError for an unresolved choice {a|b}.
    """
    tokens = _tokens(_without_braces(_without_comments(prompt)))
    return _joined(part for segment in _segments(tokens) for part in _without_embeddings(segment))


def _without_comments(text: str) -> str:
    parts, start = [], 0
    while match := _COMMENT.search(text, start):
        end = match.end()
        if match.group() == "/*":
            close = text.find("*/", end)
            if close < 0:  # unterminated, and so is every later one: they are text
                return "".join(parts) + text[start:end] + _LINE_COMMENT.sub("", text[end:])
            end = close + 2
        parts.append(text[start : match.start()])
        start = end
    return "".join(parts) + text[start:]


def _without_braces(text: str) -> str:
    """Remove braces and their escapes. Raises ValueError for a choice."""
    parts, level, opened, end = [], 0, 0, 0
    for match in _BRACE.finditer(text):
        sign = match.group()
        if sign == "|" and level:
            block = text[opened:]
            choice = shorten(repr(block[: block.find("}") + 1] or block))
            raise ValueError(
                f"prompt has an unresolved choice: {choice}. ComfyUI resolves choices only in the text box "
                "of CLIP Text Encode, so SDXL and the MLLM could receive different prompts. Write one of the "
                "alternatives, in one text node that is linked to both."
            )
        if sign == "{" or (sign == "}" and level):
            parts.append(text[end : match.start()])
            opened = match.start() if not level else opened
            level, end = level + (1 if sign == "{" else -1), match.end()
    return re.sub(r"\\([{}|])", r"\1", "".join(parts) + text[end:])


def _tokens(text: str) -> list[Token]:
    tokens, end = [], 0
    for match in _SPECIAL.finditer(text):
        sign = match.group()
        tokens.append((TEXT, text[end : match.start()]))
        if sign in (OPEN, CLOSE):
            tokens.append((sign, sign))
        else:
            tokens.append((TEXT, sign[1]) if sign[0] == "\\" else (DROPPED, ""))
        end = match.end()
    tokens.append((TEXT, text[end:]))
    return [token for token in tokens if token != (TEXT, "")]


def _segments(tokens: list[Token]) -> Iterator[list[Token]]:
    """Yield runs of one weight, in order; the brackets that remain in them are text."""
    stack = [(tokens, 0, True)]
    while stack:
        tokens, level, grouped = stack.pop()
        if not grouped:
            yield tokens
            continue
        for run in reversed(_top_level_runs(tokens)):
            grouped = level < MAX_NESTING and len(run) > 1 and (run[0][0], run[-1][0]) == (OPEN, CLOSE)
            stack.append((_without_weight(run[1:-1]) if grouped else run, level + 1, grouped))


def _top_level_runs(tokens: list[Token]) -> list[list[Token]]:
    """Split tokens before a bracket that opens at level 0 and after one that closes to level 0.

    The level may fall below 0, as in ComfyUI, so that unbalanced brackets are parsed the same way.
    """
    cuts, level = [0], 0
    for i, (kind, _) in enumerate(tokens):
        if kind == OPEN:
            cuts += [i] * (level == 0)
            level += 1
        elif kind == CLOSE:
            level -= 1
            cuts += [i + 1] * (level == 0)
    return [tokens[start:end] for start, end in pairwise([*cuts, len(tokens)]) if start < end]


def _without_weight(tokens: list[Token]) -> list[Token]:
    """Remove ":1.3" from the tokens inside brackets."""
    kind, text = tokens[-1] if tokens else (DROPPED, "")
    inside, colon, weight = text.rpartition(":")
    if kind != TEXT or not colon or (not inside and len(tokens) == 1):
        return tokens
    try:
        float(weight)
    except ValueError:
        return tokens
    return [*tokens[:-1], *([(TEXT, inside)] if inside else [])]


def _without_embeddings(segment: Sequence[Token]) -> Iterator[str | None]:
    """Yield the texts of a segment, with None for dropped syntax."""
    for dropped, run in groupby(segment, key=lambda token: token[0] == DROPPED):
        text, end = "".join(part for _, part in run), 0
        for match in _EMBEDDING.finditer(text):
            yield from (text[end : match.start()], None)
            name = match.group(1)
            end = match.end() - (len(name) - len(name.rstrip(",")))  # the comma after the name is text
        yield None if dropped else text[end:]


def _joined(parts: Iterator[str | None]) -> str:
    """Join parts into one text, without a second comma or space at dropped syntax."""
    text, dropped = "", False
    for part in parts:
        if part is None:
            dropped = True
        elif part:
            text, dropped = (_tidy(text, part) if dropped else text + part), False
    return text.rstrip(", \t\n") if dropped else text


def _tidy(before: str, after: str) -> str:
    if after.lstrip().startswith(","):
        before = before.rstrip()
        after = after.lstrip()[1:] if not before or before.endswith(",") else after.lstrip()
    return before + (after.lstrip() if not before or before[-1].isspace() else after)
