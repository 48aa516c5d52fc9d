"""A manifest is validated strictly: errors name group and reason; broken images are excluded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from easyref_core.mrbench.images import describe
from easyref_core.mrbench.manifest import Attributes, Manifest, read_manifest, usable, write_manifest

from .benchmarks import benchmark, error_of, group, write

ATTRIBUTES = {"shared": {"shape": "circle"}, "named": {"background": "sand"}}


def test_fields_and_paths(tmp_path: Path) -> None:
    manifest = read_manifest(write(tmp_path, [group(0, attributes=ATTRIBUTES, captions=["one", "two"])]))
    (only,) = manifest.groups
    assert (manifest.name, manifest.seed) == ("small", 7)
    assert only.references == (tmp_path / "g0/0.png", tmp_path / "g0/1.png")
    assert only.target == tmp_path / "g0/target.png"
    assert only.attributes == Attributes({"shape": "circle"}, {"background": "sand"})
    assert only.captions == ("one", "two")


def test_writing_and_reading_changes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, [group(0, attributes=ATTRIBUTES), group(1, split="held-in", captions=["a", "b"])])
    manifest, data = read_manifest(path), json.loads(path.read_text())
    write_manifest(manifest, path)
    assert read_manifest(path) == manifest
    assert json.loads(path.read_text()) == data


def test_a_group_without_a_topic_is_its_own(tmp_path: Path) -> None:
    path = write(tmp_path, [group(0), group(1, topic="cats"), group(2, topic="cats")])
    assert [one.topic for one in read_manifest(path).groups] == ["g0", "cats", "cats"]
    data = json.loads(path.read_text())
    write_manifest(read_manifest(path), path)
    assert json.loads(path.read_text()) == data


def test_a_single_image_is_its_own_reference(tmp_path: Path) -> None:
    (only,) = read_manifest(write(tmp_path, [group(0, references=1, target="g0/0.png")])).groups
    assert only.is_single


def test_a_manifest_can_be_outside_its_images_folder(tmp_path: Path) -> None:
    manifest = read_manifest(write(tmp_path, [group(0)]))
    write_manifest(manifest, tmp_path / "elsewhere" / "manifest.json")
    written = json.loads((tmp_path / "elsewhere" / "manifest.json").read_text())
    assert written["groups"][0]["target"] == "../g0/target.png"


def without(data: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in data.items() if k != key}


KEYS = "attributes, captions, category, id, prompt, references, split, target, topic."
WRONG: list[tuple[Any, str]] = [
    (without(group(1), "prompt"), "Group 'g1' lacks prompt."),
    (without(group(1), "id"), "Group 1 (counted from 0) lacks id."),
    (group(1, weight=2), f"Group 'g1' has unknown keys: weight. Known are {KEYS}"),
    (group(1, split="test"), "Group 'g1': split is 'test'; wanted 'held-in' or 'held-out'."),
    (group(1, references=0), "Group 'g1': references is empty; wanted at least one image."),
    (group(1) | {"references": "a.png"}, "Group 'g1': references is 'a.png'; wanted a list."),
    (group(1) | {"references": [3]}, "Group 'g1': references is 3; wanted a string."),
    (group(1, prompt=None), "Group 'g1': prompt is None; wanted a string."),
    (group(1, category=""), 'Group \'g1\': category is empty; wanted a word, such as "style" or "identity".'),
    (
        group(1, target="/pictures/a.png"),
        "Group 'g1': target has '/pictures/a.png'; wanted a path relative to the manifest.",
    ),
    (group(1, target="g1/0.png"), "Group 'g1': its target g1/0.png is also one of its references."),
    (group(1) | {"references": ["a.png", "a.png"]}, "Group 'g1': it names one reference twice."),
    (
        group(1, id="../g"),
        "Group '../g': its id is a folder name; wanted letters, digits, '.', '_' and '-', the first of them "
        "a letter or digit.",
    ),
    (group(1, captions=["one"]), "Group 'g1' has 1 captions for 2 references; wanted one for each."),
    (group(1, captions=["one", 2]), "Group 'g1', captions: one of them is 2; wanted a string."),
    (group(1, attributes={"shared": {}}), "Group 'g1', attributes lacks named."),
    (
        group(1, attributes={"shared": {"shape": 1}, "named": {}}),
        "Group 'g1', attributes, shared: shape is 1; wanted a string.",
    ),
    (
        group(1, topic="g0", split="held-in"),
        "Manifest manifest.json: topic 'g0' is in both splits; wanted all groups of a topic in one, because "
        "a method may have been trained on the topics of held-in.",
    ),
    (["g1"], f"Group 1 (counted from 0) is ['g1']; wanted an object with the keys {KEYS}"),
    (group(1, id="G0"), "Manifest manifest.json has more than one group 'g0'. Give every group its own id."),
]


@pytest.mark.parametrize(("data", "message"), WRONG)
def test_the_error_names_the_group_and_the_reason(data: Any, message: str, tmp_path: Path) -> None:
    assert error_of(lambda: read_manifest(write(tmp_path, [group(0), data]))) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": "7"}, "Manifest manifest.json: seed is '7'; wanted a whole number."),
        ({"seed": True}, "Manifest manifest.json: seed is True; wanted a whole number."),
        ({"groups": []}, "Manifest manifest.json has no groups; wanted at least one."),
        ({"version": 1}, "Manifest manifest.json has unknown keys: version. Known are groups, name, seed."),
    ],
)
def test_a_wrong_manifest_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert error_of(lambda: read_manifest(write(tmp_path, [group(0)], **changes))) == message


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    assert "manifest.json is not JSON" in error_of(lambda: read_manifest(tmp_path / "manifest.json"))


def test_the_error_for_a_missing_file_names_the_command(tmp_path: Path) -> None:
    text = error_of(lambda: read_manifest(tmp_path / "none.json"), FileNotFoundError)
    assert "none.json" in text
    assert "mrbench build" in text


def read_benchmark(folder: Path, *groups: dict[str, Any]) -> Manifest:
    return read_manifest(benchmark(folder, groups))


def test_intact_images_are_all_usable(tmp_path: Path) -> None:
    manifest = read_benchmark(tmp_path, group(0), group(1))
    assert usable(manifest) == (manifest, ())
    assert describe(()) == ""


def test_a_broken_reference_is_dropped_from_its_group(tmp_path: Path) -> None:
    manifest = read_benchmark(tmp_path, group(0, references=3, captions=["a", "b", "c"]))
    file = tmp_path / "g0/1.png"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    left, (exclusion,) = usable(manifest)
    assert [file.name for file in left.groups[0].references] == ["0.png", "2.png"]
    assert left.groups[0].captions == ("a", "c")
    assert (exclusion.what, exclusion.name) == ("reference", f"{file} of group g0")
    assert exclusion.reason.startswith("it cannot be decoded as an image (")


def test_a_group_without_its_target_is_dropped(tmp_path: Path) -> None:
    manifest = read_benchmark(tmp_path, group(0), group(1))
    (tmp_path / "g0/target.png").unlink()
    left, exclusions = usable(manifest)
    assert [one.id for one in left.groups] == ["g1"]
    assert describe(exclusions) == (
        "2 excluded:\n"
        f"  target {tmp_path / 'g0/target.png'} of group g0: there is no such file\n"
        "  group g0: its target is missing or broken"
    )


def test_a_group_without_any_reference_is_dropped(tmp_path: Path) -> None:
    manifest = read_benchmark(tmp_path, group(0))
    for i in range(2):
        (tmp_path / f"g0/{i}.png").write_text("not an image")
    left, exclusions = usable(manifest)
    assert left.groups == ()
    assert str(exclusions[-1]) == "group g0: none of its references can be loaded"
