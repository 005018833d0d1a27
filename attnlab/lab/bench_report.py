"""What the benchmark suite's results say: speed-ups, growth, targets met and not met, tables.

Everything here reads the dict that `attnlab.lab.bench.run` makes, or the JSON written from it.
"""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from attnlab.lab.arguments import require
from attnlab.lab.bench_measure import table
from attnlab.lab.bench_rows import ROWS
from attnlab.lab.cost import growth
from attnlab.lab.files import atomic_write

MODES = ("forward", "forward + backward")
TOLERANCE = 1.05  # of times and bytes that should be no larger than others
ROUNDING = 2**20  # bytes in which a process's peak is no news
GROWTH_FROM, GROWTH_WITHIN = 1024, 0.25
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


class Check(NamedTuple):
    """A target: how often it was looked at, where it was not met, where a line explains why."""

    target: str
    compared: int
    not_met: list[str]
    explained: list[str]


def of_row(results: dict, name: str, mode: str | None = None) -> list[dict]:
    """The times of a row, all or of one mode, by size; each has the medians of several forms."""
    return [
        record for record in results["times"]
        if record["row"] == name and mode in (None, record["mode"])
    ]  # fmt: skip


def measured(results: dict) -> list[str]:
    """The rows that were timed, in the suite's order."""
    timed = {record["row"] for record in results["times"]}
    return [name for name in ROWS if name in timed]


def exponent(results: dict, name: str, mode: str, form: str = "auto") -> float | None:
    """p in time ∝ Nᵖ over the sizes from 1,024 tokens on; None for fewer than two of them."""
    records = [
        record for record in of_row(results, name, mode)
        if record["size"] >= GROWTH_FROM and form in record["median"]
    ]  # fmt: skip
    if ROWS[name].theory is None or len(records) < 2:
        return None
    sizes = [record["size"] for record in records]
    return growth(sizes, [record["median"][form] for record in records])


def over_peer(results: dict, name: str, peer: str) -> float:
    """Our time over the peer's, the median over all sizes and modes."""
    return statistics.median(
        record["median"]["auto"] / record["median"][peer] for record in of_row(results, name)
    )


def checks(results: dict) -> list[Check]:
    """The suite's four targets.

    "auto" counts as slower than another form where its median and its minimum both are, so that
    one slow moment does not decide; as larger, beyond a MiB in which peaks of a process vary.
    """
    names = measured(results)
    speeds = [_auto_over_others(record) for name in names for record in of_row(results, name)]
    memories = [_memory_over_explicit(record) for record in results["memory"]]
    growths = [_growth(results, name, mode) for name in names for mode in MODES]
    peers = [(name, peer, over_peer(results, name, peer)) for name in names
             for peer in ROWS[name].peers]  # fmt: skip
    slower = [(name, f"{name}: {ratio:.2f} of {peer}") for name, peer, ratio in peers
              if round(ratio, 2) > 1]  # fmt: skip
    return [
        _check("auto is no more than 5 % slower than any other form", speeds),
        _check("auto takes no more memory than explicit", memories),
        Check(
            "no slower than a peer, median over sizes and modes", len(peers),
            [text for name, text in slower if not ROWS[name].why],
            [f"{text} ({ROWS[name].why})" for name, text in slower if ROWS[name].why],
        ),
        _check("time of a bare operator grows within 0.25 of theory from N = 1,024 on", growths),
    ]  # fmt: skip


def _check(target: str, found: Iterable[list[str | None]]) -> Check:
    """From one entry a comparison: None where the target is met, else what was measured."""
    entries = [entry for entries in found for entry in entries]
    return Check(target, len(entries), [entry for entry in entries if entry], [])


def _auto_over_others(record: dict) -> list[str | None]:
    found = []
    for form in ROWS[record["row"]].forms[:-1]:
        if form in record["median"]:
            ratio = min(record[of]["auto"] / record[of][form] for of in ("median", "min"))
            place = f"{record['row']}, {record['mode']}, N = {record['size']:,}"
            found.append(f"{place}: {ratio:.2f} of {form}" if ratio > TOLERANCE else None)
    return found


def _memory_over_explicit(record: dict) -> list[str | None]:
    taken = record["bytes"]
    if taken["auto"] <= TOLERANCE * taken["explicit"] + ROUNDING:
        return [None]
    ratio = taken["auto"] / max(taken["explicit"], 1)
    return [f"{record['row']}, N = {record['size']:,}: {ratio:.2f} of explicit"]


