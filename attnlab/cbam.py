"""CBAM: the convolutional block attention module (chapter 04).

Paper: Woo et al. 2018, "CBAM: Convolutional Block Attention Module" (ECCV, Sec. 3). The idea:
squeeze-and-excitation says which channels matter, and nothing about places. CBAM asks one question
after the other: *which channels*, from the mean and the largest value of each; then *which
places*, from the mean and the largest value over the channels at each place.

What differs from the paper is what the official code does: the spatial convolution has no bias and
a BatchNorm behind it whose weight starts at 0, so that the spatial gate is 1/2 everywhere at first
(`norm=None` gives the paper's literal equation). The convolution reads [mean, max], as in the paper
and in timm; the official code has [max, mean], and its weights are converted when they are loaded.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn

from attnlab.channel import IMPLS, excitation
from attnlab.layers import check_map
from attnlab.probe import Probe
from attnlab.resnet import ResNet, resnet18, resnet34, resnet50, resnet101, resnet_mini

ORDERS = ("channel_first", "spatial_first", "parallel")
POOLS = {
    "avg": lambda x: x.mean((2, 3)),
    "max": lambda x: x.amax((2, 3)),
    "lp": lambda x: torch.linalg.vector_norm(x, 2, (2, 3)),
    "lse": lambda x: x.logsumexp((2, 3)),
}


def channel_gate(
    x: Tensor,
    mlp: Callable[[Tensor], Tensor],
    *,
    pools: Sequence[str] = ("avg", "max"),
    impl: str = "auto",
) -> Tensor:
    """Mc = σ(MLP(AvgPool(F)) + MLP(MaxPool(F))): a factor for every channel (CBAM, Eq. 2).

    The sum is inside the sigmoid, and the MLP is the same for every pooled vector.

    Args:
        x: F, `(B, C, H, W)`.
        mlp: `(B, C)` → `(B, C)`.
        pools: what is pooled over the places: "avg", "max", "lp" (the 2-norm), "lse"
            (log-sum-exp).
        impl: "explicit" is the equation; "fused" takes mean and maximum by one operator with a
            backward of its own, and calls the MLP once; "auto" is the fastest.

    Returns:
        `(B, C)`, from 0 to 1, in the dtype of `x`.
    """
    if impl == "explicit":
        return _sigmoid(sum(mlp(POOLS[pool](x)) for pool in pools)).to(x.dtype)
    if set(pools) == {"avg", "max"}:
        pooled = [rearrange(p, "b c 1 1 -> b c") for p in mean_and_max(x, (2, 3), impl=impl)]
    else:
        pooled = [POOLS[pool](x) for pool in pools]
    return _sigmoid(sum(mlp(torch.cat(pooled)).chunk(len(pooled)))).to(x.dtype)


def spatial_gate(x: Tensor, conv: Callable[[Tensor], Tensor], *, impl: str = "auto") -> Tensor:
    """Ms = σ(conv([mean over channels; max over channels])): a factor for every place (Eq. 3).

    Args:
        x: `(B, C, H, W)`; in CBAM the map that the channel gate has already scaled.
        conv: `(B, 2, H, W)`, mean then maximum, → `(B, 1, H, W)`.
        impl: as in `channel_gate`.

    Returns:
        `(B, 1, H, W)`, from 0 to 1, in the dtype of `x`.
    """
    return _sigmoid(conv(torch.cat(mean_and_max(x, (1,), impl=impl), dim=1))).to(x.dtype)


def _sigmoid(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()


def mean_and_max(x: Tensor, dims: Sequence[int], *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Mean and maximum of `x` over `dims`, which stay as axes of size 1.

    Where several entries share the maximum, its gradient is divided equally among them, as by
    `torch.amax`; the official code's `torch.max` gives all of it to one. PyTorch's own backward of
    `amax` makes passes over Boolean and integer copies of `x`, and is slower on a CPU than all the
    rest of CBAM together; "fused" avoids them. "auto" takes it for training, uncompiled.
    """
    training = torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling()
    if impl == "fused" or (impl == "auto" and training):
        return _fused_mean_and_max(x, list(dims))
    return _mean_and_max(x, list(dims))


