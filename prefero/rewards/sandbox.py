"""Where untrusted text is run or judged: processes that are closed off, limited and ended, several at once."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from prefero.rewards import jail

_JAIL = jail.__file__
_GRACE = 10.0
"""Seconds beyond a job's own within which a keeper must have answered; one that has not is ended with all it runs."""
_START = 60.0
"""Seconds a keeper may take to close itself off and to load its judge."""


@dataclass(frozen=True)
class Limits:
    """What a job may take: seconds in all; of each process bytes of memory, of a file, and open files; processes and
    threads together; bytes of output. Raises ValueError for numbers that mean nothing."""

    seconds: float = 10.0
    memory: int = 512 * 2**20
    file_size: int = 4 * 2**20
    open_files: int = 64
    processes: int = 16
    output: int = 2**20

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 2**62:
                raise ValueError(f"sandbox {name} is {value!r}: give a number above 0")


class SandboxError(ValueError):
    """The machine does not permit what was asked; the message names the reason and the cure."""


class _Keeper:
    """One keeper process; started when first needed, and again after it was lost."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Raises SandboxError with the reason when it cannot close itself off."""
        self.process = subprocess.Popen(  # noqa: S603 (our own script, by our own Python)
            [sys.executable, "-I", "-B", _JAIL],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={}, cwd="/", start_new_session=True, bufsize=0,
        )  # fmt: skip
        told = self._exchange(self.settings, _START)
        if told is None or "ready" not in told:
            self.stop()
            raise SandboxError("it ended at once" if told is None else str(told["refused"]))

    def ask(self, job: dict[str, Any]) -> dict[str, Any] | None:
        """What came of a job; None when the keeper was lost over it."""
        if self.process is None:
            self.start()
        answer = self._exchange(job, self.settings["seconds"] + _GRACE)
        if answer is None:
            self.stop()
        return answer

    def stop(self) -> None:
        """Ends the process and all it runs."""
        process, self.process = self.process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()
        process.wait()

    def _exchange(self, message: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """Sends a message and reads the answer; None when there is none in time."""
        assert self.process is not None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        deadline = time.monotonic() + seconds
        if not _write(self.process.stdin.fileno(), jail.framed(message), deadline):
            return None
        head = _read(self.process.stdout.fileno(), 4, deadline)
        if head is None:
            return None
        (size,) = struct.unpack(">I", head)
        text = _read(self.process.stdout.fileno(), size, deadline) if size <= jail.MOST else None
        return None if text is None else json.loads(text)


def _ready(fd: int, event: int, deadline: float) -> bool:
    """Waits until a pipe can be read or written, or has ended; false when time has."""
    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))


def _write(fd: int, data: bytes, deadline: float) -> bool:
    """Writes it all, unless time ends or nobody reads."""
    os.set_blocking(fd, False)
    rest = memoryview(data)
    while rest and _ready(fd, select.POLLOUT, deadline):
        try:
            rest = rest[os.write(fd, rest) :]
        except BrokenPipeError:
            return False
    return not rest


def _read(fd: int, size: int, deadline: float) -> bytes | None:
    """Just so many bytes of a pipe; None when it ends before, or time does."""
    pieces = bytearray()
    while len(pieces) < size:
        if not _ready(fd, select.POLLIN, deadline):
            return None
        piece = os.read(fd, min(1 << 16, size - len(pieces)))
        if not piece:
            return None
        pieces += piece
    return bytes(pieces)


class Sandbox:
    """Runs jobs, as many at once as there are cores, each in processes that are gone when it is done.

    isolated: in namespaces of their own (Linux): no network, no other process and no file but Python's own to be seen,
    one folder in memory to write to. Otherwise limits alone: the same user, files and network. judge: a file whose
    function `judge` answers questions, loaded once in each keeper, run anew, confined, for each question. num_workers:
    jobs at once; 0: this process's share of the cores.

    Raises SandboxError where the machine does not permit it, after a trial.
    """

    def __init__(self, limits: Limits, *, isolated: bool = True, judge: str | Path = "", num_workers: int = 0) -> None:
        if not hasattr(os, "fork"):
            raise SandboxError(f"nothing can be confined on {sys.platform}: use Linux")
        imports = [path for path in sys.path if path and Path(path).exists()]
        python = [sys.base_prefix, sys.prefix, str(Path(sys.executable).resolve().parent), str(Path(_JAIL).parent)]
        paths = ["/usr", "/lib", "/lib64", "/bin", *sorted({*python, *(imports if judge else [])}, key=len)]
        self.limits = limits
        self.isolated = isolated
        folder = "" if isolated else tempfile.mkdtemp(prefix="prefero-sandbox-")
        if folder:
            Path(folder).chmod(0o711)  # others find what is theirs in it, and nothing else
        settings = asdict(limits) | {
            "isolated": isolated, "judge": str(judge), "imports": imports, "paths": paths, "folder": folder,
        }  # fmt: skip
        sharers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.num_workers = num_workers or max(1, (os.cpu_count() or 1) // sharers)
        self._keepers = [_Keeper(settings) for _ in range(self.num_workers)]
        self._idle: SimpleQueue[_Keeper] = SimpleQueue()
        for keeper in self._keepers:
            self._idle.put(keeper)
        self._end = weakref.finalize(self, _clean_up, self._keepers, folder, os.getpid())
        self._try(self._keepers[0], bool(judge))

    def map(self, jobs: Sequence[dict[str, Any]]) -> list[dict[str, Any] | None]:
        """What came of each job, in order; None for one over which its keeper was lost."""
        if len(jobs) < 2:
            return [self._one(job) for job in jobs]
        with ThreadPoolExecutor(self.num_workers, "sandbox") as threads:
            return list(threads.map(self._one, jobs))

    def close(self) -> None:
        """Ends every process."""
        self._end()

    def _one(self, job: dict[str, Any]) -> dict[str, Any] | None:
        keeper = self._idle.get()
        try:
            return keeper.ask(job)
        finally:
            self._idle.put(keeper)

    def _try(self, keeper: _Keeper, judges: bool) -> None:
        """A right and a wrong program, so that a sandbox in which nothing runs does not score everything zero."""
        keeper.start()
        if judges:
            return
        tests = ["assert same(1) == 1", "assert same(1) == 2"]
        found = keeper.ask({"kind": "tests", "program": "def same(x): return x", "tests": tests})
        if found is None or found["passed"] != [True, False]:
            keeper.stop()
            raise SandboxError(f"a trial program did not run: {sys.executable} cannot be started there")


def _clean_up(keepers: Sequence[_Keeper], folder: str, owner: int) -> None:
    if os.getpid() != owner:  # a fork of the process that they belong to
        return
    for keeper in keepers:
        keeper.stop()
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
