"""Sparse attention patterns against full fused attention: time, memory, and how they grow with N.

    python benchmarks/sparse.py [--machine NAME] [--threads 2] [--sides 32 48 64 96] [--quick]

Bare operators on random maps of width 128, forward alone and with backward, every pattern beside
full fused attention in one run. Two-stage patterns (axial, interlaced) run both stages. Prints
Markdown tables, and writes benchmarks/results/sparse-NAME.json. Run it on a quiet machine.
"""

from functools import partial

import torch
from _common import alone, arguments, extra_memory, seconds, table, write
from einops import rearrange

from attnlab.attention import scaled_dot_product_attention
from attnlab.lab.bench_case import HEADS, WIDTH
from attnlab.lab.bench_patterns import (
    attend_in_stages,
    axial_axes,
    interlaced_axes,
    neighborhood_axes,
    window_axes,
)
from attnlab.lab.cost import growth
from attnlab.sparse import criss_cross_attention


def full(q, k, v):
    q, k, v = (rearrange(x, "b n h w d -> b n (h w) d") for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, impl="fused")


def pattern(axes, **options):
    return partial(attend_in_stages, axes=partial(axes, **options))


# name: (operator, keys a position sees on a map of H×H, the most that time may grow as N^)
PATTERNS = {
    "full": (full, lambda H: H**2, None),
    "window 8": (pattern(window_axes), lambda H: 64, 1.15),
    "window 7, shifted": (pattern(window_axes, size=7, shift=3), lambda H: 49, 1.15),
    "neighbourhood 7": (pattern(neighborhood_axes), lambda H: 49, 1.15),
    "dilated 7 by 2": (pattern(neighborhood_axes, dilation=2), lambda H: 49, 1.15),
    "axial": (pattern(axial_axes), lambda H: 2 * H, 1.65),
    "criss-cross": (criss_cross_attention, lambda H: 2 * H - 1, 1.65),
    "interlaced, cell 8": (pattern(interlaced_axes, cell=8), lambda H: H**2 // 64 + 64, 1.65),
}


def make_step(name: str, side: int, device: str, training: bool):
    """A callable that runs the operator once on a map of side × side positions."""
    operator = PATTERNS[name][0]
    if name == "criss-cross":
        shapes = [(1, 1, side, side, d) for d in (HEADS * WIDTH // 8,) * 2 + (HEADS * WIDTH,)]
    else:
        shapes = [(1, HEADS, side, side, WIDTH)] * 3
    tensors = [torch.randn(shape, device=device, requires_grad=training) for shape in shapes]

    def step():
        with torch.set_grad_enabled(training):
            out = operator(*tensors)
            if training:
                for tensor in tensors:
                    tensor.grad = None
                out.sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 48, 64, 96])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    sides, repeats = ([16, 24], 3) if args.quick else (args.sides, 9)
    positions = [side**2 for side in sides]
    results = {"sides": sides, "positions": positions, "heads": HEADS, "head_dim": WIDTH}
    results["keys"] = {n: [keys(s) for s in sides] for n, (_, keys, _) in PATTERNS.items()}

    for training in (False, True):
        mode = "forward + backward" if training else "forward"
        times = {name: [] for name in PATTERNS}
        for side in sides:
            steps = {name: make_step(name, side, args.device, training) for name in PATTERNS}
            for name, taken in seconds(steps, repeats).items():
                times[name].append(taken)
        memory = {
            name: [
                alone(extra_memory, make_step, args.device, args.threads,
                      (name, 16, args.device, training), name, side, args.device, training)
                for side in sides
            ]
            for name in PATTERNS
        }  # fmt: skip
        results[mode] = {
            name: {
                "full_over_this": [a / b for a, b in zip(times["full"], times[name], strict=True)],
                "growth": growth(positions, times[name]),
                "most": PATTERNS[name][2],
                "bytes": memory[name],
            }
            for name in PATTERNS
        }
        print(f"\n{mode}: how many times faster than full fused attention\n")
        header = ["", *(f"N = {n:,}" for n in positions), "time grows as N^", "at most"]
        print(table([*header, "extra memory at the last, MiB"], [
            [name, *(f"{ratio:.1f}" for ratio in row["full_over_this"]), f"{row['growth']:.2f}",
             row["most"] or "", f"{row['bytes'][-1] / 2**20:.0f}"]
            for name, row in results[mode].items()
        ]))  # fmt: skip
    write("sparse", args, results)


if __name__ == "__main__":
    main()
