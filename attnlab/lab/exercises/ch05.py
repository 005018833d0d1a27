"""The first exercises of chapter 05: solutions, cases, hints, and the mistakes learners make."""

import torch
from einops import einsum, rearrange
from torch.nn import functional as F

from attnlab.lab.exercises.framework import Case, Exercise


def map_megabytes(height: int, width: int, output_stride: int, batch: int) -> float:
    """How much room the weights S of one position attention take, in MiB (2²⁰ bytes), in float32.

    The image has height × width pixels, the feature map one position for output_stride ×
    output_stride pixels; a side that does not divide is rounded up. S has a row for every position
    and a column for every position, for each of the batch's images.
    Returns a float, in MiB.
    """
    positions = -(-height // output_stride) * -(-width // output_stride)
    return batch * positions**2 * 4 / 2**20


def _map_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)
    height, width = (int(side) for side in torch.randint(30, 90, (2,), generator=generator))
    return [
        Case("DANet's crop of 768 pixels at output stride 8", (768, 768, 8, 1)),
        Case("the same at output stride 32, a batch of two", (768, 768, 32, 2)),
        Case("a whole Cityscapes image", (1024, 2048, 8, 1)),
        Case("OCNet's crop of 769 pixels: 97 positions a side", (769, 769, 8, 1)),
        Case("another image, not square", (8 * height, 8 * width + 1, 8, 3)),
    ]


