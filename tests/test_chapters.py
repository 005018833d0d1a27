"""The chapters: source and notebook in step, executed, tagged, short, and readable.

What the cells compute is checked by `pytest --nbval` on the notebooks themselves.
"""

import ast
import base64
import importlib
import io
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jupytext")
pytest.importorskip("nbval")
from PIL import Image

from attnlab.lab.exercises import catalogue

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = ROOT / "chapters"
SOURCES = sorted((CHAPTERS / "source").glob("*.py"))

sys.path.insert(0, str(ROOT / "scripts"))
builder = importlib.import_module("build_chapters")

HEADER = """\
# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

"""
TAGS = {"active-ipynb", "exercise", "explorer", "nbval-ignore-output", "raises-exception"}
SLIDES = {"slide", "subslide", "fragment", "notes", "skip", "-"}
PICTURES = {"image/png", "image/jpeg", "image/webp"}
BLOCKED = (
    "IPython", "ipykernel", "ipywidgets", "jupyter_client", "jupyter_core", "jupyter_server",
    "jupyterlab", "jupytext", "nbclient", "nbconvert", "nbformat", "nbval", "traitlets",
)  # fmt: skip
# Python's own import system asks these finders in turn; the first one says no.
WITHOUT_JUPYTER = """
import runpy, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is not on this machine", name=name)

sys.meta_path.insert(0, Missing())
sys.path[0] = {folder!r}
runpy.run_path({path!r}, run_name="__main__")
"""

every_chapter = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)


def cells(source: Path, kind: str) -> list:
    return [cell for cell in builder.read_source(source).cells if cell.cell_type == kind]


def tags(cell) -> set[str]:
    return set(cell.metadata.get("tags", []))


def outputs(source: Path) -> list[tuple]:
    """Every output of the stored notebook with its cell."""
    return [(cell, output) for cell in stored(source).cells for output in cell.get("outputs", [])]


def stored(source: Path):
    notebook = builder.read_notebook(CHAPTERS / f"{source.stem}.ipynb")
    assert notebook is not None, f"{source.stem} has no notebook: make chapters"
    return notebook


def prose(cell) -> str:
    """A text cell without its code, formulas, links and HTML."""
    return re.sub(r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\]\([^)]*\)|<[^>]*>", " ", cell.source,
                  flags=re.DOTALL)  # fmt: skip


def test_there_are_chapters_and_each_notebook_has_a_source():
    stems = [source.stem for source in SOURCES]
    assert {"00_start_here", "01_attention"} <= set(stems)
    assert all(re.fullmatch(r"\d\d_[a-z_]+", stem) for stem in stems)
    assert sorted(notebook.stem for notebook in CHAPTERS.glob("*.ipynb")) == stems


@every_chapter
def test_source_and_notebook_are_in_step(source):
    work = builder.state(source, CHAPTERS / f"{source.stem}.ipynb")
    assert work == "current", f"{source.stem} is stale ({work}): make chapters"


@every_chapter
def test_every_code_cell_was_run_in_order(source):
    counts = [cell.execution_count for cell in stored(source).cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))


@every_chapter
def test_only_cells_that_say_so_raise(source):
    for cell in stored(source).cells:
        raised = any(output.output_type == "error" for output in cell.get("outputs", []))
        assert raised == ("raises-exception" in tags(cell)), cell.source


@every_chapter
def test_the_header_holds_nothing_of_one_machine(source):
    assert source.read_text(encoding="utf-8").startswith(HEADER)


@every_chapter
def test_every_cell_has_its_place_in_the_lecture_and_known_tags(source):
    for cell in builder.read_source(source).cells:
        assert cell.source.strip(), "an empty cell"
        assert cell.metadata.get("slideshow", {}).get("slide_type") in SLIDES, cell.source
        assert tags(cell) <= TAGS, cell.source
        assert set(cell.metadata) <= {"slideshow", "tags", "exercise"}, cell.source


@every_chapter
def test_few_outputs_are_ignored_and_none_that_carries_a_claim(source):
    code = cells(source, "code")
    ignored = [cell for cell in code if "nbval-ignore-output" in tags(cell)]
    assert 5 * len(ignored) <= len(code)
    for cell in ignored:
        assert "claim(" not in cell.source, cell.source


