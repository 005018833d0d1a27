"""Does a map point at the object? Scores against ground-truth masks, and maps to beat.

Maps are non-negative `(N, h, w)`, masks `(N, H, W)`: bool, or numbers from 0 to 1, with H ≥ h and
W ≥ w. A smaller map is scored on the mask's grid after nearest upsampling, so every pixel of a
cell carries the cell's value. A score without its baselines says little: with large, centered
objects a fixed blob already points well. Print `uniform` and `center_prior` beside a method, and
`color_contrast` and `gaussian_locality` where color or nearness could explain the result.
"""

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from attnlab.lab.arguments import inside, require, whole


def pointing(maps: Tensor, masks: Tensor) -> Tensor:
    """Pointing game: is the map's highest pixel inside the mask? `(N,)` from 0 to 1.

    Where several pixels share the maximum, the score is the mean of the mask over them: what a
    random choice among them would hit. So a constant map scores the mask's share of the area, which
    is the chance level, and not whatever lies in the first pixel. Zhang et al. 2016 (Excitation
    Backprop), without their tolerance around the object.
    """
    maps, masks = _on_one_grid(maps, masks)
    highest = (maps == maps.amax((1, 2), keepdim=True)).to(maps.dtype)
    return (highest * masks).sum((1, 2)) / highest.sum((1, 2))


