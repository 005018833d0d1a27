"""The site: complete, without another machine, searchable, explorable, and open to everybody."""

import functools
import http.server
import importlib
import json
import re
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

BeautifulSoup = pytest.importorskip("bs4").BeautifulSoup
for package in ("sphinx", "myst_nb", "furo", "sphinx_revealjs"):
    pytest.importorskip(package)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
make_site = importlib.import_module("make_site")

CHAPTERS = [path.stem for path in make_site.chapters()]
GLOSSARY = ROOT / "docs" / "site" / "glossary.md"
PHONE = {"width": 390, "height": 844}
needs_browser = pytest.mark.needs("browser")
DARK = ("index", "glossary", "results", "chapters/01_attention", "api/attnlab.attention")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    make_site.make_site(folder / "site", folder / "work")
    return folder / "site"


@pytest.fixture(scope="module")
def pages(site) -> dict:
    """Every page that Sphinx made, by its name."""
    found = [p for p in site.rglob("*.html") if "slides" not in p.relative_to(site).parts]
    return {
        path.relative_to(site).with_suffix("").as_posix(): BeautifulSoup(
            path.read_text("utf-8"), "html.parser"
        )
        for path in sorted(found)
    }


@pytest.fixture(scope="module")
def browser():
    from browser import chromium

    with chromium() as browser:
        yield browser


# The parts


def test_tables_of_any_json():
    content = {
        "speedup": 4.4342,
        "shape": [8, 14, 52518912],
        "over_timm": {"SE": [0.99, 1.0], "SK": [0.5, 2.0]},
        "forward": {"ours": {"time": 1.25, "bytes": 123456}, "theirs": {"time": 2, "bytes": 7}},
    }
    assert make_site.tables(content, 3) == (
        "|  | value |\n| --- | ---: |\n| speedup | 4.43 |\n| shape | 8, 14, 52,518,912 |\n\n"
        "### over timm\n\n|  | value |\n| --- | ---: |\n| SE | 0.99, 1 |\n| SK | 0.5, 2 |\n\n"
        "### forward\n\n|  | time | bytes |\n| --- | ---: | ---: |\n"
        "| ours | 1.25 | 123,456 |\n| theirs | 2 | 7 |"
    )


@pytest.mark.parametrize(("cell", "shown"), [
    ({"mean": 0.12345, "std": 0.0456}, "0.123 ± 0.046"), ({"mean": 2.5, "std": None}, "2.5"),
    ({"mean": 13633.0, "std": 0.0}, "13,633 ± 0"), ({"mean": 1500, "std": 123.4}, "1,500 ± 123"),
    ({"mean": None, "std": None}, "–"), (None, "–"),
])  # fmt: skip
def test_a_cell_of_a_table_of_several_seeds(cell, shown):
    assert make_site.spread(cell) == shown


def test_the_course_is_read_from_the_chapters_readme():
    course = make_site.course()
    assert [*course] == [f"{number:02d}" for number in range(len(course))]
    assert [c["stem"] for c in course.values() if c["stem"]] == CHAPTERS
    for number, chapter in course.items():
        assert all(need < number for need in chapter["needs"]), "a chapter needs earlier ones only"
    assert make_site.ancestors("02", course) == {"00", "01"}


def test_the_map_draws_every_chapter_and_no_detour():
    course = {"00": [], "01": ["00"], "02": ["00", "01"], "03": ["01"], "04": ["02", "03"]}
    course = {n: {"title": f"T{n}: x", "stem": None if n == "04" else f"{n}_t", "needs": needs}
              for n, needs in course.items()}  # fmt: skip
    drawn = BeautifulSoup(make_site.course_map(course), "html.parser")
    assert [a["href"] for a in drawn.find_all("a")] == [f"chapters/{n}_t.html" for n in
                                                        ("00", "01", "02", "03")]  # fmt: skip
    assert len(drawn.select("path[marker-end]")) == 5  # 02 needs 00, but through 01
    assert len(drawn.select(".planned")) == 1
    width, height = map(int, drawn.svg["viewbox"].split()[2:])
    for circle in drawn.find_all("circle"):
        assert 20 <= float(circle["cx"]) <= width - 20
        assert 20 <= float(circle["cy"]) <= height - 20


def glossary() -> list[list[str]]:
    rows = [line.split("|")[1:-1] for line in GLOSSARY.read_text("utf-8").splitlines()
            if line.startswith("| ")]  # fmt: skip
    return [[cell.strip() for cell in row] for row in rows[1:]]


