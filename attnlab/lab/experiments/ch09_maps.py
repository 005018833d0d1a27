"""More experiments of chapter 09: photographs, training without labels, two trees in an image.

Each function returns `{row: {metric: value}}` for one seed. Small networks learn on 32-pixel
`scenes`, photographed things before photographed backgrounds, with class labels or with none.
"""

from functools import cache

import torch
from torch import Tensor, nn

from attnlab.attention import VisionTransformer
from attnlab.dependency_trace import DependencyTrace, dependency_saliency, dependency_scores
from attnlab.dependency_trees import dependency_tree
from attnlab.dependencyvit import DependencyViT
from attnlab.lab import data, dependency_metrics, metrics, self_supervised, train
from attnlab.lab.dependency_baselines import feature_cut, random_scores
from attnlab.lab.experiments.ch09 import GRID, SIZES, on_object
from attnlab.probe import record

CHAPTER = "09_dependencyvit"

STEPS = 300
TESTED_ON = 500
IN_FOREST = 200  # images whose best forests are found
KINDS = ("not trained", "labels", "self-distilled")


def scenes(split: str, n: int):
    """One photographed thing before a photograph, 32 pixels."""
    return data.load("scenes", split, n=n, size=32, scale=(0.4, 0.7))


@cache
def learned(kind: str, seed: int, device: torch.device) -> nn.Module:
    """The network of chapter 09's other tables, or a ViT of its sizes, on scenes, in eval mode.

    kind: "not trained", "labels", "self-distilled" (DINO and iBOT, no labels), or "ViT".
        Every training has as many steps of as many images.
    """
    train.seed_everything(seed)
    model = VisionTransformer(**SIZES) if kind == "ViT" else DependencyViT(**SIZES)
    budget = {"steps": STEPS, "batch_size": 64, "seed": seed, "device": device, "progress": False}
    samples = scenes("train", 8_192)
    if kind == "labels":
        train.fit(model, samples, lr=2e-3, augment=train.flip_and_shift, **budget)
    elif kind != "not trained":
        sizes = {"prototypes": 256, "hidden": 128, "bottleneck": 64, "momentum": 0.98}
        self_supervised.pretrain(model, samples, lr=1e-3, distillation=sizes, **budget)
    return model.to(device).eval()


def test_batch(device) -> dict[str, Tensor]:
    samples = scenes("test_scenes", TESTED_ON)
    return {key: value.to(device) for key, value in samples.batch(range(TESTED_ON)).items()}


@torch.no_grad()
def patch_features(model: nn.Module, images: Tensor) -> Tensor:
    """Patches after the last block, `(B, N, D)`."""
    return self_supervised.features(model, images)[1]


@torch.no_grad()
def class_attention(model: VisionTransformer, images: Tensor) -> Tensor:
    """What the class token looks at in the last layer, heads averaged: `(B, rows, columns)`."""
    with record(model) as recorded:
        model.forward_features(images)
    last = list(recorded.dense().values())[-1]  # (B, heads, queries, keys)
    return last[:, :, 0, 1:].mean(1).unflatten(1, GRID)


def found(maps: Tensor, masks: Tensor) -> dict[str, float]:
    """The three numbers of salient object detection."""
    return {
        "max F": metrics.max_fbeta(maps, masks),
        "IoU": metrics.iou_at(maps, masks, "mean+std").mean().item(),
        "accuracy": metrics.accuracy_at(maps, masks, "mean+std").mean().item(),
    }


def saliency(seed: int, device) -> dict:
    """Every map that a trace gives, with and without the mask, against a ViT and blind guesses."""
    batch = test_batch(device)
    images, masks = batch["image"], batch["saliency"]
    rows = {}
    for kind in KINDS:
        model = learned(kind, seed, device)
        trace, features = model.trace(images), patch_features(model, images)
        cut = {weight: dependency_saliency(trace, "ncut", features, weight) for weight in (0, 1)}
        maps = {
            "gate": dependency_saliency(trace, "gate"),
            "received": dependency_saliency(trace, "mass"),
            "cut of features": cut[0],
            "cut, mask added": cut[1],
        }
        rows |= {f"{kind}: {name}": found(map, masks) for name, map in maps.items()}
        contrast = dependency_metrics.gate_contrast(trace.messages, on_object(batch, GRID[0]))
        rows[f"{kind}: gate"]["contrast"] = contrast[-1].item()
    vit = learned("ViT", seed, device)
    blind = {
        "ViT, self-distilled: class attention": class_attention(vit, images),
        "ViT, self-distilled: cut of features": feature_cut(patch_features(vit, images), GRID),
        "center prior": metrics.center_prior(tuple(masks.shape), device=device),
        "color contrast": metrics.color_contrast(images),
    }
    return rows | {name: found(map, masks) for name, map in blind.items()}


def forest(seed: int, device) -> dict:
    """Do thing and background lie in trees of their own? The best forests of three trainings."""
    batch = test_batch(device)
    images = batch["image"][:IN_FOREST]
    foreground = on_object(batch, GRID[0])[:IN_FOREST]
    rows = {"random": two_trees(random_scores(IN_FOREST, 64, seed).to(device), foreground)}
    for kind in KINDS:
        trace = learned(kind, seed, device).trace(images)
        rows[kind] = two_trees(dependency_scores(trace), foreground) | loudest(trace, foreground)
    return rows


def two_trees(scores: Tensor, foreground: Tensor) -> dict[str, float]:
    """How the best forest divides patches: number of trees, and do they keep to one side?

    "one side": share of the thing's patches whose tree is at least half of the thing; what random
    trees of the same sizes would have is "by chance" (the tops of each image, shuffled).
    """
    tops = dependency_tree(scores, decode="forest").tops
    same = tops[:, :, None] == tops[:, None, :]  # (B, N, N)
    order = torch.rand(tops.shape, generator=torch.Generator().manual_seed(0)).argsort(1)
    shuffled = tops.gather(1, order.to(tops.device))
    chance = shuffled[:, :, None] == shuffled[:, None, :]
    return {
        "trees": sum(image.unique().numel() for image in tops) / len(tops),
        "one side": one_side(same, foreground),
        "by chance": one_side(chance, foreground),
    }


def one_side(same: Tensor, foreground: Tensor) -> float:
    """Share of the thing's patches that lie in a tree of which half or more is the thing."""
    share = (same & foreground[:, None, :]).sum(2) / same.sum(2)
    return (share >= 0.5)[foreground].float().mean().item()


def loudest(trace: DependencyTrace, foreground: Tensor) -> dict[str, float]:
    """How well the tree that sends most in the last layer covers the thing."""
    maps = dependency_saliency(trace, "forest")
    return {"IoU": metrics.iou_at(maps, foreground.unflatten(1, GRID).float(), 0.5).mean().item()}
