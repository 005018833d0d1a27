"""Exact attention without the matrix of weights: PyTorch's fused kernel, and its idea to read.

Papers: Milakov & Gimelshein 2018 (online softmax); Rabe & Staats 2021; Dao et al. 2022
(FlashAttention). The idea: a softmax over all keys can be put together from softmaxes over blocks
of keys, if each block keeps its row maximum and row sum; and the backward pass can compute the
weights again from one number a row, the log-sum-exp. What differs from the papers: the blockwise
form is plain PyTorch, and does not cut the queries; its memory is O(N·(d + block_size)).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

State = tuple[Tensor, Tensor, Tensor]

IMPLS = ("auto", "explicit", "fused", "blockwise")

# "auto" takes the fused kernel from this many scores (queries × keys) on, as {device: (without,
# with gradients)}; 0 is always. Measured by benchmarks/attention.py, its table "auto": on two cores
# explicit wins only for batched inference below 200 tokens, by up to a third.
FUSED_FROM = {"cpu": (0, 0), "cuda": (0, 0)}


def scores_of(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """S = scale · Q Kᵀ + mask: `(..., N, d)`, `(..., M, d)` → `(..., N, M)`, at least float32.

    −∞ where a Boolean `mask` is False; a float `mask` is added.
    """
    scores = (q * scale) @ k.transpose(-2, -1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -math.inf)
    return scores + mask


def check_inputs(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    """`ValueError` when queries, keys, values and mask do not fit together."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if min(q.ndim, k.ndim, v.ndim) < 2 or not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:
        raise ValueError(f"{shapes}: expected (..., N, d), (..., M, d), (..., M, dv)")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"{shapes}: expected q and k of the same width d (the last axis)")
    if k.shape[-2] != v.shape[-2] or k.shape[-2] == 0:
        raise ValueError(f"{shapes}: expected as many values as keys M, and at least one")
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"mask of dtype {mask.dtype}: expected bool (True = may attend) or float")
    scores = (*q.shape[:-1], k.shape[-2])
    fits = mask.ndim <= len(scores) and all(
        size in (1, full)
        for size, full in zip(reversed(mask.shape), reversed(scores), strict=False)
    )
    if not fits:
        raise ValueError(f"mask {tuple(mask.shape)}: expected a shape that broadcasts to {scores}")


def check_impl(impl: str) -> None:
    """`ValueError` for an unknown `impl`."""
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r}: expected one of {', '.join(IMPLS)}")


def fused_is_faster(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `impl="auto"` takes the fused kernel for these tensors in this grad mode."""
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return q.shape[-2] * k.shape[-2] >= FUSED_FROM["cuda" if q.is_cuda else "cpu"][training]


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """PyTorch's kernel; arguments as in `attnlab.attention.scaled_dot_product_attention`.

    Each of its backends has its own idea of a row that may attend nowhere. Such rows are opened
    here, and their output is set to zero. On CPU, PyTorch itself materialises the weights when
    `v` is not as wide as `q`, when weights are dropped, or when a float mask needs a gradient.
    """
    check_inputs(q, k, v, mask)
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)
    if mask.dtype == torch.bool:
        dead = ~mask.any(-1, keepdim=True)
        mask = mask | dead
    else:
        mask = mask.to(q.dtype)
        dead = (mask == -math.inf).all(-1, keepdim=True)
        mask = mask.masked_fill(dead, 0.0)
    mask = mask.expand(*q.shape[:-1], k.shape[-2])  # fewer axes would lose the fast CPU kernel
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout_p, scale=scale)
    return out.masked_fill(dead, 0.0)


def block_state(scores: Tensor, v: Tensor) -> State:
    """The unfinished softmax of one block of keys.

    Args:
        scores: `(..., N, block)`.
        v: the block's values, `(..., block, dv)`.

    Returns:
        m, the row maximum, and l, the row sum of exp(scores − m), both `(..., N, 1)`; and
        o = exp(scores − m) v, `(..., N, dv)`. The block's attention alone would be o / l.
    """
    m = scores.amax(-1, keepdim=True)
    weights = (scores - _finite(m)).exp()
    return m, weights.sum(-1, keepdim=True), weights @ v.to(weights.dtype)


def merge_states(a: State, b: State) -> State:
    """The state of two blocks' keys together, exactly. Associative, and in any order."""
    (m_a, l_a, o_a), (m_b, l_b, o_b) = a, b
    m = torch.maximum(m_a, m_b)
    alpha, beta = (m_a - _finite(m)).exp(), (m_b - _finite(m)).exp()
    return m, alpha * l_a + beta * l_b, alpha * o_a + beta * o_b


def blockwise_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    block_size: int = 128,
) -> Tensor:
    """softmax(scale · Q Kᵀ + mask) V, one block of keys at a time: exact, in little memory.

    Arguments, shapes and masks are those of `attnlab.attention.scaled_dot_product_attention`.
    The backward pass computes each block's weights again, exp(S − L) with L the log-sum-exp of a
    row, so that training needs no N×M matrix either. A row that may attend nowhere gives zeros.

    Args:
        block_size: keys per block, at least 1; any size gives the same result.

    Raises:
        ValueError: shapes or mask do not fit; `block_size` below 1.
    """
    check_inputs(q, k, v, mask)
    if block_size < 1:
        raise ValueError(f"block_size={block_size}: expected at least 1")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if mask is not None:  # one column per key, so that it can be cut like the keys
        mask = mask.expand(*mask.shape[:-1], k.shape[-2])
    return _online_softmax(q, k, v, mask, scale, block_size)[0]


