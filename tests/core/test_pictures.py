"""Thumbnails, pictures of help pages and the screenshot were made from today's workflows and nodes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from devkit import pictures

RECORDS = pictures.records()


@pytest.mark.parametrize("thumbnail", pictures.thumbnails(), ids=lambda path: path.stem)
def test_thumbnail_shows_todays_workflow(thumbnail: Path) -> None:
    remedy = f"{thumbnail.name} is stale: run python tools/thumbnails.py {thumbnail.stem}"
    assert RECORDS.get(pictures.key(thumbnail)) == pictures.digest(thumbnail), remedy


@pytest.mark.parametrize("picture", pictures.help_pictures(), ids=lambda path: path.stem)
def test_help_page_shows_todays_node(picture: Path) -> None:
    node = picture.stem.removesuffix(pictures.RESULT)
    command = (
        f"node_pictures.py {node}" if picture.suffix == ".png" else f"thumbnails.py {pictures.RUNS[node]}"
    )
    remedy = f"{picture.name} is stale: run python tools/{command}"
    assert RECORDS.get(pictures.key(picture)) == pictures.digest(picture), remedy


def test_screenshot_shows_todays_workflow() -> None:
    remedy = f"{pictures.SCREENSHOT.name} is stale: run python tools/screenshots.py"
    assert RECORDS.get(pictures.key(pictures.SCREENSHOT)) == pictures.digest(pictures.SCREENSHOT), remedy


def test_help_pages_have_the_results_of_their_runs() -> None:
    results = {picture for picture in pictures.help_pictures() if picture.suffix == ".jpg"}
    assert results == set(map(pictures.result_picture, pictures.RUNS))


def test_records_name_pictures_that_exist() -> None:
    assert set(RECORDS) == set(map(pictures.key, pictures.all_pictures()))


@pytest.fixture
def sources(tmp_path, monkeypatch) -> Path:
    """A folder of sources: the schemas of two nodes, and a workflow of one of them."""
    monkeypatch.setattr(pictures, "SCHEMAS", tmp_path / "object_info.json")
    monkeypatch.setattr(pictures, "WORKFLOWS", tmp_path)
    write_schemas(tmp_path)
    (tmp_path / "try_it_now.json").write_text(json.dumps({"nodes": [{"type": "EasyRefApply"}]}))
    return tmp_path


def write_schemas(folder: Path, **inputs: list[int]) -> None:
    schemas = {name: {"inputs": inputs.get(name, [])} for name in ("EasyRefApply", "EasyRefDemo")}
    (folder / "object_info.json").write_text(json.dumps(schemas))


@pytest.mark.parametrize("name", ["try_it_now.jpg", "EasyRefDemo_result.jpg"])
def test_digest_of_a_run_follows_the_workflow_and_the_schemas(sources, name: str) -> None:
    first = pictures.digest(sources / name)
    write_schemas(sources, EasyRefDemo=[1])
    assert pictures.digest(sources / name) == first  # a node that the workflow does not have
    write_schemas(sources, EasyRefApply=[1])
    second = pictures.digest(sources / name)
    (sources / "try_it_now.json").write_text(
        json.dumps({"nodes": [{"type": "EasyRefApply", "size": [1, 2]}]})
    )
    assert len({first, second, pictures.digest(sources / name)}) == 3


def test_digest_of_a_node_follows_its_schema(sources) -> None:
    first = pictures.digest(sources / "EasyRefDemo.png")
    write_schemas(sources, EasyRefApply=[1])
    assert pictures.digest(sources / "EasyRefDemo.png") == first
    write_schemas(sources, EasyRefDemo=[1])
    assert pictures.digest(sources / "EasyRefDemo.png") != first
