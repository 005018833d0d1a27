"""The doctor: every kind of damage becomes a row with a command, and none a traceback."""

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch

from attnlab.lab import checkpoints, data, doctor, files

INSTALLED = {"einops": "0.8.2", "torch": "2.15.0+cu132", "numpy": "2.3.0"}


def version_of(name: str) -> str:
    if name not in INSTALLED:
        raise PackageNotFoundError(name)
    return INSTALLED[name]


def compare(*wanted: str, **more) -> list[doctor.Row]:
    more = {"mend": "mend it", "version_of": version_of} | more
    return doctor.compare(wanted, "requirements.lock", **more)


def states(rows) -> dict[str, str]:
    return {row.name: row.state for row in rows}


# Packages


def test_packages_that_are_as_in_the_lock_are_one_line():
    # A local version, as PyTorch's CUDA builds have one, is the same version.
    rows = compare("einops==0.8.2", "torch==2.15.0", "colorama==0.4.6 ; sys_platform == 'dos'")
    assert rows == [doctor.Row("packages", "OK", "2 are as in requirements.lock")]


def test_a_missing_package_and_a_wrong_version():
    rows = compare("einops==0.8.2", "timm==1.0.31", "numpy==2.4.6")
    assert rows == [
        doctor.Row("packages", "OK", "1 are as in requirements.lock"),
        doctor.Row("timm", "MEND", "is not installed; requirements.lock: ==1.0.31", "mend it"),
        doctor.Row("numpy", "MEND", "2.3.0 is installed; requirements.lock: ==2.4.6", "mend it"),
    ]


def test_what_an_extra_needs_is_told_apart():
    bounds = ("einops>=0.9", 'jupyterlab>=4.4 ; extra == "lab"', 'pytest>=8 ; extra == "dev"')
    assert states(compare(*bounds)) == {"packages": "OK", "einops": "MEND"}
    rows = compare(*bounds, extra="lab", missing="optional")
    assert states(rows) == {"packages": "OK", "jupyterlab": "optional"}


def test_the_lock_counts_only_in_the_environment_made_from_it(tmp_path, monkeypatch):
    (tmp_path / "requirements.lock").write_text("einops==0.0.1\n")
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    (row,) = [row for row in doctor.packages() if row.name == "einops"]
    assert row.state == "MEND"
    assert row.command.endswith(f"-m pip install -r {tmp_path / 'requirements.lock'}")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "conda"))
    assert "einops" not in states(doctor.packages())  # 0.0.1 is not within the bounds, ours is


# Files


@pytest.fixture
def bundle(tmp_path, monkeypatch) -> Path:
    """A copy of the bundled data that may be damaged."""
    folder = tmp_path / "data"
    shutil.copytree(files.data_dir(), folder)
    monkeypatch.setenv("ATTNLAB_DATA", str(folder))
    return folder


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_corrupted_and_a_missing_picture(bundle):
    assert states(doctor.data()) == {"data": "OK"}
    bad, gone = (bundle / row["file"] for row in data.index()[:2])
    damage(bad)
    gone.unlink()
    (row,) = doctor.data()
    assert row.state == "MEND"
    assert f"{bad} is corrupted" in row.detail
    assert f"{gone} is missing" in row.detail
    assert "mend" not in row.detail  # the command says it
    assert row.command == ("set ATTNLAB_DATA=" if os.name == "nt" else "unset ATTNLAB_DATA")


def test_data_without_an_index(bundle):
    (bundle / "index.csv").unlink()
    (row,) = doctor.data()
    assert row.state == "MEND"
    assert "index.csv is missing" in row.detail


def test_a_corrupted_checkpoint(bundle):
    checkpoints.save(
        bundle / "checkpoints" / "tiny",
        timm.create_model("vit_mini", depth=1),
        factory="vit_mini",
        arguments={"depth": 1},
        command="attnlab train tiny",
        seed=0,
        device="cpu",
        seconds=0.0,
        metrics={},
        data={"name": "none"},
        probe_image={"shape": [1, 3, 64, 64], "seed": 0},
    )
    assert states(doctor.checkpoints()) == {"checkpoints": "OK"}
    damage(bundle / "checkpoints" / "tiny.safetensors")
    (row,) = doctor.checkpoints()
    assert row.state == "MEND"
    assert "tiny" in row.detail
    assert row.command


def test_many_problems_are_counted():
    problems = [f"file {i} is missing; mend: git checkout" for i in range(5)]
    row = doctor.integrity("data", problems, Path("data"), "webp")
    assert row.detail == "file 0 is missing; file 1 is missing; file 2 is missing; and 2 more"


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("a file, where a folder is needed")
    monkeypatch.setenv("ATTNLAB_CACHE", str(tmp_path / "file" / "cache"))
    (row,) = doctor.cache()
    assert row.state == "MEND"
    assert f"{tmp_path / 'file' / 'cache'} cannot be written" in row.detail
    assert "ATTNLAB_CACHE=" in row.command
    monkeypatch.setenv("ATTNLAB_CACHE", str(tmp_path / "new"))
    assert states(doctor.cache()) == {"cache": "OK"}
    assert list((tmp_path / "new").iterdir()) == []  # it leaves nothing behind


