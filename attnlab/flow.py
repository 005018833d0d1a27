"""Optical flow: how features are fetched along it, and two networks that predict it (chapter 07).

Papers: Dosovitskiy et al. 2015, "FlowNet"; Zhu et al. 2017, "Deep Feature Flow for Video
Recognition". A flow `(B, 2, H, W)`, channel 0 = dx (to the right) and channel 1 = dy (down), in
cells of the map that is warped, says where to *fetch*: the content at p of frame i is found at
p + M(p) in frame k. The current frame i comes first everywhere, the key frame k second.

What differs from the papers: the networks predict flow for a map of any size, in its cells.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.layers import check_map

PADDINGS = {"border": "replicate", "zeros": "constant"}  # grid_sample's word: that of F.pad


def warp(
    features: Tensor, flow: Tensor, padding: str = "border", return_mask: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """features(p + flow(p)), bilinear between cells (Deep Feature Flow, Eqs. 2 and 3).

    Zero flow gives `features` to the last bit at every size: the map is enlarged at the right and
    at the bottom to a power of two, where `F.grid_sample` computes whole positions without
    rounding. Its coordinates are at least float32, also under autocast.

    Args:
        features: `(B, C, H, W)`.
        flow: `(B, 2, H, W)`, (dx, dy) in cells. Its gradient is 0 far outside the map.
        padding: outside the map there is its "border", repeated, or "zeros".
        return_mask: also return where p + flow(p) is inside the map.

    Returns:
        `(B, C, H, W)` in the dtype of `features`; with `return_mask`, also `(B, H, W)` bool.

    Raises:
        ValueError: another `padding`, or shapes that do not fit.
    """
    check_flow(flow, features)
    if padding not in PADDINGS:
        raise ValueError(f"padding={padding!r}: expected {' or '.join(PADDINGS)}")
    height, width = features.shape[2:]
    dtype = torch.promote_types(features.dtype, torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        x, y = fetched_positions(flow.to(dtype))
        rows, columns = (1 << (length - 1).bit_length() for length in (height, width))
        margin = (0, columns - width, 0, rows - height)
        enlarged = F.pad(features.to(dtype), margin, PADDINGS[padding])
        grid = torch.stack([(2 * x + 1) / columns - 1, (2 * y + 1) / rows - 1], dim=-1)
        out = F.grid_sample(enlarged, grid, padding_mode=padding, align_corners=False)
    out = out.to(features.dtype)
    return (out, inside_map(x, y)) if return_mask else out


def fetched_positions(flow: Tensor) -> tuple[Tensor, Tensor]:
    """p + flow(p) for `(B, 2, H, W)`: the columns x and the rows y, `(B, H, W)` each."""
    height, width = flow.shape[2:]
    x = flow[:, 0] + torch.arange(width, device=flow.device)
    return x, flow[:, 1] + torch.arange(height, device=flow.device)[:, None]


def inside_map(x: Tensor, y: Tensor) -> Tensor:
    """Which positions `(B, H, W)` are on a map of this size: bool."""
    height, width = x.shape[1:]
    return (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)


def compose_flows(flow_ij: Tensor, flow_jk: Tensor) -> Tensor:
    """The flow from i to k through j: M_ij + W(M_jk, M_ij); all `(B, 2, H, W)`."""
    return flow_ij + warp(flow_jk, flow_ij)


def visibility(flow: Tensor, backward: Tensor, threshold: float = 0.5) -> Tensor:
    """Where what is seen in frame i is seen in frame k too: the way there and back ends at p.

    Args:
        flow: `(B, 2, H, W)`, from i to k.
        backward: `(B, 2, H, W)`, from k to i.
        threshold: how far from p the way may end, in cells.

    Returns:
        `(B, H, W)` bool; False where |M_ik + W(M_ki, M_ik)| > threshold or p + M_ik is outside.
    """
    back, inside = warp(backward, flow, return_mask=True)
    return inside & ((flow + back).norm(dim=1) <= threshold)


def resize_flow(flow: Tensor, size: tuple[int, int], mode: str = "center") -> Tensor:
    """The same motion on a map of another size: values shrink with the map, per axis.

    Args:
        flow: `(B, 2, H, W)`.
        size: (rows, columns) of the new map. Except for "bilinear", H and W are multiples of them.
        mode: "center" takes the flow at the center of each cell, and never mixes two motions;
            "area" averages the cell; "bilinear" is `F.interpolate`.

    Returns:
        `(B, 2, *size)`, in cells of the new map.

    Raises:
        ValueError: another `mode`, sizes that do not divide, or no such flow.
    """
    check_map(flow, 2, "flow")
    if mode not in ("center", "area", "bilinear"):
        raise ValueError(f"mode={mode!r}: expected center, area or bilinear")
    (height, width), (rows, columns) = flow.shape[2:], size
    if mode != "bilinear" and (height % rows or width % columns):
        raise ValueError(f"size={tuple(size)}: expected divisors of {height} and {width}")
    if mode == "center":
        down, across = height // rows, width // columns
        resized = flow[:, :, down // 2 :: down, across // 2 :: across]
    elif mode == "area":
        resized = F.interpolate(flow, size, mode="area")
    else:
        resized = F.interpolate(flow, size, mode="bilinear", align_corners=False)
    return resized * cells_per_pixel(flow.shape[2:], size, flow)


def cells_per_pixel(image: tuple[int, int], size: tuple[int, int], like: Tensor) -> Tensor:
    """What turns flow in pixels of an `image` into cells of a map of `size`: `(2, 1, 1)`."""
    (height, width), (rows, columns) = image, size
    return like.new_tensor([columns / width, rows / height])[:, None, None]


def check_flow(flow: Tensor, features: Tensor) -> None:
    """`ValueError` unless `flow` is `(B, 2, H, W)` for the map `features (B, C, H, W)`."""
    check_map(features, name="features")
    expected = (len(features), 2, *features.shape[2:])
    if tuple(flow.shape) != expected or not features.is_floating_point():
        raise ValueError(
            f"flow {tuple(flow.shape)}, features {tuple(features.shape)} {features.dtype}: expected"
            f" flow {expected}, and features of a floating dtype"
        )


class _FlowNetwork(nn.Module):
    """A pair of frames → features at the size of a map → the flow from frame to key in its cells.

    Attributes:
        num_features: channels of what the flow, and other fields beside it, are predicted from.
        stride: pixels per cell of the map, where no `size` is given.
        pixels: of motion in the image per unit that `predict` puts out.
        predict: a convolution `num_features` → 2.
    """

    def __init__(self, in_chans: int, stride: int, pixels: float):
        super().__init__()
        if stride < 1:
            raise ValueError(f"stride={stride}: expected at least 1")
        self.in_chans, self.stride, self.pixels = in_chans, stride, pixels

    def forward(self, frame: Tensor, key: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """The flow that fetches `frame` from `key`, both `(B, in_chans, H, W)` → `(B, 2, *size)`.

        `size` is that of the map to warp: the image's divided by `stride`, rounded up, by default.
        Raises `ValueError` when the frames are no such images of one size.
        """
        return self.flow(self.forward_features(frame, key, size), frame.shape[2:])

    def forward_features(
        self, frame: Tensor, key: Tensor, size: tuple[int, int] | None = None
    ) -> Tensor:
        """What the flow is predicted from: `(B, num_features, *size)`."""
        if frame.ndim != 4 or frame.shape[1] != self.in_chans or key.shape != frame.shape:
            raise ValueError(
                f"frame {tuple(frame.shape)}, key {tuple(key.shape)}: expected two images "
                f"(B, {self.in_chans}, H, W) of one size"
            )
        if size is None:
            size = tuple(-(-length // self.stride) for length in frame.shape[2:])
        half = F.avg_pool2d(torch.cat([frame, key], dim=1), 2, ceil_mode=True)
        features = self.finest_features(half)
        if features.shape[2:] == tuple(size):
            return features
        if features.shape[2] >= size[0] and features.shape[3] >= size[1]:
            return F.adaptive_avg_pool2d(features, size)
        return F.interpolate(features, size, mode="bilinear", align_corners=False)

    def flow(self, features: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Features `(B, num_features, h, w)` of images of `image_size` → flow `(B, 2, h, w)`."""
        scale = cells_per_pixel(image_size, features.shape[2:], features)
        return self.predict(features) * (self.pixels * scale)


