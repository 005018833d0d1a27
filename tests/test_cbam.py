"""CBAM against its equations, a re-statement of the official code, and timm; and its invariants."""

import math
import re
from functools import partial

import battery
import pytest
import timm.models.resnet
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.cbam import CbamModule
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import attnlab
from attnlab import cbam
from attnlab.cbam import CBAM, ChannelAttention, SpatialAttention, mean_and_max
from attnlab.channel import SqueezeExcite
from attnlab.resnet import resnet_mini

C = 8


def maps(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def ready(module, seed=0):
    return battery.randomize(module, seed).double().eval()


class Official(nn.Module):
    """The official code's equations in its layout: linear MLP, [max, mean], BatchNorm."""

    def __init__(self, channels, reduction=4):
        super().__init__()
        hidden = channels // reduction
        mlp = nn.Sequential(
            nn.Flatten(), nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels)
        )
        self.ChannelGate = nn.ModuleDict({"mlp": mlp})
        spatial = {"conv": nn.Conv2d(2, 1, 7, padding=3, bias=False), "bn": nn.BatchNorm2d(1)}
        self.SpatialGate = nn.ModuleDict({"spatial": nn.ModuleDict(spatial)})

    def forward(self, x):
        mlp, size = self.ChannelGate["mlp"], x.shape[2:]
        logits = mlp(F.avg_pool2d(x, size)) + mlp(F.max_pool2d(x, size))
        x = x * torch.sigmoid(logits)[:, :, None, None]
        spatial = self.SpatialGate["spatial"]
        both = torch.cat([x.max(1, keepdim=True)[0], x.mean(1, keepdim=True)], dim=1)
        return x * torch.sigmoid(spatial["bn"](spatial["conv"](both)))


def loop(module, x):
    """Eq. 1 to 3, number by number."""
    w1, b1 = module.channel.fc1.weight[:, :, 0, 0], module.channel.fc1.bias
    w2, b2 = module.channel.fc2.weight[:, :, 0, 0], module.channel.fc2.bias
    kernel, bn = module.spatial.conv.weight[0], module.spatial.bn
    out = torch.zeros_like(x)
    for b in range(len(x)):
        logits = torch.zeros(x.shape[1], dtype=x.dtype)
        for pooled in (
            torch.stack([plane.mean() for plane in x[b]]),
            torch.stack([plane.max() for plane in x[b]]),
        ):
            hidden = [max(0.0, float(w @ pooled + c)) for w, c in zip(w1, b1, strict=True)]
            logits = logits + w2 @ torch.tensor(hidden, dtype=x.dtype) + b2
        scaled = torch.stack(
            [plane / (1 + math.exp(-l)) for plane, l in zip(x[b], logits, strict=True)]
        )
        _, height, width = scaled.shape
        for i in range(height):
            for j in range(width):
                total, reach = 0.0, kernel.shape[-1] // 2
                for di in range(-reach, reach + 1):
                    for dj in range(-reach, reach + 1):
                        if 0 <= i + di < height and 0 <= j + dj < width:
                            column = scaled[:, i + di, j + dj]
                            weights = kernel[:, di + reach, dj + reach]
                            total += weights[0] * column.mean() + weights[1] * column.max()
                normal = (total - bn.running_mean) / (bn.running_var + bn.eps).sqrt()
                gate = 1 / (1 + torch.exp(-(bn.weight * normal + bn.bias)))
                out[b, :, i, j] = gate * scaled[:, i, j]
    return out


@pytest.mark.parametrize("options", [
    {}, {"no_spatial": True},
    {"order": "spatial_first", "spatial_norm": None, "kernel_size": 3},
    {"order": "parallel", "pools": ("max", "lp", "lse"), "mlp_bias": False},
])  # fmt: skip
def test_battery(options):
    battery.battery(
        lambda: CBAM(C, 4, **options),
        torch.randn(2, C, 6, 5),
        rows_axis=None,
        sizes=[
            ((torch.randn(1, C, 4, 9),), (1, C, 4, 9)),
            ((torch.randn(3, C, 1, 1),), (3, C, 1, 1)),
            ((torch.randn(2, C, 1, 7),), (2, C, 1, 7)),
        ],
    )


def test_equals_the_loop():
    module = ready(CBAM(C, 4, kernel_size=3))
    x = maps(2, C, 4, 3)
    with torch.no_grad():
        assert_close(module(x), loop(module, x), rtol=0, atol=1e-12)


