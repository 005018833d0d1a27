"""What DependencyViT leaves behind: who sends how much to whom, layer by layer (chapter 09).

Ding et al. 2023 (arXiv:2304.03282). A `DependencyTrace` holds the soft dependency masks of all
layers; `dependency_scores` combines them into one matrix, child by parent, from which
`attnlab.dependency_trees` decodes a tree; `dependency_saliency` reads maps off it. How the paper
combines the layers is not known: the ways are arguments, and their defaults are ours.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.dependency_pruning import Encoding, Sending, Stage
from attnlab.dependency_trees import dependency_tree


@dataclass(frozen=True)
class DependencyTrace:
    """What every layer sent, on the original grid of N tokens (prefix tokens first, if any).

    Tokens that were pruned before a layer have zeros there.
    """

    masks: Tensor  # A_M (L, B, N, N): row parent, column child; column i sums to messages[i]
    messages: Tensor  # M (L, B, N), as sent
    head_probs: Tensor  # P (L, B, heads, N)
    alive: Tensor  # (L, B, N) bool: not yet pruned
    stages: tuple[Stage, ...]
    grid: tuple[int, int]  # rows and columns of patches
    num_prefix_tokens: int = 0

    @classmethod
    def of(
        cls, layers: list[tuple[Encoding, Sending]], last: Encoding, num_prefix_tokens: int
    ) -> "DependencyTrace":
        """Put together what `DependencyViT` saw: per layer the tokens, and what they sent."""
        tokens = num_prefix_tokens + last.grid[0] * last.grid[1]
        masks, messages, head_probs, alive = [], [], [], []
        for state, sending in layers:
            full = state.ids.new_full((len(state.ids), tokens), -1)  # place among the alive, or −1
            here = torch.arange(state.ids.shape[1], device=state.ids.device).expand_as(state.ids)
            place = full.scatter(1, state.ids, here)
            alive.append(place >= 0)
            place = place.clamp_min(0)
            mask = sending.mask().take_along_dim(place[:, :, None], 1)
            mask = mask.take_along_dim(place[:, None], 2)
            masks.append(mask * (alive[-1][:, :, None] & alive[-1][:, None]))
            messages.append(sending.messages.gather(1, place) * alive[-1])
            heads = sending.head_probs.take_along_dim(place[:, None], 2)
            head_probs.append(heads * alive[-1][:, None])
        stacked = (torch.stack(x) for x in (masks, messages, head_probs, alive))
        return cls(*stacked, last.stages, last.grid, num_prefix_tokens)

    @property
    def received(self) -> Tensor:
        """r_j = Σ_i A_M[j, i] of every layer, self included, `(L, B, N)`."""
        return self.masks.sum(-1)


def dependency_scores(trace: DependencyTrace, combine: str = "sum") -> Tensor:
    """One matrix from the masks of all layers: `(B, N, N)`, row child, column parent, all ≥ 0.

    Args:
        combine: "sum" of A_M over the layers: a child counts where it speaks (ours). "mean_norm":
            the mean of A_M[j, i] / M_i, every layer alike. "last" or "layer:k" (from 1): one layer,
            in which many may be mute already. "flow": where what starts at a child ends after all
            layers, unsent messages staying at home; rows sum to 1; it finds ancestors, not parents.

    Raises:
        ValueError: unknown `combine`, or a layer that is not there.
    """
    sent = trace.masks.mT  # (L, B, children, parents)
    depth = len(sent)
    if combine == "sum":
        return sent.sum(0)
    if combine == "mean_norm":
        mass = sent.sum(-1, keepdim=True)
        layers = trace.alive.sum(0)[..., None]
        return (sent / mass.masked_fill(mass == 0, 1.0)).sum(0) / layers
    if combine == "flow":
        stays = torch.diag_embed(1 - sent.sum(-1))
        flow = sent[0] + stays[0]
        for layer in range(1, depth):
            flow = flow @ (sent[layer] + stays[layer])
        return flow
    name, _, number = combine.partition(":")
    layer = depth if combine == "last" else int(number) if number.isdecimal() else 0
    if name not in ("last", "layer") or not 1 <= layer <= depth:
        expected = f"sum, mean_norm, flow, last, or layer:1 to layer:{depth}"
        raise ValueError(f"combine={combine!r}: expected {expected}")
    return sent[layer - 1]


def dependency_saliency(
    trace: DependencyTrace, kind: str = "mass", features: Tensor | None = None, weight: float = 1.0
) -> Tensor:
    """How salient each patch is, by who sends to whom: `(B, rows, columns)`, ≥ 0.

    Args:
        kind: "mass": what it received from others in all layers (ours). "flow": what ends there
            (`combine="flow"`). "gate": its last message. "forest": 1 in the tree of the best forest
            that sends most in the last layer, else 0. "ncut": `normalized_cut` of the cosines of
            `features` (B, N, D), patches only, plus `weight` times the symmetrised sum of masks.

    Raises:
        ValueError: unknown `kind`, or `features` that do not fit it.
    """
    if kind == "mass":
        values = (trace.received - trace.masks.diagonal(dim1=-2, dim2=-1)).sum(0)
    elif kind == "flow":
        values = dependency_scores(trace, "flow").sum(1)
    elif kind == "gate":
        values = trace.messages[-1]
    elif kind == "forest":
        tops = dependency_tree(dependency_scores(trace), decode="forest").tops
        sent = trace.messages[-1]
        best = torch.zeros_like(sent).scatter_add(1, tops, sent).argmax(1, keepdim=True)
        values = (tops == best).to(sent.dtype)
    elif kind == "ncut":
        first = trace.num_prefix_tokens
        scores = dependency_scores(trace)[:, first:, first:]
        if features is None or features.shape[:2] != scores.shape[:2]:
            got = None if features is None else tuple(features.shape)
            raise ValueError(f"features {got}: expected {(*scores.shape[:2], 'D')} for kind='ncut'")
        unit = F.normalize(features.to(scores.dtype), dim=-1)
        affinity = (unit @ unit.mT).clamp_min(0) + weight * (scores + scores.mT) / 2
        return normalized_cut(affinity).unflatten(1, trace.grid)
    else:
        raise ValueError(f"kind={kind!r}: expected mass, flow, gate, forest or ncut")
    return values[:, trace.num_prefix_tokens :].unflatten(1, trace.grid)


def normalized_cut(affinity: Tensor) -> Tensor:
    """Shi & Malik 2000: `(B, N, N)` symmetric and ≥ 0 → the relaxed two-way cut, `(B, N)`, ≥ 0.

    The second eigenvector of D^−½ (D − W) D^−½, scaled by D^−½; its sign is such that the token of
    largest magnitude is high (as in TokenCut, Wang et al. 2022), its minimum is moved to 0.
    """
    root = affinity.sum(-1).clamp_min(1e-12).rsqrt()
    similar = root[:, :, None] * affinity * root[:, None]
    vector = torch.linalg.eigh(similar).eigenvectors[..., -2] * root
    peak = vector.gather(1, vector.abs().argmax(1, keepdim=True))
    vector = vector * peak.sign()
    return vector - vector.amin(1, keepdim=True)