def test_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNLAB_CACHE", str(tmp_path / "not" / "made" / "yet"))
    assert states(doctor.disk()) == {"disk": "OK"}
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9e9, 8.7e9, 3e8))
    (row,) = doctor.disk()
    assert (row.state, row.detail) == ("MEND", f"0.3 GB free in {tmp_path}; 1 are needed")


# The machine


def test_python_version():
    assert doctor.python_version((3, 11, 0))[0].state == "OK"
    (row,) = doctor.python_version((3, 10, 14))
    assert row.state == "MEND"
    assert row.detail == "3.10.14; 3.11 is the oldest that will do"
    assert "3.11" in row.command


def test_device_and_threads(monkeypatch):
    (row,) = doctor.device()
    assert row.state != "MEND"
    assert f"PyTorch {torch.__version__} on cpu" in row.detail
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4096)
    (row,) = doctor.threads()
    assert row.state == "optional"
    assert row.command.startswith(("export OMP_NUM_THREADS=", "set OMP_NUM_THREADS="))


def test_a_gpu_that_pytorch_cannot_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    (row,) = doctor.device()
    assert row.state == "optional"
    assert row.detail.endswith("it cannot use the NVIDIA GPU that is here")


def test_jupyter_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor, "is_checkout", lambda: True)
    (row,) = doctor.jupyter()
    assert row.state == "MEND"
    assert row.detail == "not installed: jupyterlab, ipykernel, ipywidgets"
    monkeypatch.setattr(doctor, "is_checkout", lambda: False)
    assert doctor.jupyter()[0].state == "optional"


def test_a_kernel_of_another_python(tmp_path, monkeypatch):
    """A kernel named python3 in the user's own folder is found before Jupyter's native one."""
    from jupyter_client import kernelspec

    assert states(doctor.jupyter()) == {"Jupyter": "OK"}
    foreign = SimpleNamespace(argv=["/opt/other/bin/python3"], resource_dir=str(tmp_path))
    monkeypatch.setattr(kernelspec.KernelSpecManager, "get_kernel_spec", lambda self, name: foreign)
    (row,) = doctor.jupyter()
    assert row.state == "MEND"
    assert row.detail == "its kernel runs another Python: /opt/other/bin/python3"
    assert row.command.endswith("-m ipykernel install --user")
    foreign.argv = ["python"]  # which Jupyter replaces by its own
    assert states(doctor.jupyter()) == {"Jupyter": "OK"}


@pytest.mark.parametrize("check", [doctor.browser, doctor.compiler])
def test_programs_that_only_tests_need(check, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert check()[0].state == "OK"
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/apt" if name == "apt" else None)
    (row,) = check()
    assert row.state == "optional"
    assert row.command.startswith("sudo apt install ")


# The whole


def test_a_check_that_crashes_is_a_row():
    def broken_thing():
        raise ModuleNotFoundError("No module named 'torch'")

    rows = doctor.examine([doctor.python_version, broken_thing])
    assert [row.name for row in rows] == ["Python", "broken thing"]
    assert rows[1].state == "MEND"
    expected = "cannot be checked: ModuleNotFoundError: No module named 'torch'"
    assert rows[1].detail == expected
    assert "pip install" in rows[1].command


def test_exit_code_and_table(monkeypatch, capsys):
    row = doctor.Row("numpy", "MEND", "2.3.0 is\ninstalled", "python -m pip install numpy")
    monkeypatch.setattr(doctor, "CHECKS", (doctor.python_version, lambda: [row]))
    assert doctor.main() == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("OK        Python")
    assert printed[1:] == [
        "MEND      numpy            2.3.0 is installed",
        "                           → python -m pip install numpy",
        "",
        "1 to mend.",
    ]
    optional = row._replace(state="optional")
    monkeypatch.setattr(doctor, "CHECKS", (doctor.python_version, lambda: [optional]))
    assert doctor.main() == 0
    assert capsys.readouterr().out.endswith("\n\nNothing to mend.\n")


def test_this_tree_is_healthy():
    """Whatever row is wrong here is wrong with the tree, or with this machine: its text says it."""
    rows = [row for row in doctor.examine() if row.state == "MEND"]
    assert not rows, doctor.table(rows)


def test_the_doctor_answers_where_pytorch_is_missing(tmp_path):
    """In a child process whose `import torch` fails, as after an interrupted installation."""
    (tmp_path / "torch.py").write_text("raise ImportError('half installed')\n")
    answer = subprocess.run(
        [sys.executable, "-c", "import sys, attnlab_command as c; sys.exit(c.main())", "doctor"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{doctor.ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 1, answer.stderr
    assert answer.stderr == ""
    assert "device           cannot be checked: ImportError: half installed" in answer.stdout
    assert "OK        Python" in answer.stdout


def test_commands_are_as_one_types_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert doctor.quoted(tmp_path / "a folder" / "python") == "'a folder/python'"
    assert doctor.quoted("/elsewhere/python") == "/elsewhere/python"


def test_what_brings_the_data_back(tmp_path, monkeypatch):
    monkeypatch.delenv("ATTNLAB_DATA", raising=False)
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    assert doctor.restore().endswith("-m pip install --force-reinstall --no-deps attnlab")
    (tmp_path / ".git").mkdir()
    monkeypatch.chdir(tmp_path)
    assert doctor.restore() == "git -C . checkout -- data"
