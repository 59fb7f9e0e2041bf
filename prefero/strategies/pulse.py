"""Which of the processes still answer, and what each was last about to do: what is told when one waits in vain."""

from __future__ import annotations

import atexit
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

from prefero.faults import last_phase, next_phase

_BEAT = 0.5  # seconds from one sign of life to the next, at most
_PAUSE = 0.05  # and at least
_FAILURES = 20  # signs of life in a row that did not get through, before it is given up
_PATIENCE = 8.0  # seconds for the next beat of a process that is alive, on a machine that has much else to do
_TALK = ("gloo", "NCCL")
_ENDED = "ended"
BROKEN = 76
"""The exit status where the processes of a run could not go on together; it can be resumed."""


class BrokenRunError(RuntimeError):
    """The processes of a run cannot go on together: one has ended, hangs or has other weights; it is named."""


class Pulse:
    """Tells the other processes, twice a second or more often, that this one is alive; from a thread of its own.

    It goes by the key-value store of the launch, so it stops when the process is killed or stopped, and goes on
    when the process waits. While `watching`, the thread also listens for the next rank (the last one for the first),
    and ends this process when that one has been silent for `patience` seconds and some, whatever this one is busy with.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False,
            timeout=timedelta(seconds=_PATIENCE),
        )  # fmt: skip
        self.patience = math.inf
        self.watching = False
        self._heard = ("", time.monotonic())
        self._beat(0)
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()
        # A thread that is still inside the store when Python goes down takes the process with it (SIGABRT).
        atexit.register(self._end)

    def hurry(self) -> None:
        """Silence counts sooner: the run is asked to end, perhaps because a process was lost."""
        self.patience = 0.0

    def _end(self) -> None:
        self._ended = True
        self._thread.join(_PATIENCE)
        with suppress(RuntimeError):
            self._store.set(f"prefero/pulse/{self.rank}", f"{os.getpid()} {_ENDED}")

    def _run(self) -> None:
        number, failures = 1, 0
        while failures < _FAILURES and not self._ended:
            try:
                self._beat(number)
                number, failures = number + 1, 0
                if self.watching:
                    self._listen()
            except RuntimeError:  # slow for a moment, or gone with the end of the run
                failures += 1
            time.sleep(_PAUSE)
            next_phase(_BEAT)

    def _beat(self, number: int) -> None:
        self._store.set(f"prefero/pulse/{self.rank}", f"{os.getpid()}.{number} {last_phase()}")

    def _listen(self) -> None:
        rank, now = (self.rank + 1) % self.world_size, time.monotonic()
        beat, phase = self._read(rank)
        before, since = self._heard
        if beat != before or phase == _ENDED:
            self._heard = beat, now
        elif now - since > self.patience + _PATIENCE:  # who waits for it has noticed first, and can say more
            told = f"rank {rank} does not answer any more, last seen in phase {phase!r}"
            words = f"prefero: error: rank {self.rank} was in phase {last_phase()!r}: {told}; the run can be resumed"
            print(words, file=sys.stderr, flush=True)
            os._exit(BROKEN)

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
            lost = [f"rank {rank} has ended" if first[rank][1] == _ENDED
                    else f"rank {rank} does not answer any more, last seen in phase {first[rank][1]!r}"
                    for rank in sorted(silent)]  # fmt: skip
            alive = [f"rank {rank} is alive, in phase {self._read(rank)[1]!r}" for rank in others if rank not in silent]
            return "; ".join([*lost, *alive])
        except RuntimeError:
            return "the process that holds the run together (torchrun, or rank 0) has ended"


@contextmanager
def explained(pulse: Pulse | None) -> Iterator[None]:
    """Inside, an error of talking to other processes becomes a BrokenRunError that says which of them and where.

    A process that waits for no other is ended, saying as much, when the next one is lost.
    """
    before = pulse is not None and pulse.watching
    if pulse is not None:
        pulse.watching = True
    try:
        yield
    except BrokenRunError:
        raise
    except RuntimeError as error:
        if pulse is None or not (isinstance(error, dist.DistError) or any(word in str(error) for word in _TALK)):
            raise
        pulse.patience = math.inf  # it is known now, and the words below take a while
        reason = str(error).strip().split("\n")[0]
        raise BrokenRunError(
            f"rank {pulse.rank} waited for other processes in phase {last_phase()!r} and gave up: {pulse.survey()} "
            f"({reason[:200]})"
        ) from error
    finally:
        if pulse is not None:
            pulse.watching = before
