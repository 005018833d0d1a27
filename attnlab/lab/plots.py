"""The figures that every chapter draws, in one style.

Each function draws into new axes, or into `ax`, and returns them, so that a chapter can add to
them; a cell ends with `plt.show()`. Weights are drawn in viridis from zero up (over a photograph in
inferno, whose dark end dims what gets none), and weights with a sign around a white zero.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

import torch
from torch import Tensor

from .arguments import inside, require

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
STYLE = {
    "figure.dpi": 80,
    "savefig.dpi": 80,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "image.cmap": "viridis",
    "image.interpolation": "nearest",
}


def style():
    """The course's matplotlib settings: `with plots.style(): …` for figures of your own."""
    import matplotlib.pyplot as plt
    from cycler import cycler

    return plt.rc_context({**STYLE, "axes.prop_cycle": cycler(color=COLORS)})


def show_images(
    images: Tensor | Sequence[Tensor],
    titles: Sequence[str] | None = None,
    *,
    title: str | None = None,
    columns: int | None = None,
    size: float = 1.8,
):
    """Photographs and masks side by side.

    Args:
        images: `(N, 3, H, W)`, or a list of `(3, H, W)`, `(1, H, W)` and `(H, W)` tensors; values
            in [0, 1].
        titles: one for each image.
        title: above all of them.
        columns: images in a row; by default at most 8.
        size: height and width of each, in inches.

    Returns:
        An array of N axes.

    Raises:
        ValueError: no image, one of another shape or outside [0, 1], or not one title for each.
    """
    if isinstance(images, Tensor):
        expected = "a list of images, or a tensor (N, 3, H, W)"
        require(images.ndim == 4, "images", tuple(images.shape), expected)
    pictures = [_picture(f"images[{i}]", image) for i, image in enumerate(images)]
    axes = _frames(len(pictures), titles, title, columns, size)
    for ax, picture in zip(axes, pictures, strict=True):
        ax.imshow(picture, cmap="gray", vmin=0, vmax=1)
    return axes


def overlay(
    image: Tensor,
    maps: Tensor,
    titles: Sequence[str] | str | None = None,
    *,
    title: str | None = None,
    opacity: float = 0.65,
    smooth: bool = False,
    limits: tuple[float, float] | None = None,
    mark: tuple[int, int] | None = None,
    label: str = "weight",
    columns: int | None = None,
    size: float = 2.4,
):
    """Attention maps over a photograph, on one colour scale.

    Args:
        image: `(3, H, W)`, or `(N, 3, H, W)` for one photograph a map; values in [0, 1].
        maps: `(rows, cols)` or `(N, rows, cols)`, spread over the photograph.
        titles: one for each map.
        opacity: 0 shows the photograph alone, 1 the map alone.
        smooth: interpolate bilinearly between patches; by default each patch has one colour.
        limits: the ends of the colour scale; by default zero and the largest weight, or, with
            negative weights, ± the largest size.
        mark: `(row, column)` of a patch to outline, the one whose map this is.
        label: of the colour bar.

    Returns:
        An array of N axes; each holds two images, the photograph and the map.

    Raises:
        ValueError: an argument does not have the shape or the values above.
    """
    maps = _finite("maps", maps)
    require(maps.ndim in (2, 3), "maps", tuple(maps.shape), "the shape (rows, cols) or (N, …)")
    inside("[0, 1]", opacity=opacity)
    maps = maps[None] if maps.ndim == 2 else maps
    titles = [titles] if isinstance(titles, str) else titles
    images = list(image) if image.ndim == 4 else [image] * len(maps)
    require(len(images) == len(maps), "image", tuple(image.shape), f"one image or {len(maps)}")
    pictures = [_picture("image", one) for one in images]

    axes = _frames(len(maps), titles, title, columns, size)
    colours = _scale(maps, limits, sequential="inferno")
    for ax, picture, weights in zip(axes, pictures, maps, strict=True):
        height, width = picture.shape[:2]
        extent = (0, width, height, 0)
        ax.imshow(picture, cmap="gray", vmin=0, vmax=1, extent=extent)
        interpolation = "bilinear" if smooth else "nearest"
        drawn = ax.imshow(
            weights.numpy(), alpha=opacity, extent=extent, interpolation=interpolation, **colours
        )
        if mark is not None:
            _outline(ax, mark, height / weights.shape[0], width / weights.shape[1])
    bar = axes[0].figure.colorbar(drawn, ax=list(axes), label=label, shrink=0.8)
    bar.solids.set_alpha(1)
    return axes


