# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown] slideshow={"slide_type": "slide"}
# # 06 · Compact generalised non-local attention
#
# **At the end you can** let every channel of every position attend to every other one, re-bracket
# that until its cost is linear, say what a Taylor series of given length gets wrong, and tell by
# measurement what of it a trained network can use.
#
# | | |
# |---|---|
# | to read | 55 minutes, exercises another 30 |
# | to run | about a minute on two CPU cores |
# | you need | chapter 02 (non-local blocks), the channel gates of chapter 03, chapter 05's duals |
# | paper | Yue et al. 2018, *Compact generalized non-local network* (CGNL) |

# %% slideshow={"slide_type": "skip"}
import math
from functools import partial

import matplotlib.pyplot as plt
import torch
from einops import einsum, rearrange, reduce
from torch.nn import functional as F
from torch.testing import assert_close

import attnlab
from attnlab import lab
from attnlab.attention import attention_weights
from attnlab.cgnl import (
    CGNLBlock,
    cgnl_dot,
    cgnl_rbf,
    dot_kernel,
    rbf_kernel,
    taylor_error_bound,
    taylor_kernel,
)
from attnlab.lab import cost, plots
from attnlab.lab.experiments import ch06
from attnlab.non_local import NonLocalBlock

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 1 · The failure
#
# A colour photograph of 1910 was three glass plates, exposed one after the other through three
# filters. They never match quite: here the red plate has slipped six pixels to the left and the
# blue one six to the right. To mend it, each pixel has to fetch its red from six places to
# the left, its blue from six to the right, its green from where it is: **another place for each
# channel**.
#
# A non-local block says with *one number* how much position $i$ takes from position $j$: all
# channels of $j$ come along. Channel attention has one number for each pair of channels, at every
# position the same. Let each kind have the best constants there are, by least squares, with the
# 17 pixels of a row around a pixel to choose from.
#
# **Before you run it:** which of them mends the picture: one number for each pair of places, one
# for each pair of channels, or one for each pair of (channel, place)?


# %% slideshow={"slide_type": "fragment"}
device = lab.device()
photo = lab.data.photo("coffee")
photo = F.interpolate(photo[None], size=(120, 184), antialias=True, mode="bicubic")[0].clamp(0, 1)
red, green, blue = photo.double()
plates = torch.stack([red.roll(-6, dims=-1), green, blue.roll(6, dims=-1)])  # (3, H, W)

seen = plates.unfold(-1, 17, 1)[:, :, 8:-8]  # (3 channels, H, W − 32, 17 pixels of the row)
wanted = photo.double()[:, :, 16:-16]  # (3, H, W − 32), away from where the rolled edges are
print("one pixel sees", tuple(seen[:, 0, 0].shape), "and wants", tuple(wanted[:, 0, 0].shape))

# %% slideshow={"slide_type": "fragment"}
size = dict(zip("chw", wanted.shape, strict=True))
splits = {  # sample: what each number of the answer may be made of, and what it should be
    "pairs of places": ("c h w o -> (c h w) o", "c h w -> (c h w) 1"),
    "pairs of channels": ("c h w o -> (h w) (o c)", "c h w -> (h w) c"),
    "pairs of (channel, place)": ("c h w o -> (h w) (o c)", "c h w -> (h w) c"),
}
mended = {}
for name, (of_inputs, of_outputs) in splits.items():
    sight = seen[..., 8:9] if name == "pairs of channels" else seen  # its own place only, or 17
    inputs, outputs = rearrange(sight, of_inputs), rearrange(wanted, of_outputs)
    table = torch.linalg.lstsq(inputs, outputs).solution  # the best constants
    undo = " -> ".join(reversed(of_outputs.split(" -> ")))
    mended[name] = rearrange(inputs @ table, undo, **size)

# %% slideshow={"slide_type": "fragment"}
pictures = {"three plates": seen[..., 8], **mended}
errors = {name: (y - wanted).square().mean().sqrt().item() for name, y in pictures.items()}
titles = [f"{name}\nerror {error:.3f}" for name, error in errors.items()]
plots.show_images([y.clamp(0, 1).float() for y in pictures.values()], titles, columns=4, size=1.9)
plt.show()
lab.claim("one number for a pair of places leaves more than half of the error",
          errors["pairs of places"] / errors["three plates"], above=0.5)  # fmt: skip
lab.claim("so does one for a pair of channels",
          errors["pairs of channels"] / errors["three plates"], above=0.5)  # fmt: skip
lab.claim("one for a pair of (channel, place) leaves none",
          errors["pairs of (channel, place)"], below=1e-6)  # fmt: skip

# %% [markdown] slideshow={"slide_type": "subslide"}
# Could both together do it, places first and channels afterwards, as a non-local block does with
# its $W_g$ and $W_z$? Write the mending as a table: 9 pairs of channels down, 17 places
# across. "A number for the places times a number for the channels" fills such a table with an outer
# product, of rank 1. How many of those does it take?

# %% slideshow={"slide_type": "fragment"}
pairs = rearrange(table, "(o c) d -> (d c) o", c=3)  # (9 pairs of channels, 17 places)
strengths = torch.linalg.svdvals(pairs)
print("singular values", [round(value, 3) for value in strengths[:5].tolist()])
lab.claim("the table of the mending has three equal singular values",
          (strengths[:3] - 1).abs().max().item(), below=1e-4)  # fmt: skip
lab.claim("and no fourth", strengths[3].item(), below=1e-4)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Three, all of the same size: one for each plate. A block with one number for each pair of places
# gets a third of it. (These were constants. Attention computes its numbers from the content, other
# ones for other pixels; but each of them still moves all channels of a place at once.)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 2 · The idea in one picture
#
# Call a channel at a position an **element**: a map of $C$ channels and $N$ positions has $CN$ of
# them, each a single number. *Generalised* non-local attention lets every element attend to
# every element. That is a matrix of $CN \times CN$, and nobody can afford it: for 512 channels on
# 14×14 positions it has ten billion entries. *Compact* means that the matrix is a product of two thin
# ones, and is never built.
#
# Drawn to scale, for 4 channels on 9 positions (the thin ones up to constant factors; each has colours
# of its own):

