"""`attnlab.lab.robustness`: what is turned and covered, and that each sweep scores all of it."""

import battery
import pytest
import torch

from attnlab import spformer
from attnlab.lab import robustness, train
from attnlab.lab import superpixel_metrics as sm


def images(n=2, size=(12, 12), seed=0):
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("angle", "turns"), [(0, 0), (90, 1), (180, 2), (-90, 3)])
def test_quarter_turns_are_exact(angle, turns):
    x = images()
    labels = (8 * x[:, 0]).long()
    expected = torch.rot90(x, turns, (2, 3))
    torch.testing.assert_close(robustness.rotated(x, angle), expected)
    turned = robustness.rotated_labels(labels, angle)
    assert torch.equal(turned, torch.rot90(labels, turns, (1, 2)))
    assert turned.dtype == torch.int64


def test_images_and_labels_turn_together_and_corners_are_filled():
    half = torch.zeros(1, 1, 33, 33)
    half[..., 17:] = 1.0
    turned = robustness.rotated(half, 30, fill=0.25)
    labels = robustness.rotated_labels(half[:, 0].long(), 30)
    assert float(turned[0, 0, 0, 0]) == 0.25
    assert int(labels[0, 0, 0]) == 255
    counted = (labels != 255) & ((turned[:, 0] - 0.5).abs() > 0.3)
    agree = (turned[:, 0] > 0.5) == (labels == 1)
    assert agree[counted].float().mean() > 0.97


def test_occluder_in_the_middle_or_at_a_corner(device):
    middle = robustness.occluder((6, 8), 2)
    assert middle.nonzero().tolist() == [[2, 3], [2, 4], [3, 3], [3, 4]]
    corner = robustness.occluder((6, 8), 2, (0, 6))
    assert corner.nonzero().tolist() == [[0, 6], [0, 7], [1, 6], [1, 7]]
    x = images(size=(6, 8)).to(device)
    out = robustness.occluded(x, 2, (0, 6), fill=0.5)
    assert (out[:, :, :2, 6:] == 0.5).all()
    out[:, :, :2, 6:] = x[:, :, :2, 6:]
    assert torch.equal(out, x), "and nothing else"
    assert torch.equal(robustness.occluded(x, 0), x)


def test_sweeps_score_each_version_of_the_batch():
    batch = {"image": images(), "label": torch.tensor([0, 1]), "classes": images()[:, 0].long()}
    turned = robustness.rotation_sweep(dict, batch, (0, 45, 90), labels=("classes",))
    assert list(turned) == [0, 45, 90]
    assert torch.equal(turned[45]["image"], robustness.rotated(batch["image"], 45))
    assert torch.equal(turned[45]["classes"], robustness.rotated_labels(batch["classes"], 45))
    assert turned[45]["label"] is batch["label"]
    torch.testing.assert_close(turned[0]["image"], batch["image"])
    covered = robustness.occlusion_sweep(dict, batch, (0, 4), corner=(1, 2), fill=0.5)
    assert list(covered) == [0, 4]
    assert torch.equal(covered[0]["image"], batch["image"])
    assert torch.equal(covered[4]["image"], robustness.occluded(batch["image"], 4, (1, 2), 0.5))
    assert torch.equal(covered[4]["occluder"], robustness.occluder((12, 12), 4, (1, 2)))


def test_accuracy_and_leak_of_a_model_are_scores():
    model = spformer.spformer_mini(img_size=32, depths=(1, 1)).eval()
    batch = {"image": images(4, (32, 32)), "label": torch.arange(4)}
    accuracies = robustness.rotation_sweep(lambda b: train.accuracy(model, b), batch, (0, 90))
    assert set(accuracies) == {0, 90}
    assert all(0 <= accuracy <= 1 for accuracy in accuracies.values())

    @torch.no_grad()
    def leak(batch):
        _, info = model(batch["image"], return_info=True)
        covered = batch["occluder"][::2, ::2].expand(4, -1, -1)  # at the stem's stride
        return sm.occlusion_leak(info[-1]["logits"], covered)

    leaks = robustness.occlusion_sweep(leak, batch, (0, 16))
    assert (leaks[0] == 0).all()
    assert leaks[16].shape == (4, 2)


def test_bad_input():
    x = images()
    battery.check_errors([
        (lambda: robustness.rotated(x[0], 9), "images=(3, 12, 12): expected (N, C, H, W)"),
        (lambda: robustness.rotated(x, "9"), "angle='9': expected a number in (-inf, inf)"),
        (lambda: robustness.rotated_labels(x[:, 0], 9), "(2, 12, 12)): expected integers (N, H"),
        (lambda: robustness.occluder((6, 8), -1), "side=-1: expected an integer ≥ 0"),
        (lambda: robustness.occluder((6, 8), 7), "occluder='side=7 at (-1, 0)': expected a square"),
        (lambda: robustness.occluded(x, 4, (9, 0)), "expected a square inside an image of (12"),
        (lambda: robustness.occluded(x[0], 4), "images=(3, 12, 12): expected (N, C, H, W)"),
        (lambda: robustness.rotation_sweep(dict, {"image": x}, labels=("mask",)),
         "batch=['image']: expected samples with 'mask'"),
        (lambda: robustness.occlusion_sweep(dict, {}), "batch=[]: expected samples with 'image'"),
    ])  # fmt: skip
