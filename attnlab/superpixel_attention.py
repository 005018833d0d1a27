"""Superpixel cross-attention: pixels and superpixels attend to each other (SPFormer; chapter 10).

Paper: Mei et al. 2024, "SPFormer: Enhancing Vision Transformer with Superpixel Representation". The
idea: a superpixel's attention goes to the pixels of the 3×3 cells around it, and a pixel's to the
nine superpixels around it; the latter, the association, is a soft segmentation. What differs from
the paper: nothing known; where its text leaves a choice, the choice is an option with a default.
"""

import math
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from attnlab.layers import LayerNorm, LayerScale
from attnlab.positions import resize_pos_embed
from attnlab.probe import Probe
from attnlab.superpixel import (
    check_impl,
    collect,
    dense_association,
    from_cells,
    local_logits,
    p2s_attend,
    p2s_weights,
    spread,
    to_cells,
    turn_around,
)


class Logits(NamedTuple):
    """What one iteration compared: slots `(B, M, Sh, Sw, s², 9)`; `s2p` is None where skipped."""

    p2s: Tensor
    s2p: Tensor | None


class PixelsToSuperpixels(nn.Module):
    """Every superpixel's attention to the pixels of its window, from its logits (P2S).

    The recorded map is `(B, M, Sh, Sw, s²·9)`, of `p2s_weights`: its rows sum to 1.
    """

    def __init__(self, impl: str = "auto"):
        super().__init__()
        check_impl(impl)
        self.impl = impl
        self.attn_probe = Probe()

    def forward(self, logits: Tensor, values: Tensor) -> Tensor:
        """Slots `(B, M, Sh, Sw, s², 9)`, cells `(..., s², d)` → grid `(B, M, Sh, Sw, d)`."""
        if self.impl != "explicit":
            return p2s_attend(logits, values, self.impl)
        weights = self.attn_probe(p2s_weights(logits)).unflatten(-1, (-1, 9))
        return collect(turn_around(weights), values)

    def dense_map(self, map: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """`(B, M, Sh, Sw, s²·9)` → `(B, M, superpixels, pixels)`."""
        return dense_association(turn_around(map.unflatten(-1, (-1, 9)))).mT


class SuperpixelsToPixels(nn.Module):
    """Every pixel's attention to its nine superpixels, from its logits (S2P): the association.

    The recorded map is slots, `(B, M, Sh, Sw, s², 9)`: its rows sum to 1.
    """

    def __init__(self):
        super().__init__()
        self.attn_probe = Probe()

    def forward(self, logits: Tensor, values: Tensor) -> Tensor:
        """Slots `(B, M, Sh, Sw, s², 9)`, grid `(B, M, Sh, Sw, d)` → cells `(..., s², d)`."""
        return spread(self.attn_probe(logits.softmax(-1)), values)

    def dense_map(self, map: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """Slots `(B, M, Sh, Sw, s², 9)` → `(B, M, pixels, superpixels)`."""
        return dense_association(map)


class ConvPosition(nn.Module):
    """Conditional position: x + a depthwise 3×3 convolution of x, `(B, dim, h, w)` → the same."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class LearnedPosition(nn.Module):
    """x + one learned vector a place, resized to other sizes: `(B, dim, h, w)` → the same."""

    def __init__(self, dim: int, size: tuple[int, int]):
        super().__init__()
        self.size = size
        self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(size), dim))

    def forward(self, x: Tensor) -> Tensor:
        places = resize_pos_embed(self.pos_embed, tuple(x.shape[2:]), self.size, 0)
        return x + rearrange(places, "1 (h w) d -> 1 d h w", h=x.shape[2])


class Projection(nn.Module):
    """One grid's queries, keys and values: `(B, dim, h, w)` → one cells tensor for each width.

    `(B, M, Sh, Sw, s², width / M)`, with s = `side`. The projection is one bias-free linear map;
    LayerNorm is over all of its outputs together ("post"), over its input ("pre"), or absent.
    """

    def __init__(
        self,
        dim: int,
        widths: tuple[int, ...],
        num_heads: int,
        side: int,
        position: nn.Module,
        qkv_norm: str,
    ):
        super().__init__()
        self.widths, self.num_heads, self.side = widths, num_heads, side
        self.position = position
        self.pre_norm = LayerNorm(dim) if qkv_norm == "pre" else nn.Identity()
        self.qkv = nn.Linear(dim, sum(widths), bias=False)
        self.norm = LayerNorm(sum(widths)) if qkv_norm == "post" else nn.Identity()

    def forward(self, x: Tensor) -> list[Tensor]:
        cells = to_cells(self.position(x), self.side)
        parts = self.norm(self.qkv(self.pre_norm(cells))).split(self.widths, dim=-1)
        heads = "b y x n (m d) -> b m y x n d"
        return [rearrange(part, heads, m=self.num_heads) for part in parts]


class LayerScale2d(LayerScale):
    """LayerScale for `(B, dim, h, w)`."""

    def forward(self, x: Tensor) -> Tensor:
        return x * rearrange(self.gamma, "c -> c 1 1")


class SCAIteration(nn.Module):
    """One exchange between the grids; see `SuperpixelCrossAttention`, which owns several."""

    def __init__(
        self,
        pixel_dim: int,
        superpixel_dim: int,
        num_heads: int,
        side: int,
        positions: tuple[nn.Module, nn.Module],
        qkv_norm: str,
        schedule: str,
        share_qk: bool,
        update_pixels: bool,
        init_values: float,
        impl: str,
    ):
        super().__init__()
        self.schedule, self.update_pixels = schedule, update_pixels
        compared = (pixel_dim,) * (1 if share_qk else 2)
        self.of_pixels = Projection(
            pixel_dim, (*compared, superpixel_dim), num_heads, side, positions[0], qkv_norm
        )
        self.of_superpixels = Projection(
            superpixel_dim, (*compared, pixel_dim), num_heads, 1, positions[1], qkv_norm
        )
        self.p2s = PixelsToSuperpixels(impl)
        self.s2p = SuperpixelsToPixels()
        self.superpixel_scale = LayerScale2d(superpixel_dim, init_values)
        self.pixel_scale = LayerScale2d(pixel_dim, init_values).requires_grad_(update_pixels)

    def forward(self, pixels: Tensor, superpixels: Tensor) -> tuple[Tensor, Tensor, Logits]:
        *compared, v_p = self.of_pixels(pixels)
        q_p, k_p = compared[0], compared[-1]
        q_s, k_s, v_s = self._of_superpixels(superpixels)
        p2s = local_logits(k_p, q_s)
        gathered = rearrange(self.p2s(p2s, v_p), "b m y x d -> b (m d) y x")
        superpixels = superpixels + self.superpixel_scale(gathered)
        if not self.update_pixels:
            return pixels, superpixels, Logits(p2s, None)
        if self.schedule == "sequential":
            _, k_s, v_s = self._of_superpixels(superpixels)
        s2p = local_logits(q_p, k_s)
        spread_out = from_cells(self.s2p(s2p, v_s)).flatten(1, 2)
        return pixels + self.pixel_scale(spread_out), superpixels, Logits(p2s, s2p)

    def _of_superpixels(self, superpixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        *compared, v_s = (part.squeeze(-2) for part in self.of_superpixels(superpixels))
        return compared[0], compared[-1], v_s


class SuperpixelCrossAttention(nn.Module):
    """Pixels and superpixels attend to each other, `iters` times (Sec. 3, Eqs. 2 to 4).

        superpixels: S(p) ← S(p) + γ_s Σ_{i ∈ W_p} softmax_{i ∈ W_p}(q_s(p)·k_p(i) / √d) v_p(i)
        association: Q(i, p) = softmax_{p ∈ N_i}(q_p(i)·k_s(p) / √d)
        pixels:      I(i) ← I(i) + γ_p Σ_{p ∈ N_i} Q(i, p) v_s(p)

    N_i are the nine superpixels around pixel i, W_p the pixels i with p ∈ N_i. The six projections
    are linear maps of both grids with their positions added; the position does not stay in the
    grids. Heads split the widths, and nothing mixes them afterwards.

    Args:
        pixel_dim: C_p, also the width of all queries and keys; a multiple of `num_heads`.
        superpixel_dim: C_s, a multiple of `num_heads`.
        num_heads: M.
        side: s, pixels along a superpixel's cell.
        iters: t; every iteration has weights of its own.
        schedule: "parallel" computes both updates from the grids before; "sequential" lets the
            pixels see the superpixels just updated.
        share_qk: one projection per grid is both query and key, so that both directions compare
            the same numbers (an ablation).
        qkv_norm: LayerNorm over all of a grid's projections ("post"), before them ("pre"), "none".
        position: "conv" (depthwise 3×3), "learned" (for `grid_size`, resized to others), "none".
        last_s2p: whether the last iteration updates the pixels.
        init_values: of γ_s and γ_p.
        grid_size: (Sh, Sw), for `position="learned"`.
        impl: of the superpixels' update, as in `p2s_attend`.

    Raises:
        ValueError: an unknown option; widths that `num_heads` does not divide; `iters` below 1.
    """

    def __init__(
        self,
        pixel_dim: int,
        superpixel_dim: int,
        num_heads: int = 2,
        side: int = 4,
        iters: int = 2,
        *,
        schedule: str = "parallel",
        share_qk: bool = False,
        qkv_norm: str = "post",
        position: str = "conv",
        last_s2p: bool = True,
        init_values: float = 1e-5,
        grid_size: tuple[int, int] | None = None,
        impl: str = "auto",
    ):
        super().__init__()
        for name, dim in (("pixel_dim", pixel_dim), ("superpixel_dim", superpixel_dim)):
            if num_heads < 1 or dim % num_heads:
                raise ValueError(f"{name}={dim}: expected a multiple of num_heads={num_heads}")
        check_option("schedule", schedule, ("parallel", "sequential"))
        check_option("qkv_norm", qkv_norm, ("post", "pre", "none"))
        check_option("position", position, ("conv", "learned", "none"))
        if position == "learned" and grid_size is None:
            raise ValueError("grid_size=None: expected (Sh, Sw) with position='learned'")
        if iters < 1:
            raise ValueError(f"iters={iters}: expected at least 1")
        self.dims, self.side = (pixel_dim, superpixel_dim), side

        def positions() -> tuple[nn.Module, nn.Module]:
            if position == "none":
                return nn.Identity(), nn.Identity()
            if position == "conv":
                return ConvPosition(pixel_dim), ConvPosition(superpixel_dim)
            pixel_size = grid_size[0] * side, grid_size[1] * side
            places = LearnedPosition(pixel_dim, pixel_size)
            return places, LearnedPosition(superpixel_dim, grid_size)

        self.iterations = nn.ModuleList(
            SCAIteration(
                pixel_dim, superpixel_dim, num_heads, side, positions(), qkv_norm, schedule,
                share_qk, last_s2p or i + 1 < iters, init_values, impl,
            )
            for i in range(iters)
        )  # fmt: skip
        self.apply(init_weights)

    def forward(self, pixels: Tensor, superpixels: Tensor) -> tuple[Tensor, Tensor, list[Logits]]:
        """`(B, C_p, h, w)` and `(B, C_s, h/s, w/s)` → both, updated, and each iteration's `Logits`.

        Raises:
            ValueError: other channels, or sizes that are not `side` to 1.
        """
        height, width = superpixels.shape[-2:]
        expected = (self.dims[0], height * self.side, width * self.side)
        if tuple(pixels.shape[1:]) != expected or superpixels.shape[1] != self.dims[1]:
            shapes = f"pixels {tuple(pixels.shape)}, superpixels {tuple(superpixels.shape)}"
            raise ValueError(
                f"{shapes}: expected (B, {self.dims[0]}, h, w) and (B, {self.dims[1]}, Sh, Sw) with"
                f" h = {self.side}·Sh, w = {self.side}·Sw"
            )
        steps = []
        for iteration in self.iterations:
            pixels, superpixels, logits = iteration(pixels, superpixels)
            steps.append(logits)
        return pixels, superpixels, steps


def init_weights(module: nn.Module) -> None:
    """Linear maps and positions: truncated normal, 0.02; convolutions: Kaiming, fan-out; bias 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, LearnedPosition):
        nn.init.trunc_normal_(module.pos_embed, std=0.02)
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)


def check_option(name: str, value: str, options: tuple[str, ...]) -> None:
    """`ValueError` unless `value` is one of the `options`."""
    if value not in options:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(options)}")
