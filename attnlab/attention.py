"""Scaled dot-product attention, and the vision transformer made of it (chapter 01).

Papers: Vaswani et al. 2017, "Attention Is All You Need" (Sec. 3.2); Dosovitskiy et al. 2021, "An
Image Is Worth 16x16 Words" (ViT); Touvron et al. 2021, "Training Data-Efficient Image Transformers"
(DeiT); Abnar & Zuidema 2020 (rollout). The idea: every position asks a question (query), compares
it with what every position offers (key), and receives the mean of their contents (values), weighted
by the softmax of the comparisons. An image is a sequence of patches.

What differs from the papers: the encoder is DeiT's with timm's parameter names (LayerNorm first,
eps 1e-6); any image size is accepted, and position embeddings are resized to it.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from attnlab.kernels import (
    blockwise_attention,
    check_impl,
    check_inputs,
    fused_attention,
    fused_is_faster,
    scores_of,
)
from attnlab.layers import DropPath, LayerNorm, Mlp, PatchEmbed
from attnlab.positions import resize_pos_embed, sincos_pos_embed
from attnlab.probe import Probe
from attnlab.probe import attention_rollout as attention_rollout


def attention_weights(
    q: Tensor, k: Tensor, *, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """How much each query attends to each key: softmax(scale · Q Kᵀ + mask) (Vaswani, Eq. 1).

    Args:
        q: queries, `(..., N, d)`; usually `(B, heads, N, d)`.
        k: keys, `(..., M, d)`.
        mask: broadcastable to `(..., N, M)`. Boolean: True = may attend (as in
            `F.scaled_dot_product_attention`, and the opposite of `nn.MultiheadAttention`).
            Float: added to the scaled scores; −∞ forbids.
        scale: factor of the scores; 1/√d by default, which keeps the scores of independent
            unit-variance queries and keys at unit variance.

    Returns:
        `(..., N, M)`, at least float32. Every row sums to 1; a row that may attend nowhere is 0.

    Raises:
        ValueError: the shapes of `q` and `k` or of `mask` do not fit, or `mask` is an integer.
    """
    check_inputs(q, k, k, mask)
    scores = scores_of(q, k, mask, q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is None:
        return scores.softmax(-1)
    dead = (scores == -math.inf).all(-1, keepdim=True)  # rows that may attend nowhere
    return scores.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0)


def scaled_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """softmax(scale · Q Kᵀ + mask) V: each query receives a weighted mean of the values.

    Args:
        q: queries, `(..., N, d)`; usually `(B, heads, N, d)`.
        k: keys, `(..., M, d)`.
        v: values, `(..., M, dv)`.
        mask, scale: as in `attention_weights`.
        dropout_p: probability of dropping a weight, applied whenever it is not 0 (also in eval).
        impl: "explicit" materialises the `(N, M)` weights; "fused" is PyTorch's kernel, which does
            not; "blockwise" is `blockwise_attention`, the fused idea in readable code; "auto" is
            the fastest of the first two for the shape, device and grad mode.

    Returns:
        `(..., N, dv)` in the dtype of `v`. A row that may attend nowhere gives zeros, never NaN.

    Raises:
        ValueError: shapes, `impl` or `dropout_p` as above do not fit.
    """
    check_inputs(q, k, v, mask)
    check_impl(impl)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p={dropout_p}: expected a probability in [0, 1)")
    if impl == "blockwise":
        if dropout_p:
            raise ValueError(f"dropout_p={dropout_p}: expected 0.0 with impl='blockwise'")
        return blockwise_attention(q, k, v, mask=mask, scale=scale)
    if impl == "fused" or (impl == "auto" and fused_is_faster(q, k, v)):
        return fused_attention(q, k, v, mask=mask, scale=scale, dropout_p=dropout_p)
    weights = attention_weights(q, k, mask=mask, scale=scale)
    return F.dropout(weights, dropout_p).to(v.dtype) @ v


class MultiHeadAttention(nn.Module):
    """Several attentions in parallel, each on its own part of the width (Vaswani, Sec. 3.2.2).

    The rows of the one weight `qkv` are [all q heads, all k heads, all v heads], as in timm; `proj`
    mixes the heads. 4·dim² + 4·dim parameters, whatever the number of heads.

    Args:
        dim: width D of the tokens, a multiple of `num_heads`.
        num_heads: number of heads; each has width d = dim / num_heads and scale 1/√d.
        qkv_bias: whether `qkv` has a bias (that of the keys has no effect: the softmax cancels it).
        attn_drop, proj_drop: dropout of the weights and of the output, in training.
        impl: as in `scaled_dot_product_attention`.

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`; unknown `impl`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        impl: str = "auto",
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim={dim}: expected a multiple of num_heads={num_heads}")
        check_impl(impl)
        self.num_heads = num_heads
        self.impl = impl
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_probe = Probe()
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Tokens `(B, N, D)` → `(B, N, D)`.

        Args:
            x: where the queries come from.
            context: where keys and values come from, `(B, M, D)`; `x` by default.
            mask: broadcastable to `(B, heads, N, M)`; True = may attend, or added if float.
                For padding, `(B, M)`, give `mask[:, None, None, :]`.

        Raises:
            ValueError: `x` or `context` is not `(B, tokens, dim)`, or `mask` does not fit.
        """
        q, k, v = self._queries_keys_values(x, x if context is None else context)
        if self.impl == "explicit":
            weights = self.attn_probe(attention_weights(q, k, mask=mask))  # (B, heads, N, M)
            out = self.attn_drop(weights).to(v.dtype) @ v
        else:
            p = self.attn_drop.p if self.training else 0.0
            out = scaled_dot_product_attention(q, k, v, mask=mask, dropout_p=p, impl=self.impl)
        return self.proj_drop(self.proj(rearrange(out, "b h n d -> b n (h d)")))

    def _queries_keys_values(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dim = self.proj.in_features
        for name, tokens in (("x", x), ("context", context)):
            if tokens.ndim != 3 or tokens.shape[-1] != dim or len(tokens) != len(x):
                raise ValueError(f"{name} {tuple(tokens.shape)}: expected (B, tokens, dim={dim})")
        if context is x:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            weight, bias = self.qkv.weight, self.qkv.bias
            q = F.linear(x, weight[:dim], None if bias is None else bias[:dim])
            kv = F.linear(context, weight[dim:], None if bias is None else bias[dim:])
            k, v = kv.chunk(2, dim=-1)
        return tuple(rearrange(t, "b n (h d) -> b h n d", h=self.num_heads) for t in (q, k, v))

    def dense_map(self, map: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """The recorded map is dense already: `(B, heads, N, M)` → the same."""
        return map


class Block(nn.Module):
    """One encoder layer: x + attention(norm(x)), then x + mlp(norm(x)); `(B, N, D)` → `(B, N, D)`.

    `drop_path` is the probability of skipping a branch in training.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        impl: str = "auto",
    ):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = MultiHeadAttention(dim, num_heads, qkv_bias, attn_drop, proj_drop, impl)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """Patches, position embeddings, `depth` blocks, a linear classifier (ViT, Sec. 3.1; DeiT).

    Images `(B, in_chans, H, W)` → logits `(B, num_classes)`. H and W may differ from `img_size`
    (multiples of `patch_size`): the position embedding is then resized. State dicts of timm, of
    DeiT (the value under its key "model") and of torchvision load with `strict=True`.

    Args:
        global_pool: "token" classifies the class token; "avg" the mean of the patch tokens, and
            has the last LayerNorm behind it (`fc_norm`), as in timm.
        class_token: whether there is one; "token" needs it.
        distilled: add DeiT's distillation token and its head `head_dist`. The logits are the mean
            of both heads, or the pair in training when `distilled_training` is set to True.
        pos_embed: "learn", "sincos" (fixed, see `sincos_pos_embed`) or "none".
        drop_rate, proj_drop_rate, attn_drop_rate: dropout before the head, of outputs, of weights.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 at the first.
        impl: as in `scaled_dot_product_attention`, for every block.

    Raises:
        ValueError: an unknown option; no class token where one is needed; `embed_dim` not a
            multiple of `num_heads`; an image side not a multiple of `patch_size`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        class_token: bool = True,
        distilled: bool = False,
        pos_embed: str = "learn",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        impl: str = "auto",
    ):
        super().__init__()
        if pos_embed not in ("learn", "sincos", "none"):
            raise ValueError(f"pos_embed={pos_embed!r}: expected learn, sincos or none")
        self.num_features = self.embed_dim = embed_dim
        self.num_prefix_tokens = class_token + distilled
        self.distilled_training = False

        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        grid = self.patch_embed.grid_size
        tokens = self.num_prefix_tokens + math.prod(grid)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.dist_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if distilled else None
        if pos_embed == "learn":
            self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim))
        elif pos_embed == "sincos":
            fixed = sincos_pos_embed(grid, embed_dim)
            fixed = F.pad(fixed, (0, 0, self.num_prefix_tokens, 0))[None]
            self.register_buffer("pos_embed", fixed, persistent=False)
        else:
            self.pos_embed = None

        layer = (embed_dim, num_heads, mlp_ratio, qkv_bias, proj_drop_rate, attn_drop_rate)
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.Sequential(*[Block(*layer, rate, impl) for rate in rates])
        self.norm = LayerNorm(embed_dim) if global_pool == "token" else nn.Identity()
        self.fc_norm = nn.Identity() if global_pool == "token" else LayerNorm(embed_dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.init_weights()
        self.register_load_state_dict_pre_hook(_convert_torchvision)

    def init_weights(self) -> None:
        """timm's initialisation: everything learned is small, and every bias is zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if isinstance(self.pos_embed, nn.Parameter):
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=1e-6)
        if self.dist_token is not None:
            nn.init.trunc_normal_(self.dist_token, std=0.02)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one (none, features, for 0 classes), and maybe the pooling."""
        pool = self.global_pool if global_pool is None else global_pool
        distilled = self.dist_token is not None
        if pool not in (("token",) if distilled else ("token", "avg")):
            expected = "token (with distilled=True)" if distilled else "token or avg"
            raise ValueError(f"global_pool={pool!r}: expected {expected}")
        if self.cls_token is None and pool == "token":
            raise ValueError("class_token=False: expected True with global_pool='token'")
        self.num_classes, self.global_pool = num_classes, pool
        self.head = self._new_head()
        if distilled:
            self.head_dist = self._new_head()

    def _new_head(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        like = self.patch_embed.proj.weight
        return nn.Linear(self.embed_dim, self.num_classes, device=like.device, dtype=like.dtype)

    def no_weight_decay(self) -> set[str]:
        """The parameters that an optimiser should not decay, besides biases and norms."""
        return {"pos_embed", "cls_token", "dist_token"}

    def forward_features(self, x: Tensor) -> Tensor:
        """Images `(B, in_chans, H, W)` → tokens `(B, prefix + N, D)`, prefix tokens first."""
        height, width = x.shape[-2:]
        x = self.patch_embed(x)
        prefix = [token for token in (self.cls_token, self.dist_token) if token is not None]
        x = torch.cat([*(token.expand(len(x), -1, -1) for token in prefix), x], dim=1)
        if self.pos_embed is not None:
            new, old = self.patch_embed.grid(height, width), self.patch_embed.grid_size
            x = x + resize_pos_embed(self.pos_embed, new, old, self.num_prefix_tokens)
        return self.norm(self.blocks(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Tokens `(B, prefix + N, D)` → logits `(B, num_classes)`, or the features before them."""
        if self.dist_token is not None:
            x, x_dist = self.head_drop(x[:, 0]), self.head_drop(x[:, 1])
            if not pre_logits:
                x, x_dist = self.head(x), self.head_dist(x_dist)
                if self.training and self.distilled_training:
                    return x, x_dist
            return (x + x_dist) / 2
        x = x[:, 0] if self.global_pool == "token" else x[:, self.num_prefix_tokens :].mean(1)
        x = self.head_drop(self.fc_norm(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.forward_head(self.forward_features(x))


def deit_tiny(**kwargs) -> VisionTransformer:
    """DeiT-Ti: 5.7 M parameters at 224 pixels (DeiT, Table 1). Keywords: `VisionTransformer`'s."""
    return VisionTransformer(**{"embed_dim": 192, "num_heads": 3} | kwargs)


def deit_small(**kwargs) -> VisionTransformer:
    """DeiT-S: 22 M parameters at 224 pixels (DeiT, Table 1). Keywords: `VisionTransformer`'s."""
    return VisionTransformer(**{"embed_dim": 384, "num_heads": 6} | kwargs)


def deit_base(**kwargs) -> VisionTransformer:
    """DeiT-B, which is ViT-B: 86 M parameters at 224 pixels. Keywords: `VisionTransformer`'s."""
    return VisionTransformer(**{"embed_dim": 768, "num_heads": 12} | kwargs)


def vit_mini(**kwargs) -> VisionTransformer:
    """For the bundled 64-pixel data: 8×8 patches, 6 blocks, 3 heads of width 32, 8 classes."""
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 3}
    return VisionTransformer(**sizes | {"num_classes": 8} | kwargs)


# torchvision's names → ours, in the order in which they are replaced.
_TORCHVISION = {
    "class_token": "cls_token",
    "encoder.pos_embedding": "pos_embed",
    "conv_proj.": "patch_embed.proj.",
    "encoder.layers.encoder_layer_": "blocks.",
    ".ln_": ".norm",
    ".self_attention.in_proj_": ".attn.qkv.",
    ".self_attention.out_proj.": ".attn.proj.",
    ".mlp.0.": ".mlp.fc1.",
    ".mlp.3.": ".mlp.fc2.",
    "encoder.ln.": "norm.",
    "heads.head.": "head.",
}


def _convert_torchvision(module, state_dict, prefix, *_) -> None:
    """Before loading: rename the entries of a torchvision state dict in place."""
    if f"{prefix}conv_proj.weight" not in state_dict:
        return
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = key.removeprefix(prefix)
        for theirs, ours in _TORCHVISION.items():
            name = name.replace(theirs, ours)
        state_dict[prefix + name] = state_dict.pop(key)
