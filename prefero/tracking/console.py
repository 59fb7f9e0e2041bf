"""What a person sees while a run goes on: a live display on a terminal, plain lines everywhere else."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from prefero.tracking.base import as_number, pair_scores
from prefero.tracking.names import duration, headline, kind, leaf, section, short
from prefero.tracking.text import for_terminal

# The names worth a line while a run goes on; everything else is in metrics.jsonl and the report.
_LEAVES = frozenset({"loss", "accuracy", "eval_loss", "eval_accuracy", "on_topic"})
_INNER = frozenset({"policy", "value"})  # PPO's two losses hover around numbers that say nothing
_NARROW = 76  # below this, four columns of text are unreadable


def is_interactive(stream: TextIO) -> bool:
    """Whether the stream is a terminal that understands cursor movement and UTF-8."""
    encoding = (getattr(stream, "encoding", None) or "").lower().replace("-", "")
    return stream.isatty() and os.environ.get("TERM") != "dumb" and encoding == "utf8"


def print_plain(line: str, stream: TextIO) -> None:
    """Prints one line in whatever encoding the stream has; what it lacks is written as a backslash escape."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    stream.flush()


@dataclass
class _Running:
    """The stage that runs now; times in seconds of the tracker's clock.

    shown, shown_step: when the last line was printed, and the step it was about.
    """

    stage: str
    total: int | None
    started: float
    latest: dict[str, float] = field(default_factory=dict)
    step: int | None = None
    first_step: int = 0
    first_time: float = 0.0
    shown: float | None = None
    shown_step: int | None = None


class ConsoleTracker:
    """Shows stage, step, the headline metrics and the time left.

    stream: where to (standard output unless given). headlines: names of the metrics to show; the most telling ones
    unless given. every: seconds between two plain lines. clock: seconds, monotonic.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        headlines: Sequence[str] = (),
        every: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._headlines = tuple(headlines)
        self._every = every
        self._clock = clock
        self._display = _LiveDisplay(self._stream) if is_interactive(self._stream) else None
        self._now = _Running("", None, clock())

    def start(self, stage: str, total: int | None = None) -> None:
        """Ends the stage before with one lasting line, and begins the next."""
        self._finish()
        self._now = _Running(for_terminal(stage, 24), total, self._clock())
        if self._display:
            self._display.begin(self._now.stage, total)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Shows the newest numbers; metrics that are not part of this step keep their last value."""
        now, time_now = self._now, self._clock()
        now.latest |= {name: as_number(name, value) for name, value in metrics.items()}
        if now.step is None:
            now.first_step, now.first_time = step, time_now
        now.step = step
        if self._display:
            self._display.update(step, self._numbers())
        elif now.shown_step == step:
            pass  # further numbers of a step that has its line go into the next one
        elif now.shown is None or time_now - now.shown >= self._every:
            now.shown, now.shown_step = time_now, step
            of = f"/{now.total} ({100 * step / now.total:.0f}%)" if now.total else ""
            print_plain(f"{now.stage or 'run'}: step {step}{of}  {self._numbers()}{self._left()}", self._stream)

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Shows the first row's prompt and completion in one line."""
        if not rows or "completion" not in rows[0]:
            return
        prompt, completion = (for_terminal(str(rows[0].get(key, "")), 400) for key in ("prompt", "completion"))
        if self._display:
            self._display.sample(prompt, completion)
        else:
            print_plain(f"  sample: {prompt} → {completion}", self._stream)

    def close(self) -> None:
        """Ends the last stage and gives the terminal back."""
        self._finish()
        self._now = _Running("", None, self._clock())
        if self._display:
            self._display.close()

    def _numbers(self) -> str:
        latest = self._now.latest
        telling = [name for name in latest if kind(name) or (leaf(name) in _LEAVES and section(name) not in _INNER)]
        names = [name for name in self._headlines if name in latest] or headline(telling or latest)
        leaves = [leaf(name) for name in names]
        labels = [name if leaves.count(last) > 1 else last for name, last in zip(names, leaves, strict=True)]
        pairs = zip(labels, names, strict=True)
        return "  ".join(f"{for_terminal(label, 40)} {_shown(name, latest[name])}" for label, name in pairs)

    def _left(self) -> str:
        now = self._now
        if not now.total or now.step is None or now.step <= now.first_step:
            return ""
        pace = (self._clock() - now.first_time) / (now.step - now.first_step)
        return f"  {duration(pace * max(now.total - now.step, 0))} left"

    def _finish(self) -> None:
        now = self._now
        if now.step is None:
            if self._display:
                self._display.drop()
            return
        seconds = duration(self._clock() - now.started)
        line = f"{now.stage or 'run'} done: step {now.step}  {self._numbers()}  in {seconds}"
        if self._display:
            self._display.end(line)
        else:
            print_plain(line, self._stream)


