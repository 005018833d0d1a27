"""Every mechanism of the course in the common form (chapter 11).

A case builds a mechanism with random weights and, beside it, the same by `attention` of
`attnlab.lab.common_form`. Projections, norms and residual sums are the mechanism's own; what is
proved equal is everything between them. The mechanism takes its fastest path where it has several.
"""

from functools import partial

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from attnlab.attention import MultiHeadAttention
from attnlab.attention_pooling import AttentionPool
from attnlab.cbam import ChannelAttention, SpatialAttention
from attnlab.cgnl import cgnl_dot, cgnl_rbf, taylor_coefficients
from attnlab.channel import SelectiveKernel, SqueezeExcite
from attnlab.context import (
    ChannelSelfAttention,
    ObjectContext,
    PositionAttention,
    PyramidObjectContext,
    same_region,
)
from attnlab.flow import fetched_positions, warp
from attnlab.interlaced import InterlacedSparseAttention
from attnlab.lab.common_form import Case, attention
from attnlab.local_attention import (
    AttentionWarp,
    local_attention_warp,
    local_correlation,
    local_offsets,
)
from attnlab.non_local import non_local
from attnlab.pooling import AveragePool, tokens
from attnlab.propagation import aggregate, cosine_weights
from attnlab.reversed_attention import reversed_attention
from attnlab.sparse import (
    CrissCrossAttention,
)
from attnlab.superpixel import local_logits, p2s_attend, spread, to_cells
from attnlab.weighted_neighbors import LocallyWeightedNeighbors


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def randomized(module: nn.Module) -> nn.Module:
    """Random parameters, for a fresh gate of 0 would hide everything; float64, in eval mode."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double().eval()


def as_map(x: Tensor, like: Tensor) -> Tensor:
    """`(B, N, C)` → `(B, C, H, W)`, with the H of `like`."""
    return rearrange(x, "b (h w) c -> b c h w", h=like.shape[2])


def in_heads(layer: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Several attentions side by side, with the projections of `layer`; `(B, N, D)` → the same."""
    q, k, v = rearrange(layer.qkv(x), "b n (t h d) -> t b h n d", t=3, h=layer.num_heads)
    out = attention(q @ k.mT / q.shape[-1] ** 0.5, v, mask=mask)
    return layer.proj(rearrange(out, "b h n d -> b n (h d)"))


def multi_head() -> Case:
    layer = randomized(MultiHeadAttention(12, num_heads=3, impl="fused"))
    return Case(layer, partial(in_heads, layer), (normal(2, 7, 12),))


def gaussian() -> Case:
    return Case(
        lambda x, g: non_local(x, x, g, "gaussian", impl="fused"),
        lambda x, g: attention(x @ x.mT, g),
        (normal(2, 1, 6, 3), normal(2, 1, 6, 4)),
    )


def embedded_gaussian() -> Case:
    return Case(
        partial(non_local, kind="embedded_gaussian", impl="fused"),
        lambda theta, phi, g: attention(theta @ phi.mT, g),
        (normal(2, 1, 6, 3), normal(2, 1, 5, 3), normal(2, 1, 5, 4)),
    )


def dot_product() -> Case:
    return Case(
        partial(non_local, kind="dot_product", impl="fused"),
        lambda theta, phi, g: attention(theta @ phi.mT, g, normalize="mean"),
        (normal(2, 6, 3), normal(2, 5, 3), normal(2, 5, 4)),
    )


def concatenation() -> Case:
    def common(theta: Tensor, phi: Tensor, g: Tensor, w_f: Tensor) -> Tensor:
        w_theta, w_phi = w_f.chunk(2)
        scores = F.relu((theta @ w_theta)[..., :, None] + (phi @ w_phi)[..., None, :])
        return attention(scores, g, normalize="mean")

    return Case(
        lambda *inputs: non_local(*inputs[:3], "concatenation", w_f=inputs[3], impl="fused"),
        common,
        (normal(2, 6, 3), normal(2, 5, 3), normal(2, 5, 4), normal(6)),
    )


def gate(logits: Tensor, values: Tensor) -> Tensor:
    """Each scales its own value by the sigmoid of its logit: `(B, n)`, `(B, n, d)` → `(B, n, d)`.

    Here the common form is stretched: no pair is compared, so each meets itself alone.
    """
    itself = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    return attention(logits.diag_embed(), values, normalize="sigmoid", mask=itself)


