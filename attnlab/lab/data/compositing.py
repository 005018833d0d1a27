"""The kit of `scenes` and `clips`: cut-outs, backgrounds, and where they are put.

Colors of cut-outs are premultiplied by their alpha before anything is resampled: a color that no
longer counts (alpha 0) then weighs nothing, and no dark or light fringe appears.
"""

import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from attnlab.lab import files
from attnlab.lab.arguments import require, whole
from attnlab.lab.data import bundle
from attnlab.lab.data.draws import Draws

CLASSES = ("bird", "flower", "food", "hoofed", "household", "mammal", "sea", "vehicle")
LAYOUTS = 8  # layouts of several objects to choose from
OVERLAP = 0.3  # share of the smaller object's box that another may cover
TILT = math.radians(15)


def checked(n, split, splits, objects, scale) -> tuple[int, int]:
    """Least and most objects of an image, or ValueError for any of the arguments."""
    whole(1, n=n)
    require(split in splits, "split", split, f"one of {tuple(splits)}")
    least, most = (objects, objects) if isinstance(objects, int) else objects
    require(1 <= least <= most <= 8, "objects", objects, "1 to 8, or a (least, most) pair of them")
    require(0 < scale[0] <= scale[1] <= 1, "scale", scale, "(least, most), 0 < least ≤ most ≤ 1")
    return least, most


class Sprites(NamedTuple):
    """Cut-outs of one split, each in a square whose side is its longer side and a little rim."""

    rgba: Tensor  # (N, 4, S, S) float, premultiplied
    extent: Tensor  # (N, 2) width and height, as shares of the square
    first: Tensor  # (C,) index of the first cut-out of each class
    count: Tensor  # (C,) number of cut-outs of each class


class Things(NamedTuple):
    """Objects of a block of images, back to front."""

    label: Tensor  # (B, K), −1 for padding
    sprite: Tensor  # (B, K) index into Sprites
    center: Tensor  # (B, K, 2) x, y in px
    side: Tensor  # (B, K) of the sprite's square, px
    mirror: Tensor  # (B, K) −1 or 1
    tilt: Tensor  # (B, K) radians
    gain: Tensor  # (B, K, 3) of red, green, blue


def load_sprites(split: str, scale: tuple[float, float], height: int, width: int) -> Sprites:
    """The cut-outs of a split at about the size at which they will be drawn."""
    side = round(min(height, width) * (scale[0] + 2 * scale[1]) / 3)
    return _sprites(files.data_dir(), split, min(112, max(16, side)))


