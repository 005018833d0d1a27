"""Set the course up in `.venv` and run one of its commands there: `bootstrap.py lab`.

`make lab` calls this, and Windows, which has no make, types it. This file parses on every Python
since 2.7, so that a Python that is too old is named instead of raising a syntax error.
"""

import sys

OLDEST = (3, 11)


def too_old(version, executable):
    """Return what to do about a Python that is older than `OLDEST`, or None if it will do."""
    if tuple(version[:2]) >= OLDEST:
        return None
    return (
        "attnlab needs Python {}.{} or newer, and {} is Python {}.{}.\n"
        "Install a newer one beside it, then name it:\n"
        "  with make:   make PYTHON=python3.13 lab\n"
        "  on Windows:  py -3.13 scripts\\bootstrap.py lab"
    ).format(OLDEST[0], OLDEST[1], executable, version[0], version[1])


if __name__ == "__main__":
    problem = too_old(sys.version_info, sys.executable)
    if problem:
        sys.exit(problem)
    from commands import main

    sys.exit(main(sys.argv[1:]))
