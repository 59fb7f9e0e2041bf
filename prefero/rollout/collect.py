"""From prompts to scored rollouts: generate, then score once."""

from __future__ import annotations

from collections.abc import Sequence

from prefero.rewards.base import Reward, checked_scores
from prefero.rollout.engine import Engine, SamplingParams
from prefero.types import Prompt, Rollout, ScoredRollout


def collect(
    prompts: Sequence[Prompt], engine: Engine, reward: Reward, params: SamplingParams, num_samples: int = 1
) -> list[ScoredRollout]:
    """Draws `num_samples` completions of each prompt and scores them all in one call of the reward.

    Returns len(prompts) * num_samples rollouts in group order: all samples of the first prompt, then of the second.
    Raises ValueError for no prompts, num_samples below 1, whatever the engine refuses, and at the first score that
    is missing or no finite number, naming the prompt, the reward, the value and the cure.
    """
    if not prompts:
        raise ValueError("collect got no prompts: check that the prompt source is not empty or used up")
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"num_samples is {num_samples!r}: give a whole number, 1 or more")
    grouped = [prompt for prompt in prompts for _ in range(num_samples)]
    completions = engine.generate(grouped, params)
    assert len(completions) == len(grouped), "an engine answers every prompt exactly once"
    rollouts = [Rollout(prompt, completion) for prompt, completion in zip(grouped, completions, strict=True)]
    scores = checked_scores(reward, rollouts)
    return [
        ScoredRollout(rollout.prompt, rollout.completion, score)
        for rollout, score in zip(rollouts, scores, strict=True)
    ]
