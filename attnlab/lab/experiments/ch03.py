"""Experiments of chapter 03: what a factor per channel buys, where it goes, what kernels share.

Each function trains small models at one budget and returns `{row: {metric: value}}` for one seed;
`attnlab results` runs it over several seeds and writes
`results/03_squeeze_excitation.NAME.json`.
"""

from collections.abc import Callable
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from attnlab.channel import SelectiveKernel, SqueezeExcite, se_resnet_mini
from attnlab.lab import data, train
from attnlab.non_local import NonLocalBlock
from attnlab.probe import record
from attnlab.resnet import Bottleneck, ResNet, resnet_mini

CHAPTER = "03_squeeze_excitation"
RERUN = ("color", "squeeze-and-excitation")


def fit_scenes(model: nn.Module, seed: int, device, size: int = 64, **options):
    """8,192 photographic scenes, shifted and mirrored; `options` are `fit`'s."""
    samples = data.load("scenes", "train", size=size)
    return train.fit(
        model, samples, batch_size=64, lr=3e-3, seed=seed, device=device,
        augment=train.flip_and_shift, **options,
    )  # fmt: skip


def scenes_accuracy(model: nn.Module, device, size: int = 64) -> dict[str, float]:
    """On new scenes of cut-outs that were seen in training, and of cut-outs that were not."""
    return {
        name: train.accuracy(model, data.load("scenes", split, size=size), device=device)
        for name, split in (("seen objects", "test_scenes"), ("new objects", "test_unseen"))
    }


def dominant_color(images: Tensor) -> Tensor:
    """Keep the channel of `(B, 3, H, W)` whose mean over the image is largest; zero the others."""
    winner = images.mean((2, 3)).argmax(1)
    return images * rearrange(F.one_hot(winner, 3), "b c -> b c 1 1")


def tinted_scenes(split: str, n: int, seed: int) -> dict[str, Tensor]:
    """Small scenes in a random tint, `image (n, 3, 16, 16)`, and their dominant color, `target`.

    The tint multiplies each channel by a number from 0.3 to 1 that holds for the whole image.
    """
    scenes = data.load("scenes", split, n=n, size=16).batch(slice(None))["image"]
    generator = torch.Generator().manual_seed(seed)
    images = scenes * (0.3 + 0.7 * torch.rand(n, 3, 1, 1, generator=generator))
    return {"image": images, "target": dominant_color(images)}


COLOR_BLOCKS: dict[str, Callable[[int], nn.Module]] = {
    "no block": lambda channels: nn.Identity(),
    "non-local, embedded Gaussian": partial(NonLocalBlock, norm=None),
    "non-local, dot product": partial(NonLocalBlock, kind="dot_product", norm=None),
    "squeeze-and-excitation": partial(SqueezeExcite, reduction=1),
}


def color_network(block: Callable[[int], nn.Module]) -> nn.Sequential:
    """One block between two linear maps of colors: 3 → 16 → 3 channels, any image size."""
    return nn.Sequential(nn.Conv2d(3, 16, 1), block(16), nn.Conv2d(16, 3, 1))


def color_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean absolute difference from the target."""
    return F.l1_loss(model(batch["image"]), batch["target"])


def fit_colors(model: nn.Module, seed: int, device, **options):
    """Learn to keep the dominant color of 4,096 scenes of 16×16 pixels; `options` are `fit`'s."""
    return train.fit(
        model, tinted_scenes("train", 4_096, seed), loss=color_loss, batch_size=64, lr=1e-2,
        weight_decay=0.0, seed=seed, device=device, **options,
    )  # fmt: skip


def color(seed: int, device, rows=tuple(COLOR_BLOCKS)) -> dict:
    """The mean absolute error of one block on objects and backgrounds never seen: 600 steps."""
    test = tinted_scenes("test_unseen", 1_024, seed=100 + seed)
    batch = {name: tensor.to(device) for name, tensor in test.items()}
    result = {}
    for row in rows:
        train.seed_everything(seed)
        model = color_network(COLOR_BLOCKS[row])
        fit_colors(model, seed, device, steps=600, progress=False)
        with torch.no_grad():
            result[row] = {"error": color_loss(model, batch).item()}
    return result


