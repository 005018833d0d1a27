"""The lectures: every cell dealt out, nothing over an edge, readable, without network."""

import importlib
import re
import sys
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

pytest.importorskip("nbconvert")
pytest.importorskip("sphinx_revealjs")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
static = importlib.import_module("static_notebook")
slides = importlib.import_module("make_slides")

SMALLEST = 16  # pixels of 720
needs_browser = pytest.mark.needs("browser")
every_chapter = pytest.mark.parametrize("path", static.chapters(), ids=lambda path: path.stem)

# Each slide: its number, its content's size, its text, and the smallest print on it.
MEASURE = """() => [...document.querySelectorAll(".slides > section > section")].map((slide, i) => {
  document.querySelector(".reveal").classList.add("measuring"); // all slides have a size
  const box = slide.getBoundingClientRect();
  const scale = box.width / 1280;
  let [right, bottom, smallest] = [0, 0, Infinity];
  for (const part of slide.querySelectorAll(":scope > :not(.notes), :scope > :not(.notes) *")) {
    if (part.closest("mjx-container") && !part.matches("mjx-container")) continue;
    const place = part.getBoundingClientRect();
    right = Math.max(right, (place.right - box.left) / scale);
    bottom = Math.max(bottom, (place.bottom - box.top) / scale);
    const prints = [...part.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (prints) smallest = Math.min(smallest, parseFloat(getComputedStyle(part).fontSize));
  }
  const things = slide.querySelectorAll(":scope > :not(.notes, .continued)").length;
  const headed = slide.querySelector("h1, h2, h3, h4, .continued") !== null;
  // Of a table that goes on here: its rows, and in every case those of the slide's last table.
  const goesOn = ":scope > .continued + table, :scope > .continued + * > table";
  const left = slide.querySelector(goesOn)?.tBodies[0].rows.length;
  const rows = [...slide.querySelectorAll("table")].at(-1)?.tBodies[0].rows.length;
  const text = slide.textContent.slice(0, 60);
  return { i, right, bottom, smallest, things, headed, left, rows, text };
})"""


@pytest.fixture(scope="module")
def lectures(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("slides")
    slides.make_slides(out)
    return out


@pytest.fixture(scope="module")
def browser():
    from browser import chromium

    with chromium() as browser:
        yield browser


@contextmanager
def opened(browser, path: Path):
    """The lecture once it is dealt out; a busy machine takes its time."""
    from browser import open_page

    with open_page(browser, "about:blank", viewport={"width": 1280, "height": 720}) as page:
        page.set_default_timeout(300_000)
        failed = []
        page.on("requestfailed", lambda request: failed.append(request.url[:200]))
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-ready]")
        yield page
        assert not failed


# What is left of a notebook


def test_a_widget_becomes_a_line_and_what_it_held():
    slider = NotebookNode(model_name="FloatSliderModel", state={"description": "γ", "value": 0.5})
    menu = {"description": "photo", "_options_labels": ["cat", "cup"], "index": 1}
    held = {"output_type": "display_data", "data": {"image/png": "abc"}, "metadata": {}}
    bar = {"children": ["IPY_MODEL_left", "IPY_MODEL_middle", "IPY_MODEL_right"]}
    widgets = nbformat.from_dict({
        "slider": slider,
        "menu": {"model_name": "DropdownModel", "state": menu},
        "shown": {"model_name": "OutputModel", "state": {"outputs": [held]}},
        "bar": {"model_name": "HBoxModel", "state": bar},
        "left": {"state": {"value": "training:\u2007100%"}},
        "middle": {"state": {"value": 40.0}},
        "right": {"state": {"value": "\u200740/40\u2007[00:02&lt;00:00, 20it/s, loss 1.2]"}},
    })  # fmt: skip

    def still(name: str) -> NotebookNode:
        output = {"output_type": "display_data", "metadata": {}}
        output["data"] = {static.WIDGET_VIEW: {"model_id": name}}
        (result,) = static.stills(nbformat.from_dict(output), widgets)
        return result

    assert still("slider").text == "γ = 0.5 (a control when the notebook runs)\n"
    assert still("menu").text.startswith("photo = cup ")
    assert still("shown") == held
    assert " ".join(still("bar").text.split()) == "training: 100% 40/40"


