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
# # 02 · Non-local networks
#
# **At the end you can** put one attention layer into any ConvNet without disturbing it, write its four
# kinds from their formulas, say which of them cost $N^2$, and tell what its maps show from what one
# would like them to show.
#
# | | |
# |---|---|
# | to read | 55 minutes, exercises another 40 |
# | to run | about a minute on two CPU cores |
# | you need | chapter 01 (attention, its fused form), a residual block, a batch norm |
# | paper | Wang et al. 2018, *Non-local neural networks* |

# %% slideshow={"slide_type": "skip"}
import math
from functools import partial

import matplotlib.pyplot as plt
import torch
from einops import einsum, rearrange
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import attnlab
from attnlab import lab
from attnlab.attention import attention_weights
from attnlab.lab import cost, plots, toys
from attnlab.lab.experiments.ch02 import ResidualBlock, fit_same_different, small_net
from attnlab.non_local import KINDS, NonLocalBlock, non_local, non_local_weights
from attnlab.resnet import resnet50

device = lab.device()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 1 · The failure
#
# Chapter 01 threw the convolution away. Most vision systems keep it: it is cheap, and neighbours do
# belong together. What can it not do? Here is a question that a child answers at a glance: *have the
# two squares the same colour?* One lies at the left border, one at the right.

# %% slideshow={"slide_type": "fragment"}
test = toys.same_different(1_024, seed=1_000)  # image (n, 3, 16, 16), label (n,): 1 is "same"
names = [("different", "same")[label] for label in test["label"][:8]]
plots.show_images(test["image"][:8], names, title="same colour or not?", size=1.3)
plt.show()

# %% [markdown] slideshow={"slide_type": "subslide"}
# The network: two 3×3 convolutions, something in the **middle**, a 1×1 convolution, the mean over all
# positions, a linear classifier. With nothing in the middle, or a residual block of two more 3×3
# convolutions, how many columns of pixels does one position see before the mean is taken?


# %% slideshow={"slide_type": "fragment"}
def columns_seen(middle):
    """Width of the window of pixels that can move one position of the map before the mean."""
    torch.manual_seed(0)
    trunk = small_net(middle)[:4].eval()
    image = torch.rand(1, 3, 41, 41, requires_grad=True)
    trunk(image)[0, :, 20, 20].square().sum().backward()
    return (image.grad[0].abs().sum(dim=(0, 1)) > 0).sum().item()


four = nn.Sequential(*[ResidualBlock(32) for _ in range(4)])
lab.claim("nothing in the middle: 5 columns", columns_seen(nn.Identity()), equal=5)
lab.claim("a residual block: 9 columns", columns_seen(ResidualBlock(32)), equal=9)
lab.claim("four residual blocks: 21, more than the image has", columns_seen(four), equal=21)
left, right = (test["masks"][:, i].any(dim=1).float() for i in (0, 1))  # (n, 16): columns covered
gap = (right.argmax(dim=1) - left.cumsum(dim=1).argmax(dim=1)).min().item() + 1
lab.claim("no window of 9 columns shows a part of both squares", gap, above=9)

# %% [markdown] slideshow={"slide_type": "subslide"}
# The mean over positions does not help: it adds up what each square says alone, *there is red here,
# there is blue there*, and "same" is not a sum of such votes. **Before you run the next cell, guess**
# the accuracy (chance is 0.5) with nothing in the middle, with one residual block, and with four,
# which do see the whole image. Same budget for all: 4,096 images, 12 epochs, AdamW
# (`attnlab results 02_non_local.same_different`).

# %% slideshow={"slide_type": "fragment"}
table = lab.results.load("02_non_local.same_different")
convolutions = ["nothing", "a residual block", "four residual blocks"]
values = {row: table["rows"][row]["accuracy"]["values"] for row in convolutions}
ax = plots.bars_with_spread(values, xlabel="accuracy, three seeds", reference=("chance", 0.5))
ax.set(xlim=(0, 1), title="convolutions do not answer the question")
plt.show()
found = {row: metrics["accuracy"]["mean"] for row, metrics in table["rows"].items()}
for row in convolutions:
    lab.claim(f"{row}: at chance", found[row], above=0.45, below=0.55)

# %% [markdown] slideshow={"slide_type": "fragment"}
# All three are at chance. The third bar is the interesting one: to *see* both squares is not yet to
# *compare* them. Eight convolutions could hand a colour on from neighbour to neighbour until it meets
# the other; at this budget the training does not find how. What is missing is a step in which two far
# positions meet directly.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 2 · The idea in one picture
#
# Take the map of features that a ConvNet has computed: at each of its $N$ positions a vector $x_i$ of
# $C$ channels. Let every position look at *all* positions, compare, and collect a weighted sum of what
# they hold; then **add** the result to what was there. The picture shows one position (outlined), how
# much it takes from each other one, and what everybody receives. The map here is a photograph of
# 48×72 pixels, its features are the colours, and alike colours count.

# %% slideshow={"slide_type": "fragment"}
photo = lab.data.photo("chelsea")  # (3, H, W), floats in [0, 1]
photo = F.interpolate(photo[None], size=(48, 72), antialias=True, mode="bicubic")[0].clamp(0, 1)
x = rearrange(photo, "c h w -> (h w) c")  # (N, C) = (3456, 3)
i = 20 * 72 + 26  # the outlined position: row 20, column 26, beside the iris
weights = (-torch.cdist(x, x).square() / 0.01).softmax(dim=-1)  # (N, N), alike colours weigh most
y = rearrange(weights @ x, "(h w) c -> c h w", h=48)
looks = rearrange(weights[i], "(h w) -> h w", h=48)
with plots.style():
    figure, axes = plt.subplots(1, 3, figsize=(11, 2.6))
pictures = {"x": photo, "weights of one position": looks, "y": y}
for ax, (title, picture) in zip(axes, pictures.items(), strict=True):
    ax.imshow(picture if picture.ndim == 2 else rearrange(picture, "c h w -> h w c"))
    ax.add_patch(plt.Rectangle((25, 19), 3, 3, fill=False, edgecolor="white"))
    ax.set(title=title, xticks=[], yticks=[])
plt.show()

