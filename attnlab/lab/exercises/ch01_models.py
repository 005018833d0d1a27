"""More exercises of chapter 01: counting a ViT, finding a bug, rolling attention out."""

import torch
from einops import einsum, rearrange

from attnlab.lab.exercises.framework import Case, Exercise


def vit_parameters(dim: int, depth: int, patch_size: int, img_size: int, num_classes: int) -> int:
    """Number of parameters of a ViT classifier, by formula: nothing is built.

    Square RGB images, one class token, a learned position for every token; in each block two
    LayerNorms, attention (qkv and projection) and an MLP of width 4 · dim; a LayerNorm at the end
    and a linear head. Every linear map, the patch embedding and every LayerNorm has a bias.
    """
    patches = (img_size // patch_size) ** 2
    embedding = 3 * patch_size**2 * dim + dim
    tokens = dim + (patches + 1) * dim  # the class token, and a position for each token
    attention = (dim * 3 * dim + 3 * dim) + (dim * dim + dim)
    mlp = (dim * 4 * dim + 4 * dim) + (4 * dim * dim + dim)
    norm = 2 * dim
    head = dim * num_classes + num_classes
    return embedding + tokens + depth * (norm + attention + norm + mlp) + norm + head


def _vit_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)
    dim, depth, patch, side, classes = (
        int(torch.randint(low, high, (), generator=generator))
        for low, high in ((5, 40), (3, 12), (5, 17), (5, 14), (11, 200))
    )
    return [
        Case("DeiT-S", (384, 12, 16, 224, 1000)),
        Case("DeiT-B on images of 384 pixels", (768, 12, 16, 384, 1000)),
        Case("vit_mini of this course", (96, 6, 8, 64, 8)),
        Case("an odd one", (8 * dim, depth, patch, patch * side, classes)),
    ]


def _vit_without(part):
    """The count without a part, which is a function of the arguments and the number of patches."""

    def count(dim, depth, patch_size, img_size, num_classes):
        patches = (img_size // patch_size) ** 2
        whole = vit_parameters(dim, depth, patch_size, img_size, num_classes)
        return whole - part(dim, depth, patches, num_classes)

    return count


VIT_PARAMETERS = Exercise(
    topic="attention",
    solution=vit_parameters,
    cases=_vit_cases,
    hints=(
        "Go through the model from the image to the logits and list every learned tensor with "
        "its shape: weights, biases, norms, and the two that belong to no layer.",
        "One block has 12·dim² + 13·dim: attention 4·dim² + 4·dim, MLP 8·dim² + 5·dim, and two "
        "norms of 2·dim each.",
        "Around the blocks: patch embedding 3·patch²·dim + dim, class token dim, positions "
        "(patches + 1)·dim, last norm 2·dim, head dim·classes + classes.",
    ),
    mistakes=(
        (
            "You are short by the position embedding: one vector of width dim for every token.",
            _vit_without(lambda dim, depth, patches, classes: (patches + 1) * dim),
        ),
        (
            "You are short by dim: the class token is a learned vector and has a position as well; "
            "or the bias of the patch embedding is missing.",
            _vit_without(lambda dim, depth, patches, classes: dim),
        ),
        (
            "You are short by the class token and the positions: they belong to no layer, and are "
            "learned all the same.",
            _vit_without(lambda dim, depth, patches, classes: (patches + 2) * dim),
        ),
        (
            "You are short by 2·dim: the class token and its position, or the last LayerNorm.",
            _vit_without(lambda dim, depth, patches, classes: 2 * dim),
        ),
        (
            "The attention has 3·dim² in qkv, and then a projection: another dim² + dim per block.",
            _vit_without(lambda dim, depth, patches, classes: depth * (dim * dim + dim)),
        ),
        (
            "These are the weights without the biases of the linear maps: qkv, projection, both "
            "layers of the MLP, patch embedding, head.",
            _vit_without(lambda dim, depth, patches, classes: depth * 9 * dim + dim + classes),
        ),
        (
            "The linear maps inside the blocks have biases: 3·dim + dim + 4·dim + dim per block.",
            _vit_without(lambda dim, depth, patches, classes: depth * 9 * dim),
        ),
        (
            "No LayerNorm is counted: each has a weight and a bias of width dim.",
            _vit_without(lambda dim, depth, patches, classes: (2 * depth + 1) * 2 * dim),
        ),
        (
            "You are short by 2·dim·depth: every block has two LayerNorms.",
            _vit_without(lambda dim, depth, patches, classes: 2 * depth * dim),
        ),
        (
            "Heads share the width: their number changes nothing. And an image has three colours.",
            lambda dim, depth, patch, side, classes: (
                vit_parameters(dim, depth, patch, side, classes) - 2 * patch**2 * dim
            ),
        ),
    ),
)


def buggy_attention(
    x: torch.Tensor, qkv_weight: torch.Tensor, proj_weight: torch.Tensor, num_heads: int
) -> torch.Tensor:
    """Multi-head self-attention without biases. One line of the given code is wrong: mend it.

    x: (B, N, D). qkv_weight: (3D, D), rows: all queries, all keys, all values, and within each
    head after head. proj_weight: (D, D), its input is head after head as well.
    Returns (B, N, D), equal to nn.MultiheadAttention with these weights.
    """
    qkv = x @ qkv_weight.T
    q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=num_heads)
    scores = einsum(q, k, "b h i d, b h j d -> b h i j") * q.shape[-1] ** -0.5
    weights = scores.softmax(dim=-1)
    out = einsum(weights, v, "b h i j, b h j d -> b h i d")
    return rearrange(out, "b h n d -> b n (h d)") @ proj_weight.T


