"""The set-up of chapters/conftest.py, trap by trap: what must fail fails, what must pass passes.

All rows are cells of one notebook, built by scripts/build_chapters.py and then checked by
`pytest --nbval` in a folder that holds the real chapters/conftest.py. In that second run the
variable `second` is True, which stands for another machine or another day.
"""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

pytest.importorskip("nbval")
pytest.importorskip("jupytext")
import nbformat
from nbformat import v4

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = ROOT / "chapters"


class Row(NamedTuple):
    name: str
    passes: bool
    code: str
    tags: tuple = ()


IGNORED = ("nbval-ignore-output",)
RAISES = ("raises-exception",)
ROWS = [
    Row("set-up", True, """
import os, pathlib, random, sys, tempfile, time, uuid
import ipywidgets
import matplotlib.pyplot as plt
from IPython.display import HTML, clear_output, display
from matplotlib_inline.backend_inline import set_matplotlib_formats

second = pathlib.Path("ran-before").exists()
pathlib.Path("ran-before").touch()
"""),
    Row("a plot as the last line shows an address", False, "plt.plot([1, 2])"),
    Row("plt.show() ends a plot", True, "plt.plot([1, 2])\nplt.show()"),
    Row("a plot assigned to _", True, "_ = plt.plot([1, 2])"),
    Row("an address", False, "object()"),
    Row("a trailing semicolon suppresses, as in JupyterLab", True, "object();"),
    Row("figures are not compared", True, "plt.imshow([[random.random()] * 2])\nplt.show()"),
    Row("so the numbers behind a figure are asserted", False, """
numbers = [1, 2 + second]
plt.plot(numbers)
plt.show()
assert numbers == [1, 2]
"""),
    Row("SVG figures carry a date", False, """
set_matplotlib_formats("svg")
plt.plot([1, 2])
plt.show()
"""),
    Row("back to PNG", True, 'set_matplotlib_formats("png")\nplt.plot([1, 2])\nplt.show()'),
    Row("tqdm as text prints a rate", False, """
from tqdm import tqdm as text_bar
for _ in text_bar(range(3), file=sys.stdout):
    time.sleep(0.01 + 0.02 * second)
"""),
    Row("tqdm.auto", True, """
from tqdm.auto import tqdm
for _ in tqdm(range(3)):
    time.sleep(0.01 + 0.02 * second)
"""),
    Row("a line on stderr that only one machine prints", True, """
if second:
    print("a warning", file=sys.stderr)
"""),
    Row("the same line on stdout", False, 'if second:\n    print("a warning")'),
    Row("interact", False, "ipywidgets.interact(lambda x: print(x), x=3)"),
    Row("interact, tagged", True, "ipywidgets.interact(lambda x: print(x), x=3)", IGNORED),
    Row("Output", False, """
out = ipywidgets.Output()
with out:
    print("inside", second)
out
"""),
    Row("Output, tagged", True, """
out = ipywidgets.Output()
with out:
    print("inside", second)
out
""", IGNORED),
    Row("interactive_output", False, """
slider = ipywidgets.IntSlider(3)
display(slider, ipywidgets.interactive_output(lambda x: print(x, second), {"x": slider}))
"""),
    Row("interactive_output, tagged", True, """
display(slider, ipywidgets.interactive_output(lambda x: print(x, second), {"x": slider}))
""", IGNORED),
    Row("a bare slider", True, "ipywidgets.IntSlider(3)"),
    Row("a figure object without a repr", False, """
class Explorer:
    def _repr_html_(self):
        return f"<div id='{uuid.uuid4()}'></div>"

Explorer()
"""),
    Row("rich HTML is not compared, its fixed repr is", True, """
Explorer.__repr__ = lambda self: "Explorer(6 layers, 3 heads)"
Explorer()
"""),
    Row("a repr that changes", False, """
Explorer.__repr__ = lambda self: f"Explorer({6 + second} layers)"
Explorer()
"""),
    Row("bare HTML is not compared", True, "HTML(f'<b>{uuid.uuid4()}</b>')"),
    Row("a live plot with clear_output", False, """
for step in range(2):
    clear_output(wait=True)
    print("step", step)
"""),
    Row("a live plot with update_display", False, """
handle = display("step 0", display_id=True)
handle.update("step 1")
"""),
    Row("drawn once at the end", True, 'for step in range(2):\n    pass\nprint("step", step)'),
    Row("an expected exception", True, 'raise ValueError("dim = 5, heads = 2")', RAISES),
    Row("an expected exception, another message", False, "raise ValueError(str(second))", RAISES),
    Row("an expected exception that stops coming", False, """
if not second:
    raise ValueError("see it fail")
""", RAISES),
    Row("a set", False, "print(set('abcdefghijklmnopqrst'))"),
    Row("a sorted set", True, "print(sorted(set('abcdefghijklmnopqrst')))"),
    Row("a time", False, "print(time.time())"),
    Row("a time, tagged", True, "print(time.time())", IGNORED),
    Row("a version", False, 'print("library", "2.1" if second else "2.0")'),
    Row("a path", False, "print(tempfile.mkdtemp())"),
    Row("all digits of a loss", False, "loss = 0.2 - 1e-7 * second\nprint(loss)"),
    Row("three digits of a loss", True, 'print(f"{loss:.3f}")'),
    Row("a tolerance", True, 'assert abs(loss - 0.2) < 1e-3\nprint("✔ the loss is 0.2")'),
    Row("a tolerance that is missed", False, 'assert loss == 0.2\nprint("✔ the loss is 0.2")'),
    Row("two threads, whatever the shell says", True, "print(os.environ['OMP_NUM_THREADS'])"),
    Row("solutions, whatever the shell says", True, "print(os.environ['ATTNLAB_SOLUTIONS'])"),
]  # fmt: skip

