"""`attnlab predict`: pictures of every kind in, one picture of what each bundled model sees out."""

import re
from pathlib import Path

import battery
import numpy as np
import pytest
import timm
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from attnlab import cli
from attnlab.lab import checkpoints, data, panels, plots, predict
from attnlab.lab.files import data_dir
from attnlab.lab.trained import open_trained

pytestmark = pytest.mark.usefixtures("one_thread")

# Checkpoint → what each of its panels shows, in this order; the photograph comes before them.
SHOWN = {
    "resnet_mini_scenes": ["probability", "Grad-CAM for", "Grad-CAM for"],
    "resnet_mini_se_scenes": ["probability", "Grad-CAM for", "Grad-CAM for"],
    "resnet_mini_cbam_scenes": [
        "probability", "Grad-CAM for", "Grad-CAM for",
        *(f"spatial gate, layer{stage}" for stage in (1, 2, 3, 4)),
    ],
    "vit_mini_parts": [
        "probability", "attention, last block\n", "attention, rollout",
        *(f"attention, last block, head {n}" for n in range(3)),
    ],
    "patchconvnet_mini_scenes": ["how likely each class is there", "attention pooling"],
    "patchconvnet_mini_classes_scenes": [
        "how likely each class is there", *(["the map of “"] * 3), "classes from 30% on",
    ],
    "dependencyvit_mini_parts": [
        "probability", "messages received", "who sends to whom", "gate of block 1",
        "gate of block 3", "last gate",
    ],
    "spformer_micro_masks": [
        "share of the pixels", "what is not background", "probability of not being background",
        "superpixels", "the mean color of each",
    ],
    "clip_segmenter": [
        "share of the pixels", "what is not background", "probability of not being background",
    ],
    "clip_ways": [
        "share of the pixels", "what is not background", "probability of not being background",
    ],
    "clip_flow": ["the flow to the image two px further right", "flow to the right, cells"],
}  # fmt: skip


def picture(width: int = 60, height: int = 40) -> Image.Image:
    """Red on the left, blue on the right; the upper left corner is green."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = 255
    pixels[:, width // 2 :, 2] = 255
    pixels[: height // 4, : width // 4] = (0, 255, 0)
    return Image.fromarray(pixels)


@pytest.fixture
def file(tmp_path) -> Path:
    picture().save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_every_bundled_checkpoint_is_listed_here():
    bundled = {path.stem for path in (data_dir() / "checkpoints").glob("*.json")}
    assert set(SHOWN) <= bundled
    kinds = {(checkpoints.info(name)["factory"], checkpoints.info(name)["data"]["name"])
             for name in SHOWN}  # fmt: skip
    for name in bundled - set(SHOWN):  # a second network of a kind that is here
        card = checkpoints.info(name)
        assert (card["factory"], card["data"]["name"]) in kinds, name


@pytest.mark.parametrize("name", SHOWN)
def test_what_is_drawn_of_each_bundled_model(name, device):
    trained = open_trained(name, device)
    seen = data.photo("dogs")
    answer, drawn = predict._panels(trained, predict.Seen(seen, predict.as_input(seen, trained)))
    for panel, title in zip(drawn, SHOWN[name], strict=True):
        assert title in panel.title
    assert re.search(r"\d+%|[\d.]+ px", answer)


@pytest.mark.parametrize(("name", "shape"), [
    ("clip_flow", (40, 90)), ("dependencyvit_mini_parts", (90, 40)), ("clip_segmenter", (40, 40)),
])  # fmt: skip
def test_the_picture_is_written(name, shape, tmp_path):
    picture(*shape[::-1]).save(tmp_path / "in.png")
    out = tmp_path / "new/out.png"
    answer = predict.predict(tmp_path / "in.png", open_trained(name), out)
    with Image.open(out) as drawn:
        pixels = np.asarray(drawn.convert("RGB"))
    assert answer
    assert 200 < min(pixels.shape[:2]) <= max(pixels.shape[:2]) < 2_500
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
    assert [path.name for path in out.parent.iterdir()] == ["out.png"], "no temporary file is left"


@pytest.mark.parametrize("shape", [(25, 100), (50, 100), (100, 100), (400, 100)])
def test_no_word_lies_on_another_or_outside(shape):
    """Of eight bars with colors and a map, beside a picture that is flat, square or tall."""
    picture = torch.rand(3, *shape)
    shares = {f"household {n}": 0.1 * n for n in range(1, 9)}
    every = [
        panels.bars("how likely each class is there", shares, ["red"] * 8),
        panels.map_over("attention, last block, head 0", torch.rand(4, 4), picture),
    ]
    with plots.style():
        figure = panels.arrange(every * 3, picture)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    boxes = [
        text.get_window_extent(canvas.get_renderer())
        for ax in figure.axes
        for text in (ax.title, *ax.texts)
    ]
    assert len(boxes) == 3 * (17 + 1)
    for n, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
        for other in boxes[:n]:
            across = min(box.x1, other.x1) - max(box.x0, other.x0)
            down = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert across <= 0 or down <= 3, "letters of two lines touch"  # of the lines' boxes


def test_classes_are_tinted_in_their_colors():
    logits = torch.zeros(1, 3, 2, 2)
    logits[0, [0, 1, 2, 0], [0, 0, 1, 1], [0, 1, 0, 1]] = 1.0
    picture = torch.full((3, 2, 2), 0.5)
    found = panels.tinted(logits, ["white", "red", "blue"], picture)
    assert found[:, 0, 0].tolist() == found[:, 1, 1].tolist() == [0.5] * 3
    assert found[:, 0, 1].tolist() == [0.75, 0.25, 0.25]
    assert found[:, 1, 0].tolist() == [0.25, 0.25, 0.75]
    dimmed = panels.tinted(logits[:, :2], [], picture)
    assert dimmed[:, 0, 1].tolist() == [0.5] * 3
    assert dimmed[:, 0, 0].tolist() == [0.125] * 3


def test_the_probabilities_are_the_models(file):
    trained = open_trained("resnet_mini_scenes")
    seen = predict.read_picture(file)
    with torch.no_grad():
        shares = trained.model(predict.as_input(seen, trained)).softmax(1)[0]
    best = int(shares.argmax())
    out = file.with_name("answer.png")
    answer = predict.predict(file, trained, out)
    assert answer == f"{trained.class_names(8)[best]}, {shares[best]:.0%}"


def save_exif(path: Path) -> None:
    """The same picture, lying on its side, with a note to turn it."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise to look at it
    picture().rotate(90, expand=True).save(path, exif=exif)


