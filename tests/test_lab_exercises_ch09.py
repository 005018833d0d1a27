"""The exercises of chapter 09: solutions against the library, and what learners typically write."""

import pytest
import torch
from learners import learner
from torch.testing import assert_close

from attnlab.attention import attention_weights
from attnlab.dependency_pruning import Stage, restore
from attnlab.dependency_trees import DependencyTree
from attnlab.lab.exercises import catalogue, check
from attnlab.reversed_attention import reverse, reversed_attention


def solution(name: str):
    return catalogue()[f"dependency.{name}"].solution


def test_the_names_are_those_of_chapter_09():
    names = [exercise.name for exercise in catalogue().values() if exercise.chapter == "09"]
    assert names == [
        "dependency.soft_mask",
        "dependency.depths",
        "dependency.gradients",
        "dependency.restore_tokens",
        "dependency.buggy_reversed",
    ]


def drawn(B=2, heads=3, N=5, d=4):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, B, heads, N, d, dtype=torch.float64)
    P = torch.randn(B, heads, N, dtype=torch.float64).softmax(1)
    return q, k, v, P, torch.rand(B, N, dtype=torch.float64)


def test_the_mask_is_the_librarys():
    q, k, _, P, M = drawn()
    weights = attention_weights(q, k)
    mask = solution("soft_mask")(weights, P, M)
    assert_close(mask, reverse(weights, P, M).sum(1))
    assert_close(mask.sum(1), M)


def test_the_depths_are_the_librarys():
    for parents in ([-1, 0, 1, 0], [2, -1, 1, 0, 1], [1, 0, 1, -1]):
        tree = DependencyTree(torch.tensor(parents), torch.zeros(len(parents)))
        assert solution("depths")(parents) == tree.depth.tolist()


def test_the_gradients_are_autograds():
    torch.manual_seed(0)
    scores, u = torch.randn(5, 5, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    grad = torch.randn(5, 3)
    weights = scores.softmax(-1)
    du, dS = torch.autograd.grad(weights.T @ u, (u, scores), grad)
    found = solution("gradients")(weights, u, grad)
    assert_close(found, (du, dS))


def test_restored_tokens_are_the_librarys():
    for case in catalogue()["dependency.restore_tokens"].cases(0):
        x, stages = case.args
        batched = tuple(Stage(*(part[None] for part in stage)) for stage in stages)
        assert_close(solution("restore_tokens")(x, stages), restore(x[None], batched)[0])


def test_the_mended_code_is_the_library_and_the_bug_makes_the_gate_inert():
    q, k, v, P, M = drawn()
    exercise = catalogue()["dependency.buggy_reversed"]
    assert_close(exercise.solution(q, k, v, P, M), reversed_attention(q, k, v, P, M))
    given = exercise.start()
    assert_close(given(q, k, v, P, M), given(q, k, v, P, M / 100))


LEARNERS = [
    (
        "dependency.soft_mask",
        "def soft_mask(weights, head_probs, messages):\n"
        "    sent = head_probs * messages[:, None]\n"
        "    return (weights * sent[..., None]).sum(1)",
        "Transpose",
    ),
    (
        "dependency.soft_mask",
        "def soft_mask(weights, head_probs, messages):\n"
        "    return (weights.mT * head_probs[:, :, None] * messages[:, None, None]).mean(1)",
        "do not average",
    ),
    (
        "dependency.depths",
        "def depths(parents):\n"
        "    found = []\n"
        "    for token in range(len(parents)):\n"
        "        steps = 0\n"
        "        while parents[token] >= 0 and steps < len(parents):\n"
        "            token, steps = parents[token], steps + 1\n"
        "        found.append(steps)\n"
        "    return found",
        "until you gave up",
    ),
    (
        "dependency.gradients",
        "def gradients(weights, u, grad):\n"
        "    return torch.einsum('ij,jd->id', weights, grad), weights * (u @ grad.mT)",
        "couples its row",
    ),
    (
        "dependency.buggy_reversed",
        "def buggy_reversed(q, k, v, head_probs, messages):\n"
        "    sent = head_probs * messages[:, None]\n"
        "    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1) * sent[:, :, None]\n"
        "    return weights.mT @ v",
        "factor of row i",
    ),
]


@pytest.mark.parametrize(("name", "source", "words"), LEARNERS)
def test_other_ways_to_write_a_mistake_get_its_hint(name, source, words):
    for seed in range(5):
        result = check(name, learner(name, source), seed)
        assert result.status == "wrong"
        assert words in result.hint
