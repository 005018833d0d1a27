"""Explorable figures: hover or click a patch and see its attention; sliders that recompute."""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from itertools import accumulate

import torch
from torch import Tensor, nn

from attnlab.probe import attention_rollout, record

from .pages import PageFigure, pack, picture


class AttentionExplorer(PageFigure):
    """Point at a patch of a photograph and see where it looks, in every layer and head.

    The last line of a notebook cell shows it. All data are in the page.

    Args:
        image: `(3, H, W)`, values in [0, 1].
        maps: one attention map per layer, `(heads, T, T)` or `(1, heads, T, T)`, as a list, or as a
            dict by layer name, as `attnlab.record` gives through `maps.dense()`. T is
            `prefix + rows * cols`; rows are queries. Negative weights are drawn with a diverging
            colour map.
        grid: `(rows, cols)` of the patches.
        prefix: how many class tokens come before the patches.
        layers: which layers to show (positions in `maps`); all by default.
        heads: which heads to show, or "mean" for their average alone; all by default.
        names: names of all layers, when `maps` is a list.
        image_size: width of the photograph on the page, in pixels.
        title: what stands above the figure.
        alt: what a screen reader says about the photograph.
        max_bytes: the largest size of the notebook's output.

    Raises:
        ValueError: an argument does not have the shape or the values above, or the output would
            be larger than `max_bytes`.
    """

    script, around = "explorer", 150

    def __init__(
        self,
        image: Tensor,
        maps: Sequence[Tensor] | Mapping[str, Tensor],
        grid: tuple[int, int],
        *,
        prefix: int = 1,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | str | None = None,
        names: Sequence[str] | None = None,
        image_size: int = 360,
        title: str = "Where does each patch look?",
        alt: str | None = None,
        max_bytes: int = 300_000,
    ):
        self.image = _checked_image(image)
        self.grid, self.prefix = (int(grid[0]), int(grid[1])), prefix
        self.maps, self.names = _checked_maps(maps, self.grid, prefix, names)  # (L, heads, T, T)
        self.layers = _checked_choice("layers", layers, len(self.maps))
        self.heads = (
            heads if heads == "mean" else _checked_choice("heads", heads, self.maps.shape[1])
        )
        self.image_size, self.title = image_size, title
        self.aspect = self.image.shape[1] / self.image.shape[2]
        self.alt = alt or f"A photograph, divided into {_times(self.grid)} patches"
        self.signed = bool((self.maps < 0).any())
        sums = self.maps.sum(-1)
        self.stochastic = not self.signed and torch.allclose(sums, torch.ones_like(sums), atol=0.02)
        fewer = 'show fewer layers (layers=[...]) or heads (heads=[...] or heads="mean")'
        self._check_size(max_bytes, f"the explorer of {len(self.layers)} layers", fewer)

    def __repr__(self) -> str:
        heads = 1 if self.heads == "mean" else len(self.heads)
        counts = [f"{n} {word}{'s' * (n != 1)}" for n, word in
                  [(len(self.layers), "layer"), (heads, "head")]]  # fmt: skip
        return f"AttentionExplorer({', '.join(counts)}, {_times(self.grid)} patches)"

    @cached_property
    def rollout(self) -> Tensor:
        """Attention rolled out from the input to each layer, `(layers, T, T)`."""
        steps = [attention_rollout([layer[None]])[0] for layer in self.maps]  # ½ (mean + I)
        return torch.stack(list(accumulate(steps, lambda below, step: step @ below)))

    def weights(
        self,
        query: tuple[int, int] | int,
        layer: int = -1,
        head: int | str = "mean",
        received: bool = False,
    ) -> Tensor:
        """The weights that the page draws, `(T,)`, class tokens first.

        Args:
            query: `(row, column)` of a patch, or the index of a class token.
            layer: position in `maps`.
            head: a head, "mean" of all heads, or "rollout" up to the layer.
            received: False: where the query looks; True: who looks at it.
        """
        rows, cols = self.grid
        valid = (
            0 <= query < self.prefix
            if isinstance(query, int)
            else 0 <= query[0] < rows and 0 <= query[1] < cols
        )
        if not valid:
            raise ValueError(
                f"query={query!r}: expected (row, column) within {_times(self.grid)} patches, or "
                f"the index of one of {self.prefix} class tokens"
            )
        token = query if isinstance(query, int) else self.prefix + query[0] * cols + query[1]
        if head == "rollout":
            matrix = self.rollout[layer]
        else:
            matrix = self.maps[layer].mean(0) if head == "mean" else self.maps[layer, head]
        return matrix[:, token] if received else matrix[token]

    def figure(
        self,
        query: tuple[int, int] | int,
        layer: int = -1,
        head: int | str = "mean",
        received: bool = False,
    ):
        """One view of the page as a matplotlib picture, for paper; arguments as of `weights`.

        Returns the axes.
        """
        from . import plots

        weights = self.weights(query, layer, head, received)[self.prefix :].view(self.grid)
        patch = None if isinstance(query, int) else query
        who = f"row {patch[0]}, column {patch[1]}" if patch else f"class token {query}"
        verb = "is looked at by" if received else "looks at"
        where = {"mean": "mean of heads", "rollout": "rollout"}.get(head, f"head {head}")
        title = f"{who} {verb}\nlayer {self.names[layer]}, {where}"
        return plots.overlay(self.image, weights, title, mark=patch)[0]

    def _data(self) -> dict:
        shown = (
            self.maps.mean(1, keepdim=True) if self.heads == "mean" else self.maps[:, self.heads]
        )
        columns = _columns(self.heads, self.maps.shape[1], self.stochastic)
        if self.stochastic:
            shown = torch.cat([shown, self.rollout[:, None]], 1)
        return {
            "title": self.title,
            "alt": self.alt,
            "grid": self.grid,
            "prefix": ["CLS", *(f"CLS {i}" for i in range(1, self.prefix))][: self.prefix],
            "layers": [{"name": self.names[i], "short": str(i)} for i in self.layers],
            "columns": columns,
            "column": max(i for i, c in enumerate(columns) if i == 0 or c["short"] == "mean"),
            "signed": self.signed,
            "stochastic": self.stochastic,
            "maps": [[pack(m, self.signed) for m in shown[layer]] for layer in self.layers],
            **picture(self.image, self.image_size),
        }