# %% slideshow={"slide_type": "fragment"}
generator = torch.Generator().manual_seed(0)
maps = torch.randn(2, 4, 9, generator=generator).tanh()  # theta and phi, (4 channels, 9 positions)
theta, phi = maps.flatten(1)  # (36,) each: all elements in a row
powers = torch.arange(4)[:, None]
thin = [theta**powers, phi**powers]  # (4, 36): the powers 0 to 3 of every element
matrices = {
    "non-local\n9 × 9": attention_weights(maps[0].T, maps[1].T),
    "generalised\n36 × 36": taylor_kernel(theta, phi, gamma=0.5, order=3),
    "compact\n36 × 4": thin[0].T,
    "and\n4 × 36": thin[1],
}
with plots.style():
    figure, ax = plt.subplots(figsize=(9, 3.4))
x = 0
for title, matrix in matrices.items():
    rows, columns = matrix.shape
    ax.imshow(matrix, extent=(x, x + columns, -rows, 0))
    ax.text(x + columns / 2, 1.5, title, ha="center")
    x += columns + 9
ax.set(xlim=(-1, x), ylim=(-37, 8), aspect="equal")
ax.axis("off")
plt.show()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 3 · The mathematics, with shapes
#
# Three 1×1 convolutions of the map, without bias, give $\Theta$, $\Phi$ and $G$. Their channels are
# cut into $G_n$ groups, and everything happens inside a group of $C_g = C_i / G_n$ channels. Flattened,
# a group is a vector of $n = C_g N$ elements:
#
# $$y_i = \sum_j k(\theta_i, \phi_j)\, g_j \qquad\text{or}\qquad y = K g$$
#
# | symbol | shape | what it is |
# |---|---|---|
# | $X$ | $(C, N)$ | the map; $N = H W$, or $T H W$ for a clip |
# | $\Theta, \Phi, G$ | $(C_i, N)$ | three embeddings, $C_i = C/2$ |
# | $\theta, \phi, g$ | $(n)$ | one group of each, all its channels and positions in a row |
# | $k(t, p)$ | a number | kernel of two **numbers**, no vectors any more |
# | $K$ | $(n, n)$ | one number for each pair of elements; its rows are **not** normalised |
# | $y$ | $(n)$ | the group's output; $Y$, $(C_i, N)$, is that of all groups together |
# | $W_z$ | $(C, C_i / G_n)$ | a 1×1 convolution in $G_n$ groups |
# | $Z$ | $(C, N)$ | $X + \operatorname{GroupNorm}(W_z Y)$ |
#
# **The dot-product kernel**, $k(t, p) = t p$, makes $K = \theta \phi^\top$: an outer product. Matrix
# products may be bracketed as one likes:
#
# $$(\theta \phi^\top)\, g \;=\; \theta\, (\phi^\top g) \;=\; s\, \theta, \qquad s = \sum_j \phi_j g_j$$
#
# The left one needs $n^2$ products for the matrix and $n^2$ to apply it; the right one $2n$ in all. And
# the right one says plainly what happens: *one number per group*, $s$, is gathered over all
# channels and positions, and multiplies $\theta$.
#
# Take a pencil first: $\theta = (1, 2)$, $\phi = (1, -1)$, $g = (3, 1)$. Compute $y$ both ways.

# %% slideshow={"slide_type": "fragment"}
theta, phi, g = torch.tensor([[1.0, 2.0], [1.0, -1.0], [3.0, 1.0]])
print("K =", dot_kernel(theta, phi).tolist(), "→ K g =", (dot_kernel(theta, phi) @ g).tolist())
print("s =", (phi @ g).item(), "→ s θ =", ((phi @ g) * theta).tolist())

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 4 · Build it three times
#
# **First the formula as a loop**, for any kernel of two numbers. $\theta, \phi, g$ are one group,
# `(n,)`.


# %% slideshow={"slide_type": "fragment"}
def cgnl_loop(theta, phi, g, k):
    """y_i = Σ_j k(theta_i, phi_j) · g_j, one element after the other."""
    return torch.stack([sum(k(t, p) * v for p, v in zip(phi, g, strict=True)) for t in theta])


cgnl_loop(theta, phi, g, lambda t, p: t * p)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Then a few lines of einops**, on maps with a batch and groups. The index `i` runs over the
# elements of a group; no string has two of them, so nothing quadratic is ever made.


# %% slideshow={"slide_type": "fragment"}
def cgnl_einsum(theta, phi, g, groups):
    """Three maps (B, Ci, H, W) → (B, Ci, H, W), with the kernel t · p."""
    t, p, v = (rearrange(x, "b (g c) h w -> b g (c h w)", g=groups) for x in (theta, phi, g))
    s = einsum(p, v, "b g i, b g i -> b g")  # one number for each image and group
    return einsum(s, t, "b g, b g i -> b g i").reshape(theta.shape)


maps = torch.randn(3, 2, 6, 3, 4, generator=generator).double()  # theta, phi, g; B = 2, Ci = 6
cgnl_einsum(*maps, groups=3).shape

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Then the library's.** `cgnl_dot` takes the elements of a group in its last axis.
# `impl="explicit"` builds $K$, to be looked at; `impl="fused"` does not. Values *and gradients* must
# all be the loop's.


# %% slideshow={"slide_type": "fragment"}
def values_and_gradients(function):
    inputs = [x.clone().requires_grad_() for x in maps]
    result = function(*inputs)
    return [result.detach(), *torch.autograd.grad(result.square().sum(), inputs)]


def on_elements(function):
    """From a function of elements (B · 3 groups, n) to one of maps (B, Ci, H, W)."""
    flatten = lambda x: rearrange(x, "b (g c) h w -> (b g) (c h w)", g=3)  # noqa: E731
    return lambda *xs: function(*map(flatten, xs)).reshape(xs[0].shape)


def all_groups(*xs):
    return torch.stack([cgnl_loop(*group, lambda t, p: t * p) for group in zip(*xs, strict=True)])


by_loop = values_and_gradients(on_elements(all_groups))
ways = {"einops": partial(cgnl_einsum, groups=3)}
ways |= {impl: on_elements(partial(cgnl_dot, impl=impl)) for impl in ("explicit", "fused")}
for name, function in ways.items():
    for got, expected in zip(values_and_gradients(function), by_loop, strict=True):
        assert_close(got, expected, rtol=0, atol=1e-10)
    print(f"✔ {name}: value and three gradients equal the loop's")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 5 · A Gaussian, term by term
