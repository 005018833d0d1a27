"""Generated sets on disk: written once, mapped into memory the next time, checked by their hash."""

import hashlib
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import safetensors
import safetensors.torch

from attnlab.lab import files
from attnlab.lab.data.samples import Batch


def cached(name: str, key: dict, make: Callable[[], Batch]) -> Batch:
    """The tensors that `make()` gives, from `cache_dir()/data` when they are there already.

    `key` must name everything that the tensors depend on. A damaged file is made anew; where
    nothing can be written the tensors are given without being kept. Both give a warning.
    """
    text = json.dumps(key, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = files.cache_dir() / "data" / f"{re.sub('[^a-z0-9]+', '-', name)}-{digest}.safetensors"
    if path.is_file():
        tensors = _read(path)
        if tensors is not None:
            return tensors
        warnings.warn(f"{path} is damaged; it is made anew", stacklevel=3)
    tensors = make()
    try:
        with files.atomic_write(path) as temporary:
            metadata = {"key": text, "digest": _digest(tensors)}
            safetensors.torch.save_file(tensors, temporary, metadata)
    except OSError as error:
        warnings.warn(f"{path} cannot be written ({error}); nothing is kept", stacklevel=3)
    return tensors


def _read(path: Path) -> Batch | None:
    """The tensors of a file, mapped into memory, or None when it is not as it was written."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
            recorded = (file.metadata() or {}).get("digest")
    except (OSError, ValueError, safetensors.SafetensorError):
        return None
    return tensors if recorded == _digest(tensors) else None


def _digest(tensors: Batch) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(f"{key} {tensors[key].dtype} {tuple(tensors[key].shape)}".encode())
        digest.update(tensors[key].numpy())
    return digest.hexdigest()
