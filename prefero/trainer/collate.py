"""From plain rollouts to the padded tensors an algorithm takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prefero.types import Rollout, Score


@dataclass(frozen=True)
class RolloutBatch:
    """B rollouts of S columns, the last A of them actions: prompts padded on the left, completions on the right.

    sequences, attention_mask: [B, S]; action_mask: [B, A]; logprobs: [B, A] as the sampler gave them (float64), None
    unless it gave them for every row; ended: [B], true where the completion ended with EOS.
    """

    sequences: Tensor
    attention_mask: Tensor
    action_mask: Tensor
    logprobs: Tensor | None
    ended: Tensor


def collate_rollouts(rollouts: Sequence[Rollout], device: torch.device | str = "cpu") -> RolloutBatch:
    """The rollouts as one batch on `device`; padding slots hold token 0 and are never attended.

    Raises ValueError naming the prompt for an empty prompt or an empty completion.
    """
    if not rollouts:
        raise ValueError("there are no rollouts to learn from: give at least one prompt")
    for rollout in rollouts:
        for part, token_ids in (("prompt", rollout.prompt.token_ids), ("completion", rollout.completion.token_ids)):
            if not token_ids:
                raise ValueError(f"the {part} of {rollout.prompt.id!r} is empty: it needs at least one token")
    num_rows = len(rollouts)
    num_prompt = max(len(rollout.prompt.token_ids) for rollout in rollouts)
    num_actions = max(len(rollout.completion.token_ids) for rollout in rollouts)
    sequences = torch.zeros(num_rows, num_prompt + num_actions, dtype=torch.long)
    attention_mask = torch.zeros_like(sequences)
    logprobs = torch.zeros(num_rows, num_actions, dtype=torch.float64)
    for row, rollout in enumerate(rollouts):
        prompt, completion = rollout.prompt.token_ids, rollout.completion
        start, stop = num_prompt - len(prompt), num_prompt + len(completion.token_ids)
        sequences[row, start:stop] = torch.tensor([*prompt, *completion.token_ids])
        attention_mask[row, start:stop] = 1
        if len(completion.logprobs) == len(completion.token_ids):
            logprobs[row, : len(completion.logprobs)] = torch.tensor(completion.logprobs, dtype=torch.float64)
    known = all(len(rollout.completion.logprobs) == len(rollout.completion.token_ids) for rollout in rollouts)
    return RolloutBatch(
        sequences=sequences.to(device),
        attention_mask=attention_mask.to(device),
        action_mask=attention_mask[:, num_prompt:].bool().to(device),
        logprobs=(logprobs.float() if torch.device(device).type == "mps" else logprobs).to(device) if known else None,
        ended=torch.tensor([rollout.completion.finish_reason == "stop" for rollout in rollouts], device=device),
    )


def score_tensor(scores: Sequence[Score], action_mask: Tensor) -> Tensor:
    """Scores of completions as a tensor beside action_mask [B, A]: [B], or [B, A] where any has steps.

    Then the points of a step stand at its token, and what the value has beyond its steps at the last token.
    """
    values = torch.tensor([score.value for score in scores], device=action_mask.device)
    if not any(score.steps for score in scores):
        return values
    per_token = torch.zeros(action_mask.shape, dtype=values.dtype)
    for row, score in enumerate(scores):
        for index, points in score.steps:
            per_token[row, index] += points
        per_token[row, int(action_mask[row].sum()) - 1] += score.value - sum(points for _, points in score.steps)
    return per_token.to(action_mask.device)
