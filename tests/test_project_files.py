"""What a fresh clone offers before any code runs: make's targets, the pins, CI, README, wheel."""

import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import bootstrap  # noqa: E402
import commands  # noqa: E402
import venv_setup  # noqa: E402


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


PROJECT = tomllib.loads(text("pyproject.toml"))
README = text("README.md")
needs_make = pytest.mark.skipif(not shutil.which("make"), reason="this machine has no make")


# One version in every file


def requirements_of(*extras: str) -> list[Requirement]:
    project = PROJECT["project"]
    optional = project["optional-dependencies"]
    lines = project["dependencies"] + [line for extra in extras for line in optional[extra]]
    return [Requirement(line) for line in lines if not line.startswith("attnlab[")]


def test_the_oldest_python_is_the_same_everywhere():
    oldest = ".".join(map(str, bootstrap.OLDEST))
    assert PROJECT["project"]["requires-python"] == f">={oldest}"
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    assert f"sys.version_info < {bootstrap.OLDEST}" in text("Makefile")
    assert f"--python-version {oldest} " in text("Makefile")
    assert f"Python {oldest} or newer" in text("Makefile")
    assert f"Python ≥ {oldest}" in README


def test_environment_yml_follows_pyproject():
    yaml = pytest.importorskip("yaml")
    listed = yaml.safe_load(text("environment.yml"))["dependencies"]
    python, pip, from_pip = listed
    assert python == f"python{PROJECT['project']['requires-python']}"
    assert pip == "pip"
    assert from_pip == {"pip": ["-e .[lab]"]}
    assert "lab" in PROJECT["project"]["optional-dependencies"]


