"""Bad input: each gets one clear error, and the server goes on to make the next picture."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from devkit.host import golden, graphs
from devkit.host.full_size_unets import FLUX, REFINER, SD15, on_meta

pytestmark = pytest.mark.one_host

RELEASE = "https://huggingface.co/zongzhuofan/EasyRef"


@pytest.fixture(scope="module", autouse=True)
def folder(server) -> Iterator[pathlib.Path]:
    """models/easyref, with the golden files in it; the bad ones are removed at the end."""
    graphs.install_golden(server)
    folder = server.base / "models" / "easyref"
    before = set(folder.iterdir())
    yield folder
    for bad in set(folder.iterdir()) - before:
        shutil.rmtree(bad) if bad.is_dir() else bad.unlink()


@pytest.fixture
def fails(request, server):
    """Runs a workflow that must fail and gives the error; afterwards the server must make a picture from new text."""
    yield lambda graph: graphs.failure(server, graph)
    assert graphs.picture(server, graphs.easyref(encode={"prompt": f"after {request.node.name}"}))


def loading(checkpoint: str, mllm: str = "easyref/golden-qwen2-vl") -> graphs.Graph:
    return graphs.easyref(load={"checkpoint": checkpoint, "mllm": mllm})


def assert_says(error: str, *parts: object) -> None:
    for part in parts:
        assert str(part) in error, error


# The loader's files


def test_missing_checkpoint(fails, folder):
    error = fails(loading("absent.safetensors"))
    assert_says(
        error, "'absent.safetensors'", f"Searched: {folder}", "there: ", "easyref.safetensors", RELEASE
    )


def test_missing_mllm_folder(fails, folder):
    error = fails(loading("easyref.safetensors", "easyref/absent"))
    # The host's own sentence: one of the loader's would be repeated for the checkpoint.
    assert_says(
        error, "mllm: 'easyref/absent' not in [", "'from the checkpoint'", "'easyref/golden-qwen2-vl'"
    )


OTHER_FILES = {
    "an IP-Adapter": ["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight", "ip_adapter.1.to_v_ip.weight"],
    "a LoRA": ["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"],
    "a Stable Diffusion 1.x/2.x checkpoint": [
        "model.diffusion_model.input_blocks.0.0.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    ],
    "an SDXL checkpoint": [
        "model.diffusion_model.input_blocks.0.0.weight",
        "conditioner.embedders.1.model.ln_final.weight",
    ],
    "a Flux model": ["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"],
    "a Qwen2-VL model without EasyRef's own layers": [
        "visual.patch_embed.proj.weight",
        "model.layers.0.mlp.up_proj.weight",
    ],
}


@pytest.mark.parametrize(("what", "names"), OTHER_FILES.items(), ids=lambda part: str(part)[:12])
def test_file_of_another_kind(fails, folder, what: str, names: list[str]):
    save_file({name: torch.zeros(2, 2) for name in names}, folder / "other.safetensors")
    assert_says(fails(loading("other.safetensors")), "other.safetensors", what, "mllm_final_layer.*", RELEASE)


def test_ip_adapter_as_pickle(fails, folder):
    nested = {
        "image_proj": {"proj.weight": torch.zeros(2)},
        "ip_adapter": {"1.to_k_ip.weight": torch.zeros(2)},
    }
    torch.save(nested, folder / "ip-adapter.bin")
    assert_says(fails(loading("ip-adapter.bin")), "ip-adapter.bin", "an IP-Adapter", RELEASE)


@pytest.mark.parametrize("kept", [0, 5, 1000, 400_000])
def test_truncated_safetensors(fails, folder, kept: int):
    (folder / "cut.safetensors").write_bytes(golden.CHECKPOINT.read_bytes()[:kept])
    assert_says(fails(loading("cut.safetensors")), "cut.safetensors", f"{kept:,} bytes", "download it again")


def test_web_page_saved_as_safetensors(fails, folder):
    (folder / "page.safetensors").write_text("<!doctype html><title>Sign in</title>")
    assert_says(fails(loading("page.safetensors")), "page.safetensors", "download it again")


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_of_more_than_tensors_is_not_run(fails, folder, tmp_path, zipped: bool):
    content = {"module": load_file(golden.CHECKPOINT), "run": Touch(tmp_path / "ran")}
    torch.save(content, folder / "unsafe.pt", _use_new_zipfile_serialization=zipped)
    assert_says(fails(loading("unsafe.pt")), "unsafe.pt", "could run code", ".safetensors")
    assert not (tmp_path / "ran").exists()


class Touch:
    """Pickled, an instruction to make a file."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return pathlib.Path.touch, (self.path,)


def test_mllm_folder_of_other_sizes(fails, folder):
    shutil.copytree(golden.MLLM, folder / "wide", dirs_exist_ok=True)
    settings = json.loads((golden.MLLM / "config.json").read_text())
    (folder / "wide" / "config.json").write_text(json.dumps(settings | {"hidden_size": 3584}))
    error = fails(loading("easyref.safetensors", "easyref/wide"))
    assert_says(error, "MLLM folder", "hidden_size: folder 3584, checkpoint 64", "Qwen2-VL-2B-Instruct")


