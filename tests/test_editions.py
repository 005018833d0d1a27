"""The editions of `make handout`: the student's and the teacher's differ in the exercises alone."""

import ast
import importlib
import inspect
import io
import json
import re
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("jupytext")
pytest.importorskip("nbval")

from attnlab.lab import exercises, grading
from attnlab.lab.exercises import catalogue, judge, recorded

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
editions = importlib.import_module("make_editions")
builder = editions.builder

NOTEBOOKS = editions.chapters()
ALL = list(catalogue().values())
every_chapter = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
every_exercise = pytest.mark.parametrize("exercise", ALL, ids=lambda exercise: exercise.name)


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    """The student's zip, unpacked."""
    folder = tmp_path_factory.mktemp("student")
    editions.pack(folder / "student.zip", dict(editions.student()))
    with zipfile.ZipFile(folder / "student.zip") as archive:
        archive.extractall(folder)
    return folder / "attnlab"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> zipfile.ZipFile:
    path = tmp_path_factory.mktemp("teacher") / "teacher.zip"
    editions.pack(path, dict(editions.teacher()))
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def without_solutions(student) -> dict:
    file = student / "attnlab/lab/exercises/exercises.safetensors"
    return {exercise.name: exercise for exercise in recorded.read(file)}


@every_chapter
def test_only_the_exercises_cells_differ(path, student, teacher):
    ours = json.loads((student / "chapters" / path.name).read_text(encoding="utf-8"))
    theirs = json.loads(teacher.read(f"attnlab/chapters/{path.name}"))
    assert len(ours["cells"]) == len(theirs["cells"])
    after_exercise = False
    for one, other in zip(ours["cells"], theirs["cells"], strict=True):
        exercise = one["metadata"].get("exercise")
        if exercise:
            assert one.pop("source") != other.pop("source")
        if after_exercise:
            before, after = str(one.pop("outputs")), str(other.pop("outputs"))
            assert f"{after_exercise}: not attempted" in before
            assert f"{after_exercise}: correct" in after
        assert one == other
        if one["cell_type"] == "code":
            after_exercise = exercise
    assert ours["metadata"].pop("attnlab") != theirs["metadata"].pop("attnlab")
    assert ours["metadata"] == theirs["metadata"]


@every_chapter
def test_each_solution_is_correct_where_the_teachers_edition_has_it(path, teacher):
    """The imports of the cells before it, then the cell itself: a whole run is --execute."""
    cells = json.loads(teacher.read(f"attnlab/chapters/{path.name}"))["cells"]
    code = [(c["metadata"], "".join(c["source"])) for c in cells if c["cell_type"] == "code"]
    statements, _ = editions.read_statements([source for _, source in code])
    scope = {}
    for statement in statements:
        if type(statement.node).__name__ in ("Import", "ImportFrom"):
            exec(ast.unparse(statement.node), scope)
    for metadata, source in code:
        if name := metadata.get("exercise"):
            own = dict(scope)
            exec(source, own)
            assert judge(catalogue()[name], own[name.split(".")[1]], seed=3).status == "correct"


def test_every_chapter_that_is_ready_has_notes_with_timings_and_answers(teacher):
    members = set(teacher.namelist())
    overview = (ROOT / "chapters" / "README.md").read_text(encoding="utf-8")
    ready = [p for p in NOTEBOOKS if any(
        p.name in line and "| ready |" in line for line in overview.splitlines())]  # fmt: skip
    assert ready
    for path in ready:
        assert f"attnlab/notes/{path.stem}.md" in members
        text = teacher.read(f"attnlab/notes/{path.stem}.md").decode()
        for part in ("**Goals.**", "| minutes |", "**Ask the class.**", "students get stuck"):
            assert part in text, f"{path.stem}: {part}"
        assert text.count("\n# ") == 0


def test_a_student_gets_what_is_needed_to_start(student):
    for name in ("Makefile", "scripts/bootstrap.py", "scripts/commands.py", "requirements.lock",
                 "pyproject.toml", "data/CREDITS.md", "LICENSE", "LICENSE-SUMMARY.md",
                 "chapters/00_start_here.ipynb", "attnlab/lab/files.py"):  # fmt: skip
        assert (student / name).is_file(), name
    for name in ("tests", "benchmarks", "chapters/source", "notes"):
        assert not (student / name).exists(), name


def test_each_edition_says_what_it_is_and_no_link_in_it_is_broken(student, teacher, tmp_path):
    teacher.extractall(tmp_path)
    for folder, first, title in (
        (student, "README.md", "# attnlab, the class's edition\n"),
        (tmp_path / "attnlab", "notes/README.md", "# attnlab, the teacher's edition\n"),
    ):
        assert (folder / first).read_text(encoding="utf-8").startswith(title)
        for page in [*folder.rglob("*.md"), *folder.glob("chapters/*.ipynb")]:
            if page.parent.name == "handout":  # its links hold where it is laid
                continue
            text = page.read_text(encoding="utf-8")
            if page.suffix == ".ipynb":
                cells = json.loads(text)["cells"]
                prose = (cell["source"] for cell in cells if cell["cell_type"] == "markdown")
                text = "\n".join(map("".join, prose))
            for link in re.findall(r"\]\(([^)#\s:]+)[)#]", text):
                assert (page.parent / link).exists(), f"{page.relative_to(folder)}: {link}"


def text_of(path: Path) -> str:
    text = path.read_bytes().decode("utf-8", errors="replace")
    if path.suffix != ".ipynb":
        return text
    return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])


