"""Relatives of superpixel attention: SSN, Super Tokens, Context Clusters (chapter 10).

Papers: Jampani et al. 2018 (SSN, differentiable SLIC); Huang et al. 2023 (Super Token ViT); Ma et
al. 2023 (Context Clusters). SSN has distances and no weights; Super Tokens have an association
without projections, and no gradient through it; Context Clusters assign hard inside of windows that
do not overlap. The layouts cells, grid and slots are those of `attnlab.superpixel`.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from attnlab.attention import MultiHeadAttention
from attnlab.layers import check_map
from attnlab.probe import Probe
from attnlab.superpixel import (
    collect_means,
    dense_association,
    expand,
    from_cells,
    gather9,
    hard_labels,
    local_logits,
    mask_absent,
    spread,
    superpixel_means,
    to_cells,
)


def ssn(features: Tensor, side: int, iters: int = 10, hard: bool = False) -> tuple[Tensor, Tensor]:
    """Soft k-means in nine neighbours, differentiable SLIC (SSN, Sec. 4): no parameters.

    Centers begin as the means of cells; each iteration assigns, Q = softmax(−‖x − c‖²), and takes
    the weighted means.

    Args:
        features: `(B, C, h, w)`, for example of `lab_xy`; their scale is the temperature.
        side: of a cell, in pixels.
        iters: number of iterations, at least 1; SSN trains with 5 and tests with 10.
        hard: assign each pixel to its nearest center alone (k-means); not differentiable in Q.

    Returns:
        The last assignment's logits, slots `(B, 1, Sh, Sw, s², 9)` (with `hard`, 0 and −∞), and
        the centers after it, `(B, C, Sh, Sw)`.

    Raises:
        ValueError: h or w is no multiple of `side`; `iters` below 1.
    """
    if iters < 1:
        raise ValueError(f"iters={iters}: expected at least 1")
    pixels = to_cells(features, side)[:, None]
    centers = pixels.mean(-2)
    for _ in range(iters):
        logits = _distance_logits(pixels, centers)
        if hard:
            nearest = F.one_hot(logits.argmax(-1), 9).bool()
            logits = torch.zeros_like(logits).masked_fill(~nearest, -math.inf)
        centers = collect_means(logits.softmax(-1), pixels, centers)
    return logits, rearrange(centers, "b 1 y x c -> b c y x")


def ssn_loss(logits: Tensor, labels: Tensor, num_classes: int, compactness: float = 1e-5) -> Tensor:
    """SSN's loss: labels rebuilt from superpixels' means, plus compactness (SSN, Eqs. 8 and 9).

    Args:
        logits: slots of one head, `(B, 1, Sh, Sw, s², 9)`.
        labels: int64 `(B, h, w)` from 0 to num_classes − 1.
        compactness: weight of the mean squared distance, in pixels, of a pixel from the mean
            position of its most likely superpixel.
    """
    wanted = rearrange(F.one_hot(labels, num_classes), "b h w k -> b k h w").to(logits.dtype)
    rebuilt = expand(superpixel_means(wanted, logits), logits)
    likely = (rebuilt * wanted).sum(1).clamp_min(torch.finfo(logits.dtype).tiny)
    places = _coordinates(wanted)
    means = superpixel_means(places, logits).flatten(2)  # (B, 2, N)
    own = hard_labels(logits).flatten(1)[:, None].expand(-1, 2, -1)
    distance = (places.flatten(2) - means.gather(2, own)).square().sum(1)
    return -likely.log().mean() + compactness * distance.mean()


def lab_xy(images: Tensor, side: int, color: float = 0.26, position: float = 2.5) -> Tensor:
    """Features for `ssn`: `color` · CIE Lab and `position` · (y, x) / `side`; SSN's scales.

    sRGB images `(B, 3, H, W)` from 0 to 1 → `(B, 5, H, W)`.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images {tuple(images.shape)}: expected (B, 3, H, W)")
    return torch.cat([color * rgb_to_lab(images), position / side * _coordinates(images)], 1)


def rgb_to_lab(images: Tensor) -> Tensor:
    """sRGB from 0 to 1 → CIE Lab (D65, 2°), `(B, 3, H, W)` both; L is from 0 to 100."""
    linear = torch.where(images > 0.04045, ((images + 0.055) / 1.055) ** 2.4, images / 12.92)
    to_xyz = linear.new_tensor([
        [0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169],
        [0.019334, 0.119193, 0.950227],
    ])  # fmt: skip
    white = linear.new_tensor([0.95047, 1.0, 1.08883])[:, None, None]
    xyz = torch.einsum("ij, b j h w -> b i h w", to_xyz, linear) / white
    small = xyz <= 0.008856
    x, y, z = torch.where(small, 7.787 * xyz + 16 / 116, xyz.clamp_min(0.008) ** (1 / 3)).unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


