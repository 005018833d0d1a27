"""COCO instances, with its polygons and run lengths decoded here (no pycocotools needed)."""

import json
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from attnlab.lab.data.adapters.reading import Files, Place, picture
from attnlab.lab.data.samples import Batch


def coco(place: Place, split: str, year: int = 2017) -> Files:
    """COCO: `train2017/*.jpg` and `annotations/instances_train2017.json`; train, val.

    Samples have `labels (K,)` 0 to 79 (the published ids 1 to 90 have gaps), `boxes`, `instances`
    and `crowd (K,)`, true for an annotation that marks a crowd. Images without objects stay in.
    A polygon covers the pixels whose centers it contains; pycocotools differs at the rim only.
    """
    place.split(split, ("train", "val"))
    path = place.find(f"annotations/instances_{split}{year}.json")
    images = place.find(f"{split}{year}")
    content = json.loads(path.read_bytes())
    categories = sorted(content["categories"], key=lambda category: category["id"])
    label = {category["id"]: index for index, category in enumerate(categories)}
    objects = defaultdict(list)
    for item in content["annotations"]:
        objects[item["image_id"]].append(item)
    records = [(image, objects[image["id"]]) for image in content["images"]]
    names = tuple(category["name"] for category in categories)
    return Files(place.name, split, names, records, partial(_instances, images, label))


def _instances(images: Path, label: dict[int, int], record: tuple[dict, list[dict]]) -> Batch:
    image, objects = record
    height, width = image["height"], image["width"]
    boxes = torch.tensor([item["bbox"] for item in objects]).reshape(-1, 4)  # x, y, width, height
    masks = [decode(item["segmentation"], height, width) for item in objects]
    return {
        "image": picture(images / image["file_name"]),
        "labels": torch.tensor([label[item["category_id"]] for item in objects], dtype=torch.long),
        "boxes": torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1),
        "instances": torch.stack(masks) if masks else torch.zeros(0, height, width, dtype=bool),
        "crowd": torch.tensor([bool(item["iscrowd"]) for item in objects], dtype=torch.bool),
    }


def decode(segmentation: list | dict, height: int, width: int) -> Tensor:
    """A COCO mask, polygons `[[x1, y1, x2, …], …]` or run lengths, as `(height, width)` bool."""
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        counts = run_lengths(counts) if isinstance(counts, str) else counts
        runs = np.repeat(np.arange(len(counts)) % 2 == 1, counts)  # zeros first, column by column
        return torch.from_numpy(runs.reshape(width, height).T.copy())
    mask = np.zeros((height, width), dtype=bool)
    for polygon in segmentation:
        mask |= inside(np.asarray(polygon, dtype=float).reshape(-1, 2), height, width)
    return torch.from_numpy(mask)


def inside(polygon: np.ndarray, height: int, width: int) -> np.ndarray:
    """Which pixel centers lie in a polygon of (x, y) corners: even-odd rule, `(height, width)`."""
    crossings = np.zeros((height, width + 1), dtype=np.int64)
    for (x1, y1), (x2, y2) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        first, last = (int(np.ceil(y - 0.5).clip(0, height)) for y in sorted((y1, y2)))
        rows = np.arange(first, last)
        if len(rows):
            x = x1 + (rows + 0.5 - y1) * (x2 - x1) / (y2 - y1)
            crossings[rows, np.ceil(x - 0.5).clip(0, width).astype(int)] += 1
    return crossings.cumsum(axis=1)[:, :width] % 2 == 1


def run_lengths(code: str) -> list[int]:
    """COCO's compressed run lengths, decoded.

    Every character carries five bits of a number, least significant first, and one that says
    whether more follow; from the fourth number on, the difference to the last but one is stored.
    """
    runs: list[int] = []
    value = shift = 0
    for character in code:
        bits = ord(character) - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs
