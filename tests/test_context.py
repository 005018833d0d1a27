"""DANet and OCNet against the formulas, SDPA, their invariants and the official layouts."""

import math

import battery
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attnlab import context, record
from attnlab.context import (
    ASPObjectContext,
    BaseObjectContext,
    ChannelSelfAttention,
    DANetHead,
    ObjectContext,
    PositionAttention,
    PyramidObjectContext,
    channel_weights,
    position_attention,
    position_weights,
    same_region,
)

IMPLS = ("explicit", "auto", "fused", "blockwise")


def maps(*channels, size=(3, 4), batch=2, seed=0, device="cpu", dtype=torch.float64):
    """One random map `(batch, c, *size)` for each of the channels; the only one if it is one."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(batch, c, *size, generator=generator, dtype=dtype) for c in channels]
    made = [x.to(device) for x in made]
    return made if len(made) > 1 else made[0]


def softmax_row(energies):
    """The softmax of a list of numbers."""
    terms = [e.exp() for e in energies]
    return [term / sum(terms) for term in terms]


def position_loop(q, k, v, scale=1.0, allowed=None):
    """The formula, one position at a time; `allowed[i][j]` where not every pair may attend."""
    (B, _, H, W), out = q.shape, torch.zeros_like(v)
    q, k, values = (rearrange(x, "b c h w -> b (h w) c") for x in (q, k, v))
    rows = []
    for b in range(B):
        for i in range(H * W):
            js = [j for j in range(H * W) if allowed is None or allowed[i][j]]
            shares = softmax_row([scale * (q[b, i] * k[b, j]).sum() for j in js])
            rows.append(sum(s * values[b, j] for s, j in zip(shares, js, strict=True)))
    return rearrange(torch.stack(rows), "(b h w) c -> b c h w", b=B, h=H).to(out)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dv", [3, 5, 70])
def test_position_attention_equals_the_loop(impl, dv, device):
    """Values narrower than the queries, wider, and wider than one head of the fused form."""
    q, k, v = maps(4, 4, dv, size=(2, 3), device=device)
    for scale in (1.0, 0.3):
        battery.check_matches(
            lambda q, k, v, s=scale: position_attention(q, k, v, scale=s, impl=impl),
            lambda q, k, v, s=scale: position_loop(q, k, v, s),
            q, k, v,
        )  # fmt: skip


def test_position_attention_equals_sdpa_without_a_scale(device):
    q, k, v = maps(64, 64, 512, size=(7, 5), device=device)

    def reference(q, k, v):
        q, k, v = (rearrange(x, "b c h w -> b (h w) c") for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return rearrange(out, "b (h w) c -> b c h w", h=7)

    for impl in IMPLS:
        battery.check_matches(
            lambda q, k, v, impl=impl: position_attention(q, k, v, impl=impl), reference, q, k, v
        )


@pytest.mark.parametrize(("impl", "stored"), [("explicit", True), ("fused", False)])
def test_the_fused_form_never_stores_the_weights(impl, stored):
    q, k, v = maps(8, 8, 64, size=(20, 20), batch=1, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        position_attention(q.requires_grad_(), k, v, impl=impl)
    assert (max(kept) >= 400**2) is stored


def test_auto_is_explicit_on_a_cpu_while_the_weights_are_small(monkeypatch):
    took = []
    attend = context.scaled_dot_product_attention
    monkeypatch.setattr(
        context, "scaled_dot_product_attention",
        lambda *a, impl, **k: took.append(impl) or attend(*a, impl=impl, **k),
    )  # fmt: skip
    monkeypatch.setattr(context, "CPU_FUSED_FROM", {"equal": 2 * 9**2 + 1, "wider": 12**2})
    for dv, size, expected in (
        (8, (3, 3), "explicit"), (8, (3, 4), "fused"),
        (4, (3, 3), "explicit"), (4, (3, 4), "fused"),  # here the batch of two counts
    ):  # fmt: skip
        position_attention(*maps(4, 4, dv, size=size))
        assert took.pop() == expected


def test_queries_that_are_the_keys_are_copied_once():
    q, v = maps(8, 8, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.data_ptr()) or x, lambda x: x
    ):
        position_attention(q.requires_grad_(), q, v, impl="fused")
    assert len(kept) > len(set(kept))


def test_position_attention_module_is_the_formula(device):
    module = battery.randomize(PositionAttention(16)).to(device).double()

    def reference(x):
        q, k, v = (conv(x) for conv in (module.query, module.key, module.value))
        return x + module.gamma * position_loop(q, k, v)

    battery.check_matches(module, reference, maps(16, device=device))


def test_position_attention_passes_the_battery(device):
    x = maps(16, dtype=torch.float32, device=device)
    cpu = maps(16, dtype=torch.float32)
    sizes = [
        ((maps(16, size=s, batch=1, dtype=torch.float32, device=device),), (1, 16, *s))
        for s in ((1, 1), (1, 7), (5, 3))
    ]
    errors = [
        (lambda: PositionAttention(12), "channels=12: expected a multiple of 8, or key_channels="),
        (lambda: PositionAttention(4), "channels=4: expected a multiple of 8"),
        (lambda: PositionAttention(16, impl="x"), "impl='x': expected one of auto"),
        (lambda: PositionAttention(16)(cpu[0]), "x (16, 3, 4): expected (B, 16, H, W)"),
        (lambda: PositionAttention(8)(cpu), "x (2, 16, 3, 4): expected (B, 8, H, W)"),
        (lambda: position_attention(cpu, cpu[:, :3], cpu), "expected q and k of the same width"),
        (lambda: position_attention(cpu, cpu[0], cpu), "k (16, 3, 4): expected (B, C, H, W)"),
    ]
    battery.battery(
        lambda: PositionAttention(16).to(device), x, impls=IMPLS, sizes=sizes, errors=errors,
        identity_at_init=True, grid=(3, 4), parameters=2 * (16 * 2 + 2) + 16 * 16 + 16 + 1,
    )  # fmt: skip
    battery.check_parameters(PositionAttention(512), 328_321)
    assert PositionAttention(12, key_channels=5)(maps(12, dtype=torch.float32)).shape[1] == 12


def channel_loop(x, sign, gamma):
    """The formula between channels, one at a time."""
    B, C, H, _ = x.shape
    rows = rearrange(x, "b c h w -> b c (h w)")
    out = []
    for b in range(B):
        for i in range(C):
            shares = softmax_row([sign * (rows[b, i] * rows[b, j]).sum() for j in range(C)])
            out.append(sum(share * rows[b, j] for j, share in enumerate(shares)))
    return x + gamma * rearrange(torch.stack(out), "(b c) (h w) -> b c h w", b=B, h=H)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("mode", "sign"), [("code", -1.0), ("paper", 1.0)])
def test_channel_attention_equals_the_loop(impl, mode, sign, device):
    module = ChannelSelfAttention(mode, impl=impl).to(device)
    nn.init.constant_(module.gamma, 0.75)
    battery.check_matches(module, lambda x: channel_loop(x, sign, 0.75), maps(5, device=device))


def test_channel_attention_is_position_attention_on_the_transpose():
    """Same equation, X for Xᵀ: C positions of N channels, queries, keys and values all alike."""
    x = maps(5)
    module = ChannelSelfAttention("paper").double()
    nn.init.ones_(module.gamma)
    turned = rearrange(x, "b c h w -> b (h w) c 1")  # a map of C positions with N channels
    out = turned + position_attention(turned, turned, turned)
    torch.testing.assert_close(module(x), rearrange(out, "b (h w) c 1 -> b c h w", h=3))


def test_the_code_subtracts_from_the_maximum_and_so_negates():
    x = maps(6)
    rows = rearrange(x, "b c h w -> b c (h w)")
    energy = rows @ rows.mT
    stabilised = (energy - energy.amax(-1, keepdim=True)).softmax(-1)
    negated = (energy.amax(-1, keepdim=True) - energy).softmax(-1)
    torch.testing.assert_close(channel_weights(x, "paper")[:, 0], stabilised)
    torch.testing.assert_close(channel_weights(x, "code")[:, 0], negated)
    cosine = F.cosine_similarity(rows[:, :, None], rows[:, None], dim=-1)
    torch.testing.assert_close(channel_weights(x, "cosine", 0.2)[:, 0], (cosine / 0.2).softmax(-1))


def test_both_signs_saturate_on_features_after_a_relu():
    """Spec 03, A2: C = 512, N = 192; the maximum entropy is log 512 = 6.24."""
    x = maps(512, size=(12, 16), batch=1, dtype=torch.float32).relu()
    entropy = {mode: torch.special.entr(channel_weights(x, mode)).sum(-1).mean()
               for mode in context.CHANNEL_MODES}  # fmt: skip
    assert entropy["code"] == pytest.approx(1.81, abs=0.3)
    assert entropy["paper"] < 1e-4
    assert entropy["cosine"] > 2
    identity = channel_weights(x, "paper")[0, 0].diagonal().mean()
    assert identity.item() == pytest.approx(1.0, abs=1e-4)


def test_dead_channels_take_nearly_everything():
    x = maps(512, size=(12, 16), batch=1, dtype=torch.float32).relu()
    x[:, [3, 77]] = 0.0
    weights = channel_weights(x, "code")[0, 0]
    alive = torch.ones(512, dtype=torch.bool)
    alive[[3, 77]] = False
    assert weights[alive][:, ~alive].sum(-1).mean() > 0.9
    assert channel_weights(x, "cosine").isfinite().all()


def test_channel_attention_passes_the_battery(device):
    x = maps(5, dtype=torch.float32, device=device)
    sizes = [
        ((maps(c, size=s, batch=1, dtype=torch.float32, device=device),), (1, c, *s))
        for c, s in ((5, (1, 1)), (3, (1, 7)), (1, (4, 3)))
    ]
    errors = [
        (lambda: ChannelSelfAttention("x"), "mode='x': expected one of code, paper, cosine"),
        (lambda: ChannelSelfAttention(temperature=0), "temperature=0: expected a positive number"),
        (lambda: ChannelSelfAttention(impl="x"), "impl='x': expected one of auto"),
        (lambda: ChannelSelfAttention()(x[0]), "x (5, 3, 4): expected (B, C, H, W)"),
        (lambda: channel_weights(x, "x"), "mode='x': expected one of"),
    ]
    for mode in context.CHANNEL_MODES:
        battery.battery(
            lambda mode=mode: ChannelSelfAttention(mode, temperature=0.3).to(device), x,
            impls=IMPLS, sizes=sizes, errors=errors, parameters=1, identity_at_init=True,
        )  # fmt: skip


def test_energies_are_float32_under_autocast(device):
    """A sum of 10,000 squares of 3 is beyond float16, and far beyond what bf16 resolves."""
    x = 3 + maps(4, size=(100, 100), batch=1, dtype=torch.float32, device=device)
    module = ChannelSelfAttention().to(device)
    with torch.autocast(device.type, torch.bfloat16), record(module) as recorded:
        module(x)
    assert recorded[""].dtype == torch.float32
    torch.testing.assert_close(recorded[""], channel_weights(x))


def test_costs_can_be_counted_without_numbers():
    with torch.device("meta"):
        head, x = DANetHead(64, 5), torch.empty(1, 64, 6, 7)
        assert [tuple(y.shape) for y in head(x)] == [(1, 5, 6, 7)] * 3
        fused = ChannelSelfAttention(impl="fused")(x)
    assert fused.shape == x.shape


@given(seed=st.integers(0, 10**6), height=st.integers(1, 4), width=st.integers(1, 4))
@settings(max_examples=10, deadline=None)
def test_invariants(seed, height, width):
    x = maps(8, size=(height, width), seed=seed)
    order, channels = torch.randperm(height * width), torch.randperm(8)

    def shuffled(x):
        return rearrange(x.flatten(2)[:, :, order], "b c (h w) -> b c h w", h=height)

    position = battery.randomize(PositionAttention(8), seed).double().eval()
    torch.testing.assert_close(position(shuffled(x)), shuffled(position(x)))
    pooled = battery.randomize(ObjectContext(8), seed).double().eval()
    torch.testing.assert_close(pooled(shuffled(x)), shuffled(pooled(x)))
    for mode in context.CHANNEL_MODES:
        weights = channel_weights(x, mode)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 1, 8, dtype=torch.float64))
        torch.testing.assert_close(channel_weights(shuffled(x), mode), weights)
        module = ChannelSelfAttention(mode).double()
        nn.init.constant_(module.gamma, -0.5)
        torch.testing.assert_close(module(shuffled(x)), shuffled(module(x)))
        torch.testing.assert_close(module(x[:, channels]), module(x)[:, channels])

    with record(pooled) as recorded:
        pooled(x)
    torch.testing.assert_close(recorded[""].sum(-1), torch.ones(2, 1, height * width).double())
    phi = rearrange(pooled.key(x), "b c h w -> b (h w) c")
    logits = phi @ phi.mT
    torch.testing.assert_close(logits, logits.mT)  # symmetric before the softmax


def test_limits():
    q, k, v = maps(3, 3, 4)
    mean = v.mean((2, 3), keepdim=True).expand_as(v)
    for impl in IMPLS:
        # No query, or one key everywhere: uniform weights, which is global average pooling.
        torch.testing.assert_close(position_attention(0 * q, k, v, impl=impl), mean)
        same = k[..., :1, :1].expand_as(k)
        torch.testing.assert_close(position_attention(q, same, v, impl=impl), mean)
        one = [x[..., :1, :1] for x in (q, k, v)]
        torch.testing.assert_close(position_attention(*one, impl=impl), one[2])


@pytest.mark.parametrize("make", [lambda: PositionAttention(8), lambda: ChannelSelfAttention()])
def test_only_gamma_learns_in_the_first_step(make):
    module, x = make(), maps(8, dtype=torch.float32)
    module(x).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert (name == "gamma") == bool(parameter.grad.abs().max() > 0), name


def test_only_the_projection_learns_in_object_contexts_first_step():
    module, x = ObjectContext(8), maps(8, dtype=torch.float32)
    out = module(x)
    assert torch.equal(out, torch.zeros_like(out))
    (out - 1).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert name.startswith("proj") == bool(parameter.grad.abs().max() > 0), name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("regions", [1, 2, 3])
def test_object_context_equals_the_loop(impl, regions, device):
    module = battery.randomize(ObjectContext(6, regions=regions, impl=impl)).to(device)
    module = module.double().eval()
    size = (4, 5)
    parts = [[min(i // (side // regions), regions - 1) for i in range(side)] for side in size]
    place = [(parts[0][y], parts[1][x]) for y in range(size[0]) for x in range(size[1])]
    allowed = [[a == b for b in place] for a in place]
    assert same_region(size, regions).tolist() == allowed

    def reference(x):
        phi = module.key(x)
        return module.proj(position_loop(phi, phi, module.value(x), 1 / math.sqrt(3), allowed))

    battery.check_matches(module, reference, maps(6, size=size, device=device))


def test_object_context_on_a_pooled_map():
    module = battery.randomize(ObjectContext(6, scale=2)).double().eval()
    x = maps(6, size=(5, 7))
    small = F.max_pool2d(x, 2)
    phi = module.key(small)
    pooled = module.proj(position_attention(phi, phi, module.value(small), scale=3**-0.5))
    expected = F.interpolate(pooled, (5, 7), mode="bilinear", align_corners=True)
    torch.testing.assert_close(module(x), expected)
    with record(module) as recorded:
        module(x)
    assert recorded.dense((2, 3))[""].shape == (2, 1, 6, 6)


def test_a_relation_takes_the_place_of_the_softmax():
    module = battery.randomize(ObjectContext(6)).double().eval()
    x = maps(6)
    with record(module) as recorded:
        expected = module(x)
    torch.testing.assert_close(module(x, recorded[""][:, 0]), expected)
    uniform = torch.full((2, 12, 12), 1 / 12, dtype=torch.float64)
    mean = module.value(x).mean((2, 3), keepdim=True).expand(-1, -1, 3, 4)
    torch.testing.assert_close(module(x, uniform), module.proj(mean))
    base = battery.randomize(BaseObjectContext(6)).double().eval()
    assert not torch.equal(base(x), base(x, uniform))


def test_tied_embeddings_attend_most_to_themselves():
    """Queries that are the keys: a position is what is most like itself (Cauchy and Schwarz)."""
    torch.manual_seed(0)
    tied, free = ObjectContext(512), ObjectContext(512, share_qk=False)
    x = maps(512, size=(6, 6), batch=4, dtype=torch.float32)
    found = []
    for module in (tied, free):
        with record(module) as recorded:
            module(x)
        at = recorded[""].argmax(-1)
        found.append((at == torch.arange(36)).float().mean().item())
    assert found[0] > 0.95
    assert found[1] < 0.3


@pytest.mark.parametrize("options", [
    {}, {"share_qk": False, "qk_layers": 2, "act_layer": nn.ReLU}, {"scale": 2}, {"regions": 2},
])  # fmt: skip
def test_object_context_passes_the_battery(options, device):
    x = maps(6, size=(4, 6), dtype=torch.float32, device=device)
    least = (2, 2) if options.keys() & {"scale", "regions"} else (1, 1)
    sizes = [
        ((maps(6, size=s, batch=1, dtype=torch.float32, device=device),), (1, 6, *s))
        for s in (least, (least[0], 7), (5, 3))
    ]
    battery.battery(
        lambda: ObjectContext(6, **options).to(device), x, impls=IMPLS, sizes=sizes, grid=(4, 6)
    )


def test_bad_input_to_object_contexts():
    x = maps(8, size=(5, 7), dtype=torch.float32)
    battery.check_errors([
        (lambda: ObjectContext(8, scale=0), "scale=0: expected at least 1"),
        (lambda: ObjectContext(8, regions=0), "regions=0: expected at least 1"),
        (lambda: ObjectContext(8, qk_layers=0), "qk_layers=0: expected at least 1"),
        (lambda: ObjectContext(8, impl="x"), "impl='x': expected one of"),
        (lambda: ObjectContext(8)(x[0]), "x (8, 5, 7): expected (B, 8, H, W)"),
        (lambda: ObjectContext(4)(x), "x (2, 8, 5, 7): expected (B, 4, H, W)"),
        (lambda: ObjectContext(8, regions=6)(x), "expected H and W of at least 6, for scale=1 and"),
        (lambda: ObjectContext(8, scale=6)(x), "at least 6, for scale=6 and regions=1"),
        (lambda: PyramidObjectContext(8)(x), "x (2, 8, 5, 7): expected H and W of at least 6"),
    ])  # fmt: skip


def test_a_pyramid_of_one_region_is_plain_object_context():
    pyramid = battery.randomize(PyramidObjectContext(6, regions=(1,))).double().eval()
    plain = ObjectContext(6, value_channels=6).double().eval()
    plain.load_state_dict(pyramid.contexts[0].state_dict())
    x = maps(6)
    torch.testing.assert_close(pyramid.contexts[0](x), plain(x))
    expected = pyramid.fuse(torch.cat([pyramid.lift(x), plain(x)], 1))
    torch.testing.assert_close(pyramid(x), expected)


@pytest.mark.parametrize(("make", "count"), [
    (lambda: BaseObjectContext(512), 920_576),
    (lambda: PyramidObjectContext(512), 5_782_016),
    (lambda: ASPObjectContext(512), 5_739_904),
    (lambda: DANetHead(2048, 19), 23_954_619),
])  # fmt: skip
def test_published_parameter_counts(make, count):
    with torch.device("meta"):
        battery.check_parameters(make(), count)


@pytest.mark.parametrize(("make", "options"), [
    (BaseObjectContext, {}), (PyramidObjectContext, {"regions": (1, 2)}), (ASPObjectContext, {}),
])  # fmt: skip
def test_heads_of_ocnet_pass_the_battery(make, options, device):
    x = maps(8, size=(3, 5), dtype=torch.float32, device=device)
    sizes = [
        ((maps(8, size=s, batch=1, dtype=torch.float32, device=device),), (1, 8, *s))
        for s in ((2, 2), (3, 7))
    ]
    battery.battery(
        lambda: make(8, **options).to(device), x, sizes=sizes, grid=(3, 5),
        compiles=make is BaseObjectContext,
    )  # fmt: skip
    assert make(8, out_channels=5, **options)(x.cpu()).shape == (2, 5, 3, 5)


def test_danet_head_passes_the_battery(device):
    x = maps(32, size=(3, 5), dtype=torch.float32, device=device)
    sizes = [
        ((maps(32, size=s, batch=1, dtype=torch.float32, device=device),), (1, 4, *s))
        for s in ((1, 1), (1, 7))
    ]
    errors = [(lambda: DANetHead(32, 4)(x[:, :8]), "x (2, 8, 3, 5): expected (B, 32, H, W)")]
    battery.battery(
        lambda: DANetHead(32, 4).to(device), x, sizes=sizes, errors=errors, compiles=False
    )


def test_danet_sums_its_branches_and_supervises_each():
    head = battery.randomize(DANetHead(32, 4)).double().eval()
    x = maps(32)
    position = head.refine_position(head.position(head.reduce_position(x)))
    channel = head.refine_channel(head.channel(head.reduce_channel(x)))
    expected = [
        head.classify(position + channel),
        head.classify_position(position),
        head.classify_channel(channel),
    ]
    for got, want in zip(head(x), expected, strict=True):
        torch.testing.assert_close(got, want)


def norm(name, channels):
    """Keys and shapes of a BatchNorm as InPlace-ABN saves them: without a counter."""
    return {f"{name}.{part}": (channels,)
            for part in ("weight", "bias", "running_mean", "running_var")}  # fmt: skip


def conv(name, o, i, kernel=1, bias=True):
    return {f"{name}.weight": (o, i, kernel, kernel)} | ({f"{name}.bias": (o,)} if bias else {})


def official(shapes):
    generator = torch.Generator().manual_seed(0)
    return {key: torch.rand(shape, generator=generator) for key, shape in shapes.items()}


def ocnet_stage(name, channels, key, value, out):
    shapes = conv(f"{name}.f_key.0", key, channels) | norm(f"{name}.f_key.1", key)
    shapes |= conv(f"{name}.f_query.0", key, channels) | norm(f"{name}.f_query.1", key)
    return shapes | conv(f"{name}.f_value", value, channels) | conv(f"{name}.W", out, value)


def tie(state):
    return {key: state[key.replace("f_query", "f_key")] for key in state}


LAYOUTS = {
    "danet": (
        lambda: DANetHead(32, 5),
        {f"{name}.0.weight": (8, 32, 3, 3) for name in ("conv5a", "conv5c")}
        | {f"{name}.0.weight": (8, 8, 3, 3) for name in ("conv51", "conv52")}
        | norm("conv5a.1", 8) | norm("conv5c.1", 8) | norm("conv51.1", 8) | norm("conv52.1", 8)
        | {"sa.gamma": (1,), "sc.gamma": (1,)}
        | conv("sa.query_conv", 1, 8) | conv("sa.key_conv", 1, 8) | conv("sa.value_conv", 8, 8)
        | conv("conv6.1", 5, 8) | conv("conv7.1", 5, 8) | conv("conv8.1", 5, 8),
    ),
    "base": (
        lambda: BaseObjectContext(8),
        ocnet_stage("stages.0", 8, 4, 4, 8)
        | conv("conv_bn_dropout.0", 8, 16) | norm("conv_bn_dropout.1", 8),
    ),
    "pyramid": (
        lambda: PyramidObjectContext(8),
        ocnet_stage("stages.0", 8, 4, 8, 8) | ocnet_stage("stages.1", 8, 4, 8, 8)
        | ocnet_stage("stages.2", 8, 4, 8, 8) | ocnet_stage("stages.3", 8, 4, 8, 8)
        | conv("up_dr.0", 32, 8) | norm("up_dr.1", 32)
        | conv("conv_bn_dropout.0", 8, 64) | norm("conv_bn_dropout.1", 8),
    ),
    "asp": (
        lambda: ASPObjectContext(8),
        conv("context.0", 4, 8, 3) | norm("context.1", 4)
        | ocnet_stage("context.2.stages.0", 4, 2, 4, 4)
        | conv("context.2.conv_bn_dropout.0", 4, 4) | norm("context.2.conv_bn_dropout.1", 4)
        | conv("conv2.0", 4, 8, bias=False) | norm("conv2.1", 4)
        | conv("conv3.0", 4, 8, 3, False) | norm("conv3.1", 4)
        | conv("conv4.0", 4, 8, 3, False) | norm("conv4.1", 4)
        | conv("conv5.0", 4, 8, 3, False) | norm("conv5.1", 4)
        | conv("conv_bn_dropout.0", 8, 20, bias=False) | norm("conv_bn_dropout.1", 8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_official_state_dicts_load_strictly_and_to_the_last_tensor(name):
    make, shapes = LAYOUTS[name]
    theirs = tie(official(shapes))
    module = make()
    module.load_state_dict(theirs, strict=True)
    ours = [x for key, x in module.state_dict().items() if not key.endswith("batches_tracked")]
    wanted = [x for key, x in theirs.items() if "f_query" not in key]
    assert sorted(x.sum().item() for x in ours) == sorted(x.sum().item() for x in wanted)
    nested = nn.ModuleDict({"head": make()})
    nested.load_state_dict({f"head.{key}": x for key, x in theirs.items()}, strict=True)
    module.load_state_dict(nested["head"].state_dict(), strict=True)  # and our own layout


def test_where_the_official_tensors_go():
    theirs = tie(official(LAYOUTS["base"][1]))
    module = BaseObjectContext(8)
    module.load_state_dict(theirs)
    for ours, name in [
        (module.context.key[0].weight, "stages.0.f_key.0.weight"),
        (module.context.key[1].running_var, "stages.0.f_key.1.running_var"),
        (module.context.value.bias, "stages.0.f_value.bias"),
        (module.context.proj.weight, "stages.0.W.weight"),
        (module.fuse[0].weight, "conv_bn_dropout.0.weight"),
    ]:
        assert torch.equal(ours, theirs[name])
    danet = DANetHead(32, 5)
    danet.load_state_dict(theirs := official(LAYOUTS["danet"][1]))
    assert torch.equal(danet.position.value.weight, theirs["sa.value_conv.weight"])
    assert torch.equal(danet.classify_channel.bias, theirs["conv7.1.bias"])
    assert torch.equal(danet.channel.gamma, theirs["sc.gamma"])


def test_an_untied_query_of_ocnet_is_refused_or_loaded():
    shapes = ocnet_stage("x", 8, 4, 4, 8)
    theirs = {key.removeprefix("x."): value for key, value in official(shapes).items()}
    message = "query.0.weight: expected the same values as key.0.weight, for share_qk=True"
    battery.check_errors([(lambda: ObjectContext(8).load_state_dict(dict(theirs)), message)])
    untied = ObjectContext(8, share_qk=False)
    untied.load_state_dict(dict(theirs), strict=True)
    assert torch.equal(untied.query[0].weight, theirs["f_query.0.weight"])


def test_the_layout_of_openseg():
    """Its embeddings have two layers, and its BatchNorms lie one level deeper."""
    shapes = conv("conv_bn_dropout.0", 8, 16) | norm("conv_bn_dropout.1.0", 8)
    shapes |= conv("stages.0.f_value", 4, 8) | conv("stages.0.W", 8, 4)
    for name in ("stages.0.f_key", "stages.0.f_query"):
        shapes |= conv(f"{name}.0", 4, 8) | norm(f"{name}.1.0", 4)
        shapes |= conv(f"{name}.2", 4, 4) | norm(f"{name}.3.0", 4)
    theirs = official(shapes)
    module = BaseObjectContext(8, share_qk=False, qk_layers=2, act_layer=nn.ReLU)
    module.load_state_dict(dict(theirs), strict=True)
    assert torch.equal(module.context.query[3].weight, theirs["stages.0.f_query.2.weight"])
    assert torch.equal(module.context.key[4].bias, theirs["stages.0.f_key.3.0.bias"])
    assert torch.equal(module.fuse[1].bias, theirs["conv_bn_dropout.1.0.bias"])
    assert isinstance(module.fuse[2], nn.ReLU)


def test_weights_of_the_map_helpers():
    q, k = maps(3, 3)
    weights = position_weights(q, k, scale=0.5)
    flat = [rearrange(x, "b c h w -> b (h w) c") for x in (q, k)]
    torch.testing.assert_close(weights[:, 0], (0.5 * flat[0] @ flat[1].mT).softmax(-1))
