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
# # 08 · PatchConvNet: one softmax that says where the network looked
#
# **At the end you can** replace the last average of a convolutional network by an attention with a
# single map, fold that attention into a 1×1 convolution, give every class a map of its own, and
# measure what such a map is worth as a witness.
#
# | | |
# |---|---|
# | to read | 60 minutes, exercises another 35 |
# | to run | about 60 seconds on two CPU cores |
# | you need | chapters 01 (attention) and 03 (squeeze-and-excitation), a convolution; Grad-CAM of chapter 04 helps |
# | paper | Touvron et al. 2021, *Augmenting convolutional networks with attention-based aggregation*, arXiv 2112.13692 |
#
# **What stands on what.** We could not read the paper itself. Equations, sizes and defaults are those
# of the authors' code, and the accuracies are those of its README; where a survey article is the only
# source, the text says so.

# %% slideshow={"slide_type": "skip"}
from functools import partial

import matplotlib.pyplot as plt
import timm
import torch
from einops import einsum, rearrange
from timm.models.cait import LayerScaleBlockClassAttn
from torch.nn import functional as F
from torch.testing import assert_close
from tqdm.auto import tqdm

import attnlab
from attnlab import lab, patchconvnet
from attnlab.attention_pooling import AttentionPool
from attnlab.feature_maps import MapBackbone
from attnlab.heads import Segmenter, UPerNetHead, segmentation_loss
from attnlab.lab import cost, mask_rcnn, metrics, plots
from attnlab.lab.class_explorer import ClassExplorer, color_by_class
from attnlab.lab.experiments import ch08
from attnlab.lab.gradcam import gradcam
from attnlab.patchconvnet import patchconvnet_mini, patchconvnet_s60, patchconvnet_s120
from attnlab.resnet import resnet50

device = lab.device()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 1 · The failure
#
# Chapter 07 ended with features carried from frame to frame. Whatever a network does before, its last
# step turns a map of places into one vector, and this is where we can ask: *which places counted?*
#
# A convolutional network answers: all of them alike. `resnet_mini` of chapter 04 names the object in
# 64-pixel scenes (objects on photographs), and takes the mean of its last map $F$ over all places.
# **Before you run it:** how much of the mean is about the object, and what does the network say when
# the places of $F$ are shuffled?

# %% slideshow={"slide_type": "fragment"}
scene_batch = lab.load("scenes", "test_scenes", n=300).batch(slice(None))
scenes, masks = scene_batch["image"].to(device), scene_batch["saliency"]  # masks: 1 on the object
resnet = lab.checkpoints.load("resnet_mini_scenes", device=device)
with torch.no_grad():
    F_last = resnet.forward_stages(scenes)["layer4"]  # (300, 128, 4, 4): images, channels, places
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).to(device)
    shuffled = rearrange(F_last, "b c h w -> b c (h w)")[..., order]
    change = (shuffled.mean(-1) - F_last.mean((2, 3))).abs().max().item()
area = masks.mean().item()
lab.claim("the mean does not notice that all places were shuffled", change, below=1e-5)
lab.claim("it gives the object what it has of the area, 7 %", area, equal=0.067, tol=0.005)

# %% [markdown] slideshow={"slide_type": "subslide"}
# Every place weighs $1/16$, whatever it shows: nine tenths of the weight go to places over background.
#
# A Vision Transformer has a softmax at the end. `vit_mini` of chapter 01 reads the answer off a class
# token, and half of that token's last map lay on the object. Is that map the reason for the answer?
# Test it as one tests a witness: **take the map away** (all weights of the last block equal), and see
# whether the answer needed it. **Guess** the accuracy, which is 0.84 with the map.


# %% slideshow={"slide_type": "fragment"}
class Tempered(torch.nn.Module):
    """Stands where a probe stands: weights to the power 1/T, again with sum 1. T = ∞: all equal."""

    def __init__(self, temperature):
        super().__init__()
        self.power = 1 / temperature

    def forward(self, weights):
        return (self.power * weights.clamp(min=1e-30).log()).softmax(-1)


def accuracy_with(module, temperature, model, batch):
    """Share that is right when the weights of `module`, an attention in `model`, are tempered."""
    probe, impl = module.attn_probe, module.impl
    module.attn_probe, module.impl = Tempered(temperature), "explicit"
    try:
        return lab.train.accuracy(model, batch, device=device)
    finally:
        module.attn_probe, module.impl = probe, impl


# %% slideshow={"slide_type": "fragment"}
parts = lab.load("parts", "test", n=300).batch(slice(None))
vit = lab.checkpoints.load("vit_mini_parts", device=device)
with torch.no_grad(), attnlab.record(vit) as maps:
    vit(parts["image"].to(device))
last = maps["blocks.5.attn"][:, :, 0, 1:].cpu()  # (300, 3, 64): images, heads, patches
looks = rearrange(last.mean(1), "b (h w) -> b h w", h=8)
on_object = metrics.energy_inside(looks, parts["saliency"]).mean().item()
favorite = last.argmax(-1)
agree = (favorite == favorite[:, :1]).all(1).float().mean().item()
with_map = lab.train.accuracy(vit, parts, device=device)
without = accuracy_with(vit.blocks[5].attn, torch.inf, vit, parts)
print(f"accuracy with the last map {with_map:.2f}, with equal weights in its place {without:.2f}")
lab.claim("half of the last map lies on the object", on_object, above=0.45, below=0.6)
lab.claim("its three heads have the same favorite patch in under a tenth", agree, below=0.1)
lab.claim("without the map the network loses under a fifth of its accuracy", without / with_map,
          above=0.8)  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# A weak witness. Three heads point at three places, and when all three are silenced the answer hardly
# suffers: by the last block the class token has asked five times already, and the patches have heard of each other (which of the
# two saves the answer, this test does not say).
# What we want is one map, and an answer that depends on it.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 2 · The idea in one picture
#
# Keep the convolutional network. Replace its last average by **one attention with one head and one
# query**: a learned class vector $c$ asks all places of the map once, a softmax says what each counts,
# and what comes back is added to $c$. One softmax in the whole network, and it stands at the end.
#
# Below: the network (widths and sizes of `patchconvnet_mini`, read from a forward), then what each place
# counts, for the average and for attention, on one color scale. **Guess** before you look how many of the 64
# places share half of the weight.

# %% slideshow={"slide_type": "fragment"}
model = lab.checkpoints.load("patchconvnet_mini_scenes", device=device)
one = 22
with torch.no_grad():
    stem = model.stem(scenes[one : one + 1])
    X = model.forward_features(scenes[one : one + 1])
    vector = model.pool(X)
    logits = model(scenes[one : one + 1])
flow = [("image", scenes[one : one + 1]), ("stem\n3 convolutions", stem),
        ("column\n4 equal blocks", X), ("attention\npooling", vector), ("classifier", logits)]  # fmt: skip
with plots.style():
    figure, ax = plt.subplots(figsize=(9.5, 1.7))
for place, (name, value) in enumerate(flow):
    box = {"boxstyle": "round,pad=0.5", "fc": "#e69f00" if "pooling" in name else "#dbe9f6"}
    shape = "×".join(map(str, value.shape[1:]))
    ax.text(place, 0.62, name, ha="center", va="center", bbox=box)
    ax.text(place, 0.1, shape, ha="center", va="center")
    if place:
        ax.annotate("", (place - 0.36, 0.62), (place - 0.64, 0.62), arrowprops={"arrowstyle": "->"})
ax.set(xlim=(-0.5, 4.5), ylim=(0, 1), title="the one place with a softmax is orange")
ax.axis("off")
plt.show()

# %% slideshow={"slide_type": "fragment"}
a = model.pool.maps(X, normalize=True)[0, 0].detach().cpu()  # (8, 8), sums to 1
even = torch.full((8, 8), 1 / 64)
titles = ["average: 1/64 = 0.016 each", f"attention: up to {a.max():.2f}"]
plots.overlay(scenes[one].cpu(), torch.stack([even, a]), titles, size=2.8)
plt.show()
with torch.no_grad():
    every = model.maps(scenes, normalize=True).flatten(1).cpu()  # (300, 64)
