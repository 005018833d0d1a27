"""Experiments of chapter 10: what masks, and what class labels alone, teach superpixels.

Each function trains small models at one budget and returns `{row: {metric: value}}` for one seed;
`attnlab results` runs it over several seeds and writes `results/10_spformer.NAME.json`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import rotate

from attnlab.attention import VisionTransformer
from attnlab.lab import data, metrics, train
from attnlab.lab import superpixel_metrics as sm
from attnlab.lab.data import Samples
from attnlab.lab.experiments.ch04 import occluded
from attnlab.spformer import SPFormer, SuperpixelSegmenter, spformer_mini
from attnlab.superpixel import merge_heads, upsample_association
from attnlab.superpixel_baselines import lab_xy, ssn

CHAPTER = "10_spformer"
RERUN = ("labels", "t = 1")


def micro(**options) -> SPFormer:
    """Under a third of `spformer_mini`: 210,000 parameters, for 64-pixel images in 8-pixel cells.

    LayerScale around the superpixels begins at 0.1, so that it need not be learned first.
    """
    sizes = {"embed_dim": 64, "pixel_dim": 32, "num_heads": 2, "depths": (1, 2)}
    return spformer_mini(**{**sizes, "sca_init_values": 0.1, **options})


def segmenter(upsample: str = "association") -> SuperpixelSegmenter:
    """Things against background, from `micro`'s superpixels: `(B, 3, H, W)` → `(B, 2, H, W)`."""
    return SuperpixelSegmenter(micro(), 2, upsample)


def scenes(split: str, n: int, **options) -> Samples:
    """64-pixel scenes with two things each, larger than usual."""
    return data.load("scenes", split, n=n, objects=2, scale=(0.4, 0.7), **options)


def things(batch: dict[str, Tensor]) -> Tensor:
    """Where a thing is: int64 `(B, H, W)`, 0 or 1."""
    return (batch["saliency"] >= 0.5).long()


def mask_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross entropy of every pixel."""
    return F.cross_entropy(model(batch["image"]), things(batch))


def fit_masks(model: nn.Module, seed: int, device, steps: int = 250, **options):
    """The budget that all rows share; `options` are `fit`'s."""
    return train.fit(
        model, scenes("train", 4_096), loss=mask_loss, steps=steps, batch_size=16, lr=3e-3,
        seed=seed, device=device, **options,
    )  # fmt: skip


def association(model: SPFormer, images: Tensor) -> Tensor:
    """The last stage's, heads merged, at the images' size: slots `(B, 1, Sh, Sw, s², 9)`."""
    _, info = model.forward_features(images, return_info=True)
    return upsample_association(merge_heads(info[-1]["logits"]), model.stem_stride)


def patches(images: Tensor) -> Tensor:
    """Squares of 8 pixels as an association."""
    grid = images.shape[2] // 8, images.shape[3] // 8
    return sm.patch_association(len(images), grid, 8, images.device)


def soft_kmeans(images: Tensor) -> Tensor:
    """SSN without a network: ten rounds on color and place, in cells of 8 pixels."""
    return ssn(lab_xy(images, 8), 8, iters=10)[0]


@torch.no_grad()
def oracle(associate: Callable[[Tensor], Tensor], test: Samples, device) -> dict[str, float]:
    """mIoU of things if every superpixel is told its best label: of hard superpixels, and soft."""
    confusion = {"hard": 0, "soft": 0}
    for indices in torch.arange(len(test)).split(64):
        batch = test.batch(indices)
        logits = associate(batch["image"].to(device)).cpu()
        for kind in confusion:
            confusion[kind] = confusion[kind] + sm.oracle_confusion(logits, things(batch), 2, kind)
    return {f"oracle, {kind}": metrics.mean_iou(found[0]) for kind, found in confusion.items()}


