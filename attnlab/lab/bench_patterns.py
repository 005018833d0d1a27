"""The sparse patterns of chapter 05 as cases of the benchmark suite.

"explicit" is full attention under the pattern's mask, "blocks" has the weights of its blocks.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from einops import rearrange
from timm.models.swin_transformer import WindowAttention as SwinAttention
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor, nn

from attnlab.attention import scaled_dot_product_attention
from attnlab.lab.bench_case import CHANNELS, HEADS, WIDTH, Case, feature_map, perturbed, with_impl
from attnlab.sparse import CrissCrossAttention, WindowAttention, criss_cross_attention
from attnlab.sparse_blocks import block_attention, dense_mask, neighbors, residues, windows


def window_axes(H: int, W: int, device=None, size: int = 8, shift: int = 0) -> list:
    return [tuple(windows(length, size, shift, device) for length in (H, W))]


def neighborhood_axes(H: int, W: int, device=None, block: int = 8, dilation: int = 1) -> list:
    return [tuple(neighbors(length, 7, dilation, block, device) for length in (H, W))]


def axial_axes(H: int, W: int, device=None) -> list:
    row, column = windows(H, 1, device=device), windows(W, 1, device=device)
    return [(row, windows(W, W, device=device)), (windows(H, H, device=device), column)]


def interlaced_axes(H: int, W: int, device=None, cell: int | None = None) -> list:
    """Cells of P×P; by default P² = √N, where its cost is least."""
    cell = cell or max(round((H * W) ** 0.25), 1)
    long_range = tuple(residues(length, cell, device=device) for length in (H, W))
    return [long_range, *window_axes(H, W, device, cell)]


def attend_in_stages(q, k, v, axes: Callable[..., list], impl: str = "auto") -> Tensor:
    """`(B, heads, H, W, d)` each → the same; a stage's output is the next one's values."""
    for rows, cols in axes(*q.shape[2:4], q.device):
        v = block_attention(q, k, v, rows, cols, impl=impl)
    return v


def _attend_under_masks(q, k, v, masks: list[Tensor], scale: float | None = None) -> Tensor:
    height = q.shape[2]
    q, k, v = (rearrange(x, "b n h w d -> b n (h w) d") for x in (q, k, v))
    for mask in masks:
        v = scaled_dot_product_attention(q, k, v, mask=mask, scale=scale, impl="explicit")
    return rearrange(v, "b n (h w) d -> b n h w d", h=height)


def pattern(axes: Callable[..., list], N: int, form: str) -> Case:
    """A bare pattern on a map of width 128, in four heads."""
    H = W = math.isqrt(N)
    tensors = tuple(torch.randn(1, HEADS, H, W, WIDTH) for _ in range(3))
    if form == "explicit":
        masks = [dense_mask(*stage) for stage in axes(H, W)]
        return Case(partial(_attend_under_masks, masks=masks), tensors)
    impl = "explicit" if form == "blocks" else form
    return Case(partial(attend_in_stages, axes=axes, impl=impl), tensors)


def neighborhood(N: int, form: str, dilation: int = 1) -> Case:
    """7×7. Explicit weights have a block to each query, the fast form 8×8 queries to a block."""
    block = 1 if form == "blocks" else 8
    return pattern(partial(neighborhood_axes, block=block, dilation=dilation), N, form)


window = partial(pattern, window_axes)
dilated = partial(neighborhood, dilation=2)
axial = partial(pattern, axial_axes)
interlaced = partial(pattern, interlaced_axes)


def criss_cross(N: int, form: str) -> Case:
    """One head, queries and keys an eighth of the values, as in the paper."""
    H = W = math.isqrt(N)
    widths = (CHANNELS // 8, CHANNELS // 8, CHANNELS)
    tensors = tuple(torch.randn(1, 1, H, W, width) for width in widths)
    if form == "explicit":
        mask = CrissCrossAttention(8).dense_mask((H, W))
        return Case(partial(_attend_under_masks, masks=[mask], scale=1.0), tensors)
    return Case(criss_cross_attention, tensors)


def window_block(N: int, form: str) -> Case:
    """Swin's attention, whose position bias is 0 here: ours has none."""
    size, (H, W) = 8, feature_map(N, 1).shape[2:]
    ours, x = perturbed(WindowAttention(CHANNELS, size, HEADS)), feature_map(N)
    theirs = SwinAttention(CHANNELS, HEADS, window_size=size)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    nn.init.zeros_(theirs.relative_position_bias_table)

    def swin(x: Tensor) -> Tensor:
        tokens = window_partition(rearrange(x, "b c h w -> b h w c"), (size, size))
        out = theirs(tokens.flatten(1, 2)).unflatten(1, (size, size))
        return rearrange(window_reverse(out, (size, size), H, W), "b h w c -> b c h w")

    return Case(swin, (x,), theirs) if form == "timm" else Case(with_impl(ours, form), (x,), ours)
