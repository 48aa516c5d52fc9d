"""The nodes around a group: previews, folders, crops, selections, instructions, budgets."""

from __future__ import annotations

import io
import itertools
import mimetypes
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import pytest
import torch
from PIL import Image, features

from devkit.host import golden, graphs

pytestmark = pytest.mark.one_host


@pytest.fixture(autouse=True)
def inputs(tmp_path, monkeypatch) -> Path:
    """The test's own input folder; previews go to a folder of the test too. The server has others."""
    folder = tmp_path / "input"
    (folder / "a").mkdir(parents=True)
    monkeypatch.setattr(folder_paths, "input_directory", str(folder))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    return folder


@pytest.fixture
def folder(inputs) -> Path:
    """A folder in the input folder."""
    return inputs / "a"


def draw(path: Path, width: int = 30, height: int = 20, seed: int = 0, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)


def text_of(output: Any) -> str:
    return output.ui["text"][0]


# The group


def test_group_shows_thumbnails_sizes_and_duplicates(pack):
    group = golden.node(pack, "EasyRefGroup")
    first, second, third = golden.references()
    output = group.execute({"image0": [first], "image1": [second], "image2": [third, first]})
    assert len(output.ui["images"]) == 1
    duplicate = "Warning: reference 4 is the same picture as reference 1."
    assert text_of(output).splitlines() == ["4 references", duplicate]
    broken = torch.full((1, 30, 30, 3), torch.nan)  # the encoder refuses it
    (references,) = group.execute({"image0": [broken], "image1": [torch.zeros(1, 1, 1, 3)]}).args
    assert len(references) == 2


def test_preview_of_a_group_is_served(server):
    graphs.install_golden(server)
    nodes = {"images": graphs.tiny_images("7x64x64x3", seed=70), "group": graphs.group(["images", 0])}
    outputs = server.run(graphs.of_images(["group", 0], nodes))["outputs"]
    assert outputs["group"]["text"] == ["7 references"]
    (png,) = server.images({"outputs": {"group": outputs["group"]}}, "temp")
    width, height = Image.open(io.BytesIO(png)).size
    assert 5 * 128 < width < 7 * 150  # six in a row
    assert height > 2 * 128


def test_selection_takes_references_in_the_order_written(pack):
    select, group = golden.node(pack, "EasyRefSelectReferences"), golden.references()
    for text, numbers in [("3, 1", [2, 0]), ("", [0, 1, 2]), ("3-2", [2, 1]), ("all", [0, 1, 2])]:
        (selected,) = select.execute(group, text).args
        assert [id(image) for image in selected] == [id(group[number]) for number in numbers]
    with pytest.raises(ValueError, match="names 1,001 references; wanted at most 1,000"):
        select.execute(group, "1," * 1001)
    for wrong in ("0", "4", "1.5", "nan", "inf"):
        with pytest.raises(ValueError, match=f"references has '{wrong}', .*in a group of 3"):
            select.execute(group, wrong)


# Folders


@pytest.fixture
def from_folder(pack) -> Any:
    return golden.node(pack, "EasyRefGroupFromFolder")


@pytest.fixture
def load(from_folder) -> Callable[..., Any]:
    """Load the group of `folder`."""
    return lambda limit=16, start=0, group=None: from_folder.execute("a", limit, start, group)


def test_folder_is_loaded_in_natural_order(load, folder):
    for seed, name in enumerate(["10.png", "2.PNG", "1.jpg"]):
        draw(folder / name, 30 + seed, seed=seed)
    (folder / "notes.txt").write_text("not a picture")
    (folder / "deeper").mkdir()
    group, names = load().args
    assert names.splitlines() == ["1.jpg", "2.PNG", "10.png"]
    assert [image.shape[2] for image in group] == [32, 31, 30]
    group, names = load(1, 1, golden.references()).args
    assert (names, len(group)) == ("2.PNG", 4)
    assert group[0] is not group[3]


@pytest.fixture
def bare_system(monkeypatch) -> None:
    """A system whose table of file types only has .png and .txt, before the host has cached any other."""
    table = mimetypes.MimeTypes(filenames=())
    table.types_map = table.types_map_inv = ({}, {})
    table.add_type("image/png", ".png")
    table.add_type("text/plain", ".txt")
    monkeypatch.setattr(mimetypes, "guess_type", table.guess_type)
    monkeypatch.setattr(folder_paths, "extension_mimetypes_cache", {})


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("a.jfif", "JPEG"), ("a.JPE", "JPEG"), ("a.avif", "AVIF"), ("a.tga", "TGA")),
        *(("a.mpo", "MPO"), ("a.jp2", "JPEG2000"), ("a.webp", "WEBP"), ("a.qoi", "QOI")),
    ],
)
@pytest.mark.usefixtures("bare_system")
def test_formats_of_pillow_are_loaded_whatever_the_system_knows(load, folder, name: str, kind: str):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    draw(folder / name, format=kind)
    output = load()
    assert output.args[1] == name
    assert output.args[0][0].shape == (1, 20, 30, 3)
    (preview,) = output.ui["images"]  # the contact sheet is a PNG, whatever the files are
    assert preview["filename"].endswith(".png")


