"""The player: data, page, errors, and what a reader sees and does in real Chromium."""

import json

import matplotlib
import pytest
import torch

from attnlab.lab import metrics
from attnlab.lab.player import Player

matplotlib.use("Agg")
KEYS = [0, 0, 0, 3, 3]


def clip() -> dict:
    draws = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 25, 4, 6, generator=draws)
    masks = torch.rand(3, 5, 16, 24, generator=draws) > 0.6
    return {
        "frames": torch.rand(5, 3, 16, 24, generator=draws),
        "keys": KEYS,
        "flow": torch.randint(-4, 5, (5, 2, 4, 6), generator=draws).float(),
        "weights": logits.softmax(1),
        "truth": masks[0],
        "results": {"copy": masks[1], "attention": masks[2]},
    }


@pytest.fixture(scope="module")
def player():
    return Player(**clip())


def data_in(page: str) -> dict:
    start = page.index('id="data">') + len('id="data">')
    return json.loads(page[start : page.index("</script>", start)])


def decoded(runs: list[int]) -> torch.Tensor:
    """The mask whose runs these are, False first."""
    parts = [torch.full((length,), bool(i % 2)) for i, length in enumerate(runs)]
    return torch.cat(parts)


def test_the_page_holds_the_clip(player):
    assert repr(player) == "Player(5 frames, radius 2, copy, attention)"
    data, given = data_in(player.html), clip()
    assert (data["keys"], data["grid"], data["radius"]) == (KEYS, [4, 6], 2)
    shown = torch.tensor(data["flow"]).view(5, 2, 4, 6)
    torch.testing.assert_close(shown, given["flow"], rtol=0, atol=0)
    for name, mask in {"truth": given["truth"], **given["results"]}.items():
        for runs, frame in zip(data["masks"][name], mask, strict=True):
            assert torch.equal(decoded(runs).view_as(frame), frame)
    for address in ("http:", "https:", "@import", "url("):
        assert address not in player.html.replace("data:image", "")


def test_scores_are_the_mean_iou_of_every_frame(player):
    given = clip()
    for name, mask in given["results"].items():
        for t in range(5):
            confusion = metrics.confusion_matrix(mask[t].long(), given["truth"][t].long(), 2)
            assert player.scores[name][t] == metrics.mean_iou(confusion)


def test_a_mask_that_begins_inside_has_an_empty_first_run():
    full = torch.ones(5, 16, 24, dtype=torch.bool)
    data = data_in(Player(**{**clip(), "truth": full}).html)
    assert data["masks"]["truth"][0] == [0, 16 * 24]
    data = data_in(Player(**{**clip(), "truth": ~full}).html)
    assert data["masks"]["truth"][0] == [16 * 24]


def test_a_window_lies_around_its_cell_and_ends_at_the_border(player):
    weights = clip()["weights"][4].view(5, 5, 4, 6)
    seen = player.window(4, (1, 0))
    assert seen.shape == (4, 6)
    torch.testing.assert_close(seen[0:4, 0:3], weights[1:5, 2:5, 1, 0])
    assert seen[:, 3:].count_nonzero() == 0


def test_it_is_the_same_page_every_time(player, tmp_path):
    assert Player(**clip())._repr_html_() == player._repr_html_()
    player.save(tmp_path / "player.html")
    assert (tmp_path / "player.html").read_text("utf-8") == player.html


def test_a_clip_of_the_course_is_small_enough():
    torch.manual_seed(0)
    keys = [0, 0, 0, 0, 4, 4, 4, 4]
    truth = torch.zeros(8, 64, 64, dtype=torch.bool)
    truth[:, 20:40, 20:40] = True
    weights = torch.randn(8, 81, 16, 16).mul(5).softmax(1)
    results = {name: truth for name in ("copy", "flow", "attention", "full")}
    frames, flow = torch.rand(8, 3, 64, 64), torch.zeros(8, 2, 16, 16)
    assert len(Player(frames, keys, flow, weights, truth, results)._repr_html_()) < 300_000


def test_figure_shows_the_window_and_where_the_flow_points(player):
    left, middle, right = player.figure(2, (1, 3), "attention")
    assert left.get_title() == "frame 2"
    assert middle.get_title() == "key frame 0: weights, × flow"
    assert right.get_title() == f"attention: mIoU {player.scores['attention'][2]:.2f}"
    cross = middle.lines[-1]
    dx, dy = clip()["flow"][2, :, 1, 3].tolist()
    assert (cross.get_xdata()[0], cross.get_ydata()[0]) == (14 + dx, 6 + dy)


