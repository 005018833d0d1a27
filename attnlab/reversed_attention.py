"""Reversed attention: children share their messages out among parents (chapter 09).

Paper: Ding et al., CVPR 2023, "Visual Dependency Transformers: Dependency Tree Emerges from
Reversed Attention", arXiv:2304.03282. The idea: a token i, the child, decides by a softmax over all
tokens j which parents get its message, and a parent cannot choose what it receives. A head selector
P gives each child few heads to speak through; a message controller M lets a child fall silent.

What differs from the paper: no official code exists, and what the known text leaves open is an
argument. The transposed matrix of weights need not be formed: A_Fᵀ u is the derivative of ordinary
attention A_F V with respect to its values, so PyTorch's fused kernel can compute it.
Index letters everywhere: b batch, h head, i child (sender), j parent (receiver).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from attnlab.attention import attention_weights
from attnlab.dependency_pruning import Sending
from attnlab.kernels import check_inputs, fused_attention
from attnlab.layers import Mlp
from attnlab.probe import Probe

IMPLS = ("auto", "explicit", "two_pass", "fused")

# "auto" leaves the explicit form when all scores of a call, batch × heads × children × parents, are
# this many: about where they no longer fit into a CPU's cache, as {device: (form, scores)}.
# CPU: measured by benchmarks/reversed_attention.py. CUDA: not measured.
FASTER_FROM = {"cpu": ("two_pass", 8_000_000), "cuda": ("fused", 2**20)}
# On a CPU without gradients, from so many scores of the call on, if a head's fill a block.
INFERENCE_FROM = (2**21, 2**19)
BLOCK_SCORES = 2**19  # the two-pass form holds about this many scores of a head at once, but
SMALLEST_BLOCK = 16  # no fewer than those of this many children


def reversed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head_probs: Tensor,
    messages: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """What each parent receives: o_j = Σ_i A_F[i, j] P_i M_i v_i, with A_F[i] = softmax_j(q_i k_j).

    The softmax runs over the parents j: a child's message is shared out completely, and a parent
    may get anything from nothing to all. Hence Σ_j o_j = Σ_i P_i M_i v_i, whatever q and k are.

    Args:
        q: children's queries, `(B, heads, N, d)`.
        k: parents' keys, `(B, heads, M, d)`.
        v: children's values, `(B, heads, N, dv)`.
        head_probs: P, which share of a child's message goes through which head, `(B, heads, N)`.
        messages: M, how much each child sends, `(B, N)`.
        mask: Boolean, broadcastable to `(B, heads, N, M)`; True = this child may send there. A
            child that may send nowhere sends nothing.
        scale: factor of the scores; 1/√d by default.
        impl: "explicit" materialises A_F; "two_pass" a block of its rows at a time; "fused" lets
            PyTorch's kernel do it, as the derivative of attention with respect to its values;
            "auto" is the fastest for shape and device. The last three need no N×M
            matrix, forward or backward, and can be differentiated once.

    Returns:
        `(B, heads, M, dv)` in the dtype of `v`.

    Raises:
        ValueError: shapes, `mask` or `impl` do not fit.
        RuntimeError: a second derivative is asked of a form that has none.
    """
    _check(q, k, v, head_probs, messages, mask, impl)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    u = _sent(v, head_probs, messages)
    impl = _fastest(q, k, u) if impl == "auto" else impl
    if impl == "explicit":
        return _receive(attention_weights(q, k, mask=mask, scale=scale), u)
    return _reversed_attention(q, k, u, mask, scale, impl == "two_pass")


def reverse(weights: Tensor, head_probs: Tensor, messages: Tensor) -> Tensor:
    """A_R[h, j, i] = A_F[h, i, j] P[h, i] M[i]: `(B, heads, children, parents)` → the transpose.

    Column i of all heads together sums to M[i]. P is `(B, heads, children)`, M `(B, children)`.
    """
    return weights.mT * (head_probs * messages[:, None])[:, :, None, :]


def received_mass(q: Tensor, k: Tensor, head_probs: Tensor, messages: Tensor, **options) -> Tensor:
    """r_j = Σ_h Σ_i A_R[h, j, i], what each parent gets, self included: `(B, parents)`.

    Arguments as in `reversed_attention`; needs no matrix of weights unless `impl="explicit"`.
    """
    ones = torch.ones_like(q[..., :1])
    return reversed_attention(q, k, ones, head_probs, messages, **options)[..., 0].sum(1)


def _sent(v: Tensor, head_probs: Tensor, messages: Tensor) -> Tensor:
    """u_i = P_i M_i v_i, in the dtype of `v`."""
    return ((head_probs * messages[:, None])[..., None] * v).to(v.dtype)


def _receive(weights: Tensor, u: Tensor) -> Tensor:
    """o_j = Σ_i A_F[i, j] u_i."""
    return weights.to(u.dtype).mT @ u


@torch.library.custom_op("attnlab::reversed_attention", mutates_args=())
def _reversed_attention(
    q: Tensor, k: Tensor, u: Tensor, mask: Tensor | None, scale: float, two_pass: bool
) -> Tensor:
    """A_Fᵀ u. Fused: ⟨u, A_F V⟩ has the gradient A_Fᵀ u in V, at any V."""
    if two_pass:
        return _two_pass(q, k, u, mask, scale)
    with _autograd():
        q, k, u = (_leaf(x) for x in (q, k, u))
        values = u.new_zeros(*k.shape[:-1], u.shape[-1]).requires_grad_()
        (out,) = torch.autograd.grad(_attend(q, k, values, mask, scale), values, u)
        return out.contiguous()


@_reversed_attention.register_fake
def _(q, k, u, mask, scale, two_pass):
    return u.new_empty(*k.shape[:-1], u.shape[-1])


@torch.library.custom_op("attnlab::reversed_attention_backward", mutates_args=())
def _reversed_attention_backward(
    q: Tensor, k: Tensor, u: Tensor, mask: Tensor | None, scale: float, d_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """⟨G, A_Fᵀ u⟩ = ⟨A_F G, u⟩: du is attention to G, and dq, dk are its gradients under u."""
    with _autograd():
        q, k = _leaf(q).requires_grad_(), _leaf(k).requires_grad_()
        d_u = _attend(q, k, d_out, mask, scale)
        d_q, d_k = torch.autograd.grad(d_u, (q, k), u)
        return d_q.contiguous(), d_k.contiguous(), d_u.detach().contiguous()


@_reversed_attention_backward.register_fake
def _(q, k, u, mask, scale, d_out):
    return q.new_empty(q.shape), k.new_empty(k.shape), u.new_empty(u.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, d_out):
    q, k, u, mask = ctx.saved_tensors
    grads = _reversed_attention_backward(q, k, u, mask, ctx.scale, d_out.to(u.dtype))
    return *grads, None, None, None


def _no_second_derivative(ctx, *_):
    raise RuntimeError(
        "reversed_attention has one derivative in this form, because PyTorch's fused attention has "
        "no second: take impl='explicit' (in a model: set it on every ReversedAttention)"
    )


_reversed_attention.register_autograd(_backward, setup_context=_save)
_reversed_attention_backward.register_autograd(_no_second_derivative)


@contextmanager
def _autograd() -> Iterator[None]:
    """Autograd works inside. (In an operator, PyTorch has it off, one level below `no_grad`.)

    Nothing that surrounds the operator (checkpointing's hooks, inference mode) looks in.
    """
    off = torch._C._dispatch_tls_local_exclude_set()
    on = off - torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradCPU)  # that of every device
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), on),
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
    ):
        yield


def _leaf(x: Tensor) -> Tensor:
    """`x` without a past; a copy where autograd could not keep it."""
    return x.clone() if x.is_inference() else x.detach()


def _two_pass(q: Tensor, k: Tensor, u: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Per block of a head's children: L_i = log Σ_j exp S_ij, then o_j += Σ_i exp(S_ij − L_i) u_i.

    The first pass over the parents normalises a child's row; the second sends. Both see the same
    block of scores, `(block, M)`, so that the two together are one softmax.
    """
    B, heads, N, _ = q.shape
    M = k.shape[-2]
    block = max(SMALLEST_BLOCK, BLOCK_SCORES // M)
    mask = None if mask is None else mask.expand(B, heads, N, M)
    exact = u.to(torch.promote_types(u.dtype, torch.float32))
    out = exact.new_zeros(B, heads, M, u.shape[-1])
    for head in product(range(B), range(heads)):
        for start in range(0, N, block):
            children = slice(start, start + block)
            rows = None if mask is None else mask[head][children]
            weights = attention_weights(q[head][children], k[head], mask=rows, scale=scale)
            out[head].addmm_(weights.to(out.dtype).mT, exact[head][children])
    return out.to(u.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Fused attention, with values of another width cut into slices as wide as the queries.

    (PyTorch's CPU kernel would materialise the weights for them.)
    """
    d, dv = q.shape[-1], v.shape[-1]
    v = v if v.stride(-1) == 1 else v.contiguous()  # or it would be PyTorch's slow path
    if dv == d:
        return fused_attention(q, k, v, mask=mask, scale=scale).to(v.dtype)
    slices = F.pad(v, (0, -dv % d)).split(d, -1)
    outputs = [fused_attention(q, k, part, mask=mask, scale=scale) for part in slices]
    return torch.cat(outputs, -1)[..., :dv].to(v.dtype)


def _fastest(q: Tensor, k: Tensor, u: Tensor) -> str:
    """What `impl="auto"` is for tensors of these shapes on this device, in this grad mode."""
    form, least = FASTER_FROM["cuda" if q.is_cuda else "cpu"]
    head = q.shape[-2] * k.shape[-2]
    scores = math.prod(q.shape[:-2]) * head
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, u))
    if not (trains or q.is_cuda) and scores >= INFERENCE_FROM[0] and head >= INFERENCE_FROM[1]:
        return form
    return form if scores >= least else "explicit"


def _check_impl(impl: str) -> None:
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r}: expected one of {', '.join(IMPLS)}")


def _check(q, k, v, head_probs, messages, mask, impl) -> None:
    """`ValueError` when the arguments of `reversed_attention` do not fit together."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    fits = q.ndim == k.ndim == v.ndim == 4 and q.shape[:2] == k.shape[:2]
    if not fits or q.shape[-1] != k.shape[-1] or q.shape[:3] != v.shape[:3]:
        expected = "(B, heads, N, d), (B, heads, M, d), (B, heads, N, dv)"
        raise ValueError(f"{shapes}: expected {expected}, one value a child")
    B, heads, N, _ = q.shape
    if head_probs.shape != (B, heads, N):
        raise ValueError(f"head_probs {tuple(head_probs.shape)}: expected {(B, heads, N)}")
    if messages.shape != (B, N):
        raise ValueError(f"messages {tuple(messages.shape)}: expected {(B, N)}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask of dtype {mask.dtype}: expected bool (True = may send)")
    check_inputs(q, k, k, mask)
    _check_impl(impl)


def init_linear(module: nn.Module) -> None:
    """A linear map's weights become small, and its bias zero; nothing else changes."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class ReversedAttention(nn.Module):
    """Multi-head reversed attention with head selector P and message controller M (Sec. 3).

    P = softmax over heads of (W_P x / temperature); gate g = sigmoid(MLP(x)); M = g · the messages
    that come in. Both are computed at least in float32. The recorded map is A_R, `(B, heads, N, N)`
    with the row of token j telling what j receives from each child; columns sum to P M, rows to
    anything.

    Args:
        dim: width D of the tokens, a multiple of `num_heads`.
        num_heads, qkv_bias, proj_drop: as in `attnlab.attention.MultiHeadAttention`.
        controller_ratio: hidden width of the controller over `dim` (the public port has 0.5).
        temperature: τ of the head selector; 0.1 is nearly a hard choice from the start.
        gate_bias_init: last bias of the controller at the start; with 0 every gate is half shut.
        gate_exclusive: the gate acts from the next layer on (ours: in this one).
        mask_self: forbid a token to be its own parent.
        renorm: divide what head h brings to parent j by its received mass ("degree"), by the root
            of it ("sqrt"), or not ("none").
        impl: as in `reversed_attention`.

    Raises:
        ValueError: a number or an option is not as said.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        controller_ratio: float = 1.0,
        temperature: float = 0.1,
        gate_bias_init: float = 0.0,
        gate_exclusive: bool = False,
        mask_self: bool = False,
        renorm: str = "none",
        impl: str = "auto",
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim={dim}: expected a multiple of num_heads={num_heads}")
        if temperature <= 0:
            raise ValueError(f"temperature={temperature}: expected a number above 0")
        if int(controller_ratio * dim) < 1:
            raise ValueError(f"controller_ratio={controller_ratio}: expected at least 1/dim")
        if renorm not in ("none", "degree", "sqrt"):
            raise ValueError(f"renorm={renorm!r}: expected none, degree or sqrt")
        _check_impl(impl)
        self.num_heads = num_heads
        self.temperature = temperature
        self.gate_bias_init = gate_bias_init
        self.gate_exclusive = gate_exclusive
        self.mask_self = mask_self
        self.renorm = renorm
        self.impl = impl
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.selector = nn.Linear(dim, num_heads, bias=False)
        self.controller = Mlp(dim, int(controller_ratio * dim), 1)
        self.attn_probe = Probe()
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.init_weights()

    def init_weights(self) -> None:
        """Everything small, biases zero, and the gates as open as `gate_bias_init` says."""
        self.apply(init_linear)
        nn.init.constant_(self.controller.fc2.bias, self.gate_bias_init)

    def forward(
        self, x: Tensor, messages: Tensor | None = None, observe: bool = False
    ) -> tuple[Tensor, ...]:
        """Tokens `(B, N, D)`, and how much each may still send `(B, N)` → the same, one layer on.

        Args:
            messages: M of the layer before; 1 everywhere by default.
            observe: also return the `Sending` of this layer (materialises A_F).

        Raises:
            ValueError: `x` is not `(B, N, dim)`, or `messages` not `(B, N)`.
        """
        dim = self.proj.in_features
        if x.ndim != 3 or x.shape[-1] != dim:
            raise ValueError(f"x {tuple(x.shape)}: expected (B, N, dim={dim})")
        exact = torch.promote_types(x.dtype, torch.float32)
        messages = x.new_ones(x.shape[:2], dtype=exact) if messages is None else messages
        if messages.shape != x.shape[:2]:
            raise ValueError(f"messages {tuple(messages.shape)}: expected {tuple(x.shape[:2])}")
        q, k, v = rearrange(self.qkv(x), "b n (t h d) -> t b h n d", t=3, h=self.num_heads)
        selection = self.selector(x).to(exact) / self.temperature
        head_probs = rearrange(selection.softmax(-1), "b n h -> b h n")
        passed = messages * self.controller(x).to(exact).sigmoid().squeeze(-1)
        sent = messages if self.gate_exclusive else passed
        mask = ~torch.eye(x.shape[1], dtype=torch.bool, device=x.device) if self.mask_self else None
        if self.renorm != "none":
            v = F.pad(v, (0, 1), value=1.0)  # one more channel counts what arrives

        weights = None
        if observe or self.impl == "explicit":
            weights = attention_weights(q, k, mask=mask)  # A_F, (B, heads, children, parents)
        if self.impl == "explicit":
            out = self.attn_probe(reverse(weights, head_probs, sent)).to(v.dtype) @ v
        elif observe:
            out = _receive(weights, _sent(v, head_probs, sent))
        else:
            out = reversed_attention(q, k, v, head_probs, sent, mask=mask, impl=self.impl)

        if self.renorm != "none":
            out, mass = out[..., :-1], out[..., -1:].clamp_min(torch.finfo(out.dtype).tiny)
            out = out / (mass if self.renorm == "degree" else mass.sqrt())
        out = self.proj_drop(self.proj(rearrange(out, "b h n d -> b n (h d)")))
        return (out, passed, Sending(weights, head_probs, sent)) if observe else (out, passed)

    def dense_map(self, map: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """The recorded map is dense already: `(B, heads, parents, children)` → the same."""
        return map
