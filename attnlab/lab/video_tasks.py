"""Tasks on clips (chapter 07): a class for every pixel, boxes, and the flow, frame by frame.

A video model is a backbone, something that carries its features from frame to frame, and a head
(`attnlab.video`); small ones for the bundled clips are in `video_models`. Here are losses for
`train.fit`, and scores:

    fit(model, clips, loss=partial(pair_loss, reach=0))      # single frames
    fit(flow_net, clips, loss=partial(flow_loss, reach=5))   # the flow, by the exact one
    with frozen(model.backbone):                             # or nothing, or the flow network
        fit(model, clips, loss=partial(pair_loss, reach=5))  # the task, through the propagation
    segmentation_scores(answers_at(model, test, offset=5))
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlab.lab import data
from attnlab.lab.arguments import require, whole
from attnlab.lab.batches import fetch
from attnlab.lab.data.clips import flow_between
from attnlab.lab.data.samples import Batch, Samples
from attnlab.lab.detection import average_precision_by, mean_average_precision
from attnlab.lab.metrics import confusion_matrix, mean_iou
from attnlab.lab.video_models import DetectionHead as DetectionHead
from attnlab.lab.video_models import SegmentationHead as SegmentationHead
from attnlab.lab.video_models import clip_backbone as clip_backbone
from attnlab.video import resize_flow

SPEEDS = {"slow": (0.0, 2.0), "medium": (2.0, 3.0), "fast": (3.0, float("inf"))}  # px a frame
IGNORED = 255


def load_clips(split: str = "train", n: int | None = None, **options) -> Samples:
    """The bundled clips (`data.load`) as they are stored: flow is derived where it is needed."""
    clips = data.load("clips", split, n, **options)
    return Samples(clips.tensors, classes=clips.classes, name=clips.name, split=clips.split)


def frame_at(batch: Batch, t: int) -> dict[str, Any]:
    """Frame `t` of a batch of clips, and what is to be said about it.

    Returns:
        image `(B, 3, H, W)`; classes `(B, H, W)`, 0 for the background, n + 1 for `OBJECTS[n]`;
        objects, for each image the `boxes (M, 4)`, `labels (M,)` and `speed (M,)`, in px a frame,
        of the objects that it shows.

    Raises:
        ValueError: the clips have no such frame.
    """
    owner, labels = batch["owner"].long(), batch["labels"].long()
    last = owner.shape[1] - 1
    require(0 <= t <= last, "t", t, f"the number of a frame, 0 to {last}")
    names = F.pad(labels + 1, (1, 0))  # of each layer, the background first
    sample = torch.arange(len(owner), device=owner.device)[:, None, None]
    boxes = batch["boxes"][:, :, t].float()
    speed = batch["velocity"][:, 1:].float().norm(dim=-1)
    objects = [
        {"boxes": boxes[n][shown], "labels": labels[n][shown], "speed": speed[n][shown]}
        for n, shown in enumerate((boxes[..., 2:] > boxes[..., :2]).all(-1))
    ]
    return {
        "image": batch["image"][:, :, t],
        "classes": names[sample, owner[:, t]],
        "objects": objects,
    }


def draw_pair(frames: int, reach: int) -> tuple[int, int]:
    """A frame i and a key frame k ≤ i of clips of `frames` frames; i − k is uniform in 0 … reach.

    Draws from torch's global generator, which `train.fit` seeds at each step.
    """
    require(0 <= reach < frames, "reach", reach, f"0 to {frames - 1}, the clips' frames less one")
    offset = int(torch.randint(reach + 1, ()))
    key = int(torch.randint(frames - offset, ()))
    return key + offset, key


def pair_loss(model: nn.Module, batch: Batch, reach: int = 5, area_weight: float = 2.0) -> Tensor:
    """The loss of the task at a frame, from features carried there from a key frame before it.

    One pair is drawn for the whole batch; with `reach=0` the model sees single frames.

    Args:
        model: `model(frame, key)` → its `head`'s outputs, or (outputs, area) where area is the
            share that was computed anew. One with a `memory` gets an earlier key frame too.
        batch: clips of `attnlab.lab.data`.
        reach: most frames from the key frame to the frame, and from the earlier key frame to it.
        area_weight: λ of sparse recursive aggregation.
    """
    images = batch["image"]
    i, k = draw_pair(images.shape[2], reach)
    frames = [images[:, :, i], images[:, :, k]]
    if getattr(model, "memory", None) is not None:
        frames.append(images[:, :, int(torch.randint(max(0, k - reach), k + 1, ()))])
    outputs, area = model(*frames), 0.0
    if isinstance(outputs, tuple):
        outputs, area = outputs
    return model.head.loss(outputs, frame_at(batch, i)) + area_weight * area


def clip_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of the task at a random frame of clips; `model(clip, index)` aggregates the others.

    For `FlowGuidedAggregation`, which draws the neighbors that it sees in training.
    """
    index = int(torch.randint(batch["image"].shape[2], ()))
    return model.head.loss(model(batch["image"], index), frame_at(batch, index))


