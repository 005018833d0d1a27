"""The benchmark suite's cases: every mechanism and model, its forms, its independent peers.

Each function takes a size and a form and gives a `Case`: the same random numbers whatever the form,
and the same weights in ours and in a peer that computes the same.
"""

import math
from collections.abc import Callable
from functools import partial

import timm
import torch
import torch.nn.functional as F
import torchvision
from einops import rearrange
from timm.layers.cbam import CbamModule
from timm.layers.non_local_attn import NonLocalAttn
from timm.layers.selective_kernel import SelectiveKernel as TimmSelectiveKernel
from timm.layers.squeeze_excite import SEModule
from timm.models.cait import LayerScaleBlockClassAttn
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from attnlab import superpixel as sp
from attnlab.attention import MultiHeadAttention, deit_tiny, scaled_dot_product_attention
from attnlab.attention_pooling import AttentionPool
from attnlab.cbam import CBAM, cbam_resnet50
from attnlab.cgnl import CGNLBlock, cgnl_dot
from attnlab.channel import SelectiveKernel, SqueezeExcite, se_resnet50, sknet50
from attnlab.context import ChannelSelfAttention, ObjectContext, position_attention
from attnlab.flow import warp
from attnlab.lab.bench_case import (
    CHANNELS,
    HEADS,
    WIDTH,
    Case,
    feature_map,
    perturbed,
    shared,
    single,
    with_impl,
)
from attnlab.lab.superpixel_metrics import slic
from attnlab.layers import LayerNorm
from attnlab.local_attention import local_attention_warp
from attnlab.non_local import NonLocalBlock, non_local
from attnlab.resnet import resnet50
from attnlab.reversed_attention import reversed_attention
from attnlab.superpixel_baselines import lab_xy, ssn
from attnlab.weighted_neighbors import locally_weighted_neighbors

# Attention


def attention(N: int, form: str) -> Case:
    """From one projection, as in a module: q, k and v are strided views."""

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = rearrange(qkv, "b n three h d -> three b h n d")
        return scaled_dot_product_attention(q, k, v, impl=form)

    return Case(attend, (torch.randn(1, N, 3, HEADS, WIDTH),))


def multi_head(N: int, form: str) -> Case:
    ours, x = perturbed(MultiHeadAttention(CHANNELS, HEADS)), torch.randn(1, N, CHANNELS)
    if form == "torch":
        theirs = nn.MultiheadAttention(CHANNELS, HEADS, batch_first=True)
        theirs.load_state_dict({
            "in_proj_weight": ours.qkv.weight, "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.proj.weight, "out_proj.bias": ours.proj.bias,
        })  # fmt: skip
        return Case(lambda x: theirs(x, x, x, need_weights=False)[0], (x,), theirs)
    theirs = Attention(CHANNELS, HEADS, qkv_bias=True)
    theirs.load_state_dict(ours.state_dict())
    module = theirs if form == "timm" else with_impl(ours, form)
    return Case(module, (x,), module)


