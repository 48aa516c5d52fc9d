"""Reference Group, and a selection of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ...easyref_core.inspect.duplicates import duplicates
from ...easyref_core.utils.number_lists import parse_references
from ..host import preview
from ..host.images import split
from ..host.notes import duplicate_notes
from ..host.socket_types import EasyRefGroupSocket
from ..host.validation import validates_inputs

if TYPE_CHECKING:
    from torch import Tensor

MOST = 1000  # references of a selection, which may name one again and again
EMPTY = (
    "The reference group is empty. Connect at least one image to images.image0, or a group to extend to group. Sockets "
    "of other names, as of a program, are not read."
)
FEW = 2  # the authors advise more references than this


@validates_inputs
class EasyRefGroup(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefGroup",
            display_name="Reference Group",
            category="EasyRef",
            description="Puts images of any sizes into one ordered group. Batches and lists of images count as many; "
            "each keeps its own aspect. Chain groups to grow them. Shows what the group holds after a run.",
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
            ],
            outputs=[EasyRefGroupSocket.Output(display_name="group", tooltip="The references, in order.")],
        )

    @classmethod
    def validate_inputs(cls, **inputs: Any) -> bool:
        """Refuse a group without links: an output node that failed while it runs would stop the other nodes.

        Raises ValueError, because the host reports a returned text only for inputs that are there.
        """
        if not inputs.get("images") and "group" not in inputs:
            raise ValueError(EMPTY)
        return True

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
            raise ValueError(EMPTY)
        return io.NodeOutput(tuple(references), ui=show_group(references))


@validates_inputs
class EasyRefSelectReferences(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefSelectReferences",
            display_name="Select References",
            category="EasyRef",
            description="Takes some references of a group, in the order you write.",
            search_aliases=["reorder references", "pick images", "reference order"],
            is_output_node=True,
            inputs=[
                EasyRefGroupSocket.Input("group", tooltip="From Reference Group."),
                io.String.Input(
                    "references",
                    tooltip="Numbers from 1, with commas: 3, 1, 2 takes the third, then the first two. Ranges count up or "
                    "down: 1-3, 6-4. all, or empty: all references in order.",
                ),
            ],
            outputs=[EasyRefGroupSocket.Output(display_name="group", tooltip="The chosen references.")],
        )

    @classmethod
    def execute(cls, group: tuple[Tensor, ...], references: str) -> io.NodeOutput:
        chosen = parse_references(references, "references", len(group), MOST) or range(1, len(group) + 1)
        selected = tuple(group[number - 1] for number in chosen)
        return io.NodeOutput(selected, ui=show_group(selected))


def show_group(references: Sequence[Tensor], notes: Sequence[str] = ()) -> dict[str, Any]:
    """The ui of a node that made a group: a contact sheet with sizes, how many there are, duplicates, and notes."""
    doubles = duplicate_notes(duplicates([reference[0] for reference in references]))
    lines = [count(len(references)), *notes, *advice(len(references)), *doubles]
    return {**preview.pictures(references), **preview.text("\n".join(lines))}


def count(references: int) -> str:
    """ "1 reference", "4 references" """
    return f"{references} reference{'' if references == 1 else 's'}"


def advice(references: int) -> list[str]:
    """A warning where a group is too small to have much in common."""
    if references > FEW:
        return []
    return [f"Warning: {count(references)}. EasyRef works best with 3 or more that share one thing."]
