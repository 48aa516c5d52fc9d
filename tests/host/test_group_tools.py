"""The nodes around a group: what is shown of it, folders, crops, selections, instructions, budgets."""

from __future__ import annotations

import io
import itertools
import mimetypes
import struct
import subprocess
from pathlib import Path

import folder_paths
import numpy as np
import pytest
import torch
from PIL import Image, features

from devkit.host import golden, graphs

pytestmark = pytest.mark.one_host


@pytest.fixture(autouse=True)
def inputs(tmp_path, monkeypatch) -> Path:
    """An input folder of the test's own, and a folder for previews; the server has its own."""
    folder = tmp_path / "input"
    folder.mkdir()
    monkeypatch.setattr(folder_paths, "input_directory", str(folder))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    return folder


def draw(path: Path, width: int = 30, height: int = 20, seed: int = 0, **saved: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path, **saved)


def text_of(output: object) -> str:
    return output.ui["text"][0]


# The group


def test_group_shows_thumbnails_sizes_and_duplicates(pack):
    group = golden.node(pack, "EasyRefGroup")
    first, second, third = golden.references()
    output = group.execute({"image0": [first], "image1": [second], "image2": [third, first]})
    assert len(output.ui["images"]) == 1
    assert text_of(output).splitlines() == [
        "4 references",
        "Warning: reference 4 is the same picture as reference 1.",
    ]


def test_group_with_an_image_that_holds_no_picture_is_the_encoders_to_refuse(pack):
    group = golden.node(pack, "EasyRefGroup")
    broken = torch.full((1, 30, 30, 3), torch.nan)
    (references,) = group.execute({"image0": [broken], "image1": [torch.zeros(1, 1, 1, 3)]}).args
    assert len(references) == 2


def test_the_preview_of_a_group_is_served(server):
    graphs.install_golden(server)
    nodes = {"images": graphs.tiny_images("7x64x64x3", seed=70), "group": graphs.group(["images", 0])}
    history = server.run(graphs.of_images(["group", 0], nodes))
    assert history["outputs"]["group"]["text"] == ["7 references"]
    (png,) = server.images({"outputs": {"group": history["outputs"]["group"]}}, "temp")
    width, height = Image.open(io.BytesIO(png)).size
    assert 5 * 128 < width < 7 * 150  # six in a row
    assert height > 2 * 128


def test_selection_takes_references_in_the_order_written(pack):
    select = golden.node(pack, "EasyRefSelectReferences")
    group = golden.references()
    (chosen,) = select.execute(group, "3, 1").args
    assert [id(image) for image in chosen] == [id(group[2]), id(group[0])]
    assert select.execute(group, "").args[0] == group
    assert [id(image) for image in select.execute(group, "3-2").args[0]] == [id(group[2]), id(group[1])]
    assert select.execute(group, "all").args[0] == group
    with pytest.raises(ValueError, match="names 1,001 references; wanted at most 1,000"):
        select.execute(group, "1," * 1001)
    for wrong in ("0", "4", "1.5", "nan", "inf"):
        with pytest.raises(ValueError, match=f"references has '{wrong}', .*in a group of 3"):
            select.execute(group, wrong)


# Folders


@pytest.fixture
def from_folder(pack):
    return golden.node(pack, "EasyRefGroupFromFolder")


def test_folder_is_read_in_the_order_people_count(from_folder, inputs):
    for seed, name in enumerate(["10.png", "2.PNG", "1.jpg"]):
        draw(inputs / "faces" / name, 30 + seed, seed=seed)
    (inputs / "faces" / "notes.txt").write_text("not a picture")
    (inputs / "faces" / "deeper").mkdir()
    group, names = from_folder.execute("faces", 16, 0).args
    assert names.splitlines() == ["1.jpg", "2.PNG", "10.png"]
    assert [image.shape[2] for image in group] == [32, 31, 30]
    group, names = from_folder.execute("faces", 1, 1, golden.references()).args
    assert (names, len(group)) == ("2.PNG", 4)
    assert group[0] is not group[3]