def energy_inside(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of the map's sum that lies inside the mask, `(N,)` from 0 to 1.

    Chance is the mask's share of the area, and a map of zeros scores that. The map is used as it
    is: subtracting its minimum would raise the score. Wang et al. 2020 (Score-CAM).
    """
    maps, masks = _on_one_grid(maps, masks)
    total = maps.sum((1, 2))
    share = (maps * masks).sum((1, 2)) / total
    return torch.where(total > 0, share, masks.mean((1, 2)))


def iou_at(maps: Tensor, masks: Tensor, threshold: float | str) -> Tensor:
    """Intersection over union of the thresholded map and the mask (≥ 0.5), `(N,)`.

    Args:
        threshold: the foreground is where the map, stretched to [0, 1], is ≥ this number; or
            `"mean+std"`, each map's own mean plus its standard deviation over the mask's grid.
            A constant map is all foreground at every threshold.
    """
    foreground, masks = _thresholded(maps, masks, threshold)
    return (foreground & masks).sum((1, 2)) / (foreground | masks).sum((1, 2))


def accuracy_at(maps: Tensor, masks: Tensor, threshold: float | str) -> Tensor:
    """Share of the pixels that the thresholded map puts on the right side, `(N,)`.

    `threshold` as in `iou_at`. Calling every pixel background scores 1 − the mask's share.
    """
    foreground, masks = _thresholded(maps, masks, threshold)
    return (foreground == masks).float().mean((1, 2))


def max_fbeta(maps: Tensor, masks: Tensor, beta2: float = 0.3, thresholds: int = 255) -> float:
    """Highest F-measure of salient object detection, (1 + β²) P R / (β² P + R), over thresholds.

    Each map is stretched to [0, 1]. For t = 1/T, 2/T, …, 1 the precision P and the recall R of
    `map ≥ t` are averaged over the images; F is taken of these averages, and the highest F is
    returned. The threshold is one for all images but is chosen on the images that are scored, so
    this is an upper bound. A constant map is all foreground. Achanta et al. 2009.

    Args:
        beta2: β²; 0.3 weighs precision more than recall.
        thresholds: T.

    Raises:
        ValueError: also when a mask has no pixel ≥ 0.5, since recall is then not defined.
    """
    inside("(0, inf)", beta2=beta2)
    whole(1, thresholds=thresholds)
    maps, masks = _on_one_grid(maps, masks)
    maps, masks = _stretched(maps), masks >= 0.5
    size = masks.sum((1, 2))
    require(bool((size > 0).all()), "masks", "an empty mask", "a pixel ≥ 0.5 in every mask")
    best = 0.0
    for step in range(1, thresholds + 1):
        foreground = maps >= step / thresholds
        hits = (foreground & masks).sum((1, 2))
        precision = (hits / foreground.sum((1, 2))).mean()
        recall = (hits / size).mean()
        score = (1 + beta2) * precision * recall / (beta2 * precision + recall)
        best = max(best, float(score.nan_to_num()))
    return best


def confusion_matrix(
    prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int = 255
) -> Tensor:
    """Pixels counted by class: int64 `(num_classes, num_classes)`, rows target, columns prediction.

    Add up the matrices of all batches and take `mean_iou` once, at the end.

    Args:
        prediction, target: integer tensors of one shape, values from 0 to num_classes − 1.
        ignore_index: this value in `target` is not counted.
    """
    whole(1, num_classes=num_classes)
    same = prediction.shape == target.shape
    require(same, "prediction", tuple(prediction.shape), f"target's shape {tuple(target.shape)}")
    prediction, target = (_integers(prediction, "prediction"), _integers(target, "target"))
    counted = target != ignore_index
    prediction, target = prediction[counted], target[counted]
    for name, values in (("prediction", prediction), ("target", target)):
        wrong = values[(values < 0) | (values >= num_classes)]
        require(wrong.numel() == 0, name, wrong[:1].tolist(), f"values from 0 to {num_classes - 1}")
    pairs = torch.bincount(target * num_classes + prediction, minlength=num_classes**2)
    return rearrange(pairs, "(t p) -> t p", t=num_classes)


def mean_iou(confusion: Tensor) -> float:
    """Mean over classes of intersection over union, from a `confusion_matrix` of the whole set.

    A class that is in neither the prediction nor the target is left out of the mean.
    """
    square = confusion.ndim == 2 and confusion.shape[0] == confusion.shape[1]
    require(square, "confusion", tuple(confusion.shape), "a square matrix")
    confusion = confusion.double()
    intersection = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - intersection
    require(bool((union > 0).any()), "confusion", "all zero", "at least one counted pixel")
    return float((intersection / union)[union > 0].mean())


def auroc(scores: Tensor, positives: Tensor) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, a tie half.

    Args:
        scores: numbers of any shape.
        positives: bool, the same shape; both values must occur.
    """
    same = scores.shape == positives.shape
    require(same, "scores", tuple(scores.shape), f"positives' shape {tuple(positives.shape)}")
    require(positives.dtype == torch.bool, "positives", positives.dtype, "torch.bool")
    require(not scores.isnan().any(), "scores", "NaN", "numbers")
    high, low = scores[positives], scores[~positives].sort().values
    both = high.numel() > 0 and low.numel() > 0
    require(both, "positives", f"{high.numel()} of {scores.numel()}", "positives and negatives")
    below = torch.searchsorted(low, high) + torch.searchsorted(low, high, right=True)
    return float(below.double().mean()) / (2 * low.numel())


def bootstrap_interval(
    values: Tensor | Sequence[float], seed: int = 0, level: float = 0.95, resamples: int = 1000
) -> tuple[float, float]:
    """Interval of the mean of `values` (one number an image) by resampling the images.

    The percentile bootstrap of Efron 1979: it says how far the mean depends on *these* images, not
    how far it depends on the training seed.

    Args:
        values: `(N,)`.
        level: the share of resampled means that lie inside.

    Returns:
        The interval's two ends, the same for the same seed.
    """
    whole(0, seed=seed)
    whole(1, resamples=resamples)
    inside("(0, 1)", level=level)
    values = torch.as_tensor(values, dtype=torch.float64).cpu()
    filled = values.ndim == 1 and values.numel() > 0
    require(filled, "values", tuple(values.shape), "(N,) with N ≥ 1")
    require(bool(values.isfinite().all()), "values", "NaN or infinite", "finite numbers")
    generator, size = torch.Generator().manual_seed(seed), len(values)
    draws = (torch.randint(size, (size,), generator=generator) for _ in range(resamples))
    means = torch.stack([values[draw].mean() for draw in draws])
    low, high = means.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2]).double())
    return float(low), float(high)


def uniform(shape: tuple[int, ...], device: torch.device | str | None = None) -> Tensor:
    """Maps `shape` = (…, h, w) that know nothing: every pixel 1 / (h w)."""
    height, width = _map_side(shape)
    return torch.full(tuple(shape), 1 / (height * width), device=device)


