"""The exercises of chapter 10: solutions, cases, hints, and the mistakes learners make."""

import torch

from attnlab.lab.exercises.framework import Case, Exercise
from attnlab.superpixel import fold9, gather9, mask_absent, turn_around, valid9


def neighbor_counts(rows: int, columns: int) -> torch.Tensor:
    """How many superpixels a pixel can choose from, for each cell of a grid.

    A pixel may belong to the superpixel of its own cell and to those of the cells that touch it, by
    a side or by a corner, as far as there are any.
    Returns (rows, columns), int64.
    """
    y, x = torch.arange(rows)[:, None], torch.arange(columns)
    tall = 1 + (y > 0).long() + (y < rows - 1).long()
    wide = 1 + (x > 0).long() + (x < columns - 1).long()
    return tall * wide


def _count_cases(seed: int) -> list[Case]:
    rows, columns = torch.randint(4, 9, (2,), generator=_generator(seed)).tolist()
    return [
        Case("three rows, four columns", (3, 4)),
        Case("a single row", (1, 3)),
        Case("a single cell", (1, 1)),
        Case("a larger grid", (rows, columns + 10 * seed)),
    ]


NEIGHBOR_COUNTS = Exercise(
    topic="spformer",
    solution=neighbor_counts,
    cases=_count_cases,
    hints=(
        "Draw 3 × 4 cells. From how many cells does a corner hear, an edge, the middle?",
        "It is a product: rows within reach times columns within reach. Either is 1, 2 or 3.",
        "With y = torch.arange(rows)[:, None], rows within reach are 1 + (y > 0) + (y < rows − 1).",
    ),
    mistakes=(
        (
            "That is every cell with nine. At the border some of them do not exist: they get no "
            "weight at all, which is not the same as a key of zeros.",
            lambda rows, columns: torch.full((rows, columns), 9),
        ),
        (
            "You left the pixel's own cell out: it is the first candidate.",
            lambda rows, columns: neighbor_counts(rows, columns) - 1,
        ),
        (
            "You counted the four sides only. Cells that touch by a corner belong to it as well.",
            lambda rows, columns: _reach(rows)[:, None] + _reach(columns) - 1,
        ),
        (
            "You have rows and columns the other way round.",
            lambda rows, columns: neighbor_counts(columns, rows),
        ),
    ),
)


def _reach(length: int) -> torch.Tensor:
    place = torch.arange(length)
    return 1 + (place > 0).long() + (place < length - 1).long()


