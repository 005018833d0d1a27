"""How good is a partition, and how good the best label per segment? And partitions to beat.

A partition is int `(N, H, W)`: a segment's number for every pixel, numbered anyhow, not necessarily
connected. The truth is `(N, H, W)` too, classes or regions; `ignore_index` in it counts nowhere.
Scores are `(N,)`, one an image. A soft association is logits, slots `(N, heads, Sh, Sw, s², 9)` of
`attnlab.superpixel`. Print the number of segments beside every score, since smaller segments are
better at all of them, and `contour_density` beside `boundary_recall`: a ragged partition finds
every boundary.
"""

import math
from collections.abc import Callable

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

from attnlab.lab.arguments import inside, require, whole
from attnlab.lab.metrics import confusion_matrix, mean_iou
from attnlab.lab.robustness import rotated, rotated_labels
from attnlab.superpixel import (
    cell_side,
    collect,
    from_cells,
    hard_labels,
    mask_absent,
    spread,
    to_cells,
    upsample_association,
    valid9,
)


def segments(labels: Tensor) -> Tensor:
    """How many segments there are, int64."""
    counts = [image.unique().numel() for image in _partition(labels)]
    return torch.tensor(counts, device=labels.device)


def achievable_accuracy(labels: Tensor, target: Tensor, ignore_index: int = 255) -> Tensor:
    """Achievable segmentation accuracy: pixels right if each segment gets its best label.

    (1/n) Σ_j max_k |s_j ∩ g_k|, from 0 to 1. Liu et al. 2011.
    """
    return _scores(labels, target, ignore_index, lambda t: t.amax(1).sum() / t.sum())


def undersegmentation_error(labels: Tensor, target: Tensor, ignore_index: int = 255) -> Tensor:
    """How far segments leak over true borders: lower is better, 0 is none.

    (1/n) Σ_k Σ_{j: s_j ∩ g_k ≠ ∅} min(|s_j ∩ g_k|, |s_j ∖ g_k|), the form of Neubert & Protzel
    2012; there are others, which punish a segment by its whole size.
    """

    def error(overlap: Tensor) -> Tensor:
        outside = overlap.sum(1, keepdim=True) - overlap
        return torch.minimum(overlap, outside).sum() / overlap.sum()

    return _scores(labels, target, ignore_index, error)


def boundaries(labels: Tensor, ignore_index: int | None = None) -> Tensor:
    """Pixels with another segment above, below, left or right of them: bool `(N, H, W)`.

    Both sides of a border are boundary. A border with `ignore_index` is none.
    """
    labels = _partition(labels)
    found = torch.zeros_like(labels, dtype=torch.bool)
    for axis in (1, 2):
        last = labels.shape[axis] - 1
        one, other = labels.narrow(axis, 0, last), labels.narrow(axis, 1, last)
        border = one != other
        if ignore_index is not None:
            border &= (one != ignore_index) & (other != ignore_index)
        found.narrow(axis, 0, last).logical_or_(border)
        found.narrow(axis, 1, last).logical_or_(border)
    return found


def boundary_recall(
    labels: Tensor, target: Tensor, radius: int = 1, ignore_index: int = 255
) -> Tensor:
    """Share of the true boundary's pixels that have the partition's boundary near them.

    Near is within a square of 2 · `radius` + 1 pixels. NaN for an image without a true boundary.
    """
    whole(0, radius=radius)
    _check_pair(labels, target)
    near = boundaries(labels)[:, None].float()
    near = F.max_pool2d(near, 2 * radius + 1, stride=1, padding=radius)[:, 0] > 0
    true = boundaries(target, ignore_index)
    return (near & true).sum((1, 2)) / true.sum((1, 2))


def contour_density(labels: Tensor) -> Tensor:
    """Share of the pixels that are boundary: what a boundary recall was paid for."""
    return boundaries(labels).float().mean((1, 2))


