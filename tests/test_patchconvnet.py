"""PatchConvNet against the spec's token form, published sizes, the authors' layout, its limits."""

import copy

import battery
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.optim import create_optimizer_v2
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import attnlab
from attnlab import patchconvnet
from attnlab.attention_pooling import AttentionPool
from attnlab.feature_maps import MapBackbone
from attnlab.patchconvnet import ConvBlock, ConvStem, PatchConvNet, patchconvnet_mini
from attnlab.pooling import AveragePool, ContextPool, GatedPool

# Width, depth, γ, parameters, and billions of multiply-adds at 224 pixels, as the spec measured.
PUBLISHED = {
    "s60": (384, 60, 1e-4, 25_231_096, 3.979),
    "s120": (384, 120, 1e-6, 47_723_896, 7.493),
    "b60": (768, 60, 1e-6, 99_388_936, 15.803),
    "b120": (768, 120, 1e-6, 188_611_336, 29.775),
    "l60": (1024, 60, 1e-6, 176_009_576, 28.043),
    "l120": (1024, 120, 1e-6, 334_294_376, 52.846),
    "s60_multi": (384, 60, 1e-4, 25_614_712, 5.308),
}


def randn(*shape, seed=0, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype).to(device)


def small(**options) -> PatchConvNet:
    sizes = {"num_classes": 5, "embed_dim": 16, "depth": 2, "init_values": 0.5}
    return PatchConvNet(**sizes | options)


def official_layout(model: PatchConvNet) -> dict:
    """The state dict under the names of the authors' code (spec, section 14)."""
    names = {"conv1.": "attn.qkv_pos.0.", "conv2.": "attn.qkv_pos.2.",
             "se.fc1.": "attn.qkv_pos.4.conv_reduce.", "se.fc2.": "attn.qkv_pos.4.conv_expand.",
             "conv3.": "attn.qkv_pos.5.", "norm.": "norm1.", "gamma": "gamma_1"}  # fmt: skip
    pooled = {"q.": "attn.q.", "k.": "attn.k.", "v.": "attn.v.", "proj.": "attn.proj.",
              "ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}  # fmt: skip

    def theirs(name):
        if name == "pool.cls_token":
            return "cls_token"
        part, _, rest = name.partition(".")
        if part == "stem":
            index, kind = rest.split(".")[1:]
            return f"patch_embed.proj.{2 * int(index)}.0.{kind}"
        if part == "blocks":
            index, _, rest = rest.partition(".")
            ours = next(ours for ours in names if rest.startswith(ours))
            return f"blocks.{index}.{names[ours]}{rest.removeprefix(ours)}"
        if part == "pool":
            ours = next((ours for ours in pooled if rest.startswith(ours)), "")
            return f"blocks_token_only.0.{pooled.get(ours, '')}{rest.removeprefix(ours)}"
        return name

    state = {theirs(name): value for name, value in model.state_dict().items()}
    if model.multiclass:
        weight, bias = state.pop("head.weight"), state.pop("head.bias")
        for j in range(model.num_classes):
            state[f"head.{j}.weight"], state[f"head.{j}.bias"] = weight[j : j + 1], bias[j : j + 1]
    return state


def token_form(state: dict, x, depth: int, cls_in_keys: bool = True):
    """Sections 3.1 to 3.4 of the spec, tokens `(B, N, d)`, from the authors' names."""

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def conv(name, x, **how):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **how)

    def norm(name, x):
        return F.layer_norm(
            x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6
        )

    for i in range(4):
        weight = state[f"patch_embed.proj.{2 * i}.0.weight"]
        x = F.conv2d(x if i == 0 else F.gelu(x), weight, stride=2, padding=1)
    (batch, d, h, _), tokens = x.shape, rearrange(x, "b d h w -> b (h w) d")
    for i in range(depth):
        at = f"blocks.{i}.attn.qkv_pos"
        u = rearrange(norm(f"blocks.{i}.norm1", tokens), "b (h w) d -> b d h w", h=h)
        a = F.gelu(conv(f"{at}.0", u))
        a = F.gelu(conv(f"{at}.2", a, padding=1, groups=d))
        s = F.relu(conv(f"{at}.4.conv_reduce", a.mean((2, 3), keepdim=True)))
        a = conv(f"{at}.5", a * conv(f"{at}.4.conv_expand", s).sigmoid())
        tokens = tokens + state[f"blocks.{i}.gamma_1"] * rearrange(a, "b d h w -> b (h w) d")

    at, multi = "blocks_token_only.0", "head.0.weight" in state
    cls = state["cls_token"].expand(batch, -1, -1)
    z = norm(f"{at}.norm1", torch.cat([cls, tokens], 1))
    q = linear(f"{at}.attn.q", z[:, : cls.shape[1]])
    z = z if cls_in_keys and not multi else z[:, cls.shape[1] :]
    weights = (q @ linear(f"{at}.attn.k", z).mT / d**0.5).softmax(-1)
    out = linear(f"{at}.attn.proj", weights @ linear(f"{at}.attn.v", z))
    cls = cls + state[f"{at}.gamma_1"] * out
    hidden = F.gelu(linear(f"{at}.mlp.fc1", norm(f"{at}.norm2", cls)))
    cls = norm("norm", cls + state[f"{at}.gamma_2"] * linear(f"{at}.mlp.fc2", hidden))
    if not multi:
        return linear("head", cls[:, 0])
    return torch.cat([linear(f"head.{j}", cls[:, j]) for j in range(cls.shape[1])], dim=1)