def p2s_update(logits: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """What superpixels receive from pixels: softmax over each one's window, times the values.

    logits: (Sh, Sw, n, 9), for each of the n pixels of each cell, one number about each superpixel
    around it; −∞ where there is none. values: (Sh, Sw, n, d), of the pixels.
    A superpixel's weights are over all pixels that have it among their nine, and sum to 1.
    `turn_around` and `fold9` of attnlab.superpixel are there to be used; pixels need no copy.
    Returns (Sh, Sw, d).
    """
    windows = turn_around(logits, -torch.inf)  # a row of cells now belongs to a superpixel
    weights = windows.flatten(-2).softmax(-1).view_as(windows)
    return fold9(turn_around(weights).mT @ values)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _update_cases(seed: int) -> list[Case]:
    generator = _generator(seed)

    def case(about: str, *shape: int, dim: int = 3, scale: float = 1.0) -> Case:
        logits = mask_absent(scale * torch.randn(*shape, 9, generator=generator))
        return Case(about, (logits, torch.randn(*shape, dim, generator=generator)))

    steps = case("the logits of two superpixels are 200 apart", 1, 2, 4)
    steps.args[0].add_(torch.tensor([0.0, 0, 0, 0, 0, 200, 0, 0, 0]))
    steps.args[0][0, 1, :, 4] += 200
    return [
        case("two rows of three cells of four pixels", 2, 3, 4),
        case("a single cell: an ordinary softmax over its pixels", 1, 1, 9, dim=2),
        case("a larger grid, one pixel a cell", 4, 5, 1),
        steps,
    ]


def _no_window(logits, values):
    return fold9(logits.softmax(-1).mT @ values)


def _weighted_means(logits, values):
    weights = logits.softmax(-1)
    return _no_window(logits, values) / fold9(weights.sum(-2)[..., None])


def _one_maximum(logits, values):
    terms = (logits - logits.max()).exp()
    return fold9(terms.mT @ values) / fold9(terms.sum(-2)[..., None])


def _not_turned_back(logits, values):
    windows = turn_around(logits, -torch.inf)
    return fold9(windows.flatten(-2).softmax(-1).view_as(windows).mT @ values)


def _by_cell(logits, values):
    """Softmax over the pixels of one cell, for each slot."""
    return fold9(logits.softmax(-2).nan_to_num(0.0).mT @ values)


P2S_UPDATE = Exercise(
    topic="spformer",
    solution=p2s_update,
    cases=_update_cases,
    hints=(
        "Whose weights sum to 1? A superpixel's, over the pixels of its 3×3 cells.",
        "turn_around(logits, −∞) sorts the logits by superpixel: its last two axes are the window.",
        "Softmax over windows.flatten(-2); back into shape; turn_around again, so that the weights "
        "lie at the pixels; then weights.mT @ values is (Sh, Sw, 9, d), and fold9 adds it up.",
    ),
    mistakes=(
        (
            "Your softmax is over a pixel's nine superpixels: that is the association, for the "
            "other direction. Here a superpixel chooses among pixels.",
            _no_window,
        ),
        (
            "These are means weighted by the pixels' softmax, SSN's update. Here the softmax "
            "itself runs over the pixels of a window.",
            _weighted_means,
        ),
        (
            "One maximum for all superpixels is not enough: where a window's logits lie far below "
            "it, all of its exponentials are 0, and 0 / 0 is NaN.",
            _one_maximum,
        ),
        (
            "The weights are right but sorted by superpixel, while the values are sorted by cell. "
            "Turn them back before you multiply.",
            _not_turned_back,
        ),
        (
            "You normalise within one cell. A window has up to nine cells; they share one sum.",
            _by_cell,
        ),
    ),
)


def kmeans_logits(pixels: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    """Logits with which attention takes one step of k-means, each pixel to its nearest of nine.

    pixels: (Sh, Sw, n, d), the n pixels of each cell. centers: (Sh, Sw, d), one a cell.
    Returns (Sh, Sw, n, 9): 0 for the nearest center (Euclidean) among those of the pixel's own cell
    and the cells around it, and −∞ for the others and where there is none. A softmax over a
    center's pixels then gives equal weight to all that belong to it, so that P2S is their mean.
    """
    near = gather9(centers)  # (Sh, Sw, 9, d)
    distance = (pixels[..., None, :] - near[..., None, :, :]).square().sum(-1)
    absent = ~valid9(*centers.shape[:2])[:, :, None]
    nearest = distance.masked_fill(absent, torch.inf).argmin(-1, keepdim=True)
    return torch.full_like(distance, -torch.inf).scatter(-1, nearest, 0.0)


def _kmeans_cases(seed: int) -> list[Case]:
    generator = _generator(seed)
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    far = random(2, 3, 4, 2) + 20
    return [
        Case("two rows of three cells", (random(2, 3, 4, 2), random(2, 3, 2))),
        Case("pixels near zero, centers far from it", (random(2, 2, 5, 3), random(2, 2, 3) + 20)),
        Case("centers of different lengths", (far, far.mean(2) * (1 + random(2, 3, 1).abs()))),
    ]


def _chosen(scores: torch.Tensor) -> torch.Tensor:
    best = scores.argmax(-1, keepdim=True)
    return torch.full_like(scores, -torch.inf).scatter(-1, best, 0.0)


def _distances(pixels, centers):
    return (pixels[..., None, :] - gather9(centers)[..., None, :, :]).square().sum(-1)


KMEANS_LOGITS = Exercise(
    topic="spformer",
    solution=kmeans_logits,
    cases=_kmeans_cases,
    hints=(
        "gather9(centers) is (Sh, Sw, 9, d): the nine candidates of every pixel in a cell.",
        "A candidate that does not exist is all zeros in gather9. valid9 says which ones exist.",
        "Squared distances (Sh, Sw, n, 9), absent ones ∞, argmin; then scatter 0 into a tensor of "
        "−∞: torch.full_like(distance, −torch.inf).scatter(−1, nearest, 0.0).",
    ),
    mistakes=(
        (
            "The largest dot product is not the nearest center: the center's length counts too. "
            "That is exactly where the likeness of attention and k-means ends.",
            lambda pixels, centers: _chosen(mask_absent(pixels @ gather9(centers).mT)),
        ),
        (
            "A candidate beyond the border is a center of zeros in gather9, and it may be near.",
            lambda pixels, centers: _chosen(-_distances(pixels, centers)),
        ),
        (
            "You chose the farthest center.",
            lambda pixels, centers: _chosen(mask_absent(_distances(pixels, centers))),
        ),
        (
            "1 and 0 are weights. As logits they give e¹ and e⁰: a softmax makes these no 1 and 0. "
            "Take their logarithm.",
            lambda pixels, centers: kmeans_logits(pixels, centers).exp(),
        ),
    ),
)


def buggy_labels(best: torch.Tensor) -> torch.Tensor:
    """From each pixel's best slot to the number of a superpixel. One line is wrong: mend it.

    best: (Sh, Sw, n), int64, for the n pixels of each cell: slot 3 (dy + 1) + dx + 1 is the
    superpixel of the cell dy rows below and dx columns to the right.
    Returns (Sh, Sw, n), int64: the number of that superpixel, counted row by row from 0.
    """
    rows, columns = best.shape[:2]
    y = torch.arange(rows)[:, None, None] + best // 3 - 1
    x = torch.arange(columns)[:, None] + best % 3 - 1
    return y * columns + x


def _label_cases(seed: int) -> list[Case]:
    def case(about: str, rows: int, columns: int, n: int = 4) -> Case:
        random = torch.rand(rows, columns, n, 9, generator=_generator(seed))
        return Case(about, (mask_absent(random).argmax(-1),))

    return [
        case("a square grid, 3 × 3 cells", 3, 3),
        case("two rows of five cells", 2, 5),
        case("five rows of two cells", 5, 2),
        Case("every pixel stays at home", (torch.full((3, 4, 1), 4),)),
    ]


BUGGY_LABELS = Exercise(
    topic="spformer",
    solution=buggy_labels,
    cases=_label_cases,
    hints=(
        "Which of the cases fails first, and what is special about its grid?",
        "Row by row: one row further down is how many superpixels later?",
        "A row has as many superpixels as there are columns.",
    ),
    mistakes=(
        (
            "This numbers the superpixels column by column.",
            lambda best: _labels(best, lambda y, x, rows, columns: x * rows + y),
        ),
        (
            "Slots run row by row as well: dy is best // 3 − 1, and dx is best % 3 − 1.",
            lambda best: buggy_labels(best % 3 * 3 + best // 3),
        ),
        (
            "Slot 4 is the pixel's own cell, at the offset (0, 0): subtract 1 from both.",
            lambda best: buggy_labels(best) + best.shape[1] + 1,
        ),
    ),
    bug=("y * columns + x", "y * rows + x"),
)


def _labels(best, number):
    rows, columns = best.shape[:2]
    y = torch.arange(rows)[:, None, None] + best // 3 - 1
    x = torch.arange(columns)[:, None] + best % 3 - 1
    return number(y, x, rows, columns)


EXERCISES = (NEIGHBOR_COUNTS, P2S_UPDATE, KMEANS_LOGITS, BUGGY_LABELS)
