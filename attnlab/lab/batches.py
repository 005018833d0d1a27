"""Data in, batches out: what a training loop may be fed, seeded draws, and one augmentation."""

import hashlib
import random
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import default_collate

from attnlab.lab.arguments import require, whole


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators. Raises ValueError unless 0 ≤ seed < 2³²."""
    whole(0, seed=seed)
    require(seed < 2**32, "seed", seed, "an integer below 2**32")
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - for code that draws from NumPy's global generator
    torch.manual_seed(seed)


def mix(*parts: str | int) -> int:
    """63 bits that depend on every part: neighbouring seeds and steps have nothing in common."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: str | int) -> torch.Generator:
    """A CPU generator seeded by `parts`."""
    return torch.Generator().manual_seed(mix(*parts))


def size(data: Any) -> int:
    """Number of samples. Raises ValueError where `fetch` could not read them."""
    if isinstance(data, dict):
        lengths = {key: len(value) for key, value in data.items()}
        same = len(set(lengths.values())) == 1
        require(same, "data", lengths, "a dict of tensors that share their first axis")
        count = next(iter(lengths.values()))
    else:
        readable = hasattr(data, "batch") or hasattr(data, "__getitem__")
        expected = "a dict of tensors, or len() with batch(indices) or [index]"
        require(readable and hasattr(data, "__len__"), "data", type(data).__name__, expected)
        count = len(data)
    require(count > 0, "data", f"{type(data).__name__} of length 0", "at least one sample")
    return count


def describe(data: Any) -> list[Any]:
    """What tells one data set from another: type, name, split and size."""
    return [type(data).__name__, getattr(data, "name", ""), getattr(data, "split", ""), size(data)]


def fetch(data: Any, indices: Tensor, device: torch.device | str) -> dict[str, Any]:
    """The samples at `indices` (B,) as a dict of tensors with a leading batch axis, on `device`."""
    if isinstance(data, dict):
        batch = {key: value[indices] for key, value in data.items()}
    elif hasattr(data, "batch"):
        batch = data.batch(indices)
    else:
        batch = default_collate([data[index] for index in indices.tolist()])
    if not isinstance(batch, dict):  # torchvision's (image, label)
        batch = dict(zip(("image", "label"), batch, strict=True))
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def flip_and_shift(images: Tensor, generator: torch.Generator, pixels: int = 4) -> Tensor:
    """Mirror half of the images and move each by up to `pixels`; edges are repeated.

    `images` (B, C, H, W) → the same shape. `generator` is a CPU generator, so that the draw is the
    same on every device. Raises ValueError on other shapes.
    """
    require(images.ndim == 4, "images", tuple(images.shape), "shape (B, C, H, W)")
    batch, _, height, width = images.shape
    mirrored = torch.rand(batch, 1, generator=generator) < 0.5
    dy, dx = torch.randint(-pixels, pixels + 1, (2, batch, 1), generator=generator)
    rows = (torch.arange(height) + dy).clamp(0, height - 1)
    columns = (torch.arange(width) + dx).clamp(0, width - 1)
    columns = torch.where(mirrored, columns.flip(1), columns)
    rows = rearrange(rows, "b h -> b 1 h 1").to(images.device).expand_as(images)
    columns = rearrange(columns, "b w -> b 1 1 w").to(images.device).expand_as(images)
    return images.gather(2, rows).gather(3, columns)