def flow_loss(flow_net: nn.Module, batch: Batch, reach: int = 5) -> Tensor:
    """Mean √(|flow − exact|² + 10⁻⁶), in px, over the cells whose content both frames show.

    One pair of frames, up to `reach` apart and in either order, is drawn for the batch.
    `flow_net(frame, key)` → `(B, 2, h, w)` in cells, h and w divisors of the clips' sides.
    """
    i, k = draw_pair(batch["owner"].shape[1], reach)
    if torch.rand(()) < 0.5:
        i, k = k, i
    flow = flow_net(batch["image"][:, :, i], batch["image"][:, :, k])
    gap, visible, _ = _flow_gap(flow, batch, i, k)
    return (gap.square().sum(1) + 1e-6).sqrt()[visible].sum() / visible.sum().clamp(min=1)


def _flow_gap(flow: Tensor, batch: Batch, i: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """At the cells' centers: flow less exact flow, px; what both frames show; the layer."""
    exact, visible = flow_between(batch, i, k)
    (height, width), (rows, columns) = exact.shape[2:], flow.shape[2:]
    gap = flow - resize_flow(exact, (rows, columns))
    down, across = height // rows, width // columns
    visible, owner = (
        values[:, down // 2 :: down, across // 2 :: across]
        for values in (visible, batch["owner"][:, i])
    )
    return gap * gap.new_tensor([across, down])[:, None, None], visible, owner


@contextmanager
def frozen(*parts: nn.Module) -> Iterator[None]:
    """Train the rest: inside, `parts` get no gradients, and stay in eval mode when they run."""
    was = [(p, p.requires_grad) for part in parts for p in part.parameters()]
    hooks = [
        module.register_forward_pre_hook(_stay_in_eval)
        for part in parts
        for module in part.modules()
    ]
    for parameter, _ in was:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, required in was:
            parameter.requires_grad_(required)
        for hook in hooks:
            hook.remove()


def _stay_in_eval(module: nn.Module, _: Any) -> None:
    module.eval()


class Answer(NamedTuple):
    """What a model said about frame `frame` of a batch; `key`: the frame that it came from."""

    output: Any
    batch: Batch
    frame: int
    key: int | None = None


def answers_at(
    model: Callable, samples: Samples, offset: int, frame: int | None = None, batch_size: int = 32
) -> Iterator[Answer]:
    """`model(frame, key)` for every clip, `offset` frames after the key frame.

    Of (output, area), the output. A function in place of a module is called as it is: put what it
    calls into eval mode.

    Args:
        frame: the number of the frame, the last one by default: the same for every offset, so that
            all offsets are asked about the same pictures.

    Raises:
        ValueError: the clips do not reach so far back.
    """
    frames = samples.tensors["image"].shape[2]
    i = frames - 1 if frame is None else frame
    require(0 <= i < frames, "frame", frame, f"0 to {frames - 1}")
    require(0 <= offset <= i, "offset", offset, f"0 to {i}, the number of the frame")
    for batch in _in_batches(model, samples, batch_size):
        images = batch["image"]
        with torch.no_grad():
            output = model(images[:, :, i], images[:, :, i - offset])
        output = output[0] if isinstance(output, tuple) else output
        yield Answer(output, batch, i, i - offset)


def stream(model: nn.Module, frames: Iterable[Tensor]) -> Iterator[Any]:
    """The head's output for each frame `(B, 3, H, W)`, in order, from `model.step`.

    A model that looks ahead answers late, and is asked for its last answers at the end.
    """
    model.reset()
    for frame in frames:
        output = model.step(frame)
        if output is not None:
            yield output
    if hasattr(model, "flush"):
        yield from model.flush()


def answers_streaming(model: nn.Module, samples: Samples, batch_size: int = 32) -> Iterator[Answer]:
    """`model.step` for every frame of every clip: what the model delivers when it is used."""
    for batch in _in_batches(model, samples, batch_size):
        for t, output in enumerate(stream(model, batch["image"].unbind(2))):
            yield Answer(output, batch, t)


def _in_batches(model: Any, samples: Samples, batch_size: int) -> Iterator[Batch]:
    """The samples where the model is, which is in eval mode meanwhile."""
    whole(1, batch_size=batch_size)
    module = model if isinstance(model, nn.Module) else nn.Identity()
    device = next((p.device for p in module.parameters()), samples.device)
    was_training = module.training
    module.eval()
    try:
        for indices in torch.arange(len(samples)).split(batch_size):
            yield fetch(samples, indices, device)
    finally:
        module.train(was_training)


def segmentation_scores(answers: Iterable[Answer]) -> dict[str, float]:
    """Mean IoU over all pixels, over those that the key frame shows too, and over the others.

    Args:
        answers: their outputs are logits `(B, classes, H, W)`.

    Returns:
        `all`, and where the answers have a key frame `visible` and `hidden` (if there are any).
    """
    counts = {"all": 0, "visible": 0, "hidden": 0}
    for output, batch, frame, key in answers:
        target = frame_at(batch, frame)["classes"]
        regions = {"all": torch.ones_like(target, dtype=torch.bool)}
        if key is not None:
            visible = flow_between(batch, frame, key)[1]
            regions |= {"visible": visible, "hidden": ~visible}
        for name, region in regions.items():
            seen = target.masked_fill(~region, IGNORED)
            counts[name] += confusion_matrix(output.argmax(1), seen, output.shape[1], IGNORED)
    return {
        name: mean_iou(count)
        for name, count in counts.items()
        if isinstance(count, Tensor) and count.any()
    }


def detection_scores(
    answers: Iterable[Answer], groups: Mapping[str, tuple[float, float]] = SPEEDS
) -> dict[str, float]:
    """Mean average precision at IoU 0.5 of all objects, and of those of each speed.

    Args:
        answers: their outputs are lists of detections, as a `DetectionHead` gives.
        groups: name → (least, below) speed in the image, px a frame.

    Returns:
        `all`, and a score for each group, NaN where it has no object.
    """
    predictions, targets = [], []
    for output, batch, frame, _ in answers:
        predictions += output
        targets += frame_at(batch, frame)["objects"]
    by_speed = average_precision_by(groups, "speed", predictions, targets)
    return {"all": mean_average_precision(predictions, targets), **by_speed}


def flow_scores(
    flow_net: Callable,
    samples: Samples,
    offset: int,
    frame: int | None = None,
    batch_size: int = 32,
) -> dict[str, float]:
    """End-point error of `flow_net(frame, key)`, mean |flow − exact| in px of the image.

    Over the cells whose content both frames show: all of them (`visible`), and those on objects
    (`objects`), which are few: zero flow scores well on a background that hardly moves. `frame` as
    in `answers_at`.
    """
    errors = {"visible": [], "objects": []}
    for flow, batch, i, k in answers_at(flow_net, samples, offset, frame, batch_size):
        gap, visible, owner = _flow_gap(flow, batch, i, k)
        error = gap.norm(dim=1)
        errors["visible"].append(error[visible])
        errors["objects"].append(error[visible & (owner > 0)])
    return {name: float(torch.cat(parts).mean()) for name, parts in errors.items()}
