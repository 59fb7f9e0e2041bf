"""When a run is saved: every so many steps or minutes, and at once when it is asked to stop."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

from prefero.config import CheckpointConfig
from prefero.recipes.origin import check_origin
from prefero.strategies.base import Strategy
from prefero.strategies.checkpoint import Checkpoint, Checkpoints
from prefero.tracking.jsonl import JsonlTracker
from prefero.trainer.callbacks import Callback
from prefero.trainer.state import Saved, Snapshot, keep_strategy, restore_strategy
from prefero.types import Experience

STOPPED = 75
"""The exit status of a run that was asked to stop, has saved itself and can be resumed (EX_TEMPFAIL)."""


class StoppedError(Exception):
    """The run was asked to stop, and has saved itself."""


class Keeps(Protocol):
    """Whatever has something to remember."""

    def keep(self, snapshot: Snapshot) -> None: ...

    def restore(self, saved: Saved) -> None: ...


_ECHO = 2.0
"""Seconds in which further signals are the same wish: a scheduler and torchrun each pass it on."""


class Stop:
    """Whether SIGTERM or SIGINT (Ctrl-C) has asked this process to end; a later second one ends it at once.

    told: called when it is asked.
    """

    def __init__(self, told: Callable[[], None] = lambda: None) -> None:
        self.asked = False
        self._told = told
        self._since = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals are heard inside."""
        before = {number: signal.signal(number, self._hear) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            if time.monotonic() - self._since < _ECHO:
                return
            raise KeyboardInterrupt
        self.asked, self._since = True, time.monotonic()
        self._told()
        print(
            f"stopping after this step, and saving; once more, in {_ECHO:.0f} seconds or later, to stop at once",
            file=sys.stderr,
        )


class Keeper:
    """The checkpoints of one stage, and what goes into each of them.

    logs: the files that its numbers go to; a checkpoint remembers how long they were, so that going on from it neither
    loses nor doubles a row. origin: what the run is made of (`recipes.origin`), which checkpoints name.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        strategy: Strategy,
        logs: Sequence[JsonlTracker],
        settings: CheckpointConfig,
        stop: Stop,
        say: Callable[[str], None],
        origin: Mapping[str, Any],
    ) -> None:
        self.origin = origin
        self.checkpoints = checkpoints
        self.strategy = strategy
        self.logs = list(logs)
        self.settings = settings
        self.stop = stop
        self.say = say
        self.parts: Sequence[Keeps] = ()
        self.saved: Checkpoint | None = None
        self._last = time.monotonic()

    def begin(self) -> None:
        """Remembers where a stage began: its logs and its random numbers."""
        self._save(0, ())
        self.checkpoints.wait()

    def find(self) -> bool:
        """Looks for what there is to go on from, and cuts the logs back to it; False where the stage never began.

        Raises ConfigError when the config or a file is not what it was; see `check_origin`.
        """
        self.saved = self.checkpoints.latest(self.say)
        if self.saved is None:
            return False
        check_origin(self.saved.state["origin"], self.origin, self.saved.folder, self.say)
        if self.strategy.is_rank_0:
            for log, sizes in zip(self.logs, self.saved.state["logs"], strict=True):
                log.cut(sizes)
        if not self.saved.step:
            restore_strategy(Saved(self.saved), self.strategy)
        self.say(f"going on from step {self.saved.step}" if self.saved.step else "beginning the stage again")
        return True

    def watch(self, *parts: Keeps) -> None:
        """What checkpoints hold from here on; restored at once where there is something to go on from."""
        self.parts = parts
        if self.saved is not None and self.saved.step:
            saved = Saved(self.saved)
            for part in parts:
                part.restore(saved)

    def after(self, step: int, iteration: int | None) -> None:
        """To be called by all processes after every optimizer step and every iteration: `step` counts the calls.

        iteration: the one that has just ended, None within one. Raises StoppedError when the run was asked to stop,
        after saving.
        """
        every, minutes = self.settings.every, self.settings.minutes
        late = minutes and time.monotonic() - self._last > 60 * minutes
        due = iteration is not None and bool((every and iteration % every == 0) or late)
        asked = self.strategy.group.wish(self.stop.asked)
        if asked or self.strategy.group.agreed(int(due)):
            self._save(step, self.parts)
        if asked:
            self.checkpoints.wait()
            raise StoppedError

    def _save(self, step: int, parts: Sequence[Keeps]) -> None:
        snapshot = Snapshot()
        keep_strategy(snapshot, self.strategy)
        for part in parts:
            part.keep(snapshot)
        logs = [log.sizes() for log in self.logs]
        state: dict[str, Any] = {**snapshot.values, "logs": logs, "origin": self.origin}
        self.checkpoints.save(step, snapshot.tensors, state)
        self._last = time.monotonic()


class Saver(Callback):
    """Has a stage of online training saved, inside a learn phase too; must be the last of the trainer's callbacks."""

    def __init__(self, keeper: Keeper) -> None:
        self.keeper = keeper
        self.events = 0

    def on_learn_batch_end(self, metrics: Mapping[str, float], experience: Experience) -> None:
        self.events += 1
        self.keeper.after(self.events, None)

    def on_episode_end(self, episode: int) -> None:
        self.events += 1
        self.keeper.after(self.events, episode + 1)

    def keep(self, snapshot: Snapshot) -> None:
        """Puts the count of what may be saved after into a snapshot."""
        snapshot.values["events"] = self.events

    def restore(self, saved: Saved) -> None:
        """Goes on from what `keep` kept."""
        self.events = saved.values["events"]
