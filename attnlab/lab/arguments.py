"""Checks of arguments: each raises ValueError with the argument's name, value and what fits."""

import math
from typing import Any


def require(true: bool, name: str, value: Any, expected: str) -> None:
    """Raise ValueError unless `true`."""
    if not true:
        raise ValueError(f"{name}={value!r}: expected {expected}")


def whole(low: int, **named: int) -> None:
    """Each value is an integer ≥ `low`."""
    for name, value in named.items():
        is_int = isinstance(value, int) and not isinstance(value, bool)
        require(is_int and value >= low, name, value, f"an integer ≥ {low}")


def inside(interval: str, **named: float) -> None:
    """Each value is a number inside the `interval`, written as "[0, 1)"."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    for name, value in named.items():
        is_number = isinstance(value, int | float) and not math.isnan(value)
        above = is_number and (value >= low if interval[0] == "[" else value > low)
        below = is_number and (value <= high if interval[-1] == "]" else value < high)
        require(above and below, name, value, f"a number in {interval}")