@torch.no_grad()
def slic_oracle(test: Samples) -> dict[str, float]:
    """The hard oracle of scikit-image's SLIC, asked for as many segments as there are cells."""
    batch = test.batch(range(len(test)))
    best = sm.majority(sm.slic(batch["image"], 64), things(batch), 2)
    return {"oracle, hard": metrics.mean_iou(metrics.confusion_matrix(best, things(batch), 2))}


@torch.no_grad()
def mean_iou(model: nn.Module, test: Samples, device) -> float:
    """mIoU of things and background."""
    confusion = 0
    for indices in torch.arange(len(test)).split(64):
        batch = test.batch(indices)
        found = model(batch["image"].to(device)).argmax(1).cpu()
        confusion = confusion + metrics.confusion_matrix(found, things(batch), 2)
    return metrics.mean_iou(confusion)


UPSAMPLING = {"Eq. 1": "association", "bilinear": "bilinear", "nearest": "nearest"}


def segmentation(seed: int, device) -> dict:
    """Trained with masks, 250 steps of 16 scenes, each row through its own upsampling."""
    test = scenes("test_scenes", 512)
    results = {}
    for row, upsample in UPSAMPLING.items():
        train.seed_everything(seed)
        model = segmenter(upsample).to(device)
        before = oracle(lambda x, m=model: association(m.backbone, x), test, device)
        fit_masks(model, seed, device, progress=False)
        after = oracle(lambda x, m=model: association(m.backbone, x), test, device)
        results[row] = {"mIoU": mean_iou(model, test, device), **after}
        if row == "Eq. 1":
            results["not trained"] = before
    results["8×8 patches"] = oracle(patches, test, device)
    results["soft k-means"] = oracle(soft_kmeans, test, device)
    results["SLIC"] = slic_oracle(test)
    return results


def longer(seed: int, device) -> dict:
    """As `segmentation`, 500 steps; then each network is read through each upsampling, too.

    Read through another way than it was trained in, a network shows what the way alone does.
    """
    test, results = scenes("test_scenes", 512), {}
    for trained in ("Eq. 1", "bilinear"):
        train.seed_everything(seed)
        model = segmenter(UPSAMPLING[trained]).to(device)
        fit_masks(model, seed, device, steps=500, progress=False)
        found = oracle(associated(model), test, device)
        for row, model.upsample in UPSAMPLING.items():
            found[f"mIoU, read by {row}"] = mean_iou(model, test, device)
        results[f"trained by {trained}"] = found
    return results


def transfer(seed: int, device) -> dict:
    """Masks after class labels, and superpixels on data that they were never trained on.

    250 steps of 16 with masks, after as many with class labels (of one thing), after as many more
    with masks, or after nothing; then oracles at home and abroad.
    """
    tests = {"scenes": scenes("test_scenes", 512), "parts": large_parts("test", 512)}
    results = {"8×8 patches": everywhere(patches, tests, device)}
    for row, start in STARTS.items():
        train.seed_everything(seed)
        model = segmenter().to(device)
        start(model, seed, device)
        fit_masks(model, seed, device, progress=False)
        home = {"mIoU": mean_iou(model, tests["scenes"], device)}
        results[row] = home | everywhere(associated(model), tests, device)
    train.seed_everything(seed)
    model = segmenter().to(device)
    train.fit(
        model, large_parts("train", 4_096), loss=mask_loss, steps=250, batch_size=16, lr=3e-3,
        seed=seed, device=device, progress=False,
    )  # fmt: skip
    results["masks of parts only"] = everywhere(associated(model), tests, device)
    return results


def large_parts(split: str, n: int) -> Samples:
    """64-pixel parts: one large object before any background, nothing else."""
    return data.load("parts", split, n=n, distractors=0, occlusion=0.0, scale=(0.6, 0.9))


def associated(model: SuperpixelSegmenter) -> Callable[[Tensor], Tensor]:
    """What the trained superpixels say of images."""
    return lambda images: association(model.backbone, images)


