"""The exercises of chapter 02: solutions against the library and autograd, learners' mistakes."""

import pytest
import torch
from learners import learner

from attnlab.lab import cost
from attnlab.lab.exercises import catalogue, check
from attnlab.non_local import NonLocalBlock, non_local, non_local_weights

SEEDS = range(5)


def solution(name):
    return catalogue()[f"non_local.{name}"].solution


def test_the_names_are_those_of_chapter_02():
    names = [exercise.name for exercise in catalogue().values() if exercise.chapter == "02"]
    assert names == [
        "non_local.first_gradients",
        "non_local.dot_product_summary",
        "non_local.concatenation_weights",
        "non_local.block_macs",
        "non_local.buggy_block",
    ]


def test_first_gradients_agree_with_autograd():
    x, y, target = torch.randn(3, 6).double()
    for values in ((0.3, -1.2), (0.0, 0.7), (0.7, 0.0), (0.0, 0.0)):
        gamma, w = (torch.tensor(value).double().requires_grad_() for value in values)
        loss = (x + gamma * w * y - target).square().sum() / 2
        expected = torch.autograd.grad(loss, (gamma, w))
        got = solution("first_gradients")(x, y, target, gamma.detach(), w.detach())
        torch.testing.assert_close(got, expected)


def test_the_summary_gives_the_librarys_dot_product():
    theta, phi, g = (torch.randn(2, n, d) for n, d in ((7, 3), (9, 3), (9, 4)))
    expected = non_local(theta, phi, g, "dot_product", impl="explicit")
    torch.testing.assert_close(theta @ solution("dot_product_summary")(phi, g), expected)


def test_concatenation_weights_are_the_librarys():
    theta, phi, w_f = torch.randn(2, 7, 3), torch.randn(2, 9, 3), torch.randn(6)
    expected = non_local_weights(theta, phi, "concatenation", w_f=w_f)
    torch.testing.assert_close(solution("concatenation_weights")(theta, phi, w_f), expected)


@pytest.mark.parametrize(
    "args", [(16, 64, True, "before"), (16, 64, True, "after"), (8, 16, False, "")]
)
def test_block_macs_agree_with_the_counter(args):
    channels, positions, subsample, pool = args
    side = round(positions**0.5)
    with torch.device("meta"):
        block = NonLocalBlock(channels, subsample=subsample, pool=pool or "before", impl="explicit")
    x = torch.empty(1, channels, side, side, device="meta")
    assert solution("block_macs")(*args) == cost.macs(block, x)


def test_block_macs_of_the_chapter():
    counts = [
        solution("block_macs")(1024, 784, *options) / 1e9
        for options in ((True, "before"), (True, "after"), (False, "before"))
    ]
    assert counts == pytest.approx([1.185, 1.802, 2.274], abs=5e-4)


def test_the_mended_block_equals_the_librarys():
    exercise = catalogue()["non_local.buggy_block"]
    for case in exercise.cases(seed=3):
        x, theta, phi, g, w_z = case.args
        block = NonLocalBlock(x.shape[1], len(theta), norm=None)
        state = {"theta": theta, "phi": phi, "g": g, "z": w_z}
        block.load_state_dict(
            {f"{key}.weight": value for key, value in state.items()}, strict=False
        )
        torch.testing.assert_close(exercise.solution(*case.args), block(x))
        assert exercise.start()(*case.args).shape == x.shape, "a shape test must not see the bug"


LEARNERS = [
    (
        "first_gradients",
        "def first_gradients(x, y, target, gamma, w):\n    e = x + gamma * w * y - target\n"
        "    return (e * gamma * y).sum(), (e * w * y).sum()",
        "swapped",
    ),
    (
        "dot_product_summary",
        "def dot_product_summary(phi, g):\n    return torch.einsum('bmd,bme->bde', phi, g)",
        "number of keys M is missing",
    ),
    (
        "dot_product_summary",
        "def dot_product_summary(phi, g):\n"
        "    return torch.einsum('bmd,bme->bed', phi, g) / phi.shape[1]",
        "transposed",
    ),
    (
        "concatenation_weights",
        "def concatenation_weights(theta, phi, w_f):\n    n, m = theta.shape[1], phi.shape[1]\n"
        "    pairs = torch.cat([theta[:, :, None].expand(-1, -1, m, -1),"
        " phi[:, None].expand(-1, n, -1, -1)], -1)\n"
        "    return (pairs @ w_f).softmax(-1)",
        "not the sum that a softmax divides by",
    ),
    (
        "block_macs",
        "def block_macs(channels, positions, subsample, pool):\n    ci = channels // 2\n"
        "    m = positions // 4 if subsample else positions\n"
        "    return 4 * m * channels * ci + 2 * positions * m * ci",
        "work on every position",
    ),
    (
        "buggy_block",
        "def buggy_block(x, theta, phi, g, w_z):\n    t = x.flatten(2).transpose(1, 2)\n"
        "    s = torch.softmax((t @ theta.T) @ (t @ phi.T).transpose(1, 2), dim=1)\n"
        "    return x + (s @ (t @ g.T) @ w_z.T).transpose(1, 2).reshape(x.shape)",
        "softmax belongs on the keys",
    ),
]


@pytest.mark.parametrize(("name", "source", "words"), LEARNERS)
def test_recognises_a_mistake_however_it_is_written(name, source, words):
    answer = learner(f"non_local.{name}", source)
    for seed in SEEDS:
        result = check(f"non_local.{name}", answer, seed)
        assert result.status == "wrong"
        assert words in result.hint, result
