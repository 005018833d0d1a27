"""Attention pooling collapsed against explicit, the column against its token form, and networks.

    python benchmarks/patchconvnet.py [--machine NAME] [--device cpu] [--threads 2] [--quick]

Prints Markdown tables of ratios within this run, and writes
benchmarks/results/patchconvnet-NAME.json. All forms have the same inputs and weights, and their
outputs are compared before the clock starts. Run it on a quiet machine.

The forms of the pooling differ in how much memory they walk through, and a form is slow right after
one that filled the caches: up to three times as slow as after itself. So each is called in a row,
and the first call of a row is kept apart.
"""

import random
import statistics
import time
from collections.abc import Callable
from functools import partial

import timm
import torch
import torch.nn.functional as F
from _common import alone, arguments, extra_memory, seconds, table, write
from einops import rearrange
from torch import Tensor, nn

from attnlab.attention_pooling import IMPLS, AttentionPool
from attnlab.patchconvnet import ConvBlock, patchconvnet_s60

ROW = 0.05  # seconds for which a form of the pooling is called again and again
ONE = (16, 384, 1, 14)  # batch, width, queries, places a side
MANY = ((1, 384, 1000, 14), (16, 384, 1000, 14), (16, 64, 300, 8), (16, 384, 8, 14))
NETWORKS = {  # of about 25 million parameters
    "PatchConvNet-S60": patchconvnet_s60,
    "XCiT-S12/16": lambda: timm.create_model("xcit_small_12_p16_224"),
    "Swin-T": lambda: timm.create_model("swin_tiny_patch4_window7_224"),
}


def synchronized(step, device: str):
    """`step`, waiting for the device."""

    def run():
        step()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def in_rows(steps: dict[str, Callable], repeats: int) -> dict[str, dict[str, float]]:
    """Seconds of a call among its like, "median" and "least" of the rows; "first": after another.

    The steps take turns, in an order drawn anew for each round. A turn is a first call, then a row
    of calls that lasts about `ROW` seconds.
    """

    def duration(step: Callable, least: float) -> float:
        calls, start = 0, time.perf_counter()
        while calls == 0 or time.perf_counter() - start < least:
            step()
            calls += 1
        return (time.perf_counter() - start) / calls

    for step in steps.values():
        step()
    order, shuffle = list(steps), random.Random(0).shuffle
    firsts, rows = ({name: [] for name in steps} for _ in range(2))
    for _ in range(repeats):
        shuffle(order)
        for name in order:
            firsts[name].append(duration(steps[name], 0.0))
            rows[name].append(duration(steps[name], ROW))
    return {
        name: {
            "median": statistics.median(rows[name]),
            "least": min(rows[name]),
            "first": statistics.median(firsts[name]),
        }
        for name in steps
    }


def pooling_steps(shape: tuple, device: str, backward: bool) -> tuple[dict, dict]:
    """A step of each form: the attention after the LayerNorm, and the whole pooling block."""
    batch, dim, queries, side = shape
    torch.manual_seed(0)
    pool = AttentionPool(dim, queries, init_values=0.1).to(device)
    x = torch.randn(batch, dim, side, side, device=device)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_(backward)
    c, z = (t.detach().requires_grad_(backward) for t in pool._normalized(x))

    def step(impl: str, function, *inputs):
        def run():
            pool.impl = impl
            for x in inputs:
                x.grad = None
            pool.zero_grad()
            with torch.set_grad_enabled(backward):
                out = function(*inputs)
            if backward:
                out.sum().backward()

        return synchronized(run, device)

    expected = {}
    for impl in IMPLS:
        pool.impl = impl
        for name, out in (("attention", pool._attend(c, z)), ("block", pool.tokens(x))):
            torch.testing.assert_close(out, expected.setdefault(name, out), atol=1e-4, rtol=1e-4)
    attention = {impl: step(impl, pool._attend, c, z) for impl in IMPLS}
    return attention, {impl: step(impl, pool.tokens, x) for impl in IMPLS}


def token_block(block: ConvBlock, tokens: Tensor, height: int, copies: bool) -> Tensor:
    """`ConvBlock` as the authors write it: tokens `(B, N, d)`, brought to a map and back.

    The map is a view of the tokens, and so in channels-last memory, unless `copies`.
    """
    u = nn.LayerNorm.forward(block.norm, tokens)
    u = rearrange(u, "b (h w) d -> b d h w", h=height)
    a = F.gelu(block.conv2(F.gelu(block.conv1(u.contiguous() if copies else u))))
    s = block.se.fc2(F.relu(block.se.fc1(a.mean((2, 3), keepdim=True))))
    a = rearrange(block.conv3(a * s.sigmoid()), "b d h w -> b (h w) d")
    return tokens + block.gamma * (a.contiguous() if copies else a)


