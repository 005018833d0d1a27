"""Experiments of chapter 08: what the softmax of the pooling buys, in accuracy and in maps.

Each function trains small models at one budget and returns `{row: {metric: value}}` for one seed;
`attnlab results` runs it over several seeds and writes `results/08_patchconvnet.NAME.json`.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
from einops import rearrange
from timm.models.swin_transformer import SwinTransformer
from timm.models.xcit import Xcit
from torch import Tensor, nn
from torch.nn import functional as F

from attnlab.attention_pooling import AttentionPool
from attnlab.lab import cost, data, gradcam, metrics, train
from attnlab.lab.box_metrics import box_accuracy
from attnlab.lab.data import Samples
from attnlab.patchconvnet import PatchConvNet, patchconvnet_mini

CHAPTER = "08_patchconvnet"
RERUN = ("ablation", "1×1 convolutions in the trunk")
POOLING_STEPS, SET_STEPS, TUNING_STEPS, PART_STEPS = 800, 600, 200, 250
NEIGHBOR_STEPS = 600

# 32-pixel images on a map of 8×8 places, as many as `patchconvnet_mini` has of 64-pixel ones.
small = partial(patchconvnet_mini, stem_convs=2)


# ---- One object: what does the softmax buy? -----------------------------------------------------


def average_mini(**options) -> PatchConvNet:
    """The mean over all places, of the same stem and column."""
    mean = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return patchconvnet_mini(pool=mean, **options)


def uniform_mini(**options) -> PatchConvNet:
    """The control: the same network, parameters and feed-forward, with all weights equal."""
    model = patchconvnet_mini(**options)
    model.pool.freeze_uniform()
    return model


NETWORKS: dict[str, Callable[..., PatchConvNet]] = {
    "attention": patchconvnet_mini,
    "average": average_mini,
    "uniform, same feed-forward": uniform_mini,
}


def fit_scenes(model: nn.Module, seed: int, device, **options):
    """Scenes with one object, cross entropy; `options` are `fit`'s."""
    return train.fit(
        model, data.load("scenes", "train"), batch_size=64, lr=3e-3, seed=seed, device=device,
        augment=train.flip_and_shift, **options,
    )  # fmt: skip


def own_map(model: PatchConvNet, images: Tensor, label: Tensor) -> Tensor:
    """Where the pooling looked; of an average, what speaks for the class: `(B, h, w)`, ≥ 0."""
    with torch.no_grad():
        if isinstance(model.pool, AttentionPool):
            return model.maps(images)[:, 0]
        return model.class_activation_maps(images)[torch.arange(len(label)), label].relu()


def pooling(seed: int, device) -> dict:
    """Three poolings on scenes with one object: right how often, and where do the maps point?"""
    batches = {
        split: data.load("scenes", split, n=n).batch(slice(None))
        for split, n in (("test_scenes", 1_000), ("val", 500))
    }
    results = {}
    for row, factory in NETWORKS.items():
        train.seed_everything(seed)
        model = factory()
        fit_scenes(model, seed, device, steps=POOLING_STEPS, progress=False)
        own = partial(own_map, model)
        cam = partial(gradcam.gradcam, model, model.blocks[-1])
        results[row] = {
            "accuracy": train.accuracy(model, batches["test_scenes"], device=device),
            **_scored(own, batches, device),
        }
        results[f"{row}: Grad-CAM"] = _scored(cam, batches, device)
    blind = {
        "center prior": lambda images, label: metrics.center_prior((len(images), 8, 8)),
        "color contrast": lambda images, label: metrics.color_contrast(images),
        "uniform map": lambda images, label: metrics.uniform((len(images), 8, 8)),
    }
    return results | {row: _scored(maps, batches, device) for row, maps in blind.items()}


def _scored(look: Callable, batches: dict[str, dict[str, Tensor]], device) -> dict[str, float]:
    """Scores of the maps `look(images, label)` on test scenes; boxes are tuned on the others."""
    maps = {
        split: look(batch["image"].to(device), batch["label"].to(device)).cpu()
        for split, batch in batches.items()
    }
    found, tuning = maps["test_scenes"], maps["val"]
    masks, tuning_masks = batches["test_scenes"]["saliency"], batches["val"]["saliency"]
    return {
        "pointing": metrics.pointing(found, masks).mean().item(),
        "energy": metrics.energy_inside(found, masks).mean().item(),
        "box": box_accuracy(found, masks, tuning, tuning_masks, overlap=0.3),
    }


# ---- Two objects: one map, or one a class? ------------------------------------------------------


def present(labels: Tensor, classes: int) -> Tensor:
    """Which classes an image shows: `(B, K)` labels, −1 for none, → float `(B, classes)`."""
    return F.one_hot(labels + 1, classes + 1).amax(1)[:, 1:].float()


