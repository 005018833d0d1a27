"""Deep feature flow, aggregation, recursion, streams: counts, identities, gradients, errors."""

import copy
import math
import weakref

import battery
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import attnlab
from attnlab.flow import FlowNet, warp
from attnlab.local_attention import AttentionWarp, Embedding
from attnlab.sparse_recursive import update_mask
from attnlab.video import (
    DeepFeatureFlow,
    FlowGuidedAggregation,
    FlowWarp,
    FrameAggregator,
    KeyFrameMemory,
    KeyFrameModel,
    LocallyWeightedNeighbors,
    SparseRecursiveAggregation,
    StaleCopy,
    aggregate,
    cosine_weights,
    dff_speedup,
)

C, SIZE = 6, 16  # channels of the backbone, pixels of a frame; maps are 4×4
quick = settings(max_examples=10, deadline=None, derandomize=True)


def randn(*shape, seed=0, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def video(length, device="cpu", size=SIZE):
    return list(randn(length, 1, 3, size, size, device=device))


def backbone(**options):
    """Stride 4; with padding_mode="circular" exactly equivariant to shifts by 4 px."""
    deep = nn.Conv2d(C, C, 3, padding=1, **options)
    return nn.Sequential(nn.Conv2d(3, C, 4, 4), nn.ReLU(), deep, nn.ReLU())


def head():
    return nn.Conv2d(C, 5, 1)


def flow_net():
    return FlowNet(width=2)


def moving(net):
    """A flow network that sees motion, and whose other fields are not 0 either."""
    battery.randomize(net)
    return net


def embedding():
    return Embedding(nn.Conv2d(3, 4, 4, 4), 4, 4)


def aggregator(**options):
    return FrameAggregator(C, 4, **options)


def local(**options):
    options = {"embed": embedding(), "interval": 3, **options}
    return KeyFrameModel(backbone(), head(), AttentionWarp(1), **options)


def guided(memory=True, **options):
    """Memory-guided propagation: neighbors with offsets between key frames, without to others."""
    align = LocallyWeightedNeighbors(3, offsets=True, radius=1, hidden=4)
    return KeyFrameModel(
        backbone(), head(), LocallyWeightedNeighbors(3, radius=1, hidden=4), embed=embedding(),
        memory=KeyFrameMemory(align, aggregator()) if memory else None, interval=2, **options,
    )  # fmt: skip


def dff(**options):
    return DeepFeatureFlow(backbone(), head(), flow_net(), C, **{"interval": 4, **options})


def fgfa(radius=1, **options):
    return FlowGuidedAggregation(backbone(), head(), flow_net(), aggregator(), radius, **options)


def recursive(**options):
    return SparseRecursiveAggregation(backbone(), head(), flow_net(), aggregator(), **options)


MODELS = {"dff": dff, "local": local, "guided": guided, "fgfa": fgfa,
          "causal": lambda: fgfa(2, causal=True), "recursive": recursive}  # fmt: skip


# Deep feature flow


def test_fresh_flow_copies_the_key_features(device):
    """T1, T2: zero flow and S = 1."""
    model = dff().to(device).eval()
    frame, key = randn(2, 2, 3, SIZE, SIZE, device=device)
    flow, scale = model.propagate.fields(frame, key, (4, 4))
    assert (flow == 0).all()
    assert (scale == 1).all()
    assert torch.equal(model.features(frame, key), model.backbone(key))
    plain = dff(scale_field=False).to(device)
    assert plain.propagate.fields(frame, key, (4, 4))[1] is None


@pytest.mark.parametrize(("length", "interval"), [(7, 1), (7, 3), (9, 3), (2, 5)])
def test_backbone_runs_on_key_frames_only(length, interval, device):
    """T3; with interval 1 the answers are those of every frame on its own."""
    model = dff(interval=interval).to(device).eval()
    moving(model.propagate)
    keys = []
    for t, frame in enumerate(video(length, device)):
        answer = model.step(frame)
        if t % interval == 0:
            torch.testing.assert_close(answer, model.head(model.backbone(frame)))
        keys.append(model.last_was_key)
    assert keys == [t % interval == 0 for t in range(length)]
    assert model.n_backbone == math.ceil(length / interval)
    assert model.n_propagate == length - model.n_backbone


def test_a_translation_by_whole_cells_is_propagated_exactly(device):
    """T4: with circular padding a shift of the frame is a shift of its features."""
    net = backbone(padding_mode="circular").to(device)
    key = randn(1, 3, 48, 48, device=device)
    frame = key.roll((4, -8), (2, 3))  # the content of p is at p + (2, -1) cells in the key frame
    flow = torch.tensor([2.0, -1.0], device=device)[:, None, None].expand(1, 2, 12, 12)
    moved = warp(net(key), flow)
    inside = (..., slice(2, -2), slice(2, -3))
    torch.testing.assert_close(moved[inside], net(frame)[inside])


def test_scale_field_scales_the_result(device):
    """T5."""
    propagate = FlowWarp(moving(flow_net()), C).to(device)
    frame, key = randn(2, 2, 3, SIZE, SIZE, device=device)
    features = randn(2, C, 4, 4, device=device)
    plain = propagate(frame, key, features)
    nn.init.constant_(propagate.scale.weight, 0.1)
    _, scale = propagate.fields(frame, key, (4, 4))
    assert (scale != 1).any()
    torch.testing.assert_close(propagate(frame, key, features), plain * scale)


def test_task_loss_reaches_every_part(device):
    """T6: backbone, head, flow, and the weights of S, although they are 0."""
    model = dff().to(device)
    moving(model.propagate.flow_net)
    frame, key = randn(2, 2, 3, SIZE, SIZE, device=device)
    model(frame, key).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_the_key_frame_itself_bypasses_the_flow(device):
    """T7: where k = i the features pass unchanged, and the flow learns nothing."""
    model = dff().to(device)
    moving(model.propagate)
    frame, key = randn(2, 2, 3, SIZE, SIZE, device=device)
    half = torch.cat([key[:1], frame[1:]])
    features, plain = model.features(half, key), model.backbone(key)
    assert torch.equal(features[0], plain[0])
    assert not torch.allclose(features[1], plain[1])
    model(key, key).square().sum().backward()
    assert all((p.grad == 0).all() for p in model.propagate.parameters())
    assert model.backbone[0].weight.grad.abs().sum() > 0


def test_speedup_formula():
    """T8, and the worked values of the spec."""
    assert dff_speedup(1, 0.3) == 1
    assert dff_speedup(10**9, 0.05) == pytest.approx(20)
    values = [dff_speedup(interval, 0.1) for interval in range(1, 50)]
    assert values == sorted(values)
    for inverse, at5, at10 in ((12.71, 3.80, 5.85), (46.30, 4.60, 8.37), (95.24, 4.80, 9.14)):
        assert dff_speedup(5, 1 / inverse) == pytest.approx(at5, abs=0.01)
        assert dff_speedup(10, 1 / inverse) == pytest.approx(at10, abs=0.01)


def test_a_recorded_flow_is_an_attention_map(device):
    propagate = FlowWarp(moving(flow_net())).to(device).double()
    frame, key = randn(2, 2, 3, SIZE, SIZE, device=device, dtype=torch.float64)
    features = randn(2, C, 4, 4, device=device, dtype=torch.float64)
    with attnlab.record(propagate) as maps:
        moved = propagate(frame, key, features)
    dense = maps.dense((4, 4))[""]
    assert dense.shape == (2, 1, 16, 16)
    assert ((dense > 0).sum(-1) <= 4).all()
    torch.testing.assert_close(dense.sum(-1), torch.ones_like(dense[..., 0]))
    values = rearrange(features, "b c h w -> b 1 (h w) c")
    torch.testing.assert_close(rearrange(dense @ values, "b 1 (h w) c -> b c h w", h=4), moved)


# Other propagations, and memory


@pytest.mark.parametrize("name", ["dff", "local", "guided"])
def test_a_stream_equals_the_frame_pair(name, device):
    model = MODELS[name]().to(device).eval()
    battery.randomize(model)
    frames = video(4, device)
    for t, frame in enumerate(frames):
        answer = model.step(frame)
        at = t - t % model.interval
        before = frames[0] if name == "guided" and at == 2 else None
        expected = model(frame, frames[at], before)
        torch.testing.assert_close(answer, expected, atol=1e-5, rtol=1e-4)


def test_stale_copy_is_wrong_by_the_motion(device):
    model = KeyFrameModel(backbone(), head(), StaleCopy()).to(device).eval()
    first, second = video(2, device)
    assert torch.equal(model.step(first), model.step(second))


def test_a_cut_can_be_declared(device):
    model = dff(interval=100).to(device).eval()
    frames = video(5, device)
    flags = [True, None, True, False, None]
    for frame, flag in zip(frames, flags, strict=True):
        model.step(frame, is_key=flag)
    assert (model.n_backbone, model.n_propagate) == (2, 3)
    assert dff(interval=1).to(device).eval().step(frames[0], is_key=False) is not None


def test_memory_is_merged_at_key_frames_only(device):
    model = guided().to(device).eval()
    battery.randomize(model)
    frames = video(3, device)
    for frame in frames:
        model.step(frame)
    assert (model.n_backbone, model.n_propagate) == (2, 2)
    at = [model.embed(frame) for frame in frames]
    fresh = model.backbone(frames[2])
    aligned = model.memory.align(at[2], at[0], model.backbone(frames[0]))
    expected = model.memory.aggregator(torch.stack([aligned, fresh], 1), fresh)
    torch.testing.assert_close(model.last_features, expected)
    # An old memory never weighs more than the new frame: its cosine is at most 1.
    with attnlab.record(model.memory) as maps:
        model.memory(at[2], at[0], model.backbone(frames[0]), fresh)
    weights = maps["aggregator"]
    assert (weights[:, 0] <= 0.5 + 1e-6).all()
    assert (weights[:, 0] >= 1 / (1 + math.e**2) - 1e-6).all()


def test_all_parts_of_memory_guided_propagation_learn(device):
    model = guided().to(device)
    battery.randomize(model)
    frame, key, previous = randn(3, 2, 3, SIZE, SIZE, device=device)
    model(frame, key, previous).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


# Aggregation


@quick
@given(seed=st.integers(0, 999), frames=st.integers(1, 6))
def test_weights_of_frames(seed, frames):
    """T2 to T5: a softmax over frames, equivariant to their order, blind to norms."""
    embeddings = randn(2, frames, 5, 3, 4, seed=seed, dtype=torch.float64)
    query = randn(2, 5, 3, 4, seed=seed + 1, dtype=torch.float64)
    features = randn(2, frames, 3, 3, 4, seed=seed + 2, dtype=torch.float64)
    weights = cosine_weights(embeddings, query)
    torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]))
    assert (weights.amax(1) / weights.amin(1)).max() <= math.e**2 + 1e-9
    order = torch.randperm(frames)
    torch.testing.assert_close(cosine_weights(embeddings[:, order], query), weights[:, order])
    mean = aggregate(features, weights)
    torch.testing.assert_close(aggregate(features[:, order], weights[:, order]), mean)
    torch.testing.assert_close(mean, (weights[:, :, None] * features).sum(1))
    scales = torch.rand(2, frames, 1, 3, 4, dtype=torch.float64) + 0.1
    torch.testing.assert_close(cosine_weights(scales * embeddings, 7 * query), weights)
    if frames == 1:
        assert torch.equal(mean, features[:, 0])


