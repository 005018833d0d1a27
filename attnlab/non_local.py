"""Non-local blocks: one attention layer that can be put anywhere into a ConvNet (chapter 02).

Paper: Wang et al. 2018, "Non-local Neural Networks". The idea: the response at a position is a
weighted sum over all positions, y_i = 1/C(x) · Σ_j f(x_i, x_j) g(x_j), and is added to what was
there, z_i = W_z y_i + x_i, so that the block can start as the identity (Secs. 3.1 to 3.3).

What differs from the paper: keys are max-pooled before their embedding, as in the released code
(`pool="after"` is the text's order); the two kinds without a softmax divide by the number of keys
that are summed. The 1×1 convolutions are linear maps of tokens, so one state dict serves maps of
one, two and three dimensions. Two kinds never compare pairs in their fast form: the dot product is
re-associated, and the concatenation, which ranks the keys alike for every query, sorts them once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.attention import attention_weights
from attnlab.kernels import fused_attention, fused_is_faster
from attnlab.probe import Probe

SOFTMAX = ("gaussian", "embedded_gaussian")
KINDS = (*SOFTMAX, "dot_product", "concatenation")
IMPLS = ("auto", "explicit", "fused")

# Where "auto" leaves the explicit form, measured on one core: the number of scores N·M from which
# fused attention is as fast although it pads its values, and the N·M / (N + M) from which sorting
# the keys is (at half that it takes up to 1.5 times as long, at 2,048 a tenth).
PADDED_FROM = 2**23
SORTED_FROM = 256


def non_local_weights(
    theta: Tensor,
    phi: Tensor,
    kind: str = "embedded_gaussian",
    *,
    w_f: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """How much position i hears of position j: f(x_i, x_j) / C(x) (Wang et al., Eqs. 2 to 5).

    gaussian, embedded_gaussian: exp(scale · θ_i·φ_j), divided by its sum over the keys j.
    dot_product: θ_i·φ_j, divided by the number of keys M.
    concatenation: ReLU(w_f · [θ_i; φ_j]), divided by M.

    Args:
        theta: what position i compares, `(..., N, d)`; x itself for "gaussian".
        phi: what position j is compared by, `(..., M, d)`.
        kind: one of the four above.
        w_f: `(2d,)`, for "concatenation" only.
        scale: factor of the scores of the two softmax kinds; 1 in the paper.

    Returns:
        `(..., N, M)`. Rows sum to 1 in the softmax kinds; those of the dot product have signs.

    Raises:
        ValueError: an unknown `kind`; shapes, `w_f` or `scale` do not fit it.
    """
    _check(theta, phi, phi, kind, w_f, scale)
    if kind in SOFTMAX:
        return attention_weights(theta, phi, scale=scale)
    if kind == "dot_product":
        return theta @ phi.mT / phi.shape[-2]
    a, b = _score_terms(theta, phi, w_f)
    return F.relu(a[..., :, None] + b[..., None, :]) / phi.shape[-2]


def non_local(
    theta: Tensor,
    phi: Tensor,
    g: Tensor,
    kind: str = "embedded_gaussian",
    *,
    w_f: Tensor | None = None,
    scale: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """y_i = 1/C(x) · Σ_j f(x_i, x_j) g(x_j) (Wang et al., Eq. 1).

    Args:
        theta, phi, kind, w_f, scale: as in `non_local_weights`.
        g: what position j has to say, `(..., M, dv)`.
        impl: "explicit" materialises the `(N, M)` weights. "fused" does not: it is PyTorch's kernel
            for the softmax kinds (fast for 4-D tensors, `(B, 1, N, d)`), θ (φᵀ g) / M for the dot
            product, and sums over sorted keys for the concatenation; the last two are linear in
            N and M. "auto" is the faster of the two for the shape, device and grad mode.

    Returns:
        `(..., N, dv)`.

    Raises:
        ValueError: as in `non_local_weights`; `g` does not fit; unknown `impl`.
    """
    _check(theta, phi, g, kind, w_f, scale)
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r}: expected one of {', '.join(IMPLS)}")
    if impl == "explicit" or (impl == "auto" and not _fused_pays(theta, phi, g, kind)):
        return non_local_weights(theta, phi, kind, w_f=w_f, scale=scale).to(g.dtype) @ g
    if kind in SOFTMAX:
        return _softmax_of_any_width(theta, phi, g, scale)
    if kind == "dot_product":
        return theta @ (phi.mT @ g) / g.shape[-2]
    return _sum_over_sorted_keys(*_score_terms(theta, phi, w_f), g)


class NonLocalBlock(nn.Module):
    """z = x + norm(W_z y), with y the non-local mean of x (Wang et al., Sec. 3.3).

    `(B, C, L)`, `(B, C, H, W)` or `(B, C, T, H, W)` → the same shape. A fresh block is the
    identity, bit for bit: with norm="bn" because the norm's weight is 0 (and `z`'s is not: with
    both at 0 no gradient would ever reach them), without it because `z` is 0. 2C² + 4.5C parameters
    by default.

    State dicts of timm's `NonLocalAttn` (the equal block has `inter_channels` equal to the rows of
    its `t.weight` and `use_scale=C**-0.5`), of PySlowFast's `Nonlocal` (`use_scale=True` for its
    softmax) and of AlexHex7/Non-local_pytorch (`pool="after"`) load with `strict=True`.

    Args:
        channels: C.
        inter_channels: width of θ, φ and g; C // 2 by default (at least 1).
        kind: as in `non_local_weights`. "gaussian" compares x itself and has no θ and φ.
        ndim: 1, 2 or 3: the number of axes after the channels.
        subsample: max-pool the keys by 2, in space only when ndim is 3 (the outputs stay).
        pool: with `subsample`, pool x "before" its embedding by φ and g, or φ and g "after" it.
        use_scale: False: scores as they are (the paper). True: divided by the square root of the
            width that is compared (the authors' code). A number: multiplied by it.
        norm: "bn", or None for no norm.

    Attributes:
        impl: "auto", "explicit" or "fused", as in `non_local`.

    Raises:
        ValueError: an unknown option; sizes below 1; a scale for a kind without a softmax; an input
            of another shape, or too small to be sub-sampled.
    """

    def __init__(
        self,
        channels: int,
        inter_channels: int | None = None,
        kind: str = "embedded_gaussian",
        ndim: int = 2,
        subsample: bool = False,
        pool: str = "before",
        use_scale: bool | float = False,
        norm: str | None = "bn",
        impl: str = "auto",
    ):
        super().__init__()
        inter_channels = max(channels // 2, 1) if inter_channels is None else inter_channels
        for name, value, expected in (
            ("kind", kind, KINDS),
            ("ndim", ndim, (1, 2, 3)),
            ("pool", pool, ("before", "after")),
            ("norm", norm, ("bn", None)),
            ("impl", impl, IMPLS),
        ):
            if value not in expected:
                raise ValueError(f"{name}={value!r}: expected one of {expected}")
        if min(channels, inter_channels) < 1:
            raise ValueError(f"{channels=}, {inter_channels=}: expected both at least 1")
        if use_scale is not False and kind not in SOFTMAX:
            raise ValueError(f"{use_scale=}: expected False with {kind=}, which has no softmax")
        self.channels, self.kind, self.ndim, self.pool = channels, kind, ndim, pool
        self.impl = impl
        compared = channels if kind == "gaussian" else inter_channels
        default = compared**-0.5 if use_scale else 1.0
        self.scale = default if isinstance(use_scale, bool) else use_scale

        if kind != "gaussian":
            self.theta = nn.Linear(channels, inter_channels)
            self.phi = nn.Linear(channels, inter_channels)
        if kind == "concatenation":
            self.w_f = nn.Linear(2 * inter_channels, 1, bias=False)
        self.g = nn.Linear(channels, inter_channels)
        self.attn_probe = Probe()
        self.z = nn.Linear(inter_channels, channels)
        self.norm = nn.BatchNorm1d(channels) if norm else nn.Identity()
        pooling = {1: nn.MaxPool1d(2), 2: nn.MaxPool2d(2), 3: nn.MaxPool3d((1, 2, 2))}[ndim]
        self.subsample = pooling if subsample else nn.Identity()
        self.init_weights()
        self.register_load_state_dict_pre_hook(_convert)

    def init_weights(self) -> None:
        """The released code's: weights N(0, 0.01²), biases 0, and 0 for what makes the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        last = self.norm if isinstance(self.norm, nn.BatchNorm1d) else self.z
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, *space)` → the same shape, with `ndim` axes in space."""
        self._check_input(x)
        theta, phi, g = self._embed(x)  # (B, 1, N, d), (B, 1, M, d), (B, 1, M, Ci)
        f = {"w_f": self.w_f.weight[0]} if self.kind == "concatenation" else {"scale": self.scale}
        if self.impl == "explicit":
            weights = self.attn_probe(non_local_weights(theta, phi, self.kind, **f))
            y = weights.to(g.dtype) @ g
        else:
            y = non_local(theta, phi, g, self.kind, impl=self.impl, **f)
        z = self.z(y[:, 0]).mT.contiguous()  # (B, C, N): norms are slow on the transposed view
        return x + self.norm(z).view(x.shape)

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pooled = self.subsample(x) if self.pool == "before" else x
        queries = _tokens(x)
        keys = queries if pooled is x else _tokens(pooled)
        theta, phi = queries, keys
        if self.kind != "gaussian":
            theta, phi = self.theta(queries), self.phi(keys)
        g = self.g(keys)
        if self.pool == "after":
            phi, g = (_tokens(self.subsample(t.mT.unflatten(2, x.shape[2:]))) for t in (phi, g))
        return theta[:, None], phi[:, None], g[:, None]

    def _check_input(self, x: Tensor) -> None:
        if x.ndim != self.ndim + 2 or x.shape[1] != self.channels:
            axes = ("L", "H, W", "T, H, W")[self.ndim - 1]
            raise ValueError(f"x {tuple(x.shape)}: expected (B, {self.channels}, {axes})")
        subsampled = x.shape[2:][-2:]  # space
        if not isinstance(self.subsample, nn.Identity) and min(subsampled) < 2:
            raise ValueError(
                f"x {tuple(x.shape)}: expected at least 2 positions in every axis of space, which "
                "subsample=True halves"
            )

    def dense_map(self, map: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """The recorded map is dense already, `(B, 1, N, M)`; M < N where keys are sub-sampled."""
        return map


def _tokens(x: Tensor) -> Tensor:
    """`(B, C, *space)` → `(B, N, C)`, contiguous: one copy, not one in every product."""
    return x.flatten(2).mT.contiguous()


def _score_terms(theta: Tensor, phi: Tensor, w_f: Tensor) -> tuple[Tensor, Tensor]:
    """w_f · [θ_i; φ_j] = a_i + b_j: `(..., N)` and `(..., M)`, at least float32.

    The `(2d, N, M)` tensor of all pairs is never needed: before the ReLU its scores have rank 2.
    """
    w_theta, w_phi = w_f.chunk(2)
    a, b = theta @ w_theta, phi @ w_phi
    dtype = torch.promote_types(a.dtype, torch.float32)
    return a.to(dtype), b.to(dtype)


def _sum_over_sorted_keys(a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    """1/M · Σ_j ReLU(a_i + b_j) g_j in O((N + M)·dv + M·log M): a `(..., N)`, b `(..., M)`.

    Query i hears the keys with b_j > −a_i. Sorted by b, largest first, these are the first n_i
    keys: y_i = a_i · Σ g_j + Σ b_j g_j over a prefix, and cumulative sums hold it for every n.
    """
    b, order = b.sort(dim=-1, descending=True)
    sorted_g = g.to(b.dtype).gather(-2, order[..., None].expand(g.shape))
    sums = torch.cat([sorted_g, b[..., None] * sorted_g], dim=-1).cumsum(-2)
    sums = F.pad(sums, (0, 0, 1, 0))  # of no key: 0
    heard = torch.searchsorted(-b.detach(), a.detach())  # n_i, the number of keys with −b_j < a_i
    sum_g, sum_bg = sums.gather(-2, heard[..., None].expand(*a.shape, sums.shape[-1])).chunk(2, -1)
    return ((a[..., None] * sum_g + sum_bg) / b.shape[-1]).to(g.dtype)


def _softmax_of_any_width(theta: Tensor, phi: Tensor, g: Tensor, scale: float) -> Tensor:
    """Fused attention; zeros make all three equally wide, or the CPU would store the weights."""
    width = max(theta.shape[-1], g.shape[-1])
    if theta.is_cuda or theta.shape[-1] == g.shape[-1]:
        return fused_attention(theta, phi, g, scale=scale)
    q, k, v = (F.pad(t, (0, width - t.shape[-1])) for t in (theta, phi, g))
    return fused_attention(q, k, v, scale=scale)[..., : g.shape[-1]]


def _fused_pays(theta: Tensor, phi: Tensor, g: Tensor, kind: str) -> bool:
    """Whether "auto" takes the fused form: by arithmetic for the dot product, else as measured."""
    (N, d), (M, dv) = theta.shape[-2:], g.shape[-2:]
    if kind == "dot_product":
        return N * M * (d + dv) > (N + M) * d * dv
    if kind == "concatenation":
        return N * M > SORTED_FROM * (N + M)
    if theta.is_cuda or d == dv:
        return fused_is_faster(theta, phi, g)
    return N * M >= PADDED_FROM


def _check(theta: Tensor, phi: Tensor, g: Tensor, kind: str, w_f: Tensor | None, scale: float):
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(KINDS)}")
    shapes = f"theta {tuple(theta.shape)}, phi {tuple(phi.shape)}, g {tuple(g.shape)}"
    if min(theta.ndim, phi.ndim, g.ndim) < 2 or not (
        theta.shape[:-2] == phi.shape[:-2] == g.shape[:-2]
        and theta.shape[-1] == phi.shape[-1]
        and phi.shape[-2] == g.shape[-2] > 0
    ):
        raise ValueError(f"{shapes}: expected (..., N, d), (..., M, d), (..., M, dv)")
    if (w_f is not None) != (kind == "concatenation"):
        given = "None" if w_f is None else f"of shape {tuple(w_f.shape)}"
        raise ValueError(f"w_f {given} with {kind=}: expected (2d,) with concatenation alone")
    if w_f is not None and w_f.shape != (2 * theta.shape[-1],):
        raise ValueError(f"w_f {tuple(w_f.shape)}: expected ({2 * theta.shape[-1]},)")
    if scale != 1.0 and kind not in SOFTMAX:
        raise ValueError(f"{scale=}: expected 1 with {kind=}, which has no softmax")


# Their names → ours: timm, PySlowFast, AlexHex7 (whose modules are wrapped where keys are pooled).
_NAMES = {
    "t": "theta", "p": "phi",
    "conv_theta": "theta", "conv_phi": "phi", "conv_g": "g", "conv_out": "z",
    "phi.0": "phi", "g.0": "g", "W": "z", "W.0": "z", "W.1": "norm", "concat_project.0": "w_f",
}  # fmt: skip


def _convert(module, state_dict, prefix, *_) -> None:
    """Before loading: rename the entries of other codes in place, 1×1 kernels as matrices."""
    for key in [key for key in state_dict if key.startswith(prefix)]:
        owner, _, leaf = key.removeprefix(prefix).rpartition(".")
        value = state_dict.pop(key)
        name = f"{prefix}{_NAMES.get(owner, owner)}.{leaf}"
        state_dict[name] = value.flatten(1) if value.ndim > 2 else value
