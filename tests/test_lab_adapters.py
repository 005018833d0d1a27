"""Every adapter against a set of two or three images laid out as the published one.

Values are asserted, not shapes: label mappings, corners that count from 0 or from 1, mask values.
"""

import builtins
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from attnlab.lab import data
from attnlab.lab.data import adapters
from attnlab.lab.data.adapters import coco, pascal_part, video
from attnlab.lab.data.adapters.classification import imagenet_index

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def save_image(path: Path, color=RED, size=(24, 16)) -> None:
    """A picture of one color; size is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, "JPEG", quality=95)


def save_mask(path: Path, values) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, dtype=np.uint8)).save(path)


def save_palette(path: Path, values) -> None:
    """A label image as VOC has it: palette indices, shown in colors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values, dtype=np.uint8))
    image.putpalette([(i * 37) % 256 for i in range(768)])
    assert image.mode == "P"
    image.save(path)


def save_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def color_of(sample) -> tuple[int, ...]:
    return tuple((sample["image"].flatten(1).mean(1) * 255).round().int().tolist())


def close(sample, color) -> bool:
    return all(abs(a - b) <= 3 for a, b in zip(color_of(sample), color, strict=True))


# One label an image


def test_imagenet_labels_come_from_wordnet_ids(tmp_path):
    save_image(tmp_path / "train/n03888257/n03888257_10000.JPEG", GREEN)
    save_image(tmp_path / "train/n01440764/n01440764_18.JPEG", RED)
    ds = adapters.load("imagenet", "train", tmp_path)
    assert [int(sample["label"]) for sample in (ds[0], ds[1])] == [0, 701]
    assert close(ds[0], RED)
    assert close(ds[1], GREEN)
    assert ds.num_classes == 1000
    assert ds.classes[0].startswith("tench")
    assert ds.classes[701].startswith("parachute")
    save_image(tmp_path / "train/kittens/a.JPEG")
    with pytest.raises(ValueError, match=r"root: .* folders that are no class: \['kittens'\]"):
        adapters.load("imagenet", "train", tmp_path)


def test_imagenette_and_its_imagenet_labels(tmp_path):
    wnids = {
        "n01440764": 0, "n02102040": 217, "n02979186": 482, "n03000684": 491, "n03028079": 497,
        "n03394916": 566, "n03417042": 569, "n03425413": 571, "n03445777": 574, "n03888257": 701,
    }  # fmt: skip
    for wnid in wnids:
        save_image(tmp_path / f"imagenette2-160/val/{wnid}/{wnid}_1.JPEG", size=(16, 16))
    ds = adapters.load("imagenette", "val", tmp_path, resolution="160px")
    assert [int(ds[i]["label"]) for i in range(10)] == list(range(10))
    assert ds.classes[:2] == ("tench", "English springer")
    ds = adapters.load("imagenette", "val", tmp_path, resolution="160px", imagenet_labels=True)
    assert [int(ds[i]["label"]) for i in range(10)] == list(wnids.values())
    assert {wnid: imagenet_index()[wnid] for wnid in wnids} == wnids
    with pytest.raises(FileNotFoundError, match="no imagenette2/val in"):
        adapters.load("imagenette", "val", tmp_path)


def test_imagenet_v2_folders_are_numbers(tmp_path):
    """As text, "10" comes before "2": a reader that sorts text calls class 10 class 1."""
    for number, color in ((0, RED), (2, GREEN), (10, BLUE)):
        folder = tmp_path / f"imagenetv2-matched-frequency-format-val/{number}"
        save_image(folder / f"{number}abc.jpeg", color)
    ds = adapters.load("imagenet_v2", "test", tmp_path)
    assert [int(ds[i]["label"]) for i in range(3)] == [0, 2, 10]
    assert close(ds[2], BLUE)


