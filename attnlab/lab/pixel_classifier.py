"""Any model that timm knows as a segmenter of the bundled data: `attnlab train MODEL --task masks`.

Every model gets the same head, one linear classifier for all places of its last map, so that what
differs is what the maps know. The data are scenes and parts, where things are told from the
background, and single frames of clips, where they are named.
"""

from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.lab import data
from attnlab.lab.data.clips import OBJECTS
from attnlab.lab.data.samples import Batch, Samples
from attnlab.lab.experiments import ch10
from attnlab.lab.video_tasks import answers_at, frame_at, load_clips, segmentation_scores


class PixelClassifier(nn.Module):
    """The last map of a model, its places classified: `(B, 3, H, W)` → `(B, num_classes, H, W)`.

    Args:
        backbone: has timm's `forward_intermediates`; its classifier is removed.
    """

    def __init__(self, backbone: nn.Module, num_classes: int):
        super().__init__()
        backbone.reset_classifier(0)
        self.backbone = backbone
        self.classify = nn.Conv2d(backbone.num_features, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.backbone.forward_intermediates(x, 1, norm=True, intermediates_only=True)
        return F.interpolate(self.classify(maps[-1]), x.shape[2:], mode="bilinear")


def pixel_classifier(model: str, num_classes: int = 2, **arguments: Any) -> PixelClassifier:
    """A `PixelClassifier` on `timm.create_model(model, **arguments)`."""
    return PixelClassifier(timm.create_model(model, **arguments), num_classes)


def samples(name: str, split: str, n: int | None = None, size: Any = 64) -> tuple[Samples, int]:
    """A split of bundled data, and how many classes its pixels have."""
    if name == "clips":
        return load_clips(split, n, size=size), len(OBJECTS) + 1
    return data.load(name, split, n, size), 2


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross entropy of all pixels; of clips, those of one frame, drawn for the whole batch."""
    if "owner" not in batch:
        return ch10.mask_loss(model, batch)
    frame = frame_at(batch, int(torch.randint(batch["owner"].shape[1], ())))
    return F.cross_entropy(model(frame["image"]), frame["classes"])


def mean_iou(model: nn.Module, test: Samples) -> float:
    """Mean IoU over the classes, background included; of clips, that of their last frames."""
    if test.name != "clips":
        return ch10.mean_iou(model, test, next(model.parameters()).device)
    answers = answers_at(Frames(model), test, 0)
    return segmentation_scores(answers)["all"]


class Frames(nn.Module):
    """A model of images as one of videos, which looks at the frame alone."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, frame: Tensor, key: Tensor) -> Tensor:
        return self.model(frame)
