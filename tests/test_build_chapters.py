"""scripts/build_chapters.py: what runs again, what is kept, and what is refused."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("jupytext")
pytest.importorskip("nbval")
import nbformat

ROOT = Path(__file__).resolve().parents[1]
SOURCE = """\
# %% [markdown] slideshow={"slide_type": "slide"}
# # A chapter

# %% slideshow={"slide_type": "fragment"}
import sys
from pathlib import Path

runs = Path("runs")
runs.write_text(runs.read_text() + "x" if runs.exists() else "x")
print("a warning with a path", file=sys.stderr)
print("hello")

# %% tags=["raises-exception", "active-ipynb"] slideshow={"slide_type": "fragment"}
# Path("missing").read_text()

# %% tags=["exercise"] exercise="attention.entropy" slideshow={"slide_type": "subslide"}
def entropy(weights):
    raise NotImplementedError


# %% slideshow={"slide_type": "fragment"}
from ipywidgets import HTML, IntSlider, Output

unused = HTML("not shown")
IntSlider(3)

# %% slideshow={"slide_type": "fragment"}
shown = Output()
with shown:
    print("inside")
shown
"""


@pytest.fixture(scope="module")
def builder():
    sys.path.insert(0, str(ROOT / "scripts"))
    return importlib.import_module("build_chapters")


@pytest.fixture(scope="module")
def built(builder, tmp_path_factory) -> dict[str, bytes]:
    """The files of a folder with one chapter that was built once."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "source").mkdir()
    (folder / "source" / "07_some.py").write_text(SOURCE)
    assert builder.main([], folder) == 0
    return {"07_some.ipynb": (folder / "07_some.ipynb").read_bytes(), "runs": b"x"}


@pytest.fixture
def folder(built, tmp_path) -> Path:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "07_some.py").write_text(SOURCE)
    for name, data in built.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def edit(folder: Path, old: str, new: str) -> None:
    source = folder / "source" / "07_some.py"
    assert old in source.read_text()
    source.write_text(source.read_text().replace(old, new))


def notebook(folder: Path):
    return nbformat.read(folder / "07_some.ipynb", as_version=4)


def runs(folder: Path) -> int:
    return len((folder / "runs").read_text())


def test_every_code_cell_has_its_count_and_its_outputs(folder):
    _, first, raises, stub, *widgets = notebook(folder).cells
    counts = [cell.execution_count for cell in (first, raises, stub, *widgets)]
    assert counts == [1, 2, 3, 4, 5]
    assert first.outputs[0].text == "hello\n"
    assert raises.outputs[0].ename == "FileNotFoundError"
    assert raises.source == 'Path("missing").read_text()', "commented in the script only"
    assert stub.metadata == {
        "tags": ["exercise"],
        "exercise": "attention.entropy",
        "slideshow": {"slide_type": "subslide"},
    }


def test_nothing_of_this_run_or_machine_is_kept(folder):
    text = (folder / "07_some.ipynb").read_text()
    stored = notebook(folder)
    assert set(stored.metadata) == {"attnlab", "kernelspec", "language_info", "widgets"}
    assert stored.metadata.kernelspec.name == "python3"
    assert "version" not in stored.metadata.language_info
    assert '"name": "stderr"' not in text, "warnings differ between machines"
    assert not re.search(r"timestamp|iopub|lines_to_next_cell|jupytext|T\d\d:\d\d:", text)
    assert str(ROOT) not in text
    assert sys.prefix not in text
    assert str(folder) not in text


def test_only_widgets_that_are_shown_are_stored_under_names_that_do_not_change(folder):
    (widgets,) = notebook(folder).metadata.widgets.values()
    models = {name: model["model_name"] for name, model in widgets["state"].items()}
    assert models == {
        f"{1:032x}": "IntSliderModel",
        f"{2:032x}": "OutputModel",
        f"{3:032x}": "LayoutModel",
        f"{4:032x}": "SliderStyleModel",
        f"{5:032x}": "LayoutModel",
    }
    slider, output = (cell.outputs[0].data for cell in notebook(folder).cells[-2:])
    assert slider["application/vnd.jupyter.widget-view+json"]["model_id"] == f"{1:032x}"
    assert output["application/vnd.jupyter.widget-view+json"]["model_id"] == f"{2:032x}"
    assert widgets["state"][f"{1:032x}"]["state"]["layout"] == f"IPY_MODEL_{3:032x}"
    assert widgets["state"][f"{2:032x}"]["state"]["outputs"][0]["text"] == "inside\n"


def test_an_unchanged_chapter_is_left_alone(builder, folder, capsys):
    before = (folder / "07_some.ipynb").stat()
    assert builder.main([], folder) == 0
    assert "07_some is up to date" in capsys.readouterr().out
    assert (folder / "07_some.ipynb").stat().st_mtime_ns == before.st_mtime_ns
    assert runs(folder) == 1


def test_force_runs_again_and_gives_the_same_bytes(builder, folder, built, capsys):
    assert builder.main(["--force", "07"], folder) == 0
    output = capsys.readouterr().out
    assert re.search(r"07_some ran in \d+\.\d s \(\d+ KiB\)", output)
    assert "dropped from the notebook, a cell's stderr: a warning with a path" in output
    assert runs(folder) == 2
    assert (folder / "07_some.ipynb").read_bytes() == built["07_some.ipynb"]


