"""Several rewards as one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from prefero.rewards.base import Reward, checked_scores, goes_in_step
from prefero.types import Rollout, Score


class WeightedSum:
    """The weighted sum of named rewards; every part is reported by its name, before its weight.

    parts: name -> (reward, weight). The parts of a part are reported as "name/part". Each reward is called once with
    all rollouts. Raises ValueError for no parts, an empty name, a weight that is no finite number, and, naming the
    part, any bad answer.
    """

    def __init__(self, parts: Mapping[str, tuple[Reward, float]], name: str = "weighted_sum") -> None:
        if not parts:
            raise ValueError("weighted sum has no parts: name at least one reward with its weight")
        for part, (_, weight) in parts.items():
            if not part or "/" in part:
                raise ValueError(f"weighted sum part is named {part!r}: give it a name without '/'")
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
                raise ValueError(f"weighted sum part {part!r} has weight {weight!r}: give a finite number")
        self.parts = dict(parts)
        self.name = name
        self.in_step = any(goes_in_step(reward) for reward, _ in parts.values())

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """One score a rollout."""
        totals = [0.0] * len(rollouts)
        steps: list[dict[int, float]] = [{} for _ in rollouts]
        reported: list[dict[str, float]] = [{} for _ in rollouts]
        for part, (reward, weight) in self.parts.items():
            for i, score in enumerate(checked_scores(reward, rollouts, part)):
                totals[i] += weight * score.value
                for index, value in score.steps:
                    steps[i][index] = steps[i].get(index, 0.0) + weight * value
                reported[i][part] = score.value
                reported[i] |= {f"{part}/{inner}": value for inner, value in score.parts.items()}
        return [
            Score(total, parts, tuple(sorted(earned.items())))
            for total, parts, earned in zip(totals, reported, steps, strict=True)
        ]
