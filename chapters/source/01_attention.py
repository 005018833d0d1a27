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
# # 01 · Scaled dot-product attention
#
# **At the end you can** write attention from its formula, say what every symbol's shape is, train
# a small vision transformer, and look at what it attends to without being fooled by the picture.
#
# | | |
# |---|---|
# | to read | 60 minutes, exercises another 55 |
# | to run | about half a minute on two CPU cores |
# | you need | chapter 00 (how to run and check), a convolution, a softmax |
# | papers | Vaswani et al. 2017, *Attention is all you need* · Dosovitskiy et al. 2021, *ViT* · Touvron et al. 2021, *DeiT* |

# %% slideshow={"slide_type": "skip"}
import math
from functools import partial

import matplotlib.pyplot as plt
import torch
from einops import einsum, rearrange
from torch.nn import functional as F
from torch.testing import assert_close

import attnlab
from attnlab import lab
from attnlab.attention import (
    MultiHeadAttention,
    attention_rollout,
    attention_weights,
    blockwise_attention,
    deit_tiny,
    scaled_dot_product_attention,
)
from attnlab.lab import cost, plots

device = lab.device()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 1 · The failure
#
# A convolution sees a neighbourhood. To say whether the cat's two eyes match, an output would
# have to see both. Let us measure what one output of a stack of three 3×3 convolutions can see:
# the gradient of that output with respect to the image is zero wherever the image cannot matter.

# %% slideshow={"slide_type": "fragment"}
photo = lab.data.photo("chelsea")  # (3, H, W), floats in [0, 1]
photo = F.interpolate(photo[None], size=(128, 192), antialias=True, mode="bicubic")[0].clamp(0, 1)


def reach(network, row, column):
    """How much each pixel can move one output: |∂ output / ∂ image|, summed over colours."""
    image = photo[None].clone().requires_grad_()
    network(image)[0, :, row, column].sum().backward()
    return image.grad[0].abs().sum(dim=0)


torch.manual_seed(0)
stack = torch.nn.Sequential(*[torch.nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)])
seen = reach(stack, row=52, column=68) > 0
plots.overlay(photo, seen.float(), "what one output can see", label="seen", size=3.5)
plt.show()

# %% slideshow={"slide_type": "fragment"}
rows = seen.any(dim=1).sum().item()
lab.claim("three 3×3 convolutions see a window 7 pixels high", rows, equal=7)

# %% [markdown] slideshow={"slide_type": "notes"}
# Each further 3×3 layer adds one pixel on each side. The eyes lie about 60 pixels apart here: an
# output midway between them needs some 30 layers, one that lies on an eye, as drawn, some 60, and
# each layer mixes the message with everything on the way.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 2 · The idea in one picture
#
# Let every place in the image *ask* all others, and listen to those that answer. Cut the photograph
# into patches. One patch, the **query**, compares itself with every patch, the **keys**. A softmax
# turns the similarities into weights that sum to one, and the query receives the weighted average
# of what the patches have to say, their **values**.
#
# No parameter is learned here: query and key are six numbers that describe a patch, the mean and
# the spread of its three colours, compared by the cosine of the angle between them. (Each number is
# first standardised over the photograph, so that what is usual counts as zero.)
#
# **Before you run the next cell, guess:** the query is a patch in the iris of the cat's eye
# (outlined). Which patches will it find?

# %% slideshow={"slide_type": "fragment"}
pixels = rearrange(photo, "c (h ph) (w pw) -> (h w) (ph pw) c", ph=8, pw=8)  # (384 patches, 64, 3)
described = torch.cat([pixels.mean(dim=1), pixels.std(dim=1)], dim=-1)  # (384, 6)
described = (described - described.mean(dim=0)) / described.std(dim=0)
directions = F.normalize(described, dim=-1)
grid, (row, column) = (16, 24), (6, 8)
similarity = directions @ directions[row * grid[1] + column]  # (384,), between −1 and 1

temperatures = (1.0, 0.2, 0.05)
maps = torch.stack([torch.softmax(similarity / t, dim=-1) for t in temperatures])
relative = rearrange(maps / maps.amax(dim=-1, keepdim=True), "n (h w) -> n h w", h=grid[0])
titles = [f"softmax(similarity / {t})" for t in temperatures]
plots.overlay(photo, relative, titles, mark=(row, column), label="weight / largest", size=3)
plt.show()

# %% slideshow={"slide_type": "fragment"}
other_eye = maps[-1].reshape(grid)[6:9, 15:19].sum().item()
lab.claim("the other eye, 3 % of the patches, gets over 10 % of the weight", other_eye, above=0.1)
received = maps[-1] @ pixels.mean(dim=1)  # the values: the mean colours; (384,) @ (384, 3)
print("the query's own colour", [round(c, 2) for c in pixels[row * 24 + column].mean(0).tolist()])
print("the colour it receives", [round(c, 2) for c in received.tolist()])

# %% [markdown] slideshow={"slide_type": "fragment"}
# It finds both eyes, and also the nose and the dark stripes on the brow: it compares colour, not
# meaning. What should be compared is what the rest of the chapter learns.

# %% [markdown] slideshow={"slide_type": "subslide"}
# Dividing by a small number makes the choice sharp, by a large number makes it a plain average.
# That number is called the **temperature**, and section 5 shows why it cannot be left to chance.

