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
# # 03 · Squeeze-and-excitation, and selective kernels
#
# **At the end you can** write both mechanisms from their equations, count what they add to a
# network, read the gates of a trained one, and tell what a gate does from what it is said to do.
#
# | | |
# |---|---|
# | to read | 55 minutes, exercises another 40 |
# | to run | about three quarters of a minute on two CPU cores |
# | you need | chapter 02 (non-local blocks, residual networks), a BatchNorm |
# | papers | Hu et al. 2018, *Squeeze-and-excitation networks* (SE) · Li et al. 2019, *Selective kernel networks* (SK) |

# %% slideshow={"slide_type": "skip"}
import matplotlib.pyplot as plt
import torch
from einops import einsum, rearrange, reduce
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import attnlab
from attnlab import lab
from attnlab.channel import SelectiveKernel, SqueezeExcite, se_resnet50, select, sknet50
from attnlab.lab import cost, plots
from attnlab.lab.experiments import ch03
from attnlab.non_local import NonLocalBlock
from attnlab.resnet import Bottleneck, resnet50, resnext50_32x4d

device = lab.device()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 1 · The failure
#
# A non-local block (chapter 02) carries anything from anywhere: $z_i = x_i + W_z \sum_j w_{ij}\, g(x_j)$.
# Look at the weight $w_{ij}$ between two positions. It has no index for the channel: the same $w_{ij}$
# multiplies every channel of $g(x_j)$. ($g$ and $W_z$ can weigh channels, but alike for all images.)

# %% slideshow={"slide_type": "fragment"}
torch.manual_seed(0)
block = NonLocalBlock(32, norm=None)
features = torch.randn(1, 32, 8, 8)  # (batch, channels, rows, columns)
with attnlab.record(block) as maps, torch.no_grad():
    block(features)
weights = maps[""]  # (batch, 1, positions, positions)
print("features", tuple(features.shape), "→ weights", tuple(weights.shape))
lab.claim("one weight for each pair of positions, whatever the channel", weights.shape[1], equal=1)

# %% [markdown] slideshow={"slide_type": "subslide"}
# When does that hurt? When the whole image has to decide *which channel counts*. Here is such a
# task on photographs: **keep the color that dominates the image and black out the other two.**
# Every pixel needs one fact about the whole image, and then a multiplication, channel by channel.

# %% slideshow={"slide_type": "fragment"}
names = ("coffee", "flower", "rocket")  # mostly red, mostly green, mostly blue
photos = torch.cat(
    [
        F.interpolate(lab.data.photo(name)[None], size=(64, 96), mode="bilinear", antialias=True)
        for name in names
    ]
)
wanted = ch03.dominant_color(photos)
titles = [*names, "keep red", "keep green", "keep blue"]
plots.show_images(
    torch.cat([photos, wanted]), titles, columns=3, title="given, and below it wanted", size=1.5
)
plt.show()

# %% [markdown] slideshow={"slide_type": "subslide"}
# A network of one block between two linear maps of colors, $3 \to 16 \to 3$ channels, learns it from
# 4,096 small scenes in random tints. **Before you run it:** the block is a non-local one, which sees
# the whole image. What will it make of the photographs?

# %% tags=["nbval-ignore-output"] slideshow={"slide_type": "fragment"}
lab.seed_everything(0)
non_local = ch03.color_network(ch03.COLOR_BLOCKS["non-local, embedded Gaussian"])
_ = ch03.fit_colors(non_local, seed=0, device=device, steps=150)

# %% slideshow={"slide_type": "fragment"}
with torch.no_grad():
    answer = non_local(photos.to(device)).cpu()
plots.show_images(answer.clamp(0, 1), names, title="the non-local network's answer", size=1.6)
plt.show()
error = (answer - wanted).abs().mean().item() / wanted.abs().mean().item()
lab.claim("it is wrong by more than half of what it should show", error, above=0.5)
kept = (answer.mean((2, 3)) / photos.mean((2, 3))).sort(dim=1).values  # wanted: 0, 0, 1
lab.claim("no photograph keeps a color in full", kept[:, -1].max().item(), below=0.8)
lab.claim("and each keeps some of a second one", kept[:, -2].min().item(), above=0.1)

# %% [markdown] slideshow={"slide_type": "subslide"}
# It answers with a compromise: no color in full, no photograph in one color. This was a short
# training. Below are 600 steps with three seeds each: the mean absolute error per pixel and color,
# on objects and backgrounds that were never seen (`attnlab results 03_squeeze_excitation.color`).

# %% slideshow={"slide_type": "fragment"}
lab.results.show("03_squeeze_excitation.color")

# %% slideshow={"slide_type": "fragment"}
table = lab.results.load("03_squeeze_excitation.color")["rows"]
error = {row: metrics["error"]["mean"] for row, metrics in table.items()}
print(f"{'':30} parameters   MACs for 16×16")
for row, make in ch03.COLOR_BLOCKS.items():
    network, image = ch03.color_network(make), torch.rand(1, 3, 16, 16)
    print(f"{row:30} {cost.parameters(network):10,} {cost.macs(network, image):12,}")
untouched = ch03.tinted_scenes("test_unseen", 1_024, seed=100)
as_it_is = (untouched["image"] - untouched["target"]).abs().mean().item()
lab.claim("leaving the image as it is has an error of 0.136", as_it_is, equal=0.136, tol=0.001)
gaussian, dot = error["non-local, embedded Gaussian"], error["non-local, dot product"]
lab.claim(
    "the usual non-local block gains little over none", gaussian / error["no block"], above=0.8
)
lab.claim(
    "this chapter's block halves its error", error["squeeze-and-excitation"] / gaussian, below=0.5
)
lab.claim(
    "the dot product, without a softmax, lies between",
    gaussian > dot > error["squeeze-and-excitation"],
)

