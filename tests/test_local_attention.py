"""Local attention against loops, F.unfold, masked full attention and warps; weighted neighbors."""

import math

import battery
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.ops import deform_conv2d

import attnlab
from attnlab.attention import scaled_dot_product_attention
from attnlab.flow import warp
from attnlab.local_attention import (
    AttentionWarp,
    Embedding,
    attention_to_flow,
    dense_window,
    flow_to_attention,
    local_attend,
    local_attention_warp,
    local_correlation,
    local_offsets,
    progressive_offsets,
)
from attnlab.weighted_neighbors import LocallyWeightedNeighbors, locally_weighted_neighbors

IMPLS = ("explicit", "auto", "fused", "unfold")
PADDINGS = [("border", "replicate"), ("zeros", "zeros")]  # of `warp`, of `local_attend`
# (batch, D, C, height, width, radius): more and less than a tile, one row, a window beyond the map
SHAPES = [(2, 3, 5, 12, 15, 4), (1, 4, 4, 8, 16, 1), (2, 3, 3, 1, 9, 2), (1, 2, 3, 3, 4, 5),
          (2, 4, 2, 9, 5, 0)]  # fmt: skip
quick = settings(max_examples=12, deadline=None, derandomize=True)


def randn(*shape, seed=0, device="cpu", dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype).to(device)


def maps(B, D, C, H, W, device="cpu"):
    """Query, key and value."""
    return [randn(B, c, H, W, seed=i, device=device) for i, c in enumerate((D, D, C))]


def loop_attention(query, key, value, radius):
    """The formula, cell by cell."""
    _, D, H, W = query.shape
    rows = []
    for i in range(H):
        for j in range(W):
            cells = [(y, x) for y in range(max(0, i - radius), min(H, i + radius + 1))
                     for x in range(max(0, j - radius), min(W, j + radius + 1))]  # fmt: skip
            dots = [(query[:, :, i, j] * key[:, :, y, x]).sum(1) / math.sqrt(D) for y, x in cells]
            weights = torch.stack(dots, 1).softmax(1)
            values = torch.stack([value[:, :, y, x] for y, x in cells], 1)
            rows.append((weights[:, :, None] * values).sum(1))
    return rearrange(torch.stack(rows, -1), "b c (h w) -> b c h w", h=H)


def masked_attention(query, key, value, radius):
    """Full attention under the mask of the window."""
    H, W = query.shape[2:]
    q, k, v = (rearrange(x, "b c h w -> b (h w) c") for x in (query, key, value))
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    y, x = y.flatten(), x.flatten()
    mask = ((y[:, None] - y).abs() <= radius) & ((x[:, None] - x).abs() <= radius)
    out = scaled_dot_product_attention(q, k, v, mask=mask.to(q.device))
    return rearrange(out, "b (h w) c -> b c h w", h=H)


# One operator, four forms


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_masked_full_attention_in_value_and_gradient(shape, impl, device):
    *shape, radius = shape
    battery.check_matches(
        lambda q, k, v: local_attention_warp(q, k, v, radius, impl=impl),
        lambda q, k, v: masked_attention(q, k, v, radius),
        *maps(*shape, device=device),
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_equals_the_loop_from_the_formula(impl):
    battery.check_matches(
        lambda q, k, v: local_attention_warp(q, k, v, 2, impl=impl),
        lambda q, k, v: loop_attention(q, k, v, 2),
        *maps(2, 3, 4, 4, 5),
    )


def test_zero_keys_outside_would_take_weight():
    q, k, v = maps(1, 3, 2, 6, 7)
    masked = local_attention_warp(q, k, v, 2)
    zeros = local_attend(v, local_correlation(q / 3**0.5, k, 2, "zeros").softmax(1), 2)
    difference = (masked - zeros).abs().amax((0, 1))
    assert difference[2:-2, 2:-2].max() < 1e-9 < 0.01 < difference.max()


@pytest.mark.parametrize("impl", IMPLS)
def test_half_precision_peaked_logits_and_compilation(impl, device):
    q, k, v = maps(2, 4, 4, 9, 10, device)

    def attend(q, k, v):
        return local_attention_warp(q, k, v, 1, impl=impl)

    half = attend(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), attend(q, k, v), atol=0.06, rtol=0.06)
    peaked = attend(q, 1e4 * k, v)
    torch.testing.assert_close(peaked, masked_attention(q, 1e4 * k, v, 1))
    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), attend(q, k, v))


