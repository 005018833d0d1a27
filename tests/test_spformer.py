"""Superpixel cross-attention and SPFormer against plain forms, published sizes and invariants."""

import inspect
import math

import battery
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.optim import create_optimizer_v2
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import attnlab
from attnlab import spformer
from attnlab import superpixel as sp
from attnlab.attention import deit_tiny
from attnlab.spformer import (
    SPFormer,
    SuperpixelCrossAttention,
    SuperpixelSegmenter,
    lineage,
    paper,
    spformer_mini,
    to_superpixels,
    to_whole_cells,
)

# Parameters and multiply-accumulates at 224 pixels; as printed in the spec: millions, billions.
PUBLISHED = [
    ("tiny_patch16", 5_745_160, 5.75, 1.40),
    ("tiny_patch16_convstem", 5_748_696, 5.75, 1.41),
    ("small_patch16", 22_343_720, 22.34, 5.15),
    ("small_patch16_convstem", 22_360_008, 22.36, 5.21),
    ("small_patch32", 22_240_040, 22.24, 1.23),
    ("small_patch32_convstem", 22_251_320, 22.25, 1.25),
    ("small_patch56_convstem", 22_225_976, 22.23, 0.52),
    ("base_patch16", 87_599_944, 87.60, 19.08),
    ("base_patch16_convstem", 87_638_200, 87.64, 19.22),
]


def randn(*shape, seed=0, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def small(**options) -> SPFormer:
    """16 × 24 pixels: 8 × 12 of the pixel grid, 2 × 3 superpixels; two stages of one block."""
    sizes = {"img_size": (16, 24), "num_classes": 5, "embed_dim": 12, "pixel_dim": 8}
    strides = {"num_heads": 3, "depths": (1, 1), "stem_stride": 2, "cell": 4}
    return SPFormer(**sizes | strides | {"init_values": 0.1, "sca_init_values": 0.5} | options)


def grids(B=2, Sh=2, Sw=3, side=4, device="cpu"):
    pixels = randn(B, 8, Sh * side, Sw * side, device=device)
    return pixels, randn(B, 12, Sh, Sw, seed=1, device=device)


class Updated(nn.Module):
    """`SuperpixelCrossAttention` without its logits, which hold −∞."""

    def __init__(self, **options):
        super().__init__()
        self.sca = SuperpixelCrossAttention(8, 12, **{"init_values": 0.5} | options)

    def forward(self, pixels, superpixels):
        return self.sca(pixels, superpixels)[:2]


# The cross-attention


def plain(sca, pixels, superpixels, schedule="parallel", norm="post", position="conv", M=2):
    """The equations with 1×1 convolutions, `F.unfold` and dense matrices."""

    def project(part, x, widths):
        if position == "conv":
            conv = part.position.conv
            x = x + F.conv2d(x, conv.weight, conv.bias, padding=1, groups=x.shape[1])
        elif position == "learned":
            x = x + part.position.pos_embed.mT.unflatten(2, x.shape[2:])
        if norm == "pre":
            x = normalized(x, part.pre_norm)
        x = F.conv2d(x, part.qkv.weight[:, :, None, None])
        x = normalized(x, part.norm) if norm == "post" else x
        return x.split(widths, 1)

    def normalized(x, by):
        mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, correction=0)
        x = (x - mean) / (variance + 1e-6).sqrt()
        return x * by.weight[:, None, None] + by.bias[:, None, None]

    def compared(parts):
        return parts if len(parts) == 3 else (parts[0], *parts)

    def dense_s2p(q, k, v):
        (h, w), (Sh, Sw) = q.shape[2:], k.shape[2:]
        y, x = torch.arange(h) // (h // Sh), torch.arange(w) // (w // Sw)
        rows = (y[:, None] - torch.arange(Sh)).abs() <= 1
        columns = (x[:, None] - torch.arange(Sw)).abs() <= 1
        near = (rows[:, None, :, None] & columns[:, None]).flatten(2).flatten(0, 1).to(q.device)
        q, k, v = (rearrange(t, "b (m d) i j -> b m (i j) d", m=M) for t in (q, k, v))
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~near, -math.inf)
        return rearrange(scores.softmax(-1) @ v, "b m (h w) d -> b (m d) h w", h=h)

    for part in sca.iterations:
        d, C = pixels.shape[1], superpixels.shape[1]
        shared = part.of_pixels.qkv.out_features == d + C
        widths = (d,) * (1 if shared else 2)
        q_p, k_p, v_p = compared(project(part.of_pixels, pixels, (*widths, C)))
        q_s, k_s, v_s = compared(project(part.of_superpixels, superpixels, (*widths, d)))
        update = sp.unfolded_p2s(q_s, k_p, v_p, sca.side, M)
        superpixels = superpixels + part.superpixel_scale.gamma[:, None, None] * update
        if part.update_pixels:
            if schedule == "sequential":
                again = compared(project(part.of_superpixels, superpixels, (*widths, d)))
                _, k_s, v_s = again
            update = dense_s2p(q_p, k_s, v_s)
            pixels = pixels + part.pixel_scale.gamma[:, None, None] * update
    return pixels, superpixels


