"""`attnlab.lab.metrics` against the definitions, written out pixel by pixel."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.lab import metrics

# Small integers as values: ties are then common.
quick = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def scored(draw):
    """Maps `(N, h, w)` of small integers and bool masks `(N, h a, w b)`, none of them empty."""
    n, h, w, a, b = (draw(st.integers(1, top)) for top in (3, 3, 4, 3, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    maps = torch.randint(draw(st.integers(1, 5)), (n, h, w), generator=generator).float()
    masks = torch.rand(n, h * a, w * b, generator=generator) < draw(st.floats(0.1, 0.9))
    masks[:, 0, 0] |= ~masks.any(2).any(1)
    return maps, masks


def pixels(one_map, mask):
    """`(value, inside)` of every pixel of the mask's grid, by the definition of nearest."""
    (h, w), (height, width) = one_map.shape, mask.shape
    return [
        (float(one_map[y * h // height, x * w // width]), bool(mask[y, x]))
        for y, x in product(range(height), range(width))
    ]


def stretched(cells):
    values = [value for value, _ in cells]
    low, high = min(values), max(values)
    span = high - low
    return [((value - low) / span if span else 1.0, inside) for value, inside in cells]


def overlap(cells, threshold):
    """Intersection, predicted pixels, true pixels."""
    chosen = [(value >= threshold, inside) for value, inside in cells]
    return (
        sum(predicted and inside for predicted, inside in chosen),
        sum(predicted for predicted, _ in chosen),
        sum(inside for _, inside in chosen),
    )


@quick
@given(scored())
def test_pointing_is_the_expected_hit_among_the_highest_pixels(sample):
    maps, masks = sample
    for score, one_map, mask in zip(metrics.pointing(maps, masks), maps, masks, strict=True):
        cells = pixels(one_map, mask)
        best = max(value for value, _ in cells)
        hits = [inside for value, inside in cells if value == best]
        assert float(score) == pytest.approx(sum(hits) / len(hits), abs=1e-6)


@quick
@given(scored())
def test_energy_inside_is_the_share_of_the_sum(sample):
    maps, masks = sample
    for score, one_map, mask in zip(metrics.energy_inside(maps, masks), maps, masks, strict=True):
        cells = pixels(one_map, mask)
        total = sum(value for value, _ in cells)
        share = sum(value for value, inside in cells if inside) / (total or 1)
        expected = share if total else sum(inside for _, inside in cells) / len(cells)
        assert float(score) == pytest.approx(expected, abs=1e-6)


@quick
@given(scored(), st.sampled_from([0, 0.3, 0.6, 1, "mean+std"]))
def test_iou_at(sample, threshold):
    maps, masks = sample
    for score, one_map, mask in zip(
        metrics.iou_at(maps.double(), masks, threshold), maps, masks, strict=True
    ):
        cells = stretched(pixels(one_map, mask))
        values = torch.tensor([value for value, _ in cells]).double()
        cut = threshold
        if threshold == "mean+std":
            cut = float(values.mean() + values.std(correction=0))
            if any(abs(value - cut) < 1e-6 for value in values) and values.std() > 0:
                continue  # which side a value at the cut falls on is a matter of rounding
        both, predicted, true = overlap(cells, cut)
        assert float(score) == pytest.approx(both / (predicted + true - both), abs=1e-6)
        wrong = (predicted - both + true - both) / len(cells)
        right = metrics.accuracy_at(one_map[None].double(), mask[None], threshold)
        assert float(right) == pytest.approx(1 - wrong, abs=1e-6)


@quick
@given(scored(), st.sampled_from([0.3, 1.0]))
def test_max_fbeta(sample, beta2):
    maps, masks = sample
    images = [stretched(pixels(one_map, mask)) for one_map, mask in zip(maps, masks, strict=True)]
    best = 0.0
    for step in range(1, 8):
        counts = [overlap(cells, step / 7) for cells in images]
        precision = sum(both / predicted for both, predicted, _ in counts) / len(counts)
        recall = sum(both / true for both, _, true in counts) / len(counts)
        if precision + recall:
            best = max(best, (1 + beta2) * precision * recall / (beta2 * precision + recall))
    assert metrics.max_fbeta(maps.double(), masks, beta2, thresholds=7) == pytest.approx(best)


@pytest.mark.parametrize("value", [0.0, 1 / 64, 3.0])
def test_a_constant_map_scores_chance(value, device):
    masks = torch.rand(50, 16, 16, device=device) < torch.rand(50, 1, 1, device=device)
    masks[:, 3, 3] = True
    area = masks.float().mean((1, 2))
    constant = torch.full((50, 8, 8), value, device=device)
    torch.testing.assert_close(metrics.pointing(constant, masks), area)
    torch.testing.assert_close(metrics.energy_inside(constant, masks), area)
    torch.testing.assert_close(metrics.iou_at(constant, masks, "mean+std"), area)
    expected = float(1.3 * area.mean() / (0.3 * area.mean() + 1))
    assert metrics.max_fbeta(constant, masks) == pytest.approx(expected, abs=1e-5)


def test_a_perfect_map_scores_one(device):
    masks = torch.zeros(2, 8, 8, dtype=torch.bool, device=device)
    masks[0, 2:4, 2:4] = masks[1, 4:, :6] = True
    for maps in (masks.float(), masks[:, ::2, ::2].bfloat16()):
        assert metrics.pointing(maps, masks).tolist() == [1, 1]
        assert metrics.energy_inside(maps, masks).tolist() == [1, 1]
        assert metrics.iou_at(maps, masks, 0.5).tolist() == [1, 1]
        assert metrics.max_fbeta(maps, masks) == pytest.approx(1)
    soft = masks * 0.5
    torch.testing.assert_close(
        metrics.energy_inside(masks.float(), soft).cpu(), torch.full((2,), 0.5)
    )
    assert metrics.iou_at(masks.float(), soft, 0.5).tolist() == [1, 1]


def test_the_adaptive_threshold_is_of_the_population(device):
    """0.37 + 0.456 lets 0.85 in; with the sample's deviation, 0.509, it would not."""
    maps = torch.tensor([[[0, 0, 0, 0.85, 1]]], device=device)
    masks = maps > 0.5
    assert metrics.iou_at(7 * maps, masks, "mean+std").tolist() == [1]


def test_a_scale_of_the_map_changes_nothing_and_an_offset_only_the_energy():
    maps, masks = torch.rand(20, 8, 8).double(), torch.rand(20, 16, 16) < 0.3
    masks[:, 0, 0] = True
    scores = (
        lambda m: metrics.pointing(m, masks),
        lambda m: metrics.iou_at(m, masks, "mean+std"),
        lambda m: torch.tensor(metrics.max_fbeta(m, masks, thresholds=20)),
        lambda m: metrics.energy_inside(m, masks),
    )
    for score in scores:
        torch.testing.assert_close(score(maps), score(8 * maps))
    for score in scores[:3]:
        torch.testing.assert_close(score(maps), score(maps + 2), atol=0.02, rtol=0)
    assert not torch.allclose(scores[3](maps), scores[3](maps + 2), atol=1e-3)


def test_upsampling_is_nearest_at_any_ratio(device):
    """A 2-column map on 5 columns: pixel centers 0.5, 1.5 | 2.5 … fall in the nearest cell."""
    masks = torch.eye(5, device=device)[:, None]
    maps = torch.tensor([[[1.0, 0.0]]], device=device).expand(5, 1, 2)
    hit = (metrics.energy_inside(maps, masks) > 0).tolist()
    assert hit[:2] == [True, True]
    assert hit[3:] == [False, False]


@quick
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_confusion_matrix_and_mean_iou(seed, num_classes):
    generator = torch.Generator().manual_seed(seed)
    prediction = torch.randint(num_classes, (2, 4, 5), generator=generator)
    target = torch.randint(num_classes + 1, (2, 4, 5), generator=generator)
    target[target == num_classes] = 255
    target[0, 0, 0] = 0
    confusion = metrics.confusion_matrix(prediction, target.to(torch.uint8), num_classes)
    pairs = list(zip(target.flatten().tolist(), prediction.flatten().tolist(), strict=True))
    for t, p in product(range(num_classes), repeat=2):
        assert confusion[t, p] == pairs.count((t, p))
    scores = []
    for c in range(num_classes):
        counted = [(t == c, p == c) for t, p in pairs if t != 255]
        union = sum(t or p for t, p in counted)
        if union:
            scores.append(sum(t and p for t, p in counted) / union)
    assert metrics.mean_iou(confusion) == pytest.approx(sum(scores) / len(scores))


def test_confusion_ignores_what_was_predicted_on_ignored_pixels(device):
    prediction = torch.tensor([7, 1, 0], device=device)
    target = torch.tensor([-1, 1, 1], device=device)
    confusion = metrics.confusion_matrix(prediction, target, 2, ignore_index=-1)
    assert confusion.tolist() == [[0, 0], [1, 1]]


def test_a_class_that_is_nowhere_is_left_out_of_mean_iou():
    assert metrics.mean_iou(torch.tensor([[2, 0, 0], [0, 0, 0], [0, 0, 4]])) == 1.0
    assert metrics.mean_iou(torch.tensor([[2, 2, 0], [0, 0, 0], [0, 0, 4]])) == 0.5


@quick
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=20))
def test_auroc_is_the_share_of_ordered_pairs(sample):
    positive = [score for score, is_positive in sample if is_positive]
    negative = [score for score, is_positive in sample if not is_positive]
    if not positive or not negative:
        return
    won = sum((p > n) + 0.5 * (p == n) for p, n in product(positive, negative))
    scores, positives = map(torch.tensor, zip(*sample, strict=True))
    measured = metrics.auroc(scores.float(), positives)
    assert measured == pytest.approx(won / len(positive) / len(negative))


def test_auroc_on_the_device(device):
    scores = torch.tensor([[0.1, 0.4], [0.35, 0.8]], device=device)
    positives = torch.tensor([[False, False], [True, True]], device=device)
    assert metrics.auroc(scores, positives) == 0.75


def test_bootstrap_interval_is_as_wide_as_the_standard_error_says():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    low, high = metrics.bootstrap_interval(values, seed=1)
    error = float(values.std()) / 20
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert metrics.bootstrap_interval(values, seed=1) == (low, high)
    assert metrics.bootstrap_interval(values, seed=2) != (low, high)
    narrow_low, narrow_high = metrics.bootstrap_interval(values, seed=1, level=0.5)
    assert narrow_high - narrow_low == pytest.approx(2 * 0.674 * error, rel=0.15)
    assert metrics.bootstrap_interval([2.0, 2.0]) == (2.0, 2.0)


def test_uniform_and_center_prior(device):
    flat = metrics.uniform((2, 4, 8), device=device)
    assert flat.shape == (2, 4, 8)
    assert flat.device.type == device.type
    torch.testing.assert_close(flat, torch.full_like(flat, 1 / 32))
    blob = metrics.center_prior((2, 9, 13), device=device)
    assert blob.shape == (2, 9, 13)
    torch.testing.assert_close(blob.sum((1, 2)), torch.ones(2, device=device))
    torch.testing.assert_close(blob, blob.flip(1, 2))
    assert int(blob[1].argmax()) == 4 * 13 + 6
    wide = metrics.center_prior((64, 64), sigma=0.25, device=device)  # 16 px
    ratio = float(wide[31, 31 + 16] / wide[31, 31])  # the center lies between pixels 31 and 32
    assert ratio == pytest.approx(math.exp((0.5**2 - 15.5**2) / (2 * 16**2)), rel=1e-4)
    blob[0, 0, 0] = 5.0  # its own memory, not an expanded view
    assert blob[1, 0, 0] < 1


def test_color_contrast(device):
    images = torch.zeros(1, 3, 2, 2, device=device)
    images[0, :, 0, 0] = torch.tensor([1.0, 0.0, 0.4], device=device)
    contrast = metrics.color_contrast(images)
    assert contrast.shape == (1, 2, 2)
    assert float(contrast[0, 0, 0]) == pytest.approx(0.75 * math.sqrt(1.16))
    assert float(contrast[0, 1, 1]) == pytest.approx(0.25 * math.sqrt(1.16))


def test_gaussian_locality(device):
    scores = metrics.gaussian_locality((3, 4), sigma=1.5, device=device).cpu()
    assert scores.shape == (12, 12)
    torch.testing.assert_close(scores.sum(1), torch.ones(12))
    for i, j in product(range(12), repeat=2):
        squared = (i // 4 - j // 4) ** 2 + (i % 4 - j % 4) ** 2
        ratio = float(scores[i, j] / scores[i, i])
        assert ratio == pytest.approx(math.exp(-squared / 4.5), rel=1e-4)


ONES = torch.ones(2, 4, 4)
BOOL = ONES.bool()
LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize("score", [
    metrics.pointing, metrics.energy_inside, metrics.max_fbeta,
    lambda maps, masks: metrics.iou_at(maps, masks, 0.5),
])  # fmt: skip
@pytest.mark.parametrize(("maps", "masks", "message"), [
    (ONES[0], BOOL, r"maps, masks='maps \(4, 4\), masks \(2, 4, 4\)': expected \(N, h, w\)"),
    (ONES, BOOL[:1], r"maps \(2, 4, 4\), masks \(1, 4, 4\)'"),
    (ONES[:0], BOOL[:0], r"N ≥ 1"),
    (ONES, BOOL[:, :3], r"masks \(2, 3, 4\)': expected .* h ≤ H"),
    (ONES, 2 * ONES, r"masks='a value outside \[0, 1\]': expected bool"),
    (-ONES, BOOL, r"maps='a negative or non-finite value': expected finite numbers ≥ 0"),
    (ONES * math.nan, BOOL, r"maps='a negative or non-finite value'"),
    (ONES / 0, BOOL, r"maps='a negative or non-finite value'"),
])  # fmt: skip
def test_wrong_maps_and_masks(score, maps, masks, message):
    with pytest.raises(ValueError, match=message):
        score(maps, masks)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: metrics.iou_at(ONES, BOOL, 1.5), r"threshold=1.5: expected a number in \[0, 1\]"),
    (lambda: metrics.iou_at(ONES, BOOL, "otsu"), r"threshold='otsu': expected a number or"),
    (lambda: metrics.max_fbeta(ONES, ~BOOL), r"masks='an empty mask': expected a pixel ≥ 0.5"),
    (lambda: metrics.max_fbeta(ONES, BOOL, beta2=0), r"beta2=0: expected a number in \(0, inf\)"),
    (lambda: metrics.max_fbeta(ONES, BOOL, thresholds=0), r"thresholds=0: expected an integer"),
    (lambda: metrics.confusion_matrix(LABELS, LABELS, 0), r"num_classes=0: expected an integer"),
    (lambda: metrics.confusion_matrix(LABELS, LABELS[:1], 2),
     r"prediction=\(2,\): expected target's shape \(1,\)"),
    (lambda: metrics.confusion_matrix(LABELS.float(), LABELS, 2),
     r"prediction=torch.float32: expected an integer type"),
    (lambda: metrics.confusion_matrix(LABELS, LABELS + 1, 2),
     r"target=\[2\]: expected values from 0 to 1"),
    (lambda: metrics.confusion_matrix(LABELS - 1, LABELS, 2), r"prediction=\[-1\]: expected"),
    (lambda: metrics.mean_iou(torch.zeros(2, 3)), r"confusion=\(2, 3\): expected a square matrix"),
    (lambda: metrics.mean_iou(torch.zeros(2, 2)), r"confusion='all zero': expected at least one"),
    (lambda: metrics.auroc(torch.ones(2), BOOL[0, 0]), r"scores=\(2,\): expected .* \(4,\)"),
    (lambda: metrics.auroc(torch.ones(2), torch.ones(2)), r"positives=torch.float32: expected"),
    (lambda: metrics.auroc(torch.ones(2) * math.nan, BOOL[0, 0, :2]), r"scores='NaN': expected"),
    (lambda: metrics.auroc(torch.ones(4), BOOL[0, 0]), r"positives='4 of 4': expected positives"),
    (lambda: metrics.bootstrap_interval([]), r"values=\(0,\): expected \(N,\) with N ≥ 1"),
    (lambda: metrics.bootstrap_interval([math.nan]), r"values='NaN or infinite': expected finite"),
    (lambda: metrics.bootstrap_interval([1.0], seed=-1), r"seed=-1: expected an integer ≥ 0"),
    (lambda: metrics.bootstrap_interval([1.0], level=1), r"level=1: expected .* \(0, 1\)"),
    (lambda: metrics.bootstrap_interval([1.0], resamples=0), r"resamples=0: expected an integer"),
    (lambda: metrics.uniform((4,)), r"shape=\(4,\): expected \(…, h, w\), all positive"),
    (lambda: metrics.center_prior((2, 0, 4)), r"shape=\(2, 0, 4\): expected"),
    (lambda: metrics.center_prior((4, 4), sigma=0), r"sigma=0: expected a number in \(0, inf\)"),
    (lambda: metrics.color_contrast(ONES), r"images=\(2, 4, 4\): expected \(N, C, H, W\)"),
    (lambda: metrics.gaussian_locality((2, 2, 2), 1.0), r"grid=\(2, 2, 2\): expected \(rows, col"),
    (lambda: metrics.gaussian_locality((2, 2), -1.0), r"sigma=-1.0: expected a number in"),
])  # fmt: skip
def test_value_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
