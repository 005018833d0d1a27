"""What an exercise is made of, and how a learner's function is judged.

The solution is the specification: a case is correct when the learner's function returns what the
solution returns. Typical mistakes are functions too: when a wrong output equals a mistake's, the
learner gets the hint that belongs to that mistake.
"""

import ast
import copy
import html
import inspect
import io
import math
import re
import sysconfig
import textwrap
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import torch

PARSING = Lock()  # Python 3.11 may fail when two threads parse at once: python/cpython#106905
RTOL, ATOL = 1e-4, 1e-5
SHOWN_ENTRIES = 9  # tensors up to this size are written out
SHOWN_PRINTS = 300  # characters of the learner's own printing that a result repeats
IN_PLACE = "x += 1, x[…] = … and x.exp_() change the caller's tensor. Make a new one: x = x + 1."
NO_RETURN = "Is the `return` missing?"
SYMBOLS = {"correct": "✔", "wrong": "✘", "not attempted": "○", "unknown": "?"}
COLORS = {
    "correct": "#2a9d64",
    "wrong": "#d1495b",
    "not attempted": "#8a8f98",
    "unknown": "#d98e04",
}


@dataclass(frozen=True)
class Case:
    """One call of the learner's function: what is special about it, and its arguments."""

    about: str
    args: tuple


@dataclass(frozen=True)
class Exercise:
    """An exercise named "topic.function", where `function` is the solution's name.

    cases: seed → cases, the most readable first; other seeds give other numbers.
    hints: from mild to strong.
    mistakes: (hint, function) pairs, each function a typical wrong answer.
    bug: (right, wrong), for a find-the-bug exercise: the learner starts from the solution's text
        with `right` replaced by `wrong`.
    """

    topic: str
    solution: Callable
    cases: Callable[[int], list[Case]]
    hints: tuple[str, ...]
    mistakes: tuple[tuple[str, Callable], ...]
    bug: tuple[str, str] | None = None

    @property
    def name(self) -> str:
        return f"{self.topic}.{self.solution.__name__}"

    @property
    def chapter(self) -> str:
        """Two digits: the solution lives in `chNN.py` or `chNN_topic.py`."""
        return self.solution.__module__.rpartition(".ch")[2][:2]

    @property
    def stub(self) -> str:
        """The text the learner starts from: signature, docstring, and nothing (or the bug)."""
        source = textwrap.dedent(inspect.getsource(self.solution))
        if self.bug:
            return source.replace(*self.bug)
        docstring = ast.parse(source).body[0].body[0]
        head = source.splitlines()[: docstring.end_lineno]
        return "\n".join([*head, "    raise NotImplementedError", ""])

    @property
    def imports(self) -> list[str]:
        """The import statements of the solution's file, the framework's left out."""
        source = inspect.getsource(inspect.getmodule(self.solution))
        with PARSING:  # grading asks from several threads
            body = ast.parse(source).body
        nodes = [n for n in body if isinstance(n, ast.Import | ast.ImportFrom)]
        lines = [ast.unparse(node) for node in nodes]
        return [line for line in lines if not line.startswith(f"from {__package__}.")]

    def start(self) -> Callable:
        """The stub as a function."""
        scope = dict(self.solution.__globals__)
        exec(self.stub, scope)
        return scope[self.solution.__name__]


@dataclass(frozen=True)
class Result:
    """What a check found. Its text is the same on every machine; notebooks show the HTML."""

    name: str
    status: Literal["correct", "wrong", "not attempted", "unknown"]
    text: str
    hint: str = ""

    def __repr__(self) -> str:
        lines = [f"{SYMBOLS[self.status]} {self.name}: {self.status}", *self.text.splitlines()]
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n  ".join(lines)

    def _repr_html_(self) -> str:
        hint = f"<div><b>Hint.</b> {html.escape(self.hint)}</div>" if self.hint else ""
        return (
            f'<div style="border-left: 4px solid {COLORS[self.status]}; padding: 0.2em 0.8em">'
            f"<b>{SYMBOLS[self.status]} {html.escape(self.name)}: {self.status}</b>"
            f'<pre style="margin: 0.3em 0">{html.escape(self.text)}</pre>{hint}</div>'
        )


@dataclass(frozen=True)
class Outcome:
    """What one call of a learner's function did."""

    output: Any = None
    clash: str = ""  # why it cannot be called with these arguments
    raised: str = ""  # what it raised, and where
    untouched: bool = False  # it raised a plain NotImplementedError, as a stub does
    written: tuple[int, ...] = ()  # the arguments that it wrote to
    printed: str = ""