def test_broken_picture_is_left_out_and_named(from_folder, inputs):
    draw(inputs / "a" / "1.png")
    (inputs / "a" / "2.png").write_bytes(b"no picture")
    draw(inputs / "a" / "3.png", 5, 5)
    output = from_folder.execute("a", 16, 0)
    assert output.args[1] == "1.png"
    assert "2.png was left out" in text_of(output)
    assert "3.png was left out" in text_of(output)
    assert "5x5 pixels" in text_of(output)


@pytest.fixture
def bare_system(monkeypatch) -> None:
    """A system whose table of file types knows .png and .txt alone, before the host has cached any other."""
    table = mimetypes.MimeTypes(filenames=())
    table.types_map = table.types_map_inv = ({}, {})
    table.add_type("image/png", ".png")
    table.add_type("text/plain", ".txt")
    monkeypatch.setattr(mimetypes, "guess_type", table.guess_type)
    monkeypatch.setattr(folder_paths, "extension_mimetypes_cache", {})


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jfif", "JPEG"),
        ("a.JPE", "JPEG"),
        ("a.avif", "AVIF"),
        ("a.tga", "TGA"),
        ("a.mpo", "MPO"),
        ("a.jp2", "JPEG2000"),
        ("a.webp", "WEBP"),
        ("a.qoi", "QOI"),
    ],
)
def test_what_pillow_reads_is_read_whatever_the_system_s_table_says(
    from_folder, inputs, bare_system, name: str, kind: str
):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    draw(inputs / "a" / name, format=kind)
    output = from_folder.execute("a", 16, 0)
    assert output.args[1] == name
    assert output.args[0][0].shape == (1, 20, 30, 3)
    (shown,) = output.ui["images"]  # the contact sheet is a PNG, whatever the files were
    assert shown["filename"].endswith(".png")


def test_what_is_left_out_is_named_with_the_reason(from_folder, inputs):
    draw(inputs / "a" / "1.png")
    for name in ("2.jxl", "3.heic", "4.HEIC", "notes.txt", "film.mpg", ".hidden"):
        (inputs / "a" / name).write_bytes(b"of another kind")
    (inputs / "a" / "5.png").write_bytes(b"no picture")
    output = from_folder.execute("a", 16, 0)
    assert output.args[1] == "1.png"
    said = text_of(output).splitlines()
    assert "Warning: left out, Pillow has no reader for .jxl files here: 2.jxl." in said
    assert "Warning: left out, Pillow has no reader for .heic files here: 3.heic, 4.HEIC." in said
    assert "Left out, not an image: film.mpg, notes.txt." in said
    assert any(line.startswith("Warning: 5.png was left out, it could not be read (") for line in said)
    assert ".hidden" not in text_of(output)


def test_a_reader_that_a_plugin_adds_is_used(from_folder, inputs, monkeypatch):
    draw(inputs / "a" / "1.jxl", format="PNG")
    Image.init()
    monkeypatch.setitem(Image.EXTENSION, ".jxl", "PNG")
    assert from_folder.execute("a", 16, 0).args[1] == "1.jxl"


def test_many_files_that_are_no_images_are_counted(from_folder, inputs):
    for number in range(1, 21):
        draw(inputs / "a" / f"{number}.png", seed=number)
        (inputs / "a" / f"{number}.txt").write_text("a caption")
    said = text_of(from_folder.execute("a", 16, 0)).splitlines()
    assert (
        "Left out, not an image: 1.txt, 2.txt, 3.txt, 4.txt, 5.txt, 6.txt, 7.txt, 8.txt and 12 more." in said
    )
    assert "4 of 20 images were not taken (start 0, limit 16)." in said