def _positions(height, width, stride):
    return -(-height // stride) * -(-width // stride)


MAP_MEGABYTES = Exercise(
    topic="context",
    solution=map_megabytes,
    cases=_map_cases,
    hints=(
        "How many positions does the feature map have, and how many pairs do they make?",
        "768 / 8 = 96 positions a side, 96² = 9,216 positions, 9,216² weights of 4 bytes each.",
        "-(-height // output_stride) rounds up; positions = rows · columns; batch · positions² · 4 "
        "/ 2**20.",
    ),
    mistakes=(
        (
            "That is one row of S, or one number a position: S has a weight for every *pair*.",
            lambda h, w, s, b: b * _positions(h, w, s) * 4 / 2**20,
        ),
        (
            "You have a weight for every pair of pixels. Attention runs on the feature map, where "
            "output_stride² pixels are one position.",
            lambda h, w, s, b: b * (h * w) ** 2 * 4 / 2**20,
        ),
        (
            "These are 10⁶ bytes. A MiB has 2²⁰.",
            lambda h, w, s, b: b * _positions(h, w, s) ** 2 * 4 / 1e6,
        ),
        (
            "That counts weights. A float32 takes 4 bytes.",
            lambda h, w, s, b: b * _positions(h, w, s) ** 2 / 2**20,
        ),
        (
            "A side that does not divide is rounded up: 769 / 8 is 97 positions.",
            lambda h, w, s, b: b * ((h // s) * (w // s)) ** 2 * 4 / 2**20,
        ),
        (
            "Every image of the batch has weights of its own.",
            lambda h, w, s, b: _positions(h, w, s) ** 2 * 4 / 2**20,
        ),
    ),
)


def buggy_position_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """DANet's position attention without its convolutions. One line of the given code is wrong.

    q, k: (B, d, H, W). v: (B, C, H, W). S = softmax(Qᵀ K) over the keys, no scale; O = V Sᵀ.
    Returns (B, C, H, W): at each position the mean of the values, weighted by its own row of S.
    """
    height = q.shape[2]
    q, k, v = (rearrange(x, "b c h w -> b c (h w)") for x in (q, k, v))
    energy = einsum(q, k, "b d i, b d j -> b i j")
    weights = energy.softmax(dim=-1)
    context = einsum(v, weights, "b c j, b i j -> b c i")
    return rearrange(context, "b c (h w) -> b c h w", h=height)


def _bug_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)

    def case(about: str, batch: int, d: int, channels: int, *size: int) -> Case:
        shapes = ((batch, d, *size), (batch, d, *size), (batch, channels, *size))
        return Case(about, tuple(torch.randn(shape, generator=generator) for shape in shapes))

    return [
        case("two positions, one channel", 1, 2, 1, 1, 2),
        case("a batch of maps that are not square", 2, 4, 6, 3, 5),
        case("one position: it hears itself", 2, 3, 4, 1, 1),
    ]


def _attend(q, k, v, axis=-1, scale=1.0, turned=False):
    """The exercise's attention with one of its parts replaced."""
    height = q.shape[2]
    q, k, v = (rearrange(x, "b c h w -> b c (h w)") for x in (q, k, v))
    weights = (scale * einsum(q, k, "b d i, b d j -> b i j")).softmax(dim=axis)
    out = v @ (weights if turned else weights.mT)
    return rearrange(out, "b c (h w) -> b c h w", h=height)


BUGGY_POSITION_ATTENTION = Exercise(
    topic="context",
    solution=buggy_position_attention,
    cases=_bug_cases,
    hints=(
        "Every shape is right, and constant values come out as they should only if the weights of "
        "one output sum to one. Do they? Try v = 1.",
        "The softmax runs over j, the keys. Which index must the last einsum sum over?",
        "Output i is Σ_j S_ij v_j. In the last einsum i and j have changed places.",
    ),
    mistakes=(
        (
            "Now both lines are turned, and they cancel only in part: queries and keys have "
            "changed places. Row i of S belongs to query i and sums to one over the keys.",
            lambda q, k, v: _attend(q, k, v, axis=-2, turned=True),
        ),
        (
            "The softmax was right, over the last axis, and now the output still mixes rows up.",
            lambda q, k, v: _attend(q, k, v, axis=-2),
        ),
        (
            "The sum is mended, but DANet does not divide by √d: the energies were right.",
            lambda q, k, v: _attend(q, k, v, scale=q.shape[1] ** -0.5),
        ),
    ),
    bug=('"b c j, b i j -> b c i"', '"b c i, b i j -> b c j"'),
)


def oracle_context(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """OCNet's ideal: each position receives the mean of x over all positions of its own class.

    x: (B, C, H, W), floats. labels: (B, H, W), integers; 255 means unknown, and a position whose
    class is unknown receives its own features and counts for nobody else. Classes of different
    images of the batch have nothing to do with each other.
    Returns (B, C, H, W).
    """
    labels = rearrange(labels, "b h w -> b (h w)")
    same = labels[:, :, None] == labels[:, None, :]
    same = same & (labels != 255)[:, :, None]
    same = same | torch.eye(labels.shape[1], dtype=torch.bool)
    weights = F.normalize(same.to(x.dtype), p=1, dim=-1)
    tokens = rearrange(x, "b c h w -> b (h w) c")
    return rearrange(weights @ tokens, "b (h w) c -> b c h w", h=x.shape[2])


def _oracle_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)

    def case(about: str, labels: torch.Tensor, channels: int = 2) -> Case:
        shape = (len(labels), channels, *labels.shape[1:])
        return Case(about, (torch.randn(shape, generator=generator), labels))

    two = torch.randint(3, (2, 3, 4), generator=generator)
    two[:, 0, :3] = torch.tensor([0, 1, 2])
    unknown = two.clone()
    unknown[:, 1, :2] = 255
    return [
        case("two positions of class 0, one of class 1", torch.tensor([[[0, 0, 1]]]), 1),
        case("one class: the mean of the image", torch.full((1, 2, 3), 4)),
        case("a batch of two, three classes", two, 3),
        case("two neighbours of unknown class", unknown, 3),
    ]


def _oracle(x, labels, per_batch=True, unknown=True, normal="mean", alone=True):
    """The exercise's oracle with one of its parts replaced."""
    out = torch.zeros_like(x)
    for b in range(len(x)):
        for label in labels.unique():
            inside = labels[b] == label
            if not inside.any():
                continue
            if label == 255 and unknown:
                out[b][:, inside] = x[b][:, inside] if alone else 0.0
                continue
            where = inside if per_batch else labels == label
            values = x[b][:, where] if per_batch else x.transpose(0, 1)[:, where]
            value = values.mean(1) if normal == "mean" else values.sum(1)
            out[b][:, inside] = value[:, None]
    return out


ORACLE_CONTEXT = Exercise(
    topic="context",
    solution=oracle_context,
    cases=_oracle_cases,
    hints=(
        "Build the N×N relation first: R_ij = 1 where positions i and j have the same class. What "
        "turns its rows into weights?",
        "labels[:, :, None] == labels[:, None, :] compares all pairs of an image; divide each row "
        "by its sum; then it is a matrix product with the flattened features.",
        "For the unknown: & (labels != 255)[:, :, None] empties their rows, | torch.eye(N, "
        "dtype=bool) gives each position itself back.",
    ),
    mistakes=(
        (
            "That is a sum over the class. A context is a mean: each row of weights sums to one.",
            lambda x, labels: _oracle(x, labels, normal="sum"),
        ),
        (
            "You average over the class in the whole batch. Images have nothing to do with each "
            "other.",
            lambda x, labels: _oracle(x, labels, per_batch=False),
        ),
        (
            "255 is no class: two unknown positions have nothing in common that is known.",
            lambda x, labels: _oracle(x, labels, unknown=False),
        ),
        (
            "A position of unknown class keeps its own features; yours gets zeros.",
            lambda x, labels: _oracle(x, labels, alone=False),
        ),
        (
            "That is the mean of the whole image at every position: the context of one class only.",
            lambda x, labels: x.mean(dim=(2, 3), keepdim=True).expand_as(x).clone(),
        ),
    ),
)

EXERCISES = (MAP_MEGABYTES, BUGGY_POSITION_ATTENTION, ORACLE_CONTEXT)
