"""Superpixel cross-attention: nine slots against F.unfold, and SPFormer-S/32 against DeiT-T.

    python benchmarks/superpixel.py [--machine NAME] [--device cpu] [--threads 2] [--quick]

Prints Markdown tables of ratios within this run, and writes
benchmarks/results/superpixel-NAME.json. All forms have the same inputs, and their outputs are
compared before the clock starts. Run it on a quiet machine.
"""

import timm
import torch
from _common import alone, arguments, extra_memory, seconds, table, write
from torch.utils.flop_counter import FlopCounterMode

from attnlab.lab.bench_cases import exchange
from attnlab.spformer import spformer_small_patch32

FORMS = ("unfold", "explicit", "fused")  # the last two are values of `impl`
SHAPE = (8, 14, 4, 64, 384)  # SPFormer-S/16 at 224 pixels: batch, cells a side, s, C_p, C_s


def inputs(shape: tuple, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Projections of pixels and of superpixels, in cells; see `SHAPE`."""
    torch.manual_seed(0)
    batch, side, cell, pixel_dim, dim = shape
    pixels = torch.randn(batch, side, side, cell**2, 2 * pixel_dim + dim, device=device)
    superpixels = torch.randn(batch, side, side, 3 * pixel_dim, device=device)
    return pixels.requires_grad_(), superpixels.requires_grad_()


def exchange_step(form: str, shape: tuple, device: str):
    """A callable that runs one exchange, forward and backward."""
    given = inputs(shape, device)

    def step():
        for x in given:
            x.grad = None
        sum(out.sum() for out in exchange(*given, form)).backward()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def saved_bytes(form: str, shape: tuple, device: str) -> int:
    """What autograd keeps for the backward pass, each storage counted once, inputs included."""
    given, storages = inputs(shape, device), {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storages[x.untyped_storage().data_ptr()] = x  # kept alive, so that no address comes twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = exchange(*given, form)
    del outputs
    return sum(x.untyped_storage().nbytes() for x in storages.values())


def forward_step(model: torch.nn.Module, images: torch.Tensor):
    def step():
        with torch.no_grad():
            model(images)
        if images.is_cuda:
            torch.cuda.synchronize()

    return step


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    shape, batch, repeats = ((1, 4, 4, 8, 16), 1, 3) if args.quick else (SHAPE, 32, 9)

    outputs = {form: exchange(*inputs(shape, args.device), form) for form in FORMS}
    for form in FORMS[1:]:
        for out, expected in zip(outputs[form], outputs["unfold"], strict=True):
            torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    del outputs
    times = seconds({form: exchange_step(form, shape, args.device) for form in FORMS}, repeats)
    saved = {form: saved_bytes(form, shape, args.device) for form in FORMS}
    small = (1, 2, *shape[2:])
    extra = {
        form: alone(
            extra_memory, exchange_step, args.device, args.threads,
            (form, small, args.device), form, shape, args.device,
        )
        for form in FORMS
    }  # fmt: skip
    over = {
        form: {
            "faster": times["unfold"] / times[form],
            "saved_for_backward": saved[form] / saved["unfold"],
            "extra_memory": extra[form] / extra["unfold"],
        }
        for form in FORMS[1:]
    }
    results = {"shape": shape, "seconds": times, "saved_bytes": saved, "extra_bytes": extra}
    print(f"\nOne exchange, forward + backward, against F.unfold, batch {shape[0]}\n")
    print(table(["", "faster", "saved for backward", "extra memory"], [
        [form, f"{row['faster']:.1f}×", f"{row['saved_for_backward']:.3f}",
         f"{row['extra_memory']:.3f}"]
        for form, row in over.items()
    ]))  # fmt: skip

    images = torch.randn(batch, 3, 224, 224, device=args.device)
    models = {
        "SPFormer-S/32": spformer_small_patch32().to(args.device).eval(),
        "DeiT-T": timm.create_model("deit_tiny_patch16_224").to(args.device).eval(),
    }
    times = seconds({n: forward_step(model, images) for n, model in models.items()}, repeats)
    macs = {}
    for name, model in models.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images[:1])
        macs[name] = counter.get_total_flops() / 2
    ratio = {key: value["SPFormer-S/32"] / value["DeiT-T"]
             for key, value in {"time": times, "macs": macs}.items()}  # fmt: skip
    print(f"\nSPFormer-S/32 over DeiT-T, forward, batch {batch}\n")
    print(table(["time", "multiply-adds"], [[f"{ratio['time']:.2f}", f"{ratio['macs']:.2f}"]]))
    forward = {"batch": batch, "seconds": times, "macs": macs, "ratio": ratio}
    write("superpixel", args, {"exchange": results | {"over_unfold": over}, "forward": forward})


if __name__ == "__main__":
    main()
