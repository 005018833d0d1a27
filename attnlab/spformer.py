"""SPFormer: a vision transformer whose tokens are superpixels that it forms itself (chapter 10).

Paper: Mei et al. 2024, "SPFormer: Enhancing Vision Transformer with Superpixel Representation". The
idea: keep two grids, many pixels and few superpixels. Superpixel cross-attention lets each
superpixel collect from the pixels around it, and each pixel choose among the nine superpixels
around it; the transformer's blocks run on the superpixels alone. The choice of the pixels is a soft
segmentation, and carries whatever is known of superpixels back to pixels (Eq. 1).

The authors published no code under the paper's name. `paper()`, the default, follows the text;
`lineage()` does what code that grew out of the authors' own did, where the two are known to differ.
What differs from the paper: nothing known; each option is a point that its text leaves open.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from attnlab.attention import MultiHeadAttention
from attnlab.layers import DropPath, LayerNorm, LayerNorm2d, LayerScale, Mlp, check_map, pair
from attnlab.superpixel import expand, hard_labels, merge_heads, upsample_association
from attnlab.superpixel_attention import (
    LayerScale2d,
    LearnedPosition,
    Logits,
    SuperpixelCrossAttention,
    check_option,
    init_weights,
)
from attnlab.superpixel_baselines import lab_xy, ssn


class Block(nn.Module):
    """A transformer layer with LayerScale on both branches (CaiT): `(B, N, D)` → `(B, N, D)`."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float, init_values: float,
        impl: str,
    ):  # fmt: skip
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = MultiHeadAttention(dim, num_heads, impl=impl)
        self.ls1 = LayerScale(dim, init_values)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = LayerScale(dim, init_values)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class Stage(nn.Module):
    """Superpixel cross-attention, then self-attention among the superpixels.

    `(B, C_p, h, w)` and `(B, C_s, Sh, Sw)` → both, updated, and the `Logits` of every iteration.
    """

    def __init__(
        self, sca: SuperpixelCrossAttention, blocks: list[Block], grid_size: tuple[int, int]
    ):
        super().__init__()
        self.sca = sca
        self.add_position = LearnedPosition(sca.dims[1], grid_size)
        self.blocks = nn.Sequential(*blocks)

    def forward(self, pixels: Tensor, superpixels: Tensor) -> tuple[Tensor, Tensor, list[Logits]]:
        pixels, superpixels, steps = self.sca(pixels, superpixels)
        height = superpixels.shape[2]
        tokens = rearrange(self.add_position(superpixels), "b d y x -> b (y x) d")
        tokens = self.blocks(tokens)
        return pixels, rearrange(tokens, "b (y x) d -> b d y x", y=height), steps


class PixelUpdate(nn.Module):
    """Between stages: the superpixels, projected and expanded by Eq. 1, are added to the pixels."""

    def __init__(self, pixel_dim: int, superpixel_dim: int, init_values: float):
        super().__init__()
        self.project = nn.Conv2d(superpixel_dim, pixel_dim, 1, bias=False)
        self.norm = LayerNorm2d(pixel_dim)
        self.scale = LayerScale2d(pixel_dim, init_values)

    def forward(self, pixels: Tensor, superpixels: Tensor, logits: Tensor) -> Tensor:
        return pixels + self.scale(expand(self.norm(self.project(superpixels)), logits))


