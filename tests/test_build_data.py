"""The pictures in data/: what the index says of them, and the script that builds them."""

import importlib.util
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image

from attnlab.lab import data, files
from attnlab.lab.data import compositing, scenes

ROOT = Path(__file__).resolve().parents[1]


def script(name: str):
    """A module of scripts/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def builder():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield script("build_data")


@pytest.fixture(scope="module")
def sources(builder):
    return script("data_sources")


def test_every_file_is_as_the_index_says_and_every_file_is_in_it():
    assert data.verify() == []
    listed = {row["file"] for row in data.index()}
    found = {str(path.relative_to(files.data_dir())) for path in files.data_dir().rglob("*.webp")}
    assert found == listed
    assert len(listed) == len(data.index())


def test_data_without_checkpoints_is_at_most_6_mib():
    folder = files.data_dir()
    counted = [path for path in folder.rglob("*") if path.is_file()]
    counted = [path for path in counted if folder / "checkpoints" not in path.parents]
    assert sum(path.stat().st_size for path in counted) <= 6 * 2**20


def test_every_picture_has_an_author_and_a_license_text():
    for row in data.index():
        assert row["author"]
        assert row["source"]
        text = files.data_dir() / "LICENSES" / f"{row['licence']}.txt"
        assert text.stat().st_size > 200, row["licence"]
    credits = (files.data_dir() / "CREDITS.md").read_text(encoding="utf-8")
    assert all(row["author"] in credits and row["caption"] in credits for row in data.index())


def test_pictures_under_other_terms_are_left_out(sources):
    stamps = {Path(row["source"]).stem for row in data.index() if row["set"] == "cutouts"}
    assert len(stamps) > 180
    for reason, names in sources.EXCLUDED.items():
        assert not stamps & set(names.split()), reason


def test_photos_and_backgrounds_are_not_under_share_alike_and_photos_not_under_the_gpl():
    for row in data.index():
        assert "SA" not in row["licence"]
        assert row["set"] != "photos" or "GPL" not in row["licence"]


@pytest.mark.parametrize("kind", ["cutouts", "backgrounds"])
def test_splits_share_no_photograph(kind, builder):
    split_of = {}
    for row in data.index():
        if row["set"] == kind:
            stem = builder.group(Path(row["source"]).stem)
            for key in (row["source_sha256"], (row["class"], stem)):
                assert split_of.setdefault(key, row["split"]) == row["split"], row["file"]
    assert set(split_of.values()) == {"train", "val", "test"}


def test_split_shares_are_as_planned():
    cutouts = [row["split"] for row in data.index() if row["set"] == "cutouts"]
    for split, share in (("train", 0.65), ("val", 0.12), ("test", 0.23)):
        assert cutouts.count(split) / len(cutouts) == pytest.approx(share, abs=0.03)
    for name, split in itertools.product(scenes.CLASSES, ("train", "val", "test")):
        assert any(row["class"] == name and row["split"] == split for row in data.index())


def test_near_duplicates_are_one_group(builder):
    assert builder.group("gnu-baby-stand") == builder.group("gnu-sitting") == "gnu"
    assert builder.group("pig_golden2") == builder.group("pig") == "pig"
    assert builder.group("flower1") != builder.group("flower10")


def test_a_picture_is_rebuilt_from_its_package_to_the_same_bytes(builder, sources):
    skimage = pytest.importorskip("skimage")
    (photo,) = (photo for photo in sources.PHOTOS if photo.name == "chelsea")
    (row,) = (row for row in data.index() if row["file"] == "photos/chelsea.webp")
    source = builder.Source({"scikit-image": Path(skimage.__file__).parents[1]}, *photo[1:3])
    built, encoded = builder.encode(
        source.row(file=row["file"]), builder.shrink(source.image.convert("RGB"), 320), quality=90
    )
    assert built["source_sha256"] == row["source_sha256"]
    assert encoded == (files.data_dir() / row["file"]).read_bytes()


def test_build_says_which_program_is_missing(builder, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match=r"apt-get is missing.*tuxpaint-stamps-default 2022"):
        builder.unpack(tmp_path / "packages", tmp_path / "files")


def test_build_refuses_what_differs_from_the_index(builder):
    rows = {row["file"]: row for row in data.index()}
    pictures = [(row, b"") for row in rows.values()]
    assert builder.compare(pictures, rows) == []
    changed = {**pictures[0][0], "sha256": "0"}
    assert builder.compare([(changed, b""), *pictures[1:]], rows) == [
        f"{changed['file']}: sha256 is 0, data/index.csv says {pictures[0][0]['sha256']}"
    ]
    assert "not built" in builder.compare(pictures[1:], rows)[0]
    assert "at most" in builder.compare([(changed, bytes(7 * 2**20))], {})[0]


def test_resizing_leaves_no_dark_fringe(builder):
    """A white disc on transparent black stays white, when shrunk and when composited."""
    yy, xx = np.mgrid[:200, :200]
    disc = np.zeros((200, 200, 4), np.uint8)
    disc[(yy - 100) ** 2 + (xx - 100) ** 2 < 95**2] = 255
    small = torch.from_numpy(np.array(builder.shrink(Image.fromarray(disc), 112))).float() / 255
    soft = (small[..., 3] > 0.02) & (small[..., 3] < 0.98)
    assert soft.sum() > 100
    assert small[..., :3][small[..., 3] > 0.02].min() > 0.95

    rgba = rearrange(
        torch.cat([small[..., :3] * small[..., 3:], small[..., 3:]], -1), "h w c -> c h w"
    )
    one = torch.ones(1, 1)
    sprites = compositing.Sprites(rgba[None], torch.ones(1, 2), one[0].long() * 0, one[0].long())
    things = compositing.Things(
        label=one.long() * 0, sprite=one.long() * 0, center=torch.tensor([[[30.3, 28.7]]]),
        side=one * 33.3, mirror=one, tilt=one * 0.2, gain=torch.ones(1, 1, 3),
    )  # fmt: skip
    color, alpha = compositing.layer(things, 0, sprites, 64, 64).split([3, 1], dim=1)
    assert ((alpha > 0.02) & (alpha < 0.98)).sum() > 50
    assert (color + (1 - alpha)).min() > 0.95


def test_cutouts_are_premultiplied_before_they_are_resampled():
    """A premultiplied color is at most alpha; at the rim it is about alpha times the inside's."""
    rgba = compositing.load_sprites("train", (0.3, 0.55), 64, 64).rgba
    color, alpha = rgba.split([3, 1], dim=1)
    assert (color - alpha).max() <= 1e-5
    assert color[alpha.expand_as(color) < 1e-3].max() <= 1e-3
