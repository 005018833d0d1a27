"""The exercises of chapter 11: solutions, cases, hints, and the mistakes learners make."""

import torch

from attnlab.lab.exercises.framework import Case, Exercise


def weights_of(mechanism: str, scores: torch.Tensor, width: int) -> torch.Tensor:
    """The weights that a mechanism makes of a table of scores: normalization, axis and mask.

    mechanism: "dense", what each place takes is shared out among all places; "reversed", what each
    place gives is; "criss-cross", as dense, from the own row and column only; "neighborhood", as
    dense, from places at most one row and one column away; "gate", a factor for each place,
    from its score with itself.
    scores: (N, N); who asks (and takes) is a row, who answers (and gives) a column. The N places
    are an image, row by row, `width` to a row.
    Returns (N, N): exact zeros where two may not meet, a sigmoid for the gate, else a softmax.
    """
    place = torch.arange(len(scores))
    down = (place // width - place[:, None] // width).abs()
    across = (place % width - place[:, None] % width).abs()
    if mechanism == "gate":
        return scores.sigmoid() * torch.eye(len(scores))
    if mechanism == "reversed":
        return scores.softmax(dim=0)
    if mechanism == "criss-cross":
        scores = scores.masked_fill((down > 0) & (across > 0), -torch.inf)
    if mechanism == "neighborhood":
        scores = scores.masked_fill((down > 1) | (across > 1), -torch.inf)
    return scores.softmax(dim=1)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _weight_cases(seed: int) -> list[Case]:
    generator = _generator(seed)

    def case(mechanism: str, height: int, width: int) -> Case:
        scores = torch.randn(height * width, height * width, generator=generator)
        return Case(f'"{mechanism}" on {height}×{width} places', (mechanism, scores, width))

    return [
        case("dense", 1, 3),
        case("reversed", 1, 3),
        case("gate", 1, 3),
        case("criss-cross", 3, 4),
        case("neighborhood", 4, 3),
        case("neighborhood", 5, 5),
    ]


def _instead(mechanism: str, wrong):
    """The solution with another answer, `wrong(scores, width)`, to one mechanism."""
    return lambda name, scores, width: (
        wrong(scores, width) if name == mechanism else weights_of(name, scores, width)
    )


def _window(scores: torch.Tensor, width: int) -> torch.Tensor:
    """Who is at most `width` + 1 places away in the list of places."""
    place = torch.arange(len(scores))
    return (place - place[:, None]).abs() <= width + 1


WEIGHTS = Exercise(
    topic="capstone",
    solution=weights_of,
    cases=_weight_cases,
    hints=(
        "Ask of each mechanism which sums are 1: of a row (what one takes), of a column (what one "
        "gives), or none.",
        "Place n lies in row n // width and column n % width. A mask is a comparison of those of "
        "all askers, [:, None], with those of all who answer.",
        "Masked scores become -inf before the softmax, dim=1 but for the reversed, where it is "
        "dim=0. The gate is sigmoid(scores) on the diagonal.",
    ),
    mistakes=(
        (
            "Two mechanisms have their axes exchanged: of the dense one the rows sum to 1.",
            _instead("dense", lambda scores, width: scores.softmax(0)),
        ),
        (
            "The softmax still runs over those who answer. In reversed attention each place shares "
            "out what it gives: the columns sum to 1.",
            _instead("reversed", lambda scores, width: scores.softmax(1)),
        ),
        (
            "The table was turned over. The axis of the softmax changes; who asks stays a row.",
            _instead("reversed", lambda scores, width: scores.softmax(0).T),
        ),
        (
            "A gate does not compete: each factor is a sigmoid of its own score.",
            _instead(
                "gate",
                lambda scores, width: scores.masked_fill(
                    ~torch.eye(len(scores)).bool(), -torch.inf
                ).softmax(1),
            ),
        ),
        (
            "A gate multiplies a place by its own factor: nothing comes from other places.",
            _instead("gate", lambda scores, width: scores.sigmoid()),
        ),
        (
            "A score of 0 is not a mask: exp(0) = 1 gets its share. Fill with -inf.",
            _instead("criss-cross", lambda scores, width: _crossed(scores, width, 0.0)),
        ),
        (
            "You masked after the softmax: the rows do not sum to 1 any more.",
            _instead(
                "criss-cross",
                lambda scores, width: scores.softmax(1) * _on_cross(len(scores), width),
            ),
        ),
        (
            "Places that follow each other in the list need not be neighbors: a row ends. Compare "
            "rows and columns each for themselves.",
            _instead(
                "neighborhood",
                lambda scores, width: scores.masked_fill(
                    ~_window(scores, width), -torch.inf
                ).softmax(1),
            ),
        ),
    ),
)


def _on_cross(count: int, width: int) -> torch.Tensor:
    place = torch.arange(count)
    return (place // width == place[:, None] // width) | (place % width == place[:, None] % width)


def _crossed(scores: torch.Tensor, width: int, fill: float) -> torch.Tensor:
    return scores.masked_fill(~_on_cross(len(scores), width), fill).softmax(1)


def compared(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """How much better is the first of two mechanisms, and would another seed say so?

    first, second: (seeds, images), 1.0 where the network trained with this seed is right about
    this image, else 0.0. Both have the same seeds and images: a row with a row is a pair.
    Returns (mean, spread, wins): the mean over the seeds of the difference in accuracy, its sample
    standard deviation over the seeds (n − 1), and the number of seeds in which the first is better.
    """
    gain = first.mean(dim=1) - second.mean(dim=1)  # (seeds,)
    return gain.mean(), gain.std(), int((gain > 0).sum())


def _compared_cases(seed: int) -> list[Case]:
    generator = _generator(seed)

    def case(about: str, seeds: int, images: int) -> Case:
        # Seeds differ a lot, and both mechanisms with them: only pairs show the small gain.
        rate = 0.3 + 0.4 * torch.rand(seeds, 1, generator=generator)
        first, second = (
            (torch.rand(seeds, images, generator=generator) < rate + gain).float()
            for gain in (0.1, 0.0)
        )
        first[0], second[0] = 0.0, 0.0  # a seed in which both are never right: no difference
        first[0, 0], second[0, 0] = 1.0, 1.0
        return Case(about, (first, second))

    return [
        case("three seeds, eight images", 3, 8),
        case("five seeds, fifty images", 5, 50),
        case("two seeds, seven images", 2, 7),
    ]


def _compared(gain: torch.Tensor, spread: torch.Tensor | None = None, wins=None):
    return (
        gain.mean(),
        gain.std() if spread is None else spread,
        int((gain > 0).sum() if wins is None else wins),
    )


def _gain(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return first.mean(1) - second.mean(1)


COMPARED = Exercise(
    topic="capstone",
    solution=compared,
    cases=_compared_cases,
    hints=(
        "First one number for each seed: the accuracy of the first minus that of the second.",
        "Everything is computed from these `seeds` numbers, and the images are gone by then.",
        "gain = first.mean(1) - second.mean(1); then its mean, its std, and how many are above 0.",
    ),
    mistakes=(
        (
            "The second minus the first: the sign is turned.",
            lambda first, second: _compared(_gain(second, first)),
        ),
        (
            "This is the spread over images. It says how hard the images are, and shrinks when "
            "there are more of them; no second seed is needed for it, which should worry you.",
            lambda first, second: _compared(_gain(first, second), (first - second).mean(0).std()),
        ),
        (
            "This is the spread over all pairs of seed and image at once. One number a seed first.",
            lambda first, second: _compared(_gain(first, second), (first - second).std()),
        ),
        (
            "You combined the spreads of the two. That forgets that they are pairs: a good seed is "
            "good for both, and this goes away in the difference.",
            lambda first, second: _compared(
                _gain(first, second), (first.mean(1).var() + second.mean(1).var()).sqrt()
            ),
        ),
        (
            "This divides by n: with three seeds it is too small by a fifth. Sample standard "
            "deviation, n − 1.",
            lambda first, second: _compared(
                _gain(first, second), _gain(first, second).std(correction=0)
            ),
        ),
        (
            "This is the standard error of the mean. The spread is not divided by √n.",
            lambda first, second: _compared(
                _gain(first, second), _gain(first, second).std() / len(first) ** 0.5
            ),
        ),
        (
            "A tie is no win: count the seeds in which the difference is above 0.",
            lambda first, second: _compared(
                _gain(first, second), wins=(_gain(first, second) >= 0).sum()
            ),
        ),
    ),
)


def exponent(sizes: torch.Tensor, costs: torch.Tensor) -> torch.Tensor:
    """The growth exponent p in costs ∝ sizesᵖ, which a few bad measurements do not move.

    Theil and Sen: between any two measurements of different size there is one slope, in
    logarithms; p is the median of all slopes, the mean of the middle two when they are even in
    number. sizes, costs: (n,) each, above 0, in any order; a size may be there more than once.
    Returns p, a tensor without axes.
    """
    one, other = torch.combinations(torch.arange(len(sizes))).T  # all pairs
    run = (sizes[other] / sizes[one]).log()
    rise = (costs[other] / costs[one]).log()
    slopes = rise[run != 0] / run[run != 0]
    return slopes.quantile(0.5)


def _exponent_cases(seed: int) -> list[Case]:
    generator = _generator(seed)

    def case(about: str, sizes: list[int], power: float, slow: int | None = None) -> Case:
        sizes = torch.tensor(sizes, dtype=torch.float32)
        noise = 1 + torch.rand(len(sizes), generator=generator)
        costs = 1e-6 * sizes**power * noise
        if slow is not None:
            costs[slow] *= 30
        return Case(about, (sizes, costs))

    return [
        case("two sizes", [64, 256], 1.0),
        case("four sizes, about quadratic", [64, 256, 512, 4096], 2.0),
        case("about linear; another program ran during the last", [64, 128, 256, 512, 1024], 1, 4),
        case("a size measured twice, and not in order", [512, 64, 128, 512, 256], 1.5),
    ]


def _slopes(sizes: torch.Tensor, costs: torch.Tensor, all_pairs: bool = False) -> torch.Tensor:
    one, other = torch.combinations(torch.arange(len(sizes))).T
    run = (sizes[other] / sizes[one]).log()
    return ((costs[other] / costs[one]).log() / run)[all_pairs | (run != 0)]


def _least_squares(sizes: torch.Tensor, costs: torch.Tensor) -> torch.Tensor:
    x, y = sizes.log(), costs.log()
    x = x - x.mean()
    return (x * (y - y.mean())).sum() / (x**2).sum()


EXPONENT = Exercise(
    topic="capstone",
    solution=exponent,
    cases=_exponent_cases,
    hints=(
        "If cost = c · sizeᵖ, what is log(cost₂ / cost₁) divided by log(size₂ / size₁)?",
        "torch.combinations(torch.arange(n)) lists all pairs. Pairs of one size have no slope: "
        "leave them out.",
        "rise / run of all pairs with run ≠ 0, and of these .quantile(0.5): Tensor.median() "
        "returns the lower one of two in the middle.",
    ),
    mistakes=(
        (
            "These are slopes of the numbers themselves. An exponent is a slope of logarithms.",
            lambda sizes, costs: ((costs[1:] - costs[:-1]) / (sizes[1:] - sizes[:-1])).quantile(
                0.5
            ),
        ),
        (
            "Size against cost: the slope is turned upside down.",
            lambda sizes, costs: (1 / _slopes(sizes, costs)).quantile(0.5),
        ),
        (
            "This is least squares. Look at what one slow measurement does to it.",
            _least_squares,
        ),
        (
            "The mean of the slopes follows every bad measurement. Take the median.",
            lambda sizes, costs: _slopes(sizes, costs).mean(),
        ),
        (
            "Tensor.median() returns the lower of the two in the middle; their mean is asked for.",
            lambda sizes, costs: _slopes(sizes, costs).median(),
        ),
        (
            "These are the slopes between one measurement and the next. Take all pairs.",
            lambda sizes, costs: (
                (costs[1:] / costs[:-1]).log() / (sizes[1:] / sizes[:-1]).log()
            ).quantile(0.5),
        ),
        (
            "Two measurements of one size have no slope: rise / 0 is ±∞, and moves the median.",
            lambda sizes, costs: _slopes(sizes, costs, all_pairs=True).quantile(0.5),
        ),
    ),
)


def buggy_report(val: torch.Tensor, test: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a mechanism reaches after its learning rate was chosen. One line cheats: mend it.

    val, test: (rates, seeds), the accuracy on the validation set and on the test set of a network
    trained at each of these learning rates with each of these seeds.
    Returns (mean, spread) over the seeds of the test accuracy at the one rate that was chosen.
    """
    chosen = val.mean(dim=1).argmax()
    scores = test[chosen]
    return scores.mean(), scores.std()


def _report_cases(seed: int) -> list[Case]:
    generator = _generator(seed)

    def case(about: str, rates: int, seeds: int) -> Case:
        val, test = 0.4 + 0.1 * torch.rand(2, rates, seeds, generator=generator)
        val[0] += 0.3  # what the validation set finds best,
        test[-1] += 0.1  # and what the test set does
        val[1, 0] = 0.9  # one lucky seed at another rate
        return Case(about, (val, test))

    return [
        case("three rates, three seeds", 3, 3),
        case("five rates, four seeds", 5, 4),
    ]


BUGGY_REPORT = Exercise(
    topic="capstone",
    solution=buggy_report,
    cases=_report_cases,
    hints=(
        "Which numbers may a choice look at, if the report is to say how the network does on "
        "images that nobody looked at before?",
        "With 5 rates and pure luck, the best of 5 test scores is above their mean: the more you "
        "try, the better the report.",
        "The rate is chosen by the validation set; the test set is read once, afterwards.",
    ),
    mistakes=(
        (
            "The choice is honest now, and the report is not: it gives the validation accuracy.",
            lambda val, test: (lambda s: (s.mean(), s.std()))(val[val.mean(1).argmax()]),
        ),
        (
            "Each seed has a rate of its own now. The recipe is chosen once, over all seeds.",
            lambda val, test: (lambda s: (s.mean(), s.std()))(
                test.gather(0, val.argmax(0, keepdim=True))[0]
            ),
        ),
        (
            "You chose by the single luckiest run. Average over the seeds first.",
            lambda val, test: (lambda s: (s.mean(), s.std()))(test[val.amax(1).argmax()]),
        ),
        (
            "You average over all rates: that is honest, but no rate was chosen.",
            lambda val, test: (test.mean(), test.mean(0).std()),
        ),
    ),
    bug=("chosen = val.mean(dim=1)", "chosen = test.mean(dim=1)"),
)

EXERCISES = (WEIGHTS, COMPARED, EXPONENT, BUGGY_REPORT)
