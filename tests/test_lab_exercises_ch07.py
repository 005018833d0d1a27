"""The exercises of chapter 07: solutions against the library, and what learners typically write."""

import pytest
import torch
from learners import learner
from torch.testing import assert_close

from attnlab.lab.exercises import catalogue, check
from attnlab.video import cosine_weights, dff_speedup, flow_to_attention, warp


def solution(name: str):
    return catalogue()[f"video.{name}"].solution


def test_the_names_are_those_of_chapter_07():
    names = [exercise.name for exercise in catalogue().values() if exercise.chapter == "07"]
    assert names == [
        "video.speed_up",
        "video.hat_weights",
        "video.frame_weights",
        "video.buggy_warp",
    ]


@pytest.mark.parametrize(("interval", "ratio"), [(1, 0.3), (5, 0.1), (10, 1 / 12.71)])
def test_the_speed_up_is_the_librarys(interval, ratio):
    assert solution("speed_up")(interval, ratio) == pytest.approx(dff_speedup(interval, ratio))


@pytest.mark.parametrize("radius", [1, 3])
def test_hat_weights_are_the_librarys(radius):
    flow = radius * (2 * torch.rand(2, dtype=torch.float64) - 1)
    weights = solution("hat_weights")(flow, radius)
    expected = flow_to_attention(flow.view(1, 2, 1, 1), radius).view_as(weights)
    assert_close(weights, expected, rtol=0, atol=1e-12)
    assert weights.sum().item() == pytest.approx(1)
    assert (weights > 0).sum() <= 4


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_frame_weights_are_the_librarys(temperature):
    embeddings = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    current = torch.randn(4, 5, 6, dtype=torch.float64)
    weights = solution("frame_weights")(embeddings, current, temperature)
    expected = cosine_weights(embeddings[None], current[None], temperature)[0]
    assert_close(weights, expected, rtol=0, atol=1e-10)


def test_the_mended_warp_is_the_librarys():
    features = torch.randn(3, 5, 7, dtype=torch.float64)
    flow = 3 * torch.randn(2, 5, 7, dtype=torch.float64)
    assert_close(
        solution("buggy_warp")(features, flow), warp(features[None], flow[None])[0],
        rtol=0, atol=1e-10,
    )  # fmt: skip


def test_a_flat_map_does_not_betray_the_bug():
    start = catalogue()["video.buggy_warp"].start()
    result = check("video.buggy_warp", start)
    assert result.status == "not attempted"
    assert "Case: zero flow: the map itself." in result.text


def test_nan_for_a_dark_frame_is_recognised():
    answer = learner(
        "video.frame_weights",
        """
def frame_weights(embeddings, current, temperature):
    e = embeddings / embeddings.norm(dim=1, keepdim=True)
    c = current / current.norm(dim=0, keepdim=True)
    return (einsum(e, c, "n d h w, d h w -> n h w") / temperature).softmax(0)
""",
    )
    result = check("video.frame_weights", answer)
    assert (result.status, "NaN" in result.hint) == ("wrong", True)
