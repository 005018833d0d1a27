"""Pascal-Part: the parts of VOC objects, as published and merged into 58 classes.

Chen et al., Detect What You Can (CVPR 2014) published the masks; Zhao et al., Multi-class Part
Parsing with Joint Boundary-Semantic Awareness (ICCV 2019) the merge, whose numbering is kept.
"""

from functools import partial
from pathlib import Path

import torch

from attnlab.lab.data.adapters.reading import (
    IGNORE,
    Files,
    Place,
    boxes_of,
    lines,
    mat,
    picture,
)
from attnlab.lab.data.adapters.segmentation import VOC_CLASSES
from attnlab.lab.data.samples import Batch

_FACE = "head leye reye lear rear"
_HOOFED_LEGS = "lfuleg lflleg rfuleg rflleg lbuleg lblleg rbuleg rblleg"
_PAWED_LEGS = "lfleg lfpa rfleg rfpa lbleg lbpa rbleg rbpa"
_SIDES = "frontside leftside rightside backside roofside leftmirror rightmirror"

# object → merged part → published parts without their counters (wheel_1, wheel_2: wheel). A merged
# part made of "" is what no published part covers; objects without parts are one such part.
MERGE = {
    "aeroplane": {
        "body": "body", "engine": "engine", "wing": "lwing rwing", "stern": "stern tail",
        "wheel": "wheel",
    },
    "bicycle": {"wheel": "fwheel bwheel chainwheel", "body": "saddle handlebar headlight"},
    "bird": {
        "head": "head leye reye beak", "wing": "lwing rwing", "leg": "lleg lfoot rleg rfoot",
        "torso": "torso neck tail",
    },
    "boat": {"boat": ""},
    "bottle": {"cap": "cap", "body": "body"},
    "bus": {
        "window": "window", "wheel": "wheel",
        "body": f"{_SIDES} fliplate bliplate door headlight",
    },
    "car": {
        "window": "window", "wheel": "wheel", "light": "headlight",
        "license plate": "fliplate bliplate", "body": f"{_SIDES} door",
    },
    "cat": {
        "head": f"{_FACE} nose", "leg": _PAWED_LEGS, "tail": "tail", "torso": "torso neck",
    },
    "chair": {"chair": ""},
    "cow": {
        "head": f"{_FACE} muzzle lhorn rhorn", "tail": "tail", "leg": _HOOFED_LEGS,
        "torso": "torso neck",
    },
    "diningtable": {"diningtable": ""},
    "dog": {
        "head": f"{_FACE} nose muzzle", "leg": _PAWED_LEGS, "tail": "tail", "torso": "torso neck",
    },
    "horse": {
        "head": f"{_FACE} muzzle", "tail": "tail", "leg": f"{_HOOFED_LEGS} lfho rfho lbho rbho",
        "torso": "torso neck",
    },
    "motorbike": {"wheel": "fwheel bwheel", "body": "handlebar saddle headlight"},
    "person": {
        "head": f"{_FACE} lebrow rebrow nose mouth hair neck", "torso": "torso",
        "lower arm": "llarm lhand rlarm rhand", "upper arm": "luarm ruarm",
        "lower leg": "llleg lfoot rlleg rfoot", "upper leg": "luleg ruleg",
    },
    "pottedplant": {"pot": "pot", "plant": "plant"},
    "sheep": {
        "head": f"{_FACE} muzzle lhorn rhorn", "leg": _HOOFED_LEGS, "torso": "torso neck tail",
    },
    "sofa": {"sofa": ""},
    "train": {
        "train": "head hfrontside hleftside hrightside hbackside hroofside headlight coach "
        "cfrontside cleftside crightside cbackside croofside",
    },
    "tvmonitor": {"screen": "screen", "frame": ""},
}  # fmt: skip


def numbering(merged: bool) -> tuple[tuple[str, ...], dict[tuple[str, str], int]]:
    """The names of the parts, background first, and (object, published part) → index among them."""
    names, numbers = ["background"], {}
    for name, parts in MERGE.items():
        for part, published in parts.items():
            for raw in published.split() or [""]:
                label = part if merged or not raw else raw
                title = name if label == name else f"{name} {label}"
                if title not in names:
                    names.append(title)
                numbers[name, raw] = names.index(title)
    return tuple(names), numbers


def pascal_part(place: Place, split: str, merged: bool = False) -> Files:
    """Pascal-Part: `Annotations_Part/*.mat`; train, val.

    The images and lists are those of VOC 2010, `VOCdevkit/VOC2010`, in the same folder. Samples
    have `labels (K,)`, `instances`, `boxes`, `segmentation` (VOC objects) and `parts (H, W)`, an
    index into `part_names`. What of an object no part covers is 255, but objects that have no
    parts (boat, chair, table, sofa) are one part, and the uncovered rest of a screen is its frame.

    Args:
        merged: merge the published parts into the 58 classes (57 parts and background) of
            Pascal-Part-58.
    """
    place.split(split, ("train", "val"))
    annotations = place.find("Annotations_Part")
    ids = lines(place.find(f"VOCdevkit/VOC2010/ImageSets/Main/{split}.txt"))
    images = place.find("VOCdevkit/VOC2010/JPEGImages")
    ids = [image for image in ids if (annotations / f"{image}.mat").exists()]
    names, numbers = numbering(merged)
    read = partial(_parted, images, annotations, numbers)
    return Files(place.name, split, VOC_CLASSES, ids, read, part_names=names)


def _parted(images: Path, annotations: Path, numbers: dict, image: str) -> Batch:
    objects = _structs(mat(annotations / f"{image}.mat")["anno"]["objects"])
    labels = torch.tensor([int(item["class_ind"]) for item in objects])
    instances = torch.stack([torch.as_tensor(item["mask"].astype(bool)) for item in objects])
    segmentation = torch.zeros(instances.shape[1:], dtype=torch.long)
    parts = torch.zeros_like(segmentation)
    for item, label, mask in zip(objects, labels, instances, strict=True):
        name = VOC_CLASSES[label]
        segmentation[mask] = label
        parts[mask] = numbers.get((name, ""), IGNORE)
        for part in _structs(item["parts"]):  # a head comes before the eyes that lie on it
            raw = part["part_name"].rstrip("0123456789").rstrip("_")
            parts[torch.as_tensor(part["mask"].astype(bool))] = numbers[name, raw]
    return {
        "image": picture(images / f"{image}.jpg"),
        "labels": labels,
        "instances": instances,
        "boxes": boxes_of(instances),
        "segmentation": segmentation,
        "parts": parts,
    }


def _structs(value) -> list[dict]:
    """A MATLAB struct array, which is read as a dict when it has one element."""
    return [value] if isinstance(value, dict) else list(value)
