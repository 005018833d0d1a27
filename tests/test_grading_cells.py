"""What the grader reads out of a submission, what crosses the wire, and what it writes."""

import csv
import json
import math
import socket
import threading

import pytest
import torch

from attnlab.lab.exercises.framework import difference
from attnlab.lab.grading_cells import Missing, define, needed, read_cells, read_statements
from attnlab.lab.grading_report import write_report, write_tables
from attnlab.lab.grading_wire import LIMIT, SIZES, BadMessage, receive, send


def statements(*cells: str):
    found, problems = read_statements(list(cells))
    assert problems == []
    return found


def value(*cells: str, name: str = "f", prelude: str = ""):
    return define(statements(*cells), name, prelude)


def test_a_function_comes_with_what_it_needs_and_nothing_else():
    cells = [
        "import math\nimport os\n1 / 0",
        "unused = undefined_name\nscale = 2\nprint('hello')",
        "def helper(x):\n    return scale * x",
        "def f(x):\n    return helper(x) + math.pi",
    ]
    assert value(*cells)(1) == 2 + math.pi
    assert [s.file for s in needed(statements(*cells), "f")] == [
        "code cell 1", "code cell 2", "code cell 3", "code cell 4",
    ]  # fmt: skip
    assert len(needed(statements(*cells), "f")) == 4


def test_the_order_of_the_cells_does_not_matter():
    cells = ["def f(x, y=base):\n    return helper(x) + y", "helper = make(3)",
             "def make(n):\n    return lambda x: n * x", "base = 10"]  # fmt: skip
    assert value(*cells)(2) == value(*reversed(cells))(2) == 16


def test_the_last_definition_counts_as_when_all_is_run():
    assert value("def f(): return 1", "f = 3", "def f(): return 2")() == 2
    assert value("def f(): return 1", "f = 3") == 3
    assert value("x = 1", "x = x + 1", "x += 1", "def f(): return x")() == 3


def test_an_early_use_of_the_name_is_not_run():
    """Chapter 01 calls a tensor `rollout` long before the exercise of that name."""
    assert value("f = expensive()", "def f(): return 1")() == 1


def test_names_bound_in_compound_statements_are_found():
    assert value("try:\n    import nothing as n\nexcept ImportError:\n    n = 5",
                 "for i in range(3):\n    last = i",
                 "with open('/dev/null') as file:\n    text = file.read()",
                 "def f(): return n, last, text")() == (5, 2, "")  # fmt: skip


def test_a_star_import_and_the_prelude_are_there():
    assert value("from math import *", "def f(): return floor(pi)")() == 3
    assert value("def f(): return torch.ones(1)", prelude="import torch")().item() == 1


def test_the_preludes_own_binding_is_no_answer():
    with pytest.raises(Missing):
        value("x = 1", prelude="def f(): return 1")


def test_what_fails_says_why():
    with pytest.raises(ZeroDivisionError):
        value("f = 1 / 0")
    with pytest.raises(SystemExit):
        value("f = exit()", prelude="from sys import exit")


def test_a_cell_that_is_no_python_costs_only_itself():
    found, problems = read_statements(
        ["def f(:", "def g(): return 1", "%time\n!ls\ny = 3", "(" * 999]
    )
    assert {name for statement in found for name in statement.binds} == {"g", "y"}
    assert len(problems) == 2
    assert problems[0].startswith("Code cell 1 is not Python: SyntaxError")


def test_notebooks_and_scripts_have_cells():
    cells = [
        {"cell_type": "markdown", "source": "no"},
        {"cell_type": "code", "source": ["a = 1\n", "b = 2"]},
        {"cell_type": "code", "source": "c"},
    ]
    assert read_cells(json.dumps({"cells": cells}), notebook=True) == ["a = 1\nb = 2", "c"]
    assert read_cells("a\n# %% [markdown]\n# b\n# %%\nc\n", notebook=False) == [
        "a\n", "\n# b\n", "\nc\n",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "{}", '{"cells": 3}', '{"cells": [3]}', "[" * 100_000,
             '{"cells": [{"cell_type": "code"}]}',
             '{"cells": [{"cell_type": "code", "source": 3}]}'],
    ids=range(10),
)  # fmt: skip
def test_what_is_no_notebook_is_said_to_be_none(text):
    with pytest.raises(ValueError, match="It is not a notebook"):
        read_cells(text, notebook=True)


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(10)
        yield ours, theirs


