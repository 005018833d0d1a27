"""Warping against grid_sample, loops and exact clips; what flow networks promise."""

from itertools import product

import battery
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.flow import FlowNet, FlowNetS, compose_flows, resize_flow, visibility, warp
from attnlab.lab.data import clips

quick = settings(max_examples=12, deadline=None, derandomize=True)
SIZES = [(1, 1), (1, 7), (9, 1), (15, 12), (16, 16), (5, 60), (33, 64)]


def randn(*shape, seed=0, device="cpu", dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype).to(device)


def loop_warp(features, flow, padding):
    """Σ_q max(0, 1 − |q_x − r_x|) max(0, 1 − |q_y − r_y|) features(q), r = p + flow(p)."""
    (B, _, H, W), out = features.shape, torch.zeros_like(features)
    ys, xs = torch.arange(H).to(flow)[:, None], torch.arange(W).to(flow)
    for b in range(B):
        for i in range(H):
            for j in range(W):
                x, y = j + flow[b, 0, i, j], i + flow[b, 1, i, j]
                if padding == "border":
                    x, y = x.clamp(0, W - 1), y.clamp(0, H - 1)
                hat = (1 - (xs - x).abs()).clamp(min=0) * (1 - (ys - y).abs()).clamp(min=0)
                out[b, :, i, j] = (hat * features[b]).sum((1, 2))
    return out


def sampled(features, flow, padding, align_corners):
    """`F.grid_sample` with either of the two right formulas for its coordinates."""
    H, W = features.shape[2:]
    x = flow[:, 0] + torch.arange(W).to(flow)
    y = flow[:, 1] + torch.arange(H).to(flow)[:, None]
    if align_corners:
        grid = torch.stack([2 * x / (W - 1) - 1, 2 * y / (H - 1) - 1], -1)
    else:
        grid = torch.stack([(2 * x + 1) / W - 1, (2 * y + 1) / H - 1], -1)
    return F.grid_sample(features, grid, padding_mode=padding, align_corners=align_corners)


# Warping


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_zero_flow_is_the_identity_to_the_last_bit(dtype, device):
    for size, padding in product(SIZES, ("border", "zeros")):
        features = randn(2, 3, *size, device=device).to(dtype)
        flow = torch.zeros(2, 2, *size, device=device)
        assert torch.equal(warp(features, flow, padding), features), (size, padding)
        with torch.autocast(device.type, torch.bfloat16):
            assert torch.equal(warp(features, flow, padding), features), (size, padding)


@quick
@given(height=st.integers(1, 70), width=st.integers(1, 70), seed=st.integers(0, 99))
def test_whole_flow_copies_cells_exactly(height, width, seed):
    features = randn(1, 2, height, width, seed=seed, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(height, (1, height, width), generator=generator)
    x = torch.randint(width, (1, height, width), generator=generator)
    flow = torch.stack([x - torch.arange(width), y - torch.arange(height)[:, None]], 1).float()
    assert torch.equal(warp(features, flow)[0], features[0][:, y[0], x[0]])


@pytest.mark.parametrize("padding", ["border", "zeros"])
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("size", [(15, 12), (16, 16)])
def test_equals_both_right_formulas_in_value_and_gradient(size, align_corners, padding, device):
    features, flow = randn(2, 3, *size, device=device), 4 * randn(2, 2, *size, seed=1)
    battery.check_matches(
        lambda f, m: warp(f, m, padding),
        lambda f, m: sampled(f, m, padding, align_corners),
        features, flow.to(device),
    )  # fmt: skip


@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_equals_the_loop_from_the_formula(padding):
    features, flow = randn(2, 2, 5, 6), 3 * randn(2, 2, 5, 6, seed=1)
    loop = lambda f, m: loop_warp(f, m, padding)  # noqa: E731
    battery.check_matches(lambda f, m: warp(f, m, padding), loop, features, flow)


def test_gradients_are_those_of_finite_differences_between_cells(device):
    features = randn(1, 2, 4, 5, device=device).requires_grad_()
    flow = torch.full((1, 2, 4, 5), 0.3, device=device, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(warp, (features, flow))


def test_flow_that_left_the_map_has_no_gradient(device):
    for padding in ("border", "zeros"):
        flow = torch.full((1, 2, 4, 5), 40.0, device=device).requires_grad_()
        warp(randn(1, 2, 4, 5, device=device).float(), flow, padding).sum().backward()
        assert (flow.grad == 0).all()


def test_wrong_normalizations_shift_the_map():
    """What two public codes compute is not the identity at zero flow."""
    W, x = 15, torch.arange(15.0)
    features = x.expand(1, 1, W, W)
    wrong = {
        (True, 2 * x / W - 1): x * (W - 1) / W,
        (False, 2 * x / (W - 1) - 1): (x * W / (W - 1) - 0.5).clamp(0, W - 1),
    }
    for (align_corners, axis), fetched in wrong.items():
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)[None]
        out = F.grid_sample(features, grid, padding_mode="border", align_corners=align_corners)
        torch.testing.assert_close(out[0, 0, 7], fetched, atol=1e-5, rtol=0)
        assert (out - features).abs().max() > 0.4
    assert torch.equal(warp(features, torch.zeros(1, 2, W, W)), features)


def test_mask_says_what_was_fetched_from_inside(device):
    flow = torch.zeros(1, 2, 3, 4, device=device)
    flow[:, 0], flow[:, 1] = 1, -1
    _, inside = warp(torch.zeros(1, 1, 3, 4, device=device), flow, return_mask=True)
    expected = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]], device=device).bool()
    assert torch.equal(inside[0], expected)


