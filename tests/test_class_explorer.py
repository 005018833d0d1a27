"""The class explorer: data, page, colors, errors, and what a reader sees in real Chromium."""

import json

import matplotlib
import pytest
import torch
from torch.testing import assert_close

from attnlab.lab.class_explorer import CLASS_COLORS, ClassExplorer, color_by_class, map_shares

matplotlib.use("Agg")
GENERATOR = torch.Generator().manual_seed(0)
IMAGE = torch.rand(3, 64, 64, generator=GENERATOR)
MAPS = torch.rand(3, 48, generator=GENERATOR).mul(4).softmax(-1).view(3, 8, 6)
NAMES = ("cat", "dog", "<b>")
SCORES = torch.tensor([0.2, 0.9, 0.6])
MASKS = torch.zeros(3, 64, 48)
MASKS[1, :32], MASKS[2, 32:] = 1, 1  # no cat


@pytest.fixture(scope="module")
def explorer():
    return ClassExplorer(IMAGE, MAPS, NAMES, SCORES, MASKS)


def data_in(page: str) -> dict:
    start = page.index('id="data">') + len('id="data">')
    return json.loads(page[start : page.index("</script>", start)])


def test_the_page_holds_names_scores_and_shares(explorer):
    assert repr(explorer) == "ClassExplorer(3 classes, 8×6 places)"
    data = data_in(explorer.html)
    assert data["grid"] == [8, 6]
    assert [entry["name"] for entry in data["classes"]] == list(NAMES)
    assert [entry["score"] for entry in data["classes"]] == pytest.approx(SCORES.tolist())
    upper = MAPS[1, :4].sum().item()
    assert data["classes"][1]["shares"] == pytest.approx([upper, 1 - upper], abs=1e-4)
    assert data["classes"][0]["shares"] == pytest.approx([0, 1], abs=1e-4)
    assert len(explorer._repr_html_().encode()) < 60_000
    for address in ("http:", "https:", "@import", "url("):
        assert address not in explorer.html.replace("data:image", "")


def test_it_is_the_same_page_every_time(explorer, tmp_path):
    assert ClassExplorer(IMAGE, MAPS, NAMES, SCORES, MASKS)._repr_html_() == explorer._repr_html_()
    explorer.save(tmp_path / "classes.html")
    assert (tmp_path / "classes.html").read_text("utf-8") == explorer.html


def test_without_masks_there_are_no_shares():
    data = data_in(ClassExplorer(IMAGE, MAPS, NAMES, SCORES).html)
    assert [entry["shares"] for entry in data["classes"]] == [None] * 3


def test_the_figure_is_of_the_highest_score(explorer):
    assert explorer.figure().get_title() == "dog, score 0.90"
    assert explorer.figure("cat").get_title() == "cat, score 0.20"


def test_shares_of_disjoint_masks_that_cover_everything_sum_to_one():
    shares = map_shares(MAPS, MASKS)
    assert_close(shares.sum(1), torch.ones(3))
    assert_close(map_shares(5 * MAPS, MASKS), shares)


def test_each_place_gets_the_color_of_the_strongest_claim():
    maps = torch.zeros(2, 4, 4)
    maps[0, :, :2], maps[1, :, 2:] = 0.1, 0.3
    image = torch.full((3, 16, 16), 0.5)
    painted = color_by_class(image, maps, torch.tensor([0.9, 0.6]), opacity=1.0)
    for corner, name, score in ((0, CLASS_COLORS[0], 0.9), (15, CLASS_COLORS[1], 0.6)):
        color = torch.tensor([int(name[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        assert_close(painted[:, 0, corner], (1 - score) * image[:, 0, 0] + score * color)
    unsure = color_by_class(image, maps, torch.tensor([0.9, 0.2]), opacity=1.0)
    assert_close(unsure[:, :, 12:], image[:, :, 12:])


def test_errors(explorer):
    for run, message in [
        (lambda: ClassExplorer(IMAGE[0], MAPS, NAMES, SCORES), r"image.*\(64, 64\)"),
        (lambda: ClassExplorer(2 * IMAGE, MAPS, NAMES, SCORES), r"image.*outside \[0, 1\]"),
        (lambda: ClassExplorer(IMAGE, MAPS[0], NAMES, SCORES), r"maps.*\(8, 6\)"),
        (lambda: ClassExplorer(IMAGE, -MAPS, NAMES, SCORES), "maps.*a negative"),
        (lambda: ClassExplorer(IMAGE, MAPS, NAMES[:2], SCORES), "names.*3 names"),
        (lambda: ClassExplorer(IMAGE, MAPS, NAMES, SCORES[:2]), r"scores.*\(2,\)"),
        (lambda: ClassExplorer(IMAGE, MAPS, NAMES, 2 * SCORES), r"scores.*outside \[0, 1\]"),
        (lambda: ClassExplorer(IMAGE, MAPS, NAMES, SCORES, MASKS[:2]), r"masks.*\(2, 64, 48\)"),
        (lambda: ClassExplorer(IMAGE, MAPS, NAMES, SCORES, max_bytes=10), "3 classes would take"),
        (lambda: explorer.figure("cow"), "name.*cow"),
        (lambda: color_by_class(IMAGE, MAPS, SCORES, least=2), "least"),
    ]:
        with pytest.raises(ValueError, match=message):
            run()


@pytest.fixture
def saved(explorer, tmp_path):
    browser = pytest.importorskip("browser")
    explorer.save(tmp_path / "classes.html")
    with (
        browser.chromium() as chromium,
        browser.open_page(chromium, (tmp_path / "classes.html").as_uri()) as page,
    ):
        page.wait_for_selector("#app[data-shown]", state="attached")
        yield page


@pytest.mark.needs("browser")
def test_a_reader_chooses_a_class_and_reads_a_weight(saved):
    def state(name: str) -> str:
        return saved.get_attribute("#app", f"data-{name}")

    def point_at(row: int, col: int) -> None:
        box = saved.locator("#picture").bounding_box()
        saved.mouse.move(
            box["x"] + (col + 0.5) * box["width"] / 6, box["y"] + (row + 0.5) * box["height"] / 8
        )

    pixels = "picture.toDataURL()"
    assert state("shown") == "1"  # the highest score
    first = saved.evaluate(pixels)
    saved.locator("#choices input").nth(2).check()
    assert state("shown") == "2"
    assert saved.evaluate(pixels) != first
    assert saved.locator("#choices label").nth(2).inner_text() == "<b> 0.6"
    for row, col in ((0, 0), (7, 5), (3, 2)):
        point_at(row, col)
        assert state("place") == str(row * 6 + col)
        weight = float(saved.inner_text("#value").split("weight ")[1].split(",")[0])
        assert weight == pytest.approx(MAPS[2, row, col].item(), rel=0.1)
    saved.locator("#choices input").nth(3).check()  # all
    claims = torch.where(SCORES < 0.3, 0, SCORES)[:, None, None] * MAPS
    owners = (claims / MAPS.amax((1, 2), keepdim=True)).argmax(0)
    for row, col in ((1, 1), (6, 4)):
        point_at(row, col)
        assert state("owner") == str(owners[row, col].item())
    before = saved.evaluate(pixels)
    saved.locator("#choices input").nth(3).press("ArrowUp")
    assert state("shown") == "2"
    assert saved.evaluate(pixels) != before
