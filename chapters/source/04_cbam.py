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
# # 04 · CBAM: channels, then places
#
# **At the end you can** write both of CBAM's gates from their equations, load the weights of two
# other codes into yours, and tell three maps apart that are often taken for one another: a channel
# gate, a spatial gate, and Grad-CAM.
#
# | | |
# |---|---|
# | to read | 50 minutes, exercises another 50 |
# | to run | about half a minute on two CPU cores |
# | you need | chapter 03 (squeeze-and-excitation), a convolution, a BatchNorm |
# | papers | Woo et al. 2018, *CBAM: convolutional block attention module* · Selvaraju et al. 2017, *Grad-CAM* |

# %% slideshow={"slide_type": "skip"}
from functools import partial

import matplotlib.pyplot as plt
import torch
from einops import rearrange
from torch.nn import functional as F
from torch.testing import assert_close

import attnlab
from attnlab import lab
from attnlab.cbam import CBAM, cbam_resnet50, mean_and_max
from attnlab.channel import SqueezeExcite, se_resnet50
from attnlab.lab import cost, metrics, plots
from attnlab.lab.experiments import ch04
from attnlab.lab.gradcam import gradcam
from attnlab.resnet import resnet50

device = lab.device()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 1 · The failure
#
# Squeeze-and-excitation (SE, chapter 03) takes the mean of each channel over all places, and gives
# each channel one factor. Two things follow that no training can change. Let us see them in a
# trained network: `resnet_mini`, 8 classes of photographic cut-outs over photographs, with SE in its
# four blocks. The hook below catches the map $F$ that one of them receives.

# %% slideshow={"slide_type": "fragment"}
test = lab.load("scenes", "test_scenes", n=500)
batch = test.batch(range(500))
images, masks = batch["image"].to(device), batch["saliency"].to(device)  # masks: 1 on the object


def inputs_of(model, block):
    """The map that `block`, a part of `model`, receives for all 500 images: (500, C, h, w)."""
    caught = []
    handle = block.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    with torch.no_grad():
        model(images)
    handle.remove()
    return caught[0]


se_model = lab.checkpoints.load("resnet_mini_se_scenes", device=device)
se_block = se_model.layer3[0].inside
F_se = inputs_of(se_model, se_block)
print("F:", tuple(F_se.shape), "(images, channels, rows, columns)")

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Before you run it:** we put the 64 places of every map in a random order, so that nobody could
# find the object again. What happens to the gate?

# %% slideshow={"slide_type": "fragment"}
order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).to(device)
shuffled = rearrange(
    rearrange(F_se, "b c h w -> b c (h w)")[..., order], "b c (h w) -> b c h w", h=8
)
with torch.no_grad(), attnlab.record(se_block) as of_map:
    se_out = se_block(F_se)
with torch.no_grad(), attnlab.record(se_block) as of_shuffled:
    se_block(shuffled)
difference = (of_map[""] - of_shuffled[""]).abs().max().item()
lab.claim("SE's gate does not notice that all places were shuffled", difference, below=1e-5)

one = 27
strength = torch.stack([F_se[one].abs().mean(0), shuffled[one].abs().mean(0)])
titles = ["as it is", "shuffled"]
plots.overlay(
    images[one], strength / strength.max(), titles, label="mean |F| over channels / largest",
    size=3,
)  # fmt: skip
plt.show()

# %% [markdown] slideshow={"slide_type": "subslide"}
# Nothing happens to the gate: a mean does not depend on an order.
#
# The second thing: within a channel, object and background get the *same* factor. Which share of a
# channel's activity lies on the object is then what it was before, up to rounding.


# %% slideshow={"slide_type": "fragment"}
def share_on_object(maps):
    """Of each channel's |activity|, the share that lies inside the object's mask: (B, C)."""
    inside = F.adaptive_avg_pool2d(masks[:, None], maps.shape[2:])  # (B, 1, h, w)
    return (maps.abs() * inside).sum((2, 3)) / maps.abs().sum((2, 3)).clamp(min=1e-12)


moved = (share_on_object(se_out) - share_on_object(F_se)).abs().max().item()
lab.claim("SE moves no share of any channel towards the object", moved, below=1e-5)

# %% [markdown] slideshow={"slide_type": "notes"}
# SE says *what* matters in
# the image, never *where* it is. (The network as a whole knows places, through its convolutions; it
# is the attention that does not.)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 2 · The idea in one picture
#
# Ask two questions, one after the other. **Which channels?** Answered as in SE, but from two
# summaries of each channel: its mean *and its largest value*, since a small thing hardly moves a
# mean. **Which places?** The same trick turned round: at every place, take the mean and the largest
# value *over the channels*; a 7×7 convolution of these two maps says how much that place may pass.
#
# The picture is drawn from a trained network, at the third of its four stages; in its maps yellow is
# large. What to see: every channel has a factor of its own, and the gate on the right, made of the two
# maps beside it, has one for every place.

# %% slideshow={"slide_type": "fragment"}
model = lab.checkpoints.load("resnet_mini_cbam_scenes", device=device)
block = model.layer3[0].inside
F0 = inputs_of(model, block)  # (500, 64, 8, 8)
with torch.no_grad(), attnlab.record(block) as gates:
    F2 = block(F0)
F1 = F0 * gates["channel"][:, :, None, None]

pooled = [F1[one].mean(0), F1[one].amax(0), gates["spatial"][one, 0]]
titles = ["mean of F1\nover channels", "maximum of F1\nover channels", "spatial gate\n(1, 8, 8)"]
with plots.style():
    figure, axes = plt.subplots(1, 5, figsize=(12, 2.7), width_ratios=[1, 1.5, 1, 1, 1])
