"""Which tokens DependencyViT-Lite drops, who they leave their place to, and how they come back.

Ding et al. 2023 (arXiv:2304.03282), dynamic pooling. A stage keeps the tokens with the highest
score. A dropped child is remembered by the parents that got its last message, so that a dense map
can be put together at the end: a kept token is copied, a dropped one is the mean of its parents'
features, weighted by what each of them got. What the paper leaves open is an argument here.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SCORES = ("received_sum", "received", "gate", "random")
FILLS = ("soft", "hard", "zero")


class Sending(NamedTuple):
    """What one layer of reversed attention sends, and to whom."""

    weights: Tensor  # A_F (B, heads, children, parents), rows sum to 1
    head_probs: Tensor  # P (B, heads, children)
    messages: Tensor  # M (B, children)

    @property
    def sent(self) -> Tensor:
        """What each child sends through each head, P M, `(B, heads, children)`."""
        return self.head_probs * self.messages[:, None]

    def mask(self) -> Tensor:
        """The soft dependency mask A_M[j, i] = Σ_h A_R[h, j, i], `(B, parents, children)`."""
        return torch.einsum("bhij,bhi->bji", self.weights, self.sent.to(self.weights.dtype))

    def received(self) -> Tensor:
        """r_j = Σ_i≠j A_M[j, i], what each parent gets from others, `(B, parents)`."""
        everything = (self.sent[:, :, None] @ self.weights)[:, :, 0]
        from_self = self.sent * self.weights.diagonal(dim1=-2, dim2=-1)
        return (everything - from_self).sum(1).clamp_min(0)


class Stage(NamedTuple):
    """One pruning stage: positions among the tokens before it, both lists ascending."""

    kept: Tensor  # (B, n)
    pruned: Tensor  # (B, p)
    parents: Tensor  # (B, p, n): share of a pruned child's message that each kept token got


class Encoding(NamedTuple):
    """What DependencyViT knows of a batch of images at one depth, n tokens being left."""

    tokens: Tensor  # (B, n, D)
    messages: Tensor  # M (B, n)
    received: Tensor  # (B, n): what each got from others in all layers that were observed
    ids: Tensor  # (B, n): places on the original grid, ascending; prefix tokens come first
    grid: tuple[int, int]  # rows and columns of patches
    stages: tuple[Stage, ...] = ()


def keep_counts(
    tokens: int, keep_rates: tuple[float, ...], rounding: str = "floor"
) -> tuple[int, ...]:
    """How many of `tokens` are left after each stage.

    Args:
        keep_rates: shares of the *original* tokens.
        rounding: "floor" rounds each product down (ours); "sequential" goes on from the last
            rounded count, as the public port does.
    """
    counts, before = [tokens], 1.0
    for rate in keep_rates:
        exact = counts[-1] * rate / before if rounding == "sequential" else tokens * rate
        counts.append(max(1, int(exact + 1e-9)))
        before = rate
    return tuple(counts[1:])


def prune(
    state: Encoding,
    sending: Sending,
    keep: int,
    score: str = "received_sum",
    prefix: int = 0,
    through_parents: bool = False,
) -> Encoding:
    """Drop all but `keep` patches of each image, and remember the parents of the others.

    Args:
        sending: the last layer's, over the same tokens.
        keep: patches left; the `prefix` tokens in front are never dropped.
        score: what a kept token has most of; equal scores keep the lower place. "received_sum":
            received from others in all layers so far (ours); "received": in the last layer;
            "gate": its own messages M; "random".
        through_parents: let gradients pass through the remembered shares.
    """
    shape = state.tokens.shape[:2]
    values = {
        "received_sum": lambda: state.received,
        "received": sending.received,
        "gate": lambda: state.messages,
        "random": lambda: torch.rand(shape, device=state.tokens.device),
    }[score]().detach()
    values = torch.cat([torch.full_like(values[:, :prefix], torch.inf), values[:, prefix:]], 1)
    order = values.argsort(dim=1, descending=True, stable=True)
    kept, pruned = order[:, : keep + prefix].sort(1)[0], order[:, keep + prefix :].sort(1)[0]

    children = pruned[:, None, :, None]
    shares = sending.weights.take_along_dim(children, 2)  # (B, heads, p, n + p)
    shares = (shares * sending.sent[..., None].take_along_dim(children, 2)).sum(1)
    shares = shares.take_along_dim(kept[:, None], 2)  # columns of A_M, (B, p, n)
    total = shares.sum(-1, keepdim=True)
    nearest = _nearest(*(state.ids.gather(1, x) for x in (pruned, kept)), state.grid[1], prefix)
    parents = torch.where(total > 0, shares / total.masked_fill(total == 0, 1.0), nearest)
    stage = Stage(kept, pruned, parents if through_parents else parents.detach())
    return Encoding(
        state.tokens.take_along_dim(kept[..., None], 1),
        state.messages.gather(1, kept),
        state.received.gather(1, kept),
        state.ids.gather(1, kept),
        state.grid,
        (*state.stages, stage),
    )


def restore(x: Tensor, stages: tuple[Stage, ...], fill: str = "soft") -> Tensor:
    """Bring pruned tokens back, the last stage's first: `(B, n, D)` → `(B, N, D)`.

    Kept tokens are copied to the last bit.

    Args:
        fill: a pruned token is the mean of its parents, weighted by their shares ("soft"), its
            first parent ("hard"), or 0 ("zero").

    Raises:
        ValueError: unknown `fill`, or `x` does not hold what the last stage kept.
    """
    if fill not in FILLS:
        raise ValueError(f"fill={fill!r}: expected one of {', '.join(FILLS)}")
    if stages and x.shape[:2] != stages[-1].kept.shape:
        raise ValueError(f"x {tuple(x.shape)}: expected {tuple(stages[-1].kept.shape)} tokens")
    for kept, pruned, parents in reversed(stages):
        if fill == "hard":
            parents = F.one_hot(parents.argmax(-1), parents.shape[-1])
        elif fill == "zero":
            parents = torch.zeros_like(parents)
        place = torch.cat([kept, pruned], 1).argsort(1)
        x = torch.cat([x, parents.to(x.dtype) @ x], 1).take_along_dim(place[..., None], 1)
    return x


def _nearest(pruned: Tensor, kept: Tensor, columns: int, prefix: int) -> Tensor:
    """One-hot over the kept, `(B, p, n)`: the nearest patch, for a child that sent them nothing."""
    places = [
        torch.stack([(ids - prefix) // columns, (ids - prefix) % columns], -1).float()
        for ids in (pruned, kept)
    ]
    distance = torch.cdist(*places, compute_mode="donot_use_mm_for_euclid_dist")
    distance = distance.masked_fill((kept < prefix)[:, None], torch.inf)
    return F.one_hot(distance.argmin(-1), kept.shape[1]).to(distance.dtype)
