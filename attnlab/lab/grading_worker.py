"""The other side of the grader: the processes that run learners' code and judge nothing.

`serve_forks` runs once, inside the namespaces that `grading_sandbox` made: it loads PyTorch, and
forks for every submission a keeper, which forks the process that runs the learner's code:

    fork server (never runs a learner's code) → keeper (kills when told) → runner (no rights)

The runner gets a file and the arguments of calls, and sends what the calls returned. It has no
answer, no seed and no verdict, so there is nothing in it that a learner's code could overwrite.
"""

import ctypes
import os
import resource
import shutil
import signal
import socket
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import nn  # noqa: F401  what learners import is loaded once, before the forks

import attnlab  # noqa: F401
from attnlab.lab.exercises.framework import call
from attnlab.lab.exercises.framework import raised as explain
from attnlab.lab.grading_cells import Missing, Statement, define, read_cells, read_statements
from attnlab.lab.grading_wire import read_bytes, receive, send

NEW_MOUNT, NEW_IPC, NEW_PID, NEW_NET = 0x00020000, 0x08000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV = 2, 4
PR_SET_NO_NEW_PRIVS = 38
CAPABILITIES_V3 = 0x20080522
NOBODY = 65534
SCRATCH = "/scratch"
SCRATCH_OPTIONS = b"size=64m,nr_inodes=1000,mode=1777"
MEMORY = 2 * 2**30
libc = ctypes.CDLL(None, use_errno=True)


def serve_forks(descriptor: int, mode: str, address_space: int) -> None:
    """Fork a keeper for every pair of sockets that comes, until the grader is gone.

    mode: "root" (namespaces made by root), "user" (made by a user) or "unprotected".
    """
    control = socket.socket(fileno=descriptor)
    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    control.send(b"1")
    while True:
        _, sockets, *_ = socket.recv_fds(control, 1, 2)
        if not sockets:
            return
        if os.fork() == 0:
            control.close()
            _alone(lambda pair=sockets: _keep(*pair, mode, address_space))
        for used in sockets:
            os.close(used)


def _alone(work: Callable[[], None]) -> None:
    """Do the work of a forked process, which must never come back into its parent's code."""
    try:
        work()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _keep(data: int, life: int, mode: str, address_space: int) -> None:
    """Start a runner, and kill it with all it started when the grader closes `life`."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if mode == "unprotected":
        folder = tempfile.mkdtemp(prefix="attnlab-")
    else:
        folder = SCRATCH
        _check(libc.unshare(NEW_MOUNT | NEW_IPC | NEW_PID | NEW_NET), "unshare")
    runner = os.fork()
    if runner == 0:
        os.close(life)
        _alone(lambda: _run(data, folder, mode, address_space))
    os.close(data)
    os.read(life, 1)
    # The first process of a PID namespace takes all others with it.
    (os.killpg if mode == "unprotected" else os.kill)(runner, signal.SIGKILL)
    if mode == "unprotected":
        shutil.rmtree(folder, ignore_errors=True)


def _run(data: int, folder: str, mode: str, address_space: int) -> None:
    """Give up every right, then answer what the grader asks."""
    os.setsid()
    if mode != "unprotected":
        flags = MS_NOSUID | MS_NODEV
        mounted = libc.mount(b"tmpfs", folder.encode(), b"tmpfs", flags, SCRATCH_OPTIONS)
        _check(mounted, "mount")
    os.chdir(folder)
    if mode == "root":
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    if mode != "unprotected":
        _drop_capabilities()
    _limit(address_space)
    silence = os.open("/dev/null", os.O_RDWR)
    for standard in range(3):
        os.dup2(silence, standard)
    answer(socket.socket(fileno=data))


def _drop_capabilities() -> None:
    """Give up every right over the namespaces, for this process and what it executes."""
    _check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    header = (ctypes.c_uint32 * 2)(CAPABILITIES_V3, 0)
    _check(libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")


def _limit(address_space: int) -> None:
    """No new process or thread, and so much memory, disk and CPU time."""
    limits = {"CORE": 0, "CPU": 600, "DATA": MEMORY, "FSIZE": 16 * 2**20, "NOFILE": 64, "NPROC": 0}
    if address_space:
        limits["AS"] = address_space + MEMORY
    for name, most in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def _check(code: int, what: str) -> None:
    if code != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def answer(connection: socket.socket) -> None:
    """Define the functions that the grader names, call them, and send what came of it."""
    send(connection, "confined")
    file = receive(connection)
    text = read_bytes(connection, file["size"]).decode("utf-8-sig", errors="replace")
    try:
        statements, problems = read_statements(read_cells(text, file["notebook"]))
    except ValueError as error:
        send(connection, {"unreadable": str(error), "problems": []})
        return
    send(connection, {"unreadable": "", "problems": problems[:10]})
    while True:
        asked = receive(connection)
        function, found = _define(statements, asked["name"], asked["prelude"])
        send(connection, found)
        if found["callable"]:
            for args in asked["cases"]:
                send(connection, asdict(call(function, args)))


def _define(statements: list[Statement], name: str, prelude: str) -> tuple[Any, dict[str, Any]]:
    """What the submission binds to `name`, and what the grader is told of it."""
    function, problem = None, ""
    try:
        function = define(statements, name, prelude)
    except Missing:
        problem = f"It defines no `{name}`."
    except BaseException as error:
        problem = f"`{name}` cannot be defined. {explain(error)}"
    shown = None if callable(function) else function
    told = {"found": not problem, "problem": problem, "callable": callable(function)}
    return function, {**told, "shown": shown}
