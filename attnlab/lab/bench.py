"""`attnlab bench`: times every mechanism and model, and says what of the targets is met.

Forms and peers of a row take turns, over a grid of sizes, forward and with backward; ratios are
within one run. Memory, of "explicit" and "auto", is measured at one size, each in a process of its
own, in eager mode.
"""

import argparse
import math
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from attnlab.lab import bench_report
from attnlab.lab.arguments import require
from attnlab.lab.bench_measure import alone, extra_memory, load, machine, take_turns
from attnlab.lab.bench_rows import ROWS, Row
from attnlab.lab.files import repo_root, write_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TURNS = {"least": 5, "budget": 1.2, "row": 0.05}  # of a row, size and mode
COMPARED = ("explicit", "auto")  # in memory
QUICK = {"least": 2}


def make_step(
    name: str, size: int, form: str, training: bool, device: str, dtype: str, compiled: bool
) -> Callable[[], None]:
    """A callable that runs a row's form once, with backward for `training`.

    In bfloat16, inputs are bfloat16, and everything runs under autocast.
    """
    torch.manual_seed(0)
    with torch.device(device):
        case = ROWS[name].make(size, form)
    leaves = [x.to(DTYPES[dtype]).requires_grad_(training) for x in case.inputs]
    inputs = tuple(leaves)
    if case.module is not None:
        case.module.train(training)
        leaves += case.module.parameters()
    function = torch.compile(case.function) if compiled else case.function
    half = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")

    def step() -> None:
        with torch.set_grad_enabled(training), half:
            out = function(*inputs)
        if training:
            outputs = (out,) if isinstance(out, Tensor) else out
            gradients = [torch.ones_like(part) for part in outputs]
            torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def fitting(name: str, size: int) -> list[str]:
    """The row's forms that have room at this size, and its peers."""
    row = ROWS[name]
    return [form for form in (*row.forms, *row.peers) if size <= row.most.get(form, math.inf)]


def sizes_of(row: Row, compiled: bool, quick: bool) -> Sequence[int]:
    """All; compiled, which takes long, the largest that has room for all forms; or the smallest."""
    if quick:
        return row.sizes[:1]
    return [min([row.sizes[-1], *row.most.values()])] if compiled else row.sizes


def time_row(name: str, size: int, training: bool, turns: dict, *place) -> dict:
    """One entry of the results: median and minimum of each form's seconds. `place`: device, dtype,
    compiled."""
    steps = {form: make_step(name, size, form, training, *place) for form in fitting(name, size)}
    before = load()
    times = take_turns(steps, **turns)
    return {
        "row": name,
        "mode": bench_report.MODES[training],
        "size": size,
        "calls": {form: len(taken) for form, taken in times.items()},
        "load": before,
        "median": {form: statistics.median(taken) for form, taken in times.items()},
        "min": {form: min(taken) for form, taken in times.items()},
    }


def memory_row(name: str, device: str, dtype: str) -> dict:
    """Bytes beyond the inputs of "explicit" and "auto", with backward where the row has it, at the
    largest size that has room for both."""
    row = ROWS[name]
    size = min(row.sizes[-1], row.most.get("explicit", math.inf))

    def taken(form: str) -> int:
        small, large = ((name, at, form, row.backward, device, dtype, False)
                        for at in (row.sizes[0], size))  # fmt: skip
        return alone(extra_memory, make_step, device, torch.get_num_threads(), small, *large)

    return {"row": name, "size": size, "bytes": {form: taken(form) for form in COMPARED}}


