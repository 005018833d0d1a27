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
# # 07 · Video: flow, and attention in its place
#
# **At the end you can** carry features from one frame of a video to another along a flow or by attention
# to a neighborhood, show that the first is a special case of the second, and say which of the two to
# take for which motion, at which cost.
#
# | | |
# |---|---|
# | to read | 60 minutes, exercises another 35 |
# | to run | half a minute on two CPU cores |
# | you need | chapters 01 (attention) and 02 (non-local) |
# | papers | Zhu et al. 2017 a, *Deep feature flow* (DFF); 2017 b, *Flow-guided feature aggregation* (FGFA); 2018, *Towards high performance video object detection*; Jiang et al. 2019, *Locally-weighted deformable neighbors* (LWDN) |
#
# Can attention to a neighborhood take the place of flow? This chapter tries it, and measures what is gained and what
# is lost.

# %% slideshow={"slide_type": "skip"}
from contextlib import nullcontext
from functools import partial
from itertools import product

import matplotlib.pyplot as plt
import torch
from einops import einsum, rearrange
from torch.nn import functional as F
from torch.testing import assert_close

from attnlab import lab, record, video
from attnlab.lab import cost, plots, video_tasks
from attnlab.lab.data.clips import flow_between
from attnlab.lab.experiments import ch07
from attnlab.lab.player import Player
from attnlab.lab.video_tasks import answers_at

device = lab.device()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 1 · The failure
#
# Chapter 06 treated the positions of a clip as one set and gained nothing from its block: motion is
# local, and a set has no neighbors. But there is an older trouble. Every frame went through every layer. A
# second of video is the same scene twenty-five times over, and a network for images pays in full for
# each of them. What does it pay? The model is small (64-pixel clips; thing or background, in every pixel) and
# was trained on single frames. Its first two layers are the *shallow* part; six more make the features
# that the head reads.

# %% slideshow={"slide_type": "fragment"}
print("trained by:", lab.checkpoints.info("clip_ways")["command"])
model = lab.checkpoints.load("clip_ways", device=device)
test = ch07.clips("test", 96).to(device)  # nine frames, two things, 0 to 4 px a frame
batch = test.batch(range(96))
frames = batch["image"]  # (96, 3, 9, 64, 64)
truth = (batch["owner"] > 0).cpu()  # (96, 9, 64, 64): True on a thing

one_frame = frames[:1, :, 0]
features = model.backbone(one_frame)  # (1, 64, 16, 16): stride s = 4
full = cost.macs(model, one_frame)
parts = {"shallow": cost.macs(model.backbone.shallow, one_frame) / full,
         "head": cost.macs(model.head, features) / full}  # fmt: skip
for name, share in parts.items():
    print(f"{name:8s}{100 * share:5.1f} % of {full / 1e6:.0f} M multiply–accumulates a frame")
lab.claim("nearly all is between the two", sum(parts.values()), below=0.12)

# %% [markdown] slideshow={"slide_type": "subslide"}
# So run the deep part on every eighth frame only, a **key frame**, and let its features stand in for
# those of the seven frames that follow. Two consecutive frames look alike, after all.
#
# **Before you run it:** a thing moves by 2 px a frame. Mean IoU is about 0.7 on the key frame. What is it
# four frames later, with features that stayed where they were?

# %% slideshow={"slide_type": "fragment"}
copy = model.way("stale copy")
rotting = {}
for speed in (0, 2, 4):
    moving = ch07.clips("test", 48, speed=(speed, speed)).to(device)
    rotting[f"{speed} px a frame"] = [
        ch07.miou(answers_at(copy, moving, offset)) for offset in (0, 1, 2, 4)
    ]
plots.curve(
    (0, 1, 2, 4), rotting, xlabel="frames since the key frame", ylabel="mIoU",
    title="features that stay where they were rot with motion",
)  # fmt: skip
plt.show()
falls = {name: scores[0] - scores[-1] for name, scores in rotting.items()}
lab.claim(
    "at 4 px a frame the copy loses over 0.2 in four frames", falls["4 px a frame"], above=0.2
)
lab.claim("at rest far less", falls["4 px a frame"] - falls["0 px a frame"], above=0.1)

# %% [markdown] slideshow={"slide_type": "fragment"}
# About 0.5, and 0.43 for things at 4 px a frame. (At 0 px the camera still pans over the background by up to 1 px
# a frame; the things stand still in the picture, and so do their masks.) The features are not wrong. They are in the wrong place.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 2 · The idea in one picture
#
# Everything in this chapter answers one question, asked at every cell of the current frame: **where in
# the key frame was this?** A *flow* answers with one displacement, an arrow. *Attention* answers with
# weights on all cells of a neighborhood. Then the features are fetched from there.