def heatmap(
    matrix: Tensor,
    *,
    title: str | None = None,
    xlabel: str = "key",
    ylabel: str = "query",
    label: str = "weight",
    row_sums: bool = False,
    column_sums: bool = False,
    numbers: str | None = None,
    limits: tuple[float, float] | None = None,
    size: float = 3.2,
    ax=None,
):
    """A matrix as colours: rows are queries and columns are keys, unless the labels say otherwise.

    Args:
        matrix: `(queries, keys)`.
        row_sums, column_sums: bars in the margin.
        numbers: a format such as ".2f" writes each value into its cell.
        limits: as in `overlay`.
        size: height of the figure in inches, where `ax` is not given.

    Returns:
        The axes.

    Raises:
        ValueError: `matrix` is not a matrix of finite numbers.
    """
    matrix = _finite("matrix", matrix)
    require(matrix.ndim == 2, "matrix", tuple(matrix.shape), "the shape (queries, keys)")
    rows, cols = matrix.shape
    with style():
        ax = ax or _axes((1.3 * size, size))
        drawn = ax.imshow(matrix.numpy(), aspect="auto", **_scale(matrix, limits))
        ax.set(xlabel=xlabel, ylabel=ylabel)
        ax.locator_params(integer=True)
        if row_sums:
            margin = ax.inset_axes([1.03, 0, 0.16, 1], sharey=ax)
            margin.barh(range(rows), matrix.sum(1).numpy(), height=1, color=COLORS[0])
            margin.tick_params(labelleft=False)
            margin.set_xlabel("row sum", fontsize=8)
        if column_sums:
            margin = ax.inset_axes([0, 1.03, 1, 0.16], sharex=ax)
            margin.bar(range(cols), matrix.sum(0).numpy(), width=1, color=COLORS[0])
            margin.tick_params(labelbottom=False)
            margin.set_ylabel("column\nsum", fontsize=8)
            margin.set_title(title)
        else:
            ax.set_title(title)
        if numbers:
            shares = drawn.norm(matrix.numpy())
            dark = (shares < 0.5) if drawn.get_cmap().name == "viridis" else abs(shares - 0.5) > 0.3
            for row, col in torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).tolist():
                ink = "white" if dark[row, col] else "black"
                text = format(float(matrix[row, col]), numbers)
                ax.text(col, row, text, ha="center", va="center", color=ink, fontsize=8)
        ax.figure.colorbar(drawn, ax=ax, label=label)
    return ax


