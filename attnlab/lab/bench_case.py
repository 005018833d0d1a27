"""What a row of the benchmark suite times: a function, its inputs, the weights it uses."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

HEADS, WIDTH = 4, 32
CHANNELS = HEADS * WIDTH


class Case(NamedTuple):
    """`function(*inputs)` → a tensor or several, and the module whose weights it uses."""

    function: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]
    module: nn.Module | None = None


def feature_map(N: int, channels: int = CHANNELS, batch: int = 1) -> Tensor:
    """A feature map of N positions, as square as N allows."""
    height = max(side for side in range(1, math.isqrt(N) + 1) if N % side == 0)
    return torch.randn(batch, channels, height, N // height)


def perturbed(module: nn.Module) -> nn.Module:
    """Away from its initialisation, at which many a block is the identity."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return module


def with_impl(module: nn.Module, impl: str) -> nn.Module:
    """Set `impl` on every part that has one, in place."""
    for part in module.modules():
        if hasattr(part, "impl"):
            part.impl = impl
    return module


def shared(ours: nn.Module, theirs: nn.Module, form: str, peer: str, *inputs: Tensor) -> Case:
    """The one of two modules that `form` names, with the weights of theirs, perturbed."""
    ours.load_state_dict(perturbed(theirs).state_dict())
    module = theirs if form == peer else with_impl(ours, form)
    return Case(module, inputs, module)


def single(module: nn.Module, form: str, *inputs: Tensor) -> Case:
    module = with_impl(perturbed(module), form)
    return Case(module, inputs, module)
