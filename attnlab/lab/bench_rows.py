"""What the benchmark suite times, and what it expects: one row for each mechanism and model.

Forms are values of `impl`, "auto" being what a user gets; what has one form has "auto" alone. Peers
are others' code for the same.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from attnlab.dependencyvit import dependencyvit_lite_tiny, dependencyvit_tiny
from attnlab.lab import bench_cases as c
from attnlab.lab import bench_patterns as patterns
from attnlab.lab.bench_case import Case
from attnlab.patchconvnet import patchconvnet_s60
from attnlab.spformer import spformer_small_patch16


class Row(NamedTuple):
    """One line of the suite.

    Attributes:
        make: (size, form) → `Case`. The same random numbers whatever the form.
        sizes: numbers of tokens N, or pixels of an image's side for a model; ascending.
        forms: ours; the last is "auto".
        peers: others'.
        theory: p, where time grows as Nᵖ.
        bare: the operator alone, whose growth is held against theory; a block has projections too.
        most: the largest size of a form that would need too much room or time beyond it.
        backward: whether it is timed with backward too.
        same: whether peers compute the same.
        why: one line, where a peer is faster.
    """

    make: Callable[[int, str], Case]
    sizes: tuple[int, ...]
    forms: tuple[str, ...] = ("auto",)
    peers: tuple[str, ...] = ()
    theory: float | None = None
    bare: bool = True
    most: dict[str, int] = {}  # noqa: RUF012
    backward: bool = True
    same: bool = True
    why: str = ""


SIZES = (256, 1024, 2304, 4096)
LINEAR = (256, 1024, 4096, 16384)
PX = (64, 224)
OURS = ("explicit", "fused", "auto")
BLOCKS = ("explicit", "blocks", "auto")
TWO = ("explicit", "auto")
ROOM = {"explicit": 4096}  # N×N float32 of four heads: 256 MiB
BY_QUERY = ROOM | {"blocks": 4096}  # a block a query: 49 copies of each key

# Theory is that of the operator; a block, with its projections, comes to it once N is large.
_block = partial(Row, bare=False)
_model = partial(Row, sizes=PX, backward=False)

_CHECKS = "ours checks its input and asks its probe, in Python: some microseconds a layer"
_IN_PLACE = "theirs adds and rectifies in place, where ours keeps what a probe may see"

ROWS = {  # what --only takes: the row
    "attention": Row(c.attention, SIZES, ("explicit", "blockwise", "fused", "auto"), theory=2),
    "multi-head": _block(c.multi_head, SIZES, OURS, ("timm", "torch"), theory=2, why=_CHECKS),
    "non-local": Row(c.non_local_operator, SIZES, OURS, theory=2),
    "non-local-block": _block(c.non_local_block, SIZES, OURS, ("timm",), theory=2),
    "se": Row(c.squeeze_excite, LINEAR, peers=("timm",), theory=1),
    "sk": Row(c.selective_kernel, LINEAR, OURS, ("timm",), theory=1),
    "cbam": Row(c.cbam, LINEAR, OURS, ("timm",), theory=1),
    "position": Row(c.position, SIZES, OURS, theory=2),
    "channel": Row(c.channel, LINEAR, OURS, theory=1),
    "object-context": _block(c.object_context, SIZES, OURS, theory=2),
    "window": Row(patterns.window, LINEAR, BLOCKS, theory=1, most=ROOM),
    "window-block": _block(patterns.window_block, LINEAR, TWO, ("timm",), theory=1),
    "neighborhood": Row(patterns.neighborhood, LINEAR, BLOCKS, theory=1, most=BY_QUERY),
    "dilated": Row(patterns.dilated, LINEAR, BLOCKS, theory=1, most=BY_QUERY),
    "axial": Row(patterns.axial, LINEAR, BLOCKS, theory=1.5, most=ROOM),
    "criss-cross": Row(patterns.criss_cross, LINEAR, TWO, theory=1.5, most=ROOM),
    "interlaced": Row(
        patterns.interlaced, (256, 1296, 4096, 10000), BLOCKS, theory=1.5, most=ROOM
    ),
    "cgnl": Row(c.cgnl, (16, 64, *LINEAR[1:]), OURS, theory=1, most={"explicit": 64}),
    "cgnl-block": _block(c.cgnl_block, SIZES, peers=("non-local",), theory=1, same=False),
    "warp": Row(
        c.warping, LINEAR, peers=("torch",), theory=1,
        why="ours pads to a power of two, so that zero flow is exact to the last bit",
    ),
    "local": Row(
        c.local_attention, LINEAR, ("explicit", "unfold", "fused", "auto"), theory=1,
        most={"unfold": 4096},
    ),
    "lwdn": Row(c.weighted_neighbors, LINEAR, peers=("torchvision",), theory=1),
    "pooling": _block(
        c.pooling, LINEAR[:3], ("explicit", "fused", "collapsed", "auto"), ("timm",), theory=1
    ),
    "reversed": Row(c.reversing, SIZES, ("explicit", "two_pass", "fused", "auto"), theory=2),
    "superpixel": Row(
        c.superpixel_exchange, LINEAR, ("explicit", "fused", "unfold", "auto"), theory=1,
        most={"unfold": 4096},
    ),
    "slic": Row(
        c.superpixels, LINEAR[1:], peers=("scikit-image",), theory=1, backward=False, same=False,
        why="theirs is compiled C for one image on a CPU; ours is batched, on any device",
    ),
    "deit_tiny": _model(c.deit, forms=TWO, peers=("timm",), why=_CHECKS),
    "resnet50": _model(c.resnet, peers=("torchvision",), why=_IN_PLACE),
    "se_resnet50": _model(c.se_resnet, peers=("timm",), why=_IN_PLACE),
    "sknet50": _model(c.sk_resnet, forms=TWO, peers=("timm",), why=_IN_PLACE),
    "cbam_resnet50": _model(c.cbam_resnet, forms=TWO, peers=("timm",)),
    "patchconvnet_s60": _model(partial(c.model, patchconvnet_s60), forms=TWO),
    "dependencyvit_tiny": _model(partial(c.model, dependencyvit_tiny), forms=TWO),
    "dependencyvit_lite_tiny": _model(partial(c.model, dependencyvit_lite_tiny), forms=TWO),
    "spformer_small_patch16": _model(partial(c.model, spformer_small_patch16), forms=TWO),
}  # fmt: skip
