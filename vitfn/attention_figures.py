"""Pictures of what a model looks at: functions that return matplotlib figures."""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfn import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HEAT = "inferno"


def _pixels(image: Tensor) -> Tensor:
    """An image (C, H, W), 0 to 255, as (H, W, 3), 0 to 1: in colour from three channels on, else its first in grey."""
    shown = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    return shown.permute(1, 2, 0).clamp(0, 255) / 255


def _heat(of_patches: Tensor, image: Tensor) -> Tensor:
    """A map (h, w) as (H, W), 0 to 1, of the image's size."""
    heat = F.interpolate(of_patches[None, None], image.shape[1:], mode="bilinear", align_corners=False)[0, 0]
    return heat / heat.max().clamp(min=torch.finfo(heat.dtype).tiny)


def _bare(axes: "Axes", title: str) -> None:
    axes.set_title(title, fontsize=9, parse_math=False)
    axes.axis("off")


def overlay_figure(image: Tensor, of_patches: Tensor, title: str) -> "Figure":
    """The image (C, H, W), 0 to 255; the same, lit by a map (h, w) as in the seed's notebook; and the map over it."""
    figure = figures.blank(2.4)
    pixels, heat = _pixels(image), _heat(of_patches, image)
    plain, lit, over = figure.subplots(1, 3)
    plain.imshow(pixels.numpy())
    lit.imshow((pixels * heat[:, :, None]).numpy())
    over.imshow(pixels.mean(-1).numpy(), cmap="gray", vmin=0, vmax=1)
    over.imshow(heat.numpy(), cmap=_HEAT, alpha=0.6)
    for axes, name in ((plain, "what the model sees"), (lit, title), (over, "the same as heat")):
        _bare(axes, name)
    return figure


def layers_figure(image: Tensor, of_layers: Tensor) -> "Figure":
    """Each layer's map (L, h, w) over the image (C, H, W)."""
    columns = min(4, len(of_layers))
    rows = math.ceil(len(of_layers) / columns)
    figure = figures.blank(1.65 * rows)
    grey = _pixels(image).mean(-1).numpy()
    for place, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        if place < len(of_layers):
            axes.imshow(grey, cmap="gray", vmin=0, vmax=1)
            axes.imshow(_heat(of_layers[place], image).numpy(), cmap=_HEAT, alpha=0.6)
        _bare(axes, f"block {place}" if place < len(of_layers) else "")
    return figure


def _mosaic(tiles: Tensor) -> Tensor:
    """Tiles (rows, columns, h, w) in one picture, a line of NaN between them."""
    framed = F.pad(tiles, (0, 1, 0, 1), value=math.nan)  # (rows, columns, h + 1, w + 1)
    return framed.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)[:-1, :-1]


def heads_figure(of_heads: Tensor) -> "Figure":
    """Each head's map (L, H, h, w), blocks downwards; every one in its own scale."""
    depth, heads, h, w = of_heads.shape
    tiles = of_heads / of_heads.amax((2, 3), keepdim=True).clamp(min=torch.finfo(of_heads.dtype).tiny)
    figure = figures.blank(min(9.0, 0.7 + 5.5 * (depth * h) / (heads * w)))
    axes = figure.subplots()
    axes.imshow(_mosaic(tiles).numpy(), cmap=_HEAT, interpolation="nearest")
    axes.set_xticks([(w + 1) * i + w / 2 for i in range(heads)], [str(i) for i in range(heads)], fontsize=8)
    axes.set_yticks([(h + 1) * i + h / 2 for i in range(depth)], [str(i) for i in range(depth)], fontsize=8)
    axes.set(xlabel="head", ylabel="block")
    return figure


def distances_figure(distances: Tensor) -> "Figure":
    """How far each head looks, in pixels (L, H), by block."""
    figure = figures.blank(3.2)
    axes = figure.subplots()
    blocks = range(len(distances))
    for head in distances.T.tolist():
        axes.plot(blocks, head, "o", color="#0072b2", alpha=0.6, markersize=4)
    axes.set(xlabel="block", ylabel="mean attention distance (pixels)", ylim=(0, None))
    axes.set_xticks(blocks[:: math.ceil(len(blocks) / 24)])
    axes.grid(alpha=0.3)
    return figure


def positions_figure(similarity: Tensor) -> "Figure":
    """Cosine similarities (h, w, h, w): the tile at a patch's place is its similarity with all patches."""
    h, w = similarity.shape[:2]
    figure = figures.blank(min(9.0, 5.0 * h / w + 0.5))
    axes = figure.subplots()
    shown = axes.imshow(_mosaic(similarity).numpy(), cmap="viridis", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_xticks([(w + 1) * i + w / 2 for i in range(w)], [str(i) for i in range(w)], fontsize=7)
    axes.set_yticks([(h + 1) * i + h / 2 for i in range(h)], [str(i) for i in range(h)], fontsize=7)
    axes.set(xlabel="column of the patch", ylabel="row of the patch")
    figure.colorbar(shown, ax=axes, shrink=0.8, label="cosine similarity")
    return figure


def filters_figure(filters: Tensor) -> "Figure":
    """Filters (n, P, P, C), 0 to 1: in colour from three channels on, else the first in grey."""
    columns = 7
    rows = math.ceil(len(filters) / columns)
    figure = figures.blank(0.85 * rows)
    for place, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.axis("off")
        if place < len(filters):
            axes.imshow(_pixels(255 * filters[place].permute(2, 0, 1)).numpy(), interpolation="nearest")
    return figure