def _bug_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)

    def case(about: str, batch: int, tokens: int, dim: int, heads: int) -> Case:
        x = torch.randn(batch, tokens, dim, generator=generator)
        qkv, proj = (
            torch.randn(rows, dim, generator=generator) * dim**-0.5 for rows in (3 * dim, dim)
        )
        return Case(about, (x, qkv, proj, heads))

    return [
        case("two heads of width three", 1, 2, 6, 2),
        case("a batch of three, four heads", 3, 5, 24, 4),
        case("one head", 2, 4, 6, 1),
        case("as many heads as channels", 2, 3, 4, 4),
    ]


def _attend(
    x,
    qkv_weight,
    proj_weight,
    num_heads,
    split="(three h d)",
    axis=-1,
    scale=None,
    merge="(h d)",
):
    """The exercise's attention with one of its parts replaced."""
    qkv = x @ qkv_weight.T
    q, k, v = rearrange(qkv, f"b n {split} -> three b h n d", three=3, h=num_heads)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    out = scores.softmax(dim=axis) @ v
    return rearrange(out, f"b h n d -> b n {merge}") @ proj_weight.T


BUGGY_ATTENTION = Exercise(
    topic="attention",
    solution=buggy_attention,
    cases=_bug_cases,
    hints=(
        "Every shape is right, with one head the result is right, and rows sum to 1. What is "
        "different as soon as there are two heads?",
        "An output channel belongs to a head. Write down, for two heads of width three, which "
        "head each of the six input channels of the projection comes from.",
        "qkv is split as (h d), head after head. The last line has to put the heads back in the "
        "same order.",
    ),
    mistakes=(
        (
            "Now the split and the merger agree with each other, but not with the weights: their "
            "rows go head after head, which einops writes as (h d).",
            lambda *args: _attend(*args, split="(three d h)", merge="(d h)"),
        ),
        (
            "The split was right: it goes head after head. Only the merger did not.",
            lambda *args: _attend(*args, split="(three d h)"),
        ),
        (
            "The softmax belongs on the keys, the last axis: each query's weights sum to 1.",
            lambda *args: _attend(*args, axis=-2),
        ),
        (
            "The softmax was right, on the last axis. And the bug is still there.",
            lambda *args: _attend(*args, axis=-2, merge="(d h)"),
        ),
        (
            "The order of the heads is mended, but the scale was right: 1/√(width of a head).",
            lambda *args: _attend(*args, scale=args[0].shape[-1] ** -0.5),
        ),
        (
            "The order of the heads is mended, but the scores have lost their scale 1/√d.",
            lambda *args: _attend(*args, scale=1.0),
        ),
    ),
    bug=("b h n d -> b n (h d)", "b h n d -> b n (d h)"),
)