@pytest.mark.parametrize("options", [
    {}, {"schedule": "sequential"}, {"qkv_norm": "pre"}, {"qkv_norm": "none"}, {"share_qk": True},
    {"position": "learned", "grid_size": (2, 3)}, {"position": "none", "iters": 1},
    {"last_s2p": False}, {"num_heads": 4, "iters": 3},
])  # fmt: skip
def test_cross_attention_equals_its_plain_form(options, device):
    module = battery.randomize(Updated(**options)).to(device)
    names = {"schedule": "schedule", "qkv_norm": "norm", "position": "position", "num_heads": "M"}
    how = {names[key]: value for key, value in options.items() if key in names}
    reference = lambda p, s: plain(module.sca, p, s, **how)  # noqa: E731
    battery.check_matches(module, reference, *grids(device=device))


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 1)])
def test_on_degenerate_grids_too(shape, device):
    module = battery.randomize(Updated()).to(device)
    reference = lambda p, s: plain(module.sca, p, s)  # noqa: E731
    battery.check_matches(module, reference, *grids(2, *shape, device=device))


def test_cross_attention_passes_the_battery(device):
    pixels, superpixels = grids(device=device)
    qkv = 8 * (8 + 8 + 12) + 12 * (8 + 8 + 8)  # of pixels, of superpixels
    norms, positions, scales = 2 * 28 + 2 * 24, 10 * (8 + 12), 8 + 12
    attend = SuperpixelCrossAttention(8, 12)
    p, s = grids()
    errors = [
        (lambda: attend(p[:, :4], s), "pixels (2, 4, 8, 12), superpixels (2, 12, 2, 3): expected"),
        (lambda: attend(p, s[:, :, :1]), "expected (B, 8, h, w) and (B, 12, Sh, Sw) with h = 4·Sh"),
        (lambda: SuperpixelCrossAttention(9, 12), "pixel_dim=9: expected a multiple of num_heads"),
        (lambda: SuperpixelCrossAttention(8, 13), "superpixel_dim=13: expected a multiple of num"),
        (lambda: Updated(schedule="jacobi"), "schedule='jacobi': expected one of parallel, seq"),
        (lambda: Updated(qkv_norm="batch"), "qkv_norm='batch': expected one of post, pre, none"),
        (lambda: Updated(position="rope"), "position='rope': expected one of conv, learned, none"),
        (lambda: Updated(position="learned"), "grid_size=None: expected (Sh, Sw) with position="),
        (lambda: Updated(iters=0), "iters=0: expected at least 1"),
        (lambda: Updated(impl="unfold"), "impl='unfold': expected one of auto, explicit, fused"),
    ]
    small_grids = grids(1, 1, 1, device=device)
    battery.battery(
        lambda: Updated(iters=1).to(device),
        pixels,
        superpixels,
        parameters=qkv + norms + positions + scales,
        sizes=[(small_grids, (1, 8, 4, 4)), ((pixels, superpixels), (2, 8, 8, 12))],
        errors=errors,
    )


