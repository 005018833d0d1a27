"""`attnlab grade` against learners who were careless, and against some who were not honest.

Every submission here has a right `causal_mask`: whatever it does elsewhere, that one has to count.
"""

import csv
import inspect
import json
import os
import socket
from pathlib import Path

import nbformat
import pytest
import torch
from bad_submissions import CARELESS, HARMLESS, HOSTILE, RIGHT, SECRET

from attnlab.cli import main as command_line
from attnlab.lab import grading
from attnlab.lab.exercises import catalogue
from attnlab.lab.exercises.ch01 import entropy
from attnlab.lab.grading_sandbox import Runner, Sandbox, SandboxError

CHAPTER = [exercise for exercise in catalogue().values() if exercise.chapter == "01"]
MASK = """
def causal_mask(num_queries, num_keys):
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool)
    return mask.tril(diagonal=num_keys - num_queries)
"""
ANSWERS = {c.args[0].sum().item(): entropy(c.args[0]).tolist() for c in CHAPTER[0].cases(0)}

SCRIPTS = {**HARMLESS, **CARELESS, **HOSTILE, "stub": CHAPTER[0].stub}
STATUS = {"stub": "not attempted", "no entropy": "missing", "syntax": "missing"}


@pytest.fixture(scope="module")
def sandbox():
    try:
        made = Sandbox()
    except SandboxError as error:
        pytest.skip(str(error))
    with made:
        yield made


@pytest.fixture(scope="module", autouse=True)
def shared(sandbox):
    """The grader uses the sandbox that is there, and leaves it running."""

    class Shared:
        control, errors = sandbox.control, sandbox.errors

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.close()

        def close(self):
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grading, "Sandbox", lambda protected: Shared())
        yield


def notebook(*sources: str) -> str:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    return nbformat.writes(nbformat.v4.new_notebook(cells=cells))


def graded(folder: Path, seconds: float = 10, **options) -> dict[str, dict[str, dict]]:
    """File → exercise's function → its result."""
    records = grading.grade(
        folder, folder.parent / "grades.csv", seeds=[11], seconds=seconds, **options
    )
    return {
        Path(r["submission"]).stem: {e["exercise"].split(".")[1]: e for e in r["results"]}
        for r in records
    }


@pytest.fixture(scope="module")
def results(shared, tmp_path_factory):
    """All scripts in one class, graded once."""
    folder = tmp_path_factory.mktemp("class") / "submissions"
    folder.mkdir()
    known = f"ANSWERS = {ANSWERS}\nNEIGHBOUR = {str(folder / 'neighbour.py')!r}\n"
    for name, source in SCRIPTS.items():
        cells = [f"import torch\n{known}", source, MASK]
        (folder / f"{name}.py").write_text("".join(f"# %%\n{cell}\n" for cell in cells))
    (folder / "link.py").symlink_to(folder / "right.py")
    return folder, graded(folder, chapters=["01"])


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_submission_gets_what_it_deserves(results, name):
    found = results[1][name]
    expected = "correct" if name in HARMLESS else STATUS.get(name, "wrong")
    assert found["entropy"]["status"] == expected, found["entropy"]
    assert found["causal_mask"]["status"] == "correct", found["causal_mask"]
    assert found["rollout"]["status"] == "missing"
    assert SECRET not in str(found)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raises", "line 3: return weights.nothing"),
        ("endless loop", "It was stopped after 10 seconds."),
        ("exits", "It ended its process"),
        ("fork bomb", "BlockingIOError"),
        ("thread bomb", "can't start new thread"),
        ("memory", "allocate memory"),
        ("shared memory", "Cannot allocate memory"),
        ("fills the disk", "File too large|No space left"),
        ("syntax", "Code cell 3 is not Python: SyntaxError"),
        ("in place", "It writes to its input weights."),
        ("no parameters", "It cannot be called with"),
        ("visible seed", "Right on the chapter's numbers, not on others"),
        ("reads", "FileNotFoundError"),
        ("borrows", "ModuleNotFoundError"),
        ("number", "is an int, not a function"),
    ],
)
def test_a_report_says_what_happened(results, name, words):
    folder, found = results
    report = (folder.parent / "grades" / f"{name}.py.txt").read_text()
    assert any(word in report for word in words.split("|")), report
    assert "attention.causal_mask: correct" in report
    if found[name]["entropy"]["status"] == "wrong" and name != "number":
        assert "hint: " in report


def test_the_table_has_a_row_for_each_file_and_none_for_links(results):
    folder, _ = results
    with open(folder.parent / "grades.csv", newline="", encoding="utf-8") as file:
        rows = {row["submission"]: row for row in csv.DictReader(file)}
    assert len(rows) == len(SCRIPTS)
    assert rows["right.py"]["attention.entropy"] == "correct"
    assert (rows["'=1+1.py"]["solved"], rows["'=1+1.py"]["of"]) == ("2", "6")
    assert f"{len(SCRIPTS)} submissions" in (folder.parent / "grades" / "summary.txt").read_text()