LOCK = [Requirement(line) for line in text("requirements.lock").splitlines()]


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_lock_holds_one_version_of_everything_wanted_on_every_system(python):
    wanted = requirements_of("lab", "dev") + [
        Requirement(line) for line in PROJECT["build-system"]["requires"]
    ]
    for system, os_name in [("linux", "posix"), ("darwin", "posix"), ("win32", "nt")]:
        machine = {
            **default_environment(),
            "python_version": python,
            "python_full_version": f"{python}.9",
            "sys_platform": system,
            "os_name": os_name,
        }
        pins = {}
        for pin in LOCK:
            if pin.marker is None or pin.marker.evaluate(machine):
                assert canonicalize_name(pin.name) not in pins, pin
                pins[canonicalize_name(pin.name)] = str(pin.specifier).removeprefix("==")
        for requirement in wanted:
            version = pins[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{requirement} but {version} is locked"


def test_the_lock_pins_versions_and_names_no_place():
    for pin in LOCK:
        assert re.fullmatch(r"==[\w.+!]+", str(pin.specifier)), pin
        assert pin.url is None
    assert not re.search(r"://|^\s*-|@", text("requirements.lock"), re.MULTILINE)


def test_no_file_of_the_set_up_names_a_registry():
    names = ["README.md", "Makefile", ".ci/run", "environment.yml", "pyproject.toml"]
    for name in [*names, "scripts/bootstrap.py", "scripts/venv_setup.py", "scripts/commands.py"]:
        found = re.search(r"pypi\.|pythonhosted|anaconda\.org|https?://", text(name))
        assert not found, f"{name}: {found.group()}"


# make and its commands


@needs_make
def test_help_lists_every_target_and_each_command_has_one():
    shown = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.findall(r"^  make (\w+)\t\S", shown, re.MULTILINE)
    assert {*targets} == {*commands.COMMANDS, "help", "lock", "clean"}
    assert "sed" not in shown


@needs_make
def test_every_target_hands_its_name_and_arguments_to_bootstrap(tmp_path):
    """Of the Pythons here the first that runs and is new enough, whatever comes before it."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "bin").mkdir()
    executable(tmp_path / "bin" / "python3.13", "exit 127")  # a version manager's empty shim
    executable(tmp_path / "bin" / "python3.11", '[ "$1" = -c ] && [ "$2" ] && exit 1; echo old $*')
    found = run_make(tmp_path, "lab")
    assert found.stdout == "old scripts/bootstrap.py lab\n"

    executable(tmp_path / "bin" / "python3", '[ "$1" = -c ] || echo new "$@"')
    for command in commands.COMMANDS:
        found = run_make(tmp_path, command, "ARGS=-k attention")
        assert found.stdout == f"new scripts/bootstrap.py {command} -k attention\n"
    found = run_make(tmp_path, "lab", f"PYTHON={tmp_path}/bin/python3.11")
    assert found.stdout == "old scripts/bootstrap.py lab\n"


@needs_make
@pytest.mark.parametrize("chosen", ["", "PYTHON=/no/such python"])
def test_no_python_at_all(tmp_path, chosen):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "bin").mkdir()
    found = run_make(tmp_path, "test", *filter(None, [chosen]))
    assert found.returncode != 0
    assert found.stderr.startswith("No Python runs here (tried: ")
    assert "sudo apt install python3 python3-venv" in found.stderr
    assert "make test PYTHON=/path/to/python3" in found.stderr


def executable(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def run_make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run make where only the programs of `folder/bin` are found."""
    return subprocess.run(
        [shutil.which("make"), *arguments],
        cwd=folder,
        env={"PATH": str(folder / "bin")},
        capture_output=True,
        text=True,
    )


def test_commands_run_files_and_modules_that_are_there():
    for line in itertools.chain(*commands.COMMANDS.values()):
        if line[0] == "-m":
            assert importlib.util.find_spec(line[1]), line
        else:
            assert (ROOT / line[0]).is_file(), line


def test_benchmarks_share_their_arguments():
    lines = commands.command_lines("bench", ["--quick"])
    assert lines == [[*line, "--quick"] for line in commands.COMMANDS["bench"]]
    assert len(lines) >= 2


def test_tests_are_lint_and_one_strict_run_of_pytest():
    *lint, pytest_run = commands.command_lines("test", ["-k", "x"])
    assert lint == commands.COMMANDS["lint"]
    assert pytest_run[:3] == ["-m", "pytest", "--nbval"]
    assert pytest_run[-4:] == ["tests", "chapters", "-k", "x"]
    assert commands.command_lines("setup", []) == []


def test_lab_is_the_command_of_that_name():
    assert commands.command_lines("lab", ["1"]) == [["-m", "attnlab_command", "lab", "1"]]


def test_a_command_runs_inside_venv_with_two_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("PYTHONPATH", "/other/packages")
    env = commands.activated(venv_setup.python_of(ROOT))
    assert env["PATH"].startswith(str(venv_setup.python_of(ROOT).parent) + os.pathsep)
    assert env["VIRTUAL_ENV"] == str(ROOT / ".venv")
    assert env["OMP_NUM_THREADS"] == "2"
    assert "PYTHONPATH" not in env
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert commands.activated(venv_setup.python_of(ROOT))["OMP_NUM_THREADS"] == "1"


def test_a_failing_command_ends_the_run_with_its_code():
    failing = [sys.executable, "-c", "raise SystemExit(3)"]
    never = [sys.executable, "-c", "raise SystemExit(4)"]
    assert commands.run([failing, never], dict(os.environ)) == 3


def test_what_the_reader_sees_of_a_stopped_set_up(monkeypatch, capsys):
    monkeypatch.setattr(commands, "COMMANDS", {"setup": []})
    monkeypatch.chdir(ROOT)
    for raised, code, message in [
        (venv_setup.SetupError("Make room."), 1, "The set-up of attnlab stopped. Make room."),
        (KeyboardInterrupt(), 130, "Interrupted. The same command again"),
    ]:
        monkeypatch.setattr(venv_setup, "ensure", lambda root, raised=raised: throw(raised))
        assert commands.main(["setup"]) == code
        assert message in capsys.readouterr().err
    assert commands.main(["nonsense"]) == 2
    assert commands.main([]) == 0
    assert "usage: python scripts/bootstrap.py {setup}" in capsys.readouterr().out


def throw(error: BaseException):
    raise error


# CI


@pytest.mark.skipif(not shutil.which("bash"), reason="this machine has no bash")
@pytest.mark.parametrize(("chromium", "compiler"), [*itertools.product([True, False], repeat=2)])
def test_ci_installs_what_is_missing_and_calls_the_test_command(tmp_path, chromium, compiler):
    programs = tmp_path / "bin"
    programs.mkdir()
    log = tmp_path / "log"
    executable(programs / "apt-get", f'echo "apt-get $*" >>{log}')
    executable(programs / "make", f'echo "make $* $ATTNLAB_REQUIRE $PWD" >>{log}; exit 7')
    for name, there in [("chromium", chromium), ("g++", compiler)]:
        if there:
            executable(programs / name, "")
    command = [shutil.which("bash"), ROOT / ".ci" / "run"]
    found = subprocess.run(command, cwd="/", env={"PATH": str(programs)})
    assert found.returncode == 7

    missing = [name for name, there in [("chromium", chromium), ("g++", compiler)] if not there]
    install = f"apt-get install -y --no-install-recommends {' '.join(missing)}"
    expected = ["apt-get update", install] if missing else []
    expected.append(f"make test browser,compiler {ROOT}")
    assert log.read_text().splitlines() == expected


def test_ci_can_be_executed():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


# README


@needs_make
def test_readme_names_only_commands_that_exist():
    assert "make lab\n" in README
    assert "make test\n" in README
    named = {*re.findall(r"`make (\w+)", README), *re.findall(r"^make (\w+)", README, re.MULTILINE)}
    assert named <= {*commands.COMMANDS, "lock", "clean", "help"}
    windows = re.findall(r"scripts\\bootstrap\.py (\w+)", README)
    assert {"lab", "test"} <= {*windows} <= {*commands.COMMANDS}


def test_readme_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target


def test_readme_marks_as_ready_what_is_there():
    """The rows of its table: a link to a chapter that exists, or the word planned."""
    rows = re.findall(r"^\| (\d\d) \| (.+?) \|.*\| (\w+) \|$", README, re.MULTILINE)
    assert [number for number, _, _ in rows] == [f"{number:02}" for number in range(12)]
    for number, title, state in rows:
        there = sorted(ROOT.glob(f"chapters/{number}_*.ipynb"))
        assert state == ("ready" if there else "planned"), number
        assert bool(there) == ("](chapters/" in title)


BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=[block.splitlines()[0] for block in BLOCKS])
def test_readme_python_runs(block, monkeypatch, tmp_path):
    monkeypatch.setenv("ATTNLAB_CACHE", str(tmp_path))
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_readme_has_python():
    assert BLOCKS


