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
# # 05 · Context: DANet, OCNet and their sparse heirs
#
# **At the end you can** write the attention that segmentation networks put between their pixels and
# between their channels, say which of its parts costs what, and choose a sparse pattern that keeps
# what the dense one can do.
#
# | | |
# |---|---|
# | to read | 80 minutes, in two sittings: 1–9 and 10–14; exercises another 55 |
# | to run | about a minute on two CPU cores |
# | you need | chapter 01 (attention), 03 (SE) and 04 (CBAM) |
# | papers | Fu et al. 2019, *DANet* · Yuan et al. 2018, *OCNet* · Huang et al. 2019, *CCNet* · Huang et al. 2019, *Interlaced sparse self-attention* |

# %% slideshow={"slide_type": "skip"}
import matplotlib.pyplot as plt
import torch
from einops import einsum, rearrange
from torch.nn import functional as F
from torch.testing import assert_close

import attnlab
from attnlab import lab
from attnlab.cbam import SpatialAttention
from attnlab.context import (
    ChannelSelfAttention,
    DANetHead,
    ObjectContext,
    PositionAttention,
    channel_weights,
    position_attention,
)
from attnlab.heads import same_class
from attnlab.lab import cost, plots
from attnlab.lab.experiments import ch05, ch05_sparse

device = lab.device()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 1 · The failure
#
# CBAM (chapter 04) multiplies each place of a map by one number, computed from the 7×7 places around
# it. That number is the same for whoever reads the map, and it knows nothing of what is far away.
#
# Segmentation, a class for every pixel, needs more. In the **key patch** task a corner of the image
# is red or blue. Under a red key a green disc is class 1 and a yellow diamond class 2; under a blue
# key it is the other way round. A pixel of a shape must hear one bit from the corner.

# %% slideshow={"slide_type": "fragment"}
toy = lab.toys.key_patch(4, seed=4, size=16, shapes=2)
classes = [label / 2 for label in toy["label"]]
titles = ["blue key" if key else "red key" for key in toy["key"]]
plots.show_images([*toy["image"], *classes], [*titles, *["class 0, 1 or 2"] * 4], columns=4)
plt.show()

# %% [markdown] slideshow={"slide_type": "subslide"}
# The network of this task is two 3×3 convolutions, one block of attention, one more 3×3 convolution
# and a classifier. What can one output pixel of it see? As in chapter 01: the gradient says.


# %% slideshow={"slide_type": "fragment"}
def reach(block, row=12, column=12):
    """How much each pixel of a 16×16 image can move one output: (16, 16)."""
    torch.manual_seed(0)
    network = ch05.toy_network(block).eval()
    images = torch.rand(8, 3, 16, 16, requires_grad=True)
    network(images)[:, :, row, column].sum().backward()
    return images.grad.abs().sum(dim=(0, 1))


gate, attention = SpatialAttention(), PositionAttention(ch05.WIDTH, key_channels=8)
torch.nn.init.ones_(gate.bn.weight)  # fresh ones are switched off by a factor that starts at 0
torch.nn.init.ones_(attention.gamma)
blocks = {"no block": torch.nn.Identity(), "CBAM's 7×7 gate": gate, "attention": attention}
seen = {name: reach(block) > 0 for name, block in blocks.items()}
maps = torch.stack([map.float() for map in seen.values()])
plots.overlay(toy["image"][0], maps, list(seen), mark=(12, 12), label="can be seen", size=2.4)
plt.show()

# %% slideshow={"slide_type": "fragment"}
first_row = seen["CBAM's 7×7 gate"].any(dim=1).int().argmax().item()
lab.claim("with the gate a pixel of row 12 sees up to row 6: a 13×13 window", first_row, equal=6)
lab.claim("the key is outside of it", not seen["CBAM's 7×7 gate"][:3, :3].any().item())
lab.claim("with attention between positions it sees all", seen["attention"].all().item())

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Before you look:** SE (chapter 03) sees the whole image too, but has one factor a channel for all
# of its pixels. Where will it end: at chance (½), or can it carry the bit? All rows have 600 steps;
# only pixels from row or column 9 on are scored, which the gate's window does not join to the key
# (`attnlab results 05_context.key_patch`).

# %% slideshow={"slide_type": "fragment"}
key_patch = lab.results.load("05_context.key_patch")["rows"]
some = ("none", "CBAM's 7×7 place gate", "SE")
values = {row: key_patch[row]["accuracy"]["values"] for row in some}
plots.bars_with_spread(values, xlabel="accuracy on far shape pixels", reference=("chance", 0.5))
plt.show()

# %% slideshow={"slide_type": "fragment"}
toy_accuracy = {row: metrics["accuracy"]["mean"] for row, metrics in key_patch.items()}
lab.claim("no block: chance", toy_accuracy["none"], above=0.4, below=0.6)
gated = toy_accuracy["CBAM's 7×7 place gate"]
lab.claim("CBAM's place gate: chance", gated, above=0.4, below=0.6)
lab.claim("SE carries the bit, in every seed", min(values["SE"]), above=0.95)

# %% [markdown] slideshow={"slide_type": "fragment"}
# SE carries it: one bit, the same for every pixel, fits into a global mean. (CBAM's channel gate
# pools like SE; it is the *place* gate that fails.) But SE's message is one for all. A pixel of one
# object and a pixel of another want different summaries of the image. Hence this chapter: a mean of
# its own for each position.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 2 · The idea in one picture
#
# A gate is one map for all. Attention between positions is a map *for each position*: who belongs
# with me? Below, without a learned parameter: patches of a photograph, described by the mean and
# spread of their colours, and compared by cosine, as in chapter 01.

# %% slideshow={"slide_type": "fragment"}
photo = lab.data.photo("chelsea")
photo = F.interpolate(photo[None], (128, 192), antialias=True, mode="bicubic")[0].clamp(0, 1)
patches = rearrange(photo, "c (h p) (w q) -> (h w) (p q) c", p=8, q=8)
described = torch.cat([patches.mean(dim=1), patches.std(dim=1)], dim=-1)  # (384, 6)
described = F.normalize((described - described.mean(0)) / described.std(0), dim=-1)
relation = torch.softmax(described @ described.T / 0.1, dim=-1)  # (384, 384): rows sum to 1

queries = {"an eye": (6, 8), "the background": (2, 22)}
rows = torch.stack([relation[row * 24 + column] for row, column in queries.values()])
gate = patches.std(dim=(1, 2))  # as an example of a gate: how much happens in a patch
shown = rearrange(torch.stack([gate, *rows]), "n (h w) -> n h w", h=16)
shown = shown / shown.amax(dim=(1, 2), keepdim=True)
names = ["a gate: one map for all", *(f"whom {name} hears" for name in queries)]
axes = plots.overlay(photo, shown, names, columns=3, label="relative to the largest", size=2.4)
for ax, (row, column) in zip(axes[1:], queries.values(), strict=True):
    ax.plot(8 * column + 4, 8 * row + 4, "o", color="#3fd8ff", markeredgecolor="black")
