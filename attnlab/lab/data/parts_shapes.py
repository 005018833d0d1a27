"""What the objects of `parts` are made of, and how a part is drawn.

An object type is a short list of shapes in a frame where x points right, y points down and the
object fills [-1, 1]². Two primitives are enough for all of them: a *box* whose top edge may be
narrower (roof, sail) or wider (hull) and shifted (cabin), and a *disc* that may have five lobes
(petals, crown). Both are signed distances in px, so that an edge is anti-aliased for free and a
whole batch is a few tensor operations.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """One part of an object type. Lengths in units of half the object's side."""

    name: str
    kind: str  # "box" or "disc"
    x: float  # center
    y: float
    w: float  # half width; of a box, at its bottom edge
    h: float  # half height
    color: tuple[float, float, float]  # the typical hue, saturation, value
    hue_jitter: float = 0.05  # 0.5: any hue
    top: float = 1.0  # box: width of the top edge / width of the bottom edge
    lean: float = 0.0  # box: shift of the top edge, in half widths
    lobes: float = 0.0  # disc: depth of five lobes
    tilt: float = 0.0  # radians, clockwise
    chance: float = 1.0  # share of the objects that have this part


WOOD, DARK, GLASS, LEAF, STEEL = (
    (0.07, 0.60, 0.42), (0.62, 0.20, 0.18), (0.54, 0.35, 0.88), (0.30, 0.60, 0.52),
    (0.58, 0.22, 0.62),
)  # fmt: skip
RED, GOLD, CREAM, SKIN = (
    (0.00, 0.75, 0.72), (0.13, 0.70, 0.90), (0.11, 0.22, 0.90), (0.07, 0.42, 0.82),
)  # fmt: skip

# Painted in this order, the first at the back.
TYPES: dict[str, tuple[Part, ...]] = {
    "house": (
        Part("chimney", "box", 0.42, -0.68, 0.12, 0.30, RED, chance=0.8),
        Part("wall", "box", 0.0, 0.45, 0.72, 0.52, CREAM, 0.5),
        Part("roof", "box", 0.0, -0.42, 0.95, 0.38, RED, 0.1, top=0.15),
        Part("door", "box", 0.28, 0.60, 0.16, 0.36, WOOD),
        Part("window", "box", -0.32, 0.35, 0.17, 0.17, GLASS),
        Part("window", "disc", 0.0, -0.38, 0.13, 0.13, GLASS, chance=0.5),
    ),
    "car": (
        Part("cabin", "box", -0.10, -0.28, 0.62, 0.30, GLASS, top=0.6, lean=-0.1),
        Part("body", "box", 0.0, 0.20, 1.0, 0.26, RED, 0.5, top=0.92, lean=-0.04),
        Part("wheel", "disc", -0.55, 0.50, 0.25, 0.25, DARK),
        Part("wheel", "disc", 0.55, 0.50, 0.25, 0.25, DARK),
        Part("headlight", "disc", 0.86, 0.12, 0.12, 0.12, GOLD),
    ),
    "face": (
        Part("hair", "disc", 0.0, -0.30, 0.82, 0.68, WOOD, 0.5, lobes=0.08),
        Part("head", "disc", 0.0, 0.12, 0.68, 0.84, SKIN),
        Part("eye", "disc", -0.27, -0.08, 0.13, 0.12, DARK),
        Part("eye", "disc", 0.27, -0.08, 0.13, 0.12, DARK),
        Part("nose", "box", 0.0, 0.22, 0.12, 0.18, WOOD, top=0.3),
        Part("mouth", "disc", 0.0, 0.58, 0.32, 0.11, RED),
    ),
    "tree": (
        Part("trunk", "box", 0.0, 0.62, 0.17, 0.42, WOOD, top=0.7),
        Part("crown", "disc", 0.0, -0.28, 0.76, 0.66, LEAF, 0.15, lobes=0.10),
        Part("fruit", "disc", -0.32, -0.12, 0.13, 0.13, RED, chance=0.75),
        Part("fruit", "disc", 0.10, -0.52, 0.13, 0.13, RED, chance=0.75),
        Part("fruit", "disc", 0.34, -0.05, 0.13, 0.13, RED, chance=0.75),
    ),
    "boat": (
        Part("mast", "box", 0.0, -0.15, 0.06, 0.80, WOOD),
        Part("sail", "box", 0.38, -0.25, 0.33, 0.60, CREAM, 0.5, top=0.0, lean=-1.0),
        Part("sail", "box", -0.30, -0.12, 0.22, 0.46, CREAM, 0.5, top=0.0, lean=1.0, chance=0.7),
        Part("hull", "box", 0.0, 0.72, 0.62, 0.24, RED, 0.5, top=1.5),
    ),
    "robot": (
        Part("leg", "box", -0.25, 0.72, 0.15, 0.32, STEEL, 0.5),
        Part("leg", "box", 0.25, 0.72, 0.15, 0.32, STEEL, 0.5),
        Part("arm", "box", -0.68, 0.05, 0.14, 0.42, STEEL, 0.5, tilt=0.15),
        Part("arm", "box", 0.68, 0.05, 0.14, 0.42, STEEL, 0.5, tilt=-0.15),
        Part("torso", "box", 0.0, 0.06, 0.46, 0.40, STEEL, 0.5),
        Part("head", "box", 0.0, -0.68, 0.34, 0.28, STEEL, 0.5),
    ),
    "flower": (
        Part("stem", "box", 0.0, 0.52, 0.07, 0.50, LEAF),
        Part("leaf", "disc", -0.30, 0.58, 0.30, 0.12, LEAF, tilt=0.5),
        Part("leaf", "disc", 0.30, 0.68, 0.30, 0.12, LEAF, tilt=-0.5, chance=0.7),
        Part("petals", "disc", 0.0, -0.38, 0.50, 0.50, RED, 0.5, lobes=0.28),
        Part("center", "disc", 0.0, -0.38, 0.20, 0.20, GOLD),
    ),
    "lamp": (
        Part("base", "disc", 0.0, 0.86, 0.48, 0.15, DARK),
        Part("pole", "box", 0.0, 0.25, 0.07, 0.62, STEEL),
        Part("shade", "box", 0.0, -0.56, 0.66, 0.40, GOLD, 0.5, top=0.5),
    ),
}