#
# An outer product is a poor similarity: it says "large", not "alike". The paper's second kernel is
# the Gaussian of the difference, which is 1 where two elements are equal:
#
# $$e^{-\gamma (t - p)^2} = \underbrace{e^{-\gamma t^2} e^{-\gamma p^2}}_{\beta} \, e^{2 \gamma t p}
# \;\approx\; \beta \sum_{k=0}^{P} a_k\, t^k p^k, \qquad a_k = \frac{(2\gamma)^k}{k!}$$
#
# Only the last factor mixes $t$ and $p$, and its Taylor series is a sum of products again. So $K$ is a
# sum of $P + 1$ outer products, and $y_i = \sum_k a_k\, t_i^k \left(\sum_j p_j^k g_j\right)$: the sums in
# brackets are $P + 1$ numbers for a group, called its **moments** ($\beta$'s factors go to $y_i$ and
# $g_j$). The order $P$ is counted from 0: $P = 3$ has **four** terms and a matrix of rank 4.
#
# **Before you run it:** with $\gamma = 0.5$ and elements between −2 and 2, is the
# authors' $P = 3$ enough? Where in the square will it be worst?


# %% slideshow={"slide_type": "fragment"}
def draw_series(gamma=0.5, radius=2.0):
    """|k − k_P| over the square of t and p, order by order; returns the largest of each."""
    grid = torch.linspace(-radius, radius, 81, dtype=torch.float64)
    exact = rbf_kernel(grid, grid, gamma)
    orders = (0, 1, 3, 8)
    errors = [
        (exact - taylor_kernel(grid, grid, gamma=gamma, order=P, beta="exact")).abs()
        for P in orders
    ]
    with plots.style():
        figure, axes = plt.subplots(1, 5, figsize=(11, 2.3))
    shown = [exact, *errors]
    titles = ["the kernel itself", *(f"error with P = {P}" for P in orders)]
    for ax, matrix, title in zip(axes, shown, titles, strict=True):
        drawn = ax.imshow(matrix, extent=(-radius, radius) * 2, origin="lower", vmin=0, vmax=1)
        ax.set(title=title, xlabel="p", ylabel="t")
    figure.colorbar(drawn, ax=axes, label="value")
    plt.show()
    return {P: error.max().item() for P, error in zip(orders, errors, strict=True)}


worst = draw_series()

# %% slideshow={"slide_type": "fragment"}
print({P: round(error, 4) for P, error in worst.items()})
lab.claim("γ = 0.5, numbers up to 2: P = 3 is off by more than a half", worst[3], above=0.5)
grid = torch.linspace(-2, 2, 81, dtype=torch.float64)
ranks = [
    torch.linalg.matrix_rank(taylor_kernel(grid, grid, gamma=0.5, order=P)).item() for P in range(4)
]
lab.claim("orders 0 to 3 have the ranks 1 to 4", ranks == [1, 2, 3, 4])

# %% [markdown] slideshow={"slide_type": "subslide"}
# Not enough, and worst in the two corners where both elements are large and of one sign; where the
# signs differ, the terms alternate: the error is smaller, but there the series is *negative*, which a
# Gaussian never is. The series is good around $t p = 0$ only. Move the sliders
# (with a kernel running):

# %% tags=["nbval-ignore-output"] slideshow={"slide_type": "fragment"}
lab.widgets.sliders(draw_series, gamma=(0.01, 2.0, 0.1), radius=(0.5, 3.0, 2.0))

# %% [markdown] slideshow={"slide_type": "subslide"}
# **How long must the series be?** For $|t|, |p| \le R$ put $z = 2 \gamma R^2$. Then the error is never
# above
#
# $$Q_P(z) = 1 - e^{-z} \sum_{k=0}^{P} \frac{z^k}{k!}$$
#
# and reaches it in the corner $t = p = R$. It is the probability that a Poisson number of mean $z$
# exceeds $P$; so a rule of thumb comes for free: $P$ has to be clearly above $z$. (The bound is
# ours, not the paper's; `attnlab.cgnl.taylor_error_bound` computes it.)

# %% slideshow={"slide_type": "fragment"}
orders = list(range(13))
series = {
    f"z = {z}": [taylor_error_bound(z, P).item() for P in orders] for z in (0.2, 1.0, 4.0, 8.0)
}
ax = plots.curve(orders, series, xlabel="order P", ylabel="largest error Q_P(z)", log="y")
ax.axvline(3, color="black", linestyle=":", linewidth=1)
ax.text(3.1, 3.0, "the authors' P = 3")
ax.set(ylim=(1e-10, 30), title="the larger z, the later the series begins to help")
plt.show()
for P, error in worst.items():
    lab.claim(f"P = {P}: the measured error is the bound",
              abs(error - taylor_error_bound(4.0, P).item()), below=1e-6)  # fmt: skip

# %% [markdown] slideshow={"slide_type": "subslide"}
# The library's linear form against the loop with the true Gaussian, as the order grows. The elements
# are squeezed into (−1, 1) by a tanh, so $z = 1$ for $\gamma = 0.5$, and the output's error is at most
# $Q_P(1) \sum_j |g_j|$:

# %% slideshow={"slide_type": "fragment"}
theta, phi, g = torch.randn(3, 40, generator=generator, dtype=torch.float64)
theta, phi = theta.tanh(), phi.tanh()
gaussian = cgnl_loop(theta, phi, g, lambda t, p: torch.exp(-0.5 * (t - p) ** 2))
for P in (1, 3, 5, 9):
    y = cgnl_rbf(theta, phi, g, gamma=0.5, order=P, beta="exact")
    error, limit = (y - gaussian).abs().max(), taylor_error_bound(1.0, P) * g.abs().sum()
    assert error <= limit
    print(f"P = {P}: error {error:.1e}, inside {limit:.1e}")
y = cgnl_rbf(theta, phi, g, gamma=0.5, order=30, beta="exact")
lab.claim("order 30 is the Gaussian", (y - gaussian).abs().max().item(), below=1e-12)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 6 · Groups are the blocks of a diagonal
#
# With $G_n$ groups, an element hears only the elements of its own group: the big matrix has $G_n$
# blocks on its diagonal and zeros elsewhere. `attnlab.record` gives the blocks, `(batch, groups, n, n)`.