half = (every.sort(descending=True).values.cumsum(1) < 0.5).sum(1) + 1
print("median number of places that share half of the weight:", half.median().item())
lab.claim("half of the weight is shared by at most four of 64 places, in most of 300 scenes",
          half.median().item(), below=5)  # fmt: skip

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 3 · The mathematics, with shapes
#
# The trunk is plain on purpose. A stem of stride-2 convolutions (four of them at the paper's size, so that
# a place is 16 pixels wide), and $L$ equal blocks of one width and one resolution. For a map $T$ of shape
# $(d, h, w)$:
#
# $$T \leftarrow T + \gamma \circ W_2\, \mathrm{SE}\big(\mathrm{GELU}(\mathrm{DW}_{3\times3}(\mathrm{GELU}(W_1\, \mathrm{LN}(T))))\big)$$
#
# with 1×1 convolutions $W_1, W_2$ $(d \to d)$, a depthwise 3×3 convolution DW, chapter 03's
# squeeze-and-excitation SE, and $\gamma \circ$: each channel times a number of its own. Then the pooling. $X$ are the $N = hw$ places, $x_n \in \mathbb{R}^d$:
#
# $$z = \mathrm{LN}([c;\, x_1, \dots, x_N]), \qquad
# a = \operatorname{softmax}_n\Big(\frac{(W_q z_0) \cdot (W_k z_n)}{\sqrt d}\Big), \qquad
# o = W_o \sum_n a_n\, W_v z_n$$
#
# $$c \leftarrow c + \gamma_1 \circ o, \qquad c \leftarrow c + \gamma_2 \circ \mathrm{FFN}(\mathrm{LN}(c)),
# \qquad \text{logits} = W_h\, \mathrm{LN}(c)$$
#
# | symbol | shape | what it is |
# |---|---|---|
# | $c$ | $(d)$ | class vector: a parameter, the same for every image |
# | $z$ | $(N + 1, d)$ | what LayerNorm makes of $c$ (place 0) and of the places |
# | $W_q, W_k, W_v, W_o$ | $(d, d)$ each | linear maps (with biases, left out here) |
# | $a$ | $(N + 1)$ | the weights, in one softmax; $a_0$ is what $c$ gives itself |
# | $\gamma, \gamma_1, \gamma_2$ | $(d)$ each | LayerScale, small at first: $10^{-4}$ or $10^{-6}$ in the papers' sizes, 0.1 in our small ones |
# | FFN | $d \to 3d \to d$ | two linear maps with a GELU between |
# | $W_h$ | $(k, d)$ | classifier of $k$ classes |
#
# **The class vector is a key too.** The published map is $a_1, \dots, a_N$; with `normalize=True` we divide it by $1 - a_0$, so that it sums to 1.
# That everything is *added to $c$* means: the image enters the answer through $o$ alone, and in $o$ each place counts as much as $a$ says.

# %% [markdown] slideshow={"slide_type": "subslide"}
# ### By hand, once
#
# Work it out with a pencil, then run it. $d = 1$, no LayerNorm, all four matrices 1: class vector 1, two places with $x = (0, 2)$, $\gamma_1 = \tfrac12$.

# %% slideshow={"slide_type": "fragment"}
z_small = torch.tensor([1.0, 0.0, 2.0])  # the class vector, then the places
a_small = (z_small[0] * z_small).softmax(0)
o_small = (a_small * z_small).sum()
print("weights", [round(w, 3) for w in a_small.tolist()], "→ o =", round(o_small.item(), 3))
print("c =", round(1 + 0.5 * o_small.item(), 3))
print("map:", [round(w, 3) for w in (a_small[1:] / (1 - a_small[0])).tolist()])

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 4 · Build it three times
#
# **First as a loop**, for one image, place by place. `p` holds the pooling's parameters by name.


# %% slideshow={"slide_type": "fragment"}
def linear(p, name, x):
    return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])


def norm(p, name, x):
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps=1e-6)


def pool_loop(x, p):
    """x (d, h, w), p: parameters by name → (d,)."""
    c = p["cls_token"][0, 0]
    z = [norm(p, "norm1", c)]
    z += [norm(p, "norm1", x[:, i, j]) for i in range(x.shape[1]) for j in range(x.shape[2])]
    q = linear(p, "q", z[0])
    scores = [q @ linear(p, "k", place) / len(q) ** 0.5 for place in z]
    total = sum(score.exp() for score in scores)
    o = 0
    for place, score in zip(z, scores, strict=True):
        o = o + score.exp() / total * linear(p, "v", place)
    c = c + p["ls1.gamma"] * linear(p, "proj", o)
    hidden = F.gelu(linear(p, "mlp.fc1", norm(p, "norm2", c)))
    return c + p["ls2.gamma"] * linear(p, "mlp.fc2", hidden)


# %% [markdown] slideshow={"slide_type": "subslide"}
# **Then a few lines of einops**, for a batch.


# %% slideshow={"slide_type": "fragment"}
def pool_einops(x, p):
    """x (B, d, h, w), p: parameters by name → (B, d)."""
    c = p["cls_token"].expand(len(x), -1, -1)
    z = norm(p, "norm1", torch.cat([c, rearrange(x, "b d h w -> b (h w) d")], dim=1))
    q, k, v = linear(p, "q", z[:, 0]), linear(p, "k", z), linear(p, "v", z)
    a = (einsum(q, k, "b d, b n d -> b n") / q.shape[-1] ** 0.5).softmax(dim=-1)
    c = c[:, 0] + p["ls1.gamma"] * linear(p, "proj", einsum(a, v, "b n, b n d -> b d"))
    return c + p["ls2.gamma"] * linear(
        p, "mlp.fc2", F.gelu(linear(p, "mlp.fc1", norm(p, "norm2", c)))
    )


# %% [markdown] slideshow={"slide_type": "subslide"}
# **Then the library's**, which fits where any pooling fits. Values *and* the gradients of the map and of
# all parameters must agree. `collapsed` is explained in the next section.


# %% slideshow={"slide_type": "fragment"}
def values_and_gradients(function, x, p):
    x, p = x.clone().requires_grad_(), {name: v.clone().requires_grad_() for name, v in p.items()}
    result = function(x, p)
    return [result.detach(), *torch.autograd.grad(result.square().sum(), [x, *p.values()])]


torch.manual_seed(0)
pool = AttentionPool(6, init_std=0.5, init_values=0.5).double()
p = {
    name: value.detach() + 0.1 * torch.randn_like(value) for name, value in pool.named_parameters()
}
x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
expected = values_and_gradients(
    lambda x, p: torch.stack([pool_loop(image, p) for image in x]), x, p
)


# %% slideshow={"slide_type": "fragment"}
def library(impl):
    def pool_library(x, p):
        pool.impl = impl
        return torch.func.functional_call(pool, p, x)

    return pool_library


ways = {"einops": pool_einops} | {
    impl: library(impl) for impl in ("explicit", "fused", "collapsed")
}
for name, function in ways.items():
    for got, wanted in zip(values_and_gradients(function, x, p), expected, strict=True):
        assert_close(got, wanted, rtol=0, atol=1e-9)
    print(f"✔ {name}: value and {len(p) + 1} gradients equal the loop's")

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Where it comes from.** CaiT (Touvron et al. 2021) already had a class vector that joins only in the last
# two blocks. One such block with one head is this pooling: timm's, with our weights, gives our answer.

# %% slideshow={"slide_type": "fragment"}
cait = LayerScaleBlockClassAttn(6, num_heads=1, mlp_ratio=3, qkv_bias=True).double()
renamed = {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}
state = {}
for name, value in p.items():
    inside = name.split(".")[0] in ("q", "k", "v", "proj")
    state[renamed.get(name, f"attn.{name}" if inside else name)] = value
del state["cls_token"]  # CaiT keeps it outside of the block
cait.load_state_dict(state, strict=True)
for layer in (cait.norm1, cait.norm2):
    layer.eps = 1e-6
tokens = rearrange(x, "b d h w -> b (h w) d")
with torch.no_grad():
    theirs = cait(tokens, p["cls_token"].expand(2, -1, -1))[:, 0]
difference = (theirs - expected[0]).abs().max().item()
lab.claim("timm's class attention of CaiT gives the same answer", difference, below=1e-12)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 5 · The map is a 1×1 convolution
#
# **Predict:** attention depends on the content. Does the query $W_q z_0$ change with the image?

# %% [markdown] slideshow={"slide_type": "fragment"}
# It does not: $z_0 = \mathrm{LN}(c)$ is made of parameters only. (With a second block it would change, for
# $c$ has heard of the image by then.) A query that is the same for all images can be moved:
#
# $$\frac{(W_q z_0) \cdot (W_k z_n)}{\sqrt d} = p \cdot z_n, \qquad p = \frac{W_k^\top W_q z_0}{\sqrt d} \in \mathbb{R}^d$$
#
# One vector, a **probe**. The keys' bias adds the same number to all logits, and the softmax cancels it. So
# the map of a trained network is a 1×1 convolution with *one* output channel on the normalized map, and a
# softmax over the places. On the trained network, biases and all:

# %% slideshow={"slide_type": "fragment"}
double = lab.checkpoints.load("patchconvnet_mini_scenes").double()
pool = double.pool
with torch.no_grad():
    features = double.forward_features(scenes[:50].cpu().double())  # (50, 64, 8, 8)
    q = pool.q(pool.norm1(pool.cls_token[0, 0]))
    probe = pool.k.weight.T @ q / 64**0.5
    normalized = rearrange(
        pool.norm1(rearrange(features, "b d h w -> b h w d")), "b h w d -> b d h w"
    )
    one_channel = F.conv2d(normalized, rearrange(probe, "d -> 1 d 1 1"))
    by_convolution = one_channel.flatten(1).softmax(dim=1).view(50, 8, 8)
    by_attention = pool.maps(features, normalize=True)[:, 0]
    gap = (by_convolution - by_attention).abs().max().item()
    pool.k.bias += 3 * torch.randn_like(pool.k.bias)
    moved = (pool.maps(features, normalize=True)[:, 0] - by_attention).abs().max().item()
lab.claim("a 1×1 convolution and a softmax give the map", gap, below=1e-12)
lab.claim("no bias of the keys can change it", moved, below=1e-12)

# %% [markdown] slideshow={"slide_type": "subslide"}
# (Softmax over the $N$ places alone is $a$ divided by $1 - a_0$: leaving one key out of a softmax rescales the
# others.)
#
# **Pool first, project after.** The same move on the values, $\sum_n a_n W_v z_n = W_v \sum_n a_n z_n$: one
# vector is projected in place of $N + 1$. No keys, no values. **Guess** before you run it: of the arithmetic
# of the whole pooling, feed-forward included, which share is left at $d = 384$, $N = 14^2$, and in front of
# ResNet-50's classifier, at $d = 2048$, $N = 7^2$?

# %% slideshow={"slide_type": "fragment"}
needed = {}
for d, side in ((384, 14), (2048, 7)):
    with torch.device("meta"):
        block, given = AttentionPool(d), torch.rand(1, d, side, side)
        for impl in ("explicit", "collapsed"):
            block.impl = impl
            needed[d, impl] = cost.macs(block, given)
    M = side**2 + 1
    written = d * d + 2 * M * d * d + 2 * M * d + d * d + 6 * d * d  # q; k, v; a, o; W_o; FFN
    folded = 2 * d * d + d + 2 * M * d + 2 * d * d + 6 * d * d  # p, q·b_k; a, o; W_v, W_o; FFN
    assert (needed[d, "explicit"], needed[d, "collapsed"]) == (written, folded)
    print(
        f"d = {d}: {written / 1e6:.1f} M multiply-adds as written, {folded / 1e6:.1f} M collapsed"
    )
shares = [needed[d, "collapsed"] / needed[d, "explicit"] for d in (384, 2048)]
lab.claim("under a thirtieth is left at 384 channels", shares[0], below=1 / 30)
lab.claim("under a tenth at 2048", shares[1], below=1 / 10)

# %% [markdown] slideshow={"slide_type": "subslide"}
# This is the paper's own experiment, *ResNet-50 with attention pooling*, as the survey reports it: from 79.8 to 80.1 %
# top-1, from 4.1 to 4.6 G. In one line, `resnet50(pool=AttentionPool(2048))`:

# %% slideshow={"slide_type": "fragment"}
with torch.device("meta"):
    image = torch.rand(1, 3, 224, 224)
    plain, augmented = resnet50(), resnet50(pool=AttentionPool(2048))
    macs = {"mean": cost.macs(plain, image)}
    for impl in ("explicit", "collapsed"):
        augmented.avgpool.impl = impl
        macs[impl] = cost.macs(augmented, image)
more = cost.parameters(augmented) - cost.parameters(plain)
for name, count in macs.items():
    print(f"ResNet-50, {name:10s}{count / 1e9:.3f} G multiply-adds")
lab.claim(
    "as written it adds 0.45 G", (macs["explicit"] - macs["mean"]) / 1e9, equal=0.45, tol=0.01
)
lab.claim("collapsed under 0.05 G", (macs["collapsed"] - macs["mean"]) / 1e9, below=0.05)
lab.claim("and either way 42 M parameters, on top of 25.6 M", more / 1e6, equal=42.0, tol=0.1)

# %% [markdown] slideshow={"slide_type": "fragment"}
# +0.3 points and 4.6 G in place of 4.1 reads like a fair price. It leaves out 42 million parameters: the network is 2.6 times
# as large. And nine tenths of the extra arithmetic need not be paid.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 6 · See it, and take it away
#
# The checkpoint `patchconvnet_mini_scenes` learned to name the objects of scenes from labels alone: no mask, no
# box. Four new scenes of objects that it knows, of many sizes. **Predict** for each where its one map will lie.

# %% slideshow={"slide_type": "fragment"}
test = ch08.scenes("test_scenes", 500, objects=1)
batch = test.batch(slice(None))
images, truth = batch["image"].to(device), batch["saliency"]
with torch.no_grad():
    scores, found = model(images), model.maps(images, normalize=True)[:, 0].cpu()
shown = [2, 12, 24, 20]
titles = [f"{test.classes[scores[i].argmax()]}?" for i in shown]
plots.overlay(images[shown].cpu(), found[shown], titles, size=2.1)
plt.show()
print("they are:", ", ".join(test.classes[batch["label"][i]] for i in shown))

# %% slideshow={"slide_type": "fragment"}
area = truth.mean().item()
hits = metrics.pointing(found, truth).mean().item()
energy = metrics.energy_inside(found, truth).mean().item()
own = lab.train.accuracy(model, batch, device=device)
print(f"500 scenes: right {own:.2f}; pointing {hits:.2f}, energy {energy:.2f}; area {area:.2f}")
lab.claim(
    "the highest place lies on the object three times as often as chance", hits / area, above=3
)
lab.claim("about half of the map lies on it", energy, equal=0.5, tol=0.05)

# %% [markdown] slideshow={"slide_type": "subslide"}
# Two maps lie on their object. The third is mostly on what stands below the duck, and the name is right all the same; in
# the fourth the map follows the pole, and the name is wrong. One picture proves nothing, so count. *Pointing*: does the
# highest place lie on the object? *Energy*: which share of the map does? The chance level of
# both is the object's share of the area.
#
# Now the test of section 1. A **temperature** $T$ in the softmax, $\operatorname{softmax}(\text{logits} / T)$:
# $T \to 0$ keeps the highest place only, $T \to \infty$ is the average. **Draw the curve before you see it**, for
# PatchConvNet and for the last block of the ViT.

# %% slideshow={"slide_type": "fragment"}
temperatures = [0.05, 0.25, 0.5, 1, 2, 4, 8, torch.inf]
curves = {
    "PatchConvNet": [accuracy_with(model.pool, T, model, batch) for T in temperatures],
    "ViT, last block": [accuracy_with(vit.blocks[5].attn, T, vit, parts) for T in temperatures],
}
ax = plots.curve(range(8), curves, xlabel="temperature T", ylabel="accuracy",
                 title="who needs the map?")  # fmt: skip
ax.set_xticks(range(8), [*map("{:g}".format, temperatures[:-1]), "∞"])
plt.show()
kept = {name: values[-1] / max(values) for name, values in curves.items()}
lab.claim(
    "without its map PatchConvNet keeps under half of its accuracy", kept["PatchConvNet"], below=0.5
)
lab.claim("what is left is about chance, 1/8", curves["PatchConvNet"][-1], above=0.08, below=0.17)
lab.claim("the ViT keeps over 80 %", kept["ViT, last block"], above=0.8)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Here the map carries the answer: made equal, it takes the answer with it, down to chance (1/8). The ViT was asked about
# other images and keeps five more blocks, so compare each curve with its own left end. And at $T = 0.05$, practically
# one place, PatchConvNet is as good as with its whole map. (It was trained with this
# map, so we do not learn whether a network trained *without* one would do as well. That is the next section.) Move
# the temperature yourself:


# %% slideshow={"slide_type": "fragment"}
def at_temperature(T=1.0, picture=2):
    """One scene's map at temperature T, and what the network then says."""
    probe = model.pool.attn_probe
    model.pool.attn_probe = Tempered(T)
    with torch.no_grad():
        chances = model(images[picture][None])[0].sigmoid().cpu()
    model.pool.attn_probe = probe
    tempered = (found[picture].clamp(min=1e-30).log() / T).flatten().softmax(0).view(8, 8)
    best = f"{test.classes[chances.argmax()]} {chances.max():.2f}"
    plots.overlay(images[picture].cpu(), tempered, f"T = {T:g}: {best}", size=3, limits=(0, 0.5))
    plt.show()


at_temperature()