# Cells that the build would never write, in a notebook with its author's own kernel name.
COMMENTED = v4.new_code_cell("# NBVAL_IGNORE_OUTPUT\n1 + 1", execution_count=1)
TAGGED_TOO = v4.new_code_cell(
    "#NBVAL_CHECK_OUTPUT\nNone", execution_count=2, metadata={"tags": ["nbval-ignore-output"]}
)
FOREIGN = {
    "a good cell under the author's kernel name": (
        True, v4.new_code_cell("1 + 1", execution_count=1, outputs=[
            v4.new_output("execute_result", {"text/plain": "2"}, execution_count=1)]),
    ),
    "a wrong output": (
        False, v4.new_code_cell("1 + 1", execution_count=2, outputs=[
            v4.new_output("execute_result", {"text/plain": "3"}, execution_count=2)]),
    ),
    "a cell that was never run": (False, v4.new_code_cell("1 + 1")),
    "an output whose count was stripped": (
        False, v4.new_code_cell("1 + 1", outputs=[
            v4.new_output("execute_result", {"text/plain": "2"})]),
    ),
    "a comment": (False, COMMENTED),
    "a comment and a tag": (False, TAGGED_TOO),
    "an empty cell": (True, v4.new_code_cell("")),
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[tuple[str, int], str]:
    """PASSED or FAILED for each (notebook, cell), from one run of pytest."""
    folder = tmp_path_factory.mktemp("chapters")
    shutil.copy(CHAPTERS / "conftest.py", folder)
    (folder / "pytest.ini").write_text("[pytest]\n")
    cells = [v4.new_code_cell(row.code.strip(), metadata={"tags": [*row.tags]}) for row in ROWS]
    rows = v4.new_notebook(cells=cells)
    sys.path.insert(0, str(ROOT / "scripts"))
    builder = importlib.import_module("build_chapters")
    builder.execute(rows, folder)
    nbformat.write(builder.normalize(rows), folder / "rows.ipynb")
    foreign = v4.new_notebook(
        cells=[cell for _, cell in FOREIGN.values()],
        metadata={"kernelspec": {"name": "my-own", "display_name": "my own"}},
    )
    nbformat.write(foreign, folder / "foreign.ipynb")

    command = [sys.executable, "-m", "pytest", "--nbval", "-p", "no:cacheprovider", "-rA", "."]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ATTNLAB_SOLUTIONS": "off"}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    found = re.findall(r"^(PASSED|FAILED) (\w+)\.ipynb::Cell (\d+)", run.stdout, re.MULTILINE)
    assert len(found) == len(ROWS) + len(FOREIGN), run.stdout + run.stderr
    return {(notebook, int(cell)): outcome for outcome, notebook, cell in found}


@pytest.mark.parametrize("number", range(len(ROWS)), ids=[row.name for row in ROWS])
def test_row(outcomes, number):
    assert outcomes["rows", number] == ("PASSED" if ROWS[number].passes else "FAILED")


@pytest.mark.parametrize("number", range(len(FOREIGN)), ids=list(FOREIGN))
def test_cell_that_the_build_would_not_write(outcomes, number):
    passes, _ = list(FOREIGN.values())[number]
    assert outcomes["foreign", number] == ("PASSED" if passes else "FAILED")


def test_no_sanitizer_is_used():
    """It cannot give a tolerance, and a rule that replaces by nothing is dropped in silence."""
    from nbval.plugin import get_sanitize_patterns

    assert get_sanitize_patterns("regex: \\d+\nreplace:\n") == []
    assert not list(CHAPTERS.glob("*.cfg"))


@pytest.fixture
def conftest():
    spec = importlib.util.spec_from_file_location("chapters_conftest", CHAPTERS / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("asked", "used"),
    [("no", "no"), ("load", "loadfile"), ("worksteal", "loadfile"), ("loadfile", "loadfile")],
)
def test_xdist_keeps_a_notebook_on_one_worker(conftest, asked, used):
    option = SimpleNamespace(nbval=True, nbval_cell_timeout=2000, dist=asked)
    conftest.pytest_configure(SimpleNamespace(option=option))
    assert option.dist == used
    assert option.nbval_current_env
    assert option.nbval_cell_timeout == conftest.CELL_TIMEOUT


def test_the_set_up_does_nothing_where_nbval_is_not_installed(conftest, monkeypatch):
    monkeypatch.setitem(sys.modules, "nbval.kernel", None)
    option = SimpleNamespace()
    conftest.pytest_configure(SimpleNamespace(option=option))
    assert vars(option) == {}


def test_notebooks_are_made_and_checked_under_the_same_settings(conftest):
    sys.path.insert(0, str(ROOT / "scripts"))
    builder = importlib.import_module("build_chapters")
    assert conftest.KERNEL_ENVIRONMENT == builder.KERNEL_ENVIRONMENT