def test_weights_of_special_frames():
    """T6 to T8, and what no temperature means for 21 frames."""
    query = randn(1, 5, 3, 4, dtype=torch.float64)
    others = randn(1, 4, 5, 3, 4, seed=1, dtype=torch.float64)
    opposite = torch.cat([others, -query[:, None]], 1)
    assert (cosine_weights(opposite, query).argmin(1) == 4).all()
    zero = torch.cat([others, torch.zeros_like(query)[:, None]], 1)
    assert cosine_weights(zero, query).isfinite().all()
    assert cosine_weights(zero, torch.zeros_like(query)).isfinite().all()

    window = torch.cat([query[:, None], (-query[:, None]).expand(-1, 20, -1, -1, -1)], 1)
    assert cosine_weights(window, query)[0, 0, 0, 0].item() == pytest.approx(0.270, abs=1e-3)
    assert cosine_weights(window, query, 0.1)[0, 0, 0, 0].item() == pytest.approx(1)
    equal = query[:, None].expand(-1, 16, -1, -1, -1)
    weights = cosine_weights(equal, query)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 16))
    noise = randn(1, 16, 1, 200, 200, seed=2)
    mean = aggregate(noise, torch.full((1, 16, 200, 200), 1 / 16))
    assert mean.var().item() == pytest.approx(1 / 16, rel=0.05)


