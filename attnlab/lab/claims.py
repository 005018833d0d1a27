"""Claims: what a chapter says was measured, checked each time the chapter runs."""

import math
from typing import Any

from attnlab.lab.arguments import require


class ClaimError(AssertionError):
    """A claim that the measurement does not bear out."""


def claim(
    text: str,
    value: Any,
    *,
    above: float | None = None,
    below: float | None = None,
    equal: float | None = None,
    tol: float | None = None,
) -> None:
    """Print `✔ text` when `value` fulfils every bound, else raise ClaimError.

    value: a number, a tensor or array of one element, or, without bounds, a bool.
    above, below: value > above, value < below. equal: |value − equal| ≤ tol (default 0).
    NaN fulfils nothing. The line never shows the value, so that it is the same on every machine.
    Raises ValueError when the text is not one line, or value and bounds do not fit each other.
    """
    one_line = isinstance(text, str) and text.strip() and len(text.splitlines()) == 1
    require(bool(one_line), "text", text, "one line of text")
    if hasattr(value, "item"):
        require(math.prod(value.shape) == 1, "value", tuple(value.shape), "one element")
        value = value.item()
    bounds = {"above": above, "below": below, "equal": equal, "tol": tol}
    given = {name: bound for name, bound in bounds.items() if bound is not None}
    for name, bound in given.items():
        require(isinstance(bound, int | float) and bound == bound, name, bound, "a number")
    require(tol is None or (equal is not None and tol >= 0), "tol", tol, "≥ 0, beside equal=")
    if isinstance(value, bool):
        require(not given, "value", value, f"a number to hold against {given}")
    else:
        require(isinstance(value, int | float), "value", value, "a number or a bool")
        require(bool(given), "above, below, equal", None, "at least one bound for a number")

    holds = value if isinstance(value, bool) else True
    wanted = [] if given else ["expected to be true"]
    if above is not None:
        holds = holds and value > above
        wanted.append(f"expected above {above}")
    if below is not None:
        holds = holds and value < below
        wanted.append(f"expected below {below}")
    if equal is not None:
        holds = holds and (value == equal or abs(value - equal) <= (tol or 0))
        wanted.append(f"expected {equal}" + (f" ± {tol}" if tol else ""))
    if not holds:
        raise ClaimError(f"✘ {text}: measured {value}, {' and '.join(wanted)}")
    print(f"✔ {text}")
