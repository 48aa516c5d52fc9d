"""A manifest is read strictly: what is wrong is named by group and reason; broken pictures are named and left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from easyref_core.mrbench.images import describe
from easyref_core.mrbench.manifest import Attributes, read_manifest, usable, write_manifest

from .benchmarks import benchmark, error_of, group, write

ATTRIBUTES = {"shared": {"shape": "circle"}, "named": {"background": "sand"}}


def test_reads_what_it_says(tmp_path: Path) -> None:
    manifest = read_manifest(write(tmp_path, [group(0, attributes=ATTRIBUTES, captions=["one", "two"])]))
    (only,) = manifest.groups
    assert (manifest.name, manifest.seed) == ("small", 7)
    assert only.references == (tmp_path / "g0/0.png", tmp_path / "g0/1.png")
    assert only.target == tmp_path / "g0/target.png"
    assert only.attributes == Attributes({"shape": "circle"}, {"background": "sand"})
    assert only.captions == ("one", "two")


def test_written_and_read_again_is_the_same(tmp_path: Path) -> None:
    path = write(tmp_path, [group(0, attributes=ATTRIBUTES), group(1, split="held-in", captions=["a", "b"])])
    manifest = read_manifest(path)
    write_manifest(manifest, path)
    assert read_manifest(path) == manifest


def test_may_lie_beside_its_pictures_folder(tmp_path: Path) -> None:
    manifest = read_manifest(write(tmp_path, [group(0)]))
    write_manifest(manifest, tmp_path / "elsewhere" / "manifest.json")
    written = json.loads((tmp_path / "elsewhere" / "manifest.json").read_text())
    assert written["groups"][0]["target"] == "../g0/target.png"


def without(data: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in data.items() if k != key}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "missing key": (without(group(1), "prompt"), "Group 'g1' lacks prompt."),
    "no id": (without(group(1), "id"), "Group 1 (counted from 0) lacks id."),
    "unknown key": (
        group(1, weight=2),
        "Group 'g1' has unknown keys: weight. Known are attributes, captions, category, id, prompt, references, "
        "split, target.",
    ),
    "bad split": (group(1, split="test"), "Group 'g1': split is 'test'; wanted 'held-in' or 'held-out'."),
    "no reference": (group(1, references=0), "Group 'g1': references is empty; wanted at least one picture."),
    "references no list": (
        group(1) | {"references": "a.png"},
        "Group 'g1': references is 'a.png'; wanted a list.",
    ),
    "reference no string": (group(1) | {"references": [3]}, "Group 'g1': references is 3; wanted a string."),
    "prompt no string": (group(1, prompt=None), "Group 'g1': prompt is None; wanted a string."),
    "empty category": (
        group(1, category=""),
        'Group \'g1\': category is empty; wanted a word, such as "style" or "identity".',
    ),
    "absolute path": (
        group(1, target="/pictures/a.png"),
        "Group 'g1': target has '/pictures/a.png'; wanted a path relative to the manifest.",
    ),
    "target among references": (
        group(1, target="g1/0.png"),
        "Group 'g1': its target g1/0.png is also one of its references.",
    ),
    "a reference twice": (
        group(1) | {"references": ["a.png", "a.png"]},
        "Group 'g1': it names one reference twice.",
    ),
    "id no folder": (
        group(1, id="../g"),
        "Group '../g': its id names a folder; wanted letters, digits, '.', '_' and '-', the first a letter or digit.",
    ),
    "captions too few": (
        group(1, captions=["one"]),
        "Group 'g1' has 1 captions for 2 references; wanted one of each.",
    ),
    "half the attributes": (group(1, attributes={"shared": {}}), "Group 'g1', attributes lacks named."),
    "attribute no string": (
        group(1, attributes={"shared": {"shape": 1}, "named": {}}),
        "Group 'g1', attributes, shared: shape is 1; wanted a string.",
    ),
    "no object": (["g1"], "Group 1 (counted from 0) is ['g1']; wanted an object."),
    "id twice": (
        group(1, id="G0"),
        "Manifest manifest.json has more than one group 'g0'. Give every group an id of its own.",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_group_is_named_with_the_reason(wrong: str, tmp_path: Path) -> None:
    data, message = WRONG[wrong]
    assert error_of(lambda: read_manifest(write(tmp_path, [group(0), data]))) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": "7"}, "Manifest manifest.json: seed is '7'; wanted a whole number."),
        ({"seed": True}, "Manifest manifest.json: seed is True; wanted a whole number."),
        ({"groups": []}, "Manifest manifest.json holds no group."),
        ({"version": 1}, "Manifest manifest.json has unknown keys: version. Known are groups, name, seed."),
    ],
)
def test_a_wrong_manifest_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert error_of(lambda: read_manifest(write(tmp_path, [group(0)], **changes))) == message


def test_no_json(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    assert "manifest.json is not JSON" in error_of(lambda: read_manifest(tmp_path / "manifest.json"))


def test_no_file(tmp_path: Path) -> None:
    text = error_of(lambda: read_manifest(tmp_path / "none.json"), FileNotFoundError)
    assert "none.json" in text
    assert "mrbench build" in text


def test_whole_pictures_are_all_usable(tmp_path: Path) -> None:
    manifest = read_manifest(benchmark(tmp_path, [group(0), group(1)]))
    assert usable(manifest) == (manifest, ())
    assert describe(()) == ""


def test_a_broken_reference_leaves_its_group(tmp_path: Path) -> None:
    manifest = read_manifest(benchmark(tmp_path, [group(0, references=3, captions=["a", "b", "c"])]))
    whole = (tmp_path / "g0/1.png").read_bytes()
    (tmp_path / "g0/1.png").write_bytes(whole[: len(whole) // 2])
    left, exclusions = usable(manifest)
    assert [file.name for file in left.groups[0].references] == ["0.png", "2.png"]
    assert left.groups[0].captions == ("a", "c")
    assert [(e.what, e.name) for e in exclusions] == [("reference", f"{tmp_path / 'g0/1.png'} of group g0")]
    assert exclusions[0].reason.startswith("it cannot be read as a picture (")


def test_a_group_without_its_target_leaves(tmp_path: Path) -> None:
    manifest = read_manifest(benchmark(tmp_path, [group(0), group(1)]))
    (tmp_path / "g0/target.png").unlink()
    left, exclusions = usable(manifest)
    assert [one.id for one in left.groups] == ["g1"]
    assert describe(exclusions) == (
        "2 excluded:\n"
        f"  target {tmp_path / 'g0/target.png'} of group g0: there is no such file\n"
        "  group g0: its target is missing or broken"
    )


def test_a_group_without_any_reference_leaves(tmp_path: Path) -> None:
    manifest = read_manifest(benchmark(tmp_path, [group(0)]))
    for i in range(2):
        (tmp_path / f"g0/{i}.png").write_text("no picture")
    left, exclusions = usable(manifest)
    assert left.groups == ()
    assert str(exclusions[-1]) == "group g0: none of its references can be read"
