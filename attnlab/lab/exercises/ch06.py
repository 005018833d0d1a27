"""The exercises of chapter 06: compact attention, the length of a series, a bug, inflation."""

import math

import torch
from einops import rearrange, repeat

from attnlab.lab.exercises.framework import Case, Exercise


def compact_dot(
    theta: torch.Tensor, phi: torch.Tensor, g: torch.Tensor, groups: int
) -> torch.Tensor:
    """Generalised non-local attention with the kernel t · p, without any n × n matrix.

    theta, phi, g: (B, C, H, W), cut into `groups` groups of C / groups neighbouring channels. The
    n = C / groups · H · W numbers of a group are its elements, and element i receives
    Σ_j theta_i · phi_j · g_j over all elements j of its own group.
    Returns (B, C, H, W).
    """
    t, p, v = (rearrange(x, "b (g c) h w -> b g (c h w)", g=groups) for x in (theta, phi, g))
    y = t * (p * v).sum(dim=-1, keepdim=True)
    return y.reshape(theta.shape)


def _dot_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)

    def case(about: str, groups: int, *shape: int) -> Case:
        return Case(about, (*torch.randn(3, *shape, generator=generator), groups))

    return [
        case("one group, two channels, two places", 1, 1, 2, 1, 2),
        case("two images, two groups of two channels", 2, 2, 4, 1, 2),
        case("a batch of two, three groups, a map that is not square", 3, 2, 6, 2, 3),
        case("as many groups as channels", 4, 2, 4, 3, 2),
    ]


def _grouped(theta, phi, g, groups, pattern="b (g c) h w -> b g (c h w)"):
    return (rearrange(x, pattern, g=groups) for x in (theta, phi, g))


def _interleaved(theta, phi, g, groups):
    t, p, v = _grouped(theta, phi, g, groups, "b (c g) h w -> b g c (h w)")
    y = t * (p * v).sum(dim=(-2, -1), keepdim=True)
    return rearrange(y, "b g c n -> b (c g) n").reshape(theta.shape)


def _by_softmax(theta, phi, g, groups):
    t, p, v = _grouped(theta, phi, g, groups)
    weights = (t[..., :, None] * p[..., None, :]).softmax(dim=-1)
    return (weights @ v[..., None]).reshape(theta.shape)


def _mean_of_groups(theta, phi, g, groups):
    t, p, v = _grouped(theta, phi, g, groups)
    return (t * (p * v).mean(dim=-1, keepdim=True)).reshape(theta.shape)


COMPACT_DOT = Exercise(
    topic="cgnl",
    solution=compact_dot,
    cases=_dot_cases,
    hints=(
        "theta_i does not depend on j: take it out of the sum. What is left is one number. For "
        "how many elements is it the same?",
        "Σ_j phi_j g_j runs over the channels and the places of a group, and not over the batch.",
        'rearrange(x, "b (g c) h w -> b g (c h w)", g=groups) puts a group\'s elements into one '
        "axis; multiply, sum over it with keepdim=True, multiply by theta, and bring the shape "
        "back.",
    ),
    mistakes=(
        (
            "You sum over the places of each channel alone. Channels of one group hear each other.",
            lambda theta, phi, g, groups: theta * (phi * g).sum(dim=(2, 3), keepdim=True),
        ),
        (
            "You sum over the channels at each place alone. Places hear each other.",
            lambda theta, phi, g, groups: theta * (phi * g).sum(dim=1, keepdim=True),
        ),
        (
            "You sum over all channels. With several groups, each has a sum of its own.",
            lambda theta, phi, g, groups: theta * (phi * g).sum(dim=(1, 2, 3), keepdim=True),
        ),
        (
            "You sum over the batch as well. An image must not hear another one.",
            lambda theta, phi, g, groups: theta * (phi * g).sum(),
        ),
        (
            "A group is made of neighbouring channels, which einops writes as (g c), not (c g).",
            _interleaved,
        ),
        (
            "There is no softmax here: the rows of this kernel are not normalised.",
            _by_softmax,
        ),
        ("You take the mean over the elements. The formula has the sum.", _mean_of_groups),
        (
            "You multiply by phi at the end. theta belongs to the element that receives.",
            lambda theta, phi, g, groups: compact_dot(phi, theta, g, groups),
        ),
    ),
)


