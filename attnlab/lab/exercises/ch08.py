"""The exercises of chapter 08: solutions, cases, hints, and the mistakes learners make."""

from itertools import pairwise

import torch

from attnlab.lab.exercises.framework import Case, Exercise


def attention_pool(
    z: torch.Tensor,
    cls: torch.Tensor,
    w_q: torch.Tensor,
    w_k: torch.Tensor,
    w_v: torch.Tensor,
    w_o: torch.Tensor,
    gamma: torch.Tensor,
) -> torch.Tensor:
    """Attention pooling with one head and no biases, up to its first residual sum.

    z: (B, 1 + N, d), what LayerNorm made of the class vector (place 0) and of the N patches. All
    1 + N are keys. cls: (d,), the class vector as it was before LayerNorm.
    w_q, w_k, w_v, w_o: (d, d) each, used as in nn.Linear: z @ w.T.
    gamma: (d,), LayerScale on what attention brings.
    Returns (B, d): the class vector after the residual sum.
    """
    q, k, v = z[:, :1] @ w_q.T, z @ w_k.T, z @ w_v.T
    weights = (q @ k.mT / z.shape[-1] ** 0.5).softmax(dim=-1)  # (B, 1, 1 + N)
    return cls + gamma * (weights @ v @ w_o.T)[:, 0]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _pool_cases(seed: int) -> list[Case]:
    generator = _generator(seed)

    def case(about: str, batch: int, patches: int, dim: int) -> Case:
        z = torch.randn(batch, 1 + patches, dim, generator=generator)
        z[:, 0] = torch.randn(dim, generator=generator)  # the same in every image
        cls, gamma = torch.randn(2, dim, generator=generator)
        return Case(about, (z, cls, *torch.randn(4, dim, dim, generator=generator), gamma))

    return [
        case("one image, two patches, width 2", 1, 2, 2),
        case("three images of five patches", 3, 5, 4),
        case("no patch at all: the class vector looks at itself", 2, 0, 3),
    ]


def _pool(z, cls, w_q, w_k, w_v, w_o, gamma, *, scale=True, onto=None, keys=0, factor=True):
    q, k, v = z[:, :1] @ w_q.T, z[:, keys:] @ w_k.T, z[:, keys:] @ w_v.T
    logits = q @ k.mT / (z.shape[-1] ** 0.5 if scale else 1)
    out = (logits.softmax(-1) @ v @ w_o.T)[:, 0]
    return (cls if onto is None else onto(z)) + (gamma * out if factor else out)


ATTENTION_POOL = Exercise(
    topic="patchconvnet",
    solution=attention_pool,
    cases=_pool_cases,
    hints=(
        "Follow the shapes: one query an image, (B, 1, d); keys and values (B, 1 + N, d).",
        "Softmax over the keys; the mean of the values by these weights; w_o; γ; then onto cls.",
        "weights = (q @ k.mT / d**0.5).softmax(-1); then cls + gamma * (weights @ v @ w_o.T)[:, 0]",
    ),
    mistakes=(
        ("The scale 1/√d is missing.", lambda *args: _pool(*args, scale=False)),
        (
            "You add to what LayerNorm made of the class vector. The residual path carries the "
            "vector itself, `cls`.",
            lambda *args: _pool(*args, onto=lambda z: z[:, 0]),
        ),
        (
            "You add to the mean of the tokens. There is no average in here: what attention brings "
            "is added to the class vector.",
            lambda *args: _pool(*args, onto=lambda z: z.mean(1)),
        ),
        (
            "You left the class vector out of the keys. With one query it is a key too, as in the "
            "authors' code: N + 1 weights sum to 1.",
            lambda *args: _pool(*args, keys=1),
        ),
        ("LayerScale is missing: multiply by γ.", lambda *args: _pool(*args, factor=False)),
        (
            "You return what attention brings. The residual sum is missing.",
            lambda *args: _pool(*args, onto=lambda z: 0),
        ),
    ),
)