class SuperTokenAttention(nn.Module):
    """Attention among super tokens (Super Token ViT, Sec. 3.2): `(B, dim, h, w)` → the same shape.

    Tokens are means of cells; the association is the softmax of plain dot products of features, in
    nine neighbours, with no projection and no gradient; tokens are collected with it, attend to
    each other, and are spread with it again. The paper's block puts a norm before this, and a
    residual around it. What differs: absent neighbours are masked; the released code counts them as
    keys of zeros.

    Args:
        dim: channels, a multiple of `num_heads`.
        side: of a cell, in pixels; 8, 4 and 2 in the paper's first three stages.
        num_heads, qkv_bias, impl: of the attention among tokens.
        iters: rounds of assignment.
    """

    def __init__(
        self,
        dim: int,
        side: int,
        num_heads: int = 8,
        iters: int = 1,
        qkv_bias: bool = True,
        impl: str = "auto",
    ):
        super().__init__()
        if iters < 1:
            raise ValueError(f"iters={iters}: expected at least 1")
        self.side, self.iters = side, iters
        self.attn = MultiHeadAttention(dim, num_heads, qkv_bias, impl=impl)
        self.attn_probe = Probe()

    def forward(self, x: Tensor) -> Tensor:
        check_map(x, self.attn.proj.in_features)
        pixels = to_cells(x, self.side)[:, None]
        with torch.no_grad():
            weights = local_logits(pixels, pixels.mean(-2)).softmax(-1)
            for _ in range(self.iters - 1):
                weights = local_logits(pixels, collect_means(weights, pixels)).softmax(-1)
        weights = self.attn_probe(weights)
        height, width = weights.shape[2:4]
        tokens = rearrange(collect_means(weights, pixels), "b 1 y x d -> b (y x) d")
        tokens = rearrange(self.attn(tokens), "b (y x) d -> b 1 y x d", y=height, x=width)
        return from_cells(spread(weights, tokens)).squeeze(1)

    def dense_map(self, map: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """Slots `(B, 1, Sh, Sw, s², 9)` → `(B, 1, pixels, super tokens)`."""
        return dense_association(map)


class ContextCluster(nn.Module):
    """Clustering in place of attention (Context Clusters, Sec. 3.2): `(B, dim, h, w)` → the same.

    Inside each of `regions`² disjoint regions: pool a few centers; each point joins the one center
    with the highest similarity, sigmoid(α cos + β); a center becomes the mean of its own value and
    its points', weighted by similarity; the points receive it, weighted alike.

    Args:
        dim: channels.
        num_heads, head_dim: heads and the width of each.
        regions: regions along a side; 8, 4, 2 and 1 in the paper's stages.
        centers: centers along a region's side.
        divide_by: "count" of the points joined, plus 1, as the released code does; or "similarity",
            the sum of their weights plus 1, as the paper's Eq. 1 does.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        head_dim: int = 24,
        regions: int = 1,
        centers: int = 2,
        divide_by: str = "count",
    ):
        super().__init__()
        if divide_by not in ("count", "similarity"):
            raise ValueError(f"divide_by={divide_by!r}: expected count or similarity")
        self.num_heads, self.regions, self.centers = num_heads, regions, centers
        self.divide_by = divide_by
        self.features = nn.Conv2d(dim, num_heads * head_dim, 1)
        self.values = nn.Conv2d(dim, num_heads * head_dim, 1)
        self.alpha, self.beta = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))
        self.attn_probe = Probe()
        self.proj = nn.Conv2d(num_heads * head_dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        check_map(x, self.proj.out_channels)
        sizes = {"m": self.num_heads, "y": self.regions, "x": self.regions}
        if x.shape[2] % self.regions or x.shape[3] % self.regions:
            raise ValueError(
                f"x {tuple(x.shape)}: expected sides that are multiples of regions={self.regions}"
            )
        cut = "b (m d) (y i) (x j) -> (b m y x) d i j"
        maps = [rearrange(f(x), cut, **sizes) for f in (self.features, self.values)]
        points, values = (map.flatten(2).mT for map in maps)  # (B m y x, points, d)
        centers, center_values = (
            F.adaptive_avg_pool2d(map, self.centers).flatten(2).mT for map in maps
        )  # (B m y x, centers, d)
        cosine = F.normalize(points, dim=-1) @ F.normalize(centers, dim=-1).mT
        scores = self.beta + self.alpha * cosine
        joined = F.one_hot(scores.argmax(-1), scores.shape[-1]).to(scores.dtype)
        weights = scores.sigmoid() * joined  # (B m y x, points, centers)
        self.attn_probe(rearrange(weights, "(b m y x) n c -> b m y x n c", **sizes))
        total = (joined if self.divide_by == "count" else weights).sum(-2)[..., None]
        clusters = (weights.mT @ values + center_values) / (total + 1)
        back = "(b m y x) (i j) d -> b (m d) (y i) (x j)"
        return self.proj(rearrange(weights @ clusters, back, i=maps[0].shape[2], **sizes))

    def dense_map(self, map: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """Of the recorded `(B, heads, regions, regions, points, centers)`, given `shape` = (h, w).

        → `(B, heads, points, centers)`, the points of the whole map in row-major order, the centers
        region by region.
        """
        if shape is None:
            raise ValueError("shape=None: expected (h, w) of the map")
        regions = torch.eye(self.regions**2, dtype=map.dtype, device=map.device)
        dense = torch.einsum("b m r n c, r s -> b m r n s c", map.flatten(2, 3), regions)
        layout = "b m (y x) (i j) s c -> b m (y i x j) (s c)"
        return rearrange(dense, layout, y=self.regions, i=shape[0] // self.regions)


def _distance_logits(pixels: Tensor, centers: Tensor) -> Tensor:
    """−‖x − c‖² up to a number per pixel, which no softmax sees: slots of cells and a grid.

    Measured from the own center, so that large features lose no digits.
    """
    own = centers[..., None, :]
    near = gather9(centers) - own  # (..., Sh, Sw, 9, d)
    return mask_absent(2 * (pixels - own) @ near.mT - near.square().sum(-1)[..., None, :])


def _coordinates(images: Tensor) -> Tensor:
    """(y, x) in pixels, `(B, 2, h, w)`, of the dtype and device of `images`."""
    like = {"dtype": images.dtype, "device": images.device}
    y, x = (torch.arange(size, **like) for size in images.shape[2:])
    return torch.stack(torch.meshgrid(y, x, indexing="ij")).expand(len(images), -1, -1, -1)