# %% slideshow={"slide_type": "fragment"}
one, now, key = 80, 8, 4  # a clip, the current frame i, the key frame k
flow_px, seen = flow_between(batch, now, key)  # (96, 2, 64, 64) in px; (96, 64, 64)
picture, source = frames[one, :, now].cpu(), frames[one, :, key].cpu()
thing = (batch["owner"][one, now] == 1).nonzero().float().mean(0)  # (row, column) of its middle
row, column = (thing // 4).long().tolist()
dx, dy = flow_px[one, :, 4 * row + 2, 4 * column + 2].tolist()
with plots.style():
    figure, axes = plt.subplots(1, 3, figsize=(8.4, 3))
titles = (f"frame i = {now}: where was this?", f"k = {key}: flow {dx:+.0f}, {dy:+.0f} px",
          f"k = {key}: attention, R = 4 cells")  # fmt: skip
for ax, image, title in zip(axes, (picture, source, source), titles, strict=True):
    ax.imshow(rearrange(image, "c h w -> h w c"), extent=(0, 64, 64, 0))
    ax.set(title=title, xticks=[], yticks=[], xlim=(0, 64), ylim=(64, 0))
x, y = 4 * column + 2, 4 * row + 2
axes[0].plot(x, y, "s", color="#3fd8ff", fillstyle="none", markeredgewidth=2)
axes[1].annotate("", (x + dx, y + dy), (x, y), arrowprops={"arrowstyle": "->", "color": "#3fd8ff",
                                                           "lw": 3})  # fmt: skip
square = plt.Rectangle((x - 18, y - 18), 36, 36, color="#3fd8ff", fill=False, linewidth=3)
axes[2].add_patch(square)
plt.show()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 3 · The mathematics, with shapes
#
# $i$ is the current frame, $k$ the key frame, $p$ a cell. The flow $M_{i \to k}$ says where to **fetch**: what is
# at $p$ in frame $i$ was at $p + M_{i \to k}(p)$ in frame $k$. Nothing is pushed forward. So a thing that moves
# 3 px to the right each frame has, from $i$ to $k = i - 2$, the flow $(-6, 0)$ in px, $(-1.5, 0)$ in cells of stride 4.
#
# **Deep feature flow** runs the backbone on key frames and *warps*:
#
# $$F_{k \to i}(p) = \sum_q G\big(q,\, p + M_{i \to k}(p)\big)\, F_k(q), \qquad
# G(q, r) = \max(0, 1 - |q_x - r_x|)\, \max(0, 1 - |q_y - r_y|)$$
#
# $G$ is bilinear interpolation: at most four cells count, and their weights sum to 1. A flow network
# gives $M$ and a scale field $S$, and the head reads $F_{k \to i} \odot S$.
#
# **Attention to a neighborhood** compares embeddings of the *shallow* features (the deep ones of frame $i$ are
# what we want to save) and fetches with the weights of a softmax:
#
# $$a_d(p) = \operatorname{softmax}_{d}\Big(\tfrac{\cos(e_i(p),\, e_k(p + d))}{\tau}\Big), \qquad
# F_{k \to i}(p) = \sum_{d \in \{-R \dots R\}^2} a_d(p)\, F_k(p + d)$$
#
# | symbol | shape | what it is |
# |---|---|---|
# | $F_k$ | $(C, h, w)$ | deep features of the key frame: here 64 channels of 16×16, stride $s = 4$ |
# | $M_{i \to k}$ | $(2, h, w)$ | flow, $(dx, dy)$: to the right, down, *in cells of the map that is warped* |
# | $S$ | $(C, h, w)$ | DFF's scale, 1 at first: flow moves features, $S$ may dim or brighten them |
# | $e_i$, $e_k$ | $(D, h, w)$ | embeddings of the shallow features, $D = 48$ |
# | $a$ | $(L, h, w)$ | weights of a cell on the $L = (2R + 1)^2$ cells around it, in the key frame |
# | $\tau$ | scalar | temperature: small is one cell, large is a blur; learned, 0.07 at first |
#
# Values are the key's features as they are, without a projection: the head was trained on them. Cells
# beyond the border are masked; a key of zeros would not do, it gets the weight $e^0$.

# %% [markdown] slideshow={"slide_type": "subslide"}
# ### By hand, once
#
# A row of four cells with the features 0, 10, 20, 30. Cell 1 fetches with a flow of +0.25: three quarters
# of cell 1 and one quarter of cell 2. Attention with *these* weights gives the same. Attention may also find two
# matches, in cells 0 and 3, and take their mean. A flow has to choose; between them it points to cell 1.5. Where
# features grow evenly, as here, nobody can tell the two apart (both give 15). For their squares they can.

# %% slideshow={"slide_type": "fragment"}
row_of_four = torch.tensor([0.0, 10.0, 20.0, 30.0])
hat = (1 - (torch.arange(4) - 1.25).abs()).clamp(min=0)
print("weights of the flow 0.25 at cell 1:", hat.tolist(), "→", (hat @ row_of_four).item())
two_peaks = torch.tensor([0.5, 0.0, 0.0, 0.5])
print("two matches", two_peaks.tolist(), "→", (two_peaks @ row_of_four).item())
squares = row_of_four**2
print("the same of the squares:", (two_peaks @ squares).item(), "but at cell 1.5:",
      ((squares[1] + squares[2]) / 2).item())  # fmt: skip

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 4 · Build it three times
#
# **The warp, first as a loop** that is the formula, for one map.


# %% slideshow={"slide_type": "fragment"}
def warp_loop(features, flow):
    """features (C, H, W), flow (2, H, W) in cells → (C, H, W); the border is repeated."""
    channels, height, width = features.shape
    out = []
    for y, x in product(range(height), range(width)):
        fetch_x = (x + flow[0, y, x]).clamp(0, width - 1)
        fetch_y = (y + flow[1, y, x]).clamp(0, height - 1)
        total = torch.zeros(channels, dtype=features.dtype)
        for qy, qx in product(range(height), range(width)):
            G = (1 - (qx - fetch_x).abs()).clamp(min=0) * (1 - (qy - fetch_y).abs()).clamp(min=0)
            total = total + G * features[:, qy, qx]
        out.append(total)
    return rearrange(torch.stack(out), "(h w) c -> c h w", h=height)


def warp_matrices(features, flow):
    """The same for (B, C, H, W) and (B, 2, H, W): a hat for the rows, one for the columns."""
    height, width = features.shape[2:]
    fetch_x = (torch.arange(width) + flow[:, 0]).clamp(0, width - 1)
    fetch_y = (torch.arange(height)[:, None] + flow[:, 1]).clamp(0, height - 1)
    across = (1 - (torch.arange(width) - fetch_x[..., None]).abs()).clamp(min=0)  # (B, H, W, W)
    down = (1 - (torch.arange(height) - fetch_y[..., None]).abs()).clamp(min=0)  # (B, H, W, H)
    return einsum(down, across, features, "b h w y, b h w x, b c y x -> b c h w")


# %% [markdown] slideshow={"slide_type": "subslide"}
# **Then attention to a neighborhood**: a loop, and `F.unfold`, which copies the window of every cell. The scores are
# $q \cdot k / \sqrt D$ as in chapter 01; for the cosine of section 3, normalize both and multiply the query by
# $\sqrt D / \tau$.


# %% slideshow={"slide_type": "fragment"}
def attend_loop(query, key, value, radius):
    """query, key (D, H, W), value (C, H, W) → (C, H, W)."""
    height, width = value.shape[1:]
    out = []
    for y, x in product(range(height), range(width)):
        rows = range(max(0, y - radius), min(height, y + radius + 1))
        columns = range(max(0, x - radius), min(width, x + radius + 1))
        near = list(product(rows, columns))  # the window, as far as it is on the map
        scores = torch.stack([query[:, y, x] @ key[:, v, u] for v, u in near])
        weights = (scores / len(query) ** 0.5).softmax(0)
        out.append(sum(w * value[:, v, u] for w, (v, u) in zip(weights, near, strict=True)))
    return rearrange(torch.stack(out), "(h w) c -> c h w", h=height)


def attend_unfold(query, key, value, radius):
    """The same for (B, D, H, W) and (B, C, H, W)."""

    def windows(x):
        copies = F.unfold(x, 2 * radius + 1, padding=radius)
        return rearrange(copies, "b (c l) (h w) -> b c l h w", c=x.shape[1], h=x.shape[2])

    scores = einsum(query, windows(key), "b d h w, b d l h w -> b l h w") / query.shape[1] ** 0.5
    there = windows(torch.ones_like(key[:, :1]))[:, 0] > 0
    weights = scores.masked_fill(~there, -torch.inf).softmax(1)
    return einsum(weights, windows(value), "b l h w, b c l h w -> b c h w")


# %% [markdown] slideshow={"slide_type": "subslide"}
# **Then the library's**: `warp` is `F.grid_sample`; `local_attention_warp` cuts the map into tiles of 8×8
# queries, gives each the keys of its tile and a halo of $R$ around it, and calls PyTorch's attention
# kernel (for the smallest windows it goes through the displacements instead, which is faster there). All three, in values and in gradients:


# %% slideshow={"slide_type": "fragment"}
def values_and_gradients(function, tensors):
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    result = function(*tensors)
    return [result.detach(), *torch.autograd.grad(result.square().sum(), tensors)]


def by_image(function, *options):
    return lambda *maps: torch.stack(
        [function(*one_image, *options) for one_image in zip(*maps, strict=True)]
    )


# %% slideshow={"slide_type": "fragment"}
torch.manual_seed(0)
maps = [torch.randn(2, channels, 5, 7, dtype=torch.float64) for channels in (4, 4, 3)]
motion = 1.5 * torch.randn(2, 2, 5, 7, dtype=torch.float64)
same = {
    "warp": ((maps[2], motion), by_image(warp_loop), warp_matrices, video.warp),
    "attention": (maps, by_image(attend_loop, 2), *(
        lambda *m, f=f: f(*m, 2) for f in (attend_unfold, video.local_attention_warp))),
}  # fmt: skip
for name, (given, loop, *others) in same.items():
    for other in others:
        for ours, expected in zip(
            values_and_gradients(other, given), values_and_gradients(loop, given), strict=True
        ):
            assert_close(ours, expected, rtol=0, atol=1e-10)
    print(f"✔ {name}: three ways, one value and {len(given)} gradients")

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Flow is a special case of attention.** Put all weight on one displacement, and attention is a warp by
# whole cells; put the bilinear hat around $M$, and it is the bilinear warp; take the mean displacement of the
# hat, and the flow comes back. Not nearly: to the last digits.

# %% slideshow={"slide_type": "fragment"}
whole = motion.round().clamp(-3, 3)
one_hot = video.flow_to_attention(whole, radius=3)  # (2, 49, 5, 7)
lab.claim("for whole cells the hat is one-hot", (one_hot.amax(1) == 1).all().item())
fetched = video.local_attend(maps[2], one_hot, 3, padding="replicate")
gap = (fetched - video.warp(maps[2], whole)).abs().max()
lab.claim("one-hot attention is the warp by whole cells", gap, below=1e-12)

motion = motion.clamp(-3, 3)
hats = video.flow_to_attention(motion, radius=3)
lab.claim("a hat has at most four weights", (hats > 0).sum(1).max().item(), below=5)
gap = (
    video.local_attend(maps[2], hats, 3, padding="replicate") - video.warp(maps[2], motion)
).abs()
lab.claim("attention by the hat is the bilinear warp", gap.max(), below=1e-12)
gap = (video.attention_to_flow(hats, 3) - motion).abs().max()
lab.claim("its mean displacement is the flow", gap, below=1e-12)

# %% [markdown] slideshow={"slide_type": "subslide"}
# The converse does not hold: attention may have two peaks, as by hand above. And softmax reaches a warp only in
# the limit. Move a map of random unit vectors by $(2, -1)$ cells and read the flow off the weights:

# %% slideshow={"slide_type": "fragment"}
key_map = F.normalize(torch.randn(1, 16, 16, 16), dim=1)
query_map = key_map.roll((1, -2), dims=(2, 3))  # what is at p came from p + (2, −1)
middle = (..., slice(4, -4), slice(4, -4))
errors = []
for temperature in (1, 0.3, 0.1, 0.03):
    scores = video.local_correlation(query_map, key_map, 4) / temperature
    found = video.attention_to_flow(scores.softmax(1), 4)[middle]
    errors.append((found - torch.tensor([2.0, -1.0])[:, None, None]).norm(dim=1).mean().item())
    print(f"τ = {temperature:<5g} mean error of the flow read off: {errors[-1]:.3f} cells")
lab.claim("at τ = 1 attention is a blur", errors[0], above=1)
lab.claim("at τ = 0.03 it has found the displacement", errors[-1], below=0.01)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **A pitfall on the way.** `F.grid_sample` wants coordinates from −1 to 1, and two formulas that are easy to write compute
# them from the wrong width: $2x/W - 1$ with `align_corners=True`, and $2x/(W-1) - 1$ without it. Zero flow
# must give the map back. **Before you run it:** by how many cells are they off, and where?


# %% slideshow={"slide_type": "fragment"}
def fetched_from(coordinate, corners, width=15):
    """Which column each column of a row comes from, by `grid_sample`, at zero flow."""
    ramp = torch.arange(float(width)).view(1, 1, 1, width)
    grid = torch.stack([coordinate, torch.zeros(width)], dim=-1).view(1, 1, width, 2)
    return F.grid_sample(ramp, grid, padding_mode="border", align_corners=corners).flatten()


x = torch.arange(15.0)
ways = {
    "2x/W − 1, corners aligned": (2 * x / 15 - 1, True),
    "2x/(W − 1) − 1, not aligned": (2 * x / 14 - 1, False),
    "right, either way": ((2 * x + 1) / 15 - 1, False),
}
off = {name: fetched_from(*way) - x for name, way in ways.items()}
plots.curve(x, off, xlabel="column", ylabel="fetched too far right (cells)",
            title="zero flow, three normalizations, W = 15")  # fmt: skip
plt.show()
lab.claim(
    "the first is off by almost a cell at the right edge",
    off["2x/W − 1, corners aligned"][-1],
    below=-0.9,
)
lab.claim("the right one is exact", off["right, either way"].abs().max(), below=1e-5)

# %% [markdown] slideshow={"slide_type": "fragment"}
# The first is off by 0.93 of a cell at the right edge, which is 15 px of an image at stride 16; the second by up to
# half a cell, in the other direction at the other edge. Nothing fails: shapes are right and training goes
# on. You will meet such a warp again.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 5 · See it: flow, and its ghosts
#
# Give flow its best chance: the *exact* flow of the clips (every layer moves by whole pixels), and no network at
# all. Warp the true labels of frame $k$ to frame $i$ and compare with the true labels of frame $i$.
#
# **Before you run it:** flow is exact, labels are exact. Which share of the pixels comes out wrong after eight
# frames, and where are they?

# %% slideshow={"slide_type": "fragment"}
shares = {"all pixels": [], "visible in the key frame": [], "hidden in it": []}
for offset in (1, 2, 4, 8):
    flow_px, visible = (part.cpu() for part in flow_between(batch, now, now - offset))
    carried = video.warp(truth[:, None, now - offset].float(), flow_px)[:, 0] > 0.5
    right = carried == truth[:, now]
    regions = (torch.ones_like(visible), visible, ~visible)
    for name, region in zip(shares, regions, strict=True):
        shares[name].append(right[region].float().mean().item())
plots.curve((1, 2, 4, 8), shares, xlabel="frames since the key frame",
            ylabel="share of pixels right", title="true labels, carried by the true flow")  # fmt: skip
plt.show()
lab.claim("what the key frame shows is carried without one error",
          min(shares["visible in the key frame"]), equal=1)  # fmt: skip
lab.claim("of what it hides, over a fifth is wrong", max(shares["hidden in it"]), below=0.8)

# %% slideshow={"slide_type": "fragment"}
flow_px, visible = (part.cpu() for part in flow_between(batch, now, key))
warped = video.warp(frames[:, :, key].cpu(), flow_px)[one].clamp(0, 1)
plots.show_images(
    [source, picture, warped, (~visible[one]).float()],
    [f"key frame {key}", f"frame {now}", "key, warped", "hidden in the key"],
    title="a thing leaves a copy of itself where it was", size=2.0,
)  # fmt: skip
plt.show()

# %% [markdown] slideshow={"slide_type": "fragment"}
# A tenth of all pixels, and every one of them is hidden in the key frame: of those about half come out wrong. (The
# streaks at the lower edge are the border, repeated: what was outside the key frame counts as hidden.) A backward warp never leaves a hole: every
# cell fetches something. Background that a thing has just uncovered has a flow too, and where it points to in the
# key frame, *the thing* was standing. So the thing is fetched twice: once to where it is, and once to where it was. That second copy is a **ghost**. No better
# flow network removes it: the content is not in the key frame at that place.
#
# Can one know where? Follow the flow to the key frame and the reverse flow back. Where the way does not
# end at its start, something was covered.

# %% slideshow={"slide_type": "fragment"}
guessed = video.visibility(flow_px, flow_between(batch, key, now)[0].cpu())
agree = (guessed == visible).float().mean()
lab.claim("there and back tells hidden from visible in over 95 % of the pixels", agree, above=0.95)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **A flow that is learned.** DFF predicts flow with a network that sees both frames at half their size. It
# learns from exact flow first (here for 6,000 steps), and then from the task alone, through the warp. After the first, its error
# in px beside that of saying "nothing moves":

# %% slideshow={"slide_type": "fragment"}
flow_net = lab.checkpoints.load("clip_flow", device=device).flow_net


def still(frame, key):
    return torch.zeros(len(frame), 2, 16, 16, device=frame.device)


for offset in (1, 4, 8):
    learned, nothing = (video_tasks.flow_scores(net, test, offset) for net in (flow_net, still))
    print(f"{offset} frames: {learned['objects']:4.1f} px on things (nothing moves:",
          f"{nothing['objects']:4.1f}), {learned['visible']:4.1f} px on all that is visible in the key",
          f"({nothing['visible']:4.1f})")  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# The error is a third below that of "nothing moves" at one frame, a fifth at four and a tenth at eight; but training
# showed it frames at most four apart, so that eight is beyond what it has seen. Flow has to be learned from flow, and from a
# lot of it. In what follows exact flow stands for the best that any such network could do.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 6 · See it: attention to a neighborhood
#
# Now without a flow network, and without flow to learn from. The two shallow layers run on every frame anyway.
# Compare them in a window of $R = 4$ cells (9×9 cells, 16 px to each side), and take the key's features by
# these weights.
#
# **Predict:** where is attention spread over the most cells: on things, on background, or on background that a
# thing has just uncovered?


# %% slideshow={"slide_type": "fragment"}
def carry(name, t, k):
    """What is recorded (1, 81, 16, 16), and the mask (64, 64), for frame t of our clip from frame k."""
    way = model.way(name)
    attends = nullcontext({}) if name == "stale copy" else record(way)
    with torch.no_grad(), attends as maps:
        logits = way(frames[one, None, :, t], frames[one, None, :, k])
    return maps.get("propagate"), (logits[0].argmax(0) == 1).cpu()


weights = carry("local attention", now, key)[0][0].cpu()  # (81, 16, 16)
lab.claim("weights on the window sum to 1", (weights.sum(0) - 1).abs().max(), below=1e-5)
spread = torch.special.entr(weights).sum(0).exp()  # exp(entropy): how many cells share the weight
hidden = ~visible[one, 2::4, 2::4]  # at the cells' centers
things = truth[one, now, 2::4, 2::4] & ~hidden
for name, cells in {"things": things, "uncovered": hidden, "the rest": ~(things | hidden)}.items():
    print(f"{name:10s}{spread[cells].mean():6.1f} of 81 cells share the weight")

# %% [markdown] slideshow={"slide_type": "fragment"}
# On background, for it resembles itself; on things fewer cells share the weight. Whether the background was uncovered makes no
# difference in this clip: the spread does not tell that the true content is missing. What is fetched instead, we see below.

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Step through it.** Play the clip or move the slider; key frames are the squares on the time line. Point at a
# cell of the left picture: in the middle is the key frame, with the weights of that cell, and a blue cross
# where the exact flow fetches. On the right are the truth (blue) and what comes out (orange), carried in the way
# that the menu says. On paper, the picture below it shows one frame.

# %% slideshow={"slide_type": "fragment"}
keys = [0, 0, 0, 0, 4, 4, 4, 4, 8]
fed = list(enumerate(keys))
flows = [flow_between(batch, t, k)[0][one, :, 2::4, 2::4] for t, k in fed]
windows = [carry("local attention", t, k)[0][0] for t, k in fed]
results = {name: torch.stack([carry(name, t, k)[1] for t, k in fed])
           for name in ("stale copy", "learned flow", "local attention")}  # fmt: skip
results["every frame"] = torch.stack([carry("stale copy", t, t)[1] for t in range(9)])
clip = rearrange(frames[one], "c t h w -> t c h w")
player = Player(clip, keys, torch.stack(flows), torch.stack(windows), truth[one], results)

# %% tags=["explorer", "nbval-ignore-output"] slideshow={"slide_type": "fragment"}
player

# %% slideshow={"slide_type": "fragment"}
player.figure(7, (row, column), "local attention")
plt.show()

# %% [markdown] slideshow={"slide_type": "fragment"}
# The white square is the cell's own place, the cross where the flow points; the weights lie beside the cross. What is
# orange, the head calls a thing.

# %% [markdown] slideshow={"slide_type": "subslide"}
# **What becomes of the ghost?** For a cell that was just uncovered, the true motion points to where the thing was standing,
# and flow has to fetch from there. Attention looks for something *alike* nearby, and background has more
# of its kind around it. The same features, carried in four ways, eight frames after the key frame. "Matched flow" is a warp again,
# by one displacement a cell: that to the best match of the same shallow features in the same window.
#
# **Before you run it:** which of the two makes the difference where the content is hidden: that there are many
# displacements, or that they are chosen by likeness?

# %% slideshow={"slide_type": "fragment"}
carriers = ch07.carried_by(model)
by_region = {}
for name in ("stale copy", "exact flow", "matched flow", "local attention"):
    by_region[name] = scores = video_tasks.segmentation_scores(carriers[name](test, 8))
    print(f"{name:16s}" + "".join(f"{region}: {scores[region]:.2f}   "
                                  for region in ("visible", "hidden")))  # fmt: skip
gain = {name: scores["hidden"] - by_region["exact flow"]["hidden"]
        for name, scores in by_region.items()}  # fmt: skip
lab.claim(
    "where it is hidden, attention is far ahead of exact flow", gain["local attention"], above=0.1
)
lab.claim(
    "and so is one displacement, if it was chosen by likeness", gain["matched flow"], above=0.1
)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Likeness. A displacement that is *wrong as motion* is right as a place to fetch from: what is there looks like what is here.
# Nearly all of the gain is in that, and little in taking a mean of many. For the head, "background like this" is as good as
# "this background". Ask for a task where it is not, and the argument falls.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 7 · Reach
#
# A flow may point anywhere. Attention to a window sees $R$ cells of $s$ pixels, and nothing beyond: once
# a thing has moved by more than $R \cdot s$ px, its content is not there to be found.
#
# **Before you look:** here all things move at one speed, and the key frame is four frames old. Attention is not
# trained at all (the cosine of the shallow features as they are, $\tau = 0.07$). At which speed must the
# window of $R = 2$ fail, and at which that of $R = 4$? And what will attention to the whole map do? (Means of three
# seeds, `attnlab results 07_video.speeds`; the picture, with every way there is, comes in section 10.)

# %% slideshow={"slide_type": "fragment"}
rows = lab.results.load("07_video.speeds")["rows"]
by_speed = {
    row: [scores[f"{speed} px"]["mean"] for speed in ch07.SPEEDS] for row, scores in rows.items()
}
print(f"{'mIoU at px a frame:':26s}" + "".join(f"{speed:7d}" for speed in ch07.SPEEDS))
near, everywhere = ch07.REACHES
for row in ("every frame", "stale copy", "exact flow", near, "cosine attention", everywhere):
    label = f"{row}, R = 4" if row == "cosine attention" else row
    print(f"{label:26s}" + "".join(f"{score:7.3f}" for score in by_speed[row]))

# %% slideshow={"slide_type": "fragment"}
lab.claim("R = 2 fails at 4 px a frame, which is 16 px in four frames",
          by_speed["cosine attention, R = 2"][2] - by_speed["cosine attention, R = 2"][3], above=0.1)  # fmt: skip
lab.claim("R = 4 fails at 6 px a frame, 24 px",
          by_speed["cosine attention"][3] - by_speed["cosine attention"][4], above=0.08)  # fmt: skip
lab.claim("attention to the whole map does not", min(by_speed["cosine attention, full"]), above=0.6)
lab.claim(
    "at rest, copying is better than exact flow",
    by_speed["stale copy"][0] - by_speed["exact flow"][0],
    above=0.02,
)

# %% [markdown] slideshow={"slide_type": "fragment"}
# With $v$ px a frame, the collapse comes where $4 v > R \cdot s$: beyond 2 px a frame for $R = 2$ and 4 for $R = 4$, down
# to about exact flow, and for $R = 2$ at 6 px below it. The whole map holds. Up to there, attention that was never trained is
# about as good as the backbone on every frame. And look at the left end: where all things stand still, copying is perfect, and *exact*
# flow is not. The camera pans, so that background beside a thing came from behind it: a ghost again.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 8 · Train it
#
# Live: the embedding that attention compares by (one 1×1 convolution of 48 channels) and its temperature, 60
# steps through the task alone. Backbone and head stay as they are. Each step draws a frame and a key frame
# up to eight frames before it, and the loss is that of the masks: nobody says where anything moved.

# %% tags=["nbval-ignore-output"] slideshow={"slide_type": "fragment"}
learner, few = ch07.untrained(model), ch07.clips("test", 48).to(device)
before = [ch07.miou(answers_at(learner, few, offset)) for offset in (1, 4, 8)]
with video_tasks.frozen(model.backbone, model.head):
    history = lab.fit(
        learner, ch07.clips("train", 512), loss=partial(video_tasks.pair_loss, reach=8), steps=60,
        batch_size=16, lr=1e-3, weight_decay=0.0, label_smoothing=0.0, device=device,
    )  # fmt: skip
after = [ch07.miou(answers_at(learner, few, offset)) for offset in (1, 4, 8)]
print("mIoU 1, 4, 8 frames on, before:", [round(score, 3) for score in before])
print("                         after:", [round(score, 3) for score in after])
print("temperature:", round(learner.propagate.temperature.item(), 3))
stale = [ch07.miou(answers_at(copy, few, offset)) for offset in (1, 4, 8)]
print("            stale copy:", [round(score, 3) for score in stale])

# %% slideshow={"slide_type": "fragment"}
lab.claim("attention beats the copy at 8 frames by over 0.1", after[2] - stale[2], above=0.1)
lab.claim("and did before it was trained", before[2] - stale[2], above=0.1)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Training adds little and sharpens the softmax (the temperature falls from 0.07): most of the work was done by the
# cosine of the shallow features as they were.

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Everything against everything.** One backbone for each of three seeds, trained on single frames and then left
# alone. Each row carries its features in another way, to the *same* last frame of 128 clips (photographs that were
# never trained on), from a key frame 1, 2, 4 or 8 frames before it: `attnlab results 07_video.offsets`. What has
# parameters got 100 steps through the task; the flow network was trained with exact flow before (6,000 steps, once for all seeds). "Matched flow"
# and "cosine attention" are not trained: both compare the same shallow features in the same window, and
# the first warps by the one best match, the second takes all by their weights. "Progressive" is local attention to
# $1 + 8R = 33$ of the 81 cells, dense in the middle and sparse outside; LWDN (end of section 9) predicts weights.
#
# **Before you look:** order the rows at 8 frames. Where will the oracle be, exact flow?

# %% slideshow={"slide_type": "fragment"}
lab.results.show("07_video.offsets")

# %% slideshow={"slide_type": "fragment"}
rows = lab.results.load("07_video.offsets")["rows"]


def at(row, metric="8"):
    return torch.tensor(rows[row][metric]["values"])


gain, loss = at("local attention") - at("exact flow"), at("exact flow") - at("stale copy")
spread = max(at(row).std().item() for row in ("local attention", "exact flow", "stale copy"))
lab.claim("at 8 frames local attention beats exact flow in every seed", gain.min(), above=0.02)
lab.claim("and exact flow beats the stale copy in every seed", loss.min(), above=0.02)
lab.claim(
    "both by more than the spread of the seeds", min(gain.mean(), loss.mean()) / spread, above=1
)
unseen = at("local attention", "hidden, 8") - at("exact flow", "hidden, 8")
visible_gap = at("local attention", "visible, 8") - at("exact flow", "visible, 8")
lab.claim(
    "the gain is where the key frame hides the content", (unseen - visible_gap).min(), above=0.1
)
lab.claim(
    "one best match gets most of it", (at("matched flow") - at("exact flow")).min(), above=0.05
)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Read it slowly; not all of it is what one would like to tell.
#
# - **At 8 frames** local attention (0.655) is ahead of exact flow (0.563), and exact flow of the stale copy (0.474), by far
#   more than the spread of the seeds. Where the key frame shows the content, attention is ahead by little (0.666 to 0.652);
#   where it hides it, by a lot (0.600 to 0.384).
# - **Matched flow** takes *one* cell, from the same window, by the same likeness, untrained: 0.644. So nearly all of the gain
#   over exact flow is likeness. With the same untrained likeness, many weights are behind the one best match at 8
#   frames, and a little ahead of it up to four; local attention has 100 steps of training too. At small offsets
#   attention is even a little ahead of running the backbone on every frame: a mean of alike cells may calm the features
#   (we did not test why).
# - **Attention to the whole map** is best at every offset, by less than 0.01 up to four
#   frames and by over 0.04 at 8, where things have moved by up to 32 px and the window ends at 16. The false distant matches that one might fear do not show here.
# - **The flow network** learned little from its 6,000 steps: on things its error is 15 px after 8 frames, where "nothing
#   moves" has 16. It still beats the copy. The papers' networks saw far more data, so exact flow is the fairer opponent.
# - **LWDN** is behind the copy at one frame. 100 steps are no verdict on the method: its predictor starts from nothing, where
#   the cosine works before any training.

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Boxes.** The same with torchvision's FCOS head on the carried features: mean average precision (mAP, IoU 0.5) of boxes
# around things, one head for all rows, nothing trained for carrying (`attnlab results 07_video.detection`).

# %% slideshow={"slide_type": "fragment"}
lab.results.show("07_video.detection")

# %% slideshow={"slide_type": "fragment"}
boxes = lab.results.load("07_video.detection")["rows"]
found = {row: torch.tensor(boxes[row]["4"]["values"]) for row in boxes}
lab.claim("four frames on, attention is ahead of exact flow by over 0.2 in every seed",
          (found["cosine attention"] - found["exact flow"]).min(), above=0.2)  # fmt: skip
lab.claim("and level with every frame, within 0.06 on average",
          (found["every frame"] - found["cosine attention"]).mean(), below=0.06)  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# From two frames on the same order, and larger gaps; a likely reason: a ghost is a box too many, and the copy's boxes are beside their things (0.16 four frames
# on). At one frame exact flow is ahead of attention (0.68 to 0.65, spreads 0.05), and at 8 frames attention loses a third of
# its score: the window has ended.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 9 · More than one frame
#
# So far a key frame served to *save*. Neighbors can also *help*: where a frame is noisy or blurred, average
# its features with those of the frames around it. **Flow-guided aggregation** (FGFA) warps the features of
# $N = 2K + 1$ frames onto the current one and weighs them, at every cell, by how alike they are to its own:
#
# $$w_j(p) = \operatorname{softmax}_{j}\Big(\tfrac{\cos(e_{j \to i}(p),\, e_i(p))}{T}\Big), \qquad
# \bar F_i(p) = \sum_{j = i - K}^{i + K} w_j(p)\, F_{j \to i}(p)$$
#
# This is attention once more, with one query and $N$ keys: the same place in $N$ frames. The paper has no
# temperature, $T = 1$. Cosines lie between −1 and 1. **Before you run it:** what is the largest weight
# that the current frame can get among 21, if all others are the very opposite of it?

# %% slideshow={"slide_type": "fragment"}
current = F.normalize(torch.randn(1, 8, 1, 1), dim=1)
opposite = torch.stack([current] + 20 * [-current], dim=1)  # (1, 21, 8, 1, 1)
for T in (1, 0.3, 0.1):
    own = video.cosine_weights(opposite, current, T)[0, 0].item()
    print(f"T = {T:<4g} weight of the current frame: {own:.3f}")
own = video.cosine_weights(opposite, current)[0, 0].item()
lab.claim(
    "at T = 1 it is about a quarter: bad frames are dimmed, not removed", own, equal=0.27, tol=0.002
)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Two weights never differ by more than a factor of $e^2 = 7.4$. So ghosts are in the mean, too.
#
# **Under noise** of strength 0.3 (a backbone trained with noise up to that; exact flow; features compared as
# they are; three seeds, `attnlab results 07_video.noise`). **Predict** two things: what do nine frames
# do without flow? And are more frames always better with it?

# %% slideshow={"slide_type": "fragment"}
lab.results.show("07_video.noise")

# %% slideshow={"slide_type": "fragment"}
rows = lab.results.load("07_video.noise")["rows"]
series = {row: [[rows[row][f"{n} frames"]["values"][seed] for n in (1, 3, 5, 9)]
                for seed in range(3)] for row in rows}  # fmt: skip
plots.curve((1, 3, 5, 9), series, xlabel="frames averaged", ylabel="mIoU", size=3.2,
            title="noise of strength 0.3: averages along the motion, and without")  # fmt: skip
plt.show()

# %% slideshow={"slide_type": "fragment"}
nine = {row: torch.tensor(rows[row]["9 frames"]["values"]) for row in rows}
alone = torch.tensor(rows["cosine, T = 1"]["1 frames"]["values"])
lab.claim("without flow nine frames are worse than one, by over 0.04 in every seed",
          (alone - nine["mean, no flow"]).min(), above=0.04)  # fmt: skip
best = max((values - alone).mean().item() for values in nine.values())
lab.claim("with it, nine frames gain less than 0.01 at best", best, below=0.01)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Without flow, a wide window blurs what moves. With it, the gain is at most 0.004, about one spread: **nearly nothing**, where FGFA
# reports three points of mAP. The backbone was trained with this noise, and may have no need of its neighbors; blur and
# defocus, for which the method was made, are not here. What can be read from the table is the order at nine frames: plain mean below
# $T = 1$ below $T = 0.1$. The more frames, the more ghosts, and the more it matters that a weight can get small.

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Sparse recursion** (Zhu et al. 2018) joins both ideas: aggregate at key frames only, and recursively. The memory
# of all key frames so far is warped to the new one and merged with it by the two-frame softmax
# above. Its weight lies between $e^{-1}/(e^{-1} + e) = 0.12$ and $1/2$: a memory never outweighs what is seen now,
# and in a scene that stands still the oldest of $n$ key frames counts $2^{-(n-1)}$. The rest of the paper is about
# spending where it matters: a field $Q$ beside the flow says where the warp is bad, features are
# computed anew there ($Q$ below a threshold), and where that is too much of the frame, it becomes a key frame.
# In the paper a partial update saves time within the backbone, each of whose layers is computed only where it is needed, from
# the partly updated layer below. Our backbone is any module and runs as a whole, so that here a partial update saves nothing,
# and only its share of cells is counted.

# %% slideshow={"slide_type": "fragment"}
flow_net = model.carriers["learned flow"].flow_net
merge = video.FrameAggregator(ch07.WIDTH, identity=True)
recursive = video.SparseRecursiveAggregation(
    model.backbone, model.head, flow_net, merge, interval=2
)
recursive.eval().reset()
for t in range(9):
    recursive.step(frames[:1, :, t])
lab.claim(
    "a key frame every second frame: the backbone ran 5 times in 9", recursive.n_backbone, equal=5
)
same = torch.ones(1, 2, 4, 1, 1)
lab.claim("equal frames share: 1/2 each", video.cosine_weights(same, same[:, 0])[0, 0], equal=0.5)

# %% [markdown] slideshow={"slide_type": "fragment"}
# **LWDN** (Jiang et al. 2019) is between flow and attention: a small network reads the correlation of shallow
# features and *predicts* weights (and, at key frames, offsets) for $n \times n$ sampling points. One point with the
# weight 1 and the flow for an offset is DFF; without offsets it is section 3's sum with predicted weights. It was
# in the table of section 8, with 5×5 points and no offsets: reach 2 cells.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 10 · What it costs
#
# A key frame costs 1. Every other frame costs $r$: what carries the features, and the head. With a key
# frame every $l$ frames, the speed-up is
#
# $$s(l) = \frac{l}{1 + (l - 1)\, r}, \qquad s(1) = 1, \qquad s(\infty) = 1 / r$$
#
# For attention to a window, $r$ is made of the two shallow layers, $h w D^2$ for the embedding, $h w L (D + C)$ for the
# attention, and the head. Do not believe it: count.


# %% slideshow={"slide_type": "fragment"}
def between(name):
    """Multiply–accumulates of a frame that is no key frame, the key frame's being there."""
    way = model.way(name)
    with torch.no_grad():
        at_key = way.embed(one_frame)
    return cost.macs(lambda: way.head(way.propagate(way.embed(one_frame), at_key, features)))


cells, L, D, C = 16 * 16, 81, 48, 64
ratios = {name: between(name) / full for name in ch07.WAYS}
attend = cells * L * (D + C) / full  # the loop over displacements is elementwise: counted by hand
ratios["local attention"] = (parts["shallow"] + parts["head"]) + cells * D * D / full + attend
ratios["progressive"] = ratios["local attention"] - attend * (1 - 33 / 81)
ratios["LWDN"] += cells * (L * D + 25 * C) / full
for name, r in ratios.items():
    print(f"{name:16s} r = {r:.3f}, 8 frames cost as much as {8 / video.dff_speedup(8, r):.2f} did")
lab.claim("at this size attention to a window is cheaper than the flow network",
          ratios["learned flow"] - ratios["local attention"], above=0.05)  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# The library's kernel computes more than the formula: a tile of 8×8 queries sees a square of $(8 + 2R)^2 = 256$ keys, of
# which each query keeps 81. On a map of 16×16 that is the whole map, and attention to a window saves nothing
# over attention to everything; its saving is $L / (h w)$, and begins with large maps.

# %% slideshow={"slide_type": "fragment"}
for name, h, w in (("our clips, stride 4", 16, 16), ("600×1000 px, stride 16", 38, 63)):
    print(f"{name:24s} window / whole map: {L / (h * w):.3f}")
fast = model.way("local attention")
with torch.no_grad():
    at_key = fast.embed(one_frame)
tiled = cost.macs(lambda: fast.propagate(at_key, at_key, features))
lab.claim("on 16×16 cells the tiles see every key", tiled, equal=cells * cells * (D + C))


def peak(impl, side=32):
    q, k, v = (torch.randn(1, channels, side, side) for channels in (48, 48, 64))
    return cost.peak_memory(lambda: video.local_attention_warp(q, k, v, 4, impl=impl)) / 2**20


held = {impl: peak(impl) for impl in ("unfold", "explicit", "fused")}
print("MiB at once, 32×32 cells:", {impl: round(mib, 1) for impl, mib in held.items()})
lab.claim("copying windows takes over five times what one displacement after another takes",
          held["unfold"] / held["explicit"], above=5)  # fmt: skip
lab.claim("and over twice what tiles take", held["unfold"] / held["fused"], above=2)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Accuracy, motion and cost in one picture.** On the left, things move at one speed, and the key frame is four frames old
# (`attnlab results 07_video.speeds`; the recursion has a second key frame in between, and FGFA sees all five). On the
# right, a key frame every 1, 2, 4 or 8 frames (from right to left) against the cost that was counted above;
# accuracy is what a video gets, the mean over the frames between two key frames (`attnlab results 07_video.intervals`).
# Three seeds each. **Before you look:** which point would you take at a third of the cost? And up to which speed?

# %% slideshow={"slide_type": "fragment"}
rows = lab.results.load("07_video.intervals")["rows"]
matched = parts["shallow"] + parts["head"] + cells * (L * D + 4 * C) / full
r_of = {**ratios, "exact flow": parts["head"], "matched flow": matched,
        "cosine attention": ratios["local attention"] - cells * D * D / full}  # fmt: skip
r_of["sparse recursion"] = r_flow = ratios["learned flow"]
costs = {"every frame": [1], "FGFA, 5 frames": [1 + 4 * (r_flow - parts["head"])]}
for name, r in r_of.items():
    at_keys = r if name == "sparse recursion" else 0  # which runs the flow network there too
    steps = [int(metric[4:]) for metric in rows[name]]  # of "l = 8"
    costs[name] = [1 / video.dff_speedup(l, r) + at_keys / l for l in steps]
scores = {name: [score["mean"] for score in rows[name].values()][: len(costs[name])]
          for name in costs}  # fmt: skip

# %% slideshow={"slide_type": "fragment"}
families = {"-": ["local attention", "full attention", "cosine attention", "progressive", "LWDN"],
            "--": ["exact flow", "learned flow", "matched flow", "sparse recursion",
                   "FGFA, 5 frames"],
            ":": ["every frame", "stale copy"]}  # fmt: skip
look = {name: {"linestyle": line} for line, names in families.items() for name in names}
for n, style in enumerate(look.values()):
    style |= {"color": plots.COLORS[n % 7], "marker": "osD^vPX*hd<>"[n], "markersize": 5}


def name_ends(ax, ends, edge, gap=0.0125):
    """Each line's name at x = edge, beside its end (x, y); names that would overlap move apart."""
    names, heights = sorted(ends, key=lambda name: ends[name][1]), []
    for name in names:
        heights.append(max([ends[name][1], *(height + gap for height in heights[-1:])]))
    down = sum(heights) / len(ends) - sum(y for _, y in ends.values()) / len(ends)
    for name, height in zip(names, heights, strict=True):
        ax.annotate(
            name, ends[name], (edge, height - down), color=look[name]["color"], fontsize=8,
            va="center", ha="left" if edge > ends[name][0] else "right", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "lightgray", "shrinkA": 0, "zorder": 0},
        )  # fmt: skip


