"""Best of n: the simplest way to align by a reward, and the baseline a trained policy has to beat."""

from __future__ import annotations

from collections.abc import Sequence

from prefero.rewards.base import Reward
from prefero.rollout.collect import collect
from prefero.rollout.engine import Engine, SamplingParams
from prefero.strategies.group import ALONE, Group
from prefero.types import Prompt, ScoredRollout


def best_of_n(
    prompts: Sequence[Prompt],
    engine: Engine,
    reward: Reward,
    n: int,
    params: SamplingParams,
    group: Group = ALONE,
) -> list[ScoredRollout]:
    """The highest-scored of n completions of each prompt, in the prompts' order; of equals the first drawn.

    group: as for `collect`.

    Raises ValueError as `collect` does, and for greedy sampling, whose n completions would all be one.
    """
    if params.greedy and n > 1:
        raise ValueError(
            f"best-of-n with n {n} and greedy sampling draws n times the same: set sampling.greedy to false"
        )
    rollouts = collect(prompts, engine, reward, params, num_samples=n, group=group)
    groups = [rollouts[start : start + n] for start in range(0, len(rollouts), n)]
    return [max(group, key=lambda rollout: rollout.score.value) for group in groups]
