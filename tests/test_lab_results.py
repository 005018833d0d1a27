"""`attnlab.lab.results` and the hash of the code behind a table, on a chapter made for the test."""

import json
import sys

import pytest
import torch

from attnlab.lab import code_hash, experiments, results

CHAPTER_99 = '''
"""A chapter of the test."""
import torch

from attnlab.lab import cost

CHAPTER = "99_test"
CALLS = []


def coin(seed, device, rows=None):
    """Two coins."""
    CALLS.append(("coin", seed))
    return {row: {"heads": bias + seed / 10, "tosses": 10} for row, bias in BIAS.items()
            if rows is None or row in rows}


BIAS = {"fair": 0.5, "loaded": torch.tensor(0.6)}


def die(seed, device):
    CALLS.append(("die", seed))
    return {"six": {"share": 1 / 6}}


def broken(seed, device):
    return {"row": {"loss": float("nan")}}


def restless(seed, device):
    return {f"row {seed}": {"loss": 1.0}}


def helper(seed, device, more):
    return None


def _private(seed, device):
    return None
'''


@pytest.fixture
def chapter(tmp_path, monkeypatch):
    """The chapter, importable as an experiments module, with its results in `tmp_path`."""
    path = tmp_path / "ch99.py"
    path.write_text(CHAPTER_99)
    monkeypatch.setattr(experiments, "__path__", [str(tmp_path)])
    monkeypatch.setattr(results, "repo_root", lambda: tmp_path)
    forget()
    yield path
    forget()
    if hasattr(experiments, "ch99"):
        del experiments.ch99


def forget():
    """Let the next import read the file again."""
    sys.modules.pop("attnlab.lab.experiments.ch99", None)
    code_hash._bindings.cache_clear()
    code_hash._is_mechanism.cache_clear()