CLASSES = tuple(TYPES)
# Part class 0 is what belongs to no object.
PARTS = (
    "background",
    *dict.fromkeys(f"{name} {part.name}" for name, parts in TYPES.items() for part in parts),
)
SLOTS = max(len(parts) for parts in TYPES.values())


class Table(NamedTuple):
    """`TYPES` as tensors `(types, SLOTS)`, for indexing with a batch of object types."""

    numbers: Tensor  # (types, SLOTS, 8): x, y, w, h, top, lean, lobes, tilt
    color: Tensor  # (types, SLOTS, 3)
    hue_jitter: Tensor
    disc: Tensor  # bool: the kind
    chance: Tensor  # 0 where a type has fewer parts
    part: Tensor  # index into PARTS


@cache
def table() -> Table:
    """The table of all object types; absent slots have chance 0 and a size of one px at most."""
    blank = Part("", "box", 0.0, 0.0, 0.01, 0.01, DARK, chance=0.0)
    rows = [[*parts, *[blank] * (SLOTS - len(parts))] for parts in TYPES.values()]

    def tensor(field) -> Tensor:
        return torch.tensor([[field(part) for part in row] for row in rows])

    part_class = [
        [PARTS.index(f"{name} {part.name}") if part.name else 0 for part in row]
        for name, row in zip(CLASSES, rows, strict=True)
    ]
    return Table(
        tensor(lambda p: (p.x, p.y, p.w, p.h, p.top, p.lean, p.lobes, p.tilt)),
        tensor(lambda p: p.color),
        tensor(lambda p: p.hue_jitter),
        tensor(lambda p: p.kind == "disc"),
        tensor(lambda p: p.chance),
        torch.tensor(part_class),
    )


def box_distance(u: Tensor, v: Tensor, w: Tensor, h: Tensor, top: Tensor, lean: Tensor) -> Tensor:
    """Signed distance (negative inside; exact but at corners) to a trapezoid, in the unit of `u`.

    `u, v`: coordinates in the shape's own frame, v downward; `w`, `h`: half width at the bottom and
    half height; the top edge is `top` times as wide and shifted by `lean * w`.
    """
    shift, growth = lean * w / (2 * h), (1 - top) * w / (2 * h)  # per px of v
    side = (u + shift * v - shift * h).abs() - (growth * v + w * (1 + top) / 2)
    slope = shift.abs() + growth.abs()
    return torch.maximum(v.abs() - h, side * torch.rsqrt(1 + slope.square()))


def disc_distance(u: Tensor, v: Tensor, w: Tensor, h: Tensor, lobes: Tensor) -> Tensor:
    """Signed distance (to first order) to an ellipse of half axes `w`, `h` with five lobes.

    The radius at angle φ is 1 + lobes · cos 5φ in units of the half axes.
    """
    p2, q2 = (u / w).square(), (v / h).square()
    square = p2 + q2 + 1e-6
    radius = square.sqrt()
    cosine = u / (w * radius)
    cosine2 = p2 / square
    cosine5 = cosine * (5 + cosine2 * (16 * cosine2 - 20))
    gradient = torch.sqrt(p2 / w**2 + q2 / h**2 + 1e-6 / (w * h))
    return (radius - 1 - lobes * cosine5) * radius / gradient


def rgb(hsv: Tensor) -> Tensor:
    """Colors `(..., 3)` from hue, saturation, value to red, green, blue; all in [0, 1]."""
    hue, saturation, value = hsv.unbind(-1)
    sector = (hue.unsqueeze(-1) * 6 + torch.tensor([5.0, 3.0, 1.0])) % 6
    ramp = torch.minimum(sector, 4 - sector).clamp(0, 1)
    return value.unsqueeze(-1) * (1 - saturation.unsqueeze(-1) * ramp)
