"""Scaled dot-product and multi-head attention against the formula, PyTorch and their invariants."""

import math

import battery
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attnlab import kernels, record
from attnlab.attention import (
    MultiHeadAttention,
    attention_weights,
    blockwise_attention,
    scaled_dot_product_attention,
)

IMPLS = ("explicit", "fused", "blockwise", "auto")


def qkv(N=5, M=7, d=3, dv=4, device="cpu", dtype=torch.float64, seed=0):
    """Queries (2, 2, N, d), keys (2, 2, M, d) and values (2, 2, M, dv)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, 2, N, d), (2, 2, M, d), (2, 2, M, dv)
    return [torch.randn(shape, generator=generator, dtype=dtype).to(device) for shape in shapes]


def loop(q, k, v, mask=None, scale=None):
    """The formula, one number at a time; a Boolean mask only."""
    B, h, N, d = q.shape
    scale = 1 / math.sqrt(d) if scale is None else scale
    mask = torch.ones(B, h, N, k.shape[2]) if mask is None else mask.expand(B, h, N, k.shape[2])
    out = []
    for b in range(B):
        for head in range(h):
            for i in range(N):
                keys = [j for j in range(k.shape[2]) if mask[b, head, i, j]]
                terms = [(scale * (q[b, head, i] * k[b, head, j]).sum()).exp() for j in keys]
                row = 0.0 * v[b, head, 0]
                for j, term in zip(keys, terms, strict=True):
                    row = row + term / sum(terms) * v[b, head, j]
                out.append(row)
    return torch.stack(out).view(B, h, N, -1)


def masks(device="cpu", N=5, M=7):
    """Boolean masks of every shape that broadcasts; the first has rows that may attend nowhere."""
    some = torch.rand(2, 2, N, M, generator=torch.Generator().manual_seed(1)) > 0.4
    some[0, 1, 2] = False
    some[1, :, 0] = False
    causal = torch.ones(N, M, dtype=torch.bool).tril()
    shapes = [some, some[:, :1], some[0], some[:1, :1, :1], causal, some[0, 0, 0], some[..., :1]]
    return [mask.to(device) for mask in shapes]


@pytest.mark.parametrize("impl", IMPLS)
def test_equals_the_loop_from_the_formula(impl, device):
    def check(**options):
        def ours(q, k, v):
            return scaled_dot_product_attention(q, k, v, impl=impl, **options)

        battery.check_matches(ours, lambda q, k, v: loop(q, k, v, **options), *qkv(device=device))

    check()
    check(scale=0.3)
    for mask in masks(device):
        check(mask=mask)
    check(mask=masks(device)[0], scale=-1.0)


@pytest.mark.parametrize("impl", IMPLS)
def test_equals_pytorch_with_a_learned_float_mask(impl, device):
    bias = torch.randn(2, 1, 5, 7, dtype=torch.float64, device=device)
    for shape in ((2, 1, 5, 7), (5, 7), (1, 2, 1, 7), (2, 1, 5, 1), (7,)):
        mask = bias.flatten()[: math.prod(shape)].view(shape)
        battery.check_matches(
            lambda q, k, v, mask: scaled_dot_product_attention(q, k, v, mask=mask, impl=impl),
            lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask.expand(2, 2, 5, 7)),
            *qkv(device=device),
            mask,
        )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_row_that_may_attend_nowhere_is_zero_and_sends_no_gradient(impl, kind, device):
    mask = masks(device)[0]
    if kind == "float":
        mask = torch.zeros_like(mask, dtype=torch.float64).masked_fill(~mask, -math.inf)
        mask.requires_grad_()
    q, k, v = (x.requires_grad_() for x in qkv(device=device))
    out = scaled_dot_product_attention(q, k, v, mask=mask, impl=impl)
    out.square().sum().backward()
    assert (out[1, :, 0] == 0).all()
    assert (q.grad[1, :, 0] == 0).all()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    assert kind == "bool" or mask.grad.isfinite().all()


def test_true_means_may_attend_which_is_the_opposite_of_multihead_attention(device):
    theirs = nn.MultiheadAttention(6, 2, batch_first=True, device=device, dtype=torch.float64)
    ours = like_pytorch(theirs)
    x = torch.randn(2, 5, 6, device=device, dtype=torch.float64)
    causal = torch.ones(5, 5, dtype=torch.bool, device=device).tril()
    expected = theirs(x, x, x, attn_mask=~causal, need_weights=False)[0]
    torch.testing.assert_close(ours(x, mask=causal), expected, atol=1e-9, rtol=0)


@given(seed=st.integers(0, 10**6), N=st.integers(1, 6), M=st.integers(1, 6), scale=st.floats(-3, 3))
@settings(max_examples=25, deadline=None)
def test_invariants(seed, N, M, scale):
    q, k, v = qkv(N, M, seed=seed)
    weights = attention_weights(q, k, scale=scale)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, N, dtype=torch.float64))

    out = scaled_dot_product_attention(q, k, v, scale=scale)
    low, high = v.amin(2, keepdim=True) - 1e-9, v.amax(2, keepdim=True) + 1e-9
    assert ((low <= out) & (out <= high)).all(), "outside the hull of the values"

    queries, keys = torch.randperm(N), torch.randperm(M)
    shuffled = scaled_dot_product_attention(
        q[:, :, queries], k[:, :, keys], v[:, :, keys], scale=scale
    )
    torch.testing.assert_close(shuffled, out[:, :, queries], atol=1e-9, rtol=0)

    # The same number added to all scores of a row: what a bias of the keys does.
    shifted = scaled_dot_product_attention(q, k + torch.ones_like(k[:, :, :1]), v, scale=scale)
    torch.testing.assert_close(shifted, out, atol=1e-9, rtol=0)


def test_limits():
    q, k, v = qkv()
    mean = v.mean(2, keepdim=True).expand(-1, -1, 5, -1)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, scale=0.0), mean)
    same_keys = k[:, :, :1].expand_as(k)
    torch.testing.assert_close(scaled_dot_product_attention(q, same_keys, v), mean)
    one = scaled_dot_product_attention(q, k[:, :, :1], v[:, :, :1])
    torch.testing.assert_close(one, v[:, :, :1].expand_as(one))
    best = (q @ k.mT).argmax(-1, keepdim=True).expand(-1, -1, -1, 4)
    hard = scaled_dot_product_attention(q, k, v, scale=1e5)
    torch.testing.assert_close(hard, v.gather(2, best))


def test_the_scale_keeps_the_variance_of_the_scores_at_one():
    q, k = (torch.randn(8, 196, 256, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    scores = kernels.scores_of(q, k, None, 256**-0.5)
    assert scores.var().item() == pytest.approx(1.0, rel=0.05)
    torch.testing.assert_close(attention_weights(q, k), scores.softmax(-1))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_float32_on_the_same_inputs(impl, dtype, device):
    q, k, v = (x.to(dtype) for x in qkv(64, 65, 16, 16, device=device))
    # Logits around 400: far beyond what exp can take without subtracting the row's maximum.
    for factor in (1.0, 100.0):
        out = scaled_dot_product_attention(factor * q, k, v, impl=impl)
        exact = scaled_dot_product_attention((factor * q).float(), k.float(), v.float())
        assert out.dtype == dtype
        error = ((out.float() - exact).norm() / exact.norm()).item()
        assert error < (0.02 if factor == 1.0 else 0.2)
    weights = attention_weights(q, k)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 64, device=device))


@pytest.mark.parametrize("impl", ["explicit", "fused"])
def test_dropout_keeps_the_mean_and_drops_the_share(impl, device):
    torch.manual_seed(0)
    q, k = torch.zeros(1, 1, 400, 8, device=device), torch.zeros(1, 1, 300, 8, device=device)
    v = torch.eye(300, device=device)[None, None]
    weights = scaled_dot_product_attention(q, k, v, dropout_p=0.25, impl=impl) * 300
    assert (weights == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert weights.mean().item() == pytest.approx(1.0, abs=0.01)


@given(seed=st.integers(0, 10**6), M=st.integers(1, 12), block_size=st.integers(1, 13))
@settings(max_examples=25, deadline=None)
def test_blockwise_is_exact_for_every_block_size(seed, M, block_size):
    q, k, v = qkv(M=M, seed=seed)
    mask = torch.rand(2, 1, 5, M) > 0.5
    out = blockwise_attention(q, k, v, mask=mask, block_size=block_size)
    torch.testing.assert_close(out, loop(q, k, v, mask), atol=1e-12, rtol=0)


def test_block_states_merge_in_any_order():
    q, k, v = qkv()
    scores = kernels.scores_of(q, k, None, 0.5)
    scores[..., 2:4] = -math.inf  # a block without any admissible key
    blocks = [slice(0, 2), slice(2, 4), slice(4, 7)]
    states = [kernels.block_state(scores[..., block], v[:, :, block]) for block in blocks]
    for a, b, c in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        merged = kernels.merge_states(kernels.merge_states(states[a], states[b]), states[c])
        for got, expected in zip(merged, kernels.block_state(scores, v), strict=True):
            torch.testing.assert_close(got, expected)


def test_gradients_of_blockwise_attention(device):
    q, k, v = qkv(3, 5, 2, 2, device=device)
    mask = torch.randn(1, 2, 3, 1, dtype=torch.float64, device=device)
    inputs = [x[:1].requires_grad_() for x in (q, k, v, mask)]

    def attend(q, k, v, mask):
        return blockwise_attention(q, k, v, mask=mask, block_size=2)

    assert torch.autograd.gradcheck(attend, inputs)
    assert torch.autograd.gradgradcheck(attend, inputs)


def test_the_log_sum_exp_is_differentiable_too():
    def log_sum_exp(q, k):
        return kernels._online_softmax(q, k, k, None, 0.7, 3)[1]

    q, k, _ = qkv()
    battery.check_matches(log_sum_exp, lambda q, k: (0.7 * q @ k.mT).logsumexp(-1, True), q, k)


@pytest.mark.parametrize(("impl", "materialises"), [("explicit", True), ("fused", False),
                                                    ("blockwise", False)])  # fmt: skip
def test_what_training_keeps(impl, materialises):
    """Only the explicit form keeps an N×M matrix for the backward pass."""
    q, k, v = (x.requires_grad_() for x in qkv(256, 256, 8, 8, dtype=torch.float32))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        scaled_dot_product_attention(q, k, v, impl=impl)
    assert (max(kept) >= 4 * 256 * 256) is materialises


def test_auto_follows_the_measured_thresholds(monkeypatch):
    monkeypatch.setitem(kernels.FUSED_FROM, "cpu", (20, 40))
    took = []
    fused = kernels.fused_attention
    monkeypatch.setattr(
        "attnlab.attention.fused_attention", lambda *a, **k: took.append(1) or fused(*a, **k)
    )
    for M, gradients, expected in ((4, False, True), (3, False, False), (7, True, False),
                                   (8, True, True)):  # fmt: skip
        q, k, v = qkv(M=M)
        took.clear()
        scaled_dot_product_attention(q.requires_grad_(gradients), k, v)
        assert bool(took) is expected
        took.clear()
        with torch.no_grad():
            scaled_dot_product_attention(q, k, v)
        assert bool(took) is (5 * M >= 20)


def test_bad_input_to_the_functions():
    q, k, v = qkv()
    wrong_mask = torch.ones(2, 2, 7, 5, dtype=torch.bool)
    attend = scaled_dot_product_attention
    cases = [
        (lambda: attend(q, k[..., :2], v), "k (2, 2, 7, 2), v (2, 2, 7, 4): expected q and k of"),
        (lambda: attend(q, k, v[:, :, :6]), "expected as many values as keys M"),
        (lambda: attend(q, k[:, :, :0], v[:, :, :0]), "and at least one"),
        (lambda: attend(q, k[:1], v), "expected (..., N, d), (..., M, d), (..., M, dv)"),
        (lambda: attend(q[0, 0, 0], k, v), "q (3,), k (2, 2, 7, 3)"),
        (lambda: attend(q, k, v, mask=wrong_mask), "mask (2, 2, 7, 5): expected a shape that"),
        (lambda: attend(q, k, v, mask=wrong_mask[None]), "broadcasts to (2, 2, 5, 7)"),
        (
            lambda: attend(q, k, v, mask=wrong_mask.int()),
            "mask of dtype torch.int32: expected bool",
        ),
        (lambda: attend(q, k, v, impl="flash"), "impl='flash': expected one of auto, explicit"),
        (lambda: attend(q, k, v, dropout_p=1.0), "dropout_p=1.0: expected a probability in [0, 1)"),
        (lambda: attend(q, k, v, dropout_p=0.1, impl="blockwise"), "expected 0.0 with impl="),
        (lambda: attention_weights(q, k[..., :2]), "expected q and k of the same width"),
        (lambda: blockwise_attention(q, k, v, block_size=0), "block_size=0: expected at least 1"),
        (lambda: blockwise_attention(q, k, v[:1]), "v (1, 2, 7, 4): expected"),
    ]
    battery.check_errors(cases)


def like_pytorch(theirs: nn.MultiheadAttention) -> MultiHeadAttention:
    """Our module with the weights, randomised, of PyTorch's."""
    battery.randomize(theirs)
    ours = MultiHeadAttention(theirs.embed_dim, theirs.num_heads).to(theirs.in_proj_weight)
    ours.load_state_dict({
        "qkv.weight": theirs.in_proj_weight, "qkv.bias": theirs.in_proj_bias,
        "proj.weight": theirs.out_proj.weight, "proj.bias": theirs.out_proj.bias,
    })  # fmt: skip
    return ours