# %% tags=["nbval-ignore-output"] slideshow={"slide_type": "fragment"}
lab.widgets.sliders(at_temperature, T=(0.05, 8.0, 1.0), picture=(0, 40, 2))

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 7 · Train it
#
# Live, from labels alone: scenes of 32 pixels with one large object, still 8×8 places (the stem has two convolutions).
# What to watch: **which comes first**, the right name or the map on the object?

# %% tags=["nbval-ignore-output"] slideshow={"slide_type": "fragment"}
lab.seed_everything(0)
learner = ch08.small()
held_out = ch08.small_scenes("test_scenes", 300).batch(slice(None))
progress = {"accuracy": [], "energy on the object": []}


def look(model):
    maps = model.maps(held_out["image"].to(device), normalize=True)[:, 0].cpu()
    on_object = metrics.energy_inside(maps, held_out["saliency"]).mean().item()
    progress["energy on the object"].append(on_object)
    progress["accuracy"].append(lab.train.accuracy(model, held_out, device=device))
    return {}


train_set = ch08.small_scenes("train", 8_192)
history = lab.fit(
    learner, train_set, steps=150, batch_size=64, lr=3e-3, device=device, evaluate=look,
    evaluate_every=15, augment=lab.train.flip_and_shift,
)  # fmt: skip
area = held_out["saliency"].mean().item()
progress["the object's share of the area"] = [area] * 10
ax = plots.curve(range(15, 151, 15), progress, xlabel="step", ylabel="share")
ax.legend(bbox_to_anchor=(1, 1))
plt.show()

# %% slideshow={"slide_type": "fragment"}
on_object = progress["energy on the object"][-1]
lab.claim(
    "after 150 steps the map lies on the object far above chance", on_object / area, above=1.8
)

# %% [markdown] slideshow={"slide_type": "fragment"}
# The map. It is on its way to the object while the names are still mostly wrong: perhaps because whatever tells *thing* from *ground* helps
# every class at once.

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Is it the softmax?** The pooling also has a class vector, four matrices and a feed-forward network. So there are
# three rows, of one trunk, budget (800 steps) and three seeds each, on the scenes of section 1: attention; the average
# (LayerNorm, mean, linear); and the control, **all of the pooling's parameters, with the query fixed at 0**, so that
# its weights are equal for good (`attnlab results 08_patchconvnet.pooling`).
#
# Maps: attention's own; of the average, the *class activation map* (the classifier applied at each place, negative
# values cut to 0; Zhou et al. 2016); of all three, Grad-CAM (chapter 04) at the trunk's end. *box*: share of the images
# in which the box around the map's largest piece meets the object's with IoU ≥ 0.3; the map's threshold is chosen on
# other scenes. *Center prior* is a blob in the middle, *uniform map* the same weight everywhere, *color contrast* that of
# chapter 04. **Guess** where each of the three would come out, and which map is the best witness of all.

# %% slideshow={"slide_type": "fragment"}
lab.results.show("08_patchconvnet.pooling", digits=2)

# %% slideshow={"slide_type": "fragment"}
table = lab.results.load("08_patchconvnet.pooling")
plots.bars_with_spread(table, "pointing", reference=("chance", 0.067),
                       title="highest place on the object")  # fmt: skip
plt.show()

# %% slideshow={"slide_type": "fragment"}
rows = table["rows"]


def lowest_lead(row, other, metric):
    """By how much `row` is ahead of `other` in the seed where it leads least."""
    pairs = zip(rows[row][metric]["values"], rows[other][metric]["values"], strict=True)
    return min(a - b for a, b in pairs)


attention, average = rows["attention"], rows["average"]
chance = rows["uniform map"]["pointing"]["mean"]
lead = attention["pointing"]["mean"] - average["pointing"]["mean"]
widest = max(attention["pointing"]["std"], average["pointing"]["std"])
lab.claim("attention points at the object over five times as often as chance",
          attention["pointing"]["mean"] / chance, above=5)  # fmt: skip
lab.claim(
    "it leads the average's class activation map by more than the spread", lead / widest, above=1
)
lab.claim("and in each seed", lowest_lead("attention", "average", "pointing"), above=0)
control = "uniform, same feed-forward"
lab.claim("accuracy: attention leads the average by over 0.1 in each seed",
          lowest_lead("attention", "average", "accuracy"), above=0.1)  # fmt: skip
lab.claim("the control stays near chance, 0.125", rows[control]["accuracy"]["mean"], below=0.2)
ahead = lowest_lead("color contrast", "attention", "pointing")
lab.claim("a map without any network points better in each seed", ahead, above=0.1)

# %% [markdown] slideshow={"slide_type": "fragment"}
# The softmax it is: the same parameters with equal weights learn next to nothing in 800 steps. Three cautions.
#
# *The gap in accuracy may be one of speed: 800 steps are few, and no longer run was made.* Objects cover 7 % of these images; on ImageNet, where they are larger and the
# training is long, the survey reports 0.3 points for ResNet-50. Nor does the table say that an average cannot get there.
#
# *The average's map belongs to a network that is seldom right*, and a map of a wrong answer need not point anywhere.
# Grad-CAM of all three is alike (0.24 to 0.28), and attention's own map is ahead of its own Grad-CAM; in one seed (0.28) only
# just.
#
# *Color contrast*, a map that knows no class and no network, points best and has the best boxes (as a map it is spread
# out: energy 0.17 against 0.37), as in chapter 04: where a thing differs in
# color from its background, pointing is easy. A good score is no proof of understanding.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 8 · A map for every class
#
# One map answers one question. With two things in the image it has to lie on both. So give every class a vector of its
# own: $C$ of shape $(k, d)$ in place of $c$, hence $k$ queries and $k$ maps. Three details, again of the authors'
# code: keys and values are the $N$ places only (class vectors are *not* keys); every class has a **softmax of its own over the
# places**; and class $j$'s vector is read by row $j$ of the classifier alone, $\text{logit}_j = W_{h,j} \cdot \mathrm{LN}(c_j) + b_j$ ($b$: the classifier's bias).
#
# | | one map | a map a class |
# |---|---|---|
# | class vectors | $(d)$ | $(k, d)$ |
# | weights $a$ | $(N + 1)$, sum 1 | $(k, N)$, **each row** sums to 1 |
# | feed-forward network | once | $k$ times, the same weights |
#
# **Predict:** a class that is not in the image. What does its map look like, what does it sum to?
#
# Copy a trained network with one map into this form, $c$ repeated $k$ times. Are the logits the same?

# %% slideshow={"slide_type": "fragment"}
copied = model.to_multiclass(noise=0.0)
with torch.no_grad():
    as_one, as_many = model(images[:100]), copied(images[:100])
    model.pool.cls_in_keys = False
    without_key = model(images[:100])
    model.pool.cls_in_keys = True
lab.claim("they differ", (as_one - as_many).abs().max().item(), above=1e-4)
same = (without_key - as_many).abs().max().item()
lab.claim("but not when the class vector is no key in the single map either", same, below=1e-4)

# %% [markdown] slideshow={"slide_type": "subslide"}
# The survey says that maps for classes are harder to train, and are introduced by fine-tuning, with a small rate. Test it:
# 32-pixel scenes with one or two objects, 600 steps with one map, then 200 more with one map or with eight (each class vector a
# copy of the trained one, plus a little noise), or all 800 with eight from the start; three seeds (`attnlab results
# 08_patchconvnet.classes`). Scored on scenes of two different classes. *Both named*: the two highest scores are the two classes.
# *Leak*: how much of a class's map lies on the *other* object. *Told apart*: at a pixel of an object, is its own class's map (over
# its largest weight) higher than the other one's? **Guess** energy and leak of a single map.

# %% slideshow={"slide_type": "fragment"}
lab.results.show("08_patchconvnet.classes", digits=2)

# %% slideshow={"slide_type": "fragment"}
rows = lab.results.load("08_patchconvnet.classes")["rows"]
mean = {row: {name: entry["mean"] for name, entry in found.items()} for row, found in rows.items()}
single, tuned, fresh = (mean[row] for row in list(rows)[1:4])
lab.claim("a single map lies on both alike", single["energy"] - single["leak"], equal=0, tol=1e-3)
apart = [abs(row["told apart"] - 0.5) for row in (tuned, fresh)]
lab.claim("200 or 800 steps hardly tell the objects apart", max(apart), below=0.05)
for row in ("a map a class, fine-tuned", "a map a class, from the start"):
    pairs = zip(rows[row]["energy"]["values"], rows[row]["leak"]["values"], strict=True)
    lab.claim(f"{row}: more on its own than on the other, in each seed",
              min(own - other for own, other in pairs), above=0)  # fmt: skip
gap = fresh["both named"] - tuned["both named"]
lab.claim("from the start is not worse at naming here", gap, above=-0.01)

