"""Which objects an image of `parts` has, where they lie, and every shape that is to be painted."""

from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor

from attnlab.lab.data.draws import Draws
from attnlab.lab.data.parts_shapes import CLASSES, SLOTS, Table, table

TURN = 6.2832
CANDIDATES = 48  # layouts of several objects to choose from


class Strokes(NamedTuple):
    """Shapes to paint, `(B, S)` each, in px and radians; see `parts_shapes.Part`."""

    x: Tensor
    y: Tensor
    w: Tensor
    h: Tensor
    angle: Tensor
    top: Tensor
    lean: Tensor
    lobes: Tensor
    disc: Tensor  # bool
    there: Tensor  # bool
    color: Tensor  # (B, S, 3) hue, saturation, value


class Scene(NamedTuple):
    """The objects of a block of images."""

    labels: Tensor  # (B, K), −1 for padding
    center: Tensor  # (B, K, 2) px
    radius: Tensor  # (B, K) half the object's side, px
    strokes: Strokes  # (B, K * SLOTS), objects one after the other
    part: Tensor  # (B, K * SLOTS) index into PARTS


def chance(draw: Draws, probability: float | Tensor, *shape: int) -> Tensor:
    """Booleans `(B, *shape)`, true with the given probability."""
    return draw.uniform(0.0, 1.0, *shape) < probability


def scene(
    draw: Draws,
    least: int,
    most: int,
    height: int,
    width: int,
    scale: tuple[float, float],
    palette: str,
    adjacency: float,
) -> Scene:
    """Choose the objects of each image: how many, their types, shapes, colors and places."""
    types = draw.integers(len(CLASSES), most)
    count = least + draw.integers(most - least + 1, 1)
    there = torch.arange(most) < count
    adjacent = chance(draw, adjacency, 1)
    rows = Table(*(field[types] for field in table()))  # (B, K, SLOTS) each

    radius = draw.uniform(*scale, most) * min(height, width) / 2
    stretch = draw.uniform(-0.35, 0.35, most)  # in powers of two
    stretch = torch.exp2(torch.where(adjacent, 0.65 * torch.sign(stretch), stretch))
    tilt = draw.uniform(-0.35, 0.35, most, 1)
    mirror = 1 - 2 * draw.integers(2, most, 1).float()

    def jitter(low: float, high: float) -> Tensor:
        return draw.uniform(low, high, most, SLOTS)

    x, y, w, h, top, lean, lobes, angle = rows.numbers.unbind(-1)
    across, along = (radius * stretch).unsqueeze(-1), (radius / stretch).unsqueeze(-1)
    w, h = w * jitter(0.85, 1.2) * across, h * jitter(0.85, 1.2) * along
    x = (x + jitter(-0.06, 0.06)) * across * mirror
    y = (y + jitter(-0.06, 0.06)) * along
    cosine, sine = torch.cos(tilt), torch.sin(tilt)
    offset = torch.stack([x * cosine - y * sine, x * sine + y * cosine], dim=-1)

    room = torch.tensor([width, height])
    center = _places(draw, offset, w * h, radius, there, adjacent, room)
    x, y = (center.unsqueeze(2) + offset).unbind(-1)
    strokes = Strokes(
        x, y, w, h,
        angle=angle * mirror + tilt,
        top=torch.where(top == 1, top, (top + jitter(-0.1, 0.1)).clamp(min=0)),
        lean=lean * mirror,
        lobes=lobes,
        disc=rows.disc,
        there=chance(draw, rows.chance, most, SLOTS) & there.unsqueeze(-1),
        color=_colors(draw, palette, rows.color, rows.hue_jitter),
    )  # fmt: skip
    strokes = Strokes(*(field.flatten(1, 2) for field in strokes))
    return Scene(types.where(there, -1), center, radius, strokes, rows.part.flatten(1, 2))


def clutter(
    draw: Draws,
    objects: Scene,
    distractors: int,
    occlusion: float,
    height: int,
    width: int,
    palette: str,
) -> Strokes:
    """`distractors` shapes that go behind the objects, and one that hides a piece of the first."""
    count, side = distractors + 1, min(height, width)
    x, y = draw.uniform(0.0, width, count), draw.uniform(0.0, height, count)
    w, h = (draw.uniform(0.04, 0.13, count) * side for _ in range(2))
    there = torch.ones_like(x, dtype=torch.bool)

    radius, direction = objects.radius[:, 0], draw.uniform(0.0, TURN)
    x[:, -1] = objects.center[:, 0, 0] + radius * torch.cos(direction)
    y[:, -1] = objects.center[:, 0, 1] + radius * torch.sin(direction)
    w[:, -1], h[:, -1] = (radius * draw.uniform(0.25, 0.6) for _ in range(2))
    there[:, -1] = chance(draw, occlusion)
    return Strokes(
        x, y, w, h,
        angle=draw.uniform(0.0, TURN, count),
        top=draw.uniform(0.0, 1.5, count),
        lean=torch.zeros_like(x),
        lobes=draw.uniform(0.0, 0.3, count),
        disc=chance(draw, 0.5, count),
        there=there,
        color=part_colors(draw, palette, count),
    )  # fmt: skip


