"""Where the loader looks for its files, and what it takes for what."""

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


@pytest.fixture
def files(pack, tmp_path, monkeypatch):
    """nodes.host.folders in a host whose models folder is tmp_path/models and empty, and of a pack with no model of its own."""
    models = tmp_path / "models"
    text_encoders = [str(models / "text_encoders")], folder_paths.supported_pt_extensions
    monkeypatch.setattr(folder_paths, "models_dir", str(models))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {"text_encoders": text_encoders})
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    files = golden.part(pack, "nodes.host.folders")
    monkeypatch.setattr(files, "SHIPPED", tmp_path / "shipped")
    return files


@pytest.fixture
def models(files, tmp_path) -> Path:
    """The models folder, as it is known once the pack is loaded."""
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


def test_checkpoints_are_in_models_easyref(files, models):
    touch(models / "easyref" / "a.safetensors", models / "easyref" / "deep" / "b.pt")
    assert files.checkpoints() == ["a.safetensors", str(Path("deep", "b.pt"))]
    assert files.find_checkpoint("a.safetensors") == models / "easyref" / "a.safetensors"


def test_files_of_other_kinds_are_not_listed(files, models):
    touch(models / "easyref" / "readme.md", models / "easyref" / "a.safetensors")
    assert files.checkpoints() == ["a.safetensors"]


def test_weights_inside_an_mllm_folder_are_no_checkpoints(files, models):
    write_config(models / "easyref" / "Qwen2-VL-2B-Instruct")
    touch(models / "easyref" / "Qwen2-VL-2B-Instruct" / "model-00001-of-00002.safetensors")
    touch(models / "easyref" / "easyref.safetensors")
    assert files.checkpoints() == ["easyref.safetensors"]


@pytest.mark.parametrize("config", ["{}", "not JSON"])
def test_checkpoint_in_a_folder_with_another_config_is_listed(files, models, config: str):
    """As a snapshot of the release's own repository may have one."""
    touch(models / "easyref" / "snapshot" / "model.safetensors")
    (models / "easyref" / "snapshot" / "config.json").write_text(config)
    assert [Path(name).as_posix() for name in files.checkpoints()] == ["snapshot/model.safetensors"]


def test_empty_folder_says_so_and_where_to_get_the_file(files, models):
    assert files.checkpoints() == [files.NOTHING_FOUND]
    with pytest.raises(FileNotFoundError, match="no weight files") as missing:
        files.find_checkpoint(files.NOTHING_FOUND)
    assert str(models / "easyref") in str(missing.value)
    assert "https://huggingface.co/zongzhuofan/EasyRef" in str(missing.value)


def test_file_outside_the_folder_is_not_found(files, models):
    touch(models / "secret.safetensors", models / "easyref" / "a.safetensors")
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


# The folder itself


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
    assert str(tmp_path / "models" / "easyref") in record.getMessage()
    assert "Read-only file system" in record.getMessage()
    assert "extra_model_paths.yaml" in record.getMessage()


# The model that comes with the pack


