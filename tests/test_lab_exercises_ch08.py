"""The exercises of chapter 08: solutions against the library, and what learners typically write."""

import pytest
import torch
from einops import rearrange
from learners import learner
from torch.testing import assert_close

from attnlab.attention_pooling import AttentionPool
from attnlab.lab import cost
from attnlab.lab.exercises import catalogue, check
from attnlab.patchconvnet import PatchConvNet


def solution(name: str):
    return catalogue()[f"patchconvnet.{name}"].solution


def small_pool(queries: int = 1) -> AttentionPool:
    torch.manual_seed(0)
    return AttentionPool(6, queries, init_std=0.4, init_values=0.5).double()


def test_the_names_are_those_of_chapter_08():
    names = [exercise.name for exercise in catalogue().values() if exercise.chapter == "08"]
    assert names == [
        "patchconvnet.attention_pool",
        "patchconvnet.probe",
        "patchconvnet.parameters",
        "patchconvnet.buggy_maps",
    ]


def test_the_pool_is_the_librarys_first_half():
    pool = small_pool()
    torch.nn.init.zeros_(pool.mlp.fc2.weight)  # no feed-forward: its bias is 0 at the start
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    tokens = torch.cat([pool.cls_token.expand(2, -1, -1), rearrange(x, "b d h w -> b (h w) d")], 1)
    weights = (layer.weight for layer in (pool.q, pool.k, pool.v, pool.proj))
    found = solution("attention_pool")(
        pool.norm1(tokens), pool.cls_token[0, 0], *weights, pool.ls1.gamma
    )
    assert_close(found, pool(x), rtol=0, atol=1e-12)


def test_the_probe_gives_the_librarys_map():
    pool = small_pool()
    torch.nn.init.normal_(pool.q.bias)
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    cls = pool.norm1(pool.cls_token[0, 0])
    p = solution("probe")(cls, pool.q.weight, pool.q.bias, pool.k.weight)
    logits = pool.norm1(rearrange(x, "b d h w -> b h w d")) @ p
    found = rearrange(logits, "b h w -> b (h w)").softmax(-1)
    expected = rearrange(pool.maps(x, normalize=True), "b 1 h w -> b (h w)")
    assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("multiclass", [False, True])
def test_counted_parameters_are_the_models(multiclass):
    with torch.device("meta"):
        model = PatchConvNet(num_classes=7, embed_dim=24, depth=3, multiclass=multiclass)
    assert solution("parameters")(24, 3, 7, multiclass) == cost.parameters(model)


def test_published_counts():
    count = solution("parameters")
    assert count(384, 60, 1_000, False) == 25_231_096
    assert count(384, 60, 1_000, True) == 25_614_712
    assert count(768, 60, 1_000, False) == 99_388_936
    assert count(1024, 120, 1_000, False) == 334_294_376


def test_maps_of_classes_are_the_librarys():
    pool = small_pool(queries=4)
    torch.nn.init.zeros_(pool.q.bias)
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    z = pool.norm1(rearrange(x, "b d h w -> b (h w) d"))
    queries = pool.q(pool.norm1(pool.cls_token[0]))
    found = solution("buggy_maps")(z, queries, pool.k.weight)
    assert_close(found, rearrange(pool.maps(x), "b k h w -> b k (h w)"), rtol=0, atol=1e-12)


def test_the_given_maps_are_ones_for_a_single_class():
    start = catalogue()["patchconvnet.buggy_maps"].start()
    z, queries, w_k = torch.randn(1, 5, 4), torch.randn(1, 4), torch.randn(4, 4)
    assert torch.equal(start(z, queries, w_k), torch.ones(1, 1, 5))
    assert check("patchconvnet.buggy_maps", start).status == "not attempted"


def test_other_right_answers_are_right():
    pooled = learner(
        "patchconvnet.attention_pool",
        "def attention_pool(z, cls, w_q, w_k, w_v, w_o, gamma):\n"
        "    logits = einsum(z @ w_k.T, z[0, 0] @ w_q.T, 'b n d, d -> b n') / len(cls) ** 0.5\n"
        "    mean = einsum(logits.softmax(1), z, 'b n, b n d -> b d')\n"
        "    return cls + gamma * (mean @ w_v.T @ w_o.T)\n",
    )
    assert check("patchconvnet.attention_pool", pooled).status == "correct"
    maps = learner(
        "patchconvnet.buggy_maps",
        "def buggy_maps(z, queries, w_k):\n"
        "    q = queries[None].expand(len(z), -1, -1)\n"
        "    return (q @ (z @ w_k.T).mT / z.shape[-1] ** 0.5).softmax(-1)\n",
    )
    assert check("patchconvnet.buggy_maps", maps).status == "correct"