SAVED = {
    "gray.png": lambda path: picture().convert("L").save(path),
    "gray and transparent.png": lambda path: picture().convert("LA").save(path),
    "transparent.png": lambda path: picture().convert("RGBA").save(path),
    "palette.gif": lambda path: picture().convert("P").save(path),
    "black and white.png": lambda path: picture().convert("1").save(path),
    "inks.jpg": lambda path: picture().convert("CMYK").save(path, quality=95),
    "turned.png": save_exif,
    "sixteen bits.png": lambda path: Image.fromarray(
        np.asarray(picture().convert("L")).astype(np.uint16) * 257
    ).save(path),
}


@pytest.mark.parametrize("name", SAVED)
def test_pictures_of_every_kind_are_read_as_what_they_show(name, tmp_path):
    SAVED[name](tmp_path / name)
    seen = predict.read_picture(tmp_path / name)
    expected = picture().convert("L") if name.split(".")[0] in (
        "gray", "gray and transparent", "sixteen bits"
    ) else picture()  # fmt: skip
    expected = torch.from_numpy(np.array(expected.convert("RGB"))).permute(2, 0, 1) / 255
    assert seen.shape == (3, 40, 60)
    if name == "black and white.png":
        assert set(seen.unique().tolist()) == {0.0, 1.0}
    else:
        assert (seen - expected).abs().mean() < 0.02


def test_white_shows_through_what_is_transparent(tmp_path):
    image = picture().convert("RGBA")
    image.putalpha(Image.new("L", image.size, 0))
    image.save(tmp_path / "clear.png")
    assert bool((predict.read_picture(tmp_path / "clear.png") == 1).all())


def test_large_pictures_are_shrunk_and_bundled_ones_are_known(tmp_path):
    picture(2_100, 30).save(tmp_path / "wide.png")
    assert predict.read_picture(tmp_path / "wide.png").shape == (3, 15, 1_024)
    assert torch.equal(predict.read_picture("chelsea"), data.photo("chelsea"))


@pytest.mark.parametrize(("shape", "expected"), [
    ((1, 1), (64, 64)), ((100, 150), (64, 96)), ((300, 200), (96, 64)), ((5, 900), (64, 256)),
    ((64, 72), (64, 64)), ((900, 5), (256, 64)),
])  # fmt: skip
def test_the_model_gets_sides_that_it_can_take(shape, expected):
    trained = open_trained("resnet_mini_scenes")
    seen = predict.as_input(torch.rand(3, *shape), trained)
    assert seen.shape == (1, 3, *expected)
    assert 0 <= seen.min() <= seen.max() <= 1


def saved(path: Path, factory: str, arguments: dict, size: int, name: str):
    """A checkpoint of a model that learned nothing."""
    model = battery.randomize(timm.create_model(factory, **arguments)).eval()
    checkpoints.save(
        path, model, factory=factory, arguments=arguments, command="none", seed=0, device="cpu",
        seconds=0, metrics={}, data={"name": name, "split": "train"},
        probe_image={"shape": [1, 3, size, size], "seed": 0},
    )  # fmt: skip
    return open_trained(path)


