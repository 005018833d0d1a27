"""From a bare Python to a running course: `.venv`, make's targets and the files that pin them.

Where a test follows the whole way of a set-up, tests/fake_python.sh stands in for Python and pip,
so that each one takes a fraction of a second and touches no network.
"""

import ast
import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))

import bootstrap  # noqa: E402
import venv_setup  # noqa: E402

REAL_PYTHON = sys._base_executable
on_posix = pytest.mark.skipif(os.name == "nt", reason="uses a shell script and make")


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A repository of two files whose Python is fake_python.sh; the name has a space."""
    root = tmp_path / "a course"
    root.mkdir()
    (root / "requirements.lock").write_text("numpy==2.4.6\ntorch==2.15.0\n")
    (root / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\n[project]\nname = "course"\nversion = "1"\n'
    )
    monkeypatch.setattr(sys, "_base_executable", str(ROOT / "tests" / "fake_python.sh"))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("PIP", "true")
    monkeypatch.setenv("VERSION", "{} {}".format(*sys.version_info))
    monkeypatch.delenv("PYTHON", raising=False)
    monkeypatch.setattr(venv_setup, "DISK_GB", 0)
    return root


def pip_calls(course: Path) -> list[str]:
    """What pip was asked since the last look."""
    calls = course.parent / "calls"
    lines = calls.read_text().splitlines() if calls.exists() else []
    calls.unlink(missing_ok=True)
    return lines


@on_posix
def test_first_set_up_installs_the_lock_then_the_package_and_the_second_does_nothing(course):
    python = venv_setup.ensure(course)
    assert python == course / ".venv" / "bin" / "python"
    assert python.exists()
    lock, package = pip_calls(course)
    assert lock == f"--only-binary=:all: -r {course}/requirements.lock"
    assert package == f"--no-deps --no-build-isolation -e {course}"
    assert not (course / ".venv" / "tmp").exists()

    assert venv_setup.ensure(course) == python
    assert pip_calls(course) == []


@on_posix
def test_an_update_that_fails_leaves_a_venv_that_is_made_anew(course, monkeypatch):
    venv_setup.ensure(course)
    (course / "requirements.lock").write_text("numpy==2.5.0\n")
    monkeypatch.setenv("PIP", "exit 1")
    with pytest.raises(venv_setup.SetupError):
        venv_setup.ensure(course)
    assert venv_setup.state(course) == "broken"


@on_posix
@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("requirements.lock", "2.15.0", "2.16.0"),
        ("pyproject.toml", 'version = "1"', 'version = "2"'),
    ],
)
def test_changed_requirements_are_installed_into_the_same_venv(course, file, old, new):
    venv_setup.ensure(course)
    pip_calls(course)
    (course / ".venv" / "kept").touch()
    path = course / file
    path.write_text(path.read_text().replace(old, new))
    assert venv_setup.state(course) == "changed"
    venv_setup.ensure(course)
    assert len(pip_calls(course)) == 2
    assert (course / ".venv" / "kept").exists()
    assert venv_setup.state(course) == "ready"


def other_stamp(course: Path, **changes) -> None:
    stamp = course / ".venv" / venv_setup.STAMP
    stamp.write_text(json.dumps(json.loads(stamp.read_text()) | changes))


DAMAGE = {
    "no Python in it": lambda course: venv_setup.python_of(course).unlink(),
    "its Python does not run": lambda course: venv_setup.python_of(course).write_text("#!/no/sh\n"),
    "its Python is another one now": lambda course: other_stamp(course, python="3.99"),
    "made in another folder": lambda course: other_stamp(course, folder="/elsewhere"),
    "stamp emptied": lambda course: (course / ".venv" / venv_setup.STAMP).write_text("{}"),
    "stamp cut off": lambda course: (course / ".venv" / venv_setup.STAMP).write_text('{"pyth'),
}


@on_posix
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_venv_is_made_anew(course, damage, capsys):
    venv_setup.ensure(course)
    (course / ".venv" / "rest").touch()
    damage(course)
    pip_calls(course)
    capsys.readouterr()
    venv_setup.ensure(course)
    assert "half made or no longer fits; replacing it" in capsys.readouterr().out
    assert not (course / ".venv" / "rest").exists()
    assert len(pip_calls(course)) == 2
    assert venv_setup.state(course) == "ready"


@on_posix
def test_a_venv_too_old_is_made_anew(course, monkeypatch):
    venv_setup.ensure(course)
    (course / ".venv" / venv_setup.STAMP).unlink()
    assert venv_setup.state(course) == "changed"
    monkeypatch.setenv("VERSION", "3 10")
    assert venv_setup.state(course) == "broken"


@on_posix
def test_the_variable_python_replaces_a_venv_of_another_version(course, monkeypatch):
    venv_setup.ensure(course)
    other_stamp(course, python="3.99")
    monkeypatch.setenv("VERSION", "3 99")
    assert venv_setup.state(course) == "ready"
    monkeypatch.setenv("PYTHON", "python3.11")
    assert venv_setup.state(course) == "broken"


@on_posix
def test_a_venv_that_someone_else_made_is_completed_not_replaced(course):
    python = venv_setup.python_of(course)
    python.parent.mkdir(parents=True)
    shutil.copy(sys._base_executable, python)
    (course / ".venv" / "mine").touch()
    venv_setup.ensure(course)
    assert len(pip_calls(course)) == 2
    assert (course / ".venv" / "mine").exists()
    assert venv_setup.state(course) == "ready"


@on_posix
def test_a_venv_that_is_a_link_to_another_disk_stays_one(course, tmp_path):
    disk = tmp_path / "large disk"
    disk.mkdir()
    (disk / "rest").touch()
    (course / ".venv").symlink_to(disk, target_is_directory=True)
    venv_setup.ensure(course)
    assert (course / ".venv").is_symlink()
    assert (disk / venv_setup.STAMP).exists()
    assert not (disk / "rest").exists()


@on_posix
def test_a_half_emptied_venv_is_not_taken_for_a_sound_one(course, monkeypatch):
    """Seen for real: killed while it removed a .venv, whose stamp was gone and whose Python ran."""
    venv_setup.ensure(course)
    other_stamp(course, folder="/elsewhere")

    def interrupted(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            venv_setup.ensure(course)
    (course / ".venv" / venv_setup.STAMP).unlink(missing_ok=True)
    assert venv_setup.state(course) == "broken"


def set_up_elsewhere(course: Path, **environment: str) -> subprocess.Popen:
    """A set-up in another process."""
    code = (
        "import sys, pathlib, venv_setup; venv_setup.DISK_GB = 0; "
        f"sys._base_executable = {sys._base_executable!r}; "
        f"venv_setup.ensure(pathlib.Path({str(course)!r}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
    )


def wait_for(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@on_posix
def test_killed_while_pip_works_then_mended_without_two_pips_at_once(course):
    done = course / "first pip is done"
    first = set_up_elsewhere(course, PIP=f"sleep 1; touch '{done}'")
    wait_for((course.parent / "calls").exists)
    first.kill()
    first.wait()
    assert venv_setup.state(course) == "broken"
    assert not done.exists()

    second = set_up_elsewhere(course, PIP=f"test -e '{done}'")  # fails if the orphan still works
    out, _ = second.communicate(timeout=60)
    assert second.returncode == 0
    assert out.startswith("Another set-up is at work in this folder; waiting for it.\n")
    assert venv_setup.state(course) == "ready"


@on_posix
def test_two_at_once_install_once(course):
    both = [set_up_elsewhere(course, PIP="sleep 0.3") for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert len(pip_calls(course)) == 2
    assert sum("Making .venv" in out for out in outputs) == 1


# What stops a set-up is said, and how to go on


@on_posix
@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("ERROR: [Errno 28] No space left on device", "The disk is full."),
        ("OSError: [Errno 122] Disk quota exceeded", "The disk is full."),
        (
            "WARNING: Retrying after connection broken by NewConnectionError\n"
            "ERROR: No matching distribution found for numpy==2.4.6",
            "The package index cannot be reached. The first set-up needs a network",
        ),
        (
            "ERROR: No matching distribution found for numpy==2.4.6",
            "no ready-made numpy==2.4.6 for Python {}.{} ".format(*sys.version_info),
        ),
        ("Error: Refusing to create a venv: it contains the PATH separator :", "Rename the folder"),
        ("PermissionError: [Errno 13] Permission denied: x", "Close what uses .venv"),
        ("something else", "if it fails in the same way, its log says more"),
    ],
)
def test_a_failing_pip_is_explained(course, monkeypatch, printed, expected):
    monkeypatch.setenv("PIP", f"echo '{printed}'; exit 1")
    with pytest.raises(venv_setup.SetupError) as caught:
        venv_setup.ensure(course)
    assert expected in str(caught.value)
    assert printed.splitlines()[-1] in str(caught.value)
    assert printed in (course / ".venv" / venv_setup.LOG).read_text()
    assert venv_setup.state(course) == "broken"

    monkeypatch.setenv("PIP", "true")
    venv_setup.ensure(course)
    assert venv_setup.state(course) == "ready"


@on_posix
def test_too_little_disk_is_said_before_anything_is_made(course, monkeypatch):
    monkeypatch.setattr(venv_setup, "DISK_GB", 10**6)
    with pytest.raises(venv_setup.SetupError, match=r"about 1000000 GB in .*, and \d+\.\d GB are"):
        venv_setup.ensure(course)
    assert pip_calls(course) == []


@on_posix
def test_a_disk_that_fills_up_under_the_set_up_itself(course, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(venv_setup.SetupError, match="The disk is full"):
        venv_setup.ensure(course)


def test_a_python_without_venv_names_the_package_that_brings_it(course, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "ensurepip" else find_spec(name)
    )
    package = "python{}.{}-venv".format(*sys.version_info)
    with pytest.raises(venv_setup.SetupError, match=f"sudo apt install {package}"):
        venv_setup.ensure(course)


def test_a_file_in_the_place_of_venv(course):
    (course / ".venv").touch()
    with pytest.raises(venv_setup.SetupError, match="is a file, and a folder of that name"):
        venv_setup.ensure(course)


@on_posix
def test_missing_lock_file_is_named(course):
    (course / "requirements.lock").unlink()
    with pytest.raises(venv_setup.SetupError, match=r"requirements\.lock"):
        venv_setup.ensure(course)


def test_too_old_a_python_is_named():
    text = bootstrap.too_old((3, 9, 2), "/usr/bin/python3")
    assert text.startswith("attnlab needs Python 3.11 or newer, and /usr/bin/python3 is Python 3.9")
    assert "make PYTHON=python3.13 lab" in text
    assert bootstrap.too_old((3, 11, 0), "python3") is None


def test_bootstrap_parses_on_a_python_that_is_too_old():
    ast.parse((SCRIPTS / "bootstrap.py").read_text(encoding="utf-8"), feature_version=(3, 4))


BACKEND = """
import shutil

