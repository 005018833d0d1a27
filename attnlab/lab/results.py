"""Tables of several seeds, kept in `results/` with the command, code and machine that made them.

An experiment is a plain function in `attnlab/lab/experiments/chNN.py`, whose parameters are
`(seed, device)` or `(seed, device, rows=None)` and which returns `{row: {metric: number}}`, a
`dict` where that is annotated. With
`CHAPTER = "01_attention"` in that module, its function `positions` is called
"01_attention.positions", and its table lies in `results/01_attention.positions.json`; a second
module of the chapter is `chNN_topic.py`, with the same CHAPTER. `rows`, where
an experiment takes it, are the rows that are wanted. A module may name one small table row for the
test that re-runs one seed of it: `RERUN = ("positions", "row")`.

A spread is the sample standard deviation over the seeds (n − 1). A table is *stale* when the code
that it depends on (see `code_hash`) is no longer the code that made it.
"""

import inspect
import json
import math
import pkgutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from tqdm.auto import tqdm

from attnlab import lab
from attnlab.lab import experiments
from attnlab.lab.arguments import require, whole
from attnlab.lab.code_hash import code_sha256
from attnlab.lab.cost import machine
from attnlab.lab.files import PACKAGE, repo_root, write_json

SEEDS = (0, 1, 2)
Rows = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Table:
    """A table of text: prints itself, and shows itself as Markdown in a notebook."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str
    rule: str = "---:"  # how all but the first column are aligned, in Markdown

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        lines = [
            "  ".join(
                [row[0].ljust(widths[0])]
                + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            )
            for row in (self.header, *self.rows)
        ]
        return "\n".join([*lines, self.caption])

    __repr__ = __str__

    def _repr_markdown_(self) -> str:
        rule = ("---", *[self.rule] * (len(self.header) - 1))
        lines = [f"| {' | '.join(row)} |" for row in (self.header, rule, *self.rows)]
        return "\n".join([*lines, "", self.caption])


def names() -> list[str]:
    """Every experiment there is."""
    return [
        f"{module.CHAPTER}.{name}"
        for module in _modules()
        for name, member in vars(module).items()
        if inspect.isfunction(member) and member.__module__ == module.__name__
        if not name.startswith("_")
        if tuple(inspect.signature(member).parameters)[:2] == ("seed", "device")
        if set(inspect.signature(member).parameters) <= {"seed", "device", "rows"}
        if inspect.signature(member).return_annotation in (dict, inspect.Signature.empty)
    ]


def status(name: str, seeds: Sequence[int] = SEEDS) -> str:
    """What `run` would find: "current", "incomplete" (seeds), "stale" (code) or "missing"."""
    if not _path(name).exists():
        return "missing"
    table = load(name)
    if table["code_sha256"] != _code(name):
        return "stale"
    return "current" if set(seeds) <= set(table["seeds"]) else "incomplete"


def run(
    name: str,
    seeds: Sequence[int] = SEEDS,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Run the experiment for each of `seeds` that its table lacks, and return the table.

    The table is written after every seed, so a run that was stopped goes on. A stale one, or one
    made on another kind of device, is begun anew. Raises ValueError on an unknown name, and when
    a seed's numbers are not finite or its rows are not those of the others.
    """
    experiment = _experiment(name)
    require(len(seeds) > 0, "seeds", seeds, "at least one")
    for seed in seeds:
        whole(0, seed=seed)
    before = status(name, seeds)
    if before == "current":
        return load(name)
    device = torch.device(device or lab.device())
    values, seconds, code = {}, 0.0, _code(name)
    if before == "incomplete" and (found := load(name))["device"] == device.type:
        values = {seed: _seed_of(found, position) for position, seed in enumerate(found["seeds"])}
        seconds = found["seconds"]
    for seed in tqdm([s for s in seeds if s not in values], desc=name, disable=not progress):
        started = perf_counter()
        values[seed] = _checked(experiment(seed, device), like=next(iter(values.values()), None))
        seconds += perf_counter() - started
        write_json(_path(name), _table(name, code, dict(sorted(values.items())), seconds, device))
    return load(name)


def confirm(name: str) -> list[str]:
    """Bring a stale table up to date by its first seed, after a change that alters few numbers.

    Rows that give the same numbers again, to the last digit, keep those of all seeds. The others
    are run for every seed, alone, where the experiment takes `rows` and a row alone gives what it
    gives among all; else the table is left as it is, stale. Returns where numbers differed, "row,
    metric: old → new".
    """
    table = load(name)
    if table["code_sha256"] == (code := _code(name)):
        return []
    values = {seed: _seed_of(table, position) for position, seed in enumerate(table["seeds"])}
    first, *others = values
    old, values[first] = values[first], rerun(name, first, device=table["device"])
    new = _checked(values[first], like=old)
    differing = {
        (row, metric): f"{row}, {metric}: {value} → {new[row][metric]}"
        for row, metrics in old.items()
        for metric, value in metrics.items()
        if new[row][metric] != value
    }
    rows = tuple(dict.fromkeys(row for row, _ in differing))
    if rows:
        if "rows" not in inspect.signature(_experiment(name)).parameters:
            return list(differing.values())
        alone = {seed: _alone(name, seed, rows, table["device"]) for seed in (first, *others)}
        if alone[first] != {row: new[row] for row in rows}:
            return list(differing.values())
        values |= {seed: values[seed] | alone[seed] for seed in others}
    made = _table(name, code, values, table["seconds"], torch.device(table["device"]))
    write_json(_path(name), table | {"code_sha256": code, "rows": made["rows"]})
    return list(differing.values())


