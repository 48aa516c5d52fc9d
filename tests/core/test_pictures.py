"""The thumbnails were made from today's workflows and nodes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from devkit import pictures

RECORDS = pictures.records()


@pytest.mark.parametrize("thumbnail", pictures.thumbnails(), ids=lambda path: path.stem)
def test_thumbnail_shows_todays_workflow(thumbnail: Path) -> None:
    remedy = f"{thumbnail.name} is stale: run python tools/thumbnails.py {thumbnail.stem}"
    assert RECORDS.get(thumbnail.name) == pictures.digest(thumbnail), remedy


def test_records_name_thumbnails_that_exist() -> None:
    assert set(RECORDS) <= {thumbnail.name for thumbnail in pictures.thumbnails()}


def test_digest_follows_the_workflow_and_the_schemas(tmp_path, monkeypatch) -> None:
    schemas = tmp_path / "object_info.json"
    schemas.write_text(json.dumps({"EasyRefApply": {"inputs": []}, "EasyRefDemo": {"inputs": []}}))
    monkeypatch.setattr(pictures, "SCHEMAS", schemas)
    workflow = tmp_path / "one.json"
    workflow.write_text(json.dumps({"nodes": [{"type": "EasyRefApply"}]}))
    first = pictures.digest(tmp_path / "one.jpg")

    schemas.write_text(json.dumps({"EasyRefApply": {"inputs": []}, "EasyRefDemo": {"inputs": [1]}}))
    assert pictures.digest(tmp_path / "one.jpg") == first  # a node that the workflow does not have
    schemas.write_text(json.dumps({"EasyRefApply": {"inputs": [1]}, "EasyRefDemo": {"inputs": []}}))
    second = pictures.digest(tmp_path / "one.jpg")
    workflow.write_text(json.dumps({"nodes": [{"type": "EasyRefApply", "size": [1, 2]}]}))
    assert len({first, second, pictures.digest(tmp_path / "one.jpg")}) == 3
