"""How does a score fall when images are turned or covered? Sweeps over angles and over squares.

A sweep gives `score` one spoiled batch after the other, and returns its results by how much was
spoiled; 0 is the batch as it is. What `score` measures is its own affair: accuracy, mIoU, an
oracle's confusion matrix, a model's map.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from attnlab.lab.arguments import inside, require, whole

Batch = dict[str, Tensor]
Score = TypeVar("Score")


def rotated(images: Tensor, angle: float, fill: float = 0.0) -> Tensor:
    """Turned counter-clockwise about the center, bilinear: `(N, C, H, W)` → the same shape.

    Args:
        angle: in degrees.
        fill: what comes in from outside, at the corners.
    """
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import rotate

    require(images.ndim == 4, "images", tuple(images.shape), "(N, C, H, W)")
    inside("(-inf, inf)", angle=angle)
    return rotate(images, angle, interpolation=InterpolationMode.BILINEAR, fill=fill)


def rotated_labels(labels: Tensor, angle: float, fill: int = 255) -> Tensor:
    """Turned as `rotated`, by the nearest pixel: integers `(N, H, W)` → the same shape."""
    from torchvision.transforms.v2.functional import rotate

    whole_numbers = not (labels.is_floating_point() or labels.is_complex())
    fits = labels.ndim == 3 and whole_numbers
    require(fits, "labels", (labels.dtype, tuple(labels.shape)), "integers (N, H, W)")
    inside("(-inf, inf)", angle=angle)
    return rotate(labels[:, None].double(), angle, fill=fill)[:, 0].to(labels.dtype)


def occluder(size: tuple[int, int], side: int, corner: tuple[int, int] | None = None) -> Tensor:
    """Where a square of `side` pixels lies in an image of `size` (H, W): bool `(H, W)`.

    Args:
        corner: (top, left); by default the square is in the middle.

    Raises:
        ValueError: it does not lie inside the image.
    """
    height, width = size
    whole(0, side=side)
    top, left = corner or ((height - side) // 2, (width - side) // 2)
    fits = 0 <= top <= height - side and 0 <= left <= width - side
    where = f"side={side} at {(top, left)}"
    require(fits, "occluder", where, f"a square inside an image of {(height, width)}")
    covered = torch.zeros(height, width, dtype=torch.bool)
    covered[top : top + side, left : left + side] = True
    return covered


def occluded(
    images: Tensor, side: int, corner: tuple[int, int] | None = None, fill: float = 0.0
) -> Tensor:
    """Images `(N, C, H, W)` with an `occluder` of the value `fill`: the same shape."""
    require(images.ndim == 4, "images", tuple(images.shape), "(N, C, H, W)")
    covered = occluder(tuple(images.shape[2:]), side, corner)
    return images.masked_fill(covered.to(images.device), fill)


def rotation_sweep(
    score: Callable[[Batch], Score],
    batch: Batch,
    angles: Sequence[float] = (0, 15, 30, 45, 60, 75, 90),
    labels: Sequence[str] = (),
    fill: float = 0.0,
) -> dict[float, Score]:
    """`score` of the batch with its images turned by each of the angles.

    Args:
        batch: `image` `(N, C, H, W)`, and what else `score` reads.
        angles: in degrees, counter-clockwise.
        labels: keys of integer maps `(N, H, W)` that turn along, 255 at the corners.
        fill: the images' corners.
    """
    _check_keys(batch, ("image", *labels))
    scores = {}
    for angle in angles:
        turned = {key: rotated_labels(batch[key], angle) for key in labels}
        turned["image"] = rotated(batch["image"], angle, fill)
        scores[angle] = score(batch | turned)
    return scores


def occlusion_sweep(
    score: Callable[[Batch], Score],
    batch: Batch,
    sides: Sequence[int] = (0, 8, 16, 24, 32),
    corner: tuple[int, int] | None = None,
    fill: float = 0.0,
) -> dict[int, Score]:
    """`score` of the batch with a square over its images; `occluder` `(H, W)` says where.

    Args:
        batch: `image` `(N, C, H, W)`, and what else `score` reads; it gets `occluder` as well.
        sides: of the square, in pixels; 0 is none.
        corner: (top, left) of all squares; by default they are in the middle.
        fill: the square's value: 0 is the mean of normalised images.
    """
    _check_keys(batch, ("image",))
    size = tuple(batch["image"].shape[-2:])
    return {
        side: score(batch | {
            "image": occluded(batch["image"], side, corner, fill),
            "occluder": occluder(size, side, corner),
        })
        for side in sides
    }  # fmt: skip


def _check_keys(batch: Batch, keys: Sequence[str]) -> None:
    for key in keys:
        require(key in batch, "batch", sorted(batch), f"samples with {key!r}")