def call(function: Callable, args: tuple) -> Outcome:
    """Call a learner's function, and come back whatever it does."""
    if clash := _signature_clash(function, args):
        return Outcome(clash=clash)
    given = copy.deepcopy(args)
    printed = _Printed()
    try:
        with redirect_stdout(printed), torch.random.fork_rng(devices=[]):
            output = function(*given)
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        # The stub's own line; PyTorch raises this class too, with a message.
        stub = isinstance(error, NotImplementedError) and not error.args
        return Outcome(raised=raised(error), untouched=stub, printed=printed.excerpt())
    pairs = enumerate(zip(args, given, strict=True))
    written = tuple(index for index, (a, b) in pairs if difference(a, b))
    return Outcome(output, written=written, printed=printed.excerpt())


def judge(
    exercise: Exercise,
    function: Any,
    seed: int = 0,
    call: Callable[[Callable, tuple], Outcome] = call,
) -> Result:
    """Run `function` on the exercise's cases and stop at the first that is not right.

    Whatever the function does becomes a `Result`: it may raise, exit, be interrupted, print,
    return anything, or write to its arguments. `call` can run it elsewhere.
    """
    if not callable(function):
        return Result(
            exercise.name,
            "wrong",
            f"The second argument is {_a(function)}, not a function: "
            f"write check({exercise.name!r}, {exercise.solution.__name__}).",
        )
    cases = exercise.cases(seed)
    # Every answer is computed before the learner's code runs: nothing it does can reach one.
    answered = [(case, exercise.solution(*case.args)) for case in cases]
    for number in range(len(answered)):
        outcome = call(function, answered[number][0].args)
        if result := _judge_last(exercise, outcome, answered[: number + 1]):
            return result
    return Result(exercise.name, "correct", f"All {len(cases)} cases agree.")


def _judge_last(
    exercise: Exercise, outcome: Outcome, answered: list[tuple[Case, Any]]
) -> Result | None:
    """The result of the last case's outcome, or None when it is right like the others."""
    *passed, (case, answer) = answered
    names = list(inspect.signature(exercise.solution).parameters)

    def wrong(*lines: str, hint: str = exercise.hints[0], status: str = "wrong") -> Result:
        inputs = [f"  {n} = {show(value)}" for n, value in zip(names, case.args, strict=True)]
        text = [f"Case: {case.about}.", *inputs, *lines]
        if outcome.printed:
            text += ["Your function printed:", textwrap.indent(outcome.printed, "  ")]
        return Result(exercise.name, status, "\n".join(text), hint)

    if outcome.clash:
        return wrong(f"It cannot be called with ({', '.join(names)}): {outcome.clash}.")
    if outcome.untouched and not passed:
        text = "Replace `raise NotImplementedError` by your own lines, and run the cells again."
        return Result(exercise.name, "not attempted", text)
    if outcome.raised:
        return wrong(outcome.raised)
    if outcome.written:
        written = " and ".join(names[index] for index in outcome.written)
        return wrong(f"It writes to its input {written}.", hint=IN_PLACE)
    found = difference(answer, outcome.output)
    if found is None:
        return None
    lines = (found.words, f"  expected {show(found.expected)}", f"  got      {show(found.got)}")
    if exercise.bug and _is_like(exercise.start(), found, answered):
        unchanged = "It still does what the given function does."
        return wrong(*lines, unchanged, status="not attempted")
    for hint, mistake in exercise.mistakes:
        if _is_like(mistake, found, answered):
            return wrong(*lines, hint=hint)
    return wrong(*lines, hint=NO_RETURN) if outcome.output is None else wrong(*lines)


@dataclass(frozen=True)
class Difference:
    """The first place where two results differ: its indices in nested tuples, and both values."""

    place: tuple[int, ...]
    expected: Any
    got: Any
    words: str


