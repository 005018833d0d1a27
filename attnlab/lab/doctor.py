"""What `attnlab doctor` finds out about a machine, each finding with the command that mends it.

A check imports what it looks at inside itself, and one that raises becomes a row like any other, so
that the doctor answers also where PyTorch is missing.
"""

import importlib.metadata
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
OLDEST = (3, 11)
FREE_GB = 1.0  # what the caches of all chapters take, and some room


class Row(NamedTuple):
    """A finding; `state` is "OK", "optional" (missing, but nothing depends on it) or "MEND"."""

    name: str
    state: str
    detail: str
    command: str = ""


def main() -> int:
    """Print the table. Returns 1 when something needs mending, else 0."""
    rows = examine()
    print(table(rows))
    number = sum(row.state == "MEND" for row in rows)
    print(f"\n{number or 'Nothing'} to mend.")
    return 1 if number else 0


def examine(checks: Iterable[Callable[[], list[Row]]] | None = None) -> list[Row]:
    """The rows of all checks, or of the given ones."""
    rows = []
    for check in CHECKS if checks is None else checks:
        try:
            rows += check()
        except Exception as error:  # whatever is broken, the other checks are still worth having
            detail = f"cannot be checked: {type(error).__name__}: {error}"
            rows.append(Row(check.__name__.replace("_", " "), "MEND", detail, repair()))
    return rows


def table(rows: Iterable[Row]) -> str:
    """The rows as text, one line each, and the command in a line below."""
    lines = []
    for name, state, detail, command in rows:
        lines.append(f"{state:<9} {name:<16} {' '.join(detail.split())}")
        if command:
            lines.append(f"{'':<9} {'':<16} → {command}")
    return "\n".join(lines)


def python_version(version: tuple[int, ...] = tuple(sys.version_info[:3])) -> list[Row]:
    """Python is new enough."""
    found, oldest = (".".join(map(str, numbers)) for numbers in (version, OLDEST))
    if version < OLDEST:
        return [
            Row("Python", "MEND", f"{found}; {oldest} is the oldest that will do", newer_python())
        ]
    return [Row("Python", "OK", f"{found}, {sys.executable}")]


def packages() -> list[Row]:
    """The installed packages are those of the lock, or within the bounds of pyproject.toml.

    The lock counts in the `.venv` that is made from it. An environment made by pip or conda alone
    may have other versions, and is held to the bounds.
    """
    lock = ROOT / "requirements.lock"
    if lock.is_file() and Path(sys.prefix).resolve() == (ROOT / ".venv").resolve():
        return compare(lock.read_text("utf-8").splitlines(), lock.name, mend=repair())
    bounds = importlib.metadata.requires("attnlab") or []
    missing = "MEND" if is_checkout() else "optional"
    return [
        *compare(bounds, "attnlab's bounds", mend=repair()),
        *compare(bounds, "attnlab[lab]'s bounds", "lab", mend=repair("lab"), missing=missing),
    ]


def compare(
    wanted: Iterable[str],
    source: str,
    extra: str = "",
    *,
    mend: str,
    missing: str = "MEND",
    version_of: Callable[[str], str] = importlib.metadata.version,
) -> list[Row]:
    """One row that counts the requirements that are met, and one for each that is not.

    Args:
        wanted: requirements, like "torch>=2.6" or "colorama==0.4.6 ; sys_platform == 'win32'".
        source: where they are written.
        extra: look at what this extra needs beyond the package itself.
        mend: the command that installs what is wanted.
        missing: the state of a package that is not installed.
        version_of: name → installed version; raises `PackageNotFoundError`.
    """
    from packaging.requirements import Requirement

    def applies(requirement: Requirement, extra: str) -> bool:
        return requirement.marker is None or requirement.marker.evaluate({"extra": extra})

    met, rows = 0, []
    for requirement in map(Requirement, wanted):
        if not applies(requirement, extra) or (extra and applies(requirement, "")):
            continue
        name, bounds = requirement.name, requirement.specifier
        try:
            version = version_of(name)
        except importlib.metadata.PackageNotFoundError:
            rows.append(Row(name, missing, f"is not installed; {source}: {bounds}", mend))
            continue
        if bounds.contains(version, prereleases=True):
            met += 1
        else:
            rows.append(Row(name, "MEND", f"{version} is installed; {source}: {bounds}", mend))
    return [Row("packages", "OK", f"{met} are as in {source}"), *rows]