def rewrite(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    forget()


def calls():
    return sys.modules["attnlab.lab.experiments.ch99"].CALLS


def test_experiments_are_found_by_their_parameters(chapter):
    expected = ["99_test.coin", "99_test.die", "99_test.broken", "99_test.restless"]
    assert results.names() == expected


def test_a_table_holds_numbers_and_where_they_come_from(chapter, tmp_path):
    table = results.run("99_test.coin", (2, 0, 1), device="cpu", progress=False)
    assert table == json.loads((tmp_path / "results" / "99_test.coin.json").read_text())
    assert table["rows"]["fair"]["heads"]["values"] == [0.5, 0.6, 0.7]  # in the order of seeds
    assert table["rows"]["loaded"]["heads"]["mean"] == pytest.approx(0.7)
    assert table["rows"]["loaded"]["heads"]["std"] == pytest.approx(0.1)  # n − 1
    assert table["rows"]["loaded"]["tosses"]["std"] == 0
    assert table["seeds"] == [0, 1, 2]
    assert table["command"] == "attnlab results 99_test.coin --seeds 0 1 2"
    assert table["device"] == "cpu"
    assert table["torch"] == torch.__version__
    assert set(table) == {
        "name", "command", "code_sha256", "seeds", "device", "machine", "torch", "seconds", "rows",
    }  # fmt: skip


def test_only_missing_seeds_are_run(chapter):
    results.run("99_test.coin", (0, 1), device="cpu", progress=False)
    table = results.run("99_test.coin", (0, 1, 2), device="cpu", progress=False)
    assert calls() == [("coin", 0), ("coin", 1), ("coin", 2)]
    assert table["rows"]["fair"]["heads"]["values"] == [0.5, 0.6, 0.7]
    results.run("99_test.coin", (1, 2), device="cpu", progress=False)
    assert len(calls()) == 3


def test_a_stopped_run_keeps_its_seeds(chapter):
    rewrite(chapter, 'CALLS.append(("coin", seed))', "CALLS.append(seed) if seed < 2 else 1 / 0")
    with pytest.raises(ZeroDivisionError):
        results.run("99_test.coin", device="cpu", progress=False)
    assert results.load("99_test.coin")["seeds"] == [0, 1]
    assert results.status("99_test.coin") == "incomplete"


def test_the_status_follows_the_code(chapter):
    assert results.status("99_test.coin") == "missing"
    results.run("99_test.coin", (0,), device="cpu", progress=False)
    assert results.status("99_test.coin", [0]) == "current"
    assert results.status("99_test.coin") == "incomplete"
    assert "stale" not in str(results.show("99_test.coin"))
    rewrite(chapter, '"fair": 0.5', '"fair": 0.4')
    assert results.status("99_test.coin", [0]) == "stale"
    assert "stale: the code has changed" in str(results.show("99_test.coin"))
    table = results.run("99_test.coin", (1,), device="cpu", progress=False)
    assert table["seeds"] == [1]
    assert table["rows"]["fair"]["heads"]["values"] == [0.5]


def test_show_is_a_table_of_text_and_of_markdown(chapter, monkeypatch):
    monkeypatch.setattr(results, "machine", lambda device: "an abacus")
    results.run("99_test.coin", device="cpu", progress=False)
    caption = (
        "mean ± standard deviation of 3 seeds, an abacus: "
        "attnlab results 99_test.coin --seeds 0 1 2"
    )
    table = results.show("99_test.coin", digits=2)
    assert (
        repr(table)
        == str(table)
        == (
            "              heads        tosses\n"
            "fair    0.60 ± 0.10  10.00 ± 0.00\n"
            "loaded  0.70 ± 0.10  10.00 ± 0.00\n" + caption
        )
    )
    assert table._repr_markdown_() == (
        "|  | heads | tosses |\n| --- | ---: | ---: |\n"
        "| fair | 0.60 ± 0.10 | 10.00 ± 0.00 |\n| loaded | 0.70 ± 0.10 | 10.00 ± 0.00 |\n\n"
        + caption
    )
    results.run("99_test.die", (0,), device="cpu", progress=False)
    assert str(results.show("99_test.die")).splitlines()[1] == "six  0.167"
    assert "one seed, an abacus" in str(results.show("99_test.die"))


def test_rerun_gives_one_seed(chapter):
    assert results.rerun("99_test.coin", 3, "fair") == {"heads": 0.8, "tosses": 10}
    assert set(results.rerun("99_test.coin", 3)) == {"fair", "loaded"}
    assert results.rerun("99_test.die", 3, "six") == {"share": 0.166667}
    with pytest.raises(ValueError, match=r"row='seven': expected one of \['six'\]"):
        results.rerun("99_test.die", 0, "seven")


def test_main_makes_what_is_not_current(chapter, capsys, monkeypatch):
    monkeypatch.setattr(results, "names", lambda: ["99_test.coin", "99_test.die"])
    results.run("99_test.die", device="cpu", progress=False)
    assert results.main() == 0
    assert calls() == [("die", seed) for seed in (0, 1, 2)] + [("coin", seed) for seed in (0, 1, 2)]
    out = capsys.readouterr().out
    assert "99_test.coin: missing, running seeds 0 1 2" in out
    assert "99_test.die: current" in out
    assert results.main(["99_test.coin"], [5]) == 0
    assert results.load("99_test.coin")["seeds"] == [0, 1, 2, 5]


def test_a_stale_table_is_kept_where_its_first_seed_is_the_same(chapter, capsys):
    kept = results.run("99_test.coin", progress=False)
    rewrite(chapter, "if rows is None or row in rows}", "if rows is None or row in set(rows)}")
    assert results.main(["99_test.coin"], confirming=True) == 0
    assert "99_test.coin: current, the same numbers" in capsys.readouterr().out
    found = results.load("99_test.coin")
    assert found.pop("code_sha256") != kept.pop("code_sha256")
    assert found == kept
    assert calls() == [("coin", 0)]  # and no other seed


def test_of_a_stale_table_the_rows_that_changed_are_run_for_every_seed(chapter, capsys):
    results.run("99_test.coin", progress=False)
    rewrite(chapter, "0.5", "0.4")
    assert results.main(confirming=True) == 0
    out = capsys.readouterr().out
    assert "99_test.coin: current, other numbers:\n  fair, heads: 0.5 → 0.4\n" in out
    assert calls() == [("coin", seed) for seed in (0, 0, 1, 2)]
    confirmed = results.load("99_test.coin")
    (chapter.parent / "results/99_test.coin.json").unlink()
    anew = results.run("99_test.coin", progress=False)
    assert {**confirmed, "seconds": 0} == {**anew, "seconds": 0}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (("1 / 6", "1 / 5"), "die"),  # takes no rows
        (('"tosses": 10}', '"tosses": 10 if rows else 11}'), "coin"),  # another number alone
    ],
)
def test_a_stale_table_whose_rows_do_not_stand_alone_stays_stale(chapter, capsys, change, name):
    kept = results.run(f"99_test.{name}", progress=False)
    rewrite(chapter, *change)
    assert results.main(confirming=True) == 1
    assert f"99_test.{name}: stale, other numbers:" in capsys.readouterr().out
    assert results.load(f"99_test.{name}") == kept


def test_bad_arguments_and_numbers_are_named(chapter, tmp_path):
    for function in (results.run, results.main, lambda name: results.rerun(name, 0)):
        with pytest.raises(ValueError, match=r"name='99_test.coins': expected one of \['99_test"):
            function(["99_test.coins"] if function is results.main else "99_test.coins")
    with pytest.raises(ValueError, match=r"seeds=\(\): expected at least one"):
        results.run("99_test.coin", ())
    with pytest.raises(ValueError, match="seed=-1"):
        results.run("99_test.coin", (-1,))
    with pytest.raises(ValueError, match="row, loss=nan: expected a finite number"):
        results.run("99_test.broken", (0,), progress=False)
    with pytest.raises(ValueError, match=r"rows=\{'row 1': .*those of the other seeds: \{'row 0'"):
        results.run("99_test.restless", (0, 1), progress=False)
    with pytest.raises(ValueError, match=r"name='99_test.die': there is no 99_test.die.json"):
        results.load("99_test.die")
    (tmp_path / "results" / "99_test.die.json").write_text("{")
    with pytest.raises(ValueError, match=r"99_test.die.json is damaged .* attnlab results 99_test"):
        results.load("99_test.die")
    rewrite(chapter, 'CHAPTER = "99_test"', "")
    with pytest.raises(ValueError, match=r"CHAPTER=None: expected a name such as .*ch99"):
        results.names()


