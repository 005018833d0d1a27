"""The exercises of chapter 09: solutions, cases, hints, and the mistakes learners make."""

from itertools import pairwise

import torch

from attnlab.lab.exercises.framework import Case, Exercise


def soft_mask(
    weights: torch.Tensor, head_probs: torch.Tensor, messages: torch.Tensor
) -> torch.Tensor:
    """The soft dependency mask: how much each parent gets from each child, all heads together.

    weights: A_F, (B, heads, N, N), row child, column parent; rows sum to one.
    head_probs: P, (B, heads, N), which share of a child's message goes through which head.
    messages: M, (B, N), how much each child sends.
    Returns A_M, (B, N, N), row PARENT, column CHILD; column i sums to M of child i.
    """
    return torch.einsum("bhij,bhi,bi->bji", weights, head_probs, messages)


def _drawn(generator: torch.Generator, B: int, heads: int, N: int) -> tuple:
    """Random weights, head probabilities and messages."""
    weights = torch.randn(B, heads, N, N, generator=generator).softmax(-1)
    head_probs = torch.randn(B, heads, N, generator=generator).softmax(1)
    return weights, head_probs, torch.rand(B, N, generator=generator)


def _mask_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Case("one image, two heads, three tokens", _drawn(generator, 1, 2, 3)),
        Case("a batch of two, four heads, five tokens", _drawn(generator, 2, 4, 5)),
        Case("one head", _drawn(generator, 2, 1, 4)),
    ]


SOFT_MASK = Exercise(
    topic="dependency",
    solution=soft_mask,
    cases=_mask_cases,
    hints=(
        "Each child's row of A_F is scaled, heads are added up, and the result is transposed.",
        "What child i sends through head h is P[h, i] M[i]. It scales row i of A_F in head h.",
        "One einsum: the letters of A_F are b h i j, of P b h i, of M b i. Which ones are left?",
    ),
    mistakes=(
        (
            "Rows are children in yours: the result's row is the parent. Transpose.",
            lambda w, p, m: torch.einsum("bhij,bhi,bi->bij", w, p, m),
        ),
        (
            "You scaled by P and M of the parent, the receiver. The child decides how much it "
            "sends.",
            lambda w, p, m: torch.einsum("bhij,bhj,bj->bji", w, p, m),
        ),
        (
            "P is a share already: add the heads up, do not average them.",
            lambda w, p, m: torch.einsum("bhij,bhi,bi->bji", w, p, m) / w.shape[1],
        ),
        (
            "A child's message has to be scaled by M too: its column sums to M, not to one.",
            lambda w, p, m: torch.einsum("bhij,bhi->bji", w, p),
        ),
    ),
)


def depths(parents: list[int]) -> list[int]:
    """How many steps each token is from its root, when one climbs from parent to parent.

    parents: N numbers, the parent of each token; −1 for a root. There may be several roots, or
    none, and parents may go round in a circle.
    Returns N numbers: 0 for a root, 1 for its child, …; −1 for a token that never gets to a root.
    """
    found = []
    for token in range(len(parents)):
        seen = [token]
        while parents[seen[-1]] >= 0 and parents[seen[-1]] not in seen:
            seen.append(parents[seen[-1]])
        found.append(len(seen) - 1 if parents[seen[-1]] < 0 else -1)
    return found


def _forest(generator: torch.Generator, n: int, roots: int) -> list[int]:
    """A random forest whose tokens are in a random order."""
    order = torch.randperm(n, generator=generator).tolist()
    parents = [-1] * n
    for place in range(roots, n):
        above = torch.randint(place, (), generator=generator).item()
        parents[order[place]] = order[above]
    return parents


def _depth_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)
    circle = _forest(generator, 7, 2)
    top = circle.index(-1)
    ends = [i for i, up in enumerate(circle) if up == top]
    circle[top] = ends[0] if ends else (top + 1) % 7
    return [
        Case("a chain of three, and a second child of the root", ([-1, 0, 1, 0],)),
        Case("a random tree: a parent may have a higher number", (_forest(generator, 9, 1),)),
        Case("two tokens that are each other's parents, and one that hangs on them",
             ([-1, 2, 1, 2, 0],)),
        Case("a forest of three", (_forest(generator, 10, 3),)),
        Case("one root is gone, and a circle in its place", (circle,)),
    ]  # fmt: skip


def _climb(parents, limit, lost):
    """Depths by climbing at most `limit` steps; `lost` when no root is met."""
    found = []
    for token in range(len(parents)):
        steps = 0
        while parents[token] >= 0 and steps <= limit:
            token, steps = parents[token], steps + 1
        found.append(steps if parents[token] < 0 else lost)
    return found


def _in_order(parents):
    """Depths in one go from the lowest token on, as if parents always came first."""
    found = []
    for parent in parents:
        found.append(0 if parent < 0 else found[parent] + 1 if parent < len(found) else 1)
    return found


