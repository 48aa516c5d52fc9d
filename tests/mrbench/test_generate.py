"""Painting a manifest end to end: what is written, what is skipped, what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from PIL import Image

from easyref_core.mrbench import generate as generating
from easyref_core.mrbench.generate import generate, jobs, read_config, run
from easyref_core.mrbench.manifest import Group, Manifest, write_manifest
from easyref_core.mrbench.methods import KINDS, Sampling, build
from easyref_core.mrbench.processes import Process

from . import tiny
from .tiny import PICTURE, picture

if TYPE_CHECKING:
    from easyref_core.training.base_model import BaseModel

    Entries = dict[str, dict[str, Any]]

SAMPLING = Sampling(size=PICTURE, steps=2, guidance=3.0, negative="")


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Two groups, of two and three references."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(7):
        picture(i).save(folder / f"{i}.png")

    def group(name: str, prompt: str, references: range, target: int) -> Group:
        files = tuple(folder / f"{i}.png" for i in references)
        return Group(name, files, folder / f"{target}.png", prompt, "subject", "held-out")

    groups = group("first", "a cat", range(2), 5), group("second", "a dog", range(2, 5), 6)
    return Manifest("tiny", 0, groups)


def files(folder: Path) -> dict[str, bytes]:
    """Every picture under a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


@pytest.mark.parametrize("name", tiny.ENTRIES)
def test_every_method_paints_the_manifest(
    name: str, base: BaseModel, entries: Entries, manifest: Manifest, tmp_path: Path
) -> None:
    method = build(name, entries[name], base)
    done = generate(manifest, method, name, tmp_path / "out", SAMPLING, seeds=[0, 1])
    assert (done.painted, done.kept, done.exclusions) == (4, 0, ())
    made = files(tmp_path / "out")
    assert list(made) == [f"{name}/{group}/{seed}.png" for group in ("first", "second") for seed in (0, 1)]
    assert len(set(made.values())) == 4
    with Image.open(tmp_path / "out" / name / "first" / "0.png") as painted:
        assert (painted.size, painted.mode) == ((PICTURE, PICTURE), "RGB")
    record = json.loads((tmp_path / "out" / name / "method.json").read_text())
    assert record["settings"]["kind"] == entries[name]["kind"]
    assert record["sampling"] == {"size": PICTURE, "steps": 2, "guidance": 3.0, "negative": ""}
    assert record["seeds"] == [0, 1]
    assert len(record["base"]) == 16


