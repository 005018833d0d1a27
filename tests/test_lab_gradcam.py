"""Grad-CAM against CAM, which it equals where the head is a mean and a linear map."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from attnlab.lab.gradcam import gradcam


class Net(nn.Module):
    """Two convolutions, the mean over places, a linear head: CAM (Zhou et al. 2016) applies."""

    def __init__(self, classes: int = 5, inplace: bool = False):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.features = nn.Sequential(nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3, padding=1))
        self.act = nn.ReLU(inplace=inplace)
        self.fc = nn.Linear(8, classes)
        self.unused = nn.Linear(1, 1)

    def forward(self, x):
        return self.fc(self.act(self.features(self.stem(x))).mean((2, 3)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net().double().eval()


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(4, 3, 12, 20, dtype=torch.float64, generator=generator)


def cam(model, images, target):
    """CAM's own equation: the head's weights of the class, applied at every place."""
    with torch.no_grad():
        maps = F.relu(model.act(model.features(model.stem(images))))
        weights = model.fc.weight[target]  # (B, K)
        maps = F.relu((weights[:, :, None, None] * maps).sum(1, keepdim=True))
        maps = F.interpolate(maps, size=images.shape[2:], mode="bilinear", align_corners=False)
    return maps[:, 0] / maps.amax((1, 2, 3))[:, None, None].clamp(min=1e-30)


def test_equals_cam_for_every_class(model, images):
    for target in range(5):
        expected = cam(model, images, torch.full((4,), target))
        assert_close(gradcam(model, "act", images, target), expected, rtol=0, atol=1e-12)


def test_one_target_an_image_and_the_predicted_class_by_default(model, images):
    targets = torch.tensor([0, 3, 1, 4])
    assert_close(gradcam(model, "act", images, targets), cam(model, images, targets))
    assert_close(
        gradcam(model, "act", images), gradcam(model, "act", images, model(images).argmax(1))
    )


def test_a_loop_from_the_formula(model, images):
    """Eq. 1 and 2 channel by channel, at a layer behind which there is a ReLU."""
    found = gradcam(model, "features", images, 2)
    for image, map in zip(images, found, strict=True):
        features = model.features(model.stem(image[None])).detach().requires_grad_()
        model.fc(model.act(features).mean((2, 3)))[0, 2].backward()
        expected = torch.zeros(features.shape[2:], dtype=torch.float64)
        for k in range(features.shape[1]):
            expected += features.grad[0, k].mean() * features[0, k].detach()
        expected = F.interpolate(expected.clamp(min=0)[None, None], (12, 20), mode="bilinear")[0, 0]
        assert_close(map, expected / expected.max(), rtol=0, atol=1e-12)


def test_the_layer_may_be_given_as_a_module_or_by_its_dotted_name(model, images):
    by_name = gradcam(model, "features.1", images)
    assert torch.equal(by_name, gradcam(model, model.features[1], images))
    assert by_name.shape == (4, 12, 20)
    assert by_name.min() >= 0
    assert_close(by_name.amax((1, 2)), torch.ones(4, dtype=torch.float64))


def test_an_image_does_not_depend_on_its_batch(model, images):
    alone = torch.cat([gradcam(model, "features", image[None]) for image in images])
    assert_close(gradcam(model, "features", images), alone, rtol=0, atol=1e-12)


def test_what_follows_in_place_does_not_change_the_map(model, images):
    inplace = Net(inplace=True).double()
    inplace.load_state_dict(model.state_dict())
    assert torch.equal(gradcam(inplace, "features", images), gradcam(model, "features", images))


def test_leaves_no_trace(model, images):
    model.train()
    model.act.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        maps = gradcam(model, "features", images)
    assert not maps.requires_grad
    assert not images.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not model.act.training
    assert not model.features._forward_hooks


def test_frozen_and_compiled_models(model, images):
    expected = gradcam(model, "features", images)
    assert torch.equal(gradcam(model.requires_grad_(False), "features", images), expected)
    assert torch.equal(gradcam(torch.compile(model), "features", images), expected)


def test_a_map_without_evidence_is_zero(model, images):
    with torch.no_grad():
        model.fc.weight.fill_(-1.0)
    assert torch.equal(gradcam(model, "act", images), torch.zeros(4, 12, 20, dtype=torch.float64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": "layer4"}, "layer='layer4': expected a module's dotted name, such as one of"),
        ({"layer": nn.ReLU()}, "layer='ReLU': expected a module of the model"),
        ({"layer": "unused"}, "layer='Linear': expected one that the model calls"),
        ({"layer": "fc"}, "layer's output=(4, 5): expected (4, K, h, w)"),
        ({"target": 5}, "target=5: expected classes 0 to 4: one, or (4,)"),
        ({"target": torch.tensor([1, 2])}, "target=[1, 2]: expected classes 0 to 4"),
        ({"target": 1.0}, "target=1.0: expected classes 0 to 4"),
        ({"images": torch.rand(3, 12, 20)}, "images=(3, 12, 20): expected (B, C, H, W)"),
    ],
)
def test_errors(model, images, change, message):
    arguments = {"layer": "act", "images": images} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        gradcam(model, **arguments)


def test_a_model_without_scores_is_refused(images):
    with pytest.raises(ValueError, match=r"model's output=.*expected scores"):
        gradcam(nn.Sequential(nn.Conv2d(3, 2, 1)).double(), "0", images)
