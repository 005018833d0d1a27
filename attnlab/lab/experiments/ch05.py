"""Experiments of chapter 05: who can carry a cue across the image, and context for segmentation.

Each function trains small models at one budget and returns `{row: {metric: value}}` for one seed;
`attnlab results` runs it over several seeds and writes `results/05_context.NAME.json`.
"""

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from attnlab import record
from attnlab.cbam import SpatialAttention
from attnlab.channel import SqueezeExcite
from attnlab.context import (
    BaseObjectContext,
    ChannelSelfAttention,
    DANetHead,
    PositionAttention,
    conv_norm_act,
)
from attnlab.heads import (
    FCNHead,
    ObjectContextHead,
    Segmenter,
    object_purity,
    same_class,
    segmentation_loss,
)
from attnlab.lab import cost, data, metrics, toys, train
from attnlab.resnet import resnet_mini

CHAPTER = "05_context"
RERUN = ("key_patch", "CAM, code (−E)")

WIDTH = 32  # channels of the toy's network
MIDDLES: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "CBAM's 7×7 place gate": SpatialAttention,
    "SE": lambda: SqueezeExcite(WIDTH, reduction=4),
    "PAM": lambda: PositionAttention(WIDTH, key_channels=8),
    "CAM, code (−E)": ChannelSelfAttention,
    "CAM, paper (+E)": lambda: ChannelSelfAttention("paper"),
    "object context, tied q and k": lambda: BaseObjectContext(WIDTH, act_layer=nn.ReLU),
    "object context, q and k apart": lambda: BaseObjectContext(
        WIDTH, act_layer=nn.ReLU, share_qk=False
    ),
}


def toy_network(middle: nn.Module) -> nn.Sequential:
    """Images (B, 3, H, W) → scores (B, 3, H, W); but for `middle`, a place sees 7×7 pixels."""
    first, second, last = (conv_norm_act(c, WIDTH, 3) for c in (3, WIDTH, WIDTH))
    return nn.Sequential(first, second, middle, last, nn.Conv2d(WIDTH, 3, 1))


def toy_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross entropy in which a background pixel counts a fifth."""
    weights = torch.tensor([0.2, 1.0, 1.0], device=batch["image"].device)
    return segmentation_loss(model(batch["image"]), batch["label"], class_weights=weights)


def fit_toy(model: nn.Module, seed: int, device, steps: int = 600, **options):
    """16-pixel key patches, two shapes, batches of 32; `options` are `fit`'s."""
    return train.fit(
        model, toys.key_patch(1_024, seed=2 * seed, size=16, shapes=2), loss=toy_loss, steps=steps,
        batch_size=32, lr=3e-3, weight_decay=0.0, seed=seed, device=device, **options,
    )  # fmt: skip


@torch.no_grad()
def shape_accuracy(model: nn.Module, seed: int, device) -> float:
    """Share of the shapes' far pixels whose class is right, on 256 new images; chance is 1/2.

    Far is from row or column 9 on: there even the 13×13 window of the gate does not see the key.
    """
    test = toys.key_patch(256, seed=2 * seed + 1, size=16, shapes=2)
    found = model(test["image"].to(device)).argmax(1).cpu()
    counted = test["shape"] > 0
    counted[:, :9, :9] = False
    return (found == test["label"])[counted].float().mean().item()


def key_patch(seed: int, device, rows: Sequence[str] = tuple(MIDDLES)) -> dict:
    """One bit lies in the corner and every shape needs it: 600 steps, chance 1/2."""
    results = {}
    for row in rows:
        train.seed_everything(seed)
        model = toy_network(MIDDLES[row]())
        fit_toy(model, seed, device, progress=False)
        results[row] = {"accuracy": shape_accuracy(model, seed, device)}
    return results


CLASSES = 9  # the background, and eight kinds of things
INTER = 32  # width of the heads


class Told(nn.Module):
    """An object context that is told which positions belong together, by the ground truth."""

    def __init__(self, context: BaseObjectContext):
        super().__init__()
        self.context = context
        self.relation: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.context(x, self.relation)


class Attended(nn.Module):
    """An FCN head with one attention between its reduction and its classifier."""

    def __init__(self, in_channels: int, attention: nn.Module):
        super().__init__()
        self.reduce = conv_norm_act(in_channels, INTER, 3)
        self.attention = attention
        self.classify = nn.Conv2d(INTER, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.attention(self.reduce(x)))


