"""`clips`: cut-outs that move over a photograph while the camera pans, with exact motion.

Every layer moves by a whole number of pixels a frame and every pixel belongs to one layer (mattes
are cut at one half), so the flow is exact: warping frame t + 1 by it gives frame t, bit by bit,
wherever the content is still to be seen.

Flow is in px, channel 0 = dx (to the right), channel 1 = dy (down), and says where to *fetch*: the
content at p of frame i is at p + M(p) in frame k, so frame i = frame k sampled at p + M(p).
"""

import torch
from einops import rearrange
from torch import Tensor

from attnlab.lab.arguments import require, whole
from attnlab.lab.data import bundle, compositing
from attnlab.lab.data.compositing import Sprites, Things, as_bytes
from attnlab.lab.data.draws import Draws, tight_boxes
from attnlab.lab.data.samples import Batch, as_size

__all__ = ["CLASSES", "OBJECTS", "SPLITS", "VERSION", "derive", "flow_between", "generate"]

VERSION = 1
CLASSES = ("right", "down right", "down", "down left", "left", "up left", "up", "up right")
OBJECTS = compositing.CLASSES  # what `labels` indexes
STEPS = torch.tensor([[1, 0], [1, 1], [0, 1], [-1, 1], [-1, 0], [-1, -1], [0, -1], [1, -1]])
SPLITS = ("train", "val", "test")
BLOCK = 16  # clips drawn and composited together


