"""CGNL against the loop from its formula, the dense matrix, the authors' layout and the bounds."""

import math

import battery
import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import attnlab
from attnlab.cgnl import (
    CGNLBlock,
    cgnl_dot,
    cgnl_rbf,
    dot_kernel,
    from_official_resnet,
    rbf_kernel,
    taylor_coefficients,
    taylor_error_bound,
    taylor_kernel,
)

IMPLS = ("explicit", "fused", "auto")
SERIES = [
    {},
    {"gamma": 0.5, "order": 0},
    {"gamma": 0.5, "order": 1, "beta": "exact"},
    {"gamma": 0.3, "order": 4, "include_constant": False},
    {"gamma": 0.3, "order": 3, "beta": "exact", "include_constant": False},
    {"gamma": 0.5, "order": 2, "normalize": True},
    {"gamma": 0.5, "order": 4, "beta": "exact", "normalize": True},
]


def elements(n=7, m=7, seed=0, device="cpu", bound=None):
    """theta (2, 3, n), phi and g (2, 3, m) in float64; theta and phi within ± bound, if given."""
    generator = torch.Generator().manual_seed(seed)
    theta, phi, g = (
        torch.randn(2, 3, k, generator=generator, dtype=torch.float64) for k in (n, m, m)
    )
    if bound is not None:
        theta, phi = bound * theta.tanh(), bound * phi.tanh()
    return theta.to(device), phi.to(device), g.to(device)


def loop(theta, phi, g, kernel):
    """y_i = Σ_j k(t_i, p_j) g_j, one element after the other."""
    rows = []
    for t_group, p_group, g_group in zip(
        *(x.flatten(0, 1) for x in (theta, phi, g)), strict=True
    ):  # fmt: skip
        rows.append(torch.stack([
            sum(kernel(t, p) * v for p, v in zip(p_group, g_group, strict=True)) for t in t_group
        ]))  # fmt: skip
    return torch.stack(rows).view_as(theta)


def series_of(gamma=1e-4, order=3, beta="const", include_constant=True, **_):
    """The scalar kernel written from the formula."""

    def kernel(t, p):
        total = 0.0
        for k in range(0 if include_constant else 1, order + 1):
            total = total + (2 * gamma) ** k / math.factorial(k) * t**k * p**k
        factor = math.exp(-2 * gamma)
        if beta == "exact":
            factor = torch.exp(-gamma * t * t) * torch.exp(-gamma * p * p)
        return factor * total

    return kernel


@pytest.mark.parametrize("impl", IMPLS)
def test_dot_equals_the_loop_from_the_formula(impl, device):
    battery.check_matches(
        lambda *x: cgnl_dot(*x, scale=0.5, impl=impl),
        lambda *x: 0.5 * loop(*x, lambda t, p: t * p),
        *elements(4, 6, device=device),
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", SERIES, ids=str)
def test_rbf_equals_the_loop_from_the_formula(impl, options, device):
    kernel = series_of(**options)

    def reference(theta, phi, g):
        y = loop(theta, phi, g, kernel)
        return y / loop(theta, phi, torch.ones_like(g), kernel) if "normalize" in options else y

    inputs = elements(4, 6, device=device)
    battery.check_matches(lambda *x: cgnl_rbf(*x, **options, impl=impl), reference, *inputs)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 9), m=st.integers(1, 9),
       order=st.integers(0, 6), gamma=st.floats(1e-3, 1.0), exact=st.booleans())  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_dense_equals_compact(seed, n, m, order, gamma, exact):
    theta, phi, g = elements(n, m, seed)
    options = {"gamma": gamma, "order": order, "beta": "exact" if exact else "const"}
    kernels = [dot_kernel(theta, phi), taylor_kernel(theta, phi, **options)]
    outputs = [cgnl_dot(theta, phi, g), cgnl_rbf(theta, phi, g, **options)]
    for kernel, y in zip(kernels, outputs, strict=True):
        torch.testing.assert_close(y, (kernel @ g[..., None])[..., 0], rtol=1e-9, atol=1e-9)
    assert torch.linalg.matrix_rank(kernels[0]).max() <= 1
    assert torch.linalg.matrix_rank(kernels[1]).max() <= order + 1

    permuted = torch.randperm(m)
    same = cgnl_rbf(theta, phi[..., permuted], g[..., permuted], **options)
    torch.testing.assert_close(same, outputs[1], rtol=1e-9, atol=1e-9)


