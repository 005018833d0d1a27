"""Reversed attention: explicit, two-pass, fused and auto against each other; Lite against full.

    python benchmarks/reversed_attention.py [--machine NAME] [--device cpu] [--threads 2] [--quick]

Prints Markdown tables of ratios within this run, and writes
benchmarks/results/reversed_attention-NAME.json. On CUDA everything is in bfloat16. Memory is
measured with each form in a process of its own. Run it on a quiet machine.
"""

import torch
from _common import alone, arguments, extra_memory, seconds, table, write
from einops import rearrange

from attnlab.attention import scaled_dot_product_attention
from attnlab.dependencyvit import dependencyvit_lite_tiny, dependencyvit_tiny
from attnlab.lab.cost import growth
from attnlab.reversed_attention import FASTER_FROM, reversed_attention

FORMS = ("explicit", "two_pass", "fused", "auto")
ORDINARY = "ordinary attention, fused"


def make_step(form: str, N: int, batch: int, heads: int, d: int, device: str, training: bool):
    """A callable that sends once, forward or forward + backward, from a (B, N, 3, h, d) tensor."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    options = {"device": device, "requires_grad": training}
    qkv = torch.randn(batch, N, 3, heads, d, dtype=dtype, **options)
    selection, messages = torch.randn(batch, heads, N, **options), torch.rand(batch, N, **options)
    gradient = torch.randn(batch, heads, N, d, dtype=dtype, device=device)

    def step():
        with torch.set_grad_enabled(training):
            q, k, v = rearrange(qkv, "b n three h d -> three b h n d")
            if form == ORDINARY:
                out = scaled_dot_product_attention(q, k, v, impl="fused")
            else:
                out = reversed_attention(q, k, v, selection.softmax(1), messages, impl=form)
            if training:
                qkv.grad = None
                out.backward(gradient)
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def compare(forms: tuple[str, ...], repeats: int, *shape) -> dict[str, float]:
    """Median seconds of each form; `shape` as in `make_step`."""
    return seconds({form: make_step(form, *shape) for form in forms}, repeats)


def lite_against_full(batch: int, device: str, repeats: int) -> dict[str, float]:
    """Median seconds of one inference of the tiny models at 224 pixels."""
    images = torch.randn(batch, 3, 224, 224, device=device)
    models = {"full": dependencyvit_tiny(), "lite": dependencyvit_lite_tiny()}

    def step(model):
        def run():
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                model(images)
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    return seconds({name: step(m.to(device).eval()) for name, m in models.items()}, repeats)


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = args.device
    N, heads, d, repeats = (784, 3, 64, 3) if args.quick else (3136, 3, 64, 15)
    results = {"sizes": {"N": N, "heads": heads, "head_dim": d, "batch": 1}}

    forms = (*FORMS, ORDINARY)
    shape = (N, 1, heads, d, device)
    inference, training = (compare(forms, repeats, *shape, mode) for mode in (False, True))
    sizes = [N // 4, N // 2, N]
    memory = {}
    for form in forms:
        small = (form, 32, 1, heads, d, device, True)
        memory[form] = [
            alone(extra_memory, make_step, device, args.threads, small, form, n, *small[2:])
            for n in sizes
        ]
    results |= {
        "inference_seconds": inference,
        "training_seconds": training,
        "training_bytes": memory,
        "memory_sizes": sizes,
        "memory_growth": {form: growth(sizes, memory[form]) for form in forms},
    }
    print(f"\nN = {N}, {heads} heads of {d}, one image\n")
    header = ["form", "forward, speed over explicit", "forward + backward", "over ordinary",
              "training memory over explicit", "grows as N^"]  # fmt: skip
    print(table(header, [
        [form, f"{inference['explicit'] / inference[form]:.2f}×",
         f"{training['explicit'] / training[form]:.2f}×",
         f"{training[form] / training[ORDINARY]:.2f}",
         f"1/{memory['explicit'][-1] / memory[form][-1]:.1f}",
         f"{results['memory_growth'][form]:.2f}"]
        for form in forms
    ]))  # fmt: skip

    sweep_sizes = [64, 196] if args.quick else [64, 196, 400, 784, 2048]
    fast, switch = FASTER_FROM[device]
    results["auto"] = {"sizes": sweep_sizes, "switch": switch, "ratios": {}}
    for mode in (False, True):
        for batch, heads, d in ((8, 12, 16), (8, 12, 32), (1, 3, 64)):
            name = f"{'training' if mode else 'inference'}, batch {batch}, {heads} heads of {d}"
            rows = {f"explicit over {fast}": [], "explicit over auto": [], "auto over ordinary": []}
            for n in sweep_sizes:
                times = compare(
                    ("explicit", fast, "auto", ORDINARY), 3 if n > 500 else repeats,
                    n, batch, heads, d, device, mode,
                )  # fmt: skip
                rows[f"explicit over {fast}"].append(times["explicit"] / times[fast])
                rows["explicit over auto"].append(times["explicit"] / times["auto"])
                rows["auto over ordinary"].append(times["auto"] / times[ORDINARY])
            results["auto"]["ratios"][name] = rows
            print(f"\n{name}: ratios of times by N (auto switches at {switch:.1e} scores)\n")
            print(table(["", *sweep_sizes], [
                [row, *(f"{value:.2f}" for value in values)] for row, values in rows.items()
            ]))  # fmt: skip

    batch = 1 if args.quick else 8
    results["lite"] = taken = lite_against_full(batch, device, repeats)
    results["lite_speedup"] = taken["full"] / taken["lite"]
    print(f"\nLite over full, tiny at 224 px, batch {batch}: {results['lite_speedup']:.2f}× faster")
    write("reversed_attention", args, results)


if __name__ == "__main__":
    main()
