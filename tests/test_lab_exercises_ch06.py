"""The exercises of chapter 06: solutions against the library, and learners' mistakes."""

import pytest
import torch
from einops import rearrange
from learners import learner

from attnlab.cgnl import cgnl_dot, cgnl_rbf, taylor_error_bound
from attnlab.lab.exercises import catalogue, check
from attnlab.lab.experiments.ch06 import inflate

SEEDS = range(5)


def test_the_names_are_those_of_chapter_06():
    names = [exercise.name for exercise in catalogue().values() if exercise.chapter == "06"]
    assert names == [
        "cgnl.compact_dot", "cgnl.order_needed", "cgnl.buggy_series", "cgnl.inflate_kernel",
    ]  # fmt: skip


def test_compact_dot_agrees_with_the_library():
    exercise = catalogue()["cgnl.compact_dot"]
    for case in exercise.cases(seed=3):
        *maps, groups = case.args
        grouped = (rearrange(x, "b (g c) h w -> b g (c h w)", g=groups) for x in maps)
        expected = cgnl_dot(*grouped, impl="explicit").reshape(maps[0].shape)
        torch.testing.assert_close(exercise.solution(*case.args), expected)


@pytest.mark.parametrize(
    ("z", "order"), [(0.1, 2), (0.5, 4), (1, 5), (2, 8), (4, 11), (8, 18), (16, 30)]
)
def test_the_order_needed_is_the_first_inside_the_librarys_bound(z, order):
    assert catalogue()["cgnl.order_needed"].solution(z / 2, 1.0, 1e-3) == order
    assert taylor_error_bound(z, order) <= 1e-3 < taylor_error_bound(z, order - 1)


def test_the_mended_series_is_the_librarys():
    exercise = catalogue()["cgnl.buggy_series"]
    for case in exercise.cases(seed=3):
        theta, phi, g, gamma, order = case.args
        expected = cgnl_rbf(theta, phi, g, gamma=gamma, order=order, beta="exact")
        torch.testing.assert_close(exercise.solution(*case.args), expected)
        assert exercise.start()(*case.args).shape == expected.shape, "shapes must not tell"


def test_inflated_kernels_are_the_experiments():
    conv = torch.nn.Conv2d(3, 5, 3)
    expected = inflate(conv, 3).weight
    torch.testing.assert_close(
        catalogue()["cgnl.inflate_kernel"].solution(conv.weight, 3), expected
    )


@pytest.mark.parametrize(
    ("name", "source", "words"),
    [
        (
            "cgnl.compact_dot",
            "def compact_dot(theta, phi, g, groups):\n"
            "    s = torch.einsum('bchw,bchw->bc', phi, g)\n"
            "    return theta * s[:, :, None, None]",
            "places of each channel alone",
        ),
        (
            "cgnl.compact_dot",
            "def compact_dot(theta, phi, g, groups):\n"
            "    b = len(theta)\n"
            "    t, p, v = (x.reshape(b, 1, -1) for x in (theta, phi, g))\n"
            "    return (t * (p * v).sum(-1, True)).reshape(theta.shape)",
            "sum over all channels",
        ),
        (
            "cgnl.order_needed",
            "import math\n"
            "def order_needed(gamma, radius, tolerance):\n"
            "    z, P = 2 * gamma * radius**2, 0\n"
            "    while z ** (P + 1) / math.factorial(P + 1) > tolerance:\n        P += 1\n"
            "    return P",
            "too pessimistic",
        ),
        (
            "cgnl.inflate_kernel",
            "def inflate_kernel(weight, frames):\n    return torch.stack([weight] * frames, dim=2)",
            "copies add up",
        ),
    ],
)
def test_recognises_a_mistake_however_it_is_written(name, source, words):
    answer = learner(name, source)
    for seed in SEEDS:
        result = check(name, answer, seed)
        assert result.status == "wrong"
        assert words in result.hint, result


def test_accepts_another_right_way():
    def compact_dot(theta, phi, g, groups):
        outputs = []
        for t, p, v in zip(*(x.chunk(groups, dim=1) for x in (theta, phi, g)), strict=True):
            outputs.append(t * torch.einsum("bchw,bchw->b", p, v)[:, None, None, None])
        return torch.cat(outputs, dim=1)

    assert check("cgnl.compact_dot", compact_dot).status == "correct"