# %% slideshow={"slide_type": "fragment"}
off = (maps.sum(dim=-1) - 1).abs().max().item()
lab.claim("at every temperature the weights sum to one", off, below=1e-5)
entropies = [-(weights * weights.log()).sum().item() for weights in maps]
lab.claim("a lower temperature gives a sharper choice", entropies[0] > entropies[1] > entropies[2])

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 3 · The mathematics, with shapes
#
# For $N$ queries and $M$ keys of width $d$, and values of width $d_v$:
#
# $$S = \frac{Q K^\top}{\sqrt d}, \qquad P = \operatorname{softmax}(S), \qquad O = P V$$
#
# | symbol | shape | what it is |
# |---|---|---|
# | $Q$ | $(N, d)$ | queries: what each token asks |
# | $K$ | $(M, d)$ | keys: what each token can be found by |
# | $V$ | $(M, d_v)$ | values: what each token says when it is found |
# | $S$ | $(N, M)$ | scores; row $n$ belongs to query $n$ |
# | $P$ | $(N, M)$ | weights; each **row** sums to one, columns need not |
# | $O$ | $(N, d_v)$ | output: row $n$ is an average of the rows of $V$ |
#
# In code there are two more axes in front: `(batch, heads, tokens, width)`.

# %% [markdown] slideshow={"slide_type": "subslide"}
# ### By hand, once
#
# One query, three keys, $d = 2$, values that are single numbers. Take a pencil: the scores are
# $q \cdot k_m / \sqrt 2$, exponentiate, divide by the sum, average the values.

# %% slideshow={"slide_type": "fragment"}
q = torch.tensor([[1.0, 0.0]])
k = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
v = torch.tensor([[10.0], [20.0], [30.0]])

scores = [1 / math.sqrt(2), 0.0, -1 / math.sqrt(2)]
exponentials = [math.exp(score) for score in scores]
weights = [e / sum(exponentials) for e in exponentials]
output = weights[0] * 10 + weights[1] * 20 + weights[2] * 30
print("weights", [round(w, 3) for w in weights], "→ output", round(output, 2))

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 4 · Build it three times
#
# **First the formula as a loop.** Slow and impossible to misread: everything below must agree
# with it.


# %% slideshow={"slide_type": "fragment"}
def attention_loop(q, k, v):
    """One query after the other, one key after the other. q (N, d), k (M, d), v (M, dv)."""
    d = q.shape[-1]
    outputs = []
    for query in q:
        scores = torch.stack([(query * key).sum() / math.sqrt(d) for key in k])
        exponentials = torch.exp(scores - scores.max())  # the shift cancels; exp cannot overflow
        weights = exponentials / exponentials.sum()
        outputs.append(sum(weight * value for weight, value in zip(weights, v, strict=True)))
    return torch.stack(outputs)


assert_close(attention_loop(q, k, v), torch.tensor([[output]]))
attention_loop(q, k, v)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Then a few lines of einops.** The letters in the string are the indices of the formula:
# `n` queries, `m` keys, `d` width. A batch and heads come for free.


# %% slideshow={"slide_type": "fragment"}
def attention_einsum(q, k, v):
    """q (B, H, N, d), k (B, H, M, d), v (B, H, M, dv) → (B, H, N, dv)."""
    scores = einsum(q, k, "b h n d, b h m d -> b h n m") / math.sqrt(q.shape[-1])
    weights = scores.softmax(dim=-1)  # over the keys: the last axis
    return einsum(weights, v, "b h n m, b h m dv -> b h n dv")


attention_einsum(q[None, None], k[None, None], v[None, None])

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Then the library's.** `impl="explicit"` writes the weights out, so that they can be looked
# at; `impl="fused"` calls PyTorch's kernel, which never stores them; `impl="blockwise"` is
# explained in section 11. Values *and gradients* of all five must equal the loop's: a wrong
# backward pass trains, only worse.


# %% slideshow={"slide_type": "fragment"}
def values_and_gradients(function, tensors):
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    result = function(*tensors)
    return [result.detach(), *torch.autograd.grad(result.square().sum(), tensors)]


torch.manual_seed(0)
tensors = [torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (5, 7, 7)]
by_loop = values_and_gradients(
    lambda q, k, v: torch.stack(
        [
            torch.stack([attention_loop(q[b, h], k[b, h], v[b, h]) for h in range(3)])
            for b in range(2)
        ]
    ),
    tensors,
)
ways = {"einsum": attention_einsum, "torch": F.scaled_dot_product_attention}
for impl in ("explicit", "fused", "blockwise"):
    ways[impl] = partial(scaled_dot_product_attention, impl=impl)
for name, function in ways.items():
    for got, expected in zip(values_and_gradients(function, tensors), by_loop, strict=True):
        assert_close(got, expected, rtol=0, atol=1e-12)
    print(f"✔ {name}: value and three gradients equal the loop's")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 5 · Why divide by √d?
#
# If the entries of $q$ and $k$ are independent with mean 0 and variance 1, then $q \cdot k$ is a
# sum of $d$ products $q_i k_i$, each of mean 0 and variance 1: its mean is 0 and its variance is
# $d$. Scores that large turn the softmax into a choice of one, and at large $d$ its derivative
# $\operatorname{diag}(p) - p p^\top$ goes to zero. Dividing by the standard deviation $\sqrt d$ keeps the
# variance at one.
#
# **Before you run it:** with $d = 256$ and no scaling, how many of the 196 keys share, in effect,
# the weight? ($e^{\text{entropy}}$ counts them.)


