"""What `make lab`, `make test` and their sisters run, each with the Python of `.venv`."""

import os
import subprocess
import sys
from pathlib import Path

import venv_setup

ROOT = Path(__file__).resolve().parents[1]

LINT = [["-m", "ruff", "check", "."], ["-m", "ruff", "format", "--check", "."]]
TESTS = ["-m", "pytest", "--nbval", "--nbval-current-env", "tests", "chapters"]
ATTNLAB = ["-m", "attnlab_command"]

COMMANDS = {
    "setup": [],
    "lab": [[*ATTNLAB, "lab"]],
    "test": [*LINT, TESTS],
    "lint": LINT,
    "format": [["-m", "ruff", "check", "--fix", "."], ["-m", "ruff", "format", "."]],
    "chapters": [["scripts/build_chapters.py"]],
    "results": [[*ATTNLAB, "results"]],
    "handout": [["scripts/make_editions.py"]],
    "slides": [["scripts/make_slides.py"]],
    "site": [["scripts/make_site.py"]],
    "doctor": [[*ATTNLAB, "doctor"]],
    "bench": [[f"benchmarks/{path.name}"] for path in sorted(ROOT.glob("benchmarks/[!_]*.py"))],
}


def command_lines(name: str, extra: list[str]) -> list[list[str]]:
    """Return the argument lists that `name` runs in turn; `extra` goes to the last of them.

    The benchmarks share their options, so `extra` goes to each.
    """
    if name == "bench":
        return [[*line, *extra] for line in COMMANDS[name]]
    *first, last = COMMANDS[name] or [[]]
    return [*first, [*last, *extra]] if last else []


def activated(python: Path) -> dict[str, str]:
    """Return this process's environment with `.venv` activated, and two threads by default."""
    env = venv_setup.isolated()
    env["VIRTUAL_ENV"] = str(python.parent.parent)
    env["PATH"] = os.pathsep.join([str(python.parent), env.get("PATH", os.defpath)])
    # The chapters' saved outputs were made with two threads; more change the last digits.
    env.setdefault("OMP_NUM_THREADS", "2")
    return env


def run(commands: list[list[str]], env: dict[str, str]) -> int:
    """Run commands until one fails; the last one takes this process over, and so its signals."""
    for command in commands:
        if command is commands[-1] and os.name == "posix":
            sys.stdout.flush()
            os.execve(command[0], command, env)
        if code := subprocess.call(command, env=env):
            return code
    return 0


def main(arguments: list[str]) -> int:
    """Set up what is missing, then run the command named first with the other arguments."""
    name, *extra = arguments or ["help"]
    if name not in COMMANDS:
        print(f"usage: python scripts/bootstrap.py {{{','.join(COMMANDS)}}} [arguments]")
        return 0 if name in ("help", "-h", "--help") else 2
    os.chdir(ROOT)
    try:
        python = venv_setup.ensure(ROOT)
        return run([[str(python), *line] for line in command_lines(name, extra)], activated(python))
    except venv_setup.SetupError as problem:
        print(f"\nThe set-up of attnlab stopped. {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. The same command again carries on or mends it.", file=sys.stderr)
        return 130
