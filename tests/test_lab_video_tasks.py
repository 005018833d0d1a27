"""`attnlab.lab.video_tasks`: frames and pairs, heads, losses, what is frozen, and the scores."""

import re
from functools import partial

import pytest
import torch
from torch import nn

from attnlab.lab import train
from attnlab.lab.data.clips import OBJECTS, flow_between
from attnlab.lab.metrics import confusion_matrix, mean_iou
from attnlab.lab.video_models import (
    ClipSegmenter,
    DetectionHead,
    SegmentationHead,
    clip_backbone,
)
from attnlab.lab.video_tasks import (
    SPEEDS,
    Answer,
    answers_at,
    answers_streaming,
    clip_loss,
    detection_scores,
    draw_pair,
    flow_loss,
    flow_scores,
    frame_at,
    frozen,
    load_clips,
    pair_loss,
    segmentation_scores,
    stream,
)
from attnlab.video import (
    DeepFeatureFlow,
    FlowGuidedAggregation,
    FlowNet,
    FrameAggregator,
    KeyFrameMemory,
    KeyFrameModel,
    SparseRecursiveAggregation,
    StaleCopy,
    resize_flow,
)

HEADS = {"segmentation": SegmentationHead, "detection": DetectionHead}


@pytest.fixture(scope="module")
def clips():
    return load_clips("val", n=6, size=(32, 48), frames=4, objects=(1, 2), cache=False)


@pytest.fixture
def batch(clips, device):
    return {key: value.to(device) for key, value in clips.batch(range(len(clips))).items()}


def deep_feature_flow(head: str = "segmentation") -> DeepFeatureFlow:
    return DeepFeatureFlow(clip_backbone(32, 1), HEADS[head](32), FlowNet(width=4), channels=32)


def test_a_frame_says_what_it_shows(batch):
    frame = frame_at(batch, 2)
    assert torch.equal(frame["image"], batch["image"][:, :, 2])
    for n, objects in enumerate(frame["objects"]):
        owner = batch["owner"][n, 2]
        shown = [k for k in range(2) if (owner == k + 1).any()]
        assert objects["labels"].tolist() == [int(batch["labels"][n, k]) for k in shown]
        for box, k in zip(objects["boxes"].tolist(), shown, strict=True):
            rows, columns = (owner == k + 1).nonzero(as_tuple=True)
            assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        for speed, k in zip(objects["speed"].tolist(), shown, strict=True):
            x, y = batch["velocity"][n, k + 1].tolist()
            assert speed == pytest.approx((x**2 + y**2) ** 0.5)
        for y in range(0, 32, 7):
            for x in range(0, 48, 5):
                layer = int(owner[y, x])
                name = int(batch["labels"][n, layer - 1]) + 1 if layer else 0
                assert frame["classes"][n, y, x] == name


def test_pairs_are_drawn_as_far_apart_as_said():
    torch.manual_seed(0)
    pairs = [draw_pair(5, 2) for _ in range(600)]
    assert {i - k for i, k in pairs} == {0, 1, 2}
    assert {k for _, k in pairs} == set(range(5))
    assert all(0 <= k <= i < 5 for i, k in pairs)
    offsets = torch.tensor([i - k for i, k in pairs]).bincount()
    assert offsets.min() > 160  # 200 each, give or take
    assert {draw_pair(3, 0) for _ in range(50)} == {(0, 0), (1, 1), (2, 2)}


def test_the_cells_of_the_backbone_are_centered_where_a_patch_is(device):
    shallow = clip_backbone(32, 1).shallow.to(device).eval()
    image = torch.randn(1, 3, 32, 40, device=device, requires_grad=True)
    features = shallow(image)
    assert features.shape == (1, 48, 8, 10)
    features[0, :, 4, 5].sum().backward()
    rows, columns = image.grad[0].abs().sum(0).nonzero(as_tuple=True)
    assert (rows.min() + rows.max()) / 2 == 4 * 4 + 1.5
    assert (columns.min() + columns.max()) / 2 == 4 * 5 + 1.5


