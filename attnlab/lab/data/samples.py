"""`Samples`: the one sample type of every data set in the course."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

Batch = dict[str, Tensor]
Indices = Sequence[int] | Tensor | slice

UNIT = frozenset({"image", "instances", "saliency"})  # stored as bytes, given as floats in [0, 1]
REAL = frozenset({"boxes", "flow"})  # may be stored as small integers, given as floats


class Samples(Dataset):
    """A data set held in tensors; a sample is a dict of tensors, a batch the same for many samples.

    | key | one sample | |
    |---|---|---|
    | `image` | `(3, H, W)` float in [0, 1] | clips: `(3, T, H, W)` |
    | `label` | `()` int | what a classifier predicts: an index into `classes` |
    | `labels` | `(K,)` int | class of each instance, −1 for padding |
    | `instances` | `(K, H, W)` float in [0, 1] | what is *visible* of each, 0 for padding |
    | `saliency` | `(H, W)` float in [0, 1] | where any instance is |
    | `boxes` | `(K, 4)` float | x1, y1, x2, y2 in px, x2 and y2 exclusive; 0 for padding |

    `K` is one number per data set. Clips have a frame axis T as well: `instances (K, T, H, W)`,
    `saliency (T, H, W)`, `boxes (K, T, 4)`. Further keys (parts and trees, flow and visibility) are
    in the docstrings of the generators.

    Args:
        tensors: what is stored, first axis = sample. `image`, `instances` and `saliency` are uint8
            (255 means 1.0) or bool; integers of any width come back as int64, halves as float32.
        classes: the names that `label` indexes.
        name, split: what was loaded.
        derive: adds entries that follow from the stored ones to a batch, so that they need no room.

    Raises:
        ValueError: the tensors do not all have the same number of samples, or there is no `image`.
    """

    def __init__(
        self,
        tensors: Batch,
        *,
        classes: Sequence[str],
        name: str = "",
        split: str = "",
        derive: Callable[[Batch], Batch] | None = None,
    ):
        if "image" not in tensors:
            raise ValueError(f"tensors: expected a key 'image', got {sorted(tensors)}")
        lengths = {key: len(value) for key, value in tensors.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"tensors: expected one length for all keys, got {lengths}")
        self.tensors = dict(tensors)
        self.classes = tuple(classes)
        self.name = name
        self.split = split
        self.derive = derive

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def device(self) -> torch.device:
        return self.tensors["image"].device

    def __len__(self) -> int:
        return len(self.tensors["image"])

    def __repr__(self) -> str:
        shape = tuple(self.tensors["image"].shape[1:])
        return (
            f"Samples({self.name!r}, {self.split!r}: {len(self)} images {shape}, "
            f"{self.num_classes} classes)"
        )

    def __getitem__(self, index: int) -> Batch:
        """One sample. Raises IndexError outside `-len(self) <= index < len(self)`."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: expected -{len(self)} to {len(self) - 1}, got {index}")
        return {key: value[0] for key, value in self.batch([index % len(self)]).items()}

    def batch(self, indices: Indices) -> Batch:
        """The samples at `indices` (a sequence, tensor or slice): a dict of `(B, …)` tensors."""
        if not isinstance(indices, slice):
            indices = torch.as_tensor(indices, dtype=torch.long, device=self.device)
        batch = {key: given(key, value[indices]) for key, value in self.tensors.items()}
        return self.derive(batch) if self.derive else batch

    def to(self, device: torch.device | str) -> "Samples":
        """The same samples with their tensors on `device`."""
        tensors = {key: value.to(device) for key, value in self.tensors.items()}
        return Samples(
            tensors, classes=self.classes, name=self.name, split=self.split, derive=self.derive
        )


def given(key: str, value: Tensor) -> Tensor:
    """From the stored form to the given one: bytes to unit floats, small integers to int64."""
    if key in UNIT and value.dtype == torch.uint8:
        return value.float().div_(255)
    if key in UNIT or key in REAL or value.is_floating_point():
        return value.float()
    return value if value.dtype == torch.bool else value.long()


def as_size(size: int | Sequence[int]) -> tuple[int, int]:
    """`size` as (height, width) in px. Raises ValueError unless it is one or two integers ≥ 16."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(side, int) and side >= 16 for side in pair):
        raise ValueError(f"size: expected an int or (height, width), each at least 16, got {size}")
    return pair
