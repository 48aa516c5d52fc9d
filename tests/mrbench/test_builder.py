"""Benchmarks made from folders and from groups; what repeats or leaks is refused."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from PIL import Image, ImageEnhance

from easyref_core.inspect.duplicates import fingerprint, first_of_each, perceptual_hash
from easyref_core.mrbench.builder import from_folder, from_groups, split_topics
from easyref_core.mrbench.leaks import leaks
from easyref_core.mrbench.manifest import Attributes, read_manifest, usable, write_manifest

from .benchmarks import benchmark, error_of, group, picture, save


def topics(folder: Path, *sizes: int) -> Path:
    """A folder of topics a, b, ... with so many captioned pictures."""
    for number, size in enumerate(sizes):
        topic = "abcdefgh"[number]
        for i in range(size):
            save(picture(100 * number + i), folder / topic / f"{i}.png")
            (folder / topic / f"{i}.txt").write_text(f"picture {i} of {topic}\n")
    return folder


def test_every_picture_is_used_once(tmp_path: Path) -> None:
    manifest, exclusions = from_folder(topics(tmp_path, 7, 5), references=(2, 3))
    files = [file for one in manifest.groups for file in (*one.references, one.target)]
    assert len(files) == len(set(files)) == 7 + 4
    assert [len(one.references) for one in manifest.groups] == [3, 2, 3]
    assert [str(e) for e in exclusions] == ["topic b: 1 images left over; a group takes at least 3"]


def test_a_group_is_of_one_topic_and_its_prompt_is_the_targets(tmp_path: Path) -> None:
    for one in from_folder(topics(tmp_path, 4, 4)).manifest.groups:
        assert {file.parent for file in one.references} == {one.target.parent}
        assert one.prompt == one.target.with_suffix(".txt").read_text().strip()
        assert one.captions == tuple(file.with_suffix(".txt").read_text().strip() for file in one.references)


def test_a_topic_is_in_one_split(tmp_path: Path) -> None:
    groups = from_folder(topics(tmp_path, 6, 6, 6, 6), references=(2, 2)).manifest.groups
    splits: dict[str, set[str]] = {}
    for one in groups:
        splits.setdefault(one.target.parent.name, set()).add(one.split)
    assert sorted(map(len, splits.values())) == [1, 1, 1, 1]
    assert sorted(split for own in splits.values() for split in own) == ["held-in"] * 2 + ["held-out"] * 2


def test_the_seed_decides(tmp_path: Path) -> None:
    topics(tmp_path, 6, 6, 6)
    first, again, other = (from_folder(tmp_path, seed=seed).manifest for seed in (1, 1, 2))
    assert first == again
    assert first.groups != other.groups


@pytest.mark.parametrize(("part", "away"), [(0.0, 0), (0.01, 1), (0.5, 2), (0.99, 3), (1.0, 4)])
def test_both_splits_get_a_topic_where_both_are_asked_for(part: float, away: int) -> None:
    assert list(split_topics("abcd", part, seed=0).values()).count("held-out") == away


def test_the_manifest_reads_back(tmp_path: Path) -> None:
    made = from_folder(topics(tmp_path, 4, 4)).manifest
    write_manifest(made, tmp_path / "manifest.json")
    assert read_manifest(tmp_path / "manifest.json") == made


def test_captions_and_categories_from_metadata(tmp_path: Path) -> None:
    folder = topics(tmp_path, 3)
    lines = [{"file_name": f"a/{i}.png", "text": f"caption {i}", "category": "style"} for i in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (only,) = from_folder(folder).manifest.groups
    assert only.category == "style"
    assert only.prompt == f"caption {only.target.stem}"


def test_captions_that_windows_wrote(tmp_path: Path) -> None:
    """A mark before the text, and line ends of two characters; U+2028 is no line end of JSON lines."""
    folder, mark = topics(tmp_path, 3, 3), b"\xef\xbb\xbf"
    lines = [f'{{"file_name": "a/{i}.png", "text": "one\u2028two {i}"}}\r\n'.encode() for i in range(3)]
    (folder / "metadata.jsonl").write_bytes(mark + b"".join(lines))
    for i in range(3):
        (folder / "b" / f"{i}.txt").write_bytes(mark + f"Größe {i}\r\n".encode())
    prompts = {one.prompt[:-2] for one in from_folder(folder).manifest.groups}
    assert prompts == {"one\u2028two", "Größe"}


def test_a_wrong_line_of_metadata_is_named(tmp_path: Path) -> None:
    folder = topics(tmp_path, 3)
    (folder / "a" / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "x"}\n{"file": "1.png"}\n')
    text = error_of(lambda: from_folder(folder))
    assert text == (
        f"{folder / 'a' / 'metadata.jsonl'} line 2 is "
        '{"file": "1.png"}; wanted an object of file_name, text and, if wanted, category.'
    )


def test_broken_and_uncaptioned_pictures_are_named_and_left_out(tmp_path: Path) -> None:
    folder = topics(tmp_path, 5)
    (folder / "a" / "0.png").write_text("no picture")
    (folder / "a" / "1.txt").unlink()
    manifest, exclusions = from_folder(folder)
    assert len(manifest.groups[0].references) == 2
    assert [(e.what, Path(e.name).name) for e in exclusions] == [("picture", "1.png"), ("picture", "0.png")]


@pytest.mark.parametrize(
    ("suffix", "kind"), [("jfif", "JPEG"), ("gif", "GIF"), ("tga", "TGA"), ("jp2", "JPEG2000")]
)
def test_every_format_that_pillow_reads_is_taken(tmp_path: Path, suffix: str, kind: str) -> None:
    folder = topics(tmp_path, 3)
    picture(7).save(folder / "a" / f"more.{suffix}", format=kind)
    (folder / "a" / "more.txt").write_text("one more")
    (only,) = from_folder(folder).manifest.groups
    assert {f"more.{suffix}", "0.png", "1.png", "2.png"} == {
        file.name for file in (*only.references, only.target)
    }


def test_images_that_pillow_cannot_read_are_named(tmp_path: Path) -> None:
    folder = topics(tmp_path, 3)
    (folder / "a" / "more.jxl").write_bytes(b"of another kind")
    (folder / "a" / "more.txt").write_text("one more")
    _, (left_out,) = from_folder(folder)
    assert Path(left_out.name).name == "more.jxl"
    assert left_out.reason == "Pillow has no reader for .jxl files here"


def test_too_few_pictures(tmp_path: Path) -> None:
    assert "has 3 usable images" in error_of(lambda: from_folder(topics(tmp_path, 2)))


def test_no_such_folder(tmp_path: Path) -> None:
    assert "There is no folder" in error_of(lambda: from_folder(tmp_path / "none"), FileNotFoundError)


# Duplicates


def saved_again(image: Image.Image) -> Image.Image:
    content = io.BytesIO()
    image.save(content, "JPEG", quality=70)
    return Image.open(content).convert("RGB")


NEAR = {
    "saved again": saved_again,
    "larger": lambda image: image.resize((48, 48), Image.Resampling.BICUBIC),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.05),
}
FAR = {
    "another": lambda _: picture(99),
    "in other colours": lambda image: Image.merge("RGB", image.split()[::-1]),
}


@pytest.mark.parametrize("change", NEAR.values(), ids=NEAR)
def test_near_duplicates_are_found(change, tmp_path: Path) -> None:
    prints = {Path("a"): fingerprint(picture(0)), Path("b"): fingerprint(change(picture(0)))}
    assert first_of_each(prints) == {Path("b"): Path("a")}
    assert first_of_each(prints, near=False) == {}


@pytest.mark.parametrize("change", FAR.values(), ids=FAR)
def test_other_pictures_are_no_duplicates(change) -> None:
    prints = {Path("a"): fingerprint(picture(0)), Path("b"): fingerprint(change(picture(0)))}
    assert first_of_each(prints) == {}


def test_hashes_of_unrelated_pictures_lie_far_apart() -> None:
    hashes = [perceptual_hash(picture(seed)) for seed in range(40)]
    distances = [int((a ^ b).sum()) for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(distances) > 12


def test_duplicates_are_refused_by_name(tmp_path: Path) -> None:
    folder = topics(tmp_path, 4, 4)
    save(picture(0), folder / "a" / "3.png")  # the same as a/0.png
    save(saved_again(picture(1)), folder / "b" / "2.png")  # nearly a/1.png
    text = error_of(lambda: from_folder(folder))
    assert text.startswith("Pictures repeat each other. 2 pairs:\n  inside topic a")
    assert f"{folder / 'a/0.png'} and {folder / 'a/3.png'} (the same pixels)" in text
    assert "held-in and held-out, topics a and b: " in text
    assert f"{folder / 'a/1.png'} and {folder / 'b/2.png'} (near-duplicates, " in text
    assert "--drop-duplicates" in text


def test_duplicates_are_dropped_on_request(tmp_path: Path) -> None:
    folder = topics(tmp_path, 4, 4)
    save(picture(0), folder / "b" / "3.png")
    manifest, exclusions = from_folder(folder, drop_duplicates=True)
    assert [str(e) for e in exclusions] == [f"picture {folder / 'b/3.png'}: it repeats {folder / 'a/0.png'}"]
    assert leaks(manifest) == []


def test_a_target_among_its_references_leaks(tmp_path: Path) -> None:
    file = benchmark(tmp_path, [group(0), group(1)])
    save(saved_again(picture(0)), tmp_path / "g0/target.png")
    (leak,) = leaks(read_manifest(file))
    assert leak.startswith("group g0's target is among its references: ")


def test_one_picture_in_both_splits_leaks(tmp_path: Path) -> None:
    file = benchmark(tmp_path, [group(0), group(1, split="held-in")])
    save(picture(0), tmp_path / "g1/0.png")
    (leak,) = leaks(read_manifest(file))
    assert leak.startswith("held-in and held-out share a picture, groups g0 and g1: ")


def test_one_file_in_both_splits_leaks(tmp_path: Path) -> None:
    shared = group(1, split="held-in") | {"references": ["g0/0.png"]}
    (leak,) = leaks(read_manifest(benchmark(tmp_path, [group(0), shared])))
    assert leak.startswith("held-in and held-out share a picture, groups g0 and g1: ")


def test_one_reference_in_two_groups_of_a_split_is_no_leak(tmp_path: Path) -> None:
    shared = group(1) | {"references": ["g0/0.png"]}
    assert leaks(read_manifest(benchmark(tmp_path, [group(0), shared]))) == []


# Groups made by code


@dataclass
class Made:
    references: list[Image.Image]
    target: Image.Image
    prompt: str = "a red thing"
    shared: dict[str, str] = field(default_factory=lambda: {"shape": "circle"})
    named: dict[str, str] = field(default_factory=lambda: {"colour": "red"})


def made(*seeds: int) -> Made:
    target, *references = map(picture, seeds)
    return Made(references, target)


def test_made_groups_become_a_benchmark(tmp_path: Path) -> None:
    groups = [("held-in", "plain", made(0, 1, 2)), ("held-out", "outsider", made(3, 4, 5, 6))]
    from_groups(tmp_path, groups, "made", seed=5)
    manifest = read_manifest(tmp_path / "manifest.json")
    assert (manifest.name, manifest.seed) == ("made", 5)
    assert usable(manifest) == (manifest, ())
    first, second = manifest.groups
    assert (first.id, first.split, first.category) == ("held-in-0000", "held-in", "plain")
    assert len(second.references) == 3
    assert first.attributes == Attributes({"shape": "circle"}, {"colour": "red"})
    assert Image.open(second.target).tobytes() == picture(3).tobytes()


def test_made_groups_that_leak_are_refused(tmp_path: Path) -> None:
    groups = [("held-in", "plain", made(0, 1, 2)), ("held-out", "plain", made(3, 1, 4))]
    text = error_of(lambda: from_groups(tmp_path, groups))
    assert text.startswith("The made groups leak. 1 pairs:\n  held-in and held-out share a picture")
    assert not (tmp_path / "manifest.json").exists()


def test_made_pictures_may_resemble_each_other(tmp_path: Path) -> None:
    near = Made([saved_again(picture(0)), picture(2)], picture(0))
    from_groups(tmp_path, [("held-out", "plain", near)])
    assert read_manifest(tmp_path / "manifest.json").groups
