"""Random draws and boxes that the generators share."""

import hashlib

import torch
from torch import Tensor


class Draws:
    """Random numbers for `count` samples: integers from a CPU generator that is seeded by a key.

    Generators draw for a whole block of samples at a time, with the block's number in the key, so
    that sample i does not depend on how many samples were asked for.
    """

    def __init__(self, count: int, *key):
        digest = hashlib.sha256(repr(key).encode()).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        self.count = count

    def integers(self, high: int, *shape: int) -> Tensor:
        """Integers `(count, *shape)` from 0 to high − 1."""
        return torch.randint(high, (self.count, *shape), generator=self.generator)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Floats `(count, *shape)` from low to high, in steps of 2^-24 of the interval."""
        return low + (high - low) * self.integers(2**24, *shape).float() / 2**24


def tight_boxes(mask: Tensor) -> Tensor:
    """x1, y1, x2, y2 in px of masks `(…, H, W)`, x2 and y2 exclusive; `(…, 4)` int64.

    The box of an empty mask is zero.
    """
    ends = []
    for line in (mask.any(-2), mask.any(-1)):  # columns, rows
        first = line.byte().argmax(-1)
        end = line.shape[-1] - line.flip(-1).byte().argmax(-1)
        ends.append((first, end * line.any(-1)))
    (x1, x2), (y1, y2) = ends
    return torch.stack([x1, y1, x2, y2], dim=-1)
