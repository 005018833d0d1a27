"""The common form: every mechanism of the course computed by it, and the table that says so."""

import pytest
import torch

from attnlab.lab import common_cases
from attnlab.lab.common_form import attention, weights
from attnlab.lab.common_rows import ROWS, TOLERANCE, difference, table
from attnlab.lab.files import repo_root

pytestmark = pytest.mark.usefixtures("one_thread")

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.mechanism)


@every_row
def test_each_mechanism_is_the_common_form(row, device):
    for seed in (0, 1):
        assert difference(row, device, seed) < TOLERANCE


WRONG = {
    "another axis": lambda scores, values, normalize="softmax", axis="keys", mask=None: attention(
        scores, values, normalize="softmax", axis="queries" if axis == "keys" else "keys", mask=mask
    ),
    "scores squared": lambda scores, values, **answers: attention(scores**2, values, **answers),
    "no scores": lambda scores, values, **answers: attention(0 * scores, values, **answers),
}


@every_row
@pytest.mark.parametrize("how", WRONG)
def test_the_check_of_each_row_can_fail(row, how, monkeypatch):
    monkeypatch.setattr(common_cases, "attention", WRONG[how])
    if row.mechanism == "average pooling" and how != "another axis":
        assert difference(row) < TOLERANCE  # its scores are 0 anyhow
    else:
        assert difference(row) > 1e-4


@pytest.mark.parametrize(
    "mechanism",
    [
        "OCNet, pyramid", "criss-cross, twice", "window", "neighborhood", "dilated", "axial",
        "interlaced", "local attention", "pixels to superpixels", "superpixels to pixels",
    ],
)  # fmt: skip
def test_the_mask_decides(mechanism, monkeypatch):
    (row,) = (row for row in ROWS if row.mechanism == mechanism)
    monkeypatch.setattr(
        common_cases, "attention", lambda scores, values, mask, **a: attention(scores, values, **a)
    )
    assert difference(row) > 1e-4


def test_weights_by_hand(device):
    scores = torch.tensor([[0.0, 1.0], [2.0, 3.0]], device=device, dtype=torch.float64).log()
    mask = torch.tensor([[True, True], [False, True]], device=device)
    wanted = {
        ("softmax", "keys", None): [[0, 1], [0.4, 0.6]],
        ("softmax", "queries", None): [[0, 0.25], [1, 0.75]],
        ("softmax", "keys", mask): [[0, 1], [0, 1]],
        ("softmax", "queries", mask.mT): [[0, 0], [1, 1]],
        ("sigmoid", "keys", None): [[0, 0.5], [2 / 3, 0.75]],
    }
    for (normalize, axis, meet), expected in wanted.items():
        found = weights(scores, normalize=normalize, axis=axis, mask=meet)
        torch.testing.assert_close(found, found.new_tensor(expected), rtol=0, atol=1e-9)
    wanted = {
        ("none", "keys", None): [[0, 1], [2, 3]],
        ("none", "keys", mask): [[0, 1], [0, 3]],
        ("sum", "keys", None): [[0, 1], [0.4, 0.6]],
        ("sum", "queries", mask): [[0, 0.25], [0, 0.75]],
        ("mean", "keys", mask): [[0, 0.5], [0, 3]],
        ("mean", "queries", mask): [[0, 0.5], [0, 1.5]],
    }
    for (normalize, axis, meet), expected in wanted.items():
        found = weights(scores.exp(), normalize=normalize, axis=axis, mask=meet)
        torch.testing.assert_close(found, found.new_tensor(expected), rtol=0, atol=1e-9)


@pytest.mark.parametrize("axis", ["keys", "queries"])
@pytest.mark.parametrize("normalize", ["softmax", "sum", "mean", "sigmoid", "none"])
def test_who_may_meet_nobody_gets_nothing_and_no_nan(normalize, axis, device):
    scores = torch.randn(2, 3, 4, device=device).square().requires_grad_()
    mask = torch.ones(3, 4, dtype=torch.bool, device=device)
    mask[1] = mask[:, 2] = False
    out = attention(scores, torch.eye(4, device=device), normalize=normalize, axis=axis, mask=mask)
    assert out[:, 1].eq(0).all()
    assert out[..., 2].eq(0).all()
    assert out[:, 0, 0].ne(0).all()
    out.sum().backward()
    assert scores.grad.isfinite().all()
    assert scores.grad[:, 1].eq(0).all()


def test_the_values_are_weighed_and_the_input_stays(device):
    scores, values = torch.randn(2, 3, 4, device=device), torch.randn(2, 4, 5, device=device)
    before = scores.clone()
    expected = torch.einsum("bqk,bkd->bqd", weights(scores), values)
    torch.testing.assert_close(attention(scores, values), expected)
    assert torch.equal(scores, before)


def test_errors():
    scores, values = torch.zeros(2, 3, 4), torch.zeros(2, 4, 5)
    for options, message in (
        ({"normalize": "softmin"}, r"normalize='softmin': expected one of softmax, sum"),
        ({"axis": "heads"}, r"axis='heads': expected one of keys, queries"),
        ({"mask": torch.ones(3, 4)}, r"mask.dtype=torch.float32: expected bool"),
        ({"mask": torch.ones(4, 3) > 0}, r"mask \(4, 3\): expected broadcastable to the scores"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(scores, values, **options)
    with pytest.raises(ValueError, match=r"values=\(2, 3, 5\): expected \(..., keys=4, d\)"):
        attention(scores, values[:, :3])


def test_the_rows_cover_every_chapter_with_a_mechanism():
    chapters = {row.chapter for row in ROWS}
    notebooks = {path.stem for path in (repo_root() / "chapters").glob("*.ipynb")}
    assert chapters == {name for name in notebooks if "01" <= name[:2] <= "10"}
    assert [row.chapter for row in ROWS] == sorted(row.chapter for row in ROWS)
    assert len({row.mechanism for row in ROWS}) == len(ROWS)
    assert all(text for row in ROWS for text in row[:-1])


def test_the_table_links_and_tells_the_truth(monkeypatch):
    chosen = [row for row in ROWS if row.chapter == "08_patchconvnet"]
    shown = table(chosen)._repr_markdown_()
    assert shown.count("✔ |") == len(chosen) == 2
    assert "✘" not in shown
    assert "| [08](08_patchconvnet.ipynb) |" in shown
    assert "|---" not in shown.replace("| ---", "")
    monkeypatch.setattr(common_cases, "attention", WRONG["another axis"])
    assert table(chosen)._repr_markdown_().count("✘ |") == 2