def test_equals_multihead_attention_of_pytorch(device):
    theirs = nn.MultiheadAttention(12, 3, batch_first=True, device=device, dtype=torch.float64)
    ours = like_pytorch(theirs)
    x, z = torch.randn(2, 5, 12, device=device), torch.randn(2, 7, 12, device=device)
    padding = torch.rand(2, 7, device=device) > 0.3
    padding[:, 0] = True
    battery.check_matches(ours, lambda x: theirs(x, x, x)[0], x)
    battery.check_matches(ours, lambda x, z: theirs(x, z, z)[0], x, z)
    battery.check_matches(
        lambda x, z: ours(x, z, mask=padding[:, None, None, :]),
        lambda x, z: theirs(x, z, z, key_padding_mask=~padding)[0],
        x,
        z,
    )
    weights = theirs(x.double(), z.double(), z.double(), average_attn_weights=False)[1]
    with record(ours) as maps:
        ours(x.double(), z.double())
    torch.testing.assert_close(maps[""], weights.detach(), atol=1e-9, rtol=0)


def test_the_bias_of_the_keys_has_no_effect_and_that_of_the_queries_has(device):
    module = battery.randomize(MultiHeadAttention(12, 3)).to(device).double()
    x = torch.randn(2, 5, 12, device=device, dtype=torch.float64)
    module(x).square().sum().backward()
    q_bias, k_bias, _ = module.qkv.bias.grad.chunk(3)
    assert k_bias.abs().max() < 1e-12 < 1e-3 < q_bias.abs().max()