def test_aggregator_battery(device):
    features = randn(2, 3, C, 4, 5, device=device)
    small = randn(1, 2, C, 3, 3, device=device)
    battery.battery(
        lambda: aggregator().to(device),
        features, features[:, 0],
        impls=("explicit",),
        parameters=(C * 4 + 4) + (4 * 4 * 9 + 4) + (4 * 16 + 16),
        sizes=[((features, features[:, 0]), (2, C, 4, 5)), ((small, small[:, 0]), (1, C, 3, 3))],
        rows_axis=1,
    )  # fmt: skip
    assert battery.check_parameters(aggregator(identity=True), 0) is None


def test_static_clip_is_left_as_it_is(device):
    """T1."""
    model = fgfa().to(device).double().eval()
    clip = randn(2, 3, 1, SIZE, SIZE, device=device, dtype=torch.float64).expand(-1, -1, 5, -1, -1)
    with attnlab.record(model) as maps:
        features = model.features(clip)
    torch.testing.assert_close(maps["aggregator"], torch.full((2, 5, 4, 4), 0.2).to(features))
    torch.testing.assert_close(features, model.backbone(clip[:, :, 0]))
    assert fgfa(0).to(device).eval()(clip[:, :, :1].float()).isfinite().all()


@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"embed_first": True}])
def test_aggregating_a_stream_equals_aggregating_windows(length, options, device):
    model = fgfa(2, **options).to(device).eval()
    battery.randomize(model)
    frames = video(length, device)
    answers = [model.step(frame) for frame in frames]
    late = 0 if options.get("causal") else min(2, length)
    assert all(answer is None for answer in answers[:late])
    assert not any(answer is None for answer in answers[late:])
    answers = answers[late:] + model.flush()
    assert len(answers) == length
    assert model.n_backbone == length
    assert model.n_propagate == 4 * length
    first = -4 if options.get("causal") else -2
    for i, answer in enumerate(answers):
        window = [frames[min(max(i + d, 0), length - 1)] for d in range(first, first + 5)]
        with torch.no_grad():
            expected = model(torch.stack(window, 2), index=-first)
        torch.testing.assert_close(answer, expected, atol=1e-4, rtol=1e-4)
    assert model.flush() == []


