"""`attnlab video`: a video written here, annotated, and read back; and what is said of bad ones."""

import builtins
import re
import wave
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ImageColor
from torch import nn

from attnlab import cli
from attnlab.lab import checkpoints, video_file
from attnlab.lab.video_file import COLORS, annotate, draw
from attnlab.lab.video_models import ClipSegmenter

av = pytest.importorskip("av")

FRAMES, HEIGHT, WIDTH = 6, 48, 64


def write_video(path: Path, height: int = HEIGHT, width: int = WIDTH, codec: str = "mjpeg") -> Path:
    """A white square that moves to the right by 8 px a frame, over dark gray."""
    with av.open(str(path), "w") as container:
        track = container.add_stream(codec, rate=10)
        track.height, track.width = height, width
        track.pix_fmt = track.codec.video_formats[0].name
        for t in range(FRAMES):
            picture = np.full((height, width, 3), 40, np.uint8)
            picture[16:32, 8 * t : 8 * t + 16] = 255
            container.mux(track.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(track.encode())
    return path


def read_video(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.fixture
def source(tmp_path):
    return write_video(tmp_path / "clip.avi")


class Bright(nn.Module):
    """Says "class 1" of bright pixels."""

    def forward(self, frame):
        bright = 10 * (frame.mean(1, keepdim=True) - 0.5)
        return torch.cat([-bright, bright], dim=1)


class Late(Bright):
    """The same, but it answers a frame two frames later; remembers which frames still exist."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.most_alive = 0
        self.reset()

    def reset(self):
        self.waiting = []

    def step(self, frame):
        self.seen.append(weakref.ref(frame))
        self.most_alive = max(self.most_alive, sum(ref() is not None for ref in self.seen))
        self.waiting.append(self(frame))
        return self.waiting.pop(0) if len(self.waiting) > 2 else None

    def flush(self):
        return self.waiting


@pytest.mark.parametrize("model", [Bright(), Late()], ids=["frame by frame", "two frames late"])
def test_answers_are_drawn_on_their_frames(tmp_path, source, model):
    out = tmp_path / "out.mp4"
    assert annotate(source, out, model, size=48, progress=False) == FRAMES
    before, after = read_video(source), read_video(out)
    assert len(after) == FRAMES
    with av.open(str(out)) as container:
        assert container.streams.video[0].average_rate == 10
    tint = np.array(ImageColor.getrgb(COLORS[0]))
    for t, (old, new) in enumerate(zip(before, after, strict=True)):
        assert new.shape == (HEIGHT, WIDTH, 3)
        square = new[20:28, 8 * t + 4 : 8 * t + 12].astype(float).mean((0, 1))
        np.testing.assert_allclose(square, 127 + tint / 2, atol=12)
        assert np.abs(new[40:].astype(int) - old[40:]).max() < 20
    if isinstance(model, Late):
        assert model.most_alive <= 2  # a frame goes when it has been answered


def test_one_frame_at_a_time(tmp_path, source, monkeypatch):
    """No frame is decoded before the one before it is answered."""
    order = []
    decoded = video_file._as_input

    def as_input(frame, size):
        order.append("read")
        return decoded(frame, size)

    class Model(Bright):
        def forward(self, frame):
            order.append("answer")
            return super().forward(frame)

    monkeypatch.setattr(video_file, "_as_input", as_input)
    annotate(source, tmp_path / "out.mp4", Model(), progress=False)
    assert order == ["read", "answer"] * FRAMES


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "webm", "gif"])
def test_formats(tmp_path, source, suffix):
    out = tmp_path / f"out.{suffix}"
    annotate(source, out, Bright(), progress=False)
    assert len(read_video(out)) == FRAMES


def test_the_model_sees_small_frames_and_odd_sides_lose_a_pixel(tmp_path):
    source = write_video(tmp_path / "odd.avi", 49, 121)
    shapes = []

    class Model(Bright):
        def forward(self, frame):
            shapes.append(tuple(frame.shape))
            assert frame.min() >= 0
            assert frame.max() <= 1
            return super().forward(frame)

    annotate(source, tmp_path / "out.mp4", Model(), size=32, progress=False)
    assert set(shapes) == {(1, 3, 32, 80)}
    assert read_video(tmp_path / "out.mp4")[0].shape == (48, 120, 3)


def test_boxes_are_drawn_where_they_are():
    frame = np.zeros((96, 128, 3), np.uint8)
    found = {
        "boxes": torch.tensor([[16.0, 12, 48, 36], [0, 0, 8, 8]]),
        "scores": torch.tensor([0.9, 0.1]),
        "labels": torch.tensor([1, 2]),
    }
    drawn = draw(frame, (48, 64), [found])
    color = np.array(ImageColor.getrgb(COLORS[1]))
    for y, x in ((72, 64), (48, 96), (48, 32)):  # the lower, the right and the left side, doubled
        np.testing.assert_array_equal(drawn[y, x], color)
    assert drawn[:20].max() == 0  # the weak one is left out
    assert drawn[60:70, 60:90].max() == 0
    nothing = {key: value[:0] for key, value in found.items()}
    np.testing.assert_array_equal(draw(frame, (48, 64), [nothing]), frame)


def cut(path: Path) -> Path:
    """Its index is at the end, and missing."""
    whole = write_video(path.with_name("whole.mp4"), codec="h264").read_bytes()
    path.write_bytes(whole[: whole.index(b"moov") - 4])
    return path


def damaged(path: Path) -> Path:
    """The fourth picture is damaged."""
    parts = write_video(path, codec="png").read_bytes().split(b"IDAT")
    parts[4] = bytes(20) + parts[4][20:]
    path.write_bytes(b"IDAT".join(parts))
    return path


def growing(path: Path) -> Path:
    """MJPEG is pictures one after the other, so two files make one."""
    small = write_video(path.with_name("small.mjpeg"))
    large = write_video(path.with_name("large.mjpeg"), 2 * HEIGHT, 2 * WIDTH)
    path.write_bytes(small.read_bytes() + large.read_bytes())
    return path


def sound(path: Path) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(8000))
    return path


def text(path: Path) -> Path:
    path.write_text("This is no video.")
    return path


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (lambda path: path, "none.mp4", "expected a video that can be read"),
        (text, "text.mp4", "expected a video that can be read"),
        (cut, "cut.mp4", "expected a video that can be read"),
        (damaged, "damaged.avi", "expected a video that can be read"),
        (sound, "sound.wav", "expected a video stream in the file; it has ['audio']"),
        (growing, "growing.mjpeg", "frame 6 has 96×128 px: expected 48×64 px"),
    ],
)
def test_bad_videos_are_named_and_nothing_stays(tmp_path, make, name, message):
    source = make(tmp_path / name)
    there = set(tmp_path.iterdir())
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        annotate(source, tmp_path / "out.mp4", Bright(), progress=False)
    assert f"source={str(source)!r}" in str(error.value)
    assert set(tmp_path.iterdir()) == there


def test_bad_arguments_are_named_and_nothing_stays(tmp_path, source):
    def fails(message, out="out.mp4", model=None, **options):
        with pytest.raises(ValueError, match=re.escape(message)):
            annotate(source, tmp_path / out, model or Bright(), progress=False, **options)
        assert set(tmp_path.iterdir()) == there

    taken = tmp_path / "taken.mp4"
    taken.write_text("mine")
    there = set(tmp_path.iterdir())
    fails("taken.mp4': expected a file that does not exist yet", "taken.mp4")
    assert taken.read_text() == "mine"
    fails("out.xyz': expected the suffix of a video, like .mp4", "out.xyz")
    fails("out.wav': expected the suffix of a video, like .mp4", "out.wav")
    fails("size=8: expected an integer ≥ 16", size=8)
    fails(
        "output=(1, 64): expected logits (1, classes, h, w) or a list of detections",
        model=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 64)),
    )

    class Breaks(Bright):
        def forward(self, frame):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        annotate(source, tmp_path / "out.mp4", Breaks(), progress=False)
    assert set(tmp_path.iterdir()) == there


def test_a_missing_extra_is_named(tmp_path, source, monkeypatch):
    actual = builtins.__import__

    def without(name, *arguments, **options):
        if name == "av":
            raise ModuleNotFoundError("No module named 'av'", name="av")
        return actual(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=re.escape('pip install "attnlab[video]"')):
        annotate(source, tmp_path / "out.mp4", Bright(), progress=False)


def test_the_command_from_end_to_end(tmp_path, source, capsys):
    """A model of yours, saved as a checkpoint, streams over the file."""
    torch.manual_seed(0)
    arguments = {"width": 8, "depth": 1, "interval": 2}
    checkpoints.save(
        tmp_path / "mine", ClipSegmenter(**arguments).eval(), arguments=arguments,
        factory="attnlab.lab.video_models.ClipSegmenter", command="none", seed=0, device="cpu",
        seconds=0, metrics={}, data={"name": "clips"}, probe_image="chelsea",
    )  # fmt: skip
    out = tmp_path / "out.mp4"
    words = ["video", str(source), "--model", str(tmp_path / "mine"), "--out", str(out)]
    assert cli.main([*words, "--size", "32"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{out}: {FRAMES} frames\n"
    assert "6/6" in said.err  # the progress bar
    assert len(read_video(out)) == FRAMES
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert "expected a file that does not exist yet" in capsys.readouterr().err


def test_the_command_needs_no_model_of_yours(tmp_path, source):
    assert cli.main(["video", str(source), "--out", str(tmp_path / "out.mp4")]) == 0
    assert len(read_video(tmp_path / "out.mp4")) == FRAMES


def test_an_unknown_model_is_named(tmp_path, source, capsys):
    with pytest.raises(SystemExit):
        cli.main(["video", str(source), "--out", str(tmp_path / "out.mp4"), "--model", "nothing"])
    message = capsys.readouterr().err
    assert "checkpoint 'nothing'" in message
    assert "clip_segmenter" in message
