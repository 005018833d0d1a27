"""The tables in `results/`: all of today's code, and one seed of a row per chapter is re-run."""

import pkgutil
from importlib import import_module

import pytest

from attnlab.lab import experiments, files, results

STORED = sorted(path.stem for path in (files.repo_root() / "results").glob("*.json"))
# A chapter in the making has experiments whose tables are still to be computed.
WRITTEN = {path.stem for path in (files.repo_root() / "chapters" / "source").glob("*.py")}
CHAPTERS = sorted(
    module.name
    for module in pkgutil.iter_modules(experiments.__path__)
    if import_module(f"{experiments.__name__}.{module.name}").CHAPTER in WRITTEN
)


@pytest.mark.parametrize("name", STORED)
def test_a_stored_table_is_of_todays_code(name):
    assert name in results.names(), "a table without an experiment"
    table = results.load(name)
    status = results.status(name, table["seeds"])
    assert status == "current", f"{status}; make it anew: attnlab results {name}"
    assert len(table["seeds"]) >= 3


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_experiment_has_its_table(chapter):
    module = import_module(f"{experiments.__name__}.{chapter}")
    names = [name for name in results.names() if name.startswith(f"{module.CHAPTER}.")]
    missing = [name for name in names if name not in STORED]
    assert not missing, f"run: attnlab results {' '.join(missing)}"


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_one_seed_of_one_row_is_confirmed(chapter):
    module = import_module(f"{experiments.__name__}.{chapter}")
    if not hasattr(module, "RERUN"):
        pytest.skip(f"{chapter} names no row to re-run")
    experiment, row = module.RERUN
    name = f"{module.CHAPTER}.{experiment}"
    table = results.load(name)
    for metric, value in results.rerun(name, table["seeds"][0], row).items():
        stored = table["rows"][row][metric]
        margin = max(3 * stored["std"], 0.05)
        assert value == pytest.approx(stored["mean"], abs=margin), f"{row}, {metric}"