DEPTHS = Exercise(
    topic="dependency",
    solution=depths,
    cases=_depth_cases,
    hints=(
        "Climb from each token on its own, and remember where you have been.",
        "Stop at a root, or at a token that you have visited already. Which of the two was it?",
        "seen = [token]; while the parent of seen[-1] is ≥ 0 and not in seen: append it. The depth "
        "is len(seen) − 1 if seen[-1] is a root, else −1.",
    ),
    mistakes=(
        ("A root has depth 0: count steps, not tokens.",
         lambda p: [d + 1 if d >= 0 else d for d in depths(p)]),
        ("A parent may have a higher number than its child: its depth is not known yet.",
         _in_order),
        ("In a circle nobody gets to a root: −1, not the number of steps until you gave up.",
         lambda p: _climb(p, len(p), len(p))),
        ("Tokens that hang on a circle are −1 as well, not only those in it.",
         lambda p: [0 if d < 0 and not _on_circle(p, i) else d for i, d in enumerate(depths(p))]),
    ),
)  # fmt: skip


def _on_circle(parents, token):
    here = parents[token]
    for _ in parents:
        if here == token:
            return True
        here = parents[here] if here >= 0 else here
    return False


def gradients(
    weights: torch.Tensor, u: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Backward of o = Aᵀ u, where row i of A is the softmax of row i of the scores S.

    weights: A, (N, N), row child, column parent. u: (N, d), what each child sends.
    grad: G, (N, d), the derivative of the loss with respect to o; its row j belongs to parent j.
    Returns the derivatives of the loss with respect to u, (N, d), and to S, (N, N).
    """
    du = weights @ grad
    dS = weights * (u @ grad.T - (u * du).sum(dim=-1, keepdim=True))
    return du, dS


def _gradient_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)

    def case(about: str, n: int, d: int) -> Case:
        weights = torch.randn(n, n, generator=generator).softmax(-1)
        return Case(about, (weights, *torch.randn(2, n, d, generator=generator)))

    return [
        case("two tokens of width two", 2, 2),
        case("six tokens of width four", 6, 4),
        case("width one", 5, 1),
    ]


GRADIENTS = Exercise(
    topic="dependency",
    solution=gradients,
    cases=_gradient_cases,
    hints=(
        "The loss changes by Σ_j G_j · do_j. Write o_j = Σ_i A_ij u_i, and change u first.",
        "du_i = Σ_j A_ij G_j: ordinary attention to G. For S: dA_ij = u_i · G_j, and then the "
        "derivative of a softmax, row by row.",
        "dS_ij = A_ij (dA_ij − Σ_m A_im dA_im), and the sum is u_i · du_i.",
    ),
    mistakes=(
        (
            "A softmax couples its row: from dA_ij subtract the row's mean Σ_m A_im dA_im.",
            lambda a, u, g: (a @ g, a * (u @ g.T)),
        ),
        (
            "du is transposed: child i gets the gradients of the parents it sent to, by A, not Aᵀ.",
            lambda a, u, g: (a.T @ g, gradients(a, u, g)[1]),
        ),
        (
            "In dS, rows are children: dA_ij = u_i · G_j, not G_i · u_j.",
            lambda a, u, g: (
                a @ g, a * (g @ u.T - (a * (g @ u.T)).sum(dim=-1, keepdim=True)),
            ),
        ),
        (
            "The softmax runs over the parents, so the sum is over a row of A, not over a column.",
            lambda a, u, g: (
                a @ g, a * (u @ g.T - (a * (u @ g.T)).sum(dim=0, keepdim=True)),
            ),
        ),
    ),
)  # fmt: skip


def restore_tokens(
    x: torch.Tensor, stages: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """Bring the tokens back that were pruned, the last stage's first.

    x: (n, D), the tokens that are left after the last stage, in ascending order of their places.
    stages: for each stage, in the order in which they happened: kept (k,) and pruned (p,), places
    among the tokens that there were before it, both ascending; parents (p, k), rows sum to one: the
    share that each kept token got of each pruned one's message.
    Returns (N, D): kept tokens as they are, a pruned one as the mean of its parents by their share.
    """
    for kept, pruned, parents in reversed(stages):
        before = x.new_empty(len(kept) + len(pruned), x.shape[-1])
        before[kept] = x
        before[pruned] = parents @ x
        x = before
    return x


def _restore_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)

    def case(about: str, d: int, *counts: int) -> Case:
        stages = []
        for before, after in pairwise(counts):
            order = torch.randperm(before, generator=generator)
            kept, pruned = order[:after].sort()[0], order[after:].sort()[0]
            shares = torch.randn(before - after, after, generator=generator).softmax(-1)
            stages.append((kept, pruned, shares))
        return Case(about, (torch.randn(counts[-1], d, generator=generator), stages))

    shares = torch.randn(2, 2, generator=generator).softmax(-1)
    stage = torch.tensor([1, 3]), torch.tensor([0, 2]), shares
    return [
        Case("one stage, four tokens to two", (torch.randn(2, 2, generator=generator), [stage])),
        case("three stages, twelve tokens to four", 3, 12, 9, 6, 4),
        case("nothing was pruned", 2, 3),
    ]


def _restore_with(fill):
    """A mistake in what a pruned token becomes: `fill(parents, x)`."""

    def restored(x, stages):
        for kept, pruned, parents in reversed(stages):
            before = x.new_empty(len(kept) + len(pruned), x.shape[-1])
            before[kept], before[pruned] = x, fill(parents, x)
            x = before
        return x

    return restored


def _in_a_row(x, stages):
    for _, _, parents in reversed(stages):
        x = torch.cat([x, parents @ x])
    return x


RESTORE_TOKENS = Exercise(
    topic="dependency",
    solution=restore_tokens,
    cases=_restore_cases,
    hints=(
        "Undo one stage at a time, and the last one first: its parents are the tokens you have.",
        "Before a stage there were len(kept) + len(pruned) tokens. Which of their rows do you "
        "know, and what is parents @ x?",
        "before = x.new_empty(…); before[kept] = x; before[pruned] = parents @ x; then x = before, "
        "for the stages in reversed order.",
    ),
    mistakes=(
        (
            "Take all parents by their shares, not only the one with the largest.",
            _restore_with(lambda parents, x: x[parents.argmax(dim=-1)]),
        ),
        (
            "A pruned token is not zero: its parents got its message, and stand in for it.",
            _restore_with(lambda parents, x: 0 * (parents @ x)),
        ),
        (
            "Kept tokens and restored ones have to go back to their places, not one after the "
            "other.",
            _in_a_row,
        ),
    ),
)


def buggy_reversed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    head_probs: torch.Tensor,
    messages: torch.Tensor,
) -> torch.Tensor:
    """Reversed attention. One line of the given code is wrong: mend it.

    q, k, v: (B, heads, N, d). head_probs: (B, heads, N). messages: (B, N), above 0.
    Returns (B, heads, N, d): what each token receives, of the children's P M v.
    """
    sent = head_probs * messages[:, None]
    scores = q @ k.mT / q.shape[-1] ** 0.5
    weights = scores.softmax(dim=-1) * sent[..., None]
    return weights.mT @ v


def _bug_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)

    def case(about: str, B: int, heads: int, N: int, d: int) -> Case:
        q, k, v = torch.randn(3, B, heads, N, d, generator=generator)
        head_probs = torch.randn(B, heads, N, generator=generator).softmax(1)
        return Case(about, (q, k, v, head_probs, torch.rand(B, N, generator=generator) + 0.01))

    return [
        case("one head, two tokens of width two", 1, 1, 2, 2),
        case("a batch, three heads", 2, 3, 5, 4),
    ]


def _buggy_with(function):
    """A mistake in how scores and what is sent become weights."""

    def reversed_attention(q, k, v, head_probs, messages):
        scores = q @ k.mT / q.shape[-1] ** 0.5
        return function(scores, head_probs * messages[:, None]) @ v

    return reversed_attention


BUGGY_REVERSED = Exercise(
    topic="dependency",
    solution=buggy_reversed,
    cases=_bug_cases,
    hints=(
        "Set one token's message to a hundredth. What should change in the output, and what does?",
        "log(w) is added to every score of a child's row. What does a softmax do with a number "
        "that is the same in the whole row?",
        "What a child sends scales its row after the softmax.",
    ),
    mistakes=(
        (
            "You added it along the other axis: that is what the parents send, and they are not "
            "asked.",
            _buggy_with(lambda scores, sent: (scores + sent.log()[..., None, :]).softmax(-1).mT),
        ),
        (
            "Now the softmax runs over the children, so each parent gets a mean, and the parent "
            "chooses. The child must.",
            _buggy_with(lambda scores, sent: (scores + sent.log()[..., None]).softmax(-2).mT),
        ),
        (
            "You scaled the columns: what child i sends is a factor of row i.",
            _buggy_with(lambda scores, sent: (scores.softmax(-1) * sent[..., None, :]).mT),
        ),
        (
            "The transpose was right: parent j collects column j.",
            _buggy_with(lambda scores, sent: scores.softmax(-1) * sent[..., None]),
        ),
    ),
    bug=(
        "scores.softmax(dim=-1) * sent[..., None]",
        "(scores + sent.log()[..., None]).softmax(dim=-1)",
    ),
)

EXERCISES = (SOFT_MASK, DEPTHS, GRADIENTS, RESTORE_TOKENS, BUGGY_REVERSED)