# %% [markdown] slideshow={"slide_type": "fragment"}
# A single map shares itself out between both, by construction. For maps of classes this budget is mostly a **null result**:
# what fine-tuning adds to naming is within 0.02, and the maps have hardly begun to part (told apart 0.50; chance 0.5). From the start
# they part more (leak 0.21 in place of 0.30) and lie less on objects at all (energy 0.27 in place of 0.32). That training from the start
# is worse at naming, as the README says of ImageNet (81.1 against 82.0 %), cannot be seen here: both name two objects right
# in an eighth of the scenes (chance 1/28).

# %% [markdown] slideshow={"slide_type": "subslide"}
# ### With a longer training
#
# The checkpoint `patchconvnet_mini_classes_scenes` is that of section 6 (3,000 steps), fine-tuned to eight maps for 1,000
# more. One seed, 64-pixel scenes with two small objects. (The 1,000 steps are extra; read the maps, not the naming.)

# %% slideshow={"slide_type": "fragment"}
many = lab.checkpoints.load("patchconvnet_mini_classes_scenes", device=device)
pairs = ch08.two_classes()
of_one, of_many = (ch08.set_scores(network, pairs, device) for network in (model, many))
for name in of_one:
    print(f"{name:12s} one map {of_one[name]:.2f}, a map a class {of_many[name]:.2f}")
ratio = of_many["energy"] / of_many["leak"]
lab.claim(
    "a class's map lies on its own object over 1.5 times as much as on the other", ratio, above=1.5
)
lab.claim("the right map is the higher one at over 60 % of the objects' pixels",
          of_many["told apart"], above=0.6)  # fmt: skip

# %% [markdown] slideshow={"slide_type": "subslide"}
# Now the maps have parted, far from cleanly: 0.63 is nearer to a coin (0.5) than to certainty. **Choose a class** in the first test
# scene in which both objects are named right. The bars are the network's scores (a sigmoid for each class). Look at the map of
# a class that is *not* there, and at "all".

# %% tags=["explorer", "nbval-ignore-output"] slideshow={"slide_type": "fragment"}
with torch.no_grad():
    chances = many(pairs["image"].to(device)).sigmoid().cpu()
both = (chances.topk(2).indices.sort(1).values == pairs["labels"].sort(1).values).all(1)
chosen = int(both.nonzero()[0])
scene = pairs["image"][chosen]
with torch.no_grad():
    class_maps = many.maps(scene[None].to(device))[0].cpu()
class_masks = torch.zeros(8, 64, 64)
class_masks[pairs["labels"][chosen]] = pairs["instances"][chosen]
ClassExplorer(scene, class_maps, test.classes, chances[chosen], class_masks)

# %% slideshow={"slide_type": "fragment"}
sums = class_maps.sum((1, 2))
lab.claim(
    "the map of every class sums to 1, there or not", (sums - 1).abs().max().item(), below=1e-5
)

# %% [markdown] slideshow={"slide_type": "subslide"}
# That answers the prediction: **every class has a map, whether it is there or not**, and it sums to 1. A map says *where*, if; its score says
# *whether*. Never show one without the other.
#
# ### Photographs, colored by class
#
# Nobody told this network where anything is. Still, its maps can color a picture: each place in the color of the class whose
# score times its map, over the map's own largest weight, is highest (`color_by_class`; classes with a score under 0.3 are left
# out). First six test scenes in which both objects are named right.

# %% slideshow={"slide_type": "fragment"}
first = both.nonzero()[:6, 0]
with torch.no_grad():
    maps = many.maps(pairs["image"][first].to(device))
colored = [color_by_class(pairs["image"][i], m, chances[i])
           for i, m in zip(first.tolist(), maps, strict=True)]  # fmt: skip
titles = ["\n".join(test.classes[k] for k in pairs["labels"][i]) for i in first]
plots.show_images([*pairs["image"][first], *colored], titles + [""] * 6, columns=6, size=1.2)
key = "   ".join(f"{c} {k}" for c, k in zip(
    ("orange", "light blue", "yellow", "green", "red", "pink", "dark blue", "white"),
    test.classes, strict=True))  # fmt: skip
plt.gcf().supxlabel(key, fontsize=9)
plt.show()

# %% [markdown] slideshow={"slide_type": "subslide"}
# Both names are right in all six. The colors are not: in the fourth picture the bird's color lies on the other thing.
#
# Now photographs, shrunk so that the shorter side has 64 pixels (nothing here asks for a square). Above each the two highest scores.
# **Guess** how many of the eight it names.

# %% slideshow={"slide_type": "fragment"}
pictures, titles = [], []
wanted = {"dogs": "mammal", "chelsea": "mammal", "flower": "flower", "dandelions": "flower",
          "fig": "food", "coffee": "food", "brushes": "household", "rocket": "vehicle"}  # fmt: skip
named = 0
for name, label in wanted.items():
    photo = lab.data.photo(name)[None]
    size = [round(64 * side / min(photo.shape[2:])) for side in photo.shape[2:]]
    photo = F.interpolate(photo, size, mode="bilinear", antialias=True).clamp(0, 1)
    with torch.no_grad():
        features = many.forward_features(photo.to(device))
        chances = many.forward_head(features)[0].sigmoid()
        maps = many.pool.maps(features)[0]
    pictures.append(color_by_class(photo[0], maps, chances))
    best = zip(*chances.topk(2), strict=True)
    titles.append(f"{name}:\n" + "\n".join(f"{test.classes[i]} {s:.2f}" for s, i in best))
    named += test.classes[chances.argmax()] == label
plots.show_images(pictures, titles, columns=4, size=1.4)
plt.show()
lab.claim("under half of the eight photographs are named right", named, below=4)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Two: fig and coffee, both food. The dogs' heads and the cat's face are found and called something else; the paintbrushes are food.
# Cut-outs of 20 to 58 pixels taught it, and these are whole photographs. The colors look as sure where the name is wrong: a
# class that is not there can claim a place, for its map has to lie somewhere.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 9 · Is the map the evidence?
#
# The weights say which *tokens* were averaged. What a token has seen is another matter: at the end of the trunk it has
# seen a window, and through squeeze-and-excitation every block knows the mean of the whole image.


# %% slideshow={"slide_type": "fragment"}
def window(stem_convs, depth):
    """Side of what one place sees in pixels, squeeze-and-excitation left out."""
    side, stride = 1, 1
    for _ in range(stem_convs):
        side, stride = side + 2 * stride, 2 * stride
    return side + depth * 2 * stride


print(f"patchconvnet_mini: {window(3, 4)} of 64 pixels; S60: {window(4, 60)} of 224")
lab.claim("a place of S60 sees all of any 224-pixel image", window(4, 60), equal=1951)

# %% [markdown] slideshow={"slide_type": "subslide"}
# So ask in the other way: **delete** what the map points at, in the image. Paint over, in the image's mean color, the $m$ places (8×8 pixels each) that
# come first in some order, and count how many of the images that were named right still are. If the map shows the
# evidence, its order should hurt sooner than Grad-CAM's or a random one. The best order we know is the object's mask.
# **Guess** which curve is the lowest, and which the highest.

# %% slideshow={"slide_type": "fragment"}
label = batch["label"].to(device)
right = (scores.argmax(1) == label).cpu()
kept_images, kept_label = images[right], label[right]
cells = F.avg_pool2d(truth[right][:, None], 8)[:, 0]
looked = found[right]
generator = torch.Generator().manual_seed(0)
orders = {
    "mask of the object": cells + 1e-3 * torch.rand(cells.shape, generator=generator),
    "attention, highest first": looked,
    "Grad-CAM": F.avg_pool2d(gradcam(model, model.blocks[-1], kept_images, kept_label)[:, None], 8)[:, 0].cpu(),
    "random": torch.rand(looked.shape, generator=generator),
    "attention, lowest first": -looked,
}  # fmt: skip
counts = (0, 4, 8, 16, 32)
curves = {name: ch08.deletion(model, kept_images, kept_label, order, counts)
          for name, order in orders.items()}  # fmt: skip
plots.curve(counts, curves, xlabel="places painted over, of 64", ylabel="still right",
            title="delete in this order").legend(bbox_to_anchor=(1, 1))  # fmt: skip
plt.show()

# %% slideshow={"slide_type": "fragment"}
at_8 = {name: values[2] for name, values in curves.items()}
print("still right with 8 of 64 places painted over:", {k: round(v, 2) for k, v in at_8.items()})
before = at_8["Grad-CAM"] - at_8["attention, highest first"]
lab.claim("attention's order hurts sooner than Grad-CAM's", before, above=0.1)
lab.claim("and nearly as much as the object's mask",
          at_8["attention, highest first"] - at_8["mask of the object"], below=0.1)  # fmt: skip
