"""The attention explorer in real Chromium: in exported HTML without a kernel, and in JupyterLab."""

from pathlib import Path

import nbformat
import pytest
import torch
from browser import TOKEN, ExplorerPage, chromium, jupyterlab, open_page, run_all
from matplotlib import colormaps

from attnlab.lab.widgets import AttentionExplorer

pytestmark = pytest.mark.needs("browser")
CHAPTER = Path(__file__).parents[1] / "chapters" / "01_attention.ipynb"
NOTEBOOKS = ["tiny", "chapter 01"] if CHAPTER.exists() else ["tiny"]

# Attention of 3 layers and 2 heads over 4×6 patches and a class token, and the cell that makes it.
SOURCE = """
import torch
from attnlab.lab.widgets import AttentionExplorer
generator = torch.Generator().manual_seed(0)
maps = [(3 * torch.randn(2, 25, 25, generator=generator)).softmax(-1) for _ in range(3)]
explorer = AttentionExplorer(torch.rand(3, 64, 96, generator=generator), maps, (4, 6))
explorer
"""


def made_up() -> AttentionExplorer:
    names = {}
    exec(SOURCE, names)
    return names["explorer"]


def tiny_notebook() -> nbformat.NotebookNode:
    explorer = made_up()
    bundle = {"text/html": explorer._repr_html_(), "text/plain": repr(explorer)}
    output = nbformat.v4.new_output("execute_result", bundle, execution_count=1)
    cell = nbformat.v4.new_code_cell(SOURCE, execution_count=1, outputs=[output])
    cell.metadata.tags = ["explorer"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Tiny"), cell])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    return notebook


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module", params=NOTEBOOKS)
def notebook(request, tmp_path_factory) -> Path:
    """A notebook with an explorer among its saved outputs, in a folder of its own."""
    path = tmp_path_factory.mktemp("notebook") / "notebook.ipynb"
    if request.param == "tiny":
        nbformat.write(tiny_notebook(), path)
    else:
        path.write_bytes(CHAPTER.read_bytes())
    return path


def export(notebook: Path) -> str:
    """The notebook's exported HTML, without the scripts that nbconvert itself fetches; its URL."""
    from nbconvert import HTMLExporter

    nothing = "data:text/javascript,"
    exporter = HTMLExporter(
        require_js_url=nothing, mathjax_url="data:,", widget_renderer_url=nothing
    )
    page = notebook.with_suffix(".html")
    page.write_text(exporter.from_filename(str(notebook))[0], encoding="utf-8")
    return page.as_uri()


def frame_in(page, selector: str = "iframe", timeout: float = 30) -> ExplorerPage:
    handle = page.wait_for_selector(selector, state="attached", timeout=1000 * timeout)
    return ExplorerPage(handle.content_frame())


def use(explorer: ExplorerPage) -> None:
    """Everything a reader can do changes the picture, and nothing else does."""
    frame = explorer.frame
    before = explorer.pixels()
    explorer.point(2)
    assert explorer.state("token") == "2"
    assert (over_2 := explorer.pixels()) != before
    explorer.point(5)
    assert explorer.state("token") == "5"
    assert explorer.pixels() not in (before, over_2)

    explorer.click(5)
    explorer.point(6)  # pinned: the pointer reads weights, the map stays
    assert (explorer.state("token"), explorer.state("hovered")) == ("5", "6")
    explorer.picture.press("ArrowRight")
    assert (explorer.state("token"), explorer.state("pinned")) == ("6", "true")
    explorer.picture.press("Escape")
    assert explorer.state("pinned") == "false"

    shown = [explorer.pixels()]
    for selector, choice in [("#layer", 0), ("#head", 1), ("#layer", 1)]:
        frame.select_option(selector, index=choice)
        assert explorer.pixels() not in shown
        shown.append(explorer.pixels())
    frame.get_by_text("is looked at by").click()
    assert explorer.state("received") == "true"
    assert explorer.pixels() not in shown
    assert "is looked at most by" in explorer.text("readout")
    fits = "document.documentElement.scrollHeight <= window.innerHeight"
    frame.wait_for_function(fits)


def test_explorer_works_in_exported_html(browser, notebook):
    with open_page(browser, export(notebook)) as page:
        use(frame_in(page, ".celltag_explorer iframe"))


def test_explorer_works_in_jupyterlab(browser, notebook, tmp_path):
    """Run All on an untrusted notebook: before, a line says what to do; after, it works."""
    url = f"lab/tree/{notebook.name}?token={TOKEN}"
    with (
        jupyterlab(notebook.parent, tmp_path) as address,
        open_page(browser, f"{address}/{url}", viewport={"width": 1200, "height": 900}) as page,
    ):
        page.wait_for_selector("text=An explorable figure belongs here", timeout=60_000)
        assert page.locator(".jp-OutputArea iframe").count() == 0
        run_all(page)
        use(frame_in(page, ".jp-OutputArea iframe[srcdoc]", timeout=300))


# What follows reads the numbers, and needs no notebook.


@pytest.fixture(scope="module")
def explorer() -> AttentionExplorer:
    return made_up()


@pytest.fixture
def saved(browser, explorer, tmp_path):
    explorer.save(tmp_path / "explorer.html")
    with open_page(browser, (tmp_path / "explorer.html").as_uri()) as page:
        yield ExplorerPage(page.main_frame)


@pytest.mark.parametrize("received", [False, True])
@pytest.mark.parametrize("head", [0, 1, "mean", "rollout"])
def test_page_shows_the_weights_that_python_has(saved, explorer, head, received):
    """Every token's strongest partner and its weight, for one layer, head and direction."""
    frame = saved.frame
    frame.select_option("#layer", index=1)
    labels = {"mean": "mean of heads", "rollout": "rollout to this layer"}
    frame.select_option("#head", label=labels.get(head, str(head)))
    frame.get_by_text("is looked at by" if received else "looks at", exact=True).click()
    for query in [(0, 0), (1, 2), (3, 5), 0]:
        token = query if isinstance(query, int) else 1 + 6 * query[0] + query[1]
        weights = explorer.weights(query, layer=1, head=head, received=received)
        saved.point(token)
        assert saved.state("token") == str(token)
        assert saved.state("strongest") == str(weights.argmax().item())
        drawn = torch.tensor(frame.evaluate("[...weights(state.layer, state.column).values]"))
        torch.testing.assert_close(drawn, weights, rtol=0.03, atol=1e-4)


def test_readouts_are_the_weights(saved, explorer):
    weights = explorer.weights((2, 3))
    row, col = divmod(weights.argmax().item() - 1, 6)
    most = "itself" if (row, col) == (2, 3) else f"row {row}, column {col}"
    saved.point(1 + 6 * 2 + 3)
    assert saved.text("readout") == f"Row 2, column 3 looks most at {most}"
    saved.click(1 + 6 * 2 + 3)
    saved.point(4)
    assert saved.text("readout") == f"Pinned: row 2, column 3 looks most at {most}"
    shown = saved.text("value")
    assert shown.startswith("Weight of row 0, column 3: ")
    value, ratio = shown.split(": ")[1].split(" times")[0].split(", ")
    assert float(value) == pytest.approx(weights[4].item(), rel=0.06)
    assert float(ratio) == pytest.approx(25 * weights[4].item(), rel=0.06)
    smallest, even = saved.text("range").removeprefix("smallest on a patch: ").split("; ")
    assert float(smallest) == pytest.approx(weights[1:].min().item(), rel=0.2)
    assert even == "mark: even share, 0.04"
    assert float(saved.text("low")) == 0
    assert float(saved.text("high")) == pytest.approx(weights[1:].max().item(), rel=0.06)


def test_colours_are_the_weights(browser, tmp_path):
    """At full opacity matplotlib's colours, from zero or stretched; at none the photograph."""
    weights = torch.linspace(1, 2, 24).expand(24, 24) / 36
    red = torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, 64, 96)
    AttentionExplorer(red, [weights[None]], (4, 6), prefix=0).save(tmp_path / "red.html")
    with open_page(browser, (tmp_path / "red.html").as_uri()) as page:
        saved = ExplorerPage(page.main_frame)
        saved.point(0)  # its outline lies over its colour
        others = range(1, 24)
        page.locator("#opacity").fill("1")
        for least in (0.5, 0):
            page.locator("#stretch").set_checked(least == 0)
            drawn = torch.tensor([saved.pixel(token) for token in others]) / 255
            expected = torch.tensor(colormaps["inferno"](torch.linspace(least, 1, 24).numpy()))
            torch.testing.assert_close(drawn, expected[1:, :3].float(), rtol=0, atol=0.06)
            assert float(saved.text("low")) == pytest.approx(0 if least else 1 / 36, rel=0.05)
        page.locator("#opacity").fill("0")
        assert [saved.pixel(token) for token in others] == [[255, 0, 0]] * 23


