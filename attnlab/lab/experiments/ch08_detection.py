"""Detection beside chapter 08: what one non-local block adds to Mask R-CNN.

Wang et al. (2018, Sec. 6) report a point of AP for one block in the backbone. The function trains
small detectors at one budget and returns `{row: {metric: value}}` for one seed; `attnlab results`
runs it over several seeds and writes `results/08_patchconvnet.detection.json`.
"""

from collections.abc import Callable

import torch
from torch import nn
from torchvision.models.detection import MaskRCNN

from attnlab.feature_maps import MapBackbone
from attnlab.lab import cost, data, train
from attnlab.lab.data import Samples
from attnlab.lab.mask_rcnn import average_precision, loss, mask_rcnn_mini
from attnlab.non_local import NonLocalBlock
from attnlab.resnet import resnet_mini

CHAPTER = "08_patchconvnet"


def scenes(split: str, n: int) -> Samples:
    """64-pixel scenes with two things each, larger than usual."""
    return data.load("scenes", split, n=n, objects=2, scale=(0.4, 0.7))


def detector(after: dict[str, Callable[[int], nn.Module]]) -> MaskRCNN:
    """Mask R-CNN on `resnet_mini` of half the width, at output stride 8: 8×8 positions."""
    trunk = resnet_mini(num_classes=0, width=8, output_stride=8, after=after)
    return mask_rcnn_mini(MapBackbone(trunk), 8)


# The paper's place is the last stage but one, where the map has 8×8 positions of 32 channels.
ROWS = {"ResNet": {}, "with a non-local block": {"layer3.0": NonLocalBlock}}


def detection(seed: int, device) -> dict:
    """Average precision on new scenes of known things, after 300 steps of 16 scenes."""
    learned, test = scenes("train", 4_096), scenes("test_scenes", 512)
    results = {}
    for row, after in ROWS.items():
        train.seed_everything(seed)
        model = detector(after).to(device)
        train.fit(
            model, learned, loss=loss, steps=300, batch_size=16, lr=3e-3, seed=seed, device=device,
            progress=False,
        )  # fmt: skip
        trunk = model.backbone.model
        results[row] = {
            **average_precision(model, test),
            "trunk, thousand parameters": cost.parameters(trunk) / 1e3,
            "trunk, million MACs": cost.macs(trunk, torch.zeros(1, 3, 64, 64, device=device)) / 1e6,
        }
    return results
