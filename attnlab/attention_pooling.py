"""Attention pooling: a learned class vector asks every place of a feature map once (chapter 08).

Paper: Touvron et al. 2021, "Augmenting Convolutional networks with attention-based aggregation"
(PatchConvNet). The idea: in place of the mean over all places, one cross-attention with one head,
whose single softmax says what each place counted; a residual onto the class vector and a small
feed-forward network follow. With one vector a class there is one such map a class.

What differs from the paper: the equations are those of the authors' code. It projects every place
to a key and a value; here the order of the sums may be changed, which gives the same numbers. The
query does not depend on the image, so that the keys' projection turns into a 1×1 convolution with
one output channel; and the mean of projected places is the projection of their mean.
"""

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from attnlab.attention import attention_weights, scaled_dot_product_attention
from attnlab.layers import LayerNorm, LayerScale, Mlp, check_map
from attnlab.official import renaming
from attnlab.probe import Probe

IMPLS = ("auto", "explicit", "fused", "collapsed")
SAVING = 0.9  # of the multiply-adds, below which "auto" collapses; benchmarks/patchconvnet.py

# timm's `LayerScaleBlockClassAttn`, the class attention of CaiT, which has one vector outside.
CLASS_ATTENTION = {"attn.": "", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}


def collapsed_macs(
    batch: int, dim: int, queries: int, keys: int, num_heads: int = 1
) -> tuple[int, int]:
    """Multiply-adds of keys, scores, values and weighted mean: as written, and collapsed.

    Collapsed, each head compares in the full width `dim` with a query that holds for all images,
    and the values are projected after the mean where there are fewer queries than keys.
    """
    written = 2 * batch * keys * dim * (dim + queries)
    by_key = batch * num_heads * queries * keys * dim
    if queries <= keys:
        return written, queries * dim**2 + 2 * by_key + batch * queries * dim**2
    return written, queries * dim**2 + by_key + batch * keys * dim * (dim + queries)


