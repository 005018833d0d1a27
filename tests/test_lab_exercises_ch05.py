"""The exercises of chapter 05: solutions against the library, and learners' mistakes."""

import pytest
import torch
from learners import learner

from attnlab.context import position_attention
from attnlab.heads import same_class
from attnlab.lab.exercises import catalogue, check


def test_the_first_names_are_those_of_this_file():
    names = [exercise.name for exercise in catalogue().values() if exercise.chapter == "05"]
    assert names[:3] == [
        "context.map_megabytes",
        "context.buggy_position_attention",
        "context.oracle_context",
    ]


def test_the_map_of_the_paper_takes_324_mebibytes():
    solution = catalogue()["context.map_megabytes"].solution
    assert solution(768, 768, 8, 1) == 324.0
    weights = torch.zeros(2, 6 * 4, 6 * 4)
    assert solution(41, 30, 8, 2) == weights.numel() * 4 / 2**20


def test_the_mended_attention_is_the_librarys_and_the_bug_has_its_shape():
    exercise = catalogue()["context.buggy_position_attention"]
    for case in exercise.cases(seed=3):
        expected = position_attention(*case.args)
        torch.testing.assert_close(exercise.solution(*case.args), expected)
        assert exercise.start()(*case.args).shape == expected.shape


def test_the_oracle_is_the_librarys_relation():
    solution = catalogue()["context.oracle_context"].solution
    for case in catalogue()["context.oracle_context"].cases(seed=4):
        x, labels = case.args
        relation = same_class(labels).float()
        relation = relation / relation.sum(-1, keepdim=True)
        expected = torch.einsum("b i j, b c j -> b c i", relation, x.flatten(2)).view_as(x)
        torch.testing.assert_close(solution(x, labels), expected)


LEARNERS = [
    (
        "context.map_megabytes",
        "def map_megabytes(height, width, output_stride, batch):\n"
        "    n = (height // output_stride) * (width // output_stride)\n"
        "    return batch * n * n * 4 / 1024 / 1024",
        "rounded up",
    ),
    (
        "context.map_megabytes",
        "def map_megabytes(height, width, output_stride, batch):\n    import math\n"
        "    n = math.ceil(height / output_stride) * math.ceil(width / output_stride)\n"
        "    return 4 * n**2 / 1024**2",
        "Every image of the batch",
    ),
    (
        "context.buggy_position_attention",
        "def buggy_position_attention(q, k, v):\n    b, c, h, w = v.shape\n"
        "    energy = q.flatten(2).transpose(1, 2) @ k.flatten(2) / q.shape[1] ** 0.5\n"
        "    out = v.flatten(2) @ energy.softmax(-1).transpose(1, 2)\n"
        "    return out.view(b, c, h, w)",
        "does not divide by √d",
    ),
    (
        "context.oracle_context",
        "def oracle_context(x, labels):\n    same = labels.flatten(1)\n"
        "    same = (same[:, :, None] == same[:, None]).float()\n"
        "    return (x.flatten(2) @ same.transpose(1, 2)).view_as(x)",
        "a sum over the class",
    ),
    (
        "context.oracle_context",
        "def oracle_context(x, labels):\n    same = labels.flatten(1)\n"
        "    same = (same[:, :, None] == same[:, None]).float()\n"
        "    same = same / same.sum(-1, keepdim=True)\n"
        "    return (x.flatten(2) @ same.transpose(1, 2)).view_as(x)",
        "255 is no class",
    ),
]


@pytest.mark.parametrize(("name", "source", "words"), LEARNERS)
def test_recognises_a_mistake_however_it_is_written(name, source, words):
    for seed in range(3):
        result = check(name, learner(name, source), seed)
        assert result.status == "wrong"
        assert words in result.hint, result