lab.claim("8 places at random: nine of ten answers stay", at_8["random"], above=0.85)
lab.claim("the 32 places with the least weight matter to under a tenth",
          curves["attention, lowest first"][-1], above=0.9)  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# In spite of the wide windows the map is a good witness: eight places in its order cost more than half of the right answers, more than
# Grad-CAM's eight, hardly less than the eight that the mask puts first (where the object covers fewer, the rest are drawn at random). Half of the image, chosen by the map, can be painted over
# for almost nothing. (One network of our own size. In S60 a place has seen the whole image, and nothing here says that its map would
# pass the same test: run it. And a weight is not yet a contribution, which also needs what $W_o W_v z_n$ is and what the feed-forward
# network makes of it.)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 10 · Which part does what?
#
# The survey reports that convolution, in stem and trunk, is the essential ingredient, that attention adds little accuracy on top, and
# that BatchNorm is often better where batches are large, LayerNorm where large models force small ones. Small networks on 32-pixel
# scenes, 250 steps of 64 images; "batch 8" sees as many images in 2,000 steps, at $\sqrt{8/64}$ of the rate; three seeds (`attnlab
# results 08_patchconvnet.ablation`). **Guess** the worst row before you look.

# %% slideshow={"slide_type": "fragment"}
lab.results.show("08_patchconvnet.ablation", digits=2)

# %% slideshow={"slide_type": "fragment"}
rows = lab.results.load("08_patchconvnet.ablation")["rows"]
means = [found["accuracy"]["mean"] for found in rows.values()]
widest = max(found["accuracy"]["std"] for found in rows.values())
lab.claim("the seven rows lie within 0.1 in accuracy", max(means) - min(means), below=0.1)
lab.claim("two spreads of a single row are nearly as much", 2 * widest, above=0.07)
lead = min(lowest_lead("PatchConvNet", "1×1 convolutions in the trunk", metric)
           for metric in ("pointing", "energy"))  # fmt: skip
lab.claim("without 3×3 in the trunk the map is less on the object, in each seed", lead, above=0)
lab.claim("BatchNorm in small batches is not worse than LayerNorm here",
          rows["batch 8, BatchNorm"]["accuracy"]["mean"] - rows["batch 8"]["accuracy"]["mean"],
          above=-0.02)  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# There is no worst row: in accuracy a **null result**. Our objects differ in color and texture, which single patches may show, and 250
# steps are few; a trunk of 1×1 convolutions, in which no place hears of another but through squeeze-and-excitation, names them about as
# often. Only its *map* is worse in every seed. One seed without squeeze-and-excitation points much less well (0.38) and two do not.
# With BatchNorm, small batches do better in each seed (they take eight times as many steps); with LayerNorm in two of
# three. BatchNorm does not suffer at 8. Eight
# is not two, and four blocks are not sixty. The survey's claims are neither confirmed nor refuted by this table.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 11 · What it costs
#
# One width, one resolution: parameters are a closed form. With $\rho = d/4$ hidden channels in
# squeeze-and-excitation and $k$ classes,
#
# $$\underbrace{9\big(\tfrac{3d}{8} + \tfrac{21 d^2}{32}\big)}_{\text{stem}} + L\,\underbrace{(2d^2 + 2d\rho + \rho + 16d)}_{\text{block}}
# + \underbrace{10d^2 + 14d + d}_{\text{pooling}} + \underbrace{2d + kd + k}_{\text{norm, classifier}}$$

