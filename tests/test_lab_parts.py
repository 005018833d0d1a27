"""`parts`: what is drawn is what the truth says, options do what they promise, draws are stable.

`python tests/test_lab_parts.py` writes the golden samples again, after `parts.VERSION`.
"""

import re
from functools import cache
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.lab import data, files
from attnlab.lab.data import parts, parts_shapes

GOLDEN = Path(__file__).parent / "golden" / "parts.safetensors"
GOLDEN_OPTIONS = {"n": 2, "split": "test", "size": 48, "seed": 3, "objects": 2}
MANY = {"n": 96, "objects": (1, 3)}
few = settings(max_examples=25, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def _one_thread():
    """As `data.load` draws: the operations are small, and on a busy machine two are slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def _drawn(options) -> dict:
    return parts.derive(parts.generate(**dict(options)))


def drawn(**options) -> dict:
    """Samples with all that is derived; drawn once for all tests that ask for the same."""
    return _drawn(tuple(sorted(options.items())))


def centroids(masks: torch.Tensor) -> torch.Tensor:
    """x, y of masks `(B, M, H, W)`; `(B, M, 2)`, NaN for an empty one."""
    height, width = masks.shape[-2:]
    total = masks.sum((-2, -1))
    x = (masks * (torch.arange(width) + 0.5)).sum((-2, -1)) / total
    y = (masks * (torch.arange(height) + 0.5).view(-1, 1)).sum((-2, -1)) / total
    return torch.stack([x, y], dim=-1)


# --- the classes ----------------------------------------------------------------------------------


def test_eight_types_of_31_parts():
    assert parts.CLASSES == (
        "house", "car", "face", "tree", "boat", "robot", "flower", "lamp",
    )  # fmt: skip
    assert parts.PARTS[0] == "background"
    assert len(set(parts.PARTS)) == len(parts.PARTS) == 1 + 31
    assert {name.split()[0] for name in parts.PARTS[1:]} == set(parts.CLASSES)


def test_every_part_is_seen():
    seen = drawn(n=320)["node_part"].unique().tolist()
    assert seen == list(range(32))


# --- same seed, same bytes ------------------------------------------------------------------------


def test_the_first_samples_do_not_depend_on_how_many_are_asked_for():
    short, long = (parts.generate(n, objects=(1, 3)) for n in (5, 70))
    for key, value in short.items():
        assert torch.equal(value, long[key][:5]), key


def test_seed_and_split_are_streams_of_their_own():
    images = torch.cat(
        [
            parts.generate(33, split, 32, seed)["image"].flatten(1)
            for split in parts.SPLITS
            for seed in (0, 1)
        ]
    )
    assert len(images.unique(dim=0)) == len(images) == 6 * 33
    again = parts.generate(33, "train", 32, 0)["image"].flatten(1)
    assert torch.equal(again, images[:33])


def test_threads_change_nothing():
    one = parts.generate(32)
    torch.set_num_threads(2)
    two = parts.generate(32)
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_golden_samples():
    golden = safetensors.torch.load_file(GOLDEN)
    sample = parts.generate(**GOLDEN_OPTIONS)
    assert sample.keys() == golden.keys()
    off = (sample["image"].int() - golden["image"].int()).abs()
    assert (off > 1).float().mean() <= 0.001
    assert (sample["nodes"] != golden["nodes"]).float().mean() <= 0.001
    for key in ("label", "labels", "tree", "node_part"):
        assert torch.equal(sample[key], golden[key]), key


def test_another_size_shows_the_same_scenes():
    small, large = (parts.generate(24, size=size) for size in (48, 96))
    assert torch.equal(small["label"], large["label"])
    same = small["nodes"] == large["nodes"][:, ::2, ::2]
    assert same.float().mean() > 0.97


# --- the truth ------------------------------------------------------------------------------------


def test_the_tree_is_a_tree():
    batch = drawn(**MANY)
    tree, count = batch["tree"].long(), batch["labels"].shape[1]
    assert (tree[:, 0] == -1).all()
    assert (tree[:, 1:] != -1).all()
    node = torch.arange(tree.shape[1])
    real = tree >= 0
    assert (tree < node)[real].all()  # a parent comes before its children, so there is no cycle
    assert (tree.gather(1, tree.clamp(min=0))[real] > -2).all()  # the parent is no padding
    objects, leaves = real[:, 1 : 1 + count], real[:, 1 + count :]
    assert (tree[:, 1 : 1 + count][objects] == 0).all()
    assert torch.equal(objects, batch["labels"] >= 0)
    assert torch.equal(leaves, batch["node_part"][:, 1 + count :] > 0)


def test_pixels_belong_to_nodes_of_the_tree():
    batch = drawn(**MANY)
    nodes, tree = batch["nodes"].long(), batch["tree"].long()
    count = batch["labels"].shape[1]
    for image in range(len(nodes)):
        seen = set(nodes[image].unique().tolist()) - {0}
        leaves = {i for i in range(1 + count, tree.shape[1]) if tree[image, i] >= 0}
        assert seen == leaves  # a part has a node exactly when it is visible
        for leaf in seen:
            place = nodes[image] == leaf
            k = int(tree[image, leaf]) - 1
            assert (batch["instances"][image, k][place] == 1).all()
            (part,) = batch["parts"][image][place].unique().tolist()
            owner = parts.CLASSES[batch["labels"][image, k]]
            assert parts.PARTS[part].split()[0] == owner
            assert batch["node_object"][image, leaf] == k == batch["node_object"][image, k + 1]


def test_instances_boxes_and_label():
    batch = drawn(**MANY)
    instances, labels, boxes = batch["instances"], batch["labels"].long(), batch["boxes"].tolist()
    assert torch.equal(instances.sum(1), batch["saliency"])
    assert torch.equal(batch["saliency"] > 0, batch["parts"] > 0)
    area = instances.sum((2, 3))
    assert torch.equal(area > 0, labels >= 0)
    largest = area.argmax(1)
    assert torch.equal(batch["label"].long(), labels[torch.arange(len(labels)), largest])
    for image in range(16):
        for k, box in enumerate(boxes[image]):
            rows, columns = torch.nonzero(instances[image, k], as_tuple=True)
            if len(rows) == 0:
                assert box == [0, 0, 0, 0]
                continue
            left, top = int(columns.min()), int(rows.min())
            assert box == [left, top, int(columns.max()) + 1, int(rows.max()) + 1]


def test_what_is_painted_is_what_the_masks_say():
    batch = drawn(n=64, background="flat", distractors=0, occlusion=0.0)
    image, mask = batch["image"].float(), batch["saliency"].unsqueeze(1)
    near = F.max_pool2d(mask, 5, stride=1, padding=2)  # with the soft rim
    outside = torch.where(near == 0, image, torch.nan).flatten(2)
    ground = outside.nanmedian(-1, keepdim=True).values
    spread = 0.07 * 255 + 2  # of the grain, and rounding
    # A stroke thinner than half a pixel leaves a trace, but is no node.
    assert ((outside - ground).abs() > spread).float().mean() < 0.002
    differs = (image - ground.unsqueeze(-1)).abs().amax(1) > spread
    assert (differs & (mask[:, 0] > 0)).sum() > 0.85 * mask.sum()


def test_windows_hold_all_of_a_stroke(monkeypatch):
    windowed = parts.generate(32, objects=2, distractors=8, size=(40, 72))
    everywhere = lambda center, length, side: torch.arange(length).expand(len(center), 1, length)  # noqa: E731
    monkeypatch.setattr(parts, "_window", everywhere)
    whole = parts.generate(32, objects=2, distractors=8, size=(40, 72))
    for key in whole:
        assert torch.equal(windowed[key], whole[key]), key


# --- the two shapes -------------------------------------------------------------------------------

length = st.floats(2, 12)


@few
@given(length, length, st.floats(0, 1.5), st.floats(-1, 1), st.floats(-14, 14), st.floats(-14, 14))
def test_box_distance(w, h, top, lean, u, v):
    corner = [(-w, h), (w, h), (lean * w + top * w, -h), (lean * w - top * w, -h)]
    corner = torch.tensor(corner, dtype=torch.float64)
    point = torch.tensor([u, v], dtype=torch.float64)
    edge = corner.roll(-1, 0) - corner
    along = ((point - corner) * edge).sum(1) / edge.square().sum(1).clamp(min=1e-12)
    foot = corner + along.clamp(0, 1).unsqueeze(1) * edge
    true = (foot - point).norm(dim=1).min().item()
    across = edge[:, 0] * (point - corner)[:, 1] - edge[:, 1] * (point - corner)[:, 0]
    is_inside = bool((across <= 0).all())
    arguments = (torch.tensor(value, dtype=torch.float64) for value in (u, v, w, h, top, lean))
    got = parts_shapes.box_distance(*arguments).item()
    if true > 1e-6:
        assert (got < 0) == is_inside
    assert abs(got) <= true + 1e-9  # at a corner or beside a slanted edge it may be nearer


def test_box_distance_is_exact_beside_an_edge():
    w, h, one, zero = torch.tensor([5.0, 3.0, 1.0, 0.0])
    u, v = torch.tensor([0.0, 0.0, 7.0, 4.0]), torch.tensor([0.0, 5.0, 1.0, 0.0])
    expected = torch.tensor([-3.0, 2.0, 2.0, -1.0])
    torch.testing.assert_close(parts_shapes.box_distance(u, v, w, h, one, zero), expected)


@few
@given(length, length, st.floats(0, 0.3), st.floats(0, 6.28), st.floats(0.3, 1.8))
def test_disc_distance_has_the_sign_of_the_equation(w, h, lobes, angle, radius):
    values = [angle, radius, w, h, lobes]
    angle, radius, w, h, lobes = (torch.tensor(x, dtype=torch.float64) for x in values)
    u, v = w * radius * torch.cos(angle), h * radius * torch.sin(angle)
    equation = radius - 1 - lobes * torch.cos(5 * angle)
    got = parts_shapes.disc_distance(u, v, w, h, lobes)
    if equation.abs() > 1e-4:
        assert (got < 0) == (equation < 0)


def test_disc_distance_is_in_px_near_the_rim():
    w, h, zero = torch.tensor([9.0, 4.0, 0.0])
    angle = torch.linspace(0, 6, 50)
    rim = torch.stack([w * torch.cos(angle), h * torch.sin(angle)])
    normal = F.normalize(rim / torch.stack([w**2, h**2]).view(2, 1), dim=0)
    for step in (-0.5, 0.0, 0.5):
        u, v = rim + step * normal
        got = parts_shapes.disc_distance(u, v, w, h, zero)
        torch.testing.assert_close(got, torch.full_like(got, step), atol=0.1, rtol=0)


def test_rgb():
    hsv = torch.tensor([[0.0, 1, 1], [1 / 3, 1, 0.5], [2 / 3, 0.5, 1], [0.9, 0, 0.7]])
    expected = torch.tensor([[1.0, 0, 0], [0, 0.5, 0], [0.5, 0.5, 1], [0.7, 0.7, 0.7]])
    torch.testing.assert_close(parts_shapes.rgb(hsv), expected)


# --- the options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("objects", "least", "most"), [(1, 1, 1), (3, 3, 3), ((1, 3), 1, 3)])
def test_number_of_objects(objects, least, most):
    count = (drawn(n=96, objects=objects)["labels"] >= 0).sum(1)
    assert (count.min(), count.max()) == (least, most)


def test_types_are_equally_frequent():
    share = drawn(n=320)["label"].long().bincount(minlength=8) / 320
    assert ((share - 1 / 8).abs() < 4 * (1 / 8 * 7 / 8 / 320) ** 0.5).all()


def test_palette_random_takes_the_typical_colors_away():
    crown = parts.PARTS.index("tree crown")
    greens = {}
    for palette in parts.PALETTES:
        batch = drawn(n=320, palette=palette)
        color = batch["image"].float().permute(0, 2, 3, 1)[batch["parts"] == crown]
        greens[palette] = (color[:, 1] > color[:, 0].maximum(color[:, 2])).float().mean()
    assert greens["typical"] > 0.7
    assert greens["random"] < 0.5


def test_adjacency_brings_parts_nearer_to_other_objects():
    foreign = {}
    for adjacency in (0.0, 1.0):
        batch = drawn(n=160, objects=2, adjacency=adjacency)
        node = torch.arange(batch["tree"].shape[1]).view(-1, 1, 1)
        part = centroids((batch["nodes"].unsqueeze(1) == node).float())
        own = batch["node_object"]
        away = torch.cdist(part, centroids(batch["instances"])).nan_to_num(1e4)
        is_part = batch["node_part"] > 0
        foreign[adjacency] = (away.argmin(-1) != own)[is_part].float().mean()
    assert foreign[0.0] < 0.03
    assert foreign[1.0] > 0.10


def test_occlusion_hides_a_piece_of_an_object():
    free, hidden = (drawn(n=96, occlusion=share)["saliency"] for share in (0.0, 1.0))
    assert (hidden <= free).all()  # the same scenes, less of them
    lost = 1 - hidden.sum((1, 2)) / free.sum((1, 2))
    assert 0.02 < lost.mean() < 0.3
    assert lost.max() < 0.75


def test_distractors_have_no_label():
    none, eight = (drawn(n=64, distractors=count, background="flat") for count in (0, 8))
    for batch, least, most in ((none, 0, 0.1), (eight, 0.1, 1)):
        image, mask = batch["image"].float(), batch["saliency"].unsqueeze(1)
        near = F.max_pool2d(mask, 3, stride=1, padding=1)
        outside = torch.where(near == 0, image, torch.nan).flatten(2)
        ground = outside.nanmedian(-1, keepdim=True).values
        other = ((outside - ground).abs().amax(1) > 30).float().mean()
        assert least <= other <= most


def test_scale_is_the_side_of_an_object():
    for scale in ((0.3, 0.4), (0.6, 0.8)):
        boxes = drawn(n=96, size=96, scale=scale, occlusion=0.0)["boxes"][:, 0].float()
        side = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt() / 96
        assert 0.8 * scale[0] < side.mean() < 1.15 * scale[1]


@pytest.mark.parametrize("background", parts.BACKGROUNDS)
def test_backgrounds(background):
    batch = drawn(n=64, background=background, distractors=0)
    ground = torch.where(batch["saliency"].unsqueeze(1) > 0, torch.nan, batch["image"].float())
    ground = ground.flatten(2).nan_to_num(ground.nanmean())
    varied = (ground.std(-1).mean(1) > 15).float().mean()
    assert (varied > 0.8) == (background != "flat")


def test_not_square():
    batch = drawn(n=8, size=(40, 72), objects=2)
    assert batch["image"].shape == (8, 3, 40, 72)
    assert batch["instances"].shape == (8, 2, 40, 72)
    assert batch["nodes"].any(1)[:, 40:].any()  # objects lie in the right part, too


def test_load_gives_samples(device):
    samples = data.load("parts", "val", n=6, objects=(1, 2), size=32, device=device, cache=False)
    assert samples.classes == parts.CLASSES
    one = samples[4]
    assert one["image"].dtype == one["instances"].dtype == torch.float32
    assert one["parts"].device.type == device.type
    shapes = {key: tuple(value.shape) for key, value in one.items()}
    assert shapes == {
        "image": (3, 32, 32), "label": (), "labels": (2,), "boxes": (2, 4), "nodes": (32, 32),
        "tree": (15,), "node_part": (15,), "node_object": (15,), "parts": (32, 32),
        "instances": (2, 32, 32), "saliency": (32, 32),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n=0: expected an integer ≥ 1"),
        ({"split": "dev"}, "split='dev': expected one of ('train', 'val', 'test')"),
        ({"size": 8}, "at least 16"),
        ({"objects": 4}, "objects=4: expected 1 to 3"),
        ({"objects": (2, 1)}, "objects=(2, 1): expected 1 to 3"),
        ({"scale": (0.5, 0.2)}, "scale=(0.5, 0.2): expected (least, most)"),
        ({"scale": (0.5, 1.2)}, "scale=(0.5, 1.2): expected (least, most)"),
        ({"palette": "gray"}, "palette='gray': expected one of ('typical', 'random')"),
        ({"background": "sky"}, "background='sky': expected one of ('mixed', "),
        ({"distractors": 9}, "distractors=9: expected an integer from 0 to 8"),
        ({"occlusion": 1.5}, "occlusion=1.5: expected a number in [0, 1]"),
        ({"adjacency": -0.5, "objects": 2}, "adjacency=-0.5: expected a number in [0, 1]"),
        ({"adjacency": 0.5}, "adjacency=0.5: expected 0 where an image may have one object"),
    ],
)
def test_value_errors(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parts.generate(**{"n": 1, **arguments})


if __name__ == "__main__":
    with files.atomic_write(GOLDEN) as temporary:
        safetensors.torch.save_file(parts.generate(**GOLDEN_OPTIONS), temporary)
