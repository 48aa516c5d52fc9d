"""Benchmarks from folders and from procedural groups; duplicates and leaks are refused."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image, ImageEnhance

from easyref_core.inspect.duplicates import fingerprint, first_of_each, perceptual_hash
from easyref_core.mrbench.__main__ import main
from easyref_core.mrbench.builder import from_folder, from_groups, split_topics
from easyref_core.mrbench.leaks import leaks
from easyref_core.mrbench.manifest import Attributes, Group, read_manifest, usable, write_manifest
from easyref_core.mrbench.training_rows import GROUPS, SINGLE
from easyref_core.training.rows import read_rows

from .benchmarks import benchmark, error_of, group, image, save


def topics(folder: Path, *sizes: int) -> Path:
    """A folder of topics a, b, ... with captioned images, as many as `sizes` says."""
    for number, (topic, size) in enumerate(zip("abcdefgh", sizes, strict=False)):
        for i in range(size):
            save(image(100 * number + i), folder / topic / f"{i}.png")
            (folder / topic / f"{i}.txt").write_text(f"picture {i} of {topic}\n")
    return folder


def files_of(group: Group) -> list[Path]:
    return [*group.references, group.target]


def test_every_image_is_used_once(tmp_path: Path) -> None:
    manifest, exclusions, _ = from_folder(topics(tmp_path, 7, 5), references=(2, 3))
    files = [file for one in manifest.groups for file in files_of(one)]
    assert len(files) == len(set(files)) == 7 + 4
    assert [len(one.references) for one in manifest.groups] == [3, 2, 3]
    assert [str(e) for e in exclusions] == ["topic b: 1 images left over; a group takes at least 3"]


def test_a_group_has_one_topic_and_the_targets_caption(tmp_path: Path) -> None:
    for one in from_folder(topics(tmp_path, 4, 4)).manifest.groups:
        assert {file.parent for file in one.references} == {one.target.parent}
        *captions, prompt = (file.with_suffix(".txt").read_text().strip() for file in files_of(one))
        assert (one.captions, one.prompt) == (tuple(captions), prompt)


def test_a_topic_is_in_one_split(tmp_path: Path) -> None:
    groups = from_folder(topics(tmp_path, 6, 6, 6, 6), references=(2, 2)).manifest.groups
    pairs = {(one.target.parent.name, one.split) for one in groups}
    assert sorted(split for _, split in pairs) == ["held-in"] * 2 + ["held-out"] * 2


def test_the_build_depends_on_the_seed(tmp_path: Path) -> None:
    topics(tmp_path, 6, 6, 6)
    first, again, other = (from_folder(tmp_path, seed=seed).manifest for seed in (1, 1, 2))
    assert first == again
    assert first.groups != other.groups


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.01, 1), (0.5, 2), (0.99, 3), (1.0, 4)])
def test_no_split_is_empty_between_0_and_1(fraction: float, count: int) -> None:
    assert list(split_topics("abcd", fraction, seed=0).values()).count("held-out") == count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": 1.5}, "held_out is 1.5; wanted a fraction of the topics, 0 to 1."),
        ({"references": (3, 2)}, "references is (3, 2); wanted the minimum and the maximum"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict, message: str, tmp_path: Path) -> None:
    assert message in error_of(lambda: from_folder(tmp_path, **options))


def test_a_built_manifest_can_be_read(tmp_path: Path) -> None:
    manifest = from_folder(topics(tmp_path, 4, 4)).manifest
    write_manifest(manifest, tmp_path / "manifest.json")
    assert read_manifest(tmp_path / "manifest.json") == manifest


def test_captions_and_categories_from_metadata(tmp_path: Path) -> None:
    folder = topics(tmp_path, 3)
    lines = [{"file_name": f"a/{i}.png", "text": f"caption {i}", "category": "style"} for i in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (only,) = from_folder(folder).manifest.groups
    assert only.category == "style"
    assert only.prompt == f"caption {only.target.stem}"


def test_captions_written_on_windows(tmp_path: Path) -> None:
    """With a byte order mark and CRLF; U+2028 does not end a JSON line."""
    folder, mark = topics(tmp_path, 3, 3), b"\xef\xbb\xbf"
    lines = [f'{{"file_name": "a/{i}.png", "text": "one\u2028two {i}"}}\r\n'.encode() for i in range(3)]
    (folder / "metadata.jsonl").write_bytes(mark + b"".join(lines))
    for i in range(3):
        (folder / "b" / f"{i}.txt").write_bytes(mark + f"Größe {i}\r\n".encode())
    prompts = {one.prompt[:-2] for one in from_folder(folder).manifest.groups}
    assert prompts == {"one\u2028two", "Größe"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file": "1.png", "text": "x"}', "lacks file_name."),
        ('{"file_name": "1.png", "text": 3}', ": text is 3; wanted a string."),
        ("[1]", "is [1]; wanted an object with the keys category, file_name, text."),
        ("x", "is not JSON: "),
    ],
)
def test_the_error_for_metadata_names_the_line(line: str, message: str, tmp_path: Path) -> None:
    file = topics(tmp_path, 3) / "a" / "metadata.jsonl"
    file.write_text('{"file_name": "0.png", "text": "x"}\n' + line)
    assert re.match(
        re.escape(f"{file} line 2") + " ?" + re.escape(message), error_of(lambda: from_folder(tmp_path))
    )


def test_broken_and_uncaptioned_images_are_excluded(tmp_path: Path) -> None:
    folder = topics(tmp_path, 5)
    (folder / "a" / "0.png").write_text("not an image")
    (folder / "a" / "1.txt").unlink()
    manifest, exclusions, _ = from_folder(folder)
    assert len(manifest.groups[0].references) == 2
    assert [(e.what, Path(e.name).name) for e in exclusions] == [("picture", "1.png"), ("picture", "0.png")]


@pytest.mark.parametrize(
    "name", ["a/more/0.png", "a/more/more/0.gif", "a/x.heic", "0.png", "0.avif", "a/0.avif.part"]
)
def test_images_in_other_places_and_formats_are_listed(name: str, tmp_path: Path, capsys) -> None:
    folder = topics(tmp_path, 4)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"")
    (folder / "a" / ".hidden").write_bytes(b"")
    (folder / "notes.txt").write_text("read me")
    assert main(["build", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert f"1 excluded:\n  {'file' if name.endswith('part') else 'picture'} {folder / name}: " in printed


def test_a_flat_folder_is_refused(tmp_path: Path) -> None:
    topics(tmp_path, 3)
    text = error_of(lambda: from_folder(tmp_path / "a"))
    assert text == (
        f"{tmp_path / 'a'} has 3 images and no subfolder with images; wanted a subfolder for each topic. "
        "Move the images of each topic into a folder of its own, or use --single, which needs no topics."
    )


def test_the_error_without_a_group_lists_what_was_left_out(tmp_path: Path) -> None:
    topics(tmp_path / "deep", 3)
    text = error_of(lambda: from_folder(tmp_path))
    assert "it is in a folder inside topic deep" in text


def test_single_images_are_their_own_reference(tmp_path: Path) -> None:
    folder = topics(tmp_path, 2)
    for i in range(2):
        (folder / "a" / f"{i}.png").rename(folder / f"{i}.png")
        (folder / "a" / f"{i}.txt").rename(folder / f"{i}.txt")
    topics(tmp_path, 0, 3)
    manifest, exclusions, training = from_folder(folder, single=True)
    assert (len(manifest.groups), exclusions, training) == (5, (), ((), ()))
    assert all(one.is_single and one.captions == (one.prompt,) for one in manifest.groups)
    assert [one.topic for one in manifest.groups] == ["0", "1", "b", "b", "b"]
    write_manifest(manifest, tmp_path / "manifest.json")
    assert read_manifest(tmp_path / "manifest.json") == manifest
    assert leaks(manifest) == []


def test_training_rows_are_of_the_held_in_images_without_targets(tmp_path: Path) -> None:
    assert main(["build", str(topics(tmp_path, 9, 9, 9, 9)), "--references", "2", "3"]) == 0
    manifest = read_manifest(tmp_path / "manifest.json")
    held_in = {one.topic for one in manifest.groups if one.split == "held-in"}
    targets = {one.target for one in manifest.groups}
    assert len(held_in) == 2
    for name, references in ((SINGLE, {1}), (GROUPS, {2, 3})):
        rows = read_rows(tmp_path / name, tmp_path, thorough=True)
        files = {tmp_path / row.target for row in rows}
        assert len(files) == len(rows) == 2 * (9 - 2)  # of each topic, all but two targets
        assert {file.parent.name for file in files} == held_in
        assert not targets & {tmp_path / file for row in rows for file in (row.target, *row.references)}
        assert {len(row.references) for row in rows} == references
        assert rows[0].texts == ((tmp_path / rows[0].target).with_suffix(".txt").read_text().strip(),)


@pytest.mark.parametrize(
    ("suffix", "kind"), [("jfif", "JPEG"), ("gif", "GIF"), ("tga", "TGA"), ("jp2", "JPEG2000")]
)
def test_every_format_with_a_pillow_reader_is_used(tmp_path: Path, suffix: str, kind: str) -> None:
    folder = topics(tmp_path, 3)
    image(7).save(folder / "a" / f"more.{suffix}", format=kind)
    (folder / "a" / "more.txt").write_text("one more")
    (only,) = from_folder(folder).manifest.groups
    assert {file.name for file in files_of(only)} == {f"more.{suffix}", "0.png", "1.png", "2.png"}


def test_formats_without_a_pillow_reader_are_excluded(tmp_path: Path) -> None:
    folder = topics(tmp_path, 3)
    (folder / "a" / "more.jxl").write_bytes(b"another format")
    (folder / "a" / "more.txt").write_text("one more")
    (exclusion,) = from_folder(folder).exclusions
    assert Path(exclusion.name).name == "more.jxl"
    assert exclusion.reason == "Pillow has no reader for .jxl files here"


def test_too_few_images_and_missing_folders_are_named(tmp_path: Path) -> None:
    text = error_of(lambda: from_folder(topics(tmp_path, 2)))
    assert "has enough usable images; wanted 3 images, one target and 2 references, each with" in text
    assert "There is no folder" in error_of(lambda: from_folder(tmp_path / "none"), FileNotFoundError)


# Duplicates


def jpeg(image: Image.Image) -> Image.Image:
    content = io.BytesIO()
    image.save(content, "JPEG", quality=70)
    return Image.open(content).convert("RGB")


@pytest.mark.parametrize(
    ("change", "near"),
    [
        (jpeg, True),
        (lambda image: image.resize((48, 48), Image.Resampling.BICUBIC), True),
        (lambda image: ImageEnhance.Brightness(image).enhance(1.05), True),
        (lambda _: image(99), False),
        (lambda image: Image.merge("RGB", image.split()[::-1]), False),  # other colours
    ],
)
def test_near_duplicates(change: Callable[[Image.Image], Image.Image], near: bool) -> None:
    prints = {Path("a"): fingerprint(image(0)), Path("b"): fingerprint(change(image(0)))}
    assert first_of_each(prints) == ({Path("b"): Path("a")} if near else {})
    assert first_of_each(prints, near=False) == {}


def test_hashes_of_unrelated_images_differ() -> None:
    hashes = [perceptual_hash(image(seed)) for seed in range(40)]
    distances = [int((a ^ b).sum()) for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(distances) > 12


def test_duplicates_are_refused_by_name(tmp_path: Path) -> None:
    folder = topics(tmp_path, 4, 4)
    save(image(0), folder / "a" / "3.png")  # the same as a/0.png
    save(jpeg(image(1)), folder / "b" / "2.png")  # nearly a/1.png
    text = error_of(lambda: from_folder(folder))
    assert text.startswith("The folder has duplicate images. 2 pairs:\n  inside topic a")
    assert f"{folder / 'a/0.png'} and {folder / 'a/3.png'} (the same pixels)" in text
    assert "held-in and held-out, topics a and b: " in text
    assert f"{folder / 'a/1.png'} and {folder / 'b/2.png'} (near-duplicates, " in text
    assert "--drop-duplicates" in text


def test_duplicates_are_dropped_on_request(tmp_path: Path) -> None:
    folder = topics(tmp_path, 4, 4)
    save(image(0), folder / "b" / "3.png")
    manifest, exclusions, _ = from_folder(folder, drop_duplicates=True)
    assert [str(e) for e in exclusions] == [f"picture {folder / 'b/3.png'}: it repeats {folder / 'a/0.png'}"]
    assert leaks(manifest) == []


# Leaks

BOTH_SPLITS = "held-in and held-out share an image, groups g0 and g1: "
SHARED = {"references": ["g0/0.png"]}


@pytest.mark.parametrize(
    ("second", "replaced", "expected"),
    [
        (group(1), "g0/target.png", "group g0's target is among its references: "),
        (group(1, split="held-in"), "g1/0.png", BOTH_SPLITS),
        (group(1, split="held-in") | SHARED, None, BOTH_SPLITS),
        (group(1) | SHARED, None, None),  # a reference in two groups of a split
    ],
)
def test_leaks(second: dict, replaced: str | None, expected: str | None, tmp_path: Path) -> None:
    file = benchmark(tmp_path, [group(0), second])
    if replaced:
        save(jpeg(image(0)), tmp_path / replaced)
    found = leaks(read_manifest(file))
    assert len(found) == (expected is not None)
    assert all(leak.startswith(expected) for leak in found)


# Procedural groups


def procedural(target: Image.Image, *references: Image.Image) -> SimpleNamespace:
    named = {"prompt": "a red thing", "shared": {"shape": "circle"}, "named": {"colour": "red"}}
    return SimpleNamespace(references=references, target=target, **named)


def test_procedural_groups_become_a_benchmark(tmp_path: Path) -> None:
    groups = [
        ("held-in", "plain", procedural(*map(image, (0, 1, 2)))),
        ("held-out", "outsider", procedural(*map(image, (3, 4, 5, 6)))),
    ]
    from_groups(tmp_path, groups, "made", seed=5)
    manifest = read_manifest(tmp_path / "manifest.json")
    assert (manifest.name, manifest.seed) == ("made", 5)
    assert usable(manifest) == (manifest, ())
    first, second = manifest.groups
    assert (first.id, first.split, first.category) == ("held-in-0000", "held-in", "plain")
    assert len(second.references) == 3
    assert first.attributes == Attributes({"shape": "circle"}, {"colour": "red"})
    assert Image.open(second.target).tobytes() == image(3).tobytes()


def test_procedural_groups_that_leak_are_refused(tmp_path: Path) -> None:
    groups = [
        ("held-in", "plain", procedural(*map(image, (0, 1, 2)))),
        ("held-out", "plain", procedural(*map(image, (3, 1, 4)))),
    ]
    text = error_of(lambda: from_groups(tmp_path, groups))
    assert text.startswith("The procedural groups leak. 1 pairs:\n  held-in and held-out share an image")
    assert not (tmp_path / "manifest.json").exists()


def test_procedural_images_may_be_near_duplicates(tmp_path: Path) -> None:
    from_groups(tmp_path, [("held-out", "plain", procedural(image(0), jpeg(image(0)), image(2)))])
    assert read_manifest(tmp_path / "manifest.json").groups