def test_oxford_pet_trimap(tmp_path):
    home = tmp_path / "oxford-iiit-pet"
    save_image(home / "images/Abyssinian_100.jpg", RED, (4, 2))
    save_image(home / "images/yorkshire_terrier_9.jpg", GREEN, (4, 2))
    save_mask(home / "annotations/trimaps/Abyssinian_100.png", [[2, 3, 1, 1], [2, 2, 3, 1]])
    save_mask(home / "annotations/trimaps/yorkshire_terrier_9.png", [[2, 2, 2, 2], [1, 1, 1, 1]])
    rows = "Abyssinian_100 1 1 1\nyorkshire_terrier_9 37 2 25\n"
    save_text(home / "annotations/trainval.txt", rows)
    ds = adapters.load("oxford_pet", "train", tmp_path)
    sample = ds[0]
    assert sample["segmentation"].tolist() == [[0, 255, 1, 1], [0, 0, 255, 1]]
    assert sample["segmentation"].dtype == torch.long
    assert sample["saliency"].tolist() == [[0, 0, 1, 1], [0, 0, 0, 1]]
    assert sample["saliency"].dtype == torch.float32
    assert ds[1]["label"] == 36
    assert ds.classes[0] == "Abyssinian"


def lay_cub(root: Path) -> None:
    home = root / "CUB_200_2011"
    names = ["001.Black_footed_Albatross/a_0046.jpg", "001.Black_footed_Albatross/b_0009.jpg"]
    names.append("002.Laysan_Albatross/c_0002.jpg")
    for name in names:
        save_image(home / "images" / name, RED, (40, 20))
    save_text(home / "images.txt", "".join(f"{i} {name}\n" for i, name in enumerate(names, 1)))
    save_text(home / "classes.txt", "1 001.Black_footed_Albatross\n2 002.Laysan_Albatross\n")
    save_text(home / "image_class_labels.txt", "1 1\n2 1\n3 2\n")
    save_text(home / "train_test_split.txt", "1 0\n2 1\n3 1\n")
    save_text(
        home / "bounding_boxes.txt",
        "1 6.0 2.0 20.0 10.0\n2 0.0 1.0 8.0 9.0\n3 10.0 4.0 20.0 12.0\n",
    )
    save_text(home / "parts/parts.txt", "".join(f"{i} part {i}\n" for i in range(1, 16)))
    locs = "".join(
        f"{image} {part} {image * part}.0 5.0 1\n" if part < 15 else f"{image} 15 0.0 0.0 0\n"
        for image in (1, 2, 3)
        for part in range(1, 16)
    )
    save_text(home / "parts/part_locs.txt", locs)


def test_cub200(tmp_path):
    lay_cub(tmp_path)
    ds = adapters.load("cub200", "train", tmp_path)
    assert len(ds) == 2
    assert ds[1]["label"] == 1
    assert ds[1]["boxes"].tolist() == [[10, 4, 30, 16]]  # x, y, width, height as published
    assert ds[1]["points"].shape == (15, 3)
    assert ds[1]["points"][1].tolist() == [6, 5, 1]
    assert ds[1]["points"][14].tolist() == [0, 0, 0]
    assert ds.part_names[0] == "part 1"
    assert ds.classes == ("001.Black_footed_Albatross", "002.Laysan_Albatross")
    assert len(adapters.load("cub200", "test", tmp_path)) == 1
    assert "saliency" not in ds[0]
    votes = np.zeros((20, 40))
    votes[:10] = 51  # one of five annotators
    save_mask(tmp_path / "segmentations/002.Laysan_Albatross/c_0002.png", votes)
    saliency = adapters.load("cub200", "train", tmp_path)[1]["saliency"]
    assert saliency[0, 0] == pytest.approx(0.2)
    assert saliency[10, 0] == 0


# A class, or whether it is salient, for every pixel


VOC_XML = """<annotation><folder>VOC2012</folder><filename>2007_000032.jpg</filename>
<size><width>24</width><height>16</height><depth>3</depth></size><segmented>1</segmented>
<object><name>person</name><truncated>0</truncated><difficult>0</difficult>
<bndbox><xmin>3</xmin><ymin>1</ymin><xmax>10</xmax><ymax>8</ymax></bndbox>
<part><name>head</name><bndbox><xmin>4</xmin><ymin>1</ymin><xmax>6</xmax><ymax>3</ymax></bndbox>
</part></object>
<object><name>aeroplane</name><difficult>1</difficult>
<bndbox><xmax>24</xmax><xmin>12.5</xmin><ymax>16</ymax><ymin>5</ymin></bndbox></object>
</annotation>"""


