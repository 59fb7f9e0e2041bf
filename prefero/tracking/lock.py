"""One writer for a folder: a lock file with the owner's process id, taken over when that process is gone."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefero.tracking.files import json_bytes

if sys.platform != "win32":
    import fcntl

NAME = ".lock"


def _started(pid: int) -> str | None:
    """When a process started, in clock ticks since boot; None where /proc does not say. Tells a reused id apart."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _is_alive(pid: int, started: str | None) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # someone else's process, but a process
    now = _started(pid)
    return started is None or now is None or now == started


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Keeps two processes from both taking over the same stale lock; the kernel lets go if we die in here."""
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class FolderLock:
    """Holds a folder for this process until `release`.

    Raises ValueError when a living process holds it already (or one on another machine, which cannot be asked).
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / NAME
        self._owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())}
        self._held = True
        with _one_at_a_time(folder):
            try:
                self._write()
            except FileExistsError:
                self._refuse_if_held(folder)
                self._file.unlink()
                self._write()

    def _write(self) -> None:
        descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(json_bytes(self._owner))

    def _refuse_if_held(self, folder: Path) -> None:
        try:
            owner = json.loads(self._file.read_bytes())
            pid, host, started = int(owner["pid"]), str(owner["host"]), owner["started"]
        except (ValueError, TypeError, KeyError):
            return  # its writer died before the process id was down
        if host != self._owner["host"]:
            raise ValueError(
                f"{folder} is in use by process {pid} on the machine {host!r}; if that run is over, delete {self._file}"
            )
        if pid > 0 and _is_alive(pid, started):
            raise ValueError(
                f"{folder} is in use by process {pid}; wait for it to end, or give another folder with --out"
            )

    def release(self) -> None:
        """Lets go of the folder; a process forked meanwhile holds nothing, so it removes nothing."""
        if self._held and os.getpid() == self._owner["pid"]:
            self._file.unlink(missing_ok=True)
        self._held = False