class SPFormer(nn.Module):
    """Stem, first superpixels, stages, mean of the superpixels, classifier (Sec. 3).

    Images `(B, in_chans, H, W)` → logits `(B, num_classes)`. H and W may differ from `img_size`, in
    multiples of stem_stride · cell: position embeddings are resized. There is no class token.

    Args:
        embed_dim: C_s, width of superpixels.
        pixel_dim: C_p, width of pixels and of the cross-attention's queries and keys.
        num_heads, mlp_ratio, drop_path_rate: of the blocks; the rate grows linearly from 0.
        sp_heads: M, heads of the cross-attention.
        depths: blocks of each stage. A stage begins with cross-attention, so that `(2, 10)` has it
            before blocks 1 and 3, and `(12,)` only before the first.
        stem_stride: r, image pixels along one pixel of the pixel grid.
        cell: s, pixels of the pixel grid along a superpixel's cell.
        conv_stem: 3×3 convolutions of stride 2 (r is then a power of 2) in place of one r×r patch.
        stem_norm: "layer", with GELU; or "batch", with ReLU.
        first: how superpixels begin: "lift_pool", a 1×1 convolution to C_s, norm, GELU and the mean
            of each cell; "pool_lift", the other way round; or "conv", of stride s.
        iters, schedule, share_qk, qkv_norm, position, last_s2p: see `SuperpixelCrossAttention`.
        assoc: which logits of a stage's last iteration are its association: "s2p" as in Eq. 3, or
            "p2s", the superpixels' own, normalised again over nine.
        pixel_base: what the expansion between stages is added to: the "updated" pixels, or
            those of the "stage_input".
        init_values: LayerScale of the blocks.
        sca_init_values: LayerScale of the cross-attention and between stages.
        drop_rate: dropout before the classifier.
        impl: of every attention; "explicit", "fused" or "auto".

    Raises:
        ValueError: unknown options or sizes that do not fit; image sides that are no multiples.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        pixel_dim: int = 64,
        num_heads: int = 6,
        sp_heads: int = 2,
        depths: tuple[int, ...] = (2, 10),
        stem_stride: int = 4,
        cell: int = 4,
        conv_stem: bool = False,
        stem_norm: str = "layer",
        first: str = "lift_pool",
        iters: int = 2,
        schedule: str = "parallel",
        share_qk: bool = False,
        qkv_norm: str = "post",
        position: str = "conv",
        last_s2p: bool = True,
        assoc: str = "s2p",
        pixel_base: str = "updated",
        mlp_ratio: float = 4.0,
        init_values: float = 1e-5,
        sca_init_values: float = 1e-5,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        impl: str = "auto",
    ):
        super().__init__()
        check_option("assoc", assoc, ("s2p", "p2s"))
        check_option("pixel_base", pixel_base, ("updated", "stage_input"))
        if assoc == "s2p" and not last_s2p:
            raise ValueError("last_s2p=False: expected True with assoc='s2p'")
        self.num_features = self.embed_dim = embed_dim
        self.stem_stride, self.cell, self.patch_size = stem_stride, cell, stem_stride * cell
        self.assoc, self.pixel_base = assoc, pixel_base
        grid = self.grid(*pair(img_size))

        self.stem = _stem(in_chans, pixel_dim, stem_stride, conv_stem, stem_norm)
        self.first = _first_superpixels(pixel_dim, embed_dim, cell, first)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.stages = nn.ModuleList(
            Stage(
                SuperpixelCrossAttention(
                    pixel_dim, embed_dim, sp_heads, cell, iters, schedule=schedule,
                    share_qk=share_qk, qkv_norm=qkv_norm, position=position, last_s2p=last_s2p,
                    init_values=sca_init_values, grid_size=grid, impl=impl,
                ),
                [
                    Block(embed_dim, num_heads, mlp_ratio, next(rates), init_values, impl)
                    for _ in range(depth)
                ],
                grid,
            )
            for depth in depths
        )  # fmt: skip
        # Nothing reads the pixels behind the last stage.
        self.stages[-1].sca.iterations[-1].pixel_scale.requires_grad_(False)
        self.between = nn.ModuleList(
            PixelUpdate(pixel_dim, embed_dim, sca_init_values) for _ in depths[1:]
        )
        self.fc_norm = LayerNorm(embed_dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)
        self.apply(init_weights)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(Sh, Sw): rows and columns of superpixels in an image of this many pixels."""
        side = self.patch_size
        if height % side or width % side:
            raise ValueError(
                f"image size {(height, width)}: expected multiples of stem_stride·cell={side}"
            )
        return height // side, width // side

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a new one; none, which returns features, for 0 classes."""
        self.num_classes = num_classes
        like = self.fc_norm.weight
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.embed_dim, num_classes).to(like)
            init_weights(self.head)

    def no_weight_decay(self) -> set[str]:
        """The parameters that an optimiser should not decay, besides biases and norms."""
        return {name for name, _ in self.named_parameters() if name.endswith("pos_embed")}

    def freeze_as_patches(self) -> "SPFormer":
        """Set all LayerScales around superpixels to 0 for good: the superpixels are pooled patches.

        The control of the paper's comparisons: equal in parameters and cost. Returns the model.
        """
        for module in self.modules():
            if isinstance(module, LayerScale2d):
                nn.init.zeros_(module.gamma)
                module.requires_grad_(False)
        return self

    def forward_features(
        self, x: Tensor, return_info: bool = False
    ) -> Tensor | tuple[Tensor, list[dict]]:
        """Images `(B, in_chans, H, W)` → superpixels `(B, C_s, Sh, Sw)` after the last block.

        With `return_info` also a list with one entry per iteration of every stage: `stage`, `iter`,
        `p2s_logits`, `s2p_logits` (slots `(B, M, Sh, Sw, s², 9)`, the last None if it was skipped)
        and `logits`, the one of the two that `assoc` names.
        """
        check_map(x, self.stem[0].in_channels)
        self.grid(*x.shape[2:])
        pixels = self.stem(x)
        superpixels, info = self.first(pixels), []
        for i, stage in enumerate(self.stages):
            before = pixels
            pixels, superpixels, steps = stage(pixels, superpixels)
            info += [
                {"stage": i, "iter": t, "p2s_logits": step.p2s, "s2p_logits": step.s2p,
                 "logits": getattr(step, self.assoc)}
                for t, step in enumerate(steps)
            ]  # fmt: skip
            if i < len(self.between):
                base = pixels if self.pixel_base == "updated" else before
                pixels = self.between[i](base, superpixels, info[-1]["logits"])
        return (superpixels, info) if return_info else superpixels

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Superpixels `(B, C_s, Sh, Sw)` → logits `(B, num_classes)`, or the features before."""
        x = self.head_drop(self.fc_norm(x.mean((2, 3))))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor, return_info: bool = False) -> Tensor | tuple[Tensor, list[dict]]:
        x, info = self.forward_features(x, return_info=True)
        return (self.forward_head(x), info) if return_info else self.forward_head(x)


