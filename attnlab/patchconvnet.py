"""PatchConvNet: a plain convolutional column under one attention pooling (chapter 08).

Paper: Touvron et al. 2021, "Augmenting Convolutional networks with attention-based aggregation".
The idea: a stem of four convolutions, `depth` equal residual blocks of one width and one resolution
(stride 16), and `AttentionPool`, whose one softmax shows where the network looked. With one class
vector a class (`multiclass`) there is one map a class.

What differs from the authors' code: maps stay maps, in channels-last memory, so that no block
copies between maps and tokens, any size of image works (theirs takes the grid for a square), and
the class vectors are as many as the classes. State dicts of their layout load.
"""

import copy
import re
from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnlab.attention_pooling import AttentionPool as AttentionPool
from attnlab.channel import SqueezeExcite
from attnlab.layers import DropPath, LayerNorm, LayerNorm2d, check_map
from attnlab.official import renaming

# The authors' names of a block and of the network, each → ours; see `attnlab.official`.
BLOCK = {
    "norm1.": "norm.",
    "attn.qkv_pos.0.": "conv1.",
    "attn.qkv_pos.2.": "conv2.",
    "attn.qkv_pos.4.conv_reduce.": "se.fc1.",
    "attn.qkv_pos.4.conv_expand.": "se.fc2.",
    "attn.qkv_pos.5.": "conv3.",
    "gamma_1": "gamma",
}
NETWORK = {
    "cls_token": "pool.cls_token",
    "blocks_token_only.0.": "pool.",
    **{f"patch_embed.proj.{2 * i}.0.": f"stem.convs.{i}." for i in range(4)},
}


