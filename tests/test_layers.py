"""The shared layers against timm's, with shared weights, and the position embeddings."""

import battery
import pytest
import timm.layers
import torch
from torch import nn

from attnlab import layers
from attnlab.positions import resize_pos_embed, sincos_pos_embed


def both(ours, theirs):
    """The pair with timm's randomised weights; the names must agree."""
    battery.randomize(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours.double(), theirs.double()


@pytest.mark.parametrize(("ours", "theirs", "shape"), [
    (layers.Mlp(6), timm.layers.Mlp(6), (2, 5, 6)),
    (layers.Mlp(6, 24, 3), timm.layers.Mlp(6, 24, 3), (2, 5, 6)),
    (layers.Mlp(6, act_layer=nn.ReLU), timm.layers.Mlp(6, act_layer=nn.ReLU), (2, 3, 4, 6)),
    (layers.LayerScale(6), timm.layers.LayerScale(6), (2, 5, 6)),
    (layers.LayerNorm2d(6), timm.layers.LayerNorm2d(6), (2, 6, 3, 4)),
    (layers.LayerNorm(6), timm.layers.LayerNorm(6, eps=1e-6), (2, 5, 6)),
    (layers.PatchEmbed((8, 12), 4, 2, 6), timm.layers.PatchEmbed((8, 12), 4, 2, 6), (2, 2, 8, 12)),
    (
        layers.PatchEmbed((8, 12), (4, 2), 2, 6),
        timm.layers.PatchEmbed((8, 12), (4, 2), 2, 6),
        (2, 2, 8, 12),
    ),
])  # fmt: skip
def test_equal_to_timm_with_shared_weights(ours, theirs, shape, device):
    ours, theirs = both(ours, theirs)
    battery.check_matches(ours.to(device), theirs.to(device), torch.randn(shape, device=device))


def test_small_inputs_show_the_eps():
    # Entries near 1e-3 make the variance as small as eps: a wrong eps changes everything.
    x = 1e-3 * torch.randn(2, 6, 3, 4, dtype=torch.float64)
    ours, theirs = both(layers.LayerNorm2d(6), timm.layers.LayerNorm2d(6))
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-9, rtol=0)
    assert layers.LayerNorm(6).eps == 1e-6


def test_initial_values_are_those_of_timm():
    assert torch.equal(layers.LayerScale(6).gamma, timm.layers.LayerScale(6).gamma)
    assert torch.equal(layers.LayerScale(6, 0.1).gamma, torch.full((6,), 0.1))
    torch.manual_seed(0)
    ours = layers.Mlp(6, 24).state_dict()
    torch.manual_seed(0)
    for name, value in timm.layers.Mlp(6, 24).state_dict().items():
        assert torch.equal(ours[name], value)


def test_mlp_drops_after_both_layers():
    assert [m.p for m in layers.Mlp(6, drop=0.3).modules() if isinstance(m, nn.Dropout)] == [
        0.3
    ] * 2


def test_drop_path_drops_whole_samples_and_keeps_the_mean(device):
    torch.manual_seed(0)
    layer = layers.DropPath(0.25).to(device)
    x = torch.ones(20_000, 2, 3, device=device)
    out = layer(x)
    kept = out[:, 0, 0] != 0
    assert torch.equal(out, kept[:, None, None] * x / 0.75)
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.02)
    assert layer.eval()(x) is x
    assert layers.DropPath()(x) is x
    assert not layers.DropPath(1.0)(x).any()


