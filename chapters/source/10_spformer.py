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
# # 10 · SPFormer: attention that learns superpixels
#
# **At the end you can** write superpixel cross-attention from its equations without ever copying a
# pixel, use its association to carry anything from few tokens back to every pixel, and measure
# whether a token's outline means anything.
#
# | | |
# |---|---|
# | to read | 60 minutes, exercises another 40 |
# | to run | about a minute and a half on two CPU cores |
# | you need | chapter 01 (attention, patches as tokens) |
# | paper | Mei, Chen, Yuille, Xie 2024, *SPFormer: enhancing vision transformer with superpixel representation*, arXiv 2401.02931 |
#
# Two other papers call something else SPFormer (segmenting 3-D point clouds, hyperspectral images). The
# authors published no code under this name. What the paper's text leaves open is an option in
# `attnlab/spformer.py`, and this chapter runs the defaults, but
# for one: its small networks start the LayerScales around the exchange at 0.1, for a few hundred steps are
# too few to grow them from $10^{-5}$.

# %% slideshow={"slide_type": "skip"}
from itertools import product

import matplotlib.pyplot as plt
import torch
from einops import einsum, rearrange
from torch.nn import functional as F
from torch.testing import assert_close

from attnlab import lab, spformer
from attnlab import superpixel as sp
from attnlab.attention import deit_small, deit_tiny
from attnlab.lab import cost, metrics, plots
from attnlab.lab import superpixel_metrics as sm
from attnlab.lab.experiments import ch10
from attnlab.superpixel_baselines import lab_xy, ssn

device = lab.device()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 1 · The failure
#
# The tokens of chapter 01 are squares: 16×16 pixels of a 224-pixel image, 8×8 of our 64-pixel scenes.
# A square knows nothing of what is inside it. Where it lies across the border of a thing, its one
# token stands for both sides. How much does that cost? Ask an **oracle**: tell every patch the best
# single label it could have, and count the pixels that are wrong all the same. No network that gives
# one answer a patch can do better.
#
# **Before you run it:** which share of all pixels is wrong even with the best label for each of 64 squares?

# %% slideshow={"slide_type": "fragment"}
test = ch10.scenes("test_scenes", 512)  # 64-pixel scenes with two things each
batch = test.batch(range(128))
images, truth = batch["image"], ch10.things(batch)  # (128, 3, 64, 64), (128, 64, 64): 1 on a thing


def best_labels(segments):
    """The oracle: each segment's most frequent label, at all of its pixels; and its mIoU."""
    best = sm.majority(segments, truth, num_classes=2)
    return best, metrics.mean_iou(metrics.confusion_matrix(best, truth, 2))


patches = sp.hard_labels(ch10.patches(images))[:, 0]  # (128, 64, 64): the number of the patch
by_patch, of_patches = best_labels(patches)
lab.claim(
    "the best label per 8×8 patch reaches an mIoU of about 0.8, not 1", of_patches, below=0.85
)
straddling = (by_patch != truth).float().mean().item()
print(f"no label per patch can get {100 * straddling:.1f} % of the pixels right;",
      f"things cover {100 * truth.float().mean():.0f} % of them")  # fmt: skip

# %% [markdown] slideshow={"slide_type": "subslide"}
# (That is more than it sounds, for things cover few of the pixels.)
#
# Image processing has an older answer: do not cut along a grid, cut where the colors change.
# **SLIC** (Achanta et al. 2012) is k-means over color and place, in which a pixel looks only at
# centers nearby. Asked for 64 segments, as many as there were squares (a few get lost):

# %% slideshow={"slide_type": "fragment"}
slic = sm.slic(images, n_segments=64)
by_slic, of_slic = best_labels(slic)
lab.claim("SLIC's oracle is better by over 0.05", of_slic - of_patches, above=0.05)
print(f"oracle mIoU {of_patches:.3f} with 64 patches, {of_slic:.3f} with",
      f"{sm.segments(slic).float().mean():.0f} segments of SLIC on average")  # fmt: skip


# %% slideshow={"slide_type": "fragment"}
def outlined(image, segments, zoom=5):
    """The image (3, H, W), enlarged, with the borders between segments (H, W) drawn in yellow."""
    large = segments.cpu().repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
    picture = image.cpu().repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    edge = sm.boundaries(large[None])[0]
    return torch.where(edge, torch.tensor([1.0, 0.85, 0.0])[:, None, None], picture)


one = 3
wrong = [(by_patch != truth)[one].float(), (by_slic != truth)[one].float()]
plots.show_images(
    [outlined(images[one], patches[one]), wrong[0], outlined(images[one], slic[one]), wrong[1]],
    ["64 patches", "wrong at best", "SLIC", "wrong at best"],
    title="what squares lose lies along the outline", size=2.0,
)  # fmt: skip
plt.show()

# %% [markdown] slideshow={"slide_type": "fragment"}
# (The thing at the bottom belongs to the background photograph. The truth counts only the two that were
# pasted in; a network that marks it, in section 7, is charged for it.)

# %% [markdown] slideshow={"slide_type": "notes"}
# SLIC's trouble is another one: it knows color and place and nothing else, it is not
# differentiable, and a network cannot tell it what matters. Always print the number of segments
# beside an oracle: more segments are better for nothing.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 2 · The idea in one picture
#
# Keep **two grids**. A fine one of pixels, which is only ever looked at locally, and a coarse one of
# superpixels, one for each square cell, on which the transformer works. A pixel may belong, softly, to
# the superpixel of its own cell and to the eight around it: nine candidates. Read the other way round,
# a superpixel hears the pixels of nine cells. Nothing moves and nothing is searched for, so that both
# directions are small attentions that a network can learn.

# %% slideshow={"slide_type": "fragment"}
near = sp.neighbors9(6, 6)  # (6, 6, 9): the nine superpixels of each cell, −1 where there is none
with plots.style():
    figure, axes = plt.subplots(1, 2, figsize=(8, 4))
candidates = torch.isin(torch.arange(36), near[1, 2]).float().view(6, 6)
window = (near == 3 * 6 + 5).any(-1).float()  # cells whose pixels hear superpixel (3, 5)
titles = ["pixel i (dot) chooses among 9 superpixels: $N_i$",
          "superpixel p at the border hears 6 cells: $W_p$"]  # fmt: skip
for ax, shown, title in zip(axes, (candidates, window), titles, strict=True):
    ax.imshow(shown, cmap="viridis", vmin=-0.5, vmax=1.2, extent=(0, 24, 24, 0))
    ax.set(title=title, xticks=range(0, 25, 4), yticks=range(0, 25, 4), xlabel="pixel")
    ax.grid(color="white", linewidth=2)
for y, x in product(range(6), range(6)):
    axes[0].text(4 * x + 2, 4 * y + 2, "S", ha="center", va="center", color="black", alpha=0.5)