def test_one_head_with_identity_weights_is_the_formula():
    module = MultiHeadAttention(6, num_heads=1, qkv_bias=False).double()
    with torch.no_grad():
        module.qkv.weight.copy_(torch.eye(6).repeat(3, 1))
        module.proj.weight.copy_(torch.eye(6))
        module.proj.bias.zero_()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    expected = (x @ x.mT / math.sqrt(6)).softmax(-1) @ x
    torch.testing.assert_close(module(x), expected, atol=1e-12, rtol=0)


def test_multi_head_attention_passes_the_battery(device):
    x = torch.randn(3, 9, 12, device=device)
    sizes = [((x[:1],), (1, 9, 12)), ((x[:2, :4],), (2, 4, 12))]
    errors = [
        (lambda: MultiHeadAttention(12, 5), "dim=12: expected a multiple of num_heads=5"),
        (lambda: MultiHeadAttention(12, 0), "dim=12: expected a multiple of num_heads=0"),
        (lambda: MultiHeadAttention(12, 3, impl="x"), "impl='x': expected one of auto"),
        (lambda: MultiHeadAttention(12, 3)(x[0].cpu()), "x (9, 12): expected (B, tokens, dim=12)"),
        (lambda: MultiHeadAttention(12, 3)(x.cpu(), x[:2].cpu()), "context (2, 9, 12): expected"),
    ]
    battery.battery(
        lambda: MultiHeadAttention(12, 3).to(device),
        x,
        impls=IMPLS,
        parameters=4 * 12**2 + 4 * 12,
        sizes=sizes,
        errors=errors,
    )


def test_cross_attention_with_a_mask_passes_the_battery(device):
    x, z = torch.randn(3, 5, 12, device=device), torch.randn(3, 9, 12, device=device)
    mask = (torch.rand(5, 9, device=device) > 0.4) | torch.eye(5, 9, device=device).bool()
    make = lambda: MultiHeadAttention(12, 3, qkv_bias=False).to(device)  # noqa: E731
    battery.battery(make, x, z, impls=IMPLS, mask=mask, parameters=4 * 12**2 + 12)


@pytest.mark.parametrize("impl", ["explicit", "fused", "blockwise"])
def test_every_form_compiles_in_one_graph(impl, device):
    module = MultiHeadAttention(12, 3, impl=impl).to(device)
    battery.check_compiles(module, torch.randn(2, 9, 12, device=device))


@pytest.mark.parametrize("impl", ["explicit", "fused"])
def test_dropout_is_for_training_only(impl, device):
    torch.manual_seed(0)
    module = MultiHeadAttention(12, 3, attn_drop=0.5, impl=impl).to(device)
    x = torch.randn(2, 9, 12, device=device)
    assert not torch.equal(module(x), module(x))
    module.eval()
    torch.testing.assert_close(module(x), module(x), atol=0, rtol=0)
