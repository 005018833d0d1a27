"""How pytest checks these notebooks: `pytest --nbval` runs each cell and compares its outputs.

tests/test_nbval_setup.py holds one row for every trap that this set-up has to get right.
"""

import os
from functools import cache
from tempfile import TemporaryDirectory
from unittest import mock

import pytest

# scripts/build_chapters.py makes the notebooks under the same settings.
KERNEL_ENVIRONMENT = {
    "OMP_NUM_THREADS": "2",
    "MKL_NUM_THREADS": "2",
    "ATTNLAB_SOLUTIONS": "on",
    "ATTNLAB_PROGRESS": "off",  # what is solved here, no learner has solved
}
# Warnings differ between machines. Rich HTML differs in ids and styles; its plain text is compared.
NOT_COMPARED = ("stderr", "text/html")
CELL_TIMEOUT = 300  # seconds; nbval then stops the cell, and expects the later ones to fail


def pytest_configure(config):
    if not getattr(config.option, "nbval", False):
        return
    from nbval.kernel import RunningKernel

    config.option.nbval_current_env = True  # whatever kernel the author's metadata name
    config.option.nbval_cell_timeout = min(config.option.nbval_cell_timeout, CELL_TIMEOUT)
    if getattr(config.option, "dist", "no") not in ("no", "loadfile"):
        config.option.dist = "loadfile"  # pytest-xdist must not tear a notebook apart
    RunningKernel.execute_cell_input = execute_as_jupyter_does


def execute_as_jupyter_does(kernel, source, allow_stdin=None):
    """Run a cell with history, as JupyterLab and the build do: without it `x;` shows x."""
    return kernel.kc.execute(
        source, store_history=True, allow_stdin=allow_stdin, stop_on_error=False
    )


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += NOT_COMPARED


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    """The kernel starts in the set-up of a notebook's first cell."""
    own = {"IPYTHONDIR": kernel_folder().name}
    with mock.patch.dict(os.environ, KERNEL_ENVIRONMENT | own):
        return (yield)


@cache
def kernel_folder() -> TemporaryDirectory:
    """A folder of this run's own: kernels that share a history can lock each other out of it."""
    return TemporaryDirectory(prefix="attnlab-")


def pytest_runtest_call(item):
    """Refuse what nbval passes over without a word."""
    cell = getattr(item, "cell", None)
    if cell is None:
        return
    if cell.source.strip() and cell.execution_count is None:
        pytest.fail("this cell was never run, so there is nothing to compare: make chapters")
    if any(line.strip().startswith(("# NBVAL_", "#NBVAL_")) for line in cell.source.splitlines()):
        pytest.fail("a comment steers nbval here: use a tag, such as nbval-ignore-output")