def test_errors(player):
    def made(**changes):
        return lambda: Player(**{**clip(), **changes})

    short = torch.zeros(4, 16, 24, dtype=torch.bool)
    for build, message in [
        (made(frames=torch.rand(3, 16, 24)), r"frames \(3, 16, 24\): expected \(T, 3, H, W\)"),
        (made(keys=[0, 0, 0]), r"keys=\[0, 0, 0\]: expected 5 numbers"),
        (made(keys=[1, 1, 2, 3, 4]), "none of a later frame"),
        (made(flow=torch.zeros(5, 3, 4, 6)), r"flow \(5, 3, 4, 6\): expected \(5, 2, h, w\)"),
        (made(weights=torch.zeros(5, 24, 4, 6)), r"weights \(5, 24, 4, 6\): expected \(5, \(2R"),
        (made(truth=short), r"truth torch.bool \(4, 16, 24\): expected torch.bool \(5, 16, 24\)"),
        (made(results={"a": torch.zeros(5, 16, 24)}), "a torch.float32 .*: expected torch.bool"),
        (made(results={}), "results is empty"),
        (made(max_bytes=10), "the player of 5 frames would take .* max_bytes=10"),
        (lambda: player.figure(3, (0, 0)), r"frame=3: expected one that is no key .* \[1, 2, 4\]"),
        (lambda: player.figure(1, (4, 0)), r"cell=\(4, 0\): expected \(row, column\) within \(4,"),
        (lambda: player.figure(1, (0, 0), "b"), "result='b': expected one of copy, attention"),
    ]:
        with pytest.raises(ValueError, match=message):
            build()


@pytest.fixture
def saved(player, tmp_path):
    browser = pytest.importorskip("browser")
    player.save(tmp_path / "player.html")
    with (
        browser.chromium() as chromium,
        browser.open_page(chromium, (tmp_path / "player.html").as_uri()) as page,
    ):
        page.wait_for_selector("#app[data-frame]", state="attached")
        yield page


@pytest.mark.needs("browser")
def test_a_reader_steps_through_the_clip(saved, player):
    """Frames, cells and weights are those of Python, for the mouse and for the keyboard."""

    def state(name: str) -> str:
        return saved.get_attribute("#app", f"data-{name}")

    assert state("frame") == "4"  # the last frame that is fed from another
    box = saved.locator("#now").bounding_box()
    for cell in ((0, 0), (2, 3), (3, 5)):
        saved.mouse.move(
            box["x"] + (cell[1] + 0.5) * box["width"] / 6,
            box["y"] + (cell[0] + 0.5) * box["height"] / 4,
        )
        assert state("cell") == str(cell[0] * 6 + cell[1])
        assert state("strongest") == str(int(player.window(4, cell).argmax()))
    saved.locator("#now").press("ArrowLeft")
    assert state("cell") == "22"
    assert "row 3, column 4" in saved.inner_text("#readout").lower()
    before = saved.evaluate("source.toDataURL()")
    saved.locator("#now").press(",")
    assert (state("frame"), state("strongest")) == ("3", "-7")
    assert "nothing is fetched" in saved.inner_text("#value")
    assert saved.evaluate("source.toDataURL()") != before
    saved.locator("#frame").fill("1")
    assert state("frame") == "1"
    assert state("strongest") == str(int(player.window(1, (3, 4)).argmax()))


@pytest.mark.needs("browser")
def test_a_reader_compares_results_and_plays(saved, player):
    pixels = "[outcome.toDataURL(), now.toDataURL()]"
    before = saved.evaluate(pixels)
    saved.select_option("#result", index=1)
    after = saved.evaluate(pixels)
    assert (after[0] != before[0], after[1] == before[1]) == (True, True)
    score = f"attention: mIoU {player.scores['attention'][4]:.2f}"
    assert saved.inner_text("#found") == score
    saved.uncheck("#arrows")
    assert saved.evaluate(pixels)[1] != after[1]
    line = saved.locator("#time").bounding_box()
    saved.locator("#time").click(position={"x": 40, "y": line["height"] / 2})
    assert saved.get_attribute("#app", "data-frame") == "0"
    saved.locator("#play").press("Enter")
    saved.wait_for_selector("#app[data-frame='2']", state="attached")
    assert saved.inner_text("#play") == "Pause"
    saved.locator("#now").press(" ")
    assert saved.get_attribute("#app", "data-playing") == "false"