def test_the_glossary_is_in_order_and_in_two_languages():
    rows = glossary()
    terms = [row[0] for row in rows]
    assert terms == sorted(set(terms), key=str.lower)
    assert len(rows) >= 60
    for term, chinese, _symbol, chapter, meaning in rows:
        assert chinese == "Transformer" or re.search(r"[\u4e00-\u9fff]", chinese), term
        assert chapter in make_site.course(), term
        assert meaning, term


@pytest.mark.parametrize("stem", CHAPTERS)
def test_the_terms_of_a_chapter_occur_in_it(stem):
    text = (ROOT / "chapters" / "source" / f"{stem}.py").read_text("utf-8").lower()
    for term, _chinese, _symbol, chapter, _meaning in glossary():
        if chapter == stem[:2]:
            words = re.findall(r"[a-z]{3,}", term.lower().replace("-", " "))
            assert any(word[:6] in text for word in words), term


def test_the_reference_leaves_out_solutions_and_experiments():
    names = [str(p.relative_to(ROOT)) for paths in make_site.modules().values() for p in paths]
    assert "attnlab/attention.py" in names
    assert "attnlab/lab/plots.py" in names
    assert not [name for name in names if "exercises" in name or "experiments" in name]


# What was built


def test_every_chapter_module_and_table_has_its_place(pages, site):
    for stem in CHAPTERS:
        assert f"chapters/{stem}" in pages
        assert (site / "slides" / f"{stem}.html").is_file()
        assert pages["index"].select(f'a[href="chapters/{stem}.html"]')
        assert pages[f"chapters/{stem}"].select(f'a[href="../slides/{stem}.html"]')
    shown = pages["results"].get_text()
    for path in ROOT.glob("results/*.json"):
        assert path.stem in shown
    shown = pages["benchmarks"].get_text()
    for path in ROOT.glob("benchmarks/results/*.json"):
        assert path.stem in shown
    attention = pages["api/attnlab.attention"]
    for name in ("attention_weights", "MultiHeadAttention", "VisionTransformer"):
        assert attention.find(id=f"attnlab.attention.{name}"), name
    described = attention.find(id="attnlab.attention.attention_weights").parent.get_text()
    assert "Every row sums to 1" in described
    assert "Raises" in described


@pytest.mark.parametrize("path", make_site.chapters(), ids=lambda path: path.stem)
def test_a_table_that_code_made_is_a_table(path, pages):
    outputs = [output for cell in make_site.read(path).cells for output in cell.get("outputs", [])]
    made = ["".join(o.get("data", {}).get("text/markdown", "")) for o in outputs]
    shown = pages[f"chapters/{path.stem}"].select(".cell_output table:has(th)")
    assert len(shown) >= sum("| ---" in text for text in made)


def test_nothing_comes_from_another_machine(pages, site):
    for name, page in pages.items():
        for tag in page.find_all(["script", "link", "img", "iframe", "source"]):
            address = tag.get("src") or (tag.get("href") if tag.name == "link" else None) or ""
            assert not urlsplit(address).netloc, f"{name}: {address}"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?https?:|@import", style.read_text("utf-8")), style


def test_every_link_within_the_site_leads_somewhere(pages, site):
    ids = {name: {tag["id"] for tag in page.find_all(id=True)} for name, page in pages.items()}
    for name, page in pages.items():
        for link in page.find_all("a", href=True):
            address = urlsplit(link["href"])
            if address.scheme or address.netloc:
                continue
            target = (site / name).parent / unquote(address.path) if address.path else site / name
            target = target.resolve().relative_to(site.resolve()).as_posix()
            known = target.removesuffix(".html")
            assert known in ids or (site / target).is_file(), f"{name}: {link['href']}"
            if address.fragment and known in ids:
                assert unquote(address.fragment) in ids[known] | {""}, f"{name}: {link['href']}"


def test_every_picture_has_alternative_text(pages):
    pictures = [(name, tag) for name, page in pages.items() for tag in page.find_all("img")]
    assert len(pictures) > 50
    for name, tag in pictures:
        assert tag.get("alt", "").strip(), name
        assert not re.fullmatch(r".*\.(png|svg|webp)", tag["alt"]), name  # Sphinx's default
    for name, page in pages.items():
        for frame in page.find_all("iframe"):
            assert frame.get("title", "").strip(), name


# In a browser


