"""DependencyViT, a vision transformer whose patches choose their parents (chapter 09).

Paper: Ding et al., CVPR 2023, "Visual Dependency Transformers: Dependency Tree Emerges from
Reversed Attention", arXiv:2304.03282. The idea: in reversed attention (`ReversedAttention`) each
patch sends its message to the parents it chooses, and falls silent when it has nothing more to say.
Who sends to whom makes a dependency tree (`DependencyViT.trace`, `dependency_scores`,
`dependency_tree`), and who is silent can be dropped (the Lite form).

No official code exists, and the one public port does not reach the paper's numbers. This follows
the published equations as far as they are known; each open point is an argument, and the readings
that are ours are marked so.
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from attnlab.dependency_pruning import SCORES, Encoding, Sending, keep_counts, prune, restore
from attnlab.dependency_trace import DependencyTrace
from attnlab.dependency_trace import dependency_saliency as dependency_saliency
from attnlab.dependency_trace import dependency_scores as dependency_scores
from attnlab.dependency_trees import dependency_tree as dependency_tree
from attnlab.layers import DropPath, LayerNorm, LayerScale, Mlp, PatchEmbed
from attnlab.positions import resize_pos_embed
from attnlab.reversed_attention import ReversedAttention, init_linear
from attnlab.reversed_attention import reversed_attention as reversed_attention

POOLS = ("gate_mean", "gate_sum", "mean", "root", "cls")


class DependencyBlock(nn.Module):
    """x + reversed attention(norm(x)), then x + mlp(norm(x)); messages go through (Sec. 3).

    `forward` takes and gives what `ReversedAttention` does. `mlp_ratio`, `init_values` (LayerScale;
    None is none) and `drop_path` as in other transformers; `**options` are `ReversedAttention`'s.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        init_values: float | None = None,
        **options,
    ):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = ReversedAttention(dim, num_heads, proj_drop=proj_drop, **options)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path)

    def forward(
        self, x: Tensor, messages: Tensor | None = None, observe: bool = False
    ) -> tuple[Tensor, ...]:
        x, *rest = self.send(x, messages, observe)
        return (self.digest(x), *rest)

    def send(self, x: Tensor, messages: Tensor | None, observe: bool) -> tuple[Tensor, ...]:
        """The first half: messages go to the parents."""
        out, *rest = self.attn(self.norm1(x), messages, observe)
        return (x + self.drop_path1(self.ls1(out)), *rest)

    def digest(self, x: Tensor) -> Tensor:
        """The second half: every token for itself."""
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class DependencyViT(nn.Module):
    """A vision transformer of reversed attention; with `prune_layers`, its Lite form (Sec. 3).

    Images `(B, in_chans, H, W)` → logits `(B, num_classes)`. H and W may differ from `img_size`
    (multiples of `patch_size`): the position embedding is then resized.

    Args:
        global_pool: what is classified, with x the normalised tokens and M the last messages:
            "gate_mean" Σ M x / Σ M (ours); "gate_sum" the mean of M x (the public port); "mean";
            "root" the token that received most from others (materialises the weights); "cls" a
            token that receives and never sends.
        drop_rate, proj_drop_rate: dropout before the head, and of outputs.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 at the first.
        gate_bias_init: as in `ReversedAttention`; None is 3 for more than 6 blocks, else 0 (ours:
            with 0, the messages of block 12 start at 0.02 % of those of block 1).
        init_values: LayerScale's first value; None has no LayerScale.
        prune_layers: blocks, counted from 1, at which tokens are dropped. The blocks up to the
            last of them materialise their weights.
        keep_rates: share of the original patches left at each of them.
        prune_at: "before" the block, by the layer before it (ours), or "mid", between its two
            halves and by itself (the public port).
        prune_score, prune_rounding: as in `prune` and `keep_counts`.
        restore_grad: let gradients of restored maps pass through the remembered parents' shares.
        qkv_bias, controller_ratio, temperature, gate_exclusive, mask_self, renorm, impl: as in
            `ReversedAttention`, for every block.

    Raises:
        ValueError: an option or number out of range; an image side not a multiple of `patch_size`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "gate_mean",
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        gate_bias_init: float | None = None,
        init_values: float | None = None,
        prune_layers: tuple[int, ...] = (),
        keep_rates: tuple[float, ...] = (),
        prune_at: str = "before",
        prune_score: str = "received_sum",
        prune_rounding: str = "floor",
        restore_grad: bool = False,
        **options,
    ):
        super().__init__()
        _check_options(depth, prune_layers, keep_rates, prune_at, prune_score, prune_rounding)
        self.num_features = self.embed_dim = embed_dim
        self.prune_layers, self.keep_rates = tuple(prune_layers), tuple(keep_rates)
        self.prune_at, self.prune_score = prune_at, prune_score
        self.prune_rounding, self.restore_grad = prune_rounding, restore_grad
        self.num_prefix_tokens = int(global_pool == "cls")

        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        tokens = self.num_prefix_tokens + math.prod(self.patch_embed.grid_size)
        self.cls_token = (
            nn.Parameter(torch.zeros(1, 1, embed_dim)) if global_pool == "cls" else None
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim))
        if gate_bias_init is None:
            gate_bias_init = 3.0 if depth > 6 else 0.0
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList([
            DependencyBlock(embed_dim, num_heads, mlp_ratio, proj_drop_rate, rate, init_values,
                            gate_bias_init=gate_bias_init, **options)
            for rate in rates
        ])  # fmt: skip
        self.norm = LayerNorm(embed_dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.init_weights()

    def init_weights(self) -> None:
        """Everything learned is small, every bias zero but the gates' (`gate_bias_init`)."""
        self.apply(init_linear)
        for block in self.blocks:
            block.attn.init_weights()
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=1e-6)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one (none, features, for 0 classes), and maybe the pooling."""
        pool = self.global_pool if global_pool is None else global_pool
        allowed = ("cls",) if self.cls_token is not None else POOLS[:-1]
        if pool not in allowed:
            raise ValueError(f"global_pool={pool!r}: expected one of {', '.join(allowed)}")
        self.num_classes, self.global_pool = num_classes, pool
        like = self.patch_embed.proj.weight
        self.head = (
            nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype)
            if num_classes
            else nn.Identity()
        )

    def no_weight_decay(self) -> set[str]:
        """The parameters that an optimiser should not decay, besides biases and norms."""
        return {"pos_embed", "cls_token"}

    def forward_features(self, x: Tensor) -> Encoding:
        """Images `(B, in_chans, H, W)` → the normalised tokens that are left, and their past."""
        return self._encode(x, None)

    def forward_head(self, encoding: Encoding, pre_logits: bool = False) -> Tensor:
        """From `forward_features` → logits `(B, num_classes)`, or the features before them."""
        x, messages = encoding.tokens, encoding.messages[..., None]
        if self.global_pool == "gate_mean":
            x = (messages * x).sum(1) / messages.sum(1).clamp_min(torch.finfo(messages.dtype).tiny)
        elif self.global_pool == "gate_sum":
            x = (messages * x).mean(1)
        elif self.global_pool == "mean":
            x = x.mean(1)
        else:
            place = encoding.received.argmax(1) if self.global_pool == "root" else 0
            x = x[torch.arange(len(x), device=x.device), place]
        x = self.head_drop(x.to(encoding.tokens.dtype))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def restore(self, encoding: Encoding, fill: str = "soft") -> Tensor:
        """All patch tokens in the order of the grid, `(B, N, D)`: pruned ones from their parents.

        `fill` as in `attnlab.dependency_pruning.restore`.
        """
        return restore(encoding.tokens, encoding.stages, fill)[:, self.num_prefix_tokens :]

    def forward_map(self, x: Tensor, fill: str = "soft") -> Tensor:
        """Images → a feature map for dense heads, `(B, D, rows, columns)`; `fill` as above."""
        encoding = self.forward_features(x)
        return rearrange(self.restore(encoding, fill), "b (h w) d -> b d h w", h=encoding.grid[0])

    @torch.no_grad()
    def trace(self, x: Tensor) -> DependencyTrace:
        """Who sends how much to whom in every layer, on the original grid, without gradients."""
        layers: list[tuple[Encoding, Sending]] = []
        encoding = self._encode(x, layers)
        return DependencyTrace.of(layers, encoding, self.num_prefix_tokens)

    def _encode(self, x: Tensor, layers: list[tuple[Encoding, Sending]] | None) -> Encoding:
        """All blocks; `layers` collects what each of them sent, over which tokens."""
        state = self._embed(x)
        patches = math.prod(state.grid)
        counts = keep_counts(patches, self.keep_rates, self.prune_rounding)
        keep = dict(zip(self.prune_layers, counts, strict=True))
        observed = len(self.blocks) if self.global_pool == "root" else max(keep, default=0)
        sending = None
        for layer, block in enumerate(self.blocks, start=1):
            if layer in keep and self.prune_at == "before":
                state = self._prune(state, sending, keep[layer])
            observe = layer <= observed or layers is not None
            x, messages, *seen = block.send(state.tokens, state.messages, observe)
            state = state._replace(tokens=x, messages=messages)
            if observe:
                sending = seen[0]
                state = state._replace(received=state.received + sending.received())
            if layers is not None:
                layers.append((state, sending))
            if layer in keep and self.prune_at == "mid":
                state = self._prune(state, sending, keep[layer])
            state = state._replace(tokens=block.digest(state.tokens))
        return state._replace(tokens=self.norm(state.tokens))

    def _embed(self, x: Tensor) -> Encoding:
        """Patches with their positions, and open gates; a class token starts, and stays, mute."""
        tokens = self.patch_embed(x)
        grid = self.patch_embed.grid(*x.shape[-2:])
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], dim=1)
        prefix = self.num_prefix_tokens
        tokens = tokens + resize_pos_embed(
            self.pos_embed, grid, self.patch_embed.grid_size, num_prefix_tokens=prefix
        )
        place = torch.arange(tokens.shape[1], device=x.device).expand(tokens.shape[:2])
        messages = (place >= prefix).to(torch.promote_types(tokens.dtype, torch.float32))
        return Encoding(tokens, messages, torch.zeros_like(messages), place, grid)

    def _prune(self, state: Encoding, sending: Sending, keep: int) -> Encoding:
        return prune(
            state, sending, keep, self.prune_score, self.num_prefix_tokens, self.restore_grad
        )


def _check_options(depth, prune_layers, keep_rates, prune_at, prune_score, prune_rounding) -> None:
    """`ValueError` for pruning options that are unknown or do not fit together."""
    for name, value, allowed in (
        ("prune_at", prune_at, ("before", "mid")),
        ("prune_score", prune_score, SCORES),
        ("prune_rounding", prune_rounding, ("floor", "sequential")),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(allowed)}")
    first = 2 if prune_at == "before" else 1
    if list(prune_layers) != sorted(set(prune_layers) & set(range(first, depth + 1))):
        expected = f"ascending blocks from {first} to {depth}"
        raise ValueError(
            f"prune_layers={prune_layers}: expected {expected} (prune_at={prune_at!r})"
        )
    falling = all(a > b for a, b in zip((1.0, *keep_rates), (*keep_rates, 0.0), strict=True))
    if len(keep_rates) != len(prune_layers) or not falling:
        expected = f"{len(prune_layers)} falling shares between 1 and 0, one a stage"
        raise ValueError(f"keep_rates={keep_rates}: expected {expected}")


LITE = {"prune_layers": (2, 5, 8, 11), "keep_rates": (0.84, 0.68, 0.52, 0.36)}


def dependencyvit_tiny(**kwargs) -> DependencyViT:
    """6.2 M parameters at 224 pixels. Keywords: `DependencyViT`'s."""
    return DependencyViT(**{"embed_dim": 192} | kwargs)


def dependencyvit_small(**kwargs) -> DependencyViT:
    """23.9 M parameters at 224 pixels, stochastic depth 0.1. Keywords: `DependencyViT`'s."""
    return DependencyViT(**{"embed_dim": 384, "drop_path_rate": 0.1} | kwargs)


def dependencyvit_lite_tiny(**kwargs) -> DependencyViT:
    """The tiny model, which ends with 36 % of its patches. Keywords: `DependencyViT`'s."""
    return dependencyvit_tiny(**LITE | kwargs)


def dependencyvit_lite_small(**kwargs) -> DependencyViT:
    """The small model with the tiny one's stages (ours: its own are unknown)."""
    return dependencyvit_small(**LITE | kwargs)


def dependencyvit_mini(**kwargs) -> DependencyViT:
    """For the bundled 64-pixel data: 8×8 patches, 6 blocks, 6 heads of width 16, 8 classes."""
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 6}
    return DependencyViT(**sizes | {"num_classes": 8} | kwargs)
