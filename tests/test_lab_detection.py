"""`attnlab.lab.detection` against COCO's definition, written out detection by detection."""

import builtins
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.lab.detection import (
    COCO_THRESHOLDS,
    average_precision_by,
    mean_average_precision,
    motion_iou,
)

pytest.importorskip("torchmetrics")
pytest.importorskip("faster_coco_eval")

quick = settings(max_examples=25, deadline=None, derandomize=True)


def random_images(seed: int, images: int = 4, classes: int = 2):
    """Objects, each found roughly or not at all, and some detections of nothing."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    predictions, targets = [], []
    for _ in range(images):
        objects, false = torch.randint(4, (2,), generator=generator).tolist()
        corner = 40 * uniform(objects + false, 2)
        boxes = torch.cat([corner, corner + 5 + 20 * uniform(objects + false, 2)], dim=1)
        labels = torch.randint(classes, (objects + false,), generator=generator)
        targets.append(
            {"boxes": boxes[:objects], "labels": labels[:objects], "speed": 4 * uniform(objects)}
        )
        shaken = boxes + 2 * torch.randn(boxes.shape, generator=generator)
        shaken[:, 2:] = shaken[:, 2:].maximum(shaken[:, :2] + 1)
        scores = uniform(objects + false)
        predictions.append({"boxes": shaken, "scores": scores, "labels": labels})
    return predictions, targets


def overlap(box, other, crowd=False):
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    common = max(width, 0) * max(height, 0)
    area, other_area = ((b[2] - b[0]) * (b[3] - b[1]) for b in (box, other))
    return common / (area if crowd else area + other_area - common)


def brute_force(predictions, targets, iou, ignored=lambda target, k: False):
    """Mean over classes and 101 levels of recall of the best precision from that recall on."""
    scores = []
    for label in range(10):
        found, objects = [], 0  # (score, right) of what counts
        for prediction, target in zip(predictions, targets, strict=True):
            mine = [k for k, other in enumerate(target["labels"].tolist()) if other == label]
            objects += sum(not ignored(target, k) for k in mine)
            free = set(mine)
            for n in prediction["scores"].argsort(descending=True).tolist():
                if prediction["labels"][n] != label:
                    continue
                box = prediction["boxes"][n].tolist()
                share = {
                    k: overlap(box, target["boxes"][k].tolist(), ignored(target, k)) for k in mine
                }
                hits = [k for k in free if share[k] >= iou and not ignored(target, k)]
                if hits:
                    free.remove(max(hits, key=share.get))
                elif any(share[k] >= iou for k in mine if ignored(target, k)):
                    continue
                found.append((float(prediction["scores"][n]), bool(hits)))
        if objects == 0:
            continue
        found.sort(reverse=True)
        right, curve = 0, []
        for rank, (_, hit) in enumerate(found, start=1):
            right += hit
            curve.append((right / objects, right / rank))
        levels = [step / 100 for step in range(101)]
        best = [max([p for r, p in curve if r >= level], default=0) for level in levels]
        scores.append(sum(best) / len(best))
    return sum(scores) / len(scores) if scores else math.nan


@quick
@given(st.integers(0, 10**6), st.sampled_from([0.3, 0.5, 0.75]))
def test_mean_average_precision_is_the_definition(seed, iou):
    predictions, targets = random_images(seed)
    if sum(len(target["labels"]) for target in targets):
        score = mean_average_precision(predictions, targets, iou)
        assert score == pytest.approx(brute_force(predictions, targets, iou), abs=1e-5)


def test_several_thresholds_are_averaged():
    predictions, targets = random_images(3)
    each = [brute_force(predictions, targets, iou) for iou in COCO_THRESHOLDS]
    score = mean_average_precision(predictions, targets, COCO_THRESHOLDS)
    assert len(each) == 10
    assert score == pytest.approx(sum(each) / 10, abs=1e-5)


@quick
@given(st.integers(0, 10**6))
def test_objects_of_other_speeds_are_ignored(seed):
    predictions, targets = random_images(seed)
    bins = {"slow": (0.0, 2.0), "fast": (2.0, math.inf), "none": (9.0, 10.0)}
    scores = average_precision_by(bins, "speed", predictions, targets)
    for name, (low, high) in bins.items():

        def ignored(target, k, low=low, high=high):
            return not low <= float(target["speed"][k]) < high

        expected = brute_force(predictions, targets, 0.5, ignored)
        assert scores[name] == pytest.approx(expected, abs=1e-5, nan_ok=True)
    assert math.isnan(scores["none"])


def test_perfect_detections_score_one_and_none_scores_zero(device):
    _, targets = random_images(1)
    targets = [{key: value.to(device) for key, value in target.items()} for target in targets]
    perfect = [{**target, "scores": torch.ones(len(target["labels"]))} for target in targets]
    assert mean_average_precision(perfect, targets, 1.0) == 1
    nothing = {key: value[:0] for key, value in perfect[0].items()}
    assert mean_average_precision([nothing] * len(targets), targets) == 0


def test_masks_are_compared_as_masks():
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, :, :4], masks[1, :, 4:] = True, True
    labels = torch.tensor([0, 1])
    half = masks.clone()
    half[1, 3:] = False  # IoU 3/8
    prediction = {"masks": half, "scores": torch.tensor([0.9, 0.8]), "labels": labels}
    assert (
        mean_average_precision([prediction], [{"masks": masks, "labels": labels}], kind="segm")
        == 0.5
    )


def test_motion_iou_of_a_box_that_slides(device):
    slide = torch.tensor([[2.0 * t, 0, 2.0 * t + 20, 20] for t in range(5)], device=device)
    rest = slide[:1].expand(5, -1)
    gone = torch.zeros_like(slide)
    gone[2] = rest[0]
    near, far = 18 / 22, 16 / 24
    expected = torch.tensor([(2 * near + 2 * far) / 4, 1, 1], device=device)
    torch.testing.assert_close(motion_iou(torch.stack([slide, rest, gone]), frame=2), expected)
    torch.testing.assert_close(motion_iou(slide[None], 0, reach=1), expected.new_tensor([near]))
    assert motion_iou(torch.zeros(0, 5, 4), 0).shape == (0,)


@pytest.mark.parametrize("missing", ["torchmetrics", "faster_coco_eval"])
def test_a_missing_extra_is_named(monkeypatch, missing):
    actual = builtins.__import__

    def without(name, *arguments, **options):
        if name.split(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return actual(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    predictions, targets = random_images(0)
    expected = f'mean average precision needs {missing}: pip install "attnlab[video]"'
    with pytest.raises(ModuleNotFoundError, match=re.escape(expected)):
        mean_average_precision(predictions, targets)


def test_what_is_wrong_is_said():
    predictions, targets = random_images(0)
    score = mean_average_precision

    def fails(message, function, *arguments, **options):
        with pytest.raises(ValueError, match=re.escape(message)):
            function(*arguments, **options)

    fails("iou=0: expected a number in (0, 1]", score, predictions, targets, 0)
    fails("iou=[]: expected a threshold in (0, 1]", score, predictions, targets, [])
    fails('kind=\'box\': expected "bbox" or "segm"', score, predictions, targets, kind="box")
    fails("predictions='1 images': expected as many as targets, 4", score, predictions[:1], targets)
    fails("targets[0]=['boxes', 'labels', 'speed']: expected a dict with ['labels', 'masks']",
          score, [{**p, "masks": torch.zeros(len(p["scores"]), 8, 8)} for p in predictions],
          targets, kind="segm")  # fmt: skip
    flat = [{**target, "boxes": target["boxes"].flatten()[: len(target["labels"])]}
            for target in targets]  # fmt: skip
    fails("targets[0]['boxes']=", score, predictions, flat)
    short = [{**p, "scores": p["scores"].new_zeros(9)} for p in predictions]
    fails("'scores': 9", score, short, targets)
    nothing = [{key: value[:0] for key, value in target.items()} for target in targets]
    fails("targets='no object'", score, predictions, nothing)
    fails("groups['slow']=(2, 1): expected (low, high), low < high",
          average_precision_by, {"slow": (2, 1)}, "speed", predictions, targets)  # fmt: skip
    fails("expected dicts with 'size'", average_precision_by, {}, "size", predictions, targets)
    fails("boxes=(5, 4): expected (K, T, 4)", motion_iou, torch.zeros(5, 4), 0)
    fails("frame=5: expected 0 to 4", motion_iou, torch.zeros(1, 5, 4), 5)
    fails("reach=0: expected an integer ≥ 1", motion_iou, torch.zeros(1, 5, 4), 0, 0)
