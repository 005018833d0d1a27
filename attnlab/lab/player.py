"""The player: step through a clip and see where flow and attention fetch its features from."""

from collections.abc import Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor

from attnlab.lab import metrics
from attnlab.lab.pages import PageFigure, data_uri, pack


class Player(PageFigure):
    """Step through the frames of a clip: this frame, the one it is fed from, and what comes out.

    The last line of a notebook cell shows it. All data are in the page.

    Args:
        frames: `(T, 3, H, W)`, values in [0, 1].
        keys: for each of the T frames, the number of the key frame whose features it uses; its own
            number for a key frame. Never a later frame.
        flow: `(T, 2, h, w)`, (dx, dy) in px of the image: the content at a cell's center in frame t
            is that much farther in frame `keys[t]`.
        weights: `(T, L, h, w)`, L = (2R + 1)²: how much of each cell of the key frame, row by row
            in a window of radius R, goes into a cell of frame t. Those of key frames are not shown.
        truth: `(T, H, W)` bool, where the things are.
        results: where each way of computing says that they are, `(T, H, W)` bool, by its name; the
            first is shown first.
        image_size: width of each picture on the page, in pixels.
        title: what stands above the figure.
        alt: what a screen reader says about it.
        max_bytes: the largest size of the notebook's output.

    Raises:
        ValueError: an argument is not as said, or the output would be larger than `max_bytes`.
    """

    script, around = "player", 330

    def __init__(
        self,
        frames: Tensor,
        keys: Sequence[int],
        flow: Tensor,
        weights: Tensor,
        truth: Tensor,
        results: Mapping[str, Tensor],
        *,
        image_size: int = 240,
        title: str = "Where does it come from?",
        alt: str | None = None,
        max_bytes: int = 300_000,
    ):
        if frames.ndim != 4 or frames.shape[1] != 3:
            raise ValueError(f"frames {tuple(frames.shape)}: expected (T, 3, H, W)")
        T, _, height, width = frames.shape
        self.keys = [int(key) for key in keys]
        if len(self.keys) != T or any(not 0 <= key <= t for t, key in enumerate(self.keys)):
            raise ValueError(f"keys={self.keys}: expected {T} numbers, none of a later frame")
        if flow.ndim != 4 or flow.shape[:2] != (T, 2):
            raise ValueError(f"flow {tuple(flow.shape)}: expected ({T}, 2, h, w)")
        h, w = self.grid = tuple(flow.shape[2:])
        self.radius = round((weights.shape[1] ** 0.5 - 1) / 2) if weights.ndim == 4 else 0
        if weights.shape != (T, (2 * self.radius + 1) ** 2, h, w):
            expected = f"({T}, (2R + 1)², {h}, {w})"
            raise ValueError(f"weights {tuple(weights.shape)}: expected {expected}")
        if not results:
            raise ValueError("results is empty: expected at least one")
        for name, mask in {"truth": truth, **results}.items():
            if mask.shape != (T, height, width) or mask.dtype != torch.bool:
                found = f"{mask.dtype} {tuple(mask.shape)}"
                raise ValueError(f"{name} {found}: expected torch.bool ({T}, {height}, {width})")
        self.frames, self.flow, self.weights, self.truth = (
            tensor.detach().cpu() for tensor in (frames.float(), flow, weights.float(), truth)
        )
        self.results = {name: mask.cpu() for name, mask in results.items()}
        self.scores = {name: _scores(mask, self.truth) for name, mask in self.results.items()}
        self.image_size, self.title, self.aspect = image_size, title, height / width
        self.alt = alt or f"A clip of {T} frames, each fed from a key frame"
        self._check_size(max_bytes, f"the player of {T} frames", "show fewer frames or results")

    def __repr__(self) -> str:
        names = ", ".join(self.results)
        return f"Player({len(self.keys)} frames, radius {self.radius}, {names})"

    def figure(self, frame: int, cell: tuple[int, int], result: str | None = None):
        """One view of the page as a matplotlib picture, for paper; returns its three axes.

        Args:
            frame: number of a frame that is not a key frame.
            cell: `(row, column)`.
            result: the result's name; the first by default.

        Raises:
            ValueError: there is no such frame, cell or result.
        """
        name = next(iter(self.results)) if result is None else result
        fed = [t for t, key in enumerate(self.keys) if key != t]
        if frame not in fed:
            raise ValueError(f"frame={frame}: expected one that is no key frame, of {fed}")
        if not (0 <= cell[0] < self.grid[0] and 0 <= cell[1] < self.grid[1]):
            raise ValueError(f"cell={cell}: expected (row, column) within {self.grid}")
        if name not in self.results:
            raise ValueError(f"result={name!r}: expected one of {', '.join(self.results)}")
        return _draw(self, frame, cell, name)

    def window(self, frame: int, cell: tuple[int, int]) -> Tensor:
        """The weights of one cell as a map over the key frame's cells, `(h, w)`."""
        (h, w), R = self.grid, self.radius
        side = 2 * R + 1
        seen = torch.zeros(h + 2 * R, w + 2 * R)
        there = self.weights[frame, :, cell[0], cell[1]].view(side, side)
        seen[cell[0] : cell[0] + side, cell[1] : cell[1] + side] = there
        return seen[R : R + h, R : R + w]

    def _data(self) -> dict:
        T, _, height, width = self.frames.shape
        fed = [t for t, key in enumerate(self.keys) if key != t]
        masks = {"truth": self.truth, **self.results}
        return {
            "title": self.title,
            "alt": self.alt,
            "keys": self.keys,
            "grid": list(self.grid),
            "radius": self.radius,
            "strip": data_uri(rearrange(self.frames, "t c h w -> c h (t w)"), T * width),
            "size": [height, width],
            "flow": [[round(v, 1) for v in frame.flatten().tolist()] for frame in self.flow],
            "weights": pack(rearrange(self.weights[fed], "t l h w -> (t h w) l")),
            "masks": {name: [_runs(frame) for frame in mask] for name, mask in masks.items()},
            "scores": {name: [round(s, 3) for s in score] for name, score in self.scores.items()},
            "width": self.image_size,
        }


