"""`attnlab predict IMAGE --model MODEL`: one picture of what a model says, and what it looked at.

The image, the probabilities of the classes, and beside them what the model's family can show:
attention, Grad-CAM and spatial gates, the pooling's map of each class, the tree of dependencies,
superpixels, a segmentation, the flow.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Patch
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from attnlab import lab
from attnlab.attention import VisionTransformer
from attnlab.dependency_trace import dependency_scores
from attnlab.dependency_trees import dependency_tree
from attnlab.dependencyvit import DependencyViT
from attnlab.lab import data, plots
from attnlab.lab.arguments import require
from attnlab.lab.class_explorer import CLASS_COLORS, color_by_class
from attnlab.lab.data.clips import OBJECTS
from attnlab.lab.experiments.ch07 import FlowBetween
from attnlab.lab.files import atomic_write
from attnlab.lab.gradcam import gradcam
from attnlab.lab.panels import MOST_STRETCHED, Panel, arrange, bars, map_over, show, tinted
from attnlab.lab.pixel_classifier import PixelClassifier
from attnlab.lab.superpixel_metrics import boundaries
from attnlab.lab.trained import Trained, open_trained, where_it_looks
from attnlab.lab.tree_explorer import draw_tree
from attnlab.lab.video_file import COLORS
from attnlab.patchconvnet import PatchConvNet
from attnlab.probe import record
from attnlab.resnet import ResNet
from attnlab.spformer import SPFormer, SuperpixelSegmenter, to_superpixels

MOST_PIXELS = 1024  # of a side of the picture that is drawn on
MOST_BARS = 8
MOST_HEADS = 4
LEAST_SHARE = 0.3  # of a class that is painted
DOTS = 100  # an inch


class Seen(NamedTuple):
    """An image as it is drawn, `(3, H, W)`, and as the model gets it, `(1, 3, h, w)`."""

    picture: Tensor
    inputs: Tensor


def main(arguments: Sequence[str]) -> int:
    """`attnlab predict`: write the picture; the exit code is 2 when the words make no sense."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    try:
        trained = open_trained(chosen.model, chosen.device or lab.device())
        out = chosen.out or Path(f"{Path(chosen.image).stem}-{trained.name}.png")
        answer = predict(chosen.image, trained, out)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{out}: {answer}")
    return 0


def predict(image: str | os.PathLike, trained: Trained, out: str | os.PathLike) -> str:
    """Write `out`, and return what the model says in words.

    Args:
        image: a file that Pillow reads, of any size, in gray, with transparency (white shows
            through it) or turned by its camera's note; or the name of a bundled photograph.
        trained: from `open_trained`.
        out: the picture, in a format that matplotlib writes; it must not exist yet.

    Raises:
        ValueError: `image` cannot be read, or `out` exists or has an unknown suffix.
    """
    out = Path(out)
    require(not out.exists(), "out", str(out), "a file that does not exist yet")
    known = sorted(FigureCanvasAgg.filetypes)
    require(out.suffix[1:].lower() in known, "out", str(out), f"a suffix among {known}")
    picture = read_picture(image)
    seen = Seen(picture, as_input(picture, trained))
    answer, panels = _panels(trained, seen)
    height, width = seen.inputs.shape[2:]
    title = f"{Path(image).name}\nthe model sees {width}×{height} px"
    with plots.style():
        figure = arrange([Panel(title, lambda ax: show(ax, picture)), *panels], picture)
        figure.suptitle(f"{trained.name}: {answer}", fontsize=13)
        with atomic_write(out) as temporary:
            figure.savefig(temporary, dpi=DOTS)
    return answer


def read_picture(image: str | os.PathLike) -> Tensor:
    """A file's picture, or a bundled photograph's by its name: `(3, H, W)` in [0, 1].

    At most `MOST_PIXELS` wide and high. Raises ValueError where it cannot be read.
    """
    names = [known["name"] for known in data.photos()]
    if str(image) in names and not Path(image).exists():
        return data.photo(str(image))
    expected = f"a file that is there, or one of the bundled photographs, {names}"
    require(Path(image).is_file(), "image", str(image), expected)
    try:
        with Image.open(image) as file:
            picture = _as_rgb(ImageOps.exif_transpose(file))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"image={str(image)!r}: expected a picture that can be read ({error})"
        ) from error
    picture.thumbnail((MOST_PIXELS, MOST_PIXELS))
    return rearrange(torch.from_numpy(np.array(picture)), "h w c -> c h w").float() / 255