def center_prior(
    shape: tuple[int, ...], sigma: float = 0.25, device: torch.device | str | None = None
) -> Tensor:
    """Maps `shape` = (…, h, w) that always look at the center: a Gaussian blob that sums to 1.

    Args:
        sigma: the blob's standard deviation as a share of each side: 0.25 is 16 px of 64 px.
    """
    height, width = _map_side(shape)
    inside("(0, inf)", sigma=sigma)
    y, x = ((torch.arange(side, device=device) + 0.5) / side - 0.5 for side in (height, width))
    blob = torch.exp(-(y[:, None] ** 2 + x**2) / (2 * sigma**2))
    return (blob / blob.sum()).expand(shape).clone()


def color_contrast(images: Tensor) -> Tensor:
    """How far each pixel's color is from its image's mean color: `(N, C, H, W)` to `(N, H, W)`.

    Global contrast as in Achanta et al. 2009, but in RGB and without their blur.
    """
    shape = tuple(images.shape)
    require(images.ndim == 4, "images", shape, "(N, C, H, W)")
    return (images - images.mean((2, 3), keepdim=True)).norm(dim=1)


def gaussian_locality(
    grid: tuple[int, int], sigma: float, device: torch.device | str | None = None
) -> Tensor:
    """Token-pair scores that only know how far apart two tokens lie: `(N, N)`, rows sum to 1.

    Args:
        grid: rows and columns of tokens; N = rows · columns, row by row.
        sigma: standard deviation in tokens. A token's score with itself is the highest.
    """
    height, width = _map_side(grid)
    require(len(grid) == 2, "grid", grid, "(rows, columns)")
    inside("(0, inf)", sigma=sigma)
    index = torch.arange(height * width, device=device)
    y, x = index // width, index % width
    squared = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2
    return (-squared / (2 * sigma**2)).softmax(-1)


def _on_one_grid(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Check both, and bring them to `(N, H, W)` of one floating type."""
    shapes = f"maps {tuple(maps.shape)}, masks {tuple(masks.shape)}"
    fits = maps.ndim == masks.ndim == 3 and len(maps) == len(masks) > 0
    fits = fits and all(1 <= a <= b for a, b in zip(maps.shape[1:], masks.shape[1:], strict=True))
    require(fits, "maps, masks", shapes, "(N, h, w) and (N, H, W), N ≥ 1, h ≤ H, w ≤ W")
    maps = maps.detach().to(torch.promote_types(maps.dtype, torch.float32))
    masks = masks.to(maps.dtype)
    in_range = bool(((masks >= 0) & (masks <= 1)).all())
    require(in_range, "masks", "a value outside [0, 1]", "bool, or numbers from 0 to 1")
    positive = bool(((maps >= 0) & maps.isfinite()).all())
    require(positive, "maps", "a negative or non-finite value", "finite numbers ≥ 0")
    upsampled = F.interpolate(maps[:, None], size=masks.shape[1:], mode="nearest-exact")
    return rearrange(upsampled, "n 1 h w -> n h w"), masks


def _thresholded(maps: Tensor, masks: Tensor, threshold: float | str) -> tuple[Tensor, Tensor]:
    """Where the map, stretched to [0, 1], is high, and where the mask is: bool `(N, H, W)` both."""
    adaptive = threshold == "mean+std"
    if not adaptive:
        require(not isinstance(threshold, str), "threshold", threshold, 'a number or "mean+std"')
        inside("[0, 1]", threshold=threshold)
    maps, masks = _on_one_grid(maps, masks)
    maps, masks = _stretched(maps), masks >= 0.5
    if adaptive:
        deviation, mean = torch.std_mean(maps, (1, 2), correction=0, keepdim=True)
        threshold = mean + deviation
    return maps >= threshold, masks


def _stretched(maps: Tensor) -> Tensor:
    """Each map's minimum at 0 and its maximum at 1; a constant map is 1 everywhere."""
    low, high = torch.aminmax(rearrange(maps, "n h w -> n (h w)"), dim=1, keepdim=True)
    low, high = low[..., None], high[..., None]
    return torch.where(high > low, (maps - low) / (high - low), 1.0)


def _integers(values: Tensor, name: str) -> Tensor:
    whole_numbers = not (values.is_floating_point() or values.is_complex())
    require(whole_numbers, name, values.dtype, "an integer type")
    return values.long()


def _map_side(shape: tuple[int, ...]) -> tuple[int, int]:
    positive = len(shape) >= 2 and math.prod(shape) > 0 and min(shape) > 0
    require(positive, "shape", tuple(shape), "(…, h, w), all positive")
    return shape[-2], shape[-1]
