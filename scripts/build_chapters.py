"""Turn chapters/source/*.py (jupytext percent format) into executed notebooks in chapters/.

    python scripts/build_chapters.py                 what changed: run it if its code did
    python scripts/build_chapters.py --force 01      run chapter 01 again, whatever changed
    python scripts/build_chapters.py --check         write nothing; exit 1 if something is stale

A notebook keeps the hash of the code that made its outputs. Text can be edited without running
anything; a change of one code cell runs the chapter from its start, in a fresh kernel with two
threads. A chapter that fails, or that grows too heavy, leaves the old notebook in place.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import jupytext
import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal, DeadKernelError
from nbclient.output_widget import OutputWidget
from nbformat import NotebookNode
from nbval.kernel import CURRENT_ENV_KERNEL_NAME, NbvalKernelspecManager

from attnlab.lab.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = ROOT / "chapters"
MAX_BYTES = 2**20
SLOW_SECONDS = 5
CELL_TIMEOUT = 600
# chapters/conftest.py checks the notebooks under the same settings.
KERNEL_ENVIRONMENT = {
    "OMP_NUM_THREADS": "2",
    "MKL_NUM_THREADS": "2",
    "ATTNLAB_SOLUTIONS": "on",
    "ATTNLAB_PROGRESS": "off",  # what is solved here, no learner has solved
}
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "name": "python",
        "pygments_lexer": "ipython3",
    },
}
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"


class BuildError(Exception):
    """A chapter that cannot become a notebook; the message is for its author."""


def read_source(path: Path) -> NotebookNode:
    """The unexecuted notebook of a source: normalised metadata, cell ids that follow content."""
    notebook = jupytext.read(path, fmt="py:percent")
    notebook.metadata = NotebookNode(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    seen = Counter()
    for cell in notebook.cells:
        cell.metadata.pop("lines_to_next_cell", None)
        digest = hashlib.sha256(f"{cell.cell_type}:{cell.source}".encode()).hexdigest()[:8]
        seen[digest] += 1
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
    return notebook


def read_notebook(path: Path) -> NotebookNode | None:
    """The notebook as it is stored, or None when there is none that can be read."""
    try:
        return nbformat.read(path, as_version=4)
    except (OSError, ValueError, AttributeError, nbformat.ValidationError):
        return None


def code_hash(notebook: NotebookNode) -> str:
    """SHA-256 of what decides about the outputs: the code cells and their tags, in order."""
    code = [[cell.source, cell.metadata.get("tags", [])] for cell in code_cells(notebook)]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def has_outputs_of(stored: NotebookNode | None, code: str) -> bool:
    """Whether a stored notebook holds this code, and the outputs that it gave."""
    return (
        stored is not None
        and stored.metadata.get("attnlab", {}).get("code_sha256") == code == code_hash(stored)
        and all(cell.execution_count for cell in code_cells(stored))
    )


def with_outputs(notebook: NotebookNode, executed: NotebookNode) -> NotebookNode:
    """The notebook with the outputs of another one that has the same code cells."""
    for cell, done in zip(code_cells(notebook), code_cells(executed), strict=True):
        cell.outputs, cell.execution_count = done.outputs, done.execution_count
    notebook.metadata = executed.metadata
    return notebook


class SilentOutput(OutputWidget):
    """Keeps what an Output widget shows, without telling the kernel.

    nbclient tells it by a send on the very socket on which it waits for the cell's reply, and now
    and then ZeroMQ then wakes nobody for that reply: the build stands still with an idle kernel.
    """

    def send(self, data=None, metadata=None, buffers=None):
        pass


def execute(
    notebook: NotebookNode, folder: Path, **variables: str
) -> list[tuple[float, NotebookNode]]:
    """Run every cell in `folder` and return the seconds that each code cell took.

    variables: of the kernel's environment, beside this process's.
    """
    started, seconds = {}, []

    def start(cell, cell_index):
        started[cell_index] = time.perf_counter()

    def done(cell, cell_index, execute_reply):
        seconds.append((time.perf_counter() - started[cell_index], cell))

    client = NotebookClient(
        notebook,
        km=AsyncKernelManager(
            kernel_name=CURRENT_ENV_KERNEL_NAME, kernel_spec_manager=NbvalKernelspecManager()
        ),
        resources={"metadata": {"path": str(folder)}},
        timeout=CELL_TIMEOUT,
        record_timing=False,
        coalesce_streams=True,
        on_cell_execute=start,
        on_cell_executed=done,
    )
    client.widget_registry["@jupyter-widgets/output"]["OutputModel"] = SilentOutput
    # Kernels that share a history can lock each other out of it, and say so in a cell's output.
    with TemporaryDirectory(prefix="attnlab-") as own:
        environment = os.environ | KERNEL_ENVIRONMENT | {"IPYTHONDIR": own} | variables
        try:
            client.execute(env=environment, stderr=subprocess.DEVNULL, cleanup_kc=True)
        except (CellControlSignal, DeadKernelError) as error:
            uncolored = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
            raise BuildError(uncolored.rstrip()) from error
    return seconds


def normalize(notebook: NotebookNode) -> NotebookNode:
    """Remove from the outputs what belongs to this run or this machine."""
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if output.output_type == "stream" and output.name == "stderr":
                print(f"  dropped from the notebook, a cell's stderr: {output.text.strip()}")
            if output.output_type == "error":
                output.traceback = [_without_paths(line) for line in output.traceback]
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    views = [
        output.data[WIDGET_VIEW]
        for cell in code_cells(notebook)
        for output in cell.outputs
        if WIDGET_VIEW in output.get("data", {})
    ]
    widgets = notebook.metadata.get("widgets", {}).get(WIDGET_STATE)
    notebook.metadata = NotebookNode(METADATA)
    if views and widgets:
        widgets.state, names = _reachable(widgets.state, [view.model_id for view in views])
        notebook.metadata.widgets = {WIDGET_STATE: widgets}
        for view in views:
            view.model_id = names[view.model_id]
    return notebook


def _without_paths(line: str) -> str:
    """A traceback's line with files named from the repository or the packages on."""
    line = re.sub(r"[^\s'\"]*/site-packages/", "", line.replace(f"{ROOT}{os.sep}", ""))
    return line.replace(f"{Path.home()}{os.sep}", "~/")