def _mean_and_max(x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
    return x.mean(dims, keepdim=True), x.amax(dims, keepdim=True)


_fused_mean_and_max = torch.library.custom_op(
    "attnlab::mean_and_max", _mean_and_max, mutates_args=()
)
_fused_mean_and_max.register_fake(_mean_and_max)


def _save(ctx, inputs, output):
    x, ctx.dims = inputs
    ctx.save_for_backward(x, output[1])


def _backward(ctx, d_mean, d_max):
    """dx = d_mean / n + [x = max] · d_max / (how many are equal to it), in three passes over x."""
    x, highest = ctx.saved_tensors
    with torch.no_grad():
        is_highest = torch.eq(x, highest, out=torch.empty_like(x))
        ties = is_highest.sum(ctx.dims, keepdim=True)
    n = x.numel() // highest.numel()
    return torch.addcmul(d_mean / n, is_highest, d_max / ties), None


_fused_mean_and_max.register_autograd(_backward, setup_context=_save)


class ChannelAttention(nn.Module):
    """Scale every channel by the factor that `channel_gate` gives it; `(B, C, H, W)` → the same.

    The MLP is `fc1`, ReLU, `fc2`, as 1×1 convolutions: 2·C·h + h + C parameters, with the hidden
    width h = C // reduction, at least 1. With `pools=("avg",)` it is squeeze-and-excitation.

    Args:
        channels: C.
        reduction: r.
        pools: as in `channel_gate`.
        mlp_bias: timm's has no biases.
        impl: as in `channel_gate`.

    Raises:
        ValueError: `channels` or `reduction` below 1; an unknown pool or `impl`; `x` is not
            `(B, channels, H, W)`.
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        *,
        pools: Sequence[str] = ("avg", "max"),
        mlp_bias: bool = True,
        impl: str = "auto",
    ):
        super().__init__()
        _positive(channels=channels, reduction=reduction)
        if isinstance(pools, str) or not pools or not set(pools) <= set(POOLS):
            raise ValueError(f"pools={pools!r}: expected a tuple of some of {', '.join(POOLS)}")
        _one_of(IMPLS, impl=impl)
        hidden = max(1, channels // reduction)
        self.pools = tuple(dict.fromkeys(pools))
        self.impl = impl
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=mlp_bias)
        self.fc2 = nn.Conv2d(hidden, channels, 1, bias=mlp_bias)
        self.attn_probe = Probe()
        if mlp_bias:
            nn.init.zeros_(self.fc1.bias)
            nn.init.zeros_(self.fc2.bias)

    def mlp(self, pooled: Tensor) -> Tensor:
        """W₂ δ(W₁ z + b₁) + b₂, SE's excitation without its sigmoid: `(B, C)` → `(B, C)`."""
        w1, w2 = (rearrange(fc.weight, "o i 1 1 -> o i") for fc in (self.fc1, self.fc2))
        return excitation(pooled, w1, w2, self.fc1.bias, self.fc2.bias, gate=nn.Identity())

    def gate(self, x: Tensor) -> Tensor:
        """The factors, `(B, C, 1, 1)`; `attn_probe` sees them as `(B, C)`."""
        check_map(x, self.fc1.in_channels)
        gate = channel_gate(x, self.mlp, pools=self.pools, impl=self.impl)
        return rearrange(self.attn_probe(gate), "b c -> b c 1 1")

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)

    def dense_map(self, map: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """Factors `(B, C)` → `(B, 1, C, C)`, the diagonal matrix that multiplies the channels.

        Queries and keys are channels here, as in `SqueezeExcite`; rows do not sum to 1.
        """
        return rearrange(map.diag_embed(), "b queries keys -> b 1 queries keys")


class SpatialAttention(nn.Module):
    """Scale every place by the factor that `spatial_gate` gives it; `(B, C, H, W)` → the same.

    2·k² + 2 parameters, whatever C is. With `norm="bn"` the gate is 1/2 everywhere until the
    BatchNorm's weight, 0 at first, has moved; until then the convolution gets no gradient either.

    Args:
        kernel_size: k, odd.
        norm: "bn", or None for the paper's literal equation.
        impl: as in `channel_gate`.

    Raises:
        ValueError: an even `kernel_size`; an unknown `norm` or `impl`; `x` is not `(B, C, H, W)`.
    """

    def __init__(self, kernel_size: int = 7, *, norm: str | None = "bn", impl: str = "auto"):
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size}: expected an odd number, 1 or more")
        _one_of(("bn", None), norm=norm)
        _one_of(IMPLS, impl=impl)
        self.impl = impl
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(1, momentum=0.01) if norm == "bn" else nn.Identity()
        self.attn_probe = Probe()
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out")
        if norm == "bn":
            nn.init.zeros_(self.bn.weight)

    def gate(self, x: Tensor) -> Tensor:
        """The factors, `(B, 1, H, W)`."""
        check_map(x)
        return self.attn_probe(spatial_gate(x, self.logits, impl=self.impl))

    def logits(self, pooled: Tensor) -> Tensor:
        """`(B, 2, H, W)`, mean and maximum over the channels, → `(B, 1, H, W)`."""
        return self.bn(self.conv(pooled))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)

    def dense_map(self, map: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """Factors `(B, 1, H, W)` → `(B, 1, HW, HW)`, the diagonal matrix that scales the places.

        Each place attends to itself alone; rows do not sum to 1.
        """
        return rearrange(map, "b 1 h w -> b 1 (h w)").diag_embed()


class CBAM(nn.Module):
    """F1 = Mc(F) · F, then F2 = Ms(F1) · F1 (CBAM, Eq. 1); `(B, C, H, W)` → the same.

    In a residual network it takes the last BatchNorm's output, before the addition (Fig. 3). State
    dicts of the official code and of timm's `CbamModule` (whose MLP has no biases:
    `mlp_bias=False`) are converted when they are loaded.

    Args:
        channels, reduction, pools, mlp_bias: as in `ChannelAttention`.
        kernel_size: as in `SpatialAttention`.
        order: "channel_first"; "spatial_first"; or "parallel", F · Mc(F) · Ms(F).
        no_spatial: leave the spatial gate out.
        spatial_norm: `norm` of `SpatialAttention`.
        impl: as in `channel_gate`, for both gates.

    Raises:
        ValueError: an unknown `order`, and all of `ChannelAttention` and `SpatialAttention`.
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        kernel_size: int = 7,
        *,
        pools: Sequence[str] = ("avg", "max"),
        order: str = "channel_first",
        no_spatial: bool = False,
        mlp_bias: bool = True,
        spatial_norm: str | None = "bn",
        impl: str = "auto",
    ):
        super().__init__()
        _one_of(ORDERS, order=order)
        self.order = order
        self.channel = ChannelAttention(
            channels, reduction, pools=pools, mlp_bias=mlp_bias, impl=impl
        )
        self.spatial = (
            None if no_spatial else SpatialAttention(kernel_size, norm=spatial_norm, impl=impl)
        )
        self.register_load_state_dict_pre_hook(_convert)

    def forward(self, x: Tensor) -> Tensor:
        if self.spatial is None:
            return self.channel(x)
        if self.order == "parallel":
            return x * self.channel.gate(x) * self.spatial.gate(x)
        if self.order == "spatial_first":
            return self.channel(self.spatial(x))
        return self.spatial(self.channel(x))


def _positive(**named: int) -> None:
    for name, value in named.items():
        if value < 1:
            raise ValueError(f"{name}={value}: expected 1 or more")


def _one_of(known: Sequence[str | None], **named: str | None) -> None:
    for name, value in named.items():
        if value not in known:
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(str, known))}")


# The official code's names and timm's → ours.
_OFFICIAL = {
    "ChannelGate.mlp.1.": "channel.fc1.",
    "ChannelGate.mlp.3.": "channel.fc2.",
    "SpatialGate.spatial.": "spatial.",
}
_TIMM = {"spatial.conv.conv.": "spatial.conv.", "spatial.conv.bn.": "spatial.bn."}


def _convert(module, state_dict, prefix, *_) -> None:
    """Before loading: turn the entries of an official or timm CBAM into ours, in place."""
    for names in (_OFFICIAL, _TIMM):
        for theirs, ours in names.items():
            for key in [key for key in state_dict if key.startswith(prefix + theirs)]:
                name, value = key.removeprefix(prefix + theirs), state_dict.pop(key)
                if names is _OFFICIAL and name == "weight":  # linear layers there
                    value = value[:, :, None, None]
                if names is _OFFICIAL and name == "conv.weight":  # [max, mean] there
                    value = value.flip(1)
                state_dict[prefix + ours + name] = value


def _with_cbam(factory: Callable[..., ResNet], kwargs: dict) -> ResNet:
    model = factory(**{"inside": CBAM} | kwargs)
    model.register_load_state_dict_pre_hook(_rename_blocks)
    return model


def _rename_blocks(module, state_dict, prefix, *_) -> None:
    """Before loading: an official checkpoint has `module.` in front and `cbam`, timm's has `se`."""
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = key.removeprefix(prefix).removeprefix("module.")
        name = name.replace(".cbam.", ".inside.").replace(".se.", ".inside.")
        state_dict[prefix + name] = state_dict.pop(key)


def cbam_resnet18(**kwargs) -> ResNet:
    """ResNet-18 with CBAM in every block: 11,779,392 parameters. Keywords: `ResNet`'s."""
    return _with_cbam(resnet18, kwargs)


def cbam_resnet34(**kwargs) -> ResNet:
    """ResNet-34 with CBAM in every block: 21,960,468 parameters. Keywords: `ResNet`'s."""
    return _with_cbam(resnet34, kwargs)


def cbam_resnet50(**kwargs) -> ResNet:
    """ResNet-50 with CBAM in every block: 28,089,624 parameters. Keywords: `ResNet`'s."""
    return _with_cbam(resnet50, kwargs)


def cbam_resnet101(**kwargs) -> ResNet:
    """ResNet-101 with CBAM in every block: 49,330,172 parameters. Keywords: `ResNet`'s."""
    return _with_cbam(resnet101, kwargs)


def cbam_resnet_mini(num_classes: int = 8, reduction: int = 4, **kwargs) -> ResNet:
    """`resnet_mini` with CBAM in its four blocks. Keywords: `resnet_mini`'s."""
    inside = partial(CBAM, reduction=reduction)
    return _with_cbam(resnet_mini, {"num_classes": num_classes, "inside": inside} | kwargs)
