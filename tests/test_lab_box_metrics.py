"""Boxes from maps: boxes drawn by hand, ties, errors, and an independent count of pieces."""

import pytest
import torch
from skimage.measure import label, regionprops

from attnlab.lab.box_metrics import box_accuracy, box_ious, largest_piece


def map_with(*boxes: tuple[int, int, int, int], value: float = 1.0, size: int = 16) -> torch.Tensor:
    """`(1, size, size)`, `value` inside of (x1, y1, x2, y2)."""
    drawn = torch.zeros(1, size, size)
    for x1, y1, x2, y2 in boxes:
        drawn[0, y1:y2, x1:x2] = value
    return drawn


def test_a_box_is_around_the_largest_piece():
    mask = map_with((2, 3, 8, 9))
    looks = map_with((2, 3, 8, 9), (12, 12, 14, 14))
    assert box_ious(looks, mask, [0.5]).tolist() == [[1.0]]
    shifted = map_with((5, 3, 11, 9))  # half of each is shared: 3·6 of 2·36 − 18
    assert box_ious(shifted, mask, [0.5]).item() == pytest.approx(18 / 54)
    assert box_ious(map_with((10, 10, 16, 16)), mask, [0.5]).item() == 0


def test_a_constant_map_gives_the_whole_image():
    mask = map_with((0, 0, 8, 16))
    assert box_ious(torch.full((1, 4, 4), 0.3), mask, [0.0, 0.9]).tolist() == [[0.5], [0.5]]


def test_the_threshold_counts_from_the_maps_own_minimum_to_its_maximum():
    mask = map_with((2, 2, 6, 6))
    looks = 0.5 + map_with((2, 2, 12, 12), value=0.1) + map_with((2, 2, 6, 6), value=0.1)
    wide, tight = box_ious(looks, mask, [0.4, 0.9])[:, 0].tolist()
    assert wide == pytest.approx(16 / 100)
    assert tight == 1


def test_pieces_that_touch_at_a_corner_are_one(device):
    torch.manual_seed(0)
    masks = torch.rand(8, 12, 12) > 0.6
    kept = largest_piece(masks)
    for mask, piece in zip(masks, kept, strict=True):
        areas = [region.area for region in regionprops(label(mask.numpy(), connectivity=2))]
        assert piece.sum() == max(areas)
        assert not (piece & ~mask).any()
    assert not largest_piece(torch.zeros(1, 4, 4, dtype=torch.bool)).any()


def test_the_threshold_is_chosen_on_other_images():
    mask = map_with((2, 2, 6, 6))
    looks = map_with((2, 2, 14, 14), value=0.5) + map_with((2, 2, 6, 6), value=0.5)
    assert box_accuracy(looks, mask, looks, mask, overlap=0.9) == 1
    misleading = map_with((2, 2, 14, 14))  # on these the low threshold is best
    assert box_accuracy(looks, mask, looks, misleading, overlap=0.9, thresholds=(0.2, 0.8)) == 0


def test_errors():
    maps, masks = torch.rand(2, 4, 4), torch.rand(2, 8, 8)
    for run, words in [
        (lambda: box_ious(maps[0], masks, [0.5]), r"\(4, 4\), \(2, 8, 8\)'.*\(N, h, w\) and"),
        (lambda: box_ious(maps, masks[:1], [0.5]), r"maps, masks='\(2, 4, 4\), \(1, 8, 8\)'"),
        (lambda: box_ious(maps, masks, [1.5]), "threshold"),
        (lambda: box_accuracy(maps, masks, maps, masks, overlap=0), "overlap"),
    ]:
        with pytest.raises(ValueError, match=words):
            run()
