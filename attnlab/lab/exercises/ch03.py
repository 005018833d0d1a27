"""The exercises of chapter 03: solutions, cases, hints, and the mistakes learners make."""

import torch
from einops import einsum, rearrange, reduce

from attnlab.lab.exercises.framework import Case, Exercise


def se_parameters(stages: list[tuple[int, int]], reduction: int, bias: bool) -> int:
    """Number of parameters that squeeze-and-excitation adds to a residual network, by formula.

    stages: (number of blocks, channels that leave each of them) of every stage; ResNet-50 has
    [(3, 256), (4, 512), (6, 1024), (3, 2048)]. Each block gets one SE, at the end of its branch,
    whose hidden layer has channels // reduction units, at least one.
    bias: whether the two linear maps have biases.
    Returns the number.
    """
    total = 0
    for blocks, channels in stages:
        hidden = max(1, channels // reduction)
        total += blocks * (2 * channels * hidden + bias * (channels + hidden))
    return total


def _parameter_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(1, 9, (3,), generator=generator).tolist()
    resnet50 = [(3, 256), (4, 512), (6, 1024), (3, 2048)]
    return [
        Case("ResNet-50, r = 16, no biases", (resnet50, 16, False)),
        Case("ResNet-50, r = 16, with biases", (resnet50, 16, True)),
        Case("channels that r does not divide", ([(blocks[0], 100), (2, 24)], 16, False)),
        Case("fewer channels than r", ([(blocks[1], 8)], 16, True)),
        Case("another network", ([(blocks[2], 64), (4, 128)], 4, True)),
    ]


def _se_count(stages, reduction, bias, width=1.0, maps=2, minimum=1, rounding=1):
    total = 0
    for blocks, channels in stages:
        channels = int(channels * width)
        hidden = max(minimum, channels // reduction // rounding * rounding)
        total += blocks * (maps * channels * hidden + bias * (channels + hidden))
    return total


SE_PARAMETERS = Exercise(
    topic="channel",
    solution=se_parameters,
    cases=_parameter_cases,
    hints=(
        "One SE has two matrices. Which shapes do they have, for C channels and h hidden units?",
        "C·h and h·C weights; h and C biases if there are any; one SE in every block.",
        "Sum over the stages: blocks · (2·C·h + bias · (C + h)), with h = max(1, C // reduction).",
    ),
    mistakes=(
        (
            "SE scales what leaves the branch, which has 256 to 2,048 channels. You took the width "
            "of the 3×3 convolutions, a quarter of it, and get a sixteenth of the weights.",
            lambda stages, r, bias: _se_count(stages, r, bias, width=0.25),
        ),
        (
            "There are two matrices, down to the hidden units and up again. You counted one.",
            lambda stages, r, bias: _se_count(stages, r, bias, maps=1),
        ),
        (
            "Without biases it is right. With them, each SE has h + C numbers more.",
            lambda stages, r, bias: _se_count(stages, r, False),
        ),
        (
            "The case asks for no biases, and you count h + C of them in each block.",
            lambda stages, r, bias: _se_count(stages, r, True),
        ),
        (
            "Every block has an SE of its own: multiply by the number of blocks.",
            lambda stages, r, bias: _se_count([(1, c) for _, c in stages], r, bias),
        ),
        (
            "With fewer channels than r nothing is left of the hidden layer: keep at least one.",
            lambda stages, r, bias: _se_count(stages, r, bias, minimum=0),
        ),
        (
            "You round the hidden layer to a multiple of 8, as timm does by default. The paper's "
            "has channels // reduction units.",
            lambda stages, r, bias: _se_count(stages, r, bias, minimum=8, rounding=8),
        ),
    ),
)


def squeeze_excite(
    u: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor
) -> torch.Tensor:
    """Squeeze-and-excitation: scale every channel by a factor computed from the whole image.

    u: (B, C, H, W). w1: (hidden, C), b1: (hidden,), w2: (C, hidden), b2: (C,).
    The factors are sigmoid(w2 · relu(w1 · z + b1) + b2), with z the mean of each channel.
    Returns (B, C, H, W).
    """
    z = reduce(u, "b c h w -> b c", "mean")
    s = torch.sigmoid(torch.relu(z @ w1.T + b1) @ w2.T + b2)
    return u * rearrange(s, "b c -> b c 1 1")


def _se_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)

    def case(about: str, *shape: int, hidden: int, scale: float = 1.0) -> Case:
        u = scale * (torch.randn(shape, generator=generator) + 0.5)
        C = shape[1]
        w1, w2 = (torch.randn(s, generator=generator) for s in ((hidden, C), (C, hidden)))
        b1, b2 = (torch.randn(n, generator=generator) for n in (hidden, C))
        return Case(about, (u, w1, b1, w2, b2))

    return [
        case("one image, two channels, one place", 1, 2, 1, 1, hidden=2),
        case("two images, four channels", 2, 4, 3, 5, hidden=2),
        case("as many channels as images and places", 3, 3, 3, 3, hidden=3),
        case("one hidden unit", 2, 6, 2, 2, hidden=1),
        case("large values", 2, 4, 4, 4, hidden=4, scale=30.0),
    ]


def _gates(u, w1, b1, w2, b2, act=torch.relu, gate=torch.sigmoid, squeeze="mean"):
    z = reduce(u, "b c h w -> b c", squeeze)
    return rearrange(gate(act(z @ w1.T + b1) @ w2.T + b2), "b c -> b c 1 1")


SQUEEZE_EXCITE = Exercise(
    topic="channel",
    solution=squeeze_excite,
    cases=_se_cases,
    hints=(
        "Squeeze, excite, scale: three lines. After the first, what shape is left?",
        "z is (B, C): the mean over the last two axes. A linear map of it is z @ w.T + b.",
        'The factors are (B, C), the maps (B, C, H, W): rearrange(s, "b c -> b c 1 1").',
    ),
    mistakes=(
        (
            "You add the factors. SE multiplies: a factor of 0 silences a channel.",
            lambda u, *weights: u + _gates(u, *weights),
        ),
        (
            "These are the factors themselves. Multiply the channels by them.",
            lambda u, *weights: _gates(u, *weights).expand_as(u).clone(),
        ),
        (
            "The squeeze takes the largest value of a channel. It should be the mean.",
            lambda u, *weights: u * _gates(u, *weights, squeeze="max"),
        ),
        (
            "The squeeze sums over the places. The mean does not grow with the image.",
            lambda u, *weights: u * _gates(u, *weights, squeeze="sum"),
        ),
        (
            "A softmax makes the channels compete. Here any number of them may stay open: sigmoid.",
            lambda u, *weights: u * _gates(u, *weights, gate=lambda x: x.softmax(-1)),
        ),
        (
            "The hidden layer has lost its ReLU: two linear maps in a row are one.",
            lambda u, *weights: u * _gates(u, *weights, act=lambda x: x),
        ),
        (
            "The sigmoid is missing: the factors are any real numbers, and flip signs.",
            lambda u, *weights: u * _gates(u, *weights, gate=lambda x: x),
        ),
    ),
)


def effective_kernel(
    first: torch.Tensor, second: torch.Tensor, share: torch.Tensor
) -> torch.Tensor:
    """The one 5×5 kernel that does what two branches and their shares do, without norm and ReLU.

    first: (C, 3, 3), the kernels of a branch of dilation 1. second: (C, 3, 3), those of a branch of
    dilation 2, whose taps lie two pixels apart. share: (C,), the first branch's; the second has
    1 − share.
    Returns (C, 5, 5), with the center of both branches in the middle.
    """
    kernel = torch.zeros(len(first), 5, 5, dtype=first.dtype)
    kernel[:, 1:4, 1:4] += share[:, None, None] * first
    kernel[:, ::2, ::2] += (1 - share)[:, None, None] * second
    return kernel


def _kernel_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)

    def case(about: str, channels: int, share: torch.Tensor) -> Case:
        first, second = torch.randn(2, channels, 3, 3, generator=generator)
        return Case(about, (first, second, share))

    return [
        case("one channel, a share of 0.25", 1, torch.tensor([0.25])),
        case("only the first branch", 2, torch.ones(2)),
        case("only the second branch", 2, torch.zeros(2)),
        case("five channels, each with its own share", 5, torch.rand(5, generator=generator)),
    ]


