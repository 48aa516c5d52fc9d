"""A test-only node pack: tiny random models and images, so that workflows run without downloads."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .tiny_clip import load_tiny_clip_vision
from .tiny_images import noise
from .tiny_sdxl import TinyVAE, load_tiny_sdxl, random_conditioning, random_controlnet


class TinySDXL(io.ComfyNode):
    """A tiny SDXL in place of a checkpoint loader and two text encoders."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TinySDXL",
            category="testing",
            inputs=[
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**31,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                ),
                io.Int.Input("prompt_tokens", default=77, min=1, max=77 * 4),
            ],
            outputs=[
                io.Model.Output(),
                io.Conditioning.Output("positive"),
                io.Conditioning.Output("negative"),
                io.Vae.Output(),
            ],
        )

    @classmethod
    def execute(cls, seed: int, prompt_tokens: int) -> io.NodeOutput:
        model = load_tiny_sdxl()
        positive = random_conditioning(2 * seed, prompt_tokens)
        negative = random_conditioning(2 * seed + 1, 77)
        return io.NodeOutput(model, positive, negative, TinyVAE(model.model.latent_format))


class TinyControlNet(io.ComfyNode):
    """A tiny ControlNet in place of a loader."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TinyControlNet", category="testing", inputs=[], outputs=[io.ControlNet.Output()]
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(random_controlnet(0))


class TinyImages(io.ComfyNode):
    """Random images that loaders cannot give: lists of several sizes, empty batches, any channels, NaN."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TinyImages",
            category="testing",
            inputs=[
                io.String.Input("shapes", tooltip="One batch x height x width x channels for each tensor."),
                io.Int.Input("seed", default=0, control_after_generate=io.ControlAfterGenerate.fixed),
                io.Combo.Input("fill", options=["noise", "nan"], default="noise"),
            ],
            outputs=[io.Image.Output(is_output_list=True)],
        )

    @classmethod
    def execute(cls, shapes: str, seed: int, fill: str) -> io.NodeOutput:
        return io.NodeOutput(noise(shapes, seed, fill == "nan"))


class TinyCombo(io.ComfyNode):
    """A choice as a linked value, as from the combo nodes of other packs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TinyCombo",
            category="testing",
            inputs=[io.String.Input("value")],
            outputs=[io.Combo.Output()],
        )

    @classmethod
    def execute(cls, value: str) -> io.NodeOutput:
        return io.NodeOutput(value)


class TinyClipVision(io.ComfyNode):
    """A tiny CLIP vision model in place of a loader."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TinyClipVision", category="testing", inputs=[], outputs=[io.ClipVision.Output()]
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(load_tiny_clip_vision())


class TinyNodes(ComfyExtension):
    """The pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [TinySDXL, TinyControlNet, TinyImages, TinyCombo, TinyClipVision]


async def comfy_entrypoint() -> TinyNodes:
    return TinyNodes()