# %% [markdown] slideshow={"slide_type": "fragment"}
# See how the weights jump: from the rim of one eye to the rim of the other, to the nose and into the
# background, over everything between. No stack of neighbours is needed. Every pixel of $y$ is an
# average over the whole image.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 3 · The mathematics, with shapes
#
# $$y_i = \frac{1}{\mathcal C(x)} \sum_j f(x_i, x_j)\, g(x_j), \qquad z_i = W_z\, y_i + x_i$$
#
# | symbol | shape | what it is |
# |---|---|---|
# | $x_i$ | $(C)$ | the features at position $i$; there are $N$ positions, $N = H W$ in an image; $x$, $(N, C)$, is all of them |
# | $\theta_i = W_\theta x_i$, $\varphi_j = W_\varphi x_j$ | $(C_i)$ each | what is compared: query and key of chapter 01; $C_i = C/2$ |
# | $g_j = W_g x_j$ | $(C_i)$ | what position $j$ says: the value |
# | $f(x_i, x_j)$ | a number | how much $i$ hears of $j$; $(N, M)$ in all, with $M$ keys ($M = N$ until section 10) |
# | $\mathcal C(x)$ | a number | the normaliser |
# | $y_i$ | $(C_i)$ | the weighted sum |
# | $W_z$ | $(C, C_i)$ | back to the width of $x$ |
#
# $W_\theta$, $W_\varphi$, $W_g$ and $W_z$ are 1×1 convolutions: one linear map for all positions.
# The paper (its equations 2 to 5) tries four kinds of $f$ with two normalisers:
#
# | kind | $f(x_i, x_j)$ | $\mathcal C(x)$ |
# |---|---|---|
# | Gaussian | $e^{x_i \cdot x_j}$ | $\sum_j f(x_i, x_j)$ |
# | embedded Gaussian | $e^{\theta_i \cdot \varphi_j}$ | $\sum_j f(x_i, x_j)$ |
# | dot product | $\theta_i \cdot \varphi_j$ | $M$ |
# | concatenation | $\operatorname{ReLU}(w_f \cdot [\theta_i ; \varphi_j])$ | $M$ |
#
# The plain Gaussian has no $W_\theta$ and $W_\varphi$. ($C_i$ is the paper's name of the inner width; its $i$
# is no position.) $w_f$ has shape $(2 C_i)$, and $[\theta_i ; \varphi_j]$ is the one vector behind the other. $e^s$
# divided by the sum of its row is a softmax: *the embedded Gaussian is the attention of chapter 01*,
# with one head and without $1/\sqrt d$.

# %% [markdown] slideshow={"slide_type": "subslide"}
# ### By hand, once
#
# Three positions, one channel: $x = (1, 2, -1)$, all embeddings the identity, the dot-product kind.
# Take a pencil: $y_1 = \tfrac13 (1 \cdot 1 \cdot 1 + 1 \cdot 2 \cdot 2 + 1 \cdot (-1) \cdot (-1))$.
# What are $y_2$ and $y_3$? What do you notice?

# %% slideshow={"slide_type": "fragment"}
x = torch.tensor([[1.0], [2.0], [-1.0]])  # (N, C) = (3, 1)
print("y =", non_local(x, x, x, "dot_product").flatten().tolist())

# %% [markdown] slideshow={"slide_type": "fragment"}
# $y = 2x$: each position got its own value times $\tfrac13 \sum_j x_j^2$, the same number for all.
# The sum over $j$ could have been taken *before* anyone asked. Keep this in mind for section 10.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 4 · Build it three times
#
# **First the formula as a loop**, all four kinds.


# %% slideshow={"slide_type": "fragment"}
def non_local_loop(theta, phi, g, w_f, kind):
    """theta (N, d), phi (M, d), g (M, dv), w_f (2d,) → y (N, dv)."""
    rows = []
    for query in theta:
        if kind in ("gaussian", "embedded_gaussian"):
            f = [torch.exp((query * key).sum()) for key in phi]
        elif kind == "dot_product":
            f = [(query * key).sum() for key in phi]
        else:
            f = [torch.relu((w_f * torch.cat([query, key])).sum()) for key in phi]
        normaliser = sum(f) if kind in ("gaussian", "embedded_gaussian") else len(phi)
        rows.append(sum(f_ij * g_j for f_ij, g_j in zip(f, g, strict=True)) / normaliser)
    return torch.stack(rows)


_ = assert_close(non_local_loop(x, x, x, None, "dot_product"), 2 * x)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Then a few lines of einops.** `n` are the positions that ask, `m` those that are heard. For the
# concatenation no tensor of pairs is needed: $w_f \cdot [\theta_i ; \varphi_j]$ is a number of $i$ plus
# a number of $j$.


# %% slideshow={"slide_type": "fragment"}
def non_local_einsum(theta, phi, g, w_f, kind):
    """theta (..., N, d), phi (..., M, d), g (..., M, dv), w_f (2d,) → y (..., N, dv)."""
    scores = einsum(theta, phi, "... n d, ... m d -> ... n m")
    if kind in ("gaussian", "embedded_gaussian"):
        weights = scores.softmax(dim=-1)
    elif kind == "dot_product":
        weights = scores / phi.shape[-2]
    else:
        of_query, of_key = w_f.chunk(2)
        a, b = theta @ of_query, phi @ of_key  # (..., N), (..., M)
        scores = rearrange(a, "... n -> ... n 1") + rearrange(b, "... m -> ... 1 m")
        weights = scores.relu() / phi.shape[-2]
    return einsum(weights, g, "... n m, ... m dv -> ... n dv")


_ = assert_close(non_local_einsum(x, x, x, None, "dot_product"), 2 * x)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Then the library's**, whose `impl="fused"` never stores the $(N, M)$ weights: PyTorch's kernel for
# the two Gaussians, and for the other two what section 10 shows. Values and all gradients must agree.


# %% slideshow={"slide_type": "fragment"}
def values_and_gradients(function, tensors):
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    result = function(*tensors)
    gradients = torch.autograd.grad(result.square().sum(), tensors, allow_unused=True)
    return [result.detach(), *(gradient for gradient in gradients if gradient is not None)]


