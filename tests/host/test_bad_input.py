"""Bad input on a server: one clear error, and the server goes on to make the next image.

The texts of the errors are pinned in tests/core; here each kind of error reaches the client once.
"""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from devkit.host import golden, graphs

pytestmark = pytest.mark.one_host

RELEASE = "https://huggingface.co/zongzhuofan/EasyRef"
CHECKPOINT, MLLM = "easyref.safetensors", "easyref/golden-qwen2-vl"


@pytest.fixture(scope="module", autouse=True)
def folder(server) -> Iterator[pathlib.Path]:
    """models/easyref; files that a test adds are removed at the end."""
    folder = server.base / "models" / "easyref"
    before = set(folder.iterdir())
    yield folder
    for bad in set(folder.iterdir()) - before:
        shutil.rmtree(bad) if bad.is_dir() else bad.unlink()


@pytest.fixture
def refuses(request, server) -> Iterator[Callable[..., str]]:
    """Run a workflow whose error must hold these parts; afterwards the server must encode a new text."""

    def refuses(graph: graphs.Graph, *parts: object) -> str:
        error = graphs.failure(server, graph)
        for part in parts:
            assert str(part) in error, error
        return error

    yield refuses
    assert graphs.image(server, graphs.easyref(encode={"prompt": f"after {request.node.name}"}))


def loading(checkpoint: str = CHECKPOINT, mllm: str = MLLM) -> graphs.Graph:
    return graphs.easyref(load={"checkpoint": checkpoint, "mllm": mllm})


def through_a_link(checkpoint: str) -> graphs.Graph:
    graph = graphs.easyref()
    graph["name"] = graphs.node("TinyCombo", value=checkpoint)
    graph["load"]["inputs"]["checkpoint"] = ["name", 0]
    return graph


# The loader's files


