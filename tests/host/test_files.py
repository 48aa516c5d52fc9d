"""Folders in which the loader searches its files, and which files it accepts as what."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import folder_paths
import pytest
from safetensors.torch import load_file, save_file
from utils.extra_config import load_extra_path_config

from devkit.host import golden
from easyref_core.tiny.worlds import WORLDS


@pytest.fixture
def files(folders, tmp_path, monkeypatch):
    """The folders, without the shipped models."""
    monkeypatch.setattr(folders, "SHIPPED", {name: tmp_path / "shipped" / name for name in WORLDS})
    return folders


@pytest.fixture
def models(files, tmp_path) -> Path:
    """The models folder, registered as when the pack is loaded."""
    files.register_folders()
    return tmp_path / "models"


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def write_config(folder: Path, model_type: str = "qwen2_vl") -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))


# Checkpoints


def test_checkpoints_are_the_weight_files_in_models_easyref(files, models):
    folder = models / "easyref"
    touch(folder / "a.safetensors", folder / "deep" / "b.pt", folder / "readme.md")
    assert files.checkpoints() == ["a.safetensors", str(Path("deep", "b.pt"))]
    assert files.find_checkpoint("a.safetensors") == folder / "a.safetensors"


@pytest.mark.parametrize("in_cache", [False, True])
def test_weights_inside_an_mllm_folder_are_not_checkpoints(files, models, in_cache: bool):
    folder = models / "easyref"
    if in_cache:
        cache_snapshot(folder / REPOSITORY, "a" * 40, golden.MLLM)
    else:
        write_config(folder / "Qwen2-VL-2B-Instruct")
        touch(folder / "Qwen2-VL-2B-Instruct" / "model-00001-of-00002.safetensors")
    touch(folder / "easyref.safetensors")
    assert files.checkpoints() == ["easyref.safetensors"]


@pytest.mark.parametrize("config", ["{}", "not JSON"])
def test_checkpoint_in_a_folder_with_another_config_is_listed(files, models, config: str):
    """As a snapshot of the release's own repository may have one."""
    touch(models / "easyref" / "snapshot" / "model.safetensors")
    (models / "easyref" / "snapshot" / "config.json").write_text(config)
    assert [Path(name).as_posix() for name in files.checkpoints()] == ["snapshot/model.safetensors"]


def test_empty_folder_says_so_and_where_to_get_the_file(files, models):
    assert files.checkpoints() == [files.NO_CHECKPOINT]
    with pytest.raises(FileNotFoundError, match="no weight files") as missing:
        files.find_checkpoint(files.NO_CHECKPOINT)
    assert str(models / "easyref") in str(missing.value)
    assert "https://huggingface.co/zongzhuofan/EasyRef" in str(missing.value)


def test_file_outside_the_folders_is_not_found(files, models, shipped):
    for folder in (models / "easyref", shipped):
        touch(folder.parent / "secret.safetensors", folder / "a.safetensors")
    with pytest.raises(FileNotFoundError):
        files.find_checkpoint("../secret.safetensors")


def test_extra_model_paths_are_searched_beside_the_own_folder(files, tmp_path):
    paths = tmp_path / "extra_model_paths.yaml"
    paths.write_text(f"mine:\n  base_path: {tmp_path}\n  easyref: adapters\n  LLM: llms\n")
    load_extra_path_config(str(paths))
    files.register_folders()
    touch(tmp_path / "adapters" / "extra.safetensors", tmp_path / "models" / "easyref" / "own.safetensors")
    write_config(tmp_path / "llms" / "qwen")
    assert files.checkpoints() == ["extra.safetensors", "own.safetensors"]
    assert files.find_checkpoint("extra.safetensors") == tmp_path / "adapters" / "extra.safetensors"
    assert files.mllm_folders() == {"LLM/qwen": tmp_path / "llms" / "qwen"}


def test_the_folder_of_checkpoints_is_created(files, tmp_path):
    files.make_checkpoint_folder()
    files.make_checkpoint_folder()
    assert list((tmp_path / "models" / "easyref").iterdir()) == []


def test_a_folder_that_cannot_be_created_is_logged(files, tmp_path, monkeypatch, caplog):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    files.make_checkpoint_folder()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    for part in (str(tmp_path / "models" / "easyref"), "Read-only file system", "extra_model_paths.yaml"):
        assert part in record.getMessage()


# The shipped model


@pytest.fixture
def shipped(models, tmp_path) -> Path:
    """A folder with folders of the layout of the shipped ones, named by their worlds."""
    for name, world in WORLDS.items():
        folder = tmp_path / "shipped" / name
        touch(folder / world.easyref, folder / world.judge)
        touch(folder / "base" / "unet" / "diffusion_pytorch_model.safetensors")
        write_config(folder / world.mllm)
    return tmp_path / "shipped"


