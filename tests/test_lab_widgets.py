"""The attention explorer's data, page and errors; test_browser.py uses it in a real browser."""

import base64
import html
import json
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
import torch
from torch import nn

from attnlab.attention import vit_mini
from attnlab.lab import explore
from attnlab.lab.pages import iframe, pack, page
from attnlab.lab.widgets import AttentionExplorer, sliders
from attnlab.probe import attention_rollout, record

matplotlib.use("Agg")


def made_up(layers=3, heads=2, grid=(4, 6), prefix=1) -> list[torch.Tensor]:
    tokens = prefix + grid[0] * grid[1]
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(layers, heads, tokens, tokens, generator=generator)
    return list(logits.softmax(-1))


IMAGE = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0))


def unpack(packed: dict, width: int) -> torch.Tensor:
    """`unpack` of page.js."""
    peaks = np.frombuffer(base64.b64decode(packed["peaks"]), "<f4")
    kind, highest = (np.int8, 127) if packed["signed"] else (np.uint8, 255)
    codes = np.frombuffer(base64.b64decode(packed["codes"]), kind).reshape(-1, width)
    codes = codes.astype(np.float64)
    return torch.tensor(np.sign(codes) * (codes / highest) ** 4 * peaks[:, None])


def data_in(page: str) -> dict:
    """The JSON that a page holds."""
    start = page.index('id="data">') + len('id="data">')
    return json.loads(page[start : page.index("</script>", start)])


@pytest.mark.parametrize(("signed", "loss"), [(False, 1), (True, 2)])
def test_packing_keeps_weights_to_a_few_percent(signed, loss):
    shares = torch.tensor([1.0, 0.5, 0.1, 0.01, 1e-4])
    matrix = torch.stack([shares, 3 * shares.flip(0), torch.zeros(5)])
    if signed:
        matrix = matrix * torch.tensor([1, -1, 1, -1, 1])
    found = unpack(pack(matrix, signed), 5).float()
    assert found[0, 0] == 1
    torch.testing.assert_close(found[0, :3], matrix[0, :3], rtol=0.02 * loss, atol=0)
    torch.testing.assert_close(found[0, 3], matrix[0, 3], rtol=0.03 * loss, atol=0)
    torch.testing.assert_close(found, matrix, rtol=0.1 * loss, atol=0)


def test_page_survives_hostile_text_and_holds_no_address():
    hostile = '</script><script>alert(1)</script>"&\u2028é'
    content = page("explorer", {"title": hostile}, hostile)
    assert data_in(content) == {"title": hostile}
    assert content.count("<script") == 2
    assert html.escape(hostile) in content
    for address in ("http:", "https:", "//cdn", "import ", "@import", "url("):
        assert address not in content.replace("data:image", "")


def test_iframe_holds_the_page_and_says_what_to_do_without_frames():
    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            assert tag == "iframe"
            self.attributes = dict(attrs)

        def handle_data(self, data):
            self.fallback = data

    reader = Reader()
    reader.feed(iframe("<p>'a' & \"b\"</p>", 300, 'a "title"'))
    reader.close()
    assert reader.attributes["srcdoc"] == "<p>'a' & \"b\"</p>"
    assert reader.attributes["title"] == 'a "title"'
    assert "height:300px" in reader.attributes["style"]
    assert "Run this cell" in reader.fallback


def test_explorer_page_holds_every_map(device):
    maps = [layer.to(device) for layer in made_up()]
    explorer = AttentionExplorer(IMAGE.to(device), maps, (4, 6))
    assert repr(explorer) == "AttentionExplorer(3 layers, 2 heads, 4×6 patches)"
    data = data_in(explorer.html)
    assert data["grid"] == [4, 6]
    assert data["prefix"] == ["CLS"]
    assert [column["short"] for column in data["columns"]] == ["0", "1", "mean", "rollout"]
    for index, (layer, packed) in enumerate(zip(maps, data["maps"], strict=True)):
        expected = torch.cat([layer, attention_rollout([m[None] for m in maps[: index + 1]])]).cpu()
        found = torch.stack([unpack(one, 25) for one in packed]).float()
        torch.testing.assert_close(found, expected, rtol=0.03, atol=1e-4)
    assert explorer._repr_html_() == AttentionExplorer(IMAGE, maps, (4, 6))._repr_html_()


