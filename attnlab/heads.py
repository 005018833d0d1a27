"""From features to a class for every pixel: segmentation heads, the network around them, its loss.

Papers: Long et al. 2015 (FCN); Xiao et al. 2018 (UPerNet), for trunks of one resolution; the heads
of DANet and OCNet are made of `attnlab.context`. A network is a backbone whose last strides became
dilations, a head on its last map, perhaps an auxiliary head on an earlier one, and bilinear
upsampling to the image's size.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from attnlab.context import LEAKY, BaseObjectContext, conv_norm_act
from attnlab.layers import check_map
from attnlab.official import convert_network


class FCNHead(nn.Module):
    """A 3×3 convolution and a classifier: `(B, in_channels, H, W)` → `(B, num_classes, H, W)`.

    Args:
        inter_channels: between the two; a quarter of `in_channels` by default.
        dropout: of whole channels before the classifier.
        bias, act_layer: of the 3×3; True and `LEAKY` are OCNet's auxiliary head ("dsn"), with
            `dropout=0.05`.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        inter_channels: int | None = None,
        dropout: float = 0.1,
        bias: bool = False,
        act_layer: Callable[[], nn.Module] = nn.ReLU,
    ):
        super().__init__()
        width = inter_channels or in_channels // 4
        self.reduce = conv_norm_act(in_channels, width, 3, bias=bias, act_layer=act_layer)
        self.drop = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.drop(self.reduce(x)))


class ObjectContextHead(nn.Module):
    """OCNet's head: a 3×3 reduction, an object context, a classifier; features → logits.

    `(B, in_channels, H, W)` → `(B, num_classes, H, W)`.

    Args:
        inter_channels: width of the context; a quarter of `in_channels` by default.
        context: makes the context from its channels: `BaseObjectContext` or a sibling of it.
        act_layer: after the reduction; OCNet v1 has `nn.Identity` before its pyramid.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        inter_channels: int | None = None,
        context: Callable[[int], nn.Module] = BaseObjectContext,
        act_layer: Callable[[], nn.Module] = LEAKY,
    ):
        super().__init__()
        width = inter_channels or in_channels // 4
        self.reduce = conv_norm_act(in_channels, width, 3, bias=True, act_layer=act_layer)
        self.context = context(width)
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.context(self.reduce(x)))


class PyramidPooling(nn.Module):
    """What the whole image, its halves, thirds and sixths look like on average, beside each place.

    PSPNet's module: `(B, in_channels, H, W)` → `(B, out_channels, H, W)`. A bin that is the whole
    image has one value a channel, so that BatchNorm needs two images or more in training.

    Args:
        bins: into how many rows, and columns, each average cuts the image.
    """

    def __init__(self, in_channels: int, out_channels: int, bins: Sequence[int] = (1, 2, 3, 6)):
        super().__init__()
        self.bins = tuple(bins)
        self.branches = nn.ModuleList(conv_norm_act(in_channels, out_channels) for _ in bins)
        self.fuse = conv_norm_act(in_channels + len(self.bins) * out_channels, out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        means = [
            resize(branch(F.adaptive_avg_pool2d(x, side)), x.shape[2:])
            for side, branch in zip(self.bins, self.branches, strict=True)
        ]
        return self.fuse(torch.cat([x, *means], dim=1))


class UPerNetHead(nn.Module):
    """UPerNet's head on one map: a feature pyramid whose levels are made by resizing.

    `(B, in_channels, H, W)` → logits `(B, num_classes, 4·H, 4·W)`, of the finest level's size.
    A backbone of stages gives UPerNet maps of four strides. A trunk of one stride has one map; its
    missing levels are that map, bilinearly resized and projected. (Both steps are linear, one in
    space and one in channels, so that they commute: we project first, where the map is small.)

    Args:
        inter_channels: width of the pyramid.
        scales: sides of the levels, relative to the map's, from fine to coarse.
        bins: of the pyramid pooling on the coarsest level.
        dropout: of whole channels before the classifier.

    Raises `ValueError` for scales that are not two or more falling numbers above 0, and for inputs
    that are no such maps.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        inter_channels: int = 512,
        scales: Sequence[float] = (4, 2, 1, 0.5),
        bins: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
    ):
        super().__init__()
        self.in_channels, self.scales = in_channels, tuple(scales)
        falling = all(fine > coarse for fine, coarse in pairwise(self.scales))
        if len(self.scales) < 2 or not falling or self.scales[-1] <= 0:
            raise ValueError(f"scales={self.scales}: expected two or more falling numbers above 0")
        finer = self.scales[:-1]
        self.laterals = nn.ModuleList(conv_norm_act(in_channels, inter_channels) for _ in finer)
        self.pool = PyramidPooling(in_channels, inter_channels, bins)
        self.smooth = nn.ModuleList(conv_norm_act(inter_channels, inter_channels, 3) for _ in finer)
        self.fuse = conv_norm_act(len(self.scales) * inter_channels, inter_channels, 3)
        self.drop = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(inter_channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        check_map(x, self.in_channels)
        *finer, coarsest = [[max(1, int(scale * s)) for s in x.shape[2:]] for scale in self.scales]
        level = self.pool(resize(x, coarsest))
        levels = [level]
        for size, lateral, smooth in zip(finer[::-1], self.laterals, self.smooth, strict=True):
            project, norm, act = lateral
            level = act(norm(resize(project(x), size))) + resize(level, size)
            levels.append(smooth(level))
        levels = [resize(level, finer[0]) for level in levels]
        return self.classify(self.drop(self.fuse(torch.cat(levels, dim=1))))


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, corners not aligned: `(B, C, H, W)` → `(B, C, *size)`."""
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


class Segmenter(nn.Module):
    """A backbone, a head on its last map, an auxiliary head on an earlier one, upsampling.

    Images `(B, in_chans, H, W)` → logits `(B, num_classes, H, W)` in eval mode. In training, the
    list of all logits that have a loss: the head's (`DANetHead` gives three), then the auxiliary
    head's. State dicts of whole networks of DANet (2020) and OCNet (v1) load strictly.

    Args:
        backbone: an `attnlab.resnet.ResNet` with `num_classes=0`, or another module with its
            `forward_stages`.
        head: features of "layer4" → logits, or a list of them of which the first is the answer.
        aux_head: features of `aux_stage` → logits.
        align_corners: how the logits are upsampled; both papers' codes align them.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        aux_head: nn.Module | None = None,
        aux_stage: str = "layer3",
        align_corners: bool = True,
    ):
        super().__init__()
        self.backbone, self.head, self.aux_head = backbone, head, aux_head
        self.aux_stage, self.align_corners = aux_stage, align_corners
        self.register_load_state_dict_pre_hook(convert_network)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        stages = self.backbone.forward_stages(x)
        outputs = self.head(stages["layer4"])
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        if not self.training:
            return self._upsample(outputs[0], x)
        if self.aux_head is not None:
            outputs.append(self.aux_head(stages[self.aux_stage]))
        return [self._upsample(logits, x) for logits in outputs]

    def _upsample(self, logits: Tensor, image: Tensor) -> Tensor:
        return F.interpolate(
            logits, image.shape[2:], mode="bilinear", align_corners=self.align_corners
        )


