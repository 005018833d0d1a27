"""Explicit, fused and blockwise attention: time, memory, growth, and where "auto" should switch.

    python benchmarks/attention.py [--machine NAME] [--device cpu] [--threads 2] [--quick]

Prints Markdown tables of ratios within this run, and writes benchmarks/results/attention-NAME.json.
Memory is measured with each variant in a process of its own. Run it on a quiet machine.
"""

import torch
from _common import alone, arguments, extra_memory, seconds, table, write
from einops import rearrange

from attnlab.attention import scaled_dot_product_attention
from attnlab.lab.cost import growth

IMPLS = ("explicit", "fused", "blockwise")


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


def switch_point(sizes: list[int], ratios: list[float]) -> int | None:
    """The number of scores N² from which on fused is at most 2 % slower; None if it is not."""
    last_slower = max((N for N, r in zip(sizes, ratios, strict=True) if r < 0.98), default=0)
    faster = [N for N in sizes if last_slower < N]
    if not faster:
        return None
    return faster[0] ** 2 if last_slower else 0


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    N, heads, d, repeats = (512, 4, 32, 3) if args.quick else (4096, 4, 32, 9)
    memory_sizes = [N // 4, N // 2, N]
    sweep_sizes = [16, 64] if args.quick else [16, 32, 50, 65, 100, 128, 197, 256, 400, 577, 1024]
    results = {
        "sizes": {"N": N, "heads": heads, "head_dim": d, "batch": 1},
    }

    steps = {impl: make_step(impl, N, 1, heads, d, args.device, True) for impl in IMPLS}
    results["training_seconds"] = times = seconds(steps, repeats)
    shape = (1, heads, d, args.device, True)
    results["training_bytes"] = memory = {
        impl: [
            alone(
                extra_memory,
                make_step,
                args.device,
                args.threads,
                (impl, 32, *shape),
                impl,
                n,
                *shape,
            )
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

    write("attention", args, results)


if __name__ == "__main__":
    main()
