"""The exercises of chapter 07: solutions, cases, hints, and the mistakes learners make."""

import torch
from torch.nn import functional as F

from attnlab.lab.exercises.framework import Case, Exercise


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def speed_up(interval: int, ratio: float) -> float:
    """How many times faster a video becomes with one key frame in `interval` frames.

    A key frame costs 1, and so does every frame of a video without this trick. Each of the other
    interval − 1 frames costs `ratio`: flow, warp and head, as a share of a key frame.
    Returns a float, the ratio of the two costs.
    """
    return interval / (1 + (interval - 1) * ratio)


def _speed_cases(seed: int) -> list[Case]:
    ratio = (0.05 + 0.4 * torch.rand((), generator=_generator(seed))).item()
    return [
        Case("ten frames, flow costs an eighth of the backbone", (10, 0.125)),
        Case("every frame is a key frame", (1, 0.3)),
        Case("what is not a key frame costs nothing", (5, 0.0)),
        Case("another ratio", (4 + seed, ratio)),
    ]


SPEED_UP = Exercise(
    topic="video",
    solution=speed_up,
    cases=_speed_cases,
    hints=(
        "Write down what `interval` frames cost with one key frame among them, and what they cost "
        "without.",
        "With: 1 + (interval − 1) · ratio. Without: interval.",
    ),
    mistakes=(
        (
            "That forgets that the frames between cost something: s = interval needs ratio = 0.",
            lambda interval, ratio: float(interval),
        ),
        (
            "1 / ratio is where the curve ends, with an infinite interval.",
            lambda interval, ratio: 1 / max(ratio, 1e-9),
        ),
        (
            "The key frame is one of the `interval` frames: interval − 1 are left for the flow.",
            lambda interval, ratio: interval / (1 + interval * ratio),
        ),
        (
            "This is the share of the cost that is left. The speed-up is its inverse.",
            lambda interval, ratio: (1 + (interval - 1) * ratio) / interval,
        ),
    ),
)


def hat_weights(flow: torch.Tensor, radius: int) -> torch.Tensor:
    """The attention weights with which a window does what bilinear sampling does.

    flow: (2,), the displacement (dx, dy) in cells, dx to the right, dy down, each within ±radius.
    The neighbor at the offset (x, y) gets max(0, 1 − |x − dx|) · max(0, 1 − |y − dy|).
    Returns (2 radius + 1, 2 radius + 1); entry [y + radius, x + radius] belongs to (x, y).
    """
    steps = torch.arange(-radius, radius + 1)
    across = (1 - (steps - flow[0]).abs()).clamp(min=0)
    down = (1 - (steps - flow[1]).abs()).clamp(min=0)
    return torch.outer(down, across)


def _hat_cases(seed: int) -> list[Case]:
    radius = 2 + seed
    flow = radius * (2 * torch.rand(2, generator=_generator(seed)) - 1)
    return [
        Case("a whole number of cells: one weight is 1", (torch.tensor([1.0, 0.0]), 1)),
        Case("a quarter to the right, one and a half up", (torch.tensor([0.25, -1.5]), 2)),
        Case("anywhere in a larger window", (flow, radius)),
    ]


def _nearest(flow: torch.Tensor, radius: int) -> torch.Tensor:
    x, y = (flow.round() + radius).long()
    weights = torch.zeros(2 * radius + 1, 2 * radius + 1)
    weights[y, x] = 1
    return weights


def _unclamped(flow: torch.Tensor, radius: int) -> torch.Tensor:
    steps = torch.arange(-radius, radius + 1)
    return torch.outer(1 - (steps - flow[1]).abs(), 1 - (steps - flow[0]).abs())


HAT_WEIGHTS = Exercise(
    topic="video",
    solution=hat_weights,
    cases=_hat_cases,
    hints=(
        "The weight is a product: one factor for the columns, one for the rows. torch.outer.",
        "With steps = torch.arange(−radius, radius + 1), the columns' factor is "
        "(1 − (steps − dx).abs()).clamp(min=0). Rows come first in the result.",
    ),
    mistakes=(
        (
            "Rows and columns are the other way round: the first index of the result is y (down), "
            "but the first number of the flow is dx (right).",
            lambda flow, radius: hat_weights(flow, radius).T,
        ),
        (
            "That fetches from the nearest cell alone. Between cells, up to four of them share.",
            _nearest,
        ),
        (
            "The sign is wrong: the flow says where to fetch, so the weight is high at +flow.",
            lambda flow, radius: hat_weights(-flow, radius),
        ),
        (
            "Neighbors farther than one cell from the target must get 0, not a negative weight.",
            _unclamped,
        ),
    ),
)


def frame_weights(
    embeddings: torch.Tensor, current: torch.Tensor, temperature: float
) -> torch.Tensor:
    """How much each of N frames counts at each position of the current one.

    embeddings: (N, D, H, W), one map a frame, already warped onto the current frame.
    current: (D, H, W), the current frame's own.
    The score of frame j at a position is the cosine of its embedding there with the current one's,
    divided by `temperature`; the weights of the N frames at a position are a softmax of it. An
    embedding of zeros has the cosine 0 with everything.
    Returns (N, H, W).
    """
    cosine = (F.normalize(embeddings, dim=1) * F.normalize(current, dim=0)).sum(1)
    return (cosine / temperature).softmax(0)


