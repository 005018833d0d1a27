"""Attention to a neighborhood of another frame, in place of warping along a flow (chapter 07).

The open exercise of the flow papers, answered: between two frames things move a few cells, so a
query of the current frame looks for its content in a window of the key frame around its own place,
and receives the mean of the key's features there, weighted by how well they fit. A warp along a
flow is the special case of weights that form a bilinear hat around one displacement.

Papers: Xiao & Lee 2018, "Video Object Detection with an Aligned Spatial-Temporal Memory" (weights
divided by their sum); Guo et al. 2019, "Progressive Sparse Local Attention"; Jiang et al. 2019,
"Video Object Detection with Locally-Weighted Deformable Neighbors". What differs: cells outside the
map are masked, not zero keys; and, of the last two, what their texts leave open.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import Tensor, nn

from attnlab.attention import attention_weights, scaled_dot_product_attention
from attnlab.layers import check_map
from attnlab.probe import Probe

IMPLS = ("auto", "explicit", "fused", "unfold")
TILE = 8  # side of a tile of queries in the fused form; measured, not critical
Window = int | Sequence[tuple[int, int]]  # a radius R, or displacements (dx, dy)


def local_offsets(radius: int) -> list[tuple[int, int]]:
    """All (2R + 1)² displacements (dx, dy) of at most `radius` cells, row by row."""
    if radius < 0:
        raise ValueError(f"radius={radius}: expected at least 0")
    steps = range(-radius, radius + 1)
    return [(dx, dy) for dy in steps for dx in steps]


def progressive_offsets(radius: int) -> list[tuple[int, int]]:
    """No displacement, and the 8 neighbors at each distance 1 … R: 1 + 8R pairs (dx, dy) (PSLA)."""
    ring = [offset for offset in local_offsets(1) if offset != (0, 0)]
    return [(0, 0)] + [(r * dx, r * dy) for r in range(1, radius + 1) for dx, dy in ring]


def local_correlation(query: Tensor, key: Tensor, window: Window, padding: str = "mask") -> Tensor:
    """⟨query(p), key(p + d)⟩ for every displacement d of the window.

    Args:
        query, key: `(B, D, H, W)`.
        window: a radius, or a list of displacements (dx, dy).
        padding: outside the map, correlation −∞ ("mask"), keys 0 ("zeros") or those of the border
            ("replicate").

    Returns:
        `(B, L, H, W)`, at least float32.

    Raises:
        ValueError: shapes that do not fit, another `padding`, an impossible window.
    """
    _check_pair(query, key)
    if padding not in ("mask", "zeros", "replicate"):
        raise ValueError(f"padding={padding!r}: expected mask, zeros or replicate")
    dtype = torch.promote_types(query.dtype, torch.float32)
    shifts = _shifts(key, window, padding)
    scores = torch.stack([(query * shifted).sum(1, dtype=dtype) for shifted in shifts], dim=1)
    if padding == "mask":
        scores = scores.masked_fill(~_inside(window, key), -math.inf)
    return scores


def local_attend(values: Tensor, weights: Tensor, window: Window, padding: str = "zeros") -> Tensor:
    """Σ_d weights_d(p) values(p + d).

    Args:
        values: `(B, C, H, W)`.
        weights: `(B, L, H, W)`, one for each displacement of the window.
        window: a radius, or a list of displacements (dx, dy).
        padding: what is outside the map: "zeros", or the border's values ("replicate").

    Returns:
        `(B, C, H, W)` in the dtype of `values`.

    Raises:
        ValueError: weights that do not fit, another `padding`, an impossible window.
    """
    check_map(values, name="values")
    if padding not in ("zeros", "replicate"):
        raise ValueError(f"padding={padding!r}: expected zeros or replicate")
    expected = (len(values), len(_pairs(window)), *values.shape[2:])
    if tuple(weights.shape) != expected:
        raise ValueError(f"weights {tuple(weights.shape)}: expected {expected}, (B, L, H, W)")
    out = 0.0
    for weight, shifted in zip(weights.unbind(1), _shifts(values, window, padding), strict=True):
        out = out + weight[:, None] * shifted
    return out.to(values.dtype)


def local_attention_warp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    radius: int,
    *,
    scale: float | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Σ_d softmax_d(scale · ⟨query(p), key(p + d)⟩) value(p + d), over a window: |d| ≤ radius.

    Cells outside the map get no weight: equal to attention over the whole map under a mask.

    Args:
        query: embedding of the current frame, `(B, D, H, W)`.
        key: embedding of the key frame, `(B, D, H, W)`.
        value: features of the key frame, `(B, C, H, W)`.
        radius: R, in cells; a query sees (2R + 1)² of them.
        scale: factor of the products, 1/√D by default; a tensor may be learned.
        impl: "explicit" goes through the displacements one by one, and has the weights
            `(B, L, H, W)`; "fused" cuts the map into tiles, gathers for each the keys that its
            queries see, and calls PyTorch's kernel; "unfold" copies each cell's window, L times the
            map, and is here to compare with; "auto" is "explicit" on a CPU up to a radius of 2,
            with a backward pass of 1, else "fused".

    Returns:
        `(B, C, H, W)` in the dtype of `value`.

    Raises:
        ValueError: shapes that do not fit, another `impl`, a negative radius.
    """
    _check_pair(query, key)
    if value.ndim != 4 or value.shape[2:] != key.shape[2:] or len(value) != len(key):
        size = ", ".join(map(str, key.shape[2:]))
        raise ValueError(f"value {tuple(value.shape)}: expected ({len(key)}, C, {size})")
    _check_impl(impl)
    if radius < 0:
        raise ValueError(f"radius={radius}: expected at least 0")
    query = query * (query.shape[1] ** -0.5 if scale is None else scale)
    if impl == "auto":
        impl = _faster(query, key, value, radius)
    if impl == "explicit":
        weights = local_correlation(query, key, radius).softmax(dim=1)
        return local_attend(value, weights, radius)
    return (_unfolded if impl == "unfold" else _tiled)(query, key, value, radius)


