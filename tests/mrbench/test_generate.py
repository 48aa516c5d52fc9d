"""Generating the images of a manifest end to end: files written, skipped and refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from easyref_core.mrbench import generate as generation
from easyref_core.mrbench.generate import (
    RunSettings,
    batches,
    generate,
    limit_groups,
    load_task,
    read_config,
    run,
)
from easyref_core.mrbench.latency import collect
from easyref_core.mrbench.manifest import SPLITS, Group, Manifest, write_manifest
from easyref_core.mrbench.methods import KINDS, Method, Sampling
from easyref_core.mrbench.processes import Process
from easyref_core.mrbench.training_seeds import pooled_name, select
from easyref_core.training.base_model import BaseModel

from . import tiny
from .tiny import IMAGE_SIZE, random_image

MakeMethod = Callable[..., Method]

SAMPLING = Sampling(size=IMAGE_SIZE, steps=2, guidance=3.0, negative="")


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Two groups, of two and three references."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    files = [folder / f"{i}.png" for i in range(7)]
    for i, file in enumerate(files):
        random_image(i).save(file)
    first = Group("first", tuple(files[:2]), files[5], "a cat", "subject", "held-out")
    second = Group("second", tuple(files[2:5]), files[6], "a dog", "subject", "held-out")
    return Manifest("tiny", 0, (first, second))


def content(folder: Path) -> dict[str, bytes]:
    """Every image under a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


@pytest.mark.parametrize("name", tiny.ENTRIES)
def test_every_method_generates_the_manifest(
    name: str, make_method: MakeMethod, manifest: Manifest, tmp_path: Path
) -> None:
    method, out = make_method(name), tmp_path / "out"
    done = generate(manifest, method, name, RunSettings(out=out, sampling=SAMPLING, seeds=[0, 1]))
    assert (done.new, done.existing, done.exclusions) == (4, 0, ())
    images = content(out)
    assert list(images) == [f"{name}/{group}/{seed}.png" for group in ("first", "second") for seed in (0, 1)]
    assert len(set(images.values())) == 4
    with Image.open(out / name / "first" / "0.png") as image:
        assert (image.size, image.mode) == ((IMAGE_SIZE, IMAGE_SIZE), "RGB")
    record = json.loads((out / name / "method.json").read_text())
    assert record["settings"]["kind"] == method.kind
    assert record["sampling"] == {"size": IMAGE_SIZE, "steps": 2, "guidance": 3.0, "negative": ""}
    assert record["seeds"] == [0, 1]
    assert len(record["base"]) == 16


