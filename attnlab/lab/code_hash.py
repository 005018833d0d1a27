"""Which code does a number depend on? A hash that changes when that code does.

The hash covers the statements that a function reaches by name, in its own module and in attnlab's
mechanisms, without comments, docstrings and layout. It does not see what is reached otherwise
(`timm.create_model("name")`), and leaves the instruments of `attnlab.lab` to their own tests.
"""

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path


def code_sha256(module: str, name: str) -> str:
    """Hash of all that `name` in `module` depends on."""
    return hashlib.sha256("\n".join(sorted(_reached(module, name))).encode()).hexdigest()


def _reached(module: str, name: str) -> set[str]:
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    waiting = [(module, name)]
    while waiting:
        place = waiting.pop()
        if place in seen:
            continue
        seen.add(place)
        owner, wanted = place
        for statement in _bindings(owner).get(wanted, ()):
            if isinstance(statement, ast.Import | ast.ImportFrom):
                waiting += _imported(statement, wanted)
                continue
            found.add(f"{owner}: {skeleton(statement)}")
            used = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
            waiting += [(owner, other) for other in used]
    return found


def skeleton(node: object) -> object:
    """A syntax tree as nested tuples, without docstrings; the same in every Python version."""
    if isinstance(node, list):
        return [skeleton(item) for item in node if not _is_docstring(item)]
    if not isinstance(node, ast.AST):
        return node
    # Fields that a later Python added are empty where they are not used.
    parts = ((field, skeleton(value)) for field, value in ast.iter_fields(node) if field != "kind")
    return (type(node).__name__, *(part for part in parts if part[1] not in (None, [])))


def _is_docstring(item: object) -> bool:
    """A string that stands alone does nothing, wherever it stands."""
    return (
        isinstance(item, ast.Expr)
        and isinstance(item.value, ast.Constant)
        and isinstance(item.value.value, str)
    )


@cache
def _bindings(module: str) -> dict[str, list[ast.stmt]]:
    """The top-level statements of a module by the names that they bind."""
    bindings: dict[str, list[ast.stmt]] = {}
    for statement in ast.parse(_source(module)).body:
        for name in set(_bound(statement)):
            bindings.setdefault(name, []).append(statement)
    return bindings


def _bound(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Import | ast.ImportFrom):
        for alias in statement.names:
            yield alias.asname or alias.name.split(".")[0]
    else:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id


def _imported(statement: ast.Import | ast.ImportFrom, wanted: str) -> list[tuple[str, str]]:
    """Where an imported name is defined: (module, name), or every name of an imported module."""
    places = []
    for alias in statement.names:
        if wanted != (alias.asname or alias.name.split(".")[0]):
            continue
        if isinstance(statement, ast.ImportFrom):
            submodule = f"{statement.module}.{alias.name}"
            whole = submodule if _is_mechanism(submodule) else None
            places += [(statement.module, alias.name)] if _is_mechanism(statement.module) else []
        else:
            whole = alias.name if _is_mechanism(alias.name) else None
        places += [(whole, name) for name in _bindings(whole)] if whole else []
    return places


@cache
def _is_mechanism(module: str) -> bool:
    instrument = module.startswith("attnlab.lab") and not module.startswith("attnlab.lab.exp")
    return module.split(".")[0] == "attnlab" and not instrument and _source(module) is not None


def _source(module: str) -> str | None:
    """The text of a module, None where there is no such file."""
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:  # its parent is no package: `module` names a function or class
        return None
    return Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else None
