"""The seam for loggers: anything with `log`, `log_samples` and `close` is a tracker."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

if TYPE_CHECKING:  # types.py brings torch; reading a report must not
    from prefero.types import ScoredRollout

RESERVED = frozenset({"stage", "step", "nonfinite"})


class Tracker(Protocol):
    """Where the numbers of a run go."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Takes the metrics (`section/name` to number) of one step."""

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Takes texts to look at: rows with `prompt` and `completion`, or `prompt`, `before` and `after`."""

    def close(self) -> None:
        """Writes what is pending and lets go of files and the terminal."""


@runtime_checkable
class StageAware(Protocol):
    """A tracker that wants to know which stage of the run (sft, reward, ppo, eval) the next steps belong to."""

    def start(self, stage: str, total: int | None = None) -> None:
        """A stage begins; total: the number of steps it will take, if known."""


class Trackers:
    """Several trackers as one; each gets every call, in order."""

    def __init__(self, trackers: Iterable[Tracker] = ()) -> None:
        self.trackers: list[Tracker] = list(trackers)

    def start(self, stage: str, total: int | None = None) -> None:
        """Tells the stage-aware ones that a stage begins."""
        for tracker in self.trackers:
            if isinstance(tracker, StageAware):
                tracker.start(stage, total)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Hands the metrics of one step to every tracker."""
        for tracker in self.trackers:
            tracker.log(metrics, step)

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Hands sample rows to every tracker."""
        for tracker in self.trackers:
            tracker.log_samples(rows, step)

    def close(self) -> None:
        """Closes every tracker, also when one of them fails to close (its error is raised at the end)."""
        with ExitStack() as stack:
            for tracker in reversed(self.trackers):
                stack.callback(tracker.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def as_number(name: str, value: Any) -> float:
    """A metric as a float; one-element tensors are read. Raises ValueError naming a metric that is no number."""
    if name in RESERVED:
        raise ValueError(
            f"metric name {name!r} is taken by the log itself; name metrics `section/name`, as in 'sft/loss'"
        )
    if not isinstance(value, str | bytes):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            pass
    raise ValueError(f"metric {name!r} is {value!r:.80}, not one number; reduce it to a scalar before logging it")


def sample_rows(rollouts: Iterable[ScoredRollout], columns: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Rows for `log_samples` from scored rollouts; columns: names of prompt columns to keep beside the texts."""
    return [
        {
            "id": rollout.prompt.id,
            "prompt": rollout.prompt.text,
            "completion": rollout.completion.text,
            "reward": rollout.score.value,
            "parts": dict(rollout.score.parts),
            "num_tokens": len(rollout.completion.token_ids),
            "finish_reason": rollout.completion.finish_reason,
            **{name: rollout.prompt.columns[name] for name in columns},
        }
        for rollout in rollouts
    ]


def pair_scores(row: Mapping[str, Any]) -> tuple[str, Any, Any]:
    """What a before/after row was judged by, "gold" or else "reward" ("" for neither), and both scores (or None)."""
    for kind in ("gold", "reward"):
        scores = row.get(f"{kind}_before"), row.get(f"{kind}_after")
        if scores != (None, None):
            return kind, *scores
    return "", None, None