axes[0].imshow(rearrange(images[one].cpu(), "c h w -> h w c"))
axes[0].set_title("image (3, 64, 64)")
axes[1].bar(range(64), gates["channel"][one].cpu(), width=1)
axes[1].set(title="channel gate (64,)", xlabel="channel", ylim=(0, 1))
for ax, drawn, title in zip(axes[2:], pooled, titles, strict=True):
    ax.imshow(drawn.cpu())
    ax.set_title(title)
for ax in (axes[0], *axes[2:]):
    ax.axis("off")
plt.show()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 3 · The mathematics, with shapes
#
# $$M_c = \sigma\big(\mathrm{MLP}(\operatorname{avg} F) + \mathrm{MLP}(\max F)\big), \qquad F_1 = M_c \cdot F$$
#
# $$M_s = \sigma\big(f^{7\times 7}([\operatorname{mean}_c F_1;\ \max\nolimits_c F_1])\big), \qquad F_2 = M_s \cdot F_1$$
#
# | symbol | shape | what it is |
# |---|---|---|
# | $F$ | $(C, H, W)$ | what comes out of a residual branch, before the addition |
# | $\operatorname{avg} F,\ \max F$ | $(C)$ each | mean and largest value of each channel over all places |
# | MLP | $C \to C/r \to C$ | two linear maps with a ReLU between, **one and the same** for both; $r = 16$ |
# | $M_c$ | $(C)$ | channel gate: one factor a channel, the same at all places |
# | $[\cdot\,;\cdot]$ | $(2, H, W)$ | two maps, stacked: mean and maximum over the channels of $F_1$ |
# | $f^{7 \times 7}$ | $2 \to 1$ | a convolution, zeros padded, so that the size stays |
# | $M_s$ | $(H, W)$ | spatial gate: one factor a place, the same for all channels |
#
# The sum is inside the sigmoid $\sigma$. The second gate looks at $F_1$, not at $F$. Both follow the
# paper's equations 1 to 3; the official code adds a BatchNorm after $f$, which section 5 is about.

# %% [markdown] slideshow={"slide_type": "subslide"}
# ### By hand, once
#
# Two channels, two places: $F = \begin{pmatrix} 1 & 3 \\ 2 & -2 \end{pmatrix}$, a row for each channel.
# One hidden unit: $W_1 = (\tfrac12, \tfrac12)$, $W_2 = (\tfrac12, -\tfrac12)^\top$, no biases; $f$ is
# 1×1 with both weights 1. With a pencil: two means, two maxima, two hidden numbers, and two gates of two numbers each.

# %% slideshow={"slide_type": "fragment"}
F_small = torch.tensor([[1.0, 3.0], [2.0, -2.0]])
hidden = [max(0.0, 0.5 * 2 + 0.5 * 0), max(0.0, 0.5 * 3 + 0.5 * 2)]  # of the means, of the maxima
logits = torch.tensor([0.5, -0.5]) * sum(hidden)
M_c = torch.sigmoid(logits)
F1_small = M_c[:, None] * F_small
M_s = torch.sigmoid(F1_small.mean(dim=0) + F1_small.amax(dim=0))
print("hidden", hidden, "→ channel gate", [round(g, 3) for g in M_c.tolist()])
print("F1", [[round(v, 3) for v in row] for row in F1_small.tolist()])
print("spatial gate", [round(g, 3) for g in M_s.tolist()])

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 4 · Build it three times
#
# **First the formula as a loop**, number by number, for one image.


# %% slideshow={"slide_type": "fragment"}
def cbam_loop(x, w1, b1, w2, b2, kernel):
    """x (C, H, W), w1 (h, C), b1 (h,), w2 (C, h), b2 (C,), kernel (2, k, k) → (C, H, W)."""
    logits = b2 * 0
    for pooled in ([plane.mean() for plane in x], [plane.max() for plane in x]):
        hidden = [
            torch.relu(sum(a * p for a, p in zip(row, pooled, strict=True)) + bias)
            for row, bias in zip(w1, b1, strict=True)
        ]
        logits = logits + w2 @ torch.stack(hidden) + b2
    f1 = torch.stack([plane * torch.sigmoid(l) for plane, l in zip(x, logits, strict=True)])
    _, height, width = x.shape
    k = kernel.shape[-1] // 2
    gate = [[0.0] * width for _ in range(height)]
    for i in range(height):
        for j in range(width):
            for di in range(max(-k, -i), min(k, height - 1 - i) + 1):
                for dj in range(max(-k, -j), min(k, width - 1 - j) + 1):
                    place = f1[:, i + di, j + dj]
                    both = torch.stack([place.mean(), place.max()])
                    gate[i][j] = gate[i][j] + kernel[:, k + di, k + dj] @ both
    return f1 * torch.sigmoid(torch.stack([torch.stack(row) for row in gate]))


# %% [markdown] slideshow={"slide_type": "subslide"}
# **Then a few lines of tensors.** `[None]` apart, each line is one half of an equation.