@pytest.mark.parametrize(("source", "expected"), [
    ('plots.overlay(photo, seen, "what it sees", label="seen")', "what it sees"),
    ('plots.show_images(x, [f"layer {l}", "all"], title="who is there")', "all; who is there"),
    ('ax.set(title="a", xlabel="b")\nfigure.suptitle("c")', "a; c"),
    ('titles = ["left", "right"]\nplots.show_images(x, titles)', "left; right"),
    ('plots.curve(x, y, xlabel="step", ylabel="loss")', "loss against step"),
    ("draw(x)", "See the edge."),
])  # fmt: skip
def test_alternative_text_is_what_the_figure_says_or_the_sentence_before(source, expected):
    words = static.alt_text(source, "1 · **See** it", "See the `edge`.")
    head, shown = words.split(": ", 1)
    assert head == "Figure in “1 · See it”"
    assert sorted(shown.split("; ")) == sorted(expected.split("; "))


def test_the_last_sentence_is_prose():
    text = "## Head\n\nOne. Two is\nlong.\n\n| a | b |\n|---|---|\n\n```python\nx\n```"
    assert static.last_sentence(text) == "Two is long."
    assert static.last_sentence("## Head") == ""


@every_chapter
def test_every_picture_of_a_chapter_gets_a_text_of_its_own_words(path):
    notebook = static.read(path)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert static.WIDGET_VIEW not in output.get("data", {})
            for kind in set(static.PICTURES) & set(output.get("data", {})):
                alt = output.metadata[kind]["alt"]
                assert alt == cell.metadata.mystnb["image"]["alt"]
                assert len(alt.split("”: ")[1]) >= 3, alt


def test_an_unknown_chapter_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="no chapter begins with"):
        slides.make_slides(tmp_path, ["99"])


def test_a_missing_package_is_named():
    with pytest.raises(SystemExit, match="no_such_package is not installed"):
        static.vendored("no_such_package", "file.js")


# The lectures


def test_lectures_are_complete_and_name_no_other_machine(lectures):
    stems = [path.stem for path in static.chapters()]
    assert sorted(p.stem for p in lectures.glob("*.html")) == sorted([*stems, "index"])
    index = (lectures / "index.html").read_text("utf-8")
    for stem in stems:
        assert f'href="{stem}.html"' in index
        page = (lectures / f"{stem}.html").read_text("utf-8")
        assert not re.search(r"""<(script|link|img|iframe)\b[^>]*\b(src|href)=["']?https?:""", page)
        images = re.findall(r"<img\b[^>]*>", page)
        assert all(re.search(r'alt="Figure in [^"]+"', image) for image in images)


@needs_browser
@every_chapter
def test_no_slide_overflows_and_all_is_readable(lectures, browser, path):
    with opened(browser, lectures / f"{path.stem}.html") as page:
        measured = page.evaluate(MEASURE)
        notes = page.locator("aside.notes").count()
    cells = static.read(path).cells
    kinds = [cell.metadata.get("slideshow", {}).get("slide_type") for cell in cells]
    assert len(measured) >= kinds.count("slide") + kinds.count("subslide")
    assert notes == kinds.count("notes")
    over = [s for s in measured if s["right"] > 1280.5 or s["bottom"] > 720.5]
    assert not over, over
    small = [s for s in measured if s["smallest"] and s["smallest"] < SMALLEST]
    assert not small, small
    assert not [s for s in measured if s["things"] == 0]
    assert not [s for s in measured if not s["headed"]]
    for one, other in pairwise(measured):  # what is left of a table is more than a row
        assert not (other.get("left") == 1 and (one.get("rows") or 0) > 3), other


@needs_browser
def test_a_lecture_shows_one_thing_after_the_other_and_its_explorer_reacts(lectures, browser):
    from browser import ExplorerPage

    with opened(browser, lectures / "01_attention.html") as page:
        shown = page.locator("section.present > section.present")
        assert shown.locator("h1").inner_text().startswith("01")
        page.keyboard.press("Space")
        assert shown.locator("h2").inner_text() == "1 · The failure"
        assert page.evaluate("document.querySelectorAll('mjx-container svg').length") > 10
        place = page.evaluate("""() => {
          const indices = Reveal.getIndices(document.querySelector("iframe").closest("section"));
          Reveal.slide(indices.h, indices.v, 99);
          return indices;
        }""")
        assert place["h"] > 0
        frame = page.wait_for_selector("section.present iframe[srcdoc]").content_frame()
        explorer = ExplorerPage(frame)
        explorer.point(5)
        assert explorer.state("token") == "5"
        explorer.point(20)
        assert explorer.state("token") == "20"
