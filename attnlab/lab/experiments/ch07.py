"""Experiments of chapter 07: features carried from frame to frame, by flow and by attention.

Each function trains small models at one budget and returns `{row: {metric: value}}` for one seed;
`attnlab results` runs it over several seeds and writes `results/07_video.NAME.json`. Things are to
be told from background, on clips whose photographs were not trained on. Every offset is asked about
the last frame of a clip, so that all of them see the same pictures.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnlab.lab import batches, checkpoints, train, video_models, video_tasks
from attnlab.lab.data import Samples
from attnlab.lab.data.clips import flow_between
from attnlab.lab.video_tasks import Answer, answers_at
from attnlab.video import (
    AttentionWarp,
    Embedding,
    FlowGuidedAggregation,
    FlowNet,
    FlowWarp,
    FrameAggregator,
    KeyFrameModel,
    LocallyWeightedNeighbors,
    SparseRecursiveAggregation,
    StaleCopy,
    attention_to_flow,
    local_correlation,
    resize_flow,
    warp,
)

CHAPTER = "07_video"
RERUN = ("speeds", "stale copy")

WIDTH, SHALLOW = 64, 48  # channels of the features, and of the first two layers
FRAMES = 9
REACH = FRAMES - 1  # the largest offset, in training and in the tables
OFFSETS = (1, 2, 4, 8)


def clips(split: str, n: int, **options) -> Samples:
    """64-pixel clips of nine frames with two things, all of them of one class."""
    given = {"frames": FRAMES, "objects": 2, "scale": (0.35, 0.55), "speed": (0, 4), **options}
    tensors = video_tasks.load_clips(split, n, **given).tensors
    tensors = {**tensors, "labels": tensors["labels"].clamp(max=0)}
    return Samples(tensors, classes=("thing",), name="clips", split=split)


WAYS: dict[str, Callable[[], nn.Module]] = {
    "stale copy": StaleCopy,
    "learned flow": lambda: FlowWarp(FlowNet(), WIDTH),
    "local attention": lambda: AttentionWarp(4),
    "progressive": lambda: AttentionWarp(4, pattern="progressive"),
    "LWDN": lambda: LocallyWeightedNeighbors(),
    "full attention": lambda: AttentionWarp(None),
}
BY_IMAGES = ("stale copy", "learned flow")  # the other ways compare shallow features


class ClipModel(nn.Module):
    """A model of single frames, and `WAYS` to carry its features from a key frame to another.

    Args:
        head: "segmentation": `(B, 3, H, W)` → logits `(B, 2, H, W)` | "detection": → boxes.
    """

    def __init__(self, head: str = "segmentation"):
        super().__init__()
        self.backbone = video_models.clip_backbone(WIDTH)
        heads = {
            "segmentation": lambda: video_models.SegmentationHead(WIDTH, 2),
            "detection": lambda: video_models.DetectionHead(WIDTH, 1),
        }
        self.head = heads[head]()
        self.carriers = nn.ModuleDict({name: make() for name, make in WAYS.items()})
        self.embeddings = nn.ModuleDict(
            {
                name: Embedding(self.backbone.shallow, SHALLOW, SHALLOW)
                for name in WAYS
                if name not in BY_IMAGES
            }
        )

    def forward(self, image: Tensor):
        return self.head(self.backbone(image))

    def way(self, name: str, interval: int = 8) -> KeyFrameModel:
        """The video model that carries features in this way; it shares all its parts with this."""
        compares = name in self.embeddings
        model = KeyFrameModel(
            self.backbone, self.head, self.carriers[name],
            embed=self.embeddings[name] if compares else None, interval=interval,
        )  # fmt: skip
        return model.train(self.training)


def fit_frames(model: ClipModel, seed: int, device, steps: int = 250, **options):
    """Backbone and head on single frames."""
    loss = options.pop("loss", partial(video_tasks.pair_loss, reach=0))
    return train.fit(
        model.way("stale copy"), clips("train", 512), loss=loss, steps=steps, batch_size=16,
        lr=3e-3, seed=seed, device=device, progress=False, **options,
    )  # fmt: skip


class FlowBetween(nn.Module):
    """A flow network as a checkpoint: of one image, to the same image two pixels further right."""

    def __init__(self):
        super().__init__()
        self.flow_net = FlowNet()

    def forward(self, image: Tensor) -> Tensor:
        return self.flow_net(image, image.roll(2, dims=-1))


def fit_flow(flow_net: nn.Module, seed: int, device, steps: int = 6_000, **options):
    """A flow network by exact flow, between frames that are up to four apart."""
    return train.fit(
        flow_net, clips("train", 1_024), loss=partial(video_tasks.flow_loss, reach=4), steps=steps,
        batch_size=16, lr=1e-3, weight_decay=0.0, seed=seed, device=device, **options,
    )  # fmt: skip


def fit_way(model: ClipModel, name: str, seed: int, device, steps: int = 100, **options):
    """The task, through features carried in this way, all that is not frozen."""
    return train.fit(
        model.way(name), clips("train", 512),
        loss=partial(video_tasks.pair_loss, reach=REACH), steps=steps, batch_size=16, lr=1e-3,
        weight_decay=0.0, seed=seed, device=device, **{"progress": False, **options},
    )  # fmt: skip


@cache
def frame_model(seed: int, device) -> ClipModel:
    """Trained on single frames only. It is shared: copy it before you change it."""
    train.seed_everything(seed)
    model = ClipModel().to(device)
    fit_frames(model, seed, device)
    return model.eval()


def flow_model(seed: int, device) -> ClipModel:
    """A copy of it with the flow network of the checkpoint `clip_flow`, the same for all seeds."""
    model = copy.deepcopy(frame_model(seed, device))
    pretrained = checkpoints.load("clip_flow", device)
    model.carriers["learned flow"].flow_net.load_state_dict(pretrained.flow_net.state_dict())
    return model


@cache
def all_ways(seed: int, device) -> ClipModel:
    """The same with every way trained through the task; backbone and head stay as they are."""
    model = flow_model(seed, device)
    with video_tasks.frozen(model.backbone, model.head):
        for name in WAYS:
            if name != "stale copy":
                fit_way(model, name, seed, device)
    return model.eval()


def every_frame(model: ClipModel) -> Callable[[Tensor, Tensor], Tensor]:
    """What the model says of a frame without any key frame."""
    return lambda frame, key: model(frame)


def untrained(model: ClipModel, radius: int | None = 4) -> KeyFrameModel:
    """Attention by the cosine of the shallow features as they are, temperature 0.07."""
    embed = Embedding(model.backbone.shallow, SHALLOW, SHALLOW)  # orthogonal: cosines stay
    carry = AttentionWarp(radius)
    attentive = KeyFrameModel(model.backbone, model.head, carry, embed=embed)
    return attentive.to(next(model.parameters()).device).eval()


def matched_flow(model: ClipModel) -> Callable[[Tensor, Tensor], Tensor]:
    """A warp by one displacement for each cell: that to the most alike cell of the window."""

    def answer(frame: Tensor, key: Tensor) -> Tensor:
        shallow = (F.normalize(model.backbone.shallow(image), dim=1) for image in (frame, key))
        flow = attention_to_flow(local_correlation(*shallow, 4).softmax(1), 4, "argmax")
        return model.head(warp(model.backbone(key), flow))

    return answer


@torch.no_grad()
def exact_flow_at(model: ClipModel, samples: Samples, offset: int) -> Iterator[Answer]:
    """As `answers_at` for the last frame, features warped by the exact flow at cells' centers."""
    i = samples.tensors["image"].shape[2] - 1
    device = next(model.parameters()).device
    for indices in torch.arange(len(samples)).split(64):
        batch = batches.fetch(samples, indices, device)
        flow, _ = flow_between(batch, i, i - offset)
        features = model.backbone(batch["image"][:, :, i - offset])
        carried = warp(features, resize_flow(flow, features.shape[2:]))
        yield Answer(model.head(carried), batch, i, i - offset)


