"""Channel attention: squeeze-and-excitation, and selective kernels (chapter 03).

Papers: Hu et al. 2018, "Squeeze-and-Excitation Networks" (SE; journal 2020); Li et al. 2019,
"Selective Kernel Networks" (SK). The idea of SE: a small network reads the mean of every channel
over the whole image and answers with one factor a channel. The idea of SK: several convolutions of
different reach run side by side, and a network of the same kind shares each channel's output among
them, by a softmax over the branches.

What differs from the papers: nothing in the equations. Of the public codes we follow the authors'
Caffe models: biases in SE, none in SK's two linear maps, C // r hidden channels (timm rounds to
multiples of 8). Parameter names are timm's; `from_timm` converts its models.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from torch import Tensor, nn

from attnlab.layers import check_map
from attnlab.probe import Probe
from attnlab.resnet import ResNet, conv, resnet50, resnet_mini, resnext50_32x4d

Gate = Callable[[Tensor], Tensor]

IMPLS = ("auto", "explicit", "fused")


def excitation(
    z: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    gate: Gate = torch.sigmoid,
) -> Tensor:
    """A factor for every channel from a summary of the image: σ(W₂ δ(W₁ z + b₁) + b₂) (SE, Eq. 3).

    Args:
        z: one number a channel, `(B, C)`: its mean over all places (Eq. 2).
        w1, b1: `(hidden, C)` and `(hidden,)`; δ is ReLU.
        w2, b2: `(C, hidden)` and `(C,)`.
        gate: σ, a function on the logits `(B, C)` that keeps their shape.

    Returns:
        `(B, C)`; between 0 and 1 for the sigmoid.
    """
    return gate(F.linear(F.relu(F.linear(z, w1, b1)), w2, b2))


class SqueezeExcite(nn.Module):
    """Scale every channel by a factor computed from the whole image (SE, Sec. 3).

    `(B, C, H, W)` → the same shape. 2·C·hidden weights and hidden + C biases; in a residual network
    it comes at the end of the branch, before the addition. There is one form of it and no `impl`:
    the factors are C numbers, and cost nothing to keep. `attn_probe` sees them, `(B, C)`.

    Args:
        channels: C.
        reduction: r; the hidden layer has C // r channels, at least one.
        bias: whether the two linear maps have biases.
        squeeze: "avg" or "max": what is taken over the places of a channel.
        gate: σ of `excitation`: `torch.tanh`, `torch.relu`, `partial(torch.softmax, dim=1)`, …

    State dicts load from timm's `SEModule` (1×1 convolutions) and from two linear maps `fc.0` and
    `fc.2`. Weights start as He's (fan out) and biases at 0, so sigmoid factors start near ½.

    Raises:
        ValueError: `channels` or `reduction` below 1, an unknown `squeeze`; an input that is not
            `(B, C, H, W)`.
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        *,
        bias: bool = True,
        squeeze: str = "avg",
        gate: Gate = torch.sigmoid,
    ):
        super().__init__()
        if channels < 1 or reduction < 1:
            raise ValueError(f"channels={channels}, reduction={reduction}: expected at least 1")
        if squeeze not in ("avg", "max"):
            raise ValueError(f"squeeze={squeeze!r}: expected 'avg' or 'max'")
        hidden = max(1, channels // reduction)
        self.squeeze = squeeze
        self.gate = gate
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=bias)
        self.fc2 = nn.Conv2d(hidden, channels, 1, bias=bias)
        self.attn_probe = Probe()
        for fc in (self.fc1, self.fc2):
            nn.init.kaiming_normal_(fc.weight, mode="fan_out", nonlinearity="relu")
            if bias:
                nn.init.zeros_(fc.bias)
        self.register_load_state_dict_pre_hook(_convert_linear)

    def forward(self, x: Tensor) -> Tensor:
        check_map(x, self.fc1.in_channels)
        z = x.mean((2, 3)) if self.squeeze == "avg" else x.amax((2, 3))  # (B, C)
        # A linear map of C numbers: faster than the 1×1 convolution of a 1×1 map that it equals.
        w1, w2 = (rearrange(fc.weight, "o i 1 1 -> o i") for fc in (self.fc1, self.fc2))
        s = excitation(z, w1, w2, self.fc1.bias, self.fc2.bias, gate=self.gate)
        return x * rearrange(self.attn_probe(s), "b c -> b c 1 1")

    def dense_map(self, map: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """Factors `(B, C)` → `(B, 1, C, C)`, the diagonal matrix that multiplies the channels.

        Queries and keys are channels here, not places: each channel attends to itself alone, with
        a weight that need not sum to 1 with anything.
        """
        return rearrange(map.diag_embed(), "b queries keys -> b 1 queries keys")


def select(branches: Sequence[Tensor], weights: Tensor) -> Tensor:
    """V = Σₘ aₘ Uₘ (SK, Eq. 6), without stacking the branches.

    Args:
        branches: M maps `(B, C, H, W)`.
        weights: a, `(B, M, C)`, whose sum over M is 1: two branches are interpolated.

    Returns:
        `(B, C, H, W)`.
    """
    weights = rearrange(weights.to(branches[0].dtype), "b m c -> m b c 1 1")
    if len(branches) == 2:
        return torch.lerp(branches[1], branches[0], weights[0])
    return sum(weight * branch for weight, branch in zip(weights, branches, strict=True))


class ConvNormAct(nn.Module):
    """One branch: k×k convolution, normalisation, ReLU; timm's names."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.conv = conv(*args, **kwargs)
        self.bn = nn.BatchNorm2d(self.conv.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class BranchAttention(nn.Module):
    """The branches' shares from their common summary: softmax over m of Aₘ δ(BN(W s)) (SK, Eq. 5).

    `(B, C, 1, 1)` → `(B, branches, C)`; timm's names. The rows of `fc_select` are branch after
    branch, so the first C logits belong to the first.
    """

    def __init__(
        self,
        channels: int,
        branches: int,
        hidden: int,
        *,
        bias: bool = False,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
        act_layer: Callable[[], nn.Module] = nn.ReLU,
    ):
        super().__init__()
        self.branches = branches
        self.fc_reduce = nn.Conv2d(channels, hidden, 1, bias=bias)
        self.bn = norm_layer(hidden)
        self.act = act_layer()
        self.fc_select = nn.Conv2d(hidden, branches * channels, 1, bias=bias)
        for fc in (self.fc_reduce, self.fc_select):
            nn.init.normal_(fc.weight, std=0.01)
            if bias:
                nn.init.zeros_(fc.bias)

    def forward(self, s: Tensor) -> Tensor:
        if self.training and len(s) == 1 and type(self.bn) is nn.BatchNorm2d:
            raise ValueError(
                "x has batch size 1: expected at least 2 in training, because a BatchNorm reads "
                "one number a channel and image; or build with attn_norm=nn.Identity"
            )
        logits = self.fc_select(self.act(self.bn(self.fc_reduce(s))))
        return rearrange(logits, "b (m c) 1 1 -> b m c", m=self.branches).softmax(1)


class SelectiveKernel(nn.Module):
    """Convolutions of several sizes that share each channel between them (SK, Sec. 3.1).

    `(B, channels, H, W)` → `(B, out_channels, H', W')`, as a 3×3 convolution, BatchNorm and ReLU in
    its place would. `attn_probe` sees the shares a, `(B, M, C)`, which sum to 1 over the M branches
    and hold for the whole image. It fits `resnext50_32x4d(conv2=SelectiveKernel)`.

    Args:
        channels, out_channels: of input and output, the same by default.
        stride, dilation: of all branches.
        kernel_sizes, dilations: one of each a branch; a 3×3 of dilation 2 stands for a 5×5.
        groups: G of every branch.
        reduction, min_hidden: r and L; the shares' hidden layer has max(C // r, L) channels.
        split_input: each branch reads its own part of the input channels (timm's default).
        fc_bias: whether the shares' linear maps have biases.
        attn_norm, attn_act: after the first of them. A BatchNorm there cannot train on one image.
        impl: "explicit" stacks the branches and sums them by their shares; "fused" does not stack;
            "auto" is "fused".

    Raises:
        ValueError: an unknown `impl`, even or unpaired kernel sizes, channels that `groups` or the
            branches do not divide; an input that is not `(B, channels, H, W)`; batch size 1 in
            training with a BatchNorm in the shares.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        stride: int = 1,
        dilation: int = 1,
        *,
        kernel_sizes: Sequence[int] = (3, 3),
        dilations: Sequence[int] = (1, 2),
        groups: int = 32,
        reduction: int = 16,
        min_hidden: int = 32,
        split_input: bool = False,
        fc_bias: bool = False,
        attn_norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        attn_act: Callable[[], nn.Module] = nn.ReLU,
        impl: str = "auto",
    ):
        super().__init__()
        out_channels = out_channels or channels
        branches = len(kernel_sizes)
        if impl not in IMPLS:
            raise ValueError(f"impl={impl!r}: expected one of {', '.join(IMPLS)}")
        if branches < 1 or len(dilations) != branches or not all(k % 2 for k in kernel_sizes):
            raise ValueError(
                f"kernel_sizes={tuple(kernel_sizes)}, dilations={tuple(dilations)}: expected odd "
                "kernel sizes and as many dilations"
            )
        inputs = branches * groups if split_input else groups
        if channels % inputs or out_channels % groups:
            raise ValueError(
                f"channels={channels}, out_channels={out_channels}: expected multiples of "
                f"{inputs} and of groups={groups}"
            )
        self.impl = impl
        self.channels = channels
        self.split_input = split_input
        width = channels // branches if split_input else channels
        self.paths = nn.ModuleList(
            ConvNormAct(width, out_channels, size, stride, dilation * own, groups)
            for size, own in zip(kernel_sizes, dilations, strict=True)
        )
        hidden = max(out_channels // reduction, min_hidden)
        self.attn = BranchAttention(
            out_channels, branches, hidden, bias=fc_bias, norm_layer=attn_norm, act_layer=attn_act
        )
        self.attn_probe = Probe()

    def forward(self, x: Tensor) -> Tensor:
        check_map(x, self.channels)
        count = len(self.paths)
        inputs = x.chunk(count, dim=1) if self.split_input else [x] * count
        branches = [path(part) for path, part in zip(self.paths, inputs, strict=True)]
        if self.impl == "explicit":
            u = torch.stack(branches, dim=1)  # (B, M, C, H', W')
            fused = reduce(u, "b m c h w -> b c h w", "sum")
            weights = self.attn_probe(self.attn(fused.mean((2, 3), keepdim=True)))
            return einsum(weights.to(u.dtype), u, "b m c, b m c h w -> b c h w")
        # The mean of a sum is the sum of the means.
        s = sum(branch.mean((2, 3), keepdim=True) for branch in branches)
        return select(branches, self.attn(s))

    def dense_map(self, map: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """Shares `(B, M, C)` → `(B, C, 1, M)`: channels are heads, the image is the one query, and
        the branches are its keys; rows sum to 1."""
        return rearrange(map, "b branches c -> b c 1 branches")


def se_resnet50(reduction: int = 16, **kwargs) -> ResNet:
    """SE-ResNet-50: 28,088,024 parameters for 1,000 classes. `kwargs` are `resnet50`'s."""
    return _loads_timm(resnet50(inside=partial(SqueezeExcite, reduction=reduction), **kwargs))


def sknet50(**kwargs) -> ResNet:
    """SKNet-50, a ResNeXt-50 32×4d with selective kernels: 27,479,784 parameters.

    `kwargs` are `resnext50_32x4d`'s; for other kernels give `conv2=partial(SelectiveKernel, …)`.
    """
    return _loads_timm(resnext50_32x4d(**{"conv2": SelectiveKernel, **kwargs}))


def se_resnet_mini(num_classes: int = 8, reduction: int = 4, **kwargs) -> ResNet:
    """`resnet_mini` with SE in its four blocks. `kwargs` are `resnet_mini`'s."""
    inside = partial(SqueezeExcite, reduction=reduction)
    return _loads_timm(resnet_mini(num_classes, inside=inside, **kwargs))


_TIMM = (
    (r"^layer0\.", ""),
    (r"^last_linear\.", "fc."),
    (r"\.se(_module)?\.", ".inside."),
    (r"^(layer\d\.\d+)\.conv([13])\.conv\.", r"\1.conv\2."),
    (r"^(layer\d\.\d+)\.conv([13])\.bn\.", r"\1.bn\2."),
)


def from_timm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the state dict of a timm network for `se_resnet50` or `sknet50`.

    Knows `seresnet50`, `legacy_seresnet50` (the port of the authors' Caffe model, which has its
    strides on the first 1×1 convolution instead of the 3×3, so that its weights load and its logits
    differ) and `skresnext50_32x4d`. Our own names stay.
    """

    def ours(name: str) -> str:
        for theirs, own in _TIMM:
            name = re.sub(theirs, own, name)
        return name

    return {ours(name): value for name, value in state_dict.items()}


def _loads_timm(model: ResNet) -> ResNet:
    model.register_load_state_dict_pre_hook(_convert_timm)
    return model


def _convert_timm(module, state_dict, prefix, *_) -> None:
    """Before loading: rename the entries of a timm state dict in place."""
    own = [name for name in state_dict if name.startswith(prefix)]
    entries = {name.removeprefix(prefix): state_dict.pop(name) for name in own}
    state_dict.update({prefix + name: value for name, value in from_timm(entries).items()})


def _convert_linear(module, state_dict, prefix, *_) -> None:
    """Before loading: from two linear maps, `fc.0` and `fc.2` or `fc1` and `fc2`, to 1×1 ones."""
    for ours, theirs in (("fc1", "fc.0"), ("fc2", "fc.2")):
        for part in ("weight", "bias"):
            if f"{prefix}{theirs}.{part}" in state_dict:
                state_dict[f"{prefix}{ours}.{part}"] = state_dict.pop(f"{prefix}{theirs}.{part}")
        weight = state_dict.get(f"{prefix}{ours}.weight")
        if weight is not None and weight.ndim == 2:
            state_dict[f"{prefix}{ours}.weight"] = rearrange(weight, "o i -> o i 1 1")