def _as_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # gray of 16 bits, which Pillow would cut off at 255
        gray = np.asarray(picture).clip(0, 65_535) // 257
        picture = Image.fromarray(gray.astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def as_input(picture: Tensor, trained: Trained) -> Tensor:
    """What the model gets: `(1, 3, h, w)`, the shorter side about as long as in training.

    Both sides become multiples of the model's largest stride. timm's models of one fixed size get
    that one.
    """
    model, (height, width) = trained.model, picture.shape[1:]
    model = model.backbone if isinstance(model, PixelClassifier) else model
    size = trained.size
    if not getattr(model, "default_cfg", {}).get("fixed_input_size"):
        shorter, least = min(size), min(height, width)
        multiple = model.patch_size if isinstance(model, SPFormer) else 16
        sides = (shorter * min(side / least, MOST_STRETCHED) for side in (height, width))
        size = tuple(multiple * max(1, round(side / multiple)) for side in sides)
    inputs = F.interpolate(picture[None], size, mode="bilinear", antialias=True).clamp(0, 1)
    if trained.data == "imagenet":  # whose loader shifts and scales the colors
        mean, std = (
            torch.tensor(values)[:, None, None]
            for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        )
        inputs = (inputs - mean) / std
    return inputs.to(trained.device)


def _panels(trained: Trained, seen: Seen) -> tuple[str, list[Panel]]:
    """What the model says in words, and all that is drawn beside the photograph."""
    with torch.no_grad():
        output = trained.model(seen.inputs)
    if isinstance(trained.model, FlowBetween):
        return _flow(output, seen)
    if isinstance(output, Tensor) and output.ndim == 4:
        return _segmentation(trained, output, seen)
    shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    fits = isinstance(output, Tensor) and output.ndim == 2
    require(fits, "model's output", shape, "scores (1, classes), or maps (1, classes, h, w)")
    return _classes(trained, output[0].float().cpu(), seen)


def _classes(trained: Trained, scores: Tensor, seen: Seen) -> tuple[str, list[Panel]]:
    """A classifier's probabilities, and where it looked for the likeliest classes."""
    model, names = trained.model, trained.class_names(len(scores))
    several = "both named" in trained.card["metrics"]  # it learned to name all objects of an image
    shares = scores.sigmoid() if several else scores.softmax(0)
    order = shares.argsort(descending=True).tolist()
    best = order[0]
    title = "how likely each class is there" if several else "probability"
    panels = [bars(title, {names[n]: shares[n].item() for n in order[:MOST_BARS]})]
    if isinstance(model, PatchConvNet) and model.multiclass:
        maps = model.maps(seen.inputs, normalize=True)[0].detach().cpu()
        for n in order[:3]:
            panels.append(
                map_over(f"the map of “{names[n]}”, {shares[n]:.0%}", maps[n], seen.picture)
            )
        panels += _painted(maps, shares, names, seen.picture)
    else:
        target = torch.tensor([best], device=seen.inputs.device)
        for name, found in where_it_looks(model, seen.inputs, target).items():
            title = f"{name} for “{names[best]}”" if name == "Grad-CAM" else name
            map = found[0].cpu()
            least = map.min().item() if name.startswith("spatial gate") else 0.0
            panels.append(map_over(title, map, seen.picture, least))
    if isinstance(model, ResNet) and len(order) > 1:
        cam = gradcam(model, "layer4", seen.inputs, order[1])[0].cpu()
        panels.insert(2, map_over(f"Grad-CAM for “{names[order[1]]}”", cam, seen.picture))
    if isinstance(model, VisionTransformer):
        panels += _heads(model, seen)
    if isinstance(model, DependencyViT):
        panels[2:2] = _dependencies(model, seen)
    if isinstance(model, SPFormer):
        panels += _superpixels(model, seen)
    return f"{names[best]}, {shares[best]:.0%}", panels


def _painted(maps: Tensor, shares: Tensor, names: list[str], picture: Tensor) -> list[Panel]:
    """Each place in the color of the class that claims it, if some class is likely enough."""
    there = [n for n in range(len(names)) if shares[n] >= LEAST_SHARE]
    if not there or len(names) > len(CLASS_COLORS):
        return []
    painted = color_by_class(picture, maps, shares, LEAST_SHARE)

    def draw(ax) -> None:
        show(ax, painted)
        keys = [Patch(color=CLASS_COLORS[n], label=names[n]) for n in there]
        ax.legend(handles=keys, loc="lower left", frameon=True, fontsize=9)

    return [Panel(f"classes from {LEAST_SHARE:.0%} on", draw)]


def _heads(model: VisionTransformer, seen: Seen) -> list[Panel]:
    """Where each head of the last block looks from the class token, if that is classified."""
    if model.global_pool != "token":
        return []
    with torch.no_grad(), record(model) as maps:
        model(seen.inputs)
    rows, _ = model.patch_embed.grid(*seen.inputs.shape[2:])
    weights = list(maps.values())[-1][0, :MOST_HEADS, 0, model.num_prefix_tokens :].cpu()
    weights = rearrange(weights, "n (h w) -> n h w", h=rows)
    titles = (f"attention, last block, head {n}" for n in range(len(weights)))
    return [map_over(*both, seen.picture) for both in zip(titles, weights, strict=True)]


def _dependencies(model: DependencyViT, seen: Seen) -> list[Panel]:
    """The tree of patches, and how much each may still say in the first and the middle block."""
    trace = model.trace(seen.inputs)
    tree = dependency_tree(dependency_scores(trace)[0].cpu())
    panels = []

    def draw(ax) -> None:
        draw_tree(seen.picture, tree, trace.grid, ax=ax)
        ax.axis("off")

    if not trace.num_prefix_tokens:  # a class token has no place on the photograph
        panels.append(Panel("who sends to whom\n(a square is a root)", draw))
    for block in (1, len(model.blocks) // 2):
        gate = trace.messages[block - 1, 0, trace.num_prefix_tokens :].unflatten(0, trace.grid)
        panels.append(map_over(f"gate of block {block}", gate.cpu(), seen.picture, most=1.0))
    return panels


def _superpixels(model: SPFormer, seen: Seen) -> list[Panel]:
    """The edges of the superpixels over the photograph, and their mean colors."""
    labels = to_superpixels(seen.inputs[0], model)
    size = tuple(seen.picture.shape[1:])
    large = F.interpolate(labels[None, None].float(), size, mode="nearest")[0, 0].long().cpu()
    edges = boundaries(large[None])[0]
    color = torch.tensor([1.0, 0.9, 0.0])[:, None, None]
    count = torch.bincount(large.flatten())
    sums = torch.zeros(3, len(count)).index_add_(1, large.flatten(), seen.picture.flatten(1))
    means = (sums / count.clamp(min=1))[:, large]
    found = int((count > 0).sum())
    return [
        Panel(f"{found} superpixels", lambda ax: show(ax, torch.where(edges, color, seen.picture))),
        Panel("the mean color of each", lambda ax: show(ax, means)),
    ]


def _segmentation(trained: Trained, logits: Tensor, seen: Seen) -> tuple[str, list[Panel]]:
    """A class for every pixel; class 0 is the background."""
    logits = logits.float().cpu()
    count = logits.shape[1]
    names = {2: ["background", "thing"], len(OBJECTS) + 1: ["background", *OBJECTS]}.get(
        count, ["background", *(f"class {n}" for n in range(1, count))]
    )
    area = F.one_hot(logits[0].argmax(0), count).float().mean((0, 1))
    order = area.argsort(descending=True, stable=True).tolist()
    thing = 1 - logits.softmax(1)[0, 0]
    listed = order[:MOST_BARS]
    colors = ["white", *(COLORS[n % len(COLORS)] for n in range(count - 1))] if count > 2 else []
    painted = tinted(logits, colors, seen.picture)
    panels = [
        bars(
            "share of the pixels",
            {names[n]: area[n].item() for n in listed},
            [colors[n] for n in listed if colors],
        ),
        Panel("what is not background", lambda ax: show(ax, painted)),
        map_over("probability of not being background", thing, seen.picture, most=1.0),
    ]
    if isinstance(trained.model, SuperpixelSegmenter):
        panels += _superpixels(trained.model.backbone, seen)
    things = [f"{names[n]} on {area[n]:.0%}" for n in order if n and area[n] >= 0.01]
    return f"{', '.join(things[:3]) or 'nothing on any'} of the pixels", panels


def _flow(flow: Tensor, seen: Seen) -> tuple[str, list[Panel]]:
    """The flow that the network sees in an image that was moved by two pixels."""
    flow = flow[0].float().cpu()
    rows, columns = flow.shape[1:]
    cell = seen.inputs.shape[3] / columns

    def arrows(ax) -> None:
        height, width = seen.picture.shape[1:]
        show(ax, seen.picture)
        y, x = ((np.arange(n) + 0.5) / n * side for n, side in ((rows, height), (columns, width)))
        ax.quiver(x, y, *flow.numpy(), color="#ffe600", angles="xy", width=0.004)

    right = flow[0].median().item()
    panels = [
        Panel("the flow to the image two px further right", arrows),
        map_over("flow to the right, cells", flow[0].clamp(min=0), seen.picture),
    ]
    return f"to the right by {right * cell:.1f} px in the median, where 2 is exact", panels


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="attnlab predict",
        description="Draw what a trained model says of an image, and where it looked.",
        epilog="Bundled checkpoints: see data/checkpoints, for example resnet_mini_cbam_scenes.",
    )
    parser.add_argument("image", help="a picture's file, or a bundled photograph, like chelsea")
    parser.add_argument("--model", required=True, help="a checkpoint's name or path, or a run")
    parser.add_argument("--out", type=Path, help="the picture to write; default: IMAGE-MODEL.png")
    parser.add_argument("--device", help="cpu, cuda, ...")
    return parser
