"""Data sets that need no network: `load(name, split)` gives `Samples`; `photo(name)` a picture.

Bundled: `parts` (procedural objects with named parts), `scenes` (photographic cut-outs over
photographs), `clips` (the same in motion, with exact flow). The standard sets of the field share the
sample type and are read from where you keep them: `load("voc2012", "train", root=...)`.
"""

from importlib import import_module

import torch

from attnlab.lab.data.bundle import index, photo, photos, verify
from attnlab.lab.data.samples import Samples, as_size

__all__ = ["Samples", "index", "load", "photo", "photos", "verify"]

BUNDLED = ("parts", "scenes", "clips")


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
            and `test_unseen` (new cut-outs); parts and clips have `train`, `val`, `test`.
        n: number of samples; None for the set's own. The first 100 of n=200 are those of n=100.
        size: side, or (height, width), in px; 64 by default (a standard set: its own default).
        seed: same seed, same bytes. Splits of one seed share no draw.
        device: where the tensors are put; they are always drawn and composited on the CPU.
        cache: keep the generated set in `files.cache_dir()` and read it from there next time.
        options: what `parts.generate`, `scenes.generate`, `clips.generate` or the adapter takes.

    Raises:
        ValueError: an unknown name, split or option, a size or n out of range, a corrupted file.
    """
    if name in BUNDLED:
        generator = import_module(f"{__name__}.{name}")
        samples = _bundled(generator, name, split, n, as_size(size or 64), seed, cache, options)
    else:
        adapters = import_module(f"{__name__}.adapters")
        if name not in adapters.NAMES:
            raise ValueError(f"name: expected one of {(*BUNDLED, *adapters.NAMES)}, got {name!r}")
        if n is not None:
            options["n"] = n
        samples = adapters.load(name, split, size=size, **options)
    return samples if torch.device(device).type == "cpu" else samples.to(device)


def _bundled(generator, name, split, n, size, seed, cache, options) -> Samples:
    tensors = generator.generate(n or 1024, split, size, seed, **options)
    derive = getattr(generator, "derive", None)
    return Samples(tensors, classes=generator.CLASSES, name=name, split=split, derive=derive)
