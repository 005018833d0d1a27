"""Sparse attention on maps: windows, neighbourhoods, dilated, axial, criss-cross (chapter 05).

Papers: Liu et al. 2021, "Swin Transformer" (windows, arXiv:2103.14030); Hassani et al. 2023,
"Neighborhood Attention Transformer" (2204.07143), and Hassani & Shi 2022, dilated (2209.15001); Ho
et al. 2019, "Axial Attention" (1912.12180); Huang et al. 2019, "CCNet" (1811.11721). The idea: let
each position see few others, chosen by where they lie, and reach the rest through a second layer.
Interlaced attention, the sixth of the family, is in `attnlab.interlaced`.

What differs from the papers: no relative position bias; all but criss-cross attention have the
projections of `MultiHeadAttention`; what a map is padded with is masked.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn

from attnlab.interlaced import InterlacedSparseAttention as InterlacedSparseAttention
from attnlab.kernels import check_impl, scores_of
from attnlab.layers import check_map, pair
from attnlab.official import PAM, renaming
from attnlab.probe import Probe
from attnlab.sparse_blocks import (
    Axis,
    block_attention,
    check_grids,
    dense_map,
    dense_mask,
    dense_stages,
    neighbors,
    windows,
)

BLOCK = 8  # side of a block of queries in neighbourhood attention; measured, not critical


def criss_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float = 1.0,
    probe: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """One softmax over a position's row and column, itself counted once (CCNet, Sec. 3.2).

    Args:
        q, k, v: `(B, heads, H, W, d)`; the width of `v` may differ.
        scale: factor of the scores; the paper has none.
        probe: what the weights `(B, heads, N, W + H)` pass through: the keys of the row from left
            to right, then those of the column from top to bottom, with 0 at the position itself.

    Returns:
        `(B, heads, H, W, dv)`. Time and memory grow with N · (H + W).

    Raises:
        ValueError: q, k and v are no such maps of one size.
    """
    check_grids(q.shape[2:-1], q=q, k=k, v=v)
    height, width = q.shape[2:4]
    transposed = "b n h w d -> b n w h d"
    q_col, k_col, v_col = (rearrange(x, transposed) for x in (q, k, v))
    once = torch.eye(height, dtype=torch.bool, device=q.device)
    by_row = scores_of(q, k, None, scale)  # (B, heads, H, W, W)
    by_col = rearrange(scores_of(q_col, k_col, ~once, scale), transposed)  # (B, heads, H, W, H)
    weights = torch.cat([by_row, by_col], dim=-1).softmax(dim=-1)
    if probe is not None:
        weights = probe(rearrange(weights, "b n h w m -> b n (h w) m"))
        weights = rearrange(weights, "b n (h w) m -> b n h w m", h=height)
    of_row, of_col = weights.to(v.dtype).split([width, height], dim=-1)
    return of_row @ v + rearrange(rearrange(of_col, transposed) @ v_col, transposed)


class _BlockAttention(nn.Module):
    """Multi-head attention on a map, the projections being those of `MultiHeadAttention`.

    What a position sees is said by `axes`, which a subclass defines.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, impl: str):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim={dim}: expected a multiple of num_heads={num_heads}")
        check_impl(impl)
        self.num_heads = num_heads
        self.impl = impl
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_probe = Probe()
        self.proj = nn.Linear(dim, dim)

    def axes(self, height: int, width: int, device=None, block: int = 1) -> tuple[Axis, Axis]:
        """How the rows and the columns of a map are cut (`attnlab.sparse_blocks`)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """`(B, dim, H, W)` → the same shape."""
        check_map(x, self.proj.in_features)
        block = 1 if self.impl == "explicit" else BLOCK
        rows, cols = self.axes(*x.shape[2:], x.device, block)
        qkv = self.qkv(rearrange(x, "b c h w -> b h w c"))
        heads = "b h w (three n d) -> three b n h w d"
        q, k, v = rearrange(qkv, heads, three=3, n=self.num_heads)
        out = block_attention(q, k, v, rows, cols, impl=self.impl, probe=self.attn_probe)
        out = self.proj(rearrange(out, "b n h w d -> b h w (n d)"))
        return rearrange(out, "b h w c -> b c h w")

    def dense_mask(self, shape: tuple[int, int]) -> Tensor:
        """Which keys each position of an `(H, W)` map sees: `(N, N)` bool, True = attend."""
        return dense_mask(*self.axes(*shape))

    def dense_map(self, map: Tensor, shape: tuple[int, int]) -> Tensor:
        """A recorded map, `(B, heads, blocks, queries, keys)` → `(B, heads, N, N)`."""
        return dense_map(map, *self.axes(*shape, map.device))


class WindowAttention(_BlockAttention):
    """Attention within windows of the map (Swin, Sec. 3.2). `(B, dim, H, W)` → the same shape.

    Alternate layers without and with a shift of half a window: without, windows never mix. Costs
    2 · N · window² · dim multiply-accumulates, beside the projections.

    Args:
        window_size: side, or (height, width). An axis that is no longer is one window. What is left
            over at the right and at the bottom is a smaller window: padding is masked.
        num_heads: of width dim / num_heads, scale 1/√width.
        shift_size: by how much windows are shifted, cyclically, less than `window_size`. A mask
            keeps the regions apart that meet in a window without being neighbours.

    Raises:
        ValueError: a size or a shift that does not fit, and what `MultiHeadAttention` raises.
    """

    def __init__(
        self,
        dim: int,
        window_size: int | tuple[int, int] = 7,
        num_heads: int = 8,
        shift_size: int | tuple[int, int] = 0,
        qkv_bias: bool = True,
        impl: str = "auto",
    ):
        super().__init__(dim, num_heads, qkv_bias, impl)
        self.window_size, self.shift_size = pair(window_size), pair(shift_size)
        if min(self.window_size) < 1:
            raise ValueError(f"window_size={window_size}: expected at least 1")
        if not all(0 <= s < w for s, w in zip(self.shift_size, self.window_size, strict=True)):
            raise ValueError(f"shift_size={shift_size}: expected 0 ≤ shift < {window_size}")

    def axes(self, height: int, width: int, device=None, block: int = 1) -> tuple[Axis, Axis]:
        return tuple(
            windows(*sizes, device)
            for sizes in zip((height, width), self.window_size, self.shift_size, strict=True)
        )


class DilatedAttention(_BlockAttention):
    """Attention to kernel_size² positions, `dilation` apart (DiNAT). `(B, dim, H, W)` → the same.

    A position sees the neighbourhood around it on the lattice of the positions that have its row
    and its column modulo `dilation`. Near the border the neighbourhood is moved inside: always
    exactly kernel_size² keys, over a span of dilation · (kernel_size − 1) + 1.

    Raises:
        ValueError: an even `kernel_size`, a `dilation` below 1, a map with a side below
            kernel_size · dilation, and what `MultiHeadAttention` raises.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 7,
        dilation: int = 2,
        num_heads: int = 8,
        qkv_bias: bool = True,
        impl: str = "auto",
    ):
        super().__init__(dim, num_heads, qkv_bias, impl)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size}: expected an odd number, at least 1")
        if dilation < 1:
            raise ValueError(f"dilation={dilation}: expected at least 1")
        self.kernel_size, self.dilation = kernel_size, dilation

    def axes(self, height: int, width: int, device=None, block: int = 1) -> tuple[Axis, Axis]:
        span = self.kernel_size * self.dilation
        if min(height, width) < span:
            raise ValueError(
                f"x of {height}×{width} positions: expected at least {span}×{span}, so that each "
                f"sees kernel_size²={self.kernel_size**2} at dilation={self.dilation}"
            )
        sizes = self.kernel_size, self.dilation, block, device
        return neighbors(height, *sizes), neighbors(width, *sizes)


