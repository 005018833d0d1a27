"""The common form of the whole course: normalise(score) · values (chapter 11).

Every mechanism answers the same questions in its own way: who asks (a row of the scores), who
answers (a column), how a pair is scored, along which axis the scores are normalised, and which
pairs may meet at all. `attention` takes the answers as arguments; `attnlab.lab.common_cases`
computes each mechanism by it, and `attnlab.lab.common_rows` is the table of all answers.

The form materialises all weights: it is here to be read and compared with, not to be fast.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from attnlab.lab.arguments import require

NORMALIZERS = ("softmax", "sum", "mean", "sigmoid", "none")
AXES = {"keys": -1, "queries": -2}


def attention(
    scores: Tensor,
    values: Tensor,
    *,
    normalize: str = "softmax",
    axis: str = "keys",
    mask: Tensor | None = None,
) -> Tensor:
    """normalise(scores) · values: what each query receives.

    Args:
        scores, normalize, axis, mask: as in `weights`.
        values: what each key has to say, `(..., keys, d)`.

    Returns:
        `(..., queries, d)`.

    Raises:
        ValueError: `values` has another number of keys, and all of `weights`.
    """
    fits = values.ndim >= 2 and values.shape[-2] == scores.shape[-1]
    require(fits, "values", tuple(values.shape), f"(..., keys={scores.shape[-1]}, d)")
    return weights(scores, normalize=normalize, axis=axis, mask=mask) @ values


def weights(
    scores: Tensor, *, normalize: str = "softmax", axis: str = "keys", mask: Tensor | None = None
) -> Tensor:
    """normalise(scores): how much of each key's value each query receives.

    Args:
        scores: `(..., queries, keys)`: a row for each who asks, a column for each who answers.
        normalize: "softmax"; "sum", divide by the sum; "mean", divide by how many may meet;
            "sigmoid", each pair by itself; "none", the scores as they are.
        axis: along which the first three are taken. "keys": each query's weights are a whole, as
            almost everywhere. "queries": each key's are, and a query may get anything.
        mask: boolean, broadcastable to `scores`; True = the two may meet. Others have weight 0.

    Returns:
        The shape of `scores`; 0 along an axis on which none may meet.

    Raises:
        ValueError: an unknown `normalize` or `axis`; a `mask` of another dtype or shape.
    """
    require(normalize in NORMALIZERS, "normalize", normalize, f"one of {', '.join(NORMALIZERS)}")
    require(axis in AXES, "axis", axis, f"one of {', '.join(AXES)}")
    meet = torch.ones_like(scores, dtype=torch.bool) if mask is None else _fitting(mask, scores)
    dim = AXES[axis]
    if normalize == "softmax":
        alone = ~meet.any(dim, keepdim=True)
        scores = scores.masked_fill(~meet, -math.inf).masked_fill(alone, 0.0)
        return scores.softmax(dim).masked_fill(~meet, 0.0)
    scores = (scores.sigmoid() if normalize == "sigmoid" else scores).masked_fill(~meet, 0.0)
    if normalize == "sum":
        total = scores.sum(dim, keepdim=True)
        return scores / total.masked_fill(total == 0, 1.0)
    if normalize == "mean":
        return scores / meet.sum(dim, keepdim=True).clamp(min=1)
    return scores


def _fitting(mask: Tensor, scores: Tensor) -> Tensor:
    require(mask.dtype == torch.bool, "mask.dtype", mask.dtype, "bool (True = may meet)")
    try:
        return mask.expand_as(scores)
    except RuntimeError:
        expected = f"broadcastable to the scores {tuple(scores.shape)}"
        raise ValueError(f"mask {tuple(mask.shape)}: expected {expected}") from None


class Case(NamedTuple):
    """One mechanism twice, with random weights and inputs, in float64."""

    own: Callable[..., Tensor]  # the library's function or module
    common: Callable[..., Tensor]  # the same by `attention`
    inputs: tuple[Tensor, ...]  # of both