def _alone(name: str, seed: int, rows: tuple[str, ...], device: str) -> Rows:
    found = _checked(_experiment(name)(seed, torch.device(device), rows=rows))
    return {row: found[row] for row in rows}


def load(name: str) -> dict[str, Any]:
    """The table as it is kept: `rows` is `{row: {metric: {mean, std, values}}}`."""
    path = _path(name)
    if not path.exists():
        there = sorted(file.stem for file in path.parent.glob("*.json"))
        hint = f"there are {there}; an experiment's table is made by: attnlab results NAME"
        raise ValueError(f"name={name!r}: there is no {path.name} in results/; {hint}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is damaged ({error}); make it anew: attnlab results {name}"
        ) from error


def show(name: str, digits: int = 3) -> Table:
    """The table as mean ± spread, to `digits` decimals; a stale one says so."""
    table = load(name)
    metrics = list(dict.fromkeys(metric for row in table["rows"].values() for metric in row))
    rows = tuple(
        (row, *(_cell(row_metrics.get(metric), digits) for metric in metrics))
        for row, row_metrics in table["rows"].items()
    )
    count = len(table["seeds"])
    spread = f"mean ± standard deviation of {count} seeds" if count > 1 else "one seed"
    caption = f"{spread}, {table['machine']}: {table['command']}"
    if status(name, table["seeds"]) == "stale":
        caption += " (stale: the code has changed since)"
    return Table(("", *metrics), rows, caption)


def rerun(
    name: str, seed: int, row: str | None = None, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """One seed of an experiment now: `{row: {metric: number}}`, or with `row` its metrics."""
    whole(0, seed=seed)
    experiment = _experiment(name)
    wanted = {"rows": (row,)} if row and "rows" in inspect.signature(experiment).parameters else {}
    rows = _checked(experiment(seed, torch.device(device), **wanted))
    require(row is None or row in rows, "row", row, f"one of {sorted(rows)}")
    return rows if row is None else rows[row]


def main(wanted: Sequence[str] = (), seeds: Sequence[int] = SEEDS, confirming: bool = False) -> int:
    """`attnlab results`: make the tables `wanted`, by default all that are not current.

    To make a current table anew, delete its file first. `confirming` only runs `confirm` on the
    stale ones, and is 1 where one stays stale.
    """
    for name in wanted:
        _experiment(name)
    if confirming:
        stale = [name for name in wanted or names() if status(name, ()) == "stale"]
        for name in tqdm(stale, desc="first seeds"):
            differing = confirm(name)
            found = "other numbers:" if differing else "the same numbers"
            print("\n  ".join([f"{name}: {status(name, ())}, {found}", *differing]))
        return int(any(status(name, ()) == "stale" for name in stale))
    for name in wanted or names():
        before = status(name, seeds)
        if before != "current":
            print(f"{name}: {before}, running seeds {' '.join(map(str, seeds))}")
            run(name, seeds)
        print(f"{name}: current\n{show(name)}\n")
    return 0


def _modules() -> list[Any]:
    found = sorted(info.name for info in pkgutil.iter_modules(experiments.__path__))
    modules = [import_module(f"{experiments.__name__}.{name}") for name in found]
    for module in modules:
        named = hasattr(module, "CHAPTER")
        require(named, "CHAPTER", None, f'a name such as "01_attention" in {module.__name__}')
    return modules


def _experiment(name: str) -> Callable[..., Rows]:
    require(name in (known := names()), "name", name, f"one of {known}")
    return getattr(_module(name), name.partition(".")[2])


def _module(name: str) -> Any:
    chapter, _, experiment = name.partition(".")
    return next(m for m in _modules() if chapter == m.CHAPTER and experiment in vars(m))


def _code(name: str) -> str:
    _experiment(name)
    return code_sha256(_module(name).__name__, name.partition(".")[2])


def _path(name: str) -> Path:
    return (repo_root() or PACKAGE) / "results" / f"{name}.json"


def _checked(rows: Rows, like: Rows | None = None) -> Rows:
    """Rows of finite floats, six significant digits, the same rows and metrics as `like`."""
    values = {
        row: {metric: float(f"{float(value):.6g}") for metric, value in metrics.items()}
        for row, metrics in rows.items()
    }
    for row, metrics in values.items():
        for metric, value in metrics.items():
            require(math.isfinite(value), f"{row}, {metric}", value, "a finite number")
    shape, wanted = ({row: sorted(m) for row, m in r.items()} for r in (values, like or values))
    require(shape == wanted, "rows", shape, f"those of the other seeds: {wanted}")
    return values


def _seed_of(table: dict[str, Any], position: int) -> Rows:
    return {
        row: {metric: entry["values"][position] for metric, entry in metrics.items()}
        for row, metrics in table["rows"].items()
    }


def _table(name: str, code: str, values: dict[int, Rows], seconds: float, device: Any) -> dict:
    first = next(iter(values.values()))
    seeds = " ".join(map(str, values))
    return {
        "name": name,
        "command": f"attnlab results {name} --seeds {seeds}",
        "code_sha256": code,
        "seeds": list(values),
        "device": device.type,
        "machine": machine(device),
        "torch": torch.__version__,
        "seconds": round(seconds, 1),
        "rows": {
            row: {
                metric: _summary([rows[row][metric] for rows in values.values()])
                for metric in metrics
            }
            for row, metrics in first.items()
        },
    }


def _summary(values: list[float]) -> dict[str, Any]:
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "values": values}


def _cell(entry: dict[str, Any] | None, digits: int) -> str:
    if entry is None:
        return ""
    spread = "" if entry["std"] is None else f" ± {entry['std']:.{digits}f}"
    return f"{entry['mean']:.{digits}f}{spread}"
