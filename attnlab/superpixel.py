"""Superpixels on a fixed grid: the operators of soft, local assignment (chapter 10).

Papers: Jampani et al. 2018, "Superpixel Sampling Networks" (SSN); Mei et al. 2024, "SPFormer". The
idea: cut a map of h×w pixels into Sh×Sw square cells of side s. Every cell has one superpixel, and
a pixel may belong, softly, to the nine superpixels of its own cell and the cells around it. Nothing
is searched for and the grid never moves, so that every step is a small, differentiable product.

Layouts, for M heads:
  cells   `(B, M, Sh, Sw, s², d)`   the pixels, by cell, in row-major order inside of it
  grid    `(B, M, Sh, Sw, d)`       the superpixels
  slots   `(B, M, Sh, Sw, s², 9)`   one number for a pixel and each of its nine superpixels; slot
                                    3 (dy + 1) + dx + 1 is that of the cell at offset (dy, dx), and
                                    slot 4 that of the pixel's own cell
A slot outside of the grid is absent: −∞ as a logit and 0 as a weight.

What differs from the papers: pixels are never unfolded. Superpixels are copied nine times
(`gather9`), which is cheap, and what pixels give is added up per cell first (`fold9`, its adjoint).
"""

import math
from functools import reduce

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from attnlab.attention import scaled_dot_product_attention

IMPLS = ("auto", "explicit", "fused")
OFFSETS = tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1))  # of slots 0 … 8


def to_cells(x: Tensor, side: int) -> Tensor:
    """Cut a map into square cells: `(..., d, h, w)` → `(..., Sh, Sw, s², d)`, with s = `side`.

    Raises:
        ValueError: h or w is no multiple of `side`.
    """
    if x.ndim < 3 or side < 1 or x.shape[-2] % side or x.shape[-1] % side:
        raise ValueError(f"x {tuple(x.shape)}: expected (..., d, h, w), multiples of side={side}")
    return rearrange(x, "... d (y i) (x j) -> ... y x (i j) d", i=side, j=side)


def from_cells(cells: Tensor) -> Tensor:
    """The inverse of `to_cells`: `(..., Sh, Sw, s², d)` → `(..., d, h, w)`."""
    return rearrange(cells, "... y x (i j) d -> ... d (y i) (x j)", i=cell_side(cells))


def cell_side(slots: Tensor) -> int:
    """The side s of cells `(..., s², d)`, or of slots `(..., s², 9)`."""
    return math.isqrt(slots.shape[-2])


def gather9(grid: Tensor) -> Tensor:
    """Every cell's nine superpixels: `(..., Sh, Sw, d)` → `(..., Sh, Sw, 9, d)`, 0 when absent."""
    height, width = grid.shape[-3:-1]
    padded = F.pad(grid, (0, 0, 1, 1, 1, 1))
    near = [padded[..., 1 + y : 1 + y + height, 1 + x : 1 + x + width, :] for y, x in OFFSETS]
    return torch.stack(near, dim=-2)


def fold9(slots: Tensor) -> Tensor:
    """The adjoint of `gather9`: `(..., Sh, Sw, 9, d)` → `(..., Sh, Sw, d)`.

    Slot k of a cell is added to the superpixel at offset k from it; what lies outside is dropped.
    """
    return reduce(torch.add, [_shift(slot, k, 0.0) for k, slot in enumerate(slots.unbind(-2))])


def turn_around(slots: Tensor, fill: float = 0.0) -> Tensor:
    """What pixels hold about superpixels, as superpixels see it, and back: the same shape.

    `(..., Sh, Sw, s², 9)`: before, the last axis is about the superpixels around a pixel's cell.
    After, row (y, x) is a superpixel's, and the last two axes are the pixels of the nine cells
    around it, its window; absent ones hold `fill`. Turning twice gives back what is not absent.
    """
    turned = [_shift(slot, k, fill) for k, slot in enumerate(slots.unbind(-1))]
    return torch.stack(turned[::-1], dim=-1)