TINY, CREATURES = "tiny_easyref.safetensors", "creatures_easyref.safetensors"


@pytest.mark.parametrize(
    ("of_user", "listed", "folder"),
    [
        ("zz.safetensors", ["zz.safetensors", CREATURES, TINY], "shipped/shapes"),
        (None, ["no file in models/easyref", CREATURES, TINY], "shipped/shapes"),
        (TINY, [TINY, CREATURES], "models/easyref"),
    ],
    ids=["after the user's", "alone, but not the default", "hidden by the user's of its name"],
)
def test_shipped_checkpoint(files, models, shipped, of_user: str | None, listed: list, folder: str):
    if of_user:
        touch(models / "easyref" / of_user)
    assert files.checkpoints() == listed
    assert files.find_checkpoint(TINY) == models.parent / folder / TINY


def test_shipped_mllm_folder_is_listed(files, shipped):
    assert files.mllm_folders() == {
        f"easyref/{world.mllm}": shipped / name / world.mllm for name, world in WORLDS.items()
    }


def test_shipped_folders_are_the_last_that_are_searched(files, models, shipped):
    """The host and other packs save to the first."""
    assert folder_paths.get_folder_paths("easyref") == [
        str(folder) for folder in (models / "easyref", shipped / "creatures", shipped / "shapes")
    ]


# MLLM folders


@pytest.mark.parametrize("kind", ["easyref", "text_encoders", "LLM", "LLM/Qwen"])
def test_mllm_folders_are_identified_by_their_config(files, models, kind: str):
    write_config(models / kind / "any-name")
    assert files.mllm_folders() == {f"{kind}/any-name": models / kind / "any-name"}
    assert files.find_mllm(f"{kind}/any-name") == models / kind / "any-name"


@pytest.mark.parametrize(
    "content",
    [*(f'{{"model_type": "{kind}"}}' for kind in ("qwen2_5_vl", "qwen2", "t5")), "", "[]", "{", "\xff"],
)
def test_other_and_damaged_configs_are_not_listed(files, models, content: str):
    write_config(models / "LLM" / "other")
    (models / "LLM" / "other" / "config.json").write_text(content, encoding="latin-1")
    assert files.mllm_folders() == {}


# MLLM folders in the layout of the Hugging Face cache

REPOSITORY = "models--Qwen--Qwen2-VL-2B-Instruct"
LISTED = "Qwen/Qwen2-VL-2B-Instruct (Hugging Face cache)"


def cache_snapshot(cache: Path, revision: str, source: Path | None = None, time: int | None = None) -> Path:
    """A revision in a Hugging Face cache: links to blobs, of the files of `source` or of a config.json."""
    blobs, snapshot = cache / "blobs", cache / "snapshots" / revision
    blobs.mkdir(parents=True, exist_ok=True)
    snapshot.mkdir(parents=True)
    files = {file.name: file.read_bytes() for file in source.iterdir()} if source else {}
    for name, content in ({"config.json": b'{"model_type": "qwen2_vl"}'} | files).items():
        blob = hashlib.sha256(content).hexdigest()
        (blobs / blob).write_bytes(content)
        (snapshot / name).symlink_to(Path("..", "..", "blobs", blob))
    if time:
        os.utime(snapshot, (time, time))
    return snapshot


@pytest.mark.parametrize("kind", ["LLM", "LLM/hub", "text_encoders", "easyref"])
def test_mllm_in_a_hugging_face_cache_is_listed_by_its_repository(files, models, kind: str):
    snapshot = cache_snapshot(models / kind / REPOSITORY, "a" * 40)
    name = f"{kind.partition('/')[0]}/{LISTED}"
    assert files.mllm_folders() == {name: snapshot}
    assert files.find_mllm(name) == snapshot


@pytest.mark.parametrize(
    ("main", "newest"),
    [(None, True), (f"{'a' * 40}\n", False)]
    + [(main, True) for main in ("c" * 40, "../../../secret", "", "\x00", "x" * 10_000)],
)
def test_revision_in_refs_main_takes_precedence_if_it_is_there(files, models, main: str | None, newest: bool):
    write_config(models / "secret")
    cache = models / "LLM" / REPOSITORY
    revisions = [cache_snapshot(cache, name * 40, time=time) for name, time in (("a", 1000), ("b", 2000))]
    if main is not None:
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text(main)
    assert files.mllm_folders() == {f"LLM/{LISTED}": revisions[newest]}


def test_other_models_in_a_cache_are_not_listed(files, models):
    snapshot = models / "LLM" / "models--Qwen--Qwen2.5-VL-3B-Instruct" / "snapshots" / ("a" * 40)
    write_config(snapshot, "qwen2_5_vl")
    (models / "LLM" / "models--empty").mkdir()
    (models / "LLM" / "models--incomplete" / "snapshots" / "b").mkdir(parents=True)
    (models / "LLM" / "models--incomplete" / "snapshots" / "b" / "config.json").symlink_to("../../blobs/gone")
    assert files.mllm_folders() == {}