PROBES = {
    "os.listdir('/proc')": "No such file",
    "os.listdir('/sys')": "No such file",
    "os.listdir('/home')": "No such file",
    "os.fork()": "temporarily unavailable",
    "socket.create_connection(('127.0.0.1', PORT), 2)": "Network is unreachable|refused|assign",
    "socket.create_connection(('192.0.2.1', 80), 2)": "Network is unreachable",
    "open('/new', 'w')": "Read-only",
    "open('/usr/new', 'w')": "Read-only",
    "open(attnlab.__file__, 'a')": "Read-only|denied",
    "os.chroot('/scratch')": "not permitted",
    "os.setuid(1)": "not permitted|Invalid argument",
    "open('/etc/passwd')": "No such file",
    "os.kill(1, 9) or os.kill(os.getppid(), 9)": "",
    "os.open('/dev/sda', os.O_RDONLY)": "No such file",
    "subprocess.run(['unshare', '--user', 'true'])": "temporarily unavailable",
    "bytearray(3 * 2**30)": "",
    "[n for n in os.listdir(os.path.dirname(framework.__file__)) if n[:2] == 'ch'][0]": "range",
    "catalogue()['attention.entropy']": "attention.entropy",
}


def test_nothing_of_the_machine_is_to_be_had(sandbox):
    """Each probe has to raise, with these words."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        # os.kill(1, 9) is silent: the first process of a namespace gets no signal from inside.
        source = f"""
import os, socket, subprocess, attnlab
from attnlab.lab.exercises import catalogue, framework
PORT = {port}
def probe(text):
    os, socket, subprocess, attnlab, catalogue, framework, PORT
    try:
        return f"worked: {{eval(text)}}"
    except BaseException as error:
        return f"{{type(error).__name__}}: {{error}}"
