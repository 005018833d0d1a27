"""Photos, `Samples`, `load` and its messages, golden samples, the cache, damaged files.

`python tests/test_lab_data.py` writes the golden samples anew, after the generator's version.
"""

import csv
import os
import shutil
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch

from attnlab.lab import data, files
from attnlab.lab.data import bundle, compositing, scenes

GOLDEN = Path(__file__).parent / "golden" / "data.safetensors"


def everything(name: str, n: int, split: str = "train", **options) -> data.Samples:
    return data.load(name, split, n=n, cache=False, **options)


# The photos


def test_photos():
    names = [row["name"] for row in data.photos()]
    assert 6 <= len(names) <= 10
    for row in data.photos():
        assert row["caption"]
        assert row["author"]
        assert row["licence"]
        image = data.photo(row["name"])
        assert image.dtype == torch.float32
        assert image.shape[0] == 3
        assert max(image.shape) <= 320
        assert 0 <= image.min() < 0.2 < 0.8 < image.max() <= 1
    with pytest.raises(ValueError, match=r"name: expected one of \[.*'chelsea'.*got 'cat'"):
        data.photo("cat")


def test_a_photo_can_be_written_to_without_harm():
    data.photo("coffee").zero_()
    assert data.photo("coffee").mean() > 0.1


# Samples


def test_samples_are_a_dataset(device):
    samples = everything("scenes", 10, objects=2).to(device)
    assert samples.device.type == device.type
    assert (len(samples), samples.num_classes, samples.split) == (10, 8, "train")
    assert repr(samples) == "Samples('scenes', 'train': 10 images (3, 64, 64), 8 classes)"
    batch = samples.batch([3, 9])
    assert batch["image"].device.type == device.type
    assert {key: (value.shape[1:], value.dtype) for key, value in batch.items()} == {
        "image": ((3, 64, 64), torch.float32), "label": ((), torch.int64),
        "labels": ((2,), torch.int64), "instances": ((2, 64, 64), torch.float32),
        "boxes": ((2, 4), torch.float32), "saliency": ((64, 64), torch.float32),
    }  # fmt: skip
    for key, value in samples[-1].items():
        assert torch.equal(value, batch[key][1])
    for same in (torch.tensor([3, 9]), slice(3, 10, 6), range(3, 10, 6)):
        assert all(torch.equal(value, batch[key]) for key, value in samples.batch(same).items())
    assert len(list(samples)) == 10
    with pytest.raises(IndexError, match=r"index: expected -10 to 9, got 10"):
        samples[10]
    loader = torch.utils.data.DataLoader(samples, batch_size=5)
    assert torch.equal(next(iter(loader))["image"], samples.batch(slice(0, 5))["image"])


def test_image_is_the_byte_over_255():
    samples = everything("scenes", 2)
    stored = samples.tensors["image"]
    assert stored.dtype == torch.uint8
    assert torch.equal(samples.batch([0, 1])["image"], stored.float() / 255)


def test_samples_refuse_what_does_not_fit():
    image = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"tensors: expected a key 'image', got \['label'\]"):
        data.Samples({"label": torch.zeros(3)}, classes=())
    with pytest.raises(ValueError, match=r"tensors: expected one length .*'label': 2"):
        data.Samples({"image": image, "label": torch.zeros(2)}, classes=())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "scene"}, r"name='scene': expected one of \('parts', 'scenes', 'clips', "),
        ({"split": "test"}, r"split='test': .*'test_scenes' for .* 'test_unseen' for new ones"),
        ({"name": "clips", "split": "dev"}, r"split='dev': expected one of \('train', 'val', "),
        ({"n": 0}, "n=0: expected an integer ≥ 1"),
        ({"n": 2.5}, "n=2.5: expected an integer ≥ 1"),
        ({"seed": -1}, "seed=-1: expected an integer ≥ 0"),
        ({"size": 8}, "size: expected an int or .*at least 16, got 8"),
        ({"size": 0}, "size: .* got 0"),
        ({"size": (64, 64, 3)}, "size: .* got"),
        (
            {"palette": "red"},
            r"palette='red': expected one of the options of 'scenes', \('objects',",
        ),
        ({"objects": 0}, "objects=0: expected 1 to 8"),
        ({"objects": (3, 2)}, r"objects=\(3, 2\): expected 1 to 8"),
        ({"scale": (0.5, 0.2)}, r"scale=\(0.5, 0.2\): expected \(least, most\)"),
        ({"scale": (0, 1)}, r"scale=\(0, 1\): expected"),
        ({"name": "clips", "frames": 1}, "frames=1: expected an integer ≥ 2"),
        ({"name": "clips", "pan": -1}, "pan=-1: expected an integer ≥ 0"),
        ({"name": "clips", "speed": (2, 1)}, r"speed=\(2, 1\): expected"),
    ],
)
def test_load_says_what_was_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.load(**{"name": "scenes", "n": 1, **arguments})


# The golden samples


def golden() -> dict[str, torch.Tensor]:
    scene = everything("scenes", 3, "test_unseen", size=(40, 56), seed=5, objects=(1, 3))
    clip = everything("clips", 1, size=32, seed=5, frames=3, objects=2)
    return {
        f"{samples.name}.{key}": value.contiguous()
        for samples in (scene, clip)
        for key, value in samples.tensors.items()
    }