class AttentionPool(nn.Module):
    """Pool a map by the attention of learned class vectors (PatchConvNet).

    With X the places, c the class vector(s), Z = LN([c; X]):

        a = softmax(W_q z_c · W_k Z / √d),  o = W_o Σ_n a_n W_v z_n
        c ← c + γ₁ ∘ o,  c ← c + γ₂ ∘ FFN(LN(c))

    Map `(B, dim, h, w)` → `(B, dim)`; `(B, queries, dim)` for several queries. It fits the slot of
    any backbone: `resnet50(pool=AttentionPool(2048))`. 10·dim² + 14·dim parameters at the default
    ratio, and dim for each query. `attn_probe` sees a, `(B, heads, queries, keys)`, whose rows sum
    to 1; the class vectors are the first keys where they are keys.

    Args:
        dim: channels of the map, a multiple of `num_heads`.
        queries: number of class vectors.
        num_heads: only with one head is there one map a query.
        mlp_ratio: hidden width of the feed-forward network over `dim`.
        qkv_bias: whether queries, keys and values have biases.
        cls_in_keys: whether the class vectors are keys too; by default for one query only.
        init_values: γ at the beginning; 1e-4 is for hundreds of epochs, 0.1 for few.
        init_std: of the linear maps' truncated normal.
        proj_drop: dropout of o and in the feed-forward network.
        impl: "explicit" projects every place and materialises a; "fused" is PyTorch's kernel;
            "collapsed" projects queries and means instead of places (values of places where there
            are more queries than places); "auto" is "collapsed" where that saves a tenth of the
            multiply-adds, else "explicit". All are equal.

    State dicts of timm's `LayerScaleBlockClassAttn` load, but for `cls_token`.

    Raises:
        ValueError: an unknown `impl`; no query; `dim` not a multiple of `num_heads`; an input that
            is not `(B, dim, h, w)`.
    """

    def __init__(
        self,
        dim: int,
        queries: int = 1,
        *,
        num_heads: int = 1,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        cls_in_keys: bool | None = None,
        init_values: float = 1e-4,
        init_std: float = 0.02,
        proj_drop: float = 0.0,
        impl: str = "auto",
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim={dim}: expected a multiple of num_heads={num_heads}")
        if queries < 1:
            raise ValueError(f"queries={queries}: expected at least 1")
        if impl not in IMPLS:
            raise ValueError(f"impl={impl!r}: expected one of {', '.join(IMPLS)}")
        self.dim, self.num_heads, self.impl = dim, num_heads, impl
        self.cls_in_keys = queries == 1 if cls_in_keys is None else cls_in_keys
        self.cls_token = nn.Parameter(torch.zeros(1, queries, dim))
        self.norm1 = LayerNorm(dim)
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.k = nn.Linear(dim, dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.attn_probe = Probe()
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.ls1 = LayerScale(dim, init_values)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.ls2 = LayerScale(dim, init_values)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=init_std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.register_load_state_dict_pre_hook(renaming(CLASS_ATTENTION))

    def forward(self, x: Tensor) -> Tensor:
        out = self.tokens(x)
        return out[:, 0] if out.shape[1] == 1 else out

    def tokens(self, x: Tensor) -> Tensor:
        """Map `(B, dim, h, w)` → the class vectors after it, `(B, queries, dim)`."""
        c, z = self._normalized(x)
        out = self.proj_drop(self.proj(self._attend(c, z)))
        cls = self.cls_token + self.ls1(out)
        return cls + self.ls2(self.mlp(self.norm2(cls)))

    def maps(self, x: Tensor, normalize: bool = False) -> Tensor:
        """The weight of every place: map `(B, dim, h, w)` → `(B, queries, h, w)`, mean over heads.

        What the class vectors themselves received, as keys, is missing from a map's sum;
        `normalize` divides by the sum.
        """
        c, z = self._normalized(x)
        places = self._weights(c, z)[..., -z.shape[1] :].mean(1)
        if normalize:
            places = places / places.sum(-1, keepdim=True)
        return rearrange(places, "b q (h w) -> b q h w", h=x.shape[2])

    def dense_map(self, map: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """The recorded map is dense already: `(B, heads, queries, keys)` → the same."""
        return map

    def freeze_uniform(self) -> "AttentionPool":
        """Set the query to 0 for good, so that all weights are equal. Returns the module.

        The control for the softmax: equal in parameters, feed-forward network and cost.
        """
        for parameter in self.q.parameters():
            nn.init.zeros_(parameter).requires_grad_(False)
        return self

    def _normalized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """LN of the class vectors, `(1, Q, d)`, and of the places, `(B, N, d)`."""
        check_map(x, self.dim)
        return self.norm1(self.cls_token), self.norm1(rearrange(x, "b d h w -> b (h w) d"))

    def _attend(self, c: Tensor, z: Tensor) -> Tensor:
        """Σ_n a_n W_v z_n, heads side by side: `(B, Q, d)`."""
        impl = self.impl
        if impl == "auto":
            keys = z.shape[1] + self.cls_in_keys * c.shape[1]
            written, collapsed = collapsed_macs(len(z), self.dim, c.shape[1], keys, self.num_heads)
            impl = "collapsed" if collapsed < SAVING * written else "explicit"
        if impl == "collapsed":
            return self._collapsed(c, z)
        if self.cls_in_keys:
            z = torch.cat([c.expand(len(z), -1, -1), z], dim=1)
        q, k, v = (self._heads(t) for t in (self.q(c).expand(len(z), -1, -1), self.k(z), self.v(z)))
        if impl == "explicit":
            out = self.attn_probe(attention_weights(q, k)).to(v.dtype) @ v
        else:
            out = scaled_dot_product_attention(q, k, v, impl=impl)
        return rearrange(out, "b m q e -> b q (m e)")

    def _collapsed(self, c: Tensor, z: Tensor) -> Tensor:
        """Pool first, project after; the places are neither projected nor joined with the class."""
        weights = self.attn_probe(self._weights(c, z)).to(z.dtype)
        parts = [c, z] if self.cls_in_keys else [z]
        shares = weights.split([part.shape[1] for part in parts], dim=-1)
        if c.shape[1] > z.shape[1]:
            values = (self._heads(self.v(part)) for part in parts)
            out = sum(a @ v for a, v in zip(shares, values, strict=True))
            return rearrange(out, "b m q e -> b q (m e)")
        mean = sum(a @ part[:, None] for a, part in zip(shares, parts, strict=True))  # (B, m, Q, d)
        w_v = rearrange(self.v.weight, "(m e) d -> m e d", m=self.num_heads)
        out = rearrange(einsum(mean, w_v, "b m q d, m e d -> b q m e"), "b q m e -> b q (m e)")
        return out if self.v.bias is None else out + self.v.bias  # the weights sum to 1

    def _weights(self, c: Tensor, z: Tensor) -> Tensor:
        """a, `(B, heads, Q, keys)`, by probes W_kᵀ q / √d, one a head and query, for all images."""
        q = self._heads(self.q(c))[0] * (self.dim // self.num_heads) ** -0.5  # (m, Q, e)
        w_k = rearrange(self.k.weight, "(m e) d -> m e d", m=self.num_heads)
        probes = rearrange(q @ w_k, "m q d -> (m q) d")
        bias = None
        if self.k.bias is not None:  # the softmax cancels it
            bias = (q @ rearrange(self.k.bias, "(m e) -> m e 1", m=self.num_heads)).flatten()
        scores = F.linear(z, probes, bias)
        if self.cls_in_keys:
            scores = torch.cat([F.linear(c, probes, bias).expand(len(z), -1, -1), scores], dim=1)
        scores = rearrange(scores, "b n (m q) -> b m q n", m=self.num_heads)
        return scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1)

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (m e) -> b m n e", m=self.num_heads)
