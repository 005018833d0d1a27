"""A class, or whether it is salient, for every pixel: PASCAL, ADE20K, Cityscapes, saliency sets."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from attnlab.lab.data.adapters.reading import (
    IGNORE,
    Files,
    Place,
    annotated,
    images_in,
    lines,
    mat,
    picture,
    plane,
    silhouette,
)
from attnlab.lab.data.samples import Batch

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip
# Three classes that the two name files of Pascal Context call differently.
CONTEXT_ALIASES = {"diningtable": "table", "bedcloth": "bedclothes", "clothes": "cloth"}


def voc2012(place: Place, split: str, task: str = "segmentation") -> Files:
    """PASCAL VOC 2012: `VOCdevkit/VOC2012/…`; train, val, trainval.

    Classes are background and the 20 objects, for `segmentation` and for `labels` (1 to 20) alike.
    Published corners count from 1 and include the last pixel: they become 0-based and exclusive.

    Args:
        task: "segmentation": the images with masks, and `segmentation`, `instances`, `saliency`;
            "detection": all images with boxes. Both give `labels`, `boxes` and `difficult (K,)`.
    """
    lists = {"segmentation": "Segmentation", "detection": "Main"}
    if task not in lists:
        raise ValueError(f"task: expected one of {tuple(lists)}, got {task!r}")
    place.split(split, ("train", "val", "trainval"))
    ids = lines(place.find(f"VOCdevkit/VOC2012/ImageSets/{lists[task]}/{split}.txt"))
    home = place.find("VOCdevkit/VOC2012/JPEGImages").parent
    return Files(place.name, split, VOC_CLASSES, ids, partial(_voc, home, task == "segmentation"))


def _voc(home: Path, masks: bool, image: str) -> Batch:
    objects = annotated(home / "Annotations" / f"{image}.xml")
    corners = torch.tensor([box for _, box in objects]).reshape(-1, 4)
    sample = {
        "image": picture(home / "JPEGImages" / f"{image}.jpg"),
        "labels": torch.tensor([VOC_CLASSES.index(item.findtext("name")) for item, _ in objects]),
        "boxes": corners - torch.tensor([1.0, 1.0, 0.0, 0.0]),
        "difficult": torch.tensor([item.findtext("difficult") == "1" for item, _ in objects]),
    }
    if masks:
        owner = plane(home / "SegmentationObject" / f"{image}.png")  # k at the k-th object, from 1
        numbers = torch.arange(1, len(objects) + 1)
        sample["segmentation"] = plane(home / "SegmentationClass" / f"{image}.png")
        sample["instances"] = owner == numbers[:, None, None]
        sample["saliency"] = (owner > 0) & (owner < IGNORE)
    return sample


def pascal_context(place: Place, split: str) -> Files:
    """Pascal Context with its 59 classes: `trainval/*.mat`, `labels.txt`, `59_labels.txt`.

    The images are those of VOC 2010, `VOCdevkit/VOC2010`, unpacked into the same folder, whose
    lists also give the split; train, val. Classes are in the order of `59_labels.txt` (toolboxes
    that sort them by name differ); the other 400 labels and unlabelled pixels are 255.
    """
    place.split(split, ("train", "val"))
    annotations = place.find("trainval")
    names = _numbered(place.find("labels.txt"))
    wanted = _numbered(place.find("59_labels.txt"))
    classes = tuple(CONTEXT_ALIASES.get(name, name) for _, name in sorted(wanted.items()))
    table = torch.full((max(names) + 1,), IGNORE)
    for number, name in names.items():
        if name in classes:
            table[number] = classes.index(name)
    ids = lines(place.find(f"VOCdevkit/VOC2010/ImageSets/Main/{split}.txt"))
    images = place.find("VOCdevkit/VOC2010/JPEGImages")
    ids = [image for image in ids if (annotations / f"{image}.mat").exists()]
    return Files(place.name, split, classes, ids, partial(_context, images, annotations, table))


def _numbered(path: Path) -> dict[int, str]:
    """The lines `12: name` of a file of labels."""
    pairs = (line.split(":", 1) for line in lines(path))
    return {int(number): name.strip() for number, name in pairs}


def _context(images: Path, annotations: Path, table: Tensor, image: str) -> Batch:
    labels = torch.as_tensor(mat(annotations / f"{image}.mat")["LabelMap"].astype(int))
    return {"image": picture(images / f"{image}.jpg"), "segmentation": table[labels]}


def ade20k(place: Place, split: str) -> Files:
    """ADE20K scene parsing, 150 classes: `ADEChallengeData2016/…`; train, val.

    Published masks have 0 for everything else and classes from 1: here 255, and classes from 0.
    """
    folder = {"train": "training", "val": "validation"}[place.split(split, ("train", "val"))]
    images = place.find(f"ADEChallengeData2016/images/{folder}")
    masks = place.find(f"ADEChallengeData2016/annotations/{folder}")
    rows = lines(place.find("ADEChallengeData2016/objectInfo150.txt"))[1:]
    classes = tuple(row.split(maxsplit=5)[-1].split(",")[0].strip() for row in rows)
    table = (torch.arange(256) - 1) % 256
    records = [(image, masks / f"{image.stem}.png") for image in images_in(images)]
    return Files(place.name, split, classes, records, partial(_mapped, table))


def cityscapes(place: Place, split: str) -> Files:
    """Cityscapes, fine annotations: `leftImg8bit/…` and `gtFine/…`; train, val, test.

    `segmentation` has the 19 train ids, made of the published label ids; the others are 255.
    """
    from torchvision.datasets import Cityscapes

    place.split(split, ("train", "val", "test"))
    place.find(f"leftImg8bit/{split}")
    place.find(f"gtFine/{split}")
    published = Cityscapes(place.root, split, mode="fine", target_type="semantic")
    table = torch.full((256,), IGNORE)
    classes = {}
    for row in published.classes:
        if row.train_id not in (-1, IGNORE):
            table[row.id] = row.train_id
            classes[row.train_id] = row.name
    names = tuple(classes[number] for number in sorted(classes))
    masks = (target for (target,) in published.targets)
    records = sorted(zip(published.images, masks, strict=True))
    return Files(place.name, split, names, records, partial(_mapped, table))


def _mapped(table: Tensor, record: tuple[Path, Path]) -> Batch:
    image, mask = record
    return {"image": picture(image), "segmentation": table[plane(mask).long()]}


def ecssd(place: Place, split: str) -> Files:
    """ECSSD, a test set only: `images/*.jpg` and `ground_truth_mask/*.png`."""
    place.split(split, ("test",))
    return _salient(place, split, "images", "ground_truth_mask")


def duts(place: Place, split: str) -> Files:
    """DUTS: `DUTS-TR/DUTS-TR-Image`, `DUTS-TR/DUTS-TR-Mask`, and `DUTS-TE` alike; train, test."""
    part = {"train": "DUTS-TR", "test": "DUTS-TE"}[place.split(split, ("train", "test"))]
    return _salient(place, split, f"{part}/{part}-Image", f"{part}/{part}-Mask")


def dut_omron(place: Place, split: str) -> Files:
    """DUT-OMRON, a test set only: `DUT-OMRON-image/*.jpg` and `pixelwiseGT-new-PNG/*.png`."""
    place.split(split, ("test",))
    return _salient(place, split, "DUT-OMRON-image", "pixelwiseGT-new-PNG")


def _salient(place: Place, split: str, images: str, masks: str) -> Files:
    folder = place.find(masks)
    records = [(image, folder / f"{image.stem}.png") for image in images_in(place.find(images))]
    return Files(place.name, split, ("background", "salient"), records, _masked)


def _masked(record: tuple[Path, Path]) -> Batch:
    image, mask = record
    return {"image": picture(image), "saliency": silhouette(mask)}
