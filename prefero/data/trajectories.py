"""Texts with rewards as batches to learn values from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, pstdev
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from prefero.data.collate import collate_examples
from prefero.data.formats import Trajectory
from prefero.data.tokenize import Example, encode_sft
from prefero.types import TrajectoryBatch


@dataclass(frozen=True)
class EncodedTrajectory:
    """A text, which of its tokens were chosen, and what was given for each token, [T] all three."""

    id: str
    example: Example
    rewards: tuple[float, ...]

    @property
    def worth(self) -> float:
        """All that was given."""
        return math.fsum(self.rewards)


def rewarded(id: str, example: Example, reward: float | Sequence[float]) -> EncodedTrajectory:
    """An encoded text with its reward: a number, given after the last token that was chosen, or one for each of these.

    Raises ValueError naming the text where nothing was chosen in it, where a reward is no finite number, or where there
    are not as many as chosen tokens.
    """
    places = [place for place, chosen in enumerate(example.loss_mask) if chosen]
    if not places:
        raise ValueError(f"{id}: no token of it was chosen, so nothing can be learned from its reward; leave it out")
    given = [0.0] * (len(places) - 1) + [reward] if isinstance(reward, (int, float)) else list(reward)
    if len(given) != len(places):
        raise ValueError(
            f"{id}: {len(given)} rewards for {len(places)} chosen tokens (an end token among them); give one number "
            "for the whole, or one for each of these tokens"
        )
    if broken := [number for number in given if not math.isfinite(number)]:
        raise ValueError(f"{id}: the reward {broken[0]} is no finite number; correct it, or leave the row out")
    rewards = [0.0] * len(example.token_ids)
    for place, number in zip(places, given, strict=True):
        rewards[place] = float(number)
    return EncodedTrajectory(id, example, tuple(rewards))


def encode_trajectory(
    tokenizer: Any, trajectory: Trajectory, max_length: int | None = None, *, chat: bool = False
) -> EncodedTrajectory:
    """A row's tokens and rewards; never cut: what is at its end was worth something.

    Raises TooLongError over `max_length` tokens, and ValueError as `rewarded` does and for a row without a reward.
    """
    row = trajectory.row
    if trajectory.reward is None:
        raise ValueError(f"{row.id}: it has no reward; give a column `reward`, or name rewards that score the rows")
    return rewarded(row.id, encode_sft(tokenizer, row, max_length, chat=chat), trajectory.reward)


def scale_of(trajectories: Sequence[EncodedTrajectory]) -> tuple[float, float]:
    """Mean and standard deviation of what texts were worth, for `standardised`.

    Raises ValueError where all were worth the same.
    """
    worths = [trajectory.worth for trajectory in trajectories]
    mean, deviation = fmean(worths), pstdev(worths)
    if deviation <= 1e-12 * max(1.0, abs(mean)):
        raise ValueError(
            f"all {len(worths)} texts were worth the same ({mean:g}), so none of them can be learned to be better; "
            "give rewards that differ"
        )
    return mean, deviation


def standardised(trajectory: EncodedTrajectory, mean: float, deviation: float) -> EncodedTrajectory:
    """The same with rewards in units of the deviation, and the mean taken from the last of them.

    So that what texts are worth has mean 0 and deviation 1, whatever unit their rewards came in.
    """
    rewards = [reward / deviation for reward in trajectory.rewards]
    last = max(place for place, chosen in enumerate(trajectory.example.loss_mask) if chosen)
    rewards[last] -= mean / deviation
    return replace(trajectory, rewards=tuple(rewards))


def collate_trajectories(trajectories: Sequence[EncodedTrajectory], pad_id: int) -> TrajectoryBatch:
    """Encoded trajectories as a TrajectoryBatch [B, T]; padding has no attention, no action and no reward."""
    batch = collate_examples([trajectory.example for trajectory in trajectories], pad_id)
    rewards = [torch.tensor(trajectory.rewards, dtype=torch.float32) for trajectory in trajectories]
    return TrajectoryBatch(
        batch.token_ids, batch.attention_mask, batch.loss_mask, pad_sequence(rewards, batch_first=True)
    )
