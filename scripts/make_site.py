"""The site: chapters, lectures, glossary, results, benchmarks and the library's reference.

    python scripts/make_site.py                   build/site/, open index.html there
    python scripts/make_site.py --out FOLDER

The folder holds all that it needs: it can be served, or opened from a disk without network.
Nothing is executed: the chapters show the outputs that their notebooks hold. Sphinx builds it (with
MyST-NB for the notebooks and Furo for the looks) from what is laid out in build/site-work/source.
"""

import argparse
import ast
import html
import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import nbformat
from make_slides import make_slides
from static_notebook import ROOT, chapters, read

DOCS = ROOT / "docs" / "site"
WORK = ROOT / "build" / "site-work"
OUT = ROOT / "build" / "site"
CELL = r" *([^|]*?) *\|"  # of the table: number and title, needs, reading, exercises
ROW = re.compile(r"\| \[?(\d\d) ([^\]|]+?)\]?(?:\([^)]*\))? \|" + 3 * CELL)
AUTOMODULE = "# {title}\n\n```{{eval-rst}}\n.. automodule:: {name}\n   :members:\n```\n"
MACHINE_KEYS = ("command", "machine")


# The map and the list of chapters, from the table in chapters/README.md


def course() -> dict[str, dict]:
    """What chapters/README.md says of each chapter, by its number."""
    stems = {path.stem[:2]: path.stem for path in chapters()}
    found = {}
    for row in (ROOT / "chapters" / "README.md").read_text("utf-8").splitlines():
        if not (match := ROW.match(row)):
            continue
        number, title, needs, reading, exercises = match.groups()
        known = [*found] if needs == "all" else re.findall(r"\d\d", needs)
        times = {"reading": reading, "exercises": exercises}
        found[number] = {"title": title, "stem": stems.get(number), "needs": known, **times}
    return found


def ancestors(number: str, known: dict) -> set[str]:
    """All chapters that a chapter builds on, at any distance."""
    needs = known[number]["needs"]
    return set(needs).union(*(ancestors(need, known) for need in needs))


def course_map(known: dict) -> str:
    """The chapters as a drawing: what comes later stands further right."""
    arrows = [
        (need, number)
        for number, chapter in known.items()
        for need in chapter["needs"]
        if not any(need in ancestors(other, known) for other in chapter["needs"])
    ]
    depth, column = {}, {}
    for number, chapter in known.items():
        depth[number] = 1 + max((depth[need] for need in chapter["needs"]), default=-1)
    for number in reversed(known):  # as late as what follows allows
        after = [column[end] for start, end in arrows if start == number]
        column[number] = min(after, default=max(depth.values()) + 1) - 1
    columns = {c: [n for n in known if column[n] == c] for c in sorted(set(column.values()))}
    width, height = 92 * len(columns), 82 * max(map(len, columns.values()))
    place = {n: (46 + 92 * c, 30 + 82 * i) for c in columns for i, n in enumerate(columns[c])}
    parts = []
    for start, end in arrows:
        (x, y), (u, v) = place[start], place[end]
        line = f"M{x + 20} {y}C{x + 70} {y} {x + 38} {v} {x + 70} {v}H{u - 21}"  # between labels
        parts.append(f'<path d="{line}" marker-end="url(#head)"/>')
    for number, (x, y) in place.items():
        title, stem = known[number]["title"], known[number]["stem"]
        lines = textwrap.wrap(re.split(r"[:,]", title)[0], 15)[:2]
        label = "".join(f'<text x="{x}" y="{y + 33 + 12 * i}">{html.escape(line)}</text>'
                        for i, line in enumerate(lines))  # fmt: skip
        node = (f'<circle cx="{x}" cy="{y}" r="20"/>'
                f'<text class="number" x="{x}" y="{y + 6}">{number}</text>{label}')  # fmt: skip
        name = html.escape(f"{number} {title}")
        parts.append(f'<a href="chapters/{stem}.html" aria-label="{name}">{node}</a>' if stem
                     else f'<g class="planned">{node}</g>')  # fmt: skip
    return (
        f'<svg class="map" viewBox="0 0 {width} {height}" role="group" '
        'aria-label="Which chapter builds on which">\n'  # Markdown takes it for HTML only so
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" '
        'markerHeight="6" orient="auto"><path d="M1 1 7 4 1 7"/></marker></defs>'
        f"{''.join(parts)}</svg>"
    )


def course_list(known: dict) -> str:
    """Title, promise, needs and times of every chapter, as Markdown."""
    entries = []
    for number, chapter in known.items():
        if chapter["stem"] is None:
            entries.append(f"### {number} · {chapter['title']}\n\nPlanned.")
            continue
        path = ROOT / "chapters" / f"{chapter['stem']}.ipynb"
        first = nbformat.read(path, as_version=4).cells[0].source
        promise = re.search(r"\*\*At the end you can\*\*.*?(?=\n\n)", first, re.DOTALL)
        facts = [f"needs {', '.join(chapter['needs']) or 'nothing'}"]
        if chapter["reading"]:
            facts += [f"{chapter['reading']} to read", f"exercises: {chapter['exercises']}"]
        facts.append(f'<a href="slides/{path.stem}.html">lecture {number}</a>')
        title = f"[{number} · {chapter['title']}](chapters/{path.name})"
        text = promise[0] if promise else ""
        entries.append(f"### {title}\n\n{text}\n\n{' · '.join(facts)}")
    return "\n\n".join(entries)


# Tables from JSON


def number(value, digits: int = 3) -> str:
    """A number to three digits, or all before the point; anything else as it is."""
    if isinstance(value, float) or (isinstance(value, int) and abs(value) >= 10_000):
        return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"
    return ", ".join(map(number, value)) if isinstance(value, list) else str(value)