plt.show()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 3 · The mathematics, with shapes
#
# The features of one image, $X$, have shape $(C, N)$: $C$ channels at $N = H \cdot W$ positions.
# DANet's **position attention module** (PAM; Fu et al., section 3.2) is
#
# $$E = Q^\top K, \qquad S = \operatorname{softmax}(E), \qquad O = V S^\top, \qquad
# Y = X + \gamma\, O$$
#
# | symbol | shape | what it is |
# |---|---|---|
# | $Q, K$ | $(C/8, N)$ | two 1×1 convolutions of $X$, with bias |
# | $V$ | $(C, N)$ | another |
# | $E, S$ | $(N, N)$ | row $i$ belongs to position $i$, and sums to one in $S$ |
# | $O$ | $(C, N)$ | column $i$ is the mean of the values, weighted by row $i$ of $S$ |
# | $\gamma$ | one number | learned, 0 at first: the module starts as the identity |
#
# Three differences to chapter 01. There is **no $1/\sqrt d$**. There is no output projection: $V$
# has all channels. And $C/8$ is a fact of the public code; the paper writes $Q$ and $K$ with $C$
# channels.

# %% [markdown] slideshow={"slide_type": "subslide"}
# ### By hand, once
#
# Two positions, $Q = (1, 0)$, $K = (1, 2)$ and $V = (10, 20)$, one channel each. Row 1 of $E$ is
# $(1, 2)$, row 2 is $(0, 0)$.

# %% slideshow={"slide_type": "fragment"}
q, k, v = (torch.tensor([numbers]) for numbers in ([1.0, 0.0], [1.0, 2.0], [10.0, 20.0]))  # (1, 2)
E = q.T @ k
S = E.softmax(dim=-1)
print("S =", [[round(s, 3) for s in row] for row in S.tolist()])
print("O =", [round(o, 2) for o in (v @ S.T)[0].tolist()], " position 2 asks nothing: plain mean")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 4 · Build it three times
#
# **The formula as a loop**, then **einsum**, then **the library**. `impl="explicit"` stores $S$;
# `impl="fused"` is PyTorch's kernel, which does not. The kernel stays that frugal on a CPU only if
# values are as wide as queries, and here they are 8 times wider. The way out is exact: cut $V$ into
# 8 groups of channels and call them heads; all heads share the same $Q$ and $K$.


# %% slideshow={"slide_type": "fragment"}
def position_loop(q, k, v):
    """One position after the other. q, k (d, N), v (C, N) → (C, N)."""
    outputs = []
    for i in range(q.shape[1]):
        energies = torch.stack([(q[:, i] * k[:, j]).sum() for j in range(k.shape[1])])
        weights = energies.exp() / energies.exp().sum()
        outputs.append(sum(weight * v[:, j] for j, weight in enumerate(weights)))
    return torch.stack(outputs, dim=1)


def position_einsum(q, k, v):
    """q, k (B, d, N), v (B, C, N) → (B, C, N); i is the position that hears, j one that is heard."""
    S = einsum(q, k, "b d i, b d j -> b i j").softmax(dim=-1)
    return einsum(v, S, "b c j, b i j -> b c i")


# %% slideshow={"slide_type": "subslide"}
def values_and_gradients(function, tensors):
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    result = function(*tensors)
    return [result.detach(), *torch.autograd.grad(result.square().sum(), tensors)]


torch.manual_seed(0)
tensors = [torch.randn(2, c, 3, 4, dtype=torch.float64) for c in (2, 2, 16)]  # q, k, v as maps
flat = [tensor.flatten(2) for tensor in tensors]
by_loop = values_and_gradients(
    lambda *qkv: torch.stack([position_loop(*(t[b] for t in qkv)) for b in range(2)]), flat
)
results = {"einsum": values_and_gradients(position_einsum, flat)}
for impl in ("explicit", "fused"):
    results[impl] = values_and_gradients(
        lambda q, k, v, impl=impl: position_attention(q, k, v, impl=impl), tensors
    )
for name, found in results.items():
    for got, expected in zip(found, by_loop, strict=True):
        assert_close(got.flatten(2), expected, rtol=0, atol=1e-10)
    print(f"✔ {name}: value and three gradients equal the loop's")

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Before you run it:** with $\gamma = 0$, which of the module's parameters have a gradient in the
# first training step? And what happens to the output if all positions of $X$ are shuffled?

# %% slideshow={"slide_type": "fragment"}
module = PositionAttention(channels=64)
x = torch.randn(2, 64, 6, 6)
lab.claim("a fresh module is the identity, exactly", torch.equal(module(x), x))
module(x).square().sum().backward()
learns = [name for name, p in module.named_parameters() if p.grad.abs().max() > 0]
print("has a gradient in step 1:", learns)

torch.nn.init.constant_(module.gamma, 0.5)
order = torch.randperm(36)
with torch.no_grad():
    shuffled = module(x.flatten(2)[..., order].unflatten(2, (6, 6))).flatten(2)
    difference = (shuffled - module(x).flatten(2)[..., order]).abs().max().item()
lab.claim("shuffled positions in, the same shuffled positions out", difference, below=1e-5)

# %% [markdown] slideshow={"slide_type": "notes"}
# Answers: only γ, since $\partial Y / \partial O = \gamma = 0$; from the second step on all learn but the
# keys' bias, which adds one number to a whole row of $E$ and drops out of the softmax (the layers
# before the module learn from the start, through $X$). And nothing breaks: PAM does not know where
# anything is. Where position matters, the convolutions around it must supply it, for instance by
# their zero padding.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 5 · The same on the transpose: channels
#
# Turn $X$ over: $C$ tokens, one for each channel, each an image of $N$ numbers. The **channel
# attention module** (CAM; section 3.3) takes them as queries, keys and values at once, without a
# convolution:
#
# $$E = X X^\top \;(C, C), \qquad A = \operatorname{softmax}(E), \qquad Y = X + \beta\, A X$$
#
# One parameter in all, $\beta$ (the code calls it γ as well). It is not SE: nothing is pooled, nothing
# gated; channels are mixed.

# %% slideshow={"slide_type": "fragment"}
x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
channel = ChannelSelfAttention(mode="paper").double()
torch.nn.init.ones_(channel.gamma)
turned = rearrange(x, "b c h w -> b (h w) c 1")  # C "positions" with N "channels"
by_positions = turned + position_attention(turned, turned, turned)
assert_close(channel(x), rearrange(by_positions, "b (h w) c 1 -> b c h w", h=3))
print("✔ channel attention is position attention on the transpose, with Q = K = V = X")

# %% [markdown] slideshow={"slide_type": "subslide"}
# ### A sign that is not in the paper
#
# The authors' code does not take softmax(E). It computes `energy_new = max(energy) - energy` in each
# row, and takes the softmax of that. **Before you run it:** is this the usual subtraction of the
# maximum, which keeps exp from overflowing and changes nothing?

# %% slideshow={"slide_type": "fragment"}
rows = x.flatten(2)
energy = rows @ rows.mT
largest = energy.amax(dim=-1, keepdim=True)
assert_close((energy - largest).softmax(dim=-1), energy.softmax(dim=-1))
assert_close((largest - energy).softmax(dim=-1), (-energy).softmax(dim=-1))
print("✔ softmax(E − max E) = softmax(E):  a stabilisation")
print("✔ softmax(max E − E) = softmax(−E): another operator")

# %% [markdown] slideshow={"slide_type": "fragment"}
# The code gives most weight to the *least* similar channel. What does that do to features as they
# come out of a ReLU? Here are 48 random channels, two of them dead (all zero), as happens in trained
# networks. `mode="cosine"` is an extension of ours: softmax(cosine / 0.3).

