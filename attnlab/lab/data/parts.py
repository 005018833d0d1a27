"""`parts`: procedural objects made of named parts, with the whole tree scene → objects → parts.

Eight object types, 31 part names, drawn by us. Training and test images differ by the seed alone,
so there is no gap between them. An image is painted back to front: a background, unlabelled
distractors, the objects part by part, and sometimes a shape that hides a piece of one.

Three traps of such a toy, and what is done about them: nearness gives the tree away (`adjacency`);
a flat background gives the objects away (photographs, and patches in the objects' colors); a bag of
colors gives the class away (types share their colors and are all made of the same two shapes, and
`palette="random"` takes typical colors away).
"""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from attnlab.lab.arguments import inside, require, whole
from attnlab.lab.data import bundle, parts_shapes
from attnlab.lab.data.compositing import as_bytes, backdrop
from attnlab.lab.data.draws import Draws, tight_boxes
from attnlab.lab.data.parts_layout import TURN, Scene, Strokes, chance, clutter, part_colors, scene
from attnlab.lab.data.parts_shapes import CLASSES, PARTS, SLOTS
from attnlab.lab.data.samples import Batch, as_size

__all__ = ["CLASSES", "PARTS", "SPLITS", "VERSION", "derive", "generate"]

VERSION = 1
SPLITS = ("train", "val", "test")
PALETTES = ("typical", "random")
BACKGROUNDS = ("mixed", "photo", "texture", "flat")
BLOCK = 32  # samples drawn and painted together: small enough for the processor's cache


