"""From a submitted file to one of its functions: the cells, and the statements it needs.

A chapter takes half a minute to run, and a grader wants one function. So only the statement that
defines it is run, with those that bind the names it uses, and the names that those use: imports,
constants, helpers. The order and the number of the cells do not matter then, nor what the other
cells do.
"""

import ast
import json
import linecache
import re
import symtable
from dataclasses import dataclass
from typing import Any

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class Missing(Exception):
    """Nothing in the submission binds the name."""


@dataclass(frozen=True)
class Statement:
    """A statement at the top level of a cell."""

    node: ast.stmt
    file: str  # the name of its cell, for messages
    binds: frozenset[str]
    reads: frozenset[str]


def read_cells(text: str, notebook: bool) -> list[str]:
    """The code cells of a notebook, or of a script with "# %%" lines.

    Raises ValueError when a notebook is not one.
    """
    if not notebook:
        return re.split(r"^# %%.*$", text, flags=re.MULTILINE)
    try:
        cells = json.loads(text)["cells"]
        sources = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
        return [source if isinstance(source, str) else "".join(source) for source in sources]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"It is not a notebook ({type(error).__name__}: {error}).") from error


def read_statements(cells: list[str]) -> tuple[list[Statement], list[str]]:
    """Every statement in the order of the file, and a sentence for each cell that is no Python."""
    statements, problems = [], []
    for number, source in enumerate(cells, start=1):
        name = f"code cell {number}"
        try:
            nodes = _parse(source)
            statements += [Statement(node, name, *_names(node)) for node in nodes]
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            problems.append(f"{name.capitalize()} is not Python: {type(error).__name__}: {error}.")
        # A message about an error quotes the line from here.
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    return statements, problems


def _parse(source: str) -> list[ast.stmt]:
    try:
        return ast.parse(source).body
    except SyntaxError:  # lines for IPython: %matplotlib inline, !pip install
        return ast.parse(re.sub(r"^\s*[%!?].*$", "", source, flags=re.MULTILINE)).body


def _names(node: ast.stmt) -> tuple[frozenset[str], frozenset[str]]:
    """The global names that a statement binds, and those that it or its functions read."""
    table = symtable.symtable(ast.unparse(node), "cell", "exec")
    binds = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}
    reads = {s.get_name() for s in table.get_symbols() if s.is_referenced()}
    if any(isinstance(part, ast.AugAssign) for part in ast.walk(node)):
        reads |= binds  # x += 1
    inner = list(table.get_children())
    while inner:
        table = inner.pop()
        reads |= {s.get_name() for s in table.get_symbols() if s.is_global() and s.is_referenced()}
        inner += table.get_children()
    return frozenset(binds), frozenset(reads)


def needed(statements: list[Statement], name: str) -> list[Statement]:
    """What to run so that `name` is what it is at the end of the file, in the file's order."""
    chosen: set[int] = set()
    queue = [(name, len(statements))]
    while queue:
        wanted, end = queue.pop()
        found = [i for i, statement in enumerate(statements) if wanted in statement.binds]
        index = max([i for i in found if i < end] or found, default=None)
        if index is None or index in chosen:
            continue
        chosen.add(index)
        # A function reads a name when it is called; any other statement, when it is run.
        later = isinstance(statements[index].node, DEFINITIONS)
        end = len(statements) if later else index
        queue += [(read, end) for read in statements[index].reads]
    return [statements[index] for index in sorted(chosen)]


def define(statements: list[Statement], name: str, prelude: str) -> Any:
    """Run what `name` needs, after the prelude's imports, and return what it is then.

    Raises Missing when nothing binds it. A statement that fails is tried again after the others,
    in case the cells were re-ordered; the error of the last try is raised if `name` stays unbound.
    """
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(prelude, scope)
    scope.pop(name, None)
    waiting = [s for s in statements if any(a.name == "*" for a in getattr(s.node, "names", []))]
    waiting += needed(statements, name)
    error: BaseException = Missing(name)
    while waiting:
        failed = []
        for statement in waiting:
            module = ast.Module([statement.node], type_ignores=[])
            try:
                exec(compile(module, statement.file, "exec"), scope)
            except BaseException as problem:
                error = problem
                failed.append(statement)
        if len(failed) == len(waiting):
            break
        waiting = failed
    if name not in scope:
        raise error
    return scope[name]