def _shown(name: str, value: float) -> str:
    """A number for the line: the curves' rounding errors (a KL of -2e-07) are zero to a reader."""
    return short(round(value, 4) + 0.0) if kind(name) else short(value)


class _LiveDisplay:
    """The moving part of the screen: a bar for the running stage, its numbers, and the newest sample."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False, style="bold"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left", markup=False, style="dim"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task: TaskID | None = None
        self._numbers, self._sample = Text(), Text()
        self._live = Live(console=self._console, refresh_per_second=4, transient=True)

    def begin(self, stage: str, total: int | None) -> None:
        self._task = self._progress.add_task(stage or "run", total=total)
        self._draw()
        self._live.start()

    def update(self, step: int, numbers: str) -> None:
        if self._task is None:
            self.begin("run", None)
        assert self._task is not None
        self._progress.update(self._task, completed=step)
        self._numbers = Text("  " + numbers)
        self._draw()

    def sample(self, prompt: str, completion: str) -> None:
        line = Text("  ", no_wrap=True, overflow="ellipsis").append(prompt, style="dim").append(" → ", style="dim")
        self._sample = line.append(completion)
        self._draw()

    def drop(self) -> None:
        """Takes the bar away: its stage ended, or never took a step."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task, self._numbers, self._sample = None, Text(), Text()

    def end(self, line: str) -> None:
        self.drop()
        self._draw(refresh=True)  # or the line below would be followed by what was drawn last
        self._console.print(Text("✓ ", style="green").append(line, style="default"))

    def close(self) -> None:
        self._live.stop()

    def _draw(self, refresh: bool = False) -> None:
        parts: list[RenderableType] = [self._progress, *(text for text in (self._numbers, self._sample) if text)]
        self._live.update(Group(*parts) if self._task is not None else Text(), refresh=refresh)


def sample_table(
    rows: Sequence[Mapping[str, Any]],
    *,
    stream: TextIO | None = None,
    width: int | None = None,
    limit: int = 8,
) -> None:
    """Prints the same prompts answered before and after: a table on a wide terminal, plain blocks otherwise.

    rows: with prompt, before, after and, if known, gold_before and gold_after (or reward_...). limit: rows shown.
    """
    stream = sys.stdout if stream is None else stream
    if is_interactive(stream):
        console = Console(file=stream, width=width, highlight=False)
        if console.width >= _NARROW:
            console.print(_table(rows[:limit], console.width))
            return
    for row in rows[:limit]:
        print_plain(for_terminal(str(row["prompt"]), 300), stream)
        kind, *scores = pair_scores(row)
        for side, score in zip(("before", "after"), scores, strict=True):
            shown = "" if score is None else f"[{kind} {short(score)}] "
            print_plain(f"  {side + ':':8}{shown}{for_terminal(str(row[side]), 300)}", stream)


def _table(rows: Sequence[Mapping[str, Any]], width: int) -> Table:
    table = Table(title="The same held-out prompts, before and after", show_lines=True, width=min(width, 160))
    for heading in ("prompt", "before", "after"):
        table.add_column(heading, ratio=1, overflow="fold")
    kind = next(filter(None, (pair_scores(row)[0] for row in rows)), "")
    if kind:
        table.add_column(kind, justify="right", no_wrap=True)
    for row in rows:
        # Text objects, never strings: a string would have its [brackets] read as markup.
        cells = [Text(for_terminal(str(row[key]), 300)) for key in ("prompt", "before", "after")]
        if kind:
            cells.append(Text(" → ".join("–" if score is None else short(score) for score in pair_scores(row)[1:])))
        table.add_row(*cells)
    return table
