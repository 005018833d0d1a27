"""The operators of nine slots against loops, `F.unfold`, dense matrices and their invariants."""

import math
from itertools import product

import battery
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab import superpixel as sp

# (batch, rows, columns, side): interior, one cell, one row, few large cells, the size of S/32.
GRIDS = [(2, 3, 4, 4), (1, 1, 1, 4), (2, 1, 5, 2), (1, 2, 2, 8), (2, 7, 7, 4), (1, 4, 1, 1)]
quick = settings(max_examples=12, deadline=None, derandomize=True)


def randn(*shape, seed=0, device="cpu", dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype).to(device)


def both_grids(B, Sh, Sw, s, heads=2, d=3, dv=5, device="cpu", dtype=torch.float64):
    """q_s, k_s, v_s of superpixels and q_p, k_p, v_p of pixels, as maps."""
    grid = [randn(B, heads * c, Sh, Sw, seed=i, device=device, dtype=dtype)
            for i, c in enumerate((d, d, d))]  # fmt: skip
    pixels = [randn(B, heads * c, Sh * s, Sw * s, seed=9 + i, device=device, dtype=dtype)
              for i, c in enumerate((d, d, dv))]  # fmt: skip
    return grid + pixels


def cells(x, side, heads=2):
    return sp.to_cells(rearrange(x, "b (m d) h w -> b m d h w", m=heads), side)


def grid(x, heads=2):
    return rearrange(x, "b (m d) y x -> b m y x d", m=heads)


def p2s(side, impl, heads=2):
    """Queries of superpixels, keys and values of pixels, as maps → the superpixels' update."""

    def attend(q_s, k_p, v_p):
        logits = sp.local_logits(cells(k_p, side, heads), grid(q_s, heads))
        out = sp.p2s_attend(logits, cells(v_p, side, heads), impl)
        return rearrange(out, "b m y x d -> b (m d) y x")

    return attend


def s2p(side, heads=2):
    def attend(q_p, k_s, v_s):
        return sp.expand(v_s, sp.local_logits(cells(q_p, side, heads), grid(k_s, heads)))

    return attend


def neighborhood(i, j, side, Sh, Sw):
    """The superpixels (y, x) around the pixel (i, j), in the order of slots."""
    y, x = i // side, j // side
    near = ((y + dy, x + dx) for dy, dx in product((-1, 0, 1), repeat=2))
    return [(y, x) for y, x in near if 0 <= y < Sh and 0 <= x < Sw]


