"""The vision transformer against timm and torchvision, its counted costs, and its registration."""

import math

import battery
import pytest
import timm
import torch
import torchvision
from timm.optim import create_optimizer_v2
from torch.utils.flop_counter import FlopCounterMode

from attnlab.attention import (
    MultiHeadAttention,
    VisionTransformer,
    deit_base,
    deit_small,
    deit_tiny,
    sincos_pos_embed,
    vit_mini,
)
from attnlab.layers import LayerNorm2d

# DeiT, Table 1: millions of parameters, and with the distillation token; spec 2.3 for exact counts.
PUBLISHED = [
    (deit_tiny, 192, 5_717_416, 5_910_800, 1.2537e9),
    (deit_small, 384, 22_050_664, 22_436_432, 4.5989e9),
    (deit_base, 768, 86_567_656, 87_338_192, 17.5638e9),
]

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def small(**kwargs):
    return VisionTransformer(**SMALL | {"num_classes": 5} | kwargs)


def timm_vit(distilled=False, **kwargs):
    cls = (
        timm.models.deit.VisionTransformerDistilled if distilled else timm.models.VisionTransformer
    )
    return cls(**SMALL | {"num_classes": 5} | kwargs)


def images(*size, batch=2, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 3, *(size or (32, 32)))
    return torch.randn(shape, generator=generator).to(device)


@pytest.mark.parametrize("options", [
    {},
    {"distilled": True},
    {"global_pool": "avg"},
    {"global_pool": "avg", "class_token": False},
    {"img_size": (32, 16), "patch_size": (8, 4)},
    {"pos_embed": "none", "qkv_bias": False, "mlp_ratio": 2.0},
    {"num_classes": 0},
])  # fmt: skip
@pytest.mark.parametrize("training", [False, True])
def test_equal_to_timm_with_its_state_dict(options, training, device):
    theirs = battery.randomize(timm_vit(**options)).to(device).train(training)
    ours = small(**options).to(device).train(training)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = images(*((32, 16) if "img_size" in options else ()), device=device)
    battery.check_matches(ours, theirs, x)
    battery.check_matches(ours.forward_features, theirs.forward_features, x)
    for pre_logits in (False, True):
        tokens = ours.forward_features(x.double()).detach()
        torch.testing.assert_close(
            ours.forward_head(tokens, pre_logits), theirs.forward_head(tokens, pre_logits)
        )


def test_equal_to_the_gradients_of_timm():
    theirs = battery.randomize(timm_vit()).double()
    ours = small().double()
    ours.load_state_dict(theirs.state_dict())
    for model in (ours, theirs):
        model(images().double()).logsumexp(1).sum().backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-9, rtol=0, msg=name)


@pytest.mark.parametrize(("name", "distilled"), [
    ("deit_tiny_patch16_224", False), ("deit_tiny_distilled_patch16_224", True),
])  # fmt: skip
def test_the_published_size_is_equal_to_timm(name, distilled):
    """Randomised parameters in float64: an eps of 1e-5 in place of 1e-6 would be 1e-6 away."""
    theirs = battery.randomize(timm.create_model(name)).eval().double()
    ours = deit_tiny(distilled=distilled).eval().double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = images(224, 224, batch=1).double()
    with torch.no_grad():
        expected = theirs(x)
        torch.testing.assert_close(ours(x), expected, atol=1e-9, rtol=0)
        for module in ours.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.eps = 1e-5
        assert (ours(x) - expected).abs().max() > 1e-8, "the tolerance does not see the eps"


def test_another_size_than_img_size_is_equal_to_timm(device):
    for options in ({}, {"distilled": True}, {"img_size": (32, 16), "global_pool": "avg"}):
        theirs = battery.randomize(timm_vit(dynamic_img_size=True, **options)).to(device)
        ours = small(**options).to(device)
        ours.load_state_dict(theirs.state_dict())
        for size in ((24, 40), (64, 64), (32, 16)):
            battery.check_matches(ours, theirs, images(*size, device=device))


def test_a_torchvision_state_dict_loads_strictly(device):
    theirs = torchvision.models.VisionTransformer(32, 8, 2, 3, 24, 96, num_classes=5)
    theirs = battery.randomize(theirs).to(device).eval()
    state = theirs.state_dict()
    ours = small().to(device).eval()
    ours.load_state_dict(state, strict=True)
    assert "conv_proj.weight" in state, "the caller's state dict was changed"
    battery.check_matches(ours, theirs, images(device=device))

    wrapped = torch.nn.ModuleDict({"backbone": small()})
    wrapped.load_state_dict(
        {f"backbone.{name}": value for name, value in state.items()}, strict=True
    )
    assert torch.equal(wrapped["backbone"].head.weight, theirs.heads.head.weight)