def test_keyboard_walks_over_patches_and_class_token(saved):
    saved.picture.focus()
    for key, token in [
        ("ArrowUp", 10), ("ArrowLeft", 9), ("ArrowDown", 15), ("ArrowRight", 16),
        *[("ArrowUp", 10), ("ArrowUp", 4), ("ArrowUp", 0), ("ArrowLeft", 0), ("ArrowUp", 0)],
        *[("ArrowDown", 1), ("ArrowLeft", 1), ("ArrowDown", 7), ("ArrowDown", 13)],
        *[("ArrowDown", 19), ("ArrowDown", 19)],
    ]:  # fmt: skip
        saved.picture.press(key)
        assert saved.state("token") == str(token), key
    for key, pinned in [("Enter", "true"), (" ", "false"), ("Enter", "true"), ("Escape", "false")]:
        saved.picture.press(key)
        assert saved.state("pinned") == pinned
    saved.frame.locator("#sheet").click(position={"x": 30, "y": 30})
    assert (saved.state("layer"), saved.state("column")) == ("0", "0")
    # Without a mouse: every control can be reached with Tab, and shows that it has the focus.
    saved.picture.focus()
    reached = []
    for _ in range(5):
        saved.frame.page.keyboard.press("Tab")
        reached.append(saved.frame.evaluate("document.activeElement.id || 'way'"))
    assert reached == ["layer", "head", "way", "opacity", "stretch"]
    saved.picture.press("ArrowUp")
    assert saved.frame.evaluate("getComputedStyle(picture).outlineStyle") == "solid"


