"""Reversed attention against the formula, PyTorch, its invariants; DependencyViT and its Lite."""

import math

import battery
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from attnlab import record, reversed_attention
from attnlab.dependency_pruning import keep_counts, restore
from attnlab.dependencyvit import (
    DependencyBlock,
    DependencyViT,
    dependencyvit_lite_small,
    dependencyvit_lite_tiny,
    dependencyvit_mini,
    dependencyvit_small,
    dependencyvit_tiny,
)
from attnlab.reversed_attention import ReversedAttention, received_mass, reverse
from attnlab.reversed_attention import reversed_attention as send

IMPLS = ("auto", "explicit", "two_pass", "fused")
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
LITE = {"prune_layers": (2, 3), "keep_rates": (0.75, 0.5)}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that the two-pass form has several blocks at the sizes of a test."""
    monkeypatch.setattr(reversed_attention, "BLOCK_SCORES", 8)
    monkeypatch.setattr(reversed_attention, "SMALLEST_BLOCK", 2)


def arguments(N=5, M=7, d=3, dv=3, heads=2, device="cpu", dtype=torch.float64, seed=0):
    """q (2, heads, N, d), k (…, M, d), v (…, N, dv), P (2, heads, N), M (2, N)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(2, *shape, generator=generator, dtype=dtype).to(device)

    q, k, v = normal(heads, N, d), normal(heads, M, d), normal(heads, N, dv)
    return q, k, v, normal(heads, N).softmax(1), normal(N).sigmoid()


def close(a, b, tol=1e-12):
    torch.testing.assert_close(a, b, atol=tol, rtol=0)


def loop(q, k, v, head_probs, messages, mask=None, scale=None):
    """The formula, one child at a time."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    out = [[[0.0] * k.shape[2] for _ in row] for row in k]
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        parents = range(k.shape[2])
        if mask is not None:
            allowed = mask.expand(*q.shape[:3], k.shape[2])[b, h, i]
            parents = [j for j in parents if allowed[j]]
        exps = {j: (scale * q[b, h, i] @ k[b, h, j]).exp() for j in parents}
        for j in parents:
            sent = head_probs[b, h, i] * messages[b, i] * exps[j] / sum(exps.values())
            out[b][h][j] = out[b][h][j] + sent * v[b, h, i]
    zero = 0.0 * v[0, 0, 0]
    return torch.stack([torch.stack([torch.stack([zero + x for x in h]) for h in b]) for b in out])


@pytest.mark.parametrize("impl", IMPLS)
def test_equals_the_loop_from_the_formula(impl, device):
    some = torch.rand(2, 2, 5, 7, generator=torch.Generator().manual_seed(1)) > 0.4
    some[0, 1, 2] = False  # a child that may send nowhere
    for options in ({}, {"scale": 0.3}, {"mask": some}, {"mask": some[0, 0, 0]}):
        options = {k: v.to(device) if k == "mask" else v for k, v in options.items()}
        battery.check_matches(
            lambda *x, o=options: send(*x, impl=impl, **o),
            lambda *x, o=options: loop(*x, **o),
            *arguments(device=device),
        )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dv", [1, 3, 4, 7])
def test_equals_the_transpose_of_pytorchs_weights(impl, dv, device):
    """Attention to values that are the identity gives PyTorch's own A_F."""

    def theirs(q, k, v, head_probs, messages):
        identity = torch.eye(k.shape[2], dtype=k.dtype, device=k.device).expand(2, 2, -1, -1)
        weights = F.scaled_dot_product_attention(q, k, identity)
        return torch.einsum("bhij,bhi,bi,bhid->bhjd", weights, head_probs, messages, v)

    inputs = arguments(6, 9, dv=dv, device=device)
    battery.check_matches(lambda *x: send(*x, impl=impl), theirs, *inputs)