@pytest.mark.parametrize("name", HEADS)
def test_a_head_learns_one_frame_by_heart(name, batch, device):
    torch.manual_seed(0)
    frame = frame_at({key: value[:2] for key, value in batch.items()}, 1)
    model = nn.Sequential(clip_backbone(32, 1), HEADS[name](32)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(15):
        loss = model[1].loss(model(frame["image"]), frame)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    output = model.eval()(frame["image"])
    if name == "segmentation":
        assert output.shape == (2, len(OBJECTS) + 1, 32, 48)
        return
    assert [set(found) for found in output] == [{"boxes", "scores", "labels"}] * 2
    for found in output:
        assert found["boxes"].shape == (len(found["scores"]), 4)
        assert (found["scores"].diff() <= 0).all()
        assert (found["boxes"] >= 0).all()
        assert (found["boxes"] <= torch.tensor([48, 32, 48, 32], device=device)).all()


def test_the_detection_head_takes_frames_without_objects(device):
    head = DetectionHead(32).to(device)
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    empty = {key: value.to(device) for key, value in empty.items()}
    outputs = head(torch.randn(2, 32, 8, 8, device=device))
    loss = head.loss(outputs, {"objects": [empty, empty]})
    assert loss.isfinite()
    loss.backward()


@pytest.mark.parametrize("head", HEADS)
def test_deep_feature_flow_gets_gradients_everywhere(head, batch, device):
    model = deep_feature_flow(head).to(device)
    torch.manual_seed(1)
    nn.init.normal_(model.propagate.flow_net.predict.weight, std=0.01)
    total = 0
    while total == 0:  # until a pair of different frames was drawn
        model.zero_grad()
        pair_loss(model, batch, reach=3).backward()
        gradients = [p.grad for p in model.propagate.flow_net.parameters()]
        total = sum(float(g.abs().sum()) for g in gradients if g is not None)
    for part in (model.backbone, model.head):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in part.parameters())


def test_models_with_memory_area_and_windows_have_losses(clips, batch, device):
    torch.manual_seed(0)
    parts = {"backbone": clip_backbone(32, 1), "head": SegmentationHead(32)}
    aggregator = FrameAggregator(32, 8)
    memory = KeyFrameModel(
        **parts, propagate=StaleCopy(), memory=KeyFrameMemory(StaleCopy(), aggregator)
    ).to(device)
    assert pair_loss(memory, batch, reach=2).isfinite()
    recursive = SparseRecursiveAggregation(
        **parts, flow_net=FlowNet(width=4), aggregator=aggregator
    ).to(device)
    state = torch.get_rng_state()
    with_area = pair_loss(recursive, batch, reach=2, area_weight=5.0)
    torch.set_rng_state(state)
    without = pair_loss(recursive, batch, reach=2, area_weight=0.0)
    assert 0 <= (with_area - without).item() <= 5.0
    answer = next(answers_at(recursive, clips, 1))
    assert answer.output.shape == (6, 9, 32, 48)
    guided = FlowGuidedAggregation(
        **parts, flow_net=FlowNet(width=4), aggregator=aggregator, radius=1
    ).to(device)
    assert clip_loss(guided, batch).isfinite()


def test_flow_loss_is_the_error_on_visible_cells(batch, device):
    size = (8, 12)

    def exact_but_for(dx):
        def flow_net(frame, key):
            i, k = (
                next(t for t in range(4) if torch.equal(batch["image"][:, :, t], image))
                for image in (frame, key)
            )
            flow = resize_flow(flow_between(batch, i, k)[0], size)
            flow[:, 0] += dx
            return flow

        return flow_net

    assert float(flow_loss(exact_but_for(0.0), batch, 3)) == pytest.approx(1e-3, rel=1e-3)
    assert float(flow_loss(exact_but_for(0.5), batch, 3)) == pytest.approx(2.0, rel=1e-3)


