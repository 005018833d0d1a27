"""A tree from a matrix of scores, child by parent (chapter 09).

Ding et al. 2023 (arXiv:2304.03282) show trees, and the known text does not say how they are read
off: decoder and root are arguments here, and their defaults are ours. Taking each child's best
parent never gives a tree, because without self-loops there is always a cycle. Hence three others:
the best tree as a whole (Chu & Liu 1965; Edmonds 1967, in the order of Tarjan 1977), a greedy one
for batches, and the best forest.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DECODERS = ("mst", "greedy", "forest", "argmax")
ROOTS = ("received", "self", "best")
TINY = 1e-12  # a lower share counts as this


@dataclass(frozen=True)
class DependencyTree:
    """Parents of N tokens, of one image `(N,)` or of a batch `(B, N)`; `tree[b]` is one image's.

    Attributes:
        parents: int64, −1 at a root.
        scores: share of what a token sends (to others) that goes to its parent; 0 at a root, and
            in a forest the share that it keeps.
    """

    parents: Tensor
    scores: Tensor

    def __getitem__(self, image: int) -> "DependencyTree":
        return DependencyTree(self.parents[image], self.scores[image])

    @property
    def depth(self) -> Tensor:
        """Steps to the root, `(..., N)`; −1 for a token that never gets to one (argmax only)."""
        return self._climb()[0]

    @property
    def sizes(self) -> Tensor:
        """Tokens in the subtree below and including each, `(..., N)`; not defined with cycles."""
        return self._climb()[1]

    @property
    def tops(self) -> Tensor:
        """The root above each token, `(..., N)`: itself for a root; not defined with cycles."""
        return self._climb()[2]

    @property
    def star_share(self) -> Tensor:
        """Share of the tokens with a parent that have the most popular one, `(...)`."""
        has_parent = self.parents >= 0
        children = torch.zeros_like(self.parents).scatter_add(
            -1, self.parents.clamp_min(0), has_parent.long()
        )
        return children.amax(-1) / has_parent.sum(-1)

    def cycles(self) -> list[list[int]]:
        """The cycles of one image, each from its lowest token on: none unless decoded by argmax."""
        found, parents = [], self._one().tolist()
        for start in range(len(parents)):
            walk = [start]
            while (up := parents[walk[-1]]) > start and up not in walk:
                walk.append(up)
            if up == start:
                found.append(walk)
        return found

    def path(self, token: int) -> list[int]:
        """From `token` up to its root (or to where a cycle closes), both included."""
        parents, walk = self._one(), [token]
        while (up := int(parents[walk[-1]])) >= 0 and up not in walk:
            walk.append(up)
        return walk

    def children(self, token: int) -> list[int]:
        """Whose parent `token` is, ascending."""
        return (self._one() == token).nonzero().flatten().tolist()

    def subtree(self, token: int) -> list[int]:
        """`token` and all below it, ascending."""
        below, new = {token}, [token]
        while new:
            new = [child for up in new for child in self.children(up) if child not in below]
            below.update(new)
        return sorted(below)

    def cut(self, parts: int, min_size: int = 2) -> Tensor:
        """Cut the weakest edges until there are `parts` pieces: the piece of each token, `(N,)`.

        An edge stays when a piece would have fewer than `min_size` tokens, so that there may be
        fewer pieces than asked. Pieces are numbered by their highest token's place.

        Raises:
            ValueError: a batch; a tree with cycles; `parts` below the number of roots.
        """
        parents, sizes = self._one().tolist(), self.sizes.tolist()
        if -1 in self.depth:
            raise ValueError("cut: expected a tree, got cycles (decode='argmax')")
        pieces = parents.count(-1)
        if parts < pieces:
            raise ValueError(f"parts={parts}: expected at least the number of roots, {pieces}")
        edges = sorted((i for i, up in enumerate(parents) if up >= 0), key=lambda i: self.scores[i])
        for child in edges:
            above = [child]
            while parents[above[-1]] >= 0:
                above.append(parents[above[-1]])
            enough = min(sizes[child], sizes[above[-1]] - sizes[child]) >= min_size
            if pieces < parts and enough:
                for token in above[1:]:
                    sizes[token] -= sizes[child]
                parents[child] = -1
                pieces += 1
        tops = DependencyTree(torch.tensor(parents), self.scores.cpu()).tops
        return tops.unique(return_inverse=True)[1].to(self.parents.device)

    def _one(self) -> Tensor:
        if self.parents.ndim != 1:
            raise ValueError(f"parents {tuple(self.parents.shape)}: expected one image, tree[b]")
        return self.parents

    def _climb(self) -> tuple[Tensor, Tensor, Tensor]:
        """Depth, subtree size and root of each token, all climbing together."""
        here = torch.arange(self.parents.shape[-1], device=self.parents.device)
        top = here.expand_as(self.parents)
        depth, sizes = torch.zeros_like(self.parents), torch.ones_like(self.parents)
        for _ in range(self.parents.shape[-1]):
            above = self.parents.gather(-1, top)
            climbs = above >= 0
            if not climbs.any():
                break
            depth += climbs
            top = torch.where(climbs, above, top)
            sizes.scatter_add_(-1, top, climbs.long())
        return depth.masked_fill(self.parents.gather(-1, top) >= 0, -1), sizes, top


def dependency_tree(
    scores: Tensor,
    decode: str = "mst",
    root: str | int | Tensor = "received",
    score: str = "plain",
) -> DependencyTree:
    """Decode child-by-parent scores `(N, N)` or `(B, N, N)` into a tree.

    Rows are divided by what a child sends to others; a token is nobody's own parent.

    Args:
        decode: "mst": the tree with the largest product of scores, exact (Chu–Liu/Edmonds), image
            by image. "greedy": take edges from the largest score down, unless the child has a
            parent or a cycle would close; for whole batches. "forest": the best forest, in which a
            token may be a root at the price of its score with itself; `root` is not used.
            "argmax": each child's best parent; no tree, always with cycles; `root` is not used.
        root: "received": who has the largest sum of scores from others (ours); "self": the largest
            score with itself; "best": what gives the best tree (with "greedy": who is left over);
            or a place, or one an image `(B,)`, such as `trace.messages[-1].argmax(-1)`.
        score: "plain", or "pmi": divided by the parent's sum over children, against popular ones.

    Raises:
        ValueError: shapes, negative scores or options are not as said.
    """
    square = scores.ndim in (2, 3) and scores.shape[-1] == scores.shape[-2] and scores.numel() > 0
    if not square or not bool((scores >= 0).all()):
        raise ValueError(f"scores {tuple(scores.shape)}: expected (N, N) or (B, N, N), all ≥ 0")
    for name, value, allowed in (("decode", decode, DECODERS), ("score", score, ("plain", "pmi"))):
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(allowed)}")
    batch = (scores if scores.ndim == 3 else scores[None]).detach().double()
    own = batch.diagonal(dim1=-2, dim2=-1)
    others = batch - torch.diag_embed(own)
    roots = None if decode in ("forest", "argmax") else _roots(root, own, others)

    shares = torch.cat([others, own[..., None]], -1) if decode == "forest" else others
    shares = shares / shares.sum(-1, keepdim=True).clamp_min(TINY)
    weights = shares / shares.sum(-2, keepdim=True).clamp_min(TINY) if score == "pmi" else shares
    logs = weights.clamp_min(TINY).log()
    logs.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)
    if decode == "argmax":
        parents = logs.argmax(-1)
    elif decode == "greedy":
        parents = _greedy(logs, roots)
    else:
        logs = logs if decode == "forest" else _with_root(logs, roots)
        parents = torch.stack([torch.from_numpy(_edmonds(x)) for x in logs.cpu().numpy()])
        parents = parents.to(scores.device)
    kept = torch.where(parents < 0, shares[..., -1] if decode == "forest" else 0.0, 0.0)
    chosen = shares.gather(-1, parents.clamp_min(0)[..., None]).squeeze(-1)
    tree = DependencyTree(parents, torch.where(parents < 0, kept, chosen).to(scores.dtype))
    return tree if scores.ndim == 3 else tree[0]


def _roots(root: str | int | Tensor, own: Tensor, others: Tensor) -> Tensor | None:
    """The root of each image, `(B,)`; None when the decoder is to find it."""
    B, N = own.shape
    if isinstance(root, str):
        if root not in ROOTS:
            raise ValueError(f"root={root!r}: expected {', '.join(ROOTS)}, or places (B,)")
        return {"received": others.sum(1).argmax(-1), "self": own.argmax(-1), "best": None}[root]
    roots = torch.as_tensor(root, device=own.device)
    if roots.is_floating_point() or roots.ndim > 1 or roots.numel() not in (1, B):
        raise ValueError(f"root {tuple(roots.shape)}: expected a place, or one an image, ({B},)")
    if bool((roots < 0).any() or (roots >= N).any()):
        raise ValueError(f"root={roots.tolist()}: expected places from 0 to {N - 1}")
    return roots.long().expand(B)


def _with_root(logs: Tensor, roots: Tensor | None) -> Tensor:
    """A column for a node above the root, `(B, N, N + 1)`: open to `roots`, or at a price to all.

    The price is the same for each and more than a whole tree can gain, so that one token pays it.
    """
    if roots is None:
        finite = logs.masked_fill(logs == -torch.inf, 0.0)
        price = (finite.amax() - finite.amin()) * logs.shape[-1] + 1.0
        return torch.cat([logs, -price.expand(*logs.shape[:2], 1)], -1)
    is_root = F.one_hot(roots, logs.shape[-1]).bool()[..., None]
    return torch.cat([logs, torch.zeros_like(logs[..., :1])], -1).masked_fill(
        torch.cat([is_root.expand_as(logs), ~is_root], -1), -torch.inf
    )


def _edmonds(scores: np.ndarray) -> np.ndarray:
    """Parents `(N,)` in the best tree below a node above all; −1 where that node is the parent.

    Chu–Liu/Edmonds in Tarjan's order, O(N²): follow best parents upwards; a cycle becomes one node,
    which may be entered at any member for what that member then loses; at the end, cycles open.

    Args:
        scores: `(N, N + 1)`, child by parent, the last column for the node above; −∞ is no edge.
    """
    n = len(scores)
    w = np.full((n + 1, n + 1), -np.inf)
    w[:n] = scores
    parents = np.full(n + 1, n)
    done = np.arange(n + 1) == n
    cycles = []
    for node in range(n):
        path = []
        while not done[node]:
            if node in path:
                cycle = np.array(path[path.index(node) :])
                del path[path.index(node) :]
                inner = parents[cycle]
                enter, leave = w[cycle] - w[cycle, inner][:, None], w[:, cycle]
                cycles.append((node, cycle, inner, enter.argmax(0), leave.argmax(1)))
                w[node], w[:, node] = enter.max(0), leave.max(1)
                done[cycle] = cycle != node
                w[:, cycle[1:]] = w[node, node] = -np.inf
            path.append(node)
            parents[node] = w[node].argmax()
            node = parents[node]
        done[path] = True
    for node, cycle, inner, enter, leave in reversed(cycles):
        outer = parents[node]
        below = np.flatnonzero(parents == node)
        parents[below] = cycle[leave[below]]
        parents[cycle] = inner
        parents[cycle[enter[outer]]] = outer
    return np.where(parents == n, -1, parents)[:n]


def _greedy(logs: Tensor, roots: Tensor | None) -> Tensor:
    """Best edge first, all images of a batch at once: `(B, N, N)` → parents `(B, N)`.

    Only the top of a piece may still get a parent, in another piece: N − 1 times, the best such
    edge is taken, and the top of the grown piece looks for its next best.
    """
    B, N, _ = logs.shape
    image = torch.arange(B, device=logs.device)
    tops = torch.arange(N, device=logs.device).expand(B, N)  # of each token's piece
    parents = torch.full_like(tops, -1).contiguous()
    best, target = logs.max(-1)
    barred = torch.full_like(image, -1) if roots is None else roots
    best = best.masked_fill(torch.arange(N, device=logs.device) == barred[:, None], -torch.inf)
    for _ in range(N - 1):
        child = best.argmax(-1)
        parent = target[image, child]
        parents[image, child] = parent
        best[image, child] = -torch.inf
        top = tops[image, parent]
        tops = torch.where(tops == child[:, None], top[:, None], tops)
        elsewhere = logs[image, top].masked_fill(tops == top[:, None], -torch.inf)
        value, target[image, top] = elsewhere.max(-1)
        best[image, top] = value.masked_fill(top == barred, -torch.inf)
    return parents
