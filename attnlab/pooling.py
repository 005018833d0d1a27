"""What else turns a feature map into one vector: the neighbours of attention pooling (chapter 08).

Every module here is `(B, C, h, w)` → `(B, C)` and fits where `AttentionPool` does, such as the slot
`pool` of `attnlab.resnet`. `maps(x)`, where there is one, says what each place counted.

Papers: Lin et al. 2014 (mean); Radenović et al. 2019 (GeM); Pinheiro & Collobert 2015
(log-sum-exp); Cao et al. 2019 (GCNet); Ilse et al. 2018 (gated attention for multiple instances);
Radford et al. 2021 (CLIP); Psomas et al. 2023 (SimPool). What differs: CLIP's and timm's codes
compute the attention of all places for all and keep one row; here only that row is computed.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from attnlab.attention import attention_weights
from attnlab.layers import Mlp, check_map, pair
from attnlab.positions import resize_pos_embed
from attnlab.probe import Probe
from attnlab.resnet import GlobalAveragePool


class AveragePool(GlobalAveragePool):
    """The mean over places: every place counts 1/N, whatever it shows."""

    def maps(self, x: Tensor) -> Tensor:
        """The weight of every place: `(B, C, h, w)` → `(B, 1, h, w)`."""
        return torch.full_like(x[:, :1], 1 / (x.shape[2] * x.shape[3]))


class GeneralizedMeanPool(nn.Module):
    """GeM: (mean of xᵖ)^(1/p), each channel for itself; p = 1 is the mean, p → ∞ the maximum.

    Args:
        p: exponent at the beginning; it is learned.
        eps: what x is raised to, at least, before the power.
    """

    def __init__(self, p: float = 3.0, eps: float = 1e-6):
        super().__init__()
        if p <= 0:
            raise ValueError(f"p={p}: expected a positive exponent")
        self.p = nn.Parameter(torch.tensor(float(p)))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        check_map(x)
        return x.clamp(min=self.eps).pow(self.p).mean((2, 3)).pow(1 / self.p)


class LogSumExpPool(nn.Module):
    """LSE: (1/r) log mean exp(r x), each channel for itself; r → 0 is the mean, r → ∞ the maximum.

    Args:
        r: sharpness at the beginning; it is learned.
    """

    def __init__(self, r: float = 10.0):
        super().__init__()
        if r <= 0:
            raise ValueError(f"r={r}: expected a positive sharpness")
        self.r = nn.Parameter(torch.tensor(float(r)))

    def forward(self, x: Tensor) -> Tensor:
        check_map(x)
        largest = x.amax((2, 3), keepdim=True)
        mean = (self.r * (x - largest)).exp().mean((2, 3))
        return largest[:, :, 0, 0] + mean.log() / self.r


class WeightedPool(nn.Module):
    """Pool by one softmax over the places (a head): the common part of the modules below.

    They say in `attend` what is weighed and how. `attn_probe` sees the weights `(B, heads, 1,
    keys)`, whose rows sum to 1. One query has few weights, so that there is one form and no `impl`.
    """

    def __init__(self, dim: int, num_heads: int = 1):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim={dim}: expected a multiple of num_heads={num_heads}")
        self.dim, self.num_heads = dim, num_heads
        self.attn_probe = Probe()

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The map `(B, dim, h, w)` → weights `(B, m, 1, keys)`, values `(B, m, keys, dim / m)`."""
        raise NotImplementedError

    def finish(self, x: Tensor) -> Tensor:
        """The weighted mean `(B, dim)` → what comes out, `(B, dim)`."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        check_map(x, self.dim)
        weights, values = self.attend(x)
        out = self.attn_probe(weights).to(values.dtype) @ values
        return self.finish(rearrange(out, "b m 1 e -> b (m e)"))

    def maps(self, x: Tensor) -> Tensor:
        """The weight of every place: `(B, dim, h, w)` → `(B, heads, h, w)`; other keys left out."""
        check_map(x, self.dim)
        weights, _ = self.attend(x)
        places = weights[..., 0, -x.shape[2] * x.shape[3] :]
        return rearrange(places, "b m (h w) -> b m h w", h=x.shape[2])

    def dense_map(self, map: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """The recorded map is dense already: `(B, heads, 1, keys)` → the same."""
        return map

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (m e) -> b m n e", m=self.num_heads)


def tokens(x: Tensor) -> Tensor:
    """`(B, C, h, w)` → `(B, N, C)`."""
    return rearrange(x, "b c h w -> b (h w) c")


class ContextPool(WeightedPool):
    """GCNet's context: softmax over places of ⟨w, x_n⟩, then the mean of the x_n so weighed."""

    def __init__(self, dim: int):
        super().__init__(dim)
        self.score = nn.Linear(dim, 1)

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = tokens(x)
        return rearrange(self.score(x), "b n 1 -> b 1 1 n").softmax(-1), x[:, None]