def difference(expected: Any, got: Any, place: tuple[int, ...] = ()) -> Difference | None:
    """Compare kind, shape, dtype and values, in this order; NaN equals NaN."""

    def found(words: str) -> Difference:
        part = f"Returned value {place[-1] + 1}: " if place else ""
        return Difference(place, expected, got, part + words)

    if isinstance(expected, tuple | list):
        if not isinstance(got, tuple | list):
            return found(f"{len(expected)} values are expected, and {_a(got)} came back.")
        if len(got) != len(expected):
            return found(f"{len(expected)} values are expected, and {len(got)} came back.")
        pairs = enumerate(zip(expected, got, strict=True))
        return next(filter(None, (difference(a, b, (*place, i)) for i, (a, b) in pairs)), None)
    if not isinstance(expected, torch.Tensor):
        if type(got) is not type(expected):
            return found(f"Not {_a(expected)} but {_a(got)} came back.")
        return None if got == expected else found("The number differs.")
    if not isinstance(got, torch.Tensor):
        return found(f"Not a tensor but {_a(got)} came back.")
    if not is_plain(got):
        return found(f"A plain tensor on the CPU is expected, not {got.layout} on {got.device}.")
    if got.shape != expected.shape:
        return found(f"The shape is {tuple(got.shape)} and should be {tuple(expected.shape)}.")
    if got.dtype != expected.dtype:
        return found(f"The dtype is {_dtype(got)} and should be {_dtype(expected)}.")
    differs = ~torch.isclose(got.detach(), expected, RTOL, ATOL, equal_nan=True)
    if not differs.any():
        return None
    words = f"{int(differs.sum())} of {differs.numel()} entries differ"
    if at := tuple(differs.nonzero()[0].tolist()):
        words += f", first at {at}: {_number(expected[at])} expected, {_number(got[at])} found"
    if got.is_floating_point() and got.isnan().any():
        words += f"; {int(got.isnan().sum())} are NaN"
    return found(words + ".")


def is_plain(tensor: torch.Tensor) -> bool:
    return not tensor.is_nested and tensor.layout == torch.strided and tensor.device.type == "cpu"


def _is_like(mistake: Callable, found: Difference, answered: list[tuple[Case, Any]]) -> bool:
    """Whether a mistake is right on the earlier cases too, and puts on this one the same value
    where the learner went wrong."""
    *passed, (case, _) = answered
    if any(difference(answer, mistake(*copy.deepcopy(c.args))) for c, answer in passed):
        return False
    value = mistake(*copy.deepcopy(case.args))
    for index in found.place:
        value = value[index]
    return difference(value, found.got) is None


def _signature_clash(function: Callable, args: tuple) -> str:
    try:
        inspect.signature(function).bind(*args)
    except TypeError as error:
        return str(error)
    except ValueError:  # a builtin without a signature
        pass
    return ""


def raised(error: BaseException) -> str:
    """What was raised, and the line of the learner's own code that did it."""
    if isinstance(error, KeyboardInterrupt):
        what = "You stopped it"
    else:
        message = re.sub(r" at 0x[0-9a-fA-F]+", "", str(error)).strip()
        message = textwrap.shorten(message, 300, placeholder=" …")
        what = f"It raised {type(error).__name__}" + (f": {message}" if message else "")
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is our own call
    own = [frame for frame in frames if not _is_library(frame.filename)] or frames
    if not own:
        return what
    return f"{what}\n  in line {own[-1].lineno}: {own[-1].line}"


def _is_library(filename: str) -> bool:
    paths = sysconfig.get_paths()
    folders = [paths["stdlib"], paths["purelib"], paths["platlib"], Path(__file__).parents[2]]
    return filename.startswith("<") or any(Path(filename).is_relative_to(f) for f in folders)


class _Printed(io.StringIO):
    """Keeps the first characters that are printed and drops the rest."""

    def write(self, text: str) -> int:
        super().write(text[: max(0, SHOWN_PRINTS + 1 - self.tell())])
        return len(text)

    def excerpt(self) -> str:
        text = self.getvalue()
        return text.rstrip() if len(text) <= SHOWN_PRINTS else f"{text[:SHOWN_PRINTS]} …"


def show(value: Any) -> str:
    """A value in a line: kind and shape, and the numbers when they are few."""
    if isinstance(value, torch.Tensor):
        if not is_plain(value):
            return f"{_dtype(value)} {value.layout} on {value.device}"
        kind = f"{_dtype(value)} {tuple(value.shape)}"
        return f"{kind}: {_numbers(value)}" if value.numel() <= SHOWN_ENTRIES else kind
    if isinstance(value, tuple | list):
        parts = dict.fromkeys(map(show, value))  # layers of one shape are named once
        return f"{type(value).__name__} of {len(value)}: {'; '.join(parts)}"
    if isinstance(value, int | float):
        return _number(value)
    return _a(value)


def _numbers(tensor: torch.Tensor) -> str:
    if tensor.ndim == 0:
        return _number(tensor)
    return f"[{', '.join(_numbers(part) for part in tensor)}]"


def _number(value: Any) -> str:
    value = value.item() if isinstance(value, torch.Tensor) else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    plain = value == 0 or 1e-3 <= abs(value) < 1e5 or not math.isfinite(value)
    return f"{value + 0.0:.4f}" if plain else f"{value:.3e}"


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _a(value: Any) -> str:
    if value is None:
        return "None"
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiouAEIOU" else f"a {name}"