def test_the_rank_is_the_number_of_terms():
    theta, phi, _ = elements(40, 40)
    for order in range(5):
        kernel = taylor_kernel(theta, phi, gamma=0.5, order=order)
        assert (torch.linalg.matrix_rank(kernel) == order + 1).all()
    assert taylor_coefficients(0.5, 3) == pytest.approx([1, 1, 1 / 2, 1 / 6])
    assert taylor_coefficients(0.5, 3, include_constant=False)[0] == 0
    # γ = 1/2 with a constant β is the exponential of the product, but for a factor e.
    embedded_gaussian = taylor_kernel(theta, phi, gamma=0.5, order=60) * math.e
    torch.testing.assert_close(embedded_gaussian, dot_kernel(theta, phi).exp())


@pytest.mark.parametrize(
    ("gamma", "R", "row"),
    [
        (0.1, 1, [0.181269, 0.017523, 0.001148, 0.000057, 0, 0]),
        (0.5, 1, [0.632121, 0.264241, 0.080301, 0.018988, 0.000594, 0.000001]),
        (0.5, 2, [0.981684, 0.908422, 0.761897, 0.566530, 0.214870, 0.021363]),
        (1.0, 2, [0.999665, 0.996981, 0.986246, 0.957620, 0.808764, 0.407453]),
    ],
)
def test_the_error_is_inside_the_bound_and_reaches_it_in_the_corner(gamma, R, row):
    grid = torch.linspace(-R, R, 201, dtype=torch.float64)
    z = 2 * gamma * R * R
    for order, expected in zip((0, 1, 2, 3, 5, 8), row, strict=True):
        bound = taylor_error_bound(z, order).item()
        assert bound == pytest.approx(expected, abs=1e-6)
        poisson = 1 - math.exp(-z) * sum(z**k / math.factorial(k) for k in range(order + 1))
        assert bound == pytest.approx(poisson, abs=1e-12)

        exact = taylor_kernel(grid, grid, gamma=gamma, order=order, beta="exact")
        error = (rbf_kernel(grid, grid, gamma) - exact).abs()
        assert error.max().item() <= bound + 1e-12
        assert error[-1, -1].item() == pytest.approx(bound, abs=1e-10)

        const = taylor_kernel(grid, grid, gamma=gamma, order=order)
        error = (math.exp(-2 * gamma) * torch.exp(2 * gamma * dot_kernel(grid, grid)) - const).abs()
        loose = bound * math.exp(z - 2 * gamma)
        assert error.max().item() <= loose + 1e-12
        assert error[-1, -1].item() == pytest.approx(loose, abs=1e-10)


def test_the_bound_falls_with_the_order_and_holds_for_the_output():
    z = torch.tensor([0.1, 0.5, 1, 2, 4, 8, 16], dtype=torch.float64)
    bounds = torch.stack([taylor_error_bound(z, order) for order in range(40)])
    assert (bounds.diff(dim=0) < 0).all()
    assert ((bounds > 1e-3).sum(0) == torch.tensor([2, 4, 5, 8, 11, 18, 30])).all()

    theta, phi, g = elements(30, 30, bound=1.0)
    exact = (rbf_kernel(theta, phi, 0.5) @ g[..., None])[..., 0]
    for order in range(8):
        y = cgnl_rbf(theta, phi, g, gamma=0.5, order=order, beta="exact")
        limit = taylor_error_bound(1.0, order) * g.abs().sum(-1, keepdim=True)
        assert ((y - exact).abs() <= limit + 1e-12).all()
    y = cgnl_rbf(theta, phi, g, gamma=0.5, order=30, beta="exact")
    torch.testing.assert_close(y, exact, rtol=0, atol=1e-12)