def table(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def tables(content: dict, level: int) -> str:
    """Everything in a JSON object, one table for each part that has the shape of one."""
    plain = {k: v for k, v in content.items() if not isinstance(v, dict)}
    parts = [table(["", "value"], [[k, number(v)] for k, v in plain.items()])] if plain else []
    for key, inner in content.items():
        if not isinstance(inner, dict):
            continue
        rows = [v for v in inner.values() if isinstance(v, dict)]
        alike = len(rows) == len(inner) and len({tuple(row) for row in rows}) == 1
        if alike and not any(isinstance(v, dict) for row in rows for v in row.values()):
            body = [[name, *map(number, row.values())] for name, row in inner.items()]
            body = table(["", *rows[0]], body)
        else:
            body = tables(inner, level + 1)
        parts.append(f"{'#' * level} {key.replace('_', ' ')}\n\n{body}")
    return "\n\n".join(parts)


def spread(cell: dict | None) -> str:
    """Mean ± standard deviation; the mean alone of one seed, nothing where a row lacks a metric."""
    if cell is None or cell["mean"] is None:
        return "–"
    mean, std = cell["mean"], cell["std"]
    return number(float(mean)) + ("" if std is None else f" ± {number(float(std), digits=2)}")


def results_page() -> str:
    parts = ["# Results\n\nTables of several seeds, mean ± standard deviation over the seeds, that "
             "the chapters quote. `make results` computes them again."]  # fmt: skip
    for path in sorted((ROOT / "results").glob("*.json")):
        made = json.loads(path.read_text("utf-8"))
        metrics = [*dict.fromkeys(metric for row in made["rows"].values() for metric in row)]
        rows = [[name, *(spread(row.get(metric)) for metric in metrics)]
                for name, row in made["rows"].items()]  # fmt: skip
        origin = f"`{made['command']}` · {made['machine']} · torch {made['torch']}"
        parts.append(f"## {path.stem}\n\n{table(['', *metrics], rows)}\n\n{origin}")
    return "\n\n".join(parts)


def benchmarks_page() -> str:
    from attnlab.lab import bench_report  # brings torch and timm, which no other page needs

    about = (ROOT / "benchmarks" / "README.md").read_text("utf-8")
    folder = ROOT / "benchmarks" / "results"
    parts = [about, f"## The suite\n\n{bench_report.section(folder)}"]
    for path in sorted(folder.glob("*.json")):
        if path.stem.startswith("suite-"):
            continue
        content = json.loads(path.read_text("utf-8"))
        machine = ", ".join(f"{key} {value}" for key, value in content["machine"].items())
        command = f"`{content['command']}` · " if "command" in content else ""
        rest = {key: value for key, value in content.items() if key not in MACHINE_KEYS}
        parts.append(f"## {path.stem}\n\n{command}{machine}\n\n{tables(rest, 3)}")
    return "\n\n".join(parts)


# The reference


def modules() -> dict[str, list[Path]]:
    """The modules that readers import, in two groups; neither solutions nor experiments."""
    package = ROOT / "attnlab"
    ours = [path for path in sorted(package.glob("*.py")) if path.stem not in ("__init__", "cli")]
    lab = [package / "lab" / "__init__.py", *sorted((package / "lab").glob("[!_]*.py")),
           package / "lab" / "data" / "__init__.py"]  # fmt: skip
    return {"Mechanisms and models": ours, "Instruments: attnlab.lab": lab}


def write_reference(folder: Path) -> None:
    """A page for each module, and their list."""
    index = ["# Reference\n\nFrom the docstrings of the library."]
    for group, paths in modules().items():
        index += [f"## {group}", ""]
        names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in paths]
        names = [name.removesuffix(".__init__") for name in names]
        for name, path in zip(names, paths, strict=True):
            title = name.removeprefix("attnlab.")
            (folder / f"{name}.md").write_text(AUTOMODULE.format(title=title, name=name), "utf-8")
            about = (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").split("\n")[0]
            index.append(f"- [{title}]({name}.md): {about}")
        index += ["", "```{toctree}\n:hidden:\n", *names, "```", ""]
    (folder / "index.md").write_text("\n".join(index), "utf-8")


def write_source(folder: Path, paths: list[Path]) -> None:
    """Lay out what Sphinx reads."""
    for name in ("chapters", "api"):
        (folder / name).mkdir(parents=True)
    shutil.copy(DOCS / "glossary.md", folder)
    known = course()
    landing = (DOCS / "index.md").read_text("utf-8")
    landing = landing.replace("{{ map }}", course_map(known))
    (folder / "index.md").write_text(landing.replace("{{ chapters }}", course_list(known)), "utf-8")
    for path in paths:
        notebook = read(path)
        link = f'<a href="../slides/{path.stem}.html">This chapter as a lecture</a>'
        notebook.cells.insert(1, nbformat.v4.new_markdown_cell(link))
        nbformat.write(notebook, folder / "chapters" / path.name)
    (folder / "results.md").write_text(results_page(), "utf-8")
    (folder / "benchmarks.md").write_text(benchmarks_page(), "utf-8")
    write_reference(folder / "api")


def make_site(out: Path, work: Path = WORK) -> None:
    """Build the site into `out`, by way of `work`; what is there stays when the build fails."""
    shutil.rmtree(work, ignore_errors=True)
    write_source(work / "source", chapters())
    sphinx = [sys.executable, "-m", "sphinx", "-q", "-b", "html", "-c", DOCS]
    subprocess.run([*sphinx, "-d", work / "doctrees", work / "source", work / "html"], check=True)
    make_slides(work / "html" / "slides")
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(work / "html", out)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    make_site(options.out)
    print(f"open {options.out / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