class ConvStem(nn.Module):
    """3×3 convolutions of stride 2 with GELU between them.

    Images `(B, in_chans, H, W)` → `(B, embed_dim, ⌈H/2ⁿ⌉, ⌈W/2ⁿ⌉)`, n = `num_convs`. The widths
    double up to `embed_dim`; there are no biases, no norms, and nothing after the last one.

    Raises:
        ValueError: `embed_dim` that is not a multiple of 2ⁿ⁻¹; no convolution.
    """

    def __init__(self, embed_dim: int, in_chans: int = 3, num_convs: int = 4):
        super().__init__()
        if num_convs < 1:
            raise ValueError(f"num_convs={num_convs}: expected at least 1")
        if embed_dim % 2 ** (num_convs - 1):
            raise ValueError(
                f"embed_dim={embed_dim}: expected a multiple of {2 ** (num_convs - 1)}, which "
                f"{num_convs} convolutions halve {num_convs - 1} times"
            )
        widths = [in_chans, *(embed_dim // 2**i for i in reversed(range(num_convs)))]
        self.convs = nn.ModuleList(
            nn.Conv2d(width, following, 3, stride=2, padding=1, bias=False)
            for width, following in pairwise(widths)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.convs[0](x)
        for conv in self.convs[1:]:
            x = conv(F.gelu(x))
        return x


class ConvBlock(nn.Module):
    """One layer of the column: a residual branch of three convolutions and squeeze-and-excitation.

        x + γ ∘ W₂ SE(GELU(DW(GELU(W₁ norm(x)))))

    `(B, dim, h, w)` → the same. 2·dim² + 2·dim·ρ + ρ + 16·dim parameters at the defaults, with
    ρ = dim // 4. There is no other feed-forward network, and one norm.

    Args:
        kernel_size: of the depthwise convolution DW, odd; 1 mixes no places.
        se_reduction: dim / ρ; None leaves the squeeze-and-excitation out.
        norm_layer: makes the norm from `dim`; `nn.BatchNorm2d` suits large batches.
        init_values: γ at the beginning.
        drop_path: probability of skipping the branch in training.
    """

    def __init__(
        self,
        dim: int,
        *,
        kernel_size: int = 3,
        se_reduction: int | None = 4,
        norm_layer: Callable[[int], nn.Module] = LayerNorm2d,
        init_values: float = 1e-4,
        drop_path: float = 0.0,
    ):
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size}: expected an odd number")
        self.norm = norm_layer(dim)
        self.conv1 = nn.Conv2d(dim, dim, 1)
        self.conv2 = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.se = nn.Identity() if se_reduction is None else SqueezeExcite(dim, se_reduction)
        for module in self.se.children():
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()  # PyTorch's initialisation, as of all convolutions here
        self.conv3 = nn.Conv2d(dim, dim, 1)
        self.gamma = nn.Parameter(init_values * torch.ones(dim))
        self.drop_path = DropPath(drop_path)
        self.register_load_state_dict_pre_hook(renaming(BLOCK))

    def forward(self, x: Tensor) -> Tensor:
        branch = F.gelu(self.conv1(self.norm(x)))
        branch = self.conv3(self.se(F.gelu(self.conv2(branch))))
        return torch.addcmul(x, rearrange(self.gamma, "d -> d 1 1"), self.drop_path(branch))


class ClassHead(nn.Linear):
    """⟨W_j, c_j⟩ + b_j: `(B, k, d)` → `(B, k)`. One row in place of k is shared by all classes."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).sum(-1) + self.bias


class PatchConvNet(nn.Module):
    """Stem, column, attention pooling, LayerNorm, classifier (PatchConvNet).

    Images `(B, in_chans, H, W)` of any size → logits `(B, num_classes)`. State dicts of the
    authors' layout load with `strict=True`, with or without "module." and the key "model".

    Args:
        embed_dim, depth: d and L, the width and the number of blocks of the column.
        stem: "conv" or "patchify", one convolution whose stride is its size.
        stem_convs: n; a place of the map is 2ⁿ pixels wide.
        kernel_size, se_reduction, norm_layer: of `ConvBlock`.
        pool: None is `AttentionPool`, and `norm` comes after it. Any other module
            `(B, d, h, w)` → `(B, d)`, for example of `attnlab.pooling`, comes after `norm`.
        multiclass: one class vector, and so one map, for each class.
        shared_head: with `multiclass`, one row of the classifier for all classes.
        num_heads, mlp_ratio, qkv_bias, cls_in_keys, init_std, impl: of `AttentionPool`; with
            `multiclass`, `cls_in_keys` is False by default.
        init_values: of all LayerScales.
        drop_rate: dropout in the attention pooling.
        drop_path_rate: of every block of the column, the same for all.

    Raises:
        ValueError: an unknown `stem`; `multiclass` with another pool or without classes;
            `shared_head` without `multiclass`; inputs that are no such images, or, with
            "patchify", whose sides are not multiples of 2ⁿ.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 60,
        *,
        stem: str = "conv",
        stem_convs: int = 4,
        kernel_size: int = 3,
        se_reduction: int | None = 4,
        norm_layer: Callable[[int], nn.Module] = LayerNorm2d,
        pool: nn.Module | None = None,
        multiclass: bool = False,
        shared_head: bool = False,
        num_heads: int = 1,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        cls_in_keys: bool | None = None,
        init_values: float = 1e-4,
        init_std: float = 0.02,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        impl: str = "auto",
    ):
        super().__init__()
        if stem not in ("conv", "patchify"):
            raise ValueError(f"stem={stem!r}: expected 'conv' or 'patchify'")
        if multiclass and (pool is not None or num_classes < 1):
            raise ValueError(
                f"pool={pool}, num_classes={num_classes}: expected None and at least 1 with "
                "multiclass=True"
            )
        if shared_head and not multiclass:
            raise ValueError("shared_head=True: expected multiclass=True with it")
        self.in_chans, self.num_features, self.stride = in_chans, embed_dim, 2**stem_convs
        self.multiclass, self.shared_head = multiclass, shared_head
        self.grad_checkpointing = False
        self.stem = (
            ConvStem(embed_dim, in_chans, stem_convs)
            if stem == "conv"
            else nn.Conv2d(in_chans, embed_dim, self.stride, self.stride)
        )
        self.blocks = nn.Sequential(*[
            ConvBlock(
                embed_dim, kernel_size=kernel_size, se_reduction=se_reduction,
                norm_layer=norm_layer, init_values=init_values, drop_path=drop_path_rate,
            )
            for _ in range(depth)
        ])  # fmt: skip
        if pool is None:
            pool = AttentionPool(
                embed_dim, num_classes if multiclass else 1, num_heads=num_heads,
                mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, init_values=init_values, init_std=init_std,
                cls_in_keys=not multiclass if cls_in_keys is None else cls_in_keys,
                proj_drop=drop_rate, impl=impl,
            )  # fmt: skip
        self.pool = pool
        attends = isinstance(pool, AttentionPool)
        self.norm = LayerNorm(embed_dim) if attends else LayerNorm2d(embed_dim)
        self.num_classes = num_classes
        self.head = self._new_head()
        self.register_load_state_dict_pre_hook(_convert_official)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images `(B, in_chans, H, W)` → the column's map `(B, d, h, w)`."""
        check_map(x, self.in_chans)
        if isinstance(self.stem, nn.Conv2d) and (
            x.shape[2] % self.stride or x.shape[3] % self.stride
        ):
            raise ValueError(
                f"image size {tuple(x.shape[2:])}: expected multiples of {self.stride} with "
                "stem='patchify'"
            )
        # 1×1 convolutions and LayerNorm read channels-last memory without a copy.
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x

    forward_map = forward_features  # the name that `attnlab.feature_maps.MapBackbone` asks for

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The column's map → logits `(B, num_classes)`, or what the classifier reads.

        That is `(B, d)`; `(B, num_classes, d)` with `multiclass`.
        """
        if not isinstance(self.pool, AttentionPool):
            x = self.pool(self.norm(x))
        else:
            x = self.norm(self.pool.tokens(x) if self.multiclass else self.pool(x))
        return x if pre_logits else self.head(x)

    def maps(self, x: Tensor, normalize: bool = False) -> Tensor:
        """Images → where the pooling looked: `(B, 1, h, w)`; `(B, num_classes, h, w)` multiclass.

        See `AttentionPool.maps`. Every map has its own softmax over the places, also the map of a
        class that is not there: show it with the class's score. Other pools have one map a head.
        """
        x = self.forward_features(x)
        if isinstance(self.pool, AttentionPool):
            return self.pool.maps(x, normalize)
        return self.pool.maps(self.norm(x))

    def class_activation_maps(self, x: Tensor) -> Tensor:
        """Images → the classifier at every place, `(B, num_classes, h, w)` (Zhou et al. 2016).

        Signed. Their mean over places is the logits of `AveragePool`.

        Raises:
            ValueError: the model pools by attention, after which the classifier reads no place.
        """
        if isinstance(self.pool, AttentionPool):
            raise ValueError("pool=AttentionPool: expected a mean of places, such as AveragePool()")
        places = self.norm(self.forward_features(x))
        return rearrange(self.head(rearrange(places, "b d h w -> b h w d")), "b h w k -> b k h w")

    def reset_classifier(self, num_classes: int) -> None:
        """A new classifier and, with `multiclass`, new class vectors.

        For 0 classes there is no classifier, the class vectors stay, and features come out.
        """
        self.num_classes = num_classes
        if self.multiclass and num_classes:
            cls_token = self.pool.cls_token
            new = cls_token.new_empty(1, num_classes, self.num_features)
            self.pool.cls_token = nn.Parameter(nn.init.trunc_normal_(new, std=0.02))
        self.head = self._new_head()

    def get_classifier(self) -> nn.Module:
        return self.head

    def _new_head(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        rows = 1 if self.shared_head else self.num_classes
        head = (ClassHead if self.multiclass else nn.Linear)(self.num_features, rows)
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head.to(self.norm.weight)

    @torch.no_grad()
    def to_multiclass(self, noise: float = 0.02) -> "PatchConvNet":
        """A new model with one map a class, to be fine-tuned from this one, which stays as it is.

        Every class vector is a copy of the one there is, with normal noise of this deviation so
        that they can part; the classifier keeps its rows. Class vectors are no keys any more, so
        that the logits differ a little even with `noise=0`.

        Raises:
            ValueError: the model is `multiclass`, has no classes, or does not pool by attention.
        """
        if self.multiclass or not self.num_classes or not isinstance(self.pool, AttentionPool):
            raise ValueError(
                f"multiclass={self.multiclass}, num_classes={self.num_classes}, "
                f"pool={type(self.pool).__name__}: expected False, at least 1 and AttentionPool"
            )
        model = copy.deepcopy(self)
        model.multiclass, model.pool.cls_in_keys = True, False
        cls = self.pool.cls_token.expand(1, self.num_classes, -1)
        model.pool.cls_token = nn.Parameter(cls + noise * torch.randn_like(cls))
        model.head = model._new_head()
        model.head.load_state_dict(self.head.state_dict())
        return model

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In training, keep one map a block, and compute the rest again in the backward pass."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """The parameters that an optimiser should not decay, besides biases and norms."""
        return {"pool.cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict:
        """timm's grouping of parameters by depth, for learning rates that decay with it."""
        blocks = r"^blocks\.(\d+)" if not coarse else r"^blocks"
        return {"stem": r"^stem", "blocks": [(blocks, None), (r"^(?:pool|norm)\.", (99999,))]}


def patchconvnet_s60(**kwargs) -> PatchConvNet:
    """PatchConvNet-S60: 25,231,096 parameters. Keywords: `PatchConvNet`'s."""
    return PatchConvNet(**kwargs)


def patchconvnet_s120(**kwargs) -> PatchConvNet:
    """PatchConvNet-S120: 47,723,896 parameters. Keywords: `PatchConvNet`'s."""
    return PatchConvNet(**{"depth": 120, "init_values": 1e-6} | kwargs)


def patchconvnet_b60(**kwargs) -> PatchConvNet:
    """PatchConvNet-B60: 99,388,936 parameters. Keywords: `PatchConvNet`'s."""
    return PatchConvNet(**{"embed_dim": 768, "init_values": 1e-6} | kwargs)


def patchconvnet_b120(**kwargs) -> PatchConvNet:
    """PatchConvNet-B120: 188,611,336 parameters. Keywords: `PatchConvNet`'s."""
    return PatchConvNet(**{"embed_dim": 768, "depth": 120, "init_values": 1e-6} | kwargs)


def patchconvnet_l60(**kwargs) -> PatchConvNet:
    """PatchConvNet-L60: 176,009,576 parameters. Keywords: `PatchConvNet`'s."""
    return PatchConvNet(**{"embed_dim": 1024, "init_values": 1e-6} | kwargs)


def patchconvnet_l120(**kwargs) -> PatchConvNet:
    """PatchConvNet-L120: 334,294,376 parameters. Keywords: `PatchConvNet`'s."""
    return PatchConvNet(**{"embed_dim": 1024, "depth": 120, "init_values": 1e-6} | kwargs)


def patchconvnet_s60_multi(**kwargs) -> PatchConvNet:
    """PatchConvNet-S60 with a map for every class: 25,614,712 parameters for 1,000 classes."""
    return PatchConvNet(**{"multiclass": True} | kwargs)


def patchconvnet_mini(num_classes: int = 8, **kwargs) -> PatchConvNet:
    """For the bundled 64-pixel data: 8×8 places, width 64, 4 blocks.

    LayerScale begins at 0.1, and the pooling's linear maps at d^-½, for short trainings.
    """
    sizes = {"embed_dim": 64, "depth": 4, "stem_convs": 3, "init_values": 0.1}
    width = kwargs.get("embed_dim", sizes["embed_dim"])
    return PatchConvNet(**{"num_classes": num_classes, "init_std": width**-0.5} | sizes | kwargs)


def _convert_official(module, state_dict, prefix, *_) -> None:
    """Before loading: a state dict of the authors' layout gets our names, in place."""
    if isinstance(state_dict.get(f"{prefix}model"), Mapping):
        wrapped = state_dict.pop(f"{prefix}model")
        state_dict.update({prefix + name: value for name, value in wrapped.items()})
    renaming({"module.": ""})(module, state_dict, prefix)
    # One linear map a class, `head.{j}`, is a row of ours.
    found = (re.fullmatch(rf"{re.escape(prefix)}head\.(\d+)\.weight", key) for key in state_dict)
    classes = sorted(int(match[1]) for match in found if match)
    for part in ("weight", "bias"):
        rows = [state_dict.pop(f"{prefix}head.{j}.{part}") for j in classes]
        if rows:
            state_dict[f"{prefix}head.{part}"] = torch.cat(rows)
    renaming(NETWORK)(module, state_dict, prefix)