def test_scales_of_zero_return_the_inputs_bit_by_bit(device):
    module = Updated(init_values=0.0).to(device)
    pixels, superpixels = grids(device=device)
    for out, given in zip(module(pixels, superpixels), (pixels, superpixels), strict=True):
        assert torch.equal(out, given)


def test_maps_are_native_in_nine_slots_and_dense_on_demand(device):
    module = battery.randomize(Updated()).to(device).double()
    pixels, superpixels = (x.double() for x in grids(device=device))
    with attnlab.record(module) as maps:
        _, _, steps = module.sca(pixels, superpixels)
    names = [f"sca.iterations.{t}.{way}" for t in (0, 1) for way in ("p2s", "s2p")]
    assert list(maps) == names
    assert maps[names[0]].shape == (2, 2, 2, 3, 144)
    assert maps[names[1]].shape == (2, 2, 2, 3, 16, 9)
    torch.testing.assert_close(maps[names[3]], steps[1].s2p.softmax(-1))
    torch.testing.assert_close(maps[names[2]], sp.p2s_weights(steps[1].p2s))
    for name, dense in maps.dense().items():
        queries, keys = (6, 96) if name.endswith("p2s") else (96, 6)
        assert dense.shape == (2, 2, queries, keys)
        torch.testing.assert_close(dense.sum(-1), torch.ones_like(dense[..., 0]))
    # Superpixel (0, 0) sees the pixels of rows 0 … 7 and columns 0 … 7, and no others.
    seen = maps.dense()[names[0]][0, 0, 0].view(8, 12) > 0
    assert seen[:, :8].all()
    assert not seen[:, 8:].any()


def test_a_constant_image_has_equal_shares_and_zero_padding_leaks_position():
    pixels, superpixels = torch.ones(1, 8, 28, 28), torch.ones(1, 12, 7, 7)
    for position, leaks in (("none", False), ("conv", True)):
        sca = battery.randomize(SuperpixelCrossAttention(8, 12, position=position)).double()
        _, _, steps = sca(pixels.double(), superpixels.double())
        weights = steps[0].s2p.softmax(-1)
        torch.testing.assert_close(weights[:, :, 2:5, 2:5], torch.full_like(
            weights[:, :, 2:5, 2:5], 1 / 9))  # fmt: skip
        ring = (weights[:, :, 1, 1:6] - 1 / 9).abs().max()
        assert (ring > 1e-3) if leaks else (ring < 1e-12)


def test_the_two_directions_have_logits_of_their_own_unless_shared():
    for share_qk in (False, True):
        sca = battery.randomize(SuperpixelCrossAttention(8, 12, share_qk=share_qk))
        _, _, steps = sca(*grids())
        assert torch.equal(steps[0].p2s, steps[0].s2p) is share_qk


# The model


@pytest.mark.parametrize(("name", "count", "millions", "billions"), PUBLISHED)
def test_published_sizes(name, count, millions, billions):
    with torch.device("meta"):
        model = getattr(spformer, f"spformer_{name}")()
        battery.check_parameters(model, count)
        assert round(count / 1e6, 2) == pytest.approx(millions)
        assert round(macs(model, 224) / 1e9, 2) == pytest.approx(billions)


def macs(model, size):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, size, size))
    return counter.get_total_flops() / 2


def test_larger_images_with_larger_patches():
    """S/32 at 448 pixels has the tokens and the cost of S/16; at 224 it is cheaper than DeiT-T."""
    with torch.device("meta"):
        model = spformer.spformer_small_patch32(img_size=448)
        battery.check_parameters(model, 22_352_936)
        assert round(macs(model, 448) / 1e9, 2) == pytest.approx(5.18)
        assert macs(spformer.spformer_small_patch32(), 224) < macs(deit_tiny(), 224)
        assert spformer.spformer_small_patch56().stages[1].add_position.size == (4, 4)
        assert spformer.spformer_tiny(32).grid(448, 224) == (14, 7)


