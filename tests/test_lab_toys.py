"""`attnlab.lab.toys`: every label follows its rule, and nothing short of the rule gives it away."""

from itertools import pairwise

import pytest
import torch
from einops import rearrange, reduce
from torch.nn import functional as F

from attnlab.lab import toys

ALL = [
    toys.same_different, toys.key_patch, toys.clutter_shapes, toys.binding,
    toys.motion_direction, toys.shapes,
]  # fmt: skip
every_toy = pytest.mark.parametrize("toy", ALL, ids=lambda toy: toy.__name__)


def colors_under(image, masks):
    """Numbers in `PALETTE` of the mean colors of `(n, 3, H, W)` under masks `(n, k, H, W)`."""
    area = reduce(masks.float(), "n k h w -> n k 1", "sum")
    mean = torch.einsum("n c h w, n k h w -> n k c", image, masks.float()) / area
    return (mean[:, :, None] - toys.PALETTE).norm(dim=-1).argmin(-1)


def seen_together(first, second, window):
    """Per image: does some window × window receptive field hold pixels of both masks?"""
    both = torch.stack([first, second], dim=1).float()
    seen = F.max_pool2d(F.pad(both, (window,) * 4), window, stride=1)
    return seen.prod(1).amax((1, 2)) > 0


def share(values):
    return float(values.float().mean())


@every_toy
def test_what_all_toys_share(toy):
    sample = toy(12, seed=5)
    image = sample["image"]
    assert image.dtype == torch.float32
    assert image.shape[:2] == (12, 3)
    assert image.min() >= 0
    assert image.max() <= 1
    assert sample["label"].dtype == torch.int64
    assert sample["masks"].dtype == torch.bool
    assert sample["masks"].shape[-2:] == image.shape[-2:]
    assert {len(value) for value in sample.values()} == {12}
    again, other = toy(12, seed=5), toy(12, seed=6)
    for key, value in sample.items():
        assert torch.equal(value, again[key])
    assert not torch.equal(image, other["image"])
    for value in sample.values():  # its own memory: writing to one sample leaves the others alone
        assert 0 not in value.stride()


@every_toy
def test_the_global_generator_is_neither_used_nor_moved(toy):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    toy(2)
    assert torch.equal(torch.rand(3), expected)


@every_toy
def test_noise_is_what_it_says(toy):
    clean = toy(4, seed=2, noise=0)["image"]
    noisy = toy(4, seed=2, noise=0.02)["image"]
    inner = (clean > 0.1) & (clean < 0.9)  # away from the ends, where noise is cut off
    assert float((noisy - clean)[inner].std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(("colors", "size"), [(4, 16), (2, 8), (6, 20)])
def test_same_different_is_read_off_the_pixels(colors, size):
    sample = toys.same_different(2000, colors=colors, size=size)
    left, right = colors_under(sample["image"], sample["masks"]).T
    assert torch.equal(torch.stack([left, right], dim=1), sample["labels"])
    assert torch.equal((left == right).long(), sample["label"])
    assert sample["masks"].sum((2, 3)).eq(9).all()
    assert not sample["masks"].all(1).any()
    assert share(sample["label"]) == pytest.approx(0.5, abs=0.04)
    for color in range(colors):  # one square alone says nothing
        for side in (left, right):
            assert share(side == color) == pytest.approx(1 / colors, abs=0.04)
            assert share(sample["label"][side == color]) == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("size", [12, 16, 24])
def test_same_different_is_out_of_reach_of_a_local_window(size):
    left, right = toys.same_different(200, size=size)["masks"].unbind(1)
    assert not seen_together(left, right, size - 7).any()
    assert seen_together(left, right, size - 6).any()


def test_same_different_has_no_additive_solution():
    """Cross entropy of a score a(left) + b(right) is lowest at 0: chance, as the docstring says."""
    sample = toys.same_different(4000)
    label = sample["label"].double()
    sides = F.one_hot(sample["labels"], 4).double()
    weights = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=50)

    def closure():
        optimizer.zero_grad()
        score = torch.einsum("n s c, s c -> n", sides, weights)
        loss = F.binary_cross_entropy_with_logits(score, label)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float(closure().detach()) == pytest.approx(0.6931, abs=5e-3)  # log 2