# %% slideshow={"slide_type": "fragment"}
torch.manual_seed(0)
x = torch.randn(1, 16, 2, 3)
with plots.style():
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2))
for ax, groups in zip(axes, (1, 2, 8), strict=True):
    block = CGNLBlock(16, groups=groups)
    with attnlab.record(block) as maps:
        block(x)
    kernels = maps[""][0] / maps[""].abs().max()  # (groups, n, n)
    title = f"{groups} group{'s' * (groups > 1)}: {kernels.numel():,} numbers"
    plots.heatmap(torch.block_diag(*kernels), title=title, xlabel="element j", ylabel="element i",
                  label="kernel / largest", ax=ax)  # fmt: skip
    assert torch.linalg.matrix_rank(kernels.double(), rtol=1e-5).max() == 1
plt.show()

# %% [markdown] slideshow={"slide_type": "fragment"}
# See the stripes: each block is an outer product, so all its rows are one row, scaled. Eight
# groups carry eight numbers $s$ through the image where one group carries one. The price: only 1/8
# of the pairs are left, and a channel of one group no longer hears a channel of another.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 7 · Two consequences nobody should miss
#
# ### Only the sign survives
#
# The authors' $W_z$ and GroupNorm have the same groups as the kernel. Group by group, the branch is
# $\operatorname{GN}(s\, W_z \theta)$, and a GroupNorm divides by the standard deviation of the group.
#
# **Before you run it:** multiply $\phi$ of one group by 1,000. What happens to that group's output?

# %% slideshow={"slide_type": "fragment"}
torch.manual_seed(0)
block = CGNLBlock(64, groups=8).eval()
torch.nn.init.ones_(block.norm.weight)  # open the gate: a fresh block is the identity
torch.nn.init.kaiming_uniform_(block.out.weight)
x = torch.randn(1, 64, 14, 14)
with torch.no_grad():
    before = block(x)
    block.phi.weight[:4] *= 1000  # the first group: 4 of the 32 inner channels
    after = block(x)
changed = (after - before)[:, :8].norm() / (before - x)[:, :8].norm()  # the group's 8 channels
lab.claim("a thousand times φ changes its group's branch by less than a fiftieth",
          changed.item(), below=0.02)  # fmt: skip

# %% [markdown] slideshow={"slide_type": "subslide"}
# Next to nothing: the factor goes into $s$, and the norm divides it out. What is left of all that was
# gathered over the image is whether $s$ is above or below zero: **one bit per group**. The rest of the
# block is $\theta$, a 1×1 convolution of the place itself. So replace $s$ by its sign, at the
# authors' size and initialisation, for several norms, and measure how the branch changes.


# %% slideshow={"slide_type": "fragment"}
def sign_only(**options):
    """How much the branch changes if s is replaced by its sign, and the gradients of θ and φ."""
    torch.manual_seed(0)
    block = CGNLBlock(1024, **options)
    if not isinstance(block.norm, torch.nn.Identity):
        torch.nn.init.ones_(block.norm.weight)
    torch.nn.init.normal_(block.out.weight, std=0.01)
    x = torch.randn(4, 1024, 14, 14)
    theta, phi, g = block._project(x)  # (4 images, 8 groups, n) each
    s = (phi * g).sum(dim=-1, keepdim=True)
    branches = [block.norm(block.out((a * theta).reshape(4, 512, 14, 14))) for a in (s, s.sign())]
    (branches[0] * torch.randn_like(x)).sum().backward()
    change = (branches[1] - branches[0]).norm() / branches[0].norm()
    gradients = [layer.weight.grad.norm().item() for layer in (block.theta, block.phi)]
    return change.item(), gradients[1] / gradients[0]


norms = {
    "GroupNorm, the same 8 groups": {},
    "GroupNorm, 16 groups": {"norm_groups": 16},
    "GroupNorm, 1 group": {"norm_groups": 1},
    "BatchNorm": {"norm": "bn"},
    "no norm": {"norm": "none"},
}
found = {name: sign_only(**options) for name, options in norms.items()}

# %% slideshow={"slide_type": "fragment"}
with plots.style():
    figure, axes = plt.subplots(1, 2, figsize=(11, 2.6))
titles = ["change of the branch when s becomes sign(s)", "gradient of φ / gradient of θ"]
for i, (ax, title) in enumerate(zip(axes, titles, strict=True)):
    bars = {name: [values[i]] for name, values in found.items()}
    plots.bars_with_spread(bars, xlabel=title, ax=ax)
axes[1].set(yticklabels=[])
plt.show()
same, finer, one, *_ = (change for change, _ in found.values())
lab.claim("with the authors' norm, or a finer one, under 5 %", max(same, finer), below=0.05)
lab.claim("one norm over all groups keeps more than 20 %", one, above=0.2)
ratio = found["GroupNorm, the same 8 groups"][1]
lab.claim("with the authors' norm φ gets less than a fifth of θ's gradient", ratio, below=0.2)

# %% [markdown] slideshow={"slide_type": "fragment"}
# So the published CGNL with the dot kernel is a bottleneck of two 1×1 convolutions whose groups may be
# flipped in sign by the image; what is left of the size passes through the $\epsilon = 10^{-5}$ in the
# norm's root. `norm="none"`, `"bn"`, or `norm_groups` below `groups` keep the size alive.

# %% [markdown] slideshow={"slide_type": "subslide"}
# ### The constant term takes over
#
# The authors' Gaussian version, CGNLx, has $\gamma = 10^{-4}$, $P = 3$, and puts the constant
# $e^{-2\gamma}$ in the place of $\beta$. How large are the terms $k = 0, 1, 2, 3$ of $y$ at
# initialisation?


# %% slideshow={"slide_type": "fragment"}
torch.manual_seed(0)
block = CGNLBlock(1024, kernel="rbf")
with torch.no_grad():
    theta, phi, g = (part.double() for part in block._project(torch.randn(1, 1024, 14, 14)))


def sizes_of_terms(gamma):
    """Root mean square of the term of order 0, 1, 2, 3 of y; theta, phi, g are (1, 8, n)."""
    sizes = []
    for k in range(4):
        moment = (phi**k * g).sum(dim=-1, keepdim=True)
        term = (2 * gamma) ** k / math.factorial(k) * theta**k * moment
        sizes.append(term.square().mean().sqrt().item())
    return sizes