def test_a_step_along_the_gradient_improves_the_flow(batch, device):
    torch.manual_seed(0)
    flow_net = FlowNet(width=4).to(device)
    nn.init.normal_(flow_net.predict.weight, std=0.01)
    losses = []
    for _ in range(8):
        torch.manual_seed(1)  # the same pair
        loss = flow_loss(flow_net, batch, 3)
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in flow_net.parameters():
                parameter -= 1e-3 * parameter.grad / parameter.grad.norm().clamp(min=1e-6)
                parameter.grad = None
    assert losses[-1] < losses[0]


def test_flow_scores_of_no_flow_are_the_motion(clips, device):
    clips = clips.to(device)
    none = flow_scores(lambda frame, key: frame.new_zeros(len(frame), 2, 8, 12), clips, 2, frame=3)
    batch = clips.batch(range(len(clips)))
    exact, visible = flow_between(batch, 3, 1)
    speed = exact.norm(dim=1)[:, 2::4, 2::4]
    seen, on_object = visible[:, 2::4, 2::4], batch["owner"][:, 3, 2::4, 2::4] > 0
    assert none["visible"] == pytest.approx(float(speed[seen].mean()), rel=1e-5)
    assert none["objects"] == pytest.approx(float(speed[seen & on_object].mean()), rel=1e-5)


def test_frozen_parts_do_not_change(clips):
    model = deep_feature_flow()
    kept = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    flow_net = {name: value.clone() for name, value in model.propagate.state_dict().items()}
    options = {"steps": 3, "batch_size": 4, "device": "cpu", "progress": False, "lr": 1e-2}
    with frozen(model.backbone):
        train.fit(model, clips, loss=partial(pair_loss, reach=3), **options)
    assert all(
        torch.equal(value, kept[name]) for name, value in model.backbone.state_dict().items()
    )
    assert all(p.requires_grad for p in model.parameters())
    with frozen(model.propagate):
        train.fit(model, clips, loss=partial(pair_loss, reach=0), **options)
    changed = [
        name for name, value in model.backbone.state_dict().items()
        if not torch.equal(value, kept[name])
    ]  # fmt: skip
    assert "shallow.0.1.running_mean" in changed
    assert "deep.0.0.weight" in changed
    assert flow_net.keys() == model.propagate.state_dict().keys()


def test_a_run_that_stopped_goes_on(clips, tmp_path):
    def run(**options):
        train.seed_everything(0)
        model = deep_feature_flow()
        loss = partial(pair_loss, reach=2)
        train.fit(model, clips, loss=loss, batch_size=4, device="cpu", progress=False, **options)
        return model.state_dict()

    class Stop(Exception):
        pass

    def stop(model):
        raise Stop

    whole = run(steps=4)
    with pytest.raises(Stop):
        run(steps=4, run_dir=tmp_path, save_every=1, evaluate=stop, evaluate_every=3)
    resumed = run(steps=4, run_dir=tmp_path, save_every=1)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


class Oracle(nn.Module):
    """Logits of the true classes, found by the frame's pixels; wrong where the mask says so."""

    def __init__(self, batch, wrong=None):
        super().__init__()
        self.batch, self.wrong = batch, wrong

    def forward(self, frame, key):
        t = next(t for t in range(4) if torch.equal(self.batch["image"][:, :, t], frame))
        classes = frame_at(self.batch, t)["classes"]
        if self.wrong is not None:
            classes = torch.where(self.wrong, (classes + 1) % 9, classes)
        return nn.functional.one_hot(classes, 9).permute(0, 3, 1, 2).float()


def test_visible_and_hidden_pixels_are_scored_apart(clips, device):
    clips = clips.to(device)
    batch = clips.batch(range(len(clips)))
    visible = flow_between(batch, 3, 1)[1]
    perfect = segmentation_scores(answers_at(Oracle(batch), clips, 2))
    assert perfect == {"all": 1, "visible": 1, "hidden": 1}
    ghosts = segmentation_scores(answers_at(Oracle(batch, ~visible), clips, 2))
    assert ghosts["visible"] == 1
    assert ghosts["hidden"] == 0
    target = frame_at(batch, 3)["classes"]
    prediction = torch.where(visible, target, (target + 1) % 9)
    assert ghosts["all"] == mean_iou(confusion_matrix(prediction, target, 9))
    assert set(segmentation_scores(answers_at(Oracle(batch), clips, 0))) == {"all", "visible"}


