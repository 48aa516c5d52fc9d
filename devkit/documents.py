"""Commands of the documents, as their reader would copy them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

SHELL_BLOCK = re.compile(r"```sh\n(.*?)```", re.DOTALL)
COMMENT = re.compile(r"^# ?", re.MULTILINE)


def readme_commands(file: Path) -> list[list[str]]:
    """Words of each command in the ```sh blocks of a Markdown file."""
    text = file.read_text(encoding="utf-8")
    return [words for block in SHELL_BLOCK.findall(text) for words in split_commands(block)]


def opening_commands(file: Path) -> list[list[str]]:
    """Words of each indented command in the comment that a YAML or a script opens with."""
    opening = COMMENT.sub("", file.read_text(encoding="utf-8").partition("\n\n")[0])
    lines = [line for line in opening.splitlines() if line.startswith("    ")]
    return split_commands("\n".join(lines))


def split_commands(text: str) -> list[list[str]]:
    """Words of each line; a backslash at its end joins it to the next, and # starts a comment."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]