# %% slideshow={"slide_type": "subslide"}
torch.manual_seed(0)
x = torch.randn(1, 48, 12, 16).relu()
x[:, [10, 30]] = 0
modes = {"paper": "softmax(E)", "code": "softmax(−E)", "cosine": "softmax(cosine / 0.3)"}
matrices = {mode: channel_weights(x, mode, temperature=0.3)[0, 0] for mode in modes}
plots.matrix_grid(
    [list(matrices.values())], column_titles=list(modes.values()), xlabel="channel that is heard",
    ylabel="channel that hears", size=2.6,
)  # fmt: skip
plt.show()

# %% slideshow={"slide_type": "fragment"}
alive = torch.ones(48, dtype=torch.bool)
alive[[10, 30]] = False
itself = matrices["paper"].diagonal()[alive].mean()
lab.claim("+E: a living channel hears itself, over 99 %, and CAM does nothing", itself, above=0.99)
dead = matrices["code"][alive][:, ~alive].sum(dim=-1).mean()
lab.claim("−E: the two dead channels get over 90 % of its attention", dead, above=0.9)
entropy = torch.special.entr(matrices["cosine"]).sum(dim=-1).mean()
lab.claim("cosine: not saturated, e^entropy counts more than 10 channels", entropy.exp(), above=10)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Either sign has its failure: the energies are sums over all $N$ positions and are not normalised, so
# both saturate. With $+E$ a living channel gets $(1 + \beta)$ times itself, and a dead one $\beta$ times
# the mean of all; with $-E$ the dead channels swallow what should be mixed. The library follows the code by default, because the released weights were trained
# with it, and says so.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 6 · Object context: what should be heard?
#
# OCNet (Yuan et al. 2018) says what it wants: the **object context** of position $i$ is the mean over
# all positions of its class. With labels $\ell$ of shape $(N,)$ the ideal weights are
# $R_{ij} = [\ell_i = \ell_j] / \lvert\{m : \ell_m = \ell_i\}\rvert$, of shape $(N, N)$. At test time
# nobody knows $\ell$, so they are an *oracle*: a measuring rod, though no strict bound.

# %% slideshow={"slide_type": "fragment"}
sample = ch05.scenes("test_scenes", 40).batch([5])
truth = ch05.on_grid(ch05.class_map(sample), (16, 16))  # (1, 16, 16), 0 is the background
oracle = same_class(truth).float()  # (1, 256, 256)
oracle = oracle / oracle.sum(dim=-1, keepdim=True)
places = {"a thing": truth[0].flatten().argmax().item(), "the background": 0}
rows = [oracle[0, place].reshape(16, 16) for place in places.values()]
rows = torch.stack([row / row.max() for row in rows])
axes = plots.overlay(sample["image"][0], rows, [f"the oracle for {n}" for n in places], size=2.8,
                     label="relative to the largest")  # fmt: skip
for ax, place in zip(axes, places.values(), strict=True):
    ax.plot(4 * (place % 16) + 2, 4 * (place // 16) + 2, "o", color="#3fd8ff", mec="black")
plt.show()

# %% [markdown] slideshow={"slide_type": "subslide"}
# OCNet's guess at $R$ compares **one** embedding $\varphi(X)$ of shape $(C_k, N)$ with itself; queries
# and keys are *tied*:
#
# $$S = \operatorname{softmax}\!\left(\frac{\varphi(X)^\top \varphi(X)}{\sqrt{C_k}}\right)\;(N, N),
# \qquad \text{context} = W_o (V S^\top) \;(C, N)$$
#
# $\varphi$ is a 1×1 convolution, BatchNorm and LeakyReLU; $V$ of shape $(C_v, N)$ is a 1×1 convolution;
# $C_k = C_v = C/2$. $W_o$, $(C, C_v)$, starts at zero. The context is not added to $X$ but concatenated, and a 1×1
# convolution fuses both.
#
# **Before you run it:** is $S$ symmetric? Which position does a position hear most?

# %% slideshow={"slide_type": "fragment"}
torch.manual_seed(0)
tied, apart = ObjectContext(256), ObjectContext(256, share_qk=False)
x = torch.randn(1, 256, 8, 8)
phi = tied.key(x).flatten(2)
logits = phi.mT @ phi / 128**0.5  # (1, 64, 64)
lab.claim("the logits are symmetric", (logits - logits.mT).abs().max(), below=1e-4)
hears_itself = {}
for name, block in (("tied", tied), ("apart", apart)):
    with attnlab.record(block) as recorded, torch.no_grad():
        block(x)
    S = recorded[""][0, 0]
    hears_itself[name] = (S.argmax(dim=-1) == torch.arange(64)).float().mean()
    off = (S - S.mT).abs().max().item()
    lab.claim(f"{name}: after the softmax S is not symmetric", off, above=0.001)
lab.claim("tied: over 90 % hear themselves most", hears_itself["tied"], above=0.9)
lab.claim("apart: fewer than 20 % do", hears_itself["apart"], below=0.2)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Each row is divided by a sum of its own, which breaks the symmetry. And an inner product of a vector
# with itself is hard to beat: tied embeddings can find what is *like* the query. That suits
# "average over my object". The key patch asks for the opposite, to hear something that looks
# different. **Predict:** will tied embeddings stay at chance there? Section 7 has the answer.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 7 · Train it, and look
#
# PAM on the key patch, live: 300 steps. We also note $\gamma$, which starts at zero: attention
# switches itself on.

# %% tags=["nbval-ignore-output"] slideshow={"slide_type": "fragment"}
lab.seed_everything(0)
learner = ch05.toy_network(ch05.MIDDLES["PAM"]())
gammas = []


def loss(model, batch):
    gammas.append(model[2].gamma.item())
    return ch05.toy_loss(model, batch)


history = lab.fit(
    learner, lab.toys.key_patch(1_024, seed=0, size=16, shapes=2), loss=loss, steps=300,
    batch_size=32, lr=3e-3, weight_decay=0.0, device=device,
)  # fmt: skip
with plots.style():
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.8))
plots.curve(history.steps, {"loss": history.loss}, xlabel="step", ylabel="loss", ax=axes[0])
plots.curve(history.steps, {"γ": gammas}, xlabel="step", ylabel="γ of PAM", ax=axes[1])
plt.show()

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Predict first:** where does a pixel of a shape look? Where does a pixel of the background look,
# whose class is the same under either key? Then click pixels.

# %% tags=["explorer", "nbval-ignore-output"] slideshow={"slide_type": "fragment"}
lab.explore(learner, toy["image"][0], grid=(16, 16), prefix=0, title="PAM on the key patch")

# %% slideshow={"slide_type": "fragment"}
exam = lab.toys.key_patch(200, seed=1, size=16, shapes=2)
with attnlab.record(learner) as recorded, torch.no_grad():
    learner(exam["image"].to(device))
S = recorded["2"][:, 0].cpu()  # (200, 256, 256)
corner = torch.zeros(16, 16, dtype=torch.bool)
corner[:4, :4] = True  # the key, and the places whose features have seen it
on_corner = S[:, :, corner.flatten()].sum(dim=-1)  # (200, 256)
on_shape = exam["shape"].flatten(1) > 0
share = {"shapes": on_corner[on_shape].mean().item(),
         "background": on_corner[~on_shape].mean().item()}  # fmt: skip
