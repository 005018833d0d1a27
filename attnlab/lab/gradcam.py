"""Grad-CAM: which places of a feature map raised the score of one class.

Paper: Selvaraju et al. 2017, "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
Localization" (Sec. 3, Eq. 1 and 2). The idea: a channel matters to a class as much as the score
grows with it on average over all places; add the channels up with these weights, and keep what
speaks *for* the class. It needs a gradient, so it belongs to a class; a gate belongs to none.

What differs from the paper: the map is divided by its own maximum, so that it can be drawn.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnlab.lab.arguments import require


def gradcam(
    model: nn.Module, layer: nn.Module | str, images: Tensor, target: int | Tensor | None = None
) -> Tensor:
    """ReLU(Σ_k w_k A_k) with w_k = mean over places of ∂y/∂A_k (Selvaraju et al., Eq. 1, 2).

    In eval mode; no parameter's `.grad` changes, and it works under `torch.no_grad()` as well.

    Args:
        model: images → scores `(B, classes)` before any softmax; y is the score of `target`.
        layer: the module whose output `(B, K, h, w)` is A, or its dotted name: `"layer4"`. Where
            it is called more than once, its last call counts.
        images: `(B, C, H, W)`.
        target: one class for all, or `(B,)` of them; by default the one with the highest score.

    Returns:
        `(B, H, W)`: A's grid brought to the images' size bilinearly, each map divided by its
        maximum. A map in which nothing speaks for the class is zero.

    Raises:
        ValueError: there is no such layer, or it is not called, or its output is no feature map;
            the scores are not `(B, classes)`; `target` is not such a class.
    """
    model = getattr(model, "_orig_mod", model)  # hooks do not reach into compiled code
    layer = _layer(model, layer)
    require(images.ndim == 4, "images", tuple(images.shape), "(B, C, H, W)")
    calls: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        is_map = isinstance(shape, tuple) and len(shape) == 4 and shape[0] == len(images)
        require(is_map, "layer's output", shape, f"({len(images)}, K, h, w)")
        calls.append(output)
        return output.clone()  # what follows may write to it

    training = {module: module.training for module in model.modules()}
    handle = layer.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            scores = model.eval()(images.detach().requires_grad_())
            score = _chosen(scores, target, len(images)).sum()
    finally:
        handle.remove()
        for module, mode in training.items():
            module.training = mode
    require(len(calls) > 0, "layer", type(layer).__name__, "one that the model calls")
    features = calls[-1]
    (gradient,) = torch.autograd.grad(score, features)
    weights = gradient.mean((2, 3), keepdim=True)  # (B, K, 1, 1)
    maps = (weights * features).detach().sum(1, keepdim=True).relu()
    maps = F.interpolate(maps, size=images.shape[2:], mode="bilinear")[:, 0]
    highest = maps.amax((1, 2), keepdim=True)
    return maps / highest.masked_fill(highest == 0, 1)


def _layer(model: nn.Module, layer: nn.Module | str) -> nn.Module:
    modules = dict(model.named_modules())
    if isinstance(layer, str):
        known = [name for name in modules if name and "." not in name]
        require(layer in modules, "layer", layer, f"a module's dotted name, such as one of {known}")
        return modules[layer]
    owned = any(layer is module for module in modules.values())
    require(owned, "layer", type(layer).__name__, "a module of the model, or its dotted name")
    return layer


def _chosen(scores: Tensor, target: int | Tensor | None, batch: int) -> Tensor:
    """The score of each image's target, `(B,)`."""
    shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    is_table = isinstance(scores, Tensor) and scores.ndim == 2 and len(scores) == batch
    require(is_table, "model's output", shape, f"scores ({batch}, classes)")
    if target is None:
        return scores.amax(1)
    target = torch.as_tensor(target, device=scores.device)
    whole = not (target.is_floating_point() or target.dtype == torch.bool)
    fits = whole and tuple(target.shape) in ((), (batch,))
    classes = scores.shape[1]
    in_range = fits and bool(((target >= 0) & (target < classes)).all())
    require(in_range, "target", target.tolist(), f"classes 0 to {classes - 1}: one, or ({batch},)")
    return scores.gather(1, target.expand(batch)[:, None])[:, 0]