terms = {f"γ = {gamma:g}": sizes_of_terms(gamma) for gamma in (1e-4, 1e-2, 0.1, 1.0)}
ax = plots.curve(range(4), terms, xlabel="order k of the term", ylabel="its size in y", log="y")
ax.set(title="with a small γ only the constant is left", xticks=range(4))
plt.show()

# %% slideshow={"slide_type": "fragment"}
lab.claim("γ = 1e-4: the constant is 10,000 times the next term",
          terms["γ = 0.0001"][0] / terms["γ = 0.0001"][1], above=1e4)  # fmt: skip
y = cgnl_rbf(theta, phi, g)  # γ = 1e-4, P = 3
varies = (y.std(dim=-1) / y.abs().mean(dim=-1)).max().item()
lab.claim("over a group, y varies by less than a thousandth of itself", varies, below=1e-3)
half = cgnl_rbf(theta.bfloat16(), phi.bfloat16(), g.bfloat16())
lab.claim("in bfloat16 it is a constant", half.std(dim=-1).max().item(), equal=0)

# %% [markdown] slideshow={"slide_type": "fragment"}
# The term $k = 0$ is $\sum_j g_j$, the same for every element of a group: whatever the network can
# learn from it, it is no similarity. $\gamma$ between 0.1 and 1 with bounded elements, or
# `include_constant=False`, make the kernel speak.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 8 · See it
#
# No weights are learned here: a photograph in 8×12 patches, each described by its mean red, green and
# blue, standardised and squeezed by a tanh into (−1, 1). $\theta = \phi$ = these three channels on 96
# positions, 288 elements in one group. For the explorer, the matrix of elements is summed over the
# channels on both sides, which gives positions × positions, as `CGNLBlock.dense_map` does.
#
# **Predict first:** go through the patches in the layer *dot product*. How many different pictures will
# you see?

# %% slideshow={"slide_type": "fragment"}
cat = lab.data.photo("chelsea")
cat = F.interpolate(cat[None], size=(96, 144), antialias=True, mode="bicubic")[0].clamp(0, 1)
patches = reduce(cat, "c (h p) (w q) -> c (h w)", "mean", p=12, q=12)  # (3, 96)
elements = (patches - patches.mean(dim=1, keepdim=True)) / patches.std(dim=1, keepdim=True)
elements = elements.tanh()
flat = elements.flatten()  # (288,)


def over_channels(kernel):
    """(288, 288) elements → (96, 96) positions."""
    return reduce(kernel, "(a i) (b j) -> i j", "sum", a=3, b=3)


views = {
    "non-local: softmax over positions": attention_weights(2 * elements.T, 2 * elements.T),
    "CGNL: dot product": over_channels(dot_kernel(flat, flat)),
    "CGNL: Gaussian, order 3": over_channels(taylor_kernel(flat, flat, gamma=2, order=3, beta="exact")),
    "Gaussian, not a series": over_channels(rbf_kernel(flat, flat, gamma=2)),
}  # fmt: skip

# %% tags=["explorer", "nbval-ignore-output"] slideshow={"slide_type": "fragment"}
lab.widgets.AttentionExplorer(
    cat, {name: view[None] / view.abs().max() for name, view in views.items()}, (8, 12), prefix=0,
    title="One number for a pair of positions, and three sums over pairs of elements",
    alt="A cat's face, divided into 8×12 patches",
)  # fmt: skip

# %% slideshow={"slide_type": "fragment"}
rows = F.normalize(views["CGNL: dot product"], dim=-1)
agreement = (rows @ rows[0]).abs().min().item()
lab.claim("dot product: every row is the same picture, up to its sign", agreement, above=0.999)
ranks = {
    name: torch.linalg.matrix_rank(view.double(), rtol=1e-5).item() for name, view in views.items()
}
for name, rank in ranks.items():
    print(f"rank {rank:3d}  {name}")
lab.claim("order 3: rank 4 at most", ranks["CGNL: Gaussian, order 3"] <= 4)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Two: one picture and its negative. In the dot kernel an element does not choose *whom* to listen to,
# only how loudly, and whether to turn the sign. With four terms there are mixtures of four pictures.
# The price of linear cost is the rank: $P + 1$ per group, whatever is learned.

# %% [markdown] slideshow={"slide_type": "subslide"}
# **A row of elements.** What the sum over channels hides: the *red* of the patch in the cat's eye
# (outlined) asks all reds, greens and blues. One row of the exact Gaussian, and of its series:

# %% slideshow={"slide_type": "fragment"}
asking = 0 * 96 + 3 * 12 + 4  # channel 0 (red), row 3, column 4
for name, kernel in {
    "the Gaussian": rbf_kernel(flat, flat, gamma=2),
    "its series, order 3": taylor_kernel(flat, flat, gamma=2, order=3, beta="exact"),
}.items():
    row = rearrange(kernel[asking], "(b h w) -> b h w", b=3, h=8)
    plots.overlay(cat, row, ["to red", "to green", "to blue"], title=f"from red here: {name}",
                  mark=(3, 4), label="kernel", size=1.9)  # fmt: skip
    plt.show()

# %% [markdown] slideshow={"slide_type": "fragment"}
# The Gaussian gives red one answer about the reds of the picture and another about its blues: that is
# what section 1 asked for. The series resembles it, but goes below zero for many elements, which a
# Gaussian never does, and misses by up to a half where both elements are large and of one sign
# ($z = 4$ here, see section 5).

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 9 · Train it
#
# The **key patch**: three shapes on grey, green discs and yellow diamonds, and a small patch in the
# corner. If the patch is red, discs are class 1 and diamonds class 2; if it is blue, the other way
# round. Every pixel of a shape needs one bit from the far corner. The network has four
# convolutions and a block in the middle; without the block, a pixel sees 7×7 pixels and never the key:
# chance is 1/2 on the shapes' pixels.
#
# Live, 150 steps with CGNL's dot kernel and no norm:

# %% tags=["nbval-ignore-output"] slideshow={"slide_type": "fragment"}
lab.seed_everything(0)
learner = ch06.segmenter(ch06.spread_out(ch06.KEY_PATCH_BLOCKS["CGNL dot, no norm"]()))
samples = lab.toys.key_patch(2_048, seed=0)
history = lab.fit(
    learner, samples, loss=ch06.segmentation_loss, steps=150, batch_size=32, lr=3e-3,
    weight_decay=0.0, device=device,
)  # fmt: skip
plots.curve(history.steps, {"training": history.loss}, xlabel="step", ylabel="loss")
plt.show()