def everywhere(associate: Callable[[Tensor], Tensor], tests: dict[str, Samples], device) -> dict:
    """The hard oracle on each set."""
    return {
        f"oracle, {name}": oracle(associate, test, device)["oracle, hard"]
        for name, test in tests.items()
    }


def label_start(model: SuperpixelSegmenter, seed: int, device) -> None:
    """Take the weights of a classifier of scenes with one thing; only the head is new."""
    classifier = micro(num_classes=8).to(device)
    train.fit(
        classifier, data.load("scenes", "train", n=4_096, scale=(0.4, 0.7)), steps=250,
        batch_size=16, lr=2e-3, seed=seed, device=device, progress=False,
    )  # fmt: skip
    classifier.reset_classifier(0)
    model.backbone.load_state_dict(classifier.state_dict())


STARTS: dict[str, Callable[[SuperpixelSegmenter, int, torch.device], None]] = {
    "from scratch": lambda model, seed, device: None,
    "after class labels": label_start,
    "after more masks": lambda model, seed, device: fit_masks(
        model, seed + 100, device, progress=False
    ),
}


def parts(split: str, n: int) -> Samples:
    """32-pixel parts: one large object of eight kinds on a flat background, nothing else."""
    return data.load(
        "parts", split, n=n, size=32, background="flat", distractors=0, occlusion=0.0,
        scale=(0.6, 0.9),
    )  # fmt: skip


def turned(images: Tensor, angle: float) -> Tensor:
    """Rotated counter-clockwise; the image's border is continued into the corners."""
    margin = images.shape[-1] // 2
    larger = F.pad(images, (margin,) * 4, mode="replicate")
    return rotate(larger, angle)[..., margin:-margin, margin:-margin]


def plain_vit() -> VisionTransformer:
    """As many tokens, of the same width and depth, from flat 8×8 patches."""
    return VisionTransformer(
        img_size=32, patch_size=8, num_classes=8, embed_dim=64, depth=3, num_heads=2,
        class_token=False, global_pool="avg",
    )  # fmt: skip


CLASSIFIERS: dict[str, Callable[[], nn.Module]] = {
    "ViT, 8×8 patches": plain_vit,
    "frozen as patches": lambda: micro(img_size=32).freeze_as_patches(),
    "superpixels": lambda: micro(img_size=32),
    "t = 1": lambda: micro(img_size=32, iters=1),
    "only before block 1": lambda: micro(img_size=32, depths=(3,)),
    "one head": lambda: micro(img_size=32, sp_heads=1),
    "learned position": lambda: micro(img_size=32, position="learned"),
    "3×3 stem": lambda: micro(img_size=32, conv_stem=True),
}


def labels(seed: int, device, rows: tuple[str, ...] = (*CLASSIFIERS, "8×8 patches")) -> dict:
    """Trained with class labels, 200 steps of 32 images: right how often, and whose borders?"""
    test, results = parts("test", 512), {}
    for row in rows:
        if row == "8×8 patches":
            results[row] = oracle(patches, test, device)
            continue
        train.seed_everything(seed)
        model = CLASSIFIERS[row]().to(device)
        train.fit(
            model, parts("train", 4_096), steps=200, batch_size=32, lr=2e-3, seed=seed,
            device=device, progress=False,
        )  # fmt: skip
        results[row] = accuracies(model, test, device)
        if isinstance(model, SPFormer):
            results[row] |= oracle(lambda x, m=model: association(m, x), test, device)
    return results


def accuracies(model: nn.Module, test: Samples, device) -> dict[str, float]:
    """Share that is right: as they are, turned, and with a grey square of 12 pixels on them."""
    batch = test.batch(range(len(test)))
    images = batch["image"]
    versions = {
        "accuracy": images,
        "30°": turned(images, 30),
        "90°": turned(images, 90),
        "occluded": occluded(images, 12),
    }
    return {
        name: train.accuracy(model, {"image": version, "label": batch["label"]}, device=device)
        for name, version in versions.items()
    }