# Published sizes


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_and_closed_forms(name):
    d, depth, gamma, parameters, _ = PUBLISHED[name]
    with torch.device("meta"):
        model = getattr(patchconvnet, f"patchconvnet_{name}")()
    k, multi, rho = 1000, name.endswith("multi"), d // 4
    stem = 9 * (3 * d // 8 + 21 * d**2 // 32)
    block = 2 * d**2 + 2 * d * rho + rho + 16 * d
    pool = 10 * d**2 + 14 * d + d * (k if multi else 1)
    battery.check_parameters(model.stem, stem)
    battery.check_parameters(model.blocks[0], block)
    battery.check_parameters(model.pool, pool)
    battery.check_parameters(model, parameters)
    assert parameters == stem + depth * block + pool + 2 * d + k * d + k
    assert len(model.state_dict()) == 27 + 13 * depth  # 807 and 1587
    assert len(official_layout(model)) == {60: 807, 120: 1587}[depth] + 1998 * multi
    assert not list(model.buffers())
    assert initial_gamma(name) == gamma


def initial_gamma(name: str) -> float:
    """γ at the beginning, of a thin copy of the model."""
    thin = getattr(patchconvnet, f"patchconvnet_{name}")(embed_dim=8, depth=1, num_classes=2)
    scales = torch.cat([thin.blocks[0].gamma, thin.pool.ls1.gamma, thin.pool.ls2.gamma])
    return pytest.approx(scales.unique().item())


@pytest.mark.parametrize(("name", "size", "billions"), [
    *((name, 224, row[4]) for name, row in PUBLISHED.items() if name not in ("l60", "l120")),
    ("s60", 384, 11.68), ("s60", 512, 20.76),
])  # fmt: skip
def test_published_multiply_adds(name, size, billions):
    """As published, with every place projected; the grid is ⌈size / 16⌉ a side."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = getattr(patchconvnet, f"patchconvnet_{name}")(impl="explicit")
        model(torch.empty(1, 3, size, size))
    counted = counter.get_total_flops() // 2
    assert counted / 1e9 == pytest.approx(billions, abs=6e-3 if size > 224 else 6e-4)
    d, depth, multi, places = (
        model.num_features,
        len(model.blocks),
        model.multiclass,
        (size // 16) ** 2,
    )
    sides, widths = [size // 2**i for i in range(1, 5)], [3, d // 8, d // 4, d // 2, d]
    stem = sum(9 * a * b * s**2 for a, b, s in zip(widths, widths[1:], sides, strict=False))
    trunk = places * (2 * d**2 + 9 * d) + 2 * d * (d // 4)
    q, m = (1000, places) if multi else (1, places + 1)
    pool = 2 * q * d**2 + 2 * m * d**2 + 2 * q * m * d + 6 * d**2 * q
    head = 0 if multi else 1000 * d  # of k vectors it is a sum of products, and not counted
    assert counted == stem + depth * trunk + pool + head


# Equal to the authors' form


@pytest.mark.parametrize("size", [(48, 48), (64, 144), (33, 70)])
@pytest.mark.parametrize("multiclass", [False, True])
def test_equals_the_token_form_in_value_and_gradient(multiclass, size, device):
    """4 × 9 places are 36 = 6²: a code that takes the grid for a square is silently wrong there."""
    model = battery.randomize(small(multiclass=multiclass)).to(device).eval()
    reference = lambda x: token_form(official_layout(model), x, depth=2)  # noqa: E731
    battery.check_matches(model, reference, randn(2, 3, *size, device=device))
    images = randn(2, 3, *size, device=device).double()
    ours = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
    named = {name: p.detach().requires_grad_() for name, p in official_layout(model).items()}
    token_form(named, images, depth=2).square().sum().backward()
    loaded = copy.deepcopy(model)
    loaded.load_state_dict({name: p.grad for name, p in named.items()}, strict=True)
    for (name, theirs), own in zip(loaded.named_parameters(), ours, strict=True):
        torch.testing.assert_close(own, theirs.detach(), atol=1e-9, rtol=1e-9, msg=name)


@pytest.mark.parametrize("multiclass", [False, True])
@pytest.mark.parametrize(("wrapped", "module"), [(0, ""), (0, "module."), (1, ""), (1, "module.")])
def test_the_authors_layout_loads_strictly(multiclass, wrapped, module):
    def wrap(state):
        state = {module + name: x for name, x in state.items()}
        return {"model": state} if wrapped else state

    model, other = (battery.randomize(small(multiclass=multiclass), seed=s) for s in (0, 1))
    for state in (official_layout(model), model.state_dict()):
        loaded = copy.deepcopy(other)
        loaded.load_state_dict(wrap(state), strict=True)
        for (name, x), expected in zip(
            loaded.state_dict().items(), model.state_dict().values(), strict=True
        ):
            assert torch.equal(x, expected), name
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({"model": {"cls_token": model.pool.cls_token}}, strict=True)


def test_a_part_of_a_larger_model_loads_too():
    model, other = battery.randomize(small()), small()
    nn.Sequential(other).load_state_dict({f"0.{n}": x for n, x in official_layout(model).items()})
    assert torch.equal(other.head.weight, model.head.weight)
    assert torch.equal(other.blocks[1].se.fc2.weight, model.blocks[1].se.fc2.weight)


# The parts


def test_battery_of_the_block(device):
    def make():
        return ConvBlock(8, init_values=0.5).to(device)

    x = randn(2, 8, 4, 5, device=device)
    battery.battery(
        make, x, impls=("explicit",), rows_axis=None, grid=(4, 5),
        parameters=2 * 64 + 2 * 8 * 2 + 2 + 16 * 8,
        sizes=[((x,), (2, 8, 4, 5)), ((x[:1, :, :1],), (1, 8, 1, 5))],
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"multiclass": True}, {"stem": "patchify", "depth": 1}])
def test_battery_of_the_network(options, device):
    def make():
        return small(stem_convs=3, **options).to(device)

    x = randn(2, 3, 16, 24, device=device)
    battery.battery(
        make, x, impls=("explicit", "auto", "fused", "collapsed"), rows_axis=None, grid=(2, 3),
        sizes=[((x,), (2, 5)), ((x[:1, :, :8],), (1, 5))], compiles=options == {},
    )  # fmt: skip


def test_the_column_stays_in_channels_last_memory(device):
    model = battery.randomize(small()).to(device)
    seen = []
    for part in (*model.blocks, *(block.conv3 for block in model.blocks)):
        part.register_forward_hook(lambda module, inputs, output: seen.append(output))
    x = randn(2, 3, 64, 144, device=device)
    features = model.forward_features(x)
    assert features.shape == (2, 16, 4, 9)
    assert len(seen) == 4
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)


def test_stem_halves_and_rounds_up(device):
    stem = ConvStem(16).to(device)
    assert [conv.weight.shape[:2] for conv in stem.convs] == [(2, 3), (4, 2), (8, 4), (16, 8)]
    for size, grid in ((224, 14), (72, 5), (1, 1), (33, 3)):
        assert stem(torch.zeros(1, 3, size, 16, device=device)).shape == (1, 16, grid, 1)
    assert sum(p.numel() for p in stem.parameters()) == 9 * (3 * 2 + 2 * 4 + 4 * 8 + 8 * 16)


def test_a_block_with_gamma_0_is_the_identity():
    block, x = ConvBlock(8, init_values=0.0), randn(2, 8, 3, 4)
    assert torch.equal(block(x), x)


def test_folding_the_scales_into_the_convolutions_changes_nothing():
    """γ into the last 1×1 convolution, the norm's affine into the first (spec, invariant 11)."""
    block = battery.randomize(ConvBlock(8)).double()
    x = randn(2, 8, 3, 4).double()
    folded = copy.deepcopy(block)
    with torch.no_grad():
        folded.conv3.weight.mul_(block.gamma[:, None, None, None])
        folded.conv3.bias.mul_(block.gamma)
        folded.gamma.fill_(1.0)
        weight = block.conv1.weight[:, :, 0, 0]
        folded.conv1.bias.add_(weight @ block.norm.bias)
        folded.conv1.weight.mul_(block.norm.weight[:, None, None])
        folded.norm.weight.fill_(1.0), folded.norm.bias.zero_()
    torch.testing.assert_close(folded(x), block(x), atol=1e-12, rtol=0)


def test_without_a_spatial_kernel_only_the_squeeze_mixes_places():
    x = randn(1, 8, 3, 4)
    for reduction, mixes in ((None, False), (4, True)):
        block = battery.randomize(ConvBlock(8, kernel_size=1, se_reduction=reduction))
        changed = x.clone()
        changed[:, 0, 0, 0] += 1.0
        difference = (block(changed) - block(x)).abs().amax((0, 1))
        assert (difference.flatten()[1:].max() > 1e-4) == mixes


def test_drop_path_is_the_same_in_all_blocks_and_the_pooling_has_none(device):
    model = small(drop_path_rate=0.3, drop_rate=0.2).to(device)
    assert {block.drop_path.drop_prob for block in model.blocks} == {0.3}
    assert (model.pool.proj_drop.p, model.pool.mlp.drop1.p) == (0.2, 0.2)
    block = ConvBlock(8, init_values=0.5, drop_path=0.5).to(device).train()
    x = randn(64, 8, 2, 2, device=device)
    out = block(x)
    kept = (out != x).flatten(1).any(1)
    assert 10 < kept.sum() < 54
    whole = block.eval()(x)
    torch.testing.assert_close((out - x)[kept], 2 * (whole - x)[kept], atol=1e-5, rtol=1e-4)


def test_initialisation():
    torch.manual_seed(0)
    model = PatchConvNet(embed_dim=64, depth=1, stem_convs=2, num_classes=300)
    bound = 64**-0.5
    for conv in (model.blocks[0].conv1, model.blocks[0].conv3, model.blocks[0].se.fc1):
        assert 0.95 * bound < conv.weight.abs().max() <= bound
        assert 0 < conv.bias.abs().max() <= bound
    for linear in (model.pool.q, model.pool.mlp.fc1, model.head):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert not linear.bias.any()
    mini = patchconvnet_mini()
    assert mini.pool.k.weight.std().item() == pytest.approx(64**-0.5, rel=0.1)
    assert mini.head.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert patchconvnet_mini(embed_dim=16).pool.k.weight.std().item() == pytest.approx(
        0.25, rel=0.2
    )


# Maps, one for all classes or one each


@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), h=st.integers(1, 40), w=st.integers(1, 40), multi=st.booleans())
def test_any_size_has_maps_that_sum_to_one(seed, h, w, multi):
    model = battery.randomize(small(multiclass=multi, stem_convs=3, depth=1)).eval()
    x = randn(2, 3, h, w, seed=seed)
    maps = model.maps(x, normalize=True)
    assert maps.shape == (2, 5 if multi else 1, -(-h // 8), -(-w // 8))
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(2, maps.shape[1]))
    assert (model.maps(x).sum((2, 3)) <= 1 + 1e-5).all()
    with attnlab.record(model) as recorded:
        logits = model(x)
    torch.testing.assert_close(logits, model(x), atol=1e-4, rtol=1e-4)
    weights = recorded["pool"][:, 0, :, -maps[0, 0].numel() :]
    torch.testing.assert_close(model.maps(x).flatten(2), weights, atol=1e-4, rtol=1e-4)


def test_one_map_becomes_one_a_class(device):
    """Copied class vectors give the same logits only if the class was no key."""
    model = battery.randomize(small()).double().eval().to(device)
    x = randn(2, 3, 48, 64, device=device).double()
    multi = model.to_multiclass(noise=0.0)
    assert (multi(x) - model(x)).abs().max() > 1e-3
    expected = token_form(official_layout(model), x, depth=2, cls_in_keys=False)
    torch.testing.assert_close(multi(x), expected, atol=1e-9, rtol=0)
    assert multi.maps(x).shape == (2, 5, 3, 4)
    assert not model.multiclass
    assert multi.pool.cls_token.data_ptr() != model.pool.cls_token.data_ptr()

    torch.manual_seed(0)
    noisy = model.to_multiclass().pool.cls_token - model.pool.cls_token
    assert noisy.std().item() == pytest.approx(0.02, rel=0.3)
    assert {p.requires_grad for p in multi.parameters()} == {True}
    multi.train()(x).sum().backward()
    assert multi.pool.cls_token.grad.abs().min() > 0


def test_permuting_the_classes_permutes_the_logits_and_they_do_not_meet():
    model = battery.randomize(small(multiclass=True)).double().eval()
    x = randn(2, 3, 32, 48).double()
    expected, order = model(x), torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        for parameter in (model.pool.cls_token, model.head.weight, model.head.bias):
            axis = 1 if parameter.ndim == 3 else 0
            parameter.copy_(parameter.index_select(axis, order))
    torch.testing.assert_close(model(x), expected[:, order], atol=1e-12, rtol=0)
    with torch.no_grad():
        model.pool.cls_token[:, 2] += torch.randn(16)
    changed = (model(x) - expected[:, order]).abs().amax(0)
    assert changed[2] > 1e-3
    assert changed[[0, 1, 3, 4]].max() < 1e-12


def test_a_shared_head_has_one_row():
    model = battery.randomize(small(multiclass=True, shared_head=True)).eval()
    x = randn(2, 3, 32, 32)
    assert model.head.weight.shape == (1, 16)
    expected = F.linear(model.forward_head(model.forward_features(x), pre_logits=True),
                        model.head.weight, model.head.bias)[..., 0]  # fmt: skip
    torch.testing.assert_close(model(x), expected)
    model.reset_classifier(9)
    assert (model.head.weight.shape, model(x).shape) == ((1, 16), (2, 9))


# Other pools, norms and stems


def test_class_activation_maps_have_the_logits_as_their_mean(device):
    model = battery.randomize(small(pool=AveragePool())).eval().to(device)
    x = randn(2, 3, 48, 64, device=device)
    maps = model.class_activation_maps(x)
    assert maps.shape == (2, 5, 3, 4)
    torch.testing.assert_close(maps.mean((2, 3)), model(x))
    context = battery.randomize(small(pool=ContextPool(16))).eval().to(device)
    weights = context.pool.maps(context.norm(context.forward_features(x)))
    torch.testing.assert_close(context.maps(x), weights)
    weighted = (weights * context.class_activation_maps(x)).sum((2, 3))
    torch.testing.assert_close(weighted, context(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [
    {"norm_layer": nn.BatchNorm2d}, {"stem": "patchify", "kernel_size": 1, "se_reduction": None},
    {"pool": GatedPool(16)}, {"num_heads": 4, "cls_in_keys": False}, {"multiclass": True},
    {"se_reduction": 8, "kernel_size": 5, "in_chans": 1}, {"qkv_bias": False, "mlp_ratio": 2.0},
])  # fmt: skip
def test_options_train_and_every_parameter_has_a_gradient(options, device):
    model = small(**options).to(device).train()
    x = randn(2, options.get("in_chans", 3), 32, 48, device=device)
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        out = model(x)
        assert out.shape == (2, 5)
        out.square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


def test_the_uniform_control_pools_uniformly_whatever_the_image():
    model = battery.randomize(small()).eval()
    model.pool.freeze_uniform()
    torch.testing.assert_close(model.maps(randn(2, 3, 48, 64)), torch.full((2, 1, 3, 4), 1 / 13))


# Conventions


@pytest.mark.parametrize("multiclass", [False, True])
def test_reset_classifier_for_any_number(multiclass, device):
    model = small(multiclass=multiclass).to(device).double().eval()
    x = randn(2, 3, 32, 48, device=device).double()
    for classes in (1, 7, 1000):
        model.reset_classifier(classes)
        assert model(x).shape == (2, classes)
        assert model.maps(x).shape == (2, classes if multiclass else 1, 2, 3)
        assert model.get_classifier() is model.head
        assert model.head.weight.dtype == torch.float64
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    assert pooled.shape == ((2, 1000, 16) if multiclass else (2, 16))
    assert (model.num_features, model.num_classes) == (16, 0)


def test_checkpointing_changes_neither_values_nor_gradients(device):
    x, results = randn(3, 3, 32, 48, device=device), []
    model = battery.randomize(small(drop_path_rate=0.5, drop_rate=0.1)).to(device).train()
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(0)
        out = model(x)
        out.square().sum().backward()
        results.append([out, *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_checkpointing_keeps_less_for_the_backward_pass():
    def kept(enable):
        model, storages = small(depth=20), {}
        model.set_grad_checkpointing(enable)

        def pack(x):
            storages[x.untyped_storage().data_ptr()] = x
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = model(randn(2, 3, 128, 128))
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        del out
        return sum(
            x.untyped_storage().nbytes() for key, x in storages.items() if key not in weights
        )

    assert kept(True) < 0.5 * kept(False)


def test_higher_resolution_needs_no_new_parameter():
    """Without SE, what the column computes far from the border does not depend on the size."""
    model = battery.randomize(small(se_reduction=None)).double().eval()
    x = randn(1, 3, 320, 320).double()
    whole, cut = model.forward_features(x), model.forward_features(x[..., :192, :192])
    torch.testing.assert_close(whole[..., :8, :8], cut[..., :8, :8], atol=1e-9, rtol=0)
    assert model(x).shape == (1, 5)


def test_optimiser_groups():
    model = small()
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {names[id(p)]: g for g in optimizer.param_groups for p in g["params"]}
    assert groups.keys() == set(names.values())
    assert groups["pool.cls_token"]["weight_decay"] == 0
    assert groups["blocks.0.gamma"]["weight_decay"] == 0
    assert groups["blocks.0.conv1.weight"]["weight_decay"] == 0.1
    deeper = ("stem.convs.0.", "blocks.0.conv1.", "blocks.1.conv1.", "head.")
    scales = [groups[f"{name}weight"]["lr_scale"] for name in deeper]
    assert scales == sorted(set(scales))


def test_dense_heads_get_the_columns_map(device):
    backbone = MapBackbone(patchconvnet_mini()).to(device)
    x = randn(2, 3, 64, 40, device=device)
    assert backbone.out_channels == 64
    assert backbone(x)["0"].shape == (2, 64, 8, 5)
    assert torch.equal(backbone.forward_stages(x)["layer4"], backbone.model.forward_features(x))


def test_mini_fits_the_bundled_data(device):
    model = patchconvnet_mini().to(device)
    battery.check_parameters(model, 111_160)
    x = randn(2, 3, 64, 64, device=device)
    assert model(x).shape == (2, 8)
    assert model.maps(x).shape == (2, 1, 8, 8)
    assert patchconvnet_mini(6, multiclass=True).maps(randn(1, 3, 64, 48)).shape == (1, 6, 8, 6)


def test_errors():
    images = torch.zeros(1, 3, 20, 32)
    attends = small(num_classes=0)
    battery.check_errors([
        (lambda: small(stem="linear"), "stem='linear': expected 'conv' or 'patchify'"),
        (lambda: small(embed_dim=12), "embed_dim=12: expected a multiple of 8"),
        (lambda: small(stem_convs=0), "num_convs=0: expected at least 1"),
        (lambda: small(multiclass=True, num_classes=0), "num_classes=0: expected None and at leas"),
        (lambda: small(multiclass=True, pool=AveragePool()), "pool=AveragePool(), num_classes=5"),
        (lambda: small(shared_head=True), "shared_head=True: expected multiclass=True"),
        (lambda: small(num_heads=3), "dim=16: expected a multiple of num_heads=3"),
        (lambda: small(impl="fast"), "impl='fast': expected one of"),
        (lambda: ConvBlock(8, kernel_size=2), "kernel_size=2: expected an odd number"),
        (lambda: small(drop_path_rate=2.0), "drop_prob=2.0: expected a probability"),
        (lambda: small()(images[0]), "x (3, 20, 32): expected (B, 3, H, W)"),
        (lambda: small(in_chans=1)(images), "x (1, 3, 20, 32): expected (B, 1, H, W)"),
        (lambda: small(stem="patchify")(images), "image size (20, 32): expected multiples of 16"),
        (lambda: small().class_activation_maps(images), "pool=AttentionPool: expected a mean"),
        (lambda: attends.to_multiclass(), "num_classes=0, pool=AttentionPool: expected False"),
        (lambda: small(multiclass=True).to_multiclass(), "multiclass=True, num_classes=5"),
        (lambda: small(pool=AveragePool()).to_multiclass(), "pool=AveragePool: expected False"),
    ])  # fmt: skip
    assert isinstance(attends.pool, AttentionPool)
