"""Experiments of chapter 02: what a comparison of far positions needs, and which options matter.

Each function trains small networks at one budget and returns `{row: {metric: value}}` for one seed;
`attnlab results` runs it over several seeds and writes `results/02_non_local.NAME.json`.
"""

from collections.abc import Callable

from torch import Tensor, nn

from attnlab.lab import cost, toys, train
from attnlab.non_local import NonLocalBlock

CHAPTER = "02_non_local"
RERUN = ("same_different", "dot product")
WIDTH = 32


class ResidualBlock(nn.Module):
    """x + BN(conv(ReLU(BN(conv(x))))), 3×3 convolutions: `(B, C, H, W)` → the same shape."""

    def __init__(self, channels: int):
        super().__init__()
        self.branch = nn.Sequential(
            *conv_bn_relu(channels, channels, 3),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def conv_bn_relu(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    """A convolution that keeps the map's size, a norm, a ReLU."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


def small_net(middle: nn.Module) -> nn.Sequential:
    """Two 3×3 convolutions, `middle`, a 1×1 convolution, the mean over positions, two classes.

    Images `(B, 3, H, W)` → logits `(B, 2)`; `middle` is given and returns `(B, 32, H, W)`.
    """
    return nn.Sequential(
        conv_bn_relu(3, WIDTH, 3),
        conv_bn_relu(WIDTH, WIDTH, 3),
        middle,
        conv_bn_relu(WIDTH, WIDTH, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(WIDTH, 2),
    )


def fit_same_different(model: nn.Module, seed: int, device, epochs: int = 12, **options):
    """Train on 4,096 images of the toy, with one budget for all rows; `options` are `fit`'s."""
    images = toys.same_different(4_096, seed=seed)
    return train.fit(
        model, images, epochs=epochs, batch_size=64, lr=3e-3, warmup=0.1, label_smoothing=0.0,
        seed=seed, device=device, **options,
    )  # fmt: skip


def compare(middles: dict[str, Callable[[], nn.Module]], seed: int, device) -> dict:
    """Train `small_net` with each of `middles`; accuracy on 1,024 new images, size and cost."""
    test = toys.same_different(1_024, seed=1_000 + seed)
    rows = {}
    for row, middle in middles.items():
        train.seed_everything(seed)
        model = small_net(middle())
        fit_same_different(model, seed, device, progress=False)
        rows[row] = {
            "accuracy": train.accuracy(model, test, device=device),
            "parameters": cost.parameters(model),
            "MMACs": cost.macs(model, test["image"][:1].to(device)) / 1e6,
        }
    return rows


def same_different(seed: int, device, rows: tuple[str, ...] | None = None) -> dict:
    """Are two squares at opposite borders of the same color? Chance is 1/2; 12 epochs."""
    middles = {
        "nothing": nn.Identity,
        "a residual block": lambda: ResidualBlock(WIDTH),
        "four residual blocks": lambda: nn.Sequential(*[ResidualBlock(WIDTH) for _ in range(4)]),
        "Gaussian": lambda: NonLocalBlock(WIDTH, kind="gaussian"),
        "embedded Gaussian": lambda: NonLocalBlock(WIDTH),
        "dot product": lambda: NonLocalBlock(WIDTH, kind="dot_product"),
        "concatenation": lambda: NonLocalBlock(WIDTH, kind="concatenation"),
    }
    return compare({row: middles[row] for row in rows or middles}, seed, device)


def options(seed: int, device, rows: tuple[str, ...] | None = None) -> dict:
    """The embedded Gaussian with one of its options changed: the task and budget of the others."""
    middles = {
        "as in the paper": lambda: NonLocalBlock(WIDTH),
        "keys sub-sampled": lambda: NonLocalBlock(WIDTH, subsample=True),
        "scores divided by √16": lambda: NonLocalBlock(WIDTH, use_scale=True),
        "inner width 4": lambda: NonLocalBlock(WIDTH, inter_channels=4),
        "no norm, W_z = 0": lambda: NonLocalBlock(WIDTH, norm=None),
        "dead: norm and W_z both 0": dead_block,
    }
    return compare({row: middles[row] for row in rows or middles}, seed, device)


def dead_block() -> NonLocalBlock:
    """A block with zeros in both places that make it the identity."""
    block = NonLocalBlock(WIDTH)
    nn.init.zeros_(block.z.weight)
    return block