@cache
def _sprites(folder: Path, split: str, side: int) -> Sprites:
    rgba, extent = [], []
    rows = sorted(bundle.rows("cutouts", split), key=lambda row: CLASSES.index(row["class"]))
    for row in rows:
        color, alpha = (bundle.picture(row["file"]).float() / 255).split([3, 1])
        cutout = torch.cat([color * alpha, alpha])
        shape = [
            max(2, round(length * side / max(cutout.shape[1:]))) for length in cutout.shape[1:]
        ]
        cutout = F.interpolate(cutout[None], shape, mode="bilinear", antialias=True)[0]
        down, right = ((side + 2 - length) // 2 for length in shape)
        square = torch.zeros(4, side + 2, side + 2)
        square[:, down : down + shape[0], right : right + shape[1]] = cutout
        rgba.append(square)
        extent.append([shape[1] / (side + 2), shape[0] / (side + 2)])
    count = torch.tensor([sum(row["class"] == name for row in rows) for name in CLASSES])
    return Sprites(torch.stack(rgba), torch.tensor(extent), count.cumsum(0) - count, count)


def backdrop(draw: Draws, photos: Tensor, height: int, width: int) -> Tensor:
    """A random window of a random photograph for each image, `(B, 3, H, W)` float in [0, 1]."""
    zoom = draw.uniform(0.5, 1.0)
    share = torch.tensor([width, height]) / max(width, height) * zoom.unsqueeze(1)  # (B, 2)
    middle = draw.uniform(-1.0, 1.0, 2) * (1 - share)
    mirror = 2.0 * draw.integers(2) - 1
    x, y = middle.unbind(1)
    across, down = share.unbind(1)
    grid = _grid(
        x=_steps(width) * (across * mirror).unsqueeze(1) + x.unsqueeze(1),
        y=_steps(height) * down.unsqueeze(1) + y.unsqueeze(1),
    )
    chosen = photos[draw.integers(len(photos))]
    window = F.grid_sample(chosen, grid, padding_mode="border", align_corners=False)
    gain = draw.uniform(0.75, 1.1, 1) * draw.uniform(0.9, 1.1, 3)
    return (window * rearrange(gain, "b c -> b c 1 1")).clamp(max=1)


def _steps(length: int) -> Tensor:
    """Centers of `length` pixels on the line from −1 to 1."""
    return (2 * torch.arange(length) + 1) / length - 1


def _grid(x: Tensor, y: Tensor) -> Tensor:
    """`grid_sample`'s grid `(B, H, W, 2)` from columns `(B, W)` and rows `(B, H)`."""
    shape = (len(x), y.shape[1], x.shape[1])
    return torch.stack([x.unsqueeze(1).expand(shape), y.unsqueeze(2).expand(shape)], dim=-1)


def arrange(draw: Draws, sprites: Sprites, least, most, scale, height, width) -> Things:
    """Choose what is where: classes evenly, then cut-outs evenly within a class."""
    there = torch.arange(most) < least + draw.integers(most - least + 1).unsqueeze(1)
    label = draw.integers(len(CLASSES), most)
    pick = draw.uniform(0.0, 1.0, most) * sprites.count[label]
    sprite = sprites.first[label] + pick.long().clamp(max=sprites.count[label] - 1)
    length = draw.uniform(*scale, most).sort(dim=1, descending=True).values * min(height, width)
    side = length / sprites.extent[sprite].amax(-1)
    return Things(
        label=label.masked_fill(~there, -1),
        sprite=sprite,
        center=_layout(draw, side.unsqueeze(-1) * sprites.extent[sprite], there, height, width),
        side=side,
        mirror=2.0 * draw.integers(2, most) - 1,
        tilt=draw.uniform(-TILT, TILT, most),
        gain=draw.uniform(0.8, 1.15, most, 1) * draw.uniform(0.92, 1.08, most, 3),
    )


def _layout(draw: Draws, extent: Tensor, there: Tensor, height: int, width: int) -> Tensor:
    """Centers `(B, K, 2)` of objects of the given extent, uniform in the image.

    At most a quarter of an object's width and height lies outside. Of several random layouts, the
    first in which no two objects overlap much is taken, or else the one with least overlap.
    """
    objects = there.shape[1]
    room = torch.tensor([width, height]) - extent / 2
    center = extent.unsqueeze(1) / 4 + draw.uniform(0.0, 1.0, LAYOUTS, objects, 2) * room.unsqueeze(
        1
    )
    if objects == 1:
        return center[:, 0]
    half = extent / 2
    reach, inner = (
        half.unsqueeze(1) + half.unsqueeze(2),
        torch.minimum(half.unsqueeze(1), half.unsqueeze(2)),
    )
    gap = (center.unsqueeze(2) - center.unsqueeze(3)).abs()  # (B, L, K, K, 2)
    common = torch.minimum(reach.unsqueeze(1) - gap, 2 * inner.unsqueeze(1)).clamp(min=0)
    overlap = (common / (2 * inner.unsqueeze(1))).prod(-1)
    pair = there.unsqueeze(1) & there.unsqueeze(2) & ~torch.eye(objects, dtype=torch.bool)
    worst = (overlap * pair.unsqueeze(1)).amax((2, 3))
    best = (worst.clamp(min=OVERLAP) + 1e-4 * torch.arange(LAYOUTS)).argmin(1)
    return center[torch.arange(len(center)), best]


def layer(things: Things, k: int, sprites: Sprites, height: int, width: int) -> Tensor:
    """Object `k` of each image alone, `(B, 4, H, W)` float premultiplied; zero for padding."""
    x, y = rearrange(things.center[:, k], "b xy -> xy b 1 1")
    side, mirror, tilt = (
        rearrange(value[:, k], "b -> b 1 1") for value in (things.side, things.mirror, things.tilt)
    )
    right = torch.arange(width) + 0.5 - x  # (B, 1, W) px from the object's center
    down = torch.arange(height).unsqueeze(1) + 0.5 - y  # (B, H, 1)
    cosine, sine = torch.cos(tilt) * 2 / side, torch.sin(tilt) * 2 / side
    across, along = (right * cosine + down * sine) * mirror, down * cosine - right * sine
    drawn = F.grid_sample(
        sprites.rgba[things.sprite[:, k]],
        torch.stack([across, along], dim=-1),
        align_corners=False,
    )
    color, alpha = drawn.split([3, 1], dim=1)
    color = torch.minimum(color * rearrange(things.gain[:, k], "b c -> b c 1 1"), alpha)
    there = rearrange(things.label[:, k] >= 0, "b -> b 1 1 1")
    return torch.cat([color, alpha], dim=1) * there


def as_bytes(unit: Tensor) -> Tensor:
    """From [0, 1] to uint8, rounded."""
    return (unit * 255).round().to(torch.uint8)
