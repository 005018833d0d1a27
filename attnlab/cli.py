"""The command line: `attnlab --help` says what it can do.

Each command imports what it needs when it runs, so that `attnlab --help` needs nothing.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from attnlab_command import load_alone

PACKAGE = Path(__file__).resolve().parent
CHAPTERS = PACKAGE.parent / "chapters"
# Commands whose words a module reads itself: name → (module, what it does).
DELEGATED = {
    "train": ("attnlab.lab.train_command", "train a model on ImageNet or bundled data"),
    "evaluate": ("attnlab.lab.evaluate", "measure a checkpoint or a trained run"),
    "predict": ("attnlab.lab.predict", "draw what a model sees in an image"),
    "bench": ("attnlab.lab.bench", "time every mechanism against its peers"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name (by default those of the process).

    Returns the exit code: 0, or 1 when the doctor found something to mend.
    """
    parser = argparse.ArgumentParser(
        prog="attnlab", description="Visual attention, taught by building it."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("doctor", help="check this machine and say what would mend it")
    lab = commands.add_parser(
        "lab",
        help="open a chapter in JupyterLab",
        epilog="Further options, like --no-browser or --port=8889, go to JupyterLab.",
    )
    lab.add_argument("chapter", nargs="?", default="00", help="its number or name, like 1 or cbam")
    results = commands.add_parser("results", help="compute the tables in results/")
    results.add_argument("names", nargs="*", help="tables, like 01_attention.positions; else all")
    results.add_argument("--seeds", nargs="+", type=int, help="default: 0 1 2")
    results.add_argument(
        "--confirm",
        action="store_true",
        help="of stale tables, run the first seed, and all seeds of the rows that changed alone",
    )
    grade = commands.add_parser("grade", help="grade a folder of learners' notebooks or scripts")
    grade.add_argument("folder", type=Path, help="each .ipynb and .py below it is a submission")
    grade.add_argument("--out", type=Path, default=Path("grades.csv"), help="default: grades.csv")
    grade.add_argument("--chapters", nargs="+", default=(), help="like 01; else those they name")
    grade.add_argument("--seeds", nargs="+", type=int, help="hidden ones; drawn once by default")
    grade.add_argument("--seconds", type=float, default=20, help="for an exercise; default: 20")
    grade.add_argument("--jobs", type=int, help="submissions at a time; default: one per core")
    grade.add_argument("--unprotected", action="store_true", help="where there are no namespaces")
    video = commands.add_parser("video", help="segment a video file, or detect, frame by frame")
    video.add_argument("source", help="any video that FFmpeg reads")
    video.add_argument("--out", required=True, help="the video to write; it must not exist yet")
    video.add_argument("--model", default="clip_segmenter", help="a checkpoint's name or path")
    video.add_argument("--size", type=int, default=64, help="px of the side that the model sees")
    for name, (_, meaning) in DELEGATED.items():
        commands.add_parser(name, add_help=False, help=meaning)
    chosen, others = parser.parse_known_args(arguments)
    if chosen.command == "lab":
        try:
            return open_lab(chosen.chapter, others)
        except ValueError as error:
            lab.error(str(error))
    if chosen.command in DELEGATED:
        module, _ = DELEGATED[chosen.command]
        return import_module(module).main(others)
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if chosen.command == "video":
        try:
            return annotate_video(chosen.source, chosen.out, chosen.model, chosen.size)
        except (ValueError, OSError, ModuleNotFoundError) as error:
            video.error(str(error))
    if chosen.command == "results":
        return compute_results(chosen.names, chosen.seeds, chosen.confirm)
    if chosen.command == "grade":
        from attnlab.lab.grading import main as grade_submissions

        return grade_submissions(chosen)
    return load_alone("attnlab_doctor", PACKAGE / "lab" / "doctor.py").main()


def compute_results(names: list[str], seeds: list[int] | None, confirm: bool) -> int:
    """Run the experiments behind the named tables, or behind all."""
    from attnlab.lab import results

    return results.main(names, seeds or results.SEEDS, confirm)


def annotate_video(source: str, out: str, model: str, size: int) -> int:
    """Write a video with what a model says about each of its frames."""
    from attnlab.lab import video_file

    return video_file.main(source, out, model, size)


def open_lab(chapter: str, options: Sequence[str] = ()) -> int:
    """Open JupyterLab on a chapter; the options are JupyterLab's."""
    notebook = find_chapter(chapter)
    if importlib.util.find_spec("jupyterlab") is None:
        raise ValueError('JupyterLab is not installed: pip install "attnlab[lab]"')
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options = ["--allow-root", *options]  # root is all that a container has
    trust(sorted(CHAPTERS.glob("*.ipynb")))
    # From the root, so that a chapter's links to the library's files open too.
    root = f"--ServerApp.root_dir={CHAPTERS.parent}"
    return run([sys.executable, "-m", "jupyterlab", root, str(notebook), *options])


def trust(notebooks: list[Path]) -> None:
    """Sign the course's own notebooks: JupyterLab shows no saved explorer of an unsigned one."""
    from nbformat import NO_CONVERT, read
    from nbformat.sign import NotebookNotary

    notary = NotebookNotary()
    for path in notebooks:
        with suppress(ValueError, OSError, AttributeError):  # damaged: JupyterLab will say so
            notary.sign(read(path, NO_CONVERT))


def find_chapter(chapter: str) -> Path:
    """The notebook of a chapter: "1", "01", "attention", "01_attention" or its file name.

    Raises ValueError if there is none, or if the folder of chapters is not here.
    """
    if not CHAPTERS.is_dir():
        raise ValueError(
            f"chapter: there is no folder {CHAPTERS}: the chapters are in the repository, not in "
            "the installed package; clone it and type `make lab` there"
        )
    notebooks = {path.stem: path for path in sorted(CHAPTERS.glob("[0-9][0-9]_*.ipynb"))}
    wanted = Path(chapter).stem
    for name, path in notebooks.items():
        number, title = name.split("_", 1)
        if wanted in (name, number, title) or (wanted.isdecimal() and int(wanted) == int(number)):
            return path
    raise ValueError(f"chapter: expected one of {', '.join(notebooks)}, got {chapter!r}")


def run(command: list[str]) -> int:
    """Run a command in this process's place, so that Ctrl-C goes to it alone."""
    if os.name == "posix":
        os.execv(command[0], command)
    return subprocess.call(command)


if __name__ == "__main__":
    sys.exit(main())
