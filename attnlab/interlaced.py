"""Interlaced sparse attention: to every P-th position, then within cells of P×P (chapter 05).

Paper: Huang et al. 2019, "Interlaced Sparse Self-Attention for Semantic Segmentation"
(arXiv:1907.12273), the relation module of the journal version of OCNet. The idea: attention from
everywhere to everywhere as a product of two block-sparse matrices, one of the positions that share
a place in their cell, one of the positions that share a cell.

What differs from the paper: the layers are those of openseg's code, whose state_dicts load; that
code fills a map that is no multiple of the cell with zeros that are seen as keys, ours masks them
(`mask_padding=True`), which is the same where nothing is filled.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from attnlab.kernels import check_impl
from attnlab.layers import check_map, pair
from attnlab.official import renaming
from attnlab.probe import Probe
from attnlab.sparse_blocks import (
    Axis,
    block_attention,
    dense_map,
    dense_mask,
    dense_stages,
    residues,
    windows,
)


class InterlacedStage(nn.Module):
    """One of the two attentions of `InterlacedSparseAttention`, with the projections of openseg.

    Queries and keys: two 1×1 convolutions with BatchNorm and ReLU each; the values one without a
    bias; the output one with BatchNorm and ReLU. Scale 1/√key_channels, one head, no residual.

    Args:
        cell: (P_h, P_w).
        long_range: whether a position sees those at a distance of multiples of P_h, P_w, or those
            of its own cell. A map that is no multiple of the cell is padded on both sides.
    """

    def __init__(
        self,
        channels: int,
        key_channels: int,
        value_channels: int,
        cell: tuple[int, int],
        long_range: bool,
        impl: str,
    ):
        super().__init__()
        self.cell, self.long_range, self.impl = cell, long_range, impl
        self.query = nn.Sequential(*_conv(channels, key_channels), *_conv(key_channels))
        self.key = nn.Sequential(*_conv(channels, key_channels), *_conv(key_channels))
        self.value = nn.Conv2d(channels, value_channels, 1, bias=False)
        self.proj = nn.Sequential(*_conv(value_channels, channels))
        self.attn_probe = Probe()
        self.register_load_state_dict_pre_hook(renaming(OPENSEG_STAGE))

    def axes(self, height: int, width: int, device=None) -> tuple[Axis, Axis]:
        """How the rows and the columns of a map are cut (`attnlab.sparse_blocks`)."""
        axes = []
        for length, size in zip((height, width), self.cell, strict=True):
            before = _padding(length, size)[0]
            cut = residues(length, size, before, device)
            axes.append(cut if self.long_range else windows(length, size, -before % size, device))
        return tuple(axes)

    def forward(self, x: Tensor) -> Tensor:
        rows, cols = self.axes(*x.shape[2:], x.device)
        layers = self.query, self.key, self.value
        q, k, v = (rearrange(layer(x), "b c h w -> b 1 h w c") for layer in layers)
        out = block_attention(q, k, v, rows, cols, impl=self.impl, probe=self.attn_probe)
        return self.proj(rearrange(out, "b 1 h w c -> b c h w"))

    def dense_mask(self, shape: tuple[int, int]) -> Tensor:
        """Which keys each position of an `(H, W)` map sees: `(N, N)` bool, True = attend."""
        return dense_mask(*self.axes(*shape))

    def dense_map(self, map: Tensor, shape: tuple[int, int]) -> Tensor:
        """A recorded map, `(B, 1, blocks, queries, keys)` → `(B, 1, N, N)`."""
        return dense_map(map, *self.axes(*shape, map.device))


class InterlacedSparseAttention(nn.Module):
    """Attention between positions of equal place in their cell, then within cells (ISA, Sec. 3).

    `(B, channels, H, W)` → the same shape. N×N weights as a product of two block-sparse matrices,
    with one path between any two positions, where H and W are multiples of the cell: a cell that
    the border cuts lacks some places, and with them the way to all positions of these. Costs
    2 · N · (N / P² + P²) multiply-accumulates per channel for a cell of P×P, least at P² = √N. The
    context is concatenated with x, and mixed by a 1×1 convolution: this is openseg's module,
    2,366,464 parameters for 512 channels, and its state_dict loads.

    Args:
        cell: side P of a cell, or (P_h, P_w).
        key_channels, value_channels: channels / 2 and channels by default.
        order: "long_first", as in the paper, or "short_first".
        mask_padding: whether positions that only fill the map up to a multiple of the cell are
            masked. False is openseg's code, where they are keys; loading its state_dict sets it.
        drop: dropout of whole channels after the fusion, in training.

    Raises:
        ValueError: a map smaller than the cell; an unknown `order` or `impl`; a cell below 1.
    """

    def __init__(
        self,
        channels: int,
        cell: int | tuple[int, int] = 8,
        key_channels: int | None = None,
        value_channels: int | None = None,
        order: str = "long_first",
        mask_padding: bool = True,
        drop: float = 0.05,
        impl: str = "auto",
    ):
        super().__init__()
        if order not in ("long_first", "short_first"):
            raise ValueError(f"order={order!r}: expected long_first or short_first")
        if min(pair(cell)) < 1:
            raise ValueError(f"cell={cell}: expected at least 1")
        check_impl(impl)
        self.cell, self.order, self.mask_padding = pair(cell), order, mask_padding
        widths = channels, key_channels or channels // 2, value_channels or channels, self.cell
        self.long_range = InterlacedStage(*widths, True, impl)
        self.short_range = InterlacedStage(*widths, False, impl)
        self.fuse = nn.Sequential(*_conv(2 * channels, channels), nn.Dropout2d(drop))
        self.register_load_state_dict_pre_hook(_convert_openseg)

    @property
    def stages(self) -> tuple[nn.Module, nn.Module]:
        """Both attentions, in the order in which they are applied."""
        layers = (self.long_range, self.short_range)
        return layers if self.order == "long_first" else layers[::-1]

    def forward(self, x: Tensor) -> Tensor:
        check_map(x, self.fuse[0].out_channels)
        height, width = x.shape[2:]
        if height < self.cell[0] or width < self.cell[1]:
            raise ValueError(
                f"x {tuple(x.shape)}: expected a map of at least one cell {self.cell}; on a "
                "smaller one, long-range attention sees only itself: take a smaller cell"
            )
        (top, bottom), (left, right) = map(_padding, (height, width), self.cell)
        first, second = self.stages
        if self.mask_padding:
            context = second(first(x))
        else:
            context = second(first(F.pad(x, (left, right, top, bottom))))
            context = context[:, :, top : top + height, left : left + width]
        return self.fuse(torch.cat([x, context], dim=1))

    def dense_mask(self, shape: tuple[int, int]) -> Tensor:
        """The masks of both stages, `(2, N, N)`; each stage is one attention under its own."""
        return torch.stack([stage.dense_mask(shape) for stage in self.stages])

    def dense_map(self, map: tuple[Tensor, Tensor], shape: tuple[int, int]) -> Tensor:
        """The recorded maps of both stages, composed: `(B, 1, N, N)`.

        With `mask_padding=False`, `shape` is that of the padded map.
        """
        first, second = dense_stages(self.stages, map, shape)
        return second @ first


# openseg.pytorch's `ISA_Module` with one `down_factor`, whose BatchNorm and ReLU are nested.
OPENSEG = {
    "stages.0.long_range_sa.": "long_range.",
    "stages.0.short_range_sa.": "short_range.",
    "conv_bn.0.": "fuse.0.",
    "conv_bn.1.0.": "fuse.1.",
}
OPENSEG_STAGE = {
    "f_query.0.": "query.0.",
    "f_query.1.0.": "query.1.",
    "f_query.2.": "query.3.",
    "f_query.3.0.": "query.4.",
    "f_key.0.": "key.0.",
    "f_key.1.0.": "key.1.",
    "f_key.2.": "key.3.",
    "f_key.3.0.": "key.4.",
    "f_value.": "value.",
    "W.0.": "proj.0.",
    "W.1.0.": "proj.1.",
}


def _convert_openseg(module, state_dict, prefix, *args) -> None:
    """Before loading: rename openseg's entries; its padding is seen."""
    if any(key.startswith(f"{prefix}stages.0.") for key in state_dict):
        module.mask_padding = False
        renaming(OPENSEG)(module, state_dict, prefix, *args)


def _conv(in_channels: int, out_channels: int | None = None) -> tuple[nn.Module, ...]:
    out_channels = out_channels or in_channels
    conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    return conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)


def _padding(length: int, size: int) -> tuple[int, int]:
    """What fills an axis up to a multiple of `size`: the smaller half before, the rest after."""
    missing = -length % size
    return missing // 2, missing - missing // 2