# %% slideshow={"slide_type": "fragment"}
with plots.style():
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 5.4), sharey=True)
for name, style in look.items():
    left.plot(ch07.SPEEDS, by_speed[name], **style)
    right.plot(costs[name], scores[name], **style)
name_ends(left, {name: (6, by_speed[name][-1]) for name in look}, edge=6.5)
ends = {name: (costs[name][-1], scores[name][-1]) for name in look}
for name in ("every frame", "FGFA, 5 frames"):
    name_ends(right, {name: ends[name]}, edge=1.15 * ends.pop(name)[0])
name_ends(right, ends, edge=0.105)
left.set(xlabel="speed (px a frame)", ylabel="mIoU", xticks=ch07.SPEEDS,
         title="against motion, four frames after the key frame")  # fmt: skip
right.set(xlabel="cost of a frame, as a share of running all on it", xscale="log",
          title="against cost: up and to the left is better")  # fmt: skip
right.set_xticks([1 / 8, 1 / 4, 1 / 2, 1, 2], ["1/8", "1/4", "1/2", "1", "2"])
right.set_xticks([], minor=True)
plt.show()

# %% slideshow={"slide_type": "fragment"}
lab.claim("attention with a key frame every eighth frame is within 0.02 of running all on every frame",
          abs(rows["local attention"]["l = 8"]["mean"] - rows["every frame"]["l = 1"]["mean"]),
          below=0.02)  # fmt: skip
