"""Locally-weighted deformable neighbors: propagation by predicted weights (chapter 07).

Paper: Jiang et al. 2019, "Video Object Detection with Locally-Weighted Deformable Neighbors". The
idea: a flow network is more than is needed. From how well the cheap features of two frames fit
around each place, predict k² weights and where to sample the key frame's features with them.

What differs from the paper: where its text is open, the weights are a softmax, the predictor is two
convolutions on the cosines of a window, and its first answer is nearly "the same place".
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from attnlab.flow import warp
from attnlab.layers import check_map
from attnlab.local_attention import dense_window, local_attend, local_correlation, local_offsets
from attnlab.probe import Probe

OUTSIDE = {"border": "replicate", "zeros": "zeros"}  # the word of `warp`: that of `local_attend`


def locally_weighted_neighbors(
    features: Tensor, weights: Tensor, offsets: Tensor | None = None, padding: str = "border"
) -> Tensor:
    """Σ_n weights_n(p) features(p + p_n + offsets_n(p)), bilinear, p_n on a k×k grid around 0.

    A modulated deformable convolution (`torchvision.ops.deform_conv2d`, where padding is "zeros")
    whose kernel is 1 and does not mix channels.

    Args:
        features: `(B, C, H, W)`.
        weights: `(B, k², H, W)`, k odd; n goes row by row.
        offsets: `(B, k², 2, H, W)`, (dx, dy) in cells, as a flow; none by default.
        padding: outside the map there is its "border", or "zeros".

    Returns:
        `(B, C, H, W)` in the dtype of `features`.

    Raises:
        ValueError: shapes that do not fit, an even k, another `padding`.
    """
    check_map(features, name="features")
    size = features.shape[2:]
    side = round(weights.shape[1] ** 0.5) if weights.ndim == 4 else 0
    expected = (len(features), side**2, *size)
    if side % 2 == 0 or tuple(weights.shape) != expected:
        raise ValueError(
            f"weights {tuple(weights.shape)}: expected ({len(features)}, k², {size[0]}, {size[1]}),"
            " k odd"
        )
    if padding not in OUTSIDE:
        raise ValueError(f"padding={padding!r}: expected {' or '.join(OUTSIDE)}")
    radius = side // 2
    if offsets is None:
        return local_attend(features, weights, radius, OUTSIDE[padding])
    if tuple(offsets.shape) != (len(features), side**2, 2, *size):
        expected = (len(features), side**2, 2, *size)
        raise ValueError(f"offsets {tuple(offsets.shape)}: expected {expected}, (B, k², 2, H, W)")
    out = 0.0
    for n, place in enumerate(local_offsets(radius)):
        flow = offsets[:, n] + rearrange(offsets.new_tensor(place), "xy -> xy 1 1")
        out = out + weights[:, n, None] * warp(features, flow, padding)
    return out.to(features.dtype)


class LocallyWeightedNeighbors(nn.Module):
    """Features of the current frame from k² sampling points in the key frame (Sec. 3.2).

    Weights, and offsets if any, are predicted from the cosines of the embeddings in a window. At
    first the offsets are 0 and the place itself has weight e⁴ / (e⁴ + k² − 1).

    Args:
        kernel_size: k, odd. Without offsets the reach is (k − 1) / 2 cells.
        offsets: whether the sampling points move.
        normalize: "softmax", or "none": weights as they are predicted, at first 1 at the place
            itself and 0 elsewhere.
        radius: of the window that is compared, in cells.
        hidden: channels of the predictor.
        padding: what is fetched outside the map, as in `warp`.

    Raises:
        ValueError: an even `kernel_size`, another `normalize` or `padding`.
    """

    def __init__(
        self,
        kernel_size: int = 5,
        *,
        offsets: bool = False,
        normalize: str = "softmax",
        radius: int = 4,
        hidden: int = 32,
        padding: str = "border",
    ):
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size}: expected an odd number, at least 1")
        if padding not in OUTSIDE:
            raise ValueError(f"padding={padding!r}: expected {' or '.join(OUTSIDE)}")
        if normalize not in ("softmax", "none"):
            raise ValueError(f"normalize={normalize!r}: expected softmax or none")
        self.kernel_size, self.normalize, self.radius = kernel_size, normalize, radius
        self.padding = padding
        taps = kernel_size**2
        self.compare = nn.Sequential(
            nn.Conv2d((2 * radius + 1) ** 2, hidden, 3, padding=1), nn.ReLU()
        )
        self.weigh = nn.Conv2d(hidden, taps, 3, padding=1)
        self.move = nn.Conv2d(hidden, 2 * taps, 3, padding=1) if offsets else None
        for layer in (self.weigh, self.move):
            if layer is not None:
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.constant_(self.weigh.bias[taps // 2], 4.0 if normalize == "softmax" else 1.0)
        self.attn_probe = Probe()

    def forward(self, current: Tensor, key: Tensor, features: Tensor) -> Tensor:
        """Embeddings of both frames `(B, D, h, w)`, the key's features `(B, C, h, w)` → the same.

        The recorded map is `(B, k², h, w)`.
        """
        weights, offsets = self.predict(current, key)
        return locally_weighted_neighbors(features, self.attn_probe(weights), offsets, self.padding)

    def predict(self, current: Tensor, key: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weights `(B, k², h, w)`, and offsets `(B, k², 2, h, w)` in cells or None."""
        current, key = F.normalize(current, dim=1), F.normalize(key, dim=1)
        hidden = self.compare(local_correlation(current, key, self.radius, "zeros"))
        weights = self.weigh(hidden)
        if self.normalize == "softmax":
            weights = weights.softmax(dim=1)
        if self.move is None:
            return weights, None
        return weights, rearrange(self.move(hidden), "b (n xy) h w -> b n xy h w", xy=2)

    def dense_map(self, map: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """`(B, k², h, w)` on the fixed grid, before any offsets → `(B, 1, N, N)`."""
        return dense_window(map, self.kernel_size // 2, OUTSIDE[self.padding])
