"""Video: local attention against two loops, and Deep Feature Flow against its formula.

    python benchmarks/video.py [--machine NAME] [--device cpu] [--threads 2] [--quick]

Prints Markdown tables of ratios within this run, and writes benchmarks/results/video-NAME.json.
All forms of local attention have the same inputs, and their outputs are compared before the clock
starts. Each is called in a row with itself, and the first call of a row is not counted: what comes
right after `F.unfold`, which fills the caches, would be slow for it. The formula's ratio is put
together from parts that are measured in the same rounds as the streams it is compared with. Run it
on a quiet machine.
"""

import statistics

import torch
from _common import alone, arguments, extra_memory, seconds, table, write
from torch import nn

from attnlab.lab.bench_measure import take_turns
from attnlab.resnet import resnet50
from attnlab.video import DeepFeatureFlow, FlowNet, dff_speedup, local_attention_warp, warp

FORMS = {"shift loop": "explicit", "unfold": "unfold", "tiles": "fused", "auto": "auto"}
COMPARED = ("shift loop", "unfold", "tiles")  # at the radius below, with memory
RADIUS = 4
RADII = (1, 2, 3, 4, 6)  # where auto has to choose between the loop and tiles
ROW = 0.05  # seconds for which a form is called again and again
INTERVALS = (2, 5, 10)
CHANNELS = 2048  # of ResNet-50's last map


def maps(channels: int, side: int, device: str) -> list[torch.Tensor]:
    """Query, key and value, `(1, channels, side, side)`."""
    torch.manual_seed(0)
    shape = (1, channels, side, side)
    return [torch.randn(shape, device=device, requires_grad=True) for _ in range(3)]


def attention_step(
    form: str, channels: int, side: int, device: str, backward: bool = True, radius: int = RADIUS
):
    """A callable that runs one local attention, forward, or forward and backward."""
    given = maps(channels, side, device)

    def step():
        for x in given:
            x.grad = None
        with torch.set_grad_enabled(backward):
            out = local_attention_warp(*given, radius, impl=FORMS[form])
        if backward:
            out.sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def medians(forms: tuple[str, ...], repeats: int, *options) -> dict[str, float]:
    """Median seconds of a call of each form; `options` as in `attention_step`."""
    steps = {form: attention_step(form, *options) for form in forms}
    times = take_turns(steps, least=repeats, row=ROW)
    return {form: statistics.median(values) for form, values in times.items()}


def compare_forms(channels: int, side: int, repeats: int, args) -> dict:
    """Times and memory of each form, and how much better tiles are."""
    given = [x.detach() for x in maps(channels, side, args.device)]
    outputs = {form: local_attention_warp(*given, RADIUS, impl=FORMS[form]) for form in COMPARED}
    for out in outputs.values():
        torch.testing.assert_close(out, outputs["unfold"], atol=1e-4, rtol=1e-4)
    del outputs
    place = (channels, side, args.device)
    forward = medians(COMPARED, repeats, *place, False)
    both = medians(COMPARED, repeats, *place)
    extra = {
        form: alone(
            extra_memory, attention_step, args.device, args.threads, (form, 8, 16, args.device),
            form, *place,
        )
        for form in COMPARED
    }  # fmt: skip
    return {
        "forward_seconds": forward,
        "forward_backward_seconds": both,
        "extra_bytes": extra,
        "tiles_over": {
            form: {
                "forward": forward[form] / forward["tiles"],
                "forward_backward": both[form] / both["tiles"],
                "memory": extra["tiles"] / extra[form],
            }
            for form in ("shift loop", "unfold")
        },
    }


def sweep_radius(channels: int, side: int, repeats: int, device: str) -> dict:
    """Seconds of the loop, of tiles and of auto: `{radius: {"forward": {form: seconds}, …}}`."""
    forms = ("shift loop", "tiles", "auto")
    return {
        radius: {
            "forward": medians(forms, repeats, channels, side, device, False, radius),
            "forward_backward": medians(forms, repeats, channels, side, device, True, radius),
        }
        for radius in RADII
    }


def choice(times: dict[str, float]) -> tuple[str, str]:
    """The loop's time over that of tiles, and auto's over the shorter, for the table."""
    loop, tiles, auto = times["shift loop"], times["tiles"], times["auto"]
    return f"{loop / tiles:.2f}×", f"{auto / min(loop, tiles):.2f}"