def test_golden_samples():
    """Elsewhere within 1/255 on all but 0.1 % of the pixels; what is drawn as integers is equal."""
    recorded = safetensors.torch.load_file(GOLDEN)
    for key, value in golden().items():
        difference = (value.int() - recorded[key].int()).abs()
        if key.split(".")[1] in ("image", "instances", "owner"):
            assert (difference > 1).float().mean() <= 1e-3, key
        elif key.split(".")[1] == "boxes":
            assert difference.max() <= 1, key
        else:
            assert difference.max() == 0, key


# The cache


def cache_files() -> list[Path]:
    return sorted((files.cache_dir() / "data").glob("*"))


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("ATTNLAB_CACHE", str(folder))
    return folder


@pytest.mark.parametrize("name", ["scenes", "clips"])
def test_cached_is_generated(name, empty_cache, monkeypatch):
    fresh = everything(name, 5).tensors
    assert cache_files() == []
    data.load(name, n=5)
    (path,) = cache_files()
    monkeypatch.setattr(compositing, "load_sprites", None)  # the second load generates nothing
    monkeypatch.setattr(scenes, "load_sprites", None)
    cached = data.load(name, n=5).tensors
    assert cached.keys() == fresh.keys()
    for key, value in fresh.items():
        assert torch.equal(cached[key], value)
        assert cached[key].dtype == value.dtype
    assert cache_files() == [path]


def test_whatever_changes_the_samples_changes_the_file(empty_cache, monkeypatch):
    base = {"n": 2, "size": 16}
    changes = [{}, {"n": 3}, {"size": 18}, {"size": (16, 18)}, {"seed": 1}, {"split": "val"},
               {"objects": 2}, {"scale": (0.3, 0.5)}]  # fmt: skip
    for change in changes:
        data.load("scenes", **{**base, **change})
    assert len(cache_files()) == len(changes)
    monkeypatch.setattr(scenes, "VERSION", scenes.VERSION + 1)
    data.load("scenes", **base)
    assert len(cache_files()) == len(changes) + 1


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "foreign"])
def test_a_damaged_cache_is_made_anew(damage, empty_cache):
    fresh = data.load("scenes", n=4, size=16).tensors["image"].clone()
    (path,) = cache_files()
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    kept = {"truncate": content[: len(content) // 2], "empty": b"", "flip": content}
    path.unlink()
    if damage == "foreign":
        safetensors.torch.save_file({"image": torch.zeros(4, 3, 16, 16)}, path)
    else:
        path.write_bytes(kept[damage])
    with pytest.warns(UserWarning, match=r"scenes-train-.* is damaged; it is made anew"):
        again = data.load("scenes", n=4, size=16)
    assert torch.equal(again.tensors["image"], fresh)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.load("scenes", n=4, size=16)


def test_no_cache_folder_is_no_obstacle(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("ATTNLAB_CACHE", str(blocked))
    with pytest.warns(UserWarning, match="cannot be written"):
        assert len(data.load("scenes", n=2, size=16)) == 2


# Damage to the data


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of data/ that a test may damage."""
    folder = tmp_path / "data"
    shutil.copytree(files.data_dir(), folder, ignore=shutil.ignore_patterns("checkpoints"))
    monkeypatch.setenv("ATTNLAB_DATA", str(folder))
    return folder


def test_damaged_files_are_named_with_what_mends_them(copied):
    (copied / "cutouts/bird/owl.webp").write_bytes(b"RIFF")
    os.remove(copied / "photos/fig.webp")
    problems = data.verify()
    assert len(problems) == 2
    assert "owl.webp is corrupted" in problems[0]
    assert "fig.webp is missing; mend: " in problems[1]
    with pytest.raises(ValueError, match=r"owl\.webp is corrupted .*; mend: reinstall attnlab, or"):
        data.load("scenes", n=1, cache=False)
    with pytest.raises(ValueError, match=r"fig\.webp is missing"):
        data.photo("fig")
    assert data.photo("coffee").shape[0] == 3


def test_a_missing_index_is_named(copied):
    (copied / "index.csv").unlink()
    assert "index.csv is missing; mend: " in data.verify()[0]
    with pytest.raises(ValueError, match=r"index\.csv is missing"):
        data.load("scenes", n=1)


def test_in_a_checkout_git_mends():
    if files.repo_root() is None:
        pytest.skip("not a checkout")
    command = bundle._mend("photos/fig.webp")
    assert command == "git checkout data/photos/fig.webp, or python scripts/build_data.py"


def test_other_pictures_are_another_cache(empty_cache, copied):
    data.load("scenes", n=1, size=16)
    rows = data.index()
    moved = next(row for row in rows if row["split"] == "val")
    moved["split"] = "train"
    with open(copied / "index.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    assert data.verify() == []
    data.load("scenes", n=1, size=16)
    assert len(cache_files()) == 2


if __name__ == "__main__":
    with files.atomic_write(GOLDEN) as temporary:
        safetensors.torch.save_file(golden(), temporary)