def non_local_operator(N: int, form: str) -> Case:
    """Embedded Gaussian, the paper's default width: half of the channels."""
    tensors = tuple(torch.randn(1, 1, N, CHANNELS // 2) for _ in range(3))
    return Case(partial(non_local, scale=CHANNELS**-0.5, impl=form), tensors)


def non_local_block(N: int, form: str) -> Case:
    ours = NonLocalBlock(CHANNELS, use_scale=CHANNELS**-0.5)
    theirs = NonLocalAttn(CHANNELS, rd_channels=CHANNELS // 2)
    return shared(ours, theirs, form, "timm", feature_map(N))


# Channels and places


def squeeze_excite(N: int, form: str) -> Case:
    ours, theirs = SqueezeExcite(CHANNELS), SEModule(CHANNELS, rd_divisor=1)
    return shared(ours, theirs, form, "timm", feature_map(N, batch=2))


def selective_kernel(N: int, form: str) -> Case:
    theirs = TimmSelectiveKernel(CHANNELS, rd_channels=32, groups=32, split_input=False)
    return shared(SelectiveKernel(CHANNELS), theirs, form, "timm", feature_map(N, batch=2))


def cbam(N: int, form: str) -> Case:
    ours, theirs = CBAM(CHANNELS, mlp_bias=False), CbamModule(CHANNELS)
    return shared(ours, theirs, form, "timm", feature_map(N, batch=2))


# Context


def position(N: int, form: str) -> Case:
    """DANet's widths: queries and keys an eighth of the values."""
    tensors = feature_map(N, CHANNELS // 8), feature_map(N, CHANNELS // 8), feature_map(N)
    return Case(partial(position_attention, impl=form), tensors)


def channel(N: int, form: str) -> Case:
    """Cosines, for which all forms agree to the end: energies of random maps saturate."""
    return single(ChannelSelfAttention("cosine"), form, feature_map(N, batch=2))


def object_context(N: int, form: str) -> Case:
    return single(ObjectContext(CHANNELS), form, feature_map(N))


# Compact generalised non-local


def cgnl(N: int, form: str) -> Case:
    """Two images, eight groups of 16 channels."""
    tensors = tuple(torch.randn(2, 8, 16 * N) for _ in range(3))
    return Case(partial(cgnl_dot, scale=(16 * N) ** -0.5, impl=form), tensors)


def cgnl_block(N: int, form: str) -> Case:
    x = feature_map(N)
    if form == "non-local":
        return single(NonLocalBlock(CHANNELS), "auto", x)
    return single(CGNLBlock(CHANNELS, use_scale=True), form, x)


# Video


def warping(N: int, form: str) -> Case:
    features, flow = feature_map(N), 2 * feature_map(N, 2)
    H, W = features.shape[2:]

    def sampled(features: Tensor, flow: Tensor) -> Tensor:
        x = flow[:, 0] + torch.arange(W, device=flow.device)
        y = flow[:, 1] + torch.arange(H, device=flow.device)[:, None]
        grid = torch.stack([2 * x / (W - 1) - 1, 2 * y / (H - 1) - 1], dim=-1)
        return F.grid_sample(features, grid, padding_mode="border", align_corners=True)

    return Case(sampled if form == "torch" else warp, (features, flow))


def local_attention(N: int, form: str) -> Case:
    """Radius 4, 64 channels."""
    tensors = tuple(feature_map(N, 64) for _ in range(3))
    return Case(partial(local_attention_warp, radius=4, impl=form), tensors)


def weighted_neighbors(N: int, form: str) -> Case:
    """3×3 sampling points that move, 64 channels."""
    features, weights = feature_map(N, 64), feature_map(N, 9).softmax(1)
    offsets = feature_map(N, 18).unflatten(1, (9, 2))
    ones = torch.ones(64, 1, 3, 3)

    def deformable(features: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
        rows_first = rearrange(offsets.flip(2), "b n yx h w -> b (n yx) h w")
        return deform_conv2d(features, rows_first, ones.to(features), padding=1, mask=weights)

    ours = partial(locally_weighted_neighbors, padding="zeros")
    return Case(deformable if form == "torchvision" else ours, (features, weights, offsets))


# Pooling, reversed attention, superpixels


def pooling(N: int, form: str) -> Case:
    """Four images, 384 channels, one class vector; timm's is the class attention of CaiT."""
    theirs = LayerScaleBlockClassAttn(384, 1, 3.0, qkv_bias=True, norm_layer=LayerNorm)
    ours, x = AttentionPool(384), feature_map(N, 384, 4)
    ours.load_state_dict(perturbed(theirs).state_dict(), strict=False)

    def by_timm(x: Tensor) -> Tensor:
        tokens = rearrange(x, "b c h w -> b (h w) c")
        return theirs(tokens, ours.cls_token.expand(len(x), -1, -1))[:, 0]

    if form == "timm":
        return Case(by_timm, (x,), theirs)
    return Case(with_impl(ours, form), (x,), ours)


def reversing(N: int, form: str) -> Case:
    """Three heads of 64, the tiny model's; from one projection, as in a module."""
    qkv = torch.randn(1, N, 3, 3, 64)
    selection, messages = torch.randn(1, 3, N), torch.rand(1, N)

    def send(qkv: Tensor, selection: Tensor, messages: Tensor) -> Tensor:
        q, k, v = rearrange(qkv, "b n three h d -> three b h n d")
        return reversed_attention(q, k, v, selection.softmax(1), messages, impl=form)

    return Case(send, (qkv, selection, messages))


def exchange(pixels: Tensor, superpixels: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """One iteration between the projections: the updates of superpixels (P2S) and pixels (S2P).

    Two heads. "unfold" copies the pixels' keys and values nine times; S2P, which has no pixels to
    copy, is the same in all forms.
    """
    dim = superpixels.shape[-1] // 3
    q_p, k_p, v_p = (
        rearrange(part, "b y x n (m d) -> b m y x n d", m=2)
        for part in pixels.split((dim, dim, pixels.shape[-1] - 2 * dim), dim=-1)
    )
    q_s, k_s, v_s = (
        rearrange(part, "b y x (m d) -> b m y x d", m=2) for part in superpixels.split(dim, dim=-1)
    )
    if form == "unfold":
        maps = (rearrange(sp.from_cells(x), "b m d h w -> b (m d) h w") for x in (k_p, v_p))
        queries = rearrange(q_s, "b m y x d -> b (m d) y x")
        p2s = sp.unfolded_p2s(queries, *maps, sp.cell_side(k_p), num_heads=2)
    else:
        p2s = sp.p2s_attend(sp.local_logits(k_p, q_s), v_p, form)
        p2s = rearrange(p2s, "b m y x d -> b (m d) y x")
    return p2s, sp.spread(sp.local_logits(q_p, k_s).softmax(-1), v_s)


def superpixel_exchange(N: int, form: str) -> Case:
    """N pixels in cells of 4×4, widths 64 and 128."""
    side = math.isqrt(N // 16)
    pixels, superpixels = torch.randn(1, side, side, 16, 256), torch.randn(1, side, side, 192)
    return Case(partial(exchange, form=form), (pixels, superpixels))


def superpixels(N: int, form: str) -> Case:
    """Ten iterations of hard k-means in Lab and position, cells of 16×16; an image of N pixels."""
    image = feature_map(N, 3).sigmoid()

    def by_scikit_image(image: Tensor) -> Tensor:
        return slic(image, max(N // 256, 1), sigma=0, enforce_connectivity=False)

    def ours(image: Tensor) -> Tensor:
        return ssn(lab_xy(image, 16), 16, hard=True)[1]

    return Case(by_scikit_image if form == "scikit-image" else ours, (image,))


# Models


def model(factory: Callable[..., nn.Module], px: int, form: str) -> Case:
    """Two images."""
    return single(factory(), form, torch.randn(2, 3, px, px))


def model_pair(ours: Callable, theirs: Callable, peer: str, px: int, form: str) -> Case:
    return shared(ours(), theirs(), form, peer, torch.randn(2, 3, px, px))


def deit(px: int, form: str) -> Case:
    theirs = partial(timm.create_model, "deit_tiny_patch16_224", img_size=px)
    return model_pair(partial(deit_tiny, img_size=px), theirs, "timm", px, form)


def _cbam_resnet50_of_timm() -> nn.Module:
    block, options = timm.models.resnet.Bottleneck, {"attn_layer": "cbam"}
    return timm.models.resnet.ResNet(block, (3, 4, 6, 3), block_args=options)


resnet = partial(model_pair, resnet50, torchvision.models.resnet50, "torchvision")
se_resnet = partial(model_pair, se_resnet50, partial(timm.create_model, "seresnet50"), "timm")
sk_resnet = partial(model_pair, sknet50, partial(timm.create_model, "skresnext50_32x4d"), "timm")
cbam_resnet = partial(
    model_pair, partial(cbam_resnet50, inside=partial(CBAM, mlp_bias=False)),
    _cbam_resnet50_of_timm, "timm",
)  # fmt: skip
