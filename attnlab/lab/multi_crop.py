"""Large and small views of the same images, for learning without labels.

Multi-crop: Caron et al. 2020 (SwAV, Sec. 3.4). The views are cut, mirrored and jittered in color
for a whole batch at once, all drawn from one generator; they are not blurred or solarised.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.lab.arguments import inside, require, whole


def multi_crop(
    images: Tensor,
    generator: torch.Generator,
    *,
    local_crops: int = 4,
    local_size: int | None = None,
    global_scale: tuple[float, float] = (0.4, 1.0),
    local_scale: tuple[float, float] = (0.1, 0.4),
    jitter: float = 0.4,
    flip: float = 0.5,
    gray: float = 0.2,
) -> list[Tensor]:
    """Two large views `(B, 3, H, W)` and `local_crops` small ones `(B, 3, local_size, local_size)`.

    Args:
        images: `(B, 3, H, W)` in [0, 1].
        generator: a CPU generator, from which everything is drawn.
        local_size: in px; default half the shorter side of the images.
        global_scale, local_scale: share of an image's area that a view shows, (least, most).
        jitter: brightness, contrast and saturation change by up to this share, each view by itself.
        flip, gray: share of the views that are mirrored, and of those without color.
    """
    require(
        images.ndim == 4 and images.shape[1] == 3, "images", tuple(images.shape), "(B, 3, H, W)"
    )
    whole(0, local_crops=local_crops)
    inside("[0, 1]", jitter=jitter, flip=flip, gray=gray)
    for name, scale in (("global_scale", global_scale), ("local_scale", local_scale)):
        fits = len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1
        require(fits, name, scale, "(least, most), 0 < least ≤ most ≤ 1")
    size = tuple(images.shape[-2:])
    local_size = min(size) // 2 if local_size is None else local_size
    kinds = [(size, global_scale)] * 2 + [((local_size, local_size), local_scale)] * local_crops
    views = []
    for view_size, scale in kinds:
        view = _crop(images, generator, view_size, scale, flip)
        views.append(_recolor(view, generator, jitter, gray))
    return views


def _crop(
    images: Tensor, draws: torch.Generator, size: tuple[int, int], scale: tuple[float, float],
    flip: float,
) -> Tensor:  # fmt: skip
    """A random part of each image, its sides in a ratio of 3:4 to 4:3 to the image's own."""
    batch = len(images)
    area, ratio, x, y, mirror = torch.rand(5, batch, generator=draws)
    area = scale[0] + (scale[1] - scale[0]) * area
    ratio = torch.exp((2 * ratio - 1) * math.log(4 / 3) / 2)
    width, height = (area.sqrt() * ratio).clamp_max(1), (area.sqrt() / ratio).clamp_max(1)
    grid = torch.zeros(batch, 2, 3)
    grid[:, 0, 0] = torch.where(mirror < flip, -width, width)
    grid[:, 1, 1] = height
    grid[:, 0, 2], grid[:, 1, 2] = (2 * x - 1) * (1 - width), (2 * y - 1) * (1 - height)
    places = F.affine_grid(grid, [batch, 3, *size], align_corners=False).to(images)
    return F.grid_sample(images, places, padding_mode="border", align_corners=False)


def _recolor(images: Tensor, draws: torch.Generator, jitter: float, gray: float) -> Tensor:
    """Brightness, contrast and saturation of each image changed, some without color."""
    factors = 1 + jitter * (2 * torch.rand(3, len(images), 1, 1, 1, generator=draws) - 1)
    brightness, contrast, saturation = factors.to(images)
    colorless = (torch.rand(len(images), 1, 1, 1, generator=draws) < gray).to(images.device)
    images = (images * brightness).clamp(0, 1)
    mean = images.mean((1, 2, 3), keepdim=True)
    images = (mean + (images - mean) * contrast).clamp(0, 1)
    luminance = images.mean(1, keepdim=True)
    saturation = saturation.masked_fill(colorless, 0.0)
    return (luminance + (images - luminance) * saturation).clamp(0, 1)
