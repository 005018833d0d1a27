"""Every registered model is timm's: its maps, its classifier, its data; timm's tools take it."""

import copy

import battery
import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

from attnlab import models
from attnlab.attention import VisionTransformer, deit_tiny
from attnlab.patchconvnet import patchconvnet_mini
from attnlab.pooling import AveragePool, LogSumExpPool
from attnlab.resnet import resnet18, resnet50, resnet_mini

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


@pytest.mark.parametrize("name", models.default_cfgs)
def test_the_classifier_and_the_pooling_are_reset_as_timm_does(name):
    """Of every model, on the meta device; without pooling, what comes out has places."""
    options = {"depth": 2} if name.startswith("patchconvnet") else {}
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=7, in_chans=4, **options).eval()
        x = torch.empty(2, 4, *model.default_cfg["input_size"][1:])
        assert model.head_hidden_size == model.num_features
        assert model(x).shape == (2, 7)
        own = getattr(model, "global_pool", "map" if "patchconvnet" in name else "avg")
        model.reset_classifier(5, global_pool=own)
        assert (model(x).shape, model.num_classes) == ((2, 5), 5)
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
        model.reset_classifier(0)
        assert model(x).shape == pooled.shape
        model.reset_classifier(0, "")
        places = model(x)
        assert places.ndim in (3, 4)
        assert model.forward_head(model.forward_features(x), pre_logits=True).shape == places.shape
        features = getattr(model.forward_features(x), "tokens", model.forward_features(x))
        assert places.shape == features.shape
        model.reset_classifier(0)
        assert model(x).shape == places.shape, "None leaves the pooling as it is: there is none"
        battery.check_errors([
            (lambda: model.reset_classifier(3), "global_pool='', num_classes=3: expected 0 cla"),
            (lambda: model.reset_classifier(3, ""), "global_pool='', num_classes=3: expected 0"),
            (lambda: model.reset_classifier(3, "median"), "global_pool='median': expected "),
        ])  # fmt: skip
        assert model(x).shape == places.shape, "what is refused changes nothing"
        model.reset_classifier(3, own)
        assert model(x).shape == (2, 3)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_vision_transformer_is_reset_as_timms_is(pool):
    reference = timm.create_model("deit_tiny_patch16_224", depth=1, img_size=32, global_pool=pool)
    check_reset(reference, timm.create_model("deit_tiny", depth=1, img_size=32, global_pool=pool))


def test_a_resnet_is_reset_as_timms_is():
    check_reset(timm.create_model("resnet18.tv_in1k"), resnet18())


def check_reset(reference: torch.nn.Module, model: torch.nn.Module) -> None:
    """The same comes out of both, with the same weights, after the same resets."""
    reference, model = battery.randomize(reference).eval().double(), model.eval().double()
    model.load_state_dict(reference.state_dict())
    x = images(32, 32).double()
    for arguments in ((0,), (0, ""), (0,), (4, "avg"), (0, "avg"), (3,)):
        for each in (reference, model):
            each.reset_classifier(*arguments)
        state = {key: reference.state_dict()[key] for key in model.state_dict()}
        model.load_state_dict(state)
        with torch.no_grad():
            expected = reference(x)
            torch.testing.assert_close(model(x), expected, atol=1e-9, rtol=0)
        assert model.num_classes == reference.num_classes


@pytest.mark.parametrize("name", MINIS)
def test_features_of_every_place_by_timms_own_words(name):
    """`num_classes=0, global_pool=""`: what timm's guide tells users to write."""
    model = created(name, num_classes=0, global_pool="")
    x = images(64, 64)
    with torch.no_grad():
        features = model.forward_features(x)
        assert torch.equal(model(x), getattr(features, "tokens", features))
        copied = copy.deepcopy(model)
        assert torch.equal(copied(x), model(x))
    assert len(timm.create_model(name, features_only=True, global_pool="")(x)) in (3, 5)
    own = {"vit_mini": "token", "dependencyvit_mini": "mean", "patchconvnet_mini": "map"}
    pool = own.get(name, "avg")
    assert timm.create_model(name, num_classes=3, global_pool=pool)(x).shape == (2, 3)


def test_a_pooling_of_ones_own_goes_by_its_name():
    model = resnet_mini(pool=LogSumExpPool())
    model.reset_classifier(3, "LogSumExpPool")
    assert model(images()).shape == (2, 3)
    expected = "global_pool='avg': expected LogSumExpPool, or '' with num_classes=0"
    battery.check_errors([(lambda: model.reset_classifier(3, "avg"), expected)])
    assert patchconvnet_mini(pool=AveragePool()).reset_classifier(3, "avg") is None


def rates(name: str, **options) -> dict[str, float]:
    """Parameter → its share of the learning rate, which halves from group to group."""
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    groups = create_optimizer_v2(model, "adamw", layer_decay=0.5).param_groups
    shares = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    return {key: shares[id(p)] for key, p in model.named_parameters() if p.requires_grad}


def test_learning_rates_decay_with_depth_as_timms_do():
    assert rates("deit_tiny") == rates("deit_tiny_patch16_224")
    assert rates("deit_tiny", distilled=True) == rates("deit_tiny_distilled_patch16_224")
    ours, theirs = rates("cbam_resnet18"), rates("resnet18")
    assert {key: ours[key] for key in theirs} == theirs


@pytest.mark.parametrize("name", MINIS)
def test_a_block_has_one_learning_rate_and_later_ones_a_higher(name):
    found, model = rates(name), timm.create_model(name)
    blocks = [info["module"] for info in model.feature_info if info["module"] != "relu"]
    each = [{rate for key, rate in found.items() if key.startswith(f"{b}.")} for b in blocks]
    staged = "resnet" in name  # there, a stage's blocks are groups of their own
    assert staged or all(len(rate) == 1 for rate in each)
    assert (order := [max(rate) for rate in each]) == sorted(set(order))
    assert found[f"{model.default_cfg['classifier']}.weight"] == 1.0 > order[-1]
    assert found[f"{model.default_cfg['first_conv']}.weight"] == min(found.values()) < order[0]


@pytest.mark.parametrize("name", MINIS)
def test_coarse_groups_are_stages(name):
    model = timm.create_model(name)
    groups = timm.models.group_parameters(model, model.group_matcher(coarse=True))
    stages = {"vit_mini": 6, "dependencyvit_mini": 6, "patchconvnet_mini": 1, "spformer_mini": 2}
    assert len(groups) == 1 + stages.get(name, 4) + 1


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