def carried_by(model: ClipModel) -> dict[str, Callable[[Samples, int], Iterator[Answer]]]:
    """Row → (samples, offset) → answers, for every way there is."""
    rows = {
        "every frame": partial(answers_at, every_frame(model)),
        "stale copy": partial(answers_at, model.way("stale copy")),
        "exact flow": partial(exact_flow_at, model),
        "matched flow": partial(answers_at, matched_flow(model)),
        "cosine attention": partial(answers_at, untrained(model)),
    }
    trained = {name: partial(answers_at, model.way(name)) for name in WAYS if name not in rows}
    return rows | trained


def miou(answers: Iterable[Answer]) -> float:
    """Mean IoU of things and background over all pixels."""
    return video_tasks.segmentation_scores(answers)["all"]


def offsets(seed: int, device) -> dict:
    """mIoU 1 to 8 frames after the key frame; at 8 also of what the key frame shows, and hides."""
    test = clips("test", 128).to(device)
    results = {}
    for row, answers in carried_by(all_ways(seed, device)).items():
        scores = {n: video_tasks.segmentation_scores(answers(test, n)) for n in OFFSETS}
        results[row] = {str(n): score["all"] for n, score in scores.items()}
        results[row] |= {f"{part}, 8": scores[8][part] for part in ("visible", "hidden")}
    return results


def intervals(seed: int, device) -> dict:
    """mIoU as a video delivers it, mean over all offsets, with a key frame every l frames."""
    test = clips("test", 128).to(device)
    model = all_ways(seed, device)
    results = {}
    for row, answers in carried_by(model).items():
        at = [miou(answers(test, offset)) for offset in range(8)]
        results[row] = {f"l = {n}": sum(at[:n]) / n for n in (1, 2, 4, 8)}
    recursive = [[miou(recursive_at(model, test, o, n)) for o in range(n)] for n in (2, 4)]
    results["sparse recursion"] = {f"l = {len(at)}": sum(at) / len(at) for at in recursive}
    results["FGFA, 5 frames"] = {"l = 1": miou(aggregated(model, test))}
    return results


