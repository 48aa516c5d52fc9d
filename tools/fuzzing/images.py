"""References: sizes, types, modes and numbers of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image

import easyref_core as er
from devkit import golden

from .cases import Case
from .checkpoint import TINY
from .mutations import ODD, broken_bytes

MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"]
MODES += ["I", "F", "I;16", "I;16B", "I;16L"]
SIDES = [0, 1, 2, 13, 14, 15, 27, 28, 64, 100, 199, 333, 1000, 2801, 4000]
VALUES = [
    0.0,
    0.5,
    1.0,
    -1.0,
    2.0,
    255.0,
    1e-30,
    1e30,
    -1e30,
    3e38,
    float("nan"),
    float("inf"),
    float("-inf"),
]
DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.uint8,
    torch.int32,
    torch.bool,
    torch.complex64,
]


class Cases:
    """Groups with one odd reference or more, through encode and aggregate of the shipped tiny model."""

    readable = None
    writable = ()

    def __init__(self, folder: Path) -> None:
        self.model = er.load(TINY / "tiny_easyref.safetensors", TINY / "tiny-qwen2-vl")
        self.usual = golden.references()

    def good(self) -> object:
        return self._used(self.usual, 96)

    def make(self, random: Random, folder: Path) -> Case:
        size = random.choice([64, 96, 96, 128, 336])
        if random.random() < 0.15:
            how, group = self._odd_group(random)
            size = min(size, 128)
        else:
            how, image = odd_image(random)
            group = random.choice([[image], [*self.usual, image], [image, *self.usual[:1]]])
        return Case(f"{how}, size {size}", lambda: self._used(group, size))

    def _used(self, group: Any, size: int) -> object:
        context = self.model.encode(group, "a thing", size=size)
        return [context.states, self.model.aggregate(context)]

    def _odd_group(self, random: Random) -> tuple[str, Any]:
        batch = torch.rand(3, 20, 20, 3, generator=torch.Generator().manual_seed(random.randrange(99)))
        groups: dict[str, Callable[[], Any]] = {
            "empty": list,
            "empty batch": lambda: torch.zeros(0, 20, 20, 3),
            "batch": lambda: batch,
            "tuple": lambda: tuple(batch),
            "1000 references": lambda: [self.usual[0]] * 1000,
            "200 references": lambda: [Image.new("RGB", (20, 20))] * 200,
            "generator": lambda: (image for image in self.usual),
            "one image": lambda: self.usual[0],
            "one tensor": lambda: batch[0],
            "array": lambda: batch.numpy(),
            "a path": lambda: "references/0.png",
            "dictionary": lambda: {"image": self.usual[0]},
            "odd": lambda: random.choice(ODD),
        }
        how = random.choice(list(groups))
        return how, groups[how]()


def odd_image(random: Random) -> tuple[str, Any]:
    return random.choice([odd_picture, odd_picture, odd_tensor, odd_tensor, odd_tensor, odd_file, odd_thing])(
        random
    )


def odd_sides(random: Random) -> tuple[int, int]:
    sides = random.choice(SIDES), random.choice(SIDES)
    return sides if sides[0] * sides[1] <= 4_000_000 else (sides[0], 28)


def odd_picture(random: Random) -> tuple[str, Image.Image]:
    mode, sides = random.choice(MODES), odd_sides(random)
    pixels = random.randbytes(64)
    picture = Image.new("RGB", sides, tuple(pixels[:3]))
    try:
        picture = picture.convert(mode)
    except ValueError:  # PIL does not convert into every mode
        picture = Image.new(mode, sides)
    return f"PIL {mode} {sides}", picture


def odd_tensor(random: Random) -> tuple[str, torch.Tensor]:
    height, width = odd_sides(random)
    channels = random.choice([3, 3, 3, 1, 4, 0, 2, 5])
    shape = random.choice(
        [(height, width, channels)] * 6
        + [(height, width), (1, height, width, channels), (channels, height, width), (), (3,)]
    )
    dtype = random.choice([torch.float32] * 4 + DTYPES)
    tensor = torch.rand(shape, generator=torch.Generator().manual_seed(random.randrange(99)))
    value = random.choice([None, None, None, *VALUES])
    if value is not None and tensor.numel():
        tensor = torch.full_like(tensor, value) if random.random() < 0.3 else tensor
        tensor.view(-1)[random.randrange(tensor.numel())] = value
    tensor = tensor.to(dtype)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "": lambda: tensor,
        "transposed": lambda: tensor.transpose(0, 1) if tensor.ndim > 1 else tensor,
        "every second": lambda: tensor[::2, ::2] if tensor.ndim > 1 else tensor,
        "expanded": lambda: torch.rand(1, 1, 3).expand(200, 300, 3),
        "with gradient": lambda: tensor.clone().requires_grad_() if tensor.is_floating_point() else tensor,
        "meta": lambda: tensor.to("meta"),
        "sparse": lambda: tensor.to_sparse(),
        "subclass": lambda: torch.nn.Parameter(tensor, requires_grad=False),
    }
    how = random.choice(["", "", "", *ways])
    try:
        made = ways[how]()
    except (RuntimeError, NotImplementedError):
        made = tensor
    return f"tensor {tuple(made.shape)} {made.dtype} {how} with {value}", made


def odd_file(random: Random) -> tuple[str, Image.Image]:
    """A picture whose file is damaged, opened and not read yet."""
    data = io.BytesIO()
    kind = random.choice(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
    golden.references()[0].convert("RGB").save(data, kind)
    how, broken = broken_bytes(data.getvalue(), random)
    try:
        return f"{kind} file, {how}", Image.open(io.BytesIO(broken))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return "PIL RGB 20x20", Image.new("RGB", (20, 20))


def odd_thing(random: Random) -> tuple[str, Any]:
    thing = random.choice([*ODD, b"bytes", np.zeros((20, 20, 3), np.float32), Path("a.png"), object()])
    return f"a {type(thing).__name__}", thing