@pytest.fixture
def shipped(models, tmp_path) -> Path:
    """A folder laid out as the shipped one."""
    touch(tmp_path / "shipped" / "tiny_easyref.safetensors", tmp_path / "shipped" / "classifier.safetensors")
    touch(tmp_path / "shipped" / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    write_config(tmp_path / "shipped" / "tiny-qwen2-vl")
    return tmp_path / "shipped"


def test_shipped_checkpoint_comes_after_the_user_s(files, models, shipped):
    touch(models / "easyref" / "zz.safetensors")
    assert files.checkpoints() == ["zz.safetensors", "tiny_easyref.safetensors"]
    assert files.find_checkpoint("tiny_easyref.safetensors") == shipped / "tiny_easyref.safetensors"


def test_shipped_checkpoint_alone_is_not_the_default(files, shipped):
    assert files.checkpoints() == [files.NOTHING_FOUND, "tiny_easyref.safetensors"]


def test_file_of_the_user_hides_the_shipped_one_of_its_name(files, models, shipped):
    touch(models / "easyref" / "tiny_easyref.safetensors")
    assert files.checkpoints() == ["tiny_easyref.safetensors"]
    assert (
        files.find_checkpoint("tiny_easyref.safetensors") == models / "easyref" / "tiny_easyref.safetensors"
    )


def test_shipped_mllm_folder_is_listed(files, shipped):
    assert files.mllm_folders() == {"easyref/tiny-qwen2-vl": shipped / "tiny-qwen2-vl"}


def test_file_beside_the_shipped_ones_is_not_found(files, shipped):
    touch(shipped.parent / "secret.safetensors")
    with pytest.raises(FileNotFoundError):
        files.find_checkpoint("../secret.safetensors")


def test_shipped_folder_is_the_last_that_is_searched(files, models, shipped):
    """The first is where the host and other packs save to."""
    assert folder_paths.get_folder_paths("easyref") == [str(models / "easyref"), str(shipped)]


# MLLM folders


@pytest.mark.parametrize("place", ["easyref", "text_encoders", "LLM", "LLM/Qwen"])
def test_mllm_folders_are_told_by_their_config(files, models, place: str):
    write_config(models / place / "any-name")
    assert files.mllm_folders() == {f"{place}/any-name": models / place / "any-name"}
    assert files.find_mllm(f"{place}/any-name") == models / place / "any-name"


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen2", "t5"])
def test_other_models_are_not_listed(files, models, model_type: str):
    write_config(models / "LLM" / "other", model_type)
    assert files.mllm_folders() == {}


@pytest.mark.parametrize("content", ["", "[]", "{", "\xff"])
def test_damaged_config_is_not_listed(files, models, content: str):
    write_config(models / "LLM" / "damaged")
    (models / "LLM" / "damaged" / "config.json").write_text(content, encoding="latin-1")
    assert files.mllm_folders() == {}


# MLLM folders in the layout of the Hugging Face cache

REPOSITORY = "models--Qwen--Qwen2-VL-2B-Instruct"
LISTED = "Qwen/Qwen2-VL-2B-Instruct (Hugging Face cache)"


def cache_snapshot(cache: Path, revision: str, source: Path | None = None, time: int | None = None) -> Path:
    """A revision in a Hugging Face cache: links into blobs, of the files of `source` or of a config.json alone."""
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


def name_main(cache: Path, revision: str) -> None:
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(revision)


@pytest.mark.parametrize("place", ["LLM", "LLM/hub", "text_encoders", "easyref"])
def test_mllm_in_a_hugging_face_cache_is_listed_by_its_repository(files, models, place: str):
    snapshot = cache_snapshot(models / place / REPOSITORY, "a" * 40)
    name = f"{place.partition('/')[0]}/{LISTED}"
    assert files.mllm_folders() == {name: snapshot}
    assert files.find_mllm(name) == snapshot


def test_the_revision_that_refs_main_names_is_taken(files, models):
    cache = models / "LLM" / REPOSITORY
    old = cache_snapshot(cache, "a" * 40, time=1000)
    new = cache_snapshot(cache, "b" * 40, time=2000)
    assert files.mllm_folders() == {f"LLM/{LISTED}": new}
    name_main(cache, f"{'a' * 40}\n")
    assert files.mllm_folders() == {f"LLM/{LISTED}": old}


@pytest.mark.parametrize("main", ["c" * 40, "../../../secret", "", "\x00", "x" * 10_000])
def test_refs_main_that_names_no_revision_leads_nowhere(files, models, main: str):
    write_config(models / "secret")
    cache = models / "LLM" / REPOSITORY
    cache_snapshot(cache, "a" * 40, time=1000)
    new = cache_snapshot(cache, "b" * 40, time=2000)
    name_main(cache, main)
    assert files.mllm_folders() == {f"LLM/{LISTED}": new}


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
    """Where extra_model_paths.yaml names one repository of a cache, its revisions were listed before caches were known."""
    cache = tmp_path / "hub" / REPOSITORY
    paths = tmp_path / "extra_model_paths.yaml"
    paths.write_text(f"mine:\n  base_path: {tmp_path / 'hub'}\n  LLM: {REPOSITORY}\n")
    load_extra_path_config(str(paths))
    files.register_folders()
    snapshot = cache_snapshot(cache, "a" * 40)
    assert files.mllm_folders() == {f"LLM/snapshots/{'a' * 40}": snapshot}


def test_weights_of_an_mllm_in_a_cache_are_no_checkpoints(files, models):
    cache_snapshot(models / "easyref" / REPOSITORY, "a" * 40, golden.MLLM)
    assert files.checkpoints() == [files.NOTHING_FOUND]


LOADED = {"precision": "auto", "last_layer_attention": "from the checkpoint"}


def write_stage_1(folder: Path) -> None:
    """stage_1.safetensors, a checkpoint that takes the MLLM's weights from a folder."""
    tensors = load_file(golden.CHECKPOINT).items()
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: tensor for name, tensor in tensors if not name.startswith("multimodal_llm.")}
    save_file(kept, folder / "stage_1.safetensors")


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


def test_names_that_come_through_links_are_looked_up_by_the_loader(pack, models):
    """The host checks only what is typed in, and the list of the first run may be old."""
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


# The tokenizer that comes with the host


def test_host_has_the_tokenizer_of_qwen2_vl(pack, files):
    tokenizer = golden.part(pack, "easyref_core.mllm.instructions").load_tokenizer(files.host_tokenizer())
    assert tokenizer.token_to_id("<|image_pad|>") == 151655
    system = [8948, 198, 2610, 525, 264, 10950, 17847, 13]
    assert tokenizer.encode("system\nYou are a helpful assistant.").ids == system