plots.bars_with_spread({name: [value] for name, value in share.items()},
                       xlabel="share of the attention on the corner with the key",
                       reference=("share of the image", 16 / 256))  # fmt: skip
plt.show()
accuracy = ch05.shape_accuracy(learner, 0, device)
lab.claim("PAM answers better than chance", accuracy, above=0.65)
lab.claim("shapes look at the corner, over twice its share", share["shapes"], above=2 / 16)
lab.claim("and more than the background does", share["shapes"] - share["background"], above=0.05)

# %% [markdown] slideshow={"slide_type": "fragment"}
# A pixel of a shape asks the corner. The background, whose class does not depend on the key, has no
# reason to learn that, and does so less.

# %% [markdown] slideshow={"slide_type": "subslide"}
# ### The same budget for all
#
# Eight blocks, three seeds, 600 steps each (`attnlab results 05_context.key_patch`).

# %% slideshow={"slide_type": "fragment"}
plots.bars_with_spread(
    lab.results.load("05_context.key_patch"), "accuracy",
    xlabel="accuracy on far shape pixels", reference=("chance", 0.5),
)  # fmt: skip
plt.show()
lab.results.show("05_context.key_patch")

# %% slideshow={"slide_type": "fragment"}
accuracies = {row: metrics["accuracy"]["values"] for row, metrics in key_patch.items()}
for row in ("SE", "CAM, code (−E)", "object context, q and k apart"):
    lab.claim(f"{row}: solved in three seeds of three", min(accuracies[row]), above=0.95)
for row in ("PAM", "CAM, paper (+E)", "object context, tied q and k"):
    solved = sum(value > 0.95 for value in accuracies[row])
    lab.claim(f"{row}: solved in two seeds, not in the third", solved, equal=2)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Whatever looks at the whole image can answer, whatever does not cannot. Within the first group the
# table decides nothing: three successes of three against two of three is no difference.
#
# **Two predictions fail.** Section 5 made $+E$ look useless, and section 6 made tied embeddings look
# unable to find what is different. Each solves the task in two seeds. Both arguments were about
# *random* features; here the layers before the module learn as well, and learn features that it can
# use. What an operator does at the start does not bound what a network around it can learn.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 8 · Real pictures: a class for every pixel
#
# The bundled scenes have exact masks: eight kinds of photographic cut-outs, two in an image, and the
# background, nine classes. A small ResNet at **output stride 8** (its last stage has no stride but
# dilation 2, so 64×64 pixels become 8×8 positions), a head, and bilinear upsampling. Live, 400 steps
# with the position attention:

# %% tags=["nbval-ignore-output"] slideshow={"slide_type": "fragment"}
lab.seed_everything(0)
segmenter = ch05.segmenter("PAM")
history = ch05.fit_scenes(segmenter, 0, device)
plots.curve(history.steps, {"training": history.loss}, xlabel="step", ylabel="loss")
plt.show()

# %% slideshow={"slide_type": "fragment"}
batch = ch05.scenes("test_scenes", 64).batch(range(4))
truth = ch05.class_map(batch)
with torch.no_grad():
    found = segmenter(batch["image"].to(device)).argmax(1).cpu()
pictures = [*batch["image"], *(truth / 8), *(found / 8)]
titles = ["image"] * 4 + ["truth"] * 4 + ["predicted"] * 4
plots.show_images(pictures, titles, title="grey: one of nine classes", columns=4, size=1.4)
plt.show()
iou = ch05.mean_iou(segmenter, device)
lab.claim("mIoU is above 0.2 ('background' everywhere: below 0.12)", iou, above=0.2)

# %% [markdown] slideshow={"slide_type": "subslide"}
# Whom does a position hear? Click, and ask each time whether what is bright belongs to the same
# thing.

# %% tags=["explorer", "nbval-ignore-output"] slideshow={"slide_type": "fragment"}
lab.explore(segmenter, batch["image"][0], grid=(8, 8), prefix=0, title="PAM on a scene")

# %% [markdown] slideshow={"slide_type": "subslide"}
# Now with numbers. **mIoU** is the mean over classes of intersection over union, from one confusion
# matrix of the whole test set. **Purity** is $\sum_j S_{ij} [\ell_j = \ell_i]$, the share of a
# position's attention that stays in its class, averaged over the positions of things; "at first" is
# the same before training. One row, *told the classes*, has the oracle of section 6 in place of $S$
# (`attnlab results 05_context.segmentation`).
#
# **Predict:** by how much do the learned relations lift mIoU over the plain head (FCN)? By how much
# does the oracle? And does attention become purer where it helps?

# %% slideshow={"slide_type": "fragment"}
lab.results.show("05_context.segmentation")

# %% slideshow={"slide_type": "fragment"}
scenes = lab.results.load("05_context.segmentation")
plots.bars_with_spread(scenes, "mIoU", xlabel="mIoU on new scenes")
plt.show()

# %% slideshow={"slide_type": "fragment"}
rows = scenes["rows"]
gain = {
    row: [a - b for a, b in zip(m["mIoU"]["values"], rows["FCN"]["mIoU"]["values"], strict=True)]
    for row, m in rows.items()
}
told = gain.pop("OCNet, told the classes")
lab.claim("the oracle adds over 0.04 in every seed", min(told), above=0.04)
largest = max(sum(values) / 3 for values in gain.values())
lab.claim("no learned relation adds as much as 0.02 on average", largest, below=0.02)
spread = max(m["mIoU"]["std"] for row, m in rows.items() if row in gain)
lab.claim("which is less than the largest spread over seeds", largest - spread, below=0)
purity = {row: (m["purity at first"]["mean"], m["purity"]["mean"])
          for row, m in rows.items() if "purity" in m}  # fmt: skip
lab.claim("OCNet: purity more than doubles", purity["OCNet"][1] / purity["OCNet"][0], above=2)
lab.claim("DANet: it does not grow", purity["DANet"][1] - purity["DANet"][0], below=0)

# %% [markdown] slideshow={"slide_type": "fragment"}
# **Mostly a null result.** PAM and CAM are ahead of the plain head by 0.010 to 0.017 in each of the
# three seeds, DANet in two of three, OCNet in one; all of it is of the size of the spread over seeds
# (0.013 to 0.021). DANet pays for it with 40 % more parameters and a third more MACs. The oracle shows that
# there was something to win: 0.06 more mIoU, at the cost of OCNet (though its weights also carry the
# true outlines, which no learned relation is given).
#
# Nor does purity predict mIoU: OCNet's attention ends up purest, 0.47, and gains nothing; DANet's
# stays near what the share of the area gives, 0.14. Two things on 8×8 positions and 400 steps are
# not Cityscapes; what this table does *not* say is that context is useless.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 9 · What it costs
#
# **Before you run it:** a crop of 768×768 pixels at output stride 8 gives $96 \times 96 = 9{,}216$
# positions. Which part of DANet's head takes most of the multiply–accumulates (MACs): the attention
# between positions, that between channels, or the convolutions around them?

# %% slideshow={"slide_type": "fragment"}
with torch.device("meta"):  # shapes without numbers
    danet = DANetHead(2048, 19, impl="explicit")
    features, reduced = torch.empty(1, 2048, 96, 96), torch.empty(1, 512, 96, 96)