class SuperpixelSegmenter(nn.Module):
    """Classify every superpixel; the association (Eq. 1) says which pixels are whose.

    Images `(B, in_chans, H, W)` → logits `(B, num_classes, H, W)`, as SETR's naive decoder: the
    superpixels after the last block, LayerNorm, one linear layer, upsampling. For sizes
    that are no multiples, see `to_whole_cells`.

    Args:
        backbone: its classifier is removed, and the norm before it is not used.
        upsample: "association" is Eq. 1 with the heads merged; "bilinear" and "nearest" are what it
            is compared with.
        mode: how the association gets to the image's size, see `upsample_association`.
    """

    def __init__(
        self,
        backbone: SPFormer,
        num_classes: int,
        upsample: str = "association",
        mode: str = "cell",
    ):
        super().__init__()
        check_option("upsample", upsample, ("association", "bilinear", "nearest"))
        check_option("mode", mode, ("cell", "window"))
        self.upsample, self.mode = upsample, mode
        self.backbone = backbone
        self.backbone.reset_classifier(0)
        self.backbone.fc_norm.requires_grad_(False)
        self.norm = LayerNorm2d(backbone.embed_dim)
        self.classify = nn.Conv2d(backbone.embed_dim, num_classes, 1)
        nn.init.trunc_normal_(self.classify.weight, std=0.02)
        nn.init.zeros_(self.classify.bias)

    def forward(self, x: Tensor) -> Tensor:
        superpixels, info = self.backbone.forward_features(x, return_info=True)
        values = self.classify(self.norm(superpixels))
        if self.upsample != "association":
            return F.interpolate(values, size=x.shape[2:], mode=self.upsample)
        logits = merge_heads(info[-1]["logits"])
        return expand(values, logits, self.backbone.stem_stride, self.mode)


def to_whole_cells(images: Tensor, side: int) -> Tensor:
    """Continue images by their border, right and below, to multiples of `side`: `(B, C, H, W)`.

    With `side=model.patch_size` any image fits; cut what the model says of it, `[..., :H, :W]`.
    """
    height, width = images.shape[2:]
    return F.pad(images, (0, -width % side, 0, -height % side), mode="replicate")