def segmentation_loss(
    outputs: Tensor | Sequence[Tensor],
    target: Tensor,
    weights: Sequence[float] | None = None,
    ignore_index: int = 255,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Σ_k weights_k · CE(outputs_k, target): the loss of a head with auxiliary outputs.

    DANet's three outputs weigh 1 each; OCNet's auxiliary head weighs 0.4.

    Args:
        outputs: logits `(B, classes, H, W)`, or a list of them.
        target: `(B, H, W)`, integers; `ignore_index` is not counted.
        weights: one for each of the outputs; all 1 by default.
        class_weights: `(classes,)`, as in `F.cross_entropy`.

    Raises:
        ValueError: not one weight for each output, or an output of another size than the target's.
    """
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    weights = [1.0] * len(outputs) if weights is None else weights
    if len(weights) != len(outputs):
        raise ValueError(f"weights={weights}: expected {len(outputs)}, one for each output")
    for logits in outputs:
        if logits.ndim != 4 or (len(logits), *logits.shape[2:]) != target.shape:
            raise ValueError(
                f"outputs {tuple(logits.shape)}: expected (B, classes, H, W), for the target "
                f"{tuple(target.shape)}"
            )
    return sum(
        weight * F.cross_entropy(logits, target, class_weights, ignore_index=ignore_index)
        for weight, logits in zip(weights, outputs, strict=True)
    )


def same_class(labels: Tensor, ignore_index: int = 255) -> Tensor:
    """The ideal relation of OCNet: do two positions have the same class?

    Divide a row by its sum, and it averages over all positions of the class: an oracle, for the
    labels of a test image are not known.

    Args:
        labels: `(B, H, W)`, integers. A position of `ignore_index` is related to itself only.

    Returns:
        `(B, N, N)`, bool.
    """
    if labels.ndim != 3 or labels.is_floating_point():
        raise ValueError(
            f"labels {tuple(labels.shape)}, {labels.dtype}: expected integers (B, H, W)"
        )
    labels = rearrange(labels, "b h w -> b (h w)")
    known = labels != ignore_index
    same = (labels[:, :, None] == labels[:, None, :]) & known[:, :, None]
    return same | torch.eye(labels.shape[1], dtype=torch.bool, device=labels.device)


def object_purity(map: Tensor, labels: Tensor, ignore_index: int = 255) -> Tensor:
    """Σ_j S_ij [class_j = class_i], the share of a position's attention that stays in its class.

    Args:
        map: `(B, heads, N, N)`, rows sum to 1.
        labels: `(B, H, W)` with H·W = N.

    Returns:
        A scalar: the mean over heads and over positions that have a class.
    """
    if map.ndim != 4 or map.shape[-1] != labels[0].numel() or len(map) != len(labels):
        expected = f"(B, heads, N, N) for the labels {tuple(labels.shape)}"
        raise ValueError(f"map {tuple(map.shape)}: expected {expected}")
    inside = (map * same_class(labels, ignore_index)[:, None]).sum(-1).mean(1)  # (B, N)
    return inside[rearrange(labels, "b h w -> b (h w)") != ignore_index].mean()