def competing(logits: Tensor) -> Tensor:
    """Factors with mean 1 that the channels take from each other: C · softmax over channels."""
    return logits.shape[1] * logits.softmax(1)


def after_addition() -> ResNet:
    """SE after the sum of branch and shortcut (the paper's SE-POST), here after its ReLU."""
    make = partial(SqueezeExcite, reduction=4)
    return resnet_mini(after={f"layer{stage}.0": make for stage in range(1, 5)})


SCENE_MODELS: dict[str, Callable[[], ResNet]] = {
    "no block": resnet_mini,
    "SE, r = 16": partial(se_resnet_mini, reduction=16),
    "SE, r = 4": partial(se_resnet_mini, reduction=4),
    "r = 4, gate ReLU": lambda: resnet_mini(
        inside=partial(SqueezeExcite, reduction=4, gate=torch.relu)
    ),
    "r = 4, gate softmax over channels": lambda: resnet_mini(
        inside=partial(SqueezeExcite, reduction=4, gate=competing)
    ),
    "r = 4, after the addition": after_addition,
}


def scenes(seed: int, device, rows=tuple(SCENE_MODELS)) -> dict:
    """Eight classes of objects on photographs: 64 pixels, 300 steps, only the block differs."""
    result = {}
    for row in rows:
        train.seed_everything(seed)
        model = SCENE_MODELS[row]()
        fit_scenes(model, seed, device, steps=300, progress=False)
        result[row] = scenes_accuracy(model, device)
    return result


def bottleneck_mini(**options) -> ResNet:
    """One ResNeXt block a stage, four groups, widths 16 to 128 inside and 64 to 512 outside."""
    return ResNet(
        Bottleneck, (1, 1, 1, 1), num_classes=8, width=16, groups=4, base_width=16, stem="small",
        **options,
    )  # fmt: skip


def sk_mini() -> ResNet:
    """`bottleneck_mini` with selective kernels, 3×3 and 3×3 of dilation 2."""
    return bottleneck_mini(conv2=partial(SelectiveKernel, groups=4, min_hidden=16))


KERNEL_MODELS: dict[str, Callable[[], ResNet]] = {
    "no block": bottleneck_mini,
    "SE, r = 16": lambda: bottleneck_mini(inside=SqueezeExcite),
    "selective kernels": sk_mini,
}


def kernels(seed: int, device, rows=tuple(KERNEL_MODELS)) -> dict:
    """The same task on images of 32 pixels, with bottleneck blocks: 300 steps."""
    result = {}
    for row in rows:
        train.seed_everything(seed)
        model = KERNEL_MODELS[row]()
        fit_scenes(model, seed, device, size=32, steps=300, progress=False)
        result[row] = scenes_accuracy(model, device, size=32)
    return result


OBJECT_SIZES = (0.3, 0.45, 0.6, 0.75)  # the longer side of the object, of the image's


@torch.no_grad()
def large_kernel_share(model: nn.Module, share: float, device) -> dict[str, float]:
    """Share of the dilated kernel in each layer, for objects as long as `share` of the image."""
    test = data.load("scenes", "test_scenes", n=512, size=32, scale=(share, share))
    with record(model) as maps:
        model(test.batch(slice(None))["image"].to(device))
    return {name.partition(".")[0]: weights[:, 1].mean().item() for name, weights in maps.items()}


def scale(seed: int, device) -> dict:
    """Does the larger kernel get a larger share when the object is larger? Layer by layer."""
    train.seed_everything(seed)
    model = sk_mini()
    fit_scenes(model, seed, device, size=32, steps=300, progress=False)
    shares = {f"{size:.0%}": large_kernel_share(model, size, device) for size in OBJECT_SIZES}
    return {
        layer: {size: layers[layer] for size, layers in shares.items()} for layer in shares["30%"]
    }
