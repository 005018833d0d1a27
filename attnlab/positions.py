"""Position embeddings of a grid of tokens: fixed sines and cosines, and resizing learned ones."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from attnlab.layers import pair


def sincos_pos_embed(grid: int | tuple[int, int], dim: int, temperature: float = 10000.0) -> Tensor:
    """Fixed 2-D position embedding, `(rows · columns, dim)`, in timm's order of channels.

    A token in row y and column x gets [sin yω, sin xω, cos yω, cos xω], with dim/4 frequencies
    ω_k = temperature^(−k / (dim/4)). Hence every token has squared length dim/2, and the product of
    two depends only on their offset.

    Args:
        grid: (rows, columns) of tokens; the tokens are in row-major order.
        dim: width, a multiple of 4.

    Raises:
        ValueError: `dim` is not a positive multiple of 4.
    """
    if dim <= 0 or dim % 4:
        raise ValueError(
            f"dim={dim}: expected a positive multiple of 4 (sin and cos of y and of x)"
        )
    rows, columns = pair(grid)
    frequencies = temperature ** -(torch.arange(dim // 4) / (dim // 4))
    yx = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))  # (rows · columns, 2)
    angles = yx[:, :, None] * frequencies  # (tokens, 2, dim/4)
    return torch.stack([angles.sin(), angles.cos()], dim=1).flatten(1)


def resize_pos_embed(
    pos_embed: Tensor,
    new_size: tuple[int, int],
    old_size: tuple[int, int] | None = None,
    num_prefix_tokens: int = 1,
    antialias: bool = True,
) -> Tensor:
    """Bicubic resizing of a learned position embedding to another grid, as timm does.

    Args:
        pos_embed: `(1, num_prefix_tokens + rows · columns, D)`; prefix rows are kept as they are.
        new_size: (rows, columns) wanted.
        old_size: (rows, columns) of `pos_embed`; a square by default.
        num_prefix_tokens: class and distillation tokens in front.
        antialias: True is timm's way; False is that of the DeiT repository.

    Returns:
        `(1, num_prefix_tokens + new rows · columns, D)`; `pos_embed` itself when nothing changes.

    Raises:
        ValueError: `pos_embed` does not hold `old_size` tokens.
    """
    tokens = pos_embed.shape[1] - num_prefix_tokens
    rows, columns = old_size or (int(tokens**0.5),) * 2
    if rows * columns != tokens:
        expected = "a square" if old_size is None else f"old_size={tuple(old_size)}"
        raise ValueError(f"pos_embed holds {tokens} grid tokens: expected {expected}")
    if (rows, columns) == tuple(new_size):
        return pos_embed
    prefix, grid = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    grid = rearrange(grid.float(), "1 (h w) d -> 1 d h w", h=rows)
    grid = F.interpolate(grid, size=tuple(new_size), mode="bicubic", antialias=antialias)
    return torch.cat([prefix, rearrange(grid, "1 d h w -> 1 (h w) d").to(prefix.dtype)], dim=1)