def loop_p2s(q_s, k_p, v_p, side, heads=2):
    """Eq. 2, one superpixel at a time."""
    (B, C, Sh, Sw), out = q_s.shape, torch.zeros(len(q_s), v_p.shape[1], *q_s.shape[2:]).to(q_s)
    for b, m, y, x in product(range(B), range(heads), range(Sh), range(Sw)):
        qs, vs = slice(m * C // heads, (m + 1) * C // heads), v_p.shape[1] // heads
        window = [(i, j) for i, j in product(range(Sh * side), range(Sw * side))
                  if (y, x) in neighborhood(i, j, side, Sh, Sw)]  # fmt: skip
        dots = [q_s[b, qs, y, x] @ k_p[b, qs, i, j] / math.sqrt(C / heads) for i, j in window]
        weights = torch.stack(dots).softmax(0)
        values = torch.stack([v_p[b, m * vs : (m + 1) * vs, i, j] for i, j in window])
        out[b, m * vs : (m + 1) * vs, y, x] = weights @ values
    return out


def loop_s2p(q_p, k_s, v_s, side, heads=2):
    """Eqs. 3 and 4, one pixel at a time."""
    (B, C, h, w), out = q_p.shape, torch.zeros(len(q_p), v_s.shape[1], *q_p.shape[2:]).to(q_p)
    for b, m, i, j in product(range(B), range(heads), range(h), range(w)):
        qs, vs = slice(m * C // heads, (m + 1) * C // heads), v_s.shape[1] // heads
        near = neighborhood(i, j, side, *k_s.shape[2:])
        dots = [q_p[b, qs, i, j] @ k_s[b, qs, y, x] / math.sqrt(C / heads) for y, x in near]
        weights = torch.stack(dots).softmax(0)
        values = torch.stack([v_s[b, m * vs : (m + 1) * vs, y, x] for y, x in near])
        out[b, m * vs : (m + 1) * vs, i, j] = weights @ values
    return out


def unfolded_s2p(q_p, k_s, v_s, side, heads=2):
    """Eqs. 3 and 4 by `F.unfold` of the superpixels, repeated for every pixel."""

    def near(x):
        x = F.unfold(x, 3, padding=1)
        x = rearrange(x, "b (c k) (y x) -> b (c k) y x", k=9, y=k_s.shape[2])
        x = x.repeat_interleave(side, 2).repeat_interleave(side, 3)
        return rearrange(x, "b (m d k) h w -> b m h w k d", m=heads, k=9)

    q, k, v = rearrange(q_p, "b (m d) h w -> b m h w 1 d", m=heads), near(k_s), near(v_s)
    there = near(torch.ones_like(k_s[:1]))[:, :, :, :, :, 0] > 0
    scores = (q * k).sum(-1) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~there, -math.inf).softmax(-1)
    return rearrange((weights[..., None] * v).sum(-2), "b m h w d -> b (m d) h w")


# Both directions are equal to the formula and to F.unfold


@pytest.mark.parametrize("impl", sp.IMPLS)
@pytest.mark.parametrize("shape", GRIDS)
def test_p2s_equals_unfold_in_value_and_gradient(shape, impl, device):
    q_s, _, _, _, k_p, v_p = both_grids(*shape, device=device)
    side = shape[-1]
    reference = lambda q, k, v: sp.unfolded_p2s(q, k, v, side, num_heads=2)  # noqa: E731
    battery.check_matches(p2s(side, impl), reference, q_s, k_p, v_p)


@pytest.mark.parametrize("shape", GRIDS)
def test_s2p_equals_unfold_in_value_and_gradient(shape, device):
    _, k_s, v_s, q_p, _, _ = both_grids(*shape, device=device)
    side = shape[-1]
    reference = lambda q, k, v: unfolded_s2p(q, k, v, side)  # noqa: E731
    battery.check_matches(s2p(side), reference, q_p, k_s, v_s)


@pytest.mark.parametrize("shape", [(1, 3, 4, 2), (1, 1, 1, 2), (2, 1, 4, 1)])
def test_both_equal_the_loop_from_the_formula(shape, device):
    q_s, k_s, v_s, q_p, k_p, v_p = both_grids(*shape, device=device)
    side = shape[-1]
    for impl in sp.IMPLS:
        loop = lambda q, k, v: loop_p2s(q, k, v, side)  # noqa: E731
        battery.check_matches(p2s(side, impl), loop, q_s, k_p, v_p)
    loop = lambda q, k, v: sp.unfolded_p2s(q, k, v, side, num_heads=2)  # noqa: E731
    battery.check_matches(loop, lambda q, k, v: loop_p2s(q, k, v, side), q_s, k_p, v_p)
    battery.check_matches(s2p(side), lambda q, k, v: loop_s2p(q, k, v, side), q_p, k_s, v_s)


@quick
@given(seed=st.integers(0, 10**6), Sh=st.integers(1, 4), Sw=st.integers(1, 4),
       side=st.integers(1, 3))  # fmt: skip
def test_weights_are_a_softmax_over_what_is_there(seed, Sh, Sw, side):
    logits = sp.mask_absent(3 * randn(1, 2, Sh, Sw, side**2, 9, seed=seed))
    weights = logits.softmax(-1)
    there = sp.valid9(Sh, Sw)[:, :, None].expand_as(weights)
    assert (weights[~there] == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))

    windows = sp.p2s_weights(logits)
    torch.testing.assert_close(windows.sum(-1), torch.ones_like(windows[..., 0]))
    per_pixel = sp.turn_around(windows.unflatten(-1, (-1, 9)))
    assert (per_pixel[~there] == 0).all()

    values = randn(1, 2, Sh, Sw, side**2, 3, seed=seed + 1)
    for impl in ("fused", "auto"):
        expected = sp.p2s_attend(logits, values, "explicit")
        torch.testing.assert_close(sp.p2s_attend(logits, values, impl), expected)
    low, high = values.amin((2, 3, 4)), values.amax((2, 3, 4))
    assert (expected >= low[:, :, None, None] - 1e-9).all(), "outside the hull of the values"
    assert (expected <= high[:, :, None, None] + 1e-9).all(), "outside the hull of the values"


