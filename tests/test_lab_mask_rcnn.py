"""Mask R-CNN on a trunk of one resolution: its targets, its answers, scenes, COCO's layout."""

import json

import battery
import pytest
import torch
from test_lab_adapters import RED, save_image, save_text
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from attnlab.dependencyvit import dependencyvit_mini
from attnlab.feature_maps import MapBackbone
from attnlab.lab import data, train
from attnlab.lab.data import adapters
from attnlab.lab.mask_rcnn import (
    average_precision,
    detect,
    loss,
    mask_rcnn,
    mask_rcnn_mini,
    objects,
)
from attnlab.patchconvnet import patchconvnet_mini
from attnlab.resnet import resnet_mini

TRUNKS = {
    "ResNet": lambda: resnet_mini(num_classes=0, output_stride=8, width=8),
    "PatchConvNet": lambda: patchconvnet_mini(num_classes=0, embed_dim=16, depth=1),
    "DependencyViT": lambda: dependencyvit_mini(
        patch_size=8, num_classes=0, embed_dim=24, depth=2, num_heads=2
    ),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def scenes(split="train", n=16):
    return data.load("scenes", split, n=n, objects=(1, 2), scale=(0.4, 0.7))


def detector(trunk="ResNet", **options):
    train.seed_everything(0)
    return mask_rcnn_mini(MapBackbone(TRUNKS[trunk]()), 8, **options)


def test_the_defaults_are_torchvisions():
    with torch.device("meta"):
        backbone = MapBackbone(TRUNKS["ResNet"]())
        ours = mask_rcnn(backbone, 80)
        theirs = MaskRCNN(
            backbone, 81,
            rpn_anchor_generator=AnchorGenerator(((32, 64, 128, 256, 512),), ((0.5, 1.0, 2.0),)),
            box_roi_pool=MultiScaleRoIAlign(["0"], 7, 2),
            mask_roi_pool=MultiScaleRoIAlign(["0"], 14, 2),
        )  # fmt: skip
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert ours.transform.min_size == theirs.transform.min_size == (800,)


def test_objects_are_what_is_seen():
    instances = torch.zeros(2, 3, 4, 4)
    instances[0, 0, :2, :3] = 0.5
    instances[0, 1, 3, 3] = 0.49  # too thin a matte for a pixel of its own
    instances[1, 0, 1:, 1:] = 1.0
    boxes = torch.tensor([[[0, 0, 3, 2.0], [0, 0, 0, 0], [0, 0, 0, 0]], [[1, 1, 4, 4.0]] * 3])
    labels = torch.tensor([[5, 2, -1], [0, -1, -1]])
    batch = {"instances": instances, "boxes": boxes, "labels": labels}
    first, second = objects(batch)
    assert first["labels"].tolist() == [5]
    assert first["boxes"].tolist() == [[0, 0, 3, 2]]
    assert first["masks"].sum() == 6
    assert first["iscrowd"].tolist() == [0]
    assert second["labels"].tolist() == [0]
    assert second["masks"].dtype == torch.bool
    crowd = torch.tensor([[True, False, False], [False, False, False]])
    assert [one["iscrowd"].tolist() for one in objects(batch | {"crowd": crowd})] == [[1], [0]]


def test_the_loss_is_torchvisions_of_things_that_count_from_one():
    model, batch = detector().train(), scenes().batch(slice(2))
    targets = [
        {"boxes": one["boxes"], "labels": one["labels"] + 1, "masks": one["masks"].byte()}
        for one in objects(batch)
    ]
    torch.manual_seed(1)  # of which regions are looked at
    expected = model(list(batch["image"]), targets)
    torch.manual_seed(1)
    torch.testing.assert_close(loss(model, batch), sum(expected.values()))
    assert len(expected) == 5
    crowded = batch | {"crowd": torch.zeros_like(batch["labels"], dtype=torch.bool)}
    crowded["crowd"][0] = True
    torch.manual_seed(1)
    assert loss(model, crowded) != sum(expected.values()), "the first image has nothing to learn"


@pytest.mark.parametrize("trunk", TRUNKS)
def test_every_trunk_learns(trunk, device):
    model = detector(trunk).to(device)
    value = loss(model.train(), {k: v.to(device) for k, v in scenes().batch(slice(4)).items()})
    value.backward()
    first = next(model.backbone.model.parameters())
    assert first.grad.abs().max() > 0
    found = detect(model, scenes().batch(slice(2))["image"].to(device))
    assert model.training
    for one in found:
        n = len(one["scores"])
        assert one["boxes"].shape == (n, 4)
        assert one["masks"].shape == (n, 64, 64)
        assert one["masks"].dtype == torch.bool
        assert ((one["labels"] >= 0) & (one["labels"] < 8)).all()
        assert (one["scores"].diff() <= 0).all()


class Knows(nn.Module):
    """Answers with what is there, in torchvision's form; beside it with the wrong class."""

    def __init__(self, samples, right: float = 0.9):
        super().__init__()
        self.seen = iter(objects(samples.batch(slice(len(samples)))))
        self.right = nn.Parameter(torch.tensor(right))

    def forward(self, images):
        answers = []
        for _ in images:
            one = next(self.seen)
            boxes, masks = (torch.cat([one[key], one[key]]) for key in ("boxes", "masks"))
            labels = torch.cat([one["labels"] + 1, (one["labels"] + 1) % 8 + 1])
            scores = torch.full((len(labels),), 0.5)
            scores[: len(one["labels"])] = self.right.detach()
            masks = masks[:, None].float()
            answers.append({"boxes": boxes, "labels": labels, "scores": scores, "masks": masks})
        return answers


def test_average_precision_of_what_is_right():
    samples = scenes("val", 12)
    assert average_precision(Knows(samples), samples, batch_size=5) == {"box AP": 1, "mask AP": 1}
    mistaken = average_precision(Knows(samples, right=0.1), samples)
    assert 0 < mistaken["box AP"] < 1, "a wrong class of higher score costs precision"


def test_a_few_steps_on_scenes_find_things():
    model = detector()
    history = train.fit(
        model, scenes(n=64), loss=loss, steps=25, batch_size=8, lr=4e-3, device="cpu",
        progress=False,
    )  # fmt: skip
    assert sum(history.loss[-5:]) < 0.8 * sum(history.loss[:5])
    scores = average_precision(model, scenes("val", 8), iou=0.5)
    assert all(0 <= score <= 1 for score in scores.values())


def lay_coco(root):
    names = ("000000000009.jpg", "000000000025.jpg")
    square = [4.0, 3.0, 20.0, 3.0, 20.0, 15.0, 4.0, 15.0]
    thing = {"category_id": 18, "bbox": [4.0, 3.0, 16.0, 12.0], "segmentation": [square]}
    crowd = {"size": [24, 32], "counts": [0, 24 * 8, 24 * 24]}
    many = {"category_id": 1, "bbox": [0.0, 0.0, 8.0, 24.0], "segmentation": crowd}
    content = {
        "images": [
            {"id": i, "file_name": name, "height": 24, "width": 32} for i, name in enumerate(names)
        ],
        "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 0, "iscrowd": 0, **thing},
            {"id": 2, "image_id": 0, "iscrowd": 1, **many},
        ],
    }
    for name in names:
        save_image(root / f"train2017/{name}", RED, (32, 24))
    save_text(root / "annotations/instances_train2017.json", json.dumps(content))


