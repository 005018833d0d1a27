"""What a module costs: parameters, multiply-accumulates, memory, time, and how they grow."""

import gc
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from attnlab.lab.arguments import require, whole


def parameters(module: nn.Module) -> int:
    """Number of parameters, shared ones counted once, trainable or not."""
    require(isinstance(module, nn.Module), "module", module, "an nn.Module")
    return sum(parameter.numel() for parameter in module.parameters())


def flops(module: Callable, *inputs: Any) -> int:
    """Floating-point operations of `module(*inputs)`, in eval mode, without gradients.

    As `torch.utils.flop_counter` counts: twice the multiply-accumulates of matrix products,
    convolutions and attention (the fused kernels too). Softmax, norms, activations and other
    elementwise work count nothing, and nor does an operator that registered no formula.
    """
    with _inference(module), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops()


def macs(module: Callable, *inputs: Any) -> int:
    """Multiply-accumulates of `module(*inputs)`: half of `flops`. Papers often call these FLOPs."""
    return flops(module, *inputs) // 2


def peak_memory(fn: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Most bytes of tensors that `fn()` holds at once, beyond what was held when it began.

    What `fn` returns counts, as do buffers inside of operators. `fn` is called twice, and measured
    the second time, so that caches and existing `.grad`s do not count. On CUDA from the caching
    allocator, which rounds up to 512 bytes; on the CPU from the profiler's record of every
    allocation and release, which does not see the scratch memory of oneDNN and MKL.
    """
    device = torch.device(device)
    fn()
    gc.collect()  # garbage released during the measurement would count as room
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    require(device.type == "cpu", "device", str(device), "cpu or cuda")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler greets on stderr otherwise
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        fn()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def latency(fn: Callable[[], Any], *, warmup: int = 3, repeats: int = 10) -> float:
    """Median seconds of `fn()` over `repeats` calls after `warmup` calls; waits for CUDA."""
    whole(0, warmup=warmup)
    whole(1, repeats=repeats)
    for _ in range(warmup):
        fn()
    seconds = []
    for _ in range(repeats):
        _synchronize()
        started = time.perf_counter()
        fn()
        _synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def measure(module: nn.Module, *inputs: Any, repeats: int = 10) -> dict[str, float]:
    """All of it for `module(*inputs)`, in eval mode without gradients, where the inputs are.

    → `parameters`, `macs`, `flops`, `memory` (bytes, see `peak_memory`), `latency` (seconds).
    """
    devices = {value.device for value in inputs if isinstance(value, Tensor)}
    require(len(devices) == 1, "inputs", sorted(map(str, devices)), "tensors on one device")

    def run() -> Any:
        return module(*inputs)

    count = flops(module, *inputs)
    with _inference(module):
        return {
            "parameters": parameters(module),
            "macs": count // 2,
            "flops": count,
            "memory": peak_memory(run, devices.pop()),
            "latency": latency(run, repeats=repeats),
        }


def growth(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Exponent p in values ∝ sizesᵖ: slope of the least-squares line through the logarithms."""
    same = len(sizes) == len(values) >= 2 and len(set(sizes)) >= 2
    require(
        same, "sizes, values", (sizes, values), "two sequences of one length, two sizes or more"
    )
    require(min(*sizes, *values) > 0, "sizes, values", (sizes, values), "numbers > 0")
    return statistics.linear_regression(
        [math.log(size) for size in sizes], [math.log(value) for value in values]
    ).slope


def machine(device: torch.device | str = "cpu") -> str:
    """What computes: the GPU's name, or the processor's with the number of threads in use."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} threads"


def processor() -> str:
    """The processor's name."""
    names = Path("/proc/cpuinfo")
    lines = names.read_text().splitlines() if names.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@contextmanager
def _inference(module: Callable) -> Iterator[None]:
    """Eval mode, if it is a module, and no gradients; each submodule's own mode is restored."""
    submodules = list(module.modules()) if isinstance(module, nn.Module) else []
    modes = [submodule.training for submodule in submodules]
    try:
        for submodule in submodules:
            submodule.training = False
        with torch.no_grad():
            yield
    finally:
        for submodule, mode in zip(submodules, modes, strict=True):
            submodule.training = mode
