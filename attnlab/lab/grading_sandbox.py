"""Where submissions run: Linux namespaces that hold Python, the library, and nothing else.

`unshare` (util-linux) makes them, as root or as any user where the system lets users have
namespaces. Inside there is no network, no process but its own, and of the files only the
system's libraries, Python's, attnlab without its exercises, and the course's data, all read-only.
A submission itself runs there without rights, in a folder in memory that goes away with it, with
limits on time, memory, processes and files (`grading_worker`).

What is not defended: the kernel itself (a namespace is no virtual machine), and time or memory
that a submission can take from its neighbours within its limits.
"""

import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any, Self

from attnlab.lab.files import PACKAGE, data_dir
from attnlab.lab.grading_wire import receive, send

START_SECONDS = 600  # to load PyTorch, on a machine that is busy with other things
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/nix/store")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
# $1 is an empty folder that becomes the root; then what is to be seen there, "--", the command.
MOUNT = """
set -eu
root=$1; shift
mount -t tmpfs -o mode=755,size=1m tmpfs "$root"
while [ "$1" != -- ]; do
  mkdir -p "$root${1%/*}"
  if [ -L "$1" ]; then cp -P "$1" "$root$1"
  else
    if [ -d "$1" ]; then mkdir -p "$root$1"; else : > "$root$1"; fi
    case $1 in
      /dev/*) mount --bind "$1" "$root$1" ;;
      *) mount -o bind,ro,nosuid,nodev "$1" "$root$1" ;;
    esac
  fi
  shift
done
shift
mkdir "$root/scratch"
mount -t tmpfs -o mode=1777,size=1m tmpfs "$root/scratch"  # each submission gets its own over it
mount -o remount,bind,ro "$root"
echo 1000 > /proc/self/oom_score_adj 2>/dev/null || true
chroot "$root" "$@"
"""
NAMESPACES = ("--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child")
SERVE = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from attnlab.lab.grading_worker import serve_forks; "
    "serve_forks(int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))"
)


class SandboxError(Exception):
    """The sandbox itself does not work: no submission is to blame."""


class Sandbox:
    """The namespaces, and in them a process that has PyTorch loaded and forks for each runner."""

    def __init__(self, protected: bool = True):
        """Raises SandboxError where `protected` cannot be had."""
        if os.name != "posix":
            raise SandboxError("Grading needs Linux, or macOS with --unprotected.")
        self.folder = Path(tempfile.mkdtemp(prefix="attnlab-grade-"))
        self.mode = "unprotected" if not protected else "user" if os.geteuid() else "root"
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        library, root = self.folder / "library", self.folder / "root"
        _copy_library(library / "attnlab")
        root.mkdir()
        self.control, theirs = socket.socketpair()
        self.control.settimeout(START_SECONDS)
        python = [sys.executable, "-I", "-B", "-c", SERVE, str(library), str(theirs.fileno())]
        command = [*python, self.mode, str(_address_space())]
        if self.mode != "unprotected":
            user = ["--user", "--map-root-user"] if self.mode == "user" else []
            seen = [*_readable(library), *(name for name in DEVICES if Path(name).exists())]
            shell = ["sh", "-c", MOUNT, "sh", str(root), *seen, "--", *command]
            command = ["unshare", *user, *NAMESPACES, *shell]
        self.errors = self.folder / "errors"
        try:
            with open(self.errors, "wb") as errors, theirs:
                self.process = subprocess.Popen(
                    command, env=_environment(), cwd="/", pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL, stdout=errors, stderr=errors,
                    start_new_session=True,
                )  # fmt: skip
            ready = self.control.recv(1)
        except OSError as error:  # no unshare, or not in time
            raise SandboxError(self._why(str(error))) from error
        if not ready:
            text = self.errors.read_text(errors="replace").strip()
            raise SandboxError(self._why(text[-1000:]))
        self.control.settimeout(None)

    def _why(self, text: str) -> str:
        if self.mode == "unprotected":
            return f"The process for submissions does not start: {text}"
        return (
            f"Linux namespaces cannot be had here: {text}\n--unprotected grades without them: "
            "submissions can then use the network and read and write the files that you can."
        )

    def close(self) -> None:
        """Stop everything that runs in it, and remove its folder."""
        if hasattr(self, "control"):
            self.control.close()
        if hasattr(self, "process"):
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class Runner:
    """A process that runs one submission. `ask` and `get` raise EOFError when it is dead,
    TimeoutError when it takes too long, and BadMessage when it sends something else."""

    def __init__(self, sandbox: Sandbox):
        self.connection, data = socket.socketpair()
        self.life, life = socket.socketpair()
        self.allow(START_SECONDS)
        try:
            with data, life:
                socket.send_fds(sandbox.control, [b"1"], [data.fileno(), life.fileno()])
            confined = self.get()
        except (EOFError, OSError) as error:
            self.close()
            text = sandbox.errors.read_text(errors="replace").strip()
            raise SandboxError(f"A process for submissions does not start: {text}") from error
        if confined != "confined":
            raise SandboxError(f"A process for submissions said {confined!r}.")

    def allow(self, seconds: float) -> None:
        """From now on, all that is asked has to be answered within so many seconds."""
        self.deadline = time.monotonic() + seconds

    def ask(self, value: Any) -> None:
        self._set_timeout()
        try:
            send(self.connection, value)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise EOFError from error

    def ask_file(self, content: bytes, notebook: bool) -> Any:
        """Hand the submission over; returns what was found in it."""
        self.ask({"size": len(content), "notebook": notebook})
        try:
            self.connection.sendall(content)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise EOFError from error
        return self.get()

    def get(self) -> Any:
        self._set_timeout()
        try:
            return receive(self.connection)
        except ConnectionResetError as error:
            raise EOFError from error

    def _set_timeout(self) -> None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.connection.settimeout(left)

    def close(self) -> None:
        """Have it killed, with all that it started."""
        self.connection.close()
        self.life.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _copy_library(target: Path) -> None:
    """The library without its solutions, which are also its hints, mistakes and cases."""

    def unwanted(folder: str, names: list[str]) -> list[str]:
        exercises = PACKAGE / "lab" / "exercises"
        inside = Path(folder).is_relative_to(exercises)
        data = {"data"} if Path(folder) == PACKAGE else set()  # of an installed wheel
        return [n for n in names if n in data or (inside and n.startswith("ch"))]

    shutil.copytree(PACKAGE, target, ignore=unwanted)


def _readable(library: Path) -> list[str]:
    """What a submission may read, none of it inside another."""
    torch_home = sysconfig.get_paths()
    wanted = [*SYSTEM, sys.prefix, sys.base_prefix, torch_home["purelib"], torch_home["platlib"]]
    wanted += [str(data_dir().resolve()), str(library)]
    readable: list[str] = []
    for name in wanted:
        path = Path(name)
        if path.exists() and not any(path.is_relative_to(other) for other in readable):
            readable.append(str(path))
    return readable


def _environment() -> dict[str, str]:
    return {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/scratch",
        "TMPDIR": "/scratch",
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "MPLBACKEND": "Agg",
        "ATTNLAB_DATA": str(data_dir().resolve()),
        "ATTNLAB_CACHE": "/scratch/cache",
        "ATTNLAB_PROGRESS": "off",
    }


def _address_space() -> int:
    """Bytes of this process's address space: about that of another one with PyTorch loaded."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
