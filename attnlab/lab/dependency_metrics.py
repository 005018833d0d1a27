"""Does a dependency tree follow the parts of objects? Scores against the trees of `parts`.

Scores are child by parent, `(B, N, N)`, as `dependency_scores` gives them, for N patches. `regions`
`(B, N)` is the node that each patch shows (`token_regions`), −1 for a patch that shows no one node
clearly, which counts nowhere; 0 is the background. `owner` `(B, R)` is the object that a node
belongs to, −1 for the background and for padding: `node_object` of `parts`. What a patch sends to
itself counts nowhere either, and its other scores are divided by their sum.

All of it is Ding et al. 2023 (arXiv:2304.03282) as far as it is known, and ours where it is not. A
number without its baselines says little: nearness alone explains much (`metrics.gaussian_locality`,
`attnlab.lab.dependency_baselines`).
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from attnlab.dependency_trees import DependencyTree
from attnlab.lab.arguments import inside, require


def token_regions(nodes: Tensor, grid: tuple[int, int], least: float = 0.6) -> Tensor:
    """The node that fills most of each patch, `(B, N)`; −1 where it fills less than `least` of it.

    Args:
        nodes: node at each pixel, `(B, H, W)`, integers ≥ 0.
        grid: rows and columns of patches; H and W are multiples of them.
    """
    inside("[0, 1]", least=least)
    fits = nodes.ndim == 3 and not nodes.is_floating_point()
    fits = fits and nodes.shape[1] % grid[0] == 0 and nodes.shape[2] % grid[1] == 0
    require(fits, "nodes", (nodes.dtype, tuple(nodes.shape)), f"integers (B, H, W) for {grid=}")
    patches = rearrange(nodes.long(), "b (r y) (c x) -> b (r c) (y x)", r=grid[0], c=grid[1])
    share, region = F.one_hot(patches).float().mean(2).max(-1)
    return region.masked_fill(share < least, -1)


def attachment(scores: Tensor, regions: Tensor, owner: Tensor, popularity: bool = False) -> Tensor:
    """Does a part send most to its own object? `(B, R)` from 0 (no) to 1, NaN where not counted.

    D[r, k] is the mean over the patches of part r of what they send to object k, divided by k's
    patches other than r's; the background is one more candidate. Right is the part's own object, so
    that a part without other patches of its object is not counted; if candidates are equal, the
    score is what a random choice among them would get. Without the division by area, the background
    would win by its size. Take `nanmean`; chance is 1 / (objects + 1).

    Args:
        popularity: divide the scores by what a parent receives from all, so that a patch to which
            everybody sends does not decide.
    """
    sent, member = _sent(scores, regions, owner), _member(regions, owner)  # (B, N, K + 1)
    if popularity:
        sent = sent / sent.sum(1, keepdim=True).clamp_min(1e-12)
    hits = torch.full(owner.shape, torch.nan, dtype=sent.dtype, device=sent.device)
    for node in range(owner.shape[1]):
        part = (regions == node).to(sent.dtype)  # (B, N)
        rest = member * (1 - part)[..., None]
        area = rest.sum(1)
        given = (part[:, None] @ sent @ rest)[:, 0] / area.clamp_min(1)
        own = owner[:, node].clamp_min(0)[:, None]
        counted = (owner[:, node] >= 0) & (part.sum(1) > 0) & (area.gather(1, own)[:, 0] > 0)
        given = given.masked_fill(area == 0, -1.0)
        best = given >= given.amax(1, keepdim=True) * (1 - 1e-9)
        hit = best.gather(1, own)[:, 0] / best.sum(1)
        hits[:, node] = torch.where(counted, hit, torch.nan)
    return hits


def nearer_elsewhere(regions: Tensor, owner: Tensor, grid: tuple[int, int]) -> Tensor:
    """The parts whose center is nearer to another object's center than to their own's: `(B, R)`.

    They are where a tree of nearest neighbors goes wrong. An object's center is the mean place of
    its patches, without those of the part itself where it has others.
    """
    require(regions.shape[1] == grid[0] * grid[1], "grid", grid, f"{regions.shape[1]} patches")
    index = torch.arange(regions.shape[1], device=regions.device)
    places = torch.stack([index // grid[1], index % grid[1]], -1).double()  # (N, 2)
    member = _member(regions, owner)[..., :-1].double()  # (B, N, K)
    found = torch.zeros_like(owner, dtype=torch.bool)
    for node in range(owner.shape[1]):
        part = (regions == node).double()
        rest = member * (1 - part)[..., None]
        center = part @ places / part.sum(1, keepdim=True)
        centers = rest.mT @ places / rest.sum(1)[..., None]  # (B, K, 2), NaN where there are none
        away = (centers - center[:, None]).norm(dim=-1).nan_to_num(torch.inf)
        own = owner[:, node].clamp_min(0)[:, None]
        known = (owner[:, node] >= 0) & away.gather(1, own)[:, 0].isfinite()
        found[:, node] = known & (away.argmin(1, keepdim=True) != own)[:, 0]
    return found


def exit_attachment(tree: DependencyTree, regions: Tensor, owner: Tensor) -> Tensor:
    """Climb from each patch of a part until the region changes: is that the same object? `(B, N)`.

    1.0 yes, 0.0 no (the background, another object), NaN not counted: patches of no part, and
    those from which the root is reached before the region changes. Unclear patches are passed by.
    """
    require(tree.parents.shape == regions.shape, "tree", tuple(tree.parents.shape),
            f"a tree of {tuple(regions.shape)} patches")  # fmt: skip
    parents = tree.parents
    here = torch.arange(parents.shape[1], device=parents.device).expand_as(parents)
    arrived = torch.zeros_like(parents, dtype=torch.bool)
    for _ in range(parents.shape[1]):
        above = parents.gather(1, here)
        climbs = (above >= 0) & ~arrived
        here = torch.where(climbs, above, here)
        there = regions.gather(1, here)
        arrived |= climbs & (there != regions) & (there >= 0)
    of_patch = _owner_of(regions, owner)
    same = (of_patch.gather(1, here) == of_patch).double()
    return torch.where(arrived & (of_patch >= 0), same, torch.nan)


def object_mass(scores: Tensor, regions: Tensor, owner: Tensor) -> Tensor:
    """Where the patches of parts send: to their own object, to others, elsewhere. `(B, 3)`.

    The mean over these patches; the three sum to 1. NaN for an image without any. "Elsewhere" is
    the background and the unclear patches.
    """
    sent, of_patch = _sent(scores, regions, owner), _owner_of(regions, owner)
    on_object = of_patch >= 0
    same = (of_patch[:, :, None] == of_patch[:, None]) & on_object[:, None]
    own = (sent * same).sum(-1)
    other = (sent * on_object[:, None]).sum(-1) - own
    shares = torch.stack([own, other, 1 - own - other], -1) * on_object[..., None]
    return shares.sum(1) / on_object.sum(1, keepdim=True)


def tree_pieces(tree: DependencyTree, parts: int | Tensor) -> Tensor:
    """`DependencyTree.cut` for every image of a batch: the piece of each patch, `(B, N)`.

    Args:
        parts: pieces wanted, one number, or one an image `(B,)`.
    """
    wanted = torch.as_tensor(parts).expand(len(tree.parents)).tolist()
    return torch.stack([tree[image].cut(count) for image, count in enumerate(wanted)])


def matched_iou(labels: Tensor, target: Tensor, ignore_index: int = -1) -> Tensor:
    """Each true segment is matched with at most one of ours: mean IoU over true segments, `(B,)`.

    The matching is the best there is (Hungarian); a true segment without a match scores 0. Our
    numbers mean nothing. Per image: label the images 0 to B − 1 as one, `labels.flatten()[None]`,
    to match clusters with classes over a whole set.

    Args:
        labels, target: integers of one shape `(B, …)`. `ignore_index` in `target` counts nowhere.
    """
    from scipy.optimize import linear_sum_assignment

    same = labels.shape == target.shape and labels.ndim >= 2
    require(same, "labels", tuple(labels.shape), f"target's shape {tuple(target.shape)}")
    values = []
    for image, truth in zip(labels.cpu(), target.cpu(), strict=True):
        counted = truth != ignore_index
        require(bool(counted.any()), "target", "all ignored", "a counted place in every image")
        ours = F.one_hot(image[counted].unique(return_inverse=True)[1]).double()
        theirs = F.one_hot(truth[counted].unique(return_inverse=True)[1]).double()
        common = theirs.mT @ ours
        iou = common / (theirs.sum(0)[:, None] + ours.sum(0) - common)
        rows, columns = linear_sum_assignment(iou.numpy(), maximize=True)
        values.append(iou[rows, columns].sum() / len(iou))
    return torch.stack(values)


def gate_contrast(messages: Tensor, foreground: Tensor) -> Tensor:
    """Mean message of the object's patches over that of the others, layer by layer: `(L,)`.

    1 says nothing; above 1, the background is muted.

    Args:
        messages: M of each layer, `(L, B, N)`.
        foreground: bool `(B, N)`; both values must occur.
    """
    fits = foreground.dtype == torch.bool and messages.shape[1:] == foreground.shape
    expected = f"bool {tuple(messages.shape[1:])}"
    require(fits, "foreground", (foreground.dtype, tuple(foreground.shape)), expected)
    both = bool(foreground.any()) and not bool(foreground.all())
    require(both, "foreground", "all alike", "patches of objects and of the background")
    return messages[:, foreground].mean(1) / messages[:, ~foreground].mean(1)


def _sent(scores: Tensor, regions: Tensor, owner: Tensor) -> Tensor:
    """What each patch sends to others, in rows that sum to 1 (0 where it sends nothing)."""
    B, N = regions.shape
    fits = scores.shape == (B, N, N) and owner.ndim == 2 and len(owner) == B
    shapes = f"scores {tuple(scores.shape)}, regions {(B, N)}, owner {tuple(owner.shape)}"
    require(fits, "scores, regions, owner", shapes, "(B, N, N), (B, N), (B, R)")
    last = int(regions.max())
    require(last < owner.shape[1], "regions", last, f"nodes below {owner.shape[1]}")
    others = scores.detach().double()
    others = others - torch.diag_embed(others.diagonal(dim1=1, dim2=2))
    return others / others.sum(-1, keepdim=True).clamp_min(1e-12)


def _owner_of(regions: Tensor, owner: Tensor) -> Tensor:
    """The object that each patch shows, `(B, N)`; −1 for none."""
    return owner.gather(1, regions.clamp_min(0)).masked_fill(regions < 0, -1)


def _member(regions: Tensor, owner: Tensor) -> Tensor:
    """Which object each patch shows, and in the last column whether it is background: 0 or 1."""
    objects = int(owner.max()) + 1
    of_patch = torch.where(regions == 0, objects, _owner_of(regions, owner))
    return (of_patch[..., None] == torch.arange(objects + 1, device=owner.device)).double()
