"""Names as people and Windows have them, through the nodes: spaces, other scripts, emoji, backslashes, drive
letters.
"""

from __future__ import annotations

import shutil
from pathlib import Path, PureWindowsPath
from typing import Any

import folder_paths
import pytest
from PIL import Image

from devkit.host import golden

NAME = "Größe, 猫 & 😀 (new)"
LONG = "x" * 200


@pytest.fixture
def base(tmp_path) -> Path:
    return tmp_path / NAME


@pytest.fixture
def files(folders, base) -> Any:
    """The folders, in one with an awkward name."""
    for folder in ("models/easyref", "models/LLM", "output/easyref"):
        (base / folder).mkdir(parents=True)
    folders.register_folders()
    return folders


@pytest.mark.parametrize("name", [NAME, LONG])
def test_a_checkpoint_and_an_mllm_of_any_name_are_listed_and_found(files, name: str) -> None:
    models = Path(folder_paths.models_dir)
    shutil.copy(golden.CHECKPOINT, models / "easyref" / f"{name}.safetensors")
    shutil.copytree(golden.MLLM, models / "LLM" / name, ignore=shutil.ignore_patterns("*.safetensors"))
    assert files.checkpoints()[0] == f"{name}.safetensors"
    assert files.find_checkpoint(f"{name}.safetensors").is_file()
    assert files.find_mllm(f"LLM/{name}") == models / "LLM" / name


@pytest.mark.parametrize("name", [NAME, LONG, f"{NAME}/{LONG}"])
def test_tokens_of_any_name_are_saved_and_found(pack, files, execute, easy, name: str) -> None:
    execute("EasyRefSaveTokens", tokens=easy.tokens, filename_prefix=name)
    (listed,) = files.token_files()
    assert listed == f"{name}_00001_.safetensors"
    assert golden.part(pack, "easyref_core").load_tokens(files.find_tokens(listed)).conditional.shape


def test_a_folder_of_images_may_have_any_name(pack, files) -> None:
    folder = Path(folder_paths.get_input_directory(), NAME)
    folder.mkdir()
    for name in ("2 猫.png", "10 😀.png", "1 Größe.PNG"):
        Image.new("RGB", (8, 8)).save(folder / name)
    module = golden.part(pack, "nodes.group.from_folder")
    names = module.sorted_files(NAME).readable
    assert names == ["1 Größe.PNG", "2 猫.png", "10 😀.png"]
    assert [file.name for file in module.image_paths(NAME, names)] == names


# Windows, where a path may have a root without a drive, and a drive without a root


@pytest.mark.parametrize(
    "prefix",
    r"C:\tokens C:tokens \tokens /tokens \\server\share\tokens ..\tokens a\..\..\b".split() + [".\\"],
)
def test_a_windows_prefix_that_leads_out_is_refused(files, monkeypatch, prefix: str) -> None:
    monkeypatch.setattr(files, "Path", PureWindowsPath)
    with pytest.raises(ValueError, match="filename_prefix"):
        files.new_tokens_file(prefix)


@pytest.mark.parametrize("prefix", ["tokens", "faces\\anna", "faces/anna", "猫"])
def test_a_windows_prefix_inside_is_taken(files, monkeypatch, prefix: str) -> None:
    monkeypatch.setattr(files, "Path", PureWindowsPath)
    folder = PureWindowsPath(folder_paths.get_output_directory(), "easyref")
    monkeypatch.setattr(folder_paths, "get_save_image_path", lambda name, out: (out, "name", 1, "", ""))
    assert files.new_tokens_file(prefix) == folder / "name_00001_.safetensors"


@pytest.mark.parametrize(
    "name", ["C:secret.safetensors", "C:\\secret.safetensors", "\\secret.safetensors", "..\\x"]
)
def test_a_windows_name_of_tokens_that_leads_out_is_not_found(files, monkeypatch, name: str) -> None:
    """Also if the host resolves it to a path inside."""
    inside = str(PureWindowsPath(folder_paths.get_folder_paths(files.TOKENS)[0], "there.safetensors"))
    monkeypatch.setattr(folder_paths, "get_full_path", lambda *_: inside)
    monkeypatch.setattr(files, "is_inside", lambda *_: True)
    monkeypatch.setattr(files, "Path", PureWindowsPath)
    assert files.tokens_path(name) is None
