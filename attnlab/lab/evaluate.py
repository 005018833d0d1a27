"""`attnlab evaluate MODEL`: a checkpoint or a run of `attnlab train` on data that it has not seen.

Every model is measured by what it was trained for, with the functions of the chapters, so that a
bundled checkpoint's sidecar is confirmed: classifiers by accuracy and by where their maps lie,
segmenters by mean IoU, flow by its error.
"""

import argparse
import math
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from timm.data import create_dataset, create_loader
from torch import Tensor
from tqdm.auto import tqdm

from attnlab import lab
from attnlab.dependencyvit import DependencyViT
from attnlab.lab import data, imagenet, metrics, train, video_tasks
from attnlab.lab.arguments import require, whole
from attnlab.lab.data.adapters import SETS
from attnlab.lab.data.adapters.reading import Place
from attnlab.lab.experiments import ch07, ch08, ch09, ch10
from attnlab.lab.files import write_json
from attnlab.lab.pixel_classifier import PixelClassifier, mean_iou, samples
from attnlab.lab.trained import Trained, open_trained, where_it_looks
from attnlab.lab.video_models import SegmentationHead
from attnlab.patchconvnet import PatchConvNet
from attnlab.spformer import SPFormer, SuperpixelSegmenter
from attnlab.video import KeyFrameModel

SPLITS = {
    "parts": {"test accuracy": "test"},
    "scenes": {"seen objects": "test_scenes", "new objects": "test_unseen"},
}
PARTS_TESTED = 2_000  # images, as when the bundled checkpoints were made
MAPS_TESTED = 512  # images whose maps are compared with their masks
Measures = dict[str, Callable[[], dict[str, float]]]


def main(arguments: Sequence[str]) -> int:
    """`attnlab evaluate`: print the metrics; the exit code is 2 when the words make no sense."""
    parser = _parser()
    chosen = vars(parser.parse_args(arguments))
    source, out = chosen.pop("model"), chosen.pop("out", None)
    try:
        trained = open_trained(source, chosen.pop("device", None) or lab.device())
        found = evaluate(trained, **chosen)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:{width}}  {value:.4f}")
    if out is None and trained.folder is not None:
        out = trained.folder / f"metrics-{chosen.get('split', trained.data)}.json"
    if out is not None:
        known = {k: v if math.isfinite(v) else None for k, v in found.items()}
        asked = {name: value for name, value in chosen.items() if name in ("split", "n")}
        write_json(out, {"model": source, "data": trained.data, **asked, "metrics": known})
        print(out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="attnlab evaluate",
        description="Measure a trained model on data that it has not seen.",
        argument_default=argparse.SUPPRESS,
        epilog="Bundled checkpoints: see data/checkpoints, for example vit_mini_parts.",
    )
    parser.add_argument("model", help="a checkpoint's name or path, or the folder of a run")
    parser.add_argument("--data", help="parts, scenes, clips or imagenet: as in training")
    parser.add_argument("--root", type=Path, help="of imagenet, the folder with train/ and val/")
    parser.add_argument("--split", help="default: all that were not seen in training")
    parser.add_argument("-n", type=int, help="images; default: the usual number")
    parser.add_argument("--batch-size", type=int, help="of imagenet; default: 64")
    parser.add_argument("--workers", type=int, help="of imagenet, processes that read; default: 4")
    parser.add_argument("--device", help="cpu, cuda, ...")
    parser.add_argument(
        "--out", type=Path, help="a JSON file; of a run, by default metrics-DATA.json, or -SPLIT"
    )
    return parser


def evaluate(
    trained: Trained,
    *,
    data: str | None = None,
    root: str | os.PathLike | None = None,
    split: str | None = None,
    n: int | None = None,
    batch_size: int = 64,
    workers: int = 4,
    progress: bool = True,
) -> dict[str, float]:
    """What a trained model can do, by metric.

    Args:
        trained: from `open_trained`.
        data: the name of the data, which must be those that it was trained on, and is by default.
        root: for "imagenet", the folder with train/ and val/.
        split: of the data; by default what was not seen in training.
        n: images, or clips; by default as many as when the bundled checkpoints were made.
        batch_size, workers: for "imagenet", images at a time and processes that read them.

    Raises:
        ValueError: other data, no such split, a model that cannot be measured on it.
        FileNotFoundError: there are no images in `root`.
    """
    known = trained.data
    require(data in (None, known), "data", data, f"{known}, which {trained.name} was trained on")
    whole(1, n=1 if n is None else n, batch_size=batch_size)
    whole(0, workers=workers)
    if known == "imagenet":
        require(root is not None, "root", root, "the folder with train/ and val/")
        return _imagenet(trained, Path(root), split or "val", n, batch_size, workers, progress)
    require(root is None, "root", str(root), "none with bundled data")
    measures = clips(trained, split, n) if known == "clips" else pictures(trained, split, n)
    found: dict[str, float] = {}
    bar = tqdm(measures.items(), trained.name, unit="", disable=not progress)
    for name, measure in bar:
        bar.set_postfix_str(name)
        found |= measure()
    return found