def to_superpixels(
    image: Tensor, model: SPFormer | None = None, *, side: int = 16, iters: int = 10
) -> Tensor:
    """Which superpixel each pixel belongs to, for an image of any size, or several.

    Args:
        image: `(3, H, W)` or `(B, 3, H, W)`, as the model was trained on; without a model, sRGB
            from 0 to 1.
        model: its last association, heads merged, at the image's resolution, in the mode (`eval()`)
            that it is in. Without one, soft k-means of color and place (SSN without a network) in
            cells of `side` pixels.
        side, iters: of the k-means.

    Returns:
        int64 `(H, W)` or `(B, H, W)`: superpixels of the grid, numbered in row-major order. Where H
        or W is no multiple of a cell, the image is continued by its border and the labels are cut.

    Raises:
        ValueError: `image` is no such tensor.
    """
    channels = 3 if model is None else model.stem[0].in_channels
    if image.ndim not in (3, 4) or image.shape[-3] != channels or not image.is_floating_point():
        expected = f"expected ({channels}, H, W) or (B, {channels}, H, W), floating point"
        raise ValueError(f"image {tuple(image.shape)}, {image.dtype}: {expected}")
    batch = image if image.ndim == 4 else image[None]
    height, width = batch.shape[2:]
    batch = to_whole_cells(batch, side if model is None else model.patch_size)
    with torch.no_grad():
        if model is None:
            logits, _ = ssn(lab_xy(batch, side), side, iters)
        else:
            _, info = model.forward_features(batch, return_info=True)
            logits = upsample_association(merge_heads(info[-1]["logits"]), model.stem_stride)
    labels = hard_labels(logits)[:, 0, :height, :width]
    return labels if image.ndim == 4 else labels[0]


def paper() -> dict:
    """Keywords for `SPFormer`: what the paper's text says. They are the defaults."""
    return {"assoc": "s2p", "pixel_base": "updated", "last_s2p": True}


def lineage() -> dict:
    """Keywords for `SPFormer`: what the code of a later work by the same authors does instead.

    The association is that of the superpixels' own logits; the last iteration of a stage does not
    update the pixels; and the expansion between stages is added to the pixels of the stage's input.
    """
    return {"assoc": "p2s", "pixel_base": "stage_input", "last_s2p": False}


def spformer_tiny(patch_size: int = 16, **kwargs) -> SPFormer:
    """SPFormer-T: 5.7 M parameters. `patch_size` is 16, 32 or 56; keywords: `SPFormer`'s."""
    sizes = {"embed_dim": 192, "num_heads": 3, "pixel_dim": 32}
    return SPFormer(**sizes | _strides(patch_size) | kwargs)


def spformer_small(patch_size: int = 16, **kwargs) -> SPFormer:
    """SPFormer-S: 22 M parameters. `patch_size` is 16, 32 or 56; keywords: `SPFormer`'s."""
    sizes = {"embed_dim": 384, "num_heads": 6, "pixel_dim": 64}
    return SPFormer(**sizes | _strides(patch_size) | kwargs)


def spformer_base(patch_size: int = 16, **kwargs) -> SPFormer:
    """SPFormer-B: 88 M parameters. `patch_size` is 16, 32 or 56; keywords: `SPFormer`'s."""
    sizes = {"embed_dim": 768, "num_heads": 12, "pixel_dim": 96, "sp_heads": 3}
    return SPFormer(**sizes | _strides(patch_size) | kwargs)


def spformer_mini(**kwargs) -> SPFormer:
    """For the bundled 64-pixel data: `vit_mini`'s 8×8 tokens, 6 blocks and width; 8 classes.

    LayerScale of the blocks begins at 0.1: 1e-5 is for hundreds of epochs.
    """
    sizes = {"img_size": 64, "stem_stride": 2, "embed_dim": 96, "num_heads": 3, "pixel_dim": 32}
    options = {"depths": (2, 4), "num_classes": 8, "init_values": 0.1}
    return SPFormer(**sizes | options | kwargs)


def spformer_tiny_patch16(**kwargs) -> SPFormer:
    """SPFormer-T/16. Keywords: `SPFormer`'s."""
    return spformer_tiny(16, **kwargs)


