"""How Sphinx builds the site; `scripts/make_site.py` lays out what it reads."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from static_notebook import vendored

project = "attnlab"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]

# The outputs that the notebooks hold; nothing runs.
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "gfm"  # in outputs; the default knows no tables
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 4

html_theme = "furo"
html_title = "attnlab"
html_favicon = "_static/icon.svg"
html_static_path = ["_static", str(vendored("sphinx-mathjax-offline", "static/mathjax/tex-svg.js"))]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_copy_source = False
mathjax_path = "tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False}, "svg": {"fontCache": "local"}}
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"

autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_use_ivar = True
napoleon_use_rtype = False
SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):\n")  # napoleon's
suppress_warnings = ["myst.header", "misc.highlighting_failure"]


def written_plainly(app, what, name, obj, options, lines):
    """Make reStructuredText of a docstring.

    Ours are plain text with code in backticks: `*`, `|` and `x_` mean themselves, and a paragraph
    with lists or indented lines keeps its lines.
    """
    parts = re.split(r"`([^`]+)`(\w?)", "\n".join(lines))
    parts[::3] = [re.sub(r"[*|]|(?<=\w)_(?!\w)", r"\\\g<0>", text) for text in parts[::3]]
    parts[1::3] = [f"``{code}``" for code in parts[1::3]]
    parts[2::3] = [f"\\ {letter}" if letter else "" for letter in parts[2::3]]
    paragraphs = re.split(r"\n\s*\n", "".join(parts).rstrip())
    for number, paragraph in enumerate(paragraphs):
        structured = re.search(r"^(  |- )", paragraph, re.MULTILINE)
        if structured and not SECTION.match(paragraph):
            paragraphs[number] = re.sub(r"^", "| ", paragraph, flags=re.MULTILINE)
    lines[:] = [*"\n\n".join(paragraphs).split("\n"), ""]


def setup(app):
    app.connect("autodoc-process-docstring", written_plainly, priority=100)  # before napoleon