# %% slideshow={"slide_type": "fragment"}
def softmax_statistics(dim, scale, keys=196):
    """Variance of the scores, effective number of keys, median norm of the softmax's Jacobian."""
    generator = torch.Generator().manual_seed(dim)
    q, k = torch.randn(2, 8, keys, dim, generator=generator)
    scores = q @ k.mT * scale
    p = scores.softmax(dim=-1)
    entropy = -torch.special.xlogy(p, p).sum(dim=-1)
    # ‖diag(p) − p pᵀ‖² = Σp² − 2 Σp³ + (Σp²)²
    squares, cubes = p.square().sum(dim=-1), p.pow(3).sum(dim=-1)
    jacobian = (squares - 2 * cubes + squares.square()).clamp(min=0).sqrt()
    return scores.var().item(), entropy.exp().mean().item(), jacobian.median().item()


dims = [4, 16, 64, 256, 1024]
raw = [softmax_statistics(d, 1.0) for d in dims]
scaled = [softmax_statistics(d, d**-0.5) for d in dims]
titles = ["variance of the scores", "effective number of keys (of 196)", "median ‖∂p/∂s‖"]
with plots.style():
    figure, axes = plt.subplots(1, 3, figsize=(11, 3))
for i, (ax, title) in enumerate(zip(axes, titles, strict=True)):
    series = {"q·k": [row[i] for row in raw], "q·k / √d": [row[i] for row in scaled]}
    plots.curve(dims, series, xlabel="width d", ylabel="", title=title, log="xy", ax=ax)
plt.show()

# %% slideshow={"slide_type": "fragment"}
for d, (variance, _, _) in zip(dims, raw, strict=True):
    lab.claim(
        f"width {d}: the variance of q·k is d, within 5 %", variance / d, above=0.95, below=1.05
    )
lab.claim("d = 256, no scale: fewer than 2 keys share the weight", raw[3][1], below=2)
lab.claim("d = 256, 1/√d: more than 100 keys share it", scaled[3][1], above=100)
lab.claim(
    "d = 1024, no scale: the median is under a hundredth of the scaled one",
    raw[4][2] / scaled[4][2],
    below=0.01,
)

# %% [markdown] slideshow={"slide_type": "notes"}
# Answer: fewer than two keys without the scale, over a hundred with it. Two cautions. At $d = 64$, the head width of
# the Transformer and of every DeiT, the median *norm* of the derivative is even larger than with
# the scale; but it sits on the few keys that won by chance, so the right key hardly gets a signal. And
# the argument is about random vectors, that is about initialisation; trained queries and keys are
# not random.

# %% [markdown] slideshow={"slide_type": "subslide"}
# Does it matter for learning? One attention layer has to look one symbol up in a list of 12
# (key, value) pairs; 400 training steps, width 64. Each key has one of 8 values, so chance is 0.125.
# The table is made by
# `attnlab results 01_attention.retrieval`.

# %% slideshow={"slide_type": "fragment"}
lab.results.show("01_attention.retrieval")

# %% slideshow={"slide_type": "fragment"}
table = lab.results.load("01_attention.retrieval")["rows"]
found = {row: metrics["accuracy"]["mean"] for row, metrics in table.items()}
lab.claim("with 1/√d the layer looks symbols up", found["attention, 1/√d"], above=0.95)
lab.claim(
    "without a scale it is far behind after 400 steps",
    found["attention, 1/√d"] - found["attention, no scale"],
    above=0.2,
)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Plain averaging is above chance too: it tells which values are in the list, not which one was
# asked for. And $1/d$ works nearly as well as $1/\sqrt d$ on this task: a scale that is too small can
# be undone by larger weights while the gradient is alive, one that is too large cannot.
#
# The next cell defines an ordinary function that draws; the one after it puts sliders on it.


# %% slideshow={"slide_type": "subslide"}
def draw_softmax(dim=64, temperature=1.0, divide_by_root_d=True):
    """The weights of one query over 40 random keys, largest first."""
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(dim, generator=generator), torch.randn(40, dim, generator=generator)
    scores = k @ q / (math.sqrt(dim) if divide_by_root_d else 1) / temperature
    weights = scores.softmax(dim=-1).sort(descending=True).values
    with plots.style():
        ax = plt.figure(figsize=(6, 2.2)).add_subplot()
    ax.bar(range(40), weights)
    ax.set(xlabel="key, sorted", ylabel="weight", ylim=(0, 1), title="who gets the weight?")
    plt.show()
    return weights


_ = draw_softmax(dim=64, divide_by_root_d=False)

# %% tags=["nbval-ignore-output"] slideshow={"slide_type": "fragment"}
lab.widgets.sliders(
    draw_softmax, dim=(4, 256, 64), temperature=(0.1, 10.0, 1.0), divide_by_root_d=[True, False]
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 6 · Masks: who may listen to whom
#
# A mask takes pairs out *before* the softmax: a blocked score becomes $-\infty$, its weight exactly
# zero, and the others share the whole weight. `attnlab` and `F.scaled_dot_product_attention` read a
# boolean mask as **True = may attend**. `nn.MultiheadAttention` reads it as **True = blocked**. Code
# that mixes them up runs without an error.

# %% slideshow={"slide_type": "fragment"}
torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 1, 8, 16)
tokens = torch.arange(8)
masks = {
    "causal: only the past": tokens[:, None] >= tokens,
    "padding: 5 real tokens": (tokens < 5).expand(8, 8),
    "two blocks of 4": tokens[:, None] // 4 == tokens // 4,
}
with plots.style():
    figure, axes = plt.subplots(1, 3, figsize=(11, 3))