def probe(cls: torch.Tensor, w_q: torch.Tensor, b_q: torch.Tensor, w_k: torch.Tensor):
    """The vector p that turns the keys' projection into one number a patch.

    cls: (d,), the class vector after LayerNorm. Its query is q = w_q cls + b_q, and a patch z has
    the key w_k z (plus a bias, which the softmax cancels). w_q, w_k: (d, d), b_q: (d,).
    Returns p, (d,), so that for every patch z: p · z = q · (w_k z) / √d.
    """
    q = w_q @ cls + b_q
    return w_k.T @ q / len(q) ** 0.5


def _probe_cases(seed: int) -> list[Case]:
    generator = _generator(seed)

    def case(about: str, dim: int) -> Case:
        cls, bias = torch.randn(2, dim, generator=generator)
        w_q, w_k = torch.randn(2, dim, dim, generator=generator)
        return Case(about, (cls, w_q, bias, w_k))

    return [case("width 2", 2), case("width 9", 9), case("width 1", 1)]


PROBE = Exercise(
    topic="patchconvnet",
    solution=probe,
    cases=_probe_cases,
    hints=(
        "Write q · (w_k z) with indices: Σ_i q_i Σ_j w_k[i, j] z_j. What stands before z_j?",
        "q · (w_k z) = (w_kᵀ q) · z.",
        "w_k.T @ (w_q @ cls + b_q) / d ** 0.5",
    ),
    mistakes=(
        (
            "The transpose is missing: q · (W z) = (Wᵀ q) · z.",
            lambda cls, w_q, b_q, w_k: w_k @ (w_q @ cls + b_q) / len(cls) ** 0.5,
        ),
        (
            "The scale 1/√d is missing.",
            lambda cls, w_q, b_q, w_k: w_k.T @ (w_q @ cls + b_q),
        ),
        (
            "The query's bias is missing. (The keys' bias may go; this one may not.)",
            lambda cls, w_q, b_q, w_k: w_k.T @ (w_q @ cls) / len(cls) ** 0.5,
        ),
        (
            "This is the query itself. The keys' matrix has to be folded into it.",
            lambda cls, w_q, b_q, w_k: w_q @ cls + b_q,
        ),
    ),
)


