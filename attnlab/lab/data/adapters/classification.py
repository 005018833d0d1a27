"""One label an image: ImageNet and its relatives, pets and birds."""

from functools import cache, partial
from pathlib import Path

import torch

from attnlab.lab.data.adapters.reading import (
    IGNORE,
    Files,
    Place,
    images_in,
    lines,
    picture,
    plane,
)
from attnlab.lab.data.samples import Batch

V2_VARIANTS = ("matched-frequency", "threshold0.7", "top-images")


@cache
def imagenet_index() -> dict[str, int]:
    """WordNet id → index among the 1000 classes of ImageNet-1k."""
    from timm.data import ImageNetInfo

    return {wnid: index for index, wnid in enumerate(ImageNetInfo("imagenet-1k").label_names())}


def _imagenet_classes() -> tuple[str, ...]:
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    return tuple(info.index_to_description(index) for index in range(info.num_classes()))


def _labelled(record: tuple[str, int]) -> Batch:
    path, label = record
    return {"image": picture(path), "label": torch.tensor(label)}


def imagenet(place: Place, split: str) -> Files:
    """ImageNet-1k: `train/n01440764/*.JPEG` and `val/n01440764/*.JPEG`.

    The validation archive must be sorted into folders by class. A folder with fewer classes is
    welcome: labels come from the WordNet ids, not from counting folders.
    """
    from torchvision.datasets import ImageFolder

    folder = ImageFolder(place.find(place.split(split, ("train", "val"))))
    index = imagenet_index()
    if strangers := [wnid for wnid in folder.classes if wnid not in index]:
        raise ValueError(f"root: {folder.root} has folders that are no class: {strangers[:3]}")
    records = [(path, index[folder.classes[label]]) for path, label in folder.samples]
    return Files(place.name, split, _imagenet_classes(), records, _labelled)


def imagenette(
    place: Place, split: str, resolution: str = "full", imagenet_labels: bool = False
) -> Files:
    """Imagenette, ten easy classes of ImageNet: `imagenette2[-320|-160]/train/n01440764/*.JPEG`.

    Args:
        resolution: "full", "320px" or "160px": which of the three archives.
        imagenet_labels: give labels, and classes, among the 1000 of ImageNet instead of 0 to 9.
    """
    from torchvision.datasets import Imagenette

    archives = {"full": "imagenette2", "320px": "imagenette2-320", "160px": "imagenette2-160"}
    if resolution not in archives:
        raise ValueError(f"resolution: expected one of {tuple(archives)}, got {resolution!r}")
    place.find(f"{archives[resolution]}/{place.split(split, ('train', 'val'))}")
    published = Imagenette(place.root, split, resolution)
    if not imagenet_labels:
        classes = tuple(names[0] for names in published.classes)
        return Files(place.name, split, classes, published._samples, _labelled)
    to_imagenet = [imagenet_index()[wnid] for wnid in published.wnids]
    records = [(path, to_imagenet[label]) for path, label in published._samples]
    return Files(place.name, split, _imagenet_classes(), records, _labelled)


def imagenet_v2(place: Place, split: str, variant: str = "matched-frequency") -> Files:
    """ImageNet-V2, a test set only: `imagenetv2-matched-frequency-format-val/0 … 999/*.jpeg`.

    A folder's name is the class. (Sorted as text the folders run 0, 1, 10, 100, 101, …, and the
    labels that `ImageFolder` gives are wrong for most classes.)
    """
    place.split(split, ("test",))
    if variant not in V2_VARIANTS:
        raise ValueError(f"variant: expected one of {V2_VARIANTS}, got {variant!r}")
    folder = place.find(f"imagenetv2-{variant}-format-val")
    numbers = sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())
    records = [
        (path, number) for number in numbers for path in images_in(folder / str(number), "*.jpeg")
    ]
    return Files(place.name, split, _imagenet_classes(), records, _labelled)


def oxford_pet(place: Place, split: str) -> Files:
    """Oxford-IIIT Pet: `oxford-iiit-pet/images` and `oxford-iiit-pet/annotations`; train, test.

    Adds `segmentation`, 0 background and 1 pet, with the trimap's unsure border as 255; `saliency`
    is the pet without that border. `label` is the breed.
    """
    from torchvision.datasets import OxfordIIITPet

    published = {"train": "trainval", "test": "test"}[place.split(split, ("train", "test"))]
    place.find(f"oxford-iiit-pet/annotations/{published}.txt")
    place.find("oxford-iiit-pet/images")
    pets = OxfordIIITPet(place.root, published)
    records = list(zip(pets._images, pets._segs, pets._labels, strict=True))
    return Files(place.name, split, tuple(pets.classes), records, _pet)


def _pet(record: tuple[Path, Path, int]) -> Batch:
    image, trimap, label = record
    meaning = torch.tensor([IGNORE, 1, 0, IGNORE])  # 1 pet, 2 background, 3 unsure
    segmentation = meaning[plane(trimap).long()]
    return {
        "image": picture(image),
        "label": torch.tensor(label),
        "segmentation": segmentation,
        "saliency": segmentation == 1,
    }


def cub200(place: Place, split: str) -> Files:
    """CUB-200-2011: `CUB_200_2011/images.txt` and its fellows; train, test.

    Adds `boxes (1, 4)` and `points (15, 3)`: x, y in px and 1 where the part is visible, else 0;
    `part_names` names the points. Box corners are used as published, with no shift by one pixel.
    With the separate `segmentations` folder beside, `saliency` is the share of its annotators who
    saw the bird at a pixel.
    """
    place.split(split, ("train", "test"))
    home = place.find("CUB_200_2011/images.txt").parent

    def table(name: str) -> dict[str, list[str]]:
        return {line.split()[0]: line.split()[1:] for line in lines(home / name)}

    boxes, labels = table("bounding_boxes.txt"), table("image_class_labels.txt")
    training = table("train_test_split.txt")
    points: dict[str, list[list[float]]] = {}
    for line in lines(home / "parts" / "part_locs.txt"):
        image, _, *point = line.split()
        points.setdefault(image, []).append([float(number) for number in point])
    records = [
        (file, int(labels[image][0]) - 1, [float(number) for number in boxes[image]], points[image])
        for image, (file,) in table("images.txt").items()
        if (training[image] == ["1"]) == (split == "train")
    ]
    beside = (home.parent / "segmentations", home / "segmentations")
    masks = next((folder for folder in beside if folder.is_dir()), None)
    return Files(
        place.name,
        split,
        tuple(name for (name,) in table("classes.txt").values()),
        records,
        partial(_bird, home / "images", masks),
        part_names=tuple(" ".join(words) for words in table("parts/parts.txt").values()),
    )


def _bird(images: Path, masks: Path | None, record: tuple) -> Batch:
    file, label, (x, y, width, height), points = record
    sample = {
        "image": picture(images / file),
        "label": torch.tensor(label),
        "labels": torch.tensor([label]),
        "boxes": torch.tensor([[x, y, x + width, y + height]]),
        "points": torch.tensor(points),
    }
    if masks:
        sample["saliency"] = plane((masks / file).with_suffix(".png"))
    return sample
