"""The files in `data/`: their index, the whole photographs, and whether all are as they were built."""

import csv
from functools import cache

from attnlab.lab import files


@cache
def index() -> list[dict[str, str]]:
    """The rows of `data/index.csv`: file, set, class, split, author, licence, sources, sha256."""
    with open(files.data_dir() / "index.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def photos():
    raise NotImplementedError


def photo(name):
    raise NotImplementedError


def verify():
    raise NotImplementedError