lab.claim(
    "at about a quarter of the cost", 1 / video.dff_speedup(8, r_of["local attention"]), below=0.27
)
falls = {name: by_speed[name][3] - by_speed[name][4] for name in families["-"][:4]}
lab.claim("from 4 to 6 px a frame attention to a window falls by over 0.05",
          min(fall for name, fall in falls.items() if name != "full attention"), above=0.05)  # fmt: skip
lab.claim("and attention to the whole map does not fall", falls["full attention"], below=0.01)

# %% [markdown] slideshow={"slide_type": "fragment"}
# On the left, three shapes. Ways with a window of $R = 4$ are level with the backbone on every frame until the window ends,
# at 4 px a frame, and so is the best match in it. Ways that rest on flow, and the copy, fall from the start; LWDN, whose reach is two cells, falls most
# between 2 and 4 px. Attention to the whole map does not fall.
#
# On the right, near a third of the cost: local attention with a key frame every fourth frame, or, on this small map, attention
# to all of it with one every eighth. Local attention is level with the backbone on
# every frame down to a quarter of the cost. Attention to the whole map is a little ahead of it on this map of 256 cells, and would be the
# wrong choice on one of 2,394. (A window's cost is by the formula, 81 keys a query. The tiled kernel computes
# all 256 of this map, which costs as much as the flow network.) By the formula, the flow network costs more
# than the attention and carries worse, and FGFA and the recursion, which both rest on it here, lose accuracy on clean frames:
# averaging along a wrong flow probably adds ghosts. (FGFA has only the four frames before the current one here. Along
# the exact flow, under noise, five frames neither lose nor gain: section 9.)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 11 · Paper and here
#
# Our clips are small, their motion is whole pixels, and the whole model costs as much as ten times its two shallow layers.
# Published numbers are of the authors' or others' released code, on ImageNet VID (boxes, ResNet-101), and come from
# the READMEs named.
#
# | claim | published | here | why they may differ |
# |---|---|---|---|
# | DFF: much faster, little lost | mAP 74.1 → 73.0, 0.271 → 0.073 s a frame on a K40 (authors' README, MXNet) | mIoU 0.693 → 0.654 at $l$ = 4, 2.4 times faster in arithmetic, section 10 | their flow network is pre-trained on far more data; VID moves little between frames |
# | what is lost is lost on fast things | fast 52.3 → 48.3, slow 84.9 → 84.5 (`mega.pytorch` README) | the copy and exact flow fall with speed, section 7 | – |
# | FGFA: neighbors help | 74.1 → 77.1, fast things 51.2 → 56.1 (authors' README) | at most +0.004, section 9: nearly nothing | noise was trained on, exact flow, no training of the aggregation; no blur here |
# | attention in place of flow is lighter | LWDN 76.3 mAP at 20 frames a second on a Titan X (abstract) | LWDN behind the copy at one frame and a little ahead from two on, after 100 steps, cosine attention far ahead of it, section 8; of the two only the cosine is cheaper than the flow network, section 10 | the predictor reads 81 correlations here; its details are not published |
# | train all of it together | an ablation in DFF, section 5; its numbers could not be confirmed | table below | – |
#
# DFF trains backbone, flow network and head together, through the task alone. What if one of them may not learn?
# 100 steps each (none for "trained apart"), from the same start (`attnlab results 07_video.training`):

