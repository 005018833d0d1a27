"""Every registered model is timm's: its maps, its classifier, its data; timm's tools take it."""

import battery
import pytest
import timm
import torch

from attnlab import models
from attnlab.attention import VisionTransformer, deit_tiny
from attnlab.resnet import resnet50

pytestmark = pytest.mark.usefixtures("one_thread")


# Every registered model, by what each of its maps is: all five stages, or the last three blocks.
STAGED = [name for name in models.default_cfgs if "resnet" in name or name == "sknet50"]
MINIS = [name for name in models.default_cfgs if name.endswith("_mini")]


def small(**options) -> VisionTransformer:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    return VisionTransformer(**sizes | {"num_classes": 5} | options)


def images(*size: int, device="cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, *(size or (32, 32)), generator=generator).to(device)


def created(name: str, device="cpu", **options):
    model = battery.randomize(timm.create_model(name, **options))
    return model.to(device).eval()


@pytest.mark.parametrize("name", models.default_cfgs)
def test_timm_gives_maps_of_the_shapes_that_it_says(name):
    """On the meta device, where nothing is computed."""
    with torch.device("meta"):
        model = timm.create_model(name, features_only=True).eval()
        maps = model(torch.empty(2, *model.default_cfg["input_size"]))
    assert name in timm.list_models()
    assert not list(model.model.get_classifier().parameters()), "the classifier is not needed"
    _, *size = model.default_cfg["input_size"]
    info = model.feature_info
    expected = [
        (2, channels, size[0] // stride, size[1] // stride)
        for channels, stride in zip(info.channels(), info.reduction(), strict=True)
    ]
    assert [tuple(map.shape) for map in maps] == expected
    assert len(maps) == (5 if name in STAGED else 3)
    assert info.reduction() == sorted(info.reduction())


@pytest.mark.parametrize("name", MINIS)
def test_the_last_map_is_what_the_model_goes_on_with(name, device):
    model, x = created(name, device), images(48, 64, device=device)
    with torch.no_grad():
        features, maps = model.forward_intermediates(x, norm=True)
        last = getattr(model, "forward_map", model.forward_features)(x)
        if name == "vit_mini":
            last = last[:, 1:].transpose(1, 2).unflatten(2, (6, 8))
        assert torch.equal(maps[-1], last)
        assert torch.equal(model.forward_head(features), model(x))
        rows = model.forward_intermediates(x, [-1], True, False, "NLC", intermediates_only=True)
    assert torch.equal(rows[0], last.flatten(2).transpose(1, 2))
    assert not any(module._forward_hooks for module in model.modules()), "nobody listens any more"


@pytest.mark.parametrize("name", MINIS)
def test_a_map_that_is_named_twice_or_from_the_end_is_the_same(name):
    model, x = created(name), images(64, 64)
    with torch.no_grad():
        every = model.forward_intermediates(x, intermediates_only=True)
        count = len(every)
        some = model.forward_intermediates(x, [-1, 1, 1 - count], intermediates_only=True)
        last = model.forward_intermediates(x, 2, intermediates_only=True)
    assert len({map.double().sum().item() for map in every}) == count, "maps differ"
    for map, expected in zip([*some, *last], [every[1], every[-1], *every[-2:]], strict=True):
        assert torch.equal(map, expected)


def test_maps_of_blocks_are_what_the_blocks_give():
    """A block on its own, fed with the map before it; DependencyViT's is called by halves."""
    x = images(32, 32)
    with torch.no_grad():
        for model in (
            created("patchconvnet_mini", depth=2),
            created("resnet_mini", width=8),
        ):
            first, *_, last = model.forward_intermediates(x, [-2, -1], intermediates_only=True)
            block = (model.layer4 if hasattr(model, "layer4") else model.blocks)[-1]
            assert torch.equal(block(first), last)
        model = created("dependencyvit_mini", img_size=32, depth=1)
        state = model._embed(x)
        tokens, *_ = model.blocks[0](state.tokens, state.messages)
        (rows,) = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
    assert torch.equal(rows, tokens)


@pytest.mark.parametrize("prune_at", ["before", "mid"])
def test_maps_of_a_lite_model_have_all_places(prune_at):
    options = {"depth": 3, "prune_layers": (2, 3), "keep_rates": (0.5, 0.2), "prune_at": prune_at}
    model, x = created("dependencyvit_mini", **options), images(64, 64)
    with torch.no_grad():
        encoding, maps = model.forward_intermediates(x, norm=True)
        places = [map.flatten(2).unique(dim=2).shape[2] for map in maps[:1]]
        assert torch.equal(maps[-1], model.forward_map(x))
    assert encoding.tokens.shape[1] == 12
    assert [tuple(map.shape) for map in maps] == [(2, 96, 8, 8)] * 3
    assert places == [64], "before it prunes, no place is a copy of another"


@pytest.mark.parametrize(("theirs", "size", "norm"), [
    ("deit_tiny_patch16_224", (48, 32), False), ("deit_tiny_patch16_224", (48, 32), True),
    ("resnet50.tv_in1k", (32, 64), True),
])  # fmt: skip
def test_maps_are_equal_to_those_of_timm(theirs, size, norm):
    options = {"img_size": size, "depth": 3} if theirs.startswith("deit") else {}
    reference = created(theirs, **options).double()
    model = (deit_tiny(**options) if options else resnet50()).eval().double()
    model.load_state_dict(reference.state_dict())
    x = images(*size).double()
    names = ("NCHW", "NLC") if options else ("NCHW",)
    for output_fmt in names:
        asked = {"indices": [0, 2, -1], "norm": norm, "output_fmt": output_fmt}
        with torch.no_grad():
            _, wanted = reference.forward_intermediates(x, **asked)
            _, maps = model.forward_intermediates(x, **asked)
        for a, b in zip(maps, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=0)
    described = timm.models._features.FeatureInfo(model.feature_info, 1)
    for key in ("num_chs", "reduction"):
        ours_have = [described.info[i][key] for i in range(len(described))]
        assert ours_have == [info[key] for info in reference.feature_info]


@pytest.mark.parametrize("name", MINIS)
def test_timms_tools_take_our_models(name):
    model = timm.create_model(name)
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == (3, 64, 64)
    assert (data["mean"], data["std"], data["crop_pct"]) == ((0.0,) * 3, (1.0,) * 3, 1.0)
    assert model.get_classifier().out_features == model.num_classes == 8
    assert model.get_submodule(model.default_cfg["classifier"]) is model.get_classifier()
    assert isinstance(model.get_submodule(model.default_cfg["first_conv"]), torch.nn.Conv2d)
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    average.update(model)
    x = images(64, 64)
    with torch.no_grad():
        torch.testing.assert_close(average.module.eval()(x), model.eval()(x))
        assert len(average.module.forward_intermediates(x, 2, intermediates_only=True)) == 2
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)


def test_the_two_classifiers_of_a_distilled_model():
    model = small(distilled=True)
    assert model.get_classifier() == (model.head, model.head_dist)
    assert small().get_classifier().out_features == 5


@pytest.mark.parametrize("name", ["deit_base", "cbam_resnet50", "spformer_small_patch56"])
def test_large_models_are_read_as_imagenets_are(name):
    with torch.device("meta"):
        data = timm.data.resolve_model_data_config(timm.create_model(name))
    assert data["input_size"] == (3, 224, 224)
    assert data["mean"] == timm.data.IMAGENET_DEFAULT_MEAN


def test_bad_input():
    battery.check_errors([
        (lambda: small().forward_intermediates(images(), 3), "indices=3: expected 1 to 2 maps, or"),
        (lambda: small().forward_intermediates(images(), [2]), "or places from -2 to 1"),
        (lambda: small().forward_intermediates(images(), []), "indices=[]: expected 1 to 2 maps"),
        (lambda: small().forward_intermediates(images(), 0), "indices=0: expected 1 to 2 maps"),
        (
            lambda: small().forward_intermediates(images(), output_fmt="NHWC"),
            "output_fmt='NHWC': expected NCHW or NLC",
        ),
    ])  # fmt: skip
