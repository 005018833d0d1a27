"""What the tests of exercises share: a learner's answer, as it comes from a notebook's cell."""

from collections.abc import Callable

import torch
from einops import einsum, rearrange


def learner(name: str, source: str) -> Callable:
    """The function that a learner's source defines for the exercise `name`, "chapter.function"."""
    scope = {"torch": torch, "einsum": einsum, "rearrange": rearrange}
    exec(source, scope)
    return scope[name.split(".")[1]]
