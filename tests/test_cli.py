"""The command line: what it starts, what it passes on, what it says to a wrong word."""

import subprocess
import sys
import types

import nbformat
import pytest
from nbformat.sign import NotebookNotary

import attnlab_command
from attnlab import cli


@pytest.fixture
def chapters(tmp_path, monkeypatch):
    for name in ("00_start_here", "01_attention", "10_spformer", "11_capstone"):
        (tmp_path / f"{name}.ipynb").write_text("{}")
    (tmp_path / "README.md").write_text("")
    monkeypatch.setattr(cli, "CHAPTERS", tmp_path)
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    return tmp_path


@pytest.fixture
def started(monkeypatch) -> list[list[str]]:
    """The commands that would have taken this process over."""
    commands = []
    monkeypatch.setattr(cli, "run", lambda command: commands.append(command) or 0)
    monkeypatch.setattr(cli.os, "geteuid", lambda: 1000, raising=False)
    return commands


def test_help_answers_without_pytorch():
    program = (
        "import sys, attnlab_command\n"
        "try: attnlab_command.main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "print([name for name in ('torch', 'timm', 'numpy', 'attnlab') if name in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program, "--help"],
        cwd=cli.PACKAGE.parent,
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    assert answer.stdout.startswith("usage: attnlab [-h] command")
    for command in ("doctor", "lab", "results"):
        assert f"    {command} " in answer.stdout
    assert answer.stdout.endswith("[]\n")


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("00", "00_start_here"),
        ("1", "01_attention"),
        ("01", "01_attention"),
        ("attention", "01_attention"),
        ("10", "10_spformer"),
        ("11_capstone", "11_capstone"),
        ("chapters/10_spformer.ipynb", "10_spformer"),
    ],
)
def test_a_chapter_by_its_number_or_name(chapters, word, name):
    assert cli.find_chapter(word) == chapters / f"{name}.ipynb"


def test_lab_opens_jupyter_on_the_chapter(chapters, started):
    root = f"--ServerApp.root_dir={chapters.parent}"
    jupyter = [sys.executable, "-m", "jupyterlab", root]
    assert cli.main(["lab"]) == 0
    assert cli.main(["lab", "spformer", "--no-browser", "--port=8889"]) == 0
    assert started == [
        [*jupyter, str(chapters / "00_start_here.ipynb")],
        [*jupyter, str(chapters / "10_spformer.ipynb"), "--no-browser", "--port=8889"],
    ]


def test_lab_as_root_says_so_to_jupyter(chapters, started, monkeypatch):
    monkeypatch.setattr(cli.os, "geteuid", lambda: 0, raising=False)
    cli.main(["lab", "1", "--no-browser"])
    assert started[0][5:] == ["--allow-root", "--no-browser"]


def test_saved_outputs_are_trusted_and_a_damaged_notebook_does_no_harm(chapters, started):
    cell = nbformat.v4.new_code_cell("1", outputs=[nbformat.v4.new_output("display_data", {})])
    notebook = nbformat.v4.new_notebook(cells=[cell])
    nbformat.write(notebook, chapters / "01_attention.ipynb")
    (chapters / "10_spformer.ipynb").write_text("{")
    assert not NotebookNotary().check_signature(notebook)
    assert cli.main(["lab"]) == 0
    assert NotebookNotary().check_signature(notebook)
    assert len(started) == 1


def failure(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_what_is_wrong_is_said(chapters, started, capsys, monkeypatch):
    message = failure(capsys, "lab", "cbam")
    assert "chapter: expected one of 00_start_here, 01_attention, " in message
    assert message.endswith("got 'cbam'\n")
    assert "unrecognized arguments: --fast" in failure(capsys, "doctor", "--fast")
    assert "invalid choice: 'explain'" in failure(capsys, "explain")
    assert "invalid int value: 'zero'" in failure(capsys, "results", "--seeds", "zero")
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert 'JupyterLab is not installed: pip install "attnlab[lab]"' in failure(capsys, "lab")
    assert started == []


def test_an_installed_package_has_no_chapters(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "CHAPTERS", tmp_path / "chapters")
    with pytest.raises(ValueError, match=r"chapter: there is no folder .*chapters: .*clone it"):
        cli.find_chapter("1")


def test_results_are_delegated(monkeypatch):
    calls = []
    module = types.ModuleType("attnlab.lab.results")
    module.SEEDS = (5, 6)
    module.main = lambda *words: calls.append(words) or 0
    monkeypatch.setitem(sys.modules, "attnlab.lab.results", module)
    monkeypatch.setattr("attnlab.lab.results", module, raising=False)
    assert cli.main(["results"]) == 0
    assert cli.main(["results", "01_attention.positions", "--seeds", "3", "4"]) == 0
    assert cli.main(["results", "--confirm"]) == 0
    assert calls == [
        ([], (5, 6), False), (["01_attention.positions"], [3, 4], False), ([], (5, 6), True),
    ]  # fmt: skip


@pytest.mark.parametrize("command", cli.DELEGATED)
def test_a_commands_own_module_gets_all_words(command, monkeypatch):
    calls = []
    module = types.SimpleNamespace(main=lambda words: calls.append(words) or 3)
    monkeypatch.setitem(sys.modules, cli.DELEGATED[command][0], module)
    words = ["vit_mini", "--data", "parts", "--lr", "0.1", "--no-resume", "--help"]
    assert cli.main([command, *words]) == 3
    assert calls == [words]


@pytest.mark.parametrize("command", cli.DELEGATED)
def test_every_command_that_is_delegated_has_its_module(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert not stop.value.code
    assert capsys.readouterr().out.startswith(f"usage: attnlab {command} ")


def test_doctor_gives_its_exit_code(monkeypatch):
    loaded = []

    def load_alone(name, path):
        loaded.append(path)
        return types.SimpleNamespace(main=lambda: 1)

    monkeypatch.setattr(cli, "load_alone", load_alone)
    assert cli.main(["doctor"]) == 1
    assert loaded == [cli.PACKAGE / "lab" / "doctor.py"]


def test_the_command_returns_what_the_command_line_returns(monkeypatch):
    def load_alone(name, path):
        assert path == cli.PACKAGE / "cli.py"
        return types.SimpleNamespace(main=lambda: 7)

    monkeypatch.setattr(attnlab_command, "load_alone", load_alone)
    assert attnlab_command.main() == 7
