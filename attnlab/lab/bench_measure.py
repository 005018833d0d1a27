"""How benchmarks measure: time in turns, memory in a fresh process, the machine, a table.

Times are compared within one run, and the candidates take turns, so that a slow moment hits all.
Memory is the most that a fresh process ever held beyond what it held before.
"""

import multiprocessing
import os
import platform
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from attnlab.lab.cost import processor


def machine(name: str, device: str) -> dict[str, str | int]:
    """What the numbers depend on; `device` is cpu or cuda."""
    return {
        "name": name,
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def take_turns(
    steps: Mapping[str, Callable], *, least: int = 1, budget: float = 0.0, row: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of each call of each step, over rounds in which they take turns, in an order drawn
    anew for each.

    Right after a step that filled the caches another is slow, up to three times. So a turn lasts
    `row` seconds, and of several calls in it the first is not counted; nor is the first round.

    Args:
        least: number of rounds to run, whatever they take.
        budget: seconds in which further rounds are begun.
        row: seconds of a turn; 0 is one call.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    order, shuffle = list(steps), random.Random(0).shuffle
    started, rounds = time.perf_counter(), 0
    while rounds < least or time.perf_counter() - started < budget:
        shuffle(order)
        for name in order:
            taken = [_duration(steps[name])]
            while sum(taken) < row:
                taken.append(_duration(steps[name]))
            times[name] += taken[1:] or taken
        rounds += 1
    return times


def _duration(step: Callable) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def seconds(steps: Mapping[str, Callable], repeats: int) -> dict[str, float]:
    """Median time of each step over rounds in which they take turns."""
    times = take_turns(steps, least=repeats)
    return {name: statistics.median(values) for name, values in times.items()}


def load() -> float | None:
    """The load average of the last minute, where the system has one."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def peak_bytes() -> int:
    """The most memory this process ever held. (ru_maxrss may hold its parent's, before exec.)"""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) * 1024
    import resource  # which Windows has not

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def extra_memory(make_step: Callable, device: str, threads: int, small: tuple, *args) -> int:
    """Bytes that `make_step(*args)()` needs beyond its inputs: to be run `alone`.

    `make_step(*small)()` goes first, so that kernels and thread pools are loaded.
    """
    torch.set_num_threads(threads)
    make_step(*small)()
    step = make_step(*args)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    before = peak_bytes()
    step()
    return peak_bytes() - before


def alone(function: Callable, *args):
    """`function(*args)` in a fresh process, whose allocator returns what is freed at once.

    (glibc's way of keeping it makes peaks vary by a factor of ten from run to run.) Where there is
    a fork server, it has imported what the call needs, so that a process costs little.
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    served = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if served else "spawn")
    if served:
        needed = {given.__module__ for given in (function, *args) if callable(given)}
        context.set_forkserver_preload(["torch", *needed])
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        return executor.submit(function, *args).result()


def table(header: list[str], rows: list[list]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
