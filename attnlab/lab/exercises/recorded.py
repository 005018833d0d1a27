"""The exercises without their solutions, for a class: what a check needs, as numbers.

`write` records what each solution and each typical mistake returns on the cases of seed 0, and
`read` makes exercises of that: the same names, stubs, cases, hints and verdicts, and nothing to
look up. Cases of other seeds are not recorded; the grader, on the teacher's machine, has them.
"""

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from attnlab.lab.exercises.framework import Case, Exercise, difference
from attnlab.lab.files import atomic_write
from attnlab.lab.grading_wire import decode, encode


@dataclass(frozen=True)
class Recorded(Exercise):
    """An exercise that knows its answers and not how to find them."""

    number: str = ""
    text: str = ""

    @property
    def chapter(self) -> str:
        return self.number

    @property
    def stub(self) -> str:
        return self.text

    def start(self) -> Callable:
        return self.solution.__wrapped__


def write(exercises: Sequence[Exercise], path: Path) -> None:
    """Record exercises in one .safetensors file."""
    tensors: dict[str, Any] = {}
    rows = []
    for exercise in exercises:
        cases = exercise.cases(0)
        mistakes = [
            [_returned(wrong, case.args) for case in cases] for _, wrong in exercise.mistakes
        ]
        row = {
            "topic": exercise.topic,
            "name": exercise.solution.__name__,
            "chapter": exercise.chapter,
            "stub": exercise.stub,
            "imports": exercise.imports,
            "hints": list(exercise.hints),
            "bug": exercise.bug is not None,
            "about": [case.about for case in cases],
            "mistakes": [hint for hint, _ in exercise.mistakes],
        }
        values = [
            [case.args for case in cases],
            [exercise.solution(*deepcopy(case.args)) for case in cases],
            mistakes,
        ]
        rows.append({**row, "values": encode(values, tensors)})
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata={"exercises": json.dumps(rows)})


def _returned(function: Callable, args: tuple) -> Any:
    """What a mistake returns, or None where it fails."""
    try:
        return function(*deepcopy(args))
    except Exception:
        return None


def read(path: Path) -> list[Exercise]:
    """The exercises that `write` recorded."""
    with safe_open(path, framework="pt") as file:
        rows = json.loads(file.metadata()["exercises"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return [_exercise(row, tensors) for row in rows]


def _exercise(row: dict[str, Any], tensors: dict[str, Any]) -> Recorded:
    args, answers, mistakes = decode(row["values"], tensors)
    scope: dict[str, Any] = {}
    exec("\n".join([*row["imports"], row["stub"]]), scope)
    return Recorded(
        topic=row["topic"],
        solution=_replay(scope[row["name"]], args, answers),
        cases=lambda seed: [Case(*case) for case in zip(row["about"], deepcopy(args), strict=True)],
        hints=tuple(row["hints"]),
        mistakes=tuple(
            (hint, _replay(scope[row["name"]], args, values))
            for hint, values in zip(row["mistakes"], mistakes, strict=True)
        ),
        bug=("", "") if row["bug"] else None,
        number=row["chapter"],
        text=row["stub"],
    )


def _replay(stub: Callable, known: list[tuple], values: list[Any]) -> Callable:
    """A function with the stub's name and parameters that returns what was recorded."""

    @wraps(stub)
    def replay(*args: Any) -> Any:
        pairs = zip(known, values, strict=True)
        return deepcopy(next(value for case, value in pairs if difference(case, args) is None))

    return replay
