"""Squeeze-and-excitation and selective kernels against formulas, timm and their invariants."""

import math
from functools import partial

import battery
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import SelectiveKernel as TimmSelectiveKernel
from timm.layers import SEModule
from timm.models.senet import SENet, SEResNetBottleneck
from torch import nn

from attnlab import channel, record
from attnlab.channel import (
    BranchAttention,
    SelectiveKernel,
    SqueezeExcite,
    excitation,
    from_timm,
    se_resnet50,
    se_resnet_mini,
    select,
    sknet50,
)
from attnlab.resnet import Bottleneck, ResNet, resnet50, resnet101, resnext50_32x4d

KERNELS = {
    "two": {},
    "three": {"kernel_sizes": (3, 3, 3), "dilations": (1, 2, 3)},
    "one": {"kernel_sizes": (3,), "dilations": (1,)},
    "split": {"split_input": True},
    "1, 3, 5, 7 ungrouped, biases, nothing on z": {
        "kernel_sizes": (1, 3, 5, 7),
        "dilations": (1, 1, 1, 1),
        "groups": 1,
        "fc_bias": True,
        "attn_norm": nn.Identity,
        "attn_act": nn.Identity,
    },
}


def maps(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def kernel(channels=8, **options):
    return SelectiveKernel(channels, **{"groups": 2, "min_hidden": 3, **options})


def small_sknet(**options):
    return partial(kernel, **options)


def se_loop(module, x):
    """The formula, one number at a time."""
    w1, b1 = module.fc1.weight[:, :, 0, 0], module.fc1.bias
    w2, b2 = module.fc2.weight[:, :, 0, 0], module.fc2.bias
    B, C, H, W = x.shape
    out = []
    for b in range(B):
        z = [sum(x[b, c, i, j] for i in range(H) for j in range(W)) / (H * W) for c in range(C)]
        h = [torch.relu(sum(w1[k, c] * z[c] for c in range(C)) + b1[k]) for k in range(len(w1))]
        s = [
            1 / (1 + torch.exp(-sum(w2[c, k] * h[k] for k in range(len(h))) - b2[c]))
            for c in range(C)
        ]
        out.append(torch.stack([s[c] * x[b, c] for c in range(C)]))
    return torch.stack(out)


def sk_loop(module, x):
    """The formula in eval mode, one image and one channel at a time."""
    shares = module.attn
    branches = [path(x) for path in module.paths]  # an ordinary conv-BN-ReLU, tested below
    B, C = branches[0].shape[:2]
    out = torch.zeros_like(branches[0])
    for b in range(B):
        s = torch.stack([sum(u[b, c].mean() for u in branches) for c in range(C)])
        z = shares.fc_reduce.weight[:, :, 0, 0] @ s
        bn = shares.bn
        z = (z - bn.running_mean) / (bn.running_var + bn.eps).sqrt() * bn.weight + bn.bias
        logits = shares.fc_select.weight[:, :, 0, 0] @ z.clamp(min=0)
        for c in range(C):
            terms = [logits[m * C + c].exp() for m in range(len(branches))]
            for term, u in zip(terms, branches, strict=True):
                out[b, c] = out[b, c] + term / sum(terms) * u[b, c]
    return out


def test_squeeze_excite_passes_the_battery():
    battery.battery(
        lambda: SqueezeExcite(6, reduction=2),
        maps(3, 6, 5, 4).float(),
        impls=("explicit",),
        parameters=2 * 6 * 3 + 3 + 6,
        sizes=[
            ((torch.randn(2, 6, 5, 4),), (2, 6, 5, 4)),
            ((torch.randn(1, 6, 1, 1),), (1, 6, 1, 1)),
            ((torch.randn(1, 6, 1, 7),), (1, 6, 1, 7)),
        ],
        rows_axis=None,
        errors=[
            (lambda: SqueezeExcite(0), "channels=0, reduction=16: expected at least 1"),
            (lambda: SqueezeExcite(8, 0), "channels=8, reduction=0: expected at least 1"),
            (lambda: SqueezeExcite(8, squeeze="sum"), "squeeze='sum': expected 'avg' or 'max'"),
            (lambda: SqueezeExcite(8)(torch.ones(2, 4, 3, 3)),
             "x (2, 4, 3, 3): expected (B, 8, H, W)"),
            (lambda: SqueezeExcite(8)(torch.ones(8, 3, 3)), "x (8, 3, 3): expected (B, 8, H, W)"),
        ],
    )  # fmt: skip


@pytest.mark.parametrize("name", KERNELS)
def test_selective_kernel_passes_the_battery(name):
    battery.battery(
        small_sknet(**KERNELS[name]),
        maps(3, 8, 6, 5).float(),
        sizes=[
            ((torch.randn(2, 8, 6, 5),), (2, 8, 6, 5)),
            ((torch.randn(1, 8, 1, 1),), (1, 8, 1, 1)),
            ((torch.randn(1, 8, 1, 7),), (1, 8, 1, 7)),
        ],
        rows_axis=1,
        compiles=name in ("two", "three"),
    )


def test_bad_arguments_of_selective_kernel():
    battery.check_errors([
        (lambda: kernel(impl="fast"), "impl='fast': expected one of auto, explicit, fused"),
        (lambda: kernel(kernel_sizes=(3, 4)),
         "kernel_sizes=(3, 4), dilations=(1, 2): expected odd kernel sizes"),
        (lambda: kernel(kernel_sizes=(3, 3, 3)), "and as many dilations"),
        (lambda: kernel(kernel_sizes=(), dilations=()), "kernel_sizes=(), dilations=()"),
        (lambda: SelectiveKernel(48), "channels=48, out_channels=48: expected multiples of 32"),
        (lambda: kernel(out_channels=7), "out_channels=7: expected multiples of 2 and of groups=2"),
        (lambda: kernel(6, split_input=True), "channels=6, out_channels=6: expected multiples of"),
        (lambda: kernel()(torch.ones(2, 4, 3, 3)), "x (2, 4, 3, 3): expected (B, 8, H, W)"),
        (lambda: kernel()(torch.ones(8, 3, 3)), "x (8, 3, 3): expected (B, 8, H, W)"),
        (lambda: kernel().train()(torch.ones(1, 8, 3, 3)),
         "x has batch size 1: expected at least 2 in training"),
    ])  # fmt: skip
    kernel().eval()(torch.ones(1, 8, 3, 3))
    kernel(attn_norm=nn.Identity).train()(torch.ones(1, 8, 3, 3))


def test_squeeze_excite_equals_the_loop(device):
    module = battery.randomize(SqueezeExcite(6, 2)).to(device)
    battery.check_matches(module, partial(se_loop, module), maps(2, 6, 3, 2).to(device))


@pytest.mark.parametrize("impl", ["explicit", "fused"])
@pytest.mark.parametrize("name", ["one", "two", "three"])
def test_selective_kernel_equals_the_loop(impl, name, device):
    module = battery.randomize(kernel(**KERNELS[name], impl=impl)).eval().to(device)
    battery.check_matches(module, partial(sk_loop, module), maps(2, 8, 5, 4).to(device))


@pytest.mark.parametrize("squeeze", ["avg", "max"])
@pytest.mark.parametrize("bias", [True, False])
def test_squeeze_excite_equals_timms(squeeze, bias, device):
    theirs = SEModule(24, rd_ratio=1 / 4, rd_divisor=1, bias=bias)
    ours = SqueezeExcite(24, 4, bias=bias, squeeze=squeeze)
    ours.load_state_dict(battery.randomize(theirs).state_dict(), strict=True)
    x = maps(3, 24, 7, 5).to(device)
    if squeeze == "avg":
        battery.check_matches(ours.to(device), theirs.to(device), x)
        return
    # timm averages both pools; its own modules on the maximum alone are the other reference.
    ours, theirs = ours.double().to(device), theirs.double().to(device)
    s = theirs.fc2(theirs.act(theirs.fc1(x.amax((2, 3), keepdim=True))))
    torch.testing.assert_close(ours(x), x * s.sigmoid(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("impl", ["explicit", "fused"])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"rd_channels": 32}, {}),
        ({"rd_channels": 32, "stride": 2}, {"stride": 2}),
        ({"rd_channels": 32, "kernel_size": [3, 5, 7]},
         {"kernel_sizes": (3, 3, 3), "dilations": (1, 2, 3)}),
        ({"rd_channels": 32, "kernel_size": [3, 5], "keep_3x3": False},
         {"kernel_sizes": (3, 5), "dilations": (1, 1)}),
        ({"split_input": True, "rd_ratio": 1 / 4, "dilation": 2},
         {"split_input": True, "reduction": 4, "min_hidden": 1, "dilation": 2}),
    ],
)  # fmt: skip
def test_selective_kernel_equals_timms(theirs, ours, impl, training, device):
    theirs = TimmSelectiveKernel(64, 64, groups=8, **{"split_input": False, **theirs})
    ours = SelectiveKernel(64, groups=8, impl=impl, **ours)
    ours.load_state_dict(battery.randomize(theirs).state_dict(), strict=True)
    battery.check_matches(
        ours.to(device).train(training), theirs.to(device).train(training),
        maps(2, 64, 6, 5).to(device),
    )  # fmt: skip


