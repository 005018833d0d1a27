"""What the grader writes: a report for each submission, the table, and the summary of a class."""

import csv
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

from attnlab.lab.exercises import catalogue
from attnlab.lab.files import atomic_write

STATUSES = ("correct", "wrong", "not attempted", "missing", "unreadable")
BAR = 40  # characters of the longest bar


def write_report(path: Path, record: dict[str, Any]) -> None:
    """A learner's own page: each exercise, what went wrong first, and the hint."""
    lines = [record["submission"], f"{_solved(record)} of {len(record['results'])} solved", ""]
    for result in record["results"]:
        lines.append(f"{result['exercise']}: {result['status']}")
        if result["status"] != "correct":
            lines.append(textwrap.indent(result["text"], "  "))
            lines += [f"  hint: {result['hint']}"] if result["hint"] else []
        lines.append("")
    _write(path, lines)


def write_tables(table: Path, summary: Path, records: list[dict[str, Any]]) -> None:
    """The table of all submissions (CSV), and the summary of the class."""
    present = {result["exercise"] for record in records for result in record["results"]}
    names = [name for name in catalogue() if name in present]
    with atomic_write(table) as temporary, open(temporary, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(["submission", "solved", "of", *names])
        for record in records:
            status = {result["exercise"]: result["status"] for result in record["results"]}
            row = [_cell(record["submission"]), _solved(record), len(status)]
            writer.writerow([*row, *(status.get(name, "") for name in names)])
    _write(summary, _summary(names, records))


def _summary(names: list[str], records: list[dict[str, Any]]) -> list[str]:
    lines = [f"{len(records)} submissions", "", "solved  submissions"]
    counts = Counter(map(_solved, records))
    longest = max(counts.values())
    for solved in range(max(counts) + 1):
        bar = "#" * -(-counts[solved] * BAR // longest)
        lines.append(f"{solved:>6}  {counts[solved]:>4}  {bar}".rstrip())
    results = [result for record in records for result in record["results"]]
    width = max(map(len, names), default=0)
    lines += ["", "  ".join([f"{'exercise':{width}}", *STATUSES])]
    missed = {}
    for name in names:
        own = Counter(result["status"] for result in results if result["exercise"] == name)
        missed[name] = 1 - own["correct"] / own.total()
        numbers = [f"{own[status]:>{len(status)}}" for status in STATUSES]
        lines.append("  ".join([f"{name:{width}}", *numbers]))
    worst = max(missed, key=missed.get, default=None)
    if worst and missed[worst]:
        lines += ["", f"Most missed: {worst}, by {missed[worst]:.0%} of those who owed it."]
        hints = Counter(r["hint"] for r in results if r["exercise"] == worst and r["hint"])
        lines += [f"  {number} got the hint: {hint}" for hint, number in hints.most_common(3)]
    return lines


def _solved(record: dict[str, Any]) -> int:
    return sum(result["status"] == "correct" for result in record["results"])


def _cell(text: str) -> str:
    """A file name as a spreadsheet shows it: one that begins like a formula is not to be one."""
    text = plain(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def plain(text: str) -> str:
    """Text without what moves a terminal's cursor; learners' own words are in it."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)


def _write(path: Path, lines: list[str]) -> None:
    text = plain("\n".join(lines)).rstrip() + "\n"
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
