"""The one place that registers our factories with timm: `timm.create_model("vit_mini")`."""

from collections.abc import Callable

from timm.models import register_model
from torch import nn

from attnlab.attention import deit_base, deit_small, deit_tiny, vit_mini
from attnlab.resnet import resnet_mini


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


for _factory in (deit_tiny, deit_small, deit_base, vit_mini, resnet_mini):
    _register(_factory)
