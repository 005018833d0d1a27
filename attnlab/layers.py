"""The small layers that every model here shares, with timm's names, defaults and initialisation."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# Vision transformers normalise with eps 1e-6; PyTorch's default is 1e-5.
LayerNorm = partial(nn.LayerNorm, eps=1e-6)


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """`8` → `(8, 8)`; `(8, 4)` stays."""
    return (value, value) if isinstance(value, int) else tuple(value)


def check_map(x: Tensor, channels: int | None = None, name: str = "x") -> None:
    """`ValueError` when `x` is not `(B, channels, H, W)`; None: any number of channels."""
    if x.ndim != 4 or x.shape[1] != (channels or x.shape[1]):
        raise ValueError(f"{name} {tuple(x.shape)}: expected (B, {channels or 'C'}, H, W)")


class Mlp(nn.Module):
    """Linear, activation, Linear on the last axis: `(..., in_features)` → `(..., out_features)`."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
    ):
        super().__init__()
        hidden_features = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden_features, out_features or in_features)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(self.fc2(x))


class LayerScale(nn.Module):
    """A learned factor per channel, small at first: `(..., dim)` → `(..., dim)` (CaiT, Sec. 2)."""

    def __init__(self, dim: int, init_values: float = 1e-5):
        super().__init__()
        self.gamma = nn.Parameter(init_values * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth: in training, zero a whole sample's branch with probability `drop_prob`.

    What is kept is divided by 1 − `drop_prob`, so that the expectation is unchanged.
    `(B, ...)` → `(B, ...)`. Raises `ValueError` for a `drop_prob` outside [0, 1].
    """

    def __init__(self, drop_prob: float = 0.0):
        super().__init__()
        if not 0.0 <= drop_prob <= 1.0:
            raise ValueError(f"drop_prob={drop_prob}: expected a probability in [0, 1]")
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = x.new_ones(len(x), *[1] * (x.ndim - 1))  # one number a sample
        return x * F.dropout(keep, self.drop_prob)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of `(B, C, H, W)`, eps 1e-6."""

    def __init__(self, num_channels: int, eps: float = 1e-6):
        super().__init__(num_channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(rearrange(x, "b c h w -> b h w c"))
        return rearrange(x, "b h w c -> b c h w")


class PatchEmbed(nn.Module):
    """Cut an image into patches and embed each linearly: `(B, in_chans, H, W)` → `(B, N, D)`.

    A convolution whose stride is its kernel size; the N = H/p · W/p tokens are in row-major order.
    `grid_size` is the number of patches, `(rows, columns)`, of an image of `img_size`; other sizes
    are accepted. `ValueError`: not such an image, or a side that is no multiple of the patch's.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
    ):
        super().__init__()
        self.patch_size = pair(patch_size)
        self.grid_size = self.grid(*pair(img_size))
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.patch_size)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """`(rows, columns)` of patches in an image of this many pixels."""
        rows, columns = self.patch_size
        if height % rows or width % columns:
            raise ValueError(
                f"image size {(height, width)}: expected multiples of patch_size={self.patch_size}"
            )
        return height // rows, width // columns

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.proj.in_channels:
            raise ValueError(f"x {tuple(x.shape)}: expected (B, {self.proj.in_channels}, H, W)")
        self.grid(*x.shape[2:])
        return rearrange(self.proj(x), "b d h w -> b (h w) d")
