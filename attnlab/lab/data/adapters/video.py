"""Clips of videos: ImageNet VID with its tracks, Kinetics and UCF101 with their classes.

A sample is a clip: `image (3, T, H, W)`. Video files are decoded with PyAV; a video may as well be
a folder of frames, named as the file without its suffix, and then nothing is needed.
"""

from functools import partial
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from attnlab.lab.data.adapters.reading import Files, Place, annotated, images_in, lines, picture
from attnlab.lab.data.samples import Batch

VID_CLASSES = {
    "n02691156": "airplane", "n02419796": "antelope", "n02131653": "bear", "n02834778": "bicycle",
    "n01503061": "bird", "n02924116": "bus", "n02958343": "car", "n02402425": "cattle",
    "n02084071": "dog", "n02121808": "domestic cat", "n02503517": "elephant", "n02118333": "fox",
    "n02510455": "giant panda", "n02342885": "hamster", "n02374451": "horse", "n02129165": "lion",
    "n01674464": "lizard", "n02484322": "monkey", "n03790512": "motorcycle", "n02324045": "rabbit",
    "n02509815": "red panda", "n02411705": "sheep", "n01726692": "snake", "n02355227": "squirrel",
    "n02129604": "tiger", "n04468005": "train", "n01662784": "turtle", "n04530566": "watercraft",
    "n02062744": "whale", "n02391049": "zebra",
}  # fmt: skip


def imagenet_vid(
    place: Place, split: str, frames: int = 8, stride: int = 1, clips: str = "middle"
) -> Files:
    """ImageNet VID: `ILSVRC2015/Data/VID/…` and `ILSVRC2015/Annotations/VID/…`; train, val.

    Samples have K tracks: `labels (K,)` and `boxes (K, T, 4)`, 0 where the object is not in the
    frame. Corners are used as published, counted from 0.

    Args:
        frames: frames of a clip.
        stride: distance between two of them. A video that is too short repeats its last frame.
        clips: "middle": one clip in the middle of each video; "all": each video, cut into clips
            one after the other.
    """
    _check(frames, stride)
    if clips not in ("middle", "all"):
        raise ValueError(f"clips: expected 'middle' or 'all', got {clips!r}")
    place.split(split, ("train", "val"))
    videos = place.find(f"ILSVRC2015/Data/VID/{split}")
    home = videos.parents[2]
    place.find(f"ILSVRC2015/Annotations/VID/{split}")
    pattern = "*/*" if split == "train" else "*"  # training videos lie in four folders
    records = []
    for folder in sorted(path for path in videos.glob(pattern) if path.is_dir()):
        video = folder.relative_to(home / "Data")
        if clips == "middle":
            records.append((video, None))
        else:
            count = len(images_in(folder, "*.JPEG"))
            records += [(video, start) for start in range(0, count, frames * stride)]
    names = tuple(VID_CLASSES.values())
    return Files(place.name, split, names, records, partial(_tracks, home, frames, stride))


def _tracks(home: Path, frames: int, stride: int, record: tuple[Path, int | None]) -> Batch:
    video, start = record
    files = images_in(home / "Data" / video, "*.JPEG")
    chosen = [files[i] for i in positions(len(files), frames, stride, start)]
    wnids = list(VID_CLASSES)
    labels: dict[int, int] = {}
    boxes: dict[int, Tensor] = {}
    for time, file in enumerate(chosen):
        for item, corners in annotated(home / "Annotations" / video / f"{file.stem}.xml"):
            track = int(item.findtext("trackid"))
            labels[track] = wnids.index(item.findtext("name"))
            boxes.setdefault(track, torch.zeros(frames, 4))[time] = torch.tensor(corners)
    tracks = sorted(labels)
    return {
        "image": torch.stack([picture(file) for file in chosen], dim=1),
        "labels": torch.tensor([labels[track] for track in tracks], dtype=torch.long),
        "boxes": torch.stack([torch.zeros(frames, 4), *(boxes[track] for track in tracks)])[1:],
    }


def kinetics(place: Place, split: str, frames: int = 8, stride: int = 4) -> Files:
    """Kinetics: `train/class/*.mp4`, or a folder of frames per video; train, val, test.

    Classes are the class folders of the split. One clip from the middle of each video: `frames`
    frames, `stride` apart; a video that is too short repeats its last frame.
    """
    _check(frames, stride)
    folder = place.find(place.split(split, ("train", "val", "test")))
    classes = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir()))
    records = [
        (video, label)
        for label, name in enumerate(classes)
        for video in sorted((folder / name).iterdir())
        if not video.name.startswith(".")
    ]
    return Files(place.name, split, classes, records, partial(_clip, frames, stride))


def ucf101(place: Place, split: str, frames: int = 8, stride: int = 4, fold: int = 1) -> Files:
    """UCF101: `UCF-101/class/*.avi`, or folders of frames, and `ucfTrainTestlist/*.txt`.

    Splits train and test of the published fold 1, 2 or 3; clips as in Kinetics.
    """
    _check(frames, stride)
    if fold not in (1, 2, 3):
        raise ValueError(f"fold: expected 1, 2 or 3, got {fold}")
    place.split(split, ("train", "test"))
    home = place.find("UCF-101")
    rows = [line.split() for line in lines(place.find("ucfTrainTestlist/classInd.txt"))]
    classes = tuple(name for _, name in sorted(rows, key=lambda row: int(row[0])))
    listed = lines(place.find(f"ucfTrainTestlist/{split}list{fold:02d}.txt"))
    files = [Path(line.split()[0]) for line in listed]
    records = [(home / file, classes.index(file.parent.name)) for file in files]
    return Files(place.name, split, classes, records, partial(_clip, frames, stride))


def _clip(frames: int, stride: int, record: tuple[Path, int]) -> Batch:
    video, label = record
    folder = video if video.is_dir() else video.with_suffix("")
    if folder.is_dir():
        files = images_in(folder, "*.[jJp][pPn]*[gG]")
        image = [picture(files[i]) for i in positions(len(files), frames, stride)]
    else:
        image = _decode(video, frames, stride)
    return {"image": torch.stack(image, dim=1), "label": torch.tensor(label)}


def _decode(path: Path, frames: int, stride: int) -> list[Tensor]:
    """The frames of a clip from the middle of a video file, each `(3, H, W)` uint8."""
    try:
        import av
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{path} is a video file, which PyAV decodes: pip install av (or give a folder of "
            f"frames, {path.with_suffix('').name}/*.jpg, instead)"
        ) from None
    with av.open(str(path)) as container:
        count = sum(1 for _ in container.decode(video=0))
    wanted = positions(count, frames, stride)
    pictures = {}
    with av.open(str(path)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index in wanted:
                pictures[index] = torch.from_numpy(frame.to_ndarray(format="rgb24"))
            if index == wanted[-1]:
                break
    return [rearrange(pictures[index], "h w c -> c h w") for index in wanted]


def positions(count: int, frames: int, stride: int, start: int | None = None) -> list[int]:
    """Which of `count` frames a clip shows: from `start`, or in the middle of the video."""
    if start is None:
        start = max(0, (count - (frames - 1) * stride - 1) // 2)
    return [min(start + stride * step, count - 1) for step in range(frames)]


def _check(frames: int, stride: int) -> None:
    for name, value in (("frames", frames), ("stride", stride)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")
