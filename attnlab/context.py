"""Self-attention context for segmentation: DANet over positions and channels, OCNet (chapter 05).

Papers: Fu et al. 2019, "Dual Attention Network for Scene Segmentation" (arXiv:1809.02983); Yuan et
al. 2018, "OCNet: Object Context Network for Scene Parsing" (arXiv:1809.00916v1). The idea: a pixel
is classified better when it has heard the pixels that belong with it, wherever they lie. DANet lets
every position hear every position, and every channel every channel: one equation, on X and on its
transpose. OCNet wants to average over one object, and compares one embedding with itself for it.

What differs from the papers is what their public codes do (DANet 2020, OCNet v1), whose
state_dicts load strictly: queries and keys of DANet have C/8 channels, and its channel attention is
a softmax of *minus* the similarities. Ours is that "fused" never stores the N×N weights.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from attnlab.attention import attention_weights, scaled_dot_product_attention
from attnlab.kernels import check_impl, check_inputs
from attnlab.layers import check_map
from attnlab.official import DANET, OCNET_ASP, OCNET_BASE, OCNET_PYRAMID, PAM, renaming, untie_qk
from attnlab.probe import Probe

CHANNEL_MODES = ("code", "paper", "cosine")
LEAKY = partial(nn.LeakyReLU, 0.01)  # after a BatchNorm, what OCNet's code calls ABN
FUSED_WIDTH = 64  # the least width at which the fused form cuts wider values into heads
# "auto" on a CPU is fused from these scores on: of a batch where values are as wide as queries; of
# an image, N², where they are wider: there fused is slower, but needs no room for them (64 MiB).
CPU_FUSED_FROM = {"equal": 2**19, "wider": 2**24}


def position_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float = 1.0, impl: str = "auto"
) -> Tensor:
    """softmax(scale · Q Kᵀ) V between all positions of a map (DANet Eq. 1 and 2; scale 1 there).

    The fused kernel wants values as wide as queries: wider ones are cut into heads that share their
    queries and keys, and zeros fill what is too narrow. Both are exact.

    Args:
        q, k, v: `(B, d, H, W)`, the same, and `(B, dv, H, W)`.
        impl: as in `attnlab.attention.scaled_dot_product_attention`.

    Returns `(B, dv, H, W)`. Raises `ValueError` for an unknown `impl` and shapes that do not fit.
    """
    check_impl(impl)
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_map(x, name=name)
    height, dv = q.shape[-2], v.shape[1]
    impl = _fastest(q, k, v) if impl == "auto" else impl
    keys, v = (rearrange(x, "b c h w -> b 1 (h w) c").contiguous() for x in (k, v))
    q = keys if q is k else rearrange(q, "b c h w -> b 1 (h w) c").contiguous()
    check_inputs(q, keys, v, None)
    if impl == "fused" and q.shape[-1] != dv:
        width = max(q.shape[-1], min(dv, FUSED_WIDTH))
        heads = -(-dv // width)
        q, keys = (F.pad(x, (0, width - x.shape[-1])).expand(-1, heads, -1, -1) for x in (q, keys))
        v = F.pad(v, (0, heads * width - dv))
        v = rearrange(v, "b 1 n (h d) -> b h n d", h=heads).contiguous()
    out = scaled_dot_product_attention(q, keys, v, scale=scale, impl=impl)
    return rearrange(out, "b g (h w) d -> b (g d) h w", h=height)[:, :dv]


def _fastest(q: Tensor, k: Tensor, v: Tensor) -> str:
    """What `impl="auto"` is for these maps, as measured by `attnlab bench`."""
    if q.device.type != "cpu":
        return "fused"
    scores = math.prod((*q.shape[2:], *k.shape[2:]))
    if q.shape[1] == v.shape[1]:
        return "fused" if len(q) * scores >= CPU_FUSED_FROM["equal"] else "explicit"
    return "fused" if scores >= CPU_FUSED_FROM["wider"] else "explicit"


def position_weights(
    q: Tensor, k: Tensor, *, scale: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """The weights of `position_attention`, `(B, 1, N, N)`; `mask`: True = may attend."""
    q, k = (rearrange(x, "b c h w -> b 1 (h w) c") for x in (q, k))
    return attention_weights(q, k, mask=mask, scale=scale)


class PositionAttention(nn.Module):
    """DANet's position attention module: X + γ · softmax(Q Kᵀ) V, no 1/√d, γ = 0 at first.

    `(B, channels, H, W)` → the same shape (DANet, Sec. 3.2; there Q and K have all channels, and
    γ is called α). It knows nothing of where a position lies: permute them, and the output follows.

    Args:
        channels: C, also the width of the values.
        key_channels: width of queries and keys; C/8 by default, as in the code.
        impl: as in `position_attention`.

    Raises `ValueError` for channels that are no multiple of 8 where `key_channels` is not given, an
    unknown `impl`, and an input of another shape.
    """

    def __init__(self, channels: int, key_channels: int | None = None, impl: str = "auto"):
        super().__init__()
        if key_channels is None and (channels < 8 or channels % 8):
            raise ValueError(f"channels={channels}: expected a multiple of 8, or key_channels=")
        check_impl(impl)
        key_channels = key_channels or channels // 8
        self.impl = impl
        self.query = nn.Conv2d(channels, key_channels, 1)
        self.key = nn.Conv2d(channels, key_channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.attn_probe = Probe()
        self.register_load_state_dict_pre_hook(renaming(PAM))

    def forward(self, x: Tensor) -> Tensor:
        check_map(x, self.value.in_channels)
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.impl == "explicit":
            weights = self.attn_probe(position_weights(q, k))  # (B, 1, N, N)
            context = _weighted(weights, v)
        else:
            context = position_attention(q, k, v, impl=self.impl)
        return x + self.gamma * context

    def dense_map(self, map: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """The recorded map is dense already: `(B, 1, N, N)` → the same."""
        return map


def channel_weights(x: Tensor, mode: str = "code", temperature: float = 0.1) -> Tensor:
    """How much each channel takes of each channel: softmax(±X Xᵀ), `(B, C, H, W)` → `(B, 1, C, C)`.

    At least float32, also under autocast: the energies E = X Xᵀ are sums over all N positions.

    Args:
        mode: "code" is softmax(−E), which DANet's code computes as softmax(max E − E): the *least*
            similar channels get the most. "paper" is softmax(E), as printed (Eq. 3). "cosine" is
            softmax(cos / temperature) between channels, an extension that does not saturate.
        temperature: of "cosine".

    Raises `ValueError` for an unknown `mode` and a `temperature` that is not positive.
    """
    rows, scale = _channel_rows(x, mode, temperature)
    with _full_precision(x):
        return attention_weights(rows, rows, scale=scale)


def _channel_rows(x: Tensor, mode: str, temperature: float) -> tuple[Tensor, float]:
    """Queries and keys of the channels, `(B, 1, C, N)`, and the factor of their products."""
    if mode not in CHANNEL_MODES:
        raise ValueError(f"mode={mode!r}: expected one of {', '.join(CHANNEL_MODES)}")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: expected a positive number")
    rows = rearrange(x, "b c h w -> b 1 c (h w)")
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if mode == "cosine":
        return F.normalize(rows, dim=-1), 1 / temperature
    return rows, {"code": -1.0, "paper": 1.0}[mode]


def _full_precision(x: Tensor) -> AbstractContextManager:
    """No autocast on the device of `x` (there is none on "meta", where costs are counted)."""
    available = torch.amp.is_autocast_available(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if available else nullcontext()


class ChannelSelfAttention(nn.Module):
    """DANet's channel attention module: X + γ · softmax(∓X Xᵀ) X over channels, γ = 0 at first.

    `(B, C, H, W)` → the same shape, for any C; γ (β in the paper, Sec. 3.3) is its one parameter.
    The same attention as between positions, on the transpose: C tokens, each an image of width N.
    "code" is what the released weights were trained with. Its weak place is dead channels: an
    all-zero channel is unlike every other and takes nearly all weight. "paper" tends to the
    identity, since a channel is most like itself.

    Args:
        mode, temperature: as in `channel_weights`.
        impl: "auto" is "explicit": C is small beside N. "fused" never stores the C×C weights.

    Raises `ValueError` as `channel_weights`, for an unknown `impl` and an input that is no map.
    """

    def __init__(self, mode: str = "code", temperature: float = 0.1, impl: str = "auto"):
        super().__init__()
        check_impl(impl)
        _channel_rows(torch.empty(1, 1, 1, 1), mode, temperature)
        self.mode, self.temperature, self.impl = mode, temperature, impl
        self.gamma = nn.Parameter(torch.zeros(1))
        self.attn_probe = Probe()

    def forward(self, x: Tensor) -> Tensor:
        check_map(x)
        values = rearrange(x, "b c h w -> b 1 c (h w)")
        if self.impl in ("auto", "explicit"):
            weights = self.attn_probe(channel_weights(x, self.mode, self.temperature))
            context = weights.to(x.dtype) @ values
        else:
            rows, scale = _channel_rows(x, self.mode, self.temperature)
            with _full_precision(x):
                context = scaled_dot_product_attention(
                    rows, rows, values.to(rows.dtype), scale=scale, impl=self.impl
                )
        context = rearrange(context, "b 1 c (h w) -> b c h w", h=x.shape[2]).to(x.dtype)
        return x + self.gamma * context

    def dense_map(self, map: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """The recorded map, `(B, 1, C, C)`: here channels are the queries and the keys."""
        return map


class DANetHead(nn.Module):
    """Both attentions side by side, summed: features → [fused, position, channel] logits.

    `(B, in_channels, H, W)` → three `(B, num_classes, H, W)` (DANet, Fig. 2). Only the first is
    used when testing; train with `attnlab.heads.segmentation_loss(outputs, target)`, which weighs
    the three alike. 23,954,619 parameters for 2,048 channels and 19 classes.

    Args:
        in_channels: of the features; a multiple of 4.
        inter_channels: width of both branches, a quarter by default.
        channel_mode: `mode` of `ChannelSelfAttention`.
        dropout: of whole channels before each classifier.
        impl: of both attentions.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        inter_channels: int | None = None,
        channel_mode: str = "code",
        dropout: float = 0.1,
        impl: str = "auto",
    ):
        super().__init__()
        width = inter_channels or in_channels // 4
        self.reduce_position = conv_norm_act(in_channels, width, 3)
        self.reduce_channel = conv_norm_act(in_channels, width, 3)
        self.position = PositionAttention(width, impl=impl)
        self.channel = ChannelSelfAttention(channel_mode, impl=impl)
        self.refine_position = conv_norm_act(width, width, 3)
        self.refine_channel = conv_norm_act(width, width, 3)
        self.drop = nn.Dropout2d(dropout)
        self.classify_position = nn.Conv2d(width, num_classes, 1)
        self.classify_channel = nn.Conv2d(width, num_classes, 1)
        self.classify = nn.Conv2d(width, num_classes, 1)
        self.register_load_state_dict_pre_hook(renaming(DANET))

    def forward(self, x: Tensor) -> list[Tensor]:
        check_map(x, self.reduce_position[0].in_channels)
        position = self.refine_position(self.position(self.reduce_position(x)))
        channel = self.refine_channel(self.channel(self.reduce_channel(x)))
        return [
            self.classify(self.drop(position + channel)),
            self.classify_position(self.drop(position)),
            self.classify_channel(self.drop(channel)),
        ]


