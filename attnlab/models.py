"""The one place that registers our factories with timm: `timm.create_model("vit_mini")`."""

from collections.abc import Callable

from timm.models import register_model
from torch import nn

from attnlab.attention import deit_base, deit_small, deit_tiny, vit_mini
from attnlab.cbam import (
    cbam_resnet18,
    cbam_resnet34,
    cbam_resnet50,
    cbam_resnet101,
    cbam_resnet_mini,
)
from attnlab.channel import se_resnet50, se_resnet_mini, sknet50
from attnlab.dependencyvit import (
    dependencyvit_lite_small,
    dependencyvit_lite_tiny,
    dependencyvit_mini,
    dependencyvit_small,
    dependencyvit_tiny,
)
from attnlab.patchconvnet import (
    patchconvnet_b60,
    patchconvnet_b120,
    patchconvnet_l60,
    patchconvnet_l120,
    patchconvnet_mini,
    patchconvnet_s60,
    patchconvnet_s60_multi,
    patchconvnet_s120,
)
from attnlab.resnet import resnet_mini
from attnlab.spformer import (
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


def _register(factory: Callable[..., nn.Module]) -> None:
    """Register `factory` under its name, with the arguments that timm passes to every factory."""

    def create(
        pretrained: bool = False,
        pretrained_cfg=None,
        pretrained_cfg_overlay=None,
        cache_dir=None,
        **kwargs,
    ) -> nn.Module:
        if pretrained:
            raise ValueError(
                f"pretrained=True: attnlab publishes no weights for {factory.__name__}; expected "
                "False, and then model.load_state_dict(...) with a checkpoint of your own"
            )
        return factory(**kwargs)

    create.__name__ = factory.__name__
    register_model(create)


for _factory in (
    *(deit_tiny, deit_small, deit_base, vit_mini),
    *(resnet_mini, se_resnet_mini, se_resnet50, sknet50),
    *(cbam_resnet_mini, cbam_resnet18, cbam_resnet34, cbam_resnet50, cbam_resnet101),
    *(patchconvnet_mini, patchconvnet_s60, patchconvnet_s60_multi, patchconvnet_s120),
    *(patchconvnet_b60, patchconvnet_b120, patchconvnet_l60, patchconvnet_l120),
    *(dependencyvit_mini, dependencyvit_tiny, dependencyvit_small),
    *(dependencyvit_lite_tiny, dependencyvit_lite_small),
    *(spformer_mini, spformer_tiny_patch16, spformer_tiny_patch16_convstem),
    *(spformer_small_patch16, spformer_small_patch16_convstem),
    *(spformer_small_patch32, spformer_small_patch32_convstem),
    *(spformer_small_patch56, spformer_small_patch56_convstem),
    *(spformer_base_patch16, spformer_base_patch16_convstem),
):
    _register(_factory)