def explore(
    model: nn.Module,
    image: Tensor,
    *,
    grid: tuple[int, int] | None = None,
    prefix: int | None = None,
    inputs: Tensor | None = None,
    **options,
) -> AttentionExplorer:
    """Run `model` on one image and explore its attention.

    Args:
        model: any module whose attention `attnlab.record` can record.
        image: the photograph, `(3, H, W)`, values in [0, 1].
        grid, prefix: of the tokens; by default as many class tokens as the model says, and a grid
            with the photograph's proportions.
        inputs: what the model is given, `(3, H, W)`, where that is not the photograph itself (a
            normalised one, another size).
        options: `layers`, `heads`, `title` and the others of `AttentionExplorer`.

    Raises:
        ValueError: the grid cannot be told from the number of tokens, and all of
            `AttentionExplorer`.
    """
    image = _checked_image(image)
    parameter = next(model.parameters())
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), record(model) as maps:
            model((image if inputs is None else inputs).to(parameter)[None])
    finally:
        for module, mode in training.items():
            module.training = mode
    dense = maps.dense(grid)
    if grid is None:
        if prefix is None:
            prefix = getattr(model, "num_prefix_tokens", None)
        tokens = next(iter(dense.values())).shape[-1]
        grid, prefix = _grid(tokens, image.shape[1] / image.shape[2], prefix)
    return AttentionExplorer(image, dense, grid, prefix=prefix or 0, **options)


def sliders(draw: Callable, **ranges: tuple | list) -> None:
    """Call `draw(**values)` now, and again whenever a slider moves, where there are sliders.

    Args:
        draw: a plain function that ends in `plt.show()`; a checked cell can call it too.
        ranges: `name=(low, high, first)` for a slider, over whole numbers when all three are, or
            `name=[first, second, …]` for a choice.

    Outside a notebook, or without ipywidgets, it draws once, with the first values.
    """
    first = {name: r[2] if isinstance(r, tuple) else r[0] for name, r in ranges.items()}
    if not _in_notebook():
        draw(**first)
        return

    import ipywidgets
    from IPython.display import display

    def control(name: str, choice: tuple | list):
        if isinstance(choice, list):
            return ipywidgets.Dropdown(options=choice, description=name)
        low, high, value = choice
        whole = all(isinstance(number, int) for number in choice)
        slider = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
        step = 1 if whole else (high - low) / 100
        return slider(value, min=low, max=high, step=step, description=name)

    controls = {name: control(name, choice) for name, choice in ranges.items()}
    display(*controls.values(), ipywidgets.interactive_output(draw, controls))