def test_new_text_is_taken_over_without_running(builder, folder, capsys):
    edit(folder, "# # A chapter", "# # A better chapter")
    edit(folder, '"subslide"', '"slide"')
    assert builder.main(["--check"], folder) == 1
    assert "07_some: stale (text)" in capsys.readouterr().out
    assert builder.main([], folder) == 0
    assert "has new text, same code" in capsys.readouterr().out
    assert runs(folder) == 1
    assert notebook(folder).cells[0].source == "# A better chapter"
    assert notebook(folder).cells[1].outputs[0].text == "hello\n"
    assert builder.main(["--check"], folder) == 0


def test_new_code_runs_and_a_failing_cell_leaves_the_old_notebook(builder, folder, built, capsys):
    edit(folder, 'print("hello")', 'print("hello" + 1)')
    assert builder.main(["--check"], folder) == 1
    assert "07_some: stale (code)" in capsys.readouterr().out
    assert builder.main([], folder) == 1
    errors = capsys.readouterr().err
    assert "07_some failed; the old notebook stays." in errors
    assert 'print("hello" + 1)' in errors, "the cell"
    assert "TypeError" in errors, "the error"
    assert "\x1b[" not in errors
    assert (folder / "07_some.ipynb").read_bytes() == built["07_some.ipynb"]
    assert runs(folder) == 2
    assert not list(folder.glob(".*")), "no temporary file is left"


def test_a_kernel_that_dies_is_reported(builder, folder, built, capsys):
    edit(folder, 'print("hello")', "import os; os._exit(1)")
    assert builder.main([], folder) == 1
    assert "07_some failed; the old notebook stays.\nKernel died" in capsys.readouterr().err
    assert (folder / "07_some.ipynb").read_bytes() == built["07_some.ipynb"]


def test_a_tag_is_part_of_the_code(builder, folder):
    edit(folder, '# %% tags=["exercise"]', '# %% tags=["exercise", "nbval-ignore-output"]')
    assert builder.state(folder / "source/07_some.py", folder / "07_some.ipynb") == "code"


def strip_output(cells):
    cells[1]["execution_count"] = None
    cells[1]["outputs"] = []


def edit_in_place(cells):
    cells[1]["source"] = ["print('edited in the notebook, not in the source')"]


def delete_a_cell(cells):
    del cells[1]


@pytest.mark.parametrize("tamper", [strip_output, edit_in_place, delete_a_cell])
def test_a_tampered_notebook_is_stale(builder, folder, tamper):
    stored = json.loads((folder / "07_some.ipynb").read_text())
    tamper(stored["cells"])
    (folder / "07_some.ipynb").write_text(json.dumps(stored))
    assert builder.state(folder / "source/07_some.py", folder / "07_some.ipynb") == "code"


@pytest.mark.parametrize("content", [None, "", "{}", "[]", "<<<<<<< ours\n{}", '{"cells": []}'])
def test_a_missing_or_broken_notebook_is_stale(builder, folder, content):
    target = folder / "07_some.ipynb"
    target.unlink() if content is None else target.write_text(content)
    assert builder.state(folder / "source/07_some.py", target) == "code"


def test_a_heavy_notebook_is_refused_with_its_heaviest_cells(builder, folder, monkeypatch, capsys):
    monkeypatch.setattr(builder, "MAX_BYTES", 5_000)
    edit(folder, "# # A chapter", "# # A chapter that is too heavy")
    before = (folder / "07_some.ipynb").read_bytes()
    assert builder.main([], folder) == 1
    errors = capsys.readouterr().err
    assert re.search(r"failed; .*\n[\d,]+ bytes are more than 5,000:", errors)
    assert re.search(r'\d bytes: Path\("missing"\).read_text\(\)', errors)
    assert (folder / "07_some.ipynb").read_bytes() == before


def test_slow_cells_are_named(builder, folder, monkeypatch, capsys):
    monkeypatch.setattr(builder, "SLOW_SECONDS", 0)
    monkeypatch.setattr(
        builder, "execute", lambda nb, folder: [(7.25, cell) for cell in builder.code_cells(nb)[:1]]
    )
    edit(folder, 'print("hello")', 'print("good bye")')
    assert builder.main([], folder) == 0
    assert "07_some ran in 7.2 s\n     7.2 s  import sys" in capsys.readouterr().out


def test_unknown_names_and_orphans_are_named(builder, folder, capsys):
    assert builder.main(["12"], folder) == 2
    assert "There is no chapter '12'; the sources are: 07_some." in capsys.readouterr().err
    (folder / "08_gone.ipynb").write_text("{}")
    assert builder.main(["--check"], folder) == 1
    assert "notebooks without a source: 08_gone" in capsys.readouterr().err


def test_cell_ids_follow_the_content(builder, folder):
    source = folder / "source" / "07_some.py"
    before = [cell.id for cell in builder.read_source(source).cells]
    source.write_text("# %% [markdown]\n# new\n\n" + source.read_text() + "\n# %%\nIntSlider(3)\n"
                      "\n# %%\nIntSlider(3)\n")  # fmt: skip
    after = [cell.id for cell in builder.read_source(source).cells]
    assert after[1:-2] == before
    assert after[-1] == f"{after[-2]}-2"
    assert len(set(after)) == len(after)
