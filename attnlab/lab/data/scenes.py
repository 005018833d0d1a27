"""`scenes`: photographic cut-outs composited over photographs.

What a scene shows is known exactly, because it was put there: class, matte and box of each object.
Objects are small and lie anywhere, so that a fixed guess at the center finds few of them.

| split | cut-outs of | backgrounds of |
|---|---|---|
| `train` | train | train |
| `val` | val | val |
| `test_scenes` | train: objects that were seen in training, in new places | test |
| `test_unseen` | test: objects that were never seen | test |
"""

import torch
from torch import Tensor

from attnlab.lab.data import bundle
from attnlab.lab.data.compositing import (
    CLASSES,
    Sprites,
    Things,
    arrange,
    as_bytes,
    backdrop,
    checked,
    layer,
    load_sprites,
)
from attnlab.lab.data.draws import Draws, tight_boxes
from attnlab.lab.data.samples import Batch, as_size

__all__ = ["CLASSES", "SPLITS", "VERSION", "derive", "generate"]

VERSION = 1
SPLITS = {  # split → splits of the cut-outs and of the backgrounds
    "train": ("train", "train"),
    "val": ("val", "val"),
    "test_scenes": ("train", "test"),
    "test_unseen": ("test", "test"),
}
BLOCK = 64  # scenes drawn and composited together


def generate(
    n: int,
    split: str = "train",
    size: int | tuple[int, int] = 64,
    seed: int = 0,
    *,
    objects: int | tuple[int, int] = 1,
    scale: tuple[float, float] = (0.3, 0.55),
) -> Batch:
    """Composite `n` scenes. The first 100 of n=200 are those of n=100.

    Args:
        n: number of scenes, at least 1.
        split: one of `SPLITS`.
        size: side, or (height, width), in px. Another size of that shape shows the same scenes.
        seed: same seed, same bytes.
        objects: how many objects a scene has, or (least, most).
        scale: an object's longer side, as a share of the image's shorter side: (least, most).

    Returns:
        With `K` the most objects: `image (n, 3, H, W)` uint8; `instances (n, K, H, W)` uint8 mattes
        of what is visible, that is, amodal mattes minus what nearer objects hide; `labels (n, K)`;
        `label (n,)`, the class of object 0; `boxes (n, K, 4)` around what is at least half visible.
        Objects are sorted from the largest, which lies at the back, to the smallest.

    Raises:
        ValueError: an argument out of range.
    """
    least, most = checked(n, split, SPLITS, objects, scale)
    height, width = as_size(size)
    cutouts, photos = SPLITS[split]
    sprites = load_sprites(cutouts, scale, height, width)
    photos = bundle.backgrounds(photos).float() / 255
    blocks = []
    for block in range(-(-n // BLOCK)):
        draw = Draws(BLOCK, "scenes", VERSION, split, seed, block)
        canvas = backdrop(draw, photos, height, width)
        things = arrange(draw, sprites, least, most, scale, height, width)
        blocks.append(_composite(canvas, things, sprites))
    return {key: torch.cat([block[key] for block in blocks])[:n] for key in blocks[0]}


def derive(batch: Batch) -> Batch:
    """Add `saliency (B, H, W)`, the union of the instances, to a batch of samples."""
    return {**batch, "saliency": batch["instances"].sum(1).clamp(max=1)}


def _composite(canvas: Tensor, things: Things, sprites: Sprites) -> Batch:
    """Lay the objects over the canvas, back to front, and keep what stays visible of each."""
    height, width = canvas.shape[-2:]
    visible: list[Tensor] = []
    for k in range(things.label.shape[1]):
        color, alpha = layer(things, k, sprites, height, width).split([3, 1], dim=1)
        canvas = color + (1 - alpha) * canvas
        visible = [matte * (1 - alpha) for matte in visible] + [alpha]
    instances = as_bytes(torch.cat(visible, dim=1))
    boxes = tight_boxes(instances >= 128)
    return {
        "image": as_bytes(canvas),
        "label": things.label[:, 0].to(torch.int8),
        "labels": things.label.to(torch.int8),
        "instances": instances,
        "boxes": boxes.to(torch.int16),
    }
