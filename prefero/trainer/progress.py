"""A progress bar on a terminal, nothing elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """A bar of `total` steps with the latest metrics beside it; shown only when enabled and on a terminal."""

    def __init__(self, name: str, total: int | None, enabled: bool) -> None:
        console = Console(stderr=True)
        self._bar = RichProgress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"), console=console, disable=not (enabled and console.is_terminal),
        )  # fmt: skip
        self._task = self._bar.add_task(name, total=total, note="")

    def advance(self) -> None:
        """One step is done."""
        self._bar.advance(self._task)

    def note(self, metrics: Mapping[str, float]) -> None:
        """Shows these numbers beside the bar."""
        text = "  ".join(f"{name} {metrics[name]:.4g}" for name in metrics if "/" not in name or "loss" in name)
        self._bar.update(self._task, note=text)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