def test_a_patch_embedding_is_a_linear_map_of_each_patch(device):
    embed = layers.PatchEmbed((8, 12), 4, 3, 5).to(device)
    assert embed.grid_size == (2, 3)
    x = torch.randn(2, 3, 8, 12, device=device)
    patches = nn.functional.unfold(x, 4, stride=4).mT  # (B, N, 3·4·4), row-major
    expected = nn.functional.linear(patches, embed.proj.weight.flatten(1), embed.proj.bias)
    torch.testing.assert_close(embed(x), expected)
    assert embed(x[..., :4]).shape == (2, 2, 5)


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize(("old", "new"), [((4, 4), (6, 5)), ((4, 6), (3, 2)), ((4, 6), (6, 4))])
def test_resizing_is_that_of_timm(prefix, old, new, device):
    tokens = prefix + old[0] * old[1]
    pos_embed = torch.randn(1, tokens, 8, device=device)
    for antialias in (True, False):
        ours = resize_pos_embed(pos_embed, new, old, prefix, antialias)
        theirs = timm.layers.resample_abs_pos_embed(
            pos_embed, new, old, prefix, "bicubic", antialias
        )
        assert torch.equal(ours, theirs)
    assert torch.equal(ours[:, :prefix], pos_embed[:, :prefix])
    assert resize_pos_embed(pos_embed, old, old, prefix) is pos_embed


def test_resizing_a_square_needs_no_old_size_and_keeps_constants_and_dtype():
    pos_embed = torch.randn(1, 17, 8)
    assert torch.equal(
        resize_pos_embed(pos_embed, (2, 3)), resize_pos_embed(pos_embed, (2, 3), (4, 4))
    )
    constant = torch.ones(1, 17, 8, dtype=torch.bfloat16)
    resized = resize_pos_embed(constant, (7, 5))
    torch.testing.assert_close(resized, torch.ones(1, 36, 8, dtype=torch.bfloat16))


def test_resizing_lets_the_gradient_through():
    pos_embed = torch.randn(1, 17, 8, requires_grad=True)
    resize_pos_embed(pos_embed, (3, 3)).square().sum().backward()
    assert (pos_embed.grad != 0).all()


def test_sines_and_cosines_are_those_of_timm():
    for grid in ((3, 5), (4, 4)):
        ours = sincos_pos_embed(grid, 16)
        theirs = timm.layers.build_sincos2d_pos_embed(grid, 16)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert torch.equal(sincos_pos_embed(4, 16), ours)


def test_sines_and_cosines_know_only_offsets():
    pos_embed = sincos_pos_embed((5, 6), 16)
    torch.testing.assert_close(pos_embed.square().sum(-1), torch.full((30,), 8.0))
    products = (pos_embed @ pos_embed.T).view(5, 6, 5, 6)
    torch.testing.assert_close(products[0, 0, 2, 3], products[2, 1, 4, 4])
    torch.testing.assert_close(products[0, 3, 2, 0], products[2, 5, 4, 2])
    assert products[0, 0, 0, 1] > products[0, 0, 0, 2], "a near token is more similar"


def test_bad_input():
    embed = layers.PatchEmbed(8, 4, 3, 5)
    pos_embed = torch.zeros(1, 17, 8)
    battery.check_errors([
        (lambda: layers.DropPath(1.5), "drop_prob=1.5: expected a probability in [0, 1]"),
        (lambda: layers.PatchEmbed(9, 4), "image size (9, 9): expected multiples of patch"),
        (lambda: embed(torch.zeros(2, 3, 8, 6)), "image size (8, 6): expected multiples"),
        (lambda: embed(torch.zeros(2, 1, 8, 8)), "x (2, 1, 8, 8): expected (B, 3, H, W)"),
        (lambda: embed(torch.zeros(3, 8, 8)), "x (3, 8, 8): expected (B, 3, H, W)"),
        (lambda: sincos_pos_embed(4, 6), "dim=6: expected a positive multiple of 4"),
        (lambda: sincos_pos_embed(4, 0), "dim=0: expected a positive multiple of 4"),
        (lambda: resize_pos_embed(pos_embed, (2, 2), (3, 3)), "holds 16 grid tokens: expected o"),
        (lambda: resize_pos_embed(pos_embed, (2, 2), None, 0), "17 grid tokens: expected a square"),
    ])  # fmt: skip
