"""Boxes and masks of objects: torchvision's Mask R-CNN on a trunk of one resolution.

K. He et al., *Mask R-CNN*, ICCV 2017. The trunk is any `attnlab.feature_maps.MapBackbone`, and so
the detector measures what a block in it is worth (X. Wang et al., *Non-local neural networks*, CVPR
2018, Sec. 6). Samples have `labels`, `boxes` and `instances`: the bundled scenes, COCO, VOC.

    model = mask_rcnn_mini(MapBackbone(patchconvnet_mini(num_classes=0)), scenes.num_classes)
    train.fit(model, scenes, loss=loss, steps=1_000, batch_size=16)
    average_precision(model, test)
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from attnlab.lab import batches
from attnlab.lab.arguments import require, whole
from attnlab.lab.detection import COCO_THRESHOLDS, mean_average_precision


def mask_rcnn(
    backbone: nn.Module,
    num_classes: int,
    *,
    anchor_sizes: Sequence[int] = (32, 64, 128, 256, 512),
    hidden: int = 1024,
    mask_channels: Sequence[int] = (256, 256, 256, 256),
    roi_sizes: tuple[int, int] = (7, 14),
    **options: Any,
) -> MaskRCNN:
    """torchvision's `MaskRCNN` on one map; the defaults are torchvision's.

    Args:
        backbone: images → {"0": map `(B, out_channels, h, w)`}, with `out_channels`.
        num_classes: of things; the background is not among them.
        anchor_sizes: sides of the anchors in px, each at the ratios 1:2, 1:1 and 2:1.
        hidden: width of the box head.
        mask_channels: width of each of the mask head's 3×3 convolutions.
        roi_sizes: places along a side of what the box head sees of a region, and the mask head,
            whose masks have twice as many.
        options: torchvision's, for example `min_size=800`, the shorter side in px to which images
            are resized.
    """
    whole(1, num_classes=num_classes, hidden=hidden)
    name, fits = type(backbone).__name__, hasattr(backbone, "out_channels")
    require(fits, "backbone", name, "a MapBackbone, or another module with out_channels")
    require(len(anchor_sizes) > 0, "anchor_sizes", anchor_sizes, "one or more sizes in px")
    channels, (box_size, mask_size) = backbone.out_channels, roi_sizes
    predictor = MaskRCNNPredictor(mask_channels[-1], mask_channels[-1], num_classes + 1)
    return MaskRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator((tuple(anchor_sizes),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], box_size, 2),
        box_head=TwoMLPHead(channels * box_size**2, hidden),
        box_predictor=FastRCNNPredictor(hidden, num_classes + 1),
        mask_roi_pool=MultiScaleRoIAlign(["0"], mask_size, 2),
        mask_head=MaskRCNNHeads(channels, mask_channels, 1),
        mask_predictor=predictor,
        **options,
    )


def mask_rcnn_mini(backbone: nn.Module, num_classes: int, **options: Any) -> MaskRCNN:
    """For the bundled images of 64 pixels: small heads, few regions, no resizing."""
    small = {
        "anchor_sizes": (16, 24, 36), "hidden": 128, "mask_channels": (32, 32),
        "roi_sizes": (5, 7), "min_size": 64, "max_size": 128,
        "rpn_batch_size_per_image": 64, "box_batch_size_per_image": 32,
        "rpn_post_nms_top_n_train": 100, "rpn_post_nms_top_n_test": 50,
        "box_detections_per_img": 20,
    }  # fmt: skip
    return mask_rcnn(backbone, num_classes, **small | options)


def objects(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """What a batch shows, one dict an image: `boxes (M, 4)`, `labels`, `iscrowd` and `masks`.

    `labels` and `iscrowd` are (M,), `masks (M, H, W)` bool. Padding and objects of which nothing is
    seen are left out; `iscrowd` is 1 where the batch has `crowd`, COCO's mark for many in one mask.
    """
    missing = sorted({"labels", "boxes", "instances"} - set(batch))
    require(not missing, "batch", sorted(batch), f"{missing} as well")
    boxes, labels = batch["boxes"], batch["labels"]
    crowd = batch.get("crowd", torch.zeros_like(labels))
    masks = batch["instances"] >= 0.5
    fields = {"boxes": boxes, "labels": labels, "iscrowd": crowd.long(), "masks": masks}
    there = (labels >= 0) & (boxes[..., 2:] > boxes[..., :2]).all(-1)
    return [{key: value[i][keep] for key, value in fields.items()} for i, keep in enumerate(there)]


def loss(model: MaskRCNN, batch: dict[str, Tensor]) -> Tensor:
    """The sum of Mask R-CNN's five losses on a batch, for `train.fit`; crowds are not learned."""
    targets = []
    for seen in objects(batch):
        single = {key: value[seen["iscrowd"] == 0] for key, value in seen.items()}
        background_is_0 = {"labels": single["labels"] + 1, "masks": single["masks"].byte()}
        targets.append({"boxes": single["boxes"], **background_is_0})
    return sum(model(list(batch["image"]), targets).values())


@torch.no_grad()
def detect(model: MaskRCNN, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """What the model finds in images `(3, H, W)`, in eval mode; the model's mode is restored.

    One dict an image: `boxes (N, 4)`, `scores (N,)` from high to low, `labels (N,)` that count the
    things from 0, `masks (N, H, W)` bool.
    """
    was_training = model.training
    found = model.eval()(list(images))
    model.train(was_training)
    return [
        {**one, "labels": one["labels"] - 1, "masks": one["masks"][:, 0] >= 0.5} for one in found
    ]


def average_precision(
    model: MaskRCNN,
    data: Any,
    batch_size: int = 32,
    device: torch.device | str | None = None,
    iou: float | Sequence[float] = COCO_THRESHOLDS,
) -> dict[str, float]:
    """Mean average precision of boxes and of masks on `data`: {"box AP": …, "mask AP": …}, 0 to 1.

    Where no `iou` is given, the mean over COCO's ten thresholds. `device`: default: the model's.
    """
    device = device or next(model.parameters()).device
    found, there = [], []
    for indices in torch.arange(batches.size(data)).split(batch_size):
        batch = batches.fetch(data, indices, device)
        found += detect(model, batch["image"])
        there += objects(batch)
    return {
        "box AP": mean_average_precision(found, there, iou, kind="bbox"),
        "mask AP": mean_average_precision(found, there, iou, kind="segm"),
    }