def test_equals_the_official_equations_with_shared_weights():
    official = ready(Official(C))
    module = CBAM(C, 4).double().eval()
    module.load_state_dict(official.state_dict(), strict=True)
    battery.check_matches(module, official, maps(2, C, 9, 8))
    state = CBAM(C, 4).state_dict()
    assert module.state_dict().keys() == state.keys(), "its own layout is the one that is saved"


def test_the_official_layout_is_converted_by_a_flip_of_mean_and_max():
    official = ready(Official(C))
    module = CBAM(C, 4).double()
    module.load_state_dict(official.state_dict())
    theirs = official.SpatialGate["spatial"]["conv"].weight
    assert torch.equal(module.spatial.conv.weight, theirs[:, [1, 0]])
    module.spatial.conv.weight.data.copy_(theirs)  # as if nothing had been flipped
    assert not torch.allclose(module.eval()(maps(1, C, 9, 8)), official(maps(1, C, 9, 8)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("impl", ["explicit", "fused", "auto"])
def test_equals_timm_with_shared_weights(impl, training):
    theirs = ready(CbamModule(32, rd_ratio=1 / 8)).train(training)
    ours = CBAM(32, 8, mlp_bias=False, impl=impl).double().train(training)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    battery.check_matches(ours, theirs, maps(2, 32, 7, 9))


def test_equals_timm_with_biases():
    theirs = ready(CbamModule(32, mlp_bias=True))
    ours = CBAM(32).double().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    battery.check_matches(ours, theirs, maps(2, 32, 7, 9))


@pytest.mark.parametrize(("options", "count"), [
    ({}, 2 * 256 * 16 + 16 + 256 + 2 * 49 + 2),
    ({"mlp_bias": False}, 8292),
    ({"kernel_size": 3, "spatial_norm": None}, 2 * 256 * 16 + 16 + 256 + 2 * 9),
    ({"no_spatial": True}, 2 * 256 * 16 + 16 + 256),
])  # fmt: skip
def test_parameters_of_a_block(options, count):
    battery.check_parameters(CBAM(256, **options), count)


@pytest.mark.parametrize(("factory", "count"), [
    (cbam.cbam_resnet18, 11_779_392), (cbam.cbam_resnet34, 21_960_468),
    (cbam.cbam_resnet50, 28_089_624), (cbam.cbam_resnet101, 49_330_172),
])  # fmt: skip
def test_parameters_of_the_networks(factory, count):
    with torch.device("meta"):
        battery.check_parameters(factory(), count)


def test_initial_values_are_the_official_ones():
    """The spatial gate starts at 1/2 exactly and its convolution without a gradient."""
    torch.manual_seed(0)
    module = CBAM(64)
    x = torch.randn(2, 64, 9, 9, requires_grad=True)
    out = module(x)
    assert torch.equal(module.spatial.gate(x), torch.full((2, 1, 9, 9), 0.5))
    assert_close(out, module.channel(x) / 2)
    out.square().sum().backward()
    assert module.spatial.conv.weight.grad.abs().max() == 0
    assert module.spatial.bn.weight.grad.abs().max() > 0
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            assert torch.equal(parameter, torch.zeros_like(parameter)), name
    assert (module.spatial.bn.eps, module.spatial.bn.momentum) == (1e-5, 0.01)
    many = torch.cat([SpatialAttention().conv.weight.flatten() for _ in range(50)])
    assert many.std().item() == pytest.approx(math.sqrt(2 / 49), rel=0.05), "Kaiming, fan out"


def test_average_pooling_alone_without_places_is_squeeze_and_excitation():
    se = ready(SqueezeExcite(C, 4))
    module = CBAM(C, 4, pools=("avg",), no_spatial=True).double().eval()
    module.channel.load_state_dict(se.state_dict(), strict=True)
    battery.check_matches(module, se, maps(2, C, 5, 6))


def test_the_sum_is_inside_the_sigmoid_and_outside_the_mlp():
    module, x = ready(ChannelAttention(C, 2)), maps(8, C, 5, 6) + maps(8, C, 1, 1, seed=1)
    gate = module.gate(x).flatten(1)
    mean, highest = x.mean((2, 3)), x.amax((2, 3))
    assert_close(gate, torch.sigmoid(module.mlp(mean) + module.mlp(highest)))
    for wrong in (
        torch.sigmoid(module.mlp(mean + highest)),
        torch.sigmoid(2 * module.mlp((mean + highest) / 2)),
        torch.sigmoid(module.mlp(mean)) + torch.sigmoid(module.mlp(highest)),
    ):
        assert (gate - wrong).abs().max() > 1e-3


@pytest.mark.parametrize("x", [maps(2, C, 1, 1), maps(2, C, 1, 1).expand(2, C, 4, 3)])
def test_mean_and_maximum_are_one_on_a_constant_map(x):
    module = ready(ChannelAttention(C, 4))
    expected = torch.sigmoid(2 * module.mlp(x[:, :, 0, 0]))
    assert_close(module.gate(x).flatten(1), expected)


def test_a_single_channel_has_one_map_twice():
    mean, highest = mean_and_max(maps(2, 1, 4, 5), (1,))
    assert torch.equal(mean, highest)
    module = ready(CBAM(1))
    assert module.channel.fc1.out_channels == 1, "the hidden width is at least 1"
    assert module(maps(2, 1, 4, 5)).shape == (2, 1, 4, 5)


def test_the_order_matters():
    x, outs = maps(2, C, 6, 5), {}
    for order in cbam.ORDERS:
        module = ready(CBAM(C, 4, order=order))
        outs[order] = module(x)
    channel, spatial = module.channel, module.spatial
    assert_close(outs["channel_first"], spatial(channel(x)))
    assert_close(outs["spatial_first"], channel(spatial(x)))
    assert_close(outs["parallel"], x * channel.gate(x) * spatial.gate(x))
    first, second, third = outs.values()
    for a, b in ((first, second), (second, third), (first, third)):
        assert (a - b).abs().max() > 1e-3


sizes = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))


