"""Small networks for the bundled clips (chapter 07): a backbone, two heads, and the shipped model.

A head's `loss(outputs, frame)` takes what `video_tasks.frame_at` says about a frame.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.image_list import ImageList

from attnlab.context import conv_norm_act
from attnlab.lab.arguments import require, whole
from attnlab.lab.data.clips import OBJECTS
from attnlab.layers import check_map
from attnlab.video import AttentionWarp, Embedding, KeyFrameModel


def clip_backbone(width: int = 64, depth: int = 6) -> nn.Sequential:
    """Images `(B, 3, H, W)` → maps `(B, width, H/4, W/4)`: `shallow`, then `deep`.

    `shallow` is two 4×4 convolutions of stride 2, 48 channels, and cheap enough for every frame;
    `deep` is `depth` 3×3 convolutions. The center of cell j is at pixel 4 j + 1.5, as for a patch
    of 4 pixels, so bilinear upsampling by 4 puts a map back where it was.
    """
    whole(1, width=width, depth=depth)
    shallow = [_halve(3, 24), _halve(24, 48)]
    deep = [conv_norm_act(48 if n == 0 else width, width, 3) for n in range(depth)]
    parts = {"shallow": nn.Sequential(*shallow), "deep": nn.Sequential(*deep)}
    return nn.Sequential(OrderedDict(parts))


def _halve(in_channels: int, out_channels: int) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())


class SegmentationHead(nn.Module):
    """A 1×1 classifier and bilinear upsampling: `(B, C, h, w)` → logits `(B, classes, s·h, s·w)`.

    Class 0 is the background, class n + 1 is `OBJECTS[n]`.
    """

    def __init__(self, in_channels: int, num_classes: int = len(OBJECTS) + 1, stride: int = 4):
        super().__init__()
        self.stride = stride
        self.classify = nn.Conv2d(in_channels, num_classes, 1)

    def forward(self, features: Tensor) -> Tensor:
        logits = self.classify(features)
        return F.interpolate(logits, scale_factor=self.stride, mode="bilinear", align_corners=False)

    def loss(self, outputs: Tensor, frame: Mapping[str, Any]) -> Tensor:
        """Mean cross entropy with the `classes` of a frame (`frame_at`)."""
        return F.cross_entropy(outputs, frame["classes"])


class DetectionHead(nn.Module):
    """torchvision's FCOS on one map: its head, anchor generator, losses and post-processing.

    Features `(B, in_channels, h, w)` of images of s·h × s·w px. In eval mode → one dict an image,
    `boxes (N, 4)` in px, `scores (N,)`, `labels (N,)` (an index into `OBJECTS`), best first. In
    training → what `loss` needs. FCOS: Tian et al. 2019.

    Args:
        in_channels: a multiple of 32, the groups of its GroupNorm.
        stride: s, px per cell; the side of the anchors too.
        num_convs: 3×3 convolutions in each of the two branches; 4 in the paper.
        score_thresh, nms_thresh, detections: of the post-processing: least score, IoU from which a
            weaker box of the class is dropped, most boxes an image.

    Raises:
        ValueError: `in_channels` is no such multiple.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int = len(OBJECTS),
        stride: int = 4,
        num_convs: int = 2,
        score_thresh: float = 0.05,
        nms_thresh: float = 0.6,
        detections: int = 20,
    ):
        super().__init__()
        require(in_channels % 32 == 0, "in_channels", in_channels, "a multiple of 32")
        self.stride = stride
        no_backbone = nn.Identity()
        no_backbone.out_channels = in_channels
        self.fcos = FCOS(
            no_backbone,
            num_classes,
            anchor_generator=AnchorGenerator(sizes=((stride,),), aspect_ratios=((1.0,),)),
            head=FCOSHead(in_channels, 1, num_classes, num_convs),
            score_thresh=score_thresh,
            nms_thresh=nms_thresh,
            detections_per_img=detections,
        )

    def forward(self, features: Tensor) -> dict[str, Any] | list[dict[str, Tensor]]:
        check_map(features, name="features")
        outputs = self.fcos.head([features])
        size = tuple(self.stride * length for length in features.shape[2:])
        images = ImageList(features.new_empty(0, 3, *size), [size] * len(features))
        anchors = self.fcos.anchor_generator(images, [features])
        if self.training:
            return {**outputs, "anchors": anchors}
        levels = {name: [value] for name, value in outputs.items()}
        return self.fcos.postprocess_detections(levels, [[a] for a in anchors], images.image_sizes)

    def loss(self, outputs: Mapping[str, Any], frame: Mapping[str, Any]) -> Tensor:
        """Focal loss, generalized IoU and centerness, summed, for the `objects` of a frame."""
        anchors = outputs["anchors"]
        losses = self.fcos.compute_loss(frame["objects"], outputs, anchors, [len(anchors[0])])
        return sum(losses.values())


class ClipSegmenter(KeyFrameModel):
    """What `attnlab video` runs by default: local attention carries a segmenter's features.

    `clip_backbone`, `SegmentationHead`, and an attention in windows of (2·radius + 1)² cells
    between `dim` channels made of the backbone's shallow features. `model(frame)` alone → the
    answer of the backbone and the head.

    Args:
        width, depth: of the backbone.
        radius: reach of the attention, in cells of 4 px.
        interval: a key frame every so many frames.
    """

    def __init__(
        self, width: int = 64, depth: int = 5, dim: int = 32, radius: int = 4, interval: int = 5
    ):
        backbone = clip_backbone(width, depth)
        embed = Embedding(backbone.shallow, 48, dim)
        head = SegmentationHead(width)
        super().__init__(backbone, head, AttentionWarp(radius), embed=embed, interval=interval)

    def forward(self, frame: Tensor, key: Tensor | None = None) -> Tensor:
        return super().forward(frame, frame if key is None else key)