def test_choice_of_layers_and_heads():
    maps = made_up(layers=4, heads=3)
    explorer = AttentionExplorer(IMAGE, dict(zip("abcd", maps, strict=True)), (4, 6),
                                 layers=[1, -1], heads=[2, 0])  # fmt: skip
    data = data_in(explorer.html)
    assert repr(explorer) == "AttentionExplorer(2 layers, 2 heads, 4×6 patches)"
    assert data["layers"] == [{"name": "b", "short": "1"}, {"name": "d", "short": "3"}]
    assert [c["name"] for c in data["columns"]] == [
        "2", "0", "mean of heads 2, 0", "rollout to this layer",
    ]  # fmt: skip
    found = torch.stack([unpack(one, 25) for one in data["maps"][1]]).float()
    rolled = attention_rollout([m[None] for m in maps])  # through all layers, shown or not
    torch.testing.assert_close(found, torch.cat([maps[3][[2, 0]], rolled]), rtol=0.03, atol=1e-4)
    mean = AttentionExplorer(IMAGE, maps, (4, 6), heads="mean")
    assert repr(mean) == "AttentionExplorer(4 layers, 1 head, 4×6 patches)"
    found = unpack(data_in(mean.html)["maps"][2][0], 25).float()
    torch.testing.assert_close(found, maps[2].mean(0), rtol=0.03, atol=1e-4)


def test_weights_are_rows_columns_means_and_rollouts():
    maps = made_up()
    explorer = AttentionExplorer(IMAGE, [layer[None] for layer in maps], (4, 6))
    token = 1 + 2 * 6 + 3
    assert explorer.weights((2, 3), layer=0, head=1).equal(maps[0][1, token])
    assert explorer.weights(0).equal(maps[-1].mean(0)[0])
    assert explorer.weights((2, 3), received=True).equal(maps[-1].mean(0)[:, token])
    rolled = attention_rollout([layer[None] for layer in maps[:2]])[0]
    torch.testing.assert_close(explorer.weights(0, layer=1, head="rollout"), rolled[0])


def test_figure_draws_what_the_page_shows():
    explorer = AttentionExplorer(IMAGE, made_up(), (4, 6))
    ax = explorer.figure((2, 3), layer=0, head=1, received=True)
    photograph, over = ax.images
    np.testing.assert_array_equal(photograph.get_array(), IMAGE.permute(1, 2, 0))
    expected = explorer.weights((2, 3), layer=0, head=1, received=True)[1:].view(4, 6)
    np.testing.assert_array_equal(over.get_array(), expected)
    assert ax.get_title() == "row 2, column 3 is looked at by\nlayer 0, head 1"
    assert ax.patches[0].get_xy() == (3 * 16, 2 * 16)
    assert explorer.figure(0).get_title() == "class token 0 looks at\nlayer 2, mean of heads"


def test_signed_and_unnormalised_maps_have_no_rollout():
    maps = made_up(prefix=0)
    signed = data_in(AttentionExplorer(IMAGE, [m - 0.1 for m in maps], (4, 6), prefix=0).html)
    assert (signed["signed"], signed["stochastic"], signed["prefix"]) == (True, False, [])
    found = unpack(signed["maps"][0][1], 24).float()
    torch.testing.assert_close(found, maps[0][1] - 0.1, rtol=0.05, atol=1e-3)
    doubled = data_in(AttentionExplorer(IMAGE, [2 * m for m in maps], (4, 6), prefix=0).html)
    assert [c["short"] for c in doubled["columns"]] == ["0", "1", "mean"]
    half = [m.to(torch.bfloat16) for m in maps]
    assert data_in(AttentionExplorer(IMAGE, half, (4, 6), prefix=0).html)["stochastic"]


def test_sizes():
    """The sizes that chapters use fit; a larger one names the way out."""
    square = IMAGE[:, :, :64]
    chapter = AttentionExplorer(square, made_up(6, 3, (8, 8)), (8, 8))
    assert len(chapter._repr_html_().encode()) < 250_000
    deit = made_up(12, 3, (14, 14))
    some = AttentionExplorer(square, deit, (14, 14), layers=[5, 11], heads="mean")
    assert len(some._repr_html_().encode()) <= 300_000
    with pytest.raises(ValueError, match=r"12 layers would take \d,\d{3},\d{3} bytes.*layers=\["):
        AttentionExplorer(square, deit, (14, 14))
    AttentionExplorer(square, deit, (14, 14), max_bytes=4_000_000)


def test_save_writes_the_page(tmp_path):
    explorer = AttentionExplorer(IMAGE, made_up(), (4, 6))
    explorer.save(tmp_path / "folder" / "explorer.html")
    assert (tmp_path / "folder" / "explorer.html").read_text("utf-8") == explorer.html


def test_explore_records_a_model_and_leaves_it_as_it_was(device):
    model = vit_mini().to(device)
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    image = torch.rand(3, 64, 64)
    explorer = explore(model, image, layers=[0, 5], title="A small ViT")
    assert repr(explorer) == "AttentionExplorer(2 layers, 3 heads, 8×8 patches)"
    assert explorer.title == "A small ViT"
    assert explorer.names[0] == "blocks.0.attn"
    assert [module.training for module in model.modules()] == modes
    with torch.no_grad(), record(model.eval()) as maps:
        model(image.to(device)[None])
    torch.testing.assert_close(explorer.maps[5], maps["blocks.5.attn"][0].cpu())
    normalised = explore(model, image, inputs=(image - 0.5) / 0.5, layers=[0])
    assert not torch.allclose(normalised.maps, explorer.maps, atol=1e-4)