def matrix_grid(
    matrices: Tensor | Sequence[Sequence[Tensor]],
    row_titles: Sequence[str] | None = None,
    column_titles: Sequence[str] | None = None,
    *,
    title: str | None = None,
    xlabel: str = "key",
    ylabel: str = "query",
    label: str = "weight",
    limits: tuple[float, float] | None = None,
    size: float = 1.5,
):
    """Many matrices on one colour scale, say one for each layer (down) and head (across).

    Args:
        matrices: `(R, C, queries, keys)`, or R lists of C matrices.
        row_titles, column_titles: R and C of them.
        size: height and width of each in inches.

    Returns:
        An `(R, C)` array of axes.
    """
    import matplotlib.pyplot as plt

    matrices = [[_finite("matrices", matrix) for matrix in row] for row in matrices]
    R, C = len(matrices), len(matrices[0])
    for name, titles, count in [("row_titles", row_titles, R), ("column_titles", column_titles, C)]:
        require(titles is None or len(titles) == count, name, titles, f"{count} titles")
    colours = _scale(torch.cat([matrix.flatten() for row in matrices for matrix in row]), limits)
    with style():
        shape = {"figsize": (size * C + 1, size * R + 0.5), "sharex": True, "sharey": True}
        figure, axes = plt.subplots(R, C, squeeze=False, **shape)
        for r, c in torch.cartesian_prod(torch.arange(R), torch.arange(C)).tolist():
            drawn = axes[r, c].imshow(matrices[r][c].numpy(), aspect="auto", **colours)
            rows, cols = matrices[r][c].shape
            axes[r, c].set(xticks=[0, cols - 1], yticks=[0, rows - 1])
            if column_titles and r == 0:
                axes[r, c].set_title(column_titles[c])
            if c == 0:
                axes[r, c].set_ylabel(f"{row_titles[r]}\n{ylabel}" if row_titles else ylabel)
            if r == R - 1:
                axes[r, c].set_xlabel(xlabel)
        figure.suptitle(title)
        figure.colorbar(drawn, ax=axes, label=label)
    return axes


def curve(
    x: Sequence[float] | Tensor,
    series: Mapping[str, Sequence[float] | Tensor],
    *,
    xlabel: str,
    ylabel: str,
    title: str | None = None,
    log: str = "",
    size: float = 3.0,
    ax=None,
):
    """Named curves over one x.

    Args:
        x: `(n,)`.
        series: `(n,)` values for each name, or `(runs, n)`: then the mean is drawn with a band of
            one standard deviation.
        log: "x", "y" or "xy" for logarithmic axes.

    Returns:
        The axes.

    Raises:
        ValueError: `log` is another word, or a series does not have n values.
    """
    require(log in ("", "x", "y", "xy"), "log", log, '"", "x", "y" or "xy"')
    x = torch.as_tensor(x).detach().double().cpu().numpy()
    with style():
        ax = ax or _axes((1.6 * size, size))
        for marker, (name, values) in zip("osD^vPX" * len(series), series.items(), strict=False):
            values = torch.as_tensor(values).detach().double().cpu()
            shape, n = tuple(values.shape), len(x)
            require(shape[-1:] == (n,), f"series[{name!r}]", shape, f"({n},) or (runs, {n}) values")
            mean = (values if values.ndim == 1 else values.mean(0)).numpy()
            (line,) = ax.plot(x, mean, label=name, marker=marker if len(x) <= 20 else None)
            if values.ndim == 2 and len(values) > 1:
                ends = (mean - values.std(0).numpy(), mean + values.std(0).numpy())
                ax.fill_between(x, *ends, color=line.get_color(), alpha=0.2, lw=0)
        ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
        if "x" in log:
            ax.set_xscale("log", base=2)
        if "y" in log:
            ax.set_yscale("log")
        if len(series) > 1:
            ax.legend()
    return ax


