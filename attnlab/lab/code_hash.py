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
    seen: set[tuple[str, str, str | None]] = set()
    waiting: list[tuple[str, str, str | None]] = [(module, name, None)]
    while waiting:
        place = waiting.pop()
        if place in seen:
            continue
        seen.add(place)
        owner, wanted, attribute = place
        for statement in _bindings(owner).get(wanted, ()):
            if isinstance(statement, ast.Import | ast.ImportFrom):
                waiting += [(*where, None) for where in _imported(statement, wanted, attribute)]
                continue
            found.add(f"{owner}: {skeleton(statement)}")
            waiting += [(owner, *use) for use in _used(statement)]
    return found


def _used(statement: ast.stmt) -> Iterator[tuple[str, str | None]]:
    """Each name in a statement, with the attribute that is taken of it, None where it is not."""
    taken: set[ast.expr] = set()
    for node in ast.walk(statement):  # an attribute is met before the name that it is taken of
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            taken.add(node.value)
            yield node.value.id, node.attr
        elif isinstance(node, ast.Name) and node not in taken:
            yield node.id, None


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


def _imported(
    statement: ast.Import | ast.ImportFrom, wanted: str, attribute: str | None
) -> list[tuple[str, str]]:
    """Where an imported name is defined: (module, name), several for a module as a whole."""
    places = []
    for alias in statement.names:
        if wanted != (alias.asname or alias.name.split(".")[0]):
            continue
        whole = alias.name
        if isinstance(statement, ast.ImportFrom):
            whole = f"{statement.module}.{alias.name}"
            places += [(statement.module, alias.name)] if _is_mechanism(statement.module) else []
        places += _inside(whole, attribute) if _is_mechanism(whole) else []
    return places


def _inside(module: str, attribute: str | None) -> list[tuple[str, str]]:
    """The name in a module that an attribute is; every name where that cannot be told."""
    if attribute in _bindings(module):
        return [(module, attribute)]
    if attribute and _is_mechanism(f"{module}.{attribute}"):
        module = f"{module}.{attribute}"
    return [(module, name) for name in _bindings(module)]


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
