"""Does a map give the object's box? MaxBoxAcc of Choe et al. 2020, with an honest threshold.

A map is brought to the mask's size bilinearly and stretched to [0, 1]; the box around the largest
connected piece of what is ≥ t is compared with the box of the mask. One threshold t holds for all
images. It is chosen on other images than those that are scored: chosen on the same, the score
would be an upper bound. Maps are non-negative `(N, h, w)`, masks `(N, H, W)` from 0 to 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from attnlab.lab.arguments import inside, require
from attnlab.lab.data.draws import tight_boxes

THRESHOLDS = tuple(step / 20 for step in range(20))


def box_accuracy(
    maps: Tensor,
    masks: Tensor,
    tune_maps: Tensor,
    tune_masks: Tensor,
    overlap: float = 0.5,
    thresholds: Sequence[float] = THRESHOLDS,
) -> float:
    """Share of the images whose box is right, at the threshold that is best on `tune_*`.

    Args:
        maps, masks: what is scored. tune_maps, tune_masks: what the threshold is chosen on.
        overlap: a box is right when its intersection over union with the mask's is at least this.
        thresholds: to choose from, in [0, 1).

    Raises:
        ValueError: shapes that do not fit, or a number out of range.
    """
    inside("(0, 1]", overlap=overlap)
    tuned = (box_ious(tune_maps, tune_masks, thresholds) >= overlap).float().mean(1)
    best = thresholds[int(tuned.argmax())]
    return (box_ious(maps, masks, [best]) >= overlap).float().mean().item()


def box_ious(maps: Tensor, masks: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Intersection over union of each map's box with its mask's, `(thresholds, N)`.

    The mask's box is around its pixels ≥ 0.5. Raises ValueError for shapes that do not fit.
    """
    for threshold in thresholds:
        inside("[0, 1]", threshold=threshold)
    fits = maps.ndim == masks.ndim == 3 and len(maps) == len(masks)
    shapes = f"{tuple(maps.shape)}, {tuple(masks.shape)}"
    require(fits, "maps, masks", shapes, "(N, h, w) and (N, H, W)")
    maps, masks = maps.detach().float().cpu(), masks.detach().cpu()
    maps = F.interpolate(maps[:, None], masks.shape[1:], mode="bilinear")[:, 0]
    low, high = (extreme((1, 2), keepdim=True) for extreme in (maps.amin, maps.amax))
    stretched = torch.where(high > low, (maps - low) / (high - low), 1.0)
    truth = tight_boxes(masks >= 0.5)
    found = [tight_boxes(largest_piece(stretched >= t)) for t in thresholds]
    return torch.stack([_iou(boxes, truth) for boxes in found])


def largest_piece(masks: Tensor) -> Tensor:
    """Keep each mask's largest piece, neighbors at corners included: bool `(N, H, W)`, both."""
    from skimage.measure import label

    kept = []
    for mask in masks:
        pieces = torch.from_numpy(label(mask.numpy(), connectivity=2))
        sizes = torch.bincount(pieces.flatten())
        sizes[0] = 0  # the background
        kept.append(mask & (pieces == sizes.argmax()))
    return torch.stack(kept)


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """Of boxes `(N, 4)`: x1, y1, x2, y2, the latter exclusive."""
    corners = torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])
    shared = corners.clamp(min=0).prod(1)
    areas = [(box[:, 2:] - box[:, :2]).prod(1) for box in (a, b)]
    return shared / (areas[0] + areas[1] - shared).clamp(min=1)
