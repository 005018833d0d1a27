"""Which exercises a learner has solved: a small file on their own machine, sent nowhere.

`ATTNLAB_PROGRESS` names another file, or is "off": nothing is kept then (so it is while chapters
are built and tested, and in the grader). Deleting the file starts again.
"""

import json
import os
from contextlib import suppress
from datetime import date
from pathlib import Path

import platformdirs

from attnlab.lab.files import write_json


def place() -> Path | None:
    """The file, or None where nothing is kept."""
    configured = os.environ.get("ATTNLAB_PROGRESS", "")
    if configured.lower() in ("off", "0", "no", "false"):
        return None
    if configured:
        return Path(configured).expanduser()
    return Path(platformdirs.user_data_dir("attnlab", appauthor=False)) / "progress.json"


def solved() -> dict[str, str]:
    """The names of the solved exercises, each with the day; empty without a file, or a damaged
    one."""
    path = place()
    try:
        days = json.loads(path.read_text(encoding="utf-8"))["solved"] if path else {}
        return {str(name): str(day) for name, day in days.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def record(name: str) -> None:
    """Note that an exercise is solved. A disk that cannot be written to is no learner's problem."""
    path, days = place(), solved()
    if path and name not in days:
        with suppress(OSError):
            write_json(path, {"solved": days | {name: date.today().isoformat()}})