class Wide(nn.Module):
    """Self-attention over 4×8 patches without a class token, and without saying so."""

    def __init__(self, patch: int = 8):
        super().__init__()
        from attnlab.attention import MultiHeadAttention

        self.patch, self.attn = patch, MultiHeadAttention(3 * patch**2, 2)

    def forward(self, x):
        return self.attn(nn.functional.unfold(x, self.patch, stride=self.patch).mT)


def test_explore_tells_the_grid_from_the_photographs_proportions():
    assert explore(Wide(), torch.rand(3, 32, 64)).grid == (4, 8)
    with pytest.raises(ValueError, match=r"grid=None: 32 tokens and an image of proportions 1 \("):
        explore(Wide(), torch.rand(3, 64, 64), inputs=torch.rand(3, 32, 64))
    image = torch.rand(3, 64, 64)
    explorer = explore(Wide(), image, inputs=torch.rand(3, 32, 64), grid=(4, 8), prefix=0)
    assert explorer.grid == (4, 8)


GOOD = made_up()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": IMAGE[0]}, r"image has shape \(64, 96\): expected a tensor \(3, H, W\)"),
        ({"image": "photo"}, r"image has shape str: expected"),
        ({"image": IMAGE - 1}, r"image has values from -1 to .*: expected \[0, 1\]"),
        ({"image": IMAGE / 0}, r"image has values from .*: expected \[0, 1\]"),
        ({"maps": []}, r"maps is empty: expected one attention map per layer"),
        ({"maps": [GOOD[0][0]]}, r"maps\['0'\] has shape \(25, 25\): expected \(heads, 25, 25\)"),
        ({"maps": {"a": torch.ones(2, 2, 25, 25)}}, r"maps\['a'\] has shape \(2, 2, 25, 25\)"),
        ({"prefix": 0}, r"has shape \(2, 25, 25\): .*for 0 class tokens and 4×6 patches"),
        ({"maps": [GOOD[0] / 0]}, r"maps\['0'\] has NaN or infinite weights"),
        ({"maps": [GOOD[0], GOOD[1][:1]]}, r"maps have \[2, 1\] heads: expected the same number"),
        ({"names": ["a"]}, r"names has 1 names: expected 3, one per layer"),
        ({"layers": [3]}, r"layers=\[3\]: expected some of 0 to 2"),
        ({"layers": []}, r"layers=\[\]: expected some of 0 to 2"),
        ({"heads": [0, 2]}, r"heads=\[0, 2\]: expected some of 0 to 1"),
        ({"heads": "max"}, r"heads='max': expected some of 0 to 1"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"image": IMAGE, "maps": GOOD, "grid": (4, 6)} | change
    with pytest.raises(ValueError, match=message):
        AttentionExplorer(**arguments)


@pytest.mark.parametrize("query", [(4, 0), (0, 6), (-1, 0), 1])
def test_bad_query_is_named(query):
    explorer = AttentionExplorer(IMAGE, GOOD, (4, 6))
    with pytest.raises(ValueError, match=r"query=.*: expected \(row, column\) within 4×6 patches"):
        explorer.weights(query)


def test_sliders_draw_once_where_there_are_none(monkeypatch):
    calls = []
    ranges = {"temperature": (0.1, 5.0, 1.0), "layer": (0, 5, 3), "head": ["mean", 0]}
    first = {"temperature": 1.0, "layer": 3, "head": "mean"}
    assert sliders(lambda **values: calls.append(values) or values, **ranges) is None
    monkeypatch.setattr("IPython.get_ipython", type("Shell", (), {"kernel": True}))
    monkeypatch.setattr("attnlab.lab.widgets.find_spec", lambda name: None)
    sliders(lambda **values: calls.append(values), **ranges)
    assert calls == [first, first]


def test_sliders_call_again_when_one_moves(monkeypatch):
    ipywidgets = pytest.importorskip("ipywidgets")
    import IPython
    import IPython.display

    shown, calls = [], []
    kernel = type("Shell", (), {"kernel": True})
    monkeypatch.setattr(IPython, "get_ipython", kernel)
    monkeypatch.setattr(IPython.display, "display", lambda *widgets: shown.extend(widgets))
    sliders(lambda **values: calls.append(values), temperature=(0.1, 5.0, 1.0), layer=(0, 5, 3),
            head=["mean", 0])  # fmt: skip
    temperature, layer, head, _ = shown
    assert isinstance(temperature, ipywidgets.FloatSlider)
    assert isinstance(layer, ipywidgets.IntSlider)
    layer.value, head.value = 4, 0
    assert calls[0] == {"temperature": 1.0, "layer": 3, "head": "mean"}
    assert calls[-1] == {"temperature": 1.0, "layer": 4, "head": 0}