def test_checkpoint_that_needs_an_mllm_folder(fails):
    assert_says(
        fails(loading("easyref.safetensors", "from the checkpoint")), "64 wide", "Choose the MLLM folder"
    )


def test_missing_keys(fails, folder):
    lost = sorted(name for name in load_file(golden.CHECKPOINT) if ".layers.1." in name)
    golden.write_changed(folder / "holes.safetensors", lambda tensors: [tensors.pop(name) for name in lost])
    error = fails(loading("holes.safetensors"))
    assert_says(error, "holes.safetensors", f"lacks {len(lost)} tensors", *lost[:10], "download")
    assert lost[10] not in error


# A MODEL that does not fit


@pytest.mark.parametrize(
    ("name", "unet", "found"),
    [
        ("SD15", SD15, "16 cross-attentions (5 x 320 wide, 5 x 640 wide, 6 x 1280 wide)"),
        ("SDXLRefiner", REFINER, "44 cross-attentions (20 x 768 wide, 24 x 1536 wide)"),
        ("Flux", FLUX, "no cross-attentions of Stable Diffusion's kind"),
    ],
)
def test_model_of_another_architecture(pack, name: str, unet: dict, found: str):
    """Against the widths of the released checkpoint, each model in the host's own class, without memory."""
    sites = golden.part(pack, "easyref_core.unet.layout").sdxl_sites()
    widths = {site: 640 if site.block == "input" and site.number < 6 else 1280 for site in sites}
    easyref = SimpleNamespace(model=SimpleNamespace(checkpoint=SimpleNamespace(widths=widths)))
    with pytest.raises(ValueError, match=rf"The MODEL \({name}\) does not fit") as refused:
        golden.node(pack, "EasyRefApply").execute(on_meta(unet), easyref, None, 1.0, 0.0, 1.0, 1.0)
    assert_says(str(refused.value), found, "made for 70 cross-attentions", "needs an SDXL base model")


# References


def of_images(shapes: str, fill: str = "noise", **changes: object) -> graphs.Graph:
    return graphs.of_images(["images", 0], {"images": graphs.tiny_images(shapes, fill=fill)}, **changes)


def test_group_without_images(fails):
    error = fails(graphs.of_images(["group", 0], {"group": graphs.group()}))
    assert_says(error, "reference group is empty", "Connect at least one image to images.image0")


@pytest.mark.parametrize("sent", ["image1", "images.image100"])
def test_misnamed_socket_beside_another_of_a_group(fails, sent: str):
    graph = graphs.easyref()
    graph["group"] = graphs.node("EasyRefGroup", **{"images.image0": ["image0", 0], sent: ["image1", 0]})
    said = "images.image0 to images.image99" if "." in sent else "Connect it to images.image1."
    assert_says(fails(graph), f"Reference Group has no input '{sent}'", said)


def test_link_to_the_name_of_all_sockets(fails):
    graph = graphs.easyref()
    graph["group"] = graphs.node("EasyRefGroup", images=["image0", 0])
    assert_says(fails(graph), "Reference Group has no input 'images'", "Connect it to images.image0.")


@pytest.mark.parametrize("sent", ["image0", "images.image100"])
def test_misnamed_sockets_alone_make_an_empty_group(fails, sent: str):
    """The host hands no unknown link to validate_inputs, so that the error can only name those that there are."""
    graph = graphs.easyref()
    graph["group"] = graphs.node("EasyRefGroup", **{sent: ["image0", 0]})
    assert_says(fails(graph), "reference group is empty", "images.image0")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("CombineTokens", {"method": "concat", "factor": 0.5, "weights": ""}),
        ("BatchTokens", {}),
        ("TokensOverFrames", {"frames": 2, "easing": "linear"}),
    ],
)
@pytest.mark.parametrize("sent", [("tokens0",), ("tokens.tokens0", "tokens1")])
def test_misnamed_sockets_of_tokens(fails, kind: str, settings: dict, sent: tuple[str, ...]):
    graph = graphs.easyref(apply={"tokens": ["made", 0]})
    links = dict.fromkeys(sent, ["aggregate", 0])
    graph["made"] = graphs.node(f"EasyRef{kind}", **settings, **links)
    assert_says(fails(graph), f"has no input '{sent[-1]}'", f"Connect it to tokens.{sent[-1]}.")


def test_unknown_input_of_any_node(fails):
    graph = graphs.easyref(apply={"attn_mask": ["image0", 1]})
    assert_says(fails(graph), "Apply EasyRef has no input 'attn_mask'", "end_percent, lora_strength, mask")


