"""The whole path on models that come with the repository: three references, the picture without them, and with them.

In ComfyUI with the real nodes where one is found (tests/hosts.py), else with the core and diffusers alone. The models
are tiny and random: they show that references change the picture and how, not what a trained EasyRef paints.
"""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image, ImageChops

import easyref_core as er
from easyref_core.visualize import contact_sheet
from tests.cpu_torch import complete_cpu_torch
from tests.hosts import ROOT, find_hosts, host_version

GOLDEN = ROOT / "tests" / "golden"
OUTPUT = ROOT / "output" / "demo.png"
SETTINGS = json.loads((GOLDEN / "expected.json").read_text())
STEPS, LATENT = 8, 32  # denoising steps; side of the square latent, an eighth of the picture's


def main() -> None:
    start = time.monotonic()
    references = [Image.open(GOLDEN / "references" / f"{i}.png") for i in range(SETTINGS["images"])]
    hosts = find_hosts()
    if hosts:
        print(f"demo: the nodes in ComfyUI {host_version(hosts[0])}")
        without, with_references = in_comfyui(hosts[0])
    else:
        print("demo: no ComfyUI found, the core on a diffusers UNet")
        without, with_references = in_diffusers(references)
    OUTPUT.parent.mkdir(exist_ok=True)
    pictures = [without, with_references, ImageChops.difference(without, with_references)]
    rows = {"references": references, "random tiny SDXL: without, with, and the difference": pictures}
    contact_sheet(rows).save(OUTPUT)
    print(f"demo: wrote {OUTPUT.relative_to(ROOT)} in {time.monotonic() - start:.0f} s")


def in_comfyui(host: Path) -> tuple[Image.Image, Image.Image]:
    """The pictures of the plain and of the conditioned workflow, from a server started for them."""
    from tests.host import graphs
    from tests.host.server import ComfyServer

    def picture(graph: graphs.Graph) -> Image.Image:
        graph["latent"]["inputs"].update(width=8 * LATENT, height=8 * LATENT)
        return Image.open(io.BytesIO(server.images(server.run(graph))[0]))

    with ComfyServer(host) as server:
        graphs.install_golden(server)
        return picture(graphs.plain(steps=STEPS)), picture(graphs.easyref(steps=STEPS))


def in_diffusers(references: list[Image.Image]) -> tuple[Image.Image, Image.Image]:
    """The same with easyref_core and a diffusers UNet, Euler sampling written out."""
    complete_cpu_torch()
    import torch
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

    model = er.load(GOLDEN / "easyref.safetensors", GOLDEN / "mllm")
    size = SETTINGS["cond_image_size"]
    tokens = model.aggregate(model.encode(references, SETTINGS["prompt"], size=size))
    unet = UNet2DConditionModel.from_pretrained(GOLDEN / "unet")
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 4, LATENT, LATENT, generator=random)
    text = torch.randn(2, 77, unet.config.cross_attention_dim, generator=random)
    added = {"text_embeds": torch.randn(2, 32, generator=random), "time_ids": torch.zeros(2, 6)}

    @torch.inference_mode()
    def sample() -> Image.Image:
        scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        scheduler.set_timesteps(STEPS)
        latent = noise * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            batch = scheduler.scale_model_input(latent.repeat(2, 1, 1, 1), t)
            unconditional, conditional = unet(batch, t, text, added_cond_kwargs=added).sample.chunk(2)
            guided = unconditional + 5.0 * (conditional - unconditional)
            latent = scheduler.step(guided, t, latent).prev_sample
        colours = (latent[0, :3] / latent.abs().max() / 2 + 0.5).clamp(0, 1) * 255  # there is no tiny VAE
        return Image.fromarray(colours.byte().movedim(0, -1).numpy()).resize((8 * LATENT, 8 * LATENT), 0)

    without = sample()
    attachment = er.diffusers_unet.apply(unet, model, tokens, model.unconditional(size=size))
    with_references = sample()
    attachment.remove()
    return without, with_references


if __name__ == "__main__":
    main()