def generate(
    n: int,
    split: str = "train",
    size: int | tuple[int, int] = 64,
    seed: int = 0,
    *,
    frames: int = 8,
    objects: int | tuple[int, int] = 1,
    scale: tuple[float, float] = (0.3, 0.55),
    speed: tuple[int, int] = (1, 3),
    pan: int = 1,
) -> Batch:
    """Composite `n` clips. The first 100 of n=200 are those of n=100.

    Args:
        n: number of clips, at least 1.
        split: one of `SPLITS`; cut-outs and backgrounds are those of that split.
        size: side, or (height, width), in px.
        seed: same seed, same bytes.
        frames: frames of a clip, at least 2.
        objects: how many objects a clip has, or (least, most).
        scale: an object's longer side, as a share of the image's shorter side: (least, most).
        speed: px a frame along each axis in which an object moves: (least, most), whole numbers.
        pan: the background moves by up to so many px a frame along each axis.

    Returns:
        With `K` the most objects and `T` frames: `image (n, 3, T, H, W)` uint8; `label (n,)`, the
        direction in the image of object 0, the largest, an index into `CLASSES`; `labels (n, K)`,
        what the objects are, indices into `OBJECTS`, −1 for padding; `owner (n, T, H, W)`, 0 for
        the background and k + 1 for object k; `velocity (n, K + 1, 2)`, (dx, dy) in px a frame of
        the background and of each object; `boxes (n, K, T, 4)`, zero in a frame that does not
        show the object. Objects lie where the layout puts them in the middle frame, T // 2.
        See also `derive`.

    Raises:
        ValueError: an argument out of range.
    """
    least, most = compositing.checked(n, split, SPLITS, objects, scale)
    whole(2, frames=frames)
    whole(0, pan=pan)
    require(0 <= speed[0] <= speed[1], "speed", speed, "(least, most), 0 ≤ least ≤ most")
    height, width = as_size(size)
    sprites = compositing.load_sprites(split, scale, height, width)
    photos = bundle.backgrounds(split).float() / 255
    blocks = []
    for block in range(-(-n // BLOCK)):
        draw = Draws(BLOCK, "clips", VERSION, split, seed, block)
        margin = frames // 2 * max(speed[1], pan)  # what comes into view is on a larger canvas
        canvas = compositing.backdrop(draw, photos, height + 2 * margin, width + 2 * margin)
        things = compositing.arrange(draw, sprites, least, most, scale, height, width)
        direction = draw.integers(len(CLASSES), most)
        pace = speed[0] + draw.integers(speed[1] - speed[0] + 1, most, 1)
        panning = draw.integers(2 * pan + 1, 1, 2) - pan
        velocity = torch.cat([panning, STEPS[direction] * pace], dim=1)
        clip = _move(canvas, things, sprites, velocity, frames, margin)
        blocks.append({**clip, "label": direction[:, 0].to(torch.int8)})
    return {key: torch.cat([block[key] for block in blocks])[:n] for key in blocks[0]}


def _move(
    canvas: Tensor, things: Things, sprites: Sprites, velocity: Tensor, frames: int, margin: int
) -> Batch:
    """Draw each layer once on a large canvas and slide a window over it."""
    things = things._replace(center=things.center + margin)
    large = canvas.shape[-2:]
    time = torch.arange(frames) - frames // 2
    offset = margin - rearrange(velocity, "b k xy -> b k 1 xy") * time.view(-1, 1)  # (B, K+1, T, 2)
    image = _windows(as_bytes(canvas), offset[:, 0], margin)
    owner = torch.zeros_like(image[..., 0])
    for k in range(things.label.shape[1]):
        color, alpha = compositing.layer(things, k, sprites, *large).split([3, 1], dim=1)
        solid = torch.cat([color / alpha.clamp(min=0.5), (alpha >= 0.5).float()], dim=1)
        color, alpha = _windows(as_bytes(solid), offset[:, k + 1], margin).split([3, 1], dim=-1)
        image = torch.where(alpha > 0, color, image)
        owner = torch.where(alpha[..., 0] > 0, k + 1, owner)
    boxes = tight_boxes(_masks(owner, things.label.shape[1]))
    return {
        "image": rearrange(image, "b t h w c -> b c t h w").contiguous(),
        "labels": things.label.to(torch.int8),
        "owner": owner.to(torch.uint8),
        "velocity": velocity.to(torch.int8),
        "boxes": boxes.to(torch.int16),
    }


def _windows(canvas: Tensor, offset: Tensor, margin: int) -> Tensor:
    """`(B, T, H, W, C)`: windows of `(B, C, H', W')` with upper left corners `(B, T, 2)` (x, y)."""
    height, width = (length - 2 * margin for length in canvas.shape[-2:])
    x, y = rearrange(offset, "b t xy -> xy b t 1")
    rows = rearrange(y + torch.arange(height), "b t h -> b t h 1")
    columns = rearrange(x + torch.arange(width), "b t w -> b t 1 w")
    sample = torch.arange(len(canvas)).view(-1, 1, 1, 1)
    return rearrange(canvas, "b c h w -> b h w c")[sample, rows, columns]


def _masks(owner: Tensor, objects: int) -> Tensor:
    """`(B, K, T, H, W)` bool: where each object is seen."""
    return owner.unsqueeze(1) == torch.arange(1, objects + 1, device=owner.device).view(-1, 1, 1, 1)


def derive(batch: Batch) -> Batch:
    """Add what follows from `owner` and `velocity` to a batch of samples.

    Adds `instances (B, K, T, H, W)` and `saliency (B, T, H, W)`, float 0 or 1; `flow (B, T-1, 2, H,
    W)` from each frame to the next, and `visible (B, T-1, H, W)` bool, as `flow_between` has them.
    """
    owner = batch["owner"]
    steps = [flow_between(batch, t, t + 1) for t in range(owner.shape[1] - 1)]
    return {
        **batch,
        "instances": _masks(owner, batch["labels"].shape[1]).float(),
        "saliency": (owner > 0).float(),
        "flow": torch.stack([flow for flow, _ in steps], dim=1),
        "visible": torch.stack([visible for _, visible in steps], dim=1),
    }


def flow_between(batch: Batch, i: int, k: int) -> tuple[Tensor, Tensor]:
    """Exact flow that fetches frame `i` from frame `k`, and where it can be fetched.

    Args:
        batch: a batch of clips.
        i, k: numbers of frames, in any order.

    Returns:
        flow `(B, 2, H, W)` float, (dx, dy) in px: `(k − i) · velocity` of the layer at each pixel;
        visible `(B, H, W)` bool: what is at the pixel in frame i is seen in frame k too.

    Raises:
        ValueError: there is no frame `i` or `k`.
    """
    owner, frames = batch["owner"].long(), batch["owner"].shape[1]
    for name, frame in (("i", i), ("k", k)):
        require(0 <= frame < frames, name, frame, f"the number of a frame, 0 to {frames - 1}")
    height, width = owner.shape[-2:]
    layer = rearrange(owner[:, i], "b h w -> b (h w) 1").expand(-1, -1, 2)
    shift = (k - i) * batch["velocity"].long().gather(1, layer)
    shift = rearrange(shift, "b (h w) xy -> xy b h w", h=height)
    x = shift[0] + torch.arange(width, device=owner.device)
    y = shift[1] + torch.arange(height, device=owner.device).view(-1, 1)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    sample = torch.arange(len(owner), device=owner.device).view(-1, 1, 1)
    there = owner[sample, k, y.clamp(0, height - 1), x.clamp(0, width - 1)]
    return rearrange(shift, "xy b h w -> b xy h w").float(), inside & (there == owner[:, i])