class FlowNet(_FlowNetwork):
    """A small network for small clips; the flow is zero at first.

    Sees the frames at half their size. Three convolutions of stride 2 down to a sixteenth of the
    image, two steps up to a quarter.

    Args:
        in_chans: of a frame.
        width: of the first convolution; later ones have 2·, 4· and 6·width channels.
        stride: pixels per cell of the map to warp, where none is given.
    """

    def __init__(self, in_chans: int = 3, width: int = 16, stride: int = 4):
        super().__init__(in_chans, stride, pixels=8.0)
        self.down4 = _conv(2 * in_chans, width, 5, stride=2)
        self.down8 = _conv(width, 2 * width, stride=2)
        self.down16 = nn.Sequential(
            _conv(2 * width, 6 * width, stride=2), _conv(6 * width, 6 * width)
        )
        self.up8 = _conv(8 * width, 4 * width)
        self.up4 = _conv(5 * width, 2 * width)
        self.num_features = 2 * width
        self.predict = nn.Conv2d(2 * width, 2, 3, padding=1)
        nn.init.zeros_(self.predict.weight)
        nn.init.zeros_(self.predict.bias)

    def finest_features(self, pair: Tensor) -> Tensor:
        """Frames at half size `(B, 2·in_chans, H/2, W/2)` → `(B, num_features, H/4, W/4)`."""
        at4 = self.down4(pair)
        at8 = self.down8(at4)
        at16 = self.down16(at8)
        at8 = self.up8(torch.cat([_up(at16, at8), at8], dim=1))
        return self.up4(torch.cat([_up(at8, at4), at4], dim=1))


