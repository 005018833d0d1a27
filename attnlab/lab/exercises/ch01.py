"""The first exercises of chapter 01: solutions, cases, hints, and the mistakes learners make."""

import torch

from attnlab.lab.exercises.framework import Case, Exercise


def entropy(weights: torch.Tensor) -> torch.Tensor:
    """Entropy of each query's attention in nats: −Σ p log p over the keys, with 0 · log 0 = 0.

    weights: (..., queries, keys); a row sums to 1, or is all zero where every key is masked.
    Returns (..., queries): 0 when one key has all the weight, log(keys) when all have the same.
    """
    return torch.special.entr(weights).sum(dim=-1)


def _entropy_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)
    small = torch.randn(2, 3, generator=generator).softmax(dim=-1)
    large = torch.randn(2, 3, 4, 7, generator=generator).softmax(dim=-1)
    causal = large[..., :4].tril()
    return [
        Case("two queries, three keys", (small,)),
        Case("one row is uniform over four keys", (torch.full((1, 4), 0.25),)),
        Case("a batch of two images with three heads", (large,)),
        Case("masked keys have weight 0", (causal / causal.sum(dim=-1, keepdim=True),)),
        Case("every key is masked, the row is all zero", (torch.zeros(2, 3),)),
        Case("double precision", (large.double(),)),
    ]


ENTROPY = Exercise(
    topic="attention",
    solution=entropy,
    cases=_entropy_cases,
    hints=(
        "Each query has its own distribution over the keys. Which axis do you sum away?",
        "A masked key has weight 0, and 0 · log 0 is NaN for a computer. What should it count as?",
        "torch.special.xlogy(p, p) is p log p with 0 · log 0 = 0. Sum it over dim=-1 with a minus",
    ),
    mistakes=(
        (
            "You sum over the queries. A query's distribution runs over its keys: the last axis.",
            lambda weights: torch.special.entr(weights).sum(dim=-2),
        ),
        (
            "These are bits, by the logarithm to base 2. Nats come from the natural logarithm.",
            lambda weights: torch.special.entr(weights).sum(dim=-1) / torch.tensor(2.0).log(),
        ),
        (
            "log(0) is −∞, and 0 · (−∞) is NaN. A weight of 0 has to add 0 to the sum.",
            lambda weights: -(weights * weights.log()).sum(dim=-1),
        ),
        (
            "The sign: log p is negative, and an entropy never is.",
            lambda weights: -torch.special.entr(weights).sum(dim=-1),
        ),
        (
            "You average over the keys. An entropy is the sum of −p log p.",
            lambda weights: torch.special.entr(weights).mean(dim=-1),
        ),
        (
            "That is one number for all queries. Every query has an entropy of its own.",
            lambda weights: torch.special.entr(weights).sum(),
        ),
    ),
)