@torch.library.custom_op("attnlab::online_softmax", mutates_args=())
def _online_softmax(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, block_size: int
) -> tuple[Tensor, Tensor]:
    """The output `(..., N, dv)` and the log-sum-exp of the scores' rows, `(..., N, 1)`."""
    state = None
    for k_block, v_block, mask_block in _blocks(k, v, mask, block_size):
        block = block_state(scores_of(q, k_block, mask_block, scale), v_block)
        state = block if state is None else merge_states(state, block)
    m, l, o = state
    return (o / l.masked_fill(l == 0, 1.0)).to(v.dtype), m + l.log()


@_online_softmax.register_fake
def _(q, k, v, mask, scale, block_size):
    row = q.new_empty(*q.shape[:-1], 1, dtype=torch.promote_types(q.dtype, torch.float32))
    return v.new_empty(*q.shape[:-1], v.shape[-1]), row


def _save(ctx, inputs, output):
    q, k, v, mask, ctx.scale, ctx.block_size = inputs
    ctx.save_for_backward(q, k, v, mask, *output)


def _backward(ctx, d_out, d_lse):
    """P = exp(S − L), dV = Pᵀ dO, dS = P ∘ (dO Vᵀ − rowsum(dO ∘ O) + dL), dQ = scale · dS K."""
    q, k, v, mask, out, lse = ctx.saved_tensors
    d_out, out = d_out.to(lse.dtype), out.to(lse.dtype)
    delta = d_lse - (d_out * out).sum(-1, keepdim=True)
    d_q, d_k, d_v, d_mask = 0.0, [], [], []
    for k_block, v_block, mask_block in _blocks(k, v, mask, ctx.block_size):
        weights = (scores_of(q, k_block, mask_block, ctx.scale) - _finite(lse)).exp()
        d_v.append(weights.transpose(-2, -1) @ d_out)
        d_scores = weights * (d_out @ v_block.to(lse.dtype).transpose(-2, -1) + delta)
        d_q = d_q + ctx.scale * (d_scores @ k_block.to(lse.dtype))
        d_k.append(ctx.scale * (d_scores.transpose(-2, -1) @ q.to(lse.dtype)))
        if ctx.needs_input_grad[3]:
            d_mask.append(d_scores.sum_to_size(mask_block.shape))
    d_mask = torch.cat(d_mask, -1).to(mask.dtype) if d_mask else None
    d_k, d_v = torch.cat(d_k, -2).to(k.dtype), torch.cat(d_v, -2).to(v.dtype)
    return d_q.to(q.dtype), d_k, d_v, d_mask, None, None


_online_softmax.register_autograd(_backward, setup_context=_save)


def _blocks(k, v, mask, size):
    """Cut the key axis: `(..., size, d)`, `(..., size, dv)` and the mask's columns or None."""
    for start in range(0, k.shape[-2], size):
        keys = slice(start, start + size)
        yield k[..., keys, :], v[..., keys, :], None if mask is None else mask[..., keys]


def _finite(m: Tensor) -> Tensor:
    """0 in place of −∞ (a row with no admissible key), so that −∞ − m stays −∞ and is not NaN."""
    return m.masked_fill(m == -math.inf, 0.0)