def run(
    names: Sequence[str],
    device: str = "cpu",
    dtype: str = "float32",
    compiled: bool = False,
    quick: bool = False,
) -> dict:
    """Measure the named rows. `quick` takes the smallest size of each, and no memory.

    Returns:
        {"options", "times", "memory", "errors", "seconds"}; a row that cannot be run is an error,
        and the others go on.
    """
    started, times, memory, errors = time.perf_counter(), [], [], {}
    for name in names:
        print(f"{name} …", file=sys.stderr, flush=True)
        row = ROWS[name]
        try:
            for size in sizes_of(row, compiled, quick):
                for training in (False, True)[: 1 + row.backward]:
                    torch.compiler.reset()
                    turns = QUICK if quick else TURNS
                    times.append(time_row(name, size, training, turns, device, dtype, compiled))
            if "explicit" in row.forms and not (quick or compiled or sys.platform == "win32"):
                memory.append(memory_row(name, device, dtype))
        except (RuntimeError, NotImplementedError, ImportError) as error:
            errors[name] = str(error).partition("\n")[0]
    return {
        "options": {"device": device, "dtype": dtype, "compile": compiled, "quick": quick},
        "times": times,
        "memory": memory,
        "errors": errors,
        "seconds": round(time.perf_counter() - started, 1),
    }


def rows_named(names: Sequence[str]) -> list[str]:
    """The names, or all; `ValueError` for one that is no row's."""
    for name in names:
        require(name in ROWS, "only", name, f"one of {', '.join(ROWS)}")
    return list(names or ROWS)


def results_folder() -> Path:
    """benchmarks/results of the checkout, or where there is none, this folder."""
    root = repo_root()
    return root / "benchmarks" / "results" if root else Path()


def default_file(name: str, device: str, dtype: str, compiled: bool) -> Path:
    """suite-MACHINE.json; what is not the default is in the name."""
    parts = ["suite", name, *([device] if device != "cpu" else [])]
    parts += ["bf16"] * (dtype == "bfloat16") + ["compile"] * compiled
    return results_folder() / f"{'-'.join(parts)}.json"


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="attnlab bench",
        description="Time every mechanism and model against its other forms and its peers.",
        epilog=f"Rows: {', '.join(ROWS)}. Run it on a quiet machine.",
    )
    options.add_argument("--only", nargs="+", default=[], metavar="ROW", help="these rows alone")
    options.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options.add_argument("--dtype", default="float32", choices=list(DTYPES))
    options.add_argument("--compile", action="store_true", help="through torch.compile, one size")
    options.add_argument("--quick", action="store_true", help="smallest sizes, to see that it runs")
    options.add_argument("--machine", default=platform.node() or "unknown", help="names the file")
    options.add_argument(
        "--out", type=Path, help="the file to write; without --only and --quick, "
        "benchmarks/results/suite-MACHINE.json by default",
    )  # fmt: skip
    options.add_argument(
        "--readme", action="store_true",
        help="measure nothing; put the tables of benchmarks/results into README.md",
    )  # fmt: skip
    return options


def main(arguments: Sequence[str]) -> int:
    """Run the suite with the arguments of the command line. → 0, or 1 where a row failed."""
    options = parser()
    chosen = options.parse_args(arguments)
    try:
        if chosen.readme:
            root = repo_root()
            require(root is not None, "readme", True, "a checkout; this package is installed")
            bench_report.update_readme(root / "README.md", results_folder())
            return 0
        names = rows_named(chosen.only)
        there = chosen.device == "cpu" or torch.cuda.is_available()
        require(there, "device", chosen.device, "cpu: PyTorch finds no CUDA device")
    except ValueError as error:
        options.error(str(error))
    place = chosen.device, chosen.dtype, chosen.compile
    results = run(names, *place, quick=chosen.quick)
    results = {
        "command": shlex.join(["attnlab", "bench", *arguments]),
        "machine": machine(chosen.machine, chosen.device),
        **results,
        "checks": [check._asdict() for check in bench_report.checks(results)],
    }
    for part in (bench_report.summary, bench_report.grid, bench_report.verdict):
        print(f"\n{part(results)}")
    whole = not (chosen.only or chosen.quick)
    path = chosen.out or (default_file(chosen.machine, *place) if whole else None)
    if path:
        write_json(path, results)
        print(f"\n{path}")
    return 1 if results["errors"] else 0
