"""Blocks for ConvNets: ours against timm's, non-local fused against explicit, CGNL's growth.

    python benchmarks/blocks.py [--machine NAME] [--device cpu] [--threads 2] [--quick]

Prints Markdown tables of ratios within this run, and writes benchmarks/results/blocks-NAME.json.
Ours and timm's have the same weights, and their outputs are compared before the clock starts.
Run it on a quiet machine.
"""

import statistics

import torch
from _common import alone, arguments, extra_memory, seconds, table, write
from timm.layers.cbam import CbamModule
from timm.layers.non_local_attn import NonLocalAttn
from timm.layers.selective_kernel import SelectiveKernel as TimmSelectiveKernel
from timm.layers.squeeze_excite import SEModule
from torch import nn

from attnlab.cbam import CBAM
from attnlab.cgnl import CGNLBlock
from attnlab.channel import SelectiveKernel, SqueezeExcite
from attnlab.lab.cost import growth
from attnlab.non_local import NonLocalBlock

STAGES = ((256, 56), (512, 28), (1024, 14), (2048, 7))  # ResNet-50 at 224 pixels: channels, side


Pair = tuple[nn.Module, nn.Module, int]  # ours, timm's, the channels of their input


def squeeze_excite(channels: int) -> Pair:
    return SqueezeExcite(channels), SEModule(channels, rd_divisor=1), channels


def cbam(channels: int) -> Pair:
    return CBAM(channels, mlp_bias=False), CbamModule(channels), channels


def selective_kernel(channels: int) -> Pair:
    width = channels // 2  # of a ResNeXt-50 32×4d in a stage with this many channels
    theirs = TimmSelectiveKernel(
        width, rd_channels=max(width // 16, 32), groups=32, split_input=False
    )
    return SelectiveKernel(width), theirs, width


def non_local(channels: int) -> Pair:
    ours = NonLocalBlock(channels, use_scale=channels**-0.5)
    return ours, NonLocalAttn(channels, rd_channels=channels // 2), channels


PAIRS = {
    "SE": squeeze_excite,
    "CBAM": cbam,
    "SK": selective_kernel,
    "non-local, embedded Gaussian": non_local,
}


def step_of(module: nn.Module, x: torch.Tensor, training: bool):
    """A callable that runs `module(x)`, with backward for `training`."""

    def step():
        with torch.set_grad_enabled(training):
            out = module(x)
            if training:
                x.grad = None
                module.zero_grad()
                out.sum().backward()
        if x.is_cuda:
            torch.cuda.synchronize()

    return step


def against_timm(make, batch: int, stages, device: str, repeats: int) -> list[float]:
    """Our time over timm's, forward and backward, one number a stage."""
    ratios = []
    for channels, side in stages:
        torch.manual_seed(0)
        ours, theirs, width = make(channels)
        ours, theirs = ours.to(device), theirs.to(device)
        with torch.no_grad():
            for parameter in theirs.parameters():  # a norm at 0 would hide all differences
                parameter.normal_(std=0.05)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        x = torch.randn(batch, width, side, side, device=device, requires_grad=True)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-3)
        steps = {"ours": step_of(ours, x, True), "timm": step_of(theirs, x, True)}
        times = seconds(steps, repeats)
        ratios.append(times["ours"] / times["timm"])
    return ratios


def non_local_step(impl: str, channels: int, side: int, device: str, training: bool):
    """The block on one map, its embeddings' width half its channels."""
    block = NonLocalBlock(channels, impl=impl).to(device)
    x = torch.randn(1, channels, side, side, device=device, requires_grad=training)
    return step_of(block, x, training)


def growing(name: str, channels: int, sides: list[int], device: str, repeats: int) -> list[float]:
    """Seconds of forward and backward for maps of these sides, a block a row of the table."""
    block = {"non-local": NonLocalBlock, "CGNL": CGNLBlock}[name](channels).to(device)
    times = []
    for side in sides:
        x = torch.randn(1, channels, side, side, device=device, requires_grad=True)
        times.append(seconds({name: step_of(block, x, True)}, repeats)[name])
    return times


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    batch, repeats = (1, 3) if args.quick else (8, 15)
    stages = [(32, 8), (64, 4)] if args.quick else STAGES
    results = {"stages": stages, "batch": batch}

    measured = {
        name: against_timm(make, batch, stages, args.device, repeats)
        for name, make in PAIRS.items()
        if not (args.quick and name == "SK")  # 32 groups do not divide the tiny widths
    }
    results["ours_over_timm"] = measured
    print("\nOur time over timm's, forward + backward, the same weights\n")
    print(table(["", *(f"{c} × {s}²" for c, s in stages), "median"], [
        [name, *(f"{ratio:.2f}" for ratio in ratios), f"{statistics.median(ratios):.2f}"]
        for name, ratios in measured.items()
    ]))  # fmt: skip

    channels, side = (32, 16) if args.quick else (256, 64)
    compared = {}
    for training in (False, True):
        shape = (channels, side, args.device, training)
        small = (channels, 4, args.device, training)
        impls = ("explicit", "fused")
        times = seconds({impl: non_local_step(impl, *shape) for impl in impls}, repeats)
        memory = {}
        for impl in impls:
            sizes = ((impl, *small), impl, *shape)
            memory[impl] = alone(extra_memory, non_local_step, args.device, args.threads, *sizes)
        compared["forward + backward" if training else "forward"] = {
            "speedup": times["explicit"] / times["fused"],
            "memory_ratio": memory["fused"] / memory["explicit"],
            "bytes": memory,
        }
    results["non_local_fused"] = {"channels": channels, "side": side, **compared}
    print(f"\nNon-local block, {side}×{side} positions, C = {channels}: fused over explicit\n")
    print(table(["", "faster", "extra memory"], [
        [mode, f"{row['speedup']:.2f}×", f"{row['memory_ratio']:.2f}"]
        for mode, row in compared.items()
    ]))  # fmt: skip

    sides = [8, 16] if args.quick else [32, 45, 64]
    positions = [side**2 for side in sides]
    grown = {n: growing(n, channels, sides, args.device, repeats) for n in ("non-local", "CGNL")}
    results["growth"] = {
        "positions": positions,
        "non_local_over_cgnl": [a / b for a, b in zip(*grown.values(), strict=True)],
        "over_first": {name: [t / times[0] for t in times] for name, times in grown.items()},
        "exponent": {name: growth(positions, times) for name, times in grown.items()},
    }
    ratios = {
        "non-local over CGNL": results["growth"]["non_local_over_cgnl"],
        **{f"{n}, over N = {positions[0]}": r for n, r in results["growth"]["over_first"].items()},
    }
    print(f"\nTime of CGNL and of the non-local block, C = {channels}, forward + backward\n")
    print(table(["N", *positions], [
        [name, *(f"{ratio:.2f}" for ratio in row)] for name, row in ratios.items()
    ]))  # fmt: skip
    write("blocks", args, results)


if __name__ == "__main__":
    main()