def order_needed(gamma: float, radius: float, tolerance: float) -> int:
    """The lowest order P for which the Taylor series of exp(−γ (t − p)²) is good enough.

    exp(2γ t p) is replaced by its terms k = 0 … P, exp(−γ t²) and exp(−γ p²) are kept. For all
    |t|, |p| ≤ radius the error is at most Q_P(z) = 1 − exp(−z) Σ_{k≤P} zᵏ / k! with
    z = 2γ · radius².
    Returns P, the smallest with Q_P(z) ≤ tolerance (0 < tolerance < 1). Number of terms: P + 1.
    """
    z = 2 * gamma * radius**2
    order, term = 0, math.exp(-z)
    inside = term
    while 1 - inside > tolerance:
        order += 1
        term *= z / order
        inside += term
    return order


def _order_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)
    gamma, radius = (0.2 + torch.rand(2, generator=generator)).tolist()
    return [
        Case("γ = 1 and numbers up to 2.5", (1.0, 2.5, 1e-3)),
        Case("γ = 0.5 and numbers up to 1", (0.5, 1.0, 1e-3)),
        Case("γ = 1e-4, as in the authors' code", (1e-4, 1.0, 1e-3)),
        Case("a large z", (1.0, 2.8, 1e-2)),
        Case("other numbers", (gamma, 1 + radius, 1e-4)),
    ]


def _smallest(error, gamma, radius, tolerance) -> int:
    """The smallest order whose `error(z, order)` is small enough."""
    z, order = 2 * gamma * radius**2, 0
    while error(z, order) > tolerance and order < 1000:
        order += 1
    return order


def _loose(z: float, order: int) -> float:
    return z ** (order + 1) / math.factorial(order + 1)


def _without_beta(z: float, order: int) -> float:
    return math.exp(z) - sum(z**k / math.factorial(k) for k in range(order + 1))


ORDER_NEEDED = Exercise(
    topic="cgnl",
    solution=order_needed,
    cases=_order_cases,
    hints=(
        "Q_P(z) falls with P: try P = 0, 1, 2, … and stop at the first that is good enough.",
        "Every next term of the sum is the last one times z / k; the sum times exp(−z) goes to 1.",
        "term = inside = exp(−z); while 1 − inside > tolerance: order += 1; term *= z / order; "
        "inside += term.",
    ),
    mistakes=(
        (
            "That is the number of terms. Order P has P + 1 of them, because k starts at 0.",
            lambda *args: order_needed(*args) + 1,
        ),
        (
            "You are one term short: the sum runs to k = P inclusive.",
            lambda *args: order_needed(*args) - 1,
        ),
        (
            "z has a factor 2: exp(−γ (t − p)²) leaves exp(2γ t p) to be expanded.",
            lambda gamma, *args: order_needed(gamma / 2, *args),
        ),
        (
            "z is 2γ times the *square* of the radius: t · p can be as large as that.",
            lambda gamma, radius, tolerance: order_needed(gamma, radius**0.5, tolerance),
        ),
        (
            "You use the simpler bound zᴾ⁺¹ / (P + 1)!, which is too pessimistic.",
            lambda *args: _smallest(_loose, *args),
        ),
        (
            "The factor exp(−z) is missing: that is the error of exp(2γ t p) alone.",
            lambda *args: _smallest(_without_beta, *args),
        ),
    ),
)


def buggy_series(
    theta: torch.Tensor, phi: torch.Tensor, g: torch.Tensor, gamma: float, order: int
) -> torch.Tensor:
    """Linear-time attention with the Gaussian's Taylor series. One given line is wrong: mend it.

    theta: (..., n). phi and g: (..., m). y_i = Σ_j k(theta_i, phi_j) · g_j with
    k(t, p) = exp(−γ t²) · exp(−γ p²) · Σ_k (2γ)ᵏ / k! · tᵏ · pᵏ, where k goes from 0 to `order`.
    Returns y, (..., n).
    """
    y, a = torch.zeros_like(theta), 1.0  # a is (2γ)ᵏ / k!
    carried = g * torch.exp(-gamma * phi**2)
    for k in range(order + 1):
        moment = (phi**k * carried).sum(dim=-1, keepdim=True)
        y = y + a * moment * theta**k
        a = a * 2 * gamma / (k + 1)
    return y * torch.exp(-gamma * theta**2)


def _series_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)

    def case(about: str, gamma: float, order: int, n: int, m: int, *leading: int) -> Case:
        theta = torch.randn(*leading, n, generator=generator)
        phi, g = torch.randn(2, *leading, m, generator=generator)
        return Case(about, (theta, phi, g, gamma, order))

    return [
        case("order 1, two elements that receive, three that give", 0.5, 1, 2, 3),
        case("order 3, the authors' choice", 0.5, 3, 4, 4, 2),
        case("order 0", 0.3, 0, 3, 5),
        case("a batch of two with three groups, order 4", 0.2, 4, 6, 6, 2, 3),
    ]


