"""Attention pooling and its neighbours against loops, timm's modules and their limiting cases."""

import math

import battery
import pytest
import timm
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.cait import LayerScaleBlockClassAttn
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import attnlab
from attnlab import pooling
from attnlab.attention_pooling import IMPLS, AttentionPool, collapsed_macs
from attnlab.layers import LayerNorm
from attnlab.resnet import GlobalAveragePool, resnet50, resnet_mini

quick = settings(max_examples=12, deadline=None, derandomize=True)
SHAPES = [{}, {"queries": 3}, {"queries": 3, "cls_in_keys": True}, {"cls_in_keys": False},
          {"num_heads": 2}, {"queries": 7, "num_heads": 4}, {"qkv_bias": False},
          {"queries": 7, "cls_in_keys": True}]  # fmt: skip


def randn(*shape, seed=0, device="cpu", dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype).to(device)


def made(dim=8, device="cpu", **options) -> AttentionPool:
    pool = battery.randomize(AttentionPool(dim, **{"init_values": 0.5} | options))
    return pool.double().eval().to(device)


def loop(pool: AttentionPool, x):
    """The equations of the module's docstring, one query and one head at a time."""
    (batch, _, h, w), e = x.shape, x.shape[1] // pool.num_heads
    images = []
    for image in range(batch):
        places = [x[image, :, i, j] for i in range(h) for j in range(w)]
        outs = []
        for c in pool.cls_token[0]:
            keys = [*(pool.cls_token[0] if pool.cls_in_keys else []), *places]
            z = [pool.norm1(key) for key in keys]
            heads = []
            for m in range(pool.num_heads):
                own = slice(m * e, (m + 1) * e)
                q = pool.q(pool.norm1(c))[own]
                a = torch.stack([q @ pool.k(key)[own] / math.sqrt(e) for key in z]).softmax(0)
                heads.append(sum(a_n * pool.v(z_n)[own] for a_n, z_n in zip(a, z, strict=True)))
            c = c + pool.ls1.gamma * pool.proj(torch.cat(heads))
            outs.append(c + pool.ls2.gamma * pool.mlp(pool.norm2(c)))
        images.append(torch.stack(outs))
    out = torch.stack(images)
    return out[:, 0] if out.shape[1] == 1 else out


# The forms


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", SHAPES)
def test_equals_the_loop_from_the_formula(options, impl, device):
    pool = made(device=device, impl=impl, **options)
    reference = lambda x: loop(pool, x)  # noqa: E731
    battery.check_matches(pool, reference, randn(2, 8, 2, 3, device=device))


@pytest.mark.parametrize("options", SHAPES)
def test_battery(options, device):
    def make():
        return AttentionPool(8, **{"init_values": 0.5} | options).to(device)

    queries = options.get("queries", 1)
    out = (8,) if queries == 1 else (queries, 8)
    biases = 0 if options.get("qkv_bias", True) else -3 * 8
    x = randn(2, 8, 2, 3, device=device, dtype=torch.float32)
    battery.battery(
        make, x, impls=IMPLS, parameters=10 * 8**2 + 14 * 8 + queries * 8 + biases,
        sizes=[((x,), (2, *out)), ((x[:1, :, :, :1],), (1, *out))], grid=(2, 3),
        compiles=options in ({}, {"queries": 7, "num_heads": 4}),
    )  # fmt: skip


@quick
@given(
    seed=st.integers(0, 10**6), queries=st.sampled_from([1, 2, 7, 13]), heads=st.integers(1, 2),
    h=st.integers(1, 4), w=st.integers(1, 4), batch=st.integers(1, 3), keys=st.booleans(),
)  # fmt: skip
def test_all_forms_are_equal_and_weights_are_a_softmax(seed, queries, heads, h, w, batch, keys):
    pool = made(queries=queries, num_heads=heads, cls_in_keys=keys)
    x, outs = randn(batch, 8, h, w, seed=seed), {}
    for impl in IMPLS:
        outs[impl] = battery.with_impl(pool, impl).tokens(x)
        torch.testing.assert_close(outs[impl], outs["auto"], atol=1e-9, rtol=0)
    with attnlab.record(pool) as maps:
        pool(x)
    weights = maps[""]
    assert weights.shape == (batch, heads, queries, h * w + keys * queries)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    places = pool.maps(x)
    assert places.shape == (batch, queries, h, w)
    torch.testing.assert_close(places.flatten(2), weights[..., -h * w :].mean(1))
    ones = torch.ones(batch, queries).double()
    torch.testing.assert_close(pool.maps(x, normalize=True).sum((2, 3)), ones)
    if not keys:
        torch.testing.assert_close(places.sum((2, 3)), ones)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("num_heads", [1, 4])