def test_the_variant_with_four_ungrouped_kernels_equals_its_formula():
    """Kernels 1, 3, 5, 7 without groups, a linear z with bias, one linear map a branch."""
    torch.manual_seed(0)
    module = battery.randomize(kernel(**KERNELS["1, 3, 5, 7 ungrouped, biases, nothing on z"]))
    module = module.double().eval()
    x = maps(2, 8, 7, 6)
    branches = [
        F.relu(path.bn(F.conv2d(x, path.conv.weight, padding=size // 2)))
        for path, size in zip(module.paths, (1, 3, 5, 7), strict=True)
    ]
    s = sum(branches).mean((-2, -1))
    reduce, choose = module.attn.fc_reduce, module.attn.fc_select
    z = F.linear(s, reduce.weight.flatten(1), reduce.bias)
    logits = [
        F.linear(z, weight.flatten(1), bias)
        for weight, bias in zip(choose.weight.chunk(4), choose.bias.chunk(4), strict=True)
    ]
    shares = torch.softmax(torch.stack(logits), dim=0)
    expected = sum(a[..., None, None] * u for a, u in zip(shares, branches, strict=True))
    torch.testing.assert_close(module(x), expected, atol=1e-9, rtol=0)


@given(seed=st.integers(0, 10**6), C=st.integers(1, 9), H=st.integers(1, 5), W=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_invariants_of_squeeze_excite(seed, C, H, W):
    module = battery.randomize(SqueezeExcite(C, 2), seed).double()
    x = maps(2, C, H, W, seed=seed)
    x[:, :, 0, 0] = 0
    out, gates = module(x), gates_of(module, x)
    assert gates.shape == (2, C)
    assert ((gates > 0) & (gates < 1)).all()
    assert (out.abs() <= x.abs()).all()
    assert torch.equal(out.sign(), x.sign())

    order = torch.randperm(H * W, generator=torch.Generator().manual_seed(seed))
    shuffled = x.flatten(2)[..., order].view_as(x)
    moved = out.flatten(2)[..., order].view_as(x)
    torch.testing.assert_close(module(shuffled), moved, atol=1e-9, rtol=0)
    torch.testing.assert_close(module(x.flip(-1)), out.flip(-1), atol=1e-9, rtol=0)
    torch.testing.assert_close(gates_of(module, x.roll(1, -1)), gates, atol=1e-9, rtol=0)

    constant = x[:, :, :1, :1].expand_as(x) + 1
    one_place = module(constant[:, :, :1, :1])
    torch.testing.assert_close(module(constant), one_place.expand_as(x), atol=1e-9, rtol=0)


@given(seed=st.integers(0, 10**6), M=st.integers(1, 4), C=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_invariants_of_selection(seed, M, C):
    branches = list(maps(M, 2, C, 3, 4, seed=seed))
    logits = 3 * maps(2, M, C, seed=seed + 1)
    weights = logits.softmax(1)
    out = select(branches, weights)
    expected = torch.einsum("bmc,mbchw->bchw", weights, torch.stack(branches))
    torch.testing.assert_close(out, expected, atol=1e-9, rtol=0)

    low, high = torch.stack(branches).aminmax(dim=0)
    assert ((out >= low - 1e-9) & (out <= high + 1e-9)).all()
    shifted = (logits + maps(2, 1, C, seed=seed + 2)).softmax(1)
    torch.testing.assert_close(select(branches, shifted), out, atol=1e-9, rtol=0)
    same = select([branches[0]] * M, weights)
    torch.testing.assert_close(same, branches[0], atol=1e-9, rtol=0)
    mean = select(branches, torch.full_like(weights, 1 / M))
    torch.testing.assert_close(mean, torch.stack(branches).mean(0), atol=1e-9, rtol=0)
    for m in range(M):
        one = torch.full_like(logits, -math.inf)
        one[:, m] = 0.0
        torch.testing.assert_close(select(branches, one.softmax(1)), branches[m])


def gates_of(module, x):
    with record(module) as recorded:
        module(x)
    return recorded[""]


def test_zero_weights_halve_and_a_large_bias_keeps():
    x = maps(2, 8, 5, 4).float()
    module = battery.randomize(SqueezeExcite(8, 4))
    nn.init.zeros_(module.fc2.weight)
    nn.init.zeros_(module.fc2.bias)
    assert torch.equal(module(x), 0.5 * x)
    nn.init.constant_(module.fc2.bias, 20.0)
    torch.testing.assert_close(module(x), x, atol=1e-8, rtol=0)
    assert not torch.equal(SqueezeExcite(8, 4)(x), x), "it does not begin as the identity"


def test_fresh_gates_are_near_one_half():
    torch.manual_seed(0)
    gates = gates_of(SqueezeExcite(256), torch.randn(4, 256, 7, 7))
    assert (gates - 0.5).abs().max() < 0.3


@pytest.mark.parametrize(
    ("channels", "reduction", "hidden"), [(256, 16, 16), (100, 16, 6), (16, 16, 1), (8, 16, 1)]
)
def test_hidden_channels_and_the_parameter_formula(channels, reduction, hidden):
    module = SqueezeExcite(channels, reduction)
    assert module.fc1.out_channels == hidden
    battery.check_parameters(module, 2 * channels * hidden + channels + hidden)
    battery.check_parameters(SqueezeExcite(channels, reduction, bias=False), 2 * channels * hidden)


def test_one_pixel_moves_every_pixel_of_every_channel():
    """Finite differences: a local term at the pixel itself, a global one through the mean."""
    module = battery.randomize(SqueezeExcite(4, 2)).double()
    nn.init.constant_(module.fc1.bias, 3.0)  # no hidden unit is dead
    x = maps(1, 4, 3, 3)
    step = torch.zeros_like(x)
    step[0, 1, 2, 0] = 1e-5
    moved = (module(x + step) - module(x - step)) / 2e-5
    assert (moved != 0).all()
    jacobian = torch.autograd.functional.jacobian(module, x)[..., 0, 1, 2, 0]
    torch.testing.assert_close(moved, jacobian, atol=1e-8, rtol=0)
    gate = gates_of(module, x)[0, 1]
    others = moved.clone()
    others[0, 1, 2, 0] -= gate  # what is left is the global term, as large as elsewhere
    ratio = others[0, 1] / x[0, 1]
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio), atol=1e-6, rtol=0)


def test_gradients_of_selection():
    branches, logits = maps(2, 1, 2, 2, 3), maps(1, 2, 2)

    def attend(first, second, logits):
        return select([first, second], logits.softmax(1))

    inputs = [x.requires_grad_() for x in (*branches.clone().unbind(), logits)]
    assert torch.autograd.gradcheck(attend, inputs)
    module = kernel(4, groups=1, min_hidden=2).double().eval()
    battery.randomize(module)
    assert torch.autograd.gradcheck(module, [maps(1, 4, 3, 2).requires_grad_()])


def test_gates_are_any_function():
    x = maps(2, 8, 3, 3)
    for gate in (torch.tanh, torch.relu, partial(torch.softmax, dim=1)):
        module = battery.randomize(SqueezeExcite(8, 2, gate=gate)).double()
        z = x.mean((2, 3))
        w1, w2 = module.fc1.weight.flatten(1), module.fc2.weight.flatten(1)
        logits = F.relu(z @ w1.T + module.fc1.bias) @ w2.T + module.fc2.bias
        torch.testing.assert_close(gates_of(module, x), gate(logits), atol=1e-9, rtol=0)
        same = excitation(z, w1, w2, module.fc1.bias, module.fc2.bias, gate=gate)
        torch.testing.assert_close(gates_of(module, x), same, atol=1e-9, rtol=0)


def test_dense_maps():
    x = maps(2, 6, 4, 3)
    module = battery.randomize(SqueezeExcite(6, 2)).double()
    with record(module) as recorded:
        out = module(x)
    dense = recorded.dense()[""]
    assert dense.shape == (2, 1, 6, 6)
    torch.testing.assert_close(torch.einsum("bqk,bkhw->bqhw", dense[:, 0], x), out)

    module = battery.randomize(kernel()).double().eval()
    with record(module) as recorded:
        out = module(maps(2, 8, 4, 3))
    assert recorded[""].shape == (2, 2, 8)
    dense = recorded.dense()[""]
    assert dense.shape == (2, 8, 1, 2)
    branches = torch.stack([path(maps(2, 8, 4, 3)) for path in module.paths], dim=2)
    torch.testing.assert_close(torch.einsum("bcqm,bcmhw->bchw", dense, branches), out)


def test_two_branches_have_one_free_logit_a_channel():
    module = battery.randomize(kernel()).double().eval()
    select_weight = module.attn.fc_select.weight
    x = maps(3, 8, 5, 5)
    before = module(x)
    with torch.no_grad():
        first, second = select_weight.clone().chunk(2)
        select_weight.copy_(torch.cat([first - second, torch.zeros_like(second)]))
    torch.testing.assert_close(module(x), before, atol=1e-9, rtol=0)
    attention = BranchAttention(4, 2, 3).double().eval()
    s = maps(2, 4, 1, 1)
    logits = attention.fc_select(attention.act(attention.bn(attention.fc_reduce(s))))
    l0, l1 = logits.flatten(1).chunk(2, dim=1)
    torch.testing.assert_close(attention(s)[:, 0], torch.sigmoid(l0 - l1))


def test_equal_shares_and_one_branch_and_no_place():
    x = maps(2, 8, 6, 5)
    module = battery.randomize(kernel()).double().eval()
    nn.init.zeros_(module.attn.fc_select.weight)
    first, second = (path(x) for path in module.paths)
    assert torch.equal(module(x), torch.lerp(second, first, 0.5))
    torch.testing.assert_close(module(x), (first + second) / 2)

    alone = battery.randomize(kernel(**KERNELS["one"])).double().eval()
    torch.testing.assert_close(alone(x), alone.paths[0](x))
    path = alone.paths[0]
    expected = F.relu(path.bn(F.conv2d(x, path.conv.weight, padding=1, groups=2)))
    torch.testing.assert_close(path(x), expected)


def test_hidden_channels_of_the_shares():
    for channels, hidden in ((128, 32), (256, 32), (512, 32), (1024, 64)):
        with torch.device("meta"):
            attention = SelectiveKernel(channels).attn
        assert attention.fc_reduce.out_channels == hidden
        assert attention.fc_select.out_channels == 2 * channels


def test_fused_keeps_less_than_explicit_for_the_backward_pass():
    x = maps(2, 32, 16, 16).float()
    kept = {}
    for impl in ("explicit", "fused"):
        module = SelectiveKernel(32, impl=impl)
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.setdefault(t.data_ptr(), t.numel()) and t, lambda t: t
        ):
            module(x)
        kept[impl] = sum(sizes.values())
    assert kept["fused"] <= kept["explicit"] - 2 * x.numel(), "the stack of both branches"


def test_published_parameter_counts():
    cases = [
        (se_resnet50, 28_088_024),
        (partial(resnet101, inside=SqueezeExcite), 49_326_872),
        (partial(resnext50_32x4d, inside=SqueezeExcite), 27_559_896),
        (sknet50, 27_479_784),
    ]
    for factory, count in cases:
        with torch.device("meta"):
            battery.check_parameters(factory(), count)
    with torch.device("meta"):
        plain, bare = resnet50(), resnet50(inside=partial(SqueezeExcite, bias=False))
    extra = sum(p.numel() for p in bare.parameters()) - sum(p.numel() for p in plain.parameters())
    stages = ((3, 256), (4, 512), (6, 1024), (3, 2048))
    assert extra == 2 * sum(n * c * c for n, c in stages) // 16 == 2_514_944


def same_logits(ours, theirs, size, tolerance=1e-9):
    """Randomised weights, loaded strictly under timm's names, float64, a small image."""
    ours.load_state_dict(battery.randomize(theirs).state_dict(), strict=True)
    image = torch.rand(1, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        expected, got = theirs.double().eval()(image), ours.double().eval()(image)
    # Random weights make logits of any size.
    assert ((got - expected).abs().max() / expected.abs().max()).item() <= tolerance


@pytest.mark.parametrize(
    ("factory", "name"), [(se_resnet50, "seresnet50"), (sknet50, "skresnext50_32x4d")]
)
def test_logits_equal_those_of_timms_networks(factory, name):
    same_logits(factory(num_classes=10), timm.create_model(name, num_classes=10), (64, 48))


def test_the_ported_caffe_network_loads_and_is_equal_once_its_strides_are_moved():
    """`legacy_seresnet50` with one block a stage: stride on the first 1×1, other pooling."""
    theirs = SENet(
        SEResNetBottleneck, (1, 1, 1, 1), groups=1, reduction=16, inplanes=64, input_3x3=False,
        downsample_kernel_size=1, downsample_padding=0, num_classes=10,
    )  # fmt: skip
    ours = ResNet(Bottleneck, (1, 1, 1, 1), inside=SqueezeExcite, num_classes=10)
    for stage in (ours.layer2, ours.layer3, ours.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    ours.maxpool = nn.MaxPool2d(3, stride=2, ceil_mode=True)
    battery.randomize(theirs)
    with torch.device("meta"):
        names = set(se_resnet50().state_dict())
        legacy = timm.create_model("legacy_seresnet50").state_dict()
    assert set(from_timm(legacy)) == names
    ours.register_load_state_dict_pre_hook(channel._convert_timm)
    same_logits(ours, theirs, (64, 48))


def test_from_timm_keeps_our_own_names_and_every_value():
    with torch.device("meta"):
        models = se_resnet50(), sknet50(), se_resnet_mini()
    for model in models:
        state = model.state_dict()
        assert list(from_timm(state)) == list(state)
    nested = nn.ModuleDict({"backbone": se_resnet_mini()})
    saved = {k.replace(".inside.", ".se."): v for k, v in nested.state_dict().items()}
    nested.load_state_dict(saved, strict=True)


def test_linear_layouts_load_into_the_module():
    theirs = nn.Module()
    theirs.fc = nn.Sequential(
        nn.Linear(8, 2, bias=False), nn.ReLU(), nn.Linear(2, 8, bias=False), nn.Sigmoid()
    )
    ours = SqueezeExcite(8, 4, bias=False)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = maps(2, 8, 3, 3).float()
    torch.testing.assert_close(ours(x), x * theirs.fc(x.mean((2, 3)))[..., None, None])

    linear = {k: v[:, :, 0, 0] for k, v in ours.state_dict().items()}
    nested = nn.Sequential(SqueezeExcite(8, 4, bias=False))
    nested.load_state_dict({f"0.{k}": v for k, v in linear.items()}, strict=True)
    torch.testing.assert_close(nested(x), ours(x))


@pytest.mark.parametrize("make", [lambda: SqueezeExcite(32), lambda: SelectiveKernel(32)])
def test_channels_last_stays_and_computes_the_same(make, device):
    module = battery.randomize(make()).eval().to(device)
    x = torch.randn(2, 32, 6, 5, device=device)
    with torch.no_grad():
        out = module(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(out, module(x), atol=1e-4, rtol=1e-4)
    assert out.is_contiguous(memory_format=torch.channels_last)