def test_cocos_layout_trains_and_is_scored(tmp_path):
    lay_coco(tmp_path)
    published = adapters.load("coco", "train", tmp_path, size=(48, 64))
    found = objects(published.batch([0, 1]))
    assert [one["labels"].tolist() for one in found] == [[1, 0], []]
    assert found[0]["iscrowd"].tolist() == [0, 1]
    assert found[0]["boxes"][0].tolist() == [8, 6, 40, 30]
    model = mask_rcnn_mini(MapBackbone(TRUNKS["ResNet"]()), published.num_classes)
    before = [p.detach().clone() for p in model.parameters()]
    train.fit(model, published, loss=loss, steps=2, batch_size=2, device="cpu", progress=False)
    changed = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert sum(changed) > 0.9 * len(changed)
    assert set(average_precision(model, published)) == {"box AP", "mask AP"}


def test_bad_input():
    backbone = MapBackbone(TRUNKS["ResNet"]())
    battery.check_errors([
        (lambda: mask_rcnn(nn.Identity(), 8), "backbone='Identity': expected a MapBackbone"),
        (lambda: mask_rcnn(backbone, 0), "num_classes=0: expected an integer ≥ 1"),
        (lambda: mask_rcnn(backbone, 8, anchor_sizes=()), "anchor_sizes=(): expected one or more"),
        (lambda: objects({"labels": 0}), "batch=['labels']: expected ['boxes', 'instances'] as"),
    ])  # fmt: skip
