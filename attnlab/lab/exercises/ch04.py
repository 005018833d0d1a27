"""The exercises of chapter 04: solutions, cases, hints, and the mistakes learners make."""

import torch
from torch.nn import functional as F

from attnlab.lab.exercises.framework import Case, Exercise


def channel_gate(
    x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor
) -> torch.Tensor:
    """CBAM's factor for every channel: σ(MLP(mean of x over places) + MLP(maximum over places)).

    x: (B, C, H, W). MLP: z → W2 relu(W1 z + b1) + b2, the same for both, with
    w1 (hidden, C), b1 (hidden,), w2 (C, hidden), b2 (C,).
    Returns (B, C), between 0 and 1.
    """
    logits = 0
    for z in (x.mean(dim=(2, 3)), x.amax(dim=(2, 3))):
        logits = logits + F.linear(F.relu(F.linear(z, w1, b1)), w2, b2)
    return torch.sigmoid(logits)


def _mlp(z, w1, b1, w2, b2):
    return F.linear(F.relu(F.linear(z, w1, b1)), w2, b2)


def _pooled(x):
    return x.mean(dim=(2, 3)), x.amax(dim=(2, 3))


def _channel_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)

    def case(about: str, batch: int, channels: int, hidden: int, *size: int) -> Case:
        shapes = (
            (batch, channels, *size),
            (hidden, channels),
            (hidden,),
            (channels, hidden),
            (channels,),
        )
        return Case(about, tuple(torch.randn(shape, generator=generator) for shape in shapes))

    return [
        case("one image, three channels, 2×2 places", 1, 3, 4, 2, 2),
        case("a batch, and a map that is not square", 2, 8, 4, 5, 3),
        case("one place: the mean is the maximum", 2, 4, 6, 1, 1),
        case("one hidden unit", 3, 4, 1, 4, 4),
    ]


CHANNEL_GATE = Exercise(
    topic="cbam",
    solution=channel_gate,
    cases=_channel_cases,
    hints=(
        "Pool x in two ways to two vectors of C numbers. What is done to each before they meet?",
        "The MLP runs on each pooled vector; its two answers are added; one sigmoid comes last.",
        "x.mean(dim=(2, 3)) and x.amax(dim=(2, 3)) are (B, C); F.linear(z, w1, b1) is W1 z + b1.",
    ),
    mistakes=(
        (
            "You add the two pooled vectors before the MLP. It is not linear: run it on each, and "
            "add what comes out.",
            lambda x, *w: torch.sigmoid(_mlp(sum(_pooled(x)), *w)),
        ),
        (
            "You average the two pooled vectors and run the MLP once. It is not linear: run it on "
            "each, and add what comes out.",
            lambda x, *w: torch.sigmoid(_mlp(sum(_pooled(x)) / 2, *w)),
        ),
        (
            "You add two sigmoids, and the sum can pass 1. Add first, one sigmoid after that.",
            lambda x, *w: sum(torch.sigmoid(_mlp(z, *w)) for z in _pooled(x)),
        ),
        (
            "That is squeeze-and-excitation: the mean alone. The maximum belongs to it as well.",
            lambda x, *w: torch.sigmoid(_mlp(_pooled(x)[0], *w)),
        ),
        (
            "The sigmoid is missing: a factor lies between 0 and 1.",
            lambda x, *w: sum(_mlp(z, *w) for z in _pooled(x)),
        ),
        (
            "The ReLU between the two linear maps is missing.",
            lambda x, w1, b1, w2, b2: torch.sigmoid(
                sum(F.linear(F.linear(z, w1, b1), w2, b2) for z in _pooled(x))
            ),
        ),
        (
            "You return the scaled map. The gate alone is asked for, (B, C).",
            lambda x, *w: x * channel_gate(x, *w)[:, :, None, None],
        ),
    ),
)