def _faster(query: Tensor, key: Tensor, value: Tensor, radius: int) -> str:
    """Measured on CPUs (benchmarks/video.py): a backward pass costs the loop a step of radius."""
    small = radius + _trains(query, key, value) <= 2
    return "explicit" if small and query.device.type == "cpu" else "fused"


def _trains(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _unfolded(query: Tensor, key: Tensor, value: Tensor, radius: int) -> Tensor:
    """The reference: every cell's window is copied, `(B, C, L, H, W)`."""

    def windows(x: Tensor) -> Tensor:
        side = 2 * radius + 1
        copies = F.unfold(x, side, padding=radius)
        return rearrange(copies, "b (c l) (h w) -> b c l h w", l=side**2, h=x.shape[2])

    scores = einsum(query, windows(key), "b d h w, b d l h w -> b l h w")
    weights = scores.masked_fill(~_inside(radius, key), -math.inf).softmax(dim=1)
    return einsum(weights.to(value.dtype), windows(value), "b l h w, b c l h w -> b c h w")


def _tiled(query: Tensor, key: Tensor, value: Tensor, radius: int) -> Tensor:
    """Tiles of `TILE`² queries; each sees the keys of its tile and a halo of `radius` around."""
    height, width = query.shape[2:]
    row_queries, row_keys, row_bias = _tile_axis(height, radius, query)
    column_queries, column_keys, column_bias = _tile_axis(width, radius, query)
    row_bias = repeat(row_bias, "r u i -> r 1 u 1 (i j)", j=column_keys.shape[1])
    column_bias = repeat(column_bias, "c v j -> c 1 v (i j)", i=row_keys.shape[1])
    maps = (query, key, value)
    query, key, value = (rearrange(x, "b c h w -> b (h w) c").contiguous() for x in maps)

    def gather(x: Tensor, row: Tensor, column: Tensor) -> Tensor:
        cells = rearrange(row, "r i -> r 1 i 1") * width + rearrange(column, "c j -> 1 c 1 j")
        return x.index_select(1, cells.flatten()).unflatten(1, (-1, cells[0, 0].numel()))

    def attend(rows: slice) -> Tensor:
        q = gather(query, row_queries[rows], column_queries)
        k, v = (gather(x, row_keys[rows], column_keys) for x in (key, value))
        bias = rearrange(row_bias[rows] + column_bias, "r c u v k -> 1 (r c) (u v) k")
        return F.scaled_dot_product_attention(q, k, v, bias.expand(len(q), -1, -1, -1), scale=1.0)

    # Without gradients, a CPU takes one row of tiles at a time: what it gathers stays in the cache.
    step = 1 if query.device.type == "cpu" and not _trains(query, key, value) else len(row_keys)
    out = torch.cat([attend(slice(r, r + step)) for r in range(0, len(row_keys), step)], dim=1)
    joined = "b (r c) (u v) d -> b d (r u) (c v)"
    return rearrange(out, joined, r=len(row_keys), u=TILE)[:, :, :height, :width]


def _tile_axis(length: int, radius: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One axis in T tiles: positions of queries `(T, TILE)` and keys `(T, L)`; bias `(T, TILE, L)`.

    The bias is −∞ where a query does not see a key, else 0. Beyond the map, its last query repeats.
    """
    first = torch.arange(0, length, TILE, device=like.device)[:, None]
    queries = (first + torch.arange(TILE, device=like.device)).clamp(max=length - 1)
    keys = first + torch.arange(-radius, TILE + radius, device=like.device)
    near = (queries[:, :, None] - keys[:, None]).abs() <= radius
    seen = near & ((keys >= 0) & (keys < length))[:, None]
    bias = torch.zeros_like(seen, dtype=like.dtype).masked_fill(~seen, -math.inf)
    return queries, keys.clamp(0, length - 1), bias


def flow_to_attention(flow: Tensor, radius: int) -> Tensor:
    """The bilinear hat that attends like `warp`: max(0, 1 − |d_x − dx|) · max(0, 1 − |d_y − dy|).

    Args:
        flow: `(B, 2, H, W)`, (dx, dy) in cells, at most `radius` along each axis.

    Returns:
        `(B, L, H, W)`; the sum over L is 1, at most 4 are not 0. `local_attend` with it equals
        `warp`: padding "replicate" is "border", "zeros" is "zeros".

    Raises:
        ValueError: not a flow, or one that leaves the window.
    """
    check_map(flow, 2, "flow")
    largest = flow.detach().abs().amax().item()
    if not largest <= radius:
        raise ValueError(f"flow of up to {largest:g} cells: expected at most radius={radius}")
    distance = rearrange(_as_tensor(radius, flow), "l xy -> l xy 1 1") - flow[:, None]
    return (1 - distance.abs()).clamp(min=0).prod(dim=2)


def attention_to_flow(weights: Tensor, window: Window, mode: str = "mean") -> Tensor:
    """The displacement that weights `(B, L, H, W)` stand for: `(B, 2, H, W)`, (dx, dy) in cells.

    "mean" is Σ_d weights_d · d (soft-argmax), between the peaks where there are two; "argmax" is
    the d of the largest weight. Raises `ValueError` for another `mode` or another window.
    """
    if mode not in ("mean", "argmax"):
        raise ValueError(f"mode={mode!r}: expected mean or argmax")
    offsets = _as_tensor(window, weights)
    check_map(weights, len(offsets), "weights")
    if mode == "mean":
        return einsum(weights, offsets.to(weights.dtype), "b l h w, l xy -> b xy h w")
    best = offsets.to(weights.dtype)[weights.argmax(dim=1)]
    return rearrange(best, "b h w xy -> b xy h w")


class Embedding(nn.Module):
    """What frames are compared by: a cheap network, then an orthogonal 1×1 convolution.

    Frames `(B, 3, H, W)` → `(B, dim, h, w)`, h × w being the size of the backbone's maps. One
    embedding for both frames, so that equal content is equal.

    Args:
        shallow: frames → `(B, in_channels, h, w)`; the first layers of the backbone, say.
    """

    def __init__(self, shallow: nn.Module, in_channels: int, dim: int):
        super().__init__()
        self.shallow = shallow
        self.proj = nn.Conv2d(in_channels, dim, 1, bias=False)
        nn.init.orthogonal_(self.proj.weight)

    def forward(self, frame: Tensor) -> Tensor:
        return self.proj(self.shallow(frame))


class AttentionWarp(nn.Module):
    """Features of the current frame, gathered from a key frame by how alike the embeddings are.

    The weights are softmax(cosine / τ) over a window, or over the whole map. τ = `temperature` is
    learned, and never below 0.01. The features are not projected: the head wants their space.

    Args:
        radius: R, in cells; None for the whole map (non-local across frames).
        temperature: τ at first. Small is near one displacement, large is a blur.
        normalize: "softmax", or "sum": cosines above 0, divided by their sum (STMN).
        pattern: "dense", or "progressive": 1 + 8R cells of the window (PSLA).
        impl: as in `local_attention_warp`; "sum" and "progressive" have the explicit form only.

    Raises:
        ValueError: an unknown option, or one that the whole map does not have.
    """

    def __init__(
        self,
        radius: int | None = 4,
        temperature: float = 0.07,
        *,
        normalize: str = "softmax",
        pattern: str = "dense",
        impl: str = "auto",
    ):
        super().__init__()
        if radius is not None and radius < 0:
            raise ValueError(f"radius={radius}: expected at least 0, or None")
        if temperature <= 0:
            raise ValueError(f"temperature={temperature}: expected a number above 0")
        if normalize not in ("softmax", "sum"):
            raise ValueError(f"normalize={normalize!r}: expected softmax or sum")
        if pattern not in ("dense", "progressive"):
            raise ValueError(f"pattern={pattern!r}: expected dense or progressive")
        if radius is None and (normalize, pattern) != ("softmax", "dense"):
            raise ValueError(f"radius=None: expected a radius with {normalize!r} and {pattern!r}")
        _check_impl(impl)
        self.radius, self.normalize, self.pattern, self.impl = radius, normalize, pattern, impl
        self.temperature = nn.Parameter(torch.tensor(float(temperature)))
        self.attn_probe = Probe()

    @property
    def window(self) -> list[tuple[int, int]]:
        """Its displacements (dx, dy)."""
        offsets = progressive_offsets if self.pattern == "progressive" else local_offsets
        return offsets(self.radius)

    def forward(self, current: Tensor, key: Tensor, features: Tensor) -> Tensor:
        """Embeddings of both frames `(B, D, h, w)`, the key's features `(B, C, h, w)` → the same.

        The recorded map is `(B, L, h, w)`, over the window; for the whole map `(B, 1, N, N)`.
        """
        query, key = F.normalize(current, dim=1), F.normalize(key, dim=1)
        query = query / self.temperature.clamp(min=0.01)
        if self.radius is None:
            return self._attend_everywhere(query, key, features)
        if self.impl != "explicit" and (self.normalize, self.pattern) == ("softmax", "dense"):
            options = {"scale": 1.0, "impl": self.impl}
            return local_attention_warp(query, key, features, self.radius, **options)
        scores = local_correlation(query, key, self.window)
        if self.normalize == "softmax":
            weights = scores.softmax(dim=1)
        else:
            weights = F.normalize(scores.clamp(min=0), p=1, dim=1, eps=1e-6)
        return local_attend(features, self.attn_probe(weights), self.window)

    def _attend_everywhere(self, query: Tensor, key: Tensor, features: Tensor) -> Tensor:
        q, k, v = (rearrange(x, "b c h w -> b 1 (h w) c") for x in (query, key, features))
        if self.impl == "explicit":
            weights = self.attn_probe(attention_weights(q, k, scale=1.0))
            out = weights.to(v.dtype) @ v
        else:
            impl = "fused" if self.impl == "fused" else "auto"
            out = scaled_dot_product_attention(q, k, v, scale=1.0, impl=impl)
        return rearrange(out, "b 1 (h w) c -> b c h w", h=features.shape[2])

    def dense_map(self, map: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """`(B, L, h, w)` → `(B, 1, N, N)`, queries of the current frame, keys of the key frame."""
        return map if self.radius is None else dense_window(map, self.window)


def dense_window(weights: Tensor, window: Window, padding: str = "zeros") -> Tensor:
    """Weights of a window, `(B, L, H, W)` → `(B, 1, N, N)`.

    Those of cells outside the map are dropped ("zeros"), or fall to the border ("replicate").
    """
    height, width = weights.shape[2:]
    dx, dy = _as_tensor(window, weights).unbind(1)
    x = torch.arange(width, device=weights.device) + dx[:, None, None]
    y = torch.arange(height, device=weights.device)[:, None] + dy[:, None, None]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)  # (L, H, W)
    cell = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
    weights = weights if padding == "replicate" else weights * inside
    weights = rearrange(weights, "b l h w -> b 1 (h w) l")
    cell = rearrange(cell, "l h w -> 1 1 (h w) l").expand_as(weights)
    return weights.new_zeros(len(weights), 1, *[height * width] * 2).scatter_add(-1, cell, weights)


def _pairs(window: Window) -> Sequence[tuple[int, int]]:
    return local_offsets(window) if isinstance(window, int) else window


def _as_tensor(window: Window, like: Tensor) -> Tensor:
    """The displacements, `(L, 2)` integers."""
    return torch.tensor(_pairs(window), device=like.device)


def _shifts(x: Tensor, window: Window, padding: str) -> Iterator[Tensor]:
    """x(p + d) for each displacement d: views of one padded map, `(B, C, H, W)` each."""
    height, width = x.shape[2:]
    pairs = _pairs(window)
    reach = max(max(abs(dx), abs(dy)) for dx, dy in pairs)
    padded = F.pad(x, (reach,) * 4, mode="replicate" if padding == "replicate" else "constant")
    for dx, dy in pairs:
        top, left = reach + dy, reach + dx
        yield padded[:, :, top : top + height, left : left + width]


def _inside(window: Window, like: Tensor) -> Tensor:
    """Where p + d is on the map: `(1, L, H, W)` bool."""
    ones = torch.ones_like(like[:1, :1], dtype=torch.bool)
    return torch.cat([*_shifts(ones, window, "zeros")], dim=1)


def _check_pair(query: Tensor, key: Tensor) -> None:
    check_map(query, name="query")
    if key.shape != query.shape:
        raise ValueError(f"key {tuple(key.shape)}: expected {tuple(query.shape)}, as the query")


def _check_impl(impl: str) -> None:
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r}: expected one of {', '.join(IMPLS)}")