axes[0].plot(4 * 2 + 2.5, 4 * 1 + 0.5, "o", color="black")
axes[1].text(4 * 5 + 2, 4 * 3 + 2, "p", ha="center", va="center", color="black", fontsize=14)
plt.show()
lab.claim(
    "a superpixel hears 9, 6 or 4 cells", set((near >= 0).sum(-1).flatten().tolist()) == {4, 6, 9}
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 3 · k-means, written as attention
#
# One round of k-means among nine candidates: every pixel $x_i$ chooses the nearest center, every
# center becomes the mean of its pixels. Make the choice soft and you have **SSN** (Jampani et al.
# 2018), the differentiable SLIC:
#
# $$Q(i, p) = \operatorname{softmax}_{p \in N_i}\big(-\lVert x_i - c_p \rVert^2\big), \qquad
# c_p \leftarrow \frac{\sum_i Q(i, p)\, x_i}{\sum_i Q(i, p)}$$
#
# Multiply the square out: $-\lVert x \rVert^2 + 2\, x \cdot c - \lVert c \rVert^2$. The first term is
# the same for all candidates, so that the softmax does not see it. What is left is a dot product of a
# query $2x$ with a key $c$, **minus the square of the key's length**. That is where the likeness with attention
# ends for the first time: a plain dot product has no such term.

# %% slideshow={"slide_type": "fragment"}
torch.manual_seed(0)
x = torch.randn(1, 1, 2, 3, 16, 5, dtype=torch.float64)  # cells: (B, M, Sh, Sw, s², d)
c = torch.randn(1, 1, 2, 3, 5, dtype=torch.float64)  # grid: (B, M, Sh, Sw, d)
gathered = sp.gather9(c)[..., None, :, :]  # the nine candidates, for each pixel of a cell
by_distance = sp.mask_absent(-(x[..., None, :] - gathered).square().sum(-1)).softmax(-1)
dot = sp.local_logits(x, c, scale=2.0)  # (1, 1, 2, 3, 16, 9): pixel against candidate
by_product = (dot - gathered.square().sum(-1)).softmax(-1)
gap = (by_distance - by_product).abs().max().item()
lab.claim("distances are dot products less the key's squared length", gap, below=1e-12)
plain = (by_distance - dot.softmax(-1)).abs().max().item()
lab.claim("without that term it is another assignment", plain, above=0.3)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Before you run it:** the centers begin as the means of the squares. After how many rounds is most of
# the patches' loss made good?

# %% slideshow={"slide_type": "fragment"}
features = lab_xy(images, side=8)  # color (CIE Lab) and place, on SSN's scales: (128, 5, 64, 64)
rounds = {0: patches} | {t: sp.hard_labels(ssn(features, 8, t)[0])[:, 0] for t in (1, 2, 10)}
oracles = {t: best_labels(segments)[1] for t, segments in rounds.items()}
plots.show_images(
    [outlined(images[one], segments[one]) for segments in rounds.values()],
    [f"round {t}: {score:.3f}" for t, score in oracles.items()],
    title="soft k-means, round by round; oracle mIoU of 128 scenes", size=2.0,
)  # fmt: skip
plt.show()
share = (oracles[1] - oracles[0]) / (oracles[10] - oracles[0])
lab.claim("the first round brings most of what ten rounds bring", share, above=0.8)

# %% [markdown] slideshow={"slide_type": "subslide"}
# After one: it makes good more than half of what squares lose, and most of what ten rounds make good. To
# choose among nine at all is the step; to move the centers refines it. That makes two rounds a
# plausible number for a network; it does not prove it.
#
# **Where the likeness ends for the second time.** SSN collects with the weights of the *pixels*: $Q$
# sums to 1 over a pixel's candidates, and is divided by its sum at each center. SPFormer lets the
# superpixel attend: a softmax over *its* pixels. Two softmaxes of the same numbers over different sets.

# %% slideshow={"slide_type": "fragment"}
logits = sp.local_logits(x, c)
collected = sp.collect_means(logits.softmax(-1), x)  # SSN: the pixels' weights, divided
attended = sp.p2s_attend(logits, x)  # SPFormer: softmax over a superpixel's window
lab.claim("the two updates differ", (collected - attended).abs().max().item(), above=0.1)
over_pixels = sp.collect(logits.softmax(-1), torch.ones_like(x[..., :1]))
print(
    "what pixels give to each superpixel, in sum:", over_pixels.flatten().round(decimals=1).tolist()
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 4 · The mathematics, with shapes
#
# Queries, keys and values of both grids are learned linear maps, six in all, applied to the grids plus
# a position (a depthwise 3×3 convolution). Weights are per head, of $M$ heads of width $d = C_p / M$; what
# the heads bring is put side by side before $\gamma$:
#
# $$S(p) \leftarrow S(p) + \gamma_s \sum_{i \in W_p} \operatorname{softmax}_{i \in W_p}\Big(\tfrac{q_s(p) \cdot k_p(i)}{\sqrt d}\Big)\, v_p(i) \qquad \text{(P2S)}$$
#
# $$Q(i, p) = \operatorname{softmax}_{p \in N_i}\Big(\tfrac{q_p(i) \cdot k_s(p)}{\sqrt d}\Big), \qquad
# I(i) \leftarrow I(i) + \gamma_p \sum_{p \in N_i} Q(i, p)\, v_s(p) \qquad \text{(S2P)}$$
#
# and, for anything $A$ that is known of superpixels (features, class scores, labels), **Eq. (1)** of the paper:
#
# $$A(i) = \sum_{p \in N_i} Q(i, p)\, A(p)$$
#
# where the logits of the heads are merged before the softmax, $\sum_m L_m / \sqrt M$: what one head of
# width $C_p$ would have computed.
#
# | symbol | shape | what it is |
# |---|---|---|
# | $I$ | $(C_p, h, w)$ | pixels, after a stem of stride $r$: 64 channels of 56×56 in SPFormer-S/16 |
# | $S$ | $(C_s, S_h, S_w)$ | superpixels, $S_h = h / s$: 384 channels of 14×14, with cells of $s = 4$ |
# | $N_i$, $W_p$ | ≤ 9 and ≤ $9 s^2$ | candidates of a pixel; pixels that a superpixel hears (section 2) |
# | $Q$ | $(M, h, w, 9)$ | the association: per head, each pixel's weights on its candidates |
# | $q_p$, $k_p$; $q_s$, $k_s$ | $(M, d, h, w)$; $(M, d, S_h, S_w)$ | queries and keys of pixels; of superpixels |
# | $v_p$; $v_s$ | $(M, C_s/M, h, w)$; $(M, C_p/M, S_h, S_w)$ | values: what pixels give to superpixels; and back |
# | $\gamma_s$, $\gamma_p$ | $(C_s)$, $(C_p)$ | LayerScale, $10^{-5}$ at first: superpixels begin as pooled patches |
#
# Both updates start from the grids of the round before ("parallel"). After $t = 2$ rounds come blocks of
# ordinary self-attention among the superpixels (with a learned position added first); what they found is expanded by Eq. (1), added to the
# pixels, and a second pair of rounds follows. The mean of the superpixels is classified.
# Absent candidates at the border are masked. A key of zeros would not do: it gets the weight $e^0$.

# %% [markdown] slideshow={"slide_type": "subslide"}
# ### By hand, once
#
# Two cells in a row with one pixel each ($s = 1$, $d = 1$), so that both pixels see both superpixels.
# $k_p = (0, 2)$, $q_s = (1, -1)$, $v_p = (10, 20)$; $q_p = (1, 0)$, $k_s = (0, 1)$, $v_s = (1, 3)$.

# %% slideshow={"slide_type": "fragment"}
k_p, q_s, v_p = torch.tensor([0.0, 2.0]), torch.tensor([1.0, -1.0]), torch.tensor([10.0, 20.0])
q_p, k_s, v_s = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 3.0])
W = torch.outer(q_s, k_p).softmax(-1)  # a row for each superpixel, over its pixels
Q = torch.outer(q_p, k_s).softmax(-1)  # a row for each pixel, over its superpixels
print("superpixels' weights", [[round(w, 2) for w in row] for row in W.tolist()])
print("superpixels receive ", [round(v, 2) for v in (W @ v_p).tolist()])
print("association Q       ", [[round(w, 2) for w in row] for row in Q.tolist()])
print("pixels receive      ", [round(v, 2) for v in (Q @ v_s).tolist()])

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 5 · Build it three times
#
# **First as a loop**, for one image and one head, with softmax attention written out.


