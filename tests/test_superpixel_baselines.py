"""SSN, Super Token attention and Context Clusters against loops, dense matrices, scikit-image."""

import math
from itertools import product

import battery
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from attnlab import superpixel as sp
from attnlab import superpixel_baselines as baselines
from attnlab.superpixel_baselines import ContextCluster, SuperTokenAttention, ssn, ssn_loss


def randn(*shape, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)


def near(i, j, side, Sh, Sw):
    """The superpixels (y, x) around the pixel (i, j)."""
    around = ((i // side + dy, j // side + dx) for dy, dx in product((-1, 0, 1), repeat=2))
    return [(y, x) for y, x in around if 0 <= y < Sh and 0 <= x < Sw]


def loop_ssn(features, side, iters, hard=False):
    """One image `(C, h, w)`: the dense association `(h, w, Sh, Sw)` and the centers."""
    h, w = features.shape[1:]
    Sh, Sw = h // side, w // side
    centers = F.avg_pool2d(features[None], side)[0]
    for _ in range(iters):
        weights = torch.zeros(h, w, Sh, Sw, dtype=features.dtype)
        for i, j in product(range(h), range(w)):
            places = near(i, j, side, Sh, Sw)
            squares = torch.stack([
                (features[:, i, j] - centers[:, y, x]).square().sum() for y, x in places
            ])  # fmt: skip
            share = F.one_hot((-squares).argmax(), len(places)) if hard else (-squares).softmax(0)
            for (y, x), value in zip(places, share, strict=True):
                weights[i, j, y, x] = value
        sums = torch.einsum("i j y x, c i j -> c y x", weights, features)
        total = weights.sum((0, 1))
        centers = torch.where(total > 0, sums / total, centers)
    return weights, centers


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize(("Sh", "Sw", "side"), [(2, 3, 3), (1, 1, 2), (1, 4, 2)])
def test_ssn_equals_the_loop(Sh, Sw, side, hard):
    features = randn(2, 3, Sh * side, Sw * side)
    for iters in (1, 3):
        logits, centers = ssn(features, side, iters, hard)
        dense = sp.dense_association(logits.softmax(-1))[:, 0]
        for b in range(2):
            weights, expected = loop_ssn(features[b], side, iters, hard)
            torch.testing.assert_close(dense[b], rearrange(weights, "i j y x -> (i j) (y x)"))
            torch.testing.assert_close(centers[b], expected)


def test_the_gradient_of_ssn_is_that_of_the_loop():
    battery.check_matches(
        lambda x: ssn(x, 2, 2)[1], lambda x: loop_ssn(x[0], 2, 2)[1][None], randn(1, 2, 4, 6)
    )


def test_a_softmax_of_distances_is_not_one_of_dot_products_without_the_norm_of_the_keys():
    pixels, centers = randn(1, 1, 3, 4, 4, 5), randn(1, 1, 3, 4, 5, seed=1)
    direct = (pixels[..., None, :] - sp.gather9(centers)[..., None, :, :]).square().sum(-1)
    expected = sp.mask_absent(-direct).softmax(-1)
    got = baselines._distance_logits(pixels, centers).softmax(-1)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    norms = sp.gather9(centers).square().sum(-1)[..., None, :]
    dots = sp.local_logits(pixels, centers, scale=2.0)
    torch.testing.assert_close((dots - norms).softmax(-1), expected, atol=1e-12, rtol=0)
    assert (dots.softmax(-1) - expected).abs().max() > 0.1


def test_cold_soft_assignment_tends_to_the_hard_one():
    features = randn(1, 3, 12, 12)
    logits, _ = ssn(features, 4, iters=1)
    top = logits.topk(2).values
    clear = top[..., 0] - top[..., 1] > 0.1
    hard, _ = ssn(features, 4, iters=1, hard=True)
    cold, _ = ssn(20 * features, 4, iters=1)
    torch.testing.assert_close(cold.softmax(-1)[clear], hard.softmax(-1)[clear], atol=1e-9, rtol=0)


def test_large_features_lose_no_digits():
    features = randn(1, 3, 8, 8)
    shifted, _ = ssn((features + 1000).float(), 4, iters=2)
    exact, _ = ssn(features, 4, iters=2)
    torch.testing.assert_close(shifted.softmax(-1).double(), exact.softmax(-1), atol=2e-3, rtol=0)


def test_lab_equals_scikit_image(device):
    color = pytest.importorskip("skimage.color")
    images = torch.rand(2, 3, 7, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images[0, :, 0, :3] = torch.eye(3)  # primaries
    images[0, :, 1, 0], images[0, :, 1, 1], images[0, :, 1, 2] = 0.0, 1.0, 0.02
    expected = torch.from_numpy(color.rgb2lab(rearrange(images, "b c h w -> b h w c").numpy()))
    got = baselines.rgb_to_lab(images.to(device)).cpu()
    torch.testing.assert_close(got, rearrange(expected, "b h w c -> b c h w"), atol=2e-2, rtol=0)
    images.requires_grad_()
    baselines.rgb_to_lab(images).sum().backward()
    assert images.grad.isfinite().all()


def test_features_of_color_and_place():
    images = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    features = baselines.lab_xy(images, 4, color=0.5, position=3.0)
    torch.testing.assert_close(features[:, :3], 0.5 * baselines.rgb_to_lab(images))
    assert features[0, 3, 5, 7] == pytest.approx(3.0 * 5 / 4)
    assert features[1, 4, 5, 7] == pytest.approx(3.0 * 7 / 4)


def test_the_loss_of_ssn_equals_its_definition():
    features, side = randn(2, 3, 6, 8), 2
    labels = torch.randint(4, (2, 6, 8), generator=torch.Generator().manual_seed(0))
    logits, _ = ssn(features, side, iters=2)
    dense = sp.dense_association(logits.softmax(-1))[:, 0]
    hard = sp.hard_labels(logits).flatten(1)
    rebuilt, squares = [], []
    for b in range(2):
        columns = dense[b] / dense[b].sum(0)
        share = dense[b] @ (columns.T @ F.one_hot(labels[b].flatten(), 4).double())
        rebuilt += [-share[i, label].log() for i, label in enumerate(labels[b].flatten())]
        places = torch.cartesian_prod(torch.arange(6), torch.arange(8)).double()
        means = columns.T @ places
        squares += [(places[i] - means[p]).square().sum() for i, p in enumerate(hard[b])]
    expected = sum(rebuilt) / 96 + 0.01 * sum(squares) / 96
    torch.testing.assert_close(ssn_loss(logits, labels, 4, compactness=0.01), expected)


def test_ssn_learns_labels_that_color_does_not_show():
    """Its loss goes down with a linear map of the features: it is differentiable throughout."""
    images = randn(2, 4, 16, 16)
    labels = (F.avg_pool2d(images[:, 3:], 9, 1, 4) > 0).long()[:, 0]
    embed = torch.nn.Conv2d(4, 4, 1, dtype=torch.float64)
    optimizer = torch.optim.Adam(embed.parameters(), 0.05)
    losses = []
    for _ in range(12):
        logits, _ = ssn(embed(images), 4, iters=2)
        losses.append(ssn_loss(logits, labels, 2))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.95 * losses[0]


def dense_super_tokens(module, x):
    """Super Token attention with its whole association matrix."""
    Sh, Sw = x.shape[2] // module.side, x.shape[3] // module.side
    pixels = rearrange(x, "b c h w -> b (h w) c")
    tokens = rearrange(F.avg_pool2d(x, module.side), "b c y x -> b (y x) c")
    mask = torch.zeros(x.shape[2], x.shape[3], Sh, Sw, dtype=torch.bool)
    for i, j in product(range(x.shape[2]), range(x.shape[3])):
        for y, u in near(i, j, module.side, Sh, Sw):
            mask[i, j, y, u] = True
    mask = rearrange(mask, "i j y x -> (i j) (y x)").to(x.device)
    for step in range(module.iters):
        scores = (pixels @ tokens.mT / math.sqrt(x.shape[1])).masked_fill(~mask, -math.inf)
        weights = scores.softmax(-1).detach()
        last = step + 1 == module.iters
        tokens = weights.mT @ (pixels if last else pixels.detach()) / weights.sum(1)[..., None]
    return rearrange(weights @ module.attn(tokens), "b (h w) c -> b c h w", h=x.shape[2])


@pytest.mark.parametrize("iters", [1, 3])
@pytest.mark.parametrize("size", [(6, 8), (2, 2), (2, 8)])
def test_super_tokens_equal_the_dense_form(size, iters, device):
    module = battery.randomize(SuperTokenAttention(8, 2, num_heads=2, iters=iters)).to(device)
    x = randn(2, 8, *size, device=device)
    battery.check_matches(module, lambda x: dense_super_tokens(module, x), x)


def test_super_tokens_pass_the_battery(device):
    x = randn(2, 8, 6, 8, device=device).float()
    battery.battery(
        lambda: SuperTokenAttention(8, 2, num_heads=2, iters=2).to(device),
        x,
        parameters=4 * 8**2 + 4 * 8,
        sizes=[((x[:1],), (1, 8, 6, 8)), ((x[:, :, :4, :4],), (2, 8, 4, 4))],
        errors=[
            (lambda: SuperTokenAttention(8, 2, 3), "dim=8: expected a multiple of num_heads=3"),
            (lambda: SuperTokenAttention(8, 2, iters=0), "iters=0: expected at least 1"),
            (lambda: SuperTokenAttention(8, 2)(x[:, :4].cpu()), "expected (B, 8, H, W)"),
            (lambda: SuperTokenAttention(8, 4)(x.cpu()), "multiples of side=4"),
        ],
    )


def loop_context_cluster(module, x):
    """Context Clusters, one region, head and point at a time."""
    features, values = module.features(x), module.values(x)
    M, R, c = module.num_heads, module.regions, module.centers
    h, w, d = x.shape[2] // R, x.shape[3] // R, features.shape[1] // M
    out = torch.zeros_like(features)
    for b, m, y, u in product(range(len(x)), range(M), range(R), range(R)):
        place = b, slice(m * d, (m + 1) * d), slice(y * h, (y + 1) * h), slice(u * w, (u + 1) * w)
        points, contents = features[place], values[place]
        centers = F.adaptive_avg_pool2d(points, c).flatten(1)
        clusters = F.adaptive_avg_pool2d(contents, c).flatten(1)
        sums, total, joined = [clusters[:, k] for k in range(c * c)], [1.0] * (c * c), {}
        for i, j in product(range(h), range(w)):
            cosines = [F.cosine_similarity(points[:, i, j], centers[:, k], 0) for k in range(c * c)]
            k = max(range(c * c), key=lambda k: module.alpha * cosines[k])
            weight = torch.sigmoid(module.beta + module.alpha * cosines[k])
            sums[k] = sums[k] + weight * contents[:, i, j]
            total[k] = total[k] + (1.0 if module.divide_by == "count" else weight)
            joined[i, j] = k, weight
        region = torch.stack([
            torch.stack([joined[i, j][1] * sums[joined[i, j][0]] / total[joined[i, j][0]]
                         for j in range(w)], -1)
            for i in range(h)
        ], -2)  # fmt: skip
        out[place] = region
    return module.proj(out)


@pytest.mark.parametrize("divide_by", ["count", "similarity"])
@pytest.mark.parametrize(("regions", "size"), [(1, (4, 6)), (2, (4, 8))])
def test_context_clusters_equal_the_loop(regions, size, divide_by, device):
    module = ContextCluster(3, num_heads=2, head_dim=4, regions=regions, divide_by=divide_by)
    module = battery.randomize(module).to(device)
    reference = lambda x: loop_context_cluster(module, x)  # noqa: E731
    battery.check_matches(module, reference, randn(2, 3, *size, device=device))


def test_context_clusters_pass_the_battery(device):
    x = randn(2, 6, 8, 4, device=device).float()
    make = lambda: ContextCluster(6, num_heads=2, head_dim=4, regions=2).to(device)  # noqa: E731
    battery.battery(
        make,
        x,
        impls=("explicit",),
        parameters=2 * (6 * 8 + 8) + 2 + 8 * 6 + 6,
        sizes=[((x[:1],), (1, 6, 8, 4)), ((x[:, :, :4],), (2, 6, 4, 4))],
        rows_axis=None,
        grid=(8, 4),
        errors=[
            (lambda: ContextCluster(6, divide_by="sum"), "divide_by='sum': expected count or sim"),
            (lambda: make().cpu()(x[:, :4].cpu()), "x (2, 4, 8, 4): expected (B, 6, H, W)"),
            (lambda: make().cpu()(x[:, :, :5].cpu()), "multiples of regions=2"),
        ],
    )


def test_regions_of_context_clusters_do_not_see_each_other():
    module = battery.randomize(ContextCluster(3, 2, 4, regions=2)).double()
    x = randn(1, 3, 8, 8)
    other = x.clone()
    other[:, :, 0, 3] += 1.0  # the last column of the left regions
    moved = (module(other) - module(x))[0].abs().sum(0) > 0
    assert moved[:4, :4].any()
    assert not moved[:, 4:].any()
    assert not moved[4:].any()


def test_dense_maps_of_context_clusters_have_one_center_a_point():
    import attnlab

    module = ContextCluster(3, 2, 4, regions=2)
    with attnlab.record(module) as maps:
        module(randn(1, 3, 8, 4).float())
    dense = maps.dense((8, 4))[""]
    assert dense.shape == (1, 2, 32, 16)
    assert ((dense > 0).sum(-1) == 1).all()
    top_right = dense[0, 0].view(8, 4, 2, 2, 4)[:4, 2:]  # points by place, centers by region
    assert (top_right[:, :, 0, 1].sum(-1) > 0).all()


def test_bad_input():
    battery.check_errors([
        (lambda: ssn(torch.zeros(1, 3, 4, 5), 2), "multiples of side=2"),
        (lambda: ssn(torch.zeros(1, 3, 4, 4), 2, iters=0), "iters=0: expected at least 1"),
        (lambda: baselines.lab_xy(torch.zeros(3, 4, 4), 2), "images (3, 4, 4): expected (B, 3, H,"),
    ])  # fmt: skip
