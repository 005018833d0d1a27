"""Small synthetic tasks, each made so that one ability is needed to solve it.

Every toy is `toy(n, seed=0, …) -> dict of tensors` with n samples: `image (n, 3, H, W)` float in
[0, 1] (a clip: `(n, 3, T, H, W)`), `label` and the masks that say where the cue lies. All draws
come from one CPU generator that `seed` starts: the same arguments give the same bytes on one
machine. `lab.fit` takes the dict as it is. Where a window is said not to see a cue, it is a
`window × window` receptive field on the image.
"""

import math

import torch
from einops import rearrange
from torch import Generator, Tensor
from torch.nn import functional as F

from attnlab.lab.arguments import inside, require, whole

COLORS = {
    "red": (0.9, 0.1, 0.1), "green": (0.1, 0.8, 0.1), "blue": (0.1, 0.1, 0.9),
    "yellow": (0.9, 0.9, 0.1), "magenta": (0.9, 0.1, 0.9), "cyan": (0.1, 0.9, 0.9),
}  # fmt: skip
PALETTE = torch.tensor(list(COLORS.values()))
NECK = torch.tensor([0.9, 0.9, 0.9])
# Inside or not, at (u, v) from the center, in radii; v points down.
CLUTTER_SHAPES = {
    "disc": lambda u, v: u**2 + v**2 <= 1,
    "square": lambda u, v: (u.abs() <= 0.8) & (v.abs() <= 0.8),
    "triangle": lambda u, v: (v <= 0.8) & (u.abs() <= 0.53 * (v + 1)),
    "ring": lambda u, v: (u**2 + v**2 <= 1) & (u**2 + v**2 >= 0.3),
    "plus": lambda u, v: (
        (torch.minimum(u.abs(), v.abs()) <= 0.3) & (torch.maximum(u.abs(), v.abs()) <= 1)
    ),
    "diamond": lambda u, v: (u.abs() + v.abs() <= 1) & (u.abs() + v.abs() >= 0.5),
}
FLAT_SHAPES = {
    "ellipse": lambda u, v: u**2 + v**2 <= 1,
    "rectangle": lambda u, v: (u.abs() <= 0.85) & (v.abs() <= 0.85),
    "ring": lambda u, v: (u**2 + v**2 <= 1) & (u**2 + v**2 >= 0.3),
}
DIRECTIONS = {"right": (1, 0), "down": (0, 1), "left": (-1, 0), "up": (0, -1)}  # dx, dy


def same_different(
    n: int, seed: int = 0, size: int = 16, colors: int = 4, noise: float = 0.1
) -> dict[str, Tensor]:
    """Two 3×3 squares at the left and the right border: are they of the same color?

    Label 1 is same, 0 different, one half each; chance is 1/2. No window of size − 7 px sees both
    squares (9 px of 16: two residual blocks of 3×3 convolutions fail), and a mean over positions
    only adds what each square says alone, for which cross entropy has nothing better than chance.
    A solution compares two far positions. The test of a non-local block (Wang et al. 2018).

    Args:
        colors: how many of `COLORS`, 2 to 6.

    Returns:
        `image`, `label (n,)`, `labels (n, 2)` the colors' numbers, `masks (n, 2, H, W)`; the left
        square comes first.
    """
    generator = _generator(n, seed, noise)
    whole(8, size=size)
    require(colors in range(2, 7), "colors", colors, "an integer from 2 to 6")
    label, left = (_integers(high, n, generator) for high in (2, colors))
    other = (left + 1 + _integers(colors - 1, n, generator)) % colors
    labels = torch.stack([left, torch.where(label == 1, left, other)], dim=1)
    columns = _integers(2, (n, 2), generator) + torch.tensor([0, size - 4])
    rows = _integers(size - 2, (n, 2), generator)
    y, x = _grid(size)
    masks = _between(y, rows, 3) & _between(x, columns, 3)
    image = _paint(torch.full((n, 3, size, size), 0.5), masks, PALETTE[labels])
    return {
        "image": _noisy(image, noise, generator),
        "label": label,
        "labels": labels,
        "masks": masks,
    }