for ax, (title, mask) in zip(axes, masks.items(), strict=True):
    weights = attention_weights(q, k, mask=mask)
    plots.heatmap(weights[0, 0], title=title, ax=ax)
    assert (weights[..., ~mask] == 0).all()
plt.show()

# %% slideshow={"slide_type": "subslide"}
mask = masks["causal: only the past"].clone()
mask[3] = False  # query 3 may attend to nothing at all
naive = (q @ k.mT).masked_fill(~mask, -math.inf).softmax(dim=-1)
ours = scaled_dot_product_attention(q, k, v, mask=mask)
lab.claim("a softmax over nothing is NaN", naive[0, 0, 3].isnan().all().item())
lab.claim("attnlab answers with zeros instead", ours[0, 0, 3].abs().max().item(), equal=0)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 7 · Attention does not know where it is
#
# Nothing in the formula mentions the *place* of a token. Permute the tokens and the outputs are
# permuted with them, nothing else happens: attention is **permutation-equivariant**. If only the
# keys and values are permuted, together, the output does not change at all. (`context` is the set
# that keys and values come from, when it is another than that of the queries.)

# %% slideshow={"slide_type": "fragment"}
torch.manual_seed(0)
layer = MultiHeadAttention(dim=48, num_heads=3)
x = torch.randn(1, 20, 48)  # (batch, tokens, width)
order = torch.randperm(20)
with torch.no_grad():
    equivariant = (layer(x[:, order]) - layer(x)[:, order]).abs().max().item()
    context = torch.randn(1, 9, 48)
    shuffled = layer(x, context=context[:, torch.randperm(9)])
    invariant = (layer(x, context=context) - shuffled).abs().max().item()
lab.claim("permuting tokens permutes outputs, to float precision", equivariant, below=1e-5)
lab.claim("permuting keys and values together changes nothing", invariant, below=1e-5)

# %% [markdown] slideshow={"slide_type": "subslide"}
# So a transformer that should know an image from a heap of its patches has to be *told* the
# positions: a vector that belongs to the place is added to each patch, either learned, or fixed
# sines and cosines of the place at several wavelengths (Vaswani et al., section 3.5). How much does
# it matter? The same small model, whose answer is read from the mean of its tokens, on 32-pixel images, tested on whole images and on images whose patches were
# shuffled (`attnlab results 01_attention.positions`; chance is 0.125):

# %% slideshow={"slide_type": "fragment"}
lab.results.show("01_attention.positions")

# %% slideshow={"slide_type": "fragment"}
table = lab.results.load("01_attention.positions")["rows"]
mean = {
    (row, metric): numbers["mean"]
    for row, metrics in table.items()
    for metric, numbers in metrics.items()
}
blind = mean["none", "accuracy"]
lab.claim(
    "without positions, shuffling the patches changes nothing",
    mean["none", "shuffled patches"],
    equal=blind,
)
lab.claim("learned positions help on whole images", mean["learned", "accuracy"] - blind, above=0.05)
lab.claim("and hurt on shuffled ones", mean["learned", "shuffled patches"] - blind, below=-0.02)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Without positions each token's output follows its patch wherever it goes, and the mean of the tokens
# ignores the order: the same accuracy, to the last image. It is not at chance: what the patches
# contain says something, however they lie. Fixed sines are ahead of learned vectors in each of three
# seeds, by 0.026 on average: too little, on three seeds, to call them better.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 8 · From one head to a vision transformer
#
# **Heads.** One softmax gives each query one set of weights, so one average. To hear several things
# apart, the width $D$ is split into $h$ heads of width
# $d = D / h$ that attend separately; their outputs are concatenated and mixed by one linear map.
# More heads do not cost more parameters. The whole layer, as the library has it:


# %% slideshow={"slide_type": "fragment"}
def multi_head(x, qkv, proj, num_heads):
    """x (B, N, D) → (B, N, D). `qkv` and `proj` are Linear layers D → 3D and D → D."""
    q, k, v = rearrange(qkv(x), "b n (three h d) -> three b h n d", three=3, h=num_heads)
    return proj(rearrange(attention_einsum(q, k, v), "b h n d -> b n (h d)"))


with torch.no_grad():
    assert_close(multi_head(x, layer.qkv, layer.proj, num_heads=3), layer(x))
for heads in (1, 3, 12):
    print(heads, "heads:", cost.parameters(MultiHeadAttention(48, heads)), "parameters")

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Tokens.** ViT cuts the image into patches, maps each linearly to width $D$, puts one learned
# **class token** in front, and adds a learned position vector to every token, the class token's
# included. A block is attention, then an MLP of two linear layers ($D \to 4D \to D$), each after a
# LayerNorm (which gives every token mean 0 and variance 1) and each *added* to its input: the
# residual path. After the last block there is one more LayerNorm and a linear classifier, which
# reads the class token.

# %% slideshow={"slide_type": "fragment"}
sample = lab.data.load("parts", "test", n=200)
image = sample[0]["image"]
tiles = rearrange(image, "c (h ph) (w pw) -> (h w) c ph pw", ph=8, pw=8)
plots.show_images(tiles, title="a 64×64 image as 64 patches: the tokens", columns=8, size=0.5)
plt.show()

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Is ours the real thing?** DeiT-Ti has $12$ blocks, $D = 192$, $3$ heads. Its parameters can be
# counted by hand (you will, in exercise 4), and timm's implementation with the same weights must
# give the same answer. Weights are random here, biases and norms included, because the zeros of a
# fresh model hide mistakes.

# %% slideshow={"slide_type": "fragment"}
import timm