class TestPlain:
    """The simplest method, for behaviour common to all."""

    @pytest.fixture
    def out(self, tmp_path: Path) -> Path:
        return tmp_path / "out"

    @pytest.fixture
    def generate(self, make_method: MakeMethod, manifest: Manifest, out: Path):
        def run(
            manifest: Manifest = manifest, references: int | None = None, **changes: Any
        ) -> generation.Generated:
            settings = RunSettings(**{"out": out, "sampling": SAMPLING, "seeds": [0]} | changes)
            return generate(manifest, make_method("plain"), "plain", settings, references)

        return run

    def test_a_second_run_generates_nothing(self, generate: Any, out: Path) -> None:
        generate()
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
        done = generate()
        assert (done.new, done.existing) == (0, 2)
        assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}

    def test_a_missing_image_is_generated_as_before(self, generate: Any, out: Path) -> None:
        generate(seeds=[0, 1], batch=1)
        before = content(out)
        (out / "plain/first/1.png").unlink()
        done = generate(seeds=[0, 1], batch=1)
        assert (done.new, done.existing) == (1, 3)
        assert content(out) == before

    def test_an_incomplete_file_does_not_count(
        self, generate: Any, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(image: Image.Image, path: Path, **options: Any) -> None:
            path.write_bytes(b"half")
            raise KeyboardInterrupt

        with monkeypatch.context() as broken:
            broken.setattr(Image.Image, "save", fail)
            with pytest.raises(KeyboardInterrupt):
                generate()
        assert not content(out)
        assert generate().new == 2
        assert not list(out.rglob("*.partial"))

    def test_more_seeds_and_groups_are_added(self, generate: Any, manifest: Manifest, out: Path) -> None:
        generate(dataclasses.replace(manifest, groups=manifest.groups[:1]))
        done = generate(seeds=[0, 2])
        assert (done.new, done.existing) == (3, 1)
        record = json.loads((out / "plain/method.json").read_text())
        assert record["seeds"] == [0, 2]
        assert sorted(record["groups"]) == ["first", "second"]

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"sampling": dataclasses.replace(SAMPLING, steps=3)}, "sampling.steps was 2, now is 3"),
            ({"sampling": dataclasses.replace(SAMPLING, guidance=1.5)}, "guidance was 3.0, now is 1.5"),
            ({"references": 1}, "references was null, now is 1"),
        ],
    )
    def test_other_settings_are_refused_and_nothing_is_written(
        self, generate: Any, out: Path, changes: dict[str, Any], named: str
    ) -> None:
        generate()
        before = content(out), (out / "plain/method.json").read_bytes()
        with pytest.raises(ValueError, match=f"{named}.*another name or output folder, or delete"):
            generate(seeds=[5], **changes)
        assert (content(out), (out / "plain/method.json").read_bytes()) == before

    def test_a_changed_group_is_refused(self, generate: Any, manifest: Manifest) -> None:
        generate()
        changed = dataclasses.replace(manifest.groups[1], prompt="a bird")
        with pytest.raises(ValueError, match=r"groups\.second was"):
            generate(dataclasses.replace(manifest, groups=(manifest.groups[0], changed)))

    def test_another_base_is_refused(self, generate: Any, base: BaseModel) -> None:
        generate()
        weight = base.unet.conv_out.bias
        with torch.no_grad():
            weight[-1] += 1
            try:
                with pytest.raises(ValueError, match="base was "):
                    generate()
            finally:
                weight[-1] -= 1

    def test_broken_references_are_excluded(self, generate: Any, manifest: Manifest, out: Path) -> None:
        manifest.groups[0].references[1].write_bytes(b"not an image")
        manifest.groups[1].target.unlink()
        done = generate()
        assert [path.split("/")[1] for path in content(out)] == ["first"]
        assert {exclusion.what for exclusion in done.exclusions} == {"reference", "target", "group"}

    def test_an_image_that_is_not_finite_is_not_saved(
        self, generate: Any, base: BaseModel, out: Path
    ) -> None:
        handle = base.unet.register_forward_hook(lambda *args: (args[-1][0] * torch.nan,))
        try:
            with pytest.raises(
                ValueError, match="Method plain stops. plain, group first, seed 0: the latent"
            ):
                generate()
        finally:
            handle.remove()
        assert content(out) == {}

    def test_latency_is_measured_by_number_of_references(self, generate: Any, out: Path) -> None:
        generate(batch=1)
        for batch in (1, 2):
            generate(seeds=[1, 2], batch=batch)
        lines = [json.loads(line) for line in (out / "plain/latency-0.jsonl").read_text().splitlines()]
        assert [line["references"] for line in lines] == [2, 3, 2, 3]
        assert [line["is_first"] for line in lines] == [True, False, True, False]
        assert all(line["paint"] > 0 and "threads" in line["device"] for line in lines)
        two, three = collect([out / "plain"])
        assert (two.references, three.references, two.groups, three.groups) == (2, 3, 2, 2)
        assert three.paint == pytest.approx((lines[1]["paint"] + lines[3]["paint"]) / 2)

    def test_another_prompt_can_be_painted(self, generate: Any, out: Path) -> None:
        generate()
        with pytest.raises(ValueError, match='prompt was null, now is ""'):
            generate(prompt="")
        images, other = content(out), out.parent / "other"
        generate(prompt="", out=other)
        assert content(other) != images

    def test_processes_share_the_groups(
        self, generate: Any, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for rank, group in ((1, "second"), (0, "first")):
            monkeypatch.setattr(generation, "this_process", lambda rank=rank: Process(rank=rank, count=2))
            generate()
            assert list(content(out)) == [f"plain/{group}/0.png"]
            (out / f"plain/{group}/0.png").unlink()


def test_fewer_references_can_be_used(
    make_method: MakeMethod, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, counts = make_method("easyref"), []
    settings = RunSettings(out=tmp_path, sampling=SAMPLING, seeds=[0])
    prepare = method.prepare
    monkeypatch.setattr(method, "prepare", lambda t, f: counts.append(len(t.references)) or prepare(t, f))
    generate(manifest, method, "easyref", settings, references=2)
    assert counts == [2, 2]
    with pytest.raises(ValueError, match="references is 0; wanted 1 or more"):
        generate(manifest, method, "easyref", settings, references=0)


def test_fewer_groups_can_be_used(manifest: Manifest) -> None:
    """The first of each split."""
    first, second = manifest.groups
    groups = [dataclasses.replace(group, split=split) for split in SPLITS for group in (first, second)]
    kept = limit_groups(dataclasses.replace(manifest, groups=tuple(groups)), 1).groups
    assert [(group.id, group.split) for group in kept] == [(first.id, split) for split in SPLITS]
    assert limit_groups(manifest, None) == manifest
    only = limit_groups(dataclasses.replace(manifest, groups=tuple(groups)), 1, SPLITS[1]).groups
    assert [(group.id, group.split) for group in only] == [(first.id, SPLITS[1])]
    only = limit_groups(dataclasses.replace(manifest, groups=tuple(groups)), None, SPLITS[0]).groups
    assert [(group.id, group.split) for group in only] == [(group.id, SPLITS[0]) for group in (first, second)]
    with pytest.raises(ValueError, match="split is 'heldout'; wanted 'held-in' or 'held-out'"):
        limit_groups(manifest, None, "heldout")
    mixed = dataclasses.replace(manifest, groups=tuple(groups[i] for i in (2, 0, 3, 1)))
    assert limit_groups(mixed, 2) == mixed
    with pytest.raises(ValueError, match="groups is 0; wanted 1 or more"):
        limit_groups(manifest, 0)


@pytest.mark.parametrize(
    ("name", "batch", "sizes"),
    [
        ("plain", 4, [2]),
        ("plain", 3, [1, 1]),
        ("plain", 1, [1, 1]),  # the seeds of a group are then generated one after the other
        ("ip_adapter_average", 4, [2]),
        ("ip_adapter_concatenation", 4, [1, 1]),
        ("lora", 4, [1, 1]),
    ],
)
def test_sizes_of_batches(
    name: str, batch: int, sizes: list[int], make_method: MakeMethod, manifest: Manifest
) -> None:
    tasks = [(load_task(group), (0, 1)) for group in manifest.groups]
    assert [len(tasks) for tasks, _ in batches(tasks, make_method(name), batch)] == sizes


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
            "sampling": {"size": IMAGE_SIZE, "steps": 1},
            "methods": {"plain": {"kind": "plain"}, "other": {"kind": "plain"}},
        }

    @pytest.fixture
    def read(self, config: dict[str, Any], tmp_path: Path):
        def read(**changes: Any) -> generation.Config:
            file = tmp_path / "run.yaml"
            file.write_text(yaml.safe_dump(config | changes))
            return read_config(file)

        return read

    def test_paths_are_relative_to_the_file(self, read: Any, tmp_path: Path) -> None:
        config = read(methods={"easyref": {"kind": "easyref", "checkpoint": "easyref.safetensors"}})
        assert config.base == tmp_path / "base"
        assert config.methods["easyref"]["checkpoint"] == str(tmp_path / "easyref.safetensors")
        assert config.sampling.guidance == 5.0

    def test_training_seeds_become_entries(self, read: Any, tmp_path: Path) -> None:
        entry = {"kind": "easyref", "checkpoint": "run_{seed}/a.safetensors", "training_seeds": [0, 2]}
        methods = read(methods={"easyref": entry, "plain": {"kind": "plain"}}).methods
        assert list(methods) == ["easyref@0", "easyref@2", "plain"]
        assert methods["easyref@2"] == {
            "kind": "easyref",
            "checkpoint": str(tmp_path / "run_2/a.safetensors"),
        }
        assert select(["easyref"], methods) == ["easyref@0", "easyref@2"]
        assert select(["plain", "easyref@2"], methods) == ["plain", "easyref@2"]
        assert select([], methods) == list(methods)

    def test_a_training_seed_can_be_a_number(self, read: Any) -> None:
        entry = {"kind": "lora", "seed": "{seed}", "training_seeds": [0, 2]}
        assert read(methods={"lora": entry}).methods["lora@2"] == {"kind": "lora", "seed": 2}

    def test_a_path_can_be_the_training_seed_alone(self, read: Any, tmp_path: Path) -> None:
        entry = {"kind": "easyref", "checkpoint": "{seed}", "training_seeds": [0, 2]}
        methods = read(methods={"easyref": entry}).methods
        assert methods["easyref@0"]["checkpoint"] == str(tmp_path / "0")

    def test_it_runs(self, read: Any, tmp_path: Path) -> None:
        tiny.make_base(tmp_path / "base")
        done = run(read(), ["plain"], references=1)
        assert {name: counts.new for name, counts in done.items()} == {"plain-1-references": 2}
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["plain-1-references"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"seedz": [0]}, "unknown keys: seedz"),
            ({"sampling": {"steps": 1}}, "sampling lacks size"),
            ({"methods": {"a/b": {"kind": "plain"}}}, "a method is called 'a/b'"),
            (
                {"methods": {"m": {"kind": "plain", "rank": 3}}},
                "Method m of kind plain has unknown keys: rank",
            ),
            ({"methods": ["plain"]}, r"methods is \['plain'\]; wanted method names"),
            ({"seeds": 4}, "seeds is 4; wanted a list of whole numbers"),
            ({"seeds": ["a"]}, r"seeds is \['a'\]; wanted a list"),
            ({"prompt": 3}, "prompt is 3; wanted a string"),
            ({"methods": {"m": {"kind": "plain", "training_seeds": [0]}}}, "in none of its settings, so all"),
            (
                {"methods": {"m": {"kind": "easyref", "checkpoint": "{seed}.safetensors"}}},
                "Method m has {seed} in a setting; wanted also training_seeds",
            ),
            (
                {"methods": {"m": {"kind": "easyref", "checkpoint": "{seed}", "training_seeds": [1, 1]}}},
                r"training_seeds is \[1, 1\]; wanted each seed once",
            ),
            (
                {"methods": {"m": {"kind": "easyref", "checkpoint": "{seed}", "training_seeds": 3}}},
                "training_seeds is 3; wanted a list of whole numbers",
            ),
            ({"dtype": "fp16"}, "dtype is 'fp16'; wanted one of float32"),
        ],
    )
    def test_anything_undocumented_is_refused(self, read: Any, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            read(**change)

    def test_other_files_are_refused(self, tmp_path: Path) -> None:
        file = tmp_path / "run.yaml"
        file.write_text("a: b: c")
        with pytest.raises(ValueError, match="run.yaml is not YAML"):
            read_config(file)

    def test_every_shipped_config_is_valid(self) -> None:
        shipped = sorted(Path(generation.__file__).parent.glob("configs/**/*.yaml"))
        configs = {file.name: read_config(file) for file in shipped}
        names = "creatures creatures_tuning sdxl sdxl_single tiny tiny_tuning".split()
        assert sorted(configs) == [f"{name}.yaml" for name in names]
        for name in ("sdxl.yaml", "tiny.yaml"):
            methods = configs[name].methods
            assert {entry["kind"] for entry in methods.values()} == set(KINDS)
            stages = ["easyref_stage_1", "easyref_stage_2", "easyref_without_stage_1"]
            assert {pooled_name(name) for name in select(stages, methods)} == set(stages)
        assert configs["sdxl_single.yaml"].prompt == ""

    def test_an_unknown_method_is_refused(self, read: Any) -> None:
        with pytest.raises(ValueError, match="No method 'lora' in the config; it has other, plain"):
            run(read(), ["lora"])