def key_patch(
    n: int, seed: int = 0, size: int = 24, shapes: int = 3, noise: float = 0.1
) -> dict[str, Tensor]:
    """Segmentation in which a 3×3 patch in the top left corner says what the shapes mean.

    A green disc (s = 0) or a yellow diamond (s = 1) of radius 3 is class 1 + (s xor k), with k = 0
    for a red and 1 for a blue key; the background is class 0. Chance on shape pixels is 1/2. A 7×7
    window around a shape pixel never sees the key, so a solution carries one bit from the corner to
    all shapes: a global descriptor can, a local gate cannot. In the spirit of the context heads
    (DANet, OCNet: Fu et al. 2019, Yuan et al. 2018). Weigh the classes, e.g. 0.2, 1, 1.

    Returns:
        `image`, `label (n, H, W)` from 0 to 2, `key (n,)`, `shape (n, H, W)` 0 background, 1 disc,
        2 diamond, `masks (n, 1, H, W)` the key patch.
    """
    generator = _generator(n, seed, noise)
    whole(13, size=size)
    whole(1, shapes=shapes)
    key = _integers(2, n, generator)
    kinds = _integers(2, (n, shapes), generator)
    rows, columns = (8 + _integers(size - 12, (n, shapes), generator) for _ in range(2))
    y, x = _grid(size)
    image, shape = torch.full((n, 3, size, size), 0.5), torch.zeros(n, size, size, dtype=torch.long)
    for kind, row, column in zip(kinds.T, rows.T, columns.T, strict=True):
        dy, dx = (y - row[:, None, None]).abs(), (x - column[:, None, None]).abs()
        disc = kind[:, None, None] == 0
        mask = torch.where(disc, dy**2 + dx**2 <= 9, dy + dx <= 3)
        shape = torch.where(mask, 1 + kind[:, None, None], shape)
        green_or_yellow = PALETTE[torch.tensor([1, 3])][kind]
        image = _paint(image, mask[:, None], green_or_yellow[:, None])
    corner = ((y < 3) & (x < 3)).expand(n, 1, size, size).clone()
    red_or_blue = PALETTE[torch.tensor([0, 2])][key]
    image = _paint(image, corner, red_or_blue[:, None])
    label = torch.where(shape > 0, 1 + ((shape - 1) ^ key[:, None, None]), 0)
    image = _noisy(image, noise, generator)
    return {"image": image, "label": label, "key": key, "shape": shape, "masks": corner}


def clutter_shapes(
    n: int, seed: int = 0, size: int = 64, objects: int = 1, noise: float = 0.05
) -> dict[str, Tensor]:
    """One or two filled shapes out of six, of a random color, on colored clutter.

    Chance is 1/6 for one object, 1/15 for both of two. A shape covers about 5 % of the image: a
    mean over positions is mostly of clutter, and a solution looks at the shape. The masks score its
    map (chance of `metrics.pointing` and `energy_inside`: the area). Color says nothing about the
    class. For attention pooling (PatchConvNet, Touvron et al. 2021) and CBAM's spatial gate.

    Args:
        size: in px; radii are from size/8 to 3/16 size.
        objects: 1, anywhere; or 2 of different classes, object 0 in the left half and object 1 in
            the right half, so that their masks never overlap.

    Returns:
        `image`, `labels (n, objects)` numbers into `CLUTTER_SHAPES`, `label (n,)` that of object 0,
        `masks (n, objects, H, W)`.
    """
    generator = _generator(n, seed, noise)
    whole(16, size=size)
    require(objects in (1, 2), "objects", objects, "1 or 2")
    first = _integers(6, n, generator)
    second = (first + 1 + _integers(5, n, generator)) % 6
    labels = torch.stack([first, second], dim=1)[:, :objects]
    radius, row, column = torch.rand(3, n, objects, 1, 1, generator=generator)
    radius = size / 8 + radius * size / 16
    cell = size / objects
    row = radius + row * (size - 1 - 2 * radius)
    column = radius + column * (cell - 1 - 2 * radius)
    column = column + cell * torch.arange(objects)[:, None, None]
    y, x = _grid(size)
    masks = _draw(CLUTTER_SHAPES, labels, (x - column) / radius, (y - row) / radius)
    image = _clutter(n, size, 0.0, 1.0, generator)
    image = _paint(image, masks, torch.rand(n, objects, 3, generator=generator))
    image = _noisy(image, noise, generator)
    return {"image": image, "label": labels[:, 0].clone(), "labels": labels, "masks": masks}