@settings(max_examples=25, deadline=None)
@given(sizes, st.integers(0, 10_000))
def test_invariants_of_the_gates(size, seed):
    x = maps(*size, seed=seed)
    module = ready(CBAM(size[1], 2, kernel_size=3), seed)
    out, channel, spatial = module(x), module.channel.gate(x), module.spatial.gate(x)
    assert (out.abs() <= x.abs()).all()
    assert (out.sign() * x.sign() >= 0).all()
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(size[2] * size[3], generator=generator)
    moved = x.flatten(2)[..., places].reshape(x.shape)
    assert_close(module.channel.gate(moved), channel)
    channels = torch.randperm(size[1], generator=generator)
    assert_close(module.spatial.gate(x[:, channels]), spatial)


def test_the_spatial_gate_follows_a_shift_and_not_a_permutation():
    module, x = ready(SpatialAttention(3)), maps(1, C, 10, 10)
    gate, shifted = module.gate(x), module.gate(x.roll((1, 2), (2, 3)))
    inner = (slice(None), slice(None), slice(3, -3), slice(3, -3))  # away from the zero padding
    assert_close(shifted[inner], gate.roll((1, 2), (2, 3))[inner])
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    permuted = module.gate(x.flatten(2)[..., order].reshape(x.shape))
    expected = gate.flatten(2)[..., order].reshape(gate.shape)
    assert (permuted - expected).abs().max() > 1e-2


@pytest.mark.parametrize("dims", [(2, 3), (1,)])
@pytest.mark.parametrize("x", [
    maps(2, 3, 4, 5), maps(2, 3, 4, 5).relu(), torch.ones(2, 3, 4, 5).double(),
    maps(2, 3, 4, 5).to(memory_format=torch.channels_last), maps(2, 3, 4, 10)[..., ::2],
])  # fmt: skip
def test_the_fused_operator_equals_torch_in_value_and_gradient(x, dims):
    """Ties included: after a ReLU and in a constant map, a maximum shares its gradient."""
    given = [x.clone().requires_grad_() for _ in range(2)]
    fused, plain = (
        mean_and_max(x, dims, impl=impl)
        for x, impl in zip(given, ("fused", "explicit"), strict=True)
    )
    for a, b in zip(fused, plain, strict=True):
        assert torch.equal(a, b)
    for outs in (fused, plain):
        sum((out * maps(*out.shape, seed=i)).sum() for i, out in enumerate(outs)).backward()
    assert_close(given[0].grad, given[1].grad, rtol=0, atol=1e-12)