def squeeze_excite() -> Case:
    layer = randomized(SqueezeExcite(6, reduction=2))

    def common(x: Tensor) -> Tensor:
        logits = layer.fc2(F.relu(layer.fc1(x.mean((2, 3), keepdim=True)))).flatten(1)
        return gate(logits, x.flatten(2)).view_as(x)

    return Case(layer, common, (normal(2, 6, 3, 4),))


def selective_kernel() -> Case:
    layer = randomized(SelectiveKernel(4, groups=2, min_hidden=3))

    def common(x: Tensor) -> Tensor:
        branches = torch.stack([path(x) for path in layer.paths], dim=2)  # (B, C, M, H, W)
        summary, share = branches.sum(2).mean((2, 3), keepdim=True), layer.attn
        logits = share.fc_select(share.act(share.bn(share.fc_reduce(summary))))
        scores = rearrange(logits, "b (m c) 1 1 -> b c 1 m", c=4)
        return attention(scores, branches.flatten(3)).view_as(branches[:, :, 0])

    return Case(layer, common, (normal(2, 4, 5, 6),))


def cbam_channel() -> Case:
    layer = randomized(ChannelAttention(6, reduction=2, impl="fused"))

    def common(x: Tensor) -> Tensor:
        logits = layer.mlp(x.mean((2, 3))) + layer.mlp(x.amax((2, 3)))
        return gate(logits, x.flatten(2)).view_as(x)

    return Case(layer, common, (normal(2, 6, 3, 4),))


def cbam_spatial() -> Case:
    layer = randomized(SpatialAttention(3, impl="fused"))

    def common(x: Tensor) -> Tensor:
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
        return as_map(gate(layer.logits(pooled).flatten(1), tokens(x)), x)

    return Case(layer, common, (normal(2, 6, 3, 4),))


def danet_position() -> Case:
    layer = randomized(PositionAttention(8, key_channels=3, impl="fused"))

    def common(x: Tensor) -> Tensor:
        q, k, v = (tokens(part(x)) for part in (layer.query, layer.key, layer.value))
        return x + layer.gamma * as_map(attention(q @ k.mT, v), x)

    return Case(layer, common, (normal(2, 8, 3, 4),))


def danet_channel() -> Case:
    layer = randomized(ChannelSelfAttention(impl="fused"))

    def common(x: Tensor) -> Tensor:
        rows = x.flatten(2)  # (B, C, N): a channel is a token of width N
        return x + layer.gamma * attention(-rows @ rows.mT, rows).view_as(x)

    return Case(layer, common, (0.3 * normal(2, 5, 3, 4),))


def object_context(layer: ObjectContext, x: Tensor) -> Tensor:
    k, v = tokens(layer.key(x)), tokens(layer.value(x))
    mask = same_region(tuple(x.shape[2:]), layer.regions).to(x.device)
    return layer.proj(as_map(attention(k @ k.mT / k.shape[-1] ** 0.5, v, mask=mask), x))


def ocnet() -> Case:
    layer = randomized(ObjectContext(6, impl="fused"))
    return Case(layer, partial(object_context, layer), (normal(2, 6, 3, 4),))


def ocnet_pyramid() -> Case:
    layer = randomized(PyramidObjectContext(4, regions=(1, 2, 3)))

    def common(x: Tensor) -> Tensor:
        contexts = [object_context(context, x) for context in layer.contexts]
        return layer.fuse(torch.cat([layer.lift(x), *contexts], dim=1))

    return Case(layer, common, (normal(2, 4, 5, 7),))


def criss_cross() -> Case:
    layer = randomized(CrissCrossAttention(4, key_channels=3, recurrence=2))

    def common(x: Tensor) -> Tensor:
        mask = layer.dense_mask(x.shape[2:]).to(x.device)
        for _ in range(layer.recurrence):
            q, k, v = (tokens(part(x)) for part in (layer.query, layer.key, layer.value))
            x = x + layer.gamma * as_map(attention(q @ k.mT, v, mask=mask), x)
        return x

    return Case(layer, common, (0.5 * normal(2, 4, 4, 5),))


def sparse(make: type[nn.Module], *args) -> Case:
    """The common form of the layers that differ in their mask alone; axial has two of them."""
    layer = randomized(make(8, *args, num_heads=2))

    def common(x: Tensor) -> Tensor:
        for stage in getattr(layer, "stages", (layer,)):
            mask = stage.dense_mask(x.shape[2:]).to(x.device)
            x = as_map(in_heads(stage, tokens(x), mask), x)
        return x

    return Case(layer, common, (normal(2, 8, 6, 7),))