class FlowNetS(_FlowNetwork):
    """FlowNet-S (Dosovitskiy et al., Fig. 2), as Deep Feature Flow uses it: 38,675,536 parameters.

    Sees the frames at half their size; the features of the finest step, an eighth of the image, are
    averaged down to the map. A unit is 20 px of the half-size frames, 40 px of the image. Names and
    shapes are those of the common PyTorch version (biases in the encoder only).

    Args:
        in_chans: of a frame.
        stride: pixels per cell of the map to warp, where none is given.
    """

    num_features = 194

    def __init__(self, in_chans: int = 3, stride: int = 16):
        super().__init__(in_chans, stride, pixels=40.0)
        self.conv1 = _conv(2 * in_chans, 64, 7, stride=2)
        self.conv2 = _conv(64, 128, 5, stride=2)
        self.conv3 = _conv(128, 256, 5, stride=2)
        self.conv3_1 = _conv(256, 256)
        self.conv4 = _conv(256, 512, stride=2)
        self.conv4_1 = _conv(512, 512)
        self.conv5 = _conv(512, 512, stride=2)
        self.conv5_1 = _conv(512, 512)
        self.conv6 = _conv(512, 1024, stride=2)
        self.conv6_1 = _conv(1024, 1024)
        self.deconv5 = _deconv(1024, 512)
        self.deconv4 = _deconv(1026, 256)
        self.deconv3 = _deconv(770, 128)
        self.deconv2 = _deconv(386, 64)
        for level, channels in ((6, 1024), (5, 1026), (4, 770), (3, 386), (2, 194)):
            self.add_module(f"predict_flow{level}", _conv3x3(channels, 2))
        for level in (6, 5, 4, 3):
            upsample = nn.ConvTranspose2d(2, 2, 4, stride=2, padding=1, bias=False)
            self.add_module(f"upsampled_flow{level}_to_{level - 1}", upsample)

    @property
    def predict(self) -> nn.Module:
        return self.predict_flow2

    def finest_features(self, pair: Tensor) -> Tensor:
        """Frames at half size `(B, 2·in_chans, H/2, W/2)` → `(B, 194, H/8, W/8)`."""
        at2 = self.conv2(self.conv1(pair))
        at3 = self.conv3_1(self.conv3(at2))
        at4 = self.conv4_1(self.conv4(at3))
        at5 = self.conv5_1(self.conv5(at4))
        x = self.conv6_1(self.conv6(at5))
        for level, skip in ((5, at5), (4, at4), (3, at3), (2, at2)):
            flow = getattr(self, f"predict_flow{level + 1}")(x)
            flow = getattr(self, f"upsampled_flow{level + 1}_to_{level}")(flow)
            x = getattr(self, f"deconv{level}")(x)
            rows, columns = skip.shape[2:]
            x = torch.cat([skip, x[:, :, :rows, :columns], flow[:, :, :rows, :columns]], dim=1)
        return x


def _conv(in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1):
    """A convolution, He's initialisation, and the leaky ReLU of the FlowNets."""
    layer = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2)
    nn.init.kaiming_normal_(layer.weight, 0.1)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(layer, nn.LeakyReLU(0.1))


def _deconv(in_channels: int, out_channels: int) -> nn.Sequential:
    layer = nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1, bias=False)
    nn.init.kaiming_normal_(layer.weight, 0.1)
    return nn.Sequential(layer, nn.LeakyReLU(0.1))


def _conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)


def _up(x: Tensor, like: Tensor) -> Tensor:
    """`x` at the size of `like`, bilinear."""
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)
