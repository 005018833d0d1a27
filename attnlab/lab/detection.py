"""How good are detections? Mean average precision, for all objects and for slow and fast ones.

Boxes are (x1, y1, x2, y2) in px, x2 and y2 exclusive. One dict an image: predictions have `boxes
(N, 4)`, `scores (N,)`, `labels (N,)`, targets `boxes (M, 4)`, `labels (M,)`; with `kind="segm"`,
`masks` (N or M, H, W) bool in place of boxes. The scores are computed by torchmetrics with
faster-coco-eval, so they are COCO's: precision is read off at 101 levels of recall.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_iou

from attnlab.lab.arguments import inside, require, whole

COCO_THRESHOLDS = tuple(step / 20 for step in range(10, 20))  # of the overlap: .5, .55, … .95
RECALLS = [step / 100 for step in range(101)]  # torchmetrics' default is rounded to float32


def mean_average_precision(
    predictions: Sequence[Mapping[str, Tensor]],
    targets: Sequence[Mapping[str, Tensor]],
    iou: float | Sequence[float] = 0.5,
    kind: str = "bbox",
) -> float:
    """Mean over classes of the average precision of detections, from 0 to 1.

    From the highest score down, a prediction is right when it overlaps an object of its class that
    is not yet found with an IoU of at least `iou`. At most 100 predictions an image count. A class
    that no target has is left out of the mean.

    Args:
        predictions, targets: one dict an image, see the module. `iscrowd (M,)` in a target is 1 for
            an object to ignore: what lies on it by half is neither right nor wrong.
        iou: one threshold, or several, over which the score is averaged (`COCO_THRESHOLDS`).
        kind: "bbox" | "segm": overlap of boxes or of masks.

    Raises:
        ValueError: a malformed dict, a threshold outside (0, 1], or no object to find.
        ModuleNotFoundError: the extra `attnlab[video]` is not installed.
    """
    thresholds = [iou] if isinstance(iou, int | float) else list(iou)
    require(len(thresholds) > 0, "iou", iou, "a threshold in (0, 1], or several of them")
    for threshold in thresholds:
        inside("(0, 1]", iou=threshold)
    _check(predictions, targets, kind)
    score = _score(predictions, targets, thresholds, kind)
    require(not math.isnan(score), "targets", "no object", "an object of which iscrowd is not 1")
    return score


def average_precision_by(
    groups: Mapping[str, tuple[float, float]],
    key: str,
    predictions: Sequence[Mapping[str, Tensor]],
    targets: Sequence[Mapping[str, Tensor]],
    iou: float = 0.5,
) -> dict[str, float]:
    """Mean average precision of each group of objects, such as slow and fast ones.

    Objects of the other groups are ignored, so that finding them is neither right nor wrong; a
    prediction that lies on no object is wrong in every group. FGFA reports its scores by speed too,
    but by a rule of its own; here it is COCO's, for crowds.

    Args:
        groups: name → (low, high); an object belongs to it when low ≤ its value < high.
        key: where a target has the objects' values: `(M,)`, like `speed` in px a frame.
        iou: the threshold.

    Returns:
        name → score, NaN for a group without objects.
    """
    inside("(0, 1]", iou=iou)
    _check(predictions, targets, "bbox")
    for name, (low, high) in groups.items():
        require(low < high, f"groups[{name!r}]", (low, high), "(low, high), low < high")
    for target in targets:
        require(key in target, "targets", sorted(target), f"dicts with {key!r}")
    scores = {}
    for name, (low, high) in groups.items():
        others = [(target[key] < low) | (target[key] >= high) for target in targets]
        marked = [
            {**target, "iscrowd": other.long() | target.get("iscrowd", torch.zeros_like(other))}
            for target, other in zip(targets, others, strict=True)
        ]
        scores[name] = _score(predictions, marked, [iou], "bbox")
    return scores


def motion_iou(boxes: Tensor, frame: int, reach: int = 3) -> Tensor:
    """How slowly objects move: mean IoU of each one's box with its boxes in nearby frames.

    FGFA takes ±10 frames and calls objects above 0.9 slow, below 0.7 fast. Small objects in short
    clips need a shorter reach.

    Args:
        boxes: `(K, T, 4)`, zero in a frame that does not show the object.
        frame: the number of a frame.
        reach: how many frames before it and after it count.

    Returns:
        `(K,)`, 1 for what never moves, and for what is seen in this frame only.

    Raises:
        ValueError: `boxes` of another shape, or no such frame.
    """
    shape = tuple(boxes.shape)
    require(boxes.ndim == 3 and shape[2] == 4, "boxes", shape, "(K, T, 4)")
    require(0 <= frame < shape[1], "frame", frame, f"0 to {shape[1] - 1}")
    whole(1, reach=reach)
    times = [t for t in range(frame - reach, frame + reach + 1) if 0 <= t < shape[1] and t != frame]
    scores = []
    for track in boxes.float():
        nearby = track[times]
        seen = nearby[(nearby[:, 2:] > nearby[:, :2]).all(1)]
        scores.append(box_iou(track[None, frame], seen).mean() if len(seen) else track.new_ones(()))
    return torch.stack(scores) if scores else boxes.new_zeros(0).float()


def _score(predictions: Any, targets: Any, thresholds: list[float], kind: str) -> float:
    try:
        import faster_coco_eval  # noqa: F401 - torchmetrics' own message names another package
        from torchmetrics.detection import MeanAveragePrecision
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'mean average precision needs {error.name}: pip install "attnlab[video]"'
        ) from error
    metric = MeanAveragePrecision(
        iou_type=kind,
        iou_thresholds=thresholds,
        rec_thresholds=RECALLS,
        backend="faster_coco_eval",
    )
    metric.warn_on_many_detections = False
    metric.update(_on_cpu(predictions), _on_cpu(targets))
    score = float(metric.compute()["map"])
    return score if score >= 0 else math.nan  # −1: no object to find


def _on_cpu(images: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{key: value.detach().cpu() for key, value in image.items()} for image in images]


def _check(predictions: Any, targets: Any, kind: str) -> None:
    require(kind in ("bbox", "segm"), "kind", kind, '"bbox" or "segm"')
    same = len(predictions) == len(targets) > 0
    require(
        same, "predictions", f"{len(predictions)} images", f"as many as targets, {len(targets)}"
    )
    where = {"bbox": "boxes", "segm": "masks"}[kind]
    for name, images, needed in (
        ("predictions", predictions, (where, "scores", "labels")),
        ("targets", targets, (where, "labels")),
    ):
        for number, image in enumerate(images):
            there = set(needed) <= set(image)
            require(there, f"{name}[{number}]", sorted(image), f"a dict with {sorted(needed)}")
            lengths = {key: len(image[key]) for key in needed}
            one = len(set(lengths.values())) == 1
            require(one, f"{name}[{number}]", lengths, "the same number of each")
            shape, axes = tuple(image[where].shape), {"bbox": 2, "segm": 3}[kind]
            fits = len(shape) == axes and (kind == "segm" or shape[1] == 4)
            expected = {"bbox": "(N, 4)", "segm": "(N, H, W)"}[kind]
            require(fits, f"{name}[{number}][{where!r}]", shape, expected)
