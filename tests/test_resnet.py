"""The ResNet with slots: equal to torchvision's, and what is plugged in lands where it should."""

from functools import partial

import pytest
import torch
import torchvision.models as tv
from battery import (
    check_autocast,
    check_batch_independent,
    check_compiles,
    check_errors,
    check_input_untouched,
    check_state_dict_round_trip,
    randomize,
)
from torch import nn

from attnlab import resnet
from attnlab.lab import cost

PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnext50_32x4d": 25_028_904,
}


def same_results(ours: nn.Module, theirs: nn.Module, images: torch.Tensor) -> None:
    """With torchvision's weights, loaded strictly, our logits are torchvision's."""
    theirs = randomize(theirs).double()
    ours.double().load_state_dict(theirs.state_dict(), strict=True)
    with torch.no_grad():
        for training in (True, False):
            expected = theirs.train(training)(images.double())
            torch.testing.assert_close(ours.train(training)(images.double()), expected)


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_name_and_shape_is_torchvisions(name):
    with torch.device("meta"):
        ours, theirs = getattr(resnet, name)(), getattr(tv, name)()
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == shapes
    assert cost.parameters(ours) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_torchvision_weights_give_torchvision_logits(name):
    images = torch.rand(2, 3, 64, 40)
    same_results(getattr(resnet, name)(num_classes=7), getattr(tv, name)(num_classes=7), images)


@pytest.mark.parametrize(
    ("output_stride", "dilate"), [(16, (False, False, True)), (8, (False, True, True))]
)
def test_a_dilated_network_is_torchvisions(output_stride, dilate):
    layers = (1, 1, 2, 3)
    theirs = tv.ResNet(
        tv.resnet.Bottleneck, list(layers), num_classes=7, replace_stride_with_dilation=dilate
    )
    ours = resnet.ResNet(resnet.Bottleneck, layers, num_classes=7, output_stride=output_stride)
    same_results(ours, theirs, torch.rand(2, 3, 64, 48))
    with torch.no_grad():
        features = ours.float().forward_features(torch.rand(1, 3, 64, 48))
    assert features.shape == (1, 2048, 64 // output_stride, 48 // output_stride)


def test_a_basic_block_can_be_dilated_too():
    model = resnet.resnet_mini(output_stride=4)
    maps = model.forward_stages(torch.rand(2, 3, 32, 48))
    assert [tuple(maps[name].shape[1:]) for name in maps] == [
        (16, 16, 24), (32, 8, 12), (64, 8, 12), (128, 8, 12),
    ]  # fmt: skip
    assert model.layer4[0].conv1.dilation == (2, 2)
    assert model.layer4[0].conv2.dilation == (4, 4)


def test_multi_grid_multiplies_the_last_stages_dilations():
    """DANet's code: 4, 8 and 16 at output stride 8."""
    with torch.device("meta"):
        model = resnet.resnet50(output_stride=8, multi_grid=(1, 2, 4))
    assert [block.conv2.dilation[0] for block in model.layer4] == [4, 8, 16]
    assert [block.conv2.dilation[0] for block in model.layer3] == [1, 2, 2, 2, 2, 2]


def test_the_deep_stem_has_three_convolutions_and_twice_the_channels():
    model = resnet.resnet18(stem="deep", num_classes=3)
    keys = set(model.state_dict())
    assert {"conv1.0.weight", "conv1.1.weight", "conv1.3.weight", "conv1.4.weight"} < keys
    assert model.conv1[6].weight.shape == (128, 64, 3, 3)
    assert model.layer1[0].downsample is not None
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 3)


class Times(nn.Module):
    """Multiplies by a constant and knows how many channels it was made for."""

    def __init__(self, channels: int, factor: float):
        super().__init__()
        self.channels, self.factor = channels, factor
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        assert x.shape[1] == self.channels
        return self.factor * x


@pytest.mark.parametrize("make", [resnet.resnet18, resnet.resnet50])
def test_inside_is_applied_to_the_branch_before_the_addition(make):
    """A branch that is multiplied by zero leaves the shortcut, activated."""
    model = make(num_classes=3, inside=partial(Times, factor=0.0)).eval()
    block = model.layer1[1]
    assert isinstance(block.inside, Times)
    x = torch.randn(2, block.inside.channels, 6, 5)
    torch.testing.assert_close(block(x), x.relu())
    assert "layer1.1.inside.weight" in model.state_dict()
    assert sum(isinstance(module, Times) for module in model.modules()) == len(
        [m for m in model.modules() if isinstance(m, resnet.BasicBlock | resnet.Bottleneck)]
    )


