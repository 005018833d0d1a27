"""Experiments of chapter 06: what the kernel, the norm and γ of CGNL change, and motion in clips.

Each function trains small models at one budget and returns `{row: {metric: value}}` for one seed;
`attnlab results` runs it over several seeds and writes `results/06_cgnl.NAME.json`.
"""

from collections.abc import Sequence

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from attnlab.cgnl import CGNLBlock
from attnlab.lab import cost, toys, train
from attnlab.non_local import NonLocalBlock

CHAPTER = "06_cgnl"
RERUN = ("motion", "3×3×3 stem")

KEY_PATCH_BLOCKS = {
    "none": lambda: nn.Identity(),
    "non-local": lambda: NonLocalBlock(32),
    "CGNL dot, GroupNorm": lambda: CGNLBlock(32, groups=4),
    "CGNL dot, one GroupNorm": lambda: CGNLBlock(32, groups=4, norm_groups=1),
    "CGNL dot, BatchNorm": lambda: CGNLBlock(32, groups=4, norm="bn"),
    "CGNL dot, no norm": lambda: CGNLBlock(32, groups=4, norm="none", use_scale=True),
    "CGNL rbf, γ = 1e-4": lambda: CGNLBlock(32, groups=4, kernel="rbf"),
    "CGNL rbf, γ = 0.5": lambda: CGNLBlock(32, groups=4, kernel="rbf", gamma=0.5),
}