def lay_voc(root: Path) -> None:
    home = root / "VOCdevkit/VOC2012"
    for image, color in (("2007_000032", RED), ("2007_000039", GREEN)):
        save_image(home / f"JPEGImages/{image}.jpg", color)
        save_text(home / f"Annotations/{image}.xml", VOC_XML)
    save_text(home / "ImageSets/Segmentation/train.txt", "2007_000032\n")
    save_text(home / "ImageSets/Main/train.txt", "2007_000032\n2007_000039\n")
    classes, objects = np.zeros((16, 24)), np.zeros((16, 24))
    classes[0:8, 2:10], objects[0:8, 2:10] = 15, 1
    classes[4:16, 12:24], objects[4:16, 12:24] = 1, 2
    classes[8, 2:10] = objects[8, 2:10] = 255
    save_palette(home / "SegmentationClass/2007_000032.png", classes)
    save_palette(home / "SegmentationObject/2007_000032.png", objects)


def test_voc2012_corners_count_from_one(tmp_path):
    lay_voc(tmp_path)
    ds = adapters.load("voc2012", "train", tmp_path)
    assert len(ds) == 1
    sample = ds[0]
    assert [ds.classes[i] for i in sample["labels"]] == ["person", "aeroplane"]
    assert sample["boxes"].tolist() == [[2, 0, 10, 8], [11.5, 4, 24, 16]]
    assert sample["difficult"].tolist() == [False, True]
    assert sample["segmentation"][0, 2] == 15
    assert sample["segmentation"][15, 23] == 1
    assert sample["segmentation"][8, 2] == 255
    # The first object's box and its mask say the same: this fails if corners were not shifted.
    y, x = sample["instances"][0].nonzero(as_tuple=True)
    assert [x.min(), y.min(), x.max() + 1, y.max() + 1] == sample["boxes"][0].tolist()
    assert sample["saliency"].sum() == sample["instances"].sum()
    detection = adapters.load("voc2012", "train", tmp_path, task="detection")
    assert len(detection) == 2
    assert "segmentation" not in detection[1]
    with pytest.raises(ValueError, match=r"task: expected one of .*, got 'poses'"):
        adapters.load("voc2012", "train", tmp_path, task="poses")


def test_pascal_context_maps_459_labels_to_59(tmp_path):
    from scipy.io import savemat

    names = {1: "accordion", 2: "aeroplane", 284: "table", 85: "cloth", 31: "bedclothes"}
    save_text(tmp_path / "labels.txt", "".join(f"{i}: {name}\n" for i, name in names.items()))
    tasks = ("aeroplane", "diningtable", "clothes", "bedcloth")
    save_text(
        tmp_path / "59_labels.txt", "".join(f"{i}: {name}\n" for i, name in enumerate(tasks, 1))
    )
    home = tmp_path / "VOCdevkit/VOC2010"
    save_text(home / "ImageSets/Main/val.txt", "2008_000002\n2008_000003\n")
    save_image(home / "JPEGImages/2008_000002.jpg", BLUE, (5, 2))
    (tmp_path / "trainval").mkdir()
    labels = np.array([[2, 284, 85, 31, 1], [0, 0, 0, 0, 2]], dtype=np.uint16)
    savemat(tmp_path / "trainval/2008_000002.mat", {"LabelMap": labels})
    ds = adapters.load("pascal_context", "val", tmp_path)
    assert len(ds) == 1
    assert ds.classes == ("aeroplane", "table", "cloth", "bedclothes")
    assert ds[0]["segmentation"].tolist() == [[0, 1, 2, 3, 255], [255, 255, 255, 255, 0]]


def test_ade20k_other_is_ignored(tmp_path):
    home = tmp_path / "ADEChallengeData2016"
    save_image(home / "images/validation/ADE_val_00000001.jpg", GREEN, (4, 1))
    save_mask(home / "annotations/validation/ADE_val_00000001.png", [[0, 1, 2, 150]])
    save_text(
        home / "objectInfo150.txt",
        "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.1576\t11664\t1172\t1\twall\n"
        "2\t0.1072\t6046\t612\t1\tbuilding, edifice\n",
    )
    ds = adapters.load("ade20k", "val", tmp_path)
    assert ds[0]["segmentation"].tolist() == [[255, 0, 1, 149]]
    assert ds.classes == ("wall", "building")


