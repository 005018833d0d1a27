"""Non-local blocks against the formula, PyTorch, timm and other codes' layouts (spec 01, 3.4)."""

import math

import battery
import pytest
import timm.layers
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attnlab import record
from attnlab.lab import cost
from attnlab.non_local import KINDS, NonLocalBlock, non_local, non_local_weights

SOFTMAX = ("gaussian", "embedded_gaussian")
every_kind = pytest.mark.parametrize("kind", KINDS)
every_impl = pytest.mark.parametrize("impl", ["explicit", "fused", "auto"])


def tensors(N=6, M=5, d=4, dv=3, device="cpu", seed=0):
    """θ (2, 1, N, d), φ (2, 1, M, d), g (2, 1, M, dv) and w_f (2d,)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, 1, N, d), (2, 1, M, d), (2, 1, M, dv), (2 * d,)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(device) for s in shapes]


def only_for(kind, w_f):
    """`w_f` as the keyword of the one kind that takes it."""
    return {"w_f": w_f} if kind == "concatenation" else {}


def loop(theta, phi, g, w_f, kind):
    """Eq. 1 with Eqs. 2 to 5 written out, one pair at a time."""
    rows = []
    for b in range(len(theta)):
        keys = list(zip(phi[b, 0], g[b, 0], strict=True))
        for query in theta[b, 0]:
            if kind in SOFTMAX:
                f = [(query * key).sum().exp() for key, _ in keys]
            elif kind == "dot_product":
                f = [(query * key).sum() for key, _ in keys]
            else:
                f = [(w_f * torch.cat([query, key])).sum().clamp(min=0) for key, _ in keys]
            C = sum(f) if kind in SOFTMAX else len(keys)
            rows.append(sum(weight * value for weight, (_, value) in zip(f, keys, strict=True)) / C)
    return torch.stack(rows).view(*theta.shape[:-1], -1)


@every_kind
@every_impl
@pytest.mark.parametrize("dv", [3, 4, 6])
def test_equals_the_loop_from_the_formula(kind, impl, dv, device):
    battery.check_matches(
        lambda t, p, g, w: non_local(t, p, g, kind, impl=impl, **only_for(kind, w)) + 0 * w.sum(),
        lambda t, p, g, w: loop(t, p, g, w, kind) + 0 * w.sum(),
        *tensors(dv=dv, device=device),
    )


@every_kind
def test_large_maps_take_the_fused_form_and_equal_the_explicit_one(kind):
    theta, phi, g, w_f = tensors(N=1500, M=700, d=4, dv=4)
    f = only_for(kind, w_f)
    auto, fused, explicit = (
        non_local(theta, phi, g, kind, impl=i, **f) for i in ("auto", "fused", "explicit")
    )
    assert torch.equal(auto, fused)
    torch.testing.assert_close(fused, explicit, atol=1e-9, rtol=0)


def test_embedded_gaussian_is_attention_with_one_head_and_scale_one():
    theta, phi, g, _ = tensors(dv=4)
    for scale, theirs in ((1.0, 1.0), (0.5, None)):  # 0.5 = 1/√4, PyTorch's default
        expected = F.scaled_dot_product_attention(theta, phi, g, scale=theirs)
        for impl in ("explicit", "fused"):
            got = non_local(theta, phi, g, scale=scale, impl=impl)
            torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_a_dot_product_never_needs_its_weights():
    theta, phi, g, _ = tensors()
    expected = theta @ (phi.mT @ g) / 5
    weights = non_local_weights(theta, phi, "dot_product")
    torch.testing.assert_close(weights @ g, expected, atol=1e-12, rtol=0)
    assert (weights < 0).any()


def test_concatenation_equals_the_tensor_of_all_pairs_and_has_rank_two():
    theta, phi, _, w_f = tensors(N=9, M=8)
    pairs = torch.cat(
        [theta[..., :, None, :].expand(2, 1, 9, 8, 4), phi[..., None, :, :].expand(2, 1, 9, 8, 4)],
        dim=-1,
    )  # the (N, M, 2d) tensor that is never built
    scores = pairs @ w_f
    expected = scores.relu() / 8
    torch.testing.assert_close(non_local_weights(theta, phi, "concatenation", w_f=w_f), expected)
    assert (torch.linalg.matrix_rank(scores) <= 2).all()


def test_concatenation_ranks_the_keys_alike_for_every_query():
    theta, phi, _, w_f = tensors(N=20, M=30)
    best = {
        kind: non_local_weights(theta, phi, kind, **only_for(kind, w_f)).argmax(-1)
        for kind in ("concatenation", "embedded_gaussian")
    }
    heard = non_local_weights(theta, phi, "concatenation", w_f=w_f).amax(-1) > 0
    for b in range(2):
        assert len(best["concatenation"][b, 0][heard[b, 0]].unique()) == 1
        assert len(best["embedded_gaussian"][b, 0].unique()) > 5


@pytest.mark.parametrize("shift", [-100.0, 0.0, 100.0])
def test_sorted_concatenation_where_nobody_and_where_everybody_is_heard(shift):
    theta, phi, g, w_f = tensors()
    w_f, theta = w_f.clone(), theta.clone()
    w_f[0], theta[..., 0] = 1.0, shift
    explicit, fused = (
        non_local(theta, phi, g, "concatenation", w_f=w_f, impl=i) for i in ("explicit", "fused")
    )
    torch.testing.assert_close(fused, explicit, atol=1e-9, rtol=0)
    assert (fused == 0).all() == (shift < 0)


def test_sorted_concatenation_with_equal_keys_and_scores_at_the_kink():
    theta, phi, g, w_f = tensors()
    phi = phi[:, :, :1].expand_as(phi)
    w_f = torch.cat([torch.ones(4), -torch.ones(4)]).double()
    theta = torch.cat([phi[:, :, :1], theta], dim=2)  # its score is exactly 0 with every key
    battery.check_matches(
        lambda t, p, g: non_local(t, p, g, "concatenation", w_f=w_f, impl="fused"),
        lambda t, p, g: non_local(t, p, g, "concatenation", w_f=w_f, impl="explicit"),
        theta,
        phi,
        g,
    )


@given(
    seed=st.integers(0, 10**6),
    N=st.integers(1, 7),
    M=st.integers(1, 7),
    kind=st.sampled_from(KINDS),
)
@settings(max_examples=40, deadline=None)
def test_invariants(seed, N, M, kind):
    theta, phi, g, w_f = tensors(N, M, seed=seed)
    f = only_for(kind, w_f)
    weights = non_local_weights(theta, phi, kind, **f)
    out = non_local(theta, phi, g, kind, impl="fused", **f)
    if kind in SOFTMAX:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 1, N, dtype=torch.float64))
        low, high = g.amin(2, keepdim=True) - 1e-9, g.amax(2, keepdim=True) + 1e-9
        assert ((low <= out) & (out <= high)).all(), "outside the hull of the values"
    if kind == "concatenation":
        assert (weights >= 0).all()

    queries, keys = torch.randperm(N), torch.randperm(M)
    shuffled = non_local(
        theta[:, :, queries], phi[:, :, keys], g[:, :, keys], kind, impl="fused", **f
    )
    torch.testing.assert_close(shuffled, out[:, :, queries], atol=1e-9, rtol=0)

    # Every key twice: neither normaliser notices.
    twice = non_local(theta, phi.repeat(1, 1, 2, 1), g.repeat(1, 1, 2, 1), kind, impl="fused", **f)
    torch.testing.assert_close(twice, out, atol=1e-9, rtol=0)


def test_non_local_means_is_a_softmax_of_dot_products_with_a_key_norm_bias():
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(12, 9, generator=generator, dtype=torch.float64)
    h = 1.5
    expected = (-torch.cdist(patches, patches).square() / h**2).softmax(-1)
    # ‖p − q‖² = ‖p‖² − 2 p·q + ‖q‖², and the query's own term cancels: append −‖q‖²/h² to the keys.
    bias = -patches.square().sum(-1, keepdim=True) / h**2
    theta = torch.cat([2 / h**2 * patches, torch.ones_like(bias)], dim=-1)
    phi = torch.cat([patches, bias], dim=-1)
    torch.testing.assert_close(non_local_weights(theta, phi, "gaussian"), expected)

    unit = F.normalize(patches, dim=-1)
    expected = (-torch.cdist(unit, unit).square() / h**2).softmax(-1)
    got = non_local_weights(unit, unit, "gaussian", scale=2 / h**2)
    torch.testing.assert_close(got, expected)


# --- the block ---------------------------------------------------------------------------------

SPACES = {1: (7,), 2: (5, 4), 3: (2, 3, 5)}


def image(channels=6, space=(5, 4), device="cpu", batch=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, channels, *space, generator=generator).to(device)


def expected_parameters(C, Ci, kind, norm="bn"):
    embeddings = {"gaussian": 1, "concatenation": 3}.get(kind, 3)
    count = embeddings * (C * Ci + Ci) + Ci * C + C + (2 * C if norm else 0)
    return count + 2 * Ci * (kind == "concatenation")


@every_kind
def test_battery(kind, device):
    def make():
        return NonLocalBlock(6, kind=kind).to(device)

    sizes = [
        ((image(space=(5, 4), device=device),), (2, 6, 5, 4)),
        ((image(space=(3, 8), device=device, batch=1),), (1, 6, 3, 8)),
        ((image(space=(1, 1), device=device),), (2, 6, 1, 1)),
        ((image(space=(1, 7), device=device),), (2, 6, 1, 7)),
    ]
    battery.battery(
        make,
        image(device=device),
        parameters=expected_parameters(6, 3, kind),
        sizes=sizes,
        identity_at_init=True,
        rows_axis=-1 if kind in SOFTMAX else None,
    )


@every_kind
def test_battery_without_a_norm(kind, device):
    def make():
        return NonLocalBlock(6, kind=kind, norm=None).to(device)

    x = image(device=device)
    battery.check_parameters(make(), expected_parameters(6, 3, kind, norm=None))
    battery.check_identity_at_init(make(), x)
    battery.check_impls_agree(make(), x, impls=("explicit", "auto", "fused"))
    battery.check_state_dict_round_trip(make, x)


@every_kind
@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("pool", ["before", "after"])
def test_battery_of_sub_sampled_blocks_of_every_dimension(kind, ndim, pool, device):
    def make():
        return NonLocalBlock(6, 4, kind, ndim=ndim, subsample=True, pool=pool).to(device)

    x = image(space=SPACES[ndim], device=device)
    battery.check_impls_agree(make(), x, impls=("explicit", "auto", "fused"))
    battery.check_batch_independent(make(), x)
    battery.check_recording(make(), x)
    battery.check_identity_at_init(make(), x)
    if ndim == 2:
        battery.check_compiles(make(), x)
    keys = {1: 3, 2: 4, 3: 4}[ndim]  # halved, rounded down; time is not
    with torch.no_grad(), record(make()) as maps:
        maps._owners[""](x)
    assert maps[""].shape == (2, 1, math.prod(SPACES[ndim]), keys)


def by_convolutions(block, x):
    """The block as the papers write it: 1×1 convolutions, a matrix of all pairs, a norm, a sum."""
    space = x.shape[2:]
    conv = (F.conv1d, F.conv2d, F.conv3d)[len(space) - 1]
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(space) - 1]
    window = (1, 2, 2) if len(space) == 3 else 2

    def embed(linear, x):
        ones = [1] * len(space)
        return conv(x, linear.weight.view(*linear.weight.shape, *ones), linear.bias)

    subsample = isinstance(block.subsample, (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d))
    before = pool(x, window) if subsample and block.pool == "before" else x
    after = (lambda t: pool(t, window)) if subsample and block.pool == "after" else lambda t: t
    gaussian = block.kind == "gaussian"
    theta = (x if gaussian else embed(block.theta, x)).flatten(2)
    phi = after(before if gaussian else embed(block.phi, before)).flatten(2)
    g = after(embed(block.g, before)).flatten(2)
    scores = torch.einsum("bcn, bcm -> bnm", theta, phi)
    if block.kind in SOFTMAX:
        weights = (block.scale * scores).softmax(-1)
    elif block.kind == "dot_product":
        weights = scores / scores.shape[-1]
    else:
        N, M = theta.shape[-1], phi.shape[-1]
        pairs = torch.cat(
            [
                theta[..., None].expand(*theta.shape, M),
                phi[:, :, None].expand(*phi.shape[:2], N, M),
            ],
            dim=1,
        )
        weights = F.conv2d(pairs, block.w_f.weight[:, :, None, None])[:, 0].relu() / M
    y = torch.einsum("bnm, bcm -> bcn", weights, g).unflatten(2, space)
    return x + block.norm(embed(block.z, y).flatten(2)).view(x.shape)


@every_kind
@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"subsample": True},
        {"subsample": True, "pool": "after"},
        {"norm": None, "inter_channels": 8},
    ],
)
def test_equals_the_block_of_convolutions(kind, ndim, options):
    block = battery.randomize(NonLocalBlock(6, kind=kind, ndim=ndim, **options)).eval()
    x = image(space=SPACES[ndim])
    battery.check_matches(block, lambda x: by_convolutions(block, x), x)


@pytest.mark.parametrize(("C", "count"), [(256, 132_224), (512, 526_592), (1024, 2_101_760)])
def test_parameters_of_the_papers_sizes(C, count):
    with torch.device("meta"):
        assert cost.parameters(NonLocalBlock(C)) == count == 2 * C**2 + 9 * C // 2
        gaussian = NonLocalBlock(C, kind="gaussian")
        assert cost.parameters(gaussian) == count - (C**2 + C)
        assert cost.parameters(NonLocalBlock(C, kind="concatenation")) == count + C


@pytest.mark.parametrize(
    ("C", "side", "before", "after", "whole"),
    [(1024, 14, 1.185, 1.802, 2.274), (512, 28, 2.286, 2.903, 6.679)],
)
def test_macs_of_one_block_in_a_resnet_50_for_video(C, side, before, after, whole):
    x = torch.empty(1, C, 4, side, side, device="meta")
    for expected, options in (
        (before, {"subsample": True}),
        (after, {"subsample": True, "pool": "after"}),
        (whole, {}),
    ):
        with torch.device("meta"):
            block = NonLocalBlock(C, ndim=3, impl="explicit", **options)
        assert cost.macs(block, x) / 1e9 == pytest.approx(expected, abs=5e-4)


def test_the_first_gradients_with_a_norm_reach_its_weight_and_bias_alone():
    block = NonLocalBlock(6)
    block(image()).square().sum().backward()
    alive = {name for name, p in block.named_parameters() if p.grad.abs().sum() > 0}
    assert alive == {"norm.weight", "norm.bias"}


def test_the_first_gradients_without_a_norm_reach_z_alone():
    block = NonLocalBlock(6, norm=None)
    block(image()).square().sum().backward()
    alive = {name for name, p in block.named_parameters() if p.grad.abs().sum() > 0}
    assert alive == {"z.weight", "z.bias"}


def test_zeros_in_both_places_make_a_block_that_never_learns():
    def train(block):
        optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
        for _ in range(20):
            optimizer.zero_grad()
            block(image()).sub(2 * image()).square().mean().backward()
            optimizer.step()
        return block

    torch.manual_seed(0)
    dead = NonLocalBlock(6)
    nn.init.zeros_(dead.z.weight)
    train(dead)
    assert (dead.z.weight == 0).all()
    assert (dead.norm.weight == 0).all()
    assert (dead.norm.bias != 0).any(), "only the bias learns"
    alive = train(NonLocalBlock(6))
    assert (alive.norm.weight != 0).all()


@every_kind
def test_a_bias_of_the_keys_cancels_in_the_softmax_alone(kind):
    if kind == "gaussian":
        pytest.skip("it has no keys of its own")
    block = battery.randomize(NonLocalBlock(6, kind=kind)).double().eval()
    x = image().double()
    with torch.no_grad():
        before = block(x)
        block.phi.bias.add_(1.0)
        changed = (block(x) - before).abs().max().item()
    assert (changed < 1e-9) == (kind == "embedded_gaussian")


@every_kind
def test_one_state_dict_serves_every_dimension(kind):
    two = battery.randomize(NonLocalBlock(6, kind=kind)).double().eval()
    one, three = (NonLocalBlock(6, kind=kind, ndim=n).double().eval() for n in (1, 3))
    for other in (one, three):
        other.load_state_dict(two.state_dict(), strict=True)
    x = image().double()
    expected = two(x)
    torch.testing.assert_close(three(x[:, :, None])[:, :, 0], expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(one(x.flatten(2)).view(x.shape), expected, atol=1e-12, rtol=0)


def test_a_sub_sampled_clip_of_one_frame_equals_the_image():
    two = battery.randomize(NonLocalBlock(6, subsample=True)).double().eval()
    three = NonLocalBlock(6, ndim=3, subsample=True).double().eval()
    three.load_state_dict(two.state_dict(), strict=True)
    x = image().double()
    torch.testing.assert_close(three(x[:, :, None])[:, :, 0], two(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("subsample", "same"), [(False, True), (True, False)])
def test_shuffled_positions_are_shuffled_alike_unless_keys_are_pooled(subsample, same):
    block = battery.randomize(NonLocalBlock(6, subsample=subsample)).double().eval()
    x = image().double()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    shuffled = block(x.flatten(2)[..., order].view(x.shape)).flatten(2)
    difference = (shuffled - block(x).flatten(2)[..., order]).abs().max().item()
    assert (difference < 1e-9) == same


def test_pooling_before_and_after_the_embedding_differ():
    before = battery.randomize(NonLocalBlock(6, subsample=True)).eval()
    after = NonLocalBlock(6, subsample=True, pool="after").eval()
    after.load_state_dict(before.state_dict())
    assert (before(image()) - after(image())).abs().max() > 0.1


def test_scales():
    assert NonLocalBlock(8).scale == 1.0
    assert NonLocalBlock(8, use_scale=True).scale == 0.5
    assert NonLocalBlock(16, kind="gaussian", use_scale=True).scale == 0.25
    assert NonLocalBlock(8, use_scale=1.0).scale == 1.0
    assert NonLocalBlock(8, use_scale=8**-0.5).scale == 8**-0.5
    assert NonLocalBlock(1).z.in_features == 1


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_formats(memory_format):
    block = battery.randomize(NonLocalBlock(6)).double().eval()
    x = image().double()
    got = block(x.to(memory_format=memory_format))
    torch.testing.assert_close(got, block(x), atol=1e-12, rtol=0)


def test_the_fused_form_never_holds_the_weights():
    x = torch.randn(1, 8, 24, 24)
    weights = 4 * 576**2
    for kind in KINDS:
        block = NonLocalBlock(8, kind=kind)
        used = {}
        for block.impl in ("explicit", "fused"):
            used[block.impl] = cost.peak_memory(lambda: block(x).sum().backward())  # noqa: B023
        assert used["explicit"] > weights, kind
        assert used["fused"] < weights, kind


# --- other codes' weights ----------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("use_scale", "ours"), [(True, 64**-0.5), (False, False)])
def test_equals_timm_with_shared_weights(training, use_scale, ours):
    theirs = timm.layers.NonLocalAttn(64, use_scale=use_scale)
    battery.randomize(theirs).double().train(training)
    block = NonLocalBlock(64, theirs.t.out_channels, use_scale=ours).double().train(training)
    block.load_state_dict(theirs.state_dict(), strict=True)

    def named(module):
        """The block's outputs; running statistics are compared below."""
        return lambda x: module(x)

    x = image(64, (7, 5))
    for impl in ("explicit", "fused", "auto"):
        block.impl = impl
        battery.check_matches(named(block), named(theirs), x)
    theirs.zero_grad()
    block.zero_grad()
    for module in (block, theirs):
        module(x.double()).square().sum().backward()
    pairs = {"t": "theta", "p": "phi", "g": "g", "z": "z", "norm": "norm"}
    for name, parameter in theirs.named_parameters():
        owner, leaf = name.split(".")
        got = block.get_parameter(f"{pairs[owner]}.{leaf}").grad
        torch.testing.assert_close(got, parameter.grad.view(got.shape), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(block.norm.running_var, theirs.norm.running_var)


def layout(block, ndim, names):
    """The block's state dict under another code's names, with its 1×1 kernels."""
    state = {}
    for key, value in block.state_dict().items():
        owner, _, leaf = key.rpartition(".")
        kernel = value.ndim > 1
        state[f"{names[owner]}.{leaf}"] = value.view(*value.shape, *[1] * ndim) if kernel else value
    return state


ALEXHEX7 = {
    "theta": "theta", "phi": "phi", "g": "g", "z": "W.0", "norm": "W.1", "w_f": "concat_project.0"
}  # fmt: skip
PYSLOWFAST = {
    "theta": "conv_theta", "phi": "conv_phi", "g": "conv_g", "z": "conv_out", "norm": "norm"
}  # fmt: skip


@pytest.mark.parametrize(
    ("names", "ndim", "options"),
    [
        (ALEXHEX7, 2, {"kind": "concatenation"}),
        (ALEXHEX7, 1, {"kind": "dot_product"}),
        (ALEXHEX7 | {"z": "W"}, 3, {"norm": None}),
        (ALEXHEX7 | {"phi": "phi.0", "g": "g.0"}, 3, {"subsample": True, "pool": "after"}),
        (ALEXHEX7 | {"g": "g.0"}, 2, {"kind": "gaussian", "subsample": True, "pool": "after"}),
        (PYSLOWFAST, 3, {"subsample": True, "use_scale": True}),
        (PYSLOWFAST, 3, {"kind": "dot_product", "norm": None}),
    ],
)
def test_other_codes_state_dicts_load_strictly(names, ndim, options):
    block = battery.randomize(NonLocalBlock(6, ndim=ndim, **options)).eval()
    theirs = layout(block, 2 if options.get("kind") == "concatenation" else ndim, names)
    theirs = {f"layer3.{key}": value for key, value in theirs.items()}
    untouched = dict(theirs)
    other = nn.ModuleDict({"layer3": NonLocalBlock(6, ndim=ndim, **options)}).eval()
    other.load_state_dict(theirs, strict=True)
    assert theirs.keys() == untouched.keys()
    x = image(space=SPACES[ndim])
    torch.testing.assert_close(other["layer3"](x), block(x))


def test_a_missing_or_foreign_entry_is_an_error():
    state = NonLocalBlock(6).state_dict()
    del state["theta.bias"]
    with pytest.raises(RuntimeError, match=r"theta\.bias"):
        NonLocalBlock(6).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"extra\.weight"):
        NonLocalBlock(6).load_state_dict(
            NonLocalBlock(6).state_dict() | {"extra.weight": state["z.bias"]}
        )


