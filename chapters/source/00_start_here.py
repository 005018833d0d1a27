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
# # 00 · Start here
#
# **At the end you can** run a chapter, predict before you look, check your own code, and read an
# attention map without believing more than it shows.
#
# | | |
# |---|---|
# | to read | 15 minutes |
# | to run | about ten seconds on two CPU cores |
# | you need | Python, a little PyTorch, what a convolution is |
#
# Run a cell with **Shift + Enter**. Go on to the next one: your first attention map is two cells
# away.

# %% slideshow={"slide_type": "skip"}
import matplotlib.pyplot as plt
import torch
from torch.nn import functional as F

import attnlab
from attnlab import lab
from attnlab.lab import plots

device = lab.device()  # CUDA when there is one, else the CPU; every chapter starts like this

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 1 · A first attention map
#
# Below is a small vision transformer that was trained on drawings of houses, cars, faces and five
# other things. It cuts the image into 8 × 8 patches, and in each of its six layers every patch asks
# all others for information. Move the pointer over the picture: the colours show where the patch
# under it **looks**.
#
# **Before you do, guess:** will a patch of the background look at the background or at the object?

# %% tags=["explorer", "nbval-ignore-output"] slideshow={"slide_type": "fragment"}
model = lab.checkpoints.load("vit_mini_parts", device=device)
test = lab.data.load("parts", "test", n=200)
image = test[4]["image"]  # (3, 64, 64), floats in [0, 1]
lab.explore(model, image, title="where does this patch look?")

# %% [markdown] slideshow={"slide_type": "subslide"}
# Things to try: click a patch to hold it, then use the arrow keys. Change the **layer** and the
# **head**. Turn the question round: **is looked at by**. The square called CLS is the *class token*,
# the one that gives the model's answer:

# %% slideshow={"slide_type": "fragment"}
with torch.no_grad():
    answer = model(image[None].to(device)).argmax().item()
print("the model says:", test.classes[answer])
print("the truth is:  ", test.classes[test[4]["label"]])

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 2 · How a page works
#
# **A claim** is a sentence that a cell has just measured. It prints a tick, or it fails and tells
# the number. The important results are claims, and the automatic tests of this course run them.

# %% slideshow={"slide_type": "fragment"}
accuracy = lab.train.accuracy(model, test)
print(f"right on {accuracy:.0%} of {len(test)} images")
lab.claim("the model is right far more often than chance (1 in 8)", accuracy, above=0.5)

# %% [markdown] slideshow={"slide_type": "subslide"}
# A claim that is not true stops the page. This cell is meant to fail:

# %% tags=["raises-exception", "active-ipynb"] slideshow={"slide_type": "fragment"}
# lab.claim("the model has fewer than a thousand parameters", lab.cost.parameters(model), below=1000)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **An exercise** is a function without a body and a check. The check says *not attempted*, or
# which case went wrong first and a hint, or *correct*. Attention weights must sum to one. Write the
# line that makes them do so: replace `raise NotImplementedError`.


# %% exercise="start.normalize" tags=["exercise"] slideshow={"slide_type": "fragment"}
def normalize(scores: torch.Tensor) -> torch.Tensor:
    """Divide each row by its sum, so that every query's weights sum to 1.

    scores: (queries, keys), all positive.
    Returns (queries, keys); `scores` itself stays as it was.
    """
    raise NotImplementedError


# %% slideshow={"slide_type": "fragment"}
lab.check("start.normalize", normalize)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Stuck? `lab.hint("start.normalize")` gives a hint, and `lab.hint("start.normalize", 2)` a
# stronger one. `lab.solution("start.normalize")` shows a solution. The rest of a chapter never
# depends on your answer.

# %% slideshow={"slide_type": "fragment"}
lab.hint("start.normalize")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 3 · Look inside a model
#
# `attnlab.record` notes the attention weights of every layer while a model runs, and nothing at
# any other time. The explorer above is drawn from these tensors.

# %% slideshow={"slide_type": "fragment"}
with attnlab.record(model) as maps, torch.no_grad():
    model(image[None].to(device))

weights = maps["blocks.5.attn"]  # the last layer
print(len(maps), "layers;", "each", tuple(weights.shape), "= (batch, heads, queries, keys)")
lab.claim("each query's weights sum to one", weights.sum(-1).sub(1).abs().max().item(), below=1e-4)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Your guess.** Of what the background's patches give to patches in the last layer, how much goes to
# the object? `saliency` is the set's own mask of where the object is.

