"""What every adapter shares: finding a set, reading its files, samples that are read when asked."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from attnlab.lab.data.samples import Batch, Indices, given

IGNORE = 255  # a pixel that has no label in a segmentation or a part map
MASKS = frozenset({"instances", "saliency", "segmentation", "parts"})
# Per-object entries, and what fills them up to the batch's largest number of objects.
PADDING = {"labels": -1, "instances": 0, "boxes": 0, "difficult": False, "crowd": False}


@dataclass(frozen=True)
class Place:
    """Where a set is looked for, and what to say when it is not there."""

    name: str
    root: Path | None
    page: str

    def find(self, path: str) -> Path:
        """`root / path`. Raises FileNotFoundError, one line with the remedy, if it is missing."""
        if self.root and (self.root / path).exists():
            return self.root / path
        home = self.root or f"$ATTNLAB_DATASETS/{self.name}"
        raise FileNotFoundError(
            f"{self.name}: no {path} in {home}: unpack the published archives ({self.page}) there, "
            f"or pass root=..., or set ATTNLAB_DATASETS to the folder that holds {self.name}/"
        )

    def split(self, value: str, allowed: Iterable[str]) -> str:
        """`value`. Raises ValueError if it is none of the `allowed` splits."""
        if value not in (allowed := tuple(allowed)):
            raise ValueError(f"split: {self.name!r} has {allowed}, got {value!r}")
        return value


@dataclass(frozen=True, eq=False)
class Files(Dataset):
    """A data set on disk with the interface of `Samples`: a sample is read when it is asked for.

    Picklable, so that a `DataLoader` may read with several workers.

    Args:
        name, split: what was loaded.
        classes: the names that `label`, `labels` and `segmentation` index.
        records: what `read` needs to know of each sample.
        read: one record to one sample, with images and masks as bytes.
        part_names: the names that `parts` or `points` index.
        size: (height, width) in px, to which samples are stretched: images by bicubic interpolation
            with antialiasing, masks by the nearest pixel, boxes and points along with them.
        device: where samples are put.
    """

    name: str
    split: str
    classes: Sequence[str]
    records: Sequence = field(repr=False)
    read: Callable[[Any], Batch] = field(repr=False)
    part_names: Sequence[str] = ()
    size: tuple[int, int] | None = None
    device: torch.device | str = "cpu"

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        size = self.size or "of their own sizes"
        return (
            f"Files({self.name!r}, {self.split!r}: {len(self)} images {size}, "
            f"{self.num_classes} classes)"
        )

    def __getitem__(self, index: int) -> Batch:
        """One sample. Raises IndexError outside `-len(self) <= index < len(self)`."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: expected -{len(self)} to {len(self) - 1}, got {index}")
        sample = {key: given(key, value) for key, value in self.read(self.records[index]).items()}
        if self.size is not None:
            sample = stretch(sample, self.size)
        return {key: value.to(self.device) for key, value in sample.items()}

    def batch(self, indices: Indices) -> Batch:
        """The samples at `indices` as one dict of `(B, …)` tensors, padded to the most objects.

        Raises ValueError if the data set was loaded without a size.
        """
        if self.size is None:
            raise ValueError(
                f"size: a batch needs one, as in load({self.name!r}, size=224); got None"
            )
        if isinstance(indices, slice):
            indices = range(len(self))[indices]
        samples = [self[int(index)] for index in indices]
        return {key: _stack(key, [sample[key] for sample in samples]) for key in samples[0]}

    def to(self, device: torch.device | str) -> "Files":
        """The same samples, given on `device`."""
        return replace(self, device=device)


def _stack(key: str, values: list[Tensor]) -> Tensor:
    if key in PADDING:
        most = max(len(value) for value in values)
        filled = [value.new_full((most, *value.shape[1:]), PADDING[key]) for value in values]
        for whole, value in zip(filled, values, strict=True):
            whole[: len(value)] = value
        values = filled
    return torch.stack(values)


def stretch(sample: Batch, size: tuple[int, int]) -> Batch:
    """A sample at another size: `image (3, [T,] H, W)`, masks, boxes and points alike."""
    height, width = sample["image"].shape[-2:]
    rows = ((torch.arange(size[0]) + 0.5) * height / size[0]).long()
    columns = ((torch.arange(size[1]) + 0.5) * width / size[1]).long()
    scale = torch.tensor([size[1] / width, size[0] / height])

    def stretched(key: str, value: Tensor) -> Tensor:
        if key == "image":
            frames = rearrange(value, "c ... h w -> c (...) h w")
            frames = F.interpolate(frames, size, mode="bicubic", antialias=True).clamp(0, 1)
            return frames.reshape(*value.shape[:-2], *size)
        if key in MASKS:
            return value[..., rows[:, None], columns]
        if key == "boxes":
            return value * scale.repeat(2)
        if key == "points":
            return torch.cat([value[..., :2] * scale, value[..., 2:]], dim=-1)
        return value

    return {key: stretched(key, value) for key, value in sample.items()}


def picture(path: str | os.PathLike) -> Tensor:
    """An image file as `(3, H, W)` uint8."""
    with Image.open(path) as image:
        return rearrange(torch.from_numpy(np.array(image.convert("RGB"))), "h w c -> c h w")


def plane(path: str | os.PathLike) -> Tensor:
    """The numbers stored in a label image (palette index or grey value) as `(H, W)`."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image))


def silhouette(path: str | os.PathLike) -> Tensor:
    """A black and white mask file as `(H, W)` bool: what is lighter than mid-grey."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("L")) > 127)


def mat(path: str | os.PathLike) -> dict:
    """A MATLAB file, its structs as dicts and its struct arrays as lists of dicts."""
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"{path} needs SciPy: pip install scipy") from None
    return loadmat(path, simplify_cells=True)


def lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty, without the white space around them."""
    return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]


def images_in(folder: Path, pattern: str = "*.jpg") -> list[Path]:
    """The image files of a folder by name, without the hidden files that archives bring along.

    Numbers of unequal length are in the order of the numbers: 2.jpg comes before 10.jpg.
    """
    found = (path for path in folder.glob(pattern) if not path.name.startswith("."))
    return sorted(found, key=lambda path: (len(path.name), path.name))


def annotated(path: Path) -> list[tuple[ElementTree.Element, list[float]]]:
    """The objects of a PASCAL XML file, each with xmin, ymin, xmax, ymax as they are written."""
    corners = ("xmin", "ymin", "xmax", "ymax")
    return [
        (element, [float(element.findtext(f"bndbox/{corner}")) for corner in corners])
        for element in ElementTree.parse(path).getroot().findall("object")
    ]


def boxes_of(masks: Tensor) -> Tensor:
    """The tight boxes of `(K, H, W)` masks as `(K, 4)`, 0 for an empty mask."""
    boxes = torch.zeros(len(masks), 4)
    for box, mask in zip(boxes, masks, strict=True):
        if mask.any():
            y, x = mask.nonzero(as_tuple=True)
            box[:] = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1])
    return boxes