@every_chapter
def test_code_fits_on_a_screen_and_runs_anywhere(source):
    for cell in cells(source, "code"):
        assert len(cell.source.splitlines()) <= 25, cell.source
        assert ".cuda()" not in cell.source, cell.source
        assert not re.search(r"#\s*NBVAL_", cell.source), cell.source
        assert not re.search(r"^\s*[%!]", cell.source, re.MULTILINE), "no magic in a plain script"


@every_chapter
def test_a_cell_that_raises_is_a_comment_in_the_script(source):
    for cell in cells(source, "code"):
        assert ("raises-exception" in tags(cell)) == ("active-ipynb" in tags(cell)), cell.source


@every_chapter
def test_headings(source):
    text = "\n\n".join(re.sub(r"```.*?```", "", cell.source, flags=re.DOTALL)
                       for cell in cells(source, "markdown"))  # fmt: skip
    headings = re.findall(r"^(#+) +(\S.*)$", text, re.MULTILINE)
    levels = [len(hashes) for hashes, _ in headings]
    assert builder.read_source(source).cells[0].source.startswith(f"# {source.stem[:2]} · ")
    assert levels.count(1) == 1
    assert all(below <= above + 1 for above, below in itertools.pairwise(levels))
    titles = [title for _, title in headings]
    assert len(set(titles)) == len(titles), "links to a heading need its title to be the only one"


@every_chapter
def test_pictures_in_the_text_have_alternative_text(source):
    for cell in cells(source, "markdown"):
        assert not re.search(r"!\[\s*\]", cell.source), cell.source
        for image in re.findall(r"<img\b[^>]*>", cell.source):
            assert re.search(r"""\balt=(["'])\s*\S.*?\1""", image), image


@every_chapter
def test_prose_is_plain(source):
    for cell in cells(source, "markdown"):
        found = re.search(r"!(?!\[)|\b(simply|obviously)\b", prose(cell), re.IGNORECASE)
        assert found is None, f"{found[0]!r} in: {cell.source}"


@every_chapter
def test_exercises_are_those_of_the_library_with_the_same_stubs(source):
    code = cells(source, "code")
    exercises = [e for e in catalogue().values() if e.chapter == source.stem[:2]]
    placed = [cell for cell in code if "exercise" in tags(cell)]
    assert [cell.metadata.get("exercise") for cell in placed] == [e.name for e in exercises]
    for cell, exercise in zip(placed, exercises, strict=True):
        assert ast.dump(ast.parse(cell.source)) == ast.dump(ast.parse(exercise.stub)), (
            f"the cell should hold\n{exercise.stub}"
        )
        after = code[code.index(cell) + 1]
        name = exercise.solution.__name__
        assert after.source == f'lab.check("{exercise.name}", {name})'
    for cell in code:
        assert ("exercise" in cell.metadata) == ("exercise" in tags(cell)), cell.source


@every_chapter
def test_the_notebook_is_light(source):
    everything = outputs(source)
    assert (CHAPTERS / f"{source.stem}.ipynb").stat().st_size <= 2**20
    for cell, output in everything:
        data = output.get("data", {})
        assert len(data.get("text/html", "")) <= 300 * 1024, cell.source
        assert {kind for kind in data if kind.startswith("image/")} <= PICTURES, cell.source
        if "image/png" in data:
            picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
            assert max(picture.info.get("dpi", (0, 0))) <= 80.1, cell.source


@every_chapter
def test_no_output_names_a_place_on_one_machine(source):
    for cell, output in outputs(source):
        text = str(output)
        for place in (str(ROOT), str(Path.home()) + os.sep, "/site-packages/", "/tmp/"):
            assert place not in text, cell.source


def run_without_jupyter(path: Path) -> subprocess.CompletedProcess:
    program = WITHOUT_JUPYTER.format(blocked=BLOCKED, folder=str(path.parent), path=str(path))
    environment = os.environ | {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "2"}
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("source", SOURCES[:2], ids=lambda source: source.stem)
def test_a_chapter_runs_as_a_plain_script_without_jupyter(source):
    run = run_without_jupyter(source)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    for exercise in catalogue().values():
        if exercise.chapter == source.stem[:2]:
            assert f"○ {exercise.name}: not attempted" in run.stdout


@pytest.mark.parametrize("module", ["IPython", "ipywidgets", "jupyter_client.manager"])
def test_the_plain_script_really_has_no_jupyter(module, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import {module}\n")
    run = run_without_jupyter(script)
    assert run.returncode != 0
    assert f"{module.partition('.')[0]} is not on this machine" in run.stderr
