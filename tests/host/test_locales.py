"""English and Chinese: every text of every node is there, and the host hands them to the frontend."""

from __future__ import annotations

import json
import re

from devkit.host.locales import english, read, texts

CHINESE = re.compile(r"[\u4e00-\u9fff]")


def test_english_is_what_the_nodes_say(server) -> None:
    assert read("en") == english(server.object_info())


def test_chinese_has_every_text_and_no_other(server) -> None:
    assert texts(read("zh")).keys() == texts(english(server.object_info())).keys()


def test_chinese_is_chinese() -> None:
    said = texts(read("zh"))
    foreign = [
        place for place, text in said.items() if not place.endswith(".name") and not CHINESE.search(text)
    ]
    assert foreign == []


def test_the_host_serves_them(server) -> None:
    served = json.loads(server.get("/i18n"))
    assert {"en", "zh"} <= served.keys()
    assert served["zh"]["nodeDefs"]["EasyRefApply"] == read("zh")["EasyRefApply"]