theirs = timm.create_model("deit_tiny_patch16_224").double().eval()
torch.manual_seed(0)
with torch.no_grad():
    for parameter in theirs.parameters():
        parameter.normal_(std=0.05)
ours = deit_tiny().double().eval()
ours.load_state_dict(theirs.state_dict(), strict=True)
with torch.no_grad():
    images = torch.rand(1, 3, 224, 224, dtype=torch.float64)
    difference = (ours(images) - theirs(images)).abs().max().item()
lab.claim("DeiT-Ti has 5,717,416 parameters", cost.parameters(ours), equal=5_717_416)
lab.claim("our logits equal timm's", difference, below=1e-9)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 9 · See it
#
# `vit_mini` is a ViT with 6 blocks, width 96 and 3 heads for 64-pixel images. This one was trained
# on the bundled **parts** set: eight kinds of objects, drawn at random (checkpoint
# `vit_mini_parts`; its JSON file holds the command, seed, time and metrics).

# %% slideshow={"slide_type": "fragment"}
model = lab.checkpoints.load("vit_mini_parts", device=device)
test = lab.data.load("parts", "test", n=1_000)
accuracy = lab.train.accuracy(model, test, device=device)
lab.claim("the trained model is right on more than 70 % of new images", accuracy, above=0.7)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Predict first:** where will a patch on the object look in the first block, and where in the
# last? Will the three heads of a block look at the same places?
#
# Then move the pointer over the patches (or click one and use the arrow keys), switch layers and
# heads, and turn the question round with *is looked at by*.

# %% tags=["explorer", "nbval-ignore-output"] slideshow={"slide_type": "fragment"}
lab.explore(model, image, title="vit_mini on one test image")

# %% [markdown] slideshow={"slide_type": "subslide"}
# (We count blocks from 0: the last is `blocks.5`.) The saved explorer works without Python and
# without a network. What it shows comes from `attnlab.record`,
# which notes the weights of every attention layer while the model runs:

# %% slideshow={"slide_type": "fragment"}
with attnlab.record(model) as maps, torch.no_grad():
    model(image[None].to(device))
for name, weights in maps.items():
    print(name, tuple(weights.shape), "(batch, heads, queries, keys)")

# %% [markdown] slideshow={"slide_type": "subslide"}
# **One map for the whole network.** A token that reaches the last block is a mixture already.
# *Rollout* (Abnar & Zuidema 2020) multiplies the maps of the $L$ blocks, half of each token staying
# where it is: $R = \hat P_L \cdots \hat P_1$ with $\hat P = \tfrac12 (\bar P + I)$ and $\bar P$ the mean
# over the heads. The row of the class token says
# where the answer came from, if mixing were all that happens.

# %% slideshow={"slide_type": "fragment"}
rollout = attention_rollout(maps)[0, 0, 1:].reshape(8, 8).cpu()
last = list(maps.values())[-1][0, :, 0, 1:].mean(dim=0).reshape(8, 8).cpu()
titles = ["class token, last block", "rollout of all blocks"]
plots.overlay(image, torch.stack([last, rollout]), titles, size=2.8)
plt.show()

# %% [markdown] slideshow={"slide_type": "subslide"}
# **A pretty map proves nothing.** Measure: which share of the map's sum lies on the object (the mask
# `saliency`)? And always show beside it two maps that never saw the image: uniform, and a blob in
# the middle.

# %% slideshow={"slide_type": "fragment"}
batch = test.batch(torch.arange(200))
with attnlab.record(model) as maps, torch.no_grad():
    model(batch["image"].to(device))
rollouts = rearrange(attention_rollout(maps)[:, 0, 1:], "b (h w) -> b h w", h=8).cpu()
lasts = rearrange(list(maps.values())[-1][:, :, 0, 1:].mean(1), "b (h w) -> b h w", h=8).cpu()
on_object = {
    "uniform": lab.metrics.uniform((200, 8, 8)),
    "centre prior": lab.metrics.center_prior((200, 8, 8)),
    "class token, last block": lasts,
    "rollout": rollouts,
}
energy = {
    name: lab.metrics.energy_inside(looks, batch["saliency"]).mean().item()
    for name, looks in on_object.items()
}
bars = {name: [share] for name, share in energy.items()}
plots.bars_with_spread(bars, xlabel="share of the map that lies on the object")
plt.show()

# %% slideshow={"slide_type": "fragment"}
lab.claim(
    "the last block's class token beats a blob in the middle by far",
    energy["class token, last block"] / energy["centre prior"],
    above=1.5,
)
lab.claim(
    "rollout does not beat the blob here", energy["rollout"] / energy["centre prior"], below=1
)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Your predictions.** Of what a patch *of the object* gives to patches, how much stays on the object,
# head by head, in the first block and in the last? (The object covers about 15 % of an image.)

# %% slideshow={"slide_type": "fragment"}
foreground = rearrange(F.avg_pool2d(batch["saliency"][:, None].float(), 8), "b 1 h w -> b (h w)")


def stays_on_object(weights):
    """weights (B, heads, 65, 65) → (heads,): the average over patches, by how much is object."""
    patches = F.normalize(weights[:, :, 1:, 1:].cpu(), p=1, dim=-1)
    on_object = einsum(patches, foreground, "b h n m, b m -> b h n")
    return einsum(on_object, foreground, "b h n, b n -> h") / foreground.sum()


