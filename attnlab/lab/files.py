"""Where things lie on disk, and how they are written so that nothing is ever half there."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import platformdirs

PACKAGE = Path(__file__).resolve().parents[1]


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on error it is removed.

    The reader of `path` sees the old file or the whole new one, never a part.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes private files; the result gets the permissions an ordinary open() would.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write `content` as indented JSON, atomically. Raises ValueError on NaN and infinity."""
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
    with atomic_write(path) as temporary:
        temporary.write_text(f"{text}\n", encoding="utf-8")


def sha256(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def repo_root() -> Path | None:
    """The checkout that this package runs from, or None when it is installed elsewhere."""
    root = PACKAGE.parent
    return root if (root / "pyproject.toml").is_file() and (root / "chapters").is_dir() else None


def data_dir() -> Path:
    """The bundled data: `ATTNLAB_DATA`, else the checkout's `data/`, else the package's copy."""
    if configured := os.environ.get("ATTNLAB_DATA"):
        return Path(configured).expanduser()
    root = repo_root()
    return root / "data" if root else PACKAGE / "data"


def cache_dir() -> Path:
    """Where generated data is kept: `ATTNLAB_CACHE`, else the user's cache directory."""
    if configured := os.environ.get("ATTNLAB_CACHE"):
        return Path(configured).expanduser()
    return Path(platformdirs.user_cache_dir("attnlab", appauthor=False))