torch.manual_seed(0)
shapes = (6, 4), (5, 4), (5, 3), (8,)  # theta, phi, g, w_f: six queries, five keys
tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
for kind in KINDS:
    f = {"w_f": tensors[3]} if kind == "concatenation" else {}
    expected = values_and_gradients(partial(non_local_loop, kind=kind), tensors)
    by_einsum = values_and_gradients(partial(non_local_einsum, kind=kind), tensors)
    for got, want in zip(by_einsum, expected, strict=True):
        assert_close(got, want, rtol=0, atol=1e-12)
    for impl in ("explicit", "fused"):
        ours = values_and_gradients(partial(non_local, kind=kind, impl=impl, **f), tensors[:3])
        for got, want in zip(ours, expected, strict=False):  # the loop's last is that of w_f
            assert_close(got, want, rtol=0, atol=1e-12)
    print(f"✔ {kind}: einsum, explicit and fused equal the loop, gradients too")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 5 · The block: born as the identity
#
# A trained ResNet is worth a lot, and a new layer with random weights in its middle would ruin it. So
# the block is $z = x + \operatorname{BN}(W_z y)$ with the weight $\gamma$ and the bias of the batch norm
# set to **zero**: at first it changes nothing, bit for bit, and training decides how much it should.

# %% slideshow={"slide_type": "fragment"}
block = NonLocalBlock(256)  # embedded Gaussian, inner width 128
features = torch.randn(2, 256, 9, 7)  # (B, C, H, W)
with torch.no_grad():
    off = (block(features) - features).abs().max().item()
lab.claim("a fresh block is the identity, exactly", off, equal=0)
lab.claim("C = 256: 2C² + 4.5C = 132,224 parameters", cost.parameters(block), equal=132_224)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Before you run the next cell, guess:** the output does not depend on $W_\theta$, $W_\varphi$, $W_g$
# and $W_z$ as long as $\gamma = 0$. Can such a block learn at all? And would it be safer still to set
# $W_z$ to zero *as well*? We ask both blocks to double their input, 40 steps of SGD.


