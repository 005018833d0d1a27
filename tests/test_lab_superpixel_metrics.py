"""`attnlab.lab.superpixel_metrics` against scikit-image, or the definitions pixel by pixel."""

import math
from itertools import combinations, product

import battery
import numpy as np
import pytest
import skimage
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab import superpixel as sp
from attnlab.lab import superpixel_metrics as sm
from attnlab.lab.metrics import confusion_matrix, mean_iou
from attnlab.spformer import to_superpixels

quick = settings(max_examples=40, deadline=None, derandomize=True)
IGNORED = 255


@st.composite
def pairs(draw):
    """A partition and a truth, int64 `(N, H, W)`; one pixel of each image counts for sure."""
    n, height, width = (draw(st.integers(1, top)) for top in (3, 5, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    labels, target = (
        torch.randint(draw(st.integers(1, 5)), (n, height, width), generator=generator)
        for _ in range(2)
    )
    target[torch.rand(target.shape, generator=generator) < draw(st.sampled_from([0, 0.3]))] = 255
    target[:, 0, 0] = 0
    return labels, target


def slots(*shape, seed=0, scale=3.0, device="cpu"):
    """Logits of an association: slots `(N, M, Sh, Sw, s², 9)`."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(*shape, 9, generator=generator, dtype=torch.float64)
    return sp.mask_absent(logits.to(device))


def classes(*shape, high=3, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def table(labels, target):
    """scikit-image's count of common pixels, (truths, segments), without the ignored."""
    counted = target != IGNORED
    return skimage.metrics.contingency_table(
        target[counted].numpy(), labels[counted].numpy()
    ).toarray()


# Of a partition


@quick
@given(pairs())
def test_scores_of_overlap_are_those_of_scikit_images_table(pair):
    accuracies, errors = sm.achievable_accuracy(*pair), sm.undersegmentation_error(*pair)
    for accuracy, error, labels, target in zip(accuracies, errors, *pair, strict=True):
        common = table(labels, target)
        assert float(accuracy) == pytest.approx(common.max(0).sum() / common.sum())
        leak = np.minimum(common, common.sum(0) - common)
        assert float(error) == pytest.approx(leak.sum() / common.sum())
        assert 0 <= float(error) <= 2 * (1 - float(accuracy)) + 1e-9, "two regions a leak at most"


@quick
@given(pairs())
def test_adjusted_rand_counts_pairs_of_pixels(pair):
    for score, labels, target in zip(sm.adjusted_rand(*pair), *pair, strict=True):
        counted = target != IGNORED
        ours, theirs = labels[counted].tolist(), target[counted].tolist()
        both = list(combinations(range(len(ours)), 2))
        together = sum(ours[i] == ours[j] and theirs[i] == theirs[j] for i, j in both)
        a, b = (sum(x[i] == x[j] for i, j in both) for x in (ours, theirs))
        chance = a * b / len(both) if both else 0.0
        expected = 1.0 if (a + b) / 2 == together else (together - chance) / ((a + b) / 2 - chance)
        assert float(score) == pytest.approx(expected)


@quick
@given(pairs())
def test_borders_are_scikit_images_thick_ones(pair):
    labels, target = pair
    densities = sm.contour_density(labels)
    for found, density, image in zip(sm.boundaries(labels), densities, labels, strict=True):
        expected = skimage.segmentation.find_boundaries(image.numpy(), connectivity=1)
        assert np.array_equal(found.numpy(), expected)
        assert float(density) == pytest.approx(expected.mean())
    inner = sm.boundaries(target, IGNORED)
    for n, y, x in product(*map(range, target.shape)):
        around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        near = [int(target[n, v, u]) for v, u in around
                if 0 <= v < target.shape[1] and 0 <= u < target.shape[2]]  # fmt: skip
        own = int(target[n, y, x])
        expected = own != IGNORED and any(other not in (own, IGNORED) for other in near)
        assert bool(inner[n, y, x]) == expected


@quick
@given(pairs(), st.integers(0, 2))
def test_boundary_recall_dilates_the_partitions_border(pair, radius):
    near = np.ones((2 * radius + 1, 2 * radius + 1), dtype=bool)
    scores = sm.boundary_recall(*pair, radius)
    for score, labels, true in zip(scores, pair[0], sm.boundaries(pair[1], IGNORED), strict=True):
        ours = skimage.segmentation.find_boundaries(labels.numpy(), connectivity=1)
        hits = skimage.morphology.dilation(ours, near)[true.numpy()]
        assert float(score) == pytest.approx(hits.mean() if len(hits) else math.nan, nan_ok=True)


@quick
@given(pairs())
def test_compactness_goes_around_every_segment(pair):
    for score, image in zip(sm.compactness(pair[0]), pair[0], strict=True):
        padded = np.pad(image.numpy(), 1, constant_values=-1)
        expected = 0.0
        for segment in image.unique().tolist():
            inside = padded == segment
            edges = sum((inside & ~np.roll(inside, step, axis)).sum()
                        for step, axis in product((-1, 1), (0, 1)))  # fmt: skip
            area = inside.sum()
            expected += area / image.numel() * 4 * math.pi * area / edges**2
        assert float(score) == pytest.approx(expected)


@quick
@given(pairs())
def test_numbers_of_segments_do_not_matter(pair):
    labels, target = pair
    renamed = torch.tensor([7, 300, 2, 10**6, 0])[labels]
    for score in (sm.achievable_accuracy, sm.undersegmentation_error, sm.adjusted_rand,
                  sm.boundary_recall):  # fmt: skip
        torch.testing.assert_close(score(renamed, target), score(labels, target), equal_nan=True)
    for score in (sm.segments, sm.contour_density, sm.compactness):
        torch.testing.assert_close(score(renamed), score(labels))
    assert sm.segments(labels).tolist() == [len(np.unique(image.numpy())) for image in labels]


@quick
@given(pairs())
def test_a_partition_that_refines_another_is_at_least_as_good(pair):
    labels, target = pair
    finer = 5 * labels + target.masked_fill(target == IGNORED, 4)
    assert (sm.achievable_accuracy(finer, target) == 1).all()
    assert (sm.undersegmentation_error(finer, target) == 0).all()
    halves = 5 * labels + (torch.arange(labels.shape[2]) > labels.shape[2] // 2)
    assert (sm.achievable_accuracy(halves, target) >= sm.achievable_accuracy(labels, target)).all()
    whole = torch.where(target == IGNORED, target, labels)
    assert (sm.adjusted_rand(labels, whole) == 1).all()


def test_a_squares_compactness_and_chance_agreement():
    assert float(sm.compactness(torch.zeros(1, 6, 6).long())) == pytest.approx(math.pi / 4)
    one, other = classes(50, 16, 16, high=6), classes(50, 16, 16, high=4, seed=1)
    assert abs(float(sm.adjusted_rand(one, other).mean())) < 0.01


def test_majority_is_the_best_that_a_label_per_segment_can_say():
    labels, target = classes(3, 8, 8, high=6), classes(3, 8, 8, seed=1)
    target[:, :2] = IGNORED
    best = sm.majority(labels, target, 3)
    for n in range(3):
        for segment in labels[n].unique():
            there = labels[n] == segment
            counts = [int((there & (target[n] == k)).sum()) for k in range(3)]
            assert (best[n][there] == counts.index(max(counts))).all()
    counted = target != IGNORED
    right = torch.stack([(b == t)[c].double().mean() for b, t, c in
                         zip(best, target, counted, strict=True)])  # fmt: skip
    torch.testing.assert_close(right, sm.achievable_accuracy(labels, target))


# Of a soft association


def loop_oracle(logits, target, num_classes):
    """H(p, c), ĉ(p) and argmax_c Σ_p Q(i, p) [ĉ(p) = c] with dense matrices, head by head."""
    dense = sp.dense_association(logits.softmax(-1))  # (N, M, pixels, superpixels)
    out = torch.zeros(*dense.shape[:3], dtype=torch.long)
    for n, m in product(*map(range, dense.shape[:2])):
        Q, truth = dense[n, m], target[n].flatten()
        H = torch.stack([Q[truth == c].sum(0) for c in range(num_classes)], 1)
        label = H.argmax(1)
        says = torch.stack([Q[:, (label == c) & (H.sum(1) > 0)].sum(1) for c in range(num_classes)])
        out[n, m] = says.argmax(0)
    return rearrange(out, "n m (h w) -> n m h w", h=target.shape[1])


@pytest.mark.parametrize("grid", [(3, 4), (1, 1), (1, 3)])
def test_soft_oracle_equals_dense_matrices(grid):
    logits = slots(2, 2, *grid, 16)
    target = classes(2, 4 * grid[0], 4 * grid[1])
    target[0, :2] = IGNORED
    assert torch.equal(sm.oracle_prediction(logits, target, 3), loop_oracle(logits, target, 3))


@pytest.mark.parametrize("mode", ["cell", "window"])
def test_the_oracle_of_a_finer_truth_resizes_the_association(mode):
    logits, target = slots(2, 2, 2, 3, 4), classes(2, 8, 12)
    fine = sp.upsample_association(logits, 2, mode)
    for kind in ("soft", "hard"):
        expected = sm.oracle_prediction(fine, target, 3, kind)
        assert torch.equal(sm.oracle_prediction(logits, target, 3, kind, mode), expected)


def test_hard_oracle_is_the_majority_of_the_hard_labels():
    logits, target = slots(2, 3, 2, 3, 16), classes(2, 8, 12)
    target[:, :, :2] = IGNORED
    got = sm.oracle_prediction(logits, target, 3, "hard")
    for m in range(3):
        assert torch.equal(got[:, m], sm.majority(sp.hard_labels(logits)[:, m], target, 3))
    sharp = sm.oracle_prediction(1e4 * logits, target, 3)
    hard = sm.oracle_prediction(1e4 * logits, target, 3, "hard")
    counted = target != IGNORED
    for m in range(3):
        assert torch.equal(sharp[:, m][counted], hard[:, m][counted])


def test_oracle_miou_is_of_the_whole_set_with_the_best_head_and_the_mean():
    logits, target = slots(4, 2, 2, 3, 16), classes(4, 8, 12, high=2)
    predictions = sm.oracle_prediction(logits, target, 3)
    halves = [sm.oracle_confusion(logits[i : i + 2], target[i : i + 2], 3) for i in (0, 2)]
    score = sm.oracle_miou(sum(halves))
    expected = [mean_iou(confusion_matrix(predictions[:, m], target, 3)) for m in (0, 1)]
    assert score == {"heads": expected, "mean": pytest.approx(sum(expected) / 2),
                     "best": max(expected)}  # fmt: skip


def test_patches_are_an_association_of_their_own_cells():
    patches = sm.patch_association(2, (2, 3), 4)
    labels = sp.hard_labels(patches)[:, 0]
    expected = torch.arange(6).view(2, 3).repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert torch.equal(labels, expected.expand(2, -1, -1))
    target = classes(2, 16, 24)  # at twice the resolution
    blocks = expected.repeat_interleave(2, 0).repeat_interleave(2, 1).expand(2, -1, -1)
    for kind in ("soft", "hard"):
        best = sm.oracle_prediction(patches, target, 3, kind)[:, 0]
        assert torch.equal(best, sm.majority(blocks, target, 3))


def test_sharpness_and_entropy_of_uniform_hard_and_any():
    uniform = sp.mask_absent(torch.zeros(1, 2, 3, 4, 4, 9))
    ones = torch.ones(1, 2)
    torch.testing.assert_close(sm.association_entropy(uniform), ones)
    shares = (2 / 9 + 6 / 6 + 4 / 4) / 12  # 2 cells inside, 6 at an edge, 4 in a corner
    torch.testing.assert_close(sm.sharpness(uniform), shares * ones)
    hard = sm.patch_association(1, (3, 4), 2).expand(-1, 2, -1, -1, -1, -1)
    torch.testing.assert_close(sm.association_entropy(hard), 0 * ones)
    torch.testing.assert_close(sm.sharpness(hard), ones)
    logits = slots(1, 2, 3, 4, 4)
    cells = rearrange(logits.softmax(-1), "n m y x i k -> n m (y x) i k")
    expected = torch.zeros(1, 2, dtype=torch.float64)
    for m, p, i in product(range(2), range(12), range(4)):
        weights = [w for w in cells[0, m, p, i].tolist() if w > 0]
        entropy = -sum(w * math.log(w) for w in weights) / math.log(len(weights))
        expected[0, m] += entropy / 48
    torch.testing.assert_close(sm.association_entropy(logits), expected)
    assert (sm.association_entropy(slots(1, 2, 1, 1, 4)) == 0).all()


def test_occlusion_leak_equals_the_dense_sums_and_is_0_for_patches_that_fit():
    logits = slots(2, 2, 3, 4, 4, scale=6.0)
    occluder = torch.zeros(2, 6, 8, dtype=torch.bool)
    occluder[0, 1:5, 2:7] = True
    dense = sp.dense_association(logits.softmax(-1))
    on = occluder.flatten(1)
    for n, m in product(range(2), range(2)):
        mass, covered = dense[n, m].sum(0), dense[n, m][on[n]].sum(0)
        its = covered > mass / 2
        assert its.any() == (n == 0)
        expected = float((mass - covered)[its].sum() / mass[its].sum()) if its.any() else 0.0
        assert float(sm.occlusion_leak(logits, occluder)[n, m]) == pytest.approx(expected)
    fitting = torch.zeros(1, 6, 8, dtype=torch.bool)
    fitting[:, 2:4, 2:6] = True
    assert float(sm.occlusion_leak(sm.patch_association(1, (3, 4), 2), fitting)) == 0


# Turning, and SLIC


def test_rotation_agreement_is_1_for_what_turns_and_less_for_a_fixed_grid():
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images = images.repeat_interleave(8, 2).repeat_interleave(8, 3)

    def by_color(images):
        return (images * torch.tensor([1.0, 2.0, 4.0])[:, None, None]).sum(1).mul(8).long()

    def squares(images):
        return (8 * (y // 4) + x // 4).expand(len(images), -1, -1)

    for angle in (0, 90, 180):
        assert (sm.rotation_agreement(by_color, images, angle) == 1).all()
        assert (sm.rotation_agreement(squares, images, angle) == 1).all()
    assert (sm.rotation_agreement(squares, images, 45) < 0.6).all()
    scores = sm.rotation_agreement(lambda x: to_superpixels(x, side=8, iters=3), images, 90)
    assert scores.shape == (2,)
    assert (scores > 0.95).all()


def test_slic_is_scikit_images():
    images = torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    ours = sm.slic(images, 12, compactness=30.0, sigma=0.5, slic_zero=True)
    for labels, image in zip(ours, images, strict=True):
        picture = image.permute(1, 2, 0).double().numpy()
        expected = skimage.segmentation.slic(
            picture, n_segments=12, compactness=30.0, sigma=0.5, slic_zero=True
        )
        assert np.array_equal(labels.numpy(), expected)
    assert ours.dtype == torch.int64


def test_all_on_the_device(device):
    labels, target = classes(2, 12, 16, high=6).to(device), classes(2, 12, 16).to(device)
    logits = slots(2, 2, 3, 4, 16, device=device)
    scores = [
        sm.achievable_accuracy(labels, target), sm.undersegmentation_error(labels, target),
        sm.boundary_recall(labels, target), sm.compactness(labels), sm.segments(labels),
        sm.adjusted_rand(labels, target), sm.sharpness(logits), sm.association_entropy(logits),
        sm.occlusion_leak(logits, target == 1), sm.oracle_confusion(logits, target, 3),
        sm.majority(labels, target, 3), sm.slic(torch.rand(1, 3, 16, 16).to(device), 4),
    ]  # fmt: skip
    assert {score.device.type for score in scores} == {device.type}


def test_bad_input():
    labels, logits = torch.zeros(1, 8, 12).long(), slots(1, 2, 2, 3, 16)
    battery.check_errors([
        (lambda: sm.segments(labels[0]), "(8, 12)): expected integers (N, H, W), not empty"),
        (lambda: sm.compactness(labels.float()), "labels=(torch.float32, (1, 8, 12)): expected"),
        (lambda: sm.contour_density(labels[:0]), "(0, 8, 12)): expected integers (N, H, W), not"),
        (lambda: sm.achievable_accuracy(labels, labels[:, 1:]),
         "labels=(1, 8, 12): expected target's shape (1, 7, 12)"),
        (lambda: sm.adjusted_rand(labels, labels + 255), "target='all ignored': expected a count"),
        (lambda: sm.boundary_recall(labels, labels, -1), "radius=-1: expected an integer ≥ 0"),
        (lambda: sm.majority(labels, labels, 0), "num_classes=0: expected an integer ≥ 1"),
        (lambda: sm.majority(labels, labels + 3, 3), "target=3: expected values from 0 to 2"),
        (lambda: sm.oracle_prediction(logits, labels - 1, 3), "target=-1: expected values from 0"),
        (lambda: sm.oracle_prediction(logits, labels, 3, "any"), "kind='any': expected soft or h"),
        (lambda: sm.oracle_prediction(logits, labels[:, 1:], 3), "target (1, 7, 12)': expected (N"),
        (lambda: sm.oracle_prediction(logits[0], labels, 3), "logits, target='logits (2, 2, 3, 16"),
        (lambda: sm.oracle_confusion(logits, labels, 3, mode="slot"), "mode='slot': expected cell"),
        (lambda: sm.occlusion_leak(logits, labels), "occluder=(torch.int64, (1, 8, 12)): expected"),
        (lambda: sm.rotation_agreement(to_superpixels, labels, 9), "images=(1, 8, 12): expected"),
        (lambda: sm.patch_association(1, (2, 2), 0), "side=0: expected an integer ≥ 1"),
        (lambda: sm.slic(torch.zeros(3, 8, 8), 4), "images=(3, 8, 8): expected (N, 3, H, W)"),
        (lambda: sm.slic(torch.zeros(1, 3, 8, 8), 0), "n_segments=0: expected an integer ≥ 1"),
        (lambda: sm.slic(torch.zeros(1, 3, 8, 8), 4, 0.0), "compactness=0.0: expected a number"),
    ])  # fmt: skip