# %% slideshow={"slide_type": "fragment"}
def cbam_tensors(x, w1, b1, w2, b2, kernel):
    """x (B, C, H, W) → (B, C, H, W); the weights are those of `cbam_loop`."""
    logits = 0
    for pooled in (x.mean(dim=(2, 3)), x.amax(dim=(2, 3))):  # (B, C)
        logits = logits + F.linear(F.relu(F.linear(pooled, w1, b1)), w2, b2)
    f1 = x * rearrange(logits.sigmoid(), "b c -> b c 1 1")
    maps = torch.stack([f1.mean(dim=1), f1.amax(dim=1)], dim=1)  # (B, 2, H, W)
    return f1 * F.conv2d(maps, kernel[None], padding=kernel.shape[-1] // 2).sigmoid()


# %% [markdown] slideshow={"slide_type": "subslide"}
# **Then the library's.** `impl="explicit"` is the equation; `impl="fused"` runs the MLP once on both
# pooled vectors, and takes mean and maximum by one operator whose backward we wrote (section 10 says
# why that pays). `spatial_norm=None` leaves the BatchNorm out. Values *and* gradients must agree.


# %% slideshow={"slide_type": "fragment"}
def values_and_gradients(function, tensors):
    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    result = function(*tensors)
    return [result.detach(), *torch.autograd.grad(result.square().sum(), tensors)]


torch.manual_seed(0)
module = CBAM(6, reduction=2, kernel_size=3, spatial_norm=None).double()
fc1, fc2, conv = module.channel.fc1, module.channel.fc2, module.spatial.conv
weights = [fc1.weight.flatten(1), fc1.bias, fc2.weight.flatten(1), fc2.bias, conv.weight[0]]
weights = [torch.randn_like(w) for w in weights]  # no zero bias hides a mistake
x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
expected = values_and_gradients(
    lambda x, *w: torch.stack([cbam_loop(image, *w) for image in x]), [x, *weights]
)
got = values_and_gradients(cbam_tensors, [x, *weights])
for ours, loops in zip(got, expected, strict=True):
    assert_close(ours, loops, rtol=0, atol=1e-10)
print("✔ tensors: value and six gradients equal the loop's")

# %% slideshow={"slide_type": "subslide"}
names = ["channel.fc1.weight", "channel.fc1.bias", "channel.fc2.weight", "channel.fc2.bias"]
shapes = {name: value.shape for name, value in module.named_parameters()}


def library(x, *weights, impl):
    """The module with these weights: `functional_call` puts them in place of its own."""
    for gate in (module.channel, module.spatial):
        gate.impl = impl
    named = zip([*names, "spatial.conv.weight"], weights, strict=True)
    state = {name: weight.reshape(shapes[name]) for name, weight in named}
    return torch.func.functional_call(module, state, x)


for impl in ("explicit", "fused"):
    got = values_and_gradients(partial(library, impl=impl), [x, *weights])
    for ours, loops in zip(got, expected, strict=True):
        assert_close(ours, loops, rtol=0, atol=1e-10)
    print(f"✔ {impl}: value and six gradients equal the loop's")

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Is it the real thing?** timm has a CBAM too, with the BatchNorm and without biases in the MLP. Our
# module takes its state dict as it is, and the official code's as well, which stores the convolution
# with its two inputs the other way round, [max, mean] (exercise 4; `tests/test_cbam.py`).

# %% slideshow={"slide_type": "fragment"}
from timm.layers.cbam import CbamModule

torch.manual_seed(0)
theirs = CbamModule(64).double().eval()
for value in theirs.state_dict().values():
    if value.is_floating_point():
        value.copy_(torch.rand_like(value) + 0.1)
ours = CBAM(64, mlp_bias=False).double().eval()
ours.load_state_dict(theirs.state_dict(), strict=True)
x = torch.randn(2, 64, 14, 9, dtype=torch.float64)
difference = (ours(x) - theirs(x)).abs().max().item()
lab.claim("CBAM with timm's weights gives timm's answer", difference, below=1e-9)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 5 · A gate that starts half open
#
# The official code puts a BatchNorm of one channel behind $f$, and sets its weight to **zero** (its
# bias is zero as always). The
# paper does not mention it. **Before you run it:** how much of its input does a fresh CBAM let
# through, and which of its weights get a gradient in the first step?

# %% slideshow={"slide_type": "fragment"}
torch.manual_seed(0)
fresh = CBAM(64)
x = torch.randn(4, 64, 16, 16)
out = fresh(x)
out.square().mean().backward()
passed = (out.norm() / x.norm()).item()
lab.claim("the spatial gate is exactly ½ everywhere", (fresh.spatial.gate(x) == 0.5).all().item())
lab.claim("a fresh CBAM lets about a quarter through", passed, above=0.2, below=0.3)
lab.claim(
    "its 7×7 kernel gets no gradient at all", fresh.spatial.conv.weight.grad.norm().item(), equal=0
)
lab.claim("the BatchNorm's weight does", fresh.spatial.bn.weight.grad.norm().item(), above=0)

# %% [markdown] slideshow={"slide_type": "notes"}
# Answer: ½ · ½, for the channel gate starts near ½ too. So CBAM is no identity at the start (as a
# non-local block is): it begins as a weaker residual branch. The kernel moves only after the
# BatchNorm's weight has left zero. The MLP of the channel gate learns from the first step.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 6 · Three maps that are not the same
#
# | | asks | shape here |
# |---|---|---|
# | channel gate $M_c$ | which channels, in this image | $(C)$ |
# | spatial gate $M_s$ | which places, in this layer | $(h, w)$ |
# | Grad-CAM | where is the evidence for class $y$, in the whole network | $(h, w)$ |
#
# Grad-CAM (Selvaraju et al. 2017, equations 1 and 2) is no part of a network. It needs no attention
# either. For the score $s_y$ of class $y$ before the softmax, and the map $A$ of a layer, $(K, h, w)$ with $K$ channels,
#
# $$w_k = \frac{1}{hw} \sum_{ij} \frac{\partial s_y}{\partial A_{kij}}, \qquad
# L = \operatorname{ReLU}\Big(\sum_k w_k A_k\Big)$$
#
# **Predict:** of these three, which one changes when we ask for another class?


# %% slideshow={"slide_type": "fragment"}
def square_photo(name, size=64):
    """The middle of a bundled photograph, (1, 3, size, size)."""
    photo = lab.data.photo(name)
    side = min(photo.shape[1:])
    top, left = ((length - side) // 2 for length in photo.shape[1:])
    middle = photo[None, :, top : top + side, left : left + side]
    return F.interpolate(middle, size=size, mode="bicubic", antialias=True).clamp(0, 1)


photos = torch.cat([square_photo(name) for name in ("dogs", "flower", "fig")]).to(device)
with torch.no_grad(), attnlab.record(model) as gates:
    scores = model(photos)
channel, spatial = gates["layer3.0.inside.channel"], gates["layer3.0.inside.spatial"][:, 0]
classes = test.classes
for name, best in zip(("dogs", "flower", "fig"), scores.topk(2).indices.tolist(), strict=True):
    print(f"{name}: 1st {classes[best[0]]}, 2nd {classes[best[1]]}")

# %% slideshow={"slide_type": "fragment"}
first, second = scores.topk(2).indices.T
cams = torch.stack([gradcam(model, "layer3", photos, target) for target in (first, second)], dim=1)
with plots.style():
    figure, axes = plt.subplots(3, 5, figsize=(10.5, 6), width_ratios=[1, 1.4, 1, 1, 1])
for row, photo in enumerate(photos.cpu()):
    axes[row, 0].imshow(rearrange(photo, "c h w -> h w c"))
    axes[row, 1].bar(range(channel.shape[1]), channel[row].cpu(), width=1)
    axes[row, 1].set_ylim(0, 1)
    for ax, drawn in zip(axes[row, 2:], [spatial[row], *cams[row]], strict=True):
        ax.imshow(rearrange(photo, "c h w -> h w c"), extent=(0, 1, 0, 1))
        ax.imshow(drawn.cpu(), alpha=0.65, cmap="inferno", vmin=0, vmax=1, extent=(0, 1, 0, 1))
    for ax in (axes[row, 0], *axes[row, 2:]):
        ax.axis("off")
titles = [
    "photograph",
    "channel gate",
    "spatial gate",
    "Grad-CAM, 1st class",
    "Grad-CAM, 2nd class",
]
for ax, title in zip(axes[0], titles, strict=True):
    ax.set_title(title)
plt.show()

# %% [markdown] slideshow={"slide_type": "fragment"}
# Only Grad-CAM changes: no class goes into a gate. (The network's first answer is wrong for all three
# photographs, and for two the second would be right: it learned from small cut-outs, and here one
# thing fills the picture. Its maps look as definite as if it were right: each is divided by its own maximum.
# A map shows what a network uses, not that it knows.)

# %% slideshow={"slide_type": "fragment"}
label = batch["label"].to(device)
of_label = gradcam(model, "layer3", images, label)
of_next = gradcam(model, "layer3", images, (label + 1) % 8)
changed = (of_label - of_next).abs().amax((1, 2)).mean().item()
lab.claim("asked for another class, Grad-CAM changes by over half its range", changed, above=0.5)

# %% [markdown] slideshow={"slide_type": "subslide"}
# Choose yourself. The cell after this one puts menus on the function; on paper, and where there is no
# kernel, the picture stays as it is here.


# %% slideshow={"slide_type": "fragment"}
def draw_maps(picture=0, stage="layer3", network="CBAM"):
    """Gate (if the network has one) and Grad-CAM of one scene at one stage."""
    names = {"plain": "resnet_mini_scenes", "SE": "resnet_mini_se_scenes"}
    chosen = model if network == "CBAM" else lab.checkpoints.load(names[network], device=device)
    image, target = images[picture][None], label[picture][None]
    maps = {f"Grad-CAM, {classes[target]}": gradcam(chosen, stage, image, target)[0]}
    if network == "CBAM":
        gate = ch04.spatial_gates(chosen, image)[stage]
        maps["spatial gate"] = F.interpolate(gate[None], size=64, mode="nearest")[0, 0]
    title = f"{network}, {stage}"
    plots.overlay(image[0], torch.stack([*maps.values()]), [*maps], title=title, limits=(0, 1))
    plt.show()


draw_maps()

# %% tags=["nbval-ignore-output"] slideshow={"slide_type": "fragment"}
lab.widgets.sliders(
    draw_maps, picture=(0, 20, 0), stage=list(ch04.STAGES[::-1]), network=["CBAM", "SE", "plain"]
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 7 · The gate through the depth
#
# The same scenes through the four stages. What to see: at first the gate follows edges and bright
# spots of the whole picture; in the third stage it is bright on the object and dark in a ring around
# it, and bright again further off. (The frame around the first maps is the work of the zeros that the convolution is padded with.)

# %% slideshow={"slide_type": "fragment"}
stages = ch04.spatial_gates(model, images)  # {"layer1": (500, 32, 32), …, "layer4": (500, 4, 4)}
shown = [2, 22, 27]
with plots.style():
    figure, axes = plt.subplots(3, 5, figsize=(9, 5.6))
for row, index in enumerate(shown):
    axes[row, 0].imshow(rearrange(images[index].cpu(), "c h w -> h w c"))
    for ax, gate in zip(axes[row, 1:], stages.values(), strict=True):
        drawn = ax.imshow(gate[index].cpu(), vmin=0, vmax=1)
titles = ["image", *(f"{stage}, {len(gate[0])}²" for stage, gate in stages.items())]
for ax, title in zip(axes[0], titles, strict=True):
    ax.set_title(title)
for ax in axes.flat:
    ax.axis("off")
figure.colorbar(drawn, ax=axes, label="spatial gate", shrink=0.7)
plt.show()

# %% [markdown] slideshow={"slide_type": "subslide"}
# **"The spatial gate finds the object."** Measure it, on 500 scenes whose masks are exact. Three
# numbers. *AUROC*: how often is a pixel of the object given a larger factor than one of the
# background (chance 0.5)? *Energy*: which share of the gate's sum lies on the object (chance: the
# object's share of the area)? And what the gate *does*: which share of the map's activity lies on
# the object before it ($F_1$) and after it ($F_2$)? **Guess** the energy of the third stage's gate,
# if the object covers 7 % of the image.


# %% slideshow={"slide_type": "fragment"}
def auroc(maps):
    """Mean over the images of the chance that the object is ranked above the background."""
    large = F.interpolate(maps[:, None], size=64, mode="nearest")[:, 0]
    pairs = zip(large, masks >= 0.5, strict=True)
    return sum(metrics.auroc(one, mask) for one, mask in pairs) / len(maps)


area = masks.mean().item()
ranks = {stage: auroc(gate) for stage, gate in stages.items()}
shares = {stage: metrics.energy_inside(gate, masks).mean().item() for stage, gate in stages.items()}
for stage in stages:
    print(f"{stage}: AUROC {ranks[stage]:.2f}, energy {shares[stage]:.3f} (area {area:.3f})")
before, after = (
    metrics.energy_inside(maps.abs().mean(1), masks).mean().item() for maps in (F1, F2)
)
print(f"layer3, activity on the object: {before:.3f} before the gate, {after:.3f} after it")

# %% slideshow={"slide_type": "fragment"}
lab.claim("in the last stage the gate ranks the object above the rest", ranks["layer4"], above=0.6)
lab.claim("in the first stage hardly", ranks["layer1"], below=0.6)
lab.claim(
    "yet no gate gives it 1.5 times the share of its area", max(shares.values()) / area, below=1.5
)
lab.claim(
    "the third gate moves activity to the object, by a quarter", after / before, equal=1.25, tol=0.1
)

# %% [markdown] slideshow={"slide_type": "fragment"}
# The third gate ranks the object above the background more often than not, and yet only 8 % of its sum
# lies there, hardly more than the object's area: it is high on the object, low in a ring around it, and
# high again over the large rest. It leans towards the object and is far from a mask. What it *does* is
# moderate: the object's share of the activity grows by a quarter.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 8 · Does CBAM make the network look at the right thing?
#
# The paper shows Grad-CAM pictures in which CBAM's networks cover the object better. Here is the same
# comparison, measured: 500 steps on the scenes, three seeds, 1,000 test scenes of known cut-outs
# (`attnlab results 04_cbam.scenes`). *Pointing*: does the highest place lie on the object? *Energy*:
# which share of the map does? *IoU* at half of the map's range. *noise* and *occlusion*: the accuracy
# with noise added, and with a grey square pasted in. Two baselines never saw the image.

# %% slideshow={"slide_type": "fragment"}
lab.results.show("04_cbam.scenes")

# %% slideshow={"slide_type": "fragment"}
table = lab.results.load("04_cbam.scenes")
plots.bars_with_spread(table, "pointing", title="does the highest place lie on the object?")
plt.show()

# %% slideshow={"slide_type": "fragment"}
rows = table["rows"]


def lowest_lead(row, other, metric):
    """By how much `row` is ahead of `other` in the seed where it leads least."""
    pairs = zip(rows[row][metric]["values"], rows[other][metric]["values"], strict=True)
    return min(a - b for a, b in pairs)


plain_4, cbam_4 = "Grad-CAM of plain, layer4", "Grad-CAM of CBAM, layer4"
plain_3, se_3 = "Grad-CAM of plain, layer3", "Grad-CAM of SE, layer3"
accuracies = [rows[name]["accuracy"]["mean"] for name in ("plain", "SE", "CBAM")]
lab.claim("accuracy: the three are within 0.03", max(accuracies) - min(accuracies), below=0.03)
lead = lowest_lead(plain_4, cbam_4, "pointing")
lab.claim("last stage: plain points better than CBAM in every seed", lead, above=0)
lead = lowest_lead(se_3, "Grad-CAM of CBAM, layer3", "pointing")
lab.claim("third stage: SE points better than CBAM in every seed", lead, above=0)
lab.claim("and better than plain", lowest_lead(se_3, plain_3, "pointing"), above=0)
lead = lowest_lead("gate, layer3", "center prior", "pointing")
lab.claim("the third gate points better than a blob in the middle", lead, above=0)
lab.claim("under noise SE loses less than plain", lowest_lead("SE", "plain", "noise"), above=0)
values = rows["gate, layer1"]["pointing"]["values"]
lab.claim("where the first gate points, the seed decides", max(values) - min(values), above=0.3)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **The paper's claim is not confirmed here.** The accuracies are alike. CBAM's Grad-CAM points at the
# object no better than the plain network's in the third stage, and in the last, whose 4×4 places are
# coarse, less often in each of three seeds. SE's, which knows no places, is ahead of both in the third stage. Where
# the first two gates point is a matter of luck: on the object in 2 % of the images with one seed, in
# 34 or 40 % with another. (A guess at the reason: a low factor on the object serves as well as a high
# one, as long as the next convolution knows.) Under noise SE keeps more of its accuracy than
# the plain network in every seed; CBAM's lead is nothing in one of them. Under a grey square the three
# are alike.
#
# Two limits. These are small networks after 500 steps, and the paper's had 100 epochs of ImageNet.
# And Grad-CAM at a map of 4×4 places says little about objects of 20 to 35 pixels.

# %% [markdown] slideshow={"slide_type": "subslide"}
# **One more baseline, which costs nothing.** How far is each pixel's colour from the image's mean
# colour? No network at all; the three checkpoints (2,500 steps, one seed) beside it.

# %% slideshow={"slide_type": "fragment"}
found = {"colour contrast": metrics.color_contrast(images)}
for name in ("resnet_mini_scenes", "resnet_mini_se_scenes", "resnet_mini_cbam_scenes"):
    network = lab.checkpoints.load(name, device=device)
    found[f"Grad-CAM, {name.removeprefix('resnet_mini_')}"] = gradcam(
        network, "layer3", images, label
    )
    accuracy = lab.checkpoints.info(name)["metrics"]["seen objects"]
    print(f"{name}: right on {accuracy:.3f} of new scenes")
scored = {row: ch04.localization(maps, masks) for row, maps in found.items()}
for row, numbers in scored.items():
    print(f"{row:32s}", {metric: round(value, 2) for metric, value in numbers.items()})

# %% slideshow={"slide_type": "fragment"}
networks = [numbers["pointing"] for row, numbers in scored.items() if row != "colour contrast"]
lead = scored["colour contrast"]["pointing"] - max(networks)
lab.claim("colour contrast points better than Grad-CAM of all three networks", lead, above=0)

# %% [markdown] slideshow={"slide_type": "fragment"}
# A map that never heard of classes points best (SE comes near, and has more energy on the object). It
# is no explanation of anything; it shows how easy *pointing* is where things differ from their
# background in colour. Longer training does not bring CBAM forward either: SE stays ahead.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 9 · Train it
#
# A short run, live, on 32-pixel scenes. What to watch is section 5's BatchNorm: its weight starts at
# zero in each of the four blocks, and the spatial gate exists only as far as it moves.

# %% tags=["nbval-ignore-output"] slideshow={"slide_type": "fragment"}
lab.seed_everything(0)
learner = ch04.cbam_resnet_mini()
opened = {stage: [] for stage in ch04.STAGES}


def note_gates(model):
    for stage, seen in opened.items():
        seen.append(getattr(model, stage)[0].inside.spatial.bn.weight.abs().item())
    return {}


train_set = lab.load("scenes", "train", size=32)
history = lab.fit(
    learner, train_set, steps=150, batch_size=64, lr=3e-3, device=device,
    augment=lab.train.flip_and_shift, evaluate=note_gates, evaluate_every=10,
)  # fmt: skip
plots.curve(
    range(10, 151, 10), opened, xlabel="step", ylabel="|weight| of the gate's BatchNorm",
    title="the spatial gates begin to move",
)  # fmt: skip
plt.show()

# %% slideshow={"slide_type": "fragment"}
smallest = min(values[-1] for values in opened.values())
lab.claim("after 150 steps every spatial gate has left ½", smallest, above=0.01)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Which part does the work?** The paper takes CBAM apart: which pooling, which kernel, which order.
# Here the same with 300 steps on 32-pixel scenes and three seeds (`attnlab results
# 04_cbam.ablations`). **Guess the order of the rows before you look.**

# %% slideshow={"slide_type": "fragment"}
lab.results.show("04_cbam.ablations")

# %% slideshow={"slide_type": "fragment"}
ablations = lab.results.load("04_cbam.ablations")["rows"]
means = [row["accuracy"]["mean"] for row in ablations.values()]
widest = max(row["accuracy"]["std"] for row in ablations.values())
lab.claim("the nine rows lie within 0.03 of each other", max(means) - min(means), below=0.03)
lab.claim("the seeds of one row alone differ by as much", 2 * widest, above=0.03)

# %% [markdown] slideshow={"slide_type": "fragment"}
# There is no order: a **null result**. At this budget and size no part of CBAM, nor all of them
# together, makes a difference that three seeds can show. (A weight of 0.1 behind a norm of unit
# variance is a gate between about 0.45 and 0.55: such short runs may be too few to tell variants of
# the spatial gate apart.) It does not say that CBAM is useless: with
# 100 epochs of ImageNet others measured a gain (section 11). It says that a table of single runs, whose
# rows lie closer together than two seeds of one row, cannot tell which pooling or which order is best.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 10 · What it costs
#
# For a block of $C$ channels, hidden width $h = C // r$ and a $k \times k$ kernel:
# $2Ch + h + C$ parameters in the MLP and $2k^2 + 2$ in the spatial gate; $4Ch + 2k^2 HW$
# multiply–accumulates (the MLP runs twice). Counted on the `meta` device, where nothing is computed:

# %% slideshow={"slide_type": "fragment"}
with torch.device("meta"):
    image = torch.rand(1, 3, 224, 224)
    for name, factory in {"plain": resnet50, "SE": se_resnet50, "CBAM": cbam_resnet50}.items():
        net = factory().eval()
        count, macs = cost.parameters(net), cost.macs(net, image)
        print(f"ResNet-50 {name:6s}{count:12,} parameters  {macs / 1e9:.3f} G MACs")
lab.claim("CBAM-ResNet-50 has 28,089,624 parameters", count, equal=28_089_624)
extra = macs - cost.macs(resnet50().to("meta").eval(), image)
blocks = [(3, 256, 56), (4, 512, 28), (6, 1024, 14), (3, 2048, 7)]  # how many, C, H = W
formula = sum(n * (4 * c * (c // 16) + 2 * 49 * side**2) for n, c, side in blocks)
lab.claim("the formula counts the extra MACs to the last one", extra, equal=formula)
lab.claim("they are under 0.2 % of the network's", extra / macs, below=0.002)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Nearly nothing, then?** A multiplication by a gate does one multiplication for each number that it
# reads and writes: it waits for memory. Count the passes over a map of $CHW$ numbers in a forward:
# SE reads $F$ for the mean, reads it again to scale it and writes the result: 3. CBAM reads $F$ for the
# mean, for the maximum and to scale it, and writes $F_1$: 4; then the same for places: 8. None of these
# shows in the MACs.
#
# **Before you run it:** how long do SE and CBAM take beside the block's own 3×3 convolution?

# %% tags=["nbval-ignore-output"] slideshow={"slide_type": "fragment"}
x = torch.randn(4, 256, 56, 56, device=device)
modules = {
    "conv 3×3, 64 → 64": torch.nn.Conv2d(64, 64, 3, padding=1),
    "SE": SqueezeExcite(256),
    "CBAM": CBAM(256),
}
for name, layer in modules.items():
    given = x[:, :64] if name.startswith("conv") else x
    with torch.no_grad():
        seconds = cost.latency(partial(layer.to(device), given))
    print(f"{name:20s}{1e3 * seconds:6.1f} ms forward")

# %% [markdown] slideshow={"slide_type": "subslide"}
# Answer: on the CPU where this was written CBAM takes about as long as the convolution, which does
# several hundred times its multiply–accumulates, and SE a fraction of it. (CBAM's time is more than 8/3
# of SE's: a maximum is slower than a mean.)

# %% slideshow={"slide_type": "fragment"}
counts = {name: cost.macs(layer, x[:1, :64] if "conv" in name else x[:1])
          for name, layer in modules.items()}  # fmt: skip
print({name: f"{count / 1e6:.2f} M MACs" for name, count in counts.items()})
ratio = counts["conv 3×3, 64 → 64"] / counts["CBAM"]
lab.claim("the convolution does over 300 times CBAM's arithmetic", ratio, above=300)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Backward is where it hurt.** PyTorch's backward of `amax` looks for ties: it compares the map with
# its maximum, counts the equal entries in integers, multiplies and divides, each a pass over the whole
# map in a type that is slow to handle. `mean_and_max` does the same with three passes of floats; its
# value and gradient are equal, ties included.

# %% tags=["nbval-ignore-output"] slideshow={"slide_type": "fragment"}
given = x.clone().requires_grad_()


def step(layer):
    layer(given).sum().backward()


for impl in ("explicit", "fused"):
    layer = CBAM(256, impl=impl).to(device)
    seconds = cost.latency(partial(step, layer), warmup=1, repeats=5)
    print(f"CBAM {impl:10s}{1e3 * seconds:6.0f} ms forward and backward")

# %% slideshow={"slide_type": "fragment"}
ties = torch.ones(1, 4, 1, 1)
shares = {}
for name, maximum in {
    "amax": lambda t: t.amax(dim=1),
    "mean_and_max": lambda t: mean_and_max(t, (1,), impl="fused")[1],
    "max(dim)[0]": lambda t: t.max(dim=1)[0],
}.items():
    given = ties.clone().requires_grad_()
    maximum(given).sum().backward()
    shares[name] = given.grad.flatten().tolist()
    print(f"{name:14s} gives four equal entries the gradients {shares[name]}")
lab.claim(
    "ours shares a gradient among ties as amax does", shares["mean_and_max"] == shares["amax"]
)

# %% [markdown] slideshow={"slide_type": "notes"}
# The official code uses `torch.max(x, 1)[0]`, which gives it all to one of them: equal forward, another
# backward wherever there are ties. After a ReLU there are many (zeros); after a BatchNorm, where CBAM
# stands, none.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 11 · Paper and here
#
# | claim | published | here | why they may differ |
# |---|---|---|---|
# | CBAM-ResNet-18 / 34 / 50 / 101 have 11.78 / 21.96 / 28.09 / 49.33 M parameters | official code | 11,779,392 / 21,960,468 / 28,089,624 / 49,330,172 | exact counts, in `tests/test_cbam.py` |
# | CBAM costs hardly any arithmetic | Woo et al., abstract | under 0.2 % of the MACs, section 10 | none; memory passes are not in that count |
# | CBAM-ResNet-50 is right on 77.6 % of ImageNet | official code's README (77.622 %, 100 epochs) | not trained here | needs GPU-days; the architecture is the same |
# | CBAM before SE? In ResNeXt-50: plain 22.23, CBAM 21.40, SE 21.12 % top-1 error | README of the SKNet code, another group's run | no difference beyond the seeds, sections 8 and 9 | 500 steps, 0.3 M parameters |
# | mean and maximum, 7×7, channels first are best | Woo et al., section 4.1 (no spread is given) | no order of the variants can be seen, section 9 | budget, and the paper's differences are small |
# | the attention covers the object better | Woo et al., section 4, by Grad-CAM pictures | not confirmed: in the last stage plain points better than CBAM in each of three seeds, section 8 | small networks, 500 steps; and a thousand scenes measured in place of pictures shown |

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 12 · Exercises
#
# Write the body, run the cell, run the check. `lab.hint("cbam.channel_gate")` gives a hint,
# `lab.solution("cbam.channel_gate")` the solution.
#
# **1 · The channel gate** (10 minutes).


# %% exercise="cbam.channel_gate" tags=["exercise"] slideshow={"slide_type": "fragment"}
def channel_gate(
    x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor
) -> torch.Tensor:
    """CBAM's factor for every channel: σ(MLP(mean of x over places) + MLP(maximum over places)).

    x: (B, C, H, W). MLP: z → W2 relu(W1 z + b1) + b2, the same for both, with
    w1 (hidden, C), b1 (hidden,), w2 (C, hidden), b2 (C,).
    Returns (B, C), between 0 and 1.
    """
    raise NotImplementedError


# %% slideshow={"slide_type": "fragment"}
lab.check("cbam.channel_gate", channel_gate)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **2 · The spatial gate** (10 minutes), as the paper has it, without a BatchNorm.


# %% exercise="cbam.spatial_gate" tags=["exercise"] slideshow={"slide_type": "fragment"}
def spatial_gate(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """CBAM's factor for every place, by the paper's equation: σ(conv([mean; max over channels])).

    x: (B, C, H, W). weight: (1, 2, k, k), k odd; its first input is the mean over the channels,
    its second the maximum. Zeros are padded so that the size stays.
    Returns (B, 1, H, W), between 0 and 1.
    """
    raise NotImplementedError


# %% slideshow={"slide_type": "fragment"}
lab.check("cbam.spatial_gate", spatial_gate)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **3 · Count it** (5 minutes). ResNet-50's 2,532,592 must come out; with the 25,557,032 of the plain
# network that makes 28,089,624.


# %% exercise="cbam.extra_parameters" tags=["exercise"] slideshow={"slide_type": "fragment"}
def extra_parameters(
    stages: list[tuple[int, int]], reduction: int = 16, kernel_size: int = 7
) -> int:
    """Number of parameters that CBAM adds to a residual network, by formula: nothing is built.

    stages: (blocks, channels) of each stage; a block's CBAM works on the block's output channels.
    The MLP has C // reduction hidden units and biases in both layers. The spatial convolution, from
    2 maps to 1, has no bias, and a BatchNorm behind it.
    """
    raise NotImplementedError


# %% slideshow={"slide_type": "fragment"}
lab.check("cbam.extra_parameters", extra_parameters)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **4 · Port the official weights** (15 minutes). A checkpoint of the official code is to run in a
# network that has 1×1 convolutions for the MLP, [mean, max] in this order, and no BatchNorm. Three
# things have to change; shapes alone betray one of them.


# %% exercise="cbam.port_official" tags=["exercise"] slideshow={"slide_type": "fragment"}
def port_official(
    mlp_1: torch.Tensor,
    conv: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From the official CBAM's weights to a gate without BatchNorm that computes the same in eval.

    mlp_1: (hidden, C), a linear layer; here it becomes a 1×1 convolution.
    conv: (1, 2, k, k), whose first input is the MAXIMUM over the channels, its second the mean.
    gamma, beta, mean, var: (1,) each, the BatchNorm behind it: y → gamma (y − mean) / √(var + eps)
    + beta.
    Returns the 1×1 convolution's weight (hidden, C, 1, 1); the weight (1, 2, k, k), mean first, and
    the bias (1,) of one convolution that does what the two layers did.
    """
    raise NotImplementedError


# %% slideshow={"slide_type": "fragment"}
lab.check("cbam.port_official", port_official)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **5 · Find the bug** (10 minutes), and then the open part. This CBAM has the right shapes, its gates
# lie between 0 and 1, and it trains. One line is wrong: mend it here.
#
# Then: no gate of section 7 came near a mask. Would one that is *trained* to be a mask help? Add
# `masks` of the training scenes to the loss of one stage's gate, and compare accuracy and pointing
# over three seeds with a run without it. Decide before you start how large a difference would
# convince you.


# %% exercise="cbam.buggy_cbam" tags=["exercise"] slideshow={"slide_type": "fragment"}
def buggy_cbam(
    x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """CBAM without biases and BatchNorm. One line of the given code is wrong: mend it.

    x: (B, C, H, W). w1: (hidden, C), w2: (C, hidden). weight: (1, 2, k, k), mean first.
    Returns (B, C, H, W): the channel gate scales x, and the spatial gate scales what comes out.
    """
    pooled = torch.stack([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))])
    logits = (torch.relu(pooled @ w1.T) @ w2.T).sum(dim=0)
    scaled = x * torch.sigmoid(logits)[:, :, None, None]
    maps = torch.stack([x.mean(dim=1), x.amax(dim=1)], dim=1)
    gate = torch.conv2d(maps, weight, padding=weight.shape[-1] // 2).sigmoid()
    return scaled * gate


# %% slideshow={"slide_type": "fragment"}
lab.check("cbam.buggy_cbam", buggy_cbam)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 13 · Take home
#
# - CBAM is SE twice: a factor for every channel from all places, then a factor for every place from
#   all channels, each from a mean and a maximum.
# - A gate belongs to a layer, Grad-CAM to a class. The spatial gate leans towards the object and is
#   not a mask; measure maps against baselines before believing them.
# - It costs next to no parameters and arithmetic, and several passes over memory.
#
# **Common misconceptions.** *CBAM's spatial gate finds objects* (it has no class and sees 7×7 places
# of two pooled maps). *It starts as the identity* (as a quarter of it). *Mean and maximum are added
# before the MLP* (after it: an MLP is not linear). *0.2 % more MACs are 0.2 % more time* (no). *CBAM-ResNet-50
# has 25.9 M parameters* (28.09 M).
#
# **Where next.** CBAM's places hear each other through 7×7 neighbours of two numbers. Chapter 05 lets
# each place choose, by content, which others to hear, for every pixel of a segmentation.
#
# **References.** Woo et al. 2018, *CBAM: convolutional block attention module*, sections 3 and 4 ·
# Selvaraju et al. 2017, *Grad-CAM: visual explanations from deep networks via gradient-based
# localization*, section 3 · Hu et al. 2018, *Squeeze-and-excitation networks*, section 3 · Zhang et
# al. 2016, *Top-down neural attention by excitation backprop* (the pointing game).