def pictures(trained: Trained, split: str | None, n: int | None) -> Measures:
    """Of a model of bundled images: what to measure, by name."""
    model, device, known = trained.model, trained.device, trained.data
    if isinstance(model, SuperpixelSegmenter):
        test = ch10.scenes(split or "test_scenes", n or 512)
        return {
            "mIoU": lambda: {"mIoU": ch10.mean_iou(model, test, device)},
            "superpixels": partial(ch10.oracle, ch10.associated(model), test, device),
        }
    require(known in SPLITS, "data", known, f"one of {[*SPLITS, 'clips', 'imagenet']}")
    if isinstance(model, PixelClassifier):
        return pixels(trained, [split] if split else SPLITS[known].values(), n)
    with torch.no_grad():
        scores = model(torch.zeros(1, 3, *trained.size, device=device))
    shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    require(shape[:1] == (1,) and len(shape) == 2, "model's output", shape, "(1, classes)")

    splits = {f"{split} accuracy": split} if split else SPLITS[known]
    n = n or (PARTS_TESTED if known == "parts" and split is None else None)
    tests = {
        name: data.load(known, part, n, trained.size, **trained.options)
        for name, part in splits.items()
    }
    measures: Measures = {
        name: lambda name=name, test=test: {name: train.accuracy(model, test, device=device)}
        for name, test in tests.items()
    }
    first = next(iter(tests.values()))
    measures["maps"] = partial(localization, trained, first)
    if isinstance(model, PatchConvNet) and known == "scenes":
        one = ch08.scenes(split or "test_scenes", n or 1_000, 1)
        measures["one object"] = lambda: {"one object": train.accuracy(model, one, device=device)}
        measures["two"] = lambda: ch08.set_scores(model, ch08.two_classes(), device)
    if isinstance(model, DependencyViT) and known == "parts" and trained.size == (64, 64):
        measures["trees"] = partial(ch09.gates_and_trees, model, device)
    if isinstance(model, SPFormer):
        associate = partial(ch10.association, model)
        measures["superpixels"] = partial(ch10.oracle, associate, first, device)
    return measures


def localization(trained: Trained, test: data.Samples) -> dict[str, float]:
    """How far a model's maps lie on the objects, beside maps that know nothing.

    Energy: the share of a map's sum on an object. Pointing: whether its highest place is on one.
    Maps that belong to a class are those of the right one.
    """
    scores: dict[str, list[Tensor]] = {}
    for indices in torch.arange(min(len(test), MAPS_TESTED)).split(64):
        batch = test.batch(indices)
        target = batch["label"].to(trained.device)
        maps = where_it_looks(trained.model, batch["image"].to(trained.device), target)
        if not maps:
            return {}
        masks = batch["saliency"]
        maps["center map"] = metrics.center_prior(masks.shape)
        maps["uniform map"] = metrics.uniform(masks.shape)
        for name, map in maps.items():
            for kind, score in (("energy", metrics.energy_inside), ("pointing", metrics.pointing)):
                scores.setdefault(f"{kind}, {name}", []).append(score(map.cpu(), masks))
    return {name: torch.cat(parts).mean().item() for name, parts in scores.items()}


def pixels(trained: Trained, parts: Iterable[str], n: int | None) -> Measures:
    """Of a `PixelClassifier`: mean IoU on each split, of the last frames where these are clips."""

    def overlap(part: str) -> dict[str, float]:
        test, _ = samples(trained.data, part, n, trained.size)
        return {f"{part} mIoU": mean_iou(trained.model, test)}

    return {part: partial(overlap, part) for part in parts}


def clips(trained: Trained, split: str | None, n: int | None) -> Measures:
    """Of a model of clips: what to measure, by name."""
    if isinstance(trained.model, PixelClassifier):
        return pixels(trained, [split or "test"], n)
    model, device, n = trained.model, trained.device, n or 128
    if isinstance(model, ch07.ClipModel):
        test = ch07.clips(split or "test", n).to(device)
        return {
            way: lambda way=way, answers=answers: {
                f"mIoU, {way}, 8 frames on": ch07.miou(answers(test, 8))
            }
            for way, answers in ch07.carried_by(model).items()
        }
    if isinstance(model, ch07.FlowBetween):
        test = ch07.clips(split or "test", n)

        def error(offset: int) -> dict[str, float]:
            errors = video_tasks.flow_scores(model.flow_net, test, offset)
            return {f"error on things, px, {offset} frames apart": errors["objects"]}

        return {f"{offset} frames apart": partial(error, offset) for offset in (1, 4, 8)}
    segments = isinstance(model, KeyFrameModel) and isinstance(model.head, SegmentationHead)
    require(segments, "model", type(model).__name__, "a segmenter of clips, or a flow network")

    def overlap(part: str, offset: int) -> dict[str, float]:
        test = video_tasks.load_clips(part, n, **trained.options)
        scores = video_tasks.segmentation_scores(video_tasks.answers_at(model, test, offset))
        return {f"{part} mIoU, {offset} frames from the key frame": scores["all"]}

    parts = [split] if split else ["val", "test"]
    return {f"{part}, {o} on": partial(overlap, part, o) for part in parts for o in (0, 4)}


def _imagenet(
    trained: Trained, root: Path, split: str, n: int | None, batch_size: int, workers: int,
    progress: bool,
) -> dict[str, float]:  # fmt: skip
    """Top-1 and top-5 accuracy on the images in `root`/`split`, read as in training."""
    require(n is None, "n", n, "none with imagenet: all images of the split are read")
    place = Place("imagenet", root, SETS["imagenet"].page)
    images = create_dataset("", place.find(split), search_split=False)
    classes, outputs = len(images.reader.class_to_idx), trained.card["arguments"]["num_classes"]
    require(classes == outputs, "root", str(root), f"{outputs} folders of classes, not {classes}")
    loader = create_loader(
        images, input_size=(3, *trained.size), batch_size=batch_size, num_workers=workers,
        device=trained.device, interpolation="bicubic", pin_memory=trained.device.type == "cuda",
    )  # fmt: skip
    bar = tqdm(loader, trained.name, disable=not progress)
    return imagenet.accuracies(trained.model, bar, trained.device)