# %% [markdown] slideshow={"slide_type": "notes"}
# Why does the dot-product kind do better than the softmax? Its output is
# $W_z \big(\tfrac1N \sum_j g(x_j)\, \phi(x_j)^\top\big)\, \theta(x_i)$: the matrix in the middle is
# computed from the whole image and multiplies the channels of $x_i$. So it can scale channels, by
# sums of products of two channels. The softmax kinds add a weighted mean, and a mean is no product.
# The networks with a block have some 660 parameters each, so the difference is not one of size.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 2 · The idea in one picture
#
# **Squeeze** every channel to one number, its mean over the image. **Excite**: turn these numbers
# into one factor a channel. **Scale**: multiply every channel by its factor. For the task above
# both steps can be done by hand, with the colors themselves as channels.

# %% slideshow={"slide_type": "fragment"}
z = reduce(photos, "b c h w -> b c", "mean")  # squeeze: (3 photographs, 3 colors)
s = F.one_hot(z.argmax(dim=1), 3).float()  # excite, by hand: (3, 3)
scaled = photos * rearrange(s, "b c -> b c 1 1")  # scale
with plots.style():
    figure, axes = plt.subplots(3, 4, figsize=(8, 4), layout="constrained")
for b in range(3):
    axes[b, 0].imshow(rearrange(photos[b], "c h w -> h w c"))
    for ax, values in ((axes[b, 1], z[b]), (axes[b, 2], s[b])):
        ax.bar(["red", "green", "blue"], values, color=[plots.COLORS[i] for i in (1, 2, 0)])
    axes[b, 3].imshow(rearrange(scaled[b], "c h w -> h w c"))
    axes[b, 0].axis("off"), axes[b, 3].axis("off")
for ax, title in zip(axes[0], ("u", "squeeze: z", "excite: s", "scale: s · u"), strict=True):
    ax.set_title(title)
plt.show()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 3 · The mathematics, with shapes
#
# $$z = \frac{1}{HW} \sum_{i,j} u_{ij}, \qquad s = \sigma\big(W_2\, \delta(W_1 z + b_1) + b_2\big), \qquad
# \tilde u_{c,i,j} = s_c\, u_{c,i,j}$$
#
# | symbol | shape | what it is |
# |---|---|---|
# | $u$ | $(C, H, W)$ | the maps that a layer computed; in a residual network, the branch after its last BatchNorm |
# | $z$ | $(C)$ | squeeze: the mean of each channel |
# | $W_1, b_1$ | $(C/r, C)$, $(C/r)$ | down to a hidden layer; $r$ is the **reduction**, 16 in the paper |
# | $\delta$ | – | ReLU |
# | $W_2, b_2$ | $(C, C/r)$, $(C)$ | up again |
# | $\sigma$ | – | sigmoid: each factor lies between 0 and 1 by itself; they need not sum to anything |
# | $s$ | $(C)$ | the factors, or **gate** |
# | $\tilde u$ | $(C, H, W)$ | the output, which is added to the shortcut |
#
# The paper writes the squeeze as $F_{sq}$, the excitation as $F_{ex}$, and $s \cdot u$ as $F_{scale}$
# (section 3).
#
# **By hand, once.** Two channels with means $z = (1, 3)$, one hidden unit, $W_1 = (1, -1)$,
# $W_2 = (2, 1)^\top$, no biases. Take a pencil: what are the two factors?

# %% slideshow={"slide_type": "fragment"}
hidden = max(0.0, 1 * 1 - 1 * 3)  # ReLU(1·z₁ − 1·z₂)
factors = torch.sigmoid(torch.tensor([2.0, 1.0]) * hidden)
print("hidden", hidden, "→ factors", factors.tolist())

# %% [markdown] slideshow={"slide_type": "fragment"}
# The hidden unit is silent, both logits are 0, and $\sigma(0) = \tfrac12$.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 4 · Build it three times
#
# **First the formula as a loop.** One image, one channel, one number at a time:


# %% slideshow={"slide_type": "fragment"}
def squeeze_excite_loop(u, w1, b1, w2, b2):
    """u (C, H, W), w1 (hidden, C), b1 (hidden,), w2 (C, hidden), b2 (C,) → (C, H, W)."""
    channels, height, width = u.shape
    z = [
        sum(u[c, i, j] for i in range(height) for j in range(width)) / (height * width)
        for c in range(channels)
    ]
    hidden = [
        torch.relu(sum(w1[k, c] * z[c] for c in range(channels)) + b1[k]) for k in range(len(w1))
    ]
    logits = [sum(w2[c, k] * hidden[k] for k in range(len(w1))) + b2[c] for c in range(channels)]
    return torch.stack([u[c] / (1 + torch.exp(-logits[c])) for c in range(channels)])


# %% [markdown] slideshow={"slide_type": "subslide"}
# **Then a few lines of einops**, for a batch. **Then the library's**, whose two linear maps are
# stored as 1×1 convolutions `fc1` and `fc2`, as in timm, so that published weights load. The value
# and the gradients of the input and of both matrices must be equal.


# %% slideshow={"slide_type": "fragment"}
def squeeze_excite_einsum(u, w1, b1, w2, b2):
    """u (B, C, H, W) → (B, C, H, W)."""
    z = reduce(u, "b c h w -> b c", "mean")
    hidden = torch.relu(einsum(w1, z, "k c, b c -> b k") + b1)
    s = torch.sigmoid(einsum(w2, hidden, "c k, b k -> b c") + b2)
    return einsum(s, u, "b c, b c h w -> b c h w")


torch.manual_seed(1)
module = SqueezeExcite(channels=8, reduction=4).double()
for bias in (module.fc1.bias, module.fc2.bias):
    nn.init.uniform_(bias, 0.5, 1.0)  # they start at zero, which would hide a forgotten one
parameters = [module.fc1.weight[:, :, 0, 0], module.fc1.bias]
parameters += [module.fc2.weight[:, :, 0, 0], module.fc2.bias]
u = torch.randn(3, 8, 5, 4, dtype=torch.float64, requires_grad=True)


# %% slideshow={"slide_type": "fragment"}
def value_and_gradients(function):
    """The output, and how a fixed sum of it depends on the input and on both matrices."""
    out = function(u)
    return out, *torch.autograd.grad(out.square().sum(), [u, module.fc1.weight, module.fc2.weight])


