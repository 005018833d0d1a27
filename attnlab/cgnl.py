"""Compact generalised non-local attention: every channel of every position meets every other.

Paper: Yue et al. 2018, "Compact Generalized Non-local Network" (arXiv 1810.13125). The idea: a
non-local block compares positions, one number for each pair of them; the generalised one compares
*elements*, a channel at a position, by a kernel of two scalars. That matrix has (channels ×
positions)² entries. A kernel that is a sum of P + 1 products, k(t, p) = Σ a_k tᵏ pᵏ, needs none of
them: y = Tᵀ(F v) in place of (Tᵀ F) v, linear in the number of elements.

Notation: `theta`, `phi`, `g` hold the n = channels · positions elements of a group in the last
axis; K_ij = k(theta_i, phi_j) and y = K g. The rows of K are not normalised.

What differs from the paper: equations and defaults follow its authors' PyTorch code (groups = 8,
GroupNorm with as many groups, a constant for β), where two consequences are worth knowing:
- with the dot-product kernel and norm="gn", only the sign of a group's sum φ·g is left behind the
  norm. `norm_groups` below `groups`, "bn" or "none" keep its size;
- with kernel="rbf" and gamma=1e-4 the constant term of the series outweighs the others by orders
  of magnitude. `include_constant=False`, or gamma near 1, lets them speak.
Exact β, the choice of terms, rows that sum to 1, and the norms other than "gn" are ours.
"""

import math
import re

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from attnlab.probe import Probe

IMPLS = ("auto", "explicit", "fused")
EXPLICIT_ELEMENTS = 8192  # above it a group's matrix would take more than 256 MiB in float32
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
OFFICIAL = {"t": "theta", "p": "phi", "g": "g", "z": "out", "gn": "norm"}


def dot_kernel(theta: Tensor, phi: Tensor) -> Tensor:
    """K_ij = theta_i · phi_j, a matrix of rank 1: `(..., n)`, `(..., m)` → `(..., n, m)`."""
    return theta.unsqueeze(-1) * phi.unsqueeze(-2)


def rbf_kernel(theta: Tensor, phi: Tensor, gamma: float) -> Tensor:
    """K_ij = exp(−γ (theta_i − phi_j)²): `(..., n)`, `(..., m)` → `(..., n, m)`."""
    return torch.exp(-gamma * (theta.unsqueeze(-1) - phi.unsqueeze(-2)).square())


def taylor_coefficients(gamma: float, order: int, include_constant: bool = True) -> list[float]:
    """a_k = (2γ)ᵏ / k! for k = 0 … order: the series of exp(2γ t p) in t p (paper, Sec. 3.3).

    `order=3` means four terms. Without the constant, a_0 is 0.

    Raises:
        ValueError: `gamma` is not above 0, or `order` is not an integer ≥ 0.
    """
    if not gamma > 0:
        raise ValueError(f"gamma={gamma}: expected a number above 0")
    if not isinstance(order, int) or order < 0:
        raise ValueError(f"order={order!r}: expected an integer of at least 0")
    coefficients = [(2 * gamma) ** k / math.factorial(k) for k in range(order + 1)]
    return coefficients if include_constant else [0.0, *coefficients[1:]]


