"""Scores of dependency trees against loops from their definitions; baselines; dense heads."""

import itertools
import math

import battery
import pytest
import torch
import torch.nn.functional as F
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from attnlab import record
from attnlab.attention import VisionTransformer
from attnlab.dependency_trace import dependency_scores
from attnlab.dependency_trees import DependencyTree, dependency_tree
from attnlab.dependencyvit import dependencyvit_mini
from attnlab.feature_maps import MapBackbone
from attnlab.heads import FCNHead, Segmenter, segmentation_loss
from attnlab.lab import data
from attnlab.lab.dependency_baselines import (
    GatheringAttention,
    attention_trace,
    color_locality,
    feature_cut,
    gated_vit,
    kmeans_pieces,
    random_scores,
)
from attnlab.lab.dependency_metrics import (
    attachment,
    exit_attachment,
    gate_contrast,
    matched_iou,
    nearer_elsewhere,
    object_mass,
    token_regions,
    tree_pieces,
)
from attnlab.lab.metrics import gaussian_locality

GRID = (16, 16)
N = 256
TINY = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def batch():
    """Two images of two or three objects, on patches of 4×4 pixels."""
    options = {"objects": (2, 3), "adjacency": 0.5, "cache": False}
    samples = data.load("parts", "val", n=2, seed=3, **options).batch(slice(2))
    return samples | {"regions": token_regions(samples["nodes"], GRID)}


def scores(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(2, N, N, generator=generator, dtype=torch.float64)).softmax(-1)