def test_skipped_files_are_named_with_the_reason(load, folder):
    draw(folder / "1.png")
    for name in ("2.jxl", "3.heic", "4.HEIC", "notes.txt", "film.mpg", ".hidden"):
        (folder / name).write_bytes(b"of another kind")
    (folder / "5.png").write_bytes(b"no picture")
    draw(folder / "6.png", 5, 5)
    output = load()
    assert output.args[1] == "1.png"
    lines = text_of(output).splitlines()
    assert "Warning: left out, Pillow has no reader for .jxl files here: 2.jxl." in lines
    assert "Warning: left out, Pillow has no reader for .heic files here: 3.heic, 4.HEIC." in lines
    assert "Left out, not an image: film.mpg, notes.txt." in lines
    assert any(line.startswith("Warning: 5.png was left out, it could not be read (") for line in lines)
    assert any(line.startswith("Warning: 6.png was left out") and "5x5 pixels" in line for line in lines)
    assert ".hidden" not in text_of(output)


def test_reader_of_a_pillow_plugin_is_used(load, folder, monkeypatch):
    draw(folder / "1.jxl", format="PNG")
    Image.init()
    monkeypatch.setitem(Image.EXTENSION, ".jxl", "PNG")
    assert load().args[1] == "1.jxl"


def test_many_files_that_are_not_images_are_counted(load, folder):
    for number in range(1, 21):
        draw(folder / f"{number}.png", seed=number)
        (folder / f"{number}.txt").write_text("a caption")
    lines = text_of(load()).splitlines()
    named = ", ".join(f"{number}.txt" for number in range(1, 9))
    assert f"Left out, not an image: {named} and 12 more." in lines
    assert "4 of 20 images were not taken (start 0, limit 16)." in lines


def test_files_that_are_not_read_do_not_count_for_the_limit(load, folder):
    (folder / "1.heic").write_bytes(b"of another kind")
    for number in (2, 3, 4):
        draw(folder / f"{number}.png", seed=number)
    assert load(2, 1).args[1] == "3.png\n4.png"


def test_error_of_any_kind_in_a_decoder_skips_that_file_alone(load, folder, monkeypatch):
    draw(folder / "1.png")
    draw(folder / "2.bmp")

    def fail(*_: object) -> None:
        raise struct.error("unpack requires a buffer of 4 bytes")

    monkeypatch.setattr(Image.OPEN["BMP"][0], "load", fail)
    output = load()
    assert output.args[1] == "1.png"
    assert "2.bmp was left out, it could not be read (unpack requires" in text_of(output)


@pytest.mark.parametrize("name", ["1.eps", "1.png"])
def test_postscript_starts_no_program(load, folder, monkeypatch, name: str):
    """Pillow would start Ghostscript for it, even if the name says PNG."""
    started = []
    for call in ("check_call", "Popen", "run"):
        monkeypatch.setattr(subprocess, call, lambda *args, **_: started.append(args))
    Image.new("RGB", (30, 20)).save(folder / name, format="EPS")
    with pytest.raises(ValueError, match="No picture was found in 'a'.*1"):
        load()
    assert started == []


def test_exif_orientation_is_applied_as_the_hosts_loader_does(from_folder, inputs):
    from nodes import LoadImage

    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    draw(inputs / "turned.png", 40, 20, exif=exif)
    (group, _) = from_folder.execute(".", 16, 0).args
    assert group[0].shape == (1, 40, 20, 3)
    assert torch.equal(group[0], LoadImage().load_image("turned.png")[0])


@pytest.mark.parametrize("path", ["..", "a/../..", "/etc", "", "link", "a\x00b", "x" * 5000, "C:\\a"])
def test_folder_outside_the_input_folder_is_refused(from_folder, inputs, path: str):
    draw(inputs.parent / "outside" / "1.png")
    (inputs / "link").symlink_to(inputs.parent / "outside")
    with pytest.raises(ValueError, match="is not inside ComfyUI's input folder"):
        from_folder.execute(path, 16, 0)


def test_file_that_is_a_link_out_of_the_input_folder_is_refused(load, inputs, folder):
    draw(inputs.parent / "secret.png")
    draw(folder / "1.png")
    (folder / "2.png").symlink_to(inputs.parent / "secret.png")
    with pytest.raises(ValueError, match="links that lead out"):
        load()


def test_missing_and_empty_folders(from_folder, load, folder):
    with pytest.raises(FileNotFoundError, match=r"Folder 'absent' does not exist in .*Folders there: a"):
        from_folder.execute("absent", 16, 0)
    with pytest.raises(ValueError, match="No picture was found in 'a'"):
        load()
    (folder / "1.heic").write_bytes(b"of another kind")
    with pytest.raises(ValueError, match=r"Pillow has no reader for \.heic files here: 1\.heic"):
        load()


def test_fingerprint_changes_with_the_files(from_folder, folder):
    prints = []
    for name, width in (("1.png", 30), ("2.png", 30), ("2.png", 31)):
        draw(folder / name, width)
        prints.append(from_folder.fingerprint_inputs("a", 16, 0))
    assert len(set(prints)) == 3
    assert prints[-1] == from_folder.fingerprint_inputs("a", 16, 0, group=None)
    (folder / "3.heic").write_bytes(b"of another kind")
    assert from_folder.fingerprint_inputs("a", 16, 0) not in prints  # the report names it