@pytest.mark.parametrize("impl", sp.IMPLS)
def test_peaked_logits_stay_finite_and_equal(impl, device):
    q_s, _, _, _, k_p, v_p = both_grids(2, 4, 4, 4, device=device)
    q_s, k_p = 1e3 * q_s, 1e3 * k_p  # logits of order 1e6
    expected = sp.unfolded_p2s(q_s, k_p, v_p, 4, num_heads=2)
    q_s.requires_grad_()
    out = p2s(4, impl)(q_s, k_p, v_p)
    torch.testing.assert_close(out, expected, atol=1e-9, rtol=0)
    out.sum().backward()
    assert q_s.grad.isfinite().all()


def test_one_maximum_for_all_superpixels_would_give_sums_of_zero():
    q_s, _, _, _, k_p, _ = both_grids(1, 4, 4, 4, heads=1)
    logits = sp.local_logits(cells(k_p, 4, 1), grid(1e3 * q_s * torch.arange(16).view(4, 4), 1))
    sums = sp.fold9((logits - logits.amax()).exp().sum(-2)[..., None])
    assert (sums == 0).sum() >= 12
    assert sp.p2s_attend(logits, torch.ones_like(logits[..., :1])).allclose(
        torch.ones(1, dtype=torch.float64)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_float32(dtype, device):
    q_s, k_s, v_s, q_p, k_p, v_p = both_grids(2, 4, 4, 4, device=device, dtype=torch.float32)
    cases = [(p2s(4, impl), (q_s, k_p, v_p)) for impl in sp.IMPLS] + [(s2p(4), (q_p, k_s, v_s))]
    for attend, inputs in cases:
        expected = attend(*(x.to(dtype).float() for x in inputs))
        out = attend(*(x.to(dtype) for x in inputs))
        assert out.dtype == dtype
        assert (out.float() - expected).abs().max() < (0.03 if dtype == torch.bfloat16 else 0.01)
    logits = sp.local_logits(cells(k_p.to(dtype), 4), grid(q_s.to(dtype)))
    assert logits.dtype == torch.float32


def test_training_keeps_a_sixth_of_what_unfolding_keeps():
    """At the shapes of SPFormer-S/16, one image: P2S and S2P together, storages counted once."""

    def kept(attend):
        storages = {}

        def pack(x):
            storage = x.untyped_storage()
            storages[storage.data_ptr()] = (x, storage.nbytes())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            attend()
        return sum(size for _, size in storages.values())

    pixels = randn(1, 14, 14, 16, 512, dtype=torch.float32).requires_grad_()
    superpixels = randn(1, 14, 14, 192, dtype=torch.float32).requires_grad_()

    def parts():
        p = [rearrange(t, "b y x n (m d) -> b m y x n d", m=2)
             for t in pixels.split((64, 64, 384), -1)]  # fmt: skip
        s = [rearrange(t, "b y x (m d) -> b m y x d", m=2) for t in superpixels.split(64, -1)]
        return *p, *s

    def nine(impl):
        q_p, k_p, v_p, q_s, k_s, v_s = parts()
        out = sp.p2s_attend(sp.local_logits(k_p, q_s), v_p, impl)
        return out.sum() + sp.spread(sp.local_logits(q_p, k_s).softmax(-1), v_s).sum()

    def unfolded():
        q_p, k_p, v_p, q_s, k_s, v_s = parts()
        k_p, v_p = (sp.from_cells(t).flatten(1, 2) for t in (k_p, v_p))
        q_s = rearrange(q_s, "b m y x d -> b (m d) y x")
        out = sp.unfolded_p2s(q_s, k_p, v_p, 4, num_heads=2)
        return out.sum() + sp.spread(sp.local_logits(q_p, k_s).softmax(-1), v_s).sum()

    reference = kept(unfolded)
    for impl in ("fused", "explicit"):
        assert kept(lambda impl=impl: nine(impl)) <= reference / 6


# The grid


@pytest.mark.parametrize("shape", GRIDS)
def test_gather_looks_where_the_slots_say(shape):
    B, Sh, Sw, _ = shape
    x = randn(B, Sh, Sw, 3)
    gathered, valid, index = sp.gather9(x), sp.valid9(Sh, Sw), sp.neighbors9(Sh, Sw)
    for y, x_, k in product(range(Sh), range(Sw), range(9)):
        v, u = y + k // 3 - 1, x_ + k % 3 - 1
        there = 0 <= v < Sh and 0 <= u < Sw
        assert valid[y, x_, k] == there
        assert index[y, x_, k] == (v * Sw + u if there else -1)
        assert torch.equal(
            gathered[:, y, x_, k], x[:, v, u] if there else torch.zeros(B, 3).double()
        )


@quick
@given(Sh=st.integers(1, 5), Sw=st.integers(1, 5), side=st.integers(1, 3), seed=st.integers(0, 99))
def test_adjoints_and_inverses(Sh, Sw, side, seed):
    x, y = randn(2, Sh, Sw, 3, seed=seed), randn(2, Sh, Sw, 9, 3, seed=seed + 1)
    torch.testing.assert_close((sp.gather9(x) * y).sum(), (x * sp.fold9(y)).sum())

    weights = randn(2, Sh, Sw, side**2, 9, seed=seed) * sp.valid9(Sh, Sw)[:, :, None]
    pixels = randn(2, Sh, Sw, side**2, 3, seed=seed + 2)
    spread, collected = sp.spread(weights, x), sp.collect(weights, pixels)
    torch.testing.assert_close((spread * pixels).sum(), (x * collected).sum())

    torch.testing.assert_close(sp.turn_around(sp.turn_around(weights)), weights, atol=0, rtol=0)
    seen = sp.turn_around(weights, -math.inf)
    assert torch.equal(seen == -math.inf, ~sp.valid9(Sh, Sw)[:, :, None].expand_as(seen))

    image = randn(2, 3, Sh * side, Sw * side, seed=seed)
    assert torch.equal(sp.from_cells(sp.to_cells(image, side)), image)
    assert torch.equal(sp.to_cells(image, side)[:, -1, -1, -1], image[:, :, -1, -1])


def test_a_superpixel_is_seen_by_4_6_or_9_cells():
    ones = torch.ones(4, 5, 1)
    seen = sp.fold9(sp.gather9(ones))[..., 0]
    expected = torch.full((4, 5), 9.0)
    expected[[0, -1]] = 6.0
    expected[:, [0, -1]] = 6.0
    expected[[0, 0, -1, -1], [0, -1, 0, -1]] = 4.0
    assert torch.equal(seen, expected)


def test_constant_features_share_equally():
    """1/9, 1/6, 1/4 for a pixel; 1/144, 1/96, 1/64 for a superpixel whose cells are 4×4."""
    logits = sp.mask_absent(torch.zeros(1, 1, 4, 5, 16, 9, dtype=torch.float64))
    weights, windows = logits.softmax(-1), sp.p2s_weights(logits)
    for y, x, share in ((0, 0, 4), (0, 2, 6), (2, 0, 6), (2, 2, 9), (3, 4, 4)):
        torch.testing.assert_close(weights[0, 0, y, x].amax().item(), 1 / share)
        torch.testing.assert_close(windows[0, 0, y, x].amax().item(), 1 / (16 * share))


# Symmetry and locality


@pytest.mark.parametrize(("turn", "slots"), [
    (lambda x: torch.rot90(x, 1, (-2, -1)), [6, 3, 0, 7, 4, 1, 8, 5, 2]),
    (lambda x: x.flip(-1), [2, 1, 0, 5, 4, 3, 8, 7, 6]),
])  # fmt: skip
def test_turning_both_grids_turns_the_result_and_permutes_the_slots(turn, slots):
    q_s, k_s, v_s, q_p, k_p, v_p = both_grids(2, 3, 4, 4)
    turned = [turn(x) for x in (q_s, k_s, v_s, q_p, k_p, v_p)]
    for impl in sp.IMPLS:
        expected = turn(p2s(4, impl)(q_s, k_p, v_p))
        got = p2s(4, impl)(turned[0], turned[4], turned[5])
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    got = s2p(4)(turned[3], turned[1], turned[2])
    torch.testing.assert_close(got, turn(s2p(4)(q_p, k_s, v_s)), atol=1e-12, rtol=0)

    before = sp.from_cells(sp.local_logits(cells(q_p, 4), grid(k_s)).softmax(-1))
    after = sp.from_cells(sp.local_logits(cells(turned[3], 4), grid(turned[1])).softmax(-1))
    for old, new in enumerate(slots):
        torch.testing.assert_close(after[:, :, new], turn(before[:, :, old]))


def test_shifting_by_a_cell_shifts_the_interior_and_by_a_pixel_does_not():
    def grids(shift):
        pixels = randn(1, 2, 24, 24).roll(shift, (2, 3))
        return pixels, F.avg_pool2d(pixels, 4)

    def update(shift):
        pixels, superpixels = grids(shift)
        return p2s(4, "fused", heads=1)(superpixels, pixels, pixels)

    by_cell = update((4, 4))[:, :, 2:-1, 2:-1]
    torch.testing.assert_close(by_cell, update((0, 0))[:, :, 1:-2, 1:-2])
    assert (update((1, 1)) - update((0, 0)))[:, :, 1:-1, 1:-1].abs().max() > 0.01


def test_nothing_reaches_beyond_the_neighbourhood():
    q_s, k_s, v_s, q_p, k_p, v_p = both_grids(1, 5, 5, 2, heads=1)
    k_s.requires_grad_(), v_s.requires_grad_()
    s2p(2, 1)(q_p, k_s, v_s)[0, :, 4, 4].sum().backward()  # a pixel of cell (2, 2)
    for x in (k_s, v_s):
        reached = x.grad[0].abs().sum(0) > 0
        assert reached.sum() == 9
        assert reached[1:4, 1:4].all()
    for impl in sp.IMPLS:
        before = p2s(2, impl, 1)(q_s, k_p, v_p)
        changed = [x.clone() for x in (k_p, v_p)]
        for x in changed:
            x[:, :, 8, 8] += 1.0  # of cell (4, 4)
        moved = (p2s(2, impl, 1)(q_s, *changed) - before)[0].abs().sum(0) > 1e-12
        assert moved.sum() == 4
        assert moved[3:, 3:].all()


# Correspondences: k-means, distances, SSN


def test_a_hard_assignment_makes_p2s_the_mean_of_the_assigned_pixels():
    pixels, centers = randn(1, 3, 12, 12), 0.5 * randn(1, 3, 3, 3, seed=5)
    squares = (
        (pixels[..., None, None] - centers[:, :, None, None]).square().sum(1)
    )  # (1, h, w, y, x)
    nearest = torch.zeros(12, 12, dtype=torch.long)
    logits = torch.full((1, 1, 3, 3, 16, 9), -math.inf)
    for i, j in product(range(12), repeat=2):
        near = neighborhood(i, j, 4, 3, 3)
        y, x = min(near, key=lambda p: squares[0, i, j, p[0], p[1]])
        nearest[i, j] = 3 * y + x
        slot = 3 * (y - i // 4 + 1) + x - j // 4 + 1
        logits[0, 0, i // 4, j // 4, 4 * (i % 4) + j % 4, slot] = 0.0
    assert len(nearest.unique()) == 9, "this seed leaves no superpixel empty"
    for impl in sp.IMPLS:
        update = sp.p2s_attend(logits.double(), sp.to_cells(pixels, 4)[:, None], impl)
        for p in range(9):
            mean = pixels[0, :, nearest == p].mean(1)
            torch.testing.assert_close(update[0, 0, p // 3, p % 3], mean, atol=1e-12, rtol=0)
    assert torch.equal(sp.hard_labels(logits)[0, 0], nearest)


def test_p2s_is_not_the_mean_weighted_by_the_association():
    logits = sp.mask_absent(randn(1, 1, 4, 4, 16, 9))
    pixels = randn(1, 1, 4, 4, 16, 3, seed=1)
    ssn_update = sp.collect_means(logits.softmax(-1), pixels)
    assert (sp.p2s_attend(logits, pixels) - ssn_update).abs().max() > 0.1


def test_means_of_superpixels_equal_the_dense_matrix():
    logits, values = sp.mask_absent(randn(2, 1, 3, 4, 4, 9)), randn(2, 3, 6, 8, seed=1)
    dense = sp.dense_association(logits.softmax(-1))[:, 0]  # (B, pixels, superpixels)
    expected = torch.einsum("b i p, b c i -> b c p", dense / dense.sum(1, keepdim=True),
                            values.flatten(2))  # fmt: skip
    torch.testing.assert_close(sp.superpixel_means(values, logits).flatten(2), expected)
    empty = sp.collect_means(torch.zeros(1, 2, 2, 4, 9), torch.ones(1, 2, 2, 4, 3))
    assert (empty == 0).all()
    kept = sp.collect_means(torch.zeros(1, 2, 2, 4, 9), torch.ones(1, 2, 2, 4, 3), torch.ones(3))
    assert (kept == 1).all()


# From superpixels to pixels


def test_expand_is_the_product_with_the_dense_matrix(device):
    logits = sp.mask_absent(randn(2, 2, 3, 4, 4, 9, device=device))
    values = randn(2, 6, 3, 4, seed=1, device=device)

    def dense(values, logits):
        matrix = sp.dense_association(logits.softmax(-1))
        parts = rearrange(values, "b (m d) y x -> b m (y x) d", m=2)
        return rearrange(matrix @ parts, "b m (h w) d -> b (m d) h w", h=6)

    battery.check_matches(lambda v: sp.expand(v, logits), lambda v: dense(v, logits), values)
    matrix = sp.dense_association(logits.softmax(-1))
    assert matrix.shape == (2, 2, 48, 12)
    torch.testing.assert_close(matrix.sum(-1), torch.ones_like(matrix[..., 0]))


def test_merged_heads_are_one_head_of_the_full_width():
    q, k = randn(2, 6, 12, 16), randn(2, 6, 3, 4, seed=1)
    heads = sp.local_logits(cells(q, 4, 3), grid(k, 3))
    one = sp.local_logits(cells(q, 4, 1), grid(k, 1))
    torch.testing.assert_close(sp.merge_heads(heads), one)


def test_ties_show_the_grid_and_labels_are_in_row_major_order():
    constant = sp.mask_absent(torch.zeros(1, 2, 2, 3, 4, 9))
    labels = sp.hard_labels(constant)
    expected = torch.arange(6).view(2, 3).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert labels.shape == (1, 2, 4, 6)
    assert torch.equal(labels[0, 0], expected)
    logits = sp.mask_absent(randn(2, 2, 3, 4, 4, 9))
    best = sp.dense_association(logits.softmax(-1)).argmax(-1)
    assert torch.equal(sp.hard_labels(logits).flatten(2), best)


@pytest.mark.parametrize("mode", ["cell", "window"])
def test_upsampled_association(mode):
    logits = sp.mask_absent(randn(2, 2, 3, 4, 16, 9))
    assert sp.upsample_association(logits, 1, mode) is logits
    fine = sp.upsample_association(logits, 3, mode)
    assert fine.shape == (2, 2, 3, 4, 144, 9)
    there = sp.valid9(3, 4)[:, :, None].expand_as(fine)
    assert torch.equal(fine > -math.inf, there)
    constant = sp.upsample_association(sp.mask_absent(torch.full_like(logits, 2.5)), 3, mode)
    torch.testing.assert_close(constant[there], torch.full_like(constant[there], 2.5))
    values = randn(2, 4, 3, 4)
    expected = sp.expand(values, fine)
    torch.testing.assert_close(sp.expand(values, logits, 3, mode), expected)

    # By hand, for superpixel (1, 1), where its window is inside of the grid.
    own = sp.turn_around(logits)[0, 0, 1, 1]
    window = rearrange(own, "(i j) (u v) -> 1 1 (u i) (v j)", i=4, u=3)
    if mode == "window":
        resized = F.interpolate(window, scale_factor=3, mode="bilinear")[0, 0]
    else:
        blocks = rearrange(window, "1 1 (u i) (v j) -> (u v) 1 i j", u=3, v=3)
        resized = F.interpolate(blocks, scale_factor=3, mode="bilinear")
        resized = rearrange(resized, "(u v) 1 i j -> (u i) (v j)", u=3)
    got = rearrange(sp.turn_around(fine)[0, 0, 1, 1], "(i j) (u v) -> (u i) (v j)", i=12, u=3)
    torch.testing.assert_close(got, resized)


def test_at_the_border_of_the_image_a_window_is_resized_from_what_is_there():
    """A superpixel in a corner: its four cells as an image of their own, clamped at its border."""
    logits = sp.mask_absent(randn(1, 1, 2, 2, 16, 9))
    own = sp.turn_around(logits)[0, 0, 0, 0]
    cells_there = rearrange(own, "(i j) (u v) -> u v i j", i=4, u=3)[1:, 1:]
    image = rearrange(cells_there, "u v i j -> 1 1 (u i) (v j)")
    expected = F.interpolate(image, scale_factor=2, mode="bilinear")[0, 0]
    fine = sp.turn_around(sp.upsample_association(logits, 2, "window"))[0, 0, 0, 0]
    got = rearrange(fine, "(i j) (u v) -> u v i j", i=8, u=3)[1:, 1:]
    torch.testing.assert_close(rearrange(got, "u v i j -> (u i) (v j)"), expected)


def test_resizing_maps_of_slots_across_cells_would_mix_superpixels():
    logits = sp.mask_absent(4 * randn(1, 1, 4, 4, 16, 9)).clamp_min(-1e4)
    wrong = F.interpolate(sp.from_cells(logits.softmax(-1))[:, 0], scale_factor=2, mode="bilinear")
    right = sp.from_cells(sp.upsample_association(logits, 2, "window").softmax(-1))[:, 0]
    border = slice(7, 9)  # fine pixels on both sides of the border between two cells
    assert (wrong - right)[:, :, border].abs().max() > 0.3


def test_upsampling_a_hard_assignment_keeps_it_hard_inside():
    hard = torch.full((1, 1, 2, 2, 4, 9), -math.inf)
    hard[..., 4] = 0.0
    for mode in ("cell", "window"):
        fine = sp.upsample_association(hard, 3, mode)
        assert torch.equal(sp.hard_labels(fine)[0, 0, ::6, ::6], torch.tensor([[0, 1], [2, 3]]))
        assert not fine.isnan().any()


def test_bad_input():
    logits, values = torch.zeros(1, 2, 3, 4, 4, 9), torch.zeros(1, 2, 3, 4, 4, 5)
    battery.check_errors([
        (lambda: sp.to_cells(torch.zeros(1, 3, 6, 7), 2), "x (1, 3, 6, 7): expected (..., d"),
        (lambda: sp.to_cells(torch.zeros(6, 7), 1), "x (6, 7): expected"),
        (lambda: sp.to_cells(torch.zeros(3, 6, 6), 0), "multiples of side=0"),
        (lambda: sp.local_logits(values, torch.zeros(1, 2, 3, 3, 5)), "superpixels (1, 2, 3, 3, "),
        (lambda: sp.local_logits(values, torch.zeros(1, 2, 3, 4, 6)), "expected (..., Sh, Sw, s²"),
        (lambda: sp.p2s_attend(logits, values, "naive"), "impl='naive': expected one of auto"),
        (lambda: sp.p2s_attend(logits[..., :8], values), "logits (1, 2, 3, 4, 4, 8), values"),
        (lambda: sp.p2s_attend(logits[:, :1], values), "expected (..., Sh, Sw, s², 9) and (..., S"),
        (lambda: sp.expand(torch.zeros(1, 3, 3, 4), logits), "values (1, 3, 3, 4), logits (1,"),
        (lambda: sp.expand(torch.zeros(1, 2, 4, 4), logits), "C a multiple of M, and slots of M"),
        (lambda: sp.upsample_association(logits, 2, "slot"), "mode='slot': expected cell or w"),
        (lambda: sp.upsample_association(logits, 0), "scale=0: expected a whole number from 1"),
    ])  # fmt: skip