def binding(
    n: int, seed: int = 0, size: int = 40, adjacency: float = 0.5, distractors: int = 4,
    noise: float = 0.05,
) -> dict[str, Tensor]:  # fmt: skip
    """Which part does the red body carry: a yellow one (label 0) or a green one (label 1)?

    Two objects, each a bar of 12×4 px, a white neck of 4 px and a part of 4×4 px in a row. One body
    is red and one blue, one part yellow and one green, so a bag of colors says nothing: chance is
    1/2. No window of 5 px sees a part with a body, and in a share `adjacency` of the images the
    body whose *center* is nearest to a part belongs to the other object, so that nearness alone
    scores 1 − adjacency. A solution follows the neck. A minimal case of the part trees that
    DependencyViT (Ding et al. 2023) is asked to find; the data set `parts` is the full one.

    Args:
        adjacency: share of images with the objects 9 px apart (else 16), exact up to rounding.
        distractors: 3×3 squares in the four colors, under the objects and in no mask.

    Returns:
        `image`, `label (n,)`, `adjacent (n,)` bool, `masks (n, 2, 3, H, W)`: the object with the
        red body, then the one with the blue body; of each the body, the neck and the part.
    """
    generator = _generator(n, seed, noise)
    whole(24, size=size)
    whole(0, distractors=distractors)
    inside("[0, 1]", adjacency=adjacency)
    label = _integers(2, n, generator)
    adjacent = torch.randperm(n, generator=generator) < round(adjacency * n)
    y, x = _grid(size)
    image = _clutter(n, size, 0.3, 0.7, generator)
    spots = _integers(size - 2, (2, n, distractors), generator)
    spots = _between(y, spots[0], 3) & _between(x, spots[1], 3)
    image = _paint(image, spots, PALETTE[_integers(4, (n, distractors), generator)])

    # Both objects lie along one axis and face each other; the axis and both directions are random.
    vertical, *flips = _integers(2, (3, n, 1, 1), generator) == 1
    along, across = torch.where(vertical, y, x), torch.where(vertical, x, y)
    along, across = (
        torch.where(flip, size - 1 - axis, axis)
        for flip, axis in zip(flips, (along, across), strict=True)
    )
    apart = torch.where(adjacent, 9, 16)[:, None, None]
    start, line = _integers(2**20, (2, n, 1, 1), generator)
    first = across - line % (size - apart - 3), along - start % (size - 23)
    second = first[0] - apart, 23 - first[1]
    masks = torch.stack([
        torch.stack([(b >= 0) & (b < 4) & (a >= low) & (a < high)
                     for low, high in ((0, 12), (12, 16), (16, 20))], dim=1)
        for b, a in (first, second)
    ], dim=1)  # fmt: skip
    red, blue, yellow, green = PALETTE[torch.tensor([0, 2, 3, 1])]
    parts = torch.stack([yellow, green])
    colors = torch.stack([
        red.expand(n, 3), NECK.expand(n, 3), parts[label],
        blue.expand(n, 3), NECK.expand(n, 3), parts[1 - label],
    ], dim=1)  # fmt: skip
    image = _paint(image, rearrange(masks, "n o p h w -> n (o p) h w"), colors)
    image = _noisy(image, noise, generator)
    return {"image": image, "label": label, "adjacent": adjacent, "masks": masks}