def test_equals_timms_class_attention_key_for_key(num_heads, impl, device):
    """CaiT's block, which reads the class token and the places as one sequence."""
    theirs = LayerScaleBlockClassAttn(16, num_heads, 3.0, qkv_bias=True, norm_layer=LayerNorm)
    theirs = battery.randomize(theirs).double().to(device)
    pool = made(16, device=device, num_heads=num_heads, impl=impl)
    loaded = pool.load_state_dict(theirs.state_dict(), strict=False)
    assert (loaded.missing_keys, loaded.unexpected_keys) == (["cls_token"], [])

    def reference(x):
        cls = pool.cls_token.expand(len(x), -1, -1)
        return theirs(rearrange(x, "b c h w -> b (h w) c"), cls)[:, 0]

    battery.check_matches(pool, reference, randn(2, 16, 3, 5, device=device))


def test_two_in_a_row_have_a_query_that_depends_on_the_image():
    """CaiT's second block is asked by what the first made of an image; ours, by a constant."""
    pool, x = made(), randn(2, 8, 3, 3)
    with torch.no_grad():
        pool.cls_token.copy_(pool(x)[:1, None])
    again = pool.maps(x)
    with torch.no_grad():
        pool.cls_token.copy_(pool(x)[1:, None])
    assert (pool.maps(x) - again).abs().max() > 1e-3


# What it costs


def macs(pool, *shape) -> int:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        pool(torch.empty(shape))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(("batch", "dim", "queries", "side"), [
    (1, 384, 1, 14), (16, 384, 1, 14), (2, 2048, 1, 7), (1, 64, 300, 8), (16, 64, 300, 8),
    (4, 384, 1000, 14),
])  # fmt: skip
def test_multiply_adds_are_the_closed_forms_and_auto_saves_a_tenth(batch, dim, queries, side):
    counted = {}
    with torch.device("meta"):
        for impl in IMPLS:
            pool = AttentionPool(dim, queries, impl=impl)
            counted[impl] = macs(pool, batch, dim, side, side)
    keys = side**2 + (queries == 1)
    rest = queries * dim**2 + batch * queries * dim**2 * 7  # q, and proj and the 3d network
    written, collapsed = collapsed_macs(batch, dim, queries, keys)
    assert counted["explicit"] == counted["fused"] == rest + written
    # What the class vectors cost once and not for each image, and the bias of the keys.
    assert counted["collapsed"] == pytest.approx(rest + collapsed, rel=0.01)
    assert counted["auto"] == counted["collapsed" if collapsed < 0.9 * written else "explicit"]


def test_collapsing_saves_what_the_spec_says():
    """Keys, values and weighted mean of one image: 58.5 M → 0.74 M, and 428 M → 17.0 M."""
    for dim, places, before, after in ((384, 196, 58.5, 0.74), (2048, 49, 428, 17.0)):
        written, collapsed = collapsed_macs(1, dim, 1, places + 1)
        q_and_proj = 2 * dim**2
        assert (written + q_and_proj) / 1e6 == pytest.approx(before, rel=5e-3)
        assert (collapsed + q_and_proj) / 1e6 == pytest.approx(after, rel=5e-3)


def test_resnet50_with_attention_pooling_costs_what_was_published():
    """4.1 → 4.6 billion multiply-adds and 25.6 → 67.5 million parameters; collapsed, 4.13."""
    with torch.device("meta"):
        plain, explicit, collapsed = (
            resnet50(), resnet50(pool=AttentionPool(2048, impl="explicit")),
            resnet50(pool=AttentionPool(2048)),
        )  # fmt: skip
        cost = [macs(model, 1, 3, 224, 224) / 1e9 for model in (plain, explicit, collapsed)]
    assert cost[0] == pytest.approx(4.089, abs=5e-4)
    assert cost[1] - cost[0] == pytest.approx(0.453, abs=1e-3)
    assert cost[2] - cost[0] == pytest.approx(0.042, abs=1e-3)
    pooled = sum(p.numel() for p in explicit.parameters())
    assert pooled == 25_557_032 + 10 * 2048**2 + 15 * 2048
    assert f"{pooled / 1e6:.1f}" == "67.5"


