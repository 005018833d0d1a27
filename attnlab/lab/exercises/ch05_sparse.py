"""More exercises of chapter 05: what interlaced attention costs, and a bug in a neighbourhood."""

import torch

from attnlab.lab.exercises.framework import Case, Exercise


def cheapest_cell(height: int, width: int) -> tuple[int, int]:
    """The cell of interlaced attention on a height × width map that costs least.

    With cells of P×P, a position first sees those at its place in every cell, then its own cell.
    A map that is no multiple of P is filled up to one: a part of a cell counts as a cell.
    Returns (keys, P): the fewest keys that a position sees in both steps together, and the P, from
    1 to the shorter side, for which it does; the smallest such P.
    """

    def keys(side: int) -> int:
        cells = -(-height // side) * -(-width // side)
        return cells + side**2

    best = min(range(1, min(height, width) + 1), key=keys)
    return keys(best), best


def _cell_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)
    height, width = (int(side) for side in torch.randint(40, 150, (2,), generator=generator))
    return [
        Case("a map of 16×16: one cell for every place in a cell", (16, 16)),
        Case("OCNet's crop: 97×97 positions, a prime number", (97, 97)),
        Case("a whole Cityscapes image at output stride 8", (128, 256)),
        Case("another map, not square", (height, width + 150)),
    ]


def _least(keys):
    """The mistake of minimising, or of reporting, another number of keys."""

    def solve(height, width):
        best = min(range(1, min(height, width) + 1), key=lambda side: keys(height, width, side))
        return keys(height, width, best), best

    return solve


def _only_divisors(height, width):
    sides = range(1, min(height, width) + 1)
    fitting = [p for p in sides if height % p == 0 and width % p == 0]
    keys = {p: (height // p) * (width // p) + p**2 for p in fitting}
    best = min(keys, key=keys.get)
    return keys[best], best


def _root_of_tokens(height, width):
    best = min(round((height * width) ** 0.5), height, width)
    return -(-height // best) * -(-width // best) + best**2, best


CHEAPEST_CELL = Exercise(
    topic="sparse",
    solution=cheapest_cell,
    cases=_cell_cases,
    hints=(
        "Count the keys of one position: how many cells are there, and how many positions has one?",
        "For P×P cells on N positions it is about N / P² + P²: one falls with P, the other rises, "
        "and they meet where P² is √N.",
        "keys(P) = ceil(H / P) · ceil(W / P) + P²; min(range(1, …), key=keys) tries all of them.",
    ),
    mistakes=(
        (
            "√N is what the *area* P² of a cell should be near, not its side.",
            _root_of_tokens,
        ),
        (
            "The two steps come one after the other: their keys add up. Their product is always "
            "about N, whatever the cell.",
            _least(lambda h, w, p: -(-h // p) * -(-w // p) * p**2),
        ),
        (
            "You count the long-range step alone. The larger the cell, the more its own positions "
            "cost.",
            _least(lambda h, w, p: -(-h // p) * -(-w // p)),
        ),
        (
            "You count the cells of one row or column. The map has rows of cells times columns.",
            _least(lambda h, w, p: -(-h // p) + -(-w // p) + p**2),
        ),
        (
            "A part of a cell at the border counts as a cell: round up, not down.",
            _least(lambda h, w, p: (h // p) * (w // p) + p**2),
        ),
        (
            "The cell need not divide the map: what is missing is filled up. Try every side.",
            _only_divisors,
        ),
        (
            "That is for all positions together. The keys of one position are asked for.",
            lambda h, w: (h * w * cheapest_cell(h, w)[0], cheapest_cell(h, w)[1]),
        ),
    ),
)


def neighborhood_mask(height: int, width: int, size: int) -> torch.Tensor:
    """Which keys a position sees in neighbourhood attention. One line is wrong: mend it.

    The size × size window around each position of a height × width map, size being odd; near the
    border its center is moved inside, so that every position sees exactly size² keys. Positions are
    counted row after row: position i lies in row i // width.
    Returns (height · width, height · width), bool, True = may attend, a row for each query.
    """
    position = torch.arange(height * width)
    row, column = position // width, position % width
    half = size // 2
    center_row = row.clamp(half, height - 1 - half)
    center_column = column.clamp(half, width - 1 - half)
    near_row = (row[None] - center_row[:, None]).abs() <= half
    near_column = (column[None] - center_column[:, None]).abs() <= half
    return near_row & near_column


def _mask_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)
    small, large = torch.randint(4, 8, (2,), generator=generator).tolist()
    return [
        Case("a square map", (5, 5, 3)),
        Case("a map of 6 rows and 4 columns", (6, 4, 3)),
        Case("more columns than rows", (small, small + large, 3)),
        Case("a larger window on a tall map", (large + 6, large + 1, 5)),
    ]


def _neighbors(clamp=True, both=torch.logical_and, reach=lambda size: size // 2):
    """The mask with one thing done another way."""

    def solve(height, width, size):
        position = torch.arange(height * width)
        row, column = position // width, position % width
        half = size // 2
        center_row = row.clamp(half, height - 1 - half) if clamp else row
        center_column = column.clamp(half, width - 1 - half) if clamp else column
        near_row = (row[None] - center_row[:, None]).abs() <= reach(size)
        near_column = (column[None] - center_column[:, None]).abs() <= reach(size)
        return both(near_row, near_column)

    return solve


NEIGHBORHOOD_MASK = Exercise(
    topic="sparse",
    solution=neighborhood_mask,
    cases=_mask_cases,
    hints=(
        "Sum the rows of the mask on a 5×5 and on a 6×4 map. Which positions do not have size² "
        "keys, and which do not see themselves?",
        "On a square map the given function is right. What is it that a square map cannot tell "
        "apart?",
        "Take position 4 of a 6×4 map: row 1, column 0. What do the first two lines make of it?",
    ),
    mistakes=(
        (
            "At the border there are too few keys: the center has to be clamped, so that the whole "
            "window lies inside the map.",
            _neighbors(clamp=False),
        ),
        (
            "That is the cross of a band of rows and a band of columns. Near in both is asked for.",
            _neighbors(both=torch.logical_or),
        ),
        (
            "The window reaches size // 2 to each side, both ends included.",
            _neighbors(reach=lambda size: size // 2 - 1),
        ),
        (
            "The window is too large: it reaches size // 2 to each side, not size.",
            _neighbors(reach=lambda size: size),
        ),
        (
            "A row of the mask belongs to a query, and so does the clamped center; you have them "
            "the other way round.",
            lambda h, w, s: neighborhood_mask(h, w, s).T.contiguous(),
        ),
        (
            "It is inverted. True means may attend.",
            lambda h, w, s: ~neighborhood_mask(h, w, s),
        ),
    ),
    bug=(
        "row, column = position // width, position % width",
        "column, row = position // width, position % width",
    ),
)

EXERCISES = (CHEAPEST_CELL, NEIGHBORHOOD_MASK)