@pytest.mark.parametrize("make", [resnet.resnet18, resnet.resnet50])
def test_after_multiplies_what_leaves_the_named_block_and_shifts_no_name(make):
    torch.manual_seed(0)
    plain = randomize(make(num_classes=3)).eval()
    after = {"layer3.1": partial(Times, factor=2.0)}
    model = make(num_classes=3, after=after).eval()
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert missing == ["layer3.1.after.weight"]
    assert not unexpected
    x = torch.randn(2, plain.layer3[1].conv1.in_channels, 6, 5)
    torch.testing.assert_close(model.layer3[1](x), 2 * plain.layer3[1](x))
    x = torch.randn(2, plain.layer3[0].conv1.in_channels, 6, 5)
    torch.testing.assert_close(model.layer3[0](x), plain.layer3[0](x))


def test_conv2_takes_the_place_of_convolution_and_normalisation():
    made = []

    def conv2(in_channels, out_channels, stride, dilation):
        made.append((in_channels, out_channels, stride, dilation))
        return resnet.conv(in_channels, out_channels, 3, stride, dilation, groups=32)

    model = resnet.resnext50_32x4d(num_classes=3, conv2=conv2, output_stride=16)
    assert len(made) == 16
    assert made[0] == (128, 128, 1, 1)
    assert made[3] == (256, 256, 2, 1)
    assert made[-1] == (1024, 1024, 1, 2)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 3)


def test_pool_is_what_the_classifier_reads():
    pool = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())
    model = resnet.resnet_mini(pool=pool, num_classes=5).eval()
    images = torch.rand(2, 3, 32, 48)
    features = model.forward_features(images).amax((2, 3))
    torch.testing.assert_close(model(images), model.fc(features))
    torch.testing.assert_close(model.forward_head(model.forward_features(images), True), features)


def test_reset_classifier():
    model = resnet.resnet_mini().double()
    model.reset_classifier(5)
    assert model(torch.rand(2, 3, 32, 32, dtype=torch.float64)).shape == (2, 5)
    assert model.get_classifier() is model.fc
    model.reset_classifier(0)
    assert model(torch.rand(2, 3, 32, 32, dtype=torch.float64)).shape == (2, model.num_features)


@pytest.mark.parametrize("size", [(64, 64), (65, 33), (1, 7), (1, 1)])
def test_any_size_works_in_eval_mode(size, device):
    model = resnet.resnet_mini().to(device).eval()
    assert model(torch.rand(1, 3, *size, device=device)).shape == (1, 8)


def test_the_small_size():
    model = resnet.resnet_mini()
    assert cost.parameters(model) == 308_568
    sizes = [x.shape[2:] for x in model.forward_stages(torch.rand(1, 3, 64, 64)).values()]
    assert sizes == [(32, 32), (16, 16), (8, 8), (4, 4)]


def test_the_batterys_checks(device):
    def make():
        return resnet.resnet_mini(num_classes=5).to(device)

    images = torch.rand(2, 3, 32, 40, device=device)
    check_batch_independent(make(), images)
    check_input_untouched(make(), images)
    check_autocast(make(), images)
    check_compiles(make(), images)
    check_state_dict_round_trip(make, images)


def test_activation_and_normalisation_are_arguments():
    """OCNet's ABN: BatchNorm and a leaky rectifier; and a network without a batch in its norms."""
    model = resnet.resnet_mini(act_layer=partial(nn.LeakyReLU, 0.01))
    assert not any(isinstance(module, nn.ReLU) for module in model.modules())
    model = resnet.resnet_mini(norm_layer=partial(nn.GroupNorm, 4))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert model(torch.rand(1, 3, 16, 16)).shape == (1, 8)


def test_errors():
    mini = resnet.resnet_mini
    check_errors(
        [
            (lambda: mini(stem="wide"), "stem='wide': expected 'conv7', 'deep' or 'small'"),
            (lambda: mini(output_stride=32), r"output_stride=32: expected one of [2, 4, 8, 16]"),
            (
                lambda: mini(after={"layer3.1": nn.Identity}),
                "after='layer3.1': expected one of layer1.0",
            ),
            (lambda: mini(multi_grid=(1, 2)), "multi_grid=(1, 2): expected one factor for each"),
            (
                lambda: mini(groups=2),
                "groups=2, base_width=64, conv2=None: expected 1, 64 and None",
            ),
            (lambda: mini()(torch.rand(3, 64, 64)), "x (3, 64, 64): expected (B, 3, H, W)"),
            (lambda: mini(in_chans=1)(torch.rand(1, 3, 8, 8)), "expected (B, 1, H, W)"),
        ]
    )