def test_vit_b_16_of_torchvision_has_the_names_and_shapes_of_deit_base():
    with torch.device("meta"):
        state = torchvision.models.vit_b_16().state_dict()
        deit_base().load_state_dict(state, strict=True, assign=True)


@pytest.mark.parametrize(("make", "dim", "count", "distilled", "macs"), PUBLISHED)
def test_published_sizes(make, dim, count, distilled, macs):
    """Exact parameters; multiply-accumulates equal to the formula, the counter and the paper."""
    with torch.device("meta"):
        battery.check_parameters(make(), count)
        battery.check_parameters(make(distilled=True), distilled)
        patches, tokens, layers = 196, 197, 12
        formula = (
            patches * 768 * dim
            + layers * (12 * tokens * dim**2 + 2 * tokens**2 * dim)
            + dim * 1000
        )  # fmt: skip
        assert formula == pytest.approx(macs, rel=1e-4)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            make(impl="explicit")(torch.empty(1, 3, 224, 224))
    assert counter.get_total_flops() == 2 * formula


def test_the_fused_path_is_counted_the_same():
    counts = []
    for impl in ("explicit", "fused"):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            vit_mini(impl=impl)(images(64, 64))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def test_deit_base_at_384_pixels():
    with torch.device("meta"):
        battery.check_parameters(deit_base(img_size=384), 86_859_496)


def test_vit_mini_has_the_size_of_the_course():
    model = vit_mini()
    D, N = 96, 64
    expected = (192 * D + D) + D + (N + 1) * D + 6 * (12 * D**2 + 13 * D) + 2 * D + 8 * D + 8
    battery.check_parameters(model, expected)
    assert model(images(64, 64)).shape == (2, 8)
    assert model.blocks[0].attn.num_heads == 3


def test_initialisation_has_the_statistics_of_timm():
    torch.manual_seed(0)
    options = {"embed_dim": 96, "num_classes": 100, "distilled": True}
    ours, theirs = small(**options).state_dict(), timm_vit(**options).state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        std = theirs[name].std().item()
        few = 4 * value.numel() ** -0.5  # four standard errors
        assert value.std().item() == pytest.approx(std, rel=few, abs=0), name
        mean = theirs[name].mean().item()
        assert value.mean().item() == pytest.approx(mean, abs=2 * few * std + 1e-12), name


@pytest.mark.parametrize("options", [
    {}, {"distilled": True}, {"global_pool": "avg", "class_token": False}, {"pos_embed": "sincos"},
])  # fmt: skip
def test_battery(options, device):
    sizes = [
        ((images(16, 40, batch=1, device=device),), (1, 5)),
        ((images(32, 32, device=device),), (2, 5)),
    ]
    make = lambda: small(depth=1, **options).to(device)  # noqa: E731
    battery.battery(make, images(device=device), sizes=sizes, compiles=not options)


COMPILED = {
    "ViT": lambda: (small(depth=1), images()),
    "ViT, explicit": lambda: (small(depth=1, impl="explicit"), images()),
    "attention, blockwise": lambda: (MultiHeadAttention(16, 2, impl="blockwise"), tokens()),
    "cross-attention": lambda: (MultiHeadAttention(16, 2), tokens(), tokens(count=5)),
    "LayerNorm2d": lambda: (LayerNorm2d(3), images()),
}


@pytest.mark.needs("compiler")
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_for_real(name):
    module, *inputs = COMPILED[name]()
    battery.check_compiles(module, *inputs, backend="inductor", dtype=torch.float32, tol=1e-3)


def tokens(count: int = 9) -> torch.Tensor:
    return torch.randn(2, count, 16, generator=torch.Generator().manual_seed(count))


def test_without_positions_the_order_of_patches_does_not_matter_and_with_them_it_does():
    x = images().double()
    rows = x.unfold(2, 8, 8).unfold(3, 8, 8)  # (B, 3, 4, 4, 8, 8)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(0))
    assert order.tolist() != [0, 1, 2, 3]
    shuffled = rows[:, :, order].permute(0, 1, 2, 4, 3, 5).reshape_as(x)
    without = battery.randomize(small(pos_embed="none")).double()
    torch.testing.assert_close(without(shuffled), without(x), atol=1e-9, rtol=0)
    for kind in ("learn", "sincos"):
        model = battery.randomize(small(pos_embed=kind)).double()
        assert (model(shuffled) - model(x)).abs().max() > 1e-3