def spatial_gate(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """CBAM's factor for every place, by the paper's equation: σ(conv([mean; max over channels])).

    x: (B, C, H, W). weight: (1, 2, k, k), k odd; its first input is the mean over the channels,
    its second the maximum. Zeros are padded so that the size stays.
    Returns (B, 1, H, W), between 0 and 1.
    """
    pooled = torch.stack([x.mean(dim=1), x.amax(dim=1)], dim=1)
    return torch.sigmoid(F.conv2d(pooled, weight, padding=weight.shape[-1] // 2))


def _spatial_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)

    def case(about: str, kernel: int, *shape: int) -> Case:
        x = torch.randn(shape, generator=generator)
        return Case(about, (x, torch.randn(1, 2, kernel, kernel, generator=generator) / kernel))

    return [
        case("two channels, 2×2 places, a 1×1 kernel", 1, 1, 2, 2, 2),
        case("a 3×3 kernel on 4×6 places", 3, 2, 3, 4, 6),
        case("a 7×7 kernel on a map smaller than it", 7, 2, 8, 5, 5),
        case("a single channel: the mean is the maximum", 3, 1, 1, 4, 4),
    ]


def _spatial(pooled: list[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(F.conv2d(torch.stack(pooled, 1), weight, padding=weight.shape[-1] // 2))


SPATIAL_GATE = Exercise(
    topic="cbam",
    solution=spatial_gate,
    cases=_spatial_cases,
    hints=(
        "Every place has C numbers. Which two numbers of them does the convolution read?",
        "Two maps, (B, H, W) each: mean and maximum over dim=1. Stack them as two channels.",
        "F.conv2d(stacked, weight, padding=k // 2) keeps the size; then the sigmoid.",
    ),
    mistakes=(
        (
            "Your two maps are the other way round: the mean is the first input. (The official "
            "code has the maximum first; exercise 4 is about that.)",
            lambda x, weight: _spatial([x.amax(1), x.mean(1)], weight),
        ),
        (
            "That is the sum over the channels, and the mean is asked for: not what grows with C.",
            lambda x, weight: _spatial([x.sum(1), x.amax(1)], weight),
        ),
        (
            "You pool over the places. Here every place is asked for: pool over the channels.",
            lambda x, weight: torch.sigmoid(torch.stack([x.mean((2, 3)), x.amax((2, 3))], 1)),
        ),
        (
            "The map shrinks: pad k // 2 zeros on every side.",
            lambda x, weight: torch.sigmoid(
                F.conv2d(
                    F.pad(torch.stack([x.mean(1), x.amax(1)], 1), [weight.shape[-1] // 2] * 4)[
                        ..., weight.shape[-1] // 2 :, weight.shape[-1] // 2 :
                    ],
                    weight,
                )
            ),
        ),
        (
            "The sigmoid is missing: a factor lies between 0 and 1.",
            lambda x, weight: torch.logit(spatial_gate(x, weight)),
        ),
        (
            "You return the scaled map. The gate alone is asked for, (B, 1, H, W).",
            lambda x, weight: x * spatial_gate(x, weight),
        ),
    ),
)


def extra_parameters(
    stages: list[tuple[int, int]], reduction: int = 16, kernel_size: int = 7
) -> int:
    """Number of parameters that CBAM adds to a residual network, by formula: nothing is built.

    stages: (blocks, channels) of each stage; a block's CBAM works on the block's output channels.
    The MLP has C // reduction hidden units and biases in both layers. The spatial convolution, from
    2 maps to 1, has no bias, and a BatchNorm behind it.
    """
    total = 0
    for blocks, channels in stages:
        hidden = channels // reduction
        mlp = 2 * channels * hidden + hidden + channels
        total += blocks * (mlp + 2 * kernel_size**2 + 2)
    return total


def _count_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)
    blocks, width, kernel = torch.randint(1, 9, (3,), generator=generator).tolist()
    return [
        Case("one block of 32 channels", ([(1, 32)], 16, 3)),
        Case("ResNet-50: 2,532,592", ([(3, 256), (4, 512), (6, 1024), (3, 2048)], 16, 7)),
        Case("ResNet-18", ([(2, 64), (2, 128), (2, 256), (2, 512)], 16, 7)),
        Case("another network", ([(blocks, 16 * width), (1, 100)], 8, 2 * kernel + 1)),
    ]


def _count(stages, reduction, kernel_size, mlp=None, spatial=None) -> int:
    mlp = mlp or (lambda c, h: 2 * c * h + h + c)
    spatial = spatial or (lambda k: 2 * k**2 + 2)
    return sum(n * (mlp(c, c // reduction) + spatial(kernel_size)) for n, c in stages)


EXTRA_PARAMETERS = Exercise(
    topic="cbam",
    solution=extra_parameters,
    cases=_count_cases,
    hints=(
        "Count one block: two matrices, two biases, one kernel, and a BatchNorm of one channel.",
        "The kernel has 2·k² weights, and the BatchNorm a weight and a bias that are learned.",
        "blocks × (2·C·h + h + C + 2·k² + 2), with h = C // reduction, summed over the stages.",
    ),
    mistakes=(
        (
            "The biases of the MLP are missing: hidden and C of them.",
            lambda *a: _count(*a, mlp=lambda c, h: 2 * c * h),
        ),
        (
            "The MLP is shared by the two pooled vectors: its parameters count once.",
            lambda *a: _count(*a, mlp=lambda c, h: 2 * (2 * c * h + h + c)),
        ),
        (
            "The BatchNorm behind the spatial convolution has a weight and a bias.",
            lambda *a: _count(*a, spatial=lambda k: 2 * k**2),
        ),
        (
            "The spatial convolution has no bias; the BatchNorm has two parameters.",
            lambda *a: _count(*a, spatial=lambda k: 2 * k**2 + 3),
        ),
        (
            "The spatial convolution reads two maps: 2·k² weights.",
            lambda *a: _count(*a, spatial=lambda k: k**2 + 2),
        ),
        (
            "A stage has several blocks, and each has a CBAM of its own.",
            lambda stages, *a: _count([(1, channels) for _, channels in stages], *a),
        ),
    ),
)


def port_official(
    mlp_1: torch.Tensor,
    conv: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From the official CBAM's weights to a gate without BatchNorm that computes the same in eval.

    mlp_1: (hidden, C), a linear layer; here it becomes a 1×1 convolution.
    conv: (1, 2, k, k), whose first input is the MAXIMUM over the channels, its second the mean.
    gamma, beta, mean, var: (1,) each, the BatchNorm behind it: y → gamma (y − mean) / √(var + eps)
    + beta.
    Returns the 1×1 convolution's weight (hidden, C, 1, 1); the weight (1, 2, k, k), mean first, and
    the bias (1,) of one convolution that does what the two layers did.
    """
    factor = gamma / torch.sqrt(var + eps)
    return mlp_1[:, :, None, None], conv.flip(1) * factor, beta - mean * factor


def _port_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)

    def case(about: str, hidden: int, channels: int, kernel: int, eps: float) -> Case:
        draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
        conv = draw(1, 2, kernel, kernel)
        return Case(about, (draw(hidden, channels), conv, draw(1) + 2, draw(1), draw(1),
                            draw(1).exp(), eps))  # fmt: skip

    return [
        case("two hidden units, a 1×1 kernel", 2, 4, 1, 1e-5),
        case("a 3×3 kernel and a large eps", 2, 3, 3, 0.5),
        case("C = 32, a 7×7 kernel", 2, 32, 7, 1e-5),
    ]


def _port_with(function):
    """A mistake that differs in how convolution and BatchNorm are put together."""

    def port(mlp_1, conv, gamma, beta, mean, var, eps):
        return mlp_1[:, :, None, None], *function(conv, gamma, beta, mean, var, eps)

    return port


PORT_OFFICIAL = Exercise(
    topic="cbam",
    solution=port_official,
    cases=_port_cases,
    hints=(
        "Three things: a shape with two more axes; another order of two inputs; two linear maps "
        "in a row, which are one.",
        "gamma (conv(x) − mean) / s + beta is a convolution with kernel conv · gamma / s. What is "
        "left over is the bias.",
        "factor = gamma / √(var + eps); weight = conv.flip(1) · factor; bias = beta − mean · "
        "factor; mlp_1[:, :, None, None].",
    ),
    mistakes=(
        (
            "Your kernel still reads the maximum first: turn its two inputs round, dim 1.",
            lambda mlp_1, conv, *bn: (
                (ported := port_official(mlp_1, conv, *bn))[0], ported[1].flip(1), ported[2],
            ),
        ),
        (
            "You turned the kernel round in space as well. Only its two inputs change places.",
            lambda mlp_1, conv, *bn: (
                (ported := port_official(mlp_1, conv, *bn))[0], ported[1].flip(2, 3), ported[2],
            ),
        ),
        (
            "var is a variance: the BatchNorm divides by √(var + eps).",
            _port_with(
                lambda conv, gamma, beta, mean, var, eps: (
                    conv.flip(1) * gamma / (var + eps), beta - mean * gamma / (var + eps),
                )
            ),
        ),
        (
            "The eps is missing, or outside the root: √(var + eps).",
            _port_with(
                lambda conv, gamma, beta, mean, var, eps: (
                    conv.flip(1) * gamma / var.sqrt(), beta - mean * gamma / var.sqrt(),
                )
            ),
        ),
        (
            "The bias is not beta alone: the running mean, scaled, is subtracted from it.",
            lambda mlp_1, conv, gamma, beta, *rest: (
                *port_official(mlp_1, conv, gamma, beta, *rest)[:2], beta,
            ),
        ),
        (
            "The running mean is scaled too: mean · gamma / √(var + eps).",
            lambda mlp_1, conv, gamma, beta, mean, *rest: (
                *port_official(mlp_1, conv, gamma, beta, mean, *rest)[:2], beta - mean,
            ),
        ),
        (
            "A 1×1 convolution's weight has four axes: (hidden, C, 1, 1).",
            lambda mlp_1, *rest: (mlp_1, *port_official(mlp_1, *rest)[1:]),
        ),
    ),
)  # fmt: skip


def buggy_cbam(
    x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """CBAM without biases and BatchNorm. One line of the given code is wrong: mend it.

    x: (B, C, H, W). w1: (hidden, C), w2: (C, hidden). weight: (1, 2, k, k), mean first.
    Returns (B, C, H, W): the channel gate scales x, and the spatial gate scales what comes out.
    """
    pooled = torch.stack([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))])
    logits = (torch.relu(pooled @ w1.T) @ w2.T).sum(dim=0)
    scaled = x * torch.sigmoid(logits)[:, :, None, None]
    maps = torch.stack([scaled.mean(dim=1), scaled.amax(dim=1)], dim=1)
    gate = torch.conv2d(maps, weight, padding=weight.shape[-1] // 2).sigmoid()
    return scaled * gate


def _bug_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)

    def case(about: str, hidden: int, kernel: int, *shape: int) -> Case:
        x = torch.randn(shape, generator=generator)
        w1 = torch.randn(hidden, shape[1], generator=generator)
        w2 = torch.randn(shape[1], hidden, generator=generator)
        return Case(about, (x, w1, w2, torch.randn(1, 2, kernel, kernel, generator=generator)))

    return [
        case("three channels, 2×2 places, a 3×3 kernel", 4, 3, 1, 3, 2, 2),
        case("a batch, a 7×7 kernel", 4, 7, 2, 8, 6, 5),
    ]


def _scaled(x, w1, w2):
    pooled = torch.stack([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))])
    return x * torch.sigmoid((F.relu(pooled @ w1.T) @ w2.T).sum(dim=0))[:, :, None, None]


BUGGY_CBAM = Exercise(
    topic="cbam",
    solution=buggy_cbam,
    cases=_bug_cases,
    hints=(
        "Channels first, places second: what does the second gate look at?",
        "Write down which tensor each line reads, beside F, F1 and F2 of the equations.",
        "Ms is a function of F1, the map that the channel gate has already scaled.",
    ),
    mistakes=(
        (
            "The result has to be the scaled map times the gate of places; yours lost the gate of "
            "channels on the way.",
            lambda x, w1, w2, weight: x * spatial_gate(_scaled(x, w1, w2), weight),
        ),
        (
            "Now places come first and channels second. The order is channels, then places.",
            lambda x, w1, w2, weight: _scaled(x * spatial_gate(x, weight), w1, w2),
        ),
        (
            "The order of mean and maximum was right: the mean comes first.",
            lambda x, w1, w2, weight: (
                _scaled(x, w1, w2) * spatial_gate(_scaled(x, w1, w2), weight.flip(1))
            ),
        ),
    ),
    bug=(
        "[scaled.mean(dim=1), scaled.amax(dim=1)]",
        "[x.mean(dim=1), x.amax(dim=1)]",
    ),
)

EXERCISES = (CHANNEL_GATE, SPATIAL_GATE, EXTRA_PARAMETERS, PORT_OFFICIAL, BUGGY_CBAM)