def _reachable(state: dict, roots: list[str]) -> tuple[dict, dict[str, str]]:
    """The widgets that the outputs show, and new names for them that every build gives alike."""
    names, queue = {}, list(roots)
    while queue:
        model = queue.pop(0)
        if model in state and model not in names:
            names[model] = f"{len(names) + 1:032x}"
            queue += re.findall(r'IPY_MODEL_(\w+)"', json.dumps(state[model], sort_keys=True))
    text = json.dumps({model: state[model] for model in names})
    for model, name in names.items():
        text = text.replace(model, name)
    return nbformat.from_dict(json.loads(text)), names


def serialize(notebook: NotebookNode) -> bytes:
    """The file's bytes; refuses a notebook that is invalid or too heavy."""
    nbformat.validate(notebook)
    data = (nbformat.writes(notebook).rstrip() + "\n").encode()
    if len(data) > MAX_BYTES:
        weights = sorted(
            ((len(json.dumps(cell)), cell) for cell in code_cells(notebook)), key=lambda w: -w[0]
        )
        heaviest = "".join(f"\n  {w:>9,} bytes: {_title(cell)}" for w, cell in weights[:3])
        raise BuildError(f"{len(data):,} bytes are more than {MAX_BYTES:,}:{heaviest}")
    return data


def state(source: Path, target: Path) -> str:
    """What has to be done: "current", "text" (cells to copy) or "code" (cells to run)."""
    fresh, stored = read_source(source), read_notebook(target)
    if not has_outputs_of(stored, code_hash(fresh)):
        return "code"
    return "current" if with_outputs(fresh, stored) == stored else "text"


def build(source: Path, target: Path, force: bool = False) -> str:
    """Bring one notebook up to date and say what was done."""
    work = "code" if force else state(source, target)
    if work == "current":
        return "is up to date"
    notebook = read_source(source)
    if work == "text":
        notebook, done = with_outputs(notebook, read_notebook(target)), "has new text, same code"
    else:
        seconds = execute(notebook, target.parent)
        notebook = normalize(notebook)
        notebook.metadata.attnlab = {"code_sha256": code_hash(notebook)}
        done = f"ran in {sum(spent for spent, _ in seconds):.1f} s"
        for spent, cell in seconds:
            if spent >= SLOW_SECONDS:
                done += f"\n  {spent:6.1f} s  {_title(cell)}"
    data = serialize(notebook)
    with atomic_write(target) as temporary:
        temporary.write_bytes(data)
    return f"{done} ({len(data) / 1024:.0f} KiB)"


def _title(cell: NotebookNode) -> str:
    return next((line for line in cell.source.splitlines() if line.strip()), "(empty cell)")


def chosen(sources: list[Path], names: list[str]) -> list[Path]:
    """The sources whose names start with one of `names`; all of them when none is given."""
    for name in names:
        if not any(source.stem.startswith(name) for source in sources):
            known = ", ".join(source.stem for source in sources) or "none"
            raise BuildError(f"There is no chapter {name!r}; the sources are: {known}.")
    return [s for s in sources if not names or any(s.stem.startswith(name) for name in names)]


def main(arguments: list[str] | None = None, folder: Path = CHAPTERS) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help='"01" or "01_attention"')
    parser.add_argument("--force", action="store_true", help="run even what is up to date")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if stale")
    options = parser.parse_args(arguments)
    sources = sorted((folder / "source").glob("[0-9]*.py"))
    try:
        wanted = chosen(sources, options.names)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 2
    failed = False
    for source in wanted:
        target = folder / f"{source.stem}.ipynb"
        if options.check:
            work = state(source, target)
            failed |= work != "current"
            print(f"{source.stem}: {'up to date' if work == 'current' else f'stale ({work})'}")
            continue
        try:
            print(f"{source.stem} …", flush=True)
            print(f"{source.stem} {build(source, target, options.force)}", flush=True)
        except BuildError as error:
            failed = True
            print(f"{source.stem} failed; the old notebook stays.\n{error}", file=sys.stderr)
    orphans = sorted({n.stem for n in folder.glob("*.ipynb")} - {s.stem for s in sources})
    if orphans:
        print(f"notebooks without a source: {', '.join(orphans)}", file=sys.stderr)
    return int(failed or bool(orphans))


if __name__ == "__main__":
    sys.exit(main())
