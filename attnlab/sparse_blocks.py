"""Attention in which each position of a map sees few others, and pays for no more (chapter 05).

The idea: cut the map into blocks of queries, gather for each block the keys that any of its queries
sees, and attend within the blocks; what a single query does not see is masked. Windows, rows,
columns, strided groups and neighbourhoods differ only in how *one axis* is cut: a block of the map
is a block of rows times a block of columns. No N×N matrix is made, neither of weights nor of masks.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from attnlab.attention import attention_weights, scaled_dot_product_attention


class Axis(NamedTuple):
    """One axis of a map in T blocks of t queries, each with L keys.

    Attributes:
        length: number of positions on the axis.
        queries: `(T, t)`, a permutation of 0 … T·t − 1; positions from `length` on are padding.
        keys: `(T, L)` positions; those from `length` on are padding.
        allowed: `(T, t, L)`, True where the query sees the key; None: everywhere.
        in_order: whether queries and keys both are 0 … length − 1, and need no gathering.
    """

    length: int
    queries: Tensor
    keys: Tensor
    allowed: Tensor | None = None
    in_order: bool = False


def windows(length: int, size: int, shift: int = 0, device: torch.device | None = None) -> Axis:
    """Position i sees j in its own cell: (i − shift) // size = (j − shift) // size.

    The cells are cut after a cyclic shift (Swin), so that the last block holds two regions that are
    no neighbours, and a mask keeps them apart. An axis no longer than `size` is one cell.
    """
    if length <= size:
        size, shift = length, 0
    count = -(-length // size)
    cells = (torch.arange(count * size, device=device) + shift) % (count * size)
    cells = rearrange(cells, "(t u) -> t u", u=size)
    if shift == 0 and count * size == length:
        return Axis(length, cells, cells, in_order=True)
    region = (cells - shift).div(size, rounding_mode="floor")
    allowed = (region[:, :, None] == region[:, None]) & (cells < length)[:, None]
    return Axis(length, cells, cells, allowed)


def residues(length: int, step: int, offset: int = 0, device: torch.device | None = None) -> Axis:
    """Position i sees every `step`-th one: (i + offset) mod step = (j + offset) mod step."""
    each = -(-length // step)
    places = torch.arange(step, device=device)[:, None] + step * torch.arange(each, device=device)
    places = (places - offset) % (step * each)
    if step * each == length:
        return Axis(length, places, places, in_order=step in (1, length) and offset == 0)
    allowed = (places < length)[:, None].expand(-1, each, -1)
    return Axis(length, places, places, allowed)


def neighbors(
    length: int, size: int, dilation: int = 1, block: int = 8, device: torch.device | None = None
) -> Axis:
    """Position i sees `size` positions around it, `dilation` apart, and never leaves the map.

    On the lattice of the positions of the same remainder, m = i // dilation sees the positions
    from clamp(m − size // 2, 0, n − size) on, n being the lattice's length (NAT, DiNAT).

    Args:
        block: queries of a block, which share size + block − 1 keys; with 1, exactly `size`.
    """
    lattice = torch.arange(dilation, device=device)[:, None, None]
    own = (length - lattice + dilation - 1) // dilation  # n, of each lattice
    longest = -(-length // dilation)
    count = -(-longest // block)
    m = rearrange(torch.arange(count * block, device=device), "(t u) -> t u", u=block)
    first = torch.minimum((m - size // 2).clamp(min=0), own - size)  # (dilation, t, u)
    near = first[..., :1] + torch.arange(min(block + size - 1, longest), device=device)
    inside = near[..., None, :] - first[..., None]
    flat = "dilation t u -> (dilation t) u"
    return Axis(
        length,
        rearrange(lattice + dilation * m, flat),
        rearrange(lattice + dilation * near, flat),
        rearrange((inside >= 0) & (inside < size), "dilation t u l -> (dilation t) u l"),
    )


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Axis,
    cols: Axis,
    *,
    scale: float | None = None,
    impl: str = "auto",
    probe: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Attention of each position to the keys that its row sees on `rows` and its column on `cols`.

    Args:
        q, k, v: `(B, heads, H, W, d)`; the width of `v` may differ.
        rows, cols: how the H rows and the W columns are cut.
        scale, impl: as in `attnlab.attention.scaled_dot_product_attention`.
        probe: what the weights `(B, heads, blocks, queries, keys)` of impl="explicit" pass through.

    Returns:
        `(B, heads, H, W, dv)`. Equal to dense attention under `dense_mask(rows, cols)`; time and
        memory grow with the number of queries times the keys of a block.

    Raises:
        ValueError: q, k or v is no such map of `rows.length` × `cols.length` positions.
    """
    check_grids((rows.length, cols.length), q=q, k=k, v=v)
    batch = len(q)
    q = _cut(q, rows, cols, "queries")  # (blocks, B·heads, queries, d)
    k, v = _cut(k, rows, cols, "keys"), _cut(v, rows, cols, "keys")
    mask = _additive(_block_mask(rows, cols), q.dtype)
    if impl == "explicit":
        weights = attention_weights(q, k, mask=mask, scale=scale)
        weights = rearrange(weights, "t (b n) i j -> b n t i j", b=batch)
        weights = weights if probe is None else probe(weights)
        out = rearrange(weights, "b n t i j -> t (b n) i j").to(v.dtype) @ v
    else:
        out = scaled_dot_product_attention(q, k, v, mask=mask, scale=scale, impl=impl)
    return _join(out, rows, cols, batch)


def dense_mask(rows: Axis, cols: Axis) -> Tensor:
    """Which keys each query sees, `(N, N)`, True = attend; positions are in row-major order."""
    mask = _block_mask(rows, cols)
    if mask is None:
        mask = torch.ones((), dtype=torch.bool, device=rows.keys.device)
    blocks, queries, keys = _sizes(rows, cols)
    return dense_map(mask.expand(1, 1, blocks, queries, keys), rows, cols)[0, 0]


def dense_map(map: Tensor, rows: Axis, cols: Axis) -> Tensor:
    """Weights of blocks, `(B, heads, blocks, queries, keys)`, as `(B, heads, N, N)`."""
    tokens = rows.length * cols.length
    queries, keys = _flat(rows, cols, "queries"), _flat(rows, cols, "keys")
    dense = map.new_zeros(*map.shape[:2], tokens + 1, tokens + 1)  # one place for the padding
    dense[:, :, queries[:, :, None], keys[:, None, :]] = map
    return dense[:, :, :tokens, :tokens]


def dense_stages(stages: Sequence[nn.Module], maps: Sequence[Tensor], shape) -> list[Tensor]:
    """The recorded map of each stage, dense and averaged over its heads: `(B, 1, N, N)`."""
    pairs = zip(stages, maps, strict=True)
    return [stage.dense_map(map, shape).mean(1, keepdim=True) for stage, map in pairs]


def check_grids(size: tuple[int, ...], **tensors: Tensor) -> None:
    """`ValueError` when one of the tensors is not `(B, heads, *size, width)`."""
    for name, x in tensors.items():
        if x.ndim != 5 or tuple(x.shape[2:4]) != tuple(size):
            grid = ", ".join(map(str, size))
            raise ValueError(f"{name} {tuple(x.shape)}: expected (B, heads, {grid}, width)")


def _sizes(rows: Axis, cols: Axis) -> tuple[int, int, int]:
    """Number of blocks, of queries of a block, of keys of a block."""
    queries, keys = rows.queries.shape[1] * cols.queries.shape[1], rows.keys.shape[1]
    return len(rows.keys) * len(cols.keys), queries, keys * cols.keys.shape[1]


def _cut(x: Tensor, rows: Axis, cols: Axis, which: str) -> Tensor:
    """`(B, heads, H, W, d)` → `(blocks, B·heads, positions of a block, d)`."""
    for dim, axis in ((2, rows), (3, cols)):
        if not axis.in_order:
            places = getattr(axis, which).flatten()
            x = x.index_select(dim, places.clamp(max=axis.length - 1))
    pattern = "b n (r u) (c v) d -> (r c) (b n) (u v) d"
    return rearrange(x, pattern, r=len(rows.queries), c=len(cols.queries))


def _join(x: Tensor, rows: Axis, cols: Axis, batch: int) -> Tensor:
    """What `_cut` did to the queries, undone: padding is cropped."""
    pattern = "(r c) (b n) (u v) d -> b n (r u) (c v) d"
    x = rearrange(x, pattern, r=len(rows.queries), u=rows.queries.shape[1], b=batch,
                  v=cols.queries.shape[1])  # fmt: skip
    for dim, axis in ((2, rows), (3, cols)):
        if not axis.in_order:
            x = x.index_select(dim, axis.queries.flatten().argsort()[: axis.length])
    return x


def _block_mask(rows: Axis, cols: Axis) -> Tensor | None:
    """`(blocks, queries, keys)` bool, or None where every query sees all keys of its block."""
    if rows.allowed is None and cols.allowed is None:
        return None
    by_row, by_col = (
        axis.queries.new_ones((*axis.queries.shape, axis.keys.shape[1]), dtype=torch.bool)
        if axis.allowed is None
        else axis.allowed
        for axis in (rows, cols)
    )
    by_row = rearrange(by_row, "r u l -> r 1 u 1 l 1")
    by_col = rearrange(by_col, "c v m -> 1 c 1 v 1 m")
    return rearrange(by_row & by_col, "r c u v l m -> (r c) (u v) (l m)")


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`(blocks, 1, queries, keys)`, −∞ where the mask is False.

    PyTorch's kernel would make a copy of a Boolean mask for every head.
    """
    if mask is None:
        return None
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)[:, None]


def _flat(rows: Axis, cols: Axis, which: str) -> Tensor:
    """`(blocks, positions)`: row · W + column, and N for padding."""
    row = rearrange(getattr(rows, which), "r u -> r 1 u 1")
    col = rearrange(getattr(cols, which), "c v -> 1 c 1 v")
    padding = (row >= rows.length) | (col >= cols.length)
    flat = (row * cols.length + col).masked_fill(padding, rows.length * cols.length)
    return rearrange(flat, "r c u v -> (r c) (u v)")