# --- bad input ---------------------------------------------------------------------------------


def test_errors():
    theta, phi, g, w_f = tensors()
    small = NonLocalBlock(6, subsample=True)
    battery.check_errors(
        [
            (lambda: NonLocalBlock(6, kind="gauss"), "kind='gauss': expected one of ('gaussian'"),
            (lambda: NonLocalBlock(6, ndim=4), "ndim=4: expected one of (1, 2, 3)"),
            (lambda: NonLocalBlock(6, pool="max"), "pool='max': expected one of ('before', "),
            (lambda: NonLocalBlock(6, norm="gn"), "norm='gn': expected one of ('bn', None)"),
            (lambda: NonLocalBlock(6, impl="fast"), "impl='fast': expected one of ('auto', "),
            (lambda: NonLocalBlock(0), "channels=0, inter_channels=1: expected both at least 1"),
            (lambda: NonLocalBlock(6, 0), "inter_channels=0"),
            (
                lambda: NonLocalBlock(6, kind="dot_product", use_scale=True),
                "use_scale=True: expected False with kind='dot_product'",
            ),
            (
                lambda: NonLocalBlock(6)(torch.zeros(2, 5, 4, 4)),
                "x (2, 5, 4, 4): expected (B, 6, H",
            ),
            (lambda: NonLocalBlock(6)(torch.zeros(6, 4, 4)), "expected (B, 6, H, W)"),
            (lambda: NonLocalBlock(6, ndim=1)(torch.zeros(2, 6, 4, 4)), "expected (B, 6, L)"),
            (lambda: NonLocalBlock(6, ndim=3)(torch.zeros(2, 6, 4, 4)), "expected (B, 6, T, H, W)"),
            (
                lambda: small(torch.zeros(2, 6, 1, 7)),
                "x (2, 6, 1, 7): expected at least 2 positions",
            ),
            (
                lambda: NonLocalBlock(6, ndim=1, subsample=True)(torch.zeros(2, 6, 1)),
                "in every axis of space",
            ),
            (
                lambda: non_local(theta, phi, g, "cosine"),
                "kind='cosine': expected one of gaussian,",
            ),
            (lambda: non_local(theta, phi, g, impl="flash"), "impl='flash': expected one of auto,"),
            (
                lambda: non_local(theta, phi[..., :3], g),
                "phi (2, 1, 5, 3), g (2, 1, 5, 3): expected",
            ),
            (
                lambda: non_local(theta, phi, g[:, :, :4]),
                "expected (..., N, d), (..., M, d), (...,",
            ),
            (
                lambda: non_local(theta, phi[:1], g),
                "expected (..., N, d), (..., M, d), (..., M, dv)",
            ),
            (lambda: non_local(theta[0, 0, 0], phi, g), "theta (4,), phi"),
            (
                lambda: non_local(theta, phi, g, "concatenation"),
                "w_f None with kind='concatenation'",
            ),
            (lambda: non_local(theta, phi, g, w_f=w_f), "w_f of shape (8,) with kind='embedded"),
            (
                lambda: non_local(theta, phi, g, "concatenation", w_f=w_f[1:]),
                "w_f (7,): expected (8,)",
            ),
            (
                lambda: non_local_weights(theta, phi, "dot_product", scale=0.5),
                "scale=0.5: expected 1 with kind='dot_product'",
            ),
        ]
    )


def test_one_frame_of_one_row_of_a_clip_can_be_sub_sampled_in_time_only_if_space_allows():
    block = NonLocalBlock(6, ndim=3, subsample=True).eval()
    assert block(torch.zeros(1, 6, 1, 2, 2)).shape == (1, 6, 1, 2, 2), "time is not halved"
    with pytest.raises(ValueError, match="at least 2 positions"):
        block(torch.zeros(1, 6, 4, 1, 2))