class ObjectContext(nn.Module):
    """Object context pooling: Wo · softmax(φ(X)ᵀ φ(X) / √Ck) V, a map of context without X itself.

    `(B, channels, H, W)` → `(B, out_channels, H, W)` (OCNet v1; its code's
    `SelfAttentionBlock2D`). Queries and keys are one embedding φ, so a position attends most to
    what is like itself. Wo and its bias are zero at first, and so is the context.

    Args:
        channels: C.
        key_channels, value_channels: Ck and Cv, C/2 each by default.
        out_channels: C by default.
        scale: attend on a map that is max-pooled by this factor; the context is resized back
            (bilinear, corners aligned). Memory falls by scale⁴.
        regions: cut the map into regions × regions parts (the last row and column take what is
            left over) and attend inside each only, as in the pyramid.
        share_qk: False gives the queries an embedding of their own (the later openseg code).
        qk_layers: layers of 1×1 convolution, BatchNorm and activation in φ (openseg: 2).
        act_layer: activation of φ; OCNet v1 has LeakyReLU(0.01), openseg ReLU.
        impl: as in `position_attention`.

    Raises `ValueError` for sizes below 1, an unknown `impl`, an input of another shape, and a map
    that is smaller than `scale` or than the number of `regions`.
    """

    def __init__(
        self,
        channels: int,
        key_channels: int | None = None,
        value_channels: int | None = None,
        out_channels: int | None = None,
        *,
        scale: int = 1,
        regions: int = 1,
        share_qk: bool = True,
        qk_layers: int = 1,
        act_layer: Callable[[], nn.Module] = LEAKY,
        impl: str = "auto",
    ):
        super().__init__()
        check_impl(impl)
        for name, size in {"scale": scale, "regions": regions, "qk_layers": qk_layers}.items():
            if size < 1:
                raise ValueError(f"{name}={size}: expected at least 1")
        self.impl, self.scale, self.regions = impl, scale, regions
        key_channels = key_channels or channels // 2
        value_channels = value_channels or channels // 2

        def embedding() -> nn.Sequential:
            layers = nn.Sequential()
            for layer in range(qk_layers):
                width = key_channels if layer else channels
                layers.extend(conv_norm_act(width, key_channels, bias=True, act_layer=act_layer))
            return layers

        self.key = embedding()
        self.query = None if share_qk else embedding()
        self.value = nn.Conv2d(channels, value_channels, 1)
        self.proj = nn.Conv2d(value_channels, out_channels or channels, 1)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)
        self.attn_probe = Probe()
        self.register_load_state_dict_pre_hook(untie_qk)

    def forward(self, x: Tensor, relation: Tensor | None = None) -> Tensor:
        """`relation`, `(B, N, N)` with rows that sum to 1, takes the place of the softmax, such as
        the oracle of `attnlab.heads.same_class`. N counts the positions of the pooled map.
        """
        check_map(x, self.value.in_channels)
        size = x.shape[2:]
        least = self.scale * self.regions
        if min(size) < least:
            raise ValueError(
                f"x {tuple(x.shape)}: expected H and W of at least {least}, for scale={self.scale} "
                f"and regions={self.regions}"
            )
        if self.scale > 1:
            x = F.max_pool2d(x, self.scale)
        k, v = self.key(x), self.value(x)
        q = k if self.query is None else self.query(x)
        context = self.proj(self._attend(q, k, v, relation))
        if self.scale > 1:
            context = F.interpolate(context, size, mode="bilinear", align_corners=True)
        return context

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, relation: Tensor | None) -> Tensor:
        scale = q.shape[1] ** -0.5
        if relation is not None:
            return _weighted(relation[:, None], v)
        whole = self.regions == 1
        impl = _fastest(q, k, v) if self.impl == "auto" and whole else self.impl
        if impl == "explicit":
            mask = None if whole else same_region(tuple(v.shape[2:]), self.regions).to(v.device)
            return _weighted(self.attn_probe(position_weights(q, k, scale=scale, mask=mask)), v)
        if whole:
            return position_attention(q, k, v, scale=scale, impl=impl)
        rows, columns = (_parts(side, self.regions) for side in v.shape[2:])
        return torch.cat([
            torch.cat([
                position_attention(*(t[..., r, c] for t in (q, k, v)), scale=scale, impl=impl)
                for c in columns
            ], dim=-1)
            for r in rows
        ], dim=-2)  # fmt: skip

    def dense_map(self, map: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """The recorded map is dense already: `(B, 1, N, N)`, N positions of the pooled map."""
        return map


class BaseObjectContext(nn.Module):
    """Base-OC (OCNet v1): [context, X] fused by a 1×1 convolution; 920,576 parameters for C = 512.

    `(B, channels, H, W)` → `(B, out_channels or channels, H, W)`; `options`: `ObjectContext`'s.
    """

    def __init__(
        self, channels: int, out_channels: int | None = None, dropout: float = 0.05, **options
    ):
        super().__init__()
        self.context = ObjectContext(channels, **options)
        self.fuse = _fusion(
            2 * channels, out_channels or channels, dropout, options.get("act_layer", LEAKY)
        )
        self.register_load_state_dict_pre_hook(renaming(OCNET_BASE))

    def forward(self, x: Tensor, relation: Tensor | None = None) -> Tensor:
        return self.fuse(torch.cat([self.context(x, relation), x], dim=1))


class PyramidObjectContext(nn.Module):
    """Pyramid-OC: attention inside the parts of a map cut 1×1, 2×2, 3×3 and 6×6; nothing is pooled.

    `(B, channels, H, W)` → `(B, out_channels, H, W)`. Each cut has weights of its own and a context
    of C channels; X is lifted to as many as all of them, and all are fused (OCNet v1).
    5,782,016 parameters for 512 channels. `options` are `ObjectContext`'s. Raises `ValueError` for
    a map that is smaller than the largest of `regions`.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        regions: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.05,
        **options,
    ):
        super().__init__()
        options = {"value_channels": channels, **options}
        self.contexts = nn.ModuleList(
            [ObjectContext(channels, regions=cut, **options) for cut in regions]
        )
        lifted = len(regions) * channels
        act_layer = options.get("act_layer", LEAKY)
        self.lift = conv_norm_act(channels, lifted, bias=True, act_layer=act_layer)
        self.fuse = _fusion(2 * lifted, out_channels or channels, dropout, act_layer)
        self.register_load_state_dict_pre_hook(renaming(OCNET_PYRAMID))

    def forward(self, x: Tensor) -> Tensor:
        contexts = [context(x) for context in self.contexts]
        return self.fuse(torch.cat([self.lift(x), *contexts], dim=1))


class ASPObjectContext(nn.Module):
    """ASP-OC: object context beside dilated convolutions, in five branches; 5,739,904 parameters.

    `(B, channels, H, W)` → `(B, out_channels, H, W)`; the count is for 512 channels. The branches
    have half the channels: context on a map pooled by 2, a 1×1, and 3×3 of the `dilations` (OCNet
    v1). `options` are `ObjectContext`'s.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        dilations: Sequence[int] = (12, 24, 36),
        dropout: float = 0.1,
        **options,
    ):
        super().__init__()
        width = channels // 2
        act_layer = options.get("act_layer", LEAKY)
        layer = partial(conv_norm_act, act_layer=act_layer)
        options = {"key_channels": width // 2, "value_channels": width, "scale": 2, **options}
        self.reduce = layer(channels, width, 3, bias=True)
        self.context = ObjectContext(width, **options)
        self.refine = layer(width, width, bias=True)
        self.convs = nn.ModuleList(
            [layer(channels, width), *(layer(channels, width, 3, d) for d in dilations)]
        )
        fused = (2 + len(dilations)) * width
        self.fuse = nn.Sequential(*layer(fused, out_channels or channels), nn.Dropout2d(dropout))
        self.register_load_state_dict_pre_hook(renaming(OCNET_ASP))

    def forward(self, x: Tensor) -> Tensor:
        context = self.refine(self.context(self.reduce(x)))
        return self.fuse(torch.cat([context, *(conv(x) for conv in self.convs)], dim=1))


def conv_norm_act(
    in_channels: int,
    out_channels: int,
    kernel_size: int = 1,
    dilation: int = 1,
    *,
    bias: bool = False,
    act_layer: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """Convolution that keeps the size, BatchNorm, activation."""
    padding = dilation * (kernel_size // 2)
    conv = nn.Conv2d(
        in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, bias=bias
    )
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), act_layer())


def same_region(size: tuple[int, int], regions: int) -> Tensor:
    """Do two positions lie in the same of regions × regions parts? `(N, N)`, bool (Pyramid-OC)."""
    row, column = (
        (torch.arange(side) // (side // regions)).clamp(max=regions - 1) for side in size
    )
    part = (row[:, None] * regions + column).flatten()
    return part[:, None] == part


def _parts(side: int, regions: int) -> list[slice]:
    """A side in equal parts; the last takes what is left over."""
    step = side // regions
    return [slice(i * step, side if i == regions - 1 else (i + 1) * step) for i in range(regions)]


def _weighted(weights: Tensor, v: Tensor) -> Tensor:
    """Weights `(B, 1, N, N)` times values `(B, dv, H, W)` → `(B, dv, H, W)`."""
    tokens = rearrange(v, "b c h w -> b 1 (h w) c")
    return rearrange(weights.to(v.dtype) @ tokens, "b 1 (h w) c -> b c h w", h=v.shape[2])


def _fusion(in_channels: int, out_channels: int, dropout: float, act_layer=LEAKY) -> nn.Sequential:
    layer = conv_norm_act(in_channels, out_channels, bias=True, act_layer=act_layer)
    return nn.Sequential(*layer, nn.Dropout2d(dropout))