def test_it_fits_the_slot_of_a_resnet(device):
    model = resnet_mini(num_classes=5, pool=AttentionPool(128)).to(device)
    for size in ((2, 3, 64, 64), (1, 3, 48, 80)):
        assert model.eval()(torch.zeros(size, device=device)).shape == (size[0], 5)
    assert (
        model.avgpool.maps(model.forward_features(torch.zeros(1, 3, 64, 64, device=device))).shape[
            1
        ]
        == 1
    )


# Limiting cases (spec, section 10)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_zero_query_is_the_mean_and_can_be_frozen(impl):
    x = randn(2, 8, 3, 4)
    for keys in (False, True):
        pool = made(cls_in_keys=keys, impl=impl).freeze_uniform()
        z = pool.norm1(rearrange(x, "b c h w -> b (h w) c"))
        if keys:
            z = torch.cat([pool.norm1(pool.cls_token).expand(2, -1, -1), z], 1)
        cls = pool.cls_token[:, 0] + pool.ls1.gamma * pool.proj(pool.v(z).mean(1))
        expected = cls + pool.ls2.gamma * pool.mlp(pool.norm2(cls))
        torch.testing.assert_close(pool(x), expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(pool.maps(x), torch.full((2, 1, 3, 4), 1 / z.shape[1]).double())
        assert not any(p.requires_grad for p in pool.q.parameters())
        pool(x).sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_invariants_of_the_pooling(impl):
    pool, x = made(impl=impl), randn(2, 8, 3, 4)
    expected = pool(x)
    mixed = x.flatten(2)[..., torch.randperm(12, generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(pool(mixed.unflatten(2, (3, 4))), expected, atol=1e-12, rtol=0)
    shifted = x + randn(2, 1, 3, 4, seed=1)  # the same number in all channels of a place
    torch.testing.assert_close(pool(shifted), expected, atol=1e-4, rtol=0)
    with torch.no_grad():
        pool.k.bias.add_(randn(8))
    torch.testing.assert_close(pool(x), expected, atol=1e-12, rtol=0)
    with torch.no_grad():
        pool.ls1.gamma.zero_(), pool.ls2.gamma.zero_()
    assert torch.equal(pool(x), pool.cls_token[:, 0].expand(2, -1))


def test_the_map_is_a_1x1_convolution_and_a_softmax():
    """With one vector that is no key: p = W_kᵀ q / √d on the normalised map."""
    pool, x = made(cls_in_keys=False), randn(2, 8, 3, 4)
    q = pool.q(pool.norm1(pool.cls_token))[0, 0]
    probe = pool.k.weight.T @ q / math.sqrt(8)
    z = rearrange(pool.norm1(rearrange(x, "b c h w -> b h w c")), "b h w c -> b c h w")
    scores = nn.functional.conv2d(z, probe[None, :, None, None])
    expected = scores.flatten(2).softmax(-1).unflatten(2, (3, 4))
    torch.testing.assert_close(pool.maps(x), expected)


def test_temperature_goes_from_the_mean_to_the_largest():
    x = randn(2, 8, 3, 4)
    pool = made(cls_in_keys=False)
    best = pool.maps(x).flatten(1).argmax(1)
    with torch.no_grad():
        pool.q.weight.mul_(1e4), pool.q.bias.mul_(1e4)
    one_hot = nn.functional.one_hot(best, 12).unflatten(1, (1, 3, 4)).double()
    torch.testing.assert_close(pool.maps(x), one_hot)
    with torch.no_grad():
        pool.q.weight.mul_(1e-12), pool.q.bias.mul_(1e-12)
    torch.testing.assert_close(pool.maps(x), torch.full_like(one_hot, 1 / 12), atol=1e-6, rtol=0)


def test_several_heads_are_not_one():
    one, two = made(num_heads=1), made(num_heads=2)
    x = randn(2, 8, 3, 4)
    assert (one(x) - two(x)).abs().max() > 1e-3


def test_queries_do_not_see_each_other():
    """Permuting them permutes what comes out; changing one changes nothing else."""
    pool, x = made(queries=5), randn(2, 8, 3, 4)
    expected = pool(x)
    with torch.no_grad():
        pool.cls_token[:, 2] += 1.0
    changed = (pool(x) - expected).abs().amax((0, 2))
    assert changed[2] > 1e-3
    assert changed[[0, 1, 3, 4]].max() < 1e-14
    with torch.no_grad():
        pool.cls_token[:, 2] -= 1.0
        pool.cls_token.copy_(pool.cls_token.flip(1))
    torch.testing.assert_close(pool(x), expected.flip(1), atol=1e-12, rtol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_every_parameter_is_in_the_graph_and_all_but_the_keys_bias_matter(impl):
    """DDP wants a gradient for each, also for the bias that the softmax cancels."""
    pool = made(impl=impl)
    pool(randn(2, 8, 3, 4)).square().sum().backward()
    for name, parameter in pool.named_parameters():
        largest = parameter.grad.abs().max()
        assert (largest < 1e-12) if name == "k.bias" else (largest > 1e-7), name


def test_a_fresh_pool_looks_everywhere():
    """The normalised entropy of a fresh S60's weights is 0.998 in the spec."""
    torch.manual_seed(0)
    weights = AttentionPool(384).maps(torch.randn(4, 384, 14, 14), normalize=True).flatten()
    entropy = -(weights * weights.log()).sum() / 4
    assert entropy.item() / math.log(196) == pytest.approx(0.998, abs=1e-3)


def test_errors():
    x = torch.zeros(2, 8, 3, 3)
    battery.check_errors([
        (lambda: AttentionPool(8, num_heads=3), "dim=8: expected a multiple of num_heads=3"),
        (lambda: AttentionPool(8, num_heads=0), "dim=8: expected a multiple of num_heads=0"),
        (lambda: AttentionPool(8, 0), "queries=0: expected at least 1"),
        (lambda: AttentionPool(8, impl="fast"), "impl='fast': expected one of auto, explicit"),
        (lambda: AttentionPool(6)(x), "x (2, 8, 3, 3): expected (B, 6, H, W)"),
        (lambda: AttentionPool(8).maps(x[0]), "x (8, 3, 3): expected (B, 8, H, W)"),
        (lambda: pooling.GeneralizedMeanPool(0), "p=0: expected a positive exponent"),
        (lambda: pooling.LogSumExpPool(-1), "r=-1: expected a positive sharpness"),
        (lambda: pooling.GeneralizedMeanPool()(x[0]), "x (8, 3, 3): expected (B, C, H, W)"),
        (lambda: pooling.LogSumExpPool()(x[0]), "x (8, 3, 3): expected (B, C, H, W)"),
        (lambda: pooling.ContextPool(6)(x), "x (2, 8, 3, 3): expected (B, 6, H, W)"),
        (lambda: pooling.SimPool(6).maps(x), "x (2, 8, 3, 3): expected (B, 6, H, W)"),
        (lambda: pooling.SimPool(6, gamma=0), "gamma=0: expected None or a positive exponent"),
        (lambda: pooling.LatentPool(12), "dim=12: expected a multiple of num_heads=8"),
    ])  # fmt: skip


# The neighbours

WEIGHTED = {
    "context": lambda: pooling.ContextPool(16),
    "gated": lambda: pooling.GatedPool(16, hidden=5),
    "mean query": lambda: pooling.MeanQueryPool(16, num_heads=4, feat_size=(4, 3)),
    "latent": lambda: pooling.LatentPool(16),
    "simpool": lambda: pooling.SimPool(16),
    "simpool, power": lambda: pooling.SimPool(16, gamma=1.25),
}


@pytest.mark.parametrize("name", WEIGHTED)
def test_neighbours_pass_the_battery(name, device):
    x = randn(2, 16, 3, 4, device=device, dtype=torch.float32)
    battery.battery(
        lambda: WEIGHTED[name]().to(device), x, sizes=[((x,), (2, 16)), ((x[:1, :, :2],), (1, 16))],
        impls=("explicit",), grid=(3, 4), compiles=name in ("gated", "latent"),
    )  # fmt: skip


class LatentOfMaps(timm.layers.AttentionPoolLatent):
    """timm's, which wants tokens."""

    def forward(self, x):
        return super().forward(rearrange(x, "b c h w -> b (h w) c"))


@pytest.mark.parametrize(("ours", "theirs"), [
    (lambda: pooling.MeanQueryPool(16, num_heads=4, feat_size=(4, 3)),
     lambda: timm.layers.AttentionPool2d(16, feat_size=(4, 3), num_heads=4)),
    (lambda: pooling.LatentPool(16), lambda: LatentOfMaps(16)),
    (lambda: pooling.SimPool(16), lambda: timm.layers.SimPool2d(16)),
    (lambda: pooling.SimPool(16, 1.25), lambda: timm.layers.SimPool2d(16, gamma=1.25)),
    (lambda: pooling.LogSumExpPool(), lambda: timm.layers.LsePlus2d()),
])  # fmt: skip
def test_neighbours_equal_timms_key_for_key(ours, theirs, device):
    ours, theirs = ours().to(device), battery.randomize(theirs()).to(device)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for size in ((4, 3), (3, 5)):
        battery.check_matches(ours, theirs, randn(2, 16, *size, device=device))


@quick
@given(seed=st.integers(0, 10**6), h=st.integers(1, 4), w=st.integers(1, 4))
def test_means_and_maxima_are_the_ends_of_the_soft_ones(seed, h, w):
    x = randn(2, 3, h, w, seed=seed).abs() + 0.1
    mean, largest = x.mean((2, 3)), x.amax((2, 3))
    assert torch.equal(pooling.AveragePool()(x), GlobalAveragePool()(x))
    torch.testing.assert_close(pooling.GeneralizedMeanPool(1.0).double()(x), mean)
    torch.testing.assert_close(pooling.LogSumExpPool(1e-6).double()(x), mean, atol=1e-5, rtol=0)
    for pool in (pooling.GeneralizedMeanPool(200.0), pooling.LogSumExpPool(500.0)):
        torch.testing.assert_close(pool.double()(x), largest, atol=0.05, rtol=0.05)
    for pool in (pooling.GeneralizedMeanPool(), pooling.LogSumExpPool()):
        between = pool.double()(x)
        assert (between >= mean - 1e-9).all()
        assert (between <= largest + 1e-9).all()


def test_simple_pools_pass_parts_of_the_battery(device):
    x = randn(2, 8, 3, 4, device=device, dtype=torch.float32)
    for make in (pooling.AveragePool, pooling.GeneralizedMeanPool, pooling.LogSumExpPool):
        battery.check_batch_independent(make().to(device), x)
        battery.check_input_untouched(make().to(device), x)
        battery.check_sizes(make().to(device), [((x,), (2, 8)), ((x[:1, :, :2],), (1, 8))])


def test_maps_of_the_neighbours(device):
    x = randn(2, 16, 3, 4, device=device)
    uniform = pooling.AveragePool().maps(x)
    torch.testing.assert_close(uniform, torch.full_like(x[:, :1], 1 / 12))
    for name, make in WEIGHTED.items():
        pool = battery.randomize(make()).double().to(device)
        maps = pool.maps(x)
        assert maps.shape == (2, pool.num_heads, 3, 4)
        sums = maps.sum((2, 3))
        assert maps.min() >= 0
        assert sums.max() <= 1 + 1e-9
        if name != "mean query":  # its mean place is a key too
            torch.testing.assert_close(sums, torch.ones_like(sums))


def test_gcnet_and_gated_attention_are_their_formulas():
    x = randn(1, 16, 2, 2)
    places = x[0].flatten(1).T
    pool = battery.randomize(pooling.ContextPool(16)).double()
    a = (places @ pool.score.weight[0]).softmax(0)
    torch.testing.assert_close(pool(x)[0], a @ places)
    pool = battery.randomize(pooling.GatedPool(16, 5)).double()
    hidden = [
        (pool.value(p).tanh() * pool.gate(p).sigmoid()) @ pool.score.weight[0] for p in places
    ]
    torch.testing.assert_close(pool(x)[0], torch.stack(hidden).softmax(0) @ places)