def test_stems():
    with torch.device("meta"):
        for name, widths in (("tiny_patch16_convstem", (16, 32)), ("tiny_patch16", (32,)),
                             ("small_patch32_convstem", (16, 32, 64)), ("small_patch32", (64,)),
                             ("base_patch16_convstem", (48, 96))):  # fmt: skip
            stem = getattr(spformer, f"spformer_{name}")().stem
            convs = [layer for layer in stem if isinstance(layer, nn.Conv2d)]
            assert tuple(conv.out_channels for conv in convs) == widths
            assert all(conv.bias is None for conv in convs)
    batch = small(stem_norm="batch").stem
    assert [type(layer) for layer in batch] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert small(conv_stem=True, stem_stride=4, cell=2).stem(randn(1, 3, 16, 24)).shape[2:] == (
        4,
        6,
    )


@pytest.mark.parametrize("first", ["lift_pool", "pool_lift", "conv"])
def test_first_superpixels(first):
    model = small(first=first)
    pixels = randn(2, 8, 8, 12)
    lift, norm = (next(m for m in model.first if isinstance(m, kind))
                  for kind in (nn.Conv2d, nn.LayerNorm))  # fmt: skip

    def lifted(x):
        return F.gelu(norm(F.conv2d(x, lift.weight, stride=lift.stride)))

    expected = {
        "lift_pool": lambda: F.avg_pool2d(lifted(pixels), 4),
        "pool_lift": lambda: lifted(F.avg_pool2d(pixels, 4)),
        "conv": lambda: lifted(pixels),
    }[first]()
    torch.testing.assert_close(model.first(pixels), expected)
    assert expected.shape == (2, 12, 2, 3)


def test_the_default_is_the_paper_and_lineage_differs_in_three_points():
    assert paper().keys() == lineage().keys()
    defaults = inspect.signature(SPFormer).parameters
    for key, value in paper().items():
        assert defaults[key].default == value
        assert lineage()[key] != value
    x = randn(2, 3, 16, 24).double()
    ours = battery.randomize(small()).double().eval()
    theirs = small(**lineage()).double().eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert (ours(x) - theirs(x)).abs().max() > 1e-6
    again = small(**paper()).double().eval()
    again.load_state_dict(ours.state_dict())
    assert torch.equal(ours(x), again(x))


@pytest.mark.parametrize("preset", [paper, lineage])
def test_stages_are_joined_as_the_preset_says(preset):
    """The whole forward, put together by hand."""
    model = battery.randomize(small(**preset())).double().eval()
    x = randn(2, 3, 16, 24).double()
    logits, info = model(x, return_info=True)
    first, second = model.stages
    pixels = model.stem(x)
    start, superpixels = pixels, model.first(pixels)
    pixels, superpixels, steps = first.sca(pixels, superpixels)
    superpixels = transformed(first, superpixels)
    association, base = (
        (steps[-1].s2p, pixels) if preset is paper else (steps[-1].p2s, start)
    )  # fmt: skip
    between = model.between[0]
    projected = between.norm(F.conv2d(superpixels, between.project.weight))
    parts = rearrange(projected, "b (m d) y x -> b m (y x) d", m=2)
    spread = sp.dense_association(association.softmax(-1)) @ parts
    spread = rearrange(spread, "b m (h w) d -> b (m d) h w", h=8)
    pixels = base + between.scale.gamma[:, None, None] * spread
    _, superpixels, _ = second.sca(pixels, superpixels)
    superpixels = transformed(second, superpixels)
    expected = model.head(model.fc_norm(superpixels.mean((2, 3))))
    torch.testing.assert_close(logits, expected, atol=1e-12, rtol=0)

    assert [(step["stage"], step["iter"]) for step in info] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    last = info[-1]
    assert last["logits"] is last["s2p_logits" if preset is paper else "p2s_logits"]
    assert (last["s2p_logits"] is None) is (preset is lineage)


