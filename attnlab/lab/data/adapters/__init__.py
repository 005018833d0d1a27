"""The standard data sets of the field, read from disk in their published layouts.

Nothing is downloaded: `load("voc2012", "val", root="/data/voc2012")` reads the folder in which the
published archives were unpacked. Without `root` that folder is `$ATTNLAB_DATASETS/voc2012`. Samples
are the dicts of tensors that `attnlab.lab.data.Samples` documents; what a set adds to them is in
the docstring of its function.
"""

import inspect
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from attnlab.lab.data.adapters import classification, coco, pascal_part, segmentation, video
from attnlab.lab.data.adapters.reading import Files, Place
from attnlab.lab.data.samples import as_size

__all__ = ["NAMES", "Files", "load"]


class Published(NamedTuple):
    """The function that reads a set, and where the set is published."""

    read: Callable[..., Files]
    page: str


CONTEXT = "PASCAL-Context, cs.stanford.edu/~roozbeh, and the images of PASCAL VOC 2010"
PARTS = "Pascal-Part, roozbehm.info, and the images of PASCAL VOC 2010"
SETS = {
    "imagenet": Published(classification.imagenet, "ImageNet ILSVRC 2012, image-net.org"),
    "imagenette": Published(classification.imagenette, "fastai/imagenette on GitHub"),
    "imagenet_v2": Published(classification.imagenet_v2, "modestyachts/ImageNetV2 on GitHub"),
    "oxford_pet": Published(classification.oxford_pet, "Oxford-IIIT Pet, robots.ox.ac.uk/~vgg"),
    "cub200": Published(classification.cub200, "CUB-200-2011, vision.caltech.edu"),
    "ecssd": Published(segmentation.ecssd, "Hierarchical Saliency Detection, cse.cuhk.edu.hk"),
    "duts": Published(segmentation.duts, "DUTS, saliencydetection.net"),
    "dut_omron": Published(segmentation.dut_omron, "DUT-OMRON, saliencydetection.net"),
    "voc2012": Published(segmentation.voc2012, "PASCAL VOC 2012, host.robots.ox.ac.uk"),
    "pascal_context": Published(segmentation.pascal_context, CONTEXT),
    "ade20k": Published(segmentation.ade20k, "Scene Parsing Benchmark, sceneparsing.csail.mit.edu"),
    "cityscapes": Published(segmentation.cityscapes, "Cityscapes, cityscapes-dataset.com"),
    "pascal_part": Published(pascal_part.pascal_part, PARTS),
    "coco": Published(coco.coco, "COCO 2017, cocodataset.org"),
    "imagenet_vid": Published(video.imagenet_vid, "ILSVRC 2015 VID, image-net.org"),
    "kinetics": Published(video.kinetics, "cvdfoundation/kinetics-dataset on GitHub"),
    "ucf101": Published(video.ucf101, "UCF101, crcv.ucf.edu"),
}
NAMES = tuple(SETS)


def load(
    name: str,
    split: str = "train",
    root: str | os.PathLike | None = None,
    size: int | tuple[int, int] | None = None,
    n: int | None = None,
    **options,
) -> Files:
    """Open a published data set.

    Args:
        name: one of `NAMES`.
        split: a split of the set: mostly "train" and "val" or "test".
        root: the folder in which the archives were unpacked; by default `$ATTNLAB_DATASETS/name`.
        size: side, or (height, width) in px, to which every sample is stretched; None keeps each
            image as it is, and then there are no batches. A published crop starts from None.
        n: only n samples, drawn without regard to their order; n=200 starts with those of n=100.
        options: what the set's function takes, for example `frames=8` for videos.

    Raises:
        FileNotFoundError: the set is not there; the message says where to put it.
        ValueError: an unknown name, split or option, or a size or n out of range.
    """
    if name not in SETS:
        raise ValueError(f"name: expected one of {NAMES}, got {name!r}")
    read, page = SETS[name]
    accepted = list(inspect.signature(read).parameters)[2:]
    if unknown := sorted(set(options) - set(accepted)):
        raise ValueError(f"options: {name!r} takes {accepted or 'none'}, got {unknown}")
    home = Path(root) if root else None
    if home is None and (datasets := os.environ.get("ATTNLAB_DATASETS")):
        home = Path(datasets) / name
    samples = read(Place(name, home and home.expanduser(), page), split, **options)
    if n is not None:
        if not 1 <= n <= len(samples):
            raise ValueError(f"n: expected 1 to {len(samples)} for {name!r}, {split!r}, got {n}")
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))[:n]
        samples = replace(samples, records=[samples.records[i] for i in order.tolist()])
    return replace(samples, size=as_size(size) if size is not None else None)