def test_warp_compiles_and_keeps_half_precision(device):
    features, flow = randn(2, 3, 5, 6, device=device), randn(2, 2, 5, 6, seed=1, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(warp, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(features, flow), warp(features, flow))
    half = warp(features.bfloat16(), flow.float())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), warp(features, flow), atol=0.05, rtol=0.05)


# Exact clips


def some_clips(n=6, **options):
    options = {"frames": 6, "objects": 2, "size": 32, **options}
    return clips.generate(n, "val", seed=3, **options)


def test_exact_flow_fetches_the_frame_wherever_it_is_visible(device):
    batch = {key: value.to(device) for key, value in some_clips().items()}
    frames = batch["image"].float()
    for i, k in ((1, 0), (5, 0), (2, 4)):
        flow, visible = clips.flow_between(batch, i, k)
        error = (warp(frames[:, :, k], flow) - frames[:, :, i]).abs().amax(1)
        assert (error[visible] == 0).all(), "visible pixels are fetched bit by bit"
        assert error[~visible].mean() > 5, "hidden ones are not (of 255)"


def test_warped_labels_disagree_only_where_hidden():
    """A dis-occluded pixel fetches the occluder: a ghost."""
    batch = some_clips()
    flow, visible = clips.flow_between(batch, 5, 0)
    labels = batch["owner"].float()
    fetched = warp(labels[:, None, 0], flow)[:, 0]
    wrong = fetched != labels[:, 5]
    assert wrong.any()
    assert not (wrong & visible).any()


def test_forward_backward_check_finds_what_is_hidden():
    batch = some_clips(12)
    flow, visible = clips.flow_between(batch, 3, 2)
    backward, _ = clips.flow_between(batch, 2, 3)
    found = visibility(flow, backward)
    # Two layers may move alike, and then hide each other unseen.
    assert found[visible].float().mean() > 0.98
    assert (found == visible).float().mean() > 0.95


def test_composed_flow_is_the_flow_through_a_frame_between():
    left = torch.zeros(1, 2, 8, 9)
    left[:, 0] = -1
    assert torch.equal(compose_flows(left, 2 * left), 3 * left)
    field = randn(1, 2, 8, 9)
    torch.testing.assert_close(compose_flows(torch.zeros_like(field), field), field)


# Resizing


@pytest.mark.parametrize("mode", ["center", "area", "bilinear"])
def test_resized_flow_is_in_cells_of_the_new_map(mode, device):
    flow = torch.ones(1, 2, 32, 16, device=device) * torch.tensor([[[8.0]], [[4.0]]]).to(device)
    small = resize_flow(flow, (8, 8), mode)
    assert small.shape == (1, 2, 8, 8)
    assert (small[:, 0] == 4).all(), "columns shrink by 2"
    assert (small[:, 1] == 1).all(), "rows shrink by 4"


def test_centers_never_mix_two_motions():
    flow = torch.zeros(1, 2, 8, 8)
    flow[:, :, :, 3:] = 4  # a border inside a cell
    assert set(resize_flow(flow, (2, 2), "center").flatten().tolist()) == {0.0, 1.0}
    assert set(resize_flow(flow, (2, 2), "area").flatten().tolist()) == {0.25, 1.0}
    x = randn(1, 2, 8, 8)
    torch.testing.assert_close(resize_flow(x, (2, 2), "area"), F.avg_pool2d(x, 4) / 4)
    torch.testing.assert_close(resize_flow(x, (2, 2)), x[:, :, 2::4, 2::4] / 4)