ways = {
    "loop": lambda u: torch.stack([squeeze_excite_loop(image, *parameters) for image in u]),
    "einsum": lambda u: squeeze_excite_einsum(u, *parameters),
    "library": module,
}
expected = value_and_gradients(ways["loop"])
parameters = [p.clone() for p in parameters]  # a fresh graph for the second backward pass
for name in ("einsum", "library"):
    for got, want in zip(value_and_gradients(ways[name]), expected, strict=True):
        assert_close(got, want, rtol=0, atol=1e-12)
    print(f"✔ {name}: value and three gradients equal the loop's")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 5 · What a gate can do, and what it cannot
#
# **Before you run it:** set $W_2$ and $b_2$ to zero, and the gate knows nothing of the image. Is the
# block then the identity, like a non-local block at its start?

# %% slideshow={"slide_type": "fragment"}
fresh = SqueezeExcite(8)
for parameter in (fresh.fc2.weight, fresh.fc2.bias):
    nn.init.zeros_(parameter)
x = torch.randn(2, 8, 6, 6)
with torch.no_grad():
    lab.claim("it is not: it halves everything", torch.equal(fresh(x), x / 2))

# %% [markdown] slideshow={"slide_type": "subslide"}
# $\sigma(0) = \tfrac12$. SE's own start is near that: He's weights, and biases of zero.
#
# Move one pixel of one channel a little. A 3×3 convolution changes nine places. Which places and
# channels of the output does SE change, and does it know *where* the pixel was?

# %% slideshow={"slide_type": "fragment"}
with torch.no_grad():
    step = torch.zeros_like(u)
    step[0, 2, 1, 3] = 1e-3
    change = (module(u + step) - module(u)).abs()
    touched = (change[0] > 0).float().mean().item()
    order = torch.randperm(20)
    shuffled = rearrange(
        rearrange(u, "b c h w -> b c (h w)")[..., order], "b c (h w) -> b c h w", h=5
    )
    with attnlab.record(module) as of_u:
        module(u)
    with attnlab.record(module) as of_shuffled:
        module(shuffled)
lab.claim("one pixel moves every place of every channel", touched, equal=1)
lab.claim("but no place of another image", change[1:].max().item(), equal=0)
same = (of_u[""] - of_shuffled[""]).abs().max().item()
lab.claim("a shuffled image has the same gate: SE is blind to places", same, below=1e-12)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Answers: all places of all channels of this image, through the mean; and no. That SE is blind to
# places is the failure with which chapter 04 begins. The gate depends on one image only: no
# statistic of the batch is in it.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 6 · See it
#
# `resnet_mini` with SE in its four residual blocks (16, 32, 64 and 128 channels, $r = 4$), trained to
# name one of eight kinds of objects in photographic scenes (checkpoint `resnet_mini_se_scenes`; its
# JSON file holds command, seed, time and metrics). `attnlab.record` catches the gates.

# %% slideshow={"slide_type": "fragment"}
model = lab.checkpoints.load("resnet_mini_se_scenes", device=device)
test = lab.data.load("scenes", "test_scenes", n=1_000)
batch = test.batch(slice(None))
labels = batch["label"]
with attnlab.record(model) as maps, torch.no_grad():
    model(batch["image"].to(device))
gates = {name.partition(".")[0]: gate.cpu() for name, gate in maps.items()}  # each (1000, C)
accuracy = lab.train.accuracy(model, test, device=device)
lab.claim("it names more than half of the objects (chance is an eighth)", accuracy, above=0.5)
plots.show_images(batch["image"][:6], [test.classes[label] for label in labels[:6]], size=1.2)
plt.show()

# %% [markdown] slideshow={"slide_type": "subslide"}
# First the gates of real photographs. Gray: the usual gate of each channel, its mean over 1,000
# scenes. Dots: the gate of this photograph. Then what the branch computed in the two channels whose
# gates are furthest above and below the usual (orange positive, purple negative, white zero; above
# it the channel's number). See that each photograph has a gate of its own, computed and not stored:
# the coffee opens channel 25, the rocket closes it.


# %% slideshow={"slide_type": "fragment"}
def draw_gates(photo="chelsea", layer="layer2"):
    """Gates of one photograph beside the usual ones, and the maps it opens and closes most."""
    image = F.interpolate(lab.data.photo(photo)[None], (96, 144), mode="bilinear", antialias=True)
    seen = []
    inside = model.get_submodule(f"{layer}.0.inside")
    handle = inside.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with attnlab.record(model) as maps, torch.no_grad():
        model(image.to(device))
    handle.remove()
    gate, usual = maps[f"{layer}.0.inside"][0].cpu(), gates[layer].mean(dim=0)
    order, moved, u = usual.argsort(), gate - usual, seen[0][0].cpu()
    with plots.style():
        _, axes = plt.subplots(1, 4, figsize=(9, 1.5), width_ratios=(1.3, 2.6, 1.3, 1.3))
    axes[0].imshow(rearrange(image[0], "c h w -> h w c"))
    axes[1].plot(usual[order], color="0.6")
    axes[1].plot(gate[order], "o", markersize=3)
    axes[1].set(title=f"{layer}: gates of {photo}", xlabel="channel, sorted", ylim=(0, 1.02))
    for ax, channel in zip(axes[2:], (moved.argmax(), moved.argmin()), strict=True):
        ax.imshow(u[channel], cmap="PuOr_r", norm=plt.matplotlib.colors.CenteredNorm())
        ax.set_title(f"{channel}: {gate[channel]:.2f}, usual {usual[channel]:.2f}", fontsize=8)
    for ax in axes[[0, 2, 3]]:
        ax.axis("off")
    plt.show()
    return gate


# %% slideshow={"slide_type": "fragment"}
of = {photo: draw_gates(photo) for photo in ("coffee", "flower", "rocket")}
lab.claim("channel 25 is wide open for the coffee", of["coffee"][25].item(), above=0.9)
lab.claim("and nearly closed for the rocket", of["rocket"][25].item(), below=0.3)