# %% slideshow={"slide_type": "fragment"}
lab.results.show("07_video.training")

# %% slideshow={"slide_type": "fragment"}
rows = lab.results.load("07_video.training")["rows"]
later = {row: torch.tensor(rows[row]["8 frames on"]["values"]) for row in rows}
for row in ("backbone frozen", "flow network frozen", "trained apart"):
    lab.claim(f"jointly beats {row} in every seed", (later["jointly"] - later[row]).min(), above=0)
lab.claim("it matters more that the flow network may learn",
          (later["backbone frozen"] - later["flow network frozen"]).min(), above=0)  # fmt: skip
drift = [rows[row]["flow error on things, px"]["mean"] for row in ("jointly", "trained apart")]
lab.claim("and what it learns is not flow: its error grows", drift[0] - drift[1], above=0.3)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Between key frames it holds here: all together is best (on key frames themselves it gains nothing), and of the two parts the
# flow network is the one that has to adapt. It becomes *worse* as a flow (on things four frames on) and better for the task.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 12 · Exercises
#
# Write the body, run the cell, run the check. `lab.hint("video.speed_up")` gives a hint,
# `lab.solution("video.speed_up")` the solution.
#
# **1 · How fast?** (5 minutes) Then: from which $l$ on is $s(2l)$ less than 10 % above $s(l)$, for $r$ = 0.2? (From 19 on; at 18 it is exactly 10 %.)