# %% slideshow={"slide_type": "fragment"}
test = lab.toys.key_patch(256, seed=1)
accuracy = ch06.shape_accuracy(learner, test, device)
with torch.no_grad():
    found = learner(test["image"][:4].to(device)).argmax(dim=1).cpu()
pictures = [*test["image"][:4], *(test["label"][:4] / 2), *(found / 2)]
titles = ["image"] * 4 + ["classes"] * 4 + ["found"] * 4
plots.show_images(pictures, titles, columns=4, size=1.4)
plt.show()
lab.claim("one number for a group carries the bit: far above chance", accuracy, above=0.9)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Predict:** one bit is needed, and section 7 says that behind a matching GroupNorm one bit per group
# survives. Will the block with the GroupNorm solve it as well? And the Gaussian with
# $\gamma = 10^{-4}$?
#
# All with 600 steps, `attnlab results 06_cgnl.key_patch`:

# %% slideshow={"slide_type": "fragment"}
lab.results.show("06_cgnl.key_patch")

# %% slideshow={"slide_type": "fragment"}
table = lab.results.load("06_cgnl.key_patch")
plots.bars_with_spread(
    table, "accuracy", xlabel="accuracy on the shapes", reference=("chance", 0.5)
)
plt.show()
runs = {row: metrics["accuracy"]["values"] for row, metrics in table["rows"].items()}
for row in ("non-local", "CGNL dot, BatchNorm", "CGNL dot, no norm"):
    lab.claim(f"{row}: solved in every seed", min(runs[row]), above=0.99)
for row in ("none", "CGNL dot, GroupNorm", "CGNL rbf, γ = 1e-4"):
    lab.claim(f"{row}: at chance in every seed", max(runs[row]), below=0.56)

# %% [markdown] slideshow={"slide_type": "fragment"}
# It will not. The sign *could* carry the bit, but it has to be found by gradient descent, and a sign has
# no slope: what gradient $\phi$ and $g$ get comes through the $\varepsilon$ of the norm (section 7 shows
# how little that is for $\phi$), and nothing makes it point to the right sign. With a BatchNorm or without a norm the same
# block solves the task in every seed; with one GroupNorm over all groups in one seed of three. The
# Gaussian with the authors' $\gamma$ stays at chance, as section 7 makes one expect; with
# $\gamma = 0.5$ one seed of three solves it. Where seeds fall on both sides like this, three say that
# it can be learned, not how often. The plain non-local block, which costs more, is as good here as
# the best. (Two departures from the authors: PyTorch's initialisation of the 1×1 maps, which are small
# here, and without a norm the sums are divided by $\sqrt n$.)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 10 · Clips
#
# In a clip, positions are places in frames: $N = T H W$, and the cost in $N$ matters more. Does a block
# help to tell *motion*? A disc moves over still clutter to the right, down, to the left or up, and
# re-enters at the opposite side. Where it is in any one frame says nothing: chance is 1/4.

# %% slideshow={"slide_type": "fragment"}
clip = lab.toys.motion_direction(4, seed=3, **ch06.CLIP)
frames = rearrange(clip["image"][:2], "b c t h w -> (b t) c h w")
names = [list(lab.toys.DIRECTIONS)[label] for label in clip["label"][:2]]
titles = [f"{name}, frame {t}" for name in names for t in range(4)]
plots.show_images([*frames.clamp(0, 1)], titles, columns=4, size=1.5)
plt.show()

# %% [markdown] slideshow={"slide_type": "subslide"}
# Four ways to look at a clip with one small network for images, three convolutions:
#
# - **C2D**: frame by frame; the mean over all frames decides.
# - **inflated stem**: the first convolution becomes 3×3×3. *Inflation* copies its kernel to each of three
#   frames and divides by three, so that at the start a still clip gives what the image gave.
# - **a 3-D block**, non-local or CGNL, on the $4 \times 4 \times 4$ positions of the maps.
# - the block with **numbers**: a learned vector for each frame and place, added before it.
#
# **Before you run it:** play a clip backwards. Right becomes left. Which of the networks, with
# random weights in all layers, can give another answer than before?


# %% slideshow={"slide_type": "fragment"}
def change_when_backwards(row):
    """Largest change of the scores of a network with random weights, relative to their spread."""
    torch.manual_seed(0)
    network = ch06.clip_classifier(row).double().eval()
    for weights in network.parameters():  # random everywhere: a fresh block is the identity
        torch.nn.init.normal_(weights, std=0.3)
    clips = clip["image"].double()
    with torch.no_grad():
        scores, turned = network(clips), network(clips.flip(2))
    return ((turned - scores).abs().max() / scores.std()).item()


for row in ("C2D", "non-local", "CGNL"):
    lab.claim(f"{row}: the same scores backwards", change_when_backwards(row), below=1e-9)
for row in ("3×3×3 stem", "numbers, non-local", "numbers, CGNL"):
    lab.claim(f"{row}: other scores backwards", change_when_backwards(row), above=1e-3)

# %% [markdown] slideshow={"slide_type": "fragment"}
# A block, whichever it is, treats the positions of a clip as a set: without numbers it cannot tell
# left from right, however long it is trained. That is exact, so no training is spent on it. C2D, too,
# averages a set of frames. (Weights were drawn at random also because a *fresh* inflated kernel, three
# equal copies, is the same forwards and backwards: training has to make its frames differ.)
#
# **Predict:** with numbers, which block learns the direction? And what does a block add to the inflated
# stem? Same network otherwise, same 400 steps of 32 clips; CGNL with the dot kernel, 4 groups and no
# norm; multiply–accumulates are of one clip (`attnlab results 06_cgnl.motion`):

# %% slideshow={"slide_type": "fragment"}
lab.results.show("06_cgnl.motion")

# %% slideshow={"slide_type": "fragment"}
table = lab.results.load("06_cgnl.motion")
plots.bars_with_spread(
    table, "accuracy", xlabel="accuracy on new clips", reference=("chance", 0.25)
)
plt.show()
runs = {row: metrics["accuracy"]["values"] for row, metrics in table["rows"].items()}
for row in ("C2D", "numbers", "numbers, non-local", "numbers, CGNL"):
    lab.claim(f"{row}: near chance in every seed", max(runs[row]), below=0.33)
