"""The exercises of chapter 11: solutions against the library, and what learners typically write."""

import math

import numpy as np
import pytest
import torch
from learners import learner
from torch.testing import assert_close

from attnlab.lab import cost, results
from attnlab.lab.common_form import weights
from attnlab.lab.exercises import catalogue, check
from attnlab.local_attention import dense_window, local_offsets
from attnlab.sparse import CrissCrossAttention


def solution(name: str):
    return catalogue()[f"capstone.{name}"].solution


def test_the_names_are_those_of_chapter_11():
    names = [exercise.name for exercise in catalogue().values() if exercise.chapter == "11"]
    assert names == [
        "capstone.weights_of",
        "capstone.compared",
        "capstone.exponent",
        "capstone.buggy_report",
    ]


def common(mechanism: str, scores: torch.Tensor, width: int) -> torch.Tensor:
    """The same by the chapter's common form, with the masks of the library's mechanisms."""
    size = len(scores) // width, width
    if mechanism == "neighborhood":
        each = torch.ones(1, len(local_offsets(1)), *size)
        mask = dense_window(each, local_offsets(1)).view_as(scores) > 0
        return weights(scores, mask=mask)
    options = {
        "dense": {},
        "reversed": {"axis": "queries"},
        "criss-cross": {"mask": CrissCrossAttention(8).dense_mask(size)},
        "gate": {"normalize": "sigmoid", "mask": torch.eye(len(scores)).bool()},
    }
    return weights(scores, **options[mechanism])


@pytest.mark.parametrize("mechanism", ["dense", "reversed", "criss-cross", "neighborhood", "gate"])
def test_weights_are_those_of_the_common_form_and_the_librarys_masks(mechanism):
    torch.manual_seed(0)
    scores = torch.randn(20, 20)
    found = solution("weights_of")(mechanism, scores, 5)
    assert_close(found, common(mechanism, scores, 5), rtol=0, atol=1e-6)


def test_compared_is_what_a_results_table_prints():
    torch.manual_seed(0)
    first, second = (torch.rand(2, 4, 30) > 0.5).float()
    mean, spread, wins = solution("compared")(first, second)
    gains = [(a.mean() - b.mean()).item() for a, b in zip(first, second, strict=True)]
    summary = results._summary(gains)
    assert mean.item() == pytest.approx(summary["mean"], abs=1e-6)
    assert spread.item() == pytest.approx(summary["std"], abs=1e-6)
    assert wins == sum(gain > 0 for gain in gains)


def test_compared_does_not_see_what_both_share():
    """Seeds that are good or bad for both mechanisms leave the spread of the difference at 0."""
    base = torch.tensor([[1.0, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    better = base.clone()
    better[:, 4] = 1.0
    mean, spread, wins = solution("compared")(better, base)
    assert_close((mean, spread), (torch.tensor(0.2), torch.tensor(0.0)), rtol=0, atol=1e-6)
    assert wins == 3


def test_the_exponent_is_least_squares_without_bad_measurements_and_stays_with_one():
    sizes = torch.tensor([64.0, 128, 256, 512, 1024])
    clean, spoiled = sizes**2, (sizes**2).index_fill(0, torch.tensor([4]), 1e9)
    robust = solution("exponent")
    assert cost.growth(sizes.tolist(), clean.tolist()) == pytest.approx(2)
    assert robust(sizes, clean).item() == pytest.approx(2, abs=1e-5)
    assert robust(sizes, spoiled).item() == pytest.approx(2, abs=1e-5)
    assert cost.growth(sizes.tolist(), spoiled.tolist()) > 3


def test_the_exponent_is_numpys_median_of_slopes():
    rng = np.random.default_rng(0)
    sizes, costs = rng.uniform(1, 100, (2, 7))
    slopes = [
        math.log(costs[i] / costs[j]) / math.log(sizes[i] / sizes[j])
        for i in range(7)
        for j in range(i)
    ]
    found = solution("exponent")(torch.tensor(sizes), torch.tensor(costs))
    assert found.item() == pytest.approx(np.median(slopes), abs=1e-9)


def test_the_report_that_cheats_finds_a_gain_in_pure_luck():
    """Twenty equal rates: chosen on the test set, the best of them looks better than it is."""
    generator = torch.Generator().manual_seed(0)
    start = catalogue()["capstone.buggy_report"].start()
    honest, cheated = [], []
    for _ in range(50):
        val, test = 0.5 + 0.1 * torch.randn(2, 20, 3, generator=generator)
        honest.append(solution("buggy_report")(val, test)[0].item())
        cheated.append(start(val, test)[0].item())
    assert np.mean(honest) == pytest.approx(0.5, abs=0.02)
    assert np.mean(cheated) > 0.58
    assert check("capstone.buggy_report", start).status == "not attempted"


def test_other_right_answers_are_right():
    with_the_common_form = learner(
        "capstone.weights_of",
        "from attnlab.lab.common_form import weights\n"
        "def weights_of(mechanism, scores, width):\n"
        "    n = torch.arange(len(scores))\n"
        "    row, col = n // width, n % width\n"
        "    same = lambda x: x[:, None] == x\n"
        "    near = lambda x: (x[:, None] - x).abs() < 2\n"
        "    return weights(scores, **{\n"
        "        'dense': {}, 'reversed': {'axis': 'queries'},\n"
        "        'criss-cross': {'mask': same(row) | same(col)},\n"
        "        'neighborhood': {'mask': near(row) & near(col)},\n"
        "        'gate': {'normalize': 'sigmoid', 'mask': same(n)}}[mechanism])\n",
    )
    assert check("capstone.weights_of", with_the_common_form).status == "correct"
    pairs = learner(
        "capstone.exponent",
        "def exponent(sizes, costs):\n"
        "    x, y = sizes.log(), costs.log()\n"
        "    slopes = [(y[i] - y[j]) / (x[i] - x[j])\n"
        "              for i in range(len(x)) for j in range(i) if sizes[i] != sizes[j]]\n"
        "    slopes = torch.stack(slopes).sort().values\n"
        "    return (slopes[(len(slopes) - 1) // 2] + slopes[len(slopes) // 2]) / 2\n",
    )
    assert check("capstone.exponent", pairs).status == "correct"
