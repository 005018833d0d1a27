"""UPerNet's head on a trunk of one resolution, by a second implementation, and trained."""

import battery
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_spformer_segmentation import lay_ade
from torch import nn

from attnlab.attention import VisionTransformer
from attnlab.feature_maps import MapBackbone
from attnlab.heads import PyramidPooling, Segmenter, UPerNetHead, segmentation_loss
from attnlab.lab import data, train
from attnlab.lab.data import adapters
from attnlab.lab.experiments.ch05 import class_map
from attnlab.lab.metrics import confusion_matrix, mean_iou
from attnlab.resnet import resnet_mini

pytestmark = pytest.mark.usefixtures("one_thread")


def resized(x, scale):
    """The map at another scale, bilinearly, with half-pixel centers, one axis after the other."""
    for axis in (2, 3):
        count = int(scale * x.shape[axis])
        places = torch.arange(count, dtype=x.dtype, device=x.device)
        centers = (places + 0.5) * x.shape[axis] / count - 0.5
        centers = centers.clamp(0, x.shape[axis] - 1)
        low = centers.floor().long()
        high = (low + 1).clamp(max=x.shape[axis] - 1)
        shape = [-1 if i == axis else 1 for i in range(4)]
        far = (centers - low).view(shape)
        x = (1 - far) * x.index_select(axis, low) + far * x.index_select(axis, high)
    return x


def reference(head, x):
    """Resize first and project then, as the text says it; every step on its own."""
    pool, top = head.pool, resized(x, head.scales[-1])
    seen = [top]
    for side, branch in zip(pool.bins, pool.branches, strict=True):
        mean = nn.AdaptiveAvgPool2d(side)(top)
        up = nn.Upsample(top.shape[2:], mode="bilinear")
        seen.append(up(branch(mean)))
    levels = {head.scales[-1]: pool.fuse(torch.cat(seen, 1))}
    level = levels[head.scales[-1]]
    for i, scale in enumerate(reversed(head.scales[:-1])):
        lateral = head.laterals[i](resized(x, scale))
        level = lateral + nn.Upsample(lateral.shape[2:], mode="bilinear")(level)
        levels[scale] = head.smooth[i](level)
    size = [int(head.scales[0] * side) for side in x.shape[2:]]
    coarse_to_fine = [nn.Upsample(size, mode="bilinear")(y) for y in levels.values()]
    return head.classify(head.fuse(torch.cat(coarse_to_fine, 1)))


@pytest.mark.parametrize("training", [False, True])
def test_equals_a_second_implementation_that_resizes_first(training, device):
    head = UPerNetHead(12, 5, inter_channels=6, dropout=0.0).to(device)
    head = battery.randomize(head).double().train(training)
    x = torch.randn(2, 12, 6, 8, device=device)
    battery.check_matches(head, lambda x: reference(head, x), x)


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(2, 9), columns=st.integers(2, 9))
def test_maps_of_any_size(rows, columns):
    head = battery.randomize(UPerNetHead(4, 3, inter_channels=2)).double().eval()
    x = torch.randn(1, 4, rows, columns, dtype=torch.float64)
    assert head(x).shape == (1, 3, 4 * rows, 4 * columns)
    torch.testing.assert_close(head(x), reference(head, x), rtol=0, atol=1e-9)


def test_the_head_passes_the_battery(device):
    def make():
        return UPerNetHead(16, 7, inter_channels=8).to(device)

    x = torch.randn(2, 16, 4, 6, device=device)
    sizes = [((x,), (2, 7, 16, 24)), ((x[:1, :, :1, :1],), (1, 7, 4, 4))]
    lateral, smooth = 16 * 8 + 16, 8 * 8 * 9 + 16
    pooling = 4 * lateral + (16 + 4 * 8) * 8 * 9 + 16
    parameters = 3 * (lateral + smooth) + pooling + 4 * 8 * 8 * 9 + 16 + 8 * 7 + 7
    battery.check_parameters(make(), parameters)
    battery.check_sizes(make(), sizes)
    battery.check_batch_independent(make(), x)
    battery.check_input_untouched(make(), x)
    battery.check_autocast(make(), x)
    small = UPerNetHead(16, 7, inter_channels=4, scales=(2, 1), bins=(1, 2)).to(device)
    battery.check_compiles(small, x)
    battery.check_state_dict_round_trip(make, x)


