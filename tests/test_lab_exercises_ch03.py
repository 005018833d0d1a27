"""The exercises of chapter 03: their solutions against the library and PyTorch."""

import pytest
import torch
from torch.nn import functional as F

from attnlab.channel import SqueezeExcite, select
from attnlab.lab.exercises import catalogue
from attnlab.resnet import resnet50, resnet_mini


def solution(name):
    return catalogue()[f"channel.{name}"].solution


def test_the_names_are_those_of_chapter_03():
    names = [exercise.name for exercise in catalogue().values() if exercise.chapter == "03"]
    assert names == [
        "channel.se_parameters",
        "channel.squeeze_excite",
        "channel.effective_kernel",
        "channel.buggy_selection",
    ]


@pytest.mark.parametrize(
    ("factory", "stages"),
    [
        (resnet50, [(3, 256), (4, 512), (6, 1024), (3, 2048)]),
        (resnet_mini, [(1, 16), (1, 32), (1, 64), (1, 128)]),
    ],
)
def test_parameters_are_those_of_the_networks(factory, stages):
    with torch.device("meta"):
        plain, with_se = (
            sum(p.numel() for p in model.parameters())
            for model in (factory(), factory(inside=SqueezeExcite))
        )
    assert solution("se_parameters")(stages, 16, True) == with_se - plain


def test_squeeze_excite_equals_the_module():
    module = SqueezeExcite(12, 4)
    fc1, fc2 = module.fc1, module.fc2
    u = torch.randn(2, 12, 5, 3)
    out = solution("squeeze_excite")(
        u, fc1.weight.flatten(1), fc1.bias, fc2.weight.flatten(1), fc2.bias
    )
    torch.testing.assert_close(out, module(u))


def test_the_effective_kernel_convolves_as_both_branches():
    first, second, share = torch.randn(4, 3, 3), torch.randn(4, 3, 3), torch.rand(4)
    x = torch.randn(2, 4, 9, 8)
    kernel = solution("effective_kernel")(first, second, share)
    got = F.conv2d(x, kernel[:, None], padding=2, groups=4)
    share = share[:, None, None]
    expected = share * F.conv2d(x, first[:, None], padding=1, groups=4) + (1 - share) * F.conv2d(
        x, second[:, None], padding=2, dilation=2, groups=4
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_the_mended_selection_equals_the_librarys():
    for case in catalogue()["channel.buggy_selection"].cases(seed=3):
        branches, logits = case.args
        shares = logits.unflatten(1, (len(branches), -1)).softmax(1)
        torch.testing.assert_close(
            solution("buggy_selection")(branches, logits), select(list(branches), shares)
        )
