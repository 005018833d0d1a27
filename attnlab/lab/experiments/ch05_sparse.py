"""More experiments of chapter 05: what sparse patterns can answer, and how robust they are.

Each function trains small models at one budget and returns `{row: {metric: value}}` for one seed;
`attnlab results` runs it over several seeds and writes `results/05_context.NAME.json`.
"""

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from attnlab.lab import data, toys, train
from attnlab.lab.experiments.ch01 import small_vit
from attnlab.sparse import (
    AxialAttention,
    AxisAttention,
    CrissCrossAttention,
    InterlacedSparseAttention,
    NeighborhoodAttention,
    WindowAttention,
)

CHAPTER = "05_context"

WIDTH = 32  # channels of the toy's network


class Residual(nn.Module):
    """x + layer(x), for each layer in turn."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def window(size: int, shift: int = 0) -> nn.Module:
    return WindowAttention(WIDTH, size, num_heads=4, shift_size=shift)


# What stands in the place of the non-local block, on a map of 16×16.
PATTERNS: dict[str, Callable[[], nn.Module]] = {
    "full (a window of 16)": lambda: Residual(window(16)),
    "window 8": lambda: Residual(window(8)),
    "window 8, then shifted by 4": lambda: Residual(window(8), window(8, 4)),
    "axial": lambda: Residual(AxialAttention(WIDTH, num_heads=4)),
    "interlaced, cells of 4": lambda: InterlacedSparseAttention(WIDTH, cell=4, drop=0.0),
    "criss-cross, R = 1": lambda: CrissCrossAttention(WIDTH, recurrence=1),
    "criss-cross, R = 2": lambda: CrissCrossAttention(WIDTH, recurrence=2),
}


def toy_network(middle: nn.Module) -> nn.Sequential:
    """Images (B, 3, H, W) → scores (B, 2); but for `middle`, a place sees 5×5 pixels."""

    def conv(channels: int, kernel: int) -> list[nn.Module]:
        layer = nn.Conv2d(channels, WIDTH, kernel, padding=kernel // 2, bias=False)
        return [layer, nn.BatchNorm2d(WIDTH), nn.ReLU()]

    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 2)
    return nn.Sequential(*conv(3, 3), *conv(WIDTH, 3), middle, *conv(WIDTH, 1), *head)


def patterns(seed: int, device, rows: Sequence[str] = tuple(PATTERNS)) -> dict:
    """Are the two squares of one color? 4,096 images, 400 steps; on all, and by where they lie."""
    samples, test = toys.same_different(4_096, seed=seed), toys.same_different(4_096, seed=10_000)
    top = test["masks"].any(dim=3).float().argmax(dim=2)  # (n, 2), the upper row of both squares
    apart = (top[:, 0] - top[:, 1]).abs()
    # A feature sees 5×5 pixels: from a distance of 7 on, no row of the map has heard both squares.
    subsets = {"accuracy": apart >= 0, "in a common row": apart <= 2, "no common row": apart >= 7}
    found = {}
    for row in rows:
        train.seed_everything(seed)
        model = toy_network(PATTERNS[row]())
        train.fit(
            model, samples, steps=400, batch_size=64, lr=3e-3, label_smoothing=0.0, seed=seed,
            device=device, progress=False,
        )  # fmt: skip
        found[row] = {
            name: train.accuracy(model, {key: x[subset] for key, x in test.items()}, device=device)
            for name, subset in subsets.items()
        }
    return found


class OnGrid(nn.Module):
    """Attention on maps as a layer of a vision transformer without a class token."""

    def __init__(self, attention: nn.Module, rows: int):
        super().__init__()
        self.attention, self.rows = attention, rows

    def forward(self, x: Tensor) -> Tensor:
        grid = rearrange(x, "b (h w) d -> b d h w", h=self.rows)
        return rearrange(self.attention(grid), "b d h w -> b (h w) d")


# The attention of each of three blocks, on a grid of 8×8 tokens of width 48; None: dense.
# The second row is a control: a dense model that is no better than the sparse ones.
LAYERS: dict[str, Callable[[int], nn.Module] | None] = {
    "dense, 64 keys": None,
    "dense, half the steps": None,
    "windows 4, 16 keys": lambda i: WindowAttention(48, 4, num_heads=3, shift_size=2 * (i % 2)),
    "neighbourhood 3, 9 keys": lambda i: NeighborhoodAttention(48, 3, num_heads=3),
    "rows, columns, rows, 8 keys": lambda i: AxisAttention(48, ("row", "column")[i % 2], 3),
}


def sparse_vit(row: str) -> nn.Module:
    """The small ViT of chapter 01 with sparse attention; as many parameters in every row."""
    model = small_vit()
    for i, block in enumerate(model.blocks):
        if LAYERS[row] is not None:
            block.attn = OnGrid(LAYERS[row](i), rows=8)
    model.init_weights()
    return model


def corrupted(images: Tensor, kind: str, level: float, seed: int = 0) -> Tensor:
    """Images (n, 3, H, W) with "noise" of a standard deviation `level`, or with "occlusion": a gray
    square of side `level` · H at a random place."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "noise":
        noise = torch.randn(images.shape, generator=generator)
        return (images + level * noise).clamp(0, 1)
    n, side = len(images), images.shape[-1]
    hole = round(level * side)
    top, left = torch.randint(side - hole + 1, (2, n, 1), generator=generator)
    place = torch.arange(side)
    rows, cols = ((place >= first) & (place < first + hole) for first in (top, left))
    return images.masked_fill((rows[:, :, None] & cols[:, None])[:, None], 0.5)


def robustness(seed: int, device, rows: Sequence[str] = tuple(LAYERS)) -> dict:
    """Is sparser more robust? Trained for 600 steps on clean images, tested on spoiled ones."""
    samples = data.load("parts", "train", n=10_000, size=32)
    test = data.load("parts", "test", n=2_000, size=32).batch(torch.arange(2_000))
    spoiled = {"clean": test["image"]}
    for level in (0.1, 0.2):
        spoiled[f"noise {level}"] = corrupted(test["image"], "noise", level)
    for level in (0.25, 0.5):
        spoiled[f"hole {level:.0%} wide"] = corrupted(test["image"], "occlusion", level)
    found = {}
    for row in rows:
        train.seed_everything(seed)
        model = sparse_vit(row)
        train.fit(
            model, samples, steps=300 if row == "dense, half the steps" else 600, batch_size=64,
            lr=2e-3, seed=seed, device=device, augment=train.flip_and_shift, progress=False,
        )  # fmt: skip
        found[row] = {
            name: train.accuracy(model, {"image": images, "label": test["label"]}, device=device)
            for name, images in spoiled.items()
        }
    return found