def _scores(mask: Tensor, truth: Tensor) -> list[float]:
    """mIoU of things and background, frame by frame."""
    pairs = zip(mask.long(), truth.long(), strict=True)
    return [metrics.mean_iou(metrics.confusion_matrix(found, there, 2)) for found, there in pairs]


def _runs(mask: Tensor) -> list[int]:
    """Lengths of the runs of a mask read row by row, the first of False (it may be 0)."""
    flat = mask.flatten().int()
    edges = (flat.diff(prepend=torch.zeros(1, dtype=torch.int32)) != 0).nonzero().flatten()
    return torch.cat([edges, torch.tensor([len(flat)])]).diff(prepend=torch.zeros(1)).int().tolist()


def _draw(player: Player, frame: int, cell: tuple[int, int], name: str):
    import matplotlib.pyplot as plt

    from attnlab.lab import plots

    _, _, height, width = player.frames.shape
    (h, w), key = player.grid, player.keys[frame]
    row, column = cell
    x, y = (column + 0.5) * width / w, (row + 0.5) * height / h
    dx, dy = player.flow[frame, :, row, column].tolist()
    now, fed = (player.frames[t].permute(1, 2, 0).numpy() for t in (frame, key))
    with plots.style():
        _, axes = plt.subplots(1, 3, figsize=(8.4, 3))
    extent = (0, width, height, 0)
    for ax, picture in zip(axes, (now, fed, now), strict=True):
        ax.imshow(picture, extent=extent)
        ax.set(xticks=[], yticks=[])
    seen = player.window(frame, cell)
    axes[1].imshow(seen.numpy(), extent=extent, cmap="inferno", alpha=0.65, vmin=0)
    for ax, ink in ((axes[0], "#3fd8ff"), (axes[1], "white")):
        ax.plot(x, y, "s", color=ink, fillstyle="none", markersize=11, markeredgewidth=2)
    axes[1].plot(x + dx, y + dy, "x", color="#3fd8ff", markersize=10, markeredgewidth=3)
    centers = [(torch.arange(side) + 0.5).numpy() for side in (width, height)]
    for mask, ink in ((player.truth, "#3fd8ff"), (player.results[name], "#e69f00")):
        if mask[frame].any() and not mask[frame].all():
            axes[2].contour(*centers, mask[frame].float().numpy(), [0.5], colors=ink)
    axes[0].set_title(f"frame {frame}")
    axes[1].set_title(f"key frame {key}: weights, × flow")
    axes[2].set_title(f"{name}: mIoU {player.scores[name][frame]:.2f}")
    return axes
