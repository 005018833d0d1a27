"""The exercises of chapter 01: solutions against other implementations, and learners' mistakes."""

import pytest
import torch
from learners import learner
from torch import nn

from attnlab.lab.exercises import catalogue, check

SEEDS = range(5)


def test_the_names_are_those_of_chapter_01():
    names = [exercise.name for exercise in catalogue().values() if exercise.chapter == "01"]
    assert names == [
        "attention.entropy",
        "attention.merge_blocks",
        "attention.causal_mask",
        "attention.vit_parameters",
        "attention.buggy_attention",
        "attention.rollout",
    ]


def test_entropy_agrees_with_torch_distributions():
    weights = torch.rand(2, 3, 4, 7).softmax(dim=-1)
    expected = torch.distributions.Categorical(probs=weights).entropy()
    torch.testing.assert_close(catalogue()["attention.entropy"].solution(weights), expected)


def test_merged_blocks_are_the_softmax_over_all_keys():
    scores, values = torch.randn(2, 3, 4, 9).double() * 5, torch.randn(2, 3, 9, 5).double()

    def block(part):
        exponentials = scores[..., part].exp()
        m = scores[..., part].amax(dim=-1)
        l = exponentials.sum(dim=-1) / m.exp()
        return m, l, exponentials @ values[..., part, :] / m.exp()[..., None]

    merge = catalogue()["attention.merge_blocks"].solution
    m, l, o = merge(*merge(*block(slice(0, 2)), *block(slice(2, 3))), *block(slice(3, 9)))
    torch.testing.assert_close(o / l[..., None], scores.softmax(dim=-1) @ values)
    torch.testing.assert_close(m + l.log(), scores.logsumexp(dim=-1))


def test_causal_mask_by_a_loop():
    for queries, keys in [(3, 3), (2, 5), (5, 2), (1, 1)]:
        mask = catalogue()["attention.causal_mask"].solution(queries, keys)
        for i in range(queries):
            for j in range(keys):
                assert mask[i, j] == (j <= keys - queries + i)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("deit_tiny_patch16_224", (192, 12, 16, 224, 1000)),
        ("deit_small_patch16_224", (384, 12, 16, 224, 1000)),
        ("vit_base_patch32_384", (768, 12, 32, 384, 1000)),
    ],
)
def test_vit_parameters_agree_with_timm(name, args):
    import timm

    with torch.device("meta"):
        model = timm.create_model(name)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert catalogue()["attention.vit_parameters"].solution(*args) == count


def test_the_mended_attention_equals_torchs():
    exercise = catalogue()["attention.buggy_attention"]
    for case in exercise.cases(seed=3):
        x, qkv, proj, heads = case.args
        reference = nn.MultiheadAttention(x.shape[-1], heads, bias=False, batch_first=True)
        with torch.no_grad():
            reference.in_proj_weight.copy_(qkv)
            reference.out_proj.weight.copy_(proj)
            expected = reference(x, x, x, need_weights=False)[0]
        torch.testing.assert_close(exercise.solution(*case.args), expected)
        given = exercise.start()(*case.args)
        assert given.shape == expected.shape, "a shape test must not see the bug"


def test_rollout_by_hand():
    first = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).expand(1, 1, 2, 2)
    second = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).expand(1, 1, 2, 2)
    expected = torch.tensor([[[0.5, 0.5], [0.5, 0.5]]])
    rollout = catalogue()["attention.rollout"].solution
    torch.testing.assert_close(rollout([first, second]), expected)
    assert not torch.equal(rollout([first, second]), rollout([second, first]))
    assert torch.equal(rollout([torch.eye(3)[None, None]] * 4), torch.eye(3)[None])