def cross(pair, sent):
    threading.Thread(target=send, args=(pair[1], sent)).start()
    return receive(pair[0])


def test_values_cross_the_wire_as_they_are(pair):
    sent = {
        "tensors": [torch.randn(2, 3), torch.tensor(True), torch.arange(4), torch.zeros(0, 3)],
        "half": (torch.rand(3).bfloat16(), torch.rand(2, 2, dtype=torch.float64).T),
        "plain": (1, -2.5, True, None, "text", [], ()),
        "not finite": [math.inf, -math.inf],
    }
    got = cross(pair, sent)
    assert got.keys() == sent.keys()
    for name, expected in sent.items():
        assert difference(expected, got[name]) is None
    assert math.isnan(cross(pair, math.nan))


@pytest.mark.parametrize(
    ("sent", "name"),
    [(object(), "object"), (len, "builtin_function_or_method"), (2**100, "very large int"),
     ({1, 2}, "set"), (b"1", "bytes"), (3j, "complex"), (range(3), "range"),
     (torch.zeros(1).expand(10**9), "tensor of 1,000,000,000 entries"),
     (torch.zeros(2).to_sparse(), "float32 torch.sparse_coo on cpu"),
     ([0] * 20_000, "very long list")],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_other_things_cross_as_a_name(pair, sent, name):
    assert type(cross(pair, sent)).__name__ == name


def test_a_list_in_itself_ends(pair):
    endless = []
    endless.append(endless)
    assert isinstance(cross(pair, endless), list)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[1]", b"[" * 100_000, b'{"a": 1, "b": 2}', b'{"tensor": "9"}', b"{}",
             b'{"list": 3}', b'{"other": ""}', b'{"tuple": [[1]]}', b'{"exec": "1"}',
             b'{"list":[' * 5000 + b"1" + b"]}" * 5000, b"9" * 5000, b"\xff"],
    ids=range(14),
)  # fmt: skip
def test_garbage_is_a_bad_message(pair, text):
    from safetensors.torch import save

    pair[1].sendall(SIZES.pack(len(text), len(save({}))) + text + save({}))
    with pytest.raises(BadMessage):
        receive(pair[0])


def test_garbage_for_tensors_and_a_message_too_large_are_bad(pair):
    pair[1].sendall(SIZES.pack(4, 4) + b"null" + b"\xff" * 4)
    with pytest.raises(BadMessage):
        receive(pair[0])
    pair[1].sendall(SIZES.pack(2**31, LIMIT))
    with pytest.raises(BadMessage, match="more than"):
        receive(pair[0])
    pair[1].close()
    with pytest.raises(EOFError):
        receive(pair[0])


def record(name: str, *statuses: str) -> dict:
    exercises = ["attention.entropy", "attention.merge_blocks"]
    results = [
        {
            "exercise": e,
            "status": s,
            "text": "Case: \x1b[31mred.\nTwo",
            "hint": "" if s == "correct" else "Which axis?",
        }
        for e, s in zip(exercises, statuses, strict=False)
    ]
    return {"submission": name, "results": results}


def test_the_table_and_the_summary_of_a_class(tmp_path):
    records = [record("a/01.ipynb", "correct", "correct"), record("=b.py", "correct", "wrong"),
               record("c.py", "wrong")]  # fmt: skip
    write_tables(tmp_path / "grades.csv", tmp_path / "summary.txt", records)
    with open(tmp_path / "grades.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [
            ["submission", "solved", "of", "attention.entropy", "attention.merge_blocks"],
            ["a/01.ipynb", "2", "2", "correct", "correct"],
            ["'=b.py", "1", "2", "correct", "wrong"],
            ["c.py", "0", "1", "wrong", ""],
        ]
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    assert lines[0] == "3 submissions"
    assert [line.split()[:2] for line in lines[3:6]] == [["0", "1"], ["1", "1"], ["2", "1"]]
    assert "Most missed: attention.merge_blocks, by 50% of those who owed it." in lines
    assert lines[-1] == "  1 got the hint: Which axis?"


def test_a_report_says_what_went_wrong_in_plain_text(tmp_path):
    write_report(tmp_path / "report.txt", record("b.py", "correct", "wrong"))
    assert (tmp_path / "report.txt").read_text().splitlines() == [
        "b.py", "1 of 2 solved", "", "attention.entropy: correct", "",
        "attention.merge_blocks: wrong", "  Case: �[31mred.", "  Two", "  hint: Which axis?",
    ]  # fmt: skip