def test_cityscapes_label_ids_become_train_ids(tmp_path):
    stem = "bochum_000000_000313"
    save_image(tmp_path / f"leftImg8bit/train/bochum/{stem}_leftImg8bit.png", BLUE, (6, 1))
    ids = [[0, 7, 8, 24, 29, 33]]  # unlabeled, road, sidewalk, person, caravan, bicycle
    save_mask(tmp_path / f"gtFine/train/bochum/{stem}_gtFine_labelIds.png", ids)
    ds = adapters.load("cityscapes", "train", tmp_path)
    assert ds[0]["segmentation"].tolist() == [[255, 0, 1, 11, 255, 18]]
    assert ds.num_classes == 19
    assert (ds.classes[0], ds.classes[11], ds.classes[18]) == ("road", "person", "bicycle")


@pytest.mark.parametrize(
    ("name", "split", "images", "masks"),
    [
        ("ecssd", "test", "images", "ground_truth_mask"),
        ("duts", "train", "DUTS-TR/DUTS-TR-Image", "DUTS-TR/DUTS-TR-Mask"),
        ("duts", "test", "DUTS-TE/DUTS-TE-Image", "DUTS-TE/DUTS-TE-Mask"),
        ("dut_omron", "test", "DUT-OMRON-image", "pixelwiseGT-new-PNG"),
    ],
)
def test_saliency_sets_pair_images_with_masks(tmp_path, name, split, images, masks):
    save_image(tmp_path / images / "0001.jpg", RED, (4, 1))
    save_image(tmp_path / images / "0002.jpg", GREEN, (4, 1))
    save_text(tmp_path / images / "._0001.jpg", "left by an archive")
    save_mask(tmp_path / masks / "0001.png", [[0, 127, 128, 255]])
    save_mask(tmp_path / masks / "0002.png", [[255, 255, 255, 255]])
    ds = adapters.load(name, split, tmp_path)
    assert len(ds) == 2
    assert ds[0]["saliency"].tolist() == [[0, 0, 1, 1]]
    assert ds[1]["saliency"].mean() == 1
    assert close(ds[1], GREEN)


# Parts


def test_part_numbering_is_the_published_one():
    names, numbers = pascal_part.numbering(merged=True)
    assert len(names) == 58
    published = {
        0: "background", 1: "aeroplane body", 5: "aeroplane wheel", 12: "boat", 22: "car body",
        27: "chair", 37: "horse head", 43: "person head", 48: "person upper leg", 55: "train",
        56: "tvmonitor screen", 57: "tvmonitor frame",
    }  # fmt: skip
    assert {index: names[index] for index in published} == published
    assert numbers["horse", "lfho"] == names.index("horse leg")
    assert numbers["bird", "tail"] == names.index("bird torso")
    every, _ = pascal_part.numbering(merged=False)
    assert len(set(every)) == len(every) < 255
    assert "horse lfho" in every
    assert "train head" in every


def lay_pascal_part(root: Path) -> None:
    """`anno` as published: a struct with a struct array of objects, each with one of parts."""
    from scipy.io import savemat

    def mask(rows, columns):
        values = np.zeros((16, 24), dtype=np.uint8)
        values[rows, columns] = 1
        return values

    def structs(rows: list[dict]):
        if not rows:
            return np.zeros((0, 0))
        array = np.empty((1, len(rows)), dtype=[(key, object) for key in rows[0]])
        for i, row in enumerate(rows):
            array[0, i] = tuple(row.values())
        return array

    person = [
        {"part_name": "head", "mask": mask(slice(0, 4), slice(0, 4))},
        {"part_name": "leye", "mask": mask(slice(1, 2), slice(1, 2))},
        {"part_name": "ruarm", "mask": mask(slice(4, 6), slice(0, 2))},
    ]
    car = [
        {"part_name": "wheel_1", "mask": mask(slice(14, 16), slice(8, 10))},
        {"part_name": "wheel_12", "mask": mask(slice(14, 16), slice(14, 16))},
    ]
    objects = [
        {"class": "person", "class_ind": 15.0, "mask": mask(slice(0, 8), slice(0, 4)),
         "parts": structs(person)},
        {"class": "car", "class_ind": 7.0, "mask": mask(slice(10, 16), slice(8, 20)),
         "parts": structs(car)},
        {"class": "table", "class_ind": 11.0, "mask": mask(slice(0, 2), slice(20, 24)),
         "parts": structs([])},
    ]  # fmt: skip
    (root / "Annotations_Part").mkdir(parents=True)
    anno = {"imname": "2008_000008", "objects": structs(objects)}
    savemat(root / "Annotations_Part/2008_000008.mat", {"anno": anno})
    anno = {"imname": "2008_000009", "objects": structs(objects[:1])}
    savemat(root / "Annotations_Part/2008_000009.mat", {"anno": anno})
    home = root / "VOCdevkit/VOC2010"
    save_text(home / "ImageSets/Main/train.txt", "2008_000007\n2008_000008\n2008_000009\n")
    for image in ("2008_000007", "2008_000008", "2008_000009"):
        save_image(home / f"JPEGImages/{image}.jpg")


