"""Make, complete or mend `.venv`, the environment in which everything of the course runs.

A stamp inside it says which lock, Python and folder it was made for. The stamp is emptied before
the first change and written after the last, so whatever stops a set-up, the next one knows.
Standard library only: nothing else is there yet.
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from bootstrap import OLDEST

STAMP = "attnlab-setup.json"
LOG = "attnlab-setup.log"
LOCK = ".venv.lock"
# Free space that a first set-up takes, in GB: .venv and the archives on their way into it.
# Linux gets torch with CUDA; the others get it without.
DISK_GB = 10 if sys.platform == "linux" else 4

# What pip prints when it fails, and what the reader can do about it; the first match counts.
ADVICE = {
    r"No space left on device|Errno 28\b|Errno 122\b|Disk quota exceeded|not enough space": (
        f"The disk is full. A set-up takes about {DISK_GB} GB in this folder. Make room, or make "
        ".venv a link to a folder on a larger disk, and run the same command again."
    ),
    r"connection broken by|Connection(Reset|Refused|Timeout)?Error|Max retries exceeded|"
    r"Read timed out|ProxyError|SSLError|CERTIFICATE_VERIFY_FAILED|name resolution": (
        "The package index cannot be reached. The first set-up needs a network; later ones do "
        "not. Connect this machine once, or name your mirror or proxy in pip's own configuration "
        "(pip config set global.index-url …), and run the same command again."
    ),
    r"No matching distribution found for (?P<package>\S+)": (
        "pip found no ready-made {package} for Python {version} on this kind of machine. Either "
        "there is no network, which the first set-up needs, or your mirror is incomplete (see "
        "pip config list), or this Python is too new: name another, as in "
        "make PYTHON=python3.13 setup."
    ),
    r"PATH separator": (
        "The name of this folder has a character that no Python environment can live with. "
        "Rename the folder, and run the same command again."
    ),
    r"Permission denied|Access is denied|Errno 13\b|WinError (5|32)\b|Read-only file system": (
        "A file cannot be written. Close what uses .venv (Jupyter, an editor, a terminal in which "
        "it is activated), see that this folder is yours, and run the same command again."
    ),
}


class SetupError(Exception):
    """Something that the reader can put right; the text says what and how."""


def ensure(root: Path) -> Path:
    """Return the Python of `root/.venv`, after making or mending what is not as it should be.

    Raises `SetupError` with what to do when it cannot.
    """
    try:
        if state(root) != "ready":
            with sole_setup(root) as lock:
                found = state(root)  # a set-up that this one waited for may have done it all
                if found != "ready":
                    build(root, lock, afresh=found == "broken")
    except OSError as error:
        raise SetupError(f"{error}. {advice(str(error))}") from error
    return python_of(root)


def python_of(root: Path) -> Path:
    """The Python of `.venv`, which need not exist yet."""
    folder, name = ("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")
    return root / ".venv" / folder / name


def version_of(python: Path) -> tuple[int, ...]:
    """`(3, 12)` for a Python that runs and has pip, else `()`: missing, or its base deleted."""
    command = [str(python), "-c", "import sys, pip; print(*sys.version_info[:2])"]
    try:
        answer = subprocess.run(command, env=isolated(), capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ()
    return tuple(int(part) for part in answer.stdout.split())


def wanted_stamp(root: Path, version: tuple[int, ...]) -> dict[str, str]:
    """What a finished `.venv` is stamped with: its Python, its folder and a hash of its contents.

    The contents are the lock and the parts of pyproject.toml that an installation depends on.
    """
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    parts = [project["build-system"], project["project"], project.get("tool", {}).get("setuptools")]
    contents = (root / "requirements.lock").read_text(encoding="utf-8") + json.dumps(parts)
    return {
        "python": ".".join(map(str, version)),
        "folder": str(root),
        "contents": hashlib.sha256(contents.encode()).hexdigest(),
    }


def state(root: Path) -> str:
    """`"ready"`, `"changed"` (sound, but not what is wanted now) or `"broken"` (or not there).

    A `.venv` that something else made has no stamp; if it runs, it is completed, not replaced.
    """
    version = version_of(python_of(root))
    if version < OLDEST or (os.environ.get("PYTHON") and version != sys.version_info[:2]):
        return "broken"
    stamp = root / ".venv" / STAMP
    if not stamp.exists():
        return "changed"
    try:
        found = json.loads(stamp.read_text(encoding="utf-8"))
    except ValueError:
        return "broken"
    wanted = wanted_stamp(root, version)
    if found == wanted:
        return "ready"
    same_place = found | {"contents": ""} == wanted | {"contents": ""}
    return "changed" if same_place else "broken"


def build(root: Path, lock: IO, *, afresh: bool) -> None:
    """Bring `.venv` to what requirements.lock and pyproject.toml say, from nothing if `afresh`."""
    venv, python, started = root / ".venv", str(python_of(root)), time.monotonic()
    if afresh:
        base = getattr(sys, "_base_executable", sys.executable)
        require_venv_module()
        empty(venv)
        require_disk(venv)
        write_stamp(venv, {})
        print(f"Making .venv with Python {sys.version.split()[0]} ({base}).", flush=True)
        run_logged([base, "-m", "venv", str(venv)], venv, lock)
    write_stamp(venv, {})
    requirements = root / "requirements.lock"
    number = len(requirements.read_text(encoding="utf-8").splitlines())
    print(f"Installing up to {number} packages; the first time this takes minutes.", flush=True)
    install = [python, "-m", "pip", "install"]
    binary = [*install, "--only-binary=:all:", "-r", str(requirements)]
    run_logged(binary, venv, lock, progress(number))
    if sys.stdout.isatty():
        print()
    run_logged([*install, "--no-deps", "--no-build-isolation", "-e", str(root)], venv, lock)
    shutil.rmtree(venv / "tmp", ignore_errors=True)
    write_stamp(venv, wanted_stamp(root, version_of(Path(python))))
    print(f"Ready after {time.monotonic() - started:.0f} s.", flush=True)


def empty(venv: Path) -> None:
    """Leave `venv` an empty folder; a link to a folder on another disk stays a link."""
    if venv.exists() and not venv.is_dir():
        raise SetupError(f"{venv} is a file, and a folder of that name is needed. Move it away.")
    venv.mkdir(exist_ok=True)
    if any(venv.iterdir()):
        print("The .venv that is here is half made or no longer fits; replacing it.", flush=True)
    # Its Python goes first: a half-emptied .venv that still ran would look like a sound one.
    python_of(venv.parent).unlink(missing_ok=True)
    for entry in venv.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def write_stamp(venv: Path, stamp: dict[str, str]) -> None:
    """Write the stamp so that a reader sees the old one or the new one, never a part."""
    new = venv / f"{STAMP}.new"
    new.write_text(json.dumps(stamp), encoding="utf-8")
    os.replace(new, venv / STAMP)


def require_venv_module() -> None:
    """Raise `SetupError` where the system's Python comes without venv, as Debian's does."""
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        package = "python{}.{}-venv".format(*sys.version_info[:2])
        raise SetupError(
            f"{sys.executable} has no venv module. On Debian and Ubuntu this command adds it:\n"
            f"  sudo apt install {package}\nThen run the same command again."
        )


def require_disk(venv: Path) -> None:
    """Raise `SetupError` when the disk under `venv` has less free than a set-up takes."""
    free = shutil.disk_usage(venv).free / 1e9
    if free < DISK_GB:
        raise SetupError(
            f"A set-up takes about {DISK_GB} GB in {venv.parent}, and {free:.1f} GB are free. "
            "Make room, or make .venv a link to a folder on a larger disk, and run the same "
            "command again."
        )


@contextmanager
def sole_setup(root: Path) -> Iterator[IO]:
    """Wait until no other set-up works in `root`, and keep others out; yield the lock's file."""
    with open(root / LOCK, "w", encoding="utf-8") as file:
        if not try_lock(file):
            print("Another set-up is at work in this folder; waiting for it.", flush=True)
            while not try_lock(file):
                time.sleep(0.2)
        yield file