def compactness(labels: Tensor) -> Tensor:
    """Σ_j (|s_j| / n) · 4π |s_j| / perimeter_j², higher is rounder; a square's own is π / 4.

    The perimeter is the number of pixels' edges around the segment, at the image's border too, so
    that even a disc has less than 1. Schick et al. 2012.
    """
    scores = []
    for image in _partition(labels):
        _, index = image.unique(return_inverse=True)
        area = torch.bincount(index.flatten()).double()
        rim = F.pad(index[None, None].double(), (1, 1, 1, 1), value=-1.0)[0, 0]
        perimeter = torch.zeros_like(area)
        for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
            open_edge = (rim != rim.roll(step, axis))[1:-1, 1:-1]
            perimeter += torch.bincount(index[open_edge], minlength=len(area))
        scores.append((area / area.sum() * 4 * math.pi * area / perimeter**2).sum())
    return torch.stack(scores)


def adjusted_rand(labels: Tensor, target: Tensor, ignore_index: int = 255) -> Tensor:
    """Agreement of two partitions, pair of pixels by pair: 1 if equal, 0 on average by chance.

    Hubert & Arabie 1985. Neither needs to know the other's numbers.
    """

    def pairs(count: Tensor) -> Tensor:
        return (count * (count - 1) / 2).sum()

    def score(overlap: Tensor) -> Tensor:
        together, ours, theirs = pairs(overlap), pairs(overlap.sum(1)), pairs(overlap.sum(0))
        chance, most = ours * theirs / pairs(overlap.sum()), (ours + theirs) / 2
        return torch.where(together == most, 1.0, (together - chance) / (most - chance))

    return _scores(labels, target, ignore_index, score)


def rotation_agreement(segment: Callable[[Tensor], Tensor], images: Tensor, angle: float) -> Tensor:
    """Do segments turn with the image? `adjusted_rand` of rotate(segment(x)), segment(rotate(x)).

    Inside the inscribed circle, so that the corners do not count.

    Args:
        segment: images `(N, C, H, W)` → a partition, for example `to_superpixels`.
        angle: in degrees, counter-clockwise; bilinear for images, nearest for segments.
    """
    turned = rotated(images, angle)
    height, width = images.shape[2:]
    y, x = (torch.arange(side, device=images.device) - (side - 1) / 2 for side in (height, width))
    outside = y[:, None] ** 2 + x**2 > (min(height, width) / 2 - 1) ** 2
    first = rotated_labels(segment(images), angle).masked_fill(outside, -1)
    return adjusted_rand(segment(turned), first, ignore_index=-1)


