"""Segmentation heads, the network around them, its loss, and what an oracle knows."""

import battery
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnlab.context import LEAKY, ASPObjectContext, DANetHead, PyramidObjectContext
from attnlab.heads import (
    FCNHead,
    ObjectContextHead,
    Segmenter,
    object_purity,
    same_class,
    segmentation_loss,
)
from attnlab.resnet import resnet50, resnet_mini


class TwoStages(nn.Module):
    """A backbone for tests: 8 channels after two pixels, 16 after four."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 2, stride=2)
        self.second = nn.Conv2d(8, 16, 2, stride=2)

    def forward_stages(self, x):
        third = self.first(x)
        return {"layer3": third, "layer4": self.second(third)}


def test_heads_keep_the_map_and_pass_the_battery(device):
    x = torch.randn(2, 16, 5, 6, device=device)
    sizes = [((x[:1, :, :1, :1],), (1, 7, 1, 1)), ((x[:2, :, :1],), (2, 7, 1, 6))]
    battery.check_sizes(FCNHead(16, 7).to(device), sizes)
    battery.check_batch_independent(FCNHead(16, 7).to(device), x)
    battery.check_parameters(FCNHead(16, 7), 16 * 4 * 9 + 2 * 4 + 4 * 7 + 7)
    battery.battery(
        lambda: ObjectContextHead(16, 7).to(device), x, sizes=sizes, grid=(5, 6), compiles=False
    )


def test_the_fcn_head_is_conv_norm_activation_classifier():
    head = battery.randomize(FCNHead(16, 7, inter_channels=6, bias=True, act_layer=LEAKY))
    x = torch.randn(2, 16, 5, 6)
    head.eval()
    expected = F.leaky_relu(head.reduce[1](head.reduce[0](x)), 0.01)
    torch.testing.assert_close(head(x), head.classify(expected))
    assert head.reduce[0].bias.shape == (6,)


def test_a_segmenter_gives_logits_when_tested_and_all_that_has_a_loss_when_trained():
    model = Segmenter(TwoStages(), DANetHead(16, 5, inter_channels=8), FCNHead(8, 5))
    battery.randomize(model)
    x = torch.rand(2, 3, 12, 20)
    outputs = model.train()(x)
    assert [tuple(y.shape) for y in outputs] == [(2, 5, 12, 20)] * 4
    model.eval()
    stages = model.backbone.forward_stages(x)
    expected = model.head(stages["layer4"])[0]
    expected = F.interpolate(expected, (12, 20), mode="bilinear", align_corners=True)
    torch.testing.assert_close(model(x), expected)
    unaligned = Segmenter(model.backbone, model.head, align_corners=False).eval()
    assert not torch.allclose(unaligned(x), expected)
    assert len(unaligned.train()(x)) == 3


def test_a_segmenter_of_the_course_passes_the_battery(device):
    x = torch.rand(2, 3, 32, 48, device=device)

    def make():
        backbone = resnet_mini(num_classes=0, output_stride=8, width=8)
        return Segmenter(backbone, DANetHead(64, 5), FCNHead(32, 5)).to(device)

    sizes = [((x[:1],), (1, 5, 32, 48)), ((x[:, :, :17, :33],), (2, 5, 17, 33))]
    battery.check_sizes(make(), sizes)
    battery.check_impls_agree(make(), x, impls=("explicit", "auto", "fused"), tol=1e-8)
    battery.check_batch_independent(make(), x)
    battery.check_input_untouched(make(), x)
    battery.check_autocast(make(), x, tol=0.3)


@pytest.mark.parametrize("weights", [None, (1.0, 1.0, 0.4)])
def test_the_loss_is_a_weighted_sum_of_cross_entropies(weights):
    outputs = [torch.randn(2, 4, 3, 5) for _ in range(3)]
    target = torch.randint(4, (2, 3, 5))
    target[0, 0] = 255
    classes = torch.tensor([0.2, 1.0, 1.0, 2.0])

    def by_hand(logits):
        total = norm = 0.0
        for b, y, x in (target != 255).nonzero().tolist():
            t = target[b, y, x]
            total -= classes[t] * logits[b, :, y, x].log_softmax(0)[t]
            norm += classes[t]
        return total / norm

    expected = sum(w * by_hand(o) for w, o in zip(weights or (1, 1, 1), outputs, strict=True))
    got = segmentation_loss(outputs, target, weights, class_weights=classes)
    torch.testing.assert_close(got, expected)
    alone = segmentation_loss(outputs[0], target, class_weights=classes)
    torch.testing.assert_close(alone, by_hand(outputs[0]))


def test_bad_input():
    logits, target = torch.randn(2, 4, 3, 5), torch.zeros(2, 3, 5, dtype=torch.long)
    battery.check_errors([
        (lambda: segmentation_loss([logits], target, (1, 1)), "weights=(1, 1): expected 1, one"),
        (lambda: segmentation_loss(logits[..., :4], target), "outputs (2, 4, 3, 4): expected"),
        (lambda: segmentation_loss(logits[0], target), "expected (B, classes, H, W), for the"),
        (lambda: same_class(logits), "labels (2, 4, 3, 5), torch.float32: expected integers"),
        (lambda: object_purity(torch.eye(4)[None, None], target[:1]), "map (1, 1, 4, 4): expected"),
    ])  # fmt: skip


def test_same_class_by_a_loop():
    labels = torch.randint(3, (2, 3, 4))
    labels[1, 0] = 255
    same, flat = same_class(labels), labels.flatten(1)
    for b in range(2):
        for i in range(12):
            for j in range(12):
                known = flat[b, i] != 255
                assert same[b, i, j] == ((known and flat[b, i] == flat[b, j]) or i == j)


def test_the_oracle_averages_over_a_class_and_is_pure():
    labels = torch.tensor([[[0, 0, 1], [1, 1, 0]]])
    values = torch.randn(1, 5, 2, 3)
    relation = same_class(labels).float()
    relation = relation / relation.sum(-1, keepdim=True)
    means = torch.einsum("b i j, b c j -> b c i", relation, values.flatten(2))
    for c in (0, 1):
        inside = (labels == c).flatten()
        expected = values.flatten(2)[..., inside].mean(-1, keepdim=True)
        torch.testing.assert_close(means[..., inside], expected.expand(-1, -1, 3))
    assert object_purity(relation[:, None], labels).item() == pytest.approx(1.0)
    uniform = torch.full((1, 2, 6, 6), 1 / 6)
    assert object_purity(uniform, labels).item() == pytest.approx(0.5)
    one_class = same_class(torch.zeros(1, 2, 3, dtype=torch.long))
    assert one_class.all()  # on an image of one class the oracle is the global mean


def test_purity_leaves_out_positions_without_a_class():
    labels = torch.tensor([[[0, 0, 255, 255]]])
    map = torch.eye(4)[None, None].clone()
    map[0, 0, 0] = torch.tensor([0.5, 0.1, 0.4, 0.0])
    assert object_purity(map, labels).item() == pytest.approx((0.6 + 1.0) / 2)


def their_backbone(prefix):
    """A ResNet-50 with deep stem as DANet saves it: torchvision's names under `pretrained.`."""
    state = resnet50(num_classes=0, stem="deep").state_dict()
    return {prefix + key: value for key, value in state.items()}


