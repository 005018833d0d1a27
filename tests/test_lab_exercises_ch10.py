"""The exercises of chapter 10: solutions against the library, and what learners typically write."""

import pytest
import torch
from einops import rearrange
from torch.testing import assert_close

from attnlab.lab.exercises import catalogue, check
from attnlab.superpixel import hard_labels, mask_absent, p2s_attend, to_cells, valid9
from attnlab.superpixel_baselines import ssn


def solution(name: str):
    return catalogue()[f"spformer.{name}"].solution


def test_the_names_are_those_of_chapter_10():
    names = [exercise.name for exercise in catalogue().values() if exercise.chapter == "10"]
    assert names == [
        "spformer.neighbor_counts",
        "spformer.p2s_update",
        "spformer.kmeans_logits",
        "spformer.buggy_labels",
    ]


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (5, 3)])
def test_counts_are_the_librarys_valid_slots(size):
    assert torch.equal(solution("neighbor_counts")(*size), valid9(*size).sum(-1))


@pytest.mark.parametrize("size", [(1, 1), (2, 5)])
@pytest.mark.parametrize("scale", [1.0, 1e5])
def test_the_update_is_the_librarys(size, scale):
    logits = mask_absent(scale * torch.randn(*size, 4, 9, dtype=torch.float64))
    values = torch.randn(*size, 4, 3, dtype=torch.float64)
    for impl in ("explicit", "fused"):
        expected = p2s_attend(logits, values, impl)
        assert_close(solution("p2s_update")(logits, values), expected, rtol=0, atol=1e-12)


def test_kmeans_logits_and_p2s_are_a_step_of_hard_k_means():
    features = torch.randn(1, 3, 8, 12, dtype=torch.float64)
    pixels = to_cells(features, 4)[0]
    logits = solution("kmeans_logits")(pixels, pixels.mean(-2))
    expected, centers = ssn(features, 4, iters=1, hard=True)
    assert torch.equal(logits, expected[0, 0])
    update, centers = p2s_attend(logits, pixels), rearrange(centers, "1 c y x -> y x c")
    chosen = update.isfinite()  # 0 / 0 where a center is nobody's nearest
    assert chosen.all(-1).float().mean() > 0.8
    assert_close(update[chosen], centers[chosen], rtol=0, atol=1e-12)


def test_labels_are_the_librarys():
    logits = mask_absent(torch.randn(1, 1, 2, 5, 4, 9))
    best = logits[0, 0].argmax(-1)
    assert torch.equal(solution("buggy_labels")(best), to_cells(hard_labels(logits), 2)[0, ..., 0])


def test_a_square_grid_does_not_betray_the_bug():
    start = catalogue()["spformer.buggy_labels"].start()
    result = check("spformer.buggy_labels", start)
    assert result.status == "not attempted"
    assert "Case: two rows of five cells." in result.text