def test_temporal_dropout_draws_neighbors_in_training_only(device):
    model = fgfa().to(device)
    battery.randomize(model)
    clip = randn(1, 3, 7, SIZE, SIZE, device=device)
    with attnlab.record(model.train()) as maps:
        drawn = [model(clip) for _ in range(6)]
        assert maps["aggregator"].shape[1] == 3, "two neighbors and the current frame"
    assert any(not torch.equal(drawn[0], other) for other in drawn[1:])
    model.include_current = False
    with attnlab.record(model) as maps:
        model(clip)
        assert maps["aggregator"].shape[1] == 2, "the public codes' behavior"
        model(clip[:, :, :1])
        assert maps["aggregator"].shape[1] == 1, "nothing but the current frame"
        model.eval()(clip)
        assert maps["aggregator"].shape[1] == 7


def test_embedding_before_the_warp_is_another_result(device):
    """Equal where the embedding is one 1×1 convolution; the paper's three layers do not commute."""
    clip = randn(1, 3, 3, SIZE, SIZE, device=device, dtype=torch.float64)
    gaps = {}
    for name, embed in {"1x1": nn.Conv2d(C, 4, 1), "paper": None}.items():
        after = fgfa().double().to(device).eval()
        if embed is not None:
            after.aggregator.embed = embed.to(device, torch.float64)
        battery.randomize(after)
        before = copy.deepcopy(after)
        before.embed_first = True
        gaps[name] = (after.features(clip) - before.features(clip)).abs().max().item()
    assert gaps["1x1"] < 1e-12
    assert gaps["paper"] > 1e-4


