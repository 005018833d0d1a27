"""How features get from frame to frame, and how those of several frames merge (chapter 07).

Papers: Zhu et al. 2017, "Deep Feature Flow for Video Recognition" (DFF); Zhu et al. 2017,
"Flow-Guided Feature Aggregation for Video Object Detection" (FGFA). A propagation is a module
`(current, key, features) → features`: `FlowWarp` here, `AttentionWarp` and
`LocallyWeightedNeighbors` in modules of their own. What differs from the papers: the current
frame's own features need no warp, and the norms of embeddings may be zero.
"""

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import Tensor, nn

from attnlab.flow import warp
from attnlab.probe import Probe


class StaleCopy(nn.Module):
    """The key frame's features as they are: the propagation to beat."""

    def forward(self, current: Tensor, key: Tensor, features: Tensor) -> Tensor:
        return features


class FlowWarp(nn.Module):
    """W(features, M) ⊙ S: features fetched along a predicted flow, and scaled (DFF, Sec. 3).

    Args:
        flow_net: as `FlowNet`: has `num_features`, `forward_features` and `flow`.
        channels: C of the features, for the scale field S, one number per channel and place, 1 at
            first; None: no scale field.
    """

    def __init__(self, flow_net: nn.Module, channels: int | None = None):
        super().__init__()
        self.flow_net = flow_net
        self.scale = None
        if channels is not None:
            self.scale = nn.Conv2d(flow_net.num_features, channels, 1, bias=False)
            nn.init.zeros_(self.scale.weight)
        self.attn_probe = Probe()

    def forward(self, current: Tensor, key: Tensor, features: Tensor) -> Tensor:
        """Two frames `(B, 3, H, W)`, the key's features `(B, C, h, w)` → the current frame's.

        The recorded map is the flow, `(B, 2, h, w)`.
        """
        flow, scale = self.fields(current, key, features.shape[2:])
        moved = warp(features, self.attn_probe(flow))
        return moved if scale is None else moved * scale

    def fields(
        self, current: Tensor, key: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor | None]:
        """The flow M `(B, 2, *size)` in cells, and S `(B, C, *size)` or None."""
        features = self.flow_net.forward_features(current, key, size)
        flow = self.flow_net.flow(features, current.shape[2:])
        return flow, None if self.scale is None else 1 + self.scale(features)

    def dense_map(self, map: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """The flow `(B, 2, h, w)` as attention, at most four keys a query: `(B, 1, N, N)`."""
        batch, _, height, width = map.shape
        cells = torch.eye(height * width, dtype=map.dtype, device=map.device)
        cells = repeat(cells, "n (h w) -> b n h w", b=batch, h=height)
        return rearrange(warp(cells, map), "b n h w -> b 1 (h w) n")


def cosine_weights(embeddings: Tensor, query: Tensor, temperature: float = 1.0) -> Tensor:
    """How much each frame counts at each place: softmax over frames of the cosines (FGFA, Eq. 4).

    Args:
        embeddings: of N frames, moved to the current one: `(B, N, D, h, w)`.
        query: of the current frame, `(B, D, h, w)`.
        temperature: divides the cosines. At 1, as in the paper, no two weights differ by more than
            a factor of e² = 7.4.

    Returns:
        `(B, N, h, w)`, whose sum over N is 1.
    """
    cosines = einsum(
        F.normalize(embeddings, dim=2), F.normalize(query, dim=1), "b n d h w, b d h w -> b n h w"
    )
    return (cosines / temperature).softmax(dim=1)


def aggregate(features: Tensor, weights: Tensor) -> Tensor:
    """Σ_n weights_n(p) features_n(p): `(B, N, C, h, w)`, `(B, N, h, w)` → `(B, C, h, w)`."""
    return einsum(features, weights.to(features.dtype), "b n c h w, b n h w -> b c h w")


class FrameAggregator(nn.Module):
    """The mean of several frames' features, by their likeness to the current one's (FGFA, 3.3).

    Args:
        channels: C.
        embed_dim: width of the embedding's two hidden layers, C / 2 by default; 4 times as many
            come out, as in the paper (1024 → 512, 512, 2048).
        temperature: as in `cosine_weights`.
        identity: compare the features themselves, without an embedding.

    Raises:
        ValueError: a `temperature` that is not above 0.
    """

    def __init__(
        self,
        channels: int,
        embed_dim: int | None = None,
        temperature: float = 1.0,
        identity: bool = False,
    ):
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature={temperature}: expected a number above 0")
        self.channels, self.temperature = channels, temperature
        hidden = embed_dim or channels // 2
        self.embed = nn.Identity() if identity else nn.Sequential(
            nn.Conv2d(channels, hidden, 1), nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1), nn.ReLU(),
            nn.Conv2d(hidden, 4 * hidden, 1),
        )  # fmt: skip
        for layer in self.embed.children():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)
        self.attn_probe = Probe()

    def forward(self, features: Tensor, current: Tensor) -> Tensor:
        """Features of N frames `(B, N, C, h, w)`, those of the current one `(B, C, h, w)` → mean.

        The recorded map is `(B, N, h, w)`.
        """
        embeddings = self.embed(features.flatten(0, 1)).unflatten(0, features.shape[:2])
        return self.merge(features, embeddings, self.embed(current))

    def merge(self, features: Tensor, embeddings: Tensor, query: Tensor) -> Tensor:
        """The same from embeddings: `(B, N, D, h, w)`, and the current frame's `(B, D, h, w)`."""
        weights = cosine_weights(embeddings, query, self.temperature)
        return aggregate(features, self.attn_probe(weights))

    def dense_map(self, map: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """`(B, N, h, w)` → `(B, 1, places, frames)`: each place attends to its N versions."""
        return rearrange(map, "b n h w -> b 1 (h w) n")


class KeyFrameMemory(nn.Module):
    """What all key frames so far knew: aligned to the new one, and merged with it.

    Args:
        align: a propagation from key frame to key frame, with weights of its own.
        aggregator: `FrameAggregator`, over the two. The old one never weighs more than the new.
    """

    def __init__(self, align: nn.Module, aggregator: nn.Module):
        super().__init__()
        self.align, self.aggregator = align, aggregator

    def forward(self, current: Tensor, key: Tensor, memory: Tensor, features: Tensor) -> Tensor:
        """Embeddings of the new key frame and of the old, the memory, the new features → memory."""
        aligned = self.align(current, key, memory)
        return self.aggregator(torch.stack([aligned, features], dim=1), features)