first, last_block = (stays_on_object(maps[f"blocks.{i}.attn"]) for i in (0, 5))
print("first block", [round(share, 2) for share in first.tolist()])
print("last block ", [round(share, 2) for share in last_block.tolist()])
spread = (first.max() - first.min()).item()
lab.claim("in the first block the heads look at different places", spread, above=0.2)
spread = (last_block.max() - last_block.min()).item()
lab.claim("in the last block they agree more", spread, below=0.15)

# %% [markdown] slideshow={"slide_type": "fragment"}
# A result to remember: the map that looks more thorough, rollout, is the worse one here, for one
# model and one seed. Much hangs on the half that is kept by decree:


# %% slideshow={"slide_type": "fragment"}
def rollout_keeping(share):
    """Rollout in which every block keeps `share` of each token: R, (B, tokens, tokens)."""
    shares = torch.eye(65)
    for weights in maps.values():
        shares = ((1 - share) * weights.mean(dim=1).cpu() + share * torch.eye(65)) @ shares
    return shares


kept = {}
for share in (0.0, 0.5, 0.9):
    looks = rearrange(rollout_keeping(share)[:, 0, 1:], "b (h w) -> b h w", h=8)
    kept[share] = lab.metrics.energy_inside(looks, batch["saliency"]).mean().item()
    print(f"keeping {share:.0%}: {kept[share]:.2f} of the map on the object")
lab.claim("the more is kept, the more lies on the object", kept[0.0] < kept[0.5] < kept[0.9])

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 10 · Train it
#
# A short run, live: a smaller ViT (3 blocks, width 48, patches of 4×4, the mean of the tokens in
# place of a class token) on 32-pixel images. `lab.fit` is one readable loop (open
# `attnlab/lab/train.py`): AdamW, a learning rate that rises for 5 % of the steps and falls like a
# cosine, gradients clipped to norm 1, images mirrored and shifted.

# %% tags=["nbval-ignore-output"] slideshow={"slide_type": "fragment"}
from attnlab.lab.experiments.ch01 import small_vit

lab.seed_everything(0)
learner = small_vit()
train_set = lab.data.load("parts", "train", n=10_000, size=32)
history = lab.fit(
    learner, train_set, steps=400, batch_size=64, lr=2e-3, device=device,
    augment=lab.train.flip_and_shift,
)  # fmt: skip
plots.curve(history.steps, {"training": history.loss}, xlabel="step", ylabel="loss")
plt.show()

# %% slideshow={"slide_type": "fragment"}
small_test = lab.data.load("parts", "test", n=1_000, size=32)
accuracy = lab.train.accuracy(learner, small_test, device=device)
lab.claim("after 400 steps: more than twice chance", accuracy, above=0.25)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Is it the attention?** Same recipe, same 500 steps, same seeds; the mixing in each block is
# exchanged, with what it has of parameters (`attnlab results 01_attention.mixing`). Below it, `vit_mini` itself on 64-pixel
# images, 1,200 steps, about four minutes a seed (`attnlab results 01_attention.parts`); the
# checkpoint of section 9 had 2,500.

# %% slideshow={"slide_type": "fragment"}
lab.results.show("01_attention.mixing")

# %% slideshow={"slide_type": "fragment"}
table = lab.results.load("01_attention.mixing")["rows"]
found = {row: metrics["accuracy"]["mean"] for row, metrics in table.items()}
runner_up = max(value for row, value in found.items() if row != "attention")
lab.claim("attention is ahead of the runner-up", found["attention"] - runner_up, above=0.1)

# %% slideshow={"slide_type": "fragment"}
lab.results.show("01_attention.parts")

# %% [markdown] slideshow={"slide_type": "fragment"}
# Two limits of the first table. Of the other three, only 3×3 is ahead of the mean in every seed;
# where "nothing" belongs, three seeds cannot say. And it is about 500 steps with three blocks: three
# 3×3 neighbourhoods see only part of the image, and more blocks or longer training may well bring
# them closer. What it shows is that *at this budget* choosing whom to hear is worth more than hearing
# the neighbours or everybody alike.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 11 · What it costs
#
# Counting multiply–accumulates, a block of width $D$ on $N$ tokens costs $12 N D^2$ for its linear
# maps (3 for queries, keys and values, 1 for the projection, 4 + 4 for the MLP) and $2 N^2 D$ for
# scores and mixing. The second term is the famous quadratic one. The two meet at $N = 6D$, 1,152
# tokens for DeiT-Ti; for an image of 196 tokens the quadratic one is small.


# %% slideshow={"slide_type": "fragment"}
def vit_macs(dim, depth, tokens, patch=16, classes=1000):
    """Multiply–accumulates of a ViT on one image: patches, blocks, head."""
    n = tokens + 1  # the class token
    linear = tokens * 3 * patch**2 * dim + depth * 12 * n * dim**2 + classes * dim
    return linear, depth * 2 * n**2 * dim


linear, quadratic = vit_macs(dim=192, depth=12, tokens=196)
counted = cost.macs(deit_tiny(), torch.rand(1, 3, 224, 224))
lab.claim("DeiT-Ti: the formula equals PyTorch's counter", counted, equal=linear + quadratic)
share = quadratic / (linear + quadratic)
lab.claim("the quadratic part is 14 % of it", share, equal=0.14, tol=0.005)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Memory is where it hurts.** The explicit form stores the $N \times M$ weights of every head and
# image. They are not needed all at once: go through the keys block by block, keep for every query
# the largest score so far ($\mu$), the sum of exponentials ($\ell$) and the weighted sum of values ($o$), and rescale them
# whenever a larger score turns up. Start with $\mu = -\infty$, $\ell = 0$, $o = 0$; with $j$ running over
# the keys of the new block,
#
# $$\mu' = \max(\mu, \max_j S_j), \quad \ell' = e^{\mu - \mu'} \ell + \textstyle\sum_j e^{S_j - \mu'}, \quad
# o' = e^{\mu - \mu'} o + \textstyle\sum_j e^{S_j - \mu'} v_j$$
#
# and at the end the output is $o / \ell$. It is exact. This online softmax (Milakov & Gimelshein 2018)
# is one half of FlashAttention; the other is tiling, so that scores never travel to the GPU's slow
# memory.

