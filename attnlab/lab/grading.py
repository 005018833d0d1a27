"""`attnlab grade`: every submission against every case, with other numbers than learners saw.

The verdict is made here and nowhere else. A process without rights (`grading_sandbox`) calls the
learner's function; what it returns comes back as plain tensors and numbers (`grading_wire`) and
is compared with the solution's answers in this process, where no learner's code ever runs. So a
submission can replace `lab.check`, the data or PyTorch itself: that changes what its own function
returns. A function that calls the library's own version of an answer is not found out.
"""

import argparse
import hashlib
import json
import os
import re
import secrets
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from attnlab.lab.exercises import RECORDED, catalogue
from attnlab.lab.exercises.framework import Exercise, Outcome, judge
from attnlab.lab.files import PACKAGE, sha256, write_json
from attnlab.lab.grading_report import plain, write_report, write_tables
from attnlab.lab.grading_sandbox import Runner, Sandbox, SandboxError

MAX_FILE = 64 * 2**20
READ_SECONDS = 60  # to read a file, which may hold 50 MB of outputs
HIDDEN_SEEDS = 2
MAX_TEXT = 4_000  # characters that a report says of one exercise
Outcomes = dict[str, Any]  # exercise → what the runner said of it, see `_ask`


@dataclass(frozen=True)
class Submission:
    """A learner's file: its path below the folder of submissions, and which exercises it owes."""

    name: str
    path: Path
    exercises: tuple[Exercise, ...]


def grade(
    folder: Path,
    out: Path,
    *,
    chapters: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    seconds: float = 20,
    jobs: int | None = None,
    protected: bool = True,
) -> list[dict[str, Any]]:
    """Grade the notebooks and scripts below `folder`; returns a record for each.

    `out` is the table (CSV); beside it, in a folder of the same name, are a report for every
    submission, the summary, and the records from which an interrupted run goes on.

    chapters: like ("01",); by default those that a submission names.
    seeds: the hidden ones; by default drawn once and kept beside the records.
    seconds: what an exercise may take. jobs: submissions at a time, by default one per core.
    Raises ValueError, and SandboxError where submissions cannot be run.
    """
    if RECORDED.is_file():
        raise ValueError("this edition has no solutions: grade with the full library")
    if out.suffix != ".csv":
        raise ValueError(f"out {str(out)!r}: expected a file name that ends in .csv")
    reports = out.with_suffix("")
    submissions = find_submissions(folder, chapters)
    if not submissions:
        raise ValueError(f"folder {str(folder)!r}: there is no .ipynb and no .py file in it")
    seeds = [0, *_hidden_seeds(reports / "run.json", seeds)]
    keys = {s.name: _key(s, seeds, seconds, protected) for s in submissions}
    records = {s.name: _record(reports, s.name, keys[s.name]) for s in submissions}
    waiting = [s for s in submissions if records[s.name] is None]
    if waiting:
        with Sandbox(protected) as sandbox, ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
            running = {pool.submit(run, s, sandbox, seeds, seconds): s for s in waiting}
            try:
                for done in as_completed(running):
                    submission = running[done]
                    results = [_verdict(e, seeds, done.result()) for e in submission.exercises]
                    key = keys[submission.name]
                    record = {"key": key, "submission": submission.name, "results": results}
                    write_report(_place(reports, submission.name, ".txt"), record)
                    write_json(_place(reports, submission.name, ".json"), record)
                    records[submission.name] = record
                    right = sum(result["status"] == "correct" for result in results)
                    print(f"{submission.name!a}: {right} of {len(results)}", flush=True)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                sandbox.close()
                raise
    table = [records[submission.name] for submission in submissions]
    write_tables(out, reports / "summary.txt", table)
    return table


