"""One lecture per chapter, from the slide metadata of its cells and its stored outputs.

    python scripts/make_slides.py                 build/slides/, all chapters
    python scripts/make_slides.py 01 09           these
    python scripts/make_slides.py --out FOLDER

The folder holds all that it needs: copy it to any machine and open index.html, without network.
Nothing is executed. Keys: arrows and space go on, Esc shows all slides, S the speaker's notes.
"""

import argparse
import html
import shutil
import sys
from pathlib import Path

from nbconvert import SlidesExporter
from pygments.formatters import HtmlFormatter
from static_notebook import ROOT, chapters, read, vendored

SOURCES = ROOT / "docs" / "slides"
OUT = ROOT / "build" / "slides"
REVEAL = "_static/revealjs"
STYLE = "a11y-high-contrast-light"  # of code
INDEX = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>attnlab: lectures</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<style>body {{ max-width: 40em; margin: 3em auto; padding: 0 1em;
font: 18px/1.6 system-ui, sans-serif }} a {{ color: #0b5cad }}</style></head>
<body><main><h1>Lectures</h1><ul>{lectures}</ul>
<p>Arrow keys and space go on, Esc shows all slides, S opens the speaker's notes. Shown with
reveal.js (MIT) and MathJax (Apache 2.0).</p></main></body></html>
"""


def copy_assets(folder: Path) -> None:
    """What every lecture shares: reveal.js, MathJax, and the look."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in ("dist/reveal.js", "dist/reveal.css", "plugin/notes/notes.js", "LICENSE"):
        shutil.copy(vendored("sphinx_revealjs", f"{REVEAL}/{path}"), folder)
    (folder / "LICENSE").rename(folder / "LICENSE.reveal.js")
    shutil.copy(vendored("sphinx-mathjax-offline", "static/mathjax/tex-svg.js"), folder)
    for name in ("slides.css", "slides.js"):
        shutil.copy(SOURCES / name, folder)
    (folder / "code.css").write_text(HtmlFormatter(style=STYLE).get_style_defs(".highlight"))


def make_slides(out: Path, names: list[str] | None = None) -> list[Path]:
    """Write the lectures of the chapters whose names start so (all, without names) to `out`."""
    paths = [p for p in chapters() if not names or any(p.stem.startswith(n) for n in names)]
    if not paths:
        raise SystemExit(f"no chapter begins with {names}; there are {[*map(str, chapters())]}")
    copy_assets(out / "assets")
    exporter = SlidesExporter(
        extra_template_basedirs=[str(SOURCES.parent)],
        template_name=SOURCES.name,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    lectures = []
    for path in paths:
        notebook = read(path)
        title = notebook.cells[0].source.splitlines()[0].strip("# ")
        page, _ = exporter.from_notebook_node(notebook, {"title": title})
        page = page.replace("<iframe srcdoc=", "<iframe data-page=")  # slides.js runs what is shown
        (out / f"{path.stem}.html").write_text(page, encoding="utf-8")
        lectures.append(f'<li><a href="{path.stem}.html">{html.escape(title)}</a></li>')
    index = INDEX.format(lectures="".join(lectures))
    (out / "index.html").write_text(index, encoding="utf-8")
    return [out / f"{path.stem}.html" for path in paths]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help='"01" or "01_attention"')
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    lectures = make_slides(options.out, options.names)
    print(f"{len(lectures)} lectures: open {options.out / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