def _frame_cases(seed: int) -> list[Case]:
    generator = _generator(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    dark = random(3, 4, 2, 3)
    dark[1] = 0
    return [
        Case("two frames, one position", (random(2, 3, 1, 1), random(3, 1, 1), 1.0)),
        Case("three frames of 2 × 3 cells", (random(3, 4, 2, 3), random(4, 2, 3), 1.0)),
        Case("a low temperature", (random(4, 5, 3, 2), random(5, 3, 2), 0.1)),
        Case("a frame whose embedding is zero", (dark, random(4, 2, 3), 0.5)),
    ]


def _cosines(embeddings: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
    return F.cosine_similarity(embeddings, current[None], dim=1)


FRAME_WEIGHTS = Exercise(
    topic="video",
    solution=frame_weights,
    cases=_frame_cases,
    hints=(
        "F.normalize makes vectors of length 1, and leaves a vector of zeros alone. Along which "
        "axis is the channel in `embeddings`, and in `current`?",
        "Cosines are (N, H, W). At each position they compete: which axis is the softmax over?",
        "(F.normalize(embeddings, dim=1) * F.normalize(current, dim=0)).sum(1), divided by the "
        "temperature, softmax(0).",
    ),
    mistakes=(
        (
            "Your softmax runs over the positions of a frame. Here frames compete at a position.",
            lambda e, c, t: (_cosines(e, c) / t).flatten(1).softmax(1).view_as(e[:, 0]),
        ),
        (
            "You multiplied by the temperature. Divide: a low temperature makes sharp weights.",
            lambda e, c, t: (_cosines(e, c) * t).softmax(0),
        ),
        (
            "That is a dot product: it grows with the embeddings' lengths. Normalise both.",
            lambda e, c, t: ((e * c).sum(1) / t).softmax(0),
        ),
        (
            "Dividing by the length of a vector of zeros gives NaN: F.normalize does not.",
            lambda e, c, t: (
                (e / e.norm(dim=1, keepdim=True) * (c / c.norm(dim=0))).sum(1) / t
            ).softmax(0),
        ),
    ),
)


def buggy_warp(features: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """Fetch every cell from where the flow points. One line is wrong: mend it.

    features: (C, H, W), H and W at least 2. flow: (2, H, W), dx and dy in cells: the result at
    (y, x) is `features` at (y + dy, x + dx), bilinear between cells, the border repeated outside.
    `grid_sample` with align_corners=True wants −1 for the first cell's center and 1 for the last's.
    Returns (C, H, W).
    """
    height, width = features.shape[1:]
    x = torch.arange(width) + flow[0]
    y = torch.arange(height)[:, None] + flow[1]
    sides = torch.tensor([width, height])
    grid = 2 * torch.stack([x, y], dim=-1) / (sides - 1) - 1
    options = {"mode": "bilinear", "padding_mode": "border", "align_corners": True}
    return torch.nn.functional.grid_sample(features[None], grid[None], **options)[0]


def _warp_cases(seed: int) -> list[Case]:
    generator = _generator(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    flat = random(1, 1, 1).expand(1, 3, 4).contiguous()
    return [
        Case("a map of one color, any flow", (flat, random(2, 3, 4))),
        Case("zero flow: the map itself", (random(2, 3, 4), torch.zeros(2, 3, 4))),
        Case("two to the right, one up", (random(1, 4, 6), _constant(2.0, -1.0, 4, 6))),
        Case("a flow that varies", (random(3, 5, 4), 2 * random(2, 5, 4))),
    ]


def _constant(dx: float, dy: float, height: int, width: int) -> torch.Tensor:
    return torch.tensor([dx, dy])[:, None, None].expand(2, height, width).contiguous()


def _sampled(features, x, y, align_corners=True):
    options = {"mode": "bilinear", "padding_mode": "border", "align_corners": align_corners}
    return F.grid_sample(features[None], torch.stack([x, y], -1)[None], **options)[0]


def _places(features, flow):
    height, width = features.shape[1:]
    return torch.arange(width) + flow[0], torch.arange(height)[:, None] + flow[1], width, height


def _half_pixel(features, flow):
    x, y, width, height = _places(features, flow)
    return _sampled(features, 2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1, False)


def _no_shift(features, flow):
    x, y, width, height = _places(features, flow)
    return _sampled(features, 2 * x / (width - 1), 2 * y / (height - 1))


def _swapped(features, flow):
    x, y, width, height = _places(features, flow)
    return _sampled(features, 2 * y / (height - 1) - 1, 2 * x / (width - 1) - 1)


BUGGY_WARP = Exercise(
    topic="video",
    solution=buggy_warp,
    cases=_warp_cases,
    hints=(
        "Which case fails first, and what should come out of it without any calculation?",
        "Take W = 4 and zero flow. Cells are at x = 0, 1, 2, 3: which grid coordinate does the "
        "last one get, and which should it get?",
        "With align_corners=True, x = 0 is −1 and x = W − 1 is 1.",
    ),
    mistakes=(
        (
            "With align_corners=False, −1 and 1 are the outer *edges* of the map, half a cell "
            "beyond the centers. Then the formula is (2x + 1) / W − 1.",
            _half_pixel,
        ),
        (
            "−1 is missing: the grid runs from −1 to 1, not from 0 to 2.",
            _no_shift,
        ),
        (
            "grid_sample wants (x, y): the column first, although a tensor's row comes first.",
            _swapped,
        ),
        (
            "The sign of the flow is wrong: it says where to fetch, not where things go.",
            lambda features, flow: buggy_warp(features, -flow),
        ),
    ),
    bug=("(sides - 1)", "sides"),
)

EXERCISES = (SPEED_UP, HAT_WEIGHTS, FRAME_WEIGHTS, BUGGY_WARP)