# %% exercise="video.speed_up" tags=["exercise"] slideshow={"slide_type": "fragment"}
def speed_up(interval: int, ratio: float) -> float:
    """How many times faster a video becomes with one key frame in `interval` frames.

    A key frame costs 1, and so does every frame of a video without this trick. Each of the other
    interval − 1 frames costs `ratio`: flow, warp and head, as a share of a key frame.
    Returns a float, the ratio of the two costs.
    """
    raise NotImplementedError


# %% slideshow={"slide_type": "fragment"}
lab.check("video.speed_up", speed_up)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **2 · The attention that is a flow** (10 minutes). Build the weights for the flow $(0.25, -1.5)$ on paper first.


# %% exercise="video.hat_weights" tags=["exercise"] slideshow={"slide_type": "fragment"}
def hat_weights(flow: torch.Tensor, radius: int) -> torch.Tensor:
    """The attention weights with which a window does what bilinear sampling does.

    flow: (2,), the displacement (dx, dy) in cells, dx to the right, dy down, each within ±radius.
    The neighbor at the offset (x, y) gets max(0, 1 − |x − dx|) · max(0, 1 − |y − dy|).
    Returns (2 radius + 1, 2 radius + 1); entry [y + radius, x + radius] belongs to (x, y).
    """
    raise NotImplementedError