def test_symmetries_and_limits_of_the_kernels():
    theta, phi, g = elements(5, 8)
    y = cgnl_dot(theta, phi, g)
    for factor in (-1.0, 3.0):
        torch.testing.assert_close(cgnl_dot(theta, factor * phi, g), factor * y)
    # k(−t, −p) = k(t, p)
    options = {"gamma": 0.4, "order": 5}
    torch.testing.assert_close(
        cgnl_rbf(-theta, -phi, g, **options), cgnl_rbf(theta, phi, g, **options)
    )
    constant = cgnl_rbf(theta, phi, g, gamma=0.4, order=0)
    torch.testing.assert_close(constant, math.exp(-0.8) * g.sum(-1, keepdim=True).expand(2, 3, 5))
    # Without the constant, order 1 is the dot product.
    first = cgnl_rbf(theta, phi, g, gamma=0.4, order=1, include_constant=False)
    torch.testing.assert_close(first, 0.8 * math.exp(-0.8) * y)
    # Normalised, order 0 is the plain mean of g.
    mean = cgnl_rbf(theta, phi, g, gamma=0.4, order=0, normalize=True)
    torch.testing.assert_close(mean, g.mean(-1, keepdim=True).expand(2, 3, 5))


@pytest.mark.parametrize("impl", ["explicit", "fused"])
def test_a_row_whose_sum_is_not_positive_is_zero(impl):
    theta = torch.tensor([1.0, -1.0], dtype=torch.float64, requires_grad=True)
    phi, g = torch.full((3,), 2.0, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    y = cgnl_rbf(theta, phi, g, gamma=0.5, order=1, normalize=True, impl=impl)  # k = 1 + t p
    torch.testing.assert_close(y, torch.tensor([1.0, 0.0], dtype=torch.float64))
    y.sum().backward()
    assert theta.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_taken_in_float32(dtype):
    theta, phi, g = torch.ones(3, 1, 100_000, dtype=dtype) / 256
    for y in (cgnl_dot(theta, phi, g), cgnl_rbf(theta, phi, g, gamma=0.5, order=0)):
        assert y.dtype == dtype
    expected = 100_000 / 256**3
    assert cgnl_dot(theta, phi, g)[0, 0].item() == pytest.approx(expected, rel=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        phi, g = torch.randn(2, 4, 4096, generator=torch.Generator().manual_seed(0))
        one = torch.ones(4, 1)
        for impl in ("explicit", "fused"):
            torch.testing.assert_close(cgnl_dot(one, phi, g, impl=impl), (phi * g).sum(-1, True))


class Reference(nn.Module):
    """The block written anew, group by group, with the authors' parameter names."""

    def __init__(self, channels, inter_channels, groups, norm=True, series=None, scale=False):
        super().__init__()
        self.t, self.p, self.g = (nn.Conv2d(channels, inter_channels, 1, bias=False)
                                  for _ in range(3))  # fmt: skip
        self.z = nn.Conv2d(inter_channels, channels, 1, groups=groups, bias=False)
        self.gn = nn.GroupNorm(groups, channels) if norm else nn.Identity()
        self.groups, self.series, self.scale = groups, series, scale

    def forward(self, x):
        outputs = []
        for t, p, g in zip(*(c(x).chunk(self.groups, 1) for c in (self.t, self.p, self.g)),
                           strict=True):  # fmt: skip
            t, p, g = (part.flatten(1) for part in (t, p, g))
            if self.series is None:
                kernel = torch.einsum("bi,bj->bij", t, p)
            else:
                kernel = series_of(**self.series)(t[:, :, None], p[:, None, :])
            y = torch.einsum("bij,bj->bi", kernel, g)
            outputs.append(y / math.sqrt(t.shape[1]) if self.scale else y)
        y = torch.cat(outputs, 1).view(len(x), -1, *x.shape[2:])
        return x + self.gn(self.z(y))


@pytest.mark.parametrize("series", [None, {"gamma": 0.5}, {"gamma": 0.2, "beta": "exact"}], ids=str)
@pytest.mark.parametrize("norm", [True, False])
def test_the_block_equals_one_written_group_by_group(series, norm, device):
    theirs = battery.randomize(Reference(12, 8, 4, norm, series, scale=True)).to(device)
    kernel = {"kernel": "rbf", **series} if series else {}
    ours = CGNLBlock(12, 8, 4, norm="gn" if norm else "none", use_scale=True, **kernel).to(device)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    battery.check_matches(ours, theirs, torch.randn(2, 12, 3, 4, device=device))


@pytest.mark.parametrize("parallel", [False, True])
def test_the_authors_layout_loads(parallel):
    theirs = battery.randomize(Reference(16, 8, 8))
    assert {key: tuple(value.shape) for key, value in theirs.state_dict().items()} == {
        "t.weight": (8, 16, 1, 1), "p.weight": (8, 16, 1, 1), "g.weight": (8, 16, 1, 1),
        "z.weight": (16, 1, 1, 1), "gn.weight": (16,), "gn.bias": (16,),
    }  # fmt: skip
    official = {("module." if parallel else "") + k: v for k, v in theirs.state_dict().items()}
    keys = list(official)
    x = torch.randn(2, 16, 5, 4)
    for nested in (False, True):
        block = CGNLBlock(16)
        target = nn.Sequential(block) if nested else block
        given = {f"0.{key}": value for key, value in official.items()} if nested else official
        target.load_state_dict(given, strict=True)
        battery.check_matches(block, theirs, x)
    assert list(official) == keys, "the given dict is left as it is"
    ours = CGNLBlock(16).state_dict()
    assert sorted(ours) == [
        "g.weight", "norm.bias", "norm.weight", "out.weight", "phi.weight", "theta.weight",
    ]  # fmt: skip


def official_resnet(state_dict: dict, stage: str, number: int, block: dict) -> dict:
    """A plain ResNet's state dict with a block as element `number` of a stage, as theirs has it."""
    official = {}
    for key, value in state_dict.items():
        parts = key.split(".")
        if parts[0] == stage and int(parts[1]) >= number:
            parts[1] = str(int(parts[1]) + 1)
        official["module." + ".".join(parts)] = value
    return official | {f"module.{stage}.{number}.{name}": value for name, value in block.items()}


def test_the_authors_whole_resnet_loads():
    from attnlab.resnet import Bottleneck, ResNet, resnet50

    sizes = {"width": 8, "num_classes": 3}
    plain = battery.randomize(ResNet(Bottleneck, (1, 1, 3, 1), **sizes))
    block = battery.randomize(Reference(128, 64, 8))
    ours = ResNet(Bottleneck, (1, 1, 3, 1), after={"layer3.1": CGNLBlock}, **sizes)
    converted = from_official_resnet(
        official_resnet(plain.state_dict(), "layer3", 2, block.state_dict())
    )
    ours.load_state_dict(converted, strict=True)
    plain.layer3[1].after = block
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours.eval()(x), plain.eval()(x))

    with torch.device("meta"):
        model = resnet50(after={"layer3.4": CGNLBlock})
        battery.check_parameters(model, 27_197_480)
        battery.check_parameters(resnet50(after={"layer3.4": rbf_block}), 27_197_480)
        official = official_resnet(
            resnet50().state_dict(), "layer3", 5, Reference(1024, 512, 8).state_dict()
        )
    assert official["module.layer3.5.z.weight"].shape == (1024, 64, 1, 1)
    converted = from_official_resnet(official)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in converted.items()} == shapes