def column_steps(batch: int, dim: int, depth: int, side: int, device: str) -> dict:
    """Forward and backward of the column, on maps and on tokens."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(ConvBlock(dim, init_values=0.1) for _ in range(depth)).to(device)
    x = torch.randn(batch, dim, side, side, device=device)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    tokens = rearrange(x.detach(), "b d h w -> b (h w) d").contiguous().requires_grad_()

    def on_maps() -> Tensor:
        out = x
        for block in blocks:
            out = block(out)
        return out

    def on_tokens(copies: bool) -> Tensor:
        out = tokens
        for block in blocks:
            out = token_block(block, out, side, copies)
        return rearrange(out, "b (h w) d -> b d h w", h=side)

    forms = {
        "tokens, copied": partial(on_tokens, True),
        "tokens, viewed": partial(on_tokens, False),
        "maps": on_maps,
    }
    with torch.no_grad():
        for form in forms.values():
            torch.testing.assert_close(form(), on_maps(), atol=1e-4, rtol=1e-4)

    def step(forward):
        def run():
            x.grad = tokens.grad = None
            blocks.zero_grad()
            forward().sum().backward()

        return synchronized(run, device)

    return {name: step(form) for name, form in forms.items()}


def network_step(name: str, batch: int, size: int, device: str):
    """A callable that runs a network forward."""
    model = NETWORKS[name]().to(device).eval()
    images = torch.randn(batch, 3, size, size, device=device)

    def run():
        with torch.no_grad():
            model(images)

    return synchronized(run, device)


def print_pooling(results: dict) -> None:
    print("\nForms of attention pooling: how much faster than explicit, in a row of the same")
    print("(median row, fastest row; first call after another form)\n")
    others = [impl for impl in IMPLS if impl != "explicit"]

    def faster(times: dict, impl: str) -> str:
        ratio = {kind: times["explicit"][kind] / spent for kind, spent in times[impl].items()}
        return f"{ratio['median']:.1f}× ({ratio['least']:.1f}×; {ratio['first']:.1f}×)"

    rows = [[key, *(faster(times, impl) for impl in others)] for key, times in results.items()]
    print(table(["batch, width, queries, side", *others], rows))


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    quick, device = args.quick, args.device
    repeats = 3 if quick else 9

    pooling = {}
    for shape in [(2, 8, 1, 3), (2, 8, 20, 3)] if quick else [ONE, *MANY]:
        for backward in (False, True):
            parts = pooling_steps(shape, device, backward)
            for part, steps in zip(("attention", "block"), parts, strict=True):
                key = f"{shape}, {part}, forward{' + backward' * backward}"
                pooling[key] = in_rows(steps, repeats)
    print_pooling(pooling)

    shape = batch, dim, depth, side = (2, 16, 2, 4) if quick else (8, 384, 60, 14)
    column = seconds(column_steps(*shape, device), repeats)
    ratio = {form: column[form] / column["maps"] for form in column if form != "maps"}
    print(f"\nColumn of {depth} blocks, width {dim}, batch {batch}, {side}×{side} places:")
    print("how much faster maps are, forward + backward\n")
    print(table(list(ratio), [[f"{value:.2f}×" for value in ratio.values()]]))

    networks = {}
    for batch in (2,) if quick else (4, 16, 64):
        steps = {name: network_step(name, batch, 224, device) for name in NETWORKS}
        times = seconds(steps, 1 if quick else 5)
        del steps
        for name in NETWORKS:
            memory = alone(
                extra_memory, network_step, device, args.threads,
                (name, 1, 224, device), name, batch, 224, device,
            )  # fmt: skip
            row = {"images_per_second": batch / times[name], "extra_bytes": memory}
            networks.setdefault(name, {})[batch] = row
    print("\nForward at 224 pixels: images a second, and memory beyond weights and images\n")
    print(table(["", *(f"batch {batch}" for batch in networks["Swin-T"])], [
        [name, *(f"{row['images_per_second']:.1f}/s, {row['extra_bytes'] / 2**20:.0f} MiB"
                 for row in rows.values())]
        for name, rows in networks.items()
    ]))  # fmt: skip
    write("patchconvnet", args, {
        "pooling_seconds": pooling, "networks": networks,
        "column": {"shape": shape, "seconds": column, "ratio": ratio},
    })  # fmt: skip


if __name__ == "__main__":
    main()