def stream_step(model: DeepFeatureFlow, frames: list[torch.Tensor], interval: int):
    """A callable that runs a whole video."""

    def step():
        model.reset()
        model.interval = interval
        for frame in frames:
            model.step(frame)
        if frames[0].is_cuda:
            torch.cuda.synchronize()

    return step


def part_steps(model: DeepFeatureFlow, frame: torch.Tensor, key: torch.Tensor) -> dict:
    """The parts of a frame's cost, each a callable."""
    with torch.no_grad():
        features = model.backbone(key)
        flow, scale = model.propagate.fields(frame, key, features.shape[2:])
    parts = {
        "backbone": lambda: model.backbone(frame),
        "flow": lambda: model.propagate.fields(frame, key, features.shape[2:]),
        "warp": lambda: warp(features, flow) * scale,
        "head": lambda: model.head(features),
    }

    def without_gradients(part):
        def step():
            with torch.no_grad():
                part()
            if frame.is_cuda:
                torch.cuda.synchronize()

        return step

    return {name: without_gradients(part) for name, part in parts.items()}


def compare_speedup(side: int, repeats: int, device: str) -> dict:
    """Seconds of the parts and of streams of ten frames; measured speed-up and the formula's."""
    torch.manual_seed(0)
    backbone = _Features()
    head = nn.Sequential(nn.Conv2d(CHANNELS, 19, 1), nn.Upsample(scale_factor=16, mode="bilinear"))
    model = DeepFeatureFlow(backbone, head, FlowNet(), CHANNELS).to(device).eval()
    frames = list(torch.rand(10, 1, 3, side, side, device=device))
    streams = {f"every {n}": stream_step(model, frames, n) for n in (1, *INTERVALS)}
    times = seconds(part_steps(model, frames[1], frames[0]) | streams, repeats)
    ratio = (times["flow"] + times["warp"] + times["head"]) / (times["backbone"] + times["head"])
    speedup = {
        n: {"measured": times["every 1"] / times[f"every {n}"], "formula": dff_speedup(n, ratio)}
        for n in INTERVALS
    }
    return {"side": side, "seconds": times, "ratio": ratio, "speedup": speedup}


class _Features(nn.Module):
    """ResNet-50's last map at stride 16."""

    def __init__(self):
        super().__init__()
        self.net = resnet50(num_classes=0, output_stride=16)

    def forward(self, frame: torch.Tensor) -> torch.Tensor:
        return self.net.forward_features(frame)


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    side, image, repeats = (16, 64, 3) if args.quick else (64, 256, 9)
    widths = (8, 16) if args.quick else (64, 256)

    attention = {channels: compare_forms(channels, side, repeats, args) for channels in widths}
    print(f"\nLocal attention in tiles, radius {RADIUS}, {side}×{side} cells\n")
    print(table(["C", "against", "forward", "forward + backward", "peak memory"], [
        [channels, form, f"{row['forward']:.1f}×", f"{row['forward_backward']:.1f}×",
         f"{row['memory']:.3f}"]
        for channels, result in attention.items() for form, row in result["tiles_over"].items()
    ]))  # fmt: skip

    sweep = {channels: sweep_radius(channels, side, repeats, args.device) for channels in widths}
    print("\nThe shift loop over tiles, in time, and auto over the faster of the two\n")
    parts = ("forward", "forward_backward")
    print(table(["C", "radius", "forward", "auto", "forward + backward", "auto"], [
        [channels, radius, *(text for part in parts for text in choice(times[part]))]
        for channels, by_radius in sweep.items() for radius, times in by_radius.items()
    ]))  # fmt: skip

    flow = compare_speedup(image, repeats, args.device)
    print(f"\nDeep Feature Flow, ResNet-50 at stride 16, {image} px, r = {flow['ratio']:.3f}\n")
    print(table(["key frame every", "measured", "formula", "measured / formula"], [
        [interval, f"{row['measured']:.2f}×", f"{row['formula']:.2f}×",
         f"{row['measured'] / row['formula']:.2f}"]
        for interval, row in flow["speedup"].items()
    ]))  # fmt: skip
    results = {"local_attention": attention, "radius_sweep": sweep, "deep_feature_flow": flow}
    write("video", args, results)


if __name__ == "__main__":
    main()
