"""Experiments of chapter 11: every mechanism of the course on one task, at one budget.

Each table's function trains small models and returns `{row: {metric: value}}` for one seed;
`attnlab results` runs it over several seeds and writes `results/11_capstone.NAME.json`.

What all rows share: 64-pixel `scenes` with one object, 8×8 places before the classifier, AdamW with
a cosine, batches of 32, the seeds. What differs beside the mechanism: the learning rate (3e-3 with
a convolutional trunk, 2e-3 for transformers, as in the other chapters), and parameters and MACs,
which are printed. Mechanisms of video are not here: they need clips (chapter 07).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from attnlab.attention import VisionTransformer, vit_mini
from attnlab.attention_pooling import AttentionPool
from attnlab.cbam import CBAM
from attnlab.cgnl import CGNLBlock
from attnlab.channel import SelectiveKernel, SqueezeExcite
from attnlab.context import BaseObjectContext, ChannelSelfAttention, PositionAttention
from attnlab.dependency_trace import dependency_saliency
from attnlab.dependencyvit import DependencyViT, dependencyvit_mini
from attnlab.lab import cost, data, gradcam, metrics, plots, train
from attnlab.lab.data import Samples
from attnlab.lab.experiments.ch04 import noisy, occluded
from attnlab.lab.experiments.ch05_sparse import OnGrid
from attnlab.lab.experiments.ch10 import turned
from attnlab.non_local import NonLocalBlock
from attnlab.patchconvnet import PatchConvNet, patchconvnet_mini
from attnlab.probe import record
from attnlab.resnet import ResNet, resnet_mini
from attnlab.sparse import CrissCrossAttention, NeighborhoodAttention
from attnlab.spformer import SPFormer, spformer_mini

CHAPTER = "11_capstone"
RERUN = ("short", "none")

STEPS, SHORT_STEPS = 600, 150
TESTED_ON = 1_000
GRID = (8, 8)  # places of every network's last map, from 64 pixels
WIDTH = 32  # channels of the map that a block after the third stage reads


# ---- The networks -------------------------------------------------------------------------------

# 8 to 64 channels; the last stage is dilated, so that its map has 8×8 places.
trunk = partial(resnet_mini, width=8, output_stride=8)


def with_block(block: Callable[[int], nn.Module]) -> ResNet:
    """One block after the third stage, where it reads 8×8 places of 32 channels."""
    return trunk(after={"layer3.0": block})


def selective_kernels() -> ResNet:
    """Each stage's second 3×3 gives way to two of half its parameters, one of them dilated."""
    model = trunk()
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        conv = stage[0].conv2
        options = {"dilation": conv.dilation[0], "groups": 2, "min_hidden": 8}
        stage[0].conv2, stage[0].bn2 = SelectiveKernel(conv.out_channels, **options), nn.Identity()
    return model