parts = {
    "two 3×3, 2048 → 512": 2 * cost.macs(danet.reduce_position, features),
    "two 3×3, 512 → 512": 2 * cost.macs(danet.refine_position, reduced),
    "position attention": cost.macs(danet.position, reduced),
    "channel attention": cost.macs(danet.channel, reduced),
    "three classifiers": 3 * cost.macs(danet.classify, reduced),
}
plots.bars_with_spread({k: [v / 1e9] for k, v in parts.items()}, xlabel="GMACs at 96×96")
plt.show()
total = cost.macs(danet, features) / 1e9

# %% slideshow={"slide_type": "fragment"}
lab.claim("the parts are the whole", sum(parts.values()) / 1e9, equal=total, tol=1e-6)
lab.claim("the head takes 274 GMACs", total, equal=274.5, tol=0.5)
lab.claim("174 of them in two convolutions", parts["two 3×3, 2048 → 512"] / 1e9, equal=174, tol=0.5)
lab.claim("the head has 23,954,619 parameters", cost.parameters(danet), equal=23_954_619)

# %% [markdown] slideshow={"slide_type": "fragment"}
# The convolutions. What is dear in attention is **memory**: $S$ alone takes
# $9{,}216^2 \cdot 4$ bytes, 324 MiB an image in float32, and training keeps more than one such matrix.
# It grows with the fourth power of the image's side.

# %% slideshow={"slide_type": "fragment"}
lab.claim("S at 96×96 takes 324 MiB", (96 * 96) ** 2 * 4 / 2**20, equal=324)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Fused attention takes the memory away (section 11 measures it), not the arithmetic: that stays
# quadratic in $N$ (and the cut values make it dearer, since each head computes the energies again). To get below $N^2$, some
# pairs of positions must not be compared at all.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 10 · Sparse patterns: who sees whom
#
# Must every position see all $N$? Let it see few, chosen by where they lie, and let a second layer
# carry the message on. Each of these is attention under a mask, and nothing else:
#
# | pattern | position $(i, j)$ of an $H \times W$ map sees $(y, x)$ if | keys |
# |---|---|---|
# | window (Swin) | both lie in the same cell of $w \times w$ | $w^2$ |
# | neighbourhood (NAT) | $(y, x)$ lies in the $k \times k$ window around it, moved inside at the border | $k^2$ |
# | dilated (DiNAT) | the same, on every $\delta$-th row and column | $k^2$ |
# | axial | $i = y$; in the next layer $j = x$ | $W$, then $H$ |
# | criss-cross (CCNet) | $i = y$ or $j = x$, in one softmax | $H + W - 1$ |
# | interlaced (ISA) | $i \equiv y$ and $j \equiv x \pmod P$; next, the same cell of $P \times P$ | $N / P^2$, then $P^2$ |

# %% slideshow={"slide_type": "skip"}
from attnlab.attention import scaled_dot_product_attention
from attnlab.sparse import (
    AxisAttention,
    CrissCrossAttention,
    DilatedAttention,
    InterlacedSparseAttention,
    NeighborhoodAttention,
    WindowAttention,
    criss_cross_attention,
)
from attnlab.sparse_blocks import block_attention, neighbors, residues, windows

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Built three times**, for the criss-cross. A loop over positions that is the table's row; dense
# attention under the mask; the library, which makes two small products, one along rows and one
# along columns, and joins the scores *before* the softmax. The position itself lies in its row and
# in its column: it must count once.


# %% slideshow={"slide_type": "fragment"}
def criss_cross_loop(q, k, v):
    """q, k (H, W, d), v (H, W, dv) → (H, W, dv); no 1/√d, as in CCNet."""
    height, width = q.shape[:2]
    out = torch.empty(v.shape, dtype=v.dtype)
    for i in range(height):
        for j in range(width):
            others = [(y, j) for y in range(height) if y != i]  # the column without the position
            places = [(i, x) for x in range(width)] + others
            scores = torch.stack([q[i, j] @ k[place] for place in places])
            values = torch.stack([v[place] for place in places])
            out[i, j] = scores.softmax(dim=0) @ values
    return out


torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 1, 5, 7, 4, dtype=torch.float64)
by_loop = criss_cross_loop(q[0, 0], k[0, 0], v[0, 0])
mask = CrissCrossAttention(8).dense_mask((5, 7))  # (35, 35) bool, True = attend
flat = [rearrange(x, "b n h w d -> b n (h w) d") for x in (q, k, v)]
dense = scaled_dot_product_attention(*flat, mask=mask, scale=1.0)
assert_close(criss_cross_attention(q, k, v)[0, 0], by_loop)
assert_close(rearrange(dense, "b n (h w) d -> b n h w d", h=5)[0, 0], by_loop)
lab.claim("a position of a 5×7 map sees 5 + 7 − 1 keys", mask.sum(1).unique(), equal=11)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **What reaches a position?** As in chapter 01: the gradient of one output with respect to the input
# is zero wherever the input cannot matter. Below are stacks of one, two and three layers with random
# weights, on a map of 8×12, seen from row 3, column 5. Windows and cells are of 4×4, shifted by 2 in
# every second layer, from the second on. Neighbourhoods are 3×3; in the dilated stack every second
# layer takes every second row and column.
#
# **Before you run it:** which of the seven have heard the whole map after two layers? Which one never
# will, however many layers there are?


# %% slideshow={"slide_type": "fragment"}
def interlaced_stage(i):
    return InterlacedSparseAttention(32, cell=4).stages[i % 2]


layer = {  # the i-th layer of a stack
    "window": lambda i: WindowAttention(32, 4, 2),
    "window, shifted": lambda i: WindowAttention(32, 4, 2, shift_size=2 * (i % 2)),
    "neighbourhood": lambda i: NeighborhoodAttention(32, 3, 2),
    "dilated": lambda i: DilatedAttention(32, 3, 1 + i % 2, 2),
    "row, column": lambda i: AxisAttention(32, ("row", "column")[i % 2], 2),
    "criss-cross": lambda i: CrissCrossAttention(32, recurrence=1),
    "interlaced": interlaced_stage,
}
shape, place = (8, 12), (3, 5)