def rollout(maps: list[torch.Tensor]) -> torch.Tensor:
    """Attention rollout: the share of every input token in every output token, through all layers.

    maps: one (B, heads, N, N) tensor a layer, the first layer first; every row sums to 1.
    A layer keeps half of each token (the residual path) and mixes the other half by its attention,
    averaged over the heads. Abnar and Zuidema 2020, section 3.
    Returns (B, N, N): row i says where output token i came from, and sums to 1.
    """
    shares = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype)
    for weights in maps:
        mixing = (weights.mean(dim=1) + torch.eye(weights.shape[-1], dtype=weights.dtype)) / 2
        shares = mixing @ shares
    return shares


def _rollout_cases(seed: int) -> list[Case]:
    generator = torch.Generator().manual_seed(seed)

    def layers(count: int, *shape: int) -> list[torch.Tensor]:
        return [(2 * torch.randn(shape, generator=generator)).softmax(-1) for _ in range(count)]

    identity = torch.eye(4).expand(2, 3, 4, 4).contiguous()
    return [
        Case("two layers, one head, three tokens", (layers(2, 1, 1, 3, 3),)),
        Case("one layer with two heads", (layers(1, 1, 2, 2, 2),)),
        Case("five layers, three heads, a batch of two", (layers(5, 2, 3, 4, 4),)),
        Case("every token attends to itself only", ([identity, identity],)),
        Case("twelve layers in double precision", ([m.double() for m in layers(12, 1, 2, 4, 4)],)),
    ]


def _roll(maps, residual=1.0, normalize=True, fuse=torch.mean, backwards=False):
    """Rollout with one of its parts replaced."""
    identity = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype)
    shares = identity
    for weights in maps:
        mixing = fuse(weights, dim=1) + residual * identity
        if normalize:
            mixing = mixing / (1 + residual)
        shares = shares @ mixing if backwards else mixing @ shares
    return shares


ROLLOUT = Exercise(
    topic="attention",
    solution=rollout,
    cases=_rollout_cases,
    hints=(
        "Follow one token: after the first layer it is a mixture of inputs, after the second a "
        "mixture of such mixtures.",
        "A layer is the matrix ½ (A + I), with A the mean over the heads. Two layers are the "
        "product of their matrices. Which of the two stands on the left?",
        "Start with the identity; for each layer from the first to the last: "
        "shares = ½ (A + I) @ shares.",
    ),
    mistakes=(
        (
            "The order: each later layer mixes what the earlier ones made, so its matrix "
            "multiplies from the left.",
            lambda maps: _roll(maps, backwards=True),
        ),
        (
            "The residual path is missing: half of each token goes past the attention, ½ (A + I).",
            lambda maps: _roll(maps, residual=0.0),
        ),
        (
            "The rows do not sum to 1: A + I doubles them in every layer. Take half of it.",
            lambda maps: _roll(maps, normalize=False),
        ),
        (
            "The maximum over the heads is not a distribution. Average the heads.",
            lambda maps: _roll(maps, fuse=torch.amax),
        ),
        (
            "Layers follow each other: their matrices are multiplied, not averaged.",
            lambda maps: sum(_roll([m]) for m in maps).expand(maps[0].shape[0], -1, -1) / len(maps),
        ),
        (
            "That is the last layer alone. Its tokens are mixtures already: multiply on.",
            lambda maps: _roll(maps[-1:]),
        ),
        (
            "The batch axis is gone or the heads are left: average over dim 1, return (B, N, N).",
            lambda maps: _roll([m[:, :, None] for m in maps]),
        ),
    ),
)

EXERCISES = (VIT_PARAMETERS, BUGGY_ATTENTION, ROLLOUT)
