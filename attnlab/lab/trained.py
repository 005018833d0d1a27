"""A trained model by its checkpoint's name, a path or a run's folder, and where it looks.

What `attnlab evaluate` and `attnlab predict` share.
"""

import os
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from timm.data import ImageNetInfo
from torch import Tensor, nn

from attnlab.attention import VisionTransformer
from attnlab.attention_pooling import AttentionPool
from attnlab.dependency_trace import dependency_saliency
from attnlab.dependencyvit import DependencyViT
from attnlab.lab import checkpoints
from attnlab.lab.arguments import require
from attnlab.lab.data.samples import as_size
from attnlab.lab.gradcam import gradcam
from attnlab.lab.train import join
from attnlab.patchconvnet import PatchConvNet
from attnlab.probe import Probe, attention_rollout, record
from attnlab.resnet import ResNet

OWN_KEYS = {"name", "split", "n", "size", "generator", "images"}  # the others are the generator's


class Trained(NamedTuple):
    """A model in eval mode and what its sidecar says."""

    model: nn.Module
    name: str  # of the checkpoint, or of the run's folder
    card: dict[str, Any]
    folder: Path | None  # of the run

    @property
    def data(self) -> str:
        """What it was trained on."""
        return self.card["data"]["name"]

    @property
    def options(self) -> dict[str, Any]:
        """Of the bundled data that it was trained on, for `data.load`."""
        given = {key: value for key, value in self.card["data"].items() if key not in OWN_KEYS}
        return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images that it was trained on, px."""
        probe = self.card["probe_image"]
        return as_size(probe["size"] if "size" in probe else tuple(probe["shape"][-2:]))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def class_names(self, count: int) -> list[str]:
        """Names of `count` classes; where none are known, their numbers."""
        if self.data in ("parts", "scenes"):
            names = import_module(f"attnlab.lab.data.{self.data}").CLASSES
        elif self.data == "imagenet" and count == 1000:
            known = ImageNetInfo()
            names = [known.index_to_description(n).split(",")[0] for n in range(count)]
        else:
            names = ()
        return list(names) if len(names) == count else [f"class {n}" for n in range(count)]


def open_trained(source: str | os.PathLike, device: torch.device | str = "cpu") -> Trained:
    """Load the model that `source` names.

    source: a bundled checkpoint's name, the path of one, or the folder of a run of `attnlab train`.
    Raises ValueError where there is none, where the run has not ended, for a device that is not
    here, and as `checkpoints.load`.
    """
    path = Path(source)
    device, *_ = join(device)
    if not path.is_dir():
        try:
            card = checkpoints.info(source)
        except ValueError as error:
            expected = "a bundled checkpoint, the path of one, or the folder of a run"
            raise ValueError(f"model={str(source)!r}: expected {expected} ({error})") from error
        return Trained(checkpoints.load(source, device), path.stem, card, None)
    expected = "a checkpoint, or the folder of a run of `attnlab train`"
    require((path / "config.json").exists(), "model", str(source), expected)
    expected = "a run that has ended; the command that began it goes on with it"
    require((path / "model.json").exists(), "model", str(source), expected)
    checkpoint = path / "model"
    card = checkpoints.info(checkpoint)
    return Trained(checkpoints.load(checkpoint, device), path.resolve().name, card, path)


def where_it_looks(model: nn.Module, images: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The maps by which a classifier of ours shows where it looked: name → `(B, h, w)`, ≥ 0.

    images: `(B, 3, H, W)`. target: classes `(B,)`, for the maps that belong to a class.
    A Vision Transformer has attention, a PatchConvNet its pooling's map, a ResNet Grad-CAM and what
    spatial gates it holds, a DependencyViT its messages; other models have none.
    """
    if isinstance(model, VisionTransformer):
        return _attention(model, images)
    if isinstance(model, PatchConvNet):
        return {"attention pooling": _pooling(model, images, target)}
    if isinstance(model, DependencyViT):
        trace = model.trace(images)
        received = dependency_saliency(trace)
        return {"messages received": received, "last gate": dependency_saliency(trace, "gate")}
    if isinstance(model, ResNet):
        return {
            "Grad-CAM": gradcam(model, "layer4", images, target),
            **spatial_gates(model, images),
        }
    return {}


def _attention(model: VisionTransformer, images: Tensor) -> dict[str, Tensor]:
    """Of the class token, or of the mean of the patches where these are classified."""
    with torch.no_grad(), record(model) as maps:
        model(images)
    prefix, (rows, _) = model.num_prefix_tokens, model.patch_embed.grid(*images.shape[2:])
    found = {"last block": list(maps.values())[-1].mean(1), "rollout": attention_rollout(maps)}
    asks = slice(0, 1) if model.global_pool == "token" else slice(prefix, None)
    return {
        f"attention, {name}": rearrange(
            weights[:, asks, prefix:].mean(1), "b (h w) -> b h w", h=rows
        )
        for name, weights in found.items()
    }


def _pooling(model: PatchConvNet, images: Tensor, target: Tensor) -> Tensor:
    """The map of the class, where each has one; of an average, what speaks for the class."""
    with torch.no_grad():
        if not isinstance(model.pool, AttentionPool):
            return model.class_activation_maps(images)[range(len(images)), target].relu()
        maps = model.maps(images, normalize=True)
        return maps[range(len(images)), target] if model.multiclass else maps[:, 0]


def spatial_gates(model: ResNet, images: Tensor) -> dict[str, Tensor]:
    """The gates `(B, h, w)` by which blocks such as CBAM weigh places, the last of each stage."""
    if not any(isinstance(module, Probe) for module in model.modules()):
        return {}
    with torch.no_grad(), record(model) as maps:
        model(images)
    return {
        f"spatial gate, {name.split('.')[0]}": rearrange(gate, "b 1 h w -> b h w")
        for name, gate in maps.items()
        if name.endswith(".spatial")
    }