# %% slideshow={"slide_type": "fragment"}
table, published = {}, {"s60": 4.0, "s120": 7.5, "b60": 15.8, "b120": 29.9}
for name in ("s60", "s120", "b60", "b120", "l60", "l120"):
    with torch.device("meta"):
        net = getattr(patchconvnet, f"patchconvnet_{name}")()
        parts_of = [cost.parameters(part) for part in (net.stem, net.blocks, net.pool)]
        macs = cost.macs(net, torch.rand(1, 3, 224, 224)) / 1e9
    d, L = net.num_features, len(net.blocks)
    formula = [9 * (3 * d // 8 + 21 * d * d // 32), L * (2 * d * d + d * d // 2 + d // 4 + 16 * d),
               10 * d * d + 15 * d]  # fmt: skip
    assert parts_of == formula
    table[name] = cost.parameters(net)
    print(f"{name.upper():5s} d = {d:4d}, L = {L:3d}: {table[name]:11,} parameters,",
          f"{macs:5.1f} G multiply-adds (README: {published.get(name, '–')})")  # fmt: skip
lab.claim("S60 has the 25,231,096 parameters of the authors' model", table["s60"], equal=25_231_096)
lab.claim("B60 has 99,388,936", table["b60"], equal=99_388_936)

# %% [markdown] slideshow={"slide_type": "subslide"}
# (A little less than the README says, for the pooling is counted in its collapsed form.)
#
# ### Beside others with as many parameters
#
# XCiT (attention between *channels*, one resolution) and Swin (attention in windows, in stages) are timm's. First small ones, with as
# many parameters as `patchconvnet_mini`: section 7's scenes, 600 steps, one recipe, three seeds (`attnlab results
# 08_patchconvnet.neighbors`). *MiB*: the most held at once beyond the weights for 64 images, without gradients and with. **Guess**
# the order in accuracy, and who needs the most memory in training.

# %% slideshow={"slide_type": "fragment"}
lab.results.show("08_patchconvnet.neighbors", digits=2)

# %% slideshow={"slide_type": "fragment"}
neighbors = rows = lab.results.load("08_patchconvnet.neighbors")["rows"]
ours = {name: found["mean"] for name, found in rows["PatchConvNet"].items()}
for name in ("XCiT", "Swin"):
    many_more = rows[name]["thousand parameters"]["mean"] / ours["thousand parameters"]
    lab.claim(f"{name} has as many parameters, within 1 %", many_more, equal=1, tol=0.01)
lab.claim("XCiT is right more often, in each seed",
          lowest_lead("XCiT", "PatchConvNet", "accuracy"), above=0)  # fmt: skip
lab.claim("by 0.02", rows["XCiT"]["accuracy"]["mean"] - ours["accuracy"], equal=0.023, tol=0.005)
lab.claim("Swin stays below 0.12 in two seeds; chance is 0.125",
          sorted(rows["Swin"]["accuracy"]["values"])[1], below=0.12)  # fmt: skip
training = rows["XCiT"]["MiB, training on 64"]["mean"] / ours["MiB, training on 64"]
lab.claim("XCiT keeps nearly twice as much for the backward pass", training, equal=1.95, tol=0.05)

# %% [markdown] slideshow={"slide_type": "fragment"}
# PatchConvNet does not win. XCiT is ahead by 0.02, and in each seed, for 1.2 times the arithmetic, twice the memory in training and
# less than half of it without gradients. Swin learns nothing in two of three seeds. But the rate, 0.003, is the one that suits
# PatchConvNet: is it that? Swin once more, at a third of it (`attnlab results 08_patchconvnet.swin_rate`):

# %% slideshow={"slide_type": "fragment"}
slower = lab.results.load("08_patchconvnet.swin_rate")["rows"]["Swin, rate 0.001"]["accuracy"]
print(f"Swin, rate 0.001: {slower['mean']:.2f} ± {slower['std']:.2f}, seeds {slower['values']}")
lab.claim("two seeds learn something now", sorted(slower["values"])[1], above=0.2)
behind = min(rows["PatchConvNet"]["accuracy"]["values"]) - max(slower["values"])
lab.claim("the best of them is over 0.1 behind PatchConvNet's worst", behind, above=0.1)

# %% [markdown] slideshow={"slide_type": "fragment"}
# In part. The lower rate helps, and one seed of three still stays at chance. The row says what 600 steps from random weights on 8,192
# small images make of a Swin, and no more; nor was a rate tuned for XCiT. (XCiT brings convolutions along, as PatchConvNet does: three
# in its stem, and depthwise 3×3s in every block. Swin cuts the image into patches at once.)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **At full size**, about 25 million parameters each, untrained, forward without gradients, growing batches. All is divided by what
# PatchConvNet-S60 does with one image. **Guess** whose memory is the smallest, and whether it grows faster than the batch.

# %% tags=["nbval-ignore-output"] slideshow={"slide_type": "fragment"}
sizes = {"PatchConvNet-S60": patchconvnet_s60, "XCiT-S12/16": timm.models.xcit_small_12_p16_224,
         "Swin-T": timm.models.swin_tiny_patch4_window7_224}  # fmt: skip
nets = {name: factory().eval().to(device) for name, factory in sizes.items()}
batches, memory, speed = (1, 2, 4, 8, 16), {}, {}
for name, net in tqdm(nets.items(), desc="measuring"):
    memory[name], speed[name] = [], []
    for n in batches:
        forward = torch.no_grad()(partial(net, torch.rand(n, 3, 224, 224, device=device)))
        memory[name].append(cost.peak_memory(forward, device))
        seconds = cost.latency(forward, warmup=0, repeats=max(2, 8 // n))
        speed[name].append(n / seconds)
one_image, its_speed = memory["PatchConvNet-S60"][0], speed["PatchConvNet-S60"][0]
for name in nets:
    print(f"{name:17s} memory", *(f"{m / one_image:6.2f}" for m in memory[name]),
          "  images a second", *(f"{s / its_speed:5.2f}" for s in speed[name]))  # fmt: skip

# %% slideshow={"slide_type": "fragment"}
for name, net in nets.items():
    needs = cost.macs(net, torch.rand(1, 3, 224, 224, device=device)) / 1e9
    print(f"{name:17s}{cost.parameters(net) / 1e6:6.1f} M parameters {needs:5.2f} G multiply-adds")
    grown = cost.growth(batches, memory[name])
    lab.claim("  its memory grows with the batch, not faster", grown, above=0.9, below=1.05)
print("the smallest peak at batch 16:", min(memory, key=lambda name: memory[name][-1]))
twice = memory["Swin-T"][-1] / memory["PatchConvNet-S60"][-1]
lab.claim("Swin's is about twice PatchConvNet's", twice, above=1.6, below=2.6)
deep = patchconvnet_s120().eval().to(device)
forward = torch.no_grad()(partial(deep, torch.rand(1, 3, 224, 224, device=device)))
more = cost.peak_memory(forward, device) / one_image
lab.claim("S120 has twice as many blocks and needs no more room for maps", more, equal=1, tol=0.02)

# %% slideshow={"slide_type": "fragment"}
with plots.style():
    figure, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
    for marker, (name, row) in zip("osD", neighbors.items(), strict=True):
        needs, right_in = row["million MACs"]["mean"], row["accuracy"]
        axes[0].errorbar(
            needs, right_in["mean"], right_in["std"], fmt=marker, capsize=3, label=name
        )
axes[0].axhline(1 / 8, color="gray", ls=":", label="chance")
axes[0].set(title="small, on scenes, 3 seeds", xlabel="million multiply-adds", ylabel="accuracy")
axes[0].set(xlim=(4, 7), ylim=(0, 0.45))
axes[0].legend(fontsize=8)
panels = {"peak memory": (memory, one_image, "xy"), "images a second": (speed, its_speed, "x")}
for ax, (what, (values_of, first, log)) in zip(axes[1:], panels.items(), strict=True):
    relative = {name: [value / first for value in values] for name, values in values_of.items()}
    plots.curve(batches, relative, xlabel="batch", ylabel="S60 with one image = 1", ax=ax,
                title=f"full size: {what}", log=log)  # fmt: skip
    ax.set_xticks(batches, batches)
axes[2].set_ylim(bottom=0)
axes[2].get_legend().remove()
plt.show()

# %% [markdown] slideshow={"slide_type": "fragment"}
# Answer: XCiT's memory, with PatchConvNet's close behind, both of one resolution; Swin's is about twice as large, for it holds large
# early maps. All three grow in proportion to the batch. In images a second, on the two busy CPU cores where this was built, PatchConvNet
# is ahead from two images on, by a factor of about 1.5 to 2; who gains by the batch these few calls are too rough to say. The right panel
# is your machine's, and a GPU may rank them in another way. And depth costs no memory without gradients: a block's maps are let go before
# the next needs room.
#
# (For a map a class all that is done to a class vector (query, scores, weighted mean, $W_o$, feed-forward network) is done $k$ times:
# with $k = 1000$, S60 needs 5.3 G in place of 4.0 as the authors' code computes it.)

# %% [markdown] slideshow={"slide_type": "subslide"}
# ### One map where others have a pyramid
#
# What a constant resolution costs appears in dense tasks: four times the pixels are four times the arithmetic in every block, and
# heads that want maps of four strides get one. **Segmentation** as in the paper, by UPerNet: the pooling is taken off, and the missing
# levels are the trunk's one map, resized to 4, 2, 1 and ½ times its side. Below, the trunk of section 6 *frozen*; only the head
# learns to tell object from background, from 60 batches of masks. **Guess** the IoU of the object, and that of the same head on a trunk
# that was never trained.

# %% tags=["nbval-ignore-output"] slideshow={"slide_type": "fragment"}
with_masks = ch08.scenes("train", 4_096, objects=1)


def mask_loss(net, batch):
    return segmentation_loss(net(batch["image"]), (batch["saliency"] >= 0.5).long())


segmenters = {}
for name in ("trained trunk", "untrained trunk"):
    lab.seed_everything(0)
    trunk = patchconvnet_mini()
    if name == "trained trunk":
        trunk.load_state_dict(model.state_dict())
    head = UPerNetHead(64, 2, inter_channels=16)
    segmenters[name] = Segmenter(MapBackbone(trunk.requires_grad_(False)), head)
    lab.fit(segmenters[name], with_masks, loss=mask_loss, steps=60, batch_size=32, lr=1e-2,
            device=device)  # fmt: skip


# %% slideshow={"slide_type": "fragment"}
def overlap(said):
    """IoU with the objects, over all 500 scenes of section 6 together; said: (500, 64, 64), bool."""
    return ((said & (truth >= 0.5)).sum() / (said | (truth >= 0.5)).sum()).item()


with torch.no_grad():
    dense = {name: net(images).softmax(1)[:, 1].cpu() for name, net in segmenters.items()}
    one_map = segmenters["trained trunk"].backbone(images[:1])["0"]
    levels = segmenters["trained trunk"].head(one_map)
print("trunk", tuple(one_map.shape), "→ UPerNet", tuple(levels.shape), "→ upsampled to the image")
iou = {name: overlap(probability >= 0.5) for name, probability in dense.items()}
smooth = F.interpolate(found[:, None], (64, 64), mode="bilinear")[:, 0]
iou["attention map, best threshold"] = max(overlap(smooth >= t / 500) for t in range(1, 50))
iou["everything is object"] = overlap(truth > -1)
print({name: round(value, 2) for name, value in iou.items()})
lab.claim("on the trained trunk the object is found", iou["trained trunk"], above=0.3)
lab.claim("on the untrained one it is not", iou["untrained trunk"], below=0.05)
lead = iou["trained trunk"] - iou["attention map, best threshold"]
lab.claim("masks taught the head more than the attention map knows", lead, above=0.02)

# %% slideshow={"slide_type": "fragment"}
plots.overlay(images[shown].cpu(), dense["trained trunk"][shown], size=1.5, limits=(0, 1),
              label="P(object)")  # fmt: skip
plt.suptitle("UPerNet on the frozen trunk: section 6's scenes")
plt.show()

# %% [markdown] slideshow={"slide_type": "subslide"}
# One map of 8×8 places, and a head with 42,000 parameters, draw rough shapes after 60 batches; on random features the same head finds
# nothing. The tower and the pole on which section 6's maps lay it takes for objects as well. (The attention map's threshold was chosen
# on these very scenes, which favors it.)
#
# **Detection and instance masks**, by torchvision's Mask R-CNN on the one map. Untrained here, for its shapes and losses: its training
# takes longer than a cell should (section 12 shows what 300 steps reach on another small trunk).

# %% slideshow={"slide_type": "fragment"}
lab.seed_everything(0)
detector = mask_rcnn.mask_rcnn_mini(MapBackbone(patchconvnet_mini(num_classes=0)), 8).to(device)
two = {key: value[:4].to(device) for key, value in pairs.items()}  # scenes of two objects
sum_of_losses = mask_rcnn.loss(detector.train(), two).item()
boxes = mask_rcnn.detect(detector.eval(), two["image"])
print("the map:", tuple(detector.backbone(two["image"])["0"].shape))
print("found in the first scene:", {key: tuple(value.shape) for key, value in boxes[0].items()})
print("taught:", {key: tuple(two[key].shape) for key in ("boxes", "labels", "instances")})
trunk_of, all_of = cost.parameters(detector.backbone), cost.parameters(detector)
print(f"{trunk_of:,} parameters in the trunk, {all_of - trunk_of:,} in the heads")
lab.claim("the sum of its five losses is a number to train on", sum_of_losses, above=0, below=50)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 12 · Paper and here
#
# | claim | published | here | why they may differ |
# |---|---|---|---|
# | S60 has 25.2 M parameters and needs 4.0 G multiply-adds | README of the authors' code | 25,231,096 and 3.9 G, section 11 | exact; the collapsed pooling saves 0.06 G |
# | S60 is right on 82.1 % of ImageNet, B120 on 84.1 % | README | not trained | GPU-weeks; the architecture is the same to the last parameter |
# | ResNet-50 with attention pooling: 79.8 → 80.1 %, 4.1 → 4.6 G | survey article | 4.09 → 4.54 G as written, 4.13 collapsed, and 42 M more parameters, section 5 | not trained |
# | attention and average pool nearly alike in accuracy | survey | attention leads by 0.2, section 7 | 800 steps and objects of 7 % of the area; whether the gap closes with time was not tested |
# | the map shows what the network looks at | survey, by pictures | it points almost six times as often as chance, ahead of the average's map; color contrast points better; deleting by it hurts, sections 7 and 9 | measured on a thousand scenes, not shown on a few |
# | maps for classes: 81.1 % from the start, 82.0 % fine-tuned | README | no difference in naming; maps part only in longer training, section 8 | 800 steps; 8 classes |
# | S60 and S120 peak at 1,322 and 1,450 MB with 256 images | README | the same beyond the weights, which differ by 90 MB, section 11 | device and precision are not stated there |
# | convolution is essential | survey | not visible in accuracy, section 10 | small, colored objects; short runs |
#
# **At the paper's size.** `attnlab train patchconvnet_s60 --data imagenet --root …` trains it where there are GPUs and the images (see
# `attnlab train --help`).
#
# **Which readings are ours.** LayerScale of 0.1 in the small networks ($10^{-4}$ needs a long training), a stem of three or two convolutions
# for small images, noise of 0.02 on copied class vectors, the collapsed form. The rest is the authors' code; where that was bound to
# 1,000 classes or to square images, ours is not.

# %% [markdown] slideshow={"slide_type": "subslide"}
# **A claim from another chapter, tested with this chapter's tools.** The survey says that one non-local block (chapter 02) makes a detector
# better. A small ResNet under Mask R-CNN on bundled scenes, with the block and without, three seeds (`attnlab results
# 08_patchconvnet.detection`):

# %% slideshow={"slide_type": "fragment"}
lab.results.show("08_patchconvnet.detection")

# %% slideshow={"slide_type": "fragment"}
without, with_it = (
    row["box AP"] for row in lab.results.load("08_patchconvnet.detection")["rows"].values()
)
lab.claim("no difference beyond the seeds' spread", abs(with_it["mean"] - without["mean"]),
          below=without["std"] + with_it["std"])  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# Nothing is seen at this scale. (The scenes are small enough for the trunk's own windows, and the training is short.)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 13 · Exercises
#
# Write the body, run the cell, run the check. `lab.hint("patchconvnet.attention_pool")` gives a hint,
# `lab.solution("patchconvnet.attention_pool")` the solution.
#
# **1 · Attention pooling** (10 minutes), up to the first residual sum.


# %% exercise="patchconvnet.attention_pool" tags=["exercise"] slideshow={"slide_type": "fragment"}
def attention_pool(
    z: torch.Tensor,
    cls: torch.Tensor,
    w_q: torch.Tensor,
    w_k: torch.Tensor,
    w_v: torch.Tensor,
    w_o: torch.Tensor,
    gamma: torch.Tensor,
) -> torch.Tensor:
    """Attention pooling with one head and no biases, up to its first residual sum.

    z: (B, 1 + N, d), what LayerNorm made of the class vector (place 0) and of the N patches. All
    1 + N are keys. cls: (d,), the class vector as it was before LayerNorm.
    w_q, w_k, w_v, w_o: (d, d) each, used as in nn.Linear: z @ w.T.
    gamma: (d,), LayerScale on what attention brings.
    Returns (B, d): the class vector after the residual sum.
    """
    raise NotImplementedError


# %% slideshow={"slide_type": "fragment"}
lab.check("patchconvnet.attention_pool", attention_pool)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **2 · The probe** (10 minutes, with a pencil). Section 5's formula has no biases; its code gives the solution away.


# %% exercise="patchconvnet.probe" tags=["exercise"] slideshow={"slide_type": "fragment"}
def probe(cls: torch.Tensor, w_q: torch.Tensor, b_q: torch.Tensor, w_k: torch.Tensor):
    """The vector p that turns the keys' projection into one number a patch.

    cls: (d,), the class vector after LayerNorm. Its query is q = w_q cls + b_q, and a patch z has
    the key w_k z (plus a bias, which the softmax cancels). w_q, w_k: (d, d), b_q: (d,).
    Returns p, (d,), so that for every patch z: p · z = q · (w_k z) / √d.
    """
    raise NotImplementedError


# %% slideshow={"slide_type": "fragment"}
lab.check("patchconvnet.probe", probe)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **3 · Count it** (10 minutes). S60, its version with a map for every class, and B60 are among the cases.


# %% exercise="patchconvnet.parameters" tags=["exercise"] slideshow={"slide_type": "fragment"}
def parameters(dim: int, depth: int, num_classes: int, multiclass: bool) -> int:
    """Number of parameters of a PatchConvNet with a stem of four convolutions, by formula.

    Stem: four 3×3 convolutions from 3 channels to dim/8, dim/4, dim/2 and dim, without biases.
    Each of the `depth` blocks, all convolutions with biases: LayerNorm; 1×1 (dim to dim);
    depthwise 3×3; two 1×1 of squeeze-and-excitation, dim to dim/4 and back; 1×1 (dim to dim); γ.
    Pooling: a class vector, or with `multiclass` one for each class; LayerNorm; four linear maps
    (dim to dim) with biases; γ; LayerNorm; a feed-forward network of hidden width 3 dim with
    biases; γ. At the end LayerNorm and a linear classifier with biases.
    """
    raise NotImplementedError


# %% slideshow={"slide_type": "fragment"}
lab.check("patchconvnet.parameters", parameters)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **4 · Find the bug** (5 minutes), and then the open part (an evening). This code has the right shapes, its numbers lie between 0 and 1, and it
# trains. Yet its maps are something else: say what they ask, and mend it here.
#
# Then: section 9 tests one network by deletion. Do the same for a network that was trained with the *average*: is its class
# activation map a worse witness, or only a map of a worse network? Decide first how to make both equally often right, and
# which difference between the curves would convince you. `ch08.deletion` and `ch08.average_mini` are a start.


# %% exercise="patchconvnet.buggy_maps" tags=["exercise"] slideshow={"slide_type": "fragment"}
def buggy_maps(z: torch.Tensor, queries: torch.Tensor, w_k: torch.Tensor) -> torch.Tensor:
    """A map for every class, the patches not projected to keys. One line is wrong: mend it.

    z: (B, N, d), the patches after LayerNorm; only they are keys. queries: (classes, d).
    w_k: (d, d), the keys' matrix: a patch z has the key w_k z.
    Returns (B, classes, N): how each class shares its attention out among the patches.
    """
    probes = queries @ w_k / z.shape[-1] ** 0.5
    logits = z @ probes.T
    weights = logits.softmax(dim=2)
    return weights.mT


# %% slideshow={"slide_type": "fragment"}
lab.check("patchconvnet.buggy_maps", buggy_maps)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 14 · Take home
#
# - One learned query, one head, one softmax over the places, at the very end: the answer has to pass through one map, and falls to chance
#   without it.
# - The query is a constant. So the map is a 1×1 convolution and a softmax, and projections may come after the pooling: the same numbers for
#   a tenth to a thirtieth of the arithmetic.
# - A map is a claim. Hold it against chance, a control with equal weights, a blob in the center, color contrast, and deletion.
#
# **Common misconceptions.** *Attention pooling makes PatchConvNet accurate* (the survey: trunk and recipe do; on ResNet-50 it is +0.3). *The map
# shows which pixels were used* (which tokens; each has seen a wide window). *The query looks at the image* (the keys do). *Maps of
# classes compete* (each has a softmax of its own over space; an absent class has a map too). *Squeeze-and-excitation is attention
# pooling* (it averages evenly, and scales channels). *Maps for a thousand classes cost a million parameters* ($999 \cdot 384 = 383{,}616$; they cost
# arithmetic and memory).
#
# **Where next.** Chapter 09 asks attention for more than a map: a tree of parts, from who sends to whom.
#
# **References.** Touvron et al. 2021, *Augmenting convolutional networks with attention-based aggregation*, arXiv 2112.13692 (the body was not
# available to us; code: facebookresearch/deit) · Touvron et al. 2021, *Going deeper with image transformers* (CaiT), arXiv 2103.17239 ·
# Zhou et al. 2016, *Learning deep features for discriminative localization* (class activation maps) · Choe et al. 2020, *Evaluating
# weakly supervised object localization methods right* (boxes from maps) · Zhang et al. 2016, *Top-down neural attention by
# excitation backprop* (the pointing game) · "the survey": an article in Chinese about these papers, where this course began; what we have from
# it only is second-hand.