def test_every_part_of_aggregation_learns(device):
    model = fgfa().to(device)
    battery.randomize(model)
    model(randn(2, 3, 4, SIZE, SIZE, device=device)).square().sum().backward()
    for name, parameter in model.named_parameters():
        # The last bias moves all embeddings alike, and still changes their cosines.
        assert parameter.grad.abs().sum() > 0, name


# Sparse recursion


def test_updates_everywhere_compute_the_features_again(device):
    """T1: then nothing of what was moved is in F̂; and τ = ∞ makes every frame a key frame."""
    model = recursive(threshold=math.inf).to(device).eval()
    battery.randomize(model)
    frames = video(3, device)
    for frame in frames:
        model.step(frame)
        assert model.last_was_key
    assert model.n_backbone == 3
    assert (model.last_update == 1).all()
    moved, fresh = randn(2, 1, C, 4, 4, device=device)
    repaired = []
    handle = model.aggregator.register_forward_hook(lambda _, x, out: repaired.append(x[1]))
    model._merge(moved, fresh, torch.ones(1, 1, 4, 4, device=device))
    handle.remove()
    assert torch.equal(repaired[0], fresh)


def test_no_updates_are_deep_feature_flow_without_scale(device):
    """T2; τ = −∞ never makes another key frame (T3)."""
    model = recursive(threshold=-math.inf).to(device).eval()
    battery.randomize(model)
    plain = KeyFrameModel(model.backbone, model.head, FlowWarp(model.flow_net), interval=99).eval()
    for frame in video(4, device):
        torch.testing.assert_close(model.step(frame), plain.step(frame))
    assert (model.n_backbone, model.n_propagate, model.updated_area) == (1, 3, 0)


def test_key_frames_are_adaptive_and_updates_partial(device):
    model = recursive(threshold=-math.inf).to(device).eval()
    battery.randomize(model)
    frames, consistencies, areas = video(6, device), [], []
    for t, frame in enumerate(frames):
        model.step(frame)
        consistencies += [model.last_consistency] if t else []
    model.reset()
    model.threshold, model.key_area = torch.cat(consistencies).median().item(), 1.0
    for t, frame in enumerate(frames):
        model.step(frame)
        areas += [model.last_update.mean().item()] if t else []
    assert model.n_backbone == 1, "no share of the map is larger than 1"
    assert model.updated_area == pytest.approx(sum(areas))
    assert sum(areas) == pytest.approx(2.5, abs=0.1), "half of all cells"
    model.reset()
    assert (model.n_backbone, model.updated_area, model.last_update) == (0, 0.0, None)
    model.key_area = areas[0] / 2
    keys = []
    for frame in frames:
        model.step(frame)
        keys.append(model.last_was_key)
    assert keys[1], "its area is the same as before, and the bound is lower"
    assert model.n_backbone == sum(keys)


def test_an_empty_update_runs_neither_backbone_nor_aggregator(device):
    model = recursive(threshold=-math.inf).to(device).eval()
    battery.randomize(model)
    first, second = video(2, device)
    model.step(first)
    calls = []
    for part in (model.backbone, model.aggregator):
        part.register_forward_hook(lambda *_: calls.append(1))
    model.step(second)
    assert not calls
    moved = model.last_features
    same = model.aggregator(torch.stack([moved, moved], 1), moved)
    torch.testing.assert_close(moved, same, msg="which is what merging it with itself gives")
    model.threshold = math.inf
    model.step(second, is_key=False)
    assert len(calls) == 3, "the call above, and both parts"


