"""Reference Group."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from .sockets import EasyRefGroupSocket

if TYPE_CHECKING:
    from torch import Tensor


class EasyRefGroup(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefGroup",
            display_name="Reference Group",
            category="EasyRef",
            description="Puts images of any sizes into one ordered group. Batches and lists of images count as many; "
            "each keeps its own aspect. Chain groups to grow them.",
            search_aliases=["references", "image batch", "reference images"],
            is_input_list=True,  # lists of images of different sizes are one group, not one group each
            inputs=[
                io.Autogrow.Input(
                    "images",
                    template=io.Autogrow.TemplatePrefix(
                        io.Image.Input("image", tooltip="One reference, a batch, or a list of images."),
                        prefix="image",
                        min=0,
                        max=100,
                    ),
                    tooltip="References in order. A new socket appears when the last one is connected.",
                ),
                EasyRefGroupSocket.Input(
                    "group",
                    optional=True,
                    tooltip="A group to extend: the images here come after its references.",
                ),
            ],
            outputs=[EasyRefGroupSocket.Output(display_name="group", tooltip="The references, in order.")],
        )

    @classmethod
    def execute(
        cls, images: dict[str, list[Tensor]], group: list[tuple[Tensor, ...]] | None = None
    ) -> io.NodeOutput:
        references = [reference for earlier in group or [] for reference in earlier]
        # the order of the sockets, not of the dictionary: image10 comes after image9
        for name in sorted(images, key=lambda socket: int(socket.removeprefix("image"))):
            references += [
                reference for batch in images[name] if batch is not None for reference in split(batch)
            ]
        if not references:
            raise ValueError(
                "The reference group is empty. Connect at least one image, or a group to extend."
            )
        return io.NodeOutput(tuple(references))


def split(batch: Tensor) -> list[Tensor]:
    """(batch, height, width, channels) -> the single images, each (1, height, width, channels); none if it is empty."""
    return [batch[i : i + 1] for i in range(len(batch))]