def test_a_folder_and_a_cache_of_the_same_model_are_both_listed(files, models):
    snapshot = cache_snapshot(models / "LLM" / REPOSITORY, "a" * 40)
    write_config(models / "LLM" / "Qwen" / "Qwen2-VL-2B-Instruct")
    assert files.mllm_folders() == {
        "LLM/Qwen/Qwen2-VL-2B-Instruct": models / "LLM" / "Qwen" / "Qwen2-VL-2B-Instruct",
        f"LLM/{LISTED}": snapshot,
    }


def test_names_of_earlier_workflows_are_still_listed(files, tmp_path):
    """An extra_model_paths.yaml with one repository of a cache listed its revisions before caches were
    supported.
    """
    cache = tmp_path / "hub" / REPOSITORY
    paths = tmp_path / "extra_model_paths.yaml"
    paths.write_text(f"mine:\n  base_path: {tmp_path / 'hub'}\n  LLM: {REPOSITORY}\n")
    load_extra_path_config(str(paths))
    files.register_folders()
    snapshot = cache_snapshot(cache, "a" * 40)
    assert files.mllm_folders() == {f"LLM/snapshots/{'a' * 40}": snapshot}


LOADED = {"precision": "auto", "last_layer_attention": "from the checkpoint"}


def write_stage_1(folder: Path) -> None:
    """Write stage_1.safetensors, a checkpoint without the MLLM's weights."""
    tensors = load_file(golden.CHECKPOINT).items()
    folder.mkdir(parents=True, exist_ok=True)
    adapter = {name: tensor for name, tensor in tensors if not name.startswith("multimodal_llm.")}
    save_file(adapter, folder / "stage_1.safetensors")


def test_an_mllm_in_a_cache_is_loaded(pack, models):
    loader = golden.node(pack, "EasyRefLoader")
    cache_snapshot(models / "LLM" / REPOSITORY, "a" * 40, golden.MLLM)
    shutil.copytree(golden.MLLM, models / "LLM" / "plain")
    (models / "LLM" / REPOSITORY / "snapshots" / ("a" * 40) / "README.md").symlink_to("gone")
    write_stage_1(models / "easyref")
    loaded = []
    for name in (f"LLM/{LISTED}", "LLM/plain"):
        chosen = {"checkpoint": "stage_1.safetensors", "mllm": name}
        assert len(loader.fingerprint_inputs(**chosen).split()) > 4 * 4
        loaded.append(loader.execute(**chosen, **LOADED).args[0].model.fingerprint)
    assert loaded[0] == loaded[1]


def test_linked_names_are_looked_up_by_the_loader(pack, models):
    """The host only validates widget values, against a list that may be old."""
    loader = golden.node(pack, "EasyRefLoader")
    touch(models / "easyref" / "a.safetensors")
    write_config(models / "LLM" / "there")
    with pytest.raises(FileNotFoundError, match=r"^MLLM folder 'LLM/gone' was not found\. Put ") as missing:
        loader.execute("a.safetensors", "LLM/gone", **LOADED)
    for said in ("Qwen2-VL-2B", str(models / "LLM"), "text_encoders", "Qwen2-VL folders there: LLM/there"):
        assert said in str(missing.value)
    with pytest.raises(FileNotFoundError, match=r"^EasyRef checkpoint 'b' was not found\. Download "):
        loader.execute("b", "from the checkpoint", **LOADED)


def test_a_quantized_mllm_is_refused_with_the_remedy(pack, models):
    loader = golden.node(pack, "EasyRefLoader")
    write_stage_1(models / "easyref")
    folder = shutil.copytree(golden.MLLM, models / "LLM" / "Qwen2-VL-2B-Instruct-AWQ")
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "awq"}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="quantized .*awq.*fp8_e4m3fn"):
        loader.execute("stage_1.safetensors", "LLM/Qwen2-VL-2B-Instruct-AWQ", **LOADED)


def test_loader_notices_new_files_in_the_mllm_folder(pack, models):
    loader = golden.node(pack, "EasyRefLoader")
    touch(models / "easyref" / "a.safetensors")
    write_config(models / "LLM" / "qwen")
    before = loader.fingerprint_inputs(checkpoint="a.safetensors", mllm="LLM/qwen")
    assert before == loader.fingerprint_inputs(checkpoint="a.safetensors", mllm="LLM/qwen")
    touch(models / "LLM" / "qwen" / "model.safetensors")
    assert before != loader.fingerprint_inputs(checkpoint="a.safetensors", mllm="LLM/qwen")
