"""A trunk of one resolution as the backbone that dense heads want.

`Segmenter` (attnlab.heads) asks a backbone for its stages; the detectors of torchvision, such as
Mask R-CNN (He et al. 2017), call it and look at `out_channels`. A plain transformer has one map of
one resolution, and so has PatchConvNet; Lite models bring their pruned patches back for it.
"""

from torch import Tensor, nn

from attnlab.layers import check_map


class MapBackbone(nn.Module):
    """One map of one resolution, `(B, D, rows, columns)`, under the names that dense heads expect.

    Args:
        model: has `num_features` and `forward_map(images, **options)`, such as `DependencyViT`; or,
            such as `ResNet` and timm's convolutional networks, a `forward_features` that gives a
            map.
        options: passed along, for example `fill="hard"`.

    Attributes:
        out_channels: D, for torchvision.

    Raises `ValueError` for a model that has neither, and when what it gives is no such map.
    """

    def __init__(self, model: nn.Module, **options):
        super().__init__()
        if not (hasattr(model, "forward_map") or hasattr(model, "forward_features")):
            raise ValueError(f"model={type(model).__name__}: expected one with forward_map(images)")
        self.model, self.options = model, options
        self.out_channels = model.num_features

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """What torchvision's detectors ask for: `{"0": map}`."""
        return {"0": self._map(x)}

    def forward_stages(self, x: Tensor) -> dict[str, Tensor]:
        """What `Segmenter` asks for: `{"layer4": map}`."""
        return {"layer4": self._map(x)}

    def _map(self, x: Tensor) -> Tensor:
        forward = getattr(self.model, "forward_map", None) or self.model.forward_features
        map = forward(x, **self.options)
        check_map(map, self.out_channels, "map")
        return map