# %% slideshow={"slide_type": "fragment"}
lab.check("video.hat_weights", hat_weights)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **3 · Which frame counts?** (10 minutes) FGFA's weights. Which axis is the softmax over? And why can one train with two
# neighbors and test with twenty? (The softmax runs over the frames. Nothing that is learned has an axis of $N$, and the
# weights sum to 1 for any $N$.)


# %% exercise="video.frame_weights" tags=["exercise"] slideshow={"slide_type": "fragment"}
def frame_weights(
    embeddings: torch.Tensor, current: torch.Tensor, temperature: float
) -> torch.Tensor:
    """How much each of N frames counts at each position of the current one.

    embeddings: (N, D, H, W), one map a frame, already warped onto the current frame.
    current: (D, H, W), the current frame's own.
    The score of frame j at a position is the cosine of its embedding there with the current one's,
    divided by `temperature`; the weights of the N frames at a position are a softmax of it. An
    embedding of zeros has the cosine 0 with everything.
    Returns (N, H, W).
    """
    raise NotImplementedError


# %% slideshow={"slide_type": "fragment"}
lab.check("video.frame_weights", frame_weights)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **4 · Find the bug** (10 minutes), and then the open part. It is in code that many have used.
#
# Then: ghosts are where the key frame hides what the frame shows, and `video.visibility` finds these cells (section 5).
# Attention is better there, flow may be better elsewhere, since it has no reach. Build a way to carry
# features that takes flow where it can be trusted and attention where it cannot. Which score would convince you, at
# which speeds, against which rows of section 8? `ch07.exact_flow_at` and `ch07.untrained` are a start.