# %% tags=["nbval-ignore-output"] slideshow={"slide_type": "fragment"}
lab.widgets.sliders(
    draw_gates,
    photo=["chelsea", "coffee", "flower", "rocket"],
    layer=["layer1", "layer2", "layer3", "layer4"],
)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Predict:** the first block sees edges and colors, the last one nearly objects. In which block do
# the gates of a *mammal* differ from those of *food*? Below, the mean gate of each class for each
# channel, channels sorted by their overall mean; the other six classes in gray.

# %% slideshow={"slide_type": "fragment"}
shown = {"mammal": plots.COLORS[0], "food": plots.COLORS[1]}
with plots.style():
    figure, axes = plt.subplots(2, 4, figsize=(10, 4), layout="constrained")
for column, (layer, gate) in enumerate(gates.items()):
    order = gate.mean(dim=0).argsort()
    for name in sorted(test.classes, key=lambda name: name in shown):
        mean = gate[labels == test.classes.index(name)].mean(dim=0)[order]
        style = {"color": shown[name], "label": name} if name in shown else {"color": "0.85"}
        axes[0, column].plot(mean, **style)
    title = f"{layer}: class means"
    axes[0, column].set(title=title, xlabel="channel, sorted", ylim=(0, 1))
    axes[1, column].hist(gate.flatten(), bins=30, range=(0, 1))
    axes[1, column].set(title=f"{layer}: all gates", xlabel="gate", yticks=[])
axes[0, 0].legend()
plt.show()

# %% [markdown] slideshow={"slide_type": "subslide"}
# One number for what the eye sees: of the variance of the gates over images, which share lies
# *between* the classes? 0 means that the class says nothing about the gate, 1 that it says all.


# %% slideshow={"slide_type": "fragment"}
def share_between_classes(gate, labels):
    """gate (images, C), labels (images,) → variance of the class means / variance, over channels."""
    mean = gate.mean(dim=0)
    between = sum(
        (labels == c).float().mean() * (gate[labels == c].mean(dim=0) - mean).square().sum()
        for c in labels.unique()
    )
    return (between / (gate - mean).square().mean(dim=0).sum()).item()


shares = {layer: share_between_classes(gate, labels) for layer, gate in gates.items()}
shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
chance = {layer: share_between_classes(gate, shuffled) for layer, gate in gates.items()}
for layer in gates:
    print(f"{layer}: {shares[layer]:.2f} between classes, {chance[layer]:.2f} with shuffled labels")
lab.claim("early gates hardly know the class", max(shares["layer1"], shares["layer2"]), below=0.15)
lab.claim("late gates do", min(shares["layer3"], shares["layer4"]), above=0.25)
open_share = (gates["layer4"] > 0.9).float().mean().item()
lab.claim("half of the last block's gates are above 0.9", open_share, equal=0.53, tol=0.05)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Answer: not in the first block, a little in the second (there food lies below mammal), clearly from
# the third on. That is the direction that the paper reports: gates shared by the classes
# early and specific to them later. It also reports gates near a constant in the last block. (Both
# from memory of the journal version, unconfirmed.) This small network does not show that: half of
# its last gates are above 0.9, but over all its channels more than a quarter of the variance lies
# between the classes.
#
# Is the gate *of this image* used, or would a fixed factor for each channel do? Two tests without
# any training: replace every gate by its mean over 1,000 images; or give each image the gate of
# another. **Guess first** which costs more.


# %% slideshow={"slide_type": "subslide"}
def accuracy_with(change, layers=("layer1", "layer2", "layer3", "layer4")):
    """Accuracy when `change(layer, gate)` takes the place of the gates (B, C) of these layers."""
    handles = [
        model.get_submodule(f"{layer}.0.inside.attn_probe").register_forward_hook(
            lambda probe, inputs, gate, layer=layer: change(layer, gate)
        )
        for layer in layers
    ]
    result = lab.train.accuracy(model, test, device=device)
    for handle in handles:
        handle.remove()
    return result


def the_mean(layer, gate):
    return gates[layer].mean(dim=0).to(gate).expand_as(gate)


def of_another_image(layer, gate):
    return gate.roll(1, dims=0)


# %% slideshow={"slide_type": "fragment"}
fixed, exchanged = accuracy_with(the_mean), accuracy_with(of_another_image)
print(f"own gate {accuracy:.2f}, mean gate {fixed:.2f}, another image's gate {exchanged:.2f}")
for layer in gates:
    print(f"  mean gate in {layer} only: {accuracy_with(the_mean, [layer]):.2f}")
lab.claim("the gate of the image itself matters", accuracy - fixed, above=0.04)
lab.claim("another image's gate costs more than the mean gate", fixed - exchanged, above=0.03)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Answer: the gate of another image; a wrong gate is worse than an average one. So a gate is more than
# a list of important channels: the last BatchNorm's factor already is such a list, learned once for
# all images. But most of the accuracy survives the mean gate. The last
# block's gates, which know the class best, are missed as little as the first block's, which hardly
# know it: knowing the class and being needed are two things.
#
# **Is a large gate an important channel?** Set half of the gates of one block to zero: those that
# are largest in this image, those that are smallest, or any. **Guess** the order of the three
# accuracies.