def _growth(results: dict, name: str, mode: str) -> list[str | None]:
    found = exponent(results, name, mode)
    if found is None or not ROWS[name].bare:
        return []
    theory = ROWS[name].theory
    off = abs(found - theory) > GROWTH_WITHIN
    return [f"{name}, {mode}: {found:.2f}, theory {theory:g}" if off else None]


def summary(results: dict) -> str:
    """One line a row: fast over explicit, memory, ours over peers, growth; Markdown."""
    header = ["", "at N", "faster than explicit", "with backward", "of its memory",
              "time over peers'", "time grows as N^", "with backward", "theory"]  # fmt: skip
    return table(header, [_line(results, name) for name in measured(results)])


def _line(results: dict, name: str) -> list[str]:
    row = ROWS[name]
    both = [r for r in of_row(results, name) if "explicit" in r["median"] and len(row.forms) > 1]
    largest = max((record["size"] for record in both), default=None)
    faster = {r["mode"]: r["median"]["explicit"] / r["median"]["auto"]
              for r in both if r["size"] == largest}  # fmt: skip
    taken = next((r["bytes"] for r in results["memory"] if r["row"] == name), {})
    memory = taken["auto"] / taken["explicit"] if taken.get("explicit") else None
    peers = [f"{peer} {over_peer(results, name, peer):.2f}" for peer in row.peers]
    unit = "" if row.theory else " px"
    return [
        name,
        "" if largest is None else f"{largest:,}{unit}",
        *(_times(faster[mode]) if mode in faster else "" for mode in MODES),
        "" if memory is None else f"{memory:.2g}",
        ", ".join(peers),
        *("" if (p := exponent(results, name, mode)) is None else f"{p:.2f}" for mode in MODES),
        "" if row.theory is None else f"{row.theory:g}{'' if row.bare else ' at large N'}",
    ]


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}×" if ratio >= 100 else f"{ratio:.1f}×"


def grid(results: dict) -> str:
    """Every size and mode: how many times as fast "auto" is as each other form, and peer."""
    rows = []
    for name in measured(results):
        for record in of_row(results, name):
            taken = record["median"]
            others = (f"{form} {taken[form] / taken['auto']:.2f}×" for form in taken)
            rows.append([
                name, f"{record['size']:,}", record["mode"],
                ", ".join(other for other in others if not other.startswith("auto ")),
            ])  # fmt: skip
    return table(["", "N or px", "", "auto is as fast as"], [row for row in rows if row[-1]])


def verdict(results: dict) -> str:
    """The targets as a list, with what is not met, and errors; Markdown."""
    lines = []
    for check in checks(results):
        met = check.compared - len(check.not_met) - len(check.explained)
        lines.append(f"- {check.target}: {met} of {check.compared}")
        lines[-1] += f". Not met: {'; '.join(check.not_met)}" if check.not_met else ""
        lines[-1] += f". Explained: {'; '.join(check.explained)}" if check.explained else ""
    lines += [f"- {name} failed: {error}" for name, error in results["errors"].items()]
    return "\n".join(lines)


def place(results: dict) -> str:
    """The machine and the options in one line."""
    machine, options = results["machine"], results["options"]
    device = machine["cpu"] if machine["device"] == "cpu" else machine["device"]
    parts = [device, f"{machine['threads']} threads", f"PyTorch {machine['torch']}"]
    parts += [options["dtype"], "compiled" if options["compile"] else "eager"]
    return ", ".join(parts)


def section(folder: Path) -> str:
    """README's tables, one for each `suite-*.json` of a folder: Markdown."""
    parts = []
    for path in sorted(folder.glob("suite-*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        parts += [f"{place(results)} (`{path.name}`):", summary(results), verdict(results)]
    return "\n\n".join(parts)


def update_readme(readme: Path, folder: Path) -> None:
    """Put the tables of `folder` between the two markers of `readme`.

    Raises:
        ValueError: the markers are not there once each, or no machine has been measured.
    """
    text, tables = readme.read_text(encoding="utf-8"), section(folder)
    require(bool(tables), "folder", str(folder), "one with a suite-*.json; run `attnlab bench`")
    marked = text.count(BEGIN) == text.count(END) == 1
    require(marked, "readme", str(readme), f"{BEGIN} and {END}, once each")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    with atomic_write(readme) as temporary:
        temporary.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}", encoding="utf-8")