def transformed(stage, superpixels):
    x = superpixels.flatten(2).mT + stage.add_position.pos_embed
    for block in stage.blocks:
        x = x + block.ls1.gamma * block.attn(block.norm1(x))
        x = x + block.ls2.gamma * block.mlp(block.norm2(x))
    return x.mT.unflatten(2, superpixels.shape[2:])


@pytest.mark.parametrize(
    "options", [{"iters": 1}, {}, lineage(), {"position": "learned", "schedule": "sequential"}]
)
def test_model_passes_the_battery(options, device):
    x = randn(2, 3, 16, 24, device=device)
    sizes = [((x,), (2, 5)), ((randn(1, 3, 32, 16, device=device),), (1, 5))]
    make = lambda: small(**options).to(device)  # noqa: E731
    # The maps of both directions and of the blocks have rows of different lengths, all of sum 1.
    battery.battery(make, x, sizes=sizes, compiles="iters" in options)


def test_frozen_as_patches_the_tokens_are_pooled_patches():
    model = battery.randomize(small()).double().freeze_as_patches().eval()
    x = randn(2, 3, 16, 24).double()
    tokens = model.first(model.stem(x))
    for stage in model.stages:
        tokens = transformed(stage, tokens)
    torch.testing.assert_close(model.forward_features(x), tokens, atol=1e-12, rtol=0)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    model(x).sum().backward()
    optimizer.step()
    scales = [p for name, p in model.named_parameters() if "scale.gamma" in name]
    assert len(scales) == 2 * 2 * 2 + 1
    assert not any(scale.any() for scale in scales)


def test_fresh_models_start_close_to_patches():
    torch.manual_seed(0)
    model = small(sca_init_values=1e-5).double().eval()
    x = randn(2, 3, 16, 24).double()
    before = model(x)
    change = (model.freeze_as_patches()(x) - before).abs().max()
    assert 0 < change < 1e-3


def test_every_parameter_that_trains_gets_a_gradient():
    """Or `DistributedDataParallel` would wait for it: classifier and segmenter, both presets."""
    for preset in (paper(), lineage()):
        for model in (small(**preset), SuperpixelSegmenter(small(**preset), 4)):
            model(randn(2, 3, 16, 24)).square().sum().backward()
            for name, parameter in model.named_parameters():
                assert (parameter.grad is not None) is parameter.requires_grad, name


def test_initialisation():
    torch.manual_seed(0)
    model = SPFormer(img_size=32, embed_dim=96, pixel_dim=48, num_heads=3, depths=(1, 1))
    iteration = model.stages[0].sca.iterations[0]
    for gamma in (iteration.pixel_scale.gamma, iteration.superpixel_scale.gamma,
                  model.between[0].scale.gamma, model.stages[0].blocks[0].ls1.gamma):  # fmt: skip
        assert torch.equal(gamma, torch.full_like(gamma, 1e-5))
    kaiming = lambda conv: math.sqrt(2 / (conv.weight[0, 0].numel() * conv.out_channels))  # noqa: E731
    expected = [
        (iteration.of_pixels.qkv.weight, 0.02), (model.stages[0].add_position.pos_embed, 0.02),
        (model.head.weight, 0.02), (model.stages[0].blocks[0].mlp.fc1.weight, 0.02),
        (model.stem[0].weight, kaiming(model.stem[0])),
        (iteration.of_pixels.position.conv.weight, kaiming(iteration.of_pixels.position.conv)),
    ]  # fmt: skip
    for weight, std in expected:
        assert weight.std().item() == pytest.approx(std, rel=5 * weight.numel() ** -0.5)
    assert not any(module.bias.any() for module in model.modules()
                   if isinstance(module, nn.Linear) and module.bias is not None)  # fmt: skip


