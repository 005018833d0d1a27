"""What every model of chapter 07 has in common: it takes a video frame by frame, and counts.

Memory does not grow with the video. A frame of another size than the one before is an error, until
`reset` says that a new video begins.
"""

from torch import Tensor, nn

from attnlab.layers import check_map


class VideoModel(nn.Module):
    """A backbone, a head, and what a stream of frames leaves behind.

    Attributes:
        n_backbone, n_propagate: how often features were computed, and moved, since `reset`.
        last_features: the map `(B, C, h, w)` that the head saw at the last `step`.
        last_was_key: whether that frame was a key frame.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head
        self.reset()

    def reset(self) -> None:
        """Forget the video: the next frame is a first one, of any size."""
        self.n_backbone = self.n_propagate = 0
        self.last_features: Tensor | None = None
        self.last_was_key = False
        self._shape: tuple[int, ...] | None = None

    def _check_frame(self, frame: Tensor) -> None:
        check_map(frame, name="frame")
        if self._shape is not None and tuple(frame.shape) != self._shape:
            raise ValueError(
                f"frame {tuple(frame.shape)}: expected {self._shape} as before; call reset() "
                "before a new video"
            )
        self._shape = tuple(frame.shape)

    def _answer(self, features: Tensor, was_key: bool):
        self.last_features, self.last_was_key = features, was_key
        return self.head(features)


def check_interval(interval: int | None) -> None:
    """`ValueError` unless a key frame every so many frames; None leaves it to the model."""
    if interval is not None and interval < 1:
        raise ValueError(f"interval={interval}: expected at least 1")


def check_frames(**frames: Tensor) -> None:
    """`ValueError` unless all are images `(B, C, H, W)` of one shape."""
    shapes = {name: tuple(x.shape) for name, x in frames.items()}
    if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 4:
        given = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"{given}: expected frames (B, C, H, W) of one shape")