def set_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Binary cross entropy of every class: is it in the image?"""
    scores = model(batch["image"])
    return F.binary_cross_entropy_with_logits(scores, present(batch["labels"], scores.shape[1]))


def fit_sets(model: nn.Module, samples, seed: int, device, **options):
    """Name all objects of an image; `options` are `fit`'s."""
    return train.fit(
        model, samples, loss=set_loss, batch_size=64, seed=seed, device=device, progress=False,
        **options,
    )  # fmt: skip


@torch.no_grad()
def set_scores(model: PatchConvNet, batch: dict[str, Tensor], device) -> dict[str, float]:
    """On images of two different classes: are both named, and whose map lies on which object?

    Each of the two is scored with the map of its class; a single map counts for both. Leak: how
    much of a map lies on the other object. Told apart: the share of the objects' pixels at which
    the map of the right one of the two classes, over its own largest weight, is the higher one.
    """
    images, labels = batch["image"].to(device), batch["labels"].cpu()
    features = model.forward_features(images)
    named = model.forward_head(features).topk(2).indices.cpu().sort(1).values
    maps = model.pool.maps(features, normalize=True).expand(-1, model.num_classes, -1, -1).cpu()
    masks = batch["instances" if "instances" in batch else "masks"].float().cpu()
    pairs = maps[torch.arange(len(labels))[:, None], labels]  # (B, 2, h, w)
    found = {"both named": (named == labels.sort(1).values).all(1).float()}
    for name, other in (("energy", masks), ("leak", masks.flip(1))):
        found[name] = metrics.energy_inside(pairs.flatten(0, 1), other.flatten(0, 1))
    found["pointing"] = metrics.pointing(pairs.flatten(0, 1), masks.flatten(0, 1))
    peaks = F.interpolate(pairs / pairs.amax((2, 3), keepdim=True), masks.shape[2:])
    higher = (1 + (peaks - peaks.flip(1)).sign()) / 2  # a tie counts half
    found["told apart"] = (higher * masks).sum((1, 2, 3)) / masks.sum((1, 2, 3))
    return {name: values.mean().item() for name, values in found.items()}


def small_scenes(split: str, n: int, objects: int | tuple[int, int] = 1) -> Samples:
    """32-pixel scenes with large objects, from which a few hundred steps learn something."""
    scale = (0.5, 0.9) if objects == 1 else (0.4, 0.7)
    return data.load("scenes", split, n=n, size=32, objects=objects, scale=scale)


def of_two_classes(samples: Samples, least: int) -> dict[str, Tensor]:
    """The scenes of two objects of different classes, of each at least `least` pixels visible."""
    batch = samples.batch(slice(None))
    shown = ((batch["instances"] >= 0.5).sum((2, 3)) >= least).all(1)
    kept = shown & (batch["labels"][:, 0] != batch["labels"][:, 1])
    return {key: value[kept] for key, value in batch.items()}


def classes(seed: int, device) -> dict:
    """Two objects an image: one map, a map a class from the start, a map a class by fine-tuning."""
    samples = small_scenes("train", 8_192, objects=(1, 2))
    test = of_two_classes(small_scenes("test_scenes", 1_000, objects=2), least=32)
    fit = partial(fit_sets, samples=samples, seed=seed, device=device, augment=train.flip_and_shift)
    train.seed_everything(seed)
    one = small()
    fit(one, steps=SET_STEPS, lr=3e-3)
    longer, tuned = copy.deepcopy(one), one.to_multiclass()
    for model in (longer, tuned):
        fit(model, steps=TUNING_STEPS, lr=1.5e-3)
    train.seed_everything(seed)
    scratch = small(multiclass=True)
    fit(scratch, steps=SET_STEPS + TUNING_STEPS, lr=3e-3)
    models = {
        "one map": one,
        "one map, trained longer": longer,
        "a map a class, fine-tuned": tuned,
        "a map a class, from the start": scratch,
    }
    found = {row: set_scores(model, test, device) for row, model in models.items()}
    area = test["instances"].mean().item()
    chance = {"both named": 1 / 28, "energy": area, "leak": area, "pointing": area}
    return found | {"chance": {**chance, "told apart": 0.5}}


# ---- Which part does what? ----------------------------------------------------------------------

PARTS: dict[str, dict] = {
    "PatchConvNet": {},
    "1×1 convolutions in the trunk": {"kernel_size": 1},
    "patchify stem": {"stem": "patchify"},
    "no squeeze-and-excitation": {"se_reduction": None},
    "BatchNorm": {"norm_layer": nn.BatchNorm2d},
    "batch 8": {},
    "batch 8, BatchNorm": {"norm_layer": nn.BatchNorm2d},
}