def _in_notebook() -> bool:
    """Whether sliders can be shown: a Jupyter kernel, and ipywidgets installed."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel") and find_spec("ipywidgets") is not None


def _times(grid: tuple[int, int]) -> str:
    return f"{grid[0]}×{grid[1]}"


def _columns(heads: list[int] | str, count: int, rollout: bool) -> list[dict]:
    """What the head selector offers: names, and which stored maps to average."""
    if heads == "mean":
        columns = [{"name": "mean of heads", "short": "mean", "stored": [0]}]
    else:
        columns = [{"name": str(h), "short": str(h), "stored": [i]} for i, h in enumerate(heads)]
    stored = len(columns)
    if stored > 1:
        which = "" if stored == count else f" {', '.join(map(str, heads))}"
        everything = list(range(stored))
        columns.append({"name": f"mean of heads{which}", "short": "mean", "stored": everything})
    if rollout:
        columns.append({"name": "rollout to this layer", "short": "rollout", "stored": [stored]})
    return columns


def _grid(tokens: int, proportions: float, prefix: int | None) -> tuple[tuple[int, int], int]:
    """The grid of `tokens - prefix` patches with `proportions` (height / width), and the prefix."""
    for extra in (0, 1, 2) if prefix is None else (prefix,):
        rows = round(((tokens - extra) * proportions) ** 0.5)
        if rows and (tokens - extra) % rows == 0:
            cols = (tokens - extra) // rows
            if abs(rows / cols / proportions - 1) < 0.1:
                return (rows, cols), extra
    raise ValueError(
        f"grid=None: {tokens} tokens and an image of proportions {proportions:.3g} (height / "
        "width) do not tell the grid of patches: give grid=(rows, cols) and prefix"
    )


def _checked_image(image: Tensor) -> Tensor:
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3:
        shape = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"image has shape {shape}: expected a tensor (3, H, W)")
    image = image.detach().float().cpu()
    if not (image.min() >= 0 and image.max() <= 1):  # written so that NaN fails too
        raise ValueError(
            f"image has values from {image.min():.3g} to {image.max():.3g}: expected [0, 1] "
            "(give the photograph, not the normalised input)"
        )
    return image


def _checked_maps(maps, grid, prefix, names) -> tuple[Tensor, list[str]]:
    """The maps as one `(layers, heads, T, T)` tensor, and the layers' names."""
    if isinstance(maps, Mapping):
        names, maps = list(maps), list(maps.values())
    names = list(names) if names is not None else [str(i) for i in range(len(maps))]
    if not maps:
        raise ValueError("maps is empty: expected one attention map per layer")
    if len(names) != len(maps):
        raise ValueError(f"names has {len(names)} names: expected {len(maps)}, one per layer")
    tokens = prefix + grid[0] * grid[1]
    checked = []
    for name, layer in zip(names, maps, strict=True):
        layer = layer.detach().float().cpu()
        if layer.ndim == 4 and layer.shape[0] == 1:
            layer = layer[0]
        if layer.ndim != 3 or layer.shape[1:] != (tokens, tokens):
            raise ValueError(
                f"maps[{name!r}] has shape {tuple(layer.shape)}: expected (heads, {tokens}, "
                f"{tokens}) or a batch of one, for {prefix} class tokens and {_times(grid)} patches"
            )
        if not layer.isfinite().all():
            raise ValueError(f"maps[{name!r}] has NaN or infinite weights: expected finite ones")
        checked.append(layer)
    if len({layer.shape[0] for layer in checked}) > 1:
        counts = [layer.shape[0] for layer in checked]
        raise ValueError(f"maps have {counts} heads: expected the same number in every layer")
    return torch.stack(checked), names


def _checked_choice(argument: str, chosen: Sequence[int] | None, count: int) -> list[int]:
    chosen = range(count) if chosen is None else chosen
    if not chosen or not all(isinstance(i, int) and -count <= i < count for i in chosen):
        raise ValueError(f"{argument}={chosen!r}: expected some of 0 to {count - 1}")
    return [i % count for i in chosen]
