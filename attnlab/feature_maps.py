"""A transformer's patches as the feature map that dense heads want.

`Segmenter` (attnlab.heads) asks a backbone for its stages; the detectors of torchvision, such as
Mask R-CNN (He et al. 2017), call it and look at `out_channels`. A plain transformer has one map of
one resolution, and Lite models bring their pruned patches back for it.
"""

from torch import Tensor, nn


class MapBackbone(nn.Module):
    """One map of one resolution, `(B, D, rows, columns)`, under the names that dense heads expect.

    Args:
        model: has `forward_map(images, **options)` and `num_features`, such as `DependencyViT`.
        options: passed to `forward_map`, for example `fill="hard"`.

    Attributes:
        out_channels: D, for torchvision.
    """

    def __init__(self, model: nn.Module, **options):
        super().__init__()
        if not hasattr(model, "forward_map"):
            raise ValueError(f"model={type(model).__name__}: expected one with forward_map(images)")
        self.model, self.options = model, options
        self.out_channels = model.num_features

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """What torchvision's detectors ask for: `{"0": map}`."""
        return {"0": self.model.forward_map(x, **self.options)}

    def forward_stages(self, x: Tensor) -> dict[str, Tensor]:
        """What `Segmenter` asks for: `{"layer4": map}`."""
        return {"layer4": self.model.forward_map(x, **self.options)}