def part_colors(draw: Draws, palette: str, count: int) -> Tensor:
    """Colors `(B, count, 3)` as the parts of random objects have them: hue, saturation, value."""
    types, slot = draw.integers(len(CLASSES), count), draw.integers(3, count)
    rows = table()
    return _colors(draw, palette, rows.color[types, slot], rows.hue_jitter[types, slot])


def _colors(draw: Draws, palette: str, typical: Tensor, hue_jitter: Tensor) -> Tensor:
    """Hue, saturation, value `(B, …, 3)` of parts whose usual color is `typical`."""
    shape = typical.shape[1:-1]
    if palette == "random":
        lows = (0.0, 0.1, 0.2)
        return torch.stack([draw.uniform(low, 1.0, *shape) for low in lows], dim=-1)
    hue = typical[..., 0] + draw.uniform(-1.0, 1.0, *shape) * hue_jitter
    saturation = typical[..., 1] * draw.uniform(0.6, 1.3, *shape)
    value = typical[..., 2] * draw.uniform(0.65, 1.25, *shape)
    return torch.stack([hue % 1, saturation.clamp(0, 1), value.clamp(0, 1)], dim=-1)


def _places(draw, offset, area, radius, there, adjacent, room) -> Tensor:
    """Centers `(B, K, 2)` of the objects: the best of many random layouts.

    Usually that is the first whose objects hardly overlap. In an `adjacent` image it is the one
    with most parts nearer to another object than to their own, among those that overlap little.

    `offset (B, K, SLOTS, 2)` of the parts from the object's center; `area (B, K, SLOTS)`;
    `radius`, `there (B, K)`; `adjacent (B, 1)`; `room` width and height of the image.
    """
    batch, objects = radius.shape
    layouts = CANDIDATES if objects > 1 else 1
    margin = radius.view(batch, 1, objects, 1)
    place = draw.uniform(0.0, 1.0, layouts, objects, 2)
    place = margin + place * (room - 2 * margin)  # (B, L, K, 2)
    if objects == 1:
        return place[:, 0]

    # In an adjacent image each object is a step away from the one before.
    length = (
        draw.uniform(0.5, 0.8, layouts, objects - 1) * (radius[:, 1:] + radius[:, :-1])[:, None]
    )
    direction = draw.uniform(0.0, TURN, layouts, objects - 1)
    step = torch.stack([torch.cos(direction), torch.sin(direction)], -1) * length.unsqueeze(-1)
    chain = torch.cat([place[:, :, :1], step], dim=2).cumsum(2)
    chain = torch.minimum(torch.maximum(chain, margin), room - margin)
    place = torch.where(adjacent.view(batch, 1, 1, 1), chain, place)

    pair = there.unsqueeze(1) & there.unsqueeze(2) & ~torch.eye(objects, dtype=torch.bool)
    touch = radius.unsqueeze(1) + radius.unsqueeze(2)
    gap = torch.cdist(place, place) / touch.unsqueeze(1)
    gap = gap.masked_fill(~pair.unsqueeze(1), 9.0).flatten(2).amin(-1)  # (B, L), 1: they touch
    earlier = -1e-3 * torch.arange(layouts)
    apart = gap.clamp(max=0.85) + earlier

    middle = (offset * area.unsqueeze(-1)).sum(2) / area.sum(2, keepdim=True)
    parts = rearrange(place.unsqueeze(3) + offset.unsqueeze(1), "b l k p d -> b l (k p) d")
    away = torch.cdist(parts, place + middle.unsqueeze(1))  # (B, L, K·P, K)
    nearest = away.masked_fill(~there.view(batch, 1, 1, objects), 1e4).argmin(-1)
    owner = repeat(torch.arange(objects), "k -> (k p)", p=SLOTS)
    foreign = (nearest != owner) & repeat(there, "b k -> b 1 (k p)", p=SLOTS)
    mixed_up = foreign.sum(-1) + 40 * gap.clamp(max=0.5) + earlier

    best = torch.where(adjacent, mixed_up, apart).argmax(1)
    return place[torch.arange(batch), best]
