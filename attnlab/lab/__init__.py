"""The instruments of the course: data, training, measuring, drawing, exercises.

Every name is loaded when it is first used, so that `from attnlab import lab` stays fast and a
machine without Jupyter or matplotlib can run everything that does not need them.
"""

from importlib import import_module

import torch

_SUBMODULES = (
    "checkpoints", "claims", "cost", "data", "doctor", "exercises", "files", "gradcam", "metrics",
    "plots", "results", "toys", "train", "widgets",
)  # fmt: skip
_FUNCTIONS = {
    "check": "exercises",
    "claim": "claims",
    "explore": "widgets",
    "fit": "train",
    "hint": "exercises",
    "load": "data",
    "progress": "exercises",
    "seed_everything": "train",
    "solution": "exercises",
}

__all__ = ["device", *_FUNCTIONS, *_SUBMODULES]


def device() -> torch.device:
    """CUDA when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def __getattr__(name: str):
    if name in _FUNCTIONS:
        return getattr(import_module(f"{__name__}.{_FUNCTIONS[name]}"), name)
    if name in _SUBMODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
