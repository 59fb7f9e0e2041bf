"""The tracker that is always on: one JSON object a line, the same bytes for the same numbers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from prefero.tracking.base import RESERVED, as_number
from prefero.tracking.files import MAX_LINE_BYTES, finite, json_bytes, parse_row, read_rows, to_plain

# What a clock says differs from run to run; kept out of metrics.jsonl, so that two runs with one seed give one file.
CLOCK_SECTION = "time/"


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; damaged lines, such as a last one cut off by a crash, are left out."""
    return [row for row in read_rows(Path(path)) if row is not None]


def open_for_append(path: Path) -> BinaryIO:
    """Opens a JSON-lines file to go on after its last whole row: what a crash left half-written is cut away.

    Refuses to follow a symbolic link (OSError), so that nobody can make a run write elsewhere.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    file = os.fdopen(os.open(path, flags, 0o600), "r+b")
    end = file.seek(0, os.SEEK_END)
    start = _start_of_last_line(file, end)
    file.seek(start)
    if start < end and end - start <= MAX_LINE_BYTES and parse_row(file.read()) is not None:
        file.write(b"\n")  # whole but for its line break
    else:
        file.truncate(start)
        file.seek(start)
    return file


def _start_of_last_line(file: BinaryIO, end: int) -> int:
    """The offset just after the last line break (0 if there is none), found from the back."""
    while end > 0:
        start = max(0, end - 65536)
        file.seek(start)
        if (found := file.read(end - start).rfind(b"\n")) >= 0:
            return start + found + 1
        end = start
    return 0


class JsonlTracker:
    """Appends metrics and samples to a run's metrics.jsonl and samples.jsonl, flushed line by line.

    A metrics row is {"stage", "step", <metric>: number, ...}; NaN and infinity become null and their names are listed
    under "nonfinite". Metrics of the section `time/` are not written (they would differ between equal runs).
    """

    def __init__(self, metrics_file: str | Path, samples_file: str | Path | None = None, *, stage: str = "") -> None:
        self._metrics = open_for_append(Path(metrics_file))
        self._samples = None if samples_file is None else open_for_append(Path(samples_file))
        self._stage = stage

    def start(self, stage: str, total: int | None = None) -> None:
        """Rows from here on carry this stage; the number of steps is not written."""
        self._stage = stage

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Appends one row; does nothing when there is no metric to write. Raises ValueError for a non-number."""
        numbers = {
            name: as_number(name, value) for name, value in metrics.items() if not name.startswith(CLOCK_SECTION)
        }
        if not numbers:
            return
        clean, lost = finite(numbers)
        row = {"stage": self._stage, "step": int(step), **clean}
        self._append(self._metrics, row | ({"nonfinite": lost} if lost else {}))

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Appends one line a sample: {"stage", "step", **row}."""
        if self._samples is None:
            return
        for index, row in enumerate(rows):
            if taken := RESERVED.intersection(row):
                raise ValueError(
                    f"sample {index} has the column {min(taken)!r}, which the log itself writes; rename it"
                )
            clean, lost = finite(to_plain(row, f"sample {index}"))
            self._append(
                self._samples,
                {"stage": self._stage, "step": int(step), **clean, **({"nonfinite": lost} if lost else {})},
            )

    def sizes(self) -> list[int]:
        """How many bytes both files hold, all of them on the disk."""
        for file in (self._metrics, self._samples):
            if file is not None:
                os.fsync(file.fileno())
        return [0 if file is None else file.tell() for file in (self._metrics, self._samples)]

    def cut(self, sizes: Sequence[int]) -> None:
        """Goes on from where the files had these sizes: what was written since is written again.

        Raises ValueError for a file that is shorter.
        """
        for file, size in zip((self._metrics, self._samples), sizes, strict=True):
            if file is not None:
                if file.seek(0, os.SEEK_END) < size:
                    raise ValueError(f"{file.name} has lost rows since the checkpoint: bring it back from a backup")
                file.truncate(size)
                file.seek(size)

    def close(self) -> None:
        """Flushes to the disk and closes both files; may be called twice."""
        for file in (self._metrics, self._samples):
            if file is not None and not file.closed:
                file.flush()
                os.fsync(file.fileno())
                file.close()

    @staticmethod
    def _append(file: BinaryIO, row: dict[str, Any]) -> None:
        line = json_bytes(row) + b"\n"
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(
                f"one row for {file.name} takes {len(line)} bytes, more than {MAX_LINE_BYTES}; log less text"
            )
        file.write(line)
        file.flush()