@pytest.mark.parametrize("impl", ["two_pass", "fused"])
def test_one_derivative_and_a_clear_word_about_the_second(impl, device):
    inputs = [x.requires_grad_() for x in arguments(3, 4, 2, 2, device=device)]
    assert torch.autograd.gradcheck(lambda *x: send(*x, impl=impl), inputs)
    (grad,) = torch.autograd.grad(send(*inputs, impl=impl).sum() ** 2, inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"one derivative .* take impl='explicit'"):
        grad.sum().backward()


def test_the_explicit_form_has_a_second_derivative(device):
    inputs = [x[:1].requires_grad_() for x in arguments(2, 3, 2, 2, device=device)]
    assert torch.autograd.gradgradcheck(lambda *x: send(*x, impl="explicit"), inputs)


@pytest.mark.parametrize("dv", [16, 24])
def test_the_fused_form_runs_on_pytorchs_fused_kernels(dv):
    q, k, v, head_probs, messages = arguments(64, 64, 16, dv, dtype=torch.float32)
    with torch.profiler.profile() as profile:
        send(q.requires_grad_(), k, v, head_probs, messages, impl="fused").sum().backward()
    calls = {event.key: event.count for event in profile.key_averages()}
    slices = -(-dv // 16)
    name = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert calls[name] == calls[f"{name}_backward"] == 2 * slices
    assert "aten::_scaled_dot_product_attention_math" not in calls


@pytest.mark.parametrize(("impl", "materialises"), [("explicit", True), ("two_pass", False),
                                                    ("fused", False)])  # fmt: skip
def test_what_training_keeps(impl, materialises):
    """Only the explicit form keeps an N×M matrix for the backward pass."""
    inputs = [x.requires_grad_() for x in arguments(128, 128, 8, 8, dtype=torch.float32)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        send(*inputs, impl=impl)
    assert (max(kept) >= 4 * 128 * 128) is materialises


@pytest.mark.parametrize("impl", ["two_pass", "fused"])
def test_under_checkpointing_and_in_inference_mode(impl, device):
    inputs = arguments(device=device)

    def checkpointed(*x):
        return checkpoint(lambda *y: send(*y, impl=impl), *x, use_reentrant=False)

    battery.check_matches(checkpointed, lambda *x: send(*x, impl="explicit"), *inputs)
    expected = send(*inputs, impl="explicit")
    with torch.inference_mode():
        close(send(*(x.clone() for x in inputs), impl=impl), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_the_explicit_form(dtype, device):
    exact = [x.to(dtype).double() for x in arguments(64, 64, 16, 16, device=device)]
    q, k, v = (x.to(dtype) for x in exact[:3])
    rest = [x.float() for x in exact[3:]]
    errors = {}
    for impl in ("explicit", "two_pass", "fused"):
        x = [y.detach().requires_grad_() for y in (q, k, v)]
        y = [y.detach().requires_grad_() for y in exact[:3]]
        out, expected = send(*x, *rest, impl=impl), send(*y, *exact[3:], impl="explicit")
        assert out.dtype == dtype
        out.float().square().sum().backward()
        expected.square().sum().backward()
        pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(x, y, strict=True))]
        errors[impl] = [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]
    for impl in ("two_pass", "fused"):
        for error, allowed in zip(errors[impl], errors["explicit"], strict=True):
            assert error < max(2 * allowed, 0.01 if dtype == torch.bfloat16 else 0.002), errors


@given(seed=st.integers(0, 10**6), N=st.integers(1, 6), M=st.integers(1, 6), scale=st.floats(-3, 3))
@settings(max_examples=25, deadline=None)
def test_invariants(seed, N, M, scale):
    q, k, v, head_probs, messages = arguments(N, M, seed=seed)
    sent = head_probs * messages[:, None]
    maps = reverse(reversed_attention.attention_weights(q, k, scale=scale), head_probs, messages)
    mask = maps.sum(1)  # A_M, (B, parents, children)
    close(maps.sum(2), sent)
    close(mask.sum(1), messages)
    close(mask.sum((1, 2)), messages.sum(1))
    assert (mask.sum(1) <= 1 + 1e-12).all()
    assert (mask.sum(2) <= N + 1e-12).all()
    close(received_mass(q, k, head_probs, messages, scale=scale), mask.sum(2))

    q.requires_grad_()
    k.requires_grad_()
    for impl in ("explicit", "two_pass", "fused"):
        out = send(q, k, v, head_probs, messages, scale=scale, impl=impl)
        close(out, maps @ v)
        close(out.sum(2), (sent[..., None] * v).sum(2))  # value conservation, whatever q and k are
        for grad in torch.autograd.grad(out.sum(), (q, k)):
            close(grad, torch.zeros_like(grad))

    with torch.no_grad():
        louder = messages.clone()
        louder[:, 0] *= 2  # linear in what one child sends
        change = send(q, k, v, head_probs, louder, scale=scale) - out
        close(change, maps[..., :1] @ v[:, :, :1])
        mute = messages.clone()
        mute[:, 0] = 0  # mute, but not deaf
        other = v.clone()
        other[:, :, 0] += 100
        a, b = (send(q, k, x, head_probs, mute, scale=scale) for x in (v, other))
        close(a, b)
        children, parents = torch.randperm(N), torch.randperm(M)
        shuffled = send(
            q[:, :, children], k[:, :, parents], v[:, :, children], head_probs[..., children],
            messages[:, children], scale=scale,
        )  # fmt: skip
        close(shuffled, out[:, :, parents])


def test_limits():
    q, k, v, head_probs, messages = arguments(6, 6)
    weights = reversed_attention.attention_weights(q, k)
    even, open_ = torch.full_like(head_probs, 0.5), torch.ones_like(messages)
    close(reverse(weights, even, open_).sum(1), weights.mean(1).mT)
    close(reverse(weights, even, open_).sum((1, 2, 3)), torch.full((2,), 6.0).double())
    one = torch.ones_like(head_probs)
    equal = send(q, k[:, :, :1].expand_as(k), v, one, open_)  # all parents alike: the mean
    close(equal, v.mean(2, keepdim=True).expand_as(v))
    values = torch.randn_like(v)  # ⟨G, reversed(u)⟩ = ⟨ordinary(G), u⟩
    ordinary = F.scaled_dot_product_attention(q, k, values)
    close((values * send(q, k, v, one, open_)).sum(), (ordinary * v).sum())


def test_a_hub_receives_more_than_one_and_a_leaf_nothing():
    q = torch.ones(1, 1, 8, 2)
    k = torch.zeros(1, 1, 8, 2)
    k[:, :, 3] = 100.0
    mass = received_mass(q, k, torch.ones(1, 1, 8), torch.ones(1, 8))
    close(mass, 8.0 * F.one_hot(torch.tensor([3]), 8).float())


def test_auto_follows_the_thresholds(monkeypatch):
    """What counts is every score of the call: 2 images × 2 heads × 5 children × parents."""
    monkeypatch.setitem(reversed_attention.FASTER_FROM, "cpu", ("two_pass", 80))
    for parents, expected in ((3, "explicit"), (4, "two_pass")):
        q, k, v, *_ = arguments(M=parents)
        assert reversed_attention._fastest(q, k, v) == expected


def test_auto_without_gradients_counts_a_heads_scores_too(monkeypatch):
    monkeypatch.setattr(reversed_attention, "INFERENCE_FROM", (60, 15))  # 2 × 2 heads × 5 × 3
    q, k, v, *_ = arguments(M=3)
    assert reversed_attention._fastest(q, k, v) == "two_pass"
    assert reversed_attention._fastest(q, k, v.clone().requires_grad_()) == "explicit"
    with torch.no_grad():
        assert reversed_attention._fastest(q, k, v.clone().requires_grad_()) == "two_pass"
    assert reversed_attention._fastest(q[:, :1], k[:, :1], v[:, :1]) == "explicit"  # too few heads
    monkeypatch.setattr(reversed_attention, "INFERENCE_FROM", (60, 16))
    assert reversed_attention._fastest(q, k, v) == "explicit"


def test_bad_input_to_the_function():
    q, k, v, p, m = arguments()
    mask = torch.ones(5, 7, dtype=torch.bool)
    battery.check_errors([
        (lambda: send(q, k[..., :2], v, p, m), "k (2, 2, 7, 2), v (2, 2, 5, 3): expected (B,"),
        (lambda: send(q, k, v[:, :, :4], p, m), "one value a child"),
        (lambda: send(q[0], k[0], v[0], p, m), "q (2, 5, 3), k (2, 7, 3)"),
        (lambda: send(q, k[:1], v, p, m), "expected (B, heads, N, d), (B, heads, M, d)"),
        (lambda: send(q, k[:, :, :0], v, p, m), "and at least one"),
        (lambda: send(q, k, v, p.mT, m), "head_probs (2, 5, 2): expected (2, 2, 5)"),
        (lambda: send(q, k, v, p, m[:1]), "messages (1, 5): expected (2, 5)"),
        (lambda: send(q, k, v, p, m, mask=mask.float()), "mask of dtype torch.float32: expected"),
        (lambda: send(q, k, v, p, m, mask=mask.mT), "broadcasts to (2, 2, 5, 7)"),
        (lambda: send(q, k, v, p, m, impl="flash"), "impl='flash': expected one of auto, explicit"),
    ])  # fmt: skip


def tokens(*shape, device="cpu", seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def test_the_module_is_the_formula():
    module = battery.randomize(ReversedAttention(12, 3, temperature=0.5)).double()
    x, before = tokens(2, 5, 12).double(), torch.rand(2, 5, dtype=torch.float64)
    out, messages = module(x, before)
    q, k, v = module.qkv(x).view(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)
    gate = torch.sigmoid(module.controller(x))[..., 0]
    close(messages, before * gate)
    head_probs = (module.selector(x) / 0.5).softmax(-1).mT
    expected = loop(q, k, v, head_probs, messages).permute(0, 2, 1, 3).reshape(2, 5, 12)
    close(out, module.proj(expected), 1e-9)
    with record(module) as maps:
        module(x, before)
    close(maps[""].sum(2), head_probs * messages[:, None])


def test_reversed_attention_passes_the_battery(device):
    x, messages = tokens(3, 9, 12, device=device), torch.rand(3, 9, device=device)
    make = ReversedAttention
    battery.battery(
        lambda: make(12, 3).to(device),
        x,
        messages,
        impls=IMPLS,
        parameters=4 * 12**2 + 4 * 12 + 12 * 3 + 12**2 + 12 + 13,
        sizes=[((x[:1],), (1, 9, 12)), ((x[:2, :4],), (2, 4, 12))],
        rows_axis=None,
        errors=[
            (lambda: make(12, 5), "dim=12: expected a multiple of num_heads=5"),
            (lambda: make(12, 3, temperature=0), "temperature=0: expected a number above 0"),
            (lambda: make(12, 3, controller_ratio=0), "controller_ratio=0: expected"),
            (lambda: make(12, 3, renorm="mean"), "renorm='mean': expected none, degree or sqrt"),
            (lambda: make(12, 3, impl="x"), "impl='x': expected one of auto"),
            (lambda: make(12, 3)(x[0].cpu()), "x (9, 12): expected (B, N, dim=12)"),
            (lambda: make(12, 3)(x.cpu(), x.cpu()), "messages (3, 9, 12): expected (3, 9)"),
        ],
    )


@pytest.mark.parametrize("options", [
    {"renorm": "degree"}, {"renorm": "sqrt", "mask_self": True}, {"gate_exclusive": True},
])  # fmt: skip
def test_every_option_in_every_form(options, device):
    module = ReversedAttention(12, 3, qkv_bias=False, controller_ratio=0.5, **options).to(device)
    battery.check_impls_agree(module, tokens(2, 9, 12, device=device), impls=IMPLS)


@pytest.mark.parametrize("impl", ["two_pass", "fused"])
def test_every_form_compiles_in_one_graph(impl, device):
    module = ReversedAttention(12, 3, impl=impl).to(device)
    battery.check_compiles(module, tokens(2, 9, 12, device=device))


def test_what_the_options_do():
    x, ones = tokens(2, 6, 12).double(), torch.ones(2, 6, dtype=torch.float64)
    exclusive = battery.randomize(ReversedAttention(12, 3, gate_exclusive=True)).double()
    _, messages, sending = exclusive(x, ones, observe=True)
    close(sending.messages, ones)
    close(messages, exclusive.controller(x).sigmoid()[..., 0])
    no_self = battery.randomize(ReversedAttention(12, 3, mask_self=True)).double()
    *_, sending = no_self(x, ones, observe=True)
    close(sending.weights.diagonal(dim1=-2, dim2=-1), torch.zeros(2, 3, 6).double())
    close(sending.received(), sending.mask().sum(-1))

    degree = ReversedAttention(12, 3, renorm="degree").double()
    with torch.no_grad():
        degree.proj.weight.copy_(torch.eye(12))
    low, high = degree.qkv(x)[..., 24:].aminmax(dim=1, keepdim=True)
    out, _ = degree(x)  # a weighted mean of the children's values
    assert ((low - 1e-9 <= out) & (out <= high + 1e-9)).all()

    wide, shut = ReversedAttention(12, 3, gate_bias_init=3.0), ReversedAttention(12, 3)
    assert wide(x.float())[1].mean() > 0.9 > 0.6 > shut(x.float())[1].mean() > 0.4
    hard, soft = (ReversedAttention(64, 4, temperature=t) for t in (0.1, 1.0))
    soft.load_state_dict(hard.state_dict())
    peak = [m(tokens(1, 50, 64), observe=True)[2].head_probs.amax(1).mean() for m in (hard, soft)]
    assert peak[0] > 0.5 > 0.35 > peak[1]


def images(*size, batch=2, device="cpu"):
    return tokens(batch, 3, *(size or (32, 32)), device=device, seed=1)


def small(**kwargs):
    return DependencyViT(**SMALL | {"num_classes": 5} | kwargs)


def test_parameters_and_costs_of_the_published_sizes():
    """Parameters to the last one; multiplications, attention's own included, to 0.02 G."""
    # The spec's table: millions and giga-MACs with a controller as wide as the tokens, and half;
    # the Lite forms with the counts of the public port, 164, 132, 100, 69.
    cases = [
        (dependencyvit_tiny, 6_191_668, 5_968_180, 1.34, 1.30),
        (dependencyvit_small, 23_883_892, 22_994_548, 4.93, 4.76),
        (dependencyvit_lite_tiny, 6_191_668, 5_968_180, 0.84, 0.82),
        (dependencyvit_lite_small, 23_883_892, 22_994_548, 3.15, 3.03),
    ]
    for factory, wide, half, macs_wide, macs_half in cases:
        for ratio, parameters, macs in ((1.0, wide, macs_wide), (0.5, half, macs_half)):
            with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
                model = factory(controller_ratio=ratio, prune_rounding="sequential")
                model(torch.empty(1, 3, 224, 224))
            battery.check_parameters(model, parameters)
            assert counter.get_total_flops() / 2e9 == pytest.approx(macs, abs=0.02)


def test_without_its_extras_it_is_as_large_as_deit():
    with torch.device("meta"):
        model = dependencyvit_tiny(global_pool="cls")
    extras = [p for n, p in model.named_parameters() if "selector" in n or "controller" in n]
    total = sum(p.numel() for p in model.parameters())
    assert total - sum(p.numel() for p in extras) == 5_717_416


@pytest.mark.parametrize("options", [{}, LITE, {"global_pool": "cls", **LITE}])
def test_the_model_passes_the_battery(options, device):
    x = images(device=device)
    battery.battery(
        lambda: small(**options).to(device),
        x,
        impls=IMPLS[1:],
        sizes=[((x[:1],), (1, 5)), ((images(16, 40, device=device),), (2, 5))],
        rows_axis=None,
        compiles=False,
    )


def test_the_pruned_model_compiles_in_one_graph(device):
    model = small(depth=2, prune_at="mid", prune_layers=(1, 2), keep_rates=(0.75, 0.5))
    battery.check_compiles(model.to(device), images(device=device))


@pytest.mark.parametrize("options", [
    {"global_pool": "gate_sum", "init_values": 0.1}, {"global_pool": "root", "num_classes": 0},
    {"global_pool": "mean", "prune_at": "mid", **LITE}, {"prune_score": "gate", **LITE},
    {"prune_score": "received", "prune_rounding": "sequential", "restore_grad": True, **LITE},
])  # fmt: skip
def test_every_option_of_the_model_trains_in_every_form(options, device):
    model = small(drop_path_rate=0.1, drop_rate=0.1, proj_drop_rate=0.1, **options).to(device)
    battery.check_impls_agree(model, images(device=device), impls=IMPLS[1:])


def test_what_is_read_out():
    model = battery.randomize(small(num_classes=0)).eval().double()
    encoding = model.forward_features(images().double())
    x, M = encoding.tokens, encoding.messages
    expected = {
        "gate_mean": (M[..., None] * x).sum(1) / M.sum(1, keepdim=True),
        "gate_sum": (M[..., None] * x).sum(1) / 16,
        "mean": x.mean(1),
    }
    for pool, value in expected.items():
        model.reset_classifier(0, pool)
        close(model(images().double()), value)
    model.reset_classifier(0, "root")
    trace = model.trace(images().double())
    received = (trace.received - trace.masks.diagonal(dim1=-2, dim2=-1)).sum(0)
    close(model(images().double()), x[torch.arange(2), received.argmax(1)])


def test_a_class_token_receives_and_never_sends():
    model = battery.randomize(small(global_pool="cls", **LITE)).eval()
    trace = model.trace(images())
    assert (trace.messages[..., 0] == 0).all()
    assert (trace.received[..., 0] > 0).all()
    assert trace.alive[..., 0].all()
    assert model.forward_map(images()).shape == (2, 24, 4, 4)


def test_gradients_reach_every_selector_and_every_controller():
    for bias in (0.0, 3.0):
        model = small(gate_bias_init=bias)
        F.cross_entropy(model(images()), torch.tensor([0, 1])).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name


def test_how_open_the_gates_are_at_the_start():
    deep, shallow = small(depth=12), small()
    assert deep.trace(images()).messages[-1].mean() == pytest.approx(0.56, abs=0.03)
    assert shallow.trace(images()).messages[-1].mean() == pytest.approx(0.125, abs=0.03)
    literal = small(depth=12, gate_bias_init=0.0)
    assert literal.trace(images()).messages[-1].mean() == pytest.approx(2.4e-4, rel=0.4)


@pytest.mark.parametrize("options", [{}, LITE, {"prune_at": "mid", **LITE}])
def test_the_trace_is_what_was_recorded_on_the_original_grid(options):
    model = battery.randomize(small(**options)).eval()
    trace = model.trace(images())
    with torch.no_grad(), record(model) as maps:
        model(images())
    close(trace.masks.sum(-2), trace.messages, 1e-5)
    assert (trace.messages.diff(dim=0) <= 0).all()
    assert ((trace.messages >= 0) & (trace.messages <= 1)).all()
    close(trace.head_probs.sum(2), trace.alive.float(), 1e-5)
    for layer, map in enumerate(maps.dense().values()):
        alive = trace.alive[layer]
        for b in range(2):
            dense = trace.masks[layer, b][alive[b]][:, alive[b]]
            close(dense, map[b].sum(0), 1e-5)
            assert trace.masks[layer, b].sum() == pytest.approx(dense.sum().item(), abs=1e-5)
    left = {(): [16, 16, 16], ("before",): [16, 12, 8], ("mid",): [16, 16, 12]}
    key = () if not options else (options.get("prune_at", "before"),)
    assert trace.alive.sum(-1)[:, 0].tolist() == left[key]


def test_counts_of_the_stages():
    rates = (0.84, 0.68, 0.52, 0.36)
    assert keep_counts(196, rates) == (164, 133, 101, 70)
    assert keep_counts(196, rates, "sequential") == (164, 132, 100, 69)
    assert keep_counts(100, rates) == (84, 68, 52, 36)


@pytest.mark.parametrize("score", ["received_sum", "received", "gate", "random"])
def test_pruning_and_restoring(score):
    model = battery.randomize(small(prune_score=score, **LITE)).eval().double()
    encoding = model.forward_features(images().double())
    before = 16
    for stage, left in zip(encoding.stages, (12, 8), strict=True):
        everyone = torch.cat([stage.kept, stage.pruned], 1).sort(1).values
        assert torch.equal(everyone, torch.arange(before).expand(2, -1))
        for part in (stage.kept, stage.pruned):
            assert (part.diff(dim=1) > 0).all()
        assert stage.parents.shape == (2, before - left, left)
        close(stage.parents.sum(-1), torch.ones(2, before - left).double())
        before = left
    matrix = restore(torch.eye(8, dtype=torch.float64).expand(2, 8, 8), encoding.stages)
    close(matrix.sum(-1), torch.ones(2, 16).double())
    for b in range(2):
        assert torch.equal(matrix[b, encoding.ids[b]], torch.eye(8, dtype=torch.float64))
        soft = model.restore(encoding)[b]
        assert torch.equal(soft[encoding.ids[b]], encoding.tokens[b])  # to the last bit
        close(soft, matrix[b] @ encoding.tokens[b])
        zero, hard = (model.restore(encoding, fill)[b] for fill in ("zero", "hard"))
        gone = torch.ones(16, dtype=torch.bool).scatter(0, encoding.ids[b], False)
        assert (zero[gone] == 0).all()
        assert all((hard[i] == encoding.tokens[b]).all(1).any() for i in gone.nonzero())


def test_a_pruned_childs_parents_are_those_of_the_trace():
    model = battery.randomize(small(prune_layers=(2,), keep_rates=(0.5,))).eval().double()
    x = images().double()
    encoding, trace = model.forward_features(x), model.trace(x)
    (stage,) = encoding.stages
    for b in range(2):
        scores = trace.received[0, b] - trace.masks[0, b].diagonal()
        assert torch.equal(scores.topk(8).indices.sort().values, stage.kept[b])
        shares = trace.masks[0, b][stage.kept[b]][:, stage.pruned[b]].mT
        close(stage.parents[b], shares / shares.sum(-1, keepdim=True))


def test_a_mute_child_is_restored_from_the_nearest_patch_that_was_kept():
    model = small(prune_layers=(2,), keep_rates=(0.5,), prune_score="gate", gate_bias_init=-200.0)
    encoding = model.eval().forward_features(images())
    (stage,) = encoding.stages
    assert torch.equal(stage.kept, torch.arange(8).expand(2, -1))  # equal scores: the lower places
    below = F.one_hot(torch.tensor([4, 5, 6, 7] * 2), 8).float()  # rows 2 and 3 of a 4×4 grid
    assert torch.equal(stage.parents, below.expand(2, -1, -1))


def test_gradients_through_restored_maps():
    for through in (False, True):
        model = small(prune_layers=(2,), keep_rates=(0.5,), restore_grad=through)
        encoding = model.forward_features(images())
        assert encoding.stages[0].parents.requires_grad is through
        model.restore(encoding).square().sum().backward()


def test_without_stages_lite_is_the_full_model_to_the_last_bit():
    full = battery.randomize(small()).eval()
    lite = small(prune_layers=(), keep_rates=()).eval()
    lite.load_state_dict(full.state_dict())
    for impl in IMPLS:
        battery.with_impl(full, impl)
        battery.with_impl(lite, impl)
        assert torch.equal(full(images()), lite(images()))


def test_the_first_half_and_the_second_half_are_the_block():
    block = battery.randomize(DependencyBlock(12, 3)).double()
    x, messages = tokens(2, 5, 12).double(), torch.rand(2, 5, dtype=torch.float64)
    out, after = block(x, messages)
    y, expected = block.attn(block.norm1(x), messages)
    y = x + y
    close(out, y + block.mlp(block.norm2(y)))
    close(after, expected)


def test_a_few_steps_of_training_lower_the_loss():
    torch.manual_seed(0)
    model = dependencyvit_mini(img_size=32, embed_dim=48, depth=3, num_heads=3)
    x, label = images(batch=8), torch.arange(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(15):
        loss = F.cross_entropy(model(x), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5 * math.log(8)


def test_bad_options():
    lite = {"prune_layers": (2,), "keep_rates": (0.5,)}
    battery.check_errors([
        (lambda: small(global_pool="max"), "global_pool='max': expected one of gate_mean, gate"),
        (lambda: small(global_pool="cls").reset_classifier(2, "mean"), "expected one of cls"),
        (lambda: small(prune_score="size", **lite), "prune_score='size': expected one of"),
        (lambda: small(prune_at="end", **lite), "prune_at='end': expected one of before, mid"),
        (lambda: small(prune_rounding="up", **lite), "prune_rounding='up': expected one of floor"),
        (lambda: small(prune_layers=(1,), keep_rates=(0.5,)), "ascending blocks from 2 to 3"),
        (lambda: small(prune_layers=(3, 2), keep_rates=(0.5, 0.4)), "prune_layers=(3, 2): expect"),
        (lambda: small(prune_layers=(2,)), "keep_rates=(): expected 1 falling shares"),
        (lambda: small(prune_layers=(2, 3), keep_rates=(0.5, 0.5)), "keep_rates=(0.5, 0.5): expec"),
        (lambda: restore(torch.zeros(2, 4, 3), (), "copy"), "fill='copy': expected one of soft"),
        (lambda: small(**lite).restore(small().forward_features(images())._replace(
            stages=small(**lite).forward_features(images()).stages)), "expected (2, 8) tokens"),
        (lambda: small()(images(30, 32)), "image size (30, 32): expected multiples"),
    ])  # fmt: skip


OPTIONS = {
    "default": {},
    "gates open at first": {"gate_bias_init": 3.0},
    "gate later": {"gate_exclusive": True},
    "not to itself": {"mask_self": True},
    "degree": {"renorm": "degree"},
    "root of the degree": {"renorm": "sqrt"},
    "soft selector": {"temperature": 1.0},
    "narrow controller": {"controller_ratio": 0.5},
    "sum": {"global_pool": "gate_sum"},
    "mean": {"global_pool": "mean"},
    "root": {"global_pool": "root"},
    "class token": {"global_pool": "cls"},
    "pruned": LITE,
    "pruned inside": {**LITE, "prune_at": "mid"},
    "fused": {"impl": "fused"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_fits_32_images_by_heart(options, monkeypatch):
    """Every reading of the paper can learn: random labels of random images."""
    monkeypatch.setattr(reversed_attention, "BLOCK_SCORES", 2**19)
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "num_heads": 4}
    depth = max(options.get("prune_layers", (2,)))
    model = DependencyViT(num_classes=4, depth=depth, **sizes | options).train()
    images, labels = torch.randn(32, 3, 16, 16), torch.arange(32) % 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = F.cross_entropy(model(images), labels)
        if loss < 0.05:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
