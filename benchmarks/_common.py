"""What the benchmarks share: arguments, the machine, time, memory, a table, the results file.

Times are compared within one run, and the candidates take turns, so that a slow moment hits all.
Memory is the most that a fresh process ever held beyond what it held before.
"""

import argparse
import multiprocessing
import os
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from attnlab.lab.files import write_json

RESULTS = Path(__file__).parent / "results"


def arguments(doc: str, quick: str = "tiny sizes, to see that it runs") -> argparse.ArgumentParser:
    """The options of every benchmark; set `torch.set_num_threads(args.threads)` from them."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--machine", default=platform.node() or "unknown", help="names the file")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def write(name: str, args: argparse.Namespace, results: dict) -> None:
    """`results` with the command and the machine, to benchmarks/results/NAME-MACHINE.json."""
    path = RESULTS / f"{name}-{args.machine}{'-quick' if args.quick else ''}.json"
    command = " ".join(["python", *sys.argv])
    place = machine(args.machine, args.device, args.threads)
    write_json(path, {"command": command, "machine": place, **results})
    print(f"\n{path}")


def machine(name: str, device: str, threads: int) -> dict:
    """What the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        cpu = models[0] if models else cpu
    return {
        "name": name,
        "cpu": cpu,
        "threads": threads,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def seconds(steps: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Median time of each step; the steps take turns, so that a slow moment hits all of them."""
    times = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes() -> int:
    """The most memory this process ever held. (ru_maxrss may hold its parent's, before exec.)"""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) * 1024
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

    (glibc's way of keeping it makes peaks vary by a factor of ten from run to run.)
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        return executor.submit(function, *args).result()


def table(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