def try_lock(file: IO) -> bool:
    """Take the lock that ends with the processes that hold `file` open; False if it is taken."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks: go on without
        return True
    return True


def isolated() -> dict[str, str]:
    """This process's environment without what would let other Python packages in."""
    return {key: os.environ[key] for key in os.environ if key not in ("PYTHONPATH", "PYTHONHOME")}


def run_logged(
    command: list[str], venv: Path, lock: IO, report: Callable[[str], None] = lambda line: None
) -> None:
    """Run `command`, append what it prints to the log and pass each line to `report`.

    Archives are unpacked inside `venv`, because a system's /tmp is often too small for torch. The
    child shares the lock, so that one that outlives its killed parent still keeps others out.
    Raises `SetupError` with advice and the last lines when the command fails.
    """
    (venv / "tmp").mkdir(exist_ok=True)
    places = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(venv / "tmp"))
    settings = {"PIP_USER": "0", "PIP_NO_INPUT": "1", "PYTHONUTF8": "1"}
    lines = []
    with (
        open(venv / LOG, "a", encoding="utf-8") as log,
        subprocess.Popen(
            command,
            env=isolated() | places | settings,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            pass_fds=() if os.name == "nt" else (lock.fileno(),),
        ) as child,
    ):
        for line in child.stdout:
            log.write(line)
            log.flush()
            lines.append(line)
            report(line)
    if child.returncode:
        telling = [line.rstrip()[:160] for line in lines if not line.startswith("Ignoring")]
        end = "\n".join(f"  {line}" for line in telling[-6:] if line)
        text = f"Last lines of {venv / LOG}:\n{end}\n\n{advice(''.join(lines))}"
        raise SetupError(text)


def progress(total: int) -> Callable[[str], None]:
    """Return a function that shows pip's lines as one changing line, on a terminal only."""
    collected = 0
    started = time.monotonic()

    def report(line: str) -> None:
        nonlocal total, collected
        verb = line.strip().partition(" ")[0]
        if verb == "Ignoring":
            total -= 1  # a package for another system
        elif verb in ("Collecting", "Processing", "Requirement"):
            collected += 1
        elif verb not in ("Downloading", "Installing"):
            return
        # "Collecting numpy==2.4.6 (from …", "Requirement already satisfied: numpy in …"
        what = "Unpacking" if verb == "Installing" else re.split(r" \(from | in ", line.strip())[0]
        minutes, seconds = divmod(int(time.monotonic() - started), 60)
        text = f"  {minutes}:{seconds:02d}  {collected} of {total}  {what}"
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{text:{width}.{width}}", end="", flush=True)

    return report if sys.stdout.isatty() else lambda line: None


def advice(text: str) -> str:
    """What to do about a failure that printed `text`."""
    for pattern, answer in ADVICE.items():
        if found := re.search(pattern, text):
            version = "{}.{}".format(*sys.version_info[:2])
            return answer.format(version=version, **found.groupdict())
    return "Run the same command again; if it fails in the same way, its log says more."
