"""Nodes Reference Group (images -> group) and Select References (group -> part of it)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ...easyref_core.utils.number_lists import parse_references
from ..host.images import ReferenceGroup, split, split_group, split_masks
from ..host.socket_types import EasyRefGroupSocket
from ..host.validation import validates_inputs
from .summary import count_text, group_preview

if TYPE_CHECKING:
    from torch import Tensor

MAX_SELECTED = 1000  # references of a selection, which may repeat a reference
EMPTY = (
    "The reference group is empty. Connect at least one image to images.image0, or a group to extend to "
    "group. Sockets with other names, as programs may send, are ignored."
)


@validates_inputs
class EasyRefGroup(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefGroup",
            display_name="Reference Group",
            category="EasyRef",
            description="Puts images of any sizes into one ordered group. Batches and lists count as "
            "several images; each keeps its aspect ratio. Chain groups to grow them. Shows the group after "
            "a run.",
            search_aliases=["references", "image batch", "reference images"],
            is_output_node=True,
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
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="A mask for each image here, in order: only the marked (white) part of a "
                    "reference counts when the reference tokens gather what the group shares. A mask of any "
                    "size is stretched over its image. The multimodal LLM still reads whole images, so some "
                    "of the rest may come through. A mask of ones changes nothing.",
                ),
            ],
            outputs=[EasyRefGroupSocket.Output(display_name="group", tooltip="The references, in order.")],
        )

    @classmethod
    def validate_inputs(cls, **inputs: Any) -> bool:
        """Refuse a group without links, because an output node that fails while it runs stops the others.

        Raises ValueError, because the host reports a returned text only for inputs that are connected.
        """
        if not inputs.get("images") and "group" not in inputs:
            raise ValueError(EMPTY)
        return True

    @classmethod
    def execute(
        cls,
        images: dict[str, list[Tensor]],
        group: list[tuple[Tensor, ...]] | None = None,
        masks: list[Tensor] | None = None,
    ) -> io.NodeOutput:
        earlier = [split_group(one) for one in group or []]
        references: list[Tensor] = []
        # the order of the sockets, not of the dictionary: image10 comes after image9
        for name in sorted(images, key=lambda socket: int(socket.removeprefix("image"))):
            references += [
                reference for batch in images[name] if batch is not None for reference in split(batch)
            ]
        added = ReferenceGroup(references, masks_for(references, masks))
        extended = ReferenceGroup.joined([*earlier, added])
        if not extended:
            raise ValueError(EMPTY)
        return io.NodeOutput(extended, ui=group_preview(extended))


def masks_for(references: Sequence[Tensor], masks: Sequence[Tensor] | None) -> list[Tensor] | None:
    """The mask (height, width) of each reference; None without masks. ValueError for another number."""
    if masks is None:
        return None
    single = split_masks(masks)
    if len(single) != len(references):
        raise ValueError(
            f"masks holds {len(single)}, images {count_text(len(references))}. Connect one mask for each, as "
            "a batch or a list in the order of the sockets; a mask of ones leaves an image whole. The "
            "references of group keep their own masks."
        )
    return single


@validates_inputs
class EasyRefSelectReferences(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefSelectReferences",
            display_name="Select References",
            category="EasyRef",
            description="Selects references of a group, in the order you write.",
            search_aliases=["reorder references", "pick images", "reference order"],
            is_output_node=True,
            inputs=[
                EasyRefGroupSocket.Input("group", tooltip="The group, from Reference Group."),
                io.String.Input(
                    "references",
                    tooltip="Numbers from 1, separated by commas: 3, 1, 2 takes the third, then the first "
                    "two. Ranges count up or down: 1-3, 6-4. 'all' or empty: all references in order.",
                ),
            ],
            outputs=[EasyRefGroupSocket.Output(display_name="group", tooltip="The selected references.")],
        )

    @classmethod
    def execute(cls, group: tuple[Tensor, ...], references: str) -> io.NodeOutput:
        chosen = parse_references(references, "references", len(group), MAX_SELECTED) or range(
            1, len(group) + 1
        )
        selected = split_group(group).selected(number - 1 for number in chosen)
        return io.NodeOutput(selected, ui=group_preview(selected))
