"""The class explorer: choose a class and see where its query looks; or all classes in colors."""

from collections.abc import Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

from attnlab.lab.arguments import inside, require
from attnlab.lab.pages import PageFigure, pack, picture

# Okabe and Ito's palette without black, and white: eight classes that differ on a photograph.
CLASS_COLORS = (
    "#e69f00", "#56b4e9", "#f0e442", "#009e73", "#d55e00", "#cc79a7", "#0072b2", "#ffffff",
)  # fmt: skip


class ClassExplorer(PageFigure):
    """Choose a class and see its map over an image, with its score and the weight of each place.

    The last line of a notebook cell shows it. All data are in the page.

    Args:
        image: `(3, H, W)`, values in [0, 1].
        maps: `(classes, h, w)`, not negative: where the network looked for each class.
        names: one for each class.
        scores: `(classes,)`, from 0 to 1: how sure the network is that the class is there. The
            highest is shown first; a map says nothing without it, for an absent class has one too.
        masks: `(classes, H, W)`, from 0 to 1: where each class really is; zero where it is not.
            With it, the page says how much of a map lies on its own object and on the others.
        image_size: width of the image on the page, in pixels.
        title: what stands above the figure.
        alt: what a screen reader says about the image.
        max_bytes: the largest size of the notebook's output.

    Raises:
        ValueError: an argument does not have the shape or the values above, or the output would be
            larger than `max_bytes`.
    """

    script, around = "class_explorer", 190

    def __init__(
        self,
        image: Tensor,
        maps: Tensor,
        names: Sequence[str],
        scores: Tensor,
        masks: Tensor | None = None,
        *,
        image_size: int = 360,
        title: str = "Where does each class look?",
        alt: str | None = None,
        max_bytes: int = 300_000,
    ):
        self.image, self.maps, self.scores = _checked(image, maps, scores)
        classes, (rows, cols) = len(self.maps), self.maps.shape[1:]
        self.names = tuple(names)
        require(len(self.names) == classes, "names", self.names, f"{classes} names, one a map")
        self.shares = None if masks is None else map_shares(self.maps, masks)
        self.image_size, self.title = image_size, title
        self.aspect = self.image.shape[1] / self.image.shape[2]
        self.alt = alt or f"An image of {rows}×{cols} places with a map for each class"
        self._check_size(max_bytes, f"the explorer of {classes} classes", "show fewer classes")

    def __repr__(self) -> str:
        classes, rows, cols = self.maps.shape
        return f"ClassExplorer({classes} class{'es' * (classes != 1)}, {rows}×{cols} places)"

    def figure(self, name: str | None = None):
        """One view of the page as a matplotlib picture, for paper; returns the axes.

        Args:
            name: the class's name; by default that of the highest score.

        Raises:
            ValueError: there is no such class.
        """
        from attnlab.lab import plots

        name = self.names[int(self.scores.argmax())] if name is None else name
        require(name in self.names, "name", name, f"one of {self.names}")
        index = self.names.index(name)
        title = f"{name}, score {self.scores[index]:.2f}"
        return plots.overlay(self.image, self.maps[index], title)[0]

    def _data(self) -> dict:
        shares = [None] * len(self.names) if self.shares is None else self.shares.tolist()
        return {
            "title": self.title,
            "alt": self.alt,
            "grid": list(self.maps.shape[1:]),
            "maps": pack(rearrange(self.maps, "k h w -> k (h w)")),
            "classes": [
                {
                    "name": name,
                    "score": round(score, 4),
                    "color": CLASS_COLORS[i % len(CLASS_COLORS)],
                    "shares": share and [round(part, 4) for part in share],
                }
                for i, (name, score, share) in enumerate(
                    zip(self.names, self.scores.tolist(), shares, strict=True)
                )
            ],
            **picture(self.image, self.image_size),
        }


def map_shares(maps: Tensor, masks: Tensor) -> Tensor:
    """How much of each class's map lies on its own object, and how much on the others': `(K, 2)`.

    maps: `(K, h, w)`. masks: `(K, H, W)`, from 0 to 1, where each class is. Maps are brought to the
    masks' size by nearest upsampling. Raises ValueError when there is not one mask for each map.
    """
    fits = maps.ndim == masks.ndim == 3 and len(maps) == len(masks)
    require(fits, "masks", tuple(masks.shape), f"({len(maps)}, H, W), one mask for each map")
    large = F.interpolate(maps[None], masks.shape[1:], mode="nearest-exact")[0]
    masks = masks.to(large)
    others = (masks.sum(0, keepdim=True) - masks).clamp(max=1)
    inside_both = torch.stack([(large * masks).sum((1, 2)), (large * others).sum((1, 2))], dim=1)
    return inside_both / large.sum((1, 2))[:, None].clamp(min=1e-12)


def color_by_class(
    image: Tensor, maps: Tensor, scores: Tensor, least: float = 0.3, opacity: float = 0.8
) -> Tensor:
    """Paint each place in the color of the class that claims it most: a picture `(3, H, W)`.

    Class j claims a place with s_j a_j / max a_j, its score times its map over the map's own
    largest weight. The color (`CLASS_COLORS`) covers the gray image as far as the claim goes.

    Args:
        image: `(3, H, W)`, values in [0, 1].
        maps: `(classes, h, w)`, brought to the image's size bilinearly.
        scores: `(classes,)`, from 0 to 1.
        least: classes with a lower score claim nothing.
        opacity: of a claim of 1.

    Raises:
        ValueError: an argument does not have the shape or the values above.
    """
    image, maps, scores = _checked(image, maps, scores)
    inside("[0, 1]", least=least, opacity=opacity)
    peaks = maps.amax((1, 2), keepdim=True).clamp(min=1e-12)
    claims = torch.where(scores < least, 0, scores)[:, None, None] * maps / peaks
    claims = F.interpolate(claims[None], image.shape[1:], mode="bilinear")[0]
    claim, owner = claims.max(0)
    palette = torch.tensor([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in CLASS_COLORS])
    color = rearrange(palette[owner % len(CLASS_COLORS)], "h w c -> c h w")
    gray = repeat(image.mean(0), "h w -> c h w", c=3)
    return torch.lerp(gray, color, opacity * claim).clamp(0, 1)


def _checked(image: Tensor, maps: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    image, maps, scores = (x.detach().float().cpu() for x in (image, maps, scores))
    is_image = image.ndim == 3 and image.shape[0] == 3
    require(is_image, "image", tuple(image.shape), "the shape (3, H, W)")
    require(
        maps.ndim == 3 and len(maps) > 0, "maps", tuple(maps.shape), "the shape (classes, h, w)"
    )
    require(bool((maps >= 0).all()), "maps", "a negative or NaN weight", "weights ≥ 0")
    one_each = scores.shape == maps.shape[:1]
    require(one_each, "scores", tuple(scores.shape), f"({len(maps)},), one for each map")
    for name, values in (("image", image), ("scores", scores)):
        in_range = bool(((values >= 0) & (values <= 1)).all())
        require(in_range, name, "a value outside [0, 1]", "values in [0, 1]")
    return image, maps, scores
