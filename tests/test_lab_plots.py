"""The figures of the chapters: what is drawn, not only that something is."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from attnlab.lab import plots


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def drawn(image) -> torch.Tensor:
    return torch.tensor(np.asarray(image.get_array()))


def test_style_is_small_and_ends_with_its_context():
    before = plt.rcParams["figure.dpi"]
    with plots.style():
        assert plt.rcParams["figure.dpi"] <= 80
        assert plt.rcParams["savefig.dpi"] <= 80
    assert plt.rcParams["figure.dpi"] == before


def test_show_images_draws_photographs_and_masks(device):
    photo, mask = torch.rand(3, 5, 7, device=device), torch.rand(5, 7, device=device) > 0.5
    axes = plots.show_images([photo, mask[None], mask], ["a", "b", "c"], title="all", columns=2)
    assert [ax.get_title() for ax in axes] == ["a", "b", "c"]
    torch.testing.assert_close(drawn(axes[0].images[0]), photo.permute(1, 2, 0).cpu())
    for ax in axes[1:]:
        torch.testing.assert_close(drawn(ax.images[0]), mask.float().cpu())
        assert ax.images[0].get_clim() == (0, 1)
    figure = axes[0].figure
    assert figure.get_suptitle() == "all"
    assert len(figure.axes) == 3  # the fourth place is empty
    assert len(plots.show_images(torch.rand(4, 3, 2, 2))) == 4


def test_overlay_draws_each_map_over_the_photograph_on_one_scale(device):
    image = torch.rand(3, 8, 12, device=device)
    maps = torch.rand(2, 2, 3, device=device)
    axes = plots.overlay(image, maps, ["a", "b"], opacity=0.4, mark=(1, 2), label="share")
    for ax, weights, title in zip(axes, maps, "ab", strict=True):
        photograph, over = ax.images
        torch.testing.assert_close(drawn(photograph), image.permute(1, 2, 0).cpu())
        torch.testing.assert_close(drawn(over), weights.cpu())
        assert photograph.get_extent() == over.get_extent() == [0, 12, 8, 0]
        assert over.get_alpha() == 0.4
        assert over.get_clim() == (0, pytest.approx(maps.max().item()))
        assert over.get_interpolation() == "nearest"
        assert over.get_cmap().name == "inferno"
        assert ax.get_title() == title
        box = ax.patches[0]
        assert (box.get_xy(), box.get_width(), box.get_height()) == ((8, 4), 4, 4)
    assert axes[0].figure.axes[-1].get_ylabel() == "share"


def test_overlay_of_signed_maps_has_white_zero():
    (ax,) = plots.overlay(
        torch.zeros(3, 4, 4), torch.tensor([[-3.0, 0], [1, 2]]), "signed", smooth=True
    )
    over = ax.images[1]
    assert over.get_clim() == (-3, 3)
    assert min(over.to_rgba(torch.zeros(1, 1))[0, 0]) > 0.95
    assert over.get_interpolation() == "bilinear"
    assert ax.get_title() == "signed"
    one, two = plots.overlay(torch.rand(2, 3, 4, 4), torch.rand(2, 2, 2), limits=(0, 5))
    assert one.images[1].get_clim() == two.images[1].get_clim() == (0, 5)
    assert not np.array_equal(one.images[0].get_array(), two.images[0].get_array())


def test_heatmap_shows_sums_and_numbers():
    matrix = torch.tensor([[0.1, 0.9], [0.25, 0.5], [0.0, 1.0]])
    ax = plots.heatmap(matrix, title="P", row_sums=True, column_sums=True, numbers=".2f")
    torch.testing.assert_close(drawn(ax.images[0]), matrix)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("key", "query")
    rows, columns = ax.child_axes
    assert [bar.get_width() for bar in rows.patches] == pytest.approx([1.0, 0.75, 1.0])
    assert [bar.get_height() for bar in columns.patches] == pytest.approx([0.35, 2.4])
    assert [text.get_text() for text in ax.texts] == [
        "0.10",
        "0.90",
        "0.25",
        "0.50",
        "0.00",
        "1.00",
    ]
    assert [text.get_color() for text in ax.texts[:2]] == ["white", "black"]
    assert columns.get_title() == "P"
    assert plots.heatmap(matrix, title="P").get_title() == "P"
    assert plots.heatmap(-matrix).images[0].get_clim() == (-1, 1)


def test_heatmap_draws_into_given_axes():
    ax = plt.figure().subplots()
    assert plots.heatmap(torch.eye(2), ax=ax) is ax
    assert plots.heatmap(torch.zeros(2, 2), xlabel="channel").get_xlabel() == "channel"


def test_matrix_grid_has_one_scale_and_titles():
    matrices = torch.rand(2, 3, 4, 5)
    axes = plots.matrix_grid(matrices, ["layer 0", "layer 1"], list("abc"), title="all")
    assert axes.shape == (2, 3)
    for ax, matrix in zip(axes.flat, matrices.flatten(0, 1), strict=True):
        torch.testing.assert_close(drawn(ax.images[0]), matrix)
        assert ax.images[0].get_clim() == (0, pytest.approx(matrices.max().item()))
    assert [ax.get_title() for ax in axes[0]] == list("abc")
    assert axes[1, 0].get_ylabel() == "layer 1\nquery"
    assert axes[1, 2].get_xlabel() == "key"


def test_curve_draws_means_and_bands():
    runs = torch.tensor([[1.0, 2.0, 4.0], [3.0, 4.0, 4.0]])
    ax = plots.curve(
        [1, 2, 4],
        {"one": [5, 6, 7], "runs": runs},
        xlabel="tokens",
        ylabel="s",
        title="t",
        log="xy",
    )
    one, mean = ax.lines
    assert one.get_ydata().tolist() == [5, 6, 7]
    assert mean.get_ydata().tolist() == [2, 3, 4]
    (band,) = ax.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.max() == pytest.approx(3 + 2**0.5)
    assert heights.min() == pytest.approx(2 - 2**0.5)
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("tokens", "s", "t")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["one", "runs"]
    assert one.get_marker() != mean.get_marker()  # told apart without colour too


def test_bars_show_mean_spread_and_every_seed():
    table = {"attention": [0.8, 0.9], "none": [0.3]}
    ax = plots.bars_with_spread(table, xlabel="accuracy", reference=("chance", 0.125))
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([0.85, 0.3])
    assert [text.get_text() for text in ax.get_yticklabels()] == ["attention", "none"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first row is the uppermost
    dots = [line.get_xdata().tolist() for line in ax.lines if line.get_marker() == "o"]
    assert dots == [[0.8, 0.9], [0.3]]
    segment = ax.collections[0].get_segments()[0][:, 0]
    assert segment.tolist() == pytest.approx([0.85 - 0.005**0.5, 0.85 + 0.005**0.5])
    (name,) = ax.texts
    assert (name.get_text(), name.xy) == ("chance", (0.125, 1))
    assert ax.get_xlabel() == "accuracy"


def test_bars_read_a_results_table():
    summary = {"mean": 0.85, "std": 0.07, "values": [0.8, 0.9]}
    rows = {"attention": {"accuracy": summary, "loss": summary}, "chance": {"loss": summary}}
    ax = plots.bars_with_spread({"rows": rows}, "accuracy")
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([0.85])
    assert ax.get_xlabel() == "accuracy"
    with pytest.raises(ValueError, match=r"metric='f1': expected one of \['accuracy', 'loss'\]"):
        plots.bars_with_spread({"rows": rows}, "f1")


IMAGE, MAP = torch.zeros(3, 4, 4), torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.show_images([]), r"images=\[\]: expected at least one"),
        (lambda: plots.show_images(IMAGE), r"images=\(3, 4, 4\): expected a list of images"),
        (lambda: plots.show_images([IMAGE], ["a", "b"]), r"titles=\['a', 'b'\]: expected 1 titles"),
        (lambda: plots.show_images([IMAGE[:2]]), r"images\[0\]=\(2, 4, 4\): expected the shape"),
        (lambda: plots.show_images([IMAGE - 1]), r"images\[0\]=\(-1.0, -1.0\): expected values in"),
        (lambda: plots.overlay(IMAGE, MAP[0]), r"maps=\(2,\): expected the shape \(rows, cols\)"),
        (lambda: plots.overlay(IMAGE, MAP / 0), r"maps=\[nan\]: expected finite values"),
        (lambda: plots.overlay(IMAGE, MAP, opacity=2), r"opacity=2: expected a number in \[0, 1\]"),
        (
            lambda: plots.overlay(IMAGE[None], MAP.expand(2, 2, 2)),
            r"image=\(1, 3, 4, 4\): expected",
        ),
        (lambda: plots.heatmap(IMAGE), r"matrix=\(3, 4, 4\): expected the shape \(queries, keys\)"),
        (
            lambda: plots.matrix_grid(IMAGE[None], ["a"], ["b"]),
            r"column_titles=\['b'\]: expected",
        ),
        (lambda: plots.curve([1], {}, xlabel="", ylabel="", log="z"), r"log='z': expected"),
        (
            lambda: plots.curve([1, 2], {"a": [1]}, xlabel="", ylabel=""),
            r"series\['a'\]=\(1,\): expected \(2,\) or \(runs, 2\) values",
        ),
        (lambda: plots.bars_with_spread({}, xlabel=""), r"table={}: expected at least one row"),
        (
            lambda: plots.bars_with_spread({"a": []}, xlabel=""),
            r"table\['a'\]=\[\]: expected at least",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