def test_batches_add_up(clips):
    torch.manual_seed(0)
    model = KeyFrameModel(clip_backbone(32, 1), SegmentationHead(32), StaleCopy())
    at_once = segmentation_scores(answers_at(model, clips, 1))
    assert segmentation_scores(answers_at(model, clips, 1, batch_size=2)) == at_once
    assert model.training


def test_streaming_answers_every_frame(clips):
    torch.manual_seed(0)
    model = KeyFrameModel(clip_backbone(32, 1), SegmentationHead(32), StaleCopy(), interval=2)
    model.eval()
    answers = list(answers_streaming(model, clips, batch_size=4))
    assert [(len(a.output), a.frame, a.key) for a in answers] == [
        (size, t, None) for size in (4, 2) for t in range(4)
    ]
    assert set(segmentation_scores(answers)) == {"all"}
    image = clips.batch([0])["image"]
    outputs = list(stream(model, image.unbind(2)))
    assert torch.equal(outputs[0], outputs[1])  # the key frame's features, copied
    torch.testing.assert_close(outputs[2], model(image[:, :, 2], image[:, :, 2]))


def test_a_model_that_looks_ahead_answers_every_frame_too(clips):
    torch.manual_seed(0)
    aggregator = FrameAggregator(32, 8)
    model = FlowGuidedAggregation(
        clip_backbone(32, 1), SegmentationHead(32), FlowNet(width=4), aggregator, radius=1
    ).eval()
    clip = clips.batch([0])["image"]
    outputs = list(stream(model, clip.unbind(2)))
    assert len(outputs) == 4
    torch.testing.assert_close(outputs[1], model(clip[:, :, :3], 1))


def test_detection_scores(clips):
    pytest.importorskip("faster_coco_eval")
    batch = clips.batch(range(len(clips)))
    objects = frame_at(batch, 1)["objects"]
    perfect = [{**o, "scores": torch.ones(len(o["labels"]))} for o in objects]
    scores = detection_scores([Answer(perfect, batch, 1)])
    groups = {
        name: any(((low <= o["speed"]) & (o["speed"] < high)).any() for o in objects)
        for name, (low, high) in SPEEDS.items()
    }
    assert scores["all"] == 1
    for name, present in groups.items():
        assert scores[name] == 1 if present else scores[name] != scores[name]


def test_the_shipped_model_is_one_of_these():
    model = ClipSegmenter(width=16, depth=1, interval=3).eval()
    assert model.interval == 3
    frame = torch.rand(1, 3, 32, 48)
    assert model(frame).shape == (1, 9, 32, 48)
    assert torch.equal(model(frame), model(frame, frame))


def test_what_is_wrong_is_said(clips):
    batch = clips.batch([0])

    def fails(message, function, *arguments):
        with pytest.raises(ValueError, match=re.escape(message)):
            function(*arguments)

    fails("t=4: expected the number of a frame, 0 to 3", frame_at, batch, 4)
    fails("reach=4: expected 0 to 3", draw_pair, 4, 4)
    fails("in_channels=48: expected a multiple of 32", DetectionHead, 48)
    fails("features (3, 8, 8): expected (B, C, H, W)", DetectionHead(32), torch.zeros(3, 8, 8))
    fails("width=0: expected an integer ≥ 1", clip_backbone, 0)
    model = Oracle(batch)
    fails("offset=4: expected 0 to 3", lambda: next(answers_at(model, clips, 4)))
    fails("frame=4: expected 0 to 3", lambda: next(answers_at(model, clips, 0, 4)))
    fails("batch_size=0: expected an integer ≥ 1", lambda: next(answers_at(model, clips, 0, 0, 0)))