def main(options: argparse.Namespace) -> int:
    """What `attnlab grade` does; returns the exit code."""
    if options.unprotected:
        print("NOT PROTECTED: submissions can use the network and your files.", file=sys.stderr)
    try:
        grade(
            options.folder, options.out, chapters=options.chapters, seeds=options.seeds,
            seconds=options.seconds, jobs=options.jobs, protected=not options.unprotected,
        )  # fmt: skip
    except (ValueError, SandboxError) as problem:
        print(f"attnlab grade: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. The same command again goes on from here.", file=sys.stderr)
        return 130
    print((options.out.with_suffix("") / "summary.txt").read_text(encoding="utf-8"))
    return 0


def find_submissions(folder: Path, chapters: Sequence[str] = ()) -> list[Submission]:
    """Every notebook and script below the folder, links left out.

    Each owes the exercises of `chapters`, else of the chapters that it names, else (a file that
    cannot be read, say) of those that the others name.
    """
    if not folder.is_dir():
        raise ValueError(f"folder {str(folder)!r}: expected a folder of .ipynb and .py files")
    known = {exercise.chapter for exercise in catalogue().values()}
    if unknown := sorted(set(chapters) - known):
        raise ValueError(f"chapters {unknown}: expected some of {', '.join(sorted(known))}")
    paths = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".ipynb", ".py") and path.is_file() and not path.is_symlink()
        and ".ipynb_checkpoints" not in path.parts
    ]  # fmt: skip
    named = {path: set(chapters) or _chapters(path) for path in paths}
    everything = set().union(*named.values())
    return [
        Submission(
            "/".join(map(_readable, path.relative_to(folder).parts)),
            path,
            tuple(e for e in catalogue().values() if e.chapter in (named[path] or everything)),
        )
        for path in paths
    ]


def _readable(part: str) -> str:
    """A name that can be written down: in UTF-8, and short enough to have a suffix added."""
    text = part.encode("utf-8", "backslashreplace").decode()
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return text if len(text.encode()) <= 150 else f"{text[:40]}-{digest}{Path(text).suffix[:10]}"


def _chapters(path: Path) -> set[str]:
    """The chapters whose checks a file calls or, without any call, whose functions it defines."""
    if path.stat().st_size > MAX_FILE:
        return set()
    content = path.read_bytes()
    checked = {m.decode() for m in re.findall(rb"check\(\\?[\"']([a-z_0-9]+\.\w+)", content)}
    defined = {m.decode() for m in re.findall(rb"\bdef ([A-Za-z_]\w*)", content)}
    by_check = {e.chapter for name, e in catalogue().items() if name in checked}
    return by_check or {e.chapter for e in catalogue().values() if e.solution.__name__ in defined}


def _hidden_seeds(path: Path, given: Sequence[int] | None) -> list[int]:
    if given is None and path.exists():
        return json.loads(path.read_text())["seeds"]
    seeds = list(given or [secrets.randbelow(2**31) + 1 for _ in range(HIDDEN_SEEDS)])
    write_json(path, {"seeds": seeds})
    return seeds


def _place(reports: Path, name: str, suffix: str) -> Path:
    return reports / f"{name}{suffix}"


@cache
def _library() -> str:
    """A hash of what decides about a verdict."""
    files = [*sorted((PACKAGE / "lab" / "exercises").glob("*.py")), *PACKAGE.glob("lab/grading*")]
    return hashlib.sha256("".join(map(sha256, filter(Path.is_file, files))).encode()).hexdigest()


def _key(submission: Submission, seeds: list[int], *options: Any) -> str:
    names = [exercise.name for exercise in submission.exercises]
    content = [_library(), sha256(submission.path), names, seeds, *options]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _record(reports: Path, name: str, key: str) -> dict[str, Any] | None:
    """The record of an earlier run, if it was of the same file under the same rules."""
    try:
        record = json.loads(_place(reports, name, ".json").read_text())
        return record if record["key"] == key else None
    except (OSError, ValueError, KeyError):
        return None