def test_the_fused_operator_has_two_derivatives_and_passes_torchs_checks():
    x = maps(1, 2, 2, 3).requires_grad_()
    call = partial(mean_and_max, dims=(2, 3), impl="fused")
    assert torch.autograd.gradcheck(call, x)
    assert torch.autograd.gradgradcheck(call, x)
    torch.library.opcheck(cbam._fused_mean_and_max, (x, [2, 3]))


def test_the_official_maximum_gives_the_gradient_of_a_tie_to_one_entry():
    """Equal forward, another backward: a known difference to `torch.max(x, 1)[0]`."""
    x = torch.ones(1, 4, 1, 1).requires_grad_()
    mean_and_max(x, (1,), impl="fused")[1].sum().backward()
    assert torch.equal(x.grad, torch.full((1, 4, 1, 1), 0.25))
    x.grad = None
    x.max(1)[0].sum().backward()
    assert sorted(x.grad.flatten().tolist()) == [0, 0, 0, 1]


def test_the_fused_form_compiles_too():
    battery.check_compiles(CBAM(C, 4, impl="fused"), torch.randn(2, C, 6, 5))


def test_both_gates_have_a_probe_and_a_diagonal_dense_map():
    module, x = ready(CBAM(C, 4)), maps(2, C, 3, 4)
    with torch.no_grad(), attnlab.record(module) as recorded:
        out = module(x)
    assert {name: map.shape for name, map in recorded.items()} == {
        "channel": (2, C), "spatial": (2, 1, 3, 4),
    }  # fmt: skip
    dense = recorded.dense()
    scaled = torch.einsum("bij, bjhw -> bihw", dense["channel"][:, 0], x)
    assert_close(torch.einsum("bcm, bnm -> bcn", scaled.flatten(2), dense["spatial"][:, 0]),
                 out.flatten(2))  # fmt: skip


def test_a_whole_official_checkpoint_loads():
    torch.manual_seed(0)
    official = ready(resnet_mini(inside=Official))
    state = {
        f"module.{name.replace('.inside.', '.cbam.')}": value
        for name, value in official.state_dict().items()
    }
    assert "module.layer1.0.cbam.ChannelGate.mlp.1.weight" in state
    assert "module.layer1.0.cbam.SpatialGate.spatial.bn.num_batches_tracked" in state
    ours = cbam.cbam_resnet_mini().double().eval()
    ours.load_state_dict(state, strict=True)
    x = maps(2, 3, 32, 40)
    with torch.no_grad():
        assert_close(ours(x), official(x), rtol=0, atol=1e-9)


def test_a_whole_timm_network_with_cbam_loads():
    block = timm.models.resnet.BasicBlock
    cbam_blocks = {"attn_layer": "cbam"}
    theirs = ready(timm.models.resnet.ResNet(block, (2, 2, 2, 2), 5, block_args=cbam_blocks))
    ours = cbam.cbam_resnet18(num_classes=5, inside=partial(CBAM, mlp_bias=False)).double().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = maps(2, 3, 64, 48)
    with torch.no_grad():
        assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: CBAM(0), "channels=0: expected 1 or more"),
    (lambda: CBAM(8, reduction=0), "reduction=0: expected 1 or more"),
    (lambda: CBAM(8, kernel_size=4), "kernel_size=4: expected an odd number, 1 or more"),
    (lambda: CBAM(8, kernel_size=-1), "kernel_size=-1: expected an odd number, 1 or more"),
    (lambda: CBAM(8, pools=("mean",)), "pools=('mean',): expected a tuple of some of avg, max, lp"),
    (lambda: CBAM(8, pools="avg"), "pools='avg': expected a tuple of some of avg, max, lp, lse"),
    (lambda: CBAM(8, pools=()), "pools=(): expected a tuple of some of avg, max, lp, lse"),
    (lambda: CBAM(8, order="spatial"), "order='spatial': expected one of channel_first, spatial_"),
    (lambda: CBAM(8, spatial_norm="ln"), "norm='ln': expected one of bn, None"),
    (lambda: CBAM(8, impl="fast"), "impl='fast': expected one of auto, explicit, fused"),
    (lambda: CBAM(8)(torch.ones(2, 4, 3, 3)), "x (2, 4, 3, 3): expected (B, 8, H, W)"),
    (lambda: CBAM(8)(torch.ones(8, 3, 3)), "x (8, 3, 3): expected (B, 8, H, W)"),
    (lambda: SpatialAttention()(torch.ones(8, 3, 3)), "x (8, 3, 3): expected (B, C, H, W)"),
])  # fmt: skip
def test_errors(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
