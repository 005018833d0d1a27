"""The tree explorer: data, page, errors, and what a reader sees and does in real Chromium."""

import json
from dataclasses import replace

import matplotlib
import pytest
import torch

from attnlab.dependency_trees import DependencyTree
from attnlab.dependencyvit import dependencyvit_mini
from attnlab.lab.tree_explorer import TreeExplorer, default_trees

matplotlib.use("Agg")
IMAGE = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def trace():
    torch.manual_seed(0)
    model = dependencyvit_mini(embed_dim=32, num_heads=4, depth=3).eval()
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.5)
    return model.trace(IMAGE[None])


@pytest.fixture(scope="module")
def explorer(trace):
    return TreeExplorer(IMAGE, trace)


def data_in(page: str) -> dict:
    start = page.index('id="data">') + len('id="data">')
    return json.loads(page[start : page.index("</script>", start)])


def test_the_page_holds_trees_and_messages(explorer, trace):
    assert repr(explorer) == "TreeExplorer(5 trees, 3 layers, 8×8 patches)"
    data = data_in(explorer.html)
    assert data["grid"] == [8, 8]
    for shown, (name, tree) in zip(data["trees"], default_trees(trace).items(), strict=True):
        assert shown["name"] == name
        assert shown["parents"] == tree.parents.tolist()
        torch.testing.assert_close(torch.tensor(shown["scores"]), tree.scores, rtol=0, atol=1e-4)
    found = torch.tensor(data["messages"])
    torch.testing.assert_close(found, trace.messages[:, 0], rtol=0, atol=1e-4)
    assert len(explorer._repr_html_().encode()) < 100_000
    for address in ("http:", "https:", "@import", "url("):
        assert address not in explorer.html.replace("data:image", "")


def test_it_is_the_same_page_every_time(explorer, trace, tmp_path):
    assert TreeExplorer(IMAGE, trace)._repr_html_() == explorer._repr_html_()
    explorer.save(tmp_path / "tree.html")
    assert (tmp_path / "tree.html").read_text("utf-8") == explorer.html


def test_figure_marks_path_and_subtree(explorer):
    name, tree = next(iter(explorer.trees.items()))
    token = int(tree.depth.argmax())
    ax = explorer.figure(divmod(token, 8))
    assert ax.get_title() == name
    blue = [
        line for line in ax.lines if line.get_color() == "#3fd8ff" and len(line.get_xdata()) > 1
    ]
    assert len(blue) == int(tree.depth[token])


def test_errors(trace, explorer):
    two = replace(trace, messages=trace.messages.expand(-1, 2, -1))
    circle = DependencyTree(torch.arange(64).roll(1), torch.ones(64))
    for build, message in [
        (lambda: TreeExplorer(IMAGE[0], trace), r"image \(64, 64\): expected \(3, H, W\)"),
        (lambda: TreeExplorer(IMAGE, two), "trace of 2 images and 0 prefix tokens"),
        (lambda: TreeExplorer(IMAGE, trace, {"a": circle}), r"trees\['a'\] \(64,\): expected a tr"),
        (lambda: TreeExplorer(IMAGE, trace, {}), "trees is empty"),
        (lambda: TreeExplorer(IMAGE, trace, max_bytes=10), "5 trees would take .* max_bytes=10"),
        (lambda: explorer.figure((8, 0)), r"patch=\(8, 0\): expected \(row, column\) within 8×8"),
        (lambda: explorer.figure(tree="b"), "tree='b': expected one of sum of layers"),
    ]:
        with pytest.raises(ValueError, match=message):
            build()


@pytest.fixture
def saved(explorer, tmp_path):
    browser = pytest.importorskip("browser")
    explorer.save(tmp_path / "tree.html")
    with (
        browser.chromium() as chromium,
        browser.open_page(chromium, (tmp_path / "tree.html").as_uri()) as page,
    ):
        page.wait_for_selector("#app[data-token]", state="attached")
        yield page


@pytest.mark.needs("browser")
def test_a_reader_walks_through_the_trees(saved, explorer):
    """Path, subtree and messages are those of Python, for the mouse and for the keyboard."""

    def state(name: str) -> str:
        return saved.get_attribute("#app", f"data-{name}")

    pixels = "picture.toDataURL()"
    box = saved.locator("#picture").bounding_box()
    for index, (_, tree) in enumerate(explorer.trees.items()):
        saved.select_option("#tree", index=index)
        for token in (0, 27, 63):
            row, col = divmod(token, 8)
            saved.mouse.move(
                box["x"] + (col + 0.5) * box["width"] / 8,
                box["y"] + (row + 0.5) * box["height"] / 8,
            )
            assert state("token") == str(token)
            assert state("depth") == str(len(tree.path(token)) - 1)
            assert state("below") == str(len(tree.subtree(token)))
    before = saved.evaluate(pixels)
    saved.mouse.down()
    saved.mouse.up()
    assert state("pinned") == "true"
    saved.locator("#picture").press("ArrowLeft")
    assert state("token") == "62"
    assert saved.evaluate(pixels) != before
    saved.locator("#picture").press("Escape")
    assert state("pinned") == "false"
    shown = [float(m) for m in saved.inner_text("#range").removeprefix("messages: ").split(", ")]
    assert shown == pytest.approx(explorer.messages[:, 62].tolist(), rel=0.1)
    before = saved.evaluate(pixels)
    saved.locator("#sheet").click(position={"x": 20, "y": 20})
    assert state("layer") == "0"
    assert saved.evaluate(pixels) != before