@pytest.mark.parametrize(("factory", "arguments", "titles"), [
    ("spformer_mini", {}, ["probability", "superpixels", "mean color"]),
    ("vit_mini", {"global_pool": "avg", "depth": 1}, ["probability", "last block", "rollout"]),
    ("dependencyvit_mini", {"global_pool": "cls", "depth": 2},
     ["probability", "received", "gate of block 1", "gate of block 1", "last gate"]),
    ("dependencyvit_mini", {"prune_layers": (2,), "keep_rates": (0.5,), "depth": 2},
     ["probability", "received", "who sends", "gate of block 1", "gate of block 1", "last gate"]),
    ("patchconvnet_mini", {"multiclass": True, "num_classes": 10, "depth": 1},
     ["probability", "the map of", "the map of", "the map of"]),
    ("cbam_resnet_mini", {"num_classes": 1, "width": 8},
     ["probability", "Grad-CAM", *["gate"] * 4]),
    ("test_resnet", {"num_classes": 3}, ["probability"]),
])  # fmt: skip
def test_other_models_show_what_they_have(factory, arguments, titles, tmp_path, file):
    trained = saved(tmp_path / "model", factory, arguments, 64, "scenes")
    seen = predict.read_picture(file)
    _, drawn = predict._panels(trained, predict.Seen(seen, predict.as_input(seen, trained)))
    for panel, title in zip(drawn, titles, strict=True):
        assert title in panel.title
    assert len(panels.arrange(drawn, seen).axes) == len(titles), "all of them can be drawn"


def test_a_model_of_imagenet_gets_its_colors_and_says_its_names(tmp_path, file):
    arguments = {"num_classes": 1000, "width": 8}
    trained = saved(tmp_path / "model", "resnet_mini", arguments, 32, "imagenet")
    seen = predict.read_picture(file)
    mean, std = (torch.tensor(values)[:, None, None] for values in (
        timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD
    ))  # fmt: skip
    inputs = predict.as_input(seen, trained)
    assert inputs.shape == (1, 3, 32, 48)
    plain = predict.as_input(seen, saved(tmp_path / "b", "resnet_mini", {}, 32, "scenes"))
    torch.testing.assert_close(inputs, (plain - mean) / std)
    assert trained.class_names(1000)[0] == "tench"
    assert trained.class_names(2) == ["class 0", "class 1"]


def test_a_timm_model_of_one_size_gets_that_size(tmp_path):
    arguments = {"num_classes": 2, "depth": 1, "img_size": 32}
    trained = saved(tmp_path / "model", "vit_tiny_patch16_224", arguments, 32, "scenes")
    assert predict.as_input(torch.rand(3, 50, 90), trained).shape == (1, 3, 32, 32)


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["predict", "chelsea", "--model", "resnet_mini_scenes", "--device", "cpu"]
    assert cli.main(words) == 0
    out = tmp_path / "chelsea-resnet_mini_scenes.png"
    assert capsys.readouterr().out.startswith(f"{out.name}: ")
    before = out.read_bytes()
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert "png': expected a file that does not exist yet" in capsys.readouterr().err
    assert out.read_bytes() == before


@pytest.mark.parametrize(("words", "message"), [
    (["nowhere.png", "--model", "clip_flow"], "image='nowhere.png': expected a file that is there"),
    ([".", "--model", "clip_flow"], "image='.': expected a file that is there, or one of the bun"),
    (["text.png", "--model", "clip_flow"], "image='text.png': expected a picture that can be read"),
    (["cut.png", "--model", "clip_flow"], "image='cut.png': expected a picture that can be read"),
    (["huge.png", "--model", "clip_flow"], "image='huge.png': expected a picture that can be read"),
    (["photo.png", "--model", "vit_mini"], "model='vit_mini': expected a bundled checkpoint, the"),
    (["photo.png", "--model", "folder"], "model='folder': expected a checkpoint, or the folder of"),
    (["photo.png", "--model", "begun"], "model='begun': expected a run that has ended; the"),
    (["photo.png", "--model", "clip_flow", "--out", "a.txt"], "out='a.txt': expected a suffix"),
    (["photo.png"], "the following arguments are required: --model"),
])  # fmt: skip
def test_what_is_wrong_is_said(words, message, tmp_path, file, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data.photo("chelsea")  # of the golden values: read once, while it may be as large as it is
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)
    picture(200, 200).save("huge.png")
    Path("text.png").write_text("no picture")
    Path("cut.png").write_bytes(file.read_bytes()[:80])
    Path("folder").mkdir()
    Path("begun").mkdir()
    Path("begun/config.json").write_text("{}")
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit) as stop:
        cli.main(["predict", *words, *(["--device", "cpu"] if "--model" in words else [])])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == before, "nothing is written"