def test_drop_path_weight_decay_and_reset():
    model = small(depths=(1, 2), drop_path_rate=0.2, position="learned")
    rates = [block.drop_path1.drop_prob for stage in model.stages for block in stage.blocks]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor([0.0, 0.1, 0.2]))
    groups = create_optimizer_v2(model, "adamw", weight_decay=0.05).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert "stages.0.sca.iterations.0.of_pixels.qkv.weight" in names
    assert not any("pos_embed" in name or "gamma" in name for name in names)
    model.reset_classifier(7)
    assert model(randn(1, 3, 16, 24)).shape == (1, 7)
    model.reset_classifier(0)
    assert model(randn(1, 3, 16, 24)).shape == (1, 12)
    tokens = model.forward_features(randn(1, 3, 16, 24))
    assert torch.equal(model.forward_head(tokens, pre_logits=True), model.forward_head(tokens))


def test_depths_say_where_the_cross_attention_stands():
    with torch.device("meta"):
        model = spformer.spformer_small_patch16()
        assert [len(stage.blocks) for stage in model.stages] == [2, 10]
        once = spformer.spformer_small_patch16(depths=(12,), iters=1, sp_heads=1)
    assert len(once.stages) == 1
    assert len(once.between) == 0
    assert len(once.stages[0].sca.iterations) == 1


def test_mini_has_the_size_of_the_course():
    model = spformer_mini()
    D, d, N = 96, 32, 64
    iteration = d * (2 * d + D) + D * 3 * d + 2 * (2 * d + D) + 2 * 3 * d + 11 * (D + d)
    block = 12 * D**2 + 13 * D + 2 * D
    stem, first, between = 12 * d + 2 * d, d * D + 2 * D, d * D + 3 * d
    head = 2 * D + 8 * D + 8
    expected = stem + first + 2 * (2 * iteration + N * D) + 6 * block + between + head
    battery.check_parameters(model, expected)
    assert model(randn(2, 3, 64, 64)).shape == (2, 8)
    assert model.stages[0].add_position.size == (8, 8)


# Superpixels of an image, and classes of its pixels


def test_to_superpixels_with_a_model_is_its_association():
    model = battery.randomize(small()).eval()
    images = randn(2, 3, 16, 24)
    labels = to_superpixels(images, model)
    _, info = model(images, return_info=True)
    fine = sp.upsample_association(sp.merge_heads(info[-1]["logits"]), 2)
    assert torch.equal(labels, sp.hard_labels(fine)[:, 0])
    assert torch.equal(to_superpixels(images[1], model), labels[1])
    assert to_superpixels(randn(3, 17, 9), model).shape == (17, 9)
    assert model.training is False


@pytest.mark.parametrize("size", [(1, 1), (33, 50), (64, 48)])
def test_to_superpixels_without_a_model_takes_any_size(size, device):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
    labels = to_superpixels(images, side=8, iters=2)
    assert labels.shape == (2, *size)
    assert labels.dtype == torch.int64
    assert labels.max() < math.ceil(size[0] / 8) * math.ceil(size[1] / 8)
    assert torch.equal(to_superpixels(images[0], side=8, iters=2), labels[0])


def test_superpixels_of_an_image_follow_its_edge_and_those_of_a_constant_one_are_the_grid():
    image = torch.zeros(3, 32, 32)
    grid = torch.arange(16).view(4, 4).repeat_interleave(8, 0).repeat_interleave(8, 1)
    assert torch.equal(to_superpixels(image + 0.5, side=8), grid)
    image[:, :, 13:] = 1.0  # no border of a cell
    labels = to_superpixels(image, side=8)
    left, right = labels[:, :13].unique(), labels[:, 13:].unique()
    assert not set(left.tolist()) & set(right.tolist())