# Crops


@pytest.fixture
def crop(pack) -> Any:
    return golden.node(pack, "EasyRefCropReference")


def test_no_crop_leaves_every_reference_bit_for_bit(crop):
    references = golden.references()
    group, images = crop.execute([references], ["none"]).args
    assert all(torch.equal(a, b) for a, b in zip(group, references, strict=True))
    assert len(images) == len(references)


def test_squares_of_a_list_of_mixed_sizes_keep_their_order(crop):
    images = [torch.rand(2, 40, 60, 3), torch.rand(1, 50, 20, 3)]
    output = crop.execute(images, ["square in the middle"])
    assert [tuple(image.shape[1:3]) for image in output.args[0]] == [(40, 40), (40, 40), (20, 20)]
    assert torch.equal(output.args[0][1], images[0][1:, :, 10:50])
    assert "reference 3: 20x50 -> 20x20 at (0, 15)" in text_of(output)


def test_square_around_a_mask_for_all_and_one_for_each(crop):
    images, mask = torch.rand(2, 40, 60, 3), torch.zeros(1, 40, 60)
    mask[0, 10:20, 30:40] = 1
    around = ["square around the mask"]
    (group, _) = crop.execute([images], around, [mask], [1.0]).args
    assert torch.equal(group[1], images[1:, 10:20, 30:40])
    with pytest.raises(ValueError, match="3 masks for 2 references"):
        crop.execute([images], around, [mask, mask, mask], [1.0])
    with pytest.raises(ValueError, match="0 masks for 2 references"):
        crop.execute([images], around)
    with pytest.raises(ValueError, match="The mask of reference 2 marks nothing"):
        crop.execute([images], around, [torch.cat([mask, 0 * mask])], [1.0])


def test_crops_go_on_to_a_group(server):
    graphs.install_golden(server)
    settings = {"crop": "square in the middle", "padding": 1.5}
    nodes = {
        "images": graphs.tiny_images("2x64x96x3 1x84x64x3", seed=80),
        "crop": graphs.node("EasyRefCropReference", images=["images", 0], **settings),
    }
    through_list = {**nodes, "group": graphs.group(["crop", 1])}
    expected = graphs.image(server, graphs.of_images(["crop", 0], nodes))
    assert graphs.image(server, graphs.of_images(["group", 0], through_list)) == expected


# Instructions


def test_instruction_is_the_presets_text_or_the_users(pack):
    instruct, presets = golden.node(pack, "EasyRefInstruction"), golden.part(pack, "nodes.group.instruction")
    for preset, language in itertools.product(presets.PRESETS, presets.LANGUAGES):
        output = instruct.execute(preset, language, "")
        assert output.args == (presets.PRESETS[preset][language],)
        assert text_of(output) == output.args[0]
    assert instruct.execute("style", "English", "Look at the hat.").args == ("Look at the hat.\n",)
    assert instruct.execute("custom", "English", "Look:\n").args == ("Look:\n",)
    with pytest.raises(ValueError, match="custom and the text is empty"):
        instruct.execute("custom", "English", " \n")


def test_general_preset_gives_the_image_of_encode_alone(server):
    graphs.install_golden(server)
    plain = graphs.image(server, graphs.easyref())

    def instructed(preset: str) -> graphs.Graph:
        graph = graphs.easyref(encode={"instruction": ["instruction", 0]})
        graph["instruction"] = graphs.node("EasyRefInstruction", preset=preset, language="English", text="")
        return graph

    assert graphs.image(server, instructed("general")) == plain
    assert graphs.image(server, instructed("style")) != plain


def test_help_page_has_the_english_texts(pack):
    page = (Path(pack.__file__).parent / "web/docs/EasyRefInstruction.md").read_text(encoding="utf-8")
    presets = golden.part(pack, "nodes.group.instruction").PRESETS
    assert [name for name in presets if f"- {name}: {presets[name]['English'].strip()}" not in page] == []


# Budget


def test_budget_before_encoding(pack):
    easyref, text = golden.load(pack), golden.instruction(pack)

    def budget(group: Any, prompt: str, size: int) -> tuple:
        return golden.node(pack, "EasyRefGroupBudget").execute(easyref, group, prompt, text, size).args

    fits, largest, report = budget(golden.references(), "a cat", 84)
    assert (fits, largest) == (True, 84)
    assert "3 references at 84 pixels" in report
    assert "assumed" in report
    assert report.startswith("It fits.")

    context = easyref.encode([image[0] for image in golden.references()], "a cat", text, 84)
    report = budget(golden.references(), "a cat", 84)[2]
    assert f"{context.states.shape[1]} of " in report
    assert "measured at the last encoding" in report

    fits, largest, report = budget(torch.rand(5, 1008, 1008, 3), "", 1008)
    assert (fits, largest) == (False, 784)
    assert "does not fit the MLLM's context. The largest size that fits is 784 pixels" in report
