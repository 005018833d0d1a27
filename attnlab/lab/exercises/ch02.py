"""The exercises of chapter 02: zero initialisation, linear dot products, pairs, cost, a bug."""

import torch
from torch.nn import functional as F

from attnlab.lab.exercises.framework import Case, Exercise


def first_gradients(
    x: torch.Tensor, y: torch.Tensor, target: torch.Tensor, gamma: torch.Tensor, w: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of L = ½ Σ (z − target)² for a block of one channel, z = x + gamma · w · y.

    x, y, target: (positions,); y is what the non-local sum gave, w stands for W_z and gamma for the
    weight of the norm behind it, both (). No autograd: write the two formulas.
    Returns ∂L/∂gamma and ∂L/∂w, both ().
    """
    error = x + gamma * w * y - target
    return (error * w * y).sum(), (error * gamma * y).sum()


def _gradient_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)

    def case(about: str, positions: int, gamma: float | None, w: float | None) -> Case:
        x, y, target = torch.randn(3, positions, generator=generator)
        gamma, w = (
            0.5 + torch.rand((), generator=generator) if value is None else torch.tensor(value)
            for value in (gamma, w)
        )
        return Case(about, (x, y, target, gamma, w))

    return [
        case("a trained block, four positions", 4, None, None),
        case("a fresh block with a norm: gamma is 0", 5, 0.0, None),
        case("a fresh block without one: w is 0", 5, None, 0.0),
        case("the dead block: both are 0", 5, 0.0, 0.0),
    ]


FIRST_GRADIENTS = Exercise(
    topic="non_local",
    solution=first_gradients,
    cases=_gradient_cases,
    hints=(
        "The chain rule in two steps: ∂L/∂z at every position, then ∂z/∂gamma and ∂z/∂w.",
        "∂L/∂z is z − target, one number a position. gamma and w are shared by all positions: sum.",
        "∂L/∂gamma = Σ (z − target) · w · y, and ∂L/∂w is the same with gamma in place of w.",
    ),
    mistakes=(
        (
            "They are swapped: in ∂z/∂gamma = w · y it is w that is left, and gamma in the other.",
            lambda x, y, t, gamma, w: first_gradients(x, y, t, gamma, w)[::-1],
        ),
        (
            "gamma and w are shared by all positions: their gradients are sums, not means.",
            lambda x, y, t, gamma, w: tuple(
                g / len(x) for g in first_gradients(x, y, t, gamma, w)
            ),
        ),
        (
            "One number a position came out. gamma and w are shared: sum over the positions.",
            lambda x, y, t, gamma, w: (
                (x + gamma * w * y - t) * w * y, (x + gamma * w * y - t) * gamma * y
            ),
        ),
        (
            "The residual path is missing in z: the error is x + gamma · w · y − target.",
            lambda x, y, t, gamma, w: first_gradients(torch.zeros_like(x), y, t, gamma, w),
        ),
        (
            "The sign: L falls where z comes nearer to the target, ∂L/∂z = z − target.",
            lambda x, y, t, gamma, w: tuple(-g for g in first_gradients(x, y, t, gamma, w)),
        ),
        (
            "The other factor is missing: z holds gamma times w, so ∂z/∂gamma is w · y, not y.",
            lambda x, y, t, gamma, w: (((x + gamma * w * y - t) * y).sum(),) * 2,
        ),
    ),
)  # fmt: skip


def dot_product_summary(phi: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """All that the dot-product kind needs to know of its keys, whatever the query.

    phi: (B, M, d) and g: (B, M, dv). For every query θ_i, (d,), the kind returns
    y_i = 1/M Σ_j (θ_i · φ_j) g_j. Find the matrix S with y = θ @ S: it has no axis of length M.
    Returns S, (B, d, dv).
    """
    return phi.mT @ g / phi.shape[-2]


def _summary_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)

    def case(about: str, B: int, M: int, d: int, dv: int) -> Case:
        shapes = (B, M, d), (B, M, dv)
        return Case(about, tuple(torch.randn(shape, generator=generator) for shape in shapes))

    return [
        case("three keys of width two, values of width two", 1, 3, 2, 2),
        case("values wider than keys, a batch of two", 2, 5, 2, 4),
        case("a single key", 2, 1, 3, 3),
        case("4,096 keys", 1, 4096, 8, 8),
    ]


DOT_PRODUCT_SUMMARY = Exercise(
    topic="non_local",
    solution=dot_product_summary,
    cases=_summary_cases,
    hints=(
        "Write y = (θ φᵀ) g / M as matrices. Which other way is there to set the brackets?",
        "(θ φᵀ) g = θ (φᵀ g): the second factor does not depend on the query.",
        "φᵀ is phi.mT, (B, d, M). Multiply by g and do not forget the M.",
    ),
    mistakes=(
        (
            "The division by the number of keys M is missing.",
            lambda phi, g: phi.mT @ g,
        ),
        (
            "That divides by the width d. The kind divides by the number of keys M.",
            lambda phi, g: phi.mT @ g / phi.shape[-1],
        ),
        (
            "It is transposed: θ (B, N, d) stands on the left, so S has d rows and dv columns.",
            lambda phi, g: dot_product_summary(phi, g).mT,
        ),
        (
            "A softmax over the keys is no part of this kind, and could not be pulled out of "
            "the sum.",
            lambda phi, g: phi.softmax(dim=-2).mT @ g,
        ),
        (
            "1/√d belongs to scaled dot-product attention. Here the scores are divided by M.",
            lambda phi, g: phi.mT @ g / phi.shape[-1] ** 0.5,
        ),
        (
            "The mean of a product is not the product of the means: multiply φ_j with its own g_j "
            "first.",
            lambda phi, g: phi.mean(-2)[..., :, None] * g.mean(-2)[..., None, :],
        ),
    ),
)


def concatenation_weights(
    theta: torch.Tensor, phi: torch.Tensor, w_f: torch.Tensor
) -> torch.Tensor:
    """Weights of the concatenation kind, f / C = ReLU(w_f · [θ_i; φ_j]) / M, in little memory.

    theta: (B, N, d). phi: (B, M, d). w_f: (2d,); [θ_i; φ_j] is θ_i with φ_j behind it.
    No tensor larger than the result is needed: split the product into a part of i and a part of j.
    Returns (B, N, M).
    """
    a, b = theta @ w_f[: theta.shape[-1]], phi @ w_f[theta.shape[-1] :]
    return F.relu(a[:, :, None] + b[:, None, :]) / phi.shape[1]


def _concatenation_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)

    def case(about: str, B: int, N: int, M: int, d: int) -> Case:
        shapes = (B, N, d), (B, M, d), (2 * d,)
        return Case(about, tuple(torch.randn(shape, generator=generator) for shape in shapes))

    return [
        case("two queries, three keys, width two", 1, 2, 3, 2),
        case("a batch of two, as many keys as queries", 2, 4, 4, 3),
        case("width one", 1, 3, 2, 1),
        case("one key", 2, 5, 1, 4),
    ]


def _terms(theta, phi, w_f):
    d = theta.shape[-1]
    return (theta @ w_f[:d])[:, :, None], (phi @ w_f[d:])[:, None, :]


CONCATENATION_WEIGHTS = Exercise(
    topic="non_local",
    solution=concatenation_weights,
    cases=_concatenation_cases,
    hints=(
        "w_f · [θ; φ] is a sum over 2d products. Which of them know θ, and which know φ?",
        "The first d entries of w_f multiply θ_i, the last d multiply φ_j: a_i + b_j.",
        "a[:, :, None] + b[:, None, :] is (B, N, M). Then the ReLU, then the division by M.",
    ),
    mistakes=(
        (
            "The ReLU comes after the sum: ReLU(a) + ReLU(b) is another function.",
            lambda t, p, w: sum(F.relu(part) for part in _terms(t, p, w)) / p.shape[1],
        ),
        (
            "C is the number of keys M here, not the sum that a softmax divides by.",
            lambda t, p, w: sum(_terms(t, p, w)).softmax(-1),
        ),
        (
            "The division by the number of keys M is missing.",
            lambda t, p, w: F.relu(sum(_terms(t, p, w))),
        ),
        (
            "You divide by the number of queries N. It is the keys that are summed over: M.",
            lambda t, p, w: F.relu(sum(_terms(t, p, w))) / t.shape[1],
        ),
        (
            "The halves of w_f are exchanged: θ comes first in [θ; φ].",
            lambda t, p, w: concatenation_weights(t, p, w.roll(t.shape[-1])),
        ),
        (
            "The ReLU is missing: these weights have signs.",
            lambda t, p, w: sum(_terms(t, p, w)) / p.shape[1],
        ),
        (
            "The axes are exchanged: queries are rows, keys are columns.",
            lambda t, p, w: concatenation_weights(t, p, w).mT,
        ),
    ),
)


def block_macs(channels: int, positions: int, subsample: bool, pool: str) -> int:
    """Number of multiply–accumulates of one embedded-Gaussian block on one image or clip.

    The inner width is channels // 2. With subsample, every fourth position is left as a key
    (positions is a multiple of 4): pool == "before" pools x and then embeds the keys by φ and g,
    pool == "after" embeds all positions and then pools. Count the four 1×1 convolutions and the two
    products of all pairs (scores, weighted sum); pooling, softmax and norm count nothing.
    """
    inner = channels // 2
    keys = positions // 4 if subsample else positions
    embedded = keys if pool == "before" else positions
    full_size = 2 * positions * channels * inner  # θ and W_z
    return full_size + 2 * embedded * channels * inner + 2 * positions * keys * inner


def _macs_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)
    channels, positions = (int(torch.randint(5, 30, (), generator=generator)) for _ in range(2))
    return [
        Case("layer3 of a video ResNet-50: 4 frames of 14×14", (1024, 784, True, "before")),
        Case("the same, pooled after the embedding", (1024, 784, True, "after")),
        Case("the same, no pooling", (1024, 784, False, "before")),
        Case("layer2: 4 frames of 28×28", (512, 3136, True, "before")),
        Case("an odd one", (2 * channels, 4 * positions, True, "after")),
    ]


def _macs(embedded=None, pairs=2, full_size=2, inner=2, reduction=4):
    """The count with one of its parts replaced; `embedded`: "keys" or "all" positions, by φ and g.

    `pairs` and `full_size` are how many products of all pairs and of all positions are counted.
    """

    def count(channels, positions, subsample, pool):
        width = channels // inner
        keys = positions // reduction if subsample else positions
        rows = keys if (embedded or {"before": "keys"}.get(pool)) == "keys" else positions
        return (
            full_size * positions + 2 * rows
        ) * channels * width + pairs * positions * keys * width

    return count


def _macs_all_pooled(channels, positions, subsample, pool):
    """θ and W_z too at the reduced size."""
    keys = positions // 4 if subsample else positions
    return 4 * keys * channels * (channels // 2) + 2 * positions * keys * (channels // 2)


BLOCK_MACS = Exercise(
    topic="non_local",
    solution=block_macs,
    cases=_macs_cases,
    hints=(
        "Six products: θ, φ, g, scores, weighted sum, W_z. For each: how many rows, of what width "
        "to what width?",
        "Only keys shrink. Every position still asks, and every position gets an answer: θ and W_z "
        "stay at full size.",
        "θ and W_z: 2·N·C·Ci. φ and g: 2·M·C·Ci, or 2·N·C·Ci when pooled after. Pairs: 2·N·M·Ci.",
    ),
    mistakes=(
        (
            "θ and W_z work on every position: sub-sampling thins out the keys alone.",
            _macs_all_pooled,
        ),
        (
            "There are two products over all pairs: the scores, and the weighted sum of g.",
            _macs(pairs=1),
        ),
        (
            "The last convolution W_z is missing: from the inner width back to the channels.",
            _macs(full_size=1),
        ),
        (
            "The inner width is half of the channels.",
            _macs(inner=1),
        ),
        (
            "Pooling by 2 in height and in width leaves a quarter of the positions, not a half.",
            _macs(reduction=2),
        ),
        (
            'With pool="before", φ and g only see the keys that are left.',
            _macs(embedded="all"),
        ),
        (
            'With pool="after", φ and g have worked on all positions before the pooling.',
            _macs(embedded="keys"),
        ),
    ),
)


def buggy_block(
    x: torch.Tensor, theta: torch.Tensor, phi: torch.Tensor, g: torch.Tensor, w_z: torch.Tensor
) -> torch.Tensor:
    """An embedded-Gaussian block without biases and norm. One line of it is wrong: mend it.

    x: (B, C, H, W). theta, phi, g: (Ci, C), the 1×1 convolutions as matrices. w_z: (C, Ci).
    Returns x + W_z y, (B, C, H, W), with y_i the mean of g over all positions, weighted by the
    softmax of θ_i · φ_j over j.
    """
    tokens = x.flatten(2).mT
    scores = (tokens @ theta.mT) @ (tokens @ phi.mT).mT
    y = scores.softmax(dim=-1) @ (tokens @ g.mT)
    z = y @ w_z.mT
    return x + z.mT.reshape(x.shape)


def _bug_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)

    def case(about: str, B: int, C: int, Ci: int, H: int, W: int) -> Case:
        shapes = (B, C, H, W), (Ci, C), (Ci, C), (Ci, C), (C, Ci)
        return Case(about, tuple(torch.randn(shape, generator=generator) for shape in shapes))

    return [
        case("two channels, 1×3 positions", 1, 2, 1, 1, 3),
        case("one channel", 1, 1, 1, 2, 2),
        case("as many channels as positions", 2, 4, 2, 2, 2),
        case("a batch of three, a 5×3 map", 3, 6, 3, 5, 3),
    ]


def _block(x, theta, phi, g, w_z, axis=-1, order="c n", scale=1.0, residual=1.0):
    """The exercise's block with one of its parts replaced."""
    tokens = x.flatten(2).mT
    scores = (tokens @ theta.mT) @ (tokens @ phi.mT).mT * scale
    z = scores.softmax(dim=axis) @ (tokens @ g.mT) @ w_z.mT
    if order == "w h":
        z = z.mT.reshape(*x.shape[:2], x.shape[3], x.shape[2]).mT
    elif order == "n c":
        z = z.reshape(x.shape)
    else:
        z = z.mT.reshape(x.shape)
    return residual * x + z


BUGGY_BLOCK = Exercise(
    topic="non_local",
    solution=buggy_block,
    cases=_bug_cases,
    hints=(
        "Every shape is right, and with one channel the result is right. What is different with "
        "two?",
        "Number the entries of a (2 positions, 3 channels) matrix and reshape it to (3, 2). Does "
        "each channel get its own numbers?",
        "z is (B, N, C) and the map is (B, C, H, W): transpose first, then reshape.",
    ),
    mistakes=(
        (
            "The softmax was right: it runs over the keys, the last axis. The bug is still there.",
            lambda *args: _block(*args, axis=-2, order="n c"),
        ),
        (
            "The order of the axes is mended, but the softmax belongs on the keys, the last axis.",
            lambda *args: _block(*args, axis=-2),
        ),
        (
            "Channels are right now, but rows and columns of the map are exchanged.",
            lambda *args: _block(*args, order="w h"),
        ),
        (
            "The order of the axes is mended, but the residual path has gone: x + W_z y.",
            lambda *args: _block(*args, residual=0.0),
        ),
        (
            "The order of the axes is mended. A scale 1/√Ci is another block: the paper has none.",
            lambda *args: _block(*args, scale=args[1].shape[0] ** -0.5),
        ),
    ),
    bug=("z.mT.reshape(", "z.reshape("),
)

EXERCISES = (
    FIRST_GRADIENTS, DOT_PRODUCT_SUMMARY, CONCATENATION_WEIGHTS, BLOCK_MACS, BUGGY_BLOCK
)  # fmt: skip