"""
        found = called(sandbox, source, "probe", [(text,) for text in PROBES])
    for (probe, words), outcome in zip(PROBES.items(), found, strict=True):
        if "os.kill" not in probe:
            assert not outcome["output"].startswith("worked"), f"{probe} {outcome['output']}"
        assert any(word in outcome["output"] for word in words.split("|")), (probe, outcome)


def called(sandbox, source: str, name: str, cases: list[tuple]) -> list[dict]:
    with Runner(sandbox) as runner:
        runner.allow(60)
        assert runner.ask_file(source.encode(), notebook=False)["unreadable"] == ""
        runner.ask({"name": name, "prelude": "", "cases": cases})
        assert runner.get()["callable"] is True
        return [runner.get() for _ in cases]


def outcome(output=None, **others) -> dict:
    said = {"output": output, "clash": "", "raised": "", "untouched": False, "written": ()}
    return {**said, "printed": "", **others}


FOUND = {"found": True, "problem": "", "callable": True, "shown": None}
JUNK = type("", (), {})()


@pytest.mark.parametrize(
    "messages",
    [
        [], [None], [{}], ["correct"], [{"unreadable": "", "problems": 3}],
        [{"unreadable": JUNK, "problems": []}],
        *([{"unreadable": "", "problems": [JUNK, "\ud800"]}, *rest] for rest in (
            [], [None], [{**FOUND, "callable": "yes"}], [{**FOUND, "callable": 0, "shown": JUNK}],
            [{**FOUND, "found": False, "problem": torch.ones(3)}], [FOUND], [FOUND, 3],
            [FOUND, {"status": "correct"}], [FOUND, outcome(written=3)],
            [FOUND, outcome(written=[99, -1, float("inf")])], [FOUND, outcome(JUNK)],
            [FOUND, outcome(raised="\ud800" * 10**6)], [FOUND, outcome(clash=torch.ones(2))],
            [FOUND, outcome([torch.ones(2)] * 9)], [FOUND, outcome(torch.tensor(float("nan")))],
        )),
    ],
)  # fmt: skip
def test_no_message_gives_a_verdict_or_stops_the_run(messages, tmp_path):
    """A process that a submission has taken over can send what it likes."""

    class Forged:
        said = iter(messages)

        def get(self):
            return next(self.said)

        def ask_file(self, content, notebook):
            return self.get()

        def ask(self, value):
            pass

        def allow(self, seconds):
            pass

    said = {}
    grading._ask_all(Forged(), b"", False, CHAPTER[:1], [0, 1], 1, said)
    result = grading._verdict(CHAPTER[0], [0, 1], said)
    assert result["status"] in ("wrong", "missing", "unreadable")
    assert len(result["text"]) <= grading.MAX_TEXT
    grading.write_report(tmp_path / "a.txt", {"submission": "a", "results": [result]})
    grading.write_json(tmp_path / "a.json", result)


def test_a_folder_of_one_submission_is_not_that_of_the_next(sandbox):
    source = "import os\ndef f(x):\n    open('left', 'w').write('x')\n    return os.listdir('.')\n"
    for _ in range(2):
        assert called(sandbox, source, "f", [(1,)])[0]["output"] == ["left"]


def test_notebooks_in_every_state(tmp_path):
    folder = tmp_path / "class"
    stubs = [exercise.stub for exercise in CHAPTER]
    answers = [inspect.getsource(exercise.solution) for exercise in CHAPTER]
    imports = "import torch\nfrom einops import einsum, rearrange"
    check = 'lab.check("attention.entropy", entropy)'
    large = json.loads(notebook(imports, *answers, check))
    large["cells"][0]["outputs"] = [
        {"output_type": "stream", "name": "stdout", "text": "x" * 50_000_000}
    ]
    files = {
        "anna/right.ipynb": notebook(imports, *answers, check),
        "anna/.ipynb_checkpoints/right.ipynb": "",
        "reordered.ipynb": notebook(check, *reversed(answers), imports),
        "deleted.ipynb": notebook(*answers[1:], check),
        "untouched.ipynb": notebook(imports, *stubs, check),
        "large.ipynb": json.dumps(large),
        "cut.ipynb": notebook(imports, *answers, check)[:-300],
        "empty.ipynb": "",
        "deep.ipynb": "[" * 1_000_000,
        "binary.ipynb": "\udcff\0",
        "caf\udce9.ipynb": notebook(imports, *answers),
        f"{'long' * 60}.ipynb": notebook(imports, *answers),
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    (folder / "huge.py").touch()
    os.truncate(folder / "huge.py", grading.MAX_FILE + 1)
    found = graded(folder)
    statuses = {name: {r["status"] for r in rows.values()} for name, rows in found.items()}
    solved = {"correct"}
    assert statuses.pop("deleted") == {"correct", "missing"}
    assert statuses.pop("caf\\udce9") == solved
    assert statuses.pop(next(name for name in statuses if name.startswith("long"))) == solved
    assert statuses == {
        "right": solved, "reordered": solved, "large": solved, "untouched": {"not attempted"},
        **{name: {"unreadable"} for name in ("cut", "empty", "deep", "binary", "huge")},
    }  # fmt: skip
    assert (tmp_path / "grades" / "anna" / "right.ipynb.txt").exists()


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "class"
    folder.mkdir()
    for name in "abcd":
        (folder / f"{name}.py").write_text(f"import torch\n{RIGHT}{MASK}# {name}")
    write, written = grading.write_report, []

    def interrupted(path, record):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(path, record)

    monkeypatch.setattr(grading, "write_report", interrupted)
    out = tmp_path / "grades.csv"
    assert command_line(["grade", str(folder), "--out", str(out), "--jobs", "1"]) == 130
    assert "goes on from here" in capsys.readouterr().err
    assert not out.exists()
    seeds = (tmp_path / "grades" / "run.json").read_text()

    ran = []
    run = grading.run
    monkeypatch.setattr(grading, "run", lambda s, *rest: ran.append(s.name) or run(s, *rest))
    monkeypatch.setattr(grading, "write_report", write)
    assert command_line(["grade", str(folder), "--out", str(out)]) == 0
    assert len(ran) == 2
    assert len(out.read_text().splitlines()) == 5
    assert (tmp_path / "grades" / "run.json").read_text() == seeds

    ran.clear()
    (folder / "b.py").write_text(f"import torch\n{MASK}# entropy is gone")
    (tmp_path / "grades" / "c.py.json").write_text("{")
    command_line(["grade", str(folder), "--out", str(out)])
    assert sorted(ran) == ["b.py", "c.py"]


def test_what_is_not_there_is_said(tmp_path, capsys):
    for arguments, words in (
        ([str(tmp_path / "none")], "expected a folder"),
        ([str(tmp_path)], "there is no .ipynb and no .py file"),
        ([str(tmp_path), "--chapters", "99"], "chapters ['99']: expected some of 00, 01"),
        ([str(tmp_path), "--out", "grades"], "out 'grades': expected a file name that ends"),
    ):
        assert command_line(["grade", "--out", str(tmp_path / "grades.csv"), *arguments]) == 2
        assert words in capsys.readouterr().err


def test_without_namespaces_it_refuses_and_says_what_would_be_open(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.py").write_text(RIGHT)
    monkeypatch.setattr(grading, "Sandbox", Sandbox)
    monkeypatch.setattr("attnlab.lab.grading_sandbox.NAMESPACES", ("--no-such-option",))
    assert command_line(["grade", str(tmp_path), "--out", str(tmp_path / "g.csv")]) == 2
    text = capsys.readouterr().err
    assert "Linux namespaces cannot be had here" in text
    assert "--unprotected" in text
    assert "use the network" in text


def test_without_protection_the_verdict_is_still_the_graders(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(grading, "Sandbox", Sandbox)
    folder = tmp_path / "class"
    folder.mkdir()
    for name in ("right", "overwrites", "exits"):
        (folder / f"{name}.py").write_text(f"import torch\n{SCRIPTS[name]}{MASK}")
    out = tmp_path / "grades.csv"
    options = ["--out", str(out), "--unprotected", "--seconds", "10"]
    assert command_line(["grade", str(folder), *options]) == 0
    assert "NOT PROTECTED" in capsys.readouterr().err
    with open(out, newline="", encoding="utf-8") as file:
        rows = {row["submission"]: row["attention.entropy"] for row in csv.DictReader(file)}
    assert rows == {"right.py": "correct", "overwrites.py": "wrong", "exits.py": "wrong"}