def ablation(seed: int, device, rows: tuple[str, ...] = tuple(PARTS)) -> dict:
    """Parts exchanged, one object an image. Batch 8 sees as many images, at √(8/64) of the rate."""
    samples, test = small_scenes("train", 8_192), small_scenes("test_scenes", 1_000)
    batch = test.batch(slice(None))
    results = {}
    for row in rows:
        size, share = (8, 8) if "batch 8" in row else (64, 1)
        train.seed_everything(seed)
        model = small(**PARTS[row])
        train.fit(
            model, samples, steps=share * PART_STEPS, batch_size=size, lr=3e-3 * share**-0.5,
            seed=seed, device=device, augment=train.flip_and_shift, progress=False,
        )  # fmt: skip
        with torch.no_grad():
            maps = model.maps(batch["image"].to(device))[:, 0].cpu()
        results[row] = {
            "accuracy": train.accuracy(model, test, device=device),
            "pointing": metrics.pointing(maps, batch["saliency"]).mean().item(),
            "energy": metrics.energy_inside(maps, batch["saliency"]).mean().item(),
        }
    return results


# ---- Beside two transformers of its size --------------------------------------------------------

# All three have about 111,000 parameters, and at the end 8×8 or, after Swin's stages, 4×4 places.
NEIGHBORS: dict[str, Callable[[], nn.Module]] = {
    "PatchConvNet": patchconvnet_mini,
    "XCiT": partial(
        Xcit, img_size=64, patch_size=8, embed_dim=32, depth=6, num_heads=4, mlp_ratio=3.75,
        num_classes=8,
    ),
    "Swin": partial(
        SwinTransformer, img_size=64, patch_size=4, window_size=4, embed_dim=16, depths=(2, 2, 2),
        num_heads=(1, 2, 4), mlp_ratio=2.5, drop_path_rate=0.0, num_classes=8,
    ),
}  # fmt: skip


def neighbors(seed: int, device) -> dict:
    """PatchConvNet beside timm's XCiT and Swin: one object, equal parameters, one recipe."""
    test = data.load("scenes", "test_scenes", n=1_000)
    images = torch.rand(64, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    results = {}
    for row, factory in NEIGHBORS.items():
        train.seed_everything(seed)
        model = factory()
        fit_scenes(model, seed, device, steps=NEIGHBOR_STEPS, progress=False)
        with torch.no_grad():
            predicting = cost.peak_memory(partial(model, images), device)
        training = cost.peak_memory(lambda: model(images).sum().backward(), device)  # noqa: B023
        results[row] = {
            "accuracy": train.accuracy(model, test, device=device),
            "thousand parameters": cost.parameters(model) / 1e3,
            "million MACs": cost.macs(model, images[:1]) / 1e6,
            "MiB, predicting 64": predicting / 2**20,
            "MiB, training on 64": training / 2**20,
        }
    return results


def swin_rate(seed: int, device) -> dict:
    """Swin once more, at a third of the rate: `neighbors` has the rate that suits PatchConvNet."""
    train.seed_everything(seed)
    model = NEIGHBORS["Swin"]()
    train.fit(
        model, data.load("scenes", "train"), steps=NEIGHBOR_STEPS, batch_size=64, lr=1e-3,
        seed=seed, device=device, augment=train.flip_and_shift, progress=False,
    )  # fmt: skip
    test = data.load("scenes", "test_scenes", n=1_000)
    return {"Swin, rate 0.001": {"accuracy": train.accuracy(model, test, device=device)}}


# ---- The checkpoints, and what the chapter asks of them -----------------------------------------


def scenes(split: str, n: int, objects: int | tuple[int, int] = (1, 2)) -> Samples:
    """Scenes whose objects are small to large, for photographs are filled by one thing."""
    return data.load("scenes", split, n=n, objects=objects, scale=(0.3, 0.9))


def two_classes(n: int = 400) -> dict[str, Tensor]:
    """Of `n` test scenes with two small objects, those of different classes, both visible."""
    samples = data.load("scenes", "test_scenes", n=n, objects=2)
    return of_two_classes(samples, least=65)  # more than an 8×8 patch


@torch.no_grad()
def deletion(
    model: PatchConvNet, images: Tensor, label: Tensor, order: Tensor, counts: tuple[int, ...]
) -> list[float]:
    """Share of the images still named right when `counts` places are painted over.

    images: `(B, 3, H, W)`. order: `(B, h, w)`, the places with the largest values go first; a place
    gets the image's mean color.
    """
    rank = rearrange(order, "b h w -> b (h w)").argsort(1, descending=True).argsort(1)
    rank = rearrange(rank, "b (h w) -> b 1 h w", h=order.shape[1]).to(images)
    rank = F.interpolate(rank, images.shape[2:], mode="nearest")
    mean = images.mean((2, 3), keepdim=True)
    right = (model(torch.where(rank < count, mean, images)).argmax(1) == label for count in counts)
    return [hits.float().mean().item() for hits in right]
