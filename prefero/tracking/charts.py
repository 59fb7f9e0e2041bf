"""Curves as geometry: every number of an SVG worked out here, every text left to the template's escaping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from prefero.tracking.history import Series, noise, smooth
from prefero.tracking.names import short

LARGE, SMALL = (460, 230), (340, 200)
LEFT, RIGHT, TOP, BOTTOM = 52, 58, 14, 38
MAX_POINTS = 2000
_SMOOTH_FROM = 25  # fewer points are shown as they are
_MAX_HOVER = 40
_MAX_SERIES = 8


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: where, in SVG units, and what it says."""

    at: float
    label: str


@dataclass(frozen=True)
class Dot:
    """A point of a curve and the words shown when the pointer rests on it."""

    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Line:
    """One curve: path data (raw is empty when nothing was smoothed), dots, where it ends and at which value."""

    label: str
    path: str
    raw: str
    dots: tuple[Dot, ...]
    gaps: tuple[float, ...]
    end: Dot
    end_label_y: float
    end_value: str
    slot: int


@dataclass(frozen=True)
class Chart:
    """One picture: its axes, its lines, and notes on what was left out."""

    name: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    zero: float | None
    notes: tuple[str, ...]
    width: int
    height: int
    left: int = LEFT

    @property
    def right(self) -> int:
        return self.width - RIGHT

    @property
    def bottom(self) -> int:
        return self.height - BOTTOM


class _Scale:
    """Maps numbers of [low, high] to [start, stop] of the picture."""

    def __init__(self, low: float, high: float, start: float, stop: float) -> None:
        self.low, self.high, self._start, self._factor = low, high, start, (stop - start) / (high - low)

    def __call__(self, value: float) -> float:
        return round(self._start + (value - self.low) * self._factor, 1)


def draw(name: str, series: Sequence[Series], slots: dict[str, int], size: tuple[int, int] = LARGE) -> Chart | None:
    """A chart of one metric, a line a stage; None when no value is finite. slots: the colour number of each stage.

    size: width and height in SVG units.
    """
    drawn = [one for one in series if one.points()][:_MAX_SERIES]
    if not drawn:
        return None
    notes = []
    values = [value for one in drawn for _, value in one.points()]
    steps = [step for one in drawn for step in one.steps]
    x_low, x_high = _span(min(steps), max(steps), 0.0)
    y_low, y_high = _span(min(values), max(values), 0.06)
    width, height = size
    across, up = _Scale(x_low, x_high, LEFT, width - RIGHT), _Scale(y_low, y_high, height - BOTTOM, TOP)
    lines = []
    for one in drawn:
        count = len(one.points())
        if count > MAX_POINTS:
            notes.append(f"{one.stage or 'run'}: {count:,} points, drawn with at most {MAX_POINTS:,}")
        lines.append(_line(one, across, up, slots.get(one.stage, 0)))
    if len(series) > len(drawn):
        notes.append(f"{len(series) - len(drawn)} stages without a finite value, or beyond {_MAX_SERIES}, not drawn")
    return Chart(
        name,
        _spread(lines),
        tuple(Tick(across(at), label) for at, label in nice_ticks(x_low, x_high, 5, whole=True)),
        tuple(Tick(up(at), label) for at, label in nice_ticks(y_low, y_high, 4)),
        up(0.0) if y_low < 0 < y_high else None,
        tuple(notes),
        width,
        height,
    )


def _line(series: Series, across: _Scale, up: _Scale, slot: int) -> Line:
    points = series.points()
    values = [value for _, value in points]
    smoothed = values
    # A schedule is already smooth, and averaging would move its ends.
    if len(values) >= _SMOOTH_FROM and noise(values) > 0.005 * (max(values) - min(values)):
        smoothed = smooth(values, max(3, min(len(values) // 20, 101) | 1))
    curve = [(step, value) for (step, _), value in zip(points, smoothed, strict=True)]
    last_step, last_value = curve[-1]
    every = max(1, math.ceil(len(points) / _MAX_HOVER))
    hover = points[::-every][::-1]
    gaps = [across(step) for step, value in zip(series.steps, series.values, strict=True) if value is None]
    return Line(
        label=series.stage or "run",
        path=_path(thin(curve), across, up),
        raw=_path(thin(points), across, up) if smoothed is not values else "",
        dots=tuple(Dot(across(step), up(value), f"step {short(step)}: {short(value)}") for step, value in hover),
        gaps=tuple(sorted(set(gaps)))[:_MAX_HOVER],
        end=Dot(across(last_step), up(last_value), ""),
        end_label_y=up(last_value),
        end_value=short(float(f"{last_value:.3g}")),
        slot=slot % 6,
    )


def _spread(lines: list[Line]) -> tuple[Line, ...]:
    """Moves the labels at the right edge apart where lines end at nearly the same height and place."""
    placed: list[Line] = []
    for line in sorted(lines, key=lambda line: line.end_label_y):
        low = line.end_label_y
        for other in placed:
            if abs(other.end.x - line.end.x) < RIGHT and low < other.end_label_y + 11:
                low = other.end_label_y + 11
        placed.append(Line(**{**line.__dict__, "end_label_y": round(low, 1)}))
    order = {line.label: index for index, line in enumerate(lines)}
    return tuple(sorted(placed, key=lambda line: order[line.label]))


def thin(points: list[tuple[float, float]], limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `limit` points: of each bucket the lowest and the highest stay, in order, so that no spike is lost."""
    if len(points) <= limit:
        return points
    buckets = limit // 2
    kept = []
    for start, stop in pairwise(round(index * len(points) / buckets) for index in range(buckets + 1)):
        bucket = range(start, stop)
        ends = {min(bucket, key=lambda i: points[i][1]), max(bucket, key=lambda i: points[i][1])}
        kept += [points[index] for index in sorted(ends)]
    return kept


def _path(points: Sequence[tuple[float, float]], across: _Scale, up: _Scale) -> str:
    return "M" + "L".join(f"{across(step):g},{up(value):g}" for step, value in points)


def _span(low: float, high: float, margin: float) -> tuple[float, float]:
    """The ends of an axis: some air at both, and never an empty span."""
    if high - low <= 1e-9 * max(abs(low), abs(high)) or high - low < 1e-300:
        air = 0.1 * abs(high) if abs(high) > 1e-290 else 1.0
        return low - air, high + air
    air = margin * (high - low)
    return low - air, high + air


def nice_ticks(low: float, high: float, count: int, whole: bool = False) -> list[tuple[float, str]]:
    """Round numbers between low and high, about `count` of them, with labels of one and the same precision."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0, 20.0) if factor * power >= rough * 0.999)
    if whole:
        step = max(1.0, math.ceil(step))
    first = math.ceil(low / step - 1e-9)
    marks = [(first + index) * step for index in range(count + 3)]
    return [(at, _tick_label(at, step)) for at in marks if low - 1e-9 * step <= at <= high + 1e-9 * step]


def _tick_label(at: float, step: float) -> str:
    if abs(at) < step / 1e6:
        return "0"
    if max(abs(at), step) >= 1e6 or step < 1e-4:
        digits = max(1, math.ceil(math.log10(max(abs(at), step) / step)) + 1)
        return f"{at:.{digits + 1}g}"
    decimals = max(0, math.ceil(-math.log10(step) - 1e-9))
    if round(step * 10**decimals, 6) % 1:
        decimals += 1  # steps of 2.5, 0.25, ...
    return f"{at:.{decimals}f}"
