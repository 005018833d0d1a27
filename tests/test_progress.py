"""Progress: what a learner solved, in a file of their own."""

import json
from pathlib import Path

import pytest

from attnlab import lab
from attnlab.lab.exercises import catalogue, solved

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "learner" / "progress.json"
    monkeypatch.setenv("ATTNLAB_PROGRESS", str(path))
    return path


def right(name: str):
    return catalogue()[name].solution


def test_a_check_that_is_correct_is_noted_and_no_other(file):
    lab.check("start.normalize", lambda scores: scores)
    assert not file.exists()
    lab.check("start.normalize", right("start.normalize"))
    assert list(json.loads(file.read_text())["solved"]) == ["start.normalize"]
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_it_is_shown_chapter_by_chapter_and_deleting_the_file_resets_it(file):
    names = [name for name, exercise in catalogue().items() if exercise.chapter == "01"]
    lab.check(names[1], right(names[1]))
    lab.check(names[1], right(names[1]))
    lines = lab.progress().text.splitlines()
    assert len(lines) == 1 + len({exercise.chapter for exercise in catalogue().values()})
    assert lines[1].startswith(f"01  1 of {len(names)}  ○ {names[0]}  ✔ {names[1]}  ○ ")
    assert str(file) in lines[-1]
    file.unlink()
    assert "✔" not in lab.progress().text


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"solved": 3}', '{"other": {}}', "\0"])
def test_a_damaged_file_counts_as_none(file, content):
    file.parent.mkdir()
    file.write_text(content)
    assert solved.solved() == {}
    lab.check("start.normalize", right("start.normalize"))
    assert list(solved.solved()) == ["start.normalize"]


def test_an_exercise_that_is_no_more_is_kept_and_not_shown(file):
    file.parent.mkdir()
    file.write_text('{"solved": {"old.one": "2020-01-01"}}')
    lab.check("start.normalize", right("start.normalize"))
    assert solved.solved()["old.one"] == "2020-01-01"
    assert "old.one" not in lab.progress().text


def test_a_disk_that_cannot_be_written_to_breaks_no_check(tmp_path, monkeypatch):
    (tmp_path / "no folder").write_text("")
    monkeypatch.setenv("ATTNLAB_PROGRESS", str(tmp_path / "no folder" / "progress.json"))
    assert lab.check("start.normalize", right("start.normalize")).status == "correct"


def test_without_a_setting_it_is_the_users_own_folder(monkeypatch):
    monkeypatch.delenv("ATTNLAB_PROGRESS")
    assert solved.place().name == "progress.json"
    assert not solved.place().is_relative_to(ROOT)


def test_off_keeps_nothing_and_so_it_is_in_tests_and_builds():
    assert solved.place() is None, "tests/conftest.py"
    lab.check("start.normalize", right("start.normalize"))
    assert lab.progress().text.endswith("Nothing is kept here.")
    for settings in ("chapters/conftest.py", "scripts/build_chapters.py"):
        assert '"ATTNLAB_PROGRESS": "off"' in (ROOT / settings).read_text()