def run(submission: Submission, sandbox: Sandbox, seeds: list[int], seconds: float) -> Outcomes:
    """Have every function of a submission called, and return what was said of each exercise.

    A new process goes on where one was ended or had to be.
    """
    said: Outcomes = {}
    if submission.path.stat().st_size > MAX_FILE:
        text = f"The file is larger than {MAX_FILE // 2**20} MB."
        return {e.name: {"unreadable": text} for e in submission.exercises}
    content = submission.path.read_bytes()
    while waiting := [e for e in submission.exercises if e.name not in said]:
        with Runner(sandbox) as runner:
            _ask_all(runner, content, submission.path.suffix == ".ipynb", waiting, seeds, seconds,
                     said)  # fmt: skip
    return said


def _ask_all(
    runner: Runner,
    content: bytes,
    notebook: bool,
    exercises: Iterable[Exercise],
    seeds: list[int],
    seconds: float,
    said: Outcomes,
) -> None:
    """Ask for exercise after exercise until the process fails, and note in `said` what came."""
    runner.allow(READ_SECONDS)
    try:
        read = runner.ask_file(content, notebook)
        unreadable, problems = str(read["unreadable"]), list(read["problems"])
    except Exception as error:  # it is the submission's own process that speaks here
        unreadable = f"The file could not be read: {_failure(error, READ_SECONDS)}"
    if unreadable:
        said.update({e.name: {"unreadable": unreadable} for e in exercises})
        return
    for exercise in exercises:
        answer = said[exercise.name] = {"outcomes": [], "problems": problems}
        cases = [case.args for seed in seeds for case in exercise.cases(seed)]
        name, prelude = exercise.solution.__name__, "\n".join(exercise.imports)
        runner.allow(seconds)
        try:
            runner.ask({"name": name, "prelude": prelude, "cases": cases})
            found = runner.get()
            answer |= {name: found[name] for name in ("found", "problem", "callable", "shown")}
            if answer.get("callable") is True:
                for args in cases:
                    answer["outcomes"].append(_outcome(runner.get(), len(args)))
        except Exception as error:
            answer["failure"] = _failure(error, seconds)
            return


def _outcome(message: dict[str, Any], arguments: int) -> Outcome:
    written = tuple(index for index in range(arguments) if index in message["written"])
    words = {name: str(message[name]) for name in ("clash", "raised", "printed")}
    return Outcome(message["output"], untouched=message["untouched"] is True, written=written,
                   **words)  # fmt: skip


def _failure(error: Exception, seconds: float) -> str:
    if isinstance(error, TimeoutError):
        return f"It was stopped after {seconds:g} seconds."
    if isinstance(error, EOFError):
        return "It ended its process, as os._exit does, or reached a limit (memory, processes)."
    return f"It did not answer as a function does: {error}."


def _verdict(exercise: Exercise, seeds: list[int], said: Outcomes) -> dict[str, str]:
    """The first result that is not right, over the seeds: exercise, status, text, hint."""

    def verdict(status: str, text: str, hint: str = "") -> dict[str, str]:
        text = plain(text)[:MAX_TEXT]
        return {"exercise": exercise.name, "status": status, "text": text, "hint": hint}

    answer = said[exercise.name]
    if answer.get("unreadable"):
        return verdict("unreadable", answer["unreadable"])
    if answer.get("found") is False:
        return verdict("missing", "\n".join(map(str, [answer["problem"], *answer["problems"]])))
    outcomes = iter(answer["outcomes"])

    def replay(function: Any, args: tuple) -> Outcome:
        return next(outcomes, Outcome(raised=answer.get("failure", "It gave no answer.")))

    for seed in seeds:
        function = exercise.solution if answer.get("callable", True) else answer.get("shown")
        try:
            result = judge(exercise, function, seed, call=replay)
        except Exception as error:  # a value that no honest function returns
            return verdict("wrong", f"What it returned cannot be compared: {error!r}.")
        if result.status != "correct":
            about = "" if seed == 0 else "(Right on the chapter's numbers, not on others.)\n"
            return verdict(result.status, about + result.text, result.hint)
    return verdict("correct", f"All cases agree, for {len(seeds)} seeds.")
