"""The one place that makes our models timm's: `timm.create_model("vit_mini")`, and their maps."""

from collections.abc import Callable, Sequence

from timm.models import build_model_with_cfg, register_model
from torch import nn

from attnlab.attention import VisionTransformer, deit_base, deit_small, deit_tiny, vit_mini
from attnlab.cbam import (
    cbam_resnet18,
    cbam_resnet34,
    cbam_resnet50,
    cbam_resnet101,
    cbam_resnet_mini,
)
from attnlab.channel import se_resnet50, se_resnet_mini, sknet50
from attnlab.dependencyvit import (
    DependencyViT,
    dependencyvit_lite_small,
    dependencyvit_lite_tiny,
    dependencyvit_mini,
    dependencyvit_small,
    dependencyvit_tiny,
)
from attnlab.feature_maps import (
    feature_info,
    forward_intermediates,
    get_classifier,
    give_global_pool,
    group_matcher,
    prune_intermediate_layers,
)
from attnlab.patchconvnet import (
    PatchConvNet,
    patchconvnet_b60,
    patchconvnet_b120,
    patchconvnet_l60,
    patchconvnet_l120,
    patchconvnet_mini,
    patchconvnet_s60,
    patchconvnet_s60_multi,
    patchconvnet_s120,
)
from attnlab.resnet import ResNet, resnet_mini
from attnlab.spformer import (
    SPFormer,
    spformer_base_patch16,
    spformer_base_patch16_convstem,
    spformer_mini,
    spformer_small_patch16,
    spformer_small_patch16_convstem,
    spformer_small_patch32,
    spformer_small_patch32_convstem,
    spformer_small_patch56,
    spformer_small_patch56_convstem,
    spformer_tiny_patch16,
    spformer_tiny_patch16_convstem,
)

# Here and not in the classes: no result depends on these, and each depends on its model's class.
for _model in (VisionTransformer, ResNet, PatchConvNet, DependencyViT, SPFormer):
    _model.feature_info = property(feature_info)
    _model.forward_intermediates = forward_intermediates
    _model.prune_intermediate_layers = prune_intermediate_layers
    _model.head_hidden_size = property(lambda model: model.num_features)
    give_global_pool(_model)
for _model in (VisionTransformer, DependencyViT, SPFormer):
    _model.get_classifier = get_classifier
for _model in (VisionTransformer, ResNet, DependencyViT, SPFormer):
    _model.group_matcher = group_matcher

default_cfgs: dict[str, dict] = {}  # where `register_model` looks
# What timm's loaders give to a model: pixels in [0, 1] at the bundled size, or ImageNet's usual.
MINI = {
    "input_size": (3, 64, 64), "num_classes": 8, "mean": (0.0,) * 3, "std": (1.0,) * 3,
    "crop_pct": 1.0, "interpolation": "bilinear",
}  # fmt: skip


def _register(
    factories: Sequence[Callable[..., nn.Module]],
    first_conv: str,
    classifier: str | tuple[str, ...],
    out_indices: int | tuple[int, ...] = 3,
    has_choice: bool = False,
) -> None:
    """Register `factories` under their names, with the arguments that timm passes to every one.

    `first_conv` and `classifier` name modules; `out_indices` is the default of `features_only`;
    `has_choice` says whether the factories take `global_pool`.
    """
    for factory in factories:
        name = factory.__name__
        sizes = MINI if name.endswith("_mini") else {}
        default_cfgs[name] = {"first_conv": first_conv, "classifier": classifier, **sizes}
        register_model(_entrypoint(factory, out_indices, has_choice))


def _entrypoint(
    factory: Callable[..., nn.Module], out_indices: int | tuple[int, ...], has_choice: bool
) -> Callable:
    def create(pretrained: bool = False, global_pool: str | None = None, **kwargs) -> nn.Module:
        if pretrained:
            raise ValueError(
                f"pretrained=True: attnlab publishes no weights for {factory.__name__}; expected "
                "False, and then model.load_state_dict(...) with a checkpoint of your own"
            )
        chosen = global_pool and has_choice
        if chosen:
            kwargs["global_pool"] = global_pool
        features = {"feature_cls": "getter", "out_indices": out_indices}
        model = build_model_with_cfg(
            factory, factory.__name__, pretrained, feature_cfg=features, **kwargs
        )
        if not (chosen or global_pool is None or kwargs.get("features_only")):
            model.reset_classifier(model.num_classes, global_pool)
        return model

    create.__name__ = factory.__name__
    return create


_register(
    (
        *(resnet_mini, se_resnet_mini, se_resnet50, sknet50),
        *(cbam_resnet_mini, cbam_resnet18, cbam_resnet34, cbam_resnet50, cbam_resnet101),
    ),
    "conv1",
    "fc",
    (0, 1, 2, 3, 4),
)
_register((deit_tiny, deit_small, deit_base, vit_mini), "patch_embed.proj", "head", has_choice=True)
_register(
    (
        *(patchconvnet_mini, patchconvnet_s60, patchconvnet_s60_multi, patchconvnet_s120),
        *(patchconvnet_b60, patchconvnet_b120, patchconvnet_l60, patchconvnet_l120),
    ),
    "stem.convs.0",
    "head",
)
_register(
    (
        *(dependencyvit_mini, dependencyvit_tiny, dependencyvit_small),
        *(dependencyvit_lite_tiny, dependencyvit_lite_small),
    ),
    "patch_embed.proj",
    "head",
    has_choice=True,
)
_register(
    (
        *(spformer_mini, spformer_tiny_patch16, spformer_tiny_patch16_convstem),
        *(spformer_small_patch16, spformer_small_patch16_convstem),
        *(spformer_small_patch32, spformer_small_patch32_convstem),
        *(spformer_small_patch56, spformer_small_patch56_convstem),
        *(spformer_base_patch16, spformer_base_patch16_convstem),
    ),
    "stem.0",
    "head",
)