class NeighborhoodAttention(DilatedAttention):
    """Attention to the kernel_size × kernel_size positions around (NAT, Sec. 3.2), dilation 1.

    `(B, dim, H, W)` → the same shape. Unlike a window it is centered at every position, and unlike
    a convolution it is not padded: at the border its center is clamped.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 7,
        num_heads: int = 8,
        qkv_bias: bool = True,
        impl: str = "auto",
    ):
        super().__init__(dim, kernel_size, 1, num_heads, qkv_bias, impl)


class AxisAttention(_BlockAttention):
    """Attention along one axis: `axis="row"` sees the W positions of its row, "column" the H of its
    column. `(B, dim, H, W)` → the same shape. `ValueError` for another `axis`.
    """

    def __init__(
        self,
        dim: int,
        axis: str = "row",
        num_heads: int = 8,
        qkv_bias: bool = True,
        impl: str = "auto",
    ):
        super().__init__(dim, num_heads, qkv_bias, impl)
        if axis not in ("row", "column"):
            raise ValueError(f"axis={axis!r}: expected row or column")
        self.axis = axis

    def axes(self, height: int, width: int, device=None, block: int = 1) -> tuple[Axis, Axis]:
        cell = (1, width) if self.axis == "row" else (height, 1)
        return windows(height, cell[0], device=device), windows(width, cell[1], device=device)


class AxialAttention(nn.Module):
    """Attention along the rows, then along the columns (Ho et al., Sec. 3.1).

    `(B, dim, H, W)` → the same shape. Two layers with weights of their own and two softmaxes; there
    is exactly one path between any two positions. Costs 2 · N · (H + W) · dim multiply-accumulates,
    beside the projections, and has 8 · dim² + 8 · dim parameters.

    Args:
        order: "row_first", "column_first", or "sum" of both on the same input (which reaches only
            the criss-cross).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        order: str = "row_first",
        qkv_bias: bool = True,
        impl: str = "auto",
    ):
        super().__init__()
        if order not in ("row_first", "column_first", "sum"):
            raise ValueError(f"order={order!r}: expected row_first, column_first or sum")
        self.order = order
        self.row = AxisAttention(dim, "row", num_heads, qkv_bias, impl)
        self.column = AxisAttention(dim, "column", num_heads, qkv_bias, impl)

    @property
    def stages(self) -> tuple[nn.Module, nn.Module]:
        """Both layers, in the order in which they are applied."""
        layers = (self.row, self.column)
        return layers[::-1] if self.order == "column_first" else layers

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.stages
        return first(x) + second(x) if self.order == "sum" else second(first(x))

    def dense_mask(self, shape: tuple[int, int]) -> Tensor:
        """The masks of both stages, `(2, N, N)`; each stage is one attention under its own."""
        return torch.stack([stage.dense_mask(shape) for stage in self.stages])

    def dense_map(self, map: tuple[Tensor, Tensor], shape: tuple[int, int]) -> Tensor:
        """The recorded maps of both stages, composed (in a sum: averaged): `(B, 1, N, N)`."""
        first, second = dense_stages(self.stages, map, shape)
        return (first + second) / 2 if self.order == "sum" else second @ first


