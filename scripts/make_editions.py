"""`make handout`: the course as two zip files, for a class and for its teacher.

    python scripts/make_editions.py                  write them into build/handout/
    python scripts/make_editions.py --execute        run all chapters of both as well (minutes)
    python scripts/make_editions.py --execute 01 09  run these

attnlab-student.zip is the repository without tests, sources and teacher's notes, with a README of
its own, and without one solution: where the exercises were, the library has what a check needs, as
numbers. A cell that is an exercise holds the stub.

attnlab-teacher.zip is the repository with the exercises solved in the chapters, and the teacher's
notes of each chapter (goals, timing, questions with answers) as a page of its own in notes/.
Nothing else differs: the cells that follow never depend on an exercise, so their outputs are the
same, and those of the checks are made here.
"""

import argparse
import inspect
import re
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import build_chapters as builder
from nbformat import NotebookNode

from attnlab.lab.exercises import Exercise, catalogue, judge
from attnlab.lab.exercises.recorded import write as record
from attnlab.lab.files import atomic_write
from attnlab.lab.grading_cells import read_statements

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = ROOT / "chapters"
ABOUT = ROOT / "docs" / "handout"  # what each edition says of itself
EXERCISES = "attnlab/lab/exercises"
# What a learner does not need, and what would tell.
NOT_FOR_STUDENTS = re.compile(
    rf"tests/|benchmarks/|docs/handout/|\.ci/|chapters/source/|chapters/conftest\.py|{EXERCISES}/ch\d"
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "handout", metavar="FOLDER")
    parser.add_argument(
        "--execute", nargs="*", metavar="NAME", help='run the chapters: all, or "01", "09"'
    )
    options = parser.parse_args(arguments)
    try:
        wanted = [] if options.execute is None else builder.chosen(chapters(), options.execute)
        archives = make(options.out)
    except builder.BuildError as problem:
        print(problem, file=sys.stderr)
        return 1
    return int(not all([execute(archive, wanted) for archive in archives]))


def make(folder: Path) -> list[Path]:
    """Write both editions into a folder; returns the student's zip, then the teacher's."""
    archives = []
    for name, edition in (("student", student), ("teacher", teacher)):
        path = folder / f"attnlab-{name}.zip"
        pack(path, dict(edition()))
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MB", flush=True)
        archives.append(path)
    return archives


def chapters() -> list[Path]:
    return sorted(CHAPTERS.glob("[0-9]*.ipynb"))


def files() -> list[str]:
    """What git tracks: not the submissions and grades that may lie about in a checkout.

    Raises BuildError where there is no git, or no checkout.
    """
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise builder.BuildError("make handout needs git, and the repository cloned.") from error
    names = listed.stdout.decode().split("\0")
    return sorted({name for name in names if (ROOT / name).is_file()})


def student() -> Iterator[tuple[str, bytes]]:
    """Every file of the class's edition."""
    for name in files():
        if not NOT_FOR_STUDENTS.match(name):
            yield name, (ROOT / name).read_bytes()
    overview = (CHAPTERS / "README.md").read_text(encoding="utf-8")
    yield "chapters/README.md", overview.partition("## For teachers")[0].encode()
    yield "README.md", (ABOUT / "student.md").read_bytes()
    with TemporaryDirectory() as folder:
        recorded = Path(folder) / "exercises.safetensors"
        record(list(catalogue().values()), recorded)
        yield f"{EXERCISES}/exercises.safetensors", recorded.read_bytes()


def teacher() -> Iterator[tuple[str, bytes]]:
    """Every file of the teacher's edition."""
    for name in files():
        yield name, (ROOT / name).read_bytes()
    yield "notes/README.md", (ABOUT / "teacher.md").read_bytes()
    notes = teachers_notes()
    for path in chapters():
        yield f"chapters/{path.name}", builder.serialize(solved(builder.read_notebook(path)))
        if path.stem[:2] in notes:
            yield f"notes/{path.stem}.md", notes[path.stem[:2]].encode()
        else:
            print(f"chapters/README.md has no teacher's notes for {path.stem}", file=sys.stderr)


def pack(path: Path, members: dict[str, bytes]) -> None:
    """Write a zip file whose bytes depend on its members alone."""
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, content in sorted(members.items()):
            member = zipfile.ZipInfo(f"attnlab/{name}")
            member.external_attr = (0o755 if content.startswith(b"#!") else 0o644) << 16
            archive.writestr(member, content, zipfile.ZIP_DEFLATED)


def teachers_notes() -> dict[str, str]:
    """Chapter's number → its section of chapters/README.md."""
    text = (CHAPTERS / "README.md").read_text(encoding="utf-8")
    parts = re.split(r"^### (?=\d\d )", text, flags=re.MULTILINE)[1:]
    return {part[:2]: "# " + re.split(r"^## ", part, flags=re.MULTILINE)[0] for part in parts}


def solved(notebook: NotebookNode) -> NotebookNode:
    """The notebook with a solution in every exercise's cell, and its check's output below."""
    code = builder.code_cells(notebook)
    for cell, following in zip(code, [*code[1:], None], strict=True):
        if name := cell.metadata.get("exercise"):
            exercise = catalogue()[name]
            cell.source = solution_cell(exercise, code[: code.index(cell)])
            result = judge(exercise, exercise.solution)
            following.outputs[0].data = NotebookNode(
                {"text/html": result._repr_html_(), "text/plain": repr(result)}
            )
    notebook.metadata.attnlab = {"code_sha256": builder.code_hash(notebook)}
    return notebook


def solution_cell(exercise: Exercise, before: list[NotebookNode]) -> str:
    """The solution's text, after the imports that the cells before it do not have."""
    source = textwrap.dedent(inspect.getsource(exercise.solution)).rstrip()
    known, _ = read_statements([cell.source for cell in before])
    bound = set().union(*(statement.binds for statement in known))
    (function,), _ = read_statements([source])
    imports, _ = read_statements(exercise.imports)
    missing = [
        line
        for line, statement in zip(exercise.imports, imports, strict=True)
        if (statement.binds & function.reads) - bound
    ]
    return "\n".join([*missing, *([""] * 2 if missing else []), source])


def execute(archive: Path, wanted: list[Path]) -> bool:
    """Unpack an edition and run some of its chapters; says what fails, and goes on."""
    verdict = "correct" if "teacher" in archive.stem else "not attempted"
    failed = []
    with TemporaryDirectory() as folder, zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)
        for path in wanted:
            try:
                seconds = run(Path(folder) / "attnlab" / "chapters" / path.name, verdict)
                print(f"{archive.stem}, {path.stem}: {seconds:.0f} s", flush=True)
            except builder.BuildError as problem:
                print(
                    f"{archive.stem}, {path.stem} failed.\n{problem}", file=sys.stderr, flush=True
                )
                failed.append(path)
    return not failed


def run(chapter: Path, verdict: str) -> float:
    """Execute a chapter as the build does, with its own edition's library; returns the seconds.

    Raises BuildError where it fails, and where the check of an exercise says no such verdict.
    """
    notebook = builder.read_notebook(chapter)
    seconds = builder.execute(notebook, chapter.parent, PYTHONPATH=str(chapter.parents[1]))
    code = builder.code_cells(notebook)
    for cell, following in zip(code, [*code[1:], None], strict=True):
        name = cell.metadata.get("exercise")
        if name and f"{name}: {verdict}" not in str(following.outputs):
            raise builder.BuildError(f"{name}: expected {verdict!r} of its check")
    return sum(spent for spent, _ in seconds)


if __name__ == "__main__":
    sys.exit(main())