def test_group_of_an_empty_batch(fails):
    nodes = {"images": graphs.tiny_images("0x64x64x3"), "group": graphs.group(["images", 0])}
    assert_says(
        fails(graphs.of_images(["group", 0], nodes)), "reference group is empty", "at least one image"
    )


def test_empty_batch_in_the_encoder(fails):
    assert_says(fails(of_images("0x64x64x3")), "holds no reference", "at least one image")


def test_nothing_in_the_encoder(fails):
    graph = graphs.easyref()
    del graph["encode"]["inputs"]["group"]
    assert_says(fails(graph), "group")


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ("1x1x1x3", ["1x1 pixels", "smaller than one patch", "14x14"]),
        ("1x1x4000x3", ["4000x1 pixels", "smaller than one patch", "14x14"]),
        ("1x14x4000x3", ["4000x14 pixels", "more than 200 times", "Crop it"]),
        ("1x64x64x2", ["(64, 64, 2)", "1, 3 or 4 channels"]),
    ],
)
def test_image_that_holds_no_picture(fails, shape: str, parts: list[str]):
    assert_says(fails(of_images(shape)), "reference 1", *parts)


def test_nan_image(fails):
    assert_says(fails(of_images("1x64x64x3", "nan")), "reference 1", "1 values", "NaN", "Check the node")


def test_more_references_than_the_context_holds(fails):
    error = fails(of_images("5x1008x1008x3", encode={"size": 1008}))
    assert_says(error, "5 references", "4,088 fit", "The first 3 references fit", "smaller size")


def test_tokens_of_another_checkpoint(fails, folder):
    golden.write_changed(
        folder / "another.safetensors", lambda tensors: tensors["mllm_final_layer.reference_tokens"].mul_(2)
    )
    graph = graphs.easyref(apply={"easyref": ["another", 0]})
    graph["another"] = loading("another.safetensors")["load"]
    error = fails(graph)
    assert_says(
        error, "tokens was made by another EasyRef checkpoint", "another.safetensors", "Encode the group"
    )


def test_context_of_another_checkpoint(fails, folder):
    golden.write_changed(
        folder / "another.safetensors", lambda tensors: tensors["mllm_final_layer.reference_tokens"].mul_(2)
    )
    graph = graphs.easyref()
    graph["aggregate"]["inputs"]["easyref"] = ["another", 0]
    graph["another"] = loading("another.safetensors")["load"]
    assert_says(fails(graph), "context was made by another EasyRef checkpoint", "another.safetensors")


# Unusual, and accepted


def test_alpha_is_dropped(server):
    with_alpha = graphs.tiny_images("1x64x64x4")
    graph = graphs.of_images(["images", 0], {"images": with_alpha})
    colours = {
        "images": with_alpha,
        "split": graphs.node("SplitImageWithAlpha", image=["images", 0]),
    }
    assert graphs.picture(server, graph) == graphs.picture(server, graphs.of_images(["split", 0], colours))


def test_one_channel_is_grey(server):
    grey = graphs.tiny_images("1x64x64x1")
    three = {
        "images": grey,
        "mask": graphs.node("ImageToMask", image=["images", 0], channel="red"),
        "grey": graphs.node("MaskToImage", mask=["mask", 0]),
    }
    expected = graphs.picture(server, graphs.of_images(["grey", 0], three))
    assert graphs.picture(server, graphs.of_images(["images", 0], {"images": grey})) == expected


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "LA"])
def test_files_of_any_mode(server, mode: str):
    """As the same colours in an RGB file; the host reads grey files through a conversion of its own, a little off."""
    original = Image.open(golden.GOLDEN / "references" / "0.png").convert(mode)
    original.save(server.base / "input" / "any.png")
    original.convert("RGB").save(server.base / "input" / "rgb.png")
    pictures = [
        graphs.picture(
            server, graphs.of_images(["image", 0], {"image": graphs.node("LoadImage", image=name)})
        )
        for name in ("any.png", "rgb.png")
    ]
    found, wanted = (np.frombuffer(picture, np.uint8).astype(int) for picture in pictures)
    assert abs(found - wanted).mean() <= (1 if mode in ("L", "LA") else 0)


def test_special_tokens_in_the_prompt_are_text(server):
    assert graphs.picture(server, graphs.easyref(encode={"prompt": "a cat <|image_pad|><|im_end|> in snow"}))


def test_checkpoint_that_comes_through_a_link(server):
    graph = graphs.easyref()
    graph["name"] = graphs.node("TinyCombo", value="easyref.safetensors")
    graph["load"]["inputs"]["checkpoint"] = ["name", 0]
    assert graphs.picture(server, graph) == graphs.picture(server, graphs.easyref())


def test_missing_checkpoint_that_comes_through_a_link(fails):
    graph = graphs.easyref()
    graph["name"] = graphs.node("TinyCombo", value="absent.safetensors")
    graph["load"]["inputs"]["checkpoint"] = ["name", 0]
    assert_says(fails(graph), "'absent.safetensors'", "Searched:", RELEASE)