def stack(name, depth):
    """`depth` layers with random weights, in float64 and eval mode."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(*[layer[name](i) for i in range(depth)]).double().eval()
    for module in network:
        if hasattr(module, "gamma"):
            torch.nn.init.ones_(module.gamma)  # 0 at first: nothing would be heard
    return network


# %% slideshow={"slide_type": "fragment"}
def reached(name, depth):
    """(H, W): 1 where the input can move the output at `place`."""
    x = torch.randn(1, 32, *shape, dtype=torch.float64, requires_grad=True)
    stack(name, depth)(x)[0, :, place[0], place[1]].square().sum().backward()
    return (x.grad[0].abs().sum(dim=0) > 0).float()


seen = [[reached(name, depth) for name in layer] for depth in (1, 2, 3)]
plots.matrix_grid(
    seen, ["1 layer", "2 layers", "3 layers"], [name.replace(", ", ",\n") for name in layer],
    xlabel="column", ylabel="row", label="can be heard", limits=(0, 1), size=1.35,
)  # fmt: skip
plt.show()

# %% slideshow={"slide_type": "fragment"}
share = {name: [row[i].mean().item() for row in seen] for i, name in enumerate(layer)}
full_after_two = [name for name in layer if share[name][1] == 1]
print("the whole map after two layers:", "; ".join(full_after_two))
alone = share["window"]
lab.claim("windows that never move never mix", alone[2], equal=alone[0])
lab.claim("three patterns have seen everything after two layers", len(full_after_two), equal=3)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Row–column, criss-cross and interlaced need two layers *whatever the size of the map*. Shifted
# windows and neighbourhoods grow by a fixed width a layer, like convolutions; windows
# that stay where they are never mix, so Swin shifts every second layer by half a window.

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Interlaced attention is a permutation.** Sort the positions by their *place in the cell*, and the
# first mask is block-diagonal; sort them by their *cell*, and the second is. Between the two lies
# nothing but a re-ordering of the tokens.

# %% slideshow={"slide_type": "fragment"}
long_range, short_range = InterlacedSparseAttention(8, cell=4).dense_mask(shape).double()
paths = short_range @ long_range  # (96, 96): how many ways lead from a key to a query
lab.claim("there is exactly one way between any two positions", bool((paths == 1).all()))

i, j = torch.meshgrid(torch.arange(8), torch.arange(12), indexing="ij")
in_cell, cell = i % 4 * 4 + j % 4, i // 4 * 3 + j // 4  # (8, 12) each
with plots.style():
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.6))
panels = [
    ("place in the cell", in_cell, long_range, "long range"),
    ("cell", cell, short_range, "short range"),
]
for line, (title, group, mask, name) in zip(axes, panels, strict=True):
    order = group.flatten().argsort(stable=True)
    places = {"xlabel": "column", "ylabel": "row", "label": "group"}
    plots.heatmap(group.float(), title=f"groups by {title}", **places, ax=line[0])
    plots.heatmap(mask, title=f"{name}: mask, row by row", label="attends", ax=line[1])
    plots.heatmap(mask[order][:, order], title="sorted by group", label="attends", ax=line[2])
plt.show()

# %% [markdown] slideshow={"slide_type": "fragment"}
# Left, positions of one colour attend to each other; right, the same mask after sorting.
# %% [markdown] slideshow={"slide_type": "slide"}
# ## 11 · What sparse patterns cost
#
# Scores and mixing take $2 \cdot N \cdot \text{keys} \cdot D$ multiply–accumulates, for keys as in the
# table, summed over both layers of a two-layer pattern. The formula beside PyTorch's counter, on 56×56
# positions of width 64:

# %% slideshow={"slide_type": "fragment"}
H, D = 56, 64
alone, whole = windows(H, 1), windows(H, H)
cuts = {  # how rows and columns are cut, for each layer; and the keys of a position
    "full": ([(whole, whole)], H * H),
    "window 7": ([(windows(H, 7),) * 2], 49),
    "neighbourhood 7": ([(neighbors(H, 7, block=1),) * 2], 49),
    "axial": ([(alone, whole), (whole, alone)], 2 * H),
    "interlaced, cells of 7": ([(residues(H, 7),) * 2, (windows(H, 7),) * 2], 64 + 49),
}
q, k, v = torch.randn(3, 1, 1, H, H, D)
for name, (stages, keys) in cuts.items():
    counted = sum(cost.macs(block_attention, q, k, v, *stage) for stage in stages)
    print(f"{name:24} {keys:5} keys   formula {2 * H**2 * keys * D / 1e6:7.1f} M   "
          f"counted {counted / 1e6:7.1f} M")  # fmt: skip
    assert counted == 2 * H**2 * keys * D
counted = 2 * cost.macs(criss_cross_attention, q, k, v)
formula = 2 * (2 * H**2 * (2 * H - 1) * D)
print(f"{'criss-cross, twice':24} {2 * (2 * H - 1):5} keys   formula {formula / 1e6:7.1f} M   "
      f"counted {counted / 1e6:7.1f} M")  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# Criss-cross computes the score of the position itself twice and masks one: 112 keys a pass where the
# formula has 111.
#
# Windows and neighbourhoods are **linear** in $N$. Axial and criss-cross attention grow like
# $N^{1.5}$ on square maps: $2\sqrt N$ keys for two axial layers, $4\sqrt N - 2$ for two passes of the
# criss-cross. Interlaced attention has $N / P^2 + P^2$ keys: for a fixed cell
# quadratic in the end, with $P^2 = \sqrt N$ like $N^{1.5}$ too.
#
# **Before you run it:** on the arithmetic alone neighbourhood 7 should cost what window 7 does. It
# will need more memory. Why?

# %% slideshow={"slide_type": "fragment"}
sides = [24, 48]


def attend(name, side):
    """The bare operator, four heads of width 16, on a random map."""
    x = torch.randn(1, 4, side, side, 16)
    if name == "criss-cross":
        return lambda: criss_cross_attention(x, x, x)
    if name.startswith("full"):
        flat = rearrange(x, "b n h w d -> b n (h w) d")
        return lambda: scaled_dot_product_attention(flat, flat, flat, impl=name.split()[1])
    cut = {"window 8": windows(side, 8), "neighbourhood 7": neighbors(side, 7)}
    rows, columns = (windows(side, 1), windows(side, side)) if name == "row" else [cut[name]] * 2
    return lambda: block_attention(x, x, x, rows, columns)


names = ["full explicit", "full fused", "row", "criss-cross", "neighbourhood 7", "window 8"]
memory = {name: [cost.peak_memory(attend(name, side)) for side in sides] for name in names}
growth = {name: cost.growth([side**2 for side in sides], memory[name]) for name in names}
largest = {name: [memory[name][-1] / 2**20] for name in names}
plots.bars_with_spread(
    {name: largest[name] for name in names[1:]}, xlabel="extra memory at N = 2,304 (MiB)"
)
plt.show()

# %% slideshow={"slide_type": "fragment"}
explicit = largest["full explicit"][0]
lab.claim("full attention, written out: over 150 MiB, off the figure", explicit, above=150)
lab.claim("and it grows like N²", growth["full explicit"], above=1.8)
for name in ("row", "criss-cross"):
    lab.claim(f"{name}: well below N²", growth[name], below=1.65)
for name in ("neighbourhood 7", "window 8"):
    lab.claim(f"{name}: like N", growth[name], below=1.15)
more = memory["neighbourhood 7"][-1] / memory["window 8"][-1]
lab.claim("a neighbourhood needs more than a window", more, above=1.5)

# %% [markdown] slideshow={"slide_type": "fragment"}
# In a window all queries share their keys: a block is one small dense attention. In a neighbourhood
# every query has a window of its own. The library cuts the map into blocks of 8×8 queries, gathers the
# 14×14 keys that any of them sees, and masks: 196 keys computed for 49 used, and still linear. The
# fused kernel's memory is linear for *full* attention as well, and less here than that of any sparse
# form but the row, for sparse forms copy keys together; it is time that it cannot save.

# %% tags=["nbval-ignore-output"] slideshow={"slide_type": "fragment"}
sides = [16, 32, 48, 64]
names = ["full fused", "neighbourhood 7", "criss-cross", "window 8"]
times = {
    name: [1e3 * cost.latency(attend(name, side), warmup=1, repeats=3) for side in sides]
    for name in names
}
plots.curve(
    [side**2 for side in sides], times, xlabel="positions N", ylabel="milliseconds, forward",
    title="one attention, this machine, now", log="xy",
)  # fmt: skip
plt.show()

# %% [markdown] slideshow={"slide_type": "fragment"}
# At $N = 256$ the sparse forms may lose: gathering costs time, and a small full attention is one well
# fed product. The slopes decide from some $N$ on. `benchmarks/sparse.py` measures this on a quiet
# machine up to 96×96 positions, with the backward pass.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 12 · What sparse patterns can answer
#
# The question of chapter 02: are the squares at the left and at the right border of a 16×16 image of
# one colour? Two 3×3 convolutions, **one** block with the pattern, a 1×1 convolution, a mean over
# positions, a linear classifier; 400 steps; chance is 0.5.
#
# **Predict:** a window of 8 never sees both squares. Criss-cross with one pass sees along rows and
# columns only; the squares lie at opposite sides, often in no common row. On those images, will it be
# at chance?

# %% slideshow={"slide_type": "fragment"}
lab.results.show("05_context.patterns")

# %% slideshow={"slide_type": "fragment"}
table = lab.results.load("05_context.patterns")["rows"]
right = {row: metrics["accuracy"]["mean"] for row, metrics in table.items()}
lab.claim("one layer of windows of 8 stays at chance", right["window 8"], below=0.55)
lab.claim("moved windows on top of it do not", right["window 8, then shifted by 4"], above=0.8)
print("moved windows, each seed:", table["window 8, then shifted by 4"]["accuracy"]["values"])
for row in ("axial", "interlaced, cells of 4"):
    lab.claim(f"{row}: solved", right[row], above=0.97)
crossing = table["criss-cross, R = 1"]["no common row"]["values"]
lab.claim("criss-cross with one pass: far above chance in every seed, even with no common row",
          min(crossing), above=0.7)  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# Our own prediction was "chance", and it was wrong. No position of the left square sees the right one
# in one pass; but the question does not need that. It needs *some* position that hears both, and a
# non-linear layer after it. Without a common row there are two for each pair of pixels: where the row
# of one crosses the column of the other.

# %% slideshow={"slide_type": "fragment"}
left, right_square = 2 * 16 + 1, 12 * 16 + 14  # (row 2, column 1) and (row 12, column 14)
for name, module in {
    "criss-cross": CrissCrossAttention(8),
    "window 8": WindowAttention(8, 8, 2),
}.items():
    mask = module.dense_mask((16, 16))
    both = (mask[:, left] & mask[:, right_square]).nonzero()[:, 0]
    print(name, "· hear both:", [divmod(position, 16) for position in both.tolist()])

# %% [markdown] slideshow={"slide_type": "fragment"}
# So the question to ask of a pattern is not only "does $i$ see $j$?", but also "does anyone see both?".
# The second pass of criss-cross is better on average, but by little more than the spread; shifted
# windows are at 0.83, 1.00 and 1.00 in three seeds. And the rows are not of one size:

# %% slideshow={"slide_type": "fragment"}
for row, middle in ch05_sparse.PATTERNS.items():
    network = ch05_sparse.toy_network(middle())
    count, macs = cost.parameters(network), cost.macs(network, torch.rand(1, 3, 16, 16))
    print(f"{row:30} {count:7,} parameters {macs / 1e6:6.2f} M multiply–accumulates")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 13 · Is sparser more robust?
#
# One reads that sparse attention is: with fewer keys, there are fewer ways for a disturbance to come
# in. A test: the small ViT of chapter 01 on 32-pixel parts, 8×8 tokens, three blocks; only the masks
# differ. It is trained on clean images, and tested on images with noise (of a standard deviation of
# 0.1 or 0.2 of the range) or with a grey square that is a quarter or half as wide as the image. One row
# more is a control: dense attention after half the steps, which is *worse* on clean images.
#
# **Predict:** which row is the best at noise 0.2? And behind the large square?

# %% slideshow={"slide_type": "fragment"}
for row in ch05_sparse.LAYERS:
    network = ch05_sparse.sparse_vit(row)
    count, macs = cost.parameters(network), cost.macs(network, torch.rand(1, 3, 32, 32))
    print(f"{row:30} {count:7,} parameters {macs / 1e6:6.2f} M multiply–accumulates")
lab.results.show("05_context.robustness")

# %% [markdown] slideshow={"slide_type": "fragment"}
# Accuracy first, then what is left of it: the share of what a row had above chance, 1/8, on clean
# images. (Nine keys cost as many MACs as 64 here: on 8×8 tokens a neighbourhood's block of queries
# gathers the whole map.)

# %% slideshow={"slide_type": "fragment"}
table = lab.results.load("05_context.robustness")["rows"]
means = {row: {name: m["mean"] for name, m in metrics.items()} for row, metrics in table.items()}
kept = {
    row: {name: (value - 1 / 8) / (metrics["clean"] - 1 / 8) for name, value in metrics.items()}
    for row, metrics in means.items()
}
hardest = ["noise 0.2", "hole 50% wide"]
print(f"{'kept of what is above chance':30}", *hardest)
for row in means:
    print(f"{row:30}", *(f"{kept[row][name]:{len(name)}.2f}" for name in hardest))

# %% slideshow={"slide_type": "fragment"}
dense, control, *sparse = means
best = {name: max(means[row][name] for row in sparse) - means[dense][name] for name in means[dense]}
lab.claim("clean: dense attention is ahead of every sparse row", best["clean"], below=-0.03)
spread = table["windows 4, 16 keys"]["noise 0.2"]["std"]
lab.claim("noise 0.2: the best sparse row leads by less than its spread", best["noise 0.2"],
          below=spread)  # fmt: skip
lab.claim("large hole: dense is ahead again", best["hole 50% wide"], below=-0.03)
under_noise = [kept[row]["noise 0.2"] for row in sparse]
lab.claim("noise takes a smaller share from every sparse row than from dense",
          min(under_noise) - kept[dense]["noise 0.2"], above=0.1)  # fmt: skip
lab.claim("but so it does from a dense model that is merely worse",
          kept[control]["noise 0.2"] - kept[dense]["noise 0.2"], above=0.1)  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# **The claim is not borne out here.** At noise 0.2 windows and dense attention are equal within the
# spread of three seeds. Behind a large hole dense attention is ahead, as it was on clean images; windows
# and neighbourhoods keep a smaller share of their accuracy than it, rows and columns, which see the
# whole map in two layers, about the same. That fits "who sees everything can look past a hole", and
# does not show it. As a *share* of the clean accuracy noise does cost the sparse rows less, but a dense model
# that has learned less loses less as well. One who has less has less to lose: such a comparison needs models
# that are equally good on clean images. Ours are not (the control is worse than two of the three
# sparse rows, and like the third), so whether a difference would remain is open; nor does one small model that is right in two
# images of five settle it.
#
# **Common misconceptions, of sparse attention.** *It approximates the full weights* (no: the softmax is
# over fewer keys, and the layer is trained like that). *$N k^2$ is always faster than $N^2$* (not for
# small maps: measure). *Criss-cross is axial* (one softmax against two, and shared weights). *Two layers
# of windows mix* (not without a shift).

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 14 · Paper and here
#
# | claim | published | here | why they may differ |
# |---|---|---|---|
# | DANet's head has 23,954,619 parameters for 19 classes | official code | the same, section 9 | none: exact |
# | OCNet's modules: base 920,576, pyramid 5,782,016, ASP 5,739,904 | official code (v1) | the same, `tests/test_context.py` | none: exact |
# | position attention, no $1/\sqrt d$, starts as the identity | official code | exact, section 4 | none |
# | channel attention is softmax(E) | DANet, section 3.3 | the official code computes softmax(−E), section 5 | paper and code disagree |
# | DANet, ResNet-101, Cityscapes val, single scale: 79.93 mIoU | DANet repository's README | not trained here | ResNet-101 and crops of 768 pixels; here a tiny ResNet and 64-pixel scenes |
# | non-local, DANet, ISANet, ResNet-101, 512×1024, 80k steps: 78.93, 80.41, 80.32 | mmsegmentation's READMEs | FCN 0.290, PAM 0.301, DANet 0.296, OCNet 0.288, spreads 0.013 to 0.021: no order | one recipe, one backbone; one run each: the last two differ by 0.09, far less than two runs of one network (last row) |
# | sparse attention is more robust | said in surveys | not borne out, section 13 | the sparse models are also less accurate; small, three seeds |
# | two identical runs of base-OC: 79.3 and 79.8 val | OCNet repository's README | a spread over three seeds stands beside every number | such gaps are no evidence |

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 15 · Exercises
#
# Write the body, run the cell, run the check. `lab.hint("context.map_megabytes")` gives a hint,
# `lab.solution("context.map_megabytes")` the solution.
#
# **1 · How large is the map?** (5 minutes)


# %% exercise="context.map_megabytes" tags=["exercise"] slideshow={"slide_type": "fragment"}
def map_megabytes(height: int, width: int, output_stride: int, batch: int) -> float:
    """How much room the weights S of one position attention take, in MiB (2²⁰ bytes), in float32.

    The image has height × width pixels, the feature map one position for output_stride ×
    output_stride pixels; a side that does not divide is rounded up. S has a row for every position
    and a column for every position, for each of the batch's images.
    Returns a float, in MiB.
    """
    raise NotImplementedError


# %% slideshow={"slide_type": "fragment"}
lab.check("context.map_megabytes", map_megabytes)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **2 · Find the bug** (10 minutes). This position attention has the right shapes, its softmax runs
# over the right axis, and a network with it trains. One line is wrong: mend it here.


# %% exercise="context.buggy_position_attention" tags=["exercise"] slideshow={"slide_type": "fragment"}
def buggy_position_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """DANet's position attention without its convolutions. One line of the given code is wrong.

    q, k: (B, d, H, W). v: (B, C, H, W). S = softmax(Qᵀ K) over the keys, no scale; O = V Sᵀ.
    Returns (B, C, H, W): at each position the mean of the values, weighted by its own row of S.
    """
    height = q.shape[2]
    q, k, v = (rearrange(x, "b c h w -> b c (h w)") for x in (q, k, v))
    energy = einsum(q, k, "b d i, b d j -> b i j")
    weights = energy.softmax(dim=-1)
    context = einsum(v, weights, "b c i, b i j -> b c j")
    return rearrange(context, "b c (h w) -> b c h w", h=height)


# %% slideshow={"slide_type": "fragment"}
lab.check("context.buggy_position_attention", buggy_position_attention)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **3 · The oracle** (15 minutes), and then the open part: in section 8 the row that is *told the
# classes* hears all of its class, the other thing of the same kind included. What would change if it
# heard its own *object* only (`instances` has one mask for each)? Change `tell` in
# `attnlab/lab/experiments/ch05.py` and find out.


# %% exercise="context.oracle_context" tags=["exercise"] slideshow={"slide_type": "fragment"}
def oracle_context(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """OCNet's ideal: each position receives the mean of x over all positions of its own class.

    x: (B, C, H, W), floats. labels: (B, H, W), integers; 255 means unknown, and a position whose
    class is unknown receives its own features and counts for nobody else. Classes of different
    images of the batch have nothing to do with each other.
    Returns (B, C, H, W).
    """
    raise NotImplementedError


# %% slideshow={"slide_type": "fragment"}
lab.check("context.oracle_context", oracle_context)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **4 · The cheapest cell** (10 minutes). Section 11 has the keys of interlaced attention as a function
# of the cell.


# %% exercise="sparse.cheapest_cell" tags=["exercise"] slideshow={"slide_type": "fragment"}
def cheapest_cell(height: int, width: int) -> tuple[int, int]:
    """The cell of interlaced attention on a height × width map that costs least.

    With cells of P×P, a position first sees those at its place in every cell, then its own cell.
    A map that is no multiple of P is filled up to one: a part of a cell counts as a cell.
    Returns (keys, P): the fewest keys that a position sees in both steps together, and the P, from
    1 to the shorter side, for which it does; the smallest such P.
    """
    raise NotImplementedError


# %% slideshow={"slide_type": "fragment"}
lab.check("sparse.cheapest_cell", cheapest_cell)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **5 · Who sees whom in a neighbourhood** (15 minutes).


# %% exercise="sparse.neighborhood_mask" tags=["exercise"] slideshow={"slide_type": "fragment"}
def neighborhood_mask(height: int, width: int, size: int) -> torch.Tensor:
    """Which keys a position sees in neighbourhood attention. One line is wrong: mend it.

    The size × size window around each position of a height × width map, size being odd; near the
    border its center is moved inside, so that every position sees exactly size² keys. Positions are
    counted row after row: position i lies in row i // width.
    Returns (height · width, height · width), bool, True = may attend, a row for each query.
    """
    position = torch.arange(height * width)
    column, row = position // width, position % width
    half = size // 2
    center_row = row.clamp(half, height - 1 - half)
    center_column = column.clamp(half, width - 1 - half)
    near_row = (row[None] - center_row[:, None]).abs() <= half
    near_column = (column[None] - center_column[:, None]).abs() <= half
    return near_row & near_column


# %% slideshow={"slide_type": "fragment"}
lab.check("sparse.neighborhood_mask", neighborhood_mask)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 16 · Take home
#
# - A gate is one map for all; attention between positions is a map for each of them. Between channels
#   it is the same equation on the transpose.
# - What is compared decides what is found at first: tied embeddings what is alike, and a sign in one
#   line of code whether channels hear their like or their opposite. Training can get round either.
# - The $N^2$ weights need not be stored (fused), and need not be computed: two sparse layers reach
#   every position with $2\sqrt N$ keys at best, instead of $N$.
#
# **Common misconceptions.** *DANet's channel attention is SE* (no pooling, no gate: a $C \times C$
# mixing with one parameter). *Attention is the dear part of the head* (the 3×3 convolutions are).
# *`max(E) − E` is a stabilisation* (it negates). *Object context uses labels when testing* (only the
# oracle does). *The pyramid of OCNet pools* (it attends inside regions). *Interlaced attention
# approximates the trained dense one* (it is another operator, trained by itself).
#
# **Where next.** Chapter 06 lets every channel of every position hear every channel of every
# position, $(CN)^2$ pairs, at a cost linear in $N$.
#
# **References.** Fu et al. 2019, *Dual attention network for scene segmentation*, sections 3.2 and
# 3.3 · Yuan et al. 2018, *OCNet: object context network for scene parsing* · Huang et al. 2019, *CCNet:
# criss-cross attention for semantic segmentation* · Huang et al. 2019, *Interlaced sparse
# self-attention for semantic segmentation* · Liu et al. 2021, *Swin transformer* · Hassani et al.
# 2023, *Neighborhood attention transformer*.