def test_pascal_part(tmp_path):
    lay_pascal_part(tmp_path)
    ds = adapters.load("pascal_part", "train", tmp_path)
    assert len(ds) == 2  # the first image has no annotation
    sample = ds[0]
    assert [ds.classes[i] for i in sample["labels"]] == ["person", "car", "diningtable"]
    assert sample["boxes"].tolist() == [[0, 0, 4, 8], [8, 10, 20, 16], [20, 0, 24, 2]]
    assert sample["segmentation"][15, 8] == 7

    def part(y, x):
        index = int(sample["parts"][y, x])
        return "ignored" if index == 255 else ds.part_names[index]

    assert part(0, 0) == "person head"
    assert part(1, 1) == "person leye"  # painted over the head
    assert part(4, 1) == "person ruarm"
    assert part(7, 3) == "ignored"  # of the person, but of no part
    assert part(15, 15) == "car wheel"
    assert part(0, 23) == "diningtable"
    assert part(9, 0) == "background"
    assert len(ds[1]["labels"]) == 1

    ds = adapters.load("pascal_part", "train", tmp_path, merged=True)
    sample = ds[0]
    assert part(1, 1) == "person head"
    assert part(4, 1) == "person upper arm"
    assert part(7, 3) == "ignored"
    assert ds.num_classes == 21


# COCO


def test_coco_run_lengths_and_polygons():
    """Golden values are of pycocotools 2.0 (`encode`, `frPyObjects`)."""
    mask = np.zeros((20, 30), dtype=bool)
    mask[3:9, 4:17] = mask[12:18, 20:27] = True
    mask[5, 10] = False
    code = "c26>0000000000LC1=30000000000U20kM00000000000`1"
    packed = coco.decode({"size": [20, 30], "counts": code}, 20, 30)
    assert np.array_equal(packed.numpy(), mask)
    disk = np.hypot(*np.mgrid[-10:10, -15:15]) < 8.5
    code = "d45=4L4N0O2O0O2O00000001N101N102L4Lb3"
    assert np.array_equal(coco.decode({"counts": code}, 20, 30).numpy(), disk)
    plain = coco.decode({"size": [2, 3], "counts": [1, 2, 3]}, 2, 3)
    assert plain.tolist() == [[False, True, False], [True, False, False]]
    square = coco.decode([[4.0, 3.0, 17.0, 3.0, 17.0, 9.0, 4.0, 9.0]], 20, 30)
    assert square.sum() == 78  # 13 × 6, as pycocotools
    assert square[3:9, 4:17].all()
    two = coco.decode([[0, 0, 2, 0, 2, 2, 0, 2], [1, 1, 3, 1, 3, 3, 1, 3]], 4, 4)
    assert two.sum() == 7  # a union, not an exclusive or
    outside = coco.decode([[-5, -5, 100, -5, 100, 100, -5, 100]], 4, 6)
    assert outside.all()


