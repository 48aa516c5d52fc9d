"""Reports: a chart and a text for each kind of inspection, from PIL images or (H, W, C) tensors in 0..1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image

from ..utils.images import to_rgb
from .charts import Bar, Labels, bar_chart, matrix_chart, percent, stacked_bar
from .colors import GREEN, apply_colormap
from .drawing import caption_grid, fit_square, label_grid, overlay_heatmap, tile, vstack
from .influence import MIN_REFERENCES, OUTLIER_Z, Influence, center_crop_loss, mean_to_others
from .reference_share import Share, ShareKey, block_label, share_by_block_and_step, share_map
from .scales import Scale, color_bar

if TYPE_CHECKING:
    from torch import Tensor

    from .attention_maps import AttentionShares

    AnyImage = Image.Image | Tensor

CELL, LARGE_CELL = 256, 320  # pixels of an image's longer side
MIN_WIDTH = 640  # pixels, of a chart below images
SHARE = "size of the reference term / size of the text's attention"  # unit of Where It Acts
HEAT_QUANTILE = 0.99  # full heat: single image tokens that draw most of the attention would hide the rest


class Report(NamedTuple):
    """A chart (RGB) and a text."""

    image: Image.Image
    text: str


def attention_report(images: Sequence[AnyImage], shares: AttentionShares, token: int = -1) -> Report:
    """Report the attention of the reference tokens: heat maps over the references, and a bar of all shares.

    images: the references that were encoded. shares, token: see attention_shares.
    """
    title = "Attention of the reference tokens" if token < 0 else f"Attention of reference token {token}"
    thumbnails = [_scale_to(image, CELL) for image in _to_rgb(images)]
    maps = [heat.numpy() for heat in heat_maps(shares)]
    heated = [overlay_heatmap(image, heat) for image, heat in zip(thumbnails, maps, strict=True)]
    captions = [f"{i + 1}: {percent(share)}" for i, share in enumerate(shares.references)]
    grid = caption_grid(heated, captions, CELL)
    by_name = {f"reference {i + 1}": share for i, share in enumerate(shares.references)}
    by_name |= {"instruction and prompt": shares.text, "chat template": shares.template}
    by_name |= {"reference tokens": shares.tokens}
    width = max(grid.width, MIN_WIDTH)
    scale = Scale("attention to one image token", 0.0, _full_heat(shares), as_percent=True)
    bar = stacked_bar(title, by_name, "share of the attention, last layer, mean of the heads", width)
    chart = vstack([grid, color_bar(scale, width), bar])

    total, tokens = sum(shares.references), sum(heat.numel() for heat in shares.maps)
    lines = [f"{title} (last layer, mean of the heads)"]
    lines += [f"{name}: {percent(share)}" for name, share in by_name.items()]
    lines.append(f"all references: {percent(total)}")
    for i, (share, heat) in enumerate(zip(shares.references, shares.maps, strict=True)):
        relative = share / total * tokens / heat.numel()
        lines.append(
            f"of that, reference {i + 1}: {percent(share / total)}, {relative:.2f} times its part of the "
            "image tokens"
        )
    return Report(chart, "\n".join(lines))


def heat_maps(shares: AttentionShares) -> list[Tensor]:
    """Return each reference's attention map (rows, columns) in 0..1, all on one scale."""
    full = _full_heat(shares)
    return [(heat / full).clamp(0, 1) for heat in shares.maps]


def _full_heat(shares: AttentionShares) -> float:
    """Return the attention to one image token that is drawn as 1."""
    return float(torch.cat([heat.flatten() for heat in shares.maps]).quantile(HEAT_QUANTILE))


def influence_report(images: Sequence[AnyImage], influence: Influence) -> Report:
    """Report the influence of each reference: bars and a matrix of similarities, with an outlier in red."""
    images, outlier = _to_rgb(images), influence.outlier
    names = [f"reference {i + 1}" for i in range(len(images))]
    marked = [f"{name}, outlier" if i == outlier else name for i, name in enumerate(names)]
    bars = [
        Bar(name, value, f"{value:.4f}", i == outlier, image)
        for i, (name, value, image) in enumerate(zip(marked, influence.changes, images, strict=True))
    ]
    change = Scale("1 - cosine of the tokens with and without it (0: no change)", 0.0, max(influence.changes))
    without_self = influence.similarity.clone().fill_diagonal_(float("nan"))
    others = without_self[~without_self.isnan()]
    matrix = matrix_chart(
        "How alike the references are",
        without_self.numpy(),
        Labels("reference", marked),
        Labels("reference", [str(i + 1) for i in range(len(names))]),
        scale=Scale("cosine of the vision features (1: alike)", float(others.min()), float(others.max())),
        images=images,
        highlight=outlier,
    )
    chart = vstack([bar_chart("Change of the reference tokens without it", bars, change), matrix])

    means = mean_to_others(influence.similarity).tolist()
    lines = [
        f"{name}: the tokens change by {value:.4f} without it (1 - cosine); mean similarity to the others "
        f"{mean:.3f}"
        for name, value, mean in zip(names, influence.changes, means, strict=True)
    ]
    return Report(chart, "\n".join([*lines, _verdict(influence)]))


def _verdict(influence: Influence) -> str:
    criterion = (
        f"its mean similarity is {influence.score:.2f} robust standard deviations below the median "
        f"(the threshold is {OUTLIER_Z:g})"
    )
    if influence.outlier >= 0:
        return f"Reference {influence.outlier + 1} does not belong: {criterion}."
    if len(influence.changes) < MIN_REFERENCES:
        return f"No outlier reported: this needs at least {MIN_REFERENCES} references."
    return f"No outlier found. Of the least similar reference, {criterion}."