def _kernel(first, second, share, small=slice(1, 4), wide=slice(None, None, 2), both=True):
    """The exercise's kernel with one of its parts replaced."""
    first, second = share[:, None, None] * first, (1 - share)[:, None, None] * second
    kernel = torch.zeros(len(first), 5, 5)
    kernel[:, small, small] += first
    if both:
        kernel[:, wide, wide] += second
    else:
        kernel[:, wide, wide] = second
    return kernel


def _stretched(first, second, share):
    wide = torch.nn.functional.interpolate(second[None], size=(5, 5), mode="nearest")[0]
    return _kernel(first, 0 * second, share) + (1 - share)[:, None, None] * wide


EFFECTIVE_KERNEL = Exercise(
    topic="channel",
    solution=effective_kernel,
    cases=_kernel_cases,
    hints=(
        "Draw the 5×5 grid and mark the taps of each branch. How many are in both?",
        "The first branch lies in the middle 3×3, the second on every other row and column.",
        "kernel[:, 1:4, 1:4] += …; kernel[:, ::2, ::2] += …; share[:, None, None] fits both.",
    ),
    mistakes=(
        (
            "The shares are exchanged: share belongs to the first branch.",
            lambda first, second, share: _kernel(first, second, 1 - share),
        ),
        (
            "The first branch sits in a corner. Both are centered on the same pixel.",
            lambda first, second, share: _kernel(first, second, share, small=slice(0, 3)),
        ),
        (
            "The second branch is not spread out: with dilation 2 its taps are two pixels apart.",
            lambda first, second, share: _kernel(first, second, share, wide=slice(1, 4)),
        ),
        (
            "Dilation puts zeros between the taps; you fill the gaps. A dilated 3×3 has 9 taps, "
            "not 25.",
            _stretched,
        ),
        (
            "Both branches have a tap in the middle. Add them there; the second overwrites the "
            "first.",
            lambda first, second, share: _kernel(first, second, share, both=False),
        ),
        (
            "You add both kernels in full: each counts by its share.",
            lambda first, second, share: _kernel(
                first, second, torch.full_like(share, 0.5)
            ) * 2,
        ),
    ),
)  # fmt: skip


