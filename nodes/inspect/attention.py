"""Reference Attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from comfy_api.latest import io, ui
from torch.nn.functional import interpolate

from ...easyref_core.inspect.charts import parts_chart, percent
from ...easyref_core.inspect.drawing import caption_grid, overlay_heatmap, vstack
from ...easyref_core.mllm.preprocess import resize
from ..host.images import image_of, pictures_of, references_of
from ..host.inputs import group_input
from ..host.socket_types import EasyRefContext, EasyRefModel
from ..host.validation import validates_inputs

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ...easyref_core import ContextStates
    from ...easyref_core.inspect.attention_maps import AttentionShares
    from ..host.hosted_model import HostedEasyRef

BRIGHTEST = 0.99  # of all image tokens so many are below full heat: single ones that draw everything would hide the rest


@validates_inputs
class EasyRefReferenceAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefReferenceAttention",
            display_name="Reference Attention",
            category="EasyRef/look",
            description="What the reference tokens read: heat maps of the last layer's attention over each reference, "
            "and what part of it goes to each reference, to the text and to the tokens themselves.",
            search_aliases=["attention map", "heat map", "ip adapter", "reference", "explain"],
            is_output_node=True,
            inputs=[
                EasyRefModel.Input("easyref", tooltip="The model that encoded the group."),
                EasyRefContext.Input("context", tooltip="From Encode Reference Group."),
                group_input("The group that was encoded, for its pictures."),
                io.Int.Input(
                    "token",
                    default=-1,
                    min=-1,
                    max=1023,
                    advanced=True,
                    tooltip="One reference token, counted from 0 (the released model has 64). -1: the mean of all.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="sheet", tooltip="The heat maps over the references."),
                io.Mask.Output(
                    display_name="maps",
                    is_output_list=True,
                    tooltip="Each reference's heat map at its own size, all on one scale.",
                ),
                io.String.Output(display_name="report", tooltip="The shares in words."),
            ],
        )

    @classmethod
    def execute(
        cls,
        easyref: HostedEasyRef,
        context: ContextStates,
        group: Tensor | tuple[Tensor, ...],
        token: int = -1,
    ) -> io.NodeOutput:
        pictures = pictures_of(references_of(group))
        shares = easyref.attention(context, token)
        _require_encoded(pictures, context, easyref)
        brightest = torch.cat([part.flatten() for part in shares.maps]).quantile(BRIGHTEST)
        maps = [(part / brightest).clamp(0, 1) for part in shares.maps]
        sheet = image_of(draw(pictures, maps, shares, token))
        masks = [
            interpolate(part[None, None], picture.size[::-1], mode="bilinear")[0]
            for part, picture in zip(maps, pictures, strict=True)
        ]
        return io.NodeOutput(sheet, masks, describe(shares, token), ui=ui.PreviewImage(sheet, cls=cls))


def draw(pictures: list[Image.Image], maps: list[Tensor], shares: AttentionShares, token: int) -> Image.Image:
    """The references under their heat maps, and one bar of all shares."""
    cell = 256
    shown = [_scaled(picture, cell) for picture in pictures]
    heated = [overlay_heatmap(picture, part.numpy()) for picture, part in zip(shown, maps, strict=True)]
    captions = [f"{i + 1}: {percent(share)}" for i, share in enumerate(shares.references)]
    sheet = caption_grid(heated, captions, cell)
    return vstack([sheet, parts_chart(_title(token), parts_of(shares), max(sheet.width, 540))])


def parts_of(shares: AttentionShares) -> dict[str, float]:
    """All shares by name; their sum is 1."""
    references = {f"reference {i + 1}": share for i, share in enumerate(shares.references)}
    others = {"instruction and prompt": shares.text, "chat template": shares.template}
    return {**references, **others, "reference tokens": shares.tokens}


def describe(shares: AttentionShares, token: int) -> str:
    """The report: a line for each share, and how the references compare with each other."""
    total = sum(shares.references)
    places = sum(part.numel() for part in shares.maps)
    lines = [f"{_title(token)} (last layer, mean of the heads)"]
    for name, share in parts_of(shares).items():
        lines.append(f"{name}: {percent(share)}")
    lines.append(f"all references: {percent(total)}")
    for i, (share, part) in enumerate(zip(shares.references, shares.maps, strict=True)):
        even = share / total * places / part.numel()
        lines.append(
            f"of that, reference {i + 1}: {percent(share / total)}, {even:.2f} times its part of the image tokens"
        )
    return "\n".join(lines)


def _title(token: int) -> str:
    return "Attention of the reference tokens" if token < 0 else f"Attention of reference token {token}"


def _scaled(picture: Image.Image, cell: int) -> Image.Image:
    scale = cell / max(picture.size)
    return picture.resize(tuple(max(1, round(side * scale)) for side in picture.size))


def _require_encoded(pictures: list[Image.Image], context: ContextStates, easyref: HostedEasyRef) -> None:
    """Refuse a group that the context cannot have been made of."""
    config, size = easyref.model.config, context.provenance.size
    resized = [resize(picture, config, size) for picture in pictures]
    found = [(image.height // config.patch_size, image.width // config.patch_size) for image in resized]
    wanted = [tuple(sides) for sides in context.grid[:, 1:].tolist()]
    if found != wanted:
        raise ValueError(
            f"The group is not the one that was encoded: it has {len(found)} references of {found} patches, the context "
            f"{len(wanted)} of {wanted}. Connect the same group to Encode Reference Group and here."
        )