# %% slideshow={"slide_type": "fragment"}
def teach_to_double(block, steps=40):
    """How far γ and W_z have moved from their start after `steps` of SGD, the largest entry."""
    x = torch.randn(8, 16, 6, 6, generator=torch.Generator().manual_seed(0))
    start = block.z.weight.detach().clone()
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    for _ in range(steps):
        loss = (block(x) - 2 * x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return block.norm.weight.abs().max().item(), (block.z.weight - start).abs().max().item()


torch.manual_seed(0)
alive, dead = NonLocalBlock(16), NonLocalBlock(16)
nn.init.zeros_(dead.z.weight)
moved, dead_moved = teach_to_double(alive), teach_to_double(dead)
lab.claim("γ = 0: γ has moved", moved[0], above=1e-3)
lab.claim("γ = 0: and W_z as well", moved[1], above=1e-4)
lab.claim("γ = 0 and W_z = 0: γ and W_z are still exactly 0", max(dead_moved), equal=0)

# %% [markdown] slideshow={"slide_type": "fragment"}
# With $\gamma = 0$ the gradient of $\gamma$ is not zero: it is made of $W_z y$, which is random but not
# nothing. One step later $\gamma \neq 0$, and everything behind it learns. With both at zero each of the
# two waits for the other for ever: a **dead block**, which raises no error and costs as much as a live
# one (exercise 1; its accuracy is in the table of section 8).

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 6 · Old acquaintances: filters and graphs
#
# **Non-local means** (Buades et al. 2005) removes noise from a photograph: each pixel becomes the
# average of all pixels *whose surroundings look alike*. With $P_i$ the 25 grey values of the 5×5 patch
# around pixel $i$, its weights are a softmax of $-\lVert P_i - P_j \rVert^2 / h^2$. Expand the square:
#
# $$-\frac{\lVert P_i - P_j\rVert^2}{h^2} = \frac{2}{h^2} P_i \cdot P_j - \frac{\lVert P_j\rVert^2}{h^2} - \frac{\lVert P_i\rVert^2}{h^2}$$
#
# The last term is the same for a whole row, and a softmax does not notice it. What is left is the
# attention of chapter 01 with scale $2/h^2$ and a float **mask** that belongs to the key. Replace patches
# by single pixels and add $-\lVert \text{place}_i - \text{place}_j\rVert^2 / 2\sigma^2$ to the mask: the
# **bilateral filter** is attention with a fixed bias of relative position. Take the content away
# altogether, and a **Gaussian blur** is left. One function makes them all:

# %% slideshow={"slide_type": "subslide"}
S = 48
picture = F.interpolate(
    lab.data.photo("coffee")[None], scale_factor=0.5, antialias=True, mode="bicubic"
)
clean = picture[0].mean(dim=0)[29 : 29 + S, 56 : 56 + S].clamp(0, 1)  # (48, 48), grey
noisy = clean + 0.1 * torch.randn(S, S, generator=torch.Generator().manual_seed(0))
pixels = rearrange(noisy, "h w -> (h w) 1")  # (N, 1), N = 2,304
padded = F.pad(noisy[None, None], (2, 2, 2, 2), mode="reflect")
patches = rearrange(F.unfold(padded, 5), "1 p n -> n p")  # (N, 25): P_i
place = torch.cartesian_prod(torch.arange(S), torch.arange(S)).float()  # (N, 2)


def denoise(content, h, sigma=math.inf, key_norms=True):
    """Average of the noisy pixels, alike in content (N, d) and near by: (48, 48)."""
    bias = -torch.cdist(place, place).square() / (2 * sigma**2)  # (N, N)
    if key_norms:
        bias = bias - content.square().sum(dim=-1) / h**2
    weights = attention_weights(content, content, mask=bias, scale=2 / h**2)
    return rearrange(weights @ pixels, "(h w) 1 -> h w", h=S)


# %% [markdown] slideshow={"slide_type": "subslide"}
# Is it so? On the left the one function, on the right each filter as its inventors wrote it: non-local
# means from distances of patches, the bilateral filter as the product of two Gaussians, one of the
# grey values and one of the places.

# %% slideshow={"slide_type": "fragment"}
means = (-torch.cdist(patches, patches).square() / 0.45**2).exp()  # (N, N), before the division
alike = (-(pixels - pixels.mT).square() / 0.5**2).exp()
near_by = (-torch.cdist(place, place).square() / (2 * 1.0**2)).exp()
for name, ours, weights in (
    ("non-local means", denoise(patches, h=0.45), means),
    ("the bilateral filter", denoise(pixels, h=0.5, sigma=1.0), alike * near_by),
):
    published = weights @ pixels / weights.sum(dim=1, keepdim=True)
    off = (ours.flatten() - published.flatten()).abs().max().item()
    lab.claim(f"attention with a mask equals {name}", off, below=1e-3)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Before you run it, guess** the order of these five. PSNR is
# $-10 \log_{10}$ of the mean squared error, in decibels; larger is better, and 3 dB is half of the
# error. (The widths $h$ and $\sigma$ were chosen on a coarse grid for the best PSNR on this picture.
# Without key norms no width does well, as the cell after it shows; it gets that of NLM.)


# %% slideshow={"slide_type": "fragment"}
def psnr(restored):
    return -10 * math.log10((restored - clean).square().mean().item())


restored = {
    "noisy": noisy,
    "Gaussian blur": denoise(0 * pixels, h=1.0, sigma=0.7),
    "bilateral": denoise(pixels, h=0.5, sigma=1.0),
    "patches: NLM": denoise(patches, h=0.45),
    "NLM, near by": denoise(patches, h=0.7, sigma=2.0),
    "no key norms": denoise(patches, h=0.45, key_norms=False),
}
decibels = {name: psnr(picture) for name, picture in restored.items()}
titles = ["clean", *(f"{name}\n{decibels[name]:.1f} dB" for name in restored)]
pictures = [clean, *(picture.clamp(0, 1) for picture in restored.values())]
plots.show_images([p[None] for p in pictures], titles, columns=7, size=1.6)
plt.show()

# %% slideshow={"slide_type": "fragment"}
blur, bilateral, means, near = list(decibels.values())[1:5]
widths = (0.45, 1.0, 2.0, 3.0, 5.0, 8.0)
by_width = {h: psnr(denoise(patches, h, key_norms=False)) for h in widths}
print("no key norms, PSNR for each h:", {h: round(value, 1) for h, value in by_width.items()})
without = max(by_width.values())
lab.claim("content helps a blur: bilateral is better", bilateral - blur, above=0.3)
lab.claim("patches near by: better still", near - bilateral, above=0.3)
lab.claim("patches anywhere are hardly better than a blur", abs(means - blur), below=0.5)
lab.claim(
    "no key norms: worse than the noise, at every width", without - decibels["noisy"], below=-3
)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Two things to keep. *Anywhere* is not free: among 2,304 patches some are alike by chance, and a search
# near by does better (Buades et al. restrict theirs too). And a plain dot product is **not** a
# similarity: without $-\lVert P_j\rVert^2$ the brightest patches win every comparison, and nearly
# every pixel becomes white; a larger $h$ does not help. The paper's Gaussian kind, $e^{x_i \cdot x_j}$, is of this sort; section 9 shows what it
# does to a photograph.

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Graphs.** Let the positions be the nodes of a graph and $e^{\theta_i \cdot \varphi_j}$ the weight of
# the edge from $j$ to $i$. A step of graph convolution divides each row of this adjacency by its degree
# and averages the neighbours' transformed features: $y = \hat A\, x W_g$ with $\hat A = D^{-1} A$, $(N, N)$,
# and the degrees on the diagonal of $D$, $(N, N)$. That *is* the block's $y$:
# a graph convolution whose graph is complete, directed, and computed anew for each image.

# %% slideshow={"slide_type": "fragment"}
torch.manual_seed(0)
block = NonLocalBlock(8)
for linear in (block.theta, block.phi, block.g):
    nn.init.normal_(linear.weight, std=0.2)
image = torch.randn(1, 8, 6, 6)
with torch.no_grad(), attnlab.record(block) as maps:
    block(image)
with torch.no_grad():
    nodes = rearrange(image, "1 c h w -> (h w) c")  # (36, 8)
    adjacency = torch.exp(block.theta(nodes) @ block.phi(nodes).mT)  # (36, 36), positive
    degree = adjacency.sum(dim=1, keepdim=True)
    step = adjacency / degree @ block.g(nodes)
    block_y = non_local(block.theta(nodes), block.phi(nodes), block.g(nodes))
off = (maps[""][0, 0] - adjacency / degree).abs().max().item()
lab.claim("the block's map is the adjacency over the degrees", off, below=1e-6)
off = (step - block_y).abs().max().item()
lab.claim("one step of graph convolution is the block's y", off, below=1e-5)

# %% [markdown] slideshow={"slide_type": "subslide"}
# Graph people know a danger: repeat the averaging, and all nodes become alike (*over-smoothing*). The
# residual path $z = x + \dots$ is often said to prevent it. **Guess:** does it? We repeat the same graph
# $k$ times, without ($\hat A^k x$) and with half of $x$ kept ($(\tfrac12 \hat A + \tfrac12 I)^k x$), and
# plot how much positions still differ: their standard deviation, relative to the start.

# %% slideshow={"slide_type": "fragment"}
graph, identity = maps[""][0, 0], torch.eye(36)
steps = list(range(9))


def differences(mixing):
    spread = [torch.linalg.matrix_power(mixing, k) @ nodes for k in steps]
    return [(s.std(dim=0).mean() / nodes.std(dim=0).mean()).item() for s in spread]


series = {
    "averaging": differences(graph),
    "with a residual path": differences((graph + identity) / 2),
}
title = "positions become alike"
plots.curve(steps, series, title=title, xlabel="repetitions k", ylabel="difference", log="y")
plt.show()
lab.claim("averaging: nearly nothing is left after 8", series["averaging"][8], below=1e-3)
kept = series["with a residual path"]
lab.claim("a residual path slows it down", kept[8] / series["averaging"][8], above=10)
lab.claim("and does not stop it: each repetition loses more", kept[8] < kept[4] < kept[0])

# %% [markdown] slideshow={"slide_type": "fragment"}
# With one fixed graph the residual path slows the smoothing and does not stop it. (Networks are saved
# by something else: a few blocks stand between many convolutions, each with its own graph and $W_z$.)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 7 · What a kind cannot do
#
# In the concatenation kind the score is $a_i + b_j$, a number of the query plus a number of the key.
# **Guess before you run it:** twenty queries, thirty keys, all random. How many *different* keys are
# somebody's favourite, under each kind?

# %% slideshow={"slide_type": "fragment"}
generator = torch.Generator().manual_seed(0)
theta, phi = torch.randn(20, 8, generator=generator), torch.randn(30, 8, generator=generator)
w_f = torch.randn(16, generator=generator)
favourites = {}
for kind in KINDS[1:]:
    f = {"w_f": w_f} if kind == "concatenation" else {}
    weights = non_local_weights(theta, phi, kind, **f)  # (20, 30)
    heard = weights.amax(dim=-1) > 0  # a ReLU can leave a query with nobody at all
    favourites[kind] = len(weights[heard].argmax(dim=-1).unique())
    print(f"{kind}: {favourites[kind]} keys, {20 - heard.sum()} queries hear nobody")
lab.claim("concatenation: one favourite for all", favourites["concatenation"], equal=1)
lab.claim("dot product: many", favourites["dot_product"], above=5)

# %% [markdown] slideshow={"slide_type": "fragment"}
# A larger $a_i$ lifts all keys alike: the concatenation ranks the keys in the same order for every query
# (*static attention*, as Brody et al. 2022 call it in graph networks). A query can set how many it hears,
# not whom. The dot product lets each query choose. (Dot product and embedded Gaussian have the same
# scores, so the same favourites.) A matrix says it shorter: $a_i + b_j$ has rank at most two.

# %% slideshow={"slide_type": "fragment"}
of_query, of_key = w_f.chunk(2)
scores = (theta @ of_query)[:, None] + (phi @ of_key)[None]
lab.claim("rank of the concatenation's scores", torch.linalg.matrix_rank(scores), equal=2)
lab.claim("rank of the dot products", torch.linalg.matrix_rank(theta @ phi.mT), equal=8)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 8 · Train it
#
# Back to the squares. The same small network with one embedded-Gaussian block of 2,192 parameters in
# the middle, 6 epochs, live.

# %% tags=["nbval-ignore-output"] slideshow={"slide_type": "fragment"}
lab.seed_everything(0)
net = small_net(NonLocalBlock(32))
history = fit_same_different(net, seed=0, device=device, epochs=6)
title = "first nothing, then the comparison is found"
plots.curve(history.steps, {"training": history.loss}, title=title, xlabel="step", ylabel="loss")
plt.show()

# %% slideshow={"slide_type": "fragment"}
accuracy = lab.train.accuracy(net, test, device=device)
lab.claim("one block: far above chance on new images", accuracy, above=0.75)

# %% tags=["nbval-ignore-output"] slideshow={"slide_type": "fragment"}
print(f"accuracy on 1,024 new images after 6 epochs: {accuracy:.2f}")

# %% [markdown] slideshow={"slide_type": "subslide"}
# The comparison, 12 epochs each, with parameters and millions of multiply–accumulates (MMACs) beside
# the accuracy. **Before you look, guess:** which kinds will solve it? Is the softmax needed? And the
# rigid ranking of section 7, will it hurt?

# %% slideshow={"slide_type": "fragment"}
lab.results.show("02_non_local.same_different")

# %% slideshow={"slide_type": "fragment"}
for row in ("Gaussian", "embedded Gaussian", "dot product"):
    lab.claim(f"{row}: solved", found[row], above=0.95)
values = table["rows"]["concatenation"]["accuracy"]["values"]
print("concatenation, seed by seed:", [round(value, 2) for value in values])
lab.claim("concatenation: one seed is at chance", min(values), below=0.55)
lab.claim("concatenation: one seed solves it", max(values), above=0.95)
block, eight = NonLocalBlock(32), four  # the four residual blocks of section 1
lab.claim("the block has 2,192 parameters", cost.parameters(block), equal=2_192)
lab.claim("eight convolutions have 74,496", cost.parameters(eight), equal=74_496)

# %% [markdown] slideshow={"slide_type": "fragment"}
# One block does what eight convolutions did not. The softmax is not what matters: the dot product has
# none and is perfect in every seed. Concatenation is the unreliable one: solved in one seed, nearly in
# another, at chance in the third. Its rigid ranking suggests itself as the reason; section 9 will speak
# against it. The question stays open.
#
# And the options of the embedded Gaussian, one changed at a time
# (`attnlab results 02_non_local.options`):

# %% slideshow={"slide_type": "subslide"}
lab.results.show("02_non_local.options")

# %% slideshow={"slide_type": "fragment"}
rows = lab.results.load("02_non_local.options")["rows"]
options = {row: metrics["accuracy"]["mean"] for row, metrics in rows.items()}
lab.claim("the dead block is at chance", options["dead: norm and W_z both 0"], below=0.6)
lab.claim("an inner width of 4 is enough here", options["inner width 4"], above=0.95)
without = options["no norm, W_z = 0"]
lab.claim("no norm: learns, and is behind", options["as in the paper"] - without, above=0.05)
for row in rows:
    print(f"{row}:", [round(value, 3) for value in rows[row]["accuracy"]["values"]])

# %% [markdown] slideshow={"slide_type": "fragment"}
# Sub-sampled keys and scores divided by $\sqrt{16}$ are each behind in one seed of three, and equal in
# the others: three seeds cannot say that they hurt.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 9 · See it
#
# **Predict first:** where does a position *on the left square* look, in the network that you have just
# trained? At its own square? At the other one, to compare? And a position of the background?

# %% slideshow={"slide_type": "fragment"}
images = test["image"][:200].to(device)
net.eval()
with torch.no_grad(), attnlab.record(net) as maps:
    answers = net(images).argmax(dim=-1)  # (200,)
weights = maps["2"][:, 0].cpu()  # (200, N, N): the block is layer 2 of the network
sample = test["image"][0]
queries = {"left square": test["masks"][0, 0], "right square": test["masks"][0, 1]}
queries["background"] = ~test["masks"][0].any(dim=0)
looks = [weights[0][mask.flatten()].mean(dim=0).reshape(16, 16) for mask in queries.values()]
plots.overlay(sample, torch.stack(looks), [f"from the {name}" for name in queries], size=2.6)
plt.show()

# %% [markdown] slideshow={"slide_type": "subslide"}
# Three times nearly the same map: whoever asks is told the same. Is that so for every position and
# every image? Half the sum of the absolute differences of two maps is the share of the weight that lies
# elsewhere: 0 for equal maps, 1 for maps without overlap. Below, for six images, the mean of the maps
# of all positions.

# %% slideshow={"slide_type": "fragment"}
common = weights.mean(dim=1)  # (200, N): the average map of each image
six = rearrange(common[:6], "b (h w) -> b h w", h=16)
plots.overlay(test["image"][:6], six, names[:6], columns=6, size=1.6)
plt.show()
among_positions = (weights - common[:, None]).abs().sum(dim=-1).mean().item() / 2
among_images = (common - common.roll(1, dims=0)).abs().sum(dim=-1).mean().item() / 2
lab.claim("between images the maps differ", among_images, above=0.5)
lab.claim("within an image they differ far less", among_positions / among_images, below=0.4)

# %% [markdown] slideshow={"slide_type": "subslide"}
# The bright spot is usually at the left edge, and not always on a square: "nothing found here" is a
# message too.
#
# A map is not a cause, so we intervene. **Guess:** every position is *given* the mean map of its image
# in place of its own, so that all receive one and the same $y$. How many of the 200 answers change? And
# when the same $y$, the mean over all images, goes to every image?

# %% slideshow={"slide_type": "fragment"}
block = net[2]
with torch.no_grad():
    x = rearrange(net[:2](images), "b c h w -> b (h w) c")  # (200, 256, 32)
    y = common[:, None].to(device) @ block.g(x)  # (200, 1, 16): one summary for each image
    given = []
    for summary in (y, y.mean(dim=0, keepdim=True)):
        z = x + block.norm(block.z(summary).mT).mT  # (200, 256, 32): everybody gets it
        given.append(net[3:](rearrange(z, "b (h w) c -> b c h w", h=16)).argmax(dim=-1).cpu())
agree = (given[0] == answers.cpu()).float().mean().item()
lab.claim("with one map for all positions, 19 of 20 answers stay or more", agree, above=0.95)
right = (given[1] == test["label"][:200]).float().mean().item()
lab.claim("with one summary for all images, the answer is near chance", right, below=0.65)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Nobody needs to look across on its own. The network found something else: all positions look at the
# *same* places, which depend on the image, so all receive the same $y$; then every position compares
# itself with it, in $x_i + W_z y$, the 1×1 convolution and its ReLU. A global summary is enough for this
# question. Cao et al. (2019, *GCNet*) report the same of non-local blocks in large networks: maps that
# hardly depend on the query. The formula allows a position to ask for what it needs; it does not make it
# do so.

# %% [markdown] slideshow={"slide_type": "subslide"}
# **On a photograph.** No network now: the two kinds of comparison from section 6 on the mean colours of
# 12×18 patches, both with their scores times 400, so that the choice is sharp. **Predict:** the Gaussian
# kind, $e^{x_i \cdot x_j}$. The query (outlined) is a pupil, the darkest patch of all: where will it
# look? And when the norms of the keys are subtracted, as in non-local means?

# %% slideshow={"slide_type": "fragment"}
photo = lab.data.photo("chelsea")
photo = F.interpolate(photo[None], size=(144, 216), antialias=True, mode="bicubic")[0].clamp(0, 1)
colours = rearrange(F.avg_pool2d(photo, 12), "c h w -> (h w) c")  # (216, 3)
norms = colours.square().sum(dim=-1)
by_product = non_local_weights(colours, colours, "gaussian", scale=400.0)
by_distance = attention_weights(colours, colours, mask=-200 * norms.expand(216, 216), scale=400.0)
row, column = 5, 12  # of the patch on one pupil, the darkest of all
looks = torch.stack([m[row * 18 + column].reshape(12, 18) for m in (by_product, by_distance)])
looks = looks / looks.amax(dim=(1, 2), keepdim=True)
titles = ["Gaussian kind: x·x'", "minus the key's norm: −‖x − x'‖²"]
plots.overlay(photo, looks, titles, mark=(row, column), label="weight / largest", size=3.4)
plt.show()

# %% slideshow={"slide_type": "fragment"}
favourite = by_product.argmax(dim=-1)  # (216,)
lab.claim("Gaussian kind: one patch is the favourite of all 216", len(favourite.unique()), equal=1)
lab.claim("and it is the one of largest norm", favourite[0] == norms.argmax())
itself = (by_distance.argmax(dim=-1) == torch.arange(216)).float().mean().item()
lab.claim("with the key's norm every patch is its own favourite", itself, equal=1)
other = by_distance[row * 18 + column, 4 * 18 + 7].item()
lab.claim("and one pupil gives the other more than a tenth of its weight", other, above=0.1)

# %% [markdown] slideshow={"slide_type": "fragment"}
# The darkest patch looks at the brightest one, and so does every other patch. With the norms subtracted
# it looks at itself, at the dark corner in the background, and at the other pupil. Explore both below:
# hover over a patch to see where it looks, and choose the layer to change the comparison.

# %% tags=["explorer", "nbval-ignore-output"] slideshow={"slide_type": "fragment"}
lab.widgets.AttentionExplorer(
    photo,
    {"x·x' (Gaussian kind)": by_product[None], "−‖x − x'‖² (non-local means)": by_distance[None]},
    grid=(12, 18),
    prefix=0,
    title="Who looks where? Two ways to compare colours",
    alt="A photograph of a cat, divided into 12 by 18 patches",
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 10 · What it costs
#
# With $N$ queries, $M$ keys, $C$ channels and inner width $C_i$, in multiply–accumulates:
#
# $$\underbrace{2 N C C_i}_{\theta,\ W_z} + \underbrace{2 M C C_i}_{\varphi,\ g} + \underbrace{2 N M C_i}_{\text{scores, sum}}$$
#
# Without sub-sampling $M = N$, and the last term is the quadratic one. With it, the *keys* are
# max-pooled by 2 in height and width (never in time), so that $M = N / 4$: the output stays at full size.
# The paper pools after $\varphi$ and $g$, which then work on all $N$ positions ($2 N C C_i$); its code pools
# $x$ before them, which is cheaper. One block in
# `layer3` of a ResNet-50 for video (the paper's res4: it counts the stem as the first stage), $C = 1024$, 4 frames of 14×14:

# %% slideshow={"slide_type": "fragment"}
clip = torch.empty(1, 1024, 4, 14, 14, device="meta")  # shapes without numbers
for about, published, keys in (("pooled before", 1.185, {"subsample": True}),
                               ("pooled after", 1.802, {"subsample": True, "pool": "after"}),
                               ("not pooled", 2.274, {})):  # fmt: skip
    with torch.device("meta"):
        block = NonLocalBlock(1024, ndim=3, impl="explicit", **keys)
    N, M = 784, 196 if keys else 784
    embedded = M if about == "pooled before" else N
    formula = (2 * N + 2 * embedded) * 1024 * 512 + 2 * N * M * 512
    lab.claim(f"{about}: formula and counter agree", cost.macs(block, clip), equal=formula)
    lab.claim(f"{about}: {published} G", formula / 1e9, equal=published, tol=5e-4)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Not every kind needs all pairs.**
#
# *Dot product.* Set the brackets the other way: $(\theta \varphi^\top) g = \theta (\varphi^\top g)$. The
# second factor is $(C_i, C_i)$, whatever $N$ is. That is what the hand calculation of section 3 showed.
#
# *Concatenation.* $\sum_j \operatorname{ReLU}(a_i + b_j)\, g_j$ runs over the keys with $b_j > -a_i$.
# Sort the keys by falling $b$, once, and let $n_i$ be how many have $b_j > -a_i$. With cumulative sums
# $y_i = \tfrac1M \big(a_i \sum_{j \le n_i} g_j + \sum_{j \le n_i} b_j g_j\big)$. What made this kind rigid makes it cheap.
#
# *The Gaussians* have no such form: the softmax stands between the two products. The fused kernel
# saves them the memory, not the arithmetic.
#
# **Before you run it:** by what factor does the extra memory of each grow when $N$ doubles?

# %% slideshow={"slide_type": "fragment"}
sides = [16, 24, 32, 48]
positions = [side**2 for side in sides]


def extra_memory(kind, impl, side):
    """MiB that a forward pass needs beside its input: 16 channels."""
    block = NonLocalBlock(16, kind=kind, impl=impl).to(device)
    image = torch.randn(1, 16, side, side, device=device)
    with torch.no_grad():
        return cost.peak_memory(partial(block, image), device=device) / 2**20


memory = {f"{kind}, fused": [extra_memory(kind, "fused", s) for s in sides] for kind in KINDS[1:]}
explicit = [extra_memory("embedded_gaussian", "explicit", s) for s in sides]
memory = {"embedded_gaussian, explicit": explicit} | memory
plots.curve(
    positions, memory, xlabel="positions N", ylabel="extra memory (MiB)", log="xy", size=3.5
)
plt.show()
for name, values in memory.items():
    grows = cost.growth(positions, values)
    if "explicit" in name:
        lab.claim(f"{name}: grows nearly with N²", grows, above=1.7)
    else:
        lab.claim(f"{name}: far from it", grows, below=1.4)

# %% [markdown] slideshow={"slide_type": "subslide"}
# The explicit form nearly quadruples when $N$ doubles; dot product and concatenation about double, the
# fused Gaussian grows in steps, with its kernel's work space. Memory does not tell them apart, arithmetic does. **Guess** the exponents of the time, then
# measure it on your machine: a forward pass of the bare operator, width 32.

# %% tags=["nbval-ignore-output"] slideshow={"slide_type": "fragment"}
times = {}
for kind in KINDS[1:]:
    f = {"w_f": torch.randn(64, device=device)} if kind == "concatenation" else {}
    times[kind] = []
    for n in positions:
        theta, phi, g = torch.randn(3, 1, 1, n, 32, device=device)
        run = partial(non_local, theta, phi, g, kind, impl="fused", **f)
        times[kind].append(1_000 * cost.latency(run, repeats=20))
plots.curve(positions, times, xlabel="positions N", ylabel="milliseconds", log="xy", size=3.5)
plt.show()
for kind, values in times.items():
    print(f"{kind}: N^{cost.growth(positions, values):.2f}")

# %% [markdown] slideshow={"slide_type": "fragment"}
# The count says 2 for the Gaussian and 1 for the other two (a little more with the sort). A measured
# exponent can be off where the calls take microseconds, or while the machine does other things.

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Where blocks go.** Early maps are large: in `layer1` of an image ResNet-50, 56×56, the pairs
# of one block cost more than everything else in it. The paper puts one block before the last residual
# block of `layer3`, or five: two in `layer2` and three in `layer3`, after every other
# residual block. In `attnlab` a ResNet has places for such guests; no other parameter changes its name.

# %% slideshow={"slide_type": "fragment"}
places = {"no block": [], "1 block": ["layer3.4"],
          "5 blocks": ["layer2.1", "layer2.3", "layer3.1", "layer3.3", "layer3.5"]}  # fmt: skip
for about, where in places.items():
    with torch.device("meta"):
        after = {place: partial(NonLocalBlock, subsample=True) for place in where}
        network = resnet50(after=after)
    print(f"{about}: {cost.parameters(network):,} parameters")
added = cost.parameters(network) - 25_557_032
lab.claim("five blocks add 7.358 million parameters", added / 1e6, equal=7.358, tol=5e-4)
lab.claim("the paper's R101 had 43.2: 1.17 times", 1 + added / 43.2e6, equal=1.17, tol=5e-3)

# %% slideshow={"slide_type": "fragment"}
torch.manual_seed(0)
plain = resnet50(num_classes=10).eval()
guest = resnet50(num_classes=10, after={"layer3.4": NonLocalBlock}).eval()
missing, unexpected = guest.load_state_dict(plain.state_dict(), strict=False)
image = torch.rand(1, 3, 64, 64)
with torch.no_grad():
    off = (guest(image) - plain(image)).abs().max().item()
lab.claim("every parameter of before has its place", len(unexpected), equal=0)
lab.claim("only the guest's are new", {key.split(".")[2] for key in missing} == {"after"})
lab.claim("and the logits are those of before, bit for bit", off, equal=0)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 11 · Paper and here
#
# Published: Wang et al. 2018; Kinetics-400, top-1 %, a ResNet-50 without 3-D convolutions (C2D) unless
# said otherwise.
#
# | claim | published | here | why they may differ |
# |---|---|---|---|
# | the four kinds are alike | table 2a: none 71.8; Gaussian 72.5, embedded 72.7, dot product 72.9, concatenation 72.8 | 1.000, 0.993, 1.000, and 0.796 ± 0.267 where convolutions stay at chance, section 8 | a toy that needs one comparison; there, a little context for a trained network |
# | depth does not replace a block | section 5.1: plain residual blocks did not help (no number); table 2c: 5 blocks on R50 73.8, R101 without 73.1 | four residual blocks: chance, section 1 | ours is an extreme task, and 12 epochs |
# | a block helps in any stage, least in the last | table 2b: res2 72.7, res3 72.9, res4 72.7, res5 72.3 | not measured | needs a real video set |
# | more blocks are better | table 2c, R50: 1, 5, 10 blocks 72.7, 73.8, 74.3 (R101: 74.3, 75.1, 75.1) | not measured | the same |
# | space and time together | table 2d, R50: space 72.9, time 73.1, both 73.8 | not measured here | chapter 06 has a motion task |
# | 5 blocks cost 1.2 times the parameters | table 2e, R101: 43.2 M before | 7.358 M more, so 1.17 times, section 10 | rounding |
# | a new block changes nothing | section 4.1 (argument) | difference exactly 0, section 10 | – |
# | positions find the related ones | figures 1 and 3: arrows for chosen positions | nearly one map for all positions of an image, section 9 | a small net on a toy; chosen examples there |

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 12 · Exercises
#
# Write the body, run the cell, run the check. `lab.hint("non_local.first_gradients")` gives a hint,
# `lab.solution("non_local.first_gradients")` the solution.
#
# **1 · Why zeros in one place, not in two** (5 minutes).


# %% exercise="non_local.first_gradients" tags=["exercise"] slideshow={"slide_type": "fragment"}
def first_gradients(
    x: torch.Tensor, y: torch.Tensor, target: torch.Tensor, gamma: torch.Tensor, w: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of L = ½ Σ (z − target)² for a block of one channel, z = x + gamma · w · y.

    x, y, target: (positions,); y is what the non-local sum gave, w stands for W_z and gamma for the
    weight of the norm behind it, both (). No autograd: write the two formulas.
    Returns ∂L/∂gamma and ∂L/∂w, both ().
    """
    raise NotImplementedError


# %% slideshow={"slide_type": "fragment"}
lab.check("non_local.first_gradients", first_gradients)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **2 · All that a dot product needs to know** (5 minutes). Then the open part: can a softmax over the
# keys be treated in the same way? What would $f$ have to be?


# %% exercise="non_local.dot_product_summary" tags=["exercise"] slideshow={"slide_type": "fragment"}
def dot_product_summary(phi: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """All that the dot-product kind needs to know of its keys, whatever the query.

    phi: (B, M, d) and g: (B, M, dv). For every query θ_i, (d,), the kind returns
    y_i = 1/M Σ_j (θ_i · φ_j) g_j. Find the matrix S with y = θ @ S: it has no axis of length M.
    Returns S, (B, d, dv).
    """
    raise NotImplementedError


# %% slideshow={"slide_type": "fragment"}
lab.check("non_local.dot_product_summary", dot_product_summary)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **3 · Pairs without a tensor of pairs** (10 minutes).


# %% exercise="non_local.concatenation_weights" tags=["exercise"] slideshow={"slide_type": "fragment"}
def concatenation_weights(
    theta: torch.Tensor, phi: torch.Tensor, w_f: torch.Tensor
) -> torch.Tensor:
    """Weights of the concatenation kind, f / C = ReLU(w_f · [θ_i; φ_j]) / M, in little memory.

    theta: (B, N, d). phi: (B, M, d). w_f: (2d,); [θ_i; φ_j] is θ_i with φ_j behind it.
    No tensor larger than the result is needed: split the product into a part of i and a part of j.
    Returns (B, N, M).
    """
    raise NotImplementedError


# %% slideshow={"slide_type": "fragment"}
lab.check("non_local.concatenation_weights", concatenation_weights)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **4 · What a block costs** (10 minutes). The three numbers of section 10 must come out.


# %% exercise="non_local.block_macs" tags=["exercise"] slideshow={"slide_type": "fragment"}
def block_macs(channels: int, positions: int, subsample: bool, pool: str) -> int:
    """Number of multiply–accumulates of one embedded-Gaussian block on one image or clip.

    The inner width is channels // 2. With subsample, every fourth position is left as a key
    (positions is a multiple of 4): pool == "before" pools x and then embeds the keys by φ and g,
    pool == "after" embeds all positions and then pools. Count the four 1×1 convolutions and the two
    products of all pairs (scores, weighted sum); pooling, softmax and norm count nothing.
    """
    raise NotImplementedError


# %% slideshow={"slide_type": "fragment"}
lab.check("non_local.block_macs", block_macs)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **5 · Find the bug** (10 minutes). This block has the right shapes, and it trains. One line is wrong:
# mend it here.


# %% exercise="non_local.buggy_block" tags=["exercise"] slideshow={"slide_type": "fragment"}
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
    return x + z.reshape(x.shape)


# %% slideshow={"slide_type": "fragment"}
lab.check("non_local.buggy_block", buggy_block)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 13 · Take home
#
# - A non-local block is one attention layer on a ConvNet's positions, added to them. Zeros in *one* place
#   make it start as the identity; zeros in two kill it.
# - Non-local means, the bilateral filter and graph convolution are the same weighted sum with another
#   comparison. A dot product is not a similarity: large keys win.
# - The Gaussians cost $N^2$ in arithmetic, fused or not; the dot product and the concatenation need not.
#
# **Common misconceptions.** *Non-local block = transformer* (no LayerNorm, MLP, heads or positions).
# *Sub-sampling makes the output smaller* (only the keys shrink). *The softmax is essential* (the dot
# product has none and is perfect here). *Zero weights stop learning* ($\gamma$ has a gradient).
# *Each position looks where it needs to* (look at the maps first).
#
# **Where next.** All positions may look at one and the same summary; then one summary for the image is
# enough, and it need not have positions at all. Chapter 03 takes that path: squeeze-and-excitation
# averages positions away and weighs *channels*, which the non-local block never does.
#
# **References.** Wang et al. 2018, *Non-local neural networks*, sections 3.1 to 3.3 and 5.1 · Buades,
# Coll & Morel 2005, *A non-local algorithm for image denoising* · Tomasi & Manduchi 1998, *Bilateral
# filtering for gray and color images* · Cao et al. 2019, *GCNet* · Brody et al. 2022, *How attentive are
# graph attention networks?*
