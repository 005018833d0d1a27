"""Pages that hold their own data, so that no kernel is needed to explore them.

`page` puts a script, its data and the shared look (`page.js`, `page.css`) into one HTML page, and
`iframe` shows a page in a notebook: JupyterLab runs its script, and so does the HTML that nbconvert
exports, offline. JupyterLab strips frames from a notebook that it does not trust (one that was
saved on another machine, until its cell is run): what is left then is a line that says so.
"""

import base64
import html
import io
import json
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from attnlab.lab.files import atomic_write

HERE = Path(__file__).parent
WIDTH = 780  # of a figure in a notebook, in pixels; narrower where there is less room
FALLBACK = (
    "An explorable figure belongs here. Run this cell to see it, or trust the notebook "
    "(View, Activate Command Palette, Trust Notebook)."
)


def page(script: str, data: dict, title: str) -> str:
    """One self-contained HTML page.

    Args:
        script: name of the figure's own script beside this file, without `.js`. It runs after
            `page.js`, finds `data` under that name, and draws into the element `app`.
        data: anything that JSON can hold, in an order that does not depend on the run.
        title: the page's title.
    """
    style = (HERE / "page.css").read_text("utf-8")
    scripts = [(HERE / f"{name}.js").read_text("utf-8") for name in ("page", script)]
    # Inside <script>, "<" could begin a tag; in JSON it can also be written "\u003c".
    content = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{style}</style></head>"
        '<body><main id="app"></main>'
        f'<script type="application/json" id="data">{content}</script>'
        f"<script>{''.join(scripts)}</script></body></html>"
    )


def iframe(page: str, height: int, title: str) -> str:
    """`page` as a frame for a notebook's output, `height` pixels high until it fits itself."""
    return (
        f'<iframe srcdoc="{html.escape(page)}" title="{html.escape(title)}" '
        f'style="display:block;width:100%;height:{height}px;max-width:{WIDTH}px;'
        f'border:0;border-radius:8px">{FALLBACK}</iframe>'
    )


class PageFigure:
    """A page that the last line of a notebook cell shows, and that `save` writes to a file.

    A figure sets `image_size`, the width of its picture, `aspect`, the picture's height over its
    width, and `title`, and gives the page's data by `_data()`.
    """

    script: str  # see `page`
    around: int  # height of what stands above and below the picture, in pixels

    @cached_property
    def html(self) -> str:
        """The page: standalone HTML."""
        return page(self.script, self._data(), self.title)

    def _repr_html_(self) -> str:
        return iframe(self.html, round(self.image_size * self.aspect) + self.around, self.title)

    def save(self, path: str | Path) -> None:
        """Write the page as an HTML file of its own."""
        with atomic_write(path) as temporary:
            temporary.write_text(self.html, encoding="utf-8")

    def _check_size(self, max_bytes: int, what: str, remedy: str) -> None:
        """`ValueError` if the notebook's output would be larger than `max_bytes`."""
        if (size := len(self._repr_html_().encode())) > max_bytes:
            raise ValueError(
                f"{what} would take {size:,} bytes, more than max_bytes={max_bytes:,}: {remedy}, "
                "or raise max_bytes"
            )


def picture(image: Tensor, width: int) -> dict:
    """What a page needs to draw `image`, `(3, H, W)` in [0, 1], `width` pixels wide."""
    _, rows, columns = image.shape
    return {
        "image": data_uri(image, width),
        "width": width,
        "aspect": rows / columns,
        "pixelated": columns < width / 2,
    }


def pack(matrix: Tensor, signed: bool = False) -> dict:
    """A `(queries, keys)` matrix at one byte a weight; `unpack` in `page.js` is the inverse.

    The byte is the fourth root of the weight's share of its row's largest, so that small weights
    keep their size too: to 1% near the largest, 3% at a hundredth of it (signed: 2% and 5%).
    """
    peaks = matrix.abs().amax(-1)
    shares = matrix / torch.where(peaks > 0, peaks, 1)[:, None]
    codes = shares.abs() ** 0.25 * shares.sign() * (127 if signed else 255)
    codes = codes.round().to(torch.int8 if signed else torch.uint8)
    return {
        "peaks": _base64(peaks.numpy().astype("<f4").tobytes()),
        "codes": _base64(codes.numpy().tobytes()),
        "signed": signed,
    }


def data_uri(image: Tensor, width: int) -> str:
    """`image`, `(3, H, W)` in [0, 1], as WebP, no wider than `width`; a small one without loss."""
    from PIL import Image

    picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
    picture.thumbnail((width, width * 4))
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=85, lossless=picture.width <= 128)
    return f"data:image/webp;base64,{_base64(file.getvalue())}"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
