"""Sparse attention: each pattern equals dense attention under its mask, and pays for no more."""

import itertools
import math

import battery
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attnlab import record
from attnlab.attention import MultiHeadAttention
from attnlab.interlaced import InterlacedStage
from attnlab.lab import cost
from attnlab.sparse import (
    AxialAttention,
    AxisAttention,
    CrissCrossAttention,
    DilatedAttention,
    InterlacedSparseAttention,
    NeighborhoodAttention,
    WindowAttention,
    criss_cross_attention,
)
from attnlab.sparse_blocks import block_attention, dense_mask, neighbors, residues, windows

IMPLS = ("explicit", "fused", "auto")
SIZES = [(7, 10), (13, 9), (8, 12)]  # none is square, and only the last is a multiple of 4


def stage(cell=(4, 3), long_range=True):
    return InterlacedStage(12, 6, 12, cell, long_range, "auto")


# For each pattern a fresh module, and whether position (i, j) sees (y, x) of an H×W map.
def same_cell(shift, size):
    return lambda i, y, length: length <= size or (i - shift) // size == (y - shift) // size


def near(size, dilation=1):
    def sees(i, y, length):
        lattice = [p for p in range(length) if p % dilation == i % dilation]
        center = min(max(lattice.index(i), size // 2), len(lattice) - 1 - size // 2)
        return y in lattice[center - size // 2 : center + size // 2 + 1]

    return sees


def cell_of(size):
    return lambda i, y, n: (i + -n % size // 2) // size == (y + -n % size // 2) // size


def both(row, col=None):
    return lambda i, j, y, x, H, W: row(i, y, H) and (col or row)(j, x, W)


MHA = {
    "window": (lambda: WindowAttention(12, 4, 3), both(same_cell(0, 4))),
    "window, not square": (
        lambda: WindowAttention(12, (3, 5), 3),
        both(same_cell(0, 3), same_cell(0, 5)),
    ),
    "window, shifted": (
        lambda: WindowAttention(12, 4, 3, shift_size=(2, 1)),
        both(same_cell(2, 4), same_cell(1, 4)),
    ),
    "neighborhood": (lambda: NeighborhoodAttention(12, 5, 3), both(near(5))),
    "dilated": (lambda: DilatedAttention(12, 3, 2, 3), both(near(3, 2))),
    "row": (
        lambda: AxisAttention(12, "row", 3),
        both(lambda i, y, n: i == y, lambda j, x, n: True),
    ),
    "column": (
        lambda: AxisAttention(12, "column", 3),
        both(lambda i, y, n: True, lambda j, x, n: j == x),
    ),
}
OTHERS = {
    "criss-cross": (
        lambda: CrissCrossAttention(8, recurrence=1),
        lambda i, j, y, x, H, W: i == y or j == x,
    ),
    "interlaced, long": (
        stage,
        both(lambda i, y, n: (i - y) % 4 == 0, lambda j, x, n: (j - x) % 3 == 0),
    ),
    "interlaced, short": (lambda: stage(long_range=False), both(cell_of(4), cell_of(3))),
}
every_pattern = pytest.mark.parametrize("name", [*MHA, *OTHERS])
every_impl = pytest.mark.parametrize("impl", IMPLS)


def make(name):
    return (MHA | OTHERS)[name][0]()


def channels(module):
    return next(m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)).weight.shape[1]


def random_map(c, H, W, batch=2, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, c, H, W, generator=generator, dtype=torch.float64).to(device)


def qkv(H, W, d=4, dv=4, device="cpu"):
    return [random_map(3, H, W * e, 2, device, i).view(2, 3, H, W, e)
            for i, e in enumerate((d, d, dv))]  # fmt: skip


def tokens(x):
    return x.flatten(2, 3) if x.ndim == 5 else rearrange(x, "b c h w -> b (h w) c")


@every_pattern
@pytest.mark.parametrize("shape", SIZES)
def test_the_mask_is_the_rule_position_by_position(name, shape):
    sees = (MHA | OTHERS)[name][1]
    places = list(itertools.product(range(shape[0]), range(shape[1])))
    rule = torch.tensor([[bool(sees(*query, *key, *shape)) for key in places] for query in places])
    assert torch.equal(make(name).dense_mask(shape), rule)


@every_impl
@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("name", MHA)
def test_equals_dense_attention_under_its_mask(name, shape, impl, device):
    """In value and in the gradient of the input; the reference is multi-head attention."""
    ours, theirs = make(name).to(device), MultiHeadAttention(12, 3, impl="explicit").to(device)
    battery.randomize(ours)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.impl = impl
    mask = ours.dense_mask(shape).to(device)

    def dense(x):
        out = theirs(tokens(x), mask=mask)
        return rearrange(out, "b (h w) c -> b c h w", h=shape[0])

    theirs.double()
    battery.check_matches(ours, dense, random_map(12, *shape, device=device))


AXES = {
    "windows": lambda n: windows(n, 4),
    "shifted": lambda n: windows(n, 4, 3),
    "one cell": lambda n: windows(n, 99, 5),
    "each alone": lambda n: windows(n, 1),
    "residues": lambda n: residues(n, 3),
    "offset": lambda n: residues(n, 4, 1),
    "all": lambda n: residues(n, 1),
    "neighbors": lambda n: neighbors(n, 3),
    "one query a block": lambda n: neighbors(n, 3, block=1),
    "dilated": lambda n: neighbors(n, 3, 2, block=2),
}


@every_impl
@pytest.mark.parametrize(
    ("row", "col"), list(zip(AXES, [*list(AXES)[3:], *list(AXES)[:3]], strict=True))
)
def test_blocks_equal_sdpa_in_value_and_every_gradient(row, col, impl, device):
    rows, cols = AXES[row](11), AXES[col](8)
    rows, cols = (
        axis._replace(**{key: x.to(device) for key, x in axis._asdict().items()
                         if isinstance(x, torch.Tensor)})
        for axis in (rows, cols)
    )  # fmt: skip
    mask = dense_mask(rows, cols)

    def dense(q, k, v):
        out = F.scaled_dot_product_attention(*map(tokens, (q, k, v)), mask, scale=0.7)
        return out.unflatten(2, (11, 8))

    battery.check_matches(
        lambda q, k, v: block_attention(q, k, v, rows, cols, scale=0.7, impl=impl),
        dense,
        *qkv(11, 8, dv=6, device=device),
    )


@given(
    H=st.integers(1, 12), W=st.integers(1, 12), size=st.integers(1, 6), shift=st.integers(0, 5),
    kind=st.sampled_from(["windows", "residues", "neighbors"]), block=st.integers(1, 5),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_every_size_equals_dense_attention(H, W, size, shift, kind, block):
    def axis(n):
        if kind == "windows":
            return windows(n, size, shift % size)
        if kind == "residues":
            return residues(n, size, -n % size // 2)
        odd = (min(n, size) + 1) // 2 * 2 - 1
        return neighbors(n, odd if odd <= n else odd - 2, block=block)

    rows, cols = axis(H), axis(W)
    for positions in (rows, cols):
        places = positions.queries.flatten().sort().values
        assert torch.equal(places, torch.arange(len(places))), "each query in one block"
    q, k, v = qkv(H, W)
    out = block_attention(q, k, v, rows, cols, impl="fused")
    mask = dense_mask(rows, cols)
    assert mask.diagonal().all(), "every position sees itself"
    expected = F.scaled_dot_product_attention(*map(tokens, (q, k, v)), mask)
    torch.testing.assert_close(tokens(out), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("shape", [*SIZES, (1, 1), (1, 7), (6, 1)])
def test_criss_cross_equals_dense_attention_with_one_softmax(shape, device):
    mask = CrissCrossAttention(8).dense_mask(shape).to(device)

    def dense(q, k, v):
        out = F.scaled_dot_product_attention(*map(tokens, (q, k, v)), mask, scale=1.0)
        return out.unflatten(2, shape)

    battery.check_matches(criss_cross_attention, dense, *qkv(*shape, dv=6, device=device))


def test_criss_cross_counts_itself_once():
    q, k, v = qkv(5, 4)
    weights = []
    criss_cross_attention(q, k, torch.ones_like(v), probe=lambda w: weights.append(w) or w)
    assert ((weights[0] > 0).sum(-1) == 5 + 4 - 1).all()
    equal = criss_cross_attention(torch.zeros_like(q), k, v)
    cross = [v[:, :, 2, :].sum(2) + v[:, :, :, 1].sum(2) - v[:, :, 2, 1]]
    torch.testing.assert_close(equal[:, :, 2, 1], cross[0] / 8)


def test_windows_equal_a_loop_over_windows():
    q, k, v = qkv(7, 10)
    out = torch.full_like(v, math.nan)
    for top, left in itertools.product(range(0, 7, 4), range(0, 10, 4)):
        window = (slice(None), slice(None), slice(top, top + 4), slice(left, left + 4))
        q_w, k_w, v_w = (x[window].flatten(2, 3) for x in (q, k, v))
        weights = (q_w @ k_w.mT / 2).softmax(-1)
        out[window] = (weights @ v_w).view_as(v[window])
    for impl in IMPLS:
        got = block_attention(q, k, v, windows(7, 4), windows(10, 4), impl=impl)
        torch.testing.assert_close(got, out, atol=1e-12, rtol=0)


def test_a_shift_equals_a_roll_with_a_region_mask():
    """Swin's way: roll the map, cut windows, and forbid what the roll has brought together."""
    q, k, v = qkv(8, 12)
    region = torch.zeros(8, 12)
    for number, (ys, xs) in enumerate(itertools.product(
        (slice(0, -4), slice(-4, -2), slice(-2, None)), repeat=2
    )):  # fmt: skip
        region[ys, xs] = number
    cut = "b n (i u) (j v) d -> (b i j) n (u v) d"
    rolled = [x.roll((-2, -2), (2, 3)) for x in (q, k, v)]
    parts = [rearrange(x, cut, u=4, v=4) for x in rolled]
    same = rearrange(region, "(i u) (j v) -> (i j) (u v)", u=4, v=4)
    mask = (same[:, :, None] == same[:, None]).repeat(2, 1, 1)[:, None]
    out = F.scaled_dot_product_attention(*parts, mask)
    out = rearrange(out, "(b i j) n (u v) d -> b n (i u) (j v) d", i=2, j=3, u=4)
    ours = block_attention(q, k, v, windows(8, 4, 2), windows(12, 4, 2))
    torch.testing.assert_close(ours, out.roll((2, 2), (2, 3)), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("name", "count"),
    [("window", 16), ("neighborhood", 25), ("dilated", 9), ("row", 12), ("column", 8),
     ("criss-cross", 19), ("interlaced, long", 8), ("interlaced, short", 12)],
)  # fmt: skip
def test_number_of_keys(name, count):
    """On 8×12 positions. Neighbourhoods have as many at the border as elsewhere."""
    assert (make(name).dense_mask((8, 12)).sum(1) == count).all()


def reach(module, c, shape, position, layers=1):
    """Where the gradient of one output position with respect to the input is not zero."""
    module = battery.randomize(module).double().eval()
    x = random_map(c, *shape).requires_grad_()
    out = x
    for _ in range(layers):
        out = module(out)
    out[:, :, position // shape[1], position % shape[1]].square().sum().backward()
    return (x.grad.abs().sum((0, 1)) > 0).flatten()


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", [*MHA, "criss-cross"])
def test_reach_is_that_of_the_mask(name, layers):
    shape, module = (7, 10), make(name)
    mask = module.dense_mask(shape).double()
    paths = torch.linalg.matrix_power(mask, layers)
    for position in (0, 23, 69):
        seen = reach(module, channels(module), shape, position, layers)
        assert torch.equal(seen, paths[position] > 0)


def test_paths():
    """How many ways there are from a position to another through both stages."""
    for shape in SIZES:
        for order in ("row_first", "column_first"):
            first, second = AxialAttention(12, 3, order).dense_mask(shape).double()
            assert (second @ first == 1).all()
        for order in ("long_first", "short_first"):
            module = InterlacedSparseAttention(12, (4, 3), order=order)
            first, second = module.dense_mask(shape).double()
            paths = second @ first
            assert paths.max() == 1
            # The border cuts cells of 7×10 and 13×9 positions, and with them the way to some.
            assert paths.all() == (shape == (8, 12))
        H, W = shape
        cross = CrissCrossAttention(8).dense_mask(shape).double()
        paths = (cross @ cross).view(H, W, H, W)
        assert paths[2, 3, 4, 5] == 2
        assert paths[2, 3, 2, 5] == W
        assert paths[2, 3, 4, 3] == H
        assert paths[2, 3, 2, 3] == H + W - 1
        assert paths.min() == 2


def test_two_passes_of_criss_cross_reach_everything_and_one_does_not():
    once = reach(CrissCrossAttention(8, recurrence=1), 8, (6, 9), 20)
    twice = reach(CrissCrossAttention(8, recurrence=2), 8, (6, 9), 20)
    assert once.sum() == 6 + 9 - 1
    assert twice.all()
    for module in (AxialAttention(12, 3), InterlacedSparseAttention(12, (2, 3), drop=0.0)):
        assert reach(module, 12, (6, 9), 20).all()
    assert reach(AxialAttention(12, 3, "sum"), 12, (6, 9), 20).sum() == 6 + 9 - 1


def test_the_limit_is_full_attention():
    full = battery.randomize(MultiHeadAttention(12, 3)).double()
    x = random_map(12, 7, 7)
    expected = rearrange(full(tokens(x)), "b (h w) c -> b c h w", h=7)
    for module in (
        WindowAttention(12, 7, 3),
        WindowAttention(12, (9, 20), 3, shift_size=4),
        NeighborhoodAttention(12, 7, 3),
    ):
        module.double().load_state_dict(full.state_dict())
        torch.testing.assert_close(module(x), expected, atol=1e-9, rtol=0)
    assert stage((1, 1), long_range=True).dense_mask((5, 4)).all()
    assert stage((5, 4), long_range=False).dense_mask((5, 4)).all()
    assert torch.equal(stage((5, 4)).dense_mask((5, 4)), torch.eye(20, dtype=torch.bool))


def test_a_kernel_of_one_returns_the_values():
    module = battery.randomize(NeighborhoodAttention(12, 1, 3)).double()
    x = random_map(12, 5, 8)
    values = module.qkv(tokens(x))[..., 24:]
    torch.testing.assert_close(tokens(module(x)), module.proj(values))


def test_windows_move_with_the_map_by_a_window_and_neighborhoods_by_one():
    x = random_map(12, 16, 20)
    window = battery.randomize(WindowAttention(12, 4, 3)).double()
    torch.testing.assert_close(window(x.roll((4, 8), (2, 3))), window(x).roll((4, 8), (2, 3)))
    moved = window(x.roll(1, 3)) - window(x).roll(1, 3)
    assert moved.abs().max() > 0.01
    near = battery.randomize(NeighborhoodAttention(12, 5, 3)).double()
    difference = near(x.roll((1, 1), (2, 3))) - near(x).roll((1, 1), (2, 3))
    assert difference[:, :, 3:-2, 3:-2].abs().max() < 1e-12
    assert difference.abs().max() > 0.01


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (2, 3)])
def test_tiny_maps(shape):
    x = random_map(8, *shape).float()
    for module in (
        WindowAttention(8, 4, 2, shift_size=2),
        NeighborhoodAttention(8, 1, 2),
        AxialAttention(8, 2),
        CrissCrossAttention(8),
        InterlacedSparseAttention(8, 1),
    ):
        out = module.eval()(x)
        assert out.shape == x.shape
        assert out.isfinite().all()
    alone = battery.randomize(CrissCrossAttention(8, recurrence=1))
    x = x[:, :, :1, :1]
    torch.testing.assert_close(alone(x), x + alone.gamma * alone.value(x))


@every_pattern
def test_recorded_maps_are_the_weights(name):
    """Dense, their rows sum to 1, and the weights lie exactly where the mask allows them."""
    shape, module = (7, 10), battery.randomize(make(name)).double().eval()
    x = random_map(channels(module), *shape)
    with record(module) as maps:
        module(x)
    weights = maps.dense(shape)[""]
    assert weights.shape[2:] == (70, 70)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert torch.equal(weights[0, 0] > 0, module.dense_mask(shape))


def test_stages_compose():
    x = random_map(12, 7, 10)
    for module, names in (
        (AxialAttention(12, 3), ("row", "column")),
        (AxialAttention(12, 3, "column_first"), ("column", "row")),
        (AxialAttention(12, 3, "sum"), ("row", "column")),
        (InterlacedSparseAttention(12, (7, 5)), ("long_range", "short_range")),
    ):
        module = battery.randomize(module).double().eval()
        with record(module) as maps:
            module(x)
        assert tuple(maps) == names
        composed = module.dense_map(tuple(maps.values()), (7, 10))
        torch.testing.assert_close(composed.sum(-1), torch.ones(2, 1, 70, dtype=torch.float64))
        reached = composed[0, 0] > 0
        first, second = module.dense_mask((7, 10))
        if getattr(module, "order", "") == "sum":
            assert torch.equal(reached, first | second)
        else:
            assert reached.all()


def test_every_call_of_a_recurrent_module_is_recorded():
    module = battery.randomize(CrissCrossAttention(8, recurrence=2)).double()
    with record(module) as maps:
        module(random_map(8, 4, 6))
    assert [tuple(map.shape) for map in maps.calls[""]] == [(2, 1, 24, 10)] * 2


BATTERIES = {
    "window": (lambda: WindowAttention(12, 4, 3), 4 * 12**2 + 4 * 12),
    "window, shifted": (lambda: WindowAttention(12, 4, 3, shift_size=2), 4 * 12**2 + 4 * 12),
    "neighborhood": (lambda: NeighborhoodAttention(12, 3, 3), 4 * 12**2 + 4 * 12),
    "dilated": (lambda: DilatedAttention(12, 3, 2, 3), 4 * 12**2 + 4 * 12),
    "axial": (lambda: AxialAttention(12, 3), 2 * (4 * 12**2 + 4 * 12)),
    "criss-cross": (lambda: CrissCrossAttention(8, recurrence=2), 2 * (8 + 1) + 8 * 8 + 8 + 1),
    "interlaced, long": (stage, 2 * (12 * 6 + 6 * 6 + 4 * 6) + 2 * 12 * 12 + 2 * 12),
    "interlaced": (lambda: InterlacedSparseAttention(12, (4, 3)), None),
}
COMPILED = ("window, shifted", "dilated", "criss-cross", "interlaced, long")  # the others are alike


@pytest.mark.parametrize("name", BATTERIES)
def test_passes_the_battery(name, device):
    make_module, parameters = BATTERIES[name]
    c = channels(make_module())
    x = torch.randn(2, c, 8, 12, device=device)
    sizes = [((x[:1],), (1, c, 8, 12)), ((x[:, :, :, :6],), (2, c, 8, 6))]
    battery.battery(
        lambda: make_module().to(device),
        x,
        impls=IMPLS,
        parameters=parameters,
        sizes=sizes,
        grid=(8, 12),
        identity_at_init=name == "criss-cross",
        compiles=name in COMPILED,
    )


def test_the_recurrence_costs_no_parameters():
    once, twice = CrissCrossAttention(64, recurrence=1), CrissCrossAttention(64, recurrence=2)
    assert cost.parameters(once) == cost.parameters(twice)
    twice.load_state_dict(once.state_dict(), strict=True)


def test_ccnets_names_load():
    module = CrissCrossAttention(64)
    state = {"gamma": torch.ones(1)}
    for name, out in (("query_conv", 8), ("key_conv", 8), ("value_conv", 64)):
        state |= {f"{name}.weight": torch.randn(out, 64, 1, 1), f"{name}.bias": torch.randn(out)}
    module.load_state_dict(dict(state), strict=True)
    assert torch.equal(module.value.bias, state["value_conv.bias"])


class Openseg(nn.Module):
    """openseg's layout, written from its description: the names, and one loop over groups a stage.

    The map is filled with zeros first, and nothing is masked.
    """

    def __init__(self, c, cell):
        super().__init__()
        self.cell = cell
        self.stages = nn.ModuleList([nn.ModuleDict(
            {"long_range_sa": self.attention(c), "short_range_sa": self.attention(c)}
        )])  # fmt: skip
        self.conv_bn = nn.Sequential(nn.Conv2d(2 * c, c, 1, bias=False), self.bn(c))

    @staticmethod
    def bn(c):
        return nn.Sequential(nn.BatchNorm2d(c), nn.ReLU())

    def attention(self, c):
        d = c // 2
        conv = lambda a, b: nn.Conv2d(a, b, 1, bias=False)  # noqa: E731
        parts = {name: nn.Sequential(conv(c, d), self.bn(d), conv(d, d), self.bn(d))
                 for name in ("f_key", "f_query")}  # fmt: skip
        parts |= {"f_value": conv(c, c), "W": nn.Sequential(conv(c, c), self.bn(c))}
        return nn.ModuleDict(parts)

    def forward(self, x):
        P, Q = self.cell
        H, W = x.shape[2:]
        top, left = -H % P // 2, -W % Q // 2
        padded = x.new_zeros(*x.shape[:2], -(-H // P) * P, -(-W // Q) * Q)
        padded[:, :, top : top + H, left : left + W] = x
        long, short = self.stages[0].values()
        context = torch.zeros_like(padded)
        for i, j in itertools.product(range(P), range(Q)):
            context[:, :, i::P, j::Q] = self.attend(long, padded[:, :, i::P, j::Q])
        out = torch.zeros_like(padded)
        for i, j in itertools.product(range(0, padded.shape[2], P), range(0, padded.shape[3], Q)):
            cell = (slice(None), slice(None), slice(i, i + P), slice(j, j + Q))
            out[cell] = self.attend(short, context[cell])
        return self.conv_bn(torch.cat([x, out[:, :, top : top + H, left : left + W]], 1))

    @staticmethod
    def attend(parts, x):
        q, k, v = (parts[name](x).flatten(2) for name in ("f_query", "f_key", "f_value"))
        weights = (q.mT @ k / q.shape[1] ** 0.5).softmax(-1)
        return parts["W"]((v @ weights.mT).view_as(x))


@pytest.mark.parametrize(
    ("shape", "impl"), [((8, 12), "fused"), ((7, 10), "fused"), ((7, 10), "explicit")]
)
def test_equals_opensegs_module_with_its_weights(shape, impl, device):
    theirs = battery.randomize(Openseg(12, (4, 3))).to(device).eval()
    ours = InterlacedSparseAttention(12, (4, 3), impl=impl).to(device).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert not ours.mask_padding
    x = random_map(12, *shape, device=device)
    battery.check_matches(ours, theirs, x)
    ours.mask_padding = True
    masked = (ours(x) - theirs(x)).abs().max()
    assert masked < 1e-9 if shape == (8, 12) else masked > 1e-3


def test_the_loader_of_ours_does_not_touch_the_padding():
    module = InterlacedSparseAttention(12, 4)
    module.load_state_dict(InterlacedSparseAttention(12, 4).state_dict(), strict=True)
    assert module.mask_padding


def test_published_parameter_counts():
    with torch.device("meta"):
        assert cost.parameters(InterlacedSparseAttention(512)) == 2_366_464
        assert cost.parameters(Openseg(512, (8, 8))) == 2_366_464
        assert cost.parameters(CrissCrossAttention(512)) == 2 * (512 * 64 + 64) + 512 * 513 + 1


def test_the_arithmetic_is_that_of_the_formulas():
    """2 · N · keys · D multiply-accumulates on 56×56 positions with D = 64 (spec's table)."""
    H, D = 56, 64
    q, k, v = torch.randn(3, 1, 1, H, H, D)

    def macs(rows, cols):
        return cost.macs(block_attention, q, k, v, rows, cols)

    alone, whole = windows(H, 1), windows(H, H)
    assert macs(windows(H, 7), windows(H, 7)) == 2 * H**2 * 49 * D
    assert macs(neighbors(H, 7, block=1), neighbors(H, 7, block=1)) == 2 * H**2 * 49 * D
    assert macs(alone, whole) + macs(whole, alone) == 2 * H**2 * 2 * H * D
    interlaced = macs(residues(H, 7), residues(H, 7)) + macs(windows(H, 7), windows(H, 7))
    assert interlaced == 2 * H**2 * (64 + 49) * D
    # Itself is computed twice, and masked once.
    assert cost.macs(criss_cross_attention, q, k, v) == 2 * H**2 * 2 * H * D


@pytest.mark.parametrize(
    ("name", "most"),
    [("window", 1.1), ("window, shifted", 1.1), ("neighborhood", 1.1), ("dilated", 1.1),
     ("row", 1.6), ("criss-cross", 1.6)],
)  # fmt: skip
def test_memory_grows_less_than_quadratically(name, most):
    module = make(name).eval()
    sides, used = (32, 64), []
    for side in sides:
        x = torch.randn(1, channels(module), side, side)
        with torch.no_grad():
            used.append(cost.peak_memory(lambda x=x: module(x)))
    assert cost.growth([side**2 for side in sides], used) < most


def test_bad_input():
    x = torch.zeros(1, 12, 4, 8)
    q, k, v = qkv(4, 8)
    cases = [
        (lambda: WindowAttention(12, 4, 5), "dim=12: expected a multiple of num_heads=5"),
        (lambda: WindowAttention(12, 0, 3), "window_size=0: expected at least 1"),
        (lambda: WindowAttention(12, 4, 3, 4), "shift_size=4: expected 0 ≤ shift < 4"),
        (lambda: WindowAttention(12, 4, 3, -1), "shift_size=-1: expected 0 ≤ shift < 4"),
        (lambda: WindowAttention(12, 4, 3, impl="x"), "impl='x': expected one of auto"),
        (lambda: WindowAttention(8, 4, 2)(x), "x (1, 12, 4, 8): expected (B, 8, H, W)"),
        (lambda: WindowAttention(12, 4, 3)(x[0]), "x (12, 4, 8): expected (B, 12, H, W)"),
        (lambda: NeighborhoodAttention(12, 4, 3), "kernel_size=4: expected an odd number"),
        (lambda: NeighborhoodAttention(12, 5, 3)(x), "x of 4×8 positions: expected at least 5×5"),
        (lambda: DilatedAttention(12, 3, 0, 3), "dilation=0: expected at least 1"),
        (lambda: DilatedAttention(12, 3, 2, 3)(x), "expected at least 6×6, so that each sees"),
        (lambda: AxisAttention(12, "depth", 3), "axis='depth': expected row or column"),
        (lambda: AxialAttention(12, 3, "both"), "order='both': expected row_first, column_first"),
        (lambda: AxialAttention(8, 2)(x), "x (1, 12, 4, 8): expected (B, 8, H, W)"),
        (lambda: CrissCrossAttention(12), "channels=12: expected a multiple of 8, or key_channels"),
        (lambda: CrissCrossAttention(4), "channels=4: expected a multiple of 8, or key_channels"),
        (lambda: CrissCrossAttention(8, recurrence=0), "recurrence=0: expected at least 1"),
        (lambda: CrissCrossAttention(8)(x), "x (1, 12, 4, 8): expected (B, 8, H, W)"),
        (lambda: InterlacedSparseAttention(12, 0), "cell=0: expected at least 1"),
        (lambda: InterlacedSparseAttention(12, order="x"), "order='x': expected long_first or"),
        (
            lambda: InterlacedSparseAttention(12, 8)(x),
            "x (1, 12, 4, 8): expected a map of at least one cell (8, 8); on a smaller one, long-",
        ),
        (lambda: InterlacedSparseAttention(8, 2)(x), "x (1, 12, 4, 8): expected (B, 8, H, W)"),
        (
            lambda: block_attention(q, k[:, :, :3], v, windows(4, 2), windows(8, 2)),
            "k (2, 3, 3, 8, 4): expected (B, heads, 4, 8, width)",
        ),
        (
            lambda: criss_cross_attention(q, k, v[:, :, :, :5]),
            "v (2, 3, 4, 5, 4): expected (B, heads, 4, 8, width)",
        ),
        (lambda: criss_cross_attention(q[0], k[0], v[0]), "q (3, 4, 8, 4): expected (B, heads"),
        (lambda: block_attention(q, k, v, windows(4, 2), windows(8, 2), impl="x"), "impl='x'"),
    ]
    battery.check_errors(cases)
