"""Renews locales/en from the nodes themselves, and says what locales/zh lacks or has too much.

python tools/locales.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from devkit.host.locales import LOCALES, english, read, texts
from devkit.host.server import ComfyServer
from devkit.hosts import find_hosts


def main() -> None:
    with ComfyServer(find_hosts()[0]) as server:
        found = english(server.object_info())
    file = LOCALES / "en" / "nodeDefs.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for language in sorted(path.name for path in LOCALES.iterdir() if path.name != "en"):
        wanted, has = texts(found), texts(read(language))
        for place in sorted(wanted.keys() - has.keys()):
            print(f"{language} lacks {place}: {wanted[place]}")
        for place in sorted(has.keys() - wanted.keys()):
            print(f"{language} has {place}, which no node has")


if __name__ == "__main__":
    main()