def test_recursion_at_a_fixed_interval(device):
    model = recursive(interval=2, partial_updates=False).to(device).eval()
    battery.randomize(model)
    frames = video(5, device)
    for frame in frames:
        model.step(frame)
    assert (model.n_backbone, model.n_propagate, model.updated_area) == (3, 4, 0)
    memory = model.backbone(frames[0])
    for old, new in ((0, 2), (2, 4)):
        fresh = model.backbone(frames[new])
        moved, _ = model.propagate(frames[new], frames[old], memory)
        memory = model.aggregator(torch.stack([moved, fresh], 1), fresh)
    torch.testing.assert_close(model.last_features, memory)


def test_update_mask_and_its_surrogate_gradient():
    """T5: (0, −1, −1, 0) at Q − τ = (−2, −½, ½, 2)."""
    consistency = torch.tensor([-1.0, 0.5, 1.5, 3.0], requires_grad=True)
    update = update_mask(consistency, threshold=1.0)
    assert update.tolist() == [1, 1, 0, 0]
    update.sum().backward()
    assert consistency.grad.tolist() == [0, -1, -1, 0]


def test_consistency_starts_inside_the_surrogate_and_mostly_propagates(device):
    model = recursive().to(device)
    frame, key = randn(2, 4, 3, SIZE, SIZE, device=device)
    _, consistency = model.propagate(frame, key, model.backbone(key))
    assert ((consistency > 0) & (consistency < 1)).all()
    nn.init.zeros_(model.consistency.weight)
    nn.init.zeros_(model.consistency.bias)
    _, consistency = model.propagate(frame, key, model.backbone(key))
    assert (update_mask(consistency, 0.0) == 1).all(), "Q = 0 ≤ τ = 0 computes everything again"


def test_area_is_predicted_and_every_part_learns(device):
    model = recursive().to(device)
    battery.randomize(model)
    model.consistency.bias.data.zero_()
    frame, key = randn(2, 8, 3, SIZE, SIZE, device=device)
    torch.manual_seed(0)
    answer, area = model(frame, key)
    _, consistency = model.propagate(frame, key, model.backbone(key))
    assert area.item() == pytest.approx((consistency <= 0).float().mean().item())
    (answer.square().sum() + 2 * area).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    whole, _ = recursive(partial_updates=False).to(device)(frame, key)
    assert whole.shape == answer.shape


def test_training_forces_updates_for_two_thirds(device):
    model = recursive().to(device).train()
    moved, fresh = torch.zeros(300, C, 4, 4, device=device), torch.ones(300, C, 4, 4, device=device)
    model.propagate = lambda *_: (moved, torch.full((300, 1, 4, 4), 0.5, device=device))
    for part in ("backbone", "aggregator", "head"):
        delattr(model, part)
    model.backbone, model.head = (lambda x: fresh), (lambda x: x)
    model.aggregator = lambda _, repaired: repaired
    frames = torch.zeros(300, 3, SIZE, SIZE, device=device)
    torch.manual_seed(0)
    answer, area = model(frames, frames)
    assert area == 0, "nothing is predicted to be computed again"
    assert answer.mean().item() == pytest.approx(1 / 3, abs=0.1)