def test_fixed_positions_are_no_parameters_and_are_zero_for_the_class_token():
    model = small(pos_embed="sincos")
    assert "pos_embed" not in model.state_dict()
    assert not model.pos_embed[:, 0].any()
    assert torch.equal(model.pos_embed[0, 1:], sincos_pos_embed(4, 24))


def test_distilled_training_returns_both_logits():
    model = small(distilled=True)
    model.distilled_training = True
    cls, dist = model.train()(images())
    torch.testing.assert_close(model.eval()(images()), (cls + dist) / 2)
    model.distilled_training = False
    torch.testing.assert_close(model.train()(images()), (cls + dist) / 2)


def test_drop_path_grows_linearly_and_acts_in_training_only():
    model = small(depth=3, drop_path_rate=0.2)
    rates = [(block.drop_path1.drop_prob, block.drop_path2.drop_prob) for block in model.blocks]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor([[0.0] * 2, [0.1] * 2, [0.2] * 2]))
    torch.manual_seed(0)
    x = images(batch=16)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_dropout_rates_reach_their_places():
    model = small(drop_rate=0.1, proj_drop_rate=0.2, attn_drop_rate=0.3)
    block = model.blocks[0]
    rates = [model.head_drop.p, block.attn.proj_drop.p, block.mlp.drop1.p, block.attn.attn_drop.p]
    assert rates == [0.1, 0.2, 0.2, 0.3]


def test_reset_classifier():
    model = small(distilled=True).double()
    model.reset_classifier(7)
    assert (model.num_classes, model.head.out_features, model.head_dist.out_features) == (7, 7, 7)
    assert model(images().double()).shape == (2, 7)
    model.reset_classifier(0)
    assert model(images().double()).shape == (2, 24)
    model = small()
    model.reset_classifier(3, global_pool="avg")
    tokens = model.forward_features(images())
    expected = model.head(tokens[:, 1:].mean(1))
    torch.testing.assert_close(model.forward_head(tokens), expected)


def test_timm_sorts_the_parameters_for_weight_decay():
    model = small(distilled=True)
    assert model.no_weight_decay() == {"pos_embed", "cls_token", "dist_token"}
    groups = create_optimizer_v2(model, "adamw", weight_decay=0.05).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert "blocks.0.attn.qkv.weight" in names
    assert all(name.endswith("weight") and "norm" not in name for name in names)


@pytest.mark.parametrize("name", ["deit_tiny", "deit_small", "deit_base", "vit_mini"])
def test_timm_creates_our_models(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=3, drop_path_rate=0.1, img_size=(32, 64))
    assert type(model) is VisionTransformer
    assert model.head.out_features == 3
    assert math.prod(model.patch_embed.grid_size) in (8, 32)


def test_the_factories_of_timm_are_left_alone():
    with torch.device("meta"):
        model = timm.create_model("deit_tiny_patch16_224")
    assert type(model).__module__.startswith("timm.")


def test_bad_input():
    battery.check_errors([
        (lambda: small(pos_embed="rope"), "pos_embed='rope': expected learn, sincos or none"),
        (lambda: small(global_pool="max"), "global_pool='max': expected token or avg"),
        (lambda: small(global_pool="avg", distilled=True), "expected token (with distilled=True)"),
        (lambda: small(class_token=False), "class_token=False: expected True with global_pool='to"),
        (lambda: small(class_token=False, distilled=True), "class_token=False: expected True"),
        (lambda: small(embed_dim=25), "dim=25: expected a multiple of num_heads=3"),
        (lambda: small(impl="x"), "impl='x': expected one of auto, explicit, fused, blockwise"),
        (lambda: small(img_size=30), "image size (30, 30): expected multiples of patch_size"),
        (lambda: small(pos_embed="sincos", embed_dim=27), "dim=27: expected a positive multiple"),
        (lambda: small()(images(30, 32)), "image size (30, 32): expected multiples"),
        (lambda: small()(images()[0]), "x (3, 32, 32): expected (B, 3, H, W)"),
        (lambda: small(distilled=True).reset_classifier(3, "avg"), "global_pool='avg': expected"),
        (lambda: timm.create_model("vit_mini", pretrained=True), "no weights for vit_mini"),
    ])  # fmt: skip