def rbf_block(channels: int) -> CGNLBlock:
    return CGNLBlock(channels, kernel="rbf")


def test_several_official_blocks_and_none():
    weight = torch.zeros(1)
    names = [
        "layer2.0.conv1.weight", "layer2.1.gn.weight", "layer2.2.conv1.weight",
        "layer2.3.gn.weight", "layer2.4.conv1.weight", "layer3.0.conv1.weight", "fc.bias",
    ]  # fmt: skip
    assert list(from_official_resnet(dict.fromkeys(names, weight))) == [
        "layer2.0.conv1.weight", "layer2.0.after.norm.weight", "layer2.1.conv1.weight",
        "layer2.1.after.norm.weight", "layer2.2.conv1.weight", "layer3.0.conv1.weight", "fc.bias",
    ]  # fmt: skip
    battery.check_errors([
        (lambda: from_official_resnet({"fc.bias": weight}), "1 keys: expected layerI.J.gn.weight"),
        (lambda: from_official_resnet({"layer3.0.gn.weight": weight}), "expected a residual block"),
    ])  # fmt: skip


BLOCKS = {
    "dot": {},
    "dot, none": {"norm": "none", "use_scale": True},
    "rbf, bn": {"kernel": "rbf", "gamma": 0.3, "beta": "exact", "norm": "bn", "use_scale": True},
    "rbf, rows sum to 1": {
        "kernel": "rbf", "gamma": 0.3, "order": 2, "normalize": True, "norm_groups": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
def test_the_block_passes_the_battery(options, device):
    x = torch.randn(3, 16, 4, 3, device=device)
    make = lambda: CGNLBlock(16, 8, 4, **options).to(device)  # noqa: E731
    parameters = 3 * 16 * 8 + 8 * 16 // 4 + (0 if options.get("norm") == "none" else 2 * 16)
    small = [torch.randn(*shape, device=device) for shape in ((1, 16, 1, 7), (2, 16, 5, 2))]
    battery.battery(
        make,
        x,
        impls=IMPLS,
        parameters=parameters,
        sizes=[((x,), tuple(x.shape)) for x in small],
        identity_at_init=True,
        rows_axis=-1 if options.get("normalize") else None,
        grid=(4, 3),
    )


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_other_numbers_of_axes(ndim):
    """A block sees elements, not their arrangement: the clip as one long row gives the same."""
    x = torch.randn(2, 8, *(2, 3, 4)[:ndim], dtype=torch.float64)
    block = battery.randomize(CGNLBlock(8, groups=2, ndim=ndim, kernel="rbf", gamma=0.1)).double()
    flat = battery.randomize(CGNLBlock(8, groups=2, ndim=1, kernel="rbf", gamma=0.1)).double()
    torch.testing.assert_close(block(x).flatten(2), flat(x.flatten(2)), atol=1e-12, rtol=0)
    battery.check_identity_at_init(CGNLBlock(8, groups=2, ndim=ndim, norm="bn"), x.float())
    with attnlab.record(block) as maps:
        block(x)
    n = 2 * math.prod(x.shape[2:])
    assert maps[""].shape == (2, 2, n, n)
    assert maps.dense(x.shape[2:])[""].shape == (2, 2, n // 2, n // 2)


def test_one_and_the_smallest_map():
    for shape in ((1, 16, 1, 1), (1, 16, 1, 7)):
        x = torch.randn(shape)
        assert torch.equal(CGNLBlock(16)(x), x)
        assert battery.randomize(CGNLBlock(16))(x).isfinite().all()


def test_published_parameter_counts():
    with torch.device("meta"):
        for options in ({}, {"kernel": "rbf"}):
            battery.check_parameters(CGNLBlock(1024, **options), 1_640_448)
        battery.check_parameters(CGNLBlock(64, 16, 4, norm="none"), 3 * 64 * 16 + 16 * 64 // 4)


def test_groups_are_the_blocks_of_a_block_diagonal_matrix():
    block = battery.randomize(CGNLBlock(12, 6, 3, norm="none")).double()
    x = torch.randn(2, 12, 2, 5, dtype=torch.float64)
    with attnlab.record(block) as maps:
        expected = block(x)
    dense = torch.stack([torch.block_diag(*kernels) for kernels in maps[""]])  # (B, Ci·N, Ci·N)
    assert dense.shape == (2, 60, 60)
    y = (dense @ block.g(x).flatten(1)[..., None]).view(2, 6, 2, 5)
    torch.testing.assert_close(x + block.out(y), expected, rtol=1e-9, atol=1e-9)


def test_groups_of_one_channel_are_attention_between_positions():
    block = battery.randomize(CGNLBlock(6, 6, 6)).double()
    x = torch.randn(2, 6, 2, 5, dtype=torch.float64)
    with attnlab.record(block) as maps:
        block(x)
    assert maps[""].shape == (2, 6, 10, 10)
    torch.testing.assert_close(maps.dense((2, 5))[""], maps[""])
    expected = torch.einsum("bci,bcj->bcij", block.theta(x).flatten(2), block.phi(x).flatten(2))
    torch.testing.assert_close(maps[""], expected)


def test_the_dense_map_is_what_a_position_gives_when_its_channels_agree():
    block = battery.randomize(CGNLBlock(8, 6, 2, kernel="rbf", gamma=0.3)).double()
    x = torch.randn(1, 8, 2, 3, dtype=torch.float64)
    with attnlab.record(block) as maps:
        block(x)
    g = torch.randn(1, 2, 6, dtype=torch.float64)  # one number for each group and position
    theta, phi, _ = block._project(x)
    y = cgnl_rbf(theta, phi, g.repeat(1, 1, 3), gamma=0.3)
    received = y.view(1, 2, 3, 6).sum(2)
    dense = maps.dense((2, 3))[""]
    torch.testing.assert_close((dense @ g[..., None])[..., 0], received)


@given(seed=st.integers(0, 10**6), kernel=st.sampled_from(["dot", "rbf"]))
@settings(max_examples=15, deadline=None)
def test_a_permutation_of_places_or_of_a_groups_channels(seed, kernel):
    generator = torch.Generator().manual_seed(seed)
    block = battery.randomize(CGNLBlock(8, 6, 2, kernel=kernel, gamma=0.3)).double()
    x = torch.randn(2, 8, 15, generator=generator, dtype=torch.float64)
    order = torch.randperm(15, generator=generator)
    out = block(x.view(2, 8, 3, 5)).flatten(2)
    shuffled = block(x[..., order].view(2, 8, 3, 5)).flatten(2)
    torch.testing.assert_close(shuffled, out[..., order], atol=1e-9, rtol=0)

    channels = torch.randperm(3, generator=generator)  # of both groups
    with torch.no_grad():
        for conv in (block.theta, block.phi, block.g):
            weight = rearrange(conv.weight, "(g c) ... -> g c ...", g=2)
            conv.weight.copy_(rearrange(weight[:, channels], "g c ... -> (g c) ..."))
        block.out.weight.copy_(block.out.weight[:, channels])
    torch.testing.assert_close(block(x.view(2, 8, 3, 5)).flatten(2), out, atol=1e-9, rtol=0)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_behind_a_matching_groupnorm_only_the_sign_of_the_sum_is_left():
    """Section 4A of the specification: s and sign(s) give the same output, up to eps."""
    torch.manual_seed(0)
    x = 10 * torch.randn(2, 16, 6, 6, dtype=torch.float64)  # so that eps is small beside it
    for norm_groups, same in ((4, True), (8, True), (1, False), (2, False)):
        block = CGNLBlock(16, 8, 4, norm_groups=norm_groups).double()
        battery.randomize(block)
        theta, phi, g = block._project(x)
        s = (phi * g).sum(-1, keepdim=True)

        def branch(factor, block=block, theta=theta):
            return block.norm(block.out((factor * theta).reshape(2, 8, 6, 6)))

        torch.testing.assert_close(x + branch(s), block(x))
        difference = relative(branch(s.sign()), branch(s))
        assert (difference < 1e-3) is same, (norm_groups, difference)
    # So phi and g get next to no gradient.
    block = battery.randomize(CGNLBlock(16, 8, 4)).double()
    block(x).mul(torch.randn_like(x)).sum().backward()
    assert block.phi.weight.grad.norm() < 1e-3 * block.theta.weight.grad.norm()


def test_with_the_authors_gamma_the_constant_term_takes_over():
    """Section 4B: at γ = 1e-4 what differs from place to place is a millionth of y."""
    torch.manual_seed(0)
    block = CGNLBlock(64, kernel="rbf")
    theta, phi, g = block._project(torch.randn(1, 64, 14, 14))
    y = cgnl_rbf(theta, phi, g, gamma=1e-4)
    assert (y.std(-1) / y.abs().mean(-1)).max() < 1e-3
    alive = cgnl_rbf(theta, phi, g, gamma=1e-4, include_constant=False)
    assert (alive.std(-1) / alive.abs().mean(-1)).min() > 0.5


def test_bad_input():
    theta, phi, g = elements()
    x = torch.zeros(2, 16, 4, 4)
    long = torch.zeros(8193)
    errors = [
        (lambda: cgnl_dot(theta, phi[..., 1:], g), "phi (2, 3, 6), g (2, 3, 7): expected (..., n)"),
        (lambda: cgnl_rbf(theta[:1], phi, g), "theta (1, 3, 7), phi (2, 3, 7)"),
        (lambda: cgnl_dot(theta, phi[..., :0], g[..., :0]), "with m ≥ 1"),
        (lambda: cgnl_dot(theta, phi, g, impl="flash"), "impl='flash': expected one of auto"),
        (lambda: cgnl_dot(long, long, long, impl="explicit"), "at most 8192 elements"),
        (lambda: cgnl_rbf(theta, phi, g, gamma=0.0), "gamma=0.0: expected a number above 0"),
        (lambda: cgnl_rbf(theta, phi, g, order=-1), "order=-1: expected an integer of at least 0"),
        (lambda: taylor_kernel(theta, phi, gamma=1.0, order=2.0), "order=2.0: expected an integer"),
        (lambda: cgnl_rbf(theta, phi, g, beta="x"), "beta='x': expected one of const, exact"),
        (lambda: cgnl_rbf(theta, phi, g, normalize=True, include_constant=False),
         "include_constant=False: expected True with normalize=True"),
        (lambda: CGNLBlock(12), "inter_channels=6: expected a multiple of groups=8"),
        (lambda: CGNLBlock(12, 8), "channels=12: expected a multiple of groups=8"),
        (lambda: CGNLBlock(16, groups=0), "inter_channels=8: expected a multiple of groups=0"),
        (lambda: CGNLBlock(16, 0), "inter_channels=0: expected"),
        (lambda: CGNLBlock(16, norm_groups=3), "channels=16: expected a multiple of norm_groups=3"),
        (lambda: CGNLBlock(16, kernel="x"), "kernel='x': expected one of dot, rbf"),
        (lambda: CGNLBlock(16, norm="ln"), "norm='ln': expected one of gn, bn, none"),
        (lambda: CGNLBlock(16, ndim=4), "ndim=4: expected one of 1, 2, 3"),
        (lambda: CGNLBlock(16, impl="blockwise"), "impl='blockwise': expected one of auto"),
        (lambda: CGNLBlock(16, normalize=True), "normalize=True: expected kernel='rbf'"),
        (lambda: CGNLBlock(16, kernel="rbf", gamma=-1.0), "gamma=-1.0: expected"),
        (lambda: CGNLBlock(16)(x[:, :8]), "x (2, 8, 4, 4): expected (B, 16, H, W)"),
        (lambda: CGNLBlock(16)(x[0]), "x (16, 4, 4): expected (B, 16, H, W)"),
        (lambda: CGNLBlock(16, ndim=3)(x), "x (2, 16, 4, 4): expected (B, 16, T, H, W)"),
        (lambda: CGNLBlock(16)(x[..., :0]), "x (2, 16, 4, 0): expected"),
        (lambda: CGNLBlock(16, impl="explicit")(torch.zeros(1, 16, 96, 96)), "under record"),
    ]  # fmt: skip
    battery.check_errors(errors)


@pytest.mark.parametrize("kernel", ["dot", "rbf"])
def test_the_explicit_form_compiles_in_one_graph(kernel, device):
    block = CGNLBlock(16, 8, 4, kernel=kernel, impl="explicit").to(device)
    battery.check_compiles(block, torch.randn(2, 16, 3, 4, device=device))


def test_nothing_quadratic_is_kept_for_the_backward_pass():
    theta, phi, g = (x.float().requires_grad_() for x in elements(500, 500))
    for kernel in (cgnl_dot, cgnl_rbf):
        for impl, materialises in (("explicit", True), ("fused", False)):
            kept = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x
            ):
                kernel(theta, phi, g, impl=impl)
            assert (max(kept) >= 6 * 500 * 500) is materialises