def valid9(height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """Which slots lie inside the grid: bool `(height, width, 9)`; 4 in a corner, 6 at an edge."""
    return gather9(torch.ones(height, width, 1, device=device))[..., 0] > 0


def neighbors9(height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """Which superpixel, in row-major order, each slot is: int64 `(height, width, 9)`, or −1."""
    index = torch.arange(1, height * width + 1, device=device)
    return gather9(rearrange(index, "(y x) -> y x 1", y=height))[..., 0] - 1


def mask_absent(logits: Tensor) -> Tensor:
    """At least float32, and −∞ where the neighbour is absent."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.masked_fill(~valid9(*logits.shape[-4:-2], logits.device)[:, :, None], -math.inf)


def local_logits(pixels: Tensor, superpixels: Tensor, scale: float | None = None) -> Tensor:
    """Scaled dot product of every pixel with its nine superpixels: the logits of both directions.

    Args:
        pixels: cells, `(..., Sh, Sw, s², d)`.
        superpixels: grid, `(..., Sh, Sw, d)`.
        scale: 1/√d by default.

    Returns:
        Slots, `(..., Sh, Sw, s², 9)`, at least float32; −∞ where a neighbour is absent.

    Raises:
        ValueError: the shapes do not fit.
    """
    if pixels.shape[:-2] != superpixels.shape[:-1] or pixels.shape[-1] != superpixels.shape[-1]:
        shapes = f"pixels {tuple(pixels.shape)}, superpixels {tuple(superpixels.shape)}"
        raise ValueError(f"{shapes}: expected (..., Sh, Sw, s², d) and (..., Sh, Sw, d)")
    scale = pixels.shape[-1] ** -0.5 if scale is None else scale
    return mask_absent(pixels @ gather9(superpixels * scale).mT)


def spread(weights: Tensor, superpixels: Tensor) -> Tensor:
    """Σ_p w(i, p) S(p) at every pixel i: slots and grid `(..., Sh, Sw, d)` → cells."""
    return weights.to(superpixels.dtype) @ gather9(superpixels)


def collect(weights: Tensor, pixels: Tensor) -> Tensor:
    """Σ_i w(i, p) I(i) at every superpixel p: slots and cells → grid `(..., Sh, Sw, d)`.

    The adjoint of `spread`. The sum is over the pixels that see p, up to 9s² of them.
    """
    return fold9(weights.to(pixels.dtype).mT @ pixels)


def collect_means(weights: Tensor, pixels: Tensor, otherwise: Tensor | None = None) -> Tensor:
    """Σ_i w(i, p) x_i / Σ_i w(i, p); `otherwise` where no pixel belongs to p."""
    total = collect(weights, torch.ones_like(pixels[..., :1]))
    means = collect(weights, pixels) / total.clamp_min(torch.finfo(total.dtype).tiny)
    return means if otherwise is None else torch.where(total > 0, means, otherwise)


def p2s_weights(logits: Tensor) -> Tensor:
    """Softmax over every superpixel's window, as the superpixel sees it (SPFormer, P2S).

    Slots `(..., Sh, Sw, s², 9)` of logits, one per pixel → `(..., Sh, Sw, s²·9)`: a row for each
    superpixel, over the s² pixels of its nine cells, that sums to 1 (see `turn_around`).
    """
    return turn_around(logits, -math.inf).flatten(-2).softmax(-1)


def p2s_attend(logits: Tensor, values: Tensor, impl: str = "auto") -> Tensor:
    """Pixels update superpixels: Σ_i softmax_{i ∈ W_p}(L(i, p)) v(i), over p's window W_p.

    Args:
        logits: slots, `(..., Sh, Sw, s², 9)`, of `local_logits`.
        values: cells, `(..., Sh, Sw, s², dv)`.
        impl: "explicit" has the windows' weights, of `p2s_weights`; "fused" never normalises a
            weight: it adds up exp(L − m) and exp(L − m) v, with m the window's maximum, and
            divides the two sums. One maximum for all superpixels would not do: where a window's
            logits are far below it, its sum would be 0. "auto" is the faster one, "fused".

    Returns:
        The grid `(..., Sh, Sw, dv)`, in the dtype of `values`.

    Raises:
        ValueError: unknown `impl`, or `logits` that do not fit `values`.
    """
    check_impl(impl)
    _check_slots(logits, values)
    if impl == "explicit":
        weights = p2s_weights(logits).unflatten(-1, (-1, 9))
        return collect(turn_around(weights), values)
    with torch.no_grad():  # any m gives the same result, so it needs no gradient
        highest = turn_around(logits.amax(-2, keepdim=True), -math.inf).amax((-2, -1))
        highest = gather9(highest[..., None])[..., 0]  # (..., Sh, Sw, 9)
    terms = (logits - highest[..., None, :]).exp()
    total = fold9(terms.sum(-2)[..., None])
    return (collect(terms, values) / total).to(values.dtype)


def unfolded_p2s(
    queries: Tensor, keys: Tensor, values: Tensor, side: int, num_heads: int = 1
) -> Tensor:
    """The same by `F.unfold`: short to read, but it copies every pixel nine times.

    Args:
        queries: of superpixels, `(B, C, Sh, Sw)`.
        keys, values: of pixels, `(B, C, h, w)` and `(B, D, h, w)`, with h = s·Sh, w = s·Sw.
        side: s.

    Returns:
        `(B, D, Sh, Sw)`.
    """

    def windows(x: Tensor, layout: str, **sizes: int) -> Tensor:
        x = F.unfold(x, 3 * side, padding=side, stride=side)  # (B, C·9s², Sh·Sw)
        return rearrange(x, layout, **sizes)

    split = "b (m d n) p -> b m p n d", {"m": num_heads, "n": 9 * side**2}
    keys_there = windows(torch.ones_like(keys[:1, :1]), "1 n p -> p 1 n") > 0
    q = rearrange(queries, "b (m d) y x -> b m (y x) 1 d", m=num_heads)
    k, v = (windows(x, split[0], **split[1]) for x in (keys, values))
    out = scaled_dot_product_attention(q, k, v, mask=keys_there, impl="explicit")
    return rearrange(out, "b m (y x) 1 d -> b (m d) y x", y=queries.shape[2])


def expand(values: Tensor, logits: Tensor, scale: int = 1, mode: str = "cell") -> Tensor:
    """Superpixels to pixels, I(i) = Σ_{p ∈ N_i} Q(i, p) S(p) with Q = softmax(logits) (Eq. 1).

    Args:
        values: anything per superpixel (features, class logits, one-hot labels), `(B, C, Sh, Sw)`;
            head m spreads the m-th part of the channels.
        logits: slots, `(B, M, Sh, Sw, s², 9)`.
        scale, mode: first resize the association, see `upsample_association`.

    Returns:
        `(B, C, h·scale, w·scale)`.

    Raises:
        ValueError: the grids differ, or C is no multiple of M.
    """
    heads = logits.shape[1]
    if values.ndim != 4 or values.shape[1] % heads or values.shape[2:] != logits.shape[2:4]:
        shapes = f"values {tuple(values.shape)}, logits {tuple(logits.shape)}"
        raise ValueError(f"{shapes}: expected (B, C, Sh, Sw), C a multiple of M, and slots of M")
    grid = rearrange(values, "b (m d) y x -> b m y x d", m=heads)
    weights = upsample_association(logits, scale, mode).softmax(-1)
    return from_cells(spread(weights, grid)).flatten(1, 2)


def merge_heads(logits: Tensor) -> Tensor:
    """One association of several heads': slots of M heads → of one, `(B, 1, Sh, Sw, s², 9)`.

    Σ_m L_m / √M: what one head of the full width M·d, with its scale 1/√(M·d), would have.
    """
    return logits.sum(1, keepdim=True) * logits.shape[1] ** -0.5


def upsample_association(logits: Tensor, scale: int, mode: str = "cell") -> Tensor:
    """Bilinear resizing of logits to finer pixels: slots of s² pixels → of (s·scale)² pixels.

    Args:
        logits: slots, `(B, M, Sh, Sw, s², 9)`.
        scale: whole number of finer pixels along one side of a pixel.
        mode: a slot names another superpixel in the next cell, so that maps of slots must not be
            resized as they are. "cell" resizes every cell by itself; "window" every superpixel's
            map over its 3×3 cells, which is smooth across the borders of cells.

    Raises:
        ValueError: unknown `mode`, or `scale` below 1.
    """
    if mode not in ("cell", "window"):
        raise ValueError(f"mode={mode!r}: expected cell or window")
    if scale < 1:
        raise ValueError(f"scale={scale}: expected a whole number from 1")
    if scale == 1:
        return logits
    sizes = dict(zip("bmyx", logits.shape, strict=False))
    if mode == "cell":
        cells = rearrange(logits, "b m y x (i j) k -> (b m y x) k i j", i=cell_side(logits))
        return rearrange(_resize(cells, scale), "(b m y x) k i j -> b m y x (i j) k", **sizes)
    windows, cut = turn_around(logits, -math.inf), "(b m y x) 1 (u i) (v j)"
    slots = "b m y x (i j) (u v)"
    windows = rearrange(windows, f"{slots} -> {cut}", i=cell_side(logits), u=3)
    windows = rearrange(_resize(windows, scale), f"{cut} -> {slots}", u=3, v=3, **sizes)
    return turn_around(windows, -math.inf)


def hard_labels(logits: Tensor) -> Tensor:
    """Each pixel's most likely superpixel: slots `(B, M, Sh, Sw, s², 9)` → int64 `(B, M, h, w)`.

    Superpixels are numbered in row-major order. The own cell's logit is raised by 1e-5, so that
    ties, as in a constant image, show the grid.
    """
    best = (logits + 1e-5 * (torch.arange(9, device=logits.device) == 4)).argmax(-1, keepdim=True)
    index = neighbors9(*logits.shape[2:4], device=logits.device)[:, :, None]  # (Sh, Sw, 1, 9)
    return from_cells(index.expand_as(logits).gather(-1, best)).squeeze(-3)


def dense_association(weights: Tensor) -> Tensor:
    """Slots `(B, M, Sh, Sw, s², 9)` → `(B, M, pixels, superpixels)`, both in row-major order."""
    height, width = weights.shape[2:4]
    index = neighbors9(height, width, weights.device).clamp_min(0)[:, :, None].expand_as(weights)
    dense = weights.new_zeros(*weights.shape[:-1], height * width)
    return from_cells(dense.scatter_add(-1, index, weights)).flatten(-2).mT


def superpixel_means(values: Tensor, logits: Tensor) -> Tensor:
    """Mean of every superpixel, weighted by softmax(logits): `(B, C, h, w)` → `(B, C, Sh, Sw)`.

    SSN's update, Σ_i Q(i, p) x_i / Σ_i Q(i, p). Not P2S: there, the softmax is over the pixels.

    Args:
        logits: slots of one head, `(B, 1, Sh, Sw, s², 9)`.
    """
    pixels, weights = to_cells(values, cell_side(logits)), logits.softmax(-1)[:, 0]
    return rearrange(collect_means(weights, pixels), "b y x c -> b c y x")


def check_impl(impl: str) -> None:
    """`ValueError` for an unknown `impl`."""
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r}: expected one of {', '.join(IMPLS)}")


def _shift(x: Tensor, k: int, fill: float) -> Tensor:
    """Move a grid `(..., Sh, Sw, d)` by offset k; `fill` enters where nothing came from."""
    dy, dx = OFFSETS[k]
    return F.pad(x, (0, 0, dx, -dx, dy, -dy), value=fill)


def _resize(maps: Tensor, scale: int) -> Tensor:
    """Bilinear, `(n, c, h, w)` → `(n, c, h·scale, w·scale)`; −∞ takes no part in the means."""
    there = maps > -math.inf
    size = {"scale_factor": scale, "mode": "bilinear"}
    total = F.interpolate(maps.masked_fill(~there, 0.0), **size)
    share = F.interpolate(there.to(total.dtype), **size)
    means = total / share.clamp_min(torch.finfo(total.dtype).tiny)
    return means.masked_fill(share == 0, -math.inf)


def _check_slots(logits: Tensor, values: Tensor) -> None:
    if logits.shape[:-1] != values.shape[:-1] or logits.shape[-1] != 9:
        shapes = f"logits {tuple(logits.shape)}, values {tuple(values.shape)}"
        raise ValueError(f"{shapes}: expected (..., Sh, Sw, s², 9) and (..., Sh, Sw, s², dv)")