class CrissCrossAttention(nn.Module):
    """x + γ · attention to the own row and column, `recurrence` times (CCNet, Sec. 3.2 and 3.3).

    `(B, channels, H, W)` → the same shape. One joint softmax over H + W − 1 keys, no 1/√d, γ = 0 at
    first: the identity. Twice, with the same weights, reaches every position from every other.

    Args:
        channels: C, also the width of the values.
        key_channels: width of queries and keys; C/8 by default.
        recurrence: R; adds no parameters.
        impl: there is one form, which makes N · (H + W) weights; "explicit" shows them.

    Raises:
        ValueError: channels that are no multiple of 8 where `key_channels` is not given, a
            `recurrence` below 1, an unknown `impl`, an input of another shape.
    """

    def __init__(
        self,
        channels: int,
        key_channels: int | None = None,
        recurrence: int = 2,
        impl: str = "auto",
    ):
        super().__init__()
        if key_channels is None and (channels < 8 or channels % 8):
            raise ValueError(f"channels={channels}: expected a multiple of 8, or key_channels=")
        if recurrence < 1:
            raise ValueError(f"recurrence={recurrence}: expected at least 1")
        check_impl(impl)
        key_channels = key_channels or channels // 8
        self.recurrence = recurrence
        self.impl = impl
        self.query = nn.Conv2d(channels, key_channels, 1)
        self.key = nn.Conv2d(channels, key_channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.attn_probe = Probe()
        self.register_load_state_dict_pre_hook(renaming(PAM))  # CCNet's code has DANet's names

    def forward(self, x: Tensor) -> Tensor:
        check_map(x, self.value.in_channels)
        for _ in range(self.recurrence):
            x = x + self.gamma * self._attend(x)
        return x

    def _attend(self, x: Tensor) -> Tensor:
        layers = self.query, self.key, self.value
        q, k, v = (rearrange(layer(x), "b c h w -> b 1 h w c") for layer in layers)
        probe = self.attn_probe if self.impl == "explicit" else None
        return rearrange(criss_cross_attention(q, k, v, probe=probe), "b 1 h w c -> b c h w")

    def dense_mask(self, shape: tuple[int, int]) -> Tensor:
        """Which keys each position of an `(H, W)` map sees in one pass: `(N, N)` bool."""
        row, col = _rows_and_columns(*shape)
        return (row[:, None] == row) | (col[:, None] == col)

    def dense_map(self, map: Tensor, shape: tuple[int, int]) -> Tensor:
        """A recorded map, `(B, 1, N, W + H)` → `(B, 1, N, N)`."""
        height, width = shape
        row, col = _rows_and_columns(height, width, map.device)
        in_row = row[:, None] * width + torch.arange(width, device=map.device)
        in_col = col[:, None] + width * torch.arange(height, device=map.device)
        keys = torch.cat([in_row, in_col], dim=1).expand_as(map)  # itself twice, once with 0
        return map.new_zeros(*map.shape[:2], len(row), len(row)).scatter_add(-1, keys, map)


def _rows_and_columns(height: int, width: int, device=None) -> tuple[Tensor, Tensor]:
    """Row and column of each of the N positions."""
    position = torch.arange(height * width, device=device)
    return position.div(width, rounding_mode="floor"), position % width
