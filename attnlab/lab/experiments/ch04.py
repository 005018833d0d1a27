"""Experiments of chapter 04: does CBAM find the object, and which of its parts does the work?

Each function trains small models at one budget and returns `{row: {metric: value}}` for one seed;
`attnlab results` runs it over several seeds and writes `results/04_cbam.NAME.json`.
"""

from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn

import attnlab
from attnlab.cbam import CBAM, cbam_resnet_mini
from attnlab.channel import se_resnet_mini
from attnlab.lab import data, gradcam, metrics, train
from attnlab.resnet import resnet_mini

CHAPTER = "04_cbam"
RERUN = ("ablations", "mean (SE)")

NETWORKS = {"plain": resnet_mini, "SE": se_resnet_mini, "CBAM": cbam_resnet_mini}
STAGES = ("layer1", "layer2", "layer3", "layer4")
block = partial(CBAM, reduction=4)
VARIANTS = {
    "nothing": None,
    "mean (SE)": partial(block, pools=("avg",), no_spatial=True),
    "maximum": partial(block, pools=("max",), no_spatial=True),
    "mean and maximum": partial(block, no_spatial=True),
    "then places, 3×3": partial(block, kernel_size=3),
    "then places, 7×7 (CBAM)": block,
    "7×7 without BatchNorm": partial(block, spatial_norm=None),
    "places first": partial(block, order="spatial_first"),
    "side by side": partial(block, order="parallel"),
}


def fit_scenes(model: nn.Module, seed: int, device, steps: int, size: int = 64, progress=False):
    """Train on the default scenes with the budget that all rows of a table share."""
    samples = data.load("scenes", "train", size=size)
    return train.fit(
        model, samples, steps=steps, batch_size=64, lr=3e-3, seed=seed, device=device,
        augment=train.flip_and_shift, progress=progress,
    )  # fmt: skip


def scenes(seed: int, device) -> dict:
    """Plain, SE and CBAM after 500 steps: how often right, and where do their maps point?"""
    test = data.load("scenes", "test_scenes", n=1_000)
    batch = test.batch(range(len(test)))
    masks = batch["saliency"]
    networks, maps = {}, {}
    for row, factory in NETWORKS.items():
        train.seed_everything(seed)
        model = factory()
        fit_scenes(model, seed, device, steps=500)
        networks[row] = accuracies(model, batch, device)
        for layer in ("layer3", "layer4"):
            looks = gradcam.gradcam(model, layer, batch["image"].to(device), batch["label"])
            maps[f"Grad-CAM of {row}, {layer}"] = localization(looks, masks)
    gates = spatial_gates(model, batch["image"].to(device))
    maps |= {f"gate, {stage}": localization(gate, masks) for stage, gate in gates.items()}
    maps["center prior"] = localization(metrics.center_prior(masks.shape), masks)
    maps["uniform"] = localization(metrics.uniform(masks.shape), masks)
    return networks | maps


def accuracies(model: nn.Module, batch: dict[str, Tensor], device) -> dict[str, float]:
    """Share that is right: of the images, with noise on them, and with a grey square over them."""
    images, label = batch["image"], batch["label"]
    versions = {"accuracy": images, "noise": noisy(images), "occlusion": occluded(images)}
    return {
        name: train.accuracy(model, {"image": version, "label": label}, device=device)
        for name, version in versions.items()
    }


def noisy(images: Tensor, std: float = 0.1) -> Tensor:
    """The same Gaussian noise for every model, `(B, 3, H, W)` → the same shape, in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    return (images + std * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def occluded(images: Tensor, side: int = 24) -> Tensor:
    """A grey square of `side` px anywhere, the same for every model; `(B, 3, H, W)` → the same."""
    generator = torch.Generator().manual_seed(0)
    height, width = images.shape[-2:]
    top = torch.randint(height - side + 1, (len(images), 1, 1, 1), generator=generator)
    left = torch.randint(width - side + 1, (len(images), 1, 1, 1), generator=generator)
    y, x = torch.arange(height)[:, None] - top, torch.arange(width) - left
    return images.masked_fill((y >= 0) & (y < side) & (x >= 0) & (x < side), 0.5)


def localization(maps: Tensor, masks: Tensor) -> dict[str, float]:
    """Means over the images of three scores; maps `(N, h, w)`, masks `(N, H, W)`."""
    maps, masks = maps.cpu(), masks.cpu()
    scores = {
        "pointing": metrics.pointing(maps, masks),
        "energy": metrics.energy_inside(maps, masks),
        "IoU": metrics.iou_at(maps, masks, 0.5),
    }
    return {name: score.mean().item() for name, score in scores.items()}


def spatial_gates(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The spatial gate of every stage of a `cbam_resnet_mini`, `(B, h, w)` each, in eval mode."""
    with torch.no_grad(), attnlab.record(model.eval()) as gates:
        model(images)
    return {
        stage: rearrange(gates[f"{stage}.0.inside.spatial"], "b 1 h w -> b h w") for stage in STAGES
    }


def ablations(seed: int, device, rows: tuple[str, ...] | None = None) -> dict:
    """CBAM's parts, 300 steps on 32-pixel scenes."""
    test = data.load("scenes", "test_scenes", size=32)
    found = {}
    for row in rows or VARIANTS:
        train.seed_everything(seed)
        model = resnet_mini(inside=VARIANTS[row])
        fit_scenes(model, seed, device, steps=300, size=32)
        found[row] = {"accuracy": train.accuracy(model, test, device=device)}
    return found
