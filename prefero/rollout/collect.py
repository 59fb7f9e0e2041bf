"""From prompts to scored rollouts: generate, then score once; shared out over processes and joined again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from prefero.faults import fault
from prefero.rewards.base import Reward, checked_scores, goes_in_step
from prefero.rollout.engine import Engine, SamplingParams, TruncatedCompletion
from prefero.strategies.group import ALONE, Group
from prefero.types import Completion, Prompt, Rollout, Score, ScoredRollout


def collect(
    prompts: Sequence[Prompt],
    engine: Engine,
    reward: Reward,
    params: SamplingParams,
    num_samples: int = 1,
    group: Group = ALONE,
    *,
    in_step: bool = False,
) -> list[ScoredRollout]:
    """Draws `num_samples` completions of each prompt and scores them all in one call of the reward.

    Returns len(prompts) * num_samples rollouts in group order: all samples of the first prompt, then of the second. A
    prompt that stands there twice draws other samples the second time. group: every process answers and scores its
    share of the prompts and gets the rollouts of all. in_step: the reward must be called by all processes for equally
    many rollouts, so some score one twice (also where the reward says so itself: `goes_in_step`).
    Raises ValueError for no prompts, num_samples below 1, whatever the engine refuses, and at the first score that
    is missing or no finite number, naming the prompt, the reward, the value and the cure.
    """
    if not prompts:
        raise ValueError("collect got no prompts: check that the prompt source is not empty or used up")
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"num_samples is {num_samples!r}: give a whole number, 1 or more")
    prompts, share = _numbered(prompts, num_samples), group.share(len(prompts))
    grouped = [prompts[row] for row in share.rows for _ in range(num_samples)]
    num_real = share.num_real * num_samples
    if not (in_step or goes_in_step(reward)):
        grouped = grouped[:num_real]
    fault("rollout")
    rollouts = _answered(grouped, engine, params)
    fault("score")
    scores = checked_scores(reward, rollouts) if rollouts else []
    own = [
        ScoredRollout(rollout.prompt, rollout.completion, score)
        for rollout, score in zip(rollouts, scores, strict=True)
    ][:num_real]
    if group.world_size == 1:
        return own
    # Every process has the prompts; only what was answered and scored has to travel.
    answers = group.gather_json([[asdict(rollout.completion), asdict(rollout.score)] for rollout in own])
    return [
        ScoredRollout(prompt, completion_of(completion), score_of(score))
        for prompt, (completion, score) in zip(
            [prompt for prompt in prompts for _ in range(num_samples)], answers, strict=True
        )
    ]


def _answered(prompts: Sequence[Prompt], engine: Engine, params: SamplingParams) -> list[Rollout]:
    if not prompts:
        return []
    completions = engine.generate(prompts, params)
    assert len(completions) == len(prompts), "an engine answers every prompt exactly once"
    return [Rollout(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def _numbered(prompts: Sequence[Prompt], num_samples: int) -> list[Prompt]:
    """Prompts that know how often they were asked before, however they are shared out."""
    asked: Counter[str] = Counter()
    numbered = []
    for prompt in prompts:
        again = asked[prompt.id]
        numbered.append(replace(prompt, first_sample=again * num_samples) if again else prompt)
        asked[prompt.id] += 1
    return numbered


def score_of(plain: dict[str, Any]) -> Score:
    """A score from its fields, as JSON brought them."""
    return Score(plain["value"], plain["parts"], tuple((index, value) for index, value in plain["steps"]))


def completion_of(plain: dict[str, Any]) -> Completion:
    """A completion from its fields, as JSON brought them."""
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
    return TruncatedCompletion(**fields) if "sampling_logprobs" in fields else Completion(**fields)
