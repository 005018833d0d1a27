"""The tree explorer: click a patch and see its way to the root, its subtree and its messages."""

from collections.abc import Mapping

import torch
from torch import Tensor

from attnlab.dependency_trace import DependencyTrace, dependency_scores
from attnlab.dependency_trees import DependencyTree, dependency_tree
from attnlab.lab.pages import PageFigure, picture


class TreeExplorer(PageFigure):
    """Point at a patch of an image and see where it stands in the tree.

    The last line of a notebook cell shows it. All data are in the page.

    Args:
        image: `(3, H, W)`, values in [0, 1].
        trace: what `DependencyViT.trace` gave for this image alone, without prefix tokens.
        trees: trees of this image by name, the first shown first; by default those of
            `default_trees`.
        image_size: width of the image on the page, in pixels.
        title: what stands above the figure.
        alt: what a screen reader says about the image.
        max_bytes: the largest size of the notebook's output.

    Raises:
        ValueError: `image`, `trace` or `trees` are not as said, or the output would be larger than
            `max_bytes`.
    """

    script, around = "tree_explorer", 190

    def __init__(
        self,
        image: Tensor,
        trace: DependencyTrace,
        trees: Mapping[str, DependencyTree] | None = None,
        *,
        image_size: int = 360,
        title: str = "Who is whose parent?",
        alt: str | None = None,
        max_bytes: int = 300_000,
    ):
        if image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"image {tuple(image.shape)}: expected (3, H, W)")
        _, images, tokens = trace.messages.shape
        self.grid = trace.grid
        if images != 1 or trace.num_prefix_tokens:
            prefix = trace.num_prefix_tokens
            raise ValueError(
                f"trace of {images} images and {prefix} prefix tokens: expected 1 and 0"
            )
        self.image = image.detach().float().cpu()
        self.messages = trace.messages[:, 0].float().cpu()  # (L, N)
        self.trees = dict(default_trees(trace) if trees is None else trees)
        for name, tree in self.trees.items():
            if tree.parents.shape != (tokens,) or bool((tree.depth < 0).any()):
                shape = tuple(tree.parents.shape)
                raise ValueError(
                    f"trees[{name!r}] {shape}: expected a tree of {tokens} tokens, no cycles"
                )
        if not self.trees:
            raise ValueError("trees is empty: expected at least one")
        rows, cols = self.grid
        self.image_size, self.title = image_size, title
        self.aspect = self.image.shape[1] / self.image.shape[2]
        self.alt = alt or f"An image of {rows}×{cols} patches with its tree"
        self._check_size(max_bytes, f"the explorer of {len(self.trees)} trees", "show fewer trees")

    def __repr__(self) -> str:
        rows, cols = self.grid
        trees = f"{len(self.trees)} tree{'s' * (len(self.trees) != 1)}"
        return f"TreeExplorer({trees}, {len(self.messages)} layers, {rows}×{cols} patches)"

    def figure(self, patch: tuple[int, int] | None = None, tree: str | None = None, ax=None):
        """One view of the page as a matplotlib picture, for paper; returns the axes.

        Args:
            patch: `(row, column)`; None draws the tree alone.
            tree: the tree's name; the first by default.

        Raises:
            ValueError: there is no such patch or tree.
        """
        rows, cols = self.grid
        name = next(iter(self.trees)) if tree is None else tree
        if name not in self.trees:
            raise ValueError(f"tree={tree!r}: expected one of {', '.join(self.trees)}")
        if patch and not (0 <= patch[0] < rows and 0 <= patch[1] < cols):
            raise ValueError(f"patch={patch}: expected (row, column) within {rows}×{cols}")
        token = None if patch is None else patch[0] * cols + patch[1]
        return draw_tree(self.image, self.trees[name], self.grid, token, title=name, ax=ax)

    def _data(self) -> dict:
        return {
            "title": self.title,
            "alt": self.alt,
            "grid": list(self.grid),
            "messages": [[round(m, 4) for m in layer] for layer in self.messages.tolist()],
            "trees": [
                {
                    "name": name,
                    "parents": tree.parents.tolist(),
                    "scores": [round(s, 4) for s in tree.scores.tolist()],
                }
                for name, tree in self.trees.items()
            ],
            **picture(self.image, self.image_size),
        }


def default_trees(trace: DependencyTrace) -> dict[str, DependencyTree]:
    """Readings of one image's trace: layers summed or alike, four decoders; by what was done."""
    summed, alike = (dependency_scores(trace, combine)[0] for combine in ("sum", "mean_norm"))
    return {
        "sum of layers, best tree": dependency_tree(summed),
        "sum of layers, greedy": dependency_tree(summed, "greedy"),
        "sum of layers, best forest": dependency_tree(summed, "forest"),
        "sum of layers, popularity corrected": dependency_tree(summed, score="pmi"),
        "layers alike, best tree": dependency_tree(alike),
    }


def draw_tree(
    image: Tensor,
    tree: DependencyTree,
    grid: tuple[int, int],
    token: int | None = None,
    title: str | None = None,
    ax=None,
):
    """Lines from each patch to its parent over `image` (3, H, W); returns the axes.

    Roots are squares. With `token`, its path to the root is blue and its subtree orange.
    """
    import matplotlib.pyplot as plt

    from attnlab.lab import plots

    with plots.style():
        ax = ax or plt.subplots(figsize=(3.2, 3.4))[1]
    rows, cols = grid
    extent = (-0.5, cols - 0.5, rows - 0.5, -0.5)
    ax.imshow(image.permute(1, 2, 0).numpy(), extent=extent, interpolation="nearest")
    ax.set(title=title, xticks=[], yticks=[], xlim=(-0.5, cols - 0.5), ylim=(rows - 0.5, -0.5))
    path = [] if token is None else tree.path(token)
    below = [] if token is None else tree.subtree(token)
    for child, parent in enumerate(tree.parents.tolist()):
        row, col = divmod(child, cols)
        if parent < 0:
            ax.plot(col, row, "s", color="white", markeredgecolor="black", markersize=9)
            continue
        ends = torch.tensor([[col, row], [parent % cols, parent // cols]]).T
        color = "#3fd8ff" if child in path else "#e69f00" if child in below else "white"
        strong = color != "white"
        for width, ink in ((3.5 if strong else 2.2, "black"), (2.2 if strong else 1.0, color)):
            ax.plot(*ends.tolist(), color=ink, linewidth=width, zorder=2 + strong)
        ax.plot(col, row, ".", color=color, markeredgecolor="black", markersize=7, zorder=4)
    return ax