@torch.no_grad()
def recursive_at(model: ClipModel, samples: Samples, offset: int, interval: int):
    """As `answers_at` for the last frame: its key frame was merged with the key frame before it."""
    flow_net = model.carriers["learned flow"].flow_net
    recursive = SparseRecursiveAggregation(
        model.backbone, model.head, flow_net, FrameAggregator(WIDTH, identity=True),
        interval=interval, partial_updates=False,
    ).eval()  # fmt: skip
    i = samples.tensors["image"].shape[2] - 1
    device = next(model.parameters()).device
    for indices in torch.arange(len(samples)).split(64):
        batch = batches.fetch(samples, indices, device)
        recursive.reset()
        for k in (i - offset - interval, i - offset):
            output = recursive.step(batch["image"][:, :, k], is_key=True)
        if offset:
            output = recursive.step(batch["image"][:, :, i], is_key=False)
        yield Answer(output, batch, i, i - offset)


@torch.no_grad()
def aggregated(model: ClipModel, samples: Samples, frames: int = 5) -> Iterator[Answer]:
    """The last frame, averaged with those before it along the learned flow by cosine weights."""
    flow_net = model.carriers["learned flow"].flow_net
    fgfa = FlowGuidedAggregation(
        model.backbone, model.head, flow_net, FrameAggregator(WIDTH, identity=True),
        radius=frames // 2, causal=True,
    ).eval()  # fmt: skip
    i = samples.tensors["image"].shape[2] - 1
    device = next(model.parameters()).device
    for indices in torch.arange(len(samples)).split(64):
        batch = batches.fetch(samples, indices, device)
        yield Answer(fgfa(batch["image"][:, :, i + 1 - frames :], frames - 1), batch, i)


SPEEDS = (0, 1, 2, 4, 6)
REACHES = {"cosine attention, R = 2": 2, "cosine attention, full": None}
MERGING = ("sparse recursion", "FGFA, 5 frames")
UNTRAINED = ("every frame", "stale copy", "exact flow", "matched flow", "cosine attention")
SPEED_ROWS = (*UNTRAINED, *REACHES, *(way for way in WAYS if way != "stale copy"), *MERGING)


def speeds(seed: int, device, rows: Sequence[str] = SPEED_ROWS) -> dict:
    """mIoU four frames after the key frame, of things that all move so many px a frame.

    Two rows see frames in between as well: the recursion has key frames four and two before, FGFA
    all five frames.
    """
    plain = set(rows) <= {*UNTRAINED, *REACHES}
    model = frame_model(seed, device) if plain else all_ways(seed, device)
    answers = carried_by(model)
    for row, radius in REACHES.items():
        answers[row] = partial(answers_at, untrained(model, radius))
    answers["sparse recursion"] = lambda test, offset: recursive_at(model, test, offset // 2, 2)
    answers["FGFA, 5 frames"] = lambda test, offset: aggregated(model, test, offset + 1)
    tests = {
        f"{speed} px": clips("test", 96, frames=5, speed=(speed, speed)).to(device)
        for speed in SPEEDS
    }
    return {
        row: {name: miou(answers[row](test, 4)) for name, test in tests.items()} for row in rows
    }


TRAINING = {
    "trained apart": None,
    "backbone frozen": lambda model: (model.backbone,),
    "flow network frozen": lambda model: (model.carriers["learned flow"].flow_net,),
    "jointly": lambda model: (),
}


def training(seed: int, device, rows: Sequence[str] = tuple(TRAINING)) -> dict:
    """Deep feature flow, 100 steps through the task: what may learn?"""
    test = clips("test", 128).to(device)
    results = {}
    for row in rows:
        model = flow_model(seed, device)
        if TRAINING[row]:
            with video_tasks.frozen(*TRAINING[row](model)):
                fit_way(model, "learned flow", seed, device)
        way = model.way("learned flow").eval()
        flow = video_tasks.flow_scores(model.carriers["learned flow"].flow_net, test, 4)
        results[row] = {
            "every frame": miou(answers_at(way, test, 0)),
            "4 frames on": miou(answers_at(way, test, 4)),
            "8 frames on": miou(answers_at(way, test, 8)),
            "flow error on things, px": flow["objects"],
        }
    return results


def detection(seed: int, device) -> dict:
    """Boxes around things: mean average precision at IoU 0.5, 1 to 8 frames after the key frame."""
    train.seed_everything(seed)
    model = ClipModel("detection").to(device)
    fit_frames(model, seed, device, steps=300)
    test = clips("test", 128).to(device)
    rows = carried_by(model.eval())
    wanted = ("every frame", "stale copy", "exact flow", "cosine attention")
    return {
        row: {
            str(offset): video_tasks.detection_scores(rows[row](test, offset), {})["all"]
            for offset in OFFSETS
        }
        for row in wanted
    }
