"""The sparse exercises of chapter 05: solutions against the library, and learners' mistakes."""

import pytest
import torch
from learners import learner

from attnlab.lab.exercises import catalogue, check
from attnlab.sparse import InterlacedSparseAttention, NeighborhoodAttention


def test_the_last_names_of_the_chapter_are_those_of_this_file():
    names = [exercise.name for exercise in catalogue().values() if exercise.chapter == "05"]
    assert names[-2:] == ["sparse.cheapest_cell", "sparse.neighborhood_mask"]


@pytest.mark.parametrize("shape", [(12, 24), (16, 16)])
def test_the_cheapest_cell_has_the_fewest_keys_in_the_librarys_masks(shape):
    """Where the cell divides the map; keys are counted in the masks of both stages."""
    solution = catalogue()["sparse.cheapest_cell"].solution
    keys, best = solution(*shape)
    counted = {
        cell: InterlacedSparseAttention(8, cell).dense_mask(shape).sum(-1).amax(1).sum().item()
        for cell in (1, 2, 3, 4, 6, 8)
        if shape[0] % cell == 0 and shape[1] % cell == 0
    }
    assert counted[best] == keys == min(counted.values())


def test_the_cheapest_cell_is_near_the_fourth_root():
    keys, best = catalogue()["sparse.cheapest_cell"].solution(97, 97)
    assert best == 10
    assert keys == 200 < 13**2 + 8**2, "openseg's cell of 8 sees more"


def test_the_mended_mask_is_the_librarys_and_the_bug_needs_a_map_that_is_not_square():
    exercise = catalogue()["sparse.neighborhood_mask"]
    bug = exercise.start()
    for case in exercise.cases(seed=3):
        height, width, size = case.args
        mask = NeighborhoodAttention(8, size).dense_mask((height, width))
        assert torch.equal(exercise.solution(*case.args), mask)
        assert torch.equal(bug(*case.args), mask) == (height == width)
    wrong = bug(6, 4, 3)
    assert set(wrong.sum(1).tolist()) != {9}
    assert not wrong.diagonal().all(), "some position does not see itself"


@pytest.mark.parametrize(
    ("name", "source", "words"),
    [
        (
            "sparse.cheapest_cell",
            "def cheapest_cell(height, width):\n    p = int((height * width) ** 0.5 + 0.5)\n"
            "    p = min(p, height, width)\n"
            "    return -(-height // p) * -(-width // p) + p * p, p",
            "*area* P²",
        ),
        (
            "sparse.cheapest_cell",
            "def cheapest_cell(height, width):\n    best = (10**9, None)\n"
            "    for p in range(1, min(height, width) + 1):\n"
            "        keys = (height // p) * (width // p) + p * p\n"
            "        best = min(best, (keys, p))\n    return best",
            "round up",
        ),
        (
            "sparse.neighborhood_mask",
            "def neighborhood_mask(height, width, size):\n"
            "    i = torch.arange(height * width)\n    y, x = i // width, i % width\n"
            "    dy, dx = y[:, None] - y, x[:, None] - x\n"
            "    return torch.maximum(dy.abs(), dx.abs()) <= size // 2",
            "too few keys",
        ),
    ],
)
def test_recognises_a_mistake_however_it_is_written(name, source, words):
    for seed in range(5):
        result = check(name, learner(name, source), seed)
        assert result.status == "wrong"
        assert words in result.hint, result


def test_accepts_another_right_way():
    source = (
        "def neighborhood_mask(height, width, size):\n"
        "    def axis(n):\n"
        "        first = (torch.arange(n) - size // 2).clamp(0, n - size)[:, None]\n"
        "        return (torch.arange(n) >= first) & (torch.arange(n) < first + size)\n"
        "    return torch.kron(axis(height).int(), axis(width).int()).bool()\n"
    )
    name = "sparse.neighborhood_mask"
    assert check(name, learner(name, source)).status == "correct"