def generate(
    n: int,
    split: str = "train",
    size: int | tuple[int, int] = 64,
    seed: int = 0,
    *,
    objects: int | tuple[int, int] = 1,
    scale: tuple[float, float] | None = None,
    palette: str = "typical",
    background: str = "mixed",
    distractors: int = 2,
    occlusion: float = 0.25,
    adjacency: float = 0.0,
) -> Batch:
    """Draw and paint `n` samples. The first 100 of n=200 are those of n=100.

    The nodes of the tree have fixed places: 0 is the scene, `1 … K` are the objects, and object `k`
    (counted from 0) has its parts at `1 + K + 6k … 6 + K + 6k`. A part or an object that is hidden
    entirely is padding.

    Args:
        n: number of samples, at least 1.
        split: "train", "val" or "test": three streams of random numbers.
        size: side, or (height, width), in px. Another size of that shape shows the same scenes.
        seed: same seed, same bytes.
        objects: how many objects an image has, or (least, most); at most 3.
        scale: an object's side as a share of the image's shorter side: (least, most). Default:
            (0.44, 0.72) for one object, (0.32, 0.52) for several. A fixed map that looks at the
            center points at a large object more often than not: measure localisation with less,
            such as (0.3, 0.5), and print the baselines of `metrics`.
        palette: "typical": each part near the usual color of its type; "random": any color.
        background: "photo" (photographs), "texture" (patches in the colors of objects), "mixed"
            (half of each) or "flat" (one color, which makes finding the object trivial).
        distractors: number of unlabelled shapes behind the objects, at most 8.
        occlusion: share of the images in which a shape hides a piece of an object.
        adjacency: share of the images in which long objects lie so that as many parts as possible
            are nearer to another object's center than to that of their own: one part in six or
            seven, of which there are next to none otherwise. Needs two objects.

    Returns:
        With `K` the most objects and `N = 1 + 7K` nodes:
        `image (n, 3, H, W)` uint8; `label (n,)` the class of the object of which most is visible;
        `labels (n, K)` −1 for padding; `boxes (n, K, 4)` x1, y1, x2, y2 of what is visible, in px;
        `nodes (n, H, W)` the front-most node at a pixel, 0 where there is none;
        `tree (n, N)` the parent of each node, −1 for the scene, −2 for padding;
        `node_part (n, N)` index into `PARTS`, 0 for nodes that are no parts. See also `derive`.

    Raises:
        ValueError: an argument out of range.
    """
    least, most = _counts(objects, adjacency)
    whole(1, n=n)
    require(split in SPLITS, "split", split, f"one of {SPLITS}")
    require(palette in PALETTES, "palette", palette, f"one of {PALETTES}")
    require(background in BACKGROUNDS, "background", background, f"one of {BACKGROUNDS}")
    require(distractors in range(9), "distractors", distractors, "an integer from 0 to 8")
    inside("[0, 1]", occlusion=occlusion, adjacency=adjacency)
    scale = scale or ((0.44, 0.72) if most == 1 else (0.32, 0.52))
    fits = len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1
    require(fits, "scale", scale, "(least, most), 0 < least ≤ most ≤ 1")
    height, width = as_size(size)
    photos = _photos() if background in ("mixed", "photo") else None
    blocks = []
    for block in range(-(-n // BLOCK)):
        draw = Draws(BLOCK, "parts", VERSION, split, seed, block)
        things = scene(draw, least, most, height, width, scale, palette, adjacency)
        others = clutter(draw, things, distractors, occlusion, height, width, palette)
        canvas = _background(draw, background, photos, palette, height, width)
        image, nodes = _paint(draw, canvas, things, others)
        blocks.append({"image": image, **_truth(nodes, things)})
    return {key: torch.cat([block[key] for block in blocks])[:n] for key in blocks[0]}


def derive(batch: Batch) -> Batch:
    """Add what follows from `labels`, `nodes`, `tree` and `node_part` to a batch of samples.

    Adds `parts (B, H, W)`, indices into `PARTS`; `instances (B, K, H, W)`, what is visible of each
    object, and `saliency (B, H, W)`, both 0.0 or 1.0; `node_object (B, N)`, the object (from 0)
    that a node is or belongs to, −1 for the scene and for padding.
    """
    nodes, tree, objects = batch["nodes"].long(), batch["tree"], batch["labels"].shape[1]
    node = torch.arange(tree.shape[1], device=tree.device)
    node_object = torch.where(node > objects, (node - 1 - objects) // SLOTS, node - 1)
    node_object = torch.where(tree >= 0, node_object, -1)

    def at_pixels(of_node: Tensor) -> Tensor:
        return of_node.gather(1, nodes.flatten(1)).view_as(nodes)

    index = torch.arange(objects, device=tree.device).view(-1, 1, 1)
    return {
        **batch,
        "parts": at_pixels(batch["node_part"].long()),
        "instances": (at_pixels(node_object).unsqueeze(1) == index).float(),
        "saliency": (nodes > 0).float(),
        "node_object": node_object,
    }


def _counts(objects: int | tuple[int, int], adjacency: float) -> tuple[int, int]:
    """The least and the most number of objects in an image."""
    least, most = (objects, objects) if isinstance(objects, int) else objects
    require(1 <= least <= most <= 3, "objects", objects, "1 to 3, or a (least, most) pair of them")
    lonely = adjacency > 0 and least < 2
    require(not lonely, "adjacency", adjacency, f"0 where an image may have one object: {objects=}")
    return least, most


def _photos() -> Tensor:
    """Crops of photographs of all splits, `(N, 3, 128, 128)` float: splits differ by nothing.

    Without those under the GPL: a picture of `parts` needs credits, but no licence of its own.
    """
    return torch.cat([bundle.backgrounds(split, copyleft=False) for split in SPLITS]).float() / 255


def _background(draw, kind, photos, palette, height, width) -> Tensor:
    """What the objects stand before, `(B, 3, H, W)` float in [0, 1]."""
    colors = parts_shapes.rgb(part_colors(draw, palette, 3))
    if kind == "flat":
        return repeat(colors[:, 0], "b c -> b c h w", h=height, w=width)
    if kind == "photo":
        return backdrop(draw, photos, height, width)
    noise = draw.uniform(-1.0, 1.0, 3, 6, 6)
    share = F.interpolate(noise, (height, width), mode="bicubic").mul(5).softmax(1)
    texture = torch.einsum("bkhw,bkc->bchw", share, colors)
    if kind == "texture":
        return texture
    return torch.where(chance(draw, 0.5, 1, 1, 1), backdrop(draw, photos, height, width), texture)


def _paint(draw: Draws, canvas: Tensor, objects: Scene, others: Strokes) -> tuple[Tensor, Tensor]:
    """Images `(B, 3, H, W)` uint8 and the front-most node at each pixel `(B, H, W)` uint8."""
    batch, _, height, width = canvas.shape
    behind = others.x.shape[1] - 1  # the last of the others lies before the objects
    strokes = Strokes(
        *(
            torch.cat([other[:, :behind], parts, other[:, behind:]], dim=1)
            for other, parts in zip(others, objects.strokes, strict=True)
        )
    )
    first = 1 + objects.labels.shape[1]
    node = [0] * behind + list(range(first, first + objects.part.shape[1])) + [0]

    color = parts_shapes.rgb(strokes.color)
    cover, light = _coverage(draw, strokes, height, width)
    nodes = torch.zeros(batch, height, width, dtype=torch.uint8)
    for s, number in enumerate(node):
        alpha = cover[:, s]
        painted = color[:, s, :, None, None] * light[:, s].unsqueeze(1)
        canvas = torch.lerp(canvas, painted, alpha.unsqueeze(1))
        nodes.masked_fill_(alpha > 0.5, number)

    cast = draw.uniform(0.75, 1.2, 3, 1, 1)  # the color of the light
    grain = draw.uniform(0.02, 0.14, 1, 1, 1)
    noise = draw.integers(256, 3, height, width).float() / 255 - 0.5
    return as_bytes((canvas * cast + noise * grain).clamp(0, 1)), nodes


def _coverage(draw: Draws, strokes: Strokes, height: int, width: int) -> tuple[Tensor, Tensor]:
    """How much of each pixel a stroke covers, and how light it is there; `(B, S, H, W)` each.

    Most strokes are small, so each is computed in a window around it: a quarter or half of the
    image's side, or all of it.
    """
    shape, total = strokes.x.shape, strokes.x.shape[1]
    outline = draw.uniform(0.0, 0.6, 1).expand(shape)
    amplitude = draw.uniform(-0.4, 0.25, total).clamp(min=0)  # of stripes; most have none
    period, lengthwise = draw.uniform(3.0, 8.0, total), draw.integers(2, total) == 1
    cover = torch.zeros(*shape, height, width)
    light = torch.ones(*shape, height, width)

    wide = strokes.w * torch.maximum(strokes.top + strokes.lean.abs(), torch.tensor(1.0))
    reach = torch.hypot(wide, strokes.h) * (1 + strokes.lobes) + 1
    side = max(height, width)
    level = (reach > side / 8).int() + (reach > side / 4)  # of the window: 0, 1, 2
    for disc in (False, True):
        for window in range(3):
            chosen = strokes.there & (strokes.disc == disc) & (level == window)
            image, stroke = torch.nonzero(chosen, as_tuple=True)

            def pick(field, at=(image, stroke)):
                return field[at].view(-1, 1, 1)

            x, y, w, h, angle, top, lean, lobes = (pick(field) for field in strokes[:8])
            columns = _window(x, width, min(width, side >> (2 - window)))  # (R, 1, side)
            rows = _window(y, height, min(height, side >> (2 - window))).mT  # (R, side, 1)
            right, down = columns + 0.5 - x, rows + 0.5 - y
            cosine, sine = torch.cos(angle), torch.sin(angle)
            u, v = right * cosine + down * sine, down * cosine - right * sine
            if disc:
                distance = parts_shapes.disc_distance(u, v, w, h, lobes)
            else:
                distance = parts_shapes.box_distance(u, v, w, h, top, lean)
            stripes = torch.sin(torch.where(pick(lengthwise), u, v) * (TURN / pick(period)))
            rim = (1 + distance / 1.5).clamp(0, 1)
            pixels = image.view(-1, 1, 1), stroke.view(-1, 1, 1), rows, columns
            cover[pixels] = (0.5 - distance).clamp(0, 1)
            light[pixels] = (1 - pick(outline) * rim) * (1 + pick(amplitude) * stripes)
    return cover, light


def _window(center: Tensor, length: int, side: int) -> Tensor:
    """Indices `(R, 1, side)` of the pixels around centers `(R, 1, 1)`, moved into the image."""
    first = (center - side / 2).round().long().clamp(0, length - side)
    return first + torch.arange(side)


def _truth(nodes: Tensor, objects: Scene) -> Batch:
    """Labels, boxes and the tree of what is visible in `nodes`."""
    batch, count = objects.labels.shape
    first = 1 + count  # the first part's node
    flat = nodes.flatten(1).long()
    pixels = torch.zeros(batch, first + count * SLOTS, dtype=torch.long)
    pixels = pixels.scatter_add(1, flat, torch.ones_like(flat))[:, first:]
    seen = pixels > 0
    visible = rearrange(pixels, "b (k p) -> b k p", k=count).sum(-1)
    labels = torch.where(visible > 0, objects.labels, -1)

    parent = repeat(torch.arange(1, first), "k -> (k p)", p=SLOTS)
    root = torch.full((batch, 1), -1)
    tree = [root, torch.where(visible > 0, 0, -2), torch.where(seen, parent, -2)]
    node_part = F.pad(torch.where(seen, objects.part, 0), (first, 0))
    owner = (nodes.short() - first).div(SLOTS, rounding_mode="floor")
    masks = owner.unsqueeze(1) == torch.arange(count).view(-1, 1, 1)
    return {
        "label": labels.gather(1, visible.argmax(1, keepdim=True)).squeeze(1).to(torch.int8),
        "labels": labels.to(torch.int8),
        "boxes": tight_boxes(masks).to(torch.int16),
        "nodes": nodes,
        "tree": torch.cat(tree, dim=1).to(torch.int8),
        "node_part": node_part.to(torch.uint8),
    }