def test_files_that_are_not_read_take_no_place_in_the_limit(from_folder, inputs):
    (inputs / "a").mkdir()
    (inputs / "a" / "1.heic").write_bytes(b"of another kind")
    for number in (2, 3, 4):
        draw(inputs / "a" / f"{number}.png", seed=number)
    assert from_folder.execute("a", 2, 1).args[1] == "3.png\n4.png"


def test_an_error_of_any_kind_in_a_decoder_leaves_out_that_file_alone(from_folder, inputs, monkeypatch):
    draw(inputs / "a" / "1.png")
    draw(inputs / "a" / "2.bmp")

    def fail(*_: object) -> None:
        raise struct.error("unpack requires a buffer of 4 bytes")

    monkeypatch.setattr(Image.OPEN["BMP"][0], "load", fail)
    output = from_folder.execute("a", 16, 0)
    assert output.args[1] == "1.png"
    assert "2.bmp was left out, it could not be read (unpack requires" in text_of(output)


@pytest.mark.parametrize("name", ["1.eps", "1.png"])
def test_postscript_starts_no_program(from_folder, inputs, monkeypatch, name: str):
    """Pillow would start Ghostscript for it, also where the name says PNG."""
    started = []
    for call in ("check_call", "Popen", "run"):
        monkeypatch.setattr(subprocess, call, lambda *args, **_: started.append(args))
    (inputs / "a").mkdir()
    Image.new("RGB", (30, 20)).save(inputs / "a" / name, format="EPS")
    with pytest.raises(ValueError, match="No picture was found in 'a'.*1"):
        from_folder.execute("a", 16, 0)
    assert started == []


def test_a_folder_of_images_without_a_reader_says_why(from_folder, inputs):
    (inputs / "a").mkdir()
    (inputs / "a" / "1.heic").write_bytes(b"of another kind")
    with pytest.raises(ValueError, match=r"Pillow has no reader for \.heic files here: 1\.heic"):
        from_folder.execute("a", 16, 0)


def test_exif_orientation_is_applied_as_the_hosts_loader_does(from_folder, inputs):
    from nodes import LoadImage

    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    draw(inputs / "turned.png", 40, 20, exif=exif)
    (group, _) = from_folder.execute(".", 16, 0).args
    assert group[0].shape == (1, 40, 20, 3)
    assert torch.equal(group[0], LoadImage().load_image("turned.png")[0])


@pytest.mark.parametrize("folder", ["..", "a/../..", "/etc", "", "link", "a\x00b", "x" * 5000, "C:\\a"])
def test_folder_outside_the_input_folder_is_refused(from_folder, inputs, folder: str):
    draw(inputs.parent / "outside" / "1.png")
    (inputs / "link").symlink_to(inputs.parent / "outside")
    with pytest.raises(ValueError, match="is not inside ComfyUI's input folder"):
        from_folder.execute(folder, 16, 0)


def test_file_that_is_a_link_out_of_the_input_folder_is_refused(from_folder, inputs):
    draw(inputs.parent / "secret.png")
    draw(inputs / "a" / "1.png")
    (inputs / "a" / "2.png").symlink_to(inputs.parent / "secret.png")
    with pytest.raises(ValueError, match="links that lead out"):
        from_folder.execute("a", 16, 0)


def test_missing_and_empty_folders(from_folder, inputs):
    (inputs / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"Folder 'absent' does not exist in .*Folders there: empty"):
        from_folder.execute("absent", 16, 0)
    with pytest.raises(ValueError, match="No picture was found in 'empty'"):
        from_folder.execute("empty", 16, 0)


def test_folder_is_read_again_when_a_file_changes(from_folder, inputs):
    seen = []
    draw(inputs / "a" / "1.png")
    seen.append(from_folder.fingerprint_inputs("a", 16, 0))
    draw(inputs / "a" / "2.png")
    seen.append(from_folder.fingerprint_inputs("a", 16, 0))
    draw(inputs / "a" / "2.png", 31)
    seen.append(from_folder.fingerprint_inputs("a", 16, 0))
    assert len(set(seen)) == 3
    assert seen[-1] == from_folder.fingerprint_inputs("a", 16, 0, group=None)
    (inputs / "a" / "3.heic").write_bytes(b"of another kind")
    assert from_folder.fingerprint_inputs("a", 16, 0) not in seen  # the report names it