def taylor_kernel(
    theta: Tensor,
    phi: Tensor,
    *,
    gamma: float,
    order: int,
    beta: str = "const",
    include_constant: bool = True,
    normalize: bool = False,
) -> Tensor:
    """K_ij = β Σ_k a_k (theta_i phi_j)ᵏ, what `cgnl_rbf` computes with; of rank order + 1 at most.

    exp(−γ (t − p)²) = exp(−γ t²) exp(−γ p²) exp(2γ t p), and only the last factor is expanded.

    Args:
        theta, phi: `(..., n)`, `(..., m)`.
        gamma: γ > 0.
        order: highest power P.
        beta: "exact" keeps the first two factors, so that K → `rbf_kernel` as the order grows;
            "const" puts exp(−2γ) in their place (the authors' code), so that
            K → exp(−2γ) exp(2γ t p), which is no function of the distance and has no bound.
        include_constant: False leaves out the term k = 0.
        normalize: divide each row by its sum. Of an odd order, a sum can be 0 or negative: such
            rows become 0. Not in the paper.

    Returns:
        `(..., n, m)`.

    Raises:
        ValueError: a bad option; `normalize` without the constant.
    """
    _check_options(beta, include_constant, normalize)
    product = dot_kernel(theta, phi)
    *lower, highest = taylor_coefficients(gamma, order, include_constant)
    series = torch.full_like(product, highest)
    for a in reversed(lower):
        series = a + product * series
    if beta == "const":
        weights = math.exp(-2 * gamma) * series
    else:
        weights = series * dot_kernel(*(torch.exp(-gamma * x.square()) for x in (theta, phi)))
    return weights / _divisors(weights.sum(-1, keepdim=True)) if normalize else weights


def taylor_error_bound(z: float | Tensor, order: int) -> Tensor:
    """Q_P(z) = 1 − e⁻ᶻ Σ_{k≤P} zᵏ/k!: how far `taylor_kernel` with exact β is from `rbf_kernel`.

    For |t| ≤ R_t, |p| ≤ R_p and z = 2γ R_t R_p the difference is never larger, and as large at
    t = p = ±R when R_t = R_p = R. (Q_P(z) is also the chance that a Poisson(z) number exceeds P.)
    With β = "const", against exp(−2γ) exp(2γ t p), the bound is exp(z − 2γ) Q_P(z).
    The output's error is at most that times Σ |g_j|.
    """
    z = torch.as_tensor(z, dtype=torch.float64)
    return torch.special.gammainc(torch.full_like(z, order + 1), z)


def cgnl_dot(
    theta: Tensor, phi: Tensor, g: Tensor, *, scale: float = 1.0, impl: str = "auto"
) -> Tensor:
    """y_i = theta_i · Σ_j phi_j g_j: generalised non-local attention with k(t, p) = t p.

    Args:
        theta: `(..., n)`.
        phi, g: `(..., m)`; in the block m = n, and the leading axes are (B, groups).
        scale: factor of the sum.
        impl: "explicit" builds the `(..., n, m)` kernel matrix; "fused" one sum for a group;
            "auto" is "fused".

    Returns:
        `(..., n)` in the dtype of `g`; the sum is taken in float32 or above.

    Raises:
        ValueError: the shapes do not fit, unknown `impl`, or too many elements for "explicit".
    """
    _check_inputs(theta, phi, g, impl)
    dtype = g.dtype
    theta, phi, g = _at_least_float32(theta, phi, g)
    if impl == "explicit":
        y = scale * _apply(dot_kernel(theta, phi), g)
    else:
        y = theta * (scale * (phi * g).sum(-1, keepdim=True))
    return y.to(dtype)