class GatedPool(WeightedPool):
    """Gated attention: softmax over places of ⟨w, tanh(V x_n) ∘ σ(U x_n)⟩ (Ilse et al., Eq. 9).

    Args:
        hidden: rows of U and V.
    """

    def __init__(self, dim: int, hidden: int = 128):
        super().__init__(dim)
        self.value, self.gate = nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        self.score = nn.Linear(hidden, 1)

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = tokens(x)
        scores = self.score(self.value(x).tanh() * self.gate(x).sigmoid())
        return rearrange(scores, "b n 1 -> b 1 1 n").softmax(-1), x[:, None]


class MeanQueryPool(WeightedPool):
    """CLIP's pooling: the mean place asks the mean place and all places, with learned positions.

    Parameters have the names of timm's `AttentionPool2d`.

    Args:
        num_heads: dim / 64 by default.
        feat_size: (h, w) of the positions, which are resized to other maps.
    """

    def __init__(
        self, dim: int, num_heads: int | None = None, feat_size: int | tuple[int, int] = 7
    ):
        super().__init__(dim, max(1, dim // 64) if num_heads is None else num_heads)
        self.feat_size = pair(feat_size)
        self.pos_embed = nn.Parameter(torch.empty(self.feat_size[0] * self.feat_size[1] + 1, dim))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        for weight in (self.pos_embed, self.qkv.weight):
            nn.init.trunc_normal_(weight, std=dim**-0.5)
        nn.init.zeros_(self.qkv.bias)

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = reduce(x, "b c h w -> b 1 c", "mean")
        positions = resize_pos_embed(self.pos_embed[None], tuple(x.shape[2:]), self.feat_size, 1)
        x = torch.cat([mean, tokens(x)], dim=1) + positions
        weight, bias = self.qkv.weight, self.qkv.bias
        q = F.linear(x[:, :1], weight[: self.dim], bias[: self.dim])
        k, v = F.linear(x, weight[self.dim :], bias[self.dim :]).chunk(2, dim=-1)
        return attention_weights(self._heads(q), self._heads(k)), self._heads(v)

    def finish(self, x: Tensor) -> Tensor:
        return self.proj(x)


class LatentPool(WeightedPool):
    """A learned query, places only, no norm and no residual to the query; timm's names.

    o = W_o attention, then o + MLP(o): timm's `AttentionPoolLatent` at its defaults.
    """

    def __init__(self, dim: int, num_heads: int = 8, mlp_ratio: float = 4.0):
        super().__init__(dim, num_heads)
        self.latent = nn.Parameter(torch.empty(1, 1, dim))
        self.q, self.kv, self.proj = (nn.Linear(dim, n * dim) for n in (1, 2, 1))
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        nn.init.trunc_normal_(self.latent, std=dim**-0.5)

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q = self._heads(self.q(self.latent.expand(len(x), -1, -1)))
        k, v = (self._heads(t) for t in self.kv(tokens(x)).chunk(2, dim=-1))
        return attention_weights(q, k), v

    def finish(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        return x + self.mlp(x)


class SimPool(WeightedPool):
    """The mean place asks the normalised places, whose values are not projected; timm's names.

    Args:
        gamma: exponent of a power mean of the values, shifted to be positive; None is the mean.
    """

    def __init__(self, dim: int, gamma: float | None = None):
        super().__init__(dim)
        if gamma is not None and gamma <= 0:
            raise ValueError(f"gamma={gamma}: expected None or a positive exponent")
        self.gamma = gamma
        self.norm = nn.LayerNorm(dim)
        self.q, self.k = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q = self.q(reduce(x, "b c h w -> b 1 c", "mean"))
        z = self.norm(tokens(x))
        values = z
        if self.gamma is not None:
            values = (z - z.amin(1, keepdim=True) + 1e-6).pow(self.gamma)
        return attention_weights(self._heads(q), self._heads(self.k(z))), values[:, None]

    def finish(self, x: Tensor) -> Tensor:
        return x if self.gamma is None else x.pow(1 / self.gamma)