# Networks


def test_flownet_battery(device):
    frame, key = randn(2, 2, 3, 32, 48, device=device).float()
    small = randn(1, 3, 20, 20, device=device).float()

    def make():
        return FlowNet(width=4).to(device)

    battery.check_sizes(
        make(),
        [((frame, key), (2, 2, 8, 12)), ((small, small), (1, 2, 5, 5))],
    )
    battery.check_compiles(make(), frame, key)
    battery.check_batch_independent(make(), frame, key)
    battery.check_input_untouched(make(), frame, key)
    battery.check_autocast(make(), frame, key)
    battery.check_state_dict_round_trip(make, frame, key)


def test_flownet_starts_with_no_motion_and_learns(device):
    net = FlowNet(width=4).to(device)
    frame, key = randn(2, 3, 32, 32, device=device).float(), torch.zeros(2, 3, 32, 32).to(device)
    flow = net(frame, key)
    assert (flow == 0).all()
    (flow - 1).square().mean().backward()
    assert net.predict.weight.grad.norm() > 0


def test_flow_is_in_cells_of_the_map_it_is_for(device):
    net = FlowNet(width=4).to(device)
    frame, key = randn(2, 1, 3, 64, 64, device=device).float()
    torch.nn.init.constant_(net.predict.bias, 1.0)  # the same motion everywhere: 8 px
    for size, dx, dy in (((16, 16), 2, 2), ((8, 4), 0.5, 1), ((32, 32), 4, 4)):
        flow = net(frame, key, size)
        assert flow.shape == (1, 2, *size)
        assert (flow[:, 0] == dx).all()
        assert (flow[:, 1] == dy).all()
    assert net(frame, key).shape == (1, 2, 16, 16)
    assert FlowNet(width=4, stride=8).to(device)(frame, key).shape == (1, 2, 8, 8)


def test_flownet_s_has_the_published_size_and_scale():
    with torch.device("meta"):
        net = FlowNetS()
        frame = torch.zeros(1, 3, 256, 320)
        assert net.forward_features(frame, frame).shape == (1, 194, 16, 20)
        assert net(frame, frame).shape == (1, 2, 16, 20)
        assert net(frame, frame, (32, 40)).shape == (1, 2, 32, 40)
        assert net(torch.zeros(1, 3, 100, 75), torch.zeros(1, 3, 100, 75)).shape == (1, 2, 7, 5)
    battery.check_parameters(net, 38_675_536)
    layer = net.predict_flow2
    layer.to_empty(device="cpu")
    torch.nn.init.constant_(layer.weight, 1.0)
    flow = net.flow(torch.ones(1, 194, 16, 20), (256, 320))
    units = layer(torch.ones(1, 194, 16, 20))
    torch.testing.assert_close(flow, 2.5 * units)  # 20 px of half-size frames, 8 px a cell
    torch.testing.assert_close(net.flow(torch.ones(1, 194, 32, 40), (256, 320))[..., 5, 5],
                               5 * units[..., 5, 5])  # fmt: skip


def test_errors():
    features, flow = torch.zeros(2, 3, 4, 5), torch.zeros(2, 2, 4, 5)
    frame, net = torch.zeros(1, 3, 16, 16), FlowNet(width=2)
    battery.check_errors([
        (lambda: warp(features, flow[:, :1]), "flow (2, 1, 4, 5)"),
        (lambda: warp(features, flow[:1]), "expected flow (2, 2, 4, 5)"),
        (lambda: warp(features.long(), flow), "floating dtype"),
        (lambda: warp(features[0], flow), "features (3, 4, 5): expected (B, C, H, W)"),
        (lambda: warp(features, flow, "reflection"), "padding='reflection': expected border or"),
        (lambda: resize_flow(features, (2, 2)), "flow (2, 3, 4, 5): expected (B, 2, H, W)"),
        (lambda: resize_flow(flow, (2, 2)), "size=(2, 2): expected divisors of 4 and 5"),
        (lambda: resize_flow(flow, (2, 5), "nearest"), "mode='nearest': expected center, area"),
        (lambda: net(frame, frame[:, :, :8]), "key (1, 3, 8, 16): expected two images"),
        (lambda: net(frame[:, :1], frame[:, :1]), "(B, 3, H, W) of one size"),
        (lambda: FlowNet(stride=0), "stride=0: expected at least 1"),
    ])  # fmt: skip