class TestPlain:
    """The simplest method, for what holds of all."""

    @pytest.fixture
    def paint(self, base: BaseModel, manifest: Manifest, tmp_path: Path):
        def paint(manifest: Manifest = manifest, **changes: Any) -> generating.Painted:
            settings = {"sampling": SAMPLING, "seeds": [0], "references": None} | changes
            method = build("plain", {"kind": "plain"}, base)
            return generate(manifest, method, "plain", tmp_path / "out", **settings)

        return paint

    def test_a_second_run_paints_nothing(self, paint: Any, tmp_path: Path) -> None:
        paint()
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png")}
        done = paint()
        assert (done.painted, done.kept) == (0, 2)
        assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png")}

    def test_a_missing_picture_is_painted_as_it_was(self, paint: Any, tmp_path: Path) -> None:
        paint(seeds=[0, 1], batch=1)
        before = files(tmp_path / "out")
        (tmp_path / "out/plain/first/1.png").unlink()
        done = paint(seeds=[0, 1], batch=1)
        assert (done.painted, done.kept) == (1, 3)
        assert files(tmp_path / "out") == before

    def test_half_a_file_does_not_count(
        self, paint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def dies(image: Image.Image, path: Path, **options: Any) -> None:
            path.write_bytes(b"half")
            raise KeyboardInterrupt

        with monkeypatch.context() as broken:
            broken.setattr(Image.Image, "save", dies)
            with pytest.raises(KeyboardInterrupt):
                paint()
        assert not files(tmp_path / "out")
        assert paint().painted == 2
        assert not list((tmp_path / "out").rglob("*.partial"))

    def test_more_seeds_and_groups_are_added(self, paint: Any, manifest: Manifest, tmp_path: Path) -> None:
        paint(dataclasses.replace(manifest, groups=manifest.groups[:1]))
        done = paint(seeds=[0, 2])
        assert (done.painted, done.kept) == (3, 1)
        record = json.loads((tmp_path / "out/plain/method.json").read_text())
        assert record["seeds"] == [0, 2]
        assert sorted(record["groups"]) == ["first", "second"]

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"sampling": dataclasses.replace(SAMPLING, steps=3)}, "sampling.steps was 2, now is 3"),
            (
                {"sampling": dataclasses.replace(SAMPLING, guidance=1.5)},
                "sampling.guidance was 3.0, now is 1.5",
            ),
            ({"references": 1}, "references was null, now is 1"),
        ],
    )
    def test_other_settings_are_refused_and_nothing_is_painted(
        self, paint: Any, tmp_path: Path, changes: dict[str, Any], named: str
    ) -> None:
        paint()
        before = files(tmp_path / "out"), (tmp_path / "out/plain/method.json").read_bytes()
        with pytest.raises(ValueError, match=f"{named}.*another name or output folder, or delete"):
            paint(seeds=[5], **changes)
        assert (files(tmp_path / "out"), (tmp_path / "out/plain/method.json").read_bytes()) == before

    def test_a_group_that_changed_is_refused(self, paint: Any, manifest: Manifest) -> None:
        paint()
        changed = dataclasses.replace(manifest.groups[1], prompt="a bird")
        with pytest.raises(ValueError, match=r"groups\.second was"):
            paint(dataclasses.replace(manifest, groups=(manifest.groups[0], changed)))

    def test_another_base_is_refused(self, paint: Any, base: BaseModel) -> None:
        import torch

        paint()
        weight = base.unet.conv_out.bias
        with torch.no_grad():
            weight[-1] += 1
            try:
                with pytest.raises(ValueError, match="base was "):
                    paint()
            finally:
                weight[-1] -= 1

    def test_broken_references_are_named_and_left_out(
        self, paint: Any, manifest: Manifest, tmp_path: Path
    ) -> None:
        manifest.groups[0].references[1].write_bytes(b"no picture")
        manifest.groups[1].target.unlink()
        done = paint()
        assert [path.split("/")[1] for path in files(tmp_path / "out")] == ["first"]
        assert {exclusion.what for exclusion in done.exclusions} == {"reference", "target", "group"}

    def test_processes_share_the_groups(
        self, paint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(generating, "this_process", lambda: Process(rank=1, count=2))
        paint()
        assert list(files(tmp_path / "out")) == ["plain/second/0.png"]
        monkeypatch.setattr(generating, "this_process", lambda: Process(rank=0, count=2))
        (tmp_path / "out/plain/second/0.png").unlink()
        paint()
        assert list(files(tmp_path / "out")) == ["plain/first/0.png"]


def test_fewer_references_can_be_shown(
    base: BaseModel, entries: Entries, manifest: Manifest, tmp_path: Path
) -> None:
    seen = []
    method = build("easyref", entries["easyref"], base)
    plain = method.prepare
    method.prepare = lambda task, folder: seen.append(len(task.references)) or plain(task, folder)
    generate(manifest, method, "easyref", tmp_path, SAMPLING, [0], references=2)
    assert seen == [2, 2]
    with pytest.raises(ValueError, match="references is 0; wanted 1 or more"):
        generate(manifest, method, "easyref", tmp_path, SAMPLING, [0], references=0)


def test_batches_hold_what_may_be_painted_together(
    base: BaseModel, entries: Entries, manifest: Manifest
) -> None:
    def sizes(name: str, batch: int) -> list[int]:
        missing = [(group, (0, 1)) for group in manifest.groups]
        return [len(tasks) for tasks, _ in jobs(missing, build(name, entries[name], base), batch)]

    assert sizes("plain", 4) == [2]
    assert sizes("plain", 3) == [1, 1]
    assert sizes("plain", 1) == [1, 1]  # a group's seeds are then painted one after the other
    assert sizes("ip_adapter_average", 4) == [2]
    assert sizes("ip_adapter_concatenation", 4) == [1, 1]
    assert sizes("lora", 4) == [1, 1]


class TestConfig:
    """The YAML file of a run."""

    @pytest.fixture
    def config(self, manifest: Manifest, tmp_path: Path) -> dict[str, Any]:
        write_manifest(manifest, tmp_path / "pictures" / "manifest.json")
        return {
            "base": "base",
            "manifest": "pictures/manifest.json",
            "out": "out",
            "seeds": [0],
            "sampling": {"size": PICTURE, "steps": 1},
            "methods": {"plain": {"kind": "plain"}, "other": {"kind": "plain"}},
        }

    def write(self, config: dict[str, Any], tmp_path: Path) -> Path:
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(config))
        return file

    def test_paths_are_relative_to_the_file(self, config: dict[str, Any], tmp_path: Path) -> None:
        config["methods"]["easyref"] = {"kind": "easyref", "checkpoint": "easyref.safetensors"}
        read = read_config(self.write(config, tmp_path))
        assert read.base == tmp_path / "base"
        assert read.methods["easyref"]["checkpoint"] == str(tmp_path / "easyref.safetensors")
        assert read.sampling.guidance == 5.0

    def test_it_runs(self, config: dict[str, Any], tmp_path: Path) -> None:
        tiny.make_base(tmp_path / "base")
        done = run(read_config(self.write(config, tmp_path)), ["plain"], references=1)
        assert {name: counts.painted for name, counts in done.items()} == {"plain-1-references": 2}
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["plain-1-references"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"seedz": [0]}, "unknown keys: seedz"),
            ({"sampling": {"steps": 1}}, "sampling lacks size"),
            ({"methods": {"a/b": {"kind": "plain"}}}, "a method is called 'a/b'"),
            ({"methods": {"m": {"kind": "plain", "rank": 3}}}, "Method m: unknown rank"),
            ({"methods": ["plain"]}, r"methods is \['plain'\]; wanted names"),
            ({"seeds": 4}, "seeds is 4; wanted a list of whole numbers"),
            ({"seeds": ["a"]}, r"seeds is \['a'\]; wanted a list"),
            ({"dtype": "fp16"}, "dtype is 'fp16'; wanted one of float32"),
        ],
    )
    def test_what_is_not_as_documented_is_refused(
        self, config: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            read_config(self.write(config | change, tmp_path))

    def test_what_is_no_yaml_is_refused(self, tmp_path: Path) -> None:
        file = tmp_path / "run.yaml"
        file.write_text("a: b: c")
        with pytest.raises(ValueError, match="run.yaml is not YAML"):
            read_config(file)

    def test_every_shipped_config_is_sound(self) -> None:
        shipped = sorted(Path(generating.__file__).parent.glob("configs/**/*.yaml"))
        assert [file.name for file in shipped] == ["sdxl.yaml", "tiny.yaml"]
        for file in shipped:
            kinds = {entry["kind"] for entry in read_config(file).methods.values()}
            assert kinds == set(KINDS)

    def test_an_unknown_method_is_refused(self, config: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="No method 'lora' in the config; it has other, plain"):
            run(read_config(self.write(config, tmp_path)), ["lora"])
