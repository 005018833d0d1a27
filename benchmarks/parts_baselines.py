"""Is `parts` learnable but not trivial? Chance, colors, pixels and a small transformer.

    python benchmarks/parts_baselines.py [--machine NAME] [--threads 2] [--only vit_mini] [--quick]

Trains a classifier on the color histogram (linear, and with a hidden layer), a linear classifier on
the pixels, and `vit_mini`, each on the same images; prints their test accuracy and writes
benchmarks/results/parts_baselines-NAME.json.
"""

import torch
from _common import arguments, table, write
from einops import rearrange
from torch import Tensor, nn
from torchvision.transforms.v2 import Normalize

from attnlab.attention import vit_mini
from attnlab.lab import data
from attnlab.lab.batches import flip_and_shift
from attnlab.lab.train import accuracy, fit

BINS = 4  # of each color channel


class ColorHistogram(nn.Module):
    """Images (B, 3, H, W) to the square roots of their shares of pixels by color (B, BINS³)."""

    def forward(self, images: Tensor) -> Tensor:
        red, green, blue = (images * BINS).long().clamp(max=BINS - 1).unbind(1)
        color = rearrange((red * BINS + green) * BINS + blue, "b h w -> b (h w)")
        counts = images.new_zeros(len(images), BINS**3)
        counts.scatter_add_(1, color, torch.ones_like(color, dtype=counts.dtype))
        return (counts / color.shape[1]).sqrt()


def models() -> dict[str, tuple[nn.Module, dict]]:
    """Row → model and how it is trained."""
    colors, normalize = BINS**3, Normalize([0.5] * 3, [0.25] * 3)
    hidden = nn.Sequential(nn.Linear(colors, 128), nn.ReLU(), nn.Linear(128, 8))
    pixels = nn.Sequential(normalize, nn.Flatten(), nn.Linear(3 * 64 * 64, 8))
    augmented = {"augment": flip_and_shift}
    return {
        "color histogram, linear": (
            nn.Sequential(ColorHistogram(), nn.Linear(colors, 8)),
            {"steps": 2000, "lr": 3e-2, "weight_decay": 0.0},
        ),
        "color histogram, one hidden layer": (
            nn.Sequential(ColorHistogram(), hidden),
            {"steps": 3000, "lr": 3e-3, "weight_decay": 0.01},
        ),
        "pixels, linear": (pixels, {"steps": 2000, "lr": 1e-4, "weight_decay": 1.0, **augmented}),
        "vit_mini": (
            nn.Sequential(normalize, vit_mini()),
            {"steps": 1300, "lr": 1e-3, **augmented},
        ),
    }


def main() -> None:
    parser = arguments(__doc__, quick="few images and steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="the rows to train")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train = data.load("parts", "train", n=512 if args.quick else 20_000)
    test = data.load("parts", "test", n=256 if args.quick else 2_000)

    measured = {"chance": {"accuracy": test.tensors["label"].bincount().max().item() / len(test)}}
    torch.manual_seed(args.seed)
    for row, (model, recipe) in models().items():
        if args.only and row not in args.only:
            continue
        steps = 20 if args.quick else recipe["steps"]
        history = fit(
            model, train, **{**recipe, "steps": steps}, seed=args.seed, device=args.device
        )
        measured[row] = {
            "accuracy": accuracy(model, test, device=args.device),
            "steps": steps,
            "seconds": round(history.seconds, 1),
        }
    print(table(["8 object types, test", "accuracy", "steps", "seconds"], [
        [row, f"{cell['accuracy']:.3f}", cell.get("steps", "–"), cell.get("seconds", "–")]
        for row, cell in measured.items()
    ]))  # fmt: skip
    write("parts_baselines", args, {"rows": measured})


if __name__ == "__main__":
    main()