stem, *behind = (sum(values) / len(values) for row, values in runs.items() if "stem" in row)
lab.claim("inflated stem: it knows the direction in every seed", min(runs["3×3×3 stem"]), above=0.9)
lab.claim("no block behind the stem makes it better", max(behind) - stem, below=0.01)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Neither, and nothing, at this budget: **a null result**. With numbers a block *could* tell the direction, and
# does not learn it in 400 steps; whether it would in many more was not tried. Three frames in the
# first convolution, 864 more weights, do what no block does here, and a block behind them
# makes the outcome worse and less certain, the non-local one (0.43 to 0.88) more than CGNL (0.88 to
# 0.93). The disc moves three pixels a frame: that is local motion, and local is what a convolution is
# made for. Long videos and pre-trained networks, for which these blocks were meant, are another matter.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 11 · What it costs
#
# Multiply–accumulates at the authors' place, `layer3` of a ResNet-50 ($C = 1024$, $C_i = 512$,
# $N = 14 \times 14$). The maps: CGNL $3 N C C_i + N C C_i / G_n$ (its $W_z$ is in groups), non-local
# $4 N C C_i$. Then the pairs:
#
# | | multiply–accumulates for the pairs | numbers kept |
# |---|---|---|
# | non-local | $2 N^2 C_i$ | $N^2$ |
# | generalised, dense | $2 (C_i N)^2 / G_n$ | $(C_i N)^2 / G_n$ |
# | CGNL, dot | $2 C_i N$ | $G_n$ |
# | CGNL, order $P$ | $2 (P + 1) C_i N$ | $(P + 1) G_n$ |
#
# **Before you run it:** at 14×14, by which factor is the CGNL block cheaper than the non-local
# one: 100, 10, or less than 2?

# %% slideshow={"slide_type": "fragment"}
with torch.device("meta"):
    x = torch.empty(1, 1024, 14, 14)
    blocks = {"CGNL": CGNLBlock(1024), "non-local": NonLocalBlock(1024)}
    macs = {name: cost.macs(block, x) for name, block in blocks.items()}
    parameters = {name: cost.parameters(block) for name, block in blocks.items()}
for name in blocks:
    print(f"{name:10}{parameters[name]:>10,} parameters {macs[name] / 1e6:6.1f} M MACs")