def where_it_acts_report(
    shares: Mapping[ShareKey, Share], images: Sequence[AnyImage] = (), name: str = ""
) -> Report:
    """Report recorded shares: a matrix of blocks and steps, and the map of positions over images, or alone.

    shares: of one branch. name: added to the titles, such as " of Apply EasyRef 2".
    """
    blocks, sigmas, values = share_by_block_and_step(shares)
    matrix = matrix_chart(
        f"Blocks and steps{name}",
        values.numpy(),
        Labels("block of the UNet", [block_label(block) for block in blocks]),
        Labels("step", [str(i + 1) for i in range(len(sigmas))]),
        scale=Scale(SHARE, 0.0, float(values[~values.isnan()].max())),
    )
    positions = share_map(shares).numpy()
    low, high = float(positions.min()), float(positions.max())
    heat = (positions - low) / (high - low or 1.0)
    maps = [overlay_heatmap(fit_square(image, LARGE_CELL), heat) for image in _to_rgb(images)]
    maps = maps or [fit_square(Image.fromarray(apply_colormap(heat)), LARGE_CELL)]
    captions = [f"image {i + 1}" for i in range(len(maps))] if len(images) else ["position in the image"]
    grid = caption_grid(maps, captions, LARGE_CELL, columns=2)
    bar = color_bar(Scale(SHARE, low, high), max(grid.width, matrix.width))
    chart = vstack([matrix, grid, bar])

    first, last = (float(values[:, step].nanmean()) for step in (0, -1))
    lines = [
        f"Size of the reference term{name} beside the text's attention, {len(sigmas)} steps",
        *(f"{block_label(b)}: {float(row.nanmean()):.3f}" for b, row in zip(blocks, values, strict=True)),
        f"first step: {first:.3f}, last: {last:.3f}",
    ]
    return Report(chart, "\n".join(lines))


def consistency_report(
    images: Sequence[AnyImage],
    cosines: Tensor,
    reference_sizes: Sequence[tuple[int, int]],
    center_crop: bool = True,
) -> Report:
    """Report the cosines (N, K) of N images to K references: a bar for each image, the best in green.

    reference_sizes: (height, width) of each reference. center_crop: True if the image encoder crops to the
    centre square, False if it squeezes; the text names the references that lose something by it.
    """
    means = cosines.mean(dim=1).tolist()
    best = int(cosines.mean(dim=1).argmax())
    bars = [
        Bar(f"{i + 1} best" if i == best else str(i + 1), mean, f"{mean:.3f}", i == best, image)
        for i, (mean, image) in enumerate(zip(means, _to_rgb(images), strict=True))
    ]
    scale = Scale("cosine of the image embeddings, mean over the references (1: alike)", 0.0, 1.0)
    chart = bar_chart("Similarity of each image to the references", bars, scale, highlight=GREEN)

    lines = []
    for i, row in enumerate(cosines.tolist()):
        each = ", ".join(f"{cosine:.3f}" for cosine in row)
        lines.append(f"picture {i + 1}: {sum(row) / len(row):.3f} (to the references in order: {each})")
    lines.append(f"Picture {best + 1} is closest. Mean of all: {float(cosines.mean()):.3f}.")
    for i, (height, width) in enumerate(reference_sizes):
        if height != width:
            loss = (
                f"{100 * center_crop_loss(height, width):.0f} % of it, outside its middle square, is not seen"
            )
            loss = loss if center_crop else "it is squeezed into a square"
            lines.append(f"Reference {i + 1} is {width}x{height}: {loss}.")
    return Report(chart, "\n".join(lines))


def weight_sheet(
    batches: Sequence[Sequence[AnyImage]],
    weights: Sequence[float],
    end_percents: Sequence[float],
    cell: int = CELL,
) -> Image.Image:
    """Draw images made with pairs of weight and end_percent: weights from left to right, ends downwards.

    batches: the images of each pair; they share one cell of `cell` pixels.
    Raises ValueError unless there is one batch, one weight and one end_percent for each pair.
    """
    if not len(batches) == len(weights) == len(end_percents):
        raise ValueError(
            f"The sheet was given {len(batches)} pictures, {len(weights)} weights and {len(end_percents)} "
            "ends; it needs the same number of each. Link weight and end_percent of one Weight Sheet to "
            "Apply EasyRef and here, and decode every result."
        )
    columns = list(dict.fromkeys(weights))
    rows: dict[str, list[Image.Image | None]] = {
        f"end_percent {end:g}": [None] * len(columns) for end in end_percents
    }
    for images, weight, end in zip(batches, weights, end_percents, strict=True):
        rows[f"end_percent {end:g}"][columns.index(weight)] = tile(_to_rgb(images), cell)
    return label_grid(rows, [f"weight {weight:g}" for weight in columns], cell)


def _to_rgb(images: Sequence[AnyImage]) -> list[Image.Image]:
    return [to_rgb(image, f"image {i + 1}") for i, image in enumerate(images)]


def _scale_to(image: Image.Image, side: int) -> Image.Image:
    """Resize an image so that its longer side is `side` pixels."""
    scale = side / max(image.size)
    return image.resize(tuple(max(1, round(length * scale)) for length in image.size))