@pytest.mark.skipif(sys.platform != "linux", reason="the README gives the number for Linux")
def test_readme_says_how_much_disk_a_set_up_asks_for():
    assert f"on Linux about {venv_setup.DISK_GB} GB of disk" in README


# The package without the repository


def test_a_wheel_carries_the_data_and_the_page_parts(tmp_path, monkeypatch):
    pytest.importorskip("pip")
    source = tmp_path / "source"
    for name in ["attnlab", "data"]:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ["pyproject.toml", "setup.py", "attnlab_command.py", "README.md"]:
        shutil.copy(ROOT / name, source)
    installed = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run(
        [*pip, "--no-build-isolation", "--target", installed, source], check=True, timeout=120
    )
    package = installed / "attnlab"
    for folder, target in [("attnlab", package), ("data", package / "data")]:
        paths = [path for path in (source / folder).rglob("*") if path.is_file()]
        assert len(paths) > 20
        for path in paths:
            assert (target / path.relative_to(source / folder)).is_file(), path
    spec = importlib.util.spec_from_file_location("installed_files", package / "lab" / "files.py")
    files = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(files)
    monkeypatch.delenv("ATTNLAB_DATA", raising=False)
    assert files.data_dir() == package / "data"
    assert files.repo_root() is None


def test_specifiers_are_lower_bounds():
    """An upper bound would shut out the next PyTorch; the lock is what pins."""
    for requirement in requirements_of("lab", "dev"):
        assert {bound.operator for bound in SpecifierSet(str(requirement.specifier))} == {">="}


# Contributing


CHECK_LIST = re.findall(r"^- \[ \] `(\S+)`", text("CONTRIBUTING.md"), re.MULTILINE)


@pytest.mark.parametrize(
    "chapter",
    sorted(
        path.stem
        for path in (ROOT / "chapters/source").glob("[0-9][0-9]_*.py")
        if path.stem[:2] > "00"
    ),
)
def test_each_chapter_has_what_the_check_list_asks(chapter):
    number, _ = chapter.split("_", 1)
    assert len(CHECK_LIST) == 8
    for pattern in CHECK_LIST:
        found = list(ROOT.glob(pattern.replace("NN_name", chapter).replace("NN", number)))
        assert found, f"{chapter} lacks {pattern}"
    for readme, folder in (("README.md", "chapters/"), ("chapters/README.md", "")):
        row = rf"^\| .*\({folder}{chapter}\.ipynb\).* \| ready \|$"
        assert re.search(row, text(readme), re.MULTILINE), f"{readme}: no row of {chapter}"
    assert f"\n### {number} " in text("chapters/README.md"), f"no notes for teachers of {chapter}"


def test_the_citation_is_of_this_version():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load(text("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == PROJECT["project"]["version"]
    assert citation["license"] == "MIT"