def layer(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


def segmenter(block: nn.Module) -> nn.Sequential:
    """Images (B, 3, H, W) → scores (B, 3 classes, H, W); but for `block`, it sees 7×7 pixels."""
    return nn.Sequential(layer(3, 32), layer(32, 32), block, layer(32, 32), nn.Conv2d(32, 3, 1))


def spread_out(block: nn.Module) -> nn.Module:
    """PyTorch's initialisation for a block's 1×1 maps: small maps learn slowly from N(0, 0.01²)."""
    for name, part in block.named_children():
        if name != "norm" and hasattr(part, "reset_parameters"):
            part.reset_parameters()
    if isinstance(block, CGNLBlock) and isinstance(block.norm, nn.Identity):
        nn.init.zeros_(block.out.weight)
    return block


def segmentation_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross entropy in which a background pixel counts a fifth."""
    weight = torch.tensor([0.2, 1.0, 1.0], device=batch["image"].device)
    return F.cross_entropy(model(batch["image"]), batch["label"], weight=weight)


@torch.no_grad()
def shape_accuracy(model: nn.Module, data: dict[str, Tensor], device) -> float:
    """Share of the shapes' pixels whose class is right."""
    found = model(data["image"].to(device)).argmax(1).cpu()
    on_shapes = data["shape"] > 0
    return (found == data["label"])[on_shapes].float().mean().item()


def key_patch(seed: int, device, rows: Sequence[str] = tuple(KEY_PATCH_BLOCKS)) -> dict:
    """Carry one bit from the corner to every shape: 600 steps of 32, chance 1/2."""
    data = toys.key_patch(2_048, seed=2 * seed)
    test = toys.key_patch(256, seed=2 * seed + 1)
    results = {}
    for row in rows:
        train.seed_everything(seed)
        model = segmenter(spread_out(KEY_PATCH_BLOCKS[row]()))
        train.fit(
            model, data, loss=segmentation_loss, steps=600, batch_size=32, lr=3e-3,
            weight_decay=0.0, seed=seed, device=device, progress=False,
        )  # fmt: skip
        results[row] = {"accuracy": shape_accuracy(model, test, device)}
    return results


def inflate(conv: nn.Conv2d, frames: int = 3) -> nn.Conv3d:
    """A (frames, k, k) convolution whose kernel is the 2-D one, copied `frames` times, / `frames`.

    On a clip that stands still it gives what the 2-D one gives on the image, but for the first and
    last frames // 2 frames, where the clip is padded with zeros.
    """
    time = frames // 2
    inflated = nn.Conv3d(
        conv.in_channels, conv.out_channels, (frames, *conv.kernel_size), (1, *conv.stride),
        (time, *conv.padding), bias=conv.bias is not None,
    )  # fmt: skip
    with torch.no_grad():
        inflated.weight.copy_(repeat(conv.weight, "o i h w -> o i t h w", t=frames) / frames)
        if conv.bias is not None:
            inflated.bias.copy_(conv.bias)
    return inflated


CLIP = {"frames": 4, "size": 16, "speed": 3, "noise": 0.02}


class ClipClassifier(nn.Module):
    """Convolutions frame by frame, a 3-D block on (B, 32, T, H/4, W/4), the mean over all.

    Clips (B, 3, T, H, W) → scores (B, classes). With `inflated` the first convolution is 3×3×3;
    with `numbered` every frame and place gets a learned vector of its own before the block.
    """

    def __init__(self, block: nn.Module, classes: int = 4, inflated=False, numbered=False):
        super().__init__()
        stem = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        places = CLIP["frames"], CLIP["size"] // 4, CLIP["size"] // 4
        self.stem = inflate(stem, frames=3 if inflated else 1)
        self.norm = nn.BatchNorm3d(16)
        self.down = nn.Sequential(
            nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()
        )
        self.number = nn.Parameter(0.1 * torch.randn(32, *places)) if numbered else None
        self.block = block
        self.last = layer(32, 32)
        self.head = nn.Linear(32, classes)

    def forward(self, clips: Tensor) -> Tensor:
        x = by_frame(self.down, self.norm(self.stem(clips)).relu())
        x = self.block(x if self.number is None else x + self.number)
        return self.head(reduce(by_frame(self.last, x), "b c t h w -> b c", "mean"))


def by_frame(image_layer: nn.Module, clips: Tensor) -> Tensor:
    """`image_layer` on every frame of (B, C, T, H, W) by itself."""
    x = image_layer(rearrange(clips, "b c t h w -> (b t) c h w"))
    return rearrange(x, "(b t) c h w -> b c t h w", b=len(clips))


def clip_blocks(name: str) -> nn.Module:
    """The fresh 3-D block that the name of a row speaks of; the identity where there is none."""
    if "non-local" in name:
        return NonLocalBlock(32, ndim=3)
    if "CGNL" in name:
        return CGNLBlock(32, groups=4, norm="none", use_scale=True, ndim=3)
    return nn.Identity()


def clip_classifier(row: str) -> ClipClassifier:
    """The network of a row of `motion`, initialised from torch's global generator."""
    block = spread_out(clip_blocks(row))
    return ClipClassifier(block, inflated="stem" in row, numbered="numbers" in row)


MOTION_ROWS = (
    "C2D",
    "numbers",
    "numbers, non-local",
    "numbers, CGNL",
    "3×3×3 stem",
    "3×3×3 stem, non-local",
    "3×3×3 stem, CGNL",
)


def motion(seed: int, device, rows: Sequence[str] = MOTION_ROWS) -> dict:
    """In which of four directions does the disc go? 400 steps of 32 clips, chance 1/4."""
    data = toys.motion_direction(8_192, seed=2 * seed, **CLIP)
    test = toys.motion_direction(512, seed=2 * seed + 1, **CLIP)
    results = {}
    for row in rows:
        train.seed_everything(seed)
        model = clip_classifier(row)
        train.fit(
            model, data, steps=400, batch_size=32, lr=3e-3, weight_decay=0.0, label_smoothing=0.0,
            seed=seed, device=device, progress=False,
        )  # fmt: skip
        with torch.no_grad():
            right = model(test["image"].to(device)).argmax(1).cpu() == test["label"]
        results[row] = {
            "accuracy": right.float().mean().item(),
            "thousand parameters": cost.parameters(model) / 1e3,
            "million MACs": cost.macs(model, test["image"][:1].to(device)) / 1e6,
        }
    return results