def test_coco(tmp_path):
    content = {
        "images": [
            {"id": 397133, "file_name": "000000397133.jpg", "height": 16, "width": 24},
            {"id": 37777, "file_name": "000000037777.jpg", "height": 16, "width": 24},
        ],
        "categories": [
            {"supercategory": "person", "id": 1, "name": "person"},
            {"supercategory": "animal", "id": 90, "name": "toothbrush"},
            {"supercategory": "animal", "id": 13, "name": "stop sign"},
        ],
        "annotations": [
            {"id": 1, "image_id": 397133, "category_id": 90, "iscrowd": 0, "area": 20.0,
             "bbox": [2.5, 3.0, 5.0, 4.0],
             "segmentation": [[2.5, 3.0, 7.5, 3.0, 7.5, 7.0, 2.5, 7.0]]},
            {"id": 2, "image_id": 397133, "category_id": 1, "iscrowd": 1, "area": 16,
             "bbox": [1, 0, 1, 16],
             "segmentation": {"size": [16, 24], "counts": [16, 16, 352]}},
        ],
    }  # fmt: skip
    save_text(tmp_path / "annotations/instances_val2017.json", json.dumps(content))
    save_image(tmp_path / "val2017/000000397133.jpg", RED)
    save_image(tmp_path / "val2017/000000037777.jpg", GREEN)
    ds = adapters.load("coco", "val", tmp_path)
    assert ds.classes == ("person", "stop sign", "toothbrush")
    sample = ds[0]
    assert sample["labels"].tolist() == [2, 0]
    assert sample["boxes"].tolist() == [[2.5, 3, 7.5, 7], [1, 0, 2, 16]]
    assert sample["crowd"].tolist() == [False, True]
    assert sample["instances"][1].nonzero()[:, 1].unique().tolist() == [1]
    assert sample["instances"][0, 3:7, 3:7].all()
    assert ds[1]["labels"].shape == (0,)
    assert ds[1]["instances"].shape == (0, 16, 24)
    batch = adapters.load("coco", "val", tmp_path, size=(32, 48)).batch([0, 1])
    assert batch["labels"].tolist() == [[2, 0], [-1, -1]]
    assert batch["boxes"][:, 0].tolist() == [[5, 6, 15, 14], [0, 0, 0, 0]]
    assert batch["instances"].shape == (2, 2, 32, 48)
    assert batch["instances"][1].sum() == 0


# Videos


def lay_vid(root: Path) -> None:
    videos = {
        "train/ILSVRC2015_VID_train_0000/ILSVRC2015_train_00000000": 5,
        "val/ILSVRC2015_val_00000000": 3,
    }
    for video_name, count in videos.items():
        for t in range(count):
            save_image(root / f"ILSVRC2015/Data/VID/{video_name}/{t:06d}.JPEG", (40 * t, 0, 0))
            box = f"<xmax>{10 + t}</xmax><xmin>{t}</xmin><ymax>9</ymax><ymin>2</ymin>"
            item = (
                f"<object><trackid>{{track}}</trackid><name>{{wnid}}</name><bndbox>{box}</bndbox>"
                "<occluded>0</occluded><generated>0</generated></object>"
            )
            items = item.format(track=7, wnid="n02084071") if t > 1 else ""
            items += item.format(track=0, wnid="n02391049")
            xml = f"<annotation><folder>x</folder>{items}</annotation>"
            save_text(root / f"ILSVRC2015/Annotations/VID/{video_name}/{t:06d}.xml", xml)


def test_imagenet_vid_tracks(tmp_path):
    lay_vid(tmp_path)
    ds = adapters.load("imagenet_vid", "train", tmp_path, frames=3)
    sample = ds[0]
    assert len(ds) == 1
    assert sample["image"].shape == (3, 3, 16, 24)
    reds = (sample["image"][0].mean((1, 2)) * 255).round().tolist()
    assert reds == pytest.approx([40, 80, 120], abs=3)  # frames 1, 2, 3 of 0 … 4
    assert [ds.classes[i] for i in sample["labels"]] == ["zebra", "dog"]
    assert sample["boxes"][0].tolist() == [[1, 2, 11, 9], [2, 2, 12, 9], [3, 2, 13, 9]]
    assert sample["boxes"][1].tolist() == [[0, 0, 0, 0], [2, 2, 12, 9], [3, 2, 13, 9]]
    assert len(ds.classes) == 30
    pieces = adapters.load("imagenet_vid", "train", tmp_path, frames=2, clips="all")
    assert len(pieces) == 3
    reds = (pieces[2]["image"][0].mean((1, 2)) * 255).round().tolist()
    assert reds == pytest.approx([160, 160], abs=3)  # the last frame is repeated
    frames = adapters.load("imagenet_vid", "val", tmp_path, frames=1, clips="all", size=(32, 48))
    batch = frames.batch([0, 2])
    assert batch["boxes"].shape == (2, 2, 1, 4)
    assert batch["labels"].tolist() == [[29, -1], [29, 8]]
    assert batch["boxes"][1, 0, 0].tolist() == [4, 4, 24, 18]
    with pytest.raises(ValueError, match="clips: expected 'middle' or 'all', got 'some'"):
        adapters.load("imagenet_vid", "val", tmp_path, clips="some")
    with pytest.raises(ValueError, match="frames: expected a positive integer, got 0"):
        adapters.load("imagenet_vid", "val", tmp_path, frames=0)