# Crops


@pytest.fixture
def crop(pack):
    return golden.node(pack, "EasyRefCropReference")


def test_no_crop_leaves_every_reference_bit_for_bit(crop):
    references = golden.references()
    group, images = crop.execute([references], ["none"]).args
    assert all(torch.equal(a, b) for a, b in zip(group, references, strict=True))
    assert len(images) == len(references)


def test_squares_of_mixed_sizes_from_a_list_keep_their_order(crop):
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
    nodes = {
        "images": graphs.tiny_images("2x64x96x3 1x84x64x3", seed=80),
        "crop": graphs.node(
            "EasyRefCropReference", images=["images", 0], crop="square in the middle", padding=1.5
        ),
    }
    through_list = {**nodes, "group": graphs.group(["crop", 1])}
    expected = graphs.picture(server, graphs.of_images(["crop", 0], nodes))
    assert graphs.picture(server, graphs.of_images(["group", 0], through_list)) == expected


# Instructions


@pytest.fixture
def instruct(pack):
    return golden.node(pack, "EasyRefInstruction")


def test_every_preset_gives_its_text_and_shows_it(pack, instruct):
    presets = golden.part(pack, "easyref_core.mllm.presets")
    for preset, language in itertools.product(presets.PRESETS, presets.LANGUAGES):
        output = instruct.execute(preset, language, "")
        assert output.args == (presets.PRESETS[preset][language],)
        assert text_of(output) == output.args[0]


def test_own_text_replaces_the_presets(instruct):
    assert instruct.execute("style", "English", "Look at the hat.").args == ("Look at the hat.\n",)
    assert instruct.execute("custom", "English", "Look:\n").args == ("Look:\n",)
    with pytest.raises(ValueError, match="custom and the text is empty"):
        instruct.execute("custom", "English", " \n")


def test_the_general_preset_gives_the_picture_of_encode_alone(server):
    graphs.install_golden(server)
    plain = graphs.picture(server, graphs.easyref())

    def instructed(preset: str) -> graphs.Graph:
        graph = graphs.easyref(encode={"instruction": ["instruction", 0]})
        graph["instruction"] = graphs.node("EasyRefInstruction", preset=preset, language="English", text="")
        return graph

    assert graphs.picture(server, instructed("general")) == plain
    assert graphs.picture(server, instructed("style")) != plain


def test_the_help_page_has_the_english_texts(pack):
    page = (Path(pack.__file__).parent / "web/docs/EasyRefInstruction.md").read_text(encoding="utf-8")
    presets = golden.part(pack, "easyref_core.mllm.presets").PRESETS
    assert [name for name in presets if f"- {name}: {presets[name]['English'].strip()}" not in page] == []


# Budget


def test_budget_before_encoding(pack):
    easyref = golden.load(pack)
    node = golden.node(pack, "EasyRefGroupBudget")
    text = golden.instruction(pack)
    fits, largest, report = node.execute(easyref, golden.references(), "a cat", text, 84).args
    assert (fits, largest) == (True, 84)
    assert "3 references at 84 pixels" in report
    assert "assumed" in report
    assert report.startswith("It fits.")

    context = easyref.encode([image[0] for image in golden.references()], "a cat", text, 84)
    report = node.execute(easyref, golden.references(), "a cat", text, 84).args[2]
    assert f"{context.states.shape[1]} of " in report
    assert "measured at the last encoding" in report

    fits, largest, report = node.execute(easyref, torch.rand(5, 1008, 1008, 3), "", text, 1008).args
    assert (fits, largest) == (False, 784)
    assert "does not fit the MLLM's context. The largest size that fits is 784 pixels" in report
