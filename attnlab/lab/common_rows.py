"""How every mechanism of the course answers the questions of the common form (chapter 11).

Who asks, who answers, how a pair is scored, how and along which axis the scores are normalised,
which pairs may meet, and what that costs. A table of them is only as good as its check: `table`
computes every mechanism twice, and says where both agree.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from attnlab.lab import common_cases as cases
from attnlab.lab.common_form import Case
from attnlab.lab.results import Table
from attnlab.sparse import (
    AxialAttention,
    DilatedAttention,
    NeighborhoodAttention,
    WindowAttention,
)

TOLERANCE = 1e-9  # float64: far above rounding, far below any wrong equation


class Row(NamedTuple):
    """The answers of one mechanism."""

    mechanism: str
    chapter: str  # the notebook's name without its suffix
    asks: str
    answers: str
    score: str  # of a pair
    normalized: str  # how, and along which axis
    meet: str  # which pairs may
    growth: str  # of the time of the fastest exact form, with the number of places N
    build: Callable[[], Case]


PLACE, ITSELF = "each place", "itself"
EVERY, ALONE = "every pair", "each with itself"
OVER_PLACES, SIGMOID, BY_NUMBER = "softmax over places", "sigmoid", "divided by their number"
NON_LOCAL, CONTEXT, VIDEO = "02_non_local", "05_context", "07_video"
SE, CBAM, CGNL = "03_squeeze_excitation", "04_cbam", "06_cgnl"
POOLING, REVERSED, SPFORMER = "08_patchconvnet", "09_dependencyvit", "10_spformer"
NOW, KEY = "each place of this frame", "each place of the key frame"
ELEMENT = "each channel at each place"

# fmt: off
ROWS = [
    Row("multi-head attention", "01_attention", "each place, in each head", PLACE,
        "q·k / √d", OVER_PLACES, EVERY, "N²", cases.multi_head),
    Row("non-local, Gaussian", NON_LOCAL, PLACE, PLACE,
        "x·x", OVER_PLACES, EVERY, "N²", cases.gaussian),
    Row("non-local, embedded Gaussian", NON_LOCAL, PLACE, PLACE,
        "θ·φ", OVER_PLACES, EVERY, "N²", cases.embedded_gaussian),
    Row("non-local, dot product", NON_LOCAL, PLACE, PLACE,
        "θ·φ", BY_NUMBER, EVERY, "N (re-associated)", cases.dot_product),
    Row("non-local, concatenation", NON_LOCAL, PLACE, PLACE,
        "ReLU(w·[θ; φ])", BY_NUMBER, EVERY, "N log N (sorted)", cases.concatenation),
    Row("squeeze-and-excitation", SE, "each channel", ITSELF,
        "MLP of all channels' means", SIGMOID, ALONE, "N", cases.squeeze_excite),
    Row("selective kernels", SE, "the image, for each channel", "each branch",
        "MLP of all channels' means", "softmax over branches", EVERY, "N", cases.selective_kernel),
    Row("CBAM, channel gate", CBAM, "each channel", ITSELF,
        "MLP of means + MLP of maxima", SIGMOID, ALONE, "N", cases.cbam_channel),
    Row("CBAM, spatial gate", CBAM, PLACE, ITSELF,
        "convolution of pooled channels", SIGMOID, ALONE, "N", cases.cbam_spatial),
    Row("DANet, position", CONTEXT, PLACE, PLACE,
        "q·k", OVER_PLACES, EVERY, "N²", cases.danet_position),
    Row("DANet, channel", CONTEXT, "each channel", "each channel",
        "−x·x over places", "softmax over channels", EVERY, "N", cases.danet_channel),
    Row("OCNet, object context", CONTEXT, PLACE, PLACE,
        "φ·φ / √d, one embedding", OVER_PLACES, EVERY, "N²", cases.ocnet),
    Row("OCNet, pyramid", CONTEXT, PLACE, PLACE,
        "φ·φ / √d", OVER_PLACES, "same part of 1, 4, 9 …", "N²", cases.ocnet_pyramid),
    Row("criss-cross, twice", CONTEXT, PLACE, PLACE,
        "q·k", OVER_PLACES, "same row or column", "N^1.5", cases.criss_cross),
    Row("window", CONTEXT, PLACE, PLACE,
        "q·k / √d", OVER_PLACES, "same window", "N", partial(cases.sparse, WindowAttention, 3)),
    Row("neighborhood", CONTEXT, PLACE, PLACE,
        "q·k / √d", OVER_PLACES, "k² around", "N",
        partial(cases.sparse, NeighborhoodAttention, 3)),
    Row("dilated", CONTEXT, PLACE, PLACE,
        "q·k / √d", OVER_PLACES, "k² around, on a lattice", "N",
        partial(cases.sparse, DilatedAttention, 3, 2)),
    Row("axial", CONTEXT, PLACE, PLACE,
        "q·k / √d", OVER_PLACES, "same row; then same column", "N^1.5",
        partial(cases.sparse, AxialAttention)),
    Row("interlaced", CONTEXT, PLACE, PLACE,
        "q·k / √d", OVER_PLACES, "same place in a cell; then same cell",
        "N^1.5 (cells of √N)", cases.interlaced),
    Row("compact non-local, dot product", CGNL, ELEMENT, ELEMENT,
        "θ φ, two numbers", "not", "every pair in a group", "N (re-associated)",
        cases.compact_dot),
    Row("compact non-local, RBF", CGNL, ELEMENT, ELEMENT,
        "series of exp(−γ (θ − φ)²)", "not", "every pair in a group", "N (re-associated)",
        cases.compact_rbf),
    Row("warp along a flow", VIDEO, NOW, KEY,
        "bilinear hat around the flow's end", "not (hats sum to 1)", "4 around the flow's end",
        "N", cases.flow_warp),
    Row("flow-guided aggregation", VIDEO, NOW, "the same place of each warped frame",
        "cosine", "softmax over frames", EVERY, "N", cases.frame_aggregation),
    Row("local attention", VIDEO, NOW, KEY,
        "q·k / √d", OVER_PLACES, "at most R cells apart", "N", cases.local),
    Row("local attention, STMN", VIDEO, NOW, KEY,
        "cosine, where above 0", "divided by their sum", "at most R cells apart", "N",
        cases.positive_local),
    Row("locally weighted neighbors", VIDEO, NOW, "k² moved samples of the key frame",
        "convolutions of cosines", "softmax over samples", EVERY, "N", cases.weighted_neighbors),
    Row("average pooling", POOLING, "nobody", PLACE,
        "0", OVER_PLACES, EVERY, "N", cases.average_pool),
    Row("attention pooling", POOLING, "one learned vector", "itself and each place",
        "q·k / √d", OVER_PLACES, EVERY, "N", cases.attention_pool),
    Row("reversed attention", REVERSED, "each place, as a parent", "each place, as a child",
        "q of the child · k of the parent / √d", "softmax over who asks; times P and M", EVERY,
        "N²", cases.children_to_parents),
    Row("pixels to superpixels", SPFORMER, "each superpixel", "each pixel",
        "q·k / √d", "softmax over pixels", "own and 8 cells around", "N",
        cases.pixels_to_superpixels),
    Row("superpixels to pixels", SPFORMER, "each pixel", "each superpixel",
        "q·k / √d", "softmax over superpixels", "own and 8 cells around", "N",
        cases.superpixels_to_pixels),
]
# fmt: on


def difference(row: Row, device: torch.device | str = "cpu", seed: int = 0) -> float:
    """The largest difference between a mechanism and the common form, in value and gradient."""
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        case = row.build()
    inputs = [x.requires_grad_() for x in case.inputs]
    results = []
    for function in (case.own, case.common):
        out = function(*inputs)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    return max((a - b).abs().max().item() for a, b in zip(*results, strict=True))


def table(rows: Sequence[Row] = ROWS) -> Table:
    """All answers, with links to the chapters; ✔ where both ways have just agreed, else ✘."""
    header = ("mechanism", "chapter", "who asks", "who answers", "score", "normalized",
              "which pairs", "grows as", "equal")  # fmt: skip
    cells = tuple(
        (row.mechanism, f"[{row.chapter[:2]}]({row.chapter}.ipynb)", row.asks, row.answers,
         row.score, row.normalized, row.meet, row.growth,
         "✔" if difference(row) < TOLERANCE else "✘")
        for row in rows
    )  # fmt: skip
    caption = f"✔: value and gradients equal to {TOLERANCE:g} in float64, computed just now"
    return Table(header, cells, caption, rule="---")