def majority(labels: Tensor, target: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """The best that one class per segment can say: int64 `(N, H, W)`, the segment's most frequent.

    Give it to `confusion_matrix`. Ties go to the lower class; segments without a counted pixel are
    class 0, and stand on ignored pixels only.
    """
    _check_pair(labels, target)
    _check_classes(target, num_classes, ignore_index)
    predictions = []
    for image, truth in zip(_partition(labels), target.long(), strict=True):
        _, index = image.unique(return_inverse=True)
        counted = truth != ignore_index
        pairs = index[counted] * num_classes + truth[counted]
        size = (int(index.max()) + 1) * num_classes
        counts = rearrange(torch.bincount(pairs, minlength=size), "(s k) -> s k", k=num_classes)
        predictions.append(counts.argmax(1)[index])
    return torch.stack(predictions)


def oracle_prediction(
    logits: Tensor,
    target: Tensor,
    num_classes: int,
    kind: str = "soft",
    mode: str = "cell",
    ignore_index: int = 255,
) -> Tensor:
    """Each head's best: superpixels labeled from the truth, and expanded to pixels by Eq. 1.

    "soft": H(p, c) = Σ_i Q(i, p) [y_i = c], ĉ(p) = argmax_c H, and pixel i says
    argmax_c Σ_p Q(i, p) [ĉ(p) = c]. "hard": each pixel belongs to its likeliest superpixel alone,
    in both steps, which is `majority` of `hard_labels`.

    Args:
        logits: slots `(N, heads, Sh, Sw, s², 9)`; resized to the target's size, see
            `upsample_association` for `mode`.
        target: `(N, H, W)` from 0 to num_classes − 1; H and W the same multiple of the logits'.

    Returns:
        int64 `(N, heads, H, W)`.
    """
    require(kind in ("soft", "hard"), "kind", kind, "soft or hard")
    _check_classes(target, num_classes, ignore_index)
    shapes = f"logits {tuple(logits.shape)}, target {tuple(target.shape)}"
    known = logits.ndim == 6 and target.ndim == 3 and len(logits) == len(target)
    scale = target.shape[1] // (logits.shape[2] * cell_side(logits)) if known else 0
    side = scale * cell_side(logits)
    fits = scale and target.shape[1:] == (logits.shape[2] * side, logits.shape[3] * side)
    expected = "(N, M, Sh, Sw, s², 9), (N, H, W), H a multiple of s·Sh and W the same of s·Sw"
    require(fits, "logits, target", shapes, expected)
    logits = upsample_association(logits, scale, mode)
    heads = logits.shape[1]
    if kind == "hard":
        labels = rearrange(hard_labels(logits), "n m h w -> (n m) h w")
        truth = repeat(target, "n h w -> (n m) h w", m=heads)
        best = majority(labels, truth, num_classes, ignore_index)
        return rearrange(best, "(n m) h w -> n m h w", m=heads)
    weights, counted = logits.softmax(-1), target != ignore_index
    truth = F.one_hot(target.long().masked_fill(~counted, 0), num_classes) * counted[..., None]
    cells = to_cells(rearrange(truth, "n h w k -> n 1 k h w").to(weights.dtype), side)
    votes = collect(weights, cells)  # (N, heads, Sh, Sw, K)
    chosen = F.one_hot(votes.argmax(-1), num_classes) * (votes.sum(-1, keepdim=True) > 0)
    return from_cells(spread(weights, chosen.to(weights.dtype))).argmax(2)


def oracle_confusion(
    logits: Tensor,
    target: Tensor,
    num_classes: int,
    kind: str = "soft",
    mode: str = "cell",
    ignore_index: int = 255,
) -> Tensor:
    """Confusion matrices of `oracle_prediction`, `(heads, K, K)` for K classes: add batches."""
    predictions = oracle_prediction(logits, target, num_classes, kind, mode, ignore_index)
    return torch.stack([
        confusion_matrix(head, target, num_classes, ignore_index)
        for head in predictions.unbind(1)
    ])  # fmt: skip


def oracle_miou(confusion: Tensor) -> dict[str, float | list[float]]:
    """Of the whole set's `oracle_confusion`: `heads` (each one's mIoU), their `mean` and `best`."""
    heads = [mean_iou(head) for head in confusion]
    return {"heads": heads, "mean": sum(heads) / len(heads), "best": max(heads)}


def sharpness(logits: Tensor) -> Tensor:
    """Mean over pixels of the likeliest slot's weight, `(N, heads)`: 1 is a hard assignment."""
    return logits.softmax(-1).amax(-1).mean((2, 3, 4))


def association_entropy(logits: Tensor) -> Tensor:
    """Mean entropy of a pixel's weights over log(number of its superpixels), `(N, heads)`.

    1 is uniform, 0 hard. A grid of one cell leaves no choice, and counts as 0.
    """
    weights = logits.softmax(-1)
    entropy = torch.special.entr(weights).sum(-1)
    most = valid9(*logits.shape[2:4], device=logits.device).sum(-1).log()[..., None]
    return torch.where(most > 0, entropy / most.clamp_min(1e-9), 0.0).mean((2, 3, 4))


def occlusion_leak(logits: Tensor, occluder: Tensor) -> Tensor:
    """Share of an occluder's superpixels' mass that lies off it, `(N, heads)`: lower is better.

    Its superpixels are those that have more than half of their mass Σ_i Q(i, p) on it; 0 where it
    has none.

    Args:
        logits: slots `(N, heads, Sh, Sw, s², 9)`.
        occluder: bool `(N, h, w)`, at the resolution of the pixels of `logits`.
    """
    weights, side = logits.softmax(-1), cell_side(logits)
    size = (len(logits), logits.shape[2] * side, logits.shape[3] * side)
    fits = occluder.dtype == torch.bool and tuple(occluder.shape) == size
    require(fits, "occluder", (occluder.dtype, tuple(occluder.shape)), f"bool {size}")
    on_it = to_cells(rearrange(occluder, "n h w -> n 1 1 h w").to(weights.dtype), side)
    mass, on = collect(weights, torch.ones_like(on_it)), collect(weights, on_it)
    its = on > mass / 2
    total = (mass * its).sum((2, 3, 4))
    off = ((mass - on) * its).sum((2, 3, 4))
    return torch.where(total > 0, off / total.clamp_min(1e-9), 0.0)


def patch_association(
    n: int, grid: tuple[int, int], side: int, device: torch.device | str | None = None
) -> Tensor:
    """Square patches as an association, of each pixel to its own cell: `(n, 1, Sh, Sw, s², 9)`.

    Its `hard_labels` are the patches; its oracle is the best that a label per patch can do.
    """
    whole(1, n=n, side=side)
    own = torch.zeros(n, 1, *grid, side**2, 9, device=device)
    own[..., [0, 1, 2, 3, 5, 6, 7, 8]] = -math.inf
    return mask_absent(own)


def slic(
    images: Tensor, n_segments: int, compactness: float = 10.0, sigma: float = 1.0, **options
) -> Tensor:
    """SLIC of scikit-image (Achanta et al. 2012): `(N, 3, H, W)` from 0 to 1 → int64 `(N, H, W)`.

    Args:
        n_segments: wanted; what comes out differs (see `segments`), since small ones are merged.
        compactness: nearness against color.
        sigma: of a blur first. Without it, noise leaves few segments.
        options: of `skimage.segmentation.slic`.
    """
    from skimage.segmentation import slic as skimage_slic

    require(
        images.ndim == 4 and images.shape[1] == 3, "images", tuple(images.shape), "(N, 3, H, W)"
    )
    whole(1, n_segments=n_segments)
    inside("(0, inf)", compactness=compactness)
    how = {"n_segments": n_segments, "compactness": compactness, "sigma": sigma} | options
    pictures = rearrange(images.detach().cpu().double(), "n c h w -> n h w c").numpy()
    labels = [torch.from_numpy(skimage_slic(picture, **how)) for picture in pictures]
    return torch.stack(labels).long().to(images.device)


def _scores(
    labels: Tensor, target: Tensor, ignore_index: int, score: Callable[[Tensor], Tensor]
) -> Tensor:
    """`score` of each image's table of common pixels, float64 `(segments, truths)`."""
    _check_pair(labels, target)
    scores = []
    for image, truth in zip(_partition(labels), _partition(target), strict=True):
        counted = truth != ignore_index
        require(bool(counted.any()), "target", "all ignored", "a counted pixel in every image")
        _, rows = image[counted].unique(return_inverse=True)
        _, columns = truth[counted].unique(return_inverse=True)
        shape = int(rows.max()) + 1, int(columns.max()) + 1
        table = torch.bincount(rows * shape[1] + columns, minlength=math.prod(shape))
        scores.append(score(rearrange(table.double(), "(s t) -> s t", s=shape[0])))
    return torch.stack(scores)


def _check_pair(labels: Tensor, target: Tensor) -> None:
    same = labels.shape == target.shape
    require(same, "labels", tuple(labels.shape), f"target's shape {tuple(target.shape)}")


def _check_classes(target: Tensor, num_classes: int, ignore_index: int) -> None:
    whole(1, num_classes=num_classes)
    wrong = target[((target < 0) | (target >= num_classes)) & (target != ignore_index)]
    value = None if wrong.numel() == 0 else int(wrong[0])
    require(value is None, "target", value, f"values from 0 to {num_classes - 1}")


def _partition(labels: Tensor) -> Tensor:
    whole_numbers = not (labels.is_floating_point() or labels.is_complex())
    fits = labels.ndim == 3 and labels.numel() > 0 and whole_numbers
    require(fits, "labels", (labels.dtype, tuple(labels.shape)), "integers (N, H, W), not empty")
    return labels.long()