def spformer_tiny_patch16_convstem(**kwargs) -> SPFormer:
    """SPFormer-T†/16, with a stem of 3×3 convolutions. Keywords: `SPFormer`'s."""
    return spformer_tiny(16, conv_stem=True, **kwargs)


def spformer_small_patch16(**kwargs) -> SPFormer:
    """SPFormer-S/16. Keywords: `SPFormer`'s."""
    return spformer_small(16, **kwargs)


def spformer_small_patch16_convstem(**kwargs) -> SPFormer:
    """SPFormer-S†/16, with a stem of 3×3 convolutions. Keywords: `SPFormer`'s."""
    return spformer_small(16, conv_stem=True, **kwargs)


def spformer_small_patch32(**kwargs) -> SPFormer:
    """SPFormer-S/32. Keywords: `SPFormer`'s."""
    return spformer_small(32, **kwargs)


def spformer_small_patch32_convstem(**kwargs) -> SPFormer:
    """SPFormer-S†/32, with a stem of 3×3 convolutions. Keywords: `SPFormer`'s."""
    return spformer_small(32, conv_stem=True, **kwargs)


def spformer_small_patch56(**kwargs) -> SPFormer:
    """SPFormer-S/56. Keywords: `SPFormer`'s."""
    return spformer_small(56, **kwargs)


def spformer_small_patch56_convstem(**kwargs) -> SPFormer:
    """SPFormer-S†/56, with a stem of 3×3 convolutions. Keywords: `SPFormer`'s."""
    return spformer_small(56, conv_stem=True, **kwargs)


def spformer_base_patch16(**kwargs) -> SPFormer:
    """SPFormer-B/16. Keywords: `SPFormer`'s."""
    return spformer_base(16, **kwargs)


def spformer_base_patch16_convstem(**kwargs) -> SPFormer:
    """SPFormer-B†/16, with a stem of 3×3 convolutions. Keywords: `SPFormer`'s."""
    return spformer_base(16, conv_stem=True, **kwargs)


def _strides(patch_size: int) -> dict[str, int]:
    """r and s of a patch-equivalent size r·s."""
    strides = {16: (4, 4), 32: (8, 4), 56: (8, 7)}
    if patch_size not in strides:
        raise ValueError(f"patch_size={patch_size}: expected 16, 32 or 56")
    return dict(zip(("stem_stride", "cell"), strides[patch_size], strict=True))


def _stem(in_chans: int, dim: int, stride: int, conv: bool, norm: str) -> nn.Sequential:
    """`(B, in_chans, H, W)` → `(B, dim, H/stride, W/stride)`: convolutions, each with norm, act."""
    check_option("stem_norm", norm, ("layer", "batch"))
    layers, steps = [], stride.bit_length() - 1 if conv else 1
    if conv and (stride != 2**steps or stride < 2 or dim % 2 ** (steps - 1)):
        raise ValueError(
            f"stem_stride={stride}, pixel_dim={dim}: expected a power of 2 from 2 and a multiple of"
            " half of it, with conv_stem=True"
        )
    for i in reversed(range(steps)):  # dim/4, dim/2, dim
        width = dim // 2**i
        shape = {"kernel_size": 3, "stride": 2, "padding": 1}
        shape = shape if conv else {"kernel_size": stride, "stride": stride}
        layers.append(nn.Conv2d(in_chans, width, **shape, bias=False))
        layers += (
            [LayerNorm2d(width), nn.GELU()]
            if norm == "layer"
            else [nn.BatchNorm2d(width), nn.ReLU()]
        )
        in_chans = width
    return nn.Sequential(*layers)


def _first_superpixels(pixel_dim: int, dim: int, side: int, how: str) -> nn.Sequential:
    """`(B, pixel_dim, h, w)` → `(B, dim, h/side, w/side)`."""
    check_option("first", how, ("lift_pool", "pool_lift", "conv"))
    if how == "conv":
        lift = nn.Conv2d(pixel_dim, dim, side, side, bias=False)
        return nn.Sequential(lift, LayerNorm2d(dim), nn.GELU())
    lift = nn.Conv2d(pixel_dim, dim, 1, bias=False), LayerNorm2d(dim), nn.GELU()
    pool = nn.AvgPool2d(side)
    return nn.Sequential(*lift, pool) if how == "lift_pool" else nn.Sequential(pool, *lift)