LEARNERS = [
    (
        "attention.entropy",
        "def entropy(weights):\n    return -(weights * torch.log2(weights + 1e-12)).sum(-1)",
        "logarithm to base 2",
    ),
    (
        "attention.entropy",
        "def entropy(weights):\n    p = weights.transpose(-1, -2)\n"
        "    return -(p * (p + 1e-12).log()).sum(-1)",
        "over the queries",
    ),
    (
        "attention.entropy",
        "def entropy(weights):\n    return torch.distributions.Categorical(probs=weights,"
        " validate_args=False).probs.log().mul(weights).sum(-1).neg()",
        "0 · (−∞) is NaN",
    ),
    (
        "attention.merge_blocks",
        "def merge_blocks(m1, l1, o1, m2, l2, o2):\n    m = torch.max(m1, m2)\n"
        "    l = torch.stack([l1, l2]).sum(0)\n    return m, l, o1 + o2",
        "as they came",
    ),
    (
        "attention.merge_blocks",
        "def merge_blocks(m1, l1, o1, m2, l2, o2):\n    m = torch.max(m1, m2)\n"
        "    l = l1 * (m1 - m).exp() + l2 * (m2 - m).exp()\n"
        "    return m, l, torch.stack([o1 / l1[..., None], o2 / l2[..., None]]).mean(0)",
        "average the two outputs",
    ),
    (
        "attention.merge_blocks",
        "def merge_blocks(m1, l1, o1, m2, l2, o2):\n    m = torch.max(m1, m2)\n"
        "    a, b = torch.exp(m1) / torch.exp(m), torch.exp(m2) / torch.exp(m)\n"
        "    return m, a * l1 + b * l2, a.unsqueeze(-1) * o1 + b.unsqueeze(-1) * o2",
        "overflows above 88",
    ),
    (
        "attention.causal_mask",
        "def causal_mask(num_queries, num_keys):\n"
        "    return torch.arange(num_keys)[None] > torch.arange(num_queries)[:, None]",
        "inverted",
    ),
    (
        "attention.causal_mask",
        "def causal_mask(num_queries, num_keys):\n"
        "    return torch.arange(num_keys)[None] <= torch.arange(num_queries)[:, None]",
        "bottom right corner",
    ),
    (
        "attention.causal_mask",
        "def causal_mask(num_queries, num_keys):\n    i = torch.arange(num_queries)[:, None]\n"
        "    return torch.arange(num_keys)[None] < i + num_keys - num_queries",
        "attend to itself",
    ),
    (
        "attention.vit_parameters",
        "def vit_parameters(dim, depth, patch_size, img_size, num_classes):\n"
        "    n = (img_size // patch_size) ** 2\n"
        "    blocks = depth * (12 * dim**2 + 13 * dim)\n"
        "    return 3 * patch_size**2 * dim + dim + blocks + 2 * dim + (dim + 1) * num_classes",
        "class token and the positions",
    ),
    (
        "attention.vit_parameters",
        "def vit_parameters(dim, depth, patch_size, img_size, num_classes):\n"
        "    n = (img_size // patch_size) ** 2\n"
        "    blocks = depth * (11 * dim**2 + 12 * dim)\n"
        "    return (3 * patch_size**2 + 1) * dim + (n + 2) * dim + blocks + 2 * dim"
        " + (dim + 1) * num_classes",
        "then a projection",
    ),
    (
        "attention.vit_parameters",
        "def vit_parameters(dim, depth, patch_size, img_size, num_classes):\n"
        "    n = (img_size // patch_size) ** 2\n"
        "    blocks = depth * (12 * dim**2 + 4 * dim)\n"
        "    return 3 * patch_size**2 * dim + (n + 2) * dim + blocks + 2 * dim"
        " + dim * num_classes",
        "weights without the biases",
    ),
    (
        "attention.buggy_attention",
        "def buggy_attention(x, qkv_weight, proj_weight, num_heads):\n"
        "    b, n, c = x.shape\n"
        "    qkv = (x @ qkv_weight.T).view(b, n, 3, c // num_heads, num_heads)\n"
        "    q, k, v = qkv.permute(2, 0, 4, 1, 3)\n"
        "    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)\n"
        "    return out.permute(0, 2, 3, 1).reshape(b, n, c) @ proj_weight.T",
        "agree with each other",
    ),
    (
        "attention.buggy_attention",
        "def buggy_attention(x, qkv_weight, proj_weight, num_heads):\n"
        "    b, n, c = x.shape\n"
        "    q, k, v = (x @ qkv_weight.T).view(b, n, 3, num_heads, -1).permute(2, 0, 3, 1, 4)\n"
        "    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=c**-0.5)\n"
        "    return out.transpose(1, 2).reshape(b, n, c) @ proj_weight.T",
        "width of a head",
    ),
    (
        "attention.buggy_attention",
        "def buggy_attention(x, qkv_weight, proj_weight, num_heads):\n"
        "    b, n, c = x.shape\n"
        "    q, k, v = (x @ qkv_weight.T).view(b, n, 3, num_heads, -1).permute(2, 0, 3, 1, 4)\n"
        "    scores = q @ k.transpose(-1, -2) / (c // num_heads) ** 0.5\n"
        "    out = torch.softmax(scores, dim=2) @ v\n"
        "    return out.transpose(1, 2).reshape(b, n, c) @ proj_weight.T",
        "belongs on the keys",
    ),
    (
        "attention.rollout",
        "def rollout(maps):\n    maps = [(m.mean(1) + torch.eye(m.shape[-1])) / 2 for m in maps]\n"
        "    result = maps[-1]\n    for m in maps[-2::-1]:\n        result = m @ result\n"
        "    return result",
        "multiplies from the left",
    ),
    (
        "attention.rollout",
        "def rollout(maps):\n    result = maps[0].mean(1)\n    for m in maps[1:]:\n"
        "        result = m.mean(1) @ result\n    return result",
        "residual path is missing",
    ),
    (
        "attention.rollout",
        "def rollout(maps):\n    result = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype)\n"
        "    for m in maps:\n        result = result + m.mean(1) @ result\n    return result",
        "do not sum to 1",
    ),
]


@pytest.mark.parametrize(("name", "source", "words"), LEARNERS)
def test_recognises_a_mistake_however_it_is_written(name, source, words):
    function = learner(name, source)
    for seed in SEEDS:
        result = check(name, function, seed)
        assert result.status == "wrong"
        assert words in result.hint, result


@pytest.mark.parametrize(
    ("name", "source"),
    [
        (
            "attention.entropy",
            "def entropy(p):\n    return -(p * p.clamp(min=1e-9).log()).sum(dim=-1)",
        ),
        (
            "attention.causal_mask",
            "def causal_mask(n, m):\n    rows = [[j <= m - n + i for j in range(m)]"
            " for i in range(n)]\n    return torch.tensor(rows)",
        ),
        (
            "attention.rollout",
            "def rollout(maps):\n    total = None\n    for m in maps:\n"
            "        a = 0.5 * m.mean(1) + 0.5 * torch.eye(m.shape[-1], dtype=m.dtype)\n"
            "        total = a if total is None else torch.bmm(a, total)\n    return total",
        ),
    ],
)
def test_accepts_other_right_ways(name, source):
    assert check(name, learner(name, source)).status == "correct"
