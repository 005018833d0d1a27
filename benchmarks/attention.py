"""Explicit, fused and blockwise attention: time, memory, growth, and where "auto" should switch.

    python benchmarks/attention.py [--machine NAME] [--device cpu] [--threads 2] [--quick]

Prints Markdown tables of ratios within this run, and writes benchmarks/results/attention-NAME.json.
Memory is measured with each variant in a process of its own. Run it on a quiet machine.
"""

import argparse
import math
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
from einops import rearrange

from attnlab.attention import scaled_dot_product_attention
from attnlab.lab.files import write_json

RESULTS = Path(__file__).parent / "results"
IMPLS = ("explicit", "fused", "blockwise")


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


def make_step(impl: str, N: int, batch: int, heads: int, d: int, device: str, training: bool):
    """A callable that attends once, forward or forward + backward, from a (B, N, 3, h, d) tensor.

    The layout is that of a module: q, k and v are strided views of one projection.
    """
    qkv = torch.randn(batch, N, 3, heads, d, device=device, requires_grad=training)

    def step():
        with torch.set_grad_enabled(training):
            q, k, v = rearrange(qkv, "b n three h d -> three b h n d")
            out = scaled_dot_product_attention(q, k, v, impl=impl)
            if training:
                qkv.grad = None
                out.sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


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


def extra_memory(
    impl: str, N: int, heads: int, d: int, device: str, threads: int, training: bool
) -> int:
    """Bytes that one step needs beyond its inputs. Meant for a process that did nothing before."""
    torch.set_num_threads(threads)
    make_step(impl, 32, 1, heads, d, device, training)()  # kernels and thread pools are loaded
    step = make_step(impl, N, 1, heads, d, device, training)
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


def growth(sizes: list[int], values: list[float]) -> float:
    """The exponent p of values ∝ sizes^p: the slope of the least-squares line in log-log."""
    slope, _ = statistics.linear_regression(
        [math.log(x) for x in sizes], [math.log(y) for y in values]
    )
    return slope


def switch_point(sizes: list[int], ratios: list[float]) -> int | None:
    """The number of scores N² from which on fused is at most 2 % slower; None if it is not."""
    last_slower = max((N for N, r in zip(sizes, ratios, strict=True) if r < 0.98), default=0)
    faster = [N for N in sizes if last_slower < N]
    if not faster:
        return None
    return faster[0] ** 2 if last_slower else 0


def table(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machine", default=platform.node() or "unknown")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    N, heads, d, repeats = (512, 4, 32, 3) if args.quick else (4096, 4, 32, 9)
    memory_sizes = [N // 4, N // 2, N]
    sweep_sizes = [16, 64] if args.quick else [16, 32, 50, 65, 100, 128, 197, 256, 400, 577, 1024]
    results = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(args.machine, args.device, args.threads),
        "sizes": {"N": N, "heads": heads, "head_dim": d, "batch": 1},
    }

    steps = {impl: make_step(impl, N, 1, heads, d, args.device, True) for impl in IMPLS}
    results["training_seconds"] = times = seconds(steps, repeats)
    results["training_bytes"] = memory = {
        impl: [
            alone(extra_memory, impl, n, heads, d, args.device, args.threads, True)
            for n in memory_sizes
        ]
        for impl in IMPLS
    }
    results["memory_sizes"] = memory_sizes
    results["memory_growth"] = {impl: growth(memory_sizes, memory[impl]) for impl in IMPLS}
    results["fused_speedup"] = times["explicit"] / times["fused"]
    results["fused_memory_ratio"] = memory["fused"][-1] / memory["explicit"][-1]

    print(f"\nForward + backward at N = {N}, {heads} heads of {d}, one image\n")
    header = ["impl", "speed over explicit", "extra memory over explicit", "memory grows as N^"]
    print(table(header, [
        [impl, f"{times['explicit'] / times[impl]:.2f}×",
         f"1/{memory['explicit'][-1] / memory[impl][-1]:.1f}",
         f"{results['memory_growth'][impl]:.2f}"]
        for impl in IMPLS
    ]))  # fmt: skip

    sweep = {}
    for training in (False, True):
        for batch, heads, d in ((1, 3, 32), (8, 3, 32), (8, 6, 64)):
            ratios = []
            for n in sweep_sizes:
                steps = {
                    impl: make_step(impl, n, batch, heads, d, args.device, training)
                    for impl in ("explicit", "fused")
                }
                taken = seconds(steps, 10 * repeats if n < 300 else repeats)
                ratios.append(taken["explicit"] / taken["fused"])
            mode = "training" if training else "inference"
            sweep[f"{mode}, batch {batch}, {heads} heads of {d}"] = ratios
    results["auto"] = {
        "sizes": sweep_sizes,
        "explicit_over_fused": sweep,
        "switch_at_scores": {name: switch_point(sweep_sizes, r) for name, r in sweep.items()},
    }

    print("\nauto: time of explicit over fused, by N (above 1, fused is faster)\n")
    print(table(["", *sweep_sizes, "fused from N² ="], [
        [name, *(f"{ratio:.2f}" for ratio in ratios), switch_point(sweep_sizes, ratios)]
        for name, ratios in sweep.items()
    ]))  # fmt: skip

    path = RESULTS / f"attention-{args.machine}{'-quick' if args.quick else ''}.json"
    write_json(path, results)
    print(f"\n{path}")


if __name__ == "__main__":
    main()