@pytest.mark.parametrize("upsample", ["association", "bilinear", "nearest"])
def test_segmenter_classifies_superpixels_and_upsamples(upsample, device):
    make = lambda: SuperpixelSegmenter(small(), 4, upsample).to(device)  # noqa: E731
    model = battery.randomize(make()).double().eval()
    x = randn(2, 3, 16, 24, device=device).double()
    superpixels, info = model.backbone.forward_features(x, return_info=True)
    tokens = rearrange(superpixels, "b c y x -> b (y x) c")
    tokens = F.layer_norm(tokens, (12,), model.norm.weight, model.norm.bias, 1e-6)
    values = F.linear(tokens, model.classify.weight[:, :, 0, 0], model.classify.bias)
    if upsample == "association":
        fine = sp.upsample_association(sp.merge_heads(info[-1]["logits"]), 2)
        expected = sp.dense_association(fine.softmax(-1))[:, 0] @ values
        expected = rearrange(expected, "b (h w) k -> b k h w", h=16)
    else:
        values = rearrange(values, "b (y x) k -> b k y x", y=2)
        expected = F.interpolate(values, size=(16, 24), mode=upsample)
    torch.testing.assert_close(model(x), expected)
    battery.check_autocast(make(), x)
    battery.check_state_dict_round_trip(make, x)


def test_any_size_fits_after_the_border_is_continued():
    model, x = small().eval(), randn(2, 3, 17, 30)
    whole = to_whole_cells(x, model.patch_size)
    assert whole.shape == (2, 3, 24, 32)
    assert torch.equal(whole[:, :, :17, :30], x)
    assert torch.equal(whole[:, :, 17:, :30], x[:, :, -1:].expand(-1, -1, 7, -1))
    assert torch.equal(whole[:, :, :17, 30:], x[:, :, :, -1:].expand(-1, -1, -1, 2))
    assert to_whole_cells(whole, 8).shape == whole.shape
    assert torch.equal(to_superpixels(x, model), to_superpixels(whole, model)[:, :17, :30])


def test_segmenter_trains_every_part_from_masks():
    """A half-plane whose edge cuts the cells: the loss falls, and the stem hears of it."""
    torch.manual_seed(0)
    model = SuperpixelSegmenter(small(), 2)
    x = randn(4, 3, 16, 24)
    masks = torch.zeros(4, 16, 24, dtype=torch.long)
    for i, edge in enumerate((5, 9, 13, 19)):
        masks[i, :, edge:] = 1
        x[i, 0, :, edge:] += 3.0
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        losses.append(F.cross_entropy(model(x), masks))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert model.backbone.stem[0].weight.grad.abs().max() > 0
    assert losses[-1] < 0.7 * losses[0]


def test_bad_input():
    battery.check_errors([
        (lambda: small(assoc="q"), "assoc='q': expected one of s2p, p2s"),
        (lambda: small(pixel_base="none"), "pixel_base='none': expected one of updated"),
        (lambda: small(last_s2p=False), "last_s2p=False: expected True with assoc='s2p'"),
        (lambda: small(first="learned"), "first='learned': expected one of lift_pool"),
        (lambda: small(stem_norm="group"), "stem_norm='group': expected one of layer, batch"),
        (lambda: small(img_size=20), "image size (20, 20): expected multiples of stem_"),
        (lambda: small(conv_stem=True, stem_stride=3, img_size=24), "stem_stride=3, p"),
        (lambda: small(impl="x"), "impl='x': expected one of"),
        (lambda: small()(randn(2, 3, 16, 20)), "image size (16, 20): expected multiples"),
        (lambda: small()(randn(3, 16, 24)), "x (3, 16, 24): expected (B, 3, H, W)"),
        (lambda: spformer.spformer_small(14), "patch_size=14: expected 16, 32 or 56"),
        (lambda: SuperpixelSegmenter(small(), 2, "cubic"), "upsample='cubic': expected one of"),
        (lambda: SuperpixelSegmenter(small(), 2, mode="x"), "mode='x': expected one of cell"),
        (lambda: to_superpixels(randn(16, 24)), "image (16, 24), torch.float32: expected (3, H"),
        (lambda: to_superpixels(randn(3, 16, 24).byte()), "torch.uint8: expected (3, H, W) or (B"),
        (lambda: to_superpixels(randn(3, 8, 8), small(in_chans=1)), "expected (1, H, W) or (B, 1"),
        (lambda: SuperpixelSegmenter(small(), 2)(randn(3, 16, 24)), "x (3, 16, 24): expected (B"),
    ])  # fmt: skip