def test_key_patch_is_read_off_the_pixels():
    sample = toys.key_patch(300)
    image, shape = sample["image"], sample["shape"]
    key = (colors_under(image, sample["masks"])[:, 0] == 2).long()  # blue
    assert torch.equal(key, sample["key"])
    yellow = (image[:, 0] > 0.5).long()  # of the shapes' two colors
    assert share(yellow[shape > 0] == (shape[shape > 0] - 1)) > 0.999
    meaning = torch.where(shape > 0, 1 + ((shape - 1) ^ key[:, None, None]), 0)
    assert torch.equal(meaning, sample["label"])
    assert share(key) == pytest.approx(0.5, abs=0.08)
    foreground = sample["label"][shape > 0]
    assert share(foreground == 1) == pytest.approx(0.5, abs=0.05)
    for kind in (1, 2):  # what a shape looks like says nothing
        assert share(sample["label"][shape == kind] == 1) == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize(
    ("kind", "area"), [(1, 29), (2, 25)]
)  # of radius 3: x² + y² ≤ 9, |x|+|y| ≤ 3
def test_key_patch_draws_discs_and_diamonds(kind, area):
    shape = toys.key_patch(60, shapes=1)["shape"]
    alone = (shape == kind).sum((1, 2))
    assert set(alone.tolist()) == {0, area}