# %% slideshow={"slide_type": "fragment"}
torch.manual_seed(0)
q, (k, v) = torch.randn(1, 1, 1, 8), torch.randn(2, 1, 1, 12, 8)
largest, total, summed = torch.tensor(-math.inf), torch.tensor(0.0), torch.zeros(8)
for block in range(3):
    keys, values = k[0, 0, 4 * block : 4 * block + 4], v[0, 0, 4 * block : 4 * block + 4]
    scores = keys @ q[0, 0, 0] / math.sqrt(8)
    new_largest = torch.maximum(largest, scores.max())
    shrink, exponentials = (largest - new_largest).exp(), (scores - new_largest).exp()
    total, summed = shrink * total + exponentials.sum(), shrink * summed + exponentials @ values
    largest = new_largest
    print(f"after block {block}: μ = {largest:.3f}, ℓ = {total:.3f}")
assert_close(summed / total, attention_einsum(q, k, v)[0, 0, 0])
assert_close(blockwise_attention(q, k, v, block_size=4), attention_einsum(q, k, v))

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Before you run it:** the number of tokens doubles. By what factor does the extra memory of
# explicit, blockwise and fused grow?

# %% slideshow={"slide_type": "fragment"}
sizes = [256, 512, 1024, 2048]


def extra_memory(impl, tokens):
    """MiB that one forward pass needs beside its inputs: 4 heads of width 32."""
    q, k, v = torch.randn(3, 1, 4, tokens, 32, device=device)
    with torch.no_grad():
        attend = partial(scaled_dot_product_attention, q, k, v, impl=impl)
        return cost.peak_memory(attend, device=device) / 2**20


memory = {
    impl: [extra_memory(impl, n) for n in sizes] for impl in ("explicit", "blockwise", "fused")
}
plots.curve(sizes, memory, xlabel="tokens N", ylabel="extra memory (MiB)", log="xy")
plt.show()

# %% slideshow={"slide_type": "fragment"}
growth = {impl: cost.growth(sizes, values) for impl, values in memory.items()}
lab.claim("explicit: memory grows with N²", growth["explicit"], above=1.8, below=2.2)
lab.claim("blockwise: memory grows with N", growth["blockwise"], above=0.7, below=1.3)
lab.claim("fused: memory grows with N", growth["fused"], above=0.7, below=1.3)

# %% [markdown] slideshow={"slide_type": "notes"}
# Fused attention saves memory and memory traffic, not arithmetic: no multiplication is saved,
# rescaling adds a few, and the backward pass computes the scores again. Our readable blockwise form
# needs more memory than the fused kernel because it handles all queries at once.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 12 · Paper and here
#
# | claim | published | here | why they may differ |
# |---|---|---|---|
# | dot products have variance $d$ | Vaswani et al., section 3.2.1 (argument) | measured, section 5 | none: random vectors in both |
# | attention alone is permutation-equivariant | – | < 1e-5 in float32, section 7 | rounding |
# | DeiT-Ti / S / B have 5 M / 22 M / 86 M parameters | DeiT, table 1 | 5,717,416 / 22,050,664 / 86,567,656 | exact counts, in `tests/test_attention.py` |
# | DeiT-Ti / S / B reach 72.2 / 79.9 / 81.8 % on ImageNet | DeiT repository's README | not trained here | the models are the same; the recipe (300 epochs, strong augmentation) needs GPU-days |
# | attention maps show what matters | a common reading | half of the last block's map lies on the object, rollout does worse than a blob, section 9 | one small model; a map is not a cause |

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 13 · Exercises
#
# Write the body, run the cell, run the check. `lab.hint("attention.entropy")` gives a hint,
# `lab.solution("attention.entropy")` the solution.
#
# **1 · How many keys share the weight?** (5 minutes)


# %% exercise="attention.entropy" tags=["exercise"] slideshow={"slide_type": "fragment"}
def entropy(weights: torch.Tensor) -> torch.Tensor:
    """Entropy of each query's attention in nats: −Σ p log p over the keys, with 0 · log 0 = 0.

    weights: (..., queries, keys); a row sums to 1, or is all zero where every key is masked.
    Returns (..., queries): 0 when one key has all the weight, log(keys) when all have the same.
    """
    raise NotImplementedError


# %% slideshow={"slide_type": "fragment"}
lab.check("attention.entropy", entropy)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **2 · Merge two blocks** (10 minutes). The step at the heart of section 11: two blocks of keys were
# visited apart, perhaps on two machines. Put their results together.


