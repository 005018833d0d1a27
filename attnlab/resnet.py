"""Residual networks with slots: what the blocks of chapters 02 to 08 are plugged into.

K. He et al., *Deep residual learning for image recognition*, CVPR 2016. Parameter names, shapes
and results are torchvision's, whose state_dicts load strictly. What differs: any block can be put
into a named place of any of these networks without shifting a name, both kinds of residual block
can be dilated, and there are a deep stem and multi-grid dilations, as segmentation uses them.

    resnet50(inside=SqueezeExcite)               # in every residual branch, before the addition
    resnet50(after={"layer3.4": NonLocalBlock})  # after the fifth block of the third stage
    resnet50(conv2=selective_kernel)             # in place of every bottleneck's 3×3
    resnet50(pool=attention_pool)                # before the classifier
"""

from collections.abc import Callable, Mapping, Sequence

from einops import reduce
from torch import Tensor, nn

STAGES = ("layer1", "layer2", "layer3", "layer4")
Slot = Callable[[int], nn.Module]  # channels → a module that keeps the shape (B, channels, H, W)


def conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
) -> nn.Conv2d:
    """A convolution without bias that keeps the size at stride 1, in He's initialisation."""
    layer = nn.Conv2d(
        in_channels, out_channels, kernel_size, stride, dilation * (kernel_size // 2),
        dilation, groups, bias=False,
    )  # fmt: skip
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut: `(B, in_channels, H, W)` → `(B, planes, H/s, W/s)`."""

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int = 1,
        dilations: tuple[int, int] = (1, 1),
        *,
        act_layer: Callable[[], nn.Module] = nn.ReLU,
        norm_layer: Slot = nn.BatchNorm2d,
        inside: Slot | None = None,
    ):
        super().__init__()
        self.conv1 = conv(in_channels, planes, 3, stride, dilations[0])
        self.bn1 = norm_layer(planes)
        self.relu = act_layer()
        self.conv2 = conv(planes, planes, 3, dilation=dilations[1])
        self.bn2 = norm_layer(planes)
        self.inside = inside(planes) if inside else nn.Identity()
        self.downsample = _shortcut(in_channels, planes, stride, norm_layer)
        self.after: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.relu(self.bn1(self.conv1(x)))
        branch = self.inside(self.bn2(self.conv2(branch)))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.after(self.relu(branch + shortcut))


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1: `(B, in_channels, H, W)` → `(B, 4·planes, H/s, W/s)`; the 3×3 has the stride.

    `conv2`, where given, makes what takes the place of the 3×3 convolution and its normalisation:
    `(in_channels, out_channels, stride, dilation)` → module.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int = 1,
        dilations: tuple[int, int] = (1, 1),
        *,
        groups: int = 1,
        base_width: int = 64,
        act_layer: Callable[[], nn.Module] = nn.ReLU,
        norm_layer: Slot = nn.BatchNorm2d,
        inside: Slot | None = None,
        conv2: Callable[[int, int, int, int], nn.Module] | None = None,
    ):
        super().__init__()
        width = planes * base_width // 64 * groups
        channels = planes * self.expansion
        self.conv1 = conv(in_channels, width, 1)
        self.bn1 = norm_layer(width)
        if conv2 is None:
            self.conv2 = conv(width, width, 3, stride, dilations[0], groups)
            self.bn2 = norm_layer(width)
        else:
            self.conv2 = conv2(width, width, stride, dilations[0])
            self.bn2 = nn.Identity()
        self.conv3 = conv(width, channels, 1)
        self.bn3 = norm_layer(channels)
        self.relu = act_layer()
        self.inside = inside(channels) if inside else nn.Identity()
        self.downsample = _shortcut(in_channels, channels, stride, norm_layer)
        self.after: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.relu(self.bn1(self.conv1(x)))
        branch = self.relu(self.bn2(self.conv2(branch)))
        branch = self.inside(self.bn3(self.conv3(branch)))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.after(self.relu(branch + shortcut))


def _shortcut(
    in_channels: int, out_channels: int, stride: int, norm_layer: Slot
) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(conv(in_channels, out_channels, 1, stride), norm_layer(out_channels))


class GlobalAveragePool(nn.Module):
    """The mean over all places: `(B, C, H, W)` → `(B, C)`."""

    def forward(self, x: Tensor) -> Tensor:
        return reduce(x, "b c h w -> b c", "mean")


class ResNet(nn.Module):
    """A residual network: images `(B, in_chans, H, W)` → logits `(B, num_classes)`.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        layers: number of blocks in each of the four stages.
        width: channels of the first stage; every later stage doubles them.
        groups, base_width: of a ResNeXt's 3×3 convolutions (Bottleneck only).
        stem: "conv7" (He), "deep" (three 3×3 of width, width, 2·width; PSPNet, OCNet, DANet), each
            with stride 4; or "small" (one 3×3, stride 2), for images of some 64 pixels.
        output_stride: pixels of the image per place of the last map; what is less than the strides'
            product turns the last stages' strides into dilations.
        multi_grid: factors on the dilations of the last stage's blocks, DANet's is (1, 2, 4).
        act_layer, norm_layer: of the residual blocks and the stem; `partial(nn.LeakyReLU, 0.01)`
            after a BatchNorm is what OCNet's code calls ABN.
        conv2: makes what takes the place of every Bottleneck's 3×3 convolution and BatchNorm.
        inside: makes, from its channels, the block at the end of every residual branch.
        after: from places such as "layer3.4" (blocks count from 0) to what makes the block there.
        pool: module `(B, C, H, W)` → `(B, num_features)` before the classifier; default the mean.
        drop_rate: dropout before the classifier.

    Raises `ValueError` for an unknown stem or place, an impossible stride or multi-grid, options
    that the block does not have, and inputs that are no such images.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        width: int = 64,
        groups: int = 1,
        base_width: int = 64,
        stem: str = "conv7",
        output_stride: int | None = None,
        multi_grid: Sequence[int] | None = None,
        act_layer: Callable[[], nn.Module] = nn.ReLU,
        norm_layer: Slot = nn.BatchNorm2d,
        conv2: Callable[[int, int, int, int], nn.Module] | None = None,
        inside: Slot | None = None,
        after: Mapping[str, Slot] | None = None,
        pool: nn.Module | None = None,
        drop_rate: float = 0.0,
    ):
        super().__init__()
        options = {"act_layer": act_layer, "norm_layer": norm_layer, "inside": inside}
        if block is Bottleneck:
            options |= {"groups": groups, "base_width": base_width, "conv2": conv2}
        elif (groups, base_width, conv2) != (1, 64, None):
            raise ValueError(
                f"groups={groups}, base_width={base_width}, conv2={conv2}: expected 1, 64 and "
                "None, for only a Bottleneck has these"
            )
        if multi_grid is not None and len(multi_grid) != layers[3]:
            raise ValueError(
                f"multi_grid={tuple(multi_grid)}: expected one factor for each of the last stage's "
                f"{layers[3]} blocks"
            )
        self.in_chans = in_chans
        self.conv1, stem_channels, self.maxpool = _stem(
            stem, in_chans, width, act_layer, norm_layer
        )
        self.bn1 = norm_layer(stem_channels)
        self.relu = act_layer()
        strides, dilations = _strides(2 if stem == "small" else 4, output_stride)
        channels = stem_channels
        for stage, name in enumerate(STAGES):
            blocks = []
            for index in range(layers[stage]):
                # The first convolution of a dilated stage still reads the stage before it.
                first = dilations[stage] if index == 0 else dilations[stage + 1]
                pair = (first, dilations[stage + 1])
                if stage == 3 and multi_grid is not None:
                    pair = (dilations[4] * multi_grid[index],) * 2
                stride = strides[stage] if index == 0 else 1
                blocks.append(block(channels, width * 2**stage, stride, pair, **options))
                channels = width * 2**stage * block.expansion
            setattr(self, name, nn.Sequential(*blocks))
        self.num_features = channels
        self.avgpool = GlobalAveragePool() if pool is None else pool
        self.drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)
        self._insert(after or {}, block.expansion * width)

    def _insert(self, after: Mapping[str, Slot], channels: int) -> None:
        blocks = {
            f"{name}.{index}": (block, channels * 2**stage)
            for stage, name in enumerate(STAGES)
            for index, block in enumerate(getattr(self, name))
        }
        for place, make in after.items():
            if place not in blocks:
                raise ValueError(f"after={place!r}: expected one of {', '.join(blocks)}")
            block, block_channels = blocks[place]
            block.after = make(block_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images `(B, in_chans, H, W)` → the last map `(B, num_features, h, w)`."""
        return self.forward_stages(x)["layer4"]

    def forward_stages(self, x: Tensor) -> dict[str, Tensor]:
        """Images `(B, in_chans, H, W)` → the maps of "layer1" to "layer4", each `(B, C, h, w)`."""
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"x {tuple(x.shape)}: expected (B, {self.in_chans}, H, W)")
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        stages = {}
        for name in STAGES:
            x = stages[name] = getattr(self, name)(x)
        return stages

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map → logits `(B, num_classes)`, or what the classifier reads."""
        x = self.drop(self.avgpool(x))
        return x if pre_logits else self.fc(x)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        """A new classifier; for 0 classes the pooled features `(B, num_features)` come out."""
        self.num_classes = num_classes
        like = next(self.parameters())
        self.fc = (
            nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            if num_classes
            else nn.Identity()
        )


def _stem(
    stem: str, in_chans: int, width: int, act_layer: Callable[[], nn.Module], norm_layer: Slot
) -> tuple[nn.Module, int, nn.Module]:
    """The first convolution(s), their channels, and the pooling after their normalisation."""
    pool = nn.MaxPool2d(3, stride=2, padding=1)
    if stem == "conv7":
        return conv(in_chans, width, 7, stride=2), width, pool
    if stem == "deep":
        first = [conv(in_chans, width, 3, stride=2), norm_layer(width), act_layer()]
        second = [conv(width, width, 3), norm_layer(width), act_layer()]
        return nn.Sequential(*first, *second, conv(width, 2 * width, 3)), 2 * width, pool
    if stem == "small":
        return conv(in_chans, width, 3, stride=2), width, nn.Identity()
    raise ValueError(f"stem={stem!r}: expected 'conv7', 'deep' or 'small'")


def _strides(stem_stride: int, output_stride: int | None) -> tuple[list[int], list[int]]:
    """The four stages' strides, and the dilations of the stem and the four stages."""
    possible = [stem_stride * 2**k for k in range(4)]
    if output_stride is None:
        output_stride = possible[-1]
    if output_stride not in possible:
        raise ValueError(f"output_stride={output_stride}: expected one of {possible}")
    strides, dilations, reached = [], [1], stem_stride
    for stride in (1, 2, 2, 2):
        kept = reached * stride <= output_stride
        strides.append(stride if kept else 1)
        dilations.append(dilations[-1] if kept else dilations[-1] * stride)
        reached *= strides[-1]
    return strides, dilations


def resnet18(**kwargs) -> ResNet:
    """ResNet-18: 11,689,512 parameters for 1,000 classes."""
    return ResNet(BasicBlock, (2, 2, 2, 2), **kwargs)


def resnet34(**kwargs) -> ResNet:
    """ResNet-34: 21,797,672 parameters for 1,000 classes."""
    return ResNet(BasicBlock, (3, 4, 6, 3), **kwargs)


def resnet50(**kwargs) -> ResNet:
    """ResNet-50 (stride on the 3×3): 25,557,032 parameters for 1,000 classes."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **kwargs)


def resnet101(**kwargs) -> ResNet:
    """ResNet-101: 44,549,160 parameters for 1,000 classes."""
    return ResNet(Bottleneck, (3, 4, 23, 3), **kwargs)


def resnext50_32x4d(**kwargs) -> ResNet:
    """ResNeXt-50 32×4d: 25,028,904 parameters for 1,000 classes."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **{"groups": 32, "base_width": 4, **kwargs})


def resnet_mini(num_classes: int = 8, **kwargs) -> ResNet:
    """For the bundled 64-pixel images: one BasicBlock a stage, 16 to 128 channels, last map 4×4."""
    return ResNet(
        BasicBlock,
        (1, 1, 1, 1),
        **{"num_classes": num_classes, "width": 16, "stem": "small", **kwargs},
    )
