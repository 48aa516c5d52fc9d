"""Every text of every node exists in English and Chinese, and the host serves both to the frontend."""

from __future__ import annotations

import json
import re

from devkit.host.locales import english, load, texts

CHINESE = re.compile(r"[\u4e00-\u9fff]")


def test_english_matches_the_nodes(server) -> None:
    assert load("en") == english(server.object_info())


def test_chinese_has_every_text_and_no_other(server) -> None:
    assert texts(load("zh")).keys() == texts(english(server.object_info())).keys()


def test_chinese_is_chinese() -> None:
    sentences = {key: text for key, text in texts(load("zh")).items() if not key.endswith(".name")}
    assert [key for key, text in sentences.items() if not CHINESE.search(text)] == []


def test_host_serves_the_locales(server) -> None:
    served = json.loads(server.get("/i18n"))
    assert {"en", "zh"} <= served.keys()
    assert served["zh"]["nodeDefs"]["EasyRefApply"] == load("zh")["EasyRefApply"]