def merge_blocks(
    m1: torch.Tensor,
    l1: torch.Tensor,
    o1: torch.Tensor,
    m2: torch.Tensor,
    l2: torch.Tensor,
    o2: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merge what two blocks of keys say to the same queries, as if they had been one block.

    Of its own keys only, each block hands over, for every query,
        m (..., queries)       the largest score s
        l (..., queries)       Σ exp(s − m)
        o (..., queries, dim)  Σ exp(s − m) · value, not divided by l
    A block whose keys are all masked has m = −∞, l = 0, o = 0; so have two of them merged.

    Returns m, l, o of all keys, in the same form: the attention's output is o / l.
    """
    m = torch.maximum(m1, m2)
    shift = m.masked_fill(m == -torch.inf, 0)  # −∞ − (−∞) would be NaN
    scale1, scale2 = torch.exp(m1 - shift), torch.exp(m2 - shift)
    l = scale1 * l1 + scale2 * l2
    o = scale1[..., None] * o1 + scale2[..., None] * o2
    return m, l, o


def _block(
    scores: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(m, l, o) of one block: scores (..., queries, keys), values (..., keys, dim)."""
    m = scores.amax(dim=-1)
    p = torch.exp(scores - m.masked_fill(m == -torch.inf, 0)[..., None])
    return m, p.sum(dim=-1), p @ values


def _merge_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    none = torch.full((2, 3), -torch.inf)

    small = (*_block(random(1, 2), random(2, 2)), *_block(random(1, 3) + 1, random(3, 2)))
    keys, values = random(2, 3, 4, 7), random(2, 3, 7, 5)
    batch = [
        *_block(keys[..., :3], values[..., :3, :]),
        *_block(keys[..., 3:], values[..., 3:, :]),
    ]
    high = (*_block(random(2, 3) + 200, random(3, 4)), *_block(random(2, 5) + 199, random(5, 4)))
    low = (*_block(random(2, 3) - 200, random(3, 4)), *_block(random(2, 5) - 201, random(5, 4)))
    masked = (*_block(random(2, 4), random(4, 4)), *_block(none, random(3, 4)))
    empty = (*_block(none, random(3, 4)), *_block(none, random(3, 4)))
    return [
        Case("one query; two keys, then three", small),
        Case("a batch of two images with three heads", tuple(batch)),
        Case("scores near 200", high),
        Case("scores near −200", low),
        Case("every key of the second block is masked", masked),
        Case("every key of both blocks is masked", empty),
    ]


def _merge_average(m1, l1, o1, m2, l2, o2):
    m, l, _ = merge_blocks(m1, l1, o1, m2, l2, o2)
    return m, l, (o1 / l1[..., None] + o2 / l2[..., None]) / 2


def _merge_divided(m1, l1, o1, m2, l2, o2):
    m, l, o = merge_blocks(m1, l1, o1, m2, l2, o2)
    return m, l, o / l[..., None]


def _merge_upside_down(m1, l1, o1, m2, l2, o2):
    m = torch.maximum(m1, m2)
    scale1, scale2 = torch.exp(m - m1), torch.exp(m - m2)
    return m, scale1 * l1 + scale2 * l2, scale1[..., None] * o1 + scale2[..., None] * o2


def _merge_unshifted(m1, l1, o1, m2, l2, o2):
    m = torch.maximum(m1, m2)
    scale1, scale2 = m1.exp() / m.exp(), m2.exp() / m.exp()
    return m, scale1 * l1 + scale2 * l2, scale1[..., None] * o1 + scale2[..., None] * o2


def _merge_unguarded(m1, l1, o1, m2, l2, o2):
    m = torch.maximum(m1, m2)
    scale1, scale2 = torch.exp(m1 - m), torch.exp(m2 - m)
    return m, scale1 * l1 + scale2 * l2, scale1[..., None] * o1 + scale2[..., None] * o2


MERGE_BLOCKS = Exercise(
    topic="attention",
    solution=merge_blocks,
    cases=_merge_cases,
    hints=(
        "l1 and l2 were summed against different maxima: bring both to the new one before adding. "
        "And o has one axis more than m and l.",
        "exp(s − m) = exp(s − m1) · exp(m1 − m): one factor per query turns l1 and o1 into sums "
        "against the new maximum m.",
        "m = maximum(m1, m2); scale1 = exp(m1 − m); l = scale1·l1 + scale2·l2; o likewise, with "
        "scale1[..., None]. Where m is −∞, subtract 0 instead of m.",
    ),
    mistakes=(
        (
            "You average the two outputs. A block whose keys have little weight must count for "
            "little: keep the sums, and scale each by exp(its own maximum − the new one).",
            _merge_average,
        ),
        (
            "You add the sums as they came. Block 1 was summed against m1 and block 2 against m2: "
            "rescale both to the new maximum first.",
            lambda m1, l1, o1, m2, l2, o2: (torch.maximum(m1, m2), l1 + l2, o1 + o2),
        ),
        (
            "The factor is upside down: it turns exp(s − m1) into exp(s − m), so it is "
            "exp(m1 − m), never above 1.",
            _merge_upside_down,
        ),
        (
            "exp(m) alone overflows above 88 and vanishes below −103 in float32. Subtract first, "
            "then take one exponential: exp(m1 − m).",
            _merge_unshifted,
        ),
        (
            "−∞ − (−∞) is NaN: where both blocks are empty, subtract 0 instead of m.",
            _merge_unguarded,
        ),
        (
            "You already divided by l. The merged block has the same form as its parts, so that "
            "it can be merged again: o is the plain sum.",
            _merge_divided,
        ),
        (
            "m is the largest score of all keys: the maximum of m1 and m2, not their sum.",
            lambda m1, l1, o1, m2, l2, o2: (m1 + m2, l1, o1),
        ),
    ),
)


def causal_mask(num_queries: int, num_keys: int) -> torch.Tensor:
    """Which keys each query may attend to, when the queries are the last tokens of a sequence.

    The sequence has num_keys tokens, and query i is its token num_keys − num_queries + i: it may
    attend to itself and to all before it. A query that lies before the first key attends to none.
    Returns (num_queries, num_keys), bool, True = may attend.
    """
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool)
    return mask.tril(diagonal=num_keys - num_queries)


def _mask_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)
    few, more = torch.randint(3, 9, (2,), generator=generator).tolist()
    return [
        Case("as many queries as keys", (3, 3)),
        Case("the last two tokens of a sequence of five", (2, 5)),
        Case("one new token, as in generation", (1, 4)),
        Case("more queries than keys", (4, 2)),
        Case("a longer sequence", (few, few + more)),
    ]


def _full(num_queries: int, num_keys: int) -> torch.Tensor:
    return torch.ones(num_queries, num_keys, dtype=torch.bool)


CAUSAL_MASK = Exercise(
    topic="attention",
    solution=causal_mask,
    cases=_mask_cases,
    hints=(
        "Draw 2 queries and 5 keys. The last query is the last token: how many keys does it see?",
        "The positions are aligned at the end: the bottom right corner is always True.",
        "A full mask of True, and .tril(diagonal=…): diagonal 0 would align the top left corner.",
    ),
    mistakes=(
        (
            "It is inverted. Here True means may attend, as in F.scaled_dot_product_attention; "
            "nn.MultiheadAttention has it the other way round.",
            lambda n, m: ~causal_mask(n, m),
        ),
        (
            "You aligned the first query with the first key. The queries are the last tokens: "
            "align the bottom right corner.",
            lambda n, m: _full(n, m).tril(),
        ),
        (
            "A token may attend to itself: the diagonal belongs to the mask.",
            lambda n, m: _full(n, m).tril(diagonal=m - n - 1),
        ),
        (
            "Every query sees one key too many: the token after it.",
            lambda n, m: _full(n, m).tril(diagonal=m - n + 1),
        ),
        (
            "The upper triangle is the future. A causal query looks at the past: the lower one.",
            lambda n, m: _full(n, m).triu(diagonal=m - n),
        ),
        (
            "A boolean mask is asked for, not one that is added to the scores: dtype=torch.bool.",
            lambda n, m: causal_mask(n, m).float(),
        ),
        (
            "A boolean mask is asked for. This one, with −∞, is what would be added to the scores.",
            lambda n, m: torch.zeros(n, m).masked_fill(~causal_mask(n, m), -torch.inf),
        ),
    ),
)

EXERCISES = (ENTROPY, MERGE_BLOCKS, CAUSAL_MASK)