def device() -> list[Row]:
    """PyTorch computes on every device that it sees."""
    import torch

    names = ["cpu"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    for name in names:
        torch.ones(8, device=name).sum().item()
    cards = [torch.cuda.get_device_name(name) for name in names[1:]]
    detail = f"PyTorch {torch.__version__} on {', '.join(names)} {' '.join(cards)}"
    if not cards and shutil.which("nvidia-smi"):
        return [Row("device", "optional", f"{detail}; it cannot use the NVIDIA GPU that is here")]
    return [Row("device", "OK", detail)]


def threads() -> list[Row]:
    """PyTorch does not use more threads than there are cores."""
    import torch

    count = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    detail = f"{count}, and cores: {cores}"
    if count > cores:
        return [
            Row(
                "threads",
                "optional",
                f"{detail}; more is slower",
                set_variable("OMP_NUM_THREADS", cores),
            )
        ]
    return [Row("threads", "OK", detail)]


def data() -> list[Row]:
    """Every file of the bundled data is there and has the hash that the index gives."""
    from attnlab.lab import data, files

    return [integrity("data", data.verify(), files.data_dir(), "webp")]


def checkpoints() -> list[Row]:
    """Every bundled checkpoint has the hash that its sidecar gives, loads and answers right."""
    from attnlab.lab import checkpoints, files

    folder = files.data_dir() / "checkpoints"
    return [integrity("checkpoints", checkpoints.verify(), folder, "safetensors")]


def integrity(name: str, problems: list[str], folder: Path, suffix: str) -> Row:
    """The row of a folder whose files were compared with what is written about them."""
    if not problems:
        return Row(name, "OK", f"{len(list(folder.rglob(f'*.{suffix}')))} files in {folder}")
    told = [problem.partition("; mend:")[0] for problem in problems[:3]]
    if len(problems) > 3:
        told.append(f"and {len(problems) - 3} more")
    return Row(name, "MEND", "; ".join(told), restore())


def jupyter() -> list[Row]:
    """JupyterLab and the widgets are there, and the default kernel is this Python."""
    wanted = ("jupyterlab", "ipykernel", "ipywidgets")
    if absent := [name for name in wanted if importlib.util.find_spec(name) is None]:
        state = "MEND" if is_checkout() else "optional"
        return [Row("Jupyter", state, f"not installed: {', '.join(absent)}", repair("lab"))]
    from jupyter_client.kernelspec import KernelSpecManager

    kernel = KernelSpecManager().get_kernel_spec("python3")
    program = Path(kernel.argv[0])
    # Jupyter replaces a bare "python" by the Python that it runs with itself.
    if program.is_absolute() and program.parent.resolve() != Path(sys.executable).parent.resolve():
        inside = Path(kernel.resource_dir).is_relative_to(sys.prefix)
        command = f"{this_python()} -m ipykernel install {'--sys-prefix' if inside else '--user'}"
        return [Row("Jupyter", "MEND", f"its kernel runs another Python: {program}", command)]
    version = importlib.metadata.version("jupyterlab")
    return [Row("Jupyter", "OK", f"JupyterLab {version}, kernel and widgets")]


def browser() -> list[Row]:
    """A Chromium for the tests of the explorer."""
    return optional("browser", ("chromium", "google-chrome"), "chromium", "the explorer's tests")


def compiler() -> list[Row]:
    """A C++ compiler for `torch.compile`."""
    return optional("compiler", ("c++", "g++", "clang++"), "g++", "torch.compile and its tests")


def optional(name: str, programs: tuple[str, ...], package: str, purpose: str) -> list[Row]:
    """The row of a program that only some tests need."""
    if path := next(filter(None, map(shutil.which, programs)), None):
        return [Row(name, "OK", path)]
    command = f"sudo apt install {package}" if shutil.which("apt") else ""
    return [Row(name, "optional", f"no {', '.join(programs)} here; for {purpose}", command)]


def disk() -> list[Row]:
    """There is room where generated data is kept."""
    from attnlab.lab import files

    folder = files.cache_dir()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free / 1e9
    if free < FREE_GB:
        detail = f"{free:.1f} GB free in {existing}; {FREE_GB:g} are needed"
        return [Row("disk", "MEND", detail, elsewhere())]
    return [Row("disk", "OK", f"{free:.0f} GB free in {existing}")]


def cache() -> list[Row]:
    """The cache can be written."""
    from attnlab.lab import files

    folder = files.cache_dir()
    probe = folder / "doctor.txt"
    try:
        with files.atomic_write(probe) as path:
            path.write_text("written by attnlab doctor\n", "utf-8")
        probe.unlink()
    except OSError as error:
        reason = f"{folder} cannot be written: {error.strerror}"
        return [Row("cache", "MEND", reason, elsewhere())]
    return [Row("cache", "OK", str(folder))]


CHECKS = (
    python_version,
    packages,
    device,
    threads,
    data,
    checkpoints,
    jupyter,
    browser,
    compiler,
    disk,
    cache,
)


def is_checkout() -> bool:
    """Whether this is the repository, with the chapters, and not an installed package."""
    return (ROOT / "pyproject.toml").is_file() and (ROOT / "chapters").is_dir()


def quoted(path: str | Path) -> str:
    """A path as one types it here: relative to the working directory where it lies below."""
    path = Path(path)
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return subprocess.list2cmdline([str(path)]) if os.name == "nt" else shlex.quote(str(path))


def this_python() -> str:
    return quoted(sys.executable)


def newer_python() -> str:
    """The command that brings a newer Python."""
    version = ".".join(map(str, OLDEST))
    if is_checkout() and os.name != "nt":
        return f"make setup PYTHON=python{version}"
    return (
        f"winget install Python.Python.{version}"
        if os.name == "nt"
        else f"install Python {version}"
    )


def repair(extra: str = "") -> str:
    """The command that installs the packages that are wanted here."""
    lock = ROOT / "requirements.lock"
    if lock.is_file() and Path(sys.prefix).resolve() == (ROOT / ".venv").resolve():
        return f"{this_python()} -m pip install -r {quoted(lock)}"
    if is_checkout():
        return f"{this_python()} -m pip install -e {quoted(f'{ROOT}[lab]')}"
    name = f"attnlab[{extra}]" if extra else "attnlab"
    return f"{this_python()} -m pip install --upgrade --force-reinstall {quoted(name)}"


def restore() -> str:
    """The command that brings the bundled files back as they were published."""
    if os.environ.get("ATTNLAB_DATA"):
        return "set ATTNLAB_DATA=" if os.name == "nt" else "unset ATTNLAB_DATA"
    if (ROOT / ".git").exists():
        return f"git -C {quoted(ROOT)} checkout -- data"
    return f"{this_python()} -m pip install --force-reinstall --no-deps attnlab"


def set_variable(name: str, value: object) -> str:
    return f"set {name}={value}" if os.name == "nt" else f"export {name}={value}"


def elsewhere() -> str:
    """The command that keeps generated data in another place, which is there on every machine."""
    return set_variable("ATTNLAB_CACHE", Path(tempfile.gettempdir()) / "attnlab")