def build_editable(folder, *_):
    shutil.copy("../tiny-1.0-py3-none-any.whl", folder)
    return "tiny-1.0-py3-none-any.whl"
"""


def test_set_up_with_the_real_venv_and_pip(course, tmp_path, monkeypatch):
    """One wheel from a folder; then a newer one is wanted, and the index is a closed port."""
    with zipfile.ZipFile(tmp_path / "tiny-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny.py", "answer = 42")
        about = {
            "METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
            "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "RECORD": "",
        }
        for name, text in about.items():
            wheel.writestr(f"tiny-1.0.dist-info/{name}", text)
    (course / "requirements.lock").write_text("tiny==1.0\n")
    (course / "backend.py").write_text(BACKEND)
    (course / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        '[project]\nname = "tiny"\nversion = "1.0"\n'
    )
    monkeypatch.setattr(sys, "_base_executable", REAL_PYTHON)
    for name in [name for name in os.environ if name.startswith("PIP")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    python = venv_setup.ensure(course)
    answer = subprocess.run([python, "-c", "import tiny; print(tiny.answer)"], capture_output=True)
    assert answer.stdout.split() == [b"42"]

    (course / "requirements.lock").write_text("tiny==2.0\n")
    with pytest.raises(venv_setup.SetupError, match="The package index cannot be reached"):
        venv_setup.ensure(course)