def test_crops_are_exact_in_the_interior():
    """T6: what a part of a map computes is right as far from its border as the layers see."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    frame = randn(1, 3, 12, 12)
    crop = net(frame[..., 2:10, 2:10])
    error = (crop - net(frame)[..., 2:10, 2:10]).abs().amax((0, 1))
    assert error[2:-2, 2:-2].max() < 1e-6 < error.max()


# Streams


@pytest.mark.parametrize("name", MODELS)
def test_memory_does_not_grow_with_the_video(name, device):
    model = MODELS[name]().to(device).eval()
    alive = []
    for t in range(24):
        frame = randn(1, 3, SIZE, SIZE, seed=t, device=device)
        alive.append(weakref.ref(frame))
        model.step(frame)
        del frame
    assert sum(ref() is not None for ref in alive) <= 5
    assert not model.last_features.requires_grad


@pytest.mark.parametrize("name", MODELS)
def test_reset_begins_a_new_video_of_any_size(name, device):
    model = MODELS[name]().to(device).eval()
    frames, wide = video(7, device), randn(1, 3, SIZE, 2 * SIZE, device=device)
    first = [model.step(frame) for frame in frames]
    with pytest.raises(ValueError, match="call reset"):
        model.step(wide)
    model.reset()
    assert (model.n_backbone, model.n_propagate) == (0, 0)
    model.step(wide)
    model.reset()
    for frame, before in zip(frames, first, strict=True):
        after = model.step(frame)
        assert (after is None) == (before is None)
        assert before is None or torch.equal(after, before)


@pytest.mark.parametrize("name", MODELS)
def test_models_are_modules_like_others(name, device):
    """Batch independence, autocast, and a state_dict that holds no frame."""

    def make():
        return MODELS[name]().to(device)

    model = make().eval()
    model.step(video(1, device)[0])
    model.load_state_dict(make().state_dict(), strict=True)
    if name in ("fgfa", "causal"):
        inputs = [randn(2, 3, 3, SIZE, SIZE, device=device)]
    else:
        inputs = list(randn(2, 2, 3, SIZE, SIZE, device=device))
    if name == "recursive":  # the area is a mean over the batch
        with_area, make = make, lambda: _Answer(with_area())
    battery.check_batch_independent(make(), *inputs)
    battery.check_autocast(make(), *inputs, tol=0.2)
    battery.check_state_dict_round_trip(make, *inputs)
    if name in ("dff", "local", "recursive"):
        battery.check_compiles(make(), *inputs)


class _Answer(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *inputs):
        return self.model(*inputs)[0]


def test_any_head_will_do(device):
    class Boxes(nn.Module):
        def forward(self, x):
            return {"map": F.relu(x)}

    model = DeepFeatureFlow(backbone(), Boxes(), flow_net(), C)
    assert set(model.to(device).eval().step(video(1, device)[0])) == {"map"}


def test_errors():
    model, clip = fgfa().eval(), torch.zeros(1, 3, 3, SIZE, SIZE)
    frame, pair = clip[:, :, 0], torch.zeros(2, 3, SIZE, SIZE)
    thp = recursive().eval()
    thp.step(frame)
    stream = dff().eval()
    stream.step(frame)
    battery.check_errors([
        (lambda: stream.step(frame[..., :8]), "frame (1, 3, 16, 8): expected (1, 3, 16, 16) as"),
        (lambda: stream.step(frame[0]), "frame (3, 16, 16): expected (B, C, H, W)"),
        (lambda: thp.step(pair), "frame (2, 3, 16, 16): expected one video with interval=None"),
        (lambda: dff()(frame, pair), "frame (1, 3, 16, 16), key (2, 3, 16, 16): expected frames"),
        (lambda: thp(frame, pair), "key (2, 3, 16, 16): expected frames (B, C, H, W) of one shape"),
        (lambda: dff()(frame, frame, frame), "previous_key: expected None"),
        (lambda: guided()(frame, frame, pair), "previous_key (2, 3, 16, 16): expected frames"),
        (lambda: dff(interval=0), "interval=0: expected at least 1"),
        (lambda: recursive(interval=0), "interval=0: expected at least 1"),
        (lambda: fgfa(-1), "radius=-1: expected at least 0"),
        (lambda: fgfa(train_neighbors=0), "train_neighbors=0: expected at least 1"),
        (lambda: aggregator(temperature=0), "temperature=0: expected a number above 0"),
        (lambda: model(frame), "clip (1, 3, 16, 16): expected (B, 3, T, H, W)"),
        (lambda: model(clip, 3), "index=3: expected 0 to 2"),
        (lambda: dff_speedup(0, 0.1), "interval=0, ratio=0.1: expected at least 1, and above 0"),
    ])  # fmt: skip