@pytest.mark.parametrize(("size", "window", "reached"), [(13, 7, 0), (24, 7, 0), (13, 9, 1)])
def test_the_key_is_outside_a_7_px_window_around_every_shape_pixel(size, window, reached):
    """With 13 px, every center lies as near to the key as centers ever do."""
    sample = toys.key_patch(100, size=size)
    near_key = F.max_pool2d(sample["masks"].float(), window, stride=1, padding=window // 2)
    assert bool(((near_key[:, 0] > 0) & (sample["shape"] > 0)).any()) == reached


def named_by_signature(mask):
    """Which of the six shapes a lone mask is, from four points of its bounding box."""
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = box.shape

    def at(u, v):  # from -1 to 1
        return bool(box[round((v + 1) / 2 * (height - 1)), round((u + 1) / 2 * (width - 1))])

    return {
        (True, False, False, True): 0, (True, True, True, True): 1, (True, False, True, True): 2,
        (False, False, False, True): 3, (True, False, False, False): 4,
        (False, False, False, False): 5,
    }[at(0, 0), at(0.9, -0.9), at(0.9, 0.9), at(0.65, 0.65)]  # fmt: skip


@pytest.mark.parametrize("objects", [1, 2])
def test_clutter_shapes(objects):
    sample = toys.clutter_shapes(150, seed=3, objects=objects)
    labels, masks = sample["labels"], sample["masks"]
    named = [[named_by_signature(mask) for mask in pair] for pair in masks]
    assert torch.equal(torch.tensor(named), labels)
    assert torch.equal(sample["label"], labels[:, 0])
    assert 0.045 < share(masks) < 0.065
    for number in range(6):
        assert share(labels == number) == pytest.approx(1 / 6, abs=0.08)
    # No shape is cut off: a mask's extent never falls short of its smallest radius.
    assert masks.any(3).sum(2).min() >= 2 * 8 * 0.8 - 1
    assert masks.any(2).sum(2).max() <= 2 * 12 + 1


def test_two_objects_differ_and_never_overlap():
    sample = toys.clutter_shapes(300, objects=2, size=32)
    assert (sample["labels"][:, 0] != sample["labels"][:, 1]).all()
    left, right = sample["masks"].unbind(1)
    assert not left[:, :, 16:].any()
    assert not right[:, :, :16].any()


def test_clutter_shapes_paints_one_color_that_is_not_the_class():
    sample = toys.clutter_shapes(600, size=16, noise=0)
    inside = rearrange(sample["image"], "n c h w -> n h w c")
    means = []
    for image, mask in zip(inside, sample["masks"][:, 0], strict=True):
        assert (image[mask] == image[mask][0]).all()
        means.append(image[mask][0])
    for number in range(6):
        mean = torch.stack(means)[sample["label"] == number].mean(0)
        torch.testing.assert_close(mean, torch.full((3,), 0.5), atol=0.13, rtol=0)


def test_binding_is_read_off_the_pixels():
    sample = toys.binding(200, seed=1, size=24)
    masks = rearrange(sample["masks"], "n o p h w -> n (o p) h w")
    found = colors_under(sample["image"], masks)
    assert (found[:, 0] == 0).all()  # red body
    assert (found[:, 3] == 2).all()  # blue body
    red_has, blue_has = found[:, 2], found[:, 5]
    assert torch.equal((red_has == 1).long(), sample["label"])  # green
    assert torch.equal(torch.where(red_has == 1, 3, 1), blue_has)  # the other: yellow or green
    assert share(sample["label"]) == pytest.approx(0.5, abs=0.1)
    for neck in (1, 4):
        white = sample["image"].mean(1)[masks[:, neck]]
        assert white.min() > 0.75


def test_in_binding_a_bag_of_colors_says_nothing():
    sample = toys.binding(40, noise=0, distractors=0)
    areas = sample["masks"].sum((3, 4))
    assert areas.tolist() == [[[48, 16, 16], [48, 16, 16]]] * 40
    assert sample["masks"].sum((1, 2)).max() == 1  # nothing covers anything
    pixels = rearrange(sample["image"], "n c h w -> n (h w) 1 c")
    counts = (pixels == toys.PALETTE[:4]).all(-1).sum(1)
    assert (counts == torch.tensor([48, 16, 48, 16])).all()  # red, green, blue, yellow


def test_binding_is_out_of_reach_of_a_5_px_window():
    masks = toys.binding(100)["masks"]
    bodies, parts = masks[:, :, 0].any(1), masks[:, :, 2].any(1)
    assert not seen_together(bodies, parts, 5).any()
    assert seen_together(bodies, parts, 6).all()


@pytest.mark.parametrize("adjacency", [0, 0.3, 0.5, 1])
def test_in_binding_the_nearest_body_is_wrong_as_often_as_asked(adjacency):
    sample = toys.binding(100, adjacency=adjacency)
    masks = sample["masks"].float()
    index = torch.arange(40.0)
    area = masks.sum((3, 4))
    center = torch.stack(
        [torch.einsum("n o p h w, w -> n o p", masks, index) / area,
         torch.einsum("n o p h w, h -> n o p", masks, index) / area], dim=-1
    )  # fmt: skip
    bodies, parts = center[:, :, 0], center[:, :, 2]
    nearest = torch.cdist(parts, bodies).argmin(-1)
    other = nearest != torch.arange(2)
    assert torch.equal(other, sample["adjacent"][:, None].expand(-1, 2))
    assert share(other) == pytest.approx(adjacency)


def test_binding_looks_the_same_for_both_labels_from_every_side():
    sample = toys.binding(600, size=24)
    red_above = sample["masks"][:, 0, 0].any(2).float().argmax(1)
    blue_above = sample["masks"][:, 1, 0].any(2).float().argmax(1)
    first = share((red_above < blue_above).float())
    assert first == pytest.approx(0.5, abs=0.08)
    for label in (0, 1):
        chosen = sample["label"] == label
        assert share(sample["adjacent"][chosen]) == pytest.approx(0.5, abs=0.08)
        assert share(red_above[chosen] < blue_above[chosen]) == pytest.approx(first, abs=0.08)


@pytest.mark.parametrize("speed", [1, 3, 15])
def test_motion_direction_moves_the_disc_by_its_velocity(speed):
    sample = toys.motion_direction(40, speed=speed)
    for masks, (dx, dy), label in zip(
        sample["masks"], sample["velocity"].tolist(), sample["label"], strict=True
    ):
        unit = list(toys.DIRECTIONS.values())[label]
        assert (dx, dy) == (speed * unit[0], speed * unit[1])
        for before, after in pairwise(masks):
            assert torch.equal(before.roll((dy, dx), (0, 1)), after)
    assert sample["masks"].sum((2, 3)).eq(29).all()


def test_motion_direction_shows_the_disc_over_still_clutter():
    sample = toys.motion_direction(20, noise=0)
    image, masks = sample["image"], sample["masks"]
    for clip, mask in zip(rearrange(image, "n c t h w -> n t h w c"), masks, strict=True):
        assert (clip[mask] == clip[mask][0]).all()
        still = ~mask[0] & ~mask[1]
        assert torch.equal(clip[0][still], clip[1][still])


def test_no_single_frame_says_the_direction():
    sample = toys.motion_direction(3000, frames=3, size=16, speed=5)
    for label in range(4):
        chosen = sample["label"] == label
        assert share(chosen) == pytest.approx(0.25, abs=0.03)
        where = reduce(
            sample["masks"][chosen].float(), "n t (y h) (x w) -> t y x", "mean", y=2, x=2
        )
        torch.testing.assert_close(where, torch.full((3, 2, 2), 29 / 256), atol=0.025, rtol=0)


def test_a_fast_disc_is_out_of_reach_of_a_local_window():
    for speed, reached in ((11, False), (10, True)):  # 6 + 5
        masks = toys.motion_direction(100, speed=speed, frames=2)["masks"]
        assert bool(seen_together(masks[:, 0], masks[:, 1], 5).any()) == reached


def test_shapes_are_what_their_labels_say():
    """Of even density, an ellipse reaches 2 standard deviations, a rectangle √6 at its corners."""
    sample = toys.shapes(30, size=128, objects=1)
    for label, (mask,) in zip(sample["label"], sample["masks"], strict=True):
        points = mask.nonzero().double()
        centered = points - points.mean(0)
        row, column = points.mean(0).round().long()
        if not mask[row, column]:
            assert label == 2
            continue
        whitened = centered @ torch.linalg.inv(torch.cov(centered.T)) * centered
        assert label == int(whitened.sum(1).max().sqrt() > 2.2)


def test_shapes_masks_are_exact():
    sample = toys.shapes(40, noise=0, objects=3)
    masks = sample["masks"]
    assert masks.sum(1).max() == 1
    colors = rearrange(sample["image"], "n c h w -> n h w c")
    for image, objects in zip(colors, masks, strict=True):
        background = image[~objects.any(0)]
        assert (background == background[0]).all()
        for mask in objects:
            if mask.any():
                assert (image[mask] == image[mask][0]).all()
                assert (image[mask][0] - background[0]).abs().min() > 0.29
    labels = toys.shapes(300, size=8)["labels"]
    for number in range(3):
        assert share(labels == number) == pytest.approx(1 / 3, abs=0.07)


def test_a_later_shape_covers_an_earlier_one():
    """The last of many objects is whole: as large as it would be alone."""
    last = toys.shapes(50, objects=6)["masks"].sum((2, 3))
    assert last[:, -1].min() > 100
    assert last[:, -1].float().mean() > 1.5 * last[:, 0].float().mean()


@every_toy
@pytest.mark.parametrize(("arguments", "message"), [
    ({"n": 0}, r"n=0: expected an integer ≥ 1"),
    ({"n": 2, "seed": -1}, r"seed=-1: expected an integer ≥ 0"),
    ({"n": 2, "noise": 2}, r"noise=2: expected a number in \[0, 1\]"),
    ({"n": 2, "size": 7}, r"size=7: expected an integer ≥ "),
])  # fmt: skip
def test_wrong_arguments(toy, arguments, message):
    with pytest.raises(ValueError, match=message):
        toy(**arguments)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: toys.same_different(2, colors=7), r"colors=7: expected an integer from 2 to 6"),
    (lambda: toys.key_patch(2, shapes=0), r"shapes=0: expected an integer ≥ 1"),
    (lambda: toys.clutter_shapes(2, objects=3), r"objects=3: expected 1 or 2"),
    (lambda: toys.binding(2, adjacency=1.5), r"adjacency=1.5: expected a number in \[0, 1\]"),
    (lambda: toys.binding(2, distractors=-1), r"distractors=-1: expected an integer ≥ 0"),
    (lambda: toys.motion_direction(2, frames=1), r"frames=1: expected an integer ≥ 2"),
    (lambda: toys.motion_direction(2, speed=16), r"speed=16: expected 1 ≤ speed < 16.0"),
    (lambda: toys.motion_direction(2, speed=0), r"speed=0: expected 1 ≤ speed"),
    (lambda: toys.shapes(2, objects=0), r"objects=0: expected an integer ≥ 1"),
])  # fmt: skip
def test_value_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("toy", "size"), [
    (toys.same_different, 8), (toys.key_patch, 13), (toys.clutter_shapes, 16),
    (toys.binding, 24), (toys.motion_direction, 16), (toys.shapes, 8),
])  # fmt: skip
def test_the_smallest_size_works(toy, size):
    assert toy(50, size=size)["image"].shape[-2:] == (size, size)
