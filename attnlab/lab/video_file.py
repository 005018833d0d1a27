"""A video file of your own through a model, frame by frame: `attnlab video clip.mp4 --out out.mp4`.

One frame is decoded, answered, drawn on and written before the next is read (a model that looks
ahead keeps its few frames back), so memory does not grow with the video. Files are read and written
by PyAV, which is FFmpeg.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor, nn
from tqdm.auto import tqdm

from attnlab import lab
from attnlab.lab import checkpoints
from attnlab.lab.arguments import require, whole
from attnlab.lab.data.clips import OBJECTS
from attnlab.lab.files import atomic_write
from attnlab.lab.video_tasks import stream

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#999999")
MULTIPLE = 16  # px: sides of what the model sees are multiples of this
LEAST_SCORE = 0.3  # of a detection that is drawn


def main(source: str, out: str, model: str, size: int) -> int:
    """`attnlab video`: the exit code, 0. Raises as `annotate` and `checkpoints.load` do."""
    frames = annotate(source, out, checkpoints.load(model, lab.device()), size)
    print(f"{out}: {frames} frames")
    return 0


def annotate(
    source: str | os.PathLike,
    out: str | os.PathLike,
    model: nn.Module,
    size: int = 64,
    progress: bool = True,
) -> int:
    """Write the video `source` to `out` with the model's answers drawn on it.

    The new video has the old one's size (less one px where a side is odd) and mean frame rate, and
    no sound. It appears under its name when it is complete, or not at all.

    Args:
        model: in eval mode; one with `step` (`attnlab.video`), or any that takes a frame
            `(1, 3, h, w)` in [0, 1]. It answers with logits `(1, classes, h', w')`, class 0 being
            the background, or with a list of one dict of detections.
        size: the shorter side at which the model sees the frames, px; both sides become multiples
            of 16. The models for the bundled clips learned at 64.

    Returns:
        The number of frames.

    Raises:
        ValueError: `source` cannot be read, has no video or frames of several sizes; `out` exists
            or has a suffix that FFmpeg does not know; or the model answers something else.
        ModuleNotFoundError: the extra `attnlab[video]` is not installed.
    """
    whole(MULTIPLE, size=size)
    av, source, out = _pyav(), Path(source), Path(out)
    require(not out.exists(), "out", str(out), "a file that does not exist yet")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    waiting: deque[tuple[np.ndarray, tuple[int, int]]] = deque()

    def as_seen(frames: Iterable[np.ndarray]) -> Iterator[Tensor]:
        for frame in frames:
            image = _as_input(frame, size).to(device)
            waiting.append((frame, tuple(image.shape[2:])))
            yield image

    done = 0
    with _opened(av, source) as (frames, rate, total), _written(av, out, rate) as write:
        outputs = _answers(model, as_seen(frames))
        for output in tqdm(outputs, out.name, total, unit=" frames", disable=not progress):
            write(draw(*waiting.popleft(), output))
            done += 1
        require(done > 0, "source", str(source), "a video with at least one frame")
    return done


def draw(frame: np.ndarray, size: tuple[int, int], output: Any) -> np.ndarray:
    """The answer of a model that saw a frame at `size` (h, w), drawn on the frame `(H, W, 3)`.

    Raises ValueError when the output is neither logits `(1, classes, h', w')` nor `[detections]`.
    """
    dense = isinstance(output, Tensor) and output.ndim == 4 and len(output) == 1
    boxes = isinstance(output, list) and len(output) == 1 and "boxes" in output[0]
    given = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    require(dense or boxes, "output", given, "logits (1, classes, h, w) or a list of detections")
    return _with_boxes(frame, size, output[0]) if boxes else _with_classes(frame, output)


def _with_classes(frame: np.ndarray, logits: Tensor) -> np.ndarray:
    """Tint what is not background by its class, and name the classes in the corner.

    By the names of the bundled objects where there are as many classes, else by number.
    """
    logits = F.interpolate(logits.float(), frame.shape[:2], mode="bilinear", align_corners=False)
    classes = logits[0].argmax(0).cpu().numpy()
    present = [n for n in np.unique(classes).tolist() if n > 0]
    known = logits.shape[1] == len(OBJECTS) + 1
    tinted = frame.copy()
    for n in present:
        inside = classes == n
        tinted[inside] = frame[inside] // 2 + np.array(_color(n - 1), np.uint8) // 2
    image = Image.fromarray(tinted)
    canvas, font = ImageDraw.Draw(image), _font(image)
    for row, n in enumerate(present):
        where = (2, 2 + row * int(1.3 * font.size))
        name = OBJECTS[n - 1] if known else f"class {n}"
        canvas.text(where, name, _color(n - 1), font, stroke_width=1, stroke_fill="black")
    return np.asarray(image)


def _with_boxes(frame: np.ndarray, size: tuple[int, int], found: dict[str, Tensor]) -> np.ndarray:
    """Draw the boxes that score at least `LEAST_SCORE`, each with its class and its score."""
    image = Image.fromarray(frame)
    canvas, font = ImageDraw.Draw(image), _font(image)
    scale = torch.tensor([image.width / size[1], image.height / size[0]]).repeat(2)
    boxes, scores, labels = (found[key].cpu() for key in ("boxes", "scores", "labels"))
    for n in (scores >= LEAST_SCORE).nonzero().flatten().tolist():
        box, label = (boxes[n] * scale).tolist(), int(labels[n])
        canvas.rectangle(box, outline=_color(label), width=max(1, font.size // 6))
        text = f"{OBJECTS[label] if label < len(OBJECTS) else label} {scores[n]:.2f}"
        canvas.text(box[:2], text, _color(label), font, stroke_width=1, stroke_fill="black")
    return np.asarray(image)


def _color(label: int) -> tuple[int, int, int]:
    return ImageColor.getrgb(COLORS[label % len(COLORS)])


def _font(image: Image.Image) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(max(10, min(image.size) // 24))


def _answers(model: nn.Module, frames: Iterable[Tensor]) -> Iterator[Any]:
    if hasattr(model, "step"):
        yield from stream(model, frames)
        return
    for frame in frames:
        with torch.no_grad():
            output = model(frame)
        yield output


def _as_input(frame: np.ndarray, size: int) -> Tensor:
    """`(H, W, 3)` bytes → `(1, 3, h, w)` in [0, 1]; h, w multiples of 16, the shorter as `size`."""
    image = rearrange(torch.from_numpy(frame), "h w c -> 1 c h w").float() / 255
    shrink = size / min(frame.shape[:2]) / MULTIPLE
    small = [MULTIPLE * max(1, round(length * shrink)) for length in frame.shape[:2]]
    return F.interpolate(image, small, mode="bilinear", antialias=True)


@contextmanager
def _opened(av: ModuleType, source: Path) -> Iterator[tuple[Iterator[np.ndarray], Any, int | None]]:
    """The frames of a video file `(H, W, 3)`, their mean rate, their number where it is known."""
    try:
        container = av.open(str(source))
    except (av.FFmpegError, OSError) as error:
        raise _unreadable(source, error) from error
    with container:
        kinds = sorted({track.type for track in container.streams})
        has_video = len(container.streams.video) > 0
        require(has_video, "source", str(source), f"a video stream in the file; it has {kinds}")
        track = container.streams.video[0]
        frames = _decoded(av, source, container.decode(track))
        yield frames, track.average_rate or 25, track.frames or None


def _decoded(av: ModuleType, source: Path, frames: Iterator[Any]) -> Iterator[np.ndarray]:
    shape = None
    try:
        for number, frame in enumerate(frames):
            shape = shape or (frame.height, frame.width)
            if (frame.height, frame.width) != shape:
                raise ValueError(
                    f"source={str(source)!r}: frame {number} has {frame.height}×{frame.width} px: "
                    f"expected {shape[0]}×{shape[1]} px as in the frames before"
                )
            picture = frame.to_ndarray(format="rgb24")
            yield picture[: max(2, shape[0] // 2 * 2), : max(2, shape[1] // 2 * 2)]
    except av.FFmpegError as error:
        raise _unreadable(source, error) from error


def _unreadable(source: Path, error: Exception) -> ValueError:
    return ValueError(f"source={str(source)!r}: expected a video that can be read ({error})")


@contextmanager
def _written(av: ModuleType, out: Path, rate: Any) -> Iterator[Callable[[np.ndarray], None]]:
    """Yield a function that appends a frame to the video `out`, which is there at the end."""
    with atomic_write(out) as temporary:
        try:
            container = av.open(str(temporary), "w")
            codec = container.default_video_codec
        except ValueError:
            codec = "none"  # as of a sound file
        require(codec != "none", "out", str(out), "the suffix of a video, like .mp4")
        track = None

        def write(picture: np.ndarray) -> None:
            nonlocal track
            if track is None:
                track = container.add_stream(codec, rate=rate)
                track.height, track.width = picture.shape[:2]
                track.pix_fmt = track.codec.video_formats[0].name
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            container.mux(track.encode(frame))

        try:
            with container:
                yield write
                if track is not None:
                    container.mux(track.encode())
        except av.FFmpegError as error:
            raise ValueError(f"out={str(out)!r}: it cannot be written ({error})") from error


def _pyav() -> ModuleType:
    try:
        import av
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'video files are read by PyAV: pip install "attnlab[video]"'
        ) from error
    return av
