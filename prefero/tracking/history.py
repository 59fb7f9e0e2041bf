"""metrics.jsonl read back as curves: per metric and stage, the steps and the values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from prefero.tracking.base import RESERVED
from prefero.tracking.names import by_importance, kind

MAX_METRICS = 300
_HUGE = 1e300  # beyond it, the span of an axis or a sum of values would overflow


@dataclass
class Series:
    """One metric in one stage. steps rise; values hold None where the number was NaN or infinite."""

    name: str
    stage: str
    steps: list[float] = field(default_factory=list)
    values: list[float | None] = field(default_factory=list)

    def add(self, step: float, value: float | None) -> None:
        """Appends a point; a step logged again replaces it and what came after it, as when a run was resumed."""
        while self.steps and self.steps[-1] >= step:
            self.steps.pop()
            self.values.pop()
        self.steps.append(step)
        self.values.append(value)

    def points(self) -> list[tuple[float, float]]:
        """The finite points."""
        return [(step, value) for step, value in zip(self.steps, self.values, strict=True) if value is not None]


@dataclass
class Stage:
    """One stage of the run: how many rows it logged and its last step."""

    name: str
    num_rows: int = 0
    last_step: float = 0


@dataclass
class History:
    """Everything metrics.jsonl says. num_damaged: unreadable lines. num_dropped: metric names beyond the cap."""

    series: dict[str, dict[str, Series]] = field(default_factory=dict)
    stages: dict[str, Stage] = field(default_factory=dict)
    num_damaged: int = 0
    dropped: set[str] = field(default_factory=set)

    def of_kind(self, wanted: str, stage: str) -> list[Series]:
        """The curves of one kind (see names.KINDS) in a stage, the most telling first."""
        names = by_importance(name for name in self.series if kind(name) == wanted)
        return [self.series[name][stage] for name in names if stage in self.series[name]]


def read_history(rows: Iterable[Mapping[str, Any] | None]) -> History:
    """Curves from rows of metrics.jsonl; what is no number is passed over, rows without a step count as damaged."""
    history = History()
    for row in rows:
        step = None if row is None else finite_number(row.get("step"))
        if row is None or step is None:
            history.num_damaged += 1
            continue
        stage = str(row.get("stage") or "")
        info = history.stages.setdefault(stage, Stage(stage))
        info.num_rows, info.last_step = info.num_rows + 1, step
        lost = row.get("nonfinite")
        nonfinite = {name for name in lost if isinstance(name, str)} if isinstance(lost, list) else set()
        for name, value in row.items():
            if name in RESERVED:
                continue
            number = finite_number(value)
            if number is None and name not in nonfinite and not isinstance(value, float):
                continue
            if name not in history.series and len(history.series) >= MAX_METRICS:
                if len(history.dropped) < MAX_METRICS:
                    history.dropped.add(name)
                continue
            history.series.setdefault(name, {}).setdefault(stage, Series(name, stage)).add(step, number)
    return history


def finite_number(value: Any) -> float | None:
    """The value as a float if it is a number of a size that can be drawn; None otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer beyond 1e308
        return None
    return number if abs(number) <= _HUGE else None  # also false for NaN


def smooth(values: list[float], window: int) -> list[float]:
    """The centred moving average; near the ends, over the part of the window that exists."""
    half = window // 2
    # fsum and not running sums: one spike of 1e20 would wipe out every value after it.
    parts = (values[max(0, index - half) : index + half + 1] for index in range(len(values)))
    return [math.fsum(part) / len(part) for part in parts]


def noise(values: list[float]) -> float:
    """The standard deviation of what jumps from point to point, trends left out (0 for fewer than three values).

    Second differences of a smooth curve are near zero, and under white noise their variance is 6 sigma². The median
    keeps single spikes out.
    """
    bends = [abs(a - 2 * b + c) for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    return median(bends) / 0.6745 / math.sqrt(6) if bends else 0.0