def bars_with_spread(
    table: Mapping,
    metric: str | None = None,
    *,
    xlabel: str | None = None,
    title: str | None = None,
    reference: tuple[str, float] | None = None,
    ax=None,
):
    """One bar a row: the mean over seeds, its standard deviation, and a dot for every seed.

    Args:
        table: the values of all seeds for each row, `{row: [value, …]}`; or, with `metric`, what
            `lab.results.load` gave.
        metric: which of the table's metrics; rows without it are left out.
        xlabel: the metric and its unit; by default its name.
        reference: name and value of a line to compare with, such as `("chance", 0.125)`.

    Returns:
        The axes; the first row of the table is the uppermost bar.

    Raises:
        ValueError: `table` is empty or does not know `metric`, or a row has no values.
    """
    if metric is not None:
        known = sorted({name for metrics in table["rows"].values() for name in metrics})
        require(metric in known, "metric", metric, f"one of {known}")
        rows = table["rows"].items()
        table = {row: metrics[metric]["values"] for row, metrics in rows if metric in metrics}
    require(len(table) > 0, "table", table, "at least one row")
    for row, values in table.items():
        require(len(values) > 0, f"table[{row!r}]", values, "at least one value")
    with style():
        ax = ax or _axes((5.5, 0.8 + 0.38 * len(table)))
        for place, values in enumerate(table.values()):
            mean, spread = fmean(values), stdev(values) if len(values) > 1 else 0
            ax.barh(place, mean, xerr=spread, color=COLORS[5], ecolor=COLORS[6], capsize=3)
            ax.plot(values, [place] * len(values), "o", color=COLORS[0], markersize=4)
        if reference:
            name, value = reference
            ax.axvline(value, color=COLORS[1], linestyle="--")
            above = {"xy": (value, 1), "xycoords": ax.get_xaxis_transform(), "xytext": (0, 2)}
            ax.annotate(name, **above, textcoords="offset points", ha="center", color=COLORS[1])
        ax.set(xlabel=xlabel or metric, yticks=range(len(table)), yticklabels=list(table))
        ax.set_title(title, pad=18 if reference else None)
        ax.invert_yaxis()
    return ax


def _axes(size: tuple[float, float]):
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=size)[1]


def _frames(count: int, titles, title: str | None, columns: int | None, size: float):
    """`count` axes without ticks, with their titles."""
    import matplotlib.pyplot as plt

    require(count > 0, "images", [], "at least one")
    require(titles is None or len(titles) == count, "titles", titles, f"{count} titles")
    columns = min(count, columns or 8)
    rows = -(-count // columns)
    with style():
        height = size + (0.3 if titles else 0)
        shape = {"figsize": (size * columns, height * rows + 0.3), "squeeze": False}
        figure, axes = plt.subplots(rows, columns, **shape)
    figure.suptitle(title)
    for ax in axes.flat:
        ax.axis("off")
    for ax, text in zip(axes.flat, titles or [], strict=False):
        ax.set_title(text)
    for ax in axes.flat[count:]:
        ax.remove()
    return axes.flat[:count]


def _picture(name: str, image: Tensor):
    """An image as matplotlib wants it: `(H, W, 3)` or `(H, W)`."""
    image = _finite(name, image)
    image = image[0] if image.ndim == 3 and image.shape[0] == 1 else image
    is_picture = image.ndim == 2 or (image.ndim == 3 and image.shape[0] == 3)
    require(is_picture, name, tuple(image.shape), "the shape (3, H, W), (1, H, W) or (H, W)")
    low, high = image.min().item(), image.max().item()
    require(low >= 0 and high <= 1, name, (round(low, 3), round(high, 3)), "values in [0, 1]")
    return (image if image.ndim == 2 else image.permute(1, 2, 0)).numpy()


def _finite(name: str, values) -> Tensor:
    values = torch.as_tensor(values).detach().float().cpu()
    bad = values[~values.isfinite()]
    require(bad.numel() == 0, name, bad[:1].tolist(), "finite values")
    return values


def _scale(values: Tensor, limits: tuple[float, float] | None, sequential: str = "viridis") -> dict:
    """Colour map and limits for `imshow`: diverging around zero when a value is negative."""
    signed = bool((values < 0).any())
    most = values.abs().max().item() or 1.0
    low, high = limits or (-most if signed else 0.0, most)
    return {"cmap": "RdBu_r" if signed else sequential, "vmin": low, "vmax": high}


def _outline(ax, patch: tuple[int, int], height: float, width: float) -> None:
    from matplotlib.patches import Rectangle

    row, col = patch
    for line, color in [(4, "black"), (2, "#3fd8ff")]:
        corner = (col * width, row * height)
        ax.add_patch(Rectangle(corner, width, height, fill=False, lw=line, ec=color))