def test_kinetics_as_folders_of_frames(tmp_path):
    for t in range(1, 13):  # 10.jpg comes after 9.jpg
        save_image(tmp_path / f"val/abseiling/0wR5jVB-WPk_000417_000427/{t}.jpg", (20 * t, 0, 0))
    save_image(tmp_path / "val/zumba/abc_000001_000011/frame_000001.png", GREEN)
    ds = adapters.load("kinetics", "val", tmp_path, frames=3, stride=5)
    assert ds.classes == ("abseiling", "zumba")
    reds = (ds[0]["image"][0].mean((1, 2)) * 255).round().tolist()
    assert reds == pytest.approx([20, 120, 220], abs=3)  # frames 1, 6, 11
    assert ds[1]["label"] == 1
    assert (ds[1]["image"][1] > 0.98).all()


def test_ucf101_lists_and_labels(tmp_path):
    save_text(tmp_path / "ucfTrainTestlist/classInd.txt", "1 ApplyEyeMakeup\n2 Archery\n10 Bowling")
    rows = "Bowling/v_Bowling_g08_c01.avi 10\nArchery/v_Archery_g08_c02.avi 2\n"
    save_text(tmp_path / "ucfTrainTestlist/trainlist02.txt", rows)
    save_text(tmp_path / "ucfTrainTestlist/testlist02.txt", "Archery/v_Archery_g01_c01.avi\n")
    for video_name in ("Bowling/v_Bowling_g08_c01", "Archery/v_Archery_g01_c01"):
        for t in range(4):
            save_image(tmp_path / f"UCF-101/{video_name}/image_{t:05d}.jpg", BLUE)
    train = adapters.load("ucf101", "train", tmp_path, frames=2, fold=2)
    assert train.classes == ("ApplyEyeMakeup", "Archery", "Bowling")
    assert train[0]["label"] == 2
    assert adapters.load("ucf101", "test", tmp_path, fold=2)[0]["label"] == 1
    with pytest.raises(ValueError, match="fold: expected 1, 2 or 3, got 4"):
        adapters.load("ucf101", "train", tmp_path, fold=4)