def test_the_head_of_other_scales():
    head = UPerNetHead(16, 7, inter_channels=8, scales=(2, 1), bins=(1, 3)).eval()
    assert head(torch.randn(1, 16, 3, 5)).shape == (1, 7, 6, 10)
    assert len(head.laterals) == 1
    assert len(head.pool.branches) == 2


def test_pooling_sees_the_whole_image():
    pool = battery.randomize(PyramidPooling(3, 4)).double().eval()
    x = torch.randn(1, 3, 9, 9, dtype=torch.float64, requires_grad=True)
    pool(x)[0, :, 0, 0].sum().backward()
    assert (x.grad.abs().sum(1) > 0).all()


def test_bad_input():
    head = UPerNetHead(16, 7, inter_channels=8)
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    battery.check_errors([
        (lambda: head(torch.randn(1, 8, 4, 4)), "x (1, 8, 4, 4): expected (B, 16, H, W)"),
        (lambda: UPerNetHead(16, 7, scales=(1,)), "scales=(1,): expected two or more falling"),
        (lambda: UPerNetHead(16, 7, scales=(1, 2)), "scales=(1, 2): expected two or more falling"),
        (lambda: UPerNetHead(16, 7, scales=(1, 0)), "scales=(1, 0): expected two or more falling"),
        (lambda: MapBackbone(vit)(torch.rand(1, 3, 32, 32)), "map (1, 17, 16): expected (B, 16,"),
    ])  # fmt: skip


def trunk():
    """8×8 positions of 64 channels for images of 64 pixels."""
    return MapBackbone(resnet_mini(num_classes=0, output_stride=8, width=8))


def scenes(split, n):
    return data.load("scenes", split, n=n, objects=2, scale=(0.4, 0.7))


def scene_loss(model, batch):
    return segmentation_loss(model(batch["image"]), class_map(batch))


def test_a_few_steps_on_scenes_find_things():
    train.seed_everything(0)
    samples = scenes("train", 128)
    model = Segmenter(
        trunk(), UPerNetHead(64, 1 + samples.num_classes, inter_channels=16), align_corners=False
    )
    history = train.fit(
        model, samples, loss=scene_loss, steps=40, batch_size=16, lr=4e-3, device="cpu",
        progress=False,
    )  # fmt: skip
    assert sum(history.loss[-5:]) < 0.7 * sum(history.loss[:5])
    batch = scenes("val", 32).batch(slice(32))
    with torch.no_grad():
        found = model(batch["image"])
    assert found.shape == (32, 9, 64, 64)
    confusion = confusion_matrix(found.argmax(1), class_map(batch), 9)
    assert 0 < mean_iou(confusion) < 1


def test_ade20ks_layout_trains_end_to_end(tmp_path):
    lay_ade(tmp_path)
    home = tmp_path / "ADEChallengeData2016"
    for folder, kind in (("images", "jpg"), ("annotations", "png")):
        first = home / folder / f"training/ADE_train_00000001.{kind}"
        first.with_stem("ADE_train_00000002").write_bytes(first.read_bytes())
    published = adapters.load("ade20k", "train", tmp_path, size=(32, 48))
    model = Segmenter(trunk(), UPerNetHead(64, published.num_classes, inter_channels=8))
    before = [p.detach().clone() for p in model.parameters()]

    def loss(model, batch):
        return segmentation_loss(model(batch["image"]), batch["segmentation"])

    history = train.fit(
        model, published, loss=loss, steps=8, batch_size=2, lr=1e-2, device="cpu", progress=False
    )
    assert history.loss[-1] < history.loss[0]
    changed = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert all(changed[: len(changed) // 2])
    batch = published.batch([0])
    with torch.no_grad():
        found = model(batch["image"])
    assert found.shape == (1, 2, 32, 48)
    assert F.one_hot(batch["segmentation"].clamp(max=2)).sum((0, 1, 2)).tolist()[2] > 0, "ignored"


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_a_convolutional_network_of_timm_is_a_trunk(name):
    with torch.device("meta"):
        backbone = MapBackbone(timm.create_model(name, num_classes=0))
        model = Segmenter(backbone, UPerNetHead(backbone.out_channels, 150)).eval()
        assert model(torch.rand(1, 3, 64, 96)).shape == (1, 150, 64, 96)
