"""Which of the processes still answer, and what each was last about to do: what is told when one waits in vain."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from prefero.faults import last_phase, next_phase

_BEAT = 0.5  # seconds from one sign of life to the next, at most
_PAUSE = 0.05  # and at least
_FAILURES = 20  # signs of life in a row that did not get through, before it is given up
_PATIENCE = 8.0  # seconds for the next beat of a process that is alive, on a machine that has much else to do
_TALK = ("gloo", "NCCL", "Connection closed", "Connection reset", "Timed out", "timed out")


class BrokenRunError(RuntimeError):
    """The processes of a run cannot go on together: one has ended, hangs or has other weights; it is named."""


class Pulse:
    """Tells the other processes, twice a second or more often, that this one is alive; from a thread of its own.

    It goes by the key-value store of the launch, so it stops when the process is killed or stopped, and goes on
    when the process waits.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False,
            timeout=timedelta(seconds=_PATIENCE),
        )  # fmt: skip
        self._beat(0)
        threading.Thread(target=self._run, name="pulse", daemon=True).start()

    def _run(self) -> None:
        number, failures = 1, 0
        while failures < _FAILURES:
            try:
                self._beat(number)
                number, failures = number + 1, 0
            except RuntimeError:  # slow for a moment, or gone with the end of the run
                failures += 1
            time.sleep(_PAUSE)
            next_phase(_BEAT)

    def _beat(self, number: int) -> None:
        self._store.set(f"prefero/pulse/{self.rank}", f"{os.getpid()}.{number} {last_phase()}")

    def _read(self, rank: int) -> tuple[str, str]:
        key = f"prefero/pulse/{rank}"
        if not self._store.check([key]):
            return "", "start"
        beat, _, phase = self._store.get(key).decode().partition(" ")
        return beat, phase

    def survey(self) -> str:
        """Who answers and who does not, after waiting for a sign of life of each."""
        try:
            others = [rank for rank in range(self.world_size) if rank != self.rank]
            first = {rank: self._read(rank) for rank in others}
            silent, end = set(others), time.monotonic() + _PATIENCE
            while silent and time.monotonic() < end:
                time.sleep(_BEAT)
                silent = {rank for rank in silent if self._read(rank)[0] == first[rank][0]}
            lost = [f"rank {rank} does not answer any more, last seen in phase {first[rank][1]!r}"
                    for rank in sorted(silent)]  # fmt: skip
            alive = [f"rank {rank} is alive, in phase {self._read(rank)[1]!r}" for rank in others if rank not in silent]
            return "; ".join([*lost, *alive])
        except RuntimeError:
            return "the process that holds the run together (torchrun, or rank 0) has ended"


@contextmanager
def explained(pulse: Pulse | None) -> Iterator[None]:
    """Inside, an error of talking to other processes becomes a BrokenRunError that says which of them and where."""
    try:
        yield
    except BrokenRunError:
        raise
    except RuntimeError as error:
        if pulse is None or not (isinstance(error, dist.DistError) or any(word in str(error) for word in _TALK)):
            raise
        reason = str(error).strip().split("\n")[0]
        raise BrokenRunError(
            f"rank {pulse.rank} waited for other processes in phase {last_phase()!r} and gave up: {pulse.survey()} "
            f"({reason[:200]})"
        ) from error