def buggy_selection(branches: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Select among branches, as selective kernels do. One line of the given code is wrong: mend it.

    branches: (M, B, C, H, W), the outputs of M convolutions for B images.
    logits: (B, M·C), for each image all channels of the first branch, then all of the second, …
    The shares of the M branches sum to 1 for every image and channel.
    Returns (B, C, H, W), the sum of the branches by their shares.
    """
    logits = rearrange(logits, "b (m c) -> m b c", m=len(branches))
    shares = logits.softmax(dim=0)
    return einsum(shares, branches, "m b c, m b c h w -> b c h w")


def _selection_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)

    def case(about: str, M: int, B: int, C: int) -> Case:
        branches = torch.randn(M, B, C, 2, 3, generator=generator)
        return Case(about, (branches, 2 * torch.randn(B, M * C, generator=generator)))

    return [
        case("two branches, one image, two channels", 2, 1, 2),
        case("three branches, four images, five channels", 3, 4, 5),
        case("two of each", 2, 2, 2),
        case("one branch", 1, 3, 4),
    ]


def _selection(branches, logits, layout="(m c)", shares=lambda x: x.softmax(0)):
    """The exercise's selection with one of its parts replaced."""
    logits = rearrange(logits, f"b {layout} -> m b c", m=len(branches))
    return einsum(shares(logits), branches, "m b c, m b c h w -> b c h w")


BUGGY_SELECTION = Exercise(
    topic="channel",
    solution=buggy_selection,
    cases=_selection_cases,
    hints=(
        "With one image in the batch, every share is 1. What do the shares sum to, and over what?",
        "A softmax makes one axis sum to 1. The logits are (m, b, c): which axis is the branches'?",
        "The softmax belongs on dim=0. On dim=1 the images of a batch compete with each other.",
    ),
    mistakes=(
        (
            "Now the channels compete with each other. The branches should: one softmax for every "
            "image and channel.",
            lambda branches, logits: _selection(branches, logits, shares=lambda x: x.softmax(2)),
        ),
        (
            "Divided by their sum, the logits sum to 1 but may be negative. A softmax takes their "
            "exponentials first.",
            lambda branches, logits: _selection(
                branches, logits, shares=lambda x: x / x.sum(0, keepdim=True)
            ),
        ),
        (
            "The softmax is mended, but the logits go branch after branch: (m c).",
            lambda branches, logits: _selection(branches, logits, layout="(c m)"),
        ),
        (
            "A sigmoid for each branch: the shares need not sum to 1, as they should here.",
            lambda branches, logits: _selection(branches, logits, shares=torch.sigmoid),
        ),
    ),
    bug=("logits.softmax(dim=0)", "logits.softmax(dim=1)"),
)

EXERCISES = (SE_PARAMETERS, SQUEEZE_EXCITE, EFFECTIVE_KERNEL, BUGGY_SELECTION)