lab.claim(
    "the CGNL block has the published 1,640,448 parameters", parameters["CGNL"], equal=1_640_448
)
n, c, ci = 14 * 14, 1024, 512
lab.claim("its convolutions are counted as the formula says",
          macs["CGNL"], equal=3 * n * c * ci + n * c * ci // 8)  # fmt: skip
lab.claim(
    "the non-local block needs less than twice as much", macs["non-local"] / macs["CGNL"], below=2
)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Less than 2. At 14×14 the 1×1 convolutions are nearly all of either block. The pairs begin to matter
# where maps are large, or have a time axis. Memory of the bare operators, 8 inner channels in one
# group:


# %% slideshow={"slide_type": "subslide"}
def extra_memory(name, positions):
    """MiB that one forward pass needs beside its inputs."""
    theta, phi, g = torch.randn(3, 1, 8, positions, device=device)
    elements = [x.flatten(1) for x in (theta, phi, g)]
    steps = {
        "generalised, dense": lambda: cgnl_dot(*elements, impl="explicit"),
        "non-local, explicit": lambda: attention_weights(theta.mT, phi.mT) @ g.mT,
        "CGNL, dot": lambda: cgnl_dot(*elements),
        "CGNL, order 3": lambda: cgnl_rbf(*elements, gamma=0.5),
    }
    with torch.no_grad():
        return cost.peak_memory(steps[name], device=device) / 2**20


sizes = [64, 128, 256, 512]
names = ["generalised, dense", "non-local, explicit", "CGNL, dot", "CGNL, order 3"]
memory = {name: [extra_memory(name, n) for n in sizes] for name in names}
ax = plots.curve(sizes, memory, xlabel="positions N", ylabel="extra memory (MiB)", log="xy",
                 title="8 channels: two quadratic, two linear")  # fmt: skip
ax.set(ylim=(1e-3, 1e6))
plt.show()

# %% slideshow={"slide_type": "fragment"}
for name, degree in zip(names, (2, 2, 1, 1), strict=True):
    exponent = cost.growth(sizes, memory[name])
    lab.claim(f"{name}: memory grows with the power {degree}", exponent, equal=degree, tol=0.3)
ratio = memory["generalised, dense"][-1] / memory["non-local, explicit"][-1]
lab.claim("the dense generalised matrix is more than 50 times the non-local one", ratio, above=50)

# %% [markdown] slideshow={"slide_type": "subslide"}
# And time, of whole blocks of the same width, on this machine (64 channels; the repository's
# benchmark is `benchmarks/blocks.py`):

# %% tags=["nbval-ignore-output"] slideshow={"slide_type": "fragment"}
sizes, times = [256, 1024, 4096], {}
for name, make in {
    "CGNL, dot": lambda: CGNLBlock(64),
    "CGNL, order 3": lambda: CGNLBlock(64, kernel="rbf", gamma=0.5),
    "non-local, fused": lambda: NonLocalBlock(64),
}.items():
    block = make().to(device).eval()
    with torch.no_grad():
        inputs = [torch.randn(1, 64, n, 1, device=device) for n in sizes]
        times[name] = [1e3 * cost.latency(partial(block, x)) for x in inputs]
    growth = times[name][2] / times[name][1]
    print(f"{name:17} from N = 1,024 to 4,096: {growth:.1f} times as long")
plots.curve(sizes, times, xlabel="positions N", ylabel="milliseconds", log="xy",
            title="64 channels: time of one forward pass")  # fmt: skip
plt.show()

# %% [markdown] slideshow={"slide_type": "fragment"}
# On small maps the non-local block can be the faster one: there the cost of calling anything hides both
# slopes. (Four times the positions: 4 is linear, 16 quadratic.)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 12 · Paper and here
#
# The numbers of this table are those of the README of the authors' PyTorch repository. It is a
# re-implementation with another base than the paper's; the paper's own tables, those on video among
# them, could not be checked where this was written and are left out. No model was trained on these
# sets here.
#
# | claim | published (README) | here | why they may differ |
# |---|---|---|---|
# | birds (CUB-200), ResNet-50, top-1 | 86.45 alone, 86.69 with one non-local block, **87.06** with CGNL, 86.56 with CGNLx ($P = 3$) | – | best epoch on the validation set, one run each; the gap between the blocks is 0.4 |
# | ImageNet, ResNet-50, top-1 | 76.15 alone, 77.69 with CGNL, 77.32 with CGNLx | – | the base is torchvision's; the block's rows train on from its weights, so that part of the +1.5 may be the longer training; there is no non-local row |
# | COCO, Mask R-CNN, box AP | 35.6 alone, 36.3 with CGNL | – | the base is on another schedule |
# | parameters, ResNet-50 + 1 block | block 1,640,448; whole 27,197,480 | the same, section 11 and `tests/test_cgnl.py` | exact counts |
# | the dot kernel attends to pairs of (channel, position) | section 3 of the paper | rank 1, and behind the authors' norm a sign, sections 7 and 8 | a property of the equations |
# | linear cost | section 3 of the paper | power 1 in memory, section 11 | – |
# | helps on video | (tables not checked) | no gain on moving discs, section 10 | a toy of four frames and a network of three convolutions, against Kinetics and a pre-trained ResNet |

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 13 · Exercises
#
# Write the body, run the cell, run the check. `lab.hint("cgnl.compact_dot")` gives a hint,
# `lab.solution("cgnl.compact_dot")` the solution.
#
# **1 · Compact** (8 minutes). The dot kernel in groups, from maps to maps.


# %% exercise="cgnl.compact_dot" tags=["exercise"] slideshow={"slide_type": "fragment"}
def compact_dot(
    theta: torch.Tensor, phi: torch.Tensor, g: torch.Tensor, groups: int
) -> torch.Tensor:
    """Generalised non-local attention with the kernel t · p, without any n × n matrix.

    theta, phi, g: (B, C, H, W), cut into `groups` groups of C / groups neighbouring channels. The
    n = C / groups · H · W numbers of a group are its elements, and element i receives
    Σ_j theta_i · phi_j · g_j over all elements j of its own group.
    Returns (B, C, H, W).
    """
    raise NotImplementedError


# %% slideshow={"slide_type": "fragment"}
lab.check("cgnl.compact_dot", compact_dot)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **2 · How long a series?** (7 minutes) Section 5's bound, turned round.


# %% exercise="cgnl.order_needed" tags=["exercise"] slideshow={"slide_type": "fragment"}
def order_needed(gamma: float, radius: float, tolerance: float) -> int:
    """The lowest order P for which the Taylor series of exp(−γ (t − p)²) is good enough.

    exp(2γ t p) is replaced by its terms k = 0 … P, exp(−γ t²) and exp(−γ p²) are kept. For all
    |t|, |p| ≤ radius the error is at most Q_P(z) = 1 − exp(−z) Σ_{k≤P} zᵏ / k! with
    z = 2γ · radius².
    Returns P, the smallest with Q_P(z) ≤ tolerance (0 < tolerance < 1). Number of terms: P + 1.
    """
    raise NotImplementedError


# %% slideshow={"slide_type": "fragment"}
lab.check("cgnl.order_needed", order_needed)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **3 · Find the bug** (8 minutes). Shapes are right, the cost is linear, it trains. Its kernel is not
# the one in the docstring. One line is wrong: mend it here.
#
# Then the open part (15 minutes): softmax attention cannot be re-bracketed like this. Exactly why not?
# (Not "because exp is not linear": section 5 re-brackets an exp.) Write down what you would need for
# `exp(q · k)` of *vectors* of width $d$ to order $P$, how many terms it has, and what becomes of the
# row's divisor. (To compare: $\binom{d + P}{P}$ terms, and the divisor is the same sums with $g = 1$;
# `CGNLBlock(…, kernel="rbf", normalize=True)` computes it so.)


# %% exercise="cgnl.buggy_series" tags=["exercise"] slideshow={"slide_type": "fragment"}
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
    for k in range(order):
        moment = (phi**k * carried).sum(dim=-1, keepdim=True)
        y = y + a * moment * theta**k
        a = a * 2 * gamma / (k + 1)
    return y * torch.exp(-gamma * theta**2)


# %% slideshow={"slide_type": "fragment"}
lab.check("cgnl.buggy_series", buggy_series)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **4 · Inflate** (5 minutes).


# %% exercise="cgnl.inflate_kernel" tags=["exercise"] slideshow={"slide_type": "fragment"}
def inflate_kernel(weight: torch.Tensor, frames: int) -> torch.Tensor:
    """The kernel of a 3-D convolution that starts from one trained on images.

    weight: (C_out, C_in, k, k). The new kernel sees `frames` frames, the same in each, and on a
    clip that stands still it gives what the 2-D one gives on the image (away from the clip's ends).
    Returns (C_out, C_in, frames, k, k).
    """
    raise NotImplementedError


# %% slideshow={"slide_type": "fragment"}
lab.check("cgnl.inflate_kernel", inflate_kernel)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 14 · Take home
#
# - Generalised non-local attention has one number for each pair of (channel, position); a kernel that
#   is a sum of $P + 1$ products makes it linear, and of rank $P + 1$ per group.
# - What survives the shortcut is $P + 1$ moments per group: with the dot kernel one number, and behind
#   a GroupNorm of the same groups only its sign.
# - A Taylor series is good for $|2 \gamma t p|$ clearly below $P$; with a tiny $\gamma$ it is good, and
#   constant.
#
# **Common misconceptions.** *Order P has P terms* (it has $P + 1$). *CGNL computes an attention map
# cheaply* (it normalises no row; the dot version is one number times $\theta$). *CGNLx compares by
# distance* (with a constant $\beta$ it approximates $e^{2 \gamma t p}$, at $\gamma = 10^{-4}$ a constant).
# *Linear cost makes the block faster* (at 14×14 the convolutions are nearly all of it). *The same
# number of operations, only less memory* ($2n$ against $2n^2$).
#
# **Where next.** Chapter 07 asks clips where things went, by motion and by attention in its place.
#
# **References.** Yue et al. 2018, *Compact generalized non-local network*, section 3 · the authors'
# code, `KaiyuYue/cgnl-network.pytorch`, `model/resnet.py` and README · Wang et al. 2018, *Non-local
# neural networks*, sections 3 and 4 · Carreira & Zisserman 2017, *Quo vadis, action recognition?*
# (inflation).
