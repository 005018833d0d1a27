"""The chapters as pages without a kernel show them: what `make slides` and `make site` share.

A live slider becomes a line with its value, the figure below it stays; a progress bar becomes its
last line; and every picture gets alternative text: its titles and labels, which are in the code
that drew it, or else the sentence before it.
"""

import ast
import html
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = ROOT / "chapters"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
PICTURES = ("image/png", "image/jpeg", "image/webp")
WORDS = {"title", "titles", "column_titles", "row_titles", "suptitle"}


def chapters() -> list[Path]:
    """The notebooks that there are, in order."""
    return sorted(CHAPTERS.glob("[0-9]*.ipynb"))


def read(path: Path) -> NotebookNode:
    """A notebook whose stored outputs need neither kernel nor network, nor eyes."""
    notebook = nbformat.read(path, as_version=4)
    widgets = notebook.metadata.pop("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    section, sentence = notebook.cells[0].source.splitlines()[0].strip("# "), ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            headings = re.findall(r"^#+ +(.*)$", cell.source, re.MULTILINE)
            section = headings[-1] if headings else section
            sentence = last_sentence(cell.source) or sentence
            continue
        cell.outputs = [still for output in cell.outputs for still in stills(output, widgets)]
        for data in (output.get("data", {}) for output in cell.outputs):
            if "text/markdown" in data:  # in a table that code made, no builder sees the links
                made = data["text/markdown"]
                data["text/markdown"] = re.sub(r"\]\((\d\d_\w+)\.ipynb", r"](\1.html", made)
        pictures = [o for o in cell.outputs if set(PICTURES) & set(o.get("data", {}))]
        for picture in pictures:
            text = alt_text(cell.source, section, sentence)
            cell.metadata.mystnb = {"image": {"alt": text}}  # where MyST-NB looks
            for kind in PICTURES:  # where nbconvert looks
                picture.metadata.setdefault(kind, NotebookNode())["alt"] = text
    return notebook


def stills(output: NotebookNode, widgets: dict) -> list[NotebookNode]:
    """What is left of an output when no widget can move: itself, a line, or what a widget held."""
    view = output.get("data", {}).get(WIDGET_VIEW)
    if view is None:
        return [output]
    model = widgets[view.model_id]
    if model.model_name == "OutputModel":
        return [nbformat.from_dict(shown) for shown in model.state.outputs]
    return [nbformat.v4.new_output("stream", name="stdout", text=f"{line(model, widgets)}\n")]


def line(model: NotebookNode, widgets: dict) -> str:
    """A widget as text: `training: 100% 400/400`, or `dim = 64 (a slider when run)`."""
    state = model.state
    if "children" in state:
        children = (widgets[name.removeprefix("IPY_MODEL_")] for name in state.children)
        words = [c.state.value for c in children if isinstance(c.state.get("value"), str)]
        text = html.unescape(" ".join(words)).replace("\u2007", " ")
        return re.sub(r"\s*\[.*?\d\d:\d\d.*", "", text)  # speeds belong to one machine
    value = state._options_labels[state.index] if "_options_labels" in state else state.value
    return f"{state.description} = {value} (a control when the notebook runs)"


def alt_text(source: str, section: str, sentence: str) -> str:
    """What is written in the figures that this code draws, or the sentence that leads to them."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    words = [text for call in calls for text in _written(call, WORDS)] + [*_assigned(source)]
    axes = [" against ".join([*_written(call, {"ylabel"}), *_written(call, {"xlabel"})])
            for call in calls]  # fmt: skip
    known = [text for text in words if "…" not in text] or [*filter(None, axes)] or [sentence]
    return f"Figure in “{_plain(section)}”: {_plain('; '.join([*dict.fromkeys(known)][:8]))}"


def last_sentence(markdown: str) -> str:
    """The last sentence of the last paragraph of prose."""
    paragraphs = [p for p in re.split(r"\n\s*\n", markdown) if re.match(r"[\w*(“\"]", p)]
    prose = " ".join(paragraphs[-1].split()) if paragraphs else ""
    return re.split(r"(?<=[.?:])\s+(?=[A-Z*“])", prose)[-1]


def vendored(package: str, path: str) -> Path:
    """A file that an installed package brings along; its module need not be importable by name."""
    spec = find_spec(package)
    if spec is None:
        raise SystemExit(f"{package} is not installed: pip install -e '.[site]'")
    return Path(spec.submodule_search_locations[0]) / path


def _written(call: ast.Call, keywords: set[str]) -> Iterator[str]:
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    values = [keyword.value for keyword in call.keywords if keyword.arg in keywords]
    owner = getattr(getattr(call.func, "value", None), "id", "")
    if name.removeprefix("set_") in keywords or (owner == "plots" and keywords is WORDS):
        values += call.args
    for value in values:
        yield from _texts(value)


def _assigned(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and re.search("title|names", ast.unparse(node.targets[0])):
            yield from _texts(node.value)


def _texts(node: ast.AST) -> Iterator[str]:
    """The strings of an expression, an unknown part of one as an ellipsis."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(getattr(part, "value", "…") if isinstance(part, ast.Constant) else "…"
                      for part in node.values)  # fmt: skip
    elif isinstance(node, ast.List | ast.Tuple | ast.ListComp):
        for child in ast.iter_child_nodes(node):
            yield from _texts(child)


def _plain(text: str) -> str:
    return " ".join(re.sub(r"\[([^\]]*)\]\([^)]*\)|[*`$\\]", r"\1", text).split())