def head(row: str, channels: int = 64) -> nn.Module:
    """A segmentation head of width 32 by the name of its row."""
    if row == "FCN":
        return FCNHead(channels, CLASSES, INTER)
    if row == "DANet":
        return DANetHead(channels, CLASSES, INTER)
    if row.startswith("PAM"):
        return Attended(channels, PositionAttention(INTER, key_channels=8))
    if row.startswith("CAM"):
        return Attended(channels, ChannelSelfAttention())
    context = Told if row == "OCNet, told the classes" else (lambda context: context)
    return ObjectContextHead(
        channels, CLASSES, INTER, lambda width: context(BaseObjectContext(width))
    )


def class_map(batch: dict[str, Tensor]) -> Tensor:
    """The class of each pixel of a batch of scenes: (B, H, W), 0 for the background."""
    opacity, nearest = batch["instances"].max(dim=1)
    kinds = batch["labels"].gather(1, rearrange(nearest, "b h w -> b (h w)"))
    kinds = rearrange(kinds, "b (h w) -> b h w", h=opacity.shape[1])
    return torch.where(opacity >= 0.5, kinds + 1, 0)


def on_grid(classes: Tensor, size: tuple[int, int] = (8, 8)) -> Tensor:
    """Classes (B, H, W) at the centers of the cells of a coarser grid: (B, *size)."""
    return F.interpolate(classes[:, None].float(), size, mode="nearest-exact")[:, 0].long()


def tell(model: Segmenter, classes: Tensor) -> None:
    """Where a model can be told the classes, tell it: each position hears all of its class."""
    for part in model.modules():
        if isinstance(part, Told):
            same = same_class(on_grid(classes)).float()
            part.relation = same / same.sum(dim=-1, keepdim=True)


def scene_loss(model: Segmenter, batch: dict[str, Tensor]) -> Tensor:
    """Cross entropy of every output; a background pixel counts a fifth."""
    classes = class_map(batch)
    tell(model, classes)
    weights = torch.ones(CLASSES, device=classes.device)
    weights[0] = 0.2
    return segmentation_loss(model(batch["image"]), classes, class_weights=weights)


def scenes(split: str, n: int):
    """64-pixel scenes with two things each, larger than usual."""
    return data.load("scenes", split, n=n, objects=2, scale=(0.4, 0.7))


def segmenter(row: str) -> Segmenter:
    """`resnet_mini` of half the width at output stride 8, so 8×8 positions, and a head."""
    return Segmenter(resnet_mini(num_classes=0, output_stride=8, width=8), head(row))


@torch.no_grad()
def mean_iou(model: Segmenter, device, n: int = 512) -> float:
    """mIoU on new scenes of known things."""
    test, confusion = scenes("test_scenes", n), 0
    for indices in torch.arange(n).split(64):
        batch = {key: value.to(device) for key, value in test.batch(indices).items()}
        classes = class_map(batch)
        tell(model, classes)
        found = model(batch["image"]).argmax(1)
        confusion = confusion + metrics.confusion_matrix(found.cpu(), classes.cpu(), CLASSES)
    return metrics.mean_iou(confusion)


@torch.no_grad()
def purity(model: Segmenter, device, n: int = 256) -> float:
    """How much of the attention of a thing's positions stays on things of its class."""
    batch = {key: x.to(device) for key, x in scenes("test_scenes", n).batch(slice(n)).items()}
    classes = on_grid(class_map(batch))
    with record(model.eval()) as maps:
        model(batch["image"])
    positions = [map for map in maps.values() if map.shape[-1] == classes[0].numel()]
    things = classes.masked_fill(classes == 0, 255)
    return object_purity(torch.cat(positions, dim=1), things).item()


def fit_scenes(model: Segmenter, seed: int, device, steps: int = 400, **options):
    """The budget that all heads share; `options` are `fit`'s."""
    return train.fit(
        model, scenes("train", 4_096), loss=scene_loss, steps=steps, batch_size=32, lr=4e-3,
        seed=seed, device=device, **options,
    )  # fmt: skip


ROWS = ("FCN", "PAM", "CAM", "DANet", "OCNet", "OCNet, told the classes")


def segmentation(seed: int, device, rows: Sequence[str] = ROWS) -> dict:
    """Heads on one backbone: 400 steps of 32 scenes, mIoU on new scenes of known things."""
    results = {}
    for row in rows:
        train.seed_everything(seed)
        model = segmenter(row)
        attends = row in ("PAM", "DANet", "OCNet")
        before = {"purity at first": purity(model.to(device), device)} if attends else {}
        fit_scenes(model, seed, device, progress=False)
        after = {"purity": purity(model, device)} if attends else {}
        miou = mean_iou(model, device)
        image = torch.zeros(1, 3, 64, 64, device=device)
        tell(model, image[:, 0].long())
        results[row] = {
            "mIoU": miou,
            "thousand parameters": cost.parameters(model) / 1e3,
            "million MACs": cost.macs(model, image) / 1e6,
            **before,
            **after,
        }
    return results