def test_the_region_of_a_patch(batch):
    nodes = batch["nodes"]
    for b, row, column in itertools.product(range(2), range(16), range(16)):
        patch = nodes[b, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten().tolist()
        most = max(sorted(set(patch)), key=patch.count)
        clear = patch.count(most) / 16 >= 0.6
        assert batch["regions"][b, 16 * row + column] == (most if clear else -1)


def sent(matrix, popularity=False):
    """Rows without the diagonal that sum to 1, as lists; columns too if `popularity`."""
    rows = [[x * (i != j) for j, x in enumerate(row)] for i, row in enumerate(matrix.tolist())]
    rows = [[x / sum(row) for x in row] for row in rows]
    if popularity:
        received = [sum(column) for column in zip(*rows, strict=True)]
        rows = [[x / r for x, r in zip(row, received, strict=True)] for row in rows]
    return rows


def places(regions, *wanted):
    return [i for i, region in enumerate(regions) if region in wanted]


def attachment_loop(matrix, regions, owner, popularity):
    """A dictionary from the parts that are counted to whether they are right."""
    W, hits = sent(matrix, popularity), {}
    nodes = range(len(owner))
    for r in nodes:
        part = places(regions, r)
        given = {}
        for k in {*owner.tolist()} - {-1} | {"background"}:
            members = [0] if k == "background" else [n for n in nodes if owner[n] == k]
            area = [j for j in places(regions, *members) if j not in part]
            if area:
                total = sum(W[i][j] for i in part for j in area)
                given[k] = total / len(area)
        if owner[r] >= 0 and part and int(owner[r]) in given:
            hits[r] = max(given, key=given.get) == int(owner[r])
    return hits


@pytest.mark.parametrize("popularity", [False, True])
def test_attachment_equals_the_loop(batch, popularity):
    owner = batch["node_object"]
    for matrix in (scores(), gaussian_locality(GRID, 1.5).double().expand(2, -1, -1)):
        got = attachment(matrix, batch["regions"], owner, popularity)
        for b in range(2):
            expected = attachment_loop(matrix[b], batch["regions"][b], owner[b], popularity)
            counted = {n: bool(x) for n, x in enumerate(got[b].tolist()) if not math.isnan(x)}
            assert counted == expected
            assert len(expected) >= 4


def oracle(batch):
    """Every patch of an object sends to all of that object, and the others to everybody."""
    regions, owner = batch["regions"], batch["node_object"]
    of_patch = owner.gather(1, regions.clamp_min(0)).masked_fill(regions < 0, -1)
    same = (of_patch[:, :, None] == of_patch[:, None]) & (of_patch >= 0)[:, None]
    return (same | (of_patch < 0)[:, :, None]).double()


def test_attachment_of_an_oracle_and_of_scores_that_know_nothing(batch):
    regions, owner = batch["regions"], batch["node_object"]
    right = attachment(oracle(batch), regions, owner)
    assert (right[~right.isnan()] == 1).all()
    uniform = attachment(torch.ones(2, N, N), regions, owner)  # candidates are equal: chance
    for b in range(2):
        objects = len({*owner[b][owner[b] >= 0].tolist()})
        chances = uniform[b][~uniform[b].isnan()]
        assert ((chances > 0) & (chances <= 1)).all()
        assert chances.min() == pytest.approx(1 / (objects + 1))
    mass = object_mass(oracle(batch), regions, owner)
    torch.testing.assert_close(mass[:, 0], torch.ones(2).double())


def test_nearness_fails_where_another_object_is_nearer():
    samples = data.load(
        "parts", "val", n=64, objects=2, adjacency=1.0, background="flat", cache=False
    ).batch(slice(64))
    grid = (16, 16)
    regions, owner = token_regions(samples["nodes"], grid), samples["node_object"]
    near = attachment(gaussian_locality(grid, 3.0).expand(64, -1, -1), regions, owner)
    away = nearer_elsewhere(regions, owner, grid)
    assert away.sum() > 20
    assert near[away].nanmean() < near[~away].nanmean() - 0.2


def test_nearer_elsewhere_by_hand():
    # Object 0 has nodes 3 and 4, on both sides of object 1, which has node 5 alone.
    regions = torch.tensor([[3, 3, 0, 5, 4, -1]])
    owner = torch.tensor([[-1, 0, 1, 0, 0, 1]])
    found = nearer_elsewhere(regions, owner, (1, 6))
    assert found[0].tolist() == [False, False, False, True, True, False]


def test_climbing_out_of_a_region():
    #  patch   0  1  2  3  4  5  6
    regions = torch.tensor([[3, 3, 4, 0, -1, 5, 5]])
    owner = torch.tensor([[-1, 0, 1, 0, 0, 1]])
    parents = torch.tensor([[1, 4, 5, -1, 2, 3, 5]])
    tree = DependencyTree(parents, torch.ones(1, 7))
    got = exit_attachment(tree, regions, owner)
    # 0 → 1 (own) → 4 (unclear) → 2 (object 0): right. 2 → 5 (object 1): wrong. 5 → 3 (background).
    expected = torch.tensor([[1, 1, 0, math.nan, math.nan, 0, 0]]).double()
    torch.testing.assert_close(got, expected, equal_nan=True)
    tops = DependencyTree(torch.tensor([[-1, 0]]), torch.ones(1, 2))
    assert exit_attachment(tops, torch.tensor([[1, 1]]), torch.tensor([[-1, 0]])).isnan().all()


def test_exits_equal_the_walk(batch):
    tree = dependency_tree(scores(), decode="greedy")
    regions, owner = batch["regions"], batch["node_object"]
    got = exit_attachment(tree, regions, owner)
    for b, token in itertools.product(range(2), range(N)):
        own = int(regions[b, token])
        others = [int(regions[b, up]) for up in tree[b].path(token)[1:]]
        left = [region for region in others if region not in (own, -1)]
        counted = own > 0 and bool(left)
        assert bool(got[b, token].isnan()) is not counted
        if counted:
            assert bool(got[b, token]) is bool(owner[b, own] == owner[b, left[0]])


def test_where_the_mass_goes_equals_the_loop(batch):
    regions, owner = batch["regions"], batch["node_object"]
    got = object_mass(scores(), regions, owner)
    torch.testing.assert_close(got.sum(1), torch.ones(2).double())
    for b in range(2):
        W, of = sent(scores()[b]), [int(owner[b, r]) if r >= 0 else -1 for r in regions[b]]
        on = [i for i in range(N) if of[i] >= 0]
        own = sum(W[i][j] for i in on for j in on if of[i] == of[j]) / len(on)
        other = sum(W[i][j] for i in on for j in on if of[i] != of[j]) / len(on)
        expected = torch.tensor([own, other, 1 - own - other]).double()
        torch.testing.assert_close(got[b], expected)


def test_matched_iou_equals_all_matchings():
    generator = torch.Generator().manual_seed(0)
    for ours, theirs in ((2, 4), (3, 3), (4, 2)):
        labels = torch.randint(ours, (3, 5, 6), generator=generator) + 7
        target = torch.randint(-1, theirs, (3, 5, 6), generator=generator)
        for b, value in enumerate(matched_iou(labels, target)):
            segments = [x for x in target[b].unique().tolist() if x >= 0]
            counted = target[b] >= 0

            def iou(segment, label, ours=labels[b], theirs=target[b], counted=counted):
                one, other = theirs == segment, (ours == label) & counted
                return float((one & other).sum() / (one | other).sum())

            slots = [*labels[b].unique().tolist(), *[None] * len(segments)]
            best = max(
                sum(iou(s, x) for s, x in zip(segments, chosen, strict=True) if x is not None)
                for chosen in set(itertools.permutations(slots, len(segments)))
            )
            assert float(value) == pytest.approx(best / len(segments))


def test_a_perfect_partition_and_one_piece():
    target = torch.tensor([[0, 0, 1, 1, 2, -1]])
    torch.testing.assert_close(matched_iou(target + 5, target), torch.ones(1).double())
    one = matched_iou(torch.zeros_like(target), target)  # the best a single piece can do: 2/5
    torch.testing.assert_close(one, torch.tensor([0.4 / 3]).double())


def test_pieces_of_a_batch_of_trees():
    tree = dependency_tree(scores(), decode="greedy")
    wanted = torch.tensor([2, 5])
    pieces = tree_pieces(tree, wanted)
    for b in range(2):
        assert torch.equal(pieces[b], tree[b].cut(int(wanted[b])))
    assert tree_pieces(tree, 3).shape == (2, N)


def test_contrast_of_the_gates():
    messages = torch.tensor([[[0.8, 0.4, 0.2]], [[0.6, 0.2, 0.0]]])
    foreground = torch.tensor([[True, True, False]])
    contrast = gate_contrast(messages, foreground)
    torch.testing.assert_close(contrast, torch.tensor([3.0, torch.inf]))


def test_scores_without_knowledge():
    one, same, other = random_scores(2, 9), random_scores(2, 9), random_scores(2, 9, seed=1)
    torch.testing.assert_close(one.sum(-1), torch.ones(2, 9))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_color_and_nearness():
    images = torch.zeros(1, 3, 4, 6)
    images[:, :, :, 3:] = 1.0  # patches of 2×2: columns 0, then half and half, then 1
    got = color_locality(images, (2, 3), sigma=2.0, bandwidth=0.5)
    colors = [0.0, 0.5, 1.0]
    for i, j in itertools.product(range(6), range(6)):
        distance = (i // 3 - j // 3) ** 2 + (i % 3 - j % 3) ** 2
        color = 3 * (colors[i % 3] - colors[j % 3]) ** 2
        weight = math.exp(-distance / 8 - color / 0.5)
        assert float(got[0, i, j] / got[0, i, i]) == pytest.approx(weight, rel=1e-4)
    torch.testing.assert_close(got.sum(-1), torch.ones(1, 6))


def images(n=2):
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_ordinary_attention_read_as_if_it_sent():
    model = battery.randomize(VisionTransformer(patch_size=8, **TINY)).eval()
    trace = attention_trace(model, images())
    with torch.no_grad(), record(model) as maps:
        model(images())
    for layer, map in enumerate(maps.values()):
        torch.testing.assert_close(trace.masks[layer].mT, map.mean(1))
    torch.testing.assert_close(trace.masks.sum(-2), trace.messages)
    assert trace.num_prefix_tokens == 1
    assert trace.grid == (4, 4)
    assert dependency_scores(trace, "flow").shape == (2, 17, 17)


def test_the_control_differs_in_its_attention_alone():
    model = battery.randomize(gated_vit(patch_size=8, **TINY)).eval()
    encoding, trace = model.forward_features(images()), model.trace(images())
    block = model.blocks[0]
    x = block.norm1(model._embed(images()).tokens)
    out, messages, sending = block.attn(x, observe=True)
    torch.testing.assert_close(out, block.attn.gather(x))
    torch.testing.assert_close(messages, block.attn.controller(x).sigmoid()[..., 0])
    torch.testing.assert_close(sending.weights.sum(-1), torch.ones(2, 3, 16))
    torch.testing.assert_close(trace.messages[0], messages)
    torch.testing.assert_close(trace.messages[-1], encoding.messages)
    torch.testing.assert_close(trace.masks.sum(-2), trace.messages)
    M = encoding.messages[..., None]
    pooled = (M * encoding.tokens).sum(1) / M.sum(1)
    torch.testing.assert_close(model(images()), model.head(pooled))
    ours = dependencyvit_mini(patch_size=8, **TINY)
    selectors = sum(p.numel() for n, p in ours.named_parameters() if "selector" in n)
    battery.check_parameters(model, sum(p.numel() for p in ours.parameters()) - selectors)


def test_the_gates_of_the_control_learn_from_the_pooling():
    model = gated_vit(patch_size=8, **TINY)
    F.cross_entropy(model(images()), torch.tensor([0, 1])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    assert isinstance(model.blocks[0].attn, GatheringAttention)


def test_the_cut_and_the_means_find_two_kinds_of_patches():
    kind = torch.tensor([[0, 0, 0, 1, 0, 1]])
    features = F.one_hot(kind, 2).float() + 0.01 * torch.rand(1, 6, 2)
    cut = feature_cut(features, (2, 3)).flatten()
    assert cut[kind[0] == 1].min() > cut[kind[0] == 0].max()
    pieces = kmeans_pieces(features.expand(2, -1, -1), torch.tensor([2, 1]))
    torch.testing.assert_close(matched_iou(pieces[:1], kind), torch.ones(1).double())
    assert (pieces[1] == 0).all()


def test_restored_maps_go_into_dense_heads():
    lite = {"prune_layers": (2,), "keep_rates": (0.5,)}
    backbone = MapBackbone(dependencyvit_mini(patch_size=8, **TINY | {"num_classes": 0}, **lite))
    model = Segmenter(backbone, FCNHead(24, 3))
    loss = segmentation_loss(model(images()), torch.randint(3, (2, 32, 32)))
    loss.backward()
    assert backbone.model.patch_embed.proj.weight.grad.abs().max() > 0
    assert model.eval()(images()).shape == (2, 3, 32, 32)
    hard = MapBackbone(backbone.model, fill="hard").eval()
    torch.testing.assert_close(hard(images())["0"], backbone.model.forward_map(images(), "hard"))


def test_restored_maps_go_into_mask_rcnn():
    lite = {"prune_layers": (2,), "keep_rates": (0.5,)}
    backbone = MapBackbone(dependencyvit_mini(patch_size=8, **TINY | {"num_classes": 0}, **lite))
    model = MaskRCNN(
        backbone, 3, min_size=32, max_size=64,
        rpn_anchor_generator=AnchorGenerator(((8, 16),), ((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 2, 1),
        mask_roi_pool=MultiScaleRoIAlign(["0"], 4, 1),
    )  # fmt: skip
    mask = torch.zeros(1, 32, 32, dtype=torch.uint8)
    mask[:, 4:20, 8:28] = 1
    target = {"boxes": torch.tensor([[8.0, 4, 28, 20]]), "labels": torch.tensor([1]), "masks": mask}
    losses = model(list(images()), [target, target])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert backbone.model.patch_embed.proj.weight.grad.abs().max() > 0
    assert model.eval()(list(images(1)))[0]["masks"].shape[1:] == (1, 32, 32)


def test_bad_input(batch):
    regions, owner, nodes = batch["regions"], batch["node_object"], batch["nodes"]
    tree = dependency_tree(scores()[:1], decode="greedy")
    battery.check_errors([
        (lambda: token_regions(nodes, (7, 8)), "for grid=(7, 8)"),
        (lambda: token_regions(nodes.float(), GRID), "expected integers (B, H, W)"),
        (lambda: token_regions(nodes, GRID, least=2), "least=2: expected a number in [0, 1]"),
        (lambda: attachment(scores()[:1], regions, owner), "scores (1, 256, 256), regions (2,"),
        (lambda: object_mass(scores(), regions + 50, owner), "expected nodes below 22"),
        (lambda: nearer_elsewhere(regions, owner, (4, 4)), "grid=(4, 4): expected 256 patches"),
        (lambda: exit_attachment(tree, regions, owner), "expected a tree of (2, 256)"),
        (lambda: matched_iou(regions, nodes), "labels=(2, 256): expected target's shape (2, 64, 6"),
        (lambda: matched_iou(regions, 0 * regions - 1), "target='all ignored': expected a counted"),
        (lambda: gate_contrast(torch.ones(2, 2, 9), regions > 0), "expected bool (2, 9)"),
        (lambda: gate_contrast(torch.ones(2, 2, N), regions > 99), "foreground='all alike'"),
        (lambda: random_scores(0, 4), "images=0: expected an integer ≥ 1"),
        (lambda: color_locality(images()[0], GRID), "images=(3, 32, 32): expected (B, 3, H, W)"),
        (lambda: color_locality(images(), GRID, bandwidth=0), "bandwidth=0: expected a number in"),
        (lambda: feature_cut(torch.ones(2, 9, 4), (3, 4)), "features=(2, 9, 4): expected (B, 12"),
        (lambda: kmeans_pieces(torch.ones(2, 9), 2), "points=(2, 9): expected (B, N, D)"),
        (lambda: kmeans_pieces(torch.ones(2, 9, 1), 0), "pieces=0: expected an integer ≥ 1"),
        (lambda: MapBackbone(torch.nn.Identity()), "model=Identity: expected one with forward_map"),
    ])  # fmt: skip