def interlaced() -> Case:
    layer = randomized(InterlacedSparseAttention(6, cell=(2, 3)))

    def common(x: Tensor) -> Tensor:
        context = x
        for stage in layer.stages:
            q, k, v = (tokens(part(context)) for part in (stage.query, stage.key, stage.value))
            mask = stage.dense_mask(x.shape[2:]).to(x.device)
            out = attention(q @ k.mT / q.shape[-1] ** 0.5, v, mask=mask)
            context = stage.proj(as_map(out, x))
        return layer.fuse(torch.cat([x, context], dim=1))

    return Case(layer, common, (normal(2, 6, 6, 6),))


def compact_dot() -> Case:
    return Case(
        partial(cgnl_dot, impl="fused"),
        lambda theta, phi, g: attention(
            theta[..., :, None] * phi[..., None, :], g[..., None], normalize="none"
        )[..., 0],
        (normal(2, 2, 10), normal(2, 2, 10), normal(2, 2, 10)),
    )


def compact_rbf(gamma: float = 0.3, order: int = 3) -> Case:
    def common(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
        t, p = theta[..., :, None], phi[..., None, :]
        series = sum(a * (t * p) ** k for k, a in enumerate(taylor_coefficients(gamma, order)))
        scores = (-gamma * (t**2 + p**2)).exp() * series  # of exp(−γ (t − p)²)
        return attention(scores, g[..., None], normalize="none")[..., 0]

    own = partial(cgnl_rbf, gamma=gamma, order=order, beta="exact", impl="fused")
    return Case(own, common, (normal(2, 2, 10), normal(2, 2, 10), normal(2, 2, 10)))


def flow_warp() -> Case:
    def common(features: Tensor, flow: Tensor) -> Tensor:
        hats = []
        for fetched, length in zip(fetched_positions(flow), (5, 4), strict=True):
            fetched = fetched.clamp(0, length - 1).flatten(1)  # beyond the border is the border
            cells = torch.arange(length, device=flow.device)
            hats.append((1 - (fetched[..., None] - cells).abs()).clamp(min=0))
        scores = einsum(*hats, "b n x, b n y -> b n y x").flatten(2)
        return as_map(attention(scores, tokens(features), normalize="none"), features)

    return Case(warp, common, (normal(2, 3, 4, 5), 1.5 * normal(2, 2, 4, 5)))


def frame_aggregation() -> Case:
    def own(features: Tensor, embeddings: Tensor, query: Tensor) -> Tensor:
        return aggregate(features, cosine_weights(embeddings, query))

    def common(features: Tensor, embeddings: Tensor, query: Tensor) -> Tensor:
        q = F.normalize(rearrange(query, "b d h w -> b (h w) 1 d"), dim=-1)
        k = F.normalize(rearrange(embeddings, "b t d h w -> b (h w) t d"), dim=-1)
        out = attention(q @ k.mT, rearrange(features, "b t c h w -> b (h w) t c"))
        return as_map(out.squeeze(2), query)

    return Case(own, common, (normal(2, 3, 4, 3, 4), normal(2, 3, 5, 3, 4), normal(2, 5, 3, 4)))


def coordinates(x: Tensor) -> Tensor:
    """Row and column of each position of a map `(B, C, H, W)`: `(N, 2)`."""
    return torch.cartesian_prod(*(torch.arange(n, device=x.device) for n in x.shape[2:]))


def within(radius: int, x: Tensor) -> Tensor:
    """Which positions of a map are at most `radius` cells apart: `(N, N)`."""
    cells = coordinates(x)
    return (cells[:, None] - cells).abs().amax(-1) <= radius


def local() -> Case:
    def common(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = tokens(query), tokens(key), tokens(value)
        return as_map(attention(q @ k.mT / 3**0.5, v, mask=within(2, query)), value)

    own = partial(local_attention_warp, radius=2, impl="fused")
    return Case(own, common, (normal(2, 3, 5, 6), normal(2, 3, 5, 6), normal(2, 4, 5, 6)))


def positive_local() -> Case:
    layer = AttentionWarp(radius=2, temperature=0.5, normalize="sum").double()

    def common(current: Tensor, key: Tensor, features: Tensor) -> Tensor:
        q, k = (F.normalize(tokens(x), dim=-1) for x in (current, key))
        scores = F.relu(q @ k.mT / layer.temperature)
        near = within(2, key)
        return as_map(attention(scores, tokens(features), normalize="sum", mask=near), features)

    return Case(layer, common, (normal(2, 3, 5, 6), normal(2, 3, 5, 6), normal(2, 4, 5, 6)))


def weighted_neighbors() -> Case:
    layer = randomized(LocallyWeightedNeighbors(3, offsets=True, radius=1, hidden=4))

    def common(current: Tensor, key: Tensor, features: Tensor) -> Tensor:
        fit = local_correlation(F.normalize(current), F.normalize(key), layer.radius, "zeros")
        hidden = layer.compare(fit)
        moved = rearrange(layer.move(hidden), "b (n xy) h w -> n b xy h w", xy=2)
        places = rearrange(moved.new_tensor(local_offsets(1)), "n xy -> n 1 xy 1 1")
        samples = torch.stack([tokens(warp(features, flow)) for flow in moved + places], dim=2)
        scores = rearrange(layer.weigh(hidden), "b n h w -> b (h w) 1 n")
        return as_map(attention(scores, samples).squeeze(2), features)

    return Case(layer, common, (normal(2, 3, 4, 5), normal(2, 3, 4, 5), normal(2, 4, 4, 5)))


def average_pool() -> Case:
    def common(x: Tensor) -> Tensor:
        return attention(x.new_zeros(1, x[0, 0].numel()), tokens(x)).squeeze(1)

    return Case(AveragePool(), common, (normal(2, 6, 3, 4),))


def attention_pool() -> Case:
    layer = randomized(AttentionPool(6, impl="collapsed"))

    def common(x: Tensor) -> Tensor:
        cls = layer.cls_token.expand(len(x), -1, -1)
        z = layer.norm1(torch.cat([cls, tokens(x)], dim=1))
        q, k, v = layer.q(z[:, :1]), layer.k(z), layer.v(z)
        cls = cls + layer.ls1(layer.proj(attention(q @ k.mT / q.shape[-1] ** 0.5, v)))
        return (cls + layer.ls2(layer.mlp(layer.norm2(cls)))).squeeze(1)

    return Case(layer, common, (normal(2, 6, 3, 4),))


def children_to_parents() -> Case:
    def common(q: Tensor, k: Tensor, v: Tensor, head_probs: Tensor, messages: Tensor) -> Tensor:
        sent = (head_probs * messages[:, None])[..., None] * v  # P M v
        return attention(k @ q.mT / q.shape[-1] ** 0.5, sent, axis="queries")

    tensors = normal(2, 3, 6, 4), normal(2, 3, 5, 4), normal(2, 3, 6, 4)
    shares = normal(2, 3, 6).softmax(1), normal(2, 6).sigmoid()
    return Case(partial(reversed_attention, impl="fused"), common, (*tensors, *shares))


def near_cells(pixels: Tensor, superpixels: Tensor, side: int) -> Tensor:
    """Whether a superpixel's cell is that of a pixel or beside it: `(pixels, superpixels)`."""
    cells = coordinates(pixels)[:, None] // side
    return (cells - coordinates(superpixels)).abs().amax(-1) <= 1


def pixels_to_superpixels() -> Case:
    def own(pixels: Tensor, superpixels: Tensor, values: Tensor) -> Tensor:
        grid = rearrange(superpixels, "b d y x -> b y x d")
        return p2s_attend(local_logits(to_cells(pixels, 2), grid), to_cells(values, 2)).flatten(
            1, 2
        )

    def common(pixels: Tensor, superpixels: Tensor, values: Tensor) -> Tensor:
        scores = tokens(superpixels) @ tokens(pixels).mT / 3**0.5
        return attention(scores, tokens(values), mask=near_cells(pixels, superpixels, 2).mT)

    return Case(own, common, (normal(2, 3, 8, 6), normal(2, 3, 4, 3), normal(2, 5, 8, 6)))


def superpixels_to_pixels() -> Case:
    def own(pixels: Tensor, superpixels: Tensor, values: Tensor) -> Tensor:
        grid, of_grid = (rearrange(x, "b d y x -> b y x d") for x in (superpixels, values))
        cells = spread(local_logits(to_cells(pixels, 2), grid).softmax(-1), of_grid)
        return rearrange(cells, "b y x (i j) d -> b (y i x j) d", i=2)

    def common(pixels: Tensor, superpixels: Tensor, values: Tensor) -> Tensor:
        scores = tokens(pixels) @ tokens(superpixels).mT / 3**0.5
        return attention(scores, tokens(values), mask=near_cells(pixels, superpixels, 2))

    return Case(own, common, (normal(2, 3, 8, 6), normal(2, 3, 4, 3), normal(2, 5, 4, 3)))