def _series(theta, phi, g, gamma, order, terms=None, envelope=True, factorial=True, two=2.0):
    """The exercise's sum with one of its parts replaced."""
    y = torch.zeros_like(theta)
    carried = g * torch.exp(-gamma * phi**2) if envelope else g
    for k in range(order + 1 if terms is None else terms(order)):
        a = (two * gamma) ** k / (math.factorial(k) if factorial else 1)
        y = y + a * (phi**k * carried).sum(dim=-1, keepdim=True) * theta**k
    return y * torch.exp(-gamma * theta**2)


BUGGY_SERIES = Exercise(
    topic="cgnl",
    solution=buggy_series,
    cases=_series_cases,
    hints=(
        "It runs, it is linear, and its kernel matrix has rank `order`. Which rank should it have?",
        "Take order 0 and work the formula out on paper: what is left of the sum?",
        "range(order) ends at order − 1. The sum has order + 1 terms.",
    ),
    mistakes=(
        (
            "Now there is one term too many: k goes from 0 to `order`, both included.",
            lambda *args: _series(*args, terms=lambda order: order + 2),
        ),
        (
            "The number of terms is right now, but exp(−γ p²) got lost on the way.",
            lambda *args: _series(*args, envelope=False),
        ),
        (
            "The number of terms is right now, but the factor 1 / k! got lost.",
            lambda *args: _series(*args, factorial=False),
        ),
        (
            "The number of terms is right now. The coefficient was right too: it has (2γ)ᵏ.",
            lambda *args: _series(*args, two=1.0),
        ),
        (
            "exp(−γ t²) is right where it is. The bug is elsewhere, and is still there.",
            lambda theta, phi, g, gamma, order: (
                _series(theta, phi, g, gamma, order, terms=lambda order: order)
                * torch.exp(gamma * theta**2)
            ),
        ),
    ),
    bug=("range(order + 1)", "range(order)"),
)


def inflate_kernel(weight: torch.Tensor, frames: int) -> torch.Tensor:
    """The kernel of a 3-D convolution that starts from one trained on images.

    weight: (C_out, C_in, k, k). The new kernel sees `frames` frames, the same in each, and on a
    clip that stands still it gives what the 2-D one gives on the image (away from the clip's ends).
    Returns (C_out, C_in, frames, k, k).
    """
    return repeat(weight, "o i h w -> o i t h w", t=frames) / frames


def _inflate_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)

    def case(about: str, frames: int, *shape: int) -> Case:
        return Case(about, (torch.randn(*shape, generator=generator), frames))

    return [
        case("a 1×1 kernel over three frames", 3, 1, 2, 1, 1),
        case("five filters of three channels, 3×3, over three frames", 3, 5, 3, 3, 3),
        case("one frame: the same numbers, one more axis", 1, 2, 2, 3, 3),
        case("five frames", 5, 2, 4, 3, 3),
    ]


def _centre_only(weight, frames):
    kernel = torch.zeros(*weight.shape[:2], frames, *weight.shape[2:])
    kernel[:, :, frames // 2] = weight
    return kernel


INFLATE_KERNEL = Exercise(
    topic="cgnl",
    solution=inflate_kernel,
    cases=_inflate_cases,
    hints=(
        "On a still clip every frame is the same picture, so the responses of the copies add up. "
        "To what?",
        "The new axis comes after C_in: (C_out, C_in, frames, k, k), as in torch.nn.Conv3d.",
        'repeat(weight, "o i h w -> o i t h w", t=frames), divided by the number of copies.',
    ),
    mistakes=(
        (
            "The copies add up: on a still clip this answers `frames` times as strongly.",
            lambda weight, frames: inflate_kernel(weight, frames) * frames,
        ),
        (
            "Only the middle frame is seen. That is a fair initialisation too, but here all frames "
            "get the same kernel.",
            _centre_only,
        ),
        (
            "Time is the third axis of a Conv3d's kernel: (C_out, C_in, frames, k, k).",
            lambda weight, frames: rearrange(
                inflate_kernel(weight, frames), "o i t h w -> o i h w t"
            ),
        ),
        (
            "Dividing by √frames keeps the variance of noise. A still clip is no noise: the copies "
            "add up without cancelling.",
            lambda weight, frames: inflate_kernel(weight, frames) * frames**0.5,
        ),
    ),
)

EXERCISES = (COMPACT_DOT, ORDER_NEEDED, BUGGY_SERIES, INFLATE_KERNEL)