class Touch:
    """Pickled, an instruction to create a file."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return pathlib.Path.touch, (self.path,)


IP_ADAPTER = {
    "image_proj": {"proj.weight": torch.zeros(2)},
    "ip_adapter": {"1.to_k_ip.weight": torch.zeros(2)},
}
SDXL = ["model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.1.model.ln_final.weight"]
WRITE: dict[str, tuple[Callable[[pathlib.Path], object], list[str]]] = {
    "sdxl.safetensors": (
        lambda path: save_file({name: torch.zeros(2, 2) for name in SDXL}, path),
        ["an SDXL checkpoint", "mllm_final_layer.*", RELEASE],
    ),
    "ip-adapter.bin": (lambda path: torch.save(IP_ADAPTER, path), ["an IP-Adapter", RELEASE]),
    "cut.safetensors": (
        lambda path: path.write_bytes(golden.CHECKPOINT.read_bytes()[:400_000]),
        ["400,000 bytes", "download it again"],
    ),
    "page.safetensors": (
        lambda path: path.write_text("<!doctype html><title>Sign in</title>"),
        ["download it again"],
    ),
}


@pytest.mark.parametrize("name", WRITE)
def test_unusable_checkpoint(refuses, folder, name: str) -> None:
    write, parts = WRITE[name]
    write(folder / name)
    refuses(loading(name), name, *parts)


def test_pickle_of_more_than_tensors_is_not_run(refuses, folder, tmp_path) -> None:
    content = {"module": load_file(golden.CHECKPOINT), "run": Touch(tmp_path / "ran")}
    torch.save(content, folder / "unsafe.pt")
    refuses(loading("unsafe.pt"), "unsafe.pt", "could run code", ".safetensors")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("graph", [loading, through_a_link])
def test_missing_checkpoint(refuses, folder, graph: Callable) -> None:
    parts = ["'absent.safetensors'", f"Searched: {folder}", "there: ", CHECKPOINT, RELEASE]
    refuses(graph("absent.safetensors"), *parts)


def test_missing_mllm_folder(refuses) -> None:
    # The host's own sentence: one of the loader's would be repeated for the checkpoint.
    parts = ["mllm: 'easyref/absent' not in [", "'from the checkpoint'", f"'{MLLM}'"]
    refuses(loading(mllm="easyref/absent"), *parts)


def test_mllm_folder_of_other_sizes(refuses, folder) -> None:
    shutil.copytree(golden.MLLM, folder / "wide", dirs_exist_ok=True)
    settings = json.loads((golden.MLLM / "config.json").read_text())
    (folder / "wide" / "config.json").write_text(json.dumps(settings | {"hidden_size": 3584}))
    found = "hidden_size: folder 3584, checkpoint 64"
    refuses(loading(mllm="easyref/wide"), "MLLM folder", found, "Qwen2-VL-2B-Instruct")


def test_checkpoint_that_needs_an_mllm_folder(refuses) -> None:
    refuses(loading(mllm="from the checkpoint"), "64 wide", "Choose the MLLM folder")


def test_missing_keys(refuses, folder) -> None:
    lost = sorted(name for name in load_file(golden.CHECKPOINT) if ".layers.1." in name)
    golden.write_changed(folder / "holes.safetensors", lambda tensors: [tensors.pop(name) for name in lost])
    parts = ["holes.safetensors", f"lacks {len(lost)} tensors", *lost[:10], "download"]
    assert lost[10] not in refuses(loading("holes.safetensors"), *parts)


# Groups, sockets and references


def of_images(shapes: str, fill: str = "noise", **changes: object) -> graphs.Graph:
    return graphs.of_images(["images", 0], {"images": graphs.tiny_images(shapes, fill=fill)}, **changes)


def with_group(**links: list) -> graphs.Graph:
    sockets = {name.replace("_", "."): link for name, link in links.items()}
    return graphs.easyref() | {"group": graphs.node("EasyRefGroup", **sockets)}


def without_a_group() -> graphs.Graph:
    graph = graphs.easyref()
    del graph["encode"]["inputs"]["group"]
    return graph


def of_empty_batch() -> graphs.Graph:
    nodes = {"images": graphs.tiny_images("0x64x64x3"), "group": graphs.group(["images", 0])}
    return graphs.of_images(["group", 0], nodes)


IMAGE = ["image0", 0]
EMPTY = "reference group is empty"
NO_INPUT = "Reference Group has no input "
GRAPHS: dict[str, tuple[Callable[[], graphs.Graph], list[str]]] = {
    "group without images": (
        lambda: graphs.of_images(["group", 0], {"group": graphs.group()}),
        [EMPTY, "Connect at least one image to images.image0"],
    ),
    "misnamed beside another": (
        lambda: with_group(images_image0=IMAGE, image1=["image1", 0]),
        [f"{NO_INPUT}'image1'", "Connect it to images.image1."],
    ),
    "beyond the last beside another": (
        lambda: with_group(images_image0=IMAGE, images_image100=["image1", 0]),
        [f"{NO_INPUT}'images.image100'", "images.image0 to images.image99"],
    ),
    "name of all sockets": (
        lambda: with_group(images=IMAGE),
        [f"{NO_INPUT}'images'", "Connect it to images.image0."],
    ),
    # The host hands no unknown link to validate_inputs, so the error can only name those that exist.
    "misnamed alone": (lambda: with_group(image0=IMAGE), [EMPTY, "images.image0"]),
    "beyond the last alone": (lambda: with_group(images_image100=IMAGE), [EMPTY, "images.image0"]),
    "unknown input": (
        lambda: graphs.easyref(apply={"attn_mask": ["image0", 1]}),
        ["Apply EasyRef has no input 'attn_mask'", "end_percent, lora_strength, easyref, mask"],
    ),
    "group of an empty batch": (of_empty_batch, [EMPTY, "at least one image"]),
    "empty batch in the encoder": (
        lambda: of_images("0x64x64x3"),
        ["holds no reference", "at least one image"],
    ),
    "nothing in the encoder": (without_a_group, ["group"]),
    "1x1": (lambda: of_images("1x1x1x3"), ["reference 1", "1x1 pixels", "smaller than one patch", "14x14"]),
    "thin": (
        lambda: of_images("1x14x4000x3"),
        ["reference 1", "4000x14 pixels", "more than 200 times", "Crop it"],
    ),
    "two channels": (lambda: of_images("1x64x64x2"), ["reference 1", "(64, 64, 2)", "1, 3 or 4 channels"]),
    "NaN": (lambda: of_images("1x64x64x3", "nan"), ["reference 1", "1 values", "NaN", "Check the node"]),
    "too many": (
        lambda: of_images("5x1008x1008x3", encode={"size": 1008}),
        ["5 references", "4,088 fit", "The first 3 references fit", "smaller size"],
    ),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_unusable_workflow(refuses, name: str) -> None:
    graph, parts = GRAPHS[name]
    refuses(graph(), *parts)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("CombineTokens", {"method": "concat", "factor": 0.5, "weights": ""}),
        ("BatchTokens", {}),
        ("TokensOverFrames", {"frames": 2, "easing": "linear"}),
    ],
)
@pytest.mark.parametrize("sent", [("tokens0",), ("tokens.tokens0", "tokens1")])
def test_misnamed_sockets_of_tokens(refuses, kind: str, settings: dict[str, Any], sent: tuple) -> None:
    graph = graphs.easyref(apply={"tokens": ["made", 0]})
    graph["made"] = graphs.node(f"EasyRef{kind}", **settings, **dict.fromkeys(sent, ["aggregate", 0]))
    refuses(graph, f"has no input '{sent[-1]}'", f"Connect it to tokens.{sent[-1]}.")


@pytest.mark.parametrize(("node", "thing"), [("apply", "tokens"), ("aggregate", "context")])
def test_another_checkpoint(refuses, folder, node: str, thing: str) -> None:
    golden.write_other_tokens(folder / "another.safetensors")
    graph = graphs.easyref()
    graph[node]["inputs"]["easyref"] = ["another", 0]
    graph["another"] = loading("another.safetensors")["load"]
    was = f"{thing} was made by another EasyRef checkpoint"
    refuses(graph, was, "another.safetensors", "Encode the group")


# Unusual input that is accepted


ALPHA_IS_DROPPED = {"rgb": graphs.node("SplitImageWithAlpha", image=["images", 0])}
ONE_CHANNEL_IS_GREY = {
    "mask": graphs.node("ImageToMask", image=["images", 0], channel="red"),
    "rgb": graphs.node("MaskToImage", mask=["mask", 0]),
}


@pytest.mark.parametrize(("channels", "by_hand"), [(4, ALPHA_IS_DROPPED), (1, ONE_CHANNEL_IS_GREY)])
def test_channels_are_converted(server, channels: int, by_hand: graphs.Graph) -> None:
    images = {"images": graphs.tiny_images(f"1x64x64x{channels}")}
    expected = graphs.image(server, graphs.of_images(["rgb", 0], images | by_hand))
    assert graphs.image(server, graphs.of_images(["images", 0], images)) == expected


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "LA"])
def test_files_of_any_mode(server, mode: str) -> None:
    """The result is that of an RGB file of the same colors; the host rounds grey files differently."""
    original = Image.open(golden.GOLDEN / "references" / "0.png").convert(mode)
    original.save(server.base / "input" / "any.png")
    original.convert("RGB").save(server.base / "input" / "rgb.png")
    loads = [{"image": graphs.node("LoadImage", image=name)} for name in ("any.png", "rgb.png")]
    results = [graphs.image(server, graphs.of_images(["image", 0], load)) for load in loads]
    ours, rgb = (np.frombuffer(image, np.uint8).astype(int) for image in results)
    assert abs(ours - rgb).mean() <= (1 if mode in ("L", "LA") else 0)


def test_special_tokens_in_the_prompt_are_text(server) -> None:
    assert graphs.image(server, graphs.easyref(encode={"prompt": "a cat <|image_pad|><|im_end|> in snow"}))


def test_checkpoint_that_comes_through_a_link(server) -> None:
    assert graphs.image(server, through_a_link(CHECKPOINT)) == graphs.image(server, graphs.easyref())