# %% slideshow={"slide_type": "fragment"}
covered = F.avg_pool2d(test[4]["saliency"][None, None].float(), 8).flatten()  # share of each patch
patches = weights[0, :, 1:, 1:].cpu()  # without the class token: (heads, 64 queries, 64 keys)
background = patches[:, covered == 0]
to_object = (background @ covered).sum(dim=-1) / background.sum(dim=(1, 2))
print("head by head", [f"{share:.0%}" for share in to_object.tolist()])
print(f"the object covers {covered.mean():.0%} of the image")
lab.claim("the background looks at the object", to_object.mean().item(), above=0.5)

# %% [markdown] slideshow={"slide_type": "subslide"}
# There are 64 patches and one class token, so 65 tokens; row 0 belongs to the class token. Its
# weights on the 64 patches are a picture:

# %% slideshow={"slide_type": "fragment"}
look = weights[0, :, 0, 1:].reshape(3, 8, 8).cpu()  # (heads, rows, columns)
plots.overlay(image, look, ["head 0", "head 1", "head 2"], title="where the class token looks")
plt.show()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 4 · The data
#
# Everything runs offline from the folder `data/`. Three sets have exact answers for *where* things
# are, because we made them: **parts** (drawn, with a tree of objects and their parts), **scenes**
# (photographed cut-outs on photographs) and **clips** (scenes in motion, with the exact flow). A
# few whole **photographs** are there to look at. `data/CREDITS.md` names every author. (The cut-outs
# are under the GPL-2.0-or-later, and so are the next two figures, which show them.)

# %% slideshow={"slide_type": "fragment"}
scenes = lab.data.load("scenes", "test_scenes", n=4)
clips = lab.data.load("clips", "test", n=1)
frames = clips[0]["image"]  # (3, frames, height, width)
pictures = [test[i]["image"] for i in range(4)] + [scenes[i]["image"] for i in range(4)]
titles = [f"parts: {test.classes[test[i]['label']]}" for i in range(4)]
titles += [f"scenes: {scenes.classes[scenes[i]['label']]}" for i in range(4)]
plots.show_images(pictures, titles, columns=4)
plt.show()

# %% slideshow={"slide_type": "subslide"}
plots.show_images(
    [frames[:, 0], frames[:, 4], frames[:, 7], lab.data.photo("chelsea")],
    ["clips: frame 0", "frame 4", "frame 7", "a photograph"],
)
plt.show()

# %% [markdown] slideshow={"slide_type": "subslide"}
# One sample is a dictionary of tensors:

# %% slideshow={"slide_type": "fragment"}
for name, value in scenes[0].items():
    print(f"{name:10}", tuple(value.shape))

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 5 · The map of the course
#
# Each chapter takes the failure of the one before it and answers with a new kind of attention.
#
# | chapter | the question it answers |
# |---|---|
# | **01** scaled dot-product attention | How can a place in an image ask every other place? |
# | **02** non-local networks | How does one such layer fit into a convolutional network? |
# | **03** squeeze-and-excitation, SK | Which *channels* matter for this image? |
# | **04** CBAM | Which channels, then which places? |
# | **05** DANet, OCNet and sparse heirs | Which pixels belong together? And who can afford to ask? |
# | **06** compact generalised non-local | Can every channel at every place ask every other, cheaply? |
# | **07** video | Where has this pixel gone in the next frame? |
# | **08** PatchConvNet | One softmax at the end: where did the network look? |
# | **09** DependencyViT | What if tokens *send* instead of ask? A tree appears. |
# | **10** SPFormer | What if the tokens are superpixels instead of squares? |
# | **11** capstone | Which attention, when, and at what cost? |
#
# Chapters 00 and 01 exist today; the README says which others do by now.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 6 · When something does not work
#
# `attnlab doctor`, typed in a terminal, checks the machine, the packages, the data and the
# checkpoints, and names the one command that mends what is broken. Every chapter runs on a GPU
# without a change; this one runs on:

# %% tags=["nbval-ignore-output"] slideshow={"slide_type": "fragment"}
print("device:", device, "· PyTorch", torch.__version__)

# %% [markdown] slideshow={"slide_type": "fragment"}
# **What you have now.** You can run cells, predict before you look, check your code, record a
# model's attention, and you know what the colours are: weights, stretched so that the largest on a
# patch is brightest. A token's weights on all 65 tokens sum to one, and that is all they promise.
#
# **Where next.** [Chapter 01](01_attention.ipynb) builds what you just looked at, from the formula
# up.