def motion_direction(
    n: int, seed: int = 0, frames: int = 8, size: int = 32, speed: int = 3, noise: float = 0.05
) -> dict[str, Tensor]:
    """Where does the disc go: right, down, left or up (`DIRECTIONS`)?

    A disc of radius 3 px moves over still clutter and reenters at the opposite side, so its place
    in any one frame is uniform and says nothing: chance is 1/4. Frames without their order show the
    axis at best (1/2). A solution relates positions of different frames. With a speed from 6 + w to
    size − 6 − w, no window of w px sees the disc in two successive frames: they are far ones. The
    setting of the video models: non-local blocks (Wang et al. 2018), flow, local attention.

    Args:
        speed: px a frame, below size / 2.

    Returns:
        `image (n, 3, T, H, W)`, `label (n,)`, `masks (n, T, H, W)`, `velocity (n, 2)` (dx, dy).
    """
    generator = _generator(n, seed, noise)
    whole(2, frames=frames)
    whole(16, size=size)
    require(speed in range(1, math.ceil(size / 2)), "speed", speed, f"1 ≤ speed < {size / 2}")
    label = _integers(4, n, generator)
    velocity = speed * torch.tensor(list(DIRECTIONS.values()))[label]
    place = _integers(size, (n, 2), generator)[:, None] + torch.einsum(
        "t, n c -> n t c", torch.arange(frames), velocity
    )
    y, x = _grid(size)
    dx, dy = (
        (axis - place[..., c, None, None] + size // 2) % size - size // 2
        for c, axis in enumerate((x, y))
    )
    masks = dx**2 + dy**2 <= 9
    background = _clutter(n, size, 0.0, 1.0, generator)
    color = torch.rand(n, 3, generator=generator)
    image = torch.where(
        masks[:, None],
        rearrange(color, "n c -> n c 1 1 1"),
        rearrange(background, "n c h w -> n c 1 h w"),
    )
    image = _noisy(image, noise, generator)
    return {"image": image, "label": label, "masks": masks, "velocity": velocity}


def shapes(
    n: int, seed: int = 0, size: int = 64, objects: int = 3, noise: float = 0.03
) -> dict[str, Tensor]:
    """Ellipses, rectangles and rings of any angle in flat colors, with exact masks.

    Chance for the class of one object is 1/3. Every edge is a color edge against the background (at
    least 0.3 in each channel), so a solution for superpixels is to assign pixels by color. For
    SPFormer's edges (Mei et al. 2024) against square patches: partition quality and upsampling.

    Args:
        objects: drawn one over the other.

    Returns:
        `image`, `labels (n, objects)` numbers into `FLAT_SHAPES`, `label (n,)` that of object 0,
        `masks (n, objects, H, W)` of the *visible* pixels: disjoint; empty when all is covered.
    """
    generator = _generator(n, seed, noise)
    whole(8, size=size)
    whole(1, objects=objects)
    labels = _integers(len(FLAT_SHAPES), (n, objects), generator)
    angle, row, column = torch.rand(3, n, objects, 1, 1, generator=generator)
    long, short = size * (0.14 + 0.1 * torch.rand(2, n, objects, 1, 1, generator=generator))
    margin = 0.24 * size
    y, x = _grid(size)
    y = y - margin - row * (size - 1 - 2 * margin)
    x = x - margin - column * (size - 1 - 2 * margin)
    cos, sin = (math.pi * angle).cos(), (math.pi * angle).sin()
    whole_masks = _draw(
        FLAT_SHAPES, labels, (cos * x + sin * y) / long, (cos * y - sin * x) / short
    )
    masks = whole_masks.clone()
    for later in range(1, objects):
        masks[:, :later] &= ~whole_masks[:, later : later + 1]
    background = torch.rand(n, 1, 3, generator=generator)
    colors = (background + 0.3 + 0.4 * torch.rand(n, objects, 3, generator=generator)) % 1
    image = background.mT[..., None].expand(n, 3, size, size)
    image = _noisy(_paint(image, masks, colors), noise, generator)
    return {"image": image, "label": labels[:, 0].clone(), "labels": labels, "masks": masks}


def _generator(n: int, seed: int, noise: float) -> Generator:
    """Check what all toys take, and start the generator."""
    whole(1, n=n)
    whole(0, seed=seed)
    inside("[0, 1]", noise=noise)
    return torch.Generator().manual_seed(seed)


def _integers(high: int, shape: int | tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randint(high, (shape,) if isinstance(shape, int) else shape, generator=generator)


def _grid(size: int) -> tuple[Tensor, Tensor]:
    """y `(H, 1)` and x `(W,)` in px."""
    index = torch.arange(size)
    return index[:, None], index


def _between(axis: Tensor, start: Tensor, length: int) -> Tensor:
    """Is a pixel of the axis in [start, start + length)? `(…,)` starts give `(…, H, W)` masks."""
    offset = axis - start[..., None, None]
    return (offset >= 0) & (offset < length)


def _draw(rules: dict, kind: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Masks `(…, H, W)` of the shapes number `kind (…,)` in `rules`."""
    mask = torch.zeros(torch.broadcast_shapes(u.shape, v.shape), dtype=torch.bool)
    for number, rule in enumerate(rules.values()):
        chosen = kind == number
        mask[chosen] = rule(u[chosen], v[chosen])
    return mask


def _paint(image: Tensor, masks: Tensor, colors: Tensor) -> Tensor:
    """Paint masks `(n, k, H, W)` in colors `(n, k, 3)` one after the other on `(n, 3, H, W)`."""
    for mask, color in zip(masks.unbind(1), colors.unbind(1), strict=True):
        image = torch.where(mask[:, None], color[:, :, None, None], image)
    return image


def _clutter(n: int, size: int, low: float, high: float, generator: Generator) -> Tensor:
    """Smooth random colors from low to high: 8×8 draws, interpolated."""
    draws = low + (high - low) * torch.rand(n, 3, 8, 8, generator=generator)
    return F.interpolate(draws, size=(size, size), mode="bilinear")


def _noisy(image: Tensor, noise: float, generator: Generator) -> Tensor:
    return (image + noise * torch.randn(image.shape, generator=generator)).clamp(0, 1)