def test_a_video_file_is_decoded(tmp_path):
    av = pytest.importorskip("av", reason="PyAV is not installed")
    path = tmp_path / "train/abseiling/a.mp4"
    path.parent.mkdir(parents=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for t in range(9):
            frame = np.full((16, 32, 3), 25 * t, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    sample = adapters.load("kinetics", "train", tmp_path, frames=3, stride=2)[0]
    grays = (sample["image"].mean((0, 2, 3)) * 255).tolist()
    assert sample["image"].shape == (3, 3, 16, 32)
    assert grays == pytest.approx([50, 100, 150], abs=6)  # frames 2, 4, 6 of 0 … 8


def test_a_video_file_without_a_decoder(tmp_path, monkeypatch):
    save_text(tmp_path / "train/abseiling/a.mp4", "not really")
    real = builtins.__import__

    def without(name, *rest, **more):
        if name == "av":
            raise ModuleNotFoundError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    ds = adapters.load("kinetics", "train", tmp_path)
    with pytest.raises(ModuleNotFoundError, match=r"PyAV decodes: pip install av \(or give .* a/"):
        ds[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((10, 3, 1), [3, 4, 5]),
        ((10, 3, 4), [0, 4, 8]),
        ((2, 3, 1), [0, 1, 1]),
        ((10, 2, 1, 9), [9, 9]),
        ((1, 1, 1), [0]),
    ],
)
def test_positions_of_a_clip(arguments, expected):
    assert video.positions(*arguments) == expected


# What they share


@pytest.mark.parametrize("name", adapters.NAMES)
def test_a_missing_set_says_where_to_put_it(name, tmp_path, monkeypatch):
    monkeypatch.delenv("ATTNLAB_DATASETS", raising=False)
    for split in ("train", "test"):  # every set has one of them
        try:
            adapters.load(name, split)
        except FileNotFoundError as error:
            message = str(error)
            break
        except ValueError as error:
            assert "split" in str(error)  # noqa: PT017
    page = adapters.SETS[name].page
    assert message.startswith(f"{name}: no ")
    for part in (f"$ATTNLAB_DATASETS/{name}", page, "root=...", "unpack"):
        assert part in message
    assert "\n" not in message
    with pytest.raises(FileNotFoundError, match=f"in {tmp_path}: unpack"):
        adapters.load(name, split, tmp_path)


def test_load_finds_the_set_below_the_environment_variable(tmp_path, monkeypatch):
    lay_voc(tmp_path / "voc2012")
    monkeypatch.setenv("ATTNLAB_DATASETS", str(tmp_path))
    ds = data.load("voc2012", "train", size=32, task="detection")
    assert ds.batch([0, 1])["image"].shape == (2, 3, 32, 32)
    assert repr(ds) == "Files('voc2012', 'train': 2 images (32, 32), 21 classes)"


def test_stretching_moves_boxes_masks_and_images_alike(tmp_path):
    lay_voc(tmp_path)
    whole = adapters.load("voc2012", "train", tmp_path)[0]
    ds = adapters.load("voc2012", "train", tmp_path, size=(32, 72))  # from 16 × 24
    batch = ds.batch(torch.tensor([0]))
    assert torch.equal(batch["boxes"][0], whole["boxes"] * torch.tensor([3.0, 2, 3, 2]))
    doubled = whole["segmentation"].repeat_interleave(2, 0).repeat_interleave(3, 1)
    assert torch.equal(batch["segmentation"][0], doubled)
    assert batch["instances"].shape == (1, 2, 32, 72)
    assert 0 <= batch["image"].min() <= batch["image"].max() <= 1
    lay_cub(tmp_path)
    points = adapters.load("cub200", "train", tmp_path, size=(40, 80))[1]["points"]
    assert points[1].tolist() == [12, 10, 1]


def test_a_batch_needs_a_size(tmp_path):
    lay_voc(tmp_path)
    ds = adapters.load("voc2012", "train", tmp_path)
    with pytest.raises(ValueError, match=r"size: a batch needs one, .*size=224\); got None"):
        ds.batch([0])
    with pytest.raises(IndexError, match="index: expected -1 to 0, got 1"):
        ds[1]


def test_n_draws_from_all_classes_and_keeps_its_prefix(tmp_path):
    for i in range(30):
        save_image(tmp_path / f"imagenetv2-matched-frequency-format-val/{i}/a.jpeg", size=(16, 16))
    few, more = (adapters.load("imagenet_v2", "test", tmp_path, n=n) for n in (5, 12))
    assert [r[1] for r in few.records] == [r[1] for r in more.records][:5]
    assert [r[1] for r in few.records] != [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="n: expected 1 to 30 for 'imagenet_v2', 'test', got 31"):
        adapters.load("imagenet_v2", "test", tmp_path, n=31)


def test_samples_are_put_on_the_device_and_survive_pickling(tmp_path, device):
    lay_voc(tmp_path)
    ds = data.load("voc2012", "train", root=tmp_path, size=16, device=device)
    assert {value.device.type for value in ds.batch([0]).values()} == {device.type}
    copy = pickle.loads(pickle.dumps(ds))  # as a DataLoader does for its workers
    assert torch.equal(copy[0]["segmentation"], ds[0]["segmentation"])


def test_wrong_names_splits_and_options():
    with pytest.raises(ValueError, match=r"name: expected one of \('imagenet', .*got 'voc2013'"):
        adapters.load("voc2013")
    with pytest.raises(ValueError, match=r"split: 'coco' has \('train', 'val'\), got 'test'"):
        adapters.load("coco", "test")
    with pytest.raises(ValueError, match=r"options: 'voc2012' takes \['task'\], got \['tusk'\]"):
        adapters.load("voc2012", tusk="segmentation")
    with pytest.raises(ValueError, match=r"options: 'ecssd' takes none, got \['task'\]"):
        adapters.load("ecssd", "test", task="segmentation")
