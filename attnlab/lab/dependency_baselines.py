"""What a dependency tree has to beat: scores, maps, pieces and a model that know less.

Nearness is `metrics.gaussian_locality(grid, sigma=1.5)`, a fixed blob `metrics.center_prior`. Here
are chance, color, the attention of an ordinary transformer read as if it sent, an ordinary
transformer with DependencyViT's gates, the normalized cut, and k-means.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from attnlab.attention import MultiHeadAttention, VisionTransformer
from attnlab.dependency_pruning import Sending
from attnlab.dependency_trace import DependencyTrace, normalized_cut
from attnlab.dependencyvit import DependencyViT
from attnlab.lab.arguments import inside, require, whole
from attnlab.lab.metrics import gaussian_locality
from attnlab.layers import Mlp
from attnlab.probe import record


def random_scores(images: int, tokens: int, seed: int = 0) -> Tensor:
    """Scores that know nothing, `(images, tokens, tokens)`; rows sum to 1."""
    whole(1, images=images, tokens=tokens)
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(images, tokens, tokens, generator=generator).softmax(-1)


def color_locality(
    images: Tensor, grid: tuple[int, int], sigma: float = 1.5, bandwidth: float = 0.1
) -> Tensor:
    """Send to near patches of a similar mean color: `(B, 3, H, W)` in [0, 1] → `(B, N, N)`.

    A Gaussian of the distance between patches times one of that between their colors; rows sum to
    1. `sigma` is in patches, `bandwidth` in units of color.
    """
    require(images.ndim == 4, "images", tuple(images.shape), "(B, 3, H, W)")
    inside("(0, inf)", bandwidth=bandwidth)
    colors = rearrange(F.adaptive_avg_pool2d(images, grid), "b c h w -> b (h w) c")
    similar = (-torch.cdist(colors, colors).square() / (2 * bandwidth**2)).exp()
    scores = gaussian_locality(grid, sigma, images.device) * similar
    return scores / scores.sum(-1, keepdim=True)


@torch.no_grad()
def attention_trace(model: VisionTransformer, images: Tensor) -> DependencyTrace:
    """Ordinary attention read backwards: query i "sends" to key j what it reads there.

    Every head counts alike and nobody is ever mute. (What it really does is the opposite: each row
    chooses whom to hear.)
    """
    with record(model) as recorded:
        model(images)
    maps = torch.stack(list(recorded.dense().values()))  # (L, B, heads, queries, keys)
    layers, batch, heads, tokens, _ = maps.shape
    ones = maps.new_ones(layers, batch, tokens)
    even = maps.new_full((layers, batch, heads, tokens), 1 / heads)
    grid = model.patch_embed.grid(*images.shape[-2:])
    return DependencyTrace(
        maps.mean(2).mT, ones, even, ones.bool(), (), grid, model.num_prefix_tokens
    )


class GatheringAttention(nn.Module):
    """Ordinary attention in the place of `ReversedAttention`: its gates do nothing but pool.

    Takes and gives what `ReversedAttention` does. `Sending` is what would be sent if reading were
    sending, heads alike. The map that `record` gives is the ordinary one.
    """

    def __init__(self, dim: int, num_heads: int, controller_ratio: float, gate_bias_init: float):
        super().__init__()
        self.gate_bias_init = gate_bias_init
        self.gather = MultiHeadAttention(dim, num_heads)
        self.controller = Mlp(dim, int(controller_ratio * dim), 1)

    def init_weights(self) -> None:
        """As `ReversedAttention.init_weights`."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.constant_(self.controller.fc2.bias, self.gate_bias_init)

    def forward(
        self, x: Tensor, messages: Tensor | None = None, observe: bool = False
    ) -> tuple[Tensor, ...]:
        exact = torch.promote_types(x.dtype, torch.float32)
        gate = self.controller(x).to(exact).sigmoid().squeeze(-1)
        messages = gate if messages is None else messages * gate
        if not observe:
            return self.gather(x), messages
        with record(self.gather, detach=False) as maps:
            out = self.gather(x)
        heads = self.gather.num_heads
        even = messages.new_full((len(x), heads, x.shape[1]), 1 / heads)
        return out, messages, Sending(maps[""], even, messages)


def gated_vit(controller_ratio: float = 1.0, **kwargs) -> DependencyViT:
    """The control: DependencyViT in all but one thing, that its attention gathers.

    Patches, positions, gates M and the pooling Σ M x / Σ M are the same. What its gates find, they
    find without anybody sending anything. Keywords are `DependencyViT`'s, without those of
    `ReversedAttention` but `controller_ratio` and `gate_bias_init`.
    """
    model = DependencyViT(**kwargs)
    for block in model.blocks:
        attn = block.attn
        block.attn = GatheringAttention(
            attn.proj.in_features, attn.num_heads, controller_ratio, attn.gate_bias_init
        )
    model.init_weights()
    return model


def feature_cut(features: Tensor, grid: tuple[int, int], threshold: float = 0.2) -> Tensor:
    """The normalized cut of patches by their features, `(B, N, D)` → `(B, rows, columns)`, ≥ 0.

    Two patches belong together if the cosine of their features is at least `threshold`, else next
    to nothing holds them; TokenCut (Wang et al. 2022). No dependency mask is used: see
    `dependency_saliency(kind="ncut")` for the cut with it.
    """
    fits = features.ndim == 3 and features.shape[1] == grid[0] * grid[1]
    require(fits, "features", tuple(features.shape), f"(B, {grid[0] * grid[1]}, D)")
    unit = F.normalize(features.double(), dim=-1)
    affinity = torch.where(unit @ unit.mT >= threshold, 1.0, 1e-5).to(unit)
    return rearrange(normalized_cut(affinity), "b (h w) -> b h w", h=grid[0]).to(features.dtype)


def kmeans_pieces(points: Tensor, pieces: int | Tensor, seed: int = 0) -> Tensor:
    """k-means of the patches of each image: `(B, N, D)` → int64 `(B, N)`.

    Args:
        points: features, colors or places.
        pieces: how many, one number or one an image `(B,)`.
    """
    from scipy.cluster.vq import kmeans2

    require(points.ndim == 3, "points", tuple(points.shape), "(B, N, D)")
    wanted = torch.as_tensor(pieces).expand(len(points)).tolist()
    whole(1, **{"pieces": min(wanted)})
    labels = [
        torch.from_numpy(kmeans2(image, count, minit="++", seed=seed)[1])
        for image, count in zip(points.detach().cpu().double().numpy(), wanted, strict=True)
    ]
    return torch.stack(labels).long().to(points.device)
