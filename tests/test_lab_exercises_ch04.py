"""The exercises of chapter 04: solutions against the library, and what learners typically write."""

import pytest
import torch
from learners import learner
from torch import nn
from torch.testing import assert_close

from attnlab.cbam import CBAM, SpatialAttention, cbam_resnet50
from attnlab.lab.exercises import catalogue, check
from attnlab.resnet import resnet50


def solution(name: str):
    return catalogue()[f"cbam.{name}"].solution


def test_the_names_are_those_of_chapter_04():
    names = [exercise.name for exercise in catalogue().values() if exercise.chapter == "04"]
    assert names == [
        "cbam.channel_gate",
        "cbam.spatial_gate",
        "cbam.extra_parameters",
        "cbam.port_official",
        "cbam.buggy_cbam",
    ]


@pytest.fixture
def module():
    torch.manual_seed(0)
    module = CBAM(8, 2, spatial_norm=None)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def test_the_gates_equal_the_librarys(module):
    x = torch.randn(2, 8, 5, 6)
    fc1, fc2 = module.channel.fc1, module.channel.fc2
    weights = fc1.weight.flatten(1), fc1.bias, fc2.weight.flatten(1), fc2.bias
    gate = solution("channel_gate")(x, *weights)
    assert_close(gate, module.channel.gate(x).flatten(1))
    assert_close(solution("spatial_gate")(x, module.spatial.conv.weight), module.spatial.gate(x))


def test_the_mended_cbam_equals_the_librarys(module):
    x = torch.randn(2, 8, 5, 6)
    nn.init.zeros_(module.channel.fc1.bias)
    nn.init.zeros_(module.channel.fc2.bias)
    weights = module.channel.fc1.weight.flatten(1), module.channel.fc2.weight.flatten(1)
    exercise = catalogue()["cbam.buggy_cbam"]
    mended = exercise.solution(x, *weights, module.spatial.conv.weight)
    assert_close(mended, module(x))
    given = exercise.start()(x, *weights, module.spatial.conv.weight)
    assert given.shape == mended.shape, "a shape test must not see the bug"
    assert (given - mended).abs().max() > 1e-3


def test_the_count_is_that_of_the_built_network():
    with torch.device("meta"):
        plain, built = (
            sum(parameter.numel() for parameter in factory().parameters())
            for factory in (resnet50, cbam_resnet50)
        )
    stages = [(3, 256), (4, 512), (6, 1024), (3, 2048)]
    assert plain + solution("extra_parameters")(stages) == built == 28_089_624


def test_the_ported_weights_compute_the_same():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 9, 9)
    gate = SpatialAttention().eval()
    for value in gate.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5)
    bn = gate.bn
    norm = bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps
    official = gate.conv.weight.flip(1)  # the official code reads [max, mean]
    fc1, conv, bias = solution("port_official")(torch.ones(2, 8), official, *norm)
    assert fc1.shape == (2, 8, 1, 1)
    pooled = torch.stack([x.mean(1), x.amax(1)], 1)
    assert_close(torch.conv2d(pooled, conv, bias, padding=3).sigmoid(), gate.gate(x))


LEARNERS = [
    (
        "cbam.channel_gate",
        "def channel_gate(x, w1, b1, w2, b2):\n"
        "    z = x.flatten(2).mean(-1) + x.flatten(2).max(-1).values\n"
        "    return torch.sigmoid(torch.relu(z @ w1.T + b1) @ w2.T + b2)",
        "before the MLP",
    ),
    (
        "cbam.channel_gate",
        "def channel_gate(x, w1, b1, w2, b2):\n"
        "    mlp = lambda z: torch.relu(z @ w1.T + b1) @ w2.T + b2\n"
        "    return mlp(x.mean((2, 3))).sigmoid() + mlp(x.amax((2, 3))).sigmoid()",
        "two sigmoids",
    ),
    (
        "cbam.spatial_gate",
        "def spatial_gate(x, weight):\n"
        "    both = torch.cat([x.max(1, keepdim=True)[0], x.mean(1, keepdim=True)], 1)\n"
        "    return torch.conv2d(both, weight, padding=weight.shape[-1] // 2).sigmoid()",
        "other way round",
    ),
    (
        "cbam.port_official",
        "def port_official(mlp_1, conv, gamma, beta, mean, var, eps):\n"
        "    scale = gamma * (var + eps).rsqrt()\n"
        "    return mlp_1[..., None, None], scale * conv, beta - scale * mean",
        "maximum first",
    ),
    (
        "cbam.port_official",
        "def port_official(mlp_1, conv, gamma, beta, mean, var, eps):\n"
        "    scale = gamma * (var + eps).rsqrt()\n"
        "    return mlp_1, scale * conv[:, [1, 0]], beta - scale * mean",
        "four axes",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "source", "words"), LEARNERS)
def test_other_ways_to_write_a_mistake_get_its_hint(name, source, words):
    for seed in range(5):
        result = check(name, learner(name, source), seed)
        assert result.status == "wrong"
        assert words in result.hint
