"""The files in `data/`: their index, their pictures, and whether they are as they were built.

Every file is hashed when it is first read, and compared with `data/index.csv`.
"""

import csv
import hashlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from attnlab.lab import files

Row = dict[str, str]


def index() -> list[Row]:
    """The rows of `data/index.csv`, one for each picture.

    Columns: file, set, class, split, author, licence, package, source, source_sha256, sha256,
    changes, caption.

    Raises:
        ValueError: the file is missing.
    """
    return list(_index(files.data_dir()))


@cache
def _index(folder: Path) -> tuple[Row, ...]:
    path = folder / "index.csv"
    if not path.is_file():
        raise ValueError(f"{path} is missing; mend: {_mend('index.csv')}")
    with open(path, newline="", encoding="utf-8") as file:
        return tuple(csv.DictReader(file))


def fingerprint() -> str:
    """A hash of what the pictures are, which class they have and in which split they are."""
    listed = [[row[key] for key in ("file", "class", "split", "sha256")] for row in index()]
    return hashlib.sha256(repr(listed).encode()).hexdigest()


def photos() -> list[Row]:
    """The whole photographs in `data/photos`: dicts of name, caption, author and licence."""
    return [
        {
            "name": Path(row["file"]).stem,
            **{key: row[key] for key in ("caption", "author", "licence")},
        }
        for row in index()
        if row["set"] == "photos"
    ]


def photo(name: str) -> Tensor:
    """A photograph of `photos()`, `(3, H, W)` float in [0, 1], at most 320 px wide and high.

    Raises:
        ValueError: there is no photograph of that name, or its file is corrupted.
    """
    names = [known["name"] for known in photos()]
    if name not in names:
        raise ValueError(f"name: expected one of {names}, got {name!r}")
    return picture(f"photos/{name}.webp").float() / 255


def backgrounds(split: str, copyleft: bool = True) -> Tensor:
    """The crops of photographs in one split, `(N, 3, 128, 128)` uint8.

    `copyleft=False` leaves out those under the GPL, so that figures need credits only.
    """
    kept = [row for row in rows("backgrounds", split) if copyleft or "GPL" not in row["licence"]]
    return torch.stack([picture(row["file"]) for row in kept])


def rows(set_name: str, split: str) -> list[Row]:
    """The rows of one set and split, in the order of the index."""
    return [row for row in index() if row["set"] == set_name and row["split"] == split]


def picture(file: str) -> Tensor:
    """A file of the index as `(3 or 4, H, W)` uint8.

    Raises:
        ValueError: the file is missing or corrupted.
    """
    return _picture(files.data_dir(), file)


@cache
def _picture(folder: Path, file: str) -> Tensor:
    (row,) = (row for row in _index(folder) if row["file"] == file)
    if problem := _problem(folder, row):
        raise ValueError(problem)
    pixels = np.array(Image.open(folder / file))
    return rearrange(torch.from_numpy(pixels), "h w c -> c h w").contiguous()


def verify() -> list[str]:
    """What is wrong with the files in `data/`, and what mends it; nothing when all is well."""
    folder = files.data_dir()
    _index.cache_clear()
    _picture.cache_clear()
    try:
        known = _index(folder)
    except ValueError as error:
        return [str(error)]
    return [problem for row in known if (problem := _problem(folder, row))]


def _problem(folder: Path, row: Row) -> str | None:
    path = folder / row["file"]
    if not path.is_file():
        return f"{path} is missing; mend: {_mend(row['file'])}"
    if files.sha256(path) != row["sha256"]:
        return (
            f"{path} is corrupted (its sha256 is not that of index.csv); mend: {_mend(row['file'])}"
        )
    return None


def _mend(file: str) -> str:
    root = files.repo_root()
    if root and files.data_dir() == root / "data":
        return f"git checkout data/{file}, or python scripts/build_data.py"
    return "reinstall attnlab, or point ATTNLAB_DATA at a whole copy of its data/"
