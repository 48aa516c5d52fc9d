"""Regenerate locales/en from the nodes, and list texts that locales/zh lacks or has in excess.

python tools/locales.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from devkit.host.locales import LOCALES, english, load, texts
from devkit.host.server import ComfyServer
from devkit.hosts import find_hosts


def main() -> None:
    with ComfyServer(find_hosts()[0]) as server:
        definitions = english(server.object_info())
    file = LOCALES / "en" / "nodeDefs.json"
    file.write_text(json.dumps(definitions, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    expected = texts(definitions)
    for language in sorted({path.name for path in LOCALES.iterdir()} - {"en"}):
        translated = texts(load(language)).keys()
        for key in sorted(expected.keys() - translated):
            print(f"{language} lacks {key}: {expected[key]}")
        for key in sorted(translated - expected.keys()):
            print(f"{language} has {key}, which no node has")


if __name__ == "__main__":
    main()
