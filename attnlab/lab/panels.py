"""What `attnlab predict` draws: bars, pictures, maps over a photograph, and their arrangement."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from attnlab.lab import plots

MOST_STRETCHED = 4  # a longer side than so many shorter ones is squeezed
BARS_SHAPE = 0.55  # least height over width, or their names overlap
COLUMNS = 4


class Panel(NamedTuple):
    """A title and what draws into the axes below it."""

    title: str
    draw: Callable[[Any], None]
    least_shape: float = 0.0  # of the axes, height over width, however flat the picture is


def arrange(panels: list[Panel], picture: Tensor) -> Figure:
    """The panels in rows of at most `COLUMNS`, each of the picture's shape."""
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    shape = min(max(picture.shape[1] / picture.shape[2], 1 / MOST_STRETCHED), MOST_STRETCHED)
    width = min(3.2, 4.2 / shape)  # inches, so that a tall picture is not larger than others
    tallest = max(shape, *(panel.least_shape for panel in panels))
    figure = Figure(figsize=(max(width, 2.2) * columns, (width * tallest + 0.5) * rows + 0.4))
    for place, panel in enumerate(panels, 1):
        ax = figure.add_subplot(rows, columns, place)
        panel.draw(ax)
        ax.set(aspect="auto", title=panel.title)
        ax.set_box_aspect(max(shape, panel.least_shape))
    return figure


def bars(title: str, shares: dict[str, float], keys: Sequence[str] = ()) -> Panel:
    """A bar for each name; `keys` are the colors by which other panels show it."""

    def draw(ax) -> None:
        ax.barh(range(len(shares)), list(shares.values()), color=plots.COLORS[5])
        ax.scatter([-0.06] * len(keys), range(len(keys)), c=keys, marker="s", s=50)
        for place, (name, share) in enumerate(shares.items()):
            ax.text(-0.14 if keys else -0.04, place, name, ha="right", va="center")
            ax.text(share + 0.03, place, f"{share:.1%}", va="center", fontsize=9)
        ax.set(xlim=(-1, 1.3), ylim=(max(len(shares), 6) - 0.5, -0.5))
        ax.axis("off")

    return Panel(title, draw, least_shape=BARS_SHAPE)


def map_over(
    title: str, map: Tensor, picture: Tensor, least: float = 0.0, most: float | None = None
) -> Panel:
    """A map `(h, w)` over the gray photograph, from `least` to `most` or its own largest weight."""
    most = most or map.max().item() or 1.0

    def draw(ax) -> None:
        show(ax, picture.mean(0).expand(3, -1, -1))
        extent = (-0.5, picture.shape[2] - 0.5, picture.shape[1] - 0.5, -0.5)
        ax.imshow(map.numpy(), cmap="inferno", vmin=least, vmax=most, alpha=0.6, extent=extent)

    return Panel(f"{title}\nfrom {least:.2g} to {most:.2g}", draw)


def show(ax, picture: Tensor) -> None:
    """A picture `(3, H, W)` in [0, 1] that fills the axes."""
    ax.imshow(
        rearrange(picture, "c h w -> h w c").clamp(0, 1).numpy(),
        aspect="auto",
        interpolation="antialiased",
    )
    ax.axis("off")


def tinted(logits: Tensor, colors: list[str], picture: Tensor) -> Tensor:
    """The picture `(3, H, W)`, each place in the color of its class; class 0 is as it was.

    logits: `(1, classes, h, w)`. colors: one a class; where there are none, class 0 is dimmed.
    """
    scores = F.interpolate(logits, tuple(picture.shape[1:]), mode="bilinear")[0]
    classes = scores.argmax(0)
    if not colors:
        return torch.where(classes > 0, picture, 0.25 * picture.mean(0))
    tint = rearrange(torch.tensor([to_rgb(color) for color in colors])[classes], "h w c -> c h w")
    return torch.where(classes > 0, (picture + tint) / 2, picture)