# %% slideshow={"slide_type": "subslide"}
def muted(choose):
    """A change of gates that sets half of them to 0: where `choose(gate)` (B, C) is largest."""
    return lambda layer, gate: gate.scatter(1, choose(gate).topk(gate.shape[1] // 2).indices, 0.0)


def any_of(gate):
    return torch.rand(gate.shape, generator=generator).to(gate)


generator = torch.Generator().manual_seed(0)
choices = {"largest": lambda gate: gate, "any": any_of, "smallest": lambda gate: -gate}
left = {
    layer: [accuracy_with(muted(choose), [layer]) for choose in choices.values()]
    for layer in ("layer2", "layer3", "layer4")
}
for layer, margin in (("layer2", 0.04), ("layer4", 0.02)):
    largest, anyone, smallest = left[layer]
    lab.claim(f"{layer}: muting the largest costs more than any", anyone - largest, above=margin)
lab.claim(
    "layer3: the three choices are close", max(left["layer3"]) - min(left["layer3"]), below=0.04
)

# %% tags=["nbval-ignore-output"] slideshow={"slide_type": "fragment"}
print(f"half muted: {', '.join(choices)}")
for layer, row in left.items():
    print(f"{layer}:", ", ".join(f"{value:.3f}" for value in row))

# %% [markdown] slideshow={"slide_type": "fragment"}
# In the second block the order is what the word *gate* suggests: muting the largest costs most, the
# smallest least. In the last block the largest cost most, and a random half no more than the smallest.
# In the third the order is the same, but the choices lie within 0.04 of each other: how open a gate is
# says little there about how much the answer needs the channel. (A possible reason, not tested: the
# layers above can give an open channel a small weight.) Muting zeroes the branch only; the shortcut
# passes. This is one network, one seed: a reading, not a law.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 7 · Train it
#
# First the task of section 1, live, with SE in the place of the non-local block. (600 steps here,
# 150 there; the table of section 1 gives both 600.)

# %% tags=["nbval-ignore-output"] slideshow={"slide_type": "fragment"}
lab.seed_everything(0)
gated = ch03.color_network(ch03.COLOR_BLOCKS["squeeze-and-excitation"])
_ = ch03.fit_colors(gated, seed=0, device=device, steps=600)

# %% slideshow={"slide_type": "fragment"}
with torch.no_grad():
    gated_answer = gated(photos.to(device)).cpu()
plots.show_images(gated_answer.clamp(0, 1), names, title="the gated network's answer", size=1.6)
plt.show()
ratio = (gated_answer - wanted).abs().mean() / (answer - wanted).abs().mean()
lab.claim("after 600 steps: less than half of the other's error after 150", ratio.item(), below=0.5)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **And on objects?** The scenes of section 6 and the same `resnet_mini`, but 300 steps (the checkpoint
# of section 6 had 2,500: hence its higher accuracy); batch and seeds are those of all rows,
# only the block differs: none; SE with two reductions; SE with another function in the place of the
# sigmoid; SE after the addition instead of before it (`attnlab results
# 03_squeeze_excitation.scenes`). Chance is 0.125. *New objects* are cut-outs that were in no
# training image. **Before you read on:** order the six.

# %% slideshow={"slide_type": "fragment"}
lab.results.show("03_squeeze_excitation.scenes")

# %% slideshow={"slide_type": "fragment"}
table = lab.results.load("03_squeeze_excitation.scenes")
print(f"{'':35} parameters  million MACs  accuracy, seen objects")
seen = {row: torch.tensor(m["seen objects"]["values"]) for row, m in table["rows"].items()}
for row, make in ch03.SCENE_MODELS.items():
    network, image = make(), torch.rand(1, 3, 64, 64)
    numbers = cost.parameters(network), cost.macs(network, image) / 1e6, seen[row].mean()
    print("{:35} {:10,} {:13.2f} {:23.3f}".format(row, *numbers))
plots.bars_with_spread(table, "seen objects", xlabel="accuracy on seen objects (chance 0.125)")
plt.show()

# %% slideshow={"slide_type": "fragment"}
plain = seen["no block"]
for row in ("SE, r = 16", "SE, r = 4"):
    off = (seen[row].mean() - plain.mean()).abs().item()
    lab.claim(f"{row}: its mean differs by less than half a spread", off / plain.std(), below=0.5)
relu, after = seen["r = 4, gate ReLU"], seen["r = 4, after the addition"]
before = seen["SE, r = 4"]
lab.claim(
    "ReLU as gate: the best seed is below the worst without a block", relu.max() < plain.min()
)
lab.claim("after the addition is better than before it in every seed", (after > before).all())
lab.claim("but it and no block overlap", after.min() < plain.max())
new = {row: torch.tensor(m["new objects"]["values"]) for row, m in table["rows"].items()}
lead = new["r = 4, after the addition"].min() - new["SE, r = 4"].max()
lab.claim("on new objects its worst seed is above the best before it", lead.item(), above=0.01)

# %% [markdown] slideshow={"slide_type": "fragment"}
# **SE and no block are a tie**, at both reductions and on both sets of objects: at this size and
# budget the block is not what decides. What the table does separate is the gate. With a ReLU in the
# place of the sigmoid, factors can grow without bound or die, and on seen objects every seed is worse
# than every seed without a block. A softmax over the channels (times $C$, so that the factors have
# mean 1), which makes them compete, loses 0.05 on seen objects, but in one seed only 0.003, and on
# new objects nothing: no firm result.
#
# At the same reduction, SE after the addition is better than SE before it in every seed, by 0.01 to
# 0.03 on both sets. The paper's ablation finds the opposite (from memory, unconfirmed): one small
# network and 300 steps do not overturn it, but here the direction is consistent. Against no block
# its seeds overlap.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 8 · What it costs
#
# In a network whose stages have $N_s$ blocks with $C_s$ output channels, SE adds
# $\tfrac2r \sum_s N_s C_s^2$ weights, and $\sum_s N_s (C_s + C_s / r)$ biases, where $r$ divides $C_s$. **Before you run it:**
# which of ResNet-50's stages, with 3, 4, 6 and 3 blocks of 256, 512, 1,024 and 2,048 channels, pays
# most?

# %% slideshow={"slide_type": "fragment"}
stages = {"layer1": (3, 256), "layer2": (4, 512), "layer3": (6, 1024), "layer4": (3, 2048)}
weights = {name: 2 * n * c * c // 16 for name, (n, c) in stages.items()}
biases = sum(n * (c + c // 16) for n, c in stages.values())
print(weights, "biases", biases)
with torch.device("meta"):  # shapes without numbers: nothing is computed
    plain, with_se, image = resnet50(), se_resnet50(), torch.rand(1, 3, 224, 224)
    extra = cost.parameters(with_se) - cost.parameters(plain)
    share = cost.macs(with_se, image) / cost.macs(plain, image) - 1
lab.claim("formula and network agree", extra, equal=sum(weights.values()) + biases)
lab.claim("SE-ResNet-50 has 28,088,024 parameters", cost.parameters(with_se), equal=28_088_024)
lab.claim("10 % more parameters", extra / cost.parameters(plain), equal=0.10, tol=0.005)
lab.claim("and less than a thousandth more MACs", share, below=0.001)

# %% [markdown] slideshow={"slide_type": "subslide"}
# The last stage pays most, 63 % of the weights: the number of channels counts squared. And MACs are as
# good as free. **So is SE free?** Guess which share of the time of ResNet-50's second residual block
# (256 channels in and out) it takes.

# %% slideshow={"slide_type": "fragment"}
x = torch.randn(2, 256, 56, 56, device=device)
parts = {
    "bottleneck": Bottleneck(256, 64).to(device),
    "SE": SqueezeExcite(256).to(device),
}
measured = {name: cost.measure(part, x, repeats=7) for name, part in parts.items()}
mac_share = measured["SE"]["macs"] / measured["bottleneck"]["macs"]
time_share = measured["SE"]["latency"] / measured["bottleneck"]["latency"]
lab.claim("of the MACs: less than a ten-thousandth", mac_share, below=1e-4)
lab.claim("of the time: more than twenty times that share", time_share / mac_share, above=20)

# %% tags=["nbval-ignore-output"] slideshow={"slide_type": "fragment"}
print(f"SE takes {mac_share:.4%} of the block's MACs and {time_share:.0%} of its time")

# %% [markdown] slideshow={"slide_type": "fragment"}
# The share of the time is far larger than that of the MACs. It goes into memory: the maps are read twice (for the mean and for the product) and written
# once, and MACs do not count that. The addition to the shortcut can be done in the same pass,
# `torch.addcmul(shortcut, u, s)`; the authors' Caffe code has a layer for it, named Axpy. In training,
# autograd keeps $u$ for the product: one map more per block.

# %% slideshow={"slide_type": "fragment"}
shortcut, u, s = torch.randn(2, 8, 5, 5), torch.randn(2, 8, 5, 5), torch.rand(2, 8, 1, 1)
assert_close(torch.addcmul(shortcut, u, s), shortcut + s * u)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 9 · Selective kernels: a gate over sizes
#
# SE weighs channels. How far a channel *looks* is fixed by its kernel. Li et al. run several
# sizes side by side and let a gate of the same kind share each channel among them. With $M$ branches:
#
# $$U_m = \delta(\mathrm{BN}(\mathrm{conv}_m(x))), \quad s = \frac{1}{HW} \sum_{ij} \sum_m U_{m,ij}, \quad
# a_{m} = \operatorname{softmax}_m\big(A_m\, \delta(\mathrm{BN}(W_1 s))\big), \quad V_c = \sum_m a_{m,c}\, U_{m,c}$$
#
# | symbol | shape | what it is |
# |---|---|---|
# | $x$ | $(C_{in}, H, W)$ | the input |
# | $U_m$ | $(C, H, W)$ | branch $m$ of $0 … M - 1$, grouped: a 3×3 convolution; the second has dilation 2 and stands for a 5×5 |
# | $s$ | $(C)$ | squeeze, of the sum of the branches |
# | $W_1$ | $(d, C)$ | down to $d = \max(C / 16, 32)$ |
# | $A_m$ | $(C, d)$ | up again, once for each branch; no biases |
# | $a_m$ | $(C)$ | shares of branch $m$; **over the branches** they sum to 1, for every channel |
# | $V$ | $(C, H, W)$ | the output |

# %% slideshow={"slide_type": "subslide"}
torch.manual_seed(0)
kernels = SelectiveKernel(32, groups=4).double().eval()
nn.init.normal_(kernels.attn.fc_select.weight, std=2.0)  # shares that differ, to see something
x = torch.randn(2, 32, 9, 9, dtype=torch.float64)
with torch.no_grad():
    branches = torch.stack([path(x) for path in kernels.paths])  # (M, B, C, H, W)
    s = reduce(branches, "m b c h w -> b c 1 1", "sum") / 81
    hidden = torch.relu(kernels.attn.bn(kernels.attn.fc_reduce(s)))
    logits = rearrange(kernels.attn.fc_select(hidden), "b (m c) 1 1 -> m b c", m=2)
    shares = logits.softmax(dim=0)  # over the branches
    by_hand = einsum(shares, branches, "m b c, m b c h w -> b c h w")
    assert_close(kernels(x), by_hand)
    kernels.impl = "explicit"
    assert_close(kernels(x), by_hand)
    lab.claim("the shares of a channel sum to one", (shares.sum(0) - 1).abs().max(), below=1e-12)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Two branches: how many free numbers a channel?** There are two logits, $l_m = A_m\, \delta(…)$, one number each for a channel. Write the softmax of two
# out, $e^{l_0} / (e^{l_0} + e^{l_1}) = 1 / (1 + e^{-(l_0 - l_1)})$: it is a sigmoid of the difference, so
# one number counts. That is also the fast form, one interpolation without a stack of the branches.

# %% slideshow={"slide_type": "fragment"}
with torch.no_grad():
    first = torch.sigmoid(logits[0] - logits[1])
    assert_close(shares[0], first)
    as_line = torch.lerp(branches[1], branches[0], rearrange(first, "b c -> b c 1 1"))
    assert_close(as_line, by_hand)
    assert_close(select(list(branches), rearrange(shares, "m b c -> b m c")), by_hand)
print("✔ softmax of two = sigmoid of the difference = one interpolation")

# %% [markdown] slideshow={"slide_type": "subslide"}
# Without norm and ReLU, both branches together would be, for each channel, one 5×5 kernel, $a_0 k_3 + a_1 k_{3, \text{dilated}}$.
# **Before you move the slider:** at equal shares, how many of its 25 taps are not zero?


# %% slideshow={"slide_type": "fragment"}
def draw_kernel(difference=0.0):
    """The effective 5×5 kernel of a 3×3 blur and a dilated one; `difference` is l₀ − l₁."""
    share = torch.sigmoid(torch.tensor(difference))
    small, wide = torch.zeros(2, 5, 5)
    blur = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    small[1:4, 1:4] = blur
    wide[::2, ::2] = blur
    kernel = share * small + (1 - share) * wide
    title = f"share of the 3×3: {share:.2f}"
    plots.heatmap(
        kernel,
        title=title,
        xlabel="column",
        ylabel="row",
        numbers=".2f",
        limits=(0, 0.25),
        size=2.8,
    )
    plt.show()
    return kernel


taps = int((draw_kernel() > 0).sum())
lab.claim("17 taps: 9 + 9, less the center that both have", taps, equal=17)

# %% tags=["nbval-ignore-output"] slideshow={"slide_type": "fragment"}
lab.widgets.sliders(draw_kernel, difference=(-6.0, 6.0, 0.0))

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Does a larger object ask for the larger kernel?** The authors enlarge objects by half and find
# that the larger kernel's share rises in early and middle layers, and not in the last stage. Here:
# a small network with selective kernels, trained on 32-pixel scenes for 300 steps, looks at objects
# whose longer side is 30 to 75 % of the image. The table holds the dilated kernel's mean share
# (`attnlab results 03_squeeze_excitation.scale`).

# %% slideshow={"slide_type": "fragment"}
lab.results.show("03_squeeze_excitation.scale", digits=4)

# %% slideshow={"slide_type": "fragment"}
table = lab.results.load("03_squeeze_excitation.scale")["rows"]
sizes = [int(size.rstrip("%")) for size in table["layer1"]]
rise = {}
for layer, metrics in table.items():
    values = torch.tensor([metric["values"] for metric in metrics.values()])  # (sizes, seeds)
    rise[layer] = rearrange(values - values[0], "size seed -> seed size")
plots.curve(
    sizes,
    rise,
    xlabel="longer side of the object, % of the image",
    ylabel="change of the share",
    title="share of the dilated kernel, against objects of 30 %",
)
plt.show()
largest = rise["layer2"][:, -1]
lab.claim("layer2: the share rises in every seed", largest.min().item(), above=0.005)
lab.claim("by at most 0.03", largest.max().item(), below=0.03)
others = torch.stack([rise[layer][:, -1] for layer in ("layer1", "layer3", "layer4")])
lab.claim("elsewhere by at most 0.01, up or down", others.abs().max().item(), below=0.01)
lab.claim(
    "and nowhere in every seed by more than 0.001", (others.min(dim=1).values < 1e-3).all().item()
)

# %% [markdown] slideshow={"slide_type": "fragment"}
# (Lines: mean over three seeds; bands: their standard deviation.) Yes in the second block, in all
# three seeds, and by little: the share moves by 0.01 to 0.02 where it could move by 0.5. In
# layers 3 and 4 two seeds rise and one does not; in layer 1 they go both ways. The direction is the paper's, in an early block and not in
# the last; that the network *needs* it is not shown. (Each size is compared with 30 % in the same
# network, for the shares of different seeds differ as well.)
#
# **And does it pay?** The same scenes at 32 pixels, 300 steps, three networks of bottleneck blocks
# (`attnlab results 03_squeeze_excitation.kernels`).

# %% slideshow={"slide_type": "subslide"}
lab.results.show("03_squeeze_excitation.kernels")

# %% slideshow={"slide_type": "fragment"}
table = lab.results.load("03_squeeze_excitation.kernels")["rows"]
for row, make in ch03.KERNEL_MODELS.items():
    network, image = make(), torch.rand(1, 3, 32, 32)
    numbers = cost.parameters(network), cost.macs(network, image) / 1e6
    mean = table[row]["seen objects"]["mean"]
    print("{:18} {:8,} parameters {:5.2f} million MACs".format(row, *numbers), f"{mean:6.3f}")
means = [metrics["seen objects"]["mean"] for metrics in table.values()]
spread = table["no block"]["seen objects"]["std"]
lab.claim("all three lie within one spread", (max(means) - min(means)) / spread, below=1)
with torch.device("meta"):
    resnext, sknet = resnext50_32x4d(), sknet50()
lab.claim("ResNeXt-50 has 25,028,904 parameters", cost.parameters(resnext), equal=25_028_904)
lab.claim("SKNet-50 has 27,479,784", cost.parameters(sknet), equal=27_479_784)

# %% [markdown] slideshow={"slide_type": "fragment"}
# A tie again: 0.30, 0.31 and 0.30 with a spread of 0.01, and on new objects no difference either. At
# this budget the second kernel buys nothing for its 17 % more parameters and 11 % more MACs.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 10 · Paper and here
#
# | claim | published | here | why they may differ |
# |---|---|---|---|
# | SE-ResNet-50's size | released Caffe model: 28,088,024 parameters | 28,088,024, section 8 | equal; our logits equal those of timm's `seresnet50` to 1e-9 with the same weights (`tests/test_channel.py`) |
# | SE-ResNet-50 on ImageNet | 22.37 % top-1, 6.36 % top-5 error (authors' repository, README) | not trained here | GPU-days |
# | SE won ILSVRC 2017 | 2.251 % top-5 error, an ensemble (abstract) | – | – |
# | gates are shared by the classes early, specific later | journal version (from memory, unconfirmed) | 0.02 and 0.07 of the variance between classes early, 0.39 and 0.43 late, section 6 | one seed of a network with four blocks |
# | SE helps classification | ResNeXt-50: 22.23 → 21.12 % top-1 error (SK's repository, README) | a tie: 0.342 → 0.345 (r = 16), 0.339 (r = 4), spread 0.03, section 7 | 300 steps, 0.3 million parameters, 8 classes |
# | SKNet-50's size | README: 27.5 M | 27,479,784, section 9 | equal; logits equal timm's `skresnext50_32x4d` |
# | SK against SE and none, ResNeXt-50, top-1 error | 20.79, 21.12, 22.23 % (README, 224 pixels) | a tie: accuracy 0.305, 0.312, 0.302, section 9 | size and task |
# | larger objects, larger kernels | README, figure: +50 % size raises the 5×5's share, not in the last stage | the dilated kernel's share rises by 0.01 to 0.02 in the second of four blocks (30 → 75 % of the image), section 9 | size and task |
#
# **A lesson from the recipe.** timm's re-evaluation of the same architectures: ResNet-50 with
# torchvision's original weights is right for 76.16 % of ImageNet's validation images, the port of
# the authors' SE-ResNet-50 for 77.65 %. With modern training recipes, not the same one, the plain ResNet-50 reaches
# 80.38 % (`resnet50.a1`) and SE-ResNet-50 80.26 % (`seresnet50.ra2`). The recipe is worth more than
# the block: compare only within one recipe, which is what every table here does.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 11 · Exercises
#
# Write the body, run the cell, run the check. `lab.hint("channel.se_parameters")` gives a hint,
# `lab.solution("channel.se_parameters")` the solution.
#
# **1 · Count SE** (5 minutes), by formula. ResNet-50's 2,514,944 weights must come out.


# %% exercise="channel.se_parameters" tags=["exercise"] slideshow={"slide_type": "fragment"}
def se_parameters(stages: list[tuple[int, int]], reduction: int, bias: bool) -> int:
    """Number of parameters that squeeze-and-excitation adds to a residual network, by formula.

    stages: (number of blocks, channels that leave each of them) of every stage; ResNet-50 has
    [(3, 256), (4, 512), (6, 1024), (3, 2048)]. Each block gets one SE, at the end of its branch,
    whose hidden layer has channels // reduction units, at least one.
    bias: whether the two linear maps have biases.
    Returns the number.
    """
    raise NotImplementedError


# %% slideshow={"slide_type": "fragment"}
lab.check("channel.se_parameters", se_parameters)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **2 · Squeeze-and-excitation** (5 minutes), in three lines.


# %% exercise="channel.squeeze_excite" tags=["exercise"] slideshow={"slide_type": "fragment"}
def squeeze_excite(
    u: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor
) -> torch.Tensor:
    """Squeeze-and-excitation: scale every channel by a factor computed from the whole image.

    u: (B, C, H, W). w1: (hidden, C), b1: (hidden,), w2: (C, hidden), b2: (C,).
    The factors are sigmoid(w2 · relu(w1 · z + b1) + b2), with z the mean of each channel.
    Returns (B, C, H, W).
    """
    raise NotImplementedError


# %% slideshow={"slide_type": "fragment"}
lab.check("channel.squeeze_excite", squeeze_excite)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **3 · Two kernels in one** (15 minutes). The slider of section 9, for any kernels and for every
# channel.


# %% exercise="channel.effective_kernel" tags=["exercise"] slideshow={"slide_type": "fragment"}
def effective_kernel(
    first: torch.Tensor, second: torch.Tensor, share: torch.Tensor
) -> torch.Tensor:
    """The one 5×5 kernel that does what two branches and their shares do, without norm and ReLU.

    first: (C, 3, 3), the kernels of a branch of dilation 1. second: (C, 3, 3), those of a branch of
    dilation 2, whose taps lie two pixels apart. share: (C,), the first branch's; the second has
    1 − share.
    Returns (C, 5, 5), with the center of both branches in the middle.
    """
    raise NotImplementedError


# %% slideshow={"slide_type": "fragment"}
lab.check("channel.effective_kernel", effective_kernel)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **4 · Find the bug** (15 minutes). This selection runs without an error, and its shares sum to
# one. One line is wrong: mend it here. Public code has had the same one. And then the open part:
# how would you notice it in a training run, without looking at the code?


# %% exercise="channel.buggy_selection" tags=["exercise"] slideshow={"slide_type": "fragment"}
def buggy_selection(branches: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Select among branches, as selective kernels do. One line of the given code is wrong: mend it.

    branches: (M, B, C, H, W), the outputs of M convolutions for B images.
    logits: (B, M·C), for each image all channels of the first branch, then all of the second, …
    The shares of the M branches sum to 1 for every image and channel.
    Returns (B, C, H, W), the sum of the branches by their shares.
    """
    logits = rearrange(logits, "b (m c) -> m b c", m=len(branches))
    shares = logits.softmax(dim=1)
    return einsum(shares, branches, "m b c, m b c h w -> b c h w")


# %% slideshow={"slide_type": "fragment"}
lab.check("channel.buggy_selection", buggy_selection)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 12 · Take home
#
# - SE multiplies every channel by a factor computed from the mean of all channels over the whole image:
#   squeeze, excite, scale. It decides *which* channels count in this image, and is blind to places.
# - It adds a tenth to ResNet-50's parameters and next to nothing to its MACs, but the time of two more
#   passes over memory.
# - SK shares each channel among kernels of different reach, by a softmax over the branches: with two
#   of them, one sigmoid.
#
# **Common misconceptions.** *SE learns which channels matter for the data set* (its gate is
# computed for each image; BatchNorm's factor is the static list). *SE is self-attention* (nothing
# is compared with anything: no pairs). *The bottleneck saves MACs* (it saves parameters; the MACs
# are negligible either way). *Under 1 % more MACs means no slowdown* (section 8). *SK picks one
# kernel per pixel* (one share a channel and image, the same at all places). *A dilated 3×3 is a
# 5×5* (the same extent, 9 of 25 taps). *timm's `skresnet50` is SKNet-50* (its branches read half of
# the channels each).
#
# **Where next.** Chapter 04 gives the gate eyes for places: CBAM.
#
# **References.** Hu, Shen & Sun 2018, *Squeeze-and-excitation networks*, section 3; journal version
# with Albanie & Wu 2020 · Li, Wang, Hu & Yang 2019, *Selective kernel networks*, section 3 · Wang
# et al. 2018, *Non-local neural networks*, section 3.