# %% exercise="attention.merge_blocks" tags=["exercise"] slideshow={"slide_type": "fragment"}
def merge_blocks(
    m1: torch.Tensor,
    l1: torch.Tensor,
    o1: torch.Tensor,
    m2: torch.Tensor,
    l2: torch.Tensor,
    o2: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merge what two blocks of keys say to the same queries, as if they had been one block.

    Of its own keys only, each block hands over, for every query,
        m (..., queries)       the largest score s
        l (..., queries)       Σ exp(s − m)
        o (..., queries, dim)  Σ exp(s − m) · value, not divided by l
    A block whose keys are all masked has m = −∞, l = 0, o = 0; so have two of them merged.

    Returns m, l, o of all keys, in the same form: the attention's output is o / l.
    """
    raise NotImplementedError


# %% slideshow={"slide_type": "fragment"}
lab.check("attention.merge_blocks", merge_blocks)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **3 · The mask of a language model** (5 minutes). When text is generated token by token, the queries
# are the *last* tokens of the sequence. Which keys may they see?


# %% exercise="attention.causal_mask" tags=["exercise"] slideshow={"slide_type": "fragment"}
def causal_mask(num_queries: int, num_keys: int) -> torch.Tensor:
    """Which keys each query may attend to, when the queries are the last tokens of a sequence.

    The sequence has num_keys tokens, and query i is its token num_keys − num_queries + i: it may
    attend to itself and to all before it. A query that lies before the first key attends to none.
    Returns (num_queries, num_keys), bool, True = may attend.
    """
    raise NotImplementedError


# %% slideshow={"slide_type": "fragment"}
lab.check("attention.causal_mask", causal_mask)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **4 · Count a ViT** (10 minutes), by formula. DeiT-Ti's 5,717,416 must come out.


# %% exercise="attention.vit_parameters" tags=["exercise"] slideshow={"slide_type": "fragment"}
def vit_parameters(dim: int, depth: int, patch_size: int, img_size: int, num_classes: int) -> int:
    """Number of parameters of a ViT classifier, by formula: nothing is built.

    Square RGB images, one class token, a learned position for every token; in each block two
    LayerNorms, attention (qkv and projection) and an MLP of width 4 · dim; a LayerNorm at the end
    and a linear head. Every linear map, the patch embedding and every LayerNorm has a bias.
    """
    raise NotImplementedError


# %% slideshow={"slide_type": "fragment"}
lab.check("attention.vit_parameters", vit_parameters)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **5 · Find the bug** (10 minutes). This multi-head attention has the right shapes, its rows sum to
# one, and it trains. With published weights it gives nonsense. One line is wrong: mend it here.


# %% exercise="attention.buggy_attention" tags=["exercise"] slideshow={"slide_type": "fragment"}
def buggy_attention(
    x: torch.Tensor, qkv_weight: torch.Tensor, proj_weight: torch.Tensor, num_heads: int
) -> torch.Tensor:
    """Multi-head self-attention without biases. One line of the given code is wrong: mend it.

    x: (B, N, D). qkv_weight: (3D, D), rows: all queries, all keys, all values, and within each
    head after head. proj_weight: (D, D), its input is head after head as well.
    Returns (B, N, D), equal to nn.MultiheadAttention with these weights.
    """
    qkv = x @ qkv_weight.T
    q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=num_heads)
    scores = einsum(q, k, "b h i d, b h j d -> b h i j") * q.shape[-1] ** -0.5
    weights = scores.softmax(dim=-1)
    out = einsum(weights, v, "b h i j, b h j d -> b h i d")
    return rearrange(out, "b h n d -> b n (d h)") @ proj_weight.T


# %% slideshow={"slide_type": "fragment"}
lab.check("attention.buggy_attention", buggy_attention)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **6 · Roll attention out** (15 minutes), and then the open part: on a few test images, compare your
# rollout with the last layer alone, by `lab.metrics.energy_inside` against `saliency`. Would the
# answer change if the residual kept 90 % of a token instead of half? Which share is right, and how
# would one find out?


# %% exercise="attention.rollout" tags=["exercise"] slideshow={"slide_type": "fragment"}
def rollout(maps: list[torch.Tensor]) -> torch.Tensor:
    """Attention rollout: the share of every input token in every output token, through all layers.

    maps: one (B, heads, N, N) tensor a layer, the first layer first; every row sums to 1.
    A layer keeps half of each token (the residual path) and mixes the other half by its attention,
    averaged over the heads. Abnar and Zuidema 2020, section 3.
    Returns (B, N, N): row i says where output token i came from, and sums to 1.
    """
    raise NotImplementedError


# %% slideshow={"slide_type": "fragment"}
lab.check("attention.rollout", rollout)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 14 · Take home
#
# - Attention is a weighted average whose weights are computed from content: compare queries with
#   keys, softmax over the keys, average the values.
# - It has no notion of place, its scale $1/\sqrt d$ keeps the softmax alive at the start, and its
#   explicit form costs memory quadratic in the number of tokens, its fused form does not.
# - A ViT is patches + positions + blocks of attention and MLP; ours equals timm's to 1e-9.
#
# **Common misconceptions.** *More heads mean more parameters* (no). *FlashAttention is an
# approximation* (no) *and saves arithmetic* (no, it stays quadratic in every form). *A mask's True means masked* (depends on the
# API). *An attention map is an explanation* (values, residuals and later layers matter).
#
# **Where next.** Chapter 02 plugs one attention layer into a convolutional network: non-local
# blocks.
#
# **References.** Vaswani et al. 2017, *Attention is all you need*, section 3.2 ·
# Dosovitskiy et al. 2021, *An image is worth 16×16 words*, section 3.1 · Touvron et al. 2021,
# *Training data-efficient image transformers*, sections 3 and 5 · Abnar & Zuidema 2020, *Quantifying
# attention flow*, section 3 · Dao et al. 2022, *FlashAttention*, section 3.1 · Milakov & Gimelshein
# 2018, *Online normalizer calculation for softmax*.