@quick
@given(seed=st.integers(0, 999), radius=st.integers(0, 4), height=st.integers(1, 12),
       width=st.integers(1, 12))  # fmt: skip
def test_rows_are_means_and_forms_agree(seed, radius, height, width):
    q, k, v = (randn(1, 2, height, width, seed=seed + i) for i in range(3))
    weights = local_correlation(3 * q, k, radius).softmax(1)
    torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]))
    expected = local_attend(v, weights, radius)
    for impl in IMPLS:
        out = local_attention_warp(q, k, v, radius, scale=3.0, impl=impl)
        torch.testing.assert_close(out, expected)
    low, high = v.amin((2, 3), keepdim=True), v.amax((2, 3), keepdim=True)
    assert ((expected >= low - 1e-9) & (expected <= high + 1e-9)).all(), "outside the hull"
    dense = dense_window(weights, radius)
    matrix = rearrange(v, "b c h w -> b 1 (h w) c")
    torch.testing.assert_close(rearrange(dense @ matrix, "b 1 (h w) c -> b c h w", h=height),
                               expected)  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
def test_special_windows(impl, device):
    q, k, v = maps(1, 3, 2, 6, 7, device)
    torch.testing.assert_close(local_attention_warp(q, k, v, 0, impl=impl), v)
    flat = local_attention_warp(torch.ones_like(q), torch.ones_like(k), v, 1, impl=impl)
    box = F.avg_pool2d(v, 3, 1, 1, count_include_pad=False)
    torch.testing.assert_close(flat, box, msg="equal embeddings are a box filter")
    everywhere = local_attention_warp(q, k, v, 7, impl=impl)
    torch.testing.assert_close(everywhere, masked_attention(q, k, v, 99))


@pytest.fixture
def kernel_calls(monkeypatch):
    """How many queries each call of PyTorch's kernel had."""
    calls, kernel = [], F.scaled_dot_product_attention

    def spy(query, *args, **options):
        calls.append(query.shape[:-1].numel())
        return kernel(query, *args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return calls


@pytest.mark.parametrize(
    ("radius", "trains", "loop"),
    [(2, False, True), (3, False, False), (1, True, True), (2, True, False)],
)
def test_auto_takes_the_loop_for_small_windows_only(radius, trains, loop, kernel_calls, device):
    q, k, v = maps(1, 2, 4, 3, 4, device)
    out = local_attention_warp(q, k, v.requires_grad_(trains), radius)
    assert len(kernel_calls) == (0 if loop and device.type == "cpu" else 1)
    torch.testing.assert_close(out, local_attention_warp(q, k, v, radius, impl="unfold"))
    with torch.no_grad():  # then it does not matter what could be trained
        kernel_calls.clear()
        local_attention_warp(q, k, v, radius)
    assert len(kernel_calls) == (0 if radius <= 2 and device.type == "cpu" else 1)


def test_rows_of_tiles_go_one_by_one_where_nothing_is_trained(kernel_calls, device):
    q, k, v = maps(2, 3, 2, 20, 11, device)
    with torch.no_grad():
        in_turn = local_attention_warp(q, k, v, 3, impl="fused")
    row = 2 * 2 * 64  # two images, two tiles of 64 queries
    assert kernel_calls == ([row] * 3 if device.type == "cpu" else [3 * row])
    kernel_calls.clear()
    at_once = local_attention_warp(q, k.requires_grad_(), v, 3, impl="fused")
    assert kernel_calls == [3 * row]
    torch.testing.assert_close(in_turn, at_once.detach())


def test_shifting_both_frames_shifts_the_result():
    q, k, v = maps(1, 3, 2, 12, 12)
    moved = [x.roll((2, 1), (2, 3)) for x in (q, k, v)]
    out, shifted = local_attention_warp(q, k, v, 2), local_attention_warp(*moved, 2)
    torch.testing.assert_close(shifted[:, :, 4:-2, 3:-2], out[:, :, 2:-4, 2:-3])


# Warping is attention


@quick
@given(seed=st.integers(0, 999), radius=st.integers(1, 4))
@pytest.mark.parametrize(("border", "outside"), PADDINGS)
def test_a_bilinear_hat_is_the_bilinear_warp(border, outside, seed, radius):
    values = randn(2, 3, 7, 9, seed=seed)
    flow = radius * (2 * torch.rand(2, 2, 7, 9, dtype=torch.float64) - 1)
    hat = flow_to_attention(flow, radius)
    torch.testing.assert_close(hat.sum(1), torch.ones_like(hat[:, 0]))
    assert ((hat > 0).sum(1) <= 4).all()
    torch.testing.assert_close(attention_to_flow(hat, radius), flow)
    out = local_attend(values, hat, radius, outside)
    torch.testing.assert_close(out, warp(values, flow, border), atol=1e-10, rtol=0)


@pytest.mark.parametrize(("border", "outside"), PADDINGS)
def test_one_hot_attention_is_a_whole_warp(border, outside, device):
    values = randn(2, 3, 12, 15, device=device)
    offsets = torch.tensor(local_offsets(4), device=device)
    chosen = torch.randint(len(offsets), (2, 12, 15), device=device)
    weights = rearrange(F.one_hot(chosen, len(offsets)), "b h w l -> b l h w").double()
    flow = rearrange(offsets[chosen], "b h w xy -> b xy h w").double()
    out = local_attend(values, weights, 4, outside)
    torch.testing.assert_close(out, warp(values, flow, border), atol=1e-10, rtol=0)
    assert torch.equal(attention_to_flow(weights, 4, "argmax"), flow)


def test_affine_features_see_only_the_mean_flow_and_others_do_not():
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(15.0), indexing="ij")
    affine = torch.stack([x, 2 * y - x])[None].double()
    weights = randn(1, 81, 12, 15).softmax(1)
    flow = attention_to_flow(weights, 4)
    inside = (..., slice(4, -4), slice(4, -4))
    torch.testing.assert_close(local_attend(affine, weights, 4)[inside], warp(affine, flow)[inside])
    both = torch.zeros(1, 81, 12, 15).double()
    both[:, [4 * 9 + 1, 4 * 9 + 7]] = 0.5  # three cells to the left or to the right
    assert (attention_to_flow(both, 4) == 0).all()
    features = randn(1, 1, 12, 15)
    assert (local_attend(features, both, 4) - features)[inside].abs().mean() > 0.5


