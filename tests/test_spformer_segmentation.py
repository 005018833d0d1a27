"""Segmentation by superpixels is fed with the published sets' layouts."""

import numpy as np
import pytest
import torch
from test_lab_adapters import RED, lay_voc, save_image, save_mask, save_text

from attnlab.heads import segmentation_loss
from attnlab.lab import data, train
from attnlab.lab.data import adapters
from attnlab.lab.metrics import confusion_matrix, mean_iou
from attnlab.spformer import SuperpixelSegmenter, lineage, spformer_mini

TINY = {"embed_dim": 32, "num_heads": 2, "pixel_dim": 16, "depths": (1, 1), "sca_init_values": 0.1}


def loss(model, batch):
    return segmentation_loss(model(batch["image"]), batch["segmentation"])


def lay_context(root):
    from scipy.io import savemat

    save_text(root / "labels.txt", "1: accordion\n2: aeroplane\n284: table\n")
    save_text(root / "59_labels.txt", "1: aeroplane\n2: diningtable\n")
    home = root / "VOCdevkit/VOC2010"
    save_text(home / "ImageSets/Main/train.txt", "2008_000002\n")
    save_image(home / "JPEGImages/2008_000002.jpg", RED, (5, 4))
    (root / "trainval").mkdir()
    labels = np.array([[2, 284, 1, 0, 2]] * 4, dtype=np.uint16)
    savemat(root / "trainval/2008_000002.mat", {"LabelMap": labels})


def lay_ade(root):
    home = root / "ADEChallengeData2016"
    save_image(home / "images/training/ADE_train_00000001.jpg", RED, (4, 4))
    save_mask(home / "annotations/training/ADE_train_00000001.png", [[0, 1, 2, 2]] * 4)
    rows = "1\t0.2\t2\t1\t1\twall\n2\t0.1\t2\t1\t1\tbuilding, edifice\n"
    save_text(home / "objectInfo150.txt", f"Idx\tRatio\tTrain\tVal\tStuff\tName\n{rows}")


@pytest.mark.parametrize(("name", "lay"), [
    ("voc2012", lay_voc), ("pascal_context", lay_context), ("ade20k", lay_ade),
])  # fmt: skip
def test_a_step_on_each_published_layout(name, lay, tmp_path):
    lay(tmp_path)
    ds = adapters.load(name, "train", tmp_path, size=(32, 48))
    model = SuperpixelSegmenter(spformer_mini(img_size=(32, 48), **TINY), ds.num_classes)
    before = [p.detach().clone() for p in model.parameters()]
    train.fit(model, ds, loss=loss, steps=1, batch_size=1, progress=False, device="cpu")
    changed = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert sum(changed) > len(changed) / 2
    batch = ds.batch([0])
    assert (batch["segmentation"] == 255).any(), "and the ignored are ignored"
    with torch.no_grad():
        found = model(batch["image"]).argmax(1)
    assert found.shape == (1, 32, 48)
    assert 0 <= mean_iou(confusion_matrix(found, batch["segmentation"], ds.num_classes)) <= 1


@pytest.mark.parametrize("options", [{}, lineage()], ids=["paper", "lineage"])
def test_it_learns_the_things_of_the_scenes(options):
    """After 60 steps it knows more than any constant answer."""
    scenes = data.load("scenes", "train", n=8, objects=2, scale=(0.6, 0.9), size=32, cache=False)
    batch = scenes.batch(range(8))
    truth = batch["segmentation"] = (batch["saliency"] >= 0.5).long()
    train.seed_everything(0)
    model = SuperpixelSegmenter(spformer_mini(img_size=32, **TINY | options), 2)
    train.fit(model, batch, loss=loss, steps=60, batch_size=8, lr=4e-3, progress=False,
              device="cpu")  # fmt: skip
    with torch.no_grad():
        found = model(batch["image"]).argmax(1)
    constant = max(
        mean_iou(confusion_matrix(torch.full_like(truth, answer), truth, 2)) for answer in (0, 1)
    )
    assert mean_iou(confusion_matrix(found, truth, 2)) > constant + 0.1
