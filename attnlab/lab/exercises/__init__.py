"""Exercises: a check that talks, hints from mild to strong, and the solution.

`check("attention.entropy", entropy)` says not attempted, wrong (the first failing case in words,
with a hint) or correct. Nothing that a learner does here ends in a traceback: a mistyped name or
a function that raises becomes a message too.

The exercises of chapter NN are in `chNN.py`, and in `chNN_topic.py` where one file would be too
long: solution, cases, hints and typical mistakes. A class's edition has `exercises.safetensors`
in their place, with the answers and without the solutions.
"""

import difflib
import inspect
import os
import pkgutil
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from attnlab.lab.exercises import solved
from attnlab.lab.exercises.framework import SYMBOLS, Case, Exercise, Result, judge

__all__ = [
    "Case", "Exercise", "Note", "Result", "catalogue", "check", "hint", "judge", "progress",
    "solution",
]  # fmt: skip


RECORDED = Path(__file__).with_name("exercises.safetensors")


@dataclass(frozen=True)
class Note:
    """A text to read: Markdown in a notebook, plain elsewhere."""

    text: str
    markdown: str

    def __repr__(self) -> str:
        return self.text

    def _repr_markdown_(self) -> str:
        return self.markdown


@cache
def catalogue() -> dict[str, Exercise]:
    """Every exercise by its name, in the order of the chapters."""
    if RECORDED.is_file():
        recorded = import_module(f"{__name__}.recorded").read(RECORDED)
        return {exercise.name: exercise for exercise in recorded}
    modules = sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name.startswith("ch"))
    exercises = [e for name in modules for e in import_module(f"{__name__}.{name}").EXERCISES]
    return {exercise.name: exercise for exercise in exercises}


def check(name: str, function: Callable, seed: int = 0) -> Result:
    """Check a learner's function against the exercise `name`, on the cases that `seed` gives.

    What is correct is noted for `progress`.
    """
    exercise = catalogue().get(name) if isinstance(name, str) else None
    if exercise is None:
        return _shown(Result(str(name), "unknown", _unknown(name)))
    result = judge(exercise, function, seed)
    if result.status == "correct":
        solved.record(name)
    return _shown(result)


def hint(name: str, level: int | None = None) -> Note:
    """Hint number `level` of an exercise: 1 (the default) is the mildest, the last nearly tells."""
    exercise = catalogue().get(name) if isinstance(name, str) else None
    if exercise is None:
        return _shown(_plain(_unknown(name)))
    level, last = 1 if level is None else level, len(exercise.hints)
    if level not in range(1, last + 1):
        return _shown(_plain(f"{name} has the hints 1 to {last}, and level = {level!r} is none."))
    more = f"\nStronger: hint({name!r}, {level + 1})" if level < last else ""
    return _shown(_plain(f"Hint {level} of {last}: {exercise.hints[level - 1]}{more}"))


def solution(name: str) -> Note:
    """The source of an exercise's solution; `ATTNLAB_SOLUTIONS=off` hides it in class."""
    exercise = catalogue().get(name) if isinstance(name, str) else None
    if exercise is None:
        return _shown(_plain(_unknown(name)))
    if os.environ.get("ATTNLAB_SOLUTIONS", "").lower() in ("off", "0", "no", "false"):
        return _shown(_plain(f"Solutions are hidden here (ATTNLAB_SOLUTIONS): try hint({name!r})."))
    if RECORDED.is_file():
        return _shown(_plain(f"This edition has no solutions: try hint({name!r})."))
    source = textwrap.dedent(inspect.getsource(exercise.solution))
    return _shown(Note(source, f"```python\n{source}```"))


def progress() -> Note:
    """The exercises that are solved, chapter by chapter; the last line says where that is kept."""
    done, chapters = solved.solved(), {}
    for exercise in catalogue().values():
        chapters.setdefault(exercise.chapter, []).append(exercise)
    lines = []
    for chapter, exercises in chapters.items():
        count = sum(exercise.name in done for exercise in exercises)
        marks = [
            f"{SYMBOLS['correct' if e.name in done else 'not attempted']} {e.name}"
            for e in exercises
        ]
        lines.append(f"{chapter}  {count} of {len(exercises)}  {'  '.join(marks)}")
    path = solved.place()
    kept = f"Kept in {path}; deleting it starts again." if path else "Nothing is kept here."
    return _shown(_plain("\n".join([*lines, kept])))


def _plain(text: str) -> Note:
    return Note(text, text.replace("\n", "  \n"))


def _unknown(name: Any) -> str:
    if not isinstance(name, str):
        return 'The name comes first, in quotes: check("attention.entropy", entropy).'
    close = difflib.get_close_matches(name, catalogue(), n=3, cutoff=0.4)
    return f"There is no exercise {name!r}. Known: {', '.join(close or catalogue())}."


def _shown(message: Any) -> Any:
    """A notebook shows a cell's last value by itself; a plain script has to print it."""
    ipython = sys.modules.get("IPython")
    if ipython is None or ipython.get_ipython() is None:
        print(message)
    return message