def parameters(dim: int, depth: int, num_classes: int, multiclass: bool) -> int:
    """Number of parameters of a PatchConvNet with a stem of four convolutions, by formula.

    Stem: four 3×3 convolutions from 3 channels to dim/8, dim/4, dim/2 and dim, without biases.
    Each of the `depth` blocks, all convolutions with biases: LayerNorm; 1×1 (dim to dim);
    depthwise 3×3; two 1×1 of squeeze-and-excitation, dim to dim/4 and back; 1×1 (dim to dim); γ.
    Pooling: a class vector, or with `multiclass` one for each class; LayerNorm; four linear maps
    (dim to dim) with biases; γ; LayerNorm; a feed-forward network of hidden width 3 dim with
    biases; γ. At the end LayerNorm and a linear classifier with biases.
    """
    widths = [3, dim // 8, dim // 4, dim // 2, dim]
    stem = sum(9 * a * b for a, b in pairwise(widths))
    squeeze = 2 * dim * (dim // 4) + dim // 4 + dim
    block = 2 * (dim**2 + dim) + 10 * dim + squeeze + 2 * dim + dim
    vectors = dim * (num_classes if multiclass else 1)
    attention = 4 * (dim**2 + dim)
    feed_forward = 2 * 3 * dim**2 + 3 * dim + dim
    pool = vectors + attention + feed_forward + 2 * (2 * dim) + 2 * dim
    return stem + depth * block + pool + 2 * dim + num_classes * (dim + 1)


def _count_cases(seed: int) -> list[Case]:
    dim, depth, classes = torch.randint(1, 9, (3,), generator=_generator(seed)).tolist()
    return [
        Case("three blocks of width 8, five classes", (8, 3, 5, False)),
        Case("S60", (384, 60, 1_000, False)),
        Case("S60 with a map for every class", (384, 60, 1_000, True)),
        Case("B60", (768, 60, 1_000, False)),
        Case("another", (8 * dim, depth, 10 * classes, False)),
    ]


COUNT = Exercise(
    topic="patchconvnet",
    solution=parameters,
    cases=_count_cases,
    hints=(
        "Count stem, one block, pooling, classifier on their own. Which of them grows with depth?",
        "A block has 2 dim² + 2 dim · dim/4 + dim/4 + 16 dim parameters; the pooling 10 dim² + "
        "14 dim and its class vectors.",
        "The stem has 9 (3 dim/8 + 21 dim²/32). Add depth · block, pooling, 2 dim, and "
        "num_classes (dim + 1).",
    ),
    mistakes=(
        (
            "The biases of the two squeeze-and-excitation layers are missing: dim/4 + dim a block.",
            lambda *args: parameters(*args) - args[1] * (args[0] // 4 + args[0]),
        ),
        (
            "You are dim a block short: the γ of every block, or the biases of its depthwise "
            "convolution.",
            lambda *args: parameters(*args) - args[1] * args[0],
        ),
        (
            "The squeeze is to dim/4 here, not to dim/16.",
            lambda *args: parameters(*args) - args[1] * _squeeze_gap(args[0]),
        ),
        (
            "The class vectors are missing.",
            lambda *args: parameters(*args) - args[0] * (args[2] if args[3] else 1),
        ),
        ("The last LayerNorm is missing.", lambda *args: parameters(*args) - 2 * args[0]),
    ),
)


def _squeeze_gap(dim: int) -> int:
    return (2 * dim + 1) * (dim // 4 - dim // 16)


def buggy_maps(z: torch.Tensor, queries: torch.Tensor, w_k: torch.Tensor) -> torch.Tensor:
    """A map for every class, the patches not projected to keys. One line is wrong: mend it.

    z: (B, N, d), the patches after LayerNorm; only they are keys. queries: (classes, d).
    w_k: (d, d), the keys' matrix: a patch z has the key w_k z.
    Returns (B, classes, N): how each class shares its attention out among the patches.
    """
    probes = queries @ w_k / z.shape[-1] ** 0.5
    logits = z @ probes.T
    weights = logits.softmax(dim=1)
    return weights.mT


def _map_cases(seed: int) -> list[Case]:
    generator = _generator(seed)

    def case(about: str, batch: int, places: int, classes: int, dim: int = 4) -> Case:
        z = torch.randn(batch, places, dim, generator=generator)
        return Case(
            about,
            (
                z,
                torch.randn(classes, dim, generator=generator),
                torch.randn(dim, dim, generator=generator),
            ),
        )

    return [
        case("two images of six patches, three classes", 2, 6, 3),
        case("a single class", 2, 5, 1),
        case("as many classes as patches", 1, 4, 4),
        case("a single patch", 2, 1, 3),
    ]


BUGGY_MAPS = Exercise(
    topic="patchconvnet",
    solution=buggy_maps,
    cases=_map_cases,
    hints=(
        "What does the map of the only class look like, when there is a single one?",
        "Which sums are 1: of a class over the patches, or of a patch over the classes?",
        "The logits are (B, N, classes), and every class has a softmax of its own over the N.",
    ),
    mistakes=(
        (
            "All maps together share one unit now. Every class has one of its own.",
            lambda z, queries, w_k: (
                ((z @ (queries @ w_k / z.shape[-1] ** 0.5).T).flatten(1).softmax(1))
                .view(len(z), z.shape[1], -1)
                .mT
            ),
        ),
        (
            "The softmax must not run over the batch: one image knows nothing of another.",
            lambda z, queries, w_k: (z @ (queries @ w_k / z.shape[-1] ** 0.5).T).softmax(0).mT,
        ),
        (
            "The softmax was changed well, and the keys' matrix was turned: q · (W z) = (q W) · z.",
            lambda z, queries, w_k: buggy_maps(z, queries, w_k.T),
        ),
    ),
    bug=("softmax(dim=1)", "softmax(dim=2)"),
)

EXERCISES = (ATTENTION_POOL, PROBE, COUNT, BUGGY_MAPS)
