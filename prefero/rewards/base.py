"""The seam behind which rollouts are scored, and the check every answer goes through."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from prefero.types import Prompt, Rollout, Score

_LARGEST = float(torch.finfo(torch.float32).max)  # rewards become float32 tensors: beyond it they would be infinite


@runtime_checkable
class Reward(Protocol):
    """Scores rollouts; called once with the rollouts of whole groups (all samples of a prompt side by side)."""

    def __call__(self, rollouts: Sequence[Rollout]) -> Sequence[Score]:
        """One score a rollout, in the order given."""
        ...


@runtime_checkable
class Checks(Protocol):
    """A reward that can tell from prompts alone whether it will be able to score answers to them."""

    def check(self, *prompts: Prompt) -> None:
        """Raises ValueError naming the first prompt whose row will not do, what it lacks, and the cure."""
        ...


def column_of(prompt: Prompt, column: str, reward: str) -> Any:
    """What a reward needs of the prompt's row. Raises ValueError naming both when the row has no such column."""
    if prompt.columns.get(column) is None:
        raise ValueError(
            f"reward {reward!r} needs the column {column!r}, which prompt {prompt.id!r} does not have (it has "
            f"{sorted(prompt.columns)}): name the column in the data, or give its name as the option `column`"
        )
    return prompt.columns[column]


def reward_name(reward: object) -> str:
    """What a reward is called in errors and metrics: its `name`, else its function's or class's name."""
    for candidate in (getattr(reward, "name", None), getattr(reward, "__name__", None)):
        if isinstance(candidate, str) and candidate:
            return candidate
    return type(reward).__name__


def as_number(value: Any, reward: str, rollout: Rollout) -> float:
    """A score as a finite float: bools, integers, floats, NumPy numbers and one-element tensors are numbers.

    Raises ValueError naming the reward, the prompt, the value and the cure for anything else: None, text, NaN,
    infinities, numbers beyond float32.
    """
    number = value
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)) and math.prod(value.shape) == 1:
        number = value.item()
    if isinstance(number, (int, float)) and abs(number) <= _LARGEST:  # false for NaN as well
        return float(number)
    cure = {
        "NoneType": "return a number on every path of the function (a path without `return` gives None)",
        "str": "return a number, not text",
    }.get(type(value).__name__, "return one finite number per completion")
    raise ValueError(
        f"reward {reward!r} gave {value!r} ({type(value).__name__}) for prompt {rollout.prompt.id!r} "
        f"({rollout.prompt.text[:200]!r}) and completion {rollout.completion.text[:200]!r}: {cure}"
    )


def goes_in_step(reward: Reward) -> bool:
    """Whether all processes must call a reward for equally many rollouts: a model in it is shared out over them."""
    return bool(getattr(reward, "in_step", False))


def checked_scores(reward: Reward, rollouts: Sequence[Rollout], name: str | None = None) -> list[Score]:
    """Calls a reward once and returns its scores, or stops at the first answer that is not a finite number.

    Raises ValueError naming the reward, the prompt (id and text), the value and the cure: not a sequence, wrong
    length, an entry that is no Score, and scores or parts that are None, no number, NaN or infinite.
    """
    name = name or reward_name(reward)
    scores: Any = reward(rollouts)
    if not isinstance(scores, Sequence) or isinstance(scores, str):
        raise ValueError(
            f"reward {name!r} gave a {type(scores).__name__} ({scores!r:.200}) for {len(rollouts)} rollouts, the first "
            f"of prompt {rollouts[0].prompt.id!r} ({rollouts[0].prompt.text[:200]!r}): return a list with one Score "
            "per rollout"
        )
    if len(scores) != len(rollouts):
        odd = rollouts[min(len(scores), len(rollouts) - 1)]
        raise ValueError(
            f"reward {name!r} gave {len(scores)} scores for {len(rollouts)} rollouts, out of step from prompt "
            f"{odd.prompt.id!r} ({odd.prompt.text[:200]!r}) on: return exactly one Score per rollout, in order"
        )
    return [_checked(score, name, rollout) for score, rollout in zip(scores, rollouts, strict=True)]


def _checked(score: Any, name: str, rollout: Rollout) -> Score:
    if not isinstance(score, Score):
        raise ValueError(
            f"reward {name!r} gave {score!r:.200} ({type(score).__name__}) for prompt {rollout.prompt.id!r} "
            f"({rollout.prompt.text[:200]!r}): return Score objects, or wrap a plain function in FunctionReward"
        )
    parts = {part: as_number(value, f"{name}/{part}", rollout) for part, value in score.parts.items()}
    count = len(rollout.completion.token_ids)
    for index, _ in score.steps:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
            raise ValueError(
                f"reward {name!r} gave a step at token {index!r} for prompt {rollout.prompt.id!r} "
                f"({rollout.prompt.text[:200]!r}), whose completion has {count} tokens: give an index from 0 to "
                f"{count - 1}"
            )
    steps = tuple((index, as_number(value, f"{name} step", rollout)) for index, value in score.steps)
    return Score(as_number(score.value, name, rollout), parts, steps)
