"""Faults on purpose: what a run must survive is made to happen at a named moment, by an environment variable.

`PREFERO_FAULT=kill@learn:3` sends SIGKILL to the process the third time it comes to `learn`; `term`, `int`, `stop` and
`full` are SIGTERM, SIGINT, SIGSTOP and a full disk; `kill@write:1:rank1` happens in that rank alone. Nothing is done
without the variable.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PHASES = (
    "load", "rollout", "score", "judge", "learn", "backward", "step", "sync", "evaluate", "export",
    "checkpoint", "write", "manifest", "rename", "pointer", "rotate",
)  # fmt: skip
_SIGNALS = {"kill": "SIGKILL", "term": "SIGTERM", "int": "SIGINT", "stop": "SIGSTOP"}
_passed: Counter[str] = Counter()
_last = "start"
_moved = threading.Event()
_told: Callable[[str], None] | None = None


def last_phase() -> str:
    """What this process was last about to do, or "start"."""
    return _last


@contextmanager
def watched(told: Callable[[str], None]) -> Iterator[None]:
    """Inside, `told` hears of every phase this process comes to."""
    global _told
    _told = told
    try:
        yield
    finally:
        _told = None


def next_phase(timeout: float) -> None:
    """Waits until this process is about to do something, `timeout` seconds at most."""
    _moved.wait(timeout)
    _moved.clear()


def fault(phase: str) -> None:
    """Marks that a run is about to do something, and lets it fail there if that is asked for.

    Raises OSError for a disk that is said to be full, and ValueError for a variable that means nothing.
    """
    global _last
    if threading.current_thread() is threading.main_thread():  # what is written in the background holds nobody up
        _last = phase
        _moved.set()
        if _told is not None:
            _told(phase)
    plan = os.environ.get("PREFERO_FAULT")
    if not plan:
        return
    kind, _, place = plan.partition("@")
    where, count, *rank = place.split(":")
    if where not in PHASES or kind not in (*_SIGNALS, "full") or not count.isdigit():
        raise ValueError(f"PREFERO_FAULT={plan!r} means nothing: write kill@learn:3, with one of {', '.join(PHASES)}")
    if phase != where or (rank and rank[0] != f"rank{os.environ.get('RANK', '0')}"):
        return
    _passed[phase] += 1
    if _passed[phase] != int(count):
        return
    if kind == "full":
        raise OSError(errno.ENOSPC, "No space left on device (a fault on purpose)")
    os.kill(os.getpid(), getattr(signal, _SIGNALS[kind]))