@pytest.fixture(scope="module")
def served(site):
    """The site from a web server on this machine."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@contextmanager
def visit(browser, url: str, **options):
    """A page once its formulas are set; a busy machine takes its time."""
    from browser import open_page

    with open_page(browser, "about:blank", **options) as page:
        page.set_default_timeout(300_000)
        failed = []
        page.on("requestfailed", lambda request: failed.append(request.url[:200]))
        page.goto(url)
        page.wait_for_function("!window.MathJax || MathJax.startup.promise.then(() => true)")
        yield page
        assert not failed


def violations(page) -> list[str]:
    """axe-core's serious and critical findings, in the frames too."""
    axe = importlib.import_module("axe_playwright_python.sync_playwright").Axe()
    for frame in page.frames[1:]:
        frame.evaluate(axe.axe_script)
    found = axe.run(page).response["violations"]
    return [
        f"{v['id']} ({v['impact']}): {v['nodes'][0]['html'][:160]} and {len(v['nodes']) - 1} more"
        for v in found
        if v["impact"] in ("serious", "critical")
    ]


@needs_browser
def test_every_page_opens_without_an_error_to_everybody_and_on_a_phone(browser, served, pages):
    pytest.importorskip("axe_playwright_python")
    problems = {}
    for name in pages:
        with visit(browser, f"{served}/{name}.html") as page:
            found = violations(page)
            page.set_viewport_size(PHONE)
            width = page.evaluate("document.documentElement.scrollWidth")
            if width > PHONE["width"]:
                found.append(f"{width} pixels wide on a phone")
        if found:
            problems[name] = found
    assert not problems, json.dumps(problems, indent=1)


@needs_browser
@pytest.mark.parametrize("name", DARK)
def test_dark_pages_can_be_read(browser, served, name):
    pytest.importorskip("axe_playwright_python")
    with visit(browser, f"{served}/{name}.html", color_scheme="dark") as page:
        assert page.evaluate("document.body.dataset.jpThemeLight") == "false"
        red, green, blue = page.evaluate(
            "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
        )[:3]
        assert max(red, green, blue) < 60
        assert not violations(page)


@needs_browser
@pytest.mark.parametrize("how", ["served", "a folder"])
@pytest.mark.parametrize(("words", "expected"), [
    ("reversed attention", "09_dependencyvit"), ("superpixel", "10_spformer"),
    ("注意力", "glossary"),
])  # fmt: skip
def test_the_search_finds_it(browser, site, served, how, words, expected):
    start = served if how == "served" else site.as_uri()
    with visit(browser, f"{start}/index.html") as page:
        page.get_by_placeholder("Search").first.fill(words)
        page.keyboard.press("Enter")
        page.wait_for_selector("#search-results ul.search li a")
        page.wait_for_function("document.querySelector('.search-summary')?.textContent.length > 10")
        links = page.eval_on_selector_all("ul.search li a", "links => links.map((a) => a.href)")
        assert any(expected in link for link in links), links
        if how == "served":
            page.wait_for_selector("ul.search li p.context")


@needs_browser
def test_the_chinese_terms_are_marked_as_chinese(browser, site):
    with visit(browser, (site / "glossary.html").as_uri()) as page:
        marked = page.eval_on_selector_all(
            "[lang=zh-Hans]", "cells => cells.map((c) => c.innerText)"
        )
    assert marked == [chinese for _term, chinese, *_ in glossary()]


@needs_browser
@pytest.mark.parametrize("name", DARK)
def test_pages_open_from_a_folder(browser, site, name):
    with visit(browser, (site / f"{name}.html").as_uri()) as page:
        assert page.locator("h1").first.inner_text()
        assert page.evaluate("getComputedStyle(document.querySelector('.sidebar-drawer')).width")


@needs_browser
def test_an_explorer_reacts_and_follows_the_theme(browser, site):
    from browser import ExplorerPage

    url = (site / "chapters" / "01_attention.html").as_uri()
    with visit(browser, url, color_scheme="light") as page:
        frame = page.wait_for_selector("iframe", state="attached").content_frame()
        explorer = ExplorerPage(frame)
        explorer.point(5)
        before = explorer.pixels()
        explorer.point(20)
        assert explorer.state("token") == "20"
        assert explorer.pixels() != before
        assert frame.get_attribute("html", "data-theme") == "light"
        for _ in range(3):  # Furo's button goes round: as the system, light, dark
            page.locator(".theme-toggle:visible").first.click()
            if page.evaluate("document.body.dataset.theme") == "dark":
                break
        frame.wait_for_selector("html[data-theme=dark]", state="attached")