def test_a_low_temperature_finds_the_motion():
    embedding = F.normalize(randn(1, 16, 20, 20), dim=1)
    key = embedding.roll((1, -2), (2, 3))  # the content of p is at p + (-2, 1) in the key frame
    errors = []
    for temperature in (1, 0.3, 0.1, 0.03):
        weights = local_correlation(embedding / temperature, key, 4).softmax(1)
        flow = attention_to_flow(weights, 4)[..., 4:-4, 4:-4]
        errors.append((flow - torch.tensor([-2.0, 1.0])[:, None, None]).norm(dim=1).mean().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.9
    assert errors[-1] < 1e-3


def test_offsets_and_the_progressive_pattern():
    assert local_offsets(1) == [(-1, -1), (0, -1), (1, -1), (-1, 0), (0, 0), (1, 0), (-1, 1),
                                (0, 1), (1, 1)]  # fmt: skip
    for radius in range(5):
        cells = progressive_offsets(radius)
        assert len(set(cells)) == 1 + 8 * radius
        assert set(cells) <= set(local_offsets(radius))
    q, k, v = maps(1, 3, 2, 6, 7)
    pattern = progressive_offsets(2)
    weights = local_correlation(q, k, pattern).softmax(1)
    dense = local_correlation(q, k, 2)
    picked = [local_offsets(2).index(offset) for offset in pattern]
    torch.testing.assert_close(weights, dense[:, picked].softmax(1))
    out = local_attend(v, weights, pattern)
    torch.testing.assert_close(
        rearrange(dense_window(weights, pattern) @ rearrange(v, "b c h w -> b 1 (h w) c"),
                  "b 1 (h w) c -> b c h w", h=6), out)  # fmt: skip


# The module


@pytest.mark.parametrize("options", [
    {"radius": 1}, {"radius": None}, {"radius": 1, "pattern": "progressive"},
    {"radius": 1, "normalize": "sum"},
])  # fmt: skip
def test_attention_warp_battery(options, device):
    current, key, features = maps(2, 4, 3, 6, 7, device)
    battery.battery(
        lambda: AttentionWarp(**options).to(device),
        current.abs(), key.abs(), features,
        impls=("explicit", "auto", "fused"),
        parameters=1,
        sizes=[((current.float(), key.float(), features.float()), (2, 3, 6, 7)),
               (tuple(x[:1, :, :5, :4].float() for x in (current, key, features)), (1, 3, 5, 4))],
        rows_axis=-1 if options["radius"] is None else 1,
        grid=(6, 7),
    )  # fmt: skip


def test_full_attention_is_the_widest_window(device):
    current, key, features = maps(2, 4, 3, 6, 7, device)
    wide, full = AttentionWarp(7).to(device), AttentionWarp(None).to(device)
    torch.testing.assert_close(wide(current, key, features), full(current, key, features))
    with attnlab.record(wide) as of_window, attnlab.record(full) as of_all:
        wide(current, key, features)
        full(current, key, features)
    torch.testing.assert_close(of_window.dense((6, 7))[""], of_all.dense((6, 7))[""])


def test_equal_embeddings_at_a_low_temperature_copy(device):
    embedding, features = randn(1, 8, 9, 9, device=device), randn(1, 3, 9, 9, seed=1, device=device)
    out = AttentionWarp(3, temperature=0.01).to(device)(embedding, 5 * embedding, features)
    torch.testing.assert_close(out, features, atol=1e-3, rtol=0)


def test_temperature_learns_and_has_a_floor(device):
    current, key, features = maps(1, 4, 3, 6, 7, device)
    attention = AttentionWarp(2).to(device).double()
    attention(current, key, features).square().sum().backward()
    assert attention.temperature.grad.abs() > 0
    nn.init.constant_(attention.temperature, -1.0)
    assert attention(current, key, features).isfinite().all()


def test_sums_blur_more_than_softmaxes():
    features = randn(1, 32, 12, 12).relu()
    shares = {}
    for name, options in {"sum": {"normalize": "sum"}, "softmax": {}}.items():
        attention = AttentionWarp(2, **options)
        with attnlab.record(attention) as recorded:
            attention(features, features, features)
        shares[name] = recorded[""][:, 12].mean().item()
    assert shares["sum"] < 0.2 < 0.6 < shares["softmax"]


def test_embedding_is_orthogonal():
    embed = Embedding(nn.AvgPool2d(4), 3, 3).double()
    frame = randn(2, 3, 16, 8)
    assert embed(frame).shape == (2, 3, 4, 2)
    torch.testing.assert_close(embed(frame).norm(dim=1), F.avg_pool2d(frame, 4).norm(dim=1))


# Locally weighted neighbors


@pytest.mark.parametrize("side", [1, 3, 5])
def test_equals_modulated_deformable_convolution(side, device):
    features, weights = randn(2, 4, 7, 9, device=device), randn(2, side**2, 7, 9, seed=1)
    offsets = 1.5 * randn(2, side**2, 2, 7, 9, seed=2)

    def deformable(features, weights, offsets):
        rows_first = rearrange(offsets.flip(2), "b n yx h w -> b (n yx) h w")
        ones = features.new_ones(4, 1, side, side)
        return deform_conv2d(features, rows_first, ones, padding=side // 2, mask=weights)

    battery.check_matches(
        lambda f, w, o: locally_weighted_neighbors(f, w, o, "zeros"),
        deformable, features, weights.to(device), offsets.to(device),
    )  # fmt: skip


@pytest.mark.parametrize(("border", "outside"), PADDINGS)
def test_neighbors_contain_warp_and_local_attention(border, outside, device):
    features, flow = randn(2, 3, 7, 9, device=device), 2 * randn(2, 2, 7, 9, seed=1)
    center = torch.zeros(2, 9, 7, 9, dtype=torch.float64, device=device)
    center[:, 4] = 1
    offsets = flow.to(device)[:, None].expand(-1, 9, -1, -1, -1)
    out = locally_weighted_neighbors(features, center, offsets, border)
    torch.testing.assert_close(out, warp(features, flow.to(device), border))
    assert torch.equal(locally_weighted_neighbors(features, center, None, border), features)

    weights = randn(2, 25, 7, 9, seed=2, device=device).softmax(1)
    still = torch.zeros(2, 25, 2, 7, 9, dtype=torch.float64, device=device)
    expected = local_attend(features, weights, 2, outside)
    for offsets in (None, still):
        out = locally_weighted_neighbors(features, weights, offsets, border)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("options", [
    {"kernel_size": 3}, {"kernel_size": 3, "offsets": True},
    {"kernel_size": 3, "normalize": "none"},
])  # fmt: skip
def test_locally_weighted_neighbors_battery(options, device):
    inputs = [x.float() for x in maps(2, 4, 3, 6, 7, device)]
    battery.battery(
        lambda: LocallyWeightedNeighbors(radius=1, hidden=4, **options).to(device),
        *inputs,
        impls=("explicit",),
        sizes=[(tuple(x.float() for x in inputs), (2, 3, 6, 7)),
               (tuple(x[:1, :, :5, :4].float() for x in inputs), (1, 3, 5, 4))],
        rows_axis=None if "normalize" in options else 1,
        grid=(6, 7),
    )  # fmt: skip


def test_neighbors_start_at_the_place_itself(device):
    inputs = maps(2, 4, 3, 6, 7, device)
    for offsets in (False, True):
        exact = LocallyWeightedNeighbors(3, offsets=offsets, normalize="none").to(device).double()
        torch.testing.assert_close(exact(*inputs), inputs[2])
        soft = LocallyWeightedNeighbors(3, offsets=offsets).to(device).double()
        weights, moves = soft.predict(*inputs[:2])
        assert weights[0, 4, 0, 0].item() == pytest.approx(math.e**4 / (math.e**4 + 8))
        assert moves is None or (moves == 0).all()
        soft(*inputs).square().sum().backward()
        assert soft.weigh.weight.grad.norm() > 0
        assert not offsets or soft.move.weight.grad.norm() > 0


def test_errors():
    q, k, v = (torch.zeros(2, c, 4, 5) for c in (3, 3, 7))
    weights = torch.zeros(2, 9, 4, 5)
    attend, neighbors = local_attention_warp, locally_weighted_neighbors
    battery.check_errors([
        (lambda: attend(q, k[:1], v, 1), "key (1, 3, 4, 5): expected (2, 3, 4, 5), as the query"),
        (lambda: attend(q[0], k, v, 1), "query (3, 4, 5): expected (B, C, H, W)"),
        (lambda: attend(q, k, v[..., 1:], 1), "value (2, 7, 4, 4): expected (2, C, 4, 5)"),
        (lambda: attend(q, k, v, -1), "radius=-1: expected at least 0"),
        (lambda: attend(q, k, v, 1, impl="slow"), "impl='slow': expected one of auto, explicit"),
        (lambda: local_offsets(-1), "radius=-1"),
        (lambda: local_correlation(q, k, 1, "border"), "padding='border': expected mask, zeros"),
        (lambda: local_attend(v, weights, 1, "mask"), "padding='mask': expected zeros or"),
        (lambda: local_attend(v, weights, 2), "weights (2, 9, 4, 5): expected (2, 25, 4, 5)"),
        (lambda: flow_to_attention(torch.full((1, 2, 3, 3), 2.5), 2), "flow of up to 2.5 cells"),
        (lambda: flow_to_attention(q, 2), "flow (2, 3, 4, 5): expected (B, 2, H, W)"),
        (lambda: attention_to_flow(weights, 1, "median"), "mode='median': expected mean or argmax"),
        (lambda: attention_to_flow(weights, 2), "weights (2, 9, 4, 5): expected (B, 25, H, W)"),
        (lambda: AttentionWarp(-1), "radius=-1: expected at least 0, or None"),
        (lambda: AttentionWarp(temperature=0.0), "temperature=0.0: expected a number above 0"),
        (lambda: AttentionWarp(normalize="max"), "normalize='max': expected softmax or sum"),
        (lambda: AttentionWarp(pattern="star"), "pattern='star': expected dense or progressive"),
        (lambda: AttentionWarp(None, normalize="sum"), "radius=None: expected a radius"),
        (lambda: AttentionWarp(impl="slow"), "impl='slow'"),
        (lambda: neighbors(v, weights[:, :4]), "weights (2, 4, 4, 5): expected (2, k², 4, 5), k"),
        (lambda: neighbors(v, weights, torch.zeros(2, 18, 4, 5)), "expected (2, 9, 2, 4, 5)"),
        (lambda: neighbors(v, weights, None, "mask"), "padding='mask': expected border or zeros"),
        (lambda: LocallyWeightedNeighbors(4), "kernel_size=4: expected an odd number"),
        (lambda: LocallyWeightedNeighbors(3, normalize="sum"), "normalize='sum': expected softmax"),
        (lambda: LocallyWeightedNeighbors(3, padding="mask"), "padding='mask': expected border or"),
    ])  # fmt: skip
