"""Data sets that need no network: `load(name, split)` gives `Samples`; `photo(name)` a picture.

Bundled: `parts` (procedural objects with named parts), `scenes` (photographic cut-outs over
photographs), `clips` (the same in motion, with exact flow). The standard sets of the field share
the sample type and are read from where you keep them: `load("voc2012", "train", root=...)`.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

import torch

from attnlab.lab.arguments import require, whole
from attnlab.lab.data import bundle
from attnlab.lab.data.bundle import index, photo, photos, verify
from attnlab.lab.data.cache import cached
from attnlab.lab.data.samples import Samples, as_size

__all__ = ["Samples", "index", "load", "photo", "photos", "verify"]

# Name → number of samples in the training set, in the others.
BUNDLED = {"parts": (8192, 2048), "scenes": (8192, 2048), "clips": (1024, 256)}


def load(
    name: str,
    split: str = "train",
    n: int | None = None,
    size: int | tuple[int, int] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    cache: bool = True,
    **options,
) -> Samples:
    """Load a data set as `Samples`.

    Args:
        name: `"parts"`, `"scenes"`, `"clips"`, or a standard set (`adapters.NAMES`).
        split: scenes have `train`, `val`, `test_scenes` (new scenes of cut-outs seen in training)
            and `test_unseen` (cut-outs never seen); parts and clips have `train`, `val`, `test`.
        n: number of samples; None for the set's own. The first 100 of n=200 are those of n=100.
        size: side, or (height, width), in px; 64 by default (a standard set: as its files are).
        seed: same seed, same bytes. A standard set has none.
        device: where the tensors are put; they are always drawn and composited on the CPU.
        cache: keep a generated set in `files.cache_dir()` and read it from there next time.
        options: what `generate` in `parts`, `scenes` or `clips` takes, or the adapter.

    Raises:
        ValueError: an unknown name, split or option, a size or n out of range, a corrupted file.
        FileNotFoundError: a standard set is not where it is looked for.
    """
    if name in BUNDLED:
        samples = _generated(name, split, n, size, seed, cache, options)
    else:
        adapters = import_module(f"{__name__}.adapters")
        require(name in adapters.NAMES, "name", name, f"one of {(*BUNDLED, *adapters.NAMES)}")
        samples = adapters.load(
            name, split, size=size, **options, **({} if n is None else {"n": n})
        )
    return samples if torch.device(device).type == "cpu" else samples.to(device)


def _generated(name, split, n, size, seed, cache, options) -> Samples:
    generator = import_module(f"{__name__}.{name}")
    n = BUNDLED[name][split != "train"] if n is None else n
    _check(generator, name, split, n, seed, options)
    size = as_size(64 if size is None else size)

    def make():
        with _one_thread():
            return generator.generate(n, split, size, seed, **options)

    if cache:
        versions = {"torch": torch.__version__, "generator": generator.VERSION}
        drawn_from = {"index": bundle.fingerprint(), **versions}
        key = {"name": name, "split": split, "n": n, "size": size, "seed": seed, **options}
        tensors = cached(f"{name}-{split}", {**key, **drawn_from}, make)
    else:
        tensors = make()
    return Samples(
        tensors, classes=generator.CLASSES, name=name, split=split, derive=generator.derive
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run small operations on one thread: on a busy machine two are several times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _check(generator: ModuleType, name: str, split: str, n: int, seed: int, options: dict) -> None:
    whole(1, n=n)
    whole(0, seed=seed)
    known = tuple(inspect.signature(generator.generate).parameters)[4:]
    for option, value in options.items():
        require(option in known, option, value, f"one of the options of {name!r}, {known}")
    meant = ""
    if name == "scenes" and split == "test":
        meant = ": 'test_scenes' for cut-outs seen in training, 'test_unseen' for new ones"
    require(split in generator.SPLITS, "split", split, f"one of {tuple(generator.SPLITS)}{meant}")