# %% exercise="video.buggy_warp" tags=["exercise"] slideshow={"slide_type": "fragment"}
def buggy_warp(features: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """Fetch every cell from where the flow points. One line is wrong: mend it.

    features: (C, H, W), H and W at least 2. flow: (2, H, W), dx and dy in cells: the result at
    (y, x) is `features` at (y + dy, x + dx), bilinear between cells, the border repeated outside.
    `grid_sample` with align_corners=True wants −1 for the first cell's center and 1 for the last's.
    Returns (C, H, W).
    """
    height, width = features.shape[1:]
    x = torch.arange(width) + flow[0]
    y = torch.arange(height)[:, None] + flow[1]
    sides = torch.tensor([width, height])
    grid = 2 * torch.stack([x, y], dim=-1) / sides - 1
    options = {"mode": "bilinear", "padding_mode": "border", "align_corners": True}
    return torch.nn.functional.grid_sample(features[None], grid[None], **options)[0]


# %% slideshow={"slide_type": "fragment"}
lab.check("video.buggy_warp", buggy_warp)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 13 · Take home
#
# - Deep features need not be computed on every frame; they have to be carried to where their content went.
#   A flow carries by one displacement a cell, attention by weights on a neighborhood; the bilinear warp is attention
#   with the weights of a hat.
# - A warp duplicates what it should uncover. Even exact flow makes ghosts, and only there, while attention
#   looks for something alike.
# - Attention to a window is cheap and needs no flow to learn from, and it ends at $R \cdot s$ pixels: beyond
#   them it can at best fetch something alike.
#
# **Common misconceptions.** *Flow pushes features forward* (it says where to fetch). *Better flow removes ghosts* (exact
# flow has them). *The attention map is a flow* (it is a distribution; with two peaks its mean points between them).
# *Cosine weights mask what is covered* (at $T = 1$ no two differ by more than 7.4 times). *More frames are always
# better* (without flow they blur, and with it a plain mean of nine is still behind one). *Local attention is always cheaper than global* (on a small map it is the whole map).
# *DFF improves accuracy* (it saves; what appears between two key frames it cannot see).
#
# **On a video of your own**: `attnlab video clip.mp4 --out out.mp4` runs a shipped model on it, frame by frame.
#
# **Where next.** Chapter 08 asks which patches a class token reads, and how little attention is needed for that.
#
# **References.** Zhu et al. 2017 a, *Deep feature flow for video recognition*, section 3 · Zhu et al. 2017 b,
# *Flow-guided feature aggregation for video object detection*, section 3 · Zhu et al. 2018, *Towards high performance video
# object detection*, section 3 · Jiang et al. 2019, *Video object detection with locally-weighted deformable
# neighbors* · Guo et al. 2019, *Progressive sparse local attention for video object detection* · Xiao & Lee 2018, *Video
# object detection with an aligned spatial-temporal memory*.