def test_no_solution_and_no_teachers_note_is_in_the_students_edition(student):
    # The mechanisms' own modules are what the chapters teach: an answer may be found there.
    paths = [*student.glob("chapters/*"), *student.glob("attnlab/lab/**/*")]
    texts = [text_of(path) for path in paths if path.is_file()]
    flat = [" ".join(text.split()) for text in texts]
    for exercise in ALL:
        source = textwrap.dedent(inspect.getsource(exercise.solution))
        body = source.split('"""')[2] if exercise.bug is None else exercise.bug[0]
        body = " ".join(body.split())
        if len(body) >= 60:  # a shorter body is an expression that the library may well use
            assert not any(body in text for text in flat), exercise.name
    assert not any("**Ask the class.**" in text for text in texts)


@every_exercise
def test_a_check_without_the_solution_says_the_same(exercise, without_solutions):
    other = without_solutions[exercise.name]
    assert (other.chapter, other.stub, other.hints) == (
        exercise.chapter, exercise.stub, exercise.hints,
    )  # fmt: skip
    functions = [exercise.solution, exercise.start(), lambda *args: None, lambda: None]
    functions += [function for _, function in exercise.mistakes]
    for function in functions:
        assert judge(other, function) == judge(exercise, function)
    assert inspect.signature(other.solution) == inspect.signature(exercise.solution)


def test_the_catalogue_is_that_of_the_file_where_there_is_one(student, monkeypatch):
    file = student / "attnlab/lab/exercises/exercises.safetensors"
    monkeypatch.setattr(exercises, "RECORDED", file)
    catalogue.cache_clear()
    try:
        assert list(catalogue()) == [exercise.name for exercise in ALL]
        assert type(catalogue()["start.normalize"]).__name__ == "Recorded"
        assert "no solutions" in exercises.solution("start.normalize").text
        assert "Divide" not in exercises.hint("start.normalize").text
    finally:
        catalogue.cache_clear()


def test_the_students_first_chapter_runs_with_the_students_library(student):
    notebook = builder.read_notebook(student / "chapters" / "00_start_here.ipynb")
    notebook.cells.insert(0, builder.nbformat.v4.new_code_cell("import attnlab\nattnlab.__file__"))
    builder.execute(notebook, student / "chapters", PYTHONPATH=str(student))
    assert str(student) in str(notebook.cells[0].outputs)
    assert "start.normalize: not attempted" in str(notebook.cells)


def test_the_teachers_first_chapter_runs(teacher, tmp_path):
    teacher.extractall(tmp_path)
    chapter = tmp_path / "attnlab" / "chapters" / NOTEBOOKS[0].name
    assert editions.run(chapter, "correct") > 0
    with pytest.raises(builder.BuildError, match="expected 'not attempted'"):
        editions.run(chapter, "not attempted")


def test_a_chapter_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    ran = []

    def run(chapter, verdict):
        assert (chapter.parents[1] / "a").read_bytes() == b"1"
        ran.append((chapter.stem[:2], verdict))
        if chapter.stem.startswith("01"):
            raise builder.BuildError("no luck")
        return 2.0

    monkeypatch.setattr(editions, "run", run)
    for edition in ("student", "teacher"):
        monkeypatch.setattr(editions, edition, lambda: [("a", b"1")])
    assert editions.main(["--out", str(tmp_path), "--execute", "01", "02"]) == 1
    assert ran == [("01", "not attempted"), ("02", "not attempted"),
                   ("01", "correct"), ("02", "correct")]  # fmt: skip
    said = capsys.readouterr()
    assert "attnlab-teacher, 02_non_local: 2 s" in said.out
    assert "attnlab-student, 01_attention failed.\nno luck" in said.err
    assert editions.main(["--out", str(tmp_path), "--execute", "00"]) == 0
    assert editions.main(["--out", str(tmp_path), "--execute", "77"]) == 1
    assert "There is no chapter '77'" in capsys.readouterr().err


def test_the_command_writes_both_the_same_every_time(tmp_path, monkeypatch):
    members = {"a.py": b"#!/bin/sh", "b.md": "é".encode()}
    for folder in ("one", "two"):
        editions.pack(tmp_path / folder / "x.zip", members)
    contents = [(tmp_path / folder / "x.zip").read_bytes() for folder in ("one", "two")]
    assert contents[0] == contents[1]
    archive = zipfile.ZipFile(io.BytesIO(contents[0]))
    assert archive.getinfo("attnlab/a.py").external_attr >> 16 == 0o755
    assert archive.read("attnlab/b.md").decode() == "é"
    monkeypatch.setattr(editions, "student", lambda: [("a", b"1")])
    monkeypatch.setattr(editions, "teacher", lambda: [("a", b"2")])
    assert editions.main(["--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.glob("*.zip")} == {
        "attnlab-student.zip", "attnlab-teacher.zip",
    }  # fmt: skip


def test_without_a_checkout_it_says_what_it_needs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(editions, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert editions.main(["--out", str(tmp_path)]) == 1
    assert "needs git" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_class_edition_does_not_grade(monkeypatch, tmp_path):
    monkeypatch.setattr(grading, "RECORDED", Path(__file__))
    with pytest.raises(ValueError, match="this edition has no solutions"):
        grading.grade(tmp_path, tmp_path / "grades.csv")


def test_make_handout_is_this_script():
    commands = importlib.import_module("commands")
    assert commands.COMMANDS["handout"] == [["scripts/make_editions.py"]]
    assert "\nhandout:" in (ROOT / "Makefile").read_text()