SOURCES = {
    "attnlab.lab.experiments.ch98": """
from attnlab import hidden, mechanism
from attnlab.lab import train
from attnlab.mechanism import attend as mix
from attnlab.other import unrelated

def first(seed, device):
    return mix(seed) + STEPS

STEPS = 10

def second(seed, device):
    return mechanism.attend(seed)
""",
    "attnlab": "from attnlab.other import hidden",
    "attnlab.mechanism": """
from attnlab.layers import Mlp

class Block(Mlp):
    pass

def attend(x):
    '''Attend.'''
    return Block()(x)

def bystander(x):
    return x
""",
    "attnlab.layers": "class Mlp:\n    size = 4\nclass Norm:\n    size = 2",
    "attnlab.other": "def hidden(): return 1\ndef unrelated(): return 2",
    "attnlab.lab.train": "def fit(): return 3",
}


def fingerprints(monkeypatch, module=None, old="", new=""):
    sources = dict(SOURCES)
    if module:
        assert old in sources[module]
        sources[module] = sources[module].replace(old, new)
    monkeypatch.setattr(code_hash, "_source", sources.get)
    forget()
    name = "attnlab.lab.experiments.ch98"
    found = [code_hash.code_sha256(name, function) for function in ("first", "second")]
    forget()
    return found


CH98 = "attnlab.lab.experiments.ch98"


@pytest.mark.parametrize(
    ("module", "old", "new", "changed"),
    [
        (CH98, "STEPS = 10", "STEPS = 10  # of the budget\n", (False, False)),
        (CH98, "STEPS = 10", "STEPS = 11", (True, False)),
        (CH98, "attend(seed)", "attend( seed\n  )", (False, False)),
        (CH98, "attend(seed)", "attend(seed, 1)", (False, True)),
        (CH98, "return mix", '"""First."""\n    return mix', (False, False)),
        ("attnlab.mechanism", "'''Attend.'''", "'''Attend to x.'''", (False, False)),
        ("attnlab.mechanism", "Block()(x)", "Block()(-x)", (True, True)),
        ("attnlab.mechanism", "return x\n", "return -x\n", (False, False)),
        ("attnlab.layers", "size = 4", "size = 5", (True, True)),
        ("attnlab.layers", "size = 2", "size = 3", (False, False)),
        ("attnlab.other", "return 2", "return 22", (False, False)),
        ("attnlab.lab.train", "return 3", "return 33", (False, False)),
    ],
)
def test_the_hash_changes_with_the_code_that_is_reached(monkeypatch, module, old, new, changed):
    before = fingerprints(monkeypatch)
    after = fingerprints(monkeypatch, module, old, new)
    assert tuple(a != b for a, b in zip(before, after, strict=True)) == changed


def test_names_of_the_package_itself_are_followed(monkeypatch):
    use = ("attend(seed)", "attend(seed) + hidden()")
    before = fingerprints(monkeypatch, CH98, *use)
    monkeypatch.setitem(SOURCES, CH98, SOURCES[CH98].replace(*use))
    after = fingerprints(monkeypatch, "attnlab.other", "return 1", "return 11")
    assert before[0] == after[0]
    assert before[1] != after[1]


@pytest.mark.parametrize(
    ("use", "changed"),
    [
        ("(mechanism.attend)(seed)", False),
        ("map(mechanism.attend, seed)", False),
        ("getattr(mechanism, NAME)(seed)", True),
        ("mechanism.layers(seed)", True),
    ],
)
def test_a_module_that_is_handed_on_is_followed_as_a_whole(monkeypatch, use, changed):
    """Of `mechanism.attend` only `attend` counts; where the attribute cannot be told, all do."""
    chapter = SOURCES[CH98].replace("mechanism.attend(seed)", use)
    monkeypatch.setitem(SOURCES, CH98, chapter)
    before = fingerprints(monkeypatch)
    after = fingerprints(monkeypatch, "attnlab.mechanism", "return x\n", "return -x\n")
    assert (before[1] != after[1]) is changed


def test_of_a_package_the_attribute_is_followed(monkeypatch):
    chapter = SOURCES[CH98].replace("from attnlab import hidden, mechanism", "import attnlab")
    chapter = chapter.replace("mechanism.attend(seed)", "attnlab.hidden(seed)")
    monkeypatch.setitem(SOURCES, CH98, chapter)
    monkeypatch.setitem(SOURCES, "attnlab", "from attnlab.other import hidden, unrelated")
    before = fingerprints(monkeypatch)
    assert fingerprints(monkeypatch, "attnlab.other", "return 2", "return 22")[1] == before[1]
    assert fingerprints(monkeypatch, "attnlab.other", "return 1", "return 11")[1] != before[1]