def meta_segmenter(head, aux_head=None):
    return Segmenter(resnet50(num_classes=0, stem="deep", output_stride=8), head, aux_head)


def test_whole_networks_of_danet_load_strictly():
    with torch.device("meta"):
        model = meta_segmenter(DANetHead(2048, 19))
        theirs = their_backbone("pretrained.")
        renamed = {
            "reduce_position": "conv5a", "reduce_channel": "conv5c", "refine_position": "conv51",
            "refine_channel": "conv52", "position": "sa", "channel": "sc", "query": "query_conv",
            "key": "key_conv", "value": "value_conv", "classify_position": "conv6.1",
            "classify_channel": "conv7.1", "classify": "conv8.1",
        }  # fmt: skip
        for key, value in model.head.state_dict().items():
            name = ".".join(renamed.get(part, part) for part in key.split("."))
            theirs[f"head.{name}"] = value
    assert "head.sa.query_conv.weight" in theirs
    assert "pretrained.layer4.2.conv3.weight" in theirs
    assert "pretrained.conv1.6.weight" in theirs
    model.load_state_dict(theirs, strict=True, assign=True)


OCNET_STEM = {"conv1.0.": "conv1.", "conv1.1.": "bn1.", "conv1.3.": "conv2.", "conv1.4.": "bn2.",
              "conv1.6.": "conv3.", "bn1.": "bn3."}  # fmt: skip


@pytest.mark.parametrize("kind", ["asp", "pyramid"])
def test_whole_networks_of_ocnet_load_strictly(kind):
    with torch.device("meta"):
        aux = FCNHead(1024, 19, 512, dropout=0.05, bias=True, act_layer=LEAKY)
        if kind == "asp":
            model = meta_segmenter(ObjectContextHead(2048, 19, context=ASPObjectContext), aux)
        else:
            head = ObjectContextHead(2048, 19, context=PyramidObjectContext, act_layer=nn.Identity)
            model = meta_segmenter(head, aux)
        theirs = {}
        for key, value in their_backbone("").items():
            old = next((old for old in OCNET_STEM if key.startswith(old)), None)
            theirs[OCNET_STEM[old] + key.removeprefix(old) if old else key] = value
        place = {"asp": ("context.", "context.2."), "pyramid": ("layer5.", "context.")}[kind]
        for key, value in model.head.state_dict().items():
            name = key.replace("reduce.", place[0], 1) if key.startswith("reduce.") else key
            if key.startswith("context."):
                name = place[1] + key.removeprefix("context.")
            theirs[name.replace("classify.", "cls.")] = value
        for key, value in aux.state_dict().items():
            theirs["dsn." + key.replace("reduce.", "").replace("classify.", "3.")] = value
    assert {"cls.weight", "dsn.3.bias", "bn2.running_mean", "conv3.weight"} <= theirs.keys()
    model.load_state_dict(theirs, strict=True, assign=True)
    names = {id(value): key for key, value in theirs.items()}
    loaded = model.state_dict(keep_vars=True)
    assert names[id(loaded["backbone.bn1.running_mean"])] == "bn3.running_mean"