# %% slideshow={"slide_type": "fragment"}
def attend(query, keys, values):
    """One query (d,), keys and values of n: lists of (d,) → (d,)."""
    weights = torch.stack([query @ key / len(key) ** 0.5 for key in keys]).softmax(0)
    return sum(weight * value for weight, value in zip(weights, values, strict=True))


def exchange_loop(q_p, k_p, v_p, q_s, k_s, v_s, s):
    """Pixels' q, k, v (d, h, w) and superpixels' (d, Sh, Sw) → what superpixels, pixels receive."""
    rows, columns = q_s.shape[1:]
    cells = list(product(range(rows), range(columns)))
    pixels = list(product(range(rows * s), range(columns * s)))

    def touch(i, p):  # is p the cell of pixel i or one around it?
        return max(abs(i[0] // s - p[0]), abs(i[1] // s - p[1])) <= 1

    to_superpixels, to_pixels = torch.zeros_like(q_s), torch.zeros_like(q_p)
    for p in cells:
        heard = [(k_p[:, y, x], v_p[:, y, x]) for y, x in pixels if touch((y, x), p)]
        to_superpixels[:, p[0], p[1]] = attend(q_s[:, p[0], p[1]], *zip(*heard, strict=True))
    for i in pixels:
        heard = [(k_s[:, y, x], v_s[:, y, x]) for y, x in cells if touch(i, (y, x))]
        to_pixels[:, i[0], i[1]] = attend(q_p[:, i[0], i[1]], *zip(*heard, strict=True))
    return to_superpixels, to_pixels


# %% [markdown] slideshow={"slide_type": "subslide"}
# **Then with `F.unfold`**, which cuts out the windows: short, but it writes every pixel down nine times.


# %% slideshow={"slide_type": "fragment"}
def exchange_unfold(q_p, k_p, v_p, q_s, k_s, v_s, s):
    """The same for (B, d, h, w) and (B, d, Sh, Sw)."""

    def windows(x):  # (B, superpixels, 9s² pixels, d)
        cut = F.unfold(x, 3 * s, padding=s, stride=s)
        return rearrange(cut, "b (d n) p -> b p n d", n=9 * s * s)

    def candidates(x):  # (B, superpixels, 9, d)
        return rearrange(F.unfold(x, 3, padding=1), "b (d k) p -> b p k d", k=9)

    def weights(logits, there):
        return (logits / q_s.shape[1] ** 0.5).masked_fill(~there, -torch.inf).softmax(-1)

    there = windows(torch.ones_like(q_p[:, :1]))[..., 0] > 0
    asked = einsum(rearrange(q_s, "b d y x -> b (y x) d"), windows(k_p), "b p d, b p n d -> b p n")
    found = einsum(weights(asked, there), windows(v_p), "b p n, b p n d -> b d p")
    there = candidates(torch.ones_like(q_s[:, :1]))[:, :, None, :, 0] > 0
    cells = rearrange(q_p, "b d (y i) (x j) -> b (y x) (i j) d", i=s, j=s)
    Q = weights(einsum(cells, candidates(k_s), "b p n d, b p k d -> b p n k"), there)
    spread = einsum(Q, candidates(v_s), "b p n k, b p k d -> b p n d")
    back = {"y": q_s.shape[2], "i": s}
    return (rearrange(found, "b d (y x) -> b d y x", y=back["y"]),
            rearrange(spread, "b (y x) (i j) d -> b d (y i) (x j)", **back))  # fmt: skip


# %% [markdown] slideshow={"slide_type": "subslide"}
# **Then the library's.** Pixels are sorted by cell once, and never copied. `gather9` copies
# *superpixels* nine times, which are few; its adjoint `fold9` adds up what nine cells have for
# one. The sums of a softmax over a window are such sums: each cell adds up $e^{L - m}$ and
# $e^{L - m} v$ of its own pixels, with $m$ the largest logit of the *window*, and `fold9` does the rest.


# %% slideshow={"slide_type": "fragment"}
def exchange_library(q_p, k_p, v_p, q_s, k_s, v_s, s, impl="auto"):
    """The same; cells are (B, Sh, Sw, s², d), a grid (B, Sh, Sw, d), logits (B, Sh, Sw, s², 9)."""
    q_p, k_p, v_p = (sp.to_cells(x, s) for x in (q_p, k_p, v_p))
    q_s, k_s, v_s = (rearrange(x, "b d y x -> b y x d") for x in (q_s, k_s, v_s))
    found = sp.p2s_attend(sp.local_logits(k_p, q_s), v_p, impl)
    spread = sp.spread(sp.local_logits(q_p, k_s).softmax(-1), v_s)
    return rearrange(found, "b y x d -> b d y x"), sp.from_cells(spread)


def values_and_gradients(function, tensors):
    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    results = function(*tensors)
    total = sum(result.square().sum() for result in results)
    return [*(r.detach() for r in results), *torch.autograd.grad(total, tensors)]


# %% slideshow={"slide_type": "subslide"}
def loop(*tensors):
    both = [exchange_loop(*one_image, 2) for one_image in zip(*tensors, strict=True)]
    return [torch.stack(part) for part in zip(*both, strict=True)]


torch.manual_seed(0)
given = [torch.randn(2, 3, *size, dtype=torch.float64) for size in [(4, 6)] * 3 + [(2, 3)] * 3]
expected = values_and_gradients(loop, given)
versions = {
    "F.unfold": lambda *t: exchange_unfold(*t, 2),
    "library, explicit": lambda *t: exchange_library(*t, 2, "explicit"),
    "library, fused": lambda *t: exchange_library(*t, 2, "fused"),
}
for name, version in versions.items():
    for ours, loops in zip(values_and_gradients(version, given), expected, strict=True):
        assert_close(ours, loops, rtol=0, atol=1e-10)
    print(f"✔ {name}: two values and six gradients equal the loop's")

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Is it the real thing?** There is no published implementation to compare with, so that two other
# checks have to do. The sizes: built from the text, S/32 needs fewer multiply–accumulates than DeiT-T,
# which the paper says of it. And the invariants: what is outside a superpixel's window does not reach it.

# %% slideshow={"slide_type": "fragment"}
with torch.device("meta"):
    image = torch.rand(1, 3, 224, 224)
    table = {
        "DeiT-T/16": deit_tiny(), "SPFormer-S/32": spformer.spformer_small_patch32(),
        "DeiT-S/16": deit_small(), "SPFormer-S/16": spformer.spformer_small_patch16(),
    }  # fmt: skip
    for name, net in table.items():
        macs = cost.macs(net.eval(), image) / 1e9
        print(f"{name:14s}{cost.parameters(net) / 1e6:7.2f} M parameters {macs:6.2f} G MACs")
smaller = cost.macs(table["SPFormer-S/32"], image) / cost.macs(table["DeiT-T/16"], image)
lab.claim("SPFormer-S/32 has fewer MACs than DeiT-T", smaller, below=1)

# %% slideshow={"slide_type": "fragment"}
big = [torch.randn(1, 3, *size) for size in [(16, 16)] * 3 + [(4, 4)] * 3]
before, _ = exchange_library(*big, 4)
changed = [part.clone() for part in big]
for part in changed[:3]:
    part[..., 8:, :] = 7.0  # all pixels of cell rows 2 and 3
after, _ = exchange_library(*changed, 4)
moved = (before - after).abs().amax((0, 1, 3))
lab.claim("superpixels two cells away notice nothing", moved[0].item(), equal=0)
lab.claim("their neighbors do", moved[1].item(), above=0.1)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 6 · See it
#
# The checkpoint is a small network (210,000 parameters, 64 superpixels of width 64, two stages of two
# rounds each, pixels of stride 2) that was trained with the *masks* of 4,096 scenes: every superpixel is
# classified as thing or background, Eq. (1) carries the scores to the pixels, and the loss is there. Nothing
# ever told it what a superpixel is.
#
# **Predict:** four associations are computed on the way, and only the last one carries the scores. What
# will the first three look like?

# %% slideshow={"slide_type": "fragment"}
print("trained by:", lab.checkpoints.info("spformer_micro_masks")["command"])
model = lab.checkpoints.load("spformer_micro_masks", device=device)
backbone = model.backbone
with torch.no_grad():
    _, info = backbone.forward_features(images.to(device), return_info=True)


def segments_of(logits):
    """Each pixel's likeliest superpixel, heads merged, at the image's size: (B, 64, 64)."""
    fine = sp.upsample_association(sp.merge_heads(logits), backbone.stem_stride)
    return sp.hard_labels(fine)[:, 0].cpu()


rounds = [segments_of(step["logits"]) for step in info]
scores = [best_labels(segments)[1] for segments in rounds]
titles = [
    f"stage {step['stage'] + 1}, round {step['iter'] + 1}: {score:.2f}"
    for step, score in zip(info, scores, strict=True)
]

# %% slideshow={"slide_type": "fragment"}
plots.show_images(
    [outlined(images[one], segments[one]) for segments in rounds], titles,
    title="likeliest superpixel of every pixel; oracle mIoU of 128 scenes (squares: 0.80)", size=2.0,
)  # fmt: skip
plt.show()
lab.claim("the last association beats squares", scores[-1] - of_patches, above=0.05)
lab.claim("and the three before it", scores[-1] - max(scores[:-1]), above=0.02)

# %% [markdown] slideshow={"slide_type": "subslide"}
# None is a grid, and two of the first three beat squares already, though the loss reaches them only through
# what they do to the features; the round between them does not. A superpixel need not be connected, nor
# contain its own cell, and where all is one color the map is arbitrary. The last one was asked for
# outlines, by the loss that goes through it, and it has the best.
#
# The heads do not have to agree either. Each is a partition of its own, into the same 64 superpixels:

# %% slideshow={"slide_type": "fragment"}
last = info[-1][
    "logits"
]  # (128, 2, 8, 8, 16, 9): images, heads, cells, pixels of a cell, candidates
fine = sp.upsample_association(last, backbone.stem_stride)
by_head = sp.hard_labels(fine).cpu()
sharpness = sm.sharpness(last).mean(0).tolist()
plots.show_images(
    [outlined(images[one], by_head[one, m]) for m in range(2)],
    [f"head {m}" for m in range(2)], title="two heads of the last association", size=2.0,
)  # fmt: skip
plt.show()
print("mean weight of a pixel's likeliest superpixel, by head:", [round(w, 2) for w in sharpness])

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Point at it.** Hover over the picture: the map is the soft association of the superpixel that the
# place under the pointer mostly belongs to, of stage 1 or of stage 2 (menu): which pixels are how much
# its own. On paper, the picture further down does the same for one superpixel.


# %% slideshow={"slide_type": "fragment"}
def pointed(logits):
    """Association as the explorer wants it: (1, 256, 256), for the 16×16 squares of 4 pixels."""
    Q = sp.dense_association(sp.merge_heads(logits).softmax(-1))[0, 0]  # (1024 pixels, 64)
    squares = rearrange(Q, "(y i x j) p -> (y x) (i j) p", y=16, i=2, j=2).mean(1)
    return squares.mT[squares.argmax(-1)][None].cpu()


soft = {f"stage {k + 1}": pointed(info[2 * k + 1]["logits"][one, None]) for k in range(2)}
reach = (soft["stage 2"][0] > 0).float().mean().item()
lab.claim("no superpixel owns more than nine of the 64 cells", reach, below=9.01 / 64)

# %% tags=["explorer", "nbval-ignore-output"] slideshow={"slide_type": "fragment"}
lab.widgets.AttentionExplorer(
    images[one], soft, grid=(16, 16), prefix=0, title="Which pixels are this superpixel's?"
)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **The two directions are not one another's transpose.** In the middle: how much of each pixel is
# superpixel $p$'s ($Q$, a softmax at every pixel over superpixels). On the right: what $p$ listens to (P2S,
# a softmax over pixels, from other queries and keys), mean of the heads. The cell after it puts sliders on
# the function: turn the image and watch the superpixels follow, within their nine cells.


# %% slideshow={"slide_type": "fragment"}
def draw_superpixel(picture=3, row=4, column=3, angle=0):
    """Segments, association and P2S weights of superpixel p = (row, column) in a turned scene."""
    image = ch10.turned(images[picture][None], angle).to(device)
    with torch.no_grad():
        _, steps = backbone.forward_features(image, return_info=True)
    Q = sp.dense_association(sp.merge_heads(steps[-1]["s2p_logits"]).softmax(-1))
    windows = sp.p2s_weights(steps[-1]["p2s_logits"]).unflatten(-1, (-1, 9))
    hears = sp.dense_association(sp.turn_around(windows)).mean(1)  # (1, 1024 pixels, 64)
    maps = [weights[0, :, 8 * row + column].view(32, 32).cpu() for weights in (Q[:, 0], hears)]
    with plots.style():
        figure, axes = plt.subplots(1, 3, figsize=(7.5, 2.5))
    axes[0].imshow(
        rearrange(outlined(image[0], segments_of(steps[-1]["logits"])[0]), "c h w -> h w c")
    )
    for ax, weights in zip(axes[1:], maps, strict=True):
        ax.imshow(rearrange(image[0].cpu(), "c h w -> h w c"), extent=(0, 1, 0, 1))
        drawn = ax.imshow(weights, alpha=0.6, cmap="inferno", vmin=0, extent=(0, 1, 0, 1))
        figure.colorbar(drawn, ax=ax, shrink=0.7)
    titles = [f"turned by {angle}°", f"Q(·, p), p = ({row}, {column})", "what p listens to"]
    for ax, title in zip(axes, titles, strict=True):
        ax.set(title=title, xticks=[], yticks=[])
    plt.show()


draw_superpixel()

# %% tags=["nbval-ignore-output"] slideshow={"slide_type": "fragment"}
lab.widgets.sliders(
    draw_superpixel, picture=(0, 20, 3), row=(0, 7, 4), column=(0, 7, 3), angle=(0, 90, 0)
)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Do segments turn with the image?** Compare rotate(segment(x)) with segment(rotate(x)) by the
# adjusted Rand index (ARI; 1: the same partition, 0: chance), inside the inscribed circle. **Before
# you run it:** what do square patches get at 45° and at 90°?

# %% slideshow={"slide_type": "fragment"}
angles, few = (10, 30, 45, 60, 90), images[:16]
kinds = {
    "squares": lambda x: sp.hard_labels(ch10.patches(x))[:, 0],
    "soft k-means": lambda x: spformer.to_superpixels(x, side=8),
    "SPFormer, masks": lambda x: spformer.to_superpixels(x.to(device), backbone).cpu(),
}
agreement = {
    name: [sm.rotation_agreement(kind, few, angle).mean().item() for angle in angles]
    for name, kind in kinds.items()
}
plots.curve(angles, agreement, xlabel="degrees", ylabel="ARI", title="agreement under rotation")
plt.show()
lab.claim("squares turn onto themselves at 90°", agreement["squares"][-1], above=0.99)
at_45 = {name: values[2] for name, values in agreement.items()}
print({name: round(value, 2) for name, value in at_45.items()}, "at 45°")
lab.claim(
    "soft k-means turns best",
    at_45["soft k-means"] - max(at_45["squares"], at_45["SPFormer, masks"]),
    above=0.05,
)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Answer: about 0.4, and 1: at 90° the grid falls onto itself. Soft k-means turns best, by its colors. The
# learned segments turn no better than squares, and at 90° much worse: the lattice falls onto itself, but
# filters and positions do not. Most of a scene is ground, and there the segments are arbitrary.
#
# The lattice of cells never turns; only the kernel of the exchange is equivariant, and only to quarter
# turns. The learned 3×3 filters and the position that is added before the self-attention break even that;
# the authors say so of the position.

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Photographs**, which are nothing like its training scenes: larger, of other things, seen with
# the same cells of 8 pixels. One line for any image: `to_superpixels(image, model)`; without a model it
# is soft k-means.

# %% slideshow={"slide_type": "fragment"}
drawn = []
for name in ("flower", "chelsea"):
    photo = lab.data.photo(name)
    photo = F.interpolate(photo[None], scale_factor=80 / photo.shape[1], mode="area")[0]
    learned = spformer.to_superpixels(photo.to(device), backbone)
    color = spformer.to_superpixels(photo, side=8)
    drawn += [outlined(photo, learned, zoom=3), outlined(photo, color, zoom=3)]
plots.show_images(
    drawn, ["masks of scenes", "k-means"] * 2, columns=4, size=1.6,
    title="the same cells, two ways to fill them",
)  # fmt: skip
plt.show()

# %% [markdown] slideshow={"slide_type": "fragment"}
# The strong outlines of things it has never seen are there, petals and eyes; in the flat parts, segments run
# along rows and columns and lie in pieces. It learned to part things from ground, and nothing else.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 7 · Train it
#
# Live, from nothing: 32-pixel pictures of two flat shapes, a label for every pixel, 120 steps. The
# association starts as noise (superpixels start as pooled patches, the *association* does not: random
# queries meet random keys). For a while the network calls nearly
# everything background, and the oracle gets *worse*. **Predict** at which step it passes that of the squares.


# %% tags=["nbval-ignore-output"] slideshow={"slide_type": "fragment"}
def shapes(n, seed):
    made = lab.toys.shapes(n, seed=seed, size=32, objects=2)
    return {"image": made["image"], "saliency": made["masks"].any(1).float()}


new = shapes(128, seed=1)
seen = {"Eq. 1, mIoU": [], "oracle of the association": [], "oracle of squares": []}


@torch.no_grad()
def look(learner):
    wanted = ch10.things(new)
    logits = ch10.association(learner.backbone, new["image"].to(device)).cpu()
    found = learner(new["image"].to(device)).argmax(1).cpu()
    seen["Eq. 1, mIoU"].append(metrics.mean_iou(metrics.confusion_matrix(found, wanted, 2)))
    for name, one_of in (("association", logits), ("squares", ch10.patches(new["image"]))):
        confusion = sm.oracle_confusion(one_of, wanted, 2, "hard")
        seen[f"oracle of {'the ' * (name[0] == 'a')}{name}"].append(metrics.mean_iou(confusion[0]))
    return {}


# %% tags=["nbval-ignore-output"] slideshow={"slide_type": "fragment"}
lab.seed_everything(0)
learner = spformer.SuperpixelSegmenter(ch10.micro(img_size=32), num_classes=2)
history = lab.fit(
    learner, shapes(1_024, seed=0), loss=ch10.mask_loss, steps=120, batch_size=16, lr=3e-3,
    device=device, evaluate=look, evaluate_every=20,
)  # fmt: skip
plots.curve(range(20, 121, 20), seen, xlabel="step", ylabel="mIoU", title="superpixels from masks")
plt.show()

# %% slideshow={"slide_type": "fragment"}
gain = seen["oracle of the association"][-1] - seen["oracle of squares"][-1]
lab.claim("after 120 steps the learned superpixels beat squares", gain, above=0.03)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Against the alternatives.** 64-pixel scenes, 250 steps of 16, three seeds (`attnlab results
# 10_spformer.segmentation`). The first three rows are the same network, each trained through its
# own way from 8×8 scores to 64×64 pixels. The oracles are what the segments could reach if somebody
# labeled them, of hard segments and of soft ones (Eq. (1) with the labels as $A$).

# %% slideshow={"slide_type": "fragment"}
lab.results.show("10_spformer.segmentation")

# %% slideshow={"slide_type": "fragment"}
rows = lab.results.load("10_spformer.segmentation")["rows"]
miou = {row: rows[row]["mIoU"] for row in ch10.UPSAMPLING}
ahead = [a - b for a, b in zip(miou["Eq. 1"]["values"], miou["bilinear"]["values"], strict=True)]
lab.claim("Eq. (1) is ahead of bilinear in each of three seeds", min(ahead), above=0.02)
learned, squares = (rows[row]["oracle, hard"] for row in ("Eq. 1", "8×8 patches"))
lab.claim("learned segments beat squares by far more than their spread",
          (learned["mean"] - squares["mean"]) / learned["std"], above=5)  # fmt: skip
lab.claim("k-means on color, which learned nothing, is better still",
          rows["soft k-means"]["oracle, hard"]["mean"] - learned["mean"], above=0.03)  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# Read it in both directions. **Eq. (1) wins** in every seed, on average by 0.03 mIoU over bilinear and
# by 0.06 over nearest. And
# **masks teach outlines**: learned segments reach what SLIC reaches, far above squares, while the association
# of a network that was trained through bilinear stays *below* squares, hardly above no training at all. Superpixels do not come by
# themselves; they come where the loss goes through them. But k-means on color, with no parameter at all, has the
# best outlines of all. An oracle asks for outlines only; it does not ask which side is the thing.

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Is it the way, or the network behind it?** In that table both differ. So: twice the steps, and then
# the scores of *one* network carried to the pixels in all three ways (`attnlab results
# 10_spformer.longer`). **Predict:** which column is best in the second row?

# %% slideshow={"slide_type": "fragment"}
lab.results.show("10_spformer.longer")

# %% slideshow={"slide_type": "fragment"}
rows = lab.results.load("10_spformer.longer")["rows"]
ours, theirs = rows["trained by Eq. 1"], rows["trained by bilinear"]
by_edges, by_blur = "mIoU, read by Eq. 1", "mIoU, read by bilinear"
pairs = list(zip(ours[by_edges]["values"], ours[by_blur]["values"], strict=True))
lab.claim("one network's scores gain over 0.05 by Eq. (1), each seed", min(a - b for a, b in pairs),
          above=0.05)  # fmt: skip
pairs = list(zip(ours[by_edges]["values"], theirs[by_blur]["values"], strict=True))
lab.claim("two networks, each in its own way: over 0.03", min(a - b for a, b in pairs), above=0.03)
lab.claim("and who was trained through bilinear is better off with it",
          theirs[by_blur]["mean"] - theirs[by_edges]["mean"], above=0.03)  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# The same 64 scores are worth 0.08 mIoU more through Eq. (1) than through bilinear. About half of that, a
# network that is trained through bilinear makes up for with its scores: 0.04 is left between the two. And its
# association was never asked for anything, so that reading it costs more than it gives (the second row's
# best column is bilinear).

# %% [markdown] slideshow={"slide_type": "subslide"}
# What the three ways look like, for the scores of the checkpoint (it was trained through Eq. (1), so that
# this is a picture and no contest). The fourth is a mistake worth seeing once: resizing $Q$ as if its
# nine slots were channels. Slot 5 means "the cell to the right", which is *another superpixel* in the
# next cell; between cells, such a resized $Q$ mixes numbers of different superpixels. (Here that costs
# little: only the outermost pixels of a cell are mixed.)

# %% slideshow={"slide_type": "fragment"}
with torch.no_grad():
    superpixels, steps = backbone.forward_features(images.to(device), return_info=True)
    scores = model.classify(model.norm(superpixels))  # (128, 2, 8, 8)
    slots = sp.merge_heads(steps[-1]["logits"])  # (128, 1, 8, 8, 16, 9)
    flat = rearrange(sp.from_cells(slots), "b 1 k h w -> b k h w").nan_to_num(neginf=-1e4)
    flat = F.interpolate(flat, scale_factor=2, mode="bilinear")
    ways = {
        "Eq. (1)": sp.expand(scores, slots, scale=2),
        "bilinear": F.interpolate(scores, size=64, mode="bilinear"),
        "nearest": F.interpolate(scores, size=64, mode="nearest"),
        "resized slots": sp.expand(scores, sp.to_cells(flat, 8)[:, None]),
    }
found = {name: way.argmax(1).cpu() for name, way in ways.items()}
got = {name: metrics.mean_iou(metrics.confusion_matrix(f, truth, 2)) for name, f in found.items()}
plots.show_images(
    [images[one], truth[one].float(), *(f[one].float() for f in found.values())],
    ["scene", "truth", *(f"{name}: {score:.3f}" for name, score in got.items())],
    title="one set of 8×8 scores, four ways to 64×64 pixels; mIoU of 128 scenes", columns=3, size=1.9,
)  # fmt: skip
plt.show()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 8 · What class labels alone teach
#
# The paper's claim is stronger: no masks, class labels only, 300 epochs of ImageNet, and the superpixels
# follow objects all the same. Here 200 steps on 32-pixel `parts` (one object of eight kinds on a
# flat ground, chance 1/8), 4×4 tokens, three seeds. "Frozen as patches" is the same network with all
# LayerScales of the exchange fixed at 0: its tokens are pooled squares. The ViT has as many tokens, of
# equal width and depth, made by a linear map of flat 8×8 patches. **Before you look:** which of them wins,
# who suffers most from a turned or half-hidden object, and do the learned segments beat squares?

# %% slideshow={"slide_type": "fragment"}
lab.results.show("10_spformer.labels")

# %% slideshow={"slide_type": "fragment"}
rows = lab.results.load("10_spformer.labels")["rows"]
accuracy = {row: rows[row]["accuracy"]["mean"] for row in ch10.CLASSIFIERS}
patched = max(accuracy["ViT, 8×8 patches"], accuracy["frozen as patches"])
lab.claim("the exchange more than doubles the accuracy", accuracy["superpixels"] / patched, above=2)
below = rows["8×8 patches"]["oracle, hard"]["mean"] - rows["superpixels"]["oracle, hard"]["mean"]
lab.claim("and its segments are worse than squares", below, above=0.03)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Two results that do not fit the story one would like to tell. At this budget the exchange makes a
# **large difference** to accuracy: both models without it are still low (chance is 0.125). And its segments
# follow things **worse than squares**. So whatever it does for the classifier, it is not drawing
# outlines: tokens that can look at single pixels and at their neighbors' cells learn faster than pooled or
# flattened squares. That superpixels emerge from class labels alone, as the paper reports after 300 epochs of
# ImageNet, cannot be seen here. To say that it does not happen would be wrong too; 200 steps are no
# test of it.
#
# **Robustness**: a quarter turn (column *90°*) costs the superpixels about 0.09, a grey square on part of the
# object (column *occluded*) 0.10. So they lose most; the two patch models have little to lose. These
# numbers compare nothing.
#
# **Ablations**: guess once more, then look at the six rows from "superpixels" on with their spreads.

# %% slideshow={"slide_type": "fragment"}
six = [row for row in ch10.CLASSIFIERS if "patches" not in row]
means = [accuracy[row] for row in six]
widest = max(rows[row]["accuracy"]["std"] for row in six)
lab.claim("the six rows lie within 0.12 of each other", max(means) - min(means), below=0.12)
lab.claim("the seeds of one row alone spread by over 0.03", widest, above=0.03)
behind = [a - b for a, b in zip(rows["superpixels"]["accuracy"]["values"],
                                rows["only before block 1"]["accuracy"]["values"], strict=True)]  # fmt: skip
lab.claim("one exchange, before block 1, is behind in each of three seeds", min(behind), above=0.02)

# %% [markdown] slideshow={"slide_type": "fragment"}
# The paper's largest loss is seen here too: without the exchange before block 2, accuracy is lower by 0.04
# to 0.07 in each of three seeds (a difference within a seed, where what the rows share cancels). One head is
# lower by 0.02 to 0.04. For $t = 1$ the seeds disagree; a learned position is not worse than the
# convolution, and the 3×3 stem may help. At three seeds, more cannot be read from the table.

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Do they carry over?** Two questions to one table (`attnlab results 10_spformer.transfer`). *Across
# tasks:* does a segmenter learn better from a network that has learned class labels first? Every row gets 250
# steps with masks; "after class labels" had 250 steps of naming one thing before, "after more masks"
# 250 with masks, so that it had as many steps in all. *Across data:* superpixels are learned on
# photographed scenes, or on drawn `parts` only; the oracle is then taken on both. **Predict** both before
# you look.

# %% slideshow={"slide_type": "fragment"}
lab.results.show("10_spformer.transfer")

# %% slideshow={"slide_type": "fragment"}
rows = lab.results.load("10_spformer.transfer")["rows"]
scratch, named, more = (
    rows[row]["mIoU"] for row in ("from scratch", "after class labels", "after more masks")
)
spread = max(scratch["std"], named["std"])
lab.claim("class labels first: no difference beyond the spread", abs(named["mean"] - scratch["mean"]),
          below=spread)  # fmt: skip
lab.claim("as many steps with masks: ahead of it", more["mean"] - named["mean"], above=0.01)
abroad, squares = rows["masks of parts only"], rows["8×8 patches"]
ahead = [value - squares["oracle, scenes"]["mean"] for value in abroad["oracle, scenes"]["values"]]
lab.claim("learned on drawn parts, on scenes far above squares, each seed", min(ahead), above=0.05)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Across tasks: nothing, at this scale. 250 steps with class labels did not help the masks; the same steps with
# masks gave 0.03. (The paper's gain is from 300 epochs of ImageNet.) Across data they carry
# over: superpixels that never saw a photograph find outlines in scenes as well as those that were trained there,
# and nearly so the other way round. What they learn is where colors change, not what things are. The photographs of
# section 6 say the same, as pictures.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 9 · What it costs
#
# **Memory.** What must be kept for the backward pass of one P2S update, at the shapes of SPFormer-S/16
# (56×56 pixels, 14×14 cells, keys of 64 and values of 384 channels, 2 heads), one image? `F.unfold` keeps
# every pixel's key and value nine times, $9 P (C_p + C_s)$ numbers; the library keeps the pixels once, and
# logits, $9 P M$. **Guess the ratio before you run it.**


# %% slideshow={"slide_type": "fragment"}
def kept_for_backward(run):
    """Bytes that autograd keeps, each storage counted once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor  # alive: no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


# %% slideshow={"slide_type": "fragment"}

queries, keys, values = (
    torch.randn(1, channels, side, side, requires_grad=True)
    for channels, side in ((64, 14), (64, 56), (384, 56))
)


def slim():
    cells = [
        rearrange(sp.to_cells(x, 4), "b y x n (m d) -> b m y x n d", m=2) for x in (keys, values)
    ]
    grid = rearrange(queries, "b (m d) y x -> b m y x d", m=2)
    return sp.p2s_attend(sp.local_logits(cells[0], grid), cells[1])


naive = kept_for_backward(lambda: sp.unfolded_p2s(queries, keys, values, side=4, num_heads=2))
lean = kept_for_backward(slim)
print(f"F.unfold keeps {naive / 2**20:.0f} MiB, nine slots {lean / 2**20:.1f} MiB")
lab.claim("nine slots keep at most a sixth", naive / lean, above=6)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Arithmetic.** Per exchange a pixel and a candidate cost $C_p$ multiply–accumulates for each of two
# logits, $C_s$ for what the superpixel receives and $C_p$ for what the pixel receives: $9 P (3 C_p + C_s)$,
# *linear* in the $P$ pixels, where attention of all pixels to all would be quadratic.

# %% slideshow={"slide_type": "fragment"}
counted = cost.macs(slim)  # P2S alone: one logit, and what superpixels receive
lab.claim("P2S costs 9 P (C_p + C_s), to the last one", counted, equal=9 * 56**2 * (64 + 384))
every_pair = 56**4 * (64 + 384)
print(f"{counted / 1e6:.1f} M; all pixels to all pixels would be {every_pair / 1e6:,.0f} M")

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Resolution.** Here is the paper's argument for large images. Take the image twice as large and the cells
# too: there are still 196 tokens, while the pixels see four times as much. A ViT that wants the detail
# needs four times the tokens, and pays for them in every block.

# %% slideshow={"slide_type": "fragment"}
with torch.device("meta"):
    for name in ("DeiT-S/16", "SPFormer-S/16", "SPFormer-S/32"):
        each = [cost.macs(table[name], torch.rand(1, 3, side, side)) / 1e9 for side in (224, 448)]
        print(
            f"{name:14s}"
            + "".join(
                f"{macs:8.2f} G at {side}" for macs, side in zip(each, (224, 448), strict=True)
            )
        )
    twice = cost.macs(table["SPFormer-S/32"], torch.rand(1, 3, 448, 448))
    once = cost.macs(table["SPFormer-S/16"], torch.rand(1, 3, 224, 224))
lab.claim("S/32 at 448 pixels costs what S/16 costs at 224", twice / once, above=0.98, below=1.03)

# %% [markdown] slideshow={"slide_type": "notes"}
# Multiply–accumulates are not time: the exchange has narrow matrices, nine of everything, and softmaxes
# that no counter counts. `benchmarks/superpixel.py` times S/32 beside DeiT-T. The paper gives no latency, which its
# reviewers (ICLR 2024, withdrawn) remarked on; they also missed baselines other than DeiT.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 10 · Paper and here
#
# We could not read the paper's tables themselves; the numbers below are those of a survey article's
# summary of them, and differences (+, −) are against a patch ViT unless it says otherwise.
#
# | claim | published | here | why they may differ |
# |---|---|---|---|
# | S/32 needs less arithmetic than DeiT-T and is right more often | 76.4 against 72.2 % of ImageNet | 1.23 against 1.25 G MACs, section 5; not trained | needs GPU-days |
# | S/16 beats DeiT-S | 81.0 against 79.9 % | 22.34 M parameters, 5.15 G MACs; not trained | the same |
# | each part matters (S/32) | $t = 1$: −1.0; exchange only before the first block: −1.6; one head: −0.8 | exchange only before block 1: −5 (each seed); one head −3; $t = 1$ −4, seeds disagree; section 8 | 200 steps, 16 tokens, 3 seeds |
# | superpixels follow objects, from class labels alone | oracle mIoU +4.2 (VOC 2012), +4.6 (Pascal-Part-58), about as SLIC | labels: worse than squares, section 8; masks: +0.09, as SLIC, section 7 | 300 epochs of ImageNet against 200 steps |
# | Eq. (1) helps dense prediction | ADE20K +4.2 mIoU, Pascal Context +2.8, from ImageNet weights | +0.08 over bilinear for the same scores; +0.03 to +0.04 when each way has its own training, section 7 | same network and other upsampling here; other network there |
# | more robust to rotation and occlusion | table not recovered | no comparison possible: the patch models stay below 0.25, section 8 | toy objects on a flat ground |
#
# Code that grew out of the authors' own (a later work's) differs from the text in three places; keywords
# `**spformer.lineage()` follow it. We ran the text's version only.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 11 · Exercises
#
# Write the body, run the cell, run the check. `lab.hint("spformer.p2s_update")` gives a hint,
# `lab.solution("spformer.p2s_update")` the solution.
#
# **1 · How many candidates?** (5 minutes).


# %% exercise="spformer.neighbor_counts" tags=["exercise"] slideshow={"slide_type": "fragment"}
def neighbor_counts(rows: int, columns: int) -> torch.Tensor:
    """How many superpixels a pixel can choose from, for each cell of a grid.

    A pixel may belong to the superpixel of its own cell and to those of the cells that touch it, by
    a side or by a corner, as far as there are any.
    Returns (rows, columns), int64.
    """
    raise NotImplementedError


# %% slideshow={"slide_type": "fragment"}
lab.check("spformer.neighbor_counts", neighbor_counts)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **2 · P2S without a copy of the pixels** (15 minutes). Import `fold9` and `turn_around` from
# `attnlab.superpixel`, or write `sp.fold9`. Careful: a softmax over the last axis is the association, the other
# direction.


# %% exercise="spformer.p2s_update" tags=["exercise"] slideshow={"slide_type": "fragment"}
def p2s_update(logits: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """What superpixels receive from pixels: softmax over each one's window, times the values.

    logits: (Sh, Sw, n, 9), for each of the n pixels of each cell, one number about each superpixel
    around it; −∞ where there is none. values: (Sh, Sw, n, d), of the pixels.
    A superpixel's weights are over all pixels that have it among their nine, and sum to 1.
    `turn_around` and `fold9` of attnlab.superpixel are there to be used; pixels need no copy.
    Returns (Sh, Sw, d).
    """
    raise NotImplementedError


# %% slideshow={"slide_type": "fragment"}
lab.check("spformer.p2s_update", p2s_update)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **3 · Turn attention into k-means** (10 minutes). Which logits make P2S, with the raw features for
# values, no residual and $\gamma_s = 1$, a step of hard k-means?


# %% exercise="spformer.kmeans_logits" tags=["exercise"] slideshow={"slide_type": "fragment"}
def kmeans_logits(pixels: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    """Logits with which attention takes one step of k-means, each pixel to its nearest of nine.

    pixels: (Sh, Sw, n, d), the n pixels of each cell. centers: (Sh, Sw, d), one a cell.
    Returns (Sh, Sw, n, 9): 0 for the nearest center (Euclidean) among those of the pixel's own cell
    and the cells around it, and −∞ for the others and where there is none. A softmax over a
    center's pixels then gives equal weight to all that belong to it, so that P2S is their mean.
    """
    raise NotImplementedError


# %% slideshow={"slide_type": "fragment"}
lab.check("spformer.kmeans_logits", kmeans_logits)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **4 · Find the bug** (10 minutes), and then the open part. All of this chapter's pictures would have
# come out right with it.
#
# Then: section 8 asks class labels for outlines. Design the run that would convince you either way: which
# data, how many steps, which control, which difference. `ch10.micro` and `ch10.labels` are a start.


# %% exercise="spformer.buggy_labels" tags=["exercise"] slideshow={"slide_type": "fragment"}
def buggy_labels(best: torch.Tensor) -> torch.Tensor:
    """From each pixel's best slot to the number of a superpixel. One line is wrong: mend it.

    best: (Sh, Sw, n), int64, for the n pixels of each cell: slot 3 (dy + 1) + dx + 1 is the
    superpixel of the cell dy rows below and dx columns to the right.
    Returns (Sh, Sw, n), int64: the number of that superpixel, counted row by row from 0.
    """
    rows, columns = best.shape[:2]
    y = torch.arange(rows)[:, None, None] + best // 3 - 1
    x = torch.arange(columns)[:, None] + best % 3 - 1
    return y * rows + x


# %% slideshow={"slide_type": "fragment"}
lab.check("spformer.buggy_labels", buggy_labels)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 12 · Take home
#
# - Two grids on a lattice that never moves: superpixels listen to the pixels of nine cells, pixels choose
#   among nine superpixels; two softmaxes over different sets, both linear in the pixels.
# - The association carries anything from tokens back to pixels (Eq. 1), and follows edges where
#   bilinear upsampling cannot. Trained through it with masks, superpixels learn outlines
#   (on flat shapes in 120 steps, on scenes in an hour on one core of a busy machine).
# - An outline that looks right proves nothing: measure the oracle, against squares and against k-means
#   on color, and print the number of segments.
#
# **Common misconceptions.** *Superpixels move* (only weights change; none owns a pixel beyond its nine
# cells). *They are connected regions* (nothing asks for it). *Tokens are means weighted by Q* (tokens
# come from P2S; Q goes the other way). *At the start they are a perfect grid* (the tokens are pooled squares;
# Q is what random queries and keys make of it). *SLIC is where it starts* (no squared key length, no moving center,
# another softmax). *The exchange has long range* (it is local; the blocks between are global). *It is
# rotation-invariant* (quarter turns of the kernel only).
#
# **Where next.** `attnlab/superpixel_baselines.py` has three relatives in the same notation: SSN, Super
# Token attention (no projections, no gradient through the clustering) and Context Clusters (hard
# assignment in windows that do not overlap).
#
# **References.** Mei et al. 2024, *SPFormer*, arXiv 2401.02931, section 3 · Jampani et al. 2018,
# *Superpixel sampling networks*, section 4 · Achanta et al. 2012, *SLIC superpixels* · Huang et al. 2023,
# *Vision transformer with super token sampling* · Ma et al. 2023, *Image as set of points* (Context
# Clusters).