def test_signed_weights_have_white_zero(browser, tmp_path):
    maps = torch.zeros(1, 4, 4)
    maps[0, 2] = torch.tensor([-1.0, 0.0, 0.5, 1.0])
    explorer = AttentionExplorer(torch.zeros(3, 8, 8), [maps], (2, 2), prefix=0)
    explorer.save(tmp_path / "signed.html")
    with open_page(browser, (tmp_path / "signed.html").as_uri()) as page:
        saved = ExplorerPage(page.main_frame)
        page.locator("#opacity").fill("1")
        saved.point(2)
        assert [saved.pixel(token) for token in (0, 1, 3)] == [
            [5, 48, 97], [255, 255, 255], [103, 0, 31],
        ]  # fmt: skip
        assert (saved.text("low"), saved.text("high")) == ("-1", "1")
        assert "rollout" not in page.locator("#head").inner_text()


@pytest.mark.parametrize("width", [400, 1200])
def test_frame_fits_its_content_and_the_notebooks_theme(browser, explorer, tmp_path, width):
    page_with_frame = tmp_path / "frame.html"
    page_with_frame.write_text(f"<body data-jp-theme-light=true>{explorer._repr_html_()}")
    viewport = {"width": width, "height": 700}
    with open_page(browser, page_with_frame.as_uri(), viewport=viewport) as page:
        frame = frame_in(page).frame
        frame.wait_for_function("document.documentElement.scrollHeight <= innerHeight")
        assert frame.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        light = frame.evaluate("getComputedStyle(app).color")
        page.evaluate("document.body.dataset.jpThemeLight = 'false'")
        frame.wait_for_selector("[data-theme=dark]")
        assert frame.evaluate("getComputedStyle(app).color") != light