def cgnl_rbf(
    theta: Tensor,
    phi: Tensor,
    g: Tensor,
    *,
    gamma: float = 1e-4,
    order: int = 3,
    beta: str = "const",
    include_constant: bool = True,
    normalize: bool = False,
    scale: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """y_i = Σ_j k(theta_i, phi_j) g_j with the Taylor series of the Gaussian kernel.

    Fused: y_i = Σ_k theta_iᵏ c_k with the moments c_k = a_k Σ_j phi_jᵏ g_j, P + 1 sums for a group.

    Args:
        theta, phi, g, scale, impl: as in `cgnl_dot`.
        gamma, order, beta, include_constant, normalize: as in `taylor_kernel`. A row's sum is the
            same computation with g = 1.

    Returns:
        `(..., n)` in the dtype of `g`; the sums are taken in float32 or above.

    Raises:
        ValueError: as in `cgnl_dot` and `taylor_kernel`.
    """
    _check_inputs(theta, phi, g, impl)
    _check_options(beta, include_constant, normalize)
    coefficients = taylor_coefficients(gamma, order, include_constant)
    dtype = g.dtype
    theta, phi, g = _at_least_float32(theta, phi, g)
    if impl == "explicit":
        weights = taylor_kernel(
            theta, phi, gamma=gamma, order=order, beta=beta, include_constant=include_constant,
            normalize=normalize,
        )  # fmt: skip
        return (scale * _apply(weights, g)).to(dtype)

    ones = torch.ones_like(g)
    if beta == "exact":
        ones = torch.exp(-gamma * phi.square())
        g = ones * g
    y = _polynomial(theta, _moments(phi, g, coefficients))
    if normalize:  # β's factor of theta_i, or the constant, is in y_i and in its divisor
        y = y / _divisors(_polynomial(theta, _moments(phi, ones, coefficients)))
    elif beta == "exact":
        y = y * torch.exp(-gamma * theta.square())
    else:
        y = math.exp(-2 * gamma) * y
    return (scale * y).to(dtype)


class CGNLBlock(nn.Module):
    """x + norm(W_z · cgnl(θ(x), φ(x), g(x))), in `groups` groups of channels (paper, Sec. 3).

    θ, φ, g are 1×1 convolutions to `inter_channels`, W_z (`out`) a grouped one back, all without
    bias. Feature maps `(B, C, H, W)` → the same, `(B, C, T, H, W)` for `ndim=3`, `(B, C, N)` for
    `ndim=1`. A fresh block is the identity: the norm's weight, or W_z without a norm, is zero.
    3·C·Ci + Ci·C/groups parameters, and 2·C with a norm.

    State dicts of the authors' block (`t, p, g, z, gn`, also under `module.`) load with
    `strict=True`; for their whole ResNets see `from_official_resnet`.

    `attnlab.record` gives the kernel matrix, `(B, groups, n, n)`: entry (i, j) is how much element
    i takes from element j, and element c · positions + position is channel c of the group at that
    position. It has n² entries, so it is for small maps.

    Args:
        channels: C.
        inter_channels: Ci, C // 2 by default.
        groups: of channels, each with a kernel matrix of its own; n = Ci / groups · positions.
        kernel: "dot" or "rbf".
        gamma, order, beta, include_constant, normalize: of kernel="rbf", see `taylor_kernel`.
        use_scale: divide the sums by √n.
        norm: "gn", "bn" or "none".
        norm_groups: groups of the GroupNorm; `groups` by default.
        ndim: number of axes of positions.
        impl: "auto" (the same as "fused"), "explicit" or "fused", as in `cgnl_dot`.

    Raises:
        ValueError: `channels` or `inter_channels` not a multiple of the groups; a bad option.
    """

    def __init__(
        self,
        channels: int,
        inter_channels: int | None = None,
        groups: int = 8,
        kernel: str = "dot",
        order: int = 3,
        use_scale: bool = False,
        norm: str = "gn",
        gamma: float = 1e-4,
        beta: str = "const",
        include_constant: bool = True,
        normalize: bool = False,
        norm_groups: int | None = None,
        ndim: int = 2,
        impl: str = "auto",
    ):
        super().__init__()
        inter_channels = channels // 2 if inter_channels is None else inter_channels
        norm_groups = groups if norm_groups is None else norm_groups
        for name, width, parts in (
            ("inter_channels", inter_channels, groups),
            ("channels", channels, groups),
            ("channels", channels, norm_groups),
        ):
            if width < 1 or parts < 1 or width % parts:
                what = "groups" if parts == groups else "norm_groups"
                raise ValueError(f"{name}={width}: expected a multiple of {what}={parts}")
        for name, value, known in (
            ("kernel", kernel, ("dot", "rbf")),
            ("norm", norm, ("gn", "bn", "none")),
            ("ndim", ndim, (1, 2, 3)),
            ("impl", impl, IMPLS),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(str, known))}")
        if kernel == "dot" and normalize:
            raise ValueError("normalize=True: expected kernel='rbf'; rows of t p can sum to 0")
        _check_options(beta, include_constant, normalize)
        taylor_coefficients(gamma, order)

        self.groups, self.kernel, self.ndim, self.impl = groups, kernel, ndim, impl
        self.use_scale = use_scale
        self.series = {
            "gamma": gamma, "order": order, "beta": beta, "include_constant": include_constant,
            "normalize": normalize,
        }  # fmt: skip
        conv = CONVS[ndim]
        self.theta = conv(channels, inter_channels, 1, bias=False)
        self.phi = conv(channels, inter_channels, 1, bias=False)
        self.g = conv(channels, inter_channels, 1, bias=False)
        self.attn_probe = Probe()
        self.out = conv(inter_channels, channels, 1, groups=groups, bias=False)
        self.norm = {
            "gn": lambda: nn.GroupNorm(norm_groups, channels),
            "bn": lambda: NORMS[ndim](channels),
            "none": nn.Identity,
        }[norm]()
        self.init_weights()
        self.register_load_state_dict_pre_hook(_convert_official)

    def init_weights(self) -> None:
        """The authors' initialisation: N(0, 0.01²), and the last thing of the branch is zero."""
        for conv in (self.theta, self.phi, self.g, self.out):
            nn.init.normal_(conv.weight, std=0.01)
        nn.init.zeros_(self.out.weight if isinstance(self.norm, nn.Identity) else self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` → the same; other numbers of axes as `ndim` says.

        Raises:
            ValueError: `x` has another shape, or too many elements for impl="explicit".
        """
        self._check(x)
        theta, phi, g = self._project(x)
        scale = theta.shape[-1] ** -0.5 if self.use_scale else 1.0
        if self.impl == "explicit":
            _check_inputs(theta, phi, g, self.impl)
            weights = self.attn_probe(self._weights(*_at_least_float32(theta, phi)))
            y = (scale * _apply(weights, g)).to(g.dtype)
        elif self.kernel == "dot":
            y = cgnl_dot(theta, phi, g, scale=scale, impl=self.impl)
        else:
            y = cgnl_rbf(theta, phi, g, **self.series, scale=scale, impl=self.impl)
        return x + self.norm(self.out(y.reshape(len(x), -1, *x.shape[2:])))

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """θ(x), φ(x), g(x) in one convolution, each `(B, groups, n)`."""
        weight = torch.cat([self.theta.weight, self.phi.weight, self.g.weight])
        maps = F.conv1d(x.flatten(2), weight.flatten(2))  # (B, 3·Ci, positions)
        return tuple(
            rearrange(part, "b (g c) n -> b g (c n)", g=self.groups) for part in maps.chunk(3, 1)
        )

    def _weights(self, theta: Tensor, phi: Tensor) -> Tensor:
        if self.kernel == "dot":
            return dot_kernel(theta, phi)
        return taylor_kernel(theta, phi, **self.series)

    def dense_map(self, map: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """Recorded `(B, groups, n, n)` → `(B, groups, positions, positions)`.

        Entry (i, j) is the sum over all pairs of the group's channels: how much the group's
        channels at position i, summed, take from position j if g is the same in all of them.
        """
        channels = self.theta.out_channels // self.groups
        pattern = "b g (c1 q) (c2 k) -> b g q k"
        return reduce(map, pattern, "sum", c1=channels, c2=channels)

    def _check(self, x: Tensor) -> None:
        channels = self.theta.in_channels
        if x.ndim != 2 + self.ndim or x.shape[1] != channels or 0 in x.shape:
            axes = {1: "N", 2: "H, W", 3: "T, H, W"}[self.ndim]
            raise ValueError(f"x {tuple(x.shape)}: expected (B, {channels}, {axes})")


def from_official_resnet(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the authors' ResNet with CGNL blocks, in the names of `attnlab.resnet`.

    There a block is an element of its stage (`layer3.5` in a ResNet-50), and the later residual
    blocks move up by one; here it follows a residual block (`layer3.4.after`), as in
    `resnet50(after={"layer3.4": CGNLBlock})`. A leading `module.` (DataParallel) is dropped.

    Raises:
        ValueError: there is no CGNL block, or one that follows no residual block.
    """
    state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    blocks = [re.fullmatch(r"(layer\d)\.(\d+)\.gn\.weight", key) for key in state_dict]
    places = {(match[1], int(match[2])) for match in blocks if match}
    if not places:
        raise ValueError(f"state_dict with {len(state_dict)} keys: expected layerI.J.gn.weight")
    converted = {}
    for key, value in state_dict.items():
        match = re.fullmatch(r"(layer\d)\.(\d+)\.(.+)", key)
        if match:
            stage, number, rest = match[1], int(match[2]), match[3]
            before = sum(place < number for layer, place in places if layer == stage)
            if (stage, number) in places:
                if number == 0 or (stage, number - 1) in places:
                    raise ValueError(f"{key}: expected a residual block before the CGNL block")
                name, _, parameter = rest.partition(".")
                rest = f"after.{OFFICIAL[name]}.{parameter}"
                before += 1
            key = f"{stage}.{number - before}.{rest}"
        converted[key] = value
    return converted


def _convert_official(module: CGNLBlock, state_dict: dict, prefix: str, *_) -> None:
    """Rename the authors' `t, p, g, z, gn` to ours, in place, before the state dict is loaded."""
    for start in (prefix, f"{prefix}module."):
        if f"{start}t.weight" not in state_dict:
            continue
        for key in [key for key in state_dict if key.startswith(start)]:
            name, dot, parameter = key.removeprefix(start).partition(".")
            if name in OFFICIAL:
                state_dict[f"{prefix}{OFFICIAL[name]}{dot}{parameter}"] = state_dict.pop(key)


def _moments(phi: Tensor, g: Tensor, coefficients: list[float]) -> list[Tensor]:
    """c_k = a_k Σ_j phi_jᵏ g_j, each `(..., 1)`."""
    moments = []
    for k, a in enumerate(coefficients):
        g = g * phi if k else g
        moments.append(a * g.sum(-1, keepdim=True))
    return moments


def _polynomial(theta: Tensor, moments: list[Tensor]) -> Tensor:
    """Σ_k c_k theta_iᵏ by Horner's scheme, `(..., n)`."""
    *lower, highest = moments
    y = highest.expand_as(theta)
    for c in reversed(lower):
        y = c + theta * y
    return y


def _apply(weights: Tensor, g: Tensor) -> Tensor:
    """Σ_j K_ij g_j without a matrix product, which autocast would compute in half precision."""
    return (weights * g.to(weights.dtype).unsqueeze(-2)).sum(-1)


def _divisors(sums: Tensor) -> Tensor:
    """The sums of rows; infinity, so that the row becomes 0, where one is not above zero."""
    return sums.masked_fill(sums <= 0, math.inf)


def _at_least_float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)


def _check_inputs(theta: Tensor, phi: Tensor, g: Tensor, impl: str) -> None:
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r}: expected one of {', '.join(IMPLS)}")
    shapes = f"theta {tuple(theta.shape)}, phi {tuple(phi.shape)}, g {tuple(g.shape)}"
    fits = min(theta.ndim, phi.ndim) > 0 and theta.shape[:-1] == phi.shape[:-1]
    if not fits or phi.shape != g.shape or phi.shape[-1] == 0:
        raise ValueError(f"{shapes}: expected (..., n), (..., m), (..., m) with m ≥ 1")
    if impl == "explicit" and max(theta.shape[-1], phi.shape[-1]) > EXPLICIT_ELEMENTS:
        limit = f"at most {EXPLICIT_ELEMENTS} elements with impl='explicit' (and under record)"
        raise ValueError(f"{shapes}: expected {limit}")


def _check_options(beta: str, include_constant: bool, normalize: bool) -> None:
    if beta not in ("const", "exact"):
        raise ValueError(f"beta={beta!r}: expected one of const, exact")
    if normalize and not include_constant:
        raise ValueError("include_constant=False: expected True with normalize=True")