class DualAttention(nn.Module):
    """DANet's two attentions on one map, both contexts added to it: the shape stays."""

    def __init__(self, channels: int):
        super().__init__()
        self.position = PositionAttention(channels, key_channels=channels // 4)
        self.channel = ChannelSelfAttention()

    def forward(self, x: Tensor) -> Tensor:
        return self.position(x) + self.channel(x) - x


class Places(nn.Module):
    """Tokens `(B, prefix + N, D)` → the same. On their way the N are a map, for Grad-CAM."""

    def __init__(self, prefix: int = 0):
        super().__init__()
        self.prefix, self.map = prefix, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        prefix, places = x.split([self.prefix, x.shape[1] - self.prefix], dim=1)
        height = round(places.shape[1] ** 0.5)
        map = self.map(rearrange(places, "b (h w) d -> b d h w", h=height))
        return torch.cat([prefix, rearrange(map, "b d h w -> b (h w) d")], dim=1)


SMALL = {"embed_dim": 48, "depth": 3, "num_heads": 3}


def class_token_vit() -> VisionTransformer:
    """Three blocks. The last one is what tells the class token of the places, so read before it."""
    model = vit_mini(**SMALL)
    model.blocks.insert(2, Places(prefix=1))
    return model


def mean_vit() -> VisionTransformer:
    """The mean of the tokens is classified."""
    model = vit_mini(**SMALL, class_token=False, global_pool="avg")
    model.blocks.append(Places())
    return model


def neighborhood_vit() -> VisionTransformer:
    """`mean_vit` in which a token hears the 3×3 around it; as many parameters."""
    model = mean_vit()
    for block in model.blocks[:3]:
        block.attn = OnGrid(NeighborhoodAttention(48, 3, num_heads=3), rows=GRID[0])
    model.init_weights()
    return model


def small_dependencyvit() -> DependencyViT:
    model = dependencyvit_mini(**SMALL)
    model.norm = nn.Sequential(model.norm, Places())
    return model


def small_spformer() -> SPFormer:
    """Superpixels of 2×2 pixels of 4 image pixels, made once, before the first of three blocks."""
    sizes = {"embed_dim": 48, "num_heads": 3, "pixel_dim": 16, "stem_stride": 4, "cell": 2}
    model = spformer_mini(**sizes, depths=(3,), sca_init_values=0.1)
    model.stages[0].blocks.append(Places())
    return model


def last_map(model: nn.Module) -> nn.Module:
    """The last module whose output is a map of which every place still reaches the score."""
    if isinstance(model, ResNet):
        return model.layer4
    if isinstance(model, PatchConvNet):
        return model.blocks[-1]
    return next(module.map for module in model.modules() if isinstance(module, Places))


# ---- The maps of their own ----------------------------------------------------------------------


def gate(model: nn.Module, images: Tensor) -> Tensor:
    """CBAM's factor of every place in the last stage: `(B, h, w)`."""
    with record(model) as maps:
        model(images)
    return maps["layer4.0.inside.spatial"][:, 0]


def heard(model: nn.Module, images: Tensor, name: str) -> Tensor:
    """How much all places attend to each place, mean over heads: `(B, h, w)`."""
    with record(model) as maps:
        model(images)
    return maps.dense(GRID)[name].mean((1, 2)).unflatten(1, GRID)


def asked(model: nn.Module, images: Tensor, name: str) -> Tensor:
    """How much the one class vector attends to each place, mean over heads: `(B, h, w)`."""
    with record(model) as maps:
        model(images)
    return maps[name][:, :, 0, 1:].mean(1).unflatten(1, GRID)


def messages(model: DependencyViT, images: Tensor) -> Tensor:
    """How open the gate of each place is after the last layer: `(B, h, w)`."""
    return dependency_saliency(model.trace(images), "gate")


class Mechanism(NamedTuple):
    """`make()` → a network; `own(model, images)` → its map of the image, None where it has none."""

    chapter: int
    make: Callable[[], nn.Module]
    lr: float = 3e-3
    own: Callable[[nn.Module, Tensor], Tensor] | None = None


after = partial(heard, name="layer3.0.after")

MECHANISMS: dict[str, Mechanism] = {
    "none": Mechanism(2, trunk),
    "squeeze-and-excitation": Mechanism(
        3, lambda: trunk(inside=partial(SqueezeExcite, reduction=4))
    ),
    "selective kernels": Mechanism(3, selective_kernels),
    "CBAM": Mechanism(4, lambda: trunk(inside=partial(CBAM, reduction=4)), own=gate),
    "non-local": Mechanism(2, lambda: with_block(NonLocalBlock), own=after),
    "DANet's two": Mechanism(
        5, lambda: with_block(DualAttention), own=partial(heard, name="layer3.0.after.position")
    ),
    "object context": Mechanism(
        5,
        lambda: with_block(lambda width: BaseObjectContext(width, dropout=0.0, act_layer=nn.ReLU)),
        own=partial(heard, name="layer3.0.after.context"),
    ),
    "criss-cross": Mechanism(
        5, lambda: with_block(lambda width: CrissCrossAttention(width, width // 4)), own=after
    ),
    "CGNL": Mechanism(6, lambda: with_block(partial(CGNLBlock, groups=4))),
    "attention pooling": Mechanism(
        8,
        lambda: trunk(pool=AttentionPool(2 * WIDTH, init_values=0.1, init_std=(2 * WIDTH) ** -0.5)),
        own=partial(asked, name="avgpool"),
    ),
    "PatchConvNet": Mechanism(
        8, lambda: patchconvnet_mini(embed_dim=56), own=partial(asked, name="pool")
    ),
    "ViT, class token": Mechanism(
        1, class_token_vit, 2e-3, partial(asked, name="blocks.3.attn")
    ),
    "ViT, mean": Mechanism(1, mean_vit, 2e-3, partial(heard, name="blocks.2.attn")),
    "ViT, mean, 3×3": Mechanism(
        5, neighborhood_vit, 2e-3, partial(heard, name="blocks.2.attn.attention")
    ),
    "DependencyViT": Mechanism(9, small_dependencyvit, 2e-3, messages),
    "SPFormer": Mechanism(10, small_spformer, 2e-3),
}  # fmt: skip


# ---- The task -----------------------------------------------------------------------------------


def scenes(split: str, n: int) -> Samples:
    """64-pixel scenes with one thing, larger than usual, so that short trainings learn it."""
    return data.load("scenes", split, n=n, scale=(0.4, 0.7))


def fit(row: str, seed: int, device, steps: int, progress: bool = False) -> nn.Module:
    """The row's network after so many steps of 32 scenes."""
    train.seed_everything(seed)
    model = MECHANISMS[row].make()
    train.fit(
        model, scenes("train", 8_192), steps=steps, batch_size=32, lr=MECHANISMS[row].lr, seed=seed,
        device=device, augment=train.flip_and_shift, progress=progress,
    )  # fmt: skip
    return model


SPOILED: dict[str, Callable[[Tensor], Tensor]] = {
    "accuracy": lambda images: images,
    "rotated 30°": partial(turned, angle=30),
    "occluded": partial(occluded, side=24),
    "noise 0.1": partial(noisy, std=0.1),
}


def accuracies(model: nn.Module, test: Samples, device) -> dict[str, float]:
    """Share that is right: as they are, turned, with a grey square of 24 pixels, and with noise."""
    batch = test.batch(slice(None))
    return {
        name: train.accuracy(
            model, {"image": spoil(batch["image"]), "label": batch["label"]}, device=device
        )
        for name, spoil in SPOILED.items()
    }


def localization(
    look: Callable[[Tensor, Tensor], Tensor], test: Samples, device, prefix: str = ""
) -> dict[str, float]:
    """Does `look(images, labels)` `(B, h, w)` point at the thing, and is its sum inside of it?"""
    pointing, energy = [], []
    for indices in torch.arange(len(test)).split(250):
        batch = test.batch(indices)
        with torch.no_grad():
            maps = look(batch["image"].to(device), batch["label"].to(device)).cpu()
        pointing.append(metrics.pointing(maps, batch["saliency"]))
        energy.append(metrics.energy_inside(maps, batch["saliency"]))
    return {
        f"{prefix}pointing": torch.cat(pointing).mean().item(),
        f"{prefix}energy": torch.cat(energy).mean().item(),
    }


def witness(model: nn.Module, test: Samples, device) -> dict[str, float]:
    """What Grad-CAM of the true class says, at the last map: the same question to every network."""
    return localization(partial(gradcam.gradcam, model, last_map(model)), test, device)


def expense(row: str) -> dict[str, float]:
    """Size and work of an untrained network for one image; the same on every machine."""
    model = MECHANISMS[row].make()
    image = torch.zeros(1, 3, 64, 64)
    return {
        "thousand parameters": cost.parameters(model) / 1e3,
        "million MACs": cost.macs(model, image) / 1e6,
    }


def measured(row: str, model: nn.Module, test: Samples, device) -> dict[str, float]:
    """Every number of a trained network's row."""
    model = model.to(device).eval()
    own = MECHANISMS[row].own
    found = accuracies(model, test, device) | witness(model, test, device)
    if own is not None:
        found |= localization(lambda images, _: own(model, images), test, device, "own ")
    return found | expense(row)


# ---- The tables ---------------------------------------------------------------------------------


def mechanisms(seed: int, device, rows: Sequence[str] = tuple(MECHANISMS)) -> dict:
    """Every mechanism after 600 steps, and what maps score that have learned nothing."""
    test = scenes("test_scenes", TESTED_ON)
    found = {row: measured(row, fit(row, seed, device, STEPS), test, device) for row in rows}
    train.seed_everything(seed)
    untrained = trunk().to(device).eval()
    blind = {
        "uniform map": lambda images, _: metrics.uniform((len(images), *GRID)),
        "center prior": lambda images, _: metrics.center_prior((len(images), *GRID)),
        "color contrast": lambda images, _: metrics.color_contrast(images),
    }
    found["not trained"] = witness(untrained, test, device)
    return found | {name: localization(look, test, device) for name, look in blind.items()}


def short(seed: int, device, rows: Sequence[str] = tuple(MECHANISMS)) -> dict:
    """The same networks with a quarter of the budget, 150 steps: is the order the same?"""
    test = scenes("test_scenes", TESTED_ON)
    found = {}
    for row in rows:
        model = fit(row, seed, device, SHORT_STEPS)
        accuracy = train.accuracy(model, test, device=device)
        found[row] = {"accuracy": accuracy} | witness(model, test, device)
    return found


# ---- The figure ---------------------------------------------------------------------------------

KINDS = {
    "none": ("none",),
    "gates": ("squeeze-and-excitation", "selective kernels", "CBAM"),
    "one block, pairs of places": (
        "non-local", "DANet's two", "object context", "criss-cross", "CGNL",
    ),
    "pooling": ("attention pooling", "PatchConvNet"),
    "transformers": (
        "ViT, class token", "ViT, mean", "ViT, mean, 3×3", "DependencyViT", "SPFormer",
    ),
}  # fmt: skip


def overview(table: dict, title: str | None = None):
    """Accuracy, robustness, localization and cost: a line a mechanism, the most accurate on top.

    Args:
        table: what `lab.results.load("11_capstone.mechanisms")` gave.

    Returns:
        The four axes.
    """
    import matplotlib.pyplot as plt

    rows = table["rows"]
    names = sorted(MECHANISMS, key=lambda name: rows[name]["accuracy"]["mean"])
    with plots.style():
        shape = {"figsize": (12.5, 5.6), "sharey": True, "width_ratios": (3, 2.6, 3, 2.4)}
        figure, axes = plt.subplots(1, 4, **shape)
    right, kept, found, work = axes
    for (kind, members), marker, place in zip(KINDS.items(), "XsoD^", (6, 0, 1, 2, 3), strict=True):
        look = {"color": plots.COLORS[place], "fmt": marker}
        for name in members:
            y, row = names.index(name), rows[name]
            for ax, metric, face in (
                (right, "accuracy", None), (found, "pointing", None), (found, "own pointing", "w"),
            ):  # fmt: skip
                if metric in row:
                    mean, std = row[metric]["mean"], row[metric]["std"]
                    label = kind if face is None else None
                    ax.errorbar(mean, y, xerr=std, mfc=face, ms=7, label=label, **look)
            macs, size = row["million MACs"]["mean"], row["thousand parameters"]["mean"]
            work.barh(y, macs, color=plots.COLORS[place], alpha=0.4)
            work.text(0.2, y, f"{macs:.1f} M, {size:.0f} k", va="center", fontsize=9)
    for spoiled, marker, place in zip(tuple(SPOILED)[1:], "ovP", (4, 5, 6), strict=True):
        left, whole = ([rows[n][m]["mean"] - 1 / 8 for n in names] for m in (spoiled, "accuracy"))
        shares = [a / b for a, b in zip(left, whole, strict=True)]
        kept.plot(shares, range(len(names)), marker, color=plots.COLORS[place], label=spoiled)
    plain = rows["none"]["accuracy"]
    right.axvspan(plain["mean"] - plain["std"], plain["mean"] + plain["std"], color="0.9", zorder=0)
    for name, line in (("uniform map", "--"), ("color contrast", ":")):
        found.axvline(rows[name]["pointing"]["mean"], color="0.4", ls=line, label=name)
    right.set(yticks=range(len(names)), yticklabels=names, ylim=(-0.7, len(names) - 0.3))
    right.set(title="accuracy (grey: none ± spread)", xlabel="share right; chance 0.125")
    kept.set(title="robustness", xlabel="kept of what lies above chance")
    found.set(title="localization (hollow: own map)", xlabel="highest point on the thing")
    work.set(title="cost (k: parameters)", xlabel="million multiply-adds")
    lines = {}
    for ax in axes:
        ax.grid(axis="y", color="0.92")
        ax.set_axisbelow(True)
        lines |= {name: line for line, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=5)
    figure.suptitle(title)
    return axes
